"""What stands in the place of a module? A layer over its parameters, with an adapter or without.

`bind` makes these, and puts them on a model.
"""

from __future__ import annotations

import copy
import itertools
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

import lora_fn
from adapters import kinds
from adapters.initialize import Initial
from adapters.parallel import attribute, describe, sequence_first
from adapters.raw import Adapted
from adapters.stack import HOOKS
from lora_fn import LayerSpec, Shard, TargetError, alora, collectives, layers, sharding, variants
from lora_fn.once import once


class BoundLayer(nn.Module):
    """A layer whose forward is `lora_fn.apply` over another module's parameters. Their names stay what they were.

    What is trained of them is a copy; the others are the same `nn.Parameter`s, frozen.

    Args:
        base: The module whose parameters and hooks it takes over.
        spec: The layer.
        owner: A layer with the same weight, which holds in its place what is trained of it; None where there is none.
    """

    spec: LayerSpec
    index: Tensor | None
    initial: Initial | None = None

    def __init__(self, base: nn.Module, spec: LayerSpec, owner: BoundLayer | None = None):
        super().__init__()
        self.spec = spec
        self._follows = {} if owner is None else _followed(spec, owner)
        own = [name for name in sharding.trained_names(spec) if name not in self._follows]
        self._copied = tuple(name for name in attributes(spec.base) if name in own)
        self.take(base)
        for name in self._copied:
            self.register_parameter(attribute(spec, name), _copy(tensor_of(base, spec, name), spec, name))
        if sharding.TOKENS in own:
            self.register_parameter(sharding.TOKENS, _copy(_token_rows(self, spec), spec, sharding.TOKENS))
        self.skip_bias_add = getattr(base, "skip_bias_add", False)
        self._places = [
            (name, *at.partition(".")[::2]) for name, at in attributes(spec).items() if name not in self._follows
        ]
        place = base._buffers.get("index")
        if place is None and spec.axis.index is not None:
            place = torch.tensor([spec.axis.index], device=device_of(self))
        self.register_buffer("index", place, persistent=False)

    def take(self, base: nn.Module) -> None:
        """Take over the parameters and the hooks of a module; what is ours goes to where its parameters are."""
        for name, p in self._shared(base).items():
            self.register_parameter(name, p)
        vars(self).update({hooks: vars(base)[hooks] for hooks in HOOKS})
        if self.training != base.training:
            self.train(base.training)
        here = device_of(base)
        held = (t for module in self.modules() for t in (*module._parameters.values(), *module._buffers.values()))
        if any(t is not None and t.device != here for t in held):
            self.to(here)

    def _shared(self, base: nn.Module) -> dict[str, nn.Parameter | None]:
        """What is not trained, by the names that it has here: the base's own; of a fused tensor, views of its parts."""
        copied = {attribute(self.spec, name) for name in self._copied}
        own = {name: p for name, p in base._parameters.items() if name not in copied}
        for name, at in attributes(self.spec.base).items():
            if at not in base._parameters:  # then a fused tensor holds it
                own.pop(_fused_attribute(self.spec, name), None)
                if at not in copied:
                    own[at] = nn.Parameter(tensor_of(base, self.spec, name), requires_grad=False)
        return own

    def give(self, base: nn.Module) -> None:
        """Hand the parameters back to a module, also where they have moved to another device since."""
        device = device_of(self)
        copied = {attribute(self.spec, name) for name in self._copied}
        for name, p in base._parameters.items():
            if name in self._parameters and name not in copied:
                base.register_parameter(name, self._parameters[name])
            elif p is not None and p.device != device:
                base.register_parameter(name, nn.Parameter(p.detach().to(device), requires_grad=False))
        base.train(self.training)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        # Where this makes new parameters (on the way to XLA), the marks that a trainer reads on the old ones are kept.
        marks = {name: dict(vars(p)) for name, p in self.named_parameters()}
        super()._apply(fn, recurse)
        for name, p in self.named_parameters():
            for mark, value in marks[name].items():
                setattr(p, mark, value)
        return self

    def parameter(self, name: str) -> nn.Parameter:
        """The parameter of a name in the rules table."""
        at = attribute(self.spec, name)
        own = self._parameters.get(at)
        return self.get_parameter(at) if own is None else own

    def trained(self) -> dict[str, nn.Parameter]:
        """What is trained and held by this layer, by names in the rules table."""
        return {name: self.parameter(name) for name in sharding.trained_names(self.spec) if name not in self._follows}

    def instead(self) -> dict[str, Tensor]:
        """What stands in the place of the base's own parameters, factors left aside, by names in the rules table."""
        if sharding.TOKENS in self.trained():
            return lora_fn.merge(self.params(), self.spec, index=self.index)
        return {name: self.parameter(name).detach() for name in self._copied}

    def followed(self) -> dict[str, tuple[nn.Parameter, bool]]:
        """What is trained of this layer and held by another: (parameter, whether this layer's is its transpose)."""
        return {name: (owner.parameter(theirs), turned) for name, (owner, theirs, turned) in self._follows.items()}

    def stored(self) -> dict[str, Tensor]:
        """This process's part of what an adapter's file holds of this layer."""
        params = self.params()
        return {name: params[name].detach() for name in sharding.stored_names(self.spec)}

    def params(self) -> dict[str, Tensor]:
        """The tensors that `lora_fn.apply` wants, by their names there."""
        found = {
            name: getattr(getattr(self, owner), part) if part else getattr(self, owner)
            for name, owner, part in self._places
        }
        for name, (owner, theirs, turned) in self._follows.items():
            tensor = getattr(owner, attribute(owner.spec, theirs))
            found[name] = tensor.T if turned else tensor
        return found

    def forward(self, x: Tensor, slice_indices: None = None, expert_indices: None = None) -> Any:
        """As `lora_fn.apply`; (result, bias) where the module leaves its bias, or None, to the caller.

        Args:
            x: The input.
            slice_indices, expert_indices: neuronx-distributed's, which are for inference.

        Raises:
            TargetError: With indices.
        """
        return self._apply_to(x, (slice_indices, expert_indices))

    def _apply_to(self, x: Tensor, indices: tuple[None, None], **more: Any) -> Any:
        if indices != (None, None):
            raise TargetError("adapters: a layer that is adapted computes the whole; call it without indices.")
        x = sequence_first(x, self.spec)
        y = self._computed(x, **more)
        return (y, self.bias) if self.skip_bias_add else y

    def _computed(self, x: Tensor, **more: Any) -> Any:
        return lora_fn.apply(self.params(), x, self.spec, index=self.index, **more)

    def extra_repr(self) -> str:
        """Kind, sizes, rank and placements."""
        return describe(self.spec)


