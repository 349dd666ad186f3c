"""Which weights of a model are quantised? `quantize`: its linear layers, in place, one at a time, frozen for good.

An embedding, a norm, a bias and the head stay as they are, as with bitsandbytes; so do experts that lie in one raw
parameter, and transformers' Conv1D. What is quantised is adapted by `wrap` like any other layer.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from adapters import kinds, nxd
from adapters.parallel import ParallelLayer, attribute
from adapters.stack import HOOKS
from lora_fn import LayerSpec, LoraFnError, Quantization, Shard, SpecError, TargetError, collectives, sharding
from lora_fn import quantize as few_bits
from lora_fn.errors import Problems

LEFT_OUT = ("lm_head",)  # as bitsandbytes leaves it
CLASSES = (
    "torch.nn.modules.linear.Linear",
    "adapters.parallel.ColumnParallelLinear",
    "adapters.parallel.GQAQKVColumnParallelLinear",
    "adapters.parallel.RowParallelLinear",
)


class QuantizedLinear(ParallelLayer):
    """An nn.Linear whose weight is quantised, whole on every process.

    Args:
        base: The layer, whose bias it takes over; its weight comes from `hold`.
        spec: The layer's.
    """

    def __init__(self, base: nn.Linear, spec: LayerSpec):
        super().__init__(spec, device="meta")
        for name in ("weight", "bias"):
            self.register_parameter(name, base._parameters[name])
        self._buffers["index"] = torch.tensor([0], device=base.weight.device)
        self.in_features, self.out_features = base.in_features, base.out_features
        self.train(base.training)


def quantize(model: nn.Module, how: str | Quantization, *, leave_out: Collection[str] = LEFT_OUT) -> nn.Module:
    """Hold the weights of a model's linear layers in few bits, in place: nn.Linear, and our own parallel ones.

    The same canonical weight becomes the same values at every size of the axis, whose processes all call this.

    Args:
        model: In memory, not wrapped yet.
        how: "nf4", "int8", "fp8", or a Quantization.
        leave_out: Ends of names of layers that stay as they are.

    Returns:
        The model; an nn.Linear in it has become a `QuantizedLinear`.

    Raises:
        TargetError, SpecError: Nothing to quantise, a layer that cannot be, or is already; all of them at once.
            Nothing is changed then.
    """
    planned = plan(model, how, leave_out=leave_out)
    modules = dict(model.named_modules())
    for path, spec in planned.items():
        module = modules[path]
        if isinstance(module, nn.Linear):
            before, module = module, QuantizedLinear(module, replace(spec, quantization=None))
            for hooks in HOOKS:
                setattr(module, hooks, getattr(before, hooks))
            for parent in list(model.modules()):
                for name in [name for name, child in parent._modules.items() if child is before]:
                    setattr(parent, name, module)
        assert isinstance(module, ParallelLayer)
        weights = {n: module.get_parameter(attribute(spec, n)).detach() for n in _weights(spec)}
        hold(module, spec, quantized(weights, spec, most=_most(weights, spec, module.get_buffer("index"))))
    return model


def plan(model: nn.Module, how: str | Quantization, *, leave_out: Collection[str] = LEFT_OUT) -> dict[str, LayerSpec]:
    """What `quantize` would: {name: LayerSpec}. The model may be on the meta device.

    Raises:
        TargetError, SpecError: As `quantize`.
    """
    how = Quantization(code=how) if isinstance(how, str) else how
    if "adapter" in vars(model):
        raise TargetError("quantize: the model is adapted already; quantise it first.")
    planned, problems, holders = dict[str, LayerSpec](), Problems(SpecError), dict[int, list[str]]()
    for path, module in model.named_modules():
        for p in module._parameters.values():
            holders.setdefault(id(p), []).append(path)
    for path, module in model.named_modules():
        if isinstance(module, ParallelLayer) and module.spec.quantization is not None:
            problems.add(path, f"is held as {module.spec.quantization.code} already; load the model anew.")
        if nxd.class_name(module) not in CLASSES or any(f".{path}".endswith(f".{end}") for end in leave_out):
            continue
        sharing = [other for p in module._parameters.values() if p is not None for other in holders[id(p)]]
        if set(sharing) > {path}:
            problems.add(path, f"shares a parameter with {sorted({*sharing} - {path})}; leave it out (leave_out).")
        try:
            planned[path] = replace(kinds.SPEC_OF[nxd.class_name(module)](module), quantization=how)
        except LoraFnError as error:
            for line in str(error).splitlines():
                problems.add(path, line)
    problems.raise_if_any()
    if not planned:
        raise TargetError("quantize: the model has no linear layer that could be; see adapters.quantized.CLASSES.")
    if "" in planned:
        raise TargetError("quantize: the model is a layer itself; put it in a module.")
    return planned


def mark(model: nn.Module, planned: Mapping[str, LayerSpec]) -> None:
    """Say of the parallel layers of an outline that their weights will be quantised (see `hold`)."""
    for path, spec in planned.items():
        layer = model.get_submodule(path)
        if isinstance(layer, ParallelLayer):
            layer.spec = spec


def quantized(
    weights: Mapping[str, Tensor], spec: LayerSpec, *, most: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """What a layer's weights are held in, by names in the rules table.

    Args:
        weights: This process's, by name (`weight`, or one for each part).
        spec: The layer, quantised.
        most: By name, as in `lora_fn.quantize.quantize`; None where every scale is for inputs of this process.
    """
    assert spec.quantization is not None
    held: dict[str, Tensor] = {}
    for name, weight in weights.items():
        packed = few_bits.quantize(weight, spec.quantization, most=None if most is None else most[name])
        held |= {name: packed.packed, _scale(spec, name): packed.scale}
    return held


def crosses(spec: LayerSpec) -> bool:
    """Whether a scale is for more than one process, or one weight, has."""
    together = spec.quantization is not None and spec.quantization.scale == "tensor" and len(_weights(spec)) > 1
    name = _weights(spec)[0]
    is_cut = isinstance(sharding.rule(spec, name).placement, Shard)
    return together or (is_cut and not isinstance(sharding.rule(spec, _scale(spec, name)).placement, Shard))


def hold(layer: ParallelLayer, spec: LayerSpec, held: Mapping[str, Tensor]) -> None:
    """Put packed weights and scales in the place of a layer's plain weights, which are let go."""
    layer.spec = spec
    for name, t in held.items():
        layer.register_parameter(attribute(spec, name), nn.Parameter(t, requires_grad=False))


