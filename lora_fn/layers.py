"""What does each kind compute? `apply`: the whole layer, base and update, as one pure function.

Shapes: T... are the leading (token) dimensions, logical on the outside of the layer; i, o the local input and output
features; r the LoRA rank. Under sequence parallel one leading dimension is cut over the axis.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_fn import collectives, sharding
from lora_fn.dropout import TOKEN_STRIDE, dropout, fold_in, wide, wrap
from lora_fn.errors import SpecError
from lora_fn.spec import LayerSpec

Params = Mapping[str, Tensor]


def apply(
    params: Params,
    x: Tensor,
    spec: LayerSpec,
    *,
    index: Tensor | None = None,
    key: Tensor | None = None,
    scaling: Tensor | None = None,
) -> Any:
    """One layer: base and LoRA update.

    Args:
        params: This process's tensors, by name: `weight`, `bias`, and where `spec.rank` > 0 `lora_A`, `lora_B`,
            `lora_B_bias`; of a fused layer, the factors of each adapted part (`lora_A.q`). Their names are
            `sharding.names`, their shapes `sharding.local_shape`. Factors may have another dtype than the base: they
            are cast to that of the activations.
        x: [T..., in] activations in the base's dtype; for an embedding, integer ids [T...].
        spec: The layer.
        index: int tensor [] or [1], this process's place on the axis. Needed where the axis is mapped by torch.vmap
            (then `torch.arange(size)`, mapped), and in traced SPMD graphs (there [1]: torch_xla writes the scalars 0
            and 1 into the graph, which would not be the same for all); elsewhere the bound axis knows it.
        key: int tensor []. Drops inputs of lora_A with `spec.dropout`; None drops nothing (evaluation).
        scaling: [number of `spec.updates`], in place of each one's alpha / rank: data, so that another alpha is not
            another graph.

    Returns:
        [T..., out]: sharded over the last dimension for a column layer that does not gather, over `sequence_dim` for a
        row or embedding layer under sequence parallel, partial for a row layer that does not reduce, else whole. The
        last dimension of a fused column layer holds this process's part of each part, one after the other; a "qkv"
        layer returns them as a tuple.

    Raises:
        SpecError: Parameters that do not fit the spec, an unbound axis, an input without the dimension `sequence_dim`,
            a sequence that the axis does not divide.

    Example:
        >>> spec = LayerSpec(kind="linear", in_features=3, out_features=2, rank=1, alpha=2.0)
        >>> params = {"weight": torch.zeros(2, 3), "lora_A": torch.ones(1, 3), "lora_B": torch.ones(2, 1)}
        >>> apply(params, torch.ones(3), spec)
        tensor([6., 6.])
    """
    sharding.check_names(set(params), spec)
    if spec.kind not in _LAYERS:
        raise SpecError(
            f"a {spec.kind} layer is trained but not adapted, and has no forward here; call the module's own."
        )
    leading = x.dim() - (spec.kind != "embedding")
    if spec.sequence_dim is not None and spec.sequence_dim >= leading:
        raise SpecError(
            f"a {spec.kind} layer with sequence_dim {spec.sequence_dim}: its input has {leading} dimensions of tokens, "
            f"expected at least {spec.sequence_dim + 1}; give it the sequence."
        )
    at = _At(spec, index, key, scaling)
    layer = _fused if spec.parts else _LAYERS[spec.kind]
    return layer({name: at.summed(name, p) for name, p in params.items()}, x, at)


@dataclass(frozen=True, slots=True)
class _At:
    """A layer at a place: its spec, this process's index, its key, and the scaling of each update."""

    spec: LayerSpec
    index: Tensor | None
    key: Tensor | None
    scaling: Tensor | None

    def scaled(self, h: Tensor, number: int) -> Tensor:
        """h times the scaling of an update, in h's dtype."""
        if self.scaling is None:
            return h * self.spec.scaling_of(self.spec.updates[number])
        return (h * self.scaling[number : number + 1]).to(h.dtype)  # [1]: see `index` in `apply`

    def summed(self, name: str, param: Tensor) -> Tensor:
        """The parameter, its gradient summed over the axis in the backward where it is partial and the mode says so."""
        if self.spec.gradients == "summed" and sharding.partial(self.spec, name):
            return collectives.copy([param], self.spec.axis, self.index)[0]
        layout = sharding.layout(self.spec, name) if sharding.copied(self.spec, name) else None
        if self.spec.gradients == "summed" and layout is not None:
            return collectives.share(param, layout, self.spec.axis, self.index, dim=0)
        return param

    def collective(
        self, function: Callable[..., list[Tensor]], xs: list[Tensor], **where: int | str | bool | None
    ) -> list[Tensor]:
        return function(xs, self.spec.axis, self.index, **where)

    def down(self, params: Params, x: Tensor, *, features_cut: bool = False) -> list[Tensor]:
        """[scaling * dropout(x) A^T] of each lora_A, in the order of the parts; [] where there is no adapter."""
        updates = self.spec.updates[:1] if self.spec.share_A else self.spec.updates
        found = []
        for number, part in enumerate(updates):
            dropped = x
            if self.key is not None and self.spec.dropout > 0:
                key = fold_in(self.key, part.number) if self.spec.parts else self.key
                dropped = dropout(x, key, *self._numbers(x, features_cut), self.spec.dropout)
            factor = params["lora_A" if self.spec.share_A else part.param("lora_A")]
            found.append(self.scaled(F.linear(dropped, factor.to(x.dtype)), number))
        return found

    def _numbers(self, x: Tensor, features_cut: bool) -> tuple[Tensor, Tensor]:
        """The logical numbers of x's tokens (see dropout), int32 [T..., 1], and features, int32 [in]."""
        place = collectives.place(self.spec.axis, self.index)
        tokens = torch.zeros((), dtype=torch.int32, device=x.device)
        stride = 1  # not a size, so that a sequence that is padded keeps its numbers
        for dim in reversed(range(x.dim() - 1)):
            cut = self.spec.input == "sharded" and dim == self.spec.sequence_dim
            numbers = torch.arange(x.shape[dim], dtype=torch.int32, device=x.device)
            numbers = (numbers + place * x.shape[dim]).to(torch.int32) if cut else numbers
            tokens = tokens + (wide(numbers) * stride).view(-1, *(1,) * (x.dim() - 1 - dim))
            stride = wrap(stride * TOKEN_STRIDE)
        features = torch.arange(x.shape[-1], dtype=torch.int32, device=x.device)
        if features_cut and self.spec.heads is not None:
            features = sharding.input_layout(self.spec).places(place).to(x.device, torch.int32)
        elif features_cut:
            features = (features + place * x.shape[-1]).to(torch.int32)
        return tokens.to(torch.int32).expand(*x.shape[:-1], 1), features


