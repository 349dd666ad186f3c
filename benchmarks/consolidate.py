"""How long does it take to consolidate, cut and cut again an adapter, and how much memory? Beside copying its files.

    python -m benchmarks.consolidate NAME PLACE

The adapter is in fp32, of all linear layers of a Llama. Before any number is told, what is written is compared with the
adapter that was cut, or with its parts, bit for bit.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from adapters.estimate import Shape
from benchmarks import disk, rows, timing
from benchmarks.configs import config_of
from benchmarks.options import Options
from lora_fn import LoraSpec, checkpoint, peft_format

TP, FEWER, HEADS, KEY_VALUE_HEADS = 8, 2, 32, 8
OVER_NEEDED, OVER_FILES = "bytes read, over those of the adapter", "bytes read, over those of the files"
WHY = "every copy of a factor is read, and compared with the others: one that drifted would be seen"
ABOVE = "memory above import, over the adapter and its largest tensor"


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """Of the adapter and its model."""

    hidden: int = 4096
    intermediate: int = 14336
    layers: int = 2
    rank: int = 64

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """{name: (out, in)} in each layer."""
        key_value = self.hidden // HEADS * KEY_VALUE_HEADS
        outs = {"q": self.hidden, "k": key_value, "v": key_value, "o": self.hidden}
        return {
            **{f"self_attn.{part}_proj": (out, self.hidden) for part, out in outs.items()},
            **{f"mlp.{part}_proj": (self.intermediate, self.hidden) for part in ("gate", "up")},
            "mlp.down_proj": (self.hidden, self.intermediate),
        }


def size_of(options: Options) -> Size:
    """Parts of 150 MB; with --long a GB."""
    if options.tiny:
        return Size(hidden=64, intermediate=96, layers=2, rank=4)
    return Size(layers=14 if options.long else 1 if options.quick else 2)


CASES: Mapping[str, tuple[str, str]] = {  # case -> (what is done, which directory is copied beside it)
    f"TP {TP} to 1": ("consolidate", "parts"),
    f"TP 1 to {TP}": ("shard", "parts"),
    f"TP {TP} to {FEWER}": ("reshard", "parts"),
}


def cases(options: Options) -> list[str]:
    """What an adapter is cut from and to."""
    return [next(iter(CASES))] if options.quick else list(CASES)


def run(case: str, options: Options) -> Iterable[rows.Row]:
    """The rows of a case."""
    what, source = CASES[case]
    size = size_of(options)
    with tempfile.TemporaryDirectory(prefix="bench-") as directory:
        place = Path(directory)
        make(place, size)
        (place / "what").write_text(what)
        given = place / ("adapter" if what == "shard" else source)
        files, whole = (sum(file.stat().st_size for file in of.iterdir()) for of in (given, place / "adapter"))
        weights = (place / "adapter" / checkpoint.WEIGHTS).stat().st_size
        largest = 4 * size.rank * max(size.intermediate, size.hidden)
        told = f"{case}, {files / 1e6:.3g} MB fp32, L{size.layers} r{size.rank}"
        for row in disk.measured(
            "B10", told, "consolidate", list(PROGRAMS), place, lambda: check(place, what), options
        ):
            yield row
            if row.program == "ours" and row.metric in (disk.READ, disk.MEMORY) and row.minimum is not None:
                over = {OVER_NEEDED: (whole, "" if what == "shard" else WHY), OVER_FILES: (files, "")}
                over = over if row.metric == disk.READ else {ABOVE: (weights + largest, "")}
                for metric, (size, note) in over.items():
                    values = {key: getattr(row, key) / size for key in ("minimum", "median", "spread")}
                    yield replace(row, metric=metric, unit="x", note=note, **values)


def make(place: Path, size: Size) -> None:
    """Write the model's config, an adapter, and its parts."""
    from adapters import sharded

    sizes = {name: getattr(size, name) for name in ("hidden", "intermediate", "layers")}
    shape = Shape(name="", heads=HEADS, key_value_heads=KEY_VALUE_HEADS, vocabulary=512, **sizes)
    model = config_of(shape, dtype="float32")
    (place / "model").mkdir()
    checkpoint.write_json(place / "model" / "config.json", model)
    torch.manual_seed(0)
    paths = {f"model.layers.{i}.{path}": sizes for i in range(size.layers) for path, sizes in size.linears.items()}
    tensors = {}
    for path, (out, inside) in paths.items():
        tensors[f"{peft_format.PREFIX}{path}.lora_A.weight"] = 0.02 * torch.randn(size.rank, inside)
        tensors[f"{peft_format.PREFIX}{path}.lora_B.weight"] = 0.02 * torch.randn(out, size.rank)
    spec = LoraSpec(rank=size.rank, alpha=2 * size.rank)
    config = peft_format.to_config(spec, list(paths), [*paths, "lm_head"])
    checkpoint.save_adapter(place / "adapter", config, tensors)
    sharded.shard(place / "adapter", place / "parts", tp=TP, model=place / "model", quiet=True)


def check(place: Path, what: str) -> str:
    """Refuse a result that is not the adapter, or its parts, bit for bit."""
    from adapters import sharded

    if what == "shard":
        same = all(
            (place / "ours" / f.name).read_bytes() == f.read_bytes() for f in (place / "parts").glob("*.safetensors")
        )
        if not same:
            raise timing.Wrong("what was cut is not what was cut before")
        return "the same parts, bit for bit"
    whole = place / "ours"
    if what == "reshard":
        whole = place / "whole"
        sharded.consolidate(place / "ours", whole, quiet=True)
    (config, a), (expected, b) = checkpoint.open_adapter(whole), checkpoint.open_adapter(place / "adapter")
    if config != expected or a.shapes != b.shapes or a.dtypes != b.dtypes:
        raise timing.Wrong("the result has another config or other tensors")
    for name in a.shapes:
        if not torch.equal(a.read(name).view(torch.int32), b.read(name).view(torch.int32)):
            raise timing.Wrong(f"{name} is not what was cut")
    return "the adapter that was cut, bit for bit"


# ----------------------------------------------------------------------------------------- in a process of its own


def copied(place: Path, output: Path) -> Callable[[], object]:
    """The files of the parts, as they are."""
    return lambda: disk.copy(place / "parts", output)


def ours(place: Path, output: Path) -> Callable[[], object]:
    """`lora-fn consolidate`, `shard` or `reshard`."""
    import tqdm  # noqa: F401  (imported late, as what reads a model's config)
    import transformers.models.llama.modeling_llama  # noqa: F401

    from adapters import sharded

    parts = place / "parts"
    return {
        "consolidate": lambda: sharded.consolidate(parts, output, quiet=True),
        "shard": lambda: sharded.shard(place / "adapter", output, tp=TP, model=place / "model", quiet=True),
        "reshard": lambda: sharded.reshard(parts, output, to_tp=FEWER, quiet=True),
    }[(place / "what").read_text()]


PROGRAMS: Mapping[str, disk.Prepare] = {disk.COPY: copied, "ours": ours}

if __name__ == "__main__":
    disk.work(PROGRAMS, sys.argv[1], Path(sys.argv[2]))
