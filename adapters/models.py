"""Which Hugging Face models are parallel, and how? Stock transformers modules, their linears and embeddings replaced.

Activations. Ids, positions and masks are whole. The embeddings are whole; under sequence parallel their sequence is cut
at the first decoder layer, gathered once at the input of each attention and each MLP (for all sibling column layers),
reduce-scattered by their row layers, and gathered after the final norm. Without it, those gathers are copies, whose
backward sums the siblings' input gradients in one all-reduce. Logits are sharded over the vocabulary.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from adapters.files import read_part
from adapters.parallel import (
    ColumnParallelLinear,
    GQAQKVColumnParallelLinear,
    ParallelEmbedding,
    ParallelLayer,
    RowParallelLinear,
    attribute,
    vocab_parallel_cross_entropy,
)
from lora_fn import Axis, FileError, Heads, SpecError, checkpoint, collectives, peft_format, sharding
from lora_fn.axis import axis_of_mesh
from lora_fn.cross_entropy import IGNORE
from lora_fn.errors import Problems

# Architectures in config.json: the modules of their decoder layers have the same names.
ARCHITECTURES = ("LlamaForCausalLM", "Qwen3ForCausalLM", "GraniteForCausalLM")

ATTENTIONS = ("sdpa", "eager")
ENDS = 1 << 12  # bytes at an end of a tensor that tell it from another
# Tensors of old files that are computed, not loaded.
COMPUTED = ("rotary_emb.inv_freq",)


def load(
    directory: str | Path,
    *,
    mesh: DeviceMesh | None = None,
    axis: Axis | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    sequence_parallel: bool = False,
    gather_logits: bool = False,
    fuse_qkv: bool = False,
    fuse_gate_up: bool = False,
    kv_size_multiplier: int | None = None,
    attn_implementation: str = "sdpa",
) -> nn.Module:
    """A parallel model out of a Hugging Face directory; every process reads its own slices of the files only.

    Args:
        directory: With config.json and one or many safetensors files. Llama, Qwen3 or Granite.
        mesh: With a dimension named "tp"; None for one process.
        axis: In place of the mesh. Unbound with an index, it gives the model of one lane of a mapped axis.
        dtype: Of the parameters; None for that of the file.
        device: Of the parameters.
        sequence_parallel: Cut the sequence between the row and column layers. A sequence that does not divide is padded
            on the way in and cut on the way out. Off for calls with a cache (`use_cache=True`, or `generate`).
        gather_logits: Return whole logits. False returns this process's columns of the (padded) vocabulary; the loss
            that the model computes from labels is right either way, and the same on every process.
        fuse_qkv: One `qkv_proj` in each attention in place of q_proj, k_proj and v_proj, of one weight.
        fuse_gate_up: One `gate_up_proj` in each MLP in place of gate_proj and up_proj.
        kv_size_multiplier: Copies of each key-value head. None: as many as the axis needs at least; where those are
            more than one, or given, the attention has a `qkv_proj`, of three weights unless they are fused.
        attn_implementation: Of transformers: "sdpa" or "eager".

    Targets of an adapter keep the names of the files (q_proj, gate_proj), fused or not.

    Returns:
        A transformers model in evaluation mode, nothing of it trainable; adapt it with `adapters.wrap`.

    Raises:
        FileError: No such directory, an unknown architecture, missing, unexpected, damaged or misshapen tensors.
        SpecError: Sizes that the axis does not divide, naming the layer.
    """
    directory = Path(directory)
    if attn_implementation not in ATTENTIONS:
        raise SpecError(f"attn_implementation is {attn_implementation!r}, expected one of {', '.join(ATTENTIONS)}.")
    axis = axis if axis is not None else Axis() if mesh is None else axis_of_mesh(mesh, "tp")
    form = Form(fuse_qkv=fuse_qkv, fuse_gate_up=fuse_gate_up, kv_size_multiplier=kv_size_multiplier)
    model = _outline(
        directory, axis, form, sequence_parallel=sequence_parallel, gather=gather_logits, attention=attn_implementation
    )
    files = checkpoint.open_model(directory)
    _check_files(model, files, directory)
    _fill(model, files, dtype=dtype, device=device)
    model.model.rotary_emb = type(model.model.rotary_emb)(config=model.config).to(device)
    Sequence(model, axis, parallel=sequence_parallel).attach()
    if not gather_logits:
        model.loss_function = _Loss(model, axis)
        if axis.size > 1:
            model.generate = _no_generate
    # With a cache, transformers takes several documents in a row (packed by position_ids) for one.
    model.config.use_cache = False
    return model.requires_grad_(False).eval()


@dataclass(frozen=True, slots=True, kw_only=True)
class Form:
    """What is fused: as in `load`."""

    fuse_qkv: bool = False
    fuse_gate_up: bool = False
    kv_size_multiplier: int | None = None


def outline(directory: str | Path, *, axis: Axis, form: Form | None = None) -> nn.Module:
    """The parallel model without its weights (on the meta device), out of config.json alone.

    Args, raises: As `load`.
    """
    return _outline(Path(directory), axis, form or Form(), sequence_parallel=False, gather=False, attention="sdpa")


def check_files(model: nn.Module, directory: str | Path) -> None:
    """Hold the files of a directory against an outline.

    Raises:
        FileError: Missing, unexpected, damaged or misshapen tensors.
    """
    _check_files(model, checkpoint.open_model(Path(directory)), Path(directory))


def _outline(directory: Path, axis: Axis, form: Form, *, sequence_parallel: bool, gather: bool, attention: str) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    architecture = architecture_of(directory)
    try:
        config = AutoConfig.from_pretrained(directory, local_files_only=True)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    except Exception as error:  # whatever its parts raise
        found = " ".join(str(error).split())
        raise FileError(f"{directory / 'config.json'}: transformers does not take it ({found}); mend it.") from error
    check_sizes(config, axis, architecture)
    _replace_layers(model, config, axis, form, sequence_parallel=sequence_parallel, gather_logits=gather)
    return model


def fingerprint(directory: str | Path) -> str:
    """Text that tells one model from another: its config, and of every tensor its name, shape, begin and end."""
    told = [(Path(directory) / "config.json").read_text(encoding="utf-8")]
    for file, header in checkpoint.open_model(Path(directory)).headers.items():
        with open(file, "rb") as content:
            for name, entry in header.entries.items():
                content.seek(entry.start)
                begin = content.read(min(ENDS, entry.stop - entry.start))
                content.seek(max(entry.start, entry.stop - ENDS))
                end = content.read(entry.stop - content.tell())
                told.append(f"{name} {entry} {zlib.crc32(begin)} {zlib.crc32(end)}")
    return "\n".join(told)


def architecture_of(directory: Path) -> str:
    """The architecture that config.json names, one of `ARCHITECTURES`.

    Raises:
        FileError: No such directory or file, or another architecture.
    """
    if not directory.is_dir():
        raise FileError(f"{directory}: no such directory; give the directory of a Hugging Face model.")
    named = checkpoint.read_json(directory / "config.json").get("architectures") or ["none"]
    found = named[0] if isinstance(named, list) else named
    if not isinstance(found, str) or found not in ARCHITECTURES:
        raise FileError(
            f"{directory / 'config.json'}: architecture is {found!r}, expected one of {', '.join(ARCHITECTURES)}; "
            f"use a model of those."
        )
    return found


def check_sizes(config: Any, axis: Axis, architecture: str) -> None:
    """Refuse a model that the axis does not divide, before anything is read.

    Raises:
        SpecError: Names every layer that does not divide.
    """
    problems = Problems(SpecError)
    sizes = (
        ("layers.*.self_attn.q_proj", "attention heads", config.num_attention_heads),
        ("layers.*.mlp.gate_proj, up_proj and down_proj", "intermediate features", config.intermediate_size),
    )
    for layer, what, size in sizes:
        if size % axis.size:
            problems.add(
                f"{architecture} {layer}",
                f"{size} {what} cannot be cut into {axis.size}; choose a --tp that divides {size}.",
            )
    problems.raise_if_any()


def _replace_layers(
    model: Any, config: Any, axis: Axis, form: Form, *, sequence_parallel: bool, gather_logits: bool
) -> None:
    """Put our parallel layers, on the meta device, in the place of the stock linears and embeddings."""
    heads = Heads(
        query=config.num_attention_heads, key_value=config.num_key_value_heads, multiplier=form.kv_size_multiplier
    )
    copies = heads.copies(axis.size)
    own_order = form.kv_size_multiplier is not None or copies > 1
    common: dict[str, Any] = {"axis": axis, "device": "meta"}

    def column(base: nn.Linear, **where: Any) -> ColumnParallelLinear:
        return ColumnParallelLinear(
            base.in_features, base.out_features, bias=base.bias is not None, input="gathered", **common, **where
        )

    def row(base: nn.Linear, **where: Any) -> RowParallelLinear:
        return RowParallelLinear(
            base.in_features,
            base.out_features,
            bias=base.bias is not None,
            input_is_parallel=True,
            sequence_parallel_enabled=sequence_parallel and axis.size > 1,
            sequence_dimension=1,
            **common,
            **where,
        )

    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        query, key = attention.q_proj, attention.k_proj
        if form.fuse_qkv or own_order:
            attention.qkv_proj = GQAQKVColumnParallelLinear(
                query.in_features,
                (query.out_features, key.out_features),
                bias=query.bias is not None,
                gather_output=False,
                heads=heads,
                fuse_qkv=form.fuse_qkv,
                input="gathered",
                **common,
            )
            _take_slices(attention, attention.qkv_proj)
            attention.num_key_value_groups = heads.query // (heads.key_value * copies)
        else:
            for name in ("q_proj", "k_proj", "v_proj"):
                setattr(attention, name, column(getattr(attention, name), gather_output=False))
        attention.o_proj = row(attention.o_proj, heads=heads if own_order else None)
        if form.fuse_gate_up:
            gate = mlp.gate_proj
            mlp.gate_up_proj = ColumnParallelLinear(
                gate.in_features,
                2 * gate.out_features,
                bias=gate.bias is not None,
                gather_output=False,
                parts={"gate": gate.out_features, "up": gate.out_features},
                input="gathered",
                **common,
            )
            _take_slices(mlp, mlp.gate_up_proj)
        else:
            for name in ("gate_proj", "up_proj"):
                setattr(mlp, name, column(getattr(mlp, name), gather_output=False))
        mlp.down_proj = row(mlp.down_proj)
    embedding = model.model.embed_tokens
    model.model.embed_tokens = ParallelEmbedding(
        embedding.num_embeddings, embedding.embedding_dim, embedding.padding_idx, pad=True, **common
    )
    model.lm_head = column(model.lm_head, gather_output=gather_logits, pad=True)


class Slice(nn.Module):
    """Some features of what it gets: a projection that a fused layer before it has computed.

    Args:
        start, stop: Which.
    """

    def __init__(self, start: int, stop: int):
        super().__init__()
        self.start, self.stop = start, stop

    def forward(self, x: Tensor) -> Tensor:
        """x [..., features] -> [..., stop - start]."""
        return x[..., self.start : self.stop]

    def extra_repr(self) -> str:
        """Which features."""
        return f"{self.start} to {self.stop - 1}"


def _take_slices(block: nn.Module, fused: ParallelLayer) -> None:
    """Put slices of a fused layer's output in the places of the modules that stock code calls.

    Stock attentions and MLPs read of their input only the leading dimensions, and give it to these modules: so the
    fused layer is computed before the block, and its output is the block's input.
    """
    layout, start = sharding.layout(fused.spec, "lora_B"), 0
    assert layout is not None
    for part, size in layout.local_sizes.items():
        setattr(block, peft_format.PART_MODULES[part], Slice(start, start + size))
        start += size


def _tied(model: Any) -> dict[str, str]:
    """Name of a tensor that is another one's -> that one's name."""
    return {"lm_head.weight": "model.embed_tokens.weight"} if model.config.tie_word_embeddings else {}


@dataclass(frozen=True, slots=True)
class _Parameter:
    """One parameter of a parallel model: where it is, and where it comes from.

    Args:
        module: That holds it.
        name: There.
        param: Its name in the rules table, None where the module is none of ours.
        keys: Part -> name of the tensor in the files ("" where it is not fused).
    """

    module: nn.Module
    name: str
    param: str | None
    keys: Mapping[str, str]

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name of each tensor in the files -> its shape."""
        if self.param is None:
            return {key: tuple(self.module.get_parameter(self.name).shape) for key in self.keys.values()}
        spec = cast(ParallelLayer, self.module).spec
        shape = sharding.canonical_shape(spec, self.param)
        sizes = {part.name: part.size for part in spec.parts}
        return {key: (sizes.get(part, shape[0]), *shape[1:]) for part, key in self.keys.items()}


