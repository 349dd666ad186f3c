"""What does PEFT's config hold? Its fields and defaults, for who has no PEFT, or reads a config from a file."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lora_fn import LoraSpec, SpecError, peft_format


@dataclass(kw_only=True)
class LoraConfig:
    """The fields of `peft.LoraConfig` 0.21, with its defaults. As there, they may be set later.

    Whether the values can be is checked when an adapter is made of them (see `lora_fn.LoraSpec`, which also says what
    they mean).
    """

    peft_type: str = "LORA"
    task_type: str | None = None
    base_model_name_or_path: str | None = None
    revision: str | None = None
    inference_mode: bool = False
    auto_mapping: Mapping[str, Any] | None = None
    peft_version: str | None = None
    r: int = 8
    lora_alpha: float = 8
    lora_dropout: float = 0.0
    target_modules: Any = None
    exclude_modules: Any = None
    fan_in_fan_out: bool = False
    bias: str = "none"
    use_rslora: bool = False
    modules_to_save: Any = None
    init_lora_weights: bool | str = True
    layers_to_transform: Any = None
    layers_pattern: Any = None
    rank_pattern: Mapping[str, int] | None = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] | None = field(default_factory=dict)
    megatron_config: Any = None
    megatron_core: str | None = "megatron.core"
    trainable_token_indices: Any = None
    loftq_config: Any = field(default_factory=dict)
    eva_config: Any = None
    corda_config: Any = None
    lora_ga_config: Any = None
    use_dora: bool = False
    velora_config: Any = None
    alora_invocation_tokens: Any = None
    use_qalora: bool = False
    qalora_group_size: int = 16
    monteclora_config: Any = None
    layer_replication: Any = None
    lora_bias: bool = False
    target_parameters: Any = None
    use_bdlora: Any = None
    arrow_config: Any = None
    kasa_config: Any = None
    ensure_weight_tying: bool = False

    def to_dict(self) -> dict[str, Any]:
        """The fields by name."""
        return dataclasses.asdict(self)


def check(config: Any) -> None:
    """Refuse what is no config at all.

    Raises:
        SpecError: It is none.
    """
    if isinstance(config, type) or not (isinstance(config, Mapping) or dataclasses.is_dataclass(config)):
        raise SpecError(f"peft_config: is {config!r}, expected a LoraConfig, or a mapping of its fields; give one.")


def of_mapping(values: Mapping[str, Any]) -> LoraConfig:
    """The config that an adapter_config.json holds; keys that change nothing and are not PEFT's today are left out.

    Raises:
        SpecError: A config that we cannot follow.
    """
    peft_format.from_config(values)
    known = {f.name for f in dataclasses.fields(LoraConfig)}
    return LoraConfig(**{key: value for key, value in values.items() if key in known})


def of_spec(spec: LoraSpec, like: Any) -> Any:
    """The config that means a spec, with whatever else another config says.

    Args:
        spec: A spec.
        like: A `peft.LoraConfig`, or one of ours.
    """
    values, plain = spec.to_dict(), LoraSpec().to_dict()
    names = dict(peft_format.FIELDS) | {key: key for key in peft_format.NEWER}
    told = {key: values[name] for key, name in names.items() if values[name] != plain[name] or key in ALWAYS}
    known, default = {f.name for f in dataclasses.fields(like)}, LoraConfig()
    return dataclasses.replace(like, **{key: told.get(key, getattr(default, key)) for key in names if key in known})


ALWAYS = ("r", "lora_alpha", "target_modules")  # whose defaults are not the same in a config


def taken(config: Any, *, base: str | None) -> tuple[Any, LoraSpec]:
    """A copy of a config that names its base model, and the spec that it means.

    Args:
        config: A `peft.LoraConfig`, one of ours, or a mapping.
        base: The model's name or path, for a config that names none.

    Raises:
        SpecError: A config that we cannot follow.
    """
    check(config)
    mine = of_mapping(config) if isinstance(config, Mapping) else copy.copy(config)
    mine.base_model_name_or_path = mine.base_model_name_or_path or base
    return mine, peft_format.from_config(mine)
