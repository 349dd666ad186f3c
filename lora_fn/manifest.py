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
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lora_fn import checkpoint, peft_format, sharding
from lora_fn.errors import FileError, Problems, SpecError
from lora_fn.layer_spec import LayerSpec
from lora_fn.layout import same_bits
from lora_fn.reshard import shard, unshard

FORMAT = 2
NAME = "manifest.json"
FACTOR = "factor"
MOMENTS = ("exp_avg", "exp_avg_sq")
PIECE = 1 << 18  # bytes that are read and hashed at once
READERS = 4  # threads, and as many that write
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
            if not sharding.stored_names(spec):
                problems.add(path, "has no adapter, expected adapted and trained layers only.")
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
            for name in names_of(kind, self.specs[path])
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
        for name in sharding.stored_names(spec):
            layout = sharding.layout(spec, name)
            if layout is not None:
                found.setdefault(path, {})[name] = json.loads(layout.to_json())
    return found


def file_name(tp: int, pp: int) -> str:
    """The name of the file of a process: its place on the axis, and its pipeline stage."""
    return f"tp-{tp:05d}-pp-{pp:05d}.safetensors"


def names_of(kind: str, spec: LayerSpec) -> tuple[str, ...]:
    """The parameters of a layer that have a tensor of a kind: what is stored, and moments of what is trained."""
    return sharding.stored_names(spec) if kind == FACTOR else sharding.trained_names(spec)


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
    file, digest = directory / file_name(tp, pp), hashlib.sha256()
    checkpoint.write_tensors(file, tensors, _metadata(manifest, tp, pp), digest)
    return file.name, StoredFile(sha256=digest.hexdigest(), size=file.stat().st_size)


