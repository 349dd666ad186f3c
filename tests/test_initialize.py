"""How an adapter starts: against stock PEFT on the whole model, at every size of the axis."""

import dataclasses
import re
import sys
import types
import weakref
from pathlib import Path

import peft
import pytest
import torch
from peft.tuners.lora import loraga as peft_loraga
from peft.utils import loftq_utils
from pool import pool
from safetensors.torch import load_file
from small_models import ids_of, relative, small_models_fixture, stock  # noqa: F401  (a fixture)
from torch import nn
from transformers.pytorch_utils import Conv1D

import adapters
import lora_fn
from adapters import bind, initialize, models
from adapters.files import plain
from adapters.merge import merge
from lora_fn import (
    FileError,
    FusedPart,
    LayerSpec,
    LoraSpec,
    SpecError,
    TargetError,
    factorize,
    peft_format,
    quantize,
    sharding,
    starts,
)
from lora_fn.initialize import seed_of
from lora_fn.reshard import gather

with pytest.MonkeyPatch.context() as patch:  # PEFT takes a dataclass from there, and does not say that it needs it
    if "attr" not in sys.modules:
        patch.setitem(sys.modules, "attr", types.SimpleNamespace(dataclass=dataclasses.dataclass))
    from peft.tuners.lora import corda as peft_corda

# What PEFT says of its own choices, and torch of the hooks of PEFT's LoRA-GA.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Full backward hook is firing"),
    pytest.mark.filterwarnings("ignore:lora with eva initialization"),
    pytest.mark.filterwarnings("ignore:Using Rank-Stabilized LoRA"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to"),
]

TOLERANCE, SEED = 1e-5, 3
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

# Of the small Llama, whose narrowest weight has 16 rows, and whose residual stream has 32 features.
COMMON = {"rank": 8, "alpha": 12, "target_modules": TARGETS}
CASES = {
    "pissa": {"init_lora_weights": "pissa"},
    "pissa, rslora": {"init_lora_weights": "pissa", "use_rslora": True},
    "olora": {"init_lora_weights": "olora", "rank_pattern": {"o_proj": 3}, "alpha_pattern": {"up_proj": 5}},
    "mica": {"init_lora_weights": "mica"},
    "corda": {"init_lora_weights": "corda"},
    "corda, kpm": {"init_lora_weights": "corda", "corda_config": {"corda_method": "kpm"}},
    "lora_ga": {"init_lora_weights": "lora_ga", "lora_ga_config": {}},
    "lora_ga, all of it": {
        "init_lora_weights": "lora_ga",
        "lora_ga_config": {"direction": "A2rBr", "scale": "weight_svd"},
    },
    "eva": {"init_lora_weights": "eva", "eva_config": {"rho": 3}},
}


def batches_of():
    """Samples of one row each, as PEFT's CorDA wants them, most of lengths that 4 does not divide."""
    rows = [ids_of(1, 49 + seed, seed) for seed in range(12)]
    return [{"input_ids": row, "attention_mask": torch.ones_like(row), "labels": row} for row in rows]


def spec_of(case):
    return LoraSpec(**COMMON | CASES[case])


def peft_config(spec):
    values = peft_format.to_config(spec, spec.target_modules, spec.target_modules)
    dropped = ("peft_type", "inference_mode", "corda_config", "lora_ga_config", "eva_config")
    kinds = {"corda": peft.tuners.lora.config.CordaConfig, "lora_ga": peft.LoraGAConfig, "eva": peft.EvaConfig}
    kept = {k: v for k, v in values.items() if k not in dropped}
    for init, kind in kinds.items():
        if spec.init_lora_weights == init:
            options = spec.options(f"{init}_config")
            kept[f"{init}_config"] = kind(**options)
    return peft.LoraConfig(**kept)


