"""Run by torchrun where neuronx-distributed is: stock models on disk, loaded into its real layers and into ours.

    python -m torch.distributed.run --nproc-per-node 4 nxd_load.py DIRECTORY

As nxd_layers.py. Each is compared with transformers and PEFT, and with our own layers over the same processes.
DIRECTORY gets results.json.
"""

import copy
import json
import os
import sys
import warnings
from dataclasses import dataclass, field, replace
from pathlib import Path

import nxd_layers  # first: it replaces what is for devices only

# isort: split
import peft
import torch
import torch.distributed as dist
import transformers
import xm_on_cpu
from neuronx_distributed.modules import qkv_linear
from neuronx_distributed.parallel_layers import parallel_state
from nxd_layers import Place, error, rms, worst
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

import adapters
import adapters.peft
import lora_fn
from adapters import bind, files, models
from lora_fn import LoraFnError, peft_format
from lora_fn.reshard import differing, gather

SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 4}
ATTENTION, MLP = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")
EVERY = (*ATTENTION, *MLP, "embed_tokens", "lm_head")
FUSED = {"fuse_qkv": True, "fuse_gate_up": True}


@dataclass(frozen=True)
class Case:
    """A stock model, how it is loaded, and what is adapted."""

    kind: str = "Llama"
    key_value: int = 8
    options: dict = field(default_factory=dict)
    targets: tuple[str, ...] = EVERY
    config: dict = field(default_factory=dict)
    hardware: str = "trn1"


CASES = {
    "Llama": Case(),
    "Llama, biases": Case(config={"attention_bias": True, "mlp_bias": True}),
    "Llama, fused": Case(options=FUSED),
    "Llama, two heads": Case(key_value=2),
    "Llama, two heads, fused": Case(key_value=2, options=FUSED),
    "Llama, one head": Case(key_value=1, options={"fuse_gate_up": True}),
    "Llama, two heads, trn2": Case(key_value=2, hardware="trn2"),
    "Llama, tied": Case(config={"tie_word_embeddings": True}, targets=(*ATTENTION, *MLP)),
    "Llama, some": Case(targets=("q_proj", "up_proj")),
    "Llama, whole logits": Case(options={"gather_logits": True}),
    "Qwen3": Case(kind="Qwen3"),
    "Qwen3, two heads, fused": Case(kind="Qwen3", key_value=2, options=FUSED),
    "Granite": Case(kind="Granite", key_value=4, config={"logits_scaling": 2.0, "residual_multiplier": 0.5}),
    "Granite, two heads": Case(kind="Granite", key_value=2, config={"attention_multiplier": 0.3}),
}


def stock(case):
    """transformers' model, the same on every process."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{case.kind}Config")(
        **SIZES
        | {"num_attention_heads": 8, "num_key_value_heads": case.key_value, "pad_token_id": 0}
        | {"initializer_range": 0.15, "tie_word_embeddings": False}
        | case.config,
    )
    model = getattr(transformers, f"{case.kind}ForCausalLM")(config).eval()
    for p in model.parameters():
        if p.dim() == 1:
            nn.init.normal_(p, 1.0, 0.2)
    return model


def adapter(model, case):
    """Stock PEFT's, everything in it random."""
    config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=list(case.targets), task_type="CAUSAL_LM")
    wrapped = peft.get_peft_model(copy.deepcopy(model), config).eval()
    torch.manual_seed(1)
    for name, p in wrapped.named_parameters():
        if "lora_" in name:
            nn.init.normal_(p, 0.0, 0.2)
    return wrapped


def whole(logits, place):
    """Logits of all processes, side by side."""
    parts = [torch.empty_like(logits) for _ in range(place.size)]
    dist.all_gather(parts, logits.detach().contiguous(), group=place.group)
    return torch.cat(parts, -1)


def ran(model, ids, place, is_whole):
    """Logits, loss, and the synced gradient of every factor, canonical."""
    out = model(input_ids=ids, labels=ids)
    tree = adapters.factors(model)
    names = [(path, name) for path, of in tree.items() for name in of]
    grads = torch.autograd.grad(out.loss, [tree[p][n] for p, n in names])
    found = {path: {} for path in tree}
    for (path, name), g in zip(names, grads, strict=True):
        found[path][name] = g
    specs = adapters.specs(model)
    synced = lora_fn.sync_gradients(found, specs)
    for path, of in synced.items():
        assert differing(of, specs[path]) == [], path
    canonical = {path: gather(of, specs[path]) for path, of in synced.items()}
    by_file = peft_format.to_state_dict(canonical, specs)
    return out.logits.detach() if is_whole else whole(out.logits, place), out.loss.detach(), by_file


