"""Do the benchmarks that need no clock still hold? Gradients beside those of NxD's own LoRA and of Optimum Neuron's.

As test_nxd; where LORA_FN_OPTIMUM names no checkout of Optimum Neuron, its rows are left out.
"""

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from test_nxd import BF16, FP32, HERE, NXD, PYTHON, needs_nxd

sys.path.insert(0, str(HERE.parent / "benchmarks"))
import gradients

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
