"""How does attention run on a Neuron device? neuronx-distributed's flash attention, by a name for transformers.

**Not run on a device**: what stands around the kernel was compared with transformers' own attention on CPU, the kernel
itself replaced there.

The kernel is causal over the whole row, knows no mask and no cache, and takes sequences of whole 2048s. So documents
that are packed into one row, padding in front, and calls with a cache are refused.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lora_fn import SpecError

NAME = "nki_flash_attention"
BLOCK = 2048  # tokens


def register() -> None:
    """Make `attn_implementation="nki_flash_attention"` known to transformers.

    Masks stay what they came as, so that `forward` refuses them. (Without a maker of masks, transformers drops them
    without a word.) Positions that begin anew it cannot see: see `refuse_positions`.
    """
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    AttentionInterface.register(NAME, forward)
    AttentionMaskInterface.register(NAME, _mask)


def _mask(*, attention_mask: Tensor | None = None, **unused: Any) -> Tensor | None:
    return attention_mask


def refuse_positions(model: Any) -> None:
    """Have a model of transformers refuse masks and positions, which may mean several documents in a row.

    Without them, positions count the whole row, as the kernel does.
    """
    model.model.register_forward_pre_hook(_refuse, with_kwargs=True)


def _refuse(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    given = dict(zip(("input_ids", "attention_mask", "position_ids"), args, strict=False)) | kwargs
    for name in ("attention_mask", "position_ids"):
        if given.get(name) is not None:
            raise _refusal(name)


def _refusal(what: str) -> SpecError:
    return SpecError(
        f"{NAME}: was called with {what}, expected a whole causal row of a multiple of {BLOCK} tokens without dropout; "
        f'use attn_implementation="sdpa" or "eager".'
    )


def forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **unused: Any,
) -> tuple[Tensor, None]:
    """Attention of one layer, as transformers calls it.

    Args:
        module: The attention; it knows how many query heads share a key-value head.
        query: [B, heads, S, D].
        key, value: [B, key-value heads, S, D].
        attention_mask: Must be None: causal over the whole row.
        dropout: Must be 0: the kernel draws otherwise on every process.
        scaling: Of the scores; None for 1 / sqrt(D).
        unused: What transformers passes on besides.

    Returns:
        [B, S, heads, D], and None for the weights.

    Raises:
        SpecError: A mask, dropout, a cache, or a sequence that is no multiple of 2048.

    Source: neuronx-distributed 0.18, kernels/flash_attn.py, `nki_flash_attn_func`.
    """
    from neuronx_distributed.kernels.flash_attn import nki_flash_attn_func

    length = query.shape[2]
    refused = {
        "an attention mask": attention_mask is not None,
        f"dropout of {dropout}": dropout > 0,
        f"a cache of {key.shape[2] - length} tokens": key.shape[2] != length,
        f"a sequence of {length} tokens": length % BLOCK != 0,
    }
    for what, is_there in refused.items():
        if is_there:
            raise _refusal(what)
    groups: Any = module.num_key_value_groups
    key, value = (torch.repeat_interleave(x, groups, 1) if groups > 1 else x for x in (key, value))
    out = nki_flash_attn_func(
        query,
        key,
        value,
        dropout_p=0.0,
        softmax_scale=scaling,
        causal=True,
        mixed_precision=True,
        transpose_nki_inputs=False,
    )
    return out.transpose(1, 2).contiguous(), None
