"""Run the benchmarks: `python -m benchmarks --quick`, `python -m benchmarks --suite B3,B7`."""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks import comparison, environment, report, rows, suites
from benchmarks.options import BACKENDS, Options, check_here, positive
from lora_fn import FileError, LoraFnError, SpecError

LEAST_ROUNDS = 15
INSIDE = {"nxd": "src/neuronx_distributed", "optimum": "optimum/neuron"}  # of a checkout


def parser_of() -> argparse.ArgumentParser:
    """The command line."""
    told = "\n".join(report.aligned([(f"  {name}", suite.title) for name, suite in suites.SUITES.items()]))
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=__doc__,
        epilog=f"suites:\n{told}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--suite", default=",".join(suites.SUITES), help="such as B3,B7; all by default")
    parser.add_argument("--quick", action="store_true", help="fewer cells: about four minutes")
    parser.add_argument("--long", action="store_true", help="more cells than by default")
    parser.add_argument("--tiny", action="store_true", help="sizes that say nothing, to try the harness")
    parser.add_argument(
        "--rounds", type=positive, default=LEAST_ROUNDS, help="of a step; what writes files has 5, or fewer"
    )
    parser.add_argument("--threads", type=positive, default=2, help="of one process")
    parser.add_argument("--backend", choices=BACKENDS, default="cpu", help="where programs run")
    parser.add_argument("--xla-python", default="", help="an interpreter that has torch_xla, for graphs and checkouts")
    parser.add_argument("--nxd", default="", metavar="CHECKOUT", help="of neuronx-distributed, to run its own LoRA")
    parser.add_argument("--optimum", default="", metavar="CHECKOUT", help="of optimum-neuron, likewise")
    parser.add_argument("--output", type=Path, default=Path("build/bench"), help="the directory of the report")
    parser.add_argument("--compare", type=Path, metavar="OLD.jsonl", help="rows.jsonl of an older run, to compare with")
    return parser


def asked(args: argparse.Namespace) -> tuple[list[str], Options]:
    """The suites, and with what options.

    Raises:
        LoraFnError: What cannot be.
    """
    names = [name.strip() for name in args.suite.split(",")]
    if unknown := [name for name in names if name not in suites.SUITES]:
        raise SpecError(f"there is no suite {unknown[0]}; there are {', '.join(suites.SUITES)}.")
    if args.rounds < LEAST_ROUNDS and not args.tiny:
        raise SpecError(f"--rounds is {args.rounds}, at least {LEAST_ROUNDS} are needed.")
    for name, inside in INSIDE.items():
        if (checkout := getattr(args, name)) and not (Path(checkout) / inside).is_dir():
            raise FileError(f"--{name}: {checkout} is no checkout with {inside} in it; name one.")
    on_xla = BACKENDS[args.backend].device == "xla"
    if not on_xla:
        check_here(args.backend)
    xla_python = args.xla_python or sys.executable * on_xla
    if xla_python and not has_xla(xla_python):
        raise SpecError(f"--xla-python is {xla_python}, which is no interpreter that has torch_xla; name one.")
    return names, Options(
        where=args.backend,
        rounds=args.rounds,
        quick=args.quick,
        long=args.long,
        tiny=args.tiny,
        threads=args.threads,
        xla_python=xla_python,
        nxd=args.nxd,
        optimum=args.optimum,
    )


def has_xla(python: str) -> bool:
    """Whether it is an interpreter, and finds torch_xla."""
    words = [python, "-c", "import importlib.util; print(importlib.util.find_spec('torch_xla') is not None)"]
    try:
        return subprocess.run(words, capture_output=True).stdout.strip() == b"True"
    except OSError:
        return False


def main(words: list[str] | None = None) -> None:
    """Measure, print what is found as it is found, and write the report; bad input is one sentence."""
    parser = parser_of()
    args = parser.parse_args(words)
    try:
        names, options = asked(args)
        before = comparison.older(args.compare) if args.compare else []  # it may lie where the new one will
        report.prepare(args.output)
    except LoraFnError as error:
        parser.error(str(error))
    warnings.filterwarnings("ignore", category=FutureWarning)  # of peft, which asks transformers by an old name
    warnings.filterwarnings("ignore", message="There is a performance drop")  # of attention under torch.vmap
    torch.set_num_threads(options.threads)
    where, start = environment.environment(options), time.monotonic()
    print("\n".join(report.aligned(list(where.items()))))
    try:
        found = measured(names, options, args.output / rows.FILE)
    except KeyboardInterrupt:
        sys.exit(f"Stopped; {args.output / rows.FILE} has what was measured.")
    where["seconds in all"] = f"{time.monotonic() - start:.0f}"
    report.write(args.output, found, where)
    print("\n".join(["", *report.aligned([report.VERDICTS, *report.verdicts(found)]), ""]))
    if args.compare:
        changes = comparison.lines(before, found)
        print("\n".join([*report.aligned([comparison.HEAD, *changes]), "", comparison.summary(changes)]))
    print(f"{args.output / 'report.html'} shows it, beside table.md, {rows.FILE} and the plots.")


def measured(names: Sequence[str], options: Options, output: Path) -> list[rows.Row]:
    """The rows of suites, printed and written as they come; in a terminal, under a bar that says how far it is."""
    from tqdm import tqdm

    start, found = time.monotonic(), list[rows.Row]()
    total = sum(len(suites.SUITES[name].cases(options)) for name in names if not suites.absent(name, options))
    with tqdm(total=total, unit="case", disable=None, dynamic_ncols=True) as bar:
        begun = 0

        def told(case: str) -> None:
            nonlocal begun
            bar.set_description(case[:40], refresh=False)
            bar.update(min(begun, 1))
            begun += 1
            tqdm.write(f"[{time.monotonic() - start:.0f} s] {case}")

        for row in suites.run(names, options, told):
            found.append(row)
            rows.append(output, [row])
            value = "" if row.minimum is None else report.number(row.minimum, row.unit)
            tqdm.write(f"    {row.program:30}  {row.metric:44}  {value:>16}  {row.note}".rstrip())
            sys.stdout.flush()
        bar.update(min(begun, 1))
    return found


if __name__ == "__main__":
    main(sys.argv[1:])
