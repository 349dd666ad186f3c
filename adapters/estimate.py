"""What does a training step of a large model cost, on paper? The costs of its layers (`lora_fn.cost`), added up.

Counted are the linear layers and the embedding, attention's products, their collectives, the update of each adapted
layer, and the sums of gradients over the step: one after the other, with nothing overlapped. Not counted: norms and
other elementwise work, the loss, the optimizer's own time, pipelines, and what a compiler makes better or worse.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from adapters import schemes
from lora_fn import Axis, FileError, FusedPart, Heads, LayerSpec, SpecError, checkpoint, cost, sharding
from lora_fn.cost import Collective, Cost, Pass, Product
from lora_fn.errors import Problems
from lora_fn.machines import Machine
from lora_fn.values import is_integer

# The modules of a decoder layer, by the layer that they are parts of; what can be adapted beside them.
PARTS: Mapping[str, tuple[str, ...]] = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "o_proj": ("o_proj",),
    "gate_up_proj": ("gate_proj", "up_proj"),
    "down_proj": ("down_proj",),
}
LINEARS = tuple(name for names in PARTS.values() for name in names)
ENDS = ("embed_tokens", "lm_head")
FACTOR_BYTES = 16  # of an element: itself, its gradient and AdamW's two moments, in float32
REDUCE = {2: "float32"}  # what activations of so many bytes are summed in


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """The sizes of a model of Llama's form.

    Args:
        name: For whoever reads of it.
        hidden, intermediate: Features.
        layers: Decoder layers.
        heads, key_value_heads: Of attention.
        vocabulary: Of the embedding and of lm_head.
        head_dim: Features of a head; None for hidden / heads.
    """

    name: str
    hidden: int
    intermediate: int
    layers: int
    heads: int
    key_value_heads: int
    vocabulary: int
    head_dim: int | None = None

    @property
    def features(self) -> tuple[int, int]:
        """Of all query heads, and of all key heads."""
        of_head = self.head_dim or self.hidden // self.heads
        return self.heads * of_head, self.key_value_heads * of_head


_LLAMA = {"key_value_heads": 8, "vocabulary": 128256}
# Sizes of Llama 3.1, from the config.json of each.
PRESETS: Mapping[str, Shape] = {
    shape.name: shape
    for shape in (
        Shape(name="llama-3-8b", hidden=4096, intermediate=14336, layers=32, heads=32, **_LLAMA),
        Shape(name="llama-3-70b", hidden=8192, intermediate=28672, layers=80, heads=64, **_LLAMA),
        Shape(name="llama-3-405b", hidden=16384, intermediate=53248, layers=126, heads=128, **_LLAMA),
    )
}
# Fields of `Shape` -> Hugging Face's keys.
KEYS: Mapping[str, str] = {
    "hidden": "hidden_size",
    "intermediate": "intermediate_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "key_value_heads": "num_key_value_heads",
    "vocabulary": "vocab_size",
    "head_dim": "head_dim",
}


def read_shape(place: str | Path) -> Shape:
    """The shape of a Hugging Face model.

    Args:
        place: Its directory, or its config.json.

    Raises:
        FileError: No such file, not JSON, sizes that are missing or cannot be, experts.
    """
    file = Path(place) / "config.json" if Path(place).is_dir() else Path(place)
    config = checkpoint.read_json(file)
    if any("expert" in key for key in config):
        raise FileError(f"{file}: is of a model with experts, expected one with a plain MLP in each layer.")
    found: dict[str, Any] = {name: config.get(key) for name, key in KEYS.items()}
    found["key_value_heads"] = found["heads"] if found["key_value_heads"] is None else found["key_value_heads"]
    problems = Problems(FileError)
    for name, value in found.items():
        if not (is_integer(value) and value >= 1) and (name, value) != ("head_dim", None):
            problems.add(str(file), f"{KEYS[name]} is {value!r}, expected an integer of at least 1.")
    problems.raise_if_any()
    return Shape(name=file.resolve().parent.name, **found)


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """How a model is trained.

    Args:
        tp, dp: Processes that the model, and the data, is cut over.
        rank: Of the adapter.
        tokens: Of a microbatch, in each tensor-parallel group.
        microbatches: Of a step, in each tensor-parallel group.
        sequence_length: Tokens of a row, for attention; None for all of a microbatch.
        sequence_parallel: Whether the sequence is cut between the layers.
        activation_checkpointing: Whether layers are computed again in the backward.
        scheme: As `lora-fn finetune` takes it: "rank", "auto" for the cheapest, None for that of the rules table.
        share_A: Whether q, k and v, and gate and up, have one lora_A each, as where the others have one module.
        targets: Names of the modules that are adapted.
        itemsize: Bytes of an element of the base and of activations.

    Raises:
        SpecError: Values that cannot be, all of them at once.
    """

    tp: int = 8
    dp: int = 1
    rank: int = 16
    tokens: int = 4096
    microbatches: int = 16
    sequence_length: int | None = None
    sequence_parallel: bool = False
    activation_checkpointing: bool = False
    scheme: str | None = None
    share_A: bool = False
    targets: tuple[str, ...] = LINEARS
    itemsize: int = 2

    def __post_init__(self) -> None:
        problems = Problems(SpecError)
        for name in ("tp", "dp", "rank", "tokens", "microbatches", "sequence_length"):
            value = getattr(self, name)
            if not (is_integer(value) and value >= 1) and (name, value) != ("sequence_length", None):
                problems.add(f"--{name.replace('_', '-')}", f"is {value!r}, expected an integer of at least 1.")
        if self.scheme not in (None, *schemes.WORDS):
            problems.add("--scheme", f"is {self.scheme!r}, expected one of {', '.join(schemes.WORDS)}.")
        if self.itemsize not in (2, 4):
            problems.add("itemsize", f"is {self.itemsize!r}, expected 2 or 4 bytes.")
        unknown = [name for name in self.targets if name not in (*LINEARS, *ENDS)]
        if unknown or not self.targets:
            known = ", ".join((*LINEARS, *ENDS))
            problems.add("--target-modules", f"has {', '.join(unknown) or 'no name'}, expected some of {known}.")
        problems.raise_if_any()
        if self.sequence_length is not None and self.sequence_length > self.tokens:
            problems.add(
                "--sequence-length",
                f"is {self.sequence_length}, expected at most the --tokens {self.tokens} of a batch.",
            )
        if self.sequence_parallel and self.tokens % self.tp:
            problems.add(
                "--tokens", f"is {self.tokens}, which --tp {self.tp} does not divide, as sequence parallel needs."
            )
        problems.raise_if_any()


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """A layer, how often the model has it, and the costs of one.

    Args:
        name, spec, number: Which, what, how often.
        scheme: Of its update; None where it has none.
        can: The schemes that it can have.
        base: What the frozen layer costs.
        updates: Scheme -> what the update costs by it.
    """

    name: str
    spec: LayerSpec
    number: int
    scheme: str | None
    can: tuple[str, ...]
    base: Cost
    updates: Mapping[str, Cost]

    @property
    def update(self) -> Cost:
        """By the layer's scheme."""
        return NOTHING if self.scheme is None else self.updates[self.scheme]


