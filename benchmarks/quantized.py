"""What does a quantised base cost in loss, and save in memory?

    python benchmarks/quantized.py --model build/demo/small_llama --data FILE...
    python benchmarks/quantized.py --load MEGABYTES

The first fine-tunes a model (the demo's, see examples/small_llama.py) with each of `--quantize`, under tensor and
sequence parallelism, everything else the same, and prints the held-out losses and the bytes of the base on one process.
The second writes a bf16 Llama of random numbers, of about that size, and loads it in a process of its own for each: the
bytes that its parameters take, and the process's peak above what its imports take.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from adapters.convert import table
from lora_fn.layer_spec import CODES

LAYERS, HIDDEN, WIDE = 8, 1024, 4096
LOAD = """
import json, re, sys
from pathlib import Path
import torch
from adapters import models, quantized
import transformers.models.llama.modeling_llama

def told(what):
    return int(re.search(what + r":\\s*(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024

Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
before = told("VmRSS")
model = models.load(sys.argv[1], quantize=sys.argv[2] or None)
print(json.dumps([*quantized.base_bytes(model, torch.bfloat16), told("VmHWM") - before]))
"""


def finetuned(model: Path, data: list[str], code: str | None, steps: int, tp: int) -> list[str]:
    """Losses before and after, and bytes of the base, of one run."""
    with tempfile.TemporaryDirectory() as place:
        command = [sys.executable, "-m", "adapters.cli", "finetune", "--model", str(model), "--data", *data]
        command += ["--output", f"{place}/run", "--tp", str(tp), "--steps", str(steps), "--sequence-length", "128"]
        command += ["--rank", "16", "--alpha", "32", "--learning-rate", "1e-2", "--checkpoint-every", "0", "--quiet"]
        command += ["--sequence-parallel"] if tp > 1 else []
        command += [] if code is None else ["--quantize", code]
        told = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        log = (Path(place) / "run/log.jsonl").read_text(encoding="utf-8").splitlines()
    losses = [line["loss"] for line in map(json.loads, log) if line["kind"] == "eval"]
    rows = dict(re.split(r"\s{2,}", line, maxsplit=1) for line in told.splitlines() if "  " in line)
    return [
        code or "none",
        *(f"{loss:.4f}" for loss in losses),
        rows.get(f"as {code}", ""),
        rows.get("unquantised", ""),
    ]


def write_model(directory: Path, megabytes: int) -> None:
    """A bf16 Llama of random numbers of about that size."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    each = (4 * HIDDEN * HIDDEN + 3 * HIDDEN * WIDE) * 2
    sizes = {"hidden_size": HIDDEN, "intermediate_size": WIDE, "num_attention_heads": 16, "num_key_value_heads": 16}
    config = LlamaConfig(vocab_size=4096, num_hidden_layers=max(1, megabytes * 1_000_000 // each), **sizes)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(directory, max_shard_size="250MB")


def loaded(directory: Path, code: str) -> list[str]:
    """Bytes that the parameters take and would unquantised, and the peak of loading, in MB."""
    done = subprocess.run(
        [sys.executable, "-c", LOAD, str(directory), code], check=True, capture_output=True, text=True
    )
    return [code or "none", *(f"{n / 1e6:.0f}" for n in json.loads(done.stdout))]


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="directory of a Hugging Face model")
    parser.add_argument("--data", nargs="+", default=[], help="text files")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--tp", type=int, default=2)
    parser.add_argument("--load", type=int, metavar="MEGABYTES", help="of a model to load")
    options = parser.parse_args()
    if options.model is None and options.load is None:
        parser.error("there is nothing to do; name a model with --model, or megabytes with --load.")
    if options.model is not None:
        rows = [finetuned(options.model, options.data, code, options.steps, options.tp) for code in (None, *CODES)]
        print(table([["base", "held out, before", "after", "bytes per process", "unquantised"], *rows]))
    if options.load is not None:
        with tempfile.TemporaryDirectory() as place:
            write_model(Path(place), options.load)
            rows = [loaded(Path(place), code) for code in ("", *CODES)]
            print(table([["base", "MB of parameters", "unquantised", "MB peak of loading"], *rows]))


if __name__ == "__main__":
    main()
