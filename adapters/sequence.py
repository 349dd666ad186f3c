"""How do activations lie between the layers of a Hugging Face model? Where they are cut, gathered, or copied.

Ids, positions and masks are whole, and so are the embeddings; under sequence parallel their sequence is cut at the
first decoder layer, reduce-scattered by the row layers, and gathered after the final norm. What attentions and MLPs get
is gathered once for all sibling column layers, with what their adapters make of it (`Sequence`), or by each of them
(`OwnSequence`).
"""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adapters.bound import LoraLayer
from lora_fn import Axis, LayerSpec, SpecError, collectives, peft_format, sharding, siblings

Arguments = tuple[tuple[Any, ...], dict[str, Any]]
FUSED = ("qkv_proj", "gate_up_proj")
SEPARATE = ("q_proj", "k_proj", "v_proj")
SIBLINGS = (*SEPARATE, "gate_proj", "up_proj", *FUSED)  # in a block, whoever gets the block's input


class Slice(nn.Module):
    """Some features of what it gets: a projection that a fused layer before it has computed.

    Args:
        start, stop: Which.
    """

    def __init__(self, start: int, stop: int):
        super().__init__()
        self.start, self.stop = start, stop

    def forward(self, x: Tensor) -> Tensor:
        """x [..., features] -> [..., stop - start]."""
        return x[..., self.start : self.stop]

    def extra_repr(self) -> str:
        """Which features."""
        return f"{self.start} to {self.stop - 1}"


def take_slices(block: nn.Module, spec: LayerSpec) -> None:
    """Put slices of a fused layer's output in the places of the modules that stock code calls.

    Stock attentions and MLPs read of their input only the leading dimensions, and give it to these modules: so the
    fused layer is computed before the block, and its output is the block's input.

    Args:
        block: The attention or MLP.
        spec: Of its fused layer.
    """
    layout, start = sharding.layout(spec, "lora_B"), 0
    assert layout is not None
    for part, size in layout.local_sizes.items():
        setattr(block, peft_format.PART_MODULES[part], Slice(start, start + size))
        start += size


