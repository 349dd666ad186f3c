"""What does the command line do with good input, and what does it say of bad input?"""

import json
import os
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import jobs
import peft
import pytest
import torch
from jobs import job_models_fixture, small_models_fixture  # noqa: F401  (fixtures)
from safetensors.torch import load_file, save_file
from small_models import VOCABULARY, ids_of, relative
from transformers import AutoModelForCausalLM, AutoTokenizer

from adapters import cli, launch, runs
from adapters.train import Job
from lora_fn import checkpoint, manifest

TOLERANCE = 1e-5


@pytest.fixture
def place(tmp_path):
    """A directory with data."""
    jobs.write_lines(tmp_path / "data.jsonl", jobs.uneven(12))
    return tmp_path


def finetune(model, place, *options):
    """The words of a small run."""
    words = ["finetune", "--model", model, "--data", place / "data.jsonl", "--output", place / "out", "--quiet"]
    sizes = ["--steps", 2, "--batch-size", 2, "--sequence-length", 40, "--rank", 2]
    return [str(word) for word in (*words, *sizes, *options)]


def refused(words, capsys):
    """The sentences with which bad input is refused."""
    capsys.readouterr()
    assert cli.main(words) == cli.BAD_INPUT
    told = capsys.readouterr().err
    assert told.startswith("lora-fn: ") and "Traceback" not in told
    assert all(line.endswith(".") for line in told.splitlines())  # a sentence for each problem
    return told


def listing(directory):
    """Every file below a directory, and what is in it."""
    return {path: path.read_bytes() for path in sorted(Path(directory).rglob("*")) if path.is_file()}


def copied(model, place):
    import shutil

    return Path(shutil.copytree(model, place / "model"))


# ------------------------------------------------------------------------------------------------------------ models


def without_weights(model):
    for file in [*model.glob("*.safetensors"), *model.glob("*.index.json")]:
        file.unlink()


def first_weights(model):
    return sorted(model.glob("*.safetensors"))[0]


def edit_config(model, **changes):
    file = model / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


MODELS = {
    "no such model": (lambda m: m.rename(m.with_name("gone")), "no such directory"),
    "no config": (lambda m: (m / "config.json").unlink(), "no such file"),
    "no weights": (without_weights, "holds neither model.safetensors nor model.safetensors.index.json"),
    "not a safetensors file": (lambda m: first_weights(m).write_bytes(b"hello" * 99), "not a whole safetensors file"),
    "cut off": (lambda m: os.truncate(first_weights(m), 5000), "not a whole safetensors file"),
    "unknown architecture": (
        lambda m: edit_config(m, architectures=["Nice"]),
        "architecture is 'Nice', expected one of",
    ),
    "architectures of another kind": (
        lambda m: edit_config(m, architectures={"a": 1}),
        "architecture is {'a': 1}, expected one of",
    ),
    "another size": (lambda m: edit_config(m, intermediate_size=96), r"has shape \[48, 32\], expected \[96, 32\]"),
    "no tokenizer": (lambda m: [f.unlink() for f in m.glob("tokenizer*")], "no tokenizer that transformers loads"),
}


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("case", MODELS)
def test_a_bad_model_is_a_sentence(case, tp, job_models, place, capsys):
    damage, sentence = MODELS[case]
    model = copied(job_models["llama"], place)
    damage(model)
    told = refused(finetune(model, place, "--tp", tp), capsys)
    assert re.search(sentence, told) and str(model) in told
    assert not (place / "out").exists()


