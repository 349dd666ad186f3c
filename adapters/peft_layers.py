"""Which class is an adapted layer, to code that knows PEFT's and Optimum Neuron's? `LoraLayer`s under their names.

A model from `adapters.peft` has these in the place of its layers. Each can be made alone too, with Optimum Neuron's
arguments, around one layer.

Source: Optimum Neuron 0.4.6, `peft/tuners/lora/layer.py`; PEFT 0.21, `tuners/lora/layer.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

import lora_fn
from adapters import bind, merged
from adapters.bound import BoundLayer, LoraLayer, place_of
from adapters.initialize import Initial
from lora_fn import LayerSpec, LoraSpec, SpecError, TargetError
from lora_fn.initialize import seed_of


class NeuronLoraLayer(LoraLayer):
    """An adapted layer with one adapter: the base of the others, and what kinds without a class of their own are.

    Args:
        base, spec, factors, number, initial, owner: As in `LoraLayer`.
    """

    _kept: dict[nn.Parameter, Tensor]
    adapter_name = "default"
    enabled = True
    asked: LayerSpec | None = None  # the layer as it was, where it is scaled now

    @classmethod
    def of_kind(cls, base: nn.Module, spec: LayerSpec, *args: Any, **options: Any) -> NeuronLoraLayer:
        """The layer of the class that `CLASSES` names for its kind; args as in `LoraLayer`."""
        kind = CLASSES.get(spec.kind, NeuronLoraLayer)
        made = kind.__new__(kind)
        NeuronLoraLayer.__init__(made, base, spec, *args, **options)
        return made

    def __init__(
        self,
        base: nn.Module,
        spec: LayerSpec,
        factors: Mapping[str, Tensor],
        number: int,
        initial: Initial | None = None,
        owner: BoundLayer | None = None,
    ):
        LoraLayer.__init__(self, base, spec, factors, number, initial, owner)
        self._kept = {}

    def _alone(self, base: nn.Module, adapter_name: str, spec: LoraSpec, seed: int) -> None:
        """Become the adapted layer of a base layer which is in no model."""
        holder = nn.ModuleDict({"layer": base})
        asked = replace(spec, target_modules=tuple(bind.sites(holder)))

        def made(*args: Any) -> NeuronLoraLayer:
            NeuronLoraLayer.__init__(self, *args)
            return self

        dtype = torch.promote_types(base_dtype(base), torch.float32)
        own = seed_of(seed, adapter_name)
        bind.attach(holder, bind.make(holder, asked, seed=own, dtype=dtype, layer_class=made))
        self.adapter_name = adapter_name

    @property
    def r(self) -> dict[str, int]:
        """The rank, by the name of the adapter; of a fused layer, that of its first part."""
        return {self.adapter_name: self.spec.updates[0].rank}

    @property
    def lora_alpha(self) -> dict[str, float]:
        """The numerator of the scaling, by the name of the adapter; of a fused layer, that of its first part."""
        return {self.adapter_name: self.spec.updates[0].alpha}

    @property
    def active_adapters(self) -> list[str]:
        """The name of the adapter."""
        return [self.adapter_name]

    @property
    def disable_adapters(self) -> bool:
        """Whether only the base computes."""
        return not self.enabled

    @property
    def merged(self) -> bool:
        """Whether the adapter is in the base's weights now."""
        return bool(self._kept)

    @property
    def merged_adapters(self) -> list[str]:
        """The name of the adapter where it is merged."""
        return [self.adapter_name] if self._kept else []

    def get_base_layer(self) -> BoundLayer:
        """The layer without its adapter, over the same parameters; another object each time.

        Where the adapter began with a part of the weight ("pissa", ...), that part is in it, as it was.
        """
        if self.initial is None:
            return BoundLayer(self, self.spec.base)
        whole = LoraLayer(self, self.initial.spec, self.initial.factors, self.number)
        for name in self.initial.factors:
            whole.get_parameter(name).requires_grad_(False)
        return whole

    def enable_adapters(self, enabled: bool) -> None:
        """Compute the adapter's update, or the base alone."""
        self.enabled = enabled

    def set_scale(self, adapter: str, scale: float) -> None:
        """Multiply the scaling that the adapter was made with; 1 gives that back.

        Raises:
            SpecError: Another adapter (see `NeuronLoraModel.set_scale`).
        """
        self._check_name(adapter)
        self.asked = self.asked or self.spec
        self.rescale(_times(self.asked, scale))

    def scale_layer(self, scale: float) -> None:
        """Multiply the scaling that there is."""
        self.asked = self.asked or self.spec
        self.rescale(_times(self.spec, scale))

    def unscale_layer(self, scale: float | None = None) -> None:
        """Divide the scaling that there is; None for that which the adapter was made with."""
        self.asked = self.asked or self.spec
        self.rescale(self.asked if scale is None else _times(self.spec, 1 / scale))

    def get_delta_weight(self, adapter: str) -> Any:
        """What the adapter adds to this process's part of the weight; of a fused layer, {part: tensor}.

        Raises:
            SpecError: Another adapter.
        """
        self._check_name(adapter)
        params = {name: p.detach() for name, p in self.params().items()}
        found = {part.name: lora_fn.delta(params, self.spec, part=part.name) for part in self.spec.updates}
        return found if self.spec.parts else found[""]

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Put the adapter into the base's weights; they are kept, so that `unmerge` is exact.

        Args:
            safe_merge: Refuse weights that are not finite.
            adapter_names: None, or the adapter's name.

        Raises:
            SpecError: Another adapter.
            TargetError: Weights that are not finite. Nothing is changed then.
        """
        for name in adapter_names or ():
            self._check_name(name)
        if self._kept:
            return
        tensors = merged.merged([self])
        if safe_merge:
            merged.check_finite([*tensors.values()], [self], f"adapter {self.adapter_name!r}")
        self._kept = swap(self, tensors)

    def unmerge(self) -> None:
        """Take the adapter out of the base's weights again: they are what they were, bit for bit."""
        for p, tensor in self._kept.items():
            p.data = tensor
        self._kept = {}

    def _apply(self, fn: Any, recurse: bool = True) -> LoraLayer:
        was_merged = self.merged
        self.unmerge()
        super()._apply(fn, recurse)
        if was_merged:
            self.merge()
        return self

    def _check_name(self, name: str) -> None:
        if name != self.adapter_name:
            raise SpecError(f"adapter {name!r}: this layer has {self.adapter_name!r} alone; name that.")

    def forward(self, x: Tensor, slice_indices: None = None, expert_indices: None = None) -> Any:
        """As `LoraLayer`; the base alone where the adapter is merged or disabled."""
        if self.enabled and not self._kept:
            return super().forward(x, slice_indices, expert_indices)
        if not self.enabled and self._kept:
            raise TargetError("a layer is disabled while its adapter is merged; unmerge it first.")
        base = BoundLayer(self, self.spec.base) if self._kept else self.get_base_layer()
        return base.forward(x, slice_indices, expert_indices)


