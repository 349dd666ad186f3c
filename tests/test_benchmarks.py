"""Do the benchmarks that need no clock still hold? Counts of a step, and gradients beside NxD's and Optimum Neuron's.

The latter as test_nxd; where LORA_FN_OPTIMUM names no checkout of Optimum Neuron, its rows are left out.
"""

import cProfile
import functools
import itertools
import json
import math
import os
import pstats
import re
import subprocess
import sys
import time
import unittest.mock
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from pool import pool
from test_nxd import BF16, FP32, HERE, NXD, PYTHON, needs_nxd

sys.path.insert(0, str(HERE.parent))
sys.path.insert(0, str(HERE.parent / "benchmarks"))
import gradients

import adapters
from benchmarks import __main__ as command
from benchmarks import (
    apart,
    checkouts,
    communication,
    comparison,
    disk,
    equality,
    flops,
    growth,
    layerwise,
    links,
    many,
    merge,
    operations,
    programs,
    report,
    rows,
    saved,
    start,
    steps,
    suites,
    targets,
    timing,
    trainium,
)
from benchmarks.options import BACKENDS, Options
from benchmarks.programs import FROZEN, FULL, H512, PROGRAMS, TINY, Program, Setup, adapted_paths, batch, drawn, llama
from lora_fn import Axis
from lora_fn.machines import MACHINES

OPTIMUM = os.environ.get("LORA_FN_OPTIMUM")
OURS = ("ours, summed", "ours, deferred")


@pytest.fixture(scope="module", name="rows")
def rows_fixture():
    """{(layer, sequence parallel, dtype, program): row}, from two processes."""
    found = gradients.start(Path(NXD), Path(OPTIMUM) if OPTIMUM else None, 2, PYTHON)
    return {(row["layer"], row["sequence"], row["dtype"], row["program"]): row for row in found}


def number(row, *steps):
    """How many collectives of each kind."""
    return sum((Counter({kind: n for kind, (n, _) in row[step].items()}) for step in steps), Counter())


@needs_nxd
def test_ours_is_right_and_replicas_agree(rows):
    mine = {case: row for case, row in rows.items() if case[3] in OURS}
    assert len(mine) == len(gradients.LAYERS) * 2 * 2 * 2
    for (layer, _, dtype, _), row in mine.items():
        errors = {name: row.get(name) for name in ("y", "dx", "dA", "dB")}
        if layer == "embedding":  # of ids
            assert errors.pop("dx") is None
        assert max(errors.values()) <= (FP32 if dtype == "float32" else BF16), row
        assert row["agree"] == 1.0 and "stopped" not in row, row


@needs_nxd
def test_ours_adds_no_collective_but_one_sum_a_step(rows):
    for (layer, sequence, dtype, program), row in rows.items():
        if program != "ours, deferred":
            continue
        base = rows["qkv" if layer.startswith("qkv") else layer, sequence, dtype, "frozen"]
        expected = number(base, "forward", *(["backward"] if "backward" in base else []))
        if layer == "embedding" and sequence:  # what a frozen one does not want: the gradient that it scattered
            expected["all-gather"] += 1
        assert number(row, "forward", "backward") == expected, row
        assert number(row, "sync") == {"all-reduce": 1}, row


@needs_nxd
def test_what_the_others_get_wrong_is_seen(rows):
    others = [program for program in ("NxD", "Optimum Neuron") if OPTIMUM or program == "NxD"]
    for program in others:
        for dtype in gradients.DTYPES:
            for layer, wrong in (("column", "dA"), ("row", "dB"), ("qkv", "dA"), ("qkv, 2 copies", "dA")):
                row, without = rows[layer, True, dtype, program], rows[layer, False, dtype, program]
                assert row[wrong] > 0.5 and row["agree"] == 0.0, row
                assert without[wrong] < BF16 and without["agree"] == 1.0, without
                more = number(row, "forward", "backward") - number(
                    rows[layer, True, dtype, OURS[1]], "forward", "backward"
                )
                assert more.total() >= 2, row
            assert rows["qkv, fused", False, dtype, program]["stopped"].startswith("forward: RuntimeError")
        assert rows["column", False, "bfloat16", program]["dx"] > BF16


def test_what_checkouts_do_is_told_in_rows():
    told = {"tp": 2, "layer": "row", "sequence": True, "program": "NxD", "dtype": "float32"}
    base = told | {"program": "frozen", "forward": {"all-gather": [1, 8]}, "backward": {}}
    one = told | {"y": 1e-7, "dB": 0.9, "agree": 0.0, "forward": {"all-gather": [3, 8]}, "backward": {}, "sync": {}}
    found = {row.metric: row.minimum for row in checkouts.of_layer(one, base)}
    assert found == {checkouts.ERROR: 0.9, checkouts.DRIFT: 1.0, checkouts.EXTRA: 2, checkouts.SYNC: 0}
    [stopped] = checkouts.of_layer(told | {"stopped": "backward: E: why"}, base)
    assert stopped.note == "not measured: it stopped in backward: E: why"
    unnamed = list(checkouts.run(TRY))
    assert {row.suite for row in unnamed} == {"B1", "B2"} and all("name a checkout" in row.note for row in unnamed)


