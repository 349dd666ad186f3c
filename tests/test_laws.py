"""Do the laws hold, for every row of the rules table? Here on the mapped axis: one process plays all of them.

A law is a plain function of a case (`law_*`), so that drawn cases, fixed cases and mutants all go through the same one.
"""

import dataclasses
import functools
import itertools
import math

import mapped
import oracle
import pytest
import strategies
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from strategies import ADAPTED, BY_RANK, FUSED, SIZES, UNCUT, case, cases, fixed_spec, keep_of, plain
from torch.func import grad, vmap

import lora_fn
from lora_fn import (
    Replicate,
    Shard,
    SpecError,
    collectives,
    factorize,
    layers,
    optimizers,
    sharding,
    siblings,
    starts,
    variants,
)
from lora_fn import dropout as dropout_file
from lora_fn.errors import Problems
from lora_fn.initialize import DRAWN
from lora_fn.merge import subtract
from lora_fn.spec import OPTIONS

FACTORED = tuple(how for how, start in starts.TABLE.items() if start.needs != starts.NOTHING)
EXACT = {torch.float64: 1e-10, torch.float32: 1e-5}
SEEDS = st.integers(0, 1 << 20)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """The tensors are small: more threads would only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


each_row = pytest.mark.parametrize("row", sharding.TABLE)
each_adapted_row = pytest.mark.parametrize("row", ADAPTED)
RAW = ("linear", *(row for rows in strategies.EXPERTS.values() for row in rows))  # rows that raw parameters have


def error(a, b):
    """max|a-b| / max|b|; where b is all zeros, a must be."""
    assert a.shape == b.shape
    a, b = a.double(), b.double()
    return ((a - b).abs().max() / b.abs().max().clamp(min=1e-300)).item()


def same(a, b):
    """Bit for bit, but for the sign of zero."""
    if a.dtype == torch.float8_e4m3fn == b.dtype:  # which torch.equal does not take
        a, b = a.float(), b.float()
    return a.dtype == b.dtype and torch.equal(a, b)


def same_dicts(a, b):
    return a.keys() == b.keys() and all(same(a[name], b[name]) for name in a)


def base_dtype(case):
    if case.spec.quantization is not None:
        return case.x.dtype
    return next(p.dtype for name, p in case.params.items() if name.startswith("weight"))


def tolerance(case):
    """Law 3's: of the coarser of the tensors' and the reductions' dtype."""
    coarse = base_dtype(case) == torch.float32 or case.spec.reduce_dtype == "float32"
    return EXACT[torch.float32 if coarse else torch.float64]


def expected(case, dtype=torch.float64):
    """The oracle's output, gradients of the parameters, gradient of x: of a quantised weight, as if it were plain."""
    if case.spec.quantization is not None:
        y, grads, x_grad = expected(dequantized(case), dtype)
        return y, {name: g for name, g in grads.items() if not name.startswith("weight")}, x_grad
    return oracle.run(
        case.params,
        case.x,
        case.cotangent,
        dtype=dtype,
        keep=keep_of(case),
        probability=case.spec.dropout,
        **plain(case.spec),
        **({} if case.gate is None else {"gate": case.gate}),
    )


def dequantized(case):
    """A case with the weight as the oracle dequantises it."""
    how, params = case.spec.quantization, {n: p for n, p in case.params.items() if not n.startswith(sharding.SCALE)}
    for name in [name for name in params if name.startswith("weight")]:
        scale = case.params[sharding.SCALE if how.scale == "tensor" else name.replace("weight", sharding.SCALE)]
        weight = oracle.dequantized(case.params[name], scale, how.code, how.block if how.scale == "block" else 1 << 30)
        params[name] = weight.to(case.x.dtype)
    return dataclasses.replace(case, params=params, spec=dataclasses.replace(case.spec, quantization=None))


def named(y, grads, x_grad):
    """One dict of all that a run gives."""
    return {"y": y, **grads, **({} if x_grad is None else {"x": x_grad})}


# The laws.


def law_1_no_update_is_the_base(case):
    """lora_B = 0 and lora_B_bias = 0 -> the base layer, bit for bit, on every process.

    Of DoRA, with the magnitudes that it starts with, to rounding.
    """
    params = {name: p * 0 if name.startswith("lora_B") else p for name, p in case.params.items()}
    own = variants.start(params, case.spec, whole=True)
    stacked = mapped.stack(params | own, case.spec)
    base = {name: p for name, p in stacked.items() if not name.startswith("lora_")}
    adapted = mapped.local_forward(case.spec, stacked, case.x, key=case.key, gate=case.gate)
    alone = mapped.local_forward(case.spec.base, base, case.x)
    if not own:
        assert same(adapted, alone)
        return
    few_roundings = 8 * torch.finfo(torch.bfloat16).eps
    assert error(adapted, alone) <= (few_roundings if base_dtype(case) == torch.bfloat16 else tolerance(case))


def law_2_unshard_inverts_shard(case):
    """unshard(shard(p)) == p bit for bit; every part is where the table says; padding is zero and cut off."""
    spec = case.spec
    shards = [lora_fn.shard(case.params, spec, index) for index in range(spec.axis.size)]
    assert same_dicts(lora_fn.unshard(shards, spec), case.params)
    for name, p in case.params.items():
        for index, local in enumerate(shards):
            assert local[name].shape == sharding.local_shape(spec, name)
            assert same(local[name], naive_part(p, spec, name, index))


