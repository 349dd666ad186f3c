"""Which modules hold an adapter? `wrap` replaces the targeted layers of a model by `LoraLayer`s.

An adapter is data: `make` it, `attach` it, `detach` it, attach another.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

import lora_fn
from adapters import initialize, kinds, nxd, optimum_models, raw, schemes, trained
from adapters import recompute as recomputing
from adapters.bound import BoundLayer, LoraLayer, WholeLayer, device_of, tensor_of
from adapters.initialize import Initial, Step, loss_of
from adapters.parallel import attribute, dtype_name
from adapters.raw import Adapted, RawLayer
from adapters.schemes import Scheme
from adapters.stack import stack, stacked
from lora_fn import (
    LayerSpec,
    LoraSpec,
    SpecError,
    TargetError,
    alora,
    peft_format,
    sharding,
    starts,
    targets,
    variants,
)
from lora_fn.dropout import fold_in
from lora_fn.errors import Problems
from lora_fn.initialize import seed_of
from lora_fn.layer_spec import FusedPart, changed


def sites(model: nn.Module) -> dict[str, tuple[str, str]]:
    """Whatever can be adapted by the name that targets call it -> the name of the module, and the part of it.

    Of a module that is not fused, both names are the same, and the part is "". Adapted modules are there too.
    """
    return _sites(dict(model.named_modules()))


def _sites(modules: Mapping[str, nn.Module]) -> dict[str, tuple[str, str]]:
    found: dict[str, tuple[str, str]] = {}
    for path, module in modules.items():
        if isinstance(module, BoundLayer) or nxd.class_name(module) in kinds.SPEC_OF:
            spec = getattr(module, "spec", None)
            parts = optimum_models.part_names(modules, path) if spec is None else tuple(p.name for p in spec.parts)
            for part in parts or ("",):
                name = peft_format.part_path(path, part)
                if name in found:
                    raise TargetError(
                        f"{name}: is what both {found[name][0]} and {path} hold, so that it tells no layer; rename one."
                    )
                found[name] = (path, part)
    return found


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Adapter:
    """What makes a model an adapted one, as data: made by `make`, put on by `attach`, taken off by `detach`.

    Args:
        spec: What was asked for; None for nothing: then only what has to be taken over is.
        modules: Name of a module -> what stands in its place.
        raw: Path -> the adapter of a raw parameter, whose module stays in its place.
    """

    spec: LoraSpec | None
    modules: Mapping[str, BoundLayer]
    raw: Mapping[str, RawLayer] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Attached:
    """An adapter on a model: what it took the places of, and the hooks that `detach` removes."""

    adapter: Adapter
    replaced: Mapping[str, nn.Module]
    handles: tuple[Any, ...]


def wrap(
    model: nn.Module,
    spec: LoraSpec,
    *,
    seed: int = 0,
    gradients: str = "summed",
    dtype: torch.dtype = torch.float32,
    batches: Iterable[Any] | None = None,
    step: Step = loss_of,
    recompute: str | None = None,
    scheme: Scheme = None,
) -> nn.Module:
    """Adapt a model: its targeted layers are replaced, in place, by `LoraLayer`s, and everything else is frozen.

    neuronx-distributed's other layers are replaced by `BoundLayer`s: in bfloat16 its own column layers leave their
    input's gradient unsummed, and its frozen fused QKV has no backward, which every adapter below would suffer from.

    Args:
        model: Made of our parallel layers, neuronx-distributed's (see `adapters.nxd`), nn.Linear, nn.Embedding,
            transformers' Conv1D, and anything else.
        spec: What to adapt, and how.
        seed: Of the factors; the same seed gives the same canonical factors at every size of the axis.
        gradients: "summed": partial gradients of replicated factors are summed in the backward, nothing else is
            needed. "deferred": call `lora_fn.sync_gradients(grads, adapters.specs(model))` once per step.
        dtype: Of the factors.
        batches: What the model runs on, once, where `init_lora_weights` is "eva", "corda" or "lora_ga": mappings of the
            model's arguments, the same on every process.
        step: (model, batch) runs it, and gives the loss whose gradient "lora_ga" takes.
        recompute: "elementwise": norms and products of activations of Hugging Face's decoders are computed again in the
            backward, instead of saved for it (see `adapters.recompute`). None: they are saved.
        scheme: "rank": the factors of column, row and qkv layers are cut over the rank, where there is no sequence
            parallel or the input is gathered before them (see `LayerSpec.scheme`): for large ranks over many processes.
            Or a function that gives each `LayerSpec` its scheme, such as
            `lambda layer: schemes.cheapest(layer, machine, tokens=tokens).scheme`. None: as the rules table says. No
            number changes but by rounding, and the adapter's files are the same.

    Returns:
        The model. Its lora_spec has the ranks that "eva" found.

    Raises:
        SpecError: No LoraSpec, or one that does not fit a layer, or a scheme that no layer has.
        TargetError: The model is wrapped already, a target matches nothing (with the nearest names), or a targeted
            layer cannot be adapted, or cannot start as asked, or a layer that we cannot take over has a backward that
            is wrong, or nothing of the model is known to be elementwise. Nothing is changed then.
    """
    recomputing.check(model, recompute)
    if not isinstance(spec, LoraSpec):
        raise SpecError(
            f"wrap: spec is a {type(spec).__name__}, expected a LoraSpec; of a PEFT config, "
            f"lora_fn.peft_format.from_config makes one."
        )
    with stacked_for(model, spec):
        told: dict[str, Any] = {"batches": batches, "step": step, "scheme": scheme}
        made = make(model, spec, seed=seed, gradients=gradients, dtype=dtype, **told)
        return attach(model, made, recompute=recompute)


@contextmanager
def stacked_for(model: nn.Module, spec: LoraSpec) -> Iterator[None]:
    """A model stacked as a spec asks, which it stays; after an error it is as it was.

    Raises:
        TargetError: As `stack`.
    """
    undo = stack(model, () if stacked(model) == spec.layer_replication else spec.layer_replication)
    try:
        yield
    except BaseException:
        undo()
        raise


def make(
    model: nn.Module,
    spec: LoraSpec | None,
    *,
    seed: int = 0,
    gradients: str = "summed",
    dtype: torch.dtype = torch.float32,
    batches: Iterable[Any] | None = None,
    step: Step = loss_of,
    scheme: Scheme = None,
    layer_class: Callable[..., LoraLayer] = LoraLayer,
) -> Adapter:
    """A new adapter for a model, which is left as it is (but quantized, where it starts with "loftq").

    Args and errors as `wrap`; a spec of None adapts nothing. `layer_class` is called as `LoraLayer`, for an adapted
    layer.
    """
    modules = dict(model.named_modules())
    owners = raw.candidates(model) if spec is not None and spec.target_parameters else {}
    planned = {} if spec is None else plan(model, spec, gradients=gradients, scheme=scheme)
    for name, layer in planned.items():
        module = modules[name] if name in modules else owners[peft_format.adapted_paths(name, layer)[""]]
        if device_of(module).type == "meta":
            raise TargetError(f"{name}: is on the meta device, where its factors would be lost; fill the model first.")
    ties, adaptable = trained.ties(modules), kinds.adaptable(modules)
    others = _others(modules, planned, adaptable)
    made: dict[str, BoundLayer] = {name: BoundLayer(modules[name], layer) for name, layer in others.items()}
    if spec is None:
        return Adapter(spec=None, modules=made)
    adapted = {name: layer for name, layer in planned.items() if layer.updates and not layer.raw}
    initialize.check(spec, batches)
    how, statistics = starts.start_of(spec.init_lora_weights), dict[str, Callable[[], dict[str, Tensor]]]()
    if how.needs in (starts.INPUTS, starts.GRADIENT):
        bound = {name: BoundLayer(modules[name], _measured(layer)) for name, layer in adapted.items()}
        with _in_place(model, Adapter(spec=None, modules=made | bound)):
            spec, statistics = initialize.measure(model, bound, adapted, spec, batches or (), step)
        planned = plan(model, spec, gradients=gradients, scheme=scheme)
    of_raw: dict[str, RawLayer] = {}
    for name in sorted(planned, key=ties.__contains__):  # what others are tied to before those
        layer, owner = planned[name], made.get(ties.get(name, ""))
        if layer.raw and name not in adaptable:
            of_raw[name] = _new_raw(owners, layer, peft_format.adapted_paths(name, layer)[""], spec, seed, dtype)
            continue
        if not layer.updates:
            made[name] = (WholeLayer if layer.kind == "replicated" else BoundLayer)(modules[name], layer, owner)
        elif owner is not None and owner.spec.updates:
            made[name] = layer_class(modules[name], layer, {}, number_of(name), owner=owner)
        else:
            told = statistics.pop(name)() if name in statistics else {}
            factors, initial = _start(modules[name], name, layer, spec, seed=seed, statistics=told, dtype=dtype)
            made[name] = layer_class(modules[name], layer, factors, number_of(name), initial)
        if kinds.SPEC_OF.get(nxd.class_name(modules[name]), kinds.own_spec) is not kinds.own_spec:
            nxd.mark(made[name], made[name].trained(), layer)
    return Adapter(spec=spec, modules=made, raw=of_raw)


def _new_raw(
    owners: Mapping[str, nn.Module], layer: LayerSpec, name: str, spec: LoraSpec, seed: int, dtype: torch.dtype
) -> RawLayer:
    """A new adapter of a raw parameter."""
    how = spec.init_lora_weights
    canonical = lora_fn.init(layer, seed=seed_of(seed, name), init_lora_weights=how, dtype=dtype)
    return RawLayer(owners[name], layer, lora_fn.shard(canonical, layer, layer.axis.index or 0))


def _start(
    module: nn.Module,
    path: str,
    layer: LayerSpec,
    spec: LoraSpec,
    *,
    seed: int,
    statistics: Mapping[str, Tensor],
    dtype: torch.dtype,
) -> tuple[dict[str, Tensor], Initial | None]:
    """This process's factors of a new adapted layer, and what the base lacks beside them."""
    seeds = {part: seed_of(seed, name) for part, name in peft_format.adapted_paths(path, layer).items()}
    initial = None
    if starts.start_of(spec.init_lora_weights).needs == starts.NOTHING:
        drawn = nxd.all_experts(module, layer)
        canonical = lora_fn.init(drawn, seed=seeds, init_lora_weights=spec.init_lora_weights, dtype=dtype)
        own = nxd.own_experts(module, layer, canonical)
        factors = lora_fn.shard(own, layer, layer.axis.index or 0)
    else:
        base = BoundLayer(module, layer.base)
        factors, initial = initialize.start(
            base, spec, path=path, adapted=layer, seeds=seeds, statistics=dict(statistics), dtype=dtype
        )
    if variants.TABLE[layer.variant].lacks is not None:
        initial = initialize.truncation(BoundLayer(module, layer.base), layer)
    if sharding.derived_names(layer):
        own_base = _base(module, layer)
        own_base |= {} if initial is None else initial.residual(own_base)
        factors |= variants.start(own_base | factors, layer)
    return factors, initial


