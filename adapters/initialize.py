"""How does a model's adapter start? The factors of each layer, one layer at a time, the same on every process.

What needs a layer's weight gathers it, and the first process of the axis factorises it for all. What needs data, too,
runs the model on some batches: sums over the inputs of every layer, of which each process keeps the rows of its own
share of the features, or gradients of the weights, which lie as the weights do.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

import lora_fn
from lora_fn import LayerSpec, LoraSpec, TargetError, collectives, factorize, peft_format, sharding, starts, variants
from lora_fn import layout as layouts
from lora_fn.errors import Problems
from lora_fn.factorize import Components
from lora_fn.layout import Layout
from lora_fn.merge import subtract
from lora_fn.reshard import gather

Step = Callable[[nn.Module, Any], Any]


class Bound(Protocol):
    """A layer that holds its base's parameters: a `bound.BoundLayer`."""

    spec: LayerSpec
    index: Tensor | None

    def params(self) -> dict[str, Tensor]:
        """Its parameters, by their names in `lora_fn`."""

    def register_forward_hook(self, hook: Any) -> Any:
        """As nn.Module's."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Initial:
    """What an adapter over a residual base began with: just what that base lacks.

    Args:
        spec: The layer, with the alpha of then.
        factors: This process's factors of then.
    """

    spec: LayerSpec
    factors: Mapping[str, Tensor]

    def residual(self, base: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The weights that a base becomes, of this process."""
        return subtract(self._with(base), self.spec)

    def subtract(self, layer: Bound) -> None:
        """Make a layer's base the residual, in place; every process its own part."""
        _write(layer, self.residual(_base(layer)))

    def restore(self, layer: Bound) -> None:
        """Make a layer's base what it was, in place, to the rounding of its dtype."""
        _write(layer, lora_fn.merge(self._with(_base(layer)), self.spec))

    def whole(self, layer: Bound) -> dict[str, Tensor]:
        """The canonical factors, lora_B for the alpha that the layer has now."""
        now = {part.name: layer.spec.scaling_of(part) for part in layer.spec.updates}
        ratio = {part.param("lora_B"): self.spec.scaling_of(part) / now[part.name] for part in self.spec.updates}
        factors = {name: factor * ratio.get(name, 1.0) for name, factor in self.factors.items()}
        return gather(factors, self.spec, index=layer.index)

    def _with(self, base: Mapping[str, Tensor]) -> dict[str, Tensor]:
        device = next(iter(base.values())).device
        return {**base, **{name: factor.to(device) for name, factor in self.factors.items()}}


def _base(layer: Bound) -> dict[str, Tensor]:
    mine = layer.params()
    return {name: mine[name].detach() for name in sharding.names(layer.spec.base)}


def _write(layer: Bound, changed: Mapping[str, Tensor]) -> None:
    for name, p in _base(layer).items():
        if name.partition(".")[0] == "weight":
            p.copy_(changed[name])


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute on one thread: decompositions are rounded otherwise on several, and a process alone has more of them than
    one of many."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def loss_of(model: nn.Module, batch: Any) -> Any:
    """The loss that a Hugging Face model says of a batch, if it has labels."""
    out = model(**batch) if isinstance(batch, Mapping) else model(batch)
    return out.get("loss") if isinstance(out, Mapping) else out


def check(spec: LoraSpec, batches: Iterable[Any] | None) -> None:
    """Refuse to start from data that is missing.

    Raises:
        TargetError: As said.
    """
    needs = starts.start_of(spec.init_lora_weights).needs
    if needs in (starts.INPUTS, starts.GRADIENT) and batches is None:
        raise TargetError(
            f"wrap: init_lora_weights {spec.init_lora_weights!r} starts from the {needs} of each layer, which it "
            f"measures on data; give batches."
        )


