"""Raw parameters (target_parameters): stock PEFT is the oracle, on a small stock Mixtral and a small GPT-OSS, whose
experts are transposed."""

import copy
import dataclasses
import io
import itertools
import json
import shutil
from pathlib import Path

import peft
import pytest
import torch
from pool import pool
from safetensors.torch import load_file, save_file
from small_models import COMMON, ids_of, relative
from torch.func import functional_call, grad

import adapters
import lora_fn
from adapters import bind, convert, models
from adapters.merge import _logits as logits_with
from adapters.merge import merge
from lora_fn import FileError, LayerSpec, LoraSpec, SpecError, TargetError, checkpoint, peft_format
from lora_fn.reshard import differing, gather

# PEFT looks for what its patterns match among the modules only, and says of a parameter's that it was ignored.
pytestmark = pytest.mark.filterwarnings("ignore:The following .*_pattern keys did not match any targeted module")
TOLERANCE = 1e-5
BOTH = ["gate_up_proj", "down_proj"]

# (model, what differs from PEFT's defaults)
ADAPTERS = {
    "both": ("mixtral", dict(r=4, lora_alpha=8, target_modules=[], target_parameters=BOTH)),
    "the inner one": ("mixtral", dict(r=3, target_modules=[], target_parameters=["experts.gate_up_proj"])),
    "one of one layer": (
        "mixtral",
        dict(r=40, use_rslora=True, target_modules=[], target_parameters=["model.layers.1.mlp.experts.down_proj"]),
    ),
    "beside modules, with patterns": (
        "mixtral",
        dict(
            r=4,
            lora_alpha=3,
            target_modules=["q_proj"],
            target_parameters=["experts.gate_up_proj", "experts.down_proj", "gate.weight"],
            rank_pattern={"down_proj": 5, "q_proj": 2},
            alpha_pattern={"1.mlp.experts.gate_up_proj": 20},
        ),
    ),
    "transposed": ("gpt_oss", dict(r=4, target_modules=["o_proj"], target_parameters=BOTH)),
}


def stock(directory):
    import transformers

    transformers.logging.disable_progress_bar()
    return transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def moe(tmp_path_factory):
    """Name -> directory of a small model with experts."""
    import transformers

    experts = {"num_local_experts": 3, "num_experts_per_tok": 2}
    made = {
        "mixtral": transformers.MixtralForCausalLM(transformers.MixtralConfig(**COMMON | experts)),
        "gpt_oss": transformers.GptOssForCausalLM(transformers.GptOssConfig(**COMMON | experts)),
    }
    place = tmp_path_factory.mktemp("moe")
    for name, model in made.items():
        torch.manual_seed(0)
        for p in model.parameters():
            torch.nn.init.normal_(p, 1.0 if p.dim() == 1 else 0.0, 0.15)
        model.save_pretrained(place / name)
    return {name: str(place / name) for name in made}


@pytest.fixture(scope="module")
def made(moe, tmp_path_factory):
    """Name -> (model's directory, adapter's directory), made by stock PEFT, random in both factors."""
    place, found = tmp_path_factory.mktemp("peft"), {}
    for name, (model, options) in ADAPTERS.items():
        torch.manual_seed(len(name))
        config = peft.LoraConfig(init_lora_weights=False, task_type="CAUSAL_LM", **options)
        peft.get_peft_model(stock(moe[model]), config).save_pretrained(place / name)
        found[name] = moe[model], str(place / name)
    return found


def adapted(model, adapter):
    ours = adapters.wrap(stock(model), adapters.read_spec(adapter))
    adapters.load(ours, adapter)
    return ours


