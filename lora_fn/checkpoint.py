"""Where is the disk? Here: the only file that names safetensors.

Whatever is written is written beside its place, flushed to the disk, and renamed: a reader sees the old or the new.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lora_fn.errors import FileError

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
MODEL = "model.safetensors"
INDEX = "model.safetensors.index.json"


class TensorFiles:
    """Tensors by name, out of one or many safetensors files; only what is asked for is read.

    Args:
        files: Name of the tensor -> the file that holds it. Headers are read, and checked, at once.

    Attributes:
        shapes: Name -> shape.
        dtypes: Name -> safetensors' name of the dtype ("F32", "BF16"...).
        bytes_read: Bytes of tensor data handed out so far.
    """

    def __init__(self, paths: Mapping[str, Path] | list[Path]):
        wanted = dict(paths) if isinstance(paths, Mapping) else None
        files = list(dict.fromkeys(paths.values() if isinstance(paths, Mapping) else paths))
        self._files = {file: _open(file) for file in files}
        self._home: dict[str, Path] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, str] = {}
        self.bytes_read = 0
        for file, handle in self._files.items():
            for name in handle.keys():  # noqa: SIM118  (not a dict)
                if wanted is not None and wanted.get(name) != file:
                    continue
                if name in self._home:
                    raise FileError(f"{file}: tensor {name!r} is also in {self._home[name]}; keep it in one of them.")
                piece = handle.get_slice(name)
                self._home[name] = file
                self.shapes[name] = tuple(piece.get_shape())
                self.dtypes[name] = piece.get_dtype()
        missing = sorted(set(wanted or ()) - set(self._home))
        if missing:
            raise FileError(
                f"{(wanted or {})[missing[0]]}: tensor {missing[0]!r} is not in it, though the index says so."
            )

    def read(self, name: str, *, dim: int = 0, start: int = 0, stop: int | None = None) -> Tensor:
        """A tensor, or a contiguous part of it.

        Args:
            name: Of the tensor.
            dim: The dimension to take a part of, 0 or 1.
            start, stop: The part; stop None for the end.

        Raises:
            FileError: No such tensor.
        """
        if name not in self._home:
            raise FileError(
                f"tensor {name!r} is in none of {sorted(str(f) for f in self._files)}; use a complete checkpoint."
            )
        handle = self._files[self._home[name]]
        shape = self.shapes[name]
        if not shape:
            tensor = handle.get_tensor(name)
        else:
            piece = handle.get_slice(name)
            tensor = piece[start:stop] if dim == 0 else piece[:, start:stop]
        self.bytes_read += tensor.numel() * tensor.element_size()
        return tensor

    def by_file(self) -> dict[Path, list[str]]:
        """The names of the tensors of each file."""
        files: dict[Path, list[str]] = {file: [] for file in self._files}
        for name, file in self._home.items():
            files[file].append(name)
        return files


def _open(file: Path) -> Any:
    if not file.is_file():
        raise FileError(f"{file}: no such file; check the path.")
    try:
        return safe_open(str(file), framework="pt")
    except (SafetensorError, OSError) as error:
        raise FileError(f"{file}: is not a whole safetensors file ({error}); fetch or write it again.") from error


def open_model(directory: Path) -> TensorFiles:
    """The tensors of a Hugging Face model directory: model.safetensors, or the shards that its index names.

    Raises:
        FileError: No such directory, no weights in it, an index that points elsewhere, a missing or damaged file.
    """
    if not directory.is_dir():
        raise FileError(f"{directory}: no such directory; give the directory of a Hugging Face model.")
    if not (directory / INDEX).is_file():
        if not (directory / MODEL).is_file():
            raise FileError(f"{directory}: holds neither {MODEL} nor {INDEX}; save the model with safetensors.")
        return TensorFiles([directory / MODEL])
    weight_map = read_json(directory / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise FileError(f"{directory / INDEX}: has no 'weight_map'; write the index again.")
    outside = sorted({str(f) for f in weight_map.values() if not isinstance(f, str) or Path(f).name != f})
    if outside:
        raise FileError(f"{directory / INDEX}: names {outside[0]!r}, which is not a file of this directory.")
    return TensorFiles({name: directory / file for name, file in weight_map.items()})


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        FileError: No such file, or not a JSON object.
    """
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise FileError(f"{file}: no such file; check the path.") from error
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise FileError(f"{file}: is not JSON ({error}); write it again.") from error
    if not isinstance(value, dict):
        raise FileError(f"{file}: holds a {type(value).__name__}, expected a JSON object.")
    return value


