"""How is each kind cut, and which gradient needs a sum? The rules table, and nothing else decides it.

A row is a kind of layer in one form (column with its output gathered is another form of column). Per parameter it says
how it lies over the axis, and when the backward leaves its gradient as a partial sum over the axis. Per row it says by
which scheme the update meets the base's collectives, without and with sequence parallel:

- "fold": the update is added to the base's output before the base's own reduction, or after its own copy: no
  collective, no element more.
- "concat": the rank-sized H = x A^T rides the base's own gather or reduce-scatter, beside X or Y.

Everything reads this table: apply, shard, unshard, reshard, init, save, load, gradient sync and norm, the tests.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from lora_fn.errors import SpecError
from lora_fn.placement import Placement, Replicate, Shard
from lora_fn.spec import LayerSpec

NEVER, SEQUENCE, ALWAYS = "never", "sequence", "always"


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


def _row(scheme: tuple[str, str], extra_backward: tuple[int, int] = (0, 0), **params: Rule) -> Row:
    return Row(params=MappingProxyType(params), scheme=scheme, extra_backward=extra_backward)


_whole = Rule(Replicate())
_whole_sequence = Rule(Replicate(), SEQUENCE)
_whole_always = Rule(Replicate(), ALWAYS)
_rows = Rule(Shard(0))
_columns = Rule(Shard(1))

TABLE: Mapping[str, Row] = MappingProxyType(
    {
        "linear": _row(
            ("fold", "fold"),
            weight=_whole_sequence,
            bias=_whole_sequence,
            lora_A=_whole_sequence,
            lora_B=_whole_sequence,
            lora_B_bias=_whole_sequence,
        ),
        "column": _row(
            ("fold", "concat"),
            weight=_rows,
            bias=_rows,
            lora_A=_whole_always,
            lora_B=_rows,
            lora_B_bias=_rows,
        ),
        "column, output gathered": _row(
            ("fold", "fold"),
            weight=_rows,
            bias=_whole,
            lora_A=_whole_always,
            lora_B=_rows,
            lora_B_bias=_whole,
        ),
        "row": _row(
            ("fold", "concat"),
            weight=_columns,
            bias=_whole_sequence,
            lora_A=_columns,
            lora_B=Rule(Replicate(), ALWAYS),
            lora_B_bias=_whole_sequence,
        ),
        # The base's backward needs no gather of dY, because ids want no gradient: dB costs one gather of tokens * rank.
        "embedding, vocabulary": _row(
            ("fold", "concat"),
            (0, 1),
            weight=_rows,
            lora_A=_columns,
            lora_B=_whole_always,
        ),
        # Under sequence parallel the whole output is cut afterwards; dA and dB want dY gathered.
        "embedding, dimension": _row(
            ("fold", "fold"),
            (0, 1),
            weight=_columns,
            lora_A=_whole_always,
            lora_B=_rows,
        ),
        "replicated": _row(
            ("fold", "fold"),
            weight=_whole_sequence,
            bias=_whole_sequence,
        ),
    }
)


def row_name(spec: LayerSpec) -> str:
    """The name of the row of `TABLE` that holds for a layer."""
    if spec.kind == "embedding":
        return "embedding, dimension" if spec.shard_across_embedding else "embedding, vocabulary"
    return "column, output gathered" if spec.gather_output else spec.kind


def row(spec: LayerSpec) -> Row:
    """The row of `TABLE` that holds for a layer."""
    return TABLE[row_name(spec)]


def rules(spec: LayerSpec) -> dict[str, Rule]:
    """The rules of the parameters that a layer has: of the base, and of the adapter where rank > 0.

    Example:
        >>> rules(LayerSpec(kind="row", in_features=4, out_features=6, rank=2))["lora_A"].placement
        Shard(dim=1)
    """
    return {name: rule for name, rule in row(spec).params.items() if name in _present(spec)}


def adapter_names(spec: LayerSpec) -> tuple[str, ...]:
    """The names of the adapter's parameters, in the table's order."""
    return tuple(name for name in rules(spec) if name.startswith("lora_"))


def partial(spec: LayerSpec, name: str) -> bool:
    """Whether the backward of one process leaves this parameter's gradient as a partial sum over the axis."""
    sequence = spec.sequence_dim is not None or spec.input == "sharded"
    return spec.axis.size > 1 and row(spec).params[name].partial in ((ALWAYS, SEQUENCE) if sequence else (ALWAYS,))


def canonical_shape(spec: LayerSpec, name: str) -> tuple[int, ...]:
    """The shape of a parameter in its canonical form: full, unpadded."""
    i, o, r = spec.in_features, spec.out_features, spec.rank
    if spec.kind == "embedding":
        return {"weight": (i, o), "lora_A": (r, i), "lora_B": (o, r)}[name]
    if spec.kind == "replicated":
        return (o,)
    weight = (i, o) if spec.fan_in_fan_out else (o, i)
    return {"weight": weight, "bias": (o,), "lora_A": (r, i), "lora_B": (o, r), "lora_B_bias": (o,)}[name]


def local_shape(spec: LayerSpec, name: str) -> tuple[int, ...]:
    """The shape of a parameter on one process, padding included."""
    shape = list(canonical_shape(spec, name))
    placement = rules(spec)[name].placement
    if isinstance(placement, Shard):
        shape[placement.dim] = -(-shape[placement.dim] // spec.axis.size)
    return tuple(shape)


def check_names(names: set[str], spec: LayerSpec) -> None:
    """Refuse a dict of parameters that has other names than the layer.

    Raises:
        SpecError: Names the missing and the unexpected ones.
    """
    expected = _present(spec)
    if names != expected:
        raise SpecError(
            f"params of a {spec.kind} layer: found {sorted(names)}, expected {sorted(expected)}; "
            f"missing {sorted(expected - names)}, unexpected {sorted(names - expected)}."
        )


def _present(spec: LayerSpec) -> set[str]:
    names = {"weight"}
    if spec.bias:
        names.add("bias")
    if spec.rank:
        names |= {"lora_A", "lora_B"}
    if spec.lora_bias:
        names.add("lora_B_bias")
    return names
