"""How many FLOPs does an adapter add to a step of a process? Those that torch counts, beside what the arithmetic needs.

Of a linear layer with i inputs and o outputs, T tokens and rank r these are 2 T r (i + o) forward and twice that
backward (or what the other order of the products costs, where that is less: `lora_fn.product.flops`). Cut over p
processes, all of it is divided by p where both factors work on a part; a factor that works on all tokens with whole
weights costs as much on each process: `lora_fn.cost` has the count of each scheme.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import communication, processes, rows
from benchmarks.options import Options
from benchmarks.programs import H128, PROGRAMS, TINY, Setup, adapted_paths, llama
from lora_fn import cost, product, siblings

METRIC, SKIPPED = "LoRA FLOPs over the analytic count", "FLOPs below the first adapter over those that must be"
UNIT = "x"


def setup_of(options: Options) -> Setup:
    """The one case of one process."""
    return Setup(shape=TINY if options.tiny else H128, rank=4 if options.tiny else 16)


def cases(options: Options) -> list[str]:
    """Its name, and those of one process of two."""
    return [str(setup_of(options)), *(f"{cut}, {setup_of(options)}" for cut in communication.CASES)]


def run(case: str, options: Options) -> Iterable[rows.Row]:
    """The rows."""
    setup = setup_of(options)
    if case != str(setup):
        yield from processes.launched("flops", communication.SIZE, options, "cut", case)
        return
    yield rows.count("B6", case, "frozen", "FLOPs of a step", "FLOPs", flops(PROGRAMS["frozen"](setup).step))
    for name in ("ours", "PEFT", "torch"):
        yield rows.count("B6", case, name, METRIC, UNIT, over_analytic(setup, name))
    for name in ("ours", "PEFT"):
        yield rows.count("B6", case, name, SKIPPED, UNIT, below_first(setup, name))


def _addmm_flop(y: Any, a: Any, b: Any, out_shape: Any = None, **factors: Any) -> int:
    """Of y + a b in place, which torch leaves out: of the shapes [m, k] and [k, n]."""
    return 2 * a[0] * a[1] * b[1]


def flops(step: Callable[[], object]) -> int:
    """Of a forward and a backward."""
    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: _addmm_flop}) as counter:
        step()
    return counter.get_total_flops()


def analytic(model: Any, tokens: int, rank: int) -> int:
    """What the adapter of a whole model must add."""
    return sum(min(product.flops(tokens, *m.weight.shape, rank).values()) for m in adapted_paths(model).values())


def over_analytic(setup: Setup, name: str) -> float:
    """What a program adds to the frozen model, over what it must."""
    added = flops(PROGRAMS[name](setup).step) - flops(PROGRAMS["frozen"](setup).step)
    return added / analytic(llama(setup), setup.shape.tokens, setup.rank)


def below_first(setup: Setup, name: str) -> float:
    """What is saved where nothing below wants a gradient, over the input gradients of the first layer's q, k and v."""
    program, model = PROGRAMS[name](setup), llama(setup)
    every = flops(program.step)
    program.inputs["inputs_embeds"].requires_grad_(False)
    first = [model.model.layers[0].self_attn.get_submodule(f"{part}_proj") for part in "qkv"]
    tokens = setup.shape.tokens
    must = sum(2 * tokens * (m.in_features * m.out_features + setup.rank * m.in_features) for m in first)
    return (every - flops(program.step)) / must


# ----------------------------------------------------------------------------------------------- on each process


def cut(mesh: Any, place: Path, options: Options, case: str) -> list[rows.Row]:
    """The rows of this process: what each scheme adds, over the cost model's count of it."""
    import adapters

    setup, directory = setup_of(options), place / "model"
    [sequence] = [sequence for name, sequence in communication.CASES.items() if case == f"{name}, {setup}"]
    processes.make(directory, setup.shape)

    def of(model: Any) -> int:
        return flops(lambda: communication.step(model, setup.shape))

    base, found = of(communication.frozen(directory, mesh, sequence=sequence)), list[rows.Row]()
    for name, scheme in ((communication.OURS, None), (communication.BY_RANK, "rank")):
        made = communication.ours(directory, mesh, sequence=sequence, rank=setup.rank, scheme=scheme)
        specs = adapters.specs(made.model).values()
        own = {True: cost.CONCAT, False: None}  # where H rides a gather, or not
        counts = [cost.update(s, setup.shape.tokens, own[sequence and siblings.rides(s)]).flops for s in specs]
        over = (of(made.model) - base) / sum(counts)
        found.append(rows.count("B6", case, name, METRIC, UNIT, over, backend=processes.BACKEND))
    return found


if __name__ == "__main__":
    processes.main({"cut": cut})
