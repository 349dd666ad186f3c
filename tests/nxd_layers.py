"""Run by torchrun where neuronx-distributed is: its real layers, wrapped by us, beside its own forward and the oracle.

    python -m torch.distributed.run --nproc-per-node 4 nxd_layers.py RESULTS.json

Only Python runs, over gloo, on CPU. The results: {"4" or "2" processes: {case: {check: the worst of all processes}}}.
With tensor parallel 2, there are two groups of it. How the real layers cut a tensor is written out here once more, by
hand.
"""

import json
import os
import sys
import warnings
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from foreign_programs import started  # first: it replaces what is for devices only

# isort: split
import oracle
import torch
import torch.distributed as dist
from neuronx_distributed.parallel_layers import grads, layers, parallel_state
from neuronx_distributed.utils import model_utils
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import adapters
import lora_fn
from lora_fn import LoraFnError, LoraSpec

RANK, ALPHA, IN, OUT, BATCH, LENGTH = 3, 5.0, 24, 40, 3, 8
SCALING = ALPHA / RANK
BY_RANK = 16  # a rank that is cut; of 2 columns on a process, products may be rounded otherwise in a transform


@dataclass(frozen=True)
class Case:
    """One layer: its class here, its arguments, and how the test sees it.

    `sequence` is the dimension that sequence parallel cuts, None without.
    """

    layer: str
    arguments: dict = field(default_factory=dict)
    sequence: int | None = None
    dtype: torch.dtype = torch.float32
    out: int = OUT
    size: int = IN
    other_group: bool = False  # over other processes than the default ones
    scheme: str | None = None

    @property
    def rank(self):
        return RANK if self.scheme is None else BY_RANK


def both(name, *given, **options):
    """The case without sequence parallel, and with it along each dimension."""
    cases = {name: Case(*given, **options)}
    return cases | {f"{name}, sequence {d}": Case(*given, sequence=d, **options) for d in (0, 1)}


LOCAL = {"gather_output": False}
PARALLEL = {"input_is_parallel": True}
WIDE = {"dtype": torch.bfloat16, "size": 192, "out": 192}
CASES = {
    **both("column", "column", LOCAL | {"bias": False}),
    **both("column, bias", "column", LOCAL),
    **both("column, stride 2", "column", LOCAL | {"stride": 2, "bias": False}),
    **both("column, stride 2, bias", "column", LOCAL | {"stride": 2}),
    **both("column, stride 3", "column", LOCAL | {"stride": 3, "bias": False}, out=36),
    **both("column, bias beside", "column", LOCAL | {"skip_bias_add": True}),
    "column, by rank": Case("column", LOCAL, scheme="rank"),
    "column, stride 2, by rank": Case("column", LOCAL | {"stride": 2}, scheme="rank"),
    "row, by rank": Case("row", PARALLEL, scheme="rank"),
    "column, no bias beside": Case("column", LOCAL | {"skip_bias_add": True, "bias": False}),
    "column, gathered": Case("column"),
    "column, gathered, bias beside": Case("column", {"skip_bias_add": True}),
    "column, padded": Case("column", LOCAL | {"pad": True, "bias": False}, out=37),
    "column, padded, gathered": Case("column", {"pad": True, "bias": False}, out=37),
    **both("column, bfloat16", "column", LOCAL, **WIDE),
    "column, reduced in bfloat16": Case("column", LOCAL | {"reduce_dtype": torch.bfloat16}, **WIDE),
    **both("row", "row", PARALLEL | {"bias": False}),
    **both("row, bias", "row", PARALLEL),
    **both("row, bias beside", "row", PARALLEL | {"skip_bias_add": True}),
    "row, whole input": Case("row"),
    "row, partial": Case("row", PARALLEL | {"reduce_output": False, "bias": False}),
    **both("row, bfloat16", "row", PARALLEL, **WIDE),
    "row, reduced in bfloat16": Case("row", PARALLEL | {"reduce_dtype": torch.bfloat16}, **WIDE),
    **both("column, other group", "column", LOCAL, other_group=True),
    **both("row, other group", "row", PARALLEL, other_group=True),
    "embedding, other group": Case("embedding", other_group=True),
    "embedding": Case("embedding"),
    "embedding, sequence 0": Case("embedding", sequence=0),
    "embedding, padding_idx": Case("embedding", {"padding_idx": 13}),
    "embedding, padding_idx, sequence 0": Case("embedding", {"padding_idx": 13}, sequence=0),
    "embedding, padded": Case("embedding", {"pad": True}, size=23),
    "embedding, bfloat16": Case("embedding", **WIDE),
    "embedding, dimension": Case("embedding", {"shard_across_embedding": True}),
    "embedding, dimension, padding_idx": Case("embedding", {"shard_across_embedding": True, "padding_idx": 13}),
    "embedding, dimension, sequence": Case(
        "embedding", {"shard_across_embedding": True, "sequence_parallel_enabled": True, "sequence_dimension": 0}
    ),
}


