"""How do a job's processes start, and agree? With torch's elastic launcher, or they are torchrun's already."""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
import logging
import math
import os
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NoReturn

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from lora_fn import Axis, LoraFnError, SpecError, collectives

OURS = "LORA_FN_LAUNCHER"
BACKENDS = {"cpu": "gloo", "cuda": "nccl", "xla": "xla"}
LONGEST_ERROR = 4096  # bytes that the other processes get to see


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


def leave() -> None:
    """Leave the group of processes, where there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def end(code: int) -> NoReturn:
    """End this process with an exit code. A worker ends at once, without the interpreter's own end.

    There a thread of gloo's that still holds a tensor of the last collective asks for the interpreter's lock, and
    aborts the process (torch 2.13): one in some dozens, whose exit code would then be that of a crash.
    """
    if is_worker():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def is_first() -> bool:
    """Whether this is the first process of all."""
    return not dist.is_initialized() or dist.get_rank() == 0


def flag(name: str) -> str:
    """The command line's name of a field of a job."""
    return "--" + name.replace("_", "-")


# Whether this machine has a device.
IS_THERE: dict[str, Callable[[], bool]] = {
    "cpu": lambda: True,
    "cuda": torch.cuda.is_available,
    "xla": lambda: importlib.util.find_spec("torch_xla") is not None,
}


def check_device(kind: str) -> None:
    """Refuse a device that this machine has not.

    Raises:
        SpecError: As said.
    """
    if not IS_THERE[kind]():
        have = ", ".join(name for name, is_there in IS_THERE.items() if is_there())
        raise SpecError(f"{flag('device')}: is {kind!r}, which torch does not find here; expected one of {have}.")


def process_device(kind: str) -> torch.device:
    """This process's device."""
    if kind == "xla":
        import torch_xla

        return torch_xla.device()
    if kind == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        return torch.device(kind, torch.cuda.current_device())
    return torch.device(kind)


def mesh(axes: Mapping[str, int], device: str) -> DeviceMesh | None:
    """The mesh over the processes that were started, or None for one process alone.

    Args:
        axes: Name of each dimension -> how many processes, from the outermost to the innermost.
        device: One of `BACKENDS`.

    Raises:
        SpecError: No such device here, or another number of processes.
    """
    check_device(device)
    wanted = math.prod(axes.values())
    started = dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", "1"))
    if started != wanted:
        asked = " x ".join(f"{flag(name)} {size}" for name, size in reversed([*axes.items()]))
        raise SpecError(
            f"{asked} take {wanted} processes, {started} were started; "
            f"make torchrun's --nnodes times --nproc-per-node {wanted}."
        )
    if started == 1:
        return None
    if device == "xla":
        importlib.import_module("torch_xla.distributed.xla_backend")  # registers it
    if not dist.is_initialized():
        method = "xla://" if device == "xla" else None
        dist.init_process_group(BACKENDS[device], init_method=method)
    return init_device_mesh(device, tuple(axes.values()), mesh_dim_names=tuple(axes))


@contextmanager
def together(axes: Sequence[Axis], device: torch.device) -> Iterator[None]:
    """What all processes do, or none: an error of some is raised on all, so that nobody waits for who has gone."""
    error = None
    try:
        yield
    except LoraFnError as own:
        error = own
    told = torch.zeros(*(axis.size for axis in axes), LONGEST_ERROR)
    if error is not None:
        text = str(error).encode()[:LONGEST_ERROR]
        place = tuple(axis.index or 0 for axis in axes)
        told[place][: len(text)] = torch.tensor(list(text), dtype=told.dtype)
    told = told.to(device)  # written before: what is written is no part of a graph
    for axis in axes:
        [told] = collectives.reduce_flat([told], axis)
    told = told.cpu().flatten(0, -2)
    if error is not None:
        raise error
    for text in told[told.any(-1)].tolist():
        raise LoraFnError(bytes(map(int, text)).rstrip(b"\0").decode(errors="ignore"))
