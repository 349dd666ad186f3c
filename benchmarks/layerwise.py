"""What does an adapter of one layer communicate, of each kind? At TP 2, on gloo processes and in XLA's graphs.

    python -m benchmarks.layerwise OPTIONS OUTPUT    (with torch_xla: traced on a mesh of 2 x 2, nothing is run)

On gloo, the gradient of every factor is compared with that of one process; where they differ, nothing is counted.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import apart, processes, rows, timing
from benchmarks.communication import EXTRA, SYNC, Recorder
from benchmarks.options import XLA_ON_CPU, Options
from benchmarks.processes import BACKEND

EAGER, LOWERED = "layers on gloo", "layers in XLA's graphs"
IN_HLO = ", XLA's HLO text"
ROWS, LENGTH, FEATURES, INSIDE, RANK = 2, 6, 12, 16, 4
# How each layer is asked for.
KINDS: Mapping[str, Mapping[str, Any]] = {
    "column": {"kind": "column", "in_features": FEATURES, "out_features": INSIDE},
    "row": {"kind": "row", "in_features": INSIDE, "out_features": FEATURES},
    "qkv": {"kind": "qkv", "in_features": FEATURES, "out_features": 2 * INSIDE},
    "embedding": {"kind": "embedding", "in_features": 24, "out_features": FEATURES},
    "row, DoRA": {"kind": "row", "in_features": INSIDE, "out_features": FEATURES, "variant": "dora"},
}
PARTS = {"q": INSIDE, "k": INSIDE // 2, "v": INSIDE // 2}
CUT = ", sequence parallel"
CASES = {f"{name}{CUT * cut}": (name, cut) for name in KINDS for cut in (False, True)}
# Those that have one collective more: the gather of tokens * rank elements, the all-reduce of DoRA's norms.
EXCEPTIONS = (f"embedding{CUT}", "row, DoRA")


def cases(options: Options) -> list[str]:
    """On which machine."""
    return [EAGER, LOWERED]


def run(case: str, options: Options) -> Iterable[rows.Row]:
    """The rows of every layer."""
    if case == EAGER:
        return processes.launched("layerwise", 2, options, "counted", case)
    if options.xla_python:
        return apart.run("benchmarks.layerwise", options.on_xla, python=options.xla_python)
    reason = "no interpreter with torch_xla; name one with --xla-python"
    names = [f"{name}{IN_HLO}" for name in CASES]
    return [rows.missing("B1", name, "ours", EXTRA, "collectives", reason, backend=XLA_ON_CPU) for name in names]


# ------------------------------------------------------------------------------------------------------- a layer


def spec_of(name: str, axis: Any, *, cut: bool, adapted: bool) -> Any:
    """A layer, or its frozen base."""
    from lora_fn import FusedPart, Heads, LayerSpec

    adapter: dict[str, Any] = {"rank": RANK, "alpha": 2.0 * RANK} if adapted else {}
    asked = {key: value for key, value in KINDS[name].items() if adapted or key != "variant"}
    asked |= {"axis": axis, "sequence_dim": 1 if cut else None, "gradients": "deferred"}
    if name == "qkv":
        parts = tuple(
            FusedPart(name=part, size=size, number=n, **adapter) for n, (part, size) in enumerate(PARTS.items())
        )
        return LayerSpec(**asked, parts=parts, heads=Heads(query=4, key_value=2))
    return LayerSpec(**asked, **({"rank": 0} | adapter))


def whole_params(spec: Any) -> dict[str, Tensor]:
    """The whole layer's parameters, the same each time."""
    from lora_fn import sharding

    generator = torch.Generator().manual_seed(1)
    shapes = {name: sharding.canonical_shape(spec, name) for name in sharding.rules(spec)}
    return {name: torch.randn(shape, generator=generator) for name, shape in sorted(shapes.items())}


def input_of(spec: Any, index: int) -> Tensor:
    """This process's part of the input."""
    generator = torch.Generator().manual_seed(2)
    if spec.kind == "embedding":
        return torch.randint(spec.in_features, (ROWS, LENGTH), generator=generator)
    x = torch.randn(ROWS, LENGTH, spec.in_features, generator=generator)
    dim = -1 if spec.kind == "row" else spec.sequence_dim
    return x if dim is None else x.chunk(spec.axis.size, dim)[index].contiguous()


