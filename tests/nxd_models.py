"""Run by torchrun where neuronx-distributed is: stock PEFT's adapter in a Llama that is made of its real layers.

    python -m torch.distributed.run --nproc-per-node 4 nxd_models.py DIRECTORY

As nxd_layers.py. The model is transformers' own, its linears and embeddings replaced. DIRECTORY gets results.json.
"""

import copy
import json
import os
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path

import nxd_layers  # first: it replaces what is for devices only

# isort: split
import peft
import torch
import torch.distributed as dist
import transformers
from neuronx_distributed.modules import qkv_linear
from neuronx_distributed.parallel_layers import grads, layers
from nxd_attention import Case as Lying
from nxd_attention import held
from nxd_layers import Place, error, worst
from safetensors.torch import load_file
from torch import nn

import adapters

HIDDEN, INSIDE, VOCABULARY, HEADS, HEAD = 32, 48, 64, 8, 4
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
RATE = 16.0  # so that a step is greater than the rounding of what it is added to


@dataclass(frozen=True)
class Case:
    """How a Llama is made, and what is adapted."""

    key_value: int = 8
    attention: str = "separate"  # or "grouped", or "fused"
    fused_mlp: bool = False
    targets: tuple[str, ...] = (*ALL, "embed_tokens", "lm_head")
    bias: bool = False
    layers: list[int] | None = None


CASES = {
    "separate": Case(),
    "separate, bias": Case(bias=True, targets=tuple(ALL)),
    "grouped": Case(attention="grouped", fused_mlp=True),
    "grouped, few heads": Case(key_value=2, attention="grouped", fused_mlp=True),
    "fused": Case(attention="fused", fused_mlp=True),
    "fused, few heads": Case(key_value=2, attention="fused", fused_mlp=True),
    "fused, one head": Case(key_value=1, attention="fused", targets=("q_proj", "v_proj", "gate_proj"), fused_mlp=True),
    # Behind a layer that is not wrapped, gradients go through its own backward: with copies of heads, none here.
    "only last output": Case(key_value=2, attention="grouped", targets=("o_proj",), layers=[1]),
}