@contextmanager
def writing(
    directory: Path, manifest: Manifest, dtype: Callable[[str, str, str], torch.dtype]
) -> Iterator[Callable[[str, str, Mapping[str, Tensor]], None]]:
    """Write the files of all processes layer by layer, and the manifest when the block ends.

    Args:
        directory: Of the checkpoint; it is there.
        manifest: What it will be; its files are yet to be written.
        dtype: Of the tensors of a kind, a path and a parameter.

    Yields:
        put(kind, path, params), once for every kind and layer, with canonical tensors.
    """
    places = [(tp, pp) for pp in range(manifest.pp) for tp in range(manifest.tp)]
    stage_of = {path: pp for pp, stage in enumerate(manifest.stages) for path in stage}
    names = {
        tensor_name(kind, path, name): dtype(kind, path, name)
        for kind in manifest.kinds
        for path, spec in manifest.specs.items()
        for name in names_of(kind, spec)
    }
    digests = {place: hashlib.sha256() for place in places}
    with ExitStack() as opened, ThreadPoolExecutor(READERS) as writers:
        files = {}
        for tp, pp in places:
            plan = {name: (names[name], shape) for name, shape in manifest.tensors(pp).items()}
            file, told = directory / file_name(tp, pp), _metadata(manifest, tp, pp)
            files[tp, pp] = opened.enter_context(checkpoint.writing(file, plan, told, digests[tp, pp]))

        def put(kind: str, path: str, params: Mapping[str, Tensor]) -> None:
            spec = manifest.specs[path]

            def put_local(tp: int) -> None:
                local = shard(params, spec, tp if spec.axis.size > 1 else 0)
                for name in sorted(local):
                    files[tp, stage_of[path]](tensor_name(kind, path, name), local[name])

            list(writers.map(put_local, range(manifest.tp)))

        yield put
    stored = {}
    for tp, pp in places:
        file = directory / file_name(tp, pp)
        stored[file.name] = StoredFile(sha256=digests[tp, pp].hexdigest(), size=file.stat().st_size)
    write(directory, replace(manifest, files=stored))


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
        self._readers = [ThreadPoolExecutor(1) for _ in range(min(READERS, self.manifest.tp))]
        self._stage = {path: number for number, stage in enumerate(self.manifest.stages) for path in stage}
        problems = Problems(FileError)
        for pp in range(self.manifest.pp):
            expected = self.manifest.tensors(pp)
            for tp in range(self.manifest.tp):
                file = directory / file_name(tp, pp)
                try:
                    self._files[tp, pp] = _File(file, self.manifest, tp, pp, expected)
                    self._files[tp, pp].check_dtypes(self._files.get((0, pp), self._files[tp, pp]))
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
        for reader in self._readers:
            reader.shutdown(cancel_futures=True)
        for file in self._files.values():
            file.close()

    @property
    def bytes_read(self) -> int:
        """Bytes read from the disk so far."""
        return sum(file.bytes_read for file in self._files.values())

    def kinds(self) -> list[str]:
        """The kinds of tensors, in the order in which the files have them."""
        first = next(path for path, spec in self.manifest.specs.items() if sharding.trained_names(spec))
        return sorted(self.manifest.kinds, key=lambda kind: self._offset(kind, first))

    def paths(self, kind: str) -> list[str]:
        """The paths of the layers, in the order in which the files have their tensors."""
        held = [path for path, spec in self.manifest.specs.items() if names_of(kind, spec)]
        return sorted(held, key=lambda path: (self._stage[path], self._offset(kind, path)))

    def _offset(self, kind: str, path: str) -> int:
        entries = self._files[0, self._stage[path]].entries
        names = names_of(kind, self.manifest.specs[path])
        return min(entries[tensor_name(kind, path, name)].start for name in names)

    def dtypes(self, kind: str, path: str) -> dict[str, torch.dtype]:
        """Parameter -> dtype, of one layer."""
        entries = self._files[0, self._stage[path]].entries
        names = names_of(kind, self.manifest.specs[path])
        return {name: DTYPES[entries[tensor_name(kind, path, name)].dtype] for name in names}

    def locals(self, kind: str, path: str) -> list[dict[str, Tensor]]:
        """The tensors of one layer, {parameter: local tensor} per process in order."""
        return self._read(kind, path)()

    def _read(self, kind: str, path: str) -> Callable[[], list[dict[str, Tensor]]]:
        """Begin to read a layer; gives what waits for it. A reader has the same files for good, and so in order."""
        stage, names = self._stage[path], names_of(kind, self.manifest.specs[path])
        tensors = {name: tensor_name(kind, path, name) for name in sorted(names)}

        def read(first: int) -> list[dict[str, Tensor]]:
            files = [self._files[tp, stage] for tp in range(first, self.manifest.tp, len(self._readers))]
            return [{name: file.read(tensor) for name, tensor in tensors.items()} for file in files]

        begun = [reader.submit(read, first) for first, reader in enumerate(self._readers)]

        def wait() -> list[dict[str, Tensor]]:
            found = [future.result() for future in begun]
            return [found[tp % len(found)][tp // len(found)] for tp in range(self.manifest.tp)]

        return wait

    def canonical(self, kind: str, path: str) -> dict[str, Tensor]:
        """The canonical tensors of one layer.

        Raises:
            FileError: Copies that differ between processes, or, where that is why, as `finish`.
        """
        return self._joined(kind, path, self.locals(kind, path))

    def layers(self, kind: str) -> Iterator[tuple[str, dict[str, Tensor]]]:
        """Path and canonical tensors of every layer, as `canonical`, in the order of `paths`.

        While one is used, the next is read.
        """
        paths = self.paths(kind)
        wait = self._read(kind, paths[0])
        for path, following in zip(paths, [*paths[1:], None], strict=True):
            locals_ = wait()
            if following is not None:
                wait = self._read(kind, following)
            yield path, self._joined(kind, path, locals_)

    def _joined(self, kind: str, path: str, locals_: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        try:
            return join(locals_, self.manifest.specs[path])
        except SpecError as error:
            self.finish()
            raise FileError(f"{self.directory}: {kind} of {path}: {error}") from error

    def finish(self) -> None:
        """Read what is left, and hold the hashes against the manifest.

        Raises:
            FileError: Files that are not what was written, all of them at once.
        """
        problems = Problems(FileError)
        ends = {
            place: self._readers[place[0] % len(self._readers)].submit(file.is_whole)
            for place, file in self._files.items()
        }
        for place, end in ends.items():
            if not end.result():
                problems.add(str(self._files[place].path), f"is not what was written (its SHA-256 differs); {GO_BACK}")
        problems.raise_if_any()


class _File:
    """One file of a checkpoint, read from its begin to its end."""

    def __init__(self, path: Path, manifest: Manifest, tp: int, pp: int, expected: Mapping[str, tuple[int, ...]]):
        self.path, self.bytes_read = path, 0
        self.stored = manifest.files[path.name]
        self._digest, self._at = hashlib.sha256(), 0
        self._handle = open(path, "rb", buffering=0)  # noqa: SIM115  (closed by close)
        try:
            header = checkpoint.read_header(path, self.stored.size, lambda length: bytes(self._take(length)))
            self.entries = header.entries
            self._check(header.metadata, _metadata(manifest, tp, pp), expected)
        except FileError:
            self.close()
            raise

    def _check(
        self, found: Mapping[str, str], written: Mapping[str, str], expected: Mapping[str, tuple[int, ...]]
    ) -> None:
        for name, value in written.items():
            if found.get(name) != value:
                raise FileError(f"{self.path}: is of {name} {found.get(name)}, {NAME} says {name} {value}; {GO_BACK}")
        shapes = {name: entry.shape for name, entry in self.entries.items()}
        if shapes != expected:
            odd = sorted(set(shapes.items()) ^ set(expected.items()))[0][0]
            raise FileError(f"{self.path}: tensor {odd!r} is missing, unexpected or misshapen; {GO_BACK}")

    def check_dtypes(self, first: _File) -> None:
        """Refuse dtypes that no factor has, or that are not those of the stage's first process.

        Raises:
            FileError: They are.
        """
        for name, entry in self.entries.items():
            if entry.dtype not in DTYPES or entry.dtype != first.entries[name].dtype:
                told = f"{entry.dtype}, in {first.path.name} {first.entries[name].dtype}"
                raise FileError(f"{self.path}: tensor {name!r} is {told}, expected one of {[*DTYPES]}; {GO_BACK}")

    def read(self, name: str) -> Tensor:
        """A tensor; what lies between the last one and it is hashed and dropped."""
        entry = self.entries[name]
        while self._at < entry.start:
            self._take(min(PIECE, entry.start - self._at))
        tensor = torch.empty(entry.shape, dtype=DTYPES[entry.dtype])
        self._fill(checkpoint.as_bytes(tensor), entry.start)
        return tensor

    def _take(self, length: int) -> memoryview:
        """The next bytes [length]."""
        content = memoryview(bytearray(length))
        self._fill(content, self._at)
        return content

    def _fill(self, content: memoryview, start: int) -> None:
        """Read what begins at `start`, a piece at a time, and hash it while the processor has it, if it is what comes
        next; what was passed by before is in the hash already.
        """
        is_next = start == self._at
        while len(content):
            try:
                got = os.preadv(self._handle.fileno(), [content[:PIECE]], start)
            except OSError as error:
                raise FileError(f"{self.path}: cannot be read ({error.strerror}); {GO_BACK}") from error
            if not got:
                raise FileError(f"{self.path}: ends at byte {start}, {NAME} says {self.stored.size}; {GO_BACK}")
            if is_next:
                self._digest.update(content[:got])
                self._at += got
            content, start = content[got:], start + got
            self.bytes_read += got

    def is_whole(self) -> bool:
        """Read what is left; whether it all is what was written."""
        while self._at < self.stored.size:
            self._take(min(PIECE, self.stored.size - self._at))
        return self._digest.hexdigest() == self.stored.sha256

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
    theirs, ours = peft_format.shapes_on_disk(stored.manifest.specs), peft_format.shapes_on_disk(specs)
    if theirs != ours:
        odd = sorted(set(theirs.items()) ^ set(ours.items()))[0][0]
        told = f"{list(theirs[odd])} there" if odd in theirs else "none there", list(ours.get(odd, ("none",)))
        raise FileError(f"{stored.directory}: {odd!r} is {told[0]}, in this model {told[1]}; use the model it is of.")
    names = {
        path: {key for key, name in peft_format.tensor_names(path, spec).items() if name in names_of(kind, spec)}
        for path, spec in specs.items()
    }
    home = {key: path for path in names for key in names[path]}
    waiting: dict[str, Tensor] = {}
    found: dict[str, dict[str, Tensor]] = {}
    for path, params in stored.layers(kind):
        named = peft_format.to_state_dict({path: params}, stored.manifest.specs)
        waiting |= named
        for mine in dict.fromkeys(home[key] for key in named):
            if names[mine] <= set(waiting):
                spec = specs[mine]
                tree = peft_format.from_state_dict({key: waiting.pop(key) for key in names[mine]}, {mine: spec})
                found[mine] = shard(tree[mine], spec, index if spec.axis.size > 1 else 0)
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
