"""What does an adapter add to the weights? `delta`, and `merge`, which returns new tensors, so going back is exact."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lora_fn import collectives, sharding
from lora_fn.errors import SpecError
from lora_fn.layer_spec import LayerSpec


def delta(params: Mapping[str, Tensor], spec: LayerSpec, *, part: str = "") -> Tensor:
    """scaling * B A, in the weight's own orientation (an embedding's, an expert's, and a fan_in_fan_out weight's, is
    transposed; of conv2d, it has the kernel of lora_A).

    Works on canonical and on local factors alike: every process computes its part, without communication.

    Args:
        params: `lora_A` and `lora_B`, of any floating dtype; of a fused layer, those of the part.
        spec: The layer.
        part: Of a fused layer, the name of an adapted part.

    Returns:
        A tensor of the weight's shape (of a fused layer, of the part's rows), in fp32 (fp64 where the factors are).

    Raises:
        SpecError: A part that has no adapter.
    """
    found = [update for update in spec.updates if update.name == part]
    if not found:
        raise SpecError(f"delta: part {part!r} has no adapter, expected one of {[u.name for u in spec.updates]}.")
    [update] = found
    needed = {"lora_A" if spec.share_A else update.param("lora_A"), update.param("lora_B")}
    if not needed <= set(params):
        raise SpecError(f"delta: params are {sorted(params)}, expected {sorted(needed)}.")
    factor = params["lora_A" if spec.share_A else update.param("lora_A")]
    up, down = _wide(params[update.param("lora_B")]), _wide(factor)
    if spec.kind == "conv2d":
        return (up.flatten(1) @ down.flatten(1) * spec.scaling_of(update)).view(up.shape[0], *down.shape[1:])
    product = up @ down * spec.scaling_of(update)
    return product.mT if spec.kind in ("embedding", "experts") or spec.fan_in_fan_out else product


def merge(params: Mapping[str, Tensor], spec: LayerSpec, *, index: Tensor | None = None) -> dict[str, Tensor]:
    """The base's parameters with the adapter in them, for `apply(..., spec.base)`.

    Computed in fp32 (or more), rounded once to the base's dtype.

    Args:
        params: All parameters of the layer, canonical or local.
        spec: The layer.
        index: As for `apply`; where local parameters have trained tokens.

    Returns:
        New tensors `weight` and, where the base has one, `bias` (`weight.q`, ... where the parts have their own).

    Raises:
        SpecError: Other names than the layer's, or lora_bias on a base without a bias (there is nothing to merge into).
    """
    sharding.check_names(set(params), spec)
    if spec.lora_bias and not spec.bias:
        raise SpecError("merge: the adapter has lora_bias but the base has no bias to merge it into; keep it unmerged.")
    updates: dict[str, dict[str, Tensor]] = {"weight": {}, "bias": {}}
    for part in spec.updates:
        updates["weight"][part.name] = delta(params, spec, part=part.name)
        if spec.lora_bias:
            updates["bias"][part.name] = _wide(params[part.param("lora_B_bias")]) * spec.scaling_of(part)
    if spec.tokens:
        return {"weight": _with_tokens(params["weight"], params[sharding.TOKENS], spec, index)}
    return {
        name: _plus(params[name], name, updates[name.partition(".")[0]], spec) for name in sharding.names(spec.base)
    }


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


def _plus(base: Tensor, name: str, updates: Mapping[str, Tensor], spec: LayerSpec) -> Tensor:
    """A base parameter plus the updates of its parts."""
    if not spec.parts or not spec.fuse_qkv:
        update = updates.get(name.partition(".")[2])
        return base.clone() if update is None else _sum(base, update)
    layout = sharding.layout(spec, name)
    assert layout is not None
    whole = {part.name: part.size for part in spec.parts}
    is_whole = base.shape[0] == layout.size and all(update.shape[0] == whole[n] for n, update in updates.items())
    sizes = list((whole if is_whole else layout.local_sizes).values())
    rows = zip(spec.parts, base.split(sizes), strict=True)
    return torch.cat([_sum(own, updates[p.name]) if p.name in updates else own for p, own in rows])


def _sum(base: Tensor, update: Tensor) -> Tensor:
    dtype = torch.promote_types(base.dtype, update.dtype)
    return (base.to(dtype) + update.to(dtype)).to(base.dtype)


def _wide(factor: Tensor) -> Tensor:
    return factor.to(torch.promote_types(factor.dtype, torch.float32))
