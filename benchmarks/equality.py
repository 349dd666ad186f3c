"""Are the gradients on several processes those of one, and do replicas stay alike? A whole Llama in float64, on gloo.

The loss, every factor's gradient, and the factors after some steps of AdamW are compared with those of one process; and
what every process holds whole, with what the others hold.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed

from benchmarks import checkouts, processes, rows, timing
from benchmarks.communication import OURS, SCHEME_A, UNSYNCED, Program, found, ours, scheme_a, step, whole
from benchmarks.options import Options
from benchmarks.processes import BACKEND
from benchmarks.programs import TINY, Shape

ERROR = "largest error of loss and gradients"
APART = "largest difference of replicas after 3 steps"
TRAINED = "largest error of the factors after 3 steps"
SUMMED = "ours, summed in the backward"
MISSED = "replicas that drift apart and are not noticed"
STEPS, RANK = 3, 4


def cases(options: Options) -> list[str]:
    """Sizes of TP, without and with sequence parallelism."""
    own = [f"TP {size}{cut}, float64" for size in ((2, 4) if options.long else (2,)) for cut in ("", CUT)]
    return [*own, checkouts.CASE]


CUT = ", sequence parallel"


def run(case: str, options: Options) -> Iterable[rows.Row]:
    """The rows of a case."""
    if case == checkouts.CASE:
        return checkouts.run(options)
    return processes.launched("equality", int(case.split(",")[0].removeprefix("TP ")), options, "compared", case)


# ----------------------------------------------------------------------------------------------- on each process


def compared(mesh: Any, place: Path, options: Options, case: str) -> list[rows.Row]:
    """The rows of a case, of this process."""
    sequence, shape, directory = CUT in case, TINY, place / "model"
    processes.make(directory, shape)
    words: dict[str, Any] = {"rank": RANK, "dtype": torch.float64}
    alone = ours(directory, None, sequence=False, **words)
    summed = ours(directory, mesh, sequence=sequence, gradients="summed", **words)
    mine = ours(directory, mesh, sequence=sequence, **words)
    made = {
        OURS: mine,
        SUMMED: summed,
        SCHEME_A: scheme_a(mine, directory, mesh, sequence=sequence),
        UNSYNCED: scheme_a(mine, directory, mesh, sequence=sequence, synced=False),
    }
    expected, after = found(alone, shape, alone), trained(alone, shape)
    expected_after = whole(after, alone)
    told, size = [], mesh.size()
    for name, program in made.items():
        error = worst(found(program, shape, mine), expected)
        own = trained(program, shape)
        apart, off = differing(own, mine, size), worst(whole(own, mine), expected_after)
        unsynced = name == UNSYNCED and sequence
        note = "fails as it should" if unsynced and error > 1e-3 and apart > 0 else ""
        for metric, value in ((ERROR, error), (TRAINED, off), (APART, apart)):
            told.append(rows.measured("B2", case, name, metric, "x", [value], backend=BACKEND, note=note))
        if unsynced:
            told.append(rows.count("B2", case, name, MISSED, "programs", float(note == ""), backend=BACKEND))
    return told


def worst(values: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    """The largest of max|a - b| / max|b|, of all processes."""
    return of_all(timing.largest(timing.relative(values[name], expected[name]) for name in expected))


def of_all(value: float) -> float:
    """The largest of all processes."""
    told = torch.tensor(value, dtype=torch.float64)
    distributed.all_reduce(told, distributed.ReduceOp.MAX)
    return float(told)


def trained(program: Program, shape: Shape) -> dict[str, dict[str, Tensor]]:
    """The factors after some steps, which begin where the program does."""
    flat = [(path, name, p) for path, of in program.trained.items() for name, p in of.items()]
    before = [p.detach().clone() for *_, p in flat]
    optimizer = torch.optim.AdamW([p for *_, p in flat], lr=1e-2)
    for _ in range(STEPS):
        step(program.model, shape)
        grads = program.sync()
        for path, name, p in flat:
            p.grad = grads[path][name]
        optimizer.step()
    after = dict[str, dict[str, Tensor]]()
    with torch.no_grad():
        for (path, name, p), at_first in zip(flat, before, strict=True):
            after.setdefault(path, {})[name] = p.detach().clone()
            p.copy_(at_first)
    return after


def differing(values: Mapping[str, Mapping[str, Tensor]], like: Program, size: int) -> float:
    """The largest relative difference between processes of what each holds whole."""
    import adapters
    from lora_fn import Replicate, sharding

    specs, apart = adapters.specs(like.model), 0.0
    for path, of in values.items():
        for name, value in of.items():
            if isinstance(sharding.rule(specs[path], name).placement, Replicate):
                others = [torch.empty_like(value) for _ in range(size)]
                distributed.all_gather(others, value.contiguous())
                apart = timing.largest([apart, *(timing.relative(other, value) for other in others)])
    return of_all(apart)


if __name__ == "__main__":
    processes.main({"compared": compared})
