"""Where is the disk? Here: the only file that names safetensors.

Whatever is written is written beside its place, flushed to the disk, and renamed: a reader sees the old or the new.
"""

from __future__ import annotations

import errno
import functools
import hashlib
import json
import math
import mmap
import os
import re
import shutil
import weakref
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from lora_fn.errors import FileError, Problems

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
MODEL = "model.safetensors"
INDEX = "model.safetensors.index.json"


# In safetensors' order: its name of a dtype -> torch's name (None: copied, but not read), and bits of an element.
DTYPES: Mapping[str, tuple[str | None, int]] = {
    "BOOL": ("bool", 8),
    "F4": (None, 4),
    "F6_E2M3": (None, 6),
    "F6_E3M2": (None, 6),
    "U8": ("uint8", 8),
    "I8": ("int8", 8),
    "F8_E5M2": ("float8_e5m2", 8),
    "F8_E4M3": ("float8_e4m3fn", 8),
    "F8_E8M0": ("float8_e8m0fnu", 8),
    "F8_E5M2FNUZ": ("float8_e5m2fnuz", 8),
    "F8_E4M3FNUZ": ("float8_e4m3fnuz", 8),
    "I16": ("int16", 16),
    "U16": ("uint16", 16),
    "F16": ("float16", 16),
    "BF16": ("bfloat16", 16),
    "I32": ("int32", 32),
    "U32": ("uint32", 32),
    "F32": ("float32", 32),
    "C64": ("complex64", 64),
    "F64": ("float64", 64),
    "I64": ("int64", 64),
    "U64": ("uint64", 64),
}
_NAMES = {getattr(torch, name): code for code, (name, _) in DTYPES.items() if name is not None}
# The header's text that an adapter of ours carries; and the keys of adapter_config.json that say what its tensors do,
# with PEFT's defaults (which layers they do it to, their names say).
SEAL = "lora_fn"
SEALED: Mapping[str, Any] = {
    **{"r": 8, "lora_alpha": 8, "use_rslora": False, "fan_in_fan_out": False},
    **{"rank_pattern": {}, "alpha_pattern": {}},
}
# Bytes of a JSON file, or of a safetensors header, that are read. The largest known have 15 MB; JSON that is made
# to take much memory takes 30 times its size.
MAX_JSON = 1 << 25
MAX_INT = 2**63
_SHARD = re.compile(r"[\w.+@ -]{1,200}\.safetensors", re.ASCII)


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One tensor of a safetensors file.

    Args:
        dtype: A key of `DTYPES`.
        shape: Of the tensor.
        start, stop: Its bytes, counted from the start of the file.
    """

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """What a safetensors file says of itself, checked against its size.

    Args:
        size: Bytes before the data.
        entries: Name -> tensor, in the order of the file.
        metadata: Its text.
    """

    size: int
    entries: Mapping[str, Entry]
    metadata: Mapping[str, str]


class TensorFiles:
    """Tensors by name, out of one or many safetensors files; only what is asked for is read.

    Args:
        paths: The files, or {name of the tensor: the file that holds it}, which must then name every tensor of its
            files. Headers are read, and checked, at once.

    Attributes:
        headers: {file: Header}.
        shapes: Name -> shape.
        dtypes: Name -> safetensors' name of the dtype ("F32", "BF16"...).
        bytes_read: Bytes of tensor data handed out so far.

    Raises:
        FileError: A file that is missing or not whole, a tensor in two files, an index that differs from its files.
    """

    def __init__(self, paths: Mapping[str, Path] | list[Path]):
        wanted = dict(paths) if isinstance(paths, Mapping) else None
        files = list(dict.fromkeys(paths.values() if isinstance(paths, Mapping) else paths))
        self.headers: dict[Path, Header] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, str] = {}
        self.bytes_read = 0
        self._home: dict[str, Path] = {}
        self._opened: dict[Path, int] = {}
        self._maps: dict[Path, Tensor] = {}
        weakref.finalize(self, _close, self._opened)
        for file in files:
            self._opened[file] = _open(file)
            self.headers[file] = read_header(
                file, os.fstat(self._opened[file]).st_size, functools.partial(os.read, self._opened[file])
            )
        problems = Problems(FileError)
        for file, header in self.headers.items():
            for name, entry in header.entries.items():
                if wanted is not None and name not in wanted:
                    problems.add(str(file), f"tensor {_told(name)} is not in the index; write the index again.")
                elif name in self._home:
                    problems.add(
                        str(file), f"tensor {_told(name)} is also in {self._home[name]}; keep it in one of them."
                    )
                self._home.setdefault(name, file)
                self.shapes[name], self.dtypes[name] = entry.shape, entry.dtype
        for name, file in (wanted or {}).items():
            if name not in self.headers[file].entries:
                problems.add(str(file), f"tensor {_told(name)} is not in it, though the index says so.")
        problems.raise_if_any()

    def read(self, name: str, *, dim: int = 0, start: int = 0, stop: int | None = None) -> Tensor:
        """A tensor, or a contiguous part of it.

        Args:
            name: Of the tensor.
            dim: The dimension to take a part of, 0 or 1.
            start, stop: The part; stop None for the end.

        Raises:
            FileError: No such tensor, a dtype that torch cannot hold, a file that shrank.
        """
        entry, dtype = self._entry(name)
        shape = list(entry.shape)
        if shape:
            start, stop, _ = slice(start, stop).indices(shape[dim])
            shape[dim] = max(0, stop - start)
        tensor = torch.empty(shape, dtype=dtype)
        content = as_bytes(tensor)
        if not len(content):
            return tensor
        pieces = shape[0] if dim == 1 else 1
        stride = (entry.stop - entry.start) // entry.shape[0] if dim == 1 else 0
        skip = start * (len(content) // (pieces * shape[dim])) if shape else 0
        length = len(content) // pieces
        for i in range(pieces):
            self._fill(name, content[i * length : (i + 1) * length], entry.start + i * stride + skip)
        self.bytes_read += len(content)
        return tensor

    def view(self, name: str, *, dim: int = 0, start: int = 0, stop: int | None = None) -> Tensor:
        """As `read`, without a copy: over the file's own pages, and so for as long as the file stays as it is.

        Writing to it does not change the file.
        """
        entry, dtype = self._entry(name)
        if entry.start % dtype.itemsize:  # which no tensor can begin at
            return self.read(name, dim=dim, start=start, stop=stop)
        whole = self._mapped(self._home[name])[entry.start : entry.stop].view(dtype).view(entry.shape)
        self.bytes_read += entry.stop - entry.start
        if not entry.shape or (start, stop) == (0, None):
            return whole
        start, stop, _ = slice(start, stop).indices(entry.shape[dim])
        return whole.narrow(dim, start, max(0, stop - start))

    def _mapped(self, file: Path) -> Tensor:
        """A file's bytes, uint8 [size]."""
        if file not in self._maps:
            end = max(entry.stop for entry in self.headers[file].entries.values())
            if os.fstat(self._opened[file]).st_size < end:
                raise _damaged(file, "it ends early")
            pages = mmap.mmap(self._opened[file], end, access=mmap.ACCESS_COPY)
            self._maps[file] = torch.frombuffer(pages, dtype=torch.uint8)
        return self._maps[file]

    def read_rows(self, name: str, start: int, stop: int, *, buffer: Tensor) -> Tensor:
        """Rows of a tensor seen as a matrix, in memory that is used again and again.

        Args:
            name: Of the tensor.
            start, stop: The rows, of `as_matrix(shape)`.
            buffer: uint8 [at least as many bytes].

        Returns:
            A view of the buffer, [stop - start, columns].

        Raises:
            FileError: As `read`.
        """
        entry, dtype = self._entry(name)
        row = (entry.stop - entry.start) // max(1, as_matrix(entry.shape)[0])
        part = buffer[: (stop - start) * row]
        self._fill(name, as_bytes(part), entry.start + start * row)
        self.bytes_read += len(part)
        return part.view(dtype).view(stop - start, -1)

    def copy_bytes(self, file: Path, start: int, stop: int, target: int) -> None:
        """Append bytes of one of the files to an open file, within the kernel where it can.

        Args:
            file: One of the files.
            start, stop: Its bytes.
            target: Descriptor, written to where it stands.

        Raises:
            FileError: A file that shrank.
        """
        for copy in (_copy_file_range, os.sendfile, _copy_through):
            try:
                while start < stop:
                    copied = copy(target, self._opened[file], start, min(stop - start, 1 << 30))
                    if not copied:
                        raise _damaged(file, "it ends early")
                    start += copied
                return
            except OSError as error:
                if copy is _copy_through or error.errno not in _CANNOT:
                    raise

    def pieces(self, file: Path, start: int, stop: int, *, buffer: Tensor) -> Iterator[memoryview]:
        """Bytes of one of the files, piece after piece, in memory that is used again and again.

        Args:
            file: One of the files.
            start, stop: Its bytes.
            buffer: uint8 [size of a piece].

        Raises:
            FileError: A file that shrank.
        """
        whole = as_bytes(buffer)
        while start < stop:
            num = os.preadv(self._opened[file], [whole[: stop - start]], start)
            if not num:
                raise _damaged(file, "it ends early")
            yield whole[:num]
            start += num

    def _entry(self, name: str) -> tuple[Entry, torch.dtype]:
        if name not in self._home:
            raise FileError(
                f"tensor {_told(name)} is in none of {sorted(map(str, self.headers))}; use a complete checkpoint."
            )
        entry = self.headers[self._home[name]].entries[name]
        dtype = getattr(torch, DTYPES[entry.dtype][0] or "", None)
        if dtype is None:
            raise FileError(
                f"{self._home[name]}: tensor {_told(name)} has dtype {entry.dtype}, which is not read here; "
                f"save it in another."
            )
        return entry, dtype

    def _fill(self, name: str, content: memoryview, offset: int) -> None:
        """Read until `content` is full."""
        file = self._home[name]
        while len(content):
            num = os.preadv(self._opened[file], [content[: 1 << 30]], offset)
            if not num:
                raise _damaged(file, "it ends early")
            content, offset = content[num:], offset + num


