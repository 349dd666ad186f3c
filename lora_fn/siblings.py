"""How do layers that get the same input share its gather? Under sequence parallel, one carries [X | H_q | H_k | H_v].

Each H = scaling * x A^T is computed of the part of the sequence that a process has: the axis divides what it costs, and
that part is all that is kept for the gradient of lora_A. One reduce-scatter brings [dX | dH_q | dH_k | dH_v] back; the
others alone, where X wants no gradient. Gradients of lora_A are partial sums, as they are where a layer computes H of
the gathered X; so whoever is brought none does that.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from lora_fn import collectives, sharding
from lora_fn.axis import Axis
from lora_fn.layer_spec import LayerSpec
from lora_fn.placement import Replicate

Down = Callable[[Tensor], tuple[Tensor, list[Tensor]]]  # x -> (x, [H]): see `layers.down`


def gathered(
    x: Tensor, downs: Sequence[Down], axis: Axis, index: Tensor | None = None, *, dim: int, dtype: str | None = None
) -> tuple[Tensor, list[list[Tensor]]]:
    """The input of some layers, and what each of them makes of it, in one gather.

    Args:
        x: [T..., in], cut over the axis along `dim`.
        downs: Of each layer, what `layers.down` is to it.
        axis, index, dtype: As for `collectives.gather_partial`.
        dim: The dimension.

    Returns:
        X, whole; and of each layer the H that `layers.apply` takes for `hs`.

    Example:
        >>> x, [[h]] = gathered(torch.ones(1, 2), [lambda x: (x, [2 * x[..., :1]])], Axis(), dim=0)
        >>> x, h
        (tensor([[1., 1.]]), tensor([[2.]]))
    """
    hs: list[list[Tensor]] = []
    for down in downs:
        x, own = down(x)
        hs.append(own)
    whole, *rest = collectives.gather_partial([x, *(h for own in hs for h in own)], axis, index, dim=dim, dtype=dtype)
    brought = iter(rest)
    return whole, [[next(brought) for _ in own] for own in hs]


def rides(spec: LayerSpec) -> bool:
    """Whether H of a layer may ride: its input is gathered for it, and every process has the whole lora_A.

    Example:
        >>> rides(LayerSpec(kind="column", in_features=4, out_features=4, rank=2, input="gathered"))
        True
    """
    return spec.input == "gathered" and sharding.rule(spec, "lora_A").placement == Replicate()
