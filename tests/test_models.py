"""Are the parallel models the stock ones? transformers is the oracle: logits, losses, gradients, at every size."""

import contextlib
import functools
import itertools
import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from mapped import cut
from pool import pool
from safetensors.torch import load_file, save_file
from small_models import ids_of, relative, small_models_fixture, stock  # noqa: F401  (a fixture)
from torch.func import functional_call

import adapters
import lora_fn
from adapters import bind, models
from adapters.merge import merge
from adapters.parallel import ParallelLayer, attribute
from lora_fn import Axis, FileError, LayerSpec, LoraSpec, Shard, SpecError, checkpoint, peft_format, sharding
from lora_fn.reshard import gather

TOLERANCE = 1e-5
SIZES = (1, 2, 4)

# What a model may be called with. Ids are [2, 13] where nothing else is said, and no axis divides 13.


def documents(lengths):
    """bool [2, 1, sum, sum]: several documents in a row, each causal, and none sees another."""
    number = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    return (number[:, None] == number[None, :]).tril().expand(2, 1, -1, -1)


def additive(mask):
    return torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)


def present(before, after):
    """int [2, 13]: the first row is whole, the second has so much padding before and after."""
    place = torch.arange(13)
    return torch.stack([place >= 0, (place >= before) & (place < 13 - after)]).long()


def labels(mask):
    return ids_of().masked_fill(mask == 0, -100)


ADAPTER = LoraSpec(
    rank=3,
    init_lora_weights=False,
    target_modules=("embed_tokens", "q_proj", "k_proj", "o_proj", "up_proj", "down_proj", "lm_head"),
    rank_pattern={"o_proj": 5},
)
LINEARS = replace(ADAPTER, target_modules="all-linear")  # as tied embeddings cannot be adapted
POSITIONS = torch.cat([torch.arange(5), torch.arange(8)]).expand(2, -1)
CALLS = {
    "plain": dict(input_ids=ids_of(), labels=ids_of()),
    "a length that divides": dict(input_ids=ids_of(length=16), labels=ids_of(length=16)),
    "shorter than the axis": dict(input_ids=ids_of(length=3), labels=ids_of(length=3)),
    "ignored labels": dict(input_ids=ids_of(), labels=labels(present(4, 3))),
    "shifted labels": dict(input_ids=ids_of(), labels=ids_of(), shift_labels=ids_of(seed=2)),
    "a mean over more than the batch": dict(input_ids=ids_of(), labels=ids_of(), num_items_in_batch=77),
    "padding after": dict(input_ids=ids_of(), attention_mask=present(0, 4), labels=labels(present(0, 4))),
    "padding before": dict(input_ids=ids_of(), attention_mask=present(4, 0), labels=labels(present(4, 0))),
    "a mask of 4 dimensions": dict(input_ids=ids_of(), attention_mask=documents([5, 8]), position_ids=POSITIONS),
    "an additive mask": dict(input_ids=ids_of(), attention_mask=additive(documents([5, 8])), position_ids=POSITIONS),
    "packed by positions": dict(input_ids=ids_of(batch=1), position_ids=POSITIONS[:1], labels=ids_of(batch=1)),
    "other positions": dict(input_ids=ids_of(), position_ids=torch.arange(13).expand(2, -1) + 7),
    "embeddings for ids": dict(inputs_embeds=torch.linspace(-1, 1, 2 * 13 * 32).view(2, 13, 32)),
    "the last logits": dict(input_ids=ids_of(), logits_to_keep=3),
    "chosen logits": dict(input_ids=ids_of(), logits_to_keep=torch.tensor([0, 7])),
}
FULL = (("llama", False), ("qwen3", True))  # every call with whole logits or not; else the first only


def everywhere(size, function, *args):
    """The results of function(mesh, *args) on that many processes; of one, here."""
    return pool(size).run(function, *args) if size > 1 else [function(None, *args)]


def above(errors, tolerance=TOLERANCE):
    """Those of {case: error} that are not below the tolerance."""
    return {case: error for case, error in errors.items() if not error < tolerance}


def collected(results):
    """What all processes found: {case: worst error}."""
    return {case: max(found[case] for found in results) for case in results[0]}