def test_an_adapter_of_peft_gives_the_same_logits_and_gradients_and_comes_back(made, tmp_path):
    for name, (model, adapter) in made.items():
        tuned = peft.PeftModel.from_pretrained(stock(model), adapter, is_trainable=True).eval()
        expected = tuned(ids_of(), labels=ids_of())
        expected.loss.backward()
        ours = adapted(model, adapter)
        found = ours(ids_of(), labels=ids_of())
        found.loss.backward()
        assert relative(expected.logits, stock(model)(ids_of()).logits) > 1e-2, "the adapter must do something"
        assert relative(found.logits, expected.logits) < TOLERANCE
        specs, theirs = bind.specs(ours), dict(tuned.named_parameters())
        of_peft = {key for key in theirs if theirs[key].grad is not None}
        for path, of in bind.factors(ours).items():
            for key, parameter in peft_format.tensor_names(path, specs[path]).items():
                own = peft_format.to_stored(of[parameter].grad, specs[path], parameter)
                key = key.replace(".weight", ".default.weight")
                assert relative(own, theirs[key].grad) < TOLERANCE, (name, key)
                of_peft.remove(key)
        assert not of_peft
        adapters.save(ours, tmp_path / name)
        before, after = (load_file(f"{place}/{checkpoint.WEIGHTS}") for place in (adapter, tmp_path / name))
        assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)
        fresh = peft.get_peft_model(stock(model), peft.LoraConfig.from_pretrained(tmp_path / name)).eval()
        told = peft.set_peft_model_state_dict(fresh, after)
        assert not told.unexpected_keys and not [key for key in told.missing_keys if "lora_" in key]
        assert torch.equal(fresh(ids_of()).logits, expected.logits)


def logits_and_gradients(mesh, made, exports):
    """{(adapter, sequence parallel, gradients): (logits, loss, {layer: {name: canonical gradient}})}; saved again."""
    found = {}
    for name, (model, adapter) in made.items():
        for sequence_parallel, gradients in itertools.product((False, True), ("summed", "deferred")):
            how = {
                "dtype": torch.float32,
                "sequence_parallel": sequence_parallel,
                "gather_logits": gradients == "summed",
            }
            ours = models.load(model, mesh=mesh, **how)
            adapters.wrap(ours, adapters.read_spec(adapter), gradients=gradients)
            adapters.load(ours, adapter)
            out, specs = ours(ids_of(), labels=ids_of()), bind.specs(ours)
            out.loss.backward()
            grads = {path: {n: p.grad for n, p in of.items()} for path, of in bind.factors(ours).items()}
            if gradients == "deferred":
                grads = lora_fn.sync_gradients(grads, specs)
            assert not any(differing(of, specs[path]) for path, of in grads.items())
            grads = {path: gather(of, specs[path]) for path, of in grads.items()}
            found[name, sequence_parallel, gradients] = (out.logits.detach(), out.loss.detach(), grads)
            adapters.save(ours, Path(exports) / f"{name}-{sequence_parallel}")
    return found


@pytest.mark.parametrize("size", (1, 2, 4))
def test_a_parallel_mixtral_is_pefts(size, made, tmp_path):
    made = {name: of for name, of in made.items() if of[0].endswith("mixtral")}
    arguments = (logits_and_gradients, made, str(tmp_path))
    each = pool(size).run(*arguments) if size > 1 else [arguments[0](None, *arguments[1:])]
    for name, (model, adapter) in made.items():
        ours = adapted(model, adapter)
        expected = peft.PeftModel.from_pretrained(stock(model), adapter)(ids_of(), labels=ids_of())
        ours(ids_of(), labels=ids_of()).loss.backward()  # whose gradients are PEFT's, as is shown above
        of_stock = bind.factors(ours)
        for found, (sequence_parallel, gradients) in itertools.product(
            each, itertools.product((False, True), ("summed", "deferred"))
        ):
            logits, loss, grads = found[name, sequence_parallel, gradients]
            assert relative(loss, expected.loss) < TOLERANCE
            assert gradients == "deferred" or relative(logits, expected.logits) < TOLERANCE
            assert grads.keys() == of_stock.keys()
            for path, of in grads.items():
                for parameter, g in of.items():
                    assert relative(g, of_stock[path][parameter].grad) < TOLERANCE, (name, path, parameter)
            before, after = (
                load_file(f"{place}/{checkpoint.WEIGHTS}")
                for place in (adapter, tmp_path / f"{name}-{sequence_parallel}")
            )
            assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)


def balanced(mesh, model, adapter):
    """{sequence parallel: (loss, gradients)} with the loss of the experts' balance; what is said of padding."""
    found, said = {}, ""
    for sequence_parallel in (False, True):
        ours = models.load(model, mesh=mesh, dtype=torch.float32, sequence_parallel=sequence_parallel)
        adapters.wrap(ours, adapters.read_spec(adapter))
        adapters.load(ours, adapter)
        out, specs = ours(ids_of(length=16), labels=ids_of(length=16), output_router_logits=True), bind.specs(ours)
        out.loss.backward()
        grads = {p: gather({n: f.grad for n, f in of.items()}, specs[p]) for p, of in bind.factors(ours).items()}
        found[sequence_parallel] = out.loss.detach(), grads
    try:
        ours(ids_of(), labels=ids_of(), output_router_logits=True)
    except SpecError as refusal:
        said = str(refusal)
    return found, said


