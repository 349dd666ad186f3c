"""How is a linear layer multiplied together with its update? In one operation, with a backward of its own.

The backward keeps x, which the gradient of lora_A needs, and h, which has the rank; nothing else of the size of x or y.
What was dropped is dropped again there, products are added up where they are computed, and the scaling multiplies what
has the rank. A compiler differentiates the expression itself, and chooses by itself what to keep.

Shapes: T... are the token dimensions, at least one; i, o the local input and output features; r the rank.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_fn.dropout import Mask, dropped

Scale = float | Tensor


def updated(
    x: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor, scale: Scale, mask: Mask | None = None
) -> Tensor:
    """x W^T + bias + scale * dropped(x) A^T B^T.

    Args:
        x: [T..., i].
        weight: [o, i], of x's dtype.
        bias: [o], of x's dtype.
        down: lora_A [r, i], of any floating dtype; it is cast to x's.
        up: lora_B [o, r], likewise.
        scale: A number, or a tensor [1].
        mask: Which elements of x the update does not see.

    Returns:
        [T..., o].
    """
    rows, columns, probability = mask or (None, None, 0.0)
    return _run(_Updated, x, weight, bias, down, up, scale, rows, columns, probability)[0]


def forked(x: Tensor, down: Tensor, scale: Scale, mask: Mask | None = None) -> tuple[Tensor, Tensor]:
    """x itself, and scale * dropped(x) A^T, whose gradients come together in one sum. Args as in `updated`.

    Returns:
        [T..., i] and [T..., r].
    """
    rows, columns, probability = mask or (None, None, 0.0)
    return _run(_Forked, x, down, scale, rows, columns, probability)


def added(y: Tensor, h: Tensor, up: Tensor) -> Tensor:
    """y + h B^T.

    Args:
        y: [T..., o].
        h: [T..., r], of y's dtype.
        up: lora_B [o, r]; it is cast to y's dtype.
    """
    return torch.addmm(_matrix(y), _matrix(h), up.to(y.dtype).T).view(y.shape)


def _run(function: Any, *args: Any) -> Any:
    return (function.forward if torch.compiler.is_compiling() else function.apply)(*args)


def _signed(function: Any) -> Any:
    """An autograd.Function whose signature is known: torch makes it again in each call."""
    function.forward.__signature__ = inspect.signature(function.forward)
    return function


def _matrix(x: Tensor) -> Tensor:
    return x if x.dim() == 2 else x.reshape(-1, x.shape[-1])


def scaled(h: Tensor, scale: Scale) -> Tensor:
    """h times a scaling, in h's dtype."""
    return (h * scale).to(h.dtype)


def _down(x: Tensor, down: Tensor, scale: Scale, mask: Mask | None) -> Tensor:
    return scaled(F.linear(dropped(x, mask), down.to(x.dtype)), scale)


def _mask(rows: Tensor | None, columns: Tensor | None, probability: float) -> Mask | None:
    return None if rows is None or columns is None else Mask(_matrix(rows), columns, probability)


def _grads_of_down(
    h_grad: Tensor, x: Tensor, down: Tensor, x_grad: Tensor | None, mask: Mask | None, wants_down: bool
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of a matrix x, added to what it has from elsewhere, and of lora_A, from that of x A^T."""
    factor = down.to(x.dtype)
    if x_grad is not None:
        x_grad = torch.addmm(x_grad, h_grad, factor) if mask is None else x_grad + dropped(h_grad @ factor, mask)
    return x_grad, (h_grad.T @ dropped(x, mask)).to(down.dtype) if wants_down else None


@_signed
class _Updated(torch.autograd.Function):
    """(y, h): h is an output, so that what is kept of it has a gradient of its own in a second backward."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        down: Tensor,
        up: Tensor,
        scale: Scale,
        rows: Tensor | None,
        columns: Tensor | None,
        probability: float,
    ) -> tuple[Tensor, Tensor]:
        flat = _matrix(x)
        h = _down(flat, down, scale, _mask(rows, columns, probability))
        y, factor = F.linear(flat, weight, bias), up.to(x.dtype).T
        # In place, but not in a transform: under vmap, y may lack a dimension that h has.
        transformed = torch.compiler.is_compiling() or torch._C._functorch.maybe_current_level() is not None
        y = torch.addmm(y, h, factor) if transformed else y.addmm_(h, factor)
        return y.view(*x.shape[:-1], -1), h

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        x, weight, _, down, up, scale, rows, columns, ctx.probability = inputs
        ctx.scale, tensor = (None, scale) if isinstance(scale, Tensor) else (scale, None)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, weight, down, up, tensor, rows, columns, output[1])

    @staticmethod
    def backward(ctx: Any, y_grad: Tensor | None, h_grad: Tensor | None) -> tuple[Tensor | None, ...]:
        x, weight, down, up, tensor, rows, columns, h = ctx.saved_tensors
        wants_x, wants_weight, wants_bias, wants_down, wants_up = ctx.needs_input_grad[:5]
        mask, scale = _mask(rows, columns, ctx.probability), ctx.scale if tensor is None else tensor
        flat, x_grad, weight_grad, bias_grad, up_grad = _matrix(x), None, None, None, None
        if y_grad is not None:
            grad = _matrix(y_grad)
            of_h = grad @ up.to(grad.dtype)
            h_grad = of_h if h_grad is None else h_grad + of_h
            x_grad = grad @ weight if wants_x else None
            weight_grad = grad.T @ flat if wants_weight else None
            bias_grad = grad.sum(0) if wants_bias else None
            up_grad = (grad.T @ h).to(up.dtype) if wants_up else None
        elif wants_x:
            x_grad = torch.zeros_like(flat)
        if h_grad is None:
            return None, *(None,) * 8
        x_grad, down_grad = _grads_of_down(scaled(h_grad, scale), flat, down, x_grad, mask, wants_down)
        x_grad = None if x_grad is None else x_grad.view(x.shape)
        return x_grad, weight_grad, bias_grad, down_grad, up_grad, *(None,) * 4


@_signed
class _Forked(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor, down: Tensor, scale: Scale, rows: Tensor | None, columns: Tensor | None, probability: float
    ) -> tuple[Tensor, Tensor]:
        h = _down(_matrix(x), down, scale, _mask(rows, columns, probability))
        return x.view_as(x), h.view(*x.shape[:-1], -1)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        x, down, scale, rows, columns, ctx.probability = inputs
        ctx.scale, tensor = (None, scale) if isinstance(scale, Tensor) else (scale, None)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, down, tensor, rows, columns)

    @staticmethod
    def backward(ctx: Any, same_grad: Tensor | None, h_grad: Tensor | None) -> tuple[Tensor | None, ...]:
        x, down, tensor, rows, columns = ctx.saved_tensors
        if h_grad is None:
            return same_grad, *(None,) * 5
        flat, wants_x = _matrix(x), ctx.needs_input_grad[0]
        x_grad = torch.zeros_like(flat) if same_grad is None else _matrix(same_grad)
        mask, scale = _mask(rows, columns, ctx.probability), ctx.scale if tensor is None else tensor
        found = _grads_of_down(
            scaled(_matrix(h_grad), scale), flat, down, x_grad if wants_x else None, mask, ctx.needs_input_grad[1]
        )
        return None if found[0] is None else found[0].view(x.shape), found[1], *(None,) * 4
