"""The grid on stock PEFT's side: an adapter on the whole layer, what it computes, and its file."""

import copy
import dataclasses
import functools
import importlib.util
import math
import sys
import types
import warnings
from pathlib import Path

import grid_ours
import oracle
import peft
import pytest
import torch
from grid import (
    DROPOUT,
    DTYPES,
    INVOCATION,
    KEY,
    MEASURED_INITS,
    NO_DELTA,
    PLAIN,
    SEED,
    STOCK,
    UNMERGED,
    Net,
    base_spec,
    config_of,
    part_names,
    targets_of,
)
from grid_ours import loss
from peft.tuners import lora
from peft.tuners.lora import variants
from peft.utils import get_peft_model_state_dict, loftq_utils
from safetensors.torch import load_file
from torch import nn

from adapters import bind
from lora_fn import alora, checkpoint, sharding
from lora_fn.initialize import seed_of

BATCH, LENGTH, PIXELS, PER_EXPERT = 2, 8, 6, 5


# Layers that are one and the same to stock PEFT.
SAME = {
    **dict.fromkeys(("column", "column, output gathered", "row"), "linear"),
    "embedding, dimension": "embedding, vocabulary",
    "conv2d, input channels": "conv2d, output channels",
    "experts, row": "experts, column",
    "experts, row, transposed": "experts, column, transposed",
}


def stock_case(case):
    """What a case is to stock PEFT, which knows of no axis."""
    return case._replace(kind=SAME.get(case.kind, case.kind), tp=1, sp="off", gradients="summed")


# -------------------------------------------------------------------------------------------------------------- values


def generator_of(case, what):
    return torch.Generator().manual_seed(sum(map(ord, f"{SAME.get(case.kind, case.kind)} {what}")))


def drawn(shape, generator):
    """A normal tensor; a matrix with singular values that differ, so that what is made of them is well conditioned."""
    t = torch.randn(shape, generator=generator, dtype=torch.float64)
    if len(shape) == 2:
        u, _, v = torch.linalg.svd(t, full_matrices=False)
        t = u * torch.linspace(3, 0.5, min(shape), dtype=torch.float64).square() @ v
    return t


def weights(case, what):
    """The canonical base parameters of one layer."""
    spec, generator = base_spec(case), generator_of(case, what)
    dtype = DTYPES[case.dtype]
    return {n: drawn(sharding.canonical_shape(spec, n), generator).to(dtype) for n in sharding.names(spec)}


def data_of(case):
    """What is run for an initialisation that measures: samples of one row; of EVA, one batch."""
    generator, shape = generator_of(case, "data"), (1, 16, base_spec(case).in_features)
    rows = [torch.randn(shape, generator=generator).to(DTYPES[case.dtype]) for _ in range(12)]
    return [torch.cat(rows)] if case.init == "eva" else rows


def input_of(case):
    spec, generator = base_spec(case), generator_of(case, "x")
    length = LENGTH * (4 if case.dtype == "bfloat16" else 1)
    if spec.kind == "embedding":
        return torch.randint(0, spec.in_features, (BATCH, length), generator=generator)
    shape = {
        "conv2d": (BATCH, spec.in_features, PIXELS, PIXELS),
        "experts": (spec.num_experts or 0, PER_EXPERT, spec.in_features),
    }.get(spec.kind, (BATCH, length, spec.in_features))
    return torch.randn(shape, generator=generator).to(DTYPES[case.dtype])


# --------------------------------------------------------------------------------------------------------- stock PEFT


class Mask(nn.Module):
    """In place of PEFT's nn.Dropout: it drops what ours drops. aLoRA gives it some tokens only, all rows in one."""

    def __init__(self, name, case, features):
        super().__init__()
        self.key, self.case, self.features = oracle.folded(KEY, bind.number_of(name)), case, features

    def forward(self, x):
        last = x.movedim(self.features, -1)
        if self.case.variant == "alora":
            active = alora.active(ids_of(self.case), tuple(INVOCATION))
            keep = oracle.keep_mask(self.key, (*active.shape, x.shape[-1]), DROPOUT)[active]
        else:
            keep = oracle.keep_mask(self.key, tuple(last.shape), DROPOUT)
        return (last * keep.to(x.dtype) / (1 - DROPOUT)).movedim(-1, self.features)


class StockExperts(nn.Module):
    """A layer per expert, as one parameter: [experts, out, in], or where it is transposed [experts, in, out]."""

    def __init__(self, weight, *, is_transposed):
        super().__init__()
        self.weight, self.is_transposed = nn.Parameter(weight), is_transposed

    def forward(self, x):
        return x @ (self.weight if self.is_transposed else self.weight.mT)


