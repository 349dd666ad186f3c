"""Whose gradients are right, and what is communicated for them? NxD's own LoRA, Optimum Neuron's, and ours.

    python benchmarks/gradients.py --nxd CHECKOUT --optimum CHECKOUT --tp 2

Each program adapts the same layer of neuronx-distributed (NxD), with the same weights, factors, input and cotangent, in
TP processes over gloo (NxD's CPU mode, no Neuron device). Output and gradients are compared with the dense oracle of
the tests, in float64, on every process: max|a - b| / max|b|, the worst. Where a program stops, the table says with
what. Collectives are counted where they reach torch's dispatcher, in the forward, in the backward, and in what runs
once a step: `lora_fn.sync_gradients` for "ours, deferred", NxD's own `allreduce_sequence_parallel_gradients` for NxD
and Optimum Neuron. Their bytes are those of the whole tensor that is summed, gathered or scattered. "frozen" is NxD's
layer with no adapter. The interpreter must have what the checkouts need: that of `make test-nxd`, or --python.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
HIDDEN, WIDE, VOCABULARY, BATCH, LENGTH, RANK, ALPHA = 256, 384, 512, 2, 32, 8, 16.0
HEADS, HEAD = 8, 32
SCALING = ALPHA / RANK
PARTS = ("q", "k", "v")
LAYERS = ("column", "row", "embedding", "qkv", "qkv, fused", "qkv, 2 copies")
DTYPES = ("float32", "bfloat16")
PROGRAMS = ("frozen", "NxD", "Optimum Neuron", "ours, summed", "ours, deferred")


@dataclass(frozen=True, kw_only=True)
class Case:
    """One layer of neuronx-distributed."""

    layer: str
    tp: int
    sequence: bool
    dtype: str

    @property
    def kind(self) -> str:
        """Its class."""
        return self.layer.partition(",")[0]

    @property
    def copies(self) -> int:
        """Of each key-value head."""
        return 2 if "copies" in self.layer else 1

    @property
    def key_value(self) -> int:
        """Key-value heads: with copies, as few as give each process one."""
        return self.tp // self.copies if self.copies > 1 else HEADS // 2

    @property
    def sizes(self) -> dict[str, int]:
        """Outputs of each part."""
        return {"q": HEADS * HEAD, "k": self.key_value * HEAD, "v": self.key_value * HEAD}


# ------------------------------------------------------------------------------------------------- in each process


def build(case: Case) -> Any:
    """A model of the one layer, frozen."""
    import torch
    from neuronx_distributed.modules.qkv_linear import GQAQKVColumnParallelLinear
    from neuronx_distributed.parallel_layers import layers, parallel_state
    from torch import nn

    torch.manual_seed(0)
    common = {"dtype": getattr(torch, case.dtype), "sequence_parallel_enabled": case.sequence}
    along = common | {"sequence_dimension": 0 if case.sequence else None}
    made: dict[str, Callable[[], Any]] = {
        "column": lambda: layers.ColumnParallelLinear(HIDDEN, WIDE, bias=False, gather_output=False, **along),
        "row": lambda: layers.RowParallelLinear(WIDE, HIDDEN, bias=False, input_is_parallel=True, **along),
        "embedding": lambda: layers.ParallelEmbedding(VOCABULARY, HIDDEN, **along),
        "qkv": lambda: GQAQKVColumnParallelLinear(
            HIDDEN,
            [case.sizes["q"], case.sizes["k"]],
            bias=False,
            gather_output=False,
            kv_size_multiplier=case.copies,
            fuse_qkv="fused" in case.layer,
            **common,
        ),
    }
    if parallel_state._KV_SHARED_GROUP is not None:
        parallel_state.destroy_kv_group()
    model = nn.Module()
    model.config = SimpleNamespace(num_attention_heads=HEADS, num_key_value_heads=case.key_value, to_dict=dict)
    model.add_module(f"{case.kind}_proj", made[case.kind]())
    return model.requires_grad_(False)


def draw(case: Case) -> tuple[dict[str, Any], Any, Any]:
    """The canonical parameters, the whole input and the whole cotangent. The factors are in float32."""
    import torch

    torch.manual_seed(1)
    dtype = getattr(torch, case.dtype)
    inside = {"column": HIDDEN, "row": WIDE, "embedding": VOCABULARY, "qkv": HIDDEN}[case.kind]
    outs = case.sizes if case.kind == "qkv" else {"": WIDE if case.kind == "column" else HIDDEN}
    names = {part: f".{part}" if part else "" for part in outs}
    weights = {f"weight{names[part]}": torch.randn(out, inside).to(dtype) for part, out in outs.items()}
    factors = {f"lora_B{names[part]}": torch.randn(out, RANK) for part, out in outs.items()}
    whole = weights | {"lora_A": torch.randn(RANK, inside)} | factors
    if case.kind == "embedding":
        whole["weight"] = whole["weight"].T.contiguous()
        x = torch.randint(0, VOCABULARY, (BATCH, LENGTH))
    else:
        x = torch.randn(LENGTH, BATCH, inside).to(dtype)
    leading = (BATCH, LENGTH) if case.kind == "embedding" and not case.sequence else (LENGTH, BATCH)
    return whole, x, torch.randn(*leading, outs.get("q") or outs[""]).to(dtype)


def cut(case: Case, place: Any, name: str, whole: Any) -> Any:
    """What a process holds of a canonical parameter, or of the output, which is that of its query heads."""
    from nxd_attention import Case as Heads
    from nxd_attention import held

    base, _, part = name.partition(".")
    if case.kind == "qkv":
        queries, keys = held(Heads(case.tp, HEADS, case.key_value, case.copies), place.rank)
        if base == "lora_A":
            return whole
        if base == "y":
            return whole.unflatten(-1, (-1, HEAD))[..., queries, :].flatten(-2)
        return whole.unflatten(0, (-1, HEAD))[queries if part == "q" else keys].flatten(0, 1)
    dims = {
        "column": {"weight": 0, "lora_B": 0, "y": -1},
        "row": {"weight": 1, "lora_A": 1, "x": -1},
        "embedding": {"weight": 0, "lora_A": 1},
    }
    dim = dims[case.kind].get(base)
    return whole if dim is None else place.chunk(whole, dim)


def by_sequence(case: Case, place: Any, whole: Any, name: str) -> Any:
    """The part that sequence parallel leaves of the input ("x") or the output ("y"): of one of them."""
    split = {"column": "x", "qkv": "x", "row": "y", "embedding": "y"}[case.kind] == name
    return place.chunk(whole, 0) if case.sequence and split else whole


def output(y: Any) -> Any:
    """The one output; of q, k and v, something short that pairs each query head with its key-value head."""
    if not isinstance(y, tuple):
        return y
    q, k, v = (part.unflatten(-1, (-1, HEAD)) for part in y)
    k, v = (part.repeat_interleave(q.shape[-2] // part.shape[-2], -2) for part in (k, v))
    return (q * k + v).flatten(-2)


def truth(case: Case, whole: dict[str, Any], x: Any, cotangent: Any) -> dict[str, Any]:
    """The output and every gradient of the dense layer, in float64."""
    import oracle

    params = {name: p.double().requires_grad_() for name, p in whole.items()}
    x = (x.T if case.sequence else x) if case.kind == "embedding" else x.double().requires_grad_()
    scaling = SCALING if "lora_A" in whole else None
    words: dict[str, Any] = {"kind": "embedding" if case.kind == "embedding" else "linear", "scaling": scaling}
    if case.kind == "qkv":
        words = {"kind": "linear", "parts": [(part, size, scaling) for part, size in case.sizes.items()]}
    y = oracle.forward(params, x, **words)
    y = output(y.split(list(case.sizes.values()), -1)) if case.kind == "qkv" else y
    (y * cotangent.double()).sum().backward()
    found = {name: p.grad for name, p in params.items()}
    return found | {"y": y.detach(), "x": x.grad}


def recorder() -> Any:
    """A context that counts collectives and the bytes of whole tensors: `seen` is {kind: [number, bytes]}."""
    from nxd_layers import KINDS
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    class Recorder(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.seen: dict[str, list[int]] = {}
            self.summed = 0  # the bytes of a sum that is scattered next

        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result, name = function(*args, **kwargs or {}), function._opname
            if not function.namespace.startswith(("c10d", "_c10d")) or name == "wait_tensor":
                return result
            tensors = tree_leaves(result if name == "all_gather_into_tensor" else args[0])
            size = sum(t.numel() * t.element_size() for t in tensors)
            if KINDS[name] is None:
                self.summed = size
            else:
                number, before = self.seen.get(KINDS[name], (0, 0))
                self.seen[KINDS[name]] = [number + 1, before + (self.summed or size)]
                self.summed = 0
            return result

    return Recorder()


Factors = list[tuple[tuple[str, ...], Any]]  # canonical names that lie side by side, and the parameter


def of_base(layer: Any, kind: str, before: str) -> Factors:
    """The parameters of a layer of neuronx-distributed, or of one that stands for a factor."""
    if kind != "qkv":
        return [((before,), layer.weight)]
    if layer.fuse_qkv:
        return [(tuple(f"{before}.{part}" for part in PARTS), layer.weight_qkv)]
    return [((f"{before}.{part}",), getattr(layer, f"weight_{part}")) for part in PARTS]


def frozen(model: Any, case: Case) -> tuple[Factors, Callable[[], None]]:
    return [], lambda: None


def nxd(model: Any, case: Case) -> tuple[Factors, Callable[[], None]]:
    """Its own LoRA, which moves its factors to an XLA device, whatever there is."""
    from neuronx_distributed.modules.lora import LoraConfig, LoraModel
    from torch import nn

    move, name = nn.Module.to, f"{case.kind}_proj"
    nn.Module.to = lambda self, *args, **options: self if args == ("xla",) else move(self, *args, **options)
    try:
        LoraModel(model, LoraConfig(lora_rank=RANK, lora_alpha=ALPHA, target_modules=[name]))
    finally:
        nn.Module.to = move
    layer = model.get_submodule(name)
    factors = [(("lora_A",), layer.lora_A.weight), *of_base(layer.lora_B, case.kind, "lora_B")]
    return factors, lambda: its_sync(case, factors)


def optimum(model: Any, case: Case) -> tuple[Factors, Callable[[], None]]:
    """Its LoRA, with the factors in float32, as its get_peft_model leaves them."""
    from optimum.neuron.peft.tuners import NeuronLoraModel
    from peft import LoraConfig

    name = f"{case.kind}_proj"
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=[name])
    NeuronLoraModel(model, {"default": config}, "default")._cast_adapter_dtype("default", autocast_adapter_dtype=True)
    layer = model.get_submodule(name)
    if case.kind == "embedding":
        factors = [(("lora_A",), layer.lora_embedding_A["default"]), (("lora_B",), layer.lora_embedding_B["default"])]
    else:
        a, b = layer.lora_A["default"], layer.lora_B["default"]
        factors = [(("lora_A",), a.weight), *of_base(b, case.kind, "lora_B")]
    return factors, lambda: its_sync(case, factors)


def its_sync(case: Case, factors: Factors) -> None:
    """What neuronx-distributed's optimizer does once a step under sequence parallel: it sums what is marked."""
    import torch
    from neuronx_distributed.parallel_layers import grads

    if case.sequence:
        grads.allreduce_sequence_parallel_gradients(torch.optim.SGD([p for _, p in factors], lr=1.0))


