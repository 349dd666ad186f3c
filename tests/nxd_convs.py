"""Run by torchrun where neuronx-distributed is: its convolutions and expert layers, wrapped, beside dense ones.

    python -m torch.distributed.run --nproc-per-node 4 nxd_convs.py RESULTS.json

As nxd_layers.py.
"""

import json
import os
import sys
import tempfile
import warnings
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import nxd_layers  # first: it replaces what is for devices only

# isort: split
import oracle
import torch
import torch.distributed as dist
from neuronx_distributed.modules.moe import moe_parallel_layers
from neuronx_distributed.parallel_layers import grads, layers
from neuronx_distributed.utils import model_utils
from nxd_layers import ALPHA, RANK, SCALING, Model, Place, Recorder, draw, error, rms, worst
from safetensors.torch import load_file

import adapters
import lora_fn
from adapters import bind
from lora_fn import LoraFnError, LoraSpec

WINDOW = {"kernel_size": (3, 2), "stride": (2, 1), "padding": (1, 0)}
STEPS = {"stride": (2, 1), "padding": (1, 0)}
EXPERTS = 3


@dataclass(frozen=True)
class Case:
    """One layer: its class here, its arguments, and how the test sees it."""

    layer: str
    arguments: dict = field(default_factory=dict)
    dtype: torch.dtype = torch.float32
    inside: int = 24
    out: int = 40
    tokens: tuple[int, ...] = (5,)


WIDE = {"dtype": torch.bfloat16, "inside": 128, "out": 128}
CASES = {
    "output channels": Case("output", {"bias": False, "gather_output": False}),
    "output channels, bias": Case("output", {"gather_output": False}),
    "output channels, gathered": Case("output"),
    "output channels, padded, gathered": Case("output", {"partition_pad": True}, out=37),
    "output channels, padded": Case("output", {"partition_pad": True, "gather_output": False}, out=37),
    "output channels, bfloat16": Case("output", {"gather_output": False}, **WIDE),
    "input channels": Case("input", {"bias": False, "input_is_parallel": True}),
    "input channels, bias": Case("input", {"input_is_parallel": True}),
    "input channels, whole input": Case("input"),
    "input channels, bfloat16": Case("input", {"input_is_parallel": True}, **WIDE),
    "experts, column": Case("column"),
    "experts, column, 4-D": Case("column", tokens=(2, 5)),
    "experts, column, bias": Case("column", {"bias": True}, tokens=(2, 5)),
    "experts, column, stride 2": Case("column", {"stride": 2}),
    "experts, column, bfloat16": Case("column", tokens=(16,), **WIDE),
    "experts, row": Case("row"),
    "experts, row, 4-D": Case("row", tokens=(2, 5)),
    "experts, row, bias": Case("row", {"bias": True}, tokens=(2, 5)),
    "experts, row, partial": Case("row", {"reduce_output": False}),
    "experts, row, bfloat16": Case("row", tokens=(16,), **WIDE),
}

# Class here -> parameter -> the dimension that is cut; what is not named is whole.
CUT = {
    "output": {"weight": 0, "bias": 0, "lora_B": 0},
    "input": {"weight": 1, "lora_A": 1},
    "column": {"weight": 2, "bias": 1, "lora_B": 1},
    "row": {"weight": 1, "lora_A": 2},
}


def is_conv(case):
    return case.layer in ("output", "input")


def features(case):
    """The dimension of activations that holds the features."""
    return 1 if is_conv(case) else -1


