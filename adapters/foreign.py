"""Which sharded checkpoints of other programs can we read? Optimum Neuron's adapters and neuronx-distributed's.

Both lie in a directory with `model/dp_rank_00_tp_rank_TT_pp_rank_PP.pt`, a pickle per process: of tensors ("plain"), or
of references to files beside it (xser: `.pt.tensors/tensor_N.pt`, shapes in `.pt.info.pt`). What they hold is described
here in our terms, a `LayerSpec` per layer; joining and cutting is then ours.

Source: Optimum Neuron, `peft/peft_model.py`, `models/training/transformations_utils.py`; neuronx-distributed,
`trainer/checkpoint.py`, `modules/lora/model.py`; torch_xla, `utils/serialization.py`.
"""

from __future__ import annotations

import re
import warnings
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adapters.sharded_adapter import ShardedAdapter
from lora_fn import Axis, FileError, LoraSpec, checkpoint, peft_format, sharding, targets
from lora_fn.errors import Problems
from lora_fn.layout import Layout, same_bits
from lora_fn.reshard import cut_dim
from lora_fn.spec import FusedPart, Heads, LayerSpec

RANK_FILE = re.compile(r"dp_rank_(\d+)(_ep_rank_\d+)?_tp_rank_(\d+)_pp_rank_(\d+)\.pt")
REFERENCE = "torch_xla.utils.serialization.TensorReference"
SHARDS = "adapter_shards"
METADATA = re.compile(r"mp_metadata_pp_rank_(\d+)\.json")

# Ending of a tensor's name -> our parameter, of a layer that is not fused.
ENDINGS: Mapping[str, str] = {
    "lora_A.weight": "lora_A",
    "lora_B.weight": "lora_B",
    "lora_B.bias": "lora_B_bias",
    "lora_embedding_A": "lora_A",
    "lora_embedding_B": "lora_B",
}
# The endings that a layer has together, with or without the bias.
LINEAR = ("lora_A.weight", "lora_B.weight")
EMBEDDING = ("lora_embedding_A", "lora_embedding_B")
# The dimensions that the axis cuts of lora_A and of lora_B -> kind.
KINDS: Mapping[tuple[int | None, int | None], str] = {(None, 0): "column", (1, None): "row", (None, None): "linear"}
# Last part of a module's name in a model of neuronx-distributed -> its kind, and which sizes its input and output have.
NXD_LAYERS: Mapping[str, tuple[str, str, str]] = {
    "embed_tokens": ("embedding", "vocabulary", "hidden"),
    "q_proj": ("column", "hidden", "query"),
    "k_proj": ("column", "hidden", "key_value"),
    "v_proj": ("column", "hidden", "key_value"),
    "o_proj": ("row", "query", "hidden"),
    "gate_proj": ("column", "hidden", "intermediate"),
    "up_proj": ("column", "hidden", "intermediate"),
    "down_proj": ("row", "intermediate", "hidden"),
    "lm_head": ("column", "hidden", "vocabulary"),
}
NXD_FUSED: Mapping[str, tuple[str, ...]] = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
}
# Name of a module in Hugging Face's models -> the part of a fused layer that it is.
PART_NAMES: Mapping[str, str] = {module: part for part, module in peft_format.PART_MODULES.items()}
# The module whose input lies like the query heads.
OUTPUT = "o_proj"
# NxD's key of adapter_config.json -> PEFT's, and those of its keys that change nothing in a file of factors.
NXD_KEYS: Mapping[str, str] = {"lora_rank": "r"}
NXD_INERT = (
    "lora_load_tag",
    "lora_save_dir",
    "lora_verbose",
    "load_lora_from_ckpt",
    "merge_lora",
    "merge_sharded_lora",
    "save_lora_base",
    "save_lora_config_adapter",
)


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
        tensor = _checked(file, name, _load(file))
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """Where a parameter of ours lies in the files.

    Args:
        name: Of the tensor.
        start, length: Its rows; length None for all.
        form: "local": every process wrote its own part. "canonical": every process wrote the whole. "joined": every
            process wrote all local parts, one after the other.
    """

    name: str
    start: int = 0
    length: int | None = None
    form: str = "local"


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """One adapted layer in the files of a pipeline stage.

    Args:
        spec: In our terms.
        sources: Parameter -> where it lies.
        files: Of the stage's processes, in order.
    """

    spec: LayerSpec
    sources: Mapping[str, Source]
    files: Sequence[RankFile]


@dataclass(frozen=True, slots=True, kw_only=True)
class Fused:
    """A fused layer, as Optimum Neuron's metadata describe it.

    Args:
        names: Of its parts, on disk ("q_proj", ...).
        sizes: Global sizes of its parts.
        blocks: Ending of a tensor of lora_B -> (number of the part, local rows) of what it holds, in order.
        heads: Of kind "qkv"; None for kind "column".
        fuse_qkv: As in `LayerSpec`.
    """

    names: tuple[str, ...]
    sizes: tuple[int, ...]
    blocks: Mapping[str, tuple[tuple[int, int], ...]]
    heads: Heads | None = None
    fuse_qkv: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class StageMetadata:
    """What Optimum Neuron says about the tensors of a pipeline stage.

    Args:
        cuts: Name of a tensor of the adapter, without the adapter's name -> the dimension that is cut, None for none.
        fused: Path of a module -> how it is fused.
        rows: Path of a row layer -> the heads that its input holds.
    """

    cuts: Mapping[str, int | None]
    fused: Mapping[str, Fused]
    rows: Mapping[str, Heads]


