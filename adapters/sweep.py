"""How are many adapters trained at once? A sweep: runs on one base, each as it would be alone, in one computation.

    OUTPUT/NAME/         what a run of its own leaves there: the adapter, run.json, log.jsonl; no checkpoints
    OUTPUT/sweep.json    the comparison
    OUTPUT/loss.png      the curves of all

The runs' factors stand stacked (`adapters.many`), and a step's batch holds the rows of each run, one after the other.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.optim import Optimizer

from adapters import bind, data, launch, models, runs, train
from adapters.bind import Adapter, LoraLayer
from adapters.convert import table
from adapters.many import ManyAdapters
from adapters.train import Job, Result, Task
from lora_fn import (
    Axis,
    FileError,
    LayerSpec,
    LoraFnError,
    LoraSpec,
    SpecError,
    checkpoint,
    collectives,
    many,
    peft_format,
    variants,
)
from lora_fn.errors import Problems
from lora_fn.spec import FREE_INITS
from lora_fn.values import are_names, are_targets, is_flag, is_integer, is_number

COMPARISON = "sweep.json"
NOT_MEASURED = "not measured"
NAME = "name"


@dataclass(frozen=True, slots=True, kw_only=True)
class Field:
    """What a run may have of its own.

    Args:
        words: What it must be.
        fits: The same, as a test of JSON's value whose lists are tuples.
        short: What stands before its value in the name of a run that has none.
        of_lora: Whether it is a field of `LoraSpec`; else of `Job`.
    """

    words: str
    fits: Callable[[Any], bool]
    short: str
    of_lora: bool = True


FIELDS: Mapping[str, Field] = {
    "rank": Field(words="a whole number", fits=is_integer, short="rank"),
    "alpha": Field(words="a number", fits=is_number, short="alpha"),
    "use_rslora": Field(words="true or false", fits=is_flag, short="rslora"),
    "target_modules": Field(words="a list of names, or a regular expression", fits=are_targets, short=""),
    "learning_rate": Field(words="a number", fits=is_number, short="lr", of_lora=False),
    "data": Field(
        words="a file, or a list of files",
        fits=lambda v: (isinstance(v, str) and v != "") or (are_names(v) and v != ()),
        short="",
        of_lora=False,
    ),
    "seed": Field(words="a whole number", fits=is_integer, short="seed", of_lora=False),
}


# ------------------------------------------------------------------------------------------------------- what is asked


def read(file: str | Path, options: Mapping[str, Any], *, at_once: int | None = None) -> dict[str, Job]:
    """The runs that a file asks for.

    Args:
        file: JSON: a list of objects, one for each run; or an object of lists, for every combination of their values.
            Of `FIELDS`, and in a list "name", which is made up of what differs where it is missing.
        options: Fields of `Job`, which all runs have but for their own; `output` holds the directories of the runs.
        at_once: As for `sweep`.

    Returns:
        {name: job}, in the order of the file.

    Raises:
        LoraFnError: What is wrong with the file, or with the options, all of it.
    """
    Job(**{**options, "data": options["data"] or ("",)})  # what is wrong with all is told once
    problems = Problems(SpecError)
    if at_once is not None and at_once < 1:
        problems.add("--sweep-at-once", f"is {at_once}, expected at least 1.")
    asked = _listed(checkpoint.read_any_json(Path(file)), str(file), problems)
    jobs: list[Job] = []
    for number, own in asked.items():
        where = f"{file}: run {number}"
        before = len(problems.found)
        for name in own if options.get("adapter") else ():
            if name in FIELDS and FIELDS[name].of_lora:
                problems.add(where, f"has {name!r}, but --adapter has one already; leave it out.")
        for name, value in own.items():
            _check_value(where, name, value, problems)
        if len(problems.found) == before:
            with _noting(problems, where):
                jobs.append(_job(own, options))
    problems.raise_if_any()
    names = [own.get(NAME) or _name_of(job, jobs) for own, job in zip(asked.values(), jobs, strict=True)]
    for number, name in zip(asked, names, strict=True):
        if Path(name).name != name or name.startswith(".") or name in (COMPARISON, runs.PLOT):
            problems.add(f"{file}: run {number}", f"would be called {name!r}, which names no new directory; rename it.")
        elif names.count(name) > 1:
            problems.add(f"{file}: run {number}", f"would be called {name!r}, as another is; give each its own name.")
    problems.raise_if_any()
    output = Path(options["output"])
    return {name: replace(job, output=str(output / name)) for name, job in zip(names, jobs, strict=True)}


def _listed(value: Any, where: str, problems: Problems) -> dict[int, dict[str, Any]]:
    """The objects of a file by their number, from 1; of a grid, all of its combinations."""
    if isinstance(value, dict):
        for name, values in value.items():
            if not isinstance(values, list) or not values:
                problems.add(where, f"{name!r} is {values!r}, expected a list of the values to try.")
        if NAME in value:
            problems.add(where, f"{NAME!r} is in a grid, whose runs have names of their own; leave it out.")
        problems.raise_if_any()
        value = [dict(zip(value, chosen, strict=True)) for chosen in itertools.product(*value.values())]
    if not isinstance(value, list) or not value:
        problems.add(where, f"holds {value!r}, expected a list of runs, or an object of lists.")
        problems.raise_if_any()
    found = {}
    for number, own in enumerate(value, 1):
        if isinstance(own, dict):
            found[number] = {name: tuple(v) if isinstance(v, list) else v for name, v in own.items()}
        else:
            problems.add(f"{where}: run {number}", f"is {own!r}, expected an object of {', '.join(FIELDS)}.")
    return found


def _check_value(where: str, name: str, value: Any, problems: Problems) -> None:
    known = {f.name for kind in (Job, LoraSpec) for f in fields(kind)}
    if name == NAME:
        if not isinstance(value, str) or not value:
            problems.add(where, f"{NAME!r} is {value!r}, expected text.")
    elif name not in FIELDS and name in known:
        problems.add(where, f"has {name!r}, which all runs of a sweep have in common; give it on the command line.")
    elif name not in FIELDS:
        problems.add(where, f"has {name!r}, expected one of {', '.join((NAME, *FIELDS))}.")
    elif not FIELDS[name].fits(value):
        problems.add(where, f"{name!r} is {value!r}, expected {FIELDS[name].words}.")


def _job(own: Mapping[str, Any], options: Mapping[str, Any]) -> Job:
    lora = {name: value for name, value in own.items() if name in FIELDS and FIELDS[name].of_lora}
    of_job = {name: value for name, value in own.items() if name in FIELDS and not FIELDS[name].of_lora}
    if isinstance(of_job.get("data"), str):
        of_job["data"] = (of_job["data"],)
    return Job(**{**options, **of_job, "lora": replace(options["lora"], **lora), "checkpoint_every": 0})


def _value(job: Job, name: str) -> Any:
    return getattr(job.lora if FIELDS[name].of_lora else job, name)


def _name_of(job: Job, jobs: Sequence[Job]) -> str:
    """The name of a run that has none: what it has of its own."""
    differ = [name for name in FIELDS if any(_value(other, name) != _value(job, name) for other in jobs)]
    return "-".join(f"{FIELDS[name].short}{_told(_value(job, name))}" for name in differ) or "run"


def _told(value: Any) -> str:
    if isinstance(value, tuple):
        return "+".join(Path(each).stem for each in value)
    return f"{value:g}" if is_number(value) else str(value)


# ----------------------------------------------------------------------------------------------------- what cannot be

# Field of a LoraSpec -> whether what it says concerns the base, or some tokens only: not so of one of many adapters.
_SHARED: Mapping[str, Callable[[LoraSpec], bool]] = {
    "init_lora_weights": lambda spec: spec.init_lora_weights not in FREE_INITS,
    "bias": lambda spec: spec.bias != "none",
    "modules_to_save": lambda spec: bool(spec.modules_to_save),
    "trainable_token_indices": lambda spec: bool(spec.trainable_token_indices),
    "ensure_weight_tying": lambda spec: spec.ensure_weight_tying,
    "target_parameters": lambda spec: bool(spec.target_parameters),
    "layer_replication": lambda spec: bool(spec.layer_replication),
    "kasa_config": lambda spec: variants.TABLE[spec.variant].lacks is not None,
    "alora_invocation_tokens": lambda spec: variants.TABLE[spec.variant].gated,
}


def check(jobs: Mapping[str, Job]) -> None:
    """Refuse what can be seen without starting processes, all of it at once.

    Args:
        jobs: From `read`.

    Raises:
        LoraFnError: Bad input; nothing was written.
    """
    problems, job = Problems(LoraFnError), next(iter(jobs.values()))
    with _noting(problems):
        launch.check_device(job.device)
    with _noting(problems):
        _check_output(Path(job.output).parent)
    for own in jobs.values():
        with _noting(problems):
            train.check_data(own)
    with _noting(problems):
        models.load_tokenizer(Path(job.model))
    model: nn.Module | None = None
    with _noting(problems):
        model = train.outline(job)
    for option in ("lorafa", "loraplus_lr_ratio", "scheme"):
        if getattr(job, option):
            problems.add(launch.flag(option), "is for adapters that are trained one by one; leave it or --sweep out.")
    plans: dict[str, dict[str, LayerSpec]] = {}
    told: dict[str, list[str]] = {}
    for name, own in jobs.items() if model is not None else ():
        try:
            plans[name] = _plan(model, train.asked(own))
        except LoraFnError as error:
            for line in str(error).splitlines():
                told.setdefault(line, []).append(name)
    for line, names in told.items():
        problems.found += [line] if len(names) == len(jobs) else [f"run {name}: {line}" for name in names]
    for path in dict.fromkeys(path for plan in plans.values() for path in plan):
        with _noting(problems, path):
            many.joint([plan[path] for plan in plans.values() if path in plan])
    problems.raise_if_any()


def _plan(model: nn.Module, spec: LoraSpec) -> dict[str, LayerSpec]:
    """The layers that a run adapts.

    Raises:
        LoraFnError: As `bind.plan`, or what does not go together with other adapters.
    """
    for field, shared in _SHARED.items():
        if shared(spec):
            raise SpecError(
                f"{field}: is {getattr(spec, field)!r}, which concerns the base or some of its tokens, and the base is "
                f"that of all runs; leave it out, or give each a lora-fn finetune of its own."
            )
    return bind.plan(model, spec)


@contextmanager
def _noting(problems: Problems, where: str = "") -> Iterator[None]:
    """Note the problems that come up, each once."""
    try:
        yield
    except LoraFnError as error:
        for line in str(error).splitlines():
            told = f"{where}: {line}" if where else line
            if told not in problems.found:
                problems.found.append(told)


def _check_output(output: Path) -> None:
    checkpoint.check_above(output)
    if output.is_file():
        raise FileError(f"{output}: is a file; choose a directory.")
    if output.is_dir() and any(output.iterdir()):
        raise FileError(f"{output}: exists and is not empty; choose another --output.")


# -------------------------------------------------------------------------------------------------------- the training


@dataclass(frozen=True, slots=True, kw_only=True)
class Done:
    """What a sweep came to.

    Args:
        jobs: Of each run, the best first.
        results: Of each run, in the same order.
        diverged: Runs whose factors are not finite, and were not written.
        same_held_out: Whether all were measured on the same rows.
    """

    jobs: Mapping[str, Job]
    results: Mapping[str, Result]
    diverged: tuple[str, ...]
    same_held_out: bool

    def rows(self) -> list[dict[str, Any]]:
        """The comparison: one row of values for each run."""
        return [
            {
                NAME: name,
                "rank": job.lora.rank,
                "alpha": job.lora.alpha,
                "learning_rate": job.learning_rate,
                "data": list(job.data),
                "seed": job.seed,
                "loss_before": _finite(self.results[name].loss_before),
                "loss_after": _finite(self.results[name].loss_after),
                "train_loss": _finite(self.results[name].train_loss),
                "diverged": name in self.diverged,
            }
            for name, job in self.jobs.items()
        ]

    def table(self) -> str:
        """The comparison for people."""
        head = [
            "name",
            "rank",
            "alpha",
            "learning rate",
            "data",
            "held out, before",
            "held out, after",
            "last training",
        ]
        told = [
            [
                *(row[NAME], row["rank"], f"{row['alpha']:g}", f"{row['learning_rate']:g}"),
                " ".join(Path(file).name for file in row["data"]),
                *(
                    ("diverged" if row["diverged"] else NOT_MEASURED) if row[loss] is None else f"{row[loss]:.4f}"
                    for loss in ("loss_before", "loss_after", "train_loss")
                ),
            ]
            for row in self.rows()
        ]
        return table([head, *told])


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def sweep(jobs: Mapping[str, Job], *, at_once: int | None = None, quiet: bool = False) -> Done:
    """Run the jobs in this process, one of those that `train.finetune` of one of them would take.

    Args:
        jobs: From `read`.
        at_once: How many are trained in one computation, whose activations take as many times the memory; None for all.
        quiet: No progress bar.

    Returns:
        The comparison, the same on every process.

    Raises:
        LoraFnError: Bad input, before anything is written.
    """
    first, job = launch.is_first(), next(iter(jobs.values()))
    output, names, results, diverged = Path(job.output).parent, [*jobs], dict[str, Result](), list[str]()
    mesh, device = launch.mesh(job.axes, job.device), launch.process_device(job.device)
    tp, dp = train.axes_of(mesh)
    with launch.together((tp, dp), device):
        check(jobs)
        rows = _read_rows(jobs, disable=quiet or not launch.is_first())
        model = train.load_base(job, mesh, device)
        for own in rows.values():
            train.check_ids(own, model)
    train.compute_again(model, job)
    with ExitStack() as stack:
        directories = {name: stack.enter_context(runs.Run(Path(own.output))) for name, own in jobs.items()}
        for start in range(0, len(names), at_once or len(names)):
            group = {name: jobs[name] for name in names[start : start + (at_once or len(names))]}
            disable = quiet or not launch.is_first()
            found, bad = _train(model, group, rows, directories, mesh, disable=disable)
            results |= found
            diverged += bad
        best = sorted(names, key=lambda name: _order(results[name]))
        told = {data.fingerprint(own.held_out) for own in rows.values()}
        done = Done(
            jobs={name: jobs[name] for name in best},
            results={name: results[name] for name in best},
            diverged=tuple(diverged),
            same_held_out=len(told) == 1,
        )
        if first:
            checkpoint.write_json(output / COMPARISON, {"runs": done.rows()})
            title = f"{Path(job.model).name}, {len(jobs)} runs, tp {job.tp}, dp {job.dp}"
            runs.compare(output, {name: directories[name] for name in best}, title=title)
    collectives.barrier()
    return done


def _order(result: Result) -> tuple[bool, float]:
    """The best first: by held-out loss, or where there is none by training's; what diverged last."""
    loss = result.train_loss if result.loss_after is None else result.loss_after
    return not math.isfinite(loss), loss