def ours(gradients: str) -> Callable[[Any, Case], tuple[Factors, Callable[[], None]]]:
    """`adapters.wrap`; one lora_A for q, k and v, as the others have it."""

    def adapt(model: Any, case: Case) -> tuple[Factors, Callable[[], None]]:
        import adapters
        import lora_fn

        fused = case.kind == "qkv"
        names = tuple(f"{part}_proj" for part in PARTS) if fused else (f"{case.kind}_proj",)
        spec = lora_fn.LoraSpec(rank=RANK, alpha=ALPHA, target_modules=names, share_A=fused)
        adapters.wrap(model, spec, gradients=gradients)
        tree = adapters.factors(model)

        def sync() -> None:
            found = {path: {n: p.grad for n, p in ps.items()} for path, ps in tree.items()}
            for path, grads in lora_fn.sync_gradients(found, adapters.specs(model)).items():
                for n, grad in grads.items():
                    tree[path][n].grad = grad

        [params] = tree.values()
        return [((n,), p) for n, p in params.items()], sync if gradients == "deferred" else lambda: None

    return adapt


ADAPT = dict(zip(PROGRAMS, (frozen, nxd, optimum, ours("summed"), ours("deferred")), strict=True))


def check(case: Case, program: str, place: Any) -> dict[str, Any]:
    """What one process found of one program: errors, whether replicas are alike, collectives, or where it stopped."""
    import torch
    from nxd_layers import error

    from benchmarks.timing import largest

    whole, x, cotangent = draw(case)
    model = build(case)
    layer = model.get_submodule(f"{case.kind}_proj")
    found: dict[str, Any] = {}

    def local(names: tuple[str, ...], values: dict[str, Any], shape: Any) -> Any:
        """Of what a program does not cut, the whole."""
        every = torch.cat([values[n] for n in names])
        return every if every.shape == shape else torch.cat([cut(case, place, n, values[n]) for n in names])

    with torch.no_grad():
        for names, p in of_base(layer, case.kind, "weight"):
            p.copy_(local(names, whole, p.shape))
    if program == "frozen":
        whole = {name: p for name, p in whole.items() if name.startswith("weight")}
    step = "adapting"
    try:
        factors, sync = ADAPT[program](model, case)
        with torch.no_grad():
            for names, p in factors:
                p.copy_(local(names, whole, p.shape))
        mine = by_sequence(case, place, cut(case, place, "x", x) if case.kind == "row" else x, "x").clone()
        mine = mine.requires_grad_() if mine.is_floating_point() else mine
        expected = truth(case, whole, x, cotangent)

        def outgoing(t: Any) -> Any:
            return by_sequence(case, place, cut(case, place, "y", t), "y")

        step = "forward"
        with recorder() as forward:
            y = output(model.get_submodule(f"{case.kind}_proj")(mine))
        found["y"], found["forward"] = error(y, outgoing(expected["y"])), forward.seen
        if y.requires_grad:
            step = "backward"
            with recorder() as backward:
                (y * outgoing(cotangent)).sum().backward()
            found["backward"] = backward.seen
        step = "sync"
        with recorder() as synced:
            sync()
        found["sync"] = synced.seen
    except Exception as raised:
        said = str(raised).strip().splitlines() or [""]
        return found | {"stopped": f"{step}: {type(raised).__name__}: {said[0]}"}
    if mine.grad is not None:
        dx = cut(case, place, "x", expected["x"]) if case.kind == "row" else expected["x"]
        found["dx"] = error(mine.grad, by_sequence(case, place, dx, "x"))
    for names, p in factors:
        column = f"d{names[0].partition('.')[0].removeprefix('lora_')}"
        found[column] = largest([found.get(column, 0.0), error(p.grad, local(names, expected, p.shape))])
        if p.shape == torch.cat([whole[n] for n in names]).shape:
            found["agree"] = min(found.get("agree", 1.0), place.alike(p.grad))
    return found


