"""Every block of docs/migration.md runs."""

import re
from pathlib import Path

import pytest
import torch
from pool import pool
from small_models import small_models_fixture  # noqa: F401  (a fixture)

PAGE = (Path(__file__).parent.parent / "docs/migration.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
OF_TWO_PROCESSES = re.findall(r"^```python torchrun\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)


def test_there_are_blocks() -> None:
    assert len(BLOCKS) == 1 and len(OF_TWO_PROCESSES) == 1


@pytest.mark.parametrize("block", BLOCKS)
def test_block_runs(block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(block, "migration.md", "exec"), {})
    assert (tmp_path / "out/other/adapter_model.safetensors").is_file()


def run_block(mesh, block: str, model: str, place: str) -> dict[str, torch.Tensor]:
    """A block on one of two processes: the gradients that it leaves."""
    told = {"ids": torch.arange(1, 15).view(1, -1), "mesh": mesh}
    block = block.replace("path/to/llama", model).replace('"out"', repr(place))
    exec(compile(block, "migration.md", "exec"), told)
    return {name: p.grad for name, p in told["model"].named_parameters() if p.grad is not None}


def test_block_of_two_processes(small_models, tmp_path: Path) -> None:
    first, second = pool(2).run(run_block, OF_TWO_PROCESSES[0], small_models["llama"], str(tmp_path / "out"))
    whole = [name for name in first if "lora_A" in name]
    assert whole and all(torch.equal(first[name], second[name]) for name in whole)
    assert (tmp_path / "out/adapter_model.safetensors").is_file()


@pytest.mark.parametrize("name", sorted(set(re.findall(r"\b(?:tests|docs)/[a-z_]+\.(?:py|md)", PAGE))))
def test_file_is_there(name: str) -> None:
    assert (Path(__file__).parent.parent / name).is_file()
