"""How is an estimate told? Tables that line up, and a plot of where LoRA's share grows."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from adapters.convert import table
from adapters.estimate import Estimate, Layer, Plan, Shape, Totals, estimate
from lora_fn import LoraFnError, SpecError, checkpoint, cost
from lora_fn.machines import Machine

PEERS, SHARED = "Optimum Neuron, NxD", "with --share-a"
CAVEAT = "On paper: nothing of this was measured on a Neuron device."
GIB, GIGA, MEGA, MICRO = 2**30, 1e9, 1e6, 1e-6
RANKS = (4, 8, 16, 32, 64, 128, 256, 512)
POWERS = (1, 2, 4, 8, 16, 32, 64, 128)


def text(of: Estimate, machine: str) -> str:
    """An estimate as a page of text.

    Args:
        of: The estimate.
        machine: What its machine is called.
    """
    plan = of.plan
    nodes = f"{of.nodes} node{'s' * (of.nodes > 1)}"
    how = [
        f"{plan.tokens} tokens a microbatch",
        f"{plan.microbatches} microbatches a step",
        f"rank {plan.rank}",
        *(["sequence parallel"] if plan.sequence_parallel else []),
        *(["activation checkpointing"] if plan.activation_checkpointing else []),
    ]
    title = f"{of.shape.name} on {machine}, tp {plan.tp}, dp {plan.dp} ({nodes}): {', '.join(how)}."
    parts = (
        title,
        "A layer, per process and microbatch, forward and backward; its scheme is marked with a star:",
        table(_layers(of)),
        "A step, per process:",
        table(_step(of)),
        "Memory of a process:",
        table(_memory(of)),
        CAVEAT,
    )
    return "\n".join([parts[0], "", parts[1], parts[2], "", parts[3], parts[4], "", parts[5], parts[6], "", parts[7]])


def _layers(of: Estimate) -> list[list[Any]]:
    head = ["layer", "scheme", "", "GFLOP", "of base, %", "collectives", "elements", "us", "of base, %"]
    layers = (*of.layers, *of.peer_layers)
    return [head, *(_of_scheme(layer, scheme, of.machine) for layer in layers for scheme in layer.updates)]


def _of_scheme(layer: Layer, scheme: str, machine: Machine) -> list[Any]:
    update, base = layer.updates[scheme], layer.base
    seconds = update.seconds(machine)
    mark = "*" if scheme == layer.scheme else "" if scheme in layer.can else "not here"
    mark = "" if scheme == cost.MODULE else mark
    return [
        layer.name,
        scheme,
        mark,
        f"{update.flops / GIGA:.2f}",
        f"{100 * update.flops / base.flops:.2f}" if base.flops else "",
        update.own,
        f"{update.elements:,}",
        f"{seconds / MICRO:.1f}",
        f"{100 * seconds / base.seconds(machine):.2f}" if base.seconds(machine) else "",
    ]


def _step(of: Estimate) -> list[list[Any]]:
    """Ours beside the others'."""
    tokens = of.plan.tokens * of.plan.microbatches * of.plan.dp
    rows: Mapping[str, Callable[[Totals], str]] = {
        "base: compute, s": lambda t: f"{t.base_compute:.3f}",
        "base: collectives, s": lambda t: f"{t.base_collectives:.3f}",
        "LoRA: compute, s": lambda t: f"{t.lora_compute:.3f}",
        "LoRA: collectives, s": lambda t: f"{t.lora_collectives:.3f}",
        "LoRA: sums of gradients, s": lambda t: f"{t.sync:.3f}",
        "all, s": lambda t: f"{t.seconds:.3f}",
        "LoRA's share, %": lambda t: f"{100 * t.share:.2f}",
        "tokens/s": lambda t: f"{tokens / t.seconds:,.0f}",
        "base: collectives": lambda t: f"{t.base_launches:,}",
        "LoRA: collectives of its own": lambda t: f"{t.lora_launches:,}",
        "LoRA: sent, MB": lambda t: f"{t.lora_bytes / MEGA:,.0f}",
        "LoRA: sent for gradients, MB": lambda t: f"{t.sync_bytes / MEGA:,.0f}",
        "LoRA: FLOPs over the base's, %": lambda t: f"{100 * t.lora_flops / t.base_flops:.2f}",
    }
    return [["", "ours", PEERS], *([name, told(of.ours), told(of.peers)] for name, told in rows.items())]


def _memory(of: Estimate) -> list[list[Any]]:
    whole, there = sum(of.memory.values()), of.machine.memory
    rows = [[name, f"{value / GIB:.2f}"] for name, value in of.memory.items()]
    verdict = "it has" if whole <= there else "it has (too little: raise --tp)"
    return [["", "GiB"], *rows, ["together", f"{whole / GIB:.2f}"], [verdict, f"{there / GIB:.2f}"]]