def check(case, place, directory, *, sequence_parallel, gradients):
    """Every check of one case."""
    parallel_state.get_platform_target = qkv_linear.get_platform_target = lambda: case.hardware
    if parallel_state._KV_SHARED_GROUP is not None:
        parallel_state.destroy_kv_group()
    model = stock(case)
    theirs = adapter(model, case)
    if dist.get_rank() == 0:
        model.save_pretrained(directory / "model")
        theirs.save_pretrained(directory / "adapter", save_embedding_layers=False)
    dist.barrier()
    torch.manual_seed(2)
    ids = torch.randint(0, SIZES["vocab_size"], (2, 10))  # a length that 4 processes do not divide
    expected = theirs(input_ids=ids, labels=ids)
    base = model(input_ids=ids, labels=ids)
    expected.loss.backward()
    truths = {n.replace(".default", ""): p.grad for n, p in theirs.named_parameters() if "lora_" in n}
    is_whole = bool(case.options.get("gather_logits"))
    options = dict(case.options) | {"sequence_parallel": sequence_parallel}
    ours = models.load(directory / "model", **options)
    kinds = {type(m).__name__ for m in ours.modules() if type(m).__module__.startswith("neuronx_distributed")}
    wanted = {"ColumnParallelLinear", "RowParallelLinear", "ParallelEmbedding"}
    assert kinds - {"GQAQKVColumnParallelLinear"} == wanted, kinds
    assert ours.model.embed_tokens.weight.tensor_model_parallel
    found = {}
    with torch.no_grad():
        unwrapped = ours(input_ids=ids, labels=ids)
    logits = unwrapped.logits if is_whole else whole(unwrapped.logits, place)
    found["unwrapped, logits"], found["unwrapped, loss"] = error(logits, base.logits), error(unwrapped.loss, base.loss)

    mesh = init_device_mesh("cpu", (dist.get_world_size() // place.size, place.size), mesh_dim_names=("dp", "tp"))
    both = {"nxd": ours, "own": models.load(directory / "model", mesh=mesh, **options)}
    results = {}
    for name, each in both.items():
        adapters.wrap(each, adapters.read_spec(directory / "adapter"), gradients=gradients)
        adapters.load(each, directory / "adapter")
        results[name] = ran(each, ids, place, is_whole)
    assert not {type(m).__module__ for m in ours.modules()} & {"neuronx_distributed.parallel_layers.layers"}
    logits, loss, grads = results["nxd"]
    found["logits"], found["loss"] = error(logits, expected.logits), error(loss, expected.loss)
    found["differs before"] = error(base.logits, expected.logits)
    assert grads.keys() == truths.keys(), grads.keys() ^ truths.keys()
    found["gradients"] = max(error(grads[n], truths[n]) for n in truths)
    own_logits, own_loss, own_grads = results["own"]
    found["logits to our layers"], found["loss to our layers"] = error(logits, own_logits), error(loss, own_loss)
    found["gradients to our layers"] = max(error(grads[n], own_grads[n]) for n in truths)
    how = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "use_cache": not sequence_parallel}
    found["generated alike"] = float(torch.equal(ours.generate(ids, **how), theirs.generate(input_ids=ids, **how)))
    adapters.save(ours, directory / "again")
    stored, again = ((directory / d / "adapter_model.safetensors") for d in ("adapter", "again"))
    from safetensors.torch import load_file

    stored, again = load_file(stored), load_file(again)
    factors = [n for n in stored if "lora_" in n]
    found["file alike"] = float(all(torch.equal(stored[n], again[n]) for n in factors))
    bind.detach(ours)
    theirs.zero_grad()
    theirs(input_ids=ids[1:], labels=ids[1:]).loss.backward()
    truths = {n.replace(".default", ""): p.grad for n, p in theirs.named_parameters() if "lora_" in n}
    found |= rows(ours, ids, directory / "adapter", place, is_whole, [base.logits[0], expected.logits[1]], truths)
    found |= together(ours, theirs, ids, directory / "adapter", place, is_whole)
    return found


def together(model, theirs, ids, directory, place, is_whole):
    """Two adapters of one model, both active, and their weighted sums: as stock PEFT has them."""
    torch.manual_seed(4)
    theirs.load_adapter(directory, "second")  # (to PEFT 0.17, "b" would be in every name)
    for name, p in theirs.named_parameters():
        if ".second." in name:
            torch.nn.init.normal_(p, 0.0, 0.1)
    if dist.get_rank() == 0:
        theirs.save_pretrained(directory / "more", selected_adapters=["second"], save_embedding_layers=False)
    dist.barrier()
    ours = adapters.peft.PeftModel.from_pretrained(model, directory).eval()
    ours.load_adapter(directory / "more" / "second", "second")
    found = {}

    def compare(what):
        with torch.no_grad():
            logits = ours(input_ids=ids).logits
            logits = logits if is_whole else whole(logits, place)
            found[what] = error(logits, theirs(input_ids=ids).logits)

    for each in (ours, theirs):
        each.base_model.set_adapter(["default", "second"])
    compare("both active")
    for how, options in (
        ("cat", {}),
        ("ties", {"density": 0.5}),
    ):  # the svd types of PEFT 0.17 multiply by the scaling twice
        for each in (ours, theirs):
            each.add_weighted_adapter(["default", "second"], [0.7, 0.4], how, combination_type=how, **options)
            each.set_adapter(how)
        compare(f"weighted, {how}")
    return found


def rows(model, ids, directory, place, is_whole, expected, truths):
    """Of two rows, the second has an adapter: logits, and the adapter's gradients of a loss of that row."""
    spec = adapters.read_spec(directory)
    held = adapters.ManyAdapters(model, spec, places=2)
    held.add("other", replace(spec, init_lora_weights=False))
    held.add("one", directory)
    held.select_rows([None, "one"])
    labels = torch.stack([torch.full_like(ids[0], -100), ids[1]])
    found = model(input_ids=ids, labels=labels)
    found.loss.backward()

    def of_all(found):
        return found.logits if is_whole else whole(found.logits, place)

    logits = of_all(found)
    with torch.no_grad():
        with held.disabled():
            disabled = of_all(model(input_ids=ids))
        held.replace("other", directory)
        held.select("other")
        swapped = of_all(model(input_ids=ids))
        for layer in held.layers.values():
            for p in layer.trained().values():
                p.copy_(p.grad)  # so that the adapter's files would hold its gradients
    with held._on(held.take("one")):
        grads = files.canonical(model, "the gradients")
    errors = {n: error(grads[n], truth) for n, truth in truths.items()}
    held.remove()
    return {
        "rows": error(logits, torch.stack(expected)),
        "gradients of rows": max(errors.values()),
        "disabled": error(disabled[:1], expected[0][None]),
        "swapped": error(swapped[1:], expected[1][None]),
    }


def check_rounded(place, directory, *, sequence_parallel):
    """In bfloat16, by the root mean square error over that of stock transformers and PEFT in bfloat16."""
    case = Case(targets=(*ATTENTION, *MLP))
    model = stock(case).to(torch.bfloat16)
    theirs = adapter(model, case).to(torch.bfloat16)
    if dist.get_rank() == 0:
        model.save_pretrained(directory / "model")
        theirs.save_pretrained(directory / "adapter", save_embedding_layers=False)
    dist.barrier()
    torch.manual_seed(2)
    ids = torch.randint(0, SIZES["vocab_size"], (4, 40))
    results = {}
    for name, each in {"truth": copy.deepcopy(theirs).double(), "rounded": theirs}.items():
        out = each(input_ids=ids, labels=ids)
        out.loss.backward()
        grads = {n.replace(".default", ""): p.grad for n, p in each.named_parameters() if "lora_" in n}
        results[name] = out.logits.detach(), grads
    ours = models.load(directory / "model", sequence_parallel=sequence_parallel)
    spec = adapters.read_spec(directory / "adapter")
    adapters.wrap(ours, spec, dtype=torch.bfloat16)
    adapters.load(ours, directory / "adapter")
    logits, _, grads = ran(ours, ids, place, False)
    truth, truths = results["truth"]
    rounded, others = results["rounded"]
    every = [torch.cat([g[n].double().flatten() for n in truths]) for g in (grads, truths, others)]
    return {"logits, rms": rms(logits, truth, rounded), "gradients, rms": rms(*every)}


def refusals(directory):
    """What `load` says to what its layers cannot."""

    def said(**options):
        try:
            models.load(directory, **options)
        except LoraFnError as refusal:
            return str(refusal)
        return ""

    if dist.get_rank() == 0:
        stock(Case(config={"vocab_size": 63} | {"attention_bias": True})).save_pretrained(directory)
    dist.barrier()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("tp",))
    found = {"sizes": said(), "biases": said(fuse_qkv=True), "mesh": said(mesh=mesh, layers="nxd")}
    found["flash of our own"] = said(mesh=mesh, attn_implementation="nki_flash_attention")
    found["other layers"] = said(layers="theirs")
    dist.barrier()  # all have read what is written over
    if dist.get_rank() == 0:
        stock(Case()).save_pretrained(directory)
    dist.barrier()
    try:
        models.load(directory, sequence_parallel=True).generate(torch.tensor([[5, 6, 7, 8]]), max_new_tokens=1)
    except LoraFnError as refusal:
        found["a cache"] = str(refusal)
    return found


