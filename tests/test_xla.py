"""What does XLA see? The communication in the graphs, and how many graphs there are, on torch_xla's CPU devices."""

import importlib.util
import json
import os
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import jobs
import pytest
import torch
from jobs import job_models_fixture, small_models_fixture  # noqa: F401  (fixtures)
from safetensors.torch import load_file
from xla_graphs import communication

sys.path.insert(0, str(Path(__file__).parent.parent))

import adapters
from adapters import models, train
from benchmarks import graphs as bench_graphs
from benchmarks import layerwise, operations, targets, trainium
from benchmarks.options import Options
from lora_fn import LoraSpec

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("torch_xla") is None, reason="torch_xla is not installed: XLA's graphs are not looked at"
)

HERE = Path(__file__).parent
TP, DP = "{{0,1},{2,3}}", "{{0,2},{1,3}}"
BASE = {
    "None": [["all-reduce", TP]] * 2,  # row forward, column backward
    "0": [["all-gather", TP], ["reduce-scatter", TP]] * 2,  # column and row forward, row and column backward
}
BASE["1"] = BASE["0"]


NXD = os.environ.get("LORA_FN_NXD")
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "4")


def started(script, *arguments, processes=1):
    """Run a script of this directory; torch_xla reads its environment once, so it has processes of its own."""
    paths = [str(HERE.parent), *([f"{NXD}/src"] if NXD else []), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *(TORCHRUN if processes > 1 else ()), HERE / script, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return done.stdout


def from_each(output):
    """What each of four processes, or devices, wrote."""
    return [json.loads(output.with_name(f"{output.name}.{rank}").read_text()) for rank in range(4)]


@pytest.fixture(scope="module")
def graphs(tmp_path_factory):
    """What each of four devices on a 2 x 2 mesh traced."""
    output = tmp_path_factory.mktemp("xla") / "graphs"
    started("xla_graphs.py", str(output))
    return from_each(output)


@pytest.mark.parametrize("first", ("column", "qkv"))
@pytest.mark.parametrize("sequence_dim", BASE)
def test_a_pair_communicates_over_its_own_groups(first, sequence_dim, graphs):
    assert graphs[0]["found"][f"{first}, base, {sequence_dim}"] == BASE[sequence_dim]


@pytest.mark.parametrize("first", ("column", "qkv"))
@pytest.mark.parametrize("sequence_dim", BASE)
def test_an_adapter_adds_the_sync_alone(first, sequence_dim, graphs):
    sync = [["all-reduce", TP], ["all-reduce", DP]]
    assert graphs[0]["found"][f"{first}, adapted, {sequence_dim}"] == BASE[sequence_dim] + sync


def test_nothing_is_added_in_place(graphs):
    """torch_xla 2.9 takes 100 times as long to trace `addmm_` as `addmm`, in each step of a training loop."""
    assert [each["in place"] for each in graphs] == [[]] * 4


@pytest.mark.parametrize("groups", (TP, "{}", "[2,2]<=[4]"))
def test_collectives_are_found_whatever_their_groups(groups):
    line = f"  %a.1 = f32[4]{{0}} all-reduce(f32[4]{{0}} %p.1), replica_groups={groups}, to_apply=%add.1"
    assert communication(line) == [["all-reduce", groups]]


def test_every_process_traces_the_same_graphs(graphs):
    assert all(each["texts"] == graphs[0]["texts"] for each in graphs)


# ------------------------------------------------------------------------------------------------ lora-fn finetune


@pytest.fixture(scope="module", name="adapters_of")
def adapters_of_fixture(job_models, tmp_path_factory):
    """A directory with an adapter of each of two models, random everywhere."""
    place = tmp_path_factory.mktemp("adapters")
    for name in ("llama", "llama-1-layer"):
        model = models.load(job_models[name])
        adapters.wrap(model, LoraSpec(rank=4, alpha=3, init_lora_weights=False), seed=5)
        adapters.save(model, place / name)
    return place


@pytest.fixture(scope="module", name="finetune")
def finetune_fixture(job_models, adapters_of, tmp_path_factory):
    """Run a variant of a job whose adapter is swapped and whose alpha changes on the way: -> the job, and what it told.

    The microbatches of a step are four, so that dropout's masks are the same on one process and on two of "dp".
    """
    place = tmp_path_factory.mktemp("finetune")
    job = train.Job(
        model="",
        data=(jobs.write_lines(place / "data.jsonl", jobs.uneven(24)),),
        output="",
        lora=LoraSpec(rank=4, alpha=8, dropout=0.1),
        sequence_length=40,
        learning_rate=1e-2,
    )

    def run(name, model, **changes):
        here = replace(job, model=job_models[model], output=str(place / name), **changes)
        told = place / f"{name}.json"
        arguments = (json.dumps(here.to_dict()), str(adapters_of / model), str(told))
        started("xla_finetune.py", *arguments, processes=here.processes)
        return here, json.loads(told.read_text())

    return run


def assert_same_training(found, expected, tolerance=1e-5):
    """max|a - b| / max|b| of losses, norms, and every factor at the end."""
    for name, kind in (("loss", "train"), ("grad_norm", "train"), ("loss", "eval")):
        assert error(*(torch.tensor(jobs.column(job, name, kind)) for job in (found, expected))) <= tolerance
    factors = [load_file(Path(job.output) / "adapter_model.safetensors") for job in (found, expected)]
    assert factors[0].keys() == factors[1].keys()
    for name, factor in factors[0].items():
        # AdamW divides by gradients: of a small one, it makes rounding large.
        assert error(factor, factors[1][name]) <= 100 * tolerance, name


def error(found, expected):
    return float((found.double() - expected.double()).abs().max() / expected.double().abs().max())


TWENTY = dict(model="llama", steps=20, warmup=5, accumulation=2)


@pytest.fixture(scope="module", name="twenty")
def twenty_fixture(finetune):
    """Twenty steps of the whole loop on one XLA device, with warm-up, evaluation and checkpoints."""
    return finetune("twenty", **TWENTY, device="xla", checkpoint_every=10, eval_every=10)


def test_every_step_is_one_graph_and_the_same(twenty):
    _, told = twenty
    compiled = [after[0] - begin[0] for begin, _, after in told]
    assert len(told) == 20 and compiled == [1] + [0] * 19
    for begin, cut, after in told:
        assert cut == begin, "within a step nothing is run, compiled or read"
        assert after[1] == begin[1] + 1 and after[2] == begin[2], "at its end one graph is run, and nothing is read"


def test_twenty_steps_come_out_as_on_the_cpu(twenty, finetune):
    expected, _ = finetune("twenty-cpu", **TWENTY, device="cpu", checkpoint_every=10, eval_every=10)
    assert_same_training(twenty[0], expected)


AGAIN = {"layers": {"activation_checkpointing": True}, "elementwise": {"recompute": "elementwise"}}


@pytest.mark.parametrize("what", AGAIN)
def test_what_is_computed_again_comes_out_as_on_the_cpu(what, finetune):
    few = dict(model="llama-1-layer", steps=3, warmup=1, **AGAIN[what])
    found, told = finetune(f"again-{what}", **few, device="xla")
    assert [after[0] - begin[0] for begin, _, after in told] == [1, 0, 0]
    assert_same_training(found, finetune(f"again-{what}-cpu", **few, device="cpu")[0])


def test_a_mesh_of_processes_comes_out_as_one(finetune):
    """The whole program on 2 x 2 processes with an XLA device each: their start, evaluation, checkpoints, the adapter.

    What they communicate goes over gloo, so this shows numbers, and the graphs are shown below.
    """
    few = dict(model="llama-1-layer", steps=3, warmup=1, checkpoint_every=2)
    cut = dict(tp=2, dp=2, sequence_parallel=True, fuse_qkv=True, kv_size_multiplier=2)
    found, _ = finetune("mesh", **few, **cut, accumulation=2, device="xla")
    assert_same_training(found, finetune("mesh-cpu", **few, accumulation=4, device="cpu")[0])


# ------------------------------------------------------------------------------------------------------- many adapters


@pytest.fixture(scope="module")
def many(job_models, adapters_of, tmp_path_factory):
    """What became of many adapters on one device."""
    told = tmp_path_factory.mktemp("many") / "told.json"
    started("xla_many.py", job_models["llama-1-layer"], str(adapters_of / "llama-1-layer"), str(told))
    return json.loads(told.read_text())


def test_adapters_come_and_go_in_one_graph(many):
    assert (
        many["compiled"] == {event: int(event == "first") for event in many["compiled"]} and len(many["compiled"]) > 9
    )
    assert max(many["errors"].values()) < 1e-5


def test_the_graph_does_not_grow_with_adapters(many):
    assert len(set(many["operations"].values())) == 1, many["operations"]


# ------------------------------------------------------------------------------------------------------- the benchmarks


ON_XLA = Options(where="xla", tiny=True, xla_python=sys.executable)


def test_the_graphs_of_a_changing_adapter_keep_to_the_targets():
    found = {row.case: row.minimum for row in bench_graphs.run("ours", ON_XLA)}
    assert found == dict.fromkeys(bench_graphs.EVENTS, 1) | {bench_graphs.DISABLED: 2}


def test_a_training_run_compiles_one_graph():
    found = {row.metric: row for row in trainium.run(trainium.ALONE, replace(ON_XLA, rounds=2))}
    assert (found[trainium.COMPILED].minimum, found[trainium.AGAIN].minimum) == (1, 0)
    assert found[trainium.STEP].backend == "XLA on CPU, not a Neuron device"


def test_the_operations_of_a_linear_layer_keep_to_the_targets():
    found = [row for case in operations.cases(ON_XLA)[1:] for row in operations.run(case, ON_XLA)]
    verdicts = [one for one in targets.judge(found) if one.target.suite == "B7" and one.worst is not None]
    assert [one.verdict for one in verdicts] == [targets.MET] * 3, verdicts


def test_the_collectives_of_each_layer_keep_to_the_targets():
    found = layerwise.run(layerwise.LOWERED, ON_XLA)
    verdicts = [one for one in targets.judge(found) if one.target.suite == "B1" and one.worst is not None]
    assert [one.verdict for one in verdicts] == [targets.MET] * 3 and sum(one.cases for one in verdicts) == 20


# -------------------------------------------------------------------------------------------- its step, on a 2 x 2 mesh


@pytest.fixture(scope="module")
def traced(job_models, adapters_of, tmp_path_factory):
    """What each of four processes traced."""
    output = tmp_path_factory.mktemp("traced") / "processes"
    started("xla_training.py", str(Path(job_models["llama"]).parent), str(adapters_of), str(output), processes=4)
    return from_each(output)


REDUCE, GATHER, SCATTER = ([name, TP] for name in ("all-reduce", "all-gather", "reduce-scatter"))
FORMS = {"sequence on": 2, "sequence off": 1, "fused, copied heads": 1, "checkpointing": 1}  # name -> layers


def of_step(layers, *, cut, microbatches=2):
    """The collectives of a step: of the base model's forward and backward, of the adapters' sync, of "dp" and norm.

    The embedding, two blocks a layer, the loss (its maximum, and its sums). Before the first block nothing learns.
    """
    if cut:
        forward = [REDUCE, *[GATHER, SCATTER] * (2 * layers), GATHER, REDUCE, REDUCE]
        backward = [SCATTER, *[GATHER, SCATTER] * (2 * layers)][:-1]
    else:
        forward, backward = [REDUCE] * (1 + 2 * layers + 2), [REDUCE] * (1 + 2 * layers - 1)
    return (forward + backward) * microbatches + [REDUCE, ["all-reduce", DP], REDUCE]


@pytest.mark.parametrize("form", [form for form in FORMS if form != "checkpointing"])
def test_a_step_communicates_what_it_must(form, traced):
    assert traced[0][form]["communication"] == of_step(FORMS[form], cut=form != "sequence off")


def test_activation_checkpointing_communicates_a_forward_more(traced):
    again = [GATHER, SCATTER] * (2 * FORMS["checkpointing"]) * 2
    expected = of_step(FORMS["checkpointing"], cut=True) + again
    assert Counter(map(tuple, traced[0]["checkpointing"]["communication"])) == Counter(map(tuple, expected))
    text = traced[0]["checkpointing"]["text"]
    assert text.count(" opt-barrier(") == 2 * FORMS["checkpointing"], "else XLA would compute nothing again"


@pytest.mark.parametrize("form", FORMS)
def test_every_process_traces_the_same_step(form, traced):
    assert len({each[form]["text"] for each in traced}) == 1


@pytest.mark.parametrize("form", FORMS)
def test_twenty_steps_on_a_mesh_are_one_graph(form, traced):
    for each in traced:
        assert len(each[form]["hashes"]) == 20 and len(set(each[form]["hashes"])) == 1
        assert each[form]["run"] == [0, 0, 0]


def test_what_is_no_data_is_seen(traced):
    for each in traced:
        assert each["otherwise"]["alpha"] not in each["checkpointing"]["hashes"]
    assert len({each["otherwise"]["place"] for each in traced}) == 4


def test_four_devices_of_one_process_trace_the_same(traced, job_models, adapters_of, tmp_path):
    """Where nothing that torch_xla tells is replaced."""
    started("xla_training.py", str(Path(job_models["llama"]).parent), str(adapters_of), str(tmp_path / "devices"))
    for each in from_each(tmp_path / "devices"):
        assert each["sequence on"]["text"] == traced[0]["sequence on"]["text"]
        assert len(set(each["sequence on"]["hashes"])) == 1


# ---------------------------------------------------------------------------------------- layers of neuronx-distributed


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """What each of four processes traced of pairs of its layers."""
    if not NXD:
        pytest.skip("LORA_FN_NXD names no checkout of neuronx-distributed")
    output = tmp_path_factory.mktemp("nxd") / "pairs"
    started("xla_nxd.py", str(output), processes=4)
    return from_each(output)


def test_a_wrapped_pair_communicates_as_its_own_forward_does(pairs):
    expected = {"None": [REDUCE] * 2} | dict.fromkeys("01", [GATHER, SCATTER] * 2)
    for name, found in pairs[0].items():
        own, wrapped = found["own"], found["wrapped"]["communication"]
        assert wrapped == expected[name.rpartition(" ")[2]], name
        if "fused" in name:  # its fused projections have no backward where they are frozen
            assert "must be Tensor, not tuple" in own["error"], name
        elif "copied" in name:  # it sums the gradients of frozen key-value heads over their copies (here, over "tp")
            assert sorted(own["communication"]) == sorted([*wrapped, REDUCE]), name
        else:
            assert own["communication"] == wrapped, name
    assert len(pairs[0]) == 9


def test_every_process_traces_the_same_pair(pairs):
    for name in pairs[0]:
        assert len({each[name]["wrapped"]["text"] for each in pairs}) == 1, name
