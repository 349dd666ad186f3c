"""What does `apply` need for one layer? `LayerSpec`: frozen, checked at birth, JSON in and out."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import TYPE_CHECKING, Any

from lora_fn.axis import Axis
from lora_fn.errors import Problems, SpecError
from lora_fn.layout import ORDERS, least_multiplier
from lora_fn.once import SPECS, once
from lora_fn.spec import VARIANTS
from lora_fn.values import from_json, frozen, is_integer, is_name, is_number

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

KINDS = ("linear", "column", "qkv", "row", "embedding", "conv2d", "experts", "replicated")
INPUTS = ("sharded", "replicated", "gathered")
GRADIENTS = ("summed", "deferred")
REDUCE_DTYPES = (None, "float32", "bfloat16", "float16", "float64")
NO_AXIS = Axis()
SCHEMES = (None, "rank")
_NO_ADAPTER: dict[str, Any] = {
    **{"rank": 0, "lora_bias": False, "share_A": False, "trained": None, "tokens": ()},
    **{"variant": "lora", "group_size": 1, "block_diagonal": None, "blocks": 1, "scheme": None},
}


def scaling(rank: int, alpha: float, *, use_rslora: bool) -> float:
    """alpha / rank, or alpha / sqrt(rank) for rsLoRA (arXiv 2312.03732, equation 6)."""
    return alpha / math.sqrt(rank) if use_rslora else alpha / rank


@dataclass(frozen=True, slots=True, kw_only=True)
class FusedPart:
    """One part of a fused layer's output, and its own adapter.

    Args:
        name: "q", "k", "v", "gate", "up", ...
        size: Global size of its output.
        rank, alpha: Of its adapter; rank 0 for none.
        number: Folded into dropout's key; parts of one number drop the same inputs.
    """

    name: str
    size: int
    rank: int = 0
    alpha: float = 1.0
    number: int = 0

    def param(self, name: str) -> str:
        """The part's parameter of a kind: "lora_A" -> "lora_A.q"; the only part's has no ending."""
        return f"{name}.{self.name}" if self.name else name


@dataclass(frozen=True, slots=True, kw_only=True)
class Heads:
    """The heads of grouped-query attention, and how they lie over an axis (see `lora_fn.layout`).

    Args:
        query: Number of query heads.
        key_value: Number of key-value heads.
        multiplier: How often each key-value head is copied (NxD's `kv_size_multiplier`); None for as often as the
            axis needs at least.
        order: Of the copies: "tiled" (trn1) or "adjacent" (trn2).
    """

    query: int
    key_value: int
    multiplier: int | None = None
    order: str = "tiled"

    def copies(self, processes: int) -> int:
        """How many copies of each key-value head there are."""
        return least_multiplier(self.key_value, processes) if self.multiplier is None else self.multiplier


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """How a convolution goes over its input, (height, width) each; dilation and groups are 1.

    Args:
        kernel_size: Of the weight, and of lora_A; lora_B's is (1, 1).
        stride, padding: Of the steps, and of the zeros around the input.
    """

    kernel_size: tuple[int, int]
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)

    def __post_init__(self) -> None:
        for name, least in (("kernel_size", 1), ("stride", 1), ("padding", 0)):
            given = getattr(self, name)
            value = tuple(given) if isinstance(given, (list, tuple)) else (given,)
            object.__setattr__(self, name, value)
            if len(value) != 2 or not all(isinstance(n, int) and not isinstance(n, bool) and n >= least for n in value):
                raise SpecError(f"Window.{name}: is {given!r}, expected two integers of at least {least}.")


CODES = ("nf4", "int8", "fp8")
SCALES = ("block", "channel", "tensor")


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantization:
    """How a weight is held in few bits (see `lora_fn.quantize`).

    Args:
        code: What an element is: "nf4" (one of 16 values, two elements in a byte), "int8", or "fp8" (torch's
            float8_e4m3fn).
        scale: What one scale is for: a "block" of inputs of one output, a "channel" (an output), or the whole "tensor".
            None: "block" for "nf4", else "channel".
        block: How many inputs are a block, even for "nf4".
    """

    code: str
    scale: str | None = None
    block: int = 64

    def __post_init__(self) -> None:
        if self.scale is None:
            object.__setattr__(self, "scale", "block" if self.code == "nf4" else "channel")
        problems = Problems(SpecError)
        for name, among in (("code", CODES), ("scale", SCALES)):
            if getattr(self, name) not in among:
                problems.add(f"Quantization.{name}", f"is {getattr(self, name)!r}, expected one of {among}.")
        if not is_integer(self.block) or self.block < 1 or (self.code == "nf4" and self.block % 2):
            problems.add("Quantization.block", f"is {self.block!r}, expected an integer of at least 1, even for 'nf4'.")
        problems.raise_if_any()

    @property
    def step(self) -> int:
        """Of how many inputs a process must hold all or none."""
        return self.block if self.scale == "block" else 2 if self.code == "nf4" else 1


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerSpec:
    """What `apply` needs for one layer: its kind, its global sizes, its adapter, and how it lies over the axis.

    Args:
        kind: "linear" (whole on every process), "column", "qkv" (query, key and value of an attention, with as many
            copies of the key-value heads as the axis needs), "row", "embedding", "conv2d", "experts" (one linear layer
            per expert, over inputs of its own), or "replicated" (trained but not adapted: norms, and whatever else has
            no `apply` here).
        in_features: Global size of the input; the vocabulary for an embedding, the channels for conv2d.
        out_features: Global size of the output; the embedding dimension for an embedding, the channels for conv2d.
        bias: Whether the base layer has one.
        fan_in_fan_out: (linear, experts) The weight is stored [in, out], as in transformers' Conv1D, or [experts, in,
            out], as in neuronx-distributed's experts; else it is [out, in], or [experts, out, in].
        rank: The LoRA rank; 0 for no adapter. Of a fused layer, every part has its own (and its own alpha).
        alpha, use_rslora, dropout, lora_bias: As in `LoraSpec`.
        axis: The axis of the mesh that the layer is sharded over.
        sequence_dim: Sequence parallel: the dimension of the activations that is cut over the axis on the outside of
            this layer (the input of a column layer, the output of a row or embedding layer, both for linear). None
            where they are whole.
        input: What the layer gets. "sharded": this process's part of the sequence (or, for "replicated" layers, of the
            heads). "replicated": the whole, its gradient completed by this layer. "gathered": the whole, its gradient
            left a partial sum, because the gather (or copy) that made it for all siblings completes it; a gather may
            bring H beside it (see `siblings`). None: "sharded" where sequence_dim is set, else "replicated". (A row
            layer's input is described by `input_is_parallel`.)
        parts: (column, qkv) The parts of a fused output, in their order; of "qkv": query, key, value.
        share_A: One lora_A for all adapted parts, which then have one rank and one alpha.
        heads: (qkv) The heads of its parts; (row) those that its input holds, which then lies like a query.
        fuse_qkv: (qkv, column with parts) One `weight` for all parts; False for one each (`weight.q`, ...).
        gather_output: (column) Gather the output; base bias and lora_B_bias are then replicated, added after. (conv2d)
            Gather the output channels; the biases stay sharded, added before.
        shard_input: (conv2d, experts) Cut the input features, as in a row layer, instead of the output features.
        input_is_parallel: (row, and conv2d like it) The input's features are already sharded.
        reduce_output: (row, and experts like it) Sum the output over the axis; False returns a partial sum.
        window: (conv2d) Its kernel, stride and padding.
        num_experts: (experts) How many.
        stride: (experts) How many parts of equal sizes the output has, of each of which every process holds its own
            (gate and up: 2).
        shard_across_embedding: (embedding) Cut the embedding dimension instead of the vocabulary.
        padding_idx: (embedding) The row that gets no gradient.
        pad: The sharded output (column, conv2d) or vocabulary (embedding) is padded with zeros to a multiple of the
            axis.
        reduce_dtype: Name of the dtype to reduce activations and their gradients in, where theirs is narrower; None for
            their own.
        gradients: "summed": partial gradients of replicated parameters are summed in the backward. "deferred": they
            stay partial until `sync_gradients`.
        raw: (linear, experts) This is a raw parameter of a module that computes by itself: its name there, followed by
            those of the module's other adapted parameters that are declared after it, in whose adapters PEFT's files
            nest this one.
        variant: How the update is made of its factors: "lora", or one of `lora_fn.spec.VARIANTS`.
        group_size: (variant "qalora") How many inputs are averaged.
        block_diagonal, blocks: (variant "bdlora") Which factor is block-diagonal, "lora_A" or "lora_B", and of how many
            blocks.
        trained: Which of its parameters are trained, with the parts' endings or without ("weight", "bias.q", "lora_A",
            ...); None for the adapter's.
        tokens: (linear, column, embedding) Rows of the weight that `trainable_tokens_delta` replaces.
        shapes: (replicated) Names and shapes of its parameters, where they are others than weight and bias.
        quantization: (linear, column, qkv, row) How the frozen weight is held; None for plain floating-point numbers.
        scheme: How the update meets the axis. None: as the rules table says of the kind, without a collective of its
            own. "rank" (column, qkv, row): the rank is cut over the axis, so that each process has 1 / size of both
            factors, and computes as much of them; H = x A^T is gathered (row: reduce-scattered) over the rank, which
            is one collective more forward and one backward, of tokens * rank elements. No gradient of a factor is then
            partial. Not under sequence parallel, where an update that rides the base's own collectives is computed in
            as many parts already; but where the input is "gathered" (H does not ride that gather then: see `siblings`).

    Raises:
        SpecError: Values that cannot be together, all of them at once.
    """

    kind: str
    in_features: int
    out_features: int
    bias: bool = False
    fan_in_fan_out: bool = False
    rank: int = 0
    alpha: float = 1.0
    use_rslora: bool = False
    dropout: float = 0.0
    lora_bias: bool = False
    axis: Axis = NO_AXIS
    sequence_dim: int | None = None
    input: str | None = None
    parts: tuple[FusedPart, ...] = ()
    share_A: bool = False
    heads: Heads | None = None
    fuse_qkv: bool = True
    gather_output: bool = False
    shard_input: bool = False
    input_is_parallel: bool = True
    reduce_output: bool = True
    window: Window | None = None
    num_experts: int | None = None
    stride: int = 1
    shard_across_embedding: bool = False
    padding_idx: int | None = None
    pad: bool = False
    reduce_dtype: str | None = None
    gradients: str = "summed"
    raw: tuple[str, ...] = ()
    variant: str = "lora"
    group_size: int = 1
    block_diagonal: str | None = None
    blocks: int = 1
    trained: tuple[str, ...] | None = None
    tokens: tuple[int, ...] = ()
    shapes: tuple[tuple[str, tuple[int, ...]], ...] = ()
    quantization: Quantization | None = None
    scheme: str | None = None

    def __post_init__(self) -> None:
        if self.input is None:
            sharded = self.sequence_dim is not None and self.kind in ("linear", "column", "qkv", "replicated")
            object.__setattr__(self, "input", "sharded" if sharded else "replicated")
        for name in ("trained", "tokens", "shapes"):
            object.__setattr__(self, name, frozen(getattr(self, name)))
        problems = Problems(SpecError)
        for name in ("in_features", "out_features", "rank"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool):
                problems.add(f"LayerSpec.{name}", f"is {value!r}, expected an integer.")
        for f in fields(self):
            if isinstance(f.default, bool) and not isinstance(getattr(self, f.name), bool):
                problems.add(f"LayerSpec.{f.name}", f"is {getattr(self, f.name)!r}, expected True or False.")
        for name in ("alpha", "dropout"):
            if not is_number(getattr(self, name)):
                problems.add(f"LayerSpec.{name}", f"is {getattr(self, name)!r}, expected a number.")
        problems.raise_if_any()

        def expect(holds: bool, name: str, message: str) -> None:
            if not holds:
                problems.add(f"LayerSpec.{name}", f"is {getattr(self, name)!r}, {message}")

        kind = self.kind
        expect(kind in KINDS, "kind", f"expected one of {KINDS}.")
        expect(self.in_features >= 1, "in_features", "expected at least 1.")
        expect(self.out_features >= 1, "out_features", "expected at least 1.")
        expect(self.rank >= 0, "rank", "expected at least 0.")
        expect(self.rank == 0 or kind != "replicated", "rank", "but a replicated layer takes no adapter; expected 0.")
        expect(math.isfinite(self.alpha), "alpha", "expected a finite number.")
        expect(0 <= self.dropout < 1, "dropout", "expected a probability of at least 0 and below 1.")
        expect(self.input in INPUTS, "input", f"expected one of {INPUTS}.")
        expect(self.gradients in GRADIENTS, "gradients", f"expected one of {GRADIENTS}.")
        expect(self.reduce_dtype in REDUCE_DTYPES, "reduce_dtype", f"expected one of {REDUCE_DTYPES}.")
        expect(self.sequence_dim in (None, 0, 1), "sequence_dim", "expected 0, 1 or None.")
        expect(
            not self.fan_in_fan_out or kind in ("linear", "experts"),
            "fan_in_fan_out",
            "expected False but for kinds 'linear' and 'experts'.",
        )
        row_like = kind == "row" or (kind in ("conv2d", "experts") and self.shard_input)
        expect(
            not self.gather_output or kind == "column" or (kind == "conv2d" and not self.shard_input),
            "gather_output",
            "expected False but for kind 'column' and output channels of kind 'conv2d'.",
        )
        expect(
            not self.shard_input or kind in ("conv2d", "experts"),
            "shard_input",
            "expected False but for kinds 'conv2d' and 'experts'.",
        )
        expect(
            self.sequence_dim is None or kind not in ("conv2d", "experts"),
            "sequence_dim",
            "expected None for kinds 'conv2d' and 'experts': leave sequence parallel before them.",
        )
        expect(
            isinstance(self.window, Window) if kind == "conv2d" else self.window is None,
            "window",
            "expected a Window for kind 'conv2d', None for any other.",
        )
        experts: Any = self.num_experts
        expect(
            type(experts) is int and experts >= 1 if kind == "experts" else experts is None,
            "num_experts",
            "expected at least 1 for kind 'experts', None for any other.",
        )
        parts_fit = type(self.stride) is int and self.stride >= 1 and self.out_features % self.stride == 0
        expect(parts_fit, "stride", f"expected an integer of at least 1 that divides {self.out_features}.")
        expect(
            self.stride == 1 or (kind == "experts" and not self.shard_input),
            "stride",
            "expected 1 but for experts with sharded outputs.",
        )
        expect(
            not (self.gather_output and self.sequence_dim is not None),
            "gather_output",
            "expected False under sequence parallel, whose column outputs stay sharded.",
        )
        expect(
            self.input_is_parallel or (row_like and kind != "experts"),
            "input_is_parallel",
            "expected True but for kind 'row' and input channels of kind 'conv2d'.",
        )
        expect(
            self.input_is_parallel or self.sequence_dim is None,
            "input_is_parallel",
            "expected True under sequence parallel, where a row layer gets the output of a column layer.",
        )
        expect(
            self.reduce_output or (row_like and kind != "conv2d"),
            "reduce_output",
            "expected True but for kind 'row' and experts with sharded inputs.",
        )
        expect(
            self.reduce_output or not (self.bias or self.lora_bias or self.sequence_dim is not None),
            "reduce_output",
            "with a bias or sequence parallel: a later sum would count the bias once per process; reduce here.",
        )
        expect(
            not self.shard_across_embedding or kind == "embedding",
            "shard_across_embedding",
            "expected False but for kind 'embedding'.",
        )
        expect(
            self.padding_idx is None or kind == "embedding", "padding_idx", "expected None but for kind 'embedding'."
        )
        expect(
            self.padding_idx is None or 0 <= self.padding_idx < self.in_features,
            "padding_idx",
            "expected a row of the embedding.",
        )
        expect(not (self.bias and kind == "embedding"), "bias", "expected False for an embedding.")
        expect(
            not (self.lora_bias and kind == "embedding"), "lora_bias", "expected False for an embedding, as in PEFT."
        )
        adapted = self.rank > 0 or any(getattr(part, "rank", 0) for part in self.parts or ())
        expect(not self.lora_bias or adapted, "lora_bias", "expected False without an adapter.")
        expect(
            not self.tokens or (kind in ("linear", "column", "embedding") and not self.parts),
            "tokens",
            "expected none but for a linear, column or embedding layer that is not fused.",
        )
        expect(
            not (self.tokens and (self.rank or self.bias)),
            "tokens",
            "expected none with an adapter or a bias, as PEFT has no such layer.",
        )
        rows = self.in_features if kind == "embedding" else self.out_features
        expect(
            all(is_integer(n) and 0 <= n < rows for n in self.tokens) and len(set(self.tokens)) == len(self.tokens),
            "tokens",
            f"expected different ids of at least 0 and below {rows}.",
        )
        expect(not self.shapes or kind == "replicated", "shapes", "expected none but for kind 'replicated'.")
        expect(
            not self.pad
            or kind == "column"
            or (kind == "embedding" and not self.shard_across_embedding)
            or (kind == "conv2d" and not self.shard_input),
            "pad",
            "expected False but for a column layer, output channels, or a vocabulary-sharded embedding.",
        )
        expect(
            (self.input == "sharded") == (self.sequence_dim is not None) or kind in ("row", "embedding", "replicated"),
            "input",
            f"with sequence_dim {self.sequence_dim}: expected 'sharded' exactly where sequence_dim is set.",
        )
        expect(
            self.input == "replicated" or kind in ("linear", "column", "qkv", "replicated"),
            "input",
            "expected 'replicated' for this kind.",
        )
        expect(
            self.input != "gathered" or kind in ("column", "qkv"),
            "input",
            "expected 'gathered' for kind 'column' or 'qkv' only.",
        )
        object.__setattr__(self, "raw", tuple(self.raw))
        expect(
            not self.raw or (kind in ("linear", "experts") and all(map(is_name, self.raw))),
            "raw",
            "expected none but for kinds 'linear' and 'experts', names else.",
        )
        expect(
            not self.raw or not (self.dropout or self.bias or self.lora_bias or self.sequence_dim is not None),
            "raw",
            "expected none with dropout, a bias, lora_bias or sequence_dim: a parameter has no input of its own.",
        )
        name, size = self._sharded_size()
        expect(
            size is None or self.pad or size % (self.axis.size * (self.stride if parts_fit else 1)) == 0,
            name,
            f"which {self.axis.size} processes do not divide; choose a size of the axis that does.",
        )
        self._check_parts(problems)
        self._check_heads(problems)
        if all(isinstance(part, FusedPart) for part in self.parts):
            self._check_variant(problems)
            self._check_quantization(problems)
            self._check_scheme(problems)
        problems.raise_if_any()

    def _check_scheme(self, problems: Problems) -> None:
        """Note what cannot be about a rank that is cut."""
        if self.scheme is None:
            return
        if self.scheme not in SCHEMES:
            problems.add("LayerSpec.scheme", f"is {self.scheme!r}, expected one of {SCHEMES}.")
            return
        for why in why_not_by_rank(self):
            problems.add("LayerSpec.scheme", f"is {self.scheme!r}, expected None {why}.")
        if not self.updates:
            problems.add("LayerSpec.scheme", f"is {self.scheme!r}, expected None without an adapter.")
        for part in self.updates:
            if part.rank % self.axis.size:
                problems.add(
                    f"LayerSpec.parts ({part.name})" if part.name else "LayerSpec.rank",
                    f"{'has rank' if part.name else 'is'} {part.rank}, which {self.axis.size} processes do not divide "
                    f"by scheme {self.scheme!r}; choose a rank that they do, or scheme None.",
                )

    def _check_quantization(self, problems: Problems) -> None:
        """Note what cannot be about a quantised weight."""
        how: Any = self.quantization
        if how is None:
            return

        def expect(holds: bool, message: str) -> None:
            if not holds:
                problems.add("LayerSpec.quantization", f"is {how}, {message}")

        if not isinstance(how, Quantization):
            expect(False, "expected a Quantization value.")
            return
        linear = self.kind in ("linear", "column", "qkv", "row") and not (self.fan_in_fan_out or self.raw)
        expect(linear, f"expected None but for linear layers with a weight [out, in], and the layer is {self.kind!r}.")
        names = [name for name in self.trained or () if name.partition(".")[0] == "weight"]
        expect(not names and not self.tokens, "but its weight is to be trained; leave that out, or do not quantise it.")
        expect(self.variant != "kasa", "but variant 'kasa' changes the weight; leave one of them out.")
        slots = 1
        if self.kind == "row":
            slots = self.axis.size
            if isinstance(self.heads, Heads):
                slots = self.heads.key_value * self.heads.copies(slots)
        what = "inputs" if slots == 1 else f"inputs, cut into {slots} equal parts"
        expect(
            slots > 0 and self.in_features % (how.step * slots) == 0,
            f"so that the {self.in_features} {what} are no whole blocks of {how.step}; leave the layer out, or choose "
            f"another block or size of the axis.",
        )

    def _check_variant(self, problems: Problems) -> None:
        """Note what cannot be about the variant."""
        known = ("lora", "mica", *VARIANTS.values())

        def expect(holds: bool, name: str, message: str) -> None:
            if not holds:
                problems.add(f"LayerSpec.{name}", f"is {getattr(self, name)!r}, {message}")

        expect(self.variant in known, "variant", f"expected one of {known}.")
        expect(
            self.variant in ("lora", "mica", "dora") or self.kind in ("linear", "column", "qkv", "row"),
            "variant",
            f"which PEFT has for linear layers only, and the layer is of kind {self.kind!r}; leave it out of the "
            f"targets.",
        )
        expect(
            self.variant != "dora" or not self.lora_bias,
            "lora_bias",
            "with variant 'dora', expected False, as in PEFT.",
        )
        bare = self.variant == "qalora" or self.block_diagonal == "lora_B"
        expect(not (bare and self.lora_bias), "lora_bias", "expected False with a lora_B that has none in PEFT.")
        expect(
            self.variant != "kasa" or not self.fan_in_fan_out,
            "fan_in_fan_out",
            "with variant 'kasa', expected False, as in PEFT.",
        )
        ranks = [part.rank for part in self.updates]
        for name in ("group_size", "blocks"):
            if type(getattr(self, name)) is not int or getattr(self, name) < 1:
                expect(False, name, "expected an integer of at least 1.")
                return
        expect(self.group_size == 1 or self.variant == "qalora", "group_size", "expected 1 but for variant 'qalora'.")
        expect(
            self.in_features % self.group_size == 0,
            "group_size",
            f"which does not divide the {self.in_features} inputs; choose another.",
        )
        if self.kind == "row" and self.group_size > 1:
            slots = self.axis.size if self.heads is None else self.heads.key_value * self.heads.copies(self.axis.size)
            expect(
                slots > 0 and self.in_features // self.group_size % slots == 0,
                "group_size",
                f"so that {slots} equal parts of the {self.in_features} inputs would cut a group; choose another.",
            )
        expect(
            (self.block_diagonal in ("lora_A", "lora_B")) == (self.variant == "bdlora"),
            "block_diagonal",
            "expected 'lora_A' or 'lora_B' for variant 'bdlora', None for any other.",
        )
        expect(self.blocks == 1 or self.variant == "bdlora", "blocks", "expected 1 but for variant 'bdlora'.")
        inside = [self.in_features] if self.block_diagonal == "lora_A" else [part.size for part in self.updates]
        odd = [n for n in (*ranks, *inside) if n % self.blocks]
        expect(
            not odd, "blocks", f"which does not divide {odd and odd[0]}, a rank or size of the factor; choose another."
        )

    def _check_parts(self, problems: Problems) -> None:
        """Note what cannot be about a fused layer."""
        given = self.parts if isinstance(self.parts, (list, tuple)) else (self.parts,)
        object.__setattr__(self, "parts", tuple(given))
        told = [part.name if isinstance(part, FusedPart) else part for part in self.parts]

        def expect(holds: bool, message: str) -> None:
            if not holds:
                problems.add("LayerSpec.parts", f"are {told}, {message}")

        if not self.parts:
            expect(self.fuse_qkv, "but fuse_qkv is False, expected True but for a fused layer.")
            expect(self.kind != "qkv", "expected query, key and value for kind 'qkv'.")
            expect(not self.share_A, "but share_A is True, expected False but for a fused layer.")
            return
        if not all(isinstance(part, FusedPart) and is_name(part.name) for part in self.parts):
            expect(False, "expected FusedPart values with names that are identifiers.")
            return
        expect(self.kind in ("column", "qkv"), "expected none but for kind 'column' or 'qkv'.")
        expect(self.kind != "qkv" or len(told) == 3, "expected query, key and value for kind 'qkv'.")
        expect(len(set(told)) == len(told), "expected names that differ.")
        expect(not self.rank and self.alpha == 1.0, "but the layer has a rank or alpha too; give each part its own.")
        expect(not (self.gather_output or self.pad), "expected none with gather_output or pad.")
        for part in self.parts:
            whole = all(is_number(n) and not isinstance(n, float) for n in (part.size, part.rank, part.number))
            fits = whole and part.size >= 1 and part.rank >= 0 and is_number(part.alpha) and math.isfinite(part.alpha)
            expect(fits, f"and {part} cannot be: expected a size of at least 1, a rank of at least 0, a finite alpha.")
            if not fits:
                return
            expect(
                self.kind == "qkv" or part.size % self.axis.size == 0,
                f"and {part.name!r} has size {part.size}, which {self.axis.size} processes do not divide.",
            )
        total = sum(part.size for part in self.parts)
        expect(total == self.out_features, f"of {total} features, but out_features is {self.out_features}.")
        ways = {(part.rank, part.alpha) for part in self.parts if part.rank}
        expect(not self.share_A or len(ways) == 1, f"and share A, but have (rank, alpha) {sorted(ways)}; expected one.")

    def _check_heads(self, problems: Problems) -> None:
        """Note what cannot be about heads."""
        heads: Any = self.heads

        def expect(holds: bool, message: str) -> None:
            if not holds:
                problems.add("LayerSpec.heads", f"is {heads}, {message}")

        expect((heads is not None) or self.kind != "qkv", "expected the heads of kind 'qkv'.")
        if heads is None:
            return
        expect(self.kind in ("qkv", "row"), "expected None but for kind 'qkv' or 'row'.")
        if not isinstance(heads, Heads):
            expect(False, "expected a Heads value.")
            return
        expect(self.input_is_parallel, "expected None where the input is not cut already (input_is_parallel False).")
        numbers = (heads.query, heads.key_value, 1 if heads.multiplier is None else heads.multiplier)
        if any(not isinstance(n, int) or isinstance(n, bool) or n < 1 for n in numbers) or heads.order not in ORDERS:
            expect(False, f"expected integers of at least 1 and an order of {ORDERS}.")
            return
        copies, processes = heads.copies(self.axis.size), self.axis.size
        slots = heads.key_value * copies
        expect(
            slots % processes == 0 and heads.query % slots == 0,
            f"and {heads.query} query heads with {copies} copies of {heads.key_value} key-value heads cannot be dealt "
            f"to {processes} processes; choose a size that divides the query heads, and multiplier None.",
        )
        sizes = [part.size for part in self.parts] if self.kind == "qkv" else [self.in_features]
        known = (heads.query, heads.key_value, heads.key_value)
        for size, number in zip(sizes, known, strict=False):
            expect(size % number == 0, f"but {size} features cannot be cut into {number} heads.")
        if self.kind == "qkv" and len(sizes) > 1:
            dims = [size / number for size, number in zip(sizes, known, strict=False)][:2]
            expect(dims[0] == dims[1], f"but the heads of the query have {dims[0]:g} features, of the key {dims[1]:g}.")

    def _sharded_size(self) -> tuple[str, int | None]:
        """The field that the axis cuts evenly, and its size."""
        if (self.kind == "column" and not self.parts) or (self.kind == "embedding" and self.shard_across_embedding):
            return "out_features", self.out_features
        if self.kind == "row" or self.kind == "embedding":
            return "in_features", self.in_features
        if self.kind in ("conv2d", "experts"):
            name = "in_features" if self.shard_input else "out_features"
            return name, getattr(self, name)
        return "kind", None

    @property
    def scaling(self) -> float:
        """alpha / rank, or alpha / sqrt(rank) for rsLoRA."""
        return scaling(self.rank, self.alpha, use_rslora=self.use_rslora)

    @property
    def updates(self) -> tuple[FusedPart, ...]:
        """The parts that have an adapter; of a layer that is not fused, the layer itself under the name ""."""
        whole = FusedPart(name="", size=self.out_features, rank=self.rank, alpha=self.alpha)
        return tuple(part for part in self.parts or (whole,) if part.rank)

    def scaling_of(self, part: FusedPart) -> float:
        """alpha / rank of a part, or alpha / sqrt(rank) for rsLoRA."""
        return scaling(part.rank, part.alpha, use_rslora=self.use_rslora)

    @property
    def base(self) -> LayerSpec:
        """The layer without its adapter, nothing of it trained."""
        return _base(self)

    def bind(self, mesh: DeviceMesh) -> LayerSpec:
        """The same layer with its axis tied to the mesh dimension of that name.

        Raises:
            SpecError: The mesh has no such dimension, or one of another size.
        """
        return replace(self, axis=self.axis.bind(mesh))

    def to_json(self) -> str:
        """The spec as JSON; of the axis, its name and size."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        values |= {"axis": {"name": self.axis.name, "size": self.axis.size}}
        values |= {"parts": [asdict(part) for part in self.parts]}
        for name in _VALUES:
            own = getattr(self, name)
            values[name] = None if own is None else asdict(own)
        return json.dumps(values)

    @classmethod
    def from_json(cls, text: str) -> LayerSpec:
        """The spec that `to_json` wrote; its axis is unbound.

        Raises:
            SpecError: Not such JSON, unknown keys, or values that cannot be.
        """
        values = from_json(cls, text)
        try:
            values["axis"] = Axis(**values["axis"])
            values["parts"] = tuple(FusedPart(**part) for part in values.get("parts", ()))
            for name, cls_of in _VALUES.items():
                values[name] = None if values.get(name) is None else cls_of(**values[name])
            return cls(**values)
        except (AttributeError, KeyError, TypeError) as error:
            raise SpecError(f"LayerSpec: {text[:80]!r}... is not one ({error!r}); use what to_json wrote.") from error