# --------------------------------------------------------------------------------------------------------- plot

# x; LoRA's share by ours, by ours with as many lora_A as the others have, and by the others', in percent.
Curve = tuple[list[float], list[float], list[float], list[float]]


def over_nodes(shape: Shape, plan: Plan, machine: Machine) -> Curve:
    """The same step, of as many rows, on more and more nodes: data parallel grows, microbatches get fewer.

    Raises:
        SpecError: There is no number of nodes that can share them.
    """
    rows, plans = plan.dp * plan.microbatches, []
    for nodes in POWERS:
        dp, rest = divmod(nodes * machine.processes, plan.tp)
        if dp and not rest and rows % dp == 0:
            plans.append((nodes, replace(plan, dp=dp, microbatches=rows // dp)))
    if not plans:
        raise SpecError(
            f"--plot: no number of nodes, of {', '.join(map(str, POWERS))}, each of {machine.processes} processes, has "
            f"whole groups of --tp {plan.tp} that share --dp {plan.dp} x --microbatches {plan.microbatches} evenly; "
            f"choose other numbers."
        )
    return _curve(shape, plans, machine)


def over_tp(shape: Shape, plan: Plan, machine: Machine) -> Curve:
    """The same data parallel, each model over more and more processes."""
    fits = [tp for tp in POWERS if plan.tokens % tp == 0]
    return _curve(shape, [(tp, replace(plan, tp=tp)) for tp in fits], machine)


def over_rank(shape: Shape, plan: Plan, machine: Machine) -> Curve:
    """The same step with larger and larger adapters."""
    return _curve(shape, [(rank, replace(plan, rank=rank)) for rank in RANKS], machine)


def _curve(shape: Shape, plans: Iterable[tuple[float, Plan]], machine: Machine) -> Curve:
    """Of those plans that the shape's sizes admit."""
    found: Curve = ([], [], [], [])
    for x, plan in plans:
        try:
            of, shared = (estimate(shape, replace(plan, share_A=share), machine) for share in (False, True))
        except SpecError:  # heads or features that so many processes do not divide
            continue
        shares = (100 * of.ours.share, 100 * shared.ours.share, 100 * of.peers.share)
        for values, value in zip(found, (x, *shares), strict=True):
            values.append(value)
    return found


PANELS: Mapping[str, Callable[[Shape, Plan, Machine], Curve]] = {
    "nodes, the same rows per step": over_nodes,
    "tensor parallel": over_tp,
    "rank": over_rank,
}


def plot(place: Path, shapes: Sequence[Shape], plan: Plan, machine: Machine, name: str) -> None:
    """Draw LoRA's share of a step against the number of nodes, TP and the rank, as a PNG.

    Args:
        place: The file.
        shapes: Models; each has a colour.
        plan: What stays as it is.
        machine, name: Which, and what it is called.

    Raises:
        LoraFnError: matplotlib is missing, or the file cannot be written.
        SpecError: A plan that has nothing to draw.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise LoraFnError(f"{place}: matplotlib, which draws it, is missing; pip install 'lora-fn[plot]'.")
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    curves = {label: [curve(shape, plan, machine) for shape in shapes] for label, curve in PANELS.items()}
    figure, every = plt.subplots(1, len(PANELS), figsize=(12, 3.8), layout="constrained", sharey=True)
    for axes, (label, found) in zip(every, curves.items(), strict=True):
        for number, (shape, (x, ours, shared, peers)) in enumerate(zip(shapes, found, strict=True)):
            axes.plot(x, ours, "o-", color=f"C{number}", label=shape.name)
            axes.plot(x, shared, ".:", color=f"C{number}", label=f"{shape.name}, {SHARED}")
            axes.plot(x, peers, "x--", color=f"C{number}", alpha=0.6, label=f"{shape.name}, {PEERS}")
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter("{x:.0f}")
        axes.set(xlabel=label)
        axes.grid(alpha=0.3)
    every[0].set_ylabel("LoRA's share of a step, %")
    every[0].set_ylim(bottom=0)
    every[-1].legend(fontsize="small")
    figure.suptitle(
        f"{name}: tp {plan.tp}, dp {plan.dp}, {plan.microbatches} x {plan.tokens} tokens, rank {plan.rank}, but for "
        f"what varies; on paper",
        fontsize="medium",
    )
    try:
        with checkpoint.replacing(place) as beside:
            figure.savefig(beside, dpi=100, format="png")
    except OSError as error:
        raise LoraFnError(f"{place}: cannot be written ({error.strerror}); choose another place.") from error
    finally:
        plt.close(figure)
