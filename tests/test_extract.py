"""Is an extracted adapter the difference of two models, and is what it cannot hold refused?"""

import itertools
import json
import math
import os
import shutil
import warnings
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from small_models import ids_of, relative, small_models_fixture  # noqa: F401  (a fixture)
from test_merge import kill_at
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from adapters import cli
from adapters.convert import open_adapter
from adapters.extract import extract
from adapters.merge import merge
from lora_fn import FileError, checkpoint

TOLERANCE = 1e-5
PREFIX = "base_model.model."


def copied(model, place):
    return Path(shutil.copytree(model, place))


def change(directory, name, edit):
    """Edit one tensor of a model."""
    for file in Path(directory).glob("*.safetensors"):
        tensors = load_file(file)
        if name in tensors:
            tensors[name] = edit(tensors[name]).contiguous()
            save_file(tensors, file, metadata={"format": "pt"})
            return
    raise AssertionError(name)


def low_rank(shape, rank, *, seed=0):
    """[rows, columns] with singular values that fall to a tenth."""
    generator = torch.Generator().manual_seed(seed)
    factors = [torch.randn(n, rank, generator=generator, dtype=torch.float64) for n in shape]
    left, right = (torch.linalg.qr(factor).Q for factor in factors)
    return left @ torch.diag(torch.logspace(0, -1, rank, dtype=torch.float64)) @ right.T


Q, DOWN = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"


def tuned_model(model, place, *, rank=3, names=(Q, DOWN)):
    """The model with differences of a known rank."""
    tuned = copied(model, place)
    for i, name in enumerate(names):
        change(tuned, f"{name}.weight", lambda w, i=i: (w.double() + low_rank(w.shape, rank, seed=i)).to(w.dtype))
    return tuned


def logits(directory, adapter=None):
    model = AutoModelForCausalLM.from_pretrained(directory)
    if adapter is not None:
        model = peft.PeftModel.from_pretrained(model, adapter)
    return model.eval()(ids_of()).logits.detach()


@pytest.mark.parametrize("name", ("llama", "qwen3", "granite"))
def test_a_difference_of_the_rank_is_found_and_stock_peft_loads_it(name, small_models, tmp_path):
    base, tuned = Path(small_models[name]), tuned_model(small_models[name], tmp_path / "tuned")
    done = extract(base, tuned, tmp_path / "adapter", rank=3, quiet=True)
    assert set(done.norms) == set(done.errors) == {Q, DOWN} and not done.dropped
    assert max(done.errors.values()) < TOLERANCE and done.error < TOLERANCE
    expected = math.sqrt(float(torch.logspace(0, -1, 3, dtype=torch.float64).square().sum()))
    assert all(abs(norm - expected) < TOLERANCE for norm in done.norms.values())
    assert relative(logits(base, tmp_path / "adapter"), logits(tuned)) < TOLERANCE  # a missing key would be a warning
    assert relative(logits(base), logits(tuned)) > 1e-2
    merge(base, [tmp_path / "adapter"], tmp_path / "merged", quiet=True)
    assert relative(logits(tmp_path / "merged"), logits(tuned)) < TOLERANCE
    config = checkpoint.read_json(tmp_path / "adapter" / checkpoint.CONFIG)
    assert config["r"] == config["lora_alpha"] == 3 and config["base_model_name_or_path"] == str(base)


def test_the_factors_share_the_singular_values(small_models, tmp_path):
    extract(
        Path(small_models["llama"]),
        tuned_model(small_models["llama"], tmp_path / "tuned"),
        tmp_path / "adapter",
        rank=3,
        quiet=True,
    )
    factors = load_file(tmp_path / "adapter" / checkpoint.WEIGHTS)
    a, b = (factors[f"{PREFIX}{Q}.lora_{x}.weight"].double() for x in "AB")
    values = torch.diag(torch.logspace(0, -1, 3, dtype=torch.float64))
    assert torch.allclose(a @ a.T, values, atol=TOLERANCE) and torch.allclose(b.T @ b, values, atol=TOLERANCE)


def test_it_is_the_best_of_its_rank_and_says_what_is_left(small_models, tmp_path):
    """Of a difference of full rank: the error of a truncated SVD, by its dense formula."""
    base, tuned = Path(small_models["llama"]), copied(small_models["llama"], tmp_path / "tuned")
    torch.manual_seed(0)
    change(tuned, f"{DOWN}.weight", lambda w: w + torch.randn(w.shape) @ torch.diag(0.8 ** torch.arange(48.0)))
    before, after = (AutoModelForCausalLM.from_pretrained(d).state_dict()[f"{DOWN}.weight"] for d in (base, tuned))
    values = torch.linalg.svdvals(after.double() - before.double())
    for rank in (1, 4, 40):
        place = tmp_path / f"rank-{rank}"
        done = extract(base, tuned, place, rank=rank, quiet=True)
        best = float(values[rank:].square().sum().sqrt() / values.square().sum().sqrt())
        assert abs(done.errors[DOWN] - best) < 1e-3 * best + 1e-6 and done.error == pytest.approx(done.errors[DOWN])
        factors = load_file(place / checkpoint.WEIGHTS)
        a, b = (factors[f"{PREFIX}{DOWN}.lora_{x}.weight"].double() for x in "AB")
        left = (after.double() - before.double() - b @ a).norm() / values.norm()
        assert abs(float(left) - done.errors[DOWN]) < 1e-9 and a.shape == (rank, 48)


