"""Which layers can there be? All that `LayerSpec` accepts: its attributes are drawn from the valid combinations."""

import functools
import itertools
import math
from dataclasses import dataclass

import torch
from hypothesis import strategies as st

from lora_fn import Axis, LayerSpec, SpecError, sharding
from lora_fn.spec import KINDS

SIZES = (1, 2, 3, 4, 6, 8, 16)
ADAPTED = tuple(name for name in sharding.TABLE if name != "replicated")

# Attributes that can exclude each other, with their values; the sizes of the layer are drawn afterwards.
ATTRIBUTES = {
    "kind": KINDS,
    "sequence_dim": (None, 0, 1),
    "input": ("sharded", "replicated", "gathered"),
    **dict.fromkeys(("bias", "lora_bias", "fan_in_fan_out"), (False, True)),
    **dict.fromkeys(("gather_output", "input_is_parallel", "reduce_output"), (False, True)),
    **dict.fromkeys(("shard_across_embedding", "pad"), (False, True)),
    "padding_idx": (None, 0),
}
# Attributes that go with everything.
FREE = {
    "use_rslora": (False, True),
    "gradients": ("summed", "deferred"),
    "reduce_dtype": (None, "float32", "float64", "bfloat16", "float16"),
    "dropout": (0.0, 0.25, 0.9),
    "alpha": (1.0, 0.5, 16.0, -3.0),
}


@functools.cache
def combinations():
    """The valid values of ATTRIBUTES, as dicts, by row of the rules table."""
    valid = {name: [] for name in sharding.TABLE}
    for values in itertools.product(*ATTRIBUTES.values()):
        attributes = dict(zip(ATTRIBUTES, values, strict=True))
        rank = 0 if attributes["kind"] == "replicated" else 1
        try:
            spec = LayerSpec(in_features=1, out_features=1, rank=rank, **attributes)
        except SpecError:
            continue
        valid[sharding.row_name(spec)].append(attributes)
    return valid


@st.composite
def specs(draw, row, *, sizes=SIZES, reduce_dtypes=FREE["reduce_dtype"], **fixed):
    """A LayerSpec of one row of the table, non-square, its axis of a drawn size; `fixed` attributes stay as given."""
    attributes = draw(
        st.sampled_from([a for a in combinations()[row] if all(a[k] == v for k, v in fixed.items() if k in a)])
    )
    free = {name: draw(st.sampled_from(values)) for name, values in FREE.items() if name != "reduce_dtype"}
    attributes = attributes | free | {"reduce_dtype": draw(st.sampled_from(reduce_dtypes))} | fixed
    size = draw(st.sampled_from(sizes))
    cut = {"in_features": row in ("row", "embedding, vocabulary"), "out_features": row.startswith("column")}
    cut["out_features"] |= row == "embedding, dimension"
    features = {}
    for name in ("in_features", "out_features"):
        step = size if cut[name] and not attributes["pad"] else 1
        multiples = [step * n for n in range(1, max(3, 12 // step) + 1)]
        features[name] = draw(st.sampled_from([n for n in multiples if n not in features.values()]))
    rank = 0 if row == "replicated" else draw(st.integers(1, min(features.values()) + 2))
    if attributes["padding_idx"] is not None:
        attributes["padding_idx"] = draw(st.integers(0, features["in_features"] - 1))
    return LayerSpec(rank=rank, axis=Axis(name="tp", size=size), **features, **attributes)


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A layer with canonical tensors: parameters, input, the cotangent of its output, and dropout's key."""

    spec: LayerSpec
    params: dict[str, torch.Tensor]
    x: torch.Tensor
    cotangent: torch.Tensor
    key: int | None = None


def case(spec, shape, seed, *, dtype=torch.float64, factors=None, key=None):
    """A case of random numbers. `shape` is that of the tokens; `factors` is the adapter's dtype where it is another."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*size):
        return torch.randn(size, generator=generator, dtype=torch.float64)

    params = {
        name: normal(*sharding.canonical_shape(spec, name)).to(factors or dtype if "lora" in name else dtype)
        for name in sharding.rules(spec)
    }
    if spec.kind == "embedding":
        x = torch.randint(spec.in_features, shape, generator=generator)
        if spec.padding_idx is not None and x.numel():
            x.view(-1)[0] = spec.padding_idx
    else:
        x = normal(*shape, spec.in_features).to(dtype)
    cotangent = normal(*shape, spec.out_features).to(dtype)
    return Case(spec=spec, params=params, x=x, cotangent=cotangent, key=key)


@st.composite
def token_shapes(draw, spec):
    """The leading dimensions of an input: up to 3, the one that sequence parallel cuts a multiple of the axis."""
    first = 0 if spec.sequence_dim is None else spec.sequence_dim + 1
    shape = [draw(st.integers(1, 4)) for _ in range(draw(st.integers(first, 3)))]
    if spec.sequence_dim is not None:
        shape[spec.sequence_dim] = spec.axis.size * draw(st.integers(1, 2))
    return tuple(shape)


@st.composite
def cases(draw, row, *, dtypes=(torch.float64,), **attributes):
    """A case for one row of the table."""
    dtype = draw(st.sampled_from(dtypes))
    spec = draw(specs(row, **attributes))
    key = draw(st.none() | st.integers(-(1 << 63), (1 << 63) - 1))
    return case(spec, draw(token_shapes(spec)), draw(st.integers(0, 1 << 20)), dtype=dtype, key=key)


def fixed_spec(row, **attributes):
    """A LayerSpec of one row of the table, without drawing: in and out 12 and 24 unless said, 4 processes, rank 3."""
    kinds = {
        "column, output gathered": {"kind": "column", "gather_output": True},
        "embedding, vocabulary": {"kind": "embedding"},
        "embedding, dimension": {"kind": "embedding", "shard_across_embedding": True},
    }
    defaults = {"in_features": 12, "out_features": 24, "rank": 0 if row == "replicated" else 3, "alpha": 2.0}
    size = attributes.pop("size", 4)
    return LayerSpec(**defaults | kinds.get(row, {"kind": row}) | {"axis": Axis(size=size)} | attributes)


def plain(spec):
    """What the oracle is told of a layer: numbers, no spec."""
    layer = {"kind": spec.kind, "fan_in_fan_out": spec.fan_in_fan_out, "padding_idx": spec.padding_idx}
    if spec.rank:
        layer["scaling"] = spec.alpha / (math.sqrt(spec.rank) if spec.use_rslora else spec.rank)
    return layer
