"""How does a case run in processes of its own? They write rows into a file, or print a value as their last line."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import rows
from benchmarks.options import Options

TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node")


def run(module: str, options: Options, *words: str, python: str = "", processes: int = 0) -> list[rows.Row]:
    """What `python -m module OPTIONS OUTPUT words...` writes into OUTPUT. Args as for `rows_of`."""
    return rows_of(
        module, options, lambda output: [options.to_json(), output, *words], python=python, processes=processes
    )


def rows_of(
    module: str,
    options: Options,
    words: Callable[[str], Sequence[str]],
    *,
    python: str = "",
    processes: int = 0,
) -> list[rows.Row]:
    """What a module writes.

    Args:
        module: With an end that writes rows.
        options: What was asked.
        words: Of the file to write, the module's command line.
        python: An interpreter; "" for this one.
        processes: That torchrun starts, with a thread each; 0 for one that it does not.

    Raises:
        RuntimeError: It wrote nothing; with the line that tells why.
    """
    several = (*TORCHRUN, str(processes)) if processes else ()
    threads = {"OMP_NUM_THREADS": "1"} if several else {}
    with tempfile.TemporaryDirectory(prefix="bench-") as place:
        output = Path(place, "rows.jsonl")
        command = [python or sys.executable, *several, "-m", module, *words(str(output))]
        environment = os.environ | threads | options.environment
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if not output.exists():
            raise RuntimeError(_first_error(done.stderr.splitlines()) or _reason(done))
        return rows.read(output)


def value(words: Sequence[str], *, python: str = "", environment: Mapping[str, str] = os.environ) -> Any:
    """What a process prints as its last line, in JSON.

    Args:
        words: What the interpreter is given.
        python: An interpreter; "" for this one.
        environment: Of the process.

    Raises:
        RuntimeError: It failed, or printed nothing; with the line that tells why.
    """
    done = subprocess.run([python or sys.executable, *words], env=environment, capture_output=True, text=True)
    if done.returncode or not done.stdout.strip():
        raise RuntimeError(_reason(done))
    return json.loads(done.stdout.splitlines()[-1])


def _first_error(lines: Sequence[str]) -> str:
    """The first line of an error, as Python or torchrun tells it."""
    return next((line.partition("]:")[2].strip() or line for line in lines if "Error" in line), "")


def _reason(done: subprocess.CompletedProcess[str]) -> str:
    """Why a process came to nothing: the last line of its errors; or how it ended, where it said none."""
    if done.stderr.strip():
        return done.stderr.strip().splitlines()[-1]
    if done.returncode < 0:
        return f"the process was ended by {signal.Signals(-done.returncode).name}"
    return f"the process ended with {done.returncode} and printed nothing"
