"""How does an adapter get to disk and back? One PEFT directory, whatever the number of processes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from adapters import bind
from lora_fn import (
    FileError,
    LoraSpec,
    TargetError,
    checkpoint,
    collectives,
    factorize,
    peft_format,
    sharding,
    starts,
    targets,
    variants,
)
from lora_fn.layer_spec import LayerSpec
from lora_fn.reshard import cut_dim, differing, gather
from lora_fn.spec import OPTIONS


def save(model: nn.Module, directory: str | Path, *, as_lora: bool = False) -> None:
    """Write the adapter of a wrapped model as a PEFT directory, which stock PEFT loads.

    Every process calls it. What is trained is gathered one layer at a time; the first process writes.

    Args:
        model: From `wrap`.
        directory: Made where it is missing.
        as_lora: As an adapter of the unchanged base, whatever it began with. One over a residual base ("pissa",
            "olora", "corda", "lora_ga") then gets twice the rank: what it adds beyond what it began with. Otherwise
            such an adapter fits that base only, which stock PEFT can make again for "pissa" and "olora".

    Raises:
        TargetError: With as_lora, of a base that is quantized ("loftq") or truncated (KaSA); over a residual base, a
            variant, or rsLoRA together with a rank_pattern or an alpha_pattern, as in PEFT.
        FileError: A factor that is not finite, replicas that differ (deferred gradients that were never synced), or (on
            the first process) a place that cannot be written.
    """
    is_first = not dist.is_initialized() or dist.get_rank() == 0
    config_of, state = config(model, as_lora=as_lora), dict[str, Tensor]()
    for named in _each(model, str(directory), as_lora=as_lora):
        state |= named if is_first else {}
    try:
        if is_first:
            checkpoint.save_adapter(Path(directory), config_of, state)
    finally:
        collectives.barrier()


def canonical(model: nn.Module, where: str, *, as_lora: bool = False) -> dict[str, Tensor]:
    """The canonical factors of a wrapped model under PEFT's names, on every process; all of them call it.

    Args:
        model: From `wrap`.
        where: For messages: where they go.
        as_lora: As in `save`.

    Raises:
        FileError: As `save`.
    """
    return {name: t for named in _each(model, where, as_lora=as_lora) for name, t in named.items()}


def _each(model: nn.Module, where: str, *, as_lora: bool) -> Iterator[dict[str, Tensor]]:
    """`canonical`, one layer at a time."""
    layers = bind.layers(model)
    specs = {path: layer.spec for path, layer in layers.items()}
    for path, layer in layers.items():
        local = layer.stored()
        # First all that processes do together, then the errors: what one of them finds, the others find too.
        drifted = differing(local, layer.spec, index=layer.index)
        whole = gather(local, layer.spec, index=layer.index)
        if as_lora and layer.initial is not None:
            began = layer.initial.whole(layer)  # beside the factors, a bias may be trained: it stays
            whole |= factorize.as_lora({name: whole[name] for name in began}, began)
        named = peft_format.to_state_dict({path: whole}, specs)
        checkpoint.check_finite(Path(where), named)
        if drifted:
            raise FileError(
                f"{path}: the copies of {drifted} differ between processes; "
                f"call lora_fn.sync_gradients before each optimizer step, or wrap with gradients='summed'."
            )
        yield {k: t.cpu() for k, t in named.items()}


def config(model: nn.Module, *, as_lora: bool = False) -> dict[str, Any]:
    """The adapter_config.json of a wrapped model, as `save` writes it. Args and errors as there."""
    specs, spec = bind.specs(model), bind.lora_spec(model)
    spec = plain(spec) if as_lora else spec
    of_modules = {path: spec for path, spec in specs.items() if not spec.raw}
    adapted = [name for path, spec in of_modules.items() for name in peft_format.adapted_paths(path, spec).values()]
    transposed = any(spec.fan_in_fan_out for spec in of_modules.values())
    return peft_format.to_config(spec, adapted, [*bind.sites(model)], fan_in_fan_out=transposed)


def plain(spec: LoraSpec) -> LoraSpec:
    """The spec of what `save(as_lora=True)` writes: with nothing left to do to the base.

    Raises:
        TargetError: As `save`.
    """
    init = str(spec.init_lora_weights)
    base = starts.start_of(spec.init_lora_weights).base
    if base == starts.QUANTIZED:
        raise TargetError(
            f"save: the base of an adapter that began with {init!r} is quantized, and no LoRA over the unchanged base "
            f"is the same; leave as_lora out."
        )
    if variants.TABLE[spec.variant].lacks is not None:
        raise TargetError(
            f"save: the base of an adapter with {spec.variant} is truncated, and no LoRA over the unchanged base is "
            f"the same; leave as_lora out."
        )
    spec = replace(
        spec, init_lora_weights=True, loftq_config=None, eva_config=None, corda_config=None, lora_ga_config=None
    )
    if base == starts.KEPT:
        return spec
    if spec.use_rslora and (spec.rank_pattern or spec.alpha_pattern):
        raise TargetError(
            "save: as_lora doubles the rank, after which one alpha with use_rslora does not fit what has a "
            "rank_pattern or an alpha_pattern, as in PEFT; leave as_lora out."
        )
    if spec.variant != "lora":
        raise TargetError(
            f"save: what an adapter with {spec.variant} adds to a residual base is no difference of two products; "
            f"leave as_lora out."
        )
    growth = math.sqrt(2) if spec.use_rslora else 2
    return replace(
        spec,
        rank=2 * spec.rank,
        alpha=spec.alpha * growth,
        rank_pattern=tuple((name, 2 * rank) for name, rank in spec.rank_pattern),
        alpha_pattern=tuple((name, alpha * growth) for name, alpha in spec.alpha_pattern),
    )


def load(model: nn.Module, directory: str | Path) -> None:
    """Read the factors of a PEFT directory into a wrapped model; every process keeps its own parts only.

    Args:
        model: From `wrap`, with the adapter's own targets and ranks (see `read_spec`). It takes on the adapter's alpha
            and use_rslora, of which nothing is compiled again.
        directory: Written by `save` or by stock PEFT.

    Raises:
        FileError: A damaged or missing file, missing or unexpected tensors, other shapes, or (on the processes that
            read it) a number that is not finite. Nothing is changed then.
        SpecError: A config that we cannot follow.
    """
    theirs, files = checkpoint.open_adapter(Path(directory))
    spec, layers = peft_format.from_config(theirs), bind.layers(model)
    mine = bind.lora_spec(model)
    if _base_of(spec) != _base_of(mine):
        raise FileError(
            f"{directory}: was made with init_lora_weights {spec.init_lora_weights!r}, the model has "
            f"{mine.init_lora_weights!r}, whose base is another; wrap with read_spec."
        )
    _check_tokens(spec, mine, layers, directory)
    specs = {path: layer.spec for path, layer in layers.items()}
    peft_format.check_layout(theirs, specs, str(directory))
    peft_format.check_state_dict(files.shapes, specs, str(Path(directory) / checkpoint.WEIGHTS))
    for path, layer in layers.items():
        names = peft_format.adapted_paths(path, layer.spec)
        for update in layer.spec.updates:
            rank = targets.rank_of(names[update.name], spec)
            if update.rank != rank:
                raise FileError(
                    f"{directory}: {names[update.name]} was made with rank {rank}, the model has {update.rank}; "
                    f"wrap with read_spec."
                )
    for key, path in peft_format.base_weight_names(specs).items():
        if key in files.shapes and layers[path].initial is None:  # a residual is the same to rounding only
            weight = layers[path].get_parameter("weight")
            theirs_here = read_part(files.view, {"": key}, specs[path], "weight").to(weight.device, weight.dtype)
            if not torch.equal(theirs_here, weight):
                raise FileError(f"{directory}: {key!r} is not this model's weight; use the model it was made for.")
    parts: dict[nn.Parameter, Tensor] = {}
    for path, layer in layers.items():
        followed = layer.followed()
        for key, name in peft_format.tensor_names(path, layer.spec).items():
            read = read_part(files.view, {name.partition(".")[2]: key}, layer.spec, name)
            if not checkpoint.is_finite(read):
                raise FileError(f"{directory}: tensor {key!r} is not finite; use a whole adapter.")
            p, turned = followed.get(name) or (layer.parameter(name), False)
            read = read.T if turned else read
            if parts.setdefault(p, read) is not read and not torch.equal(parts[p], read):
                raise FileError(
                    f"{directory}: tensor {key!r} differs from that of what shares it; wrap without share_A, and "
                    f"without ensure_weight_tying."
                )
    bind.rescale(model, spec)
    with torch.no_grad():
        for p, part in parts.items():
            p.copy_(part)


def _check_tokens(spec: LoraSpec, ours: LoraSpec, layers: Mapping[str, Any], directory: str | Path) -> None:
    """Refuse an adapter for other tokens than the model's, of which no tensor tells."""
    found = {"alora_invocation_tokens": (spec.alora_invocation_tokens, ours.alora_invocation_tokens)}
    for path, layer in layers.items():
        if layer.spec.tokens and not layer.followed():
            found[f"trainable_token_indices of {path}"] = peft_format.ids_of(path, spec), layer.spec.tokens
    for what, (made, mine) in found.items():
        if made != mine:
            raise FileError(f"{directory}: was made with {what} {made}, the model has {mine}; wrap with read_spec.")


