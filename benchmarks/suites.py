"""Which suites are there, and which of them does this harness run?"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from benchmarks import (
    communication,
    consolidate,
    equality,
    flops,
    growth,
    many,
    merge,
    operations,
    peak,
    rows,
    saved,
    steps,
)
from benchmarks.options import Options


@dataclass(frozen=True, slots=True, kw_only=True)
class Suite:
    """One question.

    Args:
        title: In words.
        cases: Of options, the names of its cases.
        run: Of a case and options, its rows.
        absent: Where there is none: the reason why.
    """

    title: str
    cases: Callable[[Options], list[str]] = lambda options: []
    run: Callable[[str, Options], Iterable[rows.Row]] = lambda case, options: []
    absent: str = ""


NO_SUITE = "the harness has no such suite yet"
SUITES: Mapping[str, Suite] = {
    "B1": Suite(title="collectives of a whole model at TP 2", cases=communication.cases, run=communication.run),
    "B2": Suite(title="gradients at TP 2 and 4 against one process", cases=equality.cases, run=equality.run),
    "B3": Suite(title="bytes saved for the backward", cases=saved.cases, run=saved.run),
    "B4": Suite(title="peak memory of a training step", cases=peak.cases, run=peak.run),
    "B5": Suite(title="time of a training step", cases=steps.cases, run=steps.run),
    "B6": Suite(title="FLOPs", cases=flops.cases, run=flops.run),
    "B7": Suite(title="operations for each adapted linear", cases=operations.cases, run=operations.run),
    "B8": Suite(title="stability of XLA's graphs", absent=NO_SUITE),
    "B9": Suite(title="merge to disk", cases=merge.cases, run=merge.run),
    "B10": Suite(title="consolidate and reshard", cases=consolidate.cases, run=consolidate.run),
    "B11": Suite(title="attach, load and swap an adapter", absent=NO_SUITE),
    "B12": Suite(title="import", absent=NO_SUITE),
    "B13": Suite(title="many adapters in one step", cases=many.cases, run=many.run),
    "B14": Suite(title="growth with rank, layers and TP", cases=growth.cases, run=growth.run),
    "B15": Suite(title="time of a step at TP 2", cases=communication.timed_cases, run=communication.run_timed),
    "B17": Suite(title="a training run on trn1", absent="needs a Neuron device; not run on one"),
}


def run(names: Iterable[str], options: Options, told: Callable[[str], object]) -> Iterable[rows.Row]:
    """The rows of suites; a case that stops is a row that says so.

    Args:
        names: Of `SUITES`.
        options: What was asked.
        told: Called with the name of each case, before it.
    """
    for name in names:
        suite = SUITES[name]
        if suite.absent:
            yield rows.missing(name, "-", "ours", suite.title, "", suite.absent, backend=options.backend)
        for case in suite.cases(options):
            told(f"{name} {case}")
            try:
                yield from suite.run(case, options)
            except Exception as error:
                reason = f"{type(error).__name__}: {str(error).strip().splitlines()[-1] if str(error).strip() else ''}"
                yield rows.missing(name, case, "ours", rows.STOPPED, "", reason, backend=options.backend)
