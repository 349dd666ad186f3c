"""Are fused models, and models with copied key-value heads, the stock ones, with stock PEFT's adapters in them?

Every form, at every size of the axis, with adapters on any of the parts: outputs, gradients, files, training.
"""

import dataclasses
import itertools
import shutil
from pathlib import Path

import peft
import pytest
import torch
from pool import pool
from safetensors.torch import load_file, save_file
from small_models import MODELS, ids_of, relative, small_models_fixture, stock  # noqa: F401  (a fixture)
from test_models import TOLERANCE, above, collected, everywhere, whole_gradients
from test_peft import factors_in, stock_gradient

import adapters
import lora_fn
from adapters import bind, models, parallel
from lora_fn import Axis, FileError, LoraSpec, SpecError, TargetError, checkpoint, peft_format
from lora_fn.reshard import gather

# PEFT takes lora_B's bias for a cut tensor.
pytestmark = pytest.mark.filterwarnings("ignore:.*LoRA tensor.* have invalid shape")

FORMS = {
    "separate": {},
    "gate and up fused": dict(fuse_gate_up=True),
    "qkv fused": dict(fuse_qkv=True, fuse_gate_up=True),
    "copied heads": dict(kv_size_multiplier=2),
    "copied heads, qkv fused": dict(kv_size_multiplier=2, fuse_qkv=True, fuse_gate_up=True),
}
EIGHT = {"copied heads": {}, "copied heads, qkv fused": dict(fuse_qkv=True, fuse_gate_up=True)}  # of 4, without a word
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]

# Which parts an adapter is on, and what else is not PEFT's default.
ADAPTERS = {
    "q and v": dict(target_modules=["q_proj", "v_proj"]),
    "attention": dict(
        target_modules=ATTENTION, rank_pattern={"k_proj": 5}, alpha_pattern={"v_proj": 11, "0..*q_proj": 2}
    ),
    "down": dict(target_modules=["down_proj"]),
    "gate without up": dict(target_modules=["gate_proj"], use_rslora=True),
    "everything": dict(
        target_modules=[*ATTENTION, "gate_proj", "up_proj", "down_proj"], rank_pattern={"up_proj": 1, "k_proj": 40}
    ),
    "biases": dict(target_modules=["k_proj", "o_proj"], lora_bias=True),
}
BASES = ("llama", "qwen3", "granite")


@pytest.fixture(scope="module")
def made(small_models, tmp_path_factory):
    """(model, adapter) -> (directory of the model, directory of the adapter): made by stock PEFT, random."""
    found = {}
    for model, name in itertools.product(BASES, ADAPTERS):
        if name == "biases" and model != "llama":  # the others' projections have no biases
            continue
        directory = tmp_path_factory.mktemp("peft") / f"{model}-{name}".replace(" ", "-")
        torch.manual_seed(len(str(directory)))
        options = dict(r=3, lora_alpha=6, init_lora_weights=False, task_type="CAUSAL_LM") | ADAPTERS[name]
        tuned = peft.get_peft_model(stock(small_models[model]), peft.LoraConfig(**options))
        with torch.no_grad():
            for key, p in tuned.named_parameters():
                if "lora_B" in key and key.endswith("bias"):
                    p.normal_(std=0.1)
        tuned.save_pretrained(directory)
        found[model, name] = (small_models[model], str(directory))
    return found


def adapted(mesh, model, adapter, *, share_A=False, gradients="summed", **options):
    ours = models.load(model, mesh=mesh, dtype=torch.float32, **options)
    return with_adapter(ours, adapter, share_A=share_A, gradients=gradients)


def with_adapter(ours, adapter, *, share_A=False, gradients="summed"):
    spec = dataclasses.replace(adapters.read_spec(adapter), share_A=share_A)
    adapters.wrap(ours, spec, gradients=gradients)
    adapters.load(ours, adapter)
    return ours


def canonical(tree, layers):
    """{HF name: {parameter: canonical tensor}} of {path: {parameter: local tensor}}."""
    found = {}
    for path, of in tree.items():
        spec = layers[path].spec
        for name, p in gather(of, spec).items():
            base, _, part = name.partition(".")
            found.setdefault(peft_format.part_path(path, part), {})[base] = p.detach()
    return found


