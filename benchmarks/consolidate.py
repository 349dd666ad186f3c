"""How long does it take to consolidate a sharded adapter, and how much memory? Beside copying its files with sync.

    python benchmarks/consolidate.py --gigabytes 1 --tp 8 --rounds 5

makes an fp32 adapter of all linear layers of a Llama of hidden size 4096, and cuts it, so that the parts have that many
bytes together. In every round each of the two works in a process of its own, one after the other; imports are not
timed, and what is read lies in the page cache for both. Before any number is printed, the result is compared with the
adapter that was cut, bit for bit.
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

HIDDEN, INTERMEDIATE, VOCABULARY, HEADS, KEY_VALUE_HEADS = 4096, 14336, 512, 32, 8
KEY_VALUE = HIDDEN // HEADS * KEY_VALUE_HEADS
# name -> (out, in, the dimension of which factor is cut)
LINEARS = {
    "self_attn.q_proj": (HIDDEN, HIDDEN, "B"),
    "self_attn.k_proj": (KEY_VALUE, HIDDEN, "B"),
    "self_attn.v_proj": (KEY_VALUE, HIDDEN, "B"),
    "self_attn.o_proj": (HIDDEN, HIDDEN, "A"),
    "mlp.gate_proj": (INTERMEDIATE, HIDDEN, "B"),
    "mlp.up_proj": (INTERMEDIATE, HIDDEN, "B"),
    "mlp.down_proj": (HIDDEN, INTERMEDIATE, "A"),
}
WORKERS = ("copy", "ours")


def num_layers(gigabytes: float, tp: int, rank: int) -> int:
    """How many layers make parts of that many bytes: one factor of each linear is cut, the other is in all parts."""
    size = sum(out + tp * inside if cut == "B" else inside + tp * out for out, inside, cut in LINEARS.values())
    return max(1, round(gigabytes * 1e9 / (4 * rank * size)))


def make(place: Path, layers: int, tp: int, rank: int) -> None:
    """Write the model's config, an adapter, and its parts."""
    from adapters import sharded

    model = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "float32",
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KEY_VALUE_HEADS,
        "vocab_size": VOCABULARY,
        "tie_word_embeddings": False,
    }
    (place / "model").mkdir()
    checkpoint.write_json(place / "model" / "config.json", model)
    torch.manual_seed(0)
    paths = {f"model.layers.{i}.{path}": sizes for i in range(layers) for path, sizes in LINEARS.items()}
    tensors = {}
    for path, (out, inside, _) in paths.items():
        tensors[f"{peft_format.PREFIX}{path}.lora_A.weight"] = 0.02 * torch.randn(rank, inside)
        tensors[f"{peft_format.PREFIX}{path}.lora_B.weight"] = 0.02 * torch.randn(out, rank)
    config = peft_format.to_config(LoraSpec(rank=rank, alpha=2 * rank), list(paths), [*paths, "lm_head"])
    checkpoint.save_adapter(place / "adapter", config, tensors)
    sharded.shard(place / "adapter", place / "parts", tp=tp, model=place / "model", quiet=True)


# ----------------------------------------------------------------------------------------- in a process of its own


def memory(key: str) -> int:
    """Bytes of this process: VmRSS now, VmHWM at most."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


def work(name: str, parts: Path, output: Path) -> None:
    """Consolidate, or copy, and print what it took, as JSON."""
    import tqdm  # noqa: F401  (sharded imports it late)

    from adapters import sharded

    Path("/proc/self/clear_refs").write_text("5")  # the peak starts here
    before, start = memory("VmRSS"), time.perf_counter()
    if name == "ours":
        sharded.consolidate(parts, output, quiet=True)
    else:
        output.mkdir()
        for file in sorted(parts.iterdir()):
            shutil.copyfile(file, output / file.name)
    for file in [*output.iterdir(), output]:
        checkpoint.flush(file)
    seconds = time.perf_counter() - start
    print(json.dumps({"seconds": seconds, "memory": memory("VmHWM") - before}))


# ------------------------------------------------------------------------------------------------------ the rounds


def compare(ours: Path, adapter: Path) -> None:
    """Refuse a result that is not the adapter, bit for bit."""
    (config, a), (expected, b) = checkpoint.open_adapter(ours), checkpoint.open_adapter(adapter)
    assert config == expected and a.shapes == b.shapes and a.dtypes == b.dtypes
    for name in a.shapes:
        assert torch.equal(a.read(name).view(torch.int32), b.read(name).view(torch.int32)), name


def measure(name: str, place: Path) -> dict[str, float]:
    """What one of `WORKERS` took."""
    os.sync()
    words = [sys.executable, __file__, "--worker", name, "--place", str(place)]
    done = subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--tp", type=int, default=8)
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--place", type=Path, help="where the files go (a temporary directory)")
    parser.add_argument("--worker", choices=WORKERS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work(options.worker, options.place / "parts", options.place / options.worker)
        return
    with tempfile.TemporaryDirectory(dir=options.place) as directory:
        report(Path(directory), options.gigabytes, options.tp, options.rank, options.rounds)


def report(place: Path, gigabytes: float, tp: int, rank: int, rounds: int) -> None:
    """Measure, and print a table."""
    layers = num_layers(gigabytes, tp, rank)
    make(place, layers, tp, rank)
    size = sum(file.stat().st_size for file in (place / "parts").iterdir())
    rows: dict[str, list[dict[str, float]]] = {name: [] for name in WORKERS}
    load = []
    for number in range(rounds):
        load.append(os.getloadavg()[0])
        for name in WORKERS:
            rows[name].append(measure(name, place))
        if number == 0:
            compare(place / "ours", place / "adapter")
            written = (place / "ours" / checkpoint.WEIGHTS).stat().st_size
        for name in WORKERS:
            shutil.rmtree(place / name)
    print(
        f"{size / 1e9:.2f} GB fp32 in {tp} parts, {layers} layers, rank {rank}, to {written / 1e9:.2f} GB; "
        f"{rounds} rounds; torch {version('torch')}"
    )
    print(
        f"Python {platform.python_version()}, {os.cpu_count()} CPU cores, load {min(load):.1f} to {max(load):.1f}; "
        f"the result is the adapter that was cut, bit for bit"
    )
    print("        seconds min (median)   MB above import")
    for name, of in rows.items():
        values = [row["seconds"] for row in of]
        cell = f"{min(values):.2f} ({statistics.median(values):.2f})"
        print(f"{name:6} {cell:>21} {max(row['memory'] for row in of) / 1e6:>17.0f}")
    best = {name: min(row["seconds"] for row in of) for name, of in rows.items()}
    print(f"ours / copy, both with sync: {best['ours'] / best['copy']:.2f}")


if __name__ == "__main__":
    main()
