"""Do we read what Optimum Neuron and neuronx-distributed write? In their form here, and by the programs themselves."""

import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import zipfile
from collections import Counter
from dataclasses import replace
from pathlib import Path

import foreign_files as files
import pytest
import torch
from foreign_files import ALL, Case, rank_file

import lora_fn
from adapters import estimate, foreign, nxd_files, optimum_files
from lora_fn import FileError, LoraFnError, layout, peft_format
from lora_fn.layout import same_bits
from lora_fn.machines import MACHINES

HERE = Path(__file__).resolve().parent

CASES = {
    "separate": Case(),
    "separate, xser": Case(xser=True),
    "one process": Case(tp=1),
    "grouped": Case(tp=4, xser=True),
    "grouped, fused": Case(tp=4, fuse_qkv=True),
    "grouped, each head its own process": Case(tp=8, kv_heads=1, heads=8),
    "grouped, fused, 8 processes": Case(tp=8, kv_heads=2, heads=16, fuse_qkv=True, xser=True),
    "fused, as many key-value heads": Case(kv_heads=8, fuse_qkv=True),
    "pipeline": Case(pp=2, xser=True),
    "pipeline, grouped": Case(tp=4, pp=2),
    "only query and value": Case(targets=("q_proj", "v_proj")),
    "only output, whose inputs lie like heads": Case(tp=4, targets=("o_proj",)),
    "only down": Case(tp=4, targets=("down_proj",), fuse_qkv=True),
    "only gate and up": Case(tp=4, targets=("gate_proj", "up_proj")),
    "embeddings": Case(targets=("q_proj", "embed_tokens", "lm_head")),
    "embeddings, padded": Case(targets=("k_proj", "embed_tokens"), vocabulary=63),
    "bias": Case(lora_bias=True),
    "bfloat16": Case(dtype=torch.bfloat16, xser=True),
    "another adapter": Case(adapter="my-second.one"),
    "rsLoRA and dropout": Case(config={"use_rslora": True, "lora_dropout": 0.25}),
}


def read(adapter):
    """The canonical tensors of every layer."""
    return {path: lora_fn.unshard(adapter.locals(path), spec) for path, spec in adapter.specs.items()}


def same_trees(found, expected):
    """Bit for bit, dtypes and names included."""
    return found.keys() == expected.keys() and all(
        found[path].keys() == expected[path].keys()
        and all(t.dtype == expected[path][n].dtype and same_bits(t, expected[path][n]) for n, t in found[path].items())
        for path in expected
    )


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_optimum_is_read_bit_for_bit(case, tmp_path):
    root, specs, canonical = files.write_optimum(tmp_path, case)
    config = {"use_rslora": False, "lora_dropout": 0.0} | case.config
    changed = {"use_rslora": config["use_rslora"], "dropout": config["lora_dropout"]}
    expected = {path: replace(spec, **changed) for path, spec in specs.items()}
    for directory in (tmp_path, root, root / "adapter_shards"):
        assert foreign.kind_of(directory) == "optimum"
        adapter = foreign.open_any(directory, allow_pickle=True)
        assert dict(adapter.specs) == expected
        assert same_trees(read(adapter), canonical)
    assert (adapter.spec.rank, adapter.spec.alpha) == (files.RANK, files.ALPHA)
    for path, spec in adapter.specs.items():  # what a process held, too
        for index, local in enumerate(adapter.locals(path)):
            assert same_trees({path: local}, {path: lora_fn.shard(canonical[path], spec, index)})


NXD_CASES = {
    "separate": (Case(), {}),
    "separate, merged": (Case(xser=True), {"merged": True}),
    "grouped": (Case(tp=4, xser=True), {}),
    "grouped, fused": (Case(tp=4, fuse_qkv=True), {"config_inside": True}),
    "grouped, config inside, xser": (Case(tp=4, xser=True), {"config_inside": True}),
    "fused, as many key-value heads": (Case(kv_heads=8, fuse_qkv=True), {}),
    "fused, merged": (Case(kv_heads=8, fuse_qkv=True), {"merged": True}),
    "pipeline": (Case(tp=4, pp=2), {}),
    "only output": (Case(tp=4, targets=("o_proj",)), {}),
    "only output, merged": (Case(tp=4, targets=("o_proj", "down_proj")), {"merged": True}),
    "lm_head, merged": (Case(targets=("q_proj", "lm_head")), {"merged": True, "config_inside": True}),
    "one process": (Case(tp=1), {"merged": True}),
}


@pytest.mark.parametrize(("case", "options"), NXD_CASES.values(), ids=NXD_CASES)
def test_nxd_is_read_bit_for_bit(case, options, tmp_path):
    root, specs, canonical = files.write_nxd(tmp_path, case, **options)
    for directory in (tmp_path, root):
        assert foreign.kind_of(directory) == "nxd"
        adapter = foreign.open_any(directory, allow_pickle=True, model=tmp_path / "model-config")
        assert adapter.specs.keys() == specs.keys()
        for path, spec in adapter.specs.items():
            least = specs[path].heads and replace(specs[path].heads, multiplier=None)
            assert spec == specs[path] or spec == replace(specs[path], heads=least)
        assert same_trees(read(adapter), canonical)


