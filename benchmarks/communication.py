"""What does an adapter communicate, and how long is a step, at TP 2? A whole Llama of `models.load`, on gloo processes.

A collective is what reaches torch's dispatcher, whoever asked for it. First the loss and the gradient of every factor
are compared with those of one process; where they differ, nothing is counted and nothing is timed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import beside, processes, rows, timing
from benchmarks.options import Options
from benchmarks.processes import BACKEND
from benchmarks.programs import H128, H512, LINEARS, TINY, VOCABULARY, Shape

SIZE = 2
CASES = {"TP 2": False, "TP 2, sequence parallel": True}
NUMBER, EXTRA = "collectives per microbatch", "extra collectives per microbatch"
BYTES, SYNC = "bytes put into them", "collectives of a step's sync"
TIME = "step time at TP 2"
OURS, SCHEME_A, UNSYNCED = "ours", "scheme a, our port", "scheme a, our port, not synced"
BY_RANK, EACH = "ours, by rank", "extra collectives of each layer that is cut by rank"
PEFT_TP = "PEFT on transformers' own tensor parallelism"


class Recorder(TorchDispatchMode):
    """Counts collectives, and the bytes put into them."""

    def __init__(self) -> None:
        super().__init__()
        self.number = self.bytes = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.namespace.startswith(("c10d", "_c10d")) and function._opname != "wait_tensor":
            self.number += 1
            self.bytes += args[0].nbytes
        return function(*args, **kwargs or {})


def cases(options: Options) -> list[str]:
    """Without and with sequence parallelism."""
    return list(CASES)


def shapes(options: Options) -> list[Shape]:
    """The models of what is timed: what is bound by latency, and what less so."""
    if options.tiny:
        return [TINY]
    small = [replace(H128, layers=2)]
    return small if options.quick else [*small, replace(H512, layers=2)]


def timed_cases(options: Options) -> list[str]:
    """Both for each model."""
    return [f"{case}, h{s.hidden} L{s.layers} {s.tokens} tokens" for s in shapes(options) for case in CASES]


def run(case: str, options: Options) -> Iterable[rows.Row]:
    """B1's rows of a case."""
    return processes.launched("communication", SIZE, options, "counted", case)


def run_timed(case: str, options: Options) -> Iterable[rows.Row]:
    """B15's rows of a case."""
    return processes.launched("communication", SIZE, options, "timed", case)


# ----------------------------------------------------------------------------------------------- on each process

Grads = Mapping[str, Mapping[str, Tensor]]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Program:
    """A model in training on some processes.

    Args:
        model: Which.
        trained: This process's factors, by layer and name.
        sync: What ends a step: the gradients.
    """

    model: Any
    trained: Grads
    sync: Callable[[], Grads]


def frozen(directory: Path, mesh: Any, *, sequence: bool, dtype: torch.dtype = torch.float32) -> Any:
    """The base, whose gradient goes through to the embedding's output, as in any layer but the first."""
    from adapters import models

    model = models.load(directory, mesh=mesh, sequence_parallel=sequence, dtype=dtype).train()
    model.get_input_embeddings().register_forward_hook(lambda module, args, y: y.detach().requires_grad_())
    return model.requires_grad_(False)


def ours(
    directory: Path,
    mesh: Any,
    *,
    sequence: bool,
    rank: int,
    dtype: torch.dtype = torch.float32,
    gradients: str = "deferred",
    recompute: str | None = None,
    scheme: str | None = None,
) -> Program:
    """The adapted model; deferred, its partial gradients are summed once per step."""
    import adapters
    import lora_fn

    model = frozen(directory, mesh, sequence=sequence, dtype=dtype)
    spec = lora_fn.LoraSpec(rank=rank, alpha=2 * rank, target_modules=LINEARS, init_lora_weights=False)
    more = {"recompute": recompute, "scheme": scheme}
    adapters.wrap(model, spec, seed=3, gradients=gradients, dtype=dtype, **more).train()
    trained = adapters.factors(model)

    def sync() -> Grads:
        grads = {path: {name: p.grad for name, p in of.items()} for path, of in trained.items()}
        return lora_fn.sync_gradients(grads, adapters.specs(model)) if gradients == "deferred" else grads

    return Program(model=model, trained=trained, sync=sync)


def scheme_a(like: Program, directory: Path, mesh: Any, *, sequence: bool, synced: bool = True) -> Program:
    """Our port of Optimum Neuron's and NxD's scheme, with the factors of ours."""
    import adapters

    dtype = next(p for of in like.trained.values() for p in of.values()).dtype
    [scaling] = {spec.scaling_of(part) for spec in adapters.specs(like.model).values() for part in spec.updates}
    model = frozen(directory, mesh, sequence=sequence, dtype=dtype)
    beside.adapt(model, like.trained, scaling=scaling, sequence=sequence)
    trained = {path: {n: getattr(m, n) for n in ("lora_A", "lora_B")} for path, m in beside.layers(model).items()}
    return Program(model=model, trained=trained, sync=lambda: (beside.sync if synced else beside.grads)(model))


def loss_of(model: Any, shape: Shape) -> Tensor:
    """Of one row."""
    ids = torch.randint(1, VOCABULARY, (1, shape.tokens), generator=torch.Generator().manual_seed(2))
    return model(input_ids=ids, labels=ids).loss


