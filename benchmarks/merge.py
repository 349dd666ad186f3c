"""How long does a merge take, and how much memory? Beside copying the files with sync, and beside PEFT.

    python benchmarks/merge.py --gigabytes 1 --rounds 5

makes a bf16 checkpoint shaped like Llama's, in shards, and an adapter of rank 16 on all linear layers. In every round
each of the three works in a process of its own, one after the other. Imports are not timed. Before any number is
printed, the tensors of ours and of PEFT's are compared.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import torch

from lora_fn import LoraSpec, checkpoint, peft_format

HIDDEN, INTERMEDIATE, VOCABULARY, HEADS, RANK = 2048, 5632, 32000, 16, 16
LINEARS = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (HIDDEN, HIDDEN),
    "self_attn.v_proj": (HIDDEN, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (INTERMEDIATE, HIDDEN),
    "mlp.up_proj": (INTERMEDIATE, HIDDEN),
    "mlp.down_proj": (HIDDEN, INTERMEDIATE),
}
OF_LAYER = {f"{path}.weight": shape for path, shape in LINEARS.items()} | {
    f"{norm}_layernorm.weight": (HIDDEN,) for norm in ("input", "post_attention")
}
SHARD = 250_000_000  # bytes
WORKERS = ("copy", "ours", "peft")


def num_layers(gigabytes: float) -> int:
    size = sum(torch.Size(shape).numel() for shape in OF_LAYER.values())
    return max(1, round((gigabytes * 1e9 / 2 - 2 * VOCABULARY * HIDDEN) / size))


def make_model(place: Path, layers: int) -> None:
    """Write the checkpoint, a shard at a time."""
    place.mkdir()
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS,
        "vocab_size": VOCABULARY,
        "tie_word_embeddings": False,
    }
    checkpoint.write_json(place / "config.json", config)
    shapes = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN), "model.norm.weight": (HIDDEN,)}
    for i in range(layers):
        shapes |= {f"model.layers.{i}.{name}": shape for name, shape in OF_LAYER.items()}
    shapes |= {"lm_head.weight": (VOCABULARY, HIDDEN)}
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    filled = 0
    for name, shape in shapes.items():
        size = 2 * torch.Size(shape).numel()
        if filled + size > SHARD and shards[-1]:
            shards.append({})
            filled = 0
        shards[-1][name] = shape
        filled += size
    torch.manual_seed(0)
    weight_map = {}
    for i, of in enumerate(shards):
        file = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        tensors = {name: (0.02 * torch.randn(shape)).bfloat16() for name, shape in of.items()}
        checkpoint.write_tensors(place / file, tensors)
        weight_map |= dict.fromkeys(of, file)
    total = sum(2 * torch.Size(shape).numel() for shape in shapes.values())
    checkpoint.write_json(place / checkpoint.INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def make_adapter(place: Path, layers: int) -> None:
    """Write an adapter as PEFT would: fp32, both factors filled."""
    torch.manual_seed(1)
    paths = {f"model.layers.{i}.{path}": shape for i in range(layers) for path, shape in LINEARS.items()}
    tensors = {}
    for path, (out, inside) in paths.items():
        tensors[f"{peft_format.PREFIX}{path}.lora_A.weight"] = 0.02 * torch.randn(RANK, inside)
        tensors[f"{peft_format.PREFIX}{path}.lora_B.weight"] = 0.02 * torch.randn(out, RANK)
    spec = LoraSpec(rank=RANK, alpha=2 * RANK, task_type="CAUSAL_LM")
    config = peft_format.to_config(spec, list(paths), [*paths, "lm_head", "model.embed_tokens"])
    checkpoint.save_adapter(place, config, tensors)


# ----------------------------------------------------------------------------------------- in a process of its own


def memory(key: str) -> int:
    """Bytes of this process: VmRSS now, VmHWM at most."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