def _read_rows(jobs: Mapping[str, Job], *, disable: bool) -> dict[str, data.TrainingData]:
    """The rows of each run; equal ones are read once."""
    read: dict[Any, data.TrainingData] = {}
    for job in jobs.values():
        if (job.data, job.seed) not in read:
            read[job.data, job.seed] = train.read_rows(job, disable=disable)
    return {name: read[job.data, job.seed] for name, job in jobs.items()}


def _train(
    model: nn.Module,
    jobs: Mapping[str, Job],
    rows: Mapping[str, data.TrainingData],
    directories: Mapping[str, runs.Run],
    mesh: DeviceMesh | None,
    *,
    disable: bool,
) -> tuple[dict[str, Result], list[str]]:
    """Train these runs at once, on a bare model, which it is again afterwards; their results, and who diverged."""
    first, job, device = launch.is_first(), next(iter(jobs.values())), next(model.parameters()).device
    (tp, dp), made, facts = train.axes_of(mesh), {}, {}
    with launch.together((tp, dp), device):
        for name, own in jobs.items():
            train.adapt(model, own, train.asked(own), rows[name], tp)
            facts[name] = train.facts_of(own, rows[name], model)
            made[name] = bind.detach(model)
        held = ManyAdapters(model, envelope([*made.values()]), places=len(jobs), gradients="deferred")
        for name in jobs:
            held.add(name, made.pop(name))
    held.select_rows([*jobs])
    with launch.together((tp, dp), device):
        for name, own in jobs.items() if first else ():
            directories[name].begin(own.to_dict(), facts[name], resume=False)
    fastest = max(jobs.values(), key=lambda own: own.learning_rate)
    optimizer = train.make_optimizer(model, fastest, train.state_group(job, mesh))
    at_own_rates(optimizer, [own.learning_rate for own in jobs.values()])
    logs = {name: runs.Log(directories[name], []) if first else None for name in jobs}
    tasks = [Task(job=own, rows=rows[name], log=logs[name]) for name, own in jobs.items()]
    before = train.measure(model, tasks, 0, tp, dp)
    with runs.Progress(total=job.steps, start=0, disable=disable) as bar:
        losses = train.run_steps(model, optimizer, tasks, tp=tp, dp=dp, bar=bar, shape=(len(jobs),))
    after = train.measure(model, tasks, job.steps, tp, dp)
    diverged = [name for name, is_finite in zip(jobs, _are_finite(model, tp), strict=True) if not is_finite]
    for name in jobs:
        if name not in diverged:
            held.save(name, directories[name].directory)
    base = train.base_of(model)
    held.remove()
    found = zip(jobs, before, after, losses, strict=True)
    return {
        name: Result(loss_before=old, loss_after=new, train_loss=loss, base=base) for name, old, new, loss in found
    }, diverged


