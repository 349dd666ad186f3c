"""What has changed since an older run? Each row's minimum over that of the row of the same name there."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path

from benchmarks import rows
from benchmarks.rows import Row
from benchmarks.targets import NOISE
from lora_fn import FileError

HEAD = ("suite", "case", "program", "metric", "before", "now", "ratio", "")
MORE, LESS = "more", "less"


def older(path: Path) -> list[Row]:
    """The rows of an older run.

    Raises:
        FileError: There are none.
    """
    if found := rows.read(path):
        return found
    raise FileError(f"{path}: holds no rows of the benchmarks; name the {rows.FILE} of a run.")


def lines(old: Iterable[Row], new: Iterable[Row]) -> list[tuple[str, ...]]:
    """A line for each row that both runs have a number of.

    The last cell marks what differs: a count by however little, what was measured by more than the noise.
    """
    before = {_name(row): row for row in old if row.minimum is not None}
    found = []
    for row in new:
        was = before.get(_name(row))
        if was is None or was.minimum is None or row.minimum is None:
            continue
        same = row.minimum == was.minimum
        ratio = 1.0 if same else row.minimum / was.minimum if was.minimum else math.inf
        noise = NOISE if row.rounds else 0.0
        mark = "" if abs(ratio - 1) <= noise else MORE if row.minimum > was.minimum else LESS
        cells = (f"{was.minimum:.6g}", f"{row.minimum:.6g}", f"{ratio:.3f}", mark)
        found.append((row.suite, row.case, row.program, row.metric, *cells))
    return found


def summary(found: Sequence[tuple[str, ...]]) -> str:
    """In one sentence."""
    marks = [line[-1] for line in found]
    more, less = marks.count(MORE), marks.count(LESS)
    return (
        f"Of {len(found)} numbers that both runs have, {more} are more and {less} less: a count by however little, "
        f"what was measured by over {NOISE:.0%}."
    )


def _name(row: Row) -> tuple[str, ...]:
    return row.suite, row.case, row.program, row.metric, row.backend.lower()  # "cpu" in older files
