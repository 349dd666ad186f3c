"""What do LoRA+ and LoRA-FA tell an optimizer? Groups of parameters with rates of their own; corrected gradients.

Neither is an optimizer here: both are data, and functions of gradients, which any optimizer of torch's takes.

Source: LoRA+, arXiv 2402.12354; LoRA-FA, arXiv 2308.03303; PEFT 0.21, `optimizers/loraplus.py`, `optimizers/lorafa.py`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from lora_fn import collectives, sharding
from lora_fn.errors import Problems, SpecError
from lora_fn.gradients import Tree
from lora_fn.layer_spec import FusedPart, LayerSpec

# Variants whose update of a weight is scaling * lora_B @ lora_A, which LoRA-FA's correction is made for.
CORRECTED = ("lora", "alora")

GROUPS = ("lora_A", "embedding", "lora_B", "lora_B without decay")


def parameter_groups(
    params: Tree,
    specs: Mapping[str, LayerSpec],
    *,
    lr: float,
    lr_ratio: float,
    lr_embedding: float = 1e-6,
    weight_decay: float = 0.0,
) -> list[dict[str, Any]]:
    """LoRA+: what is trained, in groups, each with its learning rate, as any optimizer of torch's takes them.

    lora_B, and every vector (magnitudes, biases, norms), moves `lr_ratio` times as fast as lora_A and whatever else is
    a matrix; both factors of an embedding have a rate of their own. Biases and norms do not decay.

    Args:
        params: {path: {name: parameter}} of what is trained: `adapters.factors(model)`. Local or canonical: which
            group a parameter is in does not depend on how it is cut.
        specs: {path: LayerSpec} of every path in params.
        lr: The rate of lora_A.
        lr_ratio: That of lora_B divided by it; the paper's lambda, above 0.
        lr_embedding: The rate of embeddings' factors.
        weight_decay: Of the groups that decay.

    Returns:
        Groups {"params": list, "lr", "initial_lr": the same, "weight_decay", "name": one of `GROUPS`} in that order,
        without empty ones. (torch's schedulers take "initial_lr" for the rate that they scale.)

    Raises:
        SpecError: A number that cannot be, or a path that has no spec.

    Example:
        >>> spec = LayerSpec(kind="linear", in_features=4, out_features=6, rank=2)
        >>> params = {"q": {"lora_A": torch.zeros(2, 4), "lora_B": torch.zeros(6, 2)}}
        >>> [(g["name"], g["lr"]) for g in parameter_groups(params, {"q": spec}, lr=1.0, lr_ratio=16)]
        [('lora_A', 1.0), ('lora_B', 16.0)]
    """
    problems = Problems(SpecError)
    for name, value in (("lr", lr), ("lr_ratio", lr_ratio), ("lr_embedding", lr_embedding)):
        if not (math.isfinite(value) and value > 0):
            problems.add(f"parameter_groups: {name}", f"is {value!r}, expected a finite number above 0.")
    for path in sorted(set(params) - set(specs)):
        problems.add(path, "has parameters but no spec; give the specs of all layers.")
    problems.raise_if_any()
    rates = dict(zip(GROUPS, (lr, lr_embedding, lr * lr_ratio, lr * lr_ratio), strict=True))
    members: dict[str, list[Tensor]] = {name: [] for name in GROUPS}
    for path, of in params.items():
        for name, p in of.items():
            members[_group(specs[path], name, p)].append(p)
    return [
        {
            "params": members[name],
            "lr": rate,
            "initial_lr": rate,
            "weight_decay": 0.0 if name == "lora_B without decay" else weight_decay,
            "name": name,
        }
        for name, rate in rates.items()
        if members[name]
    ]


def _group(spec: LayerSpec, name: str, p: Tensor) -> str:
    """The group of a parameter: one of `GROUPS`."""
    base = name.partition(".")[0]
    if spec.kind == "embedding" and base in ("lora_A", "lora_B"):
        return "embedding"
    if base == "lora_B":
        return "lora_B"
    if base in ("bias", "lora_B_bias") or (p.dim() == 1 and spec.kind == "replicated"):
        return "lora_B without decay"
    return "lora_B" if p.dim() == 1 else "lora_A"


def check_lorafa(specs: Mapping[str, LayerSpec], *, init_lora_weights: bool | str | None = None) -> None:
    """Refuse layers that LoRA-FA cannot train.

    Args:
        specs: {path: LayerSpec}.
        init_lora_weights: How the factors begin, as in `LoraSpec`; None for factors that are there.

    Raises:
        SpecError: Layers whose variant makes another update than scaling * lora_B @ lora_A, those whose lora_A
            begins, and so stays, zero, and those whose rank is cut; all of them.
    """
    problems = Problems(SpecError)
    for path, spec in specs.items():
        if spec.updates and spec.kind == "embedding" and init_lora_weights in (True, "gaussian"):
            problems.add(
                path,
                f"begins with a lora_A of zeros (init_lora_weights {init_lora_weights!r}), which LoRA-FA freezes, so "
                f"that nothing of it would be trained; set init_lora_weights to False, or leave the embedding out.",
            )
        if spec.updates and spec.variant not in CORRECTED:
            problems.add(
                path,
                f"is of the variant {spec.variant!r}, and LoRA-FA corrects the gradient of {CORRECTED}; "
                f"leave one of the two out.",
            )
        if spec.scheme is not None:
            problems.add(
                path,
                f"is cut by scheme {spec.scheme!r}, and LoRA-FA corrects lora_B by all of its rank; leave one of the "
                f"two out.",
            )
    problems.raise_if_any()


def lorafa_corrections(
    params: Tree, specs: Mapping[str, LayerSpec], *, index: Tensor | None = None
) -> dict[str, dict[str, Tensor]]:
    """What LoRA-FA multiplies gradients of lora_B with: (lora_A @ lora_A^T)^-1 / scaling^2, the same on every process.

    lora_A does not move, so this is done once. Of all B' with lora_A as it is, the corrected gradient is the one whose
    update of the weight comes nearest to the weight's own gradient. Where lora_A is cut along its inputs, as the rules
    table says, lora_A @ lora_A^T is a partial sum: one all-reduce per axis for all layers. Experts each have their own.

    Args:
        params: {path: {name: this process's tensor}} with every lora_A.
        specs: {path: LayerSpec}; where lora_B is trained, lora_A is not.
        index: As for `apply`.

    Returns:
        {path: {name of each lora_B that is trained: [r, r], of experts [E, r, r]}}, in fp32 (fp64 of such factors).

    Raises:
        SpecError: As `check_lorafa`; or a lora_A is trained, whose product would change.
    """
    check_lorafa(specs)
    problems, pairs = Problems(SpecError), list(_pairs(specs))
    for path, down, _, _ in pairs:
        if down in sharding.trained_names(specs[path]):
            problems.add(f"{path}.{down}", "is trained, and LoRA-FA needs it frozen; call adapters.freeze first.")
    problems.raise_if_any()
    products = {}
    for path, down, _, _ in pairs:
        factor = params[path][down].detach()
        factor = factor.to(torch.promote_types(factor.dtype, torch.float32))
        rows = factor if specs[path].kind == "experts" else factor.flatten(1)
        products[path, down] = rows @ rows.mT
    for axis in dict.fromkeys(specs[path].axis for path, _ in products):
        cut = [
            (path, down)
            for path, down in products
            if specs[path].axis == axis and sharding.layout(specs[path], down) is not None
        ]
        sums = collectives.reduce_flat([products[at] for at in cut], axis, index)
        products |= dict(zip(cut, sums, strict=True))
    found: dict[str, dict[str, Tensor]] = {}
    for path, down, up, part in pairs:
        # A pseudo-inverse: with more rows than inputs there is no other. (On the host: XLA has none.)
        inverse = torch.linalg.pinv(products[path, down].to("cpu"), hermitian=True)
        scaling = specs[path].scaling_of(part)
        found.setdefault(path, {})[up] = (inverse / scaling**2).to(products[path, down].device)
    return found


def _pairs(specs: Mapping[str, LayerSpec]) -> Iterable[tuple[str, str, str, FusedPart]]:
    """Path, lora_A, lora_B and part of every lora_B that is trained."""
    for path, spec in specs.items():
        for part in spec.updates:
            up = part.param("lora_B")
            if up in sharding.trained_names(spec):
                yield path, "lora_A" if spec.share_A else part.param("lora_A"), up, part


def lorafa_gradients(grads: Tree, corrections: Tree) -> dict[str, dict[str, Tensor]]:
    """Gradients as LoRA-FA corrects them: those of each lora_B times its correction; all others as they are.

    Every process has whole rows of lora_B, so there is no communication. Gradients must be synced; the norm that they
    are clipped to is that of those before the correction.

    Args:
        grads: {path: {name: gradient}}.
        corrections: From `lorafa_corrections`; {} for none.

    Returns:
        A new tree of the same structure.
    """
    corrected = {path: dict(of) for path, of in grads.items()}
    for path, of in corrected.items():
        for name, matrix in corrections.get(path, {}).items():
            if name in of:
                rows = of[name].reshape(*matrix.shape[:-2], -1, matrix.shape[-1])
                of[name] = (rows @ matrix.to(rows.dtype)).reshape(of[name].shape)
    return corrected
