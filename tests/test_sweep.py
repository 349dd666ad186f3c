"""Are many adapters trained at once what each of them would be alone?"""

import functools
import inspect
import itertools
import json
import math
import types
from dataclasses import replace
from pathlib import Path

import jobs
import peft
import pytest
import torch
from jobs import job_models_fixture, small_models_fixture  # noqa: F401  (fixtures)
from test_laws import one_thread  # noqa: F401
from test_train import assert_same_training
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

from adapters import bind, cli, runs, sweep, train
from adapters.many import ManyAdapters
from lora_fn import Axis, LoraSpec

LENGTH = 40
OPTIONS = dict(
    lora=LoraSpec(rank=4, alpha=8, dropout=0.3, target_modules="all-linear"),
    sequence_length=LENGTH,
    batch_size=8,
    accumulation=4,
    steps=3,
    warmup=1,
    max_grad_norm=0.35,  # which some exceed
    eval_data=(),
)


def by_gradient_descent(model, job, dp):
    """As in test_train: AdamW divides by the gradients, and of a small one makes rounding large."""
    parameters = [p for of in bind.factors(model).values() for p in of.values()]
    return torch.optim.SGD(
        [{"params": parameters, "initial_lr": job.learning_rate}], lr=torch.tensor(0.0), foreach=False
    )


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp("sweep")
    jobs.write_lines(place / "a.jsonl", jobs.uneven(17))
    jobs.write_lines(place / "b.jsonl", jobs.uneven(26)[9:])
    return place


@pytest.fixture(scope="module")
def runs_of(place):
    """The file: three runs that differ in everything."""
    a, b = str(place / "a.jsonl"), str(place / "b.jsonl")
    return [
        dict(name="first.1", rank=2, alpha=3, learning_rate=0.5, data=a, seed=1),
        dict(name="second", rank=5, alpha=8, learning_rate=0.2, data=[b], seed=2, use_rslora=True),
        dict(name="third-x", rank=4, learning_rate=0.3, data=[a, b], target_modules=["q_proj", "down_proj"]),
    ]


def read(place, what, output, model, **changes):
    file = place / "sweep.json"
    file.write_text(json.dumps(what))
    return sweep.read(file, OPTIONS | {"model": model, "output": str(output), "data": ()} | changes)


def swept(job, resume, *, each, descent, **options):
    """What a process of a sweep does."""
    if descent:
        train.make_optimizer = by_gradient_descent
    sweep.sweep(each, quiet=True, **options)


@pytest.fixture(scope="module")
def alone(job_models, place, runs_of):
    """The runs of the file, each by itself in one process: by gradient descent or AdamW -> name -> job."""

    @functools.cache
    def alone(descent):
        what = runs_of if descent else slower(runs_of)
        each = read(place, what, place / f"alone-{descent}", job_models["llama-1-layer"])
        with pytest.MonkeyPatch.context() as patch:
            if descent:
                patch.setattr(train, "make_optimizer", by_gradient_descent)
            for job in each.values():
                train.finetune(job, quiet=True)
        return each

    return alone


def slower(runs_of):
    """For AdamW, whose steps are as long as the rate."""
    return [own | {"learning_rate": own["learning_rate"] / 50} for own in runs_of]


FUSED = dict(fuse_qkv=True, fuse_gate_up=True)
CUTS = {
    "one process": {},
    "two at once, activation checkpointing": dict(at_once=2, activation_checkpointing=True, **FUSED),
    "model, sequence": dict(tp=2, sequence_parallel=True),
    "model and data, copied heads": dict(tp=2, dp=2, accumulation=2, kv_size_multiplier=2, **FUSED),
}


def run(place, what, output, model, *, descent=True, at_once=None, **cut):
    """Run a sweep, in processes of its own where it has several."""
    each = read(place, what, output, model, **cut)
    job = next(iter(each.values()))
    call = functools.partial(swept, each=each, descent=descent, at_once=at_once)
    if job.processes > 1:
        jobs.run(replace(job, output=str(output) + "-told"), call=call)
    else:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(train, "make_optimizer", train.make_optimizer)
            call(job, False)
    return each


