"""What does a run leave on disk? Its job, its log, its checkpoints, its loss curve.

    OUTPUT/run.json                  the job, and what its result depends on
    OUTPUT/log.jsonl                 a line per logged step and evaluation
    OUTPUT/loss.png                  the loss curve
    OUTPUT/checkpoints/step-N/       a sharded checkpoint (`lora_fn.manifest`): factors, moments, step
    OUTPUT/adapter_model.safetensors, adapter_config.json   the result, a PEFT directory

A checkpoint is copied to the host between two steps, and written by threads while training goes on: beside its place,
and renamed when it is whole; older ones are removed only then. So a kill at any moment leaves the last whole
checkpoint, or the one before.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import json
import math
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from adapters import bind, files, optimizers
from lora_fn import Axis, FileError, checkpoint, sharding
from lora_fn import manifest as manifests
from lora_fn.manifest import FACTOR, MOMENTS, Manifest, StoredFile, file_name, tensor_name
from lora_fn.manifest import NAME as MANIFEST

JOB = "run.json"
LOG = "log.jsonl"
PLOT = "loss.png"
LOCK = ".lock"
CHECKPOINTS = "checkpoints"
PARTIAL = ".*.partial"
REPORT = ".json"  # beside a process's file: what it wrote
WAIT = 10.0  # seconds that a resumed run waits for the processes of a killed one to be gone
RENDEZVOUS = 600.0  # seconds that the first process waits for the files of the others


class Run:
    """One run's directory; a context that holds it from `begin` to its end.

    Args:
        directory: Its place.
    """

    def __init__(self, directory: Path):
        self.directory = directory
        self.checkpoints = directory / CHECKPOINTS
        self._held = ExitStack()
        self._saving: _Saving | None = None

    def __enter__(self) -> Run:
        return self

    def __exit__(self, kind: object, *exception: object) -> None:
        try:
            self.settle()
        except FileError:
            if kind is None:
                raise
        finally:
            self._held.close()

    def check(self, job: Mapping[str, Any], *, free: Sequence[str], resume: bool) -> dict[str, Any]:
        """Refuse an output that is not ours, or holds another job; nothing is written.

        Returns:
            The job that began the run to be resumed; empty where nothing is.

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
            return {}
        if not ours:
            raise FileError(f"{self.directory}: holds no run to resume; leave --resume out to start one.")
        before = checkpoint.read_json(self.directory / JOB).get("job", {})
        changed = sorted(k for k in {*before, *job} - {*free} if before.get(k) != job.get(k))
        if changed:
            told = ", ".join(f"{k} {before.get(k)!r} -> {job.get(k)!r}" for k in changed)
            raise FileError(
                f"{self.directory}: the job is another than the one to resume ({told}); give the same options."
            )
        return dict(before)

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
        """The newest checkpoint."""
        whole = sorted(self.checkpoints.glob("step-*"))
        return whole[-1] if whole else None

    def begin_saving(self, write: Callable[[], None]) -> None:
        """Call `write` in a thread; `settle` waits for it."""
        assert self._saving is None
        self._saving = _Saving(write)
        self._saving.start()

    def settle(self) -> None:
        """Wait until the checkpoint that is being written is there.

        Raises:
            FileError: It could not be written.
        """
        saving = self._saving
        if saving is not None:
            saving.join()
            self._saving = None
            if saving.error is not None:
                raise saving.error


class _Saving(threading.Thread):
    """A thread that keeps the error that it ends with."""

    def __init__(self, write: Callable[[], None]):
        super().__init__(name="lora-fn checkpoint")
        self.write = write
        self.error: FileError | None = None

    def run(self) -> None:
        """Write."""
        try:
            self.write()
        except FileError as error:
            self.error = error
        except Exception as error:
            self.error = FileError(f"checkpoint: could not be written ({error}); make room, and resume.")


