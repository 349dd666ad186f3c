"""Where is communication? Here: the only file that names the collective operations of torch.distributed and torch_xla.

Each public function is one half of a conjugate pair (Megatron-LM, arXiv 1909.08053, section 3): it is written for one
process, and so is its backward, under the convention that what is whole on every process has one and the same
cotangent on every process.

    function         forward           backward
    copy             identity          all-reduce          whole -> used by sharded computation
    reduce           all-reduce        identity            partial -> whole
    gather           all-gather        split               sharded -> whole
    split            split             all-gather          whole -> sharded
    gather_partial   all-gather        reduce-scatter      sharded -> used by sharded computation
    reduce_scatter   reduce-scatter    all-gather          partial -> sharded
    share            identity          sum over copies     in several places -> used in each of them

They work on a process group, on XLA's replica groups, or on a dimension that `torch.vmap` maps over: then `index` is
`torch.arange(size)`, mapped, and the level of vmap at which it is batched *is* the axis. Every other level is an
ordinary batch. Under a mapped axis, too, every lane is a process: seed each lane's (equal) loss with 1, as in
`vmap(grad(loss))` or `vmap(loss)(...).sum().backward()`.

Several tensors of one call ride one collective, side by side along their last dimension.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lora_fn.axis import Axis
from lora_fn.errors import SpecError
from lora_fn.layout import Layout

_ADJOINT = {
    "copy": "reduce",
    "reduce": "copy",
    "gather": "split",
    "split": "gather",
    "gather_partial": "reduce_scatter",
    "reduce_scatter": "gather_partial",
    "share": "sum_copies",
    "sum_copies": "share",
}


def copy(xs: Sequence[Tensor], axis: Axis, index: Tensor | None = None, *, dtype: str | None = None) -> list[Tensor]:
    """Tensors that are whole on every process, unchanged; their gradients are summed over the axis.

    Args:
        xs: Tensors, equal in all dimensions but the last.
        axis: The axis; of size 1, nothing happens.
        index: int tensor [] or [1], this process's place; needed where the axis is mapped.
        dtype: Name of the dtype to sum narrower tensors in; None for the tensors' own.
    """
    return _run("copy", xs, axis, index, dim=0, dtype=dtype)


def reduce(xs: Sequence[Tensor], axis: Axis, index: Tensor | None = None, *, dtype: str | None = None) -> list[Tensor]:
    """The sums over the axis; gradients pass unchanged. Args as in `copy`."""
    return _run("reduce", xs, axis, index, dim=0, dtype=dtype)


def gather(xs: Sequence[Tensor], axis: Axis, index: Tensor | None = None, *, dim: int) -> list[Tensor]:
    """All parts joined along `dim`; of the gradient, every process keeps its part. Args as in `copy`."""
    return _run("gather", xs, axis, index, dim=dim, dtype=None)


def split(xs: Sequence[Tensor], axis: Axis, index: Tensor | None = None, *, dim: int) -> list[Tensor]:
    """This process's part along `dim`; gradients are gathered. Args as in `copy`.

    Raises:
        SpecError: The size does not divide.
    """
    return _run("split", xs, axis, index, dim=dim, dtype=None)


def gather_partial(
    xs: Sequence[Tensor], axis: Axis, index: Tensor | None = None, *, dim: int, dtype: str | None = None
) -> list[Tensor]:
    """All parts joined along `dim`; the gradients, partial sums, are reduce-scattered. Args as in `copy`.

    Each comes contiguous: a matrix product may round otherwise where x is a view into [X | H], and who keeps a view
    keeps all of it. Only the gradients that are wanted ride back.
    """
    if len(xs) == 1 or axis.size == 1:
        return [x.contiguous() for x in _run("gather_partial", xs, axis, index, dim=dim, dtype=dtype)]
    values = _run("gather_partial", [x.detach() for x in xs], axis, index, dim=dim, dtype=dtype)
    values = [value.contiguous() for value in values]
    return list(_Attached.apply(index, "gather_partial", dim % xs[0].dim(), dtype, axis, None, *values, *xs))


def reduce_scatter(
    xs: Sequence[Tensor],
    axis: Axis,
    index: Tensor | None = None,
    *,
    dim: int,
    dtype: str | None = None,
    apart: bool = False,
) -> list[Tensor]:
    """This process's part along `dim` of the sums over the axis; gradients are gathered. Args as in `copy`.

    Args:
        apart: Gather the gradients one by one, so that the gradient of a tensor that wants none costs nothing.

    Raises:
        SpecError: The size does not divide.
    """
    if not apart or axis.size == 1:
        return _run("reduce_scatter", xs, axis, index, dim=dim, dtype=dtype)
    values = _run("reduce_scatter", [x.detach() for x in xs], axis, index, dim=dim, dtype=dtype)
    more = (index, "reduce_scatter", dim % xs[0].dim(), dtype, axis, None)
    return [_Attached.apply(*more, value, x)[0] for value, x in zip(values, xs, strict=True)]


def share(x: Tensor, layout: Layout, axis: Axis, index: Tensor | None = None, *, dim: int) -> Tensor:
    """A tensor whose elements lie in several places along `dim`, unchanged; their gradients are summed over those.

    Args:
        x: Local; its `dim` is laid out by `layout`.
        layout: With copies.
        axis, index: As in `copy`.
    """
    _refuse_transforms_in_compile()
    return _Collective.apply(x, index, "share", dim % x.dim(), None, axis, None, layout)


def spread(x: Tensor, layout: Layout, place: Tensor | int, *, dim: int, fill: float | None = None) -> Tensor:
    """What a process holds, at its places in the (padded) canonical dimension, in front: [canonical, ...].

    Args:
        x: Local; its `dim` is laid out by `layout`.
        layout: Without padding but at the end.
        place: This process's.
        dim: The dimension.
        fill: What the other places hold, and then copies must be equal; None: zeros, and copies are added up.
    """
    rows, first = layout.places(place).to(x.device), x.movedim(dim, 0)
    empty = first.new_full((layout.size, *first.shape[1:]), 0.0 if fill is None else fill)
    return empty.index_add(0, rows, first) if fill is None else empty.index_copy(0, rows, first)


def pick(whole: Tensor, layout: Layout, place: Tensor | int, *, dim: int) -> Tensor:
    """A process's elements of what `spread` gave."""
    return whole.index_select(0, layout.places(place).to(whole.device)).movedim(0, dim)