OPTIONS = {
    "targets": (
        ["--target-modules", "q_prj"],
        "target_modules 'q_prj' matches none of the 16 layers; the nearest names are q_proj",
    ),
    "tp": (["--tp", "3"], "self_attn.q_proj: 8 attention heads cannot be cut into 3; choose a --tp that divides 8"),
    "copies": (["--kv-size-multiplier", "3"], "8 query heads with 3 copies of 4 key-value heads cannot be dealt to 1"),
    "rank": (["--rank", "0"], "LoraSpec.rank: is 0, expected an integer of at least 1"),
    "batch size": (["--accumulation", "3"], "--batch-size: is 2, which dp 1 x accumulation 3 do not divide"),
    "dora": (["--dora", "--lora-bias"], "LoraSpec.lora_bias: cannot be with use_dora"),
    "no data": (["--data", "gone.txt"], "gone.txt: is not there"),
    "no adapter": (["--adapter", "gone"], "gone: no such directory"),
    "nothing to resume": (["--resume"], "holds no run to resume"),
}


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("device", ["cuda", "xla"])
def test_a_device_that_is_not_there_is_a_sentence(device, tp, job_models, place, capsys, monkeypatch):
    monkeypatch.setitem(launch.IS_THERE, device, lambda: False)
    told = refused(finetune(job_models["llama"], place, "--device", device, "--tp", tp), capsys)
    assert f"--device: is '{device}', which torch does not find here; expected one of cpu" in told
    assert not (place / "out").exists()


@pytest.mark.parametrize("case", OPTIONS)
def test_bad_options_are_a_sentence(case, job_models, place, capsys):
    options, sentence = OPTIONS[case]
    assert sentence in refused(finetune(job_models["llama"], place, *options), capsys)
    assert not (place / "out").exists()


DATA = {
    "empty": ("", "data.jsonl"),
    "no JSON": ('{"text": "a b c"}\n{"text"\n', "data.jsonl:2"),
    "another key": ('{"text": "a b c"}\n{"words": "a"}\n', "data.jsonl:2"),
    "two of them": ('{"text": 1}\n{"words": "a"}\n', "data.jsonl:1"),
}


@pytest.mark.parametrize("case", DATA)
def test_bad_data_is_a_sentence_with_its_line(case, job_models, place, capsys):
    content, where = DATA[case]
    (place / "data.jsonl").write_text(content)
    assert where in refused(finetune(job_models["llama"], place), capsys)
    assert not (place / "out").exists()


def test_an_output_that_is_not_ours_is_left_alone(job_models, place, capsys):
    (place / "out").mkdir()
    (place / "out" / "thesis.txt").write_text("years of work")
    before = listing(place)
    assert "was not made by lora-fn finetune" in refused(finetune(job_models["llama"], place), capsys)
    assert listing(place) == before


@pytest.mark.parametrize("output", ["data.jsonl", "data.jsonl/out", "data.jsonl/a/b"])
def test_an_output_that_is_a_file_or_below_one_is_a_sentence(output, job_models, adapters_of_peft, place, capsys):
    before = listing(place)
    model, sentence = job_models["llama"], "is a file; choose a"
    assert sentence in refused(finetune(model, place, "--output", place / output), capsys)
    told = refused(merge(model, adapters_of_peft["llama"], place / output), capsys)
    assert (sentence if "/" in output else "exists; choose another") in told
    assert listing(place) == before


def test_a_run_is_not_overwritten(job_models, place, capsys):
    assert cli.main(finetune(job_models["llama"], place)) == 0
    before = listing(place)
    assert "holds a run already; use --resume" in refused(finetune(job_models["llama"], place), capsys)
    assert listing(place) == before


def started(*words, **options):
    return subprocess.run(
        [sys.executable, "-m", *map(str, words)], capture_output=True, text=True, timeout=120, **options
    )


def test_torchrun_with_another_number_of_processes_is_a_sentence(job_models, place):
    torchrun = ("torch.distributed.run", "--standalone", "--nproc-per-node", 2)
    done = started(*torchrun, "-m", "adapters.cli", *finetune(job_models["llama"], place))
    assert done.returncode != 0
    assert "lora-fn: --tp 1 x --dp 1 take 1 processes, 2 were started" in done.stderr
    assert done.stderr.count("lora-fn: ") == 1 and "adapters/cli.py" not in done.stderr  # a traceback is torchrun's own
    assert not (place / "out").exists()


def test_bad_data_of_several_processes_is_told_once(job_models, place):
    (place / "data.jsonl").write_text('{"words": "a"}\n')
    done = started("adapters.cli", *finetune(job_models["llama"], place, "--tp", 2))
    assert done.returncode == cli.BAD_INPUT
    assert done.stderr.count("lora-fn: ") == 1 and "data.jsonl:1" in done.stderr and "Traceback" not in done.stderr
    assert not (place / "out").exists()


