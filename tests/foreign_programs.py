"""Run by torchrun where neuronx-distributed and Optimum Neuron are: writes what they write, and what processes hold.

    python -m torch.distributed.run --nproc-per-node TP*PP foreign_programs.py CASE.json DIRECTORY

The compiler's packages are replaced by stand-ins: only Python runs, over gloo. CASE.json: {"program": "optimum" or
"nxd", "tp", "pp", "fuse_qkv", "xser", "heads", "kv_heads", "targets", "drift", ...}. DIRECTORY gets what the program's
own functions save, `held/tp-*-pp-*.pt` (this process's factors, by name) and, of Optimum Neuron where it works,
`consolidated`.
"""

import importlib.abc
import importlib.machinery
import importlib.util
import json
import os
import sys
import types
import zlib
from pathlib import Path
from unittest.mock import MagicMock

os.environ |= {"NXD_CPU_MODE": "1", "PJRT_DEVICE": "CPU", "NEURON_PLATFORM_TARGET": "trn1"}


class StandIn(types.ModuleType):
    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        setattr(self, name, MagicMock(name=f"{self.__name__}.{name}"))
        return self.__dict__[name]


roots = ["torch_neuronx", "neuronxcc", "nki", "nkilib"]


class Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name, path=None, target=None):
        wanted = name.split(".")[0] in roots
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if wanted else None

    def create_module(self, spec):
        return StandIn(spec.name)

    def exec_module(self, module):
        module.__path__ = []


sys.meta_path.append(Finder())
import torch_xla  # noqa: E402, F401

roots.append("libneuronxla")

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
import torch_neuronx.utils  # noqa: E402

torch.classes.neuron = MagicMock(name="torch.classes.neuron")
torch_neuronx.utils.get_platform_target = lambda: "trn1"


def without_a_device():
    """In place of what neuronx-distributed asks of a device, or of what torch_xla 2.9 lacks."""
    from neuronx_distributed.trainer import checkpoint
    from neuronx_distributed.utils import model_utils

    for module in (checkpoint, model_utils):
        module.get_local_world_size = dist.get_world_size
    checkpoint.xm.xla_device = lambda: torch.device("cpu")  # where initialize_parallel_model moves a model
    checkpoint.xm.rendezvous = lambda name: dist.barrier()
    checkpoint.torch_xla._XLAC._xla_sync_multi = lambda *args, **options: None  # there is nothing to wait for


def started(case):
    """gloo, and neuronx-distributed's state on it; returns its parallel_state."""
    dist.init_process_group("gloo")
    from neuronx_distributed.parallel_layers import parallel_state

    without_a_device()
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=case["tp"], pipeline_model_parallel_size=case.get("pp", 1)
    )
    return parallel_state