def test_stock_peft_takes_the_names(tmp_path):
    import peft
    import transformers

    _, specs, canonical = files.write_optimum(tmp_path, Case(tp=4))
    adapter = optimum_files.open_optimum(tmp_path, allow_pickle=True)
    state = peft_format.to_state_dict(read(adapter), adapter.specs)
    config = transformers.LlamaConfig(
        **files.MODEL, num_attention_heads=8, num_key_value_heads=2, num_hidden_layers=2, pad_token_id=0
    )
    model = peft.get_peft_model(
        transformers.LlamaForCausalLM(config),
        peft.LoraConfig(r=files.RANK, lora_alpha=files.ALPHA, target_modules=list(ALL), task_type="CAUSAL_LM"),
    )
    result = peft.set_peft_model_state_dict(model, state)
    assert not result.unexpected_keys
    assert not [name for name in result.missing_keys if "lora_" in name]
    attention = model.base_model.model.model.layers[1].self_attn
    path = "model.layers.1.self_attn.qkv_proj"
    assert torch.equal(attention.k_proj.lora_A["default"].weight, canonical[path]["lora_A"])
    assert torch.equal(attention.q_proj.lora_B["default"].weight, canonical[path]["lora_B.q"])
    assert specs[path].share_A


def test_nothing_is_unpickled_unless_it_is_allowed(tmp_path, monkeypatch):
    root, *_ = files.write_optimum(tmp_path, Case())
    monkeypatch.setattr(torch, "load", lambda *args, **options: pytest.fail("something was unpickled"))
    for directory, open_it in ((root, optimum_files.open_optimum), (root / "adapter_shards", nxd_files.open_nxd)):
        with pytest.raises(FileError, match=r"dp_rank_00_tp_rank_00_pp_rank_00\.pt: is a pickle.*--allow-pickle"):
            open_it(directory, allow_pickle=False)


class Evil:
    """A pickle that would call something."""

    def __reduce__(self):
        return (os.mkdir, (str(HERE / "was-run"),))


def edit(file, change):
    """Change a pickle of tensors in place."""
    content = torch.load(file, weights_only=True)
    change(content)
    torch.save(content, file)


def edit_json(file, change):
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


QKV = "base_model.model.model.layers.0.self_attn.qkv_proj"
DOWN = "base_model.model.model.layers.1.mlp.down_proj"
FIRST, LAST = "tp_rank_00_pp_rank_00.pt", "tp_rank_03_pp_rank_00.pt"


def metadata(shards):
    return shards / "mp_metadata_pp_rank_0.json"


def truncate(file, *, part=0.6):
    data = file.read_bytes()
    file.write_bytes(data[: int(len(data) * part)])


def bloat(file):
    """A tensor that says it is larger than its file."""
    content = torch.load(file, weights_only=True)
    content[f"{DOWN}.lora_B.weight"] = torch.zeros(1).expand(10**6, 10**6)
    torch.save(content, file)


def legacy_evil(file):
    file.write_bytes(pickle.dumps(Evil()))