def as_matrix(shape: Sequence[int]) -> tuple[int, int]:
    """Rows and columns of a tensor in memory: its last dimension is a row; a vector is a column.

    Example:
        >>> as_matrix((2, 3, 4)), as_matrix((5,)), as_matrix(())
        ((6, 4), (5, 1), (1, 1))
    """
    return (math.prod(shape[:-1]), shape[-1]) if len(shape) > 1 else (math.prod(shape), 1)


def as_bytes(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def _copy_file_range(target: int, source: int, start: int, num: int) -> int:
    return os.copy_file_range(source, target, num, offset_src=start)


def _copy_through(target: int, source: int, start: int, num: int) -> int:
    return os.write(target, os.pread(source, min(num, 1 << 20), start))


# What a kernel or file system says that does not copy this way.
_CANNOT = (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM, errno.EXDEV, errno.EBADF, errno.ENOTSOCK)


def _close(opened: dict[Path, int]) -> None:
    for handle in opened.values():
        os.close(handle)


def _open(file: Path) -> int:
    if not file.is_file():
        raise FileError(f"{file}: no such file; check the path.")
    try:
        return os.open(file, os.O_RDONLY)
    except OSError as error:
        raise FileError(f"{file}: cannot be read ({error.strerror}); check its permissions.") from error


def _damaged(file: Path, why: str) -> FileError:
    return FileError(f"{file}: is not a whole safetensors file ({why}); fetch or write it again.")


def _told(value: Any) -> str:
    """A value from a file, for a message: on one line, and not longer than one."""
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."


def read_header(file: Path, size: int, read: Callable[[int], bytes]) -> Header:
    """The header of a safetensors file, which nobody vouches for.

    Args:
        file: For messages.
        size: Of the file, in bytes.
        read: Gives its next bytes, that many.

    Raises:
        FileError: It contradicts itself, or the size.

    Source: safetensors, README "Format": 8 bytes length N, N bytes of JSON, the data without holes.
    """
    first = read(8)
    length = int.from_bytes(first, "little")
    if len(first) < 8 or length > size - 8:
        raise _damaged(file, f"its header is cut off: it has {size} bytes")
    if length > MAX_JSON:
        raise _damaged(file, f"its header has {length} bytes, at most {MAX_JSON} are read")
    text = read(length)
    if len(text) < length or not text.startswith(b"{"):
        raise _damaged(file, "its header is not a JSON object")
    try:
        content = _parsed(text)
    except (ValueError, RecursionError) as error:
        raise _damaged(file, f"its header is not JSON: {error}") from error
    metadata = content.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _damaged(file, "its metadata are not text")
    entries: dict[str, Entry] = {}
    for name, of in content.items():
        entries[name] = _checked(file, name, of, start=8 + length, size=size)
    end = 8 + length
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].stop)):
        if entry.start != end:
            raise _damaged(file, f"{_told(name)} begins at byte {entry.start}, the tensor before it ends at {end}")
        end = entry.stop
    if end != size:
        raise _damaged(file, f"it has {size} bytes, its header tells of {end}")
    return Header(size=8 + length, entries=entries, metadata=metadata)


