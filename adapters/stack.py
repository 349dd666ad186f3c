"""Which layers is a model stacked of? `stack` repeats its decoder layers, each with the weights of the one it is of.

Source: PEFT 0.21, `tuners/tuners_utils.py` `replicate_layers`.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn

from lora_fn import TargetError

LISTS = ("layers", "h", "layer")  # what models call the list of their layers

# What a config says of layers -> what it says of a stack of some, from their numbers.
OF_LAYERS: Mapping[str, Callable[[Any, Sequence[int]], Any]] = {
    "num_hidden_layers": lambda value, numbers: len(numbers),
    "layer_types": lambda value, numbers: value and [value[i] for i in numbers],
}

# What a module is asked to do besides its forward; whoever holds a handle can still take it back.
HOOKS = (
    *("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called"),
    *("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs", "_backward_hooks", "_backward_pre_hooks"),
)


def stacked(model: nn.Module) -> tuple[tuple[int, int], ...]:
    """The ranges that `stack` was called with; () for a model as it was made."""
    return vars(model).get("stacked_of", ())


def stack(model: nn.Module, ranges: Sequence[tuple[int, int]]) -> Callable[[], None]:
    """Stack a model anew, in place, of ranges of its layers. Copies share their weights, and nothing else.

    Args:
        model: With a list of layers named as in `LISTS`; on any device, the meta device too.
        ranges: (start, end), each of layers start to end - 1, one after the other; () for the model as it is.

    Returns:
        What makes the model as it was.

    Raises:
        TargetError: The model is stacked already, has no such list, or fewer layers. Nothing is changed then.
    """
    if not ranges:
        return lambda: None
    if stacked(model):
        raise TargetError(f"layer_replication: the model is stacked of {list(stacked(model))} already; load it again.")
    lists = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and n.split(".")[-1] in LISTS]
    if not lists:
        raise TargetError(
            f"layer_replication: the model has no list of layers named {' or '.join(LISTS)}; leave it out."
        )
    name, layers = lists[0]
    for start, end in ranges:
        if not 0 <= start < end <= len(layers):
            raise TargetError(f"layer_replication: {[start, end]} is no range of the {len(layers)} layers of {name}.")
    numbers = [i for start, end in ranges for i in range(start, end)]
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, nn.ModuleList(_copied(layers[i]) for i in numbers))
    new = model.get_submodule(name)
    assert isinstance(new, nn.ModuleList)
    for place, layer in enumerate(new):
        # What hangs on a layer itself belongs to its place: the sequence is cut before the first one.
        own = layers[place] if place < len(layers) else layers[-1] if len(layers) > 1 else nn.Module()
        _take_hooks(layer, own)
        for module in layer.modules():
            if "layer_idx" in vars(module):
                module.layer_idx = place  # type: ignore[assignment]
    configs = {id(c): c for m in model.modules() if (c := vars(m).get("config")) is not None}
    before = [
        (config, {key: value for key, value in vars(config).items() if key in OF_LAYERS}) for config in configs.values()
    ]
    for config, values in before:
        vars(config).update({key: OF_LAYERS[key](value, numbers) for key, value in values.items()})
    model.stacked_of = tuple(map(tuple, ranges))  # type: ignore[assignment]

    def undo() -> None:
        setattr(model.get_submodule(parent), last, layers)
        for config, values in before:
            vars(config).update(values)
        del model.stacked_of

    return undo


def _copied(module: nn.Module) -> nn.Module:
    """A module of the same parameters and buffers, and copies of the modules in it."""
    own = copy.copy(module)
    own._parameters, own._buffers = dict(module._parameters), dict(module._buffers)
    own._modules = {name: None if child is None else _copied(child) for name, child in module._modules.items()}
    _take_hooks(own, module)
    return own


def _take_hooks(module: nn.Module, source: nn.Module) -> None:
    for hooks in HOOKS:
        setattr(module, hooks, OrderedDict(getattr(source, hooks) or {}))