NOTHING = Cost(forward=Pass(), backward=Pass())


@dataclass(frozen=True, slots=True, kw_only=True)
class Totals:
    """A step of one process, in seconds; counts are of a step too.

    Args:
        base_compute, base_collectives, lora_compute, lora_collectives: Seconds.
        sync: Seconds of the sums of the factors' gradients, over tensor and data parallel.
        base_flops, lora_flops: Counts.
        base_launches, lora_launches: Collectives, but for those of the sync.
        lora_bytes: What an adapter's collectives, and what rides the base's, send.
        sync_bytes: What the sync sends.
    """

    base_compute: float
    base_collectives: float
    lora_compute: float
    lora_collectives: float
    sync: float
    base_flops: int
    lora_flops: int
    base_launches: int
    lora_launches: int
    lora_bytes: float
    sync_bytes: float

    @property
    def lora(self) -> float:
        """Seconds that an adapter adds."""
        return self.lora_compute + self.lora_collectives + self.sync

    @property
    def seconds(self) -> float:
        """Of all."""
        return self.base_compute + self.base_collectives + self.lora

    @property
    def share(self) -> float:
        """The part of the seconds that an adapter adds."""
        return self.lora / self.seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """What a step costs, by our layers and by those of Optimum Neuron and neuronx-distributed.

    Args:
        shape, plan, machine: Of what.
        layers, ours: The layers of this package, and a step of theirs.
        peer_layers, peers: The same of the others, charged with the sums that they leave out under sequence parallel.
        memory: What -> bytes of a process of ours.
    """

    shape: Shape
    plan: Plan
    machine: Machine
    layers: tuple[Layer, ...]
    ours: Totals
    peer_layers: tuple[Layer, ...]
    peers: Totals
    memory: Mapping[str, float]

    @property
    def nodes(self) -> int:
        """That so many processes fill."""
        return self.machine.nodes(self.plan.tp * self.plan.dp)

    def values(self) -> dict[str, Any]:
        """Everything as plain values, for JSON."""
        told: dict[str, Any] = {name: asdict(getattr(self, name)) for name in ("shape", "plan", "machine")}
        told |= {"nodes": self.nodes, "memory": dict(self.memory)}
        for name, totals, layers in (("ours", self.ours, self.layers), ("peers", self.peers, self.peer_layers)):
            seconds = {"seconds": totals.seconds, "lora": totals.lora, "share": totals.share}
            told[name] = asdict(totals) | seconds | {"layers": [_told(layer, self.machine) for layer in layers]}
        return told