def values(name, shape):
    """Random values that depend on a name only."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))


def fill(name, p, case, rank):
    """This process's part of what the layer would hold: replicas alike, key-value heads tiled."""
    tp, kv = case["tp"], case["kv_heads"]
    multiplier = case.get("multiplier") or max(1, tp // kv)
    sharded = getattr(p, "tensor_model_parallel", False)
    if name.endswith(("weight_k", "weight_v")):
        canonical = values(name, (p.shape[0] * tp // multiplier, p.shape[1]))
        part = canonical.repeat(multiplier, 1)[rank * p.shape[0] : (rank + 1) * p.shape[0]]
    elif name.endswith("weight_qkv"):
        head = p.shape[0] // (case["heads"] // tp + 2 * kv * multiplier // tp)
        rows = kv * multiplier * head // tp
        q = values(f"{name} q {rank}", (p.shape[0] - 2 * rows, p.shape[1]))
        k, v = (values(f"{name} {which}", (kv * head, p.shape[1])).repeat(multiplier, 1) for which in "kv")
        part = torch.cat([q, k[rank * rows : (rank + 1) * rows], v[rank * rows : (rank + 1) * rows]])
    else:
        part = values(f"{name} {rank}" if sharded or case.get("drift") else name, p.shape)
    with torch.no_grad():
        p.copy_(part)


def keep(model, case, out, state, names):
    """Fill the factors, and write what this process holds."""
    rank, stage = state.get_tensor_model_parallel_rank(), state.get_pipeline_model_parallel_rank()
    held = {}
    for name, p in model.named_parameters():
        if "lora_" in name and (names is None or name in names):
            fill(name, p, case, rank)
            held[name] = p.detach().clone()
    (out / "held").mkdir(exist_ok=True)
    torch.save(held, out / "held" / f"tp-{rank}-pp-{stage}.pt")


def run_optimum(case, out):
    """Optimum Neuron's model under its own LoRA, saved by its own save_pretrained."""
    state = started(case)
    import transformers
    from optimum.neuron.models import training
    from optimum.neuron.models.training.checkpointing import (
        consolidate_model_parallel_checkpoints_to_unified_checkpoint as consolidate,
    )
    from optimum.neuron.models.training.transformations_utils import GQAQKVColumnParallelLinearSpec as Grouped
    from optimum.neuron.peft import get_peft_model
    from peft import LoraConfig

    kind = case.get("model", "Llama")
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=case.get("vocabulary", 64),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=case["heads"],
        num_key_value_heads=case["kv_heads"],
        head_dim=4,
        dtype=torch.float32,
        name_or_path="tiny",
    )
    settings = training.TrainingNeuronConfig(
        tensor_parallel_size=case["tp"],
        pipeline_parallel_size=case.get("pp", 1),
        fuse_qkv=case.get("fuse_qkv", False),
        kv_size_multiplier=case.get("multiplier"),
        use_xser=case["xser"],
    )
    torch.manual_seed(0)
    lora = LoraConfig(
        r=3,
        lora_alpha=5,
        target_modules=case["targets"],
        task_type="CAUSAL_LM",
        init_lora_weights=True,
        **case.get("lora", {}),
    )
    model = get_peft_model(getattr(training, f"{kind}ForCausalLM")(config, settings), lora)
    keep(model, case, out, state, model.parameters_for_current_stage)
    model.save_pretrained(str(out), is_main_process=dist.get_rank() == 0)
    dist.barrier()
    if dist.get_rank() == 0:
        indices = {}
        for heads, kv, tp in case.get("indices", ()):
            copies = max(1, tp // kv)
            ranks = [Grouped.compute_query_indices_for_rank(tp, r, heads, kv, copies).tolist() for r in range(tp)]
            indices[f"{heads} {kv} {tp} {copies}"] = ranks
        (out / "indices.json").write_text(json.dumps(indices))
        try:
            consolidate(out, out / "consolidated")
        except Exception as error:
            (out / "consolidated-error").write_text(repr(error))


def run_nxd(case, out):
    """Layers of neuronx-distributed under its own LoRA, with the names of Llama, saved by its save_checkpoint."""
    state = started(case)
    from neuronx_distributed.modules.lora import LoraConfig, LoraModel
    from neuronx_distributed.modules.qkv_linear import GQAQKVColumnParallelLinear
    from neuronx_distributed.parallel_layers.layers import ColumnParallelLinear, RowParallelLinear
    from neuronx_distributed.trainer import checkpoint
    from torch import nn

    move = nn.Module.to  # it moves its factors to an XLA device, whatever there is
    nn.Module.to = lambda self, *args, **options: self if args == ("xla",) else move(self, *args, **options)
    hidden, head, inside = 32, 4, 48
    query, kv = case["heads"] * head, case["kv_heads"] * head
    multiplier = case.get("multiplier") or max(1, case["tp"] // case["kv_heads"])

    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.self_attn, self.mlp = nn.Module(), nn.Module()
            options = {"bias": False, "gather_output": False}
            if case.get("grouped"):
                self.self_attn.qkv_proj = GQAQKVColumnParallelLinear(
                    hidden, [query, kv], kv_size_multiplier=multiplier, fuse_qkv=case.get("fuse_qkv", False), **options
                )
            else:
                self.self_attn.q_proj = ColumnParallelLinear(hidden, query, **options)
                self.self_attn.k_proj = ColumnParallelLinear(hidden, kv, **options)
                self.self_attn.v_proj = ColumnParallelLinear(hidden, kv, **options)
            self.self_attn.o_proj = RowParallelLinear(query, hidden, bias=False, input_is_parallel=True)
            self.mlp.gate_up_proj = ColumnParallelLinear(hidden, 2 * inside, stride=2, **options)
            self.mlp.down_proj = RowParallelLinear(inside, hidden, bias=False, input_is_parallel=True)

    inner = nn.Module()
    inner.model = nn.Module()
    inner.model.layers = nn.ModuleList([Layer(), Layer()])
    inner.lm_head = nn.Linear(hidden, case.get("vocabulary", 64), bias=False)
    torch.manual_seed(0)
    config = LoraConfig(
        lora_rank=3,
        lora_alpha=5,
        target_modules=case["targets"],
        lora_save_dir=str(out),
        merge_sharded_lora=case["merged"],
        save_lora_config_adapter=case.get("config_inside", False),
    )
    model = LoraModel(inner, config)
    keep(model, case, out, state, None)
    checkpoint.save_checkpoint(str(out), "step_1", model=model, use_xser=case["xser"])


if __name__ == "__main__":
    case = json.loads(Path(sys.argv[1]).read_text())
    {"optimum": run_optimum, "nxd": run_nxd}[case["program"]](case, Path(sys.argv[2]))
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)  # torch_xla has nothing to shut down