def stock(case):
    """transformers' model, the same on every process."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=INSIDE,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        num_key_value_heads=case.key_value,
        head_dim=HEAD,
        initializer_range=0.15,
        pad_token_id=0,
        attention_bias=case.bias,
        mlp_bias=case.bias,
    )
    model = transformers.LlamaForCausalLM(config)
    for p in model.parameters():
        if p.dim() == 1:
            nn.init.normal_(p, 1.0, 0.2)
    return model


class Given(nn.Module):
    """A projection that was computed before."""

    value = None

    def forward(self, x):
        return self.value


def before(block, name, parts):
    """Compute a fused layer before its block, whose projections then give what it gave."""
    for part in parts:
        setattr(block, part, Given())

    def run(module, args, kwargs):
        y = getattr(block, name)(args[0] if args else kwargs["hidden_states"])
        for part, value in zip(parts, y if isinstance(y, tuple) else y.chunk(len(parts), -1), strict=True):
            getattr(block, part).value = value

    block.register_forward_pre_hook(run, with_kwargs=True)


def parallel(model, case, place):
    """The same model, made of the real layers: each holds what their converter would give it."""
    copies = max(1, place.size // case.key_value) if case.attention != "separate" else 1
    queries, keys = held(Lying(place.size, HEADS, case.key_value, copies), place.rank)

    def of_heads(x, heads):
        return torch.cat([x[h * HEAD : (h + 1) * HEAD] for h in heads])

    def fill(p, value):
        with torch.no_grad():
            p.copy_(value)

    def column(base, **options):
        new = layers.ColumnParallelLinear(base.in_features, base.out_features, bias=base.bias is not None, **options)
        fill(new.weight, place.chunk(base.weight, 0))
        if base.bias is not None:
            fill(new.bias, place.chunk(base.bias, 0))
        return new

    def row(base, heads=None):
        has_bias = base.bias is not None
        new = layers.RowParallelLinear(base.in_features, base.out_features, bias=has_bias, input_is_parallel=True)
        fill(new.weight, place.chunk(base.weight, 1) if heads is None else of_heads(base.weight.T, heads).T)
        if has_bias:
            fill(new.bias, base.bias)
        return new

    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        if case.attention == "separate":
            for name in ALL[:3]:
                setattr(attention, name, column(getattr(attention, name), gather_output=False))
            attention.o_proj = row(attention.o_proj)
        else:
            q, k, v = (getattr(attention, name).weight for name in ALL[:3])
            fused = case.attention == "fused"
            new = qkv_linear.GQAQKVColumnParallelLinear(
                HIDDEN,
                [HEADS * HEAD, case.key_value * HEAD],
                bias=False,
                gather_output=False,
                kv_size_multiplier=copies,
                fuse_qkv=fused,
            )
            parts = [of_heads(q, queries), of_heads(k, keys), of_heads(v, keys)]
            if fused:
                fill(new.weight_qkv, torch.cat(parts))
            else:
                for name, part in zip("qkv", parts, strict=True):
                    fill(getattr(new, f"weight_{name}"), part)
            attention.qkv_proj = new
            attention.num_key_value_groups = HEADS // (case.key_value * copies)
            before(attention, "qkv_proj", ALL[:3])
            attention.o_proj = row(attention.o_proj, queries)
        if case.fused_mlp:
            whole = torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight])
            options = {"bias": False, "gather_output": False, "stride": 2}
            mlp.gate_up_proj = layers.ColumnParallelLinear(HIDDEN, 2 * INSIDE, **options)
            fill(mlp.gate_up_proj.weight, place.strided(whole, 0, 2))
            before(mlp, "gate_up_proj", ["gate_proj", "up_proj"])
        else:
            for name in ("gate_proj", "up_proj"):
                setattr(mlp, name, column(getattr(mlp, name), gather_output=False))
        mlp.down_proj = row(mlp.down_proj)
    table = model.model.embed_tokens.weight
    model.model.embed_tokens = layers.ParallelEmbedding(VOCABULARY, HIDDEN, padding_idx=0)
    fill(model.model.embed_tokens.weight, place.chunk(table, 0))
    model.lm_head = column(model.lm_head)
    # What it gathers lies transposed in memory, which transformers' loss does not take.
    model.lm_head.register_forward_hook(lambda module, args, y: y.contiguous())
    return model


def adapter(model, case):
    """Stock PEFT's, everything in it random."""
    config = peft.LoraConfig(
        r=3,
        lora_alpha=5,
        target_modules=list(case.targets),
        layers_to_transform=case.layers,
        task_type="CAUSAL_LM",
    )
    wrapped = peft.get_peft_model(copy.deepcopy(model), config)
    torch.manual_seed(1)
    for name, p in wrapped.named_parameters():
        if "lora_" in name:
            nn.init.normal_(p, 0.0, 0.2)
    return wrapped


def factors(directory):
    return {n: t for n, t in load_file(directory / "adapter_model.safetensors").items() if "lora_" in n}


