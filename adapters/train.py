"""How does training go? One optimizer step, and the loop around it.

A step is shaped for XLA: static shapes, no host read inside it; the learning rate, the clip factor and the step's
number are tensors, and `boundary` is the one place where a device may cut its graph. What a step computes depends on
the job and the step's number alone, so a run that was killed and resumed ends with the same bits.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.func import functional_call, vmap

import lora_fn
from adapters import bind, data, files, launch, models, optimizers, runs, schemes
from adapters import recompute as recomputing
from adapters.buckets import Buckets
from adapters.convert import table
from adapters.data import Rows
from adapters.launch import flag
from adapters.quantized import Bytes, base_bytes
from adapters.stack import stack
from lora_fn import (
    Axis,
    DataError,
    LoraSpec,
    SpecError,
    collectives,
    cost,
    peft_format,
    starts,
)
from lora_fn.axis import axis_of_mesh
from lora_fn.cross_entropy import vocab_parallel_cross_entropy
from lora_fn.dropout import fold_in
from lora_fn.errors import Problems
from lora_fn.gradients import Tree
from lora_fn.layer_spec import CODES, LayerSpec
from lora_fn.machines import Machine
from lora_fn.optimizers import check_lorafa


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One run of fine-tuning: everything that its result depends on, and where it goes.

    Args:
        model: Directory of a Hugging Face model.
        data: Files to train on (see `adapters.data`).
        output: Directory to write; the adapter, `log.jsonl`, `loss.png`, `checkpoints/`.
        lora: The adapter. With `adapter`, that adapter's own spec is taken instead.
        adapter: Directory of a PEFT adapter to go on from.
        eval_data: Files to evaluate on; empty: a part of `data` is held out.
        held_out: That part, a fraction.
        tp, dp: Processes along the axes "tp" (the model is cut) and "dp" (the data is).
        sequence_parallel: Cut the sequence between row and column layers.
        fuse_qkv, fuse_gate_up: One projection in place of three, of two (see `adapters.models.load`).
        kv_size_multiplier: Copies of each key-value head; None for as many as `tp` needs.
        device: "cpu" (gloo), "cuda" (nccl) or "xla" (Trainium, torch_xla).
        dtype: Of the base: "float32" or "bfloat16"; None for that of the file. Factors are float32.
        quantize: "nf4", "int8" or "fp8": how the base's linear layers are held (see `adapters.quantized`); None: plain.
        sequence_length: Tokens per row.
        batch_size: Rows per optimizer step, over all processes and microbatches.
        accumulation: Microbatches per step.
        steps: Optimizer steps.
        learning_rate: Its peak.
        warmup: Steps of linear warm-up; then a cosine to zero, which the step after the last would have.
        weight_decay, beta1, beta2: Of AdamW.
        max_grad_norm: Gradients are clipped to this norm.
        activation_checkpointing: Compute each decoder layer again in the backward instead of saving what is inside.
        recompute: "elementwise": compute in the backward again what is elementwise (see `adapters.recompute`).
        scheme: "rank": factors are cut over the rank where they can be (see `adapters.wrap`); "auto": in the layers
            where `machine` takes the fewest seconds so (see `lora_fn.cost`); None: as the rules table says.
        machine: Whose constants "auto" counts with.
        seed: Of the factors, the order of the rows, and dropout.
        eval_every: Steps between evaluations; 0 for before and after only.
        checkpoint_every: Steps between checkpoints; 0 for none.
        keep_checkpoints: How many of the last are kept.
        log_every: Steps between lines of the log; each is a host read.
        loraplus_lr_ratio: LoRA+: how many times as fast as lora_A lora_B moves (see `lora_fn.parameter_groups`).
        loraplus_lr_embedding: LoRA+: the peak of the rate of embeddings' factors.
        lorafa: LoRA-FA: lora_A is frozen, and the gradient of lora_B corrected (see `lora_fn.lorafa_corrections`).
        zero1: Shard the optimizer's state over "dp"; no bit of the result depends on it.
        init_batches: Of "eva", "corda" and "lora_ga": how many steps' rows the adapter's start looks at.

    Raises:
        SpecError: Values that cannot be, all of them at once.
    """

    model: str
    data: tuple[str, ...]
    output: str
    lora: LoraSpec = field(default_factory=LoraSpec)
    adapter: str | None = None
    eval_data: tuple[str, ...] = ()
    held_out: float = 0.1
    tp: int = 1
    dp: int = 1
    sequence_parallel: bool = False
    fuse_qkv: bool = False
    fuse_gate_up: bool = False
    kv_size_multiplier: int | None = None
    device: str = "cpu"
    dtype: str | None = None
    quantize: str | None = None
    sequence_length: int = 512
    batch_size: int = 8
    accumulation: int = 1
    steps: int = 100
    learning_rate: float = 2e-4
    warmup: int = 10
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.999
    max_grad_norm: float = 1.0
    loraplus_lr_ratio: float | None = None
    loraplus_lr_embedding: float = 1e-6
    lorafa: bool = False
    zero1: bool = False
    activation_checkpointing: bool = False
    recompute: str | None = None
    scheme: str | None = None
    machine: Machine | None = None
    seed: int = 0
    eval_every: int = 0
    checkpoint_every: int = 50
    keep_checkpoints: int = 2
    log_every: int = 1
    init_batches: int = 8

    def __post_init__(self) -> None:
        problems = Problems(SpecError)
        for name in (
            "tp",
            "dp",
            "batch_size",
            "accumulation",
            "steps",
            "keep_checkpoints",
            "log_every",
            "init_batches",
        ):
            if getattr(self, name) < 1:
                problems.add(flag(name), f"is {getattr(self, name)}, expected at least 1.")
        for name in ("warmup", "eval_every", "checkpoint_every", "weight_decay"):
            if not 0 <= getattr(self, name) < math.inf:
                problems.add(flag(name), f"is {getattr(self, name)}, expected a finite number of at least 0.")
        for name in ("learning_rate", "max_grad_norm", "loraplus_lr_ratio", "loraplus_lr_embedding"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                problems.add(flag(name), f"is {getattr(self, name)}, expected a finite number above 0.")
        for name in ("beta1", "beta2", "held_out"):
            if not 0 <= getattr(self, name) < 1:
                problems.add(flag(name), f"is {getattr(self, name)}, expected at least 0 and below 1.")
        if self.lorafa and self.loraplus_lr_ratio is not None:
            problems.add(
                flag("lorafa"), f"cannot be with {flag('loraplus_lr_ratio')}, for it trains no lora_A; choose one."
            )
        if self.zero1 and self.device == "xla":
            problems.add(
                flag("zero1"),
                "cannot be with --device xla, which torch's sharded optimizer does not know; leave it out, or use "
                "neuronx-distributed's (examples/train_nxd.py).",
            )
        if self.recompute is not None and self.recompute not in recomputing.POLICIES:
            problems.add(
                flag("recompute"), f"is {self.recompute!r}, expected one of {', '.join(recomputing.POLICIES)}."
            )
        if self.recompute is not None and self.activation_checkpointing:
            problems.add(
                flag("recompute"),
                f"cannot be with {flag('activation_checkpointing')}, which computes all of a layer again; choose one.",
            )
        if self.scheme is not None and self.scheme not in schemes.WORDS:
            problems.add(flag("scheme"), f"is {self.scheme!r}, expected one of {', '.join(schemes.WORDS)}.")
        if self.scheme == schemes.AUTO and self.machine is None:
            problems.add(
                flag("scheme"), f"is {self.scheme!r}, which needs {flag('machine')}; say whose constants count."
            )
        if self.scheme != schemes.AUTO and self.machine is not None:
            problems.add(flag("machine"), f"is for {flag('scheme')} {schemes.AUTO}; leave it out.")
        if self.sequence_length < 2:
            problems.add(flag("sequence_length"), f"is {self.sequence_length}, expected at least 2.")
        if self.dtype is not None and self.dtype not in models.DTYPES:
            problems.add(flag("dtype"), f"is {self.dtype!r}, expected one of {', '.join(models.DTYPES)}.")
        if self.quantize is not None and self.quantize not in CODES:
            problems.add(flag("quantize"), f"is {self.quantize!r}, expected one of {', '.join(CODES)}.")
        if self.device not in launch.BACKENDS:
            problems.add(flag("device"), f"is {self.device!r}, expected one of {', '.join(launch.BACKENDS)}.")
        if not self.data:
            problems.add(flag("data"), "names no file; name at least one.")
        parts = self.dp * self.accumulation
        if parts > 0 and self.batch_size % parts:
            problems.add(
                flag("batch_size"),
                f"is {self.batch_size}, which dp {self.dp} x accumulation {self.accumulation} do not divide; "
                f"choose a multiple of {parts}.",
            )
        problems.raise_if_any()

    @property
    def form(self) -> models.Form:
        """What of the model is fused."""
        return models.Form(**{f.name: getattr(self, f.name) for f in fields(models.Form)})

    @property
    def axes(self) -> dict[str, int]:
        """The axes of the job's mesh and their sizes."""
        return {"dp": self.dp, "tp": self.tp}

    @property
    def processes(self) -> int:
        """How many processes the job takes."""
        return self.tp * self.dp

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self) | {"lora": self.lora.to_dict(), "data": list(self.data), "eval_data": list(self.eval_data)}


