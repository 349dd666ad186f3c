"""What does it cost to begin? To attach an adapter, to load one, to swap it for another; and to import what does that.

What attaches and loads is first seen to be right: with a file of stock PEFT's, it gives the logits that PEFT gives. An
import is timed in processes of their own, which find modules compiled to bytecode, as installed ones are.
"""

from __future__ import annotations

import functools
import math
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import apart, rows, timing
from benchmarks.options import Options
from benchmarks.programs import LINEARS, TINY, Setup, Shape, batch, llama

ATTACH, LOAD, SWAP = "time to attach", "time to load", "time to swap"
IMPORT, MEMORY = "time of the import", "memory after the import"
RAW, SEALED = "raw read", "ours, of a file with our checksum"
NARROW = Shape(hidden=64, layers=32, tokens=16)
WIDE = Shape(hidden=1024, layers=8, tokens=16, heads=16, key_value_heads=8)
NAMES = ("one", "other")  # of the adapters that are swapped


# ------------------------------------------------------------------------------------------- attach, load and swap


def setups(options: Options) -> dict[str, tuple[str, Setup]]:
    """Case -> metric, and what is measured."""
    narrow, wide, device = (TINY, TINY, options.device) if options.tiny else (NARROW, WIDE, options.device)
    large = Setup(shape=narrow, rank=8, device=device)
    half = replace(large, shape=replace(narrow, layers=max(1, narrow.layers // 2)))
    files = [Setup(shape=wide, rank=32, device=device), *([] if options.quick or options.tiny else [large])]
    found = [*((ATTACH, setup) for setup in (large, half)), *((LOAD, setup) for setup in files), (SWAP, large)]
    return {_case(metric, setup): (metric, setup) for metric, setup in found}


def _case(metric: str, setup: Setup) -> str:
    linears = setup.shape.layers * len(LINEARS)
    return f"{metric.removeprefix('time to ')}, {linears} linears h{setup.shape.hidden} r{setup.rank}"


def cases(options: Options) -> list[str]:
    """Their names."""
    return list(setups(options))


def run(case: str, options: Options) -> Iterable[rows.Row]:
    """The rows of a case; none with a number where ours gives other logits than stock PEFT."""
    metric, setup = setups(options)[case]
    with tempfile.TemporaryDirectory() as place:
        directories = [made(setup, Path(place) / name, seed) for seed, name in enumerate(NAMES)]
        steps, undo, note = PROGRAMS[metric](setup, directories)

        def between() -> None:
            for each in undo.values():
                each()

        seconds = timing.interleaved(steps, options.rounds, between=between, wait=options.wait)
    for name, samples in seconds.items():
        yield rows.measured("B11", case, name, metric, "s", samples, backend=options.backend, note=note)


def made(setup: Setup, directory: Path, seed: int) -> Path:
    """An adapter that stock PEFT has written, both factors filled."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    config = LoraConfig(r=setup.rank, lora_alpha=setup.alpha, target_modules=list(LINEARS), init_lora_weights=False)
    get_peft_model(llama(setup), config).save_pretrained(directory)
    return directory


Steps = dict[str, Callable[[], object]]
Made = tuple[Steps, Steps, str]  # what is timed; what is called before each; what was checked


def attaching(setup: Setup, directories: list[Path]) -> Made:
    """A new adapter each time, on a model that has none."""
    from peft import LoraConfig, get_peft_model

    import adapters
    from adapters import bind

    note = check(setup, directories)
    spec, config = adapters.read_spec(directories[0]), LoraConfig.from_pretrained(directories[0])
    config.inference_mode = False
    ours, theirs, held = llama(setup), llama(setup), dict[str, Any]()

    def wrap() -> None:
        adapters.wrap(ours, spec)
        held["ours"] = True

    def peft() -> None:
        held["PEFT"] = get_peft_model(theirs, config)

    def bare() -> None:
        if held.pop("ours", False):
            bind.detach(ours)

    def unload() -> None:
        if "PEFT" in held:
            held.pop("PEFT").unload()

    return {"ours": wrap, "PEFT": peft}, {"ours": bare, "PEFT": unload}, note


def loading(setup: Setup, directories: list[Path]) -> Made:
    """A file into an adapter that is there; to PEFT, into one that it makes for it, and that is deleted again."""
    from safetensors.torch import load_file

    import adapters

    note = check(setup, directories)
    first = directories[0]
    ours, theirs = wrapped(setup, first), stock(setup, directories[1])
    sealed, file = first.with_name("sealed"), first / "adapter_model.safetensors"
    adapters.load(ours, first)
    adapters.save(ours, sealed)
    targets = [torch.empty_like(t, device=setup.device) for t in load_file(file).values()]

    def raw() -> None:
        for target, t in zip(targets, load_file(file).values(), strict=True):
            target.copy_(t)

    def forget() -> None:
        if "loaded" in theirs.peft_config:
            theirs.delete_adapter("loaded")

    steps: Steps = {
        "ours": lambda: adapters.load(ours, first),
        SEALED: lambda: adapters.load(ours, sealed),
        "PEFT": lambda: theirs.load_adapter(first, "loaded"),
        RAW: raw,
    }
    megabytes = f"{file.stat().st_size / 1e6:.1f} MB in {len(targets)} tensors"
    return steps, {"PEFT": forget}, f"{megabytes}; {note}"


def swapping(setup: Setup, directories: list[Path]) -> Made:
    """One of two adapters that are there. In the functional form it is the choice of a dict, which the next call of
    `torch.func.functional_call(model, chosen, ...)` takes; in the form of PEFT's users, `set_adapter`."""
    from adapters import peft as front

    note = check(setup, directories)
    theirs, shaped = stock(setup, *directories), front.PeftModel.from_pretrained(llama(setup), directories[0], NAMES[0])
    shaped.load_adapter(directories[1], NAMES[1])
    model = wrapped(setup, directories[0])
    sets = {name: functional(model, directory) for name, directory in zip(NAMES, directories, strict=True)}
    for name in NAMES:
        theirs.set_adapter(name)
        shaped.set_adapter(name)
        chosen = logits(functools.partial(called, model, sets[name]), setup)
        for other in (chosen, logits(shaped, setup)):
            timing.check_exact({name: other}, {name: logits(theirs, setup)}, timing.FP32)
    turns = {program: alternating() for program in ("ours", "ours, set_adapter", "PEFT, set_adapter")}
    held = dict[str, Mapping[str, Tensor]]()

    def choose() -> None:
        held["chosen"] = sets[next(turns["ours"])]

    steps: Steps = {
        "ours": choose,
        "ours, set_adapter": lambda: shaped.set_adapter(next(turns["ours, set_adapter"])),
        "PEFT, set_adapter": lambda: theirs.set_adapter(next(turns["PEFT, set_adapter"])),
    }
    return steps, {}, note


PROGRAMS: Mapping[str, Callable[[Setup, list[Path]], Made]] = {ATTACH: attaching, LOAD: loading, SWAP: swapping}


def alternating() -> Iterator[str]:
    """The other one, each time."""
    while True:
        yield from reversed(NAMES)


def wrapped(setup: Setup, directory: Path) -> nn.Module:
    """Ours, with an adapter as a directory's, not loaded."""
    import adapters

    return adapters.wrap(llama(setup), adapters.read_spec(directory)).eval()


def stock(setup: Setup, *directories: Path) -> Any:
    """Stock PEFT, with adapters."""
    from peft import PeftModel

    model = PeftModel.from_pretrained(llama(setup), directories[0], NAMES[0])
    for name, directory in zip(NAMES[1:], directories[1:], strict=False):
        model.load_adapter(directory, name)
    return model.eval()


def functional(model: nn.Module, directory: Path) -> dict[str, Tensor]:
    """What a directory holds, as a dict that the model can be called with."""
    import adapters

    adapters.load(model, directory)
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def called(model: nn.Module, chosen: dict[str, Tensor], **inputs: Tensor) -> Any:
    """A model's forward, with the adapter of a dict."""
    return torch.func.functional_call(model, chosen, kwargs=inputs)


def logits(model: Callable[..., Any], setup: Setup) -> Tensor:
    """Of a batch."""
    with torch.no_grad():
        found: Tensor = model(inputs_embeds=batch(setup)["inputs_embeds"].detach()).logits
    return found


def check(setup: Setup, directories: list[Path]) -> str:
    """Refuse to time ours where it is not right, or where the adapter does nothing; say how right it is.

    Raises:
        Wrong: Other logits than stock PEFT's with the same file.
    """
    import adapters

    model = wrapped(setup, directories[0])
    before = logits(model, setup)
    adapters.load(model, directories[0])
    found, expected = logits(model, setup), logits(stock(setup, directories[0]), setup)
    off = timing.check_exact({"logits": found}, {"logits": expected}, timing.FP32)
    if timing.relative(before, expected) < 100 * timing.FP32:
        raise timing.Wrong("the adapter changes nothing")
    return f"off {off:.0e}"


# ---------------------------------------------------------------------------------------------------------- import

# Program -> what it imports. All have torch, of which ours is to be the smallest part.
IMPORTS: Mapping[str, str] = {
    "torch": "torch",
    "ours": "torch, lora_fn, adapters",
    "ours, lora_fn alone": "torch, lora_fn",
    "PEFT": "torch, peft",
}
QUICK_ROUNDS = 5
_SCRIPT = """
import json, pathlib, time
start = time.perf_counter()
import {words}
took = time.perf_counter() - start
lines = pathlib.Path("/proc/self/status").read_text().splitlines()
print(json.dumps([took, next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS:"))]))
"""


def import_cases(options: Options) -> list[str]:
    """The one there is."""
    return ["import in a fresh process"]


def run_import(case: str, options: Options) -> Iterable[rows.Row]:
    """The rows: time and memory of each import, in processes that take turns."""
    names = [name for name in IMPORTS if name != "PEFT" or not options.tiny]
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    rounds = min(options.rounds, QUICK_ROUNDS) if options.quick else options.rounds
    for number in range(rounds + 1):
        for name in names:
            sample = imported(IMPORTS[name])
            if number:  # the first compiles
                found[name].append(sample)
    for name in names:
        seconds, memory = zip(*found[name], strict=True)
        yield rows.measured("B12", case, name, IMPORT, "s", seconds)
        yield rows.measured("B12", case, name, MEMORY, "bytes", memory)


def imported(words: str) -> tuple[float, float]:
    """Seconds of an import, and bytes that the process has after it."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
    seconds, memory = apart.value(["-c", _SCRIPT.format(words=words)], environment=environment)
    return seconds, memory


def beyond_torch(metric: str) -> Callable[[Mapping[tuple[str, str, str, str], float]], dict[str, float]]:
    """Ours, less what torch alone takes."""

    def of(numbers: Mapping[tuple[str, str, str, str], float]) -> dict[str, float]:
        return {
            case: value - numbers.get((suite, case, "torch", metric), math.nan)
            for (suite, case, program, of_metric), value in numbers.items()
            if (suite, program, of_metric) == ("B12", "ours", metric)
        }

    return of