@once
def attributes(spec: LayerSpec) -> Mapping[str, str]:
    """Name in the rules table -> what a module calls that parameter, of all that a layer has."""
    return {name: attribute(spec, name) for name in sharding.names(spec)}


def device_of(module: nn.Module) -> torch.device:
    """Where a module's own parameters are."""
    return next(p.device for p in module._parameters.values() if p is not None)


_Follows = dict[str, tuple[BoundLayer, str, bool]]


def _followed(spec: LayerSpec, owner: BoundLayer) -> _Follows:
    """What a layer reads from the one that it is tied to: parameter -> (that one, its parameter, whether transposed).

    The factors of an embedding adapt the weight's transpose, and so are those of a linear layer, transposed.
    """
    if spec.updates:
        turned = (spec.kind == "embedding") != (owner.spec.kind == "embedding")
        names = {"lora_A": "lora_B", "lora_B": "lora_A"} if turned else {"lora_A": "lora_A", "lora_B": "lora_B"}
        return {name: (owner, theirs, turned) for name, theirs in names.items()}
    return {name: (owner, name, False) for name in ("weight", sharding.TOKENS) if name in owner.trained()}


def _token_rows(layer: BoundLayer, spec: LayerSpec) -> Tensor:
    """The rows of a weight that are to be trained, in fp32 (or more), on every process."""
    weight, axis = layer.parameter("weight").detach(), spec.axis
    weight = weight.T if spec.fan_in_fan_out else weight
    wide = torch.promote_types(weight.dtype, torch.float32)
    if not isinstance(sharding.rule(spec, "weight").placement, Shard) or spec.shard_across_embedding:
        return weight[list(spec.tokens)].to(wide)
    rows = torch.tensor(spec.tokens, device=weight.device) - (axis.index or 0) * weight.shape[0]
    is_here = (rows >= 0) & (rows < weight.shape[0])
    mine = torch.where(is_here[:, None], weight[torch.where(is_here, rows, 0)], 0).to(wide)
    return collectives.reduce_flat([mine], axis)[0]


