"""What does `lora-fn cost` say of a model, and does its page say the same?"""

import contextlib
import dataclasses
import io
import json
import math
import re
import shlex
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adapters import bind, cli, estimate, estimate_report, models, schemes
from adapters.estimate import LINEARS, PRESETS, Plan
from lora_fn import Axis, FileError, LoraSpec, SpecError, cost
from lora_fn.machines import MACHINES

PAGE = Path(__file__).parent.parent / "docs" / "cost.md"
SMALL = PRESETS["llama-3-8b"]
RECIPE = Plan(tp=8, rank=64, tokens=2048, microbatches=16, sequence_parallel=True)
TRN1 = MACHINES["trn1"]


def of(**changes):
    return estimate.estimate(SMALL, dataclasses.replace(RECIPE, **changes), TRN1)


def told(capsys, *words):
    """What the command prints."""
    capsys.readouterr()
    assert cli.main(["cost", *map(str, words)]) == 0
    return capsys.readouterr().out


def refused(capsys, *words):
    capsys.readouterr()
    assert cli.main(["cost", *map(str, words)]) == cli.BAD_INPUT
    sentence = capsys.readouterr().err
    assert sentence.startswith("lora-fn: ") and "Traceback" not in sentence
    return sentence


# ------------------------------------------------------------------------------------------------------ numbers


def test_no_collective_of_our_own_and_fewer_of_the_base():
    found, layers, steps = of(), SMALL.layers, RECIPE.microbatches
    assert found.ours.lora_launches == 0
    # q, k, v, and gate and up, which are one module with one lora_A: three each; o, down: two.
    assert found.peers.lora_launches == 16 * layers * steps == 8192
    # The embedding has one more, the lm_head two.
    assert found.ours.base_launches == (8 * layers + 3) * steps
    assert found.peers.base_launches == (12 * layers + 3) * steps
    again = of(activation_checkpointing=True)
    assert again.peers.lora_launches - found.peers.lora_launches == 6 * layers * steps
    assert again.ours.base_launches - found.ours.base_launches == 4 * layers * steps


def test_flops_and_bytes_of_the_recipe():
    found, linear = of(), 0
    for layer in found.layers:
        linear += layer.base.flops * layer.number * (layer.name not in estimate.ENDS)
    one_less = 6 * 2048 * 64 * 4096 // 8 * SMALL.layers * RECIPE.microbatches  # gate and up have one lora_A there
    assert found.ours.lora_flops - one_less == found.peers.lora_flops
    assert found.ours.lora_flops / linear / RECIPE.microbatches == pytest.approx(0.036, abs=1e-3)
    summed = sum(layer.update.summed * layer.number for layer in found.layers)
    ranks = 64 * (3 * 4096 + 4096 + 2 * 4096 + 4096)  # lora_A of q, k, v, gate, up; lora_B of o, down
    assert summed == ranks * SMALL.layers
    assert found.ours.sync_bytes == pytest.approx(2 * 7 / 8 * 4 * summed)


def test_what_is_one_module_of_the_peers_has_one_lora_A():
    """At TP 32 q, k and v are one too, whose key-value heads have copies: 3 + 1, 2, 3 and 2. See their
    GQAQKVColumnParallelLinear and gate_up_proj, in optimum/neuron/peft/tuners/lora/layer.py and models/training."""
    found = of(tp=32)
    assert [layer.updates[cost.MODULE].own for layer in found.peer_layers if layer.scheme] == [4, 2, 3, 2]
    own, shared = ({layer.name: layer.update for layer in of(tp=32, share_A=s).layers} for s in (False, True))
    for layer in found.peer_layers[:4]:
        theirs = layer.update
        assert theirs.flops == shared[layer.name].flops and theirs.held == shared[layer.name].held
        whole = own[layer.name].flops - theirs.flops
        assert whole == {"qkv_proj": 2, "gate_up_proj": 1}.get(layer.name, 0) * 6 * 2048 * 64 * 4096 // 32


def test_memory_is_that_of_the_recipe_for_trainium():
    """See docs/trainium.md: rank 16, rows of 4096 tokens."""
    memory = of(rank=16, tokens=4096, activation_checkpointing=True).memory
    gib = {name: round(value / 2**30, 2) for name, value in memory.items()}
    assert (gib["base"], gib["logits"], gib["kept of the base"]) == (1.87, 0.86, 0.12)
    assert gib["factors, gradients, moments"] == pytest.approx(2 * 0.13, abs=0.015)


