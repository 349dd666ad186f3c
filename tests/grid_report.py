"""Write docs/parity.md: `python tests/grid_report.py`; with --measure, run the whole grid and write what came of it.

The whole grid goes on where it was stopped: what has been measured is in build/grid.jsonl.
"""

import argparse
import datetime
import itertools
import json
import math
import multiprocessing
import os
import platform
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import grid  # noqa: E402

PAGE, LOG = ROOT / "docs" / "parity.md", ROOT / "build" / "grid.jsonl"
MEMORY = Path("/dev/shm")  # every adapter is written to the disk else, and waited for
WORKERS, BATCH = 2, 64


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--measure", action="store_true", help="run the whole grid")
    measured = parser.parse_args().measure
    before = PAGE.read_text(encoding="utf-8") if PAGE.exists() else ""
    _, heading, told = before.partition(grid.MEASURED)
    if measured:
        heading, told = grid.MEASURED, measure()
    PAGE.write_text(grid.page(grid.covering_array()) + heading + told, encoding="utf-8")


def measure():
    """Run what has not been run, and say what came of all."""
    from tqdm import tqdm

    LOG.parent.mkdir(exist_ok=True)
    began, done = time.monotonic(), read_log()
    todo = [case for case in tqdm(grid.whole_grid(), desc="what can be", unit=" cases") if case not in done]
    batches = [todo[start : start + BATCH] for start in range(0, len(todo), BATCH)]
    # Spawned and not daemons: each has processes of its own.
    context = multiprocessing.get_context("spawn")
    queue, answers = context.Queue(), context.Queue()
    for batch in [*batches, *[None] * WORKERS]:
        queue.put(batch)
    workers = [context.Process(target=work, args=(queue, answers)) for _ in range(WORKERS)]
    for worker in workers:
        worker.start()
    with tqdm(total=len(todo), desc="grid", unit=" cases") as bar, LOG.open("a", encoding="utf-8") as log:
        for _ in batches:
            for case, (name, error) in answers.get().items():
                log.write(json.dumps([case, name, error]) + "\n")
                done[case] = name, error
                bar.update()
            log.flush()
    for worker in workers:
        worker.join()
    return summary(done, time.monotonic() - began)


def read_log():
    """Case -> (the name of its worst comparison, the error over what is allowed)."""
    lines = LOG.read_text(encoding="utf-8").splitlines() if LOG.exists() else []
    return {grid.Case(*case): (name, error) for case, name, error in map(json.loads, lines)}


def work(queue, answers):
    """A worker's life: batches of cases, until there are none."""
    import grid_stock
    from pool import pool

    for batch in iter(queue.get, None):
        with tempfile.TemporaryDirectory(dir=MEMORY if MEMORY.is_dir() else None) as directory:
            try:
                told = grid_stock.compared(batch, Path(directory), pool)
            except Exception as error:  # of a process that died: the others go on
                told = {case: {repr(error): math.inf} for case in batch}
        answers.put(
            {
                case: max(errors.items(), key=lambda e: math.inf if e[1] != e[1] else e[1])
                for case, errors in told.items()
            }
        )


def summary(done, seconds):
    """The section of the page."""
    names = ("torch", "transformers", "peft", "numpy", "safetensors")
    wrong = {case: told for case, told in done.items() if not told[1] <= 1}
    lines = [
        f"\n\n`make grid`, {datetime.date.today()}, Python {platform.python_version()}, "
        + ", ".join(f"{name} {version(name)}" for name in names)
        + f", {platform.machine()}, {os.cpu_count()} cores, {seconds / 60:.0f} minutes.\n\n"
        + f"{len(done)} cases, {len(wrong)} of them beyond what is allowed. The worst errors, over what is allowed:\n"
    ]
    for row, column in (("kind", "variant"), ("kind", "init"), ("variant", "init"), ("dtype", "tp"), ("sp", "bias")):
        lines.append(f"| {row} \\ {column} | {' | '.join(map(str, grid.FACTORS[column]))} |")
        lines.append("| --- " * (len(grid.FACTORS[column]) + 1) + "|")
        worst = {}
        for case, (_, error) in done.items():
            at = getattr(case, row), getattr(case, column)
            worst[at] = max(worst.get(at, 0.0), math.inf if math.isnan(error) else error)
        for value in grid.FACTORS[row]:
            told = (worst.get((value, other)) for other in grid.FACTORS[column])
            lines.append(f"| {value} | {' | '.join('-' if t is None else f'{t:.2g}' for t in told)} |")
        lines.append("")
    for case, (name, error) in itertools.islice(wrong.items(), 50):
        lines.append(f"- {case}: {name.splitlines()[-1]} ({error:.3g})")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
