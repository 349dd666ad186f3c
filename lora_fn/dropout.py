"""Which elements are dropped? A pure function of (key, logical token, logical feature).

So the mask is the same at every size of the axis, with and without sequence parallel, and is computed again in the
backward instead of being saved. The hash is the 32-bit finaliser "lowbias32" in int32 arithmetic, which wraps.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

# Source of the constants and shifts: C. Wellons, "Prospecting for Hash Functions" (2018), lowbias32.
_MULTIPLIERS = (0x7FEB352D, 0x846CA68B - (1 << 32))
_SHIFTS = (16, 15, 16)
_FEATURE = 0x2545F491
# Token (..., b, s) has number s + b * TOKEN_STRIDE + ... in 32 bits, whatever the sizes are. 2**32 / golden ratio.
TOKEN_STRIDE = 0x9E3779B1


def wrap(number: int) -> int:
    """An integer as int32 arithmetic has it."""
    return (number + (1 << 31)) % (1 << 32) - (1 << 31)


def wide(numbers: Tensor) -> Tensor:
    """int32 numbers to add or multiply and then to cut to int32 again: as int64 where their arithmetic does not wrap.

    That is in the C++ of torch.compile's inductor, where a signed overflow is undefined (pytorch issue 190764).
    """
    return numbers.to(torch.int64) if torch.compiler.is_compiling() and numbers.device.type == "cpu" else numbers


def _times(h: Tensor, multiplier: int) -> Tensor:
    return (wide(h) * multiplier).to(torch.int32)


def _shifted(h: Tensor, shift: int) -> Tensor:
    """h >> shift, for which torch_xla 2.9 divides, so that numbers below zero round the other way."""
    if h.device.type != "xla":
        return h >> shift
    return torch.bitwise_right_shift(h, torch.full((), shift, dtype=h.dtype, device=h.device))


def _xor_shift(h: Tensor, shift: int) -> Tensor:
    return h ^ (_shifted(h, shift) & ((1 << (32 - shift)) - 1))


def mix(h: Tensor) -> Tensor:
    """A bijection of int32 values that spreads every bit over all bits."""
    h = _times(_xor_shift(h, _SHIFTS[0]), _MULTIPLIERS[0])
    h = _times(_xor_shift(h, _SHIFTS[1]), _MULTIPLIERS[1])
    return _xor_shift(h, _SHIFTS[2])


def fold_in(key: Tensor, data: int | Tensor) -> Tensor:
    """A new key from a key and an integer (a layer's number, a step).

    Args:
        key: int tensor [], any integer dtype; its low 32 bits count.
        data: An integer below 2**31, or an int tensor [].

    Returns:
        int32 tensor [].
    """
    other = torch.as_tensor(data, dtype=torch.int32, device=key.device)
    return mix(key.to(torch.int32) ^ mix((wide(other) + _FEATURE).to(torch.int32)))


class Mask(NamedTuple):
    """Which elements are dropped.

    Args:
        rows: int32 [..., 1], of each token.
        columns: int32 [features], or [1, ..., features], of each feature.
        probability: In [0, 1).
    """

    rows: Tensor
    columns: Tensor
    probability: float


def mask(key: Tensor, tokens: Tensor, features: Tensor, probability: float) -> Mask:
    """The mask of a key.

    Args:
        key: int tensor [].
        tokens: int32 [..., 1], the logical number of each token.
        features: int32 [features], the logical number of each feature.
        probability: In [0, 1).
    """
    of_tokens, of_features = fold_in(key, torch.arange(1, 3, dtype=torch.int32, device=key.device)).unbind()
    mixed = mix(torch.cat([tokens.reshape(-1) ^ of_tokens, features ^ of_features]))
    rows, columns = mixed.split([tokens.numel(), features.numel()])
    return Mask(rows.view(tokens.shape), columns, probability)


def dropped(x: Tensor, mask: Mask | None) -> Tensor:
    """x with elements dropped, and the others scaled by 1 / (1 - probability); the mask is not kept for the backward.

    Args:
        x: [..., features], any floating dtype.
        mask: Of its tokens and features; None drops nothing.
    """
    if mask is None:
        return x
    columns = mask.columns.view(*(1,) * (x.dim() - 1), -1)
    return _Dropout.apply(x, mask.rows, columns, mask.probability)


def dropout(x: Tensor, key: Tensor, tokens: Tensor, features: Tensor, probability: float) -> Tensor:
    """x [..., features] with elements dropped; args as in `mask` and `dropped`."""
    return dropped(x, mask(key, tokens, features, probability))


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, rows: Tensor, columns: Tensor, probability: float) -> Tensor:
        keep = mix(rows ^ columns) >= int(probability * (1 << 32)) - (1 << 31)
        return torch.where(keep, x * (1 / (1 - probability)), 0)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, rows, columns, ctx.probability = inputs
        ctx.save_for_backward(rows, columns)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return _Dropout.apply(grad, *ctx.saved_tensors, ctx.probability), None, None, None

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, ...], x: Tensor, rows: Tensor, columns: Tensor, probability: float
    ) -> tuple[Tensor, int]:
        front = (
            t.unsqueeze(0) if at is None else t.movedim(at, 0)
            for t, at in zip((x, rows, columns), in_dims, strict=False)
        )
        return _Dropout.apply(*front, probability), 0
