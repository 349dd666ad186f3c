"""How do experts, which models stack, lie in the files of Hugging Face's models? In most of them, one by one."""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import dataclass

# End of a module's name in the model -> that in the files -> its parameters there: those of each expert, of which the
# stacked one is made, or the one of that name ("").
FORMS: Mapping[str, tuple[tuple[str, Mapping[str, tuple[str, ...]]], ...]] = {
    "mlp.experts": (
        ("block_sparse_moe.experts", {"gate_up_proj": ("w1", "w3"), "down_proj": ("w2",)}),
        ("mlp.experts", {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}),
    ),
    "mlp.gate": (("block_sparse_moe.gate", {}),),
}

# Parameters of modules of these names, in the order in which they declare them; those of others have a weight.
DECLARED: Mapping[str, tuple[str, ...]] = {
    "experts": ("gate_up_proj", "gate_up_proj_bias", "down_proj", "down_proj_bias"),
}

# Types of models whose experts are stored [experts, in, out].
TRANSPOSED = ("aria_text", "gpt_oss", "openai_privacy_filter")


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """One tensor of the files, of those that make a raw parameter.

    Args:
        key: Its name.
        expert: Which expert's it is; None for all of them (or where there are none).
        part, parts: Which of how many equal parts of that expert's outputs.
    """

    key: str
    expert: int | None = None
    part: int = 0
    parts: int = 1


def pieces(name: str, num_experts: int, keys: Container[str]) -> list[Piece]:
    """Of what a raw parameter is made.

    Args:
        name: Of the parameter in the model.
        num_experts: How many experts it stacks.
        keys: The names in the files.

    Returns:
        Expert by expert, part by part; [] where the files have no such parameter in a form that we know.

    Example:
        >>> [p.key for p in pieces("h.0.mlp.experts.down_proj", 2, ["h.0.block_sparse_moe.experts.0.w2.weight"])]
        ['h.0.block_sparse_moe.experts.0.w2.weight', 'h.0.block_sparse_moe.experts.1.w2.weight']
    """
    if name in keys:
        return [Piece(key=name)]
    owner, _, own = name.rpartition(".")
    for end, forms in FORMS.items():
        if owner != end and not owner.endswith(f".{end}"):
            continue
        for other, parameters in forms:
            there, parts = owner.removesuffix(end) + other, parameters.get(own, ())
            if f"{there}.{own}" in keys:
                return [Piece(key=f"{there}.{own}")]
            if parts and f"{there}.0.{parts[0]}.weight" in keys:
                return [
                    Piece(key=f"{there}.{expert}.{part}.weight", expert=expert, part=number, parts=len(parts))
                    for expert in range(num_experts)
                    for number, part in enumerate(parts)
                ]
    return []
