"""How is a linear layer multiplied with an update of its own for each group of rows? In one operation, as `product`.

The weight is multiplied once, for all rows; the factors in one batched product each. What the backward keeps is what
`product` keeps.

Shapes: n groups; T... are the token dimensions of each, at least one; i, o features; r the rank.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_fn.product import in_place


def updated(x: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor, scales: Tensor) -> Tensor:
    """x W^T + bias + scales * x A^T B^T, where every group of rows has its own A, B and scale.

    Args:
        x: [n, T..., i].
        weight: [o, i], of x's dtype.
        bias: [o], of x's dtype.
        down: The lora_A of each [n, r, i], of any floating dtype; it is cast to x's.
        up: The lora_B of each [n, o, r], likewise.
        scales: [n].

    Returns:
        [n, T..., o].
    """
    run = _Updated.forward if torch.compiler.is_compiling() else _Updated.apply
    return run(x, weight, bias, down, up, scales)[0]


def _flat(x: Tensor) -> Tensor:
    return x.reshape(x.shape[0], -1, x.shape[-1])


def _scaled(h: Tensor, scales: Tensor) -> Tensor:
    return (h * scales[:, None, None]).to(h.dtype)


class _Updated(torch.autograd.Function):
    """(y, h): h is an output, so that what is kept of it has a gradient of its own in a second backward."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor, scales: Tensor
    ) -> tuple[Tensor, Tensor]:
        flat, factor = _flat(x), up.to(x.dtype).mT
        h = _scaled(torch.bmm(flat, down.to(x.dtype).mT), scales)
        y = F.linear(flat, weight, bias)
        # In place, but not in a transform: under vmap, y may lack a dimension that h has.
        transformed = torch.compiler.is_compiling() or torch._C._functorch.maybe_current_level() is not None
        y = (torch.baddbmm if transformed or not in_place(y) else Tensor.baddbmm_)(y, h, factor)
        return y.view(*x.shape[:-1], -1), h

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        x, weight, _, down, up, scales = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, weight, down, up, scales, output[1])

    @staticmethod
    def backward(ctx: Any, y_grad: Tensor | None, h_grad: Tensor | None) -> tuple[Tensor | None, ...]:
        x, weight, down, up, scales, h = ctx.saved_tensors
        wants_x, wants_weight, wants_bias, wants_down, wants_up, _ = ctx.needs_input_grad
        flat, x_grad, weight_grad, bias_grad, down_grad, up_grad = _flat(x), None, None, None, None, None
        if y_grad is not None:
            grad = _flat(y_grad)
            of_h = torch.bmm(grad, up.to(grad.dtype))
            h_grad = of_h if h_grad is None else h_grad + of_h
            x_grad = grad @ weight if wants_x else None
            weight_grad = grad.flatten(0, 1).T @ flat.flatten(0, 1) if wants_weight else None
            bias_grad = grad.sum((0, 1)) if wants_bias else None
            up_grad = torch.bmm(grad.mT, h).to(up.dtype) if wants_up else None
        elif wants_x:
            x_grad = torch.zeros_like(flat)
        if h_grad is not None:
            h_grad = _scaled(h_grad, scales)
            x_grad = None if x_grad is None else torch.baddbmm(x_grad, h_grad, down.to(x.dtype))
            down_grad = torch.bmm(h_grad.mT, flat).to(down.dtype) if wants_down else None
        return None if x_grad is None else x_grad.view(x.shape), weight_grad, bias_grad, down_grad, up_grad, None
