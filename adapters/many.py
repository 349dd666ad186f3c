"""Who holds many adapters on one model? `ManyAdapters`: places of one size, filled and emptied by name.

Shapes are those of the places, and who is used is data: adding, deleting, choosing and disabling compile nothing again.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import lora_fn
from adapters import bind, files
from adapters.bind import Adapter
from adapters.bound import BoundLayer, LoraLayer
from adapters.initialize import Initial
from adapters.parallel import attribute
from lora_fn import LayerSpec, LoraSpec, SpecError, TargetError, many, sharding, starts, variants
from lora_fn.errors import Problems

Rows = Sequence[str | Sequence[str] | None]


class RowsLayer(LoraLayer):
    """An adapted layer that computes several adapters, stacked, each for the rows that `adapter_ids` give it.

    Args:
        base, spec, factors, number: As in `LoraLayer`.
        count: How many adapters.
    """

    adapter_ids: Tensor
    present: Tensor

    def __init__(
        self,
        base: nn.Module,
        spec: LayerSpec,
        factors: Mapping[str, Tensor],
        number: int,
        *,
        count: int,
    ):
        updates = len(spec.updates)
        self.scales = [[0.0] * updates for _ in range(count)]
        super().__init__(base, spec, factors, number)
        device = next(self.parameters()).device
        self.register_buffer("present", torch.zeros(count, updates, dtype=torch.bool, device=device), persistent=False)
        self.register_buffer("adapter_ids", torch.tensor([many.NONE], device=device), persistent=False)

    def rescale(self, spec: LayerSpec) -> None:
        """The scaling of every adapter again, in fp32 or more."""
        factor = self.params()[sharding.adapter_names(spec)[0]]
        dtype = torch.promote_types(factor.dtype, torch.float32)
        self.scaling = torch.tensor(self.scales, dtype=dtype).to(factor.device)

    def scale_at(self, place: int, spec: LayerSpec, factor: float) -> None:
        """Multiply the scaling of one adapter, whose layer is `spec`."""
        self.scales[place] = [factor * value for value in many.scalings([spec], self.spec)[0].tolist()]
        self.rescale(self.spec)

    def show(self, place: int, spec: LayerSpec) -> None:
        """Let one adapter, whose layer is `spec`, compute the updates that it has."""
        self.present[place] = many.presences([spec], self.spec)[0].to(self.present.device)
        self.scale_at(place, spec, 1.0)

    def down(self, x: Tensor, *, dim: int) -> tuple[Tensor, list[Tensor]]:
        """As `LoraLayer.down`."""
        where: dict[str, Any] = {"index": self.index, "sequence_dim": dim}
        return many.down_many(self.params(), x, self.spec, self.adapter_ids, **where, **self._given(x, dim))

    def _computed(self, x: Tensor, **more: Any) -> Any:
        where: dict[str, Any] = {"index": self.index, "present": self.present}
        return lora_fn.apply_many(self.params(), x, self.spec, self.adapter_ids, **where, **more)


class ManyLayer(RowsLayer):
    """An adapted layer with places for adapters: its factors are stacked, [places, ...].

    Args:
        base, spec, factors, number, initial, owner: As in `LoraLayer`; the factors tell shapes only.
        places: How many.
    """

    def __init__(
        self,
        base: nn.Module,
        spec: LayerSpec,
        factors: Mapping[str, Tensor],
        number: int,
        initial: Initial | None = None,
        owner: BoundLayer | None = None,
        *,
        places: int,
    ):
        if owner is not None:
            raise TargetError(
                "ManyAdapters: ensure_weight_tying would tie one layer's places to another's; leave it out."
            )
        stacked = {name: f.new_zeros(places, *f.shape) for name, f in factors.items()}
        super().__init__(base, spec, stacked, number, count=places)

    def fill(self, place: int, params: Mapping[str, Tensor], spec: LayerSpec) -> None:
        """Put an adapter into a place: its local parameters, its layer."""
        with torch.no_grad():
            for name, p in many.padded(params, spec, self.spec).items():
                self.parameter(name)[place].copy_(p)
        self.show(place, spec)

    def empty(self, place: int) -> None:
        """Take the adapter out of a place."""
        with torch.no_grad():
            for name in sharding.adapter_names(self.spec):
                p = self.parameter(name)
                for t in (p, p.grad):
                    if t is not None:
                        t[place].zero_()
        self.scales[place] = [0.0] * len(self.spec.updates)
        self.present[place] = False
        self.rescale(self.spec)

    def of(self, place: int, spec: LayerSpec) -> dict[str, Tensor]:
        """The local parameters of the adapter in a place, views; `spec` is its layer."""
        stacked = {name: self.parameter(name).detach()[place] for name in sharding.adapter_names(self.spec)}
        return many.unpadded(stacked, spec)


class MixedLayer(RowsLayer):
    """An adapted layer over adapters that are each held by a layer of their own: it stacks them when it computes.

    Args:
        base: As in `LoraLayer`.
        members: Those layers; None for an adapter that has none here.
        to_train: Whether they train together, so that dropout and what is frozen have to be the same too.
    """

    def __init__(self, base: nn.Module, members: Sequence[LoraLayer | None], *, to_train: bool = True):
        self.members = tuple(members)  # a tuple, so that they are no parts of this module: their factors are
        self._to_train = to_train
        own = [m for m in members if m is not None]
        spec = many.joint([self._form(m.spec) for m in own])
        super().__init__(base, replace(spec, trained=()), {}, own[0].number, count=len(members))
        self.spec = spec
        held = [(m, n) for m in own for n in sharding.adapter_names(m.spec)]
        self.factors = nn.ParameterList(m.parameter(n) for m, n in held)
        self._frozen = {number for number, (m, n) in enumerate(held) if n not in m.trained()}
        self._seen = [None if m is None else m.spec for m in members]
        for place, member in enumerate(members):
            if member is not None:
                self.show(place, member.spec)

    def params(self) -> dict[str, Tensor]:
        """The tensors that `lora_fn.apply_many` wants."""
        own = [m for m in self.members if m is not None]
        given, like = iter(self._own(own)), self._form(own[0].spec)
        each = [({}, like) if m is None else (next(given), self._form(m.spec)) for m in self.members]
        found = {name: self.get_parameter(attribute(self.spec, name)) for name in sharding.names(self.spec.base)}
        return found | many.stack([params for params, _ in each], [spec for _, spec in each])

    def _form(self, spec: LayerSpec) -> LayerSpec:
        """What adapters of one layer must have in common."""
        if self._to_train:
            return spec
        return replace(spec, dropout=0.0, trained=None, variant="lora" if spec.variant == "mica" else spec.variant)

    def _own(self, members: Sequence[LoraLayer]) -> Iterator[dict[str, Tensor]]:
        held = iter(self.factors) if "factors" in self._modules else None
        for member in members:
            names = sharding.adapter_names(member.spec)
            yield {n: member.parameter(n) if held is None else next(held) for n in names}

    def _given(self, x: Tensor, cut: int | None) -> dict[str, Any]:
        specs = [None if m is None else m.spec for m in self.members]
        if any(a is not b for a, b in zip(specs, self._seen, strict=True)):  # another alpha, or another scale
            self._seen = specs
            for place, spec in enumerate(specs):
                if spec is not None:
                    self.scale_at(place, spec, 1.0)
        return super()._given(x, cut)

    def trained(self) -> dict[str, nn.Parameter]:
        """The factors of all that are trained, numbered."""
        return {str(number): p for number, p in enumerate(self.factors) if number not in self._frozen}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Held:
    """One adapter: its place, what was asked for, and its layers."""

    place: int
    spec: LoraSpec
    layers: Mapping[str, LayerSpec]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Made:
    """One adapter as it is alone: what was asked for, and its adapted layers."""

    spec: LoraSpec
    layers: Mapping[str, LoraLayer]


class ManyAdapters:
    """Adapters on one model, by name: one or several for a whole batch, or for each row its own; to serve or to train.

    The model stays what it was made of: its forward, its `generate`, torch.func's and the trainer's ways through it.
    Everything that is done here, every process does.

    Args:
        model: What `adapters.wrap` takes; adapted from here on, with nobody chosen.
        spec: The largest adapter that may come: every target, the largest rank (also by rank_pattern), the variant, the
            dropout. Of each that comes, targets may be fewer, ranks smaller, alphas others.
        places: How many may be there at once.
        gradients: As in `adapters.wrap`.
        dtype: Of the factors.

    Raises:
        SpecError: Less than one place.
        TargetError: As `adapters.wrap`; an initialisation or a variant that changes the base, which all have in common;
            an aLoRA; raw parameters, or what else is trained of the base.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
        >>> held = ManyAdapters(model, LoraSpec(rank=8, target_modules="all-linear"), places=2)
        >>> held.add("fr", LoraSpec(rank=2, target_modules=("0",), init_lora_weights=False))
        >>> x = torch.ones(2, 4)
        >>> held.select_rows(["fr", None])
        >>> [bool((y == model[0:3](x)[1]).all()) for y in model(x)]
        [False, True]
    """

    def __init__(
        self,
        model: nn.Module,
        spec: LoraSpec,
        *,
        places: int,
        gradients: str = "summed",
        dtype: torch.dtype = torch.float32,
    ):
        if places < 1:
            raise SpecError(f"places: are {places}, expected at least 1.")
        self.model, self.gradients, self.dtype = model, gradients, dtype
        _check_spec(spec, "ManyAdapters")
        envelope = replace(spec, init_lora_weights=True)
        make = functools.partial(bind.make, model, gradients=gradients, dtype=dtype)
        self._adapter = replace(make(envelope, layer_class=functools.partial(ManyLayer, places=places)), spec=None)
        _check(self._adapter, "ManyAdapters")
        self.places, self._held = places, dict[str, _Held]()
        self._ids, self._disabled = torch.tensor([[many.NONE]]), False
        bind.attach(model, self._adapter)
        self._show()

    # --------------------------------------------------------------------------------------------------------- by name

    @property
    def names(self) -> tuple[str, ...]:
        """Who is there, in the order of the places."""
        return tuple(sorted(self._held, key=lambda name: self._held[name].place))

    @property
    def layers(self) -> dict[str, ManyLayer]:
        """The adapted layers, by name."""
        return {path: m for path, m in self._adapter.modules.items() if isinstance(m, ManyLayer)}

    def spec(self, name: str) -> LoraSpec:
        """What an adapter was asked to be."""
        return self._of(name).spec

    def add(self, name: str, what: LoraSpec | str | Path | Adapter, *, seed: int = 0) -> None:
        """Put an adapter into a free place: nothing of the others, and nobody's choice, changes.

        Args:
            name: Any text.
            what: A spec, for a new adapter; the directory of one (PEFT's layout); or one made for the model, which is
                copied.
            seed: Of a new one's factors, as in `adapters.wrap`.

        Raises:
            TargetError: The name is there already, no place is free, or a layer that has no place here, or not one of
                that rank or form. As `adapters.wrap`.
            FileError: As `adapters.load`. Nothing is changed then.
        """
        if name in self._held:
            raise TargetError(f"adapter {name!r}: is there already; delete it first, or replace it.")
        free = set(range(self.places)) - {held.place for held in self._held.values()}
        if not free:
            raise TargetError(f"adapter {name!r}: all {self.places} places are taken; delete another first.")
        self._fill(min(free), name, self._made(name, what, seed))

    def replace(self, name: str, what: LoraSpec | str | Path | Adapter, *, seed: int = 0) -> None:
        """Put another adapter in the place of one: a hot swap. Args and errors as `add`."""
        place, made = self._of(name).place, self._made(name, what, seed)
        for layer in self.layers.values():
            layer.empty(place)
        self._fill(place, name, made)

    def delete(self, name: str) -> None:
        """Empty the place of an adapter. A row that had it computes the base from now on.

        Raises:
            TargetError: There is none of that name.
        """
        place = self._of(name).place
        for layer in self.layers.values():
            layer.empty(place)
        del self._held[name]
        self._choose(torch.where(self._ids == place, many.NONE, self._ids))

    def forget(self, name: str, optimizer: torch.optim.Optimizer) -> None:
        """Zero what an optimizer knows of an adapter's place: after `replace`, or `delete` and `add`, while training,
        for its moments are those of the one that was there.

        Raises:
            TargetError: There is none of that name.
        """
        place = self._of(name).place
        for layer in self.layers.values():
            for p in layer.trained().values():
                for t in optimizer.state.get(p, {}).values():
                    if isinstance(t, Tensor) and t.shape == p.shape:
                        t[place].zero_()

    def rename(self, name: str, other: str) -> None:
        """Give an adapter another name.

        Raises:
            TargetError: There is none of that name, or one of the other.
        """
        held = self._of(name)
        if other in self._held:
            raise TargetError(f"adapter {other!r}: is there already; choose another name for {name!r}.")
        del self._held[name]
        self._held[other] = held

    def scale(self, name: str, factor: float) -> None:
        """Multiply what an adapter adds: 1 is as it was made. Nothing is compiled again.

        Raises:
            TargetError: There is none of that name.
            SpecError: A factor that is not finite.
        """
        held, mine = self._of(name), self.layers
        if not math.isfinite(factor):
            raise SpecError(f"adapter {name!r}: the factor is {factor}, expected a finite number.")
        for path, spec in held.layers.items():
            mine[path].scale_at(held.place, spec, factor)

    # -------------------------------------------------------------------------------------------------------- choosing

    def select(self, *names: str) -> None:
        """Have every row computed with these adapters, whose updates add up; none for the base.

        Raises:
            TargetError: There is none of a name.
            SpecError: Several of a variant whose updates do not add up, at the next call.
        """
        self.select_rows([list(names) or None])

    def select_rows(self, rows: Rows) -> None:
        """Choose for each row of the batches that come.

        Args:
            rows: A name for each row, None for the base, or names whose updates add up. Fewer than there are rows, if
                that divides their number: each then holds for as many rows, one after the other.

        Raises:
            TargetError: There is none of a name.
            SpecError: No rows.
        """
        if not rows or isinstance(rows, str):
            raise SpecError(f"select_rows: is {rows!r}, expected a list with a name, or None, for each row.")
        sets = [[] if row is None else [row] if isinstance(row, str) else list(row) for row in rows]
        wide = max(1, *map(len, sets))
        ids = [[self._of(name).place for name in row] + [many.NONE] * (wide - len(row)) for row in sets]
        self._choose(torch.tensor(ids))

    def _choose(self, ids: Tensor) -> None:
        self._ids = ids
        self._show()

    def _show(self) -> None:
        """Tell the layers, all of them by one tensor, so that what compiled them finds it again."""
        ids = torch.full_like(self._ids, many.NONE) if self._disabled else self._ids
        for layer in self.layers.values():
            ids = ids.to(layer.present.device)
            layer.adapter_ids = ids

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """The base alone, bit for bit, inside of the block; who is chosen meanwhile computes after it."""
        before, self._disabled = self._disabled, True
        self._show()
        try:
            yield
        finally:
            self._disabled = before
            self._show()

    # ----------------------------------------------------------------------------------------------------- in and out

    def take(self, name: str) -> Adapter:
        """A copy of an adapter, to be attached by itself (`adapters.bind.attach`).

        Raises:
            TargetError: There is none of that name.
        """
        held = self._of(name)
        with self._off():
            started = replace(held.spec, init_lora_weights=True, eva_config=None)  # the factors are copied
            made = bind.make(self.model, started, gradients=self.gradients, dtype=self.dtype)
        made = replace(made, spec=held.spec)
        for path, layer in made.modules.items():
            if isinstance(layer, LoraLayer):
                with torch.no_grad():
                    for n, p in self.layers[path].of(held.place, layer.spec).items():
                        layer.parameter(n).copy_(p)
        return made

    def save(self, name: str, directory: str | Path) -> None:
        """Write an adapter as a PEFT directory; see `adapters.save`. What `scale` did is not in it."""
        made = self.take(name)
        with self._on(made):
            files.save(self.model, directory)

    def remove(self) -> nn.Module:
        """Take everything off the model, which is then what it was (but frozen)."""
        bind.detach(self.model)
        return self.model

    def _made(self, name: str, what: LoraSpec | str | Path | Adapter, seed: int) -> _Made:
        """An adapter as it is alone, which fits the places."""
        spec: Any = what.spec if isinstance(what, Adapter) else what
        spec = spec if spec is None or isinstance(spec, LoraSpec) else files.read_spec(spec)
        if spec is None:
            raise TargetError(f"adapter {name!r}: adapts nothing; give one that was made of a spec.")
        _check_spec(spec, f"adapter {name!r}")
        if isinstance(what, Adapter):
            return _Made(spec=spec, layers=self._checked(what, name))
        with self._off():
            made = bind.make(self.model, spec, seed=seed, gradients=self.gradients, dtype=self.dtype)
        if not isinstance(what, LoraSpec):
            with self._on(made):
                files.load(self.model, what)
                spec = bind.lora_spec(self.model)
        return _Made(spec=spec, layers=self._checked(made, name))

    @contextmanager
    def _off(self) -> Iterator[None]:
        """The bare model."""
        flags = [(p, p.requires_grad) for p in self.model.parameters()]
        bind.detach(self.model)
        try:
            yield
        finally:
            bind.attach(self.model, self._adapter)
            for p, flag in flags:
                p.requires_grad_(flag)

    @contextmanager
    def _on(self, adapter: Adapter) -> Iterator[None]:
        """The model with another adapter on it."""
        with self._off():
            bind.attach(self.model, adapter)
            try:
                yield
            finally:
                bind.detach(self.model)

    def _of(self, name: str) -> _Held:
        if name not in self._held:
            raise TargetError(f"adapter {name!r}: there is none of that name, only {list(self.names)}.")
        return self._held[name]

    def _checked(self, made: Adapter, name: str) -> dict[str, LoraLayer]:
        """The adapted layers of an adapter, all of which have a place here."""
        _check(made, f"adapter {name!r}")
        found = {path: m for path, m in made.modules.items() if isinstance(m, LoraLayer)}
        problems, mine = Problems(TargetError), self.layers
        for path, layer in found.items():
            if path not in mine:
                problems.add(path, f"is adapted by {name!r}, but has no places here; make them with it as a target.")
                continue
            whole = mine[path].spec
            try:
                larger = [
                    f"rank {part.rank}"
                    for part in many.joint([whole, layer.spec]).updates
                    if part.rank > next((p.rank for p in whole.updates if p.name == part.name), 0)
                ]
                if larger:
                    problems.add(path, f"has {larger[0]} in {name!r}, more than its places; make them of that rank.")
            except SpecError as error:
                problems.add(path, f"adapter {name!r}: {str(error).removeprefix('stack: ')}")
        problems.raise_if_any()
        return found

    def _fill(self, place: int, name: str, made: _Made) -> None:
        for path, layer in made.layers.items():
            own = {n: layer.parameter(n).detach() for n in sharding.adapter_names(layer.spec)}
            self.layers[path].fill(place, own, layer.spec)
        layers = {path: layer.spec for path, layer in made.layers.items()}
        self._held[name] = _Held(place=place, spec=made.spec, layers=layers)


def _check_spec(spec: LoraSpec, what: str) -> None:
    """Refuse what cannot stand beside others on one base, before anything is made.

    Raises:
        TargetError: It cannot.
    """
    start, variant = starts.start_of(spec.init_lora_weights), variants.TABLE[spec.variant]
    if start.base != starts.KEPT or start.trained is not None:
        why = f"init_lora_weights {spec.init_lora_weights!r}"
    elif variant.lacks is not None or variant.gated:
        why = f"variant {spec.variant!r}"
    else:
        return
    raise TargetError(
        f"{what}: {why} changes the base, freezes a factor, or adapts some tokens only, and one base and one form are "
        f"all adapters'; give a spec without it, or save it with as_lora."
    )


def _check(adapter: Adapter, what: str) -> None:
    problems = Problems(TargetError)
    check_factors_only(adapter, what, problems)
    problems.raise_if_any()


def check_factors_only(adapter: Adapter, what: str, problems: Problems) -> None:
    """Note what an adapter has of the base's own, which all rows of a batch have in common.

    Args:
        adapter: The adapter.
        what: For the message.
        problems: Where they are noted.
    """
    # Of activations that are whole, no spec tells whether the sequence comes first; ids never do. Where a layer has the
    # rows first, the model has, but for what transposes by itself (neuronx-distributed's qkv).
    dims = {m.spec.sequence_dim for m in adapter.modules.values() if isinstance(m, LoraLayer)}
    unknown = 0 in dims and 1 not in dims
    for path, module in adapter.modules.items():
        of_ids = isinstance(module, LoraLayer) and module.spec.kind == "embedding"
        if unknown and isinstance(module, LoraLayer) and module.spec.sequence_dim is None and not of_ids:
            problems.add(
                path,
                f"{what}: gets its sequence whole, where others' comes first, so that its rows are not known; leave it "
                f"out of the targets.",
            )
        if isinstance(module, LoraLayer) and variants.TABLE[module.spec.variant].gated:
            problems.add(path, f"{what}: is an aLoRA, which is not computed beside others yet; activate it alone.")
    for path in adapter.raw:
        problems.add(path, f"{what}: is a raw parameter, which has no rows; leave target_parameters out.")
    for path, module in adapter.modules.items():
        if isinstance(module, LoraLayer) and module.followed():
            problems.add(path, f"{what}: is tied to another layer's adapter; leave ensure_weight_tying out.")
        elif isinstance(module, LoraLayer) and module.initial is not None:
            problems.add(
                path, f"{what}: began with a part of the base, which all have in common; save it with as_lora."
            )
        elif not set(module.trained()) <= set(sharding.adapter_names(module.spec)):
            problems.add(
                path,
                f"{what}: trains parameters of the base, which all rows share; leave bias, modules_to_save and "
                f"trainable_token_indices out.",
            )
