"""Do the laws hold on real processes? A fixed grid of every row of the rules table over gloo, and the dense oracle.

The processes run the cases and return what each of them holds; here it is joined and compared. Joining asserts law 4:
what is replicated must be identical on every process, bit for bit.
"""

import dataclasses
import itertools
import math

import oracle
import pytest
import torch
from mapped import (
    cut,
    cut_cotangent,
    features,
    input_gradient_placement,
    input_placement,
    join,
    output_placement,
    replicated,
    whole,
)
from pool import pool
from strategies import ADAPTED, BY_RANK, EXPERTS, UNCUT, case, fixed_spec, keep_of, plain
from test_laws import bf16_cases, rms

import lora_fn
from lora_fn import Axis, Heads, Shard, layer_spec, sharding

SIZES = (2, 4)
EXACT = {torch.float64: 1e-10, torch.float32: 1e-5}
KEY = 11
BIASES = {"bias": True, "lora_bias": True}

# The forms of each row; every one runs in every sequence_dim, or in the one that it names.
FORMS = {
    "linear": ({}, {**BIASES, "fan_in_fan_out": True}),
    "column": ({}, {**BIASES, "pad": True, "out_features": 10}, {"input": "gathered", "sequence_dim": None}),
    "column, fused": ({}, {**BIASES, "share_A": True}, {"input": "gathered", "sequence_dim": None}),
    "qkv": (
        {"out_features": 48, "heads": Heads(query=4, key_value=1)},
        {**BIASES, "fuse_qkv": False, "heads": Heads(query=4, key_value=2, multiplier=2, order="adjacent")},
        {"input": "gathered", "sequence_dim": None, "fuse_qkv": False, "share_A": True},
    ),
    "column, output gathered": (
        {"sequence_dim": None},
        {**BIASES, "sequence_dim": None, "pad": True, "out_features": 10},
    ),
    "row": (
        {"out_features": 7},
        BIASES,
        {"input_is_parallel": False, "sequence_dim": None},
        {"reduce_output": False, "sequence_dim": None},
        {"heads": Heads(query=4, key_value=2, multiplier=2), "out_features": 7},
    ),
    "embedding, vocabulary": ({"out_features": 7}, {"pad": True, "in_features": 10, "padding_idx": 4}),
    "embedding, dimension": ({}, {"padding_idx": 4, "use_rslora": True}),
    "conv2d, output channels": ({}, {**BIASES, "gather_output": True}, {"pad": True, "out_features": 10}),
    "conv2d, input channels": ({"out_features": 7}, {**BIASES, "input_is_parallel": False}),
    "column, by rank": ({}, {**BIASES, "pad": True, "out_features": 10, "input": "gathered"}),
    "column, fused, by rank": ({**BIASES, "share_A": True}, {"input": "gathered"}),
    "qkv, by rank": (
        {"out_features": 48, "heads": Heads(query=4, key_value=1)},
        {**BIASES, "input": "gathered", "fuse_qkv": False},
    ),
    "row, by rank": (
        {**BIASES, "out_features": 7},
        {"input_is_parallel": False, "reduce_output": False},
        {"heads": Heads(query=4, key_value=2, multiplier=2)},
    ),
    **dict.fromkeys(EXPERTS["column"], ({}, {**BIASES, "stride": 1, "num_experts": 3})),
    **dict.fromkeys(EXPERTS["row"], ({"out_features": 7}, BIASES, {"reduce_output": False})),
}
SHAPE = (4, 12)  # tokens; with 7 output features, every process has an odd number of them under sequence parallel


def specs(row, size, **attributes):
    """Every form of a row, without and with sequence parallel."""
    for form in FORMS[row]:
        once = row in UNCUT or "sequence_dim" in form
        for sequence_dim in (form.get("sequence_dim"),) if once else (None, 0, 1):
            yield fixed_spec(row, size=size, **{**form, "sequence_dim": sequence_dim, **attributes})


def error(a, b):
    """max|a-b| / max|b|."""
    assert a.shape == b.shape
    a, b = a.double(), b.double()
    return ((a - b).abs().max() / b.abs().max()).item()


def same(a, b):
    return a.dtype == b.dtype and torch.equal(a, b)


def expected(case, dtype=torch.float64):
    """The oracle's output and gradients, by name."""
    told = plain(case.spec) | ({} if case.gate is None else {"gate": case.gate})
    told |= {"keep": keep_of(case), "probability": case.spec.dropout}
    y, grads, x = oracle.run(case.params, case.x, case.cotangent, dtype=dtype, **told)
    return {"y": y, **grads} | ({} if x is None else {"x": x})


# What the processes do.


def local(mesh, case):
    """This process's part of a case: the bound spec, its parameters, its x, its cotangent."""
    spec, index = case.spec.bind(mesh), mesh.get_local_rank("tp")
    x = cut(case.x, input_placement(spec), spec.axis.size)[index].clone()
    cotangent = cut_cotangent(case.cotangent, output_placement(spec), spec.axis.size, fill=7.0)[index]
    return spec, lora_fn.shard(case.params, spec, index), x, cotangent


