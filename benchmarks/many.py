"""How long is a step that trains many adapters at once? Each has a row of the batch; beside loops, and by hand.

The loss is the mean over all rows. A loop runs over models that share one base, so that none has to change adapters.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import rows, timing
from benchmarks.operations import Counting
from benchmarks.options import Options
from benchmarks.programs import DTYPES, TINY, VOCABULARY, Program, Setup, Shape, adapted_paths, drawn, llama
from benchmarks.programs import filled as fill
from benchmarks.programs import ours as ours_alone
from benchmarks.programs import peft as peft_alone
from benchmarks.programs import plain as plain_alone

METRIC, UNIT = "step time", "s"
COUNT, FLAT = "operations of a step", "operations of a step, over those with 2 adapters"
LOOP, PEFT_LOOP, BY_HAND = "ours, loop", "PEFT, loop", "batched matmul by hand"
SHAPE = Shape(hidden=512, layers=4, tokens=64)
NUMBERS = (1, 8, 32)


def setup_of(options: Options) -> Setup:
    """What all adapters have in common."""
    if options.tiny:
        return Setup(shape=TINY, rank=4)
    return Setup(shape=SHAPE, rank=8, device=options.device)


def cases(options: Options) -> list[str]:
    """The numbers of adapters."""
    numbers = (1, 3) if options.tiny else (8,) if options.quick else NUMBERS
    return [f"{number} adapters, {setup_of(options)}" for number in numbers]


def run(case: str, options: Options) -> Iterable[rows.Row]:
    """The rows of a case."""
    number, setup = int(case.partition(" ")[0]), setup_of(options)
    expected, told = reference(setup, number), ("B13", case)
    made, notes = dict[str, Many](), dict[str, str]()
    for name, make in PROGRAMS.items():
        try:
            program = make(setup, number)
            notes[name] = f"off {timing.check_exact(program.found(), expected, timing.FP32):.0e}"
            made[name] = program
        except Exception as error:
            line = str(error).splitlines()[0] if str(error) else ""
            yield rows.missing(*told, name, METRIC, UNIT, f"{type(error).__name__}: {line}", backend=options.backend)
    for name, program in made.items():
        yield rows.count(*told, name, COUNT, "operations", operations(program), backend=options.backend)
    if number > 1 and "ours" in made:
        grown = operations(made["ours"]) / operations(ours(setup, 2))
        yield rows.count(*told, "ours", FLAT, "x", grown, backend=options.backend)
    steps = {name: program.step for name, program in made.items()}

    def between() -> None:
        for program in made.values():
            program.clear()

    seconds = timing.interleaved(steps, options.rounds, between=between, wait=options.wait)
    for name in made:
        yield rows.measured(*told, name, METRIC, UNIT, seconds[name], backend=options.backend, note=notes[name])


# ------------------------------------------------------------------------------------------------------ programs


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Many:
    """Adapters in training.

    Args:
        step: A forward and a backward; gives the loss.
        trained: Of each adapter the parameters by name: or one for all, [N, ...].
        stacked: Whether it is one for all.
        x: The input [N, T, h].
    """

    step: Callable[[], Tensor]
    trained: Sequence[Mapping[str, Tensor]]
    x: Tensor
    stacked: bool = False

    def clear(self) -> None:
        """Forget the gradients."""
        for p in (self.x, *(p for of in self.trained for p in of.values())):
            p.grad = None

    def found(self) -> dict[str, Tensor]:
        """The loss and every gradient, "NUMBER.NAME"."""
        self.clear()
        found = {"loss": self.step()}
        for number in range(len(self.x)):
            of = self.trained[0 if self.stacked else number]
            grads = {name: p.grad for name, p in of.items() if p.grad is not None}
            found |= {f"{number}.{name}": g[number] if self.stacked else g for name, g in grads.items()}
        found["x"] = self.x.grad
        self.clear()
        return found


def operations(program: Many) -> int:
    """Of a step."""
    program.clear()
    with Counting() as counting:
        program.step()
    return counting.seen.total()


def batch(setup: Setup, number: int) -> dict[str, Tensor]:
    """A row for each adapter: embeddings [N, T, h] that want a gradient, and labels [N, T]."""
    generator = torch.Generator().manual_seed(2)
    shape = (number, setup.shape.tokens)
    x = torch.randn(*shape, setup.shape.hidden, generator=generator)
    labels = torch.randint(0, VOCABULARY, shape, generator=generator)
    x = x.to(DTYPES[setup.dtype]).to(setup.device).requires_grad_()
    return {"inputs_embeds": x, "labels": labels.to(setup.device)}


def values(model: nn.Module, setup: Setup, number: int) -> list[dict[str, Tensor]]:
    """The factors of each adapter."""
    return [drawn(model, setup.rank, seed=1 + place) for place in range(number)]


def looped(alone: Callable[[Setup], Program]) -> Callable[[Setup, int], Many]:
    """One after the other."""

    def make(setup: Setup, number: int) -> Many:
        first, inputs = alone(setup), batch(setup, number)
        held = {id(p): p for p in first.model.parameters() if not p.requires_grad}
        models = [copy.deepcopy((first.model, dict(first.trained)), dict(held)) for _ in range(number)]
        programs = [
            Program(
                model=model,
                trained=fill(trained, of),
                inputs={n: t[place : place + 1] for n, t in inputs.items()},
            )
            for place, ((model, trained), of) in enumerate(
                zip(models, values(llama(setup), setup, number), strict=True)
            )
        ]

        def step() -> Tensor:
            total = torch.zeros(())
            for program in programs:
                loss = program.loss() / number
                loss.backward()
                total += loss.detach()
            return total

        return Many(step=step, trained=[program.trained for program in programs], x=inputs["inputs_embeds"])

    return make


def at_once(model: Any, inputs: Mapping[str, Tensor], **more: Any) -> Callable[[], Tensor]:
    """A step of a model that computes all rows."""

    def step() -> Tensor:
        loss = model(**inputs, **more).loss
        loss.backward()
        return loss.detach()

    return step


def ours(setup: Setup, number: int) -> Many:
    """`adapters.ManyAdapters`."""
    import adapters
    import lora_fn

    model, inputs = llama(setup), batch(setup, number)
    each = values(model, setup, number)
    paths = tuple(adapted_paths(model))
    spec = lora_fn.LoraSpec(rank=setup.rank, alpha=setup.alpha, target_modules=paths)
    held, names = adapters.ManyAdapters(model, spec, places=number), [str(place) for place in range(number)]
    for name in names:
        held.add(name, spec)
    held.select_rows(names)
    trained = {f"{path}.{n}": layer.parameter(n) for path, layer in held.layers.items() for n in ("lora_A", "lora_B")}
    fill(trained, {name: torch.stack([of[name] for of in each]) for name in trained})
    return Many(step=at_once(model.train(), inputs), trained=[trained], x=inputs["inputs_embeds"], stacked=True)


def vmapped(setup: Setup, number: int) -> Many:
    """Ours, a model with one adapter under torch.vmap, and one backward."""
    alone, inputs = ours_alone(setup), batch(setup, number)
    each = values(llama(setup), setup, number)
    trained = {n: torch.stack([of[n] for of in each]).to(setup.device).requires_grad_() for n in alone.trained}
    names = {id(p): n for n, p in alone.model.named_parameters()}
    stored = {n: names[id(p)] for n, p in alone.trained.items()}

    def loss(params: dict[str, Tensor], x: Tensor, labels: Tensor) -> Tensor:
        words = {"inputs_embeds": x[None], "labels": labels[None]}
        return torch.func.functional_call(alone.model, params, kwargs=words).loss

    def step() -> Tensor:
        params = {stored[n]: p for n, p in trained.items()}
        total = torch.func.vmap(loss)(params, inputs["inputs_embeds"], inputs["labels"]).mean()
        total.backward()
        return total.detach()

    return Many(step=step, trained=[trained], x=inputs["inputs_embeds"], stacked=True)


class ManyLora(nn.Module):
    """A linear layer and one update for each row, in one batched product for each factor."""

    def __init__(self, base: Any, number: int, setup: Setup):
        super().__init__()
        self.base, self.scaling = base, setup.alpha / setup.rank
        self.lora_A = nn.Parameter(torch.empty(number, setup.rank, base.in_features, device=setup.device))
        self.lora_B = nn.Parameter(torch.empty(number, base.out_features, setup.rank, device=setup.device))

    def forward(self, x: Tensor) -> Tensor:
        """x [N, T, in] -> [N, T, out]."""
        h = self.scaling * torch.bmm(x, self.lora_A.mT)
        return torch.baddbmm(self.base(x), h, self.lora_B.mT)


def by_hand(setup: Setup, number: int) -> Many:
    """Stock torch."""
    model, inputs = llama(setup), batch(setup, number)
    each = values(model, setup, number)
    for path, base in adapted_paths(model).items():
        owner, _, name = path.rpartition(".")
        setattr(model.get_submodule(owner), name, ManyLora(base, number, setup))
    trained = fill(
        {name: model.get_parameter(name) for name in each[0]},
        {name: torch.stack([of[name] for of in each]) for name in each[0]},
    )
    return Many(step=at_once(model.train(), inputs), trained=[trained], x=inputs["inputs_embeds"], stacked=True)


def peft_mixed(setup: Setup, number: int) -> Many:
    """Stock PEFT's `adapter_names`, which it takes outside of training only: there is no dropout here."""
    from peft import LoraConfig, get_peft_model

    model, inputs = llama(setup), batch(setup, number)
    each, names = values(model, setup, number), [f"of{place}" for place in range(number)]
    config = LoraConfig(r=setup.rank, lora_alpha=setup.alpha, target_modules=list(adapted_paths(model)))
    wrapped: Any = get_peft_model(model, config, adapter_name=names[0])
    for name in names[1:]:
        wrapped.add_adapter(name, config)
    wrapped.base_model.set_adapter(names)
    trained = [
        fill({n: wrapped.get_parameter(f"base_model.model.{n}.{name}.weight") for n in of}, of)
        for name, of in zip(names, each, strict=True)
    ]
    step = at_once(wrapped.eval(), inputs, adapter_names=names)
    return Many(step=step, trained=trained, x=inputs["inputs_embeds"])


PROGRAMS: Mapping[str, Callable[[Setup, int], Many]] = {
    "ours": ours,
    "ours, torch.vmap": vmapped,
    LOOP: looped(ours_alone),
    BY_HAND: by_hand,
    PEFT_LOOP: looped(peft_alone),
    "PEFT, mixed batch": peft_mixed,
}


def reference(setup: Setup, number: int) -> dict[str, Tensor]:
    """Plain autograd in float64, one after the other."""
    return looped(plain_alone)(replace(setup, dtype="float64"), number).found()
