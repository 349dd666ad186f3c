"""Our own parallel layers, for machines with no Neuron SDK: NxD's constructor arguments and attribute names.

Each holds its parameters and a `LayerSpec`; its forward is `lora_fn.apply` with no adapter. As in NxD, every process
draws the whole weight and keeps its part, so all processes of the axis must share torch's seed when a layer is made.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import lora_fn
from lora_fn import Axis, FusedPart, Heads, LayerSpec, SpecError, sharding
from lora_fn.axis import axis_of_group
from lora_fn.cross_entropy import vocab_parallel_cross_entropy

__all__ = [
    "ColumnParallelLinear",
    "GQAQKVColumnParallelLinear",
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
        device: Of the parameters; on "meta" nothing is drawn.
        init_method: Fills the whole weight in place; None for torch's default of nn.Linear and nn.Embedding.
    """

    spec: LayerSpec
    index: Tensor

    def __init__(
        self,
        spec: LayerSpec,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        init_method: Callable[[Tensor], object] | None = None,
    ):
        super().__init__()
        self.spec = spec
        for name in sharding.names(spec):
            shape = sharding.local_shape(spec, name)
            self.register_parameter(attribute(spec, name), nn.Parameter(torch.empty(shape, dtype=dtype, device=device)))
        if not spec.bias and spec.kind != "qkv":
            self.register_parameter("bias", None)
        self.register_buffer("index", torch.tensor([spec.axis.index or 0], device=device), persistent=False)
        if not any(p.is_meta for p in self.parameters()):
            self._draw(init_method or _DEFAULT_INIT[spec.kind])

    def _draw(self, init_method: Callable[[Tensor], object]) -> None:
        """Fill this process's parts from whole tensors, drawn in fp32 with torch's generator."""
        bound = self.spec.in_features**-0.5
        with torch.no_grad():
            whole = {n: torch.empty(sharding.canonical_shape(self.spec, n)) for n in sharding.names(self.spec)}
            for name, tensor in whole.items():
                if name.startswith("weight"):
                    init_method(tensor)
                else:
                    tensor.uniform_(-bound, bound)
            for name, part in lora_fn.shard(whole, self.spec, self.spec.axis.index or 0).items():
                self.get_parameter(attribute(self.spec, name)).copy_(part)

    def forward(self, x: Tensor) -> Any:
        """The base layer; args and result as `lora_fn.apply`."""
        params = {name: getattr(self, attribute(self.spec, name)) for name in sharding.names(self.spec)}
        return lora_fn.apply(params, x, self.spec, index=self.index)

    def extra_repr(self) -> str:
        """Kind, sizes and placement."""
        return describe(self.spec)


def attribute(spec: LayerSpec, name: str) -> str:
    """What a module calls a parameter: its own name, but of "qkv" NxD's (weight_qkv; weight_q, ...), and of parts that
    have a weight each as there; the scale of a weight is `scale`, as in NxD's quantised layers.
    """
    base, _, part = name.partition(".")
    base = {sharding.SCALE: "scale"}.get(base, base)
    if name.startswith("lora_") or (spec.kind != "qkv" and not part):
        return name if name.startswith("lora_") else base
    return f"{base}_{part or 'qkv'}"


def _kaiming_uniform(weight: Tensor) -> None:
    nn.init.kaiming_uniform_(weight, a=5**0.5)


_DEFAULT_INIT: dict[str, Callable[[Tensor], object]] = {
    "column": _kaiming_uniform,
    "qkv": _kaiming_uniform,
    "row": _kaiming_uniform,
    "embedding": nn.init.normal_,
}

# Arguments of NxD's layers that ours take at their default only.
NOT_OURS = {
    "stride": 1,
    "skip_bias_add": False,
    "keep_master_weight": False,
    "pad_alignment_size_per_rank": 1,
    "keep_padded_output": False,
    "rank_ordering": None,
    "tile_cc": False,
    "collect_output": True,
}