def runs(mesh, made, forms, exports):
    """{(model, adapter, form, sequence parallel): (logits, {HF name: {parameter: gradient}})}; each is saved again.

    A model is loaded once for all its adapters, which come and go.
    """
    found = {}
    for model, form, sequence_parallel in itertools.product(dict(made.values()), forms, (False, True)):
        options = dict(sequence_parallel=sequence_parallel, gather_logits=True, **forms[form])
        ours = models.load(model, mesh=mesh, dtype=torch.float32, **options)
        for key in [key for key, (of, _) in made.items() if of == model]:
            with_adapter(ours, made[key][1])
            out = ours(ids_of(), labels=ids_of())
            out.loss.backward()
            grads = {path: {n: p.grad for n, p in of.items()} for path, of in bind.factors(ours).items()}
            found[(*key, form, sequence_parallel)] = (out.logits.detach(), canonical(grads, bind.layers(ours)))
            adapters.save(ours, Path(exports) / "-".join([*key, form, str(sequence_parallel)]).replace(" ", "-"))
            bind.detach(ours)
    return found


def expected_of(model, adapter):
    """PEFT's logits and gradients."""
    tuned = peft.PeftModel.from_pretrained(stock(model), adapter, is_trainable=True).eval()
    out = tuned(ids_of(), labels=ids_of())
    out.loss.backward()
    return tuned, out.logits.detach()


def assert_like_peft(made, each, place, tmp_path):
    for key, (model, adapter) in made.items():
        tuned, logits = expected_of(model, adapter)
        plain = lora_fn.LayerSpec(kind="linear", in_features=1, out_features=1)
        for case in [case for case in each[0] if case[:2] == key]:
            for found, grads in (results[case] for results in each):
                assert relative(found, logits) < TOLERANCE, case
                assert grads
                for path, of in grads.items():
                    for name, grad in of.items():
                        assert relative(grad, stock_gradient(tuned, path, plain, name)) < TOLERANCE, (case, path, name)
            before, after = factors_in(adapter), factors_in(tmp_path / "-".join(map(str, case)).replace(" ", "-"))
            assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before), case
        grad_names = {n for n, p in tuned.named_parameters() if p.grad is not None}
        assert len(grad_names) == sum(len(of) for of in each[0][case][1].values())  # no factor is left out


@pytest.mark.parametrize("size", (1, 2, 4))
def test_an_adapter_of_peft_fits_every_form_and_comes_back(size, made, tmp_path):
    some = made if size != 4 else {key: of for key, of in made.items() if key[0] == "llama" or key[1] == "everything"}
    each = everywhere_slowly(size, runs, some, FORMS, str(tmp_path))
    assert_like_peft(some, each, size, tmp_path)


def test_more_processes_than_key_value_heads(made, tmp_path):
    some = {key: of for key, of in made.items() if key[1] in ("q and v", "everything") and key[0] != "granite"}
    each = everywhere_slowly(8, runs, some, EIGHT, str(tmp_path))
    assert_like_peft(some, each, 8, tmp_path)


def everywhere_slowly(size, function, *args):
    return pool(size).run(function, *args, timeout=240) if size > 1 else [function(None, *args)]


# The base.


def gradient_errors(mesh, directories):
    """Of every parameter of the base, which is trained too."""
    errors = {}
    for (name, directory), form in itertools.product(directories.items(), ("qkv fused", "copied heads, qkv fused")):
        reference = stock(directory)
        reference(ids_of(), labels=ids_of()).loss.backward()
        for sequence_parallel in (False, True):
            model = models.load(directory, mesh=mesh, sequence_parallel=sequence_parallel, **FORMS[form])
            model.requires_grad_(True)(ids_of(), labels=ids_of()).loss.backward()
            found = whole_gradients(model, mesh, sequence_parallel=sequence_parallel)
            for parameter, grad in found.items():
                expected = reference.get_parameter(parameter).grad
                errors[name, form, sequence_parallel, parameter] = relative(grad, expected)
    return errors


@pytest.mark.parametrize("size", (1, 2, 4))
def test_gradients_of_every_parameter_are_those_of_stock_transformers(size, small_models):
    errors = collected(everywhere(size, gradient_errors, {name: small_models[name] for name in ("llama", "qwen3")}))
    assert len(errors) > 80 and not above(errors)


# Training.


