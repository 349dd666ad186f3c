"""How are A and B filled? Canonical factors from a seed, so that they are the same at every size of the axis."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from lora_fn import sharding
from lora_fn.errors import SpecError
from lora_fn.spec import INITS, LayerSpec


def seed_of(seed: int, path: str) -> int:
    """A seed for one layer, from the model's seed and the layer's path: the same whatever else is adapted."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{path}".encode()).digest()[:6], "big")


def init(
    spec: LayerSpec, *, seed: int, init_lora_weights: bool | str = True, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """The canonical factors of a new adapter; `reshard.shard` cuts them.

    Args:
        spec: The layer, with rank > 0. Fan-in is its global size, so nothing depends on the axis.
        seed: Seed of a generator of its own; torch's global state is neither read nor changed.
        init_lora_weights: As in PEFT's `LoraConfig`. True: A Kaiming-uniform(a=sqrt 5), B zero (an embedding: A zero,
            B normal). "gaussian": A normal with standard deviation 1 / rank, B zero. False: A Kaiming-uniform, B too
            (an embedding: both normal).
        dtype: Of the factors.

    Returns:
        `lora_A` [r, in], `lora_B` [out, r], and `lora_B_bias` [out] (zero; for False uniform) where the spec has it.

    Raises:
        SpecError: No adapter, or an unknown initialisation.

    Source: PEFT `LoraLayer.reset_lora_parameters`.
    """
    if not spec.rank:
        raise SpecError("init: the layer has rank 0, so no factors; give the spec a rank.")
    if init_lora_weights not in INITS:
        raise SpecError(f"init: init_lora_weights is {init_lora_weights!r}, expected one of {INITS}.")
    generator = torch.Generator().manual_seed(seed)
    shapes = {name: sharding.canonical_shape(spec, name) for name in sharding.adapter_names(spec)}

    def uniform(name: str, fan_in: int) -> Tensor:
        bound = fan_in**-0.5  # Kaiming-uniform with a = sqrt(5)
        return torch.empty(shapes[name]).uniform_(-bound, bound, generator=generator)

    def normal(name: str, std: float) -> Tensor:
        return torch.empty(shapes[name]).normal_(0, std, generator=generator)

    factors = {name: torch.zeros(shape) for name, shape in shapes.items()}
    if init_lora_weights == "gaussian":
        factors["lora_A"] = normal("lora_A", 1 / spec.rank)
    elif spec.kind == "embedding":
        factors["lora_B"] = normal("lora_B", 1.0)
        if init_lora_weights is False:
            factors["lora_A"] = normal("lora_A", 1.0)
    else:
        factors["lora_A"] = uniform("lora_A", spec.in_features)
        if init_lora_weights is False:
            factors["lora_B"] = uniform("lora_B", spec.rank)
            if spec.lora_bias:
                factors["lora_B_bias"] = uniform("lora_B_bias", spec.rank)
    return {name: factor.to(dtype) for name, factor in factors.items()}
