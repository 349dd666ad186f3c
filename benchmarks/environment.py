"""Where was it measured? Versions, processor, load: what a number says little without."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from datetime import datetime, timezone
from pathlib import Path

import torch

from benchmarks.options import Options

PACKAGES = ("torch", "transformers", "peft", "lora-fn", "numpy", "safetensors")
OF_XLA = ("torch_xla", "torch-neuronx", "neuronx-cc", "neuronx-distributed")
FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")


def environment(options: Options) -> dict[str, str]:
    """What to print, in order."""
    devices = {"cuda": torch.cuda.get_device_name, "xla": lambda: options.backend}
    packages = (*PACKAGES, *OF_XLA) if options.device == "xla" else PACKAGES
    return {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": _commit(),
        "Python": platform.python_version(),
        **{name: _version(name) for name in packages},
        "system": f"{platform.system()} {platform.machine()}",
        "processor": _processor("model name"),
        "of its flags": ", ".join(flag for flag in FLAGS if flag in _processor("flags").split()) or "none of interest",
        "cores": str(os.cpu_count()),
        "accelerator": devices.get(options.device, lambda: "none")(),
        "threads of one process": str(options.threads),
        "rounds": str(options.rounds),
        "load average at the start": ", ".join(f"{load:.2f}" for load in os.getloadavg()),
    }


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _commit() -> str:
    def git(*words: str) -> str:
        done = subprocess.run(["git", *words], cwd=Path(__file__).parent, capture_output=True, text=True)
        return done.stdout.strip()

    try:
        return (
            f"{git('rev-parse', '--short', 'HEAD') or 'unknown'}{' with changes' * bool(git('status', '--porcelain'))}"
        )
    except OSError:
        return "unknown"


def _processor(key: str) -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(key)), "unknown")