def _are_finite(model: nn.Module, tp: Axis) -> list[bool]:
    """Whether all factors of each adapter are finite, on all processes."""
    wrong = [(~p.detach().isfinite()).reshape(len(p), -1).any(1) for p in bind.flat(bind.factors(model)).values()]
    [num] = collectives.reduce_flat([torch.stack(wrong).sum(0, dtype=torch.float32)], tp)
    return (num == 0).tolist()


def envelope(adapters: Sequence[Adapter]) -> LoraSpec:
    """The largest adapter, of every layer that one of these has, for `ManyAdapters`."""
    specs = [adapter.spec for adapter in adapters if adapter.spec is not None]
    layers = [(path, m) for of in adapters for path, m in of.modules.items() if isinstance(m, LoraLayer)]
    names = {name for path, m in layers for name in peft_format.adapted_paths(path, m.spec).values()}
    return replace(
        specs[0],
        rank=max(spec.rank for spec in specs),
        target_modules=tuple(sorted(names)),
        exclude_modules=(),
        layers_to_transform=None,
        layers_pattern=None,
    )


def at_own_rates(optimizer: Optimizer, rates: Sequence[float]) -> None:
    """Have each of K adapters, whose factors stand stacked, learn at a rate of its own.

    For an optimizer whose step is linear in the learning rate, as AdamW's is (its decay too), and which is given the
    largest: every adapter then goes its part of the way.

    Args:
        optimizer: Over parameters [K, ...].
        rates: Of each adapter.

    Example:
        >>> p = nn.Parameter(torch.zeros(2, 1))
        >>> optimizer = torch.optim.SGD([p], lr=0.5)
        >>> at_own_rates(optimizer, [0.5, 0.1])
        >>> p.grad = torch.ones(2, 1)
        >>> optimizer.step()
        >>> p.flatten().tolist()
        [-0.5, -0.10000000149011612]
    """
    if len(set(rates)) == 1:
        return
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    parts = torch.tensor([rate / max(rates) for rate in rates], dtype=torch.float64)
    shares = [parts.to(p.dtype).to(p.device).view(-1, *(1,) * (p.dim() - 1)) for p in parameters]
    before: list[Tensor] = []

    def keep(*_: Any) -> None:
        before[:] = [p.detach().clone() for p in parameters]

    def go(*_: Any) -> None:
        with torch.no_grad():
            for p, old, share in zip(parameters, before, shares, strict=True):
                p.copy_(torch.lerp(old, p, share))
        before.clear()

    optimizer.register_step_pre_hook(keep)
    optimizer.register_step_post_hook(go)
