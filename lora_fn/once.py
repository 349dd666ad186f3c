"""How is what follows from a spec alone worked out once? By a cache, which a compiler does not see."""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable
from typing import TypeVar

import torch

Value = TypeVar("Value", bound=Hashable)
Result = TypeVar("Result")
SPECS = 1 << 12  # of the layers of a large model


def once(function: Callable[[Value], Result]) -> Callable[[Value], Result]:
    """A pure function of one frozen value, whose results are kept; under torch.compile, the function itself."""
    kept = functools.lru_cache(SPECS)(function)

    @functools.wraps(function)
    def of(value: Value) -> Result:
        return function(value) if torch.compiler.is_compiling() else kept(value)

    return of
