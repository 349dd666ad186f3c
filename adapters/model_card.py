"""What does the README.md beside an adapter say? The model card that Hugging Face's hub shows."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from lora_fn import FileError, checkpoint

_FRONT = re.compile(r"\A---\n(.*?)^---\n", re.DOTALL | re.MULTILINE)


def write(directory: Path, *, base_model: str | None, tags: Sequence[str], pipeline_tag: str | None) -> None:
    """Write the card, or bring the head of one that is there up to date; its text and its other keys stay.

    Args:
        directory: Of the adapter.
        base_model: Name or path of the base model.
        tags: Sorted; in the place of those that are there.
        pipeline_tag: Where there is none yet.

    Raises:
        FileError: A place that cannot be written.
    """
    file = directory / "README.md"
    try:
        before = file.read_text(encoding="utf-8") if file.exists() else ""
        head = _FRONT.match(before)
        kept = _blocks(head.group(1)) if head else {}
        told = {"base_model": base_model, "library_name": "peft", "pipeline_tag": pipeline_tag}
        fresh = {key: f"{key}: {value}\n" for key, value in told.items() if value is not None}
        if "pipeline_tag" in kept:
            fresh.pop("pipeline_tag", None)
        if tags:
            fresh["tags"] = "tags:\n" + "".join(f"- {tag}\n" for tag in tags)
        body = before[head.end() :] if head else before or "\n# An adapter\n\nLoRA, in PEFT's format.\n"
        with checkpoint.replacing(file) as beside:
            text = "---\n" + "".join({**kept, **fresh}[key] for key in sorted({**kept, **fresh})) + "---\n" + body
            beside.write_text(text, encoding="utf-8")
    except OSError as error:
        raise FileError(f"{file}: cannot be written ({error}); choose another place.") from error


def _blocks(head: str) -> dict[str, str]:
    """The keys of a head -> their lines, as they are."""
    found: dict[str, str] = {}
    key = ""
    for line in head.splitlines(keepends=True):
        named = re.match(r"([\w-]+):", line)
        key = named.group(1) if named else key
        found[key] = found.get(key, "") + line
    return found
