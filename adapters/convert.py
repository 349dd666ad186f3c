"""How does an adapter become part of a model on disk? File to file, without a model in memory."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import lora_fn
from lora_fn import FileError, LayerSpec, LoraFnError, LoraSpec, checkpoint, peft_format, sharding, targets
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
    """

    spec: LoraSpec
    specs: Mapping[str, LayerSpec]
    files: TensorFiles
    names: Mapping[str, Mapping[str, str]]

    def factors(self, path: str) -> dict[str, Tensor]:
        """The canonical factors of one layer."""
        return {name: self.files.read(key) for name, key in self.names[path].items()}


_KINDS = {
    "lora_A.weight": ("linear", "lora_A"),
    "lora_B.weight": ("linear", "lora_B"),
    "lora_B.bias": ("linear", "lora_B_bias"),
    "lora_embedding_A": ("embedding", "lora_A"),
    "lora_embedding_B": ("embedding", "lora_B"),
}
_NAME = re.compile(rf"{re.escape(peft_format.PREFIX)}(?P<path>.+)\.(?P<suffix>{'|'.join(map(re.escape, _KINDS))})")


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
    problems = Problems(FileError)
    for key in files.shapes:
        found = _NAME.fullmatch(key)
        if found:
            kinds[found["path"]], name = _KINDS[found["suffix"]]
            names.setdefault(found["path"], {})[name] = key
        elif not key.endswith(".base_layer.weight"):
            problems.add(str(directory), f"tensor {key!r} is no part of a LoRA adapter that we know; remove it.")
    specs = {}
    for path, of in names.items():
        if {"lora_A", "lora_B"} - set(of):
            problems.add(
                str(directory), f"{path} has {sorted(of)}, expected lora_A and lora_B; write the adapter again."
            )
            continue
        shapes = files.shapes[of["lora_A"]], files.shapes[of["lora_B"]]
        if any(len(shape) != 2 for shape in shapes):
            told = " and ".join(str(list(shape)) for shape in shapes)
            problems.add(
                str(directory), f"{path} has factors of shapes {told}, expected two dimensions each; remove the layer."
            )
            continue
        (rank, inside), (out, other) = shapes
        if rank != other or rank != targets.rank_of(path, spec):
            problems.add(
                str(directory),
                f"{path} has ranks {rank} (lora_A) and {other} (lora_B), the config says "
                f"{targets.rank_of(path, spec)}; use the adapter's own config.",
            )
            continue
        specs[path] = LayerSpec(
            kind=kinds[path],
            in_features=inside,
            out_features=out,
            rank=rank,
            alpha=float(targets.alpha_of(path, spec)),
            use_rslora=spec.use_rslora,
            bias="lora_B_bias" in of,
            lora_bias="lora_B_bias" in of,
            fan_in_fan_out=bool(config.get("fan_in_fan_out")) and kinds[path] == "linear",
        )
    problems.raise_if_any()
    if not specs:
        raise FileError(f"{directory}: holds no LoRA factors; give the directory of a PEFT adapter.")
    return AdapterOnDisk(spec=spec, specs=specs, files=files, names=names)


def merge(model: Path, adapter: Path, output: Path, *, quiet: bool = False) -> int:
    """Write a model with an adapter in its weights, in the same files as the model.

    Computed in fp32 and rounded once. Everything that is not adapted is copied. One file is in memory at a time.

    Args:
        model: Directory of a Hugging Face model.
        adapter: Directory of a PEFT adapter for it.
        output: A directory that does not exist yet.
        quiet: No progress bar.

    Returns:
        The number of weights that changed.

    Raises:
        FileError: A damaged or missing file, an adapter that does not fit the model, an output that exists, a result
            that is not finite. Nothing is written then.
    """
    from tqdm import tqdm

    if output.exists():
        raise FileError(f"{output}: exists; choose another --output.")
    checkpoint.check_above(output)
    base, source = checkpoint.open_model(model), open_adapter(adapter)
    plan = _plan(base, source, model, adapter)
    with checkpoint.replacing(output) as beside:
        beside.mkdir(parents=True)
        for file in sorted(model.iterdir()):
            if file.is_file() and file.suffix not in (".safetensors", ".bin", ".pt"):
                shutil.copyfile(file, beside / file.name)
        with tqdm(total=len(base.shapes), unit="tensor", desc="merge", disable=quiet) as bar:
            for file, names in base.by_file().items():
                merged = {}
                for name in names:
                    merged[name] = _merged(base, name, source, plan.get(name), output)
                    bar.update()
                checkpoint.write_tensors(beside / file.name, merged)
    return len({path for path, _ in plan.values()})