def test_blocks_give_what_the_whole_gives(small_models, tmp_path, monkeypatch):
    base, tuned = Path(small_models["llama"]), tuned_model(small_models["llama"], tmp_path / "tuned")
    whole = extract(base, tuned, tmp_path / "whole", rank=2, quiet=True)
    read = checkpoint.TensorFiles.read_rows
    sizes = []

    def recorded(self, name, start, stop, **more):
        rows = read(self, name, start, stop, **more)
        sizes.append(rows.numel())
        return rows.clone()

    monkeypatch.setattr(checkpoint.TensorFiles, "read_rows", recorded)
    monkeypatch.setattr("adapters.merge.BLOCK", 1)  # 16 rows at a time
    pieces = extract(base, tuned, tmp_path / "pieces", rank=2, quiet=True)
    assert max(sizes) == 16 * 48
    assert all(abs(pieces.errors[path] - whole.errors[path]) < 1e-9 for path in whole.errors)


def test_an_adapter_is_found_again(small_models, tmp_path):
    """Stock PEFT's, from the model that it was merged into."""
    torch.manual_seed(1)
    base = small_models["llama-8-heads"]
    config = peft.LoraConfig(
        r=4, lora_alpha=8, init_lora_weights=False, target_modules=["embed_tokens", "v_proj", "lm_head"]
    )
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.merge_and_unload().save_pretrained(tmp_path / "tuned")
    done = extract(
        Path(base),
        tmp_path / "tuned",
        tmp_path / "adapter",
        rank=4,
        targets=["embed_tokens", "v_proj", "lm_head"],
        quiet=True,
    )
    assert len(done.errors) == 4 and done.error < TOLERANCE
    assert relative(logits(base, tmp_path / "adapter"), logits(tmp_path / "tuned")) < TOLERANCE


def test_transposed_weights(tmp_path):
    torch.manual_seed(0)
    sizes = {"n_embd": 32, "n_head": 4, "n_layer": 2, "vocab_size": 99, "n_positions": 64}
    GPT2LMHeadModel(GPT2Config(**sizes, initializer_range=0.15)).save_pretrained(tmp_path / "base")
    names = ("transformer.h.0.attn.c_attn", "transformer.h.1.mlp.c_fc")
    tuned = tuned_model(tmp_path / "base", tmp_path / "tuned", names=names)
    done = extract(tmp_path / "base", tuned, tmp_path / "adapter", rank=3, quiet=True)
    assert set(done.errors) == set(names) and done.error < TOLERANCE
    assert checkpoint.read_json(tmp_path / "adapter" / checkpoint.CONFIG)["fan_in_fan_out"] is True
    assert relative(logits(tmp_path / "base", tmp_path / "adapter"), logits(tuned)) < TOLERANCE


def test_models_of_two_dtypes(small_models, tmp_path):
    """bf16 and its tuned fp32: the difference is of what the numbers say, not of how they are stored."""
    base = Path(small_models["llama-bf16"])
    AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).save_pretrained(tmp_path / "wide")
    tuned = tuned_model(tmp_path / "wide", tmp_path / "tuned")
    done = extract(base, tuned, tmp_path / "adapter", rank=3, quiet=True)
    assert set(done.errors) == {Q, DOWN} and done.error < TOLERANCE


# -------------------------------------------------------------------------------------------- what it cannot hold

