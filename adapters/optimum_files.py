"""What do Optimum Neuron's sharded adapters hold? `adapter_<name>/adapter_shards`, as a `ShardedAdapter`.

Beside the files of the processes, a file of metadata per pipeline stage says how every tensor is cut and how layers are
fused.

Source: Optimum Neuron, `peft/peft_model.py`, `models/training/transformations_utils.py`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adapters import rank_files, rank_layers, sharded_adapter
from adapters.rank_files import RankFile
from adapters.rank_layers import PART_NAMES, Factors, Fused
from adapters.sharded_adapter import Layer, ShardedAdapter
from lora_fn import FileError, LoraSpec, checkpoint, peft_format
from lora_fn.errors import Problems
from lora_fn.layer_spec import Heads

SHARDS = "adapter_shards"
METADATA = re.compile(r"mp_metadata_pp_rank_(\d+)\.json")
# The module whose input lies like the query heads.
OUTPUT = "o_proj"


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
    root = _root(directory)
    spec = peft_format.from_config(checkpoint.read_json(root / checkpoint.CONFIG))
    rank_layers.check_plain(spec, str(root / checkpoint.CONFIG))
    stages = rank_files.open_stages(root / SHARDS, allow_pickle=allow_pickle)
    described = _metadata(root / SHARDS, stages, root.name.removeprefix("adapter_"))
    problems, layers = Problems(FileError), {}
    owners = _owners(stages, described, problems)
    problems.raise_if_any()
    for files, metadata, mine in zip(stages, described, owners, strict=True):
        for path, names in rank_layers.by_layer(mine, files[0].path).items():
            try:
                layers[path] = _layer(path, names, files, metadata, spec)
            except ValueError as error:
                problems.add(str(files[0].path), str(error).replace("\n", "; "))
    problems.raise_if_any()
    return sharded_adapter.of_layers(spec, layers, allow_drift=allow_drift)


def _root(directory: Path) -> Path:
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
        blocks=rank_layers.grouped_blocks((q, kv, kv), fuse_qkv=fuse_qkv),
        heads=heads,
        fuse_qkv=fuse_qkv,
    )
    return _told(told, "gqa_qkv_projection_name", str), described, heads


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
        rank_files.check_same(files, problems)
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


def _layer(
    path: str, names: Mapping[str, str], files: Sequence[RankFile], metadata: StageMetadata, spec: LoraSpec
) -> Layer:
    """One layer, in our terms.

    Raises:
        ValueError: Tensors that do not fit each other, the metadata or the config.
    """
    cuts = {ending: metadata.cuts[name] for ending, name in names.items()}
    shapes = rank_layers.shapes_of(path, names, files)
    factors = Factors(path=path, names=names, shapes=shapes, cuts=cuts, files=files)
    if path in metadata.fused:
        return rank_layers.fused_layer(factors, metadata.fused[path], spec)
    return rank_layers.plain_layer(factors, spec, heads=metadata.rows.get(path))