def trained(mesh, made, forms, options):
    """Canonical factors after five steps of AdamW, {(model, adapter, form): {HF name: {parameter: tensor}}}."""
    found = {}
    for (key, (model, adapter)), form in itertools.product(made.items(), forms):
        ours = adapted(mesh, model, adapter, gradients="deferred", **options, **forms[form]).train()
        specs, factors = bind.specs(ours), bind.factors(ours)
        optimizer = torch.optim.AdamW([p for of in factors.values() for p in of.values()], lr=1e-2)
        for step in range(5):
            ours(ids_of(seed=step), labels=ids_of(seed=step)).loss.backward()
            grads = {path: {n: p.grad for n, p in of.items()} for path, of in factors.items()}
            grads = lora_fn.sync_gradients(grads, specs)
            grads = lora_fn.clip(grads, lora_fn.grad_norm(grads, specs), 0.5)
            for path, of in grads.items():
                for name, grad in of.items():
                    factors[path][name].grad = grad
            optimizer.step()
            optimizer.zero_grad()
        found[(*key, form)] = canonical(factors, bind.layers(ours))
    return found


@pytest.mark.parametrize("size", (2, 8))
def test_training_partial_targets_follows_peft(size, made):
    some = {key: made[key] for key in (("llama", "q and v"), ("llama", "gate without up"), ("llama", "attention"))}
    forms = EIGHT if size == 8 else FORMS
    each = everywhere_slowly(size, trained, some, forms, dict(sequence_parallel=True))
    for key, (model, adapter) in some.items():
        tuned = peft.PeftModel.from_pretrained(stock(model), adapter, is_trainable=True).train()
        parameters = [p for p in tuned.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=1e-2)
        for step in range(5):
            tuned(ids_of(seed=step), labels=ids_of(seed=step)).loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 0.5)
            optimizer.step()
            optimizer.zero_grad()
        for form, results in itertools.product(forms, each):
            for path, of in results[(*key, form)].items():
                module = tuned.base_model.model.get_submodule(path)
                for name, p in of.items():
                    theirs = {"lora_A": module.lora_A, "lora_B": module.lora_B}[name]["default"].weight
                    assert relative(p, theirs) < 1e-4, (key, form, path, name)


# Dropout is the same however the model is fused and cut.


def dropped(mesh, model, adapter, forms):
    losses = {}
    for form, options in forms.items():
        ours = models.load(model, mesh=mesh, dtype=torch.float32, **options)
        adapters.wrap(ours, dataclasses.replace(adapters.read_spec(adapter), dropout=0.3))
        adapters.load(ours, adapter)
        adapters.set_dropout_key(ours.train(), torch.tensor(3))
        losses[form] = float(ours(ids_of(), labels=ids_of()).loss.detach())
    return losses


def test_dropout_is_the_same_in_every_form(made):
    model, adapter = made["llama", "everything"]
    found = [dropped(None, model, adapter, FORMS), *pool(2).run(dropped, model, adapter, FORMS)]
    found += pool(8).run(dropped, model, adapter, EIGHT)
    losses = torch.tensor([loss for each in found for loss in each.values()])
    assert relative(losses, losses[:1].expand_as(losses)) < TOLERANCE
    without = float(adapted(None, model, adapter)(ids_of(), labels=ids_of()).loss.detach())
    assert abs(float(losses[0]) - without) > 1e-3


# One lora_A for all parts.


def copy_of(adapter, place, change):
    """An adapter with other tensors."""
    shutil.copytree(adapter, place)
    file = Path(place) / checkpoint.WEIGHTS
    save_file(change(load_file(file)), file, metadata={"format": "pt"})
    return str(place)


