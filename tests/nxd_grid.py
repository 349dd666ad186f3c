"""Run by torchrun where neuronx-distributed is: the grid's array on its real layers, beside stock PEFT.

    python -m torch.distributed.run --nproc-per-node 4 nxd_grid.py DIRECTORY

As nxd_layers.py. What the PEFT of that environment does not know is left out. DIRECTORY gets results.json.
"""

import json
import math
import os
import sys
import traceback
import types
import warnings
from collections import Counter
from pathlib import Path

import nxd_layers  # first: it replaces what is for devices only

# isort: split
import grid
import grid_ours
import grid_stock
import peft
import torch.distributed as dist
from neuronx_distributed.modules import qkv_linear
from neuronx_distributed.parallel_layers import layers

from adapters import kinds, optimum_models

SIZES = (4, 2)
# Initialisations that an embedding of an older PEFT takes for True.
UNKNOWN = () if "lora_ga_config" in peft.LoraConfig.__dataclass_fields__ else ("mica",)
# (kind, sequence parallel) -> why its layers are none of that form.
NOT_THERE = {
    ("embedding, dimension", "on"): "an embedding cut by its dimension gives the whole sequence",
    **dict.fromkeys(
        [(kind, sp) for kind in ("linear", "linear, fan_in_fan_out") for sp in ("off", "on")],
        "a layer that is whole on every process is torch's or transformers' own",
    ),
}
NOT_THERE |= {
    (kind, sp): "its experts' weights have names of Mixtral's in PEFT's files"
    for kind in grid.LAYERS
    if kind.startswith("experts")
    for sp in ("off", "on")
}
grid.LAYERS["qkv"]["bias"] = False  # with one, its own does not come into being


def made(spec, dtype, device):
    """Its layer of a spec."""
    sequence = {"sequence_parallel_enabled": spec.sequence_dim is not None, "sequence_dimension": spec.sequence_dim}
    options = {"bias": spec.bias, "dtype": dtype}
    sizes = (spec.in_features, spec.out_features)
    if spec.kind == "column":
        options |= {"gather_output": spec.gather_output, "stride": max(1, len(spec.parts))}
        return layers.ColumnParallelLinear(*sizes, **options, **sequence)
    if spec.kind == "qkv":
        copies = spec.heads.copies(spec.axis.size)
        options |= {"gather_output": False, "kv_size_multiplier": copies, "fuse_qkv": True}
        cut = {"sequence_parallel_enabled": spec.sequence_dim is not None}
        return qkv_linear.GQAQKVColumnParallelLinear(
            spec.in_features, [part.size for part in spec.parts[:2]], **options, **cut
        )
    if spec.kind == "row":
        return layers.RowParallelLinear(*sizes, input_is_parallel=True, **options, **sequence)
    if spec.kind == "embedding":
        sequence["sequence_dimension"] = None if spec.sequence_dim is None else 0
        by_dim = {"shard_across_embedding": spec.shard_across_embedding, "pad": spec.pad}
        return layers.ParallelEmbedding(*sizes, dtype=dtype, **by_dim, **sequence)
    window = {"kernel_size": spec.window.kernel_size, "padding": spec.window.padding}
    if spec.shard_input:
        return layers.InputChannelParallelConv2d(*sizes, input_is_parallel=True, **window, **options)
    return layers.OutputChannelParallelConv2d(*sizes, gather_output=False, **window, **options)


def cases_of(size):
    """The array's cases on `size` processes, where they can be on its layers; and how many are left out, and why."""
    cases, left = {}, Counter()
    for case in grid.covering_array():
        sequence = "on" if case.sp == "gathered" else case.sp
        case = case._replace(tp=size, sp=sequence)
        if case.kind == "qkv" and sequence == "on":  # its sequence lies before the batch, and so do dropout's numbers
            case = case._replace(dropout="0")
        unknown = "stock PEFT does not know it, and says nothing" if case.init in UNKNOWN else None
        unwritten = "stock PEFT 0.17 looks for those biases under another name, and writes none"
        lost = unwritten if UNKNOWN and case.bias == "lora_only" else None
        if why := NOT_THERE.get((case.kind, case.sp)) or unknown or lost or grid.reason(case):
            left[why] += 1
        else:
            cases[case] = None
    return list(cases), left


def run(case, directory):
    """{name: error over what is allowed}, of one case; {} on other processes than the first."""
    stock = directory / f"stock {dist.get_rank()}"
    expected = grid_stock.reference(grid_stock.stock_case(case), stock)
    net = grid.parallel_net(case, make=made).train()
    net.config = types.SimpleNamespace(num_attention_heads=grid.HEADS.query, num_key_value_heads=grid.HEADS.key_value)
    read = {
        name: kinds.SPEC_OF[kinds.nxd.class_name(module)](
            module, **optimum_models.given(dict(net.named_modules()), name)
        )
        for name, module in grid_ours.modules(net).items()
    }
    output = directory / "ours"
    found = grid_ours.found_on(net, read, case, stock, expected["given"], output)
    group = nxd_layers.Place().group
    each = [None] * group.size()
    dist.all_gather_object(each, found, group=group)
    if dist.get_rank() != 0:
        return {}
    told = grid_ours.errors(case, expected, grid_ours.joined(case, each))
    return told | ({} if grid_stock.same_file(stock, output) else {"file": math.inf})


def main(path):
    warnings.simplefilter("ignore")
    results, left_out = {}, {}
    state = nxd_layers.started({"tp": SIZES[0]})
    for size in SIZES:
        if size != SIZES[0]:
            state.destroy_kv_group()
            state.destroy_model_parallel()
            state.initialize_model_parallel(tensor_model_parallel_size=size)
        cases, left_out[str(size)] = cases_of(size)
        for number, case in enumerate(cases):
            if state._KV_SHARED_GROUP is not None:
                state.destroy_kv_group()
            try:
                told = run(case, Path(path) / f"{size} {number}")
            except Exception:  # the others fail too, or wait until the time is over
                told = {"\n".join(traceback.format_exc().splitlines()[-5:]): math.inf}
            results.setdefault(str(size), {})["; ".join(map(str, case))] = told
            dist.barrier()
    if dist.get_rank() == 0:
        (Path(path) / "results.json").write_text(json.dumps({"cases": results, "left out": left_out}, indent=1))
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)  # torch_xla has nothing to shut down


if __name__ == "__main__":
    main(sys.argv[1])
