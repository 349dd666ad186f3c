"""What has to agree with stock PEFT, and in which combinations? The factors of the grid, what of it is refused and why,
an array of cases in which every pair of values occurs, and the tables of docs/parity.md.

How one case runs is in grid_stock and grid_ours.
"""

import functools
import itertools
import random
from typing import NamedTuple

import torch
from torch import nn

from adapters import bind, kinds
from adapters.parallel import (
    ColumnParallelLinear,
    GQAQKVColumnParallelLinear,
    ParallelEmbedding,
    ParallelLayer,
    RowParallelLinear,
)
from lora_fn import Axis, FusedPart, Heads, LayerSpec, LoraFnError, Window, peft_format

RANK, ALPHA, DROPOUT = 4, 6, 0.3
KEY, SEED = 11, 5  # of dropout, of the factors
HEADS = Heads(query=8, key_value=2)  # at TP 4, each key-value head lies in two places
QKV = {"q": 32, "k": 8, "v": 8}
EXPERTS = {"in_features": 12, "out_features": 20, "num_experts": 3}
GATE_UP = {"gate": 20, "up": 20}

# Name -> one layer: kind and sizes, without its adapter and its axis. The names are the rules table's, and one more.
LAYERS = {
    "column": dict(kind="column", in_features=24, out_features=40, bias=True),
    "column, fused": dict(kind="column", in_features=24, out_features=40, bias=True, parts=GATE_UP),
    "qkv": dict(kind="qkv", in_features=24, out_features=48, bias=True, parts=QKV, heads=HEADS),
    "column, output gathered": dict(kind="column", in_features=24, out_features=40, bias=True, gather_output=True),
    "linear": dict(kind="linear", in_features=24, out_features=40, bias=True),
    "row": dict(kind="row", in_features=24, out_features=40, bias=True),
    "embedding, vocabulary": dict(kind="embedding", in_features=30, out_features=24, pad=True),
    "embedding, dimension": dict(kind="embedding", in_features=30, out_features=24, shard_across_embedding=True),
    "conv2d, output channels": dict(kind="conv2d", in_features=8, out_features=12, bias=True),
    "conv2d, input channels": dict(kind="conv2d", in_features=8, out_features=12, bias=True, shard_input=True),
    "experts, column": dict(kind="experts", **EXPERTS),
    "experts, column, transposed": dict(kind="experts", fan_in_fan_out=True, **EXPERTS),
    "experts, row": dict(kind="experts", shard_input=True, **EXPERTS),
    "experts, row, transposed": dict(kind="experts", shard_input=True, fan_in_fan_out=True, **EXPERTS),
    "linear, fan_in_fan_out": dict(kind="linear", in_features=24, out_features=40, bias=True, fan_in_fan_out=True),
}

# Factor -> value -> what it is in PEFT's config.
INITS = {
    "true": {"init_lora_weights": True},
    "false": {"init_lora_weights": False},
    "gaussian": {"init_lora_weights": "gaussian"},
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "pissa": {"init_lora_weights": "pissa"},
    "pissa_niter_4": {"init_lora_weights": "pissa_niter_4"},
    "olora": {"init_lora_weights": "olora"},
    "loftq": {"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 4, "loftq_iter": 1}},
    "eva": {"init_lora_weights": "eva", "eva_config": {"rho": 1.0, "use_label_mask": False}},
    "corda": {"init_lora_weights": "corda", "corda_config": {}},
    "lora_ga": {"init_lora_weights": "lora_ga", "lora_ga_config": {}},
    "mica": {"init_lora_weights": "mica"},
}
BLOCK_DIAGONAL = {
    "target_modules_bd_a": ["layer", "q_proj", "k_proj", "v_proj"],
    "target_modules_bd_b": ["gate_proj", "up_proj"],
}
INVOCATION = [3, 5]  # of aLoRA, the tokens that begin it
MEASURED_INITS = ("eva", "corda", "lora_ga")  # which run the model on data
UNMERGED = ("alora", "qalora")  # variants that stock PEFT has no merged weight of
NO_DELTA = (*UNMERGED, "bdlora")  # of bdlora, it multiplies the factors as they are packed
VARIANTS = {
    "lora": {},
    "dora": {"use_dora": True},
    "qalora": {"use_qalora": True, "qalora_group_size": 4},
    "bdlora": {"use_bdlora": {"nblocks": 2} | BLOCK_DIAGONAL},
    "alora": {"alora_invocation_tokens": INVOCATION},
    "kasa": {"kasa_config": {"beta": 1e-4, "gamma": 1e-3}},
    "velora": {"velora_config": {"num_groups": 4}},
}
BIASES = {name: {"bias": name} for name in ("none", "all", "lora_only")}
LORA_BIASES = {"no": {}, "yes": {"lora_bias": True}}
SCALINGS = {"alpha / r": {}, "alpha / sqrt(r)": {"use_rslora": True}}
DROPOUTS = {"0": {}, str(DROPOUT): {"lora_dropout": DROPOUT}}
DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16}
# What sequence parallel means for a layer. "gathered": another collective has gathered its input for all siblings.
SEQUENCES = {"off": {}, "on": {"sequence_dim": 1}, "gathered": {"input": "gathered"}}

