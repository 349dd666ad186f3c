"""Are the values checked at birth, frozen, and the same after a trip through JSON? And the small pure functions?"""

import copy
import dataclasses
import json
import os
import pickle
import re
from dataclasses import replace

import pytest
import strategies
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from pool import pool
from safetensors.torch import save_file
from torch.func import grad, grad_and_value, vmap

import lora_fn
from lora_fn import (
    Axis,
    FileError,
    FusedPart,
    Heads,
    LayerSpec,
    LoraSpec,
    Partial,
    Replicate,
    Shard,
    SpecError,
    TargetError,
    checkpoint,
    sharding,
    targets,
)
from lora_fn.axis import axis_of_mesh
from lora_fn.cross_entropy import gather_logits, vocab_parallel_cross_entropy
from lora_fn.placement import to_torch

LINEAR = dict(kind="linear", in_features=4, out_features=6)
COLUMN = LINEAR | dict(kind="column")
ROW = LINEAR | dict(kind="row")
EMBEDDING = LINEAR | dict(kind="embedding")
THREE = Axis(name="tp", size=3)

BY_RANK = dict(rank=3, scheme="rank")
GATE, UP = FusedPart(name="gate", size=2, rank=2), FusedPart(name="up", size=4)
FUSED = COLUMN | dict(parts=(GATE, UP))
HEADS = Heads(query=4, key_value=2)
QKV = LINEAR | dict(
    kind="qkv",
    out_features=8,
    heads=HEADS,
    parts=tuple(FusedPart(name=n, size=k) for n, k in (("q", 4), ("k", 2), ("v", 2))),
)

