"""How does a tensor lie over the axis? `Shard(dim)`, `Replicate()` or `Partial()`.

The names and meanings are those of torch.distributed.tensor, as frozen values of our own, because importing torch's
costs half a second; `to_torch` converts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.distributed.tensor.placement_types import Placement as TorchPlacement


@dataclass(frozen=True, slots=True)
class Shard:
    """Process `index` of `size` holds the contiguous part `index` of the tensor's dimension `dim`."""

    dim: int


@dataclass(frozen=True, slots=True)
class Replicate:
    """Every process holds the whole tensor, bit for bit the same."""


@dataclass(frozen=True, slots=True)
class Partial:
    """Every process holds a summand; the tensor is their sum."""


Placement = Shard | Replicate | Partial


def to_torch(placement: Placement) -> TorchPlacement:
    """The same placement as torch.distributed.tensor's own class."""
    from torch.distributed import tensor

    if isinstance(placement, Shard):
        return tensor.Shard(placement.dim)
    return tensor.Replicate() if isinstance(placement, Replicate) else tensor.Partial()