def share(tensors):
    """Every k and v has q's lora_A, every up gate's."""
    pairs = {"k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}
    out = dict(tensors)
    for name in tensors:
        for part, first in pairs.items():
            if f".{part}.lora_A" in name:
                out[name] = tensors[name.replace(part, first)].clone()
    return out


def shared_errors(mesh, model, adapter, exports):
    expected = stock_logits(model, adapter)
    errors = {}
    for form, options in FORMS.items():
        if not {"fuse_qkv", "fuse_gate_up"} <= set(options):
            continue
        ours = adapted(mesh, model, adapter, share_A=True, gather_logits=True, **options)
        errors[form, "logits"] = relative(ours(ids_of()).logits, expected)
        ours(ids_of(), labels=ids_of()).loss.backward()
        for path, spec in bind.specs(ours).items():
            if spec.parts:
                assert spec.share_A and "lora_A" in bind.factors(ours)[path]
                errors[form, path] = float(bind.factors(ours)[path]["lora_A"].grad.abs().max() == 0)
        adapters.save(ours, Path(exports) / form.replace(" ", "-"))
    return errors


def stock_logits(model, adapter):
    return peft.PeftModel.from_pretrained(stock(model), adapter).eval()(ids_of()).logits.detach()


@pytest.mark.parametrize("size", (1, 4))
def test_a_shared_lora_A_is_peft_with_copies_of_it(size, small_models, tmp_path):
    options = dict(r=3, target_modules=ADAPTERS["everything"]["target_modules"], init_lora_weights=False)
    torch.manual_seed(4)
    peft.get_peft_model(stock(small_models["llama"]), peft.LoraConfig(**options)).save_pretrained(tmp_path / "own")
    adapter = copy_of(tmp_path / "own", tmp_path / "shared", share)
    errors = collected(everywhere(size, shared_errors, small_models["llama"], adapter, str(tmp_path / "out")))
    assert errors and not above(errors)
    for form in (tmp_path / "out").iterdir():
        before, after = factors_in(adapter), factors_in(form)
        assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)


def test_what_cannot_share_is_refused(made):
    model, adapter = made["llama", "everything"]
    for form in ("separate", "gate and up fused"):  # where q would share with nobody, as it would at another size
        with pytest.raises(TargetError, match=r"q_proj: is not fused with others, so there is no lora_A to share"):
            adapted(None, model, adapter, share_A=True, **FORMS[form])
    alone = adapters.wrap(models.load(model), LoraSpec(share_A=True, target_modules=("o_proj", "down_proj")))
    assert len(bind.layers(alone)) == 4
    model, adapter = made["llama", "everything"]
    with pytest.raises(SpecError, match=r"share A, but have \(rank, alpha\) \[\(1, 6.*\), \(3, 6.*\)\]"):
        adapted(None, model, adapter, share_A=True, fuse_gate_up=True, fuse_qkv=True)
    model, adapter = made["llama", "q and v"]
    with pytest.raises(FileError, match="differs from that of what shares it; wrap without share_A"):
        adapted(None, model, adapter, share_A=True, fuse_qkv=True)


# Names.


def test_targets_have_the_names_of_the_files(small_models):
    model = models.load(small_models["llama"], fuse_qkv=True, fuse_gate_up=True)
    linear = {name.rpartition(".")[2] for name in bind.sites(model)}
    assert linear == {*ATTENTION, "gate_proj", "up_proj", "down_proj", "embed_tokens", "lm_head"}
    spec = LoraSpec(target_modules=r".*\.1\.self_attn\.[qv]_proj")
    planned = bind.plan(model, spec)
    assert list(planned) == ["model.layers.1.self_attn.qkv_proj"]
    assert [part.name for part in planned["model.layers.1.self_attn.qkv_proj"].updates] == ["q", "v"]
    with pytest.raises(
        TargetError, match=r"'qkv_proj' matches none of the 16 layers; the nearest names are .*[kqv]_proj"
    ):
        bind.plan(model, LoraSpec(target_modules=("qkv_proj",)))
    adapters.wrap(model, LoraSpec(target_modules="all-linear"))
    assert "qkv" in repr(model) and "rank=8, scaling=1 (q)" in repr(model)
    assert set(bind.sites(model)) >= {"model.layers.0.self_attn.k_proj", "model.layers.0.mlp.up_proj"}


def test_factors_are_the_same_in_every_form(small_models):
    """The same seed gives the same canonical factors, fused or not."""
    spec = LoraSpec(rank=2, init_lora_weights=False, target_modules="all-linear")
    found = []
    for options in FORMS.values():
        model = adapters.wrap(models.load(small_models["qwen3"], **options), spec, seed=5)
        found.append(canonical(bind.factors(model), bind.layers(model)))
    for other in found[1:]:
        assert other.keys() == found[0].keys()
        assert all(torch.equal(other[path][n], p) for path, of in found[0].items() for n, p in of.items())


# Transforms.