def test_a_worker_ends_without_the_end_of_the_interpreter():
    """Which would abort it now and then, where it has been in a group of gloo's."""
    script = "import atexit, adapters.launch as l; atexit.register(print, 'ended'); print('told', end='|'); l.end(2)"
    worker, alone = (
        subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, env=os.environ | environment, timeout=120
        )
        for environment in ({"TORCHELASTIC_RUN_ID": "test"}, {})
    )
    assert (worker.returncode, worker.stdout) == (2, "told|")
    assert (alone.returncode, alone.stdout) == (2, "told|ended\n")


@pytest.mark.parametrize("threads", [None, "3"])
def test_who_launches_is_what_it_was(threads, monkeypatch):
    from torch.distributed.launcher import api

    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if threads:
        monkeypatch.setenv("OMP_NUM_THREADS", threads)
    before, seen = dict(os.environ), {}
    monkeypatch.setattr(api, "elastic_launch", lambda config, entry: lambda *words: seen.update(os.environ))
    assert launch.launch("adapters.cli", ["finetune"], processes=2) == 0
    assert os.environ == before  # or a job of its own would take it for a worker whose launcher is gone, and end it
    assert seen[launch.OURS] == str(os.getpid())
    assert seen["OMP_NUM_THREADS"] == threads or (threads is None and int(seen["OMP_NUM_THREADS"]) >= 1)


# ------------------------------------------------------------------------------------------------------------ a run


def test_chats_on_four_processes_become_an_adapter_of_peft(job_models, place):
    chat = [{"role": "user", "content": "say abc"}, {"role": "assistant", "content": "abc"}]
    jobs.write_lines(place / "data.jsonl", [{"messages": chat}, {"messages": chat * 2}] * 6)
    model = job_models["llama"]
    cuts = ("--tp", 2, "--dp", 2, "--sequence-parallel", "--activation-checkpointing", "--dropout", 0.1)
    done = started(
        "adapters.cli", *finetune(model, place, *cuts, "--batch-size", 4, "--learning-rate", 0.02, "--steps", 3)
    )
    assert done.returncode == 0, done.stderr
    assert re.search(r"held out, after +\d\.\d{4}", done.stdout)
    assert sorted(p.name for p in (place / "out").iterdir() if not p.name.startswith(".")) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "checkpoints",
        "log.jsonl",
        "loss.png",
        "run.json",
    ]
    assert (place / "out" / runs.PLOT).read_bytes().startswith(b"\x89PNG")
    stock = AutoModelForCausalLM.from_pretrained(model).eval()
    plain = stock(ids_of()).logits
    tuned = peft.PeftModel.from_pretrained(stock, place / "out").eval()
    assert relative(tuned(ids_of()).logits, plain) > 1e-3


# How it starts -> (words, what the file says of it, its rank).
STARTS = {
    "orthogonal": ("orthogonal", "orthogonal", 4),
    "pissa": ("pissa", True, 8),
    "pissa_niter_2": ("pissa_niter_2", True, 8),
    "olora": ("olora", True, 8),
    "loftq": ("loftq --init-options loftq_bits=8 loftq_iter=2", "loftq", 4),
    "mica": ("mica", "mica", 4),
    "eva": ("eva --init-options whiten=true --init-batches 2", "eva", 4),
    "corda": ("corda --init-options corda_method=kpm", True, 8),
    "lora_ga": ("lora_ga --init-options direction=random scale=gd_scale", True, 8),
}


