"""How is a frozen weight held in few bits, and multiplied with? It is dequantised for each product, and never saved.

`weight` is packed, and `weight_scale` says what its values are multiplied with. A code has the values:

- "nf4": the 16 normal floats of QLoRA, two in a byte, the first in its upper four bits;
- "int8": the integers from -127 to 127;
- "fp8": torch's float8_e4m3fn, of which only the values up to 240 are used, which is as far as Neuron devices go.

Scales are fp32, and blocks lie along the inputs. So a weight is quantised to the same values however it is cut, if the
cut is between blocks; where a scale is for inputs that lie on several processes, its largest element is that of all.

torchao has an NF4 tensor, which does not serve here: its autograd.Function has no `setup_context`, so that torch.func
refuses it; it cannot be stacked, indexed, or cut at other rows than halves, which shards need; and it moves about
(torchao.dtypes.nf4tensor, of 0.17, is gone in 0.18). bitsandbytes quantises to the same bytes as this file.

Source: QLoRA (arXiv 2305.14314), section 3 and appendix E for the code.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_fn import sharding
from lora_fn.errors import SpecError
from lora_fn.layer_spec import FusedPart, LayerSpec, Quantization

BLOCK = 64  # consecutive elements that have one scale, of `rounded`
ELEMENTS = 1 << 18  # of a temporary, where a weight is quantised


class Quantized(NamedTuple):
    """A weight [o, i] of a layer.

    Args:
        packed: As `sharding.canonical_shape` has it, or local.
        scale: fp32 [o, blocks], [o, 1] or [1].
        how: What they mean.
    """

    packed: Tensor
    scale: Tensor
    how: Quantization


Weight = Tensor | Quantized


def normal_float(bits: int) -> Tensor:
    """The values of a code of normal floats: quantiles of the normal distribution, with a zero, from -1 to 1.

    Returns:
        fp32 [2 ** bits], ascending.
    """
    half = 2 ** (bits - 1)
    most = 1 - (1 / 32 + 1 / 30) / 2
    above = torch.special.ndtri(torch.linspace(most, 0.5, half + 1, dtype=torch.float64)[:-1])
    below = -torch.special.ndtri(torch.linspace(most, 0.5, half, dtype=torch.float64)[:-1])
    values = torch.cat([above, above.new_zeros(1), below]).sort().values
    return (values / values.max()).float()


# The code as it is published, which differs from `normal_float(4)` in the seventh digit: with it, the bytes and the
# values that they stand for are bitsandbytes'.
_VALUES = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
_NF4 = torch.tensor(_VALUES)
# Byte -> its two values; written out, as the first operation of a process costs 5 MB.
_PAIRS = torch.tensor([(upper, lower) for upper in _VALUES for lower in _VALUES])


@dataclass(frozen=True, slots=True, kw_only=True)
class _Code:
    """What packed elements are.

    Args:
        dtype: Theirs.
        largest: The value that the largest element of a block is scaled to.
        pack: Values from -largest to largest, fp32 -> packed.
        values: packed -> fp32 values.
    """

    dtype: torch.dtype
    largest: float
    pack: Callable[[Tensor], Tensor]
    values: Callable[[Tensor], Tensor]


def _pack_nf4(values: Tensor) -> Tensor:
    numbers = _nearest(values, _NF4).to(torch.uint8)
    return (numbers[..., ::2] << 4) | numbers[..., 1::2]


def _values_nf4(packed: Tensor) -> Tensor:
    """Both values of a byte in one look-up."""
    return F.embedding(packed.to(torch.int32), _PAIRS.to(packed.device)).flatten(-2)


_CODES: Mapping[str, _Code] = {
    "nf4": _Code(dtype=torch.uint8, largest=1.0, pack=_pack_nf4, values=_values_nf4),
    "int8": _Code(
        dtype=torch.int8,
        largest=127.0,
        pack=lambda values: values.round().to(torch.int8),
        values=lambda packed: packed.to(torch.float32),
    ),
    "fp8": _Code(
        dtype=torch.float8_e4m3fn,
        largest=240.0,
        pack=lambda values: values.to(torch.float8_e4m3fn),
        values=lambda packed: packed.to(torch.float32),
    ),
}


def stored_dtype(how: Quantization) -> torch.dtype:
    """The dtype of packed elements."""
    return _CODES[how.code].dtype


def largest(weight: Tensor, how: Quantization) -> Tensor:
    """The largest element, by size, that each scale is for.

    Args:
        weight: [o, i], of any floating dtype, i whole blocks.
        how: How it is to be quantised.

    Returns:
        fp32 [o, blocks], [o, 1] or [1].
    """
    if how.scale == "tensor":
        return torch.stack([rows.abs().amax() for rows in _few_rows(weight)]).amax().to(torch.float32).view(1)
    width = how.block if how.scale == "block" else weight.shape[1]
    return torch.cat([rows.abs().unflatten(1, (-1, width)).amax(2).to(torch.float32) for rows in _few_rows(weight)])


def _few_rows(weight: Tensor) -> tuple[Tensor, ...]:
    """A weight, some rows at a time, so that temporaries are small beside it."""
    return weight.split(max(1, ELEMENTS // weight.shape[1]))


def quantize(weight: Tensor, how: Quantization, *, most: Tensor | None = None) -> Quantized:
    """A weight in few bits.

    Args:
        weight: [o, i], as in `largest`.
        how: How.
        most: What `largest` gives of the whole weight, where this is a part of it with some of a scale's inputs.

    Returns:
        Packed elements of `stored_dtype`, and their scales. Zeros stay zeros.

    Example:
        >>> packed, scale, _ = quantize(torch.tensor([[0.5, -1.0]]), Quantization(code="int8"))
        >>> packed, scale
        (tensor([[  64, -127]], dtype=torch.int8), tensor([[0.0079]]))
    """
    code = _CODES[how.code]
    scale = (largest(weight, how) if most is None else most) / code.largest
    packed, start = [], 0
    for rows in _few_rows(weight):
        own = scale if how.scale == "tensor" else scale[start : start + len(rows)].unsqueeze(2)
        wide = rows.to(torch.float32)
        blocks = wide if how.scale == "tensor" else wide.unflatten(1, (scale.shape[1], -1))
        values = torch.where(own > 0, blocks / own, 0).clamp(-code.largest, code.largest)
        packed.append(code.pack(values.view(wide.shape)))
        start += len(rows)
    return Quantized(torch.cat(packed), scale, how)


def dequantize(weight: Quantized, dtype: torch.dtype) -> Tensor:
    """The weight [o, i] that is multiplied with: computed in fp32, rounded once to a dtype."""
    values, scale = _CODES[weight.how.code].values(weight.packed), weight.scale
    if weight.how.scale == "tensor":
        return (values * scale).to(dtype)
    return (values.unflatten(1, (scale.shape[1], -1)) * scale.unsqueeze(2)).flatten(1).to(dtype)


class _Product(torch.autograd.Function):
    """x W^T, or x W where it is `turned`: each is the other's backward, and dequantises the weight for itself."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, packed: Tensor, scale: Tensor, how: Quantization, turned: bool) -> Tensor:
        weight = dequantize(Quantized(packed, scale, how), x.dtype)
        return F.linear(x, weight.T if turned else weight)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, packed, scale, ctx.how, ctx.turned = inputs
        ctx.save_for_backward(packed, scale)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        packed, scale = ctx.saved_tensors
        return _Product.apply(grad, packed, scale, ctx.how, not ctx.turned), None, None, None, None