class Place:
    """This process's place, and how it cuts things."""

    def __init__(self, group=None):
        self.group = group or parallel_state.get_tensor_model_parallel_group()
        self.size, self.rank = self.group.size(), self.group.rank()

    def chunk(self, x, dim):
        """Its part, of equal ones; zeros where there are too few."""
        missing = -x.shape[dim] % self.size
        if missing:
            shape = list(x.shape)
            shape[dim] = missing
            x = torch.cat([x, x.new_zeros(shape)], dim)
        return x.chunk(self.size, dim)[self.rank]

    def strided(self, x, dim, stride):
        """Every size-th of stride * size parts."""
        return torch.cat(x.chunk(stride * self.size, dim)[self.rank :: self.size], dim)

    def summed(self, x):
        x = x.clone()
        dist.all_reduce(x, group=self.group)
        return x

    def alike(self, x):
        """1.0 where all processes hold the same bits."""
        found = [torch.empty_like(x) for _ in range(self.size)]
        dist.all_gather(found, x.contiguous(), group=self.group)
        return float(all(torch.equal(found[0], other) for other in found))


def error(found, expected):
    """max|a - b| / max|b|."""
    found, expected = found.detach().double(), expected.detach().double()
    assert found.shape == expected.shape, (found.shape, expected.shape)
    return float((found - expected).abs().max() / expected.abs().max().clamp_min(1e-30))


KINDS = {
    "allreduce_": "all-reduce",
    "all_reduce": "all-reduce",
    "allgather_": "all-gather",
    "_allgather_base_": "all-gather",
    "all_gather_into_tensor": "all-gather",
    "reduce_": None,  # then it scatters
    "scatter_": "reduce-scatter",
    "all_to_all_single": "reduce-scatter",
}


class Recorder(TorchDispatchMode):
    """Counts collectives: what reaches torch's dispatcher. On CPU, theirs and ours scatter sums in other ways."""

    def __init__(self):
        super().__init__()
        self.seen = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace.startswith(("c10d", "_c10d")) and function._opname != "wait_tensor":
            kind = KINDS[function._opname]
            self.seen.update([kind] if kind else [])
        return function(*args, **kwargs or {})


def extra(case, gradients):
    """What an adapter adds to the collectives of a frozen layer."""
    if case.scheme is not None:  # one forward and one backward, and nothing to sum
        return Counter({"all-gather": 1, "reduce-scatter": 1})
    summed = {"all-reduce": max(1, len(fused(case)))} if gradients == "summed" else {}
    by_dim = case.arguments.get("shard_across_embedding")
    gathers = case.layer == "embedding" and case.sequence is not None and not by_dim  # its ids want no gradient
    return Counter(summed | ({"all-gather": 1} if gathers else {}))


def rms(found, truth, rounded):
    """The root mean square error against the truth, over that of the dense layer in the same dtype."""
    ours, theirs = ((t.detach().double() - truth).square().mean().sqrt() for t in (found, rounded))
    return float(ours / theirs)


def draw(*shape, dtype=torch.float32, scale=1.0):
    return (torch.randn(*shape) * scale).to(dtype)


