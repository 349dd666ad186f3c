"""Does a manifest say what there is, and is one that cannot be refused?"""

import hashlib
import json
import os
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

import lora_fn
from lora_fn import Axis, FileError, LayerSpec, LoraSpec, SpecError, checkpoint, manifest, peft_format
from lora_fn.layer_spec import FusedPart, Heads
from lora_fn.manifest import Manifest

TP = 2
AXIS = Axis(size=TP)
QKV = LayerSpec(
    kind="qkv",
    in_features=6,
    out_features=16,
    parts=(
        FusedPart(name="q", size=8, rank=2),
        FusedPart(name="k", size=4),
        FusedPart(name="v", size=4, rank=3, alpha=6.0),
    ),
    heads=Heads(query=4, key_value=2, multiplier=2),
    axis=AXIS,
)
SPECS = {
    "model.embed_tokens": LayerSpec(
        kind="embedding", in_features=7, out_features=6, rank=2, pad=True, padding_idx=3, axis=AXIS
    ),
    "model.layers.0.self_attn.qkv_proj": QKV,
    "model.layers.1.mlp.down_proj": LayerSpec(kind="row", in_features=4, out_features=6, rank=2, axis=AXIS),
    "model.layers.2.router": LayerSpec(kind="linear", in_features=6, out_features=3, rank=1),
    "lm_head": LayerSpec(
        kind="column", in_features=6, out_features=7, bias=True, rank=2, lora_bias=True, pad=True, axis=AXIS
    ),
}
CONFIG = peft_format.to_config(LoraSpec(rank=2, target_modules=("down_proj",)), [], [])


def made(directory, specs=SPECS, pp=1, seed=0, **changes):
    """Write a checkpoint of random factors; what was written, {PEFT's name: tensor}, and its manifest."""
    generator = torch.Generator().manual_seed(seed)
    of = Manifest(config=CONFIG, specs=specs, tp=TP, stages=manifest.stages(specs, pp), **changes)
    directory.mkdir()
    whole, files = {}, {}
    canonical = {
        path: {
            name: torch.randn(lora_fn.sharding.canonical_shape(spec, name), generator=generator)
            for name in lora_fn.sharding.adapter_names(spec)
        }
        for path, spec in specs.items()
    }
    for kind in of.kinds:
        whole[kind] = peft_format.to_state_dict(canonical, specs)
    for pp_index, stage in enumerate(of.stages):
        for index in range(TP):
            tensors = {
                manifest.tensor_name(kind, path, name): t
                for kind in of.kinds
                for path in stage
                for name, t in lora_fn.shard(
                    canonical[path], specs[path], index if specs[path].axis.size > 1 else 0
                ).items()
            }
            name, stored = manifest.write_part(directory, of, index, pp_index, tensors)
            files[name] = stored
    of = replace(of, files=files)
    manifest.write(directory, of)
    return whole, of


@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize("pp", [1, 2])
def test_layers_may_be_written_in_any_order(backwards, pp, tmp_path):
    kinds = {"kinds": ("factor", *manifest.MOMENTS), "step": 3}
    _, of = made(tmp_path / "expected", pp=pp, **kinds)
    with manifest.opened(tmp_path / "expected") as stored:
        whole = [(kind, path, params) for kind in stored.kinds() for path, params in stored.layers(kind)]
    assert len(whole) == 3 * len(SPECS)
    (tmp_path / "c").mkdir()
    with manifest.writing(tmp_path / "c", replace(of, files={}), lambda kind, path, name: torch.float32) as put:
        for kind, path, params in reversed(whole) if backwards else whole:
            put(kind, path, params)
    expected = {file.name: file.read_bytes() for file in (tmp_path / "expected").iterdir()}
    assert {file.name: file.read_bytes() for file in (tmp_path / "c").iterdir()} == expected
    for name, stored_file in of.files.items():
        assert hashlib.sha256(expected[name]).hexdigest() == stored_file.sha256


def test_what_is_written_is_hashed_and_not_read(tmp_path, monkeypatch):
    """In the order of the files; in another, what is behind is read again."""
    read, pread = [], os.pread

    def counted(handle, length, offset):
        read.append(len(content := pread(handle, length, offset)))
        return content

    monkeypatch.setattr(os, "pread", counted)
    made(tmp_path / "c")
    assert sum(read) == 0
    made(tmp_path / "d")
    tensors = load_file(tmp_path / "d" / manifest.file_name(0, 0))
    plan = {name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()}
    digest = hashlib.sha256()
    with checkpoint.writing(tmp_path / "backwards", plan, {"a": "b"}, digest) as put:
        for name in reversed(checkpoint.in_file_order(plan)):
            put(name, tensors[name])
    assert sum(read) > 0
    assert digest.hexdigest() == hashlib.sha256((tmp_path / "backwards").read_bytes()).hexdigest()


