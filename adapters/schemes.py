"""By which scheme does the update of each layer meet the axis? What the user says, as a field of its `LayerSpec`; or
what costs the least."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping

from lora_fn import LayerSpec, SpecError, cost, siblings
from lora_fn.layer_spec import SCHEMES, changed, why_not_by_rank
from lora_fn.machines import Machine

Scheme = str | Callable[[LayerSpec], str | None] | None
NAMES = tuple(name for name in SCHEMES if name is not None)
AUTO = "auto"  # what a command line calls the cheapest of those that a layer can have
WORDS = (*NAMES, AUTO)
OWN = (None, "fold", "concat")  # what a function may call that which the rules table says of a layer


def check(scheme: Scheme) -> None:
    """Refuse a scheme that there is not.

    Raises:
        SpecError: Names those that there are.
    """
    if scheme is not None and scheme not in NAMES and not callable(scheme):
        raise SpecError(
            f"scheme: is {scheme!r}, expected {' or '.join(map(repr, NAMES))}, a function of a LayerSpec, or None."
        )


def chosen(layer: LayerSpec, scheme: Scheme) -> LayerSpec:
    """A layer with the scheme that is asked for, where it can have it.

    Args:
        layer: With its adapter.
        scheme: A name, of layers that have such a scheme; a function that gives each layer the name of its own; None
            for what the rules table says.

    Raises:
        SpecError: A rank that the scheme cannot cut, or a function that gives what the layer cannot have.
    """
    if callable(scheme):
        own = scheme(layer)
        return layer if own in OWN else changed(layer, scheme=own)
    return layer if scheme is None or why_not_by_rank(layer) else changed(layer, scheme=scheme)


def cheapest(
    layer: LayerSpec,
    machine: Machine,
    *,
    tokens: int,
    itemsize: int = 2,
    microbatches: int | None = None,
    sequence_parallel: bool = False,
) -> cost.Choice:
    """The cheapest scheme of a layer, as models of ours have it; the same on every process.

    Args:
        layer: With its adapter.
        machine, tokens, itemsize, microbatches: As for `lora_fn.cost.choose`.
        sequence_parallel: Whether the model is; the layer does not tell, where its input is gathered before it.
    """
    layer = changed(layer, scheme=None)
    # Outside of the blocks, where a layer is padded, no gather brings H.
    brought = sequence_parallel and siblings.rides(layer) and not layer.pad
    own = cost.CONCAT if brought else None
    return cost.choose(layer, tokens, machine, itemsize=itemsize, microbatches=microbatches, own=own)


def told(planned: Mapping[str, LayerSpec], choice: Callable[[LayerSpec], cost.Choice]) -> list[list[str]]:
    """Rows for a table: which layers have which scheme, and the seconds that it was chosen for.

    Args:
        planned: {path: layer}.
        choice: Of a layer.
    """
    found: Counter[tuple[str, str, str]] = Counter()
    for path, layer in planned.items():
        if layer.updates:
            of = choice(layer)
            found[path.rpartition(".")[2], layer.scheme or next(iter(of.costs), of.scheme), of.why] += 1
    head = ["layers", "", "scheme", "a microbatch, forward and backward"]
    return [head, *([name, str(number), scheme, why] for (name, scheme, why), number in found.items())]


def check_used(planned: Mapping[str, LayerSpec], scheme: Scheme) -> None:
    """Refuse a name that no layer has, where there are several processes.

    Args:
        planned: {path: adapted layer}.
        scheme: What was asked for.

    Raises:
        SpecError: Says why, of the first layer.
    """
    cut = {path: layer for path, layer in planned.items() if layer.axis.size > 1 and layer.updates}
    if not isinstance(scheme, str) or not cut or any(layer.scheme == scheme for layer in cut.values()):
        return
    path, layer = next(iter(cut.items()))
    why = next(iter(why_not_by_rank(layer)), "where the factors are those of another layer")
    raise SpecError(
        f"scheme: is {scheme!r}, which none of the {len(cut)} adapted layers that are cut has; {path} has none {why}. "
        f"Leave it out."
    )
