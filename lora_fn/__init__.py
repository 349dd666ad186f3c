"""LoRA as pure functions over dicts of tensors; sharding rules are data."""

from lora_fn.algebra import Combination, add_weighted
from lora_fn.axis import Axis
from lora_fn.errors import DataError, FileError, LoraFnError, SpecError, TargetError
from lora_fn.gradients import (
    clip,
    combine,
    grad_norm,
    partition,
    start_sync,
    summed,
    sync_gradients,
    value_and_grad,
)
from lora_fn.initialize import init
from lora_fn.kasa import kasa_loss
from lora_fn.layer_spec import FusedPart, Heads, LayerSpec, Quantization, Window
from lora_fn.layers import apply, updated_weight
from lora_fn.layout import Layout
from lora_fn.many import apply_many
from lora_fn.merge import delta, merge
from lora_fn.optimizers import lorafa_corrections, lorafa_gradients, parameter_groups
from lora_fn.placement import Partial, Replicate, Shard
from lora_fn.reshard import reshard, shard, unshard
from lora_fn.spec import LoraSpec

__all__ = [
    "Axis",
    "Combination",
    "DataError",
    "FileError",
    "FusedPart",
    "Heads",
    "LayerSpec",
    "Layout",
    "LoraFnError",
    "LoraSpec",
    "Partial",
    "Quantization",
    "Replicate",
    "Shard",
    "SpecError",
    "TargetError",
    "Window",
    "add_weighted",
    "apply",
    "apply_many",
    "clip",
    "combine",
    "delta",
    "grad_norm",
    "init",
    "kasa_loss",
    "lorafa_corrections",
    "lorafa_gradients",
    "merge",
    "parameter_groups",
    "partition",
    "reshard",
    "shard",
    "start_sync",
    "summed",
    "sync_gradients",
    "unshard",
    "updated_weight",
    "value_and_grad",
]
