"""Does a wrapped model train in neuronx-distributed's trainer as the dense model does? The real one, on CPU.

As test_nxd: programs beside this run in four processes, and say what they found.
"""

import json
import os
import pickle
import re
import shutil
import subprocess

import pytest
import torch
from safetensors.torch import load_file
from test_nxd import HERE, NXD, PYTHON, is_right, needs_nxd, ran_fixture  # noqa: F401  (a fixture)
from torch import nn
from torch.utils.checkpoint import checkpoint

import adapters
from adapters import nxd
from lora_fn import LoraSpec, TargetError

# Case -> how many checks it has.
TRAINER = {
    "training, blocks, float64": 32,
    "training, all, float64": 42,
    "training, all, summed, float64": 42,
    "training, all, not clipped, float64": 42,
    "training, blocks, checkpointed, float64": 32,
    "training, all, no sequence parallel, float64": 42,
    "pipeline, blocks, float64": 32,
    "pipeline, blocks, checkpointed, float64": 32,
    "pipeline, all, float64": 42,
    "sequence parallel forgotten": 1,
    "main_grad, blocks": 16,
    "main_grad, all": 24,
    "reentrant": 11,
    "checkpoint, plain": 9,
    "checkpoint, xser": 9,
}
ZERO = {
    "training, blocks, float64": 40,
    "training, all, float64": 54,
    "training, all, float32": 54,
    "training, blocks, checkpointed, float64": 40,
    "parameters": 4,
    "clipping": 1,
    "checkpoint": 5,
    "graphs": 2,
}


def wrong(case, checks):
    """{check: value} of what is not right; where numbers are float64, they are held to more."""
    named = (" alike", " kept", " before")
    limit = 1e-10 if case.endswith("float64") else 1e-5
    return {n: v for n, v in checks.items() if not (is_right(case, n, v, 2) if n.endswith(named) else v <= limit)}


@needs_nxd
@pytest.mark.parametrize("case", TRAINER)
def test_its_trainer_does_what_dense_training_does(ran, case):
    checks = ran("nxd_trainer")["2"][case]
    assert wrong(case, checks) == {}
    assert len(checks) == TRAINER[case]


@needs_nxd
@pytest.mark.parametrize("case", ZERO)
def test_its_zero_1_does_what_dense_training_does(ran, case):
    checks = ran("nxd_zero")["2"][case]
    assert wrong(case, checks) == {}
    assert len(checks) == ZERO[case]


def behind_an_embedding():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
    return adapters.wrap(model, LoraSpec(rank=2, init_lora_weights=False, target_modules=["1", "3"]))


def gradients(model, forward=None):
    """Of the factors, under a reentrant checkpoint of all but the embedding; None where it gives none."""
    x = model[0](torch.arange(5))
    y = (forward or (lambda x: checkpoint(model[1:], x, use_reentrant=True)))(x).square().sum()
    if not y.requires_grad:
        return None
    y.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


def test_a_reentrant_checkpoint_behind_a_frozen_embedding_wants_a_hook():
    plain = behind_an_embedding()
    expected = gradients(plain, plain[1:])
    with pytest.warns(UserWarning, match="None of the inputs have requires_grad=True"):
        assert gradients(behind_an_embedding()) is None
    model = behind_an_embedding()
    adapters.enable_input_require_grads(model)
    found = gradients(model)
    assert len(found) == 4 and all(torch.equal(found[name], g) for name, g in expected.items())
    with torch.no_grad():
        assert not model(torch.arange(5)).requires_grad


def test_the_hook_is_nothing_to_transforms_and_stays_when_the_embedding_is_taken_over():
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 3))
    adapters.enable_input_require_grads(model)
    adapters.wrap(model, LoraSpec(rank=2, init_lora_weights=False, target_modules=["0", "1"]))
    assert len(model[0]._forward_hooks) == 1
    model = behind_an_embedding()
    factors = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    ids = torch.arange(5).reshape(5, 1)

    def loss(factors, ids):
        return torch.func.functional_call(model, factors, (ids,)).square().sum()

    each = torch.func.vmap(torch.func.grad(loss), (None, 0))
    before = each(factors, ids)
    adapters.enable_input_require_grads(model)
    after = each(factors, ids)
    assert all(torch.equal(after[name], g) and g.abs().max() > 0 for name, g in before.items())
    pickle.loads(pickle.dumps(model))


