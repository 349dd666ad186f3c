"""What does a layer cost? FLOPs, collectives and bytes, counted from its spec, and the seconds of a machine for them.

Counts are of one process and one microbatch of T tokens (of all processes of the axis together, as the logical
activations have them). The base is frozen, and its input wants a gradient (an embedding's cannot). By the scheme, T_A
tokens meet lora_A on each process and T_B meet lora_B:

    scheme    a column layer                            a row layer (and an embedding cut by its vocabulary)
    fold      T_A = T_B = T                             T_A = T_B = T
    concat    T_A = T / p, H rides the gather of X      T_B = T / p, H rides the reduce-scatter of Y
    rank      T_A = T_B = T, lora_A cut over the rank   T_A = T_B = T, lora_B cut over the rank

With them, 2 (T_A |A| + T_B |B|) FLOPs forward and twice that backward, where |A| and |B| are a process's elements of
the factors: the rules table knows those, and which gradients are summed once per step. Fewer, where a layer that is not
fused makes B A first, as it does of a large rank (`product.order`). "module" is what Optimum Neuron and
neuronx-distributed do, for comparison: the factors are parallel layers of their own beside the base.

What is not counted: what a variant of the update adds, dropout's masks, biases, and whatever has the rank alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from lora_fn import product, sharding
from lora_fn.errors import SpecError
from lora_fn.layer_spec import LayerSpec
from lora_fn.machines import Machine
from lora_fn.placement import Shard

KINDS = ("linear", "column", "qkv", "row", "embedding")  # that have a cost here
FOLD, CONCAT, RANK, MODULE = "fold", "concat", "rank", "module"
SCHEMES = (FOLD, CONCAT, RANK, MODULE)
GATHER, SCATTER, REDUCE = "all-gather", "reduce-scatter", "all-reduce"
ITEMSIZES: Mapping[str | None, int] = {None: 0, "bfloat16": 2, "float16": 2, "float32": 4, "float64": 8}
GRADIENT_BYTES = 4  # of an element of a factor's gradient


@dataclass(frozen=True, slots=True, kw_only=True)
class Product:
    """Matrix products of the same operands: their FLOPs, and the bytes of activations and base that they move."""

    flops: int
    moved: int

    def seconds(self, machine: Machine) -> float:
        """Of whichever takes longer."""
        return max(self.flops / machine.flops, self.moved / machine.memory_bandwidth)


@dataclass(frozen=True, slots=True, kw_only=True)
class Collective:
    """One collective, or what rides one.

    Args:
        op: "all-gather", "reduce-scatter" or "all-reduce".
        elements: Of the whole: of what is gathered, or of what each process has of the sum.
        itemsize: Bytes of an element.
        size: Processes that take part.
        own: Whether the adapter brings it; else its elements ride a collective that is there.
    """

    op: str
    elements: int
    itemsize: int
    size: int
    own: bool = True

    @property
    def sent(self) -> float:
        """Bytes that a process sends around a ring."""
        share = (self.size - 1) / self.size
        return share * self.elements * self.itemsize * (2 if self.op == REDUCE else 1)

    def seconds(self, machine: Machine, stride: int = 1) -> float:
        """Of its latency, where it is its own, and its bytes. `stride` is as in `Machine.link`."""
        latency, bandwidth = machine.link(self.size, stride)
        return latency * (self.own and self.size > 1) + self.sent / bandwidth


@dataclass(frozen=True, slots=True, kw_only=True)
class Pass:
    """A forward or a backward."""

    products: tuple[Product, ...] = ()
    collectives: tuple[Collective, ...] = ()

    @property
    def flops(self) -> int:
        """Of all products."""
        return sum(each.flops for each in self.products)

    @property
    def own(self) -> tuple[Collective, ...]:
        """The collectives that do not ride."""
        return tuple(each for each in self.collectives if each.own)

    def compute(self, machine: Machine) -> float:
        """Seconds of all products."""
        return sum(each.seconds(machine) for each in self.products)

    def communication(self, machine: Machine) -> float:
        """Seconds of all collectives."""
        return sum(each.seconds(machine) for each in self.collectives)


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """What a base, or an update, costs one process per microbatch.

    Args:
        forward, backward: The two passes.
        saved: Bytes of H that are kept for the backward (of B A, where that is made first).
        inputs: Bytes of lora_A's input that are kept for the backward, unless something else keeps them already.
        held: Elements of the factors.
        summed: Elements of gradients that are summed over the axis once per step.
    """

    forward: Pass
    backward: Pass
    saved: int = 0
    inputs: int = 0
    held: int = 0
    summed: int = 0

    @property
    def flops(self) -> int:
        """Forward and backward."""
        return self.forward.flops + self.backward.flops

    @property
    def own(self) -> int:
        """How many collectives of its own there are, forward and backward."""
        return len(self.forward.own) + len(self.backward.own)

    @property
    def elements(self) -> int:
        """Elements of all collectives, those that ride too."""
        return sum(each.elements for each in (*self.forward.collectives, *self.backward.collectives))

    def sync(self, size: int) -> Collective:
        """The all-reduce of its partial gradients, of which there is one for all layers (so without a latency)."""
        return Collective(op=REDUCE, elements=self.summed, itemsize=GRADIENT_BYTES, size=size, own=False)

    def seconds(self, machine: Machine) -> float:
        """Forward and backward, one after the other, nothing overlapped; without the sync."""
        return sum(each.compute(machine) + each.communication(machine) for each in (self.forward, self.backward))


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """Which scheme is the cheapest, and what each would cost.

    Args:
        scheme: The one that takes the fewest seconds.
        costs: Scheme -> its counts, of those that the layer can have.
        seconds: Scheme -> its seconds per microbatch.
    """

    scheme: str
    costs: Mapping[str, Cost]
    seconds: Mapping[str, float]

    @property
    def why(self) -> str:
        """The seconds of each, as text."""
        return ", ".join(f"{scheme} {seconds * 1e6:.1f} us" for scheme, seconds in self.seconds.items())

    def __str__(self) -> str:
        return f"{self.scheme} ({self.why})"


def choose(
    spec: LayerSpec,
    tokens: int,
    machine: Machine,
    *,
    itemsize: int = 2,
    microbatches: int | None = None,
    own: str | None = None,
) -> Choice:
    """The cheapest scheme of a layer: that of the rules table, or "rank".

    Args:
        spec: The layer, its axis bound or not. Its own `scheme` does not matter.
        tokens: T, per microbatch.
        machine: Whose seconds count.
        itemsize: Bytes of an element of the activations.
        microbatches: Per step, which share the sync of the gradients; None for so many that it costs nothing.
        own: What the layer does without "rank", where that is not the table's: "concat" where the gather before it
            brings H beside a "gathered" input.

    Returns:
        The choice. Of two that are equal, the table's; so too, with no costs, for a kind that has none here.

    Raises:
        SpecError: As `update`.

    Example:
        >>> from lora_fn import Axis
        >>> from lora_fn.machines import MACHINES
        >>> spec = LayerSpec(kind="column", in_features=4096, out_features=4096, rank=512, axis=Axis(size=8))
        >>> choose(spec, 8192, MACHINES["trn1"]).scheme
        'rank'
    """
    spec = replace(spec, scheme=None)
    own = own_scheme(spec) if own is None else own
    if spec.kind not in KINDS:
        return Choice(scheme=own, costs={}, seconds={})
    candidates = [own, *([RANK] if can_rank(spec) else [])]
    costs = {scheme: update(spec, tokens, scheme, itemsize=itemsize) for scheme in candidates}
    seconds = {}
    for scheme, cost in costs.items():
        sync = cost.sync(spec.axis.size).seconds(machine) / microbatches if microbatches else 0.0
        seconds[scheme] = cost.seconds(machine) + sync
    return Choice(scheme=min(seconds, key=seconds.__getitem__), costs=costs, seconds=seconds)


def own_scheme(spec: LayerSpec) -> str:
    """The scheme that the rules table has for a layer."""
    return sharding.row(spec).scheme[_is_cut(spec)]


def schemes(spec: LayerSpec) -> tuple[str, ...]:
    """Those that have a cost for a layer, in the order of `SCHEMES`."""
    column = _is_column(spec) and not spec.gather_output
    by_vocabulary = spec.kind == "embedding" and not spec.shard_across_embedding
    rides = (column and spec.input != "replicated") or ((spec.kind == "row" or by_vocabulary) and _is_cut(spec))
    divides = all(part.rank % spec.axis.size == 0 for part in spec.updates)
    has = {FOLD: True, CONCAT: rides, RANK: (column or spec.kind == "row") and divides, MODULE: True}
    return tuple(scheme for scheme in SCHEMES if has[scheme])


def can_rank(spec: LayerSpec) -> bool:
    """Whether a layer can have scheme "rank" in place of its own: not under sequence parallel, where its own is cut
    already."""
    return RANK in schemes(spec) and bool(spec.updates) and spec.axis.size > 1 and not _is_cut(spec)


def base(spec: LayerSpec, tokens: int, *, itemsize: int = 2) -> Cost:
    """What the frozen base costs. Args and errors as for `update`."""
    _check(spec, tokens, itemsize)
    plain = replace(spec.base, quantization=None)
    here = _part(tokens, spec) if spec.kind == "linear" and _is_cut(spec) else tokens
    products = []
    for name in sharding.names(plain):
        if name.partition(".")[0] == "weight" and spec.kind != "embedding":
            outside, inside = sharding.local_shape(plain, name)
            moved = here * (outside + inside) + outside * inside
            products.append(Product(flops=2 * here * outside * inside, moved=moved * itemsize))
    forward, backward = _of_base(spec, tokens, itemsize)
    return Cost(
        forward=Pass(products=tuple(products), collectives=forward),
        backward=Pass(products=tuple(products), collectives=backward),
    )


def update(spec: LayerSpec, tokens: int, scheme: str | None = None, *, itemsize: int = 2) -> Cost:
    """What the update of a layer costs beside its base.

    Args:
        spec: Of kind linear, column, qkv, row or embedding; its axis bound or not.
        tokens: T, per microbatch.
        scheme: One of `schemes`; None for the spec's own. "rank" under sequence parallel, and "fold" there, are what
            they would cost on a gathered input.
        itemsize: Bytes of an element of the activations.

    Returns:
        Its counts.

    Raises:
        SpecError: A kind, scheme or number that has no cost here.

    Example:
        >>> from lora_fn import Axis
        >>> spec = LayerSpec(kind="column", in_features=8, out_features=4, rank=2, axis=Axis(size=2), sequence_dim=0)
        >>> update(spec, 10).flops == 6 * 10 * 2 * (8 + 4) / 2
        True
    """
    _check(spec, tokens, itemsize)
    scheme, spec = own_scheme(spec) if scheme is None else scheme, replace(spec, scheme=None)
    if scheme not in schemes(spec):
        raise SpecError(
            f"scheme: is {scheme!r}, expected one of {', '.join(schemes(spec))} for this {spec.kind} layer."
        )
    if not spec.updates:
        return Cost(forward=Pass(), backward=Pass())
    tokens_a, tokens_b = _tokens(spec, tokens, scheme)
    downs, ups, held, inputs, kept = [], [], 0, 0, 0
    for name in sharding.adapter_names(spec):
        shape = _local(spec, name, scheme)
        held += math.prod(shape)
        if name.startswith("lora_A") and spec.kind != "embedding":
            rank, inside = shape
            inputs = tokens_a * inside
            downs.append((2 * tokens_a * rank * inside, tokens_a * inside * itemsize))
        elif name.startswith("lora_B") and not name.startswith("lora_B_bias"):
            outside, rank = shape
            kept = tokens_b * rank if spec.share_A else kept + tokens_b * rank
            ups.append((2 * tokens_b * outside * rank, tokens_b * outside * itemsize))
    saved = kept * itemsize
    if _order(spec, tokens_a, scheme) == product.DELTA:
        [(_, x)], [(_, y)], outside, inside = downs, ups, *_sizes(spec)
        flops = product.flops(tokens_a, outside, inside, spec.rank)[product.DELTA] // 3
        of_x = flops * inside // (inside + outside)  # which reads X and writes Y as the two products do
        downs, ups, saved = [(of_x, x)], [(flops - of_x, y)], outside * inside * GRADIENT_BYTES
    forward, backward = _of_update(spec, tokens, scheme, itemsize)
    return Cost(
        # Forward: X read, Y read and written. Backward: X read, dX read and written, dY read twice.
        forward=Pass(products=(*_products(downs, 1, 1), *_products(ups, 1, 2)), collectives=forward),
        backward=Pass(products=(*_products(ups, 2, 2), *_products(downs, 2, 3)), collectives=backward),
        saved=saved,
        inputs=inputs * itemsize,
        held=held,
        summed=_summed(spec, scheme),
    )


def _order(spec: LayerSpec, tokens: int, scheme: str) -> str:
    """In which order a layer multiplies its factors, where nothing is communicated in between."""
    alone = scheme == FOLD and spec.kind != "embedding" and not spec.parts
    plain = spec.variant == "lora" and spec.quantization is None and not spec.tokens
    return product.order(tokens, *_sizes(spec), spec.rank) if alone and plain else product.FACTORS


def _sizes(spec: LayerSpec) -> tuple[int, int]:
    """A process's part of the outputs and inputs of a layer that is not fused."""
    return sharding.local_shape(spec, "lora_B")[0], sharding.local_shape(spec, "lora_A")[1]