def run_local(spec, params, x, cotangent, key, gate=None):
    """Output and gradients of one layer, synced."""
    leaves = {name: p.detach().requires_grad_() for name, p in params.items()}
    x = x.detach().requires_grad_() if x.is_floating_point() else x
    y = whole(lora_fn.apply(leaves, x, spec, key=key, gate=gate))
    wanted = [*leaves.values(), *([x] if x.is_floating_point() else [])]
    grads = dict(zip([*leaves, "x"], torch.autograd.grad(y, wanted, cotangent), strict=False))
    synced = lora_fn.sync_gradients({"layer": {name: grads[name] for name in leaves}}, {"layer": spec})["layer"]
    return {"y": y.detach(), **grads, **synced}


def run_cases(mesh, cases):
    """Every case's output and gradients; and law 9: twice the same, from arguments and a random state left alone.

    Of cases that differ in their numbers alone, law 9 is asked of the first.
    """
    results, asked = [], set()
    for each in cases:
        spec, params, x, cotangent = local(mesh, each)
        key = None if each.key is None else torch.tensor(each.key)
        before = [t.clone() for t in (*params.values(), x, cotangent, torch.get_rng_state())]
        results.append(run_local(spec, params, x, cotangent, key, each.gate))
        kind = (each.spec, cotangent.dtype, each.key)
        if kind in asked:
            continue
        asked.add(kind)
        again = run_local(spec, params, x, cotangent, key, each.gate)
        assert all(same(results[-1][name], again[name]) for name in again), spec
        after = (*params.values(), x, cotangent, torch.get_rng_state())
        assert all(same(a, b) for a, b in zip(before, after, strict=True)), spec
    return results


def forward_cases(mesh, cases):
    """Every case's output with lora_B = 0, and that of the base alone."""
    outputs = []
    for each in cases:
        spec, params, x, _ = local(mesh, each)
        params = {n: torch.zeros_like(p) if n.startswith("lora_B") else p for n, p in params.items()}
        base = {name: p for name, p in params.items() if not name.startswith("lora_")}
        adapted = whole(lora_fn.apply(params, x, spec, key=torch.tensor(KEY)))
        outputs.append((adapted, whole(lora_fn.apply(base, x, spec.base))))
    return outputs


def joined(case, parts):
    """What the processes returned for a case, whole."""
    spec = case.spec
    names = [name for name in parts[0] if name not in ("y", "x")]
    found = lora_fn.unshard([{name: part[name] for name in names} for part in parts], spec)
    size = spec.out_features if output_placement(spec) == Shard(features(spec)) else None
    found["y"] = join(torch.stack([part["y"] for part in parts]), output_placement(spec), size)
    if "x" in parts[0]:
        found["x"] = join(torch.stack([part["x"] for part in parts]), input_gradient_placement(spec))
    return found


def run(cases, size):
    """The whole output and gradients of every case."""
    each_process = pool(size).run(run_cases, cases)
    return [joined(one, parts) for one, parts in zip(cases, zip(*each_process, strict=True), strict=True)]


# The laws.


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("row", ADAPTED)
def test_law_1_no_update_is_the_base(row, size):
    cases = [
        case(spec, SHAPE, seed, dtype=dtype)
        for seed, (spec, dtype) in enumerate(
            itertools.product(specs(row, size, dropout=0.25), (torch.float32, torch.bfloat16))
        )
    ]
    for outputs in pool(size).run(forward_cases, cases):
        for one, (adapted, base) in zip(cases, outputs, strict=True):
            assert same(adapted, base), one.spec


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("row", ADAPTED)
def test_laws_3_4_9_all_equals_the_oracle(row, size):
    grid = itertools.product(layer_spec.GRADIENTS, (0.0, 0.25), EXACT)
    cases = [
        case(spec, SHAPE, 7, dtype=dtype, key=KEY)
        for gradients, dropout, dtype in grid
        for spec in specs(row, size, gradients=gradients, dropout=dropout)
    ]
    for one, got in zip(cases, run(cases, size), strict=True):
        want = expected(one)
        assert got.keys() == want.keys()
        errors = {name: error(got[name], want[name]) for name in want}
        assert max(errors.values()) <= EXACT[one.x.dtype if one.x.is_floating_point() else one.cotangent.dtype], (
            one.spec,
            errors,
        )


