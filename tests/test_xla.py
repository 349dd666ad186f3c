"""What does XLA see? The communication in the graphs, and how many graphs there are, on torch_xla's CPU devices."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from xla_graphs import communication

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


def started(script, *arguments):
    """Run a script of this directory; torch_xla reads its environment once, so it has a process of its own."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(HERE.parent), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(
        [sys.executable, HERE / script, *arguments], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def graphs(tmp_path_factory):
    """What each of four devices on a 2 x 2 mesh traced."""
    output = tmp_path_factory.mktemp("xla") / "graphs"
    started("xla_graphs.py", str(output))
    return [json.loads(output.with_name(f"graphs.{rank}").read_text()) for rank in range(4)]


@pytest.mark.parametrize("first", ("column", "qkv"))
@pytest.mark.parametrize("sequence_dim", BASE)
def test_a_pair_communicates_over_its_own_groups(first, sequence_dim, graphs):
    assert graphs[0]["found"][f"{first}, base, {sequence_dim}"] == BASE[sequence_dim]


@pytest.mark.parametrize("first", ("column", "qkv"))
@pytest.mark.parametrize("sequence_dim", BASE)
def test_an_adapter_adds_the_sync_alone(first, sequence_dim, graphs):
    sync = [["all-reduce", TP], ["all-reduce", DP]]
    assert graphs[0]["found"][f"{first}, adapted, {sequence_dim}"] == BASE[sequence_dim] + sync


@pytest.mark.parametrize("groups", (TP, "{}", "[2,2]<=[4]"))
def test_collectives_are_found_whatever_their_groups(groups):
    line = f"  %a.1 = f32[4]{{0}} all-reduce(f32[4]{{0}} %p.1), replica_groups={groups}, to_apply=%add.1"
    assert communication(line) == [["all-reduce", groups]]


def test_every_process_traces_the_same_graphs(graphs):
    assert all(each["texts"] == graphs[0]["texts"] for each in graphs)


def test_twenty_steps_are_one_graph():
    told = json.loads(started("xla_steps.py").splitlines()[-1])
    assert 0 < told["compilations after two steps"] == told["compilations after twenty"]
    assert told["losses"][-1] < told["losses"][0] and len(set(told["keys"])) == 20