# A model's layers are of a few forms: the spec of a form is made and checked once. `changed` is `dataclasses.replace`.
made = functools.lru_cache(SPECS, typed=True)(LayerSpec)
changed = functools.lru_cache(SPECS, typed=True)(replace)


@once
def _base(spec: LayerSpec) -> LayerSpec:
    return replace(spec, parts=tuple(replace(part, rank=0, alpha=1.0) for part in spec.parts), **_NO_ADAPTER)


# Fields of a LayerSpec that are values of their own, and their classes.
_VALUES: Mapping[str, type[Any]] = {"heads": Heads, "window": Window, "quantization": Quantization}


# Why a layer has no scheme "rank", whatever its adapter is: reason -> whether it is so.
_NOT_BY_RANK: Mapping[str, Callable[[LayerSpec], bool]] = {
    "but for kinds 'column', 'qkv' and 'row'": lambda spec: spec.kind not in ("column", "qkv", "row"),
    "where the output is gathered": lambda spec: spec.gather_output,
    "under sequence parallel, where the update rides the base's own collectives and is cut by tokens already": (
        lambda spec: spec.sequence_dim is not None
    ),
}


def why_not_by_rank(spec: LayerSpec) -> tuple[str, ...]:
    """The reasons why a layer has no scheme "rank", whatever its adapter is; () where it has one."""
    return tuple(why for why, holds in _NOT_BY_RANK.items() if holds(spec))