# What a resumed run may change: where things are, how often they are looked at, how the work is cut (which changes
# results by rounding only); never what is computed.
FREE = (
    *("output", "eval_every", "checkpoint_every", "keep_checkpoints", "log_every"),
    *("zero1", "tp", "dp", "sequence_parallel", "accumulation", "fuse_qkv", "fuse_gate_up", "kv_size_multiplier"),
    *("recompute", "scheme", "machine"),
)


def train_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Sequence[Mapping[str, Tensor]],
    *,
    num_targets: Tensor,
    key: Tensor,
    tp: Axis,
    dp: Axis,
    max_grad_norm: float,
    corrections: Tree | None = None,
) -> tuple[Tensor, Tensor]:
    """One optimizer step of a wrapped model whose logits are sharded over the vocabulary.

    The loss is the mean over all target tokens of the step: every microbatch's sum is divided by their number, and
    gradients are summed over microbatches and "dp". Each of K adapters has a loss, masks and a norm of its own.

    Args:
        model: From `models.load` and `wrap(gradients="deferred")`; or with K adapters (`ManyAdapters`), one chosen for
            each K-th part of the rows.
        optimizer: Over the factors.
        batches: This process's microbatches: `input_ids`, `labels` (shifted), `position_ids`, `document_ids`, [B, S];
            of K adapters [K * B, S].
        num_targets: [] or [K], the number of targets in the whole step.
        key: int tensor [] or [K] of this step.
        tp, dp: The axes, bound.
        max_grad_norm: The bound on the gradients' norm.
        corrections: Of LoRA-FA, from `lora_fn.lorafa_corrections`.

    Returns:
        The step's loss and the gradients' norm before clipping, [] or [K], the same on every process.
    """
    factors, specs = bind.factors(model), bind.specs(model)
    device = num_targets.device
    place, total, grads = place_on(tp, device), torch.zeros_like(num_targets), None
    for number, batch in enumerate(batches):
        bind.set_dropout_key(model, fold_in(key, place_on(dp, device).reshape(()) + number * dp.size))
        last = Buckets(factors, specs, grads, index=place) if number + 1 == len(batches) else None
        value, new = lora_fn.value_and_grad(_loss, ready=last)(factors, model, batch, num_targets, tp)
        total = total + value
        if last is not None:
            grads = last.finish(new)
        else:
            grads = new if grads is None else {p: {n: grads[p][n] + g for n, g in of.items()} for p, of in new.items()}
    assert grads is not None
    names = [(path, name) for path, of in grads.items() for name in of]
    *sums, total = collectives.reduce_flat([*(grads[p][n] for p, n in names), total], dp)
    grads = {path: {} for path in grads}
    for (path, name), g in zip(names, sums, strict=True):
        grads[path][name] = g

    def ready(grads: Tree) -> tuple[Tree, Tensor]:
        norm = lora_fn.grad_norm(grads, specs, index=place)
        return lora_fn.clip(grads, norm, max_grad_norm), norm

    clipped, norm = (vmap if num_targets.dim() else _one)(ready)(grads)
    for path, of in lora_fn.lorafa_gradients(clipped, corrections or {}).items():
        for name, g in of.items():
            factors[path][name].grad = g
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return total, norm


