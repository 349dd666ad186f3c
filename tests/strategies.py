"""Which layers can there be? All that `LayerSpec` accepts: its attributes are drawn from the valid combinations."""

import dataclasses
import functools
import itertools
import math
from dataclasses import dataclass

import oracle
import torch
from hypothesis import strategies as st

from lora_fn import Axis, FusedPart, Heads, LayerSpec, Quantization, SpecError, Window, quantize, sharding
from lora_fn.layer_spec import KINDS, SCALES
from lora_fn.layout import ORDERS

SIZES = (1, 2, 3, 4, 6, 8, 16)
ADAPTED = tuple(name for name in sharding.TABLE if name != "replicated")
BY_RANK = {name: name.removesuffix(", by rank") for name in ADAPTED if name.endswith(", by rank")}  # and without
FUSED = {"column, fused": "column", "qkv": "qkv"}  # rows whose layers have parts, and their kind
FUSED |= {row: FUSED[other] for row, other in BY_RANK.items() if other in FUSED}

# Rows that sequence parallel does not reach.
UNCUT = ("column, output gathered", *BY_RANK, *(name for name in ADAPTED if name.startswith(("conv2d", "experts"))))

# Attributes that can exclude each other, with their values; the sizes of the layer are drawn afterwards.
ATTRIBUTES = {
    "kind": KINDS,
    "sequence_dim": (None, 0, 1),
    "input": ("sharded", "replicated", "gathered"),
    **dict.fromkeys(("bias", "lora_bias", "fan_in_fan_out"), (False, True)),
    **dict.fromkeys(("gather_output", "input_is_parallel", "reduce_output"), (False, True)),
    **dict.fromkeys(("shard_across_embedding", "pad"), (False, True)),
    "padding_idx": (None, 0),
    "shard_input": (False, True),
}
# What a kind cannot be without.
NEEDED = {"conv2d": {"window": Window(kernel_size=(1, 1))}, "experts": {"num_experts": 1}}
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
    kinds = [kind for kind in KINDS if kind != "qkv"]
    for values in itertools.product(*(ATTRIBUTES | {"kind": kinds}).values()):
        attributes = dict(zip(ATTRIBUTES, values, strict=True))
        if attributes["shard_input"] and attributes["kind"] not in NEEDED:
            continue
        rank = 0 if attributes["kind"] == "replicated" else 1
        try:
            needed = NEEDED.get(attributes["kind"], {})
            spec = LayerSpec(in_features=1, out_features=1, rank=rank, **attributes, **needed)
        except SpecError:
            continue
        valid[sharding.row_name(spec)].append(attributes)
    of_column = [a for a in valid["column"] if not a["pad"]]
    for row, kind in FUSED.items():
        valid[row] = [a | {"kind": kind} for a in of_column]
    for row, other in BY_RANK.items():
        valid[row] = [a | {"scheme": "rank"} for a in valid[other] if a["sequence_dim"] is None]
    return valid