# What is done to a plain checkpoint of 4 processes -> what the sentence says. `s` is its adapter_shards.
PLAIN_DAMAGE = {
    "no done": (lambda s: (s / "done").unlink(), "has no file 'done', so its save was not finished"),
    "no model": (lambda s: shutil.rmtree(s / "model"), "has no directory 'model'"),
    "empty model": (lambda s: [f.unlink() for f in (s / "model").iterdir()], "is empty; use a whole checkpoint"),
    "a process missing": (lambda s: rank_file(s, 2, 0).unlink(), "tp_rank_02_pp_rank_00.pt: is missing"),
    "the last process missing": (lambda s: rank_file(s, 3, 0).unlink(), "lies over 4 processes, found 3"),
    "far too many": (
        lambda s: rank_file(s, 3, 0).rename(rank_file(s, 99999, 0)),
        r"has 4 files of 1 x 100000 processes",
    ),
    "an extra file": (lambda s: (s / "model" / "notes.txt").write_text("x"), "notes.txt: does not belong"),
    "an extra info": (
        lambda s: (s / "model" / "dp_rank_00_tp_rank_09_pp_rank_00.pt.info.pt").write_text("x"),
        "does not belong",
    ),
    "a process twice": (
        lambda s: shutil.copy(rank_file(s, 1, 0), s / "model" / "dp_rank_00_tp_rank_1_pp_rank_00.pt"),
        "dp_rank_00_tp_rank_1_pp_rank_00.pt: does not belong",
    ),
    "of data parallel": (
        lambda s: (s / "model" / "dp_rank_01_tp_rank_00_pp_rank_00.pt").write_text("x"),
        "dp_rank_01.*does not belong",
    ),
    "of experts": (
        lambda s: (s / "model" / "dp_rank_00_ep_rank_00_tp_rank_00_pp_rank_00.pt").write_text("x"),
        "expert parallel training, which is not supported",
    ),
    "truncated": (lambda s: truncate(rank_file(s, 1, 0)), "tp_rank_01_pp_rank_00.pt: is not a whole file of tensors"),
    "an empty file": (lambda s: rank_file(s, 1, 0).write_bytes(b""), "is not a whole file of tensors"),
    "not a pickle": (lambda s: rank_file(s, 1, 0).write_text("hello"), "is not a whole file of tensors"),
    "code": (lambda s: torch.save({"a": Evil()}, rank_file(s, 1, 0)), r"wants (posix|nt)\.mkdir, expected tensors"),
    "code, in an old pickle": (lambda s: legacy_evil(rank_file(s, 1, 0)), "is not a whole file of tensors"),
    "a list": (lambda s: torch.save([1], rank_file(s, 0, 0)), "holds a list, expected tensors by name"),
    "numbers for names": (lambda s: torch.save({1: torch.ones(1)}, rank_file(s, 0, 0)), "expected tensors by name"),
    "something else": (lambda s: edit(rank_file(s, 0, 0), lambda c: c.update(x=1)), "'x' is no tensor"),
    "integers": (
        lambda s: [
            edit(rank_file(s, i, 0), lambda c: c.update({f"{DOWN}.lora_B.weight": torch.ones(32, 3).long()}))
            for i in range(4)
        ],
        "is a torch.int64 torch.strided, expected a tensor of floating point numbers",
    ),
    "larger than its file": (lambda s: bloat(rank_file(s, 0, 0)), "but its numbers are not in the file"),
    "another shape": (
        lambda s: edit(rank_file(s, 2, 0), lambda c: c.update({f"{DOWN}.lora_A.weight": torch.ones(3, 5)})),
        r"tp_rank_02.*lora_A.weight' is \[3, 5\] of float32, in dp_rank_00_tp_rank_00.* \[3, 12\] of float32",
    ),
    "another dtype": (
        lambda s: edit(rank_file(s, 2, 0), lambda c: c.update({f"{DOWN}.lora_A.weight": torch.ones(3, 12).half()})),
        r"is \[3, 12\] of float16, in",
    ),
    "a tensor missing on one": (
        lambda s: edit(rank_file(s, 2, 0), lambda c: c.pop(f"{DOWN}.lora_A.weight")),
        "lora_A.weight' is only in one of it and",
    ),
    "a tensor missing on all": (
        lambda s: [edit(rank_file(s, i, 0), lambda c: c.pop(f"{DOWN}.lora_A.weight")) for i in range(4)],
        "down_proj.lora_A.weight' is missing",
    ),
    "a tensor too many": (
        lambda s: [
            edit(rank_file(s, i, 0), lambda c: c.update({f"{DOWN}.lora_magnitude_vector": torch.ones(8)}))
            for i in range(4)
        ],
        "lora_magnitude_vector' is in no metadata",
    ),
    "DoRA": (lambda s: edit_json(s.parent / "adapter_config.json", lambda c: c.update(use_dora=True)), "use_dora"),
    "modules to save": (
        lambda s: edit_json(s.parent / "adapter_config.json", lambda c: c.update(modules_to_save=["norm"])),
        "modules_to_save",
    ),
    "another rank": (
        lambda s: edit_json(s.parent / "adapter_config.json", lambda c: c.update(r=4)),
        r"gives model.layers.0.self_attn.q_proj rank 4 and alpha 5, but .*qkv_proj was trained with rank 3",
    ),
    "a pattern that Optimum Neuron ignored": (
        lambda s: edit_json(s.parent / "adapter_config.json", lambda c: c.update(alpha_pattern={"up_proj": 7})),
        r"up_proj rank 3 and alpha 7, but .*gate_up_proj was trained with rank 3 and alpha 5 \(patterns of a fused",
    ),
    "no config": (lambda s: (s.parent / "adapter_config.json").unlink(), "adapter_config.json: no such file"),
    "no metadata": (lambda s: metadata(s).unlink(), "mp_metadata_pp_rank_0.json: no such file"),
    "metadata too many": (
        lambda s: (s / "mp_metadata_pp_rank_1.json").write_text("{}"),
        "describes a pipeline stage that has no files",
    ),
    "empty metadata": (
        lambda s: metadata(s).write_text("{}"),
        "cannot be followed .'parameters' is None, expected dict",
    ),
    "metadata of another kind": (
        lambda s: edit_json(
            metadata(s), lambda c: c["model_weight_transformation_specs"][0].update(specs=[["New", {}]])
        ),
        "cannot be followed",
    ),
    "metadata of another size": (
        lambda s: edit_json(
            metadata(s), lambda c: c["model_weight_transformation_specs"][0]["specs"][0][1].update(tp_size=2)
        ),
        "lies over 2 processes, found 4",
    ),
    "metadata with other heads": (
        lambda s: edit_json(
            metadata(s),
            lambda c: c["model_weight_transformation_specs"][0]["specs"][0][1].update(q_output_size_per_partition=4),
        ),
        r"qkv_proj.lora_B.weight_q has shape \[8, 3\], expected \[4, 3\]",
    ),
    "a stride": (
        lambda s: edit_json(
            metadata(s), lambda c: c["parameters"][f"{DOWN}.lora_A.default.weight"].update(partition_stride=2)
        ),
        "expected dimension 0 or 1 and stride 1",
    ),
    "a strange cut": (
        lambda s: edit_json(
            metadata(s), lambda c: c["parameters"][f"{DOWN}.lora_A.default.weight"].update(partition_dim=0)
        ),
        "is cut along .*expected the factors of a column or a row layer",
    ),
    "another name": (lambda s: s.parent.rename(s.parent.with_name("my-adapter")), "has no adapter_shards"),
}


