"""What is in an adapter on disk, and how is it shown? Read without its model."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

import lora_fn
from adapters import experts
from lora_fn import (
    FileError,
    LayerSpec,
    LoraSpec,
    TargetError,
    Window,
    checkpoint,
    peft_format,
    sharding,
    targets,
    variants,
)
from lora_fn.checkpoint import TensorFiles
from lora_fn.errors import Problems


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterOnDisk:
    """A PEFT directory, read without its model.

    Args:
        spec: What its config says.
        specs: {path: LayerSpec} of its layers, of one process.
        files: Its tensors.
        names: {path: {parameter: name of the tensor}}.
        base_weights: {name of a model's tensor: name of the copy of it that the adapter carries}.
        replaced: {name of a model's tensor: name of the tensor that was trained in its place}.
        tokens: {name of a model's tensor: name of the tensor that was trained in the place of some of its rows}.
    """

    spec: LoraSpec
    specs: Mapping[str, LayerSpec]
    files: TensorFiles
    names: Mapping[str, Mapping[str, str]]
    base_weights: Mapping[str, str]
    replaced: Mapping[str, str]
    tokens: Mapping[str, str]

    def rows(self, name: str) -> tuple[int, ...]:
        """Which rows of a model's tensor were trained."""
        return peft_format.ids_of(name.removesuffix(".weight"), self.spec)

    def factors(self, path: str) -> dict[str, Tensor]:
        """The canonical factors of one layer."""
        spec = self.specs[path]
        return {
            name: peft_format.from_stored(self.files.read(key), spec, name) for name, key in self.names[path].items()
        }


_KINDS = {
    "lora_A.weight": ("linear", "lora_A"),
    "lora_B.weight": ("linear", "lora_B"),
    "lora_B.bias": ("linear", "lora_B_bias"),
    "lora_embedding_A": ("embedding", "lora_A"),
    "lora_embedding_B": ("embedding", "lora_B"),
    "lora_magnitude_vector": ("", "lora_magnitude_vector"),  # of either kind
    "lora_diag": ("linear", "lora_diag"),
}
_NAME = re.compile(rf"{re.escape(peft_format.PREFIX)}(?P<path>.+)\.(?P<suffix>{'|'.join(map(re.escape, _KINDS))})")


_TOKENS = f".{peft_format.TOKENS}{sharding.TOKENS}"


def open_adapter(directory: Path) -> AdapterOnDisk:
    """An adapter and the layers that its own tensors tell of.

    Raises:
        FileError: A damaged or missing file, or tensors that do not belong together.
        SpecError: A config that we cannot follow.
    """
    config, files = checkpoint.open_adapter(directory)
    spec = peft_format.from_config(config)
    names: dict[str, dict[str, str]] = {}
    kinds: dict[str, str] = {}
    base_weights: dict[str, str] = {}
    replaced: dict[str, str] = {}
    tokens: dict[str, str] = {}
    problems = Problems(FileError)
    raws = _raw_names(files, spec, problems, directory)
    for key in files.shapes:
        found = _NAME.fullmatch(key)
        plain = key.removeprefix(peft_format.PREFIX)
        if found:
            path = raws[found["path"]][0] if found["path"] in raws else found["path"]
            kind, name = _KINDS[found["suffix"]]
            kinds[path] = kind or kinds.get(path, "linear")
            names.setdefault(path, {})[name] = key
        elif key.startswith(peft_format.PREFIX) and key.endswith(".base_layer.weight"):
            base_weights[plain.replace(".base_layer.", ".")] = key
        elif key.endswith(_TOKENS) and peft_format.ids_of(plain.removesuffix(_TOKENS), spec):
            tokens[plain.removesuffix(_TOKENS) + ".weight"] = key
        elif spec.bias != "none" and key.endswith(".base_layer.bias"):
            replaced[plain.replace(".base_layer.", ".")] = key
        elif (spec.bias == "all" and key.endswith(".bias")) or _is_saved(plain, spec):
            replaced[plain] = key
        else:
            problems.add(str(directory), f"tensor {key!r} is no part of a LoRA adapter that we know; remove it.")
    specs = {}
    for path, of in names.items():
        if {"lora_A", "lora_B"} - set(of):
            problems.add(
                str(directory), f"{path} has {sorted(of)}, expected lora_A and lora_B; write the adapter again."
            )
            continue
        shapes = files.shapes[of["lora_A"]], files.shapes[of["lora_B"]]
        is_conv = kinds[path] == "linear" and len(shapes[0]) == 4 and shapes[1][2:] == (1, 1)
        if any(len(shape) != 2 for shape in shapes) and not is_conv:
            told = " and ".join(str(list(shape)) for shape in shapes)
            problems.add(
                str(directory),
                f"{path} has factors of shapes {told}, expected two dimensions each, or those of a conv2d; remove the "
                f"layer.",
            )
            continue
        try:
            options = variants.options_of(spec, path)
        except TargetError as error:
            problems.add(str(directory), str(error))
            continue
        (rank, inside), (out, other) = (shape[:2] for shape in shapes)
        raw = next((raw for at, raw in raws.values() if at == path), ())
        name = f"{path.removesuffix(f'.{peft_format.RAW}.{raw[0]}')}.{raw[0]}" if raw else path
        num_experts = max(1, rank // targets.rank_of(name, spec)) if raw else 1
        stacked = bool(raw) and (num_experts > 1 or raw[0] != "weight")
        rank, other = (n // num_experts if n % num_experts == 0 else n for n in (rank, other))
        blocks = {options.get("block_diagonal"): options.get("blocks", 1)}
        inside *= options.get("group_size", 1) * blocks.get("lora_A", 1)
        other *= blocks.get("lora_B", 1)
        if rank != other or rank != targets.rank_of(name, spec):
            problems.add(
                str(directory),
                f"{path} has ranks {rank} (lora_A) and {other} (lora_B), the config says "
                f"{targets.rank_of(name, spec)}; use the adapter's own config.",
            )
            continue
        layer = LayerSpec(
            kind="experts" if stacked else "conv2d" if is_conv else kinds[path],
            window=Window(kernel_size=(shapes[0][2], shapes[0][3])) if is_conv else None,
            num_experts=num_experts if stacked else None,
            raw=raw,
            in_features=inside,
            out_features=out,
            rank=rank,
            alpha=float(targets.alpha_of(name, spec)),
            use_rslora=spec.use_rslora,
            bias="lora_B_bias" in of,
            lora_bias="lora_B_bias" in of,
            fan_in_fan_out=bool(config.get("fan_in_fan_out")) and kinds[path] == "linear" and not (raw or is_conv),
            **options,
        )
        shapes_of = {
            name: peft_format.stored_shape(layer, name, sharding.canonical_shape(layer, name))
            for name in sharding.adapter_names(layer)
        }
        given = {name: tuple(files.shapes[key]) for name, key in of.items()}
        for name in sorted(name for name in {*given, *shapes_of} if given.get(name) != shapes_of.get(name)):
            are = [str(list(s[name])) if name in s else "none" for s in (given, shapes_of)]
            problems.add(
                str(directory),
                f"{path} has as {name} {are[0]}, its config says {are[1]}; use the adapter's own config.",
            )
        specs[path] = layer
    problems.raise_if_any()
    peft_format.check_layout(config, specs, str(directory))
    if not specs:
        raise FileError(f"{directory}: holds no LoRA factors; give the directory of a PEFT adapter.")
    return AdapterOnDisk(
        spec=spec, specs=specs, files=files, names=names, base_weights=base_weights, replaced=replaced, tokens=tokens
    )


def _is_saved(name: str, spec: LoraSpec) -> bool:
    """Whether a tensor is of what `modules_to_save` names, or tied to such."""
    module, _, parameter = name.rpartition(".")
    embeddings = (targets.OUTPUT_EMBEDDINGS[0], *targets.INPUT_EMBEDDINGS)
    is_tied = parameter == "weight" and module.rpartition(".")[2] in embeddings
    if spec.ensure_weight_tying and spec.modules_to_save and is_tied:
        return True
    return any(above.endswith(end) for above in targets.upwards(module) for end in spec.modules_to_save)


def _raw_names(
    files: TensorFiles, spec: LoraSpec, problems: Problems, directory: Path
) -> dict[str, tuple[str, tuple[str, ...]]]:
    """Module in PEFT's names, with ".base_layer" for each that it is nested in -> the path of the raw parameter that is
    adapted there, and `LayerSpec.raw` of it."""
    found: dict[str, list[str]] = {}
    for key in files.shapes if spec.target_parameters else ():
        match = _NAME.fullmatch(key)
        if match:
            owner = re.sub(r"(\.base_layer)+$", "", match["path"])
            if owner != match["path"] or not targets.is_target(owner, spec.target_modules or ()):
                found.setdefault(owner, []).append(match["path"])
    names: dict[str, tuple[str, tuple[str, ...]]] = {}
    for owner, paths in found.items():
        nested = sorted(set(paths), key=len, reverse=True)  # the innermost is declared first
        declared = experts.DECLARED.get(owner.rpartition(".")[2], ("weight",))
        adapted = [name for name in declared if targets.is_target(f"{owner}.{name}", spec.target_parameters)]
        if len(adapted) != len(nested):
            problems.add(
                str(directory),
                f"{owner} has adapters of {len(nested)} parameters, and of those that we know, target_parameters "
                f"names {adapted} there; adapt the model with it to see them.",
            )
            continue
        for number, path in enumerate(nested):
            names[path] = peft_format.raw_path(f"{owner}.{adapted[number]}"), tuple(adapted[number:])
    return names


def inspect(directory: Path) -> tuple[str, list[list[Any]]]:
    """What is in an adapter.

    Returns:
        A title, and the rows of a table whose first row is its head.

    Raises:
        FileError: Not a whole adapter.
    """
    source = open_adapter(directory)
    rows: list[list[Any]] = [["layer", "kind", "in", "out", "rank", "scaling", "|A|", "|B|", "|delta|"]]
    for path, spec in source.specs.items():
        factors = source.factors(path)
        norms = [factors["lora_A"], factors["lora_B"], lora_fn.delta(factors, spec)]
        told = [f"{t.float().norm():.4g}" for t in norms]
        rows.append([path, spec.kind, spec.in_features, spec.out_features, spec.rank, f"{spec.scaling:g}", *told])
    for name, key in [*source.replaced.items(), *source.tokens.items()]:
        t = source.files.read(key)
        rows.append([name, "trained", "", "x".join(map(str, t.shape)), "", "", "", "", f"{t.float().norm():.4g}"])
    num = sum(f.numel() for path in source.specs for f in source.factors(path).values())
    return f"{directory}: a PEFT adapter, {len(source.specs)} layers, {num:,} parameters", rows


def table(rows: list[list[Any]]) -> str:
    """Rows as text with columns that line up; the first row is the head."""
    text = [[str(cell) for cell in row] for row in rows]
    widths = [max(len(row[i]) for row in text) for i in range(len(text[0]))]
    numeric = [all(_is_number(row[i]) for row in text[1:]) for i in range(len(text[0]))]
    lines = [
        "  ".join(
            c.rjust(w) if right else c.ljust(w) for c, w, right in zip(row, widths, numeric, strict=True)
        ).rstrip()
        for row in text
    ]
    return "\n".join([lines[0], "  ".join("-" * w for w in widths), *lines[1:]])


def _is_number(text: str) -> bool:
    return re.fullmatch(r"[-+]?[\d,]*\.?\d+(e[-+]?\d+)?", text) is not None
