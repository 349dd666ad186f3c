"""torch_xla's collectives for tensors on the CPU, over gloo: some of neuronx-distributed's layers call them there, too.

Each is one operation of torch.distributed here, however many tensors it takes, so that it can be counted.
"""

import functools

import torch
import torch.distributed as dist
import torch_xla.core.xla_model as xm


@functools.cache
def made(groups):
    """The process groups of replica groups; every process makes all of them, in one order."""
    return [dist.new_group(list(group)) for group in groups]


def mine(groups):
    """This process's group among replica groups."""
    each = tuple(map(tuple, groups))
    [own] = [group for ranks, group in zip(each, made(each), strict=True) if dist.get_rank() in ranks]
    return own


def all_reduce(kind, inputs, scale=1.0, groups=None, cctx=None, pin_layout=True):
    """In place, as theirs is of a list."""
    assert kind == xm.REDUCE_SUM and scale == 1.0
    flat = torch.cat([x.reshape(-1) for x in inputs])
    dist.all_reduce(flat, group=mine(groups))
    for x, total in zip(inputs, flat.split([x.numel() for x in inputs]), strict=True):
        x.copy_(total.view(x.shape))
    return inputs


def all_gather(value, dim=0, groups=None, output=None, pin_layout=True):
    assert output is None
    group = mine(groups)
    parts = [torch.empty_like(value) for _ in range(group.size())]
    dist.all_gather(parts, value.contiguous(), group=group)
    return torch.cat(parts, dim)


def reduce_scatter(kind, value, scale, scatter_dim, shard_count, groups=None, output=None, pin_layout=True):
    assert kind == xm.REDUCE_SUM and scale == 1.0
    group = mine(groups)
    assert shard_count == group.size()
    total, part = value.contiguous().clone(), value.chunk(shard_count, scatter_dim)[0].contiguous().clone()
    root = dist.get_global_rank(group, 0)
    dist.reduce(total, dst=root, group=group)
    parts = [p.contiguous() for p in total.chunk(shard_count, scatter_dim)] if group.rank() == 0 else None
    dist.scatter(part, parts, src=root, group=group)
    if output is None:
        return part
    return output.copy_(part)


def start():
    """From here on, torch_xla's collectives are these."""
    xm.all_reduce, xm.all_gather, xm.reduce_scatter = all_reduce, all_gather, reduce_scatter
