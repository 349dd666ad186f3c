"""Sharded LoRA checkpoints in the exact form of Optimum Neuron and neuronx-distributed, out of canonical tensors."""

import json
import sys
import types
from dataclasses import dataclass, field
from unittest.mock import patch

import torch

import lora_fn
from lora_fn import Axis, sharding
from lora_fn.layer_spec import FusedPart, Heads, LayerSpec

HIDDEN, HEAD, INSIDE, RANK, ALPHA = 32, 4, 48, 3, 5.0
MODEL = {"hidden_size": HIDDEN, "intermediate_size": INSIDE, "head_dim": HEAD, "vocab_size": 64}
ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True, kw_only=True)
class Case:
    """A checkpoint to write: its mesh, its model, and what is adapted."""

    tp: int = 2
    pp: int = 1
    heads: int = 8
    kv_heads: int = 2
    fuse_qkv: bool = False
    xser: bool = False
    targets: tuple = ALL
    vocabulary: int = 64
    lora_bias: bool = False
    dtype: torch.dtype = torch.float32
    adapter: str = "default"
    config: dict = field(default_factory=dict)

    @property
    def grouped(self):
        """Whether Optimum Neuron takes neuronx-distributed's grouped-query layer."""
        return self.kv_heads < self.tp or self.kv_heads % self.tp != 0

    @property
    def kv_heads_spec(self):
        return Heads(query=self.heads, key_value=self.kv_heads, multiplier=max(1, self.tp // self.kv_heads))


def specs_of(case):
    """{path: LayerSpec} of the adapted layers."""
    query, kv, axis = case.heads * HEAD, case.kv_heads * HEAD, Axis(size=case.tp)
    more = {"axis": axis, "lora_bias": case.lora_bias}
    one = {"rank": RANK, "alpha": ALPHA, **more}

    def fused(**sizes):
        parts = [FusedPart(name=n, size=s, rank=RANK, alpha=ALPHA, number=i) for i, (n, s) in enumerate(sizes.items())]
        known = {"in_features": HIDDEN, "out_features": sum(sizes.values()), "share_A": True}
        return {"parts": tuple(parts), **known, **more}

    found = {}
    for number in range(2):
        attention, mlp = f"model.layers.{number}.self_attn", f"model.layers.{number}.mlp"
        if case.grouped and "q_proj" in case.targets:
            found[f"{attention}.qkv_proj"] = LayerSpec(
                kind="qkv", heads=case.kv_heads_spec, fuse_qkv=case.fuse_qkv, **fused(q=query, k=kv, v=kv)
            )
        elif case.fuse_qkv and query == kv and "q_proj" in case.targets:
            found[f"{attention}.qkv_proj"] = LayerSpec(kind="column", **fused(q=query, k=kv, v=kv))
        else:
            for name, size in (("q_proj", query), ("k_proj", kv), ("v_proj", kv)):
                if name in case.targets:
                    spec = LayerSpec(kind="column", in_features=HIDDEN, out_features=size, **one)
                    found[f"{attention}.{name}"] = spec
        if "o_proj" in case.targets:
            heads = case.kv_heads_spec if case.grouped else None
            spec = LayerSpec(kind="row", in_features=query, out_features=HIDDEN, heads=heads, **one)
            found[f"{attention}.o_proj"] = spec
        if "gate_proj" in case.targets:
            found[f"{mlp}.gate_up_proj"] = LayerSpec(kind="column", **fused(gate=INSIDE, up=INSIDE))
        if "down_proj" in case.targets:
            found[f"{mlp}.down_proj"] = LayerSpec(kind="row", in_features=INSIDE, out_features=HIDDEN, **one)
    if "embed_tokens" in case.targets:
        one |= {"lora_bias": False, "pad": case.vocabulary % case.tp != 0}
        sizes = {"in_features": case.vocabulary, "out_features": HIDDEN}
        found["model.embed_tokens"] = LayerSpec(kind="embedding", **sizes, **one)
    if "lm_head" in case.targets:
        one |= {"pad": False, "lora_bias": case.lora_bias}
        found["lm_head"] = LayerSpec(kind="column", in_features=HIDDEN, out_features=case.vocabulary, **one)
    return found


def canonical_of(specs, case, seed=0):
    """{path: {parameter: random tensor}}."""
    torch.manual_seed(seed)
    return {
        path: {
            name: torch.randn(sharding.canonical_shape(spec, name)).to(case.dtype)
            for name in sharding.adapter_names(spec)
        }
        for path, spec in specs.items()
    }


def named(spec, canonical, index):
    """Ending of the name on disk -> (tensor that process `index` writes, dimension that is cut or None)."""
    if spec.kind == "embedding":
        return {f"lora_embedding_{x[-1]}": (canonical[x], None) for x in ("lora_A", "lora_B")}
    local = lora_fn.shard(canonical, spec, index)
    b = {name.partition(".")[2]: t for name, t in local.items() if name.partition(".")[0] == "lora_B"}
    bias = [t for name, t in local.items() if name.partition(".")[0] == "lora_B_bias"]
    found = {"lora_A.weight": (local["lora_A"], 1 if spec.kind == "row" else None)}
    cut = None if spec.kind == "row" else 0
    if spec.kind == "qkv" and not spec.fuse_qkv:
        found |= {f"lora_B.weight_{part}": (t, 0) for part, t in b.items()}
    else:
        # neuronx-distributed leaves no mark on weight_qkv
        ending, cut = ("lora_B.weight_qkv", None) if spec.kind == "qkv" else ("lora_B.weight", cut)
        found[ending] = (torch.cat(list(b.values())), cut)
    if bias:
        found["lora_B.bias"] = (torch.cat(bias), cut)
    return found


def write_rank(file, tensors, *, xser):
    """What one process writes: a dict of tensors, or of references with the tensors beside it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    if not xser:
        torch.save(tensors, file)
        return
    module = types.ModuleType("torch_xla.utils.serialization")
    exec("class TensorReference:\n    def __init__(self, tid):\n        self.tid = tid", module.__dict__)
    directory = file.with_name(file.name + ".tensors")
    directory.mkdir()
    references, info = {}, {}
    for tid, (name, t) in enumerate(tensors.items()):
        if not isinstance(t, torch.Tensor):
            references[name] = t
            continue
        torch.save(t, directory / f"tensor_{tid}.pt")
        references[name] = module.TensorReference(tid)
        info[tid] = {"dtype": t.dtype, "shape": t.shape, "expert_model_parallel": False}
    parents = {name: types.ModuleType(name) for name in ("torch_xla", "torch_xla.utils")}
    with patch.dict(sys.modules, parents | {module.__name__: module}):
        torch.save(references, file)
    torch.save(info, file.with_name(file.name + ".info.pt"))


def stage_of(path, pp):
    """The pipeline stage of a module, of two layers."""
    if pp == 1 or path == "model.embed_tokens" or ".0." in path:
        return 0
    return pp - 1


def rank_file(root, tp, pp):
    return root / "model" / f"dp_rank_00_tp_rank_{tp:02d}_pp_rank_{pp:02d}.pt"


def write_optimum(directory, case):
    """`adapter_<name>` as Optimum Neuron's save_pretrained writes it; returns it, specs and canonical tensors."""
    specs = specs_of(case)
    canonical = canonical_of(specs, case)
    root = directory / f"adapter_{case.adapter}"
    shards = root / "adapter_shards"
    for tp in range(case.tp):
        tensors = {
            f"base_model.model.{path}.{ending}": t
            for path, spec in specs.items()
            for ending, (t, _) in named(spec, canonical[path], tp).items()
        }
        for path in specs:
            if path in ("model.embed_tokens", "lm_head"):  # PEFT saves their frozen weights too
                rows = -(-case.vocabulary // case.tp)
                tensors[f"base_model.model.{path}.base_layer.weight"] = torch.ones(rows, HIDDEN)
        for pp in range(case.pp):  # every stage's file holds every layer, only its own of them trained
            mine = {
                name: t if stage_of(name.removeprefix("base_model.model."), case.pp) == pp else torch.zeros_like(t)
                for name, t in tensors.items()
            }
            write_rank(rank_file(shards, tp, pp), mine, xser=case.xser)
    for pp in range(case.pp):
        text = json.dumps(metadata_of(case, specs, canonical, pp), indent=4)
        (shards / f"mp_metadata_pp_rank_{pp}.json").write_text(text)
    for marker in ("checkpoint", "done"):
        (shards / marker).write_text("1")
    config = {"r": RANK, "lora_alpha": ALPHA, "target_modules": list(case.targets), "peft_type": "LORA"}
    config |= {"lora_bias": case.lora_bias, "peft_version": "0.17.0", "bias": "none"} | case.config
    (root / "adapter_config.json").write_text(json.dumps(config))
    return root, specs, canonical


def metadata_of(case, specs, canonical, pp):
    """mp_metadata_pp_rank_<pp>.json."""
    parameters = {}
    for path, spec in specs.items():
        if stage_of(path, case.pp) != pp:
            continue
        cut_like = {"partition_stride": 1, "num_partitions": case.tp}
        for ending, (_, cut) in named(spec, canonical[path], 0).items():
            name, _, rest = ending.partition(".")
            key = ".".join(["base_model.model." + path, name, case.adapter, *([rest] if rest else [])])
            parameters[key] = {"tensor_model_parallel": False}
            if cut is not None:
                parameters[key] = {"tensor_model_parallel": True, "partition_dim": cut} | cut_like
        if path in ("model.embed_tokens", "lm_head"):
            key = f"base_model.model.{path}.base_layer.weight"
            parameters[key] = {"tensor_model_parallel": True, "partition_dim": 0} | cut_like
    transformations = []
    for number in range(2):
        module = f"base_model.model.model.layers.{number}"
        mine = stage_of(f"model.layers.{number}.", case.pp) == pp
        attention, mlp = attention_of(case), [gate_up_of(case)]
        transformations.append({"module_fully_qualified_name": f"{module}.self_attn", "specs": attention * mine})
        transformations.append({"module_fully_qualified_name": f"{module}.mlp", "specs": mlp * mine})
    return {"parameters": parameters, "model_weight_transformation_specs": transformations}


def linears(name, parts, sizes, case):
    told = {"fused_linear_name": name, "linear_names": parts, "bias": False, "fuse_axis": 0, "original_dims": sizes}
    return ["FusedLinearsSpec", told | {"tp_size": case.tp, "peft_type": "lora" if parts[0] in case.targets else None}]


def gate_up_of(case):
    return linears("gate_up_proj", ["gate_proj", "up_proj"], [INSIDE] * 2, case)


def attention_of(case):
    """The specs of an attention module, as Optimum Neuron writes them."""
    if case.grouped:
        copies = max(1, case.tp // case.kv_heads)
        told = {f"{what}_projection_name": f"{what[0]}_proj" for what in ("query", "key", "value", "output")}
        told |= {"gqa_qkv_projection_name": "qkv_proj", "bias": False, "fuse_qkv": case.fuse_qkv, "tp_size": case.tp}
        told |= {"num_attention_heads": case.heads, "num_key_value_heads": case.kv_heads, "kv_size_multiplier": copies}
        told |= {"q_output_size_per_partition": case.heads * HEAD // case.tp}
        told |= {"kv_output_size_per_partition": case.kv_heads * HEAD * copies // case.tp}
        told |= {"peft_type": "lora" if "q_proj" in case.targets else None}
        return [["GQAQKVColumnParallelLinearSpec", told]]
    if case.fuse_qkv and case.heads == case.kv_heads:
        return [linears("qkv_proj", ["q_proj", "k_proj", "v_proj"], [case.heads * HEAD] * 3, case)]
    return []


def write_nxd(directory, case, *, merged=False, config_inside=False):
    """A tag directory as neuronx-distributed's save_checkpoint writes its own LoRA; returns it, specs and tensors."""
    specs = specs_of(case)
    canonical = canonical_of(specs, case)
    root = directory / "step_1"
    config = {"lora_rank": RANK, "r": RANK, "lora_alpha": ALPHA, "lora_dropout": 0.0, "bias": "none"}
    targets = sorted({path.rpartition(".")[2] for path in specs})
    config |= {"init_lora_weights": "default", "use_rslora": False, "target_modules": targets, "merge_lora": False}
    every = [
        {f"{p}.{e}": told for p, spec in specs.items() for e, told in named(spec, canonical[p], tp).items()}
        for tp in range(case.tp)
    ]
    copies = case.kv_heads_spec.multiplier if case.grouped else 1
    for tp in range(case.tp):
        mine = {name: t for name, (t, _) in every[tp].items()}
        for name, (_, cut) in every[tp].items() if merged else ():
            grouped = ".lora_B.weight_" in name
            if grouped or cut is not None:
                whole = torch.cat([each[name][0] for each in every], cut or 0)
                mine[name] = whole.chunk(copies)[0].clone() if grouped else whole  # what is left of copied heads
        for pp in range(case.pp):
            stage = {name: t for name, t in mine.items() if stage_of(name, case.pp) == pp}
            inside = {"lora_config": config | {"target_modules": targets[tp:] + targets[:tp]}} if config_inside else {}
            write_rank(rank_file(root, tp, pp), stage | inside, xser=case.xser)
    for marker in ("checkpoint", "done"):
        (root / marker).write_text("1")
    if not config_inside:
        (directory / "adapter_config.json").write_text(json.dumps(config))
    model = directory / "model-config"
    model.mkdir()
    told = MODEL | {"num_attention_heads": case.heads, "num_key_value_heads": case.kv_heads}
    (model / "config.json").write_text(json.dumps(told))
    return root, specs, canonical