def _is_begun(path: Path) -> bool:
    """Whether a file is all that a run left which was killed before it wrote `run.json`."""
    return path.name in (LOCK, CHECKPOINTS) or path.match(PARTIAL)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """What one process adds to a checkpoint: copies, on the host, that training does not change any more.

    Args:
        manifest: What the checkpoint will be; its files are yet to be written.
        index: The process's place on the axis "tp".
        tensors: Name -> local tensor; empty on processes that do not write.
        is_first: Whether it is this process that finishes the checkpoint.
    """

    manifest: Manifest
    index: int
    tensors: Mapping[str, Tensor]
    is_first: bool


def take(
    run: Run,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    facts: Mapping[str, str],
    *,
    step: int,
    tp: Axis,
    dp: Axis,
) -> Snapshot:
    """Wait for the checkpoint before, and copy what is to be stored; every process calls it, and then `store`.

    Nobody may call `store` before all have done this, and without an error.

    Args:
        run: The run.
        model: Its factors are stored.
        optimizer: Its moments are.
        facts: What the checkpoint must fit.
        step: Steps done.
        tp, dp: The axes; the processes of the first "dp" place write.

    Raises:
        FileError: A number that is not finite, or the checkpoint before could not be written.
    """
    run.settle()
    writes, is_first = (dp.index or 0) == 0, (dp.index or 0) == 0 and (tp.index or 0) == 0
    state = optimizers.whole_state(optimizer, keep=writes)
    tensors = _tensors(model, state, MOMENTS if writes else ())
    _check_finite(run, step, tensors)
    specs = bind.specs(model)
    manifest = Manifest(
        config=files.config(model),
        specs=specs,
        tp=tp.size,
        stages=(tuple(specs),),
        kinds=(FACTOR, *MOMENTS),
        step=step,
        facts={name: _digest(text) for name, text in facts.items()},
    )
    if is_first:
        beside = _beside(run, step)
        checkpoint.remove(beside)
        beside.mkdir()
    copies = {name: t.detach().to("cpu", copy=True) for name, t in tensors.items()} if writes else {}
    return Snapshot(manifest=manifest, index=tp.index or 0, tensors=copies, is_first=is_first)


def store(run: Run, snapshot: Snapshot, *, keep: int) -> None:
    """Begin to write a checkpoint, and return; `Run.settle` waits for it.

    The processes write beside its place, each in a thread of its own, and tell what they wrote in a file; the first
    process waits for those, adds the manifest, renames the whole, and removes old checkpoints. There is no other
    communication, so the processes must see one file system.

    Args:
        run: The run.
        snapshot: From `take`.
        keep: How many checkpoints stay.
    """
    if snapshot.tensors:
        run.begin_saving(lambda: _write(run, snapshot, keep))


def _check_finite(run: Run, step: int, tensors: Mapping[str, Tensor]) -> None:
    # The largest tells of a NaN too, without a copy.
    finite = torch.stack(
        [torch.stack([t.amin(), t.amax()]).isfinite().all() for t in map(Tensor.detach, tensors.values())]
    )
    if not bool(finite.all()):
        name = [*tensors][finite.tolist().index(False)]
        raise FileError(
            f"{run.directory}: after step {step}, tensor {name!r} is not finite; nothing was written, and the "
            f"checkpoints before stay; start again with a lower --learning-rate."
        )


def _beside(run: Run, step: int) -> Path:
    return run.checkpoints / f".{_place(step)}.partial"


def _write(run: Run, snapshot: Snapshot, keep: int) -> None:
    """What the thread of one process does."""
    assert snapshot.manifest.step is not None
    beside = _beside(run, snapshot.manifest.step)
    report = beside / (file_name(snapshot.index, 0) + REPORT)
    try:
        _, stored = manifests.write_part(beside, snapshot.manifest, snapshot.index, 0, snapshot.tensors)
        checkpoint.write_json(report, asdict(stored))
    except Exception as error:
        with suppress(OSError):
            checkpoint.write_json(report, {"error": str(error)})
        raise
    if snapshot.is_first:
        _finish(run, snapshot.manifest, beside, keep)


