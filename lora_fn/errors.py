"""Which errors can I catch?

Every error that a user can cause is a `LoraFnError`: one sentence that says where, what was found, what was expected
and what to do. Our own bugs are `AssertionError`s.
"""

from __future__ import annotations

SHOWN = 20  # problems of one error


class LoraFnError(ValueError):
    """Base of every error that bad input can cause."""


class SpecError(LoraFnError):
    """A `LoraSpec`, `LayerSpec` or `Axis` that cannot be, or parameters that do not fit theirs."""


class TargetError(LoraFnError):
    """Targets that name no layer, or layers that cannot be adapted."""


class FileError(LoraFnError):
    """A file or directory that is missing, damaged, or not what it should be."""


class DataError(LoraFnError):
    """Training data that cannot be used."""


class Problems:
    """Collects problems with their places, to raise them together before anything is changed.

    Example:
        >>> problems = Problems(FileError)
        >>> problems.add("a.json", "is empty; write a JSON object into it.")
        >>> problems.raise_if_any()
        Traceback (most recent call last):
        ...
        lora_fn.errors.FileError: a.json: is empty; write a JSON object into it.
    """

    def __init__(self, error: type[LoraFnError] = LoraFnError) -> None:
        self.error = error
        self.found: list[str] = []

    def add(self, where: str, message: str) -> None:
        """Note one problem: `where` is a path of a layer or file, `message` the rest of the sentence."""
        self.found.append(f"{where}: {message}")

    def raise_if_any(self) -> None:
        """Raise one error that carries the problems, a line each: the first `SHOWN`, and how many more there are.

        Raises:
            LoraFnError: (the class given at birth) when a problem was added.
        """
        if self.found:
            more = len(self.found) - SHOWN
            raise self.error("\n".join([*self.found[:SHOWN], *([f"and {more} more."] if more > 0 else [])]))