@functools.cache
def stock_outputs(directory, call):
    return stock(directory, use_cache=False)(**CALLS[call])


def logits_and_losses(mesh, directories):
    """{(model, sequence parallel, logits gathered, call, what): error} on one process."""
    errors = {}
    for name, sequence_parallel, gather_logits in itertools.product(directories, (False, True), (False, True)):
        options = dict(sequence_parallel=sequence_parallel, gather_logits=gather_logits)
        model = models.load(directories[name], mesh=mesh, dtype=torch.float32, **options)
        axis = model.lm_head.spec.axis
        for call in CALLS if (name, gather_logits) in FULL else ("plain",):
            found, expected = model(**CALLS[call]), stock_outputs(directories[name], call)
            logits = expected.logits
            if not gather_logits:
                logits = cut(logits, Shard(-1), axis.size)[axis.index or 0]
            case = (name, *options.values(), call)
            errors[case, "logits"] = relative(found.logits, logits)
            if expected.loss is not None:
                errors[case, "loss"] = relative(found.loss, expected.loss)
    return errors


@pytest.mark.parametrize("size", SIZES)
def test_logits_and_losses_are_those_of_stock_transformers(size, small_models):
    errors = collected(everywhere(size, logits_and_losses, small_models))
    assert len(errors) > 100 and not above(errors)


def test_eight_processes(small_models):
    errors = collected(everywhere(8, logits_and_losses, {"llama-8-heads": small_models["llama-8-heads"]}))
    assert errors and not above(errors)


# Eight lanes of a mapped axis, in one process.


def lanes_of(directory, size, **options):
    """The models of all lanes: (one of them, stacked parameters and buffers)."""
    lanes = [models.load(directory, axis=Axis(size=size, index=i), **options) for i in range(size)]
    params, buffers = torch.func.stack_module_state(lanes)
    return lanes[0], params, buffers


@pytest.mark.parametrize("sequence_parallel", [False, True])
@pytest.mark.parametrize("call", ["plain", "padding after", "an additive mask"])
def test_a_mapped_axis_of_eight(sequence_parallel, call, small_models):
    directory = small_models["llama-8-heads"]
    options = dict(sequence_parallel=sequence_parallel, gather_logits=True, attn_implementation="eager")
    model, params, buffers = lanes_of(directory, 8, **options)

    def run(params, buffers):
        return functional_call(model, (params, buffers), (), CALLS[call]).logits

    logits = torch.vmap(run)(params, buffers)
    expected = stock(directory, attn_implementation="eager")(**CALLS[call]).logits
    assert all(torch.equal(logits[0], lane) for lane in logits[1:])
    assert relative(logits[0], expected) < TOLERANCE


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_gradients_of_factors_on_a_mapped_axis_of_eight(sequence_parallel, small_models):
    def wrapped(**options):
        return adapters.wrap(
            models.load(small_models["llama-8-heads"], attn_implementation="eager", **options), ADAPTER
        )

    lanes = [wrapped(axis=Axis(size=8, index=i), sequence_parallel=sequence_parallel) for i in range(8)]
    params, buffers = torch.func.stack_module_state(lanes)
    factors = {name: p.detach() for name, p in params.items() if p.requires_grad}

    def loss(factors, params, buffers):
        return functional_call(lanes[0], (params | factors, buffers), (), CALLS["plain"]).loss

    grads = torch.vmap(torch.func.grad(loss))(factors, params, buffers)
    whole = wrapped()
    whole(**CALLS["plain"]).loss.backward()
    for path, spec in adapters.specs(lanes[0]).items():
        own = [{n: grads[f"{path}.{n}"][i] for n in adapters.factors(whole)[path]} for i in range(8)]
        for name, grad in lora_fn.unshard(own, spec).items():
            assert relative(grad, adapters.factors(whole)[path][name].grad) < TOLERANCE


# A cache.


def decode(model, ids):
    """Logits of the last tokens, one by one after a prefill, and what greedy decoding generates."""
    cache, steps = None, []
    for part in (ids[:, :7], ids[:, 7:8], ids[:, 8:11]):
        out = model(input_ids=part, use_cache=True, past_key_values=cache)
        cache, steps = out.past_key_values, [*steps, out.logits]
    generated = model.generate(ids, max_new_tokens=4, do_sample=False, attention_mask=torch.ones_like(ids))
    return torch.cat(steps, 1), generated