def _told(layer: Layer, machine: Machine) -> dict[str, Any]:
    costs = {
        scheme: {
            "flops": of.flops,
            "collectives": of.own,
            "elements": of.elements,
            "seconds": of.seconds(machine),
            "saved": of.saved,
            "summed": of.summed,
        }
        for scheme, of in layer.updates.items()
    }
    base = {"flops": layer.base.flops, "collectives": layer.base.own, "seconds": layer.base.seconds(machine)}
    named = {"name": layer.name, "number": layer.number, "scheme": layer.scheme, "can": layer.can}
    return {**named, "base": base, "schemes": costs}


def estimate(shape: Shape, plan: Plan, machine: Machine) -> Estimate:
    """What a step of a model costs.

    Raises:
        SpecError: Sizes that the processes do not divide, naming the layer; a scheme that no adapted layer can have,
            or whose rank they do not divide.
    """
    if plan.scheme in schemes.NAMES:
        with_scheme = {name: _by(name, _held(spec, plan), plan) for name, spec, _ in _ours(shape, plan)}
        schemes.check_used(with_scheme, plan.scheme)
    ours = tuple(_costed(*one, plan, machine) for one in _ours(shape, plan))
    peers = tuple(_of_peer(*one, plan) for one in _peers(shape, plan))
    return Estimate(
        shape=shape,
        plan=plan,
        machine=machine,
        layers=ours,
        ours=_totals(ours, shape, plan, machine),
        peer_layers=peers,
        peers=_totals(peers, shape, plan, machine),
        memory=_memory(ours, shape, plan),
    )


# ------------------------------------------------------------------------------------------------------- layers

Named = tuple[str, LayerSpec, int]


def _made(name: str, plan: Plan, **attributes: Any) -> LayerSpec:
    """A layer's spec.

    Raises:
        SpecError: With the layer's name.
    """
    where: dict[str, Any] = {"axis": Axis(size=plan.tp), "reduce_dtype": REDUCE.get(plan.itemsize)}
    with _named(name):
        return LayerSpec(sequence_dim=0 if plan.sequence_parallel else None, **where, **attributes)


@contextlib.contextmanager
def _named(name: str) -> Iterator[None]:
    """Say of which layer an error is."""
    try:
        yield
    except SpecError as error:
        raise SpecError("\n".join(f"{name}: {line}" for line in str(error).splitlines())) from error


def _by(name: str, spec: LayerSpec, plan: Plan) -> LayerSpec:
    """An adapted layer by the plan's scheme, if it can have that."""
    with _named(name):
        return schemes.chosen(spec, plan.scheme) if spec.updates else spec


def _held(spec: LayerSpec, plan: Plan) -> LayerSpec:
    """A layer as our models have it: of a column layer that is sequence parallel, the input is gathered before it."""
    column = plan.sequence_parallel and spec.kind in ("column", "qkv")
    return replace(spec, input="gathered", sequence_dim=None) if column else spec


def _fused(name: str, sizes: Mapping[str, int], shape: Shape, plan: Plan, **attributes: Any) -> LayerSpec:
    parts = []
    for part, size in sizes.items():
        rank = plan.rank if part in plan.targets else 0
        parts.append(FusedPart(name=part, size=size, rank=rank))
    inside = {"in_features": shape.hidden, "out_features": sum(sizes.values())}
    shared = plan.share_A and any(part.rank for part in parts)
    return _made(name, plan, parts=tuple(parts), share_A=shared, **inside, **attributes)


