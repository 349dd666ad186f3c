"""What is one measurement? A row: numbers with their spread, or the reason why there are none."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from lora_fn import FileError

FILE = "rows.jsonl"
NOT_MEASURED = "not measured"
STOPPED = "a case that stopped"


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One metric of one program in one case.

    Args:
        suite: Such as "B5".
        case: What all programs of the row's group do.
        program: Who does it.
        metric, unit: What is measured. A count's unit is what is counted.
        minimum, median: Of the rounds; a count has the same in both; None where there is no number.
        spread: Between the first and the third quartile of the rounds.
        rounds: How many; 0 for a count.
        backend: Where, in words.
        note: What qualifies the number, or the reason why there is none.
    """

    suite: str
    case: str
    program: str
    metric: str
    unit: str
    minimum: float | None = None
    median: float | None = None
    spread: float | None = None
    rounds: int = 0
    backend: str = "CPU"
    note: str = ""


def count(suite: str, case: str, program: str, metric: str, unit: str, value: float, **more: str) -> Row:
    """A row of what is counted, and is the same each time."""
    names = {"suite": suite, "case": case, "program": program, "metric": metric, "unit": unit}
    return Row(**names, minimum=value, median=value, spread=0.0, **more)


def measured(suite: str, case: str, program: str, metric: str, unit: str, samples: Sequence[float], **more: str) -> Row:
    """A row of what is measured in rounds."""
    names = {"suite": suite, "case": case, "program": program, "metric": metric, "unit": unit}
    low, middle, high = statistics.quantiles(samples, n=4) if len(samples) > 1 else [samples[0]] * 3
    return Row(**names, minimum=min(samples), median=middle, spread=high - low, rounds=len(samples), **more)


def missing(suite: str, case: str, program: str, metric: str, unit: str, reason: str, **more: str) -> Row:
    """A row without a number."""
    names = {"suite": suite, "case": case, "program": program, "metric": metric, "unit": unit}
    return Row(**names, note=f"{NOT_MEASURED}: {reason}", **more)


def write(path: Path, rows: Iterable[Row]) -> None:
    """JSON lines."""
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(asdict(row)) + "\n" for row in rows)


def append(path: Path, rows: Iterable[Row]) -> None:
    """JSON lines, after those that are there."""
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(asdict(row)) + "\n" for row in rows)


def read(path: Path) -> list[Row]:
    """What `write` and `append` wrote.

    Raises:
        FileError: No such file, or it holds something else.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        return [Row(**found) for found in map(json.loads, lines) if "suite" in found]
    except (OSError, ValueError, TypeError) as error:
        raise FileError(f"{path}: holds no rows of the benchmarks ({error}); name the {FILE} of a run.") from error
