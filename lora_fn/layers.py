"""What does each kind compute? `apply`: the whole layer, base and update, as one pure function.

Shapes: T... are the leading (token) dimensions, logical on the outside of the layer; i, o the local input and output
features; r the LoRA rank. Under sequence parallel one leading dimension is cut over the axis. Activations of conv2d are
[..., features, height, width]; of experts, T... begins with the experts.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_fn import collectives, product, quantize, sharding, variants
from lora_fn.autocast import lowered, off
from lora_fn.dropout import TOKEN_STRIDE, Mask, dropped, fold_in, mask, wide, wrap
from lora_fn.errors import SpecError
from lora_fn.gradients import summed
from lora_fn.layer_spec import FusedPart, LayerSpec

Params = Mapping[str, Tensor]


@lowered
def apply(
    params: Params,
    x: Tensor,
    spec: LayerSpec,
    *,
    index: Tensor | None = None,
    key: Tensor | None = None,
    scaling: Tensor | None = None,
    gate: Tensor | None = None,
    hs: Sequence[Tensor] | None = None,
) -> Any:
    """One layer: base and LoRA update.

    Args:
        params: This process's tensors, by name: `weight`, `bias`, and where `spec.rank` > 0 `lora_A`, `lora_B`,
            `lora_B_bias`, and what its variant has; of a fused layer, the factors of each adapted part (`lora_A.q`); of
            a quantised weight, `weight_scale` (see `quantize`).
            Their names are `sharding.names`, their shapes `sharding.local_shape`. Factors may have another dtype than
            the base: they are cast to that of the activations.
        x: [T..., in] activations in the base's dtype; for an embedding, integer ids [T...]; for conv2d, [N, in, H, W]
            (or without N); for experts, [E, ..., in] (or [1, ..., in], the same for all).
        spec: The layer.
        index: int tensor [] or [1], this process's place on the axis. Needed where the axis is mapped by torch.vmap
            (then `torch.arange(size)`, mapped), and in traced SPMD graphs (there [1]: torch_xla writes the scalars 0
            and 1 into the graph, which would not be the same for all); elsewhere the bound axis knows it.
        key: int tensor []. Drops inputs of lora_A with `spec.dropout`; None drops nothing (evaluation).
        scaling: [number of `spec.updates`], in place of each one's alpha / rank: data, so that another alpha is not
            another graph.
        gate: [T...] of the whole tokens, bool or floating; of variant "alora", and needed there: what the update of
            each token is multiplied with.
        hs: [T..., r] of each lora_A, for a layer whose input is "gathered": what the gather brought beside x (see
            `siblings`). None: they are computed from x.

    Returns:
        [T..., out]: sharded over the last dimension for a column layer that does not gather, over `sequence_dim` for a
        row or embedding layer under sequence parallel, partial for a row layer that does not reduce, else whole. The
        last dimension of a fused column layer holds this process's part of each part, one after the other; a "qkv"
        layer returns them as a tuple.

    Raises:
        SpecError: Parameters that do not fit the spec, a kind that has no forward here ("replicated"), an unbound axis,
            an input without the dimension `sequence_dim`, a sequence that the axis does not divide, a gate that is
            missing or that the variant does not take, hs of a layer that gathers its own input.

    Example:
        >>> spec = LayerSpec(kind="linear", in_features=3, out_features=2, rank=1, alpha=2.0)
        >>> params = {"weight": torch.zeros(2, 3), "lora_A": torch.ones(1, 3), "lora_B": torch.ones(2, 1)}
        >>> apply(params, torch.ones(3), spec)
        tensor([6., 6.])
    """
    sharding.check_names(set(params), spec)
    check_call(x, spec, gate, hs)
    params, gains = prepared(summed(params, spec, index=index), spec, index=index, scaling=scaling)
    return computed(params, x, spec, gains=gains, index=index, key=key, scaling=scaling, gate=gate, hs=hs)


def check_call(x: Tensor, spec: LayerSpec, gate: Tensor | None, hs: Sequence[Tensor] | None = None) -> None:
    """Refuse what `apply` cannot compute.

    Raises:
        SpecError: As `apply`.
    """
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
    gated = variants.TABLE[spec.variant].gated
    if gated != (gate is not None):
        raise SpecError(
            f"a layer of variant {spec.variant!r}: gate is {'missing' if gated else 'given'}, expected "
            f"{'one, which says for which tokens its update is active' if gated else 'none'}."
        )
    if hs is not None and spec.input != "gathered":
        raise SpecError(
            f"a {spec.kind} layer whose input is {spec.input!r}: hs are given, expected none unless it is 'gathered'."
        )


@lowered
def down(
    params: Params,
    x: Tensor,
    spec: LayerSpec,
    *,
    index: Tensor | None = None,
    key: Tensor | None = None,
    scaling: Tensor | None = None,
    gate: Tensor | None = None,
    sequence_dim: int,
) -> tuple[Tensor, list[Tensor]]:
    """What a layer whose input is gathered for it makes of this process's part: H, for the gather to bring with it.

    Args:
        params, spec, index, key, scaling, gate: As for `apply`.
        x: [T..., in], the part.
        sequence_dim: The dimension that is cut.

    Returns:
        x itself, through which its gradients come together; and [T..., r] of each lora_A, in the order of the parts.
    """
    own = plain(params, spec, index=index)
    return downed(own, x, spec, index=index, key=key, scaling=scaling, gate=gate, sequence_dim=sequence_dim)


def plain(params: Params, spec: LayerSpec, *, index: Tensor | None = None) -> dict[str, Tensor]:
    """The half of `down` that sees parameters alone: those of a plain update, whatever the variant."""
    return variants.TABLE[spec.variant].plain(summed(params, spec, index=index), spec, index=index)


def downed(
    params: Params,
    x: Tensor,
    spec: LayerSpec,
    *,
    index: Tensor | None = None,
    key: Tensor | None = None,
    scaling: Tensor | None = None,
    gate: Tensor | None = None,
    sequence_dim: int,
) -> tuple[Tensor, list[Tensor]]:
    """The half of `down` that sees the input: args and result as there; params from `plain`."""
    return _At(spec, index, key, scaling, gate, part_of=sequence_dim).down(params, x)


def prepared(
    params: Params, spec: LayerSpec, *, index: Tensor | None = None, scaling: Tensor | None = None
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The half of `apply` that sees parameters alone.

    Args:
        params: From `summed`.
        spec, index, scaling: As for `apply`.

    Returns:
        The parameters that `computed` takes, whatever the variant, those of a plain update; and the gains of the
        outputs, by part.
    """
    variant = variants.TABLE[spec.variant]
    params = variant.plain(params, spec, index=index)
    gains = variant.gains(params, spec, functools.partial(_scaled, spec, scaling), index=index)
    for name, gain in gains.items():
        up = "lora_B" + f".{name}" * bool(name)
        params[up] = params[up] * gain.reshape(gain.shape + (1,) * (params[up].dim() - gain.dim()))
    return params, gains


