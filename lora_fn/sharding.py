"""How is each kind cut, and which gradient needs a sum? The rules table, and nothing else decides it.

A row is a kind of layer in one form (column with its output gathered is another form of column). Per parameter it says
how it lies over the axis, and when the backward leaves its gradient as a partial sum over the axis. Per row it says by
which scheme the update meets the base's collectives, without and with sequence parallel:

- "fold": the update is added to the base's output before the base's own reduction, or after its own copy: no
  collective, no element more.
- "concat": the rank-sized H = x A^T rides the base's own gather or reduce-scatter, beside X or Y.
- "rank": both factors are cut, one of them over the rank. H is gathered over the rank (or, as a partial sum,
  reduce-scattered): a collective of its own forward and one backward, 1 / p of the FLOPs on each process, and no
  gradient of a factor to be summed.

Everything reads this table: apply, shard, unshard, reshard, init, save, load, gradient sync and norm, the tests.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from torch import Tensor

from lora_fn import layout as layouts
from lora_fn.errors import SpecError
from lora_fn.layer_spec import FusedPart, LayerSpec
from lora_fn.layout import Layout
from lora_fn.once import once
from lora_fn.placement import Placement, Replicate, Shard

NEVER, SEQUENCE, ALWAYS = "never", "sequence", "always"
TOKENS = "trainable_tokens_delta"  # rows that replace some of the weight's, as in PEFT
SCALE = "weight_scale"  # what a quantised weight is multiplied with; it lies as the weight does


@dataclass(frozen=True, slots=True)
class Rule:
    """One parameter of one kind.

    Args:
        placement: How the parameter lies over the axis. Dimensions are those of the stored tensor.
        partial: When its gradient is a partial sum over the axis: "never", "sequence" (under sequence parallel, or
            where the layer sees local heads only), or "always".
    """

    placement: Placement
    partial: str = NEVER


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One row of the rules table.

    Args:
        params: Parameter name -> rule.
        scheme: The scheme without, and with sequence parallel.
        extra_forward: Collectives that the adapter adds to the forward: without, with sequence parallel.
        extra_backward: The same for the backward, when the base is frozen and its input wants a gradient (an
            embedding's input has none: there the frozen base has no backward at all).
    """

    params: Mapping[str, Rule]
    scheme: tuple[str, str]
    extra_forward: tuple[int, int] = (0, 0)
    extra_backward: tuple[int, int] = (0, 0)


def _row(
    scheme: tuple[str, str],
    extra_backward: tuple[int, int] = (0, 0),
    extra_forward: tuple[int, int] = (0, 0),
    **params: Rule,
) -> Row:
    return Row(params=params, scheme=scheme, extra_forward=extra_forward, extra_backward=extra_backward)


_whole = Rule(Replicate())
_whole_sequence = Rule(Replicate(), SEQUENCE)
_whole_always = Rule(Replicate(), ALWAYS)
_rows = Rule(Shard(0))
_columns = Rule(Shard(1))

_of_column: dict[str, Any] = {
    "weight": _rows,
    "weight_scale": _rows,
    "bias": _rows,
    "lora_A": _whole_always,
    "lora_B": _rows,
    "lora_B_bias": _rows,
    "lora_magnitude_vector": _rows,
    "lora_diag": _whole_always,
}
_of_column_by_rank = _of_column | {"lora_A": _rows}
_of_row_by_rank: dict[str, Any] = {
    **dict.fromkeys(("weight", "weight_scale"), _columns),
    "bias": _whole_sequence,
    **dict.fromkeys(("lora_A", "lora_B"), _columns),
    "lora_B_bias": _whole_sequence,
    "lora_magnitude_vector": _whole_always,
    "lora_diag": _rows,
}
_of_experts_column = {
    name: rule for name, rule in _of_column.items() if name not in ("lora_diag", SCALE)
} | dict.fromkeys(("bias", "lora_B", "lora_B_bias", "lora_magnitude_vector"), _columns)
_of_experts_row: dict[str, Any] = {
    "bias": _whole,
    "lora_A": Rule(Shard(2)),
    "lora_B": _whole_always,
    "lora_B_bias": _whole,
    "lora_magnitude_vector": _whole_always,
}

