"""How many parameters does a model have, and what is on which layer? Numbers are of the whole model, not of a shard.

Source: PEFT 0.21, `peft_model.py` (`get_layer_status`, `get_model_status`, `get_nb_trainable_parameters`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from adapters.bound import BoundLayer
from adapters.many import MixedLayer
from adapters.parallel import ParallelLayer, attribute
from adapters.peft_layers import NeuronLoraLayer
from adapters.peft_tuner import NeuronLoraModel
from adapters.raw import RawLayer
from lora_fn import LayerSpec, TargetError, peft_format, sharding

# Kind -> what PEFT calls its layer of it.
MODULE_TYPES: Mapping[str, str] = {
    "embedding": "lora.Embedding",
    "conv2d": "lora.Conv2d",
    "experts": "lora.ParamWrapper",
}


@dataclass
class TunerLayerStatus:
    """One adapted layer, under its name in the stock model; the fields are PEFT's."""

    name: str
    module_type: str
    enabled: bool
    active_adapters: list[str]
    merged_adapters: list[str]
    requires_grad: dict[str, Any]
    available_adapters: list[str]
    devices: dict[str, list[str]]
    quantization_backend: str | None


@dataclass
class TunerModelStatus:
    """A model and its adapters; the fields are PEFT's."""

    base_model_type: str
    adapter_model_type: str
    peft_types: dict[str, str]
    trainable_params: int
    total_params: int
    num_adapter_layers: int
    enabled: Any
    active_adapters: Any
    merged_adapters: Any
    requires_grad: dict[str, Any]
    available_adapters: list[str]
    devices: dict[str, list[str]]
    quantization_backend: str | None


def layer_status(tuner: NeuronLoraModel) -> list[TunerLayerStatus]:
    """The status of every adapted layer, in the model's order; each part of a fused layer is one.

    Raises:
        TargetError: There is none.
    """
    held: dict[str, dict[str, tuple[NeuronLoraLayer, str]]] = {}
    for adapter in tuner.peft_config:
        for path, layer in tuner.layers(adapter).items():
            for part, name in peft_format.adapted_paths(path, layer.spec).items():
                held.setdefault(name, {})[adapter] = (layer, part)
    if not held:
        raise TargetError("get_layer_status: the model has no adapter; add one.")
    order = {name: i for i, name in enumerate(_part_names(tuner.model))}
    return [_status(tuner, name, held[name]) for name in sorted(held, key=lambda name: order.get(name, len(order)))]


def _part_names(model: nn.Module) -> Iterator[str]:
    for path, module in model.named_modules():
        spec = module.spec if isinstance(module, (BoundLayer, ParallelLayer)) else None
        yield from [peft_format.part_path(path, p.name) for p in spec.parts] if spec and spec.parts else [path]


def _status(tuner: NeuronLoraModel, name: str, of: Mapping[str, tuple[NeuronLoraLayer, str]]) -> TunerLayerStatus:
    factors = {adapter: _factors(layer, part) for adapter, (layer, part) in of.items()}
    [kind] = {layer.spec.kind for layer, _ in of.values()}
    return TunerLayerStatus(
        name=f"model.{name}",
        module_type=MODULE_TYPES.get(kind, "lora.Linear"),
        enabled=tuner.enabled,
        active_adapters=tuner.active_adapters,
        merged_adapters=[adapter for adapter in tuner.merged_adapters if adapter in of],
        requires_grad={adapter: _regular(p.requires_grad for p in of_it) for adapter, of_it in factors.items()},
        available_adapters=sorted(of),
        devices={adapter: sorted({p.device.type for p in of_it}) for adapter, of_it in factors.items()},
        quantization_backend=None,
    )


def _factors(layer: NeuronLoraLayer, part: str) -> list[nn.Parameter]:
    names = sharding.adapter_names(layer.spec)
    return [layer.get_parameter(name) for name in names if name.partition(".")[2] in ("", part)]


def _regular(values: Iterable[Any]) -> Any:
    """The one value, or "irregular" where there are several."""
    found = set(values)
    return found.pop() if len(found) == 1 else "irregular"


def model_status(tuner: NeuronLoraModel) -> TunerModelStatus:
    """The status of the model.

    Raises:
        TargetError: It has no adapter.
    """
    layers = layer_status(tuner)
    num_trainable, num = num_parameters(tuner)
    adapters = list(tuner.peft_config)
    merged = {name for layer in layers for name in layer.merged_adapters}
    unmerged = {name for layer in layers for name in set(layer.available_adapters) - set(layer.merged_adapters)}
    return TunerModelStatus(
        base_model_type=type(tuner.model).__name__,
        adapter_model_type=type(tuner).__name__,
        peft_types=dict.fromkeys(adapters, "LORA"),
        trainable_params=num_trainable,
        total_params=num,
        num_adapter_layers=len(layers),
        enabled=tuner.enabled,
        active_adapters=tuner.active_adapters,
        merged_adapters="irregular" if merged & unmerged else sorted(merged),
        requires_grad={
            name: _regular(layer.requires_grad[name] for layer in layers if name in layer.requires_grad)
            for name in adapters
        },
        available_adapters=sorted(adapters),
        devices={name: sorted({d for layer in layers for d in layer.devices.get(name, ())}) for name in adapters},
        quantization_backend=None,
    )


def num_parameters(tuner: NeuronLoraModel) -> tuple[int, int]:
    """How many parameters are trained, and how many there are, those of adapters that are not active included.

    Of the whole model: each tensor counts as it is on disk, not as this process's part of it, without padding, and
    without the copies of key-value heads.
    """
    sizes: dict[nn.Parameter, int] = {}
    others = (m for a in tuner.adapters.values() for m in (*a.modules.values(), *a.raw.values()))
    modules = [*tuner.model.modules(), *others]
    for module in modules:
        if isinstance(module, (BoundLayer, ParallelLayer)):
            sizes |= {p: math.prod(sharding.canonical_shape(spec, name)) for p, spec, name in _held(module)}
        elif isinstance(module, RawLayer):
            own = sharding.adapter_names(module.spec)
            sizes |= {module.get_parameter(n): math.prod(sharding.canonical_shape(module.spec, n)) for n in own}
    for module in modules:
        for p in module._parameters.values():
            if p is not None:
                sizes.setdefault(p, p.numel())
    return sum(size for p, size in sizes.items() if p.requires_grad), sum(sizes.values())


def _held(module: BoundLayer | ParallelLayer) -> Iterator[tuple[nn.Parameter, LayerSpec, str]]:
    elsewhere = module.followed() if isinstance(module, BoundLayer) else {}
    for name in sharding.names(module.spec.base if isinstance(module, MixedLayer) else module.spec):
        if name in elsewhere:  # the layer that holds it counts it
            continue
        yield module.get_parameter(attribute(module.spec, name)), module.spec, name
