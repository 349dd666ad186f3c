"""What can I type? `lora-fn finetune | generate | merge | extract | combine | inspect | cost`, and `shard | consolidate
| reshard`."""

from __future__ import annotations

import argparse
import functools
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from lora_fn import LoraFnError, LoraSpec, SpecError
from lora_fn.algebra import MAJORITIES, METHODS, Combination
from lora_fn.layer_spec import CODES
from lora_fn.spec import BIASES, INITS, OPTIONS

BAD_INPUT = 2
INTERRUPTED = 130
PATIENCE = 30.0  # seconds


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code: 0, 2 for bad input, 130 for Ctrl-C, 1 for a bug."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    options = _parser().parse_args(given)
    try:
        return options.run(options, given)
    except LoraFnError as error:
        _tell(error)
        return BAD_INPUT
    except KeyboardInterrupt:
        return INTERRUPTED


def _tell(error: LoraFnError) -> None:
    """Print the sentence; of several processes, the first one has the word."""
    import os

    if int(os.environ.get("RANK", "0")) > 0:
        time.sleep(PATIENCE)  # the launcher ends this process meanwhile, for the first one fails too
    print(f"lora-fn: {error}", file=sys.stderr, flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lora-fn", description="LoRA for tensor-parallel training, right by construction."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _finetune_options(commands.add_parser("finetune", help="fine-tune a Hugging Face model with LoRA"))
    _generate_options(commands.add_parser("generate", help="write what follows a prompt, with an adapter or without"))
    merge = commands.add_parser("merge", help="write a model with an adapter in its weights")
    for name, what, how in (
        ("model", "directory of a Hugging Face model", "store"),
        ("adapter", "directory of a PEFT adapter for it; several times: their updates add up", "append"),
        ("output", "directory to write, which must not exist", "store"),
    ):
        merge.add_argument(f"--{name}", required=True, type=Path, metavar="DIR", help=what, action=how)
    merge.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="of what is written (the model's)")
    merge.add_argument("--verify", metavar="PROMPT", help="compare the logits of a prompt before the output appears")
    merge.add_argument("--quiet", action="store_true", help="no progress bar")
    merge.set_defaults(run=_merge)
    extract = commands.add_parser("extract", help="write the adapter that is the difference of two models")
    for name, what in (
        ("base", "directory of a Hugging Face model"),
        ("model", "directory of the tuned model, of the same tensors"),
        ("output", "directory to write, which must not exist"),
    ):
        extract.add_argument(f"--{name}", required=True, type=Path, metavar="DIR", help=what)
    extract.add_argument("--rank", required=True, type=int, help="LoRA rank")
    for name, what in (
        ("target-modules", "names or ends of names of what may be adapted, embeddings too (every linear layer)"),
        ("drop", "names or ends of names of what may differ and be lost"),
    ):
        extract.add_argument(f"--{name}", nargs="+", default=(), metavar="NAME", help=what)
    extract.add_argument("--quiet", action="store_true", help="no progress bar")
    extract.set_defaults(run=_extract)
    _combine_options(commands.add_parser("combine", help="write the weighted combination of adapters as one"))
    shard = commands.add_parser("shard", help="cut an adapter for a mesh")
    shard.add_argument("adapter", type=Path, metavar="ADAPTER", help="a PEFT directory")
    shard.add_argument("--tp", required=True, type=int, help="processes that the model is cut over")
    shard.add_argument("--pp", type=int, default=1, help="pipeline stages (%(default)s)")
    shard.add_argument("--model", type=Path, metavar="DIR", help="its model, for config.json (the adapter's own)")
    _output_options(shard, _shard)
    consolidate = commands.add_parser("consolidate", help="join a sharded adapter or training checkpoint")
    consolidate.add_argument(
        "checkpoint", type=Path, metavar="CHECKPOINT", help="ours, Optimum Neuron's or neuronx-distributed's"
    )
    consolidate.add_argument(
        "--model", type=Path, metavar="DIR", help="its model, for neuronx-distributed's files only"
    )
    consolidate.add_argument("--allow-pickle", action="store_true", help="unpickle files of the others: tensors only")
    consolidate.add_argument("--allow-drift", action="store_true", help="take the first of copies that differ, there")
    _output_options(consolidate, _consolidate)
    reshard = commands.add_parser("reshard", help="cut a sharded adapter or training checkpoint for another mesh")
    reshard.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="ours")
    reshard.add_argument("--to-tp", required=True, type=int, metavar="TP", help="processes that it is for")
    reshard.add_argument("--from-tp", type=int, metavar="TP", help="those that it is of, to be checked")
    reshard.add_argument("--to-pp", type=int, metavar="PP", help="pipeline stages (as many as there are)")
    _output_options(reshard, _reshard)
    inspect = commands.add_parser("inspect", help="what is in an adapter, a sharded one, or a training checkpoint")
    inspect.add_argument("directory", type=Path, metavar="DIR")
    inspect.set_defaults(run=_inspect)
    _cost_options(commands.add_parser("cost", help="what a training step of a large model costs, on paper"))
    return parser