def step(model: Any, shape: Shape) -> Tensor:
    """One microbatch."""
    for p in model.parameters():
        p.grad = None
    loss = loss_of(model, shape)
    loss.backward()
    return loss.detach()


def whole(values: Grads, like: Program) -> dict[str, Tensor]:
    """Tensors of factors' shapes, cut as ours are, as one process has them."""
    import adapters
    from lora_fn.reshard import gather

    specs, found = adapters.specs(like.model), dict[str, Tensor]()
    for path, of in values.items():
        found |= {f"{path}.{name}": t.detach() for name, t in gather(of, specs[path]).items()}
    return found


def found(program: Program, shape: Shape, like: Program) -> dict[str, Tensor]:
    """The loss, and every factor's whole gradient."""
    return {"loss": step(program.model, shape)} | whole(program.sync(), like)


def programs(mesh: Any, directory: Path, *, sequence: bool, rank: int) -> dict[str, Program]:
    """Those that are compared."""
    mine = ours(directory, mesh, sequence=sequence, rank=rank)
    by_rank = ours(directory, mesh, sequence=sequence, rank=rank, scheme="rank")
    return {OURS: mine, BY_RANK: by_rank, SCHEME_A: scheme_a(mine, directory, mesh, sequence=sequence)}


def checked(
    made: Mapping[str, Program], directory: Path, shape: Shape, rank: int
) -> tuple[dict[str, str], dict[str, str]]:
    """How right each program is, beside one process; and why not, of those that are wrong."""
    alone, right, wrong = ours(directory, None, sequence=False, rank=rank), dict[str, str](), dict[str, str]()
    expected = found(alone, shape, alone)
    for name, program in made.items():
        try:
            like = program if name == BY_RANK else made[OURS]  # whose factors lie as these do
            right[name] = f"off {timing.check_exact(found(program, shape, like), expected, timing.FP32):.0e}"
        except timing.Wrong as error:
            wrong[name] = str(error)
    return right, wrong


def by_rank(model: Any) -> int:
    """How many layers of a model have the scheme."""
    import adapters

    return sum(spec.scheme == "rank" for spec in adapters.specs(model).values())


def counted(mesh: Any, place: Path, options: Options, case: str) -> list[rows.Row]:
    """B1's rows of a case, of this process."""
    sequence, rank, shape, directory = CASES[case], 4, shapes(options)[0], place / "model"
    processes.make(directory, shape)
    base = frozen(directory, mesh, sequence=sequence)
    made = programs(mesh, directory, sequence=sequence, rank=rank)
    told = f"{case}, h{shape.hidden} L{shape.layers} r{rank}"
    notes, wrong = checked(made, directory, shape, rank)
    with Recorder() as of_base:
        step(base, shape)
    values = [("frozen", NUMBER, "collectives", of_base.number), ("frozen", BYTES, "bytes", of_base.bytes)]
    for name in notes:
        with Recorder() as recorder:
            step(made[name].model, shape)
        with Recorder() as at_end:
            made[name].sync()
        extra = recorder.number - of_base.number
        values += [
            (name, NUMBER, "collectives", recorder.number),
            (name, BYTES, "bytes", recorder.bytes),
            (name, EXTRA, "collectives", extra),
            (name, SYNC, "collectives", at_end.number),
        ]
        if name == BY_RANK:
            values += [(name, EACH, "collectives", extra / by_rank(made[name].model))]
    refused = [rows.missing("B1", told, n, EXTRA, "collectives", why, backend=BACKEND) for n, why in wrong.items()]
    return refused + [
        rows.count("B1", told, name, metric, unit, value, backend=BACKEND, note=notes.get(name, ""))
        for name, metric, unit, value in values
    ]


def timed(mesh: Any, place: Path, options: Options, case: str) -> list[rows.Row]:
    """B15's rows of a case, of this process."""
    rank, directory = 4 if options.tiny else 8, place / "model"
    [(shape, sequence)] = [
        (s, cut) for s in shapes(options) for c, cut in CASES.items() if case.startswith(f"{c}, h{s.hidden} L")
    ]
    processes.make(directory, shape)
    base = frozen(directory, mesh, sequence=sequence)
    made = programs(mesh, directory, sequence=sequence, rank=rank)
    told = f"{case} r{rank}"
    notes, wrong = checked(made, directory, shape, rank)
    notes = {name: f"with the sync after each microbatch; {note}" for name, note in notes.items()} | {"frozen": ""}
    steps: dict[str, Callable[[], object]] = {"frozen": lambda: step(base, shape)}

    def of(program: Program, *, synced: bool) -> Callable[[], object]:
        return lambda: (step(program.model, shape), program.sync() if synced else None)

    steps |= {name: of(made[name], synced=True) for name in made if name in notes}
    if SCHEME_A in steps:
        steps[UNSYNCED] = of(made[SCHEME_A], synced=False)
        notes[UNSYNCED] = "its replicas drift apart" if sequence else "needs no sync"
    seconds = timing.interleaved(steps, options.rounds, between=distributed.barrier)
    wrong |= {PEFT_TP: "no program for it is written yet"}
    refused = [rows.missing("B15", told, name, TIME, "s", why, backend=BACKEND) for name, why in wrong.items()]
    return refused + [
        rows.measured("B15", told, name, TIME, "s", seconds[name], backend=BACKEND, note=notes[name]) for name in steps
    ]


if __name__ == "__main__":
    processes.main({"counted": counted, "timed": timed})
