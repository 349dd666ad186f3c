"""Which layer of neuronx-distributed is which kind? Its attributes, read into a `LayerSpec`; its marks on parameters.

A module of it is, for us, a holder of parameters and attributes: its forward is never called. Modules are told by the
name of their concrete class, so nothing of neuronx-distributed is imported before there is one.

Its trainer reads marks, which are attributes of parameters. A wrapped layer's factors carry them (see `mark`), and keep
them when the model moves. In the "deferred" mode, factors with partial gradients carry `sequence_parallel_enabled`:
its optimizer then sums them over the default tensor-parallel group, in `grad` or in `main_grad`, if its config says
`sequence_parallel=True` (the layers may be without). Have them summed there, or by `lora_fn.sync_gradients`, never by
both. Its optimizer knows of no key-value heads with copies: use "summed" for those.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from adapters.parallel import attribute, dtype_name
from lora_fn import Axis, FusedPart, Heads, LayerSpec, Quantization, TargetError, Window, sharding
from lora_fn.axis import axis_of_group
from lora_fn.errors import Problems
from lora_fn.placement import Shard

_LAYERS = "neuronx_distributed.parallel_layers.layers"
COLUMN, ROW, EMBEDDING = (f"{_LAYERS}.{n}" for n in ("ColumnParallelLinear", "RowParallelLinear", "ParallelEmbedding"))
QKV = "neuronx_distributed.modules.qkv_linear.GQAQKVColumnParallelLinear"
_QUANTIZED = "neuronx_distributed.quantization.quantization_layers"
QUANTIZED_COLUMN, QUANTIZED_ROW = (f"{_QUANTIZED}.Quantized{which}Parallel" for which in ("Column", "Row"))
CLASSES = (COLUMN, ROW, EMBEDDING, QKV, QUANTIZED_COLUMN, QUANTIZED_ROW)
CONV_OUTPUT, CONV_INPUT = (f"{_LAYERS}.{which}ChannelParallelConv2d" for which in ("Output", "Input"))
_MOE = "neuronx_distributed.modules.moe.moe_parallel_layers"
EXPERTS_COLUMN, EXPERTS_ROW = (f"{_MOE}.ExpertFused{which}ParallelLinear" for which in ("Column", "Row"))
EXPERTS = (EXPERTS_COLUMN, EXPERTS_ROW)
# For NxDPPModel's leaf_module_cls: parameters of a wrapped model live in these only.
LEAF_MODULES = ("BoundLayer", "LoraLayer")

# Stride of a column layer -> the names of the parts that lie side by side on each process.
STRIDES: Mapping[int, tuple[str, ...]] = {1: (), 2: ("gate", "up"), 3: ("q", "k", "v")}

# Class -> attribute -> the only value of it that we support, and why.
_ORDER = "expected None: no other order of the processes is supported"
_ONLY: Mapping[str, Mapping[str, tuple[object, str]]] = {
    COLUMN: {"rank_ordering": (None, _ORDER)},
    ROW: {"rank_ordering": (None, _ORDER), "stride": (1, "expected 1: a row layer's input has no parts")},
    EMBEDDING: {
        "rank_ordering": (None, _ORDER),
        "rank_util": (None, "expected use_spmd_rank=False: it is for inference"),
        "collect_output": (True, "expected True: partial outputs are not supported"),
        "max_norm": (None, "expected None: the frozen table is never renormalised"),
        "scale_grad_by_freq": (False, "expected False"),
        "sparse": (False, "expected False"),
    },
    QUANTIZED_COLUMN: {"rank_ordering": (None, _ORDER)},
    QUANTIZED_ROW: {"rank_ordering": (None, _ORDER), "stride": (1, "expected 1: a row layer's input has no parts")},
    QKV: {"gather_output": (False, "expected False: heads stay sharded")},
    CONV_OUTPUT: {},
    CONV_INPUT: {},
    EXPERTS_COLUMN: {"rank_ordering": (None, _ORDER)},
    EXPERTS_ROW: {"rank_ordering": (None, _ORDER), "stride": (1, "expected 1: a row layer's input has no parts")},
}


def class_name(module: nn.Module) -> str:
    """The qualified name of a module's concrete class."""
    return f"{type(module).__module__}.{type(module).__qualname__}"


