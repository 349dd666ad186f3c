"""How much does an adapter communicate? Every collective of a forward and a backward is counted, on real processes.

A collective is what reaches torch's dispatcher, whoever asked for it: its kind and the number of elements put in.
"""

import itertools
import math
from collections import Counter

import pytest
import torch
from mapped import cut, cut_cotangent, input_placement, output_placement, whole
from pool import pool
from strategies import ADAPTED, BY_RANK, EXPERTS, UNCUT, case, fixed_spec
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import lora_fn
from lora_fn import sharding

SIZE, SHAPE, RANK = 2, (4, 6), 3
NUM_TOKENS = SHAPE[0] * SHAPE[1]
IN, OUT = 12, 24
# On CPU, a reduce-scatter is an exchange and a sum.
KINDS = {
    "all_reduce": "all-reduce",
    "all_gather_into_tensor": "all-gather",
    "reduce_scatter_tensor": "reduce-scatter",
    "all_to_all_single": "reduce-scatter",
}
SEQUENCE_DIMS = (None, 0, 1)


class Recorder(TorchDispatchMode):
    """Notes (kind, elements) of every collective."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace.startswith(("c10d", "_c10d")) and function._opname != "wait_tensor":
            self.seen.append((KINDS[function._opname], args[0].numel()))
        return function(*args, **kwargs or {})


def record(mesh, layers):
    """The collectives of layers in a row, one list for the forward and one for the backward.

    Bases are frozen; factors want gradients, and so does x (ids cannot). Without adapters, the layers' rank is 0.
    """
    index = mesh.get_local_rank("tp")
    specs = [layer.spec.bind(mesh) for layer in layers]
    params = [lora_fn.shard(layer.params, spec, index) for layer, spec in zip(layers, specs, strict=True)]
    for name, p in itertools.chain.from_iterable(p.items() for p in params):
        p.requires_grad_(name.startswith("lora_"))
    x = cut(layers[0].x, input_placement(specs[0]), SIZE)[index].clone()
    x.requires_grad_(x.is_floating_point())
    cotangent = cut_cotangent(layers[-1].cotangent, output_placement(specs[-1]), SIZE)[index]
    with Recorder() as forward:
        y = x
        for p, spec in zip(params, specs, strict=True):
            y = whole(lora_fn.apply(p, y, spec, key=torch.tensor(1)))
    with Recorder() as backward:
        if y.requires_grad:
            y.backward(cotangent)
    return forward.seen, backward.seen


def record_cases(mesh, cases):
    return [record(mesh, layers) for layers in cases]


def record_sync(mesh, grads, specs):
    bound = {path: spec.bind(mesh) for path, spec in specs.items()}
    with Recorder() as seen:
        lora_fn.sync_gradients(grads, bound)
    return seen.seen


def counted(*cases):
    """(forward, backward) of each case; all processes must say the same."""
    first, *others = pool(SIZE).run(record_cases, cases)
    assert all(other == first for other in others)
    return first


def layer(row, **attributes):
    rank = attributes.pop("rank", RANK if row not in BY_RANK else 8)
    takes_bias = rank > 0 and attributes.get("variant") != "dora"
    biases = {} if row.startswith("embedding") else {"bias": True, "lora_bias": takes_bias}
    spec = fixed_spec(
        row, **{"size": SIZE, "rank": rank, "dropout": 0.25, "gradients": "deferred"} | biases | attributes
    )
    return case(spec, SHAPE, 0, dtype=torch.float32)


def pair(**attributes):
    down = {"in_features": OUT, "out_features": IN}
    return [layer("column", **attributes), layer("row", **attributes, **down)]


def kinds(seen):
    return [kind for kind, _ in seen]


def more(adapted, base):
    """What the adapted layer does beyond the base, by kind."""
    assert not Counter(kinds(base)) - Counter(kinds(adapted))
    return Counter(kinds(adapted)) - Counter(kinds(base))


def test_a_pair_rides_the_collectives_of_its_base():
    for sequence_dim in SEQUENCE_DIMS:
        base, adapted = counted(pair(rank=0, sequence_dim=sequence_dim), pair(sequence_dim=sequence_dim))
        for ours, theirs in zip(adapted, base, strict=True):
            assert kinds(ours) == kinds(theirs)
        if sequence_dim is None:
            want = ([("all-reduce", NUM_TOKENS * IN)], [("all-reduce", NUM_TOKENS * IN)])
            assert base == want and adapted == want
        else:
            # The backward gathers [dY | dH] and scatters [dX | dH]; the forward the other way round.
            for rank, seen in ((0, base), (RANK, adapted)):
                elements = NUM_TOKENS * (IN + rank)
                both = [("all-gather", elements // SIZE), ("reduce-scatter", elements)]
                assert seen == (both, both)


def test_summed_gradients_cost_one_small_all_reduce_per_partial_factor():
    for sequence_dim in SEQUENCE_DIMS:
        summed = pair(sequence_dim=sequence_dim, gradients="summed")
        (forward, backward), (forward_summed, backward_summed) = counted(pair(sequence_dim=sequence_dim), summed)
        assert forward == forward_summed
        assert not Counter(backward) - Counter(backward_summed)
        assert Counter(backward_summed) - Counter(backward) == Counter(
            ("all-reduce", one.params[name].numel())
            for one in summed
            for name in sharding.adapter_names(one.spec)
            if sharding.partial(one.spec, name)
        )


@pytest.mark.parametrize("row", ADAPTED)
def test_the_table_says_what_the_adapter_adds(row):
    table = sharding.TABLE[row]
    for sequence_dim in (None,) if row in UNCUT else SEQUENCE_DIMS:
        at = int(sequence_dim is not None)
        base, adapted = counted(
            [layer(BY_RANK.get(row, row), rank=0, sequence_dim=sequence_dim)], [layer(row, sequence_dim=sequence_dim)]
        )
        added = [more(ours, theirs) for ours, theirs in zip(adapted, base, strict=True)]
        assert [sum(a.values()) for a in added] == [table.extra_forward[at], table.extra_backward[at]]


@pytest.mark.parametrize("row", ADAPTED)
def test_dora_sums_the_norms_where_inputs_are_cut(row):
    """One all-reduce of an element per output then, nothing elsewhere; and nothing in the backward."""
    for sequence_dim in (None,) if row in UNCUT else SEQUENCE_DIMS:
        plain, dora = counted(
            *([layer(row, sequence_dim=sequence_dim, variant=variant)] for variant in ("lora", "dora"))
        )
        outputs = OUT * (2 if row.startswith("experts") else 1)
        inputs_cut = row in ("row", "row, by rank", "embedding, vocabulary", "conv2d, input channels", *EXPERTS["row"])
        more = Counter([("all-reduce", outputs)] * inputs_cut)
        if row in BY_RANK:  # and of each part, the factor that lacks some of the rank
            cut = "lora_B" if row == "row, by rank" else "lora_A"
            spec = layer(row).spec
            sizes = [math.prod(sharding.local_shape(spec, n)) for n in sharding.names(spec) if n.startswith(cut + ".")]
            sizes = sizes or [math.prod(sharding.local_shape(spec, cut))]
            more += Counter(("all-gather", size) for size in sizes)
        assert Counter(dora[0]) - Counter(plain[0]) == more
        assert Counter(plain[0]) <= Counter(dora[0]) and dora[1] == plain[1]


@pytest.mark.parametrize("row", BY_RANK)
def test_a_rank_that_is_cut_meets_once_forward_and_once_backward(row):
    """In one gather or reduce-scatter of H, for all parts together, and its adjoint; no gradient is left to sum."""
    base, adapted = counted([layer(BY_RANK[row], rank=0)], [layer(row)])
    one = layer(row)
    ranks = sum(part.rank for part in one.spec.updates)
    gather, scatter = ("all-gather", NUM_TOKENS * ranks // SIZE), ("reduce-scatter", NUM_TOKENS * ranks)
    forward, backward = (scatter, gather) if row == "row, by rank" else (gather, scatter)
    assert Counter(adapted[0]) - Counter(base[0]) == Counter([forward])
    assert Counter(adapted[1]) - Counter(base[1]) == Counter([backward])
    grads = lora_fn.shard(one.params, one.spec, 0)
    own = {name: g for name, g in grads.items() if name.startswith(("lora_A", "lora_B."))}
    own |= {name: g for name, g in grads.items() if name == "lora_B"}
    if row == "qkv, by rank":  # but of key-value heads with copies
        own = {name: g for name, g in own.items() if name != "lora_B.k"}
    assert pool(SIZE).run(record_sync, {"layer": own}, {"layer": one.spec}) == [[]] * SIZE


def count_flops(mesh, cases):
    return [flops_of(mesh, one) for one in cases]


def flops_of(mesh, one):
    """Of the forward and the backward of a layer whose base is frozen, on this process."""
    addmm_ = {torch.ops.aten.addmm_: lambda y, a, b, out_shape=None, **_: 2 * a[0] * a[1] * b[1]}
    with FlopCounterMode(display=False, custom_mapping=addmm_) as counter:
        record(mesh, [one])
    return counter.get_total_flops()


def kept(forward, *held):
    """Bytes that a forward keeps for its backward, but for those of tensors that are held anyway."""
    known, found, alive = (
        {p.untyped_storage().data_ptr() for p in held},
        {},
        [],
    )  # alive: no storage gets another's place

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            found[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        assert forward().requires_grad
    return sum(found.values())


def kept_by_layer(mesh, one):
    """What a layer keeps on this process, but for parameters and the input."""
    index, spec = mesh.get_local_rank("tp"), one.spec.bind(mesh)
    params = lora_fn.shard(one.params, spec, index)
    params = {name: p.requires_grad_(name.startswith("lora_")) for name, p in params.items()}
    x = cut(one.x, input_placement(spec), SIZE)[index].clone().requires_grad_()
    return kept(lambda: lora_fn.apply(params, x, spec), *params.values(), x)


@pytest.mark.parametrize("sequence_dim", (0, 1))
def test_a_row_layer_keeps_h_and_not_what_came_beside_it(sequence_dim):
    one = layer("row", sequence_dim=sequence_dim)
    assert pool(SIZE).run(kept_by_layer, one) == [NUM_TOKENS // SIZE * RANK * 4] * SIZE


@pytest.mark.parametrize("row", BY_RANK)
def test_a_rank_that_is_cut_costs_each_process_its_part_of_the_flops(row):
    """6 T r (i + o) / p, as no other scheme without sequence parallel does."""
    layers = [layer(BY_RANK[row], rank=0), layer(row), layer(BY_RANK[row], rank=8)]
    [base, cut, whole], other = pool(SIZE).run(count_flops, layers)
    assert other == [base, cut, whole]
    spec = layers[1].spec
    copies = spec.heads.copies(SIZE) if spec.heads is not None else 1
    sizes = {part.name: part.size * (copies if part.name == "k" else 1) for part in spec.updates}
    each = [6 * NUM_TOKENS * part.rank * (IN + sizes[part.name]) for part in spec.updates]
    assert cut - base == sum(each) // SIZE
    assert whole - base > cut - base


@pytest.mark.parametrize("sequence_dim", (0, 1))
@pytest.mark.parametrize(("row", "features"), (("embedding, vocabulary", RANK), ("embedding, dimension", OUT)))
def test_the_backward_of_an_embedding_is_one_gather(row, features, sequence_dim):
    """Of tokens * rank elements where the vocabulary is cut, of the whole dY where the dimension is."""
    base, adapted = counted([layer(row, rank=0, sequence_dim=sequence_dim)], [layer(row, sequence_dim=sequence_dim)])
    assert base[1] == []
    assert adapted[1] == [("all-gather", NUM_TOKENS * features // SIZE)]


def test_the_sync_is_one_all_reduce_for_all_layers():
    layers = {f"{i}.{n}": one for i in range(3) for n, one in zip(("up", "down"), pair(sequence_dim=0), strict=True)}
    specs = {path: one.spec for path, one in layers.items()}
    grads = {path: lora_fn.shard(one.params, one.spec, 0) for path, one in layers.items()}
    elements = sum(
        one.params[name].numel()
        for one in layers.values()
        for name in sharding.rules(one.spec)
        if sharding.partial(one.spec, name)
    )
    assert pool(SIZE).run(record_sync, grads, specs) == [[("all-reduce", elements)]] * SIZE


def test_a_qkv_layer_adds_nothing_but_its_sync():
    """Three adapters with a lora_A each, on key-value heads with copies: no collective more than the frozen base."""
    for sequence_dim in SEQUENCE_DIMS:
        base, adapted = counted(
            [layer("qkv", rank=0, sequence_dim=sequence_dim)], [layer("qkv", sequence_dim=sequence_dim)]
        )
        assert [kinds(seen) for seen in adapted] == [kinds(seen) for seen in base]
    one = layer("qkv")
    grads = {"qkv": lora_fn.shard(one.params, one.spec, 0)}
    elements = sum(
        one.params[name].numel()
        for name in sharding.names(one.spec)
        if sharding.partial(one.spec, name) or sharding.copied(one.spec, name)
    )
    assert {"lora_A.q", "lora_A.k", "lora_B.k", "weight"} == {
        name
        for name in sharding.names(one.spec)
        if name not in ("bias", "lora_B_bias.k")
        and (sharding.partial(one.spec, name) or sharding.copied(one.spec, name))
    }
    assert pool(SIZE).run(record_sync, grads, {"qkv": one.spec}) == [[("all-reduce", elements)]] * SIZE
