"""When are the partial gradients of a step summed? In two buckets: the first while the backward goes on.

The backward comes to the last layers first. When it has the gradients of the later half (by bytes), their sum is begun,
and goes on beside the rest of the backward; the earlier half is summed at its end.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping

from torch import Tensor

import lora_fn
from lora_fn import LayerSpec, gradients

Tree = dict[str, dict[str, Tensor]]

# A sum of less than this takes as long as an empty one: two would take twice as long. Bytes.
LEAST = 1 << 20


class Buckets:
    """The gradients of one step of a wrapped model: `ready` of `lora_fn.value_and_grad`, in its last microbatch.

    Args:
        factors: What is trained, in the order of the forward.
        specs: Of its layers.
        before: The sum of the gradients of the microbatches before; None where there was none.
        index: As for `lora_fn.apply`.
        least: Bytes of partial gradients from which on there are two buckets.
    """

    def __init__(
        self,
        factors: Mapping[str, Mapping[str, Tensor]],
        specs: Mapping[str, LayerSpec],
        before: Tree | None = None,
        *,
        index: Tensor | None = None,
        least: int = LEAST,
    ):
        self.specs, self.before, self.index = specs, before, index
        self._names = [(path, name) for path, of in factors.items() for name in of]
        self._waiting = _later_half(factors, specs, least)
        self._first: Tree = {}
        self._begun: Callable[[], Tree] | None = None

    def __call__(self, number: int, grad: Tensor) -> None:
        """Take the gradient of the factor of a number; where it is the last of the first bucket, begin its sum."""
        path, name = at = self._names[number]
        if at not in self._waiting:
            return
        self._waiting.remove(at)
        self._first.setdefault(path, {})[name] = self._total(path, name, grad.detach())
        if not self._waiting:
            self._begun = lora_fn.start_sync(self._first, self.specs, index=self.index)

    def finish(self, grads: Mapping[str, Mapping[str, Tensor]]) -> Tree:
        """The sums of all microbatches, and over the axis.

        Args:
            grads: All gradients of the last microbatch.
        """
        first = {} if self._begun is None else self._first
        rest = {
            path: {n: self._total(path, n, g) for n, g in of.items() if n not in first.get(path, {})}
            for path, of in grads.items()
        }
        second = lora_fn.start_sync(rest, self.specs, index=self.index)
        whole = lora_fn.combine({} if self._begun is None else self._begun(), second())
        return {path: {name: whole[path][name] for name in of} for path, of in grads.items()}

    def _total(self, path: str, name: str, grad: Tensor) -> Tensor:
        return grad if self.before is None else self.before[path][name] + grad


def _later_half(
    factors: Mapping[str, Mapping[str, Tensor]], specs: Mapping[str, LayerSpec], least: int
) -> set[tuple[str, str]]:
    """The partial gradients that come first, of about half the bytes; none where all are less than `least`."""
    sizes = {(p, n): t.nbytes for p, of in factors.items() for n, t in of.items() if gradients.is_deferred(specs[p], n)}
    total = sum(sizes.values())
    if total < least:
        return set()
    so_far = itertools.accumulate(sizes[at] for at in reversed(sizes))
    return {at for at, size in zip(reversed(sizes), so_far, strict=True) if 2 * (size - sizes[at]) < total}
