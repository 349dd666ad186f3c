"""Which factors does a weight give? The initialisations that need more than a seed, as functions of canonical tensors.

Shapes: o, i the global output and input features of a layer or of one part of a fused layer; r its rank. Everything is
computed in fp32 (or more), on whole tensors: what is the same at every size of the axis goes in, so it comes out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lora_fn import quantize, sharding, starts
from lora_fn.errors import Problems, SpecError
from lora_fn.initialize import seed_of
from lora_fn.layer_spec import FusedPart, LayerSpec
from lora_fn.merge import subtract


@dataclass(frozen=True, slots=True, kw_only=True)
class Given:
    """What a start is told besides the weight.

    Args:
        rank: r.
        scaling: Of the update.
        seed: Of what is drawn.
        options: Those of the initialisation (`LoraSpec.options`).
        statistic: Of "corda", the covariance of the inputs [i, i]; of "eva", `components` of them [r or more, i];
            of "lora_ga", the gradient of the weight [o, i]; None of any other.
    """

    rank: int
    scaling: float
    seed: int
    options: Mapping[str, Any]
    statistic: Tensor | None = None


def factorize(
    params: Mapping[str, Tensor],
    spec: LayerSpec,
    *,
    seed: int | Mapping[str, int],
    init_lora_weights: str,
    options: Mapping[str, Any] | None = None,
    statistics: Mapping[str, Tensor] | None = None,
    dtype: torch.dtype = torch.float32,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The canonical factors that a layer's weight gives, each part of a fused layer by its own rows, and the new base.

    Args:
        params: The canonical base: `weight`, or `weight.q`, ... where the parts have their own.
        spec: The layer, with an adapter.
        seed: As in `initialize.init`; only "pissa_niter_[number]" and "lora_ga" draw.
        init_lora_weights: A row of `starts.TABLE` that needs more than nothing.
        options: Of the initialisation: `LoraSpec.options(f"{init}_config")`.
        statistics: Part ("" where not fused) -> what it needs besides the weight, see `Given`.
        dtype: Of the factors.

    Returns:
        The factors, as `initialize.init` gives them; and what becomes of the weights that change, by name.

    Raises:
        SpecError: A layer that it cannot start (see `starts.check`), statistics that are missing.

    Source: PEFT, tuners/lora/layer.py.
    """
    problems = Problems(SpecError)
    starts.check("factorize", spec, init_lora_weights, problems)
    problems.raise_if_any()
    name, _, steps = init_lora_weights.partition("_niter_")
    start, factors = starts.start_of(init_lora_weights), dict[str, Tensor]()
    base = {n: p for n, p in params.items() if n.partition(".")[0] == "weight"}
    for part in spec.updates:
        weight = rows(params, spec, part)
        given = Given(
            rank=part.rank,
            scaling=spec.scaling_of(part),
            seed=_seed(seed, part.name),
            options={**(options or {}), **({"steps": int(steps)} if steps else {})},
            statistic=(statistics or {}).get(part.name),
        )
        if start.needs in (starts.INPUTS, starts.GRADIENT) and given.statistic is None:
            raise SpecError(f"factorize: {init_lora_weights!r} needs the {start.needs} of a layer; give statistics.")
        down, up, changed = _FACTORIZE[name](_oriented(weight, spec), given)
        factors |= {part.param("lora_A"): down.to(dtype).contiguous(), part.param("lora_B"): up.to(dtype).contiguous()}
        if changed is not None:
            _put(base, spec, part, _oriented(changed, spec).to(weight.dtype))
    if start.base == starts.RESIDUAL:
        base |= subtract({**params, **factors}, spec)
    changes = base if start.base != starts.KEPT else {}
    return {n: factors[n] for n in sharding.drawn_names(spec)}, {n: p.contiguous() for n, p in changes.items()}


def _seed(seed: int | Mapping[str, int], part: str) -> int:
    if isinstance(seed, Mapping):
        return seed[part]
    return seed_of(seed, part) if part else seed


def rows(params: Mapping[str, Tensor], spec: LayerSpec, part: FusedPart) -> Tensor:
    """The canonical weight of one part of a layer: a view."""
    if not spec.parts or not spec.fuse_qkv:
        return params[part.param("weight")]
    return params["weight"].narrow(0, _offset(spec, part), part.size)


def _offset(spec: LayerSpec, part: FusedPart) -> int:
    names = [p.name for p in spec.parts]
    return sum(p.size for p in spec.parts[: names.index(part.name)])


def _put(base: dict[str, Tensor], spec: LayerSpec, part: FusedPart, weight: Tensor) -> None:
    if not spec.parts or not spec.fuse_qkv:
        base[part.param("weight")] = weight
        return
    first, whole = _offset(spec, part), base["weight"]
    base["weight"] = torch.cat([whole[:first], weight, whole[first + part.size :]])