@pytest.mark.parametrize(("damage", "message"), PLAIN_DAMAGE.values(), ids=PLAIN_DAMAGE)
def test_damage_to_a_plain_checkpoint_is_a_sentence(damage, message, tmp_path):
    root, *_ = files.write_optimum(tmp_path, Case(tp=4))
    damage(root / "adapter_shards")
    with pytest.raises(LoraFnError, match=message):
        read(optimum_files.open_optimum(tmp_path, allow_pickle=True))
    assert not (HERE / "was-run").exists()


def tensors_of(shards, tp):
    return rank_file(shards, tp, 0).with_name(rank_file(shards, tp, 0).name + ".tensors")


def info_of(shards, tp):
    return rank_file(shards, tp, 0).with_name(rank_file(shards, tp, 0).name + ".info.pt")


XSER_DAMAGE = {
    "a tensor's file missing": (lambda s: (tensors_of(s, 1) / "tensor_3.pt").unlink(), "tensor_3.pt: is missing"),
    "no directory": (lambda s: shutil.rmtree(tensors_of(s, 1)), "tensor_0.pt: is missing"),
    "a tensor too many": (
        lambda s: torch.save(torch.ones(1), tensors_of(s, 1) / "tensor_99.pt"),
        "tensor_99.pt: is no tensor of dp_rank_00_tp_rank_01_pp_rank_00.pt",
    ),
    "tensors swapped": (
        lambda s: (tensors_of(s, 1) / "tensor_0.pt").write_bytes((tensors_of(s, 1) / "tensor_1.pt").read_bytes()),
        r"tensor_0.pt: .* is \[16, 3\] of float32, .*info.pt says \[3, 32\] of float32",
    ),
    "a tensor truncated": (
        lambda s: truncate(tensors_of(s, 0) / "tensor_2.pt"),
        "tensor_2.pt: is not a whole file of tensors",
    ),
    "code for a tensor": (
        lambda s: torch.save(Evil(), tensors_of(s, 1) / "tensor_2.pt"),
        r"tensor_2.pt: wants (posix|nt)\.mkdir",
    ),
    "a list for a tensor": (
        lambda s: torch.save([1.0], tensors_of(s, 0) / "tensor_2.pt"),
        "is a list, expected a tensor of floating point numbers",
    ),
    "info of endless shapes": (
        lambda s: torch.save({key: {"shape": [10**18], "dtype": torch.float32} for key in range(99)}, info_of(s, 1)),
        r"is \[1000000000000000000\] of float32, in",
    ),
    "info of nothing": (lambda s: torch.save({}, info_of(s, 1)), "does not tell shape and dtype of tensor 0"),
    "info that is a list": (lambda s: torch.save([1], info_of(s, 1)), "holds a list, expected a dict"),
    "info truncated": (lambda s: truncate(info_of(s, 1)), "info.pt: is not a whole file of tensors"),
}


@pytest.mark.parametrize(("damage", "message"), XSER_DAMAGE.values(), ids=XSER_DAMAGE)
def test_damage_to_an_xser_checkpoint_is_a_sentence(damage, message, tmp_path):
    root, *_ = files.write_optimum(tmp_path, Case(xser=True))
    damage(root / "adapter_shards")
    with pytest.raises(FileError, match=message):
        read(optimum_files.open_optimum(tmp_path, allow_pickle=True))
    assert not (HERE / "was-run").exists()


@pytest.mark.parametrize("number", ["-1", "True", "'../../secret'", "None"])
def test_a_reference_cannot_point_elsewhere(number, tmp_path):
    root, *_ = files.write_optimum(tmp_path, Case(xser=True))
    file = rank_file(root / "adapter_shards", 0, 0)
    shutil.rmtree(tensors_of(root / "adapter_shards", 0))
    module = type(sys)("torch_xla.utils.serialization")
    exec("class TensorReference: pass", module.__dict__)
    reference = module.TensorReference()
    reference.tid = eval(number)
    with pytest.MonkeyPatch.context() as patched:
        for name in ("torch_xla", "torch_xla.utils", module.__name__):
            patched.setitem(sys.modules, name, module)
        torch.save({f"{DOWN}.lora_A.weight": reference}, file)
    with pytest.raises(FileError, match=r"refers to tensor .*, expected a number"):
        optimum_files.open_optimum(tmp_path, allow_pickle=True)


def test_files_without_info_are_read(tmp_path):
    root, _, canonical = files.write_optimum(tmp_path, Case(xser=True))
    for tp in range(2):
        info_of(root / "adapter_shards", tp).unlink()
    assert same_trees(read(optimum_files.open_optimum(root, allow_pickle=True)), canonical)


def test_a_stage_is_believed_of_its_own_layers_only(tmp_path):
    root, *_ = files.write_optimum(tmp_path, Case(pp=2))
    shutil.copy(
        root / "adapter_shards" / "mp_metadata_pp_rank_0.json", root / "adapter_shards" / "mp_metadata_pp_rank_1.json"
    )
    with pytest.raises(FileError, match=r"is in pipeline stages 0 and 1.*\n"):
        optimum_files.open_optimum(root, allow_pickle=True)


