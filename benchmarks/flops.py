"""How many FLOPs does an adapter add to a step? Those that torch counts, beside what the arithmetic needs.

Of a linear layer with i inputs and o outputs, T tokens and rank r these are 2 T r (i + o) forward and twice that
backward (or what the other order of the products costs, where that is less: `lora_fn.product.flops`). Cut over p
processes, all of it is divided by p where both factors work on a part; a factor that works on all tokens with whole
weights costs as much on each process.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import rows
from benchmarks.options import Options
from benchmarks.programs import H128, PROGRAMS, TINY, Program, Setup, adapted_paths, llama
from lora_fn import product

METRIC, SKIPPED = "LoRA FLOPs over the analytic count", "FLOPs below the first adapter over those that must be"
UNIT = "x"


def setup_of(options: Options) -> Setup:
    """The one case of one process."""
    return Setup(shape=TINY if options.tiny else H128, rank=4 if options.tiny else 16)


def cases(options: Options) -> list[str]:
    """Its name."""
    return [str(setup_of(options))]


def run(case: str, options: Options) -> Iterable[rows.Row]:
    """The rows."""
    setup = setup_of(options)
    yield rows.count("B6", case, "frozen", "FLOPs of a step", "FLOPs", flops(PROGRAMS["frozen"](setup)))
    for name in ("ours", "PEFT", "torch"):
        yield rows.count("B6", case, name, METRIC, UNIT, over_analytic(setup, name))
    for name in ("ours", "PEFT"):
        yield rows.count("B6", case, name, SKIPPED, UNIT, below_first(setup, name))


def _addmm_flop(y: Any, a: Any, b: Any, out_shape: Any = None, **factors: Any) -> int:
    """Of y + a b in place, which torch leaves out: of the shapes [m, k] and [k, n]."""
    return 2 * a[0] * a[1] * b[1]


def flops(program: Program) -> int:
    """Of a forward and a backward."""
    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: _addmm_flop}) as counter:
        program.step()
    return counter.get_total_flops()


def analytic(model: Any, tokens: int, rank: int) -> int:
    """What the adapter of a whole model must add."""
    return sum(min(product.flops(tokens, *m.weight.shape, rank).values()) for m in adapted_paths(model).values())


def over_analytic(setup: Setup, name: str) -> float:
    """What a program adds to the frozen model, over what it must."""
    added = flops(PROGRAMS[name](setup)) - flops(PROGRAMS["frozen"](setup))
    return added / analytic(llama(setup), setup.shape.tokens, setup.rank)


def below_first(setup: Setup, name: str) -> float:
    """What is saved where nothing below wants a gradient, over the input gradients of the first layer's q, k and v."""
    program, model = PROGRAMS[name](setup), llama(setup)
    every = flops(program)
    program.inputs["inputs_embeds"].requires_grad_(False)
    first = [model.model.layers[0].self_attn.get_submodule(f"{part}_proj") for part in "qkv"]
    tokens = setup.shape.tokens
    must = sum(2 * tokens * (m.in_features * m.out_features + setup.rank * m.in_features) for m in first)
    return (every - flops(program)) / must
