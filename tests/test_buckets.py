"""Are the sums of a step's two buckets those of one, and is the first begun before the backward is over?"""

import inspect
import types

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import adapters
import lora_fn
from adapters import buckets
from lora_fn.axis import axis_of_mesh
from tests.pool import pool

LAYERS, WIDE, NARROW = 3, 12, 8


def model_of(mesh):
    """Column and row layers, one after the other, whose lora_A and lora_B have partial gradients."""
    torch.manual_seed(0)
    axis = axis_of_mesh(mesh, "tp")
    pairs = []
    for _ in range(LAYERS):
        up = adapters.ColumnParallelLinear(NARROW, WIDE, bias=False, gather_output=False, axis=axis)
        down = adapters.RowParallelLinear(WIDE, NARROW, bias=False, input_is_parallel=True, axis=axis)
        pairs.append(nn.ModuleDict({"up": up, "down": down}))
    model = nn.ModuleList(pairs).double()
    generator = torch.Generator().manual_seed(1)
    for p in model.parameters():
        p.data = torch.randn(p.shape, dtype=p.dtype, generator=generator)
    spec = lora_fn.LoraSpec(rank=4, alpha=8, target_modules="all-linear", init_lora_weights=False)
    return adapters.wrap(model, spec, gradients="deferred", dtype=torch.float64)


class Chain(nn.Module):
    """The layers, one after the other."""

    def __init__(self, layers):
        super().__init__()
        self.layers = layers

    def forward(self, x):
        for pair in self.layers:
            x = torch.tanh(pair["down"](torch.tanh(pair["up"](x))))
        return x


class Order(TorchDispatchMode):
    """The names of what is dispatched."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen.append(function._opname)
        return function(*args, **kwargs or {})


def step(mesh, least, module):
    """The gradients of two microbatches by buckets, and by `sync_gradients`; and what was dispatched meanwhile."""
    model = model_of(mesh)
    factors, specs = adapters.factors(model), adapters.specs(model)

    def loss(factors, x):
        named = {f"{path}.{name}": p for path, of in factors.items() for name, p in of.items()}
        return (
            torch.func.functional_call(Chain(model), {f"layers.{n}": p for n, p in named.items()}, (x,)).square().sum()
        )

    rows = torch.randn(2, 5, NARROW, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    _, first = lora_fn.value_and_grad(loss)(factors, rows[0])
    _, second = lora_fn.value_and_grad(loss)(factors, rows[1])
    whole = {path: {n: first[path][n] + g for n, g in of.items()} for path, of in second.items()}
    expected = lora_fn.sync_gradients(whole, specs)
    last = module.Buckets(factors, specs, first, least=least)
    with Order() as order:
        _, second = lora_fn.value_and_grad(loss, ready=last)(factors, rows[1])
        in_backward = len(order.seen)
        found = last.finish(second)
    return found, expected, order.seen, in_backward


def stepped(mesh, least, text="", other=""):
    """`step`, by the module with a text replaced."""
    source = inspect.getsource(buckets)
    assert not text or source.count(text) == 1
    module = types.ModuleType("buckets")
    exec(compile(source.replace(text, other) if text else source, buckets.__file__, "exec"), module.__dict__)
    return step(mesh, least, module)


def agree(found, expected):
    names = [(path, name) for path, of in expected.items() for name in of]
    assert [(path, name) for path, of in found.items() for name in of] == names
    return all(torch.equal(found[path][name], expected[path][name]) for path, name in names)


@pytest.mark.parametrize("least, sums", [(0, 2), (1 << 20, 1)])
def test_two_buckets_sum_what_one_does(least, sums):
    for found, expected, seen, in_backward in pool(2).run(stepped, least):
        assert agree(found, expected)
        # The base's own: the forward of the rows, and the backward of the columns but the first.
        assert seen.count("all_reduce") == 2 * LAYERS - 1 + sums
        begun = [i for i, name in enumerate(seen[:in_backward]) if name == "all_reduce"]
        assert len(begun) == 2 * LAYERS - 1 + sums - 1
        if sums == 2:  # the first goes on after the backward, and has work of the backward beside it
            assert seen[:in_backward].count("wait_tensor") == len(begun) - 1
            first = next(i for i in begun[LAYERS:] if seen[i + 1] != "wait_tensor")
            assert "mm" in seen[first:in_backward]


DEFECTS = {
    "the microbatches before": ("self.before[path][name] + grad", "grad"),
    "the first bucket is not summed": ("else self._begun()", "else self._first"),
    "begun before it is whole": ("if not self._waiting:", "if len(self._waiting) < 2 and self._begun is None:"),
}


@pytest.mark.parametrize("defect", DEFECTS)
def test_a_defect_is_seen(defect):
    for found, expected, *_ in pool(2).run(stepped, 0, *DEFECTS[defect]):
        assert not agree(found, expected)
