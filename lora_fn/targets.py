"""Which layers does an adapter adapt? PEFT's matching rules, over names of modules.

Source: PEFT `tuners_utils.check_target_module_exists`, `utils.other.get_pattern_key`.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence

import regex

from lora_fn.errors import TargetError
from lora_fn.spec import LoraSpec

PATIENCE = 1.0  # seconds that one match may take
OUTPUT_EMBEDDINGS = ("lm_head", "embed_out", "output_layer")


def select(
    names: Sequence[str], spec: LoraSpec, *, linear: Iterable[str] = (), parameters: Sequence[str] = ()
) -> tuple[str, ...]:
    """The names that a spec adapts, in the order given, modules first.

    Args:
        names: Names of all modules that can be adapted.
        spec: What the user asks for.
        linear: Those of the names that "all-linear" means (it leaves the output embedding out).
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
        raise TargetError('target_modules: is None; name the layers to adapt, or "all-linear".')
    problems = [] if everything else _unmatched("target_modules", named, names)
    problems += _unmatched("exclude_modules", spec.exclude_modules, names)
    problems += _unmatched("target_parameters", spec.target_parameters, parameters, "parameters")
    if problems:
        raise TargetError("\n".join(problems))
    of_linear = {n for n in linear if n.rpartition(".")[2] not in OUTPUT_EMBEDDINGS}
    wanted = [n for n in names if (n in of_linear if everything else is_target(n, named))]
    chosen = tuple(n for n in wanted if not is_target(n, spec.exclude_modules) and _in_layers(n, spec))
    chosen += tuple(n for n in parameters if is_target(n, spec.target_parameters))
    for field, patterns in (("rank_pattern", spec.rank_pattern), ("alpha_pattern", spec.alpha_pattern)):
        for key, _ in patterns:
            if not any(_pattern_hit(key, n) for n in chosen):
                problems.append(f"{field} {key!r} matches none of the adapted layers; {_nearest(key, chosen)}")
    if not chosen and not problems:
        problems.append(f"nothing is left to adapt of {len(names)} layers; {_nearest(str(spec.target_modules), names)}")
    if problems:
        raise TargetError("\n".join(problems))
    return chosen


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
            problems.append(f"{field} {target!r} matches none of the {len(names)} {what}; {_nearest(target, names)}")
    return problems


def _nearest(target: str, names: Sequence[str]) -> str:
    last = list(dict.fromkeys(n.rpartition(".")[2] for n in names))
    near = difflib.get_close_matches(target, [*last, *names], n=3, cutoff=0.4) or sorted(last)[:12]
    return f"the nearest names are {', '.join(near)}." if near else "there are none to choose from."