# Variant -> its options.
VARIANTS = {
    "dora": {},
    "kasa": {},
    "alora": {"lora_bias": True},
    "qalora": {"group_size": 3},
    "bdlora": {"block_diagonal": "lora_A", "blocks": 3, "rank": 12},
    "bdlora of B": {"block_diagonal": "lora_B", "blocks": 3, "rank": 12},
}
RANKED = ("column, by rank", "qkv, by rank", "row, by rank")


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_law_3_of_variants(variant, size):
    rows = ADAPTED if variant == "dora" else ("linear", "column", "qkv", "row", *RANKED)
    options = {"variant": variant.split()[0], "dropout": 0.25, **VARIANTS[variant]}
    cases = [
        case(fixed_spec(row, size=size, sequence_dim=sequence_dim, **options), SHAPE, 3, key=KEY)
        for row in rows
        for sequence_dim in ((None,) if row in UNCUT else (None, 0, 1))
    ]
    for one, got in zip(cases, run(cases, size), strict=True):
        want = expected(one)
        assert got.keys() == want.keys()
        assert max(error(got[name], want[name]) for name in want) <= EXACT[torch.float64], one.spec


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("row", ADAPTED)
def test_law_3_in_bf16(row, size):
    """By RMS error against float64, on at least 4096 normal elements of each tensor."""
    drawn, dense, true = bf16_cases(BY_RANK.get(row, row))
    scheme = "rank" if row in BY_RANK else None
    sequence_dims = (None,) if row in UNCUT else (None, 0)
    specs = [
        dataclasses.replace(
            drawn[0].spec,
            axis=Axis(size=size),
            sequence_dim=sequence_dim,
            input=None,
            reduce_dtype=reduce_dtype,
            scheme=scheme,
        )
        for sequence_dim, reduce_dtype in itertools.product(sequence_dims, (None, "float32"))
    ]
    results = run([dataclasses.replace(one, spec=spec) for spec in specs for one in drawn], size)
    for number, spec in enumerate(specs):
        some = results[number * len(drawn) :][: len(drawn)]
        for name, exact in true.items():
            ours = torch.stack([result[name] for result in some]).double()
            assert exact.numel() >= 4096
            is_partial = name in sharding.names(spec) and (sharding.partial(spec, name) or sharding.copied(spec, name))
            bound = 2 if spec.reduce_dtype == "float32" and not is_partial else 2 * math.sqrt(size)
            assert rms(ours - exact) <= bound * rms(dense[name] - exact), (spec, name)


# Training.


def train(mesh, pair, gradients, *, is_synced):
    """The factors of a column and a row layer after three steps of AdamW."""
    specs = {name: dataclasses.replace(each.spec, gradients=gradients).bind(mesh) for name, each in pair.items()}
    params = {name: local(mesh, each)[1] for name, each in pair.items()}
    x, target = local(mesh, pair["up"])[2], local(mesh, pair["down"])[3]
    trained, frozen = lora_fn.partition(params, lambda path, name: name.startswith("lora_"))
    leaves = [p for factors in trained.values() for p in factors.values()]
    optimizer = torch.optim.AdamW(leaves, lr=0.1)

    def loss(trained, step):
        p = lora_fn.combine(trained, frozen)
        h = torch.tanh(lora_fn.apply(p["up"], x, specs["up"], key=torch.tensor(step)))
        return (lora_fn.apply(p["down"], h, specs["down"], key=torch.tensor(step)) - target).square().sum()

    for step in range(3):
        grads = lora_fn.value_and_grad(loss)(trained, step)[1]
        grads = lora_fn.sync_gradients(grads, specs) if is_synced else grads
        for p, grad in zip(leaves, (g for factors in grads.values() for g in factors.values()), strict=True):
            p.grad = grad
        optimizer.step()
    return trained


def column_row_pair(size, sequence_dim):
    attributes = {"size": size, "sequence_dim": sequence_dim, "dropout": 0.25, **BIASES}
    up = case(fixed_spec("column", **attributes), SHAPE, 1)
    down = case(fixed_spec("row", **attributes | {"in_features": 24, "out_features": 12}), SHAPE, 2)
    return {"up": up, "down": down}


def copies_differ(trained, pair):
    """Of every replicated factor: whether processes hold different values of it."""
    return {
        (path, name): not all(torch.equal(each[path][name], trained[0][path][name]) for each in trained)
        for path, one in pair.items()
        for name in replicated(one.spec)
        if name in trained[0][path]
    }


@pytest.mark.parametrize("sequence_dim", (0, 1))
@pytest.mark.parametrize("size", SIZES)
def test_law_4_after_three_steps_of_adamw(size, sequence_dim):
    pair = column_row_pair(size, sequence_dim)
    whole = {}
    for gradients in ("summed", "deferred"):
        trained = pool(size).run(synced_train, pair, gradients)
        differ = copies_differ(trained, pair)
        assert set(differ) == {("up", "lora_A"), ("down", "lora_B"), ("down", "lora_B_bias")}
        assert not any(differ.values()), differ
        whole[gradients] = {path: lora_fn.unshard([t[path] for t in trained], pair[path].spec) for path in pair}
    for path, name in differ:
        assert error(whole["summed"][path][name], whole["deferred"][path][name]) <= EXACT[torch.float64]
        assert error(whole["summed"][path][name], pair[path].params[name]) > 0.01  # it has learned


@pytest.mark.parametrize("sequence_dim", (0, 1))
@pytest.mark.parametrize("size", SIZES)
def test_a_sync_left_out_is_seen(size, sequence_dim):
    pair = column_row_pair(size, sequence_dim)
    differ = copies_differ(pool(size).run(unsynced_train, pair, "deferred"), pair)
    assert differ and all(differ.values()), differ


def synced_train(mesh, pair, gradients):
    return train(mesh, pair, gradients, is_synced=True)


def unsynced_train(mesh, pair, gradients):
    return train(mesh, pair, gradients, is_synced=False)
