"""How is a linear layer multiplied together with its update? In one operation, with a backward of its own.

The backward keeps x, which the gradient of lora_A needs, and h, which has the rank; nothing else of the size of x or y.
What was dropped is dropped again there, products are added up where they are computed, and the scaling multiplies a
factor, in the wider of the dtypes. A compiler differentiates the expression itself, and chooses by itself what to keep.
Of the two orders that three matrices can be multiplied in, `order` takes the cheaper.

Shapes: T... are the token dimensions, at least one; i, o the local input and output features; r the rank.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_fn.dropout import Mask, kept

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
    if order(x.numel() // x.shape[-1], weight.shape[0], weight.shape[1], down.shape[0]) == DELTA:
        wide = torch.promote_types(up.dtype, down.dtype)
        x, update = forked(x, scaled(up.to(wide) @ down.to(wide), scale), 1.0, mask)
        return F.linear(x, weight, bias) + update
    args = (_matrix(x), weight, bias, down, up, scale, *_flat(mask))
    if torch.compiler.is_compiling():
        y = _Updated.forward(*args)[0]
    else:
        y = _Updated.apply(*args)[0] if torch._C._are_functorch_transforms_active() else _UpdatedEager.apply(*args)
    return y if x.dim() == 2 else y.view(*x.shape[:-1], y.shape[-1])


FACTORS, DELTA = "factors", "delta"


def flops(tokens: int, outside: int, inside: int, rank: int) -> dict[str, int]:
    """What an update costs forward and backward, by the order of its products.

    "factors": (x A^T) B^T, and so back. "delta": x (B A)^T, which is less where the rank is above what the smaller side
    has, as for a router of few experts. The delta is no part of the weight, whose dtype would round it away.

    Args:
        tokens, outside, inside, rank: T, o, i, r.
    """
    both = tokens * rank * (inside + outside)
    return {FACTORS: 6 * both, DELTA: 6 * outside * inside * (tokens + rank)}


def order(tokens: int, outside: int, inside: int, rank: int) -> str:
    """The order that costs fewer FLOPs; args as in `flops`. Shapes alone decide.

    Source: RunLoRA, arXiv 2312.03415, chooses so, per shape.

    Example:
        >>> order(2048, 4096, 4096, 16), order(2048, 8, 4096, 64)
        ('factors', 'delta')
    """
    cost = flops(tokens, outside, inside, rank)
    return DELTA if cost[DELTA] < cost[FACTORS] else FACTORS


def forked(x: Tensor, down: Tensor, scale: Scale, mask: Mask | None = None) -> tuple[Tensor, Tensor]:
    """x itself, and scale * dropped(x) A^T, whose gradients come together in one sum. Args as in `updated`.

    Returns:
        [T..., i] and [T..., r].
    """
    function = _Forked.forward if torch.compiler.is_compiling() else _Forked.apply
    same, h = function(_matrix(x), down, scale, *_flat(mask))
    return same.view(x.shape), h.view(*x.shape[:-1], h.shape[-1])


def added(y: Tensor, h: Tensor, up: Tensor) -> Tensor:
    """y + h B^T.

    Args:
        y: [T..., o].
        h: [T..., r], of y's dtype.
        up: lora_B [o, r]; it is cast to y's dtype.
    """
    return torch.addmm(_matrix(y), _matrix(h), up.to(y.dtype).T).view(y.shape)


def in_place(new: Tensor) -> bool:
    """Whether to add to a new tensor where it is. An XLA tensor is nowhere while it is traced, and torch_xla 2.9 takes
    100 times as long to trace `addmm_` as `addmm`."""
    return new.device.type != "xla"


def scaled(h: Tensor, scale: Scale) -> Tensor:
    """h times a scaling, in h's dtype."""
    return (h * scale).to(h.dtype)


# Below, x is a matrix [T, i], a mask's rows are [T, 1], its columns [i].

_Flat = tuple[Tensor | None, Tensor | None, float]


def _matrix(x: Tensor) -> Tensor:
    return x if x.dim() == 2 else x.reshape(-1, x.shape[-1])


def _flat(mask: Mask | None) -> _Flat:
    return (None, None, 0.0) if mask is None else (mask.rows.reshape(-1, 1), mask.columns, mask.probability)


def _signed(function: Any) -> Any:
    """An autograd.Function whose signature is known: torch makes it again in each call."""
    function.forward.__signature__ = inspect.signature(function.forward)
    return function


def _times(factor: Tensor, scale: Scale, probability: float, dtype: torch.dtype) -> Tensor:
    """A factor times the scaling, and what dropout scales the kept elements up by, in a dtype."""
    scale = scale * (1 / (1 - probability)) if probability else scale
    wide = factor if factor.itemsize >= dtype.itemsize else factor.to(dtype)
    return (wide * scale).to(dtype)


def _keep(x: Tensor, rows: Tensor | None, columns: Tensor | None, probability: float) -> Tensor | None:
    return None if rows is None or columns is None else kept(Mask(rows, columns, probability), x.dtype)


def _seen(x: Tensor, keep: Tensor | None) -> Tensor:
    return x if keep is None else x * keep