def naive_part(p, spec, name, index):
    """What a process should hold of a canonical parameter, said without a layout."""
    placement, size = sharding.rule(spec, name).placement, spec.axis.size
    if placement == Replicate():
        return p
    base, _, ending = name.partition(".")
    if spec.scheme == "rank" and base in (("lora_B", "lora_diag") if spec.kind == "row" else ("lora_A",)):
        return p.chunk(size, placement.dim)[index]
    blocks = dict.fromkeys(range(spec.stride), p.shape[placement.dim] // spec.stride)
    sizes = {part.name: part.size for part in spec.parts} or blocks
    pieces = [p] if ending else p.split(list(sizes.values()), placement.dim)
    return torch.cat(
        [
            naive_cut(piece.movedim(placement.dim, 0), spec, part, size, index).movedim(0, placement.dim)
            for part, piece in zip([ending] if ending else sizes, pieces, strict=True)
        ],
        placement.dim,
    )


def naive_cut(rows, spec, part, size, index):
    """Rows of one part: in the order of the heads where there are heads, in `size` equal pieces, padded with zeros."""
    if spec.heads is not None:
        kv, copies = spec.heads.key_value, spec.heads.copies(size)
        if spec.kind == "qkv" and part != spec.parts[0].name:
            heads = list(rows.chunk(kv))
            tiled = heads * copies
            adjacent = [head for head in heads for _ in range(copies)]
        else:
            groups = [group.chunk(copies) for group in rows.chunk(kv)]
            tiled = [group[copy] for copy in range(copies) for group in groups]
            adjacent = [piece for group in groups for piece in group]
        rows = torch.cat(tiled if spec.heads.order == "tiled" else adjacent)
    length = -(-len(rows) // size)
    padding = rows.new_zeros(length * size - len(rows), *rows.shape[1:])
    return torch.cat([rows, padding])[index * length : (index + 1) * length]


def law_3_all_equals_the_oracle(case):
    """Forward and every gradient equal the dense layer's; whatever arrives at padded outputs does not leak."""
    got, want = named(*mapped.run(case, fill=7.0)), named(*expected(case))
    assert got.keys() == want.keys()
    errors = {name: error(got[name], want[name]) for name in want}
    assert max(errors.values()) <= tolerance(case), errors
    dtypes = {name: got[name].dtype for name in got if name not in ("y", "x")}
    held = strategies.held(case.spec)
    assert dtypes == {name: p.dtype for name, p in case.params.items() if name not in held}


def siblings_of(case, seed):
    """Three layers that get one input, the second with a rank of its own."""
    spec = case.spec
    wider = dataclasses.replace(
        spec, rank=2 * spec.rank, parts=tuple(dataclasses.replace(part, rank=2 * part.rank) for part in spec.parts)
    )
    made = [strategies.case(s, case.x.shape[:-1], seed + n, key=case.key) for n, s in enumerate((spec, wider, spec))]
    return [dataclasses.replace(each, x=made[0].x) for each in made]


def law_siblings_share_a_gather(cases):
    """One gather brings X and every layer's H: all outputs and gradients are the dense layers', that of x their sum."""
    spec, x = cases[0].spec, cases[0].x
    outside = [dataclasses.replace(each.spec, input="gathered", sequence_dim=None) for each in cases]

    def loss(params, x, cotangents, index):
        at = [{"index": index, "key": mapped.key_tensor(each.key), "gate": each.gate} for each in cases]
        downs = [
            functools.partial(layers.down, p, spec=s, sequence_dim=spec.sequence_dim, **own)
            for p, s, own in zip(params, outside, at, strict=True)
        ]
        whole, hs = siblings.gathered(x, downs, spec.axis, index, dim=spec.sequence_dim, dtype=spec.reduce_dtype)
        ys = [
            mapped.whole(lora_fn.apply(p, whole, s, hs=h, **own))
            for p, s, h, own in zip(params, outside, hs, at, strict=True)
        ]
        return sum((y * c).sum() for y, c in zip(ys, cotangents, strict=True)), ys

    cotangents = [
        mapped.cut_cotangent(each.cotangent, mapped.output_placement(each.spec), spec.axis.size) for each in cases
    ]
    stacked = [mapped.stack(each.params, each.spec) for each in cases]
    gradient = torch.vmap(torch.func.grad(loss, argnums=(0, 1), has_aux=True))
    parts = mapped.cut(x, mapped.input_placement(spec), spec.axis.size)
    (grads, x_grad), ys = gradient(stacked, parts, cotangents, mapped.lanes(spec))
    x_grads = []
    for each, own, y, s in zip(cases, grads, ys, outside, strict=True):
        want_y, want, dx = expected(each)
        x_grads.append(dx)
        placement = mapped.output_placement(each.spec)
        whole = each.spec.out_features if placement == Shard(-1) else None
        got = mapped.unstack(mapped.synced(own, s), each.spec) | {"y": mapped.join(y, placement, whole)}
        errors = {name: error(got[name], other) for name, other in (want | {"y": want_y}).items()}
        assert max(errors.values()) <= tolerance(each), errors
    assert error(mapped.join(x_grad, mapped.input_placement(spec)), sum(x_grads)) <= tolerance(cases[0])


def of_its_own(params, x, spec, *, index, key, gate):
    """A module that computes by itself, and sees the updated weight in its own one's place."""
    assert key is None or spec.dropout == 0
    weight = lora_fn.updated_weight(params, spec, index=index)
    assert weight.dtype == params["weight"].dtype and weight.shape == params["weight"].shape
    return lora_fn.apply({"weight": weight}, x, spec.base, index=index)


def law_a_raw_parameter_is_a_layer(case):
    """What computes with the updated weight is the layer: forward, every gradient, on every process; B = 0 is exact."""
    got, want = named(*mapped.run(case, fill=7.0, layer=of_its_own)), named(*expected(case))
    errors = {name: error(got[name], want[name]) for name in want}
    assert max(errors.values()) <= tolerance(case), errors
    stacked = mapped.stack(case.params | {"lora_B": case.params["lora_B"] * 0}, case.spec)
    weights = vmap(lambda p, index: lora_fn.updated_weight(p, case.spec, index=index))(stacked, mapped.lanes(case.spec))
    assert same(weights, stacked["weight"])


def law_4_replicas_agree(case):
    """Gradients of replicated parameters are bit-identical on every process, after the sync in deferred mode."""
    _, grads, _ = mapped.local_run(case)
    for name in [name for name in mapped.replicated(case.spec) if name in grads]:
        assert all(same(grads[name][0], other) for other in grads[name][1:]), name
    mapped.unstack(grads, case.spec)  # which refuses copies that differ


def mergeable(spec):
    return spec.bias >= spec.lora_bias and spec.variant != "alora" and spec.quantization is None


def law_5_merge_is_apply(case):
    """The merged layer gives what the adapted one gives; merging again gives the same, from untouched parameters."""
    spec = case.spec
    before = {name: p.clone() for name, p in case.params.items()}
    if not mergeable(spec):
        with pytest.raises(SpecError, match=r"no bias to merge it into|for some tokens only|is held as"):
            lora_fn.merge(case.params, spec)
        return
    merged = lora_fn.merge(case.params, spec)
    got, want = mapped.forward(spec.base, merged, case.x), mapped.forward(spec, case.params, case.x)
    assert error(got, want) <= tolerance(case)
    for _ in range(2):
        assert same_dicts(lora_fn.merge(case.params, spec), merged)
    assert same_dicts(case.params, before)


def law_6_shard_commutes_with_merge(case):
    """Merging shards gives the shards of the merged; deltas too."""
    spec = case.spec
    if not mergeable(spec):
        return
    whole = mapped.stack(lora_fn.merge(case.params, spec), spec.base)
    stacked = mapped.stack(case.params, spec)
    merged = vmap(lambda params, index: lora_fn.merge(params, spec, index=index))(stacked, mapped.lanes(spec))
    assert max(error(merged[name], whole[name]) for name in whole) <= tolerance(case)
    for part in spec.updates:
        whole_change = lora_fn.delta(case.params, spec, part=part.name)
        told = {"part": part.name, "whole": False}
        changes = vmap(lambda p, index, told=told: lora_fn.delta(p, spec, index=index, **told))(
            stacked, mapped.lanes(spec)
        )
        for index, change in enumerate(changes):
            assert error(change, naive_part(whole_change, spec, part.param("weight"), index)) <= tolerance(case)


def law_6_init_knows_no_axis(spec, seed, how):
    """The same seed gives the same canonical factors at every size of the axis, bit for bit."""
    factors = lora_fn.init(spec, seed=seed, init_lora_weights=how)
    whole = dataclasses.replace(spec, axis=lora_fn.Axis(), pad=False)
    assert same_dicts(factors, lora_fn.init(whole, seed=seed, init_lora_weights=how))
    assert {name: tuple(p.shape) for name, p in factors.items()} == {
        name: sharding.canonical_shape(spec, name) for name in sharding.drawn_names(spec)
    }


def law_6_factorized_knows_no_axis(case, seed, how):
    """What a weight gives, too; and the residual of a part is the part of the residual, which the factors complete."""
    plain_one = dataclasses.replace(case.spec, variant="lora")  # factors are those of DoRA, too
    spec, params = plain_one, {n: p for n, p in case.params.items() if not n.startswith("lora_")}
    told = {"seed": seed, "init_lora_weights": how, "options": OPTIONS.get(f"{how}_config", {})}
    told |= {"statistics": {part.name: statistic_of(spec, part, how, seed) for part in spec.updates}}
    factors, base = factorize.factorize(params, spec, **told, dtype=torch.float64)
    whole = dataclasses.replace(spec, axis=lora_fn.Axis())
    assert all(map(same_dicts, (factors, base), factorize.factorize(params, whole, **told, dtype=torch.float64)))
    assert {name: tuple(p.shape) for name, p in factors.items()} == {
        name: sharding.canonical_shape(spec, name) for name in sharding.drawn_names(spec)
    }
    does = starts.start_of(how).base
    assert base.keys() == (set() if does == starts.KEPT else {n for n in params if n.startswith("weight")})
    if does != starts.RESIDUAL:
        return
    residual = vmap(lambda p, index: subtract(p, spec, index=index))(
        mapped.stack({**params, **factors}, spec), mapped.lanes(spec)
    )
    expected = mapped.stack(base, spec)
    for name in base:  # of full rank, nothing but rounding is left: so by the weight's size
        wrong = (residual[name] - expected[name]).abs().max() / params[name].abs().max()
        assert wrong <= EXACT[base_dtype(case)]
    merged = lora_fn.merge({**params, **base, **factors}, spec)
    assert max(error(merged[name], params[name]) for name in base) <= EXACT[base_dtype(case)]


def law_starts_are_the_papers(case, seed):
    """What each factorisation is for, told without it: of every part, on its own rows."""
    spec, params = case.spec, {n: p for n, p in case.params.items() if n.startswith("weight")}
    for how, options in STARTS:
        statistics = {part.name: statistic_of(spec, part, how, seed) for part in spec.updates}
        told = {"seed": seed, "init_lora_weights": how, "options": options, "statistics": statistics}
        factors, _ = factorize.factorize(params, spec, **told, dtype=torch.float64)
        for part in spec.updates:
            weight = part_of(params, spec, part).double()
            down, up = factors[part.param("lora_A")], factors[part.param("lora_B")]
            r, scaling = part.rank, part.alpha / (math.sqrt(part.rank) if spec.use_rslora else part.rank)
            left, statistic = weight - scaling * up @ down, statistics[part.name]
            if how == "pissa":  # the best approximation of that rank, shared out evenly
                close_to(left.square().sum(), torch.linalg.svdvals(weight)[r:].square().sum(), weight)
                close_to(up.T @ up, down @ down.T, weight)
            elif how == "olora":  # B spans the first columns
                close_to(up.T @ up, torch.eye(r).double(), weight)
                close_to((up @ down)[:, :r], weight[:, :r], weight)
            elif how == "mica":  # B is where the weight is smallest, and A nothing
                smallest = torch.linalg.svdvals(weight)[-r:]
                close_to((up.T @ weight).square().sum(), smallest.square().sum(), weight)
                assert not down.any()
            elif how == "eva":
                close_to(down, statistic[:r], weight)
                assert not up.any()
            elif how == "corda":  # the best approximation, or the least part, as inputs of that covariance see it
                damped = statistic + 0.01 * statistic.diagonal().mean() * torch.eye(len(statistic)).double()
                seen = torch.linalg.svdvals(weight @ damped).square()
                rest = seen[r:] if options["corda_method"] == "ipm" else seen[:-r]
                close_to((left @ damped).square().sum(), rest.sum(), weight @ damped)
            elif how == "lora_ga":  # a step along the gradient is what they first learn
                u, s, vh = torch.linalg.svd(statistic.double(), full_matrices=False)
                close_to((up.T @ u[:, r : 2 * r]).abs(), (s[r : 2 * r] * torch.eye(r).double()), statistic)
                close_to((down @ vh[:r].T).abs(), torch.eye(r).double(), statistic)


def law_low_rank_is_the_first_singular_vectors(seed):
    """Of a matrix whose singular values fall, tall or wide, to what the iteration leaves of the rest."""
    generator = torch.Generator().manual_seed(seed)
    tall = torch.linalg.qr(torch.randn(40, 30, generator=generator).double()).Q * 0.7 ** torch.arange(30)
    tall = tall @ torch.linalg.qr(torch.randn(30, 30, generator=generator).double()).Q
    for a in (tall, tall.T):
        u, s, vh = factorize.low_rank_svd(a, 5, steps=20, generator=torch.Generator().manual_seed(seed))
        best = torch.linalg.svdvals(a)
        close_to(s, best[:5], a)
        close_to((a - (u * s) @ vh).square().sum(), best[5:].square().sum(), a)


STARTS = (
    *((how, {}) for how in ("pissa", "olora", "mica", "eva")),
    *(("corda", {"corda_method": method}) for method in ("ipm", "kpm")),
    ("lora_ga", {"direction": "ArB2r", "scale": "unit"}),
)


def part_of(params, spec, part):
    """The weight [o, i] of a part, of canonical parameters."""
    if part.name and spec.fuse_qkv:
        start = sum(p.size for p in spec.parts[: [p.name for p in spec.parts].index(part.name)])
        return params["weight"][start : start + part.size]
    weight = params[part.param("weight")]
    return weight.T if spec.fan_in_fan_out else weight


def close_to(a, b, scale):
    """Equal but for what double precision leaves of numbers as large as the square of a matrix."""
    assert (a - b).abs().max() <= 1e-10 * scale.square().sum().clamp(min=1)


def statistic_of(spec, part, how, seed):
    x = torch.randn(2 * spec.in_features + 9, spec.in_features, generator=torch.Generator().manual_seed(seed)).double()
    if how == "lora_ga":
        return x[: part.size] if len(x) >= part.size else x.new_zeros(part.size, spec.in_features).copy_(x[0])
    return {"corda": x.T @ x / len(x), "eva": torch.linalg.qr(x.T @ x).Q}.get(how)


def law_6_a_start_knows_no_axis(case):
    """What comes of the weight is the same, in fp32 bit for bit, whether the weight is cut or not."""
    spec = case.spec
    whole = variants.start(case.params, spec, whole=True)
    rest = {name: p for name, p in case.params.items() if name not in whole}
    local = vmap(lambda params, index: variants.start(params, spec, index=index))(
        mapped.stack(rest, spec), mapped.lanes(spec)
    )
    assert {name: tuple(p.shape) for name, p in whole.items()} == {
        name: sharding.canonical_shape(spec, name)
        for name in sharding.adapter_names(spec)
        if name not in sharding.drawn_names(spec)
    }
    assert same_dicts(mapped.unstack(local, spec), whole)


def law_6_reshard_is_unshard_and_shard(case, size):
    spec = case.spec
    other = dataclasses.replace(spec, axis=dataclasses.replace(spec.axis, size=size))
    shards = [lora_fn.shard(case.params, spec, index) for index in range(spec.axis.size)]
    again = lora_fn.reshard(shards, spec, size)
    assert len(again) == size
    assert all(same_dicts(local, lora_fn.shard(case.params, other, index)) for index, local in enumerate(again))
    assert same_dicts(lora_fn.unshard(again, other), case.params)


def law_scaling_is_another_alpha(case, alpha):
    """The output with `scaling` as data is that of the spec with those alphas."""
    alphas = {p.name: alpha * (1 if case.spec.share_A else k) for k, p in enumerate(case.spec.updates, 1)}
    parts = [dataclasses.replace(p, alpha=alphas.get(p.name, p.alpha)) for p in case.spec.parts]
    other = dataclasses.replace(case.spec, alpha=1.0 if parts else alpha, parts=tuple(parts))
    scaling = torch.tensor([other.scaling_of(part) for part in other.updates], dtype=torch.float64)
    params = mapped.stack(case.params, other)
    told = {"key": case.key, "gate": case.gate}
    found = mapped.local_forward(case.spec, params, case.x, scaling=scaling, **told)
    assert error(found, mapped.local_forward(other, params, case.x, **told)) <= tolerance(case)


def law_8_adapters_are_a_batch(case, adapters, keys, *, axis_outside, per_row):
    """vmap over adapters, outside or inside the mapped axis, equals a loop over them.

    Args:
        case: The base, and input and cotangent.
        adapters: Canonical factors of K adapters, a list of dicts.
        keys: None, or K keys.
        axis_outside: Whether the level that maps the axis is the outer one.
        per_row: Whether every adapter gets an input of its own.
    """
    spec, size = case.spec, case.spec.axis.size
    all_params = [{**case.params, **factors} for factors in adapters]
    scales = range(1, len(adapters) + 1) if per_row and case.x.is_floating_point() else [1] * len(adapters)
    inputs = [case.x * scale for scale in scales]

    def one(params, x, cotangent, index, key):
        def loss(params, x):
            y = mapped.whole(lora_fn.apply(params, x, spec, index=index, key=key, gate=case.gate))
            return (y * cotangent).sum(), y

        grads, y = grad(loss, argnums=(0, 1) if x.is_floating_point() else 0, has_aux=True)(params, x)
        grads, x_grad = grads if x.is_floating_point() else (grads, torch.zeros(()))
        return y, lora_fn.sync_gradients({"": grads}, {"": spec}, index=index)[""], x_grad

    def stacked(params, x):
        return mapped.stack(params, spec), mapped.cut(x, mapped.input_placement(spec), size)

    locals_ = [stacked(params, x) for params, x in zip(all_params, inputs, strict=True)]
    base = [name for name in case.params if not name.startswith("lora_")]
    # Adapters in front, then the axis: [K, n, ...]; the base has no K. vmap matches in_dims to a dict by position.
    params = {name: locals_[0][0][name] if name in base else [p[name] for p, _ in locals_] for name in case.params}
    params = {name: p if name in base else torch.stack(p) for name, p in params.items()}
    x = torch.stack([x for _, x in locals_]) if per_row else locals_[0][1]
    cotangent = mapped.cut_cotangent(case.cotangent, mapped.output_placement(spec), size)
    over_adapters = {name: None if name in base else 0 for name in case.params}
    over_axis = {name: 0 if name in base else 1 for name in case.params} if axis_outside else 0
    key, over_keys = (None, None) if keys is None else (torch.tensor(keys), 0)
    outer, inner = (over_adapters, 0 if per_row else None, None, None, over_keys), (0, 0, 0, 0, None)
    if axis_outside:
        outer, inner = (over_axis, 1 if per_row else 0, 0, 0, None), outer
    got = vmap(vmap(one, in_dims=inner), in_dims=outer)(params, x, cotangent, mapped.lanes(spec), key)
    for k, (params, x) in enumerate(locals_):
        own_key = None if keys is None else torch.tensor(keys[k])
        want = vmap(one, in_dims=inner if not axis_outside else (0, 0, 0, 0, None))(
            params, x, cotangent, mapped.lanes(spec), own_key
        )
        for a, b in zip(named(*got).values(), named(*want).values(), strict=True):
            assert error(a.select(1 if axis_outside else 0, k), b) <= tolerance(case)


def law_9_arguments_stay(case):
    """No argument is modified, torch's random state neither; the same call gives the same."""
    before = dataclasses.replace(
        case,
        params={name: p.clone() for name, p in case.params.items()},
        x=case.x.clone(),
        cotangent=case.cotangent.clone(),
    )
    state = torch.random.get_rng_state()
    first, second = named(*mapped.run(case)), named(*mapped.run(case))
    if mergeable(case.spec):
        merged = lora_fn.merge(case.params, case.spec)
        for p in merged.values():
            p.zero_()  # New tensors: nobody else sees it.
    for index in range(case.spec.axis.size):
        for p in lora_fn.shard(case.params, case.spec, index).values():
            p.zero_()
    assert same_dicts(first, second)
    assert torch.equal(state, torch.random.get_rng_state())
    assert same_dicts(case.params, before.params)
    assert same(case.x, before.x)
    assert same(case.cotangent, before.cotangent)


def law_9_the_key_decides(case):
    """Another key drops others; no key, or probability 0, drops nothing."""
    spec = dataclasses.replace(case.spec, dropout=0.5)
    forward = functools.partial(mapped.forward, gate=case.gate)
    one, again, other, none = (forward(spec, case.params, case.x, key=key) for key in (1, 1, 2, None))
    assert same(one, again)
    assert not torch.equal(one, other)
    assert not torch.equal(one, none)
    assert same(none, forward(dataclasses.replace(spec, dropout=0.0), case.params, case.x, key=1))


def law_autocast_casts_before(case):
    """Under autocast: bit for bit what comes of an input and a base that are cast before. An embedding has no input to
    cast, so nothing is."""

    def under(params, x, spec, **told):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return lora_fn.apply(params, x, spec, **told)

    def before(params, x, spec, **told):
        if x.is_floating_point():
            base = {n: p for n, p in params.items() if n.startswith(("weight", "bias")) and p.dtype == torch.float32}
            base = {n: p.bfloat16() for n, p in base.items() if not n.startswith(sharding.SCALE)}
            params, x = params | base, x.bfloat16()
        return lora_fn.apply(params, x, spec, **told)

    got, want = (named(*mapped.run(case, layer=layer)) for layer in (under, before))
    assert same_dicts(got, want) and got["y"].dtype == (torch.bfloat16 if case.x.is_floating_point() else torch.float32)


def law_gradients_have_gradients(case):
    """Of one process, where no transform looks on: forward and gradients are the oracle's, whose gradients are found by
    differences."""
    params = {name: p.clone().requires_grad_() for name, p in case.params.items()}
    x = case.x.clone().requires_grad_()

    def layer(x, *tensors):
        return lora_fn.apply(dict(zip(params, tensors, strict=True)), x, case.spec, key=torch.tensor(case.key))

    y = layer(x, *params.values())
    x_grad, *grads = torch.autograd.grad(y, [x, *params.values()], case.cotangent)
    got, want = named(y, dict(zip(params, grads, strict=True)), x_grad), named(*expected(case))
    errors = {name: error(got[name], want[name]) for name in want}
    assert max(errors.values()) <= tolerance(case), errors
    assert torch.autograd.gradgradcheck(layer, (x, *params.values()), fast_mode=True)


def law_norm_is_the_dense_models(model):
    """The norm of all gradients, on every process, is that of the dense model; clipping bounds it.

    Args:
        model: {path: case}, all on one axis; "replicated" layers, which have no apply, get gradients for parameters.
    """
    specs = {path: one.spec for path, one in model.items()}
    size = next(iter(specs.values())).axis.size
    index = torch.arange(size)
    local, dense = {}, []
    for path, one in model.items():
        if one.spec.kind == "replicated":
            deferred = one.spec.gradients == "deferred"
            local[path] = {
                name: summands(p, one.spec, name) if deferred else p.expand(size, *p.shape)
                for name, p in one.params.items()
            }
            dense += one.params.values()
        else:
            local[path] = mapped.local_run(one, sync=False)[1]
            dense += expected(one)[1].values()
    norm = torch.cat([g.double().reshape(-1) for g in dense]).norm()

    def measured(grads, index):
        grads = lora_fn.sync_gradients(grads, specs, index=index)
        norm = lora_fn.grad_norm(grads, specs, index=index)
        half, same = lora_fn.clip(grads, norm, norm / 2), lora_fn.clip(grads, norm, norm * 2 + 1)
        return grads, norm, same, lora_fn.grad_norm(half, specs, index=index)

    grads, norms, unclipped, halves = vmap(measured)(local, index)
    coarse = max(tolerance(one) for one in model.values())
    assert error(norms, norm.expand(size)) <= coarse
    assert all(same_dicts(unclipped[path], grads[path]) for path in grads)
    assert error(halves, norm.expand(size) / 2) <= coarse + 1e-6 / max(norm.item(), 1e-6)


def summands(p, spec, name):
    """A canonical gradient as the backward of all processes leaves it: where it is partial, summands of it."""
    size = spec.axis.size
    if not sharding.partial(spec, name):
        return p.expand(size, *p.shape)
    weights = torch.arange(1, size + 1, dtype=p.dtype).view(-1, *(1,) * p.dim())
    return p * weights / weights.sum()


def law_lorafa_is_the_nearest_update(case):
    """Gradients of lora_B are corrected as the oracle says, on every process; all others stay."""
    spec, generator = case.spec, torch.Generator().manual_seed(1)
    grads = {n: torch.randn(p.shape, generator=generator, dtype=p.dtype) for n, p in case.params.items()}
    found = mapped.corrected(case, grads)
    for part in spec.updates:
        down, up = "lora_A" if spec.share_A else part.param("lora_A"), part.param("lora_B")
        scaling = part.alpha / (math.sqrt(part.rank) if spec.use_rslora else part.rank)
        grads[up] = oracle.lorafa(case.params[down], grads[up], scaling)
        assert error(found.pop(up), grads.pop(up)) <= tolerance(case)
    assert same_dicts(found, {name: grads[name] for name in found})


def law_loraplus_knows_no_axis(case):
    """lora_B and vectors move `lr_ratio` times as fast, factors of an embedding at their own rate; cut or whole."""
    names = sharding.trained_names(case.spec)
    whole, local = ({n: p[n] for n in names} for p in (case.params, lora_fn.shard(case.params, case.spec, 0)))
    rates = {"lr": 2.0, "lr_ratio": 8.0, "lr_embedding": 5.0, "weight_decay": 0.5}
    for params in (whole, local):
        groups = lora_fn.parameter_groups({"layer": params}, {"layer": case.spec}, **rates)
        found = {id(p): (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}
        assert sum(len(group["params"]) for group in groups) == len(names)
        for name, p in params.items():
            rate = 16.0 if name.startswith("lora_B") or p.dim() == 1 else 2.0
            if case.spec.kind == "embedding" and name in ("lora_A", "lora_B"):
                rate = 5.0
            assert found[id(p)] == (rate, 0.0 if "bias" in name.lower() else 0.5)


# Drawn cases.


@each_adapted_row
@settings(max_examples=50)
@given(data=st.data())
def test_law_1_no_update_is_the_base(row, data):
    law_1_no_update_is_the_base(data.draw(cases(row, dtypes=(torch.float64, torch.float32, torch.bfloat16))))


@each_row
@settings(max_examples=60)
@given(data=st.data())
def test_law_2_unshard_inverts_shard(row, data):
    law_2_unshard_inverts_shard(data.draw(cases(row, dtypes=(torch.float64, torch.float32, torch.bfloat16))))


@each_adapted_row
@settings(max_examples=150)
@given(data=st.data())
def test_law_3_all_equals_the_oracle(row, data):
    dtypes = (None, "float32", "float64")
    law_3_all_equals_the_oracle(data.draw(cases(row, dtypes=tuple(EXACT), reduce_dtypes=dtypes)))


@each_adapted_row
@settings(max_examples=20)
@given(data=st.data())
def test_autocast_casts_before(row, data):
    law_autocast_casts_before(data.draw(cases(row, dtypes=(torch.float32,), reduce_dtypes=(None, "float32"))))


QUANTIZED = ("linear", "column", "column, fused", "qkv", "column, output gathered", "row", "row, by rank")


@pytest.mark.parametrize("row", QUANTIZED)
@settings(max_examples=15)
@given(data=st.data())
def test_all_laws_of_quantized_weights(row, data):
    each = data.draw(strategies.quantized_cases(row, dtypes=tuple(EXACT), reduce_dtypes=(None, "float32", "float64")))
    law_1_no_update_is_the_base(each)
    law_2_unshard_inverts_shard(each)
    law_3_all_equals_the_oracle(each)
    law_4_replicas_agree(each)
    law_5_merge_is_apply(each)
    if each.x.dtype == torch.float32:
        law_autocast_casts_before(each)
        law_6_a_start_knows_no_axis(each)


@pytest.mark.parametrize("row", ("column", "column, fused", "qkv"))
@settings(max_examples=12)
@given(data=st.data(), seed=SEEDS)
def test_siblings_share_a_gather(row, data, seed):
    case = data.draw(cases(row, input="sharded"))
    law_siblings_share_a_gather(siblings_of(case, seed))


@pytest.mark.parametrize("row", RAW)
@settings(max_examples=30)
@given(data=st.data())
def test_law_3_of_raw_parameters(row, data):
    fixed = {"dropout": 0.0, "bias": False, "lora_bias": False, "sequence_dim": None, "variant": "lora"}
    dtypes = (None, "float32", "float64")
    law_a_raw_parameter_is_a_layer(data.draw(cases(row, dtypes=tuple(EXACT), reduce_dtypes=dtypes, **fixed)))


def test_a_raw_parameter_keeps_its_dtype_under_autocast():
    one = case(fixed_spec("linear", size=1), (), 1, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = lora_fn.updated_weight(one.params, one.spec)
    assert same(found, lora_fn.updated_weight(one.params, one.spec))


@pytest.mark.parametrize("attributes", ({"bias": True}, {"lora_bias": True}, {"dropout": 0.5}, {"rank": 0}))
def test_only_a_plain_update_goes_into_a_raw_parameter(attributes):
    one = case(fixed_spec("linear", size=1, **attributes), (), 1)
    with pytest.raises(SpecError, match=r"updated_weight: a linear layer of rank [03], variant 'lora', dropout"):
        lora_fn.updated_weight(one.params, one.spec)


@each_adapted_row
@settings(max_examples=40)
@given(data=st.data())
def test_law_4_replicas_agree(row, data):
    law_4_replicas_agree(data.draw(cases(row, dtypes=(torch.float64, torch.float32, torch.bfloat16))))


@each_adapted_row
@settings(max_examples=60)
@given(data=st.data())
def test_law_5_merge_is_apply(row, data):
    law_5_merge_is_apply(data.draw(cases(row, dtypes=tuple(EXACT), reduce_dtypes=(None, "float32", "float64"))))


@each_adapted_row
@settings(max_examples=40)
@given(data=st.data())
def test_law_6_shard_commutes_with_merge(row, data):
    law_6_shard_commutes_with_merge(data.draw(cases(row, dtypes=tuple(EXACT))))


def as_plain(spec):
    """The layer with plain factors of its own in each part, and scales above 0; its weights are the same."""
    defaults = {f.name: f.default for f in dataclasses.fields(spec)}
    forms = {name: defaults[name] for name in ("variant", "group_size", "block_diagonal", "blocks", "share_A")}
    parts = tuple(dataclasses.replace(part, alpha=abs(part.alpha)) for part in spec.parts)
    return dataclasses.replace(spec, **forms, parts=parts, alpha=abs(spec.alpha))


def can_start(spec, how):
    problems = Problems(SpecError)
    starts.check("the layer", spec, how, problems)
    return not problems.found


@each_adapted_row
@settings(max_examples=30)
@given(data=st.data(), seed=SEEDS, how=st.sampled_from(DRAWN))
def test_law_6_init_knows_no_axis(row, data, seed, how):
    spec = data.draw(strategies.specs(row))
    assume(can_start(spec, how))
    law_6_init_knows_no_axis(spec, seed, how)


@pytest.mark.parametrize("row", [row for row in ADAPTED if not row.startswith(("conv2d", "experts"))])
@settings(max_examples=40, suppress_health_check=[HealthCheck.filter_too_much])
@given(data=st.data(), seed=SEEDS)
def test_law_6_factorized_knows_no_axis(row, data, seed):
    drawn = data.draw(cases(row, dtypes=tuple(EXACT), lora_bias=False))
    drawn = dataclasses.replace(drawn, spec=as_plain(drawn.spec))
    hows = [how for how in ("pissa_niter_2", *FACTORED) if can_start(drawn.spec, how)]
    assume(hows)
    law_6_factorized_knows_no_axis(drawn, seed, data.draw(st.sampled_from(hows)))


@each_adapted_row
@settings(max_examples=30)
@given(data=st.data())
def test_law_6_a_start_knows_no_axis(row, data):
    law_6_a_start_knows_no_axis(data.draw(cases(row, dtypes=(torch.float32,))))


def starts_of(row, **attributes):
    """A case of a row whose layer can start in every way."""
    return case(fixed_spec(row, gradients="summed", use_rslora=True, **attributes), (3, 8), 2, dtype=torch.float64)


def test_low_rank_is_the_first_singular_vectors():
    law_low_rank_is_the_first_singular_vectors(5)


@pytest.mark.parametrize("row, attributes", [("column", {}), ("row", {}), ("qkv", {"fuse_qkv": True})])
def test_starts_are_the_papers(row, attributes):
    law_starts_are_the_papers(starts_of(row, **attributes), 3)


def test_starts_of_a_transposed_weight_are_the_papers():
    law_starts_are_the_papers(starts_of("linear", fan_in_fan_out=True), 3)


@each_row
@settings(max_examples=60)
@given(data=st.data(), size=st.sampled_from(SIZES))
def test_law_6_reshard_is_unshard_and_shard(row, data, size):
    drawn = data.draw(cases(row))
    try:
        dataclasses.replace(drawn.spec, axis=lora_fn.Axis(size=size))
    except SpecError:
        assume(False)
    law_6_reshard_is_unshard_and_shard(drawn, size)


@each_adapted_row
@settings(max_examples=25)
@given(data=st.data(), axis_outside=st.booleans(), per_row=st.booleans(), seed=SEEDS)
def test_law_8_adapters_are_a_batch(row, data, axis_outside, per_row, seed):
    drawn = data.draw(cases(row, reduce_dtypes=(None, "float64")))
    count = data.draw(st.sampled_from([1, 2, drawn.spec.axis.size]))
    others = [case(drawn.spec, (1,), seed + k).params for k in range(count)]
    adapters = [{name: p for name, p in params.items() if name.startswith("lora_")} for params in others]
    keys = None if drawn.key is None else [seed + k for k in range(count)]
    law_8_adapters_are_a_batch(drawn, adapters, keys, axis_outside=axis_outside, per_row=per_row)


@each_adapted_row
@settings(max_examples=25)
@given(data=st.data())
def test_law_9_arguments_stay(row, data):
    law_9_arguments_stay(data.draw(cases(row)))


@each_adapted_row
@settings(max_examples=15)
@given(data=st.data(), alpha=st.floats(0.5, 50.0))
def test_a_scaling_is_another_alpha(row, data, alpha):
    law_scaling_is_another_alpha(data.draw(cases(row)), alpha)


@settings(max_examples=30)
@given(data=st.data(), size=st.sampled_from(SIZES), dtype=st.sampled_from(list(EXACT)))
def test_the_norm_is_the_dense_models(data, size, dtype):
    rows = data.draw(st.lists(st.sampled_from(list(sharding.TABLE)), min_size=1, max_size=3))
    drawn = {"dtypes": (dtype,), "sizes": (size,), "reduce_dtypes": (None, "float64")}
    law_norm_is_the_dense_models({f"{k}.{row}": data.draw(cases(row, **drawn)) for k, row in enumerate(rows)})


# Fixed cases.


@pytest.mark.parametrize("sequence_dim", (None, 0))
@pytest.mark.parametrize("row", [row for row in ADAPTED if not row.startswith("embedding")])
def test_law_9_the_key_decides(row, sequence_dim):
    if row not in UNCUT or sequence_dim is None:
        law_9_the_key_decides(case(fixed_spec(row, sequence_dim=sequence_dim), (8, 2), 1))


@pytest.mark.parametrize("dropout", (0.0, 0.25))
@pytest.mark.parametrize("row", ("linear", "column, fused", "row"))
def test_gradients_have_gradients(row, dropout):
    options = {} if row == "column, fused" else {"bias": True, "lora_bias": True}
    law_gradients_have_gradients(case(fixed_spec(row, size=1, dropout=dropout, **options), (2, 3), 1, key=11))


def rms(x):
    return x.double().square().mean().sqrt().item()


@functools.cache
def bf16_cases(row):
    """Cases of bf16 tensors, with the oracle's results in bf16 and in float64."""
    sizes = {"in_features": 32, "out_features": 1024, "rank": 32, "alpha": 32.0, "size": 1}
    biases = {} if row.startswith("embedding") else {"bias": True, "lora_bias": True}
    num = 16 if row in FUSED else 4  # their parts are smaller
    shape = (4, 8, 8) if row.startswith("conv2d") else (32,)
    drawn = [case(fixed_spec(row, **sizes, **biases), shape, seed, dtype=torch.bfloat16) for seed in range(num)]
    dense, true = (joined([expected(c, dtype) for c in drawn]) for dtype in (torch.bfloat16, torch.float64))
    return drawn, dense, true


def joined(runs):
    """What several runs give, one float64 tensor each."""
    runs = [named(*run) for run in runs]
    return {name: torch.stack([run[name] for run in runs]).double() for name in runs[0]}


@pytest.mark.parametrize("factors", (torch.bfloat16, torch.float32), ids=("bf16 factors", "fp32 factors"))
@pytest.mark.parametrize("reduce_dtype", (None, "bfloat16", "float32"))
@pytest.mark.parametrize("sequence_dim", (None, 0))
@pytest.mark.parametrize("size", (2, 8))
@each_adapted_row
def test_law_3_in_bf16(row, size, sequence_dim, reduce_dtype, factors):
    """By RMS error against float64, on at least 4096 normal elements of each tensor."""
    if row in UNCUT and sequence_dim is not None:
        return
    drawn, dense, true = bf16_cases(BY_RANK.get(row, row))
    spec = dataclasses.replace(
        drawn[0].spec,
        axis=lora_fn.Axis(size=size),
        sequence_dim=sequence_dim,
        input=None,
        reduce_dtype=reduce_dtype,
        scheme="rank" if row in BY_RANK else None,
    )
    runs = []
    for c in drawn:
        params = {name: p.to(factors) if "lora" in name else p for name, p in c.params.items()}
        run = mapped.run(dataclasses.replace(c, spec=spec, params=params))
        assert {name: x.dtype for name, x in named(*run).items()} == {
            name: params[name].dtype if name in params else torch.bfloat16 for name in true
        }
        runs.append(run)
    ours = joined(runs)
    for name in true:
        assert true[name].numel() >= 4096
        is_summed = name in params and (sharding.partial(spec, name) or sharding.copied(spec, name))
        in_bf16 = reduce_dtype != "float32" or is_summed
        bound = 2 * math.sqrt(size) if in_bf16 else 2
        assert rms(ours[name] - true[name]) <= bound * rms(dense[name] - true[name]), name


@each_adapted_row
def test_the_gradient_of_a_gradient(row):
    """Of a function of the gradients of replicated parameters, and of those with a cut rank, against the oracle."""
    spec = fixed_spec(row, dropout=0.25, sequence_dim=None if row in UNCUT else 0)
    drawn = case(spec, (8, 2), 3, key=9)
    cut = [name for name in sharding.adapter_names(spec) if sharding.over_rank(spec, name)]
    names = [name for name in mapped.replicated(spec) if name.startswith("lora_")] + cut

    def twice(gradient_of, params, index=None):
        found = gradient_of(params)
        cubes = {name: found[name].pow(3).sum() for name in names}
        if index is not None and cut:  # of all processes
            cubes |= zip(cut, collectives.reduce_flat([cubes[name] for name in cut], spec.axis, index), strict=True)
        return sum(cubes.values())

    def local(params, x, cotangent, index):
        def loss(params):
            y = mapped.whole(lora_fn.apply(params, x, spec, index=index, key=torch.tensor(drawn.key)))
            return (torch.sin(y) * cotangent).sum()

        return grad(lambda params: twice(grad(loss), params, index))(params)

    def dense(params):
        y = oracle.forward(params, drawn.x, keep=keep_of(drawn), probability=spec.dropout, **plain(spec))
        return (torch.sin(y) * drawn.cotangent).sum()

    x = mapped.cut(drawn.x, mapped.input_placement(spec), 4)
    cotangent = mapped.cut_cotangent(drawn.cotangent, mapped.output_placement(spec), 4)
    got = mapped.unstack(vmap(local)(mapped.stack(drawn.params, spec), x, cotangent, mapped.lanes(spec)), spec)
    want = grad(lambda params: twice(grad(dense), params))(drawn.params)
    assert names
    assert all(error(got[name], want[name]) <= EXACT[torch.float64] for name in want)


@pytest.mark.parametrize("row", [row for row in ADAPTED if row != "linear" and row not in BY_RANK])
def test_gradients_that_are_never_synced_are_noticed(row):
    spec = fixed_spec(row, gradients="deferred")
    _, grads, _ = mapped.local_run(case(spec, (8,), 1), sync=False)
    with pytest.raises(SpecError, match="differ between processes; call sync_gradients"):
        mapped.unstack(grads, spec)


@pytest.mark.parametrize("input", ("sharded", "replicated"))
@pytest.mark.parametrize("gradients", ("deferred", "summed"))
def test_replicated_layers_are_summed_or_synced(input, gradients):
    spec = fixed_spec("replicated", input=input, bias=True, gradients=gradients)
    canonical = case(spec, (), 1).params
    local = {name: summands(p, spec, name) for name, p in canonical.items()}
    assert sharding.partial(spec, "weight") == (input == "sharded")
    if gradients == "summed":  # in the backward

        def loss(params, cotangents, index):
            params = lora_fn.summed(params, spec, index=index)
            return sum((params[name] * cotangents[name]).sum() for name in params)

        local = vmap(grad(loss))(mapped.stack(canonical, spec), local, mapped.lanes(spec))
    joined = mapped.unstack(mapped.synced(local, spec), spec)
    assert all(error(joined[name], p) <= EXACT[torch.float64] for name, p in canonical.items())


def test_local_tensors_of_a_canonical_size_are_merged_as_local_ones():
    """With 4 query heads to a key-value head and 4 copies, two processes hold as many rows each as there are in all."""
    parts = [lora_fn.FusedPart(name=n, size=size, rank=2) for n, size in (("q", 16), ("k", 4), ("v", 4))]
    spec = lora_fn.LayerSpec(
        kind="qkv",
        in_features=5,
        out_features=24,
        parts=tuple(parts),
        heads=lora_fn.Heads(query=8, key_value=2, multiplier=4),
        axis=lora_fn.Axis(size=2),
    )
    assert sharding.local_shape(spec, "weight") == sharding.canonical_shape(spec, "weight")
    law_6_shard_commutes_with_merge(case(spec, (), 1))


def test_replicated_layers_have_no_forward():
    with pytest.raises(SpecError, match="a replicated layer is trained but not adapted, and has no forward here"):
        lora_fn.apply({"weight": torch.ones(3)}, torch.ones(3), fixed_spec("replicated", size=1))


@pytest.mark.parametrize("row", [row for row in ADAPTED if row not in UNCUT])
def test_an_input_without_the_sequence_dimension_is_refused(row):
    one = case(fixed_spec(row, sequence_dim=1), (4,), 1)
    local = lora_fn.shard(one.params, one.spec, 0)
    with pytest.raises(SpecError, match="its input has 1 dimensions of tokens, expected at least 2"):
        lora_fn.apply(local, one.x, one.spec, index=torch.tensor(0))


@pytest.mark.parametrize("index", (-1, 4))
def test_a_place_off_the_axis_is_refused(index):
    with pytest.raises(SpecError, match=f"shard: index is {index}, expected 0 to 3"):
        lora_fn.shard({}, fixed_spec("row"), index)


@pytest.mark.parametrize("size", (1, 2, 4))
@each_adapted_row
def test_lorafa_is_the_nearest_update(row, size):
    if row in BY_RANK:
        with pytest.raises(SpecError, match="layer: is cut by scheme 'rank', and LoRA-FA corrects lora_B by all of"):
            optimizers.check_lorafa({"layer": fixed_spec(row, size=size)})
        return
    law_lorafa_is_the_nearest_update(case(fixed_spec(row, size=size, use_rslora=size == 2), (), 4))


@each_adapted_row
def test_loraplus_knows_no_axis(row):
    lora_bias = row not in ("embedding, vocabulary", "embedding, dimension")
    law_loraplus_knows_no_axis(case(fixed_spec(row, lora_bias=lora_bias), (), 4))
    law_loraplus_knows_no_axis(case(fixed_spec(row, variant="dora"), (), 4))


# Dropout's mask.


def mask(key, shape, probability):
    """What `dropout` keeps of ones, as a bool tensor."""
    tokens = torch.tensor(oracle.token_numbers(shape[:-1])).to(torch.int32).view(*shape[:-1], 1)
    features = torch.arange(shape[-1], dtype=torch.int32)
    return dropout_file.dropout(torch.ones(shape), torch.tensor(key), tokens, features, probability) != 0


@given(key=st.integers(-(1 << 63), (1 << 63) - 1), probability=st.floats(0, 0.999))
def test_the_mask_is_the_documented_one(key, probability):
    kept = mask(key, (2, 3, 5), probability)
    assert torch.equal(kept, oracle.keep_mask(key, (2, 3, 5), probability))
    one_by_one = [
        oracle.is_kept(key, token, feature, probability)
        for token in oracle.token_numbers((2, 3))
        for feature in range(5)
    ]
    assert kept.view(-1).tolist() == one_by_one


@pytest.mark.parametrize("probability", (0.0, 0.05, 0.5, 0.95))
def test_dropout_drops_as_often_as_it_should_and_keeps_the_mean(probability):
    rates = torch.stack([mask(key, (256, 256), probability).float().mean() for key in range(16)])
    deviation = math.sqrt(probability * (1 - probability) / 256**2)
    assert ((rates - (1 - probability)).abs() <= 4 * deviation).all()
    tokens, features = torch.arange(256, dtype=torch.int32).view(-1, 1), torch.arange(256, dtype=torch.int32)
    kept = dropout_file.dropout(torch.ones(256, 256), torch.tensor(3), tokens, features, probability)
    assert set(kept.unique().tolist()) <= {0.0, torch.tensor(1 / (1 - probability)).item()}


def test_masks_do_not_follow_each_other():
    """Of keys, tokens and features: any two masks agree in half of their elements, to 5 standard deviations."""
    masks = torch.stack([mask(key, (64, 64), 0.5) for key in [*range(12), 1 << 20, -1]]).double() * 2 - 1
    for vectors in (masks.reshape(14, -1), masks.movedim(1, 0).reshape(64, -1), masks.movedim(2, 0).reshape(64, -1)):
        correlation = vectors @ vectors.T / vectors.shape[1]
        assert (correlation - torch.eye(len(vectors))).abs().max() <= 5 / math.sqrt(vectors.shape[1])


def of_layers(number):
    """Masks of the kind that the layers of a model have in one step."""
    keys = dropout_file.fold_in(torch.tensor(7), torch.arange(number))
    tokens, features = torch.arange(128, dtype=torch.int32).view(-1, 1), torch.arange(128, dtype=torch.int32)
    ones = torch.ones(128, 128)
    return torch.stack([dropout_file.dropout(ones, key, tokens, features, 0.5) - 1 for key in keys]).double()


def test_masks_have_no_pattern():
    """Of a mask as an image: no wave in it is stronger, and no combination of its rows or columns is, than in one that
    is drawn at random; and such masks of other layers are as far from each other as those are."""
    masks = of_layers(24)
    size = masks.shape[-1]
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(0, 2, masks.shape, generator=generator).double() * 2 - 1

    def waves(masks):
        return torch.fft.rfft2(masks).abs().amax((1, 2)) / size

    def directions(masks):
        return torch.linalg.matrix_norm(masks, 2) / (2 * math.sqrt(size))

    def corners(masks):
        """Of four elements at the corners of rectangles of every size: what their signs make together."""
        return torch.stack(
            [
                (masks * masks.roll(d, 1) * masks.roll(e, 2) * masks.roll((d, e), (1, 2))).mean((1, 2)) * size
                for d, e in ((1, 1), (1, 2), (3, 5), (16, 64), (64, 64))
            ]
        ).abs()

    for seen in (waves, directions, corners):
        assert seen(masks).max() <= 1.15 * seen(drawn).max(), seen.__name__
        assert abs(seen(masks).mean() / seen(drawn).mean() - 1) <= 0.1, seen.__name__
    flat = masks.flatten(1)
    between = flat @ flat.T / size - size * torch.eye(len(flat))
    assert between.abs().max() <= 5


# What is drawn.


def test_everything_is_drawn():
    """Each row of the table, with each value of each attribute that it can have, and every size of the axis."""
    seen = {}
    for row in sharding.TABLE:

        @settings(max_examples=250)
        @given(spec=strategies.specs(row), seen=st.just(seen.setdefault(row, set())))
        def draw(spec, seen):
            assert sharding.row_name(spec) == row  # noqa: B023
            assert spec.in_features != spec.out_features
            values = {field.name: getattr(spec, field.name) for field in dataclasses.fields(spec)}
            smallest = min(spec.in_features, spec.out_features)
            values |= {"padding_idx": spec.padding_idx is not None, "axis": spec.axis.size}
            rank = max((part.rank for part in spec.updates), default=0)
            values["rank"] = (rank > smallest) - (rank < smallest)
            values["adapted"] = len(spec.updates)
            values["copies"] = spec.heads is not None and min(spec.heads.copies(spec.axis.size), 2)
            values["order"] = spec.heads and spec.heads.order
            seen.update((name, value) for name, value in values.items() if name not in ("in_features", "out_features"))
            seen.add(
                ("uneven", spec.pad and (spec.in_features % spec.axis.size + spec.out_features % spec.axis.size) > 0)
            )

        draw()

    def drawn(name, row=None):
        return {v for r in seen if row in (None, r) for n, v in seen[r] if n == name}

    both = {False, True}
    for row in sharding.TABLE:
        assert drawn("axis", row) == set(SIZES)
        assert drawn("gradients", row) == {"summed", "deferred"}
        assert drawn("reduce_dtype", row) == set(strategies.FREE["reduce_dtype"])
        assert drawn("use_rslora", row) == both
        assert drawn("sequence_dim", row) == ({None} if row in UNCUT else {None, 0, 1})
        expected = {"lora"} if row == "replicated" else {"lora", "dora"}
        expected |= {"qalora", "bdlora", "alora", "kasa"} if row in strategies.LINEAR else set()
        assert drawn("variant", row) == expected
        assert drawn("rank", row) == ({-1} if row == "replicated" else {-1, 0, 1})
        assert drawn("scheme", row) == {"rank" if row in BY_RANK else None}
        assert drawn("dropout", row) == {0.0, 0.25, 0.9}
        assert drawn("pad", row) == (
            both
            if row
            in (
                *("column", "column, by rank", "column, output gathered"),
                *("embedding, vocabulary", "conv2d, output channels"),
            )
            else {False}
        )
        assert drawn("bias", row) == ({False} if row.startswith("embedding") else both)
        assert drawn("lora_bias", row) == ({False} if row.startswith("embedding") or row == "replicated" else both)
        assert drawn("padding_idx", row) == (both if row.startswith("embedding") else {False})
    assert drawn("gather_output", "conv2d, output channels") == both
    assert drawn("input_is_parallel", "conv2d, input channels") == drawn("reduce_output", "experts, row") == both
    assert all(drawn("num_experts", row) == {1, 2, 3} for rows in strategies.EXPERTS.values() for row in rows)
    assert all(drawn("stride", row) == {1, 2} for row in strategies.EXPERTS["column"])
    assert drawn("input", "linear") == {"sharded", "replicated"}
    assert drawn("input", "column") == {"sharded", "replicated", "gathered"}
    assert drawn("input", "column, output gathered") == {"replicated", "gathered"}
    assert drawn("input", "row") == drawn("input", "embedding, vocabulary") == {"replicated"}
    assert drawn("fan_in_fan_out", "linear") == both
    assert drawn("input_is_parallel", "row") == drawn("reduce_output", "row") == both
    assert drawn("block_diagonal", "row") == drawn("block_diagonal", "qkv") == {None, "lora_A", "lora_B"}
    assert max(drawn("group_size", "row")) > 1 and max(drawn("blocks", "row")) > 1
    assert drawn("input", "column, by rank") == {"replicated", "gathered"}
    for row in FUSED:
        assert drawn("input", row) == {"replicated", "gathered", *(() if row in BY_RANK else ("sharded",))}
        assert drawn("share_A", row) == both and drawn("adapted", row) == {1, 2, 3}
    assert drawn("fuse_qkv", "qkv") == both
    for row, no_heads in itertools.product(("qkv", "row"), ("", ", by rank")):
        row, no_heads = row + no_heads, {"qkv": set(), "row": {False}}[row]
        assert drawn("copies", row) == {1, 2} | no_heads
        assert drawn("order", row) == {"tiled", "adjacent"} | ({None} if no_heads else set())
    assert drawn("uneven", "column") == drawn("uneven", "embedding, vocabulary") == both


def test_shard_dims_are_of_the_stored_tensor():
    """The table itself, in the words of the design: what is cut, and which gradients are partial, by scheme."""
    table = {row: {name: rule.placement for name, rule in r.params.items()} for row, r in sharding.TABLE.items()}
    assert table["row"] == {
        **{"weight": Shard(1), "weight_scale": Shard(1), "bias": Replicate()},
        **{"lora_A": Shard(1), "lora_B": Replicate(), "lora_B_bias": Replicate()},
        **{"lora_magnitude_vector": Replicate(), "lora_diag": Replicate()},
    }
    by_rank = {"lora_B": Shard(1), "lora_diag": Shard(0)}  # dA, dB and the diagonal's are whole sums
    assert table["row, by rank"] == table["row"] | by_rank
    assert table["column, by rank"] == {n: p for n, p in table["column"].items() if n != sharding.TOKENS} | {
        "lora_A": Shard(0)
    }
    partial = {name for name, rule in sharding.TABLE["row, by rank"].params.items() if rule.partial == "always"}
    assert partial == {"lora_magnitude_vector"}
    assert table["embedding, vocabulary"] == {
        **{"weight": Shard(0), "lora_A": Shard(1), "lora_B": Replicate()},
        **{"lora_magnitude_vector": Replicate(), "trainable_tokens_delta": Replicate()},
    }


# Rows of a weight that are trained apart.

ROWS = ("linear", "column", "column, output gathered", "embedding, vocabulary", "embedding, dimension")


@pytest.mark.parametrize("sequence_dim", (None, 0))
@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("size", (1, 2, 4))
def test_trained_tokens_are_rows_of_the_weight(row, size, sequence_dim):
    """Outputs and gradients are those of a layer whose weight has these rows, and `merge` makes it."""
    if sequence_dim is not None and row == "column, output gathered":
        return
    options = {"gradients": "deferred"} if size == 2 else {}
    tokens = (3, 11, 0, 5)
    spec = fixed_spec(row, size=size, rank=0, tokens=tokens, sequence_dim=sequence_dim, **options)
    one = case(spec, (8,), 1)
    whole_spec = dataclasses.replace(spec, tokens=())

    def whole(params):
        own = dict(params)
        rows = own.pop(sharding.TOKENS)
        return own | {"weight": own["weight"].index_copy(0, torch.tensor(tokens), rows)}

    def dense(params):
        return (oracle.forward(whole(params), one.x, **plain(whole_spec)) * one.cotangent).sum()

    y, grads, _ = mapped.run(one)
    want = grad(dense)(one.params)
    assert error(y, oracle.forward(whole(one.params), one.x, **plain(whole_spec))) <= EXACT[torch.float64]
    assert all(error(grads[name], want[name]) <= EXACT[torch.float64] for name in want)
    merged = lora_fn.merge(one.params, spec)
    assert torch.equal(merged["weight"], whole(one.params)["weight"])
    local = vmap(lambda p, index: lora_fn.merge(p, spec, index=index))(
        mapped.stack(one.params, spec), mapped.lanes(spec)
    )
    assert torch.equal(mapped.unstack(local, whole_spec)["weight"], merged["weight"])
