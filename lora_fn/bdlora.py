"""How does BD-LoRA make its update? One of the factors is block-diagonal, and only its blocks are parameters.

A block-diagonal lora_A [r, in] is stored as [r, in / blocks], a lora_B [out, r] as [out, r / blocks]: the rows of all
blocks one below the other, as in PEFT's files. Here the zeros are put back, so everything else is that of a plain
update. A lora_A's columns are not those of the inputs, so every process has all of them.

Source: BD-LoRA (PEFT, tuners/lora/variants.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lora_fn import collectives, sharding
from lora_fn.errors import TargetError
from lora_fn.layer_spec import LayerSpec
from lora_fn.layout import Layout
from lora_fn.layout import plain as plain_layout
from lora_fn.placement import Shard
from lora_fn.spec import LoraSpec


def options(spec: LoraSpec, name: str) -> dict[str, Any]:
    """The fields of a layer's `LayerSpec`: which factor is block-diagonal there, if one is.

    Raises:
        TargetError: Both are named, or none and `match_strict` says that one must be.
    """
    given = spec.options("use_bdlora")
    fields = {"lora_A": "target_modules_bd_a", "lora_B": "target_modules_bd_b"}
    found = [factor for factor, field in fields.items() if any(part in name for part in given[field] or ())]
    if len(found) == 2:
        raise TargetError(f"{name}: is named by both {fields['lora_A']} and {fields['lora_B']}; choose one.")
    if not found and given["match_strict"]:
        raise TargetError(
            f"{name}: is named by neither {fields['lora_A']} nor {fields['lora_B']}; name it, or give "
            f"match_strict False for a plain update."
        )
    return {"variant": "bdlora", "block_diagonal": found[0], "blocks": given["nblocks"]} if found else {}


def plain(
    params: Mapping[str, Tensor], spec: LayerSpec, *, index: Tensor | None = None, whole: bool = False
) -> dict[str, Tensor]:
    """The parameters with the factor as a plain update has it: of a row layer, the columns of this process's inputs (or
    of its part of the rank, where that is cut)."""
    found = dict(params)
    for name, p in params.items():
        if name.partition(".")[0] != spec.block_diagonal:
            continue
        rows = sharding.canonical_shape(spec, name)[0]
        layout = None if whole else sharding.layout(spec, name)
        at = torch.arange(rows, device=p.device)
        if layout is not None:
            at = layout.places(collectives.place(spec.axis, index)).to(p.device)
        found[name] = _spread(p, at // (rows // spec.blocks), spec.blocks)
        columns = None if whole else _columns(spec)
        if columns is not None:
            here = columns.places(collectives.place(spec.axis, index))
            found[name] = found[name].index_select(1, here.to(p.device))
    return found


def _columns(spec: LayerSpec) -> Layout | None:
    """How the columns of the factor lie over the axis in a plain update; None where every process has all of them."""
    assert spec.block_diagonal is not None
    if spec.axis.size == 1 or sharding.row(spec).params[spec.block_diagonal].placement != Shard(1):
        return None
    return sharding.input_layout(spec) if spec.block_diagonal == "lora_A" else plain_layout(spec.rank, spec.axis.size)


def _spread(compact: Tensor, block: Tensor, blocks: int) -> Tensor:
    """[rows, columns] of the blocks at their places in [rows, blocks * columns]; `block` is that of each row."""
    mine = block[:, None] == torch.arange(blocks, device=block.device)
    return (compact[:, None, :] * mine[:, :, None].to(compact.dtype)).flatten(1)