def _finish(run: Run, manifest: Manifest, beside: Path, keep: int) -> None:
    """What the first process does when it has written its own file: wait for the others, and make it a checkpoint."""
    reports = {file_name(index, 0): beside / (file_name(index, 0) + REPORT) for index in range(manifest.tp)}
    give_up = time.monotonic() + RENDEZVOUS
    while late := [report for report in reports.values() if not report.is_file()]:
        if time.monotonic() > give_up:
            raise FileError(
                f"{late[0]}: did not come within {RENDEZVOUS:g} s; put --output where all processes see it."
            )
        time.sleep(0.01)
    told = {name: checkpoint.read_json(report) for name, report in reports.items()}
    for name, of in told.items():
        if "error" in of:
            raise FileError(f"{beside / name}: could not be written ({of['error']}); make room, and resume.")
    for report in reports.values():
        report.unlink()
    manifests.write(beside, replace(manifest, files={name: StoredFile(**of) for name, of in told.items()}))
    place = run.checkpoints / _place(manifest.step)
    if place.exists():
        _take_away(place)
    os.replace(beside, place)
    checkpoint.flush(run.checkpoints)
    for old in sorted(run.checkpoints.glob("step-*"))[:-keep]:
        _take_away(old)


def _take_away(place: Path) -> None:
    """Remove a checkpoint; at no moment is a part of one in its place."""
    hidden = place.with_name(f".{place.name}.old.partial")
    checkpoint.remove(hidden)
    os.replace(place, hidden)
    checkpoint.remove(hidden)


def restore(run: Run, model: nn.Module, optimizer: torch.optim.Optimizer, facts: Mapping[str, str]) -> int:
    """Fill a model and its optimizer from the newest checkpoint, which may have been made at another size of the axis.

    Returns:
        Steps done; 0 where there is no checkpoint yet.

    Raises:
        FileError: A checkpoint that is damaged, or of another run. Nothing is changed then.
    """
    place = run.last()
    if place is None:
        return 0
    layers = bind.layers(model)
    specs = {path: layer.spec for path, layer in layers.items()}
    index = max((spec.axis.index or 0 for spec in specs.values()), default=0)
    with manifests.opened(place) as stored:
        step = stored.manifest.step
        if stored.manifest.facts != {k: _digest(v) for k, v in facts.items()}:
            raise FileError(f"{place}: belongs to another run (other data or layers); resume the run that wrote it.")
        if step is None or place.name != _place(step) or set(stored.manifest.kinds) != {FACTOR, *MOMENTS}:
            raise FileError(f"{place}: its {MANIFEST} tells of step {step}; use the checkpoint before.")
        parts = {kind: manifests.recut(stored, kind, specs, index) for kind in stored.kinds()}
    held = optimizers.holder(optimizer)
    moved = {p for group in held.param_groups for p in group["params"]}
    with torch.no_grad():
        for group in held.param_groups:
            for p in group["params"]:
                device = p.device if group.get("capturable") else "cpu"
                held.state[p]["step"] = optimizers.steps_done(step, device)
        for path, of in parts[FACTOR].items():
            for name in of.keys() - layers[path].followed().keys():
                p = layers[path].parameter(name)
                p.copy_(of[name])
                for moment in MOMENTS if p in moved else ():
                    held.state[p][moment] = parts[moment][path][name].to(p.device, p.dtype, copy=True)
    return step


def _place(step: Any) -> str:
    return f"step-{step:09d}" if isinstance(step, int) else "unknown"