def stock_start(directory, case):
    """The stock model with PEFT's adapter, just started; and the gradients that it started from, {layer: gradient}."""
    spec, model = spec_of(case), stock(directory)
    config, given, measured = peft_config(spec), batches_of(), {}

    def run():
        for batch in given:
            out = model(**batch)
            if out.loss.requires_grad:
                out.loss.backward()

    with pytest.MonkeyPatch.context() as patch:
        if spec.init_lora_weights == "corda":
            patch.setattr(torch.Tensor, "float", torch.Tensor.double)  # its inverse and SVD are too rough in fp32
            peft_corda.preprocess_corda(model, config, run)
        if spec.init_lora_weights == "lora_ga":
            peft_loraga.preprocess_loraga(model, config, run)
            measured = {n: m._peft_loraga_grad for n, m in model.named_modules() if n.rpartition(".")[2] in TARGETS}
            draw_as_ours(patch, "lora_ga_init", list(measured))
            model.eval()
        tuned = peft.get_peft_model(model, config)
    for p in tuned.parameters():
        p.data = p.data.float()
    if spec.init_lora_weights == "eva":
        peft.initialize_lora_eva_weights(tuned, [one_batch(given)], show_progress_bar=False)
    return tuned.eval(), measured


def draw_as_ours(patch, name, paths):
    """Let an initialisation of PEFT draw what ours draws in the layers of these names, which come in that order."""
    real, left = getattr(peft.tuners.lora.LoraLayer, name), list(paths)

    def seeded(*args):
        torch.manual_seed(seed_of(SEED, left.pop(0)))
        return real(*args)

    patch.setattr(peft.tuners.lora.LoraLayer, name, seeded)


def one_batch(batches):
    """Batches as one, padded at the end."""
    return {
        name: nn.utils.rnn.pad_sequence(
            [b[name][0] for b in batches], batch_first=True, padding_value=-100 if name == "labels" else 0
        )
        for name in batches[0]
    }


def our_start(mesh, directory, case, **options):
    ours = models.load(directory, mesh=mesh, dtype=torch.float32, gather_logits=True, **options)
    spec, given = spec_of(case), batches_of()
    needs = starts.start_of(spec.init_lora_weights).needs
    data = {"batches": [one_batch(given)] if spec.init_lora_weights == "eva" else given}
    return adapters.wrap(ours, spec, seed=SEED, **(data if needs in (starts.INPUTS, starts.GRADIENT) else {}))


@dataclasses.dataclass
class Started:
    """A model whose adapter has just started; tensors are canonical, {name of a layer: {parameter: tensor}}."""

    logits: torch.Tensor
    tensors: dict
    grads: dict
    config: object
    measured: dict


def started(mesh, directory, options, cases=tuple(CASES)):
    """{case: Started} of ours; what was measured, on the first process."""
    found = {}
    for case in cases:
        with pytest.MonkeyPatch.context() as patch:
            told = spied(patch)
            ours = our_start(mesh, directory, case, **options)
        out = ours(ids_of(), labels=ids_of())
        out.loss.backward()
        made = Started(out.logits.detach(), {}, {}, adapters.lora_spec(ours), {})
        for path, layer in bind.layers(ours).items():
            whole = gather({n: p.detach() for n, p in layer.params().items()}, layer.spec)
            whole_grads = gather({n: p.grad for n, p in bind.factors(ours)[path].items()}, layer.spec)
            for part in layer.spec.updates:
                name = peft_format.part_path(path, part.name)
                names = {base: part.param(base) for base in ("lora_A", "lora_B")}
                made.tensors[name] = {base: whole[n] for base, n in names.items()}
                made.tensors[name]["weight"] = factorize.rows(whole, layer.spec, part)
                made.grads[name] = {base: whole_grads[n] for base, n in names.items() if n in whole_grads}
        for statistics, path in zip(told, bind.layers(ours), strict=bool(told)):
            made.measured |= {peft_format.part_path(path, part): s for part, s in statistics.items()}
        found[case] = made
    return found


def spied(patch):
    """What `factorize` is told from now on: a list of statistics."""
    told, real = [], factorize.factorize

    def factorized(*args, **options):
        told.append(options["statistics"])
        return real(*args, **options)

    patch.setattr(factorize, "factorize", factorized)
    return told


def pairing(ours, theirs):
    """The sign of each pair of columns of B and rows of A: singular vectors have either."""
    which = "lora_A" if theirs["lora_A"].abs().max() > 0 else "lora_B"
    products = ours[which] * theirs[which]
    return products.sum(1 if which == "lora_A" else 0).sign()


def signed(tensors, signs):
    return {n: t * signs[:, None] if n == "lora_A" else t * signs if n == "lora_B" else t for n, t in tensors.items()}


