"""How are some processes started that are one group, on gloo? Each runs a module; the first writes the rows.

python -m torch.distributed.run --standalone --nproc-per-node 2 -m benchmarks.MODULE OPTIONS OUTPUT PLACE WHAT CASE
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import distributed

from benchmarks import apart, rows
from benchmarks.options import Options
from benchmarks.programs import Shape

BACKEND = "CPU, gloo"
Work = Callable[[Any, Path, Options, str], list[rows.Row]]  # (mesh, place, options, case) -> rows


def launched(module: str, size: int, options: Options, what: str, case: str) -> list[rows.Row]:
    """The rows that `size` processes make, each with one thread."""
    with tempfile.TemporaryDirectory(prefix="bench-") as place:
        return apart.run(f"benchmarks.{module}", options, place, what, case, processes=size)


def main(of: Mapping[str, Work]) -> None:
    """On each process: the first writes the rows."""
    from torch.distributed.device_mesh import init_device_mesh

    options, (output, place), (what, case) = Options.from_json(sys.argv[1]), map(Path, sys.argv[2:4]), sys.argv[4:]
    torch.set_num_threads(1)
    distributed.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (distributed.get_world_size(),), mesh_dim_names=("tp",))
    told = of[what](mesh, place, options, case)
    if distributed.get_rank() == 0:
        rows.write(output, told)
    distributed.barrier()
    distributed.destroy_process_group()


def make(directory: Path, shape: Shape) -> None:
    """The checkpoint of a Llama, written by the first process."""
    from transformers import LlamaForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    if not directory.exists() and (not distributed.is_initialized() or distributed.get_rank() == 0):
        torch.manual_seed(0)
        LlamaForCausalLM(shape.config()).save_pretrained(directory)
    if distributed.is_initialized():
        distributed.barrier()
