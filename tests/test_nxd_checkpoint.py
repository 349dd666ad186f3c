"""Do our factors in a checkpoint of neuronx-distributed become PEFT's, or a sentence? In its form, without it.

Its own save_checkpoint is in test_nxd_trainer.
"""

import json
import re
from dataclasses import replace

import foreign_files as files
import pytest
import torch
from foreign_files import Case, rank_file
from torch import nn

import adapters
import lora_fn
from adapters import foreign, nxd_checkpoint
from adapters.cli import main
from lora_fn import FileError, LoraSpec, TargetError, checkpoint, peft_format

SPEC = LoraSpec(rank=files.RANK, alpha=files.ALPHA, target_modules=[*files.ALL, "embed_tokens"])
CASES = {
    "separate": Case(),
    "embeddings": Case(targets=(*files.ALL, "embed_tokens", "lm_head")),
    "xser": Case(xser=True),
    "grouped": Case(tp=4, xser=True),
    "grouped, fused": Case(tp=4, fuse_qkv=True),
    "pipeline": Case(pp=2),
    "bias": Case(lora_bias=True),
    "bfloat16": Case(dtype=torch.bfloat16, xser=True),
    "one process": Case(tp=1),
}


def per_part(spec):
    """A fused layer with factors of its own for each part, which its own LoRA has not."""
    return replace(spec, share_A=False) if spec.parts else spec


def write(root, case, *, change=None, user=None):
    """A tag of our factors, as its save_checkpoint writes dicts; the specs and the canonical tensors."""
    specs = {path: per_part(spec) for path, spec in files.specs_of(case).items()}
    canonical = files.canonical_of(specs, case)
    for tp in range(case.tp):
        locals_ = {path: lora_fn.shard(canonical[path], spec, tp) for path, spec in specs.items()}
        tensors = adapters.flat(locals_) | {"norm.weight": torch.ones(3)}  # whoever saves the whole model
        for pp in range(case.pp):
            mine = {n: t for n, t in tensors.items() if files.stage_of(n.rpartition(".lora_")[0], case.pp) == pp}
            files.write_rank(
                rank_file(root, tp, pp), (change or (lambda tensors, tp, pp: tensors))(mine, tp, pp), xser=case.xser
            )
    config = peft_format.to_config(replace(SPEC, lora_bias=case.lora_bias), ["layers.0.q_proj"], ["layers.0.q_proj"])
    layers = {path: json.loads(spec.to_json()) for path, spec in specs.items()}
    told = {"format": 1, "adapter": config, "layers": layers}
    torch.save({"step": 3, "lora_fn": json.dumps(told)} if user is None else user, root / "user_content.pt")
    for marker in ("checkpoint", "done"):
        (root / marker).write_text("1")
    return specs, canonical


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_factors_are_read_bit_for_bit(case, tmp_path):
    specs, canonical = write(tmp_path / "step_3", case)
    for directory in (tmp_path, tmp_path / "step_3"):
        assert foreign.kind_of(directory) == "nxd"
        adapter = foreign.open_any(directory, allow_pickle=True)
        assert dict(adapter.specs) == specs
        for path, spec in specs.items():
            found = lora_fn.unshard(adapter.locals(path), spec)
            assert found.keys() == canonical[path].keys()
            assert all(t.dtype == case.dtype and torch.equal(t, canonical[path][n]) for n, t in found.items())
            assert set(adapter.dtypes(path).values()) == {case.dtype}


def test_the_command_line_makes_an_adapter_of_it(tmp_path, capsys):
    specs, canonical = write(tmp_path / "step_3", Case())
    assert main(["consolidate", str(tmp_path / "step_3"), str(tmp_path / "out"), "--allow-pickle"]) == 0
    _, stored = checkpoint.open_adapter(tmp_path / "out")
    expected = peft_format.to_state_dict(canonical, specs)
    assert set(stored.shapes) == set(expected)
    assert all(torch.equal(stored.read(name), t) for name, t in expected.items())


def without(name):
    return lambda tensors, tp, pp: {n: t for n, t in tensors.items() if n != name}


def changed(name, value, only=None):
    return lambda tensors, tp, pp: tensors | ({name: value(tensors)} if only in (None, tp) else {})


