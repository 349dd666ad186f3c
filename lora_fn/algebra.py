"""How do adapters add up? Weighted combinations of one layer's adapters, of all of PEFT's combination types.

A type combines the factors, all lora_A's and all lora_B's by themselves ("linear"; the product of two sums is not the
sum of the products); or the updates scaling * B A, which are then factorised anew ("svd"); or puts the factors side by
side ("cat"). "cat" is exact, and "svd" the nearest of its rank; "linear" is neither.

Before that, of each tensor only the largest elements are kept ("magnitude_prune", "ties"), or random ones, which stand
in for the others ("dare"); and of elements that differ in sign, only those of the majority's ("ties").

A negative weight takes an adapter away. The combination's own scaling is 1. It is made of canonical factors, in fp32
(or more), and a layer or a part that an adapter has no factors of is one that it adds nothing to.

Source: PEFT 0.21, `tuners/lora/model.py` and `utils/merge_utils.py`; TIES (arXiv 2306.01708), DARE (arXiv 2311.03099).
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from lora_fn import sharding, starts
from lora_fn.dropout import dropout
from lora_fn.errors import Problems, SpecError
from lora_fn.initialize import seed_of
from lora_fn.layer_spec import FusedPart, LayerSpec
from lora_fn.merge import factors
from lora_fn.spec import LoraSpec
from lora_fn.values import is_integer, is_number

FACTORS, UPDATES, BESIDE = "factors", "updates", "beside"
MAGNITUDE, RANDOM = "magnitude", "random"
MAJORITIES = ("total", "frequency")
DRIVERS = (None, "gesvd", "gesvdj", "gesvda")


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """One combination type.

    Args:
        of: What is combined: `FACTORS`, `UPDATES`, or `BESIDE`, nothing.
        prune: Which elements of each are kept: the largest (`MAGNITUDE`), or random ones, scaled up (`RANDOM`); None
            for all.
        elect: Leave out elements of another sign than the majority's, and divide by the number of the others.
    """

    of: str
    prune: str | None = None
    elect: bool = False


_THINNED: Mapping[str, Mapping[str, Any]] = {
    "ties": {"prune": MAGNITUDE, "elect": True},
    "dare_linear": {"prune": RANDOM},
    "dare_ties": {"prune": RANDOM, "elect": True},
    "magnitude_prune": {"prune": MAGNITUDE},
}

METHODS: Mapping[str, Method] = {
    "svd": Method(of=UPDATES),
    "linear": Method(of=FACTORS),
    "cat": Method(of=BESIDE),
    **{name: Method(of=FACTORS, **options) for name, options in _THINNED.items()},
    **{f"{name}_svd": Method(of=UPDATES, **options) for name, options in _THINNED.items()},
}

# Variants of the update whose adapters have no weighted sum, with the reason.
UNFIT: Mapping[str, str] = {
    "dora": "its magnitudes are norms of the weight with its own update, and no weighting makes them those of another",
    "kasa": "it works over a truncated weight, which the others' base is not",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Combination:
    """How adapters are combined: the arguments of PEFT's `add_weighted_adapter`, with its defaults.

    Args:
        how: PEFT's `combination_type`, one of `METHODS`.
        density: The share of elements to keep, above 0 and at most 1; of types that prune, and only of those.
        majority_sign_method: The majority by the sum of the elements ("total"), or by their number ("frequency").
        svd_rank: Of the result, where updates are factorised; None for the largest of the adapters'.
        svd_clamp: A quantile, above 0.5: the factors' elements beyond it are cut to it.
        svd_driver: As in torch.linalg.svd, on CUDA; elsewhere there is one.
        seed: Of the random elements, which are the same at every size of the axis.

    Raises:
        SpecError: Values that cannot be, or that would change nothing, all of them at once.
    """

    how: str = "svd"
    density: float | None = None
    majority_sign_method: str = "total"
    svd_rank: int | None = None
    svd_clamp: float | None = None
    svd_driver: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        problems = Problems(SpecError)
        method = METHODS.get(self.how)

        def expect(holds: bool, name: str, message: str) -> None:
            if not holds:
                problems.add(f"Combination.{name}", f"is {getattr(self, name)!r}, {message}")

        expect(method is not None, "how", f"expected one of {', '.join(METHODS)}.")
        known = self.density is None or (is_number(self.density) and 0 < self.density <= 1)
        expect(known, "density", "expected a number above 0 and at most 1.")
        expect(self.majority_sign_method in MAJORITIES, "majority_sign_method", f"expected one of {MAJORITIES}.")
        expect(
            self.svd_rank is None or (is_integer(self.svd_rank) and self.svd_rank >= 1),
            "svd_rank",
            "expected an integer of at least 1.",
        )
        expect(
            self.svd_clamp is None or (is_number(self.svd_clamp) and 0.5 < self.svd_clamp <= 1),
            "svd_clamp",
            "expected a quantile above 0.5 and at most 1.",
        )
        expect(self.svd_driver in DRIVERS, "svd_driver", f"expected one of {DRIVERS}.")
        expect(is_integer(self.seed), "seed", "expected an integer.")
        if method is not None:
            prunes = method.prune is not None
            expect(not prunes or self.density is not None, "density", f"which {self.how!r} needs; give the share.")
            idle = f"which changes nothing of {self.how!r}; leave it out."
            expect(prunes or self.density is None, "density", idle)
            expect(method.elect or self.majority_sign_method == "total", "majority_sign_method", idle)
            for name in ("svd_rank", "svd_clamp", "svd_driver"):
                expect(method.of == UPDATES or getattr(self, name) is None, name, idle)
        problems.raise_if_any()

    @property
    def method(self) -> Method:
        """The row of `METHODS`."""
        return METHODS[self.how]


def add_weighted(
    layers: Sequence[tuple[Mapping[str, Tensor], LayerSpec]],
    weights: Sequence[float],
    how: Combination,
    *,
    seeds: Mapping[str, int] | None = None,
) -> tuple[dict[str, Tensor], LayerSpec]:
    """The weighted combination of one layer's adapters; of a fused layer, of each part by itself.

    Args:
        layers: The canonical factors of each adapter (and whatever else), and the layer with it.
        weights: Of each.
        how: The type, with its options.
        seeds: Part ("" where not fused) -> seed of what is random there; None for what `how.seed` gives.

    Returns:
        The canonical factors, in the widest dtype of the adapters', and the layer with them.

    Raises:
        SpecError: Layers, ranks or variants that do not go together, or another number of weights.

    Example:
        >>> spec = LayerSpec(kind="linear", in_features=3, out_features=2, rank=1, alpha=4.0)
        >>> adapter = {"lora_A": torch.ones(1, 3), "lora_B": torch.ones(2, 1)}
        >>> both, of = add_weighted([(adapter, spec), (adapter, spec)], [1.0, -0.5], Combination(how="cat"))
        >>> both["lora_B"] @ both["lora_A"]
        tensor([[2., 2., 2.],
                [2., 2., 2.]])
    """
    found = result([spec for _, spec in layers], how)
    if len(weights) != len(layers):
        raise SpecError(f"add_weighted: found {len(weights)} weights for {len(layers)} adapters; give one each.")
    made: dict[str, Tensor] = {}
    for part in found.updates:
        given = _pairs(layers, weights, part.name)
        seed = seed_of(how.seed, part.name) if seeds is None else seeds[part.name]
        experts = [_of_expert(given, number, part.rank, how, seed) for number in range(len(given[0].down))]
        names = ("lora_A", "lora_B", "lora_B_bias") if found.lora_bias else ("lora_A", "lora_B")
        for name, tensors in zip(names, zip(*experts, strict=True), strict=False):
            made[part.param(name)] = torch.stack(tensors)
    dtypes = (p.dtype for params, _ in layers for name, p in params.items() if name.startswith("lora_"))
    widest = functools.reduce(torch.promote_types, dtypes)
    shapes = {name: sharding.canonical_shape(found, name) for name in sharding.adapter_names(found)}
    return {name: made[name].reshape(shape).to(widest).contiguous() for name, shape in shapes.items()}, found


def norm(layers: Sequence[tuple[Mapping[str, Tensor], LayerSpec]], weights: Sequence[float]) -> float:
    """The Frobenius norm of the weighted sum of the updates of one layer's adapters, which is never made.

    Args:
        layers, weights: As in `add_weighted`.
    """
    squares = 0.0
    for name in dict.fromkeys(part.name for _, spec in layers for part in spec.updates):
        given = _pairs(layers, weights, name)
        for number in range(len(given[0].down)):
            up = torch.cat([pair.up[number].double() * (pair.weight * pair.scaling) for pair in given], 1)
            down = torch.cat([pair.down[number].double() for pair in given])
            squares += float((torch.linalg.qr(up).R @ torch.linalg.qr(down.mT).R.mT).square().sum())
    return math.sqrt(squares)


def result(specs: Sequence[LayerSpec], how: Combination) -> LayerSpec:
    """The layer with the combination of adapters: the ranks of its parts, and a scaling of 1.

    Args:
        specs: The layer with each adapter.
        how: The type, with its options.

    Raises:
        SpecError: Layers, ranks or variants that do not go together, all of them at once.
    """
    problems = Problems(SpecError)
    if not any(spec.updates for spec in specs):
        raise SpecError("add_weighted: no adapter has factors of the layer; give one that has.")
    first = str(_shape(specs[0]))
    for other in sorted({str(_shape(spec)) for spec in specs} - {first}):
        problems.add("add_weighted", f"is {first} to one adapter and {other} to another; give adapters of one model.")
    variants = sorted({spec.variant for spec in specs})
    for variant in variants:
        if variant in UNFIT:
            problems.add("add_weighted", f"an adapter of variant {variant!r} has no weighted sum: {UNFIT[variant]}.")
    if "alora" in variants and len(variants) > 1:
        problems.add("add_weighted", "an aLoRA adds its update for some tokens only, the others for all; merge those.")
    parts = specs[0].parts or (FusedPart(name="", size=specs[0].out_features),)
    ranks: dict[str, int] = {}
    for part in parts:
        given = [own.rank for spec in specs for own in spec.updates if own.name == part.name]
        if how.method.of == FACTORS and len(set(given)) > 1:
            whose = f"{part.name}'s" if part.name else "its"
            problems.add("add_weighted", f"{whose} ranks are {given}, and {how.how!r} needs equal ones; use 'cat'.")
        ranks[part.name] = _rank(given, how) if given else 0
    problems.raise_if_any()
    base, more = specs[0].base, dict[str, Any]()
    if base.parts:
        more["parts"] = tuple(replace(p, rank=ranks[p.name], alpha=float(ranks[p.name] or 1)) for p in base.parts)
    else:
        more |= {"rank": ranks[""], "alpha": float(ranks[""])}
    has_bias = any(spec.lora_bias for spec in specs)
    more |= {"variant": "alora"} if variants == ["alora"] else {}
    return replace(base, use_rslora=False, lora_bias=has_bias, bias=any(spec.bias for spec in specs), **more)


def _rank(given: Sequence[int], how: Combination) -> int:
    if how.method.of == BESIDE:
        return sum(given)
    return max(given) if how.method.of == FACTORS or how.svd_rank is None else how.svd_rank


def _shape(spec: LayerSpec) -> tuple[Any, ...]:
    """What must be the same of a layer that two adapters are for."""
    parts = tuple((part.name, part.size) for part in spec.parts)
    told = (spec.kind, spec.in_features, spec.out_features, *([parts] if parts else []))
    more = (spec.fan_in_fan_out, spec.window, spec.num_experts)
    return told + tuple(x for x in more if x)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Pair:
    """One adapter of one part: an expert's factors after the other's, as matrices.

    Args:
        down: [experts or 1, r, in] (of conv2d, in * kernel).
        up: [experts or 1, out, r].
        bias: [experts or 1, 1, out]; None for none.
        weight, scaling: As given, and the adapter's own.
    """

    down: Tensor
    up: Tensor
    bias: Tensor | None
    weight: float
    scaling: float

    @classmethod
    def of(cls, params: Mapping[str, Tensor], spec: LayerSpec, part: FusedPart, weight: float) -> _Pair:
        down, up = factors(params, spec, part=part.name, whole=True)
        bias = params[part.param("lora_B_bias")].to(up.dtype) if spec.lora_bias else None
        return cls(
            down=down if spec.kind == "experts" else down.flatten(1)[None],
            up=up if spec.kind == "experts" else up.flatten(1)[None],
            bias=None if bias is None else bias.reshape(-1, 1, part.size),
            weight=float(weight),
            scaling=spec.scaling_of(part),
        )


def _pairs(
    layers: Sequence[tuple[Mapping[str, Tensor], LayerSpec]], weights: Sequence[float], name: str
) -> list[_Pair]:
    """Those of the adapters that have one of a part."""
    return [
        _Pair.of(params, spec, part, weight)
        for (params, spec), weight in zip(layers, weights, strict=True)
        for part in spec.updates
        if part.name == name
    ]


def _of_expert(given: Sequence[_Pair], number: int, rank: int, how: Combination, seed: int) -> tuple[Tensor, ...]:
    """lora_A [r, in], lora_B [out, r] and lora_B_bias [1, out] of one expert (or of what has none)."""
    downs, ups = [pair.down[number] for pair in given], [pair.up[number] for pair in given]
    both = [pair.weight * pair.scaling for pair in given]

    def mixed(name: str, tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
        return _mixed(tensors, weights, how, [seed_of(seed, f"{name}.{number}.{i}") for i in range(len(tensors))])

    if how.method.of == BESIDE:
        down, up = torch.cat([d * w for d, w in zip(downs, both, strict=True)]), torch.cat(ups, 1)
    elif how.method.of == FACTORS:
        roots = [math.sqrt(abs(w)) for w in both]
        down = mixed("lora_A", downs, [math.copysign(root, w) for root, w in zip(roots, both, strict=True)])
        up = mixed("lora_B", ups, roots)
    else:
        if how.method == METHODS["svd"] and how.svd_clamp is None:
            u, s, vh = _svd_of_product(torch.cat([b * w for b, w in zip(ups, both, strict=True)], 1), torch.cat(downs))
        else:
            updates = [b @ a * pair.scaling for a, b, pair in zip(downs, ups, given, strict=True)]
            u, s, vh = _svd(mixed("update", updates, [pair.weight for pair in given]), how)
        up, down = (u * s)[:, :rank], vh[:rank]
        if how.svd_clamp is not None:
            up, down = _clamped(up, down, how.svd_clamp)
        up, down = pad(up, (0, rank - up.shape[1])), pad(down, (0, 0, 0, rank - down.shape[0]))
    with_bias = [(pair.bias[number] * pair.scaling, pair.weight) for pair in given if pair.bias is not None]
    if not with_bias:
        return down, up, up.new_zeros(1, up.shape[0])
    return down, up, mixed("lora_B_bias", [b for b, _ in with_bias], [w for _, w in with_bias])


def _mixed(tensors: Sequence[Tensor], weights: Sequence[float], how: Combination, seeds: Sequence[int]) -> Tensor:
    """The weighted sum of what is left of tensors of one shape [n, m]. As in PEFT, the majority knows no weights."""
    thin = _PRUNE[how.method.prune]
    each = torch.stack([thin(t, how.density, seed) for t, seed in zip(tensors, seeds, strict=True)])
    weighted = each * torch.tensor(weights, dtype=each.dtype, device=each.device)[:, None, None]
    if not how.method.elect:
        return weighted.sum(0)
    votes = each if how.majority_sign_method == "total" else each.sign()
    counts = each.sign() == torch.where(votes.sum(0) >= 0, 1.0, -1.0)
    return (weighted * counts).sum(0) / counts.sum(0).clamp(min=1)


def _all(x: Tensor, density: float | None, seed: int) -> Tensor:
    return x


def _largest(x: Tensor, density: float, seed: int) -> Tensor:
    """The largest elements of x, zeros in the place of the others; of equal ones the first."""
    kept = int(density * x.numel())
    if kept in (0, x.numel()):
        return x * (kept > 0)
    sizes = x.abs().flatten()
    least = sizes.kthvalue(x.numel() - kept + 1).values
    above, at = sizes > least, sizes == least
    return x * (above | (at & (at.cumsum(0) <= kept - above.sum()))).view_as(x)


def _random(x: Tensor, density: float, seed: int) -> Tensor:
    """Random elements of x, scaled up by as much as the others are missing."""
    key = torch.tensor(seed & 0x7FFFFFFF, device=x.device)
    rows, columns = (torch.arange(n, dtype=torch.int32, device=x.device) for n in x.shape)
    return x if density == 1 else dropout(x, key, rows[:, None], columns, 1 - density)


_PRUNE: Mapping[str | None, Callable[..., Tensor]] = {None: _all, MAGNITUDE: _largest, RANDOM: _random}


def _svd_of_product(up: Tensor, down: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U, S, Vh of up [o, r] @ down [r, i], which is never made: of a small matrix between orthogonal ones."""
    left, right = torch.linalg.qr(up), torch.linalg.qr(down.mT)
    u, s, vh = torch.linalg.svd(left.R @ right.R.mT, full_matrices=False)
    return left.Q @ u, s, vh @ right.Q.mT


