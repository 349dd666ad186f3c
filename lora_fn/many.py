"""How do many adapters compute at once? Their factors stand stacked, and every row of a batch has its own.

K adapters of one form are one dict of tensors whose factors have a leading dimension K. Ids, which are data, choose
among them: each for some rows of the batch, or several whose updates add up. Shapes are static, so that another choice,
another adapter in a place, or none, is the same graph; and no operation is done once per adapter.

What concerns parameters alone is done for the K adapters, once; what concerns activations, for the rows, by a vmap of
what `apply` does: so a row comes out as it would alone, whatever the kind, the variant and the axis.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import vmap
from torch.utils import _pytree as pytree

from lora_fn import grouped, layers, quantize, sharding, variants
from lora_fn.autocast import lowered
from lora_fn.errors import SpecError
from lora_fn.gradients import summed
from lora_fn.layer_spec import FusedPart, LayerSpec

Params = Mapping[str, Tensor]
NONE = -1  # the id of no adapter


@lowered
def apply_many(
    params: Params,
    x: Tensor,
    spec: LayerSpec,
    adapter_ids: Tensor,
    *,
    index: Tensor | None = None,
    key: Tensor | None = None,
    scaling: Tensor | None = None,
    present: Tensor | None = None,
    gate: Tensor | None = None,
    hs: Sequence[Tensor] | None = None,
) -> Any:
    """One layer with K adapters: base, and for every row the update of its own.

    Args:
        params: As for `apply`, but every parameter of the adapter is stacked: [K, ...] (see `stack`).
        x: As for `apply`. Its rows are its first dimension; its second where `spec.sequence_dim` is 0.
        spec: The layer; its ranks are those of the stacked factors, and its alphas do not count where `scaling` is
            given.
        adapter_ids: int tensor [n], where n divides the rows: each is the adapter of rows / n rows, one after the
            other; -1 for none, which is the base bit for bit. Or [n, m]: the updates of the m adapters of a row add up.
        index: As for `apply`.
        key: As for `apply`, for all adapters; or int [K], one for each. (Of several that add up, the first one's.)
        scaling: [K, number of `spec.updates`], in place of alpha / rank.
        present: bool [K, number of `spec.updates`], False where an adapter has no update of its own. None: all have.
        gate: As for `apply`.
        hs: As for `apply`; see `down_many`.

    Returns:
        As `apply`; every group of rows as `apply` gives it with its own adapter, and the same dropout.

    Raises:
        SpecError: As `apply`; ids of another shape, rows that n does not divide; rows of a kind "experts", whose tokens
            have been dealt out; or updates that do not add up: those of a variant with gains (DoRA) or a gate (aLoRA).

    Example:
        >>> spec = LayerSpec(kind="linear", in_features=2, out_features=1, rank=1)
        >>> params = {"weight": torch.zeros(1, 2), "lora_A": torch.ones(3, 1, 2), "lora_B": torch.ones(3, 1, 1)}
        >>> params["lora_B"] *= torch.tensor([1.0, 10.0, 100.0]).view(3, 1, 1)
        >>> apply_many(params, torch.ones(3, 2), spec, torch.tensor([2, -1, 0])).flatten()
        tensor([200.,   0.,   2.])
    """
    sharding.check_names(set(params), spec)
    layers.check_call(x, spec, gate, hs)
    own, variant = sharding.adapter_names(spec), variants.TABLE[spec.variant]
    if not own:
        raise SpecError("apply_many: the layer has rank 0, so no adapters; give the spec a rank.")
    base = summed({name: p for name, p in params.items() if name not in own}, spec, index=index)
    stacked = {name: params[name] for name in own}
    scaling = _scaling(stacked, spec, x) if scaling is None else scaling
    sets = _sets(adapter_ids, x, spec)

    def prepare(factors: dict[str, Tensor], scales: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        ready, gains = layers.prepared(base | summed(factors, spec, index=index), spec, index=index, scaling=scales)
        return {name: ready[name] for name in own if name in ready}, gains

    bare = variant.bare and not spec.parts
    ready, gains = (summed(stacked, spec, index=index), {}) if bare else vmap(prepare)(stacked, scaling)
    chosen, scales, shown = _chosen(ready, scaling, sets, present, spec)
    weight = quantize.of(base, spec) if spec.kind == "linear" and len(sets) > 1 else None
    if bare and _is_plain(spec, dropped=key is not None) and isinstance(weight, Tensor):
        rows, weight = rows_dim(spec), weight.T if spec.fan_in_fan_out else weight
        xs = x.unflatten(rows, (len(sets), -1)).movedim(rows, 0)
        y = grouped.updated(xs, weight, base.get("bias"), chosen["lora_A"], chosen["lora_B"], scales[:, 0])
        return y.movedim(0, rows).flatten(rows, rows + 1)
    gains = {
        part.name: torch.where(_beside(shown[:, 0, number], g), g, 1)
        for number, part in enumerate(spec.updates)
        if part.name in gains and sets.shape[1] == 1
        for g in (_picked(gains[part.name], sets)[:, 0],)
    }

    def compute(factors: Params, more: Mapping[str, Any], **of_rows: Any) -> Any:
        return layers.computed({**base, **factors}, spec=spec, index=index, **more, **of_rows)

    return _by_rows(compute, chosen, {"gains": gains, "scaling": scales}, sets, key, spec, gate, x, hs)


@lowered
def down_many(
    params: Params,
    x: Tensor,
    spec: LayerSpec,
    adapter_ids: Tensor,
    *,
    index: Tensor | None = None,
    key: Tensor | None = None,
    scaling: Tensor | None = None,
    gate: Tensor | None = None,
    sequence_dim: int,
) -> tuple[Tensor, list[Tensor]]:
    """What `layers.down` is to `layers.apply`, this is to `apply_many`.

    Args:
        params, spec, adapter_ids, index, key, scaling, gate: As for `apply_many`.
        x, sequence_dim: As for `layers.down`; rows are not what is cut.

    Returns:
        As `layers.down`: of m adapters that add up, H of m times the rank.
    """
    own = {name: params[name] for name in sharding.adapter_names(spec)}
    scaling = _scaling(own, spec, x) if scaling is None else scaling
    sets = _sets(adapter_ids, x, spec)
    ready = vmap(lambda factors: layers.plain(factors, spec, index=index))(own)
    ready = {name: p for name, p in ready.items() if name.startswith("lora_A")}
    chosen, scales, _ = _chosen(ready, scaling, sets, None, spec)

    def compute(factors: Params, more: Mapping[str, Any], **of_rows: Any) -> Any:
        return layers.downed(factors, spec=spec, index=index, sequence_dim=sequence_dim, **more, **of_rows)

    return _by_rows(compute, chosen, {"scaling": scales}, sets, key, spec, gate, x, None)


def _scaling(stacked: Params, spec: LayerSpec, x: Tensor) -> Tensor:
    """The spec's own, for every adapter."""
    first = next(iter(stacked.values()))
    one = [spec.scaling_of(part) for part in spec.updates]
    dtype = torch.promote_types(first.dtype, torch.float32)
    return torch.tensor(one, dtype=dtype, device=x.device).expand(first.shape[0], len(one))


def _sets(adapter_ids: Tensor, x: Tensor, spec: LayerSpec) -> Tensor:
    """The ids as [n, m]."""
    sets = adapter_ids if adapter_ids.dim() == 2 else adapter_ids[..., None]
    _check_sets(adapter_ids, sets, x, spec)
    return sets


def _picked(stack: Tensor, sets: Tensor) -> Tensor:
    """[K, ...] -> [n, m, ...]."""
    chosen = stack if stack.shape[0] == sets.numel() == 1 else stack.index_select(0, sets.clamp(min=0).flatten())
    return chosen.view(*sets.shape, *stack.shape[1:])


def _chosen(
    ready: Params, scaling: Tensor, sets: Tensor, present: Tensor | None, spec: LayerSpec
) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """The factors [n, ...] and scalings of every set, of several added up; and which updates [n, m] there are."""
    shown = (sets >= 0)[..., None]
    updates = len(spec.updates)
    shown = shown.expand(*sets.shape, updates) if present is None else shown & _picked(present, sets)
    chosen = {name: _shown(_picked(p, sets), shown, name, spec) for name, p in ready.items()}
    scales = _picked(scaling, sets)
    if sets.shape[1] == 1:
        return {name: p.squeeze(1) for name, p in chosen.items()}, scales.squeeze(1), shown
    chosen = {name: _added(p, scales, name, spec) for name, p in chosen.items()}
    return chosen, torch.ones_like(scales[:, 0]), shown


def _by_rows(
    compute: Callable[..., Any],
    chosen: Params,
    more: Mapping[str, Any],
    sets: Tensor,
    key: Tensor | None,
    spec: LayerSpec,
    gate: Tensor | None,
    x: Tensor,
    hs: Sequence[Tensor] | None,
) -> Any:
    """compute(factors, more, x=, gate=, hs=) for the rows of every set, each with its own."""
    if key is not None and key.dim():
        more = {**more, "key": _picked(key, sets)[:, 0]}
    elif key is not None:
        compute = functools.partial(compute, key=key)
    given = {"gate": gate, "x": x, "hs": None if hs is None else list(hs)}
    of_rows = {name: value for name, value in given.items() if value is not None}
    if len(sets) == 1:
        chosen, more = pytree.tree_map(lambda t: t.squeeze(0), (dict(chosen), dict(more)))
        return compute(chosen, more, **of_rows)
    rows = rows_dim(spec)
    each = vmap(lambda chosen, more, of_rows: compute(chosen, more, **of_rows), in_dims=(0, 0, rows), out_dims=rows)
    y = each(dict(chosen), dict(more), pytree.tree_map(lambda t: t.unflatten(rows, (len(sets), -1)), of_rows))
    return pytree.tree_map(lambda t: t.flatten(rows, rows + 1), y)


def _is_plain(spec: LayerSpec, *, dropped: bool) -> bool:
    """Whether a linear layer is a product and its update, and nothing else."""
    return not (spec.lora_bias or spec.tokens or (dropped and spec.dropout))


def rows_dim(spec: LayerSpec) -> int:
    """The dimension of a layer's input that holds the rows of the batch."""
    return 1 if spec.sequence_dim == 0 else 0


def _check_sets(adapter_ids: Tensor, sets: Tensor, x: Tensor, spec: LayerSpec) -> None:
    if sets.dim() != 2 or 0 in sets.shape or adapter_ids.is_floating_point():
        raise SpecError(
            f"adapter_ids: is {list(adapter_ids.shape)} of {adapter_ids.dtype}, expected whole numbers [n], or [n, m] "
            f"for m adapters each."
        )
    if sets.shape[1] > 1 and not (variants.TABLE[spec.variant].adds_up and spec.scheme is None):
        what = f"variant {spec.variant!r}" if spec.scheme is None else f"scheme {spec.scheme!r}"
        raise SpecError(
            f"adapter_ids: {sets.shape[1]} adapters for a row, but updates of {what} do not add up; choose one for "
            f"each row."
        )
    if len(sets) == 1:
        return
    if spec.kind == "experts":
        raise SpecError("adapter_ids: tokens that were dealt to experts are of no row any more; give one for all rows.")
    rows, leading = rows_dim(spec), x.dim() - (spec.kind != "embedding")
    if rows >= leading or x.shape[rows] % len(sets):
        found = f"{x.shape[rows]} rows" if rows < leading else "no rows"
        raise SpecError(f"adapter_ids: are {len(sets)} for {found}; give as many as there are rows, or divide them.")


def _beside(mask: Tensor, t: Tensor) -> Tensor:
    return mask.reshape(mask.shape + (1,) * (t.dim() - mask.dim()))


def _number(name: str, spec: LayerSpec) -> int:
    """Which update a parameter is of; of a shared one, the first."""
    ending = name.partition(".")[2]
    return next((n for n, part in enumerate(spec.updates) if part.name == ending), 0)


def _shown(chosen: Tensor, shown: Tensor, name: str, spec: LayerSpec) -> Tensor:
    """What gives an update its outputs is zero where there is none."""
    if not name.startswith("lora_B"):
        return chosen
    return torch.where(_beside(shown[..., _number(name, spec)], chosen), chosen, 0)


def _added(chosen: Tensor, scales: Tensor, name: str, spec: LayerSpec) -> Tensor:
    """[n, m, ...] of m adapters, as one of m times the rank, or summed; scaled."""
    times = _beside(scales[..., _number(name, spec)], chosen)
    dim = sharding.rank_dim(spec, name)
    if dim is None:
        return (chosen * times).to(chosen.dtype).sum(1)
    scaled = (chosen * times).to(chosen.dtype) if name.startswith("lora_A") else chosen
    return scaled.movedim(1, 1 + dim).flatten(1 + dim, 2 + dim)


# ------------------------------------------------------------------------------------------------------------- stacking


def joint(specs: Sequence[LayerSpec]) -> LayerSpec:
    """The spec of a layer that holds an adapter of each spec: every part that one of them adapts, of the largest rank.

    Args:
        specs: Of one layer, with adapters that may differ in rank, alpha, use_rslora, and which parts they adapt.

    Raises:
        SpecError: They differ otherwise, or in the rank of a variant whose factors cannot be padded.
    """
    first = specs[0]
    ranks = [_ranks(spec) for spec in specs]
    largest = {name: max(of.get(name, 0) for of in ranks) for of in ranks for name in of}
    for spec in specs:
        if _form(spec) != _form(first):
            differ = [n for n, a, b in zip(_names(first), _form(first), _form(spec), strict=True) if a != b]
            raise SpecError(
                f"stack: adapters of one layer differ in {', '.join(differ)}; only rank, alpha and which parts of "
                f"a fused layer are adapted may, so keep them apart."
            )
    if not (variants.TABLE[first.variant].pads and first.scheme is None) and any(of != largest for of in ranks):
        what = f"variant {first.variant!r}" if first.scheme is None else f"scheme {first.scheme!r}"
        raise SpecError(
            f"stack: adapters of {what} differ in rank, and their factors cannot be padded; make the ranks equal."
        )
    if not first.parts:
        return replace(first, rank=largest[""])
    if first.share_A and any(of.keys() != largest.keys() for of in ranks):
        raise SpecError(
            "stack: adapters with share_A adapt other parts of one layer, whose lora_A is that of the first; give them "
            "the same parts."
        )
    numbers = {part.name: part.number for spec in specs for part in spec.updates}
    parts = tuple(
        replace(part, rank=largest.get(part.name, 0), alpha=1.0, number=numbers.get(part.name, part.number))
        for part in first.parts
    )
    return replace(first, parts=parts)


def _ranks(spec: LayerSpec) -> dict[str, int]:
    return {part.name: part.rank for part in spec.updates}


def _names(spec: LayerSpec) -> tuple[str, ...]:
    return tuple(n for n in spec.__dataclass_fields__ if n not in ("rank", "alpha", "use_rslora"))


def _form(spec: LayerSpec) -> tuple[Any, ...]:
    """What adapters of one stack have in common."""
    parts = tuple(FusedPart(name=part.name, size=part.size) for part in spec.parts)
    return tuple(parts if n == "parts" else getattr(spec, n) for n in _names(spec))


def padded(params: Params, spec: LayerSpec, joint: LayerSpec) -> dict[str, Tensor]:
    """The local parameters of one adapter, padded with zeros to those of the joint spec.

    Args:
        params: `lora_A`, `lora_B`, ... of this process.
        spec: Their layer.
        joint: From `joint`.
    """
    found = {}
    like = next(iter(params.values()), torch.zeros(()))
    for name in sharding.adapter_names(joint):
        shape = sharding.local_shape(joint, name)
        p, dim = params.get(name), sharding.rank_dim(joint, name)
        if p is None:
            found[name] = like.new_zeros(shape)
        elif dim is None or p.shape[dim] == shape[dim]:
            found[name] = p
        else:
            after = p.dim() - 1 - dim
            found[name] = F.pad(p, (0, 0) * after + (0, shape[dim] - p.shape[dim]))
    return found


def unpadded(params: Params, spec: LayerSpec) -> dict[str, Tensor]:
    """The inverse of `padded`: views of those of one adapter, with the ranks of its own spec."""
    found = {}
    for name in sharding.adapter_names(spec):
        p, dim = params[name], sharding.rank_dim(spec, name)
        found[name] = p if dim is None else p.narrow(dim, 0, sharding.local_shape(spec, name)[dim])
    return found


def stack(adapters: Sequence[Params], specs: Sequence[LayerSpec]) -> dict[str, Tensor]:
    """K adapters of one layer -> stacked parameters [K, ...], padded to the ranks of `joint(specs)`. Differentiable.

    Args:
        adapters: This process's parameters of each, without the base's; {} for zeros.
        specs: Of each.
    """
    whole = joint(specs)
    each = [padded(params, spec, whole) for params, spec in zip(adapters, specs, strict=True)]
    like = next(p for params in adapters for p in params.values())
    return {name: torch.stack([of[name].to(like.device, like.dtype) for of in each]) for name in each[0]}


def scalings(specs: Sequence[LayerSpec], joint: LayerSpec) -> Tensor:
    """[K, number of updates]: what `apply_many` takes for `scaling`; 0 where an adapter has none."""
    return torch.tensor(
        [_of_updates(spec, joint, lambda part, spec=spec: spec.scaling_of(part), 0.0) for spec in specs]
    )


def presences(specs: Sequence[LayerSpec], joint: LayerSpec) -> Tensor:
    """bool [K, number of updates]: what `apply_many` takes for `present`."""
    return torch.tensor([_of_updates(spec, joint, lambda part: True, False) for spec in specs])


def _of_updates(spec: LayerSpec, joint: LayerSpec, value: Any, missing: Any) -> list[Any]:
    own = {part.name: part for part in spec.updates}
    return [value(own[part.name]) if part.name in own else missing for part in joint.updates]
