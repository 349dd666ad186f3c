"""How long does a collective take? Sizes in, seconds out, and the two constants that say it: latency and bandwidth.

A collective of n bytes (a gather's are those of its result) sends 2 (p-1)/p n bytes from each of p processes where it
is an all-reduce, (p-1)/p n otherwise. Its time is latency + sent / bandwidth: least squares of the relative errors, so
that small sizes decide on the latency and large ones on the bandwidth. What makes a tensor of n bytes of its result
again, to chain it, is timed without it and subtracted.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lora_fn import collectives

SIZES = tuple(1024 * 4**power for power in range(9))  # 1 KB to 64 MB
CHAIN = 4  # in one graph, each of the result of the one before, so that none is left out or joined with another
LEAST = 1e-9  # seconds that are left, whatever the noise of a difference


def _part(x: Tensor, axis: Any) -> Tensor:
    return x[: x.shape[0] // axis.size]


def _all_reduce(x: Tensor, axis: Any) -> Tensor:
    return collectives.reduce([x], axis)[0]


def _all_gather(x: Tensor, axis: Any) -> Tensor:
    return collectives.gather([_part(x, axis)], axis, dim=0)[0]


def _reduce_scatter(x: Tensor, axis: Any) -> Tensor:
    return collectives.reduce_scatter([x], axis, dim=0)[0].repeat(axis.size)


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """A collective.

    Args:
        run: Of a tensor of n bytes and an axis, one of n bytes again.
        alone: The same, but for the collective.
        times: What each process sends, in parts of (p-1)/p n.
    """

    run: Callable[[Tensor, Any], Tensor]
    alone: Callable[[Tensor, Any], Tensor]
    times: int


KINDS: Mapping[str, Kind] = {
    "all-reduce": Kind(run=_all_reduce, alone=lambda x, axis: x, times=2),
    "all-gather": Kind(run=_all_gather, alone=lambda x, axis: x, times=1),
    "reduce-scatter": Kind(run=_reduce_scatter, alone=lambda x, axis: _part(x, axis).repeat(axis.size), times=1),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One size of one collective.

    Args:
        kind: Such as "all-reduce".
        size: Its bytes.
        sent: Bytes that a process sends.
        seconds: Of each round.
    """

    kind: str
    size: int
    sent: float
    seconds: Sequence[float]


def measure(
    axis: Any, device: torch.device, wait: Callable[[], object], *, sizes: Sequence[int] = SIZES, rounds: int = 15
) -> list[Sample]:
    """Every collective over an axis, of every size.

    Args:
        axis: Bound, of more than one process.
        device: Whose.
        wait: Until the device is done.
        sizes: In bytes.
        rounds: Of each.
    """
    found = []
    for name, kind in KINDS.items():
        for size in sizes:
            x = torch.ones(size // 4, device=device)
            both = [(_chained(kind.run, x, axis, wait), _chained(kind.alone, x, axis, wait)) for _ in range(rounds + 2)]
            least = min(alone for _, alone in both[2:])
            seconds = [max(run - least, LEAST) / CHAIN for run, _ in both[2:]]
            sent = kind.times * (axis.size - 1) / axis.size * size
            found.append(Sample(kind=name, size=size, sent=sent, seconds=seconds))
    return found


def _chained(run: Callable[[Tensor, Any], Tensor], x: Tensor, axis: Any, wait: Callable[[], object]) -> float:
    """Seconds of a chain."""
    wait()
    collectives.barrier()
    start = time.perf_counter()
    for _ in range(CHAIN):
        x = run(x, axis)
    wait()
    return time.perf_counter() - start


def fit(samples: Sequence[Sample]) -> tuple[float, float]:
    """(latency in seconds, bandwidth in bytes per second, or inf where time does not grow with size) of the minima."""
    seconds = np.array([min(sample.seconds) for sample in samples])
    scaled = np.stack([1 / seconds, np.array([sample.sent for sample in samples]) / seconds], axis=1)
    ones = np.ones(len(samples))
    both = [float(number) for number in np.linalg.lstsq(scaled, ones, rcond=None)[0]]
    if min(both) < 0:  # then the other one alone
        alone = [float(column @ ones / (column @ column)) for column in scaled.T]
        both = [0.0, alone[1]] if both[0] < 0 else [alone[0], 0.0]
    latency, per_byte = both
    return latency, 1 / per_byte if per_byte else math.inf


def flops(device: torch.device, dtype: torch.dtype, wait: Callable[[], object], *, features: int, rounds: int) -> float:
    """FLOP/s of products of square matrices, the best round."""
    x = torch.randn(features, features).to(dtype).to(device)
    seconds = []
    for _ in range(rounds + 2):
        wait()
        start = time.perf_counter()
        y = x
        for _ in range(CHAIN):
            y = y @ x / features
        wait()
        seconds.append((time.perf_counter() - start) / CHAIN)
        del y
    return 2 * features**3 / min(seconds[2:])