def _products(of: list[tuple[int, int]], products: int, times: int) -> list[Product]:
    return [Product(flops=products * flops, moved=times * moved) for flops, moved in of]


def _check(spec: LayerSpec, tokens: int, itemsize: int) -> None:
    if spec.kind not in KINDS:
        raise SpecError(f"cost: the layer is of kind {spec.kind!r}, expected one of {', '.join(KINDS)}.")
    for name, value in (("tokens", tokens), ("itemsize", itemsize)):
        if type(value) is not int or value < 1:
            raise SpecError(f"{name}: is {value!r}, expected an integer of at least 1.")


def _is_cut(spec: LayerSpec) -> bool:
    """Whether sequence parallel cuts the activations outside of the layer."""
    return spec.sequence_dim is not None and spec.axis.size > 1


def _part(tokens: int, spec: LayerSpec) -> int:
    """A process's part of the tokens, padded."""
    return -(-tokens // spec.axis.size)


def _is_column(spec: LayerSpec) -> bool:
    return spec.kind in ("column", "qkv")


def _tokens(spec: LayerSpec, tokens: int, scheme: str) -> tuple[int, int]:
    """T_A and T_B."""
    part = _part(tokens, spec)
    if spec.kind == "linear":
        return (part, part) if _is_cut(spec) else (tokens, tokens)
    if scheme == CONCAT or (scheme == MODULE and _is_cut(spec)):
        return (part, tokens) if _is_column(spec) else (tokens, part)
    return tokens, tokens


def _local(spec: LayerSpec, name: str, scheme: str) -> tuple[int, ...]:
    """The shape of a factor on one process."""
    shape = sharding.canonical_shape(spec, name)
    if scheme == MODULE and spec.kind == "embedding":
        return shape
    if scheme == RANK and not isinstance(sharding.rule(spec, name).placement, Shard) and len(shape) == 2:
        at = 0 if name.startswith("lora_A") else 1
        return tuple(n // spec.axis.size if dim == at else n for dim, n in enumerate(shape))
    return sharding.local_shape(spec, name)


def _summed(spec: LayerSpec, scheme: str) -> int:
    """Elements of gradients that the backward leaves partial. Of "module": those that are summed nowhere there, and
    must be."""
    if scheme == MODULE and not _is_cut(spec):
        return 0
    names = sharding.adapter_names(spec)
    if not (scheme == MODULE and spec.kind == "embedding"):
        partial = {name for name in names if scheme != RANK and sharding.partial(spec, name)}
        copied = {name for name in names if scheme != MODULE and sharding.copied(spec, name)}
        names = tuple(partial | copied)
    return sum(math.prod(sharding.canonical_shape(spec, name)) for name in names)


Passes = tuple[tuple[Collective, ...], tuple[Collective, ...]]


def _of_base(spec: LayerSpec, tokens: int, itemsize: int) -> Passes:
    """The collectives of a base, forward and backward."""
    if spec.axis.size == 1 or spec.kind == "linear":
        return (), ()

    def collective(op: str, features: int) -> tuple[Collective, ...]:
        return (_collective(spec, op, tokens * features, itemsize),)

    i, o = spec.in_features, spec.out_features
    if _is_column(spec):
        if spec.input == "sharded":
            return collective(GATHER, i), collective(SCATTER, i)
        gathered = collective(GATHER, o) if spec.gather_output else ()
        return gathered, collective(REDUCE, i) if spec.input == "replicated" else ()
    if spec.kind == "embedding":
        if spec.shard_across_embedding:
            return collective(GATHER, o), ()
        return collective(SCATTER if _is_cut(spec) else REDUCE, o), ()
    split = () if spec.input_is_parallel else collective(GATHER, i)
    if _is_cut(spec):
        return collective(SCATTER, o), collective(GATHER, o) + split
    return collective(REDUCE, o) if spec.reduce_output else (), split


# (scheme, whether the sequence is cut) -> the collectives of the update of a column layer, forward and backward; and of
# a row layer, or an embedding cut by its vocabulary. What is not there has none.
Ops = tuple[tuple[str, ...], tuple[str, ...]]
_OF_COLUMN: Mapping[tuple[str, bool], Ops] = {
    (CONCAT, True): ((GATHER,), (SCATTER,)),
    (CONCAT, False): ((GATHER,), (SCATTER,)),  # where another has gathered the input
    (RANK, True): ((GATHER,), (SCATTER,)),
    (RANK, False): ((GATHER,), (SCATTER,)),
    (MODULE, True): ((GATHER,), (GATHER, SCATTER)),
    (MODULE, False): ((), (REDUCE,)),
}
_OF_ROW: Mapping[tuple[str, bool], Ops] = {
    (CONCAT, True): ((SCATTER,), (GATHER,)),
    (RANK, True): ((SCATTER,), (GATHER,)),
    (RANK, False): ((SCATTER,), (GATHER,)),
    (MODULE, True): ((SCATTER,), (GATHER,)),
    (MODULE, False): ((REDUCE,), ()),
}


def _of_update(spec: LayerSpec, tokens: int, scheme: str, itemsize: int) -> Passes:
    """The collectives of an update, forward and backward, and what rides the base's."""
    if spec.axis.size == 1 or spec.kind == "linear":
        return (), ()
    if spec.kind == "embedding":
        if scheme == MODULE or not _is_cut(spec):
            return (), ()
        if spec.shard_across_embedding:
            return (), (_collective(spec, GATHER, tokens * spec.out_features, itemsize),)
    ranks = [part.rank for part in spec.updates][: 1 if spec.share_A else None]
    ranks = ranks if scheme == MODULE else [sum(ranks)]  # what is a module of its own communicates by itself
    ops = (_OF_COLUMN if _is_column(spec) else _OF_ROW).get((scheme, _is_cut(spec)), ((), ()))
    # A frozen embedding has no backward whose gather dH could ride.
    rides = (scheme == CONCAT, scheme == CONCAT and spec.kind != "embedding")
    forward, backward = (
        tuple(_collective(spec, op, tokens * rank, itemsize, own=not ride) for rank in ranks for op in each)
        for each, ride in zip(ops, rides, strict=True)
    )
    return forward, backward + (copies_sum(spec, tokens) if scheme == MODULE else ())


def copies_sum(spec: LayerSpec, tokens: int) -> tuple[Collective, ...]:
    """What neuronx-distributed sums of dK and dV over the copies of key-value heads, once for the base and once for an
    adapter of it: () where there is one of each."""
    copies = 1 if spec.heads is None or spec.kind != "qkv" else spec.heads.copies(spec.axis.size)
    if copies == 1:
        return ()
    features = sum(part.size for part in spec.parts[1:]) * copies // spec.axis.size
    return (Collective(op=REDUCE, elements=tokens * features, itemsize=4, size=copies),)


def _collective(spec: LayerSpec, op: str, elements: int, itemsize: int, *, own: bool = True) -> Collective:
    """Sums are made in the layer's own dtype for that."""
    wide = itemsize if op == GATHER else max(itemsize, ITEMSIZES[spec.reduce_dtype])
    return Collective(op=op, elements=elements, itemsize=wide, size=spec.axis.size, own=own)
