"""How many operations does an adapter add? Torch's, which an eager step dispatches one by one; and XLA's.

    python -m benchmarks.operations OUTPUT    (with torch_xla)

The first are counted over a whole model, and divided by its adapted layers. The second are the instructions in the HLO
of one linear layer, forward and backward, before XLA's own passes; parameters, constants and tuples left aside.
"""

from __future__ import annotations

import functools
import json
import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import apart, rows
from benchmarks.options import XLA_ON_CPU, Options
from benchmarks.programs import PROGRAMS, Program, Setup, Shape, adapted_paths, llama

EXTRA, ATEN = "extra ATen operations per adapted linear", "operations"
HLO, LARGE = (
    "HLO operations of one linear, forward and backward",
    "of these converts and multiplies of tokens x features",
)
SMALL = Setup(shape=Shape(hidden=128, layers=2, tokens=32), rank=8)
OF_MODEL = "eager step, fp32, all linears"
TOKENS, INSIDE, OUTSIDE, RANK, ALPHA = 64, 48, 80, 4, 8.0


def cases(options: Options) -> list[str]:
    """Eager, and both dtypes of XLA."""
    return [OF_MODEL, *(f"one linear in XLA, {short}" for short in ("fp32", "bf16"))]


def run(case: str, options: Options) -> Iterable[rows.Row]:
    """The rows of a case."""
    if case == OF_MODEL:
        for name in ("ours", "PEFT", "torch"):
            yield rows.count("B7", case, name, EXTRA, ATEN, extra(SMALL, name))
        return
    if not options.xla_python:
        reason = "no interpreter with torch_xla; name one with --xla-python"
        for metric in (HLO, LARGE):
            yield rows.missing("B7", case, "ours", metric, ATEN, reason, backend=XLA_ON_CPU)
        return
    for (name, dtype), (number, large) in lowered(options.xla_python).items():
        if case.endswith(dtype):
            for metric, value in ((HLO, number), (LARGE, large)):
                yield rows.count("B7", case, name, metric, ATEN, value, backend=XLA_ON_CPU)


# --------------------------------------------------------------------------------------------------------- eager


class Counting(TorchDispatchMode):
    """Counts what is dispatched."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen[function._opname] += 1
        return function(*args, **kwargs or {})


def dispatched(program: Program) -> Counter[str]:
    """The operations of a forward and a backward; not what puts gradients into .grad."""
    wanted = [*program.trained.values(), program.inputs["inputs_embeds"]]
    torch.autograd.grad(program.loss(), wanted)
    with Counting() as counting:
        torch.autograd.grad(program.loss(), wanted)
    return counting.seen


def extra(setup: Setup, name: str) -> float:
    """Operations that a program has beyond the frozen model, for each adapted layer."""
    added = dispatched(PROGRAMS[name](setup)).total() - dispatched(PROGRAMS["frozen"](setup)).total()
    return added / len(adapted_paths(llama(setup)))


# ----------------------------------------------------------------------------------------------------------- XLA

INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%\S+ = (\w+)\[([\d,]*)\]\S* ([\w-]+)\(", re.MULTILINE)
NOTHING = ("parameter", "constant", "tuple", "get-tuple-element")


def instructions(text: str) -> list[tuple[str, int]]:
    """(operation, elements of its result) of each instruction of a graph that is none of `NOTHING`."""
    found = []
    for _, sizes, operation in INSTRUCTION.findall(text):
        elements = 1
        for size in filter(None, sizes.split(",")):
            elements *= int(size)
        if operation not in NOTHING:
            found.append((operation, elements))
    return found


@functools.cache
def lowered(python: str) -> dict[tuple[str, str], tuple[int, int]]:
    """{(program, dtype): (operations, those that are large)}, from an interpreter that has torch_xla."""
    told = apart.value(["-m", "benchmarks.operations"], python=python, environment=os.environ | {"PJRT_DEVICE": "CPU"})
    return {tuple(name.split("|")): tuple(numbers) for name, numbers in told.items()}


def main() -> None:
    """With torch_xla: print the counts."""
    import torch_xla

    device, told = torch_xla.device(), {}
    for short, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        for name, compute in LAYERS.items():
            text = hlo(compute, dtype, device)
            found = instructions(text)
            if len(sys.argv) > 1:
                Path(sys.argv[1], f"{name}-{short}.txt").write_text(text, encoding="utf-8")
            large = [op for op, size in found if op in ("convert", "multiply") and size >= TOKENS * INSIDE]
            told[f"{name}|{short}"] = [len(found), len(large)]
    print(json.dumps(told))


def hlo(compute: Callable[[dict[str, Tensor], Tensor], Tensor], dtype: torch.dtype, device: Any) -> str:
    """The graph of one layer's output and gradients, of a given cotangent."""
    import torch_xla

    torch.manual_seed(0)
    params = {"weight": torch.randn(OUTSIDE, INSIDE).to(dtype)}
    params |= {"lora_A": torch.randn(RANK, INSIDE), "lora_B": torch.randn(OUTSIDE, RANK)}
    params = {name: p.to(device).requires_grad_(name != "weight") for name, p in params.items()}
    x = torch.randn(TOKENS, INSIDE).to(dtype).to(device).requires_grad_()
    cotangent = torch.randn(TOKENS, OUTSIDE).to(dtype).to(device)
    torch_xla.sync()
    y = compute(params, x)
    wanted = [p for p in (*params.values(), x) if p.requires_grad]
    grads = torch.autograd.grad(y, wanted, cotangent, allow_unused=True)
    return torch_xla._XLAC._get_xla_tensors_hlo([y, *(g for g in grads if g is not None)])


def _frozen(params: dict[str, Tensor], x: Tensor) -> Tensor:
    return F.linear(x, params["weight"])


def _ours(params: dict[str, Tensor], x: Tensor) -> Tensor:
    import lora_fn

    spec = lora_fn.LayerSpec(kind="linear", in_features=INSIDE, out_features=OUTSIDE, rank=RANK, alpha=ALPHA)
    return lora_fn.apply(params, x, spec)


def _peft(params: dict[str, Tensor], x: Tensor) -> Tensor:
    """Its layer's own forward, over these tensors."""
    from peft import LoraConfig, inject_adapter_in_model

    made: Any = torch.nn.ModuleDict({"layer": torch.nn.Linear(INSIDE, OUTSIDE, bias=False)})
    layer = inject_adapter_in_model(LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=["layer"]), made)["layer"]
    layer.base_layer._parameters["weight"] = torch.nn.Parameter(params["weight"], requires_grad=False)
    for name, of in (("lora_A", layer.lora_A["default"]), ("lora_B", layer.lora_B["default"])):
        del of._parameters["weight"]
        of.weight = params[name]
    return layer(x)


LAYERS: dict[str, Callable[[dict[str, Tensor], Tensor], Tensor]] = {
    "frozen": _frozen,
    "ours": _ours,
    "PEFT": _peft,
}

if __name__ == "__main__":
    main()
