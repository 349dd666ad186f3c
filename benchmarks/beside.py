"""What would Optimum Neuron's and NxD's LoRA do on our parallel layers? Our port of their scheme, which takes no code.

They build lora_A and lora_B as layers of their own, and call them beside the base (scheme a):

    column   A replicated, B cut by its outputs; the gradient of H is all-reduced. Under sequence parallelism A sees
             this process's tokens, H is gathered, again in the backward, and its gradient is reduce-scattered.
    row      A cut by its inputs, B replicated; H is all-reduced. Under sequence parallelism it is reduce-scattered, and
             its gradient is gathered.

Under sequence parallelism the gradients of what is replicated are partial sums, which they do not add up: `sync` does,
in one all-reduce for all, which is the kindest way to charge them with it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.programs import LINEARS
from lora_fn import collectives

SEQUENCE = 1  # the dimension that is cut


class _Regathered(torch.autograd.Function):
    """H B^T of a gathered H, of which only this process's part is kept."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, up: Tensor, layer: Any) -> Tensor:
        ctx.save_for_backward(h, up)
        ctx.layer = layer
        return F.linear(layer.gathered(h), up)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        h, up = ctx.saved_tensors
        axis, index = ctx.layer.axis, ctx.layer.index
        [h_grad] = collectives.reduce_scatter([grad @ up], axis, index, dim=SEQUENCE)
        return h_grad, grad.flatten(0, 1).T @ ctx.layer.gathered(h).flatten(0, 1), None


class Beside(nn.Module):
    """A parallel layer, and lora_A and lora_B beside it.

    Args:
        base: A column or row layer of ours.
        lora_A, lora_B: This process's parts.
        scaling: alpha / rank.
        sequence: Whether the sequence is cut between layers.
    """

    before: Tensor  # of a column layer: the block's input, as it is before the base gathers or copies it

    def __init__(self, base: Any, lora_A: Tensor, lora_B: Tensor, *, scaling: float, sequence: bool):
        super().__init__()
        self.base, self.scaling, self.sequence = base, scaling, sequence
        self.axis, self.index, self.kind = base.spec.axis, base.index, base.spec.kind
        self.lora_A = nn.Parameter(lora_A.detach().clone())
        self.lora_B = nn.Parameter(lora_B.detach().clone())

    def gathered(self, h: Tensor) -> Tensor:
        """All tokens."""
        return collectives.gather([h], self.axis, self.index, dim=SEQUENCE)[0]

    def forward(self, x: Tensor) -> Tensor:
        """As the base, with the update."""
        y = self.base(x)
        return y + (self.row(x) if self.kind == "row" else self.column(self.before)) * self.scaling

    def column(self, x: Tensor) -> Tensor:
        """The update of a column layer."""
        h = F.linear(x, self.lora_A)
        if self.sequence:
            return _Regathered.apply(h, self.lora_B, self)
        return F.linear(collectives.copy([h], self.axis, self.index)[0], self.lora_B)

    def row(self, x: Tensor) -> Tensor:
        """The update of a row layer."""
        h = F.linear(x, self.lora_A)
        if self.sequence:
            [h] = collectives.reduce_scatter([h], self.axis, self.index, dim=SEQUENCE)
        else:
            [h] = collectives.reduce([h], self.axis, self.index)
        return F.linear(h, self.lora_B)


def adapt(model: Any, like: Mapping[str, Mapping[str, Tensor]], *, scaling: float, sequence: bool) -> Any:
    """Put such layers on a model of `adapters.models`.

    Args:
        model: Frozen.
        like: Of each adapted layer this process's lora_A and lora_B.
        scaling: alpha / rank.
        sequence: Whether the sequence is cut.
    """
    for path, of in like.items():
        owner, _, name = path.rpartition(".")
        block = model.get_submodule(owner)
        setattr(block, name, Beside(block.get_submodule(name), **of, scaling=scaling, sequence=sequence))
    for block in {path.rpartition(".")[0] for path in like}:
        model.get_submodule(block).register_forward_pre_hook(_keep, prepend=True, with_kwargs=True)
    return model


def _keep(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    x = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
    for name, layer in block.named_children():
        if name in LINEARS and isinstance(layer, Beside):
            layer.before = x


def layers(model: nn.Module) -> dict[str, Beside]:
    """By name."""
    return {path: m for path, m in model.named_modules() if isinstance(m, Beside)}


def grads(model: nn.Module) -> dict[str, dict[str, Tensor]]:
    """Of each layer, as they are."""
    return {path: {n: getattr(m, n).grad for n in ("lora_A", "lora_B")} for path, m in layers(model).items()}


def sync(model: nn.Module) -> dict[str, dict[str, Tensor]]:
    """The gradients of a step, with the sum that is missing."""
    found, own = grads(model), layers(model)
    partial = [(path, "lora_B" if m.kind == "row" else "lora_A") for path, m in own.items() if m.sequence]
    if partial:
        axis, index = next(iter(own.values())).axis, next(iter(own.values())).index
        whole = collectives.reduce_flat([found[path][name] for path, name in partial], axis, index)
        for (path, name), grad in zip(partial, whole, strict=True):
            found[path][name] = grad
    return found
