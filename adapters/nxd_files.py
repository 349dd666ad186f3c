"""What do the checkpoints of neuronx-distributed's own LoRA hold? The same, as a `ShardedAdapter`.

(Those that hold our factors are read by `nxd_checkpoint`.)

The files say neither how a tensor is cut nor how large a layer is: the first follows from the names of modules, which
are those of Llama, and the second from the base model's config.

Source: neuronx-distributed, `modules/lora/model.py`, `modules/lora/config.py`, `trainer/checkpoint.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from adapters import nxd_checkpoint, rank_files, rank_layers, sharded_adapter
from adapters.rank_files import RankFile
from adapters.rank_layers import EMBEDDING, LINEAR, Factors, Fused
from adapters.sharded_adapter import Layer, ShardedAdapter
from lora_fn import FileError, LoraSpec, checkpoint, peft_format
from lora_fn.errors import Problems
from lora_fn.layer_spec import Heads
from lora_fn.layout import same_bits

# Last part of a module's name -> its kind, and which sizes its input and output have.
LAYERS: Mapping[str, tuple[str, str, str]] = {
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
# A key of its adapter_config.json -> PEFT's, and those of its keys that change nothing in a file of factors.
KEYS: Mapping[str, str] = {"lora_rank": "r"}
INERT = (
    "lora_load_tag",
    "lora_save_dir",
    "lora_verbose",
    "load_lora_from_ckpt",
    "merge_lora",
    "merge_sharded_lora",
    "save_lora_base",
    "save_lora_config_adapter",
)


def open_nxd(
    directory: Path, *, allow_pickle: bool, model: Path | None = None, allow_drift: bool = False
) -> ShardedAdapter:
    """An adapter of neuronx-distributed's own LoRA (`modules/lora`) or of ours, saved by its `save_checkpoint`.

    Args:
        directory: The checkpoint's tag, or the directory that holds one.
        allow_pickle, allow_drift: As for `optimum_files.open_optimum`.
        model: Directory of the base model; only its config.json is read, and only for its own LoRA.

    Raises:
        FileError: As `optimum_files.open_optimum`, and files that do not say what is needed.
        SpecError: A config that we cannot follow.
    """
    root = _root(directory)
    stages = rank_files.open_stages(root, allow_pickle=allow_pickle)
    if nxd_checkpoint.is_ours(stages):
        return nxd_checkpoint.open_ours(root, stages, allow_drift=allow_drift)
    spec = _spec(root, stages)
    sizes = _sizes(root, model)
    problems, layers = Problems(FileError), {}
    owners: dict[str, Path] = {}
    for files in stages:
        rank_files.check_same(files, problems)
        for name in files[0].tensors:
            if name in owners:
                problems.add(str(files[0].path), f"tensor {name!r} is also in {owners[name]}; use files of one save.")
            owners[name] = files[0].path
    problems.raise_if_any()
    for files in stages:
        found = rank_layers.by_layer(files[0].tensors, files[0].path)
        for path in found:
            try:
                layers[path] = _layer(path, found, files, sizes, spec)
            except ValueError as error:
                problems.add(str(files[0].path), str(error).replace("\n", "; "))
    problems.raise_if_any()
    return sharded_adapter.of_layers(spec, layers, allow_drift=allow_drift)


def _root(directory: Path) -> Path:
    if not directory.is_dir():
        raise FileError(f"{directory}: no such directory; check the path.")
    inside = [entry for entry in sorted(directory.iterdir()) if rank_files.is_checkpoint(entry)]
    if rank_files.is_checkpoint(directory) or not inside:
        return directory
    if len(inside) > 1:
        told = ", ".join(entry.name for entry in inside)
        raise FileError(f"{directory}: holds the checkpoints {told}; give the directory of one of them.")
    return inside[0]


def _spec(root: Path, stages: Sequence[Sequence[RankFile]]) -> LoraSpec:
    """The spec, out of the config that NxD put into the files or beside them."""
    first, *rest = [_config(file) for files in stages for file in files]
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
    taken = {KEYS.get(key, key): value for key, value in first.items() if key not in INERT}
    if taken.get("init_lora_weights") == "default":
        taken["init_lora_weights"] = True
    if isinstance(taken.get("target_modules"), list):
        parts = [part for name in taken["target_modules"] for part in _parts_on_disk(name)]
        taken["target_modules"] = sorted(set(parts))
    if type(taken.get("r")) is not int or type(taken.get("lora_alpha")) not in (int, float):
        raise FileError(
            f"{where}: gives rank {taken.get('r')!r} and alpha {taken.get('lora_alpha')!r}, expected numbers."
        )
    spec = peft_format.from_config(taken)
    rank_layers.check_plain(spec, str(where))
    return spec


def _config(file: RankFile) -> dict[str, Any] | None:
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
    return [f"{parent}{dot}{part}" for part in rank_layers.FUSED.get(last, (last,))]


def _sizes(root: Path, model: Path | None) -> dict[str, int]:
    """What each size of `LAYERS` is in the base model, and its numbers of heads."""
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


def _layer(
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
    last, shapes = path.rpartition(".")[2], rank_layers.shapes_of(path, found[path], files)
    whole = Factors(path=path, names=found[path], shapes=shapes, cuts=dict.fromkeys(shapes), files=files)
    if last in rank_layers.FUSED:
        grouped = any(ending.startswith("lora_B.weight_") for ending in shapes)
        fused, form = _grouped(whole, sizes) if grouped else _strided(whole, sizes)
        return rank_layers.fused_layer(_fused_cut(whole, form), fused, spec)
    if last not in LAYERS:
        raise ValueError(f"{path} is none of {sorted({*LAYERS, *rank_layers.FUSED})}, so how it is cut is not known")
    kind, inside, outside = LAYERS[last]
    factors = _plain_cut(whole, kind, sizes[inside], sizes[outside])
    lies = inside == "query" and factors.cuts.get("lora_A.weight") == 1
    return rank_layers.plain_layer(factors, spec, heads=_heads(path, found, files, sizes) if lies else None)


def _plain_cut(whole: Factors, kind: str, inside: int, outside: int) -> Factors:
    """How a layer that is not fused is cut.

    Raises:
        ValueError: Sizes that are not the base model's.
    """
    processes, form = len(whole.files), "local"
    shapes, cuts = dict(whole.shapes), dict(whole.cuts)
    dim, size = (1, inside) if kind == "row" else (0, outside)
    endings = {"row": ("lora_A.weight",), "column": ("lora_B.weight", "lora_B.bias")}.get(kind, ())
    a, b = EMBEDDING if EMBEDDING[0] in shapes else LINEAR
    other = {a: (1, inside), b: (0, outside)}
    for ending, shape in whole.shapes.items():
        if ending in endings and shape[dim] * processes == size:
            cuts[ending] = dim
        elif ending in endings and shape[dim] == size and size % processes == 0:
            cuts[ending], form = dim, "joined"
            shapes[ending] = tuple(n // processes if d == dim else n for d, n in enumerate(shape))
        elif ending in other and shape[other[ending][0]] != other[ending][1]:
            raise ValueError(f"{whole.path}.{ending} has shape {list(shape)}, the base model {outside} x {inside}")
    return replace(whole, shapes=shapes, cuts=cuts, form=form)


def _fused_cut(whole: Factors, form: str) -> Factors:
    """How a fused layer is cut: all but its lora_A along the rows."""
    parts = len(whole.files) if form == "joined" else 1
    rows = {ending: (n // parts, *rest) for ending, (n, *rest) in whole.shapes.items() if ending != "lora_A.weight"}
    return replace(whole, shapes={**whole.shapes, **rows}, cuts={**whole.cuts, **dict.fromkeys(rows, 0)}, form=form)


def _strided(whole: Factors, sizes: Mapping[str, int]) -> tuple[Fused, str]:
    """How a column layer with a stride is fused, and the form of its tensors in the files.

    Raises:
        ValueError: Sizes that are not the base model's.
    """
    tp, parts = len(whole.files), rank_layers.FUSED[whole.path.rpartition(".")[2]]
    rows, full = _rows(whole.shapes, "lora_B.weight"), tuple(sizes[LAYERS[part][2]] for part in parts)
    if rows not in (sum(full), sum(full) // tp) or any(size % tp for size in full):
        raise ValueError(f"{whole.path} has {rows} rows of lora_B, the base model {sum(full)}, cut into {tp}")
    blocks = tuple((number, size // tp) for number, size in enumerate(full))
    fused = Fused(names=parts, sizes=full, blocks={"lora_B.weight": blocks, "lora_B.bias": blocks})
    return fused, "joined" if rows == sum(full) else "local"


def _grouped(whole: Factors, sizes: Mapping[str, int]) -> tuple[Fused, str]:
    """How a grouped-query layer is fused, and the form of its tensors in the files.

    Raises:
        ValueError: Sizes that are not the base model's, or a query that was lost.
    """
    tp, q, kv = len(whole.files), sizes["query"], sizes["key_value"]
    rows, fuse_qkv = _rows(whole.shapes, "lora_B.weight"), "lora_B.weight_qkv" in whole.names
    copies = _copies(rows, tp, sizes)
    factors = [name for ending, name in whole.names.items() if ending.startswith("lora_B.weight_")]
    merged = tp > 1 and all(_is_same(name, whole.files) for name in factors)
    if copies < 1 or (copies > 1 and merged) or sizes["kv_heads"] * copies % tp:
        raise ValueError(
            f"{whole.path} has {rows} rows of query, key and value in every file, the base model {q}, {kv} and {kv}: "
            f"where neuronx-distributed merges copied key-value heads, it loses part of the query; save with "
            f"merge_sharded_lora=False"
        )
    fused = Fused(
        names=rank_layers.FUSED["qkv_proj"],
        sizes=(q, kv, kv),
        blocks=rank_layers.grouped_blocks((q // tp, kv * copies // tp, kv * copies // tp), fuse_qkv=fuse_qkv),
        heads=Heads(query=sizes["heads"], key_value=sizes["kv_heads"], multiplier=copies, order="tiled"),
        fuse_qkv=fuse_qkv,
    )
    return fused, "joined" if rows == q + 2 * kv else "local"


def _heads(
    path: str, found: Mapping[str, Mapping[str, str]], files: Sequence[RankFile], sizes: Mapping[str, int]
) -> Heads | None:
    """The heads of the attention that a layer is in, where they lie as neuronx-distributed's grouped-query layer has
    them; None where key-value heads are dealt out whole.
    """
    heads = Heads(query=sizes["heads"], key_value=sizes["kv_heads"], order="tiled")
    beside = f"{path.rpartition('.')[0]}.qkv_proj"
    rows = _rows(rank_layers.shapes_of(beside, found.get(beside, {}), files), "lora_B.weight_")
    if rows:
        return replace(heads, multiplier=_copies(rows, len(files), sizes))
    return heads if sizes["kv_heads"] % len(files) else None


def _rows(shapes: Mapping[str, tuple[int, ...]], beginning: str) -> int:
    """The rows of all tensors of a layer whose ending begins so."""
    return sum(shape[0] for ending, shape in shapes.items() if ending.startswith(beginning))


def _copies(rows: int, processes: int, sizes: Mapping[str, int]) -> int:
    """How often each key-value head is there, out of the rows of query, key and value on a process; 0 for no way."""
    if rows == sizes["query"] + 2 * sizes["key_value"]:
        return 1
    copies, rest = divmod(rows * processes - sizes["query"], 2 * sizes["key_value"])
    return 0 if rest or copies < 1 or sizes["heads"] % (copies * sizes["kv_heads"]) else copies


def _is_same(name: str, files: Sequence[RankFile]) -> bool:
    """Whether all processes wrote the same, and not the zeros of a factor that was never trained."""
    first = files[0].read(name)
    return bool(first.any()) and all(same_bits(first, file.read(name)) for file in files[1:])