def _checked(file: Path, name: str, of: Any, *, start: int, size: int) -> Entry:
    where = f"tensor {_told(name)}"
    if not isinstance(of, dict) or set(of) != {"dtype", "shape", "data_offsets"}:
        raise _damaged(file, f"{where} is {_told(of)}, expected dtype, shape and data_offsets")
    dtype, shape, offsets = of["dtype"], of["shape"], of["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise _damaged(file, f"{where} has dtype {_told(dtype)}, expected one of {', '.join(DTYPES)}")
    for key, numbers in (("shape", shape), ("data_offsets", offsets)):
        if not isinstance(numbers, list) or not all(type(n) is int and 0 <= n < MAX_INT for n in numbers):
            raise _damaged(file, f"{where} has {key} {_told(numbers)}, expected integers of at least 0")
    if len(offsets) != 2 or not offsets[0] <= offsets[1] <= size - start:
        raise _damaged(file, f"{where} has data_offsets {_told(offsets)}, expected two within {size - start} bytes")
    bits = DTYPES[dtype][1] if 0 not in shape else 0
    for n in shape if bits else ():
        bits *= n
        if bits > 8 * size:
            break
    if bits != 8 * (offsets[1] - offsets[0]):
        raise _damaged(
            file, f"{where} is {dtype} {_told(shape)}, which {offsets[1] - offsets[0]} bytes do not hold exactly"
        )
    return Entry(dtype=dtype, shape=tuple(shape), start=start + offsets[0], stop=start + offsets[1])


def open_model(directory: Path) -> TensorFiles:
    """The tensors of a Hugging Face model directory: model.safetensors, or the shards that its index names.

    Raises:
        FileError: No such directory, no weights in it, an index that points elsewhere or differs from its shards, a
            missing or damaged file.
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
    for file in weight_map.values():
        if not isinstance(file, str) or not _SHARD.fullmatch(file):
            raise FileError(
                f"{directory / INDEX}: names {_told(file)}, which is not a file of this directory; expected the plain "
                f"name of a safetensors file."
            )
    if (directory / MODEL).is_file() and MODEL not in weight_map.values():
        raise FileError(f"{directory}: holds {MODEL} and an index of other files; remove what does not belong to it.")
    return TensorFiles({name: directory / file for name, file in weight_map.items()})


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        FileError: As `read_any_json`, or not an object.
    """
    value = read_any_json(file)
    if not isinstance(value, dict):
        raise FileError(f"{file}: holds a {type(value).__name__}, expected a JSON object.")
    return value


def read_any_json(file: Path) -> Any:
    """A JSON value from a file.

    Raises:
        FileError: No such file, not JSON, a key twice, NaN, or more than `MAX_JSON` bytes.
    """
    if not file.is_file():
        raise FileError(f"{file}: no such file; check the path.")
    try:
        size = file.stat().st_size
        if size > MAX_JSON:
            raise FileError(f"{file}: has {size} bytes, at most {MAX_JSON} are read; check what it is.")
        return _parsed(file.read_bytes())
    except (OSError, json.JSONDecodeError, UnicodeDecodeError, RecursionError, _Refused) as error:
        raise FileError(f"{file}: is not JSON ({error}); write it again.") from error


class _Refused(ValueError):
    """JSON that Python would take."""


def _parsed(text: bytes) -> Any:
    # transformers itself writes Infinity into config.json (Mamba's time_step_limit), and 1e999 is the same number.
    return json.loads(text.decode("utf-8"), object_pairs_hook=_once, parse_constant=_constant, parse_int=_int)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        twice = next(key for key, num in Counter(key for key, _ in pairs).items() if num > 1)
        raise _Refused(f"key {_told(twice)} is in it twice")
    return value


def _constant(text: str) -> float:
    if text == "NaN":
        raise _Refused("NaN is in it")
    return float(text)


def _int(text: str) -> int:
    if len(text) > 100:
        raise _Refused(f"a number of {len(text)} digits is in it")
    return int(text)


def write_json(file: Path, value: Mapping[str, Any]) -> None:
    """A JSON object to a file, as PEFT lays it out; replaces the file in one go."""
    with replacing(file) as beside:
        beside.write_text(json.dumps(value, indent=2, sort_keys=True), encoding="utf-8")


def write_tensors(
    file: Path,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str] | None = None,
    digest: hashlib._Hash | None = None,
) -> None:
    """Tensors to one safetensors file; replaces the file in one go.

    Args:
        file: Its place.
        tensors: Name -> tensor; copied to the CPU.
        metadata, digest: As for `writing`.
    """
    plan = {name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()}
    with writing(file, plan, metadata, digest) as put:
        for name in in_file_order(plan):
            put(name, tensors[name])