class Bytes(NamedTuple):
    """Of the base's parameters on one process: how many they take, and how many unquantised."""

    held: int
    plain: int


def base_bytes(model: nn.Module, dtype: torch.dtype) -> Bytes:
    """What the frozen parameters of a model take on this process, adapted or not.

    Args:
        model: The model.
        dtype: That its quantised weights would have.
    """
    held, plain, seen = 0, 0, set[int]()
    packed = {}
    for module in model.modules():
        spec = vars(module).get("spec")
        if isinstance(spec, LayerSpec) and spec.quantization is not None:
            full = replace(spec, quantization=None)
            for name in _weights(spec):
                p = module.get_parameter(attribute(spec, name))
                packed[id(p)] = sharding.local_shape(full, name)
                packed[id(module.get_parameter(attribute(spec, _scale(spec, name))))] = (0,)
    for p in model.parameters():
        if p.requires_grad or id(p) in seen:
            continue
        seen.add(id(p))
        held += p.numel() * p.element_size()
        plain += torch.Size(packed[id(p)]).numel() * dtype.itemsize if id(p) in packed else p.numel() * p.element_size()
    return Bytes(held, plain)


def _weights(spec: LayerSpec) -> list[str]:
    return [name for name in sharding.names(spec) if name.partition(".")[0] == "weight"]


def _scale(spec: LayerSpec, weight: str) -> str:
    """The name of a weight's scale."""
    assert spec.quantization is not None
    return sharding.SCALE if spec.quantization.scale == "tensor" else weight.replace("weight", sharding.SCALE)


def _most(weights: Mapping[str, Tensor], spec: LayerSpec, index: Tensor) -> dict[str, Tensor] | None:
    """The largest elements, over all processes, that the scales are for."""
    if not crosses(spec):
        return None
    assert spec.quantization is not None
    found = over_parts({n: few_bits.largest(w, spec.quantization) for n, w in weights.items()}, spec)
    if spec.axis.size == 1:
        return found
    return {name: collectives.maximum(most, spec.axis, index) for name, most in found.items()}


def over_parts(most: Mapping[str, Tensor], spec: LayerSpec) -> dict[str, Tensor]:
    """The largest elements of each weight; of all, where they have one scale."""
    if spec.quantization is None or spec.quantization.scale != "tensor":
        return dict(most)
    return dict.fromkeys(most, torch.stack([*most.values()]).amax(0))
