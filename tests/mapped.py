"""How does one process play all of them? Shards are stacked, `torch.vmap` maps over the stack, and what comes out is
joined to canonical tensors again. Where the rules table says nothing, of activations, the three placements below do.
"""

import dataclasses

import strategies
import torch
from torch.func import grad, vmap
from torch.utils import _pytree as pytree

import lora_fn
from lora_fn import Layout, Partial, Replicate, Shard, sharding
from lora_fn import layout as layouts


def features(spec):
    """The dimension of activations that holds the features."""
    return -3 if spec.kind == "conv2d" else -1


def input_placement(spec):
    """How the x lies over the axis that `apply` gets: a placement, or a layout of its last dimension."""
    if spec.kind == "row" and spec.input_is_parallel and spec.heads is not None:
        return sharding.input_layout(spec)
    if (spec.kind == "row" or spec.shard_input) and spec.input_is_parallel:
        return Shard(features(spec))
    return (
        Shard(spec.sequence_dim)
        if spec.input == "sharded" and spec.kind in ("linear", "column", "qkv")
        else Replicate()
    )


def _side_by_side(spec):
    return layouts.fuse(*(sharding.layout(spec, part.param("weight")) for part in spec.parts))


def output_placement(spec):
    """How the y lies over the axis that `apply` returns: a placement, or a layout of its last dimension."""
    if spec.parts:
        return sharding.layout(spec.base, "weight") if spec.fuse_qkv else _side_by_side(spec)
    if spec.kind == "experts" and not spec.shard_input:
        return layouts.plain(spec.out_features, spec.axis.size, stride=spec.stride)
    if spec.kind == "column" or (spec.kind == "conv2d" and not spec.shard_input):
        return Replicate() if spec.gather_output else Shard(features(spec))
    if spec.sequence_dim is not None:
        return Shard(spec.sequence_dim)
    return Replicate() if spec.reduce_output else Partial()


def input_gradient_placement(spec):
    """How the gradient of x lies over the axis."""
    return Partial() if spec.input == "gathered" else input_placement(spec)


