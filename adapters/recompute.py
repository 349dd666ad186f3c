"""What does the backward compute again that the forward would save? What is elementwise in what is saved anyway.

A frozen linear layer saves nothing of its input; an adapted one needs it, for the gradient of lora_A. In the blocks of
Hugging Face's decoders that input is the output of a norm, whose own input the norm's backward keeps, or the product
act(gate) * up, whose gate and up are kept. Both are computed again from those, once for all who need them, by the
functions that the forward called: gradients are the same bit for bit.

It is a matter of memory, not of speed.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge, saved_tensors_hooks
from torch.utils.hooks import RemovableHandle
from torch.utils.weak import WeakTensorKeyDictionary

from adapters.bound import LoraLayer
from lora_fn import SpecError, TargetError

ELEMENTWISE = "elementwise"
POLICIES = (ELEMENTWISE,)

_MODELS = "transformers.models."
# Modules whose output is elementwise in their input, but for the sum over a token's features.
NORMS = tuple(
    f"{_MODELS}{place}RMSNorm"
    for place in (
        *("llama.modeling_llama.Llama", "qwen3.modeling_qwen3.Qwen3"),
        *("granite.modeling_granite.Granite", "mixtral.modeling_mixtral.Mixtral"),
    )
)
# Modules that compute down_proj(act_fn(gate) * up_proj(x)).
GATED = tuple(
    f"{_MODELS}{place}MLP"
    for place in ("llama.modeling_llama.Llama", "qwen3.modeling_qwen3.Qwen3", "granite.modeling_granite.Granite")
)


def check(model: nn.Module, policy: str | None) -> None:
    """Refuse a policy that does nothing.

    Raises:
        SpecError: There is no such policy.
        TargetError: Nothing of the model is known to be elementwise.
    """
    if policy is not None and policy not in POLICIES:
        raise SpecError(f"recompute is {policy!r}, expected {' or '.join(map(repr, POLICIES))}, or None.")
    if policy is not None and not any(_modules(model, NORMS + GATED)):
        known = ", ".join(sorted(name.rpartition(".")[2] for name in NORMS + GATED))
        raise TargetError(
            f"recompute: the model has no module that is known to be elementwise (of transformers: {known}); "
            f"leave recompute out."
        )


def _modules(model: nn.Module, classes: Collection[str]) -> Iterator[Any]:
    """A model's modules of some classes, no others derived from them."""
    return (m for m in model.modules() if f"{type(m).__module__}.{type(m).__qualname__}" in classes)


def put_on(model: nn.Module, policy: str | None) -> list[RemovableHandle]:
    """Have the backward of an adapted model compute again what a policy says.

    Args:
        model: Whose adapter is on it.
        policy: "elementwise"; None for nothing.

    Returns:
        Handles of what was changed, whose `remove` undoes it.
    """
    if policy is None:
        return []
    forward = _Forward()
    handles = [
        model.register_forward_pre_hook(forward.begin),
        model.register_forward_hook(forward.end, always_call=True),
    ]
    for norm in _modules(model, NORMS):
        handles += _around(norm, _Norm(forward))
    for mlp in _modules(model, GATED):
        product = _Product(forward)
        handles += _around(mlp.act_fn, product)
        handles.append(mlp.up_proj.register_forward_hook(product.note_up))
        handles.append(mlp.down_proj.register_forward_pre_hook(product.note_product))
    for module in model.modules():
        if isinstance(module, LoraLayer):
            handles.append(module.register_forward_hook(forward.tie, prepend=True))
    return handles


def apart(tensors: Sequence[Tensor], after: Sequence[Tensor]) -> list[Tensor]:
    """Tensors to compute something again from; on XLA, such that it is computed when others are there.

    XLA would find the same operations on the same tensors, and do them once.
    """
    if tensors[0].device.type != "xla":
        return list(tensors)
    import torch_xla.core.xla_model as xm

    copies = [t.detach().clone() for t in (*tensors, *after)]
    xm.optimization_barrier_(copies)
    return copies[: len(tensors)]


def _around(module: nn.Module, hooks: _Norm | _Product) -> list[RemovableHandle]:
    """Hooks next to a module's forward: others change what comes in before, and what comes out after them."""
    return [module.register_forward_pre_hook(hooks.enter), module.register_forward_hook(hooks.leave, prepend=True)]