def _output_options(parser: argparse.ArgumentParser, run: Any) -> None:
    parser.add_argument("output", type=Path, metavar="OUTPUT", help="directory to write, which must not exist")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    parser.set_defaults(run=run)


def _combine_options(parser: argparse.ArgumentParser) -> None:
    default = {f.name: f.default for f in fields(Combination)}
    for name, what, kind, metavar in (
        ("adapter", "directory of a PEFT adapter; several times", Path, "DIR"),
        ("weight", "of each adapter, in their order; a negative one takes it away", float, "W"),
    ):
        parser.add_argument(f"--{name}", required=True, action="append", type=kind, metavar=metavar, help=what)
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="to write, which must not exist")
    parser.add_argument("--how", choices=list(METHODS), default=default["how"], help="PEFT's types (%(default)s)")
    parser.add_argument("--density", type=float, metavar="X", help="share of elements to keep: ties, dare, prune")
    parser.add_argument("--svd-rank", type=int, metavar="N", help="of svd's result (the adapters' largest)")
    parser.add_argument("--svd-clamp", type=float, metavar="Q", help="quantile that svd's factors are cut to")
    parser.add_argument(
        "--majority-sign-method",
        choices=MAJORITIES,
        default=default["majority_sign_method"],
        help="of ties: by the sum of elements, or by their number (%(default)s)",
    )
    parser.add_argument("--seed", type=int, default=default["seed"], help="of dare's random elements (%(default)s)")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    parser.set_defaults(run=_combine)


