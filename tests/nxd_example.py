"""Runs examples/train_nxd.py as it is, where neuronx-distributed is and no device: stand-ins, and then the script.

python nxd_example.py make DIRECTORY      (a small model and its data)
python -m torch.distributed.run --nproc-per-node 4 nxd_example.py ARGUMENTS...
"""

import os
import runpy
import sys
import warnings
from pathlib import Path

import foreign_programs  # first: it replaces what is for devices only

# isort: split
import jobs
import neuronx_distributed.utils
import torch
import torch.distributed as dist
import transformers
import xla_on_gloo
from small_models import COMMON

SCRIPT = Path(__file__).resolve().parent.parent / "examples" / "train_nxd.py"


def make(directory):
    """A Llama that two processes divide, its tokenizer, and text."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**COMMON | {"vocab_size": 100, "max_position_embeddings": 128})
    transformers.LlamaForCausalLM(config).save_pretrained(directory / "model")
    jobs.save_tokenizer(directory / "model")
    jobs.write_lines(directory / "data.jsonl", [{"text": "the quick brown fox jumps over the lazy dog. " * 3}] * 40)


def as_on_a_device():
    """The script alone is told that this is no CPU mode; neuronx-distributed has asked before."""
    start = dist.init_process_group
    dist.init_process_group = lambda backend: start({"xla": "gloo"}[backend])
    neuronx_distributed.utils.cpu_mode = lambda: False


def main(how, arguments):
    warnings.simplefilter("ignore")
    on_device = xla_on_gloo.device_functions()
    foreign_programs.without_a_device()
    xla_on_gloo.taken_to_the_host()  # its load_checkpoint, too, hands out what one process has read
    if how == "xla":
        xla_on_gloo.restore(on_device)
        as_on_a_device()
    sys.argv = [str(SCRIPT), *arguments]
    runpy.run_path(str(SCRIPT), run_name="__main__")
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)  # torch_xla has nothing to shut down


if __name__ == "__main__":
    if sys.argv[1] == "make":
        make(Path(sys.argv[2]))
    else:
        main(sys.argv[1], sys.argv[2:])