def _measured(layer: LayerSpec) -> LayerSpec:
    """A layer as it is while data says what it starts with: without its adapter, its gradients whole."""
    return replace(layer.base, gradients="summed")


@contextmanager
def _in_place(model: nn.Module, adapter: Adapter) -> Iterator[None]:
    """A model with an adapter on it for a while; it is as it was afterwards."""
    trained = [p for p in model.parameters() if p.requires_grad]
    attach(model, adapter)
    try:
        yield
    finally:
        detach(model)
        for p in trained:
            p.requires_grad_(True)


def attach(model: nn.Module, adapter: Adapter, *, recompute: str | None = None) -> nn.Module:
    """Put an adapter on a model: its modules take their places, and everything else is frozen.

    Args:
        model: The one that the adapter was made for, with no adapter on it.
        adapter: From `make` or `detach`. Its parameters stay the same objects, wherever optimizers hold them (unless
            the model has moved to another device since).
        recompute: As in `wrap`.

    Returns:
        The model.

    Raises:
        TargetError: The model has an adapter on it, or no module of a name, or nothing to recompute. Nothing is changed
            then.
    """
    recomputing.check(model, recompute)
    if _attached(model) is not None:
        raise TargetError("attach: the model has an adapter on it; detach that first.")
    known, replaced = dict(model.named_modules()), {}
    for name in adapter.modules:
        if name not in known:
            raise TargetError(f"{name}: is no module of this model; attach the adapter to the model it was made for.")
        replaced[name] = known[name]
    model.requires_grad_(False)
    places = _places(model)
    for name, bound in adapter.modules.items():
        bound.take(replaced[name])
        for parent, last in places[id(replaced[name])]:
            setattr(parent, last, bound)
    model.requires_grad_(False)  # what the adapter brought
    for bound in adapter.modules.values():
        for p in bound.trained().values():
            p.requires_grad_(True)
        if isinstance(bound, LoraLayer) and bound.initial is not None:
            bound.initial.subtract(bound)
    raw.put_on(adapter.raw)
    for raw_layer in adapter.raw.values():
        for p in raw_layer.trained().values():
            p.requires_grad_(True)
    handles = (*optimum_models.mend_gradients(model), *recomputing.put_on(model, recompute))
    model.adapter = _Attached(adapter=adapter, replaced=replaced, handles=handles)  # type: ignore[assignment]
    return model