def computed(
    params: Params,
    x: Tensor,
    spec: LayerSpec,
    *,
    gains: Mapping[str, Tensor],
    index: Tensor | None = None,
    key: Tensor | None = None,
    scaling: Tensor | None = None,
    gate: Tensor | None = None,
    hs: Sequence[Tensor] | None = None,
) -> Any:
    """The half of `apply` that sees the input: args, result and errors as there; params and gains from `prepared`."""
    layer = _fused if spec.parts else _LAYERS[spec.kind]
    return layer(params, x, _At(spec, index, key, scaling, gate, gains, hs))


def updated_weight(
    params: Params, spec: LayerSpec, *, index: Tensor | None = None, scaling: Tensor | None = None
) -> Tensor:
    """The weight with its update in it, for a module that computes by itself.

    What `apply` is to a layer, this is to a raw parameter: gradients of replicated factors are partial by the same
    rules, and are summed in the backward where the spec says so. (`merge` is for weights that stay.)

    Args:
        params: This process's `weight`, `lora_A` and `lora_B`, of a kind whose update is a product of matrices.
        spec: The layer: kind "linear" or "experts", whatever it is cut by, without dropout, a bias or a variant.
        index, scaling: As for `apply`.

    Returns:
        A new tensor of the weight's shape and dtype.

    Raises:
        SpecError: Another kind of layer, or parameters that do not fit the spec.

    Example:
        >>> spec = LayerSpec(kind="linear", in_features=3, out_features=2, rank=1, alpha=2.0)
        >>> updated_weight({"weight": torch.zeros(2, 3), "lora_A": torch.ones(1, 3), "lora_B": torch.ones(2, 1)}, spec)
        tensor([[2., 2., 2.],
                [2., 2., 2.]])
    """
    sharding.check_names(set(params), spec)
    whole = spec.kind in ("linear", "experts") and spec.rank > 0 and spec.variant == "lora"
    if not whole or spec.bias or spec.lora_bias or spec.dropout:
        raise SpecError(
            f"updated_weight: a {spec.kind} layer of rank {spec.rank}, variant {spec.variant!r}, dropout "
            f"{spec.dropout}, bias {spec.bias}, lora_bias {spec.lora_bias}; expected 'linear' or 'experts' with an "
            f"adapter of variant 'lora' and none of the others."
        )
    own = summed(params, spec, index=index)
    weight, down, up = (own[name] for name in ("weight", "lora_A", "lora_B"))
    down, up = _scaled(spec, scaling, down, 0).to(weight.dtype), up.to(weight.dtype)
    left, right = (down.mT, up.mT) if spec.fan_in_fan_out else (up, down)
    product = torch.addmm if weight.dim() == 2 else torch.baddbmm  # nothing of the weight's size but the result
    with off(weight.device):
        return product(weight, left, right)