def _finetune_options(parser: argparse.ArgumentParser) -> None:
    from adapters.launch import BACKENDS, flag
    from adapters.models import DTYPES
    from adapters.recompute import POLICIES
    from adapters.schemes import WORDS
    from adapters.train import Job
    from lora_fn.machines import MACHINES

    job = {f.name: f.default for f in fields(Job)}
    lora = {f.name: f.default for f in fields(LoraSpec)}
    group = parser.add_argument_group("what")
    group.add_argument("--model", required=True, metavar="DIR", help="a Hugging Face model: Llama, Qwen3 or Granite")
    group.add_argument(
        "--data",
        default=(),
        nargs="+",
        metavar="FILE",
        help="text, or JSONL of text | prompt, completion | messages",
    )
    group.add_argument("--output", required=True, metavar="DIR", help="where adapter, log, checkpoints and plot go")
    group.add_argument(
        "--eval-data", nargs="+", default=(), metavar="FILE", help="held-out files; else a part of --data"
    )
    group.add_argument("--held-out", type=float, default=job["held_out"], metavar="X", help="that part (%(default)s)")
    group.add_argument("--adapter", metavar="DIR", help="a PEFT adapter to go on from; its own spec is taken")
    group.add_argument("--resume", action="store_true", help="go on from the last checkpoint in --output")
    group.add_argument(
        "--sweep",
        metavar="FILE",
        help="train many adapters at once: JSON, a list of objects of name, rank, alpha, use_rslora, target_modules, "
        "learning_rate, data, seed; or an object of lists, for every combination. No checkpoints",
    )
    group.add_argument(
        "--sweep-at-once", type=int, metavar="N", help="how many of them, as memory allows; the others follow (all)"
    )

    group = parser.add_argument_group("adapter")
    group.add_argument("--rank", type=int, default=lora["rank"], help="LoRA rank (%(default)s)")
    group.add_argument("--alpha", type=float, default=lora["alpha"], help="scaling is alpha / rank (%(default)s)")
    group.add_argument("--dropout", type=float, default=lora["dropout"], help="of lora_A's input (%(default)s)")
    group.add_argument("--rslora", action="store_true", help="scale by alpha / sqrt(rank)")
    group.add_argument("--dora", action="store_true", help="learn a magnitude of each output too (DoRA)")
    group.add_argument("--share-a", action="store_true", help="one lora_A for all parts of a fused projection")
    group.add_argument("--lora-bias", action="store_true", help="give lora_B a bias")
    group.add_argument(
        "--init-lora-weights",
        default="true",
        metavar="HOW",
        help=f"as in PEFT: {', '.join(map(str, INITS)).lower()}, pissa_niter_N (%(default)s)",
    )
    group.add_argument(
        "--init-options",
        nargs="+",
        default=(),
        type=_option,
        metavar="NAME=VALUE",
        help="of loftq, eva, corda, lora_ga: what PEFT's config of that name has, as JSON or text",
    )
    group.add_argument(
        "--init-batches",
        type=int,
        default=job["init_batches"],
        metavar="N",
        help="steps' worth of data that eva, corda and lora_ga look at (%(default)s)",
    )
    group.add_argument(
        "--target-modules", nargs="+", default=["all-linear"], metavar="NAME", help="names or suffixes (all-linear)"
    )
    group.add_argument(
        "--exclude-modules", nargs="+", default=(), metavar="NAME", help="names or suffixes to leave out"
    )
    group.add_argument("--bias", choices=BIASES, default=lora["bias"], help="biases of the base to train (%(default)s)")
    group.add_argument(
        "--modules-to-save", nargs="+", default=(), metavar="NAME", help="ends of names of modules to train whole"
    )
    group.add_argument(
        "--trainable-token-indices",
        nargs="+",
        type=int,
        default=(),
        metavar="ID",
        help="tokens whose embeddings to train",
    )
    group.add_argument(
        "--ensure-weight-tying", action="store_true", help="tied embeddings stay tied where one is trained"
    )
    group.add_argument("--layers-to-transform", nargs="+", type=int, metavar="N", help="indices of layers (all)")
    for what, number in (("rank", int), ("alpha", float)):
        group.add_argument(
            f"--{what}-pattern",
            nargs="+",
            default=(),
            type=functools.partial(_pattern, number=number),
            metavar=f"NAME={what.upper()}",
            help=f"another {what} where a name ends so, or matches so",
        )

    group = parser.add_argument_group("processes")
    group.add_argument("--tp", type=int, default=job["tp"], help="processes that the model is cut over (%(default)s)")
    group.add_argument("--dp", type=int, default=job["dp"], help="processes that the data is cut over (%(default)s)")
    group.add_argument("--sequence-parallel", action="store_true", help="cut the sequence between the layers too")
    group.add_argument("--fuse-qkv", action="store_true", help="one projection in place of q_proj, k_proj and v_proj")
    group.add_argument("--fuse-gate-up", action="store_true", help="one projection in place of gate_proj and up_proj")
    group.add_argument(
        "--kv-size-multiplier", type=int, metavar="N", help="copies of each key-value head (as many as --tp needs)"
    )
    group.add_argument(
        "--device",
        choices=list(BACKENDS),
        default=job["device"],
        help="cpu: gloo; cuda: nccl; xla: Trainium (%(default)s)",
    )

    group = parser.add_argument_group("training")
    group.add_argument("--dtype", choices=list(DTYPES), help="of the base (that of its files)")
    group.add_argument("--quantize", choices=CODES, help="hold the base's linear layers in few bits (as they are)")
    numbers = {
        "sequence_length": "tokens per row",
        "batch_size": "rows per optimizer step, over all processes",
        "accumulation": "microbatches per step",
        "steps": "optimizer steps",
        "learning_rate": "its peak",
        "warmup": "steps of warm-up",
        "weight_decay": "of AdamW",
        "beta1": "of AdamW",
        "beta2": "of AdamW",
        "max_grad_norm": "gradients are clipped to it",
        "seed": "of factors, order of rows, dropout",
        "eval_every": "steps between evaluations; 0: before and after only",
        "checkpoint_every": "steps between checkpoints; 0: none",
        "keep_checkpoints": "how many stay",
        "log_every": "steps between lines of the log",
    }
    for name, what in numbers.items():
        group.add_argument(flag(name), type=type(job[name]), default=job[name], help=f"{what} (%(default)s)")
    group.add_argument(
        "--loraplus-lr-ratio", type=float, metavar="X", help="LoRA+: lora_B moves X times as fast as lora_A"
    )
    group.add_argument(
        "--loraplus-lr-embedding",
        type=float,
        default=job["loraplus_lr_embedding"],
        metavar="X",
        help="LoRA+: peak rate of embeddings' factors (%(default)s)",
    )
    group.add_argument("--lorafa", action="store_true", help="LoRA-FA: freeze lora_A, correct lora_B's gradient")
    group.add_argument("--zero1", action="store_true", help="shard the optimizer's state over --dp (ZeRO-1)")
    group.add_argument(
        "--scheme",
        choices=WORDS,
        help="rank: cut factors over their rank, for large ones; auto: where that is cheaper",
    )
    group.add_argument(
        "--machine", nargs="+", metavar="NAME|FILE", help=f"for auto: {', '.join(MACHINES)}, or JSON files, as in cost"
    )
    group.add_argument("--activation-checkpointing", action="store_true", help="compute layers again in the backward")
    group.add_argument(
        "--recompute", choices=POLICIES, help="compute again there what is cheap: norms, products of activations"
    )
    group.add_argument("--quiet", action="store_true", help="no progress bar")
    parser.set_defaults(run=_finetune)