def detach(model: nn.Module) -> Adapter:
    """Take the adapter off a model, which is then what it was before `attach` (but frozen).

    A base that `attach` made a residual gets back what it lacks: it is the old one, to the rounding of its dtype.

    Returns:
        The adapter, to `attach` again.

    Raises:
        TargetError: There is none.
    """
    attached = _attached(model)
    if attached is None:
        raise TargetError("detach: the model has no adapter on it.")
    raw.take_off(attached.adapter.raw)
    places = _places(model)
    for name, bound in attached.adapter.modules.items():
        if isinstance(bound, LoraLayer) and bound.initial is not None:
            bound.initial.restore(bound)
        bound.give(attached.replaced[name])
        for parent, last in places[id(bound)]:
            setattr(parent, last, attached.replaced[name])
    for handle in attached.handles:
        handle.remove()
    del model.adapter
    return attached.adapter


def _attached(model: nn.Module) -> _Attached | None:
    found = vars(model).get("adapter")
    return found if isinstance(found, _Attached) else None


def _base(module: nn.Module, spec: LayerSpec) -> dict[str, Tensor]:
    """The base's parameters of a layer that is not adapted yet, by their names in `apply`."""
    return {name: tensor_of(module, spec, name) for name in sharding.names(spec.base)}


def _others(
    modules: Mapping[str, nn.Module], planned: Collection[str], adaptable: Mapping[str, nn.Module]
) -> dict[str, LayerSpec]:
    """neuronx-distributed's layers that are not adapted and are to be taken over; those that we do not support stay."""
    taken, wrong = {}, Problems(TargetError)
    for path, module in adaptable.items():
        if path in planned or nxd.class_name(module) not in nxd.CLASSES:
            continue
        try:
            taken[path] = kinds.SPEC_OF[nxd.class_name(module)](module, **optimum_models.given(modules, path))
        except (SpecError, TargetError) as error:
            for line in str(error).splitlines() if nxd.leaves_gradients_partial(module) else ():
                wrong.add(path, f"leaves its input's gradient unsummed, and cannot be taken over: {line}")
    wrong.raise_if_any()
    return taken