def _base_of(spec: LoraSpec) -> Any:
    """What an adapter does to its base: equal of two adapters that fit the same one."""
    init = spec.init_lora_weights
    if starts.start_of(init).base == starts.KEPT:
        return None
    return init, spec.options(f"{init}_config") if f"{init}_config" in OPTIONS else None


def read_spec(directory: str | Path) -> LoraSpec:
    """The spec of a PEFT directory, to wrap a model with before `load`.

    An adapter that began with "eva" needs no data any more: its init_lora_weights is then True.

    Raises:
        FileError: No such directory, or a damaged file.
        SpecError: A config that we cannot follow.
    """
    spec = peft_format.from_config(checkpoint.open_adapter(Path(directory))[0])
    return plain(spec) if spec.init_lora_weights == "eva" else spec


def read_adapted(directory: str | Path) -> LoraSpec:
    """As `read_spec`, of an adapter whose base is there, or is made again from the model alone.

    Raises:
        FileError, SpecError: As `read_spec`.
        TargetError: Its base is one that data has changed.
    """
    spec = read_spec(directory)
    if starts.start_of(spec.init_lora_weights).needs in (starts.INPUTS, starts.GRADIENT):
        raise TargetError(
            f"{directory}: began with {spec.init_lora_weights!r}, so its base is one that other data changed; save "
            f"it with as_lora, and go on from that."
        )
    return spec


