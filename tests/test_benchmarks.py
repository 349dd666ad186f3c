"""Do the benchmarks that need no clock still hold? Counts of a step, and gradients beside NxD's and Optimum Neuron's.

The latter as test_nxd; where LORA_FN_OPTIMUM names no checkout of Optimum Neuron, its rows are left out.
"""

import os
import re
import subprocess
import sys
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

from benchmarks import __main__ as command
from benchmarks import communication, flops, operations, report, rows, saved, steps, targets
from benchmarks.options import Options
from benchmarks.programs import H512, PROGRAMS, TINY, Program, Setup

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
    "B1": ("extra collectives per microbatch, whole model at TP 2", "collectives of a step's sync"),
    "B6": ("LoRA FLOPs, over the analytic count",),
    "B7": ("extra ATen operations for each adapted linear",),
}


def count_communication(mesh, directory):
    return [row for case in communication.CASES for row in communication.counted(mesh, directory, TINY, case)]


def communication_rows(tmp_path):
    communication.make(tmp_path / "model", TINY)
    first, second = pool(2).run(count_communication, tmp_path / "model")
    assert [replace(row, note="") for row in first] == [replace(row, note="") for row in second]
    return first


def of_suite(suite):
    return lambda tmp_path: [row for case in suite.cases(TRY) for row in suite.run(case, TRY)]


COUNTED = {"B1": communication_rows, "B3": of_suite(saved), "B6": of_suite(flops), "B7": of_suite(operations)}


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


def test_bytes_saved_keep_to_the_targets():
    """At a size where what is of a linear layer's size weighs more than what has the rank."""
    setup = Setup(shape=replace(H512, layers=1), dtype="bfloat16")
    names = ("frozen", "ours", saved.AGAIN)
    found = [
        rows.count("B3", str(setup), name, saved.METRIC, saved.UNIT, saved.saved(saved.programs()[name](setup)))
        for name in names
    ]
    for what in ("bytes saved for the backward, bf16, over the frozen model's", "the same with recompute"):
        assert verdict_of(what, found).verdict == targets.MET, verdict_of(what, found)


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
    made = {"right": PROGRAMS["ours"], "ours": wrong, "stops": stops}
    right, refused, stopped = steps.time_programs(setup, made, TRY)
    assert right.minimum and right.rounds == TRY.rounds
    assert refused.minimum is refused.median is stopped.minimum is None
    assert re.fullmatch(
        r"not measured: .* (is off by|rounding error is) .*; nothing is timed that is wrong", refused.note
    )
    assert stopped.note == "not measured: NotImplementedError: not written"
    everywhere = [replace(right, program=name) for name in ("PEFT", "frozen")]
    assert verdict_of("step time, over stock PEFT's", [*everywhere, refused]).verdict == rows.NOT_MEASURED


def test_a_loss_without_gradients_is_wrong():
    setup = Setup(shape=TINY, rank=4)
    program = PROGRAMS["ours"](setup)
    forgets = Program(model=program.model, trained={}, inputs=program.inputs)
    [row] = steps.time_programs(setup, {"ours": lambda setup: forgets}, TRY)
    assert row.minimum is None and "has no gradient" in row.note


def verdict_of(what, found):
    [verdict] = [verdict for verdict in targets.judge(found) if verdict.target.what == what]
    return verdict


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
    words = ["--tiny", "--rounds", "2", "--threads", "1", "--suite", "B3,B6,B8", "--output", str(tmp_path)]
    command.main(words)
    torch.set_num_threads(threads)
    told = capsys.readouterr().out
    assert "commit: " in told and "load average" in told
    assert {path.name for path in tmp_path.iterdir()} == {"rows.jsonl", "table.md", "report.html", "B3.png", "B6.png"}
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert page.count("data:image/png;base64,") == 2
    assert not re.search(r"""(?:src|href)=["'](?!data:)|@import|url\(|<script""", page)
    markdown = (tmp_path / "table.md").read_text(encoding="utf-8")
    for target in targets.TARGETS:
        assert f"| {target.what} |" in markdown
    assert "not measured: the harness has no such suite yet" in markdown
    found = rows.read(tmp_path / "rows.jsonl")
    assert {row.suite for row in found} == {"B3", "B6", "B8"}
    assert report.table(found, {}).split("## Environment")[0] == markdown.split("## Environment")[0]


def test_a_suite_that_is_none_is_one_sentence(capsys):
    for words, told in (
        (["--suite", "B3,B99"], "there is no suite B99"),
        (["--rounds", "3"], "at least 15 are needed"),
    ):
        with pytest.raises(SystemExit):
            command.main(words)
        assert told in capsys.readouterr().err