def build(case):
    """The real layer, its canonical parameters, its whole input and its cotangent, and the oracle's words for it."""
    torch.manual_seed(0)
    options = {"dtype": case.dtype} | case.arguments
    inside, out = case.inside, case.out
    if is_conv(case):
        classes = {"output": layers.OutputChannelParallelConv2d, "input": layers.InputChannelParallelConv2d}
        module = classes[case.layer](inside, out, **WINDOW, **options)
        shapes = {"weight": (out, inside, 3, 2), "bias": (out,)}
        shapes |= {"lora_A": (RANK, inside, 3, 2), "lora_B": (out, RANK, 1, 1)}
        x, y = (2, inside, 9, 6), (2, out, 5, 5)
        words = {"kind": "conv2d", **STEPS}
    else:
        classes = {
            "column": moe_parallel_layers.ExpertFusedColumnParallelLinear,
            "row": moe_parallel_layers.ExpertFusedRowParallelLinear,
        }
        module = classes[case.layer](EXPERTS, inside, out, **options)
        shapes = {"weight": (EXPERTS, inside, out), "bias": (EXPERTS, out)}
        shapes |= {"lora_A": (EXPERTS, RANK, inside), "lora_B": (EXPERTS, out, RANK)}
        x, y = (EXPERTS, *case.tokens, inside), (EXPERTS, *case.tokens, out)
        words = {"kind": "experts", "fan_in_fan_out": True}
    torch.manual_seed(1)
    whole = {
        name: draw(*s, dtype=case.dtype) for name, s in shapes.items() if name != "bias" or module.bias is not None
    }
    return module, whole, draw(*x, dtype=case.dtype), draw(*y, dtype=case.dtype), words


def locally(case, place, name, whole):
    """What this process holds of a canonical parameter, or of its gradient."""
    if name not in CUT[case.layer]:
        return whole
    stride = case.arguments.get("stride", 1)
    dim = CUT[case.layer][name]
    return place.strided(whole, dim, stride) if stride > 1 else place.chunk(whole, dim)


def entering(case, place, x):
    """What this process is given of x, and so what it gets of x's gradient."""
    cut = case.layer == "row" or case.arguments.get("input_is_parallel")
    return place.chunk(x, features(case)) if cut else x


def leaving(case, place, y):
    """What this process gives of y."""
    cut = case.layer == "column" or (case.layer == "output" and not case.arguments.get("gather_output", True))
    stride = case.arguments.get("stride", 1)
    return y if not cut else place.strided(y, -1, stride) if stride > 1 else place.chunk(y, features(case))


def ran(model, case, place, x, cotangent):
    """The output, the gradient of the input, and what was communicated."""
    x = entering(case, place, x).detach().clone().requires_grad_()
    for p in model.parameters():
        p.grad = None
    with Recorder() as recorder:
        y = model(x)
        (y * leaving(case, place, cotangent)).sum().backward()
    return y, x.grad, recorder.seen


