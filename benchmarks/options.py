"""What may be asked of the benchmarks? The command line's options, as data that every process gets."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace

import torch

from lora_fn import SpecError


@dataclass(frozen=True, slots=True, kw_only=True)
class Backend:
    """Where programs run.

    Args:
        device: Its name to torch.
        told: In words, in each row.
        pjrt: What torch_xla is told to run on; "" where it is not used.
    """

    device: str
    told: str
    pjrt: str = ""


XLA_ON_CPU = "XLA on CPU, not a Neuron device"
BACKENDS: Mapping[str, Backend] = {
    "cpu": Backend(device="cpu", told="CPU"),
    "cuda": Backend(device="cuda", told="CUDA"),
    "xla": Backend(device="xla", told=XLA_ON_CPU, pjrt="CPU"),
    "neuron": Backend(device="xla", told="Neuron device", pjrt="NEURON"),
}


def _sync() -> None:
    """Cut the graph, and wait until it has run."""
    import torch_xla

    torch_xla.sync(wait=True)


_WAIT: Mapping[str, Callable[[], object]] = {
    "cpu": lambda: None,
    "cuda": lambda: torch.cuda.synchronize(),
    "xla": _sync,
}


def check_here(where: str) -> None:
    """Can a backend run in this process?

    Raises:
        SpecError: Its device is not here.
    """
    from adapters.launch import IS_THERE

    here = [name for name, backend in BACKENDS.items() if IS_THERE[backend.device]()]
    if where not in here:
        raise SpecError(f"--backend is {where}, whose device torch does not find here; expected {' or '.join(here)}.")


def positive(word: str) -> int:
    """A number on a command line, of at least 1."""
    if not word.isdecimal() or int(word) < 1:
        raise argparse.ArgumentTypeError(f"is {word}, expected an integer of at least 1.")
    return int(word)


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What was asked.

    Args:
        where: Name of the backend.
        rounds: Of what is timed within one process.
        quick: Fewer cells and smaller files.
        long: More cells than by default.
        tiny: Sizes for tests of the benchmarks themselves.
        threads: Of one process; those of a group have one each.
        xla_python: An interpreter that has torch_xla, or "".
        nxd, optimum: Checkouts of neuronx-distributed and Optimum Neuron, or "".
    """

    where: str = "cpu"
    rounds: int = 15
    quick: bool = False
    long: bool = False
    tiny: bool = False
    threads: int = 2
    xla_python: str = ""
    nxd: str = ""
    optimum: str = ""

    @property
    def backend(self) -> str:
        """In words."""
        return BACKENDS[self.where].told

    @property
    def device(self) -> str:
        """To torch."""
        return BACKENDS[self.where].device

    @property
    def environment(self) -> dict[str, str]:
        """Of a process on the backend."""
        pjrt = BACKENDS[self.where].pjrt
        return {"PJRT_DEVICE": pjrt} if pjrt else {}

    @property
    def on_xla(self) -> Options:
        """For a process with torch_xla: its CPU device, where no other one is asked for."""
        return self if self.device == "xla" else replace(self, where="xla")

    def wait(self) -> None:
        """Until the device is done."""
        _WAIT[self.device]()

    def to_json(self) -> str:
        """For another process."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Options:
        """The inverse of `to_json`."""
        return cls(**json.loads(text))