def _one(function: Callable[..., Any]) -> Callable[..., Any]:
    """What `vmap` is to many adapters, of one."""
    return function


def _loss(
    factors: Mapping[str, Mapping[str, Tensor]], model: nn.Module, batch: Mapping[str, Tensor], num: Tensor, tp: Axis
) -> Tensor:
    return losses(model, bind.named(model, factors), batch, tp).reshape(*num.shape, -1).sum(-1) / num


def losses(model: nn.Module, params: Mapping[str, Tensor], batch: Mapping[str, Tensor], tp: Axis) -> Tensor:
    """The loss of every token of a batch, [B, S], zero where there is no target. Attention stays inside documents."""
    dtype = model.model.embed_tokens.weight.dtype  # type: ignore[union-attr]
    if bind.is_gated(model):
        bind.set_invocation(model, batch["input_ids"], documents=batch["document_ids"])
    inputs = {
        "input_ids": batch["input_ids"],
        "position_ids": batch["position_ids"],
        "attention_mask": data.attention_mask(batch["document_ids"], dtype),  # type: ignore[arg-type]
        "use_cache": False,
    }
    logits = functional_call(model, dict(params), kwargs=inputs).logits
    return vocab_parallel_cross_entropy(
        logits,
        batch["labels"],
        tp,
        vocab_size=model.config.vocab_size,  # type: ignore[arg-type, union-attr]
        index=place_on(tp, logits.device),
    )