def _down(
    x: Tensor, down: Tensor, scale: Scale, rows: Tensor | None, columns: Tensor | None, probability: float
) -> Tensor:
    """scale * dropped(x) A^T."""
    seen = _seen(x, _keep(x, rows, columns, probability))
    return F.linear(seen, _times(down, scale, probability, x.dtype))


def _grads_of_down(
    h_grad: Tensor, x: Tensor, down: Tensor, x_grad: Tensor | None, keep: Tensor | None, wants_down: bool, own: bool
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of x, added to what it has from elsewhere (in place, if that is our own), and of lora_A, from that
    of (dropped(x) A^T)^T, which is [r, T]: BLAS is slow where a result has few columns."""
    factor = down.to(x.dtype)
    if x_grad is not None and keep is None:
        x_grad = (x_grad.addmm_ if own else x_grad.addmm)(h_grad.T, factor)
    elif x_grad is not None and keep is not None:
        x_grad = (x_grad.addcmul_ if own else x_grad.addcmul)(h_grad.T @ factor, keep)
    return x_grad, (h_grad @ _seen(x, keep)).to(down.dtype) if wants_down else None


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
        h = _down(x, down, scale, rows, columns, probability)
        return torch.addmm(F.linear(x, weight, bias), h, up.to(x.dtype).T), h

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        _save(ctx, inputs, output[1])

    @staticmethod
    def backward(ctx: Any, y_grad: Tensor | None, h_grad: Tensor | None) -> tuple[Tensor | None, ...]:
        *inputs, h = ctx.saved_tensors
        return _grads(ctx, inputs, h, inputs[3].T, y_grad, h_grad, own=False)


class _UpdatedEager(torch.autograd.Function):
    """The same, where no transform looks on: in torch's older form, which has less to do in each call, and may keep
    what is no output. A second backward sees h as a function of what it was computed from."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        x, weight, bias, down, up, scale, *mask = inputs
        h, turned = _down(x, down, scale, *mask), up.T
        _save(ctx, inputs, h, turned)
        y = F.linear(x, weight, bias)
        return (y.addmm_ if in_place(y) else y.addmm)(h, turned.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, y_grad: Tensor | None) -> tuple[Tensor | None, ...]:
        *inputs, h, turned = ctx.saved_tensors
        if torch.is_grad_enabled():
            x, _, down, up, tensor, rows, columns = inputs
            h = _down(x, down, ctx.scale if tensor is None else tensor, rows, columns, ctx.probability)
            turned = up.T
        return _grads(ctx, inputs, h, turned, y_grad, None, own=in_place(h))


def _save(ctx: Any, inputs: tuple[Any, ...], *more: Tensor) -> None:
    x, weight, _, down, up, scale, rows, columns, ctx.probability = inputs
    ctx.scale, tensor = (None, scale) if isinstance(scale, Tensor) else (scale, None)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, weight, down, up, tensor, rows, columns, *more)


def _grads(
    ctx: Any,
    inputs: Sequence[Any],
    h: Tensor,
    turned: Tensor,
    y_grad: Tensor | None,
    h_grad: Tensor | None,
    *,
    own: bool,
) -> tuple[Tensor | None, ...]:
    """The gradients of the inputs of `_Updated`; `turned` is B^T, and `own` says that what is new may be added to in
    place."""
    x, weight, down, up, tensor, rows, columns = inputs
    wants_x, wants_weight, wants_bias, wants_down, wants_up = ctx.needs_input_grad[:5]
    scale, probability = ctx.scale if tensor is None else tensor, ctx.probability
    x_grad = weight_grad = bias_grad = up_grad = of_h = None
    if y_grad is not None:
        across = y_grad.T
        of_h = _times(turned, scale, probability, x.dtype) @ across
        x_grad = y_grad @ weight if wants_x else None
        weight_grad = across @ x if wants_weight else None
        bias_grad = y_grad.sum(0) if wants_bias else None
        up_grad = (across @ h).to(up.dtype) if wants_up else None
    elif wants_x:
        x_grad = torch.zeros_like(x)
    if h_grad is not None:
        more = _times(h_grad.T, scale, probability, x.dtype)
        of_h = more if of_h is None else of_h + more
    if of_h is None:
        return None, *(None,) * 8
    keep = _keep(x, rows, columns, probability)
    x_grad, down_grad = _grads_of_down(of_h, x, down, x_grad, keep, wants_down, own)
    return x_grad, weight_grad, bias_grad, down_grad, up_grad, *(None,) * 4


@_signed
class _Forked(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor, down: Tensor, scale: Scale, rows: Tensor | None, columns: Tensor | None, probability: float
    ) -> tuple[Tensor, Tensor]:
        return x.view_as(x), _down(x, down, scale, rows, columns, probability)

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
        wants_x, wants_down = ctx.needs_input_grad[:2]
        x_grad = torch.zeros_like(x) if same_grad is None and wants_x else same_grad
        h_grad = _times(h_grad.T, ctx.scale if tensor is None else tensor, ctx.probability, x.dtype)
        keep = _keep(x, rows, columns, ctx.probability)
        found = _grads_of_down(h_grad, x, down, x_grad if wants_x else None, keep, wants_down, own=False)
        return *found, *(None,) * 4
