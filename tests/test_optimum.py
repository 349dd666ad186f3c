"""Do we bind Optimum Neuron's own training models right? The real ones, on CPU, in the processes of a program.

As test_nxd; the environment variable LORA_FN_OPTIMUM names a checkout of Optimum Neuron.
"""

import json
import os
import re
import subprocess
from types import SimpleNamespace

import pytest
import torch
from test_nxd import HERE, NXD, PYTHON, wrong
from torch import nn

import adapters
from adapters import nxd, optimum_models
from lora_fn import Axis, LoraSpec

OPTIMUM = os.environ.get("LORA_FN_OPTIMUM")
needs_optimum = pytest.mark.skipif(
    not (NXD and OPTIMUM), reason="LORA_FN_NXD and LORA_FN_OPTIMUM name no checkouts of both"
)


@pytest.fixture(scope="module", name="ran")
def ran_fixture(tmp_path_factory):
    """What the program found: run once, on four processes."""
    directory = tmp_path_factory.mktemp("optimum_models")
    paths = [str(HERE.parent), f"{NXD}/src", str(OPTIMUM)]
    done = subprocess.run(
        [
            *(PYTHON, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "4"),
            *(HERE / "optimum_models.py", directory),
        ],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return json.loads((directory / "results.json").read_text())


@needs_optimum
@pytest.mark.parametrize("size", [4, 2])
def test_stock_peft_adapters_load_train_and_come_back(ran, size):
    found = ran[str(size)]
    assert wrong(found, size) == {}
    assert len(found) == {4: 34, 2: 26}[size]
    told = {"zero B", "marks alike", "file alike", "logits", "loss", "copies of gradients alike", "after steps"}
    assert all(told <= set(checks) for checks in found.values())
    factors = {
        case: sum(name.endswith(".weight") or ".lora_embedding_" in name for name in found[case]) for case in found
    }
    assert factors["Llama, summed"] == factors["Granite, summed"] == 32  # A and B of 7 layers in 2 blocks, and 2 more
    for model in ("Llama", "Granite", "Qwen3"):
        assert any(case.startswith(model) and "sequence parallel" in case for case in found)


@needs_optimum
def test_their_order_of_query_heads_is_ours_wherever_it_is_one(ran):
    same, other = ran["orders"]["same"], ran["orders"]["other"]
    # Elsewhere, a process would hold all heads more than once, or not the same number of each.
    ordered = [case for case in same + other if case[2] % max(1, case[2] * case[3] // case[0]) == 0]
    assert len(same) > 200 and sorted(same) == sorted(ordered)


@needs_optimum
@pytest.mark.parametrize("size", [4, 2])
def test_gradients_of_their_own_granite_are_too_great(ran, size):
    assert ran[f"own {size}"]["own gradients, as often"] == pytest.approx(size, rel=1e-5)


@needs_optimum
def test_a_wrapped_model_is_still_saved_by_their_own_save_pretrained(ran):
    assert list(ran["saved"].values()) == [1.0, 1.0, 1.0]


REFUSED = {
    "rows": r"model.layers.0.mlp.gate_up_proj: is fused along dimension 1, expected 0",
    "processes": r"model.layers.0.mlp.gate_up_proj: has specs for 2 processes, found 4",
    "another name": r"model.layers.0.mlp.gate_up_proj: has a part named 'gate', which means another one here",
    "sizes": r"model.layers.0.mlp.gate_up_proj: LayerSpec.parts: are \['gate', 'up'\], of 88 features",
    "three": r"model.layers.0.mlp.gate_up_proj: stride: is 2, expected 1 or 3, of the parts",
    "another spec": r"model.layers.0.mlp.gate_up_proj: specs: have a Unknown, expected one of \['FusedLinears",
    "names of heads": r"model.layers.0.self_attn.qkv_proj: has the parts \['q_proj', 'keys', 'v_proj'\]",
    "no order": r"model.layers.0.self_attn.qkv_proj: lays 8 query heads beside 8 copies of 1 key-value heads over 4",
    "not parallel": r"model.layers.0.mlp.beside: is in a GraniteModel under sequence parallel, and is not parallel",
}


@needs_optimum
def test_what_is_not_supported_is_refused_by_name(ran):
    said = ran["refused"]
    assert said.keys() == REFUSED.keys()
    assert {name: said[name] for name, sentence in REFUSED.items() if not re.match(sentence, said[name])} == {}


# What needs no Optimum Neuron.


def test_other_models_are_told_nothing_and_keep_their_gradients():
    model = nn.Sequential(nn.Linear(4, 6), nn.Embedding(3, 2))
    modules = dict(model.named_modules())
    assert [optimum_models.given(modules, name) for name in ("0", "1")] == [{}, {}]
    assert optimum_models.part_names(modules, "0") == ()
    adapters.wrap(model, LoraSpec(target_modules=("0",)))
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("sequence", [True, False])
def test_gradients_behind_the_last_layer_are_divided_under_sequence_parallel(monkeypatch, sequence):
    names = {"__module__": "optimum.neuron.models.training.granite.modeling_granite"}
    model = type("GraniteForCausalLM", (nn.Module,), names)()
    model.trn_config, model.lm_head = SimpleNamespace(sequence_parallel_enabled=sequence), nn.Linear(3, 5)
    monkeypatch.setattr(nxd, "default_axis", lambda: Axis(size=4))
    x = torch.randn(2, 3)

    def loss(weight):
        return torch.func.functional_call(model.lm_head, {"weight": weight}, x).square().sum()

    weight = model.lm_head.weight.detach()
    value, before = loss(weight), torch.func.grad(loss)(weight)
    optimum_models.mend_gradients(model)
    assert torch.equal(loss(weight), value)
    assert torch.equal(torch.func.grad(loss)(weight), before / 4 if sequence else before)
    batched = torch.func.vmap(torch.func.grad(loss))(torch.stack([weight, weight]))
    torch.testing.assert_close(batched[1], before / 4 if sequence else before)