def cut(x, placement, size, *, fill=0.0):
    """The parts of all processes, stacked; padded with `fill` where the size does not divide."""
    if isinstance(placement, Layout):
        return torch.stack([placement.to_local(x, index, dim=-1) for index in range(size)])
    if not isinstance(placement, Shard):
        return x.expand(size, *x.shape)
    dim = placement.dim % x.dim()
    length = -(-x.shape[dim] // size)
    padding = x.new_full([length * size - n if d == dim else n for d, n in enumerate(x.shape)], fill)
    return torch.stack(torch.cat([x, padding], dim).split(length, dim))


def join(parts, placement, whole_size=None):
    """Stacked parts joined; padding beyond `whole_size` is cut off; copies must be identical."""
    if isinstance(placement, Layout):
        return _joined(parts, placement)
    if isinstance(placement, Partial):
        return parts.sum(0)
    if isinstance(placement, Shard):
        whole = torch.cat(list(parts), placement.dim)
        return whole if whole_size is None else whole.narrow(placement.dim, 0, whole_size)
    assert all(torch.equal(parts[0], part) for part in parts[1:]), "copies differ between processes"
    return parts[0]


def _joined(parts, layout):
    """Activations in canonical order. Copies agree to rounding, which depends on their place in the product."""
    slots = torch.cat(list(parts), -1)
    canonical = slots.index_select(-1, layout.sources())
    again = canonical.index_select(-1, layout.places(torch.arange(layout.processes)).flatten())
    largest = slots.abs().max() if slots.numel() else 0
    assert ((again - slots).abs() <= 16 * torch.finfo(slots.dtype).eps * largest).all(), "copies differ"
    return canonical


def cut_cotangent(cotangent, placement, size, *, fill=0.0):
    """The cotangents of all processes, stacked. Where an output lies in several places, each gets a share of it."""
    parts = cut(cotangent, placement, size, fill=fill)
    if not isinstance(placement, Layout):
        return parts
    places, shares = placement.places(torch.arange(size)).flatten().tolist(), []
    for n, at in enumerate(places):
        copies = places.count(at)
        shares.append((places[:n].count(at) + 1) / (copies * (copies + 1) / 2))
    shape = (size, *(1,) * (cotangent.dim() - 1), placement.local_size)
    return (parts.double() * torch.tensor(shares, dtype=torch.float64).view(shape)).to(parts.dtype)


def whole(y):
    """What a layer returns, as one tensor: the parts of a "qkv" layer side by side."""
    return torch.cat(y, -1) if isinstance(y, tuple) else y


def stack(params, spec):
    """Canonical parameters -> the local ones of all processes, stacked."""
    shards = [lora_fn.shard(params, spec, index) for index in range(spec.axis.size)]
    return {name: torch.stack([shard[name] for shard in shards]) for name in params}


def unstack(stacked, spec):
    """The inverse of `stack`."""
    shards = [{name: p[index] for name, p in stacked.items()} for index in range(spec.axis.size)]
    return lora_fn.unshard(shards, spec)


def lanes(spec):
    """The index of every process: mapped, it says which level of vmap is the axis."""
    return torch.arange(spec.axis.size)


def over_axis(f, spec):
    """f for every process at once. A linear layer of whole activations has no collective: there, one by one, because
    the lanes of a batched matmul round differently where they are aligned differently, which processes are not.
    """
    if spec.kind != "linear" or spec.sequence_dim is not None:
        return vmap(f)

    def one_by_one(*args):
        each = [f(*pytree.tree_map(lambda x, i=i: x[i].clone(), args)) for i in range(spec.axis.size)]
        return pytree.tree_map(lambda *xs: torch.stack(xs), *each)

    return one_by_one


def key_tensor(key):
    return None if key is None else torch.tensor(key)


def local_forward(spec, params, x, *, key=None, scaling=None, gate=None):
    """What every process returns, stacked. The parameters are local and stacked, x is canonical."""

    def one(params, x, index):
        told = {"key": key_tensor(key), "scaling": scaling, "gate": gate}
        return whole(lora_fn.apply(params, x, spec, index=index, **told))

    return over_axis(one, spec)(params, cut(x, input_placement(spec), spec.axis.size), lanes(spec))


def forward(spec, params, x, *, key=None, gate=None):
    """The canonical output, of canonical parameters."""
    y = local_forward(spec, stack(params, spec), x, key=key, gate=gate)
    placement = output_placement(spec)
    return join(y, placement, spec.out_features if placement == Shard(features(spec)) else None)


def synced(grads, spec):
    """Stacked gradients after the deferred mode's one call."""

    def one(grads, index):
        return lora_fn.sync_gradients({"layer": grads}, {"layer": spec}, index=index)["layer"]

    return vmap(one)(grads, lanes(spec))


def local_run(case, *, fill=0.0, sync=True, layer=lora_fn.apply):
    """Every process's output and gradients, stacked: y, {name: gradient}, gradient of x (None for ids).

    `layer` is called as `lora_fn.apply` is.
    """
    spec, size = case.spec, case.spec.axis.size
    frozen = strategies.held(spec)  # integers have no gradient

    def loss(params, x, cotangent, index, base):
        y = whole(layer({**base, **params}, x, spec, index=index, key=key_tensor(case.key), gate=case.gate))
        return (y * cotangent).sum(), y

    has_x = case.x.is_floating_point()
    gradient = over_axis(grad(loss, argnums=(0, 1) if has_x else (0,), has_aux=True), spec)
    x = cut(case.x, input_placement(spec), size)
    cotangent = cut_cotangent(case.cotangent, output_placement(spec), size, fill=fill)
    stacked = stack(case.params, spec)
    base = {name: stacked.pop(name) for name in frozen}
    grads, y = gradient(stacked, x, cotangent, lanes(spec), base)
    return y, synced(grads[0], spec) if sync else grads[0], grads[1] if has_x else None


def run(case, *, fill=0.0, layer=lora_fn.apply):
    """The canonical output, gradients of the parameters, and gradient of x (None for ids).

    `fill` is the cotangent of what padding adds to the output.
    """
    spec = case.spec
    y, grads, x_grad = local_run(case, fill=fill, layer=layer)
    placement = output_placement(spec)
    y = join(y, placement, spec.out_features if placement == Shard(features(spec)) else None)
    return y, unstack(grads, spec), None if x_grad is None else join(x_grad, input_gradient_placement(spec))


def frozen(spec):
    """The layer as LoRA-FA trains it."""
    kept = tuple(name for name in sharding.trained_names(spec) if not name.startswith("lora_A"))
    return dataclasses.replace(spec, trained=kept)


def corrections(params, spec):
    """What every process corrects LoRA-FA's gradients with, of canonical parameters: the same to rounding, and so the
    first one's. (The lanes of a batched eigendecomposition round differently where they are aligned differently.)"""

    def one(params, index):
        return lora_fn.lorafa_corrections({"layer": params}, {"layer": spec}, index=index)["layer"]

    found = vmap(one)(stack(params, spec), lanes(spec))
    for each in found.values():
        few_roundings = 64 * torch.finfo(each.dtype).eps * each[0].abs().max()
        assert (each - each[0]).abs().max() <= few_roundings, "processes correct differently"
    return {name: each[0] for name, each in found.items()}


def corrected(case, grads):
    """Canonical gradients, cut, corrected on every process, and joined again."""
    spec = frozen(case.spec)
    told = {"layer": corrections(case.params, spec)}
    found = vmap(lambda grads: lora_fn.lorafa_gradients({"layer": grads}, told)["layer"])(stack(grads, spec))
    return unstack(found, spec)


def replicated(spec):
    """The names of the parameters that every process holds whole."""
    return [name for name, rule in sharding.rules(spec).items() if rule.placement == Replicate()]
