"""How do several adapters become one? Of a model, one layer after the other; or from files, without the model."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

import lora_fn
from adapters import experts
from adapters.convert import AdapterOnDisk, open_adapter
from adapters.initialize import one_thread
from lora_fn import (
    FileError,
    LayerSpec,
    LoraSpec,
    SpecError,
    TargetError,
    algebra,
    checkpoint,
    collectives,
    peft_format,
    sharding,
)
from lora_fn.algebra import Combination
from lora_fn.errors import Problems
from lora_fn.initialize import seed_of
from lora_fn.reshard import differing, gather

Layers = Mapping[str, LayerSpec]


class Stored(Protocol):
    """An adapted layer of a model: a `bound.LoraLayer`, a `raw.RawLayer`."""

    spec: LayerSpec

    @property
    def index(self) -> Tensor | None:
        """This process's place on the axis."""

    def stored(self) -> dict[str, Tensor]:
        """This process's part of what an adapter's file holds of it."""


def planned(adapters: Sequence[Layers], how: Combination) -> dict[str, LayerSpec]:
    """The layers of a combination, in the order in which the adapters have them.

    Args:
        adapters: {path: LayerSpec} of each.
        how: The type, with its options.

    Raises:
        SpecError: Layers, ranks or variants that do not go together, all of them at once.
    """
    problems, found = Problems(SpecError), dict[str, LayerSpec]()
    for path in dict.fromkeys(path for layers in adapters for path in layers):
        try:
            found[path] = algebra.result([layers[path] for layers in adapters if path in layers], how)
        except SpecError as error:
            for line in str(error).splitlines():
                problems.add(path, line.removeprefix("add_weighted: "))
    problems.raise_if_any()
    if any(spec.lora_bias for spec in found.values()):  # then PEFT wants one of each layer
        found = {path: replace(spec, lora_bias=True) for path, spec in found.items()}
    return _nested(found)


def _nested(layers: Layers) -> dict[str, LayerSpec]:
    """The layers, each raw parameter knowing those of its module that are declared after it."""
    found = dict(layers)
    for path, spec in layers.items():
        if spec.raw:
            owner = peft_format.owner_of(path, spec)
            names = {s.raw[0] for p, s in layers.items() if s.raw and peft_format.owner_of(p, s) == owner}
            known = [*experts.DECLARED.get(owner.rpartition(".")[2], ()), *sorted(names)]
            after = sorted(names, key=known.index)
            found[path] = replace(spec, raw=tuple(after[after.index(spec.raw[0]) :]))
    return found


def ranks(layers: Layers) -> dict[str, int]:
    """Name in Hugging Face's models -> rank, of what is adapted."""
    return {
        name: next(update.rank for update in spec.updates if update.name == part)
        for path, spec in layers.items()
        for part, name in peft_format.adapted_paths(path, spec).items()
    }


def _added(
    given: Sequence[tuple[Mapping[str, Tensor], LayerSpec]],
    weights: Sequence[float],
    how: Combination,
    path: str,
    spec: LayerSpec,
) -> dict[str, Tensor]:
    """The canonical factors of one layer's combination, zeros where no adapter has any.

    What is random comes of the names in Hugging Face's models: it is the same however the model is fused.
    """
    seeds = {part: seed_of(how.seed, name) for part, name in peft_format.adapted_paths(path, spec).items()}
    with one_thread():
        made, _ = algebra.add_weighted(given, weights, how, seeds=seeds)
    like = next(iter(made.values()))
    shapes = {name: sharding.canonical_shape(spec, name) for name in sharding.adapter_names(spec)}
    return {name: made.get(name, like.new_zeros(shape)) for name, shape in shapes.items()}


