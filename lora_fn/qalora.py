"""How does QA-LoRA make its update? lora_A sees the inputs averaged in groups: scaling * B A P x.

P is linear, so here it is part of lora_A: every column of the stored [r, in / group] stands for the inputs of a group.
As in PEFT, the averages are multiplied by their number, in / group.

PEFT has it over layers quantized by GPTQ only, where it cannot be merged; its files are read and written here for any
linear layer, and merging is that of the same columns.

Source: QA-LoRA (arXiv 2309.14717); PEFT, tuners/lora/variants.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from lora_fn.layer_spec import LayerSpec
from lora_fn.spec import LoraSpec


def options(spec: LoraSpec, name: str) -> dict[str, Any]:
    """The fields of a layer's `LayerSpec`."""
    return {"variant": "qalora", "group_size": spec.qalora_group_size}


def plain(
    params: Mapping[str, Tensor], spec: LayerSpec, *, index: Tensor | None = None, whole: bool = False
) -> dict[str, Tensor]:
    """The parameters with lora_A as a plain update has it."""
    group = spec.group_size
    scale = spec.in_features / group**2
    return {
        name: (p[..., None].expand(*p.shape, group).flatten(-2) * scale) if name.startswith("lora_A") else p
        for name, p in params.items()
    }