def open_optimum(directory: Path, *, allow_pickle: bool, allow_drift: bool = False) -> ShardedAdapter:
    """An adapter that Optimum Neuron's `save_pretrained` wrote.

    Args:
        directory: `adapter_<name>`, its `adapter_shards`, or the directory that holds one such.
        allow_pickle: Open the pickles, with torch's `weights_only` (tensors and xser's references, nothing else).
        allow_drift: Where copies of a factor differ between processes, take the first, as Optimum Neuron does.

    Raises:
        FileError: Pickles that are not allowed, an unfinished save, missing, unexpected or damaged files, tensors that
            do not fit each other, the metadata or the config.
        SpecError: A config that we cannot follow.
    """
    root = _optimum_root(directory)
    spec = peft_format.from_config(checkpoint.read_json(root / checkpoint.CONFIG))
    stages = _stages(root / SHARDS, allow_pickle=allow_pickle)
    described = _metadata(root / SHARDS, stages, root.name.removeprefix("adapter_"))
    problems, layers = Problems(FileError), {}
    owners = _owners(stages, described, problems)
    problems.raise_if_any()
    for files, metadata, mine in zip(stages, described, owners, strict=True):
        for path, names in _by_layer(mine, files[0].path).items():
            try:
                layers[path] = _optimum_layer(path, names, files, metadata, spec)
            except (FileError, ValueError) as error:
                problems.add(str(files[0].path), str(error).replace("\n", "; "))
    problems.raise_if_any()
    return _adapter(spec, layers, allow_drift=allow_drift)


def _adapter(spec: LoraSpec, layers: Mapping[str, Layer], *, allow_drift: bool) -> ShardedAdapter:
    return ShardedAdapter(
        spec=spec,
        specs={path: layer.spec for path, layer in layers.items()},
        locals=lambda path: _locals(path, layers[path], allow_drift=allow_drift),
    )


def _locals(path: str, layer: Layer, *, allow_drift: bool) -> list[dict[str, Tensor]]:
    """The local factors of every process.

    Raises:
        FileError: Copies that differ, unless that is allowed.
    """
    held: list[dict[str, Tensor]] = [{} for _ in layer.files]
    problems = Problems(FileError)
    for parameter, source in layer.sources.items():
        parts, drift = _settled(layer, parameter, source)
        if drift > 0 and not allow_drift:
            problems.add(
                str(layer.files[0].path.parent),
                f"the copies of {path}.{parameter} differ between processes, by {drift:.2g} of its largest element, as "
                f"Optimum Neuron and neuronx-distributed leave them under sequence parallelism; train without it, or "
                f"allow drift to take the first copy, as they do.",
            )
        for mine, part in zip(held, parts, strict=True):
            mine[parameter] = part
    problems.raise_if_any()
    return held


def _settled(layer: Layer, parameter: str, source: Source) -> tuple[list[Tensor], float]:
    """The local tensors of one parameter, all copies like the first, and how far the others were from it."""
    layout, read = sharding.layout(layer.spec, parameter), [file.read(source.name) for file in layer.files]
    stop = None if source.length is None else source.start + source.length
    if layout is None:
        return [read[0].clone() for _ in read], _furthest(read, read[:1] * len(read))
    dim, drift = cut_dim(layer.spec, parameter), 0.0
    if source.form != "local":
        drift = _furthest(read, read[:1] * len(read))
        read = list(read[0].chunk(len(read), dim)) if source.form == "joined" else _cut(read[0], layout, dim)
    read = [t[source.start : stop].clone() for t in read]
    if not layout.has_copies:
        return read, drift
    settled = _cut(torch.cat(read, dim).index_select(dim, layout.sources()), layout, dim)
    return settled, max(drift, _furthest(read, settled))


def _cut(whole: Tensor, layout: Layout, dim: int) -> list[Tensor]:
    return [layout.to_local(whole, index, dim=dim) for index in range(layout.processes)]


