"""Trace a column + row pair on a 2 x 2 mesh of XLA devices, and write what its graphs communicate; nothing is run.

    python xla_graphs.py OUTPUT    (with torch_xla; four CPU devices in one process)

Not a test itself: `test_xla` starts it, because torch_xla reads its environment once.
"""

import itertools
import json
import os
import re
import sys
from pathlib import Path

DP, TP = ((0, 2), (1, 3)), ((0, 1), (2, 3))
# Any collective, with any groups: also those that should not be there, and {}, which means all processes.
OPERATION = re.compile(
    r" (all-reduce|all-gather|reduce-scatter|all-to-all|collective-\w+)(?:-start)?\("
    r"(?:.*?replica_groups=(\{\{.*?\}\}|\{\}|\[\S*\]))?"
)


def communication(text):
    """[[operation, replica groups]...] of a graph's HLO text, in its order."""
    return [list(found) for line in text.splitlines() for found in OPERATION.findall(line)]


def numbers():
    """How many graphs were compiled and run so far, and how often a tensor left its device."""
    import torch_xla.core.xla_model as xm
    import torch_xla.debug.metrics as metrics

    xm.wait_device_ops()  # which are counted when they end
    left = sum(metrics.counter_value(name) for name in metrics.counter_names() if name.startswith("aten::"))
    return [*((metrics.metric_data(name) or [0])[0] for name in ("CompileTime", "ExecuteTime")), left]


def forget(device):
    """Drop what was traced: every tensor is then data of its shape, as after a step that was run."""
    import torch_xla

    torch_xla._XLAC._clear_pending_irs(str(device))
    torch_xla._XLAC._set_all_reduce_token(str(device), None)


def as_devices():
    """Let the processes that torchrun started be the devices of one machine to torch_xla. Returns which this is."""
    import torch_xla.runtime as xr
    from torch_xla._internal import pjrt

    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    xr.world_size, xr.global_ordinal = lambda: size, lambda: rank
    pjrt.initialize_multiprocess = lambda *arguments: None  # the CPU's client has one process
    return rank


def pair(rank, sequence_dim, device, *, first, adapted):
    """The tensors of the pair's forward and backward on one device, and of the sums over "tp" and then over "dp".

    The first layer is a "column", or the "qkv" of an attention with one key-value head, which both processes have.
    """
    import torch

    import lora_fn
    from lora_fn import Axis, FusedPart, Heads, LayerSpec, collectives, sharding

    tp = Axis(name="tp", size=2, index=rank % 2, groups=TP)
    dp = Axis(name="dp", size=2, index=rank // 2, groups=DP)
    options = dict(axis=tp, sequence_dim=sequence_dim, gradients="deferred")
    adapter, heads = dict(rank=3 if adapted else 0), Heads(query=2, key_value=1)
    parts = tuple(FusedPart(name=name, size=size, **adapter) for name, size in (("q", 8), ("k", 4), ("v", 4)))
    specs = {
        "column": LayerSpec(kind="column", in_features=12, out_features=8, **options, **adapter),
        "qkv": LayerSpec(kind="qkv", in_features=12, out_features=16, parts=parts, heads=heads, **options),
        "row": LayerSpec(kind="row", in_features=8, out_features=12, **options, **adapter),
    }
    specs = {"first": specs[first], "row": specs["row"]}
    params = {}
    for path, spec in specs.items():
        whole = {name: torch.ones(sharding.canonical_shape(spec, name)) for name in sharding.rules(spec)}
        local = lora_fn.shard(whole, spec, rank % 2)
        params[path] = {name: t.to(device).requires_grad_(name != "weight") for name, t in local.items()}
    index = torch.tensor([rank % 2]).to(device)  # data, never a constant: every process traces the same graph
    shape = [4, 6, 12]
    if sequence_dim is not None:
        shape[sequence_dim] //= 2
    x = torch.ones(shape).to(device).requires_grad_()
    y = lora_fn.apply(params["first"], x, specs["first"], index=index)
    y = y[0] + y[1] * y[2] if first == "qkv" else y
    y = lora_fn.apply(params["row"], torch.tanh(y), specs["row"], index=index)
    names = [(path, name) for path in params for name in params[path] if name != "weight"]
    *grads, x_grad = torch.autograd.grad(y.square().sum(), [*(params[p][n] for p, n in names), x])
    tree = {}
    for (path, name), g in zip(names, grads, strict=True):
        tree.setdefault(path, {})[name] = g
    synced = lora_fn.sync_gradients(tree, specs, index=index)
    summed = collectives.reduce_flat([g for of in synced.values() for g in of.values()], dp, index)
    return [y, x_grad, *summed]


def in_place(function, *args, **kwargs):
    """What a function returns, and the names of the operators in it that write in place on XLA."""
    from torch.utils._python_dispatch import TorchDispatchMode

    names = set()

    class Names(TorchDispatchMode):
        def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
            if operator._schema.name.endswith("_") and args[0].device.type == "xla":
                names.add(operator._schema.name)
            return operator(*args, **kwargs or {})

    with Names():
        return function(*args, **kwargs), names


def trace(_, output):
    """On each device: what every pair communicates, the texts of the graphs, and what was written in place, to
    OUTPUT.RANK.

    Nothing is run, so the collectives of each pair stay in the graphs of the next ones, in front of theirs.
    """
    import torch_xla
    import torch_xla.runtime as xr

    device, rank = torch_xla.device(), xr.global_ordinal()
    found, texts, before, written = {}, [], [], set()
    for first, adapted, sequence_dim in itertools.product(("column", "qkv"), (False, True), (None, 0, 1)):
        tensors, names = in_place(pair, rank, sequence_dim, device, first=first, adapted=adapted)
        written |= names
        texts.append(torch_xla._XLAC._get_xla_tensors_hlo(tensors))
        everything = communication(texts[-1])
        assert everything[: len(before)] == before
        found[f"{first}, {'adapted' if adapted else 'base'}, {sequence_dim}"] = everything[len(before) :]
        before = everything
    Path(f"{output}.{rank}").write_text(
        json.dumps({"found": found, "texts": texts, "in place": sorted(written)}), encoding="utf-8"
    )


if __name__ == "__main__":
    os.environ.update(PJRT_DEVICE="CPU", CPU_NUM_DEVICES="4")
    import torch_xla

    torch_xla.launch(trace, args=(sys.argv[1],))