def _plan(base: TensorFiles, source: AdapterOnDisk, model: Path, adapter: Path) -> dict[str, tuple[str, str]]:
    """Name of the model's tensor -> (path of the layer, parameter), for what changes; all of it checked."""
    problems, plan = Problems(FileError), {}
    tied = checkpoint.read_json(model / "config.json").get("tie_word_embeddings", "lm_head.weight" not in base.shapes)
    for path, spec in source.specs.items():
        if tied and (spec.kind == "embedding" or path == "lm_head"):
            problems.add(
                str(model), f"{path} shares its weight with another layer, which would change too; untie them first."
            )
        for name in ("weight", "bias") if spec.lora_bias else ("weight",):
            full = f"{path}.{name}"
            expected = sharding.canonical_shape(spec, name)
            if full not in base.shapes:
                problems.add(str(model), f"has no {full!r}, which {adapter} adapts; give the model it was made for.")
            elif base.shapes[full] != expected:
                problems.add(
                    str(model), f"{full!r} has shape {list(base.shapes[full])}, {adapter} expects {list(expected)}."
                )
            plan[full] = (path, name)
    problems.raise_if_any()
    return plan


def _merged(
    base: TensorFiles, name: str, source: AdapterOnDisk, change: tuple[str, str] | None, output: Path
) -> Tensor:
    tensor = base.read(name)
    if change is None:
        return tensor
    path, parameter = change
    spec = source.specs[path]
    factors = source.factors(path)
    update = lora_fn.delta(factors, spec) if parameter == "weight" else factors["lora_B_bias"].float() * spec.scaling
    merged = (tensor.to(update.dtype) + update).to(tensor.dtype)
    if not torch.isfinite(merged).all():
        raise FileError(f"{output}: {name!r} would not be finite; nothing was written.")
    return merged


def inspect(directory: Path) -> tuple[str, list[list[Any]]]:
    """What is in an adapter or a training checkpoint.

    Returns:
        A title, and the rows of a table whose first row is its head.

    Raises:
        FileError: Neither of them.
    """
    if (directory / "state.json").is_file():
        return _inspect_checkpoint(directory)
    source = open_adapter(directory)
    rows: list[list[Any]] = [["layer", "kind", "in", "out", "rank", "scaling", "|A|", "|B|", "|delta|"]]
    for path, spec in source.specs.items():
        factors = source.factors(path)
        norms = [factors["lora_A"], factors["lora_B"], lora_fn.delta(factors, spec)]
        told = [f"{t.float().norm():.4g}" for t in norms]
        rows.append([path, spec.kind, spec.in_features, spec.out_features, spec.rank, f"{spec.scaling:g}", *told])
    num = sum(f.numel() for path in source.specs for f in source.factors(path).values())
    return f"{directory}: a PEFT adapter, {len(source.specs)} layers, {num:,} parameters", rows


def _inspect_checkpoint(directory: Path) -> tuple[str, list[list[Any]]]:
    state = checkpoint.read_json(directory / "state.json")
    files = TensorFiles([sorted(directory.glob("tp-*.safetensors"))[0]]) if any(directory.glob("tp-*")) else None
    if files is None:
        raise FileError(f"{directory}: has a state.json but no tp-*.safetensors; use a whole checkpoint.")
    try:
        specs = {path: LayerSpec.from_json(json.dumps(of)) for path, of in state["layers"].items()}
        title = f"a training checkpoint, step {state['step']}, tp {state['tp']}, process 0 of tp"
    except (AttributeError, KeyError, TypeError, LoraFnError) as error:
        raise FileError(f"{directory}: its state.json is not ours ({error!r}); use a whole checkpoint.") from error
    rows: list[list[Any]] = [["layer", "kind", "parameter", "shape here", "placement", "norm here"]]
    for path, spec in specs.items():
        for name in sharding.adapter_names(spec):
            p = files.read(f"factor/{path}.{name}")
            placement = sharding.rules(spec)[name].placement
            rows.append([path, spec.kind, name, list(p.shape), placement, f"{p.float().norm():.4g}"])
    return f"{directory}: {title}", rows


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
