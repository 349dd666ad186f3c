"""Which module is which kind? The concrete class of a module -> the `LayerSpec` of what it computes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from adapters import nxd
from lora_fn import Axis, LayerSpec, TargetError, Window
from lora_fn.layer_spec import made

# What neuronx-distributed writes on a parameter whose gradient each process has a part of.
PARTIAL = "sequence_parallel_enabled"


def _linear_spec(module: Any, **given: Any) -> LayerSpec:
    sizes = {"in_features": module.in_features, "out_features": module.out_features}
    return made(kind="linear", bias=module.bias is not None, **sizes, **given)


def _conv1d_spec(module: Any) -> LayerSpec:
    rows, columns = module.weight.shape
    return LayerSpec(kind="linear", in_features=rows, out_features=columns, bias=True, fan_in_fan_out=True)


def _embedding_spec(module: Any) -> LayerSpec:
    if module.max_norm is not None or module.scale_grad_by_freq or module.sparse:
        raise TargetError(
            "an nn.Embedding with max_norm, scale_grad_by_freq or sparse cannot be adapted; leave it out of the "
            "targets."
        )
    return LayerSpec(
        kind="embedding",
        in_features=module.num_embeddings,
        out_features=module.embedding_dim,
        padding_idx=module.padding_idx,
    )


def _conv2d_spec(module: Any) -> LayerSpec:
    plain = {"dilation": (1, 1), "groups": 1, "padding_mode": "zeros"}
    odd = {name: getattr(module, name) for name, value in plain.items() if getattr(module, name) != value}
    if isinstance(module.padding, str):
        odd["padding"] = module.padding
    if odd:
        raise TargetError(f"an nn.Conv2d with {odd} cannot be adapted; leave it out of the targets.")
    return LayerSpec(
        kind="conv2d",
        in_features=module.in_channels,
        out_features=module.out_channels,
        bias=module.bias is not None,
        window=Window(kernel_size=module.kernel_size, stride=module.stride, padding=module.padding),
    )


def own_spec(module: Any) -> LayerSpec:
    """The spec that one of our own layers holds."""
    return module.spec


# The concrete class of a module (never a base class: a subclass may compute something else) -> its LayerSpec. What the
# module does not know is given too (see `optimum_models.given`).
SPEC_OF: dict[str, Callable[..., LayerSpec]] = {
    "torch.nn.modules.linear.Linear": _linear_spec,
    "torch.nn.modules.sparse.Embedding": _embedding_spec,
    "transformers.pytorch_utils.Conv1D": _conv1d_spec,
    "adapters.parallel.ColumnParallelLinear": own_spec,
    "adapters.parallel.GQAQKVColumnParallelLinear": own_spec,
    "adapters.parallel.RowParallelLinear": own_spec,
    "adapters.parallel.ParallelEmbedding": own_spec,
    "adapters.quantized.QuantizedLinear": own_spec,
    nxd.COLUMN: nxd.column,
    nxd.ROW: nxd.row,
    nxd.EMBEDDING: nxd.embedding,
    nxd.QKV: nxd.qkv,
    nxd.QUANTIZED_COLUMN: nxd.column,
    nxd.QUANTIZED_ROW: nxd.row,
    "torch.nn.modules.conv.Conv2d": _conv2d_spec,
    nxd.CONV_OUTPUT: nxd.conv2d,
    nxd.CONV_INPUT: nxd.conv2d,
    nxd.EXPERTS_COLUMN: nxd.experts,
    nxd.EXPERTS_ROW: nxd.experts,
}

EMBEDDINGS = ("torch.nn.modules.sparse.Embedding", "adapters.parallel.ParallelEmbedding", nxd.EMBEDDING)

# What "all-linear" leaves out, as in PEFT.
NOT_LINEAR = (
    *EMBEDDINGS,
    *("torch.nn.modules.conv.Conv2d", nxd.CONV_OUTPUT, nxd.CONV_INPUT, nxd.EXPERTS_COLUMN, nxd.EXPERTS_ROW),
)


def adaptable(modules: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """Those of a model's modules that can be adapted, by name."""
    return {name: m for name, m in modules.items() if nxd.class_name(m) in SPEC_OF}


def is_linear(module: nn.Module) -> bool:
    """Whether "all-linear" means a module that can be adapted."""
    return nxd.class_name(module) not in NOT_LINEAR


def is_embedding(module: nn.Module) -> bool:
    """Whether a module that can be adapted is an embedding."""
    return nxd.class_name(module) in EMBEDDINGS


def replicated(path: str, module: nn.Module, axis: Axis, *, sequence_parallel: bool) -> LayerSpec:
    """The spec of a module that has no `apply` here and is trained whole, every process holding all of it.

    Args:
        path: Of the module.
        module: The module.
        axis: That the model's parallel layers lie over.
        sequence_parallel: Whether some of them cut the sequence.

    Raises:
        TargetError: Nobody says whether its gradient is a partial sum, or it holds more than parameters.
    """
    found = {name: p for name, p in module._parameters.items() if p is not None}
    if any(buffer is not None for buffer in module._buffers.values()):
        raise TargetError(
            f"{path}: is a {type(module).__name__} with buffers, which change as it runs and would not be saved; "
            f"leave it out of what is trained."
        )
    marks = {bool(vars(p)[PARTIAL]) for p in found.values() if PARTIAL in vars(p)}
    if axis.size > 1 and (len(marks) > 1 or (sequence_parallel and not marks)):
        raise TargetError(
            f"{path}: is a {type(module).__name__} in a model under sequence parallel, and does not say whether it "
            f"sees a part of the sequence; set {PARTIAL} (True or False) on its parameters."
        )
    return LayerSpec(
        kind="replicated",
        in_features=1,
        out_features=1,
        shapes=tuple((name, tuple(p.shape)) for name, p in found.items()),
        axis=axis,
        input="sharded" if marks == {True} and axis.size > 1 else "replicated",
    )