def decoding_errors(mesh, directory):
    errors = {}
    expected, expected_ids = decode(stock(directory), ids_of())
    for sequence_parallel in (False, True):
        model = models.load(directory, mesh=mesh, sequence_parallel=sequence_parallel, gather_logits=True)
        before = model(**CALLS["plain"]).logits
        logits, generated = decode(model, ids_of())
        errors[sequence_parallel, "logits"] = relative(logits, expected)
        errors[sequence_parallel, "generated"] = float(not torch.equal(generated, expected_ids))
        # Sequence parallel is back on afterwards, after an error too.
        with contextlib.suppress(IndexError):
            model(input_ids=ids_of() + 1000, use_cache=True)
        errors[sequence_parallel, "afterwards"] = float(not torch.equal(before, model(**CALLS["plain"]).logits))
        cuts = {layer.mlp.down_proj.spec.sequence_dim for layer in model.model.layers}
        errors[sequence_parallel, "cut"] = float(cuts != {1 if sequence_parallel and mesh else None})
    return errors


@pytest.mark.parametrize("size", (1, 2))
def test_decoding_with_a_cache_is_that_of_stock_transformers(size, small_models):
    for name in ("llama", "qwen3"):
        assert not above(collected(everywhere(size, decoding_errors, small_models[name])))


def cache_of_a_plain_call(mesh, directory):
    """What a model under sequence parallelism keeps of a call that asks for no cache: its sequence may be padded."""
    return models.load(directory, mesh=mesh, sequence_parallel=True)(ids_of()).past_key_values


def test_no_cache_is_kept_of_a_padded_sequence(small_models):
    assert pool(2).run(cache_of_a_plain_call, small_models["llama"]) == [None, None]


# Gradients of everything, where the base is trained too.

LOCAL_HEADS = ("q_norm", "k_norm")  # they see the heads of one process only


def whole_gradients(model, mesh, *, sequence_parallel):
    """{name in the files: canonical gradient} of every parameter, after the sums that the rules table asks for."""
    axis, found = model.lm_head.spec.axis, {}
    for path, module in model.named_modules():
        if not list(module.parameters(recurse=False)):
            continue
        spec = getattr(module, "spec", None) or LayerSpec(
            kind="replicated",
            in_features=module.weight.shape[0],
            out_features=module.weight.shape[0],
            axis=axis,
            sequence_dim=1 if sequence_parallel else None,
            input="sharded" if sequence_parallel or path.endswith(LOCAL_HEADS) else "replicated",
            gradients="deferred",
        )
        grads = {name: module.get_parameter(attribute(spec, name)).grad for name in sharding.names(spec)}
        assert len(grads) == len(list(module.parameters(recurse=False)))
        synced = lora_fn.sync_gradients({path: grads}, {path: spec})[path]
        for name, grad in gather(synced, spec).items():
            base, _, part = name.partition(".")
            parts = {p.name: p.size for p in spec.parts if part in ("", p.name)} or {"": grad.shape[0]}
            for own, piece in zip(parts, grad.split(list(parts.values())), strict=True):
                found[f"{peft_format.part_path(path, own)}.{base}"] = piece
    return found


def gradient_errors(mesh, directories):
    errors = {}
    for name, directory in directories.items():
        reference = stock(directory)
        reference(**CALLS["plain"]).loss.backward()
        for sequence_parallel in (False, True):
            model = models.load(directory, mesh=mesh, sequence_parallel=sequence_parallel).requires_grad_(True)
            model(**CALLS["plain"]).loss.backward()
            found = whole_gradients(model, mesh, sequence_parallel=sequence_parallel)
            for parameter, grad in found.items():
                expected = reference.get_parameter(parameter).grad
                errors[name, sequence_parallel, parameter] = relative(grad, expected)
    return errors


@pytest.mark.parametrize("size", (1, 2))
def test_gradients_of_every_parameter_are_those_of_stock_transformers(size, small_models):
    directories = {name: small_models[name] for name in ("llama", "qwen3", "granite-tied")}
    errors = collected(everywhere(size, gradient_errors, directories))
    assert len(errors) > 100 and not above(errors)


