"""What may be asked of the benchmarks? The command line's options, as data that every process gets."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass

import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class Backend:
    """Where programs run.

    Args:
        device: Its name to torch.
        told: In words, in each row.
    """

    device: str
    told: str


BACKENDS: Mapping[str, Backend] = {
    "cpu": Backend(device="cpu", told="CPU"),
    "cuda": Backend(device="cuda", told="CUDA"),
}

_WAIT: Mapping[str, Callable[[], object]] = {"cpu": lambda: None, "cuda": lambda: torch.cuda.synchronize()}


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
