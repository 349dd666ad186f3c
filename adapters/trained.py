"""What else than factors is trained? Biases of the base, modules that are trained whole, and rows of embeddings.

Source: PEFT 0.21, `utils/other.py` `_set_trainable`, `tuners/tuners_utils.py` `_mark_only_adapters_as_trainable`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

from torch import nn

from adapters import kinds, nxd, optimum_models
from adapters.optimum_models import Modules
from adapters.stack import stacked
from lora_fn import Axis, LayerSpec, LoraSpec, SpecError, TargetError, sharding, targets
from lora_fn.errors import Problems

CONTAINERS = (nn.ModuleDict, nn.ModuleList, nn.ParameterDict, nn.ParameterList)


def saved(modules: Modules, where: Mapping[str, tuple[str, str]], spec: LoraSpec) -> dict[str, tuple[str, str]]:
    """What `modules_to_save` names, with all that is inside: name -> (module, part), as in `bind.sites`.

    As in PEFT, a name means every module whose own name ends so ("norm": also "input_layernorm").

    Args:
        modules: All of a model's, by name.
        where: Its sites.
        spec: What the user asks for.

    Raises:
        TargetError: A name that no module has (with the nearest ones), or a list of modules.
    """
    found, matched = dict[str, tuple[str, str]](), set[str]()
    problems = Problems(TargetError)
    everything = holders(modules, where) if spec.modules_to_save else {}
    for name, place in everything.items():
        for above in targets.upwards(name):
            ends = [end for end in spec.modules_to_save if above.endswith(end)]
            if ends:
                matched |= set(ends)
                found[name] = place
                if isinstance(modules.get(above), CONTAINERS):
                    problems.add(above, "is a list of modules, which cannot be saved as one; name what is in it.")
    for end in spec.modules_to_save:
        if end not in matched:
            near = targets.nearest(end, list(everything))
            problems.add("modules_to_save", f"{end!r} is the end of no module's name; {near}")
    problems.raise_if_any()
    return found


def ties(modules: Modules) -> dict[str, str]:
    """Modules whose weight is another's too: name -> that of the embedding (or else the first) which has it."""
    owners: dict[int, list[str]] = {}
    for name, module in modules.items():
        weight = module._parameters.get("weight")
        if weight is not None:
            owners.setdefault(id(weight), []).append(name)
    found: dict[str, str] = {}
    for names in owners.values():
        if len(names) == 1:
            continue
        embedding = next((n for n in names if kinds.is_embedding(modules[n])), None)
        first = embedding or (None if stacked(modules[""]) else names[0])  # copies of layers have adapters of their own
        found |= {name: first for name in names if first is not None and name != first}
    return found


def with_tied(names: Iterable[str], tied: Mapping[str, str], spec: LoraSpec) -> list[str]:
    """Names, and those that share weights with them, which stay tied.

    Raises:
        TargetError: There are some, and nobody said that they are to stay tied.
    """
    found = list(dict.fromkeys(names))
    for follower, owner in tied.items():
        if follower not in found and owner not in found:
            continue
        if not spec.ensure_weight_tying:
            one, other = (follower, owner) if follower in found else (owner, follower)
            raise TargetError(
                f"{one}: shares its weight with {other}, and adapting or training one of tied layers would untie them; "
                f"leave it out, or set ensure_weight_tying."
            )
        found += [name for name in (owner, follower) if name not in found]
    return found


def check_tied(planned: Mapping[str, LayerSpec], tied: Mapping[str, str]) -> None:
    """Refuse adapters that one of tied layers cannot have from the other, whose factors are its own transposed.

    Raises:
        TargetError: Says why.
    """
    problems = Problems(TargetError)
    for follower, owner in tied.items():
        if follower not in planned or owner not in planned:
            continue
        mine, theirs = planned[follower], planned[owner]
        if (mine.rank, mine.alpha) != (theirs.rank, theirs.alpha):
            problems.add(
                follower,
                f"has rank {mine.rank} and alpha {mine.alpha:g}, and {owner}, which it is tied to, {theirs.rank} and "
                f"{theirs.alpha:g}; give both the same.",
            )
        if mine.variant != "lora" or mine.lora_bias:
            what = "lora_bias" if mine.lora_bias else f"variant {mine.variant}"
            problems.add(follower, f"is tied to {owner}, which has no parameter for {what}; leave one of them out.")
    problems.raise_if_any()


def tokens(
    modules: Modules, where: Mapping[str, tuple[str, str]], spec: LoraSpec, tied: Mapping[str, str]
) -> dict[str, tuple[int, ...]]:
    """The ids whose rows are trained, of each module; what is tied to an embedding follows it.

    Raises:
        TargetError: A name that no module has, no embedding where none is named, or tied modules with ids of their own.
    """
    found: dict[str, tuple[int, ...]] = {}
    for end, ids in spec.trainable_token_indices:
        if end:
            names = [name for name in where if name.endswith(end)]
        else:
            names = [name for name, (path, _) in where.items() if kinds.is_embedding(modules[path])]
            names = names if len(names) == 1 else [n for n in names if n.endswith(targets.INPUT_EMBEDDINGS)]
        if not names or (not end and len(names) > 1):
            raise TargetError(
                f"trainable_token_indices: {end or 'the input embedding'!r} is "
                f"{'the end of no' if not names else 'more than one'} module's name; "
                f"{targets.nearest(end or 'embed_tokens', list(where))}"
            )
        found |= dict.fromkeys(names, ids)
    for follower, owner in tied.items():
        if follower in found and found.get(owner) != found[follower]:
            raise TargetError(
                f"{follower}: shares its weight with {owner}, and so its trained tokens, which are given as "
                f"{list(found[follower])} and {list(found.get(owner, ()))}; name them for {owner} alone."
            )
        if owner in found:
            found[follower] = found[owner]
    return found