def _places(model: nn.Module) -> dict[int, list[tuple[nn.Module, str]]]:
    """id of a module -> (module, attribute) of each place that it is in; a model may use one in several."""
    found: dict[int, list[tuple[nn.Module, str]]] = {}
    for parent in model.modules():
        for name, module in parent._modules.items():
            found.setdefault(id(module), []).append((parent, name))
    return found


def plan(model: nn.Module, spec: LoraSpec, *, gradients: str = "summed", scheme: Scheme = None) -> dict[str, LayerSpec]:
    """What `wrap` would adapt: {name: LayerSpec}. The model may be on the meta device.

    Raises:
        SpecError, TargetError: As `wrap`.
    """
    schemes.check(scheme)
    if _attached(model) is not None:
        raise TargetError("wrap: the model is adapted already; wrap a fresh one.")
    if stacked(model) != spec.layer_replication:
        raise TargetError(
            f"layer_replication: is {list(spec.layer_replication)}, the model is stacked of {list(stacked(model))}; "
            f"call adapters.stack(model, ranges) first, or adapters.wrap."
        )
    modules = dict(model.named_modules())
    where, tied = _sites(modules), trained.ties(modules)
    linear = [name for name, (path, _) in where.items() if kinds.is_linear(modules[path])]
    everything = trained.holders(modules, where)
    whole = {name: everything[name] for name in trained.with_tied(trained.saved(modules, where, spec), tied, spec)}
    owners = raw.candidates(model) if spec.target_parameters else {}
    selected = targets.select(
        list(where), spec, linear=linear, without=whole, model_type=_type(model), parameters=list(owners)
    )
    of_raw = tuple(name for name in selected if name in owners)
    chosen = trained.with_tied([name for name in selected if name in where], tied, spec)
    if "" in (*chosen, *whole):
        raise TargetError(
            "wrap: the model is a layer itself, which has no place to be replaced in; put it in a module."
        )
    alone = [n for n in chosen if not where[n][1] and n.rpartition(".")[2] in peft_format.PART_MODULES.values()]
    if spec.share_A and alone:
        raise TargetError(
            f"{alone[0]}: is not fused with others, so there is no lora_A to share (share_A); load the model with "
            f"fuse_qkv and fuse_gate_up, or leave share_A out."
        )
    shared = {*tied, *tied.values()}  # whose factors lie as both of tied layers have them
    planned, wrong = {}, Problems(TargetError)
    for path in dict.fromkeys(where[name][0] for name in chosen):
        try:
            given = optimum_models.given(modules, path)
            layer = layer_spec(modules[path], path, spec, chosen, gradients=gradients, given=given)
            planned[path] = layer if path in shared else schemes.chosen(layer, scheme)
            starts.check(path, planned[path], spec.init_lora_weights, wrong)
            variants.check(path, planned[path], wrong)
        except (SpecError, TargetError) as error:
            wrong.error = type(error)
            for line in str(error).splitlines():
                wrong.add(path, line)
    taken = {id(modules[path]): path for path in planned}
    for name in of_raw:
        try:
            if id(owners[name]) in taken:
                raise TargetError("belongs to a layer that is adapted too; leave one of them out of the targets.")
            layer = raw_spec(owners, name, spec, of_raw, gradients=gradients)
            path = next((path for path, module in modules.items() if module is owners[name]), "")
            is_module = nxd.class_name(owners[name]) in nxd.EXPERTS
            planned[path if is_module else peft_format.raw_path(name)] = layer
        except (SpecError, TargetError) as error:
            wrong.error = type(error)
            for line in str(error).splitlines():
                wrong.add(name, line)
    wrong.raise_if_any()
    schemes.check_used(planned, scheme)
    trained.check_tied(planned, tied)
    return planned | trained.plan(modules, where, spec, planned, whole, gradients=gradients)