def test_tables_are_aligned_and_name_what_stopped():
    told = {"tp": 2, "layer": "row", "sequence": True, "program": "NxD"}
    right = told | {"dtype": "float32", "y": 1e-7, "agree": 1.0, "forward": {"all-gather": [2, 2048]}, "backward": {}}
    stopped = told | {"dtype": "bfloat16", "y": 0.5, "agree": 0.0, "stopped": "sync: E: why", "forward": {}}
    text = gradients.tables([right, stopped])
    errors, reasons, counts = (part.splitlines() for part in text.split("\n\n")[::2])
    assert {len(line) for line in errors} == {len(errors[0])} and {len(line) for line in counts} == {len(counts[0])}
    assert errors[2].replace(" ", "") == "|2|row|on|NxD|1.0e-07|-|-|-|5.0e-01|-|-|-|NO|1|"
    assert reasons == ["1. sync: E: why"]
    assert counts[2].replace(" ", "") == "|2|row|on|NxD|0|-|-|"
    assert gradients.communicated(right["forward"]) == "2 all-gather (2.0)"


def test_a_checkout_that_is_none_is_one_sentence(tmp_path):
    words = [sys.executable, gradients.__file__, "--nxd", tmp_path]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.endswith(f"error: {tmp_path} is no checkout with src/neuronx_distributed in it; name one.\n")


# ------------------------------------------------------------------------------------- a training step, beside others

TRY = Options(tiny=True, rounds=2, threads=1)
# Targets whose counts a step has reached; the others are in the report only.
REACHED = {
    "B2": (
        "error of loss and gradients at TP, float64, over one process's",
        "difference of replicas after 3 optimizer steps",
        "the same error where the backward sums, wrap's default",
        "the same difference of replicas there",
        "times that the scheme without its sync passes for right",
    ),
    "B1": (
        "extra collectives per microbatch, whole model at TP 2",
        "the same of a layer: column, row, qkv, embedding, SP on and off, on gloo and in XLA's HLO text",
        "the same of those that have one: embedding under SP a gather of T*r, DoRA on row an out-sized all-reduce",
        "the same of each layer that is cut by rank, which has its two",
        "collectives of a step's sync",
    ),
    "B6": (
        "LoRA FLOPs of a process, over the analytic count: alone, and at TP 2, SP on and off",
        "the same at TP 2, cut by rank",
    ),
    "B13": ("operations of a step with many adapters, over those with 2",),
    "B7": ("extra ATen operations for each adapted linear",),
    "B14": (
        "operations of an adapter for each further layer, over stock PEFT's",
        "operations beyond a straight line, with the layers",
        "operations at the largest rank, over those at the smallest",
    ),
    "B3": (
        "bytes saved for the backward, bf16, over the frozen model's",
        "both with recompute",
        "what dropout adds to them, over the frozen model's",
    ),
}


def count_communication(mesh, place):
    whole = [row for case in communication.CASES for row in communication.counted(mesh, place, TRY, case)]
    return layerwise.counted(mesh) + whole


def communication_rows(tmp_path):
    first, second = pool(2).run(count_communication, tmp_path)
    assert [replace(row, note="") for row in first] == [replace(row, note="") for row in second]
    return first


def compare(mesh, place):
    return [row for case in equality.cases(TRY)[1:2] for row in equality.compared(mesh, place, TRY, case)]


def equality_rows(tmp_path):
    return pool(2).run(compare, tmp_path)[0]


def count_flops(mesh, place):
    return [row for case in flops.cases(TRY)[1:] for row in flops.cut(mesh, place, TRY, case)]


def flops_rows(tmp_path):
    first, second = pool(2).run(count_flops, tmp_path)
    assert first == second and [row.minimum for row in first] == pytest.approx([1.0] * 4, abs=1e-3)
    return [*flops.run(flops.cases(TRY)[0], TRY), *first]


def count_saved(mesh, place):
    """At a size where what is of a linear layer's size weighs more than what has the rank."""
    with unittest.mock.patch.object(saved, "setups", lambda options: [LARGE]):
        return saved.cut(mesh, place, TRY, saved.cases(TRY)[-1])


LARGE = Setup(shape=replace(H512, layers=1), dtype="bfloat16")


def saved_rows(tmp_path):
    names = ("frozen", "ours", saved.AGAIN)
    found = [
        rows.count("B3", str(setup), name, saved.METRIC, saved.UNIT, saved.saved(saved.programs()[name](setup)))
        for setup in (LARGE, replace(LARGE, dropout=0.05))
        for name in names
    ]
    return [*found, *pool(2).run(count_saved, tmp_path)[0]]