def _heads(shape: Shape) -> Heads:
    return Heads(query=shape.heads, key_value=shape.key_value_heads)


def _ours(shape: Shape, plan: Plan) -> list[Named]:
    """The layers: siblings as one, which is what one gather for all of them makes of them."""
    queries, keys = shape.features
    qkv = dict(zip(PARTS["qkv_proj"], (queries, keys, keys), strict=True))
    gate_up = dict.fromkeys(PARTS["gate_up_proj"], shape.intermediate)
    fused = {
        "qkv_proj": _fused("qkv_proj", qkv, shape, plan, kind="qkv", heads=_heads(shape)),
        "gate_up_proj": _fused("gate_up_proj", gate_up, shape, plan, kind="column"),
    }
    return _in_order(fused, shape, plan)


def _peers(shape: Shape, plan: Plan) -> list[Named]:
    """The same layers, as Optimum Neuron's models have them: q, k and v apart, so that each gathers its input, unless
    key-value heads have copies. What is one module has one lora_A, and so one H to communicate."""
    ours = {name: spec for name, spec, _ in _ours(shape, replace(plan, share_A=True))}
    fused = {name: ours[name] for name in ("qkv_proj", "gate_up_proj")}
    if _heads(shape).copies(plan.tp) == 1:
        for part in fused.pop("qkv_proj").parts:
            outside = {"out_features": part.size, "rank": part.rank}
            fused[part.name] = _made(part.name, plan, kind="column", in_features=shape.hidden, **outside)
    return _in_order(fused, shape, plan)


def _in_order(fused: Mapping[str, LayerSpec], shape: Shape, plan: Plan) -> list[Named]:
    """With the layers that are the same for all."""
    (queries, _), hidden = shape.features, shape.hidden

    def made(name: str, inside: int, outside: int, **attributes: Any) -> LayerSpec:
        rank = plan.rank if name in plan.targets else 0
        return _made(name, plan, in_features=inside, out_features=outside, rank=rank, **attributes)

    layers = {
        **fused,
        "o_proj": made("o_proj", queries, hidden, kind="row", heads=_heads(shape)),
        "down_proj": made("down_proj", shape.intermediate, hidden, kind="row"),
    }
    order = (*PARTS["qkv_proj"], "qkv_proj", "o_proj", "gate_up_proj", "down_proj")
    ends = {
        "embed_tokens": made("embed_tokens", shape.vocabulary, hidden, kind="embedding", pad=True),
        "lm_head": made("lm_head", hidden, shape.vocabulary, kind="column", pad=True),
    }
    inner = [(name, layers[name], shape.layers) for name in order if name in layers]
    return [*inner, *((name, spec, 1) for name, spec in ends.items())]


def _costed(name: str, spec: LayerSpec, number: int, plan: Plan, machine: Machine) -> Layer:
    """A layer of ours, by the plan's scheme."""
    held = _held(spec, plan)
    updates = {
        scheme: cost.update(held, plan.tokens, scheme, itemsize=plan.itemsize)
        for scheme in cost.schemes(held)
        if scheme != cost.MODULE
    }
    told = {name: getattr(plan, name) for name in ("tokens", "itemsize", "microbatches", "sequence_parallel")}
    choice = schemes.cheapest(held, machine, **told)
    own, *others = choice.costs
    asked = dict(zip(others, others, strict=True)) | {schemes.AUTO: choice.scheme}
    return Layer(
        name=name,
        spec=held,
        number=number,
        scheme=asked.get(plan.scheme or own, own) if spec.updates else None,
        can=(own, *others),
        base=cost.base(spec, plan.tokens, itemsize=plan.itemsize),
        updates=updates if spec.updates else {},
    )


def _of_peer(name: str, spec: LayerSpec, number: int, plan: Plan) -> Layer:
    """A layer of the others, whose base sums the gradients of copies in each microbatch."""
    base = cost.base(spec, plan.tokens, itemsize=plan.itemsize)
    summed = replace(base.backward, collectives=base.backward.collectives + cost.copies_sum(spec, plan.tokens))
    updates = {cost.MODULE: cost.update(spec, plan.tokens, cost.MODULE, itemsize=plan.itemsize)}
    return Layer(
        name=name,
        spec=spec,
        number=number,
        scheme=cost.MODULE if spec.updates else None,
        can=(cost.MODULE,),
        base=replace(base, backward=summed),
        updates=updates if spec.updates else {},
    )