def _type(model: nn.Module) -> str | None:
    """What a model's config says that it is; None where it has none."""
    config = vars(model).get("config")
    return getattr(config, "model_type", None)  # whatever a model of somebody's own calls its config


def raw_spec(
    owners: Mapping[str, nn.Module], name: str, spec: LoraSpec, chosen: Sequence[str], *, gradients: str
) -> LayerSpec:
    """The `LayerSpec` of one raw parameter of a model, with the adapter that `spec` asks for there.

    Args:
        owners: From `raw.candidates`.
        name: Of the parameter.
        spec: What the user asks for.
        chosen: Names of all adapted parameters, in the order in which their modules declare them.
        gradients: As in `wrap`.
    """
    owner, (place, _, own) = owners[name], name.rpartition(".")
    after = chosen[chosen.index(name) + 1 :]
    names = (own, *(n.rpartition(".")[2] for n in after if n.rpartition(".")[0] == place))
    if nxd.class_name(owner) in nxd.EXPERTS:
        layer = layer_spec(owner, name, spec, chosen, gradients=gradients)
        if nxd.all_experts(owner, layer) != layer:
            raise TargetError(
                "is one of experts that lie over processes, whose adapters no file of PEFT's can hold; name the module "
                "in target_modules instead."
            )
        return replace(layer, raw=names)
    if nxd.class_name(owner) in kinds.SPEC_OF and kinds.SPEC_OF[nxd.class_name(owner)](owner).axis.size > 1:
        raise TargetError("belongs to a layer that is cut over processes; name that layer in target_modules instead.")
    holders = [n for n, other in owners.items() if other._parameters[n.rpartition(".")[2]] is owner._parameters[own]]
    if len(holders) > 1:
        raise TargetError(f"is the same parameter as {holders}, of which only one would be updated; leave it out.")
    return replace(raw.base_spec(owner, own), raw=names, gradients=gradients, **adapter_of(spec, name))


