"""How long does a merge take, and how much memory? Beside copying the files, and beside PEFT's.

    python -m benchmarks.merge NAME PLACE

The model is a bf16 checkpoint shaped as Llama's, in shards; its adapter has rank 16 on all linear layers. Before any
number is told, every element of ours is compared with the merge in float64, and with PEFT's.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from adapters.estimate import Shape
from benchmarks import disk, rows, timing
from benchmarks.configs import config_of
from benchmarks.options import Options
from lora_fn import LoraSpec, checkpoint, peft_format

RANK, HEADS = 16, 16
SHARD = 250_000_000  # bytes
NOT_NEAREST = "elements that are not the float64 merge, rounded once"


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """Of the model."""

    hidden: int = 2048
    intermediate: int = 5632
    vocabulary: int = 32000
    layers: int = 1

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """{name: (out, in)} in each layer."""
        square, wide = (self.hidden, self.hidden), (self.intermediate, self.hidden)
        return {
            **{f"self_attn.{part}_proj": square for part in "qkvo"},
            **{"mlp.gate_proj": wide, "mlp.up_proj": wide, "mlp.down_proj": wide[::-1]},
        }

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of all tensors, by name."""
        found: dict[str, tuple[int, ...]] = {
            "model.embed_tokens.weight": (self.vocabulary, self.hidden),
            "model.norm.weight": (self.hidden,),
        }
        for i in range(self.layers):
            found |= {f"model.layers.{i}.{name}.weight": shape for name, shape in self.linears.items()}
            norms = ("input", "post_attention")
            found |= {f"model.layers.{i}.{norm}_layernorm.weight": (self.hidden,) for norm in norms}
        return found | {"lm_head.weight": (self.vocabulary, self.hidden)}

    @property
    def bytes(self) -> int:
        """Of the weights."""
        return sum(2 * torch.Size(shape).numel() for shape in self.shapes.values())


def size_of(options: Options) -> Size:
    """Half a GB; with --long a GB."""
    if options.tiny:
        return Size(hidden=64, intermediate=96, vocabulary=128, layers=2)
    if options.quick:
        return Size(hidden=1024, intermediate=2816, vocabulary=16000, layers=4)
    return Size(layers=7 if options.long else 2)


def cases(options: Options) -> list[str]:
    """The one."""
    size = size_of(options)
    return [f"merge {size.bytes / 1e9:.2g} GB bf16, L{size.layers} r{RANK}"]


def run(case: str, options: Options) -> Iterable[rows.Row]:
    """The rows."""
    size = size_of(options)
    with tempfile.TemporaryDirectory(prefix="bench-") as directory:
        place, wrong = Path(directory), list[int]()
        make_model(place / "model", size)
        make_adapter(place / "adapter", size)

        def check() -> str:
            wrong.append(not_nearest(place, size))
            total, differing, apart = compare(place / "ours", place / "PEFT")
            if differing > max(2, 1e-4 * total) or apart > max(1, 1e-6 * total):
                raise timing.Wrong(f"of {total} elements {differing} are not PEFT's, {apart} by over a step of bf16")
            return f"of {total:,} elements {differing:,} are not PEFT's, which rounds in between"

        yield from disk.measured("B9", case, "merge", list(PROGRAMS), place, check, options)
        yield rows.count("B9", case, "ours", NOT_NEAREST, "elements", wrong[0])


def make_model(place: Path, size: Size) -> None:
    """Write the checkpoint, a shard at a time."""
    place.mkdir()
    sizes = {name: getattr(size, name) for name in ("hidden", "intermediate", "layers", "vocabulary")}
    shape = Shape(name="", heads=HEADS, key_value_heads=HEADS, **sizes)
    checkpoint.write_json(place / "config.json", config_of(shape, dtype="bfloat16"))
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    filled = 0
    for name, shape in size.shapes.items():
        more = 2 * torch.Size(shape).numel()
        if filled + more > SHARD and shards[-1]:
            shards.append({})
            filled = 0
        shards[-1][name] = shape
        filled += more
    torch.manual_seed(0)
    weight_map = {}
    for i, of in enumerate(shards):
        file = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        tensors = {name: (0.02 * torch.randn(shape)).bfloat16() for name, shape in of.items()}
        checkpoint.write_tensors(place / file, tensors)
        weight_map |= dict.fromkeys(of, file)
    checkpoint.write_json(place / checkpoint.INDEX, {"metadata": {"total_size": size.bytes}, "weight_map": weight_map})


