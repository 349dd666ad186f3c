"""Which Hugging Face models are parallel, and how? Stock transformers modules, their linears and embeddings replaced.

By layers of this package, or by neuronx-distributed's: one description, two makers. How activations lie between them is
said in `adapters.sequence`. Logits are sharded over the vocabulary.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Container, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from adapters import experts, kinds, nxd, nxd_attention, nxd_layers, quantized, raw
from adapters.decoding import Generate
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
from adapters.sequence import SEPARATE, OwnSequence, Sequence, take_slices
from lora_fn import (
    Axis,
    FileError,
    FusedPart,
    Heads,
    LayerSpec,
    Quantization,
    SpecError,
    checkpoint,
    peft_format,
    sharding,
)
from lora_fn import quantize as few_bits
from lora_fn.axis import axis_of_mesh
from lora_fn.cross_entropy import IGNORE
from lora_fn.errors import Problems

# Architectures in config.json: the modules of their decoder layers have the same names; those of `EXPERTS` have experts
# in place of an MLP's projections.
EXPERTS = ("MixtralForCausalLM",)
ARCHITECTURES = ("LlamaForCausalLM", "Qwen3ForCausalLM", "GraniteForCausalLM", *EXPERTS)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
ATTENTIONS = ("sdpa", "eager")
LOCAL_HEADS = ("q_norm", "k_norm")  # these see the heads of one process only
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
    layers: str | None = None,
    quantize: str | Quantization | None = None,
) -> nn.Module:
    """A parallel model out of a Hugging Face directory; every process reads its own slices of the files only.

    Args:
        directory: With config.json and one or many safetensors files. Llama, Qwen3, Granite or Mixtral (of whose
            experts each process has its part of the intermediate features; the router is whole everywhere).
        mesh: With a dimension named "tp"; None for one process.
        axis: In place of the mesh. Unbound with an index, it gives the model of one lane of a mapped axis.
        dtype: Of the parameters; None for that of the file.
        device: Of the parameters.
        sequence_parallel: Cut the sequence between the row and column layers. A sequence that does not divide is padded
            on the way in and cut on the way out. Off for calls with a cache (`use_cache=True`, or `generate`).
        gather_logits: Return whole logits. False returns this process's columns of the (padded) vocabulary; the loss
            that the model computes from labels is right either way, and the same on every process; and so is what
            `generate` gives, which gathers the last token's (see `adapters.decoding`).
        fuse_qkv: One `qkv_proj` in each attention in place of q_proj, k_proj and v_proj, of one weight.
        fuse_gate_up: One `gate_up_proj` in each MLP in place of gate_proj and up_proj.
        kv_size_multiplier: Copies of each key-value head. None: as many as the axis needs at least; where those are
            more than one, or given, the attention has a `qkv_proj`, of three weights unless they are fused.
        attn_implementation: Of transformers: "sdpa" or "eager"; with neuronx-distributed's layers, on a device,
            "nki_flash_attention" too (see `adapters.nxd_attention`).
        layers: "own" for this package's; "nxd" for neuronx-distributed's, over its default tensor-parallel group. None:
            its, where its parallel state is initialised and neither mesh nor axis is given.

        quantize: "nf4", "int8", "fp8" or a Quantization: hold the weights of the linear layers of this package so (see
            `adapters.quantized`), each quantised as it is read, so that no more than one is there unquantised. Scales
            of a whole row of a row layer are of the whole tensor, which every process then reads.

    Targets of an adapter keep the names of the files (q_proj, gate_proj), fused or not.

    Returns:
        A transformers model in evaluation mode, nothing of it trainable; adapt it with `adapters.wrap`.

    Raises:
        FileError: No such directory, an unknown architecture, missing, unexpected, damaged or misshapen tensors.
        SpecError: Sizes that the axis does not divide, or that are no whole blocks, naming the layer.
    """
    directory = Path(directory)
    layers, axis = _chosen(layers, mesh, axis)
    attentions = (*ATTENTIONS, nxd_attention.NAME) if layers == "nxd" else ATTENTIONS
    if attn_implementation not in attentions:
        raise SpecError(f"attn_implementation is {attn_implementation!r}, expected one of {', '.join(attentions)}.")
    if attn_implementation == nxd_attention.NAME:
        nxd_attention.register()
    form = Form(fuse_qkv=fuse_qkv, fuse_gate_up=fuse_gate_up, kv_size_multiplier=kv_size_multiplier)
    model = _outline(
        directory,
        axis,
        form,
        sequence_parallel=sequence_parallel,
        gather=gather_logits,
        attention=attn_implementation,
        layers=layers,
        quantize=quantize,
    )
    files = checkpoint.open_model(directory)
    _check_files(model, files, directory)
    _fill(model, files, dtype=dtype, device=device)
    _mark(model, axis, sequence_parallel=sequence_parallel)
    model.model.rotary_emb = type(model.model.rotary_emb)(config=model.config).to(device)
    sequence = LAYERS[layers][1](model, axis, parallel=sequence_parallel)
    sequence.attach()
    if not gather_logits:
        model.loss_function = _Loss(sequence)
    model.generate = Generate(model, sequence, sharded=not gather_logits)
    _take_generation_config(model, directory)
    # With a cache, transformers takes several documents in a row (packed by position_ids) for one.
    model.config.use_cache = False
    if attn_implementation == nxd_attention.NAME:
        nxd_attention.refuse_positions(model)
    return model.requires_grad_(False).eval()


def _chosen(layers: str | None, mesh: DeviceMesh | None, axis: Axis | None) -> tuple[str, Axis]:
    """Which layers, over which axis.

    Raises:
        SpecError: Layers that are not there, or not over that.
    """
    given = mesh is not None or axis is not None
    layers = layers or ("nxd" if nxd.is_initialized() and not given else "own")
    if layers not in LAYERS:
        raise SpecError(f"layers is {layers!r}, expected one of {', '.join(LAYERS)}.")
    if layers == "own":
        return layers, axis if axis is not None else Axis() if mesh is None else axis_of_mesh(mesh, "tp")
    if not nxd.is_installed():
        raise SpecError(
            "layers is 'nxd': neuronx-distributed is not installed; pip install 'lora-fn[neuron]' from AWS's index."
        )
    if given or not nxd.is_initialized():
        raise SpecError(
            "layers is 'nxd': neuronx-distributed's layers lie over its own tensor-parallel group; "
            "call its initialize_model_parallel first, and give neither mesh nor axis."
        )
    return layers, nxd.default_axis()


@dataclass(frozen=True, slots=True, kw_only=True)
class Form:
    """What is fused: as in `load`."""

    fuse_qkv: bool = False
    fuse_gate_up: bool = False
    kv_size_multiplier: int | None = None


def outline(
    directory: str | Path,
    *,
    axis: Axis,
    form: Form | None = None,
    quantize: str | Quantization | None = None,
    sequence_parallel: bool = False,
) -> nn.Module:
    """The parallel model without its weights (on the meta device), out of config.json alone.

    Args, raises: As `load`.
    """
    how: dict[str, Any] = {"quantize": quantize, "gather": False, "attention": "sdpa", "layers": "own"}
    model = _outline(Path(directory), axis, form or Form(), sequence_parallel=sequence_parallel, **how)
    _mark(model, axis, sequence_parallel=sequence_parallel)
    return model


def check_files(model: nn.Module, directory: str | Path) -> None:
    """Hold the files of a directory against an outline.

    Raises:
        FileError: Missing, unexpected, damaged or misshapen tensors.
    """
    _check_files(model, checkpoint.open_model(Path(directory)), Path(directory))


def _outline(
    directory: Path,
    axis: Axis,
    form: Form,
    *,
    sequence_parallel: bool,
    gather: bool,
    attention: str,
    layers: str,
    quantize: str | Quantization | None,
) -> Any:
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
    if architecture in EXPERTS and (layers != "own" or "mlp" not in model.model.layers[0]._modules):
        raise SpecError(
            f"{architecture}: is parallel with layers 'own' and transformers 5 or newer, whose experts are stacked; "
            f"found layers {layers!r} and {type(model.model.layers[0]).__name__} with "
            f"{[*model.model.layers[0]._modules]}."
        )
    make = LAYERS[layers][0](axis, sequence_parallel=sequence_parallel)
    _replace_layers(model, make, form, gather_logits=gather)
    if _tied(model):
        model.lm_head._parameters["weight"] = model.model.embed_tokens.weight
    if quantize is not None:
        if layers != "own":
            raise SpecError(f"quantize is {quantize!r}, with layers {layers!r}: it is for 'own' ones.")
        quantized.mark(model, quantized.plan(model, quantize))
    return model


def itemsize(directory: str | Path) -> int:
    """Bytes of an element of a model's largest tensor.

    Raises:
        FileError: As `lora_fn.checkpoint.open_model`.
    """
    files = checkpoint.open_model(Path(directory))
    return checkpoint.DTYPES[files.dtypes[max(files.shapes, key=lambda name: math.prod(files.shapes[name]))]][1] // 8


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


def load_tokenizer(directory: Path) -> Any:
    """The tokenizer in a model's directory.

    Raises:
        FileError: There is none.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(directory, local_files_only=True)
    except Exception as error:  # transformers raises what it likes here
        told = str(error).strip().split("\n")[0]
        raise FileError(f"{directory}: has no tokenizer that transformers loads ({told}); put one there.") from error


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


