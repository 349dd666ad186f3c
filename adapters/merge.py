"""How does an adapter become part of a model on disk? File to file, by blocks of rows: no tensor is in memory whole.

Files, their index and the order of their tensors stay. What is not adapted is copied within the kernel; what is
adapted is computed in float64 and rounded once.
"""

from __future__ import annotations

import functools
import json
import math
import os
import shutil
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from queue import SimpleQueue
from typing import Any, NamedTuple

import torch
from torch import Tensor

import lora_fn
from adapters import experts, raw
from adapters.convert import AdapterOnDisk, open_adapter
from adapters.experts import Piece
from lora_fn import FileError, LayerSpec, checkpoint, peft_format, sharding, starts, variants
from lora_fn.checkpoint import Entry, TensorFiles
from lora_fn.errors import Problems

# dtypes that a merge can write -> safetensors' names of them.
DTYPES: Mapping[str, str] = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
FLOATS = ("F16", "BF16", "F32", "F64")

BLOCK = 1 << 18  # elements computed at a time
MIN_ROWS = 16
MAX_WORKERS = 4
FLUSH = 64 << 20  # bytes after which the disk is set to work
KEPT = 31 << 20  # bytes; below the largest threshold of glibc's, which grows to what is freed (mallopt(3))

# Weights in other forms, and what would lead a reader to them.
LEFT_OUT = (".safetensors", ".bin", ".pt", ".pth", ".h5", ".msgpack", ".gguf", ".onnx", ".index.json")

# What became of the base as an adapter began -> the rest of a sentence.
LEFT: Mapping[str, str] = {
    starts.RESIDUAL: "lacks what it began with; load it, save it again with as_lora, and merge that",
    starts.QUANTIZED: "is quantized; wrap the model, load the adapter, and write what adapters.merged_weights gives",
}

# The bits of an fp32 number that are all zero where it lies halfway between two numbers of the dtype.
_BELOW_HALF = {torch.bfloat16: 0x7FFF, torch.float16: 0x0FFF}


@dataclass(frozen=True, slots=True, kw_only=True)
class Merged:
    """What a merge did.

    Args:
        layers: How many were adapted.
        effect: Of the prompt, by how much the adapters change the logits: max|tuned - base| / max|base|.
        difference: Of the prompt, max|merged - tuned| / max|tuned|. Both None where no prompt was given.
    """

    layers: int
    effect: float | None = None
    difference: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """What one adapter does to one tensor of the model.

    Args:
        source: The adapter.
        path: The layer.
        parameter: "weight" or "bias" of it, to which factors add something; or "replaced", or "tokens": its rows are.
        piece: Where the tensor is a piece of the raw parameter that is adapted there.
    """

    source: AdapterOnDisk
    path: str
    parameter: str
    piece: Piece | None = None


def merge(
    model: Path,
    adapters: Sequence[Path],
    output: Path,
    *,
    dtype: str | None = None,
    verify: str | None = None,
    quiet: bool = False,
) -> Merged:
    """Write a model with adapters in its weights, in the same files as the model.

    Args:
        model: Directory of a Hugging Face model.
        adapters: Directories of PEFT adapters for it; their updates add up, each with its own scaling.
        output: A directory that does not exist yet.
        dtype: Of the floating tensors written, a key of `DTYPES`; None for the model's own.
        verify: A prompt whose logits are compared, in fp32: the merged model's, with those of the model with its
            adapters beside it.
        quiet: No progress bar.

    Raises:
        FileError: A damaged or missing file, an adapter that does not fit the model, an output that exists or cannot be
            written, a result that is not finite, a model that cannot be verified. Nothing is written then.
        SpecError: A config that we cannot follow.
    """
    from tqdm import tqdm

    if output.exists():
        raise FileError(f"{output}: exists; choose another --output.")
    if dtype not in (None, *DTYPES):
        raise FileError(f"{output}: cannot be written in dtype {dtype!r}; choose one of {', '.join(DTYPES)}.")
    checkpoint.check_above(output)
    base, sources = checkpoint.open_model(model), [open_adapter(adapter) for adapter in adapters]
    plan = _plan(base, sources, model, adapters)
    check = _verifier(model, base, sources, verify) if verify is not None else None
    try:
        with checkpoint.replacing(output) as beside:
            beside.mkdir(parents=True)
            _copy_others(model, beside, base, dtype)
            total = sum(entry.stop - entry.start for h in base.headers.values() for entry in h.entries.values())
            with (
                tqdm(total=total, unit="B", unit_scale=True, desc="merge", disable=quiet) as bar,
                _workers(base) as workers,
                ThreadPoolExecutor(1) as disk,
            ):
                written: list[Future[None]] = []
                for file in base.headers:
                    writer = _Writer(base, file, plan, output, dtype=dtype, workers=workers, disk=disk, tell=bar.update)
                    written += writer.write(beside / file.name)
                for of in written:
                    of.result()
            effect, difference = check(beside) if check else (None, None)
    except OSError as error:
        raise FileError(f"{output}: cannot be written ({error}); choose another place.") from error
    layers = {change.path for changes in plan.values() for change in changes}
    return Merged(layers=len(layers), effect=effect, difference=difference)