def lora_spec(model: nn.Module) -> LoraSpec:
    """The spec that a model was wrapped with.

    Raises:
        TargetError: It was not.
    """
    attached = _attached(model)
    if attached is None or attached.adapter.spec is None:
        raise TargetError("the model has no adapter of its own on it; call adapters.wrap(model, spec) first.")
    return attached.adapter.spec


def layer_spec(
    module: nn.Module,
    path: str,
    spec: LoraSpec,
    chosen: Collection[str],
    *,
    gradients: str = "summed",
    given: Mapping[str, Any] | None = None,
) -> LayerSpec:
    """The `LayerSpec` of one module of a model, with the adapter that `spec` asks for there.

    Args:
        module: The module.
        path: Its name.
        spec: What the user asks for.
        chosen: Names of all that is adapted (see `sites`): which parts of a fused module are.
        gradients: As in `wrap`.
        given: What the module does not know (see `optimum_models.given`).
    """
    base = kinds.SPEC_OF[nxd.class_name(module)](module, **given or {})
    common: dict[str, Any] = {"use_rslora": spec.use_rslora, "dropout": spec.dropout, "gradients": gradients}
    common["lora_bias"] = spec.lora_bias
    common["trained"] = starts.start_of(spec.init_lora_weights).trained
    if not base.parts:
        own = adapter_of(spec, path)
        common |= variants.options_of(spec, path)
        return changed(base, **common, rank=own["rank"], alpha=own["alpha"])
    parts: list[FusedPart] = []
    options: dict[str, dict[str, Any]] = {}
    for part in base.parts:
        name = peft_format.part_path(path, part.name)
        own = adapter_of(spec, name)
        adapted = replace(part, rank=own["rank"], alpha=own["alpha"], number=number_of(name))
        if name in chosen:
            options[name] = variants.options_of(spec, name)
        parts.append(adapted if name in chosen else part)
    if any(own != next(iter(options.values())) for own in options.values()):
        told = ", ".join(f"{name} {own}" for name, own in options.items())
        raise TargetError(f"{path}: its parts would be of different variants ({told}); load the model unfused.")
    common |= next(iter(options.values()), {})
    return changed(base, **common, parts=tuple(parts), share_A=spec.share_A)


def number_of(name: str) -> int:
    """The number that a layer folds into dropout's key: from its name alone, so that it is the same however the model
    is cut or fused."""
    return seed_of(0, name) & 0x7FFFFFFF


def adapter_of(spec: LoraSpec, name: str) -> dict[str, Any]:
    """What `spec` gives the layer `name`: the fields of `LayerSpec` that make the update what it is."""
    return {
        "rank": targets.rank_of(name, spec),
        "alpha": float(targets.alpha_of(name, spec)),
        "use_rslora": spec.use_rslora,
    }