def place_on(axis: Axis, device: torch.device) -> Tensor:
    """This process's place on a bound axis, int [1]: data, so that all processes trace the same graph."""
    return torch.tensor([axis.index or 0], device=device)


def number_on(value: float, device: torch.device) -> Tensor:
    """A number as a scalar [] of a device. (Given as one, XLA writes 0 and 1 into its graphs: others are compiled.)"""
    return numbers_on([value], (), device)


def numbers_on(values: Sequence[float], shape: tuple[int, ...], device: torch.device) -> Tensor:
    """Numbers as a tensor of a shape on a device."""
    return torch.tensor(list(values), device=device).reshape(shape)


def schedule(job: Job, step: Tensor) -> Tensor:
    """The part of its peak that a rate has at step `step` [] (from 0): linear warm-up, then a cosine, zero after the
    last."""
    done = step.to(torch.float32)
    warm = (done + 1) / max(job.warmup, 1)
    progress = ((done - job.warmup) / max(job.steps - job.warmup, 1)).clamp(0, 1)
    cosine = 0.5 * (1 + torch.cos(math.pi * progress))
    return torch.where(done < job.warmup, warm, cosine)


def learning_rate(job: Job, step: Tensor) -> Tensor:
    """The rate of step `step` [] (from 0)."""
    return job.learning_rate * schedule(job, step)


def make_optimizer(model: nn.Module, job: Job, dp: dist.ProcessGroup | None = None) -> torch.optim.Optimizer:
    """AdamW over what is trained of a wrapped model, in the groups that the job asks for.

    Args:
        model: The model.
        job: The job.
        dp: The processes that the optimizer's state is sharded over; None: this one holds all of it.

    Raises:
        SpecError: As `optimizers.adamw`.
    """
    trained = bind.factors(model)
    groups: list[dict[str, Any]] = [
        {
            "params": [p for of in trained.values() for p in of.values()],
            "initial_lr": job.learning_rate,
            "weight_decay": job.weight_decay,
        }
    ]
    if job.loraplus_lr_ratio is not None:
        groups = lora_fn.parameter_groups(
            trained,
            bind.specs(model),
            lr=job.learning_rate,
            lr_ratio=job.loraplus_lr_ratio,
            lr_embedding=job.loraplus_lr_embedding,
            weight_decay=job.weight_decay,
        )
    return optimizers.adamw(groups, betas=(job.beta1, job.beta2), dp=dp)


def state_group(job: Job, mesh: DeviceMesh | None) -> dist.ProcessGroup | None:
    """The processes that the optimizer's state is sharded over; None where each holds all of it."""
    return mesh.get_group("dp") if mesh is not None and job.zero1 else None


def corrections(model: nn.Module, job: Job, tp: Axis) -> dict[str, dict[str, Tensor]]:
    """Of LoRA-FA, what gradients of lora_B are corrected with; {} of another job."""
    if not job.lorafa:
        return {}
    params = {path: layer.params() for path, layer in bind.layers(model).items()}
    device = next(model.parameters()).device
    return lora_fn.lorafa_corrections(params, bind.specs(model), index=place_on(tp, device))


def boundary(device: torch.device) -> None:
    """The end of a step: where XLA cuts its graph. On CPU and CUDA there is nothing to do."""
    if device.type == "xla":
        import torch_xla

        torch_xla.sync()


def evaluate(model: nn.Module, rows: Sequence[Rows], job: Job, tp: Axis, dp: Axis) -> list[float | None]:
    """The mean loss over all targets of held-out rows, of each adapter on the model; None where there are none.

    Args:
        model: As for `train_step`.
        rows: Those of each adapter.
        job: What all have in common.
        tp, dp: The axes, bound.
    """
    micro = job.batch_size // job.accumulation // job.dp
    num = max(len(of["labels"]) for of in rows)
    num += -num % (micro * dp.size)
    padded = [data.pad_rows(of, num_rows=num) for of in rows]
    nums = [data.num_targets(of, np.arange(num)) for of in padded]
    model.eval()
    device = next(model.parameters()).device
    total = torch.zeros(len(rows), device=device)
    boundary(device)  # so that it is data in the first graph too
    with torch.no_grad():
        for start in range(0, num, micro * dp.size):
            indices = np.arange(start, start + micro * dp.size)
            [batch] = step_batches(padded, [indices] * len(rows), 1, dp)
            total = total + losses(model, {}, _to(batch, device), tp).reshape(len(rows), -1).sum(1)
            boundary(device)
        [total] = collectives.reduce_flat([total], dp)
    return [loss / num if num else None for loss, num in zip(total.tolist(), nums, strict=True)]