def close(a, b):
    return not (a.abs().max() or b.abs().max()) or relative(a, b) < TOLERANCE


def stock_tensors(module):
    factors = {"lora_A": module.lora_A["default"].weight, "lora_B": module.lora_B["default"].weight}
    tensors = {n: p.detach() for n, p in factors.items()} | {"weight": module.base_layer.weight.detach()}
    return tensors, {n: p.grad for n, p in factors.items() if p.grad is not None}, module.scaling["default"]


def stock_layers(tuned):
    return {
        name.removeprefix("base_model.model."): module
        for name, module in tuned.named_modules()
        if isinstance(module, peft.tuners.lora.LoraLayer)
    }


@pytest.fixture(scope="module")
def stock_started(small_models):
    """{case: Started} of stock PEFT."""
    found = {}
    for case in CASES:
        tuned, measured = stock_start(small_models["llama"], case)
        out = tuned(input_ids=ids_of(), labels=ids_of())
        out.loss.backward()
        each = {name: stock_tensors(module) for name, module in stock_layers(tuned).items()}
        tensors, grads, scalings = ({name: of[i] for name, of in each.items()} for i in range(3))
        found[case] = Started(out.logits.detach(), tensors, grads, (tuned.peft_config["default"], scalings), measured)
    return found


@pytest.fixture(scope="module")
def whole(small_models):
    """(weight, its gradient) of each layer of the stock model, before any adapter."""
    model = stock(small_models["llama"])
    model(input_ids=ids_of(), labels=ids_of()).loss.backward()
    linears = {name: m for name, m in model.named_modules() if name.rpartition(".")[2] in TARGETS}
    return {name: (m.weight.detach(), m.weight.grad) for name, m in linears.items()}


@pytest.fixture(scope="module")
def alone(small_models):
    """{case: Started} of ours on one process."""
    return started(None, small_models["llama"], {})


OPTIONS = {
    "plain": {},
    "sequence parallel": {"sequence_parallel": True},
    "fused": {"fuse_qkv": True, "fuse_gate_up": True, "sequence_parallel": True},
}


@pytest.mark.parametrize(
    "size, form",
    ((1, "plain"), (1, "fused"), (2, "plain"), (2, "sequence parallel"), (4, "plain"), (4, "fused")),
)
def test_every_start_is_pefts(size, form, small_models, stock_started, whole, alone):
    arguments = (started, small_models["llama"], OPTIONS[form])
    each = (
        pool(size).run(*arguments, timeout=180)
        if size > 1
        else [started(None, *arguments[1:]) if OPTIONS[form] else alone]
    )
    for case, theirs in stock_started.items():
        ours, (config, scalings) = each[0][case], theirs.config
        if starts.start_of(ours.config.init_lora_weights).needs == starts.WEIGHT:
            for name, of in ours.tensors.items():
                assert all(torch.equal(of[n], alone[case].tensors[name][n]) for n in ("lora_A", "lora_B")), (case, name)
        for other in each:
            assert relative(other[case].logits, theirs.logits) < TOLERANCE, case
            for name, of in other[case].tensors.items():
                assert all(torch.equal(t, ours.tensors[name][n]) for n, t in of.items()), (case, name)
                grads = other[case].grads[name]
                assert all(torch.equal(g, ours.grads[name][n]) for n, g in grads.items()), (case, name)
        assert ours.tensors.keys() == theirs.tensors.keys(), case
        assert dict(ours.config.rank_pattern) == config.rank_pattern
        for name, expected in theirs.tensors.items():
            mine, (weight, gradient), scaling = ours.tensors[name], whole[name], scalings[name]
            assert mine["lora_A"].shape == expected["lora_A"].shape, (case, name)
            assert close(mine["weight"] + scaling * mine["lora_B"] @ mine["lora_A"], weight), (case, name)
            chain = {"lora_A": mine["lora_B"].T @ gradient, "lora_B": gradient @ mine["lora_A"].T}
            assert ours.grads[name].keys() == theirs.grads[name].keys(), (case, name)
            for n, grad in ours.grads[name].items():
                assert close(grad, scaling * chain[n]), (case, name, n)
            if theirs.measured:
                assert close(ours.measured[name], theirs.measured[name]), (case, name)
            if theirs.measured and (size > 1 or form != "plain"):
                continue  # singular vectors between close singular values: another rounding is another vector
            signs = pairing(mine, expected)
            for n, tensor in signed(mine, signs).items():
                assert close(tensor, expected[n]), (case, name, n)
            for n, grad in signed(ours.grads[name], signs).items():
                assert close(grad, theirs.grads[name][n]), (case, name, n)


