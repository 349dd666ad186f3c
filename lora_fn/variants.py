"""How does a variant make its update? A row each, a file each; `layers` and `merge` read the row and know no variant.

A plain update is scaling * B A x. A variant may multiply by gains what the base and the update give, and have
parameters of its own, whose placements are in `sharding`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from lora_fn import dora
from lora_fn.layer_spec import LayerSpec

Params = Mapping[str, Tensor]


class Gains(Protocol):
    """A function of a layer's parameters (see `dora.gains`)."""

    def __call__(
        self,
        params: Params,
        spec: LayerSpec,
        scaled: Callable[[Tensor, int], Tensor],
        *,
        index: Tensor | None = None,
        whole: bool = False,
    ) -> dict[str, Tensor]:
        """As `dora.gains`."""
        ...


def _none(
    params: Params,
    spec: LayerSpec,
    scaled: Callable[[Tensor, int], Tensor],
    *,
    index: Tensor | None = None,
    whole: bool = False,
) -> dict[str, Tensor]:
    return {}


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """How an update differs from the plain one.

    Args:
        gains: -> a factor for each output of the layer without its bias, by part; {} for none.
        start: -> the parameters of a new adapter that come of the weight and the other factors; {} for none.
    """

    gains: Gains = _none
    start: Gains = _none


TABLE: Mapping[str, Variant] = {
    "lora": Variant(),
    "mica": Variant(),
    "dora": Variant(gains=dora.gains, start=dora.start),
}


def start(params: Params, spec: LayerSpec, *, index: Tensor | None = None, whole: bool = False) -> dict[str, Tensor]:
    """A new adapter's parameters that come of the weight, which `init` has not: DoRA's magnitudes.

    Args:
        params: The base's parameters and the factors.
        spec: The layer.
        index: As for `apply`.
        whole: The parameters are canonical, not local.

    Returns:
        New tensors by name, canonical or local as params are; {} for most variants.
    """
    return TABLE[spec.variant].start(params, spec, plain_scaling(spec), index=index, whole=whole)


def plain_scaling(spec: LayerSpec) -> Callable[[Tensor, int], Tensor]:
    """(factor, number of the update) -> the factor times the spec's own scaling of it."""
    return lambda factor, number: factor * spec.scaling_of(spec.updates[number])