@torch.no_grad()
def combined(
    layers: Sequence[Stored], weights: Sequence[float], how: Combination, *, path: str, spec: LayerSpec
) -> dict[str, Tensor]:
    """This process's factors of the combination of adapters of one layer. Every process of the axis calls it.

    The layer is gathered, and the first process combines it for all.

    Args:
        layers: The layer with each adapter.
        weights: Of each.
        how: The type, with its options.
        path: The layer's name.
        spec: The layer with the combination, from `planned`.

    Raises:
        TargetError: Copies that differ between processes, or what comes out is not finite; told by every process.
    """
    specs = [layer.spec for layer in layers]
    index = layers[0].index
    local = [{n: p for n, p in layer.stored().items() if n.startswith("lora_")} for layer in layers]
    drifted = [differing(own, of, index=index) for own, of in zip(local, specs, strict=True)]
    if any(drifted):
        raise TargetError(
            f"{path}: the copies of {sorted({n for names in drifted for n in names})} differ between processes; call "
            f"lora_fn.sync_gradients before each optimizer step, or wrap with gradients='summed'."
        )
    device = next(iter(local[0].values())).device
    at = torch.device("cpu") if device.type == "xla" else device
    whole = [gather(own, of, index=index) for own, of in zip(local, specs, strict=True)]
    dtype = functools.reduce(torch.promote_types, (p.dtype for own in local for p in own.values()))
    names = sharding.adapter_names(spec)
    found = {n: torch.full(sharding.canonical_shape(spec, n), torch.nan, dtype=dtype) for n in names}
    if (spec.axis.index or 0) == 0:
        given = [({n: p.to(at) for n, p in own.items()}, of) for own, of in zip(whole, specs, strict=True)]
        with suppress(torch.linalg.LinAlgError):  # told by the NaN that the others get
            found = _added(given, weights, how, path, spec)
    sent = collectives.broadcast([p.to(device, dtype) for p in found.values()], spec.axis, index)
    found = dict(zip(found, sent, strict=True))
    if not all(p.isfinite().all() for p in found.values()):
        raise TargetError(f"{path}: the combination of its adapters is not finite; leave out the damaged one.")
    return lora_fn.shard(found, spec, spec.axis.index or 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Combined:
    """What a combination of files came to.

    Args:
        layers: {path: LayerSpec}.
        adapters: {path: how many of the adapters have the layer}.
        norms: {path: Frobenius norm of the weighted sum of the updates, of the combination's update}.
        errors: {path: norm of the difference of these two}.
    """

    layers: Layers
    adapters: Mapping[str, int]
    norms: Mapping[str, tuple[float, float]]
    errors: Mapping[str, float]

    @property
    def error(self) -> float:
        """Over all layers: how far the combination is from the weighted sum of the updates, relative to that."""
        whole = math.hypot(*(total for total, _ in self.norms.values()))
        return math.hypot(*self.errors.values()) / whole if whole else 0.0

    def rows(self) -> list[list[Any]]:
        """A table, its head first."""
        head = ["layer", "adapters", "rank", "|weighted sum|", "|combination|", "|difference|"]
        return [
            head,
            *(
                [path, self.adapters[path], spec.rank, *(f"{n:.4g}" for n in (*self.norms[path], self.errors[path]))]
                for path, spec in self.layers.items()
            ),
        ]


def combine(
    directories: Sequence[Path], weights: Sequence[float], output: Path, how: Combination, *, quiet: bool = False
) -> Combined:
    """Write the weighted combination of PEFT adapters as one; no model is needed.

    Args:
        directories: Of the adapters, all for one base model.
        weights: Of each.
        output: A directory that does not exist yet; it becomes a PEFT adapter.
        how: The type, with its options. Without an svd_rank, an SVD's is the largest of the adapters', as in PEFT.
        quiet: No progress bar.

    Returns:
        What came of each layer.

    Raises:
        FileError: A damaged or missing file, numbers that are not finite, an output that exists or cannot be written.
        SpecError: Adapters that do not go together. Nothing is written then.
    """
    from tqdm import tqdm

    if output.exists():
        raise FileError(f"{output}: exists; choose another --output.")
    if not directories or len(directories) != len(weights):
        raise SpecError(f"combine: found {len(directories)} adapters and {len(weights)} weights; give one weight each.")
    checkpoint.check_above(output)
    sources = [open_adapter(directory) for directory in directories]
    how, spec, layers = _checked(dict(zip(map(str, directories), sources, strict=True)), sources, weights, how)
    counts, norms, errors, tree = {}, {}, {}, {}
    for path, of in tqdm(layers.items(), unit="layer", desc="combine", disable=quiet):
        here = [(source, weight) for source, weight in zip(sources, weights, strict=True) if path in source.specs]
        given = [(_finite(source, path), source.specs[path]) for source, _ in here]
        own = [weight for _, weight in here]
        tree[path] = _added(given, own, how, path, of)
        made = tree[path], of
        norms[path] = algebra.norm(given, own), algebra.norm([made], [1.0])
        errors[path] = algebra.norm([*given, made], [*own, -1.0])
        counts[path] = len(here)
    names = list(ranks({path: s for path, s in layers.items() if not s.raw}))
    turned = any(s.fan_in_fan_out for s in layers.values() if not s.raw)
    config = peft_format.to_config(spec, names, names, fan_in_fan_out=turned)
    try:
        with checkpoint.replacing(output) as beside:
            checkpoint.save_adapter(beside, config, peft_format.to_state_dict(tree, layers))
    except OSError as error:
        raise FileError(f"{output}: cannot be written ({error}); choose another place.") from error
    return Combined(layers=layers, adapters=counts, norms=norms, errors=errors)


def _checked(
    named: Mapping[str, AdapterOnDisk], sources: Sequence[AdapterOnDisk], weights: Sequence[float], how: Combination
) -> tuple[Combination, LoraSpec, dict[str, LayerSpec]]:
    """The combination with its rank, and what comes of it."""
    algebra.check({name: source.spec for name, source in named.items()}, weights)
    tied = [name for name, source in named.items() if source.spec.ensure_weight_tying]
    if tied:
        raise SpecError(
            f"{tied[0]}: ensure_weight_tying is True, and no file tells which layers are tied; load the adapters, and "
            f"call add_weighted_adapter on the model."
        )
    specs = [source.spec for source in sources]
    how = with_rank(how, specs)
    layers = planned([source.specs for source in sources], how)
    return how, algebra.lora_spec(specs, ranks(layers)), layers


def with_rank(how: Combination, specs: Sequence[LoraSpec]) -> Combination:
    """A combination with a rank for its SVD: as in PEFT, the largest that the adapters' configs tell of."""
    if how.method.of != algebra.UPDATES or how.svd_rank is not None:
        return how
    return replace(how, svd_rank=algebra.largest_rank(specs))


def _finite(source: AdapterOnDisk, path: str) -> dict[str, Tensor]:
    factors = source.factors(path)
    for name, factor in factors.items():
        if not factor.isfinite().all():
            file = next(iter(source.files.headers))
            raise FileError(f"{file}: tensor {source.names[path][name]!r} is not finite; use a whole adapter.")
    return factors
