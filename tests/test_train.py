"""Is a step what it should be, however it is cut? And does it stay on the device?"""

import functools
import itertools
import json
import math
from dataclasses import replace
from pathlib import Path

import jobs
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from jobs import job_models_fixture, small_models_fixture  # noqa: F401  (fixtures)
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

from adapters import bind, data, launch, models, train
from adapters.train import Job
from lora_fn import Axis, LoraSpec, SpecError, TargetError
from lora_fn.dropout import fold_in

TOLERANCE = 1e-5  # max|a - b| / max|b|, in fp32
LENGTH = 40
SPEC = LoraSpec(rank=4, alpha=8, target_modules="all-linear")


@pytest.fixture(scope="module")
def job(job_models, tmp_path_factory):
    """Three steps of one process, on rows that have from one token to learn to thirty."""
    place = tmp_path_factory.mktemp("train")
    return Job(
        model=job_models["llama"],
        data=(jobs.write_lines(place / "data.jsonl", jobs.uneven(16)),),
        output=str(place / "one"),
        lora=SPEC,
        sequence_length=LENGTH,
        batch_size=8,
        steps=3,
        learning_rate=1e-2,
        warmup=1,
        checkpoint_every=0,
    )


@pytest.fixture(scope="module")
def run(job):
    """Run a variant of the job, once: what it changes -> the job that was run."""
    numbers = itertools.count()

    @functools.cache
    def run(call=None, **changes):
        variant = jobs.elsewhere(job, f"run-{next(numbers)}", **changes)
        jobs.run(variant, call=call)
        return variant

    return run


def error(found, expected):
    return float((found.double() - expected.double()).abs().max() / expected.double().abs().max())


def assert_same_training(found, expected, tolerance=TOLERANCE):
    """The same losses and norms at every step, and the same factors at the end."""
    for name in ("loss", "grad_norm", "lr"):
        assert error(torch.tensor(jobs.column(found, name)), torch.tensor(jobs.column(expected, name))) <= tolerance
    losses = [torch.tensor(jobs.column(j, "loss", "eval")) for j in (found, expected)]
    assert error(*losses) <= tolerance
    factors = jobs.adapter(expected)
    assert jobs.adapter(found).keys() == factors.keys()
    for name, factor in jobs.adapter(found).items():
        assert error(factor, factors[name]) <= tolerance, name


# --------------------------------------------------------------------------------------------- however a step is cut

CUTS = {
    "accumulation": dict(accumulation=4),
    "data": dict(dp=2),
    "data and accumulation": dict(dp=2, accumulation=2),
    "model and data, sequence": dict(tp=2, dp=2, sequence_parallel=True),
    "model and data": dict(tp=2, dp=2, accumulation=2),
    "model by four, sequence": dict(tp=4, sequence_parallel=True),
    "fused, activation checkpointing": dict(fuse_qkv=True, fuse_gate_up=True, activation_checkpointing=True),
    "fused, model by two, sequence": dict(fuse_qkv=True, fuse_gate_up=True, tp=2, sequence_parallel=True),
    "copied heads, model by two": dict(kv_size_multiplier=2, fuse_gate_up=True, tp=2),
    "activation checkpointing": dict(activation_checkpointing=True),
    "activation checkpointing, sequence": dict(activation_checkpointing=True, tp=2, sequence_parallel=True),
}


def test_the_rows_are_uneven(job):
    rows = rows_of(job).train
    targets = (rows["labels"] != data.IGNORED).sum(1)
    assert targets.min() * 5 < targets.max()
    for accumulation, dp in ((2, 2), (4, 1)):
        indices = data.step_rows(0, num_rows=len(targets), rows_per_step=8, seed=0)
        parts = targets[indices].reshape(accumulation * dp, -1).sum(1)
        assert parts.max() > 1.5 * parts.min()