def of_suite(suite):
    return lambda tmp_path: [row for case in suite.cases(TRY) for row in suite.run(case, TRY)]


COUNTED = {
    "B2": equality_rows,
    "B1": communication_rows,
    "B6": flops_rows,
    "B7": of_suite(operations),
    "B13": of_suite(many),
    "B14": of_suite(growth),
    "B3": saved_rows,
}


@pytest.mark.parametrize("suite", REACHED)
def test_counts_keep_to_the_targets_that_are_reached(suite, tmp_path):
    verdicts = {verdict.target.what: verdict for verdict in targets.judge(COUNTED[suite](tmp_path))}
    for what in REACHED[suite]:
        assert verdicts[what].verdict == targets.MET, verdicts[what]
        assert verdicts[what].cases


@pytest.mark.parametrize("name", ("ours", "PEFT", "torch"))
def test_every_flop_is_counted(name):
    """Fewer than the arithmetic needs would be those of an operation that the counter does not know."""
    assert flops.over_analytic(flops.setup_of(TRY), name) == pytest.approx(1.0, abs=1e-3)


def wrong(setup):
    """Ours, whose backward doubles one gradient."""
    program = PROGRAMS["ours"](setup)
    next(iter(program.trained.values())).register_hook(lambda grad: 2 * grad)
    return program


def stops(setup):
    raise NotImplementedError("not written")


@pytest.mark.parametrize("dtype", ("float32", "bfloat16"))
def test_nothing_is_timed_that_is_wrong(dtype):
    setup = Setup(shape=TINY, rank=4, dtype=dtype)
    made = {"right": PROGRAMS["ours"], "ours": wrong, "nan": nan_in_one, "stops": stops}
    right, refused, none, stopped = steps.time_programs(setup, made, TRY)
    assert right.minimum and right.rounds == TRY.rounds
    assert refused.minimum is refused.median is none.minimum is stopped.minimum is None
    assert re.fullmatch(
        r"not measured: .* (is off by|rounding error is) .*; nothing is timed that is wrong", refused.note
    )
    assert stopped.note == "not measured: NotImplementedError: not written"
    everywhere = [replace(right, program=name) for name in ("PEFT", "frozen")]
    assert verdict_of("step time, over stock PEFT's", [*everywhere, refused]).verdict == rows.NOT_MEASURED


def its_error(mesh):
    values = {"a": torch.ones(2), "b": torch.full((2,), torch.nan if mesh.get_local_rank() else 1.0)}
    return equality.worst(values, dict.fromkeys(values, torch.ones(2)))


def test_a_nan_is_worse_than_every_number(tmp_path):
    """Wherever it stands among right numbers, which `max` would take for the largest."""
    right, nan = torch.ones(2), torch.tensor([1.0, torch.nan])
    for name in ("loss", "a", "b"):
        values = dict.fromkeys(("loss", "a", "b"), right)
        for found, expected in ((values | {name: nan}, values), (values, values | {name: nan})):
            with pytest.raises(timing.Wrong, match=f"{name} is off by inf"):
                timing.check_exact(found, expected, timing.FP32)
            with pytest.raises(timing.Wrong, match="rounding error is nan"):
                timing.check_rounded(found, expected, {name: 1.01 * t for name, t in values.items()})
    assert timing.largest([1.0, math.nan, 2.0]) == timing.largest([math.nan, 1.0]) == math.inf
    assert timing.largest([]) == 0.0
    assert pool(2).run(its_error) == [math.inf, math.inf]
    each = [{"y": 1e-7, "dA": 1e-7, "agree": 1.0}, {"y": 1e-7, "dA": math.nan, "agree": 1.0}]
    assert gradients.worst(each) == {"y": 1e-7, "dA": math.inf, "agree": 1.0}
    told = {"tp": 2, "layer": "row", "sequence": True, "program": "NxD", "dtype": "float32"}
    [error, *_] = checkouts.of_layer(told | {"y": 1e-7, "dA": 1e-7, "dB": math.nan}, {})
    assert error.minimum == math.inf
    found = [rows.count("B2", "TP 2", "ours", equality.ERROR, "x", math.inf)]
    assert (
        verdict_of("error of loss and gradients at TP, float64, over one process's", found).verdict == targets.NOT_MET
    )
    assert report.plot(tmp_path, found) == {}


def nan_in_one(setup):
    """Ours, whose last factor has no number for a gradient."""
    program = PROGRAMS["ours"](setup)
    list(program.trained.values())[-1].register_hook(lambda grad: torch.nan * grad)
    return program


def half_trained(setup):
    """Full fine-tuning, but for one layer."""
    program = PROGRAMS[FULL](setup)
    (name, weight), *_ = program.trained.items()
    weight.requires_grad_(False)
    return replace(program, trained={other: p for other, p in program.trained.items() if other != name})


