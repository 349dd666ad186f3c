"""How does an adapter get to disk and back? One PEFT directory, whatever the number of processes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from adapters import bind
from lora_fn import FileError, LoraSpec, checkpoint, collectives, peft_format, sharding
from lora_fn.checkpoint import TensorFiles
from lora_fn.layer_spec import LayerSpec
from lora_fn.reshard import cut_dim, differing, gather


def save(model: nn.Module, directory: str | Path) -> None:
    """Write the adapter of a wrapped model as a PEFT directory, which stock PEFT loads.

    Every process calls it. What is trained is gathered one layer at a time; the first process writes.

    Args:
        model: From `wrap`.
        directory: Made where it is missing.

    Raises:
        FileError: A factor that is not finite, replicas that differ (deferred gradients that were never synced), or (on
            the first process) a place that cannot be written.
    """
    layers = bind.layers(model)
    specs = {path: layer.spec for path, layer in layers.items()}
    state: dict[str, Tensor] = {}
    is_first = not dist.is_initialized() or dist.get_rank() == 0
    for path, layer in layers.items():
        local = layer.stored()
        # First all that processes do together, then the errors: what one of them finds, the others find too.
        drifted = differing(local, layer.spec, index=layer.index)
        canonical = peft_format.to_state_dict({path: gather(local, layer.spec, index=layer.index)}, specs)
        checkpoint.check_finite(Path(directory), canonical)
        if drifted:
            raise FileError(
                f"{path}: the copies of {drifted} differ between processes; "
                f"call lora_fn.sync_gradients before each optimizer step, or wrap with gradients='summed'."
            )
        state |= {k: t.cpu() for k, t in canonical.items()} if is_first else {}
    try:
        if is_first:
            checkpoint.save_adapter(Path(directory), config(model), state)
    finally:
        collectives.barrier()


def config(model: nn.Module) -> dict[str, Any]:
    """The adapter_config.json of a wrapped model, as `save` writes it."""
    specs = bind.specs(model)
    adapted = [name for path, spec in specs.items() for name in peft_format.adapted_paths(path, spec).values()]
    transposed = any(spec.fan_in_fan_out for spec in specs.values())
    return peft_format.to_config(bind.lora_spec(model), adapted, [*bind.sites(model)], fan_in_fan_out=transposed)


def load(model: nn.Module, directory: str | Path) -> None:
    """Read the factors of a PEFT directory into a wrapped model; every process keeps its own parts only.

    Args:
        model: From `wrap`, with the adapter's own targets and ranks (see `read_spec`). It takes on the adapter's alpha
            and use_rslora, of which nothing is compiled again.
        directory: Written by `save` or by stock PEFT.

    Raises:
        FileError: A damaged or missing file, missing or unexpected tensors, other shapes, or (on the processes that
            read it) a number that is not finite. Nothing is changed then.
        SpecError: A config that we cannot follow.
    """
    theirs, files = checkpoint.open_adapter(Path(directory))
    spec, layers = peft_format.from_config(theirs), bind.layers(model)
    specs = {path: layer.spec for path, layer in layers.items()}
    peft_format.check_state_dict(files.shapes, specs, str(Path(directory) / checkpoint.WEIGHTS))
    for path, layer in layers.items():
        names = peft_format.adapted_paths(path, layer.spec)
        for update in layer.spec.updates:
            rank = bind.adapter_of(spec, names[update.name])["rank"]
            if update.rank != rank:
                raise FileError(
                    f"{directory}: {names[update.name]} was made with rank {rank}, the model has {update.rank}; "
                    f"wrap with read_spec."
                )
    for key, path in peft_format.base_weight_names(specs).items():
        if key in files.shapes:
            weight = layers[path].get_parameter("weight")
            theirs_here = read_part(files, {"": key}, specs[path], "weight").to(weight.device, weight.dtype)
            if not torch.equal(theirs_here, weight):
                raise FileError(f"{directory}: {key!r} is not this model's weight; use the model it was made for.")
    parts: dict[nn.Parameter, Tensor] = {}
    for path, layer in layers.items():
        for key, name in peft_format.tensor_names(path, layer.spec).items():
            read = read_part(files, {name.partition(".")[2]: key}, layer.spec, name)
            if not torch.isfinite(read).all():
                raise FileError(f"{directory}: tensor {key!r} is not finite; use a whole adapter.")
            p, turned = layer.followed().get(name) or (layer.parameter(name), False)
            read = read.T if turned else read
            if not torch.equal(parts.setdefault(p, read), read):
                raise FileError(
                    f"{directory}: tensor {key!r} differs from that of what shares it; wrap without share_A, and "
                    f"without ensure_weight_tying."
                )
    bind.rescale(model, spec)
    with torch.no_grad():
        for p, part in parts.items():
            p.copy_(part)


def read_spec(directory: str | Path) -> LoraSpec:
    """The spec of a PEFT directory, to wrap a model with before `load`.

    Raises:
        FileError: No such directory, or a damaged file.
        SpecError: A config that we cannot follow.
    """
    return peft_format.from_config(checkpoint.open_adapter(Path(directory))[0])


def read_part(files: TensorFiles, keys: Mapping[str, str], spec: LayerSpec, name: str) -> Tensor:
    """This process's part of a canonical tensor on disk, zeros where the spec pads; only that part is read.

    Args:
        files: Open files.
        keys: Part of the layer -> name of its tensor in them; "" for that of a layer that is not fused.
        spec: The layer; its axis has an index.
        name: Of the parameter.

    Returns:
        A tensor of `sharding.local_shape`, in the file's dtype.
    """
    layout = sharding.layout(spec, name)
    if layout is None:
        [key] = set(keys.values())
        return files.read(key)
    dim = cut_dim(spec, name)
    pieces = layout.pieces(spec.axis.index or 0)
    parts = [files.read(keys[p.part], dim=dim, start=p.start, stop=p.stop) for p in pieces]
    shape = sharding.local_shape(spec, name)
    if len(parts) == 1 and tuple(parts[0].shape) == shape:
        return parts[0]
    some = parts[0] if parts else files.read(next(iter(keys.values())), dim=dim, start=0, stop=0)
    local = some.new_zeros(shape)
    for piece, part in zip(pieces, parts, strict=True):
        local.narrow(dim, piece.at, piece.stop - piece.start).copy_(part)
    return local