@pytest.mark.parametrize("tp", [1, 8, 32])
@pytest.mark.parametrize("sequence", [False, True])
def test_totals_add_up(tp, sequence):
    found = of(tp=tp, dp=2, sequence_parallel=sequence)
    for totals in (found.ours, found.peers):
        assert totals.seconds == pytest.approx(totals.base_compute + totals.base_collectives + totals.lora)
        assert totals.share == totals.lora / totals.seconds and 0 < totals.share < 1
    assert found.values()["ours"]["share"] == found.ours.share
    assert json.loads(json.dumps(found.values()))["plan"]["tp"] == tp


def test_a_decoder_layer_is_computed_again_however_many_there_are():
    one, two = (
        [
            estimate.estimate(dataclasses.replace(SMALL, layers=n), dataclasses.replace(RECIPE, **how), TRN1).ours
            for how in ({}, {"activation_checkpointing": True})
        ]
        for n in (1, 2)
    )
    for name in ("base_flops", "lora_flops", "base_launches"):
        [more, twice] = [getattr(again, name) - getattr(once, name) for once, again in (one, two)]
        assert twice == 2 * more > 0


def test_a_step_of_two_microbatches_is_twice_one_but_for_the_sync():
    one, two = of(microbatches=1, dp=4).ours, of(microbatches=2, dp=4).ours
    assert two.seconds - two.sync == pytest.approx(2 * (one.seconds - one.sync)) and two.sync == one.sync
    assert two.share < one.share


@settings(max_examples=25)
@given(
    st.sampled_from([PRESETS["llama-3-8b"], PRESETS["llama-3-405b"]]),
    st.sampled_from([1, 2, 8, 32]),
    st.tuples(st.integers(1, 512), st.integers(1, 512)).map(sorted),
    st.booleans(),
)
def test_the_share_grows_with_the_rank(shape, tp, ranks, again):
    plans = [dataclasses.replace(RECIPE, tp=tp, rank=rank, activation_checkpointing=again) for rank in ranks]
    small, large = (estimate.estimate(shape, plan, TRN1) for plan in plans)
    assert small.ours.share <= large.ours.share and small.peers.share <= large.peers.share


@pytest.mark.parametrize("target", [*LINEARS, *estimate.ENDS])
def test_any_module_can_be_the_only_target(target):
    found = of(targets=(target,))
    assert [layer.scheme is not None for layer in found.layers].count(True) == 1
    assert found.ours.lora > 0 and found.peers.lora > 0


def test_a_scheme_can_be_asked_for():
    chosen, asked = (of(sequence_parallel=False, scheme=scheme) for scheme in (None, cost.RANK))
    assert {layer.scheme for layer in chosen.layers if layer.scheme} == {cost.FOLD}
    assert {layer.scheme for layer in asked.layers if layer.scheme} == {cost.RANK}
    assert asked.ours.lora_launches == 2 * 4 * SMALL.layers * RECIPE.microbatches
    cheapest = of(sequence_parallel=False, scheme="auto", rank=512)
    seconds = [{s: u.seconds(TRN1) for s, u in layer.updates.items()} for layer in cheapest.layers if layer.scheme]
    found = [layer.scheme for layer in cheapest.layers if layer.scheme]
    assert found == [min(each, key=each.__getitem__) for each in seconds] and set(found) == {cost.RANK}
    assert of(sequence_parallel=False, rank=512).ours.lora > cheapest.ours.lora


@pytest.mark.parametrize("scheme", [None, "rank", "auto"])
@pytest.mark.parametrize("sequence", [False, True])
def test_a_scheme_is_that_of_the_model_that_is_trained(scheme, sequence, tmp_path):
    """Under sequence parallel the column layers can have "rank" too, for their input is gathered before them."""
    place = config(tmp_path, architectures=["LlamaForCausalLM"], model_type="llama")
    plan = Plan(tp=2, rank=48, tokens=64, sequence_parallel=sequence, scheme=scheme, targets=(*LINEARS, "lm_head"))
    machine = dataclasses.replace(TRN1, latency=1e-12)
    layers = estimate.estimate(estimate.read_shape(place), plan, machine).layers
    fused = models.Form(fuse_qkv=True, fuse_gate_up=True)
    model = models.outline(place, axis=Axis(size=2), form=fused, sequence_parallel=sequence)
    told = {"tokens": 64, "microbatches": plan.microbatches, "sequence_parallel": sequence}
    by = {None: None, "rank": "rank", "auto": lambda layer: schemes.cheapest(layer, machine, **told).scheme}[scheme]
    lora = LoraSpec(rank=48, target_modules="(.*layers.0.*_proj|lm_head)")
    used = {path.rpartition(".")[2]: spec.scheme for path, spec in bind.plan(model, lora, scheme=by).items()}
    assert used.keys() == {layer.name for layer in layers if layer.scheme}
    for layer in layers:
        if layer.scheme:
            assert (layer.scheme == cost.RANK) == (used[layer.name] == "rank"), layer.name
    by_rank = {name for name, of in used.items() if of == "rank"}
    assert scheme != "rank" or by_rank == used.keys() - ({"o_proj", "down_proj"} if sequence else set())