def compile_errors(mesh, directory, options):
    spec = LoraSpec(rank=3, init_lora_weights=False, target_modules=("q_proj", "k_proj", "o_proj", "gate_proj"))
    model = adapters.wrap(models.load(directory, mesh=mesh, sequence_parallel=mesh is not None, **options), spec)
    factors = bind.flat(adapters.factors(model))
    call = dict(input_ids=ids_of(), labels=ids_of(), use_cache=False)
    expected = torch.autograd.grad(model(**call).loss, list(factors.values()))
    torch._dynamo.reset()
    found = torch.compile(model, fullgraph=True, backend="aot_eager")(**call).loss
    grads = torch.autograd.grad(found, list(factors.values()))
    return {name: relative(a, b) for name, a, b in zip(factors, grads, expected, strict=True)}


@pytest.mark.filterwarnings("ignore:<class 'torch.autograd.function.Function'> should not be instantiated")
@pytest.mark.parametrize("size", (1, 2))
def test_a_fused_model_compiles_to_one_graph(size, small_models):
    options = FORMS["copied heads, qkv fused"]
    errors = collected(everywhere(size, compile_errors, small_models["llama-1-layer"], options))
    assert len(errors) == 8 and not above(errors)


@pytest.mark.filterwarnings("ignore:<class 'torch.autograd.function.Function'> should not be instantiated")
def test_a_transform_inside_the_compiled_region_is_refused():
    """On one process with copied heads, too: Dynamo would leave the sum over copies out, and say nothing."""
    layer = parallel.GQAQKVColumnParallelLinear(
        4, (4, 2), bias=False, gather_output=False, heads=lora_fn.Heads(query=4, key_value=2, multiplier=2)
    )
    weight = layer.weight_qkv.detach()

    def loss(weight):
        return sum(y.square().sum() for y in lora_fn.apply({"weight": weight}, torch.ones(3, 4), layer.spec))

    torch._dynamo.reset()
    with pytest.raises(Exception, match=r"collectives\.py"):
        torch.compile(torch.func.grad(loss), fullgraph=True, backend="eager")(weight)


def generated(mesh, directory, form):
    """Tokens of greedy decoding with a cache, of a model with whole logits and of one with cut ones."""
    options = dict(max_new_tokens=4, do_sample=False, attention_mask=torch.ones_like(ids_of()))
    return [
        models.load(directory, mesh=mesh, gather_logits=whole, **form).generate(ids_of(), **options)
        for whole in (True, False)
    ]


@pytest.mark.parametrize("size", (2, 8))
def test_generation_with_copied_heads_is_that_of_stock_transformers(size, small_models):
    form = EIGHT["copied heads"] if size == 8 else FORMS["copied heads, qkv fused"]
    expected = stock(small_models["llama"]).generate(
        ids_of(), max_new_tokens=4, do_sample=False, attention_mask=torch.ones_like(ids_of())
    )
    for each in everywhere_slowly(size, generated, small_models["llama"], form):
        assert all(torch.equal(tokens, expected) for tokens in each)


def test_a_mapped_axis_of_eight_with_four_key_value_heads(small_models):
    directory, heads = small_models["llama"], MODELS["llama"].config.get("num_key_value_heads", 4)
    assert heads == 4
    spec = LoraSpec(rank=3, init_lora_weights=False, target_modules=("k_proj", "q_proj", "o_proj", "up_proj"))

    def wrapped(**options):
        return adapters.wrap(models.load(directory, attn_implementation="eager", **options), spec)

    for form, sequence_parallel in itertools.product(EIGHT.values(), (False, True)):
        options = dict(sequence_parallel=sequence_parallel, **form)
        lanes = [wrapped(axis=Axis(size=8, index=i), **options) for i in range(8)]
        params, buffers = torch.func.stack_module_state(lanes)
        factors = {name: p.detach() for name, p in params.items() if p.requires_grad}

        call = dict(input_ids=ids_of(), labels=ids_of())

        def loss(factors, params, buffers, model=lanes[0], call=call):
            return torch.func.functional_call(model, (params | factors, buffers), (), call).loss

        grads = torch.vmap(torch.func.grad(loss))(factors, params, buffers)
        whole = wrapped()
        whole(ids_of(), labels=ids_of()).loss.backward()
        expected = {path: {n: p.grad for n, p in of.items()} for path, of in bind.factors(whole).items()}
        for path, spec_of in adapters.specs(lanes[0]).items():
            own = [{n: grads[f"{path}.{n}"][i] for n in bind.factors(lanes[0])[path]} for i in range(8)]
            for name, grad in lora_fn.unshard(own, spec_of).items():
                base, _, part = name.partition(".")
                assert relative(grad, expected[peft_format.part_path(path, part)][base]) < TOLERANCE
