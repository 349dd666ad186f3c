"""Which tokens is aLoRA's update active for? Those from the last occurrence of the invocation tokens on.

Where they do not occur, none. `apply` takes the answer as its `gate`.

Source: aLoRA (arXiv 2504.12397); PEFT, tuners/lora/variants.py.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def active(ids: Tensor, invocation: Sequence[int], *, documents: Tensor | None = None) -> Tensor:
    """The tokens of each document that its update is active for.

    Args:
        ids: int [batch, length].
        invocation: The tokens that it begins with.
        documents: int [batch, length], the same number for all tokens of a document, which are side by side; None for
            one document in each row.

    Returns:
        bool [batch, length].

    Example:
        >>> active(torch.tensor([[5, 6, 5, 6, 9], [5, 5, 5, 5, 5]]), (5, 6)).tolist()
        [[False, False, True, True, True], [False, False, False, False, False]]
    """
    length, size = ids.shape[1], len(invocation)
    if size > length:
        return torch.zeros(ids.shape, dtype=torch.bool, device=ids.device)
    documents = torch.zeros_like(ids) if documents is None else documents
    windows = ids.unfold(1, size, 1) == torch.tensor(invocation, dtype=ids.dtype, device=ids.device)
    begins = windows.all(-1) & (documents[:, : length - size + 1] == documents[:, size - 1 :])
    count = F.pad(F.pad(begins, (0, size - 1)).long().cumsum(1), (1, 0))  # of occurrences before each place
    places = torch.arange(length, device=ids.device).expand_as(ids)
    changes = documents[:, 1:] != documents[:, :-1]
    first = torch.where(F.pad(changes, (1, 0)), places, 0).cummax(1).values
    last = torch.where(F.pad(changes, (0, 1)), places, length - 1).flip(1).cummin(1).values.flip(1)
    so_far = count[:, 1:]
    return (so_far == so_far.gather(1, last)) & (so_far > count.gather(1, first))


def fitted(gate: Tensor, length: int) -> Tensor:
    """A gate [batch, tokens] for a call that has `length` tokens: the last ones, where a generation goes on with fewer
    than it was told of; and none of those that were padded since.
    """
    return F.pad(gate[:, max(0, gate.shape[1] - length) :], (0, max(0, length - gate.shape[1])))