def maximum(x: Tensor, axis: Axis, index: Tensor | None = None) -> Tensor:
    """The elementwise maximum over the axis, without a gradient."""
    return x.detach() if axis.size == 1 else _Collective.apply(x.detach(), index, "maximum", 0, None, axis, None, None)


def reduce_flat(xs: Sequence[Tensor], axis: Axis, index: Tensor | None = None) -> list[Tensor]:
    """The sums over the axis of tensors of any shapes, in one collective per dtype."""
    return start_flat(xs, axis, index)()


def start_flat(xs: Sequence[Tensor], axis: Axis, index: Tensor | None = None) -> Callable[[], list[Tensor]]:
    """`reduce_flat`, begun: what is returned waits for the sums, and gives them.

    Every process begins the same ones in the same order. Over a process group they go on beside what is computed in
    between; on XLA they are part of a graph, whose compiler puts them where it wants. What is differentiated, mapped
    or compiled is summed at once.
    """
    if axis.size == 1 or not xs:
        return lambda: list(xs)
    begun = []
    for dtype in dict.fromkeys(x.dtype for x in xs):
        where = [i for i, x in enumerate(xs) if x.dtype == dtype]
        begun.append((where, _start_reduce(torch.cat([xs[i].reshape(-1) for i in where]), axis, index)))

    def wait() -> list[Tensor]:
        out: dict[int, Tensor] = {}
        for where, flat in begun:
            for i, part in zip(where, flat().split([xs[i].numel() for i in where]), strict=True):
                out[i] = part.view(xs[i].shape)
        return [out[i] for i in range(len(xs))]

    return wait


def _start_reduce(x: Tensor, axis: Axis, index: Tensor | None) -> Callable[[], Tensor]:
    if (
        x.device.type == "xla"
        or x.requires_grad
        or not axis.bound
        or torch.compiler.is_compiling()
        or torch._C._functorch.maybe_current_level() is not None
    ):
        [total] = reduce([x], axis, index)
        return lambda: total
    op = _functional()
    begun = op.all_reduce(x, "sum", axis.group)
    return lambda: op.wait_tensor(begun)


def broadcast(xs: Sequence[Tensor], axis: Axis, index: Tensor | None = None) -> list[Tensor]:
    """What the first process of the axis has, on all of them, without a gradient; tensors of any shapes.

    A sum in which only the first process's summand is not zero: every backend has sums.
    """
    is_first = torch.as_tensor(place(axis, index) == 0)
    given = [torch.where(is_first.to(x.device), x.detach(), torch.zeros_like(x)) for x in xs]
    return reduce_flat(given, axis, index)


def barrier() -> None:
    """Wait for all processes, where torch.distributed has several. (The barrier of "xla" there waits for nobody.)"""
    if dist.is_initialized() and dist.get_backend() == "xla":
        import torch_xla.core.xla_model as xm

        xm.rendezvous("lora_fn")
    elif dist.is_initialized():
        dist.barrier()