def _own_parameters(model: Any) -> list[_Parameter]:
    """What is to be filled from the files."""
    found = []
    for path, module in model.named_modules():
        if isinstance(module, ParallelLayer):
            parts = [part.name for part in module.spec.parts] or [""]
            for param in sharding.names(module.spec):
                base, _, own = param.partition(".")
                keys = {part: f"{peft_format.part_path(path, part)}.{base}" for part in ([own] if own else parts)}
                found.append(_Parameter(module, attribute(module.spec, param), param, keys))
        else:
            names = [name for name, p in module._parameters.items() if p is not None]
            found += [_Parameter(module, name, None, {"": f"{path}.{name}"}) for name in names]
    return [each for each in found if not set(each.keys.values()) & set(_tied(model))]


def _check_files(model: Any, files: checkpoint.TensorFiles, directory: Path) -> None:
    """Hold the files' tensors against the model's parameters.

    Raises:
        FileError: Missing, unexpected and misshapen tensors, all of them at once.
    """
    wanted = {key: shape for each in _own_parameters(model) for key, shape in each.shapes().items()}
    problems = Problems(FileError)
    for full in sorted(set(wanted) - set(files.shapes)):
        problems.add(str(directory), f"tensor {full!r} is missing; use a complete checkpoint.")
    for full in sorted(set(files.shapes) - set(wanted) - set(_tied(model))):
        if not full.endswith(COMPUTED):
            problems.add(
                str(directory), f"tensor {full!r} has no place in the model of config.json; use its own config."
            )
    for full in sorted(set(wanted) & set(files.shapes)):
        if files.shapes[full] != wanted[full]:
            problems.add(
                str(directory), f"tensor {full!r} has shape {list(files.shapes[full])}, expected {list(wanted[full])}."
            )
    problems.raise_if_any()