def write_json(file: Path, value: Mapping[str, Any]) -> None:
    """A JSON object to a file, as PEFT lays it out; replaces the file in one go."""
    with replacing(file) as beside:
        beside.write_text(json.dumps(value, indent=2, sort_keys=True), encoding="utf-8")


def write_tensors(file: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Tensors to one safetensors file; replaces the file in one go.

    Args:
        file: Its place.
        tensors: Name -> tensor; copied to the CPU.
        metadata: Text for the header; `{"format": "pt"}` is always there.
    """
    plain = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    with replacing(file) as beside:
        save_file(plain, str(beside), metadata={"format": "pt", **(metadata or {})})


def check_finite(directory: Path, tensors: Mapping[str, Tensor]) -> None:
    """Refuse to write what nobody could use.

    Raises:
        FileError: A tensor that is not finite.
    """
    for name, t in tensors.items():
        if not torch.isfinite(t).all():
            raise FileError(f"{directory}: tensor {name!r} is not finite; nothing was written.")


def save_adapter(directory: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """A PEFT directory: adapter_config.json and adapter_model.safetensors.

    Raises:
        FileError: A tensor that is not finite (nothing is written then), or a place that cannot be written.
    """
    check_finite(directory, tensors)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        write_json(directory / CONFIG, config)
        write_tensors(directory / WEIGHTS, tensors)
    except (SafetensorError, OSError) as error:
        raise FileError(f"{directory}: cannot be written ({error}); choose another place.") from error


def open_adapter(directory: Path) -> tuple[dict[str, Any], TensorFiles]:
    """The config and the tensors of a PEFT directory.

    Raises:
        FileError: No such directory, or a file that is missing or damaged.
    """
    if not directory.is_dir():
        raise FileError(f"{directory}: no such directory; give the directory of a PEFT adapter.")
    config = read_json(directory / CONFIG)
    if not (directory / WEIGHTS).is_file() and (directory / "adapter_model.bin").is_file():
        raise FileError(f"{directory}: has adapter_model.bin, a pickle, which is not read; save it as safetensors.")
    return config, TensorFiles([directory / WEIGHTS])


def check_above(place: Path) -> None:
    """Refuse a place below something that is no directory.

    Raises:
        FileError: It is.
    """
    above = next(path for path in place.absolute().parents if path.exists())
    if not above.is_dir():
        raise FileError(f"{place}: {above} is a file; choose another place.")


@contextmanager
def replacing(place: Path) -> Iterator[Path]:
    """A path beside a file's or directory's place, which takes that place when the block ends well.

    What was there is replaced in one go (a directory: removed just before). After an error nothing is left behind.
    """
    beside = place.with_name(f".{place.name}.{os.getpid()}.partial")
    remove(beside)
    try:
        yield beside
        for file in [beside, *beside.rglob("*")] if beside.is_dir() else [beside]:
            if file.is_file():
                file.chmod(0o644)  # safetensors writes files that only their owner may read
            flush(file)
        if beside.is_dir() and place.is_dir():
            shutil.rmtree(place)
        os.replace(beside, place)
        flush(place.parent)
    except BaseException:
        remove(beside)
        raise


def flush(path: Path) -> None:
    """Wait until a file or directory is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def remove(path: Path) -> None:
    """Remove a file or a directory, if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
