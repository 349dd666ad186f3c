"""Our own parallel layers, for machines with no Neuron SDK: NxD's constructor arguments and attribute names.

Each holds its parameters and a `LayerSpec`; its forward is `lora_fn.apply` with no adapter. Parameters are created
empty: fill them with `adapters.models.load`, `load_state_dict`, or `lora_fn.shard`.
"""

from __future__ import annotations

from dataclasses import fields

import torch
import torch.distributed as dist
from torch import Tensor, nn

import lora_fn
from lora_fn import Axis, LayerSpec, sharding
from lora_fn.axis import axis_of_group
from lora_fn.cross_entropy import vocab_parallel_cross_entropy

__all__ = [
    "ColumnParallelLinear",
    "ParallelEmbedding",
    "ParallelLayer",
    "RowParallelLinear",
    "vocab_parallel_cross_entropy",
]


def world_axis(group: dist.ProcessGroup | None = None) -> Axis:
    """The axis over `group`; without one over all processes, or of size 1 where torch.distributed is not started."""
    if group is None and not dist.is_initialized():
        return Axis()
    everyone = group if group is not None else dist.group.WORLD
    assert everyone is not None
    return axis_of_group(everyone)


class ParallelLayer(nn.Module):
    """A layer whose parameters lie over an axis as the rules table says.

    Args:
        spec: The layer; its rank is 0.
        dtype: Of the parameters.
        device: Of the parameters.
    """

    spec: LayerSpec
    weight: nn.Parameter
    index: Tensor

    def __init__(
        self, spec: LayerSpec, *, dtype: torch.dtype = torch.float32, device: torch.device | str | None = None
    ):
        super().__init__()
        self.spec = spec
        for name in ("weight", "bias"):
            shape = sharding.local_shape(spec, name) if name in sharding.rules(spec) else None
            value = None if shape is None else nn.Parameter(torch.zeros(shape, dtype=dtype, device=device))
            self.register_parameter(name, value)
        index = torch.tensor(spec.axis.index or 0, device="cpu" if device is None else device)
        self.register_buffer("index", index, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """The base layer; args and result as `lora_fn.apply`."""
        params = {name: p for name, p in self.named_parameters(recurse=False)}
        return lora_fn.apply(params, x, self.spec, index=self.index)

    def extra_repr(self) -> str:
        """Kind, sizes and placement."""
        return describe(self.spec)


class ColumnParallelLinear(ParallelLayer):
    """Y = X W^T + b with W's rows, and so Y's features, sharded.

    Args:
        input_size: Global size of the input.
        output_size: Global size of the output.
        bias: Whether there is one.
        gather_output: Gather Y; the bias is then replicated.
        dtype, device: Of the parameters.
        sequence_parallel_enabled: The input is cut over the axis along `sequence_dimension`.
        sequence_dimension: 0 or 1; None means 0.
        pad: Pad the output with zeros to a multiple of the axis.
        tensor_model_parallel_group: The processes; None for all.
        reduce_dtype: Dtype to reduce the input's gradient in; None for its own.
        input: "gathered" where a gather (or copy) for all siblings stands before this layer.
        axis: The axis, in place of the group.

    Raises:
        SpecError: Sizes that the axis does not divide, or arguments that cannot be together.
    """

    def __init__(
        self,
        input_size: int,
        output_size: int,
        bias: bool = True,
        gather_output: bool = True,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        *,
        sequence_parallel_enabled: bool = False,
        sequence_dimension: int | None = None,
        pad: bool = False,
        tensor_model_parallel_group: dist.ProcessGroup | None = None,
        reduce_dtype: torch.dtype | None = torch.float32,
        input: str | None = None,
        axis: Axis | None = None,
    ):
        self_axis = world_axis(tensor_model_parallel_group) if axis is None else axis
        spec = LayerSpec(
            kind="column",
            in_features=input_size,
            out_features=output_size,
            bias=bias,
            gather_output=gather_output,
            sequence_dim=(sequence_dimension or 0) if sequence_parallel_enabled else None,
            pad=pad,
            reduce_dtype=dtype_name(reduce_dtype),
            input=input,
            axis=self_axis,
        )
        super().__init__(spec, dtype=dtype, device=device)


class RowParallelLinear(ParallelLayer):
    """Y = X W^T + b with W's columns, and so X's features, sharded; Y is summed over the axis.

    Args:
        input_size, output_size, bias, dtype, device, tensor_model_parallel_group, axis: As in `ColumnParallelLinear`.
        input_is_parallel: X's last dimension is already sharded.
        sequence_parallel_enabled: Y is reduce-scattered along `sequence_dimension`.
        sequence_dimension: 0 or 1; None means 0.
        reduce_output: Sum Y; False returns the partial sum, and then there can be no bias.
        reduce_dtype: Dtype to sum Y in; None for its own.

    Raises:
        SpecError: As `ColumnParallelLinear`.
    """

    def __init__(
        self,
        input_size: int,
        output_size: int,
        bias: bool = True,
        input_is_parallel: bool = False,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        *,
        sequence_parallel_enabled: bool = False,
        sequence_dimension: int | None = None,
        tensor_model_parallel_group: dist.ProcessGroup | None = None,
        reduce_output: bool = True,
        reduce_dtype: torch.dtype | None = torch.float32,
        axis: Axis | None = None,
    ):
        self_axis = world_axis(tensor_model_parallel_group) if axis is None else axis
        spec = LayerSpec(
            kind="row",
            in_features=input_size,
            out_features=output_size,
            bias=bias,
            input_is_parallel=input_is_parallel,
            sequence_dim=(sequence_dimension or 0) if sequence_parallel_enabled else None,
            reduce_output=reduce_output,
            reduce_dtype=dtype_name(reduce_dtype),
            axis=self_axis,
        )
        super().__init__(spec, dtype=dtype, device=device)


class ParallelEmbedding(ParallelLayer):
    """A table of embeddings with its vocabulary, or its embedding dimension, sharded.

    Args:
        num_embeddings: Global size of the vocabulary.
        embedding_dim: Global size of an embedding.
        padding_idx: The row that gets no gradient.
        dtype, device, tensor_model_parallel_group, axis: As in `ColumnParallelLinear`.
        shard_across_embedding: Shard the embedding dimension.
        pad: Pad the vocabulary with zeros to a multiple of the axis.
        sequence_parallel_enabled: The output is cut along `sequence_dim`. As in NxD, ids are [batch, sequence], and
            with `sequence_dim` 0 the output is [sequence, batch, dim].
        sequence_dim: 0 or 1; None means 0.
        reduce_dtype: Dtype to sum the output in; None for its own.

    Raises:
        SpecError: As `ColumnParallelLinear`.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        *,
        shard_across_embedding: bool = False,
        pad: bool = False,
        tensor_model_parallel_group: dist.ProcessGroup | None = None,
        sequence_parallel_enabled: bool = False,
        sequence_dim: int | None = None,
        reduce_dtype: torch.dtype | None = torch.float32,
        axis: Axis | None = None,
    ):
        self_axis = world_axis(tensor_model_parallel_group) if axis is None else axis
        spec = LayerSpec(
            kind="embedding",
            in_features=num_embeddings,
            out_features=embedding_dim,
            padding_idx=padding_idx,
            shard_across_embedding=shard_across_embedding,
            pad=pad,
            sequence_dim=(sequence_dim or 0) if sequence_parallel_enabled else None,
            reduce_dtype=dtype_name(reduce_dtype),
            axis=self_axis,
        )
        super().__init__(spec, dtype=dtype, device=device)

    def forward(self, ids: Tensor) -> Tensor:
        """The embeddings of ids [batch, sequence] -> [batch, sequence, dim], or sequence first (see `sequence_dim`)."""
        return super().forward(sequence_first(ids, self.spec))


def sequence_first(ids: Tensor, spec: LayerSpec) -> Tensor:
    """ids [batch, sequence] as an embedding wants them: transposed where the sequence is dimension 0 of its output."""
    return ids.transpose(0, 1) if spec.kind == "embedding" and spec.sequence_dim == 0 else ids


def dtype_name(dtype: torch.dtype | None) -> str | None:
    """torch.float32 -> "float32"."""
    return None if dtype is None else str(dtype).removeprefix("torch.")


def describe(spec: LayerSpec) -> str:
    """One line about a layer: kind, sizes, adapter, and how each parameter lies over the axis."""
    shown = [spec.kind, f"{spec.in_features} -> {spec.out_features}"]
    if spec.rank:
        shown.append(f"rank={spec.rank}, scaling={spec.scaling:g}")
    if spec.axis.size > 1:
        places = ", ".join(f"{name}: {rule.placement}" for name, rule in sharding.rules(spec).items())
        shown.append(f"{spec.axis.name}={spec.axis.size} [{places}]")
    for f in fields(spec):
        told = f.name in ("kind", "in_features", "out_features", "rank", "alpha", "axis", "input")
        if not told and getattr(spec, f.name) != f.default:
            shown.append(f"{f.name}={getattr(spec, f.name)}")
    return ", ".join(shown)