@pytest.mark.parametrize("cut", CUTS)
def test_a_sweep_is_its_runs_alone(cut, job_models, place, runs_of, alone):
    expected = alone(True)
    found = run(place, runs_of, place / cut.replace(" ", "-"), job_models["llama-1-layer"], **CUTS[cut])
    assert list(found) == [own["name"] for own in runs_of]
    for name, job in found.items():
        assert_same_training(job, expected[name])
        config, other = (
            json.loads((Path(j.output) / "adapter_config.json").read_text()) for j in (job, expected[name])
        )
        assert config == other
        losses = jobs.column(job, "loss")
        assert losses[0] - losses[-1] > 1e-2


def test_adapters_are_gone_on_from(job_models, place, runs_of, alone):
    """All of them from one that is there, whose spec they take."""
    own = dict(adapter=alone(False)["second"].output, lora=replace(OPTIONS["lora"], dropout=0.0), steps=1)
    rates = [{"name": "slow", "learning_rate": 1e-3}, {"name": "fast", "learning_rate": 1e-2, "seed": 3}]
    found = run(place, rates, place / "on", job_models["llama-1-layer"], data=(runs_of[0]["data"],), **own)
    for name, job in found.items():
        one = jobs.elsewhere(job, f"on-{name}-alone")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(train, "make_optimizer", by_gradient_descent)
            train.finetune(one, quiet=True)
        assert_same_training(job, one)
        configs = [json.loads((Path(j.output) / "adapter_config.json").read_text()) for j in (job, one)]
        assert configs[0] == configs[1] and configs[0]["use_rslora"]


def test_a_sweep_by_adamw(job_models, place, runs_of, alone):
    expected = alone(False)
    found = run(place, slower(runs_of), place / "adamw", job_models["llama-1-layer"], descent=False)
    for name, job in found.items():
        assert_same_training(job, expected[name])


# A defect is (module, text, other text); the text must occur exactly once.
DEFECTS = {
    "one rate for all": (sweep, "p.copy_(torch.lerp(old, p, share))", "pass"),
    "the number of targets of the first": (train, "sum(-1) / num", "sum(-1) / num[0]"),
    "the sum of all losses in one": (train, ".reshape(*num.shape, -1).sum(-1) / num", ".sum() / num"),
    "clipped by the norm of all": (
        train,
        "clipped, norm = (vmap if num_targets.dim() else _one)(ready)(grads)",
        "clipped, _ = ready(grads); norm = vmap(ready)(grads)[1]",
    ),
    "one key for all": (train, "task.job.seed & 0x7FFFFFFF for", "job.seed & 0x7FFFFFFF for"),
    "one order of rows for all": (
        train,
        "rows_per_step=job.batch_size, seed=task.",
        "rows_per_step=job.batch_size, seed=",
    ),
}


@pytest.mark.parametrize("defect", DEFECTS)
def test_a_defect_is_seen(defect, job_models, place, runs_of, alone, monkeypatch):
    module, text, other = DEFECTS[defect]
    source = inspect.getsource(module)
    assert source.count(text) == 1
    broken = types.ModuleType(module.__name__)
    exec(compile(source.replace(text, other), module.__file__, "exec"), broken.__dict__)
    for name in ("train_step", "run_steps") if module is train else ("at_own_rates",):
        monkeypatch.setattr(module, name, getattr(broken, name))
    expected = alone(True)
    with pytest.raises((AssertionError, RuntimeError)):
        found = run(place, runs_of, place / defect.replace(" ", "-"), job_models["llama-1-layer"])
        for name, job in found.items():
            assert_same_training(job, expected[name])


