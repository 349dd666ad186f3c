"""How does a case run in processes of its own? Started with what was asked, they write their rows into a file."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

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
            raise RuntimeError(_reason(done.stderr.splitlines()) or f"the process ended with {done.returncode}")
        return rows.read(output)


def _reason(lines: Sequence[str]) -> str:
    """The first line of an error, as Python or torchrun tells it."""
    return next((line.partition("]:")[2].strip() or line for line in lines if "Error" in line), "")
