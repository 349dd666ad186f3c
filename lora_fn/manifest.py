"""What belongs to a sharded checkpoint, and is it whole? Its manifest, and its files read against it.

    manifest.json            the mesh, the adapter, every layer and how it lies, the step, size and hash of each file
    tp-I-pp-J.safetensors    what process I of the axis "tp" holds of the layers of pipeline stage J

A tensor is called KIND/PATH.PARAMETER. Kinds are "factor" and, in a training checkpoint, the optimizer's moments. What
two checkpoints have in common are PEFT's names and canonical tensors: paths and parameters may differ, for a model can
be built with fused layers or without, at another size of the axis.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lora_fn import checkpoint, peft_format, sharding
from lora_fn.errors import FileError, Problems, SpecError
from lora_fn.layout import same_bits
from lora_fn.reshard import shard, unshard
from lora_fn.spec import LayerSpec

FORMAT = 2
NAME = "manifest.json"
FACTOR = "factor"
MOMENTS = ("exp_avg", "exp_avg_sq")
PIECE = 1 << 22  # bytes that are hashed at once
HASHERS = 4  # threads
SMALL = 1 << 16  # bytes that are not worth one
GO_BACK = "use a whole copy of it, or the checkpoint before."
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
DECODER_LAYER = re.compile(r"\.(\d+)\.")


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredFile:
    """One file, as it was written: its SHA-256 in hexadecimal, and its size in bytes."""

    sha256: str
    size: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """What a sharded checkpoint is made of.

    Args:
        config: The adapter, as adapter_config.json has it.
        specs: {path: LayerSpec} of its layers, in the model that wrote it.
        tp: Processes along the axis.
        stages: The paths that each pipeline stage holds.
        num_layers: Decoder layers of the model; None where nobody knows.
        kinds: Of the tensors: "factor", and "exp_avg", "exp_avg_sq" of a training checkpoint.
        step: Optimizer steps done; None for an adapter alone.
        facts: What a run must find again, by name.
        files: By name.

    Raises:
        SpecError: Layers of another axis, or stages that do not hold every layer once.
    """

    config: Mapping[str, Any]
    specs: Mapping[str, LayerSpec]
    tp: int
    stages: tuple[tuple[str, ...], ...]
    num_layers: int | None = None
    kinds: tuple[str, ...] = (FACTOR,)
    step: int | None = None
    facts: Mapping[str, str] = field(default_factory=dict)
    files: Mapping[str, StoredFile] = field(default_factory=dict)

    def __post_init__(self) -> None:
        problems = Problems(SpecError)
        for name in ("step", "num_layers"):
            if not isinstance(getattr(self, name), int | None):
                problems.add(name, f"is {getattr(self, name)!r}, expected an integer, or None.")
        if not self.specs:
            problems.add("layers", "are none, expected at least one.")
        for path, spec in self.specs.items():
            if spec.axis.size not in (1, self.tp):
                problems.add(path, f"lies over {spec.axis.size} processes, expected {self.tp}.")
            if not sharding.adapter_names(spec):
                problems.add(path, "has no adapter, expected adapted layers only.")
        held = [path for stage in self.stages for path in stage]
        if sorted(held) != sorted(self.specs):
            problems.add("stages", f"hold {len(held)} layers, expected each of the {len(self.specs)} layers once.")
        if FACTOR not in self.kinds or not set(self.kinds) <= {FACTOR, *MOMENTS}:
            problems.add("kinds", f"are {list(self.kinds)}, expected {FACTOR!r} and some of {list(MOMENTS)}.")
        problems.raise_if_any()

    @property
    def pp(self) -> int:
        """How many pipeline stages."""
        return len(self.stages)

    def tensors(self, stage: int) -> dict[str, tuple[int, ...]]:
        """Name -> shape of what each file of a stage holds."""
        return {
            tensor_name(kind, path, name): sharding.local_shape(self.specs[path], name)
            for kind in self.kinds
            for path in self.stages[stage]
            for name in sharding.adapter_names(self.specs[path])
        }

    def to_json(self) -> str:
        """The manifest as JSON, sealed with a hash of its own."""
        return _sealed(
            {
                "format": FORMAT,
                "mesh": {"tp": self.tp, "pp": self.pp},
                "adapter": dict(self.config),
                "layers": {path: json.loads(spec.to_json()) for path, spec in self.specs.items()},
                "layouts": _layouts(self.specs),
                "stages": [list(stage) for stage in self.stages],
                "num_layers": self.num_layers,
                "kinds": list(self.kinds),
                "step": self.step,
                "facts": dict(self.facts),
                "files": {name: asdict(file) for name, file in self.files.items()},
            }
        )


def _sealed(value: Mapping[str, Any]) -> str:
    digest = hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
    return json.dumps({**value, "sha256": digest}, indent=2, sort_keys=True)


def _layouts(specs: Mapping[str, LayerSpec]) -> dict[str, dict[str, Any]]:
    """{path: {parameter: layout}} of the parameters that are cut."""
    found: dict[str, dict[str, Any]] = {}
    for path, spec in specs.items():
        for name in sharding.adapter_names(spec):
            layout = sharding.layout(spec, name)
            if layout is not None:
                found.setdefault(path, {})[name] = json.loads(layout.to_json())
    return found


def file_name(tp: int, pp: int) -> str:
    """The name of the file of a process: its place on the axis, and its pipeline stage."""
    return f"tp-{tp:05d}-pp-{pp:05d}.safetensors"


def tensor_name(kind: str, path: str, name: str) -> str:
    """The name of a tensor in the files."""
    return f"{kind}/{path}.{name}"


def stages(specs: Mapping[str, LayerSpec], pp: int, *, num_layers: int | None = None) -> tuple[tuple[str, ...], ...]:
    """The layers of each pipeline stage: decoder layers cut evenly (the first stages get one more), embeddings in the
    first stage, all else in the last.

    Args:
        specs: {path: LayerSpec}.
        pp: How many stages.
        num_layers: Decoder layers of the model; None to take the last adapted one for the last.

    Raises:
        SpecError: More stages than decoder layers.
    """
    numbers = {path: int(found[1]) for path in specs if (found := DECODER_LAYER.search(path))}
    num = num_layers if num_layers is not None else max(numbers.values(), default=0) + 1
    if not 1 <= pp <= num:
        raise SpecError(f"pp: is {pp}, expected 1 to {num}, the number of decoder layers.")
    if any(number >= num for number in numbers.values()):
        raise SpecError(f"pp: the adapter has layer {max(numbers.values())}, but the model has {num} decoder layers.")
    each, more = divmod(num, pp)
    firsts = [stage * each + min(stage, more) for stage in range(1, pp)]
    held: list[list[str]] = [[] for _ in range(pp)]
    for path, spec in specs.items():
        outside = 0 if spec.kind == "embedding" else pp - 1
        held[sum(numbers[path] >= first for first in firsts) if path in numbers else outside].append(path)
    return tuple(map(tuple, held))


def resized(spec: LayerSpec, size: int, *, before: int) -> LayerSpec:
    """The same layer over another number of processes; what lay whole on each of several stays so.

    Raises:
        SpecError: A size that does not fit the layer.
    """
    if spec.axis.size != before or (spec.kind == "linear" and before == 1):
        return spec
    return replace(spec, axis=replace(spec.axis.unbound, size=size))


# ------------------------------------------------------------------------------------------------------- PEFT's names


def shapes_on_disk(specs: Mapping[str, LayerSpec]) -> dict[str, tuple[int, ...]]:
    """PEFT's name -> canonical shape, of all layers: what is the same at every size of the axis."""
    return {
        key: sharding.canonical_shape(spec, name)
        for path, spec in specs.items()
        for key, name in peft_format.tensor_names(path, spec).items()
    }