def _generate_options(parser: argparse.ArgumentParser) -> None:
    from adapters.generate import DEVICES, Request
    from adapters.launch import flag
    from adapters.models import DTYPES

    default: dict[str, Any] = {f.name: f.default for f in fields(Request)}
    parser.add_argument("--model", required=True, metavar="DIR", help="as for finetune; or a Mixtral")
    parser.add_argument(
        "--prompt",
        dest="prompts",
        required=True,
        action="append",
        metavar="TEXT",
        help="what to go on from; several times: all at once",
    )
    parser.add_argument(
        "--adapter",
        dest="adapters",
        default=[],
        action="append",
        metavar="DIR",
        help="a PEFT adapter; several times: one for each prompt",
    )
    parser.add_argument("--chat", action="store_true", help="a prompt is what a user says, for the chat template")
    numbers = {
        "max_new_tokens": "tokens at most",
        "temperature": "draw tokens at it; 0: take the likeliest",
        "top_p": "draw among the likeliest, whose probabilities come to it",
        "top_k": "draw among so many of the likeliest; 0: among all",
        "seed": "of the draws",
        "tp": "processes that the model is cut over",
    }
    for name, what in numbers.items():
        kind = type(default[name])
        parser.add_argument(flag(name), type=kind, default=default[name], help=f"{what} (%(default)s)")
    parser.add_argument("--sequence-parallel", action="store_true", help="as in finetune; the text is the same")
    parser.add_argument("--device", choices=DEVICES, default=default["device"], help="(%(default)s)")
    parser.add_argument("--dtype", choices=list(DTYPES), help="of the base (that of its files)")
    parser.add_argument("--quiet", action="store_true", help="write all of the text at once, without a progress bar")
    parser.set_defaults(run=_generate)


