"""What are things called in PEFT's files? Names of tensors, and the keys of adapter_config.json.

Source: PEFT 0.21, `utils/save_and_load.py`, `tuners/lora/config.py`, `tuners/lora/layer.py`.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from lora_fn import sharding, targets
from lora_fn.errors import FileError, Problems, SpecError
from lora_fn.layer_spec import LayerSpec
from lora_fn.once import SPECS
from lora_fn.spec import VARIANTS, LoraSpec

PREFIX = "base_model.model."

# PEFT's key -> the field of LoraSpec that means the same.
FIELDS: Mapping[str, str] = {
    "r": "rank",
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
    "use_rslora": "use_rslora",
    "lora_bias": "lora_bias",
    "init_lora_weights": "init_lora_weights",
    "target_modules": "target_modules",
    "exclude_modules": "exclude_modules",
    "layers_to_transform": "layers_to_transform",
    "layers_pattern": "layers_pattern",
    "rank_pattern": "rank_pattern",
    "alpha_pattern": "alpha_pattern",
    "task_type": "task_type",
    "base_model_name_or_path": "base_model_name_or_path",
}

# PEFT's newer keys, which mean the field of the same name, and are written where they are not at their default, so that
# an older PEFT reads what does not need them.
NEWER = (
    *("loftq_config", "eva_config", "corda_config", "lora_ga_config"),
    *("use_dora", "use_qalora", "qalora_group_size", "use_bdlora", "alora_invocation_tokens"),
    *("kasa_config", "target_parameters", "modules_to_save", "trainable_token_indices"),
    *("bias", "layer_replication", "ensure_weight_tying"),
)

# PEFT's other keys that would change numbers -> why we do not take them.
REFUSED: Mapping[str, str] = {
    "arrow_config": "routes each token through several loaded adapters, and a model holds one here",
    "monteclora_config": "draws its samples from torch's global generator, which is not the same at every size of TP",
    "velora_config": "takes lora_A's gradient from inputs compressed by an average that its forward keeps, "
    "which is no function of a step's arguments",
    "megatron_config": "is for Megatron's layers, which are not among those that we know",
}

# Keys that change nothing: how a file came to be, or facts that we read from the module itself.
INERT = (
    "auto_mapping",
    "fan_in_fan_out",
    "inference_mode",
    "megatron_core",
    "peft_version",
    "revision",
    "runtime_config",
)

# Part of a fused layer -> the module that it is in Hugging Face's models, beside the fused one.
PART_MODULES: Mapping[str, str] = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "gate": "gate_proj", "up": "up_proj"}

# kind -> parameter -> suffix of the tensor's name.
_LINEAR = {"lora_A": "lora_A.weight", "lora_B": "lora_B.weight", "lora_B_bias": "lora_B.bias"}
_LINEAR |= {"lora_magnitude_vector": "lora_magnitude_vector", "lora_diag": "lora_diag"}
SUFFIXES: Mapping[str, Mapping[str, str]] = {
    "linear": _LINEAR,
    "column": _LINEAR,
    "qkv": _LINEAR,
    "row": _LINEAR,
    "embedding": {
        "lora_A": "lora_embedding_A",
        "lora_B": "lora_embedding_B",
        "lora_magnitude_vector": "lora_magnitude_vector",
    },
    "conv2d": _LINEAR,
    "experts": _LINEAR,
}

# The module, in one that computes by itself, that holds the adapters of its raw parameters.
RAW = "lora"

# The module that holds stacked experts, each parameter of them a module, in neuronx-distributed's models -> that whose
# raw parameters those are in Hugging Face's.
STACKED: Mapping[str, str] = {"expert_mlps.mlp_op": "experts"}

# The first PEFT that reads a stacked parameter as [experts, out, in]; to those before, all are [experts, in, out].
STACKED_SINCE = (0, 19, 0)

# kind -> parameter -> how its canonical dimensions lie in a file: [experts * r, in] and [out, r * experts], the expert
# being the outermost of the one and the innermost of the other.
_STORED: Mapping[str, Mapping[str, tuple[tuple[int, ...], ...]]] = {
    "experts": {"lora_A": ((0, 1), (2,)), "lora_B": ((1,), (2, 0))},
}


# What PEFT puts between the name of a module and those of the parameters that it adapts, or replaces rows of.
BASE, TOKENS = "base_layer", "token_adapter."

_DEFAULT = LoraSpec().to_dict()


def from_config(config: Any) -> LoraSpec:
    """The spec that a PEFT config means.

    Args:
        config: A mapping (adapter_config.json) or a `peft.LoraConfig`.

    Raises:
        SpecError: Values that cannot be, keys that we do not know or features that we do not have, set to something
            that would change numbers; all of them at once.
    """
    values: dict[str, Any] = dict(config) if isinstance(config, Mapping) else dict(dataclasses.asdict(config))
    problems = Problems(SpecError)
    for key, value in values.items():
        if key == "peft_type":
            plain = getattr(value, "value", value)
            if plain != "LORA":
                problems.add(f"adapter config {key!r}", f"is {plain!r}, which is not supported; expected 'LORA'.")
        elif key in REFUSED:
            if _changes_numbers(value):
                problems.add(f"adapter config {key!r}", f"is {value!r}, which is not supported: it {REFUSED[key]}.")
        elif key not in (*FIELDS, *NEWER, *INERT) and _changes_numbers(value):
            problems.add(f"adapter config {key!r}", f"is unknown here and set to {value!r}; expected no such key.")
    for key in ("r", "lora_alpha", "lora_dropout", "use_rslora", "lora_bias", "init_lora_weights"):
        if key in values and values[key] is None:
            problems.add(f"adapter config {key!r}", "is null, expected a value; leave the key out for PEFT's default.")
    problems.raise_if_any()
    taken = {field: values[key] for key, field in FIELDS.items() if values.get(key) is not None}
    for field in ("target_modules", "exclude_modules", "layers_pattern", "layers_to_transform"):
        if field in taken:
            taken[field] = _tuple(taken[field], text=field in ("target_modules", "exclude_modules"))
    taken |= {key: values[key] for key in NEWER if _changes_numbers(values.get(key))}
    # A variant with options is there where they are, be they none.
    taken |= {key: values[key] for key in VARIANTS if isinstance(values.get(key), Mapping)}
    for field in ("layers_pattern", "layers_to_transform"):  # to PEFT, empty means any
        if taken.get(field) == ():
            del taken[field]
    return LoraSpec(**{"target_modules": None} | taken)


def to_config(
    spec: LoraSpec, adapted: Sequence[str], names: Sequence[str], *, fan_in_fan_out: bool = False
) -> dict[str, Any]:
    """The content of adapter_config.json, without keys that an older PEFT does not know: they are at their defaults.

    Args:
        spec: What the user asked for.
        adapted: Names of the adapted layers. "all-linear", and None, are written as the names that it came to.
        names: Names of all layers of the model that could have been.
        fan_in_fan_out: Whether the adapted weights are stored [in, out].
    """
    taken = {key: value for key, value in spec.to_dict().items() if key in FIELDS.values()}
    if spec.target_modules in (None, "all-linear"):
        taken |= {"target_modules": shortest(adapted, names), "exclude_modules": None}
    taken["exclude_modules"] = taken["exclude_modules"] or None
    known = {key: taken[field] for key, field in FIELDS.items()}
    newer = {key: value for key, value in spec.to_dict().items() if key in NEWER and value != _DEFAULT[key]}
    fixed = {"peft_type": "LORA", "bias": "none", "modules_to_save": None, "inference_mode": True}
    layout = {"peft_version": ".".join(map(str, STACKED_SINCE))} if spec.target_parameters else {}
    return known | fixed | newer | layout | {"fan_in_fan_out": fan_in_fan_out}


def ids_of(path: str, spec: LoraSpec) -> tuple[int, ...]:
    """The tokens of a module whose embeddings are trained; of the input embedding where no module is named."""
    return next((ids for name, ids in spec.trainable_token_indices if path.endswith(name)), ())


def shortest(adapted: Sequence[str], names: Sequence[str]) -> list[str]:
    """The last parts of the adapted names where those select exactly them, else the whole names."""
    last = sorted({name.rpartition(".")[2] for name in adapted})
    selected = targets.select(names, LoraSpec(target_modules=tuple(last)))
    return last if set(selected) == set(adapted) else list(adapted)


def part_path(path: str, part: str) -> str:
    """The name in Hugging Face's models of one part of a fused layer; of a layer that is not fused, its own.

    Example:
        >>> part_path("layers.0.self_attn.qkv_proj", "q"), part_path("lm_head", "")
        ('layers.0.self_attn.q_proj', 'lm_head')
    """
    if not part:
        return path
    parent, dot, _ = path.rpartition(".")
    return parent + dot + PART_MODULES.get(part, part)


def raw_path(name: str) -> str:
    """Where the adapter of a raw parameter is.

    Example:
        >>> raw_path("layers.0.experts.down_proj")
        'layers.0.experts.lora.down_proj'
    """
    owner, _, own = name.rpartition(".")
    return f"{owner}.{RAW}.{own}"


def owner_of(path: str, spec: LayerSpec) -> str:
    """The name in Hugging Face's models of the module that a raw parameter is of."""
    end = f".{RAW}.{spec.raw[0]}"
    return path.removesuffix(end) if path.endswith(end) else stacked_name(path).rpartition(".")[0]