@torch.no_grad()
def start(
    layer: Bound,
    spec: LoraSpec,
    *,
    path: str,
    adapted: LayerSpec,
    seeds: Mapping[str, int],
    statistics: Mapping[str, Tensor],
    dtype: torch.dtype,
) -> tuple[dict[str, Tensor], Initial | None]:
    """This process's factors of one layer that needs its weight, and what its base is to lack.

    Where the initialisation quantizes the base, that is done here, in place and for good.

    Args:
        layer: The layer, without its adapter.
        spec: What the user asks for.
        path: The layer's name, for messages.
        adapted: The layer, with its adapter.
        seeds: Of each part by name.
        statistics: As in `factorize.factorize`, canonical, on the first process of the axis.
        dtype: Of the factors.

    Raises:
        TargetError: What came out is not finite; told by every process.
    """
    init, how = str(spec.init_lora_weights), starts.start_of(spec.init_lora_weights)
    plain = replace(adapted, variant="lora", trained=None, dropout=0.0)
    weights = {name: p for name, p in _base(layer).items() if name.partition(".")[0] == "weight"}
    device = next(iter(weights.values())).device
    at = torch.device("cpu") if device.type == "xla" else device
    whole = {name: p.to(at) for name, p in gather(weights, plain, index=layer.index).items()}
    found = {n: torch.full(sharding.canonical_shape(plain, n), torch.nan) for n in sharding.adapter_names(plain)}
    quantized = how.base == starts.QUANTIZED
    if quantized:
        found |= {name: torch.full_like(p, torch.nan) for name, p in whole.items()}
    if (plain.axis.index or 0) == 0:
        options = spec.options(f"{init}_config") if f"{init}_config" in lora_fn.spec.OPTIONS else {}
        told = {"init_lora_weights": init, "options": options, "statistics": statistics}
        try:
            with one_thread():
                factors, base = factorize.factorize(whole, plain, seed=seeds, dtype=dtype, **told)  # type: ignore[arg-type]
            found |= factors | (base if quantized else {})
        except torch.linalg.LinAlgError:
            pass  # told by the NaN that the others get
    sent = collectives.broadcast(
        [p.to(device, dtype if n[:5] == "lora_" else p.dtype) for n, p in found.items()], plain.axis, layer.index
    )
    del whole
    found = dict(zip(found, sent, strict=True))
    odd = sorted(name for name, p in found.items() if not torch.isfinite(p).all())
    if odd:
        raise TargetError(
            f"{path}: init_lora_weights {init!r} gives a {odd[0]} that is not finite; is the weight finite, and is the "
            f"data more than a few tokens?"
        )
    local = lora_fn.shard(found, plain, plain.axis.index or 0)
    factors = {name: local.pop(name) for name in sharding.adapter_names(plain)}
    if quantized:
        _write(layer, local)
    is_residual = how.base == starts.RESIDUAL
    return factors, Initial(spec=plain, factors={n: p.clone() for n, p in factors.items()}) if is_residual else None


@torch.no_grad()
def truncation(layer: Bound, adapted: LayerSpec) -> Initial:
    """What the base of a variant lacks, as `Variant.lacks` says: computed by the first process of the axis for all.

    Args:
        layer: The layer, without its adapter.
        adapted: The layer, with its adapter.
    """
    lacks = variants.TABLE[adapted.variant].lacks
    assert lacks is not None
    parts = tuple(replace(part, alpha=float(part.rank or 1)) for part in adapted.parts)
    plain = replace(
        adapted.base, rank=adapted.rank, alpha=float(adapted.rank or 1), parts=parts, use_rslora=False, dropout=0.0
    )
    weights = {name: p for name, p in _base(layer).items() if name.partition(".")[0] == "weight"}
    device = next(iter(weights.values())).device
    whole = {name: p.cpu() for name, p in gather(weights, plain, index=layer.index).items()}
    found = {name: torch.empty(sharding.canonical_shape(plain, name)) for name in sharding.adapter_names(plain)}
    if (plain.axis.index or 0) == 0:
        for part in plain.updates:
            weight = whole["weight" if plain.fuse_qkv else part.param("weight")]
            if plain.parts and plain.fuse_qkv:
                start = sum(other.size for other in plain.parts[: plain.parts.index(part)])
                weight = weight[start : start + part.size]
            with one_thread():
                found[part.param("lora_B")], found[part.param("lora_A")] = (f.float() for f in lacks(weight, part.rank))
    sent = collectives.broadcast([p.to(device).contiguous() for p in found.values()], plain.axis, layer.index)
    local = lora_fn.shard(dict(zip(found, sent, strict=True)), plain, plain.axis.index or 0)
    return Initial(spec=plain, factors=local)


# ----------------------------------------------------------------------------------------------- what data says