def work(name: str, model: Path, adapter: Path, output: Path) -> None:
    """Do one merge (or copy) and print what it took, as JSON."""
    if name == "copy":

        def run() -> None:
            output.mkdir()
            for file in sorted(model.iterdir()):
                shutil.copyfile(file, output / file.name)

    elif name == "ours":
        import tqdm  # noqa: F401  (merge imports it late)

        from adapters.merge import merge

        def run() -> None:
            merge(model, [adapter], output, quiet=True)

    else:
        from peft import PeftModel
        from transformers import AutoModelForCausalLM, logging

        logging.disable_progress_bar()

        def run() -> None:
            base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
            PeftModel.from_pretrained(base, adapter).merge_and_unload().save_pretrained(output)

    Path("/proc/self/clear_refs").write_text("5")  # the peak starts here
    before, start = memory("VmRSS"), time.perf_counter()
    run()
    done = time.perf_counter() - start
    for file in [*output.iterdir(), output]:
        checkpoint.flush(file)
    synced = time.perf_counter() - start
    print(json.dumps({"seconds": done, "synced": synced, "memory": memory("VmHWM") - before}))


# ------------------------------------------------------------------------------------------------------ the rounds


def compare(ours: Path, theirs: Path) -> tuple[int, int, int]:
    """(elements, those that differ, those that differ by more than a step) between two merged models."""
    a, b = checkpoint.open_model(ours), checkpoint.open_model(theirs)
    assert a.shapes == b.shapes and a.dtypes == b.dtypes
    total = differing = apart = 0
    for name in a.shapes:
        x, y = a.read(name), b.read(name)
        total += x.numel()
        if not torch.equal(x, y):
            steps = (ordered(x) - ordered(y)).abs()
            differing += int((steps > 0).sum())
            apart += int((steps > 1).sum())
            assert float((x.float() - y.float()).abs().max()) <= 2.0**-7 * float(x.float().abs().max())
    return total, differing, apart


def ordered(x: torch.Tensor) -> torch.Tensor:
    """bf16 as integers in the same order, neighbours one apart."""
    bits = x.view(torch.int16).int()
    return torch.where(bits < 0, -(bits & 0x7FFF), bits)


def measure(name: str, place: Path, output: Path) -> dict[str, float]:
    os.sync()
    words = [sys.executable, __file__, "--worker", name, "--place", str(place), "--output", str(output)]
    done = subprocess.run(words, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--place", type=Path, help="where the files go (a temporary directory)")
    parser.add_argument("--worker", choices=WORKERS, help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work(options.worker, options.place / "model", options.place / "adapter", options.output)
        return
    with tempfile.TemporaryDirectory(dir=options.place) as directory:
        report(Path(directory), options.gigabytes, options.rounds)


def report(place: Path, gigabytes: float, rounds: int) -> None:
    layers = num_layers(gigabytes)
    make_model(place / "model", layers)
    make_adapter(place / "adapter", layers)
    shards = sorted((place / "model").glob("*.safetensors"))
    size = sum(file.stat().st_size for file in shards)
    rows: dict[str, list[dict[str, float]]] = {name: [] for name in WORKERS}
    told = None
    for _ in range(rounds):
        for name in WORKERS:
            rows[name].append(measure(name, place, place / name))
        told = told or compare(place / "ours", place / "peft")
        for name in WORKERS:
            shutil.rmtree(place / name)
    total, differing, apart = told
    assert differing <= 1e-4 * total and apart <= 1e-6 * total
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "peft"))
    print(f"{size / 1e9:.2f} GB bf16, {len(shards)} files, {layers} layers, rank {RANK}; {rounds} rounds; {versions}")
    print(f"Python {platform.python_version()}, {os.cpu_count()} CPU cores, load {os.getloadavg()[0]:.1f}")
    print(f"ours and PEFT's: of {total:,} elements {differing:,} differ, {apart:,} by more than one step of bf16")
    print("        seconds min (median)   with sync min (median)   MB above import")
    for name, of in rows.items():
        cells = []
        for key in ("seconds", "synced"):
            values = [row[key] for row in of]
            cells.append(f"{min(values):.2f} ({statistics.median(values):.2f})")
        print(f"{name:6} {cells[0]:>20} {cells[1]:>24} {max(row['memory'] for row in of) / 1e6:>17.0f}")
    best = {name: {key: min(row[key] for row in of) for key in ("seconds", "synced")} for name, of in rows.items()}
    print(f"PEFT without sync / ours with sync: {best['peft']['seconds'] / best['ours']['synced']:.1f}")
    print(f"PEFT with sync / ours with sync: {best['peft']['synced'] / best['ours']['synced']:.1f}")
    print(f"ours with sync / copy with sync: {best['ours']['synced'] / best['copy']['synced']:.2f}")


if __name__ == "__main__":
    main()