def _svd(update: Tensor, how: Combination) -> tuple[Tensor, Tensor, Tensor]:
    driver = how.svd_driver if update.device.type == "cuda" else None
    return torch.linalg.svd(update, full_matrices=False, driver=driver)


def _clamped(up: Tensor, down: Tensor, quantile: float) -> tuple[Tensor, Tensor]:
    """Factors with their elements in +- a quantile of all of them, between two elements in proportion."""
    elements = torch.cat([up.flatten(), down.flatten()])  # torch.quantile takes 16 million of them at most
    place = quantile * (elements.numel() - 1)
    low, high = (elements.kthvalue(n + 1).values for n in (math.floor(place), math.ceil(place)))
    most = low + (high - low) * (place - math.floor(place))
    return up.clamp(-most, most), down.clamp(-most, most)


# What an adapter cannot bring into a combination: the field, a test, and the reason.
REFUSED: tuple[tuple[str, Callable[[LoraSpec], bool], str], ...] = (
    *(
        (
            field,
            lambda s, field=field: getattr(s, field) not in ("none", ()),
            f"{what}, which no weights combine; leave it out",
        )
        for field, what in (
            ("bias", "trains biases of the base"),
            ("modules_to_save", "trains whole modules"),
            ("trainable_token_indices", "trains embeddings of tokens"),
        )
    ),
    (
        "init_lora_weights",
        lambda s: starts.start_of(s.init_lora_weights).base == starts.RESIDUAL,
        "works over a base that lacks what it began with; save it with as_lora=True, and load that",
    ),
    (
        "init_lora_weights",
        lambda s: starts.start_of(s.init_lora_weights).base == starts.QUANTIZED,
        "works over a base that it has quantized, which the others' is not; leave it out",
    ),
    *(
        (field, lambda s, variant=variant: s.variant == variant, f"has no weighted sum: {UNFIT[variant]}; leave it out")
        for field, variant in (("use_dora", "dora"), ("kasa_config", "kasa"))
    ),
)