def _cost_options(parser: argparse.ArgumentParser) -> None:
    from adapters.estimate import ENDS, LINEARS, PRESETS, Plan
    from adapters.launch import flag
    from adapters.schemes import WORDS
    from lora_fn.machines import MACHINES

    default: dict[str, Any] = {f.name: f.default for f in fields(Plan)}
    group = parser.add_argument_group("what")
    group.add_argument(
        "--preset", choices=list(PRESETS), action="append", default=[], help="a model by its sizes; several times: each"
    )
    group.add_argument(
        "--model",
        type=Path,
        action="append",
        default=[],
        metavar="DIR",
        help="a Hugging Face model, or its config.json",
    )
    group.add_argument("--rank", type=int, default=default["rank"], help="LoRA rank (%(default)s)")
    group.add_argument(
        "--target-modules",
        nargs="+",
        default=LINEARS,
        metavar="NAME",
        help=f"what is adapted, of {', '.join(LINEARS)} (these), {', '.join(ENDS)}",
    )
    group.add_argument(
        "--scheme",
        choices=WORDS,
        help="as in finetune: rank, of the layers that can have it; auto: each layer's cheapest (the rules table's)",
    )
    group.add_argument("--share-a", action="store_true", dest="share_A", help="one lora_A for q, k, v; for gate, up")
    group = parser.add_argument_group("where")
    group.add_argument(
        "--machine",
        nargs="+",
        default=["trn1"],
        metavar="NAME|FILE",
        help=f"{', '.join(MACHINES)}, or JSON files of their constants, each over those before it (trn1)",
    )
    group.add_argument(
        "--set",
        nargs="+",
        default=(),
        type=functools.partial(_pattern, number=float),
        metavar="NAME=X",
        help="other constants: latency=15e-6, memory_bandwidth=inf, ...",
    )
    numbers = {
        "tp": "processes that the model is cut over",
        "dp": "processes that the data is cut over",
        "tokens": "of a microbatch, in each tensor-parallel group",
        "microbatches": "of a step, in each tensor-parallel group",
    }
    for name, what in numbers.items():
        group.add_argument(flag(name), type=int, default=default[name], help=f"{what} (%(default)s)")
    group.add_argument("--sequence-length", type=int, metavar="N", help="tokens per row (all of a microbatch)")
    group.add_argument("--sequence-parallel", action="store_true", help="cut the sequence between the layers too")
    group.add_argument("--activation-checkpointing", action="store_true", help="compute layers again in the backward")
    group = parser.add_argument_group("how it is told")
    group.add_argument("--json", action="store_true", help="as JSON, a list with an object for each model")
    group.add_argument(
        "--plot", type=Path, metavar="FILE", help="draw LoRA's share against nodes, TP and rank too, as a PNG"
    )
    parser.set_defaults(run=_cost)


def _option(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"{text!r} has no '='")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value


def _start(options: argparse.Namespace) -> dict[str, Any]:
    """The fields of `LoraSpec` that say how the factors begin."""
    how = {"true": True, "false": False}.get(options.init_lora_weights, options.init_lora_weights)
    field = f"{how}_config"
    if options.init_options and field not in OPTIONS:
        raise SpecError(f"--init-options: {options.init_lora_weights!r} has none; leave them out.")
    needed = options.init_options or how == "loftq"
    return {"init_lora_weights": how} | ({field: {**OPTIONS[field], **dict(options.init_options)}} if needed else {})


def _pattern(text: str, *, number: Callable[[str], float]) -> tuple[str, float]:
    name, equals, value = text.rpartition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"{text!r} has no '='")
    try:
        return name, number(value)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{value!r} is no number") from error


def _finetune(options: argparse.Namespace, given: list[str]) -> int:
    from adapters import launch, train

    values = _job_values(options)
    if options.sweep:
        return _sweep(options, given, values)
    job = train.Job(**values)
    if job.processes > 1 and not launch.is_worker():
        train.check(job, resume=options.resume)
        return launch.launch("adapters.cli", given, processes=job.processes)
    launch.end_with_launcher()
    result = train.finetune(job, resume=options.resume, quiet=options.quiet)
    if launch.is_first():
        _report(result, job)
    launch.leave()
    return 0


def _generate(options: argparse.Namespace, given: list[str]) -> int:
    from adapters import generate, launch

    told = {f.name: getattr(options, f.name) for f in fields(generate.Request)}
    request = generate.Request(**told | {name: tuple(told[name]) for name in ("prompts", "adapters")})
    if request.tp > 1 and not launch.is_worker():
        generate.check(request)
        return launch.launch("adapters.cli", given, processes=request.tp)
    launch.end_with_launcher()
    texts = generate.run(request, quiet=options.quiet)
    if launch.is_first() and len(texts) > 1:
        print(generate.listing(request, texts), end="")
    elif launch.is_first() and options.quiet:
        print(texts[0])
    launch.leave()
    return 0