def flash():
    """Our way to the flash kernel, on a stand-in of the kernel's signature and layout, beside transformers' eager."""
    from neuronx_distributed.kernels import flash_attn

    from adapters import nxd_attention

    def kernel(q, k, v, lnc=1, dropout_p=0.0, softmax_scale=None, causal=True, mixed_precision=True, seed=None,
               hardware_type=None, transpose_nki_inputs=True):  # fmt: skip
        assert not transpose_nki_inputs and causal and dropout_p == 0 and q.shape == k.shape == v.shape
        scores = q @ k.mT * (q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale)
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
        return scores.masked_fill(~mask, -torch.inf).softmax(-1) @ v

    flash_attn.nki_flash_attn_func = kernel
    nxd_attention.BLOCK = 4
    found = {}
    for kind, options in (("Llama", {}), ("Qwen3", {}), ("Granite", {"attention_multiplier": 0.3})):
        case = Case(kind=kind, key_value=2, config=options)
        model = stock(case)
        torch.manual_seed(2)
        ids = torch.randint(0, SIZES["vocab_size"], (2, 8))
        nxd_attention.register()
        theirs = copy.deepcopy(model)
        model.set_attn_implementation(nxd_attention.NAME)
        nxd_attention.refuse_positions(model)
        results = []
        for each in (model, theirs):
            out = each(input_ids=ids, labels=ids, use_cache=False)
            out.loss.backward()
            results.append((out.logits, each.model.layers[0].self_attn.k_proj.weight.grad))
        found[f"{kind}, logits"] = error(results[0][0], results[1][0])
        found[f"{kind}, dk_proj"] = error(results[0][1], results[1][1])

    def said(**options):
        try:
            model(**{"input_ids": ids, "use_cache": False} | options)
        except LoraFnError as refusal:
            return str(refusal)
        return ""

    padded = torch.ones(2, 8, dtype=torch.long)
    padded[0, :3] = 0
    told = {"padding": said(attention_mask=padded), "length": said(input_ids=ids[:, :7])}
    told["documents"] = said(position_ids=torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4]] * 2))
    return found, told


