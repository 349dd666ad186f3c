"""How are A and B filled? Canonical factors from a seed, so that they are the same at every size of the axis."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping

import torch
from torch import Tensor

from lora_fn import sharding, starts
from lora_fn.errors import Problems, SpecError
from lora_fn.layer_spec import FusedPart, LayerSpec

# Initialisations that need a seed and nothing else.
DRAWN = tuple(init for init, start in starts.TABLE.items() if start.needs == starts.NOTHING)


def seed_of(seed: int, path: str) -> int:
    """A seed for one layer, from the model's seed and the layer's path: the same whatever else is adapted."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{path}".encode()).digest()[:6], "big")


def init(
    spec: LayerSpec,
    *,
    seed: int | Mapping[str, int],
    init_lora_weights: bool | str = True,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Tensor]:
    """The canonical factors of a new adapter; `reshard.shard` cuts them.

    Args:
        spec: The layer, with an adapter. Fan-in is its global size, so nothing depends on the axis. Each part of a
            fused layer gets what a layer of its own would get; a shared lora_A is that of the first adapted part.
        seed: Seed of a generator of its own; torch's global state is neither read nor changed. Of a fused layer, that
            of each part by name, or a number: then `seed_of(seed, name)`.
        init_lora_weights: As in PEFT's `LoraConfig`. True: A Kaiming-uniform(a=sqrt 5), B zero (an embedding: A zero,
            B normal). "gaussian": A normal with standard deviation 1 / rank, B zero (an embedding: as True). False: A
            Kaiming-uniform, B too (an embedding: both normal). "orthogonal": both from disjoint rows of one orthogonal
            matrix, so that B A is zero. A block-diagonal A, or that of QA-LoRA, is Kaiming-uniform and a
            block-diagonal B zero whatever is asked. What needs more than a seed is in `factorize`.
        dtype: Of the factors.

    Returns:
        `lora_A` [r, in], `lora_B` [out, r], and `lora_B_bias` [out] (zero; for False uniform) where the spec has it; of
        conv2d and experts, the shapes of `sharding.canonical_shape`. Not what comes of the weight (see
        `variants.start`).

    Raises:
        SpecError: No adapter, an unknown initialisation, or a layer that it cannot start.

    Source: PEFT `LoraLayer.reset_lora_parameters`.
    """
    if not spec.updates:
        raise SpecError("init: the layer has rank 0, so no factors; give the spec a rank.")
    if init_lora_weights not in DRAWN:
        raise SpecError(f"init: init_lora_weights is {init_lora_weights!r}, expected one of {DRAWN}.")
    problems = Problems(SpecError)
    starts.check("init", spec, init_lora_weights, problems)
    problems.raise_if_any()
    if spec.parts:
        seeds = seed if isinstance(seed, Mapping) else {part.name: seed_of(seed, part.name) for part in spec.parts}
        return _of_parts(spec, seeds, init_lora_weights=init_lora_weights, dtype=dtype)
    generator = torch.Generator().manual_seed(seed if isinstance(seed, int) else seed[""])
    shapes = {name: sharding.canonical_shape(spec, name) for name in sharding.drawn_names(spec)}

    def uniform(name: str, fan_in: float) -> Tensor:
        bound = fan_in**-0.5  # Kaiming-uniform with a = sqrt(5)
        return torch.empty(shapes[name]).uniform_(-bound, bound, generator=generator)

    def normal(name: str, std: float) -> Tensor:
        return torch.empty(shapes[name]).normal_(0, std, generator=generator)

    factors = dict[str, Tensor]()  # the others are zero
    if "lora_diag" in shapes:
        factors["lora_diag"] = normal("lora_diag", 1.0)
    packed = spec.block_diagonal == "lora_A" or spec.variant == "qalora"  # which PEFT starts alike whatever is asked
    if init_lora_weights == "gaussian" and spec.kind != "embedding" and not packed:
        factors["lora_A"] = normal("lora_A", 1 / spec.rank)
    elif init_lora_weights == "orthogonal":
        factors |= _orthogonal(spec, generator)
    elif spec.kind == "embedding":
        factors["lora_B"] = normal("lora_B", 1.0)
        if init_lora_weights is False:
            factors["lora_A"] = normal("lora_A", 1.0)
    else:
        window = 1 if spec.window is None else math.prod(spec.window.kernel_size)
        # As PEFT draws a block-diagonal factor: Kaiming-uniform with a = 0.
        of_blocks = 6 if spec.block_diagonal == "lora_A" else 1
        inside = spec.in_features // spec.group_size // (spec.blocks if of_blocks > 1 else 1)
        factors["lora_A"] = uniform("lora_A", inside * window / of_blocks)
        if init_lora_weights is False and spec.block_diagonal != "lora_B":  # that, PEFT starts at zero
            factors["lora_B"] = uniform("lora_B", spec.rank * (spec.num_experts or 1))  # one matrix, to PEFT
            if spec.lora_bias:
                factors["lora_B_bias"] = uniform("lora_B_bias", spec.rank)
    return {
        name: factors[name].to(dtype) if name in factors else torch.zeros(shape, dtype=dtype)
        for name, shape in shapes.items()
    }


def _orthogonal(spec: LayerSpec, generator: torch.Generator) -> dict[str, Tensor]:
    """Even rows of an orthogonal matrix of rank numbers in lora_B, odd ones in lora_A, between normal ones.

    Source: PEFT, tuners/lora/layer.py, `orthogonal_init`.
    """
    half = spec.rank // 2
    rows = torch.linalg.qr(torch.randn(spec.rank, spec.rank, generator=generator)).Q
    down = torch.randn(spec.in_features, half, generator=generator) @ rows[0::2]
    up = torch.randn(half, spec.out_features, generator=generator).T @ rows[1::2]
    return {"lora_A": (down.T / 10).contiguous(), "lora_B": up / 10}


def _of_parts(
    spec: LayerSpec, seeds: Mapping[str, int], *, init_lora_weights: bool | str, dtype: torch.dtype
) -> dict[str, Tensor]:
    factors: dict[str, Tensor] = {}
    for part in spec.updates:
        own = init(alone(spec, part), seed=seeds[part.name], init_lora_weights=init_lora_weights, dtype=dtype)
        for name, factor in own.items():
            shared = name == "lora_A" and spec.share_A
            factors.setdefault(name if shared else part.param(name), factor)
    return {name: factors[name] for name in sharding.drawn_names(spec)}


def alone(spec: LayerSpec, part: FusedPart) -> LayerSpec:
    """One part of a fused layer as a layer of its own, whole on one process."""
    return LayerSpec(
        kind="linear",
        in_features=spec.in_features,
        out_features=part.size,
        rank=part.rank,
        alpha=part.alpha,
        use_rslora=spec.use_rslora,
        bias=spec.bias,
        lora_bias=spec.lora_bias,
        variant=spec.variant,
        group_size=spec.group_size,
        block_diagonal=spec.block_diagonal,
        blocks=spec.blocks,
    )
