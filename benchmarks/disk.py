"""How long does something take that writes files, until they are on the disk, and how much memory? In a process each.

    python -m benchmarks.MODULE NAME PLACE

Programs take turns within a round; their imports are not timed, and what they read lies in the page cache for all.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from benchmarks import apart, rows
from benchmarks.options import Options
from benchmarks.peak import memory

CACHED, SYNCED, MEMORY, READ = "time", "time until it is on the disk", "memory above import", "bytes read"
METRICS = {CACHED: "s", SYNCED: "s", MEMORY: "bytes", READ: "bytes"}
COPY = "copy"
Prepare = Callable[[Path, Path], Callable[[], object]]  # (where the files are, output) -> what is timed


def rounds(options: Options) -> int:
    """Of what takes seconds: not those of a step."""
    return 1 if options.tiny else 2 if options.quick else 5


def copy(source: Path, output: Path) -> None:
    """The files of a directory."""
    output.mkdir()
    for file in sorted(source.iterdir()):
        shutil.copyfile(file, output / file.name)


def measured(
    suite: str, case: str, module: str, names: Sequence[str], place: Path, check: Callable[[], str], options: Options
) -> Iterable[rows.Row]:
    """The rows of programs.

    Args:
        suite, case: Of the rows.
        module: Of the benchmarks, whose main is `work`.
        names: Of its programs.
        place: Where the files are; each program writes into a directory of its name.
        check: Called once, when all have written: refuses what is wrong, and gives the note.
        options: What was asked.
    """
    found: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    note = ""
    for number in range(rounds(options)):
        for name in names:
            os.sync()
            try:
                found[name].append(apart.value(["-m", f"benchmarks.{module}", name, str(place)]))
            except RuntimeError as error:
                raise RuntimeError(f"{name}: {error}") from error
        note = note if number else check()
        for name in names:
            shutil.rmtree(place / name)
    for name, of in found.items():
        for metric, unit in METRICS.items():
            told = note if name == "ours" else ""
            values = [one[metric] for one in of]
            yield rows.measured(suite, case, name, metric, unit, values, note=told)


def read() -> int:
    """Bytes that this process has read so far, by calls."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("rchar:"))


def work(programs: Mapping[str, Prepare], name: str, place: Path) -> None:
    """In a process of its own: do it, and print what it took."""
    from lora_fn import checkpoint

    output = place / name
    run = programs[name](place, output)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts here
    before, at_first, start = memory("VmRSS"), read(), time.perf_counter()
    run()
    done, of_all = time.perf_counter() - start, read() - at_first
    for file in [*(file for file in output.rglob("*") if file.is_file()), output]:
        checkpoint.flush(file)
    synced = time.perf_counter() - start
    print(json.dumps({CACHED: done, SYNCED: synced, MEMORY: memory("VmHWM") - before, READ: of_all}))