def place(axis: Axis, index: Tensor | None) -> Tensor | int:
    """This process's place on the axis: `index` where given, else what the axis was bound to.

    Raises:
        SpecError: The axis has more than one process, is not bound, and no index was given.
    """
    if index is not None:
        return index.reshape(())
    if axis.size == 1:
        return 0
    if axis.index is None:
        raise SpecError(_unbound(axis))
    return axis.index


def _unbound(axis: Axis) -> str:
    return (
        f"axis {axis.name!r}: has {axis.size} processes but is bound to no process group; "
        f"call spec.bind(mesh), or map over it with torch.vmap and index=torch.arange({axis.size})."
    )


def _run(
    op: str, xs: Sequence[Tensor], axis: Axis, index: Tensor | None, *, dim: int, dtype: str | None
) -> list[Tensor]:
    if axis.size == 1:
        return list(xs)
    if index is None and not axis.bound:
        raise SpecError(_unbound(axis))
    _refuse_transforms_in_compile()
    dim = dim % xs[0].dim()
    if op in ("split", "reduce_scatter") and xs[0].shape[dim] % axis.size:
        raise SpecError(
            f"axis {axis.name!r}: a dimension of size {xs[0].shape[dim]} cannot be cut into {axis.size} equal parts; "
            f"pad it to a multiple of {axis.size}."
        )
    if op in ("copy", "split") or len(xs) == 1:
        return [_Collective.apply(x, index, op, dim, dtype, axis, None, None) for x in xs]
    joined = _Collective.apply(torch.cat(list(xs), -1), index, op, dim, dtype, axis, None, None)
    return list(joined.split([x.shape[-1] for x in xs], -1))


def _refuse_transforms_in_compile() -> None:
    """Dynamo (torch 2.9, 2.13) ignores a Function's backward and vmap rule where torch.func.grad or vmap is inside the
    compiled region, without a word. This does not compile there, and vanishes elsewhere. (Compile inside the transform,
    or use torch.autograd.grad.)"""
    if torch.compiler.is_compiling():
        torch._C._functorch.maybe_current_level()


def _stacked(x: Tensor, at: int | None, size: int) -> Tensor:
    """x with the dimension that vmap maps in front."""
    return x.unsqueeze(0).expand(size, *x.shape) if at is None else x.movedim(at, 0)


def _lane(
    info: Any, index: Tensor | None, index_at: int | None, axis: Axis, lane: int | None
) -> tuple[Tensor | None, int | None]:
    """The index and the lane one level of vmap further out: this level is the axis where it batches the index."""
    if lane is not None or index_at is None:
        return index, None if lane is None else lane + 1
    if info.batch_size != axis.size:
        raise SpecError(
            f"axis {axis.name!r}: vmap maps {info.batch_size} lanes, the spec says {axis.size}; make them equal."
        )
    return None, 0


class _Collective(torch.autograd.Function):
    """One collective over one axis. `lane` is the physical dimension of a mapped axis, None for a real one."""

    @staticmethod
    def forward(
        x: Tensor,
        index: Tensor | None,
        op: str,
        dim: int,
        dtype: str | None,
        axis: Axis,
        lane: int | None,
        layout: Layout | None,
    ) -> Tensor:
        if op in ("copy", "share"):
            return x.view_as(x)
        if layout is not None:
            return _sum_copies(x, dim, axis, index, lane, layout)
        before = x.dtype
        if dtype is not None and op in ("reduce", "reduce_scatter"):
            x = x.to(torch.promote_types(before, getattr(torch, dtype)))
        if lane is not None:
            return _MAPPED[op](x, lane, dim, axis.size).to(before)
        if not axis.bound:
            raise SpecError(_unbound(axis))
        return (_XLA if x.device.type == "xla" else _GROUP)[op](x, dim, axis, index).to(before)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, index, ctx.op, ctx.dim, ctx.dtype, ctx.axis, ctx.lane, ctx.layout = inputs
        ctx.save_for_backward(index)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (index,) = ctx.saved_tensors
        op = _ADJOINT[ctx.op]
        out = _Collective.apply(grad, index, op, ctx.dim, ctx.dtype, ctx.axis, ctx.lane, ctx.layout)
        return out, *(None,) * 7

    @staticmethod
    def vmap(
        info: Any,
        in_dims: tuple[int | None, ...],
        x: Tensor,
        index: Tensor | None,
        op: str,
        dim: int,
        dtype: str | None,
        axis: Axis,
        lane: int | None,
        layout: Layout | None,
    ) -> tuple[Tensor, int]:
        index, lane = _lane(info, index, in_dims[1], axis, lane)
        x = _stacked(x, in_dims[0], info.batch_size)
        return _Collective.apply(x, index, op, dim + 1, dtype, axis, lane, layout), 0


