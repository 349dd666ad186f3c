"""Run by torchrun where Optimum Neuron is: stock PEFT's adapter in its own training models, wrapped by us.

    python -m torch.distributed.run --nproc-per-node 4 optimum_models.py DIRECTORY

As nxd_layers.py. Its models are loaded by its own from_pretrained, out of transformers' own model on disk, and computed
by its own code, but for the layers that are wrapped. DIRECTORY gets results.json.
"""

import copy
import gc
import itertools
import json
import os
import sys
import warnings
from dataclasses import dataclass, field
from pathlib import Path

import nxd_layers  # first: it replaces what is for devices only

# isort: split
import peft
import torch
import torch.distributed as dist
import transformers
from neuronx_distributed.modules import qkv_linear
from neuronx_distributed.parallel_layers import grads, parallel_state
from nxd_layers import Place, error, worst
from optimum.neuron.models import training
from optimum.neuron.models.training import checkpointing, modeling_utils, transformations_utils
from safetensors.torch import load_file
from torch import nn

import adapters
import lora_fn
from lora_fn import LoraSpec, layout, peft_format
from lora_fn.reshard import differing, gather

modeling_utils.get_local_world_size = dist.get_world_size  # torch_xla 2.9 lacks what it asks for

ATTENTION, MLP = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")
ENDS = ("embed_tokens", "lm_head")
VOCABULARY, LENGTH, STEPS = 64, 8, 3
RATE = 0.1  # greater ones let rounding grow from step to step, in the stock model too


@dataclass(frozen=True)
class Case:
    """A model of theirs, what is adapted, and on how many processes."""

    sizes: tuple[int, ...] = (4, 2)
    model: str = "Llama"
    heads: int = 8
    key_value: int = 8
    multiplier: int | None = None
    fused: bool = False
    targets: tuple[str, ...] = (*ATTENTION, *MLP, *ENDS)
    layers: list[int] | None = None
    checkpointing: bool = False
    hardware: str = "trn1"
    config: dict = field(default_factory=dict)

    def copies(self, size):
        """Whether a key-value head lies on several of so many processes."""
        return self.multiplier is not None or self.key_value < size


GRANITE, QWEN3 = {"model": "Granite"}, {"model": "Qwen3"}
CASES = {
    "Llama": Case(),
    "Llama, 2 key-value heads": Case(key_value=2),
    "Llama, 2 key-value heads, trn2": Case((4,), key_value=2, hardware="trn2"),
    "Llama, 1 key-value head, fused": Case(key_value=1, fused=True),
    "Llama, 2 key-value heads, fused": Case((4,), key_value=2, fused=True),
    "Llama, as many key-value heads, fused": Case(fused=True),
    "Llama, 6 key-value heads twice": Case((4,), heads=12, key_value=6, multiplier=2),
    "Llama, checkpointing": Case((4,), key_value=2, checkpointing=True, targets=(*ATTENTION, *MLP)),
    "Llama, tied": Case((2,), config={"tie_word_embeddings": True}, targets=(*ATTENTION, *MLP)),
    "Llama, query and value": Case((4,), key_value=2, targets=("q_proj", "v_proj")),
    "Llama, query and value, fused": Case((2,), fused=True, targets=("q_proj", "v_proj")),
    "Llama, gate": Case((4,), key_value=2, fused=True, targets=("gate_proj",)),
    "Llama, last output": Case((2,), key_value=1, targets=("o_proj",), layers=[1]),
    "Granite": Case(**GRANITE),
    "Granite, 2 key-value heads, fused": Case((4,), **GRANITE, key_value=2, fused=True),
    "Granite, last layer": Case((4,), **GRANITE, targets=("lm_head",)),
    "Granite, not its last layer": Case((2,), **GRANITE, targets=("embed_tokens", "down_proj")),
    "Granite, checkpointing": Case((2,), **GRANITE, checkpointing=True, targets=ATTENTION),
    "Qwen3": Case((2,), **QWEN3),
    "Qwen3, 2 key-value heads": Case((4,), **QWEN3, key_value=2),
    "Qwen3, 1 key-value head, fused": Case(**QWEN3, key_value=1, fused=True),
    "Qwen3, as many key-value heads, fused": Case((4,), **QWEN3, fused=True),
}
MULTIPLIERS = {"embedding_multiplier": 2.0, "logits_scaling": 3.0, "residual_multiplier": 0.7}
OF_MODEL = {"Granite": MULTIPLIERS | {"attention_multiplier": 0.3}}


