"""Run by torchrun where neuronx-distributed is: a wrapped model in its trainer, beside the same training without it.

    python -m torch.distributed.run --nproc-per-node 4 nxd_trainer.py RESULTS.json

As nxd_layers.py. Tensor parallel 2 with sequence parallel, data parallel 2; the truth is the dense model on the whole
batch, of which nothing is cut.
"""

import functools
import json
import os
import re
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

from foreign_programs import started  # first: it replaces what is for devices only

# isort: split
import oracle
import torch
import torch.distributed as dist
from neuronx_distributed.modules.qkv_linear import GQAQKVColumnParallelLinear
from neuronx_distributed.parallel_layers import grads, layers, parallel_state
from neuronx_distributed.parallel_layers.loss_functions import parallel_cross_entropy
from neuronx_distributed.trainer import (
    initialize_parallel_model,
    initialize_parallel_optimizer,
    load_checkpoint,
    neuronx_distributed_config,
    save_checkpoint,
)
from nxd_layers import Place, error, worst
from safetensors.torch import load_file
from torch import nn

import adapters
from adapters import nxd, nxd_checkpoint, sharded
from lora_fn import LoraFnError, LoraSpec

WIDTH, INSIDE, VOCABULARY, LAYERS, BATCH, LENGTH, STEPS = 8, 16, 24, 2, 4, 6, 5
RANK, ALPHA = 3, 6.0
BLOCKS = ("up_proj", "down_proj")
ALL = (*BLOCKS, "embed_tokens", "lm_head")
ROWS = ("down_proj", "embed_tokens")  # their lora_A is cut, along its columns; of the others lora_B, along its rows
PRECISION = ("use_master_weights", "use_fp32_grad_acc", "use_master_weights_in_ckpt")
ADAM = {"lr": 1e-2, "weight_decay": 0.1, "eps": 1e-3}  # so that the size of a gradient matters


class Block(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH, dtype=options["dtype"])
        self.up_proj = layers.ColumnParallelLinear(WIDTH, INSIDE, bias=False, gather_output=False, **options)
        self.down_proj = layers.RowParallelLinear(INSIDE, WIDTH, bias=False, input_is_parallel=True, **options)

    def forward(self, x):
        return x + self.down_proj(torch.tanh(self.up_proj(self.norm(x))))


class Loss(nn.Module):
    def forward(self, logits, labels):
        return parallel_cross_entropy(logits, labels).mean()


class Model(nn.Module):
    """Ids and labels [B, S] -> loss. Activations are [S / TP, B, WIDTH] under sequence parallel."""

    def __init__(self, dtype, sequence_parallel):
        super().__init__()
        self.sequence_parallel = sequence_parallel
        sequence = {"sequence_parallel_enabled": sequence_parallel, "sequence_dimension": 0, "dtype": dtype}
        options = sequence | {"reduce_dtype": dtype}
        self.embed_tokens = layers.ParallelEmbedding(VOCABULARY, WIDTH, **sequence)
        self.layers = nn.ModuleList([Block(**options) for _ in range(LAYERS)])
        self.lm_head = layers.ColumnParallelLinear(WIDTH, VOCABULARY, bias=False, gather_output=False, **options)
        self.loss = Loss()

    def forward(self, ids, labels):
        x = self.embed_tokens(ids if self.sequence_parallel else ids.T).contiguous()
        for layer in self.layers:
            x = layer(x)
        return self.loss(self.lm_head(x), labels.T.contiguous())