class Kinds(nn.Module):
    """A layer of each kind that one process can have."""

    def __init__(self):
        super().__init__()
        self.embedding, self.tall, self.wide = nn.Embedding(30, 12), nn.Linear(12, 20), nn.Linear(20, 10)
        self.conv1d = Conv1D(14, 10)

    def forward(self, ids):
        return self.conv1d(torch.tanh(self.wide(torch.tanh(self.tall(self.embedding(ids))))))


def kinds_of(seed=0):
    torch.manual_seed(seed)
    model = Kinds()
    nn.init.normal_(model.conv1d.weight)
    return model


# (initialisation, what PEFT calls it in code, what it can start). PEFT's OLoRA forgets that Conv1D is transposed.
ON_KINDS = {
    "pissa": ("pissa_init", ("tall", "wide", "conv1d")),
    "pissa_niter_2": ("pissa_init", ("tall", "wide", "conv1d")),
    "olora": ("olora_init", ("tall", "wide")),
    "orthogonal": ("orthogonal_init", ("tall", "wide", "conv1d")),
    "mica": ("mica_init", ("embedding", "tall", "wide", "conv1d")),
    "gaussian": ("reset_lora_parameters", ("embedding", "tall", "wide", "conv1d")),
}


@pytest.mark.parametrize("use_rslora", (False, True))
@pytest.mark.parametrize("init", ON_KINDS)
def test_every_kind_starts_as_in_peft(init, use_rslora):
    method, targets = ON_KINDS[init]
    options = {"init_lora_weights": init, "use_rslora": use_rslora, "alpha_pattern": {"wide": 3}}
    ids = torch.arange(30).view(3, 10)
    with pytest.MonkeyPatch.context() as patch:
        if init != "mica":
            draw_as_ours(patch, method, targets)
        config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=list(targets), **options)
        theirs = peft.get_peft_model(kinds_of(), config)
    ours, before = kinds_of(), torch.random.get_rng_state()
    adapters.wrap(ours, LoraSpec(rank=4, alpha=6, target_modules=targets, **options), seed=SEED)
    assert torch.equal(torch.random.get_rng_state(), before)
    y, expected = ours(ids), theirs(ids)
    assert relative(y, expected) < TOLERANCE and relative(y, kinds_of()(ids)) < TOLERANCE
    (y * torch.linspace(-1, 2, 14)).sum().backward()
    (expected * torch.linspace(-1, 2, 14)).sum().backward()
    for name in targets:
        layer, other = getattr(ours, name), getattr(theirs.base_model.model, name)
        assert close(layer.weight, other.base_layer.weight)
        pairs = {"lora_A": other.lora_A, "lora_B": other.lora_B}
        if name == "embedding":
            pairs = {"lora_A": other.lora_embedding_A, "lora_B": other.lora_embedding_B}
        for n, of in pairs.items():
            factor = of["default"] if name == "embedding" else of["default"].weight
            assert close(getattr(layer, n), factor), (name, n)
            assert (getattr(layer, n).grad is None) == (factor.grad is None) == (init == "mica" and n == "lora_B")
            assert factor.grad is None or close(getattr(layer, n).grad, factor.grad), (name, n)


def test_a_transposed_weight_starts_with_olora():
    model = adapters.wrap(kinds_of(), LoraSpec(rank=3, target_modules=("conv1d",), init_lora_weights="olora"))
    factors = {"lora_A": model.conv1d.lora_A, "lora_B": model.conv1d.lora_B}
    q, r = torch.linalg.qr(kinds_of().conv1d.weight.T)
    assert close(factors["lora_B"], q[:, :3]) and close(factors["lora_A"], r[:3])
    assert close(model.conv1d.weight + lora_fn.delta(factors, model.conv1d.spec), kinds_of().conv1d.weight)


# The code of QLoRA, as its paper has it (appendix E).
NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
    *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
    *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)