# Every factor with its values; the first is the plain one, which goes with all others.
FACTORS = {
    "kind": tuple(LAYERS),
    "init": tuple(INITS),
    "variant": tuple(VARIANTS),
    "bias": tuple(BIASES),
    "lora_bias": tuple(LORA_BIASES),
    "scaling": tuple(SCALINGS),
    "dropout": tuple(DROPOUTS),
    "dtype": tuple(DTYPES),
    "tp": (1, 2, 4),
    "sp": tuple(SEQUENCES),
    "gradients": ("summed", "deferred"),
}
CONFIGS = {
    **{"init": INITS, "variant": VARIANTS, "bias": BIASES},
    **{"lora_bias": LORA_BIASES, "scaling": SCALINGS, "dropout": DROPOUTS},
}


class Case(NamedTuple):
    """One combination: a value of each factor."""

    kind: str
    init: str
    variant: str
    bias: str
    lora_bias: str
    scaling: str
    dropout: str
    dtype: str
    tp: int
    sp: str
    gradients: str


PLAIN = Case(*(values[0] for values in FACTORS.values()))


def pairs(case):
    """Every pair of (factor, value) in a case."""
    return itertools.combinations(zip(FACTORS, case, strict=True), 2)


def config_of(case):
    """PEFT's config of a case, as in adapter_config.json."""
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "target_modules": targets_of(case.kind)}
    if LAYERS[case.kind]["kind"] == "experts":
        config |= {"target_modules": [], "target_parameters": ["block.layer.weight"]}
    for factor, values in CONFIGS.items():
        config |= values[getattr(case, factor)]
    return config


def targets_of(kind):
    """PEFT's target_modules."""
    return [f"block.{name}" for name in part_names(kind)]


def part_names(kind):
    """The names of the modules that hold the layer in a stock model."""
    parts = LAYERS[kind].get("parts")
    return tuple(peft_format.PART_MODULES[part] for part in parts) if parts else ("layer",)


def module_name(kind):
    """The name of the module that holds it in ours."""
    return {"qkv": "qkv_proj", "column, fused": "gate_up_proj"}.get(kind, "layer")


def base_spec(case, axis=None):
    """The `LayerSpec` of a case's layer, without an adapter. In bfloat16 it is larger, so that errors have a mean."""
    given = dict(LAYERS[case.kind])
    times = 4 if case.dtype == "bfloat16" else 1
    for size in ("in_features", "out_features"):
        given[size] *= times
    if "parts" in given:
        given["parts"] = tuple(FusedPart(name=name, size=size * times) for name, size in given["parts"].items())
    if given["kind"] == "conv2d":
        given["window"] = Window(kernel_size=(3, 3), padding=(1, 1))
    return LayerSpec(
        **given | SEQUENCES[case.sp],
        reduce_dtype=None if case.dtype == "float64" else "float32",
        axis=Axis(size=case.tp, index=0) if axis is None else axis,
    )


class Held(ParallelLayer):
    """A layer of a kind that this package has no module of its own for."""

    def __init__(self, spec, **where):
        super().__init__(spec, init_method=lambda weight: weight, **where)


class Experts(Held):
    """Experts that compute by themselves: their weight is a raw parameter."""

    def __init__(self, spec, **where):
        super().__init__(spec, **where)
        self.is_transposed, self.raw_specs = spec.fan_in_fan_out, {"weight": spec}
        self.index = self._buffers.pop("index")  # no buffer, which nothing that is trained may have


kinds.SPEC_OF[f"{Held.__module__}.{Held.__name__}"] = kinds.own_spec