def stock(case):
    """transformers' model, the same on every process."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{case.model}Config")(
        vocab_size=VOCABULARY,
        hidden_size=4 * case.heads,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=case.heads,
        num_key_value_heads=case.key_value,
        head_dim=4,
        initializer_range=0.15,
        pad_token_id=0,
        **OF_MODEL.get(case.model, {}),
        **case.config,
    )
    model = getattr(transformers, f"{case.model}ForCausalLM")(config)
    for p in model.parameters():
        if p.dim() == 1:
            nn.init.normal_(p, 1.0, 0.2)
    return model


def parallel(case, place, directory, sequence):
    """Their model, with the weights of the stock one: loaded by their own from_pretrained."""
    parallel_state.get_platform_target = qkv_linear.get_platform_target = lambda: case.hardware
    if parallel_state._KV_SHARED_GROUP is not None:
        parallel_state.destroy_kv_group()
    settings = training.TrainingNeuronConfig(
        tensor_parallel_size=place.size,
        sequence_parallel_enabled=sequence,
        kv_size_multiplier=case.multiplier,
        fuse_qkv=case.fused,
        gradient_checkpointing=case.checkpointing,
        recompute_causal_mask=False,  # True makes the mask on an XLA device
    )
    kind = getattr(training, f"{case.model}ForCausalLM")
    # Without a dtype, theirs is a string, and their embedding rounds what it gives to bfloat16.
    return kind.from_pretrained(str(directory), settings, dtype=torch.float32).train()


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
            nn.init.normal_(p, 0.0, 0.1)
    return wrapped


def factors(directory):
    return {n: t for n, t in load_file(directory / "adapter_model.safetensors").items() if "lora_" in n}


def gradients_of(model, place):
    """The gradients of a wrapped model, whole, by PEFT's names; and the names of those whose copies differ."""
    specs, tree, apart = adapters.specs(model), {}, []
    for path, ps in adapters.factors(model).items():
        local = {n: p.grad for n, p in ps.items()}
        whole = [n for n, p in ps.items() if not getattr(p, "tensor_model_parallel", False)]
        apart += differing(local, specs[path]) + [n for n in whole if not place.alike(local[n])]
        tree[path] = gather(local, specs[path])
    return peft_format.to_state_dict(tree, specs), apart


def marks(model, sequence, gradients):
    """1.0 where every factor has its marks; and where their norms keep theirs."""
    right = []
    for spec, ps in zip(adapters.specs(model).values(), adapters.factors(model).values(), strict=True):
        for name, p in ps.items():
            kind = name.partition(".")[0]
            cut = {"column": {"lora_B": 0}, "qkv": {"lora_B": 0}, "row": {"lora_A": 1}, "embedding": {"lora_A": 1}}
            dim = cut.get(spec.kind, {}).get(kind) if spec.axis.size > 1 else None
            right.append(getattr(p, "tensor_model_parallel", False) == (dim is not None))
            right.append(getattr(p, "partition_dim", None) == dim)
            partial = spec.axis.size > 1 and dim is None and gradients == "deferred"
            right.append(getattr(p, "sequence_parallel_enabled", False) == partial)
    norm = model.model.layers[0].input_layernorm.weight
    return float(all(right) and norm.sequence_parallel_enabled == sequence and not norm.requires_grad)