def join(locals_: Sequence[Mapping[str, Tensor]], spec: LayerSpec) -> dict[str, Tensor]:
    """The canonical tensors of one layer, out of what every process holds; also of one that each holds whole.

    Raises:
        SpecError: As `lora_fn.unshard`.
    """
    whole = replace(spec, axis=replace(spec.axis, size=1, index=None, group=None, groups=None))
    if spec.axis.size > 1 or len(locals_) == 1:
        return unshard(locals_, spec)
    for other in locals_[1:]:
        for name, t in other.items():
            if not same_bits(t, locals_[0][name]):
                raise SpecError(f"the copies of {name!r} differ between processes; call sync_gradients.")
    return unshard(locals_[:1], whole)


# ------------------------------------------------------------------------------------------------------------- writing


def write_part(
    directory: Path, manifest: Manifest, tp: int, pp: int, tensors: Mapping[str, Tensor]
) -> tuple[str, StoredFile]:
    """Write the file of one process.

    Args:
        directory: Of the checkpoint.
        manifest: What it will be.
        tp, pp: The process.
        tensors: Name -> local tensor.

    Returns:
        The file's name, and what the manifest says of it.
    """
    file = directory / file_name(tp, pp)
    checkpoint.write_tensors(file, tensors, _metadata(manifest, tp, pp))
    with open(file, "rb") as content:
        digest = hashlib.sha256()
        while piece := content.read(PIECE):
            digest.update(piece)
        return file.name, StoredFile(sha256=digest.hexdigest(), size=content.tell())