def worst(each: list[dict[str, Any]]) -> dict[str, Any]:
    """Over all processes: the greatest error, agreement of all, the first that stopped, collectives of the first."""
    from benchmarks.timing import largest

    found: dict[str, Any] = {}
    for one in each:
        for key, value in one.items():
            worse = min if key == "agree" else largest
            found[key] = worse([found.get(key, value), value]) if isinstance(value, float) else found.get(key, value)
    return found


def work(result: Path, with_optimum: bool) -> None:
    """Every case, in one of the processes that `start` started; the first of them writes what all found."""
    from foreign_programs import started  # first: it replaces what is for devices only

    # isort: split
    import logging

    import torch.distributed as dist
    import tqdm
    import xm_on_cpu

    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    xm_on_cpu.start()
    tp = int(os.environ["WORLD_SIZE"])
    started({"tp": tp})
    from nxd_layers import Place

    place = Place()
    programs = [p for p in PROGRAMS if p != "Optimum Neuron" or with_optimum]
    cases = [
        (Case(layer=layer, tp=tp, sequence=sequence, dtype=dtype), program)
        for layer in LAYERS
        for sequence in (False, True)
        for dtype in DTYPES
        for program in programs
    ]
    rows = []
    for case, program in tqdm.tqdm(cases, desc=f"TP {tp}", disable=place.rank > 0):
        each: list[Any] = [None] * tp
        dist.all_gather_object(each, check(case, program, place))
        told = {"tp": tp, "layer": case.layer, "sequence": case.sequence, "dtype": case.dtype, "program": program}
        rows.append(told | worst(each))
    if place.rank == 0:
        result.write_text(json.dumps(rows, indent=1))
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)  # torch_xla has nothing to shut down


