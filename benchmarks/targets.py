"""What is aimed at, and is it met? One table, for the report and for the tests."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from benchmarks import (
    communication,
    consolidate,
    disk,
    equality,
    flops,
    graphs,
    growth,
    layerwise,
    many,
    merge,
    operations,
    peak,
    saved,
    start,
    steps,
    trainium,
)
from benchmarks.rows import NOT_MEASURED, STOPPED, Row

MET, NOT_MET = "met", "not met"
ROUNDING = 1e-9  # of a ratio
NOISE = 0.03  # of a time: what two runs of the same program differ by
Numbers = Mapping[tuple[str, str, str, str], float]  # (suite, case, program, metric): the minimum, or NaN
Found = dict[str, float]  # case: the number that the limit is for


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """At most `limit`, in every case.

    Args:
        suite: Whose rows decide.
        what: In words, with what it is compared with.
        limit: Of the largest number.
        of: The numbers, of all rows.
        noise: What a number may be above the limit, relative.
    """

    suite: str
    what: str
    limit: float
    of: Callable[[Numbers], Found]
    noise: float = 0.0

    def judge(self, numbers: Numbers) -> Verdict:
        """Is it met? Not where a case has no number."""
        every = self.of(numbers)
        found = {case: value for case, value in every.items() if not math.isnan(value)}
        if not found:
            return Verdict(target=self, verdict=NOT_MEASURED)
        case = max(found, key=found.__getitem__)
        complete = len(found) == len(every) and not any(key[0] == self.suite and key[3] == STOPPED for key in numbers)
        right = MET if complete else NOT_MEASURED
        verdict = right if found[case] <= self.limit * (1 + self.noise) + ROUNDING * self.limit else NOT_MET
        return Verdict(target=self, verdict=verdict, worst=found[case], case=case, cases=len(found))


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What became of a target: the largest number, the case that has it, and how many there are."""

    target: Target
    verdict: str
    worst: float | None = None
    case: str = ""
    cases: int = 0


def numbers_of(rows: Iterable[Row]) -> Numbers:
    """Of rows; NaN where there is none."""
    return {(r.suite, r.case, r.program, r.metric): math.nan if r.minimum is None else r.minimum for r in rows}


def _any(case: str) -> bool:
    return True


def count(
    suite: str, metric: str, where: Callable[[str], bool] = _any, *, program: str = "ours"
) -> Callable[[Numbers], Found]:
    """Ours."""

    def of(numbers: Numbers) -> Found:
        return {
            case: value
            for (of_suite, case, of_program, of_metric), value in numbers.items()
            if (of_suite, of_program, of_metric) == (suite, program, metric) and where(case)
        }

    return of


def ratio(
    suite: str,
    metric: str,
    over: Collection[str],
    where: Callable[[str], bool] = _any,
    *,
    program: str = "ours",
) -> Callable[[Numbers], Found]:
    """Ours, over the smallest of some programs' in the same case."""

    def of(numbers: Numbers) -> Found:
        mine, found = count(suite, metric, where, program=program)(numbers), Found()
        for case, value in mine.items():
            peers = [numbers.get((suite, case, name, metric), math.nan) for name in over]
            least = min((peer for peer in peers if peer > 0), default=math.nan)
            found[case] = value / least
        return found

    return of


def added_by_dropout(numbers: Numbers) -> Found:
    """Bytes that ours saves more with dropout, over what the frozen model saves."""
    found = Found()
    for case, value in count("B3", saved.METRIC, lambda case: "bf16" in case and _drops(case))(numbers).items():
        without = numbers.get(("B3", re.sub(", dropout [^ ]+", "", case), "ours", saved.METRIC), math.nan)
        found[case] = (value - without) / numbers.get(("B3", case, "frozen", saved.METRIC), math.nan)
    return found


def _drops(case: str) -> bool:
    return "dropout" in case


def _is_whole(case: str) -> bool:
    return "bf16" in case and _keeps(case) and not case.startswith(saved.CUT)


def _keeps(case: str) -> bool:
    return not _drops(case)