def test_metadata_may_tell_of_other_adapters(tmp_path):
    root, _, canonical = files.write_optimum(tmp_path, Case(tp=4))

    def another(content):
        whole = {"tensor_model_parallel": False}
        content["parameters"] |= {n.replace(".default", ".default2"): whole for n in content["parameters"]}

    edit_json(metadata(root / "adapter_shards"), another)
    assert same_trees(read(optimum_files.open_optimum(root, allow_pickle=True)), canonical)


DRIFTS = {
    "replicated": (Case(xser=False), f"{DOWN}.lora_B.weight", "model.layers.1.mlp.down_proj", "lora_B"),
    "shared": (Case(tp=4), f"{QKV}.lora_A.weight", "model.layers.0.self_attn.qkv_proj", "lora_A"),
    "key heads": (Case(tp=4), f"{QKV}.lora_B.weight_k", "model.layers.0.self_attn.qkv_proj", "lora_B.k"),
    "in a fused tensor": (
        Case(tp=4, fuse_qkv=True),
        f"{QKV}.lora_B.weight_qkv",
        "model.layers.0.self_attn.qkv_proj",
        "lora_B.v",
    ),
}


@pytest.mark.parametrize(("case", "name", "path", "parameter"), DRIFTS.values(), ids=DRIFTS)
def test_copies_that_drifted_apart_are_refused_or_the_first_is_taken(case, name, path, parameter, tmp_path):
    root, specs, canonical = files.write_optimum(tmp_path, case)
    largest = float(canonical[path][parameter].abs().max())

    def drift(content):
        content[name][-1, -1] += largest / 4

    edit(rank_file(root / "adapter_shards", case.tp - 1, 0), drift)
    adapter = optimum_files.open_optimum(root, allow_pickle=True)
    message = rf"the copies of {re.escape(path)}\.{parameter} differ between processes, by 0\.25 of its largest element"
    with pytest.raises(FileError, match=message):
        adapter.locals(path)
    others = [other for other in specs if other != path]
    assert same_trees(
        {other: lora_fn.unshard(adapter.locals(other), specs[other]) for other in others},
        {other: canonical[other] for other in others},
    )
    assert same_trees(read(optimum_files.open_optimum(root, allow_pickle=True, allow_drift=True)), canonical)


def nothing(root):
    return None


NXD_DAMAGE = {
    "no sizes": (Case(), {}, nothing, None, r"does not say how large the layers are; give the base model's directory"),
    "no config": (
        Case(),
        {},
        lambda r: (r.parent / "adapter_config.json").unlink(),
        "model-config",
        "says nothing of rank, alpha",
    ),
    "no alpha": (
        Case(),
        {},
        lambda r: edit_json(r.parent / "adapter_config.json", lambda c: c.pop("lora_alpha")),
        "model-config",
        "gives rank 3 and alpha None, expected numbers",
    ),
    "no heads": (
        Case(),
        {},
        lambda r: edit_json(r.parent / "model-config" / "config.json", lambda c: c.pop("num_attention_heads")),
        "model-config",
        "says {'num_attention_heads': None",
    ),
    "heads lost in merging": (
        Case(tp=4),
        {"merged": True},
        nothing,
        "model-config",
        "where neuronx-distributed merges copied key-value heads",
    ),
    "another model": (
        Case(),
        {},
        lambda r: edit_json(r.parent / "model-config" / "config.json", lambda c: c.update(intermediate_size=64)),
        "model-config",
        "gate_up_proj has 48 rows of lora_B, the base model 128, cut into 2",
    ),
    "another layer": (
        Case(tp=1),
        {},
        lambda r: edit(rank_file(r, 0, 0), lambda c: c.update({"wte.lora_A.weight": torch.ones(3, 2)})),
        "model-config",
        "wte is none of",
    ),
    "no LoRA": (
        Case(tp=1),
        {},
        lambda r: edit(rank_file(r, 0, 0), lambda c: c.update({"lm_head.weight": torch.ones(3, 2)})),
        "model-config",
        "'lm_head.weight' belongs to no adapted layer",
    ),
    "in two stages": (
        Case(pp=2),
        {},
        lambda r: shutil.copy(rank_file(r, 0, 0), rank_file(r, 0, 1)),
        "model-config",
        "is only in one of",
    ),
    "two tags": (
        Case(),
        {},
        lambda r: shutil.copytree(r, r.with_name("step_2")),
        "model-config",
        "holds the checkpoints step_1, step_2",
    ),
    "bias": (
        Case(),
        {},
        lambda r: edit_json(r.parent / "adapter_config.json", lambda c: c.update(bias="all")),
        "model-config",
        "asks for bias, of which these files do not hold all parameters",
    ),
    "configs that differ": (
        Case(),
        {"config_inside": True},
        lambda r: edit(rank_file(r, 1, 0), lambda c: c["lora_config"].update(lora_alpha=9)),
        "model-config",
        "the files hold configs that differ",
    ),
    "a config that holds more": (
        Case(tp=1),
        {"config_inside": True},
        lambda r: edit(rank_file(r, 0, 0), lambda c: c["lora_config"].update(lora_dropout=[[1]])),
        "model-config",
        "its lora_config has a list, expected text and numbers",
    ),
    "a config that is none": (
        Case(tp=1),
        {"config_inside": True},
        lambda r: edit(rank_file(r, 0, 0), lambda c: c.update(lora_config=3)),
        "model-config",
        r"holds \['lora_config'\] beside tensors, expected nothing or a lora_config",
    ),
}


