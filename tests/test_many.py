"""Does every row of a batch get its own adapter? Many adapters in one computation equal each of them alone: outputs and
every gradient, over every row of the rules table, on the mapped axis.
"""

import dataclasses

import mapped
import pytest
import strategies
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import ADAPTED, BY_RANK, case, fixed_spec
from test_laws import error, named, one_thread, same, tolerance  # noqa: F401
from torch.func import grad, vmap

import lora_fn
from lora_fn import SpecError, grouped, many, product

SEEDS = st.integers(0, 1 << 20)
ARGUMENTS = ("x", "weight", "bias", "down", "up")
each_adapted_row = pytest.mark.parametrize("row", ADAPTED)


def tokens_of(spec, rows):
    """A shape of tokens with as many rows."""
    if spec.kind == "conv2d":
        return (rows, 3, 4)
    sequence = 2 * spec.axis.size if spec.sequence_dim is not None else 3
    return (sequence, rows) if spec.sequence_dim == 0 else (rows, sequence)


@st.composite
def batches(draw, row, *, several=False):
    """(K cases of one layer, each with an adapter of its own; ids of groups of rows; a case for each group)."""
    variants = {"variant": "lora"} if several else {}
    spec = draw(strategies.specs(row, sizes=(1, 2, 3, 4), reduce_dtypes=(None, "float64"), **variants))
    seed, count = draw(SEEDS), draw(st.integers(1, 4))
    groups = 1 if spec.kind == "experts" else draw(st.integers(1, 4))
    at_once = draw(st.integers(2, 3)) if several else 1
    ids = draw(st.lists(st.integers(-1, count - 1), min_size=groups * at_once, max_size=groups * at_once))
    shape = tokens_of(spec, draw(st.integers(1, 2)))
    whole = [case(spec, shape, seed + k) for k in range(max(groups, count))]
    base = {name: p for name, p in whole[0].params.items() if not name.startswith("lora_")}
    own = [{name: p for name, p in one.params.items() if name.startswith("lora_")} for one in whole[:count]]
    keys = draw(st.none() | st.lists(SEEDS, min_size=count, max_size=count))
    return spec, base, own, keys, [ids[g * at_once : (g + 1) * at_once] for g in range(groups)], whole[:groups]


def fixed_batch(row, ids, **attributes):
    """As `batches`, without drawing: three adapters."""
    spec = fixed_spec(row, **{"sequence_dim": 0, **attributes})
    whole = [case(spec, tokens_of(spec, 1), k) for k in range(3)]
    base = {name: p for name, p in whole[0].params.items() if not name.startswith("lora_")}
    own = [{name: p for name, p in one.params.items() if name.startswith("lora_")} for one in whole]
    return spec, base, own, [5, 6, 7], ids, whole[: len(ids)]


def joined(tensors, spec):
    return torch.cat(tensors, 0 if spec.kind in ("conv2d", "experts") else many.rows_dim(spec))


def found(spec, base, own, keys, ids, groups):
    """What `apply_many` gives of all rows: y and x's gradient, the base's gradients, each adapter's."""
    size, count = spec.axis.size, len(own)
    shards = [mapped.stack(base | factors, spec) for factors in own]
    factors = {name: torch.stack([of[name] for of in shards], 1) for name in own[0]}
    local = {name: shards[0][name] for name in base} | factors
    x, cotangent = (joined([getattr(one, n) for one in groups], spec) for n in ("x", "cotangent"))
    gate = None if groups[0].gate is None else joined([one.gate for one in groups], spec)
    key = None if keys is None else torch.tensor(keys)

    def synced(grads, index):
        return lora_fn.sync_gradients({"": grads}, {"": spec}, index=index)[""]

    def loss(params, x, cotangent, index):
        y = many.apply_many(params, x, spec, torch.tensor(ids), index=index, key=key, gate=gate)
        y = mapped.whole(y)
        return (y * cotangent).sum(), y

    def one(params, x, cotangent, index):
        has_x = x.is_floating_point()
        grads, y = grad(loss, argnums=(0, 1) if has_x else (0,), has_aux=True)(params, x, cotangent, index)
        each = vmap(lambda g: synced(g, index))({name: grads[0][name] for name in own[0]})
        return y, synced({name: grads[0][name] for name in base}, index) | each, *grads[1:]

    x, cotangent = mapped.cut(x, mapped.input_placement(spec), size), cut_cotangent(cotangent, spec)
    y, grads, *x_grad = mapped.over_axis(one, spec)(local, x, cotangent, mapped.lanes(spec))
    of_adapters = [
        mapped.unstack({n: g[:, k] if n in own[0] else g for n, g in grads.items()}, spec) for k in range(count)
    ]
    own_grads = [{n: g for n, g in of.items() if n in own[0]} for of in of_adapters]
    x_grad = [mapped.join(g, mapped.input_gradient_placement(spec)) for g in x_grad]
    return named(join(y, spec), {n: of_adapters[0][n] for n in base}, x_grad[0] if x_grad else None), own_grads


