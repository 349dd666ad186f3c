"""What did each process of a program with neuronx-distributed write? A pickle, opened with care.

A checkpoint is a directory with `model/dp_rank_00_tp_rank_TT_pp_rank_PP.pt`: of tensors ("plain"), or of references to
files beside it (xser: `.pt.tensors/tensor_N.pt`, shapes in `.pt.info.pt`), and a file `done` once it is whole.

Source: neuronx-distributed, `trainer/checkpoint.py`; torch_xla, `utils/serialization.py`.
"""

from __future__ import annotations

import re
import warnings
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lora_fn import FileError
from lora_fn.errors import Problems

RANK_FILE = re.compile(r"dp_rank_(\d+)(_ep_rank_\d+)?_tp_rank_(\d+)_pp_rank_(\d+)\.pt")
REFERENCE = "torch_xla.utils.serialization.TensorReference"


class TensorReference:
    """The stand-in for torch_xla's class of that name: the number of a tensor's file."""

    tid: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RankFile:
    """What one process wrote.

    Args:
        path: The file.
        tensors: Name -> tensor, or reference to one.
        others: Whatever else is in it, by name.
        info: Number of a reference -> its "shape" and "dtype"; None where that file is missing.
    """

    path: Path
    tensors: Mapping[str, Tensor | TensorReference]
    others: Mapping[str, Any]
    info: Mapping[int, Mapping[str, Any]] | None

    def read(self, name: str) -> Tensor:
        """A tensor, mapped from its file and not copied.

        Raises:
            FileError: It is missing, damaged, no tensor of floating point numbers, or not what the file says.
        """
        value = self.tensors[name]
        if isinstance(value, Tensor):
            return _checked(self.path, name, value)
        file = self.tensor_file(value)
        tensor = _checked(file, name, load(file))
        if self.info is not None:
            found, expected = (tensor.shape, tensor.dtype), self._told(value)
            if found != expected:
                raise FileError(
                    f"{file}: {name!r} is {_words(*found)}, {self.path.name}.info.pt says {_words(*expected)}; "
                    f"use files of one save."
                )
        return tensor

    def outline(self, name: str) -> tuple[torch.Size, torch.dtype]:
        """Shape and dtype of a tensor; what the file says of it where it says so."""
        value = self.tensors[name]
        if isinstance(value, TensorReference) and self.info is not None:
            return self._told(value)
        tensor = self.read(name)
        return tensor.shape, tensor.dtype

    def tensor_file(self, reference: TensorReference) -> Path:
        """The file that holds the tensor of a reference."""
        return self.path.with_name(self.path.name + ".tensors") / f"tensor_{reference.tid}.pt"

    def _told(self, reference: TensorReference) -> tuple[torch.Size, torch.dtype]:
        try:
            told = (self.info or {})[reference.tid]
            return torch.Size(told["shape"]), torch.empty(0, dtype=told["dtype"]).dtype
        except (KeyError, OverflowError, RuntimeError, TypeError, ValueError) as error:
            raise FileError(
                f"{self.path}.info.pt: does not tell shape and dtype of tensor {reference.tid}; use a whole checkpoint."
            ) from error


def open_stages(directory: Path, *, allow_pickle: bool) -> list[list[RankFile]]:
    """The files of a checkpoint.

    Args:
        directory: The one with `model` and `done`.
        allow_pickle: Open the pickles, with torch's `weights_only` (tensors and xser's references, nothing else).

    Returns:
        Pipeline stage -> process -> what it wrote.

    Raises:
        FileError: Not a whole checkpoint, or pickles that are not allowed.
    """
    if not (directory / "model").is_dir():
        raise FileError(f"{directory}: has no directory 'model'; give a checkpoint that neuronx-distributed wrote.")
    if not (directory / "done").is_file():
        raise FileError(f"{directory}: has no file 'done', so its save was not finished; use a finished checkpoint.")
    problems, found = Problems(FileError), {}
    entries = sorted((directory / "model").iterdir())
    for entry in entries:
        match = RANK_FILE.fullmatch(entry.name)
        stem = entry.name.removesuffix(".info.pt").removesuffix(".tensors")
        if match and entry.is_file() and entry.name == _rank_name(int(match[3]), int(match[4])):
            found[int(match[4]), int(match[3])] = entry
        elif match and match[2]:
            problems.add(str(entry), "is of expert parallel training, which is not supported; save without experts.")
        elif stem == entry.name or not RANK_FILE.fullmatch(stem) or not (entry.parent / stem).is_file():
            problems.add(str(entry), "does not belong to a checkpoint of this kind; remove it, or fetch it again.")
    if not entries:
        problems.add(str(directory / "model"), "is empty; use a whole checkpoint.")
    sizes = [max((ranks[i] for ranks in found), default=-1) + 1 for i in (0, 1)]
    if sizes[0] * sizes[1] > 4 * len(found) + 4:
        problems.add(str(directory / "model"), f"has {len(found)} files of {sizes[0]} x {sizes[1]} processes.")
    else:
        for pp in range(sizes[0]):
            for tp in set(range(sizes[1])) - {place for stage, place in found if stage == pp}:
                missing = directory / "model" / _rank_name(tp, pp)
                problems.add(str(missing), "is missing; use a whole checkpoint.")
    problems.raise_if_any()
    if not allow_pickle:
        raise FileError(
            f"{found[0, 0]}: is a pickle, and a pickle from a stranger may run code; "
            f"give --allow-pickle if you trust it (torch's weights_only is used even then)."
        )
    return [[_open(found[pp, tp]) for tp in range(sizes[1])] for pp in range(sizes[0])]