def _job_values(options: argparse.Namespace) -> dict[str, Any]:
    """The fields of `Job`."""
    from adapters.train import Job

    named: Any = options.target_modules
    lora = LoraSpec(
        rank=options.rank,
        alpha=options.alpha,
        dropout=options.dropout,
        use_rslora=options.rslora,
        use_dora=options.dora,
        share_A=options.share_a,
        lora_bias=options.lora_bias,
        **_start(options),
        target_modules="all-linear" if named == ["all-linear"] else tuple(named),
        exclude_modules=tuple(options.exclude_modules),
        bias=options.bias,
        modules_to_save=tuple(options.modules_to_save),
        trainable_token_indices=tuple(options.trainable_token_indices),
        ensure_weight_tying=options.ensure_weight_tying,
        layers_to_transform=options.layers_to_transform,
        rank_pattern=options.rank_pattern,
        alpha_pattern=options.alpha_pattern,
    )
    own: dict[str, Any] = {"lora": lora, "data": tuple(options.data), "eval_data": tuple(options.eval_data)}
    own["machine"] = _machine(options.machine)[0] if options.machine else None
    return {f.name: getattr(options, f.name) for f in fields(Job) if f.name not in own} | own


def _sweep(options: argparse.Namespace, given: list[str], values: dict[str, Any]) -> int:
    from adapters import launch, sweep

    if options.resume:
        raise SpecError(
            "--resume: a sweep keeps no checkpoints to go on from; leave it out, and choose another --output."
        )
    jobs = sweep.read(options.sweep, values, at_once=options.sweep_at_once)
    processes = next(iter(jobs.values())).processes
    if processes > 1 and not launch.is_worker():
        sweep.check(jobs)
        return launch.launch("adapters.cli", given, processes=processes)
    launch.end_with_launcher()
    done = sweep.sweep(jobs, at_once=options.sweep_at_once, quiet=options.quiet)
    if launch.is_first():
        print(done.table())
        if not done.same_held_out:
            print(
                "The held-out rows are not the same for all (other data, or another seed); --eval-data makes them so."
            )
        print(f"The adapters are in {options.output}/NAME (PEFT's files); the curves are {options.output}/loss.png.")
    launch.leave()
    if done.diverged:
        raise LoraFnError(
            f"{', '.join(done.diverged)}: diverged, so that no adapter was written; give a lower learning rate."
        )
    return 0


def _report(result: Any, job: Any) -> None:
    from adapters.convert import table

    def told(loss: float | None) -> str:
        return "not measured" if loss is None else f"{loss:.4f}"

    rows = [["", "loss"], ["held out, before", told(result.loss_before)], ["held out, after", told(result.loss_after)]]
    print(table([*rows, ["training, last step", told(result.train_loss)]]))
    if job.quantize is not None:
        sizes = [[f"as {job.quantize}", f"{result.base.held:,}"], ["unquantised", f"{result.base.plain:,}"]]
        print(table([["the base", "bytes per process"], *sizes]))
    print(f"The adapter is in {job.output} (PEFT's files); the curve is {job.output}/loss.png.")


def _merge(options: argparse.Namespace, given: list[str]) -> int:
    from adapters.merge import merge

    done = merge(
        options.model, options.adapter, options.output, dtype=options.dtype, verify=options.verify, quiet=options.quiet
    )
    print(f"{options.output}: {done.layers} layers merged.")
    if done.difference is not None:
        print(f"Logits: the adapters change them by {done.effect:.2g}, the merged model is {done.difference:.2g} off.")
    return 0


def _shard(options: argparse.Namespace, given: list[str]) -> int:
    from adapters import sharded

    mesh = {"tp": options.tp, "pp": options.pp, "model": options.model}
    num = sharded.shard(options.adapter, options.output, **mesh, quiet=options.quiet)
    print(f"{options.output}: {num} layers, tp {options.tp}, pp {options.pp}.")
    return 0