def read_part(read: Callable[..., Tensor], keys: Mapping[str, str], spec: LayerSpec, name: str) -> Tensor:
    """This process's part of a canonical tensor on disk, zeros where the spec pads; only that part is read.

    Args:
        read: `read` or `view` of open files.
        keys: Part of the layer -> name of its tensor in them; "" for that of a layer that is not fused.
        spec: The layer; its axis has an index.
        name: Of the parameter.

    Returns:
        A tensor of `sharding.local_shape`, in the file's dtype.
    """
    layout = sharding.layout(spec, name)
    if layout is None:
        [key] = set(keys.values())
        return peft_format.from_stored(read(key), spec, name)
    dim = peft_format.stored_dim(spec, name, cut_dim(spec, name))
    pieces = layout.pieces(spec.axis.index or 0)
    parts = [read(keys[p.part], dim=dim, start=p.start, stop=p.stop) for p in pieces]
    shape = peft_format.stored_shape(spec, name, sharding.local_shape(spec, name))
    if len(parts) == 1 and tuple(parts[0].shape) == shape:
        return peft_format.from_stored(parts[0], spec, name)
    some = parts[0] if parts else read(next(iter(keys.values())), dim=dim, start=0, stop=0)
    local = some.new_zeros(shape)
    for piece, part in zip(pieces, parts, strict=True):
        local.narrow(dim, piece.at, piece.stop - piece.start).copy_(part)
    return peft_format.from_stored(local, spec, name)