REFUSED = {
    "kind": (LINEAR | dict(kind="conv9d"), "LayerSpec.kind: is 'conv9d'"),
    "sizes": (LINEAR | dict(in_features=0), "LayerSpec.in_features: is 0, expected at least 1"),
    "rank": (LINEAR | dict(rank=-1), "LayerSpec.rank: is -1"),
    "adapter of a norm": (LINEAR | dict(kind="replicated", rank=2), "a replicated layer takes no adapter"),
    "dropout": (LINEAR | dict(dropout=1.0), "LayerSpec.dropout: is 1.0"),
    "input": (COLUMN | dict(input="cut"), "LayerSpec.input: is 'cut'"),
    "gathered": (ROW | dict(input="gathered"), "LayerSpec.input: is 'gathered'"),
    "sharded without a sequence": (COLUMN | dict(input="sharded"), "exactly where sequence_dim is set"),
    "sequence": (COLUMN | dict(sequence_dim=2), "LayerSpec.sequence_dim: is 2"),
    "gather under SP": (COLUMN | dict(gather_output=True, sequence_dim=0), "LayerSpec.gather_output"),
    "gather of a row": (ROW | dict(gather_output=True), "LayerSpec.gather_output: is True"),
    "row input under SP": (ROW | dict(input_is_parallel=False, sequence_dim=0), "LayerSpec.input_is_parallel"),
    "partial with a bias": (ROW | dict(reduce_output=False, bias=True), "would count the bias once per process"),
    "fan_in_fan_out": (COLUMN | dict(fan_in_fan_out=True), "LayerSpec.fan_in_fan_out"),
    "padding_idx": (EMBEDDING | dict(padding_idx=4), "expected a row of the embedding"),
    "embedding bias": (EMBEDDING | dict(bias=True), "expected False for an embedding"),
    "lora_bias alone": (LINEAR | dict(lora_bias=True), "expected False without an adapter"),
    "pad of a row": (ROW | dict(pad=True), "LayerSpec.pad"),
    "reduce dtype": (ROW | dict(reduce_dtype="int8"), "LayerSpec.reduce_dtype"),
    "gradients": (ROW | dict(gradients="never"), "LayerSpec.gradients"),
    "rows that do not divide": (COLUMN | dict(out_features=7, axis=THREE), "out_features: is 7, which 3 processes"),
    "numbers that are none": (LINEAR | dict(rank=2.5, alpha="8"), "LayerSpec.rank: is 2.5, expected an integer"),
    "a flag for a number": (LINEAR | dict(in_features=True), "LayerSpec.in_features: is True, expected an integer"),
    "parts of a row": (
        ROW | dict(parts=(FusedPart(name="q", size=6),)),
        "expected none but for kind 'column' or 'qkv'",
    ),
    "parts of no name": (COLUMN | dict(parts=(FusedPart(name="q.k", size=6),)), "with names that are identifiers"),
    "parts that are none": (COLUMN | dict(parts=("q",)), "expected FusedPart values"),
    "parts of one name": (COLUMN | dict(parts=(GATE, GATE), out_features=4), "expected names that differ"),
    "parts of another size": (FUSED | dict(out_features=7), "of 6 features, but out_features is 7"),
    "parts beside a rank": (FUSED | dict(rank=2), "give each part its own"),
    "parts and padding": (FUSED | dict(pad=True), "expected none with gather_output or pad"),
    "a part that cannot be": (COLUMN | dict(parts=(FusedPart(name="q", size=6, rank=-1),)), "a rank of at least 0"),
    "a part that does not divide": (FUSED | dict(axis=THREE), "'gate' has size 2, which 3 processes do not divide"),
    "shared and different": (
        FUSED | dict(share_A=True, parts=(GATE, FusedPart(name="up", size=4, rank=3))),
        "share A, but have (rank, alpha) [(2, 1.0), (3, 1.0)]; expected one",
    ),
    "shared by nobody": (COLUMN | dict(share_A=True), "expected False but for a fused layer"),
    "qkv without parts": (QKV | dict(parts=()), "expected query, key and value for kind 'qkv'"),
    "qkv without heads": (QKV | dict(heads=None), "expected the heads of kind 'qkv'"),
    "heads of a column": (FUSED | dict(heads=HEADS), "expected None but for kind 'qkv' or 'row'"),
    "heads that are none": (QKV | dict(heads=Heads(query=4, key_value=0)), "expected integers of at least 1"),
    "an order": (QKV | dict(heads=Heads(query=4, key_value=2, order="odd")), "an order of ('tiled', 'adjacent')"),
    "heads that do not divide": (QKV | dict(axis=THREE), "cannot be dealt to 3 processes"),
    "too many copies": (QKV | dict(heads=Heads(query=4, key_value=2, multiplier=3)), "with 3 copies of 2 key-value"),
    "features of no heads": (ROW | dict(in_features=6, heads=HEADS), "6 features cannot be cut into 4 heads"),
    "no copies": (QKV | dict(heads=Heads(query=4, key_value=2, multiplier=0)), "expected integers of at least 1"),
    "heads as a dict": (QKV | dict(heads={"query": 4}), "expected a Heads value"),
    "heads of a whole input": (ROW | dict(heads=HEADS, input_is_parallel=False), "where the input is not cut already"),
    "heads of two sizes": (
        QKV | dict(heads=Heads(query=2, key_value=2)),
        "but the heads of the query have 2 features, of the key 1",
    ),
    "a flag in words": (QKV | dict(fuse_qkv="false"), "LayerSpec.fuse_qkv: is 'false', expected True or False"),
    "separate weights of one part": (COLUMN | dict(fuse_qkv=False), "expected True but for a fused layer"),
    "a scheme": (COLUMN | dict(rank=3, scheme="fold"), "LayerSpec.scheme: is 'fold', expected one of (None, 'rank')"),
    "an embedding by rank": (EMBEDDING | BY_RANK, "expected None but for kinds 'column', 'qkv' and 'row'"),
    "a gathered output by rank": (COLUMN | BY_RANK | dict(gather_output=True), "expected None where the output is"),
    "by rank under SP": (ROW | BY_RANK | dict(sequence_dim=0), "expected None under sequence parallel, where the"),
    "a rank that does not divide": (
        COLUMN | BY_RANK | dict(rank=4, axis=THREE),
        "LayerSpec.rank: is 4, which 3 processes do not divide by scheme 'rank'; choose a rank that they do",
    ),
    "a part's rank that does not divide": (
        FUSED | dict(scheme="rank", axis=THREE, out_features=9, parts=(replace(GATE, size=3), replace(UP, size=6))),
        "LayerSpec.parts (gate): has rank 2, which 3 processes do not divide by scheme 'rank'",
    ),
    "no rank at all": (COLUMN | dict(scheme="rank"), "LayerSpec.scheme: is 'rank', expected None without an adapter"),
    "columns that do not divide": (ROW | dict(axis=THREE), "in_features: is 4, which 3 processes do not divide"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_layer_that_cannot_be_is_refused(case):
    options, sentence = REFUSED[case]
    with pytest.raises(SpecError, match=re.escape(sentence)):
        LayerSpec(**options)


def test_all_problems_are_told_at_once():
    with pytest.raises(SpecError) as raised:
        LayerSpec(kind="linear", in_features=0, out_features=0, dropout=2.0, gradients="no")
    assert len(str(raised.value).splitlines()) == 4
    with pytest.raises(SpecError) as raised:
        LoraSpec(rank=0, alpha=-1, dropout=1.5, target_modules=(), init_lora_weights="nice", rank_pattern={"a": 0})
    assert len(str(raised.value).splitlines()) == 6


LORA_REFUSED = {
    "a regular expression and layers": (dict(target_modules="a.*", layers_to_transform=[0]), "layers_to_transform"),
    "a pattern without layers": (dict(layers_pattern=["layers"]), "LoraSpec.layers_pattern"),
    "alpha": (dict(alpha=float("nan")), "LoraSpec.alpha: is nan"),
    "alpha_pattern": (dict(alpha_pattern={"q": 0}), "LoraSpec.alpha_pattern['q']: is 0"),
    "rank": (dict(rank=2.0), "LoraSpec.rank: is 2.0"),
    "lora_bias": (dict(lora_bias=True, init_lora_weights="gaussian"), "LoraSpec.lora_bias: cannot be with"),
}


@pytest.mark.parametrize("case", LORA_REFUSED)
def test_a_lora_spec_that_cannot_be_is_refused(case):
    options, sentence = LORA_REFUSED[case]
    with pytest.raises(SpecError, match=re.escape(sentence)):
        LoraSpec(**options)


@given(data=st.data())
def test_layer_specs_go_through_json(data):
    spec = data.draw(strategies.specs(data.draw(st.sampled_from(list(sharding.TABLE)))))
    assert LayerSpec.from_json(spec.to_json()) == spec
    assert pickle.loads(pickle.dumps(spec)) == copy.deepcopy(spec) == spec
    assert hash(spec) == hash(copy.deepcopy(spec))


JUNK = ("", "[]", "{", "3", '{"kind": "linear"}', '{"odd": 1}', "[" * 100000)


@pytest.mark.parametrize("junk", JUNK, ids=range(len(JUNK)))
@pytest.mark.parametrize("made", (LayerSpec, LoraSpec))
def test_junk_is_no_spec(made, junk):
    with pytest.raises(SpecError) as raised:
        made.from_json(junk)
    assert made.__name__ in str(raised.value) and len(str(raised.value)) < 400


@pytest.mark.parametrize("name", ("axis", "parts", "heads"))
@pytest.mark.parametrize("value", (3, [3], {"odd": 1}, "text"), ids=str)
def test_junk_in_a_layer_spec_is_refused(name, value):
    values = json.loads(LayerSpec(**QKV).to_json())
    assert LayerSpec.from_json(json.dumps(values)) == LayerSpec(**QKV)
    with pytest.raises(SpecError):
        LayerSpec.from_json(json.dumps(values | {name: value}))


NAMES = st.text("abq_.", min_size=1, max_size=6)
LORA_SPECS = st.builds(
    LoraSpec,
    rank=st.integers(1, 64),
    alpha=st.integers(1, 64) | st.floats(1e-3, 64),
    dropout=st.floats(0, 0.99),
    use_rslora=st.booleans(),
    init_lora_weights=st.sampled_from((True, False, "gaussian")),
    target_modules=st.just("all-linear") | st.lists(NAMES, min_size=1, max_size=3),
    exclude_modules=st.lists(NAMES, max_size=2) | NAMES,
    layers_to_transform=st.none() | st.lists(st.integers(0, 9), max_size=3),
    rank_pattern=st.dictionaries(NAMES, st.integers(1, 9), max_size=2),
    alpha_pattern=st.dictionaries(NAMES, st.floats(0.5, 9), max_size=2),
    task_type=st.none() | st.just("CAUSAL_LM"),
)
LORA_SPECS |= st.builds(LoraSpec, lora_bias=st.booleans(), init_lora_weights=st.booleans(), share_A=st.booleans())


@given(spec=LORA_SPECS)
def test_lora_specs_go_through_json(spec):
    assert LoraSpec.from_json(spec.to_json()) == spec
    assert pickle.loads(pickle.dumps(spec)) == copy.deepcopy(spec) == spec
    assert hash(spec) == hash(copy.deepcopy(spec))


def test_specs_are_frozen_and_know_their_keys():
    spec = LoraSpec(rank_pattern={"q": 2}, target_modules=["q"])
    assert LoraSpec.from_json(spec.to_json()) == spec and spec.target_modules == ("q",) and hash(spec)
    for each in (spec, LayerSpec(**LINEAR), Axis()):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(each, dataclasses.fields(each)[0].name, 1)
    with pytest.raises(SpecError, match=r"LoraSpec: unknown keys \['nice'\]"):
        LoraSpec.from_json('{"nice": 1}')
    with pytest.raises(SpecError, match=r"LayerSpec: unknown keys \['nice'\]"):
        LayerSpec.from_json('{"nice": 1, "axis": {}}')


@pytest.mark.parametrize("options", [dict(size=0), dict(size=2, index=2), dict(size=2, index=-1)], ids=str)
def test_an_axis_that_cannot_be_is_refused(options):
    with pytest.raises(SpecError, match="axis 'tp'"):
        Axis(**options)


def test_an_unbound_axis_is_an_error_that_says_what_to_do():
    spec = LayerSpec(**COLUMN | dict(axis=Axis(name="model", size=2), gather_output=True))
    params = {"weight": torch.ones(3, 4)}
    with pytest.raises(
        SpecError, match=r"axis 'model': has 2 processes but is bound to no process group; call spec.bind"
    ):
        lora_fn.apply(params, torch.ones(4), spec)
    with pytest.raises(SpecError, match="vmap maps 3 lanes, the spec says 2"):
        stacked = {"weight": torch.ones(3, 3, 4)}
        vmap(lambda p, i: lora_fn.apply(p, torch.ones(4), spec, index=i))(stacked, torch.arange(3))


def binding(mesh):
    """What binding to a mesh of two processes gives, and the sentences where it cannot."""
    told = []
    for name, size in (("nice", 2), ("tp", 3)):
        try:
            Axis(name=name, size=size).bind(mesh)
        except SpecError as error:
            told.append(str(error))
    bound = LayerSpec(**LINEAR, axis=Axis(name="tp", size=2)).bind(mesh)
    assert bound.axis == axis_of_mesh(mesh, "tp") and bound.axis.unbound == Axis(name="tp", size=2)
    return bound.axis.index, bound.axis.size, bound.axis.groups, told


def test_binding_to_a_mesh():
    for rank, (index, size, groups, told) in enumerate(pool(2).run(binding)):
        assert (index, size, groups) == (rank, 2, ((0, 1),))
        assert told[0] == "axis 'nice': the mesh has ['tp']; name one of its dimensions 'nice'."
        assert told[1] == "axis 'tp': the spec says 3 processes, the mesh has 2; make them equal."


def test_placements_are_torchs():
    from torch.distributed import tensor

    assert [to_torch(p) for p in (Shard(1), Replicate(), Partial())] == [
        tensor.Shard(1),
        tensor.Replicate(),
        tensor.Partial(),
    ]


def test_parameters_of_other_names_are_refused():
    with pytest.raises(SpecError, match=r"missing \['lora_B'\], unexpected \['lora_C'\]"):
        params = {"weight": torch.ones(6, 4), "lora_A": torch.ones(1, 4), "lora_C": torch.ones(6, 1)}
        lora_fn.apply(params, torch.ones(4), LayerSpec(**LINEAR, rank=1))
    with pytest.raises(SpecError, match=r"lora_A: has shape \[1, 5\], expected \[1, 4\]"):
        lora_fn.shard({"lora_A": torch.ones(1, 5)}, LayerSpec(**LINEAR, rank=1), 0)


# ---------------------------------------------------------------------------------------------------------- targets

LAYERS = ("m.h.0.q", "m.h.0.up", "m.h.1.q", "m.h.1.up", "norm", "lm_head")
LINEARS = ("m.h.1.up", "lm_head", "m.h.0.q", "m.h.0.up", "m.h.1.q")
SELECTED = {
    "a suffix is a whole name": (dict(target_modules=("q",)), ("m.h.0.q", "m.h.1.q")),
    "in the order of the layers": (dict(target_modules=("up", "m.h.0.q")), ("m.h.0.q", "m.h.0.up", "m.h.1.up")),
    "a whole match": (dict(target_modules=r"m\.h\..*\.u"), None),
    "a regular expression": (dict(target_modules=r"m\.h\.1\..*"), ("m.h.1.q", "m.h.1.up")),
    "no output embedding": (dict(), ("m.h.0.q", "m.h.0.up", "m.h.1.q", "m.h.1.up")),
    "but where it is named": (dict(target_modules=("lm_head",)), ("lm_head",)),
    "without some": (dict(exclude_modules=("m.h.1.q", "up")), ("m.h.0.q",)),
    "some layers, and a whole name": (
        dict(target_modules=("q", "norm"), layers_to_transform=(1,)),
        ("m.h.1.q", "norm"),
    ),
}


@pytest.mark.parametrize("case", SELECTED)
def test_what_a_spec_selects(case):
    options, expected = SELECTED[case]
    if expected is None:
        with pytest.raises(TargetError, match="matches none of the 6 layers"):
            targets.select(LAYERS, LoraSpec(**options), linear=LINEARS)
    else:
        assert targets.select(LAYERS, LoraSpec(**options), linear=LINEARS) == expected


def test_all_targets_that_match_nothing_are_told_at_once():
    spec = LoraSpec(target_modules=("q", "upp", "dwn"), exclude_modules=("nrm",))
    with pytest.raises(TargetError) as raised:
        targets.select(LAYERS, spec)
    assert [line.split()[1] for line in str(raised.value).splitlines()] == ["'upp'", "'dwn'", "'nrm'"]
    assert "the nearest names are up" in str(raised.value)


ENDLESS = r"(a+)+$|(a|a)*b"


@pytest.mark.parametrize("options", (dict(target_modules=ENDLESS), dict(rank_pattern={ENDLESS: 2})), ids=str)
def test_an_expression_that_goes_back_without_end_is_refused(options, monkeypatch):
    monkeypatch.setattr(targets, "PATIENCE", 0.1)
    name = "a" * 60 + "!"
    with pytest.raises(TargetError, match=r"took longer than 0.1 s on 'aaa.*'; write a simpler one"):
        targets.select([name], LoraSpec(**options), linear=[name])


def test_the_first_pattern_that_matches_decides():
    spec = LoraSpec(rank=8, rank_pattern={"0.q": 2, "q": 3}, alpha=5, alpha_pattern={r"h\.1\..*": 7})
    assert [targets.rank_of(name, spec) for name in LAYERS[:3]] == [2, 8, 3]
    assert [targets.alpha_of(name, spec) for name in LAYERS[1:3]] == [5, 7]


# -------------------------------------------------------------------------------------------------------- gradients


def tree():
    return {"a": {"x": torch.arange(3.0), "y": torch.ones(2)}, "b": {"x": torch.tensor(2.0)}}


def polynomial(params, factor):
    return factor * (params["a"]["x"].pow(3).sum() + params["b"]["x"] * params["a"]["x"].sum())


def test_value_and_grad_is_grad_and_value_without_a_graph():
    value, grads = lora_fn.value_and_grad(polynomial)(tree(), 2.0)
    expected, expected_value = grad_and_value(polynomial)(tree(), 2.0)
    assert torch.equal(value, expected_value) and value.grad_fn is None
    for path, of in expected.items():
        for name, g in of.items():
            assert torch.equal(grads[path][name], g) and grads[path][name].grad_fn is None
    assert torch.equal(grads["a"]["y"], torch.zeros(2))


def test_value_and_grad_works_where_gradients_are_off_and_leaves_its_arguments():
    params = tree()
    with torch.no_grad():
        _, grads = lora_fn.value_and_grad(polynomial)(params, 1.0)
    assert grads["a"]["x"].abs().sum() > 0
    assert not params["a"]["x"].requires_grad and params["a"]["x"].grad is None


@pytest.mark.parametrize("transform", [grad, vmap], ids=["grad", "vmap"])
def test_value_and_grad_is_the_outermost(transform):
    def inside(x):
        return lora_fn.value_and_grad(lambda p: p.sum())(x)[0]

    with pytest.raises(SpecError, match=r"torch\.func\.grad_and_value"):
        transform(inside)(torch.ones(3))


def test_partition_and_combine():
    trainable, frozen = lora_fn.partition(tree(), lambda path, name: name == "x")
    assert {p: set(of) for p, of in trainable.items()} == {"a": {"x"}, "b": {"x"}}
    assert {p: set(of) for p, of in frozen.items()} == {"a": {"y"}}
    whole = lora_fn.combine(trainable, frozen)
    assert {p: set(of) for p, of in whole.items()} == {p: set(of) for p, of in tree().items()}
    with pytest.raises(SpecError, match=r"combine: a: \['x'\] are in two of the trees"):
        lora_fn.combine(trainable, tree())


@pytest.mark.parametrize("size", [1, 2, 4])
def test_cross_entropy_of_a_sharded_vocabulary(size):
    vocabulary, local = 11, -(-11 // size)
    generator = torch.Generator().manual_seed(0)
    logits = 5 * torch.randn(3, 7, vocabulary, dtype=torch.float64, generator=generator)
    targets = torch.randint(0, vocabulary, (3, 7), generator=generator)
    targets[0, :3] = -100
    padded = F.pad(logits, (0, local * size - vocabulary), value=99.0)
    shards = torch.stack(padded.split(local, -1))
    axis = Axis(name="tp", size=size)

    def loss(shard, index):
        return vocab_parallel_cross_entropy(shard, targets, axis, vocab_size=vocabulary, index=index)

    dense = logits.requires_grad_()
    expected = F.cross_entropy(dense.flatten(0, 1), targets.flatten(), reduction="none").view(3, 7)
    (whole,) = torch.autograd.grad(expected.sum(), dense)
    found = vmap(loss)(shards, torch.arange(size))
    grads = vmap(grad(lambda shard, index: loss(shard, index).sum()))(shards, torch.arange(size))
    joined = torch.cat(list(grads), -1)
    assert torch.allclose(found, expected.expand(size, 3, 7), rtol=1e-10, atol=1e-10)
    assert torch.allclose(joined[..., :vocabulary], whole, rtol=1e-10, atol=1e-10)
    assert torch.equal(joined[..., vocabulary:], torch.zeros_like(joined[..., vocabulary:]))

    def gathered(shard, index):
        return gather_logits(shard, axis, vocab_size=vocabulary, index=index)

    assert torch.equal(vmap(gathered)(shards, torch.arange(size)), logits.expand(size, 3, 7, vocabulary))
    parts = vmap(grad(lambda shard, index: (gathered(shard, index) * logits.detach()).sum()))(
        shards, torch.arange(size)
    )
    assert torch.equal(torch.cat(list(parts), -1), F.pad(logits.detach(), (0, local * size - vocabulary)))


# -------------------------------------------------------------------------------------------------------------- disk


def test_replacing_is_all_or_nothing(tmp_path):
    file, directory = tmp_path / "a.txt", tmp_path / "d"
    for content in ("old", "new"):
        with checkpoint.replacing(file) as beside:
            beside.write_text(content)
        with checkpoint.replacing(directory) as beside:
            beside.mkdir()
            (beside / content).write_text(content)
    for place in (file, directory):
        with pytest.raises(ZeroDivisionError), checkpoint.replacing(place) as beside:
            beside.write_text("half")
            raise ZeroDivisionError
    assert file.read_text() == "new" and [p.name for p in directory.iterdir()] == ["new"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.txt", "d"]


def test_tensor_files_read_parts_and_count_bytes(tmp_path):
    save_file({"a": torch.arange(24.0).view(4, 6), "b": torch.tensor(1.0)}, tmp_path / "x.safetensors")
    files = checkpoint.TensorFiles([tmp_path / "x.safetensors"])
    assert torch.equal(files.read("a", dim=1, start=2, stop=4), torch.arange(24.0).view(4, 6)[:, 2:4])
    assert torch.equal(files.read("a", start=3), torch.arange(18.0, 24.0).view(1, 6)) and files.bytes_read == 32 + 24
    assert files.read("b") == 1
    with pytest.raises(FileError, match="tensor 'c' is in none of"):
        files.read("c")
    with pytest.raises(FileError, match="is also in"):
        save_file({"a": torch.ones(1)}, tmp_path / "y.safetensors")
        checkpoint.TensorFiles([tmp_path / "x.safetensors", tmp_path / "y.safetensors"])
    os.truncate(tmp_path / "x.safetensors", 60)
    with pytest.raises(FileError, match="is not a whole safetensors file"):
        checkpoint.TensorFiles([tmp_path / "x.safetensors"])
    with pytest.raises(FileError, match="no such file"):
        checkpoint.TensorFiles([tmp_path / "z.safetensors"])


@pytest.mark.parametrize("junk", (b"", b"junk", b"\xff" * 64, b"\x02\0\0\0\0\0\0\0{]"), ids=repr)
def test_junk_is_not_a_tensor_file(junk, tmp_path):
    (tmp_path / "x.safetensors").write_bytes(junk)
    with pytest.raises(FileError, match=r"x\.safetensors: is not a whole safetensors file"):
        checkpoint.TensorFiles([tmp_path / "x.safetensors"])


def test_a_tensor_that_the_index_has_and_the_file_has_not(tmp_path):
    file = tmp_path / "x.safetensors"
    save_file({"a": torch.ones(1)}, file)
    with pytest.raises(FileError, match="tensor 'b' is not in it, though the index says so"):
        checkpoint.TensorFiles({"a": file, "b": file})