def stacked_name(path: str) -> str:
    """The name in Hugging Face's models of the parameter that a module of stacked experts is; "" where it is not known.

    Example:
        >>> stacked_name("layers.0.mlp.expert_mlps.mlp_op.down_proj")
        'layers.0.mlp.experts.down_proj'
    """
    owner, _, own = path.rpartition(".")
    end = next((end for end in STACKED if f".{owner}".endswith(f".{end}")), None)
    return f"{owner.removesuffix(end)}{STACKED[end]}.{own}" if end else ""


def adapted_paths(path: str, spec: LayerSpec) -> dict[str, str]:
    """Part -> name in Hugging Face's models, of what is adapted in one layer ("" where it is not fused)."""
    if spec.raw:
        return {"": f"{owner_of(path, spec)}.{spec.raw[0]}"}
    return {part.name: part_path(path, part.name) for part in spec.updates}


@functools.lru_cache(SPECS)
def tensor_names(path: str, spec: LayerSpec) -> Mapping[str, str]:
    """Name on disk -> parameter, of what an adapter's file holds of one layer.

    A shared lora_A stands under the name of every part.

    Example:
        >>> dict(tensor_names("q_proj", LayerSpec(kind="linear", in_features=2, out_features=2, rank=1)))
        {'base_model.model.q_proj.lora_A.weight': 'lora_A', 'base_model.model.q_proj.lora_B.weight': 'lora_B'}

    Raises:
        SpecError: A kind that PEFT has no such file for.
    """
    other_kind = spec.kind not in SUFFIXES and (spec.kind != "replicated" or spec.updates)
    if other_kind or (spec.kind == "experts" and not spec.raw):
        raise SpecError(
            f"{path}: PEFT's files hold no adapter of a module of {spec.kind}; name it in target_parameters as Hugging "
            f"Face's model does, or keep its factors as tensors (adapters.flat(adapters.factors(model)))."
        )
    names, updates, stored = {}, spec.updates, sharding.stored_names(spec)
    for base in dict.fromkeys(name.partition(".")[0] for name in stored if name.startswith("lora_")):
        for part in updates:
            nested = owner_of(path, spec) + ".base_layer" * (len(spec.raw) - 1) if spec.raw else None
            key = f"{PREFIX}{nested or part_path(path, part.name)}.{SUFFIXES[spec.kind][base]}"
            names[key] = base if base == "lora_A" and spec.share_A else part.param(base)
    adapted = {part.name for part in updates}
    for name in stored:
        if not name.startswith("lora_"):
            base, _, ending = name.partition(".")
            within = f"{BASE}." if ending in adapted else TOKENS if name == sharding.TOKENS else ""
            names[f"{PREFIX}{part_path(path, ending)}.{within}{base}"] = name
    return MappingProxyType(names)