# -------------------------------------------------------------------------------------------------------- the table


def cell(value: Any) -> str:
    """An error, to one digit after the point."""
    return "-" if value is None else f"{value:.1e}"


def communicated(seen: dict[str, list[int]] | None) -> str:
    """Such as "2 all-reduce (64.0)"."""
    if seen is None:
        return "-"
    return ", ".join(f"{n} {kind} ({size / 1024:.1f})" for kind, (n, size) in sorted(seen.items())) or "0"


def aligned(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table whose columns are as wide as their widest cell."""
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    lines = [" | ".join(value.ljust(width) for value, width in zip(row, widths, strict=True)) for row in [head, *rows]]
    rule = " | ".join("-" * width for width in widths)
    return "\n".join(f"| {line} |" for line in [lines[0], rule, *lines[1:]])


def tables(rows: list[dict[str, Any]]) -> str:
    """Errors of every program in both dtypes; and what it communicates, with the bytes of bfloat16."""
    reasons = dict.fromkeys(row["stopped"] for row in rows if "stopped" in row)
    numbers = {reason: str(number) for number, reason in enumerate(reasons, 1)}
    pairs: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for row in rows:
        name = (str(row["tp"]), row["layer"], "on" if row["sequence"] else "off", row["program"])
        pairs.setdefault(name, []).append(row)
    errors, counts = [], []
    for name, both in pairs.items():
        agree = min((row["agree"] for row in both if "agree" in row), default=None)
        stopped = dict.fromkeys(numbers[row["stopped"]] for row in both if "stopped" in row)
        found = [cell(row.get(key)) for row in both for key in ("y", "dx", "dA", "dB")]
        errors.append([*name, *found, {None: "-", 0.0: "NO", 1.0: "yes"}[agree], ", ".join(stopped)])
        counts.append([*name, *(communicated(both[-1].get(key)) for key in ("forward", "backward", "sync"))])
    head = ["TP", "layer", "SP", "program", *("y", "dx", "dA", "dB"), *(f"{n} bf16" for n in ("y", "dx", "dA", "dB"))]
    listed = "\n".join(f"{number}. {reason}" for reason, number in numbers.items())
    return (
        f"{aligned([*head, 'replicas agree', 'stopped'], errors)}\n\nStopped in:\n\n{listed}\n\n"
        f"Collectives of a process in bfloat16 (KiB of the whole tensors):\n\n"
        f"{aligned(['TP', 'layer', 'SP', 'program', 'forward', 'backward', 'once a step'], counts)}"
    )


def start(nxd: Path, optimum: Path | None, tp: int, python: str) -> list[dict[str, Any]]:
    """Measure with that many processes.

    Args:
        nxd: A checkout of neuronx-distributed.
        optimum: One of Optimum Neuron; None leaves its rows out.
        tp: Processes.
        python: An interpreter that has what they need.

    Returns:
        A row per layer, sequence parallel, dtype and program.
    """
    paths = [ROOT, ROOT / "tests", nxd.resolve() / "src", *([optimum.resolve()] if optimum else [])]
    words = [python, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(tp), __file__, "--worker"]
    environment = {"PYTHONPATH": os.pathsep.join(map(str, paths)), "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as directory:
        result = Path(directory) / "result.json"
        words += [str(result), *(["--optimum", str(optimum)] if optimum else [])]
        subprocess.run(words, check=True, env=os.environ | environment, stdout=subprocess.DEVNULL)
        return json.loads(result.read_text())


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--nxd", type=Path, help="a checkout of neuronx-distributed")
    parser.add_argument("--optimum", type=Path, help="a checkout of optimum-neuron (without: its rows are left out)")
    parser.add_argument("--tp", type=int, nargs="+", default=[2], choices=(2, 4), help="how many processes")
    parser.add_argument("--python", default=sys.executable, help="an interpreter that has what the checkouts need")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work(options.worker, options.optimum is not None)
    for checkout, inside in ((options.nxd, "src/neuronx_distributed"), (options.optimum, "optimum/neuron")):
        if not (checkout is None and inside.startswith("optimum")) and not (checkout and (checkout / inside).is_dir()):
            parser.error(f"{checkout} is no checkout with {inside} in it; name one.")
    rows = [row for tp in options.tp for row in start(options.nxd, options.optimum, tp, options.python)]
    print(tables(rows))


if __name__ == "__main__":
    main()