def stock_modules(case, params):
    """A layer as transformers and torch have it, by the names of its parts."""
    from transformers.pytorch_utils import Conv1D

    spec, weight, bias = base_spec(case), params["weight"], params.get("bias")
    if spec.kind == "embedding":
        module = nn.Embedding(*weight.shape)
    elif spec.kind == "conv2d":
        module = nn.Conv2d(*weight.shape[1::-1], spec.window.kernel_size, padding=spec.window.padding)
    elif spec.kind == "experts":
        return {"layer": StockExperts(weight.clone(), is_transposed=spec.fan_in_fan_out)}
    elif spec.fan_in_fan_out:
        module = Conv1D(*weight.shape[::-1])
    elif spec.parts:
        sizes = [part.size for part in spec.parts]
        modules = {}
        biases = [None] * len(sizes) if bias is None else bias.split(sizes)
        for name, w, b in zip(part_names(case.kind), weight.split(sizes), biases, strict=True):
            modules[name] = _filled(nn.Linear(*w.shape[::-1], bias=b is not None), w, b)
        return modules
    else:
        module = nn.Linear(*weight.shape[::-1])
    return {"layer": _filled(module, weight, bias)}


def _filled(module, weight, bias):
    module.weight = nn.Parameter(weight.clone())
    if bias is not None:
        module.bias = nn.Parameter(bias.clone())
    return module


def stock_net(case):
    features = -3 if base_spec(case).kind == "conv2d" else -1
    return Net(*(stock_modules(case, weights(case, what)) for what in ("block", "beside")), features)


def stock_config(case):
    config = config_of(case)
    del config["peft_type"]
    return peft.LoraConfig(**config, fan_in_fan_out=case.kind == "linear, fan_in_fan_out")


def stock_adapter(case):
    """Stock PEFT's model of a case, its adapter as it is initialised."""
    with warnings.catch_warnings(), pytest.MonkeyPatch.context() as patch:
        warnings.simplefilter("ignore")
        torch.manual_seed(SEED)
        without_scipy(patch)
        net, config = stock_net(case), stock_config(case)
        if case.init in PREPARED:
            PREPARED[case.init](case, net, config, patch)
        made = peft.get_peft_model(net, config, autocast_adapter_dtype=False)
        if case.init == "eva":
            batches = [{"x": x} for x in data_of(case)]
            options = {"prepare_model_inputs_fn": None, "prepare_layer_inputs_fn": lambda x, *more: x[0].flatten(0, 1)}
            peft.initialize_lora_eva_weights(made, batches, show_progress_bar=False, **options)
        if case.variant == "qalora":  # which PEFT gives to the layers of GPTQ only
            for layer in made.get_base_model().block.values():
                layer.lora_variant["default"] = variants.QALoraLinearVariant()
                variants.QALoraLinearVariant.init(layer, "default", config)
        for p in made.parameters():  # which some initialisations leave in float32
            p.data = p.data.to(DTYPES[case.dtype])
        return made


def without_scipy(patch):
    """PEFT wants it for LoftQ, which does not use it any more."""
    find_spec = importlib.util.find_spec
    patch.setattr(importlib.util, "find_spec", lambda name, package=None: name == "scipy" or find_spec(name, package))


def _corda(case, net, config, patch):
    if "attr" not in sys.modules:  # PEFT takes a dataclass from there, and does not say that it needs it
        patch.setitem(sys.modules, "attr", types.SimpleNamespace(dataclass=dataclasses.dataclass))
    from peft.tuners.lora import corda

    patch.setattr(torch.Tensor, "float", torch.Tensor.double)  # its inverse and SVD are too rough in float32
    corda.preprocess_corda(net, config, lambda: [net(x) for x in data_of(case)])


def _loftq(case, net, config, patch):
    """It quantizes by bitsandbytes, on a GPU; here by stand-ins."""
    from test_initialize import Quantized, nf4  # which imports what an older PEFT has not

    fake = types.ModuleType("bitsandbytes")
    fake.nn = types.SimpleNamespace(Params4bit=lambda x, **options: Quantized(data=x, quant_state=None))
    fake.functional = types.SimpleNamespace(dequantize_4bit=lambda x, state: nf4(x))
    patch.setitem(sys.modules, "bitsandbytes", fake)
    for name in ("is_bnb_available", "is_bnb_4bit_available"):
        patch.setattr(loftq_utils, name, lambda: True)

    def here(weight, **options):
        there = types.SimpleNamespace(device=weight.device, dtype=weight.dtype, to=lambda **where: weight.data.float())
        return loftq_utils.loftq_init(there, **options)

    patch.setattr(lora.layer, "loftq_init", here)


def _lora_ga(case, net, config, patch):
    from peft.tuners.lora import loraga

    loraga.preprocess_loraga(net, config, lambda: [loss(net, {"x": x}).backward() for x in data_of(case)])
    _seeded(case, net, config, patch)