def check(case, place, directory, sequence, gradients):
    """Every check of one case."""
    model = stock(case)
    theirs = adapter(model, case)
    is_first = dist.get_rank() == 0
    if is_first:
        model.save_pretrained(directory / "model")
        theirs.save_pretrained(directory / "theirs", save_embedding_layers=False)
    dist.barrier()
    torch.manual_seed(2)
    ids = torch.randint(0, VOCABULARY, (2, LENGTH))
    expected, base = theirs(input_ids=ids, labels=ids), model(input_ids=ids).logits
    ours = parallel(case, place, directory / "model", sequence)

    def mine(logits):
        return logits if case.model == "Granite" else place.chunk(logits, -1)

    adapters.wrap(ours, adapters.read_spec(directory / "theirs"), gradients=gradients)
    if case.checkpointing:
        adapters.enable_input_require_grads(ours)
    found = {"zero B": error(ours(input_ids=ids).logits, mine(base)), "marks alike": marks(ours, sequence, gradients)}
    adapters.load(ours, directory / "theirs")
    adapters.save(ours, directory / "ours")
    saved, stored = factors(directory / "ours"), factors(directory / "theirs")
    same = saved.keys() == stored.keys() and all(torch.equal(saved[n], stored[n]) for n in stored)
    found["file alike"] = float(same)
    found["differs before"] = error(base, expected.logits)

    trained = [p for p in ours.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=RATE)
    dense = torch.optim.SGD([p for p in theirs.parameters() if p.requires_grad], lr=RATE)
    for step in range(STEPS):
        optimizer.zero_grad()
        dense.zero_grad()
        got, expected = ours(input_ids=ids, labels=ids), theirs(input_ids=ids, labels=ids)
        got.loss.backward()
        expected.loss.backward()
        if gradients == "deferred":
            grads.allreduce_sequence_parallel_gradients(optimizer)
        if step == 0:
            found["logits"], found["loss"] = error(got.logits, mine(expected.logits)), error(got.loss, expected.loss)
            whole, apart = gradients_of(ours, place)
            found["copies of gradients alike"] = float(not apart)
            named = {n.replace(".default", ""): p.grad for n, p in theirs.named_parameters() if p.grad is not None}
            found["gradients named alike"] = float(whole.keys() == named.keys())
            found |= {f"d{n.removeprefix(peft_format.PREFIX)}": error(whole[n], named[n]) for n in named}
            if not case.copies(place.size):
                norm = torch.stack([g.square().sum() for g in named.values()]).sum().sqrt()
                found["norm"] = error(torch.as_tensor(grads.get_grad_norm(trained)).reshape(()), norm)
        optimizer.step()
        dense.step()
    adapters.save(ours, directory / "stepped")
    if is_first:
        theirs.save_pretrained(directory / "stepped theirs", save_embedding_layers=False)
    dist.barrier()
    saved, stepped = factors(directory / "stepped"), factors(directory / "stepped theirs")
    found["after steps"] = max(error(saved[n], stepped[n]) for n in stored)
    found["moved before"] = float(max((stepped[n] - t).abs().max() / t.abs().mean() for n, t in stored.items()))
    loaded = peft.PeftModel.from_pretrained(stock(case), directory / "stepped")
    found["stock PEFT loads it"] = error(ours(input_ids=ids).logits, mine(loaded(input_ids=ids).logits))
    return found


def orders():
    """Their orders of query heads, as (processes, heads, key-value heads, copies): where ours is the same, or not."""
    found = {"same": [], "other": []}
    spec = transformations_utils.GQAQKVColumnParallelLinearSpec
    for size, copies, key_value, group in itertools.product(
        (1, 2, 3, 4, 8, 16), range(1, 17), range(1, 9), range(1, 9)
    ):
        heads = key_value * group
        if key_value * copies % size or heads % (key_value * copies):
            continue
        lay = layout.query_heads(heads, key_value, size, multiplier=copies)
        try:
            theirs = [
                spec.compute_query_indices_for_rank(size, r, heads, key_value, copies).tolist() for r in range(size)
            ]
        except (IndexError, RuntimeError):
            theirs = None
        same = theirs == [lay.places(r).tolist() for r in range(size)]
        found["same" if same else "other"].append((size, heads, key_value, copies))
    return found


def own_gradients(place, directory):
    """By how much the gradients of their own Granite, not wrapped, are too great under sequence parallel."""
    case = CASES["Granite"]
    model = stock(case)
    if dist.get_rank() == 0:
        model.save_pretrained(directory)
    dist.barrier()
    ids = torch.randint(0, VOCABULARY, (2, LENGTH), generator=torch.Generator().manual_seed(2))
    ours = parallel(case, place, directory, True).requires_grad_(False)
    found = []
    for each in (ours, model):
        norm = each.model.layers[0].input_layernorm.weight.requires_grad_()
        each(input_ids=ids, labels=ids).loss.backward()
        found.append(place.summed(norm.grad) if each is ours else norm.grad)
    return {"own gradients, as often": float(found[0].norm() / found[1].norm())}


def saved(name, place, directory):
    """1.0 where their own save_pretrained and consolidation of a wrapped model give the stock model's weights."""
    case = CASES[name]
    model = stock(case)
    theirs = adapter(model, case)
    if dist.get_rank() == 0:
        model.save_pretrained(directory / "model")
        theirs.save_pretrained(directory / "theirs", save_embedding_layers=False)
    dist.barrier()
    ours = adapters.wrap(parallel(case, place, directory / "model", True), adapters.read_spec(directory / "theirs"))
    adapters.load(ours, directory / "theirs")
    ours.save_pretrained(str(directory / "saved"), is_main_process=dist.get_rank() == 0)
    dist.barrier()
    if dist.get_rank() != 0:
        return {}
    checkpointing.consolidate_model_parallel_checkpoints_to_unified_checkpoint(directory / "saved", directory / "whole")
    whole, expected = load_file(directory / "whole" / "model.safetensors"), model.state_dict()
    return {f"{name} alike": float(all(torch.equal(whole[n], expected[n]) for n in expected))}