@pytest.mark.parametrize("how", STARTS)
def test_an_adapter_starts_as_asked(how, job_models, place, capsys):
    words, told, rank = STARTS[how]
    jobs.write_lines(place / "data.jsonl", [{"text": "the quick brown fox jumps over the lazy dog. " * 4}] * 8)
    words = f"--rank 4 --target-modules q_proj down_proj --checkpoint-every 0 --init-lora-weights {words}"
    assert cli.main(finetune(job_models["llama-1-layer"], place, *words.split(), "--steps", 2)) == 0
    config = json.loads((place / "out" / "adapter_config.json").read_text())
    assert (config["init_lora_weights"], config["r"]) == (told, rank)
    lines = [json.loads(line) for line in (place / "out" / "log.jsonl").read_text().splitlines()]
    if how == "loftq":
        return  # stock PEFT needs bitsandbytes and a GPU to make that base again
    stock = AutoModelForCausalLM.from_pretrained(job_models["llama-1-layer"]).eval()
    tuned = peft.PeftModel.from_pretrained(stock, place / "out").eval()
    change = relative(
        tuned(ids_of()).logits, AutoModelForCausalLM.from_pretrained(job_models["llama-1-layer"])(ids_of()).logits
    )
    assert 1e-6 < change < 0.1 and all(0 < line["loss"] < 10 for line in lines)


def test_what_is_adapted_can_be_said(job_models, place, capsys):
    jobs.write_lines(place / "data.jsonl", [{"text": "abc " * 30}] * 8)
    words = "--lora-bias --init-lora-weights false --target-modules q_proj v_proj o_proj"
    words += " --exclude-modules 1.self_attn.o_proj"
    words += " --layers-to-transform 0 1 --rank-pattern q_proj=3 v_proj=2 --alpha-pattern q_proj=12.5 --rank 4"
    assert cli.main(finetune(job_models["llama"], place, *words.split(), "--steps", 1)) == 0
    config = json.loads((place / "out" / "adapter_config.json").read_text())
    assert (config["r"], config["rank_pattern"], config["alpha_pattern"]) == (
        4,
        {"q_proj": 3, "v_proj": 2},
        {"q_proj": 12.5},
    )
    assert (config["lora_bias"], config["init_lora_weights"]) == (True, False)
    stock = AutoModelForCausalLM.from_pretrained(job_models["llama"]).eval()
    tuned = peft.PeftModel.from_pretrained(stock, place / "out")
    found = {name: m.r["default"] for name, m in tuned.named_modules() if isinstance(m, peft.tuners.lora.LoraLayer)}
    ends = {f"{name.split('.')[-3]}.{name.split('.')[-1]}": rank for name, rank in found.items()}
    assert ends == {"0.q_proj": 3, "0.v_proj": 2, "0.o_proj": 4, "1.q_proj": 3, "1.v_proj": 2}


@pytest.mark.parametrize("text", ["q_proj", "q_proj=", "q_proj=much"])
def test_a_pattern_is_a_name_and_a_number(text, job_models, place, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(finetune(job_models["llama"], place, "--rank-pattern", text))
    assert ended.value.code == 2 and "--rank-pattern: " in capsys.readouterr().err


def test_help_names_every_option(capsys):
    told = ""
    for words in (
        ["--help"],
        ["finetune", "--help"],
        ["generate", "--help"],
        ["merge", "--help"],
        ["inspect", "--help"],
    ):
        with pytest.raises(SystemExit) as ended:
            cli.main(words)
        assert ended.value.code == 0
        told += capsys.readouterr().out
    for field in fields(Job):
        assert field.name == "lora" or f"--{field.name.replace('_', '-')}" in told
    assert all(command in told for command in ("finetune", "generate", "merge", "inspect"))


# ------------------------------------------------------------------------------------------------- merge and inspect


@pytest.fixture(scope="module")
def adapters_of_peft(job_models, tmp_path_factory):
    """Name of the model -> directory of an adapter for it, random in both factors."""
    place, made = tmp_path_factory.mktemp("merge"), {}
    for name in ("llama", "llama-bf16", "granite"):
        torch.manual_seed(1)
        targets = ["q_proj", "o_proj", "up_proj", "down_proj", "embed_tokens"]
        config = peft.LoraConfig(r=3, lora_alpha=2, init_lora_weights=False, target_modules=targets)
        tuned = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(job_models[name]), config)
        tuned.save_pretrained(place / name, save_embedding_layers=False)
        made[name] = place / name
    return made


def merge(model, adapter, output):
    return ["merge", "--model", str(model), "--adapter", str(adapter), "--output", str(output), "--quiet"]