def measure(
    model: nn.Module,
    layers: Mapping[str, Bound],
    planned: Mapping[str, LayerSpec],
    spec: LoraSpec,
    batches: Iterable[Any],
    step: Step,
) -> tuple[LoraSpec, dict[str, Callable[[], dict[str, Tensor]]]]:
    """Run a model on data for "eva", "corda" or "lora_ga".

    Args:
        model: With the layers in their places.
        layers: Those to look at, by name, without their adapters.
        planned: The same with their adapters.
        spec: What the user asks for.
        batches, step: As in `bind.wrap`.

    Returns:
        The spec, with the ranks that "eva" found; and for each layer what gives `statistics` of `factorize.factorize`,
        to be called on all processes together, once for each layer, one after the other.

    Raises:
        TargetError: What the data does not suffice for.
    """
    init = spec.init_lora_weights
    if init == "lora_ga":
        count = measure_gradients(model, layers, batches, step)
        return spec, {p: partial(take_gradient, layers[p], adapted, count) for p, adapted in planned.items()}
    if init == "corda":
        found = measure_inputs(model, layers, batches, step, init="corda", label=None)
        return spec, {p: partial(_covariance, found.of(p), adapted) for p, adapted in planned.items()}
    options = spec.options("eva_config")
    label = options["label_mask_value"] if options["use_label_mask"] else None
    found = measure_inputs(model, layers, batches, step, init="eva", label=label)
    ranks = {path: max(part.rank for part in adapted.updates) for path, adapted in planned.items()}
    shares = principal(found, ranks, options["rho"])
    spec = redistributed(spec, planned, found, shares)
    return spec, {path: partial(_components, parts, planned[path], spec) for path, parts in shares.items()}


def _components(parts: Components, adapted: LayerSpec, spec: LoraSpec) -> dict[str, Tensor]:
    whiten = spec.options("eva_config")["whiten"]
    vectors = parts.vectors / parts.values.sqrt()[:, None] if whiten else parts.vectors
    return {part.name: vectors for part in adapted.updates}


def _covariance(sums: Sums, adapted: LayerSpec) -> dict[str, Tensor]:
    second, _ = sums.whole()
    return {part.name: second / sums.count for part in adapted.updates}


def whole_input(layer: Bound, x: Tensor) -> Tensor:
    """A layer's input, out of what this process gets of it: all tokens, all features, in canonical order."""
    spec = layer.spec
    if spec.kind == "row" and spec.input_is_parallel:
        [x] = collectives.gather([x], spec.axis, layer.index, dim=-1)
        return x if spec.heads is None else x.index_select(-1, sharding.input_layout(spec).sources().to(x.device))
    if spec.input == "sharded" and spec.sequence_dim is not None and spec.kind != "row":
        [x] = collectives.gather([x], spec.axis, layer.index, dim=spec.sequence_dim)
    return x


class Sums:
    """Sums over the inputs of one layer (and of all that get the same): of x, and of this process's rows of x x^T.

    Args:
        layer: The layer.
        per_sample: Every sample is divided by its largest element, and counts as one ("corda"); else every token does.
    """

    def __init__(self, layer: Bound, *, per_sample: bool):
        self.layer, self.per_sample, self.count = layer, per_sample, 0
        self.second: Tensor | None = None
        self.total: Tensor | None = None

    @property
    def layout(self) -> Layout:
        """How the rows lie over the axis."""
        return layouts.plain(self.layer.spec.in_features, self.layer.spec.axis.size, pad=True)

    def add(self, samples: list[Tensor]) -> None:
        """Count in the tokens [n, i] of each sample."""
        for x in samples if self.per_sample else [torch.cat(samples)]:
            if not len(x):
                continue
            x = x.double()
            x = x / x.max().abs() if self.per_sample else x
            own = self.layout.to_local(x, self.layer.spec.axis.index or 0, dim=-1)
            second, total = own.mT @ x, x.sum(0)
            self.second = second if self.second is None else self.second + second
            self.total = total if self.total is None else self.total + total
            self.count += 1 if self.per_sample else len(x)

    def whole(self) -> tuple[Tensor, Tensor]:
        """The sum of x x^T [i, i] and of x [i], on every process; fp64."""
        assert self.second is not None and self.total is not None
        [slots] = collectives.gather([self.second], self.layer.spec.axis, self.layer.index, dim=0)
        return slots.index_select(0, self.layout.sources().to(slots.device)), self.total


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Inputs:
    """What `measure_inputs` found.

    Args:
        sums: First layer of those that get the same input -> the sums.
        same: Every other layer -> that first one.
    """

    sums: Mapping[str, Sums]
    same: Mapping[str, str]

    def of(self, path: str) -> Sums:
        """The sums of a layer."""
        return self.sums[self.same.get(path, path)]


