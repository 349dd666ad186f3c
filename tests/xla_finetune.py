"""`lora-fn finetune`'s own loop on one device, an adapter swapped and an alpha changed on the way: what was compiled.

    python xla_finetune.py JOB ADAPTER TOLD
    python -m torch.distributed.run --nproc-per-node 4 xla_finetune.py JOB ADAPTER TOLD

JOB is the job as JSON, ADAPTER a PEFT directory of its ranks and another alpha. TOLD gets, of every step on "xla", the
`numbers` when it begins, when its graph is cut, and after. Several processes have one CPU device each: there, what XLA
would communicate inside a graph goes over gloo, so that every collective cuts the graph, and numbers alone are looked
at.

Not a test itself: `test_xla` starts it, because torch_xla reads its environment once.
"""

import functools
import itertools
import json
import os
import sys
from dataclasses import replace
from pathlib import Path

os.environ.update(PJRT_DEVICE="CPU")

from xla_graphs import as_devices, numbers

import adapters
from adapters import train
from lora_fn import LoraSpec

SWAP, RESCALE = 0.4, 0.7  # of all steps: when the adapter, and its alpha, become another


def watched(steps, adapter, told, count):
    """`train.train_step` and `train.boundary`, with what happens before some steps, and with `count` around them."""
    step, boundary, order = train.train_step, train.boundary, itertools.count()

    def run_step(model, *arguments, **options):
        number = next(order)
        if number == int(SWAP * steps):
            adapters.load(model, adapter)
        if number == int(RESCALE * steps):
            adapters.rescale(model, replace(adapters.lora_spec(model), alpha=1.5, use_rslora=True))
        told.append([count()])
        return step(model, *arguments, **options)

    def run_boundary(device):
        ends_step = bool(told) and len(told[-1]) == 1
        told[-1:] = [[*told[-1], count()]] if ends_step else told[-1:]
        boundary(device)
        told[-1:] = [[*told[-1], count()]] if ends_step else told[-1:]

    return run_step, run_boundary


def by_host():
    """Put gloo in the place of XLA's collectives."""
    import torch
    import torch.distributed as dist
    import torch_xla.core.xla_model as xm

    @functools.cache
    def group_of(groups):
        made = [dist.new_group(list(ranks), backend="gloo") for ranks in groups]  # by every process, in one order
        return next(group for ranks, group in zip(groups, made, strict=True) if dist.get_rank() in ranks)

    def all_reduce(kind, x, groups):
        whole = x.detach().cpu().clone()
        op = {xm.REDUCE_SUM: dist.ReduceOp.SUM, xm.REDUCE_MAX: dist.ReduceOp.MAX}[kind]
        dist.all_reduce(whole, op=op, group=group_of(tuple(map(tuple, groups))))
        return whole.to(x.device)

    def all_gather(x, *, dim, groups, pin_layout):
        here = x.detach().cpu().contiguous()
        parts = [torch.empty_like(here) for _ in groups[0]]
        dist.all_gather(parts, here, group=group_of(tuple(map(tuple, groups))))
        return torch.cat(parts, dim).to(x.device)

    def reduce_scatter(kind, x, scale, dim, size, *, groups, pin_layout):
        place = dist.get_rank(group_of(tuple(map(tuple, groups))))
        return all_reduce(kind, x, groups).chunk(size, dim)[place] * scale

    def rendezvous(tag):
        everyone = [list(range(dist.get_world_size()))]
        all_reduce(xm.REDUCE_SUM, torch.zeros(1), everyone)

    xm.all_reduce, xm.all_gather, xm.reduce_scatter, xm.rendezvous = all_reduce, all_gather, reduce_scatter, rendezvous


def main(job, adapter, output):
    values = json.loads(job)
    values |= {name: tuple(values[name]) for name in ("data", "eval_data")}
    job = train.Job(**values | {"lora": LoraSpec.from_json(json.dumps(values["lora"]))})
    rank = 0
    if job.processes > 1:
        rank = as_devices()
        by_host()
    told = []
    train.train_step, train.boundary = watched(job.steps, adapter, told, numbers if job.device == "xla" else list)
    train.finetune(job, quiet=True)
    if rank == 0:
        Path(output).write_text(json.dumps(told), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
