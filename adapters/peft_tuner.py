"""Which adapters does a model have, and which is on it? `NeuronLoraModel`: named adapters, one of them attached.

Source: PEFT 0.21, `tuners/tuners_utils.py`, `tuners/lora/model.py`; Optimum Neuron 0.4.6, `peft/tuners/lora/model.py`.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from adapters import bind, combine, files, merged, peft_config
from adapters.bind import Adapter
from adapters.bound import BoundLayer, LoraLayer, place_of
from adapters.many import MixedLayer, check_factors_only
from adapters.peft_layers import NeuronLoraLayer, base_dtype, swap
from adapters.raw import RawLayer
from adapters.stack import stacked
from lora_fn import LayerSpec, LoraSpec, SpecError, TargetError, algebra, initialize, many, sharding, variants
from lora_fn.errors import Problems

# What the attached adapter is, where it is none of the named ones: only what must be taken over is.
NONE = ""
BASE = "__base__"  # of a row without an adapter, as in PEFT


class NeuronLoraModel(nn.Module):
    """A model and its adapters, by name. An adapter is data (`bind.Adapter`); one at a time is attached to the model.

    Args:
        model: What `adapters.wrap` takes.
        config: A config, or {adapter_name: config} as PEFT has it.
        adapter_name: Of the first adapter.
        low_cpu_mem_usage: Taken and not used: of the factors, each process makes its own part alone.
        autocast_adapter_dtype: Factors in fp32, where the model is in a dtype of 16 bits; False for the model's.
        seed: Of the factors and of dropout, which every process must give alike.
        gradients, batches: As in `adapters.wrap`.

    Raises:
        SpecError: A config that we cannot follow.
        TargetError: As `adapters.wrap`. Nothing is changed then.
    """

    prefix = "lora_"
    dropout_key: Tensor

    def __init__(
        self,
        model: nn.Module,
        config: Any,
        adapter_name: str = "default",
        low_cpu_mem_usage: bool = False,
        *,
        autocast_adapter_dtype: bool = True,
        seed: int = 0,
        gradients: str = "summed",
        batches: Iterable[Any] | None = None,
    ):
        super().__init__()
        self.model = model
        self.peft_config: dict[str, Any] = {}
        self.seed, self.gradients = seed, gradients
        self.adapters: dict[str, Adapter] = {}
        self.trainable: dict[str, bool] = {}
        self.active: tuple[str, ...] = ()
        self.attached: tuple[str, ...] = ()
        self.enabled = True
        self._mixed: Adapter | None = None
        self.merged_adapters: tuple[str, ...] = ()
        self._written: tuple[str, ...] = ()
        self._kept: dict[nn.Parameter, Tensor] = {}
        self._whole: dict[nn.Parameter, Tensor] = {}
        self.register_buffer("dropout_key", torch.tensor(seed), persistent=False)
        named = isinstance(config, Mapping) and adapter_name in config
        first = config[adapter_name] if named else config
        with bind.stacked_for(model, peft_config.taken(first, base=None)[1]):
            self.adapters[NONE] = bind.make(model, None)
            self._add(adapter_name, first, autocast=autocast_adapter_dtype, batches=batches, first=True)

    # ------------------------------------------------------------------------------------------------------- adapters

    def add_adapter(
        self,
        adapter_name: str,
        config: Any,
        *,
        autocast_adapter_dtype: bool = True,
        batches: Iterable[Any] | None = None,
    ) -> None:
        """A new adapter, which is not active yet; `batches` as in `adapters.wrap`.

        Raises:
            SpecError: A config that we cannot follow.
            TargetError: The name is taken, or as `adapters.wrap`. Nothing is changed then.
        """
        self._add(adapter_name, config, autocast=autocast_adapter_dtype, batches=batches)

    def _add(
        self, name: str, config: Any, *, autocast: bool, batches: Iterable[Any] | None, first: bool = False
    ) -> None:
        if not name or name in self.adapters:
            raise TargetError(f"adapter {name!r}: is a name that is taken or empty; choose another one.")
        mine, spec = peft_config.taken(config, base=vars(self.model).get("name_or_path"))
        with self._bare():
            made = bind.make(
                self.model,
                spec,
                seed=initialize.seed_of(self.seed, name),
                gradients=self.gradients,
                dtype=self._dtype(autocast=autocast),
                batches=batches,
                layer_class=NeuronLoraLayer.of_kind,
            )
            if first:
                bind.attach(self.model, self.adapters[NONE])
        for layer in made.modules.values():
            if isinstance(layer, NeuronLoraLayer):
                layer.adapter_name = name
        self.adapters[name], self.peft_config[name] = made, mine
        self.trainable[name] = first and not mine.inference_mode
        if first:
            self.active = (name,)
            specs = [layer.spec for layer in made.modules.values()] + [layer.spec for layer in made.raw.values()]
            self.dropout_key = self.dropout_key + _first_rank(specs)
        self._settle()

    def add_weighted_adapter(
        self,
        adapters: Sequence[str],
        weights: Sequence[float],
        adapter_name: str,
        combination_type: str = "svd",
        svd_rank: int | None = None,
        svd_clamp: float | None = None,
        svd_full_matrices: bool = True,
        svd_driver: str | None = None,
        density: float | None = None,
        majority_sign_method: str = "total",
        *,
        seed: int = 0,
    ) -> None:
        """A new adapter, the weighted combination of others; it is not active yet. Every process calls it.

        Args:
            adapters: Names of the others, which stay.
            weights: Of each; a negative one takes an adapter away.
            adapter_name: Of the new one.
            combination_type: One of `lora_fn.algebra.METHODS`.
            svd_full_matrices: Taken and not used: the vectors that it is about are not kept.
            svd_rank, svd_clamp, svd_driver, density, majority_sign_method, seed: As in `lora_fn.Combination`.

        Raises:
            SpecError: Adapters or arguments that do not go together.
            TargetError: No such adapter, a name that is taken, or factors that are not finite, or not the same on all
                processes. Nothing is changed then.
        """
        self._check_names(adapters)
        if len(adapters) != len(weights) or not adapters:
            raise SpecError(f"add_weighted_adapter: found {len(weights)} weights for {list(adapters)}; give one each.")
        if not adapter_name or adapter_name in self.adapters:
            raise TargetError(f"adapter {adapter_name!r}: is a name that is taken or empty; choose another one.")
        specs = {name: self.spec(name) for name in adapters}
        algebra.check(specs, weights)
        how = algebra.Combination(
            how=combination_type,
            density=density,
            majority_sign_method=majority_sign_method,
            svd_rank=svd_rank,
            svd_clamp=svd_clamp,
            svd_driver=svd_driver,
            seed=seed,
        )
        how = combine.with_rank(how, [*specs.values()])
        for name in dict.fromkeys(adapters):
            with self.only(name):  # which brings it to where the model is
                pass
        layers = [self._own_layers(name) for name in adapters]
        planned = combine.planned([{p: layer.spec for p, layer in of.items()} for of in layers], how)
        spec = algebra.lora_spec([specs[name] for name in adapters], combine.ranks(planned))
        config = peft_config.of_spec(spec, self.peft_config[adapters[0]])
        found = {}
        for path, of_path in planned.items():
            here = [(of[path], weight) for of, weight in zip(layers, weights, strict=True) if path in of]
            given, own = [layer for layer, _ in here], [weight for _, weight in here]
            found[path] = combine.combined(given, own, how, path=path, spec=of_path)
        self._add(adapter_name, config, autocast=True, batches=None)
        with torch.no_grad():
            for path, layer in self._own_layers(adapter_name).items():
                for name, factor in found[path].items():
                    layer.parameter(name).copy_(factor)

    def _own_layers(self, name: str) -> dict[str, NeuronLoraLayer | RawLayer]:
        """The adapted layers of an adapter that hold factors of their own, by path."""
        own = {path: layer for path, layer in self.layers(name).items() if not layer.followed()}
        return {**own, **self.adapters[name].raw}

    @contextmanager
    def _bare(self) -> Iterator[None]:
        """With no adapter on the model, as `bind.make` wants it."""
        flags = [(p, p.requires_grad) for p in self.model.parameters()]
        held = bool(self.peft_config)
        if held:
            self._write(())
            self._put()
            bind.detach(self.model)
        try:
            yield
        finally:
            if held:
                bind.attach(self.model, self.adapters[NONE])
                for p, flag in flags:
                    p.requires_grad_(flag)
                self._settle()

    def _dtype(self, *, autocast: bool) -> torch.dtype:
        base = base_dtype(self.model)
        return torch.promote_types(base, torch.float32) if autocast else base

    def set_adapter(self, adapter_name: str | Sequence[str], inference_mode: bool = False) -> None:
        """Make an adapter the active one, or several, whose updates add up; their factors are trained, unless for
        inference. Merged ones are unmerged.

        Raises:
            TargetError: No such adapter, or several that cannot be active together. Nothing is changed then.
        """
        names = tuple(dict.fromkeys([adapter_name] if isinstance(adapter_name, str) else adapter_name))
        self._check_names(names)
        together = self._mixed_of(names) if len(names) > 1 else None
        self._write(())
        if len(self.attached) > 1:  # `_mixed` is what is on the model
            self._put()
        self.active, self._mixed, self.merged_adapters = names, together, ()
        self.trainable = dict.fromkeys(self.trainable, False) | dict.fromkeys(names, not inference_mode)
        self._settle()

    def _mixed_of(self, names: Sequence[str]) -> Adapter:
        """Several adapters as one, which all rows have the sum of.

        Raises:
            TargetError: They do not fit beside each other.
        """
        if self.gradients == "deferred":
            raise TargetError(
                f"adapters {list(names)}: several at once need their gradients summed in the backward; make the model "
                f"with gradients='summed', or train with adapters.ManyAdapters."
            )
        for name in names:
            for path, layer in self.layers(name).items():
                if not variants.TABLE[layer.spec.variant].adds_up:
                    raise TargetError(
                        f"{path}: updates of variant {layer.spec.variant!r} do not add up with others'; activate "
                        f"adapter {name!r} alone."
                    )
        return self._beside(names, to_train=True)

    def _beside(self, names: Sequence[str], *, to_train: bool) -> Adapter:
        for name in names:
            if any(layer.merged for layer in self.layers(name).values()):
                raise TargetError(f"adapter {name!r}: layers of it are merged, each by itself; unmerge them first.")
        with self.only(None) as model:
            return mixed({name: self.adapters[name] for name in names}, self.adapters[NONE], model, to_train=to_train)

    def _check_names(self, names: Sequence[str]) -> None:
        for name in names:
            if name not in self.peft_config:
                raise TargetError(f"adapter {name!r}: there is none of that name, only {list(self.peft_config)}.")

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter. Where it was the active one, the first that is left becomes that, as in PEFT.

        Raises:
            TargetError: No such adapter.
        """
        self._check_names([adapter_name])
        self.merged_adapters = tuple(name for name in self.merged_adapters if name != adapter_name)
        left = tuple(name for name in self.active if name != adapter_name)
        others = [name for name in self.peft_config if name != adapter_name]
        if left != self.active:
            together = self._mixed_of(left) if len(left) > 1 else None
            self._write(())
            self._put()
            self.active, self._mixed = left or tuple(others[:1]), together
            self.trainable |= {} if left else dict.fromkeys(self.active, True)
        self._settle()
        for held in (self.peft_config, self.adapters, self.trainable):
            del held[adapter_name]

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Train the factors of adapters, or do not.

        Raises:
            TargetError: No such adapter.
        """
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        self._check_names(names)
        self.trainable |= dict.fromkeys(names, requires_grad)
        self._settle()

    def set_scale(self, adapter: str, scale: float) -> None:
        """Multiply what an adapter adds, active or not; 1 is as it was made. It is not saved, as in PEFT.

        Raises:
            TargetError: No such adapter, or one of a raw parameter.
        """
        self._check_names([adapter])
        for path in self.adapters[adapter].raw:
            raise TargetError(f"{path}: is a raw parameter, which is not scaled yet; leave {adapter!r} as it is.")
        for layer in self.layers(adapter).values():
            layer.set_scale(adapter, scale)
        if adapter in self._written:
            self._write(())
            self._settle()

    @property
    def active_adapters(self) -> list[str]:
        """The names of the active adapters."""
        return list(self.active)

    @property
    def active_adapter(self) -> str | list[str]:
        """The name of the active adapter; a list where there are several, or none."""
        return self.active[0] if len(self.active) == 1 else list(self.active)

    def disable_adapter_layers(self) -> None:
        """The base model alone, until `enable_adapter_layers`."""
        self.enabled = False
        self._settle()

    def enable_adapter_layers(self) -> None:
        """The active adapter again."""
        self.enabled = True
        self._settle()

    # -------------------------------------------------------------------------------------------------- what is on it

    def _settle(self) -> None:
        """Put on the model what it should have now: an adapter or none, and adapters in its weights or none."""
        hidden = not self.enabled
        self._write(() if hidden else self.merged_adapters)
        self._put(*(() if hidden or self.merged_adapters else self.active))

    def _adapter(self, names: tuple[str, ...]) -> Adapter:
        """The one adapter that some are together: none, one by itself, or the active ones."""
        if len(names) > 1:
            assert self._mixed is not None, "several are made one when they are chosen"
            return self._mixed
        return self.adapters[names[0] if names else NONE]

    def _put(self, *names: str) -> None:
        """Attach adapters in the place of those that are on. What else is trained in the model stays trained."""
        if names != self.attached:
            before, after = self._adapter(self.attached), self._adapter(names)
            trained = {id(p) for each in (before, after) for p in parameters(each)}
            flags = [(p, p.requires_grad) for p in self.model.parameters() if id(p) not in trained]
            bind.detach(self.model)
            for p, tensor in self._whole.items():
                p.data.copy_(tensor)
            self._whole = {p: p.detach().clone() for p in self._changed(after)}
            bind.attach(self.model, after)
            self.attached = names
            for p, flag in flags:
                p.requires_grad_(flag)
        for each in sorted(self.trainable, key=lambda n: n in self.attached):  # what several train, the last one says
            for p in parameters(self.adapters[each]):
                p.requires_grad_(self.trainable[each])

    def _changed(self, adapter: Adapter) -> list[nn.Parameter]:
        """The weights of which an attached adapter leaves a part in place: they are kept, to be put back exactly."""
        found: list[nn.Parameter] = []
        for path, layer in adapter.modules.items():
            if layer.initial is not None:
                base = self.model.get_submodule(path)
                names = [n for n in sharding.names(layer.spec.base) if n.startswith("weight")]
                found += dict.fromkeys(place_of(base, layer.spec, n)[0] for n in names)
        return found

    def _write(self, names: tuple[str, ...], *, safe: bool = False) -> None:
        """Put adapters into the base's weights, in the place of those that are in them."""
        if names == self._written:
            return
        self._put()
        for p, tensor in self._kept.items():
            p.data = tensor
        self._kept, self._written = {}, ()
        for name in names if len(names) > 1 else ():
            if any(module.instead() for module in self.adapters[name].modules.values()):
                raise TargetError(
                    f"adapter {name!r}: trains parameters of the base itself, which do not add up with others'; merge "
                    f"it alone."
                )
        found: dict[str, tuple[BoundLayer, dict[str, Tensor]]] = {}
        for path in dict.fromkeys(path for name in names for path in self.layers(name)):
            here = [self.layers(name)[path] for name in names if path in self.layers(name)]
            if here[0].followed():  # what it follows has the same weight
                continue
            for layer in here:
                layer.take(self.model.get_submodule(path))
            found[path] = here[0], merged.merged(here, whole=True)
        for name in names:
            for path, module in self.adapters[name].modules.items():
                if path not in found and module.instead():
                    found[path] = module, module.instead()
        if safe and found:
            tensors = [t for _, of in found.values() for t in of.values()]
            merged.check_finite(tensors, [layer for layer, _ in found.values()], f"adapters {list(names)}")
        for path, (of, tensors_of) in found.items():
            self._kept |= swap(of, tensors_of, self.model.get_submodule(path))
        self._written = names

    def layers(self, name: str) -> dict[str, NeuronLoraLayer]:
        """The adapted layers of an adapter, by the name of the module that they stand for."""
        return {p: m for p, m in self.adapters[name].modules.items() if isinstance(m, NeuronLoraLayer)}

    @contextmanager
    def only(self, name: str | None) -> Iterator[nn.Module]:
        """The model with one adapter on it, or none, whichever is active, and with the base's own weights."""
        self._write(())
        self._put(*([] if name is None else [name]))
        try:
            yield self.model
        finally:
            self._settle()

    # ---------------------------------------------------------------------------------------------------------- files

    def save(self, name: str, directory: Any, *, as_lora: bool = False) -> None:
        """Write an adapter as a PEFT directory; see `adapters.save`."""
        with self.only(name) as model:
            files.save(model, directory, as_lora=as_lora)

    def load(self, name: str, directory: Any, *, keep_scaling: bool = False) -> None:
        """Read a PEFT directory into an adapter; see `adapters.load`.

        Args:
            keep_scaling: Keep the adapter's alpha and use_rslora where the directory has others.
        """
        with self.only(name) as model:
            spec = bind.lora_spec(model)
            files.load(model, directory)
            for layer in self.layers(name).values():
                layer.asked = None
            if keep_scaling:
                bind.rescale(model, spec)
            self.adapters[name] = replace(self.adapters[name], spec=bind.lora_spec(model))

    def state_of(self, name: str) -> dict[str, Tensor]:
        """The canonical factors of an adapter, under PEFT's names; every process calls it."""
        with self.only(name) as model:
            return files.canonical(model, f"adapter {name!r}")

    def spec(self, name: str) -> LoraSpec:
        """What an adapter's config asks for."""
        spec = self.adapters[name].spec
        assert spec is not None
        return spec

    # ---------------------------------------------------------------------------------------------------------- merge

    def merge_adapter(self, adapter_names: Sequence[str] | None = None, safe_merge: bool = False) -> None:
        """Put adapters into the base's weights, beside those that are in them. The base's own are kept in memory.

        Args:
            adapter_names: None for the active one.
            safe_merge: Refuse weights that are not finite.

        Raises:
            TargetError: No such adapter, repeated layers, a raw parameter, or (with `safe_merge`) weights that are not
                finite, on every process.
            SpecError: An adapter that cannot be merged. Nothing is changed then.
        """
        if isinstance(adapter_names, str):
            raise TypeError(f"adapter_names should be a list of names, got {adapter_names!r}.")
        names = self.active_adapters if adapter_names is None else list(adapter_names)
        self._check_names(names)
        if stacked(self.model):
            raise TargetError("merge: layers are repeated, and each has one weight; keep the adapter unmerged.")
        for name in names:
            for path in self.adapters[name].raw:
                raise TargetError(
                    f"{path}: a raw parameter is not merged in memory yet; keep adapter {name!r} unmerged."
                )
        before = self.merged_adapters
        try:
            self.merged_adapters = tuple(dict.fromkeys((*before, *names)))
            self._write(self.merged_adapters if self.enabled else (), safe=safe_merge)
        except BaseException:
            self.merged_adapters = before
            raise
        finally:
            self._settle()

    def unmerge_adapter(self) -> None:
        """Take all adapters out of the base's weights: they are what they were, bit for bit."""
        self.merged_adapters = ()
        self._settle()

    def merge_and_unload(
        self, progressbar: bool = False, safe_merge: bool = False, adapter_names: Sequence[str] | None = None
    ) -> nn.Module:
        """The base model, in its own modules, with adapters in its weights; no adapter is left.

        Args:
            progressbar: Taken and not used.
            safe_merge, adapter_names: As in `merge_adapter`.
        """
        self.enabled = True
        self.merge_adapter(adapter_names, safe_merge)
        self._kept = {}
        return self._bare_model()

    def unload(self) -> nn.Module:
        """The base model, in its own modules and with its own weights; no adapter is left."""
        self._write(())
        return self._bare_model()

    def _bare_model(self) -> nn.Module:
        self._put()
        bind.detach(self.model)
        self.peft_config, self.adapters, self.trainable = {}, {}, {}
        self.active, self._mixed, self.merged_adapters, self._written = (), None, (), ()
        return self.model

    # --------------------------------------------------------------------------------------------------------- module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's forward. In training with dropout, each call draws anew, and its backward sees the same masks.

        `adapter_names`, of each row one name or "__base__", chooses for this call, in evaluation.

        Raises:
            TargetError: As `rows`.
        """
        if kwargs.get("adapter_names") is not None:
            with self.rows(kwargs.pop("adapter_names")):
                return self.model(*args, **kwargs)
        kwargs.pop("adapter_names", None)
        self.tell(kwargs["input_ids"] if "input_ids" in kwargs else next(iter(args), None))
        if not self.training or not any(self.spec(name).dropout for name in self.attached):
            return self.model(*args, **kwargs)
        key = self.dropout_key = self.dropout_key + 1
        bind.set_dropout_key(self.model, key)
        found = self.model(*args, **kwargs)
        # What recomputes activations in the backward must find the key of its own forward, whatever came since.
        for y in pytree.tree_leaves(found):
            if isinstance(y, Tensor) and y.requires_grad:
                y.register_hook(functools.partial(_with_key, self.model, key))
        return found

    def _spec_on(self) -> LoraSpec | None:
        """What the attached adapter was asked to be; of several, the first."""
        return self.adapters[self.attached[0]].spec if self.attached else None

    @contextmanager
    def rows(self, names: Sequence[str]) -> Iterator[None]:
        """Of each row of a batch its own adapter, inside of the block, whichever is active; "__base__" for none.

        Raises:
            TargetError: No such adapter, one that cannot be beside the others, merged ones, or a model in training:
                what recomputes in a backward would not find the rows; `adapters.ManyAdapters` trains so.
        """
        if self.training or self.merged_adapters:
            what = "in training" if self.training else "merged"
            raise TargetError(
                f"adapter_names: the model is {what}, where rows cannot have adapters of their own; call "
                f"{'eval()' if self.training else 'unmerge_adapter()'}, or train with adapters.ManyAdapters."
            )
        used = [name for name in dict.fromkeys(names) if name != BASE]
        self._check_names(used)
        on = self._beside(used, to_train=False) if used and self.enabled else self.adapters[NONE]
        ids = torch.tensor([used.index(name) if name in used else many.NONE for name in names])
        for layer in on.modules.values():
            if isinstance(layer, MixedLayer):
                layer.adapter_ids = ids.to(layer.present.device)
        with self._bare():
            bind.attach(self.model, on)
            try:
                yield
            finally:
                bind.detach(self.model)

    def tell(self, ids: Tensor | None) -> None:
        """Tell an aLoRA that is on the model where its update begins, for the call or the generation that comes.

        Raises:
            TargetError: Without ids of tokens.
        """
        spec = self._spec_on()
        if spec is None or not variants.TABLE[spec.variant].gated:
            return
        if ids is None:
            raise TargetError(
                f"adapter {self.attached[0]!r}: is an aLoRA, which begins where its tokens are, and was given no "
                f"input_ids; give those."
            )
        bind.set_invocation(self.model, ids)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self._write(())
        self._put()
        super()._apply(fn, recurse)
        # Adapters that are not attached follow to other dtypes; to other devices they go when they are attached.
        for adapter in self.adapters.values():
            for p in parameters(adapter):
                moved = fn(p.data)
                if moved.device == p.device:
                    p.data = moved
        self._settle()
        return self

    def __getattr__(self, name: str) -> Any:
        """What the model has."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "model":
                raise
            return getattr(self.model, name)