def test_the_balance_of_experts_counts_once(made):
    model, adapter = made["beside modules, with patterns"]
    ours = adapted(model, adapter)
    plain = ours(ids_of(length=16), labels=ids_of(length=16)).loss.detach()
    loss = ours(ids_of(length=16), labels=ids_of(length=16), output_router_logits=True).loss
    loss.backward()
    assert abs(loss - plain) > 1e-3
    for found, said in pool(2).run(balanced, model, adapter):
        assert said.startswith("output_router_logits: a sequence of 13 is padded for 2 processes")
        for own_loss, grads in found.values():
            assert relative(own_loss, loss) < TOLERANCE
            for path, of in bind.factors(ours).items():
                assert all(relative(grads[path][name], factor.grad) < TOLERANCE for name, factor in of.items())


def test_what_is_merged_is_what_peft_merges(made):
    for model, adapter in made.values():
        theirs = peft.PeftModel.from_pretrained(stock(model), adapter).merge_and_unload()
        for path, layer in bind.layers(adapted(model, adapter)).items():
            [name] = peft_format.adapted_paths(path, layer.spec).values()
            merged = lora_fn.merge(layer.params(), layer.spec)["weight"]
            known = theirs.get_parameter(name if layer.spec.raw else f"{name}.weight")
            assert relative(merged, known) < TOLERANCE
            if layer.spec.raw:
                assert relative(layer().detach(), merged) < TOLERANCE


def test_merged_files_have_the_logits_of_peft(made, tmp_path):
    for name, (model, adapter) in made.items():
        told = merge(Path(model), [Path(adapter)], tmp_path / name, quiet=True)
        theirs = peft.PeftModel.from_pretrained(stock(model), adapter).merge_and_unload()(ids_of()).logits
        assert relative(stock(tmp_path / name)(ids_of()).logits, theirs) < TOLERANCE
        tuned = logits_with(Path(model), ids_of(), [convert.open_adapter(Path(adapter))])[1]
        assert relative(tuned, theirs) < TOLERANCE  # what `verify` compares with
        title, rows = convert.inspect(Path(adapter))
        assert told.layers == len(rows) - 1 and f"{told.layers} layers" in title
        found = {row[0]: row[1:6] for row in rows[1:]}
        for path, spec in bind.specs(adapted(model, adapter)).items():
            expected = [spec.kind, spec.in_features, spec.out_features, spec.rank, f"{spec.scaling:g}"]
            assert found[path] == expected
    model, first = made["both"]
    second = made["beside modules, with patterns"][1]
    merge(Path(model), [Path(first), Path(second)], tmp_path / "two", quiet=True)
    ours = stock(model)
    for adapter in (first, second):
        for path, layer in bind.layers(adapted(model, adapter)).items():
            [name] = peft_format.adapted_paths(path, layer.spec).values()
            with torch.no_grad():
                ours.get_parameter(name if layer.spec.raw else f"{name}.weight").add_(
                    lora_fn.delta(layer.params(), layer.spec)
                )
    assert relative(stock(tmp_path / "two")(ids_of()).logits, ours(ids_of()).logits) < TOLERANCE


def test_an_adapter_of_another_model_is_not_merged(made, moe, tmp_path):
    with pytest.raises(FileError, match=r"gate_up_proj' has shape \(3, 32, 96\), the adapter of .* expects|has no '"):
        merge(Path(moe["gpt_oss"]), [Path(made["beside modules, with patterns"][1])], tmp_path / "merged", quiet=True)
    shutil.copytree(made["both"][1], tmp_path / "named")
    config = json.loads((tmp_path / "named" / checkpoint.CONFIG).read_text())
    (tmp_path / "named" / checkpoint.CONFIG).write_text(json.dumps(config | {"target_parameters": ["other"]}))
    with pytest.raises(FileError, match="experts has adapters of 2 parameters, and of those that we know"):
        convert.inspect(tmp_path / "named")