def scaled(setup):
    """Full fine-tuning, one of whose gradients is off."""
    program = PROGRAMS[FULL](setup)
    next(iter(program.trained.values())).register_hook(lambda grad: 1.5 * grad)
    return program


def from_afar(setup):
    """The frozen model, whose gradient is another one below the last layer."""
    program = PROGRAMS[FROZEN](setup)
    program.model.model.layers[-1].register_full_backward_pre_hook(lambda module, grads: tuple(1.5 * g for g in grads))
    return program


@pytest.mark.parametrize("dtype", ("float32", "bfloat16"))
def test_what_has_no_adapter_is_held_against_dense_gradients(dtype):
    setup = Setup(shape=TINY, rank=4, dtype=dtype)
    for name, make, told in (
        (FULL, PROGRAMS[FROZEN], "has no gradient"),
        (FULL, half_trained, "has no gradient"),
        (FULL, scaled, "is off by|rounding error"),
        (FROZEN, from_afar, "x is off by|rounding error"),
        (FULL, PROGRAMS[FULL], "^(off|rounds)"),
        (FROZEN, PROGRAMS[FROZEN], "^(off|rounds)"),
    ):
        [row] = steps.time_programs(setup, {name: make}, TRY)
        assert re.search(told, row.note) and (row.minimum is None) == (make is not PROGRAMS[name]), row


def test_a_weights_gradient_gives_those_of_its_factors():
    """dA = s B^T dW and dB = s dW A^T, where dW is that of W + s B A: of the plain program's model, merged."""
    setup = Setup(shape=TINY, rank=4)
    model, factors, scale = llama(setup), drawn(llama(setup), setup.rank), setup.alpha / setup.rank
    layers = adapted_paths(model)
    with torch.no_grad():
        for path, layer in layers.items():
            layer.weight += scale * factors[f"{path}.lora_B"] @ factors[f"{path}.lora_A"]
    merged = Program(
        model=model, trained={p: m.weight.requires_grad_() for p, m in layers.items()}, inputs=batch(setup)
    )
    found, expected = merged.found(), programs.reference(setup)
    made = {f"{path}.lora_A": scale * factors[f"{path}.lora_B"].T @ found[path] for path in layers}
    made |= {f"{path}.lora_B": scale * found[path] @ factors[f"{path}.lora_A"].T for path in layers}
    timing.check_exact(made | {"loss": found["loss"], "x": found["x"]}, expected, timing.FP32)


def test_a_loss_without_gradients_is_wrong():
    setup = Setup(shape=TINY, rank=4)
    program = PROGRAMS["ours"](setup)
    forgets = Program(model=program.model, trained={}, inputs=program.inputs)
    [row] = steps.time_programs(setup, {"ours": lambda setup: forgets}, TRY)
    assert row.minimum is None and "has no gradient" in row.note


# --------------------------------------------------------------------------------------------------------- to begin


@pytest.mark.parametrize("case", start.cases(TRY))
def test_what_begins_is_right_and_timed(case):
    found = list(start.run(case, TRY))
    assert len(found) >= 2 and all(row.minimum and re.search(r"off \d", row.note) for row in found), found


def test_nothing_that_loads_wrong_is_timed(monkeypatch, tmp_path):
    _, setup = start.setups(TRY)[start.cases(TRY)[0]]
    directory = start.made(setup, tmp_path, 0)
    monkeypatch.setattr(adapters, "load", lambda model, directory: None)
    with pytest.raises(timing.Wrong, match="logits is off by"):
        start.check(setup, [directory])


@pytest.mark.parametrize(
    ("script", "reason"),
    (
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "the process was ended by SIGKILL"),
        ("import sys; sys.exit(3)", "the process ended with 3 and printed nothing"),
        ("pass", "the process ended with 0 and printed nothing"),
        ("print(1); raise ValueError('why')", "ValueError: why"),
    ),
)
def test_a_process_that_comes_to_nothing_says_why(script, reason):
    with pytest.raises(RuntimeError, match=f"^{reason}$"):
        apart.value(["-c", script])
    assert apart.value(["-c", "print('first'); print([1, 2])"]) == [1, 2]


def calls(step):
    """How many calls of functions a step makes."""
    profile = cProfile.Profile()
    profile.runcall(step)
    return pstats.Stats(profile).total_calls