def _seeded(case, net, config, patch):
    """torch.svd_lowrank, called for one layer after the other, with the random numbers that our layers draw."""
    seeds = iter([seed_of(SEED, path) for path in targets_of(case.kind)])
    svd_lowrank = torch.svd_lowrank

    def seeded(*args, **options):
        torch.manual_seed(next(seeds))
        return svd_lowrank(*args, **options)

    patch.setattr(torch, "svd_lowrank", seeded)
    patch.setattr(lora.layer, "svd_lowrank", seeded)


PREPARED = {"corda": _corda, "lora_ga": _lora_ga, "loftq": _loftq, "pissa_niter_4": _seeded}


def refusal(case):
    """Why stock PEFT refuses a case; None where it takes it."""
    return _refusal(stock_case(case)._replace(scaling=PLAIN.scaling, bias=PLAIN.bias))  # which it never refuses


@functools.cache
def _refusal(case):
    try:
        made = stock_adapter(case)
        made.get_base_model()(input_of(case), **more_of(case))
        if case.variant not in UNMERGED:
            made.merge_and_unload()
    except Exception as error:  # whatever it raises
        return f"{STOCK}{' '.join(str(error).split())}"
    return None


def canonical(case, modules, names):
    """The canonical parameters of stock modules."""
    each = [modules[name] for name in part_names(case.kind)]
    return {
        n: torch.cat([m.get_parameter(n).detach() for m in each])
        if len(each) > 1
        else each[0].get_parameter(n).detach().clone()
        for n in names
    }


def file_key(made, name):
    """What an adapter file calls a parameter of PEFT's model."""
    key = name.replace(".default", "")
    return key if key in get_peft_model_state_dict(made) else key.removesuffix(".weight")


def randomised(made, case):
    """Everything that PEFT trains, moved to where it does something."""
    generator = generator_of(case, "adapter")
    with torch.no_grad():
        for name, p in made.named_parameters():
            if p.requires_grad:
                noise = torch.randn(p.shape, generator=generator, dtype=torch.float64)
                if "magnitude" in name:
                    p.mul_((1 + 0.3 * noise.tanh()).to(p.dtype))
                else:
                    p.copy_(((p.double() + 0.3 * noise) if "lora_" not in name else 0.5 * noise).to(p.dtype))
    return made


def stock_run(made, case, x, cotangents):
    """Outputs, gradients by their names in the file, and that of x."""
    made.zero_grad()
    for name, module in made.named_modules():
        if isinstance(module, nn.Dropout):
            path = name.removeprefix("base_model.model.").removesuffix(".lora_dropout.default")
            made.get_submodule(name.removesuffix(".default")).default = Mask(path, case, made.get_base_model().features)
    x = x.clone().requires_grad_(x.is_floating_point())
    outputs = made.train().get_base_model()(x, **more_of(case))
    sum((y * c).sum() for y, c in zip(outputs, cotangents, strict=True)).backward()
    found = {f"output {n}": y.detach() for n, y in enumerate(outputs)}
    found |= {f"d {file_key(made, n)}": p.grad for n, p in made.named_parameters() if p.requires_grad}
    return found | ({"d x": x.grad} if x.is_floating_point() else {})


def ids_of(case):
    """Tokens, with what begins an aLoRA at another place in each row."""
    ids = torch.zeros(input_of(case).shape[:2], dtype=torch.int64)
    for row, start in enumerate((1, 4)):
        ids[row, start : start + len(INVOCATION)] = torch.tensor(INVOCATION)
    return ids


def more_of(case):
    """What PEFT's layers are told beside their input."""
    if case.variant != "alora":
        return {}
    config = {"": types.SimpleNamespace(alora_invocation_tokens=INVOCATION)}
    return {"alora_offsets": variants.calculate_alora_offsets(config, "", ids_of(case))}


def stock_merged(made, case):
    if case.variant in UNMERGED:
        return {}
    merged = copy.deepcopy(made).eval().merge_and_unload()
    return {f"merged {n}": t for n, t in canonical(case, merged.block, sharding.names(base_spec(case))).items()}