DOWN = "model.layers.1.mlp.down_proj.lora_A"
UP = "model.layers.1.mlp.gate_up_proj.lora_A.up"
DAMAGE = {
    "missing": ({"change": without(DOWN)}, f"'{DOWN}' is in none of the files; save all"),
    "superfluous": (
        {"change": changed("model.norm.lora_A", lambda tensors: torch.ones(1))},
        "'model.norm.lora_A' is no factor that user_content.pt tells of",
    ),
    "another shape": (
        {"change": changed(DOWN, lambda tensors: torch.ones(3, 5))},
        rf"'{DOWN}' has shape \[3, 5\], expected \[3, 24\]\.",
    ),
    "other names on a process": (
        {"change": changed("x.lora_A", lambda tensors: torch.ones(1), only=1)},
        "'x.lora_A' is only in one of it and dp_rank_00_tp_rank_00",
    ),
    "copies that differ": (
        {"change": changed(UP, lambda tensors: tensors[UP] * 1.5, only=1)},
        f"the copies of {UP} differ between processes, by 0.5",
    ),
    "user content of others": ({"user": {"step": 3}}, r"user_content.pt: does not say what the factors are \(KeyError"),
    "no dict": ({"user": [1]}, "user_content.pt: does not say what the factors are"),
    "no layers": ({"user": {"lora_fn": '{"format": 1, "adapter": {}}'}}, "does not say what the factors are"),
    "no layer": (
        {"user": {"lora_fn": '{"format": 1, "adapter": {}, "layers": {"a": {"kind": "?"}}}'}},
        "does not say what the factors are",
    ),
    "another version": ({"user": {"lora_fn": '{"format": 2}'}}, "has format 2, expected 1; use the version"),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGE.values(), ids=DAMAGE)
def test_damage_is_a_sentence(damage, message, tmp_path):
    write(tmp_path / "step_3", Case(), **damage)
    with pytest.raises(FileError, match=message):
        adapter = foreign.open_any(tmp_path, allow_pickle=True)
        for path in adapter.specs:
            adapter.locals(path)


def test_a_checkpoint_without_user_content_is_a_sentence(tmp_path):
    write(tmp_path, Case())
    (tmp_path / "user_content.pt").unlink()
    with pytest.raises(FileError, match=r"has no user_content\.pt, so nothing says what its factors are; save with"):
        foreign.open_any(tmp_path, allow_pickle=True)


def test_a_layer_is_in_one_stage_and_one_mesh(tmp_path):
    def moved(tensors, tp, pp):
        kept = {n: t for n, t in tensors.items() if n != DOWN}
        return kept | ({DOWN: torch.ones(3, 24)} if pp == 0 else {})

    write(tmp_path / "moved", Case(pp=2), change=moved)
    with pytest.raises(FileError, match=r"model\.layers\.1\.mlp\.down_proj: is in parts in"):
        foreign.open_any(tmp_path / "moved", allow_pickle=True)
    write(tmp_path / "twice", Case(pp=2), change=changed(DOWN, lambda tensors: torch.ones(3, 24)))
    with pytest.raises(FileError, match=f"factor '{DOWN}' is also in"):
        foreign.open_any(tmp_path / "twice", allow_pickle=True)
    write(tmp_path / "mesh", Case(tp=2))
    rank_file(tmp_path / "mesh", 1, 0).unlink()
    with pytest.raises(FileError, match=r"holds 1 processes, and '.*lora_A' lies over 2"):
        foreign.open_any(tmp_path / "mesh", allow_pickle=True)


def test_drift_may_be_allowed(tmp_path):
    write(tmp_path, Case(), change=changed(UP, lambda tensors: tensors[UP] * 1.5, only=1))
    adapter = foreign.open_any(tmp_path, allow_pickle=True, allow_drift=True)
    first, second = adapter.locals("model.layers.1.mlp.gate_up_proj")
    assert torch.equal(first["lora_A.up"], second["lora_A.up"])


def test_user_content_keeps_what_else_there_is():
    model = adapters.wrap(nn.Sequential(nn.Linear(4, 6)), LoraSpec(rank=2, target_modules=["0"]))
    found = nxd_checkpoint.user_content(model, {"step": 3})
    assert found["step"] == 3 and json.loads(found["lora_fn"])["adapter"]["r"] == 2
    with pytest.raises(TargetError, match="the model has no adapter of its own"):
        nxd_checkpoint.user_content(nn.Linear(3, 3))


def test_fill_takes_the_very_factors_or_nothing():
    model = adapters.wrap(nn.Sequential(nn.Linear(4, 6)), LoraSpec(rank=2, target_modules=["0"]))
    factors = {name: torch.randn_like(p) for name, p in adapters.flat(adapters.factors(model)).items()}
    before = {name: p.clone() for name, p in model.named_parameters()}
    wrong = {"0.lora_A": torch.ones(3, 4), "1.lora_B": torch.ones(1)}
    like = "wrap with the spec, on the mesh and in the stage that it was saved from."
    message = (
        f"0.lora_B: is missing; {like}\n1.lora_B: is no factor of this model; {like}\n"
        f"0.lora_A: is [3, 4] of float32, expected [2, 4] of float32; use a checkpoint of the same mesh and spec."
    )
    with pytest.raises(TargetError, match=f"^{re.escape(message)}$"):
        adapters.fill(model, wrong)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    with pytest.raises(TargetError, match=r"0\.lora_A: is \[2, 4\] of bfloat16, expected \[2, 4\] of float32"):
        adapters.fill(model, factors | {"0.lora_A": factors["0.lora_A"].bfloat16()})
    adapters.fill(model, factors)
    assert all(torch.equal(p, (before | factors)[name]) for name, p in model.named_parameters())
