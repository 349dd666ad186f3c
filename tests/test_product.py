"""Is a linear layer with its update what plain autograd makes of it, whichever order its products have?"""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from lora_fn import product
from lora_fn.dropout import dropped, mask

SHAPES = {"factors": (24, 16, 3), "delta": (4, 24, 16)}  # outputs, inputs, rank
TOKENS, SCALE, KEY = 40, 1.5, torch.tensor(7)


def drawn(outside, inside, rank, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    sizes = ((2, TOKENS // 2, inside), (outside, inside), (outside,), (rank, inside), (outside, rank))
    return [torch.randn(size, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for size in sizes]


def plain(x, weight, bias, down, up, seen):
    return F.linear(x, weight, bias) + SCALE * F.linear(F.linear(seen(x), down), up)


def masked(inside):
    tokens = torch.arange(TOKENS, dtype=torch.int32).view(2, -1, 1)
    return mask(KEY, tokens, torch.arange(inside, dtype=torch.int32), 0.25)


@pytest.mark.parametrize("drops", (False, True))
@pytest.mark.parametrize("order", SHAPES)
def test_both_orders_are_plain_autograd(order, drops):
    leaves = drawn(*SHAPES[order])
    unseen = masked(leaves[0].shape[-1]) if drops else None
    assert product.order(TOKENS, *SHAPES[order]) == order
    found = product.updated(*leaves, SCALE, unseen)
    expected = plain(*leaves, lambda x: dropped(x, unseen) if drops else x)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    cotangent = torch.randn(found.shape, dtype=found.dtype, generator=torch.Generator().manual_seed(1))
    for grad, of in zip(
        torch.autograd.grad(found, leaves, cotangent), torch.autograd.grad(expected, leaves, cotangent), strict=True
    ):
        torch.testing.assert_close(grad, of, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("order", SHAPES)
def test_an_order_costs_what_it_says(order):
    x, weight, bias, down, up = drawn(*SHAPES[order])

    def counted(run):
        with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: _addmm_flop}) as counter:
            torch.autograd.grad(run().sum(), [x, down, up], allow_unused=True)
        return counter.get_total_flops()

    base = counted(lambda: F.linear(x, weight.detach(), bias.detach()))
    added = counted(lambda: product.updated(x, weight.detach(), bias.detach(), down, up, SCALE)) - base
    cost = product.flops(TOKENS, *SHAPES[order])
    assert added == cost[order] == min(cost.values())


def _addmm_flop(y, a, b, out_shape=None, **factors):
    return 2 * a[0] * a[1] * b[1]


def test_a_small_delta_is_not_rounded_into_the_weight():
    x, weight, _, down, up = drawn(*SHAPES["delta"], dtype=torch.bfloat16)
    down = (down * 2.0**-14).detach()
    ones, zeros = torch.ones_like(weight), torch.zeros_like(weight)
    assert torch.equal(ones + up @ down, ones), "else W could be merged with"
    expected = plain(x.double(), zeros.double(), None, down.double(), up.double(), lambda x: x)
    assert (product.updated(x, zeros, None, down, up, SCALE) - expected).norm() <= 2**-7 * expected.norm()
    generator = torch.Generator().manual_seed(2)  # x whose sum is zero: then W = 1 gives nothing to round the update to
    balanced = torch.randn(x.shape, generator=generator).sign().bfloat16()
    balanced[..., 1::2] = -balanced[..., ::2]
    expected = plain(balanced.double(), zeros.double(), None, down.double(), up.double(), lambda x: x)
    found = product.updated(balanced, ones, None, down, up, SCALE)
    assert (found - expected).norm() <= 2**-6 * expected.norm()