def test_own_rates_are_those_of_adamw():
    """Of K optimizers over K parameters; with weight decay, in float64."""
    rates, generator = [1e-2, 3e-4, 1e-3], torch.Generator().manual_seed(0)
    began = torch.randn(3, 4, 5, dtype=torch.float64, generator=generator)

    def made(p, rate):
        return torch.optim.AdamW([p], lr=torch.tensor(rate, dtype=torch.float64), weight_decay=0.1)

    stacked = torch.nn.Parameter(began.clone())
    together = made(stacked, max(rates))
    sweep.at_own_rates(together, rates)
    each = [torch.nn.Parameter(p.clone()) for p in began]
    optimizers = [made(p, rate) for p, rate in zip(each, rates, strict=True)]
    for step in range(1, 8):
        grads = torch.randn(stacked.shape, dtype=torch.float64, generator=generator)
        stacked.grad = grads.clone()
        together.param_groups[0]["lr"].fill_(max(rates) / step)
        together.step()
        for p, g, optimizer, rate in zip(each, grads, optimizers, rates, strict=True):
            p.grad = g.clone()
            optimizer.param_groups[0]["lr"].fill_(rate / step)
            optimizer.step()
    torch.testing.assert_close(stacked.detach(), torch.stack([p.detach() for p in each]), rtol=1e-12, atol=1e-12)
    assert (stacked - began).abs().amin(dim=(1, 2)).min() > 0


def stacked_step(model, spec, count, rows, tokens=8):
    """A step of `count` adapters, to be called."""
    held = ManyAdapters(model, spec, places=count, gradients="deferred")
    for number in range(count):
        held.add(str(number), spec, seed=number)
    held.select_rows([str(number) for number in range(count)])
    optimizer = train.make_optimizer(model, train.Job(model="", data=("",), output=""))
    sweep.at_own_rates(optimizer, [1.0 / (1 + number) for number in range(count)])
    ids = torch.randint(3, 90, (count * rows, tokens), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "labels": ids, "position_ids": torch.arange(tokens).expand_as(ids)}
    batch |= {"document_ids": torch.zeros_like(ids)}
    numbers = torch.arange(count)
    where = {"tp": Axis(), "dp": Axis(name="dp"), "max_grad_norm": 1.0}
    model.train()
    return functools.partial(
        train.train_step, model, optimizer, [batch], num_targets=numbers + 1.0, key=numbers, **where
    )


class Counted(TorchDispatchMode):
    """How many operations there are."""

    def __init__(self):
        super().__init__()
        self.number = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.number += 1
        return function(*args, **(kwargs or {}))


def test_the_step_does_not_grow_with_adapters(job_models):
    """As many ATen operations with 32 adapters as with 8: forward, backward, norms, clipping, optimizer."""
    counts = {}
    for count in (1, 8, 32):
        model = train.models.load(job_models["llama-1-layer"])
        step = stacked_step(model, LoraSpec(rank=2, dropout=0.1, target_modules="all-linear"), count, rows=1)
        with Counted() as counted:
            step()
        counts[count] = counted.number
    assert 500 < counts[1] <= counts[8] == counts[32], counts


# -------------------------------------------------------------------------------------------------- the command line


def words(model, place, what, *options):
    """The command line of a small sweep."""
    (place / "grid.json").write_text(what if isinstance(what, str) else json.dumps(what))
    sizes = [
        "--steps",
        "2",
        "--batch-size",
        "2",
        "--sequence-length",
        "40",
        "--rank",
        "2",
        "--target-modules",
        "q_proj",
        "--quiet",
    ]
    own = ["finetune", "--sweep", place / "grid.json", "--model", model, "--output", place / "out"]
    return [str(word) for word in (*own, *sizes, *options)]


@pytest.fixture
def files(tmp_path):
    jobs.write_lines(tmp_path / "a.jsonl", jobs.uneven(12))
    jobs.write_lines(tmp_path / "b.jsonl", jobs.uneven(14)[2:])
    return tmp_path