def is_checkpoint(directory: Path) -> bool:
    """Whether a directory holds files of processes, all of them or not."""
    model = directory / "model"
    return model.is_dir() and any(RANK_FILE.match(entry.name) for entry in model.iterdir())


def check_same(files: Sequence[RankFile], problems: Problems) -> None:
    """Note where the processes of a stage wrote other names, shapes or dtypes than the first."""
    first = files[0]
    for file in files[1:]:
        differ = sorted(set(first.tensors) ^ set(file.tensors))
        if differ:
            problems.add(str(file.path), f"{differ[0]!r} is only in one of it and {first.path.name}; use one save.")
        for name in (name for name in first.tensors if name in file.tensors):
            found, expected = file.outline(name), first.outline(name)
            if found != expected:
                problems.add(
                    str(file.path),
                    f"tensor {name!r} is {_words(*found)}, in {first.path.name} {_words(*expected)}; use one save.",
                )


def _rank_name(tp: int, pp: int) -> str:
    return f"dp_rank_00_tp_rank_{tp:02d}_pp_rank_{pp:02d}.pt"


def _open(file: Path) -> RankFile:
    content = load(file)
    if not isinstance(content, Mapping) or not all(isinstance(name, str) for name in content):
        raise FileError(f"{file}: holds a {type(content).__name__}, expected tensors by name; use a whole checkpoint.")
    tensors = {name: value for name, value in content.items() if isinstance(value, (Tensor, TensorReference))}
    others = {name: value for name, value in content.items() if name not in tensors}
    references = [value for value in tensors.values() if isinstance(value, TensorReference)]
    info, told = None, file.with_name(file.name + ".info.pt")
    if told.is_file():
        info = load(told)
        if not isinstance(info, Mapping):
            raise FileError(f"{told}: holds a {type(info).__name__}, expected a dict; use a whole checkpoint.")
    opened = RankFile(path=file, tensors=tensors, others=others, info=info)
    _check_references(opened, references)
    return opened


def _check_references(file: RankFile, references: Iterable[TensorReference]) -> None:
    """Refuse references to nothing, and tensors that nothing refers to."""
    problems, expected = Problems(FileError), set()
    for reference in references:
        tid = getattr(reference, "tid", None)
        if not isinstance(tid, int) or isinstance(tid, bool) or tid < 0:
            told = tid if isinstance(tid, int) else type(tid).__name__  # not its content, which may be endless
            problems.add(str(file.path), f"refers to tensor {told}, expected a number; use a whole checkpoint.")
            continue
        expected.add(file.tensor_file(reference))
        if not file.tensor_file(reference).is_file():
            problems.add(str(file.tensor_file(reference)), "is missing; use a whole checkpoint.")
    directory = file.path.with_name(file.path.name + ".tensors")
    for extra in sorted(set(directory.iterdir() if directory.is_dir() else ()) - expected):
        problems.add(str(extra), f"is no tensor of {file.path.name}; remove it, or fetch the checkpoint again.")
    problems.raise_if_any()


def load(file: Path) -> Any:
    """The content of a pickle that torch wrote: tensors, plain containers and xser's references, nothing else.

    Raises:
        FileError: Damaged, or it wants other classes.
    """
    try:
        zipped = zipfile.is_zipfile(file)
        if zipped:
            _check_archive(file)
        wanted = set(torch.serialization.get_unsafe_globals_in_checkpoint(str(file))) if zipped else set()
        if wanted - {REFERENCE}:
            raise FileError(
                f"{file}: wants {', '.join(sorted(wanted - {REFERENCE}))}, expected tensors only; "
                f"do not use it unless you know why."
            )
        with warnings.catch_warnings(), torch.serialization.safe_globals([(TensorReference, REFERENCE)]):
            warnings.simplefilter("ignore")
            return torch.load(file, map_location="cpu", weights_only=True, mmap=zipped)
    except FileError:
        raise
    except Exception as error:  # whatever a damaged file makes torch raise
        found = " ".join(str(error).split())[:160]
        raise FileError(f"{file}: is not a whole file of tensors ({found}); fetch or write it again.") from error


def _check_archive(file: Path) -> None:
    """Hold what torch wrote against its checksums, where it wrote some.

    Raises:
        ValueError: A wrong checksum, or an archive that torch does not write.
    """
    with zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
        size = sum(entry.file_size for entry in entries)
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries) or size > file.stat().st_size:
            raise ValueError("it is compressed, which torch does not do")
        wrong = archive.testzip() if any(entry.CRC for entry in entries) else None
        if wrong is not None:
            raise ValueError(f"the checksum of {wrong} is wrong")


def _checked(file: Path, name: str, value: Any) -> Tensor:
    """A tensor that is what it says it is.

    Raises:
        FileError: No tensor of floating point numbers on the CPU, or one that is larger than its file.
    """
    if not isinstance(value, Tensor) or value.layout is not torch.strided or not value.is_floating_point():
        kind = f"{value.dtype} {value.layout}" if isinstance(value, Tensor) else type(value).__name__
        raise FileError(f"{file}: {name!r} is a {kind}, expected a tensor of floating point numbers.")
    if value.device.type != "cpu" or value.numel() * value.element_size() > value.untyped_storage().nbytes():
        raise FileError(f"{file}: {name!r} says it has shape {list(value.shape)}, but its numbers are not in the file.")
    return value.detach()


def _words(shape: torch.Size, dtype: torch.dtype) -> str:
    return f"{list(shape)} of {str(dtype).removeprefix('torch.')}"