def test_training_follows_pefts(made, tmp_path):
    model, _ = made["both"]
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["v_proj"], target_parameters=BOTH)
    theirs = peft.get_peft_model(stock(model), config)
    theirs.save_pretrained(tmp_path)
    ours = adapted(model, tmp_path)
    losses = []
    for tuned in (theirs.train(), ours.train()):
        optimizer = torch.optim.AdamW([p for p in tuned.parameters() if p.requires_grad], lr=1e-2)
        losses.append([])
        for step in range(5):
            loss = tuned(ids_of(seed=step), labels=ids_of(seed=step)).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[-1].append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=TOLERANCE) and losses[0][-1] < losses[0][0]


def test_a_new_adapter_changes_no_bit_and_comes_off(made):
    for model, adapter in made.values():
        ours = stock(model)
        before, names, state = ours(ids_of()).logits, [n for n, _ in ours.named_parameters()], ours.state_dict()
        classes = [type(m) for m in ours.modules()]
        adapters.wrap(ours, dataclasses.replace(adapters.read_spec(adapter), init_lora_weights=True))
        assert torch.equal(ours(ids_of()).logits, before)
        held = dict(ours.named_parameters())
        assert set(names) <= set(held) and all(torch.equal(held[n], state[n]) for n in names)
        assert {n for n, p in held.items() if p.requires_grad} == set(bind.flat(bind.factors(ours)))
        taken = bind.detach(ours)
        assert [type(m) for m in ours.modules()] == classes and [n for n, _ in ours.named_parameters()] == names
        assert torch.equal(ours(ids_of()).logits, before)
        adapters.load(bind.attach(ours, taken), adapter)
        assert torch.equal(ours(ids_of()).logits, adapted(model, adapter)(ids_of()).logits)


def test_the_same_seed_gives_the_same_factors_as_peft_would_draw_in_size(made):
    """PEFT draws lora_A uniformly within 1 / sqrt(in): so do we; and one seed is one adapter."""
    model, adapter = made["both"]
    one, other = (adapters.wrap(stock(model), adapters.read_spec(adapter), seed=3) for _ in range(2))
    for path, of in bind.factors(one).items():
        bound = bind.specs(one)[path].in_features ** -0.5
        assert of["lora_A"].abs().max() <= bound and torch.equal(of["lora_A"], bind.factors(other)[path]["lora_A"])


@pytest.fixture(scope="module")
def tuned(made):
    """An adapted Mixtral, its logits, and the gradients of its factors."""
    ours = adapted(*made["both"])
    out = ours(ids_of(), labels=ids_of())
    out.loss.backward()
    grads = {name: p.grad.clone() for name, p in ours.named_parameters() if p.requires_grad}
    ours.zero_grad()
    return ours, out.logits.detach(), grads


def test_copies_pickles_and_hooks(tuned):
    ours, logits, _ = tuned
    written = io.BytesIO()
    torch.save(ours, written)
    written.seek(0)
    for other in (copy.deepcopy(ours), torch.load(written, weights_only=False)):
        assert torch.equal(other(ids_of()).logits, logits)
        with torch.no_grad():
            bind.factors(other)["model.layers.0.mlp.experts.lora.down_proj"]["lora_B"].zero_()
        assert not torch.equal(other(ids_of()).logits, logits) and torch.equal(ours(ids_of()).logits, logits)
    experts, seen = ours.model.layers[0].mlp.experts, []
    handle = experts.register_forward_hook(lambda *args: seen.append(args[0]))
    ours(ids_of())
    handle.remove()
    assert seen == [experts] and type(experts).__name__ == "LoraMixtralExperts"
    assert isinstance(experts, type(stock(ours.config.name_or_path).model.layers[0].mlp.experts))
    assert "gate_up_proj): RawLayer(experts, 32 -> 96, rank=4, scaling=2, num_experts=3" in repr(ours)


def test_a_forward_that_fails_leaves_the_parameters(tuned):
    ours, logits, _ = tuned
    experts = ours.model.layers[0].mlp.experts
    with pytest.raises(AttributeError):
        experts(None, None, None)
    assert all(isinstance(p, torch.nn.Parameter) for p in experts._parameters.values())
    assert torch.equal(ours(ids_of()).logits, logits)


