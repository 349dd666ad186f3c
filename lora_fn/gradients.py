"""How do gradients come, get summed, measured and clipped?

Trees here are what a whole model has: {path of the layer: {name of the parameter: tensor}}, with specs
{path: LayerSpec}.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from lora_fn import collectives, sharding
from lora_fn.axis import Axis
from lora_fn.errors import SpecError
from lora_fn.layer_spec import LayerSpec
from lora_fn.reshard import cut_dim

Tree = Mapping[str, Mapping[str, Tensor]]


def value_and_grad(
    f: Callable[..., Tensor], *, ready: Callable[[int, Tensor], object] | None = None
) -> Callable[..., tuple[Tensor, Any]]:
    """A function that returns f's value and its gradient with respect to f's first argument.

    Like torch.func.grad_and_value, but on torch.autograd.backward: no graph of the backward is kept, which halves the
    memory of a training step (torch.func.grad hard-codes create_graph=True, pytorch issue 134612). Outermost only.

    Args:
        f: A function of a tree (nested dicts, lists or tuples) of tensors and other arguments, which returns a scalar;
            or several, of whose sum the gradient is.
        ready: Called in the backward, as soon as the gradient of a tensor is complete, with the tensor's number in the
            flattened tree and the gradient: so what is done with it can begin (see `start_sync`). Not for a tensor that
            f does not use.

    Returns:
        A function of the same arguments -> (value, gradients in the tree's structure). The value is detached; a tensor
        that f does not use gets zeros.

    Raises:
        SpecError: When called inside a torch.func transform.

    Example:
        >>> value_and_grad(lambda p: (p["a"] ** 2).sum())({"a": torch.tensor([3.0])})
        (tensor(9.), {'a': tensor([6.])})
    """

    def run(trainable: Any, *args: Any, **kwargs: Any) -> tuple[Tensor, Any]:
        flat, structure = pytree.tree_flatten(trainable)
        with torch.enable_grad():
            try:
                leaves = [p.detach().requires_grad_() for p in flat]
            except RuntimeError as error:
                raise SpecError(
                    "value_and_grad: called inside a torch.func transform, where it cannot be; "
                    "use torch.func.grad_and_value there."
                ) from error
            if ready is not None:
                for number, leaf in enumerate(leaves):
                    leaf.register_post_accumulate_grad_hook(functools.partial(_told, ready, number))
            value = f(pytree.tree_unflatten(leaves, structure), *args, **kwargs)
            # Not torch.autograd.grad: its result is held by the device's thread until that comes to let it go. On XLA,
            # a step that is quicker would have those gradients among its results, and be another graph than the others.
            torch.autograd.backward(value, torch.ones_like(value), inputs=leaves)
        grads = [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in leaves]
        return value.detach(), pytree.tree_unflatten(grads, structure)

    return run


def _told(ready: Callable[[int, Tensor], object], number: int, leaf: Tensor) -> None:
    """A hook that leaves the gradient as it is."""
    assert leaf.grad is not None
    ready(number, leaf.grad)


def partition(
    tree: Tree, is_trainable: Callable[[str, str], bool]
) -> tuple[dict[str, dict[str, Tensor]], dict[str, dict[str, Tensor]]]:
    """A tree cut in two, trainable and frozen; `combine` joins them again.

    Args:
        tree: {path: {name: tensor}}.
        is_trainable: (path, name) -> bool.

    Returns:
        (trainable, frozen), each {path: {name: tensor}} without empty paths.

    Example:
        >>> partition({"q": {"weight": 1, "lora_A": 2}}, lambda path, name: name.startswith("lora_"))
        ({'q': {'lora_A': 2}}, {'q': {'weight': 1}})
    """
    halves: tuple[dict[str, dict[str, Tensor]], dict[str, dict[str, Tensor]]] = ({}, {})
    for path, params in tree.items():
        for name, p in params.items():
            halves[0 if is_trainable(path, name) else 1].setdefault(path, {})[name] = p
    return halves


def combine(*trees: Tree) -> dict[str, dict[str, Tensor]]:
    """Trees joined into one.

    Raises:
        SpecError: Two trees hold the same parameter.
    """
    whole: dict[str, dict[str, Tensor]] = {}
    for tree in trees:
        for path, params in tree.items():
            twice = sorted(set(params) & set(whole.get(path, {})))
            if twice:
                raise SpecError(f"combine: {path}: {twice} are in two of the trees; keep each in one.")
            whole.setdefault(path, {}).update(params)
    return whole


def sync_gradients(
    grads: Tree, specs: Mapping[str, LayerSpec], *, index: Tensor | None = None
) -> dict[str, dict[str, Tensor]]:
    """The deferred mode's one call: partial gradients of replicated parameters, summed over the axis.

    All layers ride one flat all-reduce per axis and dtype. Layers in the summed mode are left as they are. (So what is
    replicated and has no `apply` here is in the deferred mode, or summed by `summed`.)

    Args:
        grads: {path: {name: gradient}} as the backward left them; each may have dimensions of a batch in front.
        specs: {path: LayerSpec} of every path in grads.
        index: As for `apply`.

    Returns:
        A new tree of the same structure.

    Raises:
        SpecError: Gradients of a path that has no spec.
    """
    return start_sync(grads, specs, index=index)()


def start_sync(
    grads: Tree, specs: Mapping[str, LayerSpec], *, index: Tensor | None = None
) -> Callable[[], dict[str, dict[str, Tensor]]]:
    """`sync_gradients`, begun; args and errors as there.

    Every process begins the same ones in the same order.

    Returns:
        A function that waits for the sums, and returns the tree.
    """
    _check_paths("sync_gradients", grads, specs)
    begun = []
    for axis in dict.fromkeys(specs[path].axis for path in grads):
        todo = [
            (path, name)
            for path, params in grads.items()
            if specs[path].axis == axis
            for name in params
            if is_deferred(specs[path], name)
        ]
        laid_out = [_laid_out(grads[path][name], specs[path], name, index) for path, name in todo]
        begun.append((todo, collectives.start_flat(laid_out, axis, index)))

    def wait() -> dict[str, dict[str, Tensor]]:
        synced = {path: dict(params) for path, params in grads.items()}
        for todo, sums in begun:
            for (path, name), total in zip(todo, sums(), strict=True):
                synced[path][name] = _taken(total, specs[path], name, index)
        return synced

    return wait


def is_deferred(spec: LayerSpec, name: str) -> bool:
    """Whether the backward leaves a parameter's gradient for `sync_gradients` to sum."""
    return spec.gradients == "deferred" and name in sharding.summed_names(spec)


def summed(params: Mapping[str, Tensor], spec: LayerSpec, *, index: Tensor | None = None) -> dict[str, Tensor]:
    """The parameters of a layer, their gradients summed over the axis in the backward as the mode says: where they are
    partial, and where elements lie in several places.

    `apply` does so by itself; what has no `apply` here calls it.

    Args:
        params: This process's tensors, by name; all or some.
        spec: The layer.
        index: As for `apply`.
    """
    if spec.gradients != "summed":
        return dict(params)
    own = sharding.summed_names(spec)
    return {name: _summed(p, spec, name, index) if name in own else p for name, p in params.items()}


def _summed(p: Tensor, spec: LayerSpec, name: str, index: Tensor | None) -> Tensor:
    if sharding.partial(spec, name):
        return collectives.copy([p], spec.axis, index)[0]
    layout = sharding.layout(spec, name) if sharding.copied(spec, name) else None
    return p if layout is None else collectives.share(p, layout, spec.axis, index, dim=cut_dim(spec, name))


def _laid_out(grad: Tensor, spec: LayerSpec, name: str, index: Tensor | None) -> Tensor:
    """What is to be summed over the axis: of a parameter with copies, its gradient at its canonical places."""
    layout = sharding.layout(spec, name)
    if layout is None:
        return grad
    return collectives.spread(grad, layout, collectives.place(spec.axis, index), dim=_last_dim(spec, name))


def _taken(total: Tensor, spec: LayerSpec, name: str, index: Tensor | None) -> Tensor:
    """The inverse of `_laid_out`, of the sum."""
    layout = sharding.layout(spec, name)
    if layout is None:
        return total
    return collectives.pick(total, layout, collectives.place(spec.axis, index), dim=_last_dim(spec, name))


def _last_dim(spec: LayerSpec, name: str) -> int:
    """The dimension that lies over the axis, counted from the last."""
    return cut_dim(spec, name) - len(sharding.canonical_shape(spec, name))


def _check_paths(where: str, grads: Tree, specs: Mapping[str, LayerSpec]) -> None:
    missing = sorted(set(grads) - set(specs))
    if missing:
        raise SpecError(f"{where}: {missing[0]!r} has gradients but no spec; give the specs of all layers.")


def grad_norm(grads: Tree, specs: Mapping[str, LayerSpec], *, index: Tensor | None = None) -> Tensor:
    """The 2-norm of all gradients of the whole model, the same on every process.

    Sharded parameters are summed over the axis, replicated ones count once. Gradients must be synced.

    Args:
        grads: {path: {name: gradient}}.
        specs: {path: LayerSpec}.
        index: As for `apply`.

    Returns:
        A scalar, in fp32 (fp64 where a gradient is).

    Raises:
        SpecError: No gradients at all, or those of a path that has no spec.
    """
    _check_paths("grad_norm", grads, specs)
    if not any(grads.values()):
        raise SpecError("grad_norm: there are no gradients; give those of at least one parameter.")
    squares: dict[tuple[Axis, bool], list[Tensor]] = {}
    for path, params in grads.items():
        for name, grad in params.items():
            layout = sharding.layout(specs[path], name)
            square = grad.detach().to(torch.promote_types(grad.dtype, torch.float32)).square()
            if sharding.copied(specs[path], name) and layout is not None:  # an element with two copies counts half
                copies = layout.copies().to(square.device, square.dtype)
                square = (square.movedim(cut_dim(specs[path], name), -1) / copies).flatten()
            squares.setdefault((specs[path].axis, layout is not None), []).append(square.sum())
    totals = []
    for (axis, cut), terms in squares.items():
        total = torch.stack(terms).sum()
        totals += collectives.reduce([total.reshape(1)], axis, index) if cut else [total.reshape(1)]
    return torch.cat(totals).sum().sqrt()


def clip(grads: Tree, norm: Tensor, max_norm: float | Tensor) -> dict[str, dict[str, Tensor]]:
    """Gradients scaled so that their norm is at most `max_norm`; no host read, the factor stays a tensor.

    Args:
        grads: {path: {name: gradient}}.
        norm: Their norm, from `grad_norm`.
        max_norm: The bound, above 0.
    """
    factor = torch.clamp(max_norm / (norm + 1e-6), max=1.0)
    return {path: {name: g * factor.to(g.dtype) for name, g in params.items()} for path, params in grads.items()}
