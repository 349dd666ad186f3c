"""What may I configure? `LoraSpec` is what the user asks for, for a whole model; the names are PEFT's.

Frozen, checked at birth, JSON in and out. The way to and from PEFT's config is in peft_format; what `apply` needs for
one layer is in layer_spec.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from lora_fn.errors import Problems, SpecError
from lora_fn.values import (
    Options,
    are_indices,
    are_names,
    are_options,
    are_targets,
    from_json,
    frozen,
    is_flag,
    is_integer,
    is_number,
    is_text,
    thawed,
)

BIASES = ("none", "all", "lora_only")
# Initialisations by name; "pissa_niter_[number]" is one too.
INITS = (True, False, "gaussian", "orthogonal", "pissa", "olora", "loftq", "eva", "corda", "lora_ga", "mica")
FREE_INITS = (True, False, "gaussian", "orthogonal")  # those that know nothing of the base
NITER = re.compile(r"pissa_niter_\d+")

# Field -> what its options are by default, in PEFT's configs of the same names.
OPTIONS: Mapping[str, Mapping[str, Any]] = {
    "loftq_config": {"loftq_bits": 4, "loftq_iter": 1},
    "eva_config": {
        "rho": 2.0,
        "tau": 0.99,
        "use_label_mask": True,
        "label_mask_value": -100,
        "whiten": False,
        "adjust_scaling_factors": True,
    },
    "corda_config": {
        "cache_file": None,
        "covariance_file": None,
        "corda_method": "ipm",
        "verbose": False,
        "use_float16_for_covariance": False,
        "prune_temporary_fields": True,
    },
    "lora_ga_config": {"direction": "ArB2r", "scale": "stable", "stable_gamma": 16},
    "use_bdlora": {"target_modules_bd_a": None, "target_modules_bd_b": None, "nblocks": 1, "match_strict": True},
    "kasa_config": {"beta": 1e-4, "gamma": 1e-3},
}

LORA_GA_DIRECTIONS = ("ArBr", "A2rBr", "ArB2r", "random")
LORA_GA_SCALES = ("stable", "weight_svd", "gd_scale", "unit")

# Field -> option -> what it must be, in words, and as a test.
OPTION_VALUES: Mapping[str, Mapping[str, tuple[str, Callable[[Any], bool]]]] = {
    "loftq_config": {
        "loftq_bits": ("2, 4 or 8", lambda v: is_integer(v) and v in (2, 4, 8)),
        "loftq_iter": ("an integer of at least 1", lambda v: is_integer(v) and v >= 1),
    },
    "eva_config": {
        "rho": ("a number of at least 1", lambda v: is_number(v) and v >= 1),
        "tau": ("a number from 0 to 1", lambda v: is_number(v) and 0 <= v <= 1),
        **dict.fromkeys(("use_label_mask", "whiten", "adjust_scaling_factors"), ("True or False", is_flag)),
    },
    "corda_config": {
        "corda_method": ("'ipm' or 'kpm'", lambda v: v in ("ipm", "kpm")),
        **dict.fromkeys(
            ("cache_file", "covariance_file"), ("None (PEFT's files are pickles); give the batches", lambda v: not v)
        ),
        "use_float16_for_covariance": ("False: it is summed in fp32 here", lambda v: v is False),
    },
    "lora_ga_config": {
        "direction": (f"one of {LORA_GA_DIRECTIONS}", lambda v: v in LORA_GA_DIRECTIONS),
        "scale": (f"one of {LORA_GA_SCALES}", lambda v: v in LORA_GA_SCALES),
        "stable_gamma": ("a number above 0", lambda v: is_number(v) and v > 0),
    },
}

# The variants of the update: field of LoraSpec -> name; a layer has one (see `LoraSpec.variant`).
VARIANTS: Mapping[str, str] = {
    "use_dora": "dora",
    "use_qalora": "qalora",
    "use_bdlora": "bdlora",
    "alora_invocation_tokens": "alora",
    "kasa_config": "kasa",
}


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
    ("use_rslora", "True or False", is_flag),
    ("lora_bias", "True or False", is_flag),
    ("share_A", "True or False", is_flag),
    ("use_dora", "True or False", is_flag),
    ("use_qalora", "True or False", is_flag),
    ("ensure_weight_tying", "True or False", is_flag),
    ("target_modules", "names, a regular expression, or None", lambda v: v is None or are_targets(v)),
    ("exclude_modules", "names or a regular expression", are_targets),
    ("layers_to_transform", "indices of layers, or None", lambda v: v is None or are_indices(v)),
    ("layers_pattern", "names, or None", lambda v: v is None or are_names(v)),
    ("bias", f"one of {BIASES}", lambda v: v in BIASES),
    ("modules_to_save", "names", are_names),
    ("target_parameters", "names", are_names),
    ("trainable_token_indices", "ids, or names with ids", lambda v: all(is_text(n) and are_indices(i) for n, i in v)),
    ("layer_replication", "pairs of integers", lambda v: all(are_indices(p) and len(p) == 2 for p in v)),
    ("qalora_group_size", "an integer of at least 1", lambda v: is_integer(v) and v >= 1),
    ("alora_invocation_tokens", "ids of tokens, or None", lambda v: v is None or (are_indices(v) and len(v) > 0)),
    ("task_type", "text, or None", is_text),
    ("base_model_name_or_path", "text, or None", is_text),
)


def _token_indices(given: Any) -> Any:
    """trainable_token_indices as pairs of a name and ids, the input embedding's name being ""."""
    if isinstance(given, Mapping):
        return tuple(given.items())
    return (("", tuple(given)),) if isinstance(given, (list, tuple)) and given and is_integer(given[0]) else given