def reference(case, directory):
    """What stock PEFT gives for a case; its adapter is written to `directory`.

    Of bfloat16, also {"truth": the same in float64}.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = stock_adapter(case).train()
        x, names = input_of(case), sharding.names(base_spec(case))
        start = {f"start {n}": t for n, t in start_of_stock(made, case, names, x).items()}
        randomised(made, case).save_pretrained(directory)
        shapes = [y.shape for y in made.get_base_model()(x, **more_of(case))]
        generator = generator_of(case, "cotangent")
        cotangents = [torch.randn(shape, generator=generator).to(DTYPES[case.dtype]) for shape in shapes]
        data = data_of(case) if case.init in MEASURED_INITS else []
        given = {
            "x": x,
            "data": data,
            "base": {n: start[f"start base {n}"] for n in names},
            "ids": ids_of(case) if case.variant == "alora" else None,
            "cotangents": cotangents,
            "block": weights(case, "block"),
            "beside": weights(case, "beside"),
        }
        wide = copy.deepcopy(made).double() if case.dtype == "bfloat16" else None
        found = {"given": given, "start": start}
        found["values"] = stock_run(made, case, x, cotangents) | stock_merged(made, case)
        if wide is not None:
            wide_x = x.double() if x.is_floating_point() else x
            found["truth"] = stock_run(wide, case, wide_x, [c.double() for c in cotangents]) | stock_merged(wide, case)
        return found


def start_of_stock(made, case, names, x):
    """Before any step: the effective weight, the base's, the factors and the outputs."""
    base = made.get_base_model()
    layers = {name: base.block[name] for name in part_names(case.kind)}
    found = {
        f"base {n}": t for n, t in canonical(case, {n: m.get_base_layer() for n, m in layers.items()}, names).items()
    }
    if case.variant not in NO_DELTA:
        deltas = [layer.get_delta_weight("default").detach() for layer in layers.values()]
        found["delta"] = torch.cat(deltas) if len(deltas) > 1 else deltas[0]
    state = get_peft_model_state_dict(made, save_embedding_layers=False)
    found |= {f"factor {k}": t.clone() for k, t in state.items() if ".block." in k}
    found |= {f"output {n}": y.detach() for n, y in enumerate(base.eval()(x, **more_of(case)))}
    made.train()
    return found


def same_file(one, other):
    """Whether two adapter files hold the same tensors, bit for bit, and to stock PEFT the same config."""
    before, after = (load_file(Path(d) / checkpoint.WEIGHTS) for d in (one, other))
    before = {name: t for name, t in before.items() if not name.endswith(".base_layer.weight")}
    with warnings.catch_warnings(), pytest.MonkeyPatch.context() as patch:
        warnings.simplefilter("ignore")
        without_scipy(patch)
        configs = [peft.LoraConfig.from_pretrained(d).to_dict() for d in (one, other)]
    inert = ("auto_mapping", "peft_version", "base_model_name_or_path", "task_type")
    if configs[0]["init_lora_weights"] == "eva":  # of which nothing is left to do
        inert += ("init_lora_weights", "eva_config")
    told = [{k: v for k, v in c.items() if k not in inert} for c in configs]
    same = before.keys() == after.keys() and all(torch.equal(before[n], after[n]) for n in before)
    return same and told[0] == told[1]


def compared(cases, directory, pool):
    """{case: {name: error over what is allowed}}; what is right is at most 1.

    Adapters are written below `directory`, and left there.
    """
    references, jobs, whole = {}, {}, {}
    for number, case in enumerate(cases):
        stock = stock_case(case)
        place = directory / f"stock {len(references)}"
        place, expected = references.setdefault(stock, (place, None))
        if expected is None:
            references[stock] = place, reference(stock, place)
        jobs[case] = (case, str(place), references[stock][1]["given"], str(directory / f"{number}"))
    found = {}
    for size in dict.fromkeys(case.tp for case in cases):
        some = [job for case, job in jobs.items() if case.tp == size]
        each = [grid_ours.run(None, some)] if size == 1 else pool(size).run(grid_ours.run, some)
        found |= {job[0]: [one[number] for one in each] for number, job in enumerate(some)}
    told = {}
    for case, parts in found.items():
        raised = [part["raised"] for part in parts if "raised" in part]
        if raised:
            told[case] = {"\n".join(raised[0].splitlines()[-7:]): math.inf}
            continue
        one = grid_ours.joined(case, parts)
        told[case] = grid_ours.errors(case, references[stock_case(case)][1], one)
        if not same_file(*jobs[case][1::2]):
            told[case]["file"] = math.inf
        if case.tp > 1 and case.init not in MEASURED_INITS:  # sums over data are rounded in another order
            alone = case._replace(tp=1, sp="off", gradients="summed")
            if alone not in whole:
                whole[alone] = grid_ours.ours(None, alone, *jobs[case][1:])
            same = [n for n in one if n.startswith("start factor") and not wide_magnitude(case, n)]
            drifted = [n for n in same if not torch.equal(whole[alone][n], one[n])]
            told[case] |= {f"{name}: not that of TP 1": math.inf for name in drifted}
    return told


def wide_magnitude(case, name):
    """Whether a tensor is a norm in float64, whose last bits depend on how the sum is cut."""
    return "magnitude" in name and case.dtype == "float64"


def wrong(told):
    """What is not right of what `compared` gives."""
    each = {case: {name: e for name, e in errors.items() if not e <= 1} for case, errors in told.items()}
    return {case: errors for case, errors in each.items() if errors}