def stored_shape(spec: LayerSpec, name: str, shape: Sequence[int]) -> tuple[int, ...]:
    """The shape in a file of a tensor of `shape`, canonical or local."""
    groups = _STORED.get(spec.kind, {}).get(name)
    return tuple(shape) if groups is None else tuple(math.prod(shape[d] for d in dims) for dims in groups)


def stored_dim(spec: LayerSpec, name: str, dim: int) -> int:
    """The dimension in a file of a canonical one that lies alone in it."""
    groups = _STORED.get(spec.kind, {}).get(name)
    return dim if groups is None else groups.index((dim,))


def to_stored(tensor: Tensor, spec: LayerSpec, name: str) -> Tensor:
    """A tensor, canonical or local, as it lies in a file."""
    groups = _STORED.get(spec.kind, {}).get(name)
    if groups is None:
        return tensor
    order = [d for dims in groups for d in dims]
    return tensor.permute(order).reshape(stored_shape(spec, name, tensor.shape))


def from_stored(tensor: Tensor, spec: LayerSpec, name: str) -> Tensor:
    """The inverse of `to_stored`."""
    groups = _STORED.get(spec.kind, {}).get(name)
    if groups is None:
        return tensor
    sizes = {0: spec.num_experts or 0, 2 if name == "lora_B" else 1: spec.rank}
    order = [d for dims in groups for d in dims]
    apart = [sizes.get(d, tensor.shape[place]) for place, dims in enumerate(groups) for d in dims]
    return tensor.reshape(apart).permute([order.index(d) for d in range(len(order))]).contiguous()


def shapes_on_disk(specs: Mapping[str, LayerSpec]) -> dict[str, tuple[int, ...]]:
    """Name on disk -> shape there, of all tensors of all layers."""
    found: dict[str, tuple[int, ...]] = {}
    for path, spec in specs.items():
        found |= _shapes(path, spec)
    return found


@functools.lru_cache(SPECS)
def _shapes(path: str, spec: LayerSpec) -> Mapping[str, tuple[int, ...]]:
    return {
        key: stored_shape(spec, name, sharding.canonical_shape(spec, name))
        for key, name in tensor_names(path, spec).items()
    }