@pytest.mark.parametrize(("case", "options", "damage", "model", "message"), NXD_DAMAGE.values(), ids=NXD_DAMAGE)
def test_what_nxd_does_not_say_or_says_wrongly_is_a_sentence(case, options, damage, model, message, tmp_path):
    root, *_ = files.write_nxd(tmp_path, case, **options)
    damage(root)
    with pytest.raises(LoraFnError, match=re.escape(message) if "{" in message else message):
        nxd_files.open_nxd(tmp_path, allow_pickle=True, model=model and tmp_path / model)


def test_what_is_no_checkpoint_is_a_sentence(tmp_path):
    assert foreign.kind_of(tmp_path) is None
    for open_it in (foreign.open_any, optimum_files.open_optimum, nxd_files.open_nxd):
        with pytest.raises(FileError, match=r"give the directory|has no directory 'model'"):
            open_it(tmp_path, allow_pickle=True)
        with pytest.raises(FileError, match=r"no such directory|give the directory"):
            open_it(tmp_path / "nowhere", allow_pickle=True)
    for name in ("a", "b"):
        files.write_optimum(tmp_path, Case(adapter=name))
    with pytest.raises(FileError, match=r"holds 2 adapters \(adapter_a, adapter_b\)"):
        optimum_files.open_optimum(tmp_path, allow_pickle=True)


@pytest.mark.parametrize("xser", [False, True], ids=["plain", "xser"])
def test_flipped_bytes_are_found(xser, tmp_path):
    root, _, canonical = files.write_optimum(tmp_path, Case(targets=("q_proj", "down_proj"), xser=xser))
    every = sorted(root.rglob("*.pt"))
    generator = torch.Generator().manual_seed(0)
    refused = 0
    for _ in range(150):
        file = every[int(torch.randint(len(every), (1,), generator=generator))]
        whole = file.read_bytes()
        data = bytearray(whole)
        data[int(torch.randint(len(data), (1,), generator=generator))] ^= 1 << int(
            torch.randint(8, (1,), generator=generator)
        )
        file.write_bytes(data)
        try:  # what is not refused was in the archive's padding, or in what nobody reads
            assert same_trees(read(optimum_files.open_optimum(root, allow_pickle=True)), canonical)
        except LoraFnError:
            refused += 1
        file.write_bytes(whole)
    assert refused >= 40


def test_a_compressed_archive_is_refused(tmp_path):
    root, *_ = files.write_optimum(tmp_path, Case())
    file = rank_file(root / "adapter_shards", 0, 0)
    with zipfile.ZipFile(file) as archive:
        entries = [(entry.filename, archive.read(entry)) for entry in archive.infolist()]
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in entries:
            archive.writestr(name, data)
    with pytest.raises(FileError, match="it is compressed, which torch does not do"):
        optimum_files.open_optimum(root, allow_pickle=True)


# The second layer's modules in the metadata, which are like the first's.
SECOND = [("model_weight_transformation_specs", number) for number in (2, 3)]


