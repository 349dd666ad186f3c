"""How much memory does a training step take at most? Each program in a process of its own, above what it holds before.

    python -m benchmarks.peak OPTIONS PROGRAM CASE

On the CPU it is the process's peak (VmHWM) over its size before the step, with an allocator that gives back what is
freed, the smallest of some steps; on CUDA what torch's allocator says.
"""

from __future__ import annotations

import functools
import json
import os
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks import apart, rows
from benchmarks.options import Options
from benchmarks.programs import H512, PROGRAMS, TINY, Program, Setup, ours

METRIC, UNIT, STEPS = "peak memory of a step", "bytes", 4
# glibc keeps no freed memory of the size of an activation, and has one arena.
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "16384", "MALLOC_TRIM_THRESHOLD_": "16384", "MALLOC_ARENA_MAX": "1"}


def setups(options: Options) -> list[Setup]:
    """The cells."""
    if options.tiny:
        return [Setup(shape=TINY, rank=4)]
    shape = replace(H512, layers=4)
    return [Setup(shape=shape, dtype=t, device=options.device) for t in ("bfloat16", "float32")[: 2 - options.quick]]


def cases(options: Options) -> list[str]:
    """Their names."""
    return [str(setup) for setup in setups(options)]


def functional(setup: Setup) -> Program:
    """Ours under torch.func.grad, which keeps a graph of the backward."""
    made = ours(setup)
    names = {name: p.detach() for name, p in made.trained.items()}

    class Functional(Program):
        def step(self) -> torch.Tensor:
            def loss(params: Mapping[str, torch.Tensor]) -> torch.Tensor:
                return torch.func.functional_call(made.model, dict(params), kwargs=dict(made.inputs)).loss

            grads, value = torch.func.grad_and_value(loss)(names)
            self.number.append(len(grads))
            return value

    return Functional(model=made.model, trained=made.trained, inputs=made.inputs)


QUICK = ("frozen", "ours", "PEFT", "torch")


def programs() -> Mapping[str, Callable[[Setup], Program]]:
    """Those of the step's time, and one more way to take ours."""
    return {**PROGRAMS, "ours, torch.func.grad": functional}


def run(case: str, options: Options) -> Iterable[rows.Row]:
    """The rows of a cell."""
    names = [name for name in programs() if name != "PEFT, no autocast" or "bf16" in case]
    names = [name for name in names if name in QUICK or not (options.quick or options.tiny)]
    for name in names:
        words = ["-m", "benchmarks.peak", options.to_json(), name, case]
        told = ("B4", case, name, METRIC, UNIT)
        try:
            found = apart.value(words, environment=os.environ | ALLOCATOR)
            yield rows.measured(*told, found, backend=options.backend)
        except RuntimeError as error:
            yield rows.missing(*told, str(error), backend=options.backend)


def memory(key: str) -> int:
    """Bytes of this process: VmRSS now, VmHWM at most."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


def of_process(step: Callable[[], object]) -> int:
    """On the CPU."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts here
    before = memory("VmRSS")
    step()
    return memory("VmHWM") - before


def of_cuda(step: Callable[[], object]) -> int:
    """On CUDA."""
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


PEAK: Mapping[str, Callable[[Callable[[], object]], int]] = {"cpu": of_process, "cuda": of_cuda}


def main(options: Options, name: str, case: str) -> None:
    """In the process of one program: print the peaks of its steps."""
    torch.set_num_threads(options.threads)
    [setup] = [setup for setup in setups(options) if str(setup) == case]
    program, found = programs()[name](setup), list[int]()
    step = functools.partial(PEAK[options.device], program.step)
    for _ in range(STEPS):
        program.clear()
        found.append(step())
    print(json.dumps(found[1:]))


if __name__ == "__main__":
    main(Options.from_json(sys.argv[1]), *sys.argv[2:])