# ------------------------------------------------------------------------------------------------------- totals


def _attention(shape: Shape, plan: Plan) -> Pass:
    """The two products of a causal attention, forward."""
    length = plan.sequence_length or plan.tokens
    flops = 2 * plan.tokens * length * shape.features[0] // plan.tp
    return Pass(products=(Product(flops=flops, moved=0),))


def _totals(layers: Iterable[Layer], shape: Shape, plan: Plan, machine: Machine) -> Totals:
    attention = _attention(shape, plan)
    twice = Pass(products=attention.products * 2)
    inner = Cost(forward=attention, backward=twice)
    base: list[tuple[Pass, int]] = _passes(inner, shape.layers, again=plan.activation_checkpointing)
    lora: list[tuple[Pass, int]] = []
    held = summed = 0
    for layer in layers:
        again = plan.activation_checkpointing and layer.name not in ENDS
        base += _passes(layer.base, layer.number, again=again)
        lora += _passes(layer.update, layer.number, again=again)
        held += layer.update.held * layer.number
        summed += layer.update.summed * layer.number
    steps = plan.microbatches
    syncs = [
        (Collective(op=cost.REDUCE, elements=elements, itemsize=cost.GRADIENT_BYTES, size=size), stride)
        for elements, size, stride in ((summed, plan.tp, 1), (held, plan.dp, plan.tp))
        if elements and size > 1
    ]
    return Totals(
        base_compute=steps * sum(n * each.compute(machine) for each, n in base),
        base_collectives=steps * sum(n * each.communication(machine) for each, n in base),
        lora_compute=steps * sum(n * each.compute(machine) for each, n in lora),
        lora_collectives=steps * sum(n * each.communication(machine) for each, n in lora),
        sync=sum(each.seconds(machine, stride) for each, stride in syncs),
        base_flops=steps * sum(n * each.flops for each, n in base),
        lora_flops=steps * sum(n * each.flops for each, n in lora),
        base_launches=steps * sum(n * len(each.own) for each, n in base),
        lora_launches=steps * sum(n * len(each.own) for each, n in lora),
        lora_bytes=steps * sum(n * c.sent for each, n in lora for c in each.collectives),
        sync_bytes=sum(each.sent for each, _ in syncs),
    )


def _passes(of: Cost, number: int, *, again: bool) -> list[tuple[Pass, int]]:
    """The passes of a layer, and how often a microbatch has each; `again`: its forward is computed again."""
    return [(of.forward, number * (1 + again)), (of.backward, number)]


def _memory(layers: Iterable[Layer], shape: Shape, plan: Plan) -> dict[str, float]:
    """Bytes of one process."""
    layers, e, t = tuple(layers), plan.itemsize, plan.tokens
    queries, keys = (n / plan.tp for n in shape.features)
    keys *= _heads(shape).copies(plan.tp)
    outside = t * shape.hidden / (plan.tp if plan.sequence_parallel else 1)
    # Norms, q, k and v twice, their mix, the MLP; attention's scores are not kept.
    inside = e * (10 * outside + t * (3 * queries + 4 * keys + 4 * shape.intermediate / plan.tp))
    of_lora = [layer for layer in layers if layer.scheme is not None]
    kept = {layer.name: layer.update.saved + layer.update.inputs for layer in of_lora}
    live = {layer.name: 1 if plan.activation_checkpointing else layer.number for layer in of_lora}
    return {
        "base": e * sum(layer.number * _weights(layer.spec) for layer in layers),
        "factors, gradients, moments": FACTOR_BYTES * sum(layer.number * layer.update.held for layer in layers),
        "kept of the base": shape.layers * (e * outside if plan.activation_checkpointing else inside),
        "kept of LoRA, at most": sum(kept[name] * live[name] for name in kept),
        "one layer": inside + 2 * e * t * shape.hidden,  # and its two gathered inputs
        "logits": (e + 12) * t * shape.vocabulary / plan.tp,
    }


def _weights(spec: LayerSpec) -> int:
    return sum(math.prod(sharding.local_shape(spec.base, name)) for name in sharding.names(spec.base))