def _plan(
    base: TensorFiles, sources: Sequence[AdapterOnDisk], model: Path, adapters: Sequence[Path]
) -> dict[str, list[Change]]:
    """Name of the model's tensor -> what changes it; all of it checked."""
    problems, plan = Problems(FileError), dict[str, list[Change]]()
    config = checkpoint.read_json(model / "config.json")
    tied = config.get("tie_word_embeddings", "lm_head.weight" not in base.shapes)
    for source, adapter in zip(sources, adapters, strict=True):
        if source.spec.layer_replication:
            problems.add(
                str(adapter), "is of a model whose layers are repeated, and each has one weight; keep it unmerged."
            )
        left = starts.start_of(source.spec.init_lora_weights).base
        if left != starts.KEPT:
            problems.add(
                str(adapter), f"began with {source.spec.init_lora_weights!r}, and completes a base that {LEFT[left]}."
            )
        for path, spec in source.specs.items():
            if variants.TABLE[spec.variant].gated:
                problems.add(
                    str(adapter), f"{path} is of variant {spec.variant}, for some tokens only; keep it unmerged."
                )
            if variants.TABLE[spec.variant].lacks is not None:
                problems.add(
                    str(adapter),
                    f"{path} is of variant {spec.variant}, over a truncated base, which no block of rows tells; wrap "
                    f"the model, load the adapter, and write what lora_fn.merge gives.",
                )
            if spec.kind == "conv2d":
                problems.add(str(adapter), f"{path} is a convolution, which files are not merged of; merge the model.")
                continue
            if tied and _is_tied(source):
                if path == "lm_head":  # follows the embedding
                    continue
            elif tied and (spec.kind == "embedding" or path == "lm_head"):
                problems.add(
                    str(model),
                    f"{path} shares its weight with another layer, which would change too; untie them first.",
                )
            if spec.raw:
                _plan_raw(plan, source, path, base, problems, model, config.get("model_type"))
                continue
            for name in ("weight", "bias") if spec.lora_bias else ("weight",):
                full = f"{path}.{name}"
                expected = sharding.canonical_shape(spec, name)
                if full not in base.shapes:
                    problems.add(
                        str(model), f"has no {full!r}, which {adapter} adapts; give the model it was made for."
                    )
                elif base.shapes[full] != expected:
                    problems.add(
                        str(model), f"{full!r} has shape {list(base.shapes[full])}, {adapter} expects {list(expected)}."
                    )
                elif base.dtypes[full] not in FLOATS:
                    problems.add(
                        str(model),
                        f"{full!r} is {base.dtypes[full]}, expected one of {', '.join(FLOATS)}; dequantize it.",
                    )
                plan.setdefault(full, []).append(Change(source=source, path=path, parameter=name))
        _plan_replaced(base, source, model, adapter, plan, problems, tied=tied)
    for full, changes in plan.items():
        if len(changes) > 1 and any(change.source.specs[change.path].variant == "dora" for change in changes):
            problems.add(
                str(model),
                f"{full!r} is adapted by {len(changes)} adapters, one of them with DoRA; merge that one alone.",
            )
    problems.raise_if_any()
    for source, adapter in zip(sources, adapters, strict=True):
        for full in source.base_weights:
            if not _same(base, full, source):
                problems.add(
                    str(adapter), f"carries a {full!r} that is not this model's; use the model it was made for."
                )
    problems.raise_if_any()
    return plan


