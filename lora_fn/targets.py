"""Which layers does an adapter adapt? PEFT's matching rules, over names of modules.

Source: PEFT `tuners_utils.check_target_module_exists`, `utils.other.get_pattern_key`.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

from lora_fn.errors import TargetError
from lora_fn.spec import LoraSpec

PATIENCE = 1.0  # seconds that one match may take
INPUT_EMBEDDINGS = ("embed_tokens", "word_embeddings", "wte")
OUTPUT_EMBEDDINGS = ("lm_head", "embed_out", "output_layer")
CLASSIFIERS = ("score", "classifier")  # heads of what classifies sequences; the first that there is

_QUERY_VALUE = ("q_proj", "v_proj")
# Type of a model, as its config says -> what is adapted where nobody says what: as in PEFT, but for "granite" and
# "granitemoe", which PEFT has no word of, and which get what their kind gets.
DEFAULTS: Mapping[str, tuple[str, ...]] = {
    **dict.fromkeys(("llama", "llama4", "mistral", "mixtral", "qwen2", "qwen3", "granite", "granitemoe"), _QUERY_VALUE),
    **dict.fromkeys(("gemma", "gemma2", "gemma3_text", "stablelm", "opt", "gptj", "gpt_neo", "bart"), _QUERY_VALUE),
    **dict.fromkeys(("t5", "mt5"), ("q", "v")),
    **dict.fromkeys(("bert", "roberta", "xlm-roberta", "electra", "layoutlm"), ("query", "value")),
    **dict.fromkeys(("bloom", "falcon", "gpt_neox", "chatglm"), ("query_key_value",)),
    **dict.fromkeys(("gpt2", "gpt_bigcode"), ("c_attn",)),
    "phi": ("q_proj", "v_proj", "fc1", "fc2"),
    "nemotron_h": ("q_proj", "k_proj", "v_proj", "o_proj"),
}


def select(
    names: Sequence[str],
    spec: LoraSpec,
    *,
    linear: Iterable[str] = (),
    without: Collection[str] = (),
    model_type: str | None = None,
    parameters: Sequence[str] = (),
) -> tuple[str, ...]:
    """The names that a spec adapts, in the order given, modules first.

    Args:
        names: Names of all modules that can be adapted.
        spec: What the user asks for.
        linear: Those of the names that "all-linear" means (it leaves the output embedding out).
        without: Those that are trained whole, and so not adapted.
        model_type: Of the model, as its config says: what is adapted where the spec does not say.
        parameters: Names of all parameters that can be adapted.

    Raises:
        TargetError: A target, an excluded module or a pattern that matches no name (with the nearest names), or nothing
            left to adapt.

    Example:
        >>> select(["layers.0.q", "layers.0.k"], LoraSpec(target_modules=("q",)))
        ('layers.0.q',)
    """
    everything, named = spec.target_modules == "all-linear", spec.target_modules
    if named is None:
        named = () if spec.target_parameters else _default(model_type)
    problems = [] if everything else _unmatched("target_modules", named, names)
    problems += _unmatched("exclude_modules", spec.exclude_modules, names)
    problems += _unmatched("target_parameters", spec.target_parameters, parameters, "parameters")
    if problems:
        raise TargetError("\n".join(problems))
    heads = [head for head in CLASSIFIERS if head in names] if spec.task_type == "SEQ_CLS" else []
    of_linear = {n for n in linear if n.rpartition(".")[2] not in OUTPUT_EMBEDDINGS and n not in heads[:1]}
    wanted = [n for n in names if (n in of_linear if everything else is_target(n, named))]
    left = [n for n in wanted if n not in without]
    explicit = named if isinstance(named, tuple) else ()  # as in PEFT, a whole name is meant whatever its layer
    left = [n for n in left if not is_target(n, spec.exclude_modules)]
    chosen = tuple(n for n in left if n in explicit or _in_layers(n, spec))
    chosen += tuple(n for n in parameters if is_target(n, spec.target_parameters))
    for field, patterns in (("rank_pattern", spec.rank_pattern), ("alpha_pattern", spec.alpha_pattern)):
        for key, _ in patterns:
            if not any(_pattern_hit(key, n) for n in chosen):
                problems.append(f"{field} {key!r} matches none of the adapted layers; {nearest(key, chosen)}")
    if not chosen and not problems:
        problems.append(f"nothing is left to adapt of {len(names)} layers; {nearest(str(spec.target_modules), names)}")
    if problems:
        raise TargetError("\n".join(problems))
    return chosen


def _default(model_type: str | None) -> tuple[str, ...]:
    """What is adapted in a model of a type.

    Raises:
        TargetError: A type that we know nothing of.
    """
    if model_type is None or model_type not in DEFAULTS:
        what = "the model has no config that tells its type" if model_type is None else f"the model is a {model_type!r}"
        raise TargetError(
            f"target_modules: is None, and {what}, expected one of {', '.join(sorted(DEFAULTS))}; name the layers to "
            f'adapt, or "all-linear".'
        )
    return DEFAULTS[model_type]


def upwards(name: str) -> Iterator[str]:
    """The name of a module, and those of what holds it.

    Example:
        >>> list(upwards("layers.0.mlp"))
        ['layers.0.mlp', 'layers.0', 'layers']
    """
    while name:
        yield name
        name = name.rpartition(".")[0]


def rank_of(name: str, spec: LoraSpec) -> int:
    """The rank of a layer: the first rank_pattern that matches its name, else the spec's."""
    return next((rank for key, rank in spec.rank_pattern if _pattern_hit(key, name)), spec.rank)