def nf4(weight):
    """A weight quantized in blocks of 64 elements, one element after the other."""
    flat, out = weight.flatten().tolist(), []
    for start in range(0, len(flat), 64):
        block = flat[start : start + 64]
        largest = max(map(abs, block))
        out += [min(NF4, key=lambda code, x=x: abs(code - x / largest)) * largest for x in block]
    return torch.tensor(out).view_as(weight)


def int8(weight):
    """A weight in integers, each row with a scale of its own."""
    half = weight.half().float()
    scales = half.abs().amax(1, keepdim=True) / 127
    return (half / scales).round() * scales


class Quantized(types.SimpleNamespace):
    """What PEFT gets of bitsandbytes: something that it moves to a device, and hands back to be read."""

    def to(self, device):
        return self


@pytest.mark.parametrize("bits, steps", ((4, 1), (4, 3), (8, 1), (8, 2)))
def test_loftq_is_pefts(bits, steps, monkeypatch):
    fake = types.ModuleType("bitsandbytes")
    fake.nn = types.SimpleNamespace(
        Params4bit=lambda x, **options: Quantized(data=x, quant_state=None),
        Int8Params=lambda x, **options: Quantized(data=x, SCB=None),
    )
    fake.functional = types.SimpleNamespace(
        dequantize_4bit=lambda x, state: nf4(x), int8_vectorwise_dequant=lambda x, scales: as_tensor(int8(x))
    )
    monkeypatch.setitem(sys.modules, "bitsandbytes", fake)
    for name in ("is_bnb_available", "is_bnb_4bit_available"):
        monkeypatch.setattr(loftq_utils, name, lambda: True)
    weight = torch.randn(22, 13, generator=torch.Generator().manual_seed(bits + steps))
    on_device = types.SimpleNamespace(device=weight.device, dtype=weight.dtype, to=lambda **options: weight)
    quantized, down, up = loftq_utils.loftq_init(on_device, num_bits=bits, reduced_rank=4, num_iter=steps)
    spec = LayerSpec(kind="linear", in_features=13, out_features=22, rank=4, alpha=8)
    told = {"seed": 0, "init_lora_weights": "loftq", "options": {"loftq_bits": bits, "loftq_iter": steps}}
    factors, base = factorize.factorize({"weight": weight}, spec, **told)
    assert close(base["weight"], quantized) and close(factors["lora_B"] @ factors["lora_A"], up @ down)
    lost = (quantized + factors["lora_B"] @ factors["lora_A"] - weight).norm()
    assert lost < (quantized - weight).norm()


class as_tensor:
    """A tensor that stays where it is."""

    def __init__(self, x):
        self.x = x

    def to(self, device):
        return self.x


def test_two_bits_are_a_normal_code_of_four():
    code = quantize.normal_float(2)
    assert code.tolist() == [-1.0, 0.0, *code[2:3].tolist(), 1.0] and 0.3 < code[2] < 0.4
    assert close(quantize.normal_float(4), torch.tensor(NF4))
    assert len(quantize.rounded(torch.randn(8, 8), 2).unique()) <= 4


def test_loftq_quantizes_the_base_for_good(small_models):
    config = {"loftq_bits": 4, "loftq_iter": 1}
    ours = models.load(small_models["llama"], mesh=None, dtype=torch.float32)
    before = ours.model.layers[0].mlp.up_proj.weight.detach().clone()
    spec = LoraSpec(rank=4, alpha=4, target_modules=("up_proj",), init_lora_weights="loftq", loftq_config=config)
    adapters.wrap(ours, spec)
    layer = ours.model.layers[0].mlp.up_proj
    assert torch.equal(layer.weight, quantize.rounded(before, 4)) and not torch.equal(layer.weight, before)
    with pytest.raises(TargetError, match="is quantized"):
        adapters.save(ours, "nowhere", as_lora=True)
    bind.detach(ours)
    assert torch.equal(ours.model.layers[0].mlp.up_proj.weight, quantize.rounded(before, 4))


# On disk. What PEFT's own adapters begin with, of which it can make the base again.
ON_DISK = ("pissa", "pissa, rslora", "olora", "mica", "eva")
CONVERTED = ("pissa, rslora", "olora", "corda", "lora_ga", "mica", "eva", "orthogonal")


