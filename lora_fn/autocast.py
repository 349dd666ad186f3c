"""What is a layer under `torch.autocast`? The layer in the dtype that its base would be cast to, the whole of it.

Factors are cast to the dtype of the activations anyway, scalings multiply in the wider one, and sums over processes
have the dtype that the spec says: there is nothing left inside that autocast could choose.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

Function = TypeVar("Function", bound=Callable[..., Any])
_BASE = ("weight", "bias")
_CAST = (torch.float32, torch.float16, torch.bfloat16)  # wider ones autocast leaves as they are


def lowered(function: Function) -> Function:
    """A function of (params, x, ...) that under autocast casts x, and the base's weight and bias with it, and then
    computes without autocast. What is no activation (ids) stays as it is, and the weight with it."""

    @functools.wraps(function)
    def of(params: Mapping[str, Tensor], x: Tensor, *args: Any, **more: Any) -> Any:
        device = x.device.type
        if not _is_on(device):
            return function(params, x, *args, **more)
        dtype = torch.get_autocast_dtype(device)
        if x.dtype in _CAST:
            x = x.to(dtype)
            params = {name: p.to(dtype) if _is_cast(name, p) else p for name, p in params.items()}
        with off(x.device):
            return function(params, x, *args, **more)

    return cast(Function, of)


def off(device: torch.device) -> AbstractContextManager[object]:
    """Where autocast does nothing to what is on a device."""
    return torch.autocast(device.type, enabled=False) if _is_on(device.type) else nullcontext()


def _is_on(device: str) -> bool:
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def _is_cast(name: str, p: Tensor) -> bool:
    return name.partition(".")[0] in _BASE and p.dtype in _CAST