# What adapters must have in common.
COMMON = ("alora_invocation_tokens", "layer_replication", "ensure_weight_tying")

# What a combination is not: it begins with its factors, and is no variant but an aLoRA.
_PLAIN: Mapping[str, Any] = {
    **{"use_rslora": False, "init_lora_weights": True, "share_A": False},
    **dict.fromkeys(("loftq_config", "eva_config", "corda_config", "lora_ga_config", "use_bdlora"), None),
    **{"use_qalora": False, "qalora_group_size": 16},
}


def check(specs: Mapping[str, LoraSpec], weights: Sequence[float]) -> None:
    """Refuse adapters that cannot be combined.

    Args:
        specs: What each adapter's config asks for, by a name for messages.
        weights: Of each adapter.

    Raises:
        SpecError: All reasons at once.
    """
    problems = Problems(SpecError)
    for name, spec in specs.items():
        for field, is_so, reason in REFUSED:
            if is_so(spec):
                problems.add(f"{name}", f"{field} is {_told(getattr(spec, field))}: it {reason}.")
    for field in COMMON:
        values = {name: getattr(spec, field) for name, spec in specs.items()}
        if len(set(values.values())) > 1:
            told = ", ".join(f"{name} {value!r}" for name, value in values.items())
            problems.add(f"{field}", f"differs ({told}), expected the same of all; leave the odd ones out.")
    for weight in weights:
        if not is_number(weight) or not math.isfinite(weight):
            problems.add("weights", f"have a {weight!r}, expected finite numbers.")
    problems.raise_if_any()


