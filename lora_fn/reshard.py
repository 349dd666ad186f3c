"""Cut, join, re-cut: canonical tensors to the local ones of each process, and back, bit for bit."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from lora_fn import collectives, sharding
from lora_fn.errors import Problems, SpecError
from lora_fn.layer_spec import LayerSpec
from lora_fn.layout import same_bits
from lora_fn.placement import Shard


def shard(params: Mapping[str, Tensor], spec: LayerSpec, index: int) -> dict[str, Tensor]:
    """The local tensors of process `index`, out of canonical ones.

    Args:
        params: Canonical tensors by name, any subset of the layer's.
        spec: The layer; `spec.axis.size` parts.
        index: 0 to size - 1.

    Returns:
        New tensors of `sharding.local_shape`, zeros where the spec pads.

    Raises:
        SpecError: An index off the axis, or tensors of other shapes than the layer's, all of them at once.
    """
    if not 0 <= index < spec.axis.size:
        raise SpecError(f"shard: index is {index}, expected 0 to {spec.axis.size - 1}; give a place on the axis.")
    _check(params, spec, sharding.canonical_shape)
    return {name: _part(p, spec, name, index) for name, p in params.items()}


def _part(p: Tensor, spec: LayerSpec, name: str, index: int) -> Tensor:
    layout = sharding.layout(spec, name)
    return p.clone() if layout is None else layout.to_local(p, index, dim=cut_dim(spec, name))


def cut_dim(spec: LayerSpec, name: str) -> int:
    """The dimension of a parameter that lies over the axis."""
    placement = sharding.rule(spec, name).placement
    assert isinstance(placement, Shard)
    return placement.dim


def unshard(shards: Sequence[Mapping[str, Tensor]], spec: LayerSpec) -> dict[str, Tensor]:
    """The canonical tensors, out of the local ones of all processes in order; padding is cut off.

    Args:
        shards: One dict per process, with the same names.
        spec: The layer.

    Raises:
        SpecError: Another number of shards than the axis has, other shapes, or replicated tensors that differ.
    """
    if len(shards) != spec.axis.size:
        raise SpecError(f"unshard: found {len(shards)} shards, expected {spec.axis.size}; give one per process.")
    for local in shards:
        _check(local, spec, sharding.local_shape)
    return {name: _join([local[name] for local in shards], spec, name) for name in shards[0]}


def _join(parts: Sequence[Tensor], spec: LayerSpec, name: str) -> Tensor:
    layout = sharding.layout(spec, name)
    if layout is not None:
        try:
            return layout.to_canonical(parts, dim=cut_dim(spec, name))
        except SpecError as error:
            raise SpecError(f"unshard: {name!r}: {error}") from error
    if not all(same_bits(parts[0], part) for part in parts[1:]):
        raise SpecError(f"unshard: the copies of replicated {name!r} differ between processes; call sync_gradients.")
    return parts[0].clone()


def reshard(shards: Sequence[Mapping[str, Tensor]], spec: LayerSpec, size: int) -> list[dict[str, Tensor]]:
    """The local tensors for an axis of another size, a dict per process.

    Raises:
        SpecError: As `unshard`, or a size that does not divide.
    """
    canonical = unshard(shards, spec)
    other = replace(spec, axis=replace(spec.axis.unbound, size=size))
    return [shard(canonical, other, index) for index in range(size)]


def gather(params: Mapping[str, Tensor], spec: LayerSpec, *, index: Tensor | None = None) -> dict[str, Tensor]:
    """The canonical tensors on every process, out of each process's local ones, over the bound axis."""
    whole = {}
    for name, p in params.items():
        layout = sharding.layout(spec, name)
        if layout is None or spec.axis.size == 1:
            whole[name] = p.clone() if layout is None else layout.to_canonical([p], dim=cut_dim(spec, name))
            continue
        dim = cut_dim(spec, name)
        [slots] = collectives.gather([p], spec.axis, index, dim=dim)
        whole[name] = slots.index_select(dim, layout.sources().to(p.device))
    return whole


def whole_rank(params: Mapping[str, Tensor], spec: LayerSpec, *, index: Tensor | None = None) -> dict[str, Tensor]:
    """The factors of a plain update with their whole rank, gathered where the table cuts it; each keeps the gradient of
    its part. Else as they are: all that is local of lora_B @ lora_A can then be computed.

    Args:
        params: This process's tensors by name, any subset of the layer's.
        spec: The layer.
        index: As for `apply`.
    """
    found = dict(params)
    for name, p in params.items():
        dim = sharding.rank_dim(spec, name)
        if dim is not None and sharding.over_rank(spec, name):
            [found[name]] = collectives.gather([p], spec.axis, index, dim=dim)
    return found


def differing(params: Mapping[str, Tensor], spec: LayerSpec, *, index: Tensor | None = None) -> list[str]:
    """The names of tensors whose copies are not bit-identical on all processes of the bound axis."""
    names = []
    for name, p in params.items():
        layout = sharding.layout(spec, name) if sharding.copied(spec, name) else None
        if layout is None and (spec.axis.size == 1 or isinstance(sharding.rule(spec, name).placement, Shard)):
            continue
        both = torch.stack([p.detach(), -p.detach()])
        both = torch.where(both.isnan(), torch.inf, both)
        if layout is None:
            most = collectives.maximum(both, spec.axis, index)
        else:
            place, dim = collectives.place(spec.axis, index), cut_dim(spec, name) + 1
            spread = collectives.spread(both, layout, place, dim=dim, fill=-torch.inf)
            most = collectives.pick(collectives.maximum(spread, spec.axis, index), layout, place, dim=dim)
        if not torch.equal(most, both):
            names.append(name)
    return names


def _check(
    params: Mapping[str, Tensor], spec: LayerSpec, shape_of: Callable[[LayerSpec, str], tuple[int, ...]]
) -> None:
    problems = Problems(SpecError)
    known = sharding.rules(spec)
    for name, p in params.items():
        if name not in known:
            problems.add(
                name, f"a {spec.kind} layer like this has no such parameter; expected some of {sorted(known)}."
            )
        elif tuple(p.shape) != shape_of(spec, name):
            problems.add(name, f"has shape {list(p.shape)}, expected {list(shape_of(spec, name))}.")
    problems.raise_if_any()
