"""LoRA on parallel modules: a thin layer that holds parameters and calls `lora_fn`."""

from adapters.bind import (
    enable_input_require_grads,
    factors,
    fill,
    flat,
    freeze,
    layers,
    lora_spec,
    rescale,
    set_dropout_key,
    set_invocation,
    specs,
    wrap,
)
from adapters.bound import LoraLayer
from adapters.files import load, read_spec, save
from adapters.many import ManyAdapters
from adapters.merged import merged_weights
from adapters.parallel import (
    ColumnParallelLinear,
    GQAQKVColumnParallelLinear,
    ParallelEmbedding,
    RowParallelLinear,
    vocab_parallel_cross_entropy,
)
from adapters.quantized import quantize
from adapters.stack import stack

__all__ = [
    "ColumnParallelLinear",
    "GQAQKVColumnParallelLinear",
    "LoraLayer",
    "ManyAdapters",
    "ParallelEmbedding",
    "RowParallelLinear",
    "enable_input_require_grads",
    "factors",
    "fill",
    "flat",
    "freeze",
    "layers",
    "load",
    "lora_spec",
    "merged_weights",
    "quantize",
    "read_spec",
    "rescale",
    "save",
    "set_dropout_key",
    "set_invocation",
    "specs",
    "stack",
    "vocab_parallel_cross_entropy",
    "wrap",
]
