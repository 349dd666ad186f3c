"""When does aLoRA's update begin? With the last occurrence of the invocation tokens; where they do not occur, never.

Source: aLoRA (arXiv 2504.12397); PEFT, tuners/lora/variants.py.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def offsets(ids: Tensor, tokens: Sequence[int]) -> Tensor:
    """How many tokens from the end of each sequence the last occurrence begins; 0 where there is none.

    Args:
        ids: int [batch, length].
        tokens: The invocation.

    Returns:
        int64 [batch].

    Example:
        >>> offsets(torch.tensor([[5, 6, 5, 6, 9], [5, 5, 5, 5, 5]]), (5, 6)).tolist()
        [3, 0]
    """
    length = ids.shape[1]
    if len(tokens) > length:
        return torch.zeros(ids.shape[0], dtype=torch.int64, device=ids.device)
    wanted = torch.tensor(tokens, dtype=ids.dtype, device=ids.device)
    begins = (ids.unfold(1, len(tokens), 1) == wanted).all(-1)
    left = length - torch.arange(begins.shape[1], device=ids.device)
    return torch.where(begins, left, length + 1).amin(1) % (length + 1)


def gate(offsets: Tensor, length: int) -> Tensor:
    """Which tokens of sequences of a length the update is active for: the last `offsets` of each; all, where that is
    more than there are (as in generation, after the invocation).

    Returns:
        bool [batch, length].
    """
    return torch.arange(length, device=offsets.device) >= length - offsets[:, None]