def rescale(model: nn.Module, spec: LoraSpec) -> None:
    """Give a wrapped model the alpha, alpha_pattern and use_rslora of a spec. On XLA, no graph is compiled again.

    Raises:
        TargetError: The model is not wrapped, or an alpha_pattern matches no adapted layer.
        SpecError: Parts that share a lora_A would get different alphas. Nothing is changed then.
    """
    before, stable, planned = lora_spec(model), spec.use_rslora, dict[str, LayerSpec]()
    found = adapted_layers(model)
    names_of = {path: peft_format.adapted_paths(path, layer.spec) for path, layer in found.items()}
    adapted = tuple(name for names in names_of.values() for name in names.values())
    if spec.alpha_pattern:
        targets.select(adapted, LoraSpec(target_modules=adapted, alpha_pattern=spec.alpha_pattern))
    for path, names in names_of.items():
        was = found[path].spec
        alphas = {part: adapter_of(spec, name)["alpha"] for part, name in names.items()}
        if was.use_rslora == stable and all(update.alpha == alphas[update.name] for update in was.updates):
            continue
        if was.parts:
            parts = tuple(replace(part, alpha=alphas.get(part.name, part.alpha)) for part in was.parts)
            planned[path] = changed(was, parts=parts, use_rslora=stable)
        else:
            planned[path] = changed(was, alpha=alphas[""], use_rslora=stable)
    for path, layer_spec in planned.items():
        found[path].rescale(layer_spec)
    after = replace(before, alpha=spec.alpha, alpha_pattern=spec.alpha_pattern, use_rslora=stable)
    attached = _attached(model)
    assert attached is not None
    model.adapter = replace(attached, adapter=replace(attached.adapter, spec=after))  # type: ignore[assignment]


def adapted_layers(model: nn.Module) -> dict[str, Adapted]:
    """The adapted layers of a model, by name; the adapter of a raw parameter is one, of its own name."""
    return {name: m for name, m in model.named_modules() if isinstance(m, Adapted)}


def layers(model: nn.Module) -> dict[str, BoundLayer | RawLayer]:
    """The layers that an adapter's file holds something of, by name: adapted ones, and those trained otherwise."""
    found = {name: m for name, m in model.named_modules() if isinstance(m, (BoundLayer, RawLayer))}
    return {name: m for name, m in found.items() if sharding.stored_names(m.spec)}


def specs(model: nn.Module) -> dict[str, LayerSpec]:
    """The `LayerSpec` of each of `layers`, by name: what `sync_gradients` and `grad_norm` want."""
    return {name: layer.spec for name, layer in layers(model).items()}


def factors(model: nn.Module) -> dict[str, dict[str, nn.Parameter]]:
    """This process's trainable parameters, factors and whatever else: {layer: {name: parameter}}."""
    return {name: layer.trained() for name, layer in layers(model).items()}


def freeze(model: nn.Module, *names: str) -> None:
    """Stop training parameters of an adapter: "lora_A" is that of every layer, and of every part of it.

    They stay in the adapter's files, and have no gradient and no optimizer's state. Call it before making an optimizer.

    Args:
        model: From `wrap`.
        names: Names in the rules table.
    """
    known = layers(model).values()
    for layer in known:
        for name, p in layer.trained().items():
            p.requires_grad_(p.requires_grad and name.partition(".")[0] not in names)
    for layer in known:  # after all, as one may follow another
        held = layer.trained() | {name: p for name, (p, _) in layer.followed().items()}
        kept = tuple(name for name in sharding.trained_names(layer.spec) if held[name].requires_grad)
        layer.spec = replace(layer.spec, trained=kept)