def _conv2d(x: Tensor, weight: Tensor, spec: LayerSpec) -> Tensor:
    assert spec.window is not None
    return F.conv2d(x, weight, stride=spec.window.stride, padding=spec.window.padding)


def _per_expert(bias: Tensor, y: Tensor) -> Tensor:
    """[E, o] beside y [E, ..., o]."""
    return bias.reshape(bias.shape[0], *(1,) * (y.dim() - 2), -1)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Form:
    """How a kind multiplies.

    Args:
        features: The dimension of activations that holds the features.
        base: (x, weight, spec) -> y.
        down: (x, lora_A, spec) -> h.
        up: (h, lora_B) -> y.
        beside: (bias, y) -> the bias, so that it adds to y.
    """

    features: int = -1
    base: Callable[[Tensor, Tensor, LayerSpec], Tensor] = lambda x, weight, spec: F.linear(x, weight)
    down: Callable[[Tensor, Tensor, LayerSpec], Tensor] = lambda x, factor, spec: F.linear(x, factor)
    up: Callable[[Tensor, Tensor], Tensor] = F.linear
    beside: Callable[[Tensor, Tensor], Tensor] = lambda bias, y: bias


_LINEAR = _Form()
_FORMS: Mapping[str, _Form] = {
    "conv2d": _Form(features=-3, base=_conv2d, down=_conv2d, up=F.conv2d, beside=lambda bias, y: bias[:, None, None]),
    "experts": _Form(
        base=lambda x, weight, spec: torch.einsum(f"e...i,{'eio' if spec.fan_in_fan_out else 'eoi'}->e...o", x, weight),
        down=lambda x, factor, spec: torch.einsum("e...i,eri->e...r", x, factor),
        up=lambda h, factor: torch.einsum("e...r,eor->e...o", h, factor),
        beside=_per_expert,
    ),
}


def _scale(spec: LayerSpec, scaling: Tensor | None, number: int) -> product.Scale:
    """The scaling of an update."""
    if scaling is None:
        return spec.scaling_of(spec.updates[number])
    return scaling if scaling.shape[0] == 1 else scaling[number : number + 1]  # [1]: see `index` in `apply`


def _scaled(spec: LayerSpec, scaling: Tensor | None, h: Tensor, number: int) -> Tensor:
    """h times the scaling of an update, in h's dtype."""
    return product.scaled(h, _scale(spec, scaling, number))