def _told(value: Any) -> Any:
    return dict(value) if isinstance(value, tuple) and value and isinstance(value[0], tuple) else value


def largest_rank(specs: Sequence[LoraSpec]) -> int:
    """The largest rank that adapters' configs tell of: as in PEFT, that of an SVD where none is given."""
    return max(max([spec.rank, *(rank for _, rank in spec.rank_pattern)]) for spec in specs)


def lora_spec(specs: Sequence[LoraSpec], ranks: Mapping[str, int]) -> LoraSpec:
    """The spec of a combination: what adapts the layers of all adapters, with the first one's other options.

    Args:
        specs: Of the adapters, which `check` has passed.
        ranks: Name in Hugging Face's models of each adapted layer or parameter -> the combination's rank there.
    """
    given = list(ranks.values())
    rank = max(set(given), key=lambda n: (given.count(n), n))
    patterns = _patterns(ranks, rank)
    parameters = tuple(dict.fromkeys(name for spec in specs for name in spec.target_parameters))
    return replace(
        specs[0],
        rank=rank,
        alpha=rank,
        rank_pattern=patterns,
        alpha_pattern=patterns,
        target_parameters=parameters,
        lora_bias=any(spec.lora_bias for spec in specs),
        dropout=0.0 if parameters else specs[0].dropout,
        **_PLAIN,
        **_targets(specs, [name for name in ranks if not _is_parameter(name, parameters)]),
    )