def flat(tree: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """{layer: {name: tensor}} as {layer.name: tensor}."""
    return {f"{path}.{name}": t for path, params in tree.items() for name, t in params.items()}


def named(model: nn.Module, tree: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """{layer: {name: tensor}} by the names that a model has for them: what torch.func.functional_call wants."""
    known = specs(model)
    return {f"{path}.{attribute(known[path], n)}": t for path, params in tree.items() for n, t in params.items()}


def fill(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copy this process's factors, by the names that its trainable parameters have, into a wrapped model.

    Args:
        model: From `wrap`, with the same spec, on as many processes; also what neuronx-distributed made of it, which
            has the parameters of its own pipeline stage only.
        tensors: {layer.name: local tensor}, on any device.

    Raises:
        TargetError: Names every factor that is missing, unexpected, or of another shape or dtype. Nothing is changed
            then.
    """
    mine, problems = {name: p for name, p in model.named_parameters() if p.requires_grad}, Problems(TargetError)
    for name in sorted(set(mine) ^ set(tensors)):
        what = "is missing" if name in mine else "is no factor of this model"
        problems.add(name, f"{what}; wrap with the spec, on the mesh and in the stage that it was saved from.")
    for name in sorted(set(mine) & set(tensors)):
        found, expected = (f"{list(t.shape)} of {dtype_name(t.dtype)}" for t in (tensors[name], mine[name]))
        if found != expected:
            problems.add(name, f"is {found}, expected {expected}; use a checkpoint of the same mesh and spec.")
    problems.raise_if_any()
    with torch.no_grad():
        for name, factor in mine.items():
            factor.copy_(tensors[name])


class _Anchored(torch.autograd.Function):
    """x unchanged, but requiring a gradient, as the anchor does; the anchor gets none."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, anchor: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def enable_input_require_grads(model: nn.Module) -> None:
    """Let the outputs of a model's embeddings require a gradient, adapted or not, as reentrant checkpoints need.

    A reentrant checkpoint (neuronx-distributed knows no other) gives no gradients to a block whose input requires none,
    as behind a frozen embedding. No number changes; but gradients go back as far as the embeddings, which costs the
    first block's input gradient: so call it for such checkpoints only. Unlike the method of that name in transformers,
    it works under torch.func's transforms, and in a model that a pipeline has traced (call it before).

    Args:
        model: From `wrap`, or before that.

    Raises:
        TargetError: It has no embedding that we know.
    """
    found = [m for m in model.modules() if kinds.is_embedding(m) or _is_bound_embedding(m)]
    if not found:
        raise TargetError(
            "enable_input_require_grads: the model has no embedding, so whatever gives its blocks their input is not "
            "known; let that input require a gradient."
        )
    anchor = torch.zeros((), requires_grad=True)
    for module in found:
        module.register_forward_hook(functools.partial(_anchored, anchor))


def _anchored(anchor: Tensor, module: nn.Module, args: object, y: Tensor) -> Tensor:
    return y if y.requires_grad else _Anchored.apply(y, anchor)


def _is_bound_embedding(module: nn.Module) -> bool:
    return isinstance(module, BoundLayer) and module.spec.kind == "embedding"


def set_dropout_key(model: nn.Module, key: Tensor) -> None:
    """Give every adapted layer the key of the coming step.

    Args:
        key: int tensor [], the same on every process of an axis that shares activations; another one each step. Of
            many adapters (see `ManyAdapters`), also [places], one for each.
    """
    layers_of = [layer for layer in adapted_layers(model).values() if isinstance(layer, LoraLayer)]
    numbers = torch.tensor([layer.number for layer in layers_of], dtype=torch.int32, device=key.device)
    own = fold_in(key.unsqueeze(-1), numbers).unbind(-1)
    for layer, one in zip(layers_of, own, strict=True):
        layer.dropout_key = key if layer.spec.parts else one


def is_gated(model: nn.Module) -> bool:
    """Whether a model has an adapter on it whose update is added for some tokens only (see `set_invocation`)."""
    return any(variants.TABLE[layer.spec.variant].gated for layer in layers(model).values())


def set_invocation(model: nn.Module, ids: Tensor, *, documents: Tensor | None = None) -> None:
    """Tell a model with an aLoRA where its update begins: with the last occurrence of `alora_invocation_tokens`.

    Before each call; while a generation goes on, once, with the prompt.

    Args:
        ids: int [batch, length], whole.
        documents: As in `lora_fn.alora.active`.

    Raises:
        TargetError: The model is not wrapped, or has no aLoRA.
    """
    tokens = lora_spec(model).alora_invocation_tokens
    if tokens is None:
        raise TargetError("set_invocation: the adapter is no aLoRA; give its spec alora_invocation_tokens.")
    gate = alora.active(ids, tokens, documents=documents)
    for layer in layers(model).values():
        if isinstance(layer, LoraLayer):
            layer.gate = gate