def alpha_of(name: str, spec: LoraSpec) -> float:
    """The alpha of a layer: the first alpha_pattern that matches its name, else the spec's."""
    return next((alpha for key, alpha in spec.alpha_pattern if _pattern_hit(key, name)), spec.alpha)


def is_target(name: str, targets: tuple[str, ...] | str) -> bool:
    """Whether names, suffixes of names or a regular expression mean a name."""
    if isinstance(targets, str):
        return bool(targets) and _matches(targets, name)
    return any(name == t or name.endswith("." + t) for t in targets)


def _pattern_hit(key: str, name: str) -> bool:
    return _matches(rf"(.*\.)?({key})$", name)


def _matches(expression: str, name: str) -> bool:
    """Whether a whole name matches; an expression of strangers may not take for ever."""
    import regex

    try:
        return regex.fullmatch(expression, name, timeout=PATIENCE) is not None
    except TimeoutError as error:
        raise TargetError(
            f"regular expression {expression!r} took longer than {PATIENCE:g} s on {name!r}; write a simpler one."
        ) from error
    except regex.error as error:
        raise TargetError(f"{expression!r} is not a regular expression ({error}); mend it.") from error


def _in_layers(name: str, spec: LoraSpec) -> bool:
    if spec.layers_to_transform is None:
        return True
    # As in PEFT 0.21, a list of layers may stand at the top of the model where its name is given.
    patterns = [rf"(?:.*?\.)?{re.escape(p)}" for p in spec.layers_pattern] if spec.layers_pattern else [r".*?\.[^.]*"]
    found = next(filter(None, (re.match(rf"{p}\.(\d+)\.", name) for p in patterns)), None)
    return found is not None and int(found.group(1)) in spec.layers_to_transform


def _unmatched(field: str, targets: tuple[str, ...] | str, names: Sequence[str], what: str = "layers") -> list[str]:
    each = ([targets] if targets else []) if isinstance(targets, str) else list(targets)
    problems = []
    for target in each:
        try:
            hit = any(is_target(n, target if isinstance(targets, str) else (target,)) for n in names)
        except TargetError as error:
            problems.append(f"{field}: {error}")
            continue
        if not hit:
            problems.append(f"{field} {target!r} matches none of the {len(names)} {what}; {nearest(target, names)}")
    return problems


def nearest(target: str, names: Sequence[str]) -> str:
    """The names that are most like one that matches nothing, as the end of a sentence."""
    last = list(dict.fromkeys(n.rpartition(".")[2] for n in names))
    near = difflib.get_close_matches(target, [*last, *names], n=3, cutoff=0.4) or sorted(last)[:12]
    return f"the nearest names are {', '.join(near)}." if near else "there are none to choose from."