def test_layers_are_read_ahead_and_each_byte_once(tmp_path):
    whole, of = made(tmp_path / "c", pp=2, kinds=("factor", *manifest.MOMENTS), step=3)
    with manifest.opened(tmp_path / "c") as stored:
        for kind in stored.kinds():
            layers = dict(stored.layers(kind))
            assert list(layers) == stored.paths(kind)
            named = peft_format.to_state_dict(layers, SPECS)
            assert all(torch.equal(named[key], t) for key, t in whole[kind].items())
    assert stored.bytes_read == sum(file.size for file in of.files.values())
    with manifest.opened(tmp_path / "c") as stored:
        next(stored.layers("factor"))  # who stops early leaves nothing behind that is read or open
    with pytest.raises(ValueError, match="closed file"):
        stored._files[0, 1].read(manifest.tensor_name("factor", "lm_head", "lora_A"))


def test_processes_that_wrote_other_dtypes_are_told(tmp_path):
    _, of = made(tmp_path / "c")
    name = manifest.file_name(1, 0)
    tensors = load_file(tmp_path / "c" / name)
    for dtype in (torch.bfloat16, torch.int32):
        key = "factor/lm_head.lora_A"
        _, stored = manifest.write_part(tmp_path / "c", of, 1, 0, tensors | {key: tensors[key].to(dtype)})
        manifest.write(tmp_path / "c", replace(of, files={**of.files, name: stored}))
        with pytest.raises(FileError, match=f"{name}: tensor '{key}' is .*, in tp-00000-.* F32, expected one of"):
            manifest.Checkpoint(tmp_path / "c")


@pytest.mark.parametrize("pp", [1, 2, 3])
def test_what_was_written_is_read(pp, tmp_path):
    whole, of = made(tmp_path / "c", pp=pp, kinds=("factor", *manifest.MOMENTS), step=3, facts={"data": "x"})
    assert manifest.read(tmp_path / "c") == of
    with manifest.opened(tmp_path / "c") as stored:
        for kind in stored.kinds():
            found = {path: stored.canonical(kind, path) for path in stored.paths(kind)}
            named = peft_format.to_state_dict(found, SPECS)
            assert named.keys() == whole[kind].keys()
            assert all(torch.equal(named[key], t) for key, t in whole[kind].items())
    size = sum(file.size for file in of.files.values())
    assert stored.bytes_read == size