def mixed(adapters: Mapping[str, Adapter], none: Adapter, model: nn.Module, *, to_train: bool) -> Adapter:
    """Several adapters as one: every row has the sum of all, until it is told otherwise (`adapter_ids`).

    Args:
        adapters: By name.
        none: What is taken over where no adapter is.
        model: Without any of them.
        to_train: As in `MixedLayer`.

    Raises:
        TargetError: They do not fit beside each other: what else than factors they have, or layers that differ in more
            than rank and alpha.
    """
    problems, base = Problems(TargetError), dict(none.modules)
    for name, adapter in adapters.items():
        check_factors_only(adapter, f"adapter {name!r}", problems)
    problems.raise_if_any()
    held = {name: {p: m for p, m in of.modules.items() if isinstance(m, LoraLayer)} for name, of in adapters.items()}
    for path in dict.fromkeys(path for of in held.values() for path in of):
        members = [of.get(path) for of in held.values()]
        try:
            base[path] = MixedLayer(model.get_submodule(path), members, to_train=to_train)
            base[path].adapter_ids = torch.arange(len(members))[None]
        except SpecError as error:
            problems.add(path, f"adapters {list(adapters)}: {str(error).removeprefix('stack: ')}")
    problems.raise_if_any()
    return Adapter(spec=None, modules=base)


def _first_rank(specs: Sequence[LayerSpec]) -> int:
    """A number that the processes which share activations have in common, and others do not: their first one's."""
    axis = max((spec.axis for spec in specs), key=lambda axis: axis.size)
    if not dist.is_initialized():
        return 0
    rank = dist.get_rank()
    return rank if axis.size == 1 else next((group[0] for group in axis.groups or () if rank in group), 0)


def _with_key(model: nn.Module, key: Tensor, gradient: Tensor) -> None:
    bind.set_dropout_key(model, key)


def parameters(adapter: Adapter) -> list[nn.Parameter]:
    """This process's parameters that an adapter trains."""
    of_raw = [p for layer in adapter.raw.values() for p in layer.parameters()]
    return [*(p for module in adapter.modules.values() for p in trained(module)), *of_raw]


def trained(module: BoundLayer) -> list[nn.Parameter]:
    """This process's parameters that are trained in one layer."""
    return list(module.trained().values())