def _is_tied(source: AdapterOnDisk) -> bool:
    """Whether an adapter adds the same to the input and the output embedding."""
    inputs = [path for path, spec in source.specs.items() if spec.kind == "embedding"]
    if not source.spec.ensure_weight_tying or len(inputs) != 1 or "lm_head" not in source.specs:
        return False
    ours, theirs = source.factors(inputs[0]), source.factors("lm_head")
    same = torch.equal(ours["lora_A"], theirs["lora_B"].T) and torch.equal(ours["lora_B"], theirs["lora_A"].T)
    return same and source.specs[inputs[0]].scaling == source.specs["lm_head"].scaling


def _plan_replaced(
    base: TensorFiles,
    source: AdapterOnDisk,
    model: Path,
    adapter: Path,
    plan: dict[str, list[Change]],
    problems: Problems,
    *,
    tied: bool,
) -> None:
    """Add what an adapter trained in the place of the model's own tensors, or of rows of them."""
    output, found = "lm_head.weight", source.replaced
    inputs = [name for name in found if name.endswith(("embed_tokens.weight", "wte.weight"))]
    if tied and (output in found or inputs):
        if output in found and inputs and _equal(source.files, found[output], found[inputs[0]]):
            found = {name: key for name, key in found.items() if name != output or output in base.shapes}
        else:
            problems.add(
                str(model), f"{[*inputs, output][0]} is shared by layers of which {adapter} trained one; untie them."
            )
            return
    for parameter, tensors in (("replaced", found), ("tokens", source.tokens)):
        for full, key in tensors.items():
            shape, mine = source.files.shapes[key], base.shapes.get(full)
            rows = source.rows(full)
            if mine is None:
                problems.add(str(model), f"has no {full!r}, which {adapter} trained; give the model it was made for.")
            elif base.dtypes[full] not in FLOATS:
                problems.add(str(model), f"{full!r} is {base.dtypes[full]}, expected one of {', '.join(FLOATS)}.")
            elif (shape != mine) if parameter == "replaced" else (shape != (len(rows), *mine[1:])):
                problems.add(str(model), f"{full!r} has shape {list(mine)}, {adapter} has {list(shape)} for it.")
            elif parameter == "tokens" and not all(0 <= row < mine[0] for row in rows):
                problems.add(str(adapter), f"trained rows {list(rows)} of {full!r}, which has {mine[0]}.")
            elif any(change.parameter in ("replaced", "tokens") for change in plan.get(full, ())):
                problems.add(str(adapter), f"replaces {full!r}, as an adapter before it does; merge one of them.")
            plan.setdefault(full, []).append(Change(source=source, path=full.rpartition(".")[0], parameter=parameter))


def _equal(files: TensorFiles, one: str, other: str) -> bool:
    """Whether two tensors are the same, read by blocks."""
    if files.shapes[one] != files.shapes[other]:
        return False
    reads = (
        (files.read(one, start=a, stop=b), files.read(other, start=a, stop=b)) for a, b in blocks(files.shapes[one])
    )
    return all(torch.equal(*both) for both in reads)