@dataclass(frozen=True, slots=True)
class _At:
    """A layer at a place: its spec, this process's index, its key, the scaling of each update, its gate, what its
    variant multiplies the outputs of a part with (lora_B has it already), its H where they are there already, and the
    dimension that is cut of an x which is gathered later, outside."""

    spec: LayerSpec
    index: Tensor | None
    key: Tensor | None
    scaling: Tensor | None
    gate: Tensor | None
    gains: Mapping[str, Tensor] = field(default_factory=dict)
    hs: Sequence[Tensor] | None = None
    part_of: int | None = None

    @property
    def cut(self) -> int | None:
        """The dimension of x that is cut over the axis; None where x is whole."""
        return self.spec.sequence_dim if self.spec.input == "sharded" else self.part_of

    @property
    def form(self) -> _Form:
        """How the layer multiplies."""
        return _FORMS.get(self.spec.kind, _LINEAR)

    def scale(self, number: int) -> product.Scale:
        """The scaling of an update."""
        return _scale(self.spec, self.scaling, number)

    def scaled(self, h: Tensor, number: int) -> Tensor:
        """h times the scaling of an update, in h's dtype."""
        return _scaled(self.spec, self.scaling, h, number)

    def collective(
        self, function: Callable[..., list[Tensor]], xs: list[Tensor], **where: int | str | bool | None
    ) -> list[Tensor]:
        """A function of `collectives`, over the layer's axis."""
        return function(xs, self.spec.axis, self.index, **where)

    def down(self, params: Params, x: Tensor, *, features_cut: bool = False) -> tuple[Tensor, list[Tensor]]:
        """x, and [scaling * dropout(x) A^T] of each lora_A, in the order of the parts; [] where there is no adapter."""
        if self.hs is not None:
            return x, list(self.hs)
        updates = self.spec.updates[:1] if self.spec.share_A else self.spec.updates
        found = []
        for number, part in enumerate(updates):
            factor = params["lora_A" if self.spec.share_A else part.param("lora_A")]
            if self.spec.kind in _FORMS:
                h = self.form.down(self.dropped(x, part, features_cut=features_cut), factor.to(x.dtype), self.spec)
                h = self.scaled(h, number)
            else:
                mask = self.mask(x, part, features_cut=features_cut)
                x, h = product.forked(x, factor, self.scale(number), mask)
            found.append(self.gated(h, cut=self.cut))
        return x, found if self.spec.scheme is None else self.over_rank(found)

    def over_rank(self, hs: list[Tensor]) -> list[Tensor]:
        """H of factors that the axis cuts over the rank, in one collective: the parts [T..., r / p] gathered to
        [T..., r]; of a row layer the partial sums [T..., r] reduce-scattered to [T..., r / p]."""
        how: dict[str, Any] = {"dim": -1, "dtype": self.spec.reduce_dtype}
        if self.spec.kind == "row":
            return self.collective(collectives.reduce_scatter, hs, **how)
        [whole] = self.collective(collectives.gather_partial, [torch.cat(hs, -1)], **how)
        each = whole.unflatten(-1, (self.spec.axis.size, -1)).split([h.shape[-1] for h in hs], -1)
        return [h.flatten(-2) for h in each]  # of every process a part of each H

    def updated(
        self, params: Params, x: Tensor, weight: quantize.Weight, bias: Tensor | None, *, features_cut: bool = False
    ) -> Tensor:
        """x W^T + bias and the update, of a layer that is not fused, where nothing is communicated in between."""
        spec, meets = self.spec, self.spec.scheme is not None and self.spec.axis.size > 1
        plain = spec.rank and x.dim() > 1 and not (self.gains or self.gate is not None or spec.tokens or meets)
        if plain and self.hs is None and isinstance(weight, Tensor):
            mask = None if self.key is None else self.mask(x, self.spec.updates[0], features_cut=features_cut)
            return product.updated(x, weight, bias, params["lora_A"], params["lora_B"], self.scale(0), mask)
        x, update = self.down(params, x, features_cut=features_cut)
        y = _tokens_replaced(_dense(x, weight, bias, self, features_cut=features_cut), params, x, self)
        return _add(y, params, update, self)

    def gated(self, y: Tensor, *, cut: int | None) -> Tensor:
        """y [T..., anything], for the tokens that the update is active for; `cut` is the dimension of y that is."""
        if self.gate is None:
            return y
        gate = self.gate.to(y.dtype).unsqueeze(-1)
        if cut is not None:
            [gate] = self.collective(collectives.split, [gate], dim=cut)
        return y * gate

    def mask(self, x: Tensor, part: FusedPart, *, features_cut: bool = False, tokens_cut: bool = True) -> Mask | None:
        """What the update of a part does not see of x [T..., in]; None where nothing is dropped. The sequence of x is
        cut as the layer's input is, unless it was gathered since (`tokens_cut` False)."""
        if self.key is None or self.spec.dropout == 0:
            return None
        number = self.spec.updates[0].number if self.spec.share_A else part.number
        key = fold_in(self.key, number) if self.spec.parts else self.key
        return mask(key, *self._numbers(x, features_cut, tokens_cut), self.spec.dropout)

    def dropped(self, x: Tensor, part: FusedPart, *, features_cut: bool = False, tokens_cut: bool = True) -> Tensor:
        """dropout(x) of a part; x itself where nothing is dropped. Args as in `mask`."""
        last = x.movedim(self.form.features, -1)
        unseen = self.mask(last, part, features_cut=features_cut, tokens_cut=tokens_cut)
        return x if unseen is None else dropped(last, unseen).movedim(-1, self.form.features)

    def base(
        self,
        x: Tensor,
        product: Callable[[Tensor], Tensor],
        part: FusedPart | None = None,
        *,
        features_cut: bool = False,
        tokens_cut: bool = True,
    ) -> Tensor:
        """The base's product with x, times the gains of the part (of the layer, where it is not fused)."""
        y, gain = product(x), self.gains.get("" if part is None else part.name)
        if gain is None:
            return y
        part = self.spec.updates[0] if part is None else part
        dropped = self.dropped(x, part, features_cut=features_cut, tokens_cut=tokens_cut)
        return self.gained(y, gain) if dropped is x else y + self.gained(product(dropped), gain - 1)

    def gained(self, y: Tensor, gain: Tensor) -> Tensor:
        """y times a gain for each output, rounded once."""
        return (y * self.form.beside(gain, y)).to(y.dtype)

    def _numbers(self, x: Tensor, features_cut: bool, tokens_cut: bool) -> tuple[Tensor, Tensor]:
        """The logical numbers of x's tokens (see dropout), int32 [T..., 1], and features, int32 [in]."""
        place = collectives.place(self.spec.axis, self.index)
        # torch_xla 2.9 adds int64 [] to int32 [n] in int64, and then takes `.to(torch.int32)` for done.
        place = place.to(torch.int32) if isinstance(place, Tensor) else place
        tokens: list[Tensor] = []
        stride = 1  # not a size, so that a sequence that is padded keeps its numbers
        for dim in reversed(range(x.dim() - 1)):
            cut = tokens_cut and dim == self.cut
            if cut or x.shape[dim] > 1:
                numbers = torch.arange(x.shape[dim], dtype=torch.int32, device=x.device)
                numbers = (numbers + place * x.shape[dim]).to(torch.int32) if cut else numbers
                numbers = numbers if stride == 1 else wide(numbers) * stride
                tokens.append(numbers.view(-1, *(1,) * (x.dim() - 1 - dim)))
            stride = wrap(stride * TOKEN_STRIDE)
        whole = functools.reduce(torch.add, tokens) if tokens else x.new_zeros(1, dtype=torch.int32)
        features = torch.arange(x.shape[-1], dtype=torch.int32, device=x.device)
        if features_cut and self.spec.heads is not None:
            features = sharding.input_layout(self.spec).places(place).to(x.device, torch.int32)
        elif features_cut:
            features = (features + place * x.shape[-1]).to(torch.int32)
        return whole.to(torch.int32).expand(*x.shape[:-1], 1), features