class Step:
    """A forward and a backward of a layer on one process, of half the sum of its squared outputs; then the sync."""

    def __init__(self, spec: Any, place: int, device: Any = "cpu"):
        import lora_fn

        local = lora_fn.shard(whole_params(spec), spec, place)
        self.spec, self.index = spec, torch.tensor([place]).to(device)
        self.params = {name: p.to(device).requires_grad_("lora_" in name) for name, p in local.items()}
        self.x = input_of(spec, place).to(device)
        self.x.requires_grad_(self.x.is_floating_point())

    def run(self) -> list[Tensor]:
        """The outputs, and every gradient."""
        import lora_fn

        y = lora_fn.apply(self.params, self.x, self.spec, index=self.index)
        outputs = list(y) if isinstance(y, tuple) else [y]
        loss = sum((0.5 * part.square().sum() for part in outputs), torch.zeros((), device=self.x.device))
        wanted = {name: p for name, p in [*self.params.items(), ("x", self.x)] if p.requires_grad}
        grads = torch.autograd.grad(loss, list(wanted.values())) if wanted else ()
        self.grads = {name: g for name, g in zip(wanted, grads, strict=True) if name != "x"}
        return [*outputs, *grads]

    def sync(self) -> dict[str, Tensor]:
        """The gradients of factors, summed where they are partial."""
        import lora_fn

        return lora_fn.sync_gradients({"": self.grads}, {"": self.spec}, index=self.index)[""]


def check(step: Step, name: str, cut: bool) -> str:
    """Refuse gradients that are not those of one process.

    Raises:
        timing.Wrong: They differ.
    """
    from lora_fn import Axis
    from lora_fn.reshard import gather

    alone = Step(spec_of(name, Axis(), cut=False, adapted=True), 0)
    for each in (alone, step):
        each.run()
    found, expected = gather(step.sync(), step.spec), gather(alone.sync(), alone.spec)
    return f"off {timing.check_exact(found, expected, timing.FP32):.0e}"


def told(case: str, frozen: int, ours: int, sync: int, backend: str, note: str) -> list[rows.Row]:
    """The rows of a layer: the collectives of its base, of the adapted one, and of the sync."""
    return [
        rows.count("B1", case, "ours", EXTRA, "collectives", ours - frozen, backend=backend, note=f"of {ours}; {note}"),
        rows.count("B1", case, "ours", SYNC, "collectives", sync, backend=backend),
    ]


def counted(mesh: Any) -> list[rows.Row]:
    """The rows on gloo, of this process."""
    from lora_fn.axis import axis_of_mesh

    axis, made = axis_of_mesh(mesh, "tp"), list[rows.Row]()
    for case, (name, cut) in CASES.items():
        base, adapted = (Step(spec_of(name, axis, cut=cut, adapted=a), axis.index or 0) for a in (False, True))
        try:
            note = check(adapted, name, cut)
        except timing.Wrong as error:
            made.append(rows.missing("B1", case, "ours", EXTRA, "collectives", str(error), backend=BACKEND))
            continue
        found = []
        for what in (base.run, adapted.run, adapted.sync):
            with Recorder() as recorder:
                what()
            found.append(recorder.number)
        made += told(case, *found, BACKEND, note)
    return made


# ----------------------------------------------------------------------------------------------------------- XLA

DP, TP = ((0, 2), (1, 3)), ((0, 1), (2, 3))
# Any collective, over any processes.
OPERATION = re.compile(r" (?:all-reduce|all-gather|reduce-scatter|all-to-all|collective-\w+)(?:-start)?\(")


def traced(place: int) -> list[rows.Row]:
    """The rows of what one device of four traces. Nothing is run: what was traced is forgotten."""
    import torch_xla

    from lora_fn import Axis

    device, made = torch_xla.device(), list[rows.Row]()
    axis = Axis(size=2, index=place % 2, groups=TP)

    def number(tensors: list[Tensor]) -> int:
        text = torch_xla._XLAC._get_xla_tensors_hlo(tensors)
        torch_xla._XLAC._clear_pending_irs(str(device))
        torch_xla._XLAC._set_all_reduce_token(str(device), None)
        assert "replica_groups={}" not in text, "over all processes"
        return len(OPERATION.findall(text))

    for case, (name, cut) in CASES.items():
        steps = {a: Step(spec_of(name, axis, cut=cut, adapted=a), place % 2, device) for a in (False, True)}
        base, adapted = (number(steps[a].run()) for a in (False, True))
        sync = number(list(steps[True].sync().values()))
        note = "traced, not run; its gradients are those of the same layer on gloo"
        made += told(f"{case}{IN_HLO}", base, adapted, sync, XLA_ON_CPU, note)
    return made


def trace(_: int, output: Path) -> None:
    """On each device: the first writes the rows."""
    import torch_xla.runtime as xr

    found = traced(xr.global_ordinal())
    if xr.global_ordinal() == 0:
        rows.write(output, found)


def main(output: Path) -> None:
    """On four devices of XLA's, which are threads of this process."""
    os.environ["CPU_NUM_DEVICES"] = "4"
    import torch_xla

    torch_xla.launch(trace, args=(output,))


if __name__ == "__main__":
    if Options.from_json(sys.argv[1]).device == "xla":
        main(Path(sys.argv[2]))
    else:
        processes.main({"counted": lambda mesh, place, options, case: counted(mesh)})