def refuse_others(layer: str, others: dict[str, object]) -> None:
    """Refuse arguments that we do not know, or know of NxD's layers but do not support.

    Raises:
        SpecError: Names them.
    """
    odd = {name: value for name, value in others.items() if name not in NOT_OURS or value != NOT_OURS[name]}
    if odd:
        raise SpecError(f"{layer}: {odd} is not supported by this package's own layers; leave it out.")


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
        init_method: Fills the whole weight in place; None for torch's default.
        others: Arguments of NxD's layer that are taken at their default only (see `NOT_OURS`).
        input: "gathered" where a gather (or copy) for all siblings stands before this layer.
        parts: Name -> global size of the parts of a fused output, such as {"gate": n, "up": n}; every process holds its
            part of each, one after the other (NxD's `stride`, for parts of equal sizes).
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
        init_method: Callable[[Tensor], object] | None = None,
        input: str | None = None,
        parts: Mapping[str, int] | None = None,
        axis: Axis | None = None,
        **others: object,
    ):
        refuse_others("ColumnParallelLinear", others)
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
            parts=tuple(FusedPart(name=name, size=size) for name, size in (parts or {}).items()),
            axis=self_axis,
        )
        super().__init__(spec, dtype=dtype, device=device, init_method=init_method)
        self.input_size, self.output_size, self.stride = input_size, output_size, max(1, len(spec.parts))
        self.output_size_per_partition = self.get_parameter("weight").shape[0]
        self.gather_output, self.add_bias = gather_output, bias
        self.dtype, self.reduce_dtype = dtype, reduce_dtype
        self.sequence_parallel_enabled, self.sequence_dimension = sequence_parallel_enabled, spec.sequence_dim
        self.tensor_parallel_group = tensor_model_parallel_group


class GQAQKVColumnParallelLinear(ParallelLayer):
    """Query, key and value of grouped-query attention, their heads sharded, key-value heads copied where needed.

    Its forward returns (q, k, v).

    Args:
        input_size: Global size of the input.
        output_sizes: Global sizes of the query, and of the key (which is that of the value).
        bias: Whether there is one.
        gather_output: Must be False: heads stay sharded.
        dtype, device, sequence_parallel_enabled, sequence_dimension, tensor_model_parallel_group, reduce_dtype,
            init_method, input, axis, others: As in `ColumnParallelLinear`.
        heads: How many there are (NxD finds that out nowhere: its weights come permuted).
        kv_size_multiplier: Copies of each key-value head; None for as many as the axis needs at least.
        fuse_qkv: One `weight_qkv`; False for `weight_q`, `weight_k` and `weight_v`.

    Raises:
        SpecError: As `ColumnParallelLinear`.
    """

    def __init__(
        self,
        input_size: int,
        output_sizes: Sequence[int],
        bias: bool = True,
        gather_output: bool = True,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        *,
        heads: Heads,
        sequence_parallel_enabled: bool = False,
        sequence_dimension: int | None = None,
        kv_size_multiplier: int | None = None,
        fuse_qkv: bool = True,
        tensor_model_parallel_group: dist.ProcessGroup | None = None,
        reduce_dtype: torch.dtype | None = torch.float32,
        init_method: Callable[[Tensor], object] | None = None,
        input: str | None = None,
        axis: Axis | None = None,
        **others: object,
    ):
        refuse_others("GQAQKVColumnParallelLinear", others)
        if gather_output:
            raise SpecError("GQAQKVColumnParallelLinear: gather_output is True, expected False; heads stay sharded.")
        if len(output_sizes) != 2:
            raise SpecError(
                f"GQAQKVColumnParallelLinear: output_sizes are {output_sizes}, expected query and key sizes."
            )
        query, key_value = output_sizes
        sizes = {"q": query, "k": key_value, "v": key_value}
        spec = LayerSpec(
            kind="qkv",
            in_features=input_size,
            out_features=sum(sizes.values()),
            parts=tuple(FusedPart(name=name, size=size) for name, size in sizes.items()),
            heads=heads if kv_size_multiplier is None else replace(heads, multiplier=kv_size_multiplier),
            fuse_qkv=fuse_qkv,
            bias=bias,
            sequence_dim=(sequence_dimension or 0) if sequence_parallel_enabled else None,
            reduce_dtype=dtype_name(reduce_dtype),
            input=input,
            axis=world_axis(tensor_model_parallel_group) if axis is None else axis,
        )
        super().__init__(spec, dtype=dtype, device=device, init_method=init_method)
        layout = sharding.layout(spec, "lora_B")
        assert layout is not None
        self.local_sizes = layout.local_sizes
        self.input_size, self.output_sizes = input_size, list(output_sizes)
        self.q_output_size_per_partition, self.kv_output_size_per_partition = (layout.local_sizes[n] for n in "qk")
        assert spec.heads is not None
        self.kv_size_multiplier = spec.heads.copies(spec.axis.size)
        self.fuse_qkv, self.use_bias, self.gather_output = fuse_qkv, bias, gather_output
        self.dtype, self.reduce_dtype = dtype, reduce_dtype
        self.sequence_parallel_enabled, self.sequence_dimension = sequence_parallel_enabled, spec.sequence_dim