TABLE: Mapping[str, Row] = {
    "linear": _row(
        ("fold", "fold"),
        weight=_whole_sequence,
        weight_scale=_whole_sequence,
        bias=_whole_sequence,
        lora_A=_whole_sequence,
        lora_B=_whole_sequence,
        lora_B_bias=_whole_sequence,
        lora_magnitude_vector=_whole_sequence,
        lora_diag=_whole_sequence,
        trainable_tokens_delta=_whole_sequence,
    ),
    "column": _row(("fold", "concat"), **_of_column, trainable_tokens_delta=_whole_always),
    "column, fused": _row(("fold", "concat"), **_of_column),
    # Key-value heads lie in several places: the gradients of such copies are summed over those places.
    "qkv": _row(("fold", "concat"), **_of_column),
    "column, output gathered": _row(
        ("fold", "fold"),
        weight=_rows,
        weight_scale=_rows,
        bias=_whole,
        lora_A=_whole_always,
        lora_B=_rows,
        lora_B_bias=_whole,
        lora_magnitude_vector=_rows,
        lora_diag=_whole_always,
        trainable_tokens_delta=_whole_always,
    ),
    # What multiplies the partial output, a magnitude, has a partial gradient as lora_B has.
    "row": _row(
        ("fold", "concat"),
        weight=_columns,
        weight_scale=_columns,
        bias=_whole_sequence,
        lora_A=_columns,
        lora_B=Rule(Replicate(), ALWAYS),
        lora_B_bias=_whole_sequence,
        lora_magnitude_vector=_whole_always,
        lora_diag=_whole_always,
    ),
    # By rank (see `LayerSpec.scheme`): whatever has the rank and was whole is cut over it.
    "column, by rank": _row(("rank", "rank"), (1, 1), (1, 1), **_of_column_by_rank),
    "column, fused, by rank": _row(("rank", "rank"), (1, 1), (1, 1), **_of_column_by_rank),
    "qkv, by rank": _row(("rank", "rank"), (1, 1), (1, 1), **_of_column_by_rank),
    "row, by rank": _row(("rank", "rank"), (1, 1), (1, 1), **_of_row_by_rank),
    # The base's backward needs no gather of dY, because ids want no gradient: dB costs one gather of tokens * rank.
    "embedding, vocabulary": _row(
        ("fold", "concat"),
        (0, 1),
        weight=_rows,
        lora_A=_columns,
        lora_B=_whole_always,
        lora_magnitude_vector=_whole_always,
        trainable_tokens_delta=_whole_always,
    ),
    # Under sequence parallel the whole output is cut afterwards; dA and dB want dY gathered.
    "embedding, dimension": _row(
        ("fold", "fold"),
        (0, 1),
        weight=_columns,
        lora_A=_whole_always,
        lora_B=_rows,
        lora_magnitude_vector=_rows,
        trainable_tokens_delta=_columns,
    ),
    # Their activations have the channels before height and width; so has a magnitude, [1, out, 1, 1].
    "conv2d, output channels": _row(("fold", "fold"), **_of_column | {"lora_magnitude_vector": _columns}),
    "conv2d, input channels": _row(
        ("fold", "fold"),
        weight=_columns,
        bias=_whole,
        lora_A=_columns,
        lora_B=_whole_always,
        lora_B_bias=_whole,
        lora_magnitude_vector=_whole_always,
    ),
    # The first dimension of each is the expert; a transposed weight is [experts, in, out].
    "experts, column": _row(("fold", "fold"), **_of_experts_column | {"weight": _columns}),
    "experts, column, transposed": _row(("fold", "fold"), **_of_experts_column | {"weight": Rule(Shard(2))}),
    "experts, row": _row(("fold", "fold"), weight=Rule(Shard(2)), **_of_experts_row),
    "experts, row, transposed": _row(("fold", "fold"), weight=_columns, **_of_experts_row),
    "replicated": _row(
        ("fold", "fold"),
        weight=_whole_sequence,
        bias=_whole_sequence,
    ),
}