def part_names(module: Any) -> tuple[str, ...]:
    """The parts of a fused layer of neuronx-distributed; () of any other module."""
    name = class_name(module)
    is_column = name in (COLUMN, QUANTIZED_COLUMN)
    return ("q", "k", "v") if name == QKV else STRIDES.get(module.stride, ()) if is_column else ()


def column(module: Any, parts: tuple[FusedPart, ...] = ()) -> LayerSpec:
    """The spec of a ColumnParallelLinear or QuantizedColumnParallel.

    Args:
        module: The layer.
        parts: What lies side by side on each process, where the layer's owner says it; else its stride does.

    Raises:
        TargetError: Names the attributes that we do not support.
        SpecError: Attributes that cannot be together.
    """
    problems, padding = _problems(module), _padding(module)
    names = STRIDES.get(module.stride)
    if parts and module.stride not in (1, len(parts)):
        problems.add("stride", f"is {module.stride}, expected 1 or {len(parts)}, of the parts; leave the layer out.")
    elif names is None and not parts:
        problems.add("stride", f"is {module.stride}, expected one of {sorted(STRIDES)}; leave the layer out.")
    held = class_name(module) == QUANTIZED_COLUMN
    if not held and padding and module.gather_output and module.keep_padded_output:
        problems.add("keep_padded_output", "is True, expected False: a gathered output is cut; leave the layer out.")
    problems.raise_if_any()
    out_features = module.output_size - padding
    spec = LayerSpec(
        kind="column",
        in_features=module.input_size,
        out_features=out_features,
        bias=module.bias is not None and (held or not module.skip_bias_add),
        gather_output=module.gather_output,
        sequence_dim=_sequence_dim(module),
        pad=padding > 0,
        parts=parts or tuple(FusedPart(name=name, size=out_features // len(names or ())) for name in names or ()),
        reduce_dtype="float32" if held else dtype_name(module.reduce_dtype),
        axis=_axis(module.tensor_parallel_group),
        quantization=_quantization(module) if held else None,
    )
    return _fitting(module, spec)


def row(module: Any, heads: Heads | None = None) -> LayerSpec:
    """The spec of a RowParallelLinear or QuantizedRowParallel.

    Args:
        module: The layer.
        heads: Those that its input holds (see `heads_of`).

    Raises:
        TargetError, SpecError: As `column`.
    """
    problems = _problems(module)
    if _padding(module):
        problems.add("pad", "is True and pads the input, expected a size that divides; leave the layer out.")
    problems.raise_if_any()
    held = class_name(module) == QUANTIZED_ROW
    spec = LayerSpec(
        kind="row",
        in_features=module.input_size,
        out_features=module.output_size,
        bias=module.bias is not None and (held or not module.skip_bias_add),
        input_is_parallel=module.input_is_parallel,
        reduce_output=module.reduce_output,
        sequence_dim=_sequence_dim(module),
        heads=heads,
        reduce_dtype=None if held else dtype_name(module.reduce_dtype),
        axis=_axis(module.tensor_parallel_group),
        quantization=_quantization(module) if held else None,
    )
    return _fitting(module, spec)


# dtype of a weight, value of `quantization_type` -> what ours say.
_CODES = {torch.int8: "int8", torch.float8_e4m3fn: "fp8"}
_SCALES = {"per_tensor_symmetric": "tensor", "per_channel_symmetric": "channel"}


def _quantization(module: Any) -> Quantization:
    """How a quantised layer holds its weight.

    Raises:
        TargetError: In a way that we do not support: of blocks, of other dtypes, or with quantised activations.
    """
    problems = Problems(TargetError)
    for name, found, among in (
        ("quantized_dtype", module.weight.dtype, _CODES),
        ("quantization_type", module.quantization_type.value, _SCALES),
        ("scale_dtype", module.scale.dtype, (torch.float32,)),
        ("activation_quantization_type", module.activation_quantization_type.value, (None,)),
    ):
        if found not in among:
            problems.add(name, f"is {found}, expected one of {[*among]}; leave the layer out.")
    problems.raise_if_any()
    return Quantization(code=_CODES[module.weight.dtype], scale=_SCALES[module.quantization_type.value])


def embedding(module: Any) -> LayerSpec:
    """The spec of a ParallelEmbedding.

    A cut vocabulary knows its padding_idx on one process only, so only there the spec has one: it changes the gradient
    of that row of lora_A, which no other process holds.

    Raises:
        TargetError, SpecError: As `column`.
    """
    problems, padding, by_dim = _problems(module), _padding(module), module.shard_across_embedding
    if padding and by_dim:
        problems.add("pad", "is True and pads the dimension, expected a size that divides; leave the layer out.")
    if module.sequence_parallel_enabled and module.sequence_dim and not by_dim:
        problems.add(
            "sequence_dim",
            f"is {module.sequence_dim} under sequence parallel, where the layer leaves a partial sum, expected 0; "
            f"leave the layer out.",
        )
    problems.raise_if_any()
    first = 0 if by_dim else module.start_index
    spec = LayerSpec(
        kind="embedding",
        in_features=module.num_embeddings - padding,
        out_features=module.embedding_dim,
        padding_idx=None if module.padding_idx is None else first + module.padding_idx,
        shard_across_embedding=by_dim,
        # With its dimension cut, the layer gathers the whole output, sequence parallel or not.
        sequence_dim=0 if module.sequence_parallel_enabled and not by_dim else None,
        pad=padding > 0,
        axis=_axis(module.tensor_model_parallel_group),
    )
    return _fitting(module, spec)


def qkv(module: Any, heads: Heads | None = None) -> LayerSpec:
    """The spec of a GQAQKVColumnParallelLinear.

    Args:
        module: The layer.
        heads: Its own (see `heads_of`).

    Raises:
        TargetError, SpecError: As `column`; or there are no heads.
    """
    problems = _problems(module)
    if heads is None:
        problems.add("GQAQKVColumnParallelLinear", "does not know its heads, expected them from a model's config.")
    problems.raise_if_any()
    query, key_value = module.output_sizes
    sizes = {"q": query, "k": key_value, "v": key_value}
    spec = LayerSpec(
        kind="qkv",
        in_features=module.input_size,
        out_features=sum(sizes.values()),
        parts=tuple(FusedPart(name=name, size=size) for name, size in sizes.items()),
        heads=heads,
        fuse_qkv=module.fuse_qkv,
        bias=module.use_bias,
        sequence_dim=0 if module.sequence_parallel_enabled else None,
        reduce_dtype=dtype_name(module.reduce_dtype),
        axis=_axis(None),
    )
    return _fitting(module, spec)


def conv2d(module: Any) -> LayerSpec:
    """The spec of an OutputChannelParallelConv2d or InputChannelParallelConv2d.

    Raises:
        TargetError, SpecError: As `column`.
    """
    problems, by_input = _problems(module), class_name(module) == CONV_INPUT
    padding = module.partition_pad_size if module.partition_pad else 0
    if padding and by_input:
        problems.add("partition_pad", "is True and pads the input, expected channels that divide; leave the layer out.")
    problems.raise_if_any()
    spec = LayerSpec(
        kind="conv2d",
        in_features=module.in_channels,
        out_features=module.out_channels - padding,
        bias=module.bias is not None,
        shard_input=by_input,
        input_is_parallel=module.input_is_parallel if by_input else True,
        gather_output=False if by_input else module.gather_output,
        pad=padding > 0,
        window=Window(kernel_size=module.kernel_size, stride=module.stride, padding=module.padding),
        axis=_axis(None),
    )
    return _fitting(module, spec)


def experts(module: Any) -> LayerSpec:
    """The spec of an ExpertFusedColumnParallelLinear or ExpertFusedRowParallelLinear: of this process's experts.

    Raises:
        TargetError, SpecError: As `column`.
    """
    problems, by_input = _problems(module), class_name(module) == EXPERTS_ROW
    if getattr(module.weight, "expert_distribution", None) is not None:
        problems.add("expert_distribution", "is given, expected None: experts in their order; leave the layer out.")
    problems.raise_if_any()
    spec = LayerSpec(
        kind="experts",
        in_features=module.input_size,
        out_features=module.output_size,
        bias=module.bias is not None,
        shard_input=by_input,
        reduce_output=module.reduce_output if by_input else True,
        num_experts=module._n_local_experts,
        fan_in_fan_out=True,
        stride=module.stride,
        axis=_axis(module.tensor_parallel_group),
    )
    return _fitting(module, spec)


def all_experts(module: Any, spec: LayerSpec) -> LayerSpec:
    """The spec with the experts of all processes, as factors are drawn; of any other layer, as it is."""
    return replace(spec, num_experts=module.num_experts) if spec.kind == "experts" else spec


def own_experts(module: Any, spec: LayerSpec, factors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Of the factors of all experts, those of this process's; of any other layer, all."""
    if spec.num_experts is None or spec.num_experts == module.num_experts:
        return dict(factors)
    first = module.expert_model_parallel_group.rank() * spec.num_experts
    return {name: factor.narrow(0, first, spec.num_experts) for name, factor in factors.items()}


def heads_of(model: nn.Module, path: str) -> Heads | None:
    """The heads of a GQAQKVColumnParallelLinear, or of the row layer beside it that takes its query heads' outputs.

    They are read from `config` (`num_attention_heads`, `num_key_value_heads`) of the nearest module above that has one.

    Args:
        model: The whole model.
        path: Name of the layer.

    Returns:
        None of any other layer, and of a row layer whose input lies in its own order.

    Raises:
        TargetError: No module above has such a config, or the processes that share key-value heads are in no known
            order.
    """
    above = [path.rpartition(".")[0]]
    while above[-1]:
        above.append(above[-1].rpartition(".")[0])
    layer: Any = model.get_submodule(path)
    beside: list[Any] = [m for m in model.get_submodule(above[0]).children() if class_name(m) == QKV]
    found = [layer] if class_name(layer) == QKV else []
    if class_name(layer) == ROW:
        found = [m for m in beside if m.output_sizes[0] == layer.input_size and m.kv_size_multiplier > 1]
    if not found:
        return None
    for owner in above:
        config = getattr(model.get_submodule(owner), "config", None)
        query, key_value = (getattr(config, f"num_{what}_heads", None) for what in ("attention", "key_value"))
        if query and key_value:
            copies = found[0].kv_size_multiplier
            return Heads(query=query, key_value=key_value, multiplier=copies, order=_order_of_copies(key_value, copies))
    raise TargetError(
        "the layer does not know its heads, and no module above it has a config with num_attention_heads and "
        "num_key_value_heads; give the model its config."
    )


def spec_of(model: nn.Module, path: str) -> LayerSpec | None:
    """The spec of a linear layer, embedding or grouped-query attention of neuronx-distributed; None of other modules.

    Raises:
        TargetError, SpecError: As `column`.
    """
    module = model.get_submodule(path)
    if class_name(module) not in CLASSES:
        return None
    read: Mapping[str, Callable[..., LayerSpec]] = {COLUMN: column, ROW: row, EMBEDDING: embedding, QKV: qkv}
    heads = heads_of(model, path)
    return read[class_name(module)](module, **({} if heads is None else {"heads": heads}))


def is_installed() -> bool:
    """Whether there is a package of neuronx-distributed's name. Nothing is imported."""
    return importlib.util.find_spec("neuronx_distributed") is not None


def is_initialized() -> bool:
    """Whether neuronx-distributed is there, and its parallel state initialised. Nothing is imported for that."""
    state = sys.modules.get("neuronx_distributed.parallel_layers.parallel_state")
    return state is not None and bool(state.model_parallel_is_initialized())


def default_axis() -> Axis:
    """The axis over the default tensor-parallel group."""
    return _axis(None)


def leaves_gradients_partial(module: Any) -> bool:
    """Whether a layer's own backward returns its input's gradient unsummed: where it would sum it in another dtype.

    Source: neuronx-distributed 0.18, parallel_layers/layers_utils.py, `_linear_autograd_bwd_grad_reduce`.
    """
    sums = class_name(module) == COLUMN and module.async_tensor_model_parallel_allreduce
    return sums and module.weight.dtype != module.reduce_dtype


def mark(layer: nn.Module, trained: Mapping[str, nn.Parameter], spec: LayerSpec) -> None:
    """Set the marks that neuronx-distributed's trainer reads on what is trained of a layer.

    `tensor_model_parallel`, `partition_dim`, `partition_stride` and `num_partitions` of those that are cut,
    `sequence_parallel_enabled` of those whose gradients are left partial ("deferred") over the default group, `shared`
    of copies of key-value heads, so that the norm counts each head once (a pipeline sets it anew, and counts them all),
    and `expert_model_parallel` of all, where the base's parameters have it: each of them belongs to experts.

    Args:
        layer: Of the base's parameters.
        trained: By their names in the rules table.
        spec: Of it.
    """
    of_experts = any(getattr(p, "expert_model_parallel", False) for p in layer._parameters.values())
    for name, factor in trained.items():
        placement = sharding.rule(spec, name).placement if spec.axis.size > 1 else None
        marks: dict[str, Any] = {}
        if isinstance(placement, Shard):
            marks = {"tensor_model_parallel": True, "partition_dim": placement.dim, "partition_stride": 1}
            marks |= {"num_partitions": spec.axis.size}
            marks |= {"shared": True} if _holds_copies(spec, name) else {}
        elif spec.gradients == "deferred" and sharding.partial(spec, name) and spec.axis == _axis(None):
            marks = {"sequence_parallel_enabled": True}
        marks |= {"expert_model_parallel": True} if of_experts else {}
        for attribute_name, value in marks.items():
            setattr(factor, attribute_name, value)


def _holds_copies(spec: LayerSpec, name: str) -> bool:
    """Whether all that this process holds of a parameter is held by another one already."""
    layout = sharding.layout(spec, name)
    if layout is None or not sharding.copied(spec, name):
        return False
    index = spec.axis.index or 0
    first = layout.sources()[layout.places(index)]
    return not bool((first == torch.arange(layout.local_size) + index * layout.local_size).any())


def _axis(group: Any) -> Axis:
    """The axis over a group; None for the default tensor-parallel one. That one's replica groups are known."""
    from neuronx_distributed.parallel_layers import parallel_state

    default = parallel_state.get_tensor_model_parallel_group()
    axis = axis_of_group(default if group is None else group)
    if group is not None and group is not default:
        return axis
    return replace(axis, groups=tuple(map(tuple, parallel_state.get_tensor_model_parallel_replica_groups())))


def _order_of_copies(key_value: int, copies: int) -> str:
    """How the copies of key-value heads lie over the tensor-parallel group: as the groups that share them say."""
    from neuronx_distributed.parallel_layers import parallel_state

    axis = _axis(None)
    if copies in (1, axis.size):
        return "tiled"
    assert axis.groups is not None
    mine = next(group for group in axis.groups if dist.get_rank() in group)
    sharing = [tuple(group) for group in parallel_state.get_kv_shared_replica_groups()]
    places = {tuple(mine.index(rank) for rank in group) for group in sharing if set(group) <= set(mine)}
    between = axis.size // copies
    if places == {tuple(range(at, axis.size, between)) for at in range(between)}:
        return "tiled"
    adjacent = {tuple(range(at, at + copies)) for at in range(0, axis.size, copies)}
    if places == adjacent and key_value * copies == axis.size:
        return "adjacent"
    raise TargetError(
        f"the processes {sharing} share key-value heads, of which there are {key_value}, {copies} times, over "
        f"{axis.groups}: that is no order which we know; choose a kv_size_multiplier that gives each process one head."
    )


def _problems(module: Any) -> Problems:
    """What is wrong with a layer's attributes, whatever the others are."""
    problems = Problems(TargetError)
    for name, (only, why) in _ONLY[class_name(module)].items():
        if getattr(module, name) != only:
            problems.add(name, f"is {getattr(module, name)!r}, {why}; leave the layer out.")
    return problems


def _padding(module: Any) -> int:
    return module.pad_size if module.pad else 0


def _sequence_dim(module: Any) -> int | None:
    return (module.sequence_dimension or 0) if module.sequence_parallel_enabled else None


def _fitting(module: Any, spec: LayerSpec) -> LayerSpec:
    """The spec, if the module's parameters have its shapes.

    Raises:
        TargetError: Names those that have not.
    """
    problems = Problems(TargetError)
    for name in sharding.names(spec):
        held = attribute(spec, name)
        found, expected = tuple(module.get_parameter(held).shape), sharding.local_shape(spec, name)
        if found != expected:
            problems.add(held, f"has shape {list(found)}, expected {list(expected)} from the layer's attributes.")
    problems.raise_if_any()
    return spec