def _add(y: Tensor, params: Params, update: list[Tensor], at: _At) -> Tensor:
    """y + H B^T, where there is an adapter."""
    if not update:
        return y
    if at.spec.kind not in _FORMS:
        return product.added(y, update[0], params["lora_B"])
    return y + at.form.up(update[0], params["lora_B"].to(y.dtype))


def _biased(y: Tensor, params: Params, at: _At) -> Tensor:
    """y with the adapter's bias."""
    if not at.spec.lora_bias:
        return y
    bias = at.form.beside(at.scaled(params["lora_B_bias"].to(y.dtype), 0), y)
    return y + at.gated(bias, cut=None if at.spec.kind == "column" else at.spec.sequence_dim)


def _base_biased(y: Tensor, params: Params, at: _At) -> Tensor:
    """y with the base's bias."""
    return y + at.form.beside(params["bias"], y) if at.spec.bias else y


def _dense(
    x: Tensor,
    weight: quantize.Weight,
    bias: Tensor | None,
    at: _At,
    part: FusedPart | None = None,
    *,
    features_cut: bool = False,
    tokens_cut: bool = True,
) -> Tensor:
    """A linear base. Gains are not the bias's."""
    if not at.gains:
        return quantize.linear(x, weight, bias)
    y = at.base(x, lambda x: quantize.linear(x, weight), part, features_cut=features_cut, tokens_cut=tokens_cut)
    return y if bias is None else y + bias