def build(case):
    """The real layer, its canonical parameters, its whole input, its cotangent and the oracle's words for it."""
    torch.manual_seed(0)
    options = {"dtype": case.dtype} | case.arguments
    if case.sequence is not None:
        options |= {"sequence_parallel_enabled": True, "sequence_dimension": case.sequence}
    if case.other_group:
        options["tensor_model_parallel_group"] = parallel_state.get_data_parallel_group()
    classes = {
        "column": layers.ColumnParallelLinear,
        "row": layers.RowParallelLinear,
        "embedding": layers.ParallelEmbedding,
    }
    module = classes[case.layer](case.size, case.out, **options)
    torch.manual_seed(1)
    if case.layer == "embedding":
        whole = {"weight": draw(case.size, case.out, dtype=case.dtype)}
        x, words = torch.randint(0, case.size, (BATCH, LENGTH)), {"kind": "embedding"}
        x[0, :2] = 13
        words["padding_idx"] = case.arguments.get("padding_idx")
    else:
        whole = {"weight": draw(case.out, case.size, dtype=case.dtype)}
        if module.bias is not None:
            whole["bias"] = draw(case.out, dtype=case.dtype)
        x, words = draw(BATCH, LENGTH, case.size, dtype=case.dtype), {"kind": "linear"}
        x = x.transpose(0, 1).contiguous() if case.sequence == 0 else x
    leading = (LENGTH, BATCH) if case.sequence == 0 else (BATCH, LENGTH)
    return module, whole, x, draw(*leading, case.out, dtype=case.dtype), words


def fused(case):
    """The names of a strided layer's parts."""
    return {1: (), 2: ("gate", "up"), 3: ("q", "k", "v")}[case.arguments.get("stride", 1)]


def locally(case, place, name, whole):
    """What this process holds of a canonical parameter."""
    base, _, part = name.partition(".")
    by_dim = case.arguments.get("shard_across_embedding")
    rows = {"column": ("weight", "bias", "lora_B"), "row": (), "embedding": ("lora_B",) if by_dim else ("weight",)}
    columns = {"column": (), "row": ("weight", "lora_A"), "embedding": ("weight",) if by_dim else ("lora_A",)}
    if base == "bias" and case.arguments.get("gather_output", True):
        return whole
    if case.scheme == "rank" and (case.layer, base) in (("column", "lora_A"), ("row", "lora_B")):
        return place.chunk(whole, 0 if base == "lora_A" else 1)
    if base in rows[case.layer]:
        stride = 1 if part else case.arguments.get("stride", 1)
        return place.strided(whole, 0, stride) if stride > 1 else place.chunk(whole, 0)
    return place.chunk(whole, 1) if base in columns[case.layer] else whole


def entering(case, place, x):
    """What this process is given of x, and so what it gets of x's gradient."""
    if case.layer == "column" and case.sequence is not None:
        return place.chunk(x, case.sequence)
    if case.layer == "row" and case.arguments.get("input_is_parallel"):
        return place.chunk(x, -1)
    return x


def leaving(case, place, y):
    """What this process gives of y."""
    if case.layer == "column" and not case.arguments.get("gather_output", True):
        stride = case.arguments.get("stride", 1)
        return place.strided(y, -1, stride) if stride > 1 else place.chunk(y, -1)
    if case.layer != "column" and case.sequence is not None:
        return place.chunk(y, case.sequence)
    return y


class Model(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x)


def ran(model, case, place, x, cotangent):
    """The output (or output and bias) and the gradient of the input."""
    x = entering(case, place, x).detach().clone()
    x = x.requires_grad_() if x.is_floating_point() else x
    for p in model.parameters():
        p.grad = None
    found = model(x)
    y = found[0] if isinstance(found, tuple) else found
    if y.requires_grad:
        (y * leaving(case, place, cotangent)).sum().backward()
    return found, x.grad if x.is_floating_point() else None