def _edge(t: Tensor) -> tuple[Any, int]:
    """Which output of which node of the graph a tensor is."""
    if not t.requires_grad:
        return None, 0
    edge = get_gradient_edge(t)
    return edge.node, edge.output_nr


_Outer = tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]]


class _Kept:
    """A tensor that is saved: by autograd for whom it is saved anyway, and here for who is computed from it."""

    def __init__(self) -> None:
        self.packed: Any = None
        self.unpack: Callable[[Any], Tensor] | None = None

    def keep(self, t: Tensor, outer: _Outer | None) -> None:
        """Save it, as hooks around ours say, where there are some. (Detached: else it would hold its own graph.)"""
        if self.packed is None:
            pack, self.unpack = outer or (Tensor.detach, None)
            self.packed = pack(t)

    @property
    def is_there(self) -> bool:
        """Whether somebody has saved it."""
        return self.packed is not None

    def restore(self, after: Sequence[Tensor] = ()) -> Tensor:
        """The tensor."""
        return self.packed if self.unpack is None else self.unpack(self.packed)


class _Again:
    """A tensor that is computed again: once for all who want it, and let go after the last of them.

    Args:
        function: What the forward called.
        sources: Its arguments.
    """

    is_there = True

    def __init__(self, function: Callable[..., Tensor], *sources: _Kept | _Again):
        self.function, self.sources = function, sources
        self.value: Tensor | None = None
        self.users, self.served = 0, 0
        self.after: list[Tensor] = []

    def want(self) -> _Again:
        """One more who will want it; of its sources, it wants each once."""
        for source in self.sources if self.users == 0 else ():
            if isinstance(source, _Again):
                source.want()
        self.users += 1
        return self

    def wait_for(self, gradient: Tensor) -> None:
        """Let it be computed no earlier than a gradient, where XLA chooses when."""
        if self.value is None:
            self.after = [gradient]

    def restore(self, after: Sequence[Tensor] = ()) -> Tensor:
        """The tensor; XLA computes it when the gradients `after` are there."""
        if self.value is None:
            after, self.after = [*after, *self.after], []
            values = [source.restore(after) for source in self.sources]
            with torch.no_grad():
                self.value = self.function(*apart(values, after))
        value, self.served = self.value, self.served + 1
        if self.served >= self.users:
            self.value, self.served = None, 0
        return value


class _View:
    """All of a tensor that is computed again, in another shape."""

    def __init__(self, of: _Again, shape: torch.Size):
        self.of, self.shape = of, shape

    def restore(self) -> Tensor:
        """The view."""
        return self.of.restore().view(self.shape)


