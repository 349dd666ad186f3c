"""What does an adapter communicate, and how long is a step, at TP 2? A whole Llama of `models.load`, on gloo processes.

    python -m torch.distributed.run --standalone --nproc-per-node 2 -m benchmarks.communication OPTIONS MODEL WHAT

A collective is what reaches torch's dispatcher, whoever asked for it. First the loss and the gradient of every factor
are compared with those of one process; where they differ, nothing is counted and nothing is timed.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import rows, timing
from benchmarks.options import Options
from benchmarks.programs import H128, LINEARS, TINY, VOCABULARY, Shape

SIZE = 2
CASES = {"TP 2": False, "TP 2, sequence parallel": True}
NUMBER, EXTRA = "collectives per microbatch", "extra collectives per microbatch"
BYTES, SYNC = "bytes put into them", "collectives of a step's sync"
TIME = "step time at TP 2"
BACKEND = "CPU, gloo"
# On CPU, a reduce-scatter is an exchange and a sum.
KINDS = {
    "all_reduce": "all-reduce",
    "all_gather_into_tensor": "all-gather",
    "reduce_scatter_tensor": "reduce-scatter",
    "all_to_all_single": "reduce-scatter",
}


class Recorder(TorchDispatchMode):
    """Counts collectives by kind, and the bytes put into them."""

    def __init__(self) -> None:
        super().__init__()
        self.number: Counter[str] = Counter()
        self.bytes = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.namespace.startswith(("c10d", "_c10d")) and function._opname != "wait_tensor":
            self.number[KINDS.get(function._opname, function._opname)] += 1
            self.bytes += args[0].nbytes
        return function(*args, **kwargs or {})


def shape_of(options: Options) -> Shape:
    """The model."""
    return TINY if options.tiny else replace(H128, layers=2)


def cases(options: Options) -> list[str]:
    """Without and with sequence parallelism."""
    return list(CASES)


def timed_cases(options: Options) -> list[str]:
    """The same."""
    return list(CASES)


def run(case: str, options: Options) -> Iterable[rows.Row]:
    """B1's rows of a case."""
    return _launched(case, options, "counted")


def run_timed(case: str, options: Options) -> Iterable[rows.Row]:
    """B15's rows of a case."""
    yield from _launched(case, options, "timed")
    reason = "no port of their scheme; benchmarks/gradients.py counts its collectives beside checkouts"
    yield rows.missing("B15", case, "Optimum Neuron and NxD", TIME, "s", reason, backend=BACKEND)


def _launched(case: str, options: Options, what: str) -> list[rows.Row]:
    with tempfile.TemporaryDirectory(prefix="bench-") as place:
        make(Path(place, "model"), shape_of(options))
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(SIZE)]
        words = ["-m", "benchmarks.communication", options.to_json(), place, what, case]
        done = subprocess.run(
            [sys.executable, *launcher, *words],
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
        )
        if not Path(place, "rows.json").exists():
            lines = [line for line in done.stderr.splitlines() if "Error" in line]
            raise RuntimeError(lines[0] if lines else f"the processes ended with {done.returncode}")
        return rows.read(Path(place, "rows.json"))


def make(directory: Path, shape: Shape) -> None:
    """The checkpoint of a Llama."""
    from transformers import LlamaForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.manual_seed(0)
    LlamaForCausalLM(shape.config()).save_pretrained(directory)


# ----------------------------------------------------------------------------------------------- on each process


def ours(directory: Path, mesh: Any, *, sequence: bool, rank: int) -> Any:
    """The adapted model, its partial gradients summed once per step."""
    import adapters
    import lora_fn

    model = frozen(directory, mesh, sequence=sequence)
    spec = lora_fn.LoraSpec(rank=rank, alpha=2 * rank, target_modules=LINEARS, init_lora_weights=False)
    return adapters.wrap(model, spec, seed=3, gradients="deferred").train()


def frozen(directory: Path, mesh: Any, *, sequence: bool) -> Any:
    """The base, whose gradient goes through to the embedding's output, as in any layer but the first."""
    from adapters import models

    model = models.load(directory, mesh=mesh, sequence_parallel=sequence).train()
    model.get_input_embeddings().register_forward_hook(lambda module, args, y: y.detach().requires_grad_())
    return model


def loss_of(model: Any, shape: Shape) -> Tensor:
    """Of one row."""
    ids = torch.randint(1, VOCABULARY, (1, shape.tokens), generator=torch.Generator().manual_seed(2))
    return model(input_ids=ids, labels=ids).loss


