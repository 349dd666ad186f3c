"""XLA's collectives between processes that have a device each: over gloo, by way of the host."""

import functools

import torch
import torch.distributed as dist
import torch_xla
import torch_xla.core.xla_model as xm
import torch_xla.runtime as xr

OPERATIONS = {xm.REDUCE_SUM: dist.ReduceOp.SUM, xm.REDUCE_MAX: dist.ReduceOp.MAX}
on_host = dist.all_reduce


@functools.cache
def group_of(groups):
    """The process group that XLA's replica groups put this process in; every process asks in the same order."""
    made_of = {ranks: dist.new_group(list(ranks)) for ranks in groups}
    return next(group for ranks, group in made_of.items() if dist.get_rank() in ranks)


def group_like(groups):
    return group_of(tuple(map(tuple, groups))) if isinstance(groups, (list, tuple)) else groups


def all_reduce(tensor, op=dist.ReduceOp.SUM, group=None, async_op=False):
    """torch.distributed's, in place, wherever the tensor is."""
    here = tensor.detach().cpu().contiguous()
    on_host(here, op=op, group=group_like(group))
    tensor.data.copy_(here)


def xla_all_reduce(kind, inputs, scale=1.0, groups=None, pin_layout=True):
    """torch_xla's: in place for a list, a new tensor for a tensor."""
    assert scale == 1.0
    tensors = inputs if isinstance(inputs, list) else [inputs.clone()]
    for tensor in tensors:
        all_reduce(tensor, OPERATIONS[kind], groups)
    return inputs if isinstance(inputs, list) else tensors[0]


def of_each(function, tensors):
    """torch_xla's other collectives take a tensor, or a list of them."""
    return [function(t) for t in tensors] if isinstance(tensors, list) else function(tensors)


def all_gather(value, dim=0, groups=None, output=None, pin_layout=True):
    assert output is None
    group = group_like(groups)

    def gathered(tensor):
        parts = [torch.empty(tensor.shape, dtype=tensor.dtype) for _ in range(group.size())]
        dist.all_gather(parts, tensor.detach().cpu().contiguous(), group=group)
        return torch.cat(parts, dim).to(tensor.device)

    return of_each(gathered, value)


def reduce_scatter(reduce_type, input, scale, scatter_dim, shard_count, groups=None, output=None, pin_layout=True):
    assert output is None
    group = group_like(groups)

    def scattered(tensor):
        whole = tensor.clone()
        all_reduce(whole, OPERATIONS[reduce_type], group)
        return scale * whole.chunk(shard_count, scatter_dim)[group.rank()]

    return of_each(scattered, input)


def device_functions():
    """What waits for the device, and what names it."""
    return torch_xla._XLAC._xla_sync_multi, xm.xla_device


def restore(functions):
    """Put those back, where there is a device after all."""
    torch_xla._XLAC._xla_sync_multi, xm.xla_device = functions


def taken_to_the_host():
    """Put the stand-ins in place."""
    dist.all_reduce = torch.distributed.all_reduce = all_reduce
    xm.all_reduce, xm.all_gather, xm.reduce_scatter = xla_all_reduce, all_gather, reduce_scatter
    xr.global_ordinal, xr.global_device_count = dist.get_rank, dist.get_world_size