def refusals(place, directory):
    """What `wrap` says to what it does not take."""

    def said(case, change, *targets, sequence=False):
        model = parallel(case, place, directory / case.model, sequence)
        change(model)
        before = {n: type(m) for n, m in model.named_modules()}
        try:
            adapters.wrap(model, LoraSpec(target_modules=targets))
        except lora_fn.LoraFnError as refusal:
            assert before == {n: type(m) for n, m in model.named_modules()}
            return str(refusal)
        return ""

    def fused(**changes):
        return lambda model: vars(model.model.layers[0].mlp.specs.specs[0]).update(changes)

    def grouped(**changes):
        return lambda model: vars(model.model.layers[0].self_attn.specs.specs[0]).update(changes)

    def another(model):
        model.model.layers[0].mlp.specs.specs.insert(0, Unknown())

    def beside(model):
        model.model.layers[0].mlp.beside = nn.Linear(4, 4)

    llama, granite = Case(key_value=1), Case(**GRANITE)
    for case in (llama, granite):
        if dist.get_rank() == 0:
            stock(case).save_pretrained(directory / case.model)
    dist.barrier()
    renamed = parallel(llama, place, directory / "Llama", False)
    fused(linear_names=["w1", "w3"], original_dims=[32, 64])(renamed)
    renamed.model.layers[0].mlp.gate_up_proj.stride = 1
    adapters.wrap(renamed, LoraSpec(target_modules=("w3",)))
    [spec] = adapters.specs(renamed).values()
    assert [(part.name, part.size, part.rank) for part in spec.parts] == [("w1", 32, 0), ("w3", 64, 8)]
    return {
        "rows": said(llama, fused(fuse_axis=1), "gate_proj"),
        "processes": said(llama, fused(tp_size=2), "up_proj"),
        "another name": said(llama, fused(linear_names=["gate", "up_proj"]), "up_proj"),
        "sizes": said(llama, fused(original_dims=[40, 48]), "gate_proj"),
        "three": said(llama, fused(linear_names=["a", "b", "c"], original_dims=[32, 32, 32]), "b"),
        "another spec": said(llama, another, "up_proj"),
        "names of heads": said(llama, grouped(key_projection_name="keys"), "q_proj"),
        "no order": said(llama, grouped(kv_size_multiplier=8), "k_proj"),
        "not parallel": said(granite, beside, "beside", sequence=True),
    }


class Unknown(transformations_utils.ModelWeightTransformationSpec):
    """A spec that nobody knows."""


def main(path):
    warnings.simplefilter("ignore")
    transformers.utils.logging.set_verbosity_error()
    gc.freeze()  # their from_pretrained collects garbage, twice
    results = {}
    state = nxd_layers.started({"tp": 4})
    for size in (4, 2):
        if size == 2:
            state.destroy_kv_group()
            state.destroy_model_parallel()
            state.initialize_model_parallel(tensor_model_parallel_size=2)
        else:
            results |= {"orders": orders(), "refused": refusals(Place(), Path(path) / "refused"), "saved": {}}
            for name in ("Llama, 2 key-value heads", "Llama, as many key-value heads, fused", "Granite"):
                results["saved"] |= worst(saved(name, Place(), Path(path) / f"saved {name}"))
        results[str(size)] = {}
        results[f"own {size}"] = worst(own_gradients(Place(), Path(path) / f"own {size}"))
        for name, case in CASES.items():
            schemes = [(False, "summed"), (True, "summed" if case.copies(size) else "deferred")]
            schemes += [(True, "summed")] if name in ("Llama", "Granite") else []
            for sequence, gradients in schemes if size in case.sizes else ():
                told = f"{name}{', sequence parallel' if sequence else ''}, {gradients}"
                directory = Path(path) / f"{size} {told}"
                results[str(size)][told] = worst(check(case, Place(), directory, sequence, gradients))
    if dist.get_rank() == 0:
        (Path(path) / "results.json").write_text(json.dumps(results, indent=1))
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)  # torch_xla has nothing to shut down


if __name__ == "__main__":
    main(sys.argv[1])