def drawn(*shape, seed, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def whole(dtype=torch.float64):
    """{path: canonical weight}."""
    shapes = {"embed_tokens": (VOCABULARY, WIDTH), "lm_head": (VOCABULARY, WIDTH)}
    for number in range(LAYERS):
        shapes |= {f"layers.{number}.up_proj": (INSIDE, WIDTH), f"layers.{number}.down_proj": (WIDTH, INSIDE)}
    drawn_in_turn = (
        (path, shape, drawn(*shape, seed=n, dtype=dtype)) for n, (path, shape) in enumerate(shapes.items())
    )
    return {path: weight / shape[-1] ** 0.5 for path, shape, weight in drawn_in_turn}


def cut(path, name, p):
    """This process's part of a canonical parameter."""
    is_row = path.endswith(ROWS)
    if name == "weight":
        return Place().chunk(p, 1 if path.endswith("down_proj") else 0)
    if (name == "lora_A") == is_row:
        return Place().chunk(p, 1 if is_row else 0)
    return p


def made(targets, *, gradients="deferred", dtype=torch.float64, sequence_parallel=True):
    """The wrapped model, and its canonical factors {layer.name: tensor}, as every process knows them."""
    model = Model(dtype, sequence_parallel)
    for path, weight in whole(dtype).items():
        with torch.no_grad():
            model.get_submodule(path).weight.copy_(cut(path, "weight", weight))
    spec = LoraSpec(rank=RANK, alpha=ALPHA, init_lora_weights=False, target_modules=targets)
    adapters.wrap(model, spec, gradients=gradients, dtype=dtype)
    factors = {}
    for number, (path, of) in enumerate(adapters.factors(model).items()):
        rows, columns = whole()[path].shape
        sizes = (columns, rows) if path == "embed_tokens" else (rows, columns)
        canonical = {"lora_A": (RANK, sizes[1]), "lora_B": (sizes[0], RANK)}
        for name, p in of.items():
            seed = 100 + 2 * number + (name == "lora_A")
            factors[f"{path}.{name}"] = 0.2 * drawn(*canonical[name], seed=seed, dtype=dtype)
            with torch.no_grad():
                p.copy_(cut(path, name, factors[f"{path}.{name}"]))
    return model, factors


def dense_loss(factors, ids, labels):
    """The truth: ids and labels [B, S] of the whole batch."""

    def layer(path, x, kind="linear"):
        own = {name: factors[f"{path}.{name}"] for name in ("lora_A", "lora_B") if f"{path}.{name}" in factors}
        weight = whole(next(iter(factors.values())).dtype)[path]
        return oracle.forward({"weight": weight, **own}, x, kind=kind, scaling=ALPHA / RANK)

    x = layer("embed_tokens", ids, "embedding")
    for number in range(LAYERS):
        h = nn.functional.layer_norm(x, (WIDTH,))
        x = x + layer(f"layers.{number}.down_proj", torch.tanh(layer(f"layers.{number}.up_proj", h)))
    return nn.functional.cross_entropy(layer("lm_head", x).flatten(0, 1), labels.flatten())


def batch(step):
    """Ids and labels [B, S], whole; and those of this data-parallel process."""
    everything = torch.randint(0, VOCABULARY, (2, BATCH, LENGTH), generator=torch.Generator().manual_seed(step))
    mine = everything.chunk(parallel_state.get_data_parallel_size(), 1)[parallel_state.get_data_parallel_rank()]
    return everything, mine


def dense_training(factors, *, max_norm):
    """Losses, norms and the factors after all steps."""
    factors = {name: p.clone().requires_grad_() for name, p in factors.items()}
    optimizer = torch.optim.AdamW(factors.values(), **ADAM)
    losses, norms = [], []
    for step in range(STEPS):
        loss = dense_loss(factors, *batch(step)[0])
        loss.backward()
        norms.append(nn.utils.clip_grad_norm_(factors.values(), max_norm))
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return losses, norms, factors


def config(max_norm=0.05, **options):
    parallel_state.destroy_model_parallel()
    clipping = {"zero_one_enabled": False, "grad_clipping": True, "max_grad_norm": max_norm}
    options = {"tensor_parallel_size": 2, "sequence_parallel": True, "optimizer_config": clipping} | options
    return neuronx_distributed_config(**options)


def mean_over_data(loss):
    loss = loss.detach().clone()
    dist.all_reduce(loss, group=parallel_state.get_data_parallel_group())
    return loss / parallel_state.get_data_parallel_size()


def check_training(targets, *, max_norm=0.05, checkpointed=None, **options):
    """Every number of the trainer's own steps."""
    settings = config(max_norm, activation_checkpoint_config=checkpointed)
    wrapped, start = made(targets, **options)
    if checkpointed:
        adapters.enable_input_require_grads(wrapped)
    model = initialize_parallel_model(settings, lambda: wrapped)
    mine = [p for p in model.parameters() if p.requires_grad]
    optimizer = initialize_parallel_optimizer(settings, torch.optim.AdamW, mine, **ADAM)
    losses, norms, expected = dense_training(start, max_norm=max_norm)
    found = {"only factors alike": float(len(mine) == len(start))}
    for step in range(STEPS):
        loss = model.run_train(*batch(step)[1])
        optimizer.step()
        optimizer.zero_grad()
        found[f"loss {step}"] = error(mean_over_data(loss), losses[step])
        found[f"norm {step}"] = error(optimizer.grad_norm.reshape(()), norms[step])
    found["clipped alike"] = float((min(norms) > max_norm) == (max_norm < 1))
    place, replicas = Place(), Place(parallel_state.get_data_parallel_group())
    for path, of in adapters.factors(wrapped).items():
        for name, p in of.items():
            full, first = expected[f"{path}.{name}"], start[f"{path}.{name}"]
            found[f"{path}.{name}, replicas alike"] = replicas.alike(p)
            found[f"{path}.{name}, change"] = error(p - cut(path, name, first), cut(path, name, full - first))
            if cut(path, name, full) is full:
                found[f"{path}.{name} alike"] = place.alike(p)
    return found


def check_pipeline(targets, directory, checkpointed=None):
    """Its pipeline of two stages in its trainer, two microbatches a step; the checkpoint of both, joined."""
    settings = config(
        pipeline_parallel_size=2,
        activation_checkpoint_config=checkpointed,
        pipeline_config={
            "transformer_layer_cls": Block,
            "num_microbatches": 2,
            "output_loss_value_spec": True,
            "input_names": ["ids", "labels"],
            "pipeline_cuts": ["layers.0"],
            "leaf_module_cls": [*nxd.LEAF_MODULES, "Loss"],
        },
    )
    wrapped, start = made(targets)
    content = nxd_checkpoint.user_content(wrapped)
    if checkpointed:
        adapters.enable_input_require_grads(wrapped)
    model = initialize_parallel_model(settings, lambda: wrapped)
    mine = [p for p in model.parameters() if p.requires_grad]
    optimizer = initialize_parallel_optimizer(settings, torch.optim.AdamW, mine, **ADAM)
    losses, norms, expected = dense_training(start, max_norm=0.05)
    found = {}
    for step in range(STEPS):
        ids, labels = batch(step)[1]
        loss = model.run_train(ids=ids, labels=labels)
        optimizer.step()
        optimizer.zero_grad()
        found |= {} if loss is None else {f"loss {step}": error(loss, losses[step])}
        found[f"norm {step}"] = error(optimizer.grad_norm.reshape(()), norms[step])
    for name, p in held(model).items():
        path, _, last = name.rpartition(".")
        full, first = expected[name], start[name]
        found[f"{name}, change"] = error(p - cut(path, last, first), cut(path, last, full - first))
        if cut(path, last, full) is full:
            found[f"{name} alike"] = Place().alike(p)
    save_checkpoint(str(directory), "last", held(model), user_content=content, use_xser=True)
    state, before = {}, {name: p.clone() for name, p in held(model).items()}
    load_checkpoint(str(directory), "last", model=state)
    for p in mine:
        nn.init.zeros_(p)
    adapters.fill(model, state)
    found["filled alike"] = same(held(model), before)
    if dist.get_rank() == 0:
        sharded.consolidate(directory / "last", directory / "joined", allow_pickle=True, quiet=True)
        joined = load_file(directory / "joined" / "adapter_model.safetensors")
        found["joined alike"] = float(len(joined) == len(expected))
        for name, p in joined.items():
            ours = name.removeprefix("base_model.model.").replace("lora_embedding_", "lora_").removesuffix(".weight")
            found[f"{ours}, joined"] = error(p, expected[ours])
    dist.barrier()
    return found


def check_forgotten(directory):
    """A trainer that was not told of sequence parallel sums nothing: the copies drift, and no adapter is saved."""
    settings = config(sequence_parallel=False)
    wrapped, _ = made(BLOCKS)
    mine = [p for p in wrapped.parameters() if p.requires_grad]
    optimizer = initialize_parallel_optimizer(settings, torch.optim.AdamW, mine, **ADAM)
    wrapped(*batch(0)[1]).backward()
    optimizer.step()
    told = r"up_proj: the copies of \['lora_A'\] differ between processes; call lora_fn.sync_gradients"
    return {"saving is refused alike": refused(functools.partial(adapters.save, wrapped, directory), told)}


def check_main_grad(targets):
    """Gradients that lie in main_grad, as its ZeRO-1 accumulates them in float32: summed where marked, once."""
    wrapped, start = made(targets, dtype=torch.float32)
    everything, _ = batch(0)
    truth = {name: p.clone().requires_grad_() for name, p in start.items()}
    dense_loss(truth, *everything).backward()
    optimizer = torch.optim.SGD([p for p in wrapped.parameters() if p.requires_grad], lr=1.0)
    for ids, labels in zip(*(t.chunk(2) for t in everything), strict=True):  # two microbatches
        (wrapped(ids, labels) / 2).backward()
        for p in wrapped.parameters():
            if p.grad is not None:
                p.main_grad = getattr(p, "main_grad", 0) + p.grad.float()
                p.grad = None
    found, before = {}, {}
    for name, p in wrapped.named_parameters():
        if p.requires_grad:
            before[name] = p.main_grad.clone()
    grads.allreduce_sequence_parallel_gradients(optimizer)
    for path, of in adapters.factors(wrapped).items():
        for name, p in of.items():
            full = truth[f"{path}.{name}"].grad
            mine = cut(path, name, full)
            found[f"{path}.d{name}"] = error(p.main_grad, mine)
            if mine is full:
                found[f"{path}.d{name} alike"] = Place().alike(p.main_grad)
                found[f"{path}.d{name} before"] = error(before[f"{path}.{name}"], full)
    return found


def check_reentrant(targets):
    """Its own reentrant checkpoints around each block, whose input comes from a frozen embedding."""
    from neuronx_distributed.utils.activation_checkpoint import apply_activation_checkpointing

    _, (ids, labels) = batch(0)
    plain, _ = made(targets)
    plain(ids, labels).backward()
    expected = {name: p.grad for name, p in plain.named_parameters() if p.requires_grad}
    bare, _ = made(targets)
    apply_activation_checkpointing(bare, check_fn=lambda module: isinstance(module, Block))
    loss = bare(ids, labels)
    found = {"without it no gradient alike": float(not loss.requires_grad)}
    model, _ = made(targets)
    adapters.enable_input_require_grads(model)
    apply_activation_checkpointing(model, check_fn=lambda module: isinstance(module, Block))
    loss = model(ids, labels)
    loss.backward()
    found["loss"] = error(loss, plain(ids, labels))
    mine = {name.replace("_checkpoint_wrapped_module.", ""): p for name, p in model.named_parameters()}
    for name, grad in expected.items():
        found[f"d{name} alike"] = float(torch.equal(mine[name].grad, grad))
    found["embedding has none alike"] = float(mine["embed_tokens.weight"].grad is None)
    return found


class Everything(nn.Module):
    """A layer of each form, which is saved and never run."""

    def __init__(self):
        super().__init__()
        self.config = SimpleNamespace(num_attention_heads=8, num_key_value_heads=2)
        local = {"bias": False, "gather_output": False}
        self.embed_tokens = layers.ParallelEmbedding(23, WIDTH, pad=True)
        self.qkv_proj = GQAQKVColumnParallelLinear(
            WIDTH, [16, 4], kv_size_multiplier=parallel_state.get_tensor_model_parallel_size() // 2, **local
        )
        self.o_proj = layers.RowParallelLinear(16, WIDTH, bias=False, input_is_parallel=True)
        self.gate_up_proj = layers.ColumnParallelLinear(WIDTH, 2 * INSIDE, stride=2, **local)
        self.down_proj = layers.RowParallelLinear(INSIDE, WIDTH, bias=False, input_is_parallel=True)


def everything(seed, rank=RANK):
    """It, wrapped, with factors out of a seed; and an optimizer that has made a step."""
    names = ("embed_tokens", "q_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    spec = LoraSpec(rank=rank, alpha=ALPHA, init_lora_weights=False, target_modules=names)
    model = adapters.wrap(Everything(), spec, seed=seed)
    mine = [p for p in model.parameters() if p.requires_grad]
    for p in mine:
        p.grad = p.detach().clone()
    settings = {"zero_one_enabled": False, "grad_clipping": False}
    settings = {"optimizer_config": settings, "mixed_precision_config": dict.fromkeys(PRECISION, False)}
    optimizer = initialize_parallel_optimizer(settings | {"sequence_parallel": False}, torch.optim.AdamW, mine, **ADAM)
    optimizer.step()
    return model, optimizer


def held(model):
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


def same(found, expected):
    """1.0 where two trees of tensors and values are the same, bit for bit and in their dtypes."""
    if isinstance(expected, torch.Tensor):
        return float(
            isinstance(found, torch.Tensor) and found.dtype == expected.dtype and torch.equal(found.cpu(), expected)
        )
    if isinstance(expected, dict):
        return float(found.keys() == expected.keys() and all(same(found[name], expected[name]) for name in expected))
    if isinstance(expected, list):
        return float(len(found) == len(expected) and all(map(same, found, expected)))
    return float(found == expected)


def refused(function, message):
    """1.0 where a call raises that sentence."""
    try:
        function()
    except LoraFnError as raised:
        return float(re.search(message, str(raised)) is not None)
    return 0.0


def check_checkpoint(directory, xser):
    """Factors and the optimizer's state through its save_checkpoint and load_checkpoint, and on to PEFT's form."""
    model, optimizer = everything(1)
    content = nxd_checkpoint.user_content(model, {"step": 3})
    save_checkpoint(str(directory), "step_3", held(model), optimizer, user_content=content, use_xser=xser)
    other, new = everything(2)
    found = {"differs before": error(other.down_proj.lora_A, model.down_proj.lora_A)}
    state = {}
    told = load_checkpoint(str(directory), "step_3", model=state, optimizer=new)
    found["user content alike"] = float(told == content)
    found["read back alike"] = same(state, held(model))
    adapters.fill(other, state)
    found["filled alike"] = same(held(other), held(model))
    found["optimizer alike"] = same(new.state_dict()["state"], optimizer.state_dict()["state"])
    adapters.save(model, directory / "saved")
    if dist.get_rank() == 0:
        sharded.consolidate(directory / "step_3", directory / "joined", allow_pickle=True, quiet=True)
    dist.barrier()
    joined, saved = (adapter_of(directory / name) for name in ("joined", "saved"))
    found["consolidated alike"] = same(joined, saved)
    # What neuronx-distributed takes without a word.
    whole = dict(state)
    del state["down_proj.lora_A"]
    state["up_proj.lora_A"] = torch.zeros(1)
    bigger, _ = everything(2, rank=RANK + 1)
    kept = held(bigger)["down_proj.lora_B"].clone()
    messages = {
        "missing": (other, state, r"down_proj.lora_A: is missing; .*\nup_proj.lora_A: is no factor of this model"),
        "other rank": (bigger, whole, r"down_proj.lora_A: is \[3, \d+\] of float32, expected \[4, \d+\]"),
    }
    for name, (into, tensors, message) in messages.items():
        found[f"{name} is refused alike"] = refused(functools.partial(adapters.fill, into, tensors), message)
    found["refused, and kept"] = same(held(bigger)["down_proj.lora_B"], kept)
    return found


def adapter_of(directory):
    config = json.loads((directory / "adapter_config.json").read_text())
    return config | load_file(directory / "adapter_model.safetensors")


def main(path):
    warnings.simplefilter("ignore")
    started({"tp": 2})
    found = {
        "training, blocks, float64": check_training(BLOCKS),
        "training, all, float64": check_training(ALL),
        "training, all, summed, float64": check_training(ALL, gradients="summed"),
        "training, all, not clipped, float64": check_training(ALL, max_norm=1e3),
        "training, blocks, checkpointed, float64": check_training(BLOCKS, checkpointed=Block),
        "training, all, no sequence parallel, float64": check_training(ALL, sequence_parallel=False),
        "pipeline, blocks, float64": check_pipeline(BLOCKS, Path(path).parent / "blocks"),
        "pipeline, blocks, checkpointed, float64": check_pipeline(BLOCKS, Path(path).parent / "full", "full"),
        "pipeline, all, float64": check_pipeline(ALL, Path(path).parent / "all"),
        "sequence parallel forgotten": check_forgotten(Path(path).parent / "forgotten"),
        "main_grad, blocks": check_main_grad(BLOCKS),
        "main_grad, all": check_main_grad(ALL),
        "reentrant": check_reentrant(BLOCKS),
    }
    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=4)
    for name, xser in (("plain", False), ("xser", True)):
        found[f"checkpoint, {name}"] = check_checkpoint(Path(path).parent / name, xser)
    results = {case: worst(checks) for case, checks in found.items()}
    if dist.get_rank() == 0:
        Path(path).write_text(json.dumps({"2": results}, indent=1))
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)  # torch_xla has nothing to shut down


if __name__ == "__main__":
    main(sys.argv[1])