def _consolidate(options: argparse.Namespace, given: list[str]) -> int:
    from adapters import sharded

    num = sharded.consolidate(
        options.checkpoint,
        options.output,
        model=options.model,
        allow_pickle=options.allow_pickle,
        allow_drift=options.allow_drift,
        quiet=options.quiet,
    )
    print(f"{options.output}: a PEFT adapter of {num} layers.")
    return 0


def _reshard(options: argparse.Namespace, given: list[str]) -> int:
    from adapters import sharded

    mesh = {"to_tp": options.to_tp, "from_tp": options.from_tp, "to_pp": options.to_pp}
    num = sharded.reshard(options.checkpoint, options.output, **mesh, quiet=options.quiet)
    print(f"{options.output}: {num} layers, tp {options.to_tp}.")
    return 0


def _extract(options: argparse.Namespace, given: list[str]) -> int:
    from adapters.convert import table
    from adapters.extract import extract

    done = extract(
        options.base,
        options.model,
        options.output,
        rank=options.rank,
        targets=options.target_modules,
        drop=options.drop,
        quiet=options.quiet,
    )
    print(table(done.rows()))
    if done.dropped:
        print(f"Left out: {', '.join(done.dropped)}.")
    print(f"The adapter is in {options.output} (PEFT's files); what it leaves of the difference is {done.error:.3g}.")
    return 0


def _combine(options: argparse.Namespace, given: list[str]) -> int:
    from adapters.combine import combine
    from adapters.convert import table

    told = {f.name: getattr(options, f.name) for f in fields(Combination) if f.name != "svd_driver"}
    done = combine(options.adapter, options.weight, options.output, Combination(**told), quiet=options.quiet)
    print(table(done.rows()))
    print(f"The adapter is in {options.output} (PEFT's files); off the weighted sum it is by {done.error:.3g} of that.")
    return 0


def _inspect(options: argparse.Namespace, given: list[str]) -> int:
    from adapters import convert, sharded

    inspect = sharded.inspect if sharded.is_sharded(options.directory) else convert.inspect
    title, rows = inspect(options.directory)
    print(f"{title}\n{convert.table(rows)}")
    return 0


def _cost(options: argparse.Namespace, given: list[str]) -> int:
    from adapters import estimate, estimate_report

    shapes = [estimate.PRESETS[name] for name in options.preset] + [estimate.read_shape(d) for d in options.model]
    if not shapes:
        known = ", ".join(estimate.PRESETS)
        raise SpecError(f"cost: no model is named; give --preset (one of {known}) or --model.")
    told = {f.name: getattr(options, f.name) for f in fields(estimate.Plan) if hasattr(options, f.name)}
    plan = estimate.Plan(**told, targets=tuple(options.target_modules))
    machine, name = _machine(options.machine, options.set)
    found = [estimate.estimate(shape, plan, machine) for shape in shapes]
    if options.plot:
        estimate_report.plot(options.plot, shapes, plan, machine, name)
    if options.json:
        print(json.dumps([of.values() for of in found], indent=1))
    else:
        print("\n\n".join(estimate_report.text(of, name) for of in found))
    return 0


def _machine(places: Sequence[str], settings: Sequence[tuple[str, float]] = ()) -> tuple[Any, str]:
    """The machine of --machine and --set, and what it is called."""
    from lora_fn import checkpoint, machines

    found: machines.Machine | None = None
    for where in places:
        if where in machines.MACHINES:
            found = machines.MACHINES[where]
            continue
        if not Path(where).is_file():
            known = ", ".join(machines.MACHINES)
            raise SpecError(f"--machine: {where!r} is no file, and none of {known}; name one of these, or a JSON file.")
        values = checkpoint.read_json(Path(where))
        found = machines.from_values(values, where) if found is None else found.with_values(values, where)
    assert found is not None  # nargs="+"
    names = [*(Path(where).name for where in places), *(f"{name}={value:g}" for name, value in settings)]
    values = {name: int(value) if value.is_integer() else value for name, value in settings}
    return found.with_values(values, "--set"), " with ".join([names[0], ", ".join(names[1:])][: len(names)])


if __name__ == "__main__":
    code = main()
    from adapters.launch import end

    end(code)
