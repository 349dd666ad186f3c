"""Run by torchrun where neuronx-distributed is: its layers of grouped-query attention, wrapped, beside dense ones.

    python -m torch.distributed.run --nproc-per-node 4 nxd_attention.py RESULTS.json

As nxd_layers.py. In the place of softmax stands something short that pairs each query head with its key-value head.
XLA's collectives, which its layers call here, too, go over gloo.
"""

import json
import os
import sys
import warnings
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import nxd_layers  # first: it replaces what is for devices only

# isort: split
import torch
import torch.distributed as dist
import xm_on_cpu
from neuronx_distributed.modules import qkv_linear
from neuronx_distributed.parallel_layers import grads, layers, parallel_state
from nxd_layers import ALPHA, BATCH, LENGTH, RANK, SCALING, Place, Recorder, draw, error, rms, worst
from torch import nn

import adapters
import lora_fn
from lora_fn import LoraSpec

HEAD = 5
PARTS = ("q", "k", "v")


@dataclass(frozen=True)
class Case:
    """Heads, how often each key-value head is there, and how things lie."""

    processes: int
    query: int
    key_value: int
    copies: int
    fused: bool = False
    hardware: str = "trn1"
    sequence: bool = False
    dtype: torch.dtype = torch.float32

    @property
    def size(self):
        """Of the input."""
        return 24 if self.dtype == torch.float32 else 192


HEADS = [(4, 8, 4, 1), (4, 8, 8, 1), (4, 8, 2, 2), (4, 8, 1, 4), (4, 8, 4, 2), (2, 8, 2, 1), (2, 8, 1, 2), (2, 4, 2, 2)]
EVERY = [Case(*h, f, w, s) for h in HEADS for f in (False, True) for w in ("trn1", "trn2") for s in (False, True)]
# On trn2, its groups that share heads suppose one head a process.
ROUNDED = [replace(c, dtype=torch.bfloat16) for c in EVERY if c.query == 8 and (c.key_value, c.copies) != (4, 2)]
CASES = [c for c in EVERY + ROUNDED if c.hardware == "trn1" or c.copies == 1 or c.key_value * c.copies == c.processes]


def held(case, rank):
    """The query heads and the key-value heads of a process, in its order."""
    slots = case.key_value * case.copies // case.processes
    each = case.query // (case.key_value * case.copies)
    queries, keys = [], []
    for slot in range(rank * slots, (rank + 1) * slots):
        head, copy = slot % case.key_value, slot // case.key_value
        if case.hardware == "trn2":
            head, copy = slot // case.copies, slot % case.copies
        keys.append(head)
        start = (head * case.copies + copy) * each
        queries += range(start, start + each)
    return queries, keys


def rows(x, heads):
    """The rows of some heads."""
    return torch.cat([x[h * HEAD : (h + 1) * HEAD] for h in heads])


