"""What do Optimum Neuron's training models tell of their layers? Parts, heads and orders, out of their `specs`.

Its attention and MLP modules carry `specs`: how their weights come from Hugging Face's. Where they speak of a layer,
they count, and neither the stride of the layer nor the config of the model does. Modules and specs are told by the
names of their classes, so nothing of Optimum Neuron is imported.

Granite has layers that are not parallel. Under sequence parallel its lm_head gets a part of the sequence; and the loss,
which every process takes of all gathered logits, is summed in the gather's backward, so that all of its gradients come
out as many times too great as there are processes. `wrap` mends that (see `mend_gradients`).

Source: Optimum Neuron 0.4.6, `models/training/transformations_utils.py`, `models/training/granite/modeling_granite.py`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from adapters import nxd
from lora_fn import FusedPart, Heads, SpecError, TargetError, peft_format
from lora_fn.layout import query_heads

Modules = Mapping[str, nn.Module]

_TRAINING = "optimum.neuron.models.training"
_SPECS = f"{_TRAINING}.transformations_utils"
OWNER, MODEL = f"{_SPECS}.CustomModule", f"{_TRAINING}.modeling_utils.NeuronModelMixin"
_GRANITE = f"{_TRAINING}.granite.modeling_granite"
LINEAR, EMBEDDING = "torch.nn.modules.linear.Linear", "torch.nn.modules.sparse.Embedding"

# Layers that are not parallel, by the class of the module that holds them -> the dimension that sequence parallel cuts
# of what they get, None where they get the whole.
WHOLE: Mapping[tuple[str, str], int | None] = {
    (f"{_GRANITE}.GraniteModel", "embed_tokens"): None,
    (f"{_GRANITE}.GraniteForCausalLM", "lm_head"): 0,
}
# Whose gather of the logits sums the gradients of a loss that every process has: class -> its last layer.
SUMMED: Mapping[str, str] = {f"{_GRANITE}.GraniteForCausalLM": "lm_head"}


def part_names(modules: Modules, path: str) -> tuple[str, ...]:
    """The parts of a fused layer of neuronx-distributed, by its owner's `specs` where they speak of it; else ().

    Args:
        modules, path: As in `given`.

    Raises:
        TargetError: `specs` that we do not follow.
    """
    layer = modules[path]
    try:
        parts = _told(modules, path).get("parts")
    except (SpecError, TargetError) as error:
        raise TargetError(f"{path}: {error}") from error
    return nxd.part_names(layer) if parts is None else tuple(part.name for part in parts)


def given(modules: Modules, path: str) -> dict[str, Any]:
    """What the `LayerSpec` of a layer takes that the layer itself does not know.

    Args:
        modules: All of a model's, by name.
        path: Name of the layer.

    Returns:
        Arguments of the functions of `bind.SPEC_OF`: `parts` of a column layer, `heads` of grouped-query attention and
        of the row layer that takes its outputs, `axis` and `sequence_dim` of a layer that is not parallel. Empty of any
        other layer, and of most that are not Optimum Neuron's.

    Raises:
        SpecError: `specs` with numbers that cannot be.
        TargetError: `specs` that we do not follow, an nn.Linear or nn.Embedding in a model of Optimum Neuron under
            sequence parallel of which we do not know whether it gets a part; or as `nxd.heads_of`.
    """
    if nxd.class_name(modules[path]) in (LINEAR, EMBEDDING):
        return _of_whole_layer(modules, path)
    told = _told(modules, path)
    if told:
        return told
    heads = nxd.heads_of(modules[""], path)
    return {} if heads is None else {"heads": heads}


def _told(modules: Modules, path: str) -> dict[str, Any]:
    """What the `specs` of the module that holds a layer say of it, {} where there are none."""
    owner, _, name = path.rpartition(".")
    holder: Any = modules[owner]
    if nxd.class_name(modules[path]) not in nxd.CLASSES or not _is_a(holder, OWNER):
        return {}
    for spec in holder.specs:
        follow = SPECS.get(nxd.class_name(spec))
        if follow is None:
            known = sorted(each.rpartition(".")[2] for each in SPECS)
            raise TargetError(f"specs: have a {type(spec).__name__}, expected one of {known}; leave the layer out.")
        found = follow(spec, name)
        if found:
            return found
    return {}


def _fused(told: Any, name: str) -> dict[str, Any]:
    """The parts, where the layer `name` is one of linears side by side.

    Raises:
        TargetError: They lie otherwise.
    """
    if name != told.fused_linear_name:
        return {}
    if told.fuse_axis != 0:
        raise TargetError(f"is fused along dimension {told.fuse_axis}, expected 0, its output; leave the layer out.")
    _check_size(told)
    parts = (FusedPart(name=_part(n), size=d) for n, d in zip(told.linear_names, told.original_dims, strict=True))
    return {"parts": tuple(parts)}


def _grouped(told: Any, name: str) -> dict[str, Any]:
    """The heads, where the layer `name` is one of grouped-query attention.

    Raises:
        TargetError: They lie otherwise than we can say.
    """
    if name not in (told.gqa_qkv_projection_name, told.output_projection_name):
        return {}
    names = [told.query_projection_name, told.key_projection_name, told.value_projection_name]
    if [_part(each) for each in names] != ["q", "k", "v"]:
        raise TargetError(f"has the parts {names}, expected q_proj, k_proj and v_proj; leave the layer out.")
    _check_size(told)
    query, key_value, copies = told.num_attention_heads, told.num_key_value_heads, told.kv_size_multiplier
    heads = Heads(query=query, key_value=key_value, multiplier=copies, order="tiled")
    try:
        ranks = range(told.tp_size)
        theirs = [told.compute_query_indices_for_rank(told.tp_size, r, query, key_value, copies) for r in ranks]
    except (IndexError, RuntimeError, ZeroDivisionError):
        theirs = []
    layout = query_heads(query, key_value, told.tp_size, multiplier=copies)
    if [x.tolist() for x in theirs] != [layout.places(rank).tolist() for rank in range(told.tp_size)]:
        raise TargetError(
            f"lays {query} query heads beside {copies} copies of {key_value} key-value heads over {told.tp_size} "
            f"processes in no order which we know; choose a kv_size_multiplier of at most the processes."
        )
    return {"heads": heads}


# Class of a spec -> what it says of a layer, {} of one that it does not speak of.
SPECS: Mapping[str, Callable[[Any, str], dict[str, Any]]] = {
    f"{_SPECS}.FusedLinearsSpec": _fused,
    f"{_SPECS}.GQAQKVColumnParallelLinearSpec": _grouped,
}


def mend_gradients(model: nn.Module) -> list[Any]:
    """Make the gradients of a model what the loss that it returns says: see above. No output changes.

    Args:
        model: Any; only Optimum Neuron's Granite under sequence parallel is changed.

    Returns:
        Handles of what was changed, whose `remove` undoes it.
    """
    module: Any
    handles: list[Any] = []
    for module in model.modules():
        last = SUMMED.get(nxd.class_name(module))
        if last is not None and module.trn_config.sequence_parallel_enabled:
            size = nxd.default_axis().size
            handles.append(module.get_submodule(last).register_forward_hook(functools.partial(_mended, size)))
    return handles


class _Divided(torch.autograd.Function):
    """x unchanged, its gradient divided by a number."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, number: int) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.number = inputs[1]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad / ctx.number, None


