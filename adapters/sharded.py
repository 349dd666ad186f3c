"""How does an adapter get from one file into many, and back? And a checkpoint to another mesh?

Directory to directory, with no device, no processes and no model: `shard` cuts a PEFT directory, `consolidate` joins
one again, `reshard` cuts a checkpoint anew. All of them work layer by layer: what is read is checked and hashed on the
way, and what is written stands beside its place until all of it was found right.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adapters import bind, foreign, models
from adapters.stack import stack
from lora_fn import Axis, FileError, LayerSpec, SpecError, checkpoint, peft_format, sharding
from lora_fn import manifest as manifests
from lora_fn.checkpoint import TensorFiles
from lora_fn.errors import Problems
from lora_fn.manifest import FACTOR, Manifest, file_name
from lora_fn.manifest import NAME as MANIFEST


def is_sharded(directory: Path) -> bool:
    """Whether a directory is a sharded checkpoint of ours, whole or not."""
    return (directory / MANIFEST).exists() or (directory / file_name(0, 0)).exists()


def shard(adapter: Path, output: Path, *, tp: int, pp: int = 1, model: Path | None = None, quiet: bool = False) -> int:
    """Cut the adapter of a PEFT directory for a mesh.

    Args:
        adapter: The PEFT directory.
        output: A directory that does not exist yet.
        tp: Processes along the axis.
        pp: Pipeline stages.
        model: Directory of the model, of which config.json is read; None for the one that the adapter names.
        quiet: No progress bar.

    Returns:
        The number of layers.

    Raises:
        FileError: A damaged or missing file, tensors that are not those of the model's layers or not finite, an output
            that exists. Nothing is written then.
        SpecError: Sizes that the mesh does not divide.
    """
    _check_output(output, adapter)
    config, files = checkpoint.open_adapter(adapter)
    spec = peft_format.from_config(config)
    if tp < 1:
        raise SpecError(f"--tp: is {tp}, expected at least 1.")
    model = model or _model_of(spec.base_model_name_or_path, adapter)
    outline = models.outline(model, axis=Axis(size=tp))
    stack(outline, spec.layer_replication)
    specs = bind.plan(outline, spec)
    num_layers = checkpoint.read_json(model / "config.json").get("num_hidden_layers")
    num_layers = sum(end - start for start, end in spec.layer_replication) or num_layers
    stages = manifests.stages(specs, pp, num_layers=num_layers)
    peft_format.check_layout(config, specs, str(adapter))
    peft_format.check_state_dict(files.shapes, specs, str(adapter / checkpoint.WEIGHTS))
    _check_base_weights(files, specs, adapter, model)
    manifest = Manifest(config=config, specs=specs, tp=tp, stages=stages, num_layers=num_layers)
    names = {path: peft_format.tensor_names(path, spec) for path, spec in specs.items()}
    found: dict[str, Any] = {
        key: getattr(torch, checkpoint.DTYPES[files.dtypes[key]][0] or "", None) for of in names.values() for key in of
    }
    _check_dtypes(found, adapter)
    dtypes = {path: {name: found[key] for key, name in of.items()} for path, of in names.items()}
    with (
        _written(output) as beside,
        manifests.writing(beside, manifest, lambda kind, path, name: dtypes[path][name]) as put,
        _bar("shard", len(specs), quiet=quiet) as done,
    ):
        for path in sorted(specs):
            named = {key: files.read(key) for key in names[path]}
            checkpoint.check_finite(adapter, named)
            put(FACTOR, path, peft_format.from_state_dict(named, {path: specs[path]})[path])
            done()
    return len(specs)


def consolidate(
    source: Path,
    output: Path,
    *,
    model: Path | None = None,
    allow_pickle: bool = False,
    allow_drift: bool = False,
    quiet: bool = False,
) -> int:
    """Join a sharded adapter, or the factors of a training checkpoint, to a PEFT directory.

    Args:
        source: Ours, Optimum Neuron's or neuronx-distributed's; what it is, is seen from its files.
        output: A directory that does not exist yet.
        model: Directory of the model, of which config.json is read; only neuronx-distributed's files want it.
        allow_pickle: Unpickle files of the others (tensors and plain values only).
        allow_drift: Take the first process's copy where those of the others differ, in files of the others.
        quiet: No progress bar.

    Returns:
        The number of layers.

    Raises:
        FileError: A damaged, missing or superfluous file, copies that differ, numbers that are not finite, an output
            that exists. Nothing is written then.
    """
    _check_output(output, source)
    if (source / checkpoint.WEIGHTS).is_file():
        raise FileError(f"{source}: holds {checkpoint.WEIGHTS}, and is a PEFT directory already; use it as it is.")
    if is_sharded(source):
        with manifests.opened(source) as stored:
            specs, config = stored.manifest.specs, stored.manifest.config
            dtypes = {path: stored.dtypes(FACTOR, path) for path in specs}
            _join(output, config, specs, dtypes, stored.layers(FACTOR), stored.finish, quiet=quiet)
    else:
        theirs = foreign.open_any(source, allow_pickle=allow_pickle, allow_drift=allow_drift, model=model)
        specs = theirs.specs
        adapted = [name for path, spec in specs.items() for name in peft_format.adapted_paths(path, spec).values()]
        config = peft_format.to_config(theirs.spec, adapted, adapted)
        dtypes = {path: theirs.dtypes(path) for path in specs}
        _check_dtypes({f"{path}.{name}": dtype for path, of in dtypes.items() for name, dtype in of.items()}, source)
        layers = ((path, manifests.join(theirs.locals(path), spec)) for path, spec in specs.items())
        _join(output, config, specs, dtypes, layers, lambda: None, quiet=quiet)
    return len(specs)


def _join(
    output: Path,
    config: Mapping[str, Any],
    specs: Mapping[str, LayerSpec],
    dtypes: Mapping[str, Mapping[str, torch.dtype]],
    layers: Iterable[tuple[str, Mapping[str, Tensor]]],
    finish: Callable[[], object],
    *,
    quiet: bool,
) -> None:
    """Write a PEFT directory, layer by layer.

    Args:
        output: Its place.
        config: Its adapter_config.json.
        specs: {path: LayerSpec}.
        dtypes: {path: {parameter: dtype}}.
        layers: Path and canonical factors of every layer.
        finish: Called before the output takes its place; raises where what was read was not right.
        quiet: No progress bar.
    """
    shapes = peft_format.shapes_on_disk(specs)
    plan = {
        key: (dtypes[path][name], shapes[key])
        for path, spec in specs.items()
        for key, name in peft_format.tensor_names(path, spec).items()
    }
    with (
        _written(output) as beside,
        checkpoint.writing_adapter(beside, config, plan) as put,
        _bar("consolidate", len(specs), quiet=quiet) as done,
    ):
        for path, params in layers:
            named = peft_format.to_state_dict({path: params}, specs)
            try:
                checkpoint.check_finite(output, named)
            except FileError:
                finish()  # damage is the better explanation
                raise
            for key, t in named.items():
                put(key, t)
            done()
        finish()


def reshard(
    source: Path,
    output: Path,
    *,
    to_tp: int,
    from_tp: int | None = None,
    to_pp: int | None = None,
    quiet: bool = False,
) -> int:
    """Cut a sharded checkpoint of ours for another mesh: factors, and the moments and the step of a run.

    Args:
        source: A sharded adapter, or a training checkpoint.
        output: A directory that does not exist yet.
        to_tp: Processes along the axis.
        from_tp: How many they were, to be checked; None for as many as the manifest says.
        to_pp: Pipeline stages; None for as many as there are.
        quiet: No progress bar.

    Returns:
        The number of layers.

    Raises:
        FileError: A damaged, missing or superfluous file, another `from_tp`, an output that exists. Nothing is written
            then.
        SpecError: Sizes that the mesh does not divide.
    """
    _check_output(output, source)
    with manifests.opened(source) as stored:
        before = stored.manifest
        if from_tp not in (None, before.tp):
            raise FileError(f"{source}: is of tp {before.tp}, --from-tp says {from_tp}; correct one of them.")
        specs = _resized(before.specs, to_tp, before=before.tp)
        stages = manifests.stages(specs, to_pp or before.pp, num_layers=before.num_layers)
        manifest = replace(before, specs=specs, tp=to_tp, stages=stages, files={})
        with (
            _written(output) as beside,
            manifests.writing(beside, manifest, lambda kind, path, name: stored.dtypes(kind, path)[name]) as put,
            _bar("reshard", len(specs) * len(before.kinds), quiet=quiet) as done,
        ):
            for kind in stored.kinds():
                for path, params in stored.layers(kind):
                    put(kind, path, params)
                    done()
            stored.finish()
    return len(specs)


def inspect(directory: Path) -> tuple[str, list[list[Any]]]:
    """What is in a sharded checkpoint of ours; all of it is read and verified.

    Returns:
        A title, and the rows of a table whose first row is its head.

    Raises:
        FileError: A damaged, missing or superfluous file.
    """
    head = ["layer", "kind", "parameter", "shape", "shape here", "placement", "stage", "norm"]
    rows: list[list[Any]] = []
    num = 0
    with manifests.opened(directory) as stored:
        of = stored.manifest
        stage_of = {path: number for number, stage in enumerate(of.stages) for path in stage}
        for path, params in stored.layers(FACTOR):
            spec = of.specs[path]
            for name, t in params.items():
                here, placement = list(sharding.local_shape(spec, name)), sharding.rules(spec)[name].placement
                norm = f"{t.float().norm():.4g}"
                rows.append([path, spec.kind, name, list(t.shape), here, placement, stage_of[path], norm])
                num += t.numel()
    what = "a sharded adapter" if of.step is None else f"a training checkpoint, step {of.step}"
    rows.sort(key=lambda row: list(of.specs).index(row[0]))
    return f"{directory}: {what}, tp {of.tp}, pp {of.pp}, {len(of.specs)} layers, {num:,} parameters", [head, *rows]


def _check_output(output: Path, source: Path) -> None:
    """Refuse an output that is there, or that would become a part of what is read.

    Raises:
        FileError: It is.
    """
    if output.exists() or output.is_symlink():
        raise FileError(f"{output}: exists; choose another output.")
    if source.resolve() in output.resolve().parents:
        raise FileError(f"{output}: lies in {source}, which is read; choose a place outside.")
    checkpoint.check_above(output)


def _model_of(named: str | None, adapter: Path) -> Path:
    if named is None or not Path(named).is_dir():
        told = "names no model" if named is None else f"names {named!r} as its model, which is no directory here"
        raise FileError(f"{adapter}: {told}; give one with --model.")
    return Path(named)


def _check_base_weights(files: TensorFiles, specs: Mapping[str, LayerSpec], adapter: Path, model: Path) -> None:
    """Hold base weights, which PEFT saves beside adapted embeddings, against the model's; they are not taken along.

    Raises:
        FileError: Another weight, or a model whose weights are not there to see.
    """
    extra = {key: path for key, path in peft_format.base_weight_names(specs).items() if key in files.shapes}
    if not extra:
        return
    base = checkpoint.open_model(model)
    for key, path in extra.items():
        name = f"{path}.weight"
        if name not in base.shapes:  # tied
            name = next((f"{p}.weight" for p, spec in specs.items() if spec.kind == "embedding"), name)
        weight = base.read(name) if name in base.shapes else None
        if weight is None or not torch.equal(files.read(key).to(weight.dtype), weight):
            raise FileError(f"{adapter}: {key!r} is not {name!r} of {model}; use the model it was made for.")


def _resized(specs: Mapping[str, LayerSpec], size: int, *, before: int) -> dict[str, LayerSpec]:
    problems, found = Problems(SpecError), {}
    for path, spec in specs.items():
        try:
            found[path] = manifests.resized(spec, size, before=before)
        except SpecError as error:
            problems.add(path, str(error))
    problems.raise_if_any()
    return found


def _check_dtypes(dtypes: Mapping[str, torch.dtype | None], where: Path) -> None:
    """Refuse dtypes that no factor has.

    Raises:
        FileError: The tensors that have such, by name.
    """
    problems, expected = Problems(FileError), [*manifests.DTYPES.values()]
    for name, dtype in dtypes.items():
        if dtype not in expected:
            problems.add(str(where), f"{name!r} is {dtype}, expected one of {expected}; save it in another.")
    problems.raise_if_any()


@contextmanager
def _written(output: Path) -> Iterator[Path]:
    """A directory beside the output's place, which takes it in the end; what the disk refuses is told as ours.

    Meanwhile torch works in one thread: the threads that read, hash and write keep the processors busy.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with checkpoint.replacing(output) as beside:
            beside.mkdir()
            yield beside
    except OSError as error:
        raise FileError(f"{output}: cannot be written ({error}); choose another place.") from error
    finally:
        torch.set_num_threads(threads)


@contextmanager
def _bar(what: str, total: int, *, quiet: bool) -> Iterator[Callable[[], object]]:
    """A progress bar of layers; gives what moves it by one."""
    from tqdm import tqdm

    with tqdm(total=total, unit="layer", desc=what, disable=quiet) as bar:
        yield bar.update