def by_gradient_descent(job, resume):
    """A run whose factors move by their gradients. AdamW divides by them: of a small one, it makes rounding large."""

    def descent(model, job, dp):
        parameters = [p for of in bind.factors(model).values() for p in of.values()]
        group = {"params": parameters, "initial_lr": job.learning_rate}
        return torch.optim.SGD([group], lr=torch.tensor(0.0), foreach=False)

    train.make_optimizer = descent
    train.finetune(job, resume=resume, quiet=True)


DESCENT = dict(call=by_gradient_descent, learning_rate=0.5)


@pytest.mark.parametrize("cut", CUTS)
def test_a_step_is_the_same_however_it_is_cut(cut, run):
    assert_same_training(run(**DESCENT, **CUTS[cut]), run(**DESCENT))
    losses = jobs.column(run(**DESCENT), "loss")
    assert losses[0] - losses[-1] > 1e-2, "the runs must learn for the comparison to say something"


DROPOUT = replace(SPEC, dropout=0.3)


FUSED = dict(fuse_qkv=True, fuse_gate_up=True)


@pytest.mark.parametrize("cut", [dict(tp=2), dict(tp=2, sequence_parallel=True), dict(kv_size_multiplier=2, **FUSED)])
def test_dropout_is_the_same_however_the_model_is_cut(cut, run):
    expected = run(**DESCENT, lora=DROPOUT)
    assert_same_training(run(**DESCENT, lora=DROPOUT, **cut), expected)
    assert abs(jobs.column(expected, "loss")[-1] - jobs.column(run(**DESCENT), "loss")[-1]) > 1e-4  # it does something


@pytest.mark.parametrize("cut", [dict(), dict(tp=2, sequence_parallel=True)])
def test_activation_checkpointing_changes_no_bit(cut, run):
    job = dict(lora=DROPOUT, accumulation=2, **cut)
    assert_same_training(run(activation_checkpointing=True, **job), run(**job), tolerance=0.0)


def test_each_step_and_microbatch_has_a_mask_of_its_own(job):
    model, _, axis = made(replace(job, lora=DROPOUT))
    model.train()
    [batch] = data.microbatches(rows_of(job).train, np.arange(4), accumulation=1, dp_size=1, dp_index=0)
    with torch.no_grad():
        for p in bind.flat(bind.factors(model)).values():
            p.fill_(0.05)
    key, found = torch.tensor(5), []
    for step, number in ((0, 0), (0, 1), (1, 0), (0, 0)):
        bind.set_dropout_key(model, fold_in(fold_in(key, torch.tensor(step)), number))
        found.append(train.losses(model, {}, batch, axis))
    assert torch.equal(found[0], found[3])
    assert not torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])


def test_a_bf16_base_learns(run):
    long = run(dtype="bfloat16", tp=2, sequence_parallel=True, steps=24, learning_rate=2e-2)
    losses = jobs.column(long, "loss")
    assert all(map(math.isfinite, losses)) and sum(losses[-4:]) < 0.9 * sum(losses[:4])
    before, after = jobs.column(long, "loss", "eval")
    assert after < before
    assert all(factor.dtype == torch.float32 for factor in jobs.adapter(long).values())


@pytest.mark.parametrize("cut", [dict(), dict(tp=2, sequence_parallel=True)])
def test_a_run_that_diverged_writes_no_adapter(cut, job):
    job = jobs.elsewhere(job, f"diverged-{len(cut)}", learning_rate=1e38, steps=5, **cut)
    processes = jobs.Processes(job)
    assert processes.wait() == [2] * job.processes, processes.told()
    told = {line for line in processes.told().splitlines() if line and not line.startswith("[Gloo]")}  # of torch 2.9
    assert len(told) == 1 and "is not finite; nothing was written" in told.pop()
    assert not list(Path(job.output).glob("adapter*"))