def leaves(value, place=()):
    """The places of everything in a JSON value."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, each in inside:
        yield (*place, key)
        yield from leaves(each, (*place, key))


@pytest.mark.parametrize("case", [Case(kv_heads=1), Case(kv_heads=8, fuse_qkv=True)], ids=["grouped", "fused"])
def test_metadata_of_any_content_is_followed_exactly_or_refused(case, tmp_path):
    root, _, canonical = files.write_optimum(tmp_path, case)
    file = metadata(root / "adapter_shards")
    whole = json.loads(file.read_text())
    places = [place for place in leaves(whole) if "layers.1" not in str(place) and place[:2] not in SECOND]
    refused = 0
    for place in places:
        changed = json.loads(json.dumps(whole))
        for value in (None, 0, -1, 2.0, True, 10**30, "x", [], {"a": 1}):
            of = changed
            for key in place[:-1]:
                of = of[key]
            before, of[place[-1]] = of[place[-1]], value
            file.write_text(json.dumps(changed))
            try:
                assert same_trees(read(optimum_files.open_optimum(root, allow_pickle=True)), canonical), (place, value)
            except LoraFnError:
                refused += 1
            of[place[-1]] = before
        file.write_text(json.dumps(whole))
    assert refused > 5 * len(places)


# The programs themselves.

NXD, OPTIMUM = (os.environ.get(name) for name in ("LORA_FN_NXD", "LORA_FN_OPTIMUM"))
PYTHON = os.environ.get("LORA_FN_NEURON_PYTHON", sys.executable)
needs_nxd = pytest.mark.skipif(not NXD, reason="LORA_FN_NXD names no checkout of neuronx-distributed")
needs_optimum = pytest.mark.skipif(
    not (NXD and OPTIMUM), reason="LORA_FN_NXD and LORA_FN_OPTIMUM name no checkouts of them"
)
LAYER = "model.layers.{}"


def run_program(directory, **case):
    """Run foreign_programs.py on as many processes as the case has; returns {(tp, pp): what each held}."""
    (directory / "case.json").write_text(json.dumps(case))
    paths = [str(Path(NXD) / "src"), *([OPTIMUM] if OPTIMUM else [])]
    launch = [PYTHON, "-m", "torch.distributed.run", "--standalone"]
    number = str(case["tp"] * case.get("pp", 1))
    done = subprocess.run(
        [*launch, "--nproc-per-node", number, HERE / "foreign_programs.py", directory / "case.json", directory],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    held = {}
    for file in (directory / "held").iterdir():
        _, tp, _, pp = file.stem.split("-")
        held[int(tp), int(pp)] = torch.load(file, weights_only=True)
    return held


def joined(held, case):
    """What the processes held, joined by hand under PEFT's names (without its prefix)."""
    tp, heads, kv = case["tp"], case["heads"], case["kv_heads"]
    whole = {}
    for stage in sorted({pp for _, pp in held}):
        ranks = [held[rank, stage] for rank in range(tp)]
        for name in ranks[0]:
            parts = [rank[name] for rank in ranks]
            short = name.removeprefix("base_model.model.").replace(".default", "")
            path, _, tail = short.rpartition(".lora_")
            parent, _, last = path.rpartition(".")
            tail = "lora_" + tail
            grouped = kv < tp and case.get("grouped", True)
            if "embedding" in tail:
                whole[short] = parts[0]
            elif last in ("gate_up_proj", "qkv_proj"):
                names = ["gate_proj", "up_proj"] if last == "gate_up_proj" else ["q_proj", "k_proj", "v_proj"]
                if tail == "lora_A.weight":
                    whole |= {f"{parent}.{each}.{tail}": parts[0] for each in names}
                    continue
                if tail in ("lora_B.weight_q", "lora_B.weight_k", "lora_B.weight_v"):
                    names, cut = [f"{tail[-1]}_proj"], [parts]
                elif tail == "lora_B.weight_qkv":
                    sizes = [heads // tp * 4, 4, 4]
                    cut = list(zip(*(p.split(sizes) for p in parts), strict=True))
                else:
                    cut = list(zip(*(p.chunk(len(names)) for p in parts), strict=True))
                for each, of in zip(names, cut, strict=True):
                    if not grouped or last == "gate_up_proj":
                        rows = torch.cat(list(of))
                    elif each == "q_proj":
                        rows = in_order(of, heads, kv, tp)
                    else:
                        rows = torch.cat(list(of[:kv]))  # process r holds head r modulo kv
                    whole[f"{parent}.{each}.lora_B.weight"] = rows
            elif last in ("o_proj", "down_proj"):
                cut = parts[0]
                if tail == "lora_A.weight":
                    turned = [p.T for p in parts]
                    many = last == "o_proj" and grouped
                    cut = (in_order(turned, heads, kv, tp) if many else torch.cat(turned)).T
                whole[short] = cut
            else:
                plain = case["program"] == "nxd" or case.get("model") == "Granite"
                cut_whole = tail == "lora_A.weight" or (last == "lm_head" and plain)
                whole[short] = parts[0] if cut_whole else torch.cat(parts)
    return whole


def in_order(parts, heads, kv, tp):
    """Rows of query heads [heads * 4, r], out of each process's: those of key-value head r modulo kv."""
    group, each = heads // kv, heads // tp
    rows = torch.empty(heads, 4, parts[0].shape[1])
    for rank, part in enumerate(parts):
        start = rank % kv * group + rank // kv * each
        rows[start : start + each] = part.reshape(each, 4, -1)
    return rows.reshape(heads * 4, -1)


def same_state(adapter, expected):
    state = peft_format.to_state_dict(read(adapter), adapter.specs)
    found = {name.removeprefix("base_model.model."): t for name, t in state.items()}
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)


MANY = {"program": "optimum", "heads": 8, "kv_heads": 2, "targets": list(ALL), "xser": False}
INDICES = [(heads, kv, tp) for kv in (1, 2, 4, 8) for tp in (1, 2, 4, 8, 16, 32) for heads in (32, 64) if tp >= kv]
REAL_OPTIMUM = {
    "2 processes": {"tp": 2},
    "2 processes, xser": {"tp": 2, "xser": True},
    "4 processes, grouped": {"tp": 4, "indices": INDICES},
    "4 processes, grouped, xser": {"tp": 4, "xser": True},
    "4 processes, grouped and fused, xser": {"tp": 4, "xser": True, "fuse_qkv": True},
    "2 processes, fused": {"tp": 2, "kv_heads": 8, "fuse_qkv": True},
    "2 x 2 processes": {"tp": 2, "pp": 2, "xser": True},
    "partial, with embeddings": {"tp": 2, "targets": ["q_proj", "v_proj", "embed_tokens", "lm_head"]},
    "partial, grouped": {"tp": 4, "targets": ["o_proj", "down_proj"]},
    "bias": {"tp": 2, "targets": ["q_proj", "o_proj"], "lora": {"lora_bias": True}},
    "Qwen3": {"tp": 4, "model": "Qwen3", "xser": True},
    "Granite, with embeddings": {"tp": 2, "model": "Granite", "targets": [*ALL, "embed_tokens", "lm_head"]},
}
COUNTED = ("2 processes", "4 processes, grouped")
CRASHES = ("partial, with embeddings", "partial, grouped", "bias")  # where its own consolidation raises


