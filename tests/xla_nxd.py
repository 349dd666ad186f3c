"""Run by torchrun where neuronx-distributed is: its real layers on XLA tensors, wrapped, traced on a mesh of 2 x 2.

    python -m torch.distributed.run --nproc-per-node 4 xla_nxd.py OUTPUT

Its CPU mode is off: its groups are those of torch.distributed's "xla" backend. The CPU has one XLA device for each
process, so what torch_xla tells of their number is replaced, as are the compiler's packages (see foreign_programs).
Nothing is run. OUTPUT.RANK gets what a layer's own forward and backward communicate, and the wrapped one's.

Not a test itself: `test_xla` starts it.
"""

import json
import os
import sys
import warnings
from pathlib import Path

import foreign_programs  # noqa: F401  (first: it replaces what is for devices only)
from xla_graphs import as_devices, communication, forget

del os.environ["NXD_CPU_MODE"]

import torch
import torch.distributed as dist
import torch_xla
from torch import nn

HIDDEN, INSIDE, HEADS, LENGTH, ROWS = 12, 16, 4, 8, 4


class Pair(nn.Module):
    """A column layer, or an attention's projections, and a row layer."""

    def __init__(self, first, row, key_value):
        super().__init__()
        self.first, self.row = first, row
        self.config = type("Config", (), {"num_attention_heads": HEADS, "num_key_value_heads": key_value})

    def forward(self, x):
        y = self.first(x)
        if isinstance(y, tuple):
            query, key, value = y
            y = query + (key * value).repeat(1, 1, query.shape[-1] // key.shape[-1])
        return self.row(torch.tanh(y))


def pairs(sequence_dim):
    """Name -> a pair of the real layers, on the CPU."""
    from neuronx_distributed.modules.qkv_linear import GQAQKVColumnParallelLinear
    from neuronx_distributed.parallel_layers import parallel_state
    from neuronx_distributed.parallel_layers.layers import ColumnParallelLinear, RowParallelLinear

    common = {"bias": False, "sequence_parallel_enabled": sequence_dim is not None}
    place = {} if sequence_dim is None else {"sequence_dimension": sequence_dim}

    def row():
        return RowParallelLinear(INSIDE, HIDDEN, input_is_parallel=True, **common, **place)

    def qkv(key_value, copies, fuse):
        if parallel_state._KV_SHARED_GROUP is not None:
            parallel_state.destroy_kv_group()
        sizes = [INSIDE, key_value * INSIDE // HEADS]
        options = {"gather_output": False, "fuse_qkv": fuse, "kv_size_multiplier": copies}
        return Pair(GQAQKVColumnParallelLinear(HIDDEN, sizes, **options, **common), row(), key_value)

    column = ColumnParallelLinear(HIDDEN, INSIDE, gather_output=False, **common, **place)
    yield "column", Pair(column, row(), HEADS)
    if sequence_dim != 1:  # where its projections cannot have the sequence
        yield "qkv", qkv(2, 1, False)
        yield "qkv, fused", qkv(2, 1, True)
        yield "qkv, copied", qkv(1, 2, False)


def traced(model, x, factors):
    """What a forward and a backward communicate, and their graph's text; or why there is none."""
    try:
        y = model(x)
        tensors = [y, *torch.autograd.grad(y.square().sum(), [x, *factors])]
        text = torch_xla._XLAC._get_xla_tensors_hlo(tensors)
        return {"communication": communication(text), "text": text}
    except TypeError as error:
        return {"error": str(error)}
    finally:
        forget(torch_xla.device())


def main(output):
    warnings.simplefilter("ignore")
    as_devices()
    import torch_xla.distributed.xla_backend  # registers it

    dist.init_process_group("xla", init_method="xla://")
    from neuronx_distributed.parallel_layers import parallel_state
    from neuronx_distributed.utils.model_utils import move_model_to_device

    import adapters
    from lora_fn import LoraSpec

    parallel_state.initialize_model_parallel(tensor_model_parallel_size=2, skip_collective_init=True)
    told, device = {}, torch_xla.device()
    for sequence_dim in (None, 0, 1):
        shape = [LENGTH, ROWS, HIDDEN]
        if sequence_dim is not None:
            shape[sequence_dim] //= 2
        for name, model in pairs(sequence_dim):
            move_model_to_device(model.requires_grad_(False), device)
            x = torch.ones(shape).to(device).requires_grad_()
            own = traced(model, x, [])
            adapters.wrap(model, LoraSpec(rank=3, dropout=0.1), gradients="deferred").train()
            adapters.set_dropout_key(model, torch.tensor([7]).to(device).reshape(()))
            wrapped = traced(model, x, [p for p in model.parameters() if p.requires_grad])
            told[f"{name}, {sequence_dim}"] = {"own": own, "wrapped": wrapped}
    Path(f"{output}.{dist.get_rank()}").write_text(json.dumps(told), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1])
    sys.stdout.flush()
    os._exit(0)  # torch_xla has nothing to shut down