# Parameter that only one variant of the update has -> that variant.
VARIANTS_OWN: Mapping[str, str] = {"lora_magnitude_vector": "dora", "lora_diag": "kasa"}

# Kind -> what its rows are called, without and with `shard_input`.
_SIDES = {"conv2d": ("output channels", "input channels"), "experts": ("column", "row")}


def row_name(spec: LayerSpec) -> str:
    """The name of the row of `TABLE` that holds for a layer."""
    return _form(spec) if spec.scheme is None else f"{_form(spec)}, by {spec.scheme}"


def _form(spec: LayerSpec) -> str:
    if spec.kind == "embedding":
        return "embedding, dimension" if spec.shard_across_embedding else "embedding, vocabulary"
    if spec.kind in _SIDES:
        name = f"{spec.kind}, {_SIDES[spec.kind][spec.shard_input]}"
        return f"{name}, transposed" if spec.fan_in_fan_out else name
    if spec.kind == "column" and spec.parts:
        return "column, fused"
    return "column, output gathered" if spec.gather_output else spec.kind


def row(spec: LayerSpec) -> Row:
    """The row of `TABLE` that holds for a layer."""
    return TABLE[row_name(spec)]


def rule(spec: LayerSpec, name: str) -> Rule:
    """The rule of one parameter: that of "lora_A" for "lora_A.q"."""
    if spec.kind == "replicated":
        return _whole_sequence
    base = name.partition(".")[0]
    found = row(spec).params[base]
    if base == SCALE and isinstance(found.placement, Shard) and _scale_sizes(spec)[found.placement.dim] is None:
        return _whole
    # The columns of the blocks of a block-diagonal lora_A are not those of the inputs: every process has all of them.
    return _whole_always if base == spec.block_diagonal and found.placement == Shard(1) else found


@once
def rules(spec: LayerSpec) -> Mapping[str, Rule]:
    """The rules of the parameters that a layer has: of the base, and of the adapter where there is one.

    Example:
        >>> rules(LayerSpec(kind="row", in_features=4, out_features=6, rank=2))["lora_A"].placement
        Shard(dim=1)
    """
    return MappingProxyType({name: rule(spec, name) for name in names(spec)})


@once
def names(spec: LayerSpec) -> tuple[str, ...]:
    """The names of a layer's parameters, in the table's order, and in that of its parts."""
    if spec.shapes:
        return tuple(name for name, _ in spec.shapes)
    return tuple(part.param(name) if part else name for name in row(spec).params for part in _holders(spec, name))


def adapter_names(spec: LayerSpec) -> tuple[str, ...]:
    """The names of the adapter's parameters, in the same order."""
    return tuple(name for name in names(spec) if name.startswith("lora_"))


@once
def drawn_names(spec: LayerSpec) -> tuple[str, ...]:
    """Those of them that a new adapter draws (see `initialize`); the others come of the weight (see `variants`)."""
    return tuple(name for name in adapter_names(spec) if name.partition(".")[0] != "lora_magnitude_vector")


@once
def derived_names(spec: LayerSpec) -> tuple[str, ...]:
    """The adapter's parameters that are not drawn."""
    return tuple(name for name in adapter_names(spec) if name not in drawn_names(spec))


@once
def trained_names(spec: LayerSpec) -> tuple[str, ...]:
    """The names of the parameters that are trained, in the same order: the adapter's, unless `spec.trained` says so."""
    if spec.trained is None:
        return adapter_names(spec)
    return tuple(name for name in names(spec) if name in spec.trained or name.partition(".")[0] in spec.trained)


@once
def stored_names(spec: LayerSpec) -> tuple[str, ...]:
    """The names of the parameters that the file of an adapter holds: the adapter's, and whatever else is trained."""
    kept = {*adapter_names(spec), *trained_names(spec)}
    return tuple(name for name in names(spec) if name in kept)