@st.composite
def specs(draw, row, *, sizes=SIZES, reduce_dtypes=FREE["reduce_dtype"], **fixed):
    """A LayerSpec of one row of the table, non-square, its axis of a drawn size; `fixed` attributes stay as given."""
    attributes = draw(
        st.sampled_from([a for a in combinations()[row] if all(a[k] == v for k, v in fixed.items() if k in a)])
    )
    free = {name: draw(st.sampled_from(values)) for name, values in FREE.items() if name != "reduce_dtype"}
    attributes = attributes | free | {"reduce_dtype": draw(st.sampled_from(reduce_dtypes))} | fixed
    attributes = {"variant": draw(st.sampled_from(variants_of(row, attributes)))} | attributes
    size = draw(st.sampled_from(sizes))
    if row in FUSED:
        return draw(fused_specs(row, size, attributes))
    attributes |= draw(needed(row))
    cut = {
        "in_features": BY_RANK.get(row, row) in INPUTS_CUT,
        "out_features": row.startswith("column") or row in OUTPUTS_CUT,
    }
    features = {}
    for name in ("in_features", "out_features"):
        step = size * attributes.get("stride", 1) if cut[name] and not attributes["pad"] else 1
        multiples = [step * n for n in range(1, max(3, 12 // step) + 1)]
        features[name] = draw(st.sampled_from([n for n in multiples if n not in features.values()]))
    rank = 0 if row == "replicated" else draw(ranks(row, size, min(features.values()) + 2))
    if attributes["padding_idx"] is not None:
        attributes["padding_idx"] = draw(st.integers(0, features["in_features"] - 1))
    if attributes["kind"] == "row" and attributes["input_is_parallel"] and draw(st.booleans()):
        heads = draw(head_counts(size))
        features["in_features"] = heads.query * draw(st.integers(1, 2))
        features["out_features"] += features["in_features"] == features["out_features"]
        attributes["heads"] = heads
    return draw(made(rank=rank, axis=Axis(name="tp", size=size), **features, **attributes))


def ranks(row, size, most):
    """Ranks up to `most`; where they are cut, multiples of the axis."""
    if row in BY_RANK:
        return st.integers(1, max(1, most // size)).map(lambda n: n * size)
    return st.integers(1, most)


LINEAR = ("linear", "column", "column, fused", "qkv", "column, output gathered", "row", *BY_RANK)


def variants_of(row, attributes):
    """The variants that go with a layer's other attributes."""
    found = ["lora"]
    if row != "replicated" and not attributes["lora_bias"]:
        found.append("dora")
    if row in LINEAR:
        found += [
            "bdlora",
            "alora",
            *([] if attributes["lora_bias"] else ["qalora"]),
            *([] if attributes["fan_in_fan_out"] else ["kasa"]),
        ]
    return found


@st.composite
def made(draw, variant, **attributes):
    """A LayerSpec of a variant, with options that divide what they are to."""
    plain = LayerSpec(**attributes)
    options = {"variant": variant}
    if variant == "qalora":
        heads = plain.heads if plain.kind == "row" else None
        slots = plain.axis.size if heads is None else heads.key_value * heads.copies(plain.axis.size)
        most = plain.in_features // (slots if plain.kind == "row" else 1)
        options["group_size"] = draw(st.sampled_from(divisors(most)))
    if variant == "bdlora":
        factor = options["block_diagonal"] = draw(
            st.sampled_from(["lora_A"] if plain.lora_bias else ["lora_A", "lora_B"])
        )
        sizes = [plain.in_features] if factor == "lora_A" else [part.size for part in plain.updates]
        most = math.gcd(*sizes)  # of which the ranks are made multiples
        blocks = options["blocks"] = draw(st.sampled_from([n for n in divisors(most) if n < 5]))
        options["rank"] = plain.rank * blocks
        options["parts"] = tuple(dataclasses.replace(part, rank=part.rank * blocks) for part in plain.parts)
    if variant in ("kasa", "qalora"):  # one element's gradient is a sum that may cancel: no fp32 is exact then
        more = 3 if plain.scheme is None else 3 * plain.axis.size
        options["rank"] = plain.rank and plain.rank + more
        options["parts"] = tuple(dataclasses.replace(p, rank=p.rank and p.rank + more) for p in plain.parts)
    return dataclasses.replace(plain, **options)


def divisors(number):
    """The largest first."""
    return [n for n in range(number, 0, -1) if number % n == 0]


EXPERTS = {side: tuple(name for name in ADAPTED if name.startswith(f"experts, {side}")) for side in ("column", "row")}
INPUTS_CUT = ("row", "embedding, vocabulary", "conv2d, input channels", *EXPERTS["row"])
OUTPUTS_CUT = ("embedding, dimension", "conv2d, output channels", *EXPERTS["column"])


@st.composite
def needed(draw, row):
    """The window of a conv2d, the number of experts."""
    if row.startswith("conv2d"):
        sizes = st.tuples(st.integers(1, 3), st.integers(1, 3))
        window = {name: draw(sizes) for name in ("kernel_size", "stride")}
        return {"window": Window(padding=draw(st.tuples(st.integers(0, 2), st.integers(0, 2))), **window)}
    stride = draw(st.sampled_from([1, 2])) if row in EXPERTS["column"] else 1
    return {"num_experts": draw(st.integers(1, 3)), "stride": stride} if row.startswith("experts") else {}


@st.composite
def head_counts(draw, size):
    """Heads that can be dealt to `size` processes: key-value heads with copies where it needs them, or more."""
    key_value = draw(st.integers(1, 4))
    least = math.lcm(key_value, size) // key_value
    copies = least * draw(st.integers(1, 2))
    multiplier = copies if copies > least else draw(st.sampled_from([None, copies]))
    query = key_value * copies * draw(st.integers(1, 2))
    return Heads(query=query, key_value=key_value, multiplier=multiplier, order=draw(st.sampled_from(ORDERS)))


@st.composite
def fused_specs(draw, row, size, attributes):
    """A LayerSpec with parts, any subset of them adapted, each with a rank and an alpha of its own."""
    if attributes["kind"] == "qkv":
        heads = draw(head_counts(size))
        head_dim, value_dim = draw(st.integers(1, 2)), draw(st.integers(1, 2))
        sizes = {"q": heads.query * head_dim, "k": heads.key_value * head_dim, "v": heads.key_value * value_dim}
        attributes = attributes | {"heads": heads}
    else:
        names = draw(st.sampled_from([("gate", "up"), ("a", "b", "c")]))
        sizes = {name: size * draw(st.integers(1, 3)) for name in names}
    attributes = attributes | {"fuse_qkv": draw(st.booleans())}
    total = sum(sizes.values())
    inside = draw(st.sampled_from([n for n in range(1, 13) if n != total]))
    adapted = draw(st.lists(st.sampled_from(list(sizes)), min_size=1, unique=True))
    some_rank = ranks(row, size, min(inside, total) + 2)
    alphas = st.sampled_from(FREE["alpha"])
    share = draw(st.booleans())
    one = draw(some_rank), draw(alphas)
    parts = []
    for number, (name, part_size) in enumerate(sizes.items()):
        rank, alpha = one if share else (draw(some_rank), draw(alphas))
        adapter = {"rank": rank, "alpha": alpha} if name in adapted else {}
        parts.append(FusedPart(name=name, size=part_size, number=7 * number, **adapter))
    return draw(
        made(
            in_features=inside,
            out_features=total,
            parts=tuple(parts),
            share_A=share,
            axis=Axis(name="tp", size=size),
            **{name: value for name, value in attributes.items() if name != "alpha"},
        )
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A layer with canonical tensors: parameters, input, cotangent of its output, dropout's key, aLoRA's gate."""

    spec: LayerSpec
    params: dict[str, torch.Tensor]
    x: torch.Tensor
    cotangent: torch.Tensor
    key: int | None = None
    gate: torch.Tensor | None = None


def case(spec, shape, seed, *, dtype=torch.float64, factors=None, key=None):
    """A case of random numbers. `shape` is that of the tokens; `factors` is the adapter's dtype where it is another."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*size):
        return torch.randn(size, generator=generator, dtype=torch.float64)

    full = dataclasses.replace(spec, quantization=None)
    params = {
        name: normal(*sharding.canonical_shape(full, name)).to(factors or dtype if "lora" in name else dtype)
        for name in sharding.rules(full)
    }
    if spec.variant == "dora":
        params = well_conditioned(spec, params)
    if spec.quantization is not None:
        params |= quantized(params, spec)
    if spec.kind == "embedding":
        x = torch.randint(spec.in_features, shape, generator=generator)
        if spec.padding_idx is not None and x.numel():
            x.view(-1)[0] = spec.padding_idx
    else:
        x = normal(*x_shape(spec, shape)).to(dtype)
    cotangent = normal(*y_shape(spec, shape)).to(dtype)
    gate = torch.rand(shape, generator=generator) < 0.6 if spec.variant == "alora" else None
    return Case(spec=spec, params=params, x=x, cotangent=cotangent, key=key, gate=gate)


def held(spec):
    """The names of what a quantised weight is held in; none of a plain one."""
    return [n for n in sharding.names(spec) if n.startswith("weight")] if spec.quantization is not None else []


def quantized(params, spec):
    """What the canonical weights of a layer are held in."""
    found = {}
    for name in [name for name in params if name.startswith("weight")]:
        of_all = sharding.SCALE if spec.quantization.scale == "tensor" else name.replace("weight", sharding.SCALE)
        most = None
        if spec.quantization.scale == "tensor":
            most = (
                torch.stack([p.abs().max() for n, p in params.items() if n.startswith("weight")]).max().float().view(1)
            )
        found[name], found[of_all], _ = quantize.quantize(params[name], spec.quantization, most=most)
    return found


@st.composite
def quantized_cases(draw, row, *, dtypes=(torch.float64,), **attributes):
    """As `cases`, the weight quantised: every code and scale, blocks of any size that fits."""
    fixed = attributes | ({"fan_in_fan_out": False} if row == "linear" else {})
    spec = draw(specs(row, **fixed).filter(lambda spec: spec.variant != "kasa"))
    slots = spec.axis.size if spec.kind == "row" else 1
    if spec.kind == "row" and spec.heads is not None:
        slots = spec.heads.key_value * spec.heads.copies(slots)
    step = draw(st.sampled_from([2, 4, 6]))  # so many times the inputs, so that there are blocks
    heads = {"in_features": spec.in_features * step}
    spec = dataclasses.replace(spec, **heads)
    block = draw(st.sampled_from([n for n in divisors(spec.in_features // slots) if n % 2 == 0]))
    options = [("nf4", "block"), ("nf4", "channel"), *itertools.product(("int8", "fp8"), SCALES)]
    code, scale = draw(st.sampled_from(options))
    spec = dataclasses.replace(spec, quantization=Quantization(code=code, scale=scale, block=block))
    key = draw(st.none() | st.integers(-(1 << 63), (1 << 63) - 1))
    dtype = draw(st.sampled_from(dtypes))
    return case(spec, draw(token_shapes(spec)), draw(st.integers(0, 1 << 20)), dtype=dtype, key=key)


def well_conditioned(spec, params):
    """Parameters whose update is small against every element of the weight: DoRA divides by the norms of their sums,
    and where those cancel, no arithmetic in fp32 is exact to 1e-5."""
    for part in spec.updates:
        name = part.param("lora_B")
        params[name] = params[name] * (0.1 / part.rank / max(1.0, abs(spec.scaling_of(part))))
    return {name: p + 0.5 * p.sign() if name.startswith("weight") else p for name, p in params.items()}


def x_shape(spec, shape):
    """The shape of an input of tokens of a shape, which for a conv2d is [image, height, width] or the end of it."""
    if spec.window is not None:
        images, height, width = (1, 1, 1, *shape)[-3:]
        least = spec.window.kernel_size
        return images, spec.in_features, max(height, least[0]), max(width, least[1])
    return (*(() if spec.num_experts is None else (spec.num_experts,)), *shape, spec.in_features)


def y_shape(spec, shape):
    """The shape of the output."""
    if spec.window is None:
        return (*x_shape(spec, shape)[:-1], spec.out_features)
    images, _, *sizes = x_shape(spec, shape)
    window = zip(sizes, spec.window.kernel_size, spec.window.stride, spec.window.padding, strict=True)
    return images, spec.out_features, *((n + 2 * p - k) // s + 1 for n, k, s, p in window)


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


WINDOW = Window(kernel_size=(3, 2), stride=(2, 1), padding=(1, 0))


def fixed_spec(row, **attributes):
    """A LayerSpec of one row of the table, without drawing: in and out 12 and 24 unless said, 4 processes, rank 3, or 8
    where that is cut."""
    if row in BY_RANK:
        return fixed_spec(BY_RANK[row], **{"rank": 8} | attributes, scheme="rank")
    kinds = {
        "column, output gathered": {"kind": "column", "gather_output": True},
        "embedding, vocabulary": {"kind": "embedding"},
        "embedding, dimension": {"kind": "embedding", "shard_across_embedding": True},
        "conv2d, output channels": {"kind": "conv2d", "window": WINDOW},
        "conv2d, input channels": {"kind": "conv2d", "window": WINDOW, "shard_input": True},
        "experts, column": {"kind": "experts", "num_experts": 2, "stride": 2},
        "experts, column, transposed": {"kind": "experts", "num_experts": 2, "stride": 2, "fan_in_fan_out": True},
        "experts, row": {"kind": "experts", "num_experts": 2, "shard_input": True},
        "experts, row, transposed": {"kind": "experts", "num_experts": 2, "shard_input": True, "fan_in_fan_out": True},
    }
    defaults = {"in_features": 12, "out_features": 24, "rank": 0 if row == "replicated" else 3, "alpha": 2.0}
    size = attributes.pop("size", 4)
    if row in FUSED:
        return LayerSpec(axis=Axis(size=size), kind=FUSED[row], **fused(row, defaults | attributes))
    return LayerSpec(**defaults | kinds.get(row, {"kind": row}) | {"axis": Axis(size=size)} | attributes)


def fused(row, attributes):
    """The attributes of a layer with parts, for those of one without: rank and alpha are every adapted part's, the
    features are shared out. The v of "qkv" is not adapted, and key-value heads have 2 copies."""
    rank, alpha, total = (attributes.pop(name) for name in ("rank", "alpha", "out_features"))
    adapter = {"rank": rank, "alpha": alpha if rank else 1.0}
    if row == "qkv":
        few = Heads(query=4, key_value=2, multiplier=2)
        attributes = {"heads": few if total < 64 else dataclasses.replace(few, query=8, key_value=4)} | attributes
        heads = attributes["heads"]
        head_dim = total // (heads.query + 2 * heads.key_value)
        sizes = {"q": heads.query * head_dim} | dict.fromkeys("kv", heads.key_value * head_dim)
    else:
        first = total // 24 * 8
        sizes = {"gate": first, "up": total - first}
    parts = [FusedPart(name=name, size=n, number=5 + i) for i, (name, n) in enumerate(sizes.items())]
    names = ["k", "q"] if row == "qkv" else ["gate", "up"]
    parts = [dataclasses.replace(part, **adapter) if part.name in names else part for part in parts]
    return attributes | {"out_features": total, "parts": tuple(parts), "lora_bias": attributes.get("lora_bias", False)}


def plain(spec):
    """What the oracle is told of a layer: numbers, no spec."""
    options = {"variant": spec.variant, "group": spec.group_size}
    options |= {"blocks": spec.blocks, "block_diagonal": spec.block_diagonal}
    if spec.parts:
        scale = {
            part.name: part.alpha / (math.sqrt(part.rank) if spec.use_rslora else part.rank) for part in spec.updates
        }
        parts = [(part.name, part.size, scale.get(part.name)) for part in spec.parts]
        return options | {"kind": spec.kind, "parts": parts}
    layer = options | {
        "kind": spec.kind,
        "fan_in_fan_out": spec.fan_in_fan_out,
        "padding_idx": spec.padding_idx,
    }
    if spec.window is not None:
        layer |= {"stride": spec.window.stride, "padding": spec.window.padding}
    if spec.rank:
        layer["scaling"] = spec.alpha / (math.sqrt(spec.rank) if spec.use_rslora else spec.rank)
    return layer


def keep_of(case):
    """The masks that the oracle's dropout takes, None where nothing is dropped."""
    spec = case.spec
    if case.key is None or spec.dropout == 0 or spec.kind == "embedding":
        return None
    if spec.window is not None:  # the features are the channels
        return oracle.keep_mask(case.key, case.x.movedim(1, -1).shape, spec.dropout).movedim(-1, 1)
    if not spec.parts:
        return oracle.keep_mask(case.key, case.x.shape, spec.dropout)
    first = spec.updates[0].number
    numbers = {part.name: first if spec.share_A else part.number for part in spec.updates}
    return {
        name: oracle.keep_mask(oracle.folded(case.key, number), case.x.shape, spec.dropout)
        for name, number in numbers.items()
    }
