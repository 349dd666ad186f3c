"""Are many adapters trained at once what each of them would be alone?"""

import functools
import itertools
import json
import math
from dataclasses import replace
from pathlib import Path

import jobs
import peft
import pytest
import torch
from jobs import job_models_fixture, small_models_fixture  # noqa: F401  (fixtures)
from test_laws import one_thread  # noqa: F401
from test_train import assert_same_training
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
    eval_data=(),
)


def by_gradient_descent(model, job):
    """As in test_train: AdamW divides by the gradients, and of a small one makes rounding large."""
    return torch.optim.SGD(
        [p for of in bind.factors(model).values() for p in of.values()], lr=torch.tensor(0.0), foreach=False
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
        dict(name="second", rank=5, alpha=8, learning_rate=0.1, data=[b], seed=2, use_rslora=True),
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
        each = read(place, runs_of, place / f"alone-{descent}", job_models["llama"])
        with pytest.MonkeyPatch.context() as patch:
            if descent:
                patch.setattr(train, "make_optimizer", by_gradient_descent)
            for job in each.values():
                train.finetune(job, quiet=True)
        return each

    return alone


FUSED = dict(fuse_qkv=True, fuse_gate_up=True)
CUTS = {
    "one process": {},
    "two at once": dict(at_once=2),
    "activation checkpointing": dict(activation_checkpointing=True, **FUSED),
    "model, sequence": dict(tp=2, sequence_parallel=True),
    "model and data, fused, copied heads": dict(tp=2, dp=2, accumulation=2, kv_size_multiplier=2, **FUSED),
    "data": dict(dp=2, accumulation=2),
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
    found = run(place, runs_of, place / cut.replace(" ", "-"), job_models["llama"], **CUTS[cut])
    assert list(found) == [own["name"] for own in runs_of]
    for name, job in found.items():
        assert_same_training(job, expected[name])
        config, other = (json.loads((Path(j.output) / "adapter_config.json").read_text()) for j in (job, expected[name]))
        assert config == other
        losses = jobs.column(job, "loss")
        assert losses[0] - losses[-1] > 1e-2


def test_a_sweep_by_adamw(job_models, place, runs_of, alone):
    expected = alone(False)
    found = run(place, runs_of, place / "adamw", job_models["llama"], descent=False)
    for name, job in found.items():
        assert_same_training(job, expected[name])