def _fused_attribute(spec: LayerSpec, name: str) -> str:
    """Where a module whose parts are in one tensor has a parameter of a part."""
    return attribute(replace(spec, fuse_qkv=True), name.partition(".")[0])


def tensor_of(base: nn.Module, spec: LayerSpec, name: str) -> Tensor:
    """A parameter of a module, by its name in the rules table; of a fused tensor, a view of the part."""
    p, rows = place_of(base, spec, name)
    return p.detach() if rows is None else p.detach()[rows]


def place_of(base: nn.Module, spec: LayerSpec, name: str) -> tuple[nn.Parameter, slice | None]:
    """The parameter of a module that holds one of the rules table, and which rows of it do; None for all."""
    own = base._parameters.get(attribute(spec, name))
    if own is not None:
        return own, None
    whole, part = base.get_parameter(_fused_attribute(spec, name)), name.partition(".")[2]
    layout = sharding.layout(replace(spec, fuse_qkv=True), "weight")
    assert layout is not None
    ends = list(itertools.accumulate(layout.local_sizes.values()))
    stop = ends[list(layout.local_sizes).index(part)]
    return whole, slice(stop - layout.local_sizes[part], stop)


def _copy(p: Tensor, spec: LayerSpec, name: str) -> nn.Parameter:
    """A parameter to train in the place of one of the base."""
    own = nn.Parameter(p.clone())
    if sharding.partial(spec, name) and spec.gradients == "deferred":
        setattr(own, kinds.PARTIAL, True)
    return own


class WholeLayer(BoundLayer):
    """A module that has no `apply` here, some of its parameters replaced by trained copies.

    Args:
        base: The module; what is in it stays in it.
        spec: Of kind "replicated".
    """

    def take(self, base: nn.Module) -> None:
        """As `BoundLayer.take`; the forward is the module's own, without its hooks, which this one has now."""
        super().take(base)
        shell = copy.copy(base)
        for hooks in HOOKS:
            setattr(shell, hooks, OrderedDict())
        shell._parameters, self._modules = dict(base._parameters), base._modules
        self._shell = (shell,)  # a tuple, so that it is no part of this module

    def train(self, mode: bool = True) -> WholeLayer:
        """Also of the module whose forward is called."""
        super().train(mode)
        for shell in vars(self).get("_shell", ()):
            shell.training = mode
        return self

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the module's own."""
        params = lora_fn.summed(self.params(), self.spec, index=self.index)
        return functional_call(self._shell[0], params, args, kwargs)

    def extra_repr(self) -> str:
        """Class, and what is trained."""
        return f"{type(self._shell[0]).__name__}, trained={self.spec.trained}"


