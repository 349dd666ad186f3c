"""How many graphs does XLA compile while an adapter changes, and how long does it take to trace a step?

    python -m benchmarks.graphs OPTIONS OUTPUT WHAT    (with torch_xla)

A step is a forward, a backward and AdamW's, with dropout, whose key changes, and a learning rate that does. All that
happens to an adapter happens in one process, so that a graph is counted once: where it is compiled first. Before that,
the same steps without dropout (ours also with it: its masks are the same everywhere) are compared with the CPU's eager
ones; where their losses differ, nothing is counted. A graph that is compiled between the steps is told, not counted.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import apart, programs, rows, timing
from benchmarks.options import XLA_ON_CPU, Options
from benchmarks.programs import H128, TINY, Program, Setup

GRAPHS, UNIT = "distinct graphs of a step", "graphs"
TRACE = "time to trace a step"
STEPS, RATE, DROPOUT = 20, 1e-3, 0.1
TRACED = "time of a trace"
DISABLED = "disable and enable"


def cases(options: Options) -> list[str]:
    """Of whom graphs are counted, and what is timed."""
    return [*PEERS, TRACED]


def run(case: str, options: Options) -> Iterable[rows.Row]:
    """The rows of a case, from an interpreter that has torch_xla."""
    if options.xla_python:
        return apart.run("benchmarks.graphs", options.on_xla, case, python=options.xla_python)
    reason = "no interpreter with torch_xla; name one with --xla-python"
    if case == TRACED:
        told = [("B8", str(traced_setup(options)), "ours", TRACE, "s")]
    else:
        told = [("B8", event, case, GRAPHS, UNIT) for event in EVENTS]
    return [rows.missing(*each, reason, backend=XLA_ON_CPU) for each in told]


def counted_setup(dropout: float, device: str) -> Setup:
    """The model, of which nothing here depends on the size."""
    return Setup(shape=TINY, rank=4, dropout=dropout, device=device)


def traced_setup(options: Options) -> Setup:
    """The model of which a step is traced."""
    return Setup(shape=TINY if options.tiny else replace(H128, layers=4), rank=4, device="xla")


# ------------------------------------------------------------------------------------------------- in its process


@dataclass(slots=True, kw_only=True)
class Training:
    """A program in training, and what becomes of its adapter.

    Args:
        program: Which.
        optimizer: Over its factors.
        number: Of the next step.
    """

    program: Program
    optimizer: Any
    number: int = 0

    def step(self) -> Tensor:
        """One; gives its loss [1] and leaves the rest to the device."""
        device = self.program.inputs["labels"].device
        rate = torch.tensor([RATE / (1 + self.number)], device=device).reshape(())
        for group in self.optimizer.param_groups:
            group["lr"].copy_(rate)
        self.program.number[0] = self.number
        loss = self.program.step()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.program.inputs["inputs_embeds"].grad = None
        self.number += 1
        return loss.reshape(1)


def optimizer_of(trained: Iterable[Tensor]) -> Any:
    """The same for every program: its rate is a tensor, and its state there from the start."""
    from adapters import optimizers

    group = {"params": list(trained), "initial_lr": RATE, "weight_decay": 0.0}
    return optimizers.adamw([group], betas=(0.9, 0.999), dp=None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Peer:
    """Who trains, and how an adapter is changed with it.

    Args:
        make: The program.
        swap: Put the adapter of a PEFT directory in the place of the one that is trained.
        rescale: Another alpha.
        disable: Until what it gives is called.
        resume: A program made anew, with the adapter of the one that is there.
        dropouts: With which its losses are those of the CPU.
    """

    make: Callable[[Setup], Program]
    swap: Callable[[Training, str], None]
    rescale: Callable[[Training, float], None]
    disable: Callable[[Training], Callable[[], object]]
    resume: Callable[[Training, Setup, str], Program]
    dropouts: tuple[float, ...] = (0.0,)


def _swap_ours(training: Training, directory: str) -> None:
    import adapters

    adapters.load(training.program.model, directory)


def _rescale_ours(training: Training, alpha: float) -> None:
    import adapters

    model = training.program.model
    adapters.rescale(model, replace(adapters.lora_spec(model), alpha=alpha))


def _disable_ours(training: Training) -> Callable[[], object]:
    from adapters import bind

    model = training.program.model
    adapter = bind.detach(model)
    return lambda: bind.attach(model, adapter)


def _resume_ours(training: Training, setup: Setup, directory: str) -> Program:
    import adapters

    model = training.program.model
    adapters.save(model, directory)
    program = programs.ours(setup)
    adapters.load(program.model, directory)
    adapters.rescale(program.model, adapters.lora_spec(model))
    return program


def _swap_peft(training: Training, directory: str) -> None:
    """As its documentation does: another adapter, which has an optimizer of its own."""
    model = training.program.model
    model.load_adapter(directory, adapter_name="other", is_trainable=True, torch_device="cpu")
    model.set_adapter("other")
    training.optimizer = optimizer_of(_trained_peft(model).values())


def _trained_peft(model: Any) -> dict[str, Tensor]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def _rescale_peft(training: Training, alpha: float) -> None:
    from peft.tuners.lora import LoraLayer

    for module in training.program.model.modules():
        if isinstance(module, LoraLayer):
            module.scaling.update({name: alpha / rank for name, rank in module.r.items()})


def _disable_peft(training: Training) -> Callable[[], object]:
    context = training.program.model.disable_adapter()
    context.__enter__()
    return lambda: context.__exit__(None, None, None)


def _resume_peft(training: Training, setup: Setup, directory: str) -> Program:
    from peft import PeftModel

    before = training.program.model
    held = {name: p.cpu() for name, p in before.state_dict().items() if "lora_" in name}  # safetensors takes no other
    before.save_pretrained(directory, selected_adapters=[before.active_adapter], state_dict=held)
    name = before.active_adapter
    at = Path(directory) if name == "default" else Path(directory, name)
    model = PeftModel.from_pretrained(programs.llama(setup), at, is_trainable=True, torch_device="cpu").train()
    return Program(model=model, trained=_trained_peft(model), inputs=programs.batch(setup))


PEERS: Mapping[str, Peer] = {
    "ours": Peer(
        make=programs.ours,
        swap=_swap_ours,
        rescale=_rescale_ours,
        disable=_disable_ours,
        resume=_resume_ours,
        dropouts=(0.0, DROPOUT),
    ),
    "PEFT": Peer(
        make=programs.peft,
        swap=_swap_peft,
        rescale=_rescale_peft,
        disable=_disable_peft,
        resume=_resume_peft,
    ),
}


@dataclass(slots=True, kw_only=True)
class Run:
    """All that happens, on one device.

    Args:
        peer: Who trains.
        setup: What.
        place: A directory; "other" in it is an adapter to swap to.
        cut: Called at the end of a step, and of what is between steps: gives how many graphs were compiled so far.
        losses: Of every step, on its device.
        compiled: {event: graphs compiled in its steps, graphs compiled between them}.
    """

    peer: Peer
    setup: Setup
    place: Path
    cut: Callable[[], int]
    losses: list[Tensor] = field(default_factory=list)
    compiled: dict[str, list[int]] = field(default_factory=dict)

    def all_of_it(self) -> Run:
        """Every event in its turn, each with the steps after it."""
        program = self.peer.make(self.setup)
        training = Training(program=program, optimizer=optimizer_of(program.trained.values()))
        end = self.cut()
        for event, happens in EVENTS.items():
            self.compiled[event] = [0, 0]
            for step in happens(self, training):
                begin = self.cut()
                self.losses.append(step())
                before, end = end, self.cut()
                self.compiled[event][0] += end - begin
                self.compiled[event][1] += begin - before
        return self


def _steps(run: Run, training: Training) -> Iterable[Callable[[], Tensor]]:
    for _ in range(STEPS):
        yield training.step


def _swapped(run: Run, training: Training) -> Iterable[Callable[[], Tensor]]:
    run.peer.swap(training, str(run.place / "other"))
    yield training.step
    yield training.step


def _rescaled(run: Run, training: Training) -> Iterable[Callable[[], Tensor]]:
    """To alpha = rank, too, where the scale is 1."""
    for alpha in (1.5, 3.0, 1.0):
        run.peer.rescale(training, alpha * run.setup.rank)
        yield training.step


def _disabled(run: Run, training: Training) -> Iterable[Callable[[], Tensor]]:
    """Where it is off, a step is a forward and a backward."""
    enable = run.peer.disable(training)
    yield lambda: training.program.model(**training.program.inputs).loss.detach().reshape(1)
    enable()
    yield training.step


def _resumed(run: Run, training: Training) -> Iterable[Callable[[], Tensor]]:
    """With the state of the optimizer before, put there as `lora-fn finetune --resume` does."""
    from adapters.optimizers import steps_done

    moments = [{name: t.cpu() for name, t in of.items() if t.dim()} for of in training.optimizer.state.values()]
    program = run.peer.resume(training, run.setup, str(run.place / "saved"))
    again = Training(program=program, optimizer=optimizer_of(program.trained.values()), number=training.number)
    for (p, of), values in zip(again.optimizer.state.items(), moments, strict=True):
        of["step"] = steps_done(training.number, p.device)
        of.update({name: value.to(p.device, copy=True) for name, value in values.items()})
    yield again.step
    yield again.step


EVENTS: Mapping[str, Callable[[Run, Training], Iterable[Callable[[], Tensor]]]] = {
    f"{STEPS} steps": _steps,
    "adapter swap": _swapped,
    "alpha change": _rescaled,
    DISABLED: _disabled,
    "resume of a run": _resumed,
}


def compiled() -> int:
    """Graphs so far, after what is pending is one of them."""
    import torch_xla
    import torch_xla.debug.metrics as metrics

    torch_xla.sync()
    return (metrics.metric_data("CompileTime") or [0])[0]


def versions() -> str:
    """Of this process, which is not the one that is told of in the environment."""
    return ", ".join(f"{name} {metadata.version(name)}" for name in ("torch", "torch_xla", "peft"))


def counted(name: str, place: Path, backend: str) -> list[rows.Row]:
    """The rows of a program, in a process that has compiled nothing yet."""
    peer, worst = PEERS[name], 0.0
    told = {event: ("B8", event, name, GRAPHS, UNIT) for event in EVENTS}

    def run_on(device: str, dropout: float) -> Run:
        setup, cut = counted_setup(dropout, device), {"xla": compiled, "cpu": lambda: 0}[device]
        return Run(peer=peer, setup=setup, place=place, cut=cut).all_of_it()

    chosen = run_on("xla", DROPOUT)
    for dropout in peer.dropouts:
        found = chosen if dropout == DROPOUT else run_on("xla", dropout)
        every = ({"loss": torch.cat([x.cpu() for x in of.losses])} for of in (found, run_on("cpu", dropout)))
        try:
            worst = max(worst, timing.check_exact(*every, timing.FP32))
        except timing.Wrong as error:
            return [rows.missing(*each, str(error), backend=backend) for each in told.values()]
    made, first = list[rows.Row](), 0
    for event, (of_steps, between) in chosen.compiled.items():
        note = f"off {worst:.0e}; {between} more compiled between the steps; {versions()}"
        made.append(rows.count(*told[event], first + of_steps, backend=backend, note=note))
        first = 1
    return made


def traced(options: Options) -> list[rows.Row]:
    """How long it takes, beside the frozen model."""
    import torch_xla

    setup = traced_setup(options)
    made = {name: programs.PROGRAMS[name](setup) for name in ("frozen", "ours", "PEFT")}
    alone = {name: programs.PROGRAMS[name](replace(setup, device="cpu")).found() for name in made}
    notes, wrong = dict[str, str](), dict[str, str]()
    for name, program in made.items():
        found = program.found()
        options.wait()  # else each of them is a graph
        found = {key: value.cpu() for key, value in found.items()}
        try:
            notes[name] = f"off {timing.check_exact(found, alone[name], timing.FP32):.0e}"
        except timing.Wrong as error:
            wrong[name] = str(error)
    device = torch_xla.device()

    def between() -> None:
        for program in made.values():
            program.clear()
        torch_xla._XLAC._clear_pending_irs(str(device))  # what was traced is not run

    steps = {name: program.step for name, program in made.items() if name not in wrong}
    seconds = timing.interleaved(steps, options.rounds, between=between)
    told = {name: ("B8", str(setup), name, TRACE, "s") for name in made}
    return [
        rows.missing(*told[name], wrong[name], backend=options.backend)
        if name in wrong
        else rows.measured(*told[name], seconds[name], backend=options.backend, note=f"{notes[name]}; {versions()}")
        for name in made
    ]


def save_other(directory: Path) -> None:
    """The adapter to swap to: other factors, another alpha."""
    import adapters

    program = programs.ours(counted_setup(0.0, "cpu"))
    with torch.no_grad():
        for p in program.trained.values():
            p.mul_(-0.5)
    adapters.save(program.model, directory)


def main(options: Options, output: Path, case: str) -> None:
    """With torch_xla: write the rows."""
    if case == TRACED:
        rows.write(output, traced(options))
        return
    with tempfile.TemporaryDirectory(prefix="bench-") as place:
        save_other(Path(place, "other"))
        rows.write(output, counted(case, Path(place), options.backend))


if __name__ == "__main__":
    main(Options.from_json(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:])
