"""Every block of README.md runs, and every option that it names exists."""

import re
from pathlib import Path

import pytest
import torch
from pool import pool
from small_models import small_models_fixture  # noqa: F401  (a fixture)

from adapters import cli

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```", README, re.DOTALL | re.MULTILINE)
OF_TWO_PROCESSES = re.findall(r"^```python torchrun\n(.*?)^```", README, re.DOTALL | re.MULTILINE)


def test_there_are_blocks() -> None:
    assert len(BLOCKS) >= 5 and len(OF_TWO_PROCESSES) == 1


@pytest.mark.parametrize("block", BLOCKS)
def test_block_runs(block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(block, "README.md", "exec"), {})


def run_block(mesh, block: str, model: str) -> dict[str, torch.Tensor]:
    """A block on one of two processes, which are on a mesh already: the gradients that it leaves."""
    told = {"ids": torch.arange(1, 15).view(1, -1)}
    exec(compile(block.replace("path/to/llama", model), "README.md", "exec"), told)
    return {name: p.grad for name, p in told["model"].named_parameters() if p.grad is not None}


def test_block_of_two_processes(small_models) -> None:
    first, second = pool(2).run(run_block, OF_TWO_PROCESSES[0], small_models["llama"])
    assert first and first.keys() == second.keys()
    whole = [name for name in first if name.endswith("q_proj.lora_A")]
    assert whole and all(torch.equal(first[name], second[name]) for name in whole)


OPTIONS = sorted(set(re.findall(r"(?<!\S)--[a-z-]+", README)) - {"--nnodes", "--nproc-per-node"})


@pytest.mark.parametrize("option", OPTIONS)
def test_option_exists(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    told = ""
    for command in ("finetune", "generate", "merge", "extract", "combine", "consolidate", "shard", "reshard", "cost"):
        with pytest.raises(SystemExit):
            cli.main([command, "--help"])
        told += capsys.readouterr().out
    assert option in told
