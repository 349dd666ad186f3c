"""Does the cost model count what the layers really do? And do its seconds move as they must?"""

import dataclasses
import json
import math

import pytest
import strategies
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mapped import cut, input_placement, lanes, local_forward, stack, whole
from pool import pool
from strategies import case, fixed_spec
from test_counts import KINDS, kept, record_cases
from torch.func import grad, vmap
from torch.utils.flop_counter import FlopCounterMode

import lora_fn
from lora_fn import Axis, FusedPart, Heads, LayerSpec, SpecError, cost, machines, product, sharding
from lora_fn.machines import MACHINES

SHAPE = (4, 8)
TOKENS = SHAPE[0] * SHAPE[1]
COUNTED = [
    row for row in strategies.ADAPTED if row.partition(",")[0] in ("linear", "column", "qkv", "row", "embedding")
]
CUT = [(row, dim) for row in COUNTED for dim in ((None,) if row in strategies.UNCUT else (None, 0, 1))]
TRN1 = MACHINES["trn1"]
IDEAL = dataclasses.replace(TRN1, memory_bandwidth=math.inf)  # products take the time of their FLOPs


def layer(row, **attributes):
    """A layer of the table, without biases."""
    return fixed_spec(row, **attributes)


def counted(spec):
    """FLOPs of a forward and a backward, over all processes; of factors and x, not of the base's weights."""
    one = case(spec, SHAPE, 0, dtype=torch.float32)
    params = stack(one.params, spec)
    factors = {name: params.pop(name) for name in sharding.adapter_names(spec)}
    cotangent = torch.ones_like(local_forward(spec, params | factors, one.x))

    def loss(trained, x, base, cotangent, index):
        return (whole(lora_fn.apply(base | trained, x, spec, index=index)) * cotangent).sum()

    wanted = (*[0] * bool(factors), *[1] * one.x.is_floating_point())
    gradient = vmap(grad(loss, argnums=wanted) if wanted else loss)
    with FlopCounterMode(display=False) as counter:
        gradient(factors, cut(one.x, input_placement(spec), spec.axis.size), params, cotangent, lanes(spec))
    return counter.get_total_flops()


@pytest.mark.parametrize(("row", "sequence_dim"), CUT)
@pytest.mark.parametrize("rank", [4, 32])
def test_flops_are_those_that_torch_counts(row, sequence_dim, rank):
    """Of a rank, too, that is so large that a layer multiplies its factors first, where it can (see product.order)."""
    spec = layer(row, sequence_dim=sequence_dim, rank=rank)
    base, adapted = counted(spec.base), counted(spec)
    assert base == spec.axis.size * cost.base(spec, TOKENS).flops
    assert adapted - base == spec.axis.size * cost.update(spec, TOKENS).flops
    assert (adapted > base) and (base > 0) == (spec.kind != "embedding")