PEFT = ("PEFT", "PEFT, no autocast")
LARGE = ("h1024", "h2048", "h4096")
TARGETS: Sequence[Target] = (
    Target(
        suite="B2",
        what="error of loss and gradients at TP, float64, over one process's",
        limit=1e-10,
        of=count("B2", equality.ERROR),
    ),
    Target(
        suite="B2",
        what="difference of replicas after 3 optimizer steps",
        limit=0,
        of=count("B2", equality.APART),
    ),
    Target(
        suite="B2",
        what="the same error where the backward sums, wrap's default",
        limit=1e-10,
        of=count("B2", equality.ERROR, program=equality.SUMMED),
    ),
    Target(
        suite="B2",
        what="the same difference of replicas there",
        limit=0,
        of=count("B2", equality.APART, program=equality.SUMMED),
    ),
    Target(
        suite="B2",
        what="times that the scheme without its sync passes for right",
        limit=0,
        of=count("B2", equality.MISSED, program=communication.UNSYNCED),
    ),
    Target(
        suite="B1",
        what="extra collectives per microbatch, whole model at TP 2",
        limit=0,
        of=count("B1", communication.EXTRA, lambda case: case.startswith("TP 2")),
    ),
    Target(
        suite="B1",
        what="the same of a layer: column, row, qkv, embedding, SP on and off, on gloo and in XLA's HLO text",
        limit=0,
        of=count("B1", communication.EXTRA, lambda case: not case.startswith(("TP 2", *layerwise.EXCEPTIONS))),
    ),
    Target(
        suite="B1",
        what="the same of those that have one: embedding under SP a gather of T*r, DoRA on row an out-sized all-reduce",
        limit=1,
        of=count("B1", communication.EXTRA, lambda case: case.startswith(layerwise.EXCEPTIONS)),
    ),
    Target(
        suite="B1",
        what="the same of each layer that is cut by rank, which has its two",
        limit=2,
        of=count("B1", communication.EACH, program=communication.BY_RANK),
    ),
    Target(suite="B1", what="collectives of a step's sync", limit=2, of=count("B1", communication.SYNC)),
    Target(
        suite="B6",
        what="LoRA FLOPs of a process, over the analytic count: alone, and at TP 2, SP on and off",
        limit=1.01,
        of=count("B6", flops.METRIC),
    ),
    Target(
        suite="B6",
        what="the same at TP 2, cut by rank",
        limit=1.01,
        of=count("B6", flops.METRIC, program=communication.BY_RANK),
    ),
    Target(
        suite="B3",
        what="bytes saved for the backward, bf16, over the frozen model's",
        limit=1.30,
        of=ratio("B3", saved.METRIC, ["frozen"], _is_whole),
    ),
    Target(
        suite="B3",
        what="the same on one process of TP 2, sequence parallel",
        limit=1.30,
        of=ratio("B3", saved.METRIC, ["frozen"], lambda case: case.startswith(saved.CUT)),
    ),
    Target(
        suite="B3",
        what="both with recompute",
        limit=1.05,
        of=ratio("B3", saved.METRIC, ["frozen"], lambda case: "bf16" in case and _keeps(case), program=saved.AGAIN),
    ),
    Target(suite="B3", what="what dropout adds to them, over the frozen model's", limit=0.05, of=added_by_dropout),
    Target(
        suite="B4",
        what="peak memory of a step, over stock PEFT's",
        limit=1.0,
        of=ratio("B4", peak.METRIC, PEFT),
    ),
    Target(
        suite="B4",
        what="peak memory of a step, over plain module autograd's",
        limit=1.05,
        of=ratio("B4", peak.METRIC, ["torch"]),
    ),
    Target(
        suite="B5",
        what="step time, over stock PEFT's",
        limit=1.0,
        of=ratio("B5", steps.METRIC, PEFT),
        noise=NOISE,
    ),
    Target(
        suite="B5",
        what="the same where dispatch takes the time (hidden size 128)",
        limit=0.90,
        of=ratio("B5", steps.METRIC, PEFT, lambda case: case.startswith("h128 ")),
        noise=NOISE,
    ),
    Target(
        suite="B5",
        what="the same with dropout",
        limit=0.8,
        of=ratio("B5", steps.METRIC, PEFT, _drops),
        noise=NOISE,
    ),
    Target(
        suite="B5",
        what="step time, over the frozen model's, hidden size 1024 or more",
        limit=1.10,
        of=ratio("B5", steps.METRIC, ["frozen"], lambda case: case.startswith(LARGE)),
        noise=NOISE,
    ),
    Target(
        suite="B7",
        what="extra ATen operations for each adapted linear",
        limit=11,
        of=count("B7", operations.EXTRA),
    ),
    Target(
        suite="B7",
        what="HLO operations of one linear, forward and backward, fp32",
        limit=23,
        of=count("B7", operations.HLO, lambda case: "fp32" in case),
    ),
    Target(
        suite="B7",
        what="the same, bf16",
        limit=27,
        of=count("B7", operations.HLO, lambda case: "bf16" in case),
    ),
    Target(
        suite="B7",
        what="of these converts and multiplies of tokens x features",
        limit=0,
        of=count("B7", operations.LARGE),
    ),
    Target(
        suite="B8",
        what="distinct XLA graphs over 20 steps, adapter swap, alpha change, resume",
        limit=1,
        of=count("B8", graphs.GRAPHS, lambda case: case != graphs.DISABLED),
    ),
    Target(
        suite="B8",
        what="the same, disabled and enabled",
        limit=2,
        of=count("B8", graphs.GRAPHS, lambda case: case == graphs.DISABLED),
    ),
    Target(
        suite="B8",
        what="time to trace a step, over the frozen model's",
        limit=1.2,
        of=ratio("B8", graphs.TRACE, ["frozen"]),
        noise=NOISE,
    ),
    Target(
        suite="B13",
        what="32 adapters in one step, over a loop's time",
        limit=0.6,
        of=ratio("B13", many.METRIC, [many.LOOP, many.PEFT_LOOP], lambda case: case.startswith("32 ")),
        noise=NOISE,
    ),
    Target(
        suite="B13",
        what="many adapters in one step, over one batched matmul's time",
        limit=1.1,
        of=ratio("B13", many.METRIC, [many.BY_HAND], lambda case: not case.startswith("1 ")),
        noise=NOISE,
    ),
    Target(
        suite="B13",
        what="1 adapter of many, over the time of one alone",
        limit=1 / 0.95,
        of=ratio("B13", many.METRIC, [many.LOOP], lambda case: case.startswith("1 ")),
        noise=NOISE,
    ),
    Target(
        suite="B13",
        what="operations of a step with many adapters, over those with 2",
        limit=1,
        of=count("B13", many.FLAT),
    ),
    Target(
        suite="B14",
        what="operations of an adapter for each further layer, over stock PEFT's",
        limit=0.5,
        of=ratio("B14", growth.SLOPE, ["PEFT"]),
    ),
    Target(
        suite="B14",
        what="operations beyond a straight line, with the layers",
        limit=0,
        of=count("B14", growth.BENT),
    ),
    Target(
        suite="B14",
        what="operations at the largest rank, over those at the smallest",
        limit=1,
        of=count("B14", growth.FLAT),
    ),
    Target(
        suite="B9",
        what="merge to disk, over stock PEFT's time, both on the disk",
        limit=0.25,
        of=ratio("B9", disk.SYNCED, ["PEFT"]),
        noise=NOISE,
    ),
    Target(
        suite="B9",
        what="the same, over a copy's, both on the disk",
        limit=2,
        of=ratio("B9", disk.SYNCED, [disk.COPY]),
        noise=NOISE,
    ),
    Target(suite="B9", what="memory of a merge above import, bytes", limit=150e6, of=count("B9", disk.MEMORY)),
    Target(suite="B9", what=merge.NOT_NEAREST, limit=0, of=count("B9", merge.NOT_NEAREST)),
    Target(
        suite="B10",
        what="consolidate, cut and cut again, over a copy's time, both on the disk",
        limit=2,
        of=ratio("B10", disk.SYNCED, [disk.COPY]),
        noise=NOISE,
    ),
    Target(suite="B10", what=consolidate.OVER_NEEDED, limit=1.1, of=count("B10", consolidate.OVER_NEEDED)),
    Target(suite="B10", what=consolidate.ABOVE, limit=1, of=count("B10", consolidate.ABOVE)),
    Target(
        suite="B11",
        what="seconds to attach to 224 linears",
        limit=0.040,
        of=count("B11", start.ATTACH, lambda case: "224 linears" in case),
        noise=NOISE,
    ),
    Target(
        suite="B11",
        what="time to load 18 MB of stock PEFT's, over the raw read and copy",
        limit=1.5,
        of=ratio("B11", start.LOAD, [start.RAW], lambda case: "h1024 r32" in case),
        noise=NOISE,
    ),
    Target(
        suite="B11",
        what="seconds to swap, which is the choice of a dict",
        limit=1e-4,
        of=count("B11", start.SWAP),
        noise=NOISE,
    ),
    Target(
        suite="B12",
        what="seconds of the import, beyond torch's",
        limit=0.1,
        of=start.beyond_torch(start.IMPORT),
    ),
    Target(
        suite="B12",
        what="bytes that the import holds, beyond torch's",
        limit=5e6,
        of=start.beyond_torch(start.MEMORY),
    ),
    Target(
        suite="B15",
        what="TP 2 step on gloo, SP, 512 tokens or fewer, over the scheme of Optimum Neuron and NxD",
        limit=0.9,
        of=ratio("B15", communication.TIME, [communication.SCHEME_A], lambda case: "sequence parallel" in case),
        noise=NOISE,
    ),
    Target(
        suite="B15",
        what="TP 2 step on gloo, over the frozen model's",
        limit=1.08,
        of=ratio("B15", communication.TIME, ["frozen"]),
        noise=NOISE,
    ),
    Target(
        suite="B17",
        what="graphs that a training run compiles after its second step",
        limit=0,
        of=count("B17", trainium.AGAIN),
    ),
)


def judge(rows: Iterable[Row]) -> list[Verdict]:
    """Of every target."""
    numbers = numbers_of(rows)
    return [target.judge(numbers) for target in TARGETS]