class _Forward:
    """What is known of the tensors of the forward that goes on, and the hooks that save by it."""

    def __init__(self) -> None:
        self.known = WeakTensorKeyDictionary()
        self.cast: _Cast | None = None
        self.outer: _Outer | None = None
        self.context: saved_tensors_hooks | None = None

    @property
    def is_on(self) -> bool:
        """Whether a forward goes on that saves something."""
        return self.context is not None

    def begin(self, module: nn.Module, args: object) -> None:
        """Before the model's forward."""
        if not torch.is_grad_enabled():
            return
        self.outer = torch._C._autograd._top_saved_tensors_default_hooks(False)
        context = saved_tensors_hooks(self.pack, lambda saved: saved.restore())
        try:
            context.__enter__()
        except RuntimeError as error:
            raise SpecError(
                "recompute: the model is called inside a torch.func transform, where nobody can choose what is saved; "
                "use lora_fn.value_and_grad or torch.autograd.grad, or leave recompute out."
            ) from error
        self.context = context

    def end(self, module: nn.Module, args: object, output: object) -> None:
        """After it, whatever came of it."""
        if self.context is not None:
            self.context.__exit__()
        self.context, self.outer, self.cast = None, None, None
        self.known.clear()

    def expect(self, t: Tensor) -> _Kept | _Again:
        """What gives a tensor again, if somebody saves it."""
        found = self.known.get(t)
        if found is None:
            self.known[t] = found = _Kept()
        return found

    def pack(self, t: Tensor) -> _Kept | _Again | _View:
        """What is saved in a tensor's place."""
        found = self.known.get(t)
        if found is None and self.cast is not None and self.cast.makes(t):
            found = self.cast.kept
        if isinstance(found, _Kept):
            found.keep(t, self.outer)
            return found
        whole = self.computed(t)
        if whole is None:
            found = _Kept()
            found.keep(t, self.outer)
            return found
        return whole.want() if found is whole else _View(whole.want(), t.shape)

    def computed(self, t: Tensor) -> _Again | None:
        """What computes a tensor again, or the one that it is a view of all of."""
        whole = t._base if t._is_view() and t._base is not None else t
        found = self.known.get(whole)
        is_all = t.numel() == whole.numel() and t.is_contiguous() and whole.is_contiguous()
        return found if isinstance(found, _Again) and (t is whole or is_all) else None

    def tie(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """What a layer saves is computed again no earlier than its output's gradient."""
        found = self.computed(args[0]) if self.is_on and args and args[0].device.type == "xla" else None
        for t in output if isinstance(output, tuple) else (output,):
            if found is not None and t is not None and t.requires_grad:
                t.register_hook(found.wait_for)


class _Cast:
    """A tensor in another dtype, which a norm saves in the place of its input.

    Args:
        x: The input.
    """

    def __init__(self, x: Tensor):
        self.edge, self.kept = _edge(x), _Kept()

    def makes(self, t: Tensor) -> bool:
        """Whether t is made of x by a cast."""
        made_by = t.grad_fn
        return made_by is not None and made_by.name() == "ToCopyBackward0" and made_by.next_functions == (self.edge,)


class _Norm:
    """A norm: its output is computed again from its input, or from that in a wider dtype."""

    def __init__(self, forward: _Forward):
        self.forward = forward
        self.input: _Kept | _Again | None = None

    def enter(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Before its forward."""
        if self.forward.is_on:
            self.input, self.forward.cast = self.forward.expect(args[0]), _Cast(args[0])

    def leave(self, module: nn.Module, args: tuple[Any, ...], y: Tensor) -> None:
        """After it."""
        kept, cast, self.input, self.forward.cast = self.input, self.forward.cast, None, None
        if kept is None or cast is None:
            return
        source = kept if kept.is_there else cast.kept
        if not source.is_there:  # then its backward is not wanted
            return
        shell, dtype = copy.copy(module), args[0].dtype
        shell._parameters = dict(module._parameters)  # those of this call: torch.func.functional_call takes them away
        self.forward.known[y] = _Again(lambda x: shell.forward(x.to(dtype)), source)


class _Product:
    """act(gate) * up, and act(gate): computed again from gate and up."""

    def __init__(self, forward: _Forward):
        self.forward = forward
        self.gate: _Kept | _Again | None = None
        self.factors: list[tuple[_Kept | _Again, tuple[Any, int]]] = []  # what gives each again, and its edge

    def enter(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Before act's forward."""
        if self.forward.is_on:
            self.gate = self.forward.expect(args[0])

    def leave(self, module: nn.Module, args: tuple[Any, ...], y: Tensor) -> None:
        """After it."""
        gate, self.gate = self.gate, None
        if gate is None:
            return
        if gate.is_there:
            self.forward.known[y] = _Again(module.forward, gate)
        self.factors = [(self.forward.expect(y), _edge(y))]

    def note_up(self, module: nn.Module, args: object, y: Tensor) -> None:
        """After up_proj."""
        if self.forward.is_on:
            self.factors.append((self.forward.expect(y), _edge(y)))

    def note_product(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Before down_proj."""
        factors, self.factors = self.factors, []
        product, edges = args[0], tuple(edge for _, edge in factors)
        made_by = product.grad_fn
        if made_by is None or made_by.name() != "MulBackward0" or made_by.next_functions != edges:
            return
        sources = [source for source, _ in factors]
        if all(source.is_there for source in sources):
            self.forward.known[product] = _Again(torch.mul, *sources)
        if isinstance(sources[0], _Again) and product.device.type == "xla":
            product.register_hook(sources[0].wait_for)