def _metadata(manifest: Manifest, tp: int, pp: int) -> dict[str, str]:
    return {"step": str(manifest.step), "process": f"tp {tp} of {manifest.tp}, pp {pp} of {manifest.pp}"}


def write(directory: Path, manifest: Manifest) -> None:
    """Write the manifest itself, when all of its files are there."""
    with checkpoint.replacing(directory / NAME) as beside:
        beside.write_text(manifest.to_json(), encoding="utf-8")


# ------------------------------------------------------------------------------------------------------------- reading


def read(directory: Path) -> Manifest:
    """The manifest of a checkpoint, held against the files that are there (their content is not read).

    Raises:
        FileError: No manifest, another format, one that was changed or that contradicts itself; missing files, files
            that it does not name, and files of another size, all of them at once.
    """
    if not directory.is_dir():
        raise FileError(f"{directory}: no such directory; give the directory of a sharded checkpoint.")
    file = directory / NAME
    if not file.is_file():
        raise FileError(f"{directory}: has no {NAME}, or is of an earlier version; {GO_BACK}")
    manifest = _parsed(checkpoint.read_json(file), file)
    problems = Problems(FileError)
    there = {path.name: path for path in directory.iterdir()} if directory.is_dir() else {}
    expected = {file_name(tp, pp) for tp in range(manifest.tp) for pp in range(manifest.pp)}
    if set(manifest.files) != expected:
        odd = sorted(set(manifest.files) ^ expected)[0]
        problems.add(str(file), f"and its mesh do not agree on {odd!r}; {GO_BACK}")
    for name in sorted(expected - set(there)):
        problems.add(str(directory / name), f"no such file, though {NAME} names it; {GO_BACK}")
    for name in sorted(set(there) - expected - {NAME}):
        problems.add(str(directory / name), f"is no part of the checkpoint by its {NAME}; move it away.")
    problems.raise_if_any()
    for name, stored in manifest.files.items():
        size = (directory / name).stat().st_size
        if size != stored.size or not (directory / name).is_file():
            problems.add(str(directory / name), f"has {size} bytes, {NAME} says {stored.size}; {GO_BACK}")
    problems.raise_if_any()
    return manifest


def _parsed(value: Mapping[str, Any], file: Path) -> Manifest:
    if value.get("format") != FORMAT:
        raise FileError(
            f"{file}: has format {value.get('format')!r}, expected {FORMAT}; use the version that wrote it."
        )
    if _sealed({k: v for k, v in value.items() if k != "sha256"}).encode() != file.read_bytes():
        raise FileError(f"{file}: is not what was written (its SHA-256 differs); {GO_BACK}")
    try:
        specs = {path: LayerSpec.from_json(json.dumps(of)) for path, of in value["layers"].items()}
        manifest = Manifest(
            config=dict(value["adapter"]),
            specs=specs,
            tp=value["mesh"]["tp"],
            stages=tuple(tuple(stage) for stage in value["stages"]),
            num_layers=value["num_layers"],
            kinds=tuple(value["kinds"]),
            step=value["step"],
            facts=dict(value["facts"]),
            files={name: StoredFile(**of) for name, of in value["files"].items()},
        )
        agrees = _layouts(specs) == value["layouts"] and manifest.pp == value["mesh"]["pp"]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise FileError(f"{file}: is not a manifest ({error!r}); {GO_BACK}") from error
    if not agrees:
        raise FileError(f"{file}: has layouts or a mesh that its layers do not have; use the version that wrote it.")
    return manifest


