"""How does a raw parameter get an adapter? A module that computes by itself sees the updated weight while it does.

The module stays the same object, with its names, hooks and places: it is of a subclass of its class for as long as an
adapter is on it (as in torch.nn.utils.parametrize), and holds the adapters of its parameters in a child, `lora`.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

import lora_fn
from adapters import nxd
from adapters.parallel import describe
from lora_fn import LayerSpec, TargetError, peft_format, sharding


class Adapted(nn.Module):
    """What holds the factors of one adapted layer, and the scaling of its updates.

    `initial` is what the base lacks while the adapter is on it (see `adapters.initialize`); None where it is as it was.
    """

    initial: Any = None
    spec: LayerSpec
    index: Tensor | None
    scaling: Tensor
    params: Any

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        super()._apply(fn, recurse)
        self.rescale(self.spec)  # never rounded to the dtype that the parameters now have
        return self

    def rescale(self, spec: LayerSpec) -> None:
        """Take a spec that differs in alpha and use_rslora only. The scaling is data: no graph is compiled again."""
        factor = next(p for name, p in self.params().items() if name.startswith("lora_"))
        values = [spec.scaling_of(part) for part in spec.updates]
        self.spec = spec
        self.scaling = torch.tensor(values, dtype=torch.promote_types(factor.dtype, torch.float32)).to(factor.device)


class RawLayer(Adapted):
    """The adapter of one raw parameter.

    Args:
        owner: The module whose parameter it is.
        spec: The layer; `spec.raw` begins with the parameter's name.
        factors: This process's factors.
    """

    def __init__(self, owner: nn.Module, spec: LayerSpec, factors: Mapping[str, Tensor]):
        super().__init__()
        self._owner = (owner,)  # in a tuple, so that it is no child
        self.spec = spec
        device = self.weight.device
        for name, factor in factors.items():
            self.register_parameter(name, nn.Parameter(factor.to(device)))
        place = None if spec.axis.index is None else torch.tensor([spec.axis.index], device=device)
        self.register_buffer("index", place, persistent=False)
        self.register_buffer("scaling", None, persistent=False)
        self.rescale(spec)

    @property
    def weight(self) -> Tensor:
        """The parameter itself, without the update."""
        found = self._owner[0]._parameters[self.spec.raw[0]]
        assert found is not None
        return found

    def params(self) -> dict[str, Tensor]:
        """The tensors that `lora_fn.updated_weight` wants, by their names there."""
        return {name: getattr(self, name) for name in sharding.names(self.spec)}

    def parameter(self, name: str) -> nn.Parameter:
        """The parameter of a name in the rules table."""
        return self.get_parameter(name)

    def trained(self) -> dict[str, nn.Parameter]:
        """What is trained, by names in the rules table."""
        return {name: self.parameter(name) for name in sharding.trained_names(self.spec)}

    def stored(self) -> dict[str, Tensor]:
        """This process's part of what an adapter's file holds."""
        return {name: self.parameter(name).detach() for name in sharding.stored_names(self.spec)}

    def followed(self) -> dict[str, tuple[nn.Parameter, bool]]:
        """Nothing: see `bound.BoundLayer.followed`."""
        return {}

    def forward(self) -> Tensor:
        """The updated weight."""
        return lora_fn.updated_weight(self.params(), self.spec, index=self.index, scaling=self.scaling)

    def extra_repr(self) -> str:
        """Kind, sizes, rank and placements."""
        return describe(self.spec)


class Owner(nn.Module):
    """What the subclass adds to the class `of` a module: in its forward, adapted parameters are updated."""

    of: Any

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the module's own."""
        with _instead(self, {name: layer() for name, layer in self.get_submodule(peft_format.RAW).named_children()}):
            return super().forward(*args, **kwargs)


@contextmanager
def _instead(module: nn.Module, tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """Tensors in the places of parameters of the same names."""
    held: dict[str, Any] = module._parameters
    own = {name: held[name] for name in tensors}
    held.update(tensors)
    try:
        yield
    finally:
        held.update(own)


@functools.cache
def _subclass(cls: Any) -> type:
    return type(f"Lora{cls.__name__}", (Owner, cls), {"__module__": __name__, "of": cls, "__reduce__": _reduced})


def _reduced(module: Any) -> Any:
    return _blank, (module.of,), module.__dict__


def _blank(cls: type) -> Any:
    """An empty module of the subclass of a class: what a copy or a pickle begins with."""
    made: Any = _subclass(cls)
    return made.__new__(made)


def put_on(layers: Mapping[str, RawLayer]) -> None:
    """Put adapters on the parameters that they are of: {path: layer}."""
    for layer in layers.values():
        owner: Any = layer._owner[0]
        if not isinstance(owner, Owner):
            owner.__class__ = _subclass(owner.__class__)
            owner.add_module(peft_format.RAW, nn.ModuleDict())
        owner.get_submodule(peft_format.RAW)[layer.spec.raw[0]] = layer


def take_off(layers: Mapping[str, RawLayer]) -> None:
    """The inverse of `put_on`."""
    for layer in layers.values():
        owner: Any = layer._owner[0]
        if isinstance(owner, Owner):
            del owner._modules[peft_format.RAW]
            owner.__class__ = owner.of  # type: ignore[assignment]


def candidates(model: nn.Module) -> dict[str, nn.Module]:
    """Name of each parameter that targets may call -> its module. neuronx-distributed's modules of stacked experts are
    parameters too, of the names that those have in Hugging Face's models."""
    found: dict[str, nn.Module] = {}
    for path, module in model.named_modules():
        if nxd.class_name(module) in nxd.EXPERTS:
            stacked = peft_format.stacked_name(path)
            found |= {stacked: module} if stacked else {}
        elif path and not isinstance(module, Adapted):
            found |= {f"{path}.{name}": module for name, p in module._parameters.items() if p is not None}
    return found


def specs_of(owner: nn.Module) -> Mapping[str, LayerSpec]:
    """Of a module whose raw parameters are cut over an axis, the layer that each is; {} of any other."""
    return vars(owner).get("raw_specs", {})


def base_spec(owner: Any, name: str) -> LayerSpec:
    """The layer that a parameter is, without an adapter: [experts, out, in], [experts, in, out] where the module says
    `is_transposed`, or [out, in].

    Raises:
        TargetError: Other dimensions, or numbers that have no gradient.
    """
    if name in specs_of(owner):
        return replace(specs_of(owner)[name], raw=(name,))
    weight: Tensor = owner._parameters[name]
    if weight.dim() not in (2, 3) or not weight.is_floating_point():
        raise TargetError(
            f"is a parameter of shape {list(weight.shape)} and {weight.dtype}, expected two or three dimensions of "
            f"floating numbers; leave it out of target_parameters."
        )
    if weight.dim() == 2:
        return LayerSpec(kind="linear", in_features=weight.shape[1], out_features=weight.shape[0], raw=(name,))
    transposed = bool(getattr(owner, "is_transposed", False))
    inside, out = weight.shape[1:] if transposed else weight.shape[:0:-1]
    return LayerSpec(
        kind="experts",
        in_features=inside,
        out_features=out,
        num_experts=weight.shape[0],
        fan_in_fan_out=transposed,
        raw=(name,),
    )