def loss(model, factors, case, place, x, cotangent):
    """As a function of the factors."""
    found = torch.func.functional_call(model, factors, (entering(case, place, x),))
    return ((found[0] if isinstance(found, tuple) else found) * leaving(case, place, cotangent)).sum()


def expected_marks(case, place, name, whole, gradients):
    """What a factor must carry."""
    cut = [d for d, size in enumerate(locally(case, place, name, whole).shape) if size != whole.shape[d]]
    if cut:
        where = {"partition_dim": cut[0], "partition_stride": 1, "num_partitions": place.size}
        return {"tensor_model_parallel": True} | where
    return {"sequence_parallel_enabled": True} if gradients == "deferred" and not case.other_group else {}


def check(case, place, gradients):
    """Every check of one case."""
    module, whole, x, cotangent, words = build(case)
    model = Model(module).requires_grad_(False).train(not case.arguments.get("pad"))
    with torch.no_grad():
        for name, p in whole.items():
            module.get_parameter(name).copy_(locally(case, place, name, p))
    found: dict[str, float] = {}
    with Recorder() as theirs:
        own, own_dx = ran(model, case, place, x, cotangent)
    beside = isinstance(own, tuple)
    own = own[0] if beside else own
    base_truth, _, base_dx = oracle.run(
        {n: p for n, p in whole.items() if not (beside and n == "bias")}, by_batch(case, x), cotangent, **words
    )
    if own_dx is not None:
        found["own dx to the truth"] = error(own_dx, entering(case, place, base_dx))

    targets = tuple(f"{part}_proj" for part in fused(case)) or ("layer",)
    lora = LoraSpec(rank=case.rank, alpha=ALPHA, target_modules=targets)
    adapters.wrap(model, lora, seed=3, gradients=gradients, scheme=case.scheme)
    layer = model.layer
    assert type(module) is not type(layer) and layer.weight is module.weight
    zero, zero_dx = ran(model, case, place, x, cotangent)
    if beside:
        assert zero[1] is layer.bias
        zero = zero[0]
    with torch.no_grad():
        params = {n: p for n, p in layer.params().items() if not n.startswith("lora_")}
        inputs = entering(case, place, x).T if by_batch(case, x) is not x else entering(case, place, x)
        base_path = lora_fn.apply(params, inputs, layer.spec.base)
    found["zero B to our own base path alike"] = float(torch.equal(zero, base_path))
    truth = leaving(case, place, base_truth)
    if case.arguments.get("reduce_output", True):
        found["zero B to the truth"] = error(zero, truth)
    found["zero B to its own"] = error(zero, own)
    if zero_dx is not None:
        found["zero B, dx to the truth"] = error(zero_dx, entering(case, place, base_dx))
        found["zero B, dx to its own"] = error(zero_dx, own_dx)

    names = [f".{part}" for part in fused(case)] or [""]
    sizes = {name: case.out // len(names) for name in names}
    torch.manual_seed(2)
    for name in names:
        whole[f"lora_A{name}"] = draw(case.rank, case.size, dtype=case.dtype)
        whole[f"lora_B{name}"] = draw(sizes[name], case.rank, dtype=case.dtype)
    with torch.no_grad():
        for name in [n for n in whole if n.startswith("lora_")]:
            layer.get_parameter(name).copy_(locally(case, place, name, whole[name]))
    with Recorder() as ours:
        y, dx = ran(model, case, place, x, cotangent)
    found["collectives alike"] = float(ours.seen == theirs.seen + extra(case, gradients))
    y = y[0] if beside else y
    if fused(case):
        words = {"kind": "linear", "parts": [(part, case.out // len(names), ALPHA / case.rank) for part in fused(case)]}
    else:
        words = words | {"scaling": ALPHA / case.rank}
    params = {n: p for n, p in whole.items() if not (beside and n == "bias")}
    y_truth, truths, dx_truth = oracle.run(params, by_batch(case, x), cotangent, **words)
    if not case.arguments.get("reduce_output", True):
        y = place.summed(y)
    found["y"] = error(y, leaving(case, place, y_truth))
    if dx is not None:
        found["dx"] = error(dx, entering(case, place, dx_truth))
    if case.dtype == torch.bfloat16:
        y_rounded, _, dx_rounded = oracle.run(params, by_batch(case, x), cotangent, dtype=case.dtype, **words)
        found["y, rms"] = rms(y, leaving(case, place, y_truth), leaving(case, place, y_rounded))
        if dx is not None:
            found["dx, rms"] = rms(dx, entering(case, place, dx_truth), entering(case, place, dx_rounded))
    factors = {n: layer.get_parameter(n) for n in whole if n.startswith("lora_")}
    transformed = torch.func.grad(lambda ps: loss(model, ps, case, place, x, cotangent))(
        {f"layer.{n}": p.detach() for n, p in factors.items()}
    )
    found["torch.func alike"] = float(all(torch.equal(transformed[f"layer.{n}"], p.grad) for n, p in factors.items()))
    if gradients == "deferred":
        marked = [n for n, p in factors.items() if hasattr(p, "sequence_parallel_enabled")]
        found |= {f"d{n} before": error(factors[n].grad, locally(case, place, n, truths[n])) for n in marked}
        if case.other_group:  # of which its optimizer does not know
            assert marked == []
            synced = lora_fn.sync_gradients({"layer": {n: p.grad for n, p in factors.items()}}, adapters.specs(model))
            for name, p in factors.items():
                p.grad = synced["layer"][name]
        grads.allreduce_sequence_parallel_gradients(torch.optim.SGD(list(factors.values()), lr=1.0))
    for name, p in factors.items():
        expected = locally(case, place, name, truths[name])
        found[f"d{name}"] = error(p.grad, expected)
        if expected.shape == truths[name].shape:
            found[f"d{name} alike"] = place.alike(p.grad)
    square = sum(truths[n].square().sum() for n in factors)
    norm = torch.as_tensor(grads.get_grad_norm(list(factors.values()))).reshape(())
    if not case.other_group:
        found["norm"] = error(norm, square.sqrt())
    marks = {n: dict(vars(p)) for n, p in factors.items()}
    found["marks alike"] = float(marks == {n: expected_marks(case, place, n, whole[n], gradients) for n in factors})
    model_utils.move_model_to_device(model, torch.device("cpu"))
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    model.to(torch.float64)
    torch.__future__.set_overwrite_module_params_on_conversion(False)
    found["marks kept"] = float(
        all(layer.get_parameter(n) is not p and vars(layer.get_parameter(n)) == marks[n] for n, p in factors.items())
    )
    return found


REFUSED = {
    "rank_ordering": Case("column", {"rank_ordering": [1, 0, 3, 2]}),
    "stride": Case("column", LOCAL | {"stride": 4}, out=48),
    "stride, gathered": Case("column", {"stride": 2}),
    "keep_padded_output": Case("column", {"pad": True, "bias": False, "keep_padded_output": True}, out=37),
    "pad, bias, gathered": Case("column", {"pad": True}, out=37),
    "pad_alignment": Case("column", LOCAL | {"pad": True, "pad_alignment_size_per_rank": 16}, out=37),
    "row, pad": Case("row", {"pad": True}, size=23),
    "row, stride": Case("row", PARALLEL | {"stride": 2}),
    "row, partial, bias": Case("row", PARALLEL | {"reduce_output": False}),
    "collect_output": Case("embedding", {"collect_output": False}),
    "sequence_dim": Case("embedding", sequence=1),
    "embedding, pad": Case("embedding", {"pad": True, "shard_across_embedding": True}, out=37),
    "max_norm": Case("embedding", {"max_norm": 1.0, "sparse": True}),
    "use_spmd_rank": Case("embedding", {"use_spmd_rank": True}),
}


def refusals():
    """What `wrap` says to layers that it does not take."""
    made = {name: Model(build(case)[0]) for name, case in REFUSED.items()}
    said = {}
    for name, model in made.items():
        before = model.layer
        targets = ("gate_proj",) if name == "stride, gathered" else ("layer",)
        try:
            adapters.wrap(model, LoraSpec(target_modules=targets))
        except LoraFnError as refusal:
            said[name] = str(refusal)
        assert model.layer is before
        assert all(p.requires_grad for p in model.layer.parameters() if p.is_floating_point())
    return said


class Two(nn.Module):
    """A column layer behind a row layer that is adapted."""

    def __init__(self, dtype, **options):
        super().__init__()
        self.first = layers.RowParallelLinear(128, 128, bias=False, dtype=dtype)
        self.second = layers.ColumnParallelLinear(128, 128, bias=False, gather_output=False, dtype=dtype, **options)

    def forward(self, x):
        return self.second(self.first(x))


def behind():
    """The gradients of an adapter behind a layer that is not adapted, in bfloat16; and of one that stays as it is."""
    place, found = Place(), {}
    torch.manual_seed(0)
    first, second, a, b = (draw(*s, dtype=torch.bfloat16) for s in ((128, 128), (128, 128), (4, 128), (128, 4)))
    x, cotangent = draw(64, 128, dtype=torch.bfloat16), draw(64, 128, dtype=torch.bfloat16)
    model = adapters.wrap(Two(torch.bfloat16), LoraSpec(rank=4, alpha=4, target_modules=("first",)))
    assert type(model.second).__name__ == "BoundLayer" and [*vars(model.second.weight)]
    with torch.no_grad():
        model.first.weight.copy_(place.chunk(first, 1))
        model.second.weight.copy_(place.chunk(second, 0))
        model.first.lora_A.copy_(place.chunk(a, 1))
        model.first.lora_B.copy_(b)
    (model(x) * place.chunk(cotangent, -1)).sum().backward()
    into_first = (cotangent.double() @ second.double()).to(torch.bfloat16)
    whole = {"weight": first, "lora_A": a, "lora_B": b}
    _, truths, _ = oracle.run(whole, x, into_first, kind="linear", scaling=1.0)
    found["dlora_A"] = error(model.first.lora_A.grad, place.chunk(truths["lora_A"], 1))
    found["dlora_B"] = error(model.first.lora_B.grad, truths["lora_B"])
    found["dlora_B alike"] = place.alike(model.first.lora_B.grad)
    refused = Two(torch.bfloat16, stride=4)
    try:
        adapters.wrap(refused, LoraSpec(target_modules=("first",)))
    except LoraFnError as refusal:
        said = str(refusal)
    assert all(p.requires_grad for p in refused.parameters()) and type(refused.first) is layers.RowParallelLinear
    adapters.wrap(Two(torch.float32, stride=4), LoraSpec(target_modules=("first",)))  # nothing is wrong with that
    return worst(found), said


def by_batch(case, x):
    """Ids as the oracle wants them: in the order of the output."""
    return x.T if case.layer == "embedding" and case.sequence == 0 else x


def worst(found):
    """Over all processes: of errors the greatest, of what is 1.0 or 0.0 the least."""
    every = [None] * dist.get_world_size()
    dist.all_gather_object(every, found)
    least = ("alike", "kept", "before")
    names = dict.fromkeys(name for each in every for name in each)
    return {n: (min if n.endswith(least) else max)(each[n] for each in every if n in each) for n in names}


def main(path):
    warnings.simplefilter("ignore")
    results = {}
    state = started({"tp": 4})
    for size in (4, 2):
        if size == 2:
            state.destroy_model_parallel()
            state.initialize_model_parallel(tensor_model_parallel_size=2)
        else:
            results["refused"] = refusals()
            results["behind, bfloat16"], results["refused behind"] = behind()
        found = {}
        for name, case in CASES.items():
            if case.other_group and size == 4:
                continue
            place = Place(parallel_state.get_data_parallel_group() if case.other_group else None)
            for gradients in ("summed", "deferred"):
                found[f"{name}, {gradients}"] = worst(check(case, place, gradients))
        results[str(size)] = found
    if dist.get_rank() == 0:
        Path(path).write_text(json.dumps(results, indent=1))
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)  # torch_xla has nothing to shut down


if __name__ == "__main__":
    main(sys.argv[1])