def step_batches(
    rows: Sequence[Rows], indices: Sequence[np.ndarray], accumulation: int, dp: Axis
) -> list[dict[str, Tensor]]:
    """This process's microbatches of a step, with the rows of each adapter one after the other."""
    where = {"accumulation": accumulation, "dp_size": dp.size, "dp_index": dp.index or 0}
    each = [data.microbatches(of, chosen, **where) for of, chosen in zip(rows, indices, strict=True)]
    return [{name: torch.cat([batch[name] for batch in of]) for name in of[0]} for of in zip(*each, strict=True)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """What one adapter on a model is trained by: its job, its rows, and its log on the process that writes it."""

    job: Job
    rows: data.TrainingData
    log: runs.Log | None


def measure(model: nn.Module, tasks: Sequence[Task], step: int, tp: Axis, dp: Axis) -> list[float | None]:
    """`evaluate` on each task's held-out rows, into its log."""
    found = evaluate(model, [task.rows.held_out for task in tasks], tasks[0].job, tp, dp)
    for task, loss in zip(tasks, found, strict=True):
        if task.log:
            task.log.write({"kind": "eval", "step": step, "loss": loss})
    return found


def run_steps(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    tasks: Sequence[Task],
    *,
    tp: Axis,
    dp: Axis,
    bar: runs.Progress,
    shape: tuple[int, ...] = (),
    start: int = 0,
    after: Callable[[int], None] = lambda done: None,
    corrections: Mapping[str, Mapping[str, Tensor]] | None = None,
) -> list[float]:
    """The loop.

    Args:
        model, optimizer: As for `train_step`.
        tasks: Of each adapter on the model; their jobs differ in data, seed and learning rate only. The optimizer is
            given the largest rate.
        tp, dp: The axes, bound.
        bar: What is shown.
        shape: (), or (K,) where the factors are stacked.
        start: Steps done before.
        after: Called after each step, with the number of steps done.
        corrections: As for `train_step`.

    Returns:
        Every task's last loss; nothing where no step was left to do.
    """
    job, device = max((task.job for task in tasks), key=lambda job: job.learning_rate), next(model.parameters()).device
    trained, step, found = [task.rows.train for task in tasks], number_on(start, device), []
    key = numbers_on([task.job.seed & 0x7FFFFFFF for task in tasks], shape, device)
    boundary(device)  # what the first step begins with is data, as for the others: one graph for all steps
    for number in range(start, job.steps):
        indices = [
            data.step_rows(
                number, num_rows=len(task.rows.train["labels"]), rows_per_step=job.batch_size, seed=task.job.seed
            )
            for task in tasks
        ]
        batches = step_batches(trained, indices, job.accumulation, dp)
        nums = [float(data.num_targets(of, chosen)) for of, chosen in zip(trained, indices, strict=True)]
        rate, part = learning_rate(job, step), schedule(job, step)
        for group in optimizer.param_groups:
            group["lr"].copy_(group["initial_lr"] * part)
        model.train()
        loss, norm = train_step(
            model,
            optimizer,
            [_to(batch, device) for batch in batches],
            num_targets=numbers_on(nums, shape, device),
            key=fold_in(key, step),
            tp=tp,
            dp=dp,
            max_grad_norm=job.max_grad_norm,
            corrections=corrections,
        )
        step = step + 1
        boundary(device)
        done = number + 1
        if done == job.steps:
            found = loss.reshape(-1).tolist()
        if tasks[0].log and (done % job.log_every == 0 or done == job.steps):
            speed = bar.rate(done, job.batch_size * job.sequence_length)
            more: dict[str, Any] = {"tokens_per_second": speed}
            if job.loraplus_lr_ratio is not None:
                more["group_lr"] = {group["name"]: float(group["lr"]) for group in optimizer.param_groups}
            lines = [
                {"kind": "train", "step": done, "loss": of, "lr": own, "grad_norm": size} | more
                for of, own, size in zip(
                    loss.reshape(-1).tolist(),
                    [float(rate) * (task.job.learning_rate / job.learning_rate) for task in tasks],
                    norm.reshape(-1).tolist(),
                    strict=True,
                )
            ]
            for task, line in zip(tasks, lines, strict=True):
                if task.log:
                    task.log.write(line)
            bar.show(done, lines)
        if done < job.steps and job.eval_every and done % job.eval_every == 0:
            measure(model, tasks, done, tp, dp)
        after(done)
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What a run came to: held-out loss before and after (None without held-out rows), the last step's loss, and the
    bytes of the base on one process."""

    loss_before: float | None
    loss_after: float | None
    train_loss: float
    base: Bytes


def finetune(job: Job, *, resume: bool = False, quiet: bool = False) -> Result:
    """Run a job in this process, one of `job.processes` that torch's elastic launcher (or torchrun) started.

    Args:
        job: The job.
        resume: Go on from the last checkpoint in `job.output`, bit for bit.
        quiet: No progress bar.

    Returns:
        The result, the same on every process.

    Raises:
        LoraFnError: Bad input, before anything is written.
    """
    with runs.Run(Path(job.output)) as run:
        return _finetune(job, run, resume=resume, quiet=quiet)


def _finetune(job: Job, run: runs.Run, *, resume: bool, quiet: bool) -> Result:
    mesh, device = launch.mesh(job.axes, job.device), launch.process_device(job.device)
    tp, dp = axes_of(mesh)
    first = launch.is_first()
    with launch.together((tp, dp), device):
        check(job, resume=resume)
        rows = read_rows(job, disable=quiet or not first)
        model = load_model(job, mesh, device, rows)
        optimizer = make_optimizer(model, job, state_group(job, mesh))
    facts = facts_of(job, rows, model)
    with launch.together((tp, dp), device):
        if first:
            run.begin(job.to_dict(), facts, resume=resume)
    if first and job.scheme == schemes.AUTO:
        print(table(schemes.told(bind.specs(model), choice_of(job))), flush=True)
    with launch.together((tp, dp), device):
        start = runs.restore(run, model, optimizer, facts) if resume else 0
        kept = runs.kept_log(run, start=start, steps=job.steps)
    corrected = corrections(model, job, tp)
    task = Task(job=job, rows=rows, log=runs.Log(run, kept) if first else None)
    [before] = measure(model, [task], 0, tp, dp) if start == 0 else runs.logged(kept, "eval")[:1]

    def after_step(done: int) -> None:
        if job.checkpoint_every and (done % job.checkpoint_every == 0 or done == job.steps):
            with launch.together((tp, dp), device):
                snapshot = runs.take(run, model, optimizer, facts, step=done, tp=tp, dp=dp)
            runs.store(run, snapshot, keep=job.keep_checkpoints)

    with runs.Progress(total=job.steps, start=start, disable=quiet or not first) as bar:
        found = run_steps(
            model, optimizer, [task], tp=tp, dp=dp, bar=bar, start=start, after=after_step, corrections=corrected
        )
    [after] = measure(model, [task], job.steps, tp, dp)
    with launch.together((tp, dp), device):
        run.settle()
    files.save(model, run.directory, as_lora=_is_residual(bind.lora_spec(model)))
    if first:
        runs.plot(run, title=f"{Path(job.model).name}, rank {job.lora.rank}, tp {job.tp}, dp {job.dp}")
    collectives.barrier()
    loss = (found or runs.logged(kept, "train") or [math.nan])[-1]
    return Result(loss_before=before, loss_after=after, train_loss=loss, base=base_of(model))


def base_of(model: nn.Module) -> Bytes:
    """What the base takes."""
    return base_bytes(model, model.model.embed_tokens.weight.dtype)  # type: ignore[union-attr, arg-type]


def read_rows(job: Job, *, disable: bool) -> data.TrainingData:
    """A job's data as rows.

    Raises:
        LoraFnError: As `data.load` and `load_tokenizer`.
    """
    return data.load(
        job.data,
        models.load_tokenizer(Path(job.model)),
        sequence_length=job.sequence_length,
        seed=job.seed,
        held_out=job.held_out,
        eval_paths=job.eval_data,
        disable=disable,
    )


def facts_of(job: Job, rows: data.TrainingData, model: nn.Module) -> dict[str, str]:
    """What a run's result depends on, beside its job."""
    return {
        "model": models.fingerprint(job.model),
        "data": data.fingerprint(rows.train) + data.fingerprint(rows.held_out),
        "factors": _shapes(model),
    }


def check(job: Job, *, resume: bool) -> None:
    """Refuse what can be seen without starting processes: the output, the files, the model, its sizes, the targets.

    Raises:
        LoraFnError: Bad input; nothing was written.
    """
    launch.check_device(job.device)
    before = runs.Run(Path(job.output)).check(job.to_dict(), free=FREE, resume=resume)
    check_masks(job, before)
    check_data(job)
    spec, model = asked(job), outline(job)
    planned = bind.plan(model, spec, scheme=scheme_of(job))
    if job.lorafa:
        check_lorafa(planned, init_lora_weights=None if job.adapter else spec.init_lora_weights)
    if _is_residual(spec):
        files.plain(spec)
    models.load_tokenizer(Path(job.model))


def choice_of(job: Job) -> Callable[[LayerSpec], cost.Choice]:
    """What each layer's scheme would cost in a microbatch of a job that has a machine."""
    assert job.machine is not None
    itemsize = models.itemsize(job.model) if job.dtype is None else models.DTYPES[job.dtype].itemsize
    return functools.partial(
        schemes.cheapest,
        machine=job.machine,
        tokens=job.batch_size // (job.dp * job.accumulation) * job.sequence_length,
        itemsize=itemsize,
        microbatches=job.accumulation,
        sequence_parallel=job.sequence_parallel,
    )


def scheme_of(job: Job) -> schemes.Scheme:
    """The scheme that is asked of a layer: the job's, or the layer's cheapest."""
    if job.scheme != schemes.AUTO:
        return job.scheme
    choice = choice_of(job)
    return lambda layer: choice(layer).scheme


def check_data(job: Job) -> None:
    """Refuse data that is not there.

    Raises:
        DataError: As said.
    """
    for file in (*job.data, *job.eval_data):
        if not Path(file).is_file():
            raise DataError(f"{file}: is not there, expected a file; correct the path.")


def outline(job: Job) -> nn.Module:
    """The job's model without its weights, of one process, stacked as its adapter asks.

    Raises:
        LoraFnError: A model that is not whole, or cannot be cut so.
    """
    how: dict[str, Any] = {"quantize": job.quantize, "sequence_parallel": job.sequence_parallel}
    model = models.outline(job.model, axis=Axis(size=job.tp), form=job.form, **how)
    models.check_files(model, job.model)
    stack(model, asked(job).layer_replication)
    return model


def check_masks(job: Job, before: Mapping[str, Any]) -> None:
    """Refuse to go on with other microbatches than a run had, where dropout's masks depend on them.

    Args:
        job: The job.
        before: What `Run.check` returned.

    Raises:
        SpecError: As said.
    """
    spec = asked(job)
    was, now = before.get("dp", job.dp) * before.get("accumulation", job.accumulation), job.dp * job.accumulation
    if spec.dropout and was != now:
        raise SpecError(
            f"{flag('dp')} x {flag('accumulation')}: is {now}, and the run began with {was}, which its dropout masks "
            f"depend on; keep the product."
        )


def load_model(
    job: Job, mesh: DeviceMesh | None, device: torch.device, rows: data.TrainingData | None = None
) -> nn.Module:
    """The job's model, parallel and adapted, with the job's factors; those that start from data take it from `rows`."""
    spec, model = asked(job), load_base(job, mesh, device)
    if rows is not None:
        check_ids(rows, model)
    adapt(model, job, spec, rows, axes_of(mesh)[0])
    compute_again(model, job)
    return model


def load_base(job: Job, mesh: DeviceMesh | None, device: torch.device) -> nn.Module:
    """The job's model, parallel, with no adapter on it.

    Raises:
        LoraFnError: As `models.load`.
        SpecError: A model that drops attention's weights.
        TargetError: A model in which there is nothing to recompute, if the job asks for that.
    """
    model = models.load(
        job.model,
        mesh=mesh,
        dtype=None if job.dtype is None else models.DTYPES[job.dtype],
        device=device,
        sequence_parallel=job.sequence_parallel,
        quantize=job.quantize,
        **asdict(job.form),
    )
    if model.config.attention_dropout:  # type: ignore[union-attr]
        raise SpecError(
            f"{job.model}/config.json: attention_dropout is {model.config.attention_dropout}, expected 0 "  # type: ignore[union-attr]
            f"(its masks would not be the same at every tp); set it to 0, and use --dropout."
        )
    recomputing.check(model, job.recompute)
    return model


def compute_again(model: nn.Module, job: Job) -> None:
    """Have the backward compute what is inside of decoder layers again, all or a part, where the job asks for it."""
    recomputing.put_on(model, job.recompute)
    if job.activation_checkpointing:
        _ACTIVATION_CHECKPOINTING[hasattr(model, "activation_checkpointing_enable")](model)
    if job.activation_checkpointing and job.device == "xla":
        for layer in model.model.layers:  # type: ignore[union-attr]
            layer._gradient_checkpointing_func = _computed_again


def adapt(model: nn.Module, job: Job, spec: LoraSpec, rows: data.TrainingData | None, tp: Axis) -> None:
    """Wrap the job's model, with the factors that the job begins with."""
    bind.wrap(
        model,
        _named(spec, job),
        seed=job.seed,
        gradients="deferred",
        scheme=scheme_of(job),
        batches=None if rows is None else initial_batches(job, rows, next(model.parameters()).device),
        step=functools.partial(_initial_loss, tp=tp),
    )
    if job.adapter:
        files.load(model, job.adapter)
    if job.lorafa:
        bind.freeze(model, "lora_A")


def initial_batches(job: Job, rows: data.TrainingData, device: torch.device) -> Iterator[dict[str, Tensor]]:
    """What "eva", "corda" and "lora_ga" start from: the rows of the first steps, the same ones on every process."""
    for number in range(job.init_batches):
        indices = data.step_rows(
            number, num_rows=len(rows.train["labels"]), rows_per_step=job.batch_size, seed=job.seed
        )
        for batch in data.microbatches(
            rows.train, indices, accumulation=job.accumulation * job.dp, dp_size=1, dp_index=0
        ):
            given = {"attention_mask": batch["document_ids"] != data.PADDING_ID}
            yield _to(batch | given, device)


def _initial_loss(model: nn.Module, batch: Mapping[str, Tensor], *, tp: Axis) -> Tensor:
    """The mean loss over a batch's targets."""
    return losses(model, {}, batch, tp).sum() / (batch["labels"] != data.IGNORED).sum().clamp(min=1)


def asked(job: Job) -> LoraSpec:
    """The job's adapter: its own, or that of the adapter to go on from (whose files do not tell of a shared lora_A).

    Raises:
        TargetError: An adapter over a base that is not there.
    """
    if not job.adapter:
        return job.lora
    return replace(files.read_adapted(job.adapter), share_A=job.lora.share_A)


def _is_residual(spec: LoraSpec) -> bool:
    """Whether the base is not the files' own while the adapter is trained, which is then written as a plain one."""
    return starts.start_of(spec.init_lora_weights).base == starts.RESIDUAL


def _named(spec: LoraSpec, job: Job) -> LoraSpec:
    values = {f.name: getattr(spec, f.name) for f in fields(spec)}
    return LoraSpec(**values | {"base_model_name_or_path": job.model, "task_type": "CAUSAL_LM"})


def _activation_checkpointing(model: Any) -> None:
    """By the name of transformers 5, whose embeddings then want a gradient, which nothing that is not reentrant needs:
    the backward would go on below the first adapter."""
    model.activation_checkpointing_enable({"use_reentrant": False})
    model.disable_input_require_grads()


# transformers 5 renamed the method; 4.57 has the old name only.
_ACTIVATION_CHECKPOINTING: Mapping[bool, Callable[[Any], None]] = {
    False: lambda model: model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False}),
    True: _activation_checkpointing,
}


