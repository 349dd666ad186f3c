"""How many bytes does a forward keep for its backward? Each storage once, parameters and the input left aside."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from benchmarks import communication, processes, rows
from benchmarks.options import Options
from benchmarks.programs import DTYPES, H512, PROGRAMS, TINY, Program, Setup, ours

METRIC, UNIT = "bytes saved for the backward", "bytes"
AGAIN = "ours, recompute"
CUT = "TP 2, sequence parallel"


def setups(options: Options) -> list[Setup]:
    """The cells; a dropout is beside none."""
    shape = TINY if options.tiny else replace(H512, layers=2) if options.quick else H512
    rank = 4 if options.tiny else 16
    return [
        Setup(shape=shape, rank=rank, dtype=dtype, dropout=dropout, device=options.device)
        for dtype in ("bfloat16", "float32")
        for dropout in (0.0, 0.05)
    ]


def cases(options: Options) -> list[str]:
    """Their names, and that of the first on two processes."""
    return [*map(str, setups(options)), f"{CUT}, {_cut(options)}"]


def _cut(options: Options) -> Setup:
    return replace(setups(options)[0], device="cpu")


def programs() -> Mapping[str, Callable[[Setup], Program]]:
    """Those of the step's time, and what trades time for memory."""
    return {**PROGRAMS, AGAIN: lambda setup: ours(setup, recompute="elementwise")}


def run(case: str, options: Options) -> Iterable[rows.Row]:
    """The rows of a cell."""
    if case.startswith(CUT):
        yield from processes.launched("saved", communication.SIZE, options, "cut", case)
        return
    [setup] = [setup for setup in setups(options) if str(setup) == case]
    for name, make in programs().items():
        value = saved(make(setup))
        yield rows.count("B3", case, name, METRIC, UNIT, value, backend=options.backend)


def cut(mesh: Any, place: Path, options: Options, case: str) -> list[rows.Row]:
    """The rows of one process of the two."""
    setup, directory = _cut(options), place / "model"
    processes.make(directory, setup.shape)
    how: dict[str, Any] = {"sequence": True, "dtype": DTYPES[setup.dtype]}
    models: dict[str, Callable[[], Any]] = {
        "frozen": lambda: communication.frozen(directory, mesh, **how),
        "ours": lambda: communication.ours(directory, mesh, rank=setup.rank, **how).model,
        AGAIN: lambda: communication.ours(directory, mesh, rank=setup.rank, recompute="elementwise", **how).model,
    }
    found = []
    for name, make in models.items():
        model = make()
        value = kept(model, lambda model=model: communication.loss_of(model, setup.shape))
        found.append(rows.count("B3", case, name, METRIC, UNIT, value, backend=processes.BACKEND))
    return found


def saved(program: Program) -> int:
    """Bytes that a forward of the program keeps."""
    return kept(program.model, program.loss, program.inputs.values())


def kept(model: Any, loss: Callable[[], Tensor], inputs: Iterable[Tensor] = ()) -> int:
    """Bytes that a forward of a model keeps, what it holds and gets left aside."""
    alive = [*model.parameters(), *model.buffers(), *inputs]  # so that no storage is at the place of another
    held = {t.untyped_storage().data_ptr() for t in alive}
    found = dict[int, int]()

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in held:
            found[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        value = loss()
    del value
    return sum(found.values())


if __name__ == "__main__":
    processes.main({"cut": cut})