# --------------------------------------------------------------------------------------------------------- files


def config(place, **changes):
    values = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 8}
    values |= {"num_key_value_heads": 4, "vocab_size": 100}
    (place / "config.json").write_text(json.dumps({k: v for k, v in (values | changes).items() if v is not None}))
    return place


def test_a_config_is_read(tmp_path, capsys):
    shape = estimate.read_shape(config(tmp_path))
    assert (shape.hidden, shape.heads, shape.features) == (64, 8, (64, 32))
    assert estimate.read_shape(tmp_path / "config.json") == shape
    assert estimate.read_shape(config(tmp_path, num_key_value_heads=None)).key_value_heads == 8
    assert estimate.read_shape(config(tmp_path, head_dim=16)).features == (128, 64)
    assert told(capsys, "--model", tmp_path, "--tp", 2).startswith(f"{tmp_path.name} on trn1, tp 2, dp 1 (1 node)")


def test_a_machine_can_be_measured(tmp_path, capsys):
    """What suite B17 writes goes over a machine that is known."""
    file = tmp_path / "machine.json"
    file.write_text(json.dumps({"latency": 1e-3, "flops": 1e12}))
    words = ("--preset", "llama-3-8b", "--json", "--machine", "trn1", file)
    [found] = json.loads(told(capsys, *words, "--set", "latency=2e-3", "processes=16", "memory_bandwidth=inf"))
    given = {"latency": 2e-3, "flops": 1e12, "processes": 16, "memory_bandwidth": math.inf}
    assert found["machine"] == dataclasses.asdict(TRN1) | given
    file.write_text(json.dumps(dataclasses.asdict(TRN1)))
    [found] = json.loads(told(capsys, "--preset", "llama-3-8b", "--json", "--machine", file))
    assert found["machine"] == dataclasses.asdict(TRN1)


