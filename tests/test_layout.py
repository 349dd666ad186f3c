"""Is every layout invertible, bit for bit, and is it the one that other programs have? For any number of processes."""

import dataclasses
import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_fn import Layout, SpecError, layout
from lora_fn.layout import ORDERS, Part

PROCESSES = st.integers(1, 32)
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int8)


@st.composite
def heads(draw, processes):
    """(query heads, key-value heads, copies, order) that can be dealt to so many processes."""
    key_value = draw(st.integers(1, 8))
    copies = layout.least_multiplier(key_value, processes) * draw(st.integers(1, 2))
    return key_value * copies * draw(st.integers(1, 3)), key_value, copies, draw(st.sampled_from(ORDERS))


@st.composite
def layouts(draw):
    """A layout of one to three parts of any form."""
    processes = draw(PROCESSES)
    parts = []
    for number in range(draw(st.integers(1, 3))):
        name, form = f"p{number}", draw(st.sampled_from(("plain", "padded", "strided", "query", "key_value")))
        head_dim = draw(st.integers(1, 3))
        if form in ("query", "key_value"):
            query, key_value, copies, order = draw(heads(processes))
            size = head_dim * (query if form == "query" else key_value)
            make = layout.query_heads if form == "query" else layout.key_value_heads
            parts.append(make(size, key_value, processes, multiplier=copies, order=order, name=name))
        elif form == "padded":
            parts.append(layout.plain(draw(st.integers(1, 80)), processes, name=name, pad=True))
        else:
            stride = draw(st.integers(2, 4)) if form == "strided" else 1
            parts.append(layout.plain(processes * stride * head_dim, processes, name=name, stride=stride))
    return layout.fuse(*parts)


def canonical(size, dim, dtype):
    """A tensor whose elements are all different, with `dim` of that size."""
    shape = [2, 3, 2]
    shape[dim] = size
    values = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(size))
    return (values * 100).to(dtype)


@settings(max_examples=300)
@given(made=layouts(), dim=st.integers(0, 2), dtype=st.sampled_from(DTYPES))
def test_canonical_to_local_to_canonical_is_bit_exact(made, dim, dtype):
    x = canonical(made.size, dim, dtype)
    locals_ = [made.to_local(x, index, dim=dim) for index in range(made.processes)]
    assert {local.shape[dim] for local in locals_} == {made.local_size}
    back = made.to_canonical(locals_, dim=dim)
    assert back.dtype == dtype and torch.equal(back, x)
    assert Layout.from_json(made.to_json()) == made


@settings(max_examples=100)
@given(made=layouts())
def test_all_that_is_derived_agrees(made):
    """Pieces, places, sources and copies say the same, in three ways of counting."""
    by_pieces = torch.full((made.processes, made.local_size), -1)
    for index in range(made.processes):
        for piece in made.pieces(index):
            length = piece.stop - piece.start
            start = made.offset(piece.part) + piece.start
            by_pieces[index, piece.at : piece.at + length] = torch.arange(start, start + length)
    places = made.places(torch.arange(made.processes))
    assert torch.equal(places[by_pieces >= 0], by_pieces[by_pieces >= 0])
    assert torch.equal(places[-1], made.places(made.processes - 1))
    assert by_pieces.flatten()[made.sources()].tolist() == list(range(made.size))
    number = torch.bincount(by_pieces[by_pieces >= 0], minlength=made.size)
    for index in range(made.processes):
        held = by_pieces[index] >= 0
        assert torch.equal(made.copies()[held], number[by_pieces[index][held]])
    assert made.has_copies == bool((number > 1).any())
    assert sum(made.local_sizes.values()) == made.local_size