# What is read.


@contextlib.contextmanager
def recorded_reads():
    """[(name, elements)] of what is read in the block."""
    reads, read = [], checkpoint.TensorFiles.read

    def recording(self, name, **part):
        tensor = read(self, name, **part)
        reads.append((name, tensor.numel()))
        return tensor

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint.TensorFiles, "read", recording)
        yield reads


def reading(mesh, directory):
    """(bytes read, bytes of the whole cut tensors, bytes of the others, names of cut tensors that were read whole)."""
    with recorded_reads() as reads:
        model = models.load(directory, mesh=mesh)
    cut_sizes, other = {}, 0
    for path, module in model.named_modules():
        for name, p in module.named_parameters(recurse=False):
            full = f"{path}.{name}"
            if isinstance(module, ParallelLayer) and isinstance(sharding.rules(module.spec)[name].placement, Shard):
                cut_sizes[full] = math.prod(sharding.canonical_shape(module.spec, name))
            else:
                other += p.numel()
    held = {name for name, _ in reads}
    whole = [name for name, n in reads if name in cut_sizes and n == cut_sizes[name] and mesh]
    once = len(held) == len(reads)
    width = model.lm_head.weight.element_size()
    return model.bytes_read, width * sum(n for name, n in cut_sizes.items() if name in held), width * other, whole, once


@pytest.mark.parametrize("size", (1, 2, 4))
@pytest.mark.parametrize("name", ("llama", "qwen3", "llama-bf16"))
def test_every_process_reads_its_own_parts_only(size, name, small_models):
    results = everywhere(size, reading, small_models[name])
    for read, cut_bytes, other_bytes, read_whole, each_once in results:
        assert read <= 1.05 * (cut_bytes / size + other_bytes)
        assert each_once and not read_whole
    assert sum(read for read, *_ in results) >= results[0][1] + size * results[0][2]  # nothing is left out


def test_a_merged_model_has_another_fingerprint(small_models, tmp_path):
    model = adapters.wrap(models.load(small_models["llama"]), LoraSpec(target_modules=("0.mlp.down_proj",)))
    for factor in bind.flat(bind.factors(model)).values():
        torch.nn.init.normal_(factor)
    adapters.save(model, tmp_path / "adapter")
    merge(Path(small_models["llama"]), [tmp_path / "adapter"], tmp_path / "merged", quiet=True)
    shutil.copytree(small_models["llama"], tmp_path / "copy")
    told = [models.fingerprint(place) for place in (small_models["llama"], tmp_path / "copy", tmp_path / "merged")]
    assert told[0] == told[1] != told[2]


def test_the_dtype_is_that_of_the_file_where_none_is_said(small_models):
    for name, dtype in (("llama-bf16", torch.bfloat16), ("llama", torch.float32)):
        assert {p.dtype for p in models.load(small_models[name]).parameters()} == {dtype}


def test_a_loaded_model_is_in_evaluation_and_frozen(small_models):
    model = models.load(small_models["llama"])
    assert not model.training and not any(p.requires_grad for p in model.parameters())


# Damage.


def edit_json(file, **changes):
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def edit_tensors(file, change):
    save_file(change(load_file(file)), file, metadata={"format": "pt"})


def edit_index(directory, change):
    file = directory / checkpoint.INDEX
    weight_map = json.loads(file.read_text())["weight_map"]
    edit_json(file, weight_map=change(weight_map))


def truncate(file, size):
    file.write_bytes(file.read_bytes()[:size])