BAD = {
    "scheme of none": (
        ["--tp", "8", "--scheme", "rank", "--sequence-parallel", "--target-modules", "o_proj", "down_proj"],
        "none of the 2 adapted layers that are cut has; o_proj has none under sequence parallel, where",
    ),
    "scheme of a rank": (
        ["--tp", "8", "--rank", "17", "--scheme", "rank", "--target-modules", "o_proj"],
        "o_proj: LayerSpec.rank: is 17, which 8 processes do not divide by scheme 'rank'",
    ),
    "no model": ([], "cost: no model is named; give --preset"),
    "no file": (["--model", "gone"], "gone: no such file"),
    "heads": (["--tp", 3], "qkv_proj: LayerSpec"),
    "tokens": (["--tp", 8, "--tokens", 100, "--sequence-parallel"], "--tokens: is 100, which --tp 8 does not divide"),
    "long": (
        ["--tokens", 4096, "--sequence-length", 8192],
        "--sequence-length: is 8192, expected at most the --tokens",
    ),
    "no nodes": (
        ["--microbatches", 1, "--plot", "cost.png"],
        "--plot: no number of nodes, of 1, 2, 4, 8, 16, 32, 64, 128",
    ),
    "rank": (["--rank", 0], "--rank: is 0, expected an integer of at least 1"),
    "target": (["--target-modules", "q_prj"], "--target-modules: has q_prj, expected some of q_proj"),
    "machine": (["--machine", "trn9"], "--machine: 'trn9' is no file, and none of trn1, trn2, h200, cpu"),
    "constant": (["--set", "beta=1"], "--set: has beta, expected some of flops"),
    "value": (["--set", "latency=-1"], "Machine.latency: is -1, expected a number of seconds"),
    "no number": (["--set", "flops=nan"], "Machine.flops: is nan, expected a number above 0"),
    "half a process": (["--set", "processes=1.5"], "Machine.processes: is 1.5, expected an integer"),
    "place": (["--plot", "gone/cost.png"], "gone/cost.png: cannot be written"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_a_sentence(case, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words, sentence = BAD[case]
    model = [] if case in ("no model", "no file") else ["--preset", "llama-3-8b"]
    assert sentence in refused(capsys, *model, *words)


def test_a_bad_config_is_a_sentence(tmp_path):
    with pytest.raises(FileError, match="hidden_size is 'large', expected an integer of at least 1"):
        estimate.read_shape(config(tmp_path, hidden_size="large"))
    with pytest.raises(FileError, match="vocab_size is None"):
        estimate.read_shape(config(tmp_path, vocab_size=None))
    with pytest.raises(FileError, match="is of a model with experts"):
        estimate.read_shape(config(tmp_path, num_local_experts=8))
    with pytest.raises(SpecError, match="--scheme: is 'fold', expected one of rank, auto"):
        Plan(scheme="fold")
    with pytest.raises(SpecError, match="itemsize: is 3"):
        Plan(itemsize=3)


# --------------------------------------------------------------------------------------------------------- pages


def test_the_curves_are_those_of_the_sizes_that_fit():
    plan = dataclasses.replace(RECIPE, tp=32, microbatches=8)
    nodes, ours, shared, peers = estimate_report.over_nodes(SMALL, plan, TRN1)
    assert nodes == [1, 2, 4, 8] and ours == sorted(ours) and len(ours) == len(peers)
    assert all(one < two for one, two in zip(shared, ours, strict=True))
    assert estimate_report.over_tp(SMALL, RECIPE, TRN1)[0] == [1, 2, 4, 8, 16, 32]
    assert estimate_report.over_rank(SMALL, RECIPE, TRN1)[0] == [*estimate_report.RANKS]


@pytest.mark.parametrize("shape", PRESETS.values(), ids=PRESETS)
def test_of_as_many_factors_ours_is_the_smaller_share(shape):
    """As docs/cost.md says of its plot."""
    plan = Plan(tp=64, dp=4, tokens=8192, sequence_parallel=True, activation_checkpointing=True)
    for curve in estimate_report.PANELS.values():
        _, _, shared, peers = curve(shape, plan, MACHINES["trn2"])
        assert all(ours < theirs for ours, theirs in zip(shared, peers, strict=True))


def test_a_plot_is_drawn(tmp_path, capsys):
    told(capsys, "--preset", "llama-3-8b", "--tp", 32, "--plot", tmp_path / "cost.png")
    assert (tmp_path / "cost.png").read_bytes().startswith(b"\x89PNG")


def test_the_line_of_the_readme_is_what_the_command_prints(capsys):
    text = (PAGE.parent.parent / "README.md").read_text(encoding="utf-8")
    command, line = re.search(r"^    lora-fn (cost .*)\n    \.\.\.\n    (.*)$", text, re.MULTILINE).groups()
    assert line in told(capsys, *shlex.split(command)[1:]).splitlines()


TEXT = PAGE.read_text(encoding="utf-8")


def test_the_page_shows_what_the_command_prints(capsys):
    command, shown = re.search(r"^    lora-fn (cost .*)\n\n```text\n(.*?)```", TEXT, re.DOTALL | re.MULTILINE).groups()
    assert told(capsys, *shlex.split(command)[1:]) == shown
    assert "nothing of this was measured on a Neuron device" in shown


def test_the_table_of_the_page_is_what_its_block_prints():
    block = re.search(r"^```python\n(.*?)^```", TEXT, re.DOTALL | re.MULTILINE).group(1)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(block, "cost.md", "exec"), {})
    assert len(printed.getvalue().splitlines()) >= 6 and printed.getvalue() in TEXT


def test_the_plot_of_the_page_can_be_drawn_again(tmp_path, capsys):
    command = re.search(r"^    lora-fn (cost .* --plot docs/cost.png)$", TEXT, re.MULTILINE).group(1)
    again = tmp_path / "cost.png"
    told(capsys, *shlex.split(command.replace("docs/cost.png", str(again)))[1:])
    shown = PAGE.parent / "cost.png"
    assert shown.read_bytes().startswith(b"\x89PNG") and "(cost.png)" in TEXT
    assert 0.5 < shown.stat().st_size / again.stat().st_size < 2
