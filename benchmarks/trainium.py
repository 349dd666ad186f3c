"""How fast is a training run on many processes, and what is between them? One line starts it on trn1.

    torchrun --nproc-per-node 32 -m benchmarks.trainium --backend neuron

A Llama-shaped model with random weights, LoRA on every linear layer, packed rows, AdamW: the step of `lora-fn
finetune`. Told are tokens/s, MFU, what is compiled and when, memory, and the latency and the bandwidth of collectives,
which `machine.json` gets for the cost model. It was exercised with gloo and with XLA on CPU; on a Neuron device it was
not run, and ships unmeasured.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import struct
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adapters import estimate
from benchmarks import apart, environment, links, peak, rows
from benchmarks.configs import config_of
from benchmarks.options import BACKENDS, Options, check_here, positive
from benchmarks.programs import LINEARS, SHORT
from lora_fn import FileError, LoraFnError, SpecError, checkpoint, machines

_FEW = {"heads": 8, "key_value_heads": 4}
SHAPES: Mapping[str, estimate.Shape] = {
    "8b": estimate.PRESETS["llama-3-8b"],
    "small": estimate.Shape(name="small", hidden=256, intermediate=704, layers=4, vocabulary=1024, **_FEW),
    "tiny": estimate.Shape(name="tiny", hidden=32, intermediate=96, layers=2, vocabulary=256, **_FEW),
}
PEAKS = {"neuron": machines.MACHINES["trn1"].flops / machines.SUSTAINED}  # bf16 FLOP/s of one process
ON_NEURON = {"NEURON_CC_FLAGS": "--model-type transformer", "NEURON_RT_STOCHASTIC_ROUNDING_EN": "0"}
WARM, DOCUMENTS = 2, 3
SPEED, MFU, STEP = "tokens per second", "MFU without attention", "time of a step"
COMPILED, AGAIN = "graphs compiled", "graphs compiled after the second step"
COMPILE, FIRST = "time of compiling these, as torch_xla tells", "time of the first step, beyond the median"
MEMORY, MOST_LOSS = "peak memory of a process", 1.0
LATENCY, BANDWIDTH, PRODUCTS = "latency of a collective", "bandwidth from a process", "FLOP/s of a process in products"
ON_TRN1, ON_GLOO, ALONE = "trn1", "2 gloo processes", "1 process"
ABSENT = "needs a Neuron device; there: torchrun --nproc-per-node 32 -m benchmarks.trainium --backend neuron"


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """The run. Arguments are those of the command line, and the sizes of the model."""

    config: Mapping[str, Any]
    shape: estimate.Shape
    tp: int
    dp: int
    rank: int
    dropout: float
    sequence_length: int
    accumulation: int
    sequence_parallel: bool
    checkpointing: bool
    dtype: str
    steps: int

    def __str__(self) -> str:
        cut = f"TP {self.tp} x DP {self.dp}{', sequence parallel' * (self.sequence_parallel and self.tp > 1)}"
        return (
            f"h{self.shape.hidden} L{self.shape.layers} {SHORT[self.dtype]} r{self.rank}, {cut}, "
            f"{self.sequence_length} tokens x {self.accumulation}{', checkpointing' * self.checkpointing}"
        )

    @property
    def tokens(self) -> int:
        """Of a step, on all processes."""
        return self.sequence_length * self.accumulation * self.dp

    def flops(self) -> float:
        """Of a token, on all processes: products of linear layers and head, forward and backward, attention left out.

        A frozen layer of i x o has 4 i o (there is no gradient of its weight), its adapter 6 r (i + o).
        """
        shape = self.shape
        outs = [size for size in shape.features for _ in range(2)] + [shape.intermediate] * 3  # q and o, k and v, MLP
        each = sum(4 * shape.hidden * out + 6 * self.rank * (shape.hidden + out) for out in outs)
        return shape.layers * each + 4 * shape.hidden * shape.vocabulary


def model_of(word: str) -> tuple[Mapping[str, Any], estimate.Shape]:
    """A model's config and sizes.

    Args:
        word: A name of `SHAPES`, or a config.json.

    Raises:
        FileError: It is neither, or tells no sizes.
    """
    if word in SHAPES:
        return config_of(SHAPES[word], max_position_embeddings=8192), SHAPES[word]
    if not Path(word).is_file():
        raise FileError(f"--config is {word}, expected one of {', '.join(SHAPES)}, or a config.json.")
    return checkpoint.read_json(Path(word)), estimate.read_shape(word)


# ------------------------------------------------------------------------------------------------------ the model


def write_model(directory: Path, config: Mapping[str, Any]) -> None:
    """A checkpoint of zeros that takes no room on the disk: a file with nothing but its header written.

    Raises:
        LoraFnError: A model that `models.load` does not take.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    from adapters import models
    from lora_fn import Axis

    (directory / "config.json").write_text(json.dumps(config), encoding="utf-8")
    models.outline(directory, axis=Axis())
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(directory))
    header, end = dict[str, Any](), 0
    for name, p in model.state_dict().items():
        start, end = end, end + 2 * p.numel()
        header[name] = {"dtype": "BF16", "shape": list(p.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with (directory / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)


def draw(model: Any, seed: int) -> None:
    """Weights of a model that has not been trained: norms one, and the rest small; each process's are its own."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(1.0) if p.dim() == 1 else p.normal_(0.0, 0.02, generator=generator)


def batch(asked: Asked, number: int, device: torch.device) -> dict[str, Tensor]:
    """One packed row: ids, labels, places and documents [1, S]."""
    generator = torch.Generator().manual_seed(number)
    length = asked.sequence_length
    ids = torch.randint(1, asked.shape.vocabulary, (1, length), generator=generator)
    documents = (torch.arange(length) * DOCUMENTS // length).view(1, -1)
    starts = torch.searchsorted(documents[0].contiguous(), documents[0].contiguous()).view(1, -1)
    found = {
        "input_ids": ids,
        "labels": ids.roll(-1, 1),
        "position_ids": torch.arange(length).view(1, -1) - starts,
        "document_ids": documents,
    }
    return {name: t.contiguous().to(device) for name, t in found.items()}


class Wrong(Exception):
    """The run's numbers cannot be right: there is nothing to tell of its speed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """What a run came to: seconds of each step, [graphs, seconds of compiling] at first, after the warm-up and at the
    end, the losses, and the tp axis."""

    seconds: list[float]
    compiled: list[tuple[int, float]]
    losses: list[float]
    tp: Any


def run_steps(asked: Asked, options: Options, mesh: Any, device: torch.device) -> Found:
    """The steps, as `lora-fn finetune` takes them.

    Raises:
        Wrong: The first loss is not that of a model that knows nothing, a later one is no number, or copies of a factor
            differ at the end.
    """
    import lora_fn
    from adapters import bind, train
    from lora_fn.dropout import fold_in
    from lora_fn.reshard import differing

    tp, dp = train.axes_of(mesh)
    lora = lora_fn.LoraSpec(rank=asked.rank, alpha=2 * asked.rank, dropout=asked.dropout, target_modules=LINEARS)
    with tempfile.TemporaryDirectory(prefix="bench-") as place:
        write_model(Path(place), asked.config)
        job = train.Job(
            model=place,
            data=("random",),
            output="",
            lora=lora,
            tp=asked.tp,
            dp=asked.dp,
            sequence_parallel=asked.sequence_parallel,
            device=options.device,
            dtype=asked.dtype,
            sequence_length=asked.sequence_length,
            batch_size=asked.dp * asked.accumulation,
            accumulation=asked.accumulation,
            steps=asked.steps + WARM,
            warmup=1,
            activation_checkpointing=asked.checkpointing,
        )
        model = train.load_base(job, mesh, torch.device("cpu"))
    draw(model, tp.index or 0)
    model.to(device)
    train.adapt(model, job, lora, None, tp)
    train.compute_again(model, job)
    optimizer = train.make_optimizer(model.train(), job)
    step, key = train.number_on(0, device), train.number_on(7, device)
    options.wait()  # what the first step begins with is data, as for the others
    seconds, marks, losses = list[float](), [compiling(options)], list[Tensor]()
    for number in range(job.steps):
        start = time.perf_counter()
        first = (number * asked.dp + (dp.index or 0)) * asked.accumulation
        batches = [batch(asked, first + n, device) for n in range(asked.accumulation)]
        for group in optimizer.param_groups:
            group["lr"].copy_(train.learning_rate(job, step))
        loss, _ = train.train_step(
            model,
            optimizer,
            batches,
            num_targets=train.number_on(float(asked.tokens), device),
            key=fold_in(key, step),
            tp=tp,
            dp=dp,
            max_grad_norm=job.max_grad_norm,
        )
        step = step + 1
        losses.append(loss)
        options.wait()
        seconds.append(time.perf_counter() - start)
        if number in (0, WARM - 1):
            marks.append(compiling(options))
    marks.append(compiling(options))
    blind, told = math.log(asked.shape.vocabulary), [float(loss) for loss in losses]
    if not abs(told[0] - blind) < MOST_LOSS:  # a NaN, too
        raise Wrong(f"the first loss is {told[0]:.3f}; that of a model that knows nothing is {blind:.3f}")
    if not math.isfinite(sum(told)):
        raise Wrong("a loss is no number")
    layers, index = bind.layers(model), train.place_on(tp, device)
    unlike = [f"{path}.{name}" for path, of in layers.items() for name in differing(of.trained(), of.spec, index=index)]
    if unlike:
        raise Wrong(f"copies of {unlike[0]} differ between processes")
    return Found(seconds=seconds, compiled=marks, losses=told, tp=tp)


def compiling(options: Options) -> tuple[int, float]:
    """How many graphs this process has compiled, and the seconds that took; (0, 0) where nothing is compiled."""
    if options.device != "xla":
        return 0, 0.0
    import torch_xla.debug.metrics as metrics

    number, nanoseconds, *_ = metrics.metric_data("CompileTime") or (0, 0)
    return number, nanoseconds / 1e9


def most_memory(options: Options) -> int:
    """Bytes that this process held at most, on its device.

    Raises:
        RuntimeError: The runtime does not tell.
    """
    if options.device == "xla":
        import torch_xla
        import torch_xla.core.xla_model as xm

        told = xm.get_memory_info(torch_xla.device())
        return told.get("peak_bytes_used", told["bytes_used"])
    return torch.cuda.max_memory_allocated() if options.device == "cuda" else peak.memory("VmHWM")


# ---------------------------------------------------------------------------------------------------------- rows


def rows_of_run(asked: Asked, found: Found, options: Options, peak_flops: float | None) -> Iterable[rows.Row]:
    """Of a run; without graphs where nothing is compiled."""
    case, backend = str(asked), options.backend
    told = ("B17", case, "ours")
    steady = found.seconds[WARM:]
    middle, processes = statistics.median(steady), asked.tp * asked.dp
    speed = asked.tokens / middle
    note = f"processes: {processes}; losses {found.losses[0]:.3f} to {found.losses[-1]:.3f}; random weights"
    yield rows.measured(*told, STEP, "s", steady, backend=backend, note=note)
    yield rows.measured(*told, SPEED, "tokens/s", [speed], backend=backend, note="of the median step, all processes")
    if peak_flops:
        used = asked.flops() * speed / (peak_flops * processes)
        yield rows.measured(*told, MFU, "x", [used], backend=backend, note=f"of {peak_flops:.3g} FLOP/s a process")
    else:
        yield rows.missing(*told, MFU, "x", "no peak is known of this machine; name one with --peak", backend=backend)
    try:
        yield rows.measured(*told, MEMORY, "bytes", [most_memory(options)], backend=backend)
    except (RuntimeError, KeyError) as error:
        reason = f"the runtime does not tell ({str(error).splitlines()[0]})"
        yield rows.missing(*told, MEMORY, "bytes", reason, backend=backend)
    if options.device == "xla":
        before, _, warm, end = found.compiled
        yield rows.count(*told, COMPILED, "graphs", end[0] - before[0], backend=backend)
        yield rows.count(*told, AGAIN, "graphs", end[0] - warm[0], backend=backend)
        yield rows.measured(*told, COMPILE, "s", [end[1] - before[1]], backend=backend)
        yield rows.measured(*told, FIRST, "s", [found.seconds[0] - middle], backend=backend)


def rows_of_links(asked: Asked, found: Found, options: Options, rounds: int, output: Path | None) -> Iterable[rows.Row]:
    """Of what is between processes of "tp", and the machine that the cost model is given."""
    from adapters import launch

    told, device = ("B17", f"TP {asked.tp}", "ours"), launch.process_device(options.device)
    sizes, features = (links.SIZES[:4], 128) if options.tiny else (links.SIZES, 1024 if device.type == "cpu" else 4096)
    speed = links.flops(device, getattr(torch, asked.dtype), options.wait, features=features, rounds=rounds)
    machine = {"flops": speed}
    note = f"{SHORT[asked.dtype]}, {features} x {features}"
    yield rows.measured(*told, PRODUCTS, "FLOP/s", [speed], backend=options.backend, note=note)
    if asked.tp == 1:
        for metric, unit in ((LATENCY, "s"), (BANDWIDTH, "bytes/s")):
            yield rows.missing(*told, metric, unit, "one process has nobody to talk to", backend=options.backend)
    else:
        samples = links.measure(found.tp, device, options.wait, sizes=sizes, rounds=rounds)
        for each in samples:
            metric = f"{each.kind} of {each.size // 1024} KB"
            yield rows.measured(*told, metric, "s", each.seconds, backend=options.backend)
        fits = {kind: links.fit([s for s in samples if s.kind == kind]) for kind in links.KINDS}
        latency, bandwidth = links.fit(samples)
        note = "; ".join(f"{kind} {1e6 * a:.0f} us, {b / 1e9:.2f} GB/s" for kind, (a, b) in fits.items())
        yield rows.measured(*told, LATENCY, "s", [latency], backend=options.backend, note=note)
        machine["latency"] = latency
        if math.isfinite(bandwidth):
            yield rows.measured(*told, BANDWIDTH, "bytes/s", [bandwidth], backend=options.backend, note=note)
            machine["bandwidth"] = bandwidth
        else:
            reason = "within these sizes time does not grow with size"
            yield rows.missing(*told, BANDWIDTH, "bytes/s", reason, backend=options.backend)
    if output:
        (output / "machine.json").write_text(json.dumps(machine, indent=2) + "\n", encoding="utf-8")


def peer(options: Options) -> rows.Row:
    """Optimum Neuron's own trainer, with the same recipe."""
    reason = "its trainer needs torch_neuronx; its layers are compared in benchmarks/gradients.py"
    return rows.missing("B17", "the same recipe", "Optimum Neuron", SPEED, "tokens/s", reason, backend=options.backend)


# --------------------------------------------------------------------------------------------------- the harness


def cases(options: Options) -> list[str]:
    """What can be run here of it: on the CPU two processes, if there is time; on XLA's one."""
    small = {"cpu": [ON_GLOO] * options.long, "xla": [ALONE]}
    return [ON_TRN1, *small.get(options.where, [])]


def run(case: str, options: Options) -> Iterable[rows.Row]:
    """The rows of a case."""
    if case == ON_TRN1:
        yield rows.missing("B17", case, "ours", SPEED, "tokens/s", ABSENT, backend=BACKENDS["neuron"].told)
        yield peer(options)
        return
    config = "tiny" if options.tiny or options.device == "xla" else "small"
    words = ["--backend", options.where, "--config", config, "--rounds", str(options.rounds)]
    words += ["--tiny"] * options.tiny
    processes = 2 if case == ON_GLOO else 0
    yield from apart.rows_of(
        "benchmarks.trainium", options, lambda output: [*words, "--rows", output], processes=processes
    )


def parsed(words: list[str] | None = None) -> argparse.Namespace:
    """The command line, with defaults for the backend."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.trainium", description=__doc__)
    parser.add_argument("--backend", choices=BACKENDS, default="neuron", help="where it runs")
    parser.add_argument("--config", help=f"of {', '.join(SHAPES)}, or a config.json; 8b on neuron, else tiny")
    parser.add_argument("--tp", type=positive, help="processes that the model is cut over; 8 on neuron, else all")
    parser.add_argument("--rank", type=positive, default=64)
    parser.add_argument("--dropout", type=float, default=0.05)
    parser.add_argument("--sequence-length", type=positive, help="2048 on neuron, else 64")
    parser.add_argument("--accumulation", type=positive, help="microbatches of one row; 16 on neuron, else 2")
    parser.add_argument("--no-sequence-parallel", dest="sequence_parallel", action="store_false")
    parser.add_argument("--activation-checkpointing", action="store_true")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of the base")
    parser.add_argument("--steps", type=positive, help=f"that are timed, after {WARM}; as many as --rounds")
    parser.add_argument("--rounds", type=positive, default=15, help="of each collective")
    parser.add_argument("--peak", type=float, help="FLOP/s of one process, for MFU")
    parser.add_argument("--tiny", action="store_true", help="sizes that say nothing, to try the harness")
    parser.add_argument("--rows", type=Path, help="write the rows here, and nothing else")
    parser.add_argument("--output", type=Path, default=Path("build/trainium"), help="the directory of the report")
    return parser.parse_args(words)


def main(words: list[str] | None = None) -> None:
    """On each process: the first writes the rows, or the report and machine.json; bad input is one sentence."""
    try:
        measured(parsed(words))
    except LoraFnError as error:
        sys.exit(f"python -m benchmarks.trainium: {error}")


def measured(args: argparse.Namespace) -> None:
    """What `main` does, of its command line."""
    check_here(args.backend)
    if args.peak is not None and not args.peak > 0:
        raise SpecError(f"--peak is {args.peak:g}, expected FLOP/s above 0.")
    options = Options(where=args.backend, rounds=args.rounds, tiny=args.tiny, threads=1)
    os.environ.update(options.environment)
    for name, value in ON_NEURON.items() if args.backend == "neuron" else ():
        os.environ.setdefault(name, value)
    from adapters import launch
    from benchmarks import report  # which knows all suites

    torch.set_num_threads(1)
    on_device, processes = args.backend == "neuron", int(os.environ.get("WORLD_SIZE", "1"))
    tp = args.tp or (8 if on_device else processes)
    config, shape = model_of(args.config or ("8b" if on_device else "tiny"))
    asked = Asked(
        config=config,
        shape=shape,
        tp=tp,
        dp=max(processes // tp, 1),
        rank=args.rank,
        dropout=args.dropout,
        sequence_length=args.sequence_length or (2048 if on_device else 64),
        accumulation=args.accumulation or (16 if on_device else 2),
        sequence_parallel=args.sequence_parallel,
        checkpointing=args.activation_checkpointing,
        dtype=args.dtype,
        steps=args.steps or args.rounds,
    )
    mesh = launch.mesh({"dp": asked.dp, "tp": asked.tp}, options.device)
    first, made = launch.is_first(), list[rows.Row]()
    output = args.output if first and not args.rows else None
    if output:
        report.prepare(output)

    def told(found: Iterable[rows.Row]) -> None:
        for row in found:
            made.append(row)
            if output:
                rows.append(output / rows.FILE, [row])
            if first and not args.rows:
                number = "" if row.minimum is None else report.number(row.minimum, row.unit)
                print(f"{row.case}: {row.metric}: {' '.join(filter(None, (number, row.note)))}", flush=True)

    try:
        found = run_steps(asked, options, mesh, launch.process_device(options.device))
        told(rows_of_run(asked, found, options, args.peak or PEAKS.get(args.backend)))
        told(rows_of_links(asked, found, options, args.rounds, output))
    except Wrong as error:
        told([rows.missing("B17", str(asked), "ours", SPEED, "tokens/s", str(error), backend=options.backend)])
    if args.rows and first:
        rows.write(args.rows, made)
    elif output:
        told([peer(options)])
        report.write(output, made, environment.environment(options))
    launch.leave()


if __name__ == "__main__":
    main()