@settings(max_examples=200)
@given(data=st.data(), processes=PROCESSES)
def test_every_query_head_is_beside_its_key_value_head(data, processes):
    """A process's query heads, in order, belong to its key-value heads, in order, equally many to each."""
    query, key_value, copies, order = data.draw(heads(processes))
    options = {"multiplier": copies, "order": order}
    queries = layout.query_heads(query, key_value, processes, **options).places(torch.arange(processes))
    keys = layout.key_value_heads(key_value, key_value, processes, **options).places(torch.arange(processes))
    assert sorted(queries.flatten().tolist()) == list(range(query))
    per_slot = query // (key_value * copies)
    assert torch.equal(queries // (query // key_value), keys.repeat_interleave(per_slot, 1))
    assert torch.equal(torch.bincount(keys.flatten()), torch.full((key_value,), copies))


# (query heads, key-value heads, processes, copies) -> each process's query heads and key-value heads under "tiled", as
# neuronx-distributed and Optimum Neuron have them on trn1.
ON_TRN1 = {
    (8, 2, 4, 2): ([[0, 1], [4, 5], [2, 3], [6, 7]], [[0], [1], [0], [1]]),
    (8, 4, 8, 2): ([[0], [2], [4], [6], [1], [3], [5], [7]], [[0], [1], [2], [3], [0], [1], [2], [3]]),
    (8, 1, 4, 4): ([[0, 1], [2, 3], [4, 5], [6, 7]], [[0]] * 4),
    (8, 4, 2, 1): ([[0, 1, 2, 3], [4, 5, 6, 7]], [[0, 1], [2, 3]]),
    (8, 4, 4, 2): ([[0, 2], [4, 6], [1, 3], [5, 7]], [[0, 1], [2, 3], [0, 1], [2, 3]]),
}


@pytest.mark.parametrize("numbers", ON_TRN1)
def test_heads_are_dealt_as_on_trn1(numbers):
    query, key_value, processes, copies = numbers
    queries = layout.query_heads(query, key_value, processes, multiplier=copies)
    keys = layout.key_value_heads(key_value, key_value, processes, multiplier=copies)
    found = tuple(each.places(torch.arange(processes)).tolist() for each in (queries, keys))
    assert found == ON_TRN1[numbers]


def test_adjacent_copies_leave_the_queries_in_their_order():
    keys = layout.key_value_heads(2, 2, 4, multiplier=2, order="adjacent")
    assert keys.places(torch.arange(4)).flatten().tolist() == [0, 0, 1, 1]
    assert layout.query_heads(8, 2, 4, multiplier=2, order="adjacent").places(0).tolist() == [0, 1]


@given(processes=PROCESSES, stride=st.integers(1, 4), length=st.integers(1, 4))
def test_a_stride_is_neuronx_distributeds(processes, stride, length):
    """Chunks of local / stride rows, of which process r takes r, r + n, r + 2 n, ..."""
    made = layout.plain(processes * stride * length, processes, stride=stride)
    chunks = torch.arange(made.size).split(length)
    for index in range(processes):
        assert made.places(index).tolist() == torch.cat(chunks[index::processes]).tolist()


def test_a_fused_layer_of_equal_parts_is_a_stride():
    fused = layout.fuse(*(layout.plain(6, 3, name=name) for name in ("gate", "up")))
    strided = layout.plain(12, 3, stride=2)
    assert torch.equal(fused.places(torch.arange(3)), strided.places(torch.arange(3)))


@given(kv_heads=st.integers(1, 12), processes=PROCESSES)
def test_the_least_multiplier_is_the_least(kv_heads, processes):
    fits = [m for m in range(1, processes + 1) if kv_heads * m % processes == 0]
    assert layout.least_multiplier(kv_heads, processes) == fits[0]
    assert math.lcm(kv_heads, processes) == kv_heads * fits[0]


WRONG = {
    "10 cannot be cut into 4 equal parts": lambda: layout.plain(10, 4),
    "size 10 cannot be cut into 4 key-value heads": lambda: layout.key_value_heads(10, 4, 2, multiplier=1),
    "size 10 cannot be cut into 4 groups of query heads": lambda: layout.query_heads(10, 2, 2, multiplier=2),
    "2 blocks cannot be dealt to 4 processes evenly": lambda: layout.key_value_heads(4, 2, 4, multiplier=1),
    "4 blocks cannot be dealt with stride 3": lambda: Layout(parts=(Part(size=8, blocks=4, stride=3),), processes=2),
    "expected integers of at least 1": lambda: Layout(parts=(Part(size=8, blocks=0),), processes=2),
    "expected one or more of a name": lambda: layout.fuse(layout.plain(4, 2), layout.plain(4, 2)),
    "index is 2, expected 0 to 1": lambda: layout.plain(4, 2).to_local(torch.ones(4), 2),
    "dimension 0 has size 5, expected 4": lambda: layout.plain(4, 2).to_local(torch.ones(5), 0),
    "found 1 parts, expected 2": lambda: layout.plain(4, 2).to_canonical([torch.ones(2)]),
    "dimension 0 has size 3, expected 2": lambda: layout.plain(4, 2).to_canonical([torch.ones(3)] * 2),
    "processes is 0, expected at least 1": lambda: layout.plain(4, 0),
    "kv_heads is 0, expected at least 1": lambda: layout.query_heads(4, 0, 2, multiplier=1),
    "cannot fuse layouts over \\[2, 4\\] processes": lambda: layout.fuse(
        layout.plain(4, 2, name="a"), layout.plain(4, 4, name="b")
    ),
    "cannot fuse layouts over \\[\\] processes": lambda: layout.fuse(),
    "unknown keys \\['more'\\]": lambda: Layout.from_json('{"processes": 1, "parts": [], "more": 1}'),
    "layout: .* is not one": lambda: Layout.from_json("[" * 100000),
    "has no part 'k', only": lambda: layout.plain(4, 2).part("k"),
    "is not one": lambda: Layout.from_json("[]"),
    "unknown keys \\['odd'\\]": lambda: Layout.from_json(json.dumps({"processes": 1, "parts": [{"odd": 1}]})),
}


@pytest.mark.parametrize("sentence", WRONG)
def test_what_cannot_be_is_a_sentence(sentence):
    with pytest.raises(SpecError, match=sentence) as raised:
        WRONG[sentence]()
    assert "\n" not in str(raised.value)


def test_copies_that_differ_are_refused():
    keys = layout.key_value_heads(4, 2, 4, multiplier=2, name="k")
    locals_ = [keys.to_local(torch.arange(4.0), index) for index in range(4)]
    locals_[2] = locals_[2] + 1
    with pytest.raises(SpecError, match="the copies of k, elements 0 to 1, differ between processes"):
        keys.to_canonical(locals_)
    locals_[2] = locals_[0] = torch.tensor([math.nan, -0.0])
    assert keys.to_canonical(locals_).isnan().tolist() == [True, False, False, False]


def test_layouts_are_values():
    made = layout.plain(4, 2, name="q")
    assert made == dataclasses.replace(made) and hash(made) == hash(dataclasses.replace(made))
    with pytest.raises(dataclasses.FrozenInstanceError):
        made.processes = 3