def make_adapter(place: Path, size: Size) -> None:
    """Write an adapter as PEFT would: fp32, both factors filled."""
    torch.manual_seed(1)
    paths = {f"model.layers.{i}.{path}": shape for i in range(size.layers) for path, shape in size.linears.items()}
    tensors = {}
    for path, (out, inside) in paths.items():
        tensors[f"{peft_format.PREFIX}{path}.lora_A.weight"] = 0.02 * torch.randn(RANK, inside)
        tensors[f"{peft_format.PREFIX}{path}.lora_B.weight"] = 0.02 * torch.randn(out, RANK)
    spec = LoraSpec(rank=RANK, alpha=2 * RANK, task_type="CAUSAL_LM")
    config = peft_format.to_config(spec, list(paths), [*paths, "lm_head", "model.embed_tokens"])
    checkpoint.save_adapter(place, config, tensors)


# ------------------------------------------------------------------------------------------------------ what is right


def not_nearest(place: Path, size: Size) -> int:
    """How many elements of ours are not the nearest bf16 to the merge in float64."""
    base, merged = checkpoint.open_model(place / "model"), checkpoint.open_model(place / "ours")
    _, factors = checkpoint.open_adapter(place / "adapter")
    wrong = 0
    for name in size.shapes:
        exact, path = base.read(name).double(), peft_format.PREFIX + name.removesuffix(".weight")
        if f"{path}.lora_A.weight" in factors.shapes:
            down, up = (factors.read(f"{path}.lora_{which}.weight").double() for which in "AB")
            exact = exact + 2 * up @ down
        wrong += int((~nearest(merged.read(name), exact)).sum())
    return wrong


def nearest(x: Tensor, exact: Tensor) -> Tensor:
    """Whether no neighbour of x [...] in its dtype is nearer to what is exact."""
    off = (x.double() - exact).abs()
    ends = (torch.full_like(x, end) for end in (float("inf"), float("-inf")))
    return torch.stack([off <= (torch.nextafter(x, end).double() - exact).abs() for end in ends]).all(0)


def compare(ours: Path, theirs: Path) -> tuple[int, int, int]:
    """(elements, those that differ, those that differ by more than a step) between two merged models."""
    a, b = checkpoint.open_model(ours), checkpoint.open_model(theirs)
    if a.shapes != b.shapes or a.dtypes != b.dtypes:
        raise timing.Wrong("the merged model has other tensors than PEFT's")
    total = differing = apart = 0
    for name in a.shapes:
        x, y = a.read(name), b.read(name)
        total += x.numel()
        steps = (ordered(x) - ordered(y)).abs()
        differing += int((steps > 0).sum())
        apart += int((steps > 1).sum())
    return total, differing, apart


def ordered(x: Tensor) -> Tensor:
    """bf16 as integers in the same order, neighbours one apart."""
    bits = x.view(torch.int16).int()
    return torch.where(bits < 0, -(bits & 0x7FFF), bits)


# ----------------------------------------------------------------------------------------- in a process of its own


def copied(place: Path, output: Path) -> Callable[[], object]:
    """The files of the model, as they are."""
    return lambda: disk.copy(place / "model", output)


def ours(place: Path, output: Path) -> Callable[[], object]:
    """`lora-fn merge`."""
    import tqdm  # noqa: F401  (merge imports it late)

    from adapters.merge import merge

    return lambda: merge(place / "model", [place / "adapter"], output, quiet=True)


def peft(place: Path, output: Path) -> Callable[[], object]:
    """Stock PEFT."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, logging

    logging.disable_progress_bar()

    def run() -> None:
        base = AutoModelForCausalLM.from_pretrained(place / "model", dtype=torch.bfloat16)
        PeftModel.from_pretrained(base, place / "adapter").merge_and_unload().save_pretrained(output)

    return run


PROGRAMS: Mapping[str, disk.Prepare] = {disk.COPY: copied, "ours": ours, "PEFT": peft}

if __name__ == "__main__":
    disk.work(PROGRAMS, sys.argv[1], Path(sys.argv[2]))