@torch.no_grad()
def measure_inputs(
    model: nn.Module, layers: Mapping[str, Bound], batches: Iterable[Any], step: Step, *, init: str, label: int | None
) -> Inputs:
    """Run a model on batches, in evaluation mode, and sum over the inputs of its layers.

    Args:
        model: With the layers in their places.
        layers: Those to look at, by name.
        batches: What `step` takes; the same on every process. Of a mapping with `input_ids` [batch, sequence], tokens
            that its `attention_mask`, of the same shape, leaves out are not counted.
        step: Runs the model on one of them.
        init: "eva" or "corda".
        label: Tokens whose `labels` are this are not counted either; None counts them.

    Raises:
        TargetError: No batches, a layer that the model did not use, or activations whose tokens are not told apart.
    """
    sums, same = {path: Sums(layer, per_sample=init == "corda") for path, layer in layers.items()}, dict[str, str]()
    seen: list[tuple[str, Any]] = []
    used: dict[str, None] = {}
    mask: Tensor | None = None

    def look(path: str, module: Any, args: tuple[Any, ...], output: Any) -> None:
        x = args[0]
        used[path] = None
        first = next((other for other, alive in seen if alive() is x), None)
        if first is not None:
            same.setdefault(path, first)
            return
        seen.append((path, weakref.ref(x)))
        same.pop(path, None)
        sums[path].add(_samples(path, module.spec, whole_input(module, x.detach()), mask))

    def hook(path: str) -> Any:
        return lambda module, args, output: look(path, module, args, output)

    handles, was_training = [layer.register_forward_hook(hook(path)) for path, layer in layers.items()], model.training
    model.eval()
    try:
        for batch in batches:
            mask = _mask(batch, label)
            seen.clear()
            step(model, batch)
    finally:
        model.train(was_training)
        for handle in handles:
            handle.remove()
    _all_used(used, layers)
    for path in set(layers) - set(same):
        if sums[path].second is None:
            raise TargetError(f"{path}: got no token that counts from the batches; give some that are not masked.")
    return Inputs(sums={path: own for path, own in sums.items() if path not in same}, same=same)


def _all_used(used: Iterable[str], layers: Mapping[str, Bound]) -> None:
    problems = Problems(TargetError)
    for path in sorted(set(layers) - set(used)):
        problems.add(path, "was not used by the model on the batches; give some, or leave it out of the targets.")
    problems.raise_if_any()


def _mask(batch: Any, label: int | None) -> Tensor | None:
    """Which tokens of a batch count, bool [batch, sequence]; None for all of them."""
    if not isinstance(batch, Mapping):
        return None
    masks = [batch["attention_mask"].bool()] if batch.get("attention_mask") is not None else []
    if label is not None and batch.get("labels") is not None:
        masks.append(batch["labels"] != label)
    if masks:
        return masks[0] if len(masks) == 1 else masks[0] & masks[1]
    ids = batch.get("input_ids")
    return None if ids is None else torch.ones(ids.shape, dtype=torch.bool, device=ids.device)


def _samples(path: str, spec: LayerSpec, x: Tensor, mask: Tensor | None) -> list[Tensor]:
    """The tokens of each sample that count: [n, i] each."""
    if mask is None:
        return [x.reshape(-1, x.shape[-1])] if x.dim() < 3 else [row.reshape(-1, x.shape[-1]) for row in x]
    if spec.sequence_dim == 0:
        x = x.transpose(0, 1)
    missing = x.shape[1] - mask.shape[1] if x.dim() == 3 and x.shape[0] == mask.shape[0] else -1
    if missing < 0:
        raise TargetError(
            f"{path}: gets {list(x.shape)} for tokens {list(mask.shape)}, so that it is not known which token is "
            f"which; give batches of tensors instead of mappings, whose tokens all count."
        )
    mask = torch.nn.functional.pad(mask, (0, missing)).to(x.device)
    return [row[keep] for row, keep in zip(x, mask, strict=True)]


def measure_gradients(model: nn.Module, layers: Mapping[str, Bound], batches: Iterable[Any], step: Step) -> int:
    """Let the weights of layers have the sum, over batches, of the gradient of a loss, in training mode.

    Args:
        model: With the layers in their places, nothing in it trained.
        layers: Those to look at, by name.
        batches: What `step` takes; the same on every process.
        step: (model, batch) -> its loss.

    Returns:
        How many batches there were.

    Raises:
        TargetError: No batches, or a layer that the model did not use.
    """
    weights = {path: _weights(layer) for path, layer in layers.items()}
    was_training, count = model.training, 0
    for p in (p for of in weights.values() for p in of.values()):
        p.requires_grad_(True)
    model.train()
    try:
        for batch in batches:
            step(model, batch).backward()  # type: ignore[no-untyped-call]
            count += 1
    finally:
        model.train(was_training)
        for p in (p for of in weights.values() for p in of.values()):
            p.requires_grad_(False)
    _all_used([path for path, of in weights.items() if all(p.grad is not None for p in of.values())], layers)
    return count