class RowParallelLinear(ParallelLayer):
    """Y = X W^T + b with W's columns, and so X's features, sharded; Y is summed over the axis.

    Args:
        input_size, output_size, bias, dtype, device, tensor_model_parallel_group, init_method, axis, others: As in
            `ColumnParallelLinear`.
        input_is_parallel: X's last dimension is already sharded.
        sequence_parallel_enabled: Y is reduce-scattered along `sequence_dimension`.
        sequence_dimension: 0 or 1; None means 0.
        reduce_output: Sum Y; False returns the partial sum, and then there can be no bias.
        heads: Those that X holds, where it comes from query heads that `GQAQKVColumnParallelLinear` has dealt out.
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
        init_method: Callable[[Tensor], object] | None = None,
        heads: Heads | None = None,
        axis: Axis | None = None,
        **others: object,
    ):
        refuse_others("RowParallelLinear", others)
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
            heads=heads,
            axis=self_axis,
        )
        super().__init__(spec, dtype=dtype, device=device, init_method=init_method)
        self.input_size, self.output_size = input_size, output_size
        self.input_size_per_partition = self.get_parameter("weight").shape[1]
        self.input_is_parallel, self.reduce_output, self.add_bias = input_is_parallel, reduce_output, bias
        self.dtype, self.reduce_dtype = dtype, reduce_dtype
        self.sequence_parallel_enabled, self.sequence_dimension = sequence_parallel_enabled, spec.sequence_dim
        self.tensor_parallel_group = tensor_model_parallel_group


class ParallelEmbedding(ParallelLayer):
    """A table of embeddings with its vocabulary, or its embedding dimension, sharded.

    Args:
        num_embeddings: Global size of the vocabulary.
        embedding_dim: Global size of an embedding.
        padding_idx: The row that gets no gradient.
        dtype, device, tensor_model_parallel_group, init_method, axis, others: As in `ColumnParallelLinear`.
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
        init_method: Callable[[Tensor], object] | None = None,
        axis: Axis | None = None,
        **others: object,
    ):
        refuse_others("ParallelEmbedding", others)
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
        super().__init__(spec, dtype=dtype, device=device, init_method=init_method)
        self.num_embeddings, self.embedding_dim, self.padding_idx = num_embeddings, embedding_dim, padding_idx
        self.shard_across_embedding, self.weight_partition_dim = shard_across_embedding, int(shard_across_embedding)
        self.dtype, self.reduce_dtype = dtype, reduce_dtype
        self.sequence_parallel_enabled, self.sequence_dim = sequence_parallel_enabled, spec.sequence_dim
        self.tensor_model_parallel_group, self.tensor_model_parallel_size = tensor_model_parallel_group, self_axis.size

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
    if spec.parts:
        shown.append(" + ".join(f"{part.name} {part.size}" for part in spec.parts))
    for part in spec.updates:
        of = f" ({part.name})" if part.name else ""
        shown.append(f"rank={part.rank}, scaling={spec.scaling_of(part):g}{of}")
    if spec.axis.size > 1:
        places = ", ".join(f"{name}: {rule.placement}" for name, rule in sharding.rules(spec).items())
        shown.append(f"{spec.axis.name}={spec.axis.size} [{places}]")
    for f in fields(spec):
        told = f.name in ("kind", "in_features", "out_features", "rank", "alpha", "axis", "input", "parts")
        if not told and getattr(spec, f.name) != f.default:
            shown.append(f"{f.name}={getattr(spec, f.name)}")
    return ", ".join(shown)