def holders(modules: Modules, where: Mapping[str, tuple[str, str]]) -> dict[str, tuple[str, str]]:
    """Whatever holds parameters of its own: sites, and then all else. Name -> (module, part)."""
    known = {path for path, _ in where.values()}
    own = [n for n, m in modules.items() if n not in known and any(p is not None for p in m._parameters.values())]
    return {**where, **{name: (name, "") for name in own}}


def plan(
    modules: Modules,
    where: Mapping[str, tuple[str, str]],
    spec: LoraSpec,
    planned: Mapping[str, LayerSpec],
    whole: Mapping[str, tuple[str, str]],
    *,
    gradients: str,
) -> dict[str, LayerSpec]:
    """The layers of which something of the base is trained: {name of the module: LayerSpec}, with their adapters.

    Of a fused layer each part then has a weight (and a bias) of its own.

    Args:
        modules: All of the model's, by name.
        where: Its sites.
        spec: What the user asks for.
        planned: The adapted layers.
        whole: From `saved`.
        gradients: As in `wrap`.

    Raises:
        TargetError: What cannot be trained, all of it at once.
    """
    if not whole and spec.bias == "none" and not spec.trainable_token_indices:
        return {}
    problems, tied = Problems(TargetError), ties(modules)
    axis, sequence_parallel = _surroundings(modules)
    wanted: dict[str, list[tuple[str, bool]]] = {}
    for name, (path, part) in holders(modules, where).items():
        adapted = path in planned and any(part == update.name for update in planned[path].updates)
        if name in whole or spec.bias == "all" or (spec.bias == "lora_only" and adapted):
            wanted.setdefault(path, []).append((part, name in whole))
    found = {}
    for path, parts in wanted.items():
        try:
            base = planned.get(path) or base_spec(modules, path, axis, sequence_parallel)
        except (SpecError, TargetError) as error:
            if any(is_whole for _, is_whole in parts) or "bias" in modules[path]._parameters:
                problems.add(path, str(error).removeprefix(f"{path}: "))
            continue
        layer = replace(base, gradients=gradients, fuse_qkv=base.fuse_qkv and not base.parts)
        names = [n for n in sharding.names(layer.base) if _is_wanted(n, parts)]
        if not names:
            continue
        if spec.bias == "all" and any(is_whole for _, is_whole in parts) and any(n.startswith("bias") for n in names):
            problems.add(
                path, "is in modules_to_save and has a bias, which PEFT's files then hold three times; leave bias out."
            )
        adapter = dict.fromkeys(n.partition(".")[0] for n in sharding.trained_names(planned.get(path, base.base)))
        try:
            found[path] = replace(layer, trained=(*adapter, *names))
        except SpecError as error:
            problems.add(path, str(error))
    rows = tokens(modules, where, spec, tied)
    for name, ids in rows.items():
        path, part = where[name]
        if name in whole or part:
            why = "is in modules_to_save too" if name in whole else "is one of several in a fused layer"
            problems.add(name, f"{why}, so that rows of it cannot be trained apart, as in PEFT; choose one.")
            continue
        own = () if tied.get(path) in rows else (sharding.TOKENS,)
        try:
            base = planned.get(path) or base_spec(modules, path, axis, sequence_parallel)
            found[path] = replace(base, gradients=gradients, tokens=ids, trained=own)
        except (SpecError, TargetError) as error:
            problems.add(path, str(error).removeprefix(f"{path}: "))
    problems.raise_if_any()
    return found


def _is_wanted(name: str, parts: list[tuple[str, bool]]) -> bool:
    base, _, ending = name.partition(".")
    return any(part == ending and (is_whole or base == "bias") for part, is_whole in parts)


def base_spec(modules: Modules, path: str, axis: Axis, sequence_parallel: bool) -> LayerSpec:
    """The spec of any module, without an adapter.

    Raises:
        TargetError: A module that we cannot train.
    """
    module = modules[path]
    if nxd.class_name(module) in kinds.SPEC_OF:
        return kinds.SPEC_OF[nxd.class_name(module)](module, **optimum_models.given(modules, path))
    return kinds.replicated(path, module, axis, sequence_parallel=sequence_parallel)


def _surroundings(modules: Modules) -> tuple[Axis, bool]:
    """The axis that a model's layers lie over, and whether some of them cut the sequence."""
    axis, cut = Axis(), False
    for path, module in kinds.adaptable(modules).items():
        try:
            spec = kinds.SPEC_OF[nxd.class_name(module)](module, **optimum_models.given(modules, path))
        except (SpecError, TargetError):
            continue  # one that nobody asked for
        if spec.axis.size > 1:
            axis, cut = spec.axis, cut or spec.sequence_dim is not None
    return axis, cut