def check(case, place, directory, gradients):
    """Every check of one case."""
    model = stock(case)
    theirs = adapter(model, case)
    is_first = dist.get_rank() == 0
    if is_first:
        theirs.save_pretrained(directory / "theirs", save_embedding_layers=False)
    dist.barrier()
    torch.manual_seed(2)
    ids = torch.randint(0, VOCABULARY, (2, 9))
    expected = theirs(input_ids=ids, labels=ids)
    base = model(input_ids=ids).logits
    ours = parallel(model, case, place).train()
    adapters.wrap(ours, adapters.read_spec(directory / "theirs"), gradients=gradients)
    zero = ours(input_ids=ids).logits
    adapters.load(ours, directory / "theirs")
    adapters.save(ours, directory / "ours")
    found = {"zero B": error(zero, base)}
    saved, stored = factors(directory / "ours"), factors(directory / "theirs")
    same = saved.keys() == stored.keys() and all(torch.equal(saved[n], stored[n]) for n in stored)
    found["file alike"] = float(same)
    got = ours(input_ids=ids, labels=ids)
    found["logits"], found["loss"] = error(got.logits, expected.logits), error(got.loss, expected.loss)
    found["differs before"] = error(base, expected.logits)

    mine = [p for p in ours.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(mine, lr=RATE)
    got.loss.backward()
    if gradients == "deferred":
        grads.allreduce_sequence_parallel_gradients(optimizer)
    optimizer.step()
    expected.loss.backward()
    norm = torch.stack([p.grad.square().sum() for p in theirs.parameters() if p.grad is not None]).sum().sqrt()
    copies = case.attention != "separate" and case.key_value < place.size
    if not copies:
        found["norm"] = error(torch.as_tensor(grads.get_grad_norm(mine)).reshape(()), norm)
    torch.optim.SGD([p for p in theirs.parameters() if p.requires_grad], lr=RATE).step()
    adapters.save(ours, directory / "stepped")
    if is_first:
        theirs.save_pretrained(directory / "stepped theirs", save_embedding_layers=False)
    dist.barrier()
    saved, stepped = factors(directory / "stepped"), factors(directory / "stepped theirs")
    steps = {n: (saved[n] - stored[n], stepped[n] - stored[n]) for n in stored}
    found["step"] = max(error(a, b) for a, b in steps.values())
    loaded = peft.PeftModel.from_pretrained(stock(case), directory / "stepped").double()  # as exact as the file
    found["stock PEFT loads it"] = error(loaded(input_ids=ids).logits, ours(input_ids=ids).logits)
    return found | many(case, place, directory)


def many(case, place, directory):
    """Of each row its own adapter, and two for all, as stock PEFT has them."""
    theirs = peft.PeftModel.from_pretrained(stock(case), directory / "theirs", adapter_name="one").eval()
    theirs.load_adapter(directory / "stepped", "two")
    ours = parallel(stock(case), case, place).eval()
    held = adapters.ManyAdapters(ours, adapters.read_spec(directory / "theirs"), places=3)
    held.add("one", directory / "theirs")
    held.add("two", directory / "stepped")
    ids = torch.randint(0, VOCABULARY, (3, 9), generator=torch.Generator().manual_seed(3))
    held.select_rows(["two", None, "one"])
    rows = theirs(input_ids=ids, adapter_names=["two", "__base__", "one"]).logits
    found = {"rows": error(ours(input_ids=ids).logits, rows)}
    held.select("one", "two")
    theirs.base_model.set_adapter(["one", "two"])
    found["both"] = error(ours(input_ids=ids).logits, theirs(input_ids=ids).logits)
    found["both differ before"] = error(rows, theirs(input_ids=ids).logits)
    return found


def main(path):
    warnings.simplefilter("ignore")
    results = {}
    state = nxd_layers.started({"tp": 4})
    for size in (4, 2):
        if size == 2:
            state.destroy_kv_group()
            state.destroy_model_parallel()
            state.initialize_model_parallel(tensor_model_parallel_size=2)
        results[str(size)] = {}
        for name, case in CASES.items():
            if state._KV_SHARED_GROUP is not None:
                state.destroy_kv_group()
            copies = case.attention != "separate" and case.key_value < size
            for gradients in ("summed",) if copies else ("summed", "deferred"):
                directory = Path(path) / f"{size} {name} {gradients}"
                results[str(size)][f"{name}, {gradients}"] = worst(check(case, Place(), directory, gradients))
    if dist.get_rank() == 0:
        (Path(path) / "results.json").write_text(json.dumps(results, indent=1))
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)  # torch_xla has nothing to shut down


if __name__ == "__main__":
    main(sys.argv[1])