def moved(model, seed=5):
    """A model whose trained parameters are a little further, the same way everywhere; local parts by canonical ones."""
    for path, layer in bind.layers(model).items():
        for name, p in bind.factors(model)[path].items():
            generator = torch.Generator().manual_seed(seed_of(seed, path + name))
            step = torch.randn(sharding.canonical_shape(layer.spec, name), generator=generator) / 20
            local = lora_fn.shard({name: step}, layer.spec, layer.spec.axis.index or 0)[name]
            p.data += local
    return model


@pytest.fixture(scope="module")
def theirs_on_disk(small_models, tmp_path_factory):
    """{case: (directory, logits)} of adapters of stock PEFT, trained a little."""
    place, made = tmp_path_factory.mktemp("starts"), {}
    for case in ON_DISK:
        tuned, _ = stock_start(small_models["llama"], case)
        torch.manual_seed(7)
        with torch.no_grad():
            for p in tuned.parameters():
                if p.requires_grad:
                    p += torch.randn(p.shape) / 20
        tuned.save_pretrained(place / case)
        made[case] = (str(place / case), tuned(ids_of()).logits.detach())
    return made


def taken_and_given(mesh, directory, made, place):
    """{case: logits of ours with PEFT's adapter}, {case: of ours, saved as LoRA}, {case: of ours, detached}."""
    taken, given, off = {}, {}, {}
    for case, adapter in made.items():
        ours = models.load(directory, mesh=mesh, dtype=torch.float32, gather_logits=True)
        adapters.wrap(ours, adapters.read_spec(adapter))
        adapters.load(ours, adapter)
        taken[case] = ours(ids_of()).logits.detach()
        adapters.save(ours, f"{place}/{case} again")
    CASES["orthogonal"] = {"init_lora_weights": "orthogonal"}
    for case in CONVERTED:
        ours = moved(our_start(mesh, directory, case, sequence_parallel=True))
        given[case] = ours(ids_of()).logits.detach()
        adapters.save(ours, f"{place}/{case}", as_lora=True)
        adapter = bind.detach(ours)
        off[case] = ours(ids_of()).logits.detach()
        bind.attach(ours, adapter)
        off[f"{case} again"] = relative(ours(ids_of()).logits, given[case])
    del CASES["orthogonal"]
    return taken, given, off


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
@pytest.mark.parametrize("size", (1, 4))
def test_adapters_go_to_disk_and_come_back(size, small_models, theirs_on_disk, tmp_path):
    model = small_models["llama"]
    arguments = (taken_and_given, model, {case: where for case, (where, _) in theirs_on_disk.items()}, str(tmp_path))
    each = pool(size).run(*arguments, timeout=180) if size > 1 else [taken_and_given(None, *arguments[1:])]
    plain = stock(model)(ids_of()).logits
    for taken, given, off in each:
        for case, (where, logits) in theirs_on_disk.items():
            assert relative(logits, plain) > 1e-2 and relative(taken[case], logits) < TOLERANCE, case
            mine = load_file(tmp_path / f"{case} again" / "adapter_model.safetensors")
            theirs = load_file(f"{where}/adapter_model.safetensors")
            assert mine.keys() == theirs.keys() and all(torch.equal(mine[n], theirs[n]) for n in theirs), case
        for case, logits in given.items():
            assert relative(logits, plain) > 1e-2, case
            if size == 1 or given is each[0][1]:
                stock_again = peft.PeftModel.from_pretrained(stock(model), tmp_path / case)
                assert relative(stock_again(ids_of()).logits, logits) < TOLERANCE, case
                assert stock_again.peft_config["default"].init_lora_weights is True
            assert relative(off[case], plain) < TOLERANCE and off[f"{case} again"] < TOLERANCE, case
    assert adapters.read_spec(tmp_path / "olora").rank_pattern == (("o_proj", 6),)
    assert adapters.read_spec(tmp_path / "corda").rank == 2 * adapters.read_spec(tmp_path / "mica").rank


def test_an_adapter_of_another_base_is_refused(small_models, theirs_on_disk):
    ours = models.load(small_models["llama"], mesh=None, dtype=torch.float32)
    adapters.wrap(ours, LoraSpec(rank=8, alpha=12, target_modules=TARGETS))
    before = {name: p.clone() for name, p in ours.named_parameters()}
    with pytest.raises(FileError, match="was made with init_lora_weights 'pissa', the model has True"):
        adapters.load(ours, theirs_on_disk["pissa"][0])
    assert all(torch.equal(p, before[name]) for name, p in ours.named_parameters())