def sync(model: Any) -> dict[str, dict[str, Tensor]]:
    """The gradients of a step, after the one call that ends it."""
    import adapters
    import lora_fn

    grads = {path: {name: p.grad for name, p in of.items()} for path, of in adapters.factors(model).items()}
    return lora_fn.sync_gradients(grads, adapters.specs(model))


def step(model: Any, shape: Shape) -> Tensor:
    """One microbatch."""
    for p in model.parameters():
        p.grad = None
    loss = loss_of(model, shape)
    loss.backward()
    return loss.detach()


def found(model: Any, shape: Shape) -> dict[str, Tensor]:
    """The loss, and every factor's whole gradient."""
    import adapters
    from lora_fn.reshard import gather

    all_of, specs = {"loss": step(model, shape)}, adapters.specs(model)
    for path, of in sync(model).items():
        all_of |= {f"{path}.{name}": grad for name, grad in gather(of, specs[path]).items()}
    return all_of


def check(model: Any, directory: Path, shape: Shape, rank: int) -> str:
    """Refuse a model whose loss or gradients are not those of one process.

    Raises:
        timing.Wrong: They differ.
    """
    alone = found(ours(directory, None, sequence=False, rank=rank), shape)
    return f"off {timing.check_exact(found(model, shape), alone, timing.FP32):.0e}"


def counted(mesh: Any, directory: Path, shape: Shape, case: str) -> list[rows.Row]:
    """B1's rows of a case, of this process."""
    sequence, rank = CASES[case], 4
    adapted, base = (
        ours(directory, mesh, sequence=sequence, rank=rank),
        frozen(directory, mesh, sequence=sequence),
    )
    told = f"{case}, h{shape.hidden} L{shape.layers} r{rank}"
    try:
        note = check(adapted, directory, shape, rank)
    except timing.Wrong as error:
        return [rows.missing("B1", told, "ours", EXTRA, "collectives", str(error), backend=BACKEND)]
    seen = dict[str, Recorder]()
    for name, model in (("frozen", base), ("ours", adapted)):
        with Recorder() as recorder:
            step(model, shape)
        seen[name] = recorder
    with Recorder() as at_end:
        sync(adapted)
    extra = (seen["ours"].number - seen["frozen"].number).total()
    values = [(name, NUMBER, "collectives", seen[name].number.total()) for name in seen]
    values += [(name, BYTES, "bytes", seen[name].bytes) for name in seen]
    values += [
        ("ours", EXTRA, "collectives", extra),
        ("ours", SYNC, "collectives", at_end.number.total()),
    ]
    return [
        rows.count("B1", told, name, metric, unit, value, backend=BACKEND, note=note if name == "ours" else "")
        for name, metric, unit, value in values
    ]


def timed(mesh: Any, directory: Path, shape: Shape, case: str, rounds: int) -> list[rows.Row]:
    """B15's rows of a case, of this process."""
    sequence, rank = CASES[case], 4
    adapted = ours(directory, mesh, sequence=sequence, rank=rank)
    base = frozen(directory, mesh, sequence=sequence)
    told = f"{case}, h{shape.hidden} L{shape.layers} {shape.tokens} tokens r{rank}"
    try:
        note = check(adapted, directory, shape, rank)
    except timing.Wrong as error:
        return [rows.missing("B15", told, "ours", TIME, "s", str(error), backend=BACKEND)]
    steps: Mapping[str, Callable[[], object]] = {
        "frozen": lambda: step(base, shape),
        "ours": lambda: (step(adapted, shape), sync(adapted)),
    }
    seconds = timing.interleaved(steps, rounds, between=distributed.barrier)
    notes = {"frozen": "", "ours": f"with the sync after each microbatch; {note}"}
    return [
        rows.measured("B15", told, name, TIME, "s", seconds[name], backend=BACKEND, note=notes[name]) for name in steps
    ]


def main(options: Options, place: Path, what: str, case: str) -> None:
    """On each process: the first writes the rows."""
    from torch.distributed.device_mesh import init_device_mesh

    torch.set_num_threads(1)
    distributed.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (SIZE,), mesh_dim_names=("tp",))
    of: dict[str, Callable[[], list[rows.Row]]] = {
        "counted": lambda: counted(mesh, place / "model", shape_of(options), case),
        "timed": lambda: timed(mesh, place / "model", shape_of(options), case, options.rounds),
    }
    told = of[what]()
    if distributed.get_rank() == 0:
        rows.write(place / "rows.json", told)
    distributed.barrier()
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(Options.from_json(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:])