def linear(x: Tensor, weight: Weight, bias: Tensor | None = None) -> Tensor:
    """x W^T + bias, of a plain or a quantised weight; the gradient of the latter's x, and nothing else's.

    Args:
        x: [..., i].
        weight: [o, i].
        bias: [o].

    Raises:
        SpecError: Packed elements or scales of other dtypes than they are to be, as a cast of the model makes them.
    """
    if not isinstance(weight, Quantized):
        return F.linear(x, weight, bias)
    packed, scale, how = weight
    if packed.dtype != stored_dtype(how) or scale.dtype != torch.float32:
        raise SpecError(
            f"a weight held as {how.code}: is of {packed.dtype}, its scale of {scale.dtype}, expected "
            f"{stored_dtype(how)} and torch.float32; load the model in its dtype, and do not cast it afterwards."
        )
    y = _Product.apply(x, packed, scale, how, False)
    return y if bias is None else y + bias


def of(params: Mapping[str, Tensor], spec: LayerSpec, part: FusedPart | None = None) -> Weight:
    """The weight of a layer, or that of a part that has its own."""
    weight = params["weight" if part is None else part.param("weight")]
    if spec.quantization is None:
        return weight
    one = part is None or spec.quantization.scale == "tensor"
    return Quantized(
        weight, params[sharding.SCALE if one or part is None else part.param(sharding.SCALE)], spec.quantization
    )


def plain(weight: Weight, dtype: torch.dtype) -> Tensor:
    """A weight in a dtype, quantised or not."""
    return dequantize(weight, dtype) if isinstance(weight, Quantized) else weight.to(dtype)


def split(weight: Weight, sizes: Sequence[int]) -> list[Weight]:
    """A weight [..., o, i] as blocks of its outputs, one after the other."""
    if not isinstance(weight, Quantized):
        return list(weight.split(list(sizes), -2))
    packed, scale, how = weight
    scales = [scale] * len(sizes) if how.scale == "tensor" else scale.split(list(sizes))
    return [Quantized(p, s, how) for p, s in zip(packed.split(list(sizes)), scales, strict=True)]


def rounded(weight: Tensor, bits: int) -> Tensor:
    """A weight as LoftQ's quantised form reads back, in its own dtype.

    Args:
        weight: [o, i].
        bits: 2 and 4: the normal-float code of QLoRA, scaled by the largest of each 64 consecutive elements; 8:
            integers, scaled by the largest of each row, from the weight in fp16.
    """
    if bits == 8:
        half = weight.to(torch.float16).to(weight.dtype)
        most = half.abs().amax(1, keepdim=True)
        return torch.where(most > 0, (half * (127 / most)).round() * (most / 127), 0)
    flat = weight.flatten()
    padded = torch.cat([flat, flat.new_zeros(-len(flat) % BLOCK)]).view(-1, BLOCK)
    code, scale = normal_float(bits).to(weight), padded.abs().amax(1, keepdim=True)
    nearest = code[_nearest(torch.where(scale > 0, padded / scale, 0), code)]
    return (nearest * scale).flatten()[: len(flat)].view_as(weight)


def _nearest(values: Tensor, code: Tensor) -> Tensor:
    """The number of the code's value that is nearest to each."""
    code = code.to(values)
    return torch.bucketize(values, (code[1:] + code[:-1]) / 2, out_int32=True)
