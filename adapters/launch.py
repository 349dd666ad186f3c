"""How do a job's processes start? With torch's elastic launcher, or they are torchrun's already."""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import sys
from collections.abc import Sequence

OURS = "LORA_FN_LAUNCHER"


def is_worker() -> bool:
    """Whether torch's elastic launcher (torchrun's too) started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def launch(module: str, arguments: Sequence[str], *, processes: int) -> int:
    """Run `python -m module arguments...` in so many processes, and wait for them.

    Args:
        module: To run.
        arguments: Of its command line.
        processes: How many, on this machine.

    Returns:
        The exit code: 0, that of the first process that failed, or a shell's for a signal that ended all.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    before = dict(os.environ)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    os.environ[OURS] = str(os.getpid())
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id=f"lora-fn-{os.getpid()}",
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
    )
    try:
        elastic_launch(config, sys.executable)("-m", module, *arguments)
    except ChildFailedError as error:
        code = error.get_first_failure()[1].exitcode
        return code if code > 0 else 1
    except SignalException as error:
        return 128 + error.sigval
    finally:  # this process is no worker: with our mark it would end itself, were it to run a job of its own
        for name in (OURS, "OMP_NUM_THREADS"):
            os.environ.pop(name, None)
            os.environ |= {name: before[name]} if name in before else {}
    return 0


def end_with_launcher() -> None:
    """Let the kernel end this process when the launcher that started it dies, so that no half of a run goes on."""
    if OURS in os.environ and sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
        if os.getppid() != int(os.environ[OURS]):
            os.kill(os.getpid(), signal.SIGKILL)
