"""What is the loss of logits whose vocabulary is sharded? Cross entropy without gathering them; and they, gathered.

Source: Megatron-LM, arXiv 1909.08053, section 3 ("fuse the output of the parallel GEMM with the cross entropy loss").
"""

from __future__ import annotations

import torch
from torch import Tensor

from lora_fn import collectives
from lora_fn.axis import Axis

IGNORE = -100


def vocab_parallel_cross_entropy(
    logits: Tensor, targets: Tensor, axis: Axis, *, vocab_size: int, index: Tensor | None = None
) -> Tensor:
    """The negative log-likelihood of each target.

    Args:
        logits: [T..., local vocabulary], the contiguous part of this process; columns past `vocab_size` are padding
            and do not count. Computed in fp32 at least.
        targets: int [T...], the same on every process; -100 where there is no target.
        axis: The axis that the vocabulary is sharded over.
        vocab_size: Size of the whole vocabulary, without padding.
        index: As for `lora_fn.apply`.

    Returns:
        [T...] in fp32 (fp64 for fp64 logits), zero where there is no target; the same on every process.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    local = logits.shape[-1]
    start = collectives.place(axis, index) * local
    columns = torch.arange(local, device=logits.device) + start
    logits = torch.where(columns < vocab_size, logits, torch.finfo(logits.dtype).min)
    top = collectives.maximum(logits.detach().amax(-1), axis, index)
    logits = logits - top[..., None]
    rows = targets - start
    inside = (rows >= 0) & (rows < local)
    own = logits.gather(-1, torch.where(inside, rows, 0)[..., None])[..., 0]
    parts = torch.stack([logits.exp().sum(-1), torch.where(inside, own, 0)])
    [sums] = collectives.reduce([parts], axis, index)
    return torch.where(targets == IGNORE, 0, sums[0].log() - sums[1])


def gather_logits(logits: Tensor, axis: Axis, *, vocab_size: int, index: Tensor | None = None) -> Tensor:
    """Whole logits, without the vocabulary's padding: the same bits on every process.

    Args:
        logits, axis, vocab_size, index: As in `vocab_parallel_cross_entropy`.

    Returns:
        [T..., vocab_size]; of their gradient, every process keeps its part.
    """
    return collectives.gather([logits], axis, index, dim=-1)[0][..., :vocab_size]