def _fill(model: Any, files: checkpoint.TensorFiles, *, dtype: torch.dtype | None, device: torch.device | str) -> None:
    """Read every parameter's part into the model."""
    for each in _own_parameters(model):
        if each.param is None:
            part = files.read(each.keys[""])
        else:
            part = read_part(files, each.keys, cast(ParallelLayer, each.module).spec, each.param)
        part = part.to(device=device, dtype=dtype or part.dtype, copy=True)
        each.module._parameters[each.name] = nn.Parameter(part, requires_grad=False)
    for module in model.modules():
        if isinstance(module, ParallelLayer):
            module._buffers["index"] = torch.tensor([module.spec.axis.index or 0], device=device)
    if _tied(model):
        model.lm_head._parameters["weight"] = model.model.embed_tokens.weight
    model.bytes_read = files.bytes_read


class Sequence:
    """The activations between the layers of one model: where they are cut, gathered, or copied.

    Args:
        model: With our parallel layers in place.
        axis: Of its layers.
        parallel: Whether the sequence is cut between them.
    """

    def __init__(self, model: Any, axis: Axis, *, parallel: bool):
        self.model, self.axis = model, axis
        self.parallel = parallel and axis.size > 1
        self.cut = self.parallel
        self.length = 0

    def attach(self) -> None:
        """Register the hooks."""
        inner = self.model.model
        for layer in inner.layers:
            layer.self_attn.register_forward_pre_hook(self._enter_block, with_kwargs=True)
            layer.mlp.register_forward_pre_hook(self._enter_block, with_kwargs=True)
        inner.norm.register_forward_hook(self._leave)
        if self.parallel:
            inner.register_forward_pre_hook(self._begin, with_kwargs=True)
            inner.register_forward_hook(self._end, always_call=True)
            inner.layers[0].register_forward_pre_hook(self._split, with_kwargs=True)

    @property
    def index(self) -> Tensor:
        """This process's place, int [1]."""
        return self.model.model.embed_tokens.index

    def _begin(
        self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Pad what comes in to a length that divides; a call that asks for a cache runs without sequence parallel."""
        if (kwargs.get("use_cache") and not module.training) or kwargs.get("past_key_values") is not None:
            self._switch(False)
            return args, kwargs
        names = ("input_ids", "attention_mask", "position_ids")
        kwargs = dict(zip(names[: len(args)], args, strict=True)) | kwargs | {"use_cache": False}
        came = kwargs["inputs_embeds"] if kwargs.get("input_ids") is None else kwargs["input_ids"]
        self.length = came.shape[1]
        missing = -self.length % self.axis.size
        if missing:
            pad = {
                "input_ids": lambda t: F.pad(t, (0, missing)),
                "inputs_embeds": lambda t: F.pad(t, (0, 0, 0, missing)),
                "position_ids": lambda t: F.pad(t, (0, missing)),
                "attention_mask": lambda t: _pad_mask(t, missing),
            }
            kwargs |= {n: pad[n](kwargs[n]) for n in pad if kwargs.get(n) is not None}
        return (), kwargs

    def _end(self, module: Any, args: tuple[Any, ...], output: Any) -> None:
        if not self.cut:
            self._switch(True)

    def _switch(self, cut: bool) -> None:
        self.cut = cut
        for layer in self.model.model.layers:
            for block, name in ((layer.self_attn, "o_proj"), (layer.mlp, "down_proj")):
                row = block._modules[name]
                row.spec = replace(row.spec, sequence_dim=1 if cut else None)

    def _split(
        self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if not self.cut:
            return args, kwargs
        return (collectives.split([args[0]], self.axis, self.index, dim=1)[0], *args[1:]), kwargs

    def _whole(self, x: Tensor) -> Tensor:
        """x for sharded computation: gathered where the sequence is cut, else as it is; its gradient is summed."""
        if self.cut:
            return collectives.gather_partial([x], self.axis, self.index, dim=1, dtype="float32")[0]
        return collectives.copy([x], self.axis, self.index, dtype="float32")[0]

    def _enter_block(
        self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if "hidden_states" in kwargs:
            return args, kwargs | {"hidden_states": _projected(module, self._whole(kwargs["hidden_states"]))}
        return (_projected(module, self._whole(args[0])), *args[1:]), kwargs

    def _leave(self, module: Any, args: tuple[Any, ...], output: Tensor) -> Tensor:
        whole = self._whole(output)
        return whole[:, : self.length] if self.cut else whole


def _projected(block: Any, x: Tensor) -> Tensor:
    """What a block's slices are cut from, where it has a fused layer; else x."""
    for name in ("qkv_proj", "gate_up_proj"):
        if name in block._modules:
            out = block._modules[name](x)
            return torch.cat(out, -1) if isinstance(out, tuple) else out
    return x


def _no_generate(*args: Any, **kwargs: Any) -> None:
    """In place of `generate`, which would choose among this process's columns of the vocabulary alone.

    Raises:
        SpecError: Always.
    """
    raise SpecError("generate: the logits are cut over the axis; load the model with gather_logits=True.")


def _pad_mask(mask: Tensor, missing: int) -> Tensor:
    """A mask for `missing` more tokens, which nobody attends to and which attend to something."""
    if mask.dim() == 2:
        return F.pad(mask, (0, missing))
    blocked, open_ = (False, True) if mask.dtype == torch.bool else (torch.finfo(mask.dtype).min, 0.0)
    return F.pad(F.pad(mask, (0, missing), value=blocked), (0, 0, 0, missing), value=open_)


class _Loss:
    """transformers' causal language model loss, on logits whose vocabulary is sharded."""

    def __init__(self, model: Any, axis: Axis):
        self.model, self.axis = model, axis

    def __call__(
        self,
        logits: Tensor,
        labels: Tensor,
        vocab_size: int,
        num_items_in_batch: Tensor | int | None = None,
        ignore_index: int = IGNORE,
        shift_labels: Tensor | None = None,
        **unused: Any,
    ) -> Tensor:
        if shift_labels is None:
            shift_labels = F.pad(labels, (0, 1), value=ignore_index)[..., 1:]
        targets = torch.where(shift_labels == ignore_index, IGNORE, shift_labels)
        index = self.model.lm_head.index
        each = vocab_parallel_cross_entropy(logits, targets, self.axis, vocab_size=vocab_size, index=index)
        return each.sum() / ((targets != IGNORE).sum() if num_items_in_batch is None else num_items_in_batch)