def in_file_order(plan: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]) -> list[str]:
    """The names of tensors, in the order in which safetensors writes them: the widest dtype first, then by name."""
    ranks = {code: -number for number, code in enumerate(DTYPES)}
    return sorted(plan, key=lambda name: (ranks[_NAMES[plan[name][0]]], name))


@contextmanager
def writing(
    file: Path,
    plan: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
    metadata: Mapping[str, str] | Callable[[str], Mapping[str, str]] | None = None,
    digest: hashlib._Hash | None = None,
) -> Iterator[Callable[[str, Tensor], None]]:
    """Write a safetensors file tensor by tensor, in any order; it replaces the file when the block ends.

    The bytes are those that safetensors writes (which for several texts in the header has no order of its own; here
    they are sorted).

    Args:
        file: Its place.
        plan: Name -> dtype and shape of every tensor that will come.
        metadata: Text for the header, or a function of the checksum of all tensors (see `checksum`), whose results are
            all of one length. `{"format": "pt"}` is always there.
        digest: Is fed with the bytes of the file: with those of tensors as they come, as long as they come in the order
            of the file, and with the rest at the end. Not where `metadata` is a function.

    Yields:
        put(name, tensor), once for every tensor.

    Raises:
        FileError: A dtype that safetensors does not know.
    """
    entries: dict[str, dict[str, Any]] = {}
    at = 0
    for name, (dtype, _) in plan.items():
        if dtype not in _NAMES:
            raise FileError(f"{file}: tensor {name!r} has dtype {dtype}, which cannot be written; choose another.")
    for name in in_file_order(plan):
        dtype, shape = plan[name]
        stop = at + math.prod(shape) * dtype.itemsize
        entries[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [at, stop]}
        at = stop

    def header(sum_: str) -> bytes:
        text = {"format": "pt", **((metadata(sum_) if callable(metadata) else metadata) or {})}
        told = {"__metadata__": dict(sorted(text.items())), **entries}
        content = json.dumps(told, separators=(",", ":"), ensure_ascii=False).encode()
        content += b" " * (-len(content) % 8)
        return len(content).to_bytes(8, "little") + content

    first, sums = header("0" * 8), dict[str, int]()
    hashed = 0  # bytes of the file that the digest has seen
    if digest is not None:
        assert not callable(metadata)
        digest.update(first)
        hashed = len(first)
    with replacing(file) as beside:
        handle = os.open(beside, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
        try:
            os.truncate(handle, len(first) + at)

            def put(name: str, tensor: Tensor) -> None:
                nonlocal hashed
                plain = tensor.detach().cpu().contiguous()
                assert name not in sums and (plain.dtype, tuple(plain.shape)) == tuple(plan[name]), name
                content, offset = as_bytes(plain), len(first) + entries[name]["data_offsets"][0]
                sums[name] = zlib.crc32(content) if callable(metadata) else 0
                if digest is not None and offset == hashed:
                    digest.update(content)
                    hashed += len(content)
                while len(content):
                    num = os.pwrite(handle, content[: 1 << 30], offset)
                    content, offset = content[num:], offset + num

            yield put
            assert sums.keys() == plan.keys(), sorted(plan.keys() - sums.keys())
            last = header(_joint({name: (of["dtype"], of["shape"], sums[name]) for name, of in entries.items()}))
            assert len(last) == len(first)
            os.pwrite(handle, last, 0)
            while digest is not None and (piece := os.pread(handle, 1 << 20, hashed)):
                digest.update(piece)
                hashed += len(piece)
        finally:
            os.close(handle)
        with safe_open(str(beside), framework="pt") as opened:  # the library itself takes it, or it takes no name
            assert set(opened.keys()) == set(plan)


def _joint(sums: Mapping[str, tuple[str, Sequence[int], int]]) -> str:
    """One checksum, 8 hexadecimal digits, of the names, dtypes, shapes and checksums of tensors."""
    lines = [f"{name} {dtype} {list(shape)} {each:08x}" for name, (dtype, shape, each) in sorted(sums.items())]
    return f"{zlib.crc32(chr(10).join(lines).encode()):08x}"


def checksum(files: TensorFiles, file: Path) -> str:
    """The checksum of all tensors of one file: 8 hexadecimal digits, a CRC-32 of their names, dtypes, shapes, bytes."""
    sums, piece = {}, torch.empty(1 << 20, dtype=torch.uint8)
    for name, entry in files.headers[file].entries.items():
        each = 0
        for content in files.pieces(file, entry.start, entry.stop, buffer=piece):
            each = zlib.crc32(content, each)
        sums[name] = (entry.dtype, entry.shape, each)
    return _joint(sums)


def is_finite(t: Tensor) -> bool:
    """Whether all numbers of a tensor are: one that is not makes the sum so. So does a sum that is too large; then the
    least and the largest tell."""
    if not t.numel() or not t.is_floating_point():
        return True
    t = t if t.itemsize > 1 else t.float()  # of 8 bits there is no order
    return math.isfinite(t.sum().item()) or all(math.isfinite(end.item()) for end in t.aminmax())


def check_finite(directory: Path, tensors: Mapping[str, Tensor]) -> None:
    """Refuse to write what nobody could use.

    Raises:
        FileError: A tensor that is not finite.
    """
    for name, t in tensors.items():
        if not is_finite(t):
            raise FileError(f"{directory}: tensor {name!r} is not finite; nothing was written.")


def save_adapter(directory: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """A PEFT directory: adapter_config.json and adapter_model.safetensors.

    Raises:
        FileError: A tensor that is not finite (nothing is written then), or a place that cannot be written.
    """
    check_finite(directory, tensors)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with writing_adapter(directory, config, {n: (t.dtype, tuple(t.shape)) for n, t in tensors.items()}) as put:
            for name, t in tensors.items():
                put(name, t)
    except OSError as error:
        raise FileError(f"{directory}: cannot be written ({error}); choose another place.") from error


@contextmanager
def writing_adapter(
    directory: Path, config: Mapping[str, Any], plan: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
) -> Iterator[Callable[[str, Tensor], None]]:
    """Write a PEFT directory, which is there already, tensor by tensor (see `writing`).

    The header of the tensors' file carries their checksum, and what of the config the numbers depend on: so that
    damage, or the config of another adapter, is found when it is read (`open_adapter`). Other programs ignore it.
    """

    def metadata(sum_: str) -> dict[str, str]:
        told = {key: config.get(key, default) for key, default in SEALED.items()}
        return {SEAL: json.dumps({"crc32": sum_, "config": told}, sort_keys=True, separators=(",", ":"))}

    with writing(directory / WEIGHTS, plan, metadata) as put:
        yield put
        write_json(directory / CONFIG, config)


def _check_seal(directory: Path, config: Mapping[str, Any], files: TensorFiles) -> None:
    """Hold an adapter against what `writing_adapter` has put into its header, where it has.

    Raises:
        FileError: Other tensors, or another config.
    """
    file = directory / WEIGHTS
    if SEAL not in files.headers[file].metadata:
        return
    try:
        seal = json.loads(files.headers[file].metadata[SEAL])
        expected, of_config = seal["crc32"], dict(seal["config"])
    except (json.JSONDecodeError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise _damaged(file, f"its seal cannot be read ({error})") from error
    if checksum(files, file) != expected:
        raise _damaged(file, "its tensors are not those that were written")
    for key, default in SEALED.items():
        if of_config.get(key, default) != config.get(key, default):
            raise FileError(
                f"{directory / CONFIG}: {key!r} is {config.get(key)!r}, but {WEIGHTS} was written with "
                f"{of_config.get(key)!r}; use the adapter's own config."
            )


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
    files = TensorFiles([directory / WEIGHTS])
    _check_seal(directory, config, files)
    return config, files


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