def test_the_manifest_is_plain_json_that_tells_of_everything(tmp_path):
    _, of = made(tmp_path / "c", pp=2)
    value = json.loads((tmp_path / "c" / manifest.NAME).read_text())
    assert value["format"] == manifest.FORMAT and value["mesh"] == {"tp": 2, "pp": 2}
    assert value["step"] is None and value["adapter"] == CONFIG
    assert LayerSpec.from_json(json.dumps(value["layers"]["model.layers.0.self_attn.qkv_proj"])) == QKV
    assert value["layouts"]["model.layers.0.self_attn.qkv_proj"]["lora_B.v"]["parts"][0]["replication"] == 2
    for name, file in value["files"].items():
        content = (tmp_path / "c" / name).read_bytes()
        assert file == {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    assert len(value["files"]) == 4 == len(of.files)


def specs_of(numbers):
    row = LayerSpec(kind="row", in_features=4, out_features=6, rank=2)
    return {f"model.layers.{number}.mlp.down_proj": row for number in numbers}


def test_what_lies_whole_on_every_process_stays_so():
    linear = LayerSpec(kind="linear", in_features=6, out_features=3, rank=1)
    row = LayerSpec(kind="row", in_features=4, out_features=6, rank=2)
    sequence = LayerSpec(kind="linear", in_features=6, out_features=3, rank=1, axis=AXIS, sequence_dim=1)
    assert manifest.resized(linear, 4, before=1) == linear == manifest.resized(linear, 4, before=2)
    assert manifest.resized(row, 4, before=1).axis.size == 4 == manifest.resized(sequence, 4, before=2).axis.size
    with pytest.raises(SpecError, match="3 processes"):
        manifest.resized(row, 3, before=1)


@pytest.mark.parametrize(
    ("numbers", "pp", "num_layers", "expected"),
    [
        (range(7), 3, None, [[0, 1, 2], [3, 4], [5, 6]]),
        (range(4), 4, 4, [[0], [1], [2], [3]]),
        ([1, 6], 2, 8, [[1], [6]]),
        ([0, 1], 2, 8, [[0, 1], []]),
        ([10, 2], 1, None, [[10, 2]]),
    ],
)
def test_stages_are_cut_evenly(numbers, pp, num_layers, expected):
    found = manifest.stages(specs_of(numbers), pp, num_layers=num_layers)
    assert [[int(path.split(".")[2]) for path in stage] for stage in found] == expected


def test_what_is_outside_the_layers_is_at_the_ends():
    first, middle, last = manifest.stages(SPECS, 3)
    assert first == ("model.embed_tokens", "model.layers.0.self_attn.qkv_proj")
    assert middle == ("model.layers.1.mlp.down_proj",)
    assert last == ("model.layers.2.router", "lm_head")


@pytest.mark.parametrize(
    ("pp", "num_layers", "sentence"), [(0, None, "pp: is 0"), (4, None, "1 to 3"), (1, 2, "has layer 2")]
)
def test_stages_that_cannot_be(pp, num_layers, sentence):
    with pytest.raises(SpecError, match=sentence):
        manifest.stages(SPECS, pp, num_layers=num_layers)


def test_a_manifest_that_cannot_be(tmp_path):
    of = Manifest(config=CONFIG, specs=SPECS, tp=TP, stages=manifest.stages(SPECS, 1))
    for changes, sentence in (
        ({"tp": 4}, "lies over 2 processes, expected 4"),
        ({"stages": (("lm_head",),)}, "hold 1 layers, expected each of the 5 layers once"),
        ({"stages": (tuple(SPECS), ("lm_head",))}, "hold 6 layers"),
        ({"kinds": ("exp_avg",)}, "expected 'factor' and some of"),
        ({"kinds": ("factor", "colour")}, "expected 'factor' and some of"),
    ):
        with pytest.raises(SpecError, match=sentence):
            replace(of, **changes)


def sealed(value):
    """The text of a manifest, as its writer would seal it."""
    value = {k: v for k, v in value.items() if k != "sha256"}
    digest = hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
    return json.dumps({**value, "sha256": digest}, indent=2, sort_keys=True)


# Of a manifest that is sealed: what is changed, and what is said of it.
CONTRADICTIONS = {
    "no layers": (lambda v: v.pop("layers"), "is not a manifest"),
    "layers in a list": (lambda v: v.update(layers=[1]), "is not a manifest"),
    "a number for a layer": (lambda v: v["layers"].update(lm_head=3), "is not a manifest"),
    "an unknown value": (lambda v: v["layers"]["lm_head"].update(colour=3), "is not a manifest"),
    "another size": (lambda v: v["layers"]["lm_head"].update(out_features=9), "layouts or a mesh that"),
    "another mesh": (lambda v: v["mesh"].update(tp=3), "is not a manifest"),
    "no mesh": (lambda v: v.update(mesh=None), "is not a manifest"),
    "words for a mesh": (lambda v: v["mesh"].update(tp="2"), "is not a manifest"),
    "another pp": (lambda v: v["mesh"].update(pp=3), "layouts or a mesh that"),
    "another layout": (lambda v: v["layouts"].pop("lm_head"), "layouts or a mesh that"),
    "a layer in no stage": (lambda v: v["stages"][0].remove("lm_head"), "is not a manifest"),
    "a file that is not told of": (lambda v: v["files"].pop(manifest.file_name(0, 0)), "do not agree on 'tp-00000"),
    "a file elsewhere": (lambda v: v["files"].update({"../x": v["files"][manifest.file_name(0, 0)]}), "on '../x'"),
    "another step": (lambda v: v.update(step=4), "is of step None, manifest.json says step 4"),
    "a size that is text": (lambda v: v["files"][manifest.file_name(0, 0)].update(size="9"), "says 9"),
    "a step in words": (lambda v: v.update(step="four"), "step: is 'four', expected an integer"),
    "layers in words": (lambda v: v.update(num_layers="3"), "num_layers: is '3', expected an integer"),
    "nothing at all": (lambda v: v.update(layers={}, stages=[[]], layouts={}), "expected at least one"),
    "no adapter": (
        lambda v: v["layers"]["lm_head"].update(rank=0, lora_bias=False),
        "expected adapted and trained layers only",
    ),
    "more tensors": (lambda v: v["kinds"].append("exp_avg"), "tensor 'exp_avg/.*' is missing"),
}


@pytest.mark.parametrize("case", CONTRADICTIONS)
def test_a_manifest_that_contradicts_itself_or_its_files_is_a_sentence(case, tmp_path):
    made(tmp_path / "c")
    change, sentence = CONTRADICTIONS[case]
    place = tmp_path / "c" / manifest.NAME
    value = json.loads(place.read_text())
    change(value)
    place.write_text(sealed(value))
    with pytest.raises(FileError, match=sentence) as error:
        manifest.Checkpoint(tmp_path / "c")
    assert str(tmp_path) in str(error.value)


def header(entries, *, length=None, rest=b""):
    content = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return (len(content) if length is None else length).to_bytes(8, "little") + content + rest


ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
HEADERS = {
    "nothing": b"",
    "half a length": b"\1\0\0",
    "a length beyond the file": header({}, length=1 << 60),
    "no JSON": header(b"{]"),
    "no text": header(b"\xff\xfe{}"),
    "a list": header([1]),
    "brackets without end": header(b"[" * 100_000),
    "no offsets": header({"x": {"dtype": "F32", "shape": [2]}}),
    "integers": header({"x": ENTRY | {"dtype": "I64", "data_offsets": [0, 16]}}, rest=bytes(16)),
    "a dtype that is a list": header({"x": ENTRY | {"dtype": []}}, rest=bytes(8)),
    "a huge shape": header({"x": ENTRY | {"shape": [1 << 62, 4]}}, rest=bytes(8)),
    "a negative shape": header({"x": ENTRY | {"shape": [-2]}}, rest=bytes(8)),
    "a shape of text": header({"x": ENTRY | {"shape": ["2"]}}, rest=bytes(8)),
    "beyond the end": header({"x": ENTRY | {"data_offsets": [8, 16]}}, rest=bytes(8)),
    "before the begin": header({"x": ENTRY | {"data_offsets": [-8, 0]}}, rest=bytes(8)),
    "offsets of fractions": header({"x": ENTRY | {"data_offsets": [0.5, 8.5]}}, rest=bytes(9)),
    "fractions in the right place": header({"x": ENTRY | {"data_offsets": [0.0, 8.0]}}, rest=bytes(8)),
    "metadata of another kind": header({"__metadata__": 3, "x": ENTRY}, rest=bytes(8)),
    "other tensors": header(
        {"__metadata__": {"step": "None", "process": "tp 0 of 2, pp 0 of 1"}, "x": ENTRY}, rest=bytes(8)
    ),
}


@pytest.mark.parametrize("case", HEADERS)
def test_a_file_that_the_manifest_vouches_for_and_that_is_none_is_a_sentence(case, tmp_path):
    _, of = made(tmp_path / "c")
    name = manifest.file_name(0, 0)
    (tmp_path / "c" / name).write_bytes(HEADERS[case])
    stored = manifest.StoredFile(sha256=hashlib.sha256(HEADERS[case]).hexdigest(), size=len(HEADERS[case]))
    manifest.write(tmp_path / "c", replace(of, files={**of.files, name: stored}))
    with pytest.raises(FileError) as error:
        manifest.Checkpoint(tmp_path / "c")
    assert str(error.value).startswith(str(tmp_path / "c" / name)) and "\n" not in str(error.value)


def test_a_file_that_shrinks_while_it_is_read_is_a_sentence(tmp_path):
    made(tmp_path / "c")
    with manifest.Checkpoint(tmp_path / "c") as stored:
        place = tmp_path / "c" / manifest.file_name(0, 0)
        place.write_bytes(place.read_bytes()[:-10])
        with pytest.raises(FileError, match="ends at byte"):
            stored.finish()


def test_a_shared_A_is_read_into_parts_and_back(tmp_path):
    parts = tuple(replace(part, rank=2, alpha=2.0) for part in QKV.parts)
    shared = {"layers.0.qkv_proj": replace(QKV, parts=parts, share_A=True)}
    own = {"layers.0.qkv_proj": replace(QKV, parts=parts)}
    whole, _ = made(tmp_path / "shared", shared)
    with manifest.opened(tmp_path / "shared") as stored:
        for target in (own, shared):
            found = [manifest.recut(stored, "factor", target, index) for index in range(TP)]
            joined = {path: manifest.join([each[path] for each in found], spec) for path, spec in target.items()}
            named = peft_format.to_state_dict(joined, target)
            assert len(named) == 6
            assert all(torch.equal(named[key], t) for key, t in whole["factor"].items())
    made(tmp_path / "own", own)
    with manifest.opened(tmp_path / "own") as stored, pytest.raises(FileError, match="shared with; leave share_A out"):
        manifest.recut(stored, "factor", shared, 0)


def test_extra_files_and_directories_are_told(tmp_path):
    made(tmp_path / "c")
    with pytest.raises(FileError, match="no such directory"):
        manifest.read(tmp_path / "d")
    (tmp_path / "c" / "more").mkdir()
    with pytest.raises(FileError, match="more: is no part of the checkpoint"):
        manifest.read(tmp_path / "c")
    checkpoint.remove(tmp_path / "c" / "more")
    assert manifest.read(tmp_path / "c").tp == TP