def _holders(spec: LayerSpec, name: str) -> tuple[FusedPart | None, ...]:
    """The parts that have a parameter of their own of that kind; (None,) where there is one for all, () for none."""
    if name.startswith("lora_"):
        if (name == "lora_B_bias" and not spec.lora_bias) or VARIANTS_OWN.get(name, spec.variant) != spec.variant:
            return ()
        return (None,) if name == "lora_A" and spec.share_A else spec.updates
    if (name == "bias" and not spec.bias) or (name == TOKENS and not spec.tokens):
        return ()
    if name == SCALE and (spec.quantization is None or spec.quantization.scale == "tensor"):
        return () if spec.quantization is None else (None,)
    return (None,) if spec.fuse_qkv else spec.parts


def _scale_sizes(spec: LayerSpec) -> tuple[int | None, int | None]:
    """How many outputs, and inputs, have one scale; None where all have."""
    assert spec.quantization is not None
    step = {"block": spec.quantization.block}.get(spec.quantization.scale or "")
    return (None if spec.quantization.scale == "tensor" else 1), step


def partial(spec: LayerSpec, name: str) -> bool:
    """Whether the backward of one process leaves this parameter's gradient as a partial sum over the axis."""
    sequence = spec.sequence_dim is not None or spec.input == "sharded"
    return spec.axis.size > 1 and rule(spec, name).partial in ((ALWAYS, SEQUENCE) if sequence else (ALWAYS,))


