"""How does DoRA make its update? Every output of W + scaling * B A is divided by the norm of its row, and multiplied by
a learned magnitude: one gain per output, which the base's product and the update's share.

As in PEFT, the norm is a constant to the backward, and in training dropout reaches the base's product too:
y = W x + (gain - 1) W d(x) + gain * scaling * B A d(x) + bias.

The norms are of W + scaling * B A itself, in fp32 (fp64 where the tensors are), some rows at a time. So nothing
cancels, as it would in |W|^2 + 2 scaling <B, W A^T> + scaling^2 |B A|^2, which costs as many multiplications; nothing
has to be kept beside the weight; and no temporary is more than a small part of the weight's size. Nor does any of it
depend on the numbers, so that transforms and XLA's static graphs take it.

Source: DoRA (arXiv 2402.09353), section 4.3 for the constant norm; PEFT, tuners/lora/dora.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from lora_fn import collectives, quantize, sharding
from lora_fn.layer_spec import FusedPart, LayerSpec
from lora_fn.placement import Replicate, Shard
from lora_fn.quantize import Weight
from lora_fn.reshard import whole_rank

MAGNITUDE = "lora_magnitude_vector"
BLOCK = 1 << 22  # elements of a temporary; of a large weight, a sixteenth
BLOCKS = 16


def gains(
    params: Mapping[str, Tensor],
    spec: LayerSpec,
    scaled: Callable[[Tensor, int], Tensor],
    *,
    index: Tensor | None = None,
    whole: bool = False,
) -> dict[str, Tensor]:
    """magnitude / |row of W + scaling * B A|, by part. Where a row is all zeros (padding), the magnitude.

    Args:
        params: All parameters of the layer.
        spec: The layer.
        scaled: (factor, number of the update) -> the factor times the update's scaling.
        index: As for `apply`: where the inputs are cut, the squares are summed over the axis, in one all-reduce; where
            the rank is, the factor that lacks some of it is gathered.
        whole: The parameters are canonical, not local.

    Returns:
        [out] ([E, out] of experts) each, in fp32 or fp64.
    """
    norms = _norms(params, spec, scaled, index=index, whole=whole)
    found = {}
    for part in spec.updates:
        norm = norms[part.name]
        found[part.name] = params[part.param(MAGNITUDE)].to(norm.dtype).reshape(norm.shape) / norm
    return found


def start(
    params: Mapping[str, Tensor],
    spec: LayerSpec,
    scaled: Callable[[Tensor, int], Tensor],
    *,
    index: Tensor | None = None,
    whole: bool = False,
) -> dict[str, Tensor]:
    """The magnitudes of a new adapter: the norms themselves, so that it changes nothing. In lora_B's dtype.

    Computed in fp64 (but on XLA), so that in fp32 they are the same however the weight is cut.
    """
    wide = {n: p if p.device.type == "xla" or _is_packed(n, spec) else p.double() for n, p in params.items()}
    norms = _norms(wide, spec, scaled, index=index, whole=whole, empty=0.0)
    found = {}
    for part in spec.updates:
        norm = norms[part.name].to(params[part.param("lora_B")].dtype)
        found[part.param(MAGNITUDE)] = norm if spec.window is None else norm.view(1, -1, 1, 1)
    return found


def _norms(
    params: Mapping[str, Tensor],
    spec: LayerSpec,
    scaled: Callable[[Tensor, int], Tensor],
    *,
    index: Tensor | None,
    whole: bool,
    empty: float = 1.0,
) -> dict[str, Tensor]:
    """The norms of the rows, by part; `empty` where they are 0."""
    found, params = {}, {name: p.detach() for name, p in params.items()}
    params = params if whole else whole_rank(params, spec, index=index)
    for number, part in enumerate(spec.updates):
        weight, down, up = _matrices(params, spec, part)
        squares = _squares(weight, down, scaled(_wide(up, weight), number))
        if _inputs_cut(spec) and not whole:
            [squares] = collectives.reduce([squares], spec.axis, index)
        found[part.name] = torch.where(squares > 0, squares, empty).sqrt()
    return found


def _squares(weight: Weight, down: Tensor, up: Tensor) -> Tensor:
    """The sums of the squares of the rows of weight [..., o, i] + up [..., o, r] down [..., r, i]: [..., o]."""
    down = down.to(up.dtype)
    num = up.shape[-2] * down.shape[-1] * math.prod(up.shape[:-2])
    rows = max(1, max(BLOCK, num // BLOCKS) * up.shape[-2] // max(1, num))
    ups = up.split(rows, -2)
    blocks = zip(quantize.split(weight, [b.shape[-2] for b in ups]), ups, strict=True)
    return torch.cat([(quantize.plain(w, up.dtype) + b @ down).square().sum(-1) for w, b in blocks], -1)


def _wide(factor: Tensor, weight: Weight) -> Tensor:
    own = torch.float32 if isinstance(weight, quantize.Quantized) else weight.dtype
    return factor.to(torch.promote_types(torch.promote_types(factor.dtype, own), torch.float32))


def _is_packed(name: str, spec: LayerSpec) -> bool:
    return spec.quantization is not None and name.startswith("weight")


def _inputs_cut(spec: LayerSpec) -> bool:
    """Whether every process has some of the inputs of all outputs."""
    weight, magnitude = (sharding.row(spec).params[name].placement for name in ("weight", MAGNITUDE))
    return isinstance(weight, Shard) and magnitude == Replicate()


def _matrices(params: Mapping[str, Tensor], spec: LayerSpec, part: FusedPart) -> tuple[Weight, Tensor, Tensor]:
    """weight [..., o, i], lora_A [..., r, i] and lora_B [..., o, r] of a part."""
    weight = quantize.of(params, spec, None if spec.fuse_qkv else part)
    if spec.parts and spec.fuse_qkv:
        sizes = sharding.part_sizes(params, spec)
        weight = dict(zip(sizes, quantize.split(weight, list(sizes.values())), strict=True))[part.name]
    down, up = params["lora_A" if spec.share_A else part.param("lora_A")], params[part.param("lora_B")]
    if isinstance(weight, quantize.Quantized):
        return weight, down, up
    if spec.kind == "embedding" or spec.fan_in_fan_out:
        weight = weight.mT
    if spec.window is not None:
        weight, down, up = weight.flatten(1), down.flatten(1), up.flatten(1)
    return weight, down, up