def parallel(spec, dtype, device=None):
    """The module of a layer: of this package where it has one."""
    where = {"dtype": dtype, "device": device}
    common = where | {"axis": spec.axis, "reduce_dtype": getattr(torch, spec.reduce_dtype or "", None)}
    sequence = {"sequence_parallel_enabled": spec.sequence_dim is not None}
    if spec.kind == "column":
        more = {"gather_output": spec.gather_output, "sequence_dimension": spec.sequence_dim, "input": spec.input}
        sizes = {part.name: part.size for part in spec.parts}
        given = (spec.in_features, spec.out_features)
        return ColumnParallelLinear(*given, bias=spec.bias, parts=sizes, **common | sequence | more)
    if spec.kind == "qkv":
        more = {"gather_output": False, "sequence_dimension": spec.sequence_dim, "input": spec.input}
        given = (spec.in_features, [part.size for part in spec.parts[:2]])
        return GQAQKVColumnParallelLinear(*given, bias=spec.bias, heads=spec.heads, **common | sequence | more)
    if spec.kind == "row":
        more = {"input_is_parallel": True, "sequence_dimension": spec.sequence_dim}
        return RowParallelLinear(spec.in_features, spec.out_features, bias=spec.bias, **common | sequence | more)
    if spec.kind == "embedding":
        more = {
            "shard_across_embedding": spec.shard_across_embedding,
            "pad": spec.pad,
            "sequence_dim": spec.sequence_dim,
        }
        return ParallelEmbedding(spec.in_features, spec.out_features, **common | sequence | more)
    return (Experts if spec.kind == "experts" else Held)(spec, **where)


class Net(nn.Module):
    """The layer (in a stock model, its parts), and beside it one of its form that is not adapted."""

    def __init__(self, block, beside, features=-1):
        super().__init__()
        self.block, self.beside, self.features = nn.ModuleDict(block), nn.ModuleDict(beside), features

    def forward(self, x, **more):
        """What the layer gives, and what the other one does."""
        return self._of(self.block, x, **more), self._of(self.beside, x)

    def _of(self, modules, x, **more):
        ys = [module(x, **more) for module in modules.values()]
        return torch.cat([y for each in ys for y in (each if isinstance(each, tuple) else (each,))], self.features)


def parallel_net(case, axis=None, device=None, make=parallel):
    """Our model of a case; `make` gives the module of a layer."""
    spec, dtype = base_spec(case, axis), DTYPES[case.dtype]
    features = -3 if spec.kind == "conv2d" else -1
    block, beside = ({module_name(case.kind): make(spec, dtype, device)} for _ in range(2))
    return Net(block, beside, features)


# ----------------------------------------------------------------------------------------------------- what is refused


@functools.cache
def refusal(case):
    """Why this package refuses a case, in its own words; None where it takes it."""
    spec = lora_spec(case._replace(dtype=PLAIN.dtype, tp=1, sp="off", gradients="summed"))
    if isinstance(spec, LoraFnError):
        return _sentence(spec)
    try:
        planned = bind.plan(parallel_net(case, device="meta"), spec, gradients=case.gradients)
        for path, layer in planned.items():
            peft_format.tensor_names(path, layer)
    except LoraFnError as error:
        return _sentence(error)
    return None


@functools.cache
def lora_spec(case):
    """What is asked for in a case, or the error."""
    try:
        return peft_format.from_config(config_of(case))
    except LoraFnError as error:
        return error


def _sentence(error):
    return str(error).splitlines()[0]


@functools.cache
def stock_refusal(case):
    """Why stock PEFT refuses a case; None where it takes it, or where `refusal` has spoken."""
    import grid_stock  # late: our processes do without PEFT

    return grid_stock.refusal(case)


def reason(case):
    """Why a case is not compared: ours, or that PEFT has nothing to compare with. None where it is."""
    return refusal(case) or stock_refusal(case)


# Of the whole grid, what takes turns; all else is multiplied out.
IN_TURN = ("lora_bias", "scaling", "dropout", "gradients")


def whole_grid():
    """Every case that can be, but that some factors take turns; what is one adapter to stock PEFT stands in a row."""
    turns = list(itertools.product(*(FACTORS[factor] for factor in IN_TURN)))
    config = ("init", "variant", "bias", "dtype")
    for number, values in enumerate(itertools.product(*(FACTORS[factor] for factor in config))):
        case, first = PLAIN._replace(**dict(zip(config, values, strict=True))), number * 5 % len(turns)
        for kind in FACTORS["kind"]:
            tried = (
                case._replace(kind=kind, **dict(zip(IN_TURN, t, strict=True))) for t in turns[first:] + turns[:first]
            )
            chosen = next((one for one in tried if reason(one) is None), None)
            if chosen is not None:
                places = (chosen._replace(tp=tp, sp=sp) for tp in FACTORS["tp"] for sp in FACTORS["sp"])
                yield from (one for one in places if reason(one) is None)


