"""What do neuronx-distributed's and Optimum Neuron's own LoRA get right, and communicate? Where checkouts are named.

One layer of neuronx-distributed at a time, in its CPU mode over gloo: `gradients` measures it, with --xla-python.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks import gradients, rows, timing
from benchmarks.options import Options

CASE = "one layer of neuronx-distributed, TP 2"
ERROR, DRIFT = "largest error of output and gradients of a layer", "replicas of a layer that drift apart"
EXTRA, SYNC = "extra collectives of a layer", "collectives of a layer's sync"
BACKEND = "neuronx-distributed's CPU mode, gloo"
UNNAMED = "name a checkout with --nxd, and what has its needs with --xla-python"


def run(options: Options) -> Iterable[rows.Row]:
    """The rows, of B2 and of B1."""
    if not options.nxd or not options.xla_python:
        for suite, metric in (("B2", ERROR), ("B1", EXTRA)):
            for program in ("NxD", "Optimum Neuron"):
                yield rows.missing(suite, CASE, program, metric, "", UNNAMED, backend=BACKEND)
        return
    optimum = Path(options.optimum) if options.optimum else None
    found = gradients.start(Path(options.nxd), optimum, 2, options.xla_python)
    if optimum is None:
        yield rows.missing("B2", CASE, "Optimum Neuron", ERROR, "", "name a checkout with --optimum", backend=BACKEND)
    base = {_case(one): one for one in found if one["program"] == "frozen"}
    for one in found:
        if one["program"] != "frozen":
            yield from of_layer(one, base.get(_case(one), {}))


def of_layer(one: dict[str, Any], base: dict[str, Any]) -> Iterable[rows.Row]:
    """The rows of one program on one layer."""
    told, program = (_case(one), one["program"]), one["program"]
    if "stopped" in one:
        yield rows.missing("B2", *told, ERROR, "x", f"it stopped in {one['stopped']}", backend=BACKEND)
        return
    errors = [one[key] for key in ("y", "dx", "dA", "dB") if key in one]
    yield rows.measured("B2", *told, ERROR, "x", [timing.largest(errors)], backend=BACKEND)
    yield rows.count("B2", *told, DRIFT, "layers", 1.0 - one.get("agree", 1.0), backend=BACKEND)
    if {"forward", "backward"} <= base.keys():
        yield rows.count("B1", *told, EXTRA, "collectives", _number(one) - _number(base), backend=BACKEND)
        if program != "ours, summed":
            yield rows.count("B1", *told, SYNC, "collectives", _number(one, "sync"), backend=BACKEND)


def _case(one: dict[str, Any]) -> str:
    cut = ", sequence parallel" if one["sequence"] else ""
    return f"{one['layer']} of neuronx-distributed, TP {one['tp']}{cut}, {one['dtype']}"


def _number(one: dict[str, Any], *steps: str) -> int:
    return sum(number for step in steps or ("forward", "backward") for number, _ in one.get(step, {}).values())