def test_calls_to_attach_and_to_load_grow_with_the_layers_alone(tmp_path):
    """An adapted linear takes some 1000 calls to attach, and 300 to load; a third of them are torch's own."""
    found = {}
    for layers in (2, 4, 8):
        setup = Setup(shape=replace(TINY, layers=layers), rank=4)
        directory = start.made(setup, tmp_path / str(layers), 0)
        spec, models = adapters.read_spec(directory), [llama(setup) for _ in range(2)]
        adapters.wrap(models[0], spec)  # the first checks the forms of layers
        adapters.load(models[0], directory)
        found[layers] = [
            calls(functools.partial(adapters.wrap, models[1], spec)),
            calls(functools.partial(adapters.load, models[0], directory)),
        ]
    for number, most in enumerate((1500, 500)):
        first, second, third = (found[layers][number] for layers in (2, 4, 8))
        assert second - first <= most * 14
        assert third - second <= 2.2 * (second - first)


def test_an_import_is_timed_in_fresh_processes(monkeypatch):
    monkeypatch.setattr(start, "IMPORTS", {"torch": "json", "ours": "json, asyncio"})
    [case] = start.import_cases(TRY)
    found = list(start.run_import(case, TRY))
    assert {row.program for row in found} == {"torch", "ours"}
    assert all(row.minimum and row.rounds == TRY.rounds for row in found)
    assert verdict_of("bytes that the import holds, beyond torch's", found).worst > 0


def verdict_of(what, found):
    [verdict] = [verdict for verdict in targets.judge(found) if verdict.target.what == what]
    return verdict


@pytest.mark.parametrize("where", ("", " on cuda"))
def test_what_dropout_adds_is_over_the_same_case_without_it(where):
    def found(**values):
        return [
            rows.count("B3", f"h1 bf16 r4{dropout}{where}", program, saved.METRIC, saved.UNIT, value)
            for dropout, of in (("", values), (", dropout 0.05", {"frozen": 100, "ours": 124}))
            for program, value in of.items()
        ]

    what = "what dropout adds to them, over the frozen model's"
    assert verdict_of(what, found(frozen=100, ours=120)).worst == pytest.approx(0.04)
    assert verdict_of(what, found(frozen=100, ours=118)).verdict == targets.NOT_MET
    assert verdict_of(what, found(frozen=100)).verdict == rows.NOT_MEASURED


def test_a_target_is_met_where_every_case_is():
    def step(case, program, *samples):
        told = ("B5", case, program, steps.METRIC, "s")
        return rows.measured(*told, samples) if samples else rows.missing(*told, "it stopped")

    what = "step time, over stock PEFT's"
    first = [step("h1", "PEFT", 1.0, 1.2), step("h1", "ours", 1.02, 1.1)]
    assert verdict_of(what, first).verdict == targets.MET  # within the noise
    slower = [*first, step("h2", "PEFT", 1.0), step("h2", "ours", 1.1)]
    assert verdict_of(what, slower).verdict == targets.NOT_MET
    assert (verdict_of(what, slower).case, verdict_of(what, slower).cases) == ("h2", 2)
    assert verdict_of(what, [*first, step("h2", "PEFT", 1.0), step("h2", "ours")]).verdict == rows.NOT_MEASURED
    assert verdict_of(what, [*slower, step("h3", "ours")]).verdict == targets.NOT_MET
    stopped = rows.missing("B5", "h2", "ours", rows.STOPPED, "", "an error")
    assert verdict_of(what, [*first, stopped]).verdict == rows.NOT_MEASURED
    assert verdict_of(what, []).verdict == rows.NOT_MEASURED


def test_the_command_writes_a_page_that_needs_no_other_file(tmp_path, capsys):
    threads = torch.get_num_threads()
    words = ["--tiny", "--rounds", "2", "--threads", "1", "--suite", "B3,B7,B8", "--output", str(tmp_path)]
    command.main(words)
    torch.set_num_threads(threads)
    told = capsys.readouterr().out
    assert re.search("^commit  +", told, re.MULTILINE) and "load average" in told
    assert {path.name for path in tmp_path.iterdir()} == {"rows.jsonl", "table.md", "report.html", "B3.png", "B7.png"}
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert page.count("data:image/png;base64,") == 2
    assert not re.search(r"""(?:src|href)=["'](?!data:|#)|@import|url\(|<script""", page)
    markdown = (tmp_path / "table.md").read_text(encoding="utf-8")
    for target in targets.TARGETS:
        assert re.search(rf"\| {re.escape(target.what)} +\|", markdown)
    for block in markdown.split("\n\n"):
        columns = [[at for at, letter in enumerate(line) if letter == "|"][:-1] for line in block.splitlines()]
        assert all(line == columns[0] for line in columns if block.startswith("|")), block
    assert "not measured: no interpreter with torch_xla; name one with --xla-python" in markdown
    found = rows.read(tmp_path / "rows.jsonl")
    assert {row.suite for row in found} == {"B3", "B7", "B8"}
    assert report.table(found, {}).split("## Environment")[0] == markdown.split("## Environment")[0]


# ------------------------------------------------------------------------------------------------ a run on a device


