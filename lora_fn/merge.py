"""What does an adapter add to the weights? `delta`, and `merge`, which returns new tensors, so going back is exact."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lora_fn import collectives, sharding, variants
from lora_fn.errors import SpecError
from lora_fn.layer_spec import LayerSpec
from lora_fn.reshard import whole_rank


def delta(
    params: Mapping[str, Tensor],
    spec: LayerSpec,
    *,
    part: str = "",
    index: Tensor | None = None,
    whole: bool | None = None,
) -> Tensor:
    """scaling * B A, in the weight's own orientation (an embedding's and a fan_in_fan_out weight's is transposed; of
    conv2d, it has the kernel of lora_A).

    Works on canonical and on local factors alike: every process computes its part, without communication (but of
    scheme "rank", which gathers one of the factors). Of DoRA, it is what is added before the gains.

    Args:
        params: `lora_A` and `lora_B`, of any floating dtype; of a fused layer, those of the part.
        spec: The layer.
        part: Of a fused layer, the name of an adapted part.
        index: As for `apply`.
        whole: Whether the factors are canonical, where their shapes do not tell (BD-LoRA); None: where there is no
            index and the axis is not bound.

    Returns:
        A tensor of the weight's shape (of a fused layer, of the part's rows), in fp32 (fp64 where the factors are).

    Raises:
        SpecError: A part that has no adapter.
    """
    down, up = factors(params, spec, part=part, index=index, whole=whole)
    scaling = next(spec.scaling_of(update) for update in spec.updates if update.name == part)
    if spec.kind == "conv2d":
        return (up.flatten(1) @ down.flatten(1) * scaling).view(up.shape[0], *down.shape[1:])
    product = up @ down * scaling
    return product.mT if spec.kind == "embedding" or spec.fan_in_fan_out else product


def factors(
    params: Mapping[str, Tensor],
    spec: LayerSpec,
    *,
    part: str = "",
    index: Tensor | None = None,
    whole: bool | None = None,
) -> tuple[Tensor, Tensor]:
    """lora_A and lora_B of the plain update that a variant's own is, or begins with. Args and errors as `delta`.

    Returns:
        lora_A and lora_B with the whole rank, in fp32 (fp64 where they are).
    """
    found = [update for update in spec.updates if update.name == part]
    if not found:
        raise SpecError(f"delta: part {part!r} has no adapter, expected one of {[u.name for u in spec.updates]}.")
    [update] = found
    own = ["lora_B", *(name for name in sharding.VARIANTS_OWN if sharding.VARIANTS_OWN[name] == spec.variant)]
    needed = {"lora_A" if spec.share_A else update.param("lora_A"), *(update.param(name) for name in own)}
    needed -= {update.param("lora_magnitude_vector")}
    if not needed <= set(params):
        raise SpecError(f"delta: params are {sorted(params)}, expected {sorted(needed)}.")
    variant = variants.TABLE[spec.variant]
    alone = replace(spec, parts=tuple(p if p.name == part else replace(p, rank=0) for p in spec.parts))
    whole = index is None and not spec.axis.bound if whole is None else whole
    params = variant.plain({name: _wide(params[name]) for name in needed}, alone, index=index, whole=whole)
    params = params if whole else whole_rank(params, alone, index=index)
    return params["lora_A" if spec.share_A else update.param("lora_A")], params[update.param("lora_B")]


def merge(params: Mapping[str, Tensor], spec: LayerSpec, *, index: Tensor | None = None) -> dict[str, Tensor]:
    """The base's parameters with the adapter in them, for `apply(..., spec.base)`.

    Computed in fp32 (or more), rounded once to the base's dtype.

    Args:
        params: All parameters of the layer, canonical or local.
        spec: The layer.
        index: As for `apply`; of local parameters with trained tokens, and of a layer whose inputs are cut, for DoRA.

    Returns:
        New tensors `weight` and, where the base has one, `bias` (`weight.q`, ... where the parts have their own).

    Raises:
        SpecError: Other names than the layer's, lora_bias on a base without a bias (there is nothing to merge into), a
            variant that no weight can have in, or a quantised base.
    """
    sharding.check_names(set(params), spec)
    if spec.lora_bias and not spec.bias:
        raise SpecError("merge: the adapter has lora_bias but the base has no bias to merge it into; keep it unmerged.")
    if variants.TABLE[spec.variant].gated:
        raise SpecError(f"merge: {spec.variant} adds its update for some tokens only; keep it unmerged.")
    if spec.quantization is not None:
        raise SpecError(
            f"merge: the base is held as {spec.quantization.code}, which would lose much of an update; merge into the "
            f"weights that it was made of (`lora-fn merge` does)."
        )
    whole = _are_canonical(params, spec)
    updates: dict[str, dict[str, Tensor]] = {"weight": {}, "bias": {}}
    for part in spec.updates:
        updates["weight"][part.name] = delta(params, spec, part=part.name, index=index, whole=whole)
        if spec.lora_bias:
            updates["bias"][part.name] = _wide(params[part.param("lora_B_bias")]) * spec.scaling_of(part)
    if spec.tokens:
        return {"weight": _with_tokens(params["weight"], params[sharding.TOKENS], spec, index)}
    scaled = variants.plain_scaling(spec)
    gains = variants.TABLE[spec.variant].gains(params, spec, scaled, index=index, whole=whole)
    return {
        name: _plus(params, name, updates[name.partition(".")[0]], {} if name.startswith("bias") else gains, spec)
        for name in sharding.names(spec.base)
    }


def _are_canonical(params: Mapping[str, Tensor], spec: LayerSpec) -> bool:
    """Whether parameters have their canonical shapes."""
    return all(tuple(p.shape) == sharding.canonical_shape(spec, name) for name, p in params.items())


def _with_tokens(weight: Tensor, tokens: Tensor, spec: LayerSpec, index: Tensor | None) -> Tensor:
    """A weight with its trained rows, those that a process holds."""
    rows = weight.T if spec.fan_in_fan_out else weight
    numbers = torch.arange(rows.shape[0], device=rows.device)
    whole = rows.shape[0] == sharding.canonical_shape(spec, "weight")[int(spec.fan_in_fan_out)]
    if not whole:
        numbers = numbers + collectives.place(spec.axis, index) * rows.shape[0]
    matches = numbers[:, None] == torch.tensor(spec.tokens, device=rows.device)
    own = tokens.to(rows.dtype)[matches.to(torch.int32).argmax(-1)]
    merged = torch.where(matches.any(-1, keepdim=True), own, rows)
    return merged.T.contiguous() if spec.fan_in_fan_out else merged


def subtract(params: Mapping[str, Tensor], spec: LayerSpec, *, index: Tensor | None = None) -> dict[str, Tensor]:
    """The base's weights without what the factors add: the residual that an adapter completes to the weight again.

    Computed in fp64 (but on XLA), so that it is rounded to the same weight however the layer is cut; merging the same
    factors gives the weight back, to rounding.

    Args:
        params: The base's weights and the factors, canonical or local.
        spec: The layer.
        index: As for `apply`; of local factors whose rank is cut.

    Returns:
        New tensors `weight` (`weight.q`, ... where the parts have their own).
    """
    params = {n: p.double() if n.startswith("lora_") and p.device.type != "xla" else p for n, p in params.items()}
    told: dict[str, Any] = {"index": index, "whole": _are_canonical(params, spec)}
    updates = {part.name: -delta(params, spec, part=part.name, **told) for part in spec.updates}
    weights = [name for name in sharding.names(spec.base) if name.partition(".")[0] == "weight"]
    return {name: _plus(params, name, updates, {}, spec) for name in weights}


def _plus(
    params: Mapping[str, Tensor],
    name: str,
    updates: Mapping[str, Tensor],
    gains: Mapping[str, Tensor],
    spec: LayerSpec,
) -> Tensor:
    """A base parameter plus the updates of its parts, times their gains."""
    base = params[name]
    if not spec.parts or not spec.fuse_qkv:
        part = name.partition(".")[2]
        return _sum(base, updates[part], gains.get(part), spec) if part in updates else base.clone()
    sizes = sharding.part_sizes(params, spec)
    rows = zip(spec.parts, base.split(list(sizes.values())), strict=True)
    return torch.cat(
        [_sum(own, updates[p.name], gains.get(p.name), spec) if p.name in updates else own for p, own in rows]
    )


def _sum(base: Tensor, update: Tensor, gain: Tensor | None, spec: LayerSpec) -> Tensor:
    dtype = torch.promote_types(base.dtype, update.dtype)
    whole = base.to(dtype) + update.to(dtype)
    if gain is not None:
        outputs_last = spec.kind == "embedding" or spec.fan_in_fan_out
        beside = gain.unsqueeze(-1) if spec.kind == "experts" else gain.view(-1, *(1,) * (whole.dim() - 1))
        whole = whole * (gain.unsqueeze(-2) if outputs_last else beside)
    return whole.to(base.dtype)


def _wide(factor: Tensor) -> Tensor:
    return factor.to(torch.promote_types(factor.dtype, torch.float32))