def join(y, spec):
    placement = mapped.output_placement(spec)
    return mapped.join(y, placement, spec.out_features if placement == lora_fn.Shard(mapped.features(spec)) else None)


def cut_cotangent(cotangent, spec):
    return mapped.cut_cotangent(cotangent, mapped.output_placement(spec), spec.axis.size)


def alone(spec, base, own, keys, ids, group):
    """One group by itself: `apply` with each of its adapters, less the base where it is counted more than once."""
    runs, of_adapters = [], [{} for _ in own]
    for k in ids:
        if k == many.NONE:
            continue
        key = None if keys is None else keys[next(i for i in ids if i != many.NONE) if ids[0] == many.NONE else ids[0]]
        one = dataclasses.replace(group, spec=spec, params=base | own[k], key=key)
        run = named(*mapped.run(one))
        for name in own[k]:
            of_adapters[k][name] = of_adapters[k].get(name, 0) + run[name]
        runs.append({name: t for name, t in run.items() if name not in own[k]})
    none = named(*mapped.run(dataclasses.replace(group, spec=spec.base, params=base, gate=None, key=None)))
    total = {name: t * (1 - len(runs)) for name, t in none.items()} if runs else none
    for run in runs:
        total = {name: t + run[name] for name, t in total.items()}
    return total, of_adapters


def law_8_rows_are_alone(spec, base, own, keys, ids, groups):
    got, got_own = found(spec, base, own, keys, ids, groups)
    each = [alone(spec, base, own, keys, of, group) for of, group in zip(ids, groups, strict=True)]
    limit = tolerance(dataclasses.replace(groups[0], params=base | own[0]))
    want = {name: joined([one[name] for one, _ in each], spec) for name in ("y", "x") if name in got}
    want |= {name: sum(one[name] for one, _ in each) for name in base}
    assert got.keys() == want.keys()
    errors = {name: error(got[name], want[name]) for name in got}
    assert max(errors.values()) <= limit, errors
    for k, grads in enumerate(got_own):
        for name, g in grads.items():
            expected = sum((of[k].get(name, torch.zeros_like(g)) for _, of in each), torch.zeros_like(g))
            assert error(g, expected) <= limit if expected.any() else not g.any(), (k, name)


@each_adapted_row
@settings(max_examples=25)
@given(data=st.data())
def test_law_8_rows_are_alone(row, data):
    spec, *rest, ids, groups = data.draw(batches(row))
    law_8_rows_are_alone(spec, *rest, ids, groups)


@each_adapted_row
@settings(max_examples=12)
@given(data=st.data())
def test_law_8_several_add_up(row, data):
    spec, *rest, ids, groups = data.draw(batches(row, several=True))
    if row in BY_RANK:
        with pytest.raises(SpecError, match="adapters for a row, but updates of scheme 'rank' do not add up"):
            law_8_rows_are_alone(spec, *rest, ids, groups)
        return
    law_8_rows_are_alone(dataclasses.replace(spec, dropout=0.0), *rest, ids, groups)


def test_ranks_that_are_cut_are_not_padded():
    specs = [fixed_spec("column, by rank", rank=rank) for rank in (4, 8)]
    with pytest.raises(SpecError, match="stack: adapters of scheme 'rank' differ in rank, and their factors cannot be"):
        many.joint(specs)


def grouped_inputs(dtype=torch.float64):
    torch.manual_seed(0)
    shapes = {"x": (3, 2, 4, 5), "weight": (7, 5), "bias": (7,), "down": (3, 2, 5), "up": (3, 7, 2)}
    made = {name: torch.randn(shape, dtype=dtype).requires_grad_() for name, shape in shapes.items()}
    return made | {"scales": torch.tensor([0.5, 2.0, 0.0], dtype=dtype)}


def test_groups_are_multiplied_as_each_alone():
    made = grouped_inputs()
    y = grouped.updated(**made)
    alone = [
        product.updated(*(made[n][i] if n in ("x", "down", "up") else made[n] for n in ARGUMENTS), made["scales"][i])
        for i in range(3)
    ]
    torch.testing.assert_close(y, torch.stack(alone), rtol=1e-12, atol=1e-12)
    wanted = [made[n] for n in ARGUMENTS]
    cotangent = torch.randn_like(y)
    mine = torch.autograd.grad(y, wanted, cotangent)
    theirs = torch.autograd.grad(torch.stack(alone), wanted, cotangent)
    torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


def test_groups_have_a_second_derivative():
    made = list(grouped_inputs().values())
    assert torch.autograd.gradcheck(grouped.updated, made)
    assert torch.autograd.gradgradcheck(grouped.updated, made)