def with_values(case, values):
    """The case with other values of some factors."""
    return case._replace(**dict(values))


# ------------------------------------------------------------------------------------------------- the covering array


def possible_pairs():
    """Every pair of values of two factors that can be together, everything else plain -> None, or the reason."""
    found = {}
    for one, other in itertools.combinations(FACTORS, 2):
        for values in itertools.product(FACTORS[one], FACTORS[other]):
            pair = tuple(zip((one, other), values, strict=True))
            found[pair] = reason(with_values(PLAIN, pair))
    return found


def covering_array(seed=0, tries=4):
    """Cases in which every pair of values occurs that can be together: greedily the one of a few with most new ones."""
    rng = random.Random(seed)
    missing = {pair for pair, why in possible_pairs().items() if why is None}
    array = []
    while missing:
        first = min(missing)
        best = max(
            (_grown(first, missing, rng) for _ in range(tries)), key=lambda c: len(missing.intersection(pairs(c)))
        )
        array.append(best)
        missing.difference_update(pairs(best))
    return array


def _grown(pair, missing, rng):
    """A case with a pair of values: factor by factor, the value with most missing pairs that can be."""
    case, fixed = with_values(PLAIN, pair), dict(pair)
    for factor in rng.sample([f for f in FACTORS if f not in fixed], len(FACTORS) - 2):
        values = rng.sample(FACTORS[factor], len(FACTORS[factor]))

        def new(value, factor=factor, fixed=fixed):
            own = (factor, value)
            return sum((own, o) in missing or (o, own) in missing for o in fixed.items())

        best = next(v for v in sorted(values, key=new, reverse=True) if reason(with_values(case, {factor: v})) is None)
        case, fixed[factor] = with_values(case, {factor: best}), best
    return case


# ---------------------------------------------------------------------------------------------------- docs/parity.md

STOCK = "stock PEFT: "  # how the reasons that are its own begin
MEASURED = "## Measured"
INTRODUCTION = """# Parity with stock PEFT

Stock PEFT on the whole layer is the oracle: the same adapter, made by it, on a layer that lies over 1, 2 or 4 processes
must give its outputs, the gradients of everything that is trained and of the input, its merged weights, and its file.
This page is written by `make grid-page`, and `tests/test_grid.py` fails where it is not what the code does.

A cell says "yes", or the number of the reason why two values cannot be together (all else being plain). The reasons are
the error messages themselves; those of stock PEFT say where there is nothing to compare with.

Errors allowed: in float32 1e-5 and in float64 1e-10, as max|a - b| / max|b|; in bfloat16, by root mean square against
float64, twice that of stock PEFT (of gradients, which are summed in bfloat16, times the root of TP).

"""


def page(array):
    """docs/parity.md, up to what `make grid` measures."""
    found, reasons, blocks, free = possible_pairs(), {}, [], []
    for one, other in itertools.combinations(FACTORS, 2):
        table = [[found[(one, a), (other, b)] for b in FACTORS[other]] for a in FACTORS[one]]
        if not any(why for row in table for why in row):
            free.append(f"{one} and {other}")
            continue
        lines = [[f"{one} \\ {other}", *FACTORS[other]], ["---"] * (len(FACTORS[other]) + 1)]
        for value, row in zip(FACTORS[one], table, strict=True):
            lines.append([value, *(f"[{reasons.setdefault(w, len(reasons) + 1)}]" if w else "yes" for w in row)])
        blocks.append("\n".join(f"| {' | '.join(map(str, line))} |" for line in lines))
    told = "\n".join(f"{number}. {why}" for why, number in reasons.items())
    sizes = ", ".join(f"{sum(c.tp == n for c in array)} at TP {n}" for n in FACTORS["tp"])
    return (
        INTRODUCTION
        + "## What goes together\n\n"
        + "\n\n".join(blocks)
        + (f"\n\nEvery value goes with every other of: {'; '.join(free)}.\n" if free else "\n")
        + f"\n## Reasons\n\n{told}\n\n"
        + "## What `make test` runs\n\n"
        + f"{len(array)} cases, in which every pair of values that says yes above occurs: {sizes}.\n\n"
    )