def _plan_raw(
    plan: dict[str, list[Change]],
    source: AdapterOnDisk,
    path: str,
    base: TensorFiles,
    problems: Problems,
    model: Path,
    model_type: str | None,
) -> None:
    """Add what changes because of a raw parameter's adapter."""
    spec = source.specs[path]
    name = peft_format.adapted_paths(path, spec)[""]
    found = experts.pieces(name, spec.num_experts or 1, base.shapes)
    if not found:
        problems.add(str(model), f"has no {name!r} in a form that we know, which is adapted; give the adapter's model.")
    for piece in found:
        whole = sharding.canonical_shape(spec, "weight")
        expected = whole if piece.expert is None else (spec.out_features // piece.parts, spec.in_features)
        shape = base.shapes.get(piece.key)
        if shape is not None and piece.expert is None and spec.kind == "experts":
            turned = sharding.canonical_shape(replace(spec, fan_in_fan_out=True), "weight")
            is_turned = shape == turned and (shape != whole or model_type in experts.TRANSPOSED)
            expected = turned if is_turned else whole
            parameter = "turned" if is_turned else "weight"
        else:
            parameter = "weight"
        if shape != expected:
            problems.add(str(model), f"{piece.key!r} has shape {shape}, the adapter of {name} expects {expected}.")
        elif base.dtypes[piece.key] not in FLOATS:
            problems.add(
                str(model),
                f"{piece.key!r} is {base.dtypes[piece.key]}, expected one of {', '.join(FLOATS)}; dequantize it.",
            )
        change = Change(source=source, path=path, parameter=parameter, piece=piece)
        plan.setdefault(piece.key, []).append(change)


def _same(base: TensorFiles, full: str, source: AdapterOnDisk) -> bool:
    """Whether a base weight that an adapter carries is the model's own, in the model's dtype."""
    key = source.base_weights[full]
    if full not in base.shapes and _is_tied(source):
        full = next(f"{path}.weight" for path, spec in source.specs.items() if spec.kind == "embedding")
    if source.files.shapes[key] != base.shapes.get(full):
        return False
    for start, stop in blocks(base.shapes[full]):
        ours, theirs = base.read(full, start=start, stop=stop), source.files.read(key, start=start, stop=stop)
        if not torch.equal(ours, theirs.to(ours.dtype)):
            return False
    return True


def blocks(shape: Sequence[int]) -> Iterator[tuple[int, int]]:
    """The rows (start, stop) that are in memory together, of a tensor seen as a matrix (`checkpoint.as_matrix`)."""
    num, columns = checkpoint.as_matrix(shape)
    rows = max(MIN_ROWS, BLOCK // max(1, columns))
    for start in range(0, num, rows):
        yield start, min(num, start + rows)


def rounded_once(wide: Tensor, dtype: torch.dtype) -> Tensor:
    """float64 to another dtype, to the nearest. (torch goes by way of fp32: two roundings, for the 16-bit dtypes.)

    Example:
        >>> between = torch.tensor([1 + 2**-8 + 2**-40], dtype=torch.float64)
        >>> float(between.bfloat16()), float(rounded_once(between, torch.bfloat16))
        (1.0, 1.0078125)
    """
    if dtype not in _BELOW_HALF:
        return wide.to(dtype)
    near, wide = wide.float().reshape(-1), wide.reshape(-1)
    halfway = _places((near.view(torch.int32) & _BELOW_HALF[dtype]).eq_(0).bool())  # much faster than == 0
    exact, found = wide[halfway], near[halfway]
    beyond = torch.nextafter(found, torch.where(exact > found, math.inf, -math.inf).float())
    near[halfway] = torch.where(exact == found, found, beyond)
    return near.to(dtype)


def _places(mask: Tensor) -> Tensor:
    """`nonzero` of bool [n], eight at a time: few are set."""
    whole = len(mask) // 8 * 8
    eights = mask[:whole].view(torch.int64).nonzero()
    near = torch.cat([(eights * 8 + torch.arange(8)).reshape(-1), torch.arange(whole, len(mask))])
    return near[mask[near]]


def _copy_others(model: Path, beside: Path, base: TensorFiles, dtype: str | None) -> None:
    """Config, tokenizer, index: what lies beside the weights."""
    for file in sorted(model.iterdir()):
        if file.is_file() and (file.name == checkpoint.INDEX or not file.name.endswith(LEFT_OUT)):
            shutil.copyfile(file, beside / file.name)
    if dtype is None:
        return
    checkpoint.write_json(beside / "config.json", _with_dtype(checkpoint.read_json(model / "config.json"), dtype))
    if (beside / checkpoint.INDEX).is_file():
        index = checkpoint.read_json(beside / checkpoint.INDEX)
        if isinstance(index.get("metadata"), dict):
            total = sum(_size(entry, dtype) for h in base.headers.values() for entry in h.entries.values())
            checkpoint.write_json(
                beside / checkpoint.INDEX, index | {"metadata": index["metadata"] | {"total_size": total}}
            )


def _with_dtype(config: Any, dtype: str) -> Any:
    """A config, and those within it, that tells of another dtype where it tells of one."""
    if not isinstance(config, dict):
        return config
    return {
        key: dtype if key in ("dtype", "torch_dtype") and value is not None else _with_dtype(value, dtype)
        for key, value in config.items()
    }


def _written(entry: Entry, dtype: str | None) -> str:
    """safetensors' name of the dtype that a tensor is written in."""
    return DTYPES[dtype] if dtype and entry.dtype in FLOATS else entry.dtype


def _size(entry: Entry, dtype: str | None) -> int:
    """The bytes of a tensor as it is written."""
    return (
        (entry.stop - entry.start) * checkpoint.DTYPES[_written(entry, dtype)][1] // checkpoint.DTYPES[entry.dtype][1]
    )


class _Product(NamedTuple):
    """An update of some rows of a tensor seen as a matrix: [rows, rank], in the adapters' dtype, times [rank, columns],
    in float64, with the scaling; `first` is the first of the rows."""

    first: int
    left: Tensor
    right: Tensor


class _Workers(NamedTuple):
    """Threads that compute a block each, and memory for as many blocks: uint8 for what is read, float64 to compute."""

    pool: ThreadPoolExecutor
    memory: SimpleQueue[tuple[Tensor, Tensor]]
    num: int


@contextmanager
def _workers(base: TensorFiles) -> Iterator[_Workers]:
    """A thread per core, up to `MAX_WORKERS`, whose operators stay on it: short ones on many cores mostly wait."""
    threads = torch.get_num_threads()
    num = min(MAX_WORKERS, threads)
    torch.empty(KEPT, dtype=torch.uint8)  # given back at once: from then on, glibc keeps what blocks give back
    shapes = [entry.shape for h in base.headers.values() for entry in h.entries.values() if entry.dtype in FLOATS]
    size = max((checkpoint.as_matrix(of)[1] * (stop - start) for of in shapes for start, stop in blocks(of)), default=0)
    memory: SimpleQueue[tuple[Tensor, Tensor]] = SimpleQueue()
    for _ in range(num):
        memory.put((torch.empty(8 * size, dtype=torch.uint8), torch.empty(size, dtype=torch.float64)))
    try:
        with ThreadPoolExecutor(num, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            yield _Workers(pool, memory, num)
    finally:
        torch.set_num_threads(threads)


class _Writer:
    """One file of the output.

    Args:
        base: The model's files.
        file: One of them.
        plan: What changes.
        output: The place, for messages.
        dtype: Of the output.
        workers: Threads that compute.
        disk: A thread that waits for the disk.
        tell: Called with the number of bytes of the model that are done.
    """

    def __init__(
        self,
        base: TensorFiles,
        file: Path,
        plan: Mapping[str, Sequence[Change]],
        output: Path,
        *,
        dtype: str | None,
        workers: _Workers,
        disk: ThreadPoolExecutor,
        tell: Callable[[int], Any],
    ):
        self.base, self.file, self.header, self.output = base, file, base.headers[file], output
        self.plan, self.dtype, self.workers, self.disk, self.tell = plan, dtype, workers, disk, tell
        self.handle, self.since = -1, 0
        self.computing: deque[Future[tuple[int, int]]] = deque()
        self.flushing: list[Future[None]] = []

    def write(self, place: Path) -> list[Future[None]]:
        """Write the file; what is returned is done when it is on the disk."""
        header = b"" if self.dtype is None else self._new_header()
        at = len(header) or self.header.size
        self.handle = os.open(place, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        try:
            data = sum(_size(entry, self.dtype) for entry in self.header.entries.values())
            os.posix_fallocate(self.handle, 0, at + data)  # a full disk is told of now
            if header:
                _put(self.handle, memoryview(header), 0)
            else:
                self._copy(0, at, at=0)
            begun = done = self.header.size
            for name, entry in sorted(self.header.entries.items(), key=lambda item: (item[1].start, item[1].stop)):
                if name in self.plan or _written(entry, self.dtype) != entry.dtype:
                    self._copy(begun, done, at=at)
                    at += done - begun
                    self._compute(name, entry, at=at)
                    at += _size(entry, self.dtype)
                    begun = entry.stop
                done = entry.stop
            self._copy(begun, done, at=at)
            self._collect(0)
        finally:
            wait(self.computing)
            self.flushing.append(self.disk.submit(_finish, self.handle))
        return self.flushing

    def _new_header(self) -> bytes:
        """The header with the dtypes, and so the places, of the output."""
        content: dict[str, Any] = {"__metadata__": dict(self.header.metadata)} if self.header.metadata else {}
        start, places = 0, {}
        for name, entry in sorted(self.header.entries.items(), key=lambda item: (item[1].start, item[1].stop)):
            places[name] = [start, start + _size(entry, self.dtype)]
            start = places[name][1]
        for name, entry in self.header.entries.items():
            told = {"dtype": _written(entry, self.dtype), "shape": list(entry.shape), "data_offsets": places[name]}
            content[name] = told
        text = json.dumps(content, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text

    def _copy(self, start: int, stop: int, *, at: int) -> None:
        """Bytes that stay as they are, to a place of the output."""
        while start < stop:
            end = min(stop, start + FLUSH)
            os.lseek(self.handle, at, os.SEEK_SET)
            self.base.copy_bytes(self.file, start, end, self.handle)
            self._count(max(0, end - max(start, self.header.size)), end - start)
            start, at = end, at + end - start

    def _compute(self, name: str, entry: Entry, *, at: int) -> None:
        """Blocks of rows that change, or that are written in another dtype, to a place of the output."""
        dtype: torch.dtype = getattr(torch, checkpoint.DTYPES[_written(entry, self.dtype)][0] or "")
        changes = self.plan.get(name, ())
        update = _update([change for change in changes if change.parameter not in ("replaced", "tokens")])
        put = next((_put_rows(change, name) for change in changes if change.parameter in ("replaced", "tokens")), None)
        if update and update.magnitude is not None and update.outputs_last:
            update = self._measured(update, name, entry)
        row = _size(entry, self.dtype) // max(1, checkpoint.as_matrix(entry.shape)[0])
        for start, stop in blocks(entry.shape):
            self._collect(2 * self.workers.num)
            self.computing.append(
                self.workers.pool.submit(self._block, name, start, stop, update, put, dtype=dtype, at=at + start * row)
            )

    def _measured(self, update: _Update, name: str, entry: Entry) -> _Update:
        """An update with the norms of the columns, which no block of rows knows."""
        squares = torch.zeros(checkpoint.as_matrix(entry.shape)[1], dtype=torch.float64)
        for start, stop in blocks(entry.shape):
            rows = self.base.read(name, start=start, stop=stop).double()
            update.add_to(rows, start, stop)
            squares += rows.square().sum(0)
        return replace(update, norms=squares.sqrt())

    def _block(
        self,
        name: str,
        start: int,
        stop: int,
        update: _Update | None,
        put: Callable[[Tensor, int], None] | None,
        *,
        dtype: torch.dtype,
        at: int,
    ) -> tuple[int, int]:
        """Compute and write rows; the bytes read and written."""
        raw, wide = self.workers.memory.get()
        try:
            rows = self.base.read_rows(name, start, stop, buffer=raw)
            exact = wide[: rows.numel()].view(rows.shape).copy_(rows)
            if put:
                put(exact, start)
            if update:
                update.add_to(exact, start, stop)
                gain = update.gain(exact, start, stop)
                exact = exact if gain is None else exact.mul_(gain)
            found = rounded_once(exact, dtype)
            ends = torch.stack(torch.aminmax(found)) if found.numel() else found
            if not torch.isfinite(ends).all() and (update or put or torch.isfinite(rows).all()):
                raise FileError(f"{self.output}: {name!r} would not be finite in {dtype}; nothing was written.")
            _put(self.handle, checkpoint.as_bytes(found), at)
            return rows.numel() * rows.element_size(), found.numel() * found.element_size()
        finally:
            self.workers.memory.put((raw, wide))

    def _collect(self, num: int) -> None:
        """Wait until no more than `num` blocks are being computed."""
        while len(self.computing) > num:
            self._count(*self.computing.popleft().result())

    def _count(self, read: int, written: int) -> None:
        """Tell of what is done, and have the disk begin before the file is complete."""
        self.tell(read)
        self.since += written
        if self.since >= FLUSH and all(flushing.done() for flushing in self.flushing):
            self.flushing.append(self.disk.submit(os.fdatasync, self.handle))
            self.since = 0


def _put(handle: int, content: memoryview, at: int) -> None:
    while len(content):
        num = os.pwrite(handle, content, at)
        content, at = content[num:], at + num


def _finish(handle: int) -> None:
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _put_rows(change: Change, name: str) -> Callable[[Tensor, int], None]:
    """What puts an adapter's own rows into a block [rows, columns] of a tensor which begins at some row."""
    files = change.source.files
    if change.parameter == "replaced":
        key = change.source.replaced[name]
        return functools.partial(_put_block, files, key)
    rows, found = change.source.rows(name), files.read(change.source.tokens[name]).double()

    def put(block: Tensor, start: int) -> None:
        for number, row in enumerate(rows):
            if start <= row < start + len(block):
                block[row - start] = found[number]

    return put


def _put_block(files: TensorFiles, key: str, block: Tensor, start: int) -> None:
    num = block.numel() // checkpoint.as_matrix(files.shapes[key])[1]
    buffer = torch.empty(8 * block.numel(), dtype=torch.uint8)
    block.copy_(files.read_rows(key, start, start + num, buffer=buffer).view_as(block))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Update:
    """What becomes of a tensor seen as a matrix, in its own orientation.

    Args:
        products: What is added.
        magnitude: float64 [outputs], the norms that the outputs are to have then (DoRA); None for those that they have.
        outputs_last: Whether the outputs are the columns.
        norms: Those of the columns, where they are needed.
    """

    products: Sequence[_Product]
    magnitude: Tensor | None = None
    outputs_last: bool = False
    norms: Tensor | None = None

    def add_to(self, exact: Tensor, start: int, stop: int) -> None:
        """Add the products' rows to a float64 block."""
        for first, left, right in self.products:
            begin, end = max(start, first), min(stop, first + len(left))
            if begin < end:
                exact[begin - start : end - start].addmm_(left[begin - first : end - first].double(), right)

    def gain(self, exact: Tensor, start: int, stop: int) -> Tensor | None:
        """What the block is to be multiplied with then."""
        if self.magnitude is None:
            return None
        norms = exact.norm(dim=1) if self.norms is None else self.norms
        norms = torch.where(norms > 0, norms, 1.0)
        return self.magnitude / norms if self.outputs_last else (self.magnitude[start:stop] / norms)[:, None]


def _update(changes: Sequence[Change]) -> _Update | None:
    """What factors change of one tensor; None where nothing does."""
    if not changes:
        return None
    lefts, rights, products = [], [], list[_Product]()
    magnitude, outputs_last = None, False
    for change in changes:
        if change.piece is not None:
            products += _raw_products(change)
            continue
        spec, factors = change.source.specs[change.path], change.source.factors(change.path)
        if change.parameter == "bias":
            left, right = factors["lora_B_bias"][:, None], torch.ones(1, 1)
        else:
            plain = variants.TABLE[spec.variant].plain(factors, spec, whole=True)
            left, right = plain["lora_B"], plain["lora_A"]
            outputs_last = spec.kind == "embedding" or spec.fan_in_fan_out
            if outputs_last:
                left, right = right.T, left.T
            if spec.variant == "dora":
                magnitude = factors["lora_magnitude_vector"].double()
        lefts.append(left)
        rights.append(right.double() * spec.scaling)
    if lefts:
        products.append(_Product(0, torch.cat(lefts, 1), torch.cat(rights)))
    return _Update(products=products, magnitude=magnitude, outputs_last=outputs_last)


def _raw_products(change: Change) -> list[_Product]:
    """What is added to a piece of a raw parameter: of each of its experts."""
    spec, factors, piece = change.source.specs[change.path], change.source.factors(change.path), change.piece
    assert piece is not None
    ups, downs = (f if f.dim() == 3 else f[None] for f in (factors["lora_B"], factors["lora_A"]))
    products = []
    for place, expert in enumerate(range(len(ups)) if piece.expert is None else [piece.expert]):
        left, right = ups[expert].chunk(piece.parts)[piece.part], downs[expert]
        if change.parameter == "turned":
            left, right = right.T, left.T
        products.append(_Product(place * len(left), left, right.double() * spec.scaling))
    return products


def _verifier(
    model: Path, base: TensorFiles, sources: Sequence[AdapterOnDisk], prompt: str
) -> Callable[[Path], tuple[float, float]]:
    """Everything that verifying needs, checked before anything is written; call it with the merged model's place."""
    needed = 4 * sum(math.prod(shape) for shape in base.shapes.values())
    free = _free_memory()
    if needed * 1.2 > free:
        raise FileError(
            f"{model}: takes {needed / 1e9:.1f} GB in fp32 and {free / 1e9:.1f} GB of memory are free; "
            f"leave --verify out."
        )
    try:
        from transformers import AutoTokenizer

        ids = AutoTokenizer.from_pretrained(model, local_files_only=True)(prompt, return_tensors="pt")["input_ids"]
    except Exception as error:  # whatever its parts raise
        found = " ".join(str(error).split())
        raise FileError(f"{model}: has no tokenizer that transformers takes ({found}); leave --verify out.") from error
    if not ids.numel():
        raise FileError(f"{model}: its tokenizer makes no tokens of {prompt!r}; give a longer --verify.")

    def check(merged: Path) -> tuple[float, float]:
        plain, tuned = _logits(model, ids, sources)
        (found,) = _logits(merged, ids, [])[:1]
        effect, difference = _relative(tuned, plain), _relative(found, tuned)
        if not math.isfinite(difference):
            raise FileError(f"{model}: the logits of {prompt!r} are not finite once merged; nothing was written.")
        return effect, difference

    return check


def _free_memory() -> int:
    """Bytes that a process can have, by Linux's count (which takes cached files for free), else what is unused."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration, ValueError):
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


def _logits(directory: Path, ids: Tensor, sources: Sequence[AdapterOnDisk]) -> tuple[Tensor, Tensor]:
    """The logits of a stock model in fp32: as it is, and with adapters computed beside its layers."""
    from transformers import AutoModelForCausalLM

    stock = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, local_files_only=True).eval()
    with torch.no_grad():
        plain = stock(ids).logits
        for source in sources:
            for name in [*source.replaced, *source.tokens]:
                part = "replaced" if name in source.replaced else "tokens"
                own = stock.get_parameter(name).data
                _put_rows(Change(source=source, path=name, parameter=part), name)(own, 0)
            for path, spec in source.specs.items():
                if spec.raw:
                    _add_raw(stock, path, spec, source.factors(path))
                    continue
                try:
                    layer = stock.get_submodule(path)
                except AttributeError as error:
                    raise FileError(f"{directory}: transformers has no {path} in it; leave --verify out.") from error
                layer.register_forward_hook(_beside(source, path))
        return plain, stock(ids).logits if sources else plain


def _add_raw(stock: Any, path: str, spec: LayerSpec, factors: Mapping[str, Tensor]) -> None:
    """Update a raw parameter of a stock model."""
    name = peft_format.adapted_paths(path, spec)[""]
    owner, _, own = name.rpartition(".")
    transposed = raw.base_spec(stock.get_submodule(owner), own).fan_in_fan_out
    stock.get_parameter(name).add_(lora_fn.delta(factors, replace(spec, fan_in_fan_out=transposed)))


def _beside(source: AdapterOnDisk, path: str) -> Callable[[Any, Any, Tensor], Tensor]:
    """A hook that makes what a layer returns that of the layer with its adapter."""
    spec, factors = source.specs[path], {name: f.float() for name, f in source.factors(path).items()}
    a, b = factors["lora_A"], factors["lora_B"]

    def hook(module: Any, inputs: Any, output: Tensor) -> Tensor:
        if spec.variant != "lora":
            base = {name: p for name, p in module.named_parameters() if name in ("weight", "bias")}
            return lora_fn.apply(base | factors, inputs[0], replace(spec, bias="bias" in base))
        hidden = a.T[inputs[0]] if spec.kind == "embedding" else inputs[0] @ a.T
        return output + spec.scaling * (hidden @ b.T + factors.get("lora_B_bias", 0.0))

    return hook
