"""Does code written for Optimum Neuron's PEFT run on its own training models, after another import?

As test_optimum, in the processes of a program.
"""

import json
import os
import subprocess

import pytest
from test_nxd import HERE, NXD, PYTHON, wrong
from test_optimum import OPTIMUM, needs_optimum


@pytest.fixture(scope="module", name="ran")
def ran_fixture(tmp_path_factory):
    """What the program found: run once, on two processes."""
    directory = tmp_path_factory.mktemp("optimum_front")
    paths = [str(HERE.parent), f"{NXD}/src", str(OPTIMUM)]
    done = subprocess.run(
        [
            *(PYTHON, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"),
            *(HERE / "optimum_front.py", directory),
        ],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return json.loads((directory / "results.json").read_text())


@needs_optimum
def test_their_users_code_gives_what_stock_peft_gives(ran):
    models = ("Llama", "Llama, copies, fused", "Granite", "Qwen3")
    assert sorted(ran) == sorted([*models, *(f"{name}, sequence parallel" for name in models)])
    assert wrong(ran, 2) == {}
    assert all(len(checks) == 16 for checks in ran.values())