NORM, EMBED = "model.norm.weight", "model.embed_tokens.weight"
REFUSALS = {
    "a norm": (
        "llama",
        {NORM: lambda w: w + 1},
        {},
        f"{NORM!r} differs, which no LoRA adapter holds; add it to --drop",
    ),
    "a bias": (
        "llama",
        {f"{Q}.bias": lambda w: w + 1},
        {},
        f"'{Q}.bias' differs, which no LoRA adapter holds; add it to --drop",
    ),
    "an embedding": ("llama", {EMBED: lambda w: w + 1}, {}, f"{EMBED!r} differs and is not adapted"),
    "a tied embedding": (
        "qwen3",
        {EMBED: lambda w: w + 1},
        {"targets": ["embed_tokens"]},
        f"{EMBED!r} differs and is shared by two layers",
    ),
    "no target": ("llama", {f"{DOWN}.weight": lambda w: w + 1}, {"targets": ["q_proj"]}, "differs and is not adapted"),
    "a target that is none": ("llama", {}, {"targets": ["q_porj"]}, "--target-modules 'q_porj' is the end of no name"),
    "a drop that is none": ("llama", {}, {"drop": ["nrom"]}, "--drop 'nrom' is the end of no name"),
    "another shape": ("llama", {NORM: lambda w: w[:-1]}, {}, "'model.norm.weight' has shape [31]"),
    "another dtype": ("llama", {NORM: lambda w: w.to(torch.int32)}, {}, "'model.norm.weight' is I32, expected one of"),
    "not a number": ("llama", {f"{Q}.weight": lambda w: w / 0}, {}, "differs by what is not finite"),
    "no difference": ("llama", {}, {"drop": ["norm"]}, "differs from"),
    "rank 0": ("llama", {}, {"rank": 0}, "cannot have rank 0"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_what_an_adapter_cannot_hold_is_refused(case, small_models, tmp_path):
    name, edits, options, why = REFUSALS[case]
    base, tuned = Path(small_models[name]), copied(small_models[name], tmp_path / "tuned")
    if edits:
        change(tuned, f"{Q}.weight", lambda w: w + low_rank(w.shape, 2).to(w.dtype))
    for tensor, edit in edits.items():
        change(tuned, tensor, edit)
    with pytest.raises(FileError) as raised:
        extract(base, tuned, tmp_path / "adapter", **({"rank": 2, "quiet": True} | options))
    assert why in str(raised.value)
    assert all(line.endswith(".") for line in str(raised.value).splitlines())
    assert {p.name for p in tmp_path.iterdir()} == {"tuned"}


def test_models_of_other_tensors_are_refused(small_models, tmp_path):
    with pytest.raises(FileError, match=r"has no 'lm_head\.weight', which") as raised:
        extract(Path(small_models["llama"]), Path(small_models["qwen3"]), tmp_path / "adapter", rank=2, quiet=True)
    assert "k_norm" in str(raised.value)


def test_what_is_dropped_is_told_of(small_models, tmp_path, capsys):
    tuned = tuned_model(small_models["llama"], tmp_path / "tuned")
    for name in (NORM, EMBED, f"{Q}.bias"):
        change(tuned, name, lambda w: w + 1)
    words = ["extract", "--base", small_models["llama"], "--model", str(tuned), "--output", str(tmp_path / "adapter")]
    assert cli.main([*words, "--rank", "3", "--quiet"]) == cli.BAD_INPUT
    assert len(capsys.readouterr().err.splitlines()) == 3
    assert cli.main([*words, "--rank", "3", "--quiet", "--drop", "norm", "embed_tokens", "q_proj.bias"]) == 0
    told = capsys.readouterr().out
    assert f"Left out: {', '.join(sorted((NORM, EMBED, f'{Q}.bias')))}." in told
    rows = {line.split()[0]: line.split()[1:] for line in told.splitlines() if line.split()[0] in (Q, DOWN, "all")}
    assert len(rows) == 3 and all(float(error) < TOLERANCE for _, error in rows.values())
    assert cli.main([*words, "--rank", "3"]) == cli.BAD_INPUT
    assert "exists; choose another --output" in capsys.readouterr().err


def test_only_what_differs_is_adapted(small_models, tmp_path):
    """PEFT makes a layer wherever target_modules fits: the config names those layers and no others."""
    tuned = tuned_model(small_models["llama"], tmp_path / "tuned")
    extract(Path(small_models["llama"]), tuned, tmp_path / "adapter", rank=2, quiet=True)
    config = json.loads((tmp_path / "adapter" / checkpoint.CONFIG).read_text())
    assert sorted(config["target_modules"]) == sorted((Q, DOWN))


def test_a_kill_leaves_the_inputs_and_no_half_output(small_models, tmp_path):
    """SIGKILL at each step of an extraction: the output is not there, or whole."""
    base = Path(small_models["llama-1-layer"])
    tuned = tuned_model(base, tmp_path / "tuned", names=(Q,))
    before = {p: p.read_bytes() for p in [*base.iterdir(), *tuned.iterdir()]}
    for number in itertools.count():
        pid = os.fork()
        if pid == 0:
            torch.set_num_threads(1)  # the threads of this process stayed in the other
            kill_at(number, "extracted")
            extract(base, tuned, tmp_path / "extracted", rank=3, quiet=True)
            os._exit(0)
        survived = os.waitpid(pid, 0)[1] == 0
        assert {p: p.read_bytes() for p in before} == before
        if (tmp_path / "extracted").exists():
            assert list(open_adapter(tmp_path / "extracted").specs) == [Q]
            shutil.rmtree(tmp_path / "extracted")
        else:
            assert not survived
        if survived:
            break
    assert number > 4