@pytest.mark.parametrize("name", ["llama", "granite"])
def test_a_merged_model_is_that_of_stock_peft(name, job_models, adapters_of_peft, tmp_path):
    model, output = Path(job_models[name]), tmp_path / "merged"
    assert cli.main(merge(model, adapters_of_peft[name], output)) == 0
    assert sorted(p.name for p in output.iterdir()) == sorted(p.name for p in model.iterdir())
    assert (output / checkpoint.INDEX).read_bytes() == (model / checkpoint.INDEX).read_bytes()
    for file in model.glob("*.safetensors"):
        assert load_file(file).keys() == load_file(output / file.name).keys()
    stock = AutoModelForCausalLM.from_pretrained(model).eval()
    plain = stock(ids_of()).logits
    tuned = peft.PeftModel.from_pretrained(stock, adapters_of_peft[name]).merge_and_unload().eval()
    merged = AutoModelForCausalLM.from_pretrained(output).eval()
    assert relative(merged(ids_of()).logits, tuned(ids_of()).logits) < TOLERANCE
    assert relative(tuned(ids_of()).logits, plain) > 1e-2
    assert AutoTokenizer.from_pretrained(output)("abc")["input_ids"]


def test_a_bf16_merge_is_rounded_once(job_models, adapters_of_peft, tmp_path):
    model, adapter, output = Path(job_models["llama-bf16"]), adapters_of_peft["llama-bf16"], tmp_path / "merged"
    assert cli.main(merge(model, adapter, output)) == 0
    before, after = load_file(model / checkpoint.MODEL), load_file(output / checkpoint.MODEL)
    factors = load_file(adapter / checkpoint.WEIGHTS)
    changed, differing, total = 0, 0, 0
    for name, weight in before.items():
        key = f"base_model.model.{name.removesuffix('.weight')}.lora_A.weight"
        if key not in factors:
            assert torch.equal(after[name], weight) or "embed_tokens" in name
            continue
        a, b = factors[key].double(), factors[key.replace("lora_A", "lora_B")].double()
        exact = (weight.double() + b @ a * (2 / 3)).to(torch.bfloat16)
        steps = (exact.view(torch.int16).int() - after[name].view(torch.int16).int()).abs()
        assert steps.max() <= 1
        changed, differing, total = changed + 1, differing + int((steps > 0).sum()), total + steps.numel()
    assert changed == 8 and differing <= 1e-3 * total


def poison(adapter):
    file = adapter / checkpoint.WEIGHTS
    tensors = load_file(file)
    next(iter(tensors.values())).fill_(float("inf"))
    save_file(tensors, file)


def test_what_cannot_be_merged_leaves_nothing(job_models, adapters_of_peft, tmp_path, capsys):
    import shutil

    model, adapter = job_models["llama"], adapters_of_peft["llama"]
    (tmp_path / "there").mkdir()
    assert "exists; choose another --output" in refused(merge(model, adapter, tmp_path / "there"), capsys)
    shutil.rmtree(tmp_path / "there")
    bad = Path(shutil.copytree(adapter, tmp_path / "bad"))
    poison(bad)
    before = listing(tmp_path)
    assert "would not be finite" in refused(merge(model, bad, tmp_path / "out"), capsys)
    assert "expects" in refused(merge(job_models["qwen3"], adapter, tmp_path / "out"), capsys)
    assert "no such directory" in refused(merge(model, tmp_path / "gone", tmp_path / "out"), capsys)
    assert "no such directory" in refused(merge(tmp_path / "gone", adapter, tmp_path / "out"), capsys)
    assert listing(tmp_path) == before and not (tmp_path / "out").exists()


def test_tied_embeddings_are_not_merged(job_models, tmp_path, capsys):
    tuned = peft.get_peft_model(
        AutoModelForCausalLM.from_pretrained(model := job_models["granite-tied"]),
        peft.LoraConfig(r=2, init_lora_weights=False, target_modules=["q_proj"]),
    )
    tuned.save_pretrained(tmp_path / "adapter")
    assert cli.main(merge(model, tmp_path / "adapter", tmp_path / "merged")) == 0
    file = tmp_path / "adapter" / checkpoint.WEIGHTS
    path = "base_model.model.model.embed_tokens.lora_embedding_"
    save_file(load_file(file) | {f"{path}A": torch.ones(2, VOCABULARY), f"{path}B": torch.ones(32, 2)}, file)
    told = refused(merge(model, tmp_path / "adapter", tmp_path / "out"), capsys)
    assert "model.embed_tokens shares its weight with another layer" in told
    assert not (tmp_path / "out").exists()