def _up(params: Params, h: Tensor, name: str = "lora_B") -> Tensor:
    return F.linear(h, params[name].to(h.dtype))


def _add(y: Tensor, params: Params, update: list[Tensor]) -> Tensor:
    """y + H B^T, where there is an adapter."""
    return y + _up(params, update[0]) if update else y


def _biased(y: Tensor, params: Params, at: _At) -> Tensor:
    """y with the adapter's bias."""
    return y + at.scaled(params["lora_B_bias"].to(y.dtype), 0) if at.spec.lora_bias else y


def _linear(params: Params, x: Tensor, at: _At) -> Tensor:
    weight = params["weight"].T if at.spec.fan_in_fan_out else params["weight"]
    y = F.linear(x, weight, params.get("bias"))
    return _biased(_add(y, params, at.down(params, x)), params, at)


def _entered(params: Params, x: Tensor, at: _At) -> tuple[Tensor, list[Tensor]]:
    """The x of a column layer, whole, and the H of each of its lora_A."""
    spec = at.spec
    if spec.input == "sharded":
        x, *update = at.collective(
            collectives.gather_partial, [x, *at.down(params, x)], dim=spec.sequence_dim, dtype=spec.reduce_dtype
        )
        return x.contiguous(), update  # a matrix product may round otherwise where x is a view into [X | H]
    if spec.input == "replicated":
        [x] = at.collective(collectives.copy, [x], dtype=spec.reduce_dtype)
    return x, at.down(params, x)


