"""Run the benchmarks: `python -m benchmarks --quick`, `python -m benchmarks --suite B3,B7`."""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from pathlib import Path

import torch

from benchmarks import environment, report, rows, suites, targets
from benchmarks.options import BACKENDS, Options

LEAST_ROUNDS = 15


def main(words: list[str] | None = None) -> None:
    """Measure, print what is found as it is found, and write the report."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--suite", default=",".join(suites.SUITES), help="such as B3,B7; all by default")
    parser.add_argument("--quick", action="store_true", help="fewer cells: about two minutes")
    parser.add_argument("--long", action="store_true", help="more cells than by default")
    parser.add_argument("--tiny", action="store_true", help="sizes that say nothing, to try the harness")
    parser.add_argument("--rounds", type=int, default=LEAST_ROUNDS, help="of what is timed")
    parser.add_argument("--threads", type=int, default=2, help="of one process")
    parser.add_argument("--backend", choices=BACKENDS, default="cpu")
    parser.add_argument("--xla-python", default="", help="an interpreter that has torch_xla, for B7's HLO and B8")
    parser.add_argument("--output", type=Path, default=Path("build/bench"))
    args = parser.parse_args(words)
    names = args.suite.split(",")
    if unknown := [name for name in names if name not in suites.SUITES]:
        parser.error(f"there is no suite {unknown[0]}; there are {', '.join(suites.SUITES)}.")
    if args.rounds < LEAST_ROUNDS and not args.tiny:
        parser.error(f"--rounds is {args.rounds}, at least {LEAST_ROUNDS} are needed.")
    options = Options(
        where=args.backend,
        rounds=args.rounds,
        quick=args.quick,
        long=args.long,
        tiny=args.tiny,
        threads=args.threads,
        xla_python=args.xla_python or sys.executable * (BACKENDS[args.backend].device == "xla"),
    )
    warnings.filterwarnings("ignore", category=FutureWarning)  # of peft, which asks transformers by an old name
    torch.set_num_threads(options.threads)
    where, start, found = environment.environment(options), time.monotonic(), list[rows.Row]()
    for key, value in where.items():
        print(f"{key}: {value}")

    def told(case: str) -> None:
        print(f"[{time.monotonic() - start:.0f} s] {case}", flush=True)

    for row in suites.run(names, options, told):
        found.append(row)
        number = "" if row.minimum is None else report.number(row.minimum, row.unit)
        print(f"    {row.program}: {' '.join(filter(None, (row.metric, number, row.note)))}", flush=True)
    where["seconds in all"] = f"{time.monotonic() - start:.0f}"
    report.write(args.output, found, where)
    for verdict in targets.judge(found):
        if verdict.worst is not None:
            print(f"{verdict.verdict}: {verdict.target.what}: {verdict.worst:.3g}, at most {verdict.target.limit:g}")
    print(f"{args.output / 'report.html'} shows it, beside table.md, rows.jsonl and the plots.")


if __name__ == "__main__":
    main(sys.argv[1:])