def test_a_model_without_an_embedding_is_a_sentence():
    with pytest.raises(TargetError, match="enable_input_require_grads: the model has no embedding, so whatever gives"):
        adapters.enable_input_require_grads(nn.Sequential(nn.Linear(3, 3)))


def test_factors_of_experts_are_marked_as_the_base_is():
    layer = adapters.wrap(nn.Sequential(nn.Linear(4, 6)), LoraSpec(rank=2, target_modules=["0"]))[0]
    nxd.mark(layer, layer.trained(), layer.spec)
    assert vars(layer.lora_A) == vars(layer.lora_B) == {}
    layer.weight.expert_model_parallel = True
    nxd.mark(layer, layer.trained(), layer.spec)
    assert vars(layer.lora_A) == vars(layer.lora_B) == {"expert_model_parallel": True}


def script(*arguments, processes=None):
    """Run examples/train_nxd.py, unchanged, in processes; or have its model and data made."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    paths = os.pathsep.join([str(HERE.parent), f"{NXD}/src"])
    done = subprocess.run(
        [PYTHON, *(launcher if processes else ()), HERE / "nxd_example.py", *arguments],
        env=os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


def trained(place, output, *, tp, processes, how="cpu"):
    """Six steps on rows that do not depend on tp; the losses, and the adapter."""
    arguments = {"model": place / "model", "data": place / "data.jsonl", "output": place / output, "tp": tp}
    arguments |= {"sequence-length": 64, "batch-size": 2, "accumulation": 2, "steps": 6, "warmup": 2}
    arguments |= {"rank": 4, "alpha": 8, "learning-rate": 2e-2, "checkpoint-every": 4}
    words = (word for name, value in arguments.items() for word in (f"--{name}", str(value)))
    script(how, *words, processes=processes)
    lines = [json.loads(line) for line in (place / output / "log.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines], load_file(place / output / "adapter" / "adapter_model.safetensors")


@needs_nxd
def test_the_example_trains_goes_on_and_ends_as_stock_peft_wants_it(tmp_path):
    import peft
    import transformers

    script("make", tmp_path)
    losses, adapter = trained(tmp_path, "cut", tp=2, processes=4)
    whole, _ = trained(tmp_path, "whole", tp=1, processes=2)
    assert len(losses) == 6 and losses[-1] < 0.8 * losses[0]
    assert max(abs(a - b) / b for a, b in zip(losses, whole, strict=True)) < 1e-5
    for gone in ("adapter", "checkpoints/step_6"):
        shutil.rmtree(tmp_path / "cut" / gone)
    again, resumed = trained(tmp_path, "cut", tp=2, processes=4)
    assert again == losses + losses[4:]
    assert resumed.keys() == adapter.keys() and all(torch.equal(t, adapter[name]) for name, t in resumed.items())

    base = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "model").eval()
    text = json.loads((tmp_path / "data.jsonl").read_text().splitlines()[0])["text"]
    ids = transformers.AutoTokenizer.from_pretrained(tmp_path / "model")(text, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        before = base(ids, labels=ids).loss
        model = peft.PeftModel.from_pretrained(base, tmp_path / "cut" / "adapter")
        after = model(ids, labels=ids).loss
    assert len([name for name, _ in model.named_parameters() if "lora_" in name]) == len(adapter) == 28
    assert abs(float(before) / losses[0] - 1) < 0.1 and float(after) < losses[-1] * 1.05
    # And with what it takes on a device: bfloat16, ZeRO-1, XLA tensors, asynchronous saves.
    on_xla, rounded = trained(tmp_path, "xla", tp=2, processes=4, how="xla")
    assert max(abs(a - b) / b for a, b in zip(on_xla, losses, strict=True)) < 1e-2
    assert rounded.keys() == adapter.keys() and {t.dtype for t in rounded.values()} == {torch.float32}


def test_the_memory_of_the_recipe_is_what_its_arithmetic_says(tmp_path, monkeypatch, capsys):
    page = (HERE.parent / "docs" / "trainium.md").read_text(encoding="utf-8")
    [block] = re.findall(r"^```python\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    monkeypatch.chdir(tmp_path)
    exec(compile(block, "trainium.md", "exec"), {})
    rows = capsys.readouterr().out.splitlines()
    assert len(rows) == 5 and "\n".join(rows) in page