def told_table(text):
    """The rows of a printed table that lines up, as lists of cells."""
    lines = text.splitlines()
    rule = next(i for i, line in enumerate(lines) if line and set(line) <= {"-", " "})
    starts = [0, *(i + 1 for i, mark in enumerate(lines[rule]) if mark == " " and lines[rule][i + 1] == "-")]
    end = next((i for i in range(rule, len(lines)) if lines[i].startswith("The ")), len(lines))
    table = [lines[rule - 1], *lines[rule + 1 : end]]
    assert all(line.ljust(start + 1)[start - 1] == " " for line in table for start in starts[1:])
    return [[line[a:b].strip() for a, b in zip(starts, [*starts[1:], None], strict=True)] for line in table]


def test_a_grid_is_trained_compared_and_drawn(job_models, files, capsys):
    model, names = job_models["llama-1-layer"], ("a", "b")
    grid = {"rank": [1, 3], "learning_rate": [1e-3, 0.05], "data": [str(files / f"{name}.jsonl") for name in names]}
    assert cli.main(words(model, files, grid, "--sweep-at-once", 3)) == 0
    out, told = files / "out", capsys.readouterr().out
    expected = {f"rank{r}-lr{lr:g}-{name}" for r, lr, name in itertools.product((1, 3), (1e-3, 0.05), names)}
    assert {path.name for path in out.iterdir()} == {*expected, runs.PLOT, sweep.COMPARISON}
    assert (out / runs.PLOT).read_bytes().startswith(b"\x89PNG")
    head, *rows = told_table(told)
    assert head[:5] == ["name", "rank", "alpha", "learning rate", "data"]
    losses = [float(row[6]) for row in rows]
    assert {row[0] for row in rows} == expected and losses == sorted(losses) and losses[0] < losses[-1]
    assert "The held-out rows are not the same for all" in told
    compared = json.loads((out / sweep.COMPARISON).read_text())["runs"]
    assert [of["name"] for of in compared] == [row[0] for row in rows]
    for of, row in zip(compared, rows, strict=True):
        log = runs.read_log(out / of["name"] / runs.LOG)
        assert runs.logged(log, "eval") == [of["loss_before"], of["loss_after"]]
        assert [line["step"] for line in log if line["kind"] == "train"] == [1, 2]
        assert row[5:] == [f"{of[name]:.4f}" for name in ("loss_before", "loss_after", "train_loss")]
        tuned = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model), out / of["name"])
        assert (
            tuned.peft_config["default"].r
            == of["rank"]
            == json.loads((out / of["name"] / "run.json").read_text())["job"]["lora"]["rank"]
        )


def test_a_run_that_diverges_leaves_the_others_alone(job_models, files, capsys):
    """Its adapter is not written, and the others are what they are without it; nothing held out is not measured."""
    model, data = job_models["llama-1-layer"], ["--data", files / "a.jsonl", "--held-out", 0]
    what = [{"name": "fast", "learning_rate": 1e38}, {"name": "good", "learning_rate": 1e-2}]
    assert cli.main(words(model, files, what, *data)) == cli.BAD_INPUT
    done = capsys.readouterr()
    assert "fast: diverged, so that no adapter was written; give a lower learning rate." in done.err
    _, good, fast = told_table(done.out)
    assert good[0] == "good" and good[5:7] == ["not measured"] * 2 and math.isfinite(float(good[7]))
    assert fast[0] == "fast" and fast[5] == "diverged"
    assert not list((files / "out" / "fast").glob("adapter*"))
    alone = [*words(model, files, what, *data), "--output", str(files / "alone"), "--learning-rate", "1e-2"]
    del alone[1:3]
    assert cli.main(alone) == 0
    found, expected = (jobs.adapter(type("Run", (), {"output": files / name})) for name in ("out/good", "alone"))
    assert max(float((found[n] - t).abs().max() / t.abs().max()) for n, t in expected.items()) <= 1e-5