def _option_problems(
    given: Any, known: Mapping[str, Any], values: Mapping[str, tuple[str, Callable[[Any], bool]]]
) -> list[str]:
    """What is wrong with the options of a field, as the rest of a sentence each."""
    if given is None:
        return []
    if not are_options(given):
        return [f"is {given!r}, expected a mapping of options."]
    odd = [f"has an option {name!r}, expected some of {sorted(known)}." for name, _ in given if name not in known]
    wrong = [(n, v, values[n][0]) for n, v in given if n in values and not values[n][1](v)]
    return [*odd, *(f"has {name} {value!r}, expected {expected}." for name, value, expected in wrong)]


def _is_regex(spec: LoraSpec) -> bool:
    return isinstance(spec.target_modules, str) and spec.target_modules != "all-linear"


def _variants(spec: LoraSpec) -> list[str]:
    named = [field for field in VARIANTS if getattr(spec, field) not in (None, False)]
    return [*named, *(["init_lora_weights 'mica'"] if spec.init_lora_weights == "mica" else [])]


# What cannot be together: the field to blame, a test, and the reason. A row each; nothing else refuses a combination.
# What a layer cannot have is for `LayerSpec`, `starts.check` and `variants.check` to say.
EXCLUSIONS: tuple[tuple[str, Callable[[LoraSpec], bool], str], ...] = (
    (
        "target_modules",
        lambda s: s.target_modules in ("", ()) and not s.target_parameters,
        'is empty; name the layers to adapt, or "all-linear".',
    ),
    (
        "layers_to_transform",
        lambda s: _is_regex(s) and (s.layers_to_transform is not None or s.layers_pattern is not None),
        "cannot be with a regular expression in target_modules; put it in there.",
    ),
    (
        "layers_pattern",
        lambda s: s.layers_pattern is not None and s.layers_to_transform is None,
        "is given without layers_to_transform; give both or neither.",
    ),
    (
        "lora_bias",
        lambda s: s.lora_bias and not isinstance(s.init_lora_weights, bool),
        "cannot be with an init_lora_weights other than True or False, as in PEFT; choose one.",
    ),
    (
        "lora_bias",
        lambda s: s.lora_bias and s.use_dora,
        "cannot be with use_dora, whose magnitude would scale it too, as in PEFT; choose one.",
    ),
    (
        "lora_bias",
        lambda s: s.lora_bias and s.use_qalora,
        "cannot be with use_qalora, which leaves it out in PEFT; choose one.",
    ),
    *(
        (
            field,
            lambda s, field=field: (
                getattr(s, field) not in (None, False) and s.init_lora_weights not in (True, False, "gaussian")
            ),
            "cannot be with an init_lora_weights other than True, False or 'gaussian', which knows plain factors only; "
            "choose one.",
        )
        for field in ("use_qalora", "use_bdlora", "kasa_config")
    ),
    (
        "init_lora_weights",
        lambda s: len(_variants(s)) > 1,
        "and use_dora, use_qalora, use_bdlora, alora_invocation_tokens and kasa_config each make another "
        "update, as in PEFT; choose one.",
    ),
    *(
        (
            f"{init}_config",
            lambda s, init=init: getattr(s, f"{init}_config") not in (None, ()) and s.init_lora_weights != init,
            f"is given without init_lora_weights {init!r}, so that it would change nothing; give both or neither.",
        )
        for init in ("loftq", "eva", "corda", "lora_ga")
    ),
    (
        "layer_replication",
        lambda s: bool(s.layer_replication) and s.bias != "none",
        "cannot be with a bias to train, which the copies of a layer would share; leave one of them out.",
    ),
    (
        "layer_replication",
        lambda s: bool(s.layer_replication) and (s.init_lora_weights not in FREE_INITS or s.kasa_config is not None),
        "cannot be with what changes the base's weights, which the copies of a layer share; choose another "
        "init_lora_weights or variant.",
    ),
    (
        "target_parameters",
        lambda s: bool(s.target_parameters) and (s.dropout > 0 or s.lora_bias),
        "cannot be with dropout or lora_bias, as in PEFT: a parameter has no input and no output of its own; leave "
        "those out.",
    ),
    (
        "target_parameters",
        lambda s: bool(s.target_parameters) and bool(_variants(s)),
        "cannot be with a variant of the update, which PEFT refuses there or leaves out without a word; choose one.",
    ),
    (
        "target_parameters",
        lambda s: bool(s.target_parameters) and s.init_lora_weights not in (True, False, "gaussian"),
        "cannot be with an init_lora_weights other than True, False or 'gaussian': PEFT fails there; choose one.",
    ),
    (
        "loftq_config",
        lambda s: s.init_lora_weights == "loftq" and not s.loftq_config,
        "is missing, which init_lora_weights 'loftq' needs, as in PEFT; give it loftq_bits.",
    ),
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
        init_lora_weights: True (Kaiming-uniform A, zero B), False (both random), or the name of one of `INITS`.
        loftq_config, eva_config, corda_config, lora_ga_config: Options of that initialisation (see `OPTIONS`), a
            mapping; only with it.
        use_dora: A learned magnitude for each output (DoRA, arXiv 2402.09353).
        use_qalora, qalora_group_size: Inputs averaged in groups before lora_A (QA-LoRA, arXiv 2309.14717).
        use_bdlora: Block-diagonal factors (BD-LoRA): a mapping, see `OPTIONS`.
        alora_invocation_tokens: The update begins where these tokens do (aLoRA, arXiv 2504.12397).
        kasa_config: A learned diagonal between the factors (KaSA, arXiv 2412.06071): a mapping, see `OPTIONS`.
        share_A: One lora_A for all adapted parts of a fused layer (the "performant" form of NVIDIA's and Optimum
            Neuron's), in place of one each. PEFT's files then hold a copy for each part.
        target_modules: A tuple of names or of suffixes of names, a regular expression that matches whole names, or
            "all-linear", or None for what PEFT adapts by default in a model of its type.
        exclude_modules: A tuple of names or suffixes, or a regular expression; checked first.
        layers_to_transform: Indices of the layers to adapt; None for all.
        layers_pattern: Names of the module lists that `layers_to_transform` counts in; None for any.
        rank_pattern: Pairs (or a mapping) of a regular expression of names and the rank there; the first that matches.
        alpha_pattern: The same for alpha.
        target_parameters: Names of parameters to adapt, or suffixes of names, of modules that compute by themselves:
            [experts, out, in] ([experts, in, out] where the module has `is_transposed`), or [out, in]. As in PEFT,
            exclude_modules and layers_to_transform do not concern them; with () in target_modules, nothing else is
            adapted.
        modules_to_save: Names of modules that are trained whole beside the adapter.
        trainable_token_indices: Ids of tokens whose embeddings are trained: of the input embedding, or a mapping of
            names of embeddings to ids.
        bias: Which biases of the base are trained: "none", "all", or "lora_only" (those of adapted layers).
        layer_replication: Ranges [start, end) of layers that the model is to be stacked of.
        ensure_weight_tying: What is adapted or trained of tied weights stays tied.
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
    loftq_config: Options | None = None
    eva_config: Options | None = None
    corda_config: Options | None = None
    lora_ga_config: Options | None = None
    use_dora: bool = False
    use_qalora: bool = False
    qalora_group_size: int = 16
    use_bdlora: Options | None = None
    alora_invocation_tokens: tuple[int, ...] | None = None
    kasa_config: Options | None = None
    share_A: bool = False
    target_modules: tuple[str, ...] | str | None = "all-linear"
    exclude_modules: tuple[str, ...] | str = ()
    layers_to_transform: tuple[int, ...] | None = None
    layers_pattern: tuple[str, ...] | None = None
    rank_pattern: tuple[tuple[str, int], ...] = ()
    alpha_pattern: tuple[tuple[str, float], ...] = ()
    target_parameters: tuple[str, ...] = ()
    modules_to_save: tuple[str, ...] = ()
    trainable_token_indices: tuple[tuple[str, tuple[int, ...]], ...] = ()
    bias: str = "none"
    layer_replication: tuple[tuple[int, int], ...] = ()
    ensure_weight_tying: bool = False
    task_type: str | None = None
    base_model_name_or_path: str | None = None

    def __post_init__(self) -> None:
        problems = Problems(SpecError)
        for name in ("rank_pattern", "alpha_pattern"):
            given = getattr(self, name)
            problem = _pattern_problem(given)
            if problem is not None:
                problems.add(f"LoraSpec.{name}", problem)
            object.__setattr__(self, name, () if problem is not None else tuple(dict(given).items()))
        object.__setattr__(self, "trainable_token_indices", _token_indices(self.trainable_token_indices))
        for f in fields(self):
            if f.name not in ("rank_pattern", "alpha_pattern"):
                object.__setattr__(self, f.name, frozen(getattr(self, f.name)))
        for name, expected, fits in LORA_TYPES:
            if not fits(getattr(self, name)):
                problems.add(f"LoraSpec.{name}", f"is {getattr(self, name)!r}, expected {expected}.")
        for name, known in OPTIONS.items():
            for message in _option_problems(getattr(self, name), known, OPTION_VALUES.get(name, {})):
                problems.add(f"LoraSpec.{name}", message)
        for where, rank in [("rank", self.rank), *((f"rank_pattern[{k!r}]", v) for k, v in self.rank_pattern)]:
            if not is_integer(rank) or rank < 1:
                problems.add(f"LoraSpec.{where}", f"is {rank!r}, expected an integer of at least 1.")
        for where, alpha in [("alpha", self.alpha), *((f"alpha_pattern[{k!r}]", v) for k, v in self.alpha_pattern)]:
            if not is_number(alpha) or not math.isfinite(alpha) or alpha <= 0:
                problems.add(f"LoraSpec.{where}", f"is {alpha!r}, expected a finite number above 0.")
        if not is_number(self.dropout) or not 0 <= self.dropout < 1:
            problems.add("LoraSpec.dropout", f"is {self.dropout!r}, expected a probability of at least 0 and below 1.")
        init = self.init_lora_weights
        if init not in INITS and not (isinstance(init, str) and NITER.fullmatch(init)):
            problems.add(
                "LoraSpec.init_lora_weights",
                f"is {init!r}, expected one of {INITS} or 'pissa_niter_[number of iterations]'.",
            )
        for field, excludes, reason in EXCLUSIONS:
            if excludes(self):
                problems.add(f"LoraSpec.{field}", reason)
        problems.raise_if_any()

    @property
    def variant(self) -> str:
        """The name of the update's variant: one of `VARIANTS`, "mica", or "lora" for none."""
        found = [name for field, name in VARIANTS.items() if getattr(self, field) not in (None, False)]
        return found[0] if found else "mica" if self.init_lora_weights == "mica" else "lora"

    def options(self, field: str) -> dict[str, Any]:
        """The options of a field of `OPTIONS`, with its defaults for those that were not given."""
        return dict(OPTIONS[field]) | dict(getattr(self, field) or ())

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, one per field."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        mappings = ("rank_pattern", "alpha_pattern", *(n for n in OPTIONS if values[n] is not None))
        values |= {name: dict(values[name]) for name in mappings}
        tokens = dict(values["trainable_token_indices"])
        values["trainable_token_indices"] = tokens[""] if set(tokens) == {""} else tokens
        return {
            name: {k: thawed(v) for k, v in value.items()} if isinstance(value, dict) else thawed(value)
            for name, value in values.items()
        }

    def to_json(self) -> str:
        """The spec as JSON."""
        return json.dumps(self.to_dict())

    @classmethod
    def from_json(cls, text: str) -> LoraSpec:
        """The spec that `to_json` wrote.

        Raises:
            SpecError: Not such JSON, unknown keys, or values that cannot be.
        """
        return cls(**from_json(cls, text))