@pytest.fixture(name="one_process")
def one_process_fixture(tmp_path):
    """Run the harness of a device in this process: -> its rows."""
    threads = torch.get_num_threads()

    def run():
        words = ["--backend", "cpu", "--tiny", "--rounds", "2", "--peak", "1e12", "--output", str(tmp_path)]
        trainium.main(words)
        return rows.read(tmp_path / rows.FILE)

    yield run
    torch.set_num_threads(threads)


def test_a_training_run_is_told(one_process, tmp_path):
    found, machine = one_process(), json.loads((tmp_path / "machine.json").read_text())
    told = {row.metric: row for row in found if row.program == "ours"}
    assert told[trainium.STEP].rounds == 2 and told[trainium.STEP].backend == "CPU"
    speed, asked = told[trainium.SPEED].minimum, trainium.SHAPES["tiny"]
    assert speed == pytest.approx(64 * 2 / told[trainium.STEP].median)
    layer = 4 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 96) + 6 * 64 * (2 * (32 + 32) + 2 * (32 + 16) + 3 * (32 + 96))
    flops = asked.layers * layer + 4 * 32 * 256
    assert told[trainium.MFU].minimum == pytest.approx(flops * speed / 1e12)
    assert told[trainium.LATENCY].note == "not measured: one process has nobody to talk to"
    assert machine == {"flops": told[trainium.PRODUCTS].minimum}
    assert MACHINES["trn1"].with_values(machine, "machine.json").flops == machine["flops"]
    assert not any("Neuron" in row.backend for row in found)


def blind(model, seed):
    """Weights of which nothing comes."""
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(torch.nan)


def diverging(model, seed, draw=trainium.draw):
    """Weights that are right, until a step has been taken."""
    draw(model, seed)
    calls = itertools.count()
    model.register_forward_pre_hook(lambda *_: blind(model, seed) if next(calls) >= 2 else None)


@pytest.mark.parametrize(
    ("begin", "reason"),
    (
        (blind, "the first loss is nan; that of a model that knows nothing is 5.545"),
        (diverging, "a loss is no number"),
    ),
)
def test_a_training_run_that_is_wrong_has_no_speed(begin, reason, one_process, monkeypatch, tmp_path):
    monkeypatch.setattr(trainium, "draw", begin)
    ours, theirs = one_process()
    assert (ours.program, ours.metric, ours.minimum, ours.note) == (
        "ours",
        trainium.SPEED,
        None,
        f"not measured: {reason}",
    )
    assert theirs.program == "Optimum Neuron" and theirs.minimum is None
    assert not (tmp_path / "machine.json").exists()


def measure_links(mesh):
    from lora_fn.axis import axis_of_mesh

    return links.measure(axis_of_mesh(mesh, "tp"), torch.device("cpu"), lambda: None, sizes=(1024, 4096), rounds=2)


def test_collectives_between_processes_are_timed():
    found = pool(2).run(measure_links)[0]
    assert [(one.kind, one.size) for one in found] == [(kind, size) for kind in links.KINDS for size in (1024, 4096)]
    assert [one.sent for one in found] == [1024, 4096, 512, 2048, 512, 2048]
    assert all(len(one.seconds) == 2 and min(one.seconds) > 0 for one in found)


def measure_links_that_work(mesh):
    """Each waits 20 ms beside its collective."""

    def slow(run):
        return lambda x, axis: (time.sleep(0.02), run(x, axis))[1]

    for name, kind in links.KINDS.items():
        assert torch.equal(kind.run(torch.ones(4), Axis()), kind.alone(torch.ones(4), Axis())), name
    kinds = {name: replace(kind, run=slow(kind.run), alone=slow(kind.alone)) for name, kind in links.KINDS.items()}
    with unittest.mock.patch.object(links, "KINDS", kinds):
        return measure_links(mesh)


def test_what_is_no_collective_is_not_in_its_time():
    for one in pool(2).run(measure_links_that_work)[0]:
        assert 0 < min(one.seconds) < 0.02, one


@pytest.mark.parametrize(("latency", "bandwidth"), ((2e-5, 6e10), (3e-4, 2e9), (1e-3, math.inf)))
def test_latency_and_bandwidth_are_what_times_were_made_of(latency, bandwidth):
    made = [
        links.Sample(kind="all-reduce", size=n, sent=n, seconds=[latency + n / bandwidth, 1.0]) for n in links.SIZES
    ]
    assert links.fit(made) == pytest.approx((latency, bandwidth), rel=1e-6)


