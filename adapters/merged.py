"""What are a model's weights with its adapter in them? In memory; file to file is `adapters.merge`."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

import lora_fn
from adapters import nxd
from adapters.bound import BoundLayer, LoraLayer
from adapters.many import RowsLayer
from adapters.parallel import ParallelLayer, attribute
from adapters.raw import RawLayer
from adapters.stack import stacked
from lora_fn import LayerSpec, SpecError, TargetError, collectives, peft_format, sharding
from lora_fn.errors import Problems
from lora_fn.reshard import gather


def merged_weights(model: nn.Module, *, to: str = "all") -> Iterator[tuple[str, Tensor | None]]:
    """The weights of the stock Hugging Face model, the adapter in them, one after the other; the model stays as it is.

    For whoever serves the model elsewhere while it trains: each name and tensor is what the stock model has. Fused
    layers come in their parts, heads in their own order, without copies and without padding; of tied weights the first.

    Every process of the axis calls it and goes through it to the end, because each tensor is gathered when it is its
    turn. Only that one is whole in memory, beside this process's merged part of its layer.

    Args:
        model: From `wrap` or `adapters.peft`, on this process's mesh, all of it (no pipeline stage).
        to: "all": every process gets the tensors. "first": the first process of the axis does, the others get None.

    Yields:
        The name, and the tensor in the base's dtype, on the device of the model.

    Raises:
        SpecError: Another `to`; an adapter that cannot be merged.
        TargetError: A layer that stock models have no weights of that form for.
    """
    if to not in ("all", "first"):
        raise SpecError(f"merged_weights: to is {to!r}, expected 'all' or 'first'.")
    seen: set[int] = set()
    modules = _checked(model)
    axes = [m.spec.axis for m in modules.values() if isinstance(m, (BoundLayer, ParallelLayer))]
    wanted = to == "all" or not any(axis.index for axis in axes)
    for path, module in modules.items():
        if not isinstance(module, (BoundLayer, ParallelLayer)):
            for name, p in module._parameters.items():
                if p is not None and id(p) not in seen:
                    seen.add(id(p))
                    yield f"{path}.{name}".removeprefix("."), p.detach().clone() if wanted else None
            continue
        spec = module.spec
        tied = {n for n in sharding.names(spec.base) if id(module.get_parameter(attribute(spec, n))) in seen}
        tied |= set(module.followed()) if isinstance(module, BoundLayer) else set()
        seen |= {id(p) for p in module.parameters()}
        local = merged([module]) if isinstance(module, LoraLayer) else _own(module)
        index = module.get_buffer("index") if "index" in module._buffers else None
        for name in [n for n in local if n not in tied]:
            for part, whole in _whole(local.pop(name), spec, name, index):
                yield f"{peft_format.part_path(path, part)}.{name.partition('.')[0]}", whole if wanted else None
                del whole


def _checked(model: nn.Module) -> dict[str, nn.Module]:
    """The modules of a model by their names in the stock one, all of which we can make whole."""
    problems = Problems(TargetError)
    if stacked(model):
        problems.add("merged_weights", "layers are repeated, and each has one weight; keep the adapter unmerged.")
    found = {path.removeprefix(peft_format.PREFIX): module for path, module in model.named_modules()}
    for path, module in found.items():
        if nxd.class_name(module) in nxd.CLASSES:
            problems.add(path, "is neuronx-distributed's own, which is not known to be whole; wrap the model first.")
        elif isinstance(module, RowsLayer):
            problems.add(path, "holds several adapters; have one on the model alone.")
        elif isinstance(module, RawLayer):
            problems.add(path, "is the adapter of a raw parameter, which is not merged in memory yet; leave it out.")
        elif isinstance(module, (BoundLayer, ParallelLayer)) and module.spec.quantization is not None:
            problems.add(path, "is quantised, so its weight is not the stock model's; merge files with lora-fn merge.")
        elif isinstance(module, BoundLayer) and module.spec.kind == "experts":
            problems.add(path, "stock models have no weights of this form; merge files with lora-fn merge.")
    problems.raise_if_any()
    return found


def _own(module: BoundLayer | ParallelLayer) -> dict[str, Tensor]:
    """A layer's own local tensors, by their names in the rules table."""
    if isinstance(module, BoundLayer) and sharding.TOKENS in module.trained():
        return module.instead()
    names = sharding.names(module.spec.base)
    return {name: module.get_parameter(attribute(module.spec, name)).detach() for name in names}


def _whole(local: Tensor, spec: LayerSpec, name: str, index: Tensor | None) -> Iterator[tuple[str, Tensor]]:
    """The canonical tensors of one parameter: part by part, where it holds several."""
    base, _, part = name.partition(".")
    if not spec.parts or part:
        yield part, gather({name: local}, spec.base, index=index)[name]
        return
    layout = sharding.layout(spec.base, base)
    assert layout is not None
    for of, rows in zip(spec.parts, local.split(list(layout.local_sizes.values())), strict=True):
        key = f"{base}.{of.name}"  # the part's rows lie as its own weight would
        yield of.name, gather({key: rows.contiguous()}, spec.base, index=index)[key]


def merged(layers: Sequence[LoraLayer], *, whole: bool = False) -> dict[str, Tensor]:
    """A base layer's local tensors with adapters in them, computed in fp32 (or more) and rounded once.

    Args:
        layers: Adapted layers of one base layer, whose updates add up.
        whole: The base's weights are those without any of the adapters; else they are what one adapter works over,
            which is another where it began with a part of them ("pissa", "olora").

    Returns:
        New tensors, by their names in the rules table, in the base's dtypes.

    Raises:
        SpecError: As `lora_fn.merge`.
    """
    base = _own(layers[0])
    dtypes = (p.dtype for layer in layers for p in layer.params().values())
    wide = functools.reduce(torch.promote_types, dtypes, torch.float32)
    found = {name: t.to(wide) for name, t in base.items()}
    for layer in layers:
        own = {name: p.detach() for name, p in layer.params().items() if name not in base}
        found |= layer.initial.residual(found) if whole and layer.initial is not None else {}
        found = lora_fn.merge({**found, **own}, layer.spec, index=layer.index)
    return {name: t.to(base[name].dtype) for name, t in found.items()}


def check_finite(tensors: Sequence[Tensor], layers: Sequence[BoundLayer], what: str) -> None:
    """Refuse merged tensors that are not finite on any process of the axis; every process finds the same.

    Raises:
        TargetError: They are.
    """
    widest = max(layers, key=lambda layer: layer.spec.axis.size)
    bad = torch.stack([t.isfinite().all() for t in tensors]).all().logical_not().float().view(1)
    if collectives.maximum(bad, widest.spec.axis, widest.index).item():
        raise TargetError(f"{what}: its merged weights are not finite, so it is damaged; load another one.")