def _computed_again(function: Callable[..., Any], x: Tensor) -> Any:
    """function(x), computed again in the backward, on XLA.

    The second time starts from an x that waits for the gradient: XLA would find the same operations on the same x, and
    do them once. (torch's own `checkpoint` looks for a module torch.xla where a tensor of XLA is given to it.)
    """
    from torch.utils.checkpoint import checkpoint

    gradients: list[Tensor] = []

    def run() -> Any:
        return function(_after(gradients, x) if gradients else x)

    out = checkpoint(run, use_reentrant=False, preserve_rng_state=False)
    first = out if isinstance(out, Tensor) else out[0]
    if first.requires_grad:
        first.register_hook(gradients.append)
    return out


def _after(gradients: Sequence[Tensor], x: Tensor) -> Tensor:
    """x, which XLA computes with only when the gradients are there."""
    return recomputing.apart([x], gradients)[0].requires_grad_(x.requires_grad)


def _to(batch: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    return {name: t.to(device) for name, t in batch.items()}


def check_ids(rows: data.TrainingData, model: nn.Module) -> None:
    """Refuse tokens that the model has no embedding for.

    Raises:
        SpecError: The tokenizer is larger than the model's vocabulary.
    """
    size = model.config.vocab_size  # type: ignore[union-attr]
    top = max((int(r["input_ids"].max()) for r in (rows.train, rows.held_out) if len(r["input_ids"])), default=0)
    if top >= size:  # type: ignore[operator]
        raise SpecError(
            f"the data: holds token {top}, the model's vocabulary has {size}; use the model's own tokenizer."
        )


def axes_of(mesh: DeviceMesh | None) -> tuple[Axis, Axis]:
    """The axes "tp" and "dp" of a mesh, or of one process alone."""
    return (Axis(), Axis(name="dp")) if mesh is None else (axis_of_mesh(mesh, "tp"), axis_of_mesh(mesh, "dp"))


def _shapes(model: nn.Module) -> str:
    """The factors of a model, as text: what a checkpoint must fit, at any size of the axis."""
    return json.dumps(peft_format.shapes_on_disk(bind.specs(model)), sort_keys=True)