FACTOR = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
ADAPTERS = {
    "three dimensions": (lambda tensors: {FACTOR: tensors[FACTOR][None]}, ("expected two dimensions", "has shape")),
    "one dimension": (lambda tensors: {FACTOR: tensors[FACTOR][0]}, ("expected two dimensions", "has shape")),
    "none": (lambda tensors: {FACTOR: torch.tensor(1.0)}, ("expected two dimensions", "has shape")),
    "another rank": (lambda tensors: {FACTOR: tensors[FACTOR][:1]}, ("has ranks 1", "has shape")),
    "not finite": (lambda tensors: {FACTOR: tensors[FACTOR] / 0}, ("would not be finite", f"{FACTOR!r} is not finite")),
    "a stranger": (lambda tensors: {"foo": torch.ones(2)}, ("'foo' is no part", "'foo' belongs to no")),
}


@pytest.mark.parametrize("case", ADAPTERS)
def test_a_bad_adapter_is_a_sentence(case, job_models, place, capsys):
    model = job_models["llama"]
    tuned = peft.get_peft_model(
        AutoModelForCausalLM.from_pretrained(model), peft.LoraConfig(r=2, target_modules=["q_proj"])
    )
    tuned.save_pretrained(place / "adapter")
    file = place / "adapter" / checkpoint.WEIGHTS
    tensors = load_file(file)
    damage, (of_merge, of_finetune) = ADAPTERS[case]
    save_file({name: t.contiguous() for name, t in (tensors | damage(tensors)).items()}, file)
    assert of_merge in refused(merge(model, place / "adapter", place / "out"), capsys)
    if case != "not finite":
        assert of_merge in refused(["inspect", str(place / "adapter")], capsys)
    assert of_finetune in refused(finetune(model, place, "--adapter", place / "adapter"), capsys)
    assert not (place / "out").exists()


STATES = {
    "nothing": "{}",
    "no object": "[]",
    "no JSON": "x",
    "layers in a list": '{"step": 1, "tp": 1, "layers": [1]}',
    "no layers' values": '{"step": 1, "tp": 1, "layers": {"a": {}}}',
    "a number for a layer": '{"step": 1, "tp": 1, "layers": {"a": 3}}',
    "unknown values": '{"step": 1, "tp": 1, "layers": {"a": {"colour": 3}}}',
    "no step": '{"layers": {}}',
}


@pytest.mark.parametrize("case", STATES)
def test_inspect_says_of_junk_that_it_is(case, tmp_path, capsys):
    (tmp_path / manifest.NAME).write_text(STATES[case])
    save_file({"step": torch.zeros(())}, tmp_path / manifest.file_name(0, 0))
    assert str(tmp_path) in refused(["inspect", str(tmp_path)], capsys)


def aligned(lines):
    """Whether no cell of a table crosses the gaps that its rule leaves."""
    rule = lines[1]
    gaps = [i for i, mark in enumerate(rule) if mark == " "]
    return all(line.ljust(len(rule))[i] == " " for line in lines for i in gaps)


def test_inspect_prints_tables(job_models, place, capsys):
    assert cli.main(finetune(job_models["llama"], place, "--checkpoint-every", 1)) == 0
    capsys.readouterr()
    for directory, title, rows in (
        (place / "out", "a PEFT adapter, 14 layers", 14),
        (place / "out" / "checkpoints" / "step-000000002", "a training checkpoint, step 2, tp 1", 28),
    ):
        assert cli.main(["inspect", str(directory)]) == 0
        first, *lines = capsys.readouterr().out.splitlines()
        assert title in first and len(lines) == rows + 2 and aligned(lines)
    assert "no such file" in refused(["inspect", str(place)], capsys)
