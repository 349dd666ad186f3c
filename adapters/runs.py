"""What does a run leave on disk? Its job, its log, its checkpoints, its loss curve.

    OUTPUT/run.json                  the job, and what its result depends on
    OUTPUT/log.jsonl                 a line per logged step and evaluation
    OUTPUT/loss.png                  the loss curve
    OUTPUT/checkpoints/step-N/       state.json, and tp-I.safetensors of each process along "tp"
    OUTPUT/adapter_model.safetensors, adapter_config.json   the result, a PEFT directory

A checkpoint is written beside and renamed when it is whole; older ones are removed only then. So a kill at any moment
leaves the last whole checkpoint, or the one before.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import json
import os
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from adapters import bind
from lora_fn import Axis, FileError, checkpoint
from lora_fn.checkpoint import TensorFiles

FORMAT = 1
JOB = "run.json"
LOG = "log.jsonl"
PLOT = "loss.png"
STATE = "state.json"
LOCK = ".lock"
CHECKPOINTS = "checkpoints"
PARTIAL = ".*.partial"
MOMENTS = ("exp_avg", "exp_avg_sq")
GO_BACK = "remove this checkpoint, and resume from the one before."
WAIT = 10.0  # seconds that a resumed run waits for the processes of a killed one to be gone


class Run:
    """One run's directory; a context that holds it from `begin` to its end.

    Args:
        directory: Its place.
    """

    def __init__(self, directory: Path):
        self.directory = directory
        self.checkpoints = directory / CHECKPOINTS
        self._held = ExitStack()

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *exception: object) -> None:
        self._held.close()

    def check(self, job: Mapping[str, Any], *, free: Sequence[str], resume: bool) -> None:
        """Refuse an output that is not ours, or holds another job; nothing is written.

        Raises:
            FileError: Something else is there; a run is there and `resume` is not set, or it is another job; nothing is
                there to resume.
        """
        checkpoint.check_above(self.directory)
        ours = (self.directory / JOB).is_file()
        if self.directory.exists() and not self.directory.is_dir():
            raise FileError(f"{self.directory}: is a file; choose a directory.")
        if self.directory.is_dir() and not ours and not all(map(_is_begun, self.directory.iterdir())):
            raise FileError(f"{self.directory}: exists and was not made by lora-fn finetune; choose another --output.")
        if not resume:
            if ours:
                raise FileError(f"{self.directory}: holds a run already; use --resume, or choose another --output.")
            return
        if not ours:
            raise FileError(f"{self.directory}: holds no run to resume; leave --resume out to start one.")
        before = checkpoint.read_json(self.directory / JOB).get("job", {})
        changed = sorted(k for k in {*before, *job} - {*free} if before.get(k) != job.get(k))
        if "tp" in changed:
            raise FileError(
                f"{self.directory}: its checkpoints were made with --tp {before.get('tp')}, not {job.get('tp')}; "
                f"resume with --tp {before.get('tp')} (checkpoints cannot be cut anew yet)."
            )
        if changed:
            told = ", ".join(f"{k} {before.get(k)!r} -> {job.get(k)!r}" for k in changed)
            raise FileError(
                f"{self.directory}: the job is another than the one to resume ({told}); give the same options."
            )

    def begin(self, job: Mapping[str, Any], facts: Mapping[str, str], *, resume: bool) -> None:
        """Take the directory for this run (one process only).

        Raises:
            FileError: Another run is using it, or its data or layers changed since.
        """
        self.directory.mkdir(parents=True, exist_ok=True)
        lock = self._held.enter_context((self.directory / LOCK).open("w"))
        give_up = time.monotonic() + WAIT
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as error:
                if time.monotonic() > give_up:
                    raise FileError(f"{self.directory}: another run is using it; wait for it, or end it.") from error
                time.sleep(0.1)
        if resume:
            before = checkpoint.read_json(self.directory / JOB).get("facts", {})
            for name in facts:
                if before.get(name) != _digest(facts[name]):
                    raise FileError(
                        f"{self.directory}: the {name} changed since the run began; resume with the same {name}."
                    )
        self.checkpoints.mkdir(exist_ok=True)
        for left in [*self.directory.glob(PARTIAL), *self.checkpoints.glob(PARTIAL)]:
            checkpoint.remove(left)
        if not resume:
            checkpoint.write_json(
                self.directory / JOB, {"job": job, "facts": {k: _digest(v) for k, v in facts.items()}}
            )

    def last(self) -> Path | None:
        """The newest whole checkpoint."""
        whole = sorted(p for p in self.checkpoints.glob("step-*") if (p / STATE).is_file())
        return whole[-1] if whole else None


def _is_begun(path: Path) -> bool:
    """Whether a file is all that a run left which was killed before it wrote `run.json`."""
    return path.name in (LOCK, CHECKPOINTS) or path.match(PARTIAL)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _digest_of(file: Path) -> str:
    digest = hashlib.sha256()
    with open(file, "rb") as content:
        while piece := content.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def store(
    run: Run,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    facts: Mapping[str, str],
    *,
    step: int,
    tp: Axis,
    dp: Axis,
    keep: int,
) -> None:
    """Write a checkpoint; every process calls it, and those of the first "dp" place write.

    Args:
        run: The run.
        model: Its factors are stored.
        optimizer: Its moments are.
        facts: What the checkpoint must fit.
        step: Steps done.
        tp, dp: The axes.
        keep: How many checkpoints stay.
    """
    place = run.checkpoints / _place(step)
    beside = place.with_name(f".{place.name}.partial")
    first = (tp.index or 0) == 0 and (dp.index or 0) == 0
    if first:
        checkpoint.remove(beside)
        beside.mkdir()
    _barrier()
    if (dp.index or 0) == 0:
        checkpoint.write_tensors(beside / _file(tp), _tensors(model, optimizer))
    _barrier()
    if first:
        state = {"format": FORMAT, "step": step, "tp": tp.size, "facts": {k: _digest(v) for k, v in facts.items()}}
        layers = {path: json.loads(spec.to_json()) for path, spec in bind.specs(model).items()}
        digests = {file.name: _digest_of(file) for file in sorted(beside.iterdir())}
        checkpoint.write_json(beside / STATE, state | {"layers": layers, "sha256": digests})
        checkpoint.remove(place)
        os.replace(beside, place)
        checkpoint.flush(run.checkpoints)
        for old in sorted(run.checkpoints.glob("step-*"))[:-keep]:
            hidden = old.with_name(f".{old.name}.partial")
            os.replace(old, hidden)
            checkpoint.remove(hidden)
    _barrier()


def restore(run: Run, model: nn.Module, optimizer: torch.optim.Optimizer, facts: Mapping[str, str]) -> int:
    """Fill a model and its optimizer from the newest checkpoint.

    Returns:
        Steps done; 0 where there is no checkpoint yet.

    Raises:
        FileError: A checkpoint that is damaged, or of another run.
    """
    place = run.last()
    if place is None:
        return 0
    state = checkpoint.read_json(place / STATE)
    layers = bind.layers(model)
    tp = next(iter(layers.values())).spec.axis
    if state.get("format") != FORMAT or state.get("tp") != tp.size:
        raise FileError(
            f"{place}: has format {state.get('format')} and tp {state.get('tp')}, expected {FORMAT} and {tp.size}; "
            f"resume with the version and --tp that wrote it."
        )
    if state.get("facts") != {k: _digest(v) for k, v in facts.items()}:
        raise FileError(f"{place}: belongs to another run (other data or layers); resume the run that wrote it.")
    if place.name != _place(state.get("step")):
        raise FileError(f"{place}: its {STATE} tells of step {state.get('step')}; {GO_BACK}")
    stored = TensorFiles([place / _file(tp)])
    if state.get("sha256", {}).get(_file(tp)) != _digest_of(place / _file(tp)):
        raise FileError(f"{place / _file(tp)}: is not what was written (its SHA-256 differs); {GO_BACK}")
    expected = {name: tuple(t.shape) for name, t in _tensors(model, optimizer, empty=True).items()}
    if stored.shapes != expected:
        odd = sorted(set(stored.shapes.items()) ^ set(expected.items()))[0][0]
        raise FileError(f"{place / _file(tp)}: tensor {odd!r} is missing, unexpected or misshapen; {GO_BACK}")
    with torch.no_grad():
        for name, p in bind.flat(bind.factors(model)).items():
            p.copy_(stored.read(f"factor/{name}"))
            state_of = optimizer.state[p]
            state_of["step"] = stored.read("step").clone()
            for moment in MOMENTS:
                state_of[moment] = stored.read(f"{moment}/{name}").to(p.device, copy=True)
    return int(state["step"])


def _place(step: Any) -> str:
    return f"step-{step:09d}" if isinstance(step, int) else "unknown"


def _file(tp: Axis) -> str:
    return f"tp-{tp.index or 0:05d}-of-{tp.size:05d}.safetensors"


def _tensors(model: nn.Module, optimizer: torch.optim.Optimizer, *, empty: bool = False) -> dict[str, Tensor]:
    """The names and tensors of a checkpoint; `empty` gives the shapes before the first step."""
    tensors: dict[str, Tensor] = {"step": torch.zeros(())}
    for name, p in bind.flat(bind.factors(model)).items():
        tensors[f"factor/{name}"] = p
        for moment in MOMENTS:
            tensors[f"{moment}/{name}"] = p if empty else optimizer.state[p][moment]  # type: ignore[index]
        if not empty:
            tensors["step"] = optimizer.state[p]["step"]  # type: ignore[index]
    return tensors


def _barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


class Log:
    """`log.jsonl`, one line per event; the first process writes it.

    Args:
        run: The run.
        kept: The lines that stay, of a run that is resumed.
    """

    def __init__(self, run: Run, kept: Sequence[Mapping[str, Any]]):
        self.path = run.directory / LOG
        with checkpoint.replacing(self.path) as beside:
            beside.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")

    def write(self, line: Mapping[str, Any]) -> None:
        """Add a line."""
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def kept_log(run: Run, *, start: int, steps: int) -> list[dict[str, Any]]:
    """The lines of a log that a run goes on from after `start` of its `steps`; the rest will be written again."""
    lines = read_log(run.directory / LOG) if start else []
    return [line for line in lines if line["step"] <= start and (line["kind"], line["step"]) != ("eval", steps)]


def logged(lines: Sequence[Mapping[str, Any]], kind: str) -> list[Any]:
    """The losses of the lines of a kind, in their order."""
    return [line["loss"] for line in lines if line["kind"] == kind]


def read_log(path: Path) -> list[dict[str, Any]]:
    """The lines of a log; a last line that a kill cut off is left out."""
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return lines


class Progress:
    """A progress bar with loss, learning rate and tokens per second.

    Args:
        total: Steps of the run.
        start: Steps done before.
        disable: Show nothing.
    """

    def __init__(self, *, total: int, start: int, disable: bool):
        from tqdm import tqdm

        self._bar = tqdm(total=total, initial=start, disable=disable, unit="step", desc="finetune")
        self._since = (start, time.perf_counter())
        self._shown = start

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.close()

    def rate(self, done: int, tokens: int) -> float:
        """Tokens per second since the last call, at `tokens` per step."""
        steps, now = done - self._since[0], time.perf_counter()
        seconds = now - self._since[1]
        self._since = (done, now)
        return round(steps * tokens / max(seconds, 1e-9), 1)

    def show(self, done: int, line: Mapping[str, Any]) -> None:
        """Move the bar to `done` steps."""
        self._bar.update(done - self._shown)
        self._shown = done
        self._bar.set_postfix_str(f"loss {line['loss']:.4f}, lr {line['lr']:.2e}")


def plot(run: Run, *, title: str) -> Path | None:
    """Draw the loss curve as a PNG; None where matplotlib is missing."""
    if importlib.util.find_spec("matplotlib") is None:
        return None
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    lines = read_log(run.directory / LOG)
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for kind, label, style in (("train", "training", {"alpha": 0.7}), ("eval", "held out", {"marker": "o"})):
        points = [(line["step"], line["loss"]) for line in lines if line["kind"] == kind and line["loss"] is not None]
        if points:
            axes.plot(*zip(*points, strict=True), label=label, **style)
    axes.set(xlabel="optimizer step", ylabel="loss (nats per token)", title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    place = run.directory / PLOT
    with checkpoint.replacing(place) as beside:
        figure.savefig(beside, dpi=150, format="png")
    plt.close(figure)
    return place
