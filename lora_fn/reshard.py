"""Cut, join, re-cut: canonical tensors to the local ones of each process, and back, bit for bit."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from lora_fn import collectives, sharding
from lora_fn.errors import Problems, SpecError
from lora_fn.placement import Shard
from lora_fn.spec import LayerSpec


def extent(size: int, parts: int, index: int) -> tuple[int, int]:
    """Start and stop of part `index` of a dimension; the last parts are short, or empty, where it does not divide."""
    length = -(-size // parts)
    return min(index * length, size), min((index + 1) * length, size)


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
    placement = sharding.rules(spec)[name].placement
    if not isinstance(placement, Shard):
        return p.clone()
    start, stop = extent(p.shape[placement.dim], spec.axis.size, index)
    part = p.new_zeros(sharding.local_shape(spec, name))
    part.narrow(placement.dim, 0, stop - start).copy_(p.narrow(placement.dim, start, stop - start))
    return part


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
    placement = sharding.rules(spec)[name].placement
    if isinstance(placement, Shard):
        size = sharding.canonical_shape(spec, name)[placement.dim]
        return torch.cat(list(parts), placement.dim).narrow(placement.dim, 0, size).clone()
    if not all(torch.equal(parts[0], part) for part in parts[1:]):
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
        placement = sharding.rules(spec)[name].placement
        if isinstance(placement, Shard):
            [p] = collectives.gather([p], spec.axis, index, dim=placement.dim)
            p = p.narrow(placement.dim, 0, sharding.canonical_shape(spec, name)[placement.dim])
        whole[name] = p.clone()
    return whole


def differing(params: Mapping[str, Tensor], spec: LayerSpec, *, index: Tensor | None = None) -> list[str]:
    """The names of replicated tensors whose copies are not bit-identical on all processes of the bound axis."""
    names = []
    for name, p in params.items():
        if spec.axis.size > 1 and not isinstance(sharding.rules(spec)[name].placement, Shard):
            both = torch.stack([p.detach(), -p.detach()]).nan_to_num(torch.inf, torch.inf, -torch.inf)
            if not torch.equal(collectives.maximum(both, spec.axis, index), both):
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