def check(case, place, gradients):
    """Every check of one case."""
    module, whole, x, cotangent, words = build(case)
    model, found = Model(module).requires_grad_(False), {}
    base = {name: p for name, p in whole.items() if not name.startswith("lora_")}
    with torch.no_grad():
        for name, p in base.items():
            module.get_parameter(name).copy_(locally(case, place, name, p))
    own, own_dx, theirs = ran(model, case, place, x, cotangent)
    y_base, _, dx_base = oracle.run(base, x, cotangent, **words)
    found["own dx to the truth"] = error(own_dx, entering(case, place, dx_base))

    adapters.wrap(model, LoraSpec(rank=RANK, alpha=ALPHA, target_modules=("layer",)), seed=3, gradients=gradients)
    layer = model.layer
    assert type(module) is not type(layer) and layer.weight is module.weight
    zero, zero_dx, _ = ran(model, case, place, x, cotangent)
    found["zero B to its own"], found["zero B, dx to its own"] = error(zero, own), error(zero_dx, own_dx)
    if case.arguments.get("reduce_output", True):
        found["zero B to the truth"] = error(zero, leaving(case, place, y_base))
    with torch.no_grad():
        params = {n: p for n, p in layer.params().items() if not n.startswith("lora_")}
        base_path = lora_fn.apply(params, entering(case, place, x), layer.spec.base)
    found["zero B to our own base path alike"] = float(torch.equal(zero, base_path))

    factors = {name: layer.get_parameter(name) for name in ("lora_A", "lora_B")}
    with torch.no_grad():
        for name, p in factors.items():
            p.copy_(locally(case, place, name, whole[name]))
    y, dx, ours = ran(model, case, place, x, cotangent)
    extra = {"all-reduce": 1} if gradients == "summed" else {}
    found["collectives alike"] = float(ours == theirs + Counter(extra))
    y_truth, truths, dx_truth = oracle.run(whole, x, cotangent, scaling=SCALING, **words)
    if not case.arguments.get("reduce_output", True):
        y = place.summed(y)
    found["y"], found["dx"] = error(y, leaving(case, place, y_truth)), error(dx, entering(case, place, dx_truth))
    if case.dtype == torch.bfloat16:
        y_rounded, _, dx_rounded = oracle.run(whole, x, cotangent, dtype=case.dtype, scaling=SCALING, **words)
        found["y, rms"] = rms(y, leaving(case, place, y_truth), leaving(case, place, y_rounded))
        found["dx, rms"] = rms(dx, entering(case, place, dx_truth), entering(case, place, dx_rounded))

    def loss(ps):
        out = torch.func.functional_call(model, ps, (entering(case, place, x),))
        return (out * leaving(case, place, cotangent)).sum()

    transformed = torch.func.grad(loss)({f"layer.{n}": p.detach() for n, p in factors.items()})
    found["torch.func alike"] = float(all(torch.equal(transformed[f"layer.{n}"], p.grad) for n, p in factors.items()))
    if gradients == "deferred":
        marked = [n for n, p in factors.items() if hasattr(p, "sequence_parallel_enabled")]
        found |= {f"d{n} before": error(factors[n].grad, locally(case, place, n, truths[n])) for n in marked}
        grads.allreduce_sequence_parallel_gradients(torch.optim.SGD(list(factors.values()), lr=1.0))
    for name, p in factors.items():
        expected = locally(case, place, name, truths[name])
        found[f"d{name}"] = error(p.grad, expected)
        if expected.shape == truths[name].shape:
            found[f"d{name} alike"] = place.alike(p.grad)
    square = sum(truths[n].square().sum() for n in factors)
    norm = torch.as_tensor(grads.get_grad_norm(list(factors.values()))).reshape(())
    found["norm"] = error(norm, square.sqrt())
    marks = {n: dict(vars(p)) for n, p in factors.items()}
    found["marks alike"] = float(marks == {n: expected_marks(case, place, n, gradients) for n in factors})
    model_utils.move_model_to_device(model, torch.device("cpu"))
    found["marks kept"] = float(all(vars(layer.get_parameter(n)) == marks[n] for n in factors))
    return found


def expected_marks(case, place, name, gradients):
    """What a factor must carry."""
    if name not in CUT[case.layer]:
        return {"sequence_parallel_enabled": True} if gradients == "deferred" else {}
    where = {"partition_dim": CUT[case.layer][name], "partition_stride": 1, "num_partitions": place.size}
    return {"tensor_model_parallel": True} | where


class FakeGroup:
    """A group of two for experts, of which this process is the second; nothing communicates over it here."""

    def size(self):
        return 2

    def rank(self):
        return 1


def expert_parallel():
    """Of experts that lie over processes, this one's factors are its part of those of all, and carry the mark."""
    torch.manual_seed(0)
    spec = LoraSpec(rank=RANK, alpha=ALPHA, target_modules=("layer",), init_lora_weights=False)
    every, some = (
        adapters.wrap(Model(moe_parallel_layers.ExpertFusedRowParallelLinear(4, 8, 12, **options)), spec, seed=5)
        for options in ({}, {"expert_model_parallel_group": FakeGroup()})
    )
    found = {}
    for name in ("lora_A", "lora_B"):
        whole, own = every.layer.get_parameter(name), some.layer.get_parameter(name)
        found[f"{name} alike"] = float(torch.equal(own, whole[2:]) and not torch.equal(own, whole[:2]))
        found[f"{name}, marks alike"] = float(own.expert_model_parallel and not hasattr(whole, "expert_model_parallel"))
    some.to(torch.float64)
    found["marks kept"] = float(some.layer.lora_A.expert_model_parallel and some.layer.lora_B.expert_model_parallel)
    return found


class Stacked(torch.nn.Module):
    """Experts as Hugging Face's models hold them."""

    def __init__(self, inside, out):
        super().__init__()
        self.gate_up_proj = torch.nn.Parameter(torch.zeros(EXPERTS, 2 * inside, out))
        self.down_proj = torch.nn.Parameter(torch.zeros(EXPERTS, out, inside))