def _weights(layer: Bound) -> dict[str, Tensor]:
    return {name: p for name, p in layer.params().items() if name.partition(".")[0] == "weight"}


def take_gradient(layer: Bound, adapted: LayerSpec, count: int) -> dict[str, Tensor]:
    """The mean gradient of a layer's weight, by part, canonical; that of the parameters is dropped."""
    mine = _weights(layer)
    grads = {name: p.grad / count for name, p in mine.items() if p.grad is not None}
    for p in mine.values():
        p.grad = None
    whole = gather(grads, adapted, index=layer.index)
    oriented = {n: g.mT if adapted.fan_in_fan_out else g for n, g in whole.items()}
    return {part.name: factorize.rows(oriented, adapted, part) for part in adapted.updates}


# ------------------------------------------------------------------------------------------------------------ EVA


def principal(found: Inputs, ranks: Mapping[str, int], rho: float) -> dict[str, Components]:
    """The principal components of the inputs of layers, as many as the largest of them may take; the same bits on
    every process of the axis.

    Args:
        found: The sums; those of a layer are dropped when its components are there.
        ranks: Layer -> the largest rank of its parts by the spec.
        rho: How many times its rank a layer may get.

    Raises:
        TargetError: Fewer features, or tokens, than components.
    """
    most = {path: max(round(ranks[p] * rho) for p in ranks if found.same.get(p, p) == path) for path in found.sums}
    problems = Problems(TargetError)
    for path, num in most.items():
        sums = found.sums[path]
        if num > min(sums.layer.spec.in_features, sums.count):
            problems.add(
                path,
                f"may get rank {num} (rho {rho} times its own), but has {sums.layer.spec.in_features} features, of "
                f"which {sums.count} tokens were seen; choose a smaller rank or rho, or give more batches.",
            )
    problems.raise_if_any()
    made: dict[str, Components] = {}
    for path, num in most.items():
        sums = found.sums[path]
        second, total = sums.whole()
        sums.second = None
        size, is_first = second.shape[0], (sums.layer.spec.axis.index or 0) == 0
        parts = Components(second.new_zeros(num, size), second.new_zeros(num), second.new_zeros(num))
        if is_first:
            with one_thread():
                own = factorize.components(second.cpu(), total.cpu(), sums.count, num)
            parts = Components(*(getattr(own, f.name).to(second.device) for f in fields(own)))
        each = [getattr(parts, f.name) for f in fields(parts)]
        made[path] = Components(*collectives.broadcast(each, sums.layer.spec.axis, sums.layer.index))
    return {path: made[found.same.get(path, path)] for path in ranks}


def redistributed(
    spec: LoraSpec, planned: Mapping[str, LayerSpec], found: Inputs, shares: Mapping[str, Components]
) -> LoraSpec:
    """The spec with the ranks that EVA gives its layers; those of rank 0 are no targets any more."""
    names = {name: path for path, layer in planned.items() for name in peft_format.adapted_paths(path, layer).values()}
    ranks, alphas = {}, {}
    for path, layer in planned.items():
        for part in layer.updates:
            name = peft_format.part_path(path, part.name)
            ranks[name], alphas[name] = part.rank, part.alpha
    leaders: dict[str, str] = {}
    firsts = {name: leaders.setdefault(found.same.get(path, path), name) for name, path in names.items()}
    same = {name: first for name, first in firsts.items() if name != first}
    offered = {name: shares[path].shares for name, path in names.items()}
    given = {name: rank for name, rank in factorize.redistribute(offered, ranks, same).items() if rank}
    if spec.options("eva_config")["adjust_scaling_factors"]:
        alphas |= {name: alphas[name] * rank / ranks[name] for name, rank in given.items()}
    return replace(
        spec,
        target_modules=tuple(given),
        exclude_modules=(),
        layers_to_transform=None,
        layers_pattern=None,
        rank_pattern=tuple((name, rank) for name, rank in given.items() if rank != spec.rank),
        alpha_pattern=tuple((name, alphas[name]) for name in given if alphas[name] != spec.alpha),
    )