def collectives(passes):
    """(kind, elements that a process puts in) of the collectives, own or with what rides them."""
    found = []
    for own, riding in passes:
        more = sum(each.elements for each in riding)
        put = [(each.op, each.elements + more * (n == 0), each.size) for n, each in enumerate(own)]
        found.append(sorted((op, elements // (size if op == cost.GATHER else 1)) for op, elements, size in put))
    return found


def told(spec, tokens):
    """What the model says of a base, and of the layer with its adapter: forward and backward."""
    base, update = cost.base(spec, tokens), cost.update(spec, tokens)
    passes = [(base.forward, update.forward), (base.backward, update.backward)]
    alone = [(b.collectives, ()) for b, _ in passes]
    both = [((*b.collectives, *u.own), [each for each in u.collectives if not each.own]) for b, u in passes]
    return collectives(alone), collectives(both)


def test_collectives_are_those_that_run():
    specs = [layer(row, sequence_dim=dim, size=2, gradients="deferred") for row, dim in CUT]
    specs += [spec.base for spec in specs]
    cases = [[case(spec, SHAPE, 0, dtype=torch.float32)] for spec in specs]
    seen, _ = pool(2).run(record_cases, cases)
    assert set(KINDS.values()) == {cost.GATHER, cost.SCATTER, cost.REDUCE}
    half = len(specs) // 2
    for spec, ours, theirs in zip(specs, seen[:half], seen[half:], strict=False):
        without, with_adapter = told(spec, TOKENS)
        assert [sorted(each) for each in theirs] == without, spec
        assert [sorted(each) for each in ours] == with_adapter, spec


@pytest.mark.parametrize(("row", "sequence_dim"), CUT)
def test_the_rules_table_agrees(row, sequence_dim):
    spec = layer(row, sequence_dim=sequence_dim)
    at, table, update = int(sequence_dim is not None), sharding.TABLE[row], cost.update(spec, TOKENS)
    assert cost.own_scheme(spec) == table.scheme[at]
    assert len(update.forward.own) == table.extra_forward[at]
    assert len(update.backward.own) == table.extra_backward[at]
    names = [n for n in sharding.adapter_names(spec) if sharding.partial(spec, n) or sharding.copied(spec, n)]
    assert update.summed == sum(math.prod(sharding.canonical_shape(spec, name)) for name in names)
    assert update.held == sum(math.prod(sharding.local_shape(spec, n)) for n in sharding.adapter_names(spec))


def saved(spec):
    """Bytes that the forward of one process keeps, but for parameters."""
    one = case(spec, SHAPE, 0, dtype=torch.float32)
    params = {
        name: p.requires_grad_(name.startswith("lora_")) for name, p in lora_fn.shard(one.params, spec, 0).items()
    }
    x = cut(one.x, input_placement(spec), spec.axis.size)[0].clone().requires_grad_()
    return kept(lambda: lora_fn.apply(params, x, spec, index=torch.tensor(0)), *params.values())


@pytest.mark.parametrize("row", ["linear", "column", "row"])
@pytest.mark.parametrize("rank", [3, 32])
def test_saved_bytes_are_those_that_torch_keeps(row, rank):
    spec = layer(row, size=1, rank=rank)
    update = cost.update(spec, TOKENS, itemsize=4)
    assert saved(spec) == update.saved + update.inputs


# ---------------------------------------------------------------------------------------- the arithmetic by hand


def llama_8b(tp, rank, *, sequence_dim=0, shared=True):
    """The linear layers of Llama-3.1-8B's decoder layer. `shared`: as Optimum Neuron cuts them, gate and up as one
    with one lora_A; else each with its own."""
    sizes = {"q": (4096, 4096), "k": (4096, 1024), "v": (4096, 1024), "o": (4096, 4096), "down": (14336, 4096)}
    sizes |= {"gate_up": (4096, 2 * 14336)} if shared else {"gate": (4096, 14336), "up": (4096, 14336)}
    return [
        LayerSpec(
            kind="row" if name in ("o", "down") else "column",
            in_features=i,
            out_features=o,
            rank=rank,
            axis=Axis(size=tp),
            sequence_dim=sequence_dim,
            reduce_dtype="float32",
        )
        for name, (i, o) in sizes.items()
    ]


def of_layer(specs, tokens, scheme, what):
    return sum(what(cost.update(spec, tokens, scheme)) for spec in specs)


def byte_count(update):
    return sum(c.elements * c.itemsize for c in (*update.forward.collectives, *update.backward.collectives))


def test_optimums_recipe():
    """Llama-3.1-8B, TP 8, SP, 2048 tokens, rank 64, gradients accumulated 16 times."""
    specs, tokens, rank = llama_8b(8, 64), 2048, 64
    base = [cost.base(spec, tokens) for spec in specs]
    assert sum(one.own for one in base) == 12
    assert of_layer(specs, tokens, cost.MODULE, lambda u: u.own) == 16
    assert of_layer(specs, tokens, cost.MODULE, byte_count) == 44 * tokens * rank
    assert of_layer(specs, tokens, cost.CONCAT, lambda u: u.own) == 0
    assert of_layer(specs, tokens, cost.CONCAT, byte_count) == 36 * tokens * rank
    assert of_layer(specs, tokens, cost.FOLD, lambda u: u.own + u.elements) == 0
    riding = 36 * tokens * rank / sum(byte_count(one) for one in base)
    assert riding == pytest.approx(0.016, abs=1e-3)
    assert 32 * 16 * 16 == 8192 and 32 * 16 * 44 * tokens * rank == pytest.approx(2.95e9, rel=2e-3)
    forward = of_layer(specs, tokens, cost.MODULE, lambda u: len(u.forward.own))
    assert forward == 6  # once more where the layer is computed again


@pytest.mark.parametrize(
    ("rank", "tp", "replicated", "least"),
    [(16, 8, 0.031, 0.031), (16, 32, 0.107, 0.107), (64, 8, 0.124, 0.124), (64, 32, 0.427, 0.370)],
)
def test_flops_of_a_whole_layer(rank, tp, replicated, least):
    """At 32 processes k and v have 32 outputs each, which is less than a rank of 64: there the other order is taken."""
    specs = llama_8b(tp, rank, shared=False)
    frozen = sum(cost.base(spec, 2048).flops for spec in specs)
    known = cost.schemes(specs[0])
    ratio = {s: of_layer(specs, 2048, s, lambda u: u.flops) / frozen for s in known}
    assert ratio[cost.FOLD] == pytest.approx(least, abs=6e-4)
    orders = [product.flops(2048, *local(spec), rank) for spec in specs]
    assert sum(one[product.FACTORS] for one in orders) / frozen == pytest.approx(replicated, abs=6e-4)
    assert sum(min(one.values()) for one in orders) == pytest.approx(ratio[cost.FOLD] * frozen)
    assert ratio[cost.CONCAT] == pytest.approx(0.036 * rank / 64, abs=2e-4)
    assert ratio.get(cost.RANK) == (None if rank % tp else ratio[cost.CONCAT])


def local(spec):
    """Outputs and inputs of one process."""
    return sharding.local_shape(spec.base, "weight")


def square(rank, *, kind="column", tp=8, features=4096):
    return LayerSpec(kind=kind, in_features=features, out_features=features, rank=rank, axis=Axis(size=tp))


@pytest.mark.parametrize("kind", ["column", "row"])
def test_the_rank_is_cut_from_about_64_on(kind):
    """At 8 processes and 2048 tokens, where what is computed thrice costs its FLOPs only."""
    chosen = {rank: cost.choose(square(rank, kind=kind), 2048, IDEAL).scheme for rank in (8, 16, 32, 64, 128, 256)}
    assert chosen == dict.fromkeys((8, 16, 32), cost.FOLD) | dict.fromkeys((64, 128, 256), cost.RANK)
    saved = 6 * 2048 * 64 * 4096 * (1 - 1 / 8) / IDEAL.flops
    assert saved > 2 * IDEAL.latency and saved == pytest.approx(59e-6, abs=1e-6)


def test_what_is_bound_by_memory_gains_nothing_from_a_cut_rank():
    """Every process reads all of X, however little of the rank it has."""
    assert cost.choose(square(64), 2048, TRN1).scheme == cost.FOLD
    assert cost.choose(square(512), 8192, TRN1).scheme == cost.RANK


def test_the_choice_can_be_printed():
    choice = cost.choose(square(64), 2048, TRN1)
    assert list(choice.costs) == list(choice.seconds) == [cost.FOLD, cost.RANK]
    assert str(choice).startswith("fold (fold ") and str(choice).endswith(" us)")


@pytest.mark.parametrize("row", strategies.ADAPTED)
def test_every_layer_has_a_choice(row):
    """So that a function of a LayerSpec can choose for all layers of a model."""
    assert cost.choose(layer(row), 64, TRN1).scheme in (cost.FOLD, cost.RANK)


def test_h_that_is_brought_beside_a_gathered_input_is_not_computed_again():
    spec = dataclasses.replace(square(512), input="gathered")
    assert cost.choose(spec, 8192, TRN1).scheme == cost.RANK
    assert cost.choose(spec, 8192, TRN1, own=cost.CONCAT).scheme == cost.CONCAT


def test_the_bytes_of_thin_products():
    """8 times the input or output of a square layer, which is 23 % of its ideal base at 4096."""
    spec = LayerSpec(kind="linear", in_features=4096, out_features=4096, rank=16)
    update, base = cost.update(spec, 2048), cost.base(spec, 2048)
    moved = sum(p.moved for one in (update.forward, update.backward) for p in one.products)
    assert moved == 8 * 2048 * 4096 * 2
    assert moved / TRN1.memory_bandwidth / (base.flops / 95e12) == pytest.approx(0.23, abs=0.01)


def test_copies_of_heads_are_summed_by_the_peers_only():
    """At TP 32, 8 key-value heads have 4 copies each: 256 float32 per token, once more for the adapter."""
    parts = tuple(FusedPart(name=n, size=s, rank=64) for n, s in (("q", 4096), ("k", 1024), ("v", 1024)))
    heads = Heads(query=32, key_value=8)
    spec = LayerSpec(
        kind="qkv",
        in_features=4096,
        out_features=6144,
        parts=parts,
        heads=heads,
        share_A=True,
        axis=Axis(size=32),
        sequence_dim=0,
    )
    [kv] = cost.copies_sum(spec, 2048)
    assert (kv.elements, kv.itemsize, kv.size) == (2048 * 256, 4, 4)
    assert kv in cost.update(spec, 2048, cost.MODULE).backward.collectives
    assert cost.update(spec, 2048).own == 0


# ------------------------------------------------------------------------------------------------------- laws


SIZES = st.sampled_from([2, 3, 4, 8, 16, 32])
MACHINE = st.builds(
    machines.Machine,
    flops=st.floats(1e9, 1e15),
    memory_bandwidth=st.floats(1e9, 1e13) | st.just(math.inf),
    memory=st.just(1e10),
    latency=st.floats(0, 1e-3),
    bandwidth=st.floats(1e8, 1e12),
    processes=st.sampled_from([1, 2, 8, 32]),
    network_latency=st.floats(0, 1e-3),
    network=st.floats(1e8, 1e12),
)


@st.composite
def wholes(draw):
    """Layers without sequence parallel, that can have either scheme."""
    size = draw(SIZES)
    features = st.integers(1, 64).map(lambda n: n * size)
    kind = draw(st.sampled_from(["column", "row"]))
    rank = size * draw(st.integers(1, 64))
    return LayerSpec(
        kind=kind, in_features=draw(features), out_features=draw(features), rank=rank, axis=Axis(size=size)
    )


@settings(max_examples=60)
@given(wholes(), st.integers(1, 1 << 16), MACHINE, st.floats(0, 1e-2))
def test_more_latency_never_makes_the_rank_more_attractive(spec, tokens, machine, more):
    slow = dataclasses.replace(machine, latency=machine.latency + more, network_latency=machine.network_latency + more)
    before, after = (cost.choose(spec, tokens, m) for m in (machine, slow))
    gap = [c.seconds[cost.RANK] - c.seconds[cost.FOLD] for c in (before, after)]
    assert gap[1] >= gap[0] - 1e-9 * abs(gap[0]) - 1e-18
    assert before.scheme == cost.RANK or after.scheme == cost.FOLD


@settings(max_examples=60)
@given(wholes(), st.integers(1, 1 << 12), MACHINE)
def test_the_cheapest_is_chosen(spec, tokens, machine):
    choice = cost.choose(spec, tokens, machine)
    assert choice.seconds[choice.scheme] == min(choice.seconds.values())
    assert all(choice.costs[s] == cost.update(spec, tokens, s) for s in choice.costs)
    orders = product.flops(tokens, *local(spec), spec.rank)
    assert choice.costs[cost.RANK].flops <= orders[product.FACTORS]
    assert choice.costs[cost.FOLD].flops == min(orders.values())
    assert choice.costs[cost.RANK].summed == 0 < choice.costs[cost.FOLD].summed


@settings(max_examples=60)
@given(st.data(), st.sampled_from(CUT), MACHINE)
def test_more_rank_or_tokens_never_cost_less(data, at, machine):
    row, dim = at
    spec = layer(row, sequence_dim=dim)
    for scheme in cost.schemes(spec):
        small, large = sorted(data.draw(st.tuples(*[st.integers(1, 300)] * 2)))
        fewer, more = (layer(row, sequence_dim=dim, rank=4 * n) for n in (small, large))
        assert cost.update(fewer, 64, scheme).seconds(machine) <= cost.update(more, 64, scheme).seconds(machine)
        assert cost.update(spec, small, scheme).seconds(machine) <= cost.update(spec, large, scheme).seconds(machine)


@settings(max_examples=60)
@given(st.sampled_from(CUT), MACHINE)
def test_seconds_add_up(at, machine):
    row, dim = at
    spec = layer(row, sequence_dim=dim)
    for one in (cost.base(spec, TOKENS), *(cost.update(spec, TOKENS, s) for s in cost.schemes(spec))):
        parts = [p.compute(machine) + p.communication(machine) for p in (one.forward, one.backward)]
        assert one.seconds(machine) == pytest.approx(sum(parts))
        assert one.flops == one.forward.flops + one.backward.flops


def test_one_process_communicates_nothing():
    for row, dim in CUT:
        spec = layer(row, sequence_dim=dim, size=1)
        for one in (cost.base(spec, TOKENS), *(cost.update(spec, TOKENS, s) for s in cost.schemes(spec))):
            assert one.own == one.elements == 0


def test_what_has_no_cost_is_a_sentence():
    with pytest.raises(SpecError, match="of kind 'conv2d', expected one of linear, column, qkv, row, embedding"):
        cost.update(layer("conv2d, input channels"), 8)
    with pytest.raises(SpecError, match="scheme: is 'concat', expected one of fold, module for this column layer"):
        cost.update(layer("column"), 8, "concat")
    with pytest.raises(SpecError, match="tokens: is 0, expected an integer of at least 1"):
        cost.update(layer("column"), 0)


# --------------------------------------------------------------------------------------------------- machines


def test_machines_are_data():
    for machine in MACHINES.values():
        assert machines.from_values(json.loads(json.dumps(dataclasses.asdict(machine))), "here") == machine
    assert TRN1.with_values({"latency": 1e-6}, "here") == dataclasses.replace(TRN1, latency=1e-6)


def test_the_network_is_shared_by_the_groups_that_send():
    assert TRN1.link(32) == (TRN1.latency, TRN1.bandwidth)
    assert TRN1.link(64) == (TRN1.network_latency, TRN1.bandwidth)  # one group's ring leaves the node
    assert TRN1.link(4, 8) == (TRN1.latency, TRN1.bandwidth)
    assert TRN1.link(8, 32) == (TRN1.network_latency, TRN1.network / 32)  # 32 of them do
    assert TRN1.link(8, 8) == (TRN1.network_latency, TRN1.network / 8)
    assert [TRN1.nodes(n) for n in (1, 32, 33)] == [1, 1, 2]


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"latency": -1}, "Machine.latency: is -1, expected a number of seconds, of at least 0"),
        ({"flops": "fast"}, "Machine.flops: is 'fast', expected a number above 0"),
        ({"flops": math.inf}, "Machine.flops: is inf, expected a number above 0"),
        ({"processes": 1.5}, "Machine.processes: is 1.5, expected an integer of at least 1"),
        ({"beta": 1}, "here: has beta, expected some of flops, memory_bandwidth"),
    ],
)
def test_bad_constants_are_a_sentence(values, sentence):
    with pytest.raises(SpecError, match=sentence):
        TRN1.with_values(values, "here")


def test_constants_that_are_missing_are_a_sentence():
    with pytest.raises(SpecError, match=r"here: lacks flops, .*; name the machine whose constants these are"):
        machines.from_values({"latency": 1e-6}, "here")