def _tensors(
    model: nn.Module, state: Mapping[Tensor, Mapping[str, Tensor]], moments: Sequence[str]
) -> dict[str, Tensor]:
    """Name -> tensor of what a checkpoint holds of this process, of the optimizer's state only the moments named."""
    tensors: dict[str, Tensor] = {}
    for path, layer in bind.layers(model).items():
        for name, t in layer.stored().items():
            tensors[tensor_name(FACTOR, path, name)] = t
        held = {name: (p, False) for name, p in layer.trained().items()} | layer.followed()
        for name, (p, turned) in held.items():
            for moment in moments if name in sharding.trained_names(layer.spec) else ():
                of = state[p][moment]
                tensors[tensor_name(moment, path, name)] = of.T.contiguous() if turned else of
    return tensors


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

    def show(self, done: int, lines: Sequence[Mapping[str, Any]]) -> None:
        """Move the bar to `done` steps; of several lines it shows the range."""
        self._bar.update(done - self._shown)
        self._shown = done
        told = [_range([line[name] for line in lines], form) for name, form in (("loss", ".4f"), ("lr", ".2e"))]
        self._bar.set_postfix_str(f"loss {told[0]}, lr {told[1]}")


def _range(values: Sequence[float], form: str) -> str:
    low, high = (format(pick(values), form) for pick in (min, max))
    return low if low == high else f"{low} to {high}"


def plot(run: Run, *, title: str) -> Path | None:
    """Draw the loss curve as a PNG; None where matplotlib is missing."""
    lines = read_log(run.directory / LOG)

    def draw(axes: Any) -> None:
        for kind, label, style in (("train", "training", {"alpha": 0.7}), ("eval", "held out", {"marker": "o"})):
            steps, losses = _points(lines, kind)
            if steps:
                axes.plot(steps, losses, label=label, **style)
        axes.legend()

    return _drawn(run.directory / PLOT, draw, title=title, size=(7, 4))


def compare(directory: Path, compared: Mapping[str, Run], *, title: str) -> Path | None:
    """Draw the curves of several runs into one PNG, named beside it in their order; None where matplotlib is missing.

    A run's line is its training loss, its dots the held-out loss.
    """

    def draw(axes: Any) -> None:
        import matplotlib

        colours = matplotlib.colormaps["turbo"]
        for number, (name, run) in enumerate(compared.items()):
            lines, colour = read_log(run.directory / LOG), colours(0.05 + 0.9 * number / max(len(compared) - 1, 1))
            style = {"color": colour, "linestyle": ("-", "--", "-.", ":")[number % 4]}
            axes.plot(*_points(lines, "train"), label=name, linewidth=1.2, **style)
            axes.plot(*_points(lines, "eval"), marker="o", markersize=4, linewidth=0, color=colour)
        held_out = any(line["kind"] == "eval" and line["loss"] is not None for line in lines)
        what = "training" + " (dots: held out)" * held_out
        axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1), borderaxespad=0, fontsize="small", title=what)

    return _drawn(directory / PLOT, draw, title=title, size=(9, max(4, 0.6 + 0.26 * len(compared))))


def _drawn(place: Path, draw: Callable[[Any], None], *, title: str, size: tuple[float, float]) -> Path | None:
    if importlib.util.find_spec("matplotlib") is None:
        return None
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=size, layout="constrained")
    draw(axes)
    axes.set(xlabel="optimizer step", ylabel="loss (nats per token)", title=title)
    axes.grid(alpha=0.3)
    axes.xaxis.get_major_locator().set_params(integer=True)
    with checkpoint.replacing(place) as beside:
        figure.savefig(beside, dpi=150, format="png")
    plt.close(figure)
    return place


def _points(lines: Sequence[Mapping[str, Any]], kind: str) -> tuple[list[int], list[float]]:
    """The steps and losses of the lines of a kind, where there is a number."""
    found = [
        line for line in lines if line["kind"] == kind and line["loss"] is not None and math.isfinite(line["loss"])
    ]
    return [line["step"] for line in found], [line["loss"] for line in found]