class LoraLayer(Adapted, BoundLayer):
    """One adapted layer. The factors stand beside the base's parameters (`q_proj.lora_A`; of a fused layer
    `qkv_proj.lora_A.q`).

    Args:
        base: As in `BoundLayer`.
        spec: The layer, with its adapter.
        factors: This process's factors.
        number: Of a layer that is not fused: folded into dropout's key (by `set_dropout_key`), so that layers drop
            inputs of their own.
        initial: What the base lacks while the layer is in its place; None where that is the base as it was.
        owner: As in `BoundLayer`; it holds the factors.
    """

    dropout_key: Tensor | None
    gate: Tensor | None
    brought: tuple[Tensor, list[Tensor]] | None

    def __init__(
        self,
        base: nn.Module,
        spec: LayerSpec,
        factors: Mapping[str, Tensor],
        number: int,
        initial: Initial | None = None,
        owner: BoundLayer | None = None,
    ):
        super().__init__(base, spec, owner)
        self.number, self.initial, self.brought = number, initial, None
        device = device_of(self)
        for name, factor in factors.items():
            kind, _, part = name.partition(".")
            if not part:
                self.register_parameter(kind, nn.Parameter(factor.to(device)))
                continue
            if kind not in self._modules:
                self.add_module(kind, nn.ParameterDict())
            getattr(self, kind)[part] = nn.Parameter(factor.to(device))
        self.register_buffer("scaling", None, persistent=False)
        self.register_buffer("dropout_key", None, persistent=False)
        self.register_buffer("gate", None, persistent=False)
        self.rescale(spec)

    def forward(self, x: Tensor, slice_indices: None = None, expert_indices: None = None) -> Any:
        """Base and update; args and result as `BoundLayer`.

        Raises:
            TargetError: With indices; in training with dropout and no key: call `set_dropout_key` before each step; of
                an aLoRA, with no gate: call `set_invocation` before each call.
        """
        cut = self.spec.sequence_dim if self.spec.input == "sharded" else None
        brought, self.brought = self.brought, None
        more = {} if brought is None or brought[0] is not x else {"hs": brought[1]}
        return self._apply_to(x, (slice_indices, expert_indices), **self._given(x, cut), **more)

    def down(self, x: Tensor, *, dim: int) -> tuple[Tensor, list[Tensor]]:
        """What a gather is to bring beside this layer's input (see `lora_fn.siblings`).

        Args:
            x: This process's part of it.
            dim: The dimension that is cut.

        Returns:
            As `lora_fn.layers.down`.
        """
        return layers.down(self.params(), x, self.spec, index=self.index, sequence_dim=dim, **self._given(x, dim))

    def bring(self, x: Tensor, hs: list[Tensor]) -> None:
        """Give this layer what was gathered beside its next input, x; of any other input it computes it by itself."""
        self.brought = (x, hs)

    def _given(self, x: Tensor, cut: int | None) -> dict[str, Any]:
        """What a call takes beside x, of which a dimension may be cut."""
        gate = self._gate(x, cut) if variants.TABLE[self.spec.variant].gated else None
        return {"key": self._key(), "scaling": self.scaling, "gate": gate}

    def _key(self) -> Tensor | None:
        """What this layer drops inputs by, in this call."""
        if not self.training or self.spec.dropout == 0 or self.spec.kind == "embedding":
            return None
        if self.dropout_key is None:
            raise TargetError(
                "adapters: the model trains with dropout but has no key; "
                "call adapters.set_dropout_key(model, key) before each step."
            )
        return self.dropout_key

    def _gate(self, x: Tensor, cut: int | None) -> Tensor:
        """The gate of all tokens of a call, as the layer's activations have them."""
        if self.gate is None:
            raise TargetError(
                "adapters: the model has an aLoRA, but was not told where it begins; "
                "call adapters.set_invocation(model, input_ids) before each call."
            )
        if x.dim() < 3:
            return alora.fitted(self.gate, 1)[:, 0]
        rows = x.shape[1 if self.spec.sequence_dim == 0 else 0]
        if self.gate.shape[0] not in (1, rows):
            raise TargetError(
                f"adapters: the model has an aLoRA that was told of {self.gate.shape[0]} rows of tokens, and is called "
                f"with {rows}; tell it of the same rows, and generate one sequence of each, without beams."
            )
        length = x.shape[0 if self.spec.sequence_dim == 0 else 1]
        gate = alora.fitted(self.gate, length * (1 if cut is None else self.spec.axis.size))
        return gate.T if self.spec.sequence_dim == 0 else gate
