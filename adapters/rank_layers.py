"""Which layer do the factors make that every process wrote a part of? Their endings, shapes and cuts, in our terms."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from adapters.rank_files import RankFile
from adapters.sharded_adapter import Layer, Source
from lora_fn import Axis, FileError, LoraSpec, SpecError, checkpoint, peft_format, targets
from lora_fn.layer_spec import FusedPart, Heads, LayerSpec
from lora_fn.spec import VARIANTS

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
# Last part of a fused module's name -> the names of its parts on disk.
FUSED: Mapping[str, tuple[str, ...]] = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
}
# Name of a module in Hugging Face's models -> the part of a fused layer that it is.
PART_NAMES: Mapping[str, str] = {module: part for part, module in peft_format.PART_MODULES.items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class Factors:
    """The tensors of one layer, as the files of a pipeline stage hold them.

    Args:
        path: Of the module in our model.
        names: Ending of a tensor's name ("lora_A.weight") -> the name.
        shapes: Ending -> shape of a process's part.
        cuts: Ending -> the dimension that is cut, None for none.
        files: Of the stage's processes, in order.
        form: As in `Source`.
    """

    path: str
    names: Mapping[str, str]
    shapes: Mapping[str, tuple[int, ...]]
    cuts: Mapping[str, int | None]
    files: Sequence[RankFile]
    form: str = "local"


@dataclass(frozen=True, slots=True, kw_only=True)
class Fused:
    """How a layer is fused.

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


# What trains more than factors.
_BESIDE = ("bias", "modules_to_save", "trainable_token_indices", "target_parameters", "layer_replication")


def check_plain(spec: LoraSpec, where: str) -> None:
    """Refuse the files of what is more than plain factors: other parameters are not in them, or are of one process.

    Raises:
        SpecError: With the fields that ask for it.
    """
    asked = [field for field, name in VARIANTS.items() if name == spec.variant]
    asked += [field for field in _BESIDE if getattr(spec, field) not in ((), "none")]
    if asked:
        raise SpecError(
            f"{where}: asks for {asked[0]}, of which these files do not hold all parameters; use an adapter without it."
        )


def by_layer(names: Iterable[str], file: Path) -> dict[str, dict[str, str]]:
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


def shapes_of(path: str, names: Mapping[str, str], files: Sequence[RankFile]) -> dict[str, tuple[int, ...]]:
    """Ending -> shape of the first process's part, of the tensors of a layer.

    Args:
        path: Of the layer.
        names: Ending -> name of the tensor.
        files: Of the stage's processes.

    Raises:
        ValueError: A shape that no factor has.
    """
    shapes = {ending: tuple(files[0].outline(name)[0]) for ending, name in names.items()}
    for ending, shape in shapes.items():
        if len(shape) != (1 if ending.endswith("bias") else 2) or 0 in shape:
            raise ValueError(f"{path}.{ending} has shape {list(shape)}, which no factor has")
    return shapes


def plain_layer(factors: Factors, spec: LoraSpec, *, heads: Heads | None = None) -> Layer:
    """A layer that is not fused.

    Args:
        factors: As the files hold them; the two of an embedding are whole in every file.
        spec: What the config says.
        heads: That a row layer's input holds.

    Raises:
        ValueError: Tensors that do not fit each other or the config.
    """
    path, shapes, cuts = factors.path, factors.shapes, factors.cuts
    a, b = EMBEDDING if EMBEDDING[0] in shapes else LINEAR
    bias = "lora_B.bias" in shapes
    if set(shapes) - {"lora_B.bias"} != {a, b} or (bias and a != LINEAR[0]):
        raise ValueError(f"{path} has {sorted(shapes)}, which are not the factors of a layer that we know")
    kind = KINDS.get((cuts[a], cuts[b]))
    if path.rpartition(".")[2] in FUSED:
        raise ValueError(f"{path} is fused, and nothing says how")
    if kind is None or (bias and cuts["lora_B.bias"] != (0 if kind == "column" else None)):
        raise ValueError(f"{path} is cut along {dict(cuts)}, expected the factors of a column or a row layer")
    if a == EMBEDDING[0] and kind != "linear":
        raise ValueError(f"{path} is cut along {dict(cuts)}, expected whole factors of an embedding")
    rank, alpha = _agreed(path, [path], shapes[a][0], spec)
    if shapes[b][1] != rank:
        raise ValueError(f"{path} has factors of shapes {list(shapes[a])} and {list(shapes[b])}, whose ranks differ")
    if bias and shapes["lora_B.bias"] != shapes[b][:1]:
        raise ValueError(f"{path}.lora_B.bias has shape {list(shapes['lora_B.bias'])}, expected {[shapes[b][0]]}")
    axis = Axis(size=len(factors.files))
    inside = shapes[a][1] * (axis.size if kind == "row" else 1)
    outside = shapes[b][0] * (axis.size if kind == "column" else 1)
    form = factors.form
    if a == EMBEDDING[0]:
        kind, form = "embedding", "canonical"
    layer = LayerSpec(
        kind=kind,
        in_features=inside,
        out_features=outside,
        rank=rank,
        alpha=alpha,
        use_rslora=spec.use_rslora,
        lora_bias=bias,
        dropout=spec.dropout,
        axis=axis,
        heads=heads if kind == "row" else None,
        pad=kind == "embedding" and inside % axis.size != 0,
    )
    sources = {ENDINGS[ending]: Source(name=factors.names[ending], form=form) for ending in shapes}
    return Layer(spec=layer, sources=sources, files=factors.files)


def fused_layer(factors: Factors, fused: Fused, spec: LoraSpec) -> Layer:
    """A fused layer with its one lora_A.

    Args:
        factors: As the files hold them.
        fused: How.
        spec: What the config says.

    Raises:
        ValueError: Tensors that do not fit each other, `fused` or the config.
    """
    path, shapes, cuts = factors.path, factors.shapes, factors.cuts
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
    sources = {"lora_A": Source(name=factors.names["lora_A.weight"])}
    for ending, blocks in fused.blocks.items():
        if ending not in shapes:
            continue
        kind, start = ENDINGS.get(ending, "lora_B"), 0
        for number, rows in blocks:
            sources[f"{kind}.{named[number]}"] = Source(
                name=factors.names[ending], start=start, length=rows, form=factors.form
            )
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
        axis=Axis(size=len(factors.files)),
    )
    return Layer(spec=layer, sources=sources, files=factors.files)


def grouped_blocks(rows: Sequence[int], *, fuse_qkv: bool) -> dict[str, tuple[tuple[int, int], ...]]:
    """Which ending of neuronx-distributed's grouped-query layer holds which local rows of query, key and value."""
    if fuse_qkv:
        return {"lora_B.weight_qkv": tuple(enumerate(rows))}
    return {f"lora_B.weight_{letter}": ((number, rows[number]),) for number, letter in enumerate("qkv")}


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
