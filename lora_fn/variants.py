"""How does a variant make its update? A row each, a file each; `layers` and `merge` read the row and know no variant.

A plain update is scaling * B A x. A variant may make the plain factors of its own, multiply by gains what base and
update give, or add the update for some tokens only; the placements of its own parameters are in `sharding`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from lora_fn import bdlora, dora, kasa, qalora
from lora_fn.errors import Problems
from lora_fn.layer_spec import LayerSpec
from lora_fn.spec import LoraSpec

Params = Mapping[str, Tensor]
Scaled = Callable[[Tensor, int], Tensor]


class Plain(Protocol):
    """(params, spec) -> params with the lora_A and lora_B of a plain update; `whole` says that they are canonical."""

    def __call__(
        self, params: Params, spec: LayerSpec, *, index: Tensor | None = None, whole: bool = False
    ) -> dict[str, Tensor]:
        """As `kasa.plain`."""
        ...


class Gains(Protocol):
    """A function of a layer's parameters and scaling (see `dora.gains`)."""

    def __call__(
        self, params: Params, spec: LayerSpec, scaled: Scaled, *, index: Tensor | None = None, whole: bool = False
    ) -> dict[str, Tensor]:
        """As `dora.gains`."""
        ...


def _same(params: Params, spec: LayerSpec, *, index: Tensor | None = None, whole: bool = False) -> dict[str, Tensor]:
    return dict(params)


def _none(
    params: Params, spec: LayerSpec, scaled: Scaled, *, index: Tensor | None = None, whole: bool = False
) -> dict[str, Tensor]:
    return {}


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """How an update differs from the plain one.

    Args:
        plain: -> the parameters with lora_A and lora_B as a plain update has them.
        gains: -> a factor for each output of the layer without its bias, by part; {} for none.
        start: -> the parameters of a new adapter that come of the weight and the other factors; {} for none.
        lacks: (a whole weight, the rank) -> two factors whose product the base of an adapter is without, for good; None
            for a base that stays.
        options: (what the user asks for, name of the layer) -> the fields of its LayerSpec that the variant needs.
        gated: Whether the update is added for some tokens only (`gate` of `apply`), so that no weight has it in.
        pads: Whether zeros may pad its factors to a larger rank.
        adds_up: Whether several updates of it add up to one.
    """

    plain: Plain = _same
    gains: Gains = _none
    start: Gains = _none
    lacks: Callable[[Tensor, int], tuple[Tensor, Tensor]] | None = None
    options: Callable[[LoraSpec, str], dict[str, Any]] = lambda spec, name: {"variant": spec.variant}
    gated: bool = False
    pads: bool = True
    adds_up: bool = True

    @property
    def bare(self) -> bool:
        """Whether its update is the plain one, whatever the weight."""
        return self.plain is _same and self.gains is _none and not self.gated


TABLE: Mapping[str, Variant] = {
    "lora": Variant(),
    "mica": Variant(),
    "dora": Variant(gains=dora.gains, start=dora.start, adds_up=False),
    "kasa": Variant(plain=kasa.plain, lacks=kasa.dropped, pads=False),
    "qalora": Variant(plain=qalora.plain, options=qalora.options),
    "bdlora": Variant(plain=bdlora.plain, options=bdlora.options, pads=False),
    "alora": Variant(gated=True, adds_up=False),
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


def check(path: str, spec: LayerSpec, problems: Problems) -> None:
    """Note why a layer cannot have its variant.

    Args:
        path: Its name, for the message.
        spec: The layer, with its adapter.
        problems: Where they are noted.
    """
    for part in spec.updates if TABLE[spec.variant].lacks is not None else ():
        most = min(part.size, spec.in_features) - 1
        if part.rank > most:
            problems.add(
                f"{path} ({part.name})" if part.name else path,
                f"has rank {part.rank}; as many singular components of the weight are dropped, and one is to be left, "
                f"so choose a rank of at most {most}.",
            )


def options_of(spec: LoraSpec, name: str) -> dict[str, Any]:
    """The fields of the `LayerSpec` of a layer that make the update the variant that is asked for.

    Raises:
        TargetError: The variant cannot be the layer's.
    """
    return TABLE[spec.variant].options(spec, name)


def plain_scaling(spec: LayerSpec) -> Scaled:
    """(factor, number of the update) -> the factor times the spec's own scaling of it."""
    return lambda factor, number: factor * spec.scaling_of(spec.updates[number])
