"""What does an adapter add to the weights? `delta`, and `merge`, which returns new tensors, so going back is exact."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lora_fn import sharding
from lora_fn.errors import SpecError
from lora_fn.spec import LayerSpec


def delta(params: Mapping[str, Tensor], spec: LayerSpec) -> Tensor:
    """scaling * B A, in the weight's own orientation (an embedding's, and a fan_in_fan_out weight's, is transposed).

    Works on canonical and on local factors alike: every process computes its part, without communication.

    Args:
        params: `lora_A` and `lora_B`, of any floating dtype.
        spec: The layer.

    Returns:
        A tensor of the weight's shape, in fp32 (fp64 where the factors are).
    """
    update = _wide(params["lora_B"]) @ _wide(params["lora_A"]) * spec.scaling
    return update.T if spec.kind == "embedding" or spec.fan_in_fan_out else update


def merge(params: Mapping[str, Tensor], spec: LayerSpec) -> dict[str, Tensor]:
    """The base's parameters with the adapter in them, for `apply(..., spec.base)`.

    Computed in fp32 (or more), rounded once to the base's dtype.

    Args:
        params: All parameters of the layer, canonical or local.
        spec: The layer.

    Returns:
        New tensors `weight` and, where the base has one, `bias`.

    Raises:
        SpecError: Other names than the layer's, or lora_bias on a base without a bias (there is nothing to merge into).
    """
    sharding.check_names(set(params), spec)
    if spec.lora_bias and not spec.bias:
        raise SpecError("merge: the adapter has lora_bias but the base has no bias to merge it into; keep it unmerged.")
    merged = {"weight": params["weight"].clone()}
    if spec.rank:
        merged["weight"] = _plus(params["weight"], delta(params, spec))
    if spec.bias:
        bias = params["bias"]
        merged["bias"] = _plus(bias, _wide(params["lora_B_bias"]) * spec.scaling) if spec.lora_bias else bias.clone()
    return merged


def _plus(base: Tensor, update: Tensor) -> Tensor:
    dtype = torch.promote_types(base.dtype, update.dtype)
    return (base.to(dtype) + update.to(dtype)).to(base.dtype)


def _wide(factor: Tensor) -> Tensor:
    return factor.to(torch.promote_types(factor.dtype, torch.float32))