def counted(case):
    """{module of a decoder layer: elements of the factors that a process has}, as the cost model has it of theirs."""
    sizes = {"hidden": 32, "intermediate": 48, "layers": 2, "vocabulary": 64, "head_dim": 4}
    shape = estimate.Shape(name="tiny", heads=case["heads"], key_value_heads=case["kv_heads"], **sizes)
    found = estimate.estimate(shape, estimate.Plan(tp=case["tp"], rank=3), MACHINES["trn1"])
    return {layer.name: layer.update.held for layer in found.peer_layers if layer.scheme}


@needs_optimum
@pytest.mark.parametrize("name", REAL_OPTIMUM)
def test_what_optimum_neuron_writes_is_read(name, tmp_path):
    from safetensors.torch import load_file

    case = MANY | REAL_OPTIMUM[name]
    held = run_program(tmp_path, **case)
    adapter = foreign.open_any(tmp_path, allow_pickle=True)
    assert (adapter.spec.rank, adapter.spec.alpha, adapter.spec.base_model_name_or_path) == (3, 5, "tiny")
    expected = joined(held, case)
    assert same_state(adapter, expected)
    consolidated = tmp_path / "consolidated" / "adapter_model.safetensors"
    assert consolidated.exists() != (name in CRASHES)
    if consolidated.exists():
        theirs = {n.removeprefix("base_model.model."): t for n, t in load_file(consolidated).items()}
        assert same_state(adapter, {n: t for n, t in theirs.items() if ".base_layer." not in n})  # frozen weights
    if name in COUNTED:
        elements = Counter()
        for full, p in held[0, 0].items():
            path = full.partition(".lora_")[0]
            elements[path.rpartition(".")[2]] += p.numel() * (".layers.0." in path)
        assert elements == counted(case)
    for told, ranks in json.loads((tmp_path / "indices.json").read_text()).items():
        heads, kv, tp, copies = map(int, told.split())
        ours = layout.query_heads(heads, kv, tp, multiplier=copies)
        assert [ours.places(rank).tolist() for rank in range(tp)] == ranks


@needs_optimum
def test_what_optimum_neuron_lets_drift_is_refused(tmp_path):
    from safetensors.torch import load_file

    run_program(tmp_path, **MANY | {"tp": 2, "drift": True})
    adapter = optimum_files.open_optimum(tmp_path, allow_pickle=True)
    with pytest.raises(FileError, match="differ between processes"):
        read(adapter)
    theirs = load_file(tmp_path / "consolidated" / "adapter_model.safetensors")
    adapter = optimum_files.open_optimum(tmp_path, allow_pickle=True, allow_drift=True)
    assert same_state(adapter, {n.removeprefix("base_model.model."): t for n, t in theirs.items()})


NXD_TARGETS = ["qkv_proj", "q_proj", "k_proj", "v_proj", "o_proj", "gate_up_proj", "down_proj", "lm_head"]
REAL_NXD = {
    "2 processes": {"tp": 2, "merged": False},
    "2 processes, merged": {"tp": 2, "merged": True, "config_inside": True},
    "4 processes, grouped": {"tp": 4, "merged": False, "grouped": True},
    "4 processes, grouped, config inside": {"tp": 4, "merged": False, "grouped": True, "config_inside": True},
    "4 processes, grouped and fused": {"tp": 4, "merged": False, "grouped": True, "fuse_qkv": True},
}


@needs_nxd
@pytest.mark.parametrize("xser", [False, True], ids=["plain", "xser"])
@pytest.mark.parametrize("name", REAL_NXD)
def test_what_neuronx_distributed_writes_is_read(name, xser, tmp_path):
    case = {"program": "nxd", "heads": 8, "kv_heads": 2, "targets": NXD_TARGETS, "xser": xser, "grouped": False}
    case |= REAL_NXD[name]
    held = run_program(tmp_path, **case)
    (tmp_path / "config.json").write_text(
        json.dumps(files.MODEL | {"num_attention_heads": 8, "num_key_value_heads": 2})
    )
    adapter = foreign.open_any(tmp_path, allow_pickle=True, model=tmp_path)
    assert (adapter.spec.rank, adapter.spec.alpha) == (3, 5)
    assert same_state(adapter, joined(held, case))


@needs_nxd
def test_what_neuronx_distributed_loses_in_merging_is_refused(tmp_path):
    case = {"program": "nxd", "heads": 8, "kv_heads": 2, "targets": ["qkv_proj"], "xser": True, "grouped": True}
    run_program(tmp_path, **case | {"tp": 4, "merged": True})
    (tmp_path / "config.json").write_text(
        json.dumps(files.MODEL | {"num_attention_heads": 8, "num_key_value_heads": 2})
    )
    with pytest.raises(FileError, match="it loses part of the query"):
        nxd_files.open_nxd(tmp_path, allow_pickle=True, model=tmp_path)
