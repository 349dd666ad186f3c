"""What may I configure? `LoraSpec` is what the user asks for, `LayerSpec` is what `apply` needs for one layer.

Both are frozen, checked at birth, and go to JSON and back. The way to and from PEFT's config is in peft_format.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import TYPE_CHECKING, Any

from lora_fn.axis import Axis
from lora_fn.errors import Problems, SpecError
from lora_fn.layout import ORDERS, least_multiplier

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

KINDS = ("linear", "column", "qkv", "row", "embedding", "conv2d", "experts", "replicated")
INPUTS = ("sharded", "replicated", "gathered")
GRADIENTS = ("summed", "deferred")
REDUCE_DTYPES = (None, "float32", "bfloat16", "float16", "float64")
INITS = (True, False, "gaussian")
NO_AXIS = Axis()


def scaling(rank: int, alpha: float, *, use_rslora: bool) -> float:
    """alpha / rank, or alpha / sqrt(rank) for rsLoRA (arXiv 2312.03732, equation 6)."""
    return alpha / math.sqrt(rank) if use_rslora else alpha / rank


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_flag(value: Any) -> bool:
    return isinstance(value, bool)


def _is_text(value: Any) -> bool:
    return value is None or isinstance(value, str)


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and value.isidentifier()


def _are_names(value: Any) -> bool:
    return isinstance(value, tuple) and all(isinstance(name, str) and name for name in value)


def _are_targets(value: Any) -> bool:
    return isinstance(value, str) or _are_names(value)


def _are_indices(value: Any) -> bool:
    return isinstance(value, tuple) and all(_is_number(i) and not isinstance(i, float) and i >= 0 for i in value)


def _pattern_problem(value: Any) -> str | None:
    """What is wrong with a rank_pattern's or an alpha_pattern's form, as the rest of a sentence."""
    pairs = list(value.items()) if isinstance(value, Mapping) else value
    if not isinstance(pairs, (list, tuple)) or not all(isinstance(p, (list, tuple)) and len(p) == 2 for p in pairs):
        return f"is {value!r}, expected a mapping of names to numbers."
    for key, _ in pairs:
        if not isinstance(key, str):
            return f"names {key!r}, expected a regular expression."
        try:
            re.compile(key)
        except re.error as error:
            return f"names {key!r}, which is not a regular expression ({error}); mend it."
    return None


# Field of LoraSpec, what it must be, in words, and as a test.
LORA_TYPES: tuple[tuple[str, str, Callable[[Any], bool]], ...] = (
    ("use_rslora", "True or False", _is_flag),
    ("lora_bias", "True or False", _is_flag),
    ("share_A", "True or False", _is_flag),
    ("target_modules", "names or a regular expression", _are_targets),
    ("exclude_modules", "names or a regular expression", _are_targets),
    ("layers_to_transform", "indices of layers, or None", lambda v: v is None or _are_indices(v)),
    ("layers_pattern", "names, or None", lambda v: v is None or _are_names(v)),
    ("task_type", "text, or None", _is_text),
    ("base_model_name_or_path", "text, or None", _is_text),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraSpec:
    """What the user asks for, for a whole model. Names and defaults are PEFT's, but for `rank` (`r`) and `alpha`.

    Args:
        rank: The LoRA rank.
        alpha: The numerator of the scaling.
        dropout: Probability in [0, 1) with which an input of lora_A is dropped in training. As in PEFT, embeddings
            ignore it.
        use_rslora: Scale by alpha / sqrt(rank) instead of alpha / rank.
        lora_bias: Give lora_B a bias.
        init_lora_weights: True (Kaiming-uniform A, zero B), False (both random) or "gaussian".
        share_A: One lora_A for all adapted parts of a fused layer (the "performant" form of NVIDIA's and Optimum
            Neuron's), in place of one each. PEFT's files then hold a copy for each part.
        target_modules: A tuple of names or of suffixes of names, a regular expression that matches whole names, or
            "all-linear".
        exclude_modules: A tuple of names or suffixes, or a regular expression; checked first.
        layers_to_transform: Indices of the layers to adapt; None for all.
        layers_pattern: Names of the module lists that `layers_to_transform` counts in; None for any.
        rank_pattern: Pairs (or a mapping) of a regular expression of names and the rank there; the first that matches.
        alpha_pattern: The same for alpha.
        task_type: PEFT's task type, kept for the file.
        base_model_name_or_path: Name or path of the base model, kept for the file.

    Raises:
        SpecError: A value that cannot be, all of them at once.

    Example:
        >>> spec = LoraSpec(rank=8, alpha=16, target_modules=("q_proj", "v_proj"))
        >>> LoraSpec.from_json(spec.to_json()) == spec
        True
    """

    rank: int = 8
    alpha: float = 8
    dropout: float = 0.0
    use_rslora: bool = False
    lora_bias: bool = False
    init_lora_weights: bool | str = True
    share_A: bool = False
    target_modules: tuple[str, ...] | str = "all-linear"
    exclude_modules: tuple[str, ...] | str = ()
    layers_to_transform: tuple[int, ...] | None = None
    layers_pattern: tuple[str, ...] | None = None
    rank_pattern: tuple[tuple[str, int], ...] = ()
    alpha_pattern: tuple[tuple[str, float], ...] = ()
    task_type: str | None = None
    base_model_name_or_path: str | None = None

    def __post_init__(self) -> None:
        for name in ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"):
            if isinstance(getattr(self, name), list):
                object.__setattr__(self, name, tuple(getattr(self, name)))
        problems = Problems(SpecError)
        for name in ("rank_pattern", "alpha_pattern"):
            given = getattr(self, name)
            problem = _pattern_problem(given)
            if problem is not None:
                problems.add(f"LoraSpec.{name}", problem)
            object.__setattr__(self, name, () if problem is not None else tuple(dict(given).items()))
        for name, expected, fits in LORA_TYPES:
            if not fits(getattr(self, name)):
                problems.add(f"LoraSpec.{name}", f"is {getattr(self, name)!r}, expected {expected}.")
        for where, rank in [("rank", self.rank), *((f"rank_pattern[{k!r}]", v) for k, v in self.rank_pattern)]:
            if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
                problems.add(f"LoraSpec.{where}", f"is {rank!r}, expected an integer of at least 1.")
        for where, alpha in [("alpha", self.alpha), *((f"alpha_pattern[{k!r}]", v) for k, v in self.alpha_pattern)]:
            if not _is_number(alpha) or not math.isfinite(alpha) or alpha <= 0:
                problems.add(f"LoraSpec.{where}", f"is {alpha!r}, expected a finite number above 0.")
        if not _is_number(self.dropout) or not 0 <= self.dropout < 1:
            problems.add("LoraSpec.dropout", f"is {self.dropout!r}, expected a probability of at least 0 and below 1.")
        if self.init_lora_weights not in INITS:
            problems.add("LoraSpec.init_lora_weights", f"is {self.init_lora_weights!r}, expected one of {INITS}.")
        elif self.lora_bias is True and not isinstance(self.init_lora_weights, bool):
            init = self.init_lora_weights
            problems.add("LoraSpec.lora_bias", f"cannot be with init_lora_weights {init!r}, as in PEFT; choose one.")
        if not self.target_modules:
            problems.add("LoraSpec.target_modules", 'is empty; name the layers to adapt, or "all-linear".')
        regex = isinstance(self.target_modules, str) and self.target_modules != "all-linear"
        if regex and (self.layers_to_transform is not None or self.layers_pattern is not None):
            problems.add(
                "LoraSpec.layers_to_transform",
                "cannot be with a regular expression in target_modules; put it in there.",
            )
        if self.layers_pattern is not None and self.layers_to_transform is None:
            problems.add("LoraSpec.layers_pattern", "is given without layers_to_transform; give both or neither.")
        problems.raise_if_any()

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, one per field."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        patterns = {name: dict(values[name]) for name in ("rank_pattern", "alpha_pattern")}
        return {name: list(v) if isinstance(v, tuple) else v for name, v in (values | patterns).items()}

    def to_json(self) -> str:
        """The spec as JSON."""
        return json.dumps(self.to_dict())

    @classmethod
    def from_json(cls, text: str) -> LoraSpec:
        """The spec that `to_json` wrote.

        Raises:
            SpecError: Not such JSON, unknown keys, or values that cannot be.
        """
        return cls(**_known(cls, text))


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


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerSpec:
    """What `apply` needs for one layer: its kind, its global sizes, its adapter, and how it lies over the axis.

    Args:
        kind: "linear" (whole on every process), "column", "qkv" (query, key and value of an attention, with as many
            copies of the key-value heads as the axis needs), "row", "embedding", "conv2d", "experts" (one linear layer
            per expert, over inputs of its own), or "replicated" (trained but not adapted: norms).
        in_features: Global size of the input; the vocabulary for an embedding, the channels for conv2d.
        out_features: Global size of the output; the embedding dimension for an embedding, the channels for conv2d.
        bias: Whether the base layer has one.
        fan_in_fan_out: The weight is stored [in, out], as in transformers' Conv1D (kind "linear" only).
        rank: The LoRA rank; 0 for no adapter. Of a fused layer, every part has its own (and its own alpha).
        alpha, use_rslora, dropout, lora_bias: As in `LoraSpec`.
        axis: The axis of the mesh that the layer is sharded over.
        sequence_dim: Sequence parallel: the dimension of the activations that is cut over the axis on the outside of
            this layer (the input of a column layer, the output of a row or embedding layer, both for linear). None
            where they are whole.
        input: What the layer gets. "sharded": this process's part of the sequence (or, for "replicated" layers, of the
            heads). "replicated": the whole, its gradient completed by this layer. "gathered": the whole, its gradient
            left a partial sum, because the gather (or copy) that made it for all siblings completes it. None: "sharded"
            where sequence_dim is set, else "replicated". (A row layer's input is described by `input_is_parallel`.)
        parts: (column, qkv) The parts of a fused output, in their order; of "qkv": query, key, value.
        share_A: One lora_A for all adapted parts, which then have one rank and one alpha.
        heads: (qkv) The heads of its parts; (row) those that its input holds, which then lies like a query.
        fuse_qkv: (qkv) One `weight` for all parts; False for one each (`weight.q`, ...).
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

    def __post_init__(self) -> None:
        if self.input is None:
            sharded = self.sequence_dim is not None and self.kind in ("linear", "column", "qkv", "replicated")
            object.__setattr__(self, "input", "sharded" if sharded else "replicated")
        problems = Problems(SpecError)
        for name in ("in_features", "out_features", "rank"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool):
                problems.add(f"LayerSpec.{name}", f"is {value!r}, expected an integer.")
        for f in fields(self):
            if isinstance(f.default, bool) and not isinstance(getattr(self, f.name), bool):
                problems.add(f"LayerSpec.{f.name}", f"is {getattr(self, f.name)!r}, expected True or False.")
        for name in ("alpha", "dropout"):
            if not _is_number(getattr(self, name)):
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
        expect(not self.fan_in_fan_out or kind == "linear", "fan_in_fan_out", "expected False but for kind 'linear'.")
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
        name, size = self._sharded_size()
        expect(
            size is None or self.pad or size % (self.axis.size * (self.stride if parts_fit else 1)) == 0,
            name,
            f"which {self.axis.size} processes do not divide; choose a size of the axis that does.",
        )
        self._check_parts(problems)
        self._check_heads(problems)
        problems.raise_if_any()

    def _check_parts(self, problems: Problems) -> None:
        """Note what cannot be about a fused layer."""
        given = self.parts if isinstance(self.parts, (list, tuple)) else (self.parts,)
        object.__setattr__(self, "parts", tuple(given))
        told = [part.name if isinstance(part, FusedPart) else part for part in self.parts]

        def expect(holds: bool, message: str) -> None:
            if not holds:
                problems.add("LayerSpec.parts", f"are {told}, {message}")

        expect(self.fuse_qkv or self.kind == "qkv", "but fuse_qkv is False, expected True but for kind 'qkv'.")
        if not self.parts:
            expect(self.kind != "qkv", "expected query, key and value for kind 'qkv'.")
            expect(not self.share_A, "but share_A is True, expected False but for a fused layer.")
            return
        if not all(isinstance(part, FusedPart) and _is_name(part.name) for part in self.parts):
            expect(False, "expected FusedPart values with names that are identifiers.")
            return
        expect(self.kind in ("column", "qkv"), "expected none but for kind 'column' or 'qkv'.")
        expect(self.kind != "qkv" or len(told) == 3, "expected query, key and value for kind 'qkv'.")
        expect(len(set(told)) == len(told), "expected names that differ.")
        expect(not self.rank and self.alpha == 1.0, "but the layer has a rank or alpha too; give each part its own.")
        expect(not (self.gather_output or self.pad), "expected none with gather_output or pad.")
        for part in self.parts:
            whole = all(_is_number(n) and not isinstance(n, float) for n in (part.size, part.rank, part.number))
            fits = whole and part.size >= 1 and part.rank >= 0 and _is_number(part.alpha) and math.isfinite(part.alpha)
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
        """The layer without its adapter."""
        parts = tuple(replace(part, rank=0, alpha=1.0) for part in self.parts)
        return replace(self, rank=0, lora_bias=False, parts=parts, share_A=False)

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
        values |= {"window": None if self.window is None else asdict(self.window)}
        return json.dumps(values | {"heads": None if self.heads is None else asdict(self.heads)})

    @classmethod
    def from_json(cls, text: str) -> LayerSpec:
        """The spec that `to_json` wrote; its axis is unbound.

        Raises:
            SpecError: Not such JSON, unknown keys, or values that cannot be.
        """
        values = _known(cls, text)
        try:
            values["axis"] = Axis(**values["axis"])
            values["parts"] = tuple(FusedPart(**part) for part in values.get("parts", ()))
            for name, cls_of in (("heads", Heads), ("window", Window)):
                values[name] = None if values.get(name) is None else cls_of(**values[name])
            return cls(**values)
        except (AttributeError, KeyError, TypeError) as error:
            raise SpecError(f"LayerSpec: {text[:80]!r}... is not one ({error!r}); use what to_json wrote.") from error


def _known(cls: type, text: str) -> dict[str, Any]:
    try:
        values = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise SpecError(f"{cls.__name__}: {text[:80]!r} is not JSON ({error}); use what to_json wrote.") from error
    if not isinstance(values, dict):
        raise SpecError(f"{cls.__name__}: {text[:80]!r} is not a JSON object; use what to_json wrote.")
    unknown = sorted(set(values) - {f.name for f in fields(cls)})
    if unknown:
        raise SpecError(f"{cls.__name__}: unknown keys {unknown}; remove them, or use the version that wrote them.")
    return values