def _is_parameter(name: str, parameters: Sequence[str]) -> bool:
    return any(name == end or name.endswith("." + end) for end in parameters)


def _patterns(ranks: Mapping[str, int], rank: int) -> tuple[tuple[str, int], ...]:
    """A rank_pattern: by the last part of names where that tells the rank, else by whole names."""
    by_last: dict[str, set[int]] = {}
    for name, own in ranks.items():
        by_last.setdefault(name.rpartition(".")[2], set()).add(own)
    found: dict[str, int] = {}
    for name, own in ranks.items():
        last = name.rpartition(".")[2]
        key = re.escape(last) if len(by_last[last]) == 1 else f"^{re.escape(name)}"
        found |= {key: own} if own != rank else {}
    return tuple(found.items())


def _targets(specs: Sequence[LoraSpec], adapted: Sequence[str]) -> dict[str, Any]:
    """The fields that adapt what any of the specs does; whole names, where their own do not join."""
    others = {(spec.exclude_modules, spec.layers_to_transform, spec.layers_pattern) for spec in specs}
    given = [() if spec.target_modules is None and spec.target_parameters else spec.target_modules for spec in specs]
    if len(others) == 1 and len(set(given)) == 1:
        return {"target_modules": given[0]}
    if len(others) == 1 and all(isinstance(named, tuple) for named in given):
        return {"target_modules": tuple(dict.fromkeys(name for named in given for name in named or ()))}
    if len(others) == 1 and all(isinstance(named, str) and named != "all-linear" for named in given):
        return {"target_modules": "|".join(f"({named})" for named in dict.fromkeys(given))}
    nothing = {"exclude_modules": (), "layers_to_transform": None, "layers_pattern": None}
    return {"target_modules": tuple(adapted), **nothing}