def test_checkpointed_activations_and_functional_calls(tuned):
    ours, logits, grads = tuned
    ours.train()
    for reentrant in (False, True):
        ours.activation_checkpointing_enable({"use_reentrant": reentrant})
        if reentrant:
            ours.enable_input_require_grads()
        ours(ids_of(), labels=ids_of(), use_cache=False).loss.backward()
        assert all(torch.equal(ours.get_parameter(name).grad, g) for name, g in grads.items())
        ours.zero_grad()
    ours.activation_checkpointing_disable()
    ours.eval()
    factors = {name: p.detach() for name, p in ours.named_parameters() if p.requires_grad}

    def loss(factors):
        return functional_call(ours, factors, (ids_of(),), {"labels": ids_of()}).loss

    halves = {name: p / 2 for name, p in factors.items()}
    assert not torch.equal(functional_call(ours, halves, (ids_of(),)).logits, logits)
    assert torch.equal(ours(ids_of()).logits, logits)
    found = torch.autograd.grad(loss({n: p.requires_grad_() for n, p in factors.items()}), list(factors.values()))
    assert all(relative(g, grads[name]) < TOLERANCE for name, g in zip(factors, found, strict=True))


def test_another_alpha(made, tuned):
    ours, logits, _ = tuned
    other = copy.deepcopy(ours)
    adapters.rescale(other, LoraSpec(alpha=8, alpha_pattern={"down_proj": 16}))
    for path, layer in bind.layers(other).items():
        assert layer.scaling.item() == (4 if path.endswith("down_proj") else 2)
    assert not torch.equal(other(ids_of()).logits, logits)