def nested(path, module):
    """A model that has a module at a path."""
    model = inner = torch.nn.Module()
    for name in path.split(".")[:-1]:
        inner.add_module(name, torch.nn.Module())
        inner = inner.get_submodule(name)
    inner.add_module(path.rpartition(".")[2], module)
    return model


def experts_in_files():
    """The file of an adapter of its experts is that of the raw parameters which they are in Hugging Face's models."""
    own = torch.nn.Module()
    own.gate_up_proj = moe_parallel_layers.ExpertFusedColumnParallelLinear(EXPERTS, 8, 32, stride=2)
    own.down_proj = moe_parallel_layers.ExpertFusedRowParallelLinear(EXPERTS, 16, 8, reduce_output=False)
    names = ("experts.gate_up_proj", "down_proj")
    spec = LoraSpec(rank=RANK, target_modules=(), target_parameters=names, init_lora_weights=False)
    made = nested("layers.mlp.expert_mlps.mlp_op", own), nested("layers.mlp.experts", Stacked(16, 8))
    ours, stacked = (adapters.wrap(model, spec, seed=5) for model in made)
    with tempfile.TemporaryDirectory() as place:
        shared = [place]
        dist.broadcast_object_list(shared)
        place, found, kept = Path(shared[0]), {}, adapters.flat(adapters.factors(ours))
        for name, model in (("ours", ours), ("stacked", stacked)):
            adapters.save(model, place / name)
        before, after = (load_file(place / name / "adapter_model.safetensors") for name in ("ours", "stacked"))
        found["file alike"] = float(before.keys() == after.keys() and all(before[k].equal(after[k]) for k in before))
        bind.detach(ours)
        again = adapters.wrap(ours, spec, seed=6)
        adapters.load(again, place / "stacked")
        both = kept, adapters.flat(adapters.factors(again))
        found["comes back alike"] = float(all(both[0][k].equal(both[1][k]) for k in both[0]) and len(both[1]) == 4)
        dist.barrier()
    return found


def refusals():
    """What `wrap`, a call and `save` say to what they do not take."""

    def said(function, *args, **options):
        try:
            function(*args, **options)
        except LoraFnError as refusal:
            return str(refusal)
        return ""

    spec = LoraSpec(rank=2, target_modules=("layer",))
    made = {
        "partition_pad": Model(layers.InputChannelParallelConv2d(23, 8, 3, partition_pad=True)),
        "row, stride": Model(moe_parallel_layers.ExpertFusedRowParallelLinear(2, 16, 8, stride=2)),
        "row, partial, bias": Model(
            moe_parallel_layers.ExpertFusedRowParallelLinear(2, 16, 8, bias=True, reduce_output=False)
        ),
    }
    found = {name: said(adapters.wrap, model, spec) for name, model in made.items()}
    model = adapters.wrap(Model(moe_parallel_layers.ExpertFusedColumnParallelLinear(2, 16, 8)), spec)
    x = torch.ones(2, 3, 16)
    found["expert_indices"] = said(model.layer, x, expert_indices=torch.tensor([0]))
    found["save"] = said(adapters.save, model, "never")
    found["all-linear"] = said(adapters.wrap, Model(layers.OutputChannelParallelConv2d(8, 8, 3)), LoraSpec())
    assert model.layer(x[:1]).shape == (2, 3, 8 // Place().size)  # the same tokens for every expert
    return found


def main(path):
    warnings.simplefilter("ignore")
    results = {}
    state = nxd_layers.started({"tp": 4})
    for size in (4, 2):
        if size == 2:
            state.destroy_model_parallel()
            state.initialize_model_parallel(tensor_model_parallel_size=2)
        else:
            results["refused"] = refusals()
            results["experts over processes"] = worst(expert_parallel())
            results["experts in files"] = worst(experts_in_files())
        results[str(size)] = {
            f"{name}, {gradients}": worst(check(case, Place(), gradients))
            for name, case in CASES.items()
            for gradients in ("summed", "deferred")
        }
    if dist.get_rank() == 0:
        Path(path).write_text(json.dumps(results, indent=1))
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)  # torch_xla has nothing to shut down


if __name__ == "__main__":
    main(sys.argv[1])
