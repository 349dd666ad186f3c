"""What does each initialisation need, and which layers can it start?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from lora_fn import variants
from lora_fn.errors import Problems
from lora_fn.layer_spec import LayerSpec

NOTHING, WEIGHT, INPUTS, GRADIENT = "nothing", "weight", "inputs", "gradient"
KEPT, RESIDUAL, QUANTIZED = "kept", "residual", "quantized"
PLAIN = ("lora", "mica", "dora", "alora")  # variants with factors of the plain form
LINEAR = ("linear", "column", "row", "qkv")


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """What one initialisation needs and does.

    Args:
        needs: Beside a seed: "nothing", the "weight", also the layer's "inputs", or also the weight's "gradient".
        base: What becomes of the base: "kept", the "residual" (weight - scaling * B A, which the adapter completes), or
            "quantized" (the factors make up for the most of what that lost).
        kinds: Of the layers that it can start, as in PEFT.
        trained: Of `LayerSpec.trained`.
        any_form: Whether it fills factors of any form: shared by parts, block-diagonal, over groups of inputs.
        at_most: How many times the rank may go into the number of singular vectors that there are; 0 for any rank.
    """

    needs: str = NOTHING
    base: str = KEPT
    kinds: tuple[str, ...] = LINEAR
    trained: tuple[str, ...] | None = None
    any_form: bool = False
    at_most: int = 0


_random = Start(kinds=(*LINEAR, "embedding", "conv2d", "experts"), any_form=True)

# Initialisation -> what it needs and does; nothing else knows. "pissa" is also the row of "pissa_niter_[number]".
TABLE: Mapping[bool | str, Start] = {
    True: _random,
    False: _random,
    "gaussian": _random,
    "orthogonal": Start(),
    "pissa": Start(needs=WEIGHT, base=RESIDUAL, at_most=1),
    "olora": Start(needs=WEIGHT, base=RESIDUAL, at_most=1),
    "loftq": Start(needs=WEIGHT, base=QUANTIZED, at_most=1),
    "mica": Start(needs=WEIGHT, kinds=(*LINEAR, "embedding"), trained=("lora_A",), at_most=1),
    "eva": Start(needs=INPUTS, at_most=1),
    "corda": Start(needs=INPUTS, base=RESIDUAL, at_most=1),
    "lora_ga": Start(needs=GRADIENT, base=RESIDUAL, at_most=2),
}


# What becomes of the base -> why a quantised one cannot have it.
_CANNOT: Mapping[str, str] = {
    KEPT: "needs the weight itself",
    RESIDUAL: "makes the base a residual, which those few values cannot hold",
    QUANTIZED: "quantises the weight itself, to make up for what that loses, which is lost here already",
}


def start_of(init: bool | str) -> Start:
    """The row of `TABLE` of an `init_lora_weights`."""
    return TABLE["pissa" if isinstance(init, str) and init.startswith("pissa") else init]


def check(path: str, spec: LayerSpec, init: bool | str, problems: Problems) -> None:
    """Note why a layer cannot start as asked.

    Args:
        path: Its name, for the message.
        spec: The layer, with its adapter.
        init: `init_lora_weights`.
        problems: Where they are noted.
    """
    start, updates = start_of(init), spec.updates
    if not updates:
        return
    if spec.kind not in start.kinds:
        problems.add(
            path,
            f"is a layer of kind {spec.kind!r}, which init_lora_weights {init!r} has no rule for (PEFT would fail, or "
            f"silently start it as for True); leave it out of the targets, or choose another.",
        )
        return
    if spec.quantization is not None and (start.base != KEPT or start.needs in (WEIGHT, GRADIENT)):
        problems.add(
            path,
            f"is held as {spec.quantization.code}, and init_lora_weights {init!r} {_CANNOT[start.base]}; start it "
            f"otherwise, or load the model unquantised.",
        )
    if spec.share_A and not start.any_form:
        problems.add(
            path, f"shares one lora_A between its parts, but init_lora_weights {init!r} gives each its own; leave one."
        )
    if spec.variant not in PLAIN and not start.any_form:
        problems.add(
            path, f"is of variant {spec.variant!r}, and init_lora_weights {init!r} fits plain factors; leave one."
        )
    if start.base != KEPT and variants.TABLE[spec.variant].gated:
        problems.add(
            path,
            f"is of variant {spec.variant!r}, whose update some tokens do without, and init_lora_weights {init!r} "
            f"makes a base that needs it; choose one that keeps the base.",
        )
    if spec.lora_bias and not isinstance(init, bool):
        problems.add(path, f"has lora_bias, which init_lora_weights {init!r} has no rule for, as in PEFT; leave one.")
    for part in updates:
        where = f"{path} ({part.name})" if part.name else path
        most = spec.in_features if init == "eva" else min(part.size, spec.in_features)
        if start.at_most and part.rank * start.at_most > most:
            problems.add(
                where,
                f"has rank {part.rank}, but init_lora_weights {init!r} needs {start.at_most} singular vectors per rank "
                f"and there are {most}; choose a rank of at most {most // start.at_most}.",
            )
        if start.needs != NOTHING and part.alpha <= 0:
            problems.add(
                where, f"has alpha {part.alpha}, but init_lora_weights {init!r} takes its root; choose more than 0."
            )
        if init == "orthogonal" and part.rank % 2:
            problems.add(where, f"has rank {part.rank}, but init_lora_weights 'orthogonal' needs an even one.")