class Owner(torch.nn.Module):
    """Raw parameters of every number of dimensions, and torch.func's transforms go through it."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two = torch.nn.Parameter(torch.randn(5)), torch.nn.Parameter(torch.randn(5, 3))
        self.three = torch.nn.Parameter(torch.randn(2, 3, 5))
        self.count = torch.nn.Parameter(torch.zeros(2, 3, dtype=torch.int32), requires_grad=False)
        self.linear = torch.nn.Linear(5, 5)

    def forward(self, x):
        return self.linear(x @ self.two.T + self.one) @ self.three[0].T @ self.three[1]


def small():
    model = torch.nn.Module()
    model.owner = Owner()
    model.forward = model.owner.forward
    return model


def test_gradients_by_torch_func_are_those_of_the_merged_weight():
    model = small()
    spec = LoraSpec(rank=2, alpha=3, target_modules=("linear",), target_parameters=("two", "three"))
    adapters.wrap(model, LoraSpec(**{**vars_of(spec), "init_lora_weights": False}))
    x, cotangent = torch.randn(4, 3), torch.randn(4, 5)
    factors = {n: p.detach() for n, p in model.owner.named_parameters() if p.requires_grad}
    found = grad(lambda f: (functional_call(model.owner, f, (x,)) * cotangent).sum())(factors)
    assert set(found) == {f"{at}.lora_{ab}" for at in ("lora.two", "lora.three", "linear") for ab in "AB"}
    assert model.owner.linear.spec.kind == "linear"

    def dense(f):
        o = model.owner
        two = o.two + 1.5 * f["lora.two.lora_B"] @ f["lora.two.lora_A"]
        three = o.three + 1.5 * torch.einsum("eor,eri->eoi", f["lora.three.lora_B"], f["lora.three.lora_A"])
        linear = o.linear.weight + 1.5 * f["linear.lora_B"] @ f["linear.lora_A"]
        y = torch.nn.functional.linear(x @ two.T + o.one, linear, o.linear.bias)
        return ((y @ three[0].T @ three[1]) * cotangent).sum()

    expected = grad(dense)(factors)
    assert all(relative(found[name], expected[name]) < TOLERANCE for name in found)
    taken = bind.detach(model)
    assert type(model.owner) is Owner and type(model.owner.linear) is torch.nn.Linear
    assert bind.attach(model, taken).owner.linear.spec.kind == "linear"


def vars_of(spec):
    return {name: value for name, value in spec.to_dict().items() if value not in (None, ())}


ERRORS = {
    ("thre",): r"target_parameters 'thre' matches none of the 6 parameters; the nearest names are three",
    ("one",): r"owner.one: is a parameter of shape \[5\] and torch.float32, expected two or three dimensions",
    ("count",): r"owner.count: is a parameter of shape \[2, 3\] and torch.int32, expected two or three dimensions",
    ("three", "linear.weight"): r"owner.linear.weight: belongs to a layer that is adapted too; leave one of them",
}


@pytest.mark.parametrize("names", ERRORS)
def test_what_cannot_be_adapted_is_said_and_changes_nothing(names):
    model = small()
    with pytest.raises(TargetError, match=ERRORS[names]):
        adapters.wrap(model, LoraSpec(target_modules=("linear",), target_parameters=names))
    assert type(model.owner) is Owner and model.owner.two.requires_grad


def test_the_top_and_tied_parameters_are_refused():
    with pytest.raises(TargetError, match=r"'two' matches none of the 2 parameters"):
        adapters.wrap(Owner(), LoraSpec(target_modules=(), target_parameters=("two",)))
    model = small()
    model.other = torch.nn.Module()
    model.other.twin = model.owner.two
    with pytest.raises(TargetError, match=r"owner.two: is the same parameter as \['owner.two', 'other.twin'\]"):
        adapters.wrap(model, LoraSpec(target_modules=(), target_parameters=("two",)))


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"dropout": 0.1}, "cannot be with dropout or lora_bias, as in PEFT"),
        ({"lora_bias": True}, "cannot be with dropout or lora_bias, as in PEFT"),
        ({"use_dora": True}, "cannot be with a variant of the update"),
        ({"init_lora_weights": "pissa"}, "cannot be with an init_lora_weights other than True, False or 'gaussian'"),
    ],
)
def test_what_pefts_wrapper_refuses_is_refused_when_the_spec_is_made(options, reason):
    with pytest.raises(SpecError, match=f"LoraSpec.target_parameters: {reason}"):
        LoraSpec(target_modules=(), target_parameters=("a",), **options)


def test_other_layouts_and_names_on_disk_are_errors(made, tmp_path):
    model, adapter = made["both"]
    shutil.copytree(adapter, tmp_path / "other")
    tensors = load_file(f"{adapter}/{checkpoint.WEIGHTS}")
    inner = "base_model.model.model.layers.0.mlp.experts.base_layer.lora_A.weight"
    outer = inner.replace(".base_layer", "")
    problems = {
        r"has shape \[32, 12\], expected \[12, 32\]": {inner: tensors[inner].T.contiguous()},
        r"has shape \[3, 4, 32\], expected \[12, 32\]": {inner: tensors[inner].view(3, 4, 32)},
        r"has shape \[12, 48\], expected \[12, 32\]": {inner: tensors[outer], outer: tensors[inner].clone()},
    }
    for message, change in problems.items():
        save_file(tensors | change, tmp_path / "other" / checkpoint.WEIGHTS)
        with pytest.raises(FileError, match=message):
            adapted(model, tmp_path / "other")
    save_file({k: t for k, t in tensors.items() if k != inner}, tmp_path / "other" / checkpoint.WEIGHTS)
    with pytest.raises(
        FileError, match=r"experts.base_layer.lora_A.weight' is missing, expected with shape \[12, 32\]"
    ):
        adapted(model, tmp_path / "other")


@pytest.mark.parametrize("version", (None, "0.18.2"))
def test_the_layout_of_an_older_peft_is_refused(version, made, tmp_path):
    model, adapter = made["both"]
    shutil.copytree(adapter, tmp_path / "old")
    config = json.loads((tmp_path / "old" / checkpoint.CONFIG).read_text())
    (tmp_path / "old" / checkpoint.CONFIG).write_text(json.dumps(config | {"peft_version": version}))
    for refused in (lambda: adapted(model, tmp_path / "old"), lambda: convert.open_adapter(tmp_path / "old")):
        with pytest.raises(FileError, match=f"'peft_version' is {version!r}, expected 0.19 or newer, as PEFT took"):
            refused()


def test_the_layout_in_files():
    """[experts * r, in] and [out, r * experts], element by element."""
    spec = LayerSpec(kind="experts", num_experts=2, in_features=3, out_features=4, rank=5, raw=("p", "q"))
    a, b = torch.randn(2, 5, 3), torch.randn(2, 4, 5)
    path = peft_format.raw_path("m.experts.p")
    stored = peft_format.to_state_dict({path: {"lora_A": a, "lora_B": b}}, {path: spec})
    assert list(stored) == [f"base_model.model.m.experts.base_layer.lora_{n}.weight" for n in "AB"]
    stored_a, stored_b = stored.values()
    for e in range(2):
        for r in range(5):
            assert torch.equal(stored_a[e * 5 + r], a[e, r]) and torch.equal(stored_b[:, r * 2 + e], b[e, :, r])
    back = peft_format.from_state_dict(stored, {path: spec})[path]
    assert torch.equal(back["lora_A"], a) and torch.equal(back["lora_B"], b)
    assert {k: tuple(t.shape) for k, t in stored.items()} == peft_format.shapes_on_disk({path: spec})
