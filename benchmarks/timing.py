"""How is a step timed? Programs take turns within a round, in one process; nothing is timed that is not right."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Iterable, Mapping

from torch import Tensor

FP32, BF16 = 1e-5, 2.0
WARM = 2


class Wrong(Exception):
    """A program's numbers are not those of the reference: there is nothing to time."""


def relative(found: Tensor, expected: Tensor) -> float:
    """max|a - b| / max|b|."""
    found, expected = found.detach().double(), expected.detach().double()
    return float((found - expected).abs().max() / expected.abs().max().clamp_min(1e-300))


def rms(found: Tensor, expected: Tensor) -> float:
    """The root of the mean square of a - b, over that of b."""
    found, expected = found.detach().double(), expected.detach().double()
    return float((found - expected).norm() / expected.norm().clamp_min(1e-300))


def largest(errors: Iterable[float]) -> float:
    """The largest error; inf where one is NaN, which `max` would lose. 0 of none."""
    return max((math.inf if math.isnan(error) else error for error in errors), default=0.0)


def check_exact(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], tolerance: float) -> float:
    """The largest relative error of all tensors.

    Raises:
        Wrong: It is above the tolerance, or a tensor is not there.
    """
    _check_names(found, expected)
    errors = {name: largest([relative(found[name], expected[name])]) for name in expected}
    name = max(errors, key=errors.__getitem__)
    if errors[name] > tolerance:
        raise Wrong(f"{name} is off by {errors[name]:.1e} of its largest element, allowed are {tolerance:.0e}")
    return errors[name]


def check_rounded(
    found: Mapping[str, Tensor], expected: Mapping[str, Tensor], plain: Mapping[str, Tensor], factor: float = BF16
) -> float:
    """Root mean square error of bf16 tensors over that of a plain bf16 program, both against float64; over all tensors.

    Raises:
        Wrong: It is above the factor, or a tensor is not there.
    """
    _check_names(found, expected)

    def total(tensors: Mapping[str, Tensor]) -> float:
        return sum(rms(tensors[name], expected[name]) ** 2 for name in expected) ** 0.5

    ratio = total(found) / total(plain)
    if not ratio <= factor:
        raise Wrong(f"its rounding error is {ratio:.1f} times that of plain bf16 autograd, allowed are {factor:.0f}")
    return ratio


def _check_names(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    absent = sorted(set(expected) - set(found))
    if absent:
        raise Wrong(f"{absent[0]} has no gradient")


def interleaved(
    steps: Mapping[str, Callable[[], object]],
    rounds: int,
    *,
    between: Callable[[], object] = lambda: None,
    wait: Callable[[], object] = lambda: None,
) -> dict[str, list[float]]:
    """Seconds of each step in each round: A B C, B C A, C A B, ...

    Args:
        steps: What is timed, by name.
        rounds: How many.
        between: Called before each, not timed.
        wait: Called after each, timed: until a device is done.
    """
    names, found = list(steps), {name: list[float]() for name in steps}
    for _ in range(WARM):
        for step in steps.values():
            between()
            step()
            wait()
    gc.collect()
    gc.disable()
    try:
        for number in range(rounds):
            first = number % len(names)
            for name in names[first:] + names[:first]:
                between()
                start = time.perf_counter()
                steps[name]()
                wait()
                found[name].append(time.perf_counter() - start)
    finally:
        gc.enable()
    return found