def canonical_shape(spec: LayerSpec, name: str) -> tuple[int, ...]:
    """The shape of a parameter in its canonical form: full, unpadded, parts one after the other."""
    if name == TOKENS:
        return (len(spec.tokens), spec.out_features if spec.kind == "embedding" else spec.in_features)
    if spec.shapes:
        return dict(spec.shapes)[name]
    i, base, ending = spec.in_features, *name.partition(".")[::2]
    part = next((p for p in spec.parts if p.name == ending), None)
    o = spec.out_features if part is None else part.size
    r = next((p.rank for p in spec.parts if p.rank), spec.rank) if part is None else part.rank
    if spec.kind == "embedding":
        return {"weight": (i, o), "lora_A": (r, i), "lora_B": (o, r)}.get(base, (o,))
    if spec.kind == "replicated":
        return (o,)
    if spec.kind == "experts":
        e = spec.num_experts or 0
        whole = (e, i, o) if spec.fan_in_fan_out else (e, o, i)
        return {"weight": whole, "lora_A": (e, r, i), "lora_B": (e, o, r)}.get(base, (e, o))
    if spec.window is not None:
        kernel = spec.window.kernel_size
        wide: dict[str, tuple[int, ...]] = {"weight": (o, i, *kernel), "lora_A": (r, i, *kernel)}
        wide |= {"lora_B": (o, r, 1, 1), "lora_magnitude_vector": (1, o, 1, 1)}
        return wide.get(base, (o,))
    blocks = {spec.block_diagonal: spec.blocks}
    inside, within = i // spec.group_size // blocks.get("lora_A", 1), r // blocks.get("lora_B", 1)
    weight = (i, o) if spec.fan_in_fan_out else (o, i)
    if spec.quantization is not None and base in ("weight", SCALE):
        if base == "weight":
            return (o, i // _packed(spec))
        rows, columns = _scale_sizes(spec)
        return (1,) if rows is None else (o, 1 if columns is None else i // columns)
    return {"weight": weight, "lora_A": (r, inside), "lora_B": (o, within), "lora_diag": (r,)}.get(base, (o,))


def _packed(spec: LayerSpec) -> int:
    """How many inputs' elements of a weight are in one of the stored tensor's."""
    return 2 if spec.quantization is not None and spec.quantization.code == "nf4" else 1


def layout(spec: LayerSpec, name: str) -> Layout | None:
    """How the cut dimension of a parameter lies over the axis; None where every process has it whole."""
    placement = rule(spec, name).placement
    if not isinstance(placement, Shard):
        return None
    if placement.dim == rank_dim(spec, name):
        return layouts.plain(canonical_shape(spec, name)[placement.dim], spec.axis.size)
    if spec.parts:
        whole = layouts.fuse(*(_part_layout(spec, number) for number in range(len(spec.parts))))
        ending = name.partition(".")[2]
        return whole.part(ending) if ending else whole
    if spec.heads is not None:
        groups = {"lora_A": spec.group_size, "weight": _packed(spec)}
        groups |= {} if spec.quantization is None else {SCALE: spec.quantization.block}
        return input_layout(spec, groups.get(name, 1))
    size = canonical_shape(spec, name)[placement.dim]
    return layouts.plain(size, spec.axis.size, pad=spec.pad, stride=spec.stride)


def part_sizes(params: Mapping[str, Tensor], spec: LayerSpec) -> dict[str, int]:
    """Part -> how many rows of the one weight of a fused layer are its own, whether that is canonical or local.

    Copies of heads can make a local weight as long as the canonical one, but not every part of it.
    """
    lay = layout(spec, "weight")
    assert lay is not None
    whole = {part.name: part.size for part in spec.parts}
    ours = all(params[part.param("lora_B")].shape[0] == part.size for part in spec.updates)
    return whole if ours and params["weight"].shape[0] == lay.size else dict(lay.local_sizes)


def input_layout(spec: LayerSpec, group: int = 1) -> Layout:
    """How the input features of a row layer (or groups of them, each of a size) lie over the axis: evenly, or as the
    query heads that they hold do."""
    if spec.heads is None:
        return layouts.plain(spec.in_features // group, spec.axis.size)
    copies = spec.heads.copies(spec.axis.size)
    return layouts.query_heads(
        spec.in_features // group, spec.heads.key_value, spec.axis.size, multiplier=copies, order=spec.heads.order
    )


def _part_layout(spec: LayerSpec, number: int) -> Layout:
    part, heads = spec.parts[number], spec.heads
    if heads is None:
        return layouts.plain(part.size, spec.axis.size, name=part.name)
    lay = layouts.query_heads if number == 0 else layouts.key_value_heads
    return lay(
        part.size,
        heads.key_value,
        spec.axis.size,
        multiplier=heads.copies(spec.axis.size),
        order=heads.order,
        name=part.name,
    )


def rank_dim(spec: LayerSpec, name: str) -> int | None:
    """The dimension of a parameter that has the rank; None where there is none."""
    found = {"lora_A": 0, "lora_B": 1, "lora_diag": 0}.get(name.partition(".")[0])
    return found if found is None or spec.kind != "experts" else found + 1


def over_rank(spec: LayerSpec, name: str) -> bool:
    """Whether it is the rank along which the parameter of a plain update is cut."""
    dim = rank_dim(spec, name)
    return dim is not None and row(spec).params[name.partition(".")[0]].placement == Shard(dim)


def copied(spec: LayerSpec, name: str) -> bool:
    """Whether elements of a parameter lie in several places, so that their gradients are summed over those."""
    if spec.kind != "qkv" or spec.heads is None or spec.heads.copies(spec.axis.size) == 1 or over_rank(spec, name):
        return False
    ending = name.partition(".")[2]
    return isinstance(rule(spec, name).placement, Shard) and ending != spec.parts[0].name


@once
def summed_names(spec: LayerSpec) -> frozenset[str]:
    """The parameters whose gradients are summed: over the axis, or over the places of an element."""
    return frozenset(name for name in names(spec) if partial(spec, name) or copied(spec, name))


def local_shape(spec: LayerSpec, name: str) -> tuple[int, ...]:
    """The shape of a parameter on one process, padding included."""
    shape, placement, cut = list(canonical_shape(spec, name)), rule(spec, name).placement, layout(spec, name)
    if cut is not None and isinstance(placement, Shard):
        shape[placement.dim] = cut.local_size
    return tuple(shape)


def check_names(found: set[str], spec: LayerSpec) -> None:
    """Refuse a dict of parameters that has other names than the layer.

    Raises:
        SpecError: Names the missing and the unexpected ones.
    """
    expected = set(names(spec))
    if found != expected:
        raise SpecError(
            f"params of a {spec.kind} layer: found {sorted(found)}, expected {sorted(expected)}; "
            f"missing {sorted(expected - found)}, unexpected {sorted(found - expected)}."
        )
