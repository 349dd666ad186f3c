"""How an adapter starts: against stock PEFT on the whole model, at every size of the axis."""

import dataclasses
import sys
import types

import peft
import pytest
import torch
from peft.tuners.lora import loraga as peft_loraga
from pool import pool
from small_models import ids_of, relative, small_models_fixture, stock  # noqa: F401  (a fixture)
from torch import nn

import adapters
from adapters import bind, models
from lora_fn import LoraSpec, factorize, peft_format, starts
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
            patch.setattr(torch, "svd_lowrank", Seeded(torch.svd_lowrank, list(measured), spec))
            model.eval()
        tuned = peft.get_peft_model(model, config)
    for p in tuned.parameters():
        p.data = p.data.float()
    if spec.init_lora_weights == "eva":
        peft.initialize_lora_eva_weights(tuned, [one_batch(given)], show_progress_bar=False)
    return tuned.eval(), measured


class Seeded:
    """torch.svd_lowrank with the random numbers that our layers draw; it is called for one after the other."""

    def __init__(self, svd_lowrank, paths, spec):
        scales = spec.options("lora_ga_config")["scale"] == "weight_svd"
        self.calls = [seed for path in paths for seed in [seed_of(SEED, path), *([None] if scales else [])]]
        self.svd_lowrank = svd_lowrank

    def __call__(self, *args, **options):
        seed = self.calls.pop(0)
        if seed is not None:
            torch.manual_seed(seed)
        return self.svd_lowrank(*args, **options)


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


OPTIONS = {
    "plain": {},
    "sequence parallel": {"sequence_parallel": True},
    "fused": {"fuse_qkv": True, "fuse_gate_up": True, "sequence_parallel": True},
}


@pytest.mark.parametrize("size", (1, 2, 4))
@pytest.mark.parametrize("form", OPTIONS)
def test_every_start_is_pefts(size, form, small_models, stock_started, whole):
    arguments = (started, small_models["llama"], OPTIONS[form])
    each = pool(size).run(*arguments) if size > 1 else [arguments[0](None, *arguments[1:])]
    for case, theirs in stock_started.items():
        ours, (config, scalings) = each[0][case], theirs.config
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