def to_state_dict(tree: Mapping[str, Mapping[str, Tensor]], specs: Mapping[str, LayerSpec]) -> dict[str, Tensor]:
    """Canonical tensors {path: {name: tensor}} under PEFT's names."""
    state: dict[str, Tensor] = {}
    for path in tree:
        taken: set[str] = set()
        for key, name in tensor_names(path, specs[path]).items():
            if name not in tree[path]:  # what is stored and not trained has no moments
                continue
            p = to_stored(tree[path][name], specs[path], name).contiguous()
            state[key] = p.clone() if name in taken else p  # files hold no tensor twice
            taken.add(name)
    return state


def from_state_dict(tensors: Mapping[str, Tensor], specs: Mapping[str, LayerSpec]) -> dict[str, dict[str, Tensor]]:
    """Canonical factors {path: {name: tensor}}, out of tensors under PEFT's names: the inverse of `to_state_dict`.

    Raises:
        FileError: A lora_A that is to be shared by parts and differs between them.
    """
    tree: dict[str, dict[str, Tensor]] = {}
    for path, spec in specs.items():
        of = tree.setdefault(path, {})
        for key, name in tensor_names(path, spec).items():
            if key not in tensors:
                continue
            found = from_stored(tensors[key], spec, name)
            if not torch.equal(of.setdefault(name, found), found):
                raise FileError(f"{key!r}: differs from that of the parts that it is shared with; leave share_A out.")
    return tree


def base_weight_names(specs: Mapping[str, LayerSpec]) -> dict[str, str]:
    """Name on disk -> path, of the frozen base weights that PEFT adds for adapted embeddings and output embeddings."""
    return {
        f"{PREFIX}{path}.base_layer.weight": path
        for path, spec in specs.items()
        if spec.updates and (spec.kind == "embedding" or path.rpartition(".")[2] in targets.OUTPUT_EMBEDDINGS)
    }


def check_state_dict(shapes: Mapping[str, tuple[int, ...]], specs: Mapping[str, LayerSpec], where: str) -> None:
    """Hold the tensors of an adapter file against the layers of a model.

    Args:
        shapes: Name on disk -> shape.
        specs: {path: LayerSpec} of every adapted layer.
        where: The file, for the message.

    Raises:
        FileError: Missing and unexpected tensors, and other shapes; all of them at once.
    """
    expected = shapes_on_disk(specs)
    problems = Problems(FileError)
    extra = {key: sharding.canonical_shape(specs[path], "weight") for key, path in base_weight_names(specs).items()}
    expected |= {key: shape for key, shape in extra.items() if key in shapes}
    if shapes == expected:
        return
    for key in sorted(set(expected) - set(shapes)):
        problems.add(
            where, f"tensor {key!r} is missing, expected with shape {list(expected[key])}; use the adapter's own file."
        )
    for key in sorted(set(shapes) - set(expected)):
        problems.add(where, f"tensor {key!r} belongs to no adapted layer of this model; use the model it was made for.")
    for key in sorted(set(shapes) & set(expected)):
        if tuple(shapes[key]) != expected[key]:
            problems.add(where, f"tensor {key!r} has shape {list(shapes[key])}, expected {list(expected[key])}.")
    problems.raise_if_any()


def check_layout(config: Mapping[str, Any], specs: Mapping[str, LayerSpec], where: str) -> None:
    """Refuse the factors of stacked parameters in the layout of an older PEFT: of square ones, no shape would tell.

    Args:
        config: adapter_config.json.
        specs: {path: LayerSpec} of every adapted layer.
        where: The file, for the message.

    Raises:
        FileError: It was written by a PEFT before `STACKED_SINCE`, and has adapters of such parameters.
    """
    stacked = [path for path, spec in specs.items() if spec.kind == "experts" and spec.raw and not spec.fan_in_fan_out]
    told = config.get("peft_version")
    version = re.match(r"(\d+)\.(\d+)", told) if isinstance(told, str) else None
    if stacked and (version is None or (int(version[1]), int(version[2])) < STACKED_SINCE[:2]):
        raise FileError(
            f"{where}: 'peft_version' is {told!r}, expected 0.19 or newer, as PEFT took {stacked[0]} and other stacked "
            f"parameters for transposed before; make each expert's lora_A the transpose of its lora_B, and the reverse."
        )


def _changes_numbers(value: Any) -> bool:
    return value not in (None, False, 0, "", [], {}, ())


def _tuple(value: Any, *, text: bool) -> Any:
    if isinstance(value, str):
        return value if text else (value,) if value else ()
    if isinstance(value, (set, frozenset)):
        return tuple(sorted(value))
    if isinstance(value, int):
        return (value,)
    return tuple(value) if isinstance(value, list) else value