def _linear(params: Params, x: Tensor, at: _At) -> Tensor:
    weight = params["weight"].T if at.spec.fan_in_fan_out else quantize.of(params, at.spec)
    return _biased(at.updated(params, x, weight, params.get("bias")), params, at)


def _tokens_replaced(y: Tensor, params: Params, x: Tensor, at: _At) -> Tensor:
    """y [T..., o] of a linear or column layer, its outputs of trained tokens computed with their own rows."""
    if not at.spec.tokens:
        return y
    rows = torch.arange(y.shape[-1], device=x.device)
    if at.spec.kind == "column":
        rows = rows + collectives.place(at.spec.axis, at.index) * y.shape[-1]
    is_token, which = _found(rows, at.spec)
    of_tokens = F.linear(x, params[sharding.TOKENS].to(x.dtype))
    return torch.where(is_token, of_tokens[..., which], y)


def _found(ids: Tensor, spec: LayerSpec) -> tuple[Tensor, Tensor]:
    """Of ids: whether each is one of the trained tokens, and which (0 where it is none)."""
    matches = ids[..., None] == torch.tensor(spec.tokens, device=ids.device)
    return matches.any(-1), matches.to(torch.int32).argmax(-1)


def _gathered(params: Params, x: Tensor, at: _At) -> tuple[Tensor, list[Tensor]]:
    """The x of a column layer under sequence parallel, whole, and the H of each of its lora_A."""
    x, update = at.down(params, x)
    x, *update = at.collective(
        collectives.gather_partial, [x, *update], dim=at.spec.sequence_dim, dtype=at.spec.reduce_dtype
    )
    return x, update


def _copied(x: Tensor, at: _At) -> Tensor:
    """The x of a column layer that gets it whole; its gradient is summed here, unless it is before the layer."""
    return at.collective(collectives.copy, [x], dtype=at.spec.reduce_dtype)[0] if at.spec.input == "replicated" else x


def _column(params: Params, x: Tensor, at: _At) -> Tensor:
    spec, weight = at.spec, quantize.of(params, at.spec)
    bias = None if spec.gather_output else params.get("bias")
    if spec.input == "sharded":
        x, update = _gathered(params, x, at)
        y = _tokens_replaced(_dense(x, weight, bias, at, tokens_cut=False), params, x, at)
        y = _add(y, params, update, at)
    else:
        y = at.updated(params, _copied(x, at), weight, bias)
    if not spec.gather_output:
        return _biased(y, params, at)
    [y] = at.collective(collectives.gather, [y], dim=-1)
    return _biased(_base_biased(y[..., : spec.out_features], params, at), params, at)


def _fused(params: Params, x: Tensor, at: _At) -> Tensor | tuple[Tensor, ...]:
    spec = at.spec
    x, hs = _gathered(params, x, at) if spec.input == "sharded" else at.down(params, _copied(x, at))
    ys = _of_parts(params, x, at)
    for number, part in enumerate(spec.updates):
        h = hs[0 if spec.share_A else number]
        ys[part.name] = product.added(ys[part.name], h, params[part.param("lora_B")])
        if spec.lora_bias:
            bias = at.scaled(params[part.param("lora_B_bias")].to(x.dtype), number)
            ys[part.name] = ys[part.name] + at.gated(bias, cut=None)
    return tuple(ys.values()) if spec.kind == "qkv" else torch.cat(list(ys.values()), -1)


def _of_parts(params: Params, x: Tensor, at: _At) -> dict[str, Tensor]:
    """What the base gives, by part; of one weight for all, in one product where no part has gains."""
    spec = at.spec
    if spec.fuse_qkv:
        layout = sharding.layout(spec, "weight")
        assert layout is not None
        sizes = list(layout.local_sizes.values())
        weight = quantize.of(params, spec)
        if not at.gains:
            y = _dense(x, weight, params.get("bias"), at)
            return dict(zip(layout.local_sizes, y.split(sizes, -1), strict=True))
        weights = dict(zip(layout.local_sizes, quantize.split(weight, sizes), strict=True))
        biases = dict(zip(layout.local_sizes, params["bias"].split(sizes), strict=True)) if spec.bias else {}
    else:
        weights = {part.name: quantize.of(params, spec, part) for part in spec.parts}
        biases = {part.name: params[part.param("bias")] for part in spec.parts if spec.bias}
    return {p.name: _dense(x, weights[p.name], biases.get(p.name), at, p, tokens_cut=False) for p in spec.parts}