def _furthest(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    return max(_distance(a, b) for a, b in zip(found, expected, strict=True))


def _distance(a: Tensor, b: Tensor) -> float:
    """max|a - b| / max|b|, 0 where they are the same bit for bit, and inf where that says nothing."""
    if a is b or same_bits(a, b):
        return 0.0
    found = float((a.float() - b.float()).abs().max() / b.float().abs().max())
    return found if found > 0 else float("inf")


# Files


def _stages(directory: Path, *, allow_pickle: bool) -> list[list[RankFile]]:
    """The files of a checkpoint: pipeline stage -> process -> what it wrote.

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


def _rank_name(tp: int, pp: int) -> str:
    return f"dp_rank_00_tp_rank_{tp:02d}_pp_rank_{pp:02d}.pt"


def _open(file: Path) -> RankFile:
    content = _load(file)
    if not isinstance(content, Mapping) or not all(isinstance(name, str) for name in content):
        raise FileError(f"{file}: holds a {type(content).__name__}, expected tensors by name; use a whole checkpoint.")
    tensors = {name: value for name, value in content.items() if isinstance(value, (Tensor, TensorReference))}
    others = {name: value for name, value in content.items() if name not in tensors}
    references = [value for value in tensors.values() if isinstance(value, TensorReference)]
    info, told = None, file.with_name(file.name + ".info.pt")
    if told.is_file():
        info = _load(told)
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


def _load(file: Path) -> Any:
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


# Optimum Neuron


def _optimum_root(directory: Path) -> Path:
    """The `adapter_<name>` directory that is meant.

    Raises:
        FileError: None, several, or one without the name of its adapter.
    """
    if not directory.is_dir():
        raise FileError(f"{directory}: no such directory; check the path.")
    inside = [entry for entry in sorted(directory.glob("adapter_*")) if (entry / SHARDS).is_dir()]
    if directory.name == SHARDS:
        directory = directory.absolute().parent
    elif not (directory / SHARDS).is_dir():
        if len(inside) != 1:
            told = f"holds {len(inside)} adapters ({', '.join(entry.name for entry in inside)})" if inside else ""
            raise FileError(f"{directory}: {told or f'has no {SHARDS}'}; give the directory of one adapter.")
        directory = inside[0]
    if not directory.absolute().name.startswith("adapter_"):
        raise FileError(
            f"{directory}: is not named adapter_<name>, and the adapter's name is in no file; rename it back "
            f"(Optimum Neuron's first adapter is adapter_default)."
        )
    return directory.absolute()


def _metadata(directory: Path, stages: Sequence[Sequence[RankFile]], adapter: str) -> list[StageMetadata]:
    found = {int(m[1]) for entry in directory.iterdir() if (m := METADATA.fullmatch(entry.name))}
    problems = Problems(FileError)
    for extra in sorted(found - set(range(len(stages)))):
        file = directory / f"mp_metadata_pp_rank_{extra}.json"
        problems.add(str(file), "describes a pipeline stage that has no files; use a whole checkpoint.")
    problems.raise_if_any()
    described = []
    for stage, files in enumerate(stages):
        file = directory / f"mp_metadata_pp_rank_{stage}.json"
        values = checkpoint.read_json(file)
        try:
            described.append(_stage_metadata(values, adapter, len(files)))
        except (AttributeError, IndexError, KeyError, TypeError, ValueError, ZeroDivisionError) as error:
            problem = f"{type(error).__name__} {error}" if isinstance(error, KeyError) else str(error)
            raise FileError(
                f"{file}: cannot be followed ({problem}); use what Optimum Neuron wrote with these files."
            ) from error
    return described


def _stage_metadata(values: Mapping[str, Any], adapter: str, processes: int) -> StageMetadata:
    cuts: dict[str, int | None] = {}
    for name, told in _told(values, "parameters", dict).items():
        key = _without_adapter(name, adapter)
        if key is None:
            continue
        cuts[key] = None
        if ".lora_" in key and _told(told, "tensor_model_parallel", bool):
            cuts[key] = _told(told, "partition_dim", int, least=0)
            if _told(told, "num_partitions", int) != processes:
                raise ValueError(f"{name!r} lies over {told['num_partitions']} processes, found {processes}")
            if _told(told, "partition_stride", int) != 1 or cuts[key] not in (0, 1):
                raise ValueError(f"{name!r} is cut by {told}, expected dimension 0 or 1 and stride 1")
    fused, rows = {}, {}
    for module in _told(values, "model_weight_transformation_specs", list):
        path = _told(module, "module_fully_qualified_name", str).removeprefix(peft_format.PREFIX)
        for name, told in _told(module, "specs", list):
            if _told(told, "tp_size", int) != processes:
                raise ValueError(f"{path!r} lies over {told['tp_size']} processes, found {processes}")
            layer, description, heads = FUSED[name](told)
            unknown = sorted(set(description.names) - set(PART_NAMES))
            if unknown:
                raise ValueError(f"{path}.{layer} has parts {unknown}, expected some of {sorted(PART_NAMES)}")
            fused[f"{path}.{layer}"] = description
            if heads is not None:
                if told.get("output_projection_name") != OUTPUT:
                    raise ValueError(f"{path} has output {told.get('output_projection_name')!r}, expected {OUTPUT!r}")
                rows[f"{path}.{OUTPUT}"] = heads
    return StageMetadata(cuts=cuts, fused=fused, rows=rows)


def _told(values: Any, key: str, kind: type, *, least: int = 1) -> Any:
    """A value of the metadata, if it is what it should be.

    Raises:
        ValueError: It is missing, of another type, or a number below `least`.
    """
    value: Any = values.get(key) if isinstance(values, Mapping) else None
    fits = type(value) is kind and (not isinstance(value, int) or isinstance(value, bool) or value >= least)
    if not fits:
        raise ValueError(f"{key!r} is {value!r}, expected {kind.__name__}" + (f" >= {least}" if kind is int else ""))
    return value


def _without_adapter(name: str, adapter: str) -> str | None:
    """The name in the files, of a parameter of the adapter or of a weight beside it; None for any other's."""
    if ".lora_" not in name:
        return name if name.endswith(".base_layer.weight") else None
    head, _, tail = name.rpartition(".lora_")
    kind, _, rest = tail.partition(".")
    if rest != adapter and not rest.startswith(adapter + "."):
        return None
    return f"{head}.lora_{kind}{rest[len(adapter) :]}"


def _fused_linears(told: Mapping[str, Any]) -> tuple[str, Fused, Heads | None]:
    name = _told(told, "fused_linear_name", str)
    if told.get("fuse_axis") not in (0, "column") or isinstance(told["fuse_axis"], bool):
        raise ValueError(f"{name!r} is fused along {told.get('fuse_axis')!r}, expected 0, its output")
    sizes, names = tuple(_told(told, "original_dims", list)), tuple(_told(told, "linear_names", list))
    if len(sizes) != len(names) or any(type(size) is not int or size % told["tp_size"] for size in sizes):
        raise ValueError(f"{name!r} has sizes {sizes} of {names}, which {told['tp_size']} processes do not divide")
    rows = tuple((number, size // told["tp_size"]) for number, size in enumerate(sizes))
    return name, Fused(names=names, sizes=sizes, blocks={"lora_B.weight": rows, "lora_B.bias": rows}), None


def _grouped_query(told: Mapping[str, Any]) -> tuple[str, Fused, Heads | None]:
    heads = Heads(
        query=_told(told, "num_attention_heads", int),
        key_value=_told(told, "num_key_value_heads", int),
        multiplier=_told(told, "kv_size_multiplier", int),
        order="tiled",
    )
    tp, copies, fuse_qkv = told["tp_size"], told["kv_size_multiplier"], _told(told, "fuse_qkv", bool)
    q, kv = (_told(told, f"{part}_output_size_per_partition", int) for part in ("q", "kv"))
    described = Fused(
        names=tuple(_told(told, f"{part}_projection_name", str) for part in ("query", "key", "value")),
        sizes=(q * tp, kv * tp // copies, kv * tp // copies),
        blocks=_grouped_blocks((q, kv, kv), fuse_qkv=fuse_qkv),
        heads=heads,
        fuse_qkv=fuse_qkv,
    )
    return _told(told, "gqa_qkv_projection_name", str), described, heads


def _grouped_blocks(rows: Sequence[int], *, fuse_qkv: bool) -> dict[str, tuple[tuple[int, int], ...]]:
    """Which ending of neuronx-distributed's grouped-query layer holds which local rows of query, key and value."""
    if fuse_qkv:
        return {"lora_B.weight_qkv": tuple(enumerate(rows))}
    return {f"lora_B.weight_{letter}": ((number, rows[number]),) for number, letter in enumerate("qkv")}


# Name of a class of Optimum Neuron's -> what its fields mean: the layer's name, how it is fused, its output's heads.
FUSED: Mapping[str, Callable[[Mapping[str, Any]], tuple[str, Fused, Heads | None]]] = {
    "FusedLinearsSpec": _fused_linears,
    "GQAQKVColumnParallelLinearSpec": _grouped_query,
}


def _owners(
    stages: Sequence[Sequence[RankFile]], described: Sequence[StageMetadata], problems: Problems
) -> list[list[str]]:
    """The names that count in each stage: its file may hold those of all stages, but only its own were trained."""
    owned: dict[str, int] = {}
    for stage, (files, metadata) in enumerate(zip(stages, described, strict=True)):
        _check_same(files, problems)
        where = str(files[0].path)
        for name in files[0].others:
            problems.add(where, f"{name!r} is no tensor, expected tensors only; use what Optimum Neuron wrote.")
        for name in metadata.cuts:
            if name in owned:
                problems.add(where, f"{name!r} is in pipeline stages {owned[name]} and {stage}; use files of one save.")
            owned.setdefault(name, stage)
            if name not in files[0].tensors and ".lora_" in name:
                problems.add(where, f"tensor {name!r} is missing; use a whole checkpoint.")
    for files in stages:
        for name in files[0].tensors:
            if name not in owned:
                problems.add(str(files[0].path), f"tensor {name!r} is in no metadata; use files of one save.")
    return [
        [name for name in metadata.cuts if name in files[0].tensors and owned[name] == stage]
        for stage, (files, metadata) in enumerate(zip(stages, described, strict=True))
    ]


def _check_same(files: Sequence[RankFile], problems: Problems) -> None:
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


def _by_layer(names: Iterable[str], file: Path) -> dict[str, dict[str, str]]:
    """Path of the module -> ending of the name -> name, of the tensors of an adapter.

    Raises:
        FileError: Other tensors.
    """
    layers: dict[str, dict[str, str]] = {}
    weights = []
    for name in names:
        path, _, tail = name.removeprefix(peft_format.PREFIX).rpartition(".lora_")
        if path:
            layers.setdefault(path, {})[f"lora_{tail}"] = name
        else:
            weights.append(name)
    for name in weights:  # frozen weights that PEFT saves with adapted embeddings
        path = name.removeprefix(peft_format.PREFIX).removesuffix(".base_layer.weight")
        if path not in layers:
            raise FileError(f"{file}: tensor {name!r} belongs to no adapted layer; use a checkpoint of LoRA alone.")
    return layers


def _optimum_layer(
    path: str, names: Mapping[str, str], files: Sequence[RankFile], metadata: StageMetadata, spec: LoraSpec
) -> Layer:
    """One layer, in our terms.

    Raises:
        ValueError: Tensors that do not fit each other, the metadata or the config.
    """
    cuts = {ending: metadata.cuts[name] for ending, name in names.items()}
    shapes = {ending: tuple(files[0].outline(name)[0]) for ending, name in names.items()}
    _check_dims(path, shapes)
    if path in metadata.fused:
        layer, sources = _fused_layer(path, metadata.fused[path], shapes, cuts, spec, len(files))
    else:
        layer, sources = _plain_layer(path, metadata.rows.get(path), shapes, cuts, spec, len(files))
    placed = {parameter: replace(source, name=names[source.name]) for parameter, source in sources.items()}
    return Layer(spec=layer, sources=placed, files=files)


def _check_dims(path: str, shapes: Mapping[str, tuple[int, ...]]) -> None:
    for ending, shape in shapes.items():
        if len(shape) != (1 if ending.endswith("bias") else 2) or 0 in shape:
            raise ValueError(f"{path}.{ending} has shape {list(shape)}, which no factor has")


def _plain_layer(
    path: str,
    heads: Heads | None,
    shapes: Mapping[str, tuple[int, ...]],
    cuts: Mapping[str, int | None],
    spec: LoraSpec,
    processes: int,
) -> tuple[LayerSpec, dict[str, Source]]:
    """A layer that is not fused, and the endings that hold its parameters."""
    a, b = EMBEDDING if EMBEDDING[0] in shapes else LINEAR
    bias = "lora_B.bias" in shapes
    if set(shapes) - {"lora_B.bias"} != {a, b} or (bias and a != LINEAR[0]):
        raise ValueError(f"{path} has {sorted(shapes)}, which are not the factors of a layer that we know")
    kind = KINDS.get((cuts[a], cuts[b]))
    if path.rpartition(".")[2] in NXD_FUSED:
        raise ValueError(f"{path} is fused, and nothing says how")
    if kind is None or (bias and cuts["lora_B.bias"] != (0 if kind == "column" else None)):
        raise ValueError(f"{path} is cut along {dict(cuts)}, expected the factors of a column or a row layer")
    if a == EMBEDDING[0] and kind != "linear":
        raise ValueError(f"{path} is cut along {dict(cuts)}, expected whole factors of an embedding")
    rank, alpha = _agreed(path, [path], shapes[a][0], spec)
    if shapes[b][1] != rank:
        raise ValueError(f"{path} has factors of shapes {list(shapes[a])} and {list(shapes[b])}, whose ranks differ")
    known: dict[str, Any] = {"rank": rank, "alpha": alpha, "use_rslora": spec.use_rslora, "lora_bias": bias}
    known |= {"axis": Axis(size=processes), "dropout": spec.dropout}
    inside = shapes[a][1] * (processes if kind == "row" else 1)
    outside = shapes[b][0] * (processes if kind == "column" else 1)
    form = "local"
    if a == EMBEDDING[0]:
        kind, form = "embedding", "canonical"
        known |= {"pad": inside % processes != 0}
    if kind == "row":
        known |= {"heads": heads}
    layer = LayerSpec(kind=kind, in_features=inside, out_features=outside, **known)
    _check_bias(path, shapes, shapes[b][0])
    return layer, {ENDINGS[ending]: Source(name=ending, form=form) for ending in shapes}


def _fused_layer(
    path: str,
    fused: Fused,
    shapes: Mapping[str, tuple[int, ...]],
    cuts: Mapping[str, int | None],
    spec: LoraSpec,
    processes: int,
) -> tuple[LayerSpec, dict[str, Source]]:
    """A fused layer with its one lora_A, and which rows of which ending hold its parameters."""
    expected = {"lora_A.weight", *(ending for ending in fused.blocks if not ending.endswith("bias"))}
    if set(shapes) - (set(fused.blocks) - expected) != expected:
        raise ValueError(f"{path} has {sorted(shapes)}, expected {sorted(expected)}")
    # NxD leaves no mark on weight_qkv, which is cut all the same.
    wrong = [e for e, cut in cuts.items() if cut != (None if e == "lora_A.weight" else 0) and e != "lora_B.weight_qkv"]
    if wrong:
        raise ValueError(f"{path}.{wrong[0]} is cut along {cuts[wrong[0]]}, which is not how a column layer is")
    parent = path.rpartition(".")[0]
    rank, alpha = _agreed(path, [f"{parent}.{name}" for name in fused.names], shapes["lora_A.weight"][0], spec)
    named = [PART_NAMES[name] for name in fused.names]
    sources = {"lora_A": Source(name="lora_A.weight")}
    for ending, blocks in fused.blocks.items():
        if ending not in shapes:
            continue
        kind, start = ENDINGS.get(ending, "lora_B"), 0
        for number, rows in blocks:
            sources[f"{kind}.{named[number]}"] = Source(name=ending, start=start, length=rows)
            start += rows
        shape = (start,) if kind == "lora_B_bias" else (start, rank)
        if shapes[ending] != shape:
            raise ValueError(f"{path}.{ending} has shape {list(shapes[ending])}, expected {list(shape)}")
    parts = tuple(
        FusedPart(name=name, size=size, rank=rank, alpha=alpha, number=number)
        for number, (name, size) in enumerate(zip(named, fused.sizes, strict=True))
    )
    layer = LayerSpec(
        kind="column" if fused.heads is None else "qkv",
        in_features=shapes["lora_A.weight"][1],
        out_features=sum(fused.sizes),
        parts=parts,
        share_A=True,
        heads=fused.heads,
        fuse_qkv=fused.fuse_qkv,
        use_rslora=spec.use_rslora,
        lora_bias="lora_B.bias" in shapes,
        dropout=spec.dropout,
        axis=Axis(size=processes),
    )
    return layer, sources


def _check_bias(path: str, shapes: Mapping[str, tuple[int, ...]], rows: int) -> None:
    if shapes.get("lora_B.bias", (rows,)) != (rows,):
        raise ValueError(f"{path}.lora_B.bias has shape {list(shapes['lora_B.bias'])}, expected {[rows]}")


def _agreed(path: str, on_disk: Sequence[str], rank: int, spec: LoraSpec) -> tuple[int, float]:
    """Rank and alpha of a layer, which the config must give to what it becomes on disk.

    Raises:
        ValueError: The config says otherwise of a layer on disk than it said of the one that was trained.
    """
    alpha = targets.alpha_of(path, spec)
    for name in on_disk:
        found = (targets.rank_of(name, spec), targets.alpha_of(name, spec))
        if found != (rank, alpha):
            raise ValueError(
                f"the config gives {name} rank {found[0]} and alpha {found[1]:g}, but {path} was trained with rank "
                f"{rank} and alpha {alpha:g} (patterns of a fused layer's parts are ignored there); mend rank_pattern "
                f"and alpha_pattern in {checkpoint.CONFIG}"
            )
    return rank, float(alpha)


# neuronx-distributed


def open_nxd(
    directory: Path, *, allow_pickle: bool, model: Path | None = None, allow_drift: bool = False
) -> ShardedAdapter:
    """An adapter of neuronx-distributed's own LoRA (`modules/lora`), saved by its `save_checkpoint`.

    Its files say neither how a tensor is cut nor how large a layer is: the first follows from the names of modules,
    which are those of Llama, and the second from the base model's config.

    Args:
        directory: The checkpoint's tag, or the directory that holds one.
        allow_pickle, allow_drift: As for `open_optimum`.
        model: Directory of the base model; only its config.json is read.

    Raises:
        FileError: As `open_optimum`, and files that do not say what is needed.
        SpecError: A config that we cannot follow.
    """
    root = _nxd_root(directory)
    stages = _stages(root, allow_pickle=allow_pickle)
    spec = _nxd_spec(root, stages)
    sizes = _nxd_sizes(root, model)
    problems, layers = Problems(FileError), {}
    owners: dict[str, Path] = {}
    for files in stages:
        _check_same(files, problems)
        for name in files[0].tensors:
            if name in owners:
                problems.add(str(files[0].path), f"tensor {name!r} is also in {owners[name]}; use files of one save.")
            owners[name] = files[0].path
    problems.raise_if_any()
    for files in stages:
        found = _by_layer(files[0].tensors, files[0].path)
        for path in found:
            try:
                layers[path] = _nxd_layer(path, found, files, sizes, spec)
            except (FileError, ValueError) as error:
                problems.add(str(files[0].path), str(error).replace("\n", "; "))
    problems.raise_if_any()
    return _adapter(spec, layers, allow_drift=allow_drift)


def _nxd_root(directory: Path) -> Path:
    if not directory.is_dir():
        raise FileError(f"{directory}: no such directory; check the path.")
    inside = [entry for entry in sorted(directory.iterdir()) if _has_rank_files(entry)]
    if _has_rank_files(directory) or not inside:
        return directory
    if len(inside) > 1:
        told = ", ".join(entry.name for entry in inside)
        raise FileError(f"{directory}: holds the checkpoints {told}; give the directory of one of them.")
    return inside[0]


def _has_rank_files(directory: Path) -> bool:
    model = directory / "model"
    return model.is_dir() and any(RANK_FILE.match(entry.name) for entry in model.iterdir())


def _nxd_spec(root: Path, stages: Sequence[Sequence[RankFile]]) -> LoraSpec:
    """The spec, out of the config that NxD put into the files or beside them."""
    first, *rest = [_nxd_config(file) for files in stages for file in files]
    where = stages[0][0].path
    if any(values != first for values in rest):
        raise FileError(f"{where.parent}: the files hold configs that differ; use files of one save.")
    if first is None:
        places = [place / checkpoint.CONFIG for place in (root, root.parent) if (place / checkpoint.CONFIG).is_file()]
        if not places:
            raise FileError(
                f"{root}: says nothing of rank, alpha and targets; put beside it the {checkpoint.CONFIG} that "
                f"neuronx-distributed wrote into its lora_save_dir (or PEFT's)."
            )
        where, first = places[0], checkpoint.read_json(places[0])
    taken = {NXD_KEYS.get(key, key): value for key, value in first.items() if key not in NXD_INERT}
    if taken.get("init_lora_weights") == "default":
        taken["init_lora_weights"] = True
    if isinstance(taken.get("target_modules"), list):
        parts = [part for name in taken["target_modules"] for part in _parts_on_disk(name)]
        taken["target_modules"] = sorted(set(parts))
    if type(taken.get("r")) is not int or type(taken.get("lora_alpha")) not in (int, float):
        raise FileError(
            f"{where}: gives rank {taken.get('r')!r} and alpha {taken.get('lora_alpha')!r}, expected numbers."
        )
    return peft_format.from_config(taken)


def _nxd_config(file: RankFile) -> dict[str, Any] | None:
    """The config in a file, lists in order: NxD lists its targets in another order in every process."""
    if not file.others:
        return None
    config = file.others.get("lora_config")
    if set(file.others) != {"lora_config"} or not isinstance(config, Mapping):
        raise FileError(f"{file.path}: holds {sorted(file.others)} beside tensors, expected nothing or a lora_config.")
    plain = {}
    for key, value in config.items():
        names = isinstance(value, (list, tuple, set)) and all(isinstance(name, str) for name in value)
        if not isinstance(key, str) or not (names or value is None or isinstance(value, (bool, int, float, str))):
            raise FileError(f"{file.path}: its lora_config has a {type(value).__name__}, expected text and numbers.")
        plain[key] = sorted(value) if names else value
    return plain


def _parts_on_disk(name: str) -> list[str]:
    parent, dot, last = str(name).rpartition(".")
    return [f"{parent}{dot}{part}" for part in NXD_FUSED.get(last, (last,))]


def _nxd_sizes(root: Path, model: Path | None) -> dict[str, int]:
    """What each size of `NXD_LAYERS` is in the base model, and its numbers of heads."""
    if model is None:
        raise FileError(f"{root}: does not say how large the layers are; give the base model's directory (--model).")
    config = checkpoint.read_json(model / "config.json")
    keys = {"hidden": "hidden_size", "intermediate": "intermediate_size", "vocabulary": "vocab_size"}
    keys |= {"heads": "num_attention_heads", "kv_heads": "num_key_value_heads", "head": "head_dim"}
    sizes: dict[str, Any] = {size: config.get(key) for size, key in keys.items()}
    if isinstance(sizes["hidden"], int) and isinstance(sizes["heads"], int) and sizes["heads"] > 0:
        sizes["kv_heads"] = sizes["kv_heads"] or sizes["heads"]
        sizes["head"] = sizes["head"] or sizes["hidden"] // sizes["heads"]
    wrong = {keys[size]: value for size, value in sizes.items() if not isinstance(value, int) or value < 1}
    if wrong:
        raise FileError(f"{model / 'config.json'}: says {wrong}, expected sizes; give a Llama-like model's directory.")
    return sizes | {"query": sizes["heads"] * sizes["head"], "key_value": sizes["kv_heads"] * sizes["head"]}


def _grouped_heads(
    path: str, found: Mapping[str, Mapping[str, str]], files: Sequence[RankFile], sizes: Mapping[str, int]
) -> Heads | None:
    """The heads of the attention that a layer is in, where they lie as neuronx-distributed's grouped-query layer has
    them; None where key-value heads are dealt out whole.
    """
    heads = Heads(query=sizes["heads"], key_value=sizes["kv_heads"], order="tiled")
    rows = _rows(found.get(f"{path.rpartition('.')[0]}.qkv_proj", {}), files, "lora_B.weight_")
    if rows:
        return replace(heads, multiplier=_copies(rows, len(files), sizes))
    return heads if sizes["kv_heads"] % len(files) else None


def _rows(names: Mapping[str, str], files: Sequence[RankFile], beginning: str) -> int:
    """The rows of all tensors of a layer whose ending begins so."""
    return sum(files[0].outline(name)[0][0] for ending, name in names.items() if ending.startswith(beginning))


def _copies(rows: int, processes: int, sizes: Mapping[str, int]) -> int:
    """How often each key-value head is there, out of the rows of query, key and value on a process; 0 for no way."""
    if rows == sizes["query"] + 2 * sizes["key_value"]:
        return 1
    copies, rest = divmod(rows * processes - sizes["query"], 2 * sizes["key_value"])
    return 0 if rest or copies < 1 or sizes["heads"] % (copies * sizes["kv_heads"]) else copies


def _nxd_layer(
    path: str,
    found: Mapping[str, Mapping[str, str]],
    files: Sequence[RankFile],
    sizes: Mapping[str, int],
    spec: LoraSpec,
) -> Layer:
    """One layer, in our terms.

    Raises:
        ValueError: Tensors that do not fit each other, the base model or the config.
    """
    names, last, tp = found[path], path.rpartition(".")[2], len(files)
    shapes = {ending: tuple(files[0].outline(name)[0]) for ending, name in names.items()}
    _check_dims(path, shapes)
    cuts: dict[str, int | None]
    if last in NXD_FUSED:
        rows = _rows(names, files, "lora_B.weight")
        grouped = any(ending.startswith("lora_B.weight_") for ending in names)
        fused, form = (_nxd_grouped if grouped else _nxd_fused)(path, last, rows, names, files, sizes)
        factor = tp if form == "joined" else 1
        local = {e: (s if e == "lora_A.weight" else (s[0] // factor, *s[1:])) for e, s in shapes.items()}
        cuts = {ending: None if ending == "lora_A.weight" else 0 for ending in shapes}
        layer, sources = _fused_layer(path, fused, local, cuts, spec, tp)
    elif last in NXD_LAYERS:
        kind, inside, outside = NXD_LAYERS[last]
        local, cuts, form = _nxd_cut(path, kind, sizes[inside], sizes[outside], shapes, tp)
        lies = kind == "row" and inside == "query" and cuts.get("lora_A.weight") == 1
        heads = _grouped_heads(path, found, files, sizes) if lies else None
        layer, sources = _plain_layer(path, heads, local, cuts, spec, tp)
    else:
        raise ValueError(f"{path} is none of {sorted({*NXD_LAYERS, *NXD_FUSED})}, so how it is cut is not known")
    placed = {
        parameter: replace(source, name=names[source.name], form=form if source.form == "local" else source.form)
        for parameter, source in sources.items()
    }
    return Layer(spec=layer, sources=placed, files=files)


def _nxd_cut(
    path: str, kind: str, inside: int, outside: int, shapes: Mapping[str, tuple[int, ...]], processes: int
) -> tuple[dict[str, tuple[int, ...]], dict[str, int | None], str]:
    """The local shapes of a layer that is not fused, their cuts, and the form of its tensors in the files."""
    local, cuts = dict(shapes), dict.fromkeys(shapes)
    dim, size = (1, inside) if kind == "row" else (0, outside)
    endings = {"row": ("lora_A.weight",), "column": ("lora_B.weight", "lora_B.bias")}.get(kind, ())
    a, b = EMBEDDING if EMBEDDING[0] in shapes else LINEAR
    other = {a: (1, inside), b: (0, outside)}
    form = "local"
    for ending, shape in shapes.items():
        if ending in endings and shape[dim] * processes == size:
            cuts[ending] = dim
        elif ending in endings and shape[dim] == size and size % processes == 0:
            cuts[ending], form = dim, "joined"
            local[ending] = tuple(n // processes if d == dim else n for d, n in enumerate(shape))
        elif ending in other and shape[other[ending][0]] != other[ending][1]:
            raise ValueError(f"{path}.{ending} has shape {list(shape)}, the base model {outside} x {inside}")
    return local, cuts, form


def _nxd_fused(
    path: str, last: str, rows: int, names: Mapping[str, str], files: Sequence[RankFile], sizes: Mapping[str, int]
) -> tuple[Fused, str]:
    """How a column layer with a stride is fused, and the form of its tensors in the files."""
    tp, parts = len(files), NXD_FUSED[last]
    whole = tuple(sizes[NXD_LAYERS[part][2]] for part in parts)
    if rows not in (sum(whole), sum(whole) // tp) or any(size % tp for size in whole):
        raise ValueError(f"{path} has {rows} rows of lora_B, the base model {sum(whole)}, cut into {tp}")
    blocks = tuple((number, size // tp) for number, size in enumerate(whole))
    fused = Fused(names=parts, sizes=whole, blocks={"lora_B.weight": blocks, "lora_B.bias": blocks})
    return fused, "joined" if rows == sum(whole) else "local"


def _nxd_grouped(
    path: str, last: str, rows: int, names: Mapping[str, str], files: Sequence[RankFile], sizes: Mapping[str, int]
) -> tuple[Fused, str]:
    """How a grouped-query layer is fused, and the form of its tensors in the files."""
    tp, q, kv = len(files), sizes["query"], sizes["key_value"]
    form, copies = "joined" if rows == q + 2 * kv else "local", _copies(rows, tp, sizes)
    factors = [name for ending, name in names.items() if ending.startswith("lora_B.weight_")]
    merged = tp > 1 and all(_is_same(name, files) for name in factors)
    if copies < 1 or (copies > 1 and merged) or sizes["kv_heads"] * copies % tp:
        raise ValueError(
            f"{path} has {rows} rows of query, key and value in every file, the base model {q}, {kv} and {kv}: where "
            f"neuronx-distributed merges copied key-value heads, it loses part of the query; save with "
            f"merge_sharded_lora=False"
        )
    local = (q // tp, kv * copies // tp, kv * copies // tp)
    fuse_qkv = "lora_B.weight_qkv" in names
    fused = Fused(
        names=NXD_FUSED[last],
        sizes=(q, kv, kv),
        blocks=_grouped_blocks(local, fuse_qkv=fuse_qkv),
        heads=Heads(query=sizes["heads"], key_value=sizes["kv_heads"], multiplier=copies, order="tiled"),
        fuse_qkv=fuse_qkv,
    )
    return fused, form


def _is_same(name: str, files: Sequence[RankFile]) -> bool:
    """Whether all processes wrote the same, and not the zeros of a factor that was never trained."""
    first = files[0].read(name)
    return bool(first.any()) and all(same_bits(first, file.read(name)) for file in files[1:])


# Recognition


def _is_optimum(directory: Path) -> bool:
    return directory.name == SHARDS or any(
        entry.is_dir() for entry in [directory / SHARDS, *directory.glob(f"adapter_*/{SHARDS}")]
    )


def _is_nxd(directory: Path) -> bool:
    return directory.is_dir() and any(_has_rank_files(entry) for entry in [directory, *directory.iterdir()])


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
        directory, allow_pickle, allow_drift: As for `open_optimum`.
        model: As for `open_nxd`.

    Raises:
        FileError, SpecError: As `open_optimum` and `open_nxd`, or it is of neither kind.
    """
    kind = kind_of(directory)
    if kind == "optimum":
        return open_optimum(directory, allow_pickle=allow_pickle, allow_drift=allow_drift)
    if kind == "nxd":
        return open_nxd(directory, allow_pickle=allow_pickle, allow_drift=allow_drift, model=model)
    raise FileError(
        f"{directory}: holds neither adapter_*/{SHARDS} (Optimum Neuron) nor model/dp_rank_*.pt (neuronx-distributed); "
        f"give the directory of a sharded adapter."
    )
