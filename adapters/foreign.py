"""Which sharded checkpoints of other programs can we read? Optimum Neuron's adapters and neuronx-distributed's."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from adapters import nxd_files, optimum_files, rank_files
from adapters.optimum_files import SHARDS
from adapters.sharded_adapter import ShardedAdapter
from lora_fn import FileError


def _is_optimum(directory: Path) -> bool:
    return directory.name == SHARDS or any(
        entry.is_dir() for entry in [directory / SHARDS, *directory.glob(f"adapter_*/{SHARDS}")]
    )


def _is_nxd(directory: Path) -> bool:
    return directory.is_dir() and any(rank_files.is_checkpoint(entry) for entry in [directory, *directory.iterdir()])


# Name of a program -> whether a directory is of its kind; the first that says so counts.
KINDS_OF: Mapping[str, Callable[[Path], bool]] = {"optimum": _is_optimum, "nxd": _is_nxd}


def kind_of(directory: Path) -> str | None:
    """Which of `KINDS_OF` a directory is; None for none of them.

    Example:
        >>> kind_of(Path("no such directory")) is None
        True
    """
    return next((name for name, fits in KINDS_OF.items() if fits(directory)), None)


def open_any(
    directory: Path, *, allow_pickle: bool, allow_drift: bool = False, model: Path | None = None
) -> ShardedAdapter:
    """A sharded adapter of another program, whichever its files show.

    Args:
        directory, allow_pickle, allow_drift: As for `optimum_files.open_optimum`.
        model: As for `nxd_files.open_nxd`.

    Raises:
        FileError, SpecError: As `open_optimum` and `open_nxd`, or it is of neither kind.
    """
    if not directory.is_dir():
        raise FileError(f"{directory}: no such directory; give the directory of a sharded adapter.")
    kind = kind_of(directory)
    if kind == "optimum":
        return optimum_files.open_optimum(directory, allow_pickle=allow_pickle, allow_drift=allow_drift)
    if kind == "nxd":
        return nxd_files.open_nxd(directory, allow_pickle=allow_pickle, allow_drift=allow_drift, model=model)
    raise FileError(
        f"{directory}: holds neither adapter_*/{SHARDS} (Optimum Neuron) nor model/dp_rank_*.pt (neuronx-distributed); "
        f"give the directory of a sharded adapter."
    )