class Checkpoint:
    """A sharded checkpoint that is read, file by file in step, each byte once and hashed on the way.

    Nothing that it gives may be used for good before `finish` has found that the hashes are right.

    Args:
        directory: Its place.

    Attributes:
        manifest: What it is made of.
        bytes_read: From the disk so far.

    Raises:
        FileError: As `read`; files of another step or process; missing, unexpected or misshapen tensors.
    """

    def __init__(self, directory: Path):
        self.directory = directory
        self.manifest = read(directory)
        self._files: dict[tuple[int, int], _File] = {}
        self._hashing = ThreadPoolExecutor(HASHERS)
        self._stage = {path: number for number, stage in enumerate(self.manifest.stages) for path in stage}
        problems = Problems(FileError)
        for pp in range(self.manifest.pp):
            expected = self.manifest.tensors(pp)
            for tp in range(self.manifest.tp):
                file = directory / file_name(tp, pp)
                try:
                    self._files[tp, pp] = _File(file, self.manifest, tp, pp, expected, self._hashing)
                except FileError as error:
                    problems.found.append(str(error))
        if problems.found:
            self.close()
        problems.raise_if_any()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the files."""
        self._hashing.shutdown()
        for file in self._files.values():
            file.close()

    @property
    def bytes_read(self) -> int:
        """Bytes read from the disk so far."""
        return sum(file.bytes_read for file in self._files.values())

    def kinds(self) -> list[str]:
        """The kinds of tensors, in the order in which the files have them."""
        return sorted(self.manifest.kinds, key=lambda kind: self._offset(kind, next(iter(self.manifest.specs))))

    def paths(self, kind: str) -> list[str]:
        """The paths of the layers, in the order in which the files have their tensors."""
        return sorted(self.manifest.specs, key=lambda path: (self._stage[path], self._offset(kind, path)))

    def _offset(self, kind: str, path: str) -> int:
        names = sharding.adapter_names(self.manifest.specs[path])
        return min(self._files[0, self._stage[path]].offset(tensor_name(kind, path, name)) for name in names)

    def locals(self, kind: str, path: str) -> list[dict[str, Tensor]]:
        """The tensors of one layer, {parameter: local tensor} per process in order."""
        stage, names = self._stage[path], sharding.adapter_names(self.manifest.specs[path])
        return [
            {name: self._files[tp, stage].read(tensor_name(kind, path, name)) for name in sorted(names)}
            for tp in range(self.manifest.tp)
        ]

    def canonical(self, kind: str, path: str) -> dict[str, Tensor]:
        """The canonical tensors of one layer.

        Raises:
            FileError: Copies that differ between processes, or, where that is why, as `finish`.
        """
        try:
            return join(self.locals(kind, path), self.manifest.specs[path])
        except SpecError as error:
            self.finish()
            raise FileError(f"{self.directory}: {kind} of {path}: {error}") from error

    def finish(self) -> None:
        """Read what is left, and hold the hashes against the manifest.

        Raises:
            FileError: Files that are not what was written, all of them at once.
        """
        problems = Problems(FileError)
        for file in self._files.values():
            file.finish(problems)
        problems.raise_if_any()


class _File:
    """One file of a checkpoint, read from its begin to its end."""

    def __init__(
        self,
        path: Path,
        manifest: Manifest,
        tp: int,
        pp: int,
        expected: Mapping[str, tuple[int, ...]],
        hashing: Executor,
    ):
        self.path, self.bytes_read = path, 0
        self.stored = manifest.files[path.name]
        self._digest, self._at = hashlib.sha256(), 0
        self._handle = open(path, "rb", buffering=0)  # noqa: SIM115  (closed by close)
        self._hashing, self._hashed = hashing, Future[None]()
        self._hashed.set_result(None)
        try:
            self._begin = 8 + int.from_bytes(self._take(8).numpy().data, "little")
            if self._begin > self.stored.size:
                raise ValueError("its header is longer than the file")
            header = json.loads(bytes(self._take(self._begin - 8).numpy().data))
            metadata = header.pop("__metadata__", None)
            self._tensors = {name: self._entry(name, of) for name, of in header.items()}
        except (AttributeError, KeyError, OverflowError, RecursionError, TypeError, ValueError) as error:
            self.close()
            raise FileError(f"{path}: is not a whole safetensors file ({error}); {GO_BACK}") from error
        try:
            self._check(metadata, _metadata(manifest, tp, pp), expected)
        except FileError:
            self.close()
            raise

    def _entry(self, name: str, of: Mapping[str, Any]) -> tuple[torch.dtype, tuple[int, ...], int, int]:
        dtype, shape, (start, stop) = DTYPES.get(of["dtype"]), tuple(of["shape"]), of["data_offsets"]
        if dtype is None:
            raise ValueError(f"tensor {name!r} has dtype {of['dtype']}, expected one of {list(DTYPES)}")
        if (
            stop - start != math.prod(shape) * dtype.itemsize
            or not 0 <= start <= stop <= self.stored.size - self._begin
        ):
            raise ValueError(f"tensor {name!r} of shape {list(shape)} lies at {start} to {stop}")
        return dtype, shape, self._begin + start, self._begin + stop

    def _check(self, metadata: Any, written: Mapping[str, str], expected: Mapping[str, tuple[int, ...]]) -> None:
        found = metadata if isinstance(metadata, dict) else {}
        for name, value in written.items():
            if found.get(name) != value:
                raise FileError(f"{self.path}: is of {name} {found.get(name)}, {NAME} says {name} {value}; {GO_BACK}")
        shapes = {name: shape for name, (_, shape, _, _) in self._tensors.items()}
        if shapes != expected:
            odd = sorted(set(shapes.items()) ^ set(expected.items()))[0][0]
            raise FileError(f"{self.path}: tensor {odd!r} is missing, unexpected or misshapen; {GO_BACK}")

    def offset(self, name: str) -> int:
        """Where a tensor begins."""
        return self._tensors[name][2]

    def read(self, name: str) -> Tensor:
        """A tensor; what lies between the last one and it is hashed and dropped."""
        dtype, shape, start, stop = self._tensors[name]
        while self._at < start:
            self._take(min(PIECE, start - self._at))
        if self._at == start:
            content = self._take(stop - start)
        else:
            content = torch.frombuffer(
                bytearray(os.pread(self._handle.fileno(), stop - start, start)), dtype=torch.uint8
            )
            self.bytes_read += len(content)
        return content.view(dtype).reshape(shape)

    def _take(self, length: int) -> Tensor:
        """The next bytes [length], which a thread hashes meanwhile."""
        content = torch.empty(length, dtype=torch.uint8)
        view, got = content.numpy().data, 0
        while got < length:
            read = self._handle.readinto(view[got:])
            if not read:
                raise FileError(
                    f"{self.path}: ends at byte {self._at + got}, {NAME} says {self.stored.size}; {GO_BACK}"
                )
            got += read
        self._hashed.result()  # one piece of a file at a time, in order
        if length > SMALL:
            self._hashed = self._hashing.submit(self._digest.update, view)
        else:
            self._digest.update(view)
        self._at += length
        self.bytes_read += length
        return content

    def finish(self, problems: Problems) -> None:
        """Hash what is left; note when the whole is not what was written."""
        while self._at < self.stored.size:
            self._take(min(PIECE, self.stored.size - self._at))
        self._hashed.result()
        if self._digest.hexdigest() != self.stored.sha256:
            problems.add(str(self.path), f"is not what was written (its SHA-256 differs); {GO_BACK}")

    def close(self) -> None:
        """Close the file."""
        self._handle.close()


def recut(
    stored: Checkpoint, kind: str, specs: Mapping[str, LayerSpec], index: int, done: Callable[[], object] = lambda: None
) -> dict[str, dict[str, Tensor]]:
    """What one process of a model holds, out of a checkpoint of any mesh and of any fusing of layers.

    Args:
        stored: The checkpoint; one layer of it is in memory at a time.
        kind: Of the tensors.
        specs: {path: LayerSpec} of the model.
        index: The process's place on its axis.
        done: Called after every layer.

    Returns:
        {path: {parameter: local tensor}} of the model.

    Raises:
        FileError: The checkpoint has other tensors than the model, by PEFT's names.
    """
    theirs, ours = shapes_on_disk(stored.manifest.specs), shapes_on_disk(specs)
    if theirs != ours:
        odd = sorted(set(theirs.items()) ^ set(ours.items()))[0][0]
        told = f"{list(theirs[odd])} there" if odd in theirs else "none there", list(ours.get(odd, ("none",)))
        raise FileError(f"{stored.directory}: {odd!r} is {told[0]}, in this model {told[1]}; use the model it is of.")
    names = {path: set(peft_format.tensor_names(path, spec)) for path, spec in specs.items()}
    home = {key: path for path in names for key in names[path]}
    waiting: dict[str, Tensor] = {}
    found: dict[str, dict[str, Tensor]] = {}
    for path in stored.paths(kind):
        named = peft_format.to_state_dict({path: stored.canonical(kind, path)}, stored.manifest.specs)
        waiting |= named
        for mine in dict.fromkeys(home[key] for key in named):
            if names[mine] <= set(waiting):
                spec = specs[mine]
                params = peft_format.from_state_dict({key: waiting.pop(key) for key in names[mine]}, {mine: spec})
                found[mine] = shard(params[mine], spec, index if spec.axis.size > 1 else 0)
        done()
    return found


@contextmanager
def opened(directory: Path) -> Iterator[Checkpoint]:
    """A checkpoint whose hashes are verified when the block ends well.

    Raises:
        FileError: As `Checkpoint` and its `finish`.
    """
    with Checkpoint(directory) as stored:
        yield stored
        stored.finish()