Q, K = "model.layers.1.self_attn.q_proj.weight", "model.layers.1.self_attn.k_proj.weight"
# model, damage to its directory, what the error says
DAMAGES = {
    "no directory": ("granite-tied", shutil.rmtree, "no such directory"),
    "no config": ("granite-tied", lambda d: (d / "config.json").unlink(), "config.json: no such file"),
    "a broken config": ("granite-tied", lambda d: truncate(d / "config.json", 50), "config.json: is not JSON"),
    "an unknown architecture": (
        "granite-tied",
        lambda d: edit_json(d / "config.json", architectures=["GPT2LMHeadModel"]),
        "architecture is 'GPT2LMHeadModel', expected one of Llama",
    ),
    "no architecture": (
        "granite-tied",
        lambda d: edit_json(d / "config.json", architectures=None),
        "architecture is 'none', expected one of Llama",
    ),
    "a config that transformers refuses": (
        "granite-tied",
        lambda d: edit_json(d / "config.json", hidden_size="wide"),
        "config.json: transformers does not take it",
    ),
    "an activation that there is not": (
        "granite-tied",
        lambda d: edit_json(d / "config.json", hidden_act="swish-7"),
        "config.json: transformers does not take it",
    ),
    "no weights": ("granite-tied", lambda d: (d / "model.safetensors").unlink(), "holds neither model.safetensors nor"),
    "a cut-off file": (
        "granite-tied",
        lambda d: truncate(d / "model.safetensors", 20000),
        "model.safetensors: is not a whole safetensors file",
    ),
    "an empty file": (
        "granite-tied",
        lambda d: truncate(d / "model.safetensors", 0),
        "model.safetensors: is not a whole safetensors file",
    ),
    "something else": (
        "granite-tied",
        lambda d: (d / "model.safetensors").write_text("<html>not found</html>"),
        "model.safetensors: is not a whole safetensors file",
    ),
    "two missing tensors": (
        "granite-tied",
        lambda d: edit_tensors(d / "model.safetensors", lambda t: {n: p for n, p in t.items() if n not in (Q, K)}),
        rf"'{K}' is missing.*\n.*'{Q}' is missing",
    ),
    "an unexpected tensor": (
        "granite-tied",
        lambda d: edit_tensors(d / "model.safetensors", lambda t: t | {"model.layers.7.x": torch.zeros(1)}),
        "'model.layers.7.x' has no place",
    ),
    "a wrong shape": (
        "granite-tied",
        lambda d: edit_tensors(d / "model.safetensors", lambda t: t | {Q: t[Q][:-1].clone()}),
        rf"'{Q}' has shape \[31, 32\], expected \[32, 32\]",
    ),
    "an index that names a file outside": (
        "llama",
        lambda d: edit_index(d, lambda m: m | {Q: "../model-00001-of-00005.safetensors"}),
        "names '../model-00001-of-00005.safetensors', which is not a file of this directory",
    ),
    "an index that names no file": (
        "llama",
        lambda d: edit_index(d, lambda m: m | {Q: "absent.safetensors"}),
        "absent.safetensors: no such file",
    ),
    "an index that names another file": (
        "llama",
        lambda d: edit_index(d, lambda m: m | {Q: m["lm_head.weight"]}),
        f"tensor '{Q}' is not in it, though the index says so",
    ),
    "an index without a map": ("llama", lambda d: edit_index(d, lambda m: None), "has no 'weight_map'"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_models_are_refused(damage, small_models, tmp_path):
    name, change, message = DAMAGES[damage]
    directory = tmp_path / "model"
    shutil.copytree(small_models[name], directory)
    models.load(directory)
    change(directory)
    with pytest.raises(FileError, match=message):
        models.load(directory)


def test_sizes_that_the_axis_does_not_divide_name_the_layers(small_models):
    with pytest.raises(SpecError) as caught:
        models.load(small_models["llama"], axis=Axis(size=5, index=0))
    for part in ("q_proj: 8 attention heads", "down_proj: 48 intermediate"):
        assert part in str(caught.value)
    with pytest.raises(SpecError, match="8 query heads with 3 copies of 4 key-value heads cannot be dealt to 2"):
        models.load(small_models["llama"], axis=Axis(size=2, index=0), kv_size_multiplier=3)


# What people do with a model.


def enable_checkpointing(model):
    """transformers 5.23 renamed it."""
    old, new = "gradient_checkpointing_enable", "activation_checkpointing_enable"
    getattr(model, new if new in dir(model) else old)({"use_reentrant": False})


def trained_once(directory, *, checkpointing, **options):
    """{layer.factor: gradient} with dropout, and how often the first MLP was entered."""
    model = adapters.wrap(models.load(directory, **options), replace(ADAPTER, dropout=0.2)).train()
    adapters.set_dropout_key(model, torch.tensor(5))
    runs = []
    model.model.layers[0].mlp.register_forward_pre_hook(lambda *_: runs.append(1))
    if checkpointing:
        enable_checkpointing(model)
    model(**CALLS["padding after"], use_cache=True).loss.backward()  # as stock models are called, and do not keep one
    return {name: p.grad for name, p in bind.flat(adapters.factors(model)).items()}, len(runs)


def checkpointing_errors(mesh, directory):
    errors = {}
    for sequence_parallel in (False, True):
        options = dict(mesh=mesh, sequence_parallel=sequence_parallel)
        expected, once = trained_once(directory, checkpointing=False, **options)
        found, twice = trained_once(directory, checkpointing=True, **options)
        assert (once, twice) == (1, 2)
        for name, grad in found.items():
            errors[sequence_parallel, name] = float(not torch.equal(grad, expected[name]))
    return errors


@pytest.mark.parametrize("size", (1, 2))
def test_activation_checkpointing_changes_no_gradient(size, small_models):
    errors = collected(everywhere(size, checkpointing_errors, small_models["llama"]))
    assert len(errors) == 2 * 2 * (2 + 5 * 2) and not above(errors)


def as_function(mesh, directory, **options):
    """(loss of (factors, ids), factors, ids) of an adapted model."""
    model = adapters.wrap(models.load(directory, mesh=mesh, attn_implementation="eager", **options), ADAPTER)
    factors = {name: p.detach() for name, p in bind.flat(adapters.factors(model)).items()}

    def loss(factors, ids):
        return functional_call(model, factors, (), dict(input_ids=ids, labels=ids)).loss

    return loss, factors, ids_of()


def transform_errors(mesh, directory):
    errors = {}
    for sequence_parallel in (False, True):
        loss, factors, ids = as_function(mesh, directory, sequence_parallel=sequence_parallel)
        value, expected = lora_fn.value_and_grad(loss)(factors, ids)
        grads, again = torch.func.grad_and_value(loss)(factors, ids)
        alone = [torch.func.grad(loss)(factors, row[None]) for row in ids]
        each = torch.vmap(torch.func.grad(loss), (None, 0))(factors, ids[:, None])
        errors[sequence_parallel, "value"] = relative(again, value)
        for name in factors:
            errors[sequence_parallel, "grad", name] = relative(grads[name], expected[name])
            together = torch.stack([grad[name] for grad in alone])
            errors[sequence_parallel, "per sample", name] = relative(each[name], together)
    return errors


@pytest.mark.parametrize("size", (1, 2))
def test_transforms_go_through_an_adapted_model(size, small_models):
    errors = collected(everywhere(size, transform_errors, small_models["llama"]))
    assert len(errors) > 90 and not above(errors)


def compile_errors(mesh, directory, sequence_parallel):
    model = adapters.wrap(models.load(directory, mesh=mesh, sequence_parallel=sequence_parallel), ADAPTER)
    factors = bind.flat(adapters.factors(model))
    call = CALLS["plain"] | {"use_cache": False}  # transformers 4.57 compiles without a cache only
    expected = model(**call).loss
    expected_grads = torch.autograd.grad(expected, list(factors.values()))
    torch._dynamo.reset()
    found = torch.compile(model, fullgraph=True, backend="aot_eager")(**call).loss
    grads = torch.autograd.grad(found, list(factors.values()))
    errors = {name: relative(a, b) for name, a, b in zip(factors, grads, expected_grads, strict=True)}
    return errors | {"loss": relative(found, expected)}


# What Dynamo of torch 2.9 does inside transformers' masks.
@pytest.mark.filterwarnings("ignore:<class 'torch.autograd.function.Function'> should not be instantiated")
@pytest.mark.parametrize(("size", "sequence_parallel"), [(1, False), (2, False), (2, True)])
def test_an_adapted_model_compiles_to_one_graph(size, sequence_parallel, small_models):
    errors = collected(everywhere(size, compile_errors, small_models["llama-1-layer"], sequence_parallel))
    assert len(errors) == 15 and not above(errors)


def test_layers_that_are_not_installed_are_a_sentence(small_models, monkeypatch):
    monkeypatch.setattr(models.nxd, "is_installed", lambda: False)
    with pytest.raises(SpecError, match=r"layers is 'nxd': neuronx-distributed is not installed; pip install 'lora-fn"):
        models.load(small_models["llama"], layers="nxd")