def test_a_training_run_that_cannot_be_is_one_sentence(tmp_path, capsys):
    config, empty = trainium.model_of("tiny")[0], tmp_path / "empty.json"
    files = {"vocab": {**config, "vocab_size": None}, "form": {**config, "architectures": ["Other"]}, "empty": {}}
    for name, of in files.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(of))
    for words, said in (
        (["--tp", "3"], "--tp 3 .*"),
        (["--config", "nosuch"], "--config is nosuch, expected one of 8b, small, tiny, or a config.json"),
        (["--config", f"{tmp_path / 'vocab.json'}"], ".*vocab_size is None, expected an integer of at least 1"),
        (["--config", f"{tmp_path / 'form.json'}"], ".*architecture is 'Other', expected one of .*"),
        (["--config", f"{empty}"], r"(?s:.*hidden_size is None, .*\n.*vocab_size is None, .*)"),
        (["--peak", "0"], "--peak is 0, expected FLOP/s above 0"),
        (["--output", f"{empty}"], f"--output {empty}: takes no files .*"),
    ):
        with pytest.raises(SystemExit) as told:
            trainium.main(["--backend", "cpu", "--tiny", "--output", str(tmp_path / "output"), *words])
        assert re.fullmatch(rf"python -m benchmarks.trainium: {said}\.", str(told.value)), told.value
    with pytest.raises(SystemExit):
        trainium.main(["--backend", "cpu", "--rank", "0"])
    assert "argument --rank: is 0, expected an integer of at least 1." in capsys.readouterr().err


def test_the_flops_of_a_training_run_are_those_of_its_heads(tmp_path):
    """Whose number and size a config.json may leave out."""
    config = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2}
    config["vocab_size"] = 16

    def flops(**more):
        (tmp_path / "config.json").write_text(json.dumps(config | more))
        of_config, shape = trainium.model_of(str(tmp_path / "config.json"))
        how = {"tp": 1, "dp": 1, "rank": 0, "dropout": 0.0, "sequence_length": 1, "accumulation": 1, "steps": 1}
        how |= {"sequence_parallel": False, "checkpointing": False, "dtype": "float32"}
        return trainium.Asked(config=of_config, shape=shape, **how).flops()

    rest = 4 * (3 * 8 * 12 + 8 * 16)
    assert flops() == rest + 4 * 4 * 8 * 8
    assert flops(num_key_value_heads=1) == rest + 4 * (2 * 8 * 8 + 2 * 8 * 4)
    assert flops(num_key_value_heads=1, head_dim=6) == rest + 4 * (2 * 8 * 12 + 2 * 8 * 6)


def test_a_device_that_is_not_here_gives_reasons():
    """Of the suites that are for eager programs, and of the run that needs a Neuron device."""
    found = list(suites.run([*suites.SUITES], Options(where="neuron", tiny=True, xla_python="none"), lambda case: None))
    assert {row.suite for row in found} == {*suites.SUITES}
    there = [row for row in found if row.backend == BACKENDS["neuron"].told]
    assert there and all(row.minimum is None and row.note.startswith(rows.NOT_MEASURED) for row in there)
    [ours] = [row for row in suites.run(["B17"], TRY, lambda case: None) if row.program == "ours"]
    assert ours.note.startswith("not measured: needs a Neuron device")


def test_what_runs_on_the_cpu_says_so_wherever_the_others_run():
    on_cuda = Options(where="cuda", tiny=True, rounds=1)
    assert rows.count("B6", "case", "ours", "metric", "x", 1.0).backend == BACKENDS["cpu"].told
    assert [case for case in saved.cases(on_cuda) if "on cuda" in case] == saved.cases(on_cuda)[:-1]
    found = [*operations.run(operations.OF_MODEL, on_cuda), *flops.run(flops.cases(on_cuda)[0], on_cuda)]
    assert {row.backend for row in found} == {"CPU"} and not any("cuda" in row.case for row in found)


# -------------------------------------------------------------------------------------------------- runs compared


def test_a_run_is_compared_with_an_older_one(tmp_path):
    def row(program, value, suite="B5"):
        return rows.measured(suite, "h1", program, steps.METRIC, "s", [value])

    old = [row("ours", 1.0), row("PEFT", 2.0), row("torch", 1.0), row("frozen", 1.0)]
    new = [row("ours", 1.2), row("PEFT", 1.0), row("torch", 1.01), row("other", 1.0)]
    found = comparison.lines(old, new)
    assert [line[2:] for line in found] == [
        ("ours", steps.METRIC, "1", "1.2", "1.200", "more"),
        ("PEFT", steps.METRIC, "2", "1", "0.500", "less"),
        ("torch", steps.METRIC, "1", "1.01", "1.010", ""),
    ]
    assert comparison.summary(found).startswith("Of 3 numbers that both runs have, 1 are more and 1 less: ")
    assert len({line.index("step time") for line in report.aligned(found)}) == 1


def test_a_count_that_changes_is_marked_however_little():
    def found(value):
        return [rows.count("B7", "h1", "ours", operations.EXTRA, "operations", value)]

    for now, mark in ((100_000, ""), (100_001, comparison.MORE), (99_999, comparison.LESS), (0, comparison.LESS)):
        [line] = comparison.lines(found(100_000), found(now))
        assert line[-1] == mark, line
    [line] = comparison.lines(found(0), found(1))
    assert line[-1] == comparison.MORE


