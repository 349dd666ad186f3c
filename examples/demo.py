"""The main job, end to end, on two processes of this machine; nothing is downloaded.

    make demo

makes a small Llama (kept for the next run), fine-tunes it with LoRA under tensor and sequence parallelism on text of
another kind, shows what that did to the held-out loss, loads the adapter with stock transformers and PEFT, compares the
logits, merges it, and prints a sample from before and after. It fails if the loss did not fall, if logits differ by
more than 1e-4, or if the adapter changed nothing.
"""

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import small_llama
import torch

from adapters.convert import table

PLACE = Path("build/demo")
MODEL, ADAPTER, MERGED = PLACE / "small_llama", PLACE / "adapter", PLACE / "merged"
TOLERANCE = 1e-4
PROMPT = "def "


def logits_of_two_processes(ids_file: str, output: str) -> None:
    """In each of two processes: the adapted model's whole logits, under tensor and sequence parallelism."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    import adapters
    from adapters import models

    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("tp",))
    model = models.load(MODEL, mesh=mesh, sequence_parallel=True, gather_logits=True)
    adapters.wrap(model, adapters.read_spec(ADAPTER))
    adapters.load(model, ADAPTER)
    with torch.no_grad():
        logits = model.eval()(torch.load(ids_file)).logits
    if dist.get_rank() == 0:
        torch.save(logits, output)
    dist.destroy_process_group()


def run(*command: str | Path) -> None:
    """Run Python with a command line; end with its exit code if it fails."""
    done = subprocess.run([sys.executable, *map(str, command)])
    if done.returncode:
        sys.exit(done.returncode)


def heading(text: str) -> None:
    """Print what comes next."""
    print(f"\n== {text}", flush=True)


def sample(directory: Path) -> str:
    """What a model goes on with after the prompt, greedily."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(directory)
    ids = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    out = model.generate(ids, max_new_tokens=48, do_sample=False, pad_token_id=tokenizer.pad_token_id)
    return tokenizer.decode(out[0], skip_special_tokens=True)


def main() -> None:
    """The demo."""
    started = time.monotonic()
    PLACE.mkdir(parents=True, exist_ok=True)
    for old in (ADAPTER, MERGED):
        shutil.rmtree(old, ignore_errors=True)

    heading("A small Llama, trained on Python's documentation")
    small_llama.make(MODEL)
    train, held_out = small_llama.split(small_llama.other_corpus())
    for name, documents in (("train", train), ("held-out", held_out)):
        lines = "".join(json.dumps({"text": text}) + "\n" for text in documents)
        (PLACE / f"{name}.jsonl").write_text(lines, encoding="utf-8")

    heading("LoRA on Python source code: 2 processes, tensor and sequence parallel")
    options = {"rank": 16, "alpha": 32, "learning-rate": 1e-2, "steps": 120, "batch-size": 8, "sequence-length": 128}
    run(
        *("-m", "adapters.cli", "finetune", "--model", MODEL, "--output", ADAPTER, "--tp", "2", "--sequence-parallel"),
        *("--data", PLACE / "train.jsonl", "--eval-data", PLACE / "held-out.jsonl", "--eval-every", "30"),
        *(str(word) for name, value in options.items() for word in (f"--{name}", value)),
    )
    lines = [json.loads(line) for line in (ADAPTER / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    losses = [line["loss"] for line in lines if line["kind"] == "eval"]

    heading("The same adapter in stock transformers and PEFT")
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    ids = tokenizer(held_out[0], return_tensors="pt")["input_ids"][:, :101]
    torch.save(ids, PLACE / "ids.pt")
    processes = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    run(*processes, __file__, "--logits", PLACE / "ids.pt", PLACE / "logits.pt")
    ours = torch.load(PLACE / "logits.pt")
    base = AutoModelForCausalLM.from_pretrained(MODEL).eval()
    with torch.no_grad():
        plain = base(ids).logits
        stock = PeftModel.from_pretrained(base, ADAPTER).eval()(ids).logits
    difference = (ours - stock).abs().max().item()
    change = (stock - plain).abs().max().item()

    heading("Merged, and a sample from before and after")
    run("-m", "adapters.cli", "merge", "--model", MODEL, "--adapter", ADAPTER, "--output", MERGED)
    for name, directory in (("before", MODEL), ("after", MERGED)):
        print(f"-- {name}\n{sample(directory)}")

    heading("Result")
    rows = [
        ["what", "value"],
        ["held-out loss before", f"{losses[0]:.4f}"],
        ["held-out loss after", f"{losses[-1]:.4f}"],
        ["largest logit difference, 2 processes against PEFT", f"{difference:.2e}"],
        ["largest logit change by the adapter", f"{change:.2e}"],
        ["seconds", f"{time.monotonic() - started:.0f}"],
    ]
    print(table(rows))
    print(f"The adapter: {ADAPTER}. The loss curve: {ADAPTER / 'loss.png'}.")
    failures = {
        "the held-out loss did not fall": losses[-1] >= losses[0],
        f"logits differ by more than {TOLERANCE}": not difference <= TOLERANCE,
        "the adapter changed nothing": change == 0,
    }
    wrong = [what for what, holds in failures.items() if holds]
    if wrong:
        sys.exit(f"demo: {'; '.join(wrong)}.")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--logits"]:
        logits_of_two_processes(*sys.argv[2:])
    else:
        main()