class _Layers:
    """Makers of this package's layers, on the meta device; arguments as in `nxd_layers.Layers`."""

    def __init__(self, axis: Axis, *, sequence_parallel: bool):
        self.cut: dict[str, Any] = {
            "sequence_parallel_enabled": sequence_parallel and axis.size > 1,
            "sequence_dimension": 1,
        }
        self.axis = axis
        self.options: dict[str, Any] = {"axis": axis, "device": "meta"}

    def check(self, model: Any, *, grouped: bool) -> None:
        """Every size is good that is dealt to all processes."""

    def column(self, base: nn.Linear, *, in_block: bool = True, gather_output: bool = False) -> nn.Module:
        """In place of a linear layer, its output cut; outside of the blocks, padded."""
        options: dict[str, Any] = {
            "gather_output": gather_output,
            "pad": not in_block,
            "input": "gathered",
        } | self.options
        return ColumnParallelLinear(base.in_features, base.out_features, bias=base.bias is not None, **options)

    def pair(self, first: nn.Linear, second: nn.Linear) -> nn.Module:
        """In place of gate_proj and up_proj."""
        return ColumnParallelLinear(
            first.in_features,
            first.out_features + second.out_features,
            bias=first.bias is not None,
            gather_output=False,
            parts={"gate": first.out_features, "up": second.out_features},
            input="gathered",
            **self.options,
        )

    def row(self, base: nn.Linear, heads: Heads | None = None) -> nn.Module:
        """In place of a linear layer, its input cut."""
        options: dict[str, Any] = {"input_is_parallel": True, "heads": heads} | self.cut | self.options
        return RowParallelLinear(base.in_features, base.out_features, bias=base.bias is not None, **options)

    def qkv(self, query: nn.Linear, key: nn.Linear, heads: Heads, *, fuse_qkv: bool) -> nn.Module:
        """In place of q_proj, k_proj and v_proj."""
        return GQAQKVColumnParallelLinear(
            query.in_features,
            (query.out_features, key.out_features),
            bias=query.bias is not None,
            gather_output=False,
            heads=heads,
            fuse_qkv=fuse_qkv,
            input="gathered",
            **self.options,
        )

    def experts(self, base: Any) -> None:
        """Of stacked experts, cut the intermediate features: in place, for their forward is right on a part."""
        number, double, hidden = base.gate_up_proj.shape
        common: dict[str, Any] = {"kind": "experts", "num_experts": number, "axis": self.axis}
        base.raw_specs = {
            "gate_up_proj": LayerSpec(in_features=hidden, out_features=double, stride=2, **common),
            "down_proj": LayerSpec(in_features=double // 2, out_features=hidden, shard_input=True, **common),
        }
        for name, spec in base.raw_specs.items():
            local = torch.empty(sharding.local_shape(spec, "weight"), device="meta")
            base.register_parameter(name, nn.Parameter(local, requires_grad=False))

    def embedding(self, base: nn.Embedding) -> nn.Module:
        """In place of a table of embeddings, its vocabulary padded."""
        return ParallelEmbedding(base.num_embeddings, base.embedding_dim, base.padding_idx, pad=True, **self.options)


# What `load` calls them -> makers of layers, and how activations lie between them.
LAYERS: Mapping[str, tuple[type[Any], type[Sequence]]] = {
    "own": (_Layers, Sequence),
    "nxd": (nxd_layers.Layers, OwnSequence),
}


def _replace_layers(model: Any, make: Any, form: Form, *, gather_logits: bool) -> None:
    """Put parallel layers in the place of the stock linears and embeddings."""
    config = model.config
    heads = Heads(
        query=config.num_attention_heads, key_value=config.num_key_value_heads, multiplier=form.kv_size_multiplier
    )
    copies = heads.copies(make.axis.size)
    own_order = form.kv_size_multiplier is not None or copies > 1
    grouped = form.fuse_qkv or own_order
    make.check(model, grouped=grouped)
    for number, layer in enumerate(model.model.layers):
        attention, mlp, path = layer.self_attn, layer.mlp, f"model.layers.{number}"
        if grouped:
            attention.qkv_proj = make.qkv(attention.q_proj, attention.k_proj, heads, fuse_qkv=form.fuse_qkv)
            _take_slices(model, f"{path}.self_attn", "qkv_proj")
            attention.num_key_value_groups = heads.query // (heads.key_value * copies)
        else:
            for name in SEPARATE:
                setattr(attention, name, make.column(getattr(attention, name)))
        attention.o_proj = make.row(attention.o_proj, heads if own_order else None)
        if "experts" in mlp._modules:
            make.experts(mlp.experts)
            continue
        if form.fuse_gate_up:
            mlp.gate_up_proj = make.pair(mlp.gate_proj, mlp.up_proj)
            _take_slices(model, f"{path}.mlp", "gate_up_proj")
        else:
            for name in ("gate_proj", "up_proj"):
                setattr(mlp, name, make.column(getattr(mlp, name)))
        mlp.down_proj = make.row(mlp.down_proj)
    model.model.embed_tokens = make.embedding(model.model.embed_tokens)
    model.lm_head = make.column(model.lm_head, in_block=False, gather_output=gather_logits)


def _take_slices(model: nn.Module, block: str, fused: str) -> None:
    spec = _spec(model, f"{block}.{fused}")
    assert spec is not None
    take_slices(model.get_submodule(block), spec)


def _spec(model: nn.Module, path: str) -> LayerSpec | None:
    """The spec of a parallel layer; None of any other module."""
    module = model.get_submodule(path)
    return module.spec if isinstance(module, ParallelLayer) else nxd.spec_of(model, path)


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
        spec: Of the module, where it is one of ours.
    """

    module: nn.Module
    name: str
    param: str | None
    keys: Mapping[str, str]
    spec: LayerSpec | None = None

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name of each tensor in the files -> its shape."""
        if self.param is None or self.spec is None:
            return {key: tuple(self.module.get_parameter(self.name).shape) for key in self.keys.values()}
        shape = sharding.canonical_shape(self.spec, self.param)
        sizes = {part.name: part.size for part in self.spec.parts}
        return {key: (sizes.get(part, shape[0]), *shape[1:]) for part, key in self.keys.items()}

    def read(self, files: checkpoint.TensorFiles) -> Tensor:
        """This process's part."""
        if self.param is None or self.spec is None:
            return files.read(self.keys[""])
        return read_part(files.read, self.keys, self.spec, self.param)

    @property
    def is_quantized(self) -> bool:
        """Whether it is a weight that is to be held in few bits."""
        how = self.module.spec.quantization if isinstance(self.module, ParallelLayer) else None
        return how is not None and (self.param or "").partition(".")[0] == "weight"

    def quantized(self, files: checkpoint.TensorFiles, spec: LayerSpec) -> dict[str, Tensor]:
        """What this process's part of a weight is held in."""
        assert self.param is not None and spec.quantization is not None
        most = None
        if quantized.crosses(spec):
            found = {key: few_bits.largest(files.read(key), spec.quantization) for key in self.keys.values()}
            most = {self.param: next(iter(quantized.over_parts(found, spec).values()))}
        return quantized.quantized({self.param: self.read(files)}, spec, most=most)


@dataclass(frozen=True, slots=True)
class _Stacked:
    """The experts of one raw parameter, one by one in the files: as many parts of each, one after the other.

    Args:
        module, name: As in `_Parameter`.
        each: Of every expert.
    """

    module: nn.Module
    name: str
    each: tuple[_Parameter, ...]

    @property
    def keys(self) -> dict[str, str]:
        """As in `_Parameter`."""
        return {key: key for one in self.each for key in one.keys.values()}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """As in `_Parameter`."""
        return {key: shape for one in self.each for key, shape in one.shapes().items()}

    def read(self, files: checkpoint.TensorFiles) -> Tensor:
        """This process's part."""
        return torch.stack([one.read(files) for one in self.each])


def _experts(module: nn.Module, path: str, name: str, spec: LayerSpec, keys: Container[str]) -> _Parameter | _Stacked:
    """A raw parameter of experts, as it lies in the files."""
    full, number = f"{path}.{name}", spec.num_experts or 0
    found = experts.pieces(full, number, keys)
    if not found or found[0].expert is None:
        return _Parameter(module, name, "weight", {"": found[0].key if found else full}, spec)
    num = found[0].parts
    parts = tuple(FusedPart(name=f"part{n}", size=spec.out_features // num) for n in range(num) if num > 1)
    one = LayerSpec(
        kind="row" if spec.shard_input else "column",
        in_features=spec.in_features,
        out_features=spec.out_features,
        parts=parts,
        axis=spec.axis,
    )
    keys_of = [{f"part{p.part}" if parts else "": p.key for p in found if p.expert == e} for e in range(number)]
    return _Stacked(module, name, tuple(_Parameter(module, name, "weight", each, one) for each in keys_of))


def _own_parameters(model: Any, keys: Container[str]) -> list[_Parameter | _Stacked]:
    """What is to be filled from files with these names."""
    found: list[_Parameter | _Stacked] = []
    for path, module in model.named_modules():
        spec = _spec(model, path)
        if spec is not None:
            spec = replace(spec, quantization=None)  # as the files have it
            parts = [part.name for part in spec.parts] or [""]
            for param in sharding.names(spec):
                base, _, own = param.partition(".")
                of = {part: f"{peft_format.part_path(path, part)}.{base}" for part in ([own] if own else parts)}
                found.append(_Parameter(module, attribute(spec, param), param, of, spec))
        elif raw.specs_of(module):
            found += [_experts(module, path, name, own, keys) for name, own in raw.specs_of(module).items()]
        else:
            names = {name: f"{path}.{name}" for name, p in module._parameters.items() if p is not None}
            for name, full in names.items():
                there = [piece.key for piece in experts.pieces(full, 1, keys)] or [full]
                found.append(_Parameter(module, name, None, {"": there[0]}))
    return [each for each in found if not set(each.keys.values()) & set(_tied(model))]


def _check_files(model: Any, files: checkpoint.TensorFiles, directory: Path) -> None:
    """Hold the files' tensors against the model's parameters.

    Raises:
        FileError: Missing, unexpected and misshapen tensors, all of them at once.
    """
    wanted = {key: shape for each in _own_parameters(model, files.shapes) for key, shape in each.shapes().items()}
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
    for each in _own_parameters(model, files.shapes):
        if isinstance(each, _Parameter) and each.is_quantized:
            layer: Any = each.module
            held = each.quantized(files, layer.spec)
            quantized.hold(layer, layer.spec, {name: t.to(device) for name, t in held.items()})
            continue
        part = each.read(files)
        part = part.to(device=device, dtype=dtype or part.dtype, copy=True)
        marks = vars(each.module.get_parameter(each.name))  # which neuronx-distributed's trainer reads
        each.module._parameters[each.name] = nn.Parameter(part, requires_grad=False)
        for mark, value in marks.items():
            setattr(each.module.get_parameter(each.name), mark, value)
        if nxd.class_name(each.module) in nxd.CLASSES:
            each.module.dtype = part.dtype  # type: ignore[assignment]
    for module in model.modules():
        if isinstance(module, ParallelLayer):
            module._buffers["index"] = torch.tensor([module.spec.axis.index or 0], device=device)
    if _tied(model):
        model.lm_head._parameters["weight"] = model.model.embed_tokens.weight
    model.bytes_read = files.bytes_read


def _mark(model: nn.Module, axis: Axis, *, sequence_parallel: bool) -> None:
    """Say of what every process holds whole (the norms) whether its gradient is a partial sum."""
    for path, module in model.named_modules():
        if _spec(model, path) is None:
            for p in module.parameters(recurse=False):
                setattr(p, kinds.PARTIAL, axis.size > 1 and (sequence_parallel or path.endswith(LOCAL_HEADS)))


def _take_generation_config(model: Any, directory: Path) -> None:
    """What the directory says of generation, where it says something: the tokens that end it, how to sample.

    Raises:
        FileError: transformers does not take it.
    """
    from transformers import GenerationConfig

    file = directory / "generation_config.json"
    if not file.is_file():
        return
    try:
        model.generation_config = GenerationConfig.from_pretrained(directory, local_files_only=True)
    except Exception as error:  # whatever its parts raise
        found = " ".join(str(error).split())
        raise FileError(f"{file}: transformers does not take it ({found}); mend it, or take it away.") from error


class _Loss:
    """transformers' causal language model loss, on logits whose vocabulary is sharded."""

    def __init__(self, sequence: Sequence):
        self.axis, self.sequence = sequence.axis, sequence

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
        index = self.sequence.index
        each = vocab_parallel_cross_entropy(logits, targets, self.axis, vocab_size=vocab_size, index=index)
        return each.sum() / ((targets != IGNORE).sum() if num_items_in_batch is None else num_items_in_batch)
