"""Which values may a spec hold? What is frozen, hashable, and the same after a way through JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from lora_fn.errors import SpecError

# A JSON object as sorted pairs: what a dict would be, if it could be hashed.
Options = tuple[tuple[str, Any], ...]


def is_number(value: Any) -> bool:
    """Whether it is an int or a float, and no bool."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def is_integer(value: Any) -> bool:
    """Whether it is an int, and no bool."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_flag(value: Any) -> bool:
    """Whether it is True or False."""
    return isinstance(value, bool)


def is_text(value: Any) -> bool:
    """Whether it is text, or None."""
    return value is None or isinstance(value, str)


def is_name(value: Any) -> bool:
    """Whether it is text that could name a Python variable."""
    return isinstance(value, str) and value.isidentifier()


def are_names(value: Any) -> bool:
    """Whether it is a tuple of texts, none of them empty."""
    return isinstance(value, tuple) and all(isinstance(name, str) and name for name in value)


def are_targets(value: Any) -> bool:
    """Whether it is a regular expression, or a tuple of names."""
    return isinstance(value, str) or are_names(value)


def are_indices(value: Any) -> bool:
    """Whether it is a tuple of integers, none below 0."""
    return isinstance(value, tuple) and all(is_integer(index) and index >= 0 for index in value)


def frozen(value: Any) -> Any:
    """JSON's lists (and sets) as tuples, its objects as sorted pairs, all the way down.

    Example:
        >>> frozen({"b": [1, 2], "a": None})
        (('a', None), ('b', (1, 2)))
    """
    if isinstance(value, Mapping):
        return tuple(sorted((str(key), frozen(inner)) for key, inner in value.items()))
    if isinstance(value, (set, frozenset)):
        return tuple(sorted(value))
    return tuple(frozen(inner) for inner in value) if isinstance(value, (list, tuple)) else value


def thawed(value: Any) -> Any:
    """Tuples as lists, all the way down, for JSON."""
    return [thawed(inner) for inner in value] if isinstance(value, (list, tuple)) else value


def are_options(value: Any) -> bool:
    """Whether it is what `frozen` makes of a mapping."""
    return isinstance(value, tuple) and all(
        isinstance(pair, tuple) and len(pair) == 2 and isinstance(pair[0], str) for pair in value
    )


def from_json(cls: type, text: str) -> dict[str, Any]:
    """The values that a spec of a class was written with.

    Raises:
        SpecError: Not a JSON object, or keys that are no fields of the class.
    """
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