def _oriented(weight: Tensor, spec: LayerSpec) -> Tensor:
    """A weight as [o, i] of the matrix that B A is added to, or back: the same both ways."""
    return weight.mT if spec.kind == "embedding" or spec.fan_in_fan_out else weight


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


# What each gives: (lora_A [r, i], lora_B [o, r], the new weight where it is not the old one or its residual).
_Factors = tuple[Tensor, Tensor, Tensor | None]


def _pissa(weight: Tensor, given: Given) -> _Factors:
    """The principal singular vectors, half of the singular values in each factor (PiSSA, arXiv 2404.02948)."""
    if "steps" in given.options:
        u, s, vh = low_rank_svd(_wide(weight), given.rank, steps=given.options["steps"], generator=_generator(given))
    else:
        u, s, vh = torch.linalg.svd(_wide(weight), full_matrices=False)
    return *_halves(u[:, : given.rank], s[: given.rank] / given.scaling, vh[: given.rank]), None


def _halves(u: Tensor, s: Tensor, vh: Tensor) -> tuple[Tensor, Tensor]:
    root = s.sqrt()
    return root[:, None] * vh, u * root


def _olora(weight: Tensor, given: Given) -> _Factors:
    """The first columns of Q and rows of R (OLoRA, arXiv 2406.01775)."""
    q, r = torch.linalg.qr(_wide(weight))
    return r[: given.rank], q[:, : given.rank], None


def _mica(weight: Tensor, given: Given) -> _Factors:
    """B the left singular vectors of the smallest singular values, A zero (MiCA, arXiv 2604.01694)."""
    u, _, _ = torch.linalg.svd(_wide(weight), full_matrices=False)
    return u.new_zeros(given.rank, weight.shape[1]), u[:, -given.rank :], None


def _loftq(weight: Tensor, given: Given) -> _Factors:
    """Quantization and low-rank factors of what it loses, in turns (LoftQ, arXiv 2310.08659). As in PEFT, the factors
    are those of a scaling of 1."""
    wide = _wide(weight)
    rest = wide
    for step in range(given.options["loftq_iter"]):
        quantized = quantize.rounded(rest, given.options["loftq_bits"])
        u, s, vh = torch.linalg.svd(wide - quantized, full_matrices=False)
        down, up = _halves(u[:, : given.rank], s[: given.rank], vh[: given.rank])
        rest = wide - up @ down if step + 1 < given.options["loftq_iter"] else rest
    return down, up, quantized


def _eva(weight: Tensor, given: Given) -> _Factors:
    """A the principal components of the inputs, B zero (EVA, arXiv 2410.07170)."""
    assert given.statistic is not None
    return given.statistic[: given.rank], given.statistic.new_zeros(weight.shape[0], given.rank), None


def _corda(weight: Tensor, given: Given) -> _Factors:
    """Singular vectors of W C, turned back by the inverse of C, the covariance of the inputs (CorDA, arXiv 2406.05223):
    the principal ones ("ipm", to learn), or the last ones ("kpm", to keep what is known)."""
    assert given.statistic is not None
    covariance, damp = given.statistic.double(), 0.01  # fp32 would leave 1e-4 of its inverse wrong
    whole = torch.eye(covariance.shape[0], dtype=covariance.dtype, device=covariance.device)
    while True:
        damped = covariance + whole * (covariance.diagonal().mean() * damp)
        inverse = torch.linalg.inv(damped)
        if not torch.dist(damped @ inverse, whole) >= _INVERSE_ERROR:
            break
        damp *= 2
    u, s, vh = torch.linalg.svd(weight.double() @ damped, full_matrices=False)
    first = 0 if given.options["corda_method"] == "ipm" else len(s) - given.rank
    kept = slice(first, first + given.rank)
    return *_halves(u[:, kept], s[kept] / given.scaling, vh[kept] @ inverse), None


_INVERSE_ERROR = 0.05  # how far C times its inverse may be from 1, before C is damped more


def _lora_ga(weight: Tensor, given: Given) -> _Factors:
    """Singular vectors of the gradient, so that the first step is along it (LoRA-GA, arXiv 2407.05000)."""
    assert given.statistic is not None
    gradient, r, generator = _wide(given.statistic), given.rank, _generator(given)
    u, s, vh = low_rank_svd(gradient, min(4 * r, *gradient.shape), steps=4, generator=generator)
    ups, downs = _DIRECTIONS[given.options["direction"]](r, generator)
    values = s[ups]
    up, down = u[:, ups] * values, vh[downs]
    scale = given.options["scale"]
    if scale == "stable":
        up = up * (weight.shape[0] ** 0.25 / given.options["stable_gamma"] ** 0.5)
    elif scale == "weight_svd" and values[0] > 0:
        up = up * (low_rank_svd(_wide(weight), r, steps=4, generator=generator)[1][0] / values[0])
    elif scale == "gd_scale":
        up, down = up / given.scaling, down / given.scaling
    return down, up, None


