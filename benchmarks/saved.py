"""How many bytes does a forward keep for its backward? Each storage once, parameters and the input left aside."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace

from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from benchmarks import rows
from benchmarks.options import Options
from benchmarks.programs import H512, PROGRAMS, TINY, Program, Setup, ours

METRIC, UNIT = "bytes saved for the backward", "bytes"
AGAIN = "ours, recompute"


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
    """Their names."""
    return [str(setup) for setup in setups(options)]


def programs() -> Mapping[str, Callable[[Setup], Program]]:
    """Those of the step's time, and what trades time for memory."""
    return {**PROGRAMS, AGAIN: lambda setup: ours(setup, recompute="elementwise")}


def run(case: str, options: Options) -> Iterable[rows.Row]:
    """The rows of a cell."""
    [setup] = [setup for setup in setups(options) if str(setup) == case]
    for name, make in programs().items():
        value = saved(make(setup))
        yield rows.count("B3", case, name, METRIC, UNIT, value, backend=options.backend)


def saved(program: Program) -> int:
    """Bytes that a forward of the program keeps."""
    held = {t.untyped_storage().data_ptr() for t in (*program.model.parameters(), *program.model.buffers())}
    held |= {t.untyped_storage().data_ptr() for t in program.inputs.values()}
    found = dict[int, int]()
    kept = list[Tensor]()  # so that no storage is at the place of another

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in held:
            found[storage.data_ptr()] = storage.nbytes()
            kept.append(tensor)
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = program.loss()
    del loss
    return sum(found.values())
