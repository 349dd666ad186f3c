"""What do PEFT's users call? `NeuronPeftModel` and `get_peft_model`, with the names and arguments of Optimum Neuron's.

Arguments that change nothing here are taken; those that would are refused. `docs/migration.md` lists every difference.

Source: Optimum Neuron 0.4.6, `peft/peft_model.py`, `peft/mapping_func.py`; PEFT 0.21, `peft_model.py`.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch.distributed as dist
from torch import Tensor, nn

from adapters import bind, merged, model_card, peft_config, peft_status
from adapters.peft_tuner import NeuronLoraModel
from lora_fn import FileError, SpecError, TargetError, checkpoint, collectives

SHARDS = "adapter_shards"  # the directory of Optimum Neuron's own files


class LoadResult(NamedTuple):
    """What `load_adapter` returns, as PEFT's does; nothing is ever missing or unexpected, because that is an error."""

    missing_keys: list[str]
    unexpected_keys: list[str]


class NeuronPeftModel(nn.Module):
    """A model with named adapters, of which one is active.

    Args:
        model: What `adapters.wrap` takes: parallel or not; changed in place.
        peft_config: A `peft.LoraConfig`, a `LoraConfig` of ours, or the content of an adapter_config.json.
        adapter_name: Of its first adapter.
        autocast_adapter_dtype: Factors in fp32, where the model is in a dtype of 16 bits; False for the model's.
        low_cpu_mem_usage: Taken and not used.
        seed: Of the factors and of dropout, which every process must give alike.
        gradients, batches: As in `adapters.wrap`.

    Raises:
        SpecError: A config that we cannot follow.
        TargetError: As `adapters.wrap`. Nothing is changed then.
    """

    base_model: NeuronLoraModel

    def __init__(
        self,
        model: nn.Module,
        peft_config: Any,
        adapter_name: str = "default",
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        *,
        seed: int = 0,
        gradients: str = "summed",
        batches: Iterable[Any] | None = None,
    ):
        super().__init__()
        if isinstance(model, (NeuronPeftModel, NeuronLoraModel)):
            raise TargetError("get_peft_model: the model has adapters already; call add_adapter on it.")
        options: dict[str, Any] = {"seed": seed, "gradients": gradients, "batches": batches}
        self.base_model = NeuronLoraModel(
            model, peft_config, adapter_name, autocast_adapter_dtype=autocast_adapter_dtype, **options
        )
        if any(vars(module).get("gradient_checkpointing") for module in model.modules()):  # as transformers marks them
            bind.enable_input_require_grads(model)

    @classmethod
    def from_pretrained(
        cls,
        model: nn.Module,
        model_id: str | os.PathLike[str],
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: Any = None,
        autocast_adapter_dtype: bool = True,
        ephemeral_gpu_offload: bool = False,
        low_cpu_mem_usage: bool = False,
        key_mapping: Mapping[str, str] | None = None,
        *,
        subfolder: str | None = None,
        torch_device: Any = None,
        seed: int = 0,
        gradients: str = "summed",
    ) -> NeuronPeftModel:
        """A model with an adapter from a local directory: PEFT's, ours, or Optimum Neuron's once consolidated.

        Args:
            model: As for the class.
            model_id: The directory; also one that holds `adapter_<name>`, as Optimum Neuron writes it.
            adapter_name: The name that the adapter gets.
            is_trainable: Train it; False freezes it, and puts the model into evaluation mode.
            config: In the place of the directory's.
            autocast_adapter_dtype, seed, gradients: As for the class.
            ephemeral_gpu_offload, low_cpu_mem_usage, torch_device: Taken and not used.
            key_mapping: Must be empty.
            subfolder: Of the directory.

        Raises:
            FileError: No such directory, damage, missing or unexpected tensors, other shapes; where PEFT warns.
            SpecError: A config that we cannot follow.
            TargetError: As `adapters.wrap`.
        """
        _refuse(key_mapping=(key_mapping, (None, {})))
        directory = _located(model_id, adapter_name, subfolder)
        given = _config_of(directory) if config is None else config
        kind = MODEL_TYPES.get(_task_type(given), cls) if cls is NeuronPeftModel else cls
        made = kind(model, given, adapter_name, autocast_adapter_dtype, seed=seed, gradients=gradients)
        try:
            made.base_model.load(adapter_name, directory, keep_scaling=config is not None)
        except BaseException:
            made.unload()
            raise
        made._loaded(adapter_name, is_trainable=is_trainable)
        return made

    def load_adapter(
        self,
        model_id: str | os.PathLike[str],
        adapter_name: str,
        is_trainable: bool = False,
        torch_device: Any = None,
        autocast_adapter_dtype: bool = True,
        ephemeral_gpu_offload: bool = False,
        low_cpu_mem_usage: bool = False,
        key_mapping: Mapping[str, str] | None = None,
        *,
        subfolder: str | None = None,
        ignore_mismatched_sizes: bool = False,
    ) -> LoadResult:
        """Add an adapter from a local directory, or read one into an adapter of that name. It is not made active.

        Args:
            ignore_mismatched_sizes: Must be False.

        Other args and errors as `from_pretrained`; after an error, the adapters are those from before.
        """
        _refuse(key_mapping=(key_mapping, (None, {})), ignore_mismatched_sizes=(ignore_mismatched_sizes, (False,)))
        directory = _located(model_id, adapter_name, subfolder)
        is_new = adapter_name not in self.peft_config
        if is_new:
            theirs = _config_of(directory)
            self.base_model.add_adapter(adapter_name, theirs, autocast_adapter_dtype=autocast_adapter_dtype)
        try:
            self.base_model.load(adapter_name, directory)
        except BaseException:
            if is_new:
                self.delete_adapter(adapter_name)
            raise
        self._loaded(adapter_name, is_trainable=is_trainable)
        return LoadResult([], [])

    def _loaded(self, name: str, *, is_trainable: bool) -> None:
        self.peft_config[name].inference_mode = not is_trainable
        self.set_requires_grad(name, is_trainable)
        if not is_trainable:
            self.eval()

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        safe_serialization: bool = True,
        selected_adapters: list[str] | None = None,
        save_embedding_layers: str | bool = "auto",
        is_main_process: bool = True,
        path_initial_model_for_weight_conversion: str | None = None,
        *,
        state_dict: None = None,
        push_to_hub: bool = False,
        optimizer: Any = None,
        save_function: Any = None,
    ) -> None:
        """Write adapters as PEFT does: "default" into the directory, others into one of their name in it, and a card.

        Every process calls it, the first one writes. Factors are gathered a layer at a time; the model never is.

        Args:
            save_directory: Made where it is missing.
            safe_serialization: Must be True: no pickles are written.
            selected_adapters: None for all.
            save_embedding_layers: "auto" or False; frozen base weights are never written.
            is_main_process, optimizer, save_function: Taken and not used.
            path_initial_model_for_weight_conversion: Not None: adapters that began with a part of the base ("pissa",
                "olora", ...) become plain ones for the unchanged base, as PEFT makes them. What they began with is
                known here, so that nothing is read from there.
            state_dict, push_to_hub: Must be None and False.

        Raises:
            FileError: A file in the directory's place, or as `adapters.save`.
            TargetError: No such adapter.
            SpecError: Arguments that are not supported.
        """
        _refuse(
            safe_serialization=(safe_serialization, (True,)),
            save_embedding_layers=(save_embedding_layers, ("auto", False)),
            state_dict=(state_dict, (None,)),
            push_to_hub=(push_to_hub, (False,)),
        )
        directory = Path(save_directory)
        if directory.is_file():
            raise FileError(f"{directory}: is a file, expected a directory; choose another place.")
        names = list(self.peft_config) if selected_adapters is None else list(selected_adapters)
        self.base_model._check_names(names)
        odd = [name for name in names if Path(name).name != name or name == ".."]
        if odd:
            raise FileError(f"{directory}: adapter {odd[0]!r} cannot be the name of a directory; give it another one.")
        for name in names:
            place = directory if name == "default" else directory / name
            self.base_model.save(name, place, as_lora=path_initial_model_for_weight_conversion is not None)
        self.create_or_update_model_card(directory)

    def create_or_update_model_card(self, output_dir: str | os.PathLike[str]) -> None:
        """Write README.md, or bring the head of one that is there up to date. The first process writes.

        Raises:
            FileError: A place that cannot be written.
        """
        directory, base = Path(output_dir), self.get_base_model()
        named = vars(base).get("name_or_path")
        tags = {"lora", *(["transformers"] if "config" in vars(base) else ()), *(_strings(base, "model_tags"))}
        tags |= {f"base_model:adapter:{named}"} if named else set()
        pipeline = "text-generation" if isinstance(self, NeuronPeftModelForCausalLM) else None
        try:
            if not dist.is_initialized() or dist.get_rank() == 0:
                checkpoint.check_above(directory)
                directory.mkdir(parents=True, exist_ok=True)
                model_card.write(directory, base_model=named, tags=sorted(tags), pipeline_tag=pipeline)
        finally:
            collectives.barrier()

    # ------------------------------------------------------------------------------------------------------- adapters

    @property
    def peft_config(self) -> dict[str, Any]:
        """The configs of the adapters, by name."""
        return self.base_model.peft_config

    @property
    def active_adapter(self) -> str | list[str]:
        """The name of the active adapter; [] where there is none."""
        return self.base_model.active_adapter

    @property
    def active_adapters(self) -> list[str]:
        """The name of the active adapter, in a list."""
        return self.base_model.active_adapters

    @property
    def active_peft_config(self) -> Any:
        """The config of the active adapter."""
        return self.peft_config[self.base_model.active[0]]

    @property
    def peft_type(self) -> Any:
        """The type of the active adapter: LORA."""
        return self.active_peft_config.peft_type

    @property
    def modules_to_save(self) -> set[str] | None:
        """Names of what is trained whole beside the adapters, None where nothing is."""
        return {name for each in self.peft_config.values() for name in each.modules_to_save or ()} or None

    @property
    def has_active_enabled_adapter(self) -> bool:
        """Whether an adapter is active and not disabled."""
        return self.base_model.enabled and bool(self.base_model.active)

    def add_adapter(
        self,
        adapter_name: str,
        peft_config: Any,
        low_cpu_mem_usage: bool = False,
        autocast_adapter_dtype: bool = True,
        *,
        batches: Iterable[Any] | None = None,
    ) -> None:
        """Add a new adapter, which is not made active. `low_cpu_mem_usage` is taken and not used.

        Raises:
            SpecError: A config that we cannot follow.
            TargetError: The name is taken, or as `adapters.wrap`. Nothing is changed then.
        """
        options: dict[str, Any] = {"autocast_adapter_dtype": autocast_adapter_dtype, "batches": batches}
        self.base_model.add_adapter(adapter_name, peft_config, **options)

    def set_adapter(self, adapter_name: str | Sequence[str], inference_mode: bool = False) -> None:
        """As `NeuronLoraModel.set_adapter`."""
        self.base_model.set_adapter(adapter_name, inference_mode)

    def delete_adapter(self, adapter_name: str) -> None:
        """As `NeuronLoraModel.delete_adapter`."""
        self.base_model.delete_adapter(adapter_name)

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """As `NeuronLoraModel.set_requires_grad`."""
        self.base_model.set_requires_grad(adapter_names, requires_grad)

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """The base model alone, inside of the block; also where adapters are merged."""
        before = self.base_model.enabled
        self.base_model.disable_adapter_layers()
        try:
            yield
        finally:
            if before:
                self.base_model.enable_adapter_layers()

    # ---------------------------------------------------------------------------------------------------------- merge

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """As `NeuronLoraModel.merge_adapter`."""
        self.base_model.merge_adapter(adapter_names, safe_merge)

    def unmerge_adapter(self) -> None:
        """As `NeuronLoraModel.unmerge_adapter`."""
        self.base_model.unmerge_adapter()

    def merge_and_unload(
        self, progressbar: bool = False, safe_merge: bool = False, adapter_names: list[str] | None = None
    ) -> nn.Module:
        """As `NeuronLoraModel.merge_and_unload`."""
        return self.base_model.merge_and_unload(progressbar, safe_merge, adapter_names)

    def unload(self) -> nn.Module:
        """As `NeuronLoraModel.unload`."""
        return self.base_model.unload()

    def merged_weights(self, *, to: str = "all") -> Iterator[tuple[str, Tensor | None]]:
        """As `adapters.merged_weights`, of the active adapter."""
        return merged.merged_weights(self.get_base_model(), to=to)

    # --------------------------------------------------------------------------------------------------------- status

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """How many parameters are trained, and how many there are, of the whole model (`peft_status`)."""
        return peft_status.num_parameters(self.base_model)

    def print_trainable_parameters(self) -> None:
        """Print these numbers, as PEFT does."""
        num_trainable, num = self.get_nb_trainable_parameters()
        share = 100 * num_trainable / num
        print(f"trainable params: {num_trainable:,d} || all params: {num:,d} || trainable%: {share:.4f}")

    def get_layer_status(self) -> list[peft_status.TunerLayerStatus]:
        """The status of every adapted layer (`peft_status.layer_status`)."""
        return peft_status.layer_status(self.base_model)

    def get_model_status(self) -> peft_status.TunerModelStatus:
        """The status of the model (`peft_status.model_status`)."""
        return peft_status.model_status(self.base_model)

    # --------------------------------------------------------------------------------------------------------- module

    def get_base_model(self) -> Any:
        """The model that the adapters are on."""
        return self.base_model.model

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As `NeuronLoraModel.forward`."""
        return self.base_model(*args, **kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own `generate`; of `models.load`, see `adapters.decoding`. An aLoRA begins where its tokens
        are in the prompt.

        Raises:
            TargetError: As `forward`.
        """
        if kwargs.get("adapter_names") is not None:
            with self.base_model.rows(kwargs.pop("adapter_names")):
                return self.get_base_model().generate(*args, **kwargs)
        given = [*args[:1], *(kwargs[name] for name in ("inputs", "input_ids") if name in kwargs)]
        self.base_model.tell(next((ids for ids in given if ids is not None), None))
        return self.get_base_model().generate(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        """What the model has."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_model":
                raise
            return getattr(self.base_model, name)


class NeuronPeftModelForCausalLM(NeuronPeftModel):
    """A causal language model with named adapters."""


# PEFT's task type -> the class of the model.
MODEL_TYPES: Mapping[str | None, type[NeuronPeftModel]] = {"CAUSAL_LM": NeuronPeftModelForCausalLM}


def get_peft_model(
    model: nn.Module,
    peft_config: Any,
    adapter_name: str = "default",
    mixed: bool = False,
    autocast_adapter_dtype: bool = True,
    revision: str | None = None,
    low_cpu_mem_usage: bool = False,
    *,
    seed: int = 0,
    gradients: str = "summed",
    batches: Iterable[Any] | None = None,
) -> NeuronPeftModel:
    """Adapt a model, in place, and give it PEFT's methods.

    Args:
        mixed: Must be False.
        revision, low_cpu_mem_usage: Taken and not used.
        model, peft_config, adapter_name, autocast_adapter_dtype, seed, gradients, batches: As for `NeuronPeftModel`.

    Raises:
        SpecError: A config that we cannot follow.
        TargetError: As `adapters.wrap`. Nothing is changed then.
    """
    _refuse(mixed=(mixed, (False,)))
    kind = MODEL_TYPES.get(_task_type(peft_config), NeuronPeftModel)
    options: dict[str, Any] = {"seed": seed, "gradients": gradients, "batches": batches}
    return kind(model, peft_config, adapter_name, autocast_adapter_dtype, **options)


def get_peft_model_state_dict(
    model: NeuronPeftModel, state_dict: None = None, adapter_name: str = "default"
) -> dict[str, Tensor]:
    """The canonical factors of an adapter under PEFT's names in files, on every process; all of them call it.

    Raises:
        TargetError: No such adapter.
        SpecError: A `state_dict`.
    """
    _refuse(state_dict=(state_dict, (None,)))
    model.base_model._check_names([adapter_name])
    return model.base_model.state_of(adapter_name)


def hotswap_adapter(
    model: NeuronPeftModel,
    model_name_or_path: str | os.PathLike[str],
    adapter_name: str,
    torch_device: str | None = None,
    **kwargs: Any,
) -> None:
    """Read another adapter into the place of one, which keeps its parameters: nothing is made or compiled again.

    Args:
        model: The model.
        model_name_or_path: A directory, of an adapter with the same targets and ranks; its alpha is taken.
        adapter_name: Which one it replaces.
        torch_device: Taken and not used.
        **kwargs: `subfolder`.

    Raises:
        TargetError: No such adapter.
        FileError: No such directory, or as `adapters.load`. Nothing is changed then.
    """
    model.base_model._check_names([adapter_name])
    model.base_model.load(adapter_name, _located(model_name_or_path, adapter_name, kwargs.get("subfolder")))


def get_original_merged_weights_for_vllm(model: NeuronPeftModel) -> dict[str, Tensor]:
    """All of `adapters.merged_weights` at once, on every process; stream them where memory is short."""
    return {name: t for name, t in model.merged_weights() if t is not None}


def _config_of(directory: Path) -> peft_config.LoraConfig:
    """The config of an adapter on disk; one that began with "eva" needs no data any more, as for `files.read_spec`."""
    config = peft_config.of_mapping(checkpoint.open_adapter(directory)[0])
    if config.init_lora_weights == "eva":
        config.init_lora_weights, config.eva_config = True, None
    return config


def _task_type(config: Any) -> str | None:
    peft_config.check(config)
    found = config.get("task_type") if isinstance(config, Mapping) else config.task_type
    return None if found is None else str(getattr(found, "value", found))


def _strings(module: nn.Module, name: str) -> list[str]:
    found = vars(module).get(name)
    return [each for each in found if isinstance(each, str)] if isinstance(found, (list, tuple)) else []


def _refuse(**given: tuple[Any, Collection[Any]]) -> None:
    """Refuse arguments that have another value than those that change nothing.

    Raises:
        SpecError: Names them.
    """
    wrong = [(name, value, known) for name, (value, known) in given.items() if value not in known]
    if wrong:
        name, value, known = wrong[0]
        expected = " or ".join(map(repr, known))
        raise SpecError(f"{name}: is {value!r}, which is not supported; expected {expected}, leave it out.")


def _located(model_id: str | os.PathLike[str], adapter_name: str, subfolder: str | None) -> Path:
    """The directory of an adapter, in PEFT's layout or in Optimum Neuron's.

    Raises:
        FileError: There is none.
    """
    directory = Path(model_id) / (subfolder or "")
    if not directory.is_dir():
        raise FileError(
            f"{directory}: no such directory, and nothing is fetched from a hub; download the adapter, and give its "
            f"directory."
        )
    if not (directory / checkpoint.CONFIG).is_file():
        theirs = [directory / f"adapter_{name}" for name in (adapter_name, "default")]
        directory = next((place for place in theirs if place.is_dir()), directory)
    if not (directory / checkpoint.WEIGHTS).is_file() and (directory / SHARDS).is_dir():
        raise FileError(
            f"{directory}: holds Optimum Neuron's {SHARDS}; make one file of them first: lora-fn consolidate "
            f"{directory} OUTPUT --allow-pickle."
        )
    return directory
