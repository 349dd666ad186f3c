"""How long is a training step? Forward and backward of each program, taking turns, after all were seen to be right."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path

from benchmarks import apart, rows, timing
from benchmarks.options import Options
from benchmarks.programs import FROZEN, FULL, H128, H512, H1024, PROGRAMS, TINY, Program, Setup, dense, plain, reference

METRIC, UNIT = "step time", "s"


def setups(options: Options) -> list[Setup]:
    """The cells: what is bound by dispatch, and what by arithmetic."""
    device = options.device
    if options.tiny:
        return [Setup(shape=TINY, rank=4, dropout=dropout, device=device) for dropout in (0.0, 0.05)]
    small = [Setup(shape=H128, rank=r, dropout=d, device=device) for r in (8, 16, 64) for d in (0.0, 0.05)]
    if options.quick:
        return [*small[:2], Setup(shape=replace(H512, layers=3), device=device)]
    large = [Setup(shape=H512, device=device), Setup(shape=H1024, device=device)]
    narrow = [Setup(shape=H512, dtype="bfloat16", dropout=d, device=device) for d in (0.0, 0.05)]
    more = [
        Setup(shape=H512, dropout=0.05, device=device),
        *(Setup(shape=H512, dtype=t, rank=r, device=device) for t in ("float32", "bfloat16") for r in (8, 64)),
        Setup(shape=H1024, dtype="bfloat16", device=device),
    ]
    return [*small, *large, *narrow, *(more if options.long else [])]


def cases(options: Options) -> list[str]:
    """Their names."""
    return [str(setup) for setup in setups(options)]


def run(case: str, options: Options) -> Iterable[rows.Row]:
    """The rows of a cell."""
    if options.device == "xla":  # in a process of its own, which leaves the device to the next one
        yield from apart.run("benchmarks.steps", options, case, python=options.xla_python)
        return
    yield from timed(case, options)


def timed(case: str, options: Options) -> Iterable[rows.Row]:
    """The rows of a cell, in this process."""
    [setup] = [setup for setup in setups(options) if str(setup) == case]
    names = [name for name in PROGRAMS if name != "PEFT, no autocast" or setup.dtype == "bfloat16"]
    yield from time_programs(setup, {name: PROGRAMS[name] for name in names}, options)


def time_programs(
    setup: Setup, makers: Mapping[str, Callable[[Setup], Program]], options: Options
) -> Iterable[rows.Row]:
    """A row for each program; without numbers for one that is wrong, or does not run."""
    made, notes, wrong = dict[str, Program](), dict[str, str](), dict[str, str]()
    check = check_against(setup, options.wait)
    for name, make in makers.items():
        try:
            program = make(setup)
            notes[name] = check(name, program)
            made[name] = program
        except timing.Wrong as error:
            wrong[name] = f"{error}; nothing is timed that is wrong"
        except Exception as error:
            wrong[name] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    del check  # and what it holds
    steps = {name: program.step for name, program in made.items()}

    def between() -> None:
        for program in made.values():
            program.clear()

    seconds = timing.interleaved(steps, options.rounds, between=between, wait=options.wait) if steps else {}
    for name in makers:
        told = ("B5", str(setup), name, METRIC, UNIT)
        if name in wrong:
            yield rows.missing(*told, wrong[name], backend=options.backend)
        else:
            yield rows.measured(*told, seconds[name], backend=options.backend, note=notes[name])


def check_against(setup: Setup, wait: Callable[[], object]) -> Callable[[str, Program], str]:
    """A function that refuses a program whose loss or gradients are wrong, and says how right they are.

    The references are computed on the CPU, for not every device has float64.
    """
    here, narrow = replace(setup, device="cpu"), setup.dtype == "bfloat16"
    adapted = (reference(here), plain(here).found() if narrow else {})
    unadapted = (dense(here), dense(here, setup.dtype) if narrow else {})
    frozen = tuple({key: of[key] for key in ("loss", "x") if of} for of in unadapted)
    references = {FROZEN: frozen, FULL: unadapted}

    def check(key: str, program: Program) -> str:
        found = program.found()
        wait()  # else each of them is a graph of XLA's
        found = {name: tensor.cpu() for name, tensor in found.items()}
        expected, plain_bf16 = references.get(key, adapted)
        if narrow:
            return (
                f"rounds {timing.check_rounded(found, expected, plain_bf16):.2f} times as much as plain bf16 autograd"
            )
        return f"off {timing.check_exact(found, expected, timing.FP32):.0e}"

    return check


def main(options: Options, output: Path, case: str) -> None:
    """In a process of its own: write the rows."""
    options.wait()  # for autograd's engine asks once which devices there are, at the first backward
    rows.write(output, timed(case, options))


if __name__ == "__main__":
    main(Options.from_json(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:])
