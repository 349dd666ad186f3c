"""How does KaSA make its update? scaling * B diag(lora_diag) A, over a base without its smallest singular components.

Source: KaSA (arXiv 2412.06071), equations 6 to 11; PEFT, tuners/lora/variants.py.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lora_fn import collectives, sharding
from lora_fn.errors import SpecError
from lora_fn.layer_spec import LayerSpec
from lora_fn.reshard import cut_dim, whole_rank

DIAGONAL = "lora_diag"


def plain(
    params: Mapping[str, Tensor], spec: LayerSpec, *, index: Tensor | None = None, whole: bool = False
) -> dict[str, Tensor]:
    """The parameters with lora_B as a plain update has it: its columns times the diagonal."""
    ups = {part.param("lora_B"): params[part.param(DIAGONAL)] for part in spec.updates}
    return {name: p * ups[name] if name in ups else p for name, p in params.items()}


def dropped(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The `rank` smallest singular components of a weight, which the base of an adapter of that rank is without.

    Args:
        weight: [out, in], whole.
        rank: Below both sizes.

    Returns:
        Two factors whose product they are: [out, rank] and [rank, in], in fp32 or fp64.

    Raises:
        SpecError: A rank that leaves nothing of the weight.
    """
    if rank >= min(weight.shape):
        raise SpecError(
            f"kasa: the rank is {rank}, and the weight {list(weight.shape)} has {min(weight.shape)} singular values; "
            f"at least one is to be left, so choose a lower rank."
        )
    left, values, right = torch.linalg.svd(
        weight.to(torch.promote_types(weight.dtype, torch.float32)), full_matrices=False
    )
    kept = len(values) - rank
    return left[:, kept:] * values[kept:], right[kept:]


def kasa_loss(
    params: Mapping[str, Tensor], spec: LayerSpec, *, beta: float, gamma: float, index: Tensor | None = None
) -> Tensor:
    """What KaSA adds to the loss for one layer: beta |diag|^2 + gamma (|B^T B - 1| + |A A^T - 1|), of each part.

    Its gradients are those that `apply` leaves: whole in the summed mode, to be summed in the deferred one.

    Args:
        params: The adapter's parameters, local.
        spec: The layer.
        beta, gamma: As in PEFT's `KasaConfig`.
        index: As for `apply`.

    Returns:
        A scalar, the same on every process, in fp32 or fp64.
    """
    total = torch.zeros(())
    for part in spec.updates:
        diagonal = _counted(params, part.param(DIAGONAL), spec, index)
        grams = [
            _gram(params, "lora_A" if spec.share_A else part.param("lora_A"), spec, index),
            _gram(params, part.param("lora_B"), spec, index),
        ]
        eye = torch.eye(part.rank, dtype=diagonal.dtype, device=diagonal.device)
        apart = [torch.linalg.norm(gram - eye) for gram in grams]
        total = total.to(diagonal) + beta * diagonal.square().sum() + gamma * (apart[0] + apart[1])
    return total


def _gram(params: Mapping[str, Tensor], name: str, spec: LayerSpec, index: Tensor | None) -> Tensor:
    """The products of a factor's [rank] vectors with each other, over the whole factor."""
    factor = _counted(params, name, spec, index)
    vectors = factor.mT if name.startswith("lora_B") else factor  # [rank, whatever is cut]
    layout = sharding.layout(spec, name)
    if layout is None or sharding.over_rank(spec, name):
        return vectors @ vectors.mT
    copies = layout.copies().to(vectors.device, vectors.dtype)
    cut = cut_dim(spec, name) == (0 if name.startswith("lora_B") else 1)
    assert cut, "a factor is cut along its features"
    [gram] = collectives.reduce([(vectors / copies) @ vectors.mT], spec.axis, index)
    return gram


def _counted(params: Mapping[str, Tensor], name: str, spec: LayerSpec, index: Tensor | None) -> Tensor:
    """A parameter in fp32 (fp64), with its whole rank; its gradient comes out as what the mode leaves alone or sums."""
    p = params[name].to(torch.promote_types(params[name].dtype, torch.float32))
    if sharding.over_rank(spec, name):
        return whole_rank({name: p}, spec, index=index)[name]
    layout = sharding.layout(spec, name)
    if layout is None:
        times: Tensor | float = (
            1 / spec.axis.size if spec.gradients == "deferred" and sharding.partial(spec, name) else 1
        )
    elif spec.gradients == "summed" and sharding.copied(spec, name):
        copies = layout.copies().to(p.device, p.dtype)
        times = copies.view(-1, *(1,) * (p.dim() - 1 - cut_dim(spec, name)))
    else:
        return p
    return p.detach() + (p - p.detach()) * times