def test_only_one_weight_is_whole_at_a_time(small_models, monkeypatch):
    made, real = [], initialize.gather

    def gathered(*args, **options):
        assert not any(alive() is not None for alive in made)
        whole = real(*args, **options)
        made.extend(weakref.ref(p) for p in whole.values())
        return whole

    monkeypatch.setattr(initialize, "gather", gathered)
    ours = models.load(small_models["llama"], mesh=None, dtype=torch.float32)
    adapters.wrap(ours, spec_of("pissa"))
    assert len(made) == 14 and not any(alive() is not None for alive in made)


@pytest.mark.parametrize("init", ("olora", "pissa"))
def test_a_start_has_the_same_bits_however_many_threads_there_are(init):
    """All else runs on one thread (see conftest), where a process alone has as many as one of many."""
    found = []
    for threads in (1, 2):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(288, 256))
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            adapters.wrap(net, LoraSpec(rank=4, target_modules=("0",), init_lora_weights=init))
        finally:
            torch.set_num_threads(before)
        found.append({name: p.detach() for name, p in net.named_parameters()})
    assert found[0].keys() == found[1].keys() and all(torch.equal(p, found[1][name]) for name, p in found[0].items())


def test_dora_measures_the_weight_that_it_completes(small_models):
    spec = dataclasses.replace(spec_of("pissa"), use_dora=True)
    config = peft.LoraConfig(r=8, lora_alpha=12, target_modules=list(TARGETS), init_lora_weights="pissa", use_dora=True)
    theirs = peft.get_peft_model(stock(small_models["llama"]), config)
    ours = adapters.wrap(models.load(small_models["llama"], mesh=None, dtype=torch.float32), spec)
    assert relative(ours(ids_of()).logits, theirs(ids_of()).logits) < TOLERANCE
    layer, module = ours.model.layers[0].mlp.up_proj, theirs.base_model.model.model.layers[0].mlp.up_proj
    assert close(layer.lora_magnitude_vector, module.lora_magnitude_vector["default"].weight)
    with pytest.raises(TargetError, match="no difference of two products"):
        adapters.save(ours, "nowhere", as_lora=True)


def fails(error, sentence, call):
    with pytest.raises(error, match=re.escape(sentence)):
        call()


def wrapping(**options):
    return lambda: adapters.wrap(kinds_of(), LoraSpec(**{"rank": 4, "target_modules": ("tall",)} | options))


def test_a_shared_lora_A_starts_at_random_only():
    parts = (FusedPart(name="gate", size=8, rank=2), FusedPart(name="up", size=8, rank=2))
    spec = LayerSpec(kind="column", in_features=6, out_features=16, parts=parts, share_A=True)
    fails(SpecError, "shares one lora_A", lambda: lora_fn.init(spec, seed=0, init_lora_weights="orthogonal"))
    assert "lora_A" in lora_fn.init(spec, seed=0)


def test_a_bf16_base_is_completed_to_its_rounding(small_models):
    ours = models.load(small_models["llama-bf16"], mesh=None, dtype=torch.bfloat16)
    before = {path: m.weight.detach().clone() for path, m in ours.named_modules() if path.rpartition(".")[2] in TARGETS}
    adapters.wrap(ours, spec_of("pissa"))
    for path, layer in bind.layers(ours).items():
        assert layer.weight.dtype == torch.bfloat16 and not torch.equal(layer.weight, before[path])
        factors = {name: p.detach() for name, p in bind.factors(ours)[path].items()}
        whole = layer.weight.detach().float() + lora_fn.delta(factors, layer.spec)
        assert relative(whole, before[path]) < 2**-8
    bind.detach(ours)
    for path, weight in before.items():
        assert relative(ours.get_submodule(path).weight, weight) < 2**-8


def test_a_residual_bases_adapter_is_not_merged_into_another(small_models, theirs_on_disk, tmp_path):
    def merged():
        merge(Path(small_models["llama"]), [Path(theirs_on_disk["pissa"][0])], tmp_path / "out", quiet=True)

    fails(FileError, "began with 'pissa', and completes a base that lacks what it began with; load it, ", merged)