def _row(params: Params, x: Tensor, at: _At) -> Tensor:
    spec = at.spec
    if not spec.input_is_parallel:
        [x] = at.collective(collectives.split, [x], dim=-1)
    weight = quantize.of(params, spec)
    if spec.sequence_dim is None:
        y = at.updated(params, x, weight, None, features_cut=True)
        y = at.collective(collectives.reduce, [y], dtype=spec.reduce_dtype)[0] if spec.reduce_output else y
    else:
        x, update = at.down(params, x, features_cut=True)
        y = _reduced(_dense(x, weight, None, at, features_cut=True), params, update, at)
    return _biased(_base_biased(y, params, at), params, at)


def _outputs_cut(params: Params, x: Tensor, at: _At) -> Tensor:
    """conv2d and experts: as a column layer, the biases sharded as the output is before it is gathered."""
    spec, form = at.spec, at.form
    [x] = at.collective(collectives.copy, [x], dtype=spec.reduce_dtype)
    y = _base_biased(at.base(x, lambda x: form.base(x, params["weight"], spec)), params, at)
    y = _biased(_add(y, params, at.down(params, x)[1], at), params, at)
    if not spec.gather_output:
        return y
    [y] = at.collective(collectives.gather, [y], dim=form.features)
    return y.narrow(form.features, 0, spec.out_features)


def _inputs_cut(params: Params, x: Tensor, at: _At) -> Tensor:
    """conv2d and experts: as a row layer."""
    spec, form = at.spec, at.form
    if not spec.input_is_parallel:
        [x] = at.collective(collectives.split, [x], dim=form.features)
    y = at.base(x, lambda x: form.base(x, params["weight"], spec), features_cut=True)
    y = _reduced(y, params, at.down(params, x, features_cut=True)[1], at)
    return _biased(_base_biased(y, params, at), params, at)


def _by_side(params: Params, x: Tensor, at: _At) -> Tensor:
    return (_inputs_cut if at.spec.shard_input else _outputs_cut)(params, x, at)


def _reduced(y: Tensor, params: Params, update: list[Tensor], at: _At) -> Tensor:
    """The partial Y and H, summed over the axis as the rules table's scheme says, and the update added."""
    spec = at.spec
    if spec.sequence_dim is not None:
        # A frozen embedding has no backward: there, only H's gradient is to be gathered, and so gains come afterwards.
        y, *update = at.collective(
            collectives.reduce_scatter,
            [y, *update],
            dim=spec.sequence_dim,
            dtype=spec.reduce_dtype,
            apart=spec.kind == "embedding",
        )
        if spec.kind == "embedding" and at.gains:
            y = at.gained(y, at.gains[""])
        # The backward keeps H alone: as a view of what came beside Y, it would keep Y.
        return _add(y, params, [h.contiguous() for h in update], at)
    y = _add(y, params, update, at)
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

    def look_up(table: Tensor, tokens: Tensor | None = None) -> Tensor:
        found = F.embedding(rows, table)
        if tokens is not None:
            is_token, which = _found(ids, spec)
            found = torch.where(is_token[..., None], F.embedding(which, tokens.to(table.dtype)), found)
        if spec.padding_idx is not None:
            found = torch.where((ids == spec.padding_idx)[..., None], found.detach(), found)
        return found if inside is None else torch.where(inside[..., None], found, 0)

    y = look_up(weight, params.get(sharding.TOKENS))
    if at.gains and (spec.sequence_dim is None or spec.shard_across_embedding):
        y = at.gained(y, at.gains[""])
    update = [at.scaled(look_up(params["lora_A"].T).to(y.dtype), 0)] if spec.rank else []
    if not spec.shard_across_embedding:
        return _reduced(y, params, update, at)
    [y] = at.collective(collectives.gather, [_add(y, params, update, at)], dim=-1)
    return y if spec.sequence_dim is None else at.collective(collectives.split, [y], dim=spec.sequence_dim)[0]


_LAYERS: Mapping[str, Callable[[Params, Tensor, _At], Any]] = {
    "linear": _linear,
    "column": _column,
    "qkv": _fused,
    "row": _row,
    "embedding": _embedding,
    "conv2d": _by_side,
    "experts": _by_side,
}
