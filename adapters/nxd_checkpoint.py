"""What of ours is in a checkpoint of neuronx-distributed? The factors under our own names, and what they are.

Its `save_checkpoint` takes a dict in the place of a model, and user content beside it:

    factors = {name: p for name, p in model.named_parameters() if p.requires_grad}
    save_checkpoint(directory, tag, model=factors, user_content=nxd_checkpoint.user_content(model))

`lora-fn consolidate` makes a PEFT directory of that, without processes and without the model. `load_checkpoint` puts
into a dict whatever it finds; `adapters.fill` then checks it, and copies it into the factors.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from adapters import bind, files, rank_files, sharded_adapter
from adapters.parallel import attribute
from adapters.rank_files import RankFile
from adapters.sharded_adapter import Layer, ShardedAdapter, Source
from lora_fn import FileError, LayerSpec, peft_format, sharding
from lora_fn.errors import LoraFnError, Problems

KEY, FORMAT = "lora_fn", 1
FILE = "user_content.pt"
NAME = re.compile(r".+\.lora_(A|B|B_bias|magnitude_vector)(\.(?!weight|bias)\w+)?")


def user_content(model: nn.Module, content: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """What `save_checkpoint` should write beside the factors, so that they can be read without the model.

    Args:
        model: From `wrap`; the whole of it, before or behind its pipeline.
        content: What else the user content holds.

    Returns:
        The content, and under the key "lora_fn" a JSON text: the adapter's config and every layer's spec.

    Raises:
        TargetError: The model is not wrapped.
    """
    layers = {path: json.loads(spec.to_json()) for path, spec in bind.specs(model).items()}
    told = {"format": FORMAT, "adapter": files.config(model), "layers": layers}
    return {**(content or {}), KEY: json.dumps(told, sort_keys=True)}


def is_ours(stages: Sequence[Sequence[RankFile]]) -> bool:
    """Whether the files hold factors under our names, which those of neuronx-distributed's own LoRA never are."""
    return any(NAME.fullmatch(name) for files_ in stages for name in files_[0].tensors)


def open_ours(root: Path, stages: Sequence[Sequence[RankFile]], *, allow_drift: bool) -> ShardedAdapter:
    """The adapter in a checkpoint that was saved as above. Tensors that are no factors are left alone.

    Args:
        root: The checkpoint's tag.
        stages: Pipeline stage -> process -> what it wrote.
        allow_drift: As for `sharded_adapter.of_layers`.

    Raises:
        FileError: The user content does not say what is needed, or missing, superfluous or misshapen factors.
        SpecError: A config that we cannot follow.
    """
    config, specs = _told(root)
    problems, layers = Problems(FileError), {}
    places = {(path, n): f"{path}.{attribute(s, n)}" for path, s in specs.items() for n in sharding.stored_names(s)}
    wanted = {place: (specs[path], name) for (path, name), place in places.items()}
    held: dict[str, Sequence[RankFile]] = {}
    for files_ in stages:
        rank_files.check_same(files_, problems)
        for name in (name for name in files_[0].tensors if NAME.fullmatch(name) or name in wanted):
            if name in held:
                problems.add(str(files_[0].path), f"factor {name!r} is also in {held[name][0].path}; use one save.")
            held[name] = files_
    for name in sorted(set(wanted) ^ set(held)):
        what = "is in none of the files" if name in wanted else f"is no factor that {FILE} tells of"
        problems.add(str(root), f"{name!r} {what}; save all of the model's trainable parameters.")
    for name, files_ in held.items():
        if name in wanted:
            _check_factor(name, files_, *wanted[name], problems)
    problems.raise_if_any()
    for path, spec in specs.items():
        sources = {name: Source(name=places[path, name]) for name in sharding.stored_names(spec)}
        stage, *rest = {id(held[source.name]): held[source.name] for source in sources.values()}.values()
        if rest:
            problems.add(path, f"is in parts in {stage[0].path} and {rest[0][0].path}; use files of one save.")
        layers[path] = Layer(spec=spec, sources=sources, files=stage)
    problems.raise_if_any()
    return sharded_adapter.of_layers(peft_format.from_config(config), layers, allow_drift=allow_drift)


def _told(root: Path) -> tuple[Mapping[str, Any], dict[str, LayerSpec]]:
    """The adapter's config and the layers, out of the user content."""
    file = root / FILE
    if not file.is_file():
        raise FileError(
            f"{root}: has no {FILE}, so nothing says what its factors are; "
            f"save with user_content=nxd_checkpoint.user_content(model)."
        )
    content = rank_files.load(file)
    try:
        told = json.loads(content[KEY])
        if told["format"] != FORMAT:
            raise FileError(f"{file}: has format {told['format']!r}, expected {FORMAT}; use the version that wrote it.")
        return dict(told["adapter"]), {p: LayerSpec.from_json(json.dumps(of)) for p, of in told["layers"].items()}
    except (AttributeError, KeyError, TypeError, LoraFnError, ValueError) as error:
        if isinstance(error, FileError):
            raise
        raise FileError(
            f"{file}: does not say what the factors are ({error!r}); "
            f"save with user_content=nxd_checkpoint.user_content(model)."
        ) from error


def _check_factor(name: str, files_: Sequence[RankFile], spec: LayerSpec, parameter: str, problems: Problems) -> None:
    found, expected = tuple(files_[0].outline(name)[0]), sharding.local_shape(spec, parameter)
    if found != expected:
        problems.add(str(files_[0].path), f"{name!r} has shape {list(found)}, expected {list(expected)}.")
    if spec.axis.size not in (1, len(files_)):
        problems.add(
            str(files_[0].path.parent), f"holds {len(files_)} processes, and {name!r} lies over {spec.axis.size}."
        )