REFUSED = {
    "an odd rank": (dict(rank=3, init_lora_weights="orthogonal"), "tall: has rank 3, but init_lora_weights 'orth"),
    "a rank that is too large": (dict(rank=13, init_lora_weights="mica"), "choose a rank of at most 12."),
    "half the singular vectors": (dict(rank=7, init_lora_weights="lora_ga"), "choose a rank of at most 6."),
    "an embedding": (
        dict(target_modules=("embedding",), init_lora_weights="pissa"),
        "embedding: is a layer of kind 'embedding', which init_lora_weights 'pissa' has no rule for",
    ),
    "no batches": (dict(init_lora_weights="eva"), "'eva' starts from the inputs of each layer"),
    "no gradients": (dict(init_lora_weights="lora_ga"), "'lora_ga' starts from the gradient of each layer"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_start_is_refused(case):
    options, sentence = REFUSED[case]
    fails(TargetError, sentence, wrapping(**options))


OPTIONS_REFUSED = {
    "bits": dict(init_lora_weights="loftq", loftq_config={"loftq_bits": 3}),
    "iterations": dict(init_lora_weights="loftq", loftq_config={"loftq_iter": 0}),
    "rho": dict(init_lora_weights="eva", eva_config={"rho": 0.5}),
    "method": dict(init_lora_weights="corda", corda_config={"corda_method": "both"}),
    "pickles": dict(init_lora_weights="corda", corda_config={"covariance_file": "covariance.pt"}),
    "direction": dict(init_lora_weights="lora_ga", lora_ga_config={"direction": "up"}),
    "scale": dict(init_lora_weights="lora_ga", lora_ga_config={"scale": 2}),
}


@pytest.mark.parametrize("case", OPTIONS_REFUSED)
def test_options_that_cannot_be_are_refused(case):
    fails(SpecError, ", expected ", lambda: LoraSpec(**OPTIONS_REFUSED[case]))


def test_rslora_with_patterns_is_no_plain_lora():
    spec = LoraSpec(rank=2, target_modules=("tall",), init_lora_weights="pissa", use_rslora=True, rank_pattern={"a": 1})
    fails(TargetError, "as_lora doubles the rank", lambda: plain(spec))


def test_a_weight_that_is_not_finite_is_told():
    model = kinds_of()
    model.tall.weight.data[0, 0] = torch.nan
    spec = LoraSpec(rank=2, target_modules=("tall",), init_lora_weights="pissa")
    fails(
        TargetError,
        "tall: init_lora_weights 'pissa' gives a lora_A that is not finite",
        lambda: adapters.wrap(model, spec),
    )


def test_data_that_does_not_suffice_is_told(small_models):
    def started(**options):
        ours = models.load(small_models["llama"], mesh=None, dtype=torch.float32)
        rows = [{"input_ids": ids_of(1, 6)}]
        given = options.pop("batches", rows)
        return lambda: adapters.wrap(ours, LoraSpec(target_modules=("up_proj",), **options), batches=given)

    fails(TargetError, "of which 6 tokens were seen", started(rank=4, init_lora_weights="eva"))
    fails(TargetError, "was not used by the model", started(rank=4, init_lora_weights="corda", batches=[]))
    nothing = {"input_ids": ids_of(1, 6), "attention_mask": torch.zeros(1, 6, dtype=torch.long)}
    fails(TargetError, "got no token that counts", started(rank=4, init_lora_weights="corda", batches=[nothing]))


def test_measuring_leaves_a_model_as_it_was(small_models):
    ours = models.load(small_models["llama"], mesh=None, dtype=torch.float32)
    ours.lm_head.weight.requires_grad_(True)
    before = {name: (p.clone(), p.requires_grad) for name, p in ours.named_parameters()}
    for case in ("eva", "corda", "lora_ga"):
        spec, given = spec_of(case), batches_of()
        bind.make(ours, spec, batches=[one_batch(given)] if case == "eva" else given)
        for name, p in ours.named_parameters():
            assert torch.equal(p, before[name][0]) and p.requires_grad == before[name][1] and p.grad is None, (
                case,
                name,
            )
        assert not any(m._forward_hooks for n, m in ours.named_modules() if n.rpartition(".")[2] in TARGETS)
