"""What grows with the rank, the layers and TP? Torch's operations in a step: its time, where tensors are small.

An adapter's operations are those beyond the frozen model's. Of TP they are those of one process, on gloo.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks import processes, rows
from benchmarks.communication import frozen, ours, step
from benchmarks.operations import Counting, dispatched
from benchmarks.options import Options
from benchmarks.processes import BACKEND
from benchmarks.programs import PROGRAMS, TINY, Setup, Shape

OPERATIONS, UNIT = "operations of a step", "operations"
FLAT = "operations at the largest rank, over those at the smallest"
SLOPE = "operations of an adapter for each further layer"
BENT = "operations beyond a straight line"
SMALL = Setup(shape=Shape(hidden=32, layers=2, tokens=8), rank=4)
NAMES = ("frozen", "ours", "PEFT")


def points(options: Options) -> dict[str, tuple[int, ...]]:
    """What grows, and how far."""
    if options.tiny:
        return {"rank": (4, 8), "layers": (1, 2, 3)}
    if options.quick:
        return {"rank": (4, 256), "layers": (2, 4, 8)}
    long = options.long
    return {"rank": (4, 256), "layers": (2, 8, 32, *((64,) if long else ())), "TP": (1, 2, *((4,) if long else ()))}


def cases(options: Options) -> list[str]:
    """Their names."""
    return [f"{what} {' '.join(map(str, sizes))}" for what, sizes in points(options).items()]


def run(case: str, options: Options) -> Iterable[rows.Row]:
    """The rows of a case."""
    what = case.partition(" ")[0]
    sizes = points(options)[what]
    if what == "TP":
        for size in sizes:
            yield from processes.launched("growth", size, options, "counted", f"TP {size}")
        return
    found = {name: [operations(name, what, size) for size in sizes] for name in NAMES}
    for name, numbers in found.items():
        for size, number in zip(sizes, numbers, strict=True):
            yield rows.count("B14", f"{what} {size}", name, OPERATIONS, UNIT, number)
    for name in ("ours", "PEFT"):
        numbers = found[name]
        if what == "rank":
            yield rows.count("B14", case, name, FLAT, "x", numbers[-1] / numbers[0])
            continue
        first, last = (numbers[at] - found["frozen"][at] for at in (0, -1))
        yield rows.count("B14", case, name, SLOPE, UNIT, (last - first) / (sizes[-1] - sizes[0]))
        each = (numbers[-1] - numbers[0]) / (sizes[-1] - sizes[0])
        off = [n - numbers[0] - each * (size - sizes[0]) for size, n in zip(sizes, numbers, strict=True)]
        yield rows.count("B14", case, name, BENT, UNIT, max(map(abs, off)))


def operations(name: str, what: str, size: int) -> int:
    """Of a step of a program."""
    grown = {
        "rank": lambda: replace(SMALL, rank=size),
        "layers": lambda: replace(SMALL, shape=replace(SMALL.shape, layers=size)),
    }[what]()
    return dispatched(PROGRAMS[name](grown)).total()


def counted(mesh: Any, place: Path, options: Options, case: str) -> list[rows.Row]:
    """The rows of a size of TP, of this process."""
    directory, words = place / "model", {"sequence": mesh.size() > 1}
    processes.make(directory, TINY)
    mine = ours(directory, mesh, rank=SMALL.rank, **words)
    numbers = dict[str, int]()
    for name, model in (("frozen", frozen(directory, mesh, **words)), ("ours", mine.model)):
        step(model, TINY)
        with Counting() as counting:
            step(model, TINY)
        numbers[name] = counting.seen.total()
    return [rows.count("B14", case, name, OPERATIONS, UNIT, n, backend=BACKEND) for name, n in numbers.items()]


if __name__ == "__main__":
    processes.main({"counted": counted})