def _alternating(r: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    return torch.arange(0, 2 * r, 2), torch.arange(1, 2 * r, 2)


def _first_up(r: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    return torch.arange(r), torch.arange(r, 2 * r)


def _first_down(r: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    return torch.arange(r, 2 * r), torch.arange(r)


def _drawn(r: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    chosen = torch.randperm(2 * r, generator=generator)[:r]
    return chosen, chosen


# LoRA-GA's directions: which of the 2 r singular vectors lora_B takes, and which lora_A.
_DIRECTIONS = {"ArBr": _alternating, "A2rBr": _first_up, "ArB2r": _first_down, "random": _drawn}

_FACTORIZE = {
    "pissa": _pissa,
    "olora": _olora,
    "mica": _mica,
    "loftq": _loftq,
    "eva": _eva,
    "corda": _corda,
    "lora_ga": _lora_ga,
}


def _generator(given: Given) -> torch.Generator:
    return torch.Generator().manual_seed(given.seed)


def low_rank_svd(a: Tensor, rank: int, *, steps: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """The first singular vectors and values, by subspace iteration from a random start.

    Args:
        a: [o, i].
        rank: How many, at most min(o, i).
        steps: Of the iteration.
        generator: Of the start, on the CPU, which is drawn as torch.svd_lowrank draws it.

    Returns:
        U [o, rank], S [rank], Vh [rank, i].

    Source: Halko et al., arXiv 0909.4061, algorithms 4.4 and 5.1.
    """
    tall = a if a.shape[0] >= a.shape[1] else a.mT
    found = torch.randn(tall.shape[1], rank, generator=generator, dtype=a.dtype).to(a.device)
    basis = torch.linalg.qr(tall @ found).Q
    for _ in range(steps):
        basis = torch.linalg.qr(tall @ torch.linalg.qr(tall.mT @ basis).Q).Q
    u, s, vh = torch.linalg.svd(basis.mT @ tall, full_matrices=False)
    u = basis @ u
    return (u, s, vh) if tall is a else (vh.mT, s, u.mT)


@dataclass(frozen=True, slots=True)
class Components:
    """The principal components of a layer's inputs.

    Args:
        vectors: [n, i], the first ones, each of length 1.
        values: [n], their singular values: of the inputs, their mean taken off.
        shares: [n], of the variance, that each explains.
    """

    vectors: Tensor
    values: Tensor
    shares: Tensor


def components(second: Tensor, total: Tensor, count: int, num: int) -> Components:
    """The first principal components of inputs, from their sums: exact, in fp64.

    Args:
        second: [i, i], the sum of x x^T.
        total: [i], the sum of x.
        count: How many x there were.
        num: How many components.
    """
    mean = total.double() / count
    centred = second.double() - count * torch.outer(mean, mean)
    values, vectors = torch.linalg.eigh(centred)
    values, vectors = values.flip(0)[:num].clamp(min=0), vectors.flip(1)[:, :num].mT
    largest = vectors.gather(1, vectors.abs().argmax(1, keepdim=True))
    return Components(vectors * largest.sign(), values.sqrt(), values / centred.trace())


def redistribute(shares: Mapping[str, Tensor], ranks: Mapping[str, int], same: Mapping[str, str]) -> dict[str, int]:
    """The ranks that EVA gives layers: the sum of them stays, and goes to the largest shares of variance.

    Args:
        shares: Layer -> the share of variance that each of its components explains, as many as it may have at most.
        ranks: Layer -> its rank by the spec.
        same: Layer -> the first one that has the same inputs, for those that are not that one themselves.

    Returns:
        Layer -> rank; 0 where it is not adapted. Of layers with the same inputs, the first has the largest.

    Source: PEFT, tuners/lora/eva.py.
    """
    order = [*(path for path in shares if path not in same), *(path for path in shares if path in same)]
    owners = [path for path in order for _ in shares[path]]
    best = torch.cat([shares[path] for path in order]).argsort(descending=True, stable=True)[: sum(ranks.values())]
    counts = dict.fromkeys(order, 0)
    for place in best.tolist():
        counts[owners[place]] += 1
    for path, first in same.items():
        if counts[first] < counts[path]:
            counts[first], counts[path] = counts[path], counts[first]
    return {path: counts[path] for path in shares}


def as_lora(factors: Mapping[str, Tensor], initial: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Factors over the unchanged base, of twice the rank: what they add beyond what they began with.

    Args:
        factors: `lora_A` [r, i], `lora_B` [o, r] (or those of parts), over a residual base.
        initial: The same, as they were when the base was made.

    Returns:
        `lora_A` [2 r, i], `lora_B` [o, 2 r], for the same scaling.

    Source: PEFT, tuners/lora/model.py, `subtract_mutated_init`.
    """
    wide: dict[str, Tensor] = {}
    for name, factor in factors.items():
        start = initial[name].to(factor)
        if name.partition(".")[0] == "lora_A":
            wide[name] = torch.cat([factor, start])
        else:
            wide[name] = torch.cat([factor, -start], 1)
    return wide