def base_dtype(model: nn.Module) -> torch.dtype:
    """The dtype of a model's floating-point parameters, but for what a quantised weight is held in; else float32."""
    named = ((name.rpartition(".")[2], p) for name, p in model.named_parameters())
    found = (p.dtype for name, p in named if p.is_floating_point() and p.itemsize > 1 and not name.endswith("scale"))
    return next(found, torch.float32)


def _times(spec: LayerSpec, scale: float) -> LayerSpec:
    parts = tuple(replace(part, alpha=part.alpha * scale if part.rank else part.alpha) for part in spec.parts)
    return replace(spec, alpha=spec.alpha if parts else spec.alpha * scale, parts=parts)


def swap(layer: BoundLayer, tensors: Mapping[str, Tensor], base: nn.Module | None = None) -> dict[nn.Parameter, Tensor]:
    """Give parameters, which stay the same objects, other tensors; returns those that they had.

    Args:
        layer: The layer.
        tensors: By the names in its rules table.
        base: The module whose parameters they are; None for the layer.
    """
    kept: dict[nn.Parameter, Tensor] = {}
    for name, tensor in tensors.items():
        p, rows = place_of(layer if base is None else base, layer.spec, name)
        whole = tensor
        if rows is not None:  # of a part of a fused tensor
            whole = p.data.clone() if p not in kept else p.data
            whole[rows] = tensor
        kept.setdefault(p, p.data)
        p.data = whole
    return kept


class ParallelLinear(NeuronLoraLayer):
    """An adapted linear layer: column or row parallel, fused or not, or not parallel at all.

    Args:
        base_layer: The layer; its parameters stay the same objects, and are frozen.
        adapter_name: Of its adapter.
        r, lora_alpha, lora_dropout, init_lora_weights, use_rslora, use_dora, lora_bias: As in PEFT's LoraConfig. Of a
            fused layer, every part has these.
        fan_in_fan_out, is_target_conv_1d_layer: Taken and not used: that is seen from the layer.
        seed: Of the factors, which every process must give alike.

    Raises:
        SpecError: Values that cannot be.
        TargetError: A layer that cannot be adapted.
    """

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        r: int = 0,
        lora_alpha: float = 1,
        lora_dropout: float = 0.0,
        fan_in_fan_out: bool = False,
        is_target_conv_1d_layer: bool = False,
        init_lora_weights: bool | str = True,
        use_rslora: bool = False,
        use_dora: bool = False,
        lora_bias: bool = False,
        *,
        seed: int = 0,
    ):
        spec = LoraSpec(
            rank=r,
            alpha=lora_alpha,
            dropout=lora_dropout,
            init_lora_weights=init_lora_weights,
            use_rslora=use_rslora,
            use_dora=use_dora,
            lora_bias=lora_bias,
        )
        self._alone(base_layer, adapter_name, spec, seed)


class GQAQKVColumnParallelLinear(ParallelLinear):
    """The adapted query, key and value of grouped-query attention. Args and errors as `ParallelLinear`."""


class ParallelEmbedding(NeuronLoraLayer):
    """An adapted table of embeddings. Args and errors as `ParallelLinear`, without `is_target_conv_1d_layer`."""

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        r: int = 0,
        lora_alpha: float = 1,
        lora_dropout: float = 0.0,
        fan_in_fan_out: bool = False,
        init_lora_weights: bool | str = True,
        use_rslora: bool = False,
        use_dora: bool = False,
        lora_bias: bool = False,
        *,
        seed: int = 0,
    ):
        spec = LoraSpec(
            rank=r,
            alpha=lora_alpha,
            dropout=lora_dropout,
            init_lora_weights=init_lora_weights,
            use_rslora=use_rslora,
            use_dora=use_dora,
            lora_bias=lora_bias,
        )
        self._alone(base_layer, adapter_name, spec, seed)


# Kind -> the class of an adapted layer of it.
CLASSES: Mapping[str, type[NeuronLoraLayer]] = {
    **dict.fromkeys(("linear", "column", "row"), ParallelLinear),
    "qkv": GQAQKVColumnParallelLinear,
    "embedding": ParallelEmbedding,
}
