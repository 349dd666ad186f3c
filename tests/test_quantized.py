"""A model whose weights are quantised: the same values at every size of the axis, and trained through."""

import dataclasses
import shutil
from pathlib import Path

import jobs
import oracle
import pytest
import torch
from pool import pool
from small_models import COMMON, ids_of, relative, small_models_fixture, stock_class  # noqa: F401  (a fixture)
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import adapters
import adapters.peft
import lora_fn
from adapters import cli, models, quantized, runs, train
from adapters.parallel import ParallelLayer, attribute
from adapters.train import Job
from lora_fn import Axis, LoraSpec, Quantization, SpecError, TargetError, checkpoint, quantize, sharding

NF4 = Quantization(code="nf4", block=2)
FORMS = {
    "nf4": NF4,
    "int8": Quantization(code="int8"),
    "fp8": Quantization(code="fp8"),
    "one scale": Quantization(code="int8", scale="tensor"),
}
# What bitsandbytes 0.50.2's CPU quantiser makes of `ramp()`, blocks of 64.
GOLDEN = (
    *(17, 17, 34, 51, 68, 85, 103, 136, 154, 171, 204, 221, 222, 238, 255, 240, 1, 17, 18, 34, 51, 68, 86, 103, 136),
    *(154, 187, 204, 221, 238, 238, 255, 0, 1, 17, 18, 34, 51, 69, 86, 119, 137, 154, 187, 204, 221, 238, 238, 255, 0),
    *(1, 17, 18, 35, 52, 69, 86, 120, 137, 170, 188, 205, 221, 238),
)


def ramp():
    return (torch.arange(-64, 64) * 3 % 101 - 50.0).view(1, 128) / 7


def test_nf4_is_bitsandbytes_to_the_byte():
    packed, scale, _ = quantize.quantize(ramp(), Quantization(code="nf4"))
    assert packed.flatten().tolist() == list(GOLDEN)
    assert scale.flatten().tolist() == [7.142857074737549] * 2


def test_nf4_is_what_bitsandbytes_makes_here():
    functional = pytest.importorskip("bitsandbytes.functional")
    for seed in range(5):
        weight = torch.randn(32, 256, generator=torch.Generator().manual_seed(seed))
        ours = quantize.quantize(weight, Quantization(code="nf4"))
        packed, state = functional.quantize_4bit(weight, blocksize=64, quant_type="nf4")
        assert torch.equal(ours.packed.flatten(), packed.flatten())
        assert torch.equal(ours.scale.flatten(), state.absmax)
        assert torch.equal(quantize.dequantize(ours, torch.float32), functional.dequantize_4bit(packed, state))