def main(path):
    warnings.simplefilter("ignore")
    results, path = {}, Path(path)
    xm_on_cpu.start()
    state = nxd_layers.started({"tp": 4})
    for size in (4, 2):
        if size == 2:
            if state._KV_SHARED_GROUP is not None:
                state.destroy_kv_group()
            state.destroy_model_parallel()
            state.initialize_model_parallel(tensor_model_parallel_size=2)
        else:
            results["refused"] = refusals(path / "refused")
            results["flash"], results["refused by flash"] = flash()
        results[str(size)] = {}
        for sequence_parallel in (False, True):
            told = f"Llama, bfloat16, sequence {sequence_parallel}"
            found = check_rounded(Place(), path / f"{size} {told}", sequence_parallel=sequence_parallel)
            results[str(size)][told] = worst(found)
        for name, case in CASES.items():
            for sequence_parallel in (False, True):
                gradients = "deferred" if sequence_parallel else "summed"
                told = f"{name}, sequence {sequence_parallel}"
                how = {"sequence_parallel": sequence_parallel, "gradients": gradients}
                results[str(size)][told] = worst(check(case, Place(), path / f"{size} {told}", **how))
    if dist.get_rank() == 0:
        (path / "results.json").write_text(json.dumps(results, indent=1))
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)  # torch_xla has nothing to shut down


if __name__ == "__main__":
    main(sys.argv[1])