def test_an_adapter_is_gone_on_from(run, job):
    first = run()
    again = run(adapter=first.output, learning_rate=1e-3)
    assert jobs.column(again, "loss", "eval")[0] == jobs.column(first, "loss", "eval")[1]
    sharded = run(adapter=first.output, learning_rate=1e-3, tp=2, sequence_parallel=True)
    assert_same_training(sharded, again)
    config = json.loads((Path(again.output) / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (SPEC.rank, SPEC.alpha)


def shares(job):
    """Whether k and v of every layer have q's lora_A, and up gate's, bit for bit."""
    factors = jobs.adapter(job)
    pairs = [(part, first) for part, first in (("k", "q"), ("v", "q"), ("up", "gate"))]
    equal = [
        torch.equal(factor, factors[name.replace(f".{part}_proj", f".{first}_proj")])
        for part, first in pairs
        for name, factor in factors.items()
        if f".{part}_proj.lora_A" in name
    ]
    assert equal
    return all(equal)


def test_a_start_from_data_is_the_same_at_every_size(run):
    """CorDA, whose covariances the processes sum up in parts; the adapter that is left fits the model's own weights."""
    lora = replace(SPEC, init_lora_weights="corda", dropout=0.0, rank=2)
    assert_same_training(run(lora=lora, steps=2, tp=2, sequence_parallel=True), run(lora=lora, steps=2))


def test_a_shared_lora_A_stays_one(run, job):
    """Through training, at any size, and when it is gone on from: its files hold copies, and do not say so."""
    shared = dict(lora=replace(SPEC, share_A=True), **FUSED)
    first, own = run(**shared), run(**FUSED)
    assert shares(first) and not shares(own)
    assert shares(run(adapter=first.output, **shared)) and not shares(run(adapter=first.output, **FUSED))
    assert_same_training(run(**DESCENT, **shared, tp=2, sequence_parallel=True), run(**DESCENT, **shared))
    with pytest.raises(TargetError, match="there is no lora_A to share"):
        train.check(jobs.elsewhere(job, "alone", lora=shared["lora"]), resume=False)


def test_the_adapters_own_spec_is_taken(job, run, tmp_path):
    from peft import LoraConfig, get_peft_model

    stock = get_peft_model(
        AutoModelForCausalLM.from_pretrained(job.model),
        peft_config := LoraConfig(
            r=3, lora_alpha=5, target_modules=["o_proj", "up_proj"], init_lora_weights=False, task_type="CAUSAL_LM"
        ),
    )
    stock.save_pretrained(tmp_path)
    tuned = run(adapter=str(tmp_path), learning_rate=1e-3)
    config = json.loads((Path(tuned.output) / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (peft_config.r, peft_config.lora_alpha)
    assert sorted(config["target_modules"]) == ["o_proj", "up_proj"]


# --------------------------------------------------------------------------------------------------- rate and clipping


def rates(job):
    return [train.learning_rate(job, torch.tensor(step)) for step in range(job.steps + 1)]


def test_the_rate_warms_up_and_falls_as_a_cosine_to_zero(job):
    job = replace(job, learning_rate=0.5, warmup=4, steps=20)
    found = rates(job)
    assert all(isinstance(rate, torch.Tensor) and rate.shape == () for rate in found)
    assert error(torch.stack(found[:4]), 0.5 * torch.arange(1, 5) / 4) <= 1e-6
    for step in range(4, 21):
        assert abs(float(found[step]) - 0.25 * (1 + math.cos(math.pi * (step - 4) / 16))) <= 1e-7
    assert found[4] == 0.5 and found[19] < 0.01 * 0.5 and found[20] == 0


@pytest.mark.parametrize("warmup, steps", [(0, 5), (5, 5), (10, 5), (0, 1)])
def test_the_rate_is_sound_at_the_edges(warmup, steps, job):
    job = replace(job, learning_rate=1.0, warmup=warmup, steps=steps)
    found = torch.stack(rates(job)[:-1])
    assert torch.isfinite(found).all() and (found > 0).all() and (found <= 1).all()


def made(job):
    """The job's model in this process, its optimizer, and the axis."""
    model = train.load_model(job, None, torch.device("cpu"))
    return model, train.make_optimizer(model, job), Axis()


def rows_of(job):
    tokenizer = models.load_tokenizer(Path(job.model))
    return data.load(job.data, tokenizer, sequence_length=job.sequence_length, seed=job.seed, disable=True)


def step_of(job, model, optimizer, number, **options):
    """Take one step of a job by hand, as `finetune` does."""
    rows = rows_of(job).train
    indices = data.step_rows(number, num_rows=len(rows["labels"]), rows_per_step=job.batch_size, seed=job.seed)
    batches = data.microbatches(rows, indices, accumulation=job.accumulation, dp_size=1, dp_index=0)
    options = {"tp": Axis(), "dp": Axis(name="dp"), "max_grad_norm": job.max_grad_norm} | options
    num_targets = torch.tensor(float(data.num_targets(rows, indices)))
    model.train()
    return functools.partial(
        train.train_step, model, optimizer, batches, num_targets=num_targets, key=torch.tensor(number), **options
    )


class Kept(torch.optim.Optimizer):
    """An optimizer that keeps the gradients that it is given."""

    def __init__(self, parameters):
        super().__init__(parameters, {})

    def step(self):
        self.seen = [p.grad.clone() for p in self.param_groups[0]["params"]]


@pytest.mark.parametrize("bound, is_clipped", [(1e-3, True), (1e3, False)])
def test_gradients_are_clipped_to_the_norm(bound, is_clipped, job):
    model, _, _ = made(job)
    optimizer = Kept([p for of in bind.factors(model).values() for p in of.values()])
    _, norm = step_of(job, model, optimizer, 0, max_grad_norm=bound)()
    found = torch.cat([g.flatten() for g in optimizer.seen]).norm()
    assert (norm > bound) == is_clipped
    assert float(found) == pytest.approx(bound if is_clipped else float(norm), rel=1e-3)
    assert all(p.grad is None for p in model.parameters())


# --------------------------------------------------------------------------------------------- what stays on the device


class Seen(TorchDispatchMode):
    """Every operation with the shapes that it saw and made; one that reads a number on the host is refused.

    `optimizer.step` is left out: on the CPU, torch's AdamW keeps its step's number there and reads it (on a device it
    is made with capturable=True, and does not).
    """

    READS = ("aten::_local_scalar_dense", "aten::nonzero", "aten::equal", "aten::is_nonzero", "aten::masked_select")

    def __init__(self, optimizer):
        super().__init__()
        self.operations, self.is_optimizer = [], False
        step = optimizer.step

        def unseen():
            self.is_optimizer = True
            try:
                step()
            finally:
                self.is_optimizer = False

        optimizer.step = unseen

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        if not self.is_optimizer:
            name = function._schema.name
            assert name not in self.READS, f"{name} reads a number on the host"
            shapes = [tuple(x.shape) for x in torch.utils._pytree.tree_leaves((args, kwargs, made)) if is_tensor(x)]
            self.operations.append((name, shapes))
        return made


def is_tensor(x):
    return isinstance(x, torch.Tensor)


def trace(job, resume):
    """Trace two steps of a job; in a process of its own when the job has several."""
    mesh = launch.mesh(job.axes, job.device)
    axes = (
        {"tp": Axis(), "dp": Axis(name="dp")}
        if mesh is None
        else {n: train.axis_of_mesh(mesh, n) for n in ("tp", "dp")}
    )
    model = train.load_model(job, mesh, torch.device("cpu"))
    optimizer = train.make_optimizer(model, job)
    step_of(job, model, optimizer, 0, **axes)()  # the first step makes the optimizer's state
    traces = []
    for number in (1, 2):
        step = step_of(job, model, optimizer, number, **axes)
        with Seen(optimizer) as seen:
            step()
        traces.append(seen.operations)
    assert len(traces[0]) > 300
    assert traces[0] == traces[1]
    launch.leave()


TRACED = {
    "one process": dict(),
    "dropout": dict(lora=DROPOUT, accumulation=2),
    "activation checkpointing": dict(activation_checkpointing=True, lora=DROPOUT),
    "bf16": dict(dtype="bfloat16"),
}


@pytest.mark.parametrize("variant", TRACED)
def test_no_step_reads_a_number_and_every_step_has_the_same_shapes(variant, job):
    trace(replace(job, **TRACED[variant]), resume=False)


def test_no_step_of_several_processes_reads_a_number(job):
    jobs.run(jobs.elsewhere(job, "traced", tp=2, sequence_parallel=True, lora=DROPOUT), call=trace)


def test_a_read_would_be_seen():
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)])
    with Seen(optimizer), pytest.raises(AssertionError, match="_local_scalar_dense reads"):
        float(torch.ones(()) + 1)


# ----------------------------------------------------------------------------------------------------------- evaluation


def documents_of(rows):
    """The documents of packed rows: (ids, labels) of each."""
    for row in range(len(rows["labels"])):
        for number in range(rows["document_ids"][row].max() + 1):
            here = rows["document_ids"][row] == number
            yield torch.tensor(rows["input_ids"][row, here]), torch.tensor(rows["labels"][row, here])


def stock_loss(model, rows):
    """The mean loss, each document alone in the stock model."""
    total, num = 0.0, 0
    with torch.no_grad():
        for ids, labels in documents_of(rows):
            logits = model(input_ids=ids[None]).logits[0].float()
            total += float(F.cross_entropy(logits, labels, ignore_index=data.IGNORED, reduction="sum"))
            num += int((labels != data.IGNORED).sum())
    return total / num


def short(num):
    """Documents of which several go into a row."""
    return [{"text": "abcdefghijklmnopqrstuvwxyz"[i % 11 : i % 11 + 3 + i % 13]} for i in range(num)]


@pytest.mark.parametrize("cut", [dict(), dict(dp=2), dict(tp=2, sequence_parallel=True)])
def test_the_held_out_loss_is_that_of_stock_peft_on_each_document_alone(cut, run, job, tmp_path_factory):
    from peft import PeftModel

    place = tmp_path_factory.getbasetemp() / "evaluated"
    place.mkdir(exist_ok=True)
    job = run(
        data=(jobs.write_lines(place / "a.jsonl", short(40)),),
        eval_data=(jobs.write_lines(place / "b.jsonl", short(43)),),
        learning_rate=5e-2,
        **cut,
    )
    tokenizer = models.load_tokenizer(Path(job.model))
    rows = data.load(
        job.data, tokenizer, sequence_length=LENGTH, seed=job.seed, eval_paths=job.eval_data, disable=True
    ).held_out
    assert len(rows["labels"]) % job.batch_size and rows["document_ids"].max() >= 2
    before, after = jobs.column(job, "loss", "eval")
    stock = AutoModelForCausalLM.from_pretrained(job.model).eval()
    assert before == pytest.approx(stock_loss(stock, rows), rel=TOLERANCE)
    tuned = PeftModel.from_pretrained(stock, job.output).eval()
    assert after == pytest.approx(stock_loss(tuned, rows), rel=TOLERANCE)
    assert abs(after - before) > 1e-2


def test_nothing_held_out_is_not_measured(run):
    assert jobs.column(run(held_out=0.0), "loss", "eval") == [None, None]


def test_a_document_does_not_see_another(job):
    model, _, axis = made(job)
    documents = [
        data.Document(tokens=np.arange(5 + n, dtype=np.int32) + 3, targets=np.arange(5 + n) > 0) for n in (0, 4, 9)
    ]
    rows = data.pack(documents, sequence_length=LENGTH, seed=0)
    assert rows["document_ids"].shape[0] == 1 and rows["document_ids"].max() == 2
    for changed in range(3):
        other = {name: values.copy() for name, values in rows.items()}
        here = rows["document_ids"] == changed
        other["input_ids"][here] = (rows["input_ids"][here] + 31) % 90 + 3
        found = []
        for each in (rows, other):
            [batch] = data.microbatches(each, np.arange(1), accumulation=1, dp_size=1, dp_index=0)
            with torch.no_grad():
                found.append(train.losses(model, {}, batch, axis))
        assert torch.equal(found[0][~torch.tensor(here)], found[1][~torch.tensor(here)])
        assert not torch.equal(found[0], found[1])


# ------------------------------------------------------------------------------------------------- jobs that cannot be

SENTENCES = {
    "--tp: is 0, expected at least 1.": dict(tp=0),
    "--steps: is -1, expected at least 1.": dict(steps=-1),
    "--eval-every: is -1, expected a finite number of at least 0.": dict(eval_every=-1),
    "--checkpoint-every: is -1, expected a finite number of at least 0.": dict(checkpoint_every=-1),
    "--device: is 'tpu', expected one of cpu, cuda, xla.": dict(device="tpu"),
    "--keep-checkpoints: is 0, expected at least 1.": dict(keep_checkpoints=0),
    "--log-every: is 0, expected at least 1.": dict(log_every=0),
    "--warmup: is -1, expected a finite number of at least 0.": dict(warmup=-1),
    "--weight-decay: is -0.1, expected a finite number of at least 0.": dict(weight_decay=-0.1),
    "--learning-rate: is 0.0, expected a finite number above 0.": dict(learning_rate=0.0),
    "--learning-rate: is nan, expected a finite number above 0.": dict(learning_rate=math.nan),
    "--max-grad-norm: is inf, expected a finite number above 0.": dict(max_grad_norm=math.inf),
    "--weight-decay: is nan, expected": dict(weight_decay=math.nan),
    "--beta2: is 1.0, expected at least 0 and below 1.": dict(beta2=1.0),
    "--held-out: is 1.0, expected at least 0 and below 1.": dict(held_out=1.0),
    "--sequence-length: is 1, expected at least 2.": dict(sequence_length=1),
    "--dtype: is 'float8', expected one of float32, bfloat16.": dict(dtype="float8"),
    "--data: names no file; name at least one.": dict(data=()),
    "--batch-size: is 6, which dp 2 x accumulation 2 do not divide; choose a multiple of 4.": dict(
        batch_size=6, dp=2, accumulation=2
    ),
}


@pytest.mark.parametrize("sentence", SENTENCES)
def test_a_job_that_cannot_be_is_a_sentence(sentence, job):
    with pytest.raises(SpecError) as raised:
        replace(job, **SENTENCES[sentence])
    assert str(raised.value).startswith(sentence) and str(raised.value).count("\n") == 0


def test_all_that_is_wrong_is_told_at_once(job):
    with pytest.raises(SpecError) as raised:
        replace(job, tp=0, steps=0, learning_rate=-1.0, dtype="int4", data=())
    assert [line.partition(":")[0] for line in str(raised.value).splitlines()] == [
        "--tp",
        "--steps",
        "--learning-rate",
        "--dtype",
        "--data",
    ]


def test_a_job_is_json(job):
    assert json.loads(json.dumps(job.to_dict())) == job.to_dict()


def test_attention_dropout_is_refused(job, tmp_path):
    import shutil

    model = shutil.copytree(job.model, tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"attention_dropout": 0.1}))
    with pytest.raises(SpecError, match=r"attention_dropout is 0\.1, expected 0"):
        train.load_model(replace(job, model=str(model)), None, torch.device("cpu"))


def test_tokens_that_the_model_does_not_know_are_refused(job):
    model, _, _ = made(job)
    rows = rows_of(job)
    rows.train["input_ids"][0, 0] = 99
    with pytest.raises(SpecError, match="holds token 99, the model's vocabulary has 99"):
        train.check_ids(rows, model)