@pytest.mark.parametrize("how", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_what_reads_back_is_near(how, dtype):
    """Within half a step of the code; zeros stay; what is read back is read back again the same."""
    weight = torch.randn(24, 32, generator=torch.Generator().manual_seed(0)).to(dtype)
    weight[3] = 0
    held = quantize.quantize(weight, how)
    again = quantize.dequantize(held, torch.float32)
    reach = {"nf4": 0.16, "int8": 0.5 / 127, "fp8": 1 / 16}[how.code]
    most = quantize.largest(weight, how)
    most = most if how.scale == "tensor" else most.repeat_interleave(32 // most.shape[1], 1)
    assert ((again - weight.float()).abs() <= reach * most * 1.001).all()
    assert not again[3].any()
    twice = quantize.dequantize(quantize.quantize(again, how), torch.float32)
    assert relative(twice, again) < 1e-6


@pytest.mark.parametrize("how", FORMS.values(), ids=FORMS)
def test_nothing_of_the_weights_size_is_saved_for_the_backward(how):
    """But the packed weight itself, which stays anyway; of a plain weight, the weight is."""
    spec = lora_fn.LayerSpec(kind="linear", in_features=128, out_features=256, rank=2, quantization=how)
    held = quantize.quantize(torch.randn(256, 128), how)
    params = {"weight": held.packed, "weight_scale": held.scale}
    params |= {"lora_A": torch.randn(2, 128).requires_grad_(), "lora_B": torch.randn(256, 2).requires_grad_()}
    x, saved = torch.randn(3, 128, requires_grad=True), {}

    def note(t):
        saved[t.data_ptr()] = t
        return t

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        y = lora_fn.apply(params, x, spec)
    base = {held.packed.data_ptr(), held.scale.data_ptr()}
    assert base <= set(saved)
    rest = sum(t.numel() * t.element_size() for at, t in saved.items() if at not in base)
    assert rest <= 4 * (128 * 2 + 256 * 2 + 3 * 128 + 3 * 2) * 2
    y.sum().backward()
    assert relative(x.grad, torch.ones(3, 256) @ whole_weight(params, spec)) < 1e-5


def whole_weight(params, spec):
    """W + scaling * B A, with W as the oracle dequantises it."""
    how = spec.quantization
    block = how.block if how.scale == "block" else 1 << 30
    weight = oracle.dequantized(params["weight"], params["weight_scale"], how.code, block)
    return weight + spec.scaling * params["lora_B"] @ params["lora_A"]


def test_a_gradient_of_a_gradient_goes_through():
    held = quantize.quantize(torch.randn(6, 4), NF4)
    weight = quantize.dequantize(held, torch.float32)

    def norm(x, product):
        return torch.func.grad(lambda x: product(x).square().sum())(x).square().sum()

    x = torch.randn(3, 4)
    ours = torch.func.grad(lambda x: norm(x, lambda x: quantize.linear(x, held)))(x)
    assert relative(ours, torch.func.grad(lambda x: norm(x, lambda x: x @ weight.T))(x)) < 1e-5


def test_a_cast_model_is_refused():
    model = adapters.quantize(nn.Sequential(nn.Linear(8, 8)), "int8").to(torch.bfloat16)
    with pytest.raises(SpecError, match=r"a weight held as int8: is of torch.int8, its scale of torch.bfloat16"):
        model(torch.randn(2, 8).to(torch.bfloat16))


# Models in memory.


def small():
    torch.manual_seed(0)
    return nn.ModuleDict({"up": nn.Linear(16, 24), "down": nn.Linear(24, 16, bias=False), "lm_head": nn.Linear(16, 5)})


def test_linear_layers_are_quantised_in_place():
    model, plain = small(), small()
    assert adapters.quantize(model, NF4) is model
    assert isinstance(model["up"], quantized.QuantizedLinear) and type(model["lm_head"]) is nn.Linear
    assert model["up"].weight.dtype == torch.uint8 and model["up"].weight.shape == (24, 8)
    x = torch.randn(3, 16)
    read = quantize.dequantize(quantize.quantize(plain["up"].weight.detach(), NF4), torch.float32)
    assert torch.allclose(model["up"](x), x @ read.T + plain["up"].bias, atol=1e-6)
    held = quantized.base_bytes(model.requires_grad_(False), torch.float32)
    assert held.plain == sum(p.numel() * 4 for p in plain.parameters())
    assert held.held == held.plain - (16 * 24 * 4 - 16 * 24 // 2 - 16 * 24 // 2 * 4) * 2


def test_training_does_not_touch_the_base():
    model = adapters.wrap(adapters.quantize(small(), NF4), LoraSpec(rank=2, target_modules=("up", "down")))
    before = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    x, losses = torch.randn(32, 16), []
    for _ in range(30):
        loss = (model["down"](torch.relu(model["up"](x))) - x).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters() if not p.requires_grad)


def test_an_adapter_goes_to_disk_and_back(tmp_path):
    model = adapters.wrap(adapters.quantize(small(), "int8"), LoraSpec(rank=2, target_modules=("up",)))
    nn.init.normal_(model["up"].lora_B)
    adapters.save(model, tmp_path / "adapter")
    for base in (adapters.quantize(small(), "int8"), small()):
        other = adapters.wrap(base, adapters.read_spec(tmp_path / "adapter"))
        adapters.load(other, tmp_path / "adapter")
        assert torch.equal(other["up"].lora_B, model["up"].lora_B)


REFUSED = {
    "pissa": dict(init_lora_weights="pissa"),
    "olora": dict(init_lora_weights="olora"),
    "loftq": dict(init_lora_weights="loftq", loftq_config={"loftq_bits": 4, "loftq_iter": 1}),
    "mica": dict(init_lora_weights="mica"),
    "corda": dict(init_lora_weights="corda"),
    "lora_ga": dict(init_lora_weights="lora_ga"),
}
WHY = {"loftq": "lost here already", "mica": "needs the weight itself"}


@pytest.mark.parametrize("how", REFUSED)
def test_a_start_that_changes_the_weight_is_refused(how):
    model = adapters.quantize(small(), "int8")
    why = WHY.get(how, "makes the base a residual")
    with pytest.raises(TargetError, match=rf"up: is held as int8, and init_lora_weights '{how}' {why}|{why}"):
        adapters.wrap(model, LoraSpec(rank=2, target_modules=("up",), **REFUSED[how]), batches=[])
    assert isinstance(model["up"], quantized.QuantizedLinear)


def test_what_cannot_be_is_said_before_anything_is_changed():
    model = small()
    with pytest.raises(SpecError, match=r"(?s)up: .*the 16 inputs are no whole blocks of 64.*\n.*down: .*24 inputs"):
        adapters.quantize(model, "nf4")
    assert type(model["up"]) is nn.Linear
    with pytest.raises(SpecError, match=r"Quantization.code: is 'int4', expected one of"):
        adapters.quantize(model, "int4")
    with pytest.raises(TargetError, match="no linear layer that could be"):
        adapters.quantize(nn.ModuleDict({"lm_head": nn.Linear(4, 4)}), "int8")
    tied = small()
    tied["down"].weight = nn.Parameter(tied["up"].weight.detach().T.contiguous())
    tied["other"] = nn.Linear(24, 16)
    tied["other"].weight = tied["down"].weight
    with pytest.raises(SpecError, match=r"down: shares a parameter with \['other'\]"):
        adapters.quantize(tied, "int8")
    adapters.quantize(model, "int8")
    with pytest.raises(SpecError, match="up: is held as int8 already"):
        adapters.quantize(model, "int8")
    with pytest.raises(TargetError, match="its weight is to be trained"):
        adapters.wrap(model, LoraSpec(rank=2, target_modules=("down",), modules_to_save=("up",)))
    with pytest.raises(SpecError, match="variant 'kasa' changes the weight"):
        adapters.wrap(model, LoraSpec(rank=2, target_modules=("down",), kasa_config={}))
    adapters.wrap(model, LoraSpec(rank=2, target_modules=("down",)))
    with pytest.raises(TargetError, match="is adapted already"):
        adapters.quantize(model, "int8")
    with pytest.raises(TargetError, match="down: is quantised, so its weight is not the stock model's"):
        dict(adapters.merged_weights(model))


# Hugging Face models, out of files.


@pytest.mark.parametrize("how", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("form", ({}, {"fuse_qkv": True, "fuse_gate_up": True}), ids=("apart", "fused"))
def test_a_model_is_quantised_to_the_same_values_at_every_tp(small_models, how, form):
    """Every process's part, joined, is what the whole weight becomes."""
    for size in (1, 2, 4) if not form else (2, 8):
        each = [
            models.load(small_models["llama"], axis=Axis(name="tp", size=size, index=i), quantize=how, **form)
            for i in range(size)
        ]
        plain = models.load(small_models["llama"], **form)
        for path in ("self_attn.o_proj", "mlp.down_proj", *(PROJECTIONS[bool(form)])):
            layers = [m.model.layers[1].get_submodule(path) for m in each]
            spec = layers[0].spec
            names = [n for n in sharding.names(spec) if n.startswith("weight")]
            local = [{n: m.get_parameter(attribute(spec, n)).detach() for n in names} for m in layers]
            joined = lora_fn.unshard(local, spec)
            whole = plain.model.layers[1].get_submodule(path)
            weights = {n: whole.get_parameter(attribute(spec, n)).detach() for n in names if "scale" not in n}
            if set(weights) != {"weight"}:
                continue  # copies of heads have weights of their own, whose parts are tested apart
            expected = quantize.quantize(weights["weight"], how)
            assert torch.equal(joined["weight"].view(torch.uint8), expected.packed.view(torch.uint8)), path
            assert torch.equal(joined["weight_scale"], expected.scale), path


PROJECTIONS = {
    False: ("self_attn.q_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj"),
    True: ("self_attn.qkv_proj", "mlp.gate_up_proj"),
}


# The whole model on real processes.


def adapted(model, **options):
    """A model adapted with factors that add something."""
    spec = LoraSpec(rank=3, alpha=6, target_modules="all-linear", **options)
    adapters.wrap(model, spec, seed=1)
    with torch.no_grad():
        for path, layer in adapters.layers(model).items():
            canonical = {}
            for name in layer.trained():
                if name.startswith("lora_B"):
                    generator = torch.Generator().manual_seed(len(path) + sum(map(ord, path + name)))
                    shape = sharding.canonical_shape(layer.spec, name)
                    canonical[name] = 0.1 * torch.randn(shape, generator=generator)
            for name, part in lora_fn.shard(canonical, layer.spec, layer.spec.axis.index or 0).items():
                layer.parameter(name).copy_(part)
    return model


def run(model):
    """The loss, and this process's gradients by path and name."""
    ids = ids_of(length=12)
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    grads = {path: {n: p.grad for n, p in layer.trained().items()} for path, layer in adapters.layers(model).items()}
    return loss.detach(), grads


def on_a_process(mesh, directory, how, options, form):
    model = models.load(directory, mesh=mesh, sequence_parallel=True, quantize=how, **form)
    found = models.load(directory, mesh=mesh, sequence_parallel=True, **form)
    adapters.quantize(found, how)
    same = all(
        torch.equal(p.view(torch.uint8), model.get_parameter(n).view(torch.uint8)) for n, p in found.named_parameters()
    )
    specs = adapters.specs(adapted(model, **options))
    specs = {path: dataclasses.replace(spec, axis=spec.axis.unbound) for path, spec in specs.items()}
    loss, grads = run(model)
    return loss, grads, specs, same


@pytest.mark.parametrize(
    ("how", "options", "form"),
    (
        (NF4, {}, {"fuse_qkv": True, "fuse_gate_up": True}),
        (NF4, {"use_dora": True}, {}),
        (Quantization(code="int8"), {}, {}),
        (Quantization(code="fp8"), {"use_dora": True}, {"fuse_qkv": True}),
        (Quantization(code="int8", scale="tensor"), {}, {}),
    ),
)
def test_loss_and_gradients_are_those_of_the_dequantised_model(small_models, how, options, form):
    """On two processes under sequence parallel, against one process whose plain weights are what is read back."""
    each = pool(2).run(on_a_process, small_models["llama"], how, options, form)
    assert all(same for *_, same in each)
    dense = models.load(small_models["llama"], **form)
    for path, module in dense.named_modules():
        if isinstance(module, ParallelLayer) and path.endswith("_proj"):
            for name in [n for n in sharding.names(module.spec) if n.startswith("weight")]:
                weight = module.get_parameter(attribute(module.spec, name))
                packed, scale, _ = quantize.quantize(weight.detach(), how)
                block = how.block if how.scale == "block" else 1 << 30
                weight.data.copy_(oracle.dequantized(packed, scale, how.code, block))
    loss, grads = run(adapted(dense, **options))
    specs = each[0][2]
    assert all(relative(got, loss) < 1e-5 for got, *_ in each)
    for path, wanted in grads.items():
        joined = lora_fn.unshard([got[path] for _, got, *_ in each], specs[path])
        errors = {name: relative(joined[name], wanted[name]) for name in wanted}
        assert max(errors.values()) < 1e-5, (path, errors)


# lora-fn finetune --quantize.

WIDE = {"hidden_size": 64, "head_dim": 16, "intermediate_size": 128}  # whole blocks of 64, on two processes too


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """A directory with a model and a tokenizer."""
    import transformers

    torch.manual_seed(0)
    directory = tmp_path_factory.mktemp("wide") / "llama"
    stock_class("llama")(transformers.LlamaConfig(**COMMON | WIDE)).save_pretrained(directory)
    jobs.save_tokenizer(directory)
    return str(directory)


@pytest.fixture(scope="module")
def job(wide, tmp_path_factory):
    place = tmp_path_factory.mktemp("runs")
    job = Job(
        model=wide,
        data=(jobs.write_lines(place / "data.jsonl", jobs.uneven(18)),),
        output=str(place / "tp-2"),
        lora=LoraSpec(rank=4, target_modules="all-linear", exclude_modules=("lm_head",)),
        quantize="nf4",
        tp=2,
        sequence_parallel=True,
        sequence_length=40,
        batch_size=4,
        steps=4,
        learning_rate=1e-2,
        warmup=2,
        checkpoint_every=2,
    )
    jobs.run(job)
    return job


@pytest.mark.parametrize("changes", ({}, {"tp": 1, "sequence_parallel": False}), ids=("as it was", "on one process"))
def test_a_run_goes_on(job, changes):
    """From its checkpoint of half the steps: bit for bit, or on another number of processes to rounding."""
    other = jobs.elsewhere(job, f"again-{len(changes)}", **changes)
    shutil.copytree(job.output, other.output)
    shutil.rmtree(Path(other.output) / runs.CHECKPOINTS / "step-000000004")
    for file in (checkpoint.CONFIG, checkpoint.WEIGHTS, runs.PLOT):
        (Path(other.output) / file).unlink()
    jobs.run(other, resume=True)
    losses = [torch.tensor(jobs.column(each, "loss")) for each in (other, job)]
    assert losses[1][-1] < losses[1][0]
    if changes:
        assert relative(*losses) < 1e-5
    else:
        assert torch.equal(*losses)
        assert all(torch.equal(p, jobs.adapter(job)[name]) for name, p in jobs.adapter(other).items())


def test_a_run_tells_what_the_base_takes(wide, job, tmp_path, capsys):
    options = ["--rank", "2", "--steps", "1", "--batch-size", "2", "--sequence-length", "40", "--quiet"]
    given = ["finetune", "--model", wide, "--data", *job.data, "--output", str(tmp_path / "run"), *options]
    assert cli.main([*given, "--quantize", "int8"]) == 0
    told = capsys.readouterr().out
    weights = 2 * (64 * 128 * 2 + 64 * 64 * 2 + 64 * 128 * 3)  # q and o, k and v, gate, up and down, of two layers
    scales = 2 * (128 + 64 + 64 * 2 + 128 * 2 + 64)
    rest = 99 * 64 * 2 + 64 * 5
    assert f"{weights + 4 * (scales + rest):,}" in told and f"{4 * (weights + rest):,}" in told
    with pytest.raises(SystemExit):
        cli.main([*given, "--quantize", "int3"])
    assert "invalid choice: 'int3'" in capsys.readouterr().err


REFUSED_JOBS = {
    "blocks": ({"tp": 4}, r"o_proj: .*the 128 inputs, cut into 4 equal parts are no whole blocks of 64"),
    "pissa": ({"lora": LoraSpec(init_lora_weights="pissa")}, r"q_proj: is held as nf4, and init_lora_weights 'pissa'"),
}


@pytest.mark.parametrize("name", REFUSED_JOBS)
def test_a_job_that_cannot_be_is_refused_before_anything_starts(job, name):
    changes, why = REFUSED_JOBS[name]
    with pytest.raises(lora_fn.LoraFnError, match=why):
        train.check(jobs.elsewhere(job, name, **changes), resume=False)
    with pytest.raises(SpecError, match="--quantize: is 'int3', expected one of nf4, int8, fp8"):
        dataclasses.replace(job, quantize="int3")


@pytest.mark.parametrize("how", FORMS.values(), ids=FORMS)
def test_a_layers_spec_goes_to_json_and_back(how):
    spec = lora_fn.LayerSpec(kind="row", in_features=16, out_features=24, rank=2, quantization=how)
    assert lora_fn.LayerSpec.from_json(spec.to_json()) == spec


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # Dynamo's own doing
def test_it_compiles_as_one_graph():
    held = quantize.quantize(torch.randn(24, 16), NF4)
    x = torch.randn(3, 16, requires_grad=True)

    def loss(x):
        return quantize.linear(x, held).square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    [found], [expected] = (torch.autograd.grad(f(x), [x]) for f in (compiled, loss))
    assert torch.equal(found, expected)


def test_named_adapters_stand_on_a_quantised_base():
    model = adapters.quantize(small(), "int8")
    held = adapters.ManyAdapters(model, LoraSpec(rank=4, target_modules=("up",)), places=2)
    held.add("fr", LoraSpec(rank=2, target_modules=("up",), init_lora_weights=False))
    x = torch.randn(2, 16)
    base = adapters.quantize(small(), "int8")["up"](x)
    held.select_rows(["fr", None])
    y = model["up"](x)
    assert torch.equal(y[1], base[1]) and not torch.allclose(y[0], base[0])


# Many adapters over one quantised base.


class Looked(TorchDispatchMode):
    """The sizes of what is looked up in the table of nf4's values."""

    def __init__(self):
        super().__init__()
        self.sizes = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **kwargs or {})
        if function is torch.ops.aten.embedding.default:
            self.sizes.append(out.numel())
        return out


@pytest.mark.parametrize("num", (1, 8))
def test_rows_with_adapters_of_their_own_dequantise_once(num):
    """Forward and gradients of each row are of its own adapter; the weight is dequantised once for all."""
    spec = lora_fn.LayerSpec(kind="linear", in_features=16, out_features=24, rank=2, quantization=NF4)
    held = quantize.quantize(torch.randn(24, 16), NF4)
    base = {"weight": held.packed, "weight_scale": held.scale}
    stacked = {"lora_A": torch.randn(num, 2, 16), "lora_B": torch.randn(num, 24, 2)}
    x, ids = torch.randn(num, 3, 16), torch.arange(num).flip(0)

    def many(factors, x):
        return lora_fn.apply_many({**base, **factors}, x, spec, ids)

    with Looked() as looked:
        y, back = torch.func.vjp(many, stacked, x)
    assert looked.sizes == [24 * 16]
    with Looked() as looked:
        grads, dx = back(torch.ones_like(y))
    assert looked.sizes == [24 * 16]
    for row, number in enumerate(ids.tolist()):
        own = {name: p[number] for name, p in stacked.items()}
        alone, back = torch.func.vjp(lambda f, x: lora_fn.apply({**base, **f}, x, spec), own, x[row])
        assert relative(y[row], alone) < 1e-5
        own_grads, own_dx = back(torch.ones_like(alone))
        assert relative(dx[row], own_dx) < 1e-5
        assert all(relative(grads[name][number], own_grads[name]) < 1e-5 for name in own)


def test_a_layer_in_two_places_is_one():
    class Twice(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.a = self.b = torch.nn.Linear(64, 64)

    model, calls = Twice(), []
    model.a.register_forward_hook(lambda *_: calls.append(1))
    adapters.quantize(model, "nf4")
    assert model.a is model.b and isinstance(model.a, adapters.quantized.QuantizedLinear)
    model.b(torch.ones(2, 64))
    assert calls == [1]


def test_a_front_over_fp8_has_factors_of_its_own_dtype():
    model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 64))
    adapters.quantize(model, "fp8", leave_out=())
    front = adapters.peft.get_peft_model(model, adapters.peft.LoraConfig(r=2, target_modules=["0"]))
    assert {p.dtype for p in front.parameters() if p.requires_grad} == {torch.float32}
    front(torch.ones(2, 64)).sum().backward()
