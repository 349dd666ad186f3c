"""Do we bind the layers of neuronx-distributed right? The real ones, on CPU, in the processes of programs beside this.

The environment variables LORA_FN_NXD (a checkout of it) and LORA_FN_NEURON_PYTHON (an interpreter that has what it
needs) say where it is.
"""

import functools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import adapters
from adapters import nxd
from lora_fn import LoraSpec

HERE = Path(__file__).resolve().parent
NXD = os.environ.get("LORA_FN_NXD")
PYTHON = os.environ.get("LORA_FN_NEURON_PYTHON", sys.executable)
needs_nxd = pytest.mark.skipif(not NXD, reason="LORA_FN_NXD names no checkout of neuronx-distributed")

FP32, BF16 = 1e-5, 4e-2


@pytest.fixture(scope="module", name="ran")
def ran_fixture(tmp_path_factory):
    """What a program found: run once, on four processes."""

    @functools.cache
    def run(program):
        directory = tmp_path_factory.mktemp(program)
        result = directory / "results.json"
        done = subprocess.run(
            [
                *(PYTHON, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "4"),
                *(HERE / f"{program}.py", directory if program in ("nxd_models", "nxd_load", "nxd_grid") else result),
            ],
            env=os.environ | {"PYTHONPATH": os.pathsep.join([str(HERE.parent), f"{NXD}/src"]), "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=500,
        )
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        return json.loads(result.read_text())

    return run


def is_right(case, check, value, size):
    """Whether one number is as it must be. Errors are max|a - b| / max|b|; alike, kept and fails are 1.0 or 0.0."""
    if check.endswith((" alike", " kept", " fails")):
        return value == 1.0
    if check.endswith(" before"):  # before the sum over processes, or before an adapter: it must make a difference
        return value > 0.05
    if check.endswith(", rms"):  # over that of the dense layer in bfloat16
        return value <= (2 * size**0.5 if "reduced in bfloat16" in case else 2)
    return value <= (BF16 if "bfloat16" in case else FP32)


def wrong(found, size):
    """{case: {check: value}} of what is not right."""
    sorted_out = {c: {n: v for n, v in checks.items() if not is_right(c, n, v, size)} for c, checks in found.items()}
    return {case: checks for case, checks in sorted_out.items() if checks}


@needs_nxd
@pytest.mark.parametrize("size", [4, 2])
def test_layers_are_as_their_own_and_as_the_dense_truth(ran, size):
    found = ran("nxd_layers")[str(size)]
    # Its own column layer leaves input gradients in bfloat16 unsummed, when it would sum them in float32.
    theirs = {f"column, bfloat16, {gradients}" for gradients in ("summed", "deferred")}
    expected = {case: {"own dx to the truth", "zero B, dx to its own"} for case in theirs}
    assert {case: set(checks) for case, checks in wrong(found, size).items()} == expected
    assert all(found[case]["own dx to the truth"] > 0.5 for case in theirs)
    for layer, least in (("column", 50), ("row", 25), ("embedding", 15)):
        cases = [checks for case, checks in found.items() if case.startswith(layer)]
        assert len(cases) >= least
        told = {
            "y",
            "zero B to its own",
            "zero B to our own base path alike",
            "marks alike",
            "marks kept",
            "torch.func alike",
            "collectives alike",
        }
        assert all(told <= set(checks) for checks in cases)


@needs_nxd
@pytest.mark.parametrize("size", [4, 2])
def test_partial_gradients_are_marked_in_deferred_mode_only(ran, size):
    found = ran("nxd_layers")[str(size)]
    partial = {case: {n for n in checks if n.endswith(" before")} for case, checks in found.items()}
    assert not any(names for case, names in partial.items() if case.endswith("summed"))
    assert partial["column, sequence 1, deferred"] == {"dlora_A before"}
    assert partial["column, stride 2, deferred"] == {"dlora_A.gate before", "dlora_A.up before"}
    assert partial["row, sequence 0, deferred"] == {"dlora_B before"}


@needs_nxd
@pytest.mark.parametrize("size", [4, 2])
def test_grouped_query_attention_is_the_dense_one(ran, size):
    found = ran("nxd_attention")[str(size)]
    assert wrong(found, size) == {}
    assert len(found) == {4: 136, 2: 72}[size]
    own = {case for case, checks in found.items() if "own dx to the truth" in checks}
    assert own == {case for case in found if "fused=False" in case}
    told = {"zero B to its own", "y", "dx", "collectives alike"}  # with copies, one all-reduce fewer than its own
    assert all(told <= set(checks) for checks in found.values())
    failing = {case for case, checks in found.items() if "own fails" in checks}  # frozen and fused, in its backward
    assert failing == set(found) - own


REFUSED = {
    "rank_ordering": r"layer: rank_ordering: is \[1, 0, 3, 2\], expected None",
    "stride": r"layer: stride: is 4, expected one of \[1, 2, 3\]",
    "stride, gathered": r"layer: LayerSpec.parts: are \['gate', 'up'\], expected none with gather_output",
    "keep_padded_output": "layer: keep_padded_output: is True, expected False",
    "pad, bias, gathered": r"layer: bias: has shape \[40\], expected \[37\]",
    "pad_alignment": r"layer: weight: has shape \[16, 24\], expected \[10, 24\]",
    "row, pad": "layer: pad: is True and pads the input",
    "row, stride": "layer: stride: is 2, expected 1",
    "row, partial, bias": "layer: LayerSpec.reduce_output: is False, with a bias",
    "collect_output": "layer: collect_output: is False, expected True",
    "sequence_dim": "layer: sequence_dim: is 1 under sequence parallel",
    "embedding, pad": "layer: pad: is True and pads the dimension",
    "max_norm": r"layer: max_norm: is 1.0, .*\nlayer: sparse: is True, expected False",
    "use_spmd_rank": "layer: rank_util: is SPMDRank.*, expected use_spmd_rank=False",
}
REFUSED_LOAD = {
    "sizes": "embed_tokens and lm_head: have 63 tokens, which 4 processes do not divide",
    "biases": "embed_tokens and lm_head: .*\nq_proj, k_proj and v_proj: have biases, which",
    "mesh": "layers is 'nxd': neuronx-distributed's layers lie over its own tensor-parallel group",
    "flash of our own": "attn_implementation is 'nki_flash_attention', expected one of sdpa, eager",
    "other layers": "layers is 'theirs', expected one of own, nxd",
    "a cache": "a call with a cache: neuronx-distributed's layers stay sequence parallel; .* give use_cache=False",
}
REFUSED_CONVS = {
    "partition_pad": "layer: partition_pad: is True and pads the input",
    "row, stride": "layer: stride: is 2, expected 1",
    "row, partial, bias": "layer: LayerSpec.reduce_output: is False, with a bias",
    "expert_indices": "adapters: a layer that is adapted computes the whole; call it without indices",
    "save": "layer: PEFT's files hold no adapter of a module of experts",
    "all-linear": "nothing is left to adapt of 1 layers",
}
REFUSED_HEADS = {
    "no order": r"self_attn.qkv_proj: the processes \[\(0, 1\), \(2, 3\)\] share key-value heads",
    "no config": "self_attn.qkv_proj: the layer does not know its heads",
    "no config, beside": "self_attn.o_proj: the layer does not know its heads",
    "wrong heads": "target_modules 'qkv_proj' matches none .* the nearest names are v_proj, q_proj, k_proj",
    "gather_output": "self_attn.qkv_proj: gather_output: is True, expected False",
}


@needs_nxd
@pytest.mark.parametrize(
    ("program", "sentences"),
    [
        ("nxd_layers", REFUSED),
        ("nxd_attention", REFUSED_HEADS),
        ("nxd_convs", REFUSED_CONVS),
        ("nxd_load", REFUSED_LOAD),
    ],
)
def test_what_is_not_supported_is_refused_by_name(ran, program, sentences):
    said = ran(program)["refused"]
    assert said.keys() == sentences.keys()
    assert {name for name, sentence in sentences.items() if not re.match(sentence, said[name])} == set()


@needs_nxd
def test_layers_that_are_not_adapted_are_taken_over(ran):
    found = ran("nxd_layers")
    assert wrong({"bfloat16": found["behind, bfloat16"]}, 4) == {}
    assert re.match("second: leaves its input's gradient unsummed, .*: stride: is 4", found["refused behind"])


@needs_nxd
@pytest.mark.parametrize("size", [4, 2])
def test_stock_peft_adapters_load_train_and_come_back(ran, size):
    found = ran("nxd_models")[str(size)]
    assert wrong(found, size) == {}
    assert len(found) == {4: 12, 2: 15}[size]
    assert all({"file alike", "step", "logits", "stock PEFT loads it"} <= set(checks) for checks in found.values())


@needs_nxd
@pytest.mark.parametrize("size", [4, 2])
def test_the_grid_of_stock_peft_holds_on_its_layers(ran, size):
    found = ran("nxd_grid")["cases"][str(size)]
    red = {case: {name: e for name, e in told.items() if not e <= 1} for case, told in found.items()}
    assert {case: told for case, told in red.items() if told} == {} and len(found) >= 20


@needs_nxd
@pytest.mark.parametrize("size", [4, 2])
def test_models_on_its_layers_are_stock_ones_and_those_on_ours(ran, size):
    found = ran("nxd_load")[str(size)]
    assert wrong(found, size) == {} and len(found) == 30
    assert {case for case in found if "bfloat16" in case} == {c for c in found if "logits, rms" in found[c]}
    told = {"unwrapped, logits", "unwrapped, loss", "logits", "loss", "gradients", "file alike"}
    told |= {"logits to our layers", "loss to our layers", "gradients to our layers", "differs before"}
    told |= {"generated alike", "rows", "gradients of rows", "disabled", "swapped"}
    told |= {"both active", "weighted, cat", "weighted, ties"}
    assert all(set(checks) == told for case, checks in found.items() if "bfloat16" not in case)


@needs_nxd
def test_flash_attention_is_called_as_transformers_attends(ran):
    """The kernel is replaced by a dense one of its signature: it runs on a device only."""
    found = ran("nxd_load")["flash"]
    assert len(found) == 6 and all(value <= FP32 for value in found.values())


@needs_nxd
def test_what_the_flash_kernel_cannot_see_is_refused(ran):
    said = ran("nxd_load")["refused by flash"]
    assert set(said) == {"padding", "length", "documents"}
    names = {"padding": "attention_mask", "length": "a sequence of 7 tokens", "documents": "position_ids"}
    assert all(f"nki_flash_attention: was called with {names[case]}" in told for case, told in said.items())


@needs_nxd
@pytest.mark.parametrize("size", [4, 2])
def test_convolutions_and_experts_are_as_their_own_and_as_the_dense_truth(ran, size):
    found = ran("nxd_convs")[str(size)]
    assert wrong(found, size) == {} and len(found) == 40
    told = {"y", "dx", "zero B to its own", "zero B to our own base path alike", "torch.func alike"}
    told |= {"collectives alike", "marks alike", "marks kept", "dlora_A", "dlora_B", "norm"}
    assert all(told <= set(checks) for checks in found.values())


@needs_nxd
def test_experts_over_processes_have_their_part_of_the_factors(ran):
    found = ran("nxd_convs")["experts over processes"]
    assert len(found) == 5 and set(found.values()) == {1.0}


@needs_nxd
def test_files_of_its_experts_are_those_of_stacked_parameters(ran):
    assert ran("nxd_convs")["experts in files"] == {"file alike": 1.0, "comes back alike": 1.0}


@needs_nxd
def test_its_pipeline_trains_a_wrapped_model(ran):
    found = ran("nxd_pipeline")["2"]
    assert wrong(found, 2) == {}
    assert {case: len(checks) for case, checks in found.items()} == {"blocks": 17, "all": 21}  # factors, and the loss


# What needs no neuronx-distributed.


def test_marks_of_parameters_survive_a_move():
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 2))
    adapters.wrap(model, LoraSpec(target_modules=("0",)))
    factor = model[0].lora_B
    factor.tensor_model_parallel, factor.partition_dim = True, 0
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        model.to(torch.float64)
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(False)
    assert model[0].lora_B is not factor and model[0].lora_B.dtype == torch.float64
    assert vars(model[0].lora_B) == {"tensor_model_parallel": True, "partition_dim": 0}
    assert vars(model[0].lora_A) == {} and model[0].lora_B.requires_grad and not model[0].weight.requires_grad


def test_other_modules_have_no_parts_and_no_heads():
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU())
    assert nxd.part_names(model[0]) == () and nxd.heads_of(model, "0") is None
