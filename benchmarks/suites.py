"""Which suites are there, and which of them does this harness run?"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from benchmarks import (
    communication,
    consolidate,
    equality,
    flops,
    graphs,
    growth,
    layerwise,
    many,
    merge,
    operations,
    peak,
    rows,
    saved,
    start,
    steps,
    trainium,
)
from benchmarks.options import Options


@dataclass(frozen=True, slots=True, kw_only=True)
class Suite:
    """One question.

    Args:
        title: In words.
        cases: Of options, the names of its cases.
        run: Of a case and options, its rows.
    """

    title: str
    cases: Callable[[Options], list[str]]
    run: Callable[[str, Options], Iterable[rows.Row]]


SUITES: Mapping[str, Suite] = {
    "B1": Suite(
        title="collectives of a layer and of a whole model at TP 2",
        cases=lambda options: [*layerwise.cases(options), *communication.cases(options)],
        run=lambda case, options: (layerwise if case in layerwise.cases(options) else communication).run(case, options),
    ),
    "B2": Suite(
        title="gradients at TP 2 (with --long also 4) against one process", cases=equality.cases, run=equality.run
    ),
    "B3": Suite(title="bytes saved for the backward", cases=saved.cases, run=saved.run),
    "B4": Suite(title="peak memory of a training step", cases=peak.cases, run=peak.run),
    "B5": Suite(title="time of a training step", cases=steps.cases, run=steps.run),
    "B6": Suite(title="FLOPs that an adapter adds to a step", cases=flops.cases, run=flops.run),
    "B7": Suite(
        title="operations that an adapter adds to a linear layer, torch's and XLA's",
        cases=operations.cases,
        run=operations.run,
    ),
    "B8": Suite(
        title="XLA's graphs while an adapter changes, and the time to trace a step", cases=graphs.cases, run=graphs.run
    ),
    "B9": Suite(title="time and memory of a merge to disk", cases=merge.cases, run=merge.run),
    "B10": Suite(
        title="time, memory and bytes read to consolidate, cut and cut again an adapter",
        cases=consolidate.cases,
        run=consolidate.run,
    ),
    "B11": Suite(title="time to attach, load and swap an adapter", cases=start.cases, run=start.run),
    "B12": Suite(title="time and memory of the import", cases=start.import_cases, run=start.run_import),
    "B13": Suite(title="time of a step that trains many adapters", cases=many.cases, run=many.run),
    "B14": Suite(title="operations of a step, over rank, layers and TP", cases=growth.cases, run=growth.run),
    "B15": Suite(title="time of a step at TP 2", cases=communication.timed_cases, run=communication.run_timed),
    "B17": Suite(title="speed of a training run on trn1", cases=trainium.cases, run=trainium.run),
}
# What there is to measure where XLA compiles graphs; the reasons why the others say nothing there.
ON_XLA = ("B5", "B7", "B8", "B17")
NOT_ON_XLA: Mapping[str, str] = {
    "B1": "counted on gloo, and in XLA's HLO text, with --backend cpu",
    "B3": "in a graph it is the compiler that keeps tensors, or computes them again",
    "B4": "what a runtime holds is in B17, where it tells",
    "B6": "counted with --backend cpu, of the same products",
}
EAGER = "of eager programs, with --backend cpu"


def absent(name: str, options: Options) -> str:
    """Why a suite is not run; "" where it is."""
    elsewhere = options.device == "xla" and name not in ON_XLA
    return NOT_ON_XLA.get(name, EAGER) if elsewhere else ""


def run(names: Iterable[str], options: Options, told: Callable[[str], object]) -> Iterable[rows.Row]:
    """The rows of suites; a case that stops is a row that says so.

    Args:
        names: Of `SUITES`.
        options: What was asked.
        told: Called with the name of each case, before it.
    """
    for name in names:
        suite = SUITES[name]
        if reason := absent(name, options):
            yield rows.missing(name, "-", "ours", suite.title, "", reason, backend=options.backend)
            continue
        for case in suite.cases(options):
            told(f"{name} {case}")
            try:
                yield from suite.run(case, options)
            except Exception as error:
                reason = f"{type(error).__name__}: {str(error).strip().splitlines()[-1] if str(error).strip() else ''}"
                yield rows.missing(name, case, "ours", rows.STOPPED, "", reason, backend=options.backend)