def _mended(size: int, module: nn.Module, args: object, y: Tensor) -> Tensor:
    return _Divided.apply(y, size)


def _of_whole_layer(modules: Modules, path: str) -> dict[str, Any]:
    """What a layer that is not parallel gets."""
    above = list(_above(modules, path))
    theirs = [module for module in above if _is_a(module, MODEL)]
    if not theirs or not theirs[0].trn_config.sequence_parallel_enabled:
        return {}
    key = (nxd.class_name(above[0]), path.rpartition(".")[2])
    if key not in WHOLE:
        raise TargetError(
            f"is in a {type(theirs[0]).__name__} under sequence parallel, and is not parallel itself, so that it is "
            f"not known whether it gets the whole sequence; leave the layer out, or train without sequence parallel."
        )
    dim = WHOLE[key]
    return {} if dim is None else {"axis": nxd.default_axis(), "sequence_dim": dim}


def _above(modules: Modules, path: str) -> Iterator[Any]:
    """The modules that hold a layer, the nearest first."""
    while path:
        path = path.rpartition(".")[0]
        yield modules[path]


def _is_a(module: nn.Module, name: str) -> bool:
    """Whether a module is of a class of that qualified name, or derived from it."""
    cls: Any = type(module)
    return name in _names(cls)


@functools.cache
def _names(cls: Any) -> frozenset[str]:
    """The qualified names of a class and of those that it is derived from."""
    return frozenset(f"{each.__module__}.{each.__qualname__}" for each in cls.__mro__)


def _part(name: str) -> str:
    """The part that becomes the module `name` in Hugging Face's models."""
    part = next((part for part, module in peft_format.PART_MODULES.items() if module == name), name)
    if peft_format.part_path("", part) != name:
        raise TargetError(f"has a part named {name!r}, which means another one here; leave the layer out.")
    return part


def _check_size(told: Any) -> None:
    found, expected = told.tp_size, nxd.default_axis().size
    if found != expected:
        raise TargetError(f"has specs for {found} processes, found {expected}; make the model on this mesh.")
