"""What is an adapter whose factors lie in parts, whoever wrote it? Its specs, and each layer's local factors."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from adapters.rank_files import RankFile
from lora_fn import FileError, LoraSpec, sharding
from lora_fn.errors import Problems
from lora_fn.layer_spec import LayerSpec
from lora_fn.layout import Layout, same_bits
from lora_fn.reshard import cut_dim


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardedAdapter:
    """An adapter in parts, open for reading.

    Args:
        spec: What its user asked for.
        specs: Path of the module in our model -> the layer; the size of its axis is the number of processes.
        locals: Path -> parameter name -> local factor, of every process in order. Read when called.
        dtypes: Path -> parameter name -> dtype.
    """

    spec: LoraSpec
    specs: Mapping[str, LayerSpec]
    locals: Callable[[str], list[dict[str, Tensor]]]
    dtypes: Callable[[str], dict[str, torch.dtype]]


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


def of_layers(spec: LoraSpec, layers: Mapping[str, Layer], *, allow_drift: bool) -> ShardedAdapter:
    """The adapter that has these layers.

    Args:
        spec: What its user asked for.
        layers: Path of the module in our model -> the layer.
        allow_drift: Where copies of a factor differ between processes, take the first.
    """
    return ShardedAdapter(
        spec=spec,
        specs={path: layer.spec for path, layer in layers.items()},
        locals=lambda path: _locals(path, layers[path], allow_drift=allow_drift),
        dtypes=lambda path: {
            parameter: layers[path].files[0].outline(source.name)[1]
            for parameter, source in layers[path].sources.items()
        },
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
    drift = 0.0
    if layout is None or source.form != "local":
        drift = _furthest(read, [read[0]] * len(read))
    if layout is None:
        return [read[0].clone() for _ in read], drift
    dim = cut_dim(layer.spec, parameter)
    if source.form == "joined":
        read = list(read[0].chunk(len(read), dim))
    if source.form == "canonical":
        read = _cut(read[0], layout, dim)
    stop = None if source.length is None else source.start + source.length
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
