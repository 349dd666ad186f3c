"""Which elements are dropped? A pure function of (key, logical token, logical feature).

So the mask is the same at every size of the axis, with and without sequence parallel, and is computed again in the
backward instead of being saved. Tokens and features are hashed, each by itself; of an element, the two numbers are
multiplied, and what is below a quantile is dropped. All is int32 arithmetic, which wraps.

One product is enough of a hash for an element: two rows of the mask depend on each other only where a small multiple of
one token's number is a small multiple of the other's, modulo 2**32, which numbers drawn at random hardly ever are.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

# Source of the constants and shifts: C. Wellons, "Prospecting for Hash Functions" (2018), lowbias32.
_MULTIPLIERS = (0x7FEB352D, 0x846CA68B - (1 << 32))
_SHIFTS = (16, 15, 16)
_FEATURE = 0x2545F491
_STEP = 0x2C1B3C6D  # from the number of a token or feature to the next
_FEATURES = 0x297A2D39  # the first feature's number, far from those of the tokens
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


def cut(numbers: Tensor) -> Tensor:
    """The low 32 bits of what `wide` was added or multiplied to, int32."""
    return numbers if numbers.dtype == torch.int32 else numbers.to(torch.int32)


def _times(h: Tensor, multiplier: int) -> Tensor:
    return cut(wide(h) * multiplier)


def _shifted(h: Tensor, shift: int) -> Tensor:
    """h >> shift, for which torch_xla 2.9 divides, so that numbers below zero round the other way."""
    if h.device.type != "xla":
        return h >> shift
    return torch.bitwise_right_shift(h, torch.full((), shift, dtype=h.dtype, device=h.device))


def _xor_shift(h: Tensor, shift: int) -> Tensor:
    return (_shifted(h, shift) & ((1 << (32 - shift)) - 1)) ^ h


def mix(h: Tensor) -> Tensor:
    """A bijection of int32 values that spreads every bit over all bits."""
    h = _times(_xor_shift(h, _SHIFTS[0]), _MULTIPLIERS[0])
    h = _times(_xor_shift(h, _SHIFTS[1]), _MULTIPLIERS[1])
    return _xor_shift(h, _SHIFTS[2])


def fold_in(key: Tensor, data: int | Tensor) -> Tensor:
    """A new key from a key and an integer (a layer's number, a step).

    Args:
        key: int tensor [], any integer dtype; its low 32 bits count.
        data: An integer below 2**31, or an int tensor []. (Or both of shapes that broadcast.)

    Returns:
        int32 tensor [].
    """
    other = torch.as_tensor(data, dtype=torch.int32, device=key.device)
    return mix(key.to(torch.int32) ^ mix(cut(wide(other) + _FEATURE)))


class Mask(NamedTuple):
    """Which elements are dropped.

    Args:
        rows: int32 [..., 1], of each token.
        columns: int32 [features], or [1, ..., features], of each feature.
        probability: Above 0, below 1.
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
        probability: Above 0, below 1.
    """
    numbers = torch.cat([tokens.reshape(-1), features + _FEATURES])
    steps = cut(torch.add(wide(key.to(torch.int32)), wide(numbers), alpha=_STEP))
    mixed = _times(_xor_shift(steps, _SHIFTS[0]), _MULTIPLIERS[0])
    mixed = _times(_xor_shift(mixed, _SHIFTS[1]), _MULTIPLIERS[1])
    rows, columns = mixed.split([tokens.numel(), features.numel()])
    return Mask(rows.view(tokens.shape), columns, probability)


def kept(mask: Mask, dtype: torch.dtype) -> Tensor:
    """1 where an element is kept and 0 where it is dropped, [..., features] in a dtype."""
    numbers = cut(wide(mask.rows) * wide(mask.columns))
    least = max(1, int(mask.probability * (1 << 32))) - (1 << 31)
    return (numbers.clamp(least - 1, least) - (least - 1)).to(dtype)  # faster on CPUs than to compare and to choose


def dropped(x: Tensor, mask: Mask) -> Tensor:
    """x with elements dropped, and the others scaled by 1 / (1 - probability); the mask is not kept for the backward.

    Args:
        x: [..., features], any floating dtype.
        mask: Of its tokens and features.
    """
    columns = mask.columns.view(*(1,) * (x.dim() - 1), -1)
    return _Dropout.apply(x, mask.rows, columns, mask.probability)


def dropout(x: Tensor, key: Tensor, tokens: Tensor, features: Tensor, probability: float) -> Tensor:
    """x [..., features] with elements dropped; args as in `mask`, but that nothing is where the probability is 0."""
    return dropped(x, mask(key, tokens, features, probability)) if probability else x


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, rows: Tensor, columns: Tensor, probability: float) -> Tensor:
        return x * (1 / (1 - probability)) * kept(Mask(rows, columns, probability), x.dtype)

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