def _column(params: Params, x: Tensor, at: _At) -> Tensor:
    spec = at.spec
    x, update = _entered(params, x, at)
    if not spec.gather_output:
        return _biased(_add(F.linear(x, params["weight"], params.get("bias")), params, update), params, at)
    [y] = at.collective(collectives.gather, [_add(F.linear(x, params["weight"]), params, update)], dim=-1)
    y = y[..., : spec.out_features]
    return _biased(y + params["bias"] if spec.bias else y, params, at)


def _fused(params: Params, x: Tensor, at: _At) -> Tensor | tuple[Tensor, ...]:
    spec = at.spec
    x, hs = _entered(params, x, at)
    if spec.fuse_qkv:
        layout = sharding.layout(spec, "weight")
        assert layout is not None
        y = F.linear(x, params["weight"], params.get("bias"))
        ys = dict(zip(layout.local_sizes, y.split(list(layout.local_sizes.values()), -1), strict=True))
    else:
        ys = {p.name: F.linear(x, params[p.param("weight")], params.get(p.param("bias"))) for p in spec.parts}
    for number, part in enumerate(spec.updates):
        ys[part.name] = ys[part.name] + _up(params, hs[0 if spec.share_A else number], part.param("lora_B"))
        if spec.lora_bias:
            ys[part.name] = ys[part.name] + at.scaled(params[part.param("lora_B_bias")].to(x.dtype), number)
    return tuple(ys.values()) if spec.kind == "qkv" else torch.cat(list(ys.values()), -1)


def _row(params: Params, x: Tensor, at: _At) -> Tensor:
    spec = at.spec
    if not spec.input_is_parallel:
        [x] = at.collective(collectives.split, [x], dim=-1)
    y = _reduced(F.linear(x, params["weight"]), params, at.down(params, x, features_cut=True), at)
    return _biased(y + params["bias"] if spec.bias else y, params, at)


def _reduced(y: Tensor, params: Params, update: list[Tensor], at: _At) -> Tensor:
    """The partial Y and H, summed over the axis as the rules table's scheme says, and the update added."""
    spec = at.spec
    if spec.sequence_dim is not None:
        # A frozen embedding has no backward: there, only H's gradient is to be gathered.
        y, *update = at.collective(
            collectives.reduce_scatter,
            [y, *update],
            dim=spec.sequence_dim,
            dtype=spec.reduce_dtype,
            apart=spec.kind == "embedding",
        )
        return _add(y, params, update)
    y = _add(y, params, update)
    return at.collective(collectives.reduce, [y], dtype=spec.reduce_dtype)[0] if spec.reduce_output else y


def _embedding(params: Params, ids: Tensor, at: _At) -> Tensor:
    spec = at.spec
    weight = params["weight"]
    if spec.axis.size == 1 or spec.shard_across_embedding:
        rows, inside = ids, None
    else:
        rows = ids - collectives.place(spec.axis, at.index) * weight.shape[0]
        inside = (rows >= 0) & (rows < weight.shape[0])
        rows = torch.where(inside, rows, 0)

    def look_up(table: Tensor) -> Tensor:
        found = F.embedding(rows, table)
        if spec.padding_idx is not None:
            found = torch.where((ids == spec.padding_idx)[..., None], found.detach(), found)
        return found if inside is None else torch.where(inside[..., None], found, 0)

    y = look_up(weight)
    update = [at.scaled(look_up(params["lora_A"].T).to(y.dtype), 0)] if spec.rank else []
    if not spec.shard_across_embedding:
        return _reduced(y, params, update, at)
    [y] = at.collective(collectives.gather, [_add(y, params, update)], dim=-1)
    return y if spec.sequence_dim is None else at.collective(collectives.split, [y], dim=spec.sequence_dim)[0]


_LAYERS: Mapping[str, Callable[[Params, Tensor, _At], Any]] = {
    "linear": _linear,
    "column": _column,
    "qkv": _fused,
    "row": _row,
    "embedding": _embedding,
}
