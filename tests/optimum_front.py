"""Run by torchrun where Optimum Neuron is: code of its users, with its own training models, and our import.

    python -m torch.distributed.run --nproc-per-node 2 optimum_front.py DIRECTORY

As optimum_models.py. The user's code below does what Optimum Neuron's own tests and tutorials do; only the import is
another one. DIRECTORY gets results.json.
"""

import gc
import json
import os
import sys
import warnings
from pathlib import Path

import nxd_layers  # first: it replaces what is for devices only

# isort: split
import peft
import torch
import torch.distributed as dist
import transformers
from nxd_layers import Place, error, worst
from optimum_models import VOCABULARY, Case, adapter, factors, parallel, stock

from adapters.peft import (
    NeuronPeftModel,
    NeuronPeftModelForCausalLM,
    get_original_merged_weights_for_vllm,
    get_peft_model,
)

NAME = "model.layers.1.self_attn.q_proj.weight"
CASES = {
    "Llama": Case(key_value=2),
    "Llama, copies, fused": Case(key_value=1, fused=True),
    "Granite": Case(model="Granite", fused=True),
    "Qwen3": Case(model="Qwen3", key_value=2),
}


def logits(model, ids):
    with torch.no_grad():
        return model(input_ids=ids).logits.clone()


def loaded(case, place, directory, sequence):
    """Adapters of stock PEFT, loaded, switched, merged, streamed and saved; against the same with stock PEFT."""
    model, found = stock(case), {}
    theirs = adapter(model, case)
    is_first = dist.get_rank() == 0
    if is_first:
        model.save_pretrained(directory / "model")
        theirs.save_pretrained(directory / "one", save_embedding_layers=False)
        other = adapter(model, Case(**{**vars(case), "targets": ("q_proj", "up_proj")}))
        other.save_pretrained(directory / "two")
    dist.barrier()
    ids = torch.randint(0, VOCABULARY, (2, 8), generator=torch.Generator().manual_seed(2))
    theirs.load_adapter(directory / "two", "two")
    theirs.eval()

    def mine(logits):
        return logits if case.model == "Granite" else place.chunk(logits, -1)

    ours = NeuronPeftModelForCausalLM.from_pretrained(
        parallel(case, place, directory / "model", sequence), directory / "one"
    )
    ours.load_adapter(directory / "two", "two")
    assert isinstance(ours, NeuronPeftModel)
    found["one"] = error(logits(ours, ids), mine(logits(theirs, ids)))
    with ours.disable_adapter(), theirs.disable_adapter():
        found["disabled"] = error(logits(ours, ids), mine(logits(theirs, ids)))
    for each in (ours, theirs):
        each.set_adapter("two")
    found["two"] = error(logits(ours, ids), mine(logits(theirs, ids)))
    # PEFT 0.17 multiplies by the scaling twice where it makes an SVD, and takes no negative weights elsewhere.
    for how, options in (("cat", {}), ("ties", {"density": 0.7})):
        for each in (ours, theirs):
            each.add_weighted_adapter(["default", "two"], [1.0, 0.5], "both", how, **options)
            each.set_adapter("both")
        found[f"combined by {how}"] = error(logits(ours, ids), mine(logits(theirs, ids)))
        for each in (ours, theirs):
            each.set_adapter("two")
            each.delete_adapter("both")
    counts = [each.get_nb_trainable_parameters() for each in (ours, theirs)]
    found["numbers alike"] = float(counts[0] == counts[1])
    states = [
        vars(each.get_model_status()) | {"adapter_model_type": "", "base_model_type": ""} for each in (ours, theirs)
    ]
    found["status alike"] = float(all(states[0][name] == value for name, value in states[1].items()))
    ours.save_pretrained(str(directory / "saved"))
    for name in ("", "two"):
        stored = factors(directory / (name if name else "one"))
        again = factors(directory / "saved" / name)
        found[f"file {name} alike"] = float(
            again.keys() == stored.keys() and all(torch.equal(again[n], stored[n]) for n in stored)
        )
    before = {n: p.detach().clone() for n, p in ours.named_parameters()}
    ours.merge_adapter()
    theirs.merge_adapter()
    found["merged"] = error(logits(ours, ids), mine(logits(theirs, ids)))
    ours.unmerge_adapter()
    theirs.unmerge_adapter()
    found["unmerged alike"] = float(all(torch.equal(p, before[n]) for n, p in ours.named_parameters()))
    base = stock(case).state_dict()
    streamed = get_original_merged_weights_for_vllm(ours)
    expected = theirs.merge_and_unload().state_dict()
    found["names alike"] = float(streamed.keys() == expected.keys())
    found["differs before"] = error(streamed[NAME], base[NAME])
    found["streamed"] = max(error(streamed[n], expected[n]) for n in expected)
    return found


def trained(case, place, directory, sequence):
    """The loop of their tests: get_peft_model, dropout, a few steps; what must be trained is, and nothing else."""
    if dist.get_rank() == 0:
        stock(case).save_pretrained(directory / "model")
    dist.barrier()
    model = parallel(case, place, directory / "model", sequence)
    config = peft.LoraConfig(
        r=8,
        lora_alpha=32,
        lora_dropout=0.1,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        bias="none",
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(model, config)
    assert isinstance(model, NeuronPeftModelForCausalLM)
    names = {name for name, p in model.named_parameters() if p.requires_grad}
    assert names and all("lora" in name for name in names)
    assert all("lora_A" in name or not p.any() for name, p in model.named_parameters() if name in names)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-2)
    ids = torch.randint(0, VOCABULARY, (2, 8), generator=torch.Generator().manual_seed(2))
    losses = []
    for _ in range(8):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    model.save_pretrained(directory / "trained", optimizer=optimizer)
    dist.barrier()
    again = peft.PeftModel.from_pretrained(stock(case), directory / "trained").eval()
    model.eval()
    found = logits(model, ids)
    expected = logits(again, ids)
    expected = expected if case.model == "Granite" else place.chunk(expected, -1)
    return {"learned alike": float(losses[-1] < losses[0] - 0.1), "saved": error(found, expected)}


def main(path):
    warnings.simplefilter("ignore")
    transformers.utils.logging.set_verbosity_error()
    gc.freeze()
    results = {}
    nxd_layers.started({"tp": 2})
    place = Place()
    for name, case in CASES.items():
        for sequence in (False, True):
            told = f"{name}{', sequence parallel' if sequence else ''}"
            directory = Path(path) / told
            results[told] = worst(loaded(case, place, directory, sequence))
            results[told] |= worst(trained(case, place, directory / "training", sequence))
    if dist.get_rank() == 0:
        (Path(path) / "results.json").write_text(json.dumps(results, indent=1))
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)  # torch_xla has nothing to shut down


if __name__ == "__main__":
    main(sys.argv[1])