def test_the_report_says_how_many_rounds_there_were():
    found = [
        rows.measured("B9", "case", "ours", disk.SYNCED, "s", [0.1, 0.3, 0.2]),
        rows.count("B9", "case", "ours", merge.NOT_NEAREST, "elements", 0),
    ]
    assert [line[report.HEAD.index("rounds")] for line in report.lines_of("B9", found)] == ["3", "-"]


@pytest.mark.parametrize("file", ("quantized.py", "gradients.py"))
def test_a_benchmark_without_words_says_what_to_give_it(file):
    done = subprocess.run([sys.executable, HERE.parent / "benchmarks" / file], capture_output=True, text=True)
    assert done.returncode == 2 and "error: " in done.stderr.splitlines()[-1] and not done.stdout


def test_every_metric_has_a_plot(tmp_path):
    lines = [rows.count("B14", f"layers {n}", "ours", growth.OPERATIONS, "operations", 10.0 * n) for n in (1, 2)]
    bars = [rows.count("B13", "8 adapters, h1", name, many.COUNT, "operations", 0) for name in ("ours", many.LOOP)]
    times = [rows.measured("B13", "8 adapters, h1", "ours", many.METRIC, "s", [0.1, 0.2])]
    assert report.plot(tmp_path, [*lines, *bars, *times]).keys() == {"B13", "B14"}


def test_a_merge_keeps_to_its_target(tmp_path):
    size = merge.size_of(TRY)
    merge.make_model(tmp_path / "model", size)
    merge.make_adapter(tmp_path / "adapter", size)
    merge.ours(tmp_path, tmp_path / "ours")()
    found = [rows.count("B9", "tiny", "ours", merge.NOT_NEAREST, "elements", merge.not_nearest(tmp_path, size))]
    assert verdict_of(merge.NOT_NEAREST, found).verdict == targets.MET


def test_the_nearest_element_is_known():
    x = torch.tensor([1.0, 1.0, -1.0, 0.0, 3.0]).bfloat16()
    exact = torch.tensor([1.0 + 2**-9, 1.0 + 2**-7, -1.0 + 2**-10, 0.0, 3.0], dtype=torch.float64)
    assert merge.nearest(x, exact).tolist() == [True, False, True, True, True]


def test_a_suite_that_is_none_is_one_sentence(capsys):
    for words, told in (
        (["--suite", "B3,B99"], "there is no suite B99"),
        (["--rounds", "3"], "at least 15 are needed"),
        (["--rounds", "many"], "argument --rounds: is many, expected an integer of at least 1"),
        (["--threads", "0"], "argument --threads: is 0, expected an integer of at least 1"),
        (["--compare", "none.jsonl"], "none.jsonl: holds no rows of the benchmarks"),
        (["--compare", __file__], "test_benchmarks.py: holds no rows of the benchmarks"),
        (["--nxd", "."], "is no checkout with src/neuronx_distributed in it"),
        (["--xla-python", "/nowhere/python"], "which is no interpreter that has torch_xla"),
        (["--xla-python", "true"], "which is no interpreter that has torch_xla"),
        (["--compare", os.devnull], "holds no rows of the benchmarks"),
        (["--output", __file__], "test_benchmarks.py: takes no files (File exists); name another directory."),
    ):
        with pytest.raises(SystemExit):
            command.main(words)
        *usage, said = capsys.readouterr().err.splitlines()
        assert told in said and all("error" not in line for line in usage), said


def test_a_device_that_is_not_here_is_one_sentence(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        command.main(["--backend", "cuda"])
    assert "--backend is cuda, whose device torch does not find here; expected cpu" in capsys.readouterr().err
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        command.main([])
    assert "matplotlib: is not installed" in capsys.readouterr().err


def test_help_says_what_each_suite_measures(capsys):
    with pytest.raises(SystemExit):
        command.main(["--help"])
    told = capsys.readouterr().out
    assert all(
        re.search(f"^  {name} +{re.escape(suite.title)}$", told, re.MULTILINE) for name, suite in suites.SUITES.items()
    )


def test_a_run_that_is_stopped_keeps_its_rows(tmp_path, monkeypatch, capsys):
    def stopped(case, options):
        raise KeyboardInterrupt

    monkeypatch.setitem(suites.SUITES, "B4", replace(suites.SUITES["B4"], run=stopped))
    threads = torch.get_num_threads()
    with pytest.raises(SystemExit, match=r"^Stopped; .*rows.jsonl has what was measured\.$"):
        command.main(["--tiny", "--rounds", "2", "--suite", "B7, B4", "--output", str(tmp_path)])
    torch.set_num_threads(threads)
    assert {row.suite for row in rows.read(tmp_path / rows.FILE)} == {"B7"}