WRONG = {
    "no JSON": ("[", ["grid.json: is not JSON"]),
    "nothing": ([], ["grid.json: holds [], expected a list of runs, or an object of lists."]),
    "no objects": ([1], ["grid.json: run 1: is 1, expected an object of rank, alpha"]),
    "no lists": ({"rank": 3}, ["grid.json: 'rank' is 3, expected a list of the values to try."]),
    "names in a grid": ({"name": ["a"]}, ["'name' is in a grid"]),
    "names": (
        [{"name": "a/b"}, {"name": "x", "seed": 1}, {"name": "x"}, {"name": "loss.png", "seed": 4}],
        [
            "run 1: would be called 'a/b', which names no new directory; rename it.",
            "run 2: would be called 'x', as another is; give each its own name.",
            "run 3: would be called 'x'",
            "run 4: would be called 'loss.png'",
        ],
    ),
    "all at once": (
        [
            {"rank": "4", "colour": 1},
            {"dropout": 0.5, "seed": 1.5},
            {"learning_rate": -1.0, "seed": 1},
            {"rank": 0},
            {"alpha": True, "data": []},
        ],
        [
            "run 1: 'rank' is '4', expected a whole number.",
            "run 1: has 'colour', expected one of name, rank, alpha",
            "run 2: has 'dropout', which all runs of a sweep have in common; give it on the command line.",
            "run 2: 'seed' is 1.5, expected a whole number.",
            "run 3: --learning-rate: is -1.0, expected a finite number above 0.",
            "run 4: LoraSpec.rank: is 0, expected an integer of at least 1.",
            "run 5: 'alpha' is True, expected a number.",
            "run 5: 'data' is (), expected a file, or a list of files.",
        ],
    ),
    "files and targets": (
        [{"name": "x", "data": "gone.txt"}, {"name": "y", "target_modules": ["q_prj"]}, {"name": "z", "data": "gone"}],
        [
            "gone.txt: is not there",
            "gone: is not there",
            "run y: target_modules 'q_prj' matches none of the 9 layers",
        ],
    ),
}
OPTIONS_OF_ALL = {
    "--resume": "--resume: a sweep keeps no checkpoints to go on from",
    "--batch-size 3 --accumulation 2": "--batch-size: is 3, which dp 1 x accumulation 2 do not divide",
    "--sweep-at-once 0": "--sweep-at-once: is 0, expected at least 1.",
    "--init-lora-weights pissa": "init_lora_weights: is 'pissa', which concerns the base",
    "--init-lora-weights eva": "init_lora_weights: is 'eva', which concerns the base",
    "--bias all": "bias: is 'all', which concerns the base",
    "--modules-to-save norm": "modules_to_save: is ('norm',), which concerns the base",
    "--lorafa": "--lorafa: is for adapters that are trained one by one",
    "--loraplus-lr-ratio 2": "--loraplus-lr-ratio: is for adapters that are trained one by one",
    "--tp 3": "8 attention heads cannot be cut into 3",
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_with_a_file_is_told_at_once(case, job_models, files, capsys):
    what, sentences = WRONG[case]
    assert cli.main(words(job_models["llama-1-layer"], files, what, "--data", files / "a.jsonl")) == cli.BAD_INPUT
    told = capsys.readouterr().err
    assert [sentence for sentence in sentences if sentence not in told] == [], told
    assert len(told.splitlines()) == len(sentences) and not (files / "out").exists()


@pytest.mark.parametrize("options", OPTIONS_OF_ALL)
def test_what_no_sweep_can_do_is_a_sentence(options, job_models, files, capsys):
    own = ("--data", files / "a.jsonl", *options.split())
    assert cli.main(words(job_models["llama-1-layer"], files, {"rank": [2, 4]}, *own)) == cli.BAD_INPUT
    told = capsys.readouterr().err
    assert OPTIONS_OF_ALL[options] in told and not (files / "out").exists()
    assert len(told.splitlines()) == 1  # and not once for each run


def test_a_sweep_writes_over_nothing(job_models, files, capsys):
    (files / "out").mkdir()
    (files / "out" / "thesis.txt").write_text("years of work")
    assert cli.main(words(job_models["llama-1-layer"], files, {"rank": [2]}, "--data", files / "a.jsonl")) == 2
    assert "exists and is not empty; choose another --output." in capsys.readouterr().err
    assert [path.name for path in (files / "out").iterdir()] == ["thesis.txt"]