def paired(q, k, v):
    """Each query head by its key head, plus its value head; their features in the order of the query heads."""
    q, k, v = (x.unflatten(-1, (-1, HEAD)) for x in (q, k, v))
    k, v = (x.repeat_interleave(q.shape[-2] // k.shape[-2], -2) for x in (k, v))
    return (q * k + v).flatten(-2)


class Attention(nn.Module):
    def __init__(self, case):
        super().__init__()
        options = {"sequence_parallel_enabled": case.sequence, "bias": False, "dtype": case.dtype}
        sizes = [case.query * HEAD, case.key_value * HEAD]
        self.qkv_proj = qkv_linear.GQAQKVColumnParallelLinear(
            case.size, sizes, gather_output=False, kv_size_multiplier=case.copies, fuse_qkv=case.fused, **options
        )
        self.o_proj = layers.RowParallelLinear(
            sizes[0], case.size, input_is_parallel=True, sequence_dimension=0 if case.sequence else None, **options
        )

    def forward(self, x):
        return self.o_proj(paired(*self.qkv_proj(x)))


class Model(nn.Module):
    def __init__(self, case):
        super().__init__()
        self.config = SimpleNamespace(num_attention_heads=case.query, num_key_value_heads=case.key_value)
        self.self_attn = Attention(case)

    def forward(self, x):
        return self.self_attn(x)


def dense(params, x):
    """The whole block, out of canonical parameters."""

    def layer(name, x):
        y = x @ params[f"weight.{name}"].T
        if f"lora_A.{name}" in params:
            y = y + SCALING * (x @ params[f"lora_A.{name}"].T @ params[f"lora_B.{name}"].T)
        return y

    return layer("o", paired(*(layer(name, x) for name in PARTS)))


def truth(params, x, cotangent, dtype=torch.float64):
    """Output, gradients of the parameters, and of x, in float64 or as rounded as the parameters are."""
    params = {name: p.to(dtype).detach().requires_grad_() for name, p in params.items()}
    x = x.to(dtype).detach().requires_grad_()
    y = dense(params, x)
    (y * cotangent.to(dtype)).sum().backward()
    return y, {name: p.grad for name, p in params.items()}, x.grad


def locally(case, rank, name, whole):
    """What a process holds of a canonical parameter."""
    queries, keys = held(case, rank)
    kind, part = name.split(".")
    if part == "o":
        return whole if kind == "lora_B" else rows(whole.T, queries).T
    return whole if kind == "lora_A" else rows(whole, queries if part == "q" else keys)


def communicated(case):
    """What a frozen block communicates with its gradient; and what neuronx-distributed adds for copies."""
    block = {"all-gather": 2, "reduce-scatter": 2} if case.sequence else {"all-reduce": 2}
    return Counter(block), Counter({"all-reduce": 1} if case.copies > 1 else {})


def extra(case, gradients):
    """What an adapter adds: the sums of lora_A of q, k and v, of lora_B of o, and of copied lora_B of k and v."""
    return Counter({"all-reduce": 4 + (2 if case.copies > 1 else 0)} if gradients == "summed" else {})


def built(case):
    """The model, as on the case's hardware."""
    parallel_state.get_platform_target = qkv_linear.get_platform_target = lambda: case.hardware
    if parallel_state._KV_SHARED_GROUP is not None:
        parallel_state.destroy_kv_group()
    torch.manual_seed(0)
    return Model(case).requires_grad_(False)


def refusals():
    """What `wrap` says to what it does not take."""

    def said(model, *targets):
        try:
            adapters.wrap(model, LoraSpec(target_modules=targets))
        except lora_fn.LoraFnError as refusal:
            return str(refusal)
        return ""

    lost = built(Case(4, 8, 2, 2))
    del lost.config
    found = {"no order": said(built(Case(4, 8, 4, 2, hardware="trn2")), "k_proj")}
    found |= {"no config": said(lost, "q_proj"), "no config, beside": said(lost, "o_proj")}
    found |= {"wrong heads": said(built(Case(4, 8, 2, 2)), "qkv_proj")}
    gathering = built(Case(4, 8, 4, 1))
    gathering.self_attn.qkv_proj.gather_output = True
    return found | {"gather_output": said(gathering, "v_proj")}


def check(case, place, gradients):
    """Every check of one case."""
    model = built(case)
    attention = model.self_attn
    torch.manual_seed(1)
    sizes = {"q": case.query * HEAD, "k": case.key_value * HEAD, "v": case.key_value * HEAD}
    whole = {f"weight.{n}": draw(size, case.size, dtype=case.dtype) for n, size in sizes.items()}
    whole["weight.o"] = draw(case.size, sizes["q"], dtype=case.dtype)
    with torch.no_grad():
        local = {name: locally(case, place.rank, name, p) for name, p in whole.items()}
        attention.o_proj.weight.copy_(local["weight.o"])
        if case.fused:
            attention.qkv_proj.weight_qkv.copy_(torch.cat([local[f"weight.{n}"] for n in PARTS]))
        else:
            for n in PARTS:
                getattr(attention.qkv_proj, f"weight_{n}").copy_(local[f"weight.{n}"])
    x_whole, cotangent = (draw(LENGTH, BATCH, case.size, dtype=case.dtype) for _ in range(2))
    found = {}

    def cut(t):
        return place.chunk(t, 0) if case.sequence else t

    def ran():
        x = cut(x_whole).clone().requires_grad_()
        y = model(x)
        (y * cut(cotangent)).sum().backward()
        return y, x.grad

    y_base, _, dx_base = truth(whole, x_whole, cotangent)
    with torch.no_grad():
        own = model(cut(x_whole))
    found["own y to the truth"] = error(own, cut(y_base))
    if case.fused:
        try:
            ran()
            found["own fails"] = 0.0
        except TypeError:
            found["own fails"] = 1.0
    else:
        with Recorder() as theirs:
            _, own_dx = ran()
        found["own dx to the truth"] = error(own_dx, cut(dx_base))
        base, for_copies = communicated(case)
        found["own collectives alike"] = float(theirs.seen == base + for_copies)
    lora = LoraSpec(rank=RANK, alpha=ALPHA, target_modules=("q_proj", "k_proj", "v_proj", "o_proj"))
    adapters.wrap(model, lora, gradients=gradients)
    y, dx = ran()
    found["zero B to the truth"], found["zero B, dx to the truth"] = error(y, cut(y_base)), error(dx, cut(dx_base))
    found["zero B to its own"] = error(y, own)

    torch.manual_seed(2)
    for n in (*PARTS, "o"):
        out, size = whole[f"weight.{n}"].shape
        whole |= {f"lora_A.{n}": draw(RANK, size, dtype=case.dtype), f"lora_B.{n}": draw(out, RANK, dtype=case.dtype)}
    factors = {
        f"{kind}.{n}": attention.qkv_proj.get_parameter(f"{kind}.{n}") for kind in ("lora_A", "lora_B") for n in PARTS
    }
    factors |= {f"{kind}.o": attention.o_proj.get_parameter(kind) for kind in ("lora_A", "lora_B")}
    with torch.no_grad():
        for name, p in factors.items():
            p.copy_(locally(case, place.rank, name, whole[name]))
            p.grad = None
    with Recorder() as ours:
        y, dx = ran()
    found["collectives alike"] = float(ours.seen == communicated(case)[0] + extra(case, gradients))
    y_truth, truths, dx_truth = truth(whole, x_whole, cotangent)
    found["y"], found["dx"] = error(y, cut(y_truth)), error(dx, cut(dx_truth))
    if case.dtype == torch.bfloat16:
        y_rounded, _, dx_rounded = truth(whole, x_whole, cotangent, case.dtype)
        found["y, rms"] = rms(y, cut(y_truth), cut(y_rounded))
        found["dx, rms"] = rms(dx, cut(dx_truth), cut(dx_rounded))
    if gradients == "deferred" and case.copies == 1:
        grads.allreduce_sequence_parallel_gradients(torch.optim.SGD(list(factors.values()), lr=1.0))
    elif gradients == "deferred":
        tree = {path: {n: p.grad for n, p in ps.items()} for path, ps in adapters.factors(model).items()}
        synced = lora_fn.sync_gradients(tree, adapters.specs(model))
        for path, ps in adapters.factors(model).items():
            for n, p in ps.items():
                p.grad = synced[path][n]
    for name, p in factors.items():
        expected = locally(case, place.rank, name, truths[name])
        found[f"d{name}"] = error(p.grad, expected)
        if expected.shape == truths[name].shape and place.size > 1:
            found[f"d{name} alike"] = place.alike(p.grad)
    square = sum(truths[n].square().sum() for n in factors)
    norm = grads.get_grad_norm(list(factors.values()))
    found["norm"] = error(torch.as_tensor(norm).reshape(()), square.sqrt())
    return found


def main(path):
    warnings.simplefilter("ignore")
    results = {}
    xm_on_cpu.start()
    state = nxd_layers.started({"tp": 4})
    for size in (4, 2):
        if size == 2:
            state.destroy_kv_group()
            state.destroy_model_parallel()
            state.initialize_model_parallel(tensor_model_parallel_size=2)
        else:
            results["refused"] = refusals()
        place = Place()
        results[str(size)] = {
            f"{case}, {gradients}": worst(check(case, place, gradients))
            for case in CASES
            if case.processes == size
            for gradients in ("summed", "deferred")
        }
    if dist.get_rank() == 0:
        Path(path).write_text(json.dumps(results, indent=1))
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)  # torch_xla has nothing to shut down


if __name__ == "__main__":
    main(sys.argv[1])