class _Attached(torch.autograd.Function):
    """Values that a collective has computed elsewhere, as functions of the tensors that they were computed from.

    The gradients that are wanted ride one collective; a tensor that wants none costs nothing.
    """

    @staticmethod
    def forward(
        index: Tensor | None,
        op: str,
        dim: int,
        dtype: str | None,
        axis: Axis,
        lane: int | None,
        *values_and_xs: Tensor,
    ) -> tuple[Tensor, ...]:
        return tuple(value.view_as(value) for value in values_and_xs[: len(values_and_xs) // 2])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        index, ctx.op, ctx.dim, ctx.dtype, ctx.axis, ctx.lane = inputs[:_BEFORE]
        ctx.wanted = ctx.needs_input_grad[_BEFORE + len(output) :]
        ctx.mark_non_differentiable(*(y for y, wanted in zip(output, ctx.wanted, strict=True) if not wanted))
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(index)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        (index,) = ctx.saved_tensors
        out: list[Tensor | None] = [None] * len(grads)
        given = [(i, grad) for i, grad in enumerate(grads) if ctx.wanted[i] and grad is not None]
        if given:
            joined = given[0][1] if len(given) == 1 else torch.cat([grad for _, grad in given], -1)
            joined = _Collective.apply(joined, index, _ADJOINT[ctx.op], ctx.dim, ctx.dtype, ctx.axis, ctx.lane, None)
            parts = joined.split([grad.shape[-1] for _, grad in given], -1)
            for (i, _), part in zip(given, parts, strict=True):
                out[i] = part
        return *(None,) * (_BEFORE + len(grads)), *out

    @staticmethod
    def vmap(
        info: Any,
        in_dims: tuple[int | None, ...],
        index: Tensor | None,
        op: str,
        dim: int,
        dtype: str | None,
        axis: Axis,
        lane: int | None,
        *values_and_xs: Tensor,
    ) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        index, lane = _lane(info, index, in_dims[0], axis, lane)
        tensors = [_stacked(t, at, info.batch_size) for t, at in zip(values_and_xs, in_dims[_BEFORE:], strict=True)]
        out = _Attached.apply(index, op, dim + 1, dtype, axis, lane, *tensors)
        return out, (0,) * len(out)


_BEFORE = 6  # arguments of `_Attached` before its tensors


def _in_order(parts: Sequence[Tensor]) -> Tensor:
    """Their sum, every element's summands in the same order.

    torch.sum and gloo's reduce-scatter choose the order by an element's place in memory, so that a Y which has an H
    beside it would come out otherwise than Y alone.
    """
    return functools.reduce(torch.add, parts)


def _sum_copies(x: Tensor, dim: int, axis: Axis, index: Tensor | None, lane: int | None, layout: Layout) -> Tensor:
    """Every element as the sum of itself and its copies: added up in the canonical dimension, and picked from there."""
    if lane is None:
        at = place(axis, index)
        whole = spread(x, layout, at, dim=dim)
        if axis.size > 1:
            whole = (_XLA if x.device.type == "xla" else _GROUP)["reduce"](whole, 0, axis, index)
        return pick(whole, layout, at, dim=dim)
    slots = x.movedim((lane, dim), (0, 1))
    rows = layout.places(torch.arange(axis.size, device=x.device)).flatten()
    whole = slots.new_zeros((layout.size, *slots.shape[2:])).index_add(0, rows, slots.flatten(0, 1))
    return whole.index_select(0, rows).unflatten(0, slots.shape[:2]).movedim((0, 1), (lane, dim))


# A mapped axis: x has the axis at `lane`, before the logical dimensions; `dim` is physical.


def _mapped_reduce(x: Tensor, lane: int, dim: int, size: int) -> Tensor:
    return x.sum(lane, keepdim=True).expand_as(x)


def _mapped_maximum(x: Tensor, lane: int, dim: int, size: int) -> Tensor:
    return x.amax(lane, keepdim=True).expand_as(x)


def _mapped_gather(x: Tensor, lane: int, dim: int, size: int) -> Tensor:
    whole = x.movedim(lane, dim - 1).flatten(dim - 1, dim).unsqueeze(lane)
    return whole.expand(*(size if d == lane else n for d, n in enumerate(whole.shape)))


def _mapped_split(x: Tensor, lane: int, dim: int, size: int) -> Tensor:
    return x.unflatten(dim, (size, -1)).diagonal(0, lane, dim).movedim(-1, lane)


def _mapped_reduce_scatter(x: Tensor, lane: int, dim: int, size: int) -> Tensor:
    return _in_order(x.unbind(lane)).unflatten(dim - 1, (size, -1)).movedim(dim - 1, lane)


_MAPPED = {
    "reduce": _mapped_reduce,
    "maximum": _mapped_maximum,
    "gather": _mapped_gather,
    "gather_partial": _mapped_gather,
    "split": _mapped_split,
    "reduce_scatter": _mapped_reduce_scatter,
}


# A process group: the functional collectives, waited for.


def _functional() -> Any:
    """torch's functional collectives, and (by an import, which takes a while) what they do to meta tensors."""
    from torch.distributed import _functional_collectives  # noqa: F401

    return torch.ops._c10d_functional


def _group_reduce(x: Tensor, dim: int, axis: Axis, index: Tensor | None) -> Tensor:
    op = _functional()
    return op.wait_tensor(op.all_reduce(x.contiguous(), "sum", axis.group))


def _group_maximum(x: Tensor, dim: int, axis: Axis, index: Tensor | None) -> Tensor:
    op = _functional()
    return op.wait_tensor(op.all_reduce(x.contiguous(), "max", axis.group))


def _group_gather(x: Tensor, dim: int, axis: Axis, index: Tensor | None) -> Tensor:
    op = _functional()
    whole = op.wait_tensor(op.all_gather_into_tensor(x.contiguous(), axis.size, axis.group))
    return whole if dim == 0 else whole.unflatten(0, (axis.size, -1)).movedim(0, dim).flatten(dim, dim + 1)


def _group_reduce_scatter(x: Tensor, dim: int, axis: Axis, index: Tensor | None) -> Tensor:
    op = _functional()
    first = (x if dim == 0 else x.unflatten(dim, (axis.size, -1)).movedim(dim, 0).flatten(0, 1)).contiguous()
    if x.device.type != "cpu":
        return op.wait_tensor(op.reduce_scatter_tensor(first, "sum", axis.size, axis.group))
    lengths = [first.shape[0] // axis.size] * axis.size
    return _in_order(op.wait_tensor(op.all_to_all_single(first, lengths, lengths, axis.group)).split(lengths))


def _split(x: Tensor, dim: int, axis: Axis, index: Tensor | None) -> Tensor:
    at = place(axis, index)
    if isinstance(at, int):
        length = x.shape[dim] // axis.size
        return x.narrow(dim, at * length, length).contiguous()
    return x.unflatten(dim, (axis.size, -1)).index_select(dim, at.reshape(1)).squeeze(dim)


_GROUP = {
    "reduce": _group_reduce,
    "maximum": _group_maximum,
    "gather": _group_gather,
    "gather_partial": _group_gather,
    "split": _split,
    "reduce_scatter": _group_reduce_scatter,
}


# XLA: torch_xla's own collectives with the full mesh of replica groups (its functional all_reduce drops the group).


def _xla_reduce(x: Tensor, dim: int, axis: Axis, index: Tensor | None) -> Tensor:
    import torch_xla.core.xla_model as xm

    return xm.all_reduce(xm.REDUCE_SUM, x, groups=_replica_groups(axis))


def _xla_maximum(x: Tensor, dim: int, axis: Axis, index: Tensor | None) -> Tensor:
    import torch_xla.core.xla_model as xm

    return xm.all_reduce(xm.REDUCE_MAX, x, groups=_replica_groups(axis))


def _xla_gather(x: Tensor, dim: int, axis: Axis, index: Tensor | None) -> Tensor:
    import torch_xla.core.xla_model as xm

    return xm.all_gather(x, dim=dim, groups=_replica_groups(axis), pin_layout=False)


def _xla_reduce_scatter(x: Tensor, dim: int, axis: Axis, index: Tensor | None) -> Tensor:
    import torch_xla.core.xla_model as xm

    return xm.reduce_scatter(xm.REDUCE_SUM, x, 1.0, dim, axis.size, groups=_replica_groups(axis), pin_layout=False)


def _replica_groups(axis: Axis) -> list[list[int]]:
    if axis.groups is None:
        raise SpecError(f"axis {axis.name!r}: XLA needs the replica groups of the whole mesh; call spec.bind(mesh).")
    return [list(group) for group in axis.groups]


_XLA = {
    "reduce": _xla_reduce,
    "maximum": _xla_maximum,
    "gather": _xla_gather,
    "gather_partial": _xla_gather,
    "split": _split,
    "reduce_scatter": _xla_reduce_scatter,
}