class Sequence:
    """The activations between the layers of one model: where they are cut, gathered, or copied.

    The column layers leave their input's gradient partial: a gather or a copy before each block completes it.

    Args:
        model: With parallel layers in place.
        axis: Of its layers.
        parallel: Whether the sequence is cut between them.
    """

    def __init__(self, model: Any, axis: Axis, *, parallel: bool):
        self.model, self.axis = model, axis
        self.parallel = parallel and axis.size > 1
        self.cut = self.parallel
        self.length = 0

    def attach(self) -> None:
        """Register the hooks."""
        inner = self.model.model
        for layer in inner.layers:
            layer.self_attn.register_forward_pre_hook(self._enter_block, with_kwargs=True)
            if "experts" in layer.mlp._modules:
                layer.mlp.register_forward_pre_hook(self._enter_router)
                layer.mlp.experts.register_forward_pre_hook(self._enter_experts)
                layer.mlp.experts.register_forward_hook(self._leave_experts)
                layer.mlp.register_forward_hook(self._leave_router)
            else:
                layer.mlp.register_forward_pre_hook(self._enter_block, with_kwargs=True)
        inner.norm.register_forward_hook(self._leave)
        if self.parallel:
            inner.register_forward_pre_hook(self._begin, with_kwargs=True)
            inner.register_forward_hook(self._end, always_call=True)
            inner.layers[0].register_forward_pre_hook(self._split, with_kwargs=True)

    @property
    def index(self) -> Tensor:
        """This process's place, int [1]."""
        return self.model.model.embed_tokens.index

    def _begin(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
        """Pad what comes in to a length that divides; a call that asks for a cache runs without sequence parallel."""
        if (kwargs.get("use_cache") and not module.training) or kwargs.get("past_key_values") is not None:
            self._switch(False)
            return args, kwargs
        names = ("input_ids", "attention_mask", "position_ids")
        kwargs = dict(zip(names[: len(args)], args, strict=True)) | kwargs | {"use_cache": False}
        came = kwargs["inputs_embeds"] if kwargs.get("input_ids") is None else kwargs["input_ids"]
        self.length = came.shape[1]
        missing = -self.length % self.axis.size
        if missing and kwargs.get("output_router_logits"):
            raise SpecError(
                f"output_router_logits: a sequence of {self.length} is padded for {self.axis.size} processes, which "
                f"the balance of the experts would count; give one that they divide."
            )
        if missing:
            pad = {
                "input_ids": lambda t: F.pad(t, (0, missing)),
                "inputs_embeds": lambda t: F.pad(t, (0, 0, 0, missing)),
                "position_ids": lambda t: F.pad(t, (0, missing)),
                "attention_mask": lambda t: _pad_mask(t, missing),
                "cache_position": lambda t: torch.cat([t, t[-1:] + 1 + torch.arange(missing, device=t.device)]),
            }
            kwargs |= {n: pad[n](kwargs[n]) for n in pad if kwargs.get(n) is not None}
        return (), kwargs

    def _end(self, module: Any, args: tuple[Any, ...], output: Any) -> None:
        if not self.cut:
            self._switch(True)

    def _switch(self, cut: bool) -> None:
        self.cut = cut
        for layer in self.model.model.layers:
            rows = [(layer.self_attn, "o_proj"), (layer.mlp, "down_proj")]
            for row in [block._modules[name] for block, name in rows if name in block._modules]:
                row.spec = replace(row.spec, sequence_dim=1 if cut else None)

    def _split(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
        if not self.cut:
            return args, kwargs
        return (collectives.split([args[0]], self.axis, self.index, dim=1)[0], *args[1:]), kwargs

    def _enter_block(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
        if "hidden_states" in kwargs:
            return args, kwargs | {"hidden_states": self._entering(module, kwargs["hidden_states"])}
        return (self._entering(module, args[0]), *args[1:]), kwargs

    def _entering(self, block: Any, x: Tensor) -> Tensor:
        """What a block gets: x, whole, or what its slices are cut from."""
        whole, fused = self._gathered(x, block) if self.cut else self._whole(x), _fused(block)
        return whole if fused is None else _side_by_side(fused(whole))

    def _gathered(self, x: Tensor, block: Any) -> Tensor:
        """x gathered for a block, and beside it what its adapted layers make of it.

        Not in training before anything has learned: there the base communicates nothing backward, so nothing may ride.
        """
        adapted = [m for name in SIBLINGS if isinstance(m := block._modules.get(name), LoraLayer)]
        returns = x.requires_grad or not torch.is_grad_enabled()
        riding = [layer for layer in adapted if returns and siblings.rides(layer.spec)]
        downs = [functools.partial(layer.down, dim=1) for layer in riding]
        whole, hs = siblings.gathered(x, downs, self.axis, self.index, dim=1, dtype="float32")
        for layer, own in zip(riding, hs, strict=True):
            layer.bring(whole, own)
        return whole

    def _whole(self, x: Tensor) -> Tensor:
        """x for sharded computation: gathered where the sequence is cut, else as it is; its gradient is summed."""
        if self.cut:
            return collectives.gather_partial([x], self.axis, self.index, dim=1, dtype="float32")[0]
        return collectives.copy([x], self.axis, self.index, dtype="float32")[0]

    # Every process routes all tokens, so that the router's gradients are whole everywhere, and computes its part of
    # each expert; the gradients of what the experts get are partial.

    def _enter_router(self, module: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(collectives.gather([args[0]], self.axis, self.index, dim=1)) if self.cut else args

    def _enter_experts(self, module: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        tokens, chosen, shares = args
        [tokens], [shares] = (collectives.copy([t], self.axis, self.index, dtype="float32") for t in (tokens, shares))
        return tokens, chosen, shares

    def _leave_experts(self, module: Any, args: tuple[Any, ...], output: Tensor) -> Tensor:
        return collectives.reduce([output], self.axis, self.index, dtype="float32")[0]

    def _leave_router(self, module: Any, args: tuple[Any, ...], output: Tensor) -> Tensor:
        return collectives.split([output], self.axis, self.index, dim=1)[0] if self.cut else output

    def _leave(self, module: Any, args: tuple[Any, ...], output: Tensor) -> Tensor:
        whole = self._whole(output)
        return whole[:, : self.length] if self.cut else whole


class OwnSequence(Sequence):
    """As `Sequence`, for neuronx-distributed's column layers: each gathers its own input, and completes its gradient.

    Its GQAQKVColumnParallelLinear has the sequence in front.
    """

    part: Tensor | None = None

    def attach(self) -> None:
        """Register the hooks, and this process's place as a buffer."""
        place = torch.tensor([self.axis.index or 0], device=next(self.model.parameters()).device)
        self.model.model.register_buffer("index", place, persistent=False)
        super().attach()
        for layer in self.model.model.layers if self.parallel else ():
            separate = () if _fused(layer.self_attn) is not None else SEPARATE
            for name in separate:
                getattr(layer.self_attn, name).register_forward_pre_hook(self._give_part)

    @property
    def index(self) -> Tensor:
        """This process's place, int [1]."""
        return self.model.model.index

    def _switch(self, cut: bool) -> None:
        if not cut:
            raise SpecError(
                "a call with a cache: neuronx-distributed's layers stay sequence parallel; load the model without, or "
                "give use_cache=False."
            )

    def _entering(self, block: Any, x: Tensor) -> Tensor:
        fused = _fused(block)
        if fused is not None and "qkv_proj" in block._modules and self.cut:
            return _side_by_side(fused(x.transpose(0, 1))).transpose(0, 1)
        if fused is not None:
            return _side_by_side(fused(x))
        if self.cut and "q_proj" in block._modules:
            # A stock attention shapes what its projections give after its own input, which is to look whole.
            self.part = x
            return x.new_zeros(()).expand(x.shape[0], x.shape[1] * self.axis.size, x.shape[2])
        return x

    def _give_part(self, module: Any, args: tuple[Any, ...]) -> tuple[Tensor | None]:
        return (self.part,)

    def _leave(self, module: Any, args: tuple[Any, ...], output: Tensor) -> Tensor:
        self.part = None
        if not self.cut:
            return output
        # The lm_head completes the gradient of what it gets.
        return collectives.gather([output], self.axis, self.index, dim=1)[0][:, : self.length]


def _fused(block: Any) -> Any:
    """The fused layer of a block, None where there is none."""
    return next((block._modules[name] for name in FUSED if name in block._modules), None)


def _side_by_side(out: Tensor | tuple[Tensor, ...]) -> Tensor:
    return torch.cat(out, -1) if isinstance(out, tuple) else out


def _pad_mask(mask: Tensor, missing: int) -> Tensor:
    """A mask for `missing` more tokens, which nobody attends to and which attend to something."""
    if mask.dim() == 2:
        return F.pad(mask, (0, missing))
    blocked, open_ = (False, True) if mask.dtype == torch.bool else (torch.finfo(mask.dtype).min, 0.0)
    return F.pad(F.pad(mask, (0, missing), value=blocked), (0, 0, 0, missing), value=open_)
