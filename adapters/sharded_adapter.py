"""What is an adapter whose factors lie in parts, whoever wrote it? Its specs, and each layer's local factors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from lora_fn import LoraSpec
from lora_fn.spec import LayerSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardedAdapter:
    """An adapter in parts, open for reading.

    Args:
        spec: What its user asked for.
        specs: Path of the module in our model -> the layer; the size of its axis is the number of processes.
        locals: Path -> parameter name -> local factor, of every process in order. Read when called.
    """

    spec: LoraSpec
    specs: Mapping[str, LayerSpec]
    locals: Callable[[str], list[dict[str, Tensor]]]
