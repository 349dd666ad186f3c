"""Are LoRA+ and LoRA-FA what stock PEFT's optimizers do, however the model is cut? Is a sharded state the whole one?"""

import functools
import math
import shutil
from dataclasses import replace
from pathlib import Path

import jobs
import mapped
import pytest
import torch
import torch.nn.functional as F
from jobs import job_models_fixture, small_models_fixture  # noqa: F401  (fixtures)
from safetensors.torch import load_file
from small_models import relative
from strategies import case, fixed_spec
from test_laws import law_lorafa_is_the_nearest_update
from torch import nn

import adapters
import lora_fn
from adapters import bind, cli, data, files, models, optimizers, runs, train
from adapters.train import Job
from lora_fn import LoraSpec, SpecError, manifest

SEED = 4
STEPS = 4
TOLERANCE = 1e-5  # max|a - b| / max|b|, in fp32


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """The tensors are small: more threads would only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# ------------------------------------------------------------------------------------------------- LoRA-FA's correction


def test_lorafa_of_parts_that_share_A_and_of_padding():
    for spec in (
        fixed_spec("qkv", share_A=True),
        fixed_spec("embedding, vocabulary", in_features=13, pad=True),
        fixed_spec("row", lora_bias=True, bias=True),
        fixed_spec("column", variant="alora"),
    ):
        law_lorafa_is_the_nearest_update(case(spec, (), SEED))


def test_lorafa_takes_more_rows_than_inputs():
    """lora_A @ lora_A^T has no inverse then, and its pseudo-inverse blows nothing up."""
    each = case(fixed_spec("row", size=2, in_features=8, rank=11), (), SEED, dtype=torch.float32)
    rows = torch.randn(24, 8, generator=torch.Generator().manual_seed(SEED))
    grads = {name: torch.zeros_like(p) for name, p in each.params.items()} | {
        "lora_B": rows @ each.params["lora_A"].T  # as a backward makes it
    }
    found = mapped.corrected(each, grads)["lora_B"]
    scaling = 2.0 / 11
    assert relative(found @ each.params["lora_A"] * scaling**2, rows) <= 1e-4


def test_what_lorafa_cannot_train_is_refused():
    spec = fixed_spec("linear")
    with pytest.raises(SpecError, match=r"a\.lora_A: is trained, and LoRA-FA needs it frozen"):
        lora_fn.lorafa_corrections({"a": {}}, {"a": spec})
    variants = {"a": replace(spec, variant="dora"), "b": mapped.frozen(spec), "c": replace(spec, variant="kasa")}
    with pytest.raises(SpecError, match=r"a: is of the variant 'dora'(.|\n)*c: is of the variant 'kasa'"):
        lora_fn.lorafa_corrections({}, variants)


# ------------------------------------------------------------------------------------- stock PEFT's optimizers, by hand

LAYERS = {
    "embed": "embedding, vocabulary",
    "first": "column",
    "second": "row",
    "third": "linear",
}
RANK, ALPHA, RATE = 4, 6, 1e-2
EPS = 1e-2  # so that AdamW sees how large a gradient is, and does not make rounding large where it is small
PLUS_EPS = 0.5


class Net(nn.Module):
    """Layers of four kinds, and a norm that is trained whole."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(12, 8)
        self.first = nn.Linear(8, 16)
        self.second = nn.Linear(16, 8)
        self.third = nn.Linear(8, 5)
        self.norm = nn.LayerNorm(8)


def stock_net(targets=tuple(LAYERS), **options):
    """Net, adapted by stock PEFT, in float64, and what of it is trained or is a lora_A, by our names."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(SEED)
    config = LoraConfig(
        r=RANK,
        lora_alpha=ALPHA,
        rank_pattern={"second": 2},
        target_modules=list(targets),
        modules_to_save=["norm"],
        init_lora_weights=False,
        use_rslora=True,
        **options,
    )
    model = get_peft_model(Net(), config, autocast_adapter_dtype=False).double()
    named = {our_name(name): p for name, p in model.named_parameters() if p.requires_grad}
    return model, {path: {n: named[p, n] for p, n in named if p == path} for path, _ in named}


def our_name(name):
    """base_model.model.first.lora_A.default.weight -> ("first", "lora_A")."""
    path, _, rest = name.removeprefix("base_model.model.").partition(".")
    rest = rest.replace("lora_embedding_", "lora_")
    if rest == "lora_B.default.bias":
        return path, "lora_B_bias"
    return path, rest.split(".")[-1] if rest.startswith(("base_layer", "modules_to_save")) else rest.split(".")[0]


def our_specs(size, params, variant="lora", **options):
    """The layers of Net, cut over an axis, with what of them is trained."""
    nets, found = Net(), {}
    for path, of in params.items():
        module = getattr(nets, path)
        if path == "norm":
            found[path] = fixed_spec("replicated", in_features=8, out_features=8, size=size, bias=True)
            continue
        out_features, in_features = module.weight.shape[:: -1 if path == "embed" else 1]
        own = {} if path == "embed" else {"bias": True} | options
        found[path] = fixed_spec(
            LAYERS[path],
            size=size,
            in_features=in_features,
            out_features=out_features,
            rank=2 if path == "second" else RANK,
            alpha=ALPHA,
            use_rslora=True,
            variant=variant,
            **own,
        )
        found[path] = replace(found[path], trained=tuple(of))
    return found


def gradients_of(params):
    """The same random gradients for everybody, of every step."""
    generator = torch.Generator().manual_seed(SEED)
    return [
        {
            path: {n: torch.randn(p.shape, generator=generator, dtype=p.dtype) for n, p in of.items()}
            for path, of in params.items()
        }
        for _ in range(STEPS)
    ]


def cut(tree, specs):
    return {path: mapped.stack(of, specs[path]) for path, of in tree.items()}


def assert_same_factors(stacked, specs, params, tolerance=1e-10):
    """The stacked parts of all processes, joined, are what stock PEFT has."""
    for path, of in stacked.items():
        whole = mapped.unstack({n: p.detach() for n, p in of.items()}, specs[path])
        for name, p in whole.items():
            assert relative(p, params[path][name]) <= tolerance, (path, name)


def copies(tree):
    return {path: {n: p.detach().clone().requires_grad_() for n, p in of.items()} for path, of in tree.items()}


def step(optimizer, params, grads):
    for path, of in grads.items():
        for name, g in of.items():
            params[path][name].grad = g
    optimizer.step()


PLUS = {
    "dora, biases": (dict(use_dora=True, bias="lora_only"), dict(variant="dora")),
    "a bias of lora_B": (dict(lora_bias=True, targets=("first", "second")), dict(lora_bias=True)),
}


@pytest.mark.parametrize("size", (1, 2, 4))
@pytest.mark.parametrize("what", PLUS)
def test_loraplus_is_stock_pefts(what, size):
    from peft.optimizers import create_loraplus_optimizer

    options, ours = PLUS[what]
    rates = {"lr": RATE, "betas": (0.8, 0.9)}
    model, params = stock_net(**options)
    stock = create_loraplus_optimizer(
        model,
        torch.optim.AdamW,
        loraplus_lr_ratio=16,
        loraplus_lr_embedding=3e-3,
        loraplus_weight_decay=0.5,
        **rates,
    )
    specs = our_specs(size, params, **ours)
    stacked = copies(cut(params, specs))
    groups = lora_fn.parameter_groups(params, specs, lr=RATE, lr_ratio=16, lr_embedding=3e-3, weight_decay=0.5)
    assert sum(len(group["params"]) for group in groups) == sum(len(of) for of in params.values())
    number = {id(p): g for g in groups for p in g["params"]}
    own = torch.optim.AdamW(
        [number[id(params[path][n])] | {"params": [p]} for path, of in stacked.items() for n, p in of.items()], **rates
    )
    for grads in gradients_of(params):
        step(stock, params, grads)
        step(own, stacked, cut(grads, specs))
    assert_same_factors(stacked, specs, params)


@pytest.mark.parametrize("size", (1, 2, 4))
def test_lorafa_is_stock_pefts(size, monkeypatch):
    from peft.optimizers import create_lorafa_optimizer

    model, params = stock_net()
    stock = stock_lorafa(model, monkeypatch, create_lorafa_optimizer)
    trained = {path: {n: p for n, p in of.items() if path == "norm" or n != "lora_A"} for path, of in params.items()}
    specs = our_specs(size, trained)
    factors = {path: {n: p for n, p in of.items() if n == "lora_A"} for path, of in params.items()}
    corrections = {path: mapped.corrections(of, specs[path]) for path, of in copies(factors).items() if path != "norm"}
    stacked = copies(cut(trained, specs))
    own = torch.optim.AdamW([p for of in stacked.values() for p in of.values()], lr=RATE, eps=EPS, weight_decay=0)
    for number, grads in enumerate(gradients_of(trained)):
        stock.param_groups[0]["eps"] = eps_there(number)
        step(stock, params, grads)
        step(own, stacked, lora_fn.lorafa_gradients(cut(grads, specs), corrections))
    assert_same_factors(stacked, specs, params, tolerance=1e-6)  # 1e-8 is added to lora_A @ lora_A^T there


def eps_there(number):
    """In PEFT's AdamW, eps stands before the second moment's bias is corrected; torch's is EPS."""
    return EPS * math.sqrt(1 - 0.999 ** (number + 1))


def stock_lorafa(model, monkeypatch, create):
    """Stock PEFT's, without its rounding of every gradient to bfloat16."""
    monkeypatch.setattr("peft.optimizers.lorafa.is_bf16_available", lambda: False)
    return create(model, r=RANK, lora_alpha=ALPHA, lr=RATE)


# ------------------------------------------------------------------------------ stock PEFT's optimizers, whole jobs


@pytest.fixture(scope="module")
def job(job_models, tmp_path_factory):
    """A few steps over all kinds of layers, factors random at the start."""
    place = tmp_path_factory.mktemp("optimizers")
    return Job(
        model=job_models["llama"],
        data=(jobs.write_lines(place / "data.jsonl", jobs.uneven(16)),),
        output=str(place / "one"),
        lora=LoraSpec(
            rank=4,
            alpha=6,
            init_lora_weights=False,
            target_modules=("embed_tokens", "q_proj", "v_proj", "o_proj", "down_proj"),
        ),
        sequence_length=40,
        batch_size=8,
        steps=STEPS,
        learning_rate=0.2,
        warmup=1,
        max_grad_norm=1e6,
        checkpoint_every=2,
    )


def with_a_large_eps(job, resume):
    """A run whose AdamW has another eps."""
    torch.optim.AdamW = functools.partial(torch.optim.AdamW, eps=EPS if job.lorafa else PLUS_EPS)
    train.finetune(job, resume=resume, quiet=True)


def stock_run(job, make, after):
    """The factors before and after the same steps of stock transformers and PEFT, by PEFT's names."""
    from peft import PeftModel, get_peft_model_state_dict
    from transformers import AutoModelForCausalLM

    began = Path(job.output).with_suffix(".began")
    files.save(train.load_model(replace(job, tp=1), None, torch.device("cpu")), began)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(job.model), began, is_trainable=True)
    before = {name: t.clone() for name, t in get_peft_model_state_dict(model, save_embedding_layers=False).items()}
    optimizer = make(model)
    peaks = [group["lr"] for group in optimizer.param_groups]
    rows = data.load(
        job.data, models.load_tokenizer(Path(job.model)), sequence_length=40, seed=job.seed, disable=True
    ).train
    for number in range(job.steps):
        indices = data.step_rows(number, num_rows=len(rows["labels"]), rows_per_step=8, seed=job.seed)
        [batch] = data.microbatches(rows, indices, accumulation=1, dp_size=1, dp_index=0)
        logits = model(
            input_ids=batch["input_ids"],
            position_ids=batch["position_ids"],
            attention_mask=data.attention_mask(batch["document_ids"], torch.float32),
            use_cache=False,
        ).logits
        loss = F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), ignore_index=-100, reduction="sum")
        (loss / data.num_targets(rows, indices)).backward()
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak * float(train.schedule(job, torch.tensor(number)))
        after(optimizer, number)
        optimizer.step()
        optimizer.zero_grad()
    return before, get_peft_model_state_dict(model, save_embedding_layers=False)


def stock_loraplus_of(job):
    from peft.optimizers import create_loraplus_optimizer

    rates = {"loraplus_lr_ratio": job.loraplus_lr_ratio, "loraplus_lr_embedding": job.loraplus_lr_embedding}
    return lambda model: create_loraplus_optimizer(
        model,
        torch.optim.AdamW,
        lr=job.learning_rate,
        eps=PLUS_EPS,
        **rates,
    )


@pytest.mark.parametrize("what", ("loraplus", "lorafa"))
def test_a_job_is_stock_pefts(what, job, monkeypatch):
    options = {
        "loraplus": dict(loraplus_lr_ratio=4.0, loraplus_lr_embedding=0.3),
        "lorafa": dict(lorafa=True, learning_rate=1.0),
    }[what]
    job = jobs.elsewhere(job, what, tp=2, sequence_parallel=True, **options)
    jobs.run(job, call=with_a_large_eps)
    if what == "loraplus":
        before, expected = stock_run(job, stock_loraplus_of(job), lambda optimizer, number: None)
    else:
        from peft.optimizers import create_lorafa_optimizer

        monkeypatch.setattr("peft.optimizers.lorafa.is_bf16_available", lambda: False)

        def make(model):
            return create_lorafa_optimizer(model, r=4, lora_alpha=6, lr=job.learning_rate)

        before, expected = stock_run(
            job, make, lambda optimizer, number: optimizer.param_groups[0].update(eps=eps_there(number))
        )
    found = jobs.adapter(job)
    assert found.keys() == expected.keys()
    for name, factor in found.items():
        assert relative(factor, expected[name]) <= TOLERANCE, name
        moved = relative(factor, before[name])
        assert (moved == 0) if what == "lorafa" and "_A" in name else (moved > 10 * TOLERANCE), name
    rates = [line.get("group_lr") for (kind, _), line in jobs.log(job).items() if kind == "train"]
    if what == "loraplus":
        assert rates[1] == pytest.approx({"lora_A": 0.2, "embedding": 0.3, "lora_B": 0.8})
    else:
        assert not any(rates)


# ------------------------------------------------------------------------------------------------------ ZeRO-1, resume


def measured(job, resume):
    """A run that tells how many bytes of moments this process held."""
    take = runs.take

    def taken(run, model, optimizer, *arguments, **options):
        held = optimizers.holder(optimizer).state.values()
        num = sum(of[name].nbytes for of in held for name in manifest.MOMENTS)
        Path(f"{job.output}.bytes.{torch.distributed.get_rank()}").write_text(str(num))
        return take(run, model, optimizer, *arguments, **options)

    runs.take = taken
    train.finetune(job, resume=resume, quiet=True)


def bytes_of(job):
    return [int(Path(f"{job.output}.bytes.{rank}").read_text()) for rank in range(job.processes)]


def contents(job):
    """Every file of a run's checkpoints and its adapter, and what is in it."""
    places = [*Path(job.output).glob("checkpoints/*/*"), Path(job.output) / "adapter_model.safetensors"]
    return {str(p.relative_to(job.output)): p.read_bytes() for p in places}


def numbers(job):
    return {at: {k: v for k, v in line.items() if k != "tokens_per_second"} for at, line in jobs.log(job).items()}


PLAIN = dict(learning_rate=1e-2, weight_decay=0.1, dp=2)


def again(left, job, name):
    """A job that goes on from what another one left before its last checkpoint."""
    job = jobs.elsewhere(job, name)
    shutil.copytree(left.output, job.output)
    shutil.rmtree(Path(job.output) / "checkpoints" / f"step-{STEPS:09d}")
    jobs.run(job, resume=True)
    return job


@pytest.fixture(scope="module")
def loraplus(job):
    """Two processes with a whole state each, and two with half of it."""
    plain = jobs.elsewhere(job, "plus", loraplus_lr_ratio=4.0, **PLAIN)
    sharded = jobs.elsewhere(plain, "plus-sharded", zero1=True)
    for each in (plain, sharded):
        jobs.run(each, call=measured)
    return plain, sharded


@pytest.fixture(scope="module")
def lorafa(job):
    """The same of LoRA-FA, at TP 2."""
    plain = jobs.elsewhere(job, "fa", lorafa=True, tp=2, sequence_parallel=True, **PLAIN)
    sharded = jobs.elsewhere(plain, "fa-sharded", zero1=True)
    for each in (plain, sharded):
        jobs.run(each, call=measured)
    return plain, sharded


@pytest.mark.parametrize("what", ("loraplus", "lorafa"))
def test_a_sharded_state_is_the_whole_one_bit_for_bit(what, request):
    """Losses, factors, the files of the checkpoints; in half the memory."""
    plain, sharded = request.getfixturevalue(what)
    assert contents(sharded) == contents(plain) and numbers(sharded) == numbers(plain)
    whole, parts = bytes_of(plain), bytes_of(sharded)
    for index in range(plain.tp):
        mine = parts[index :: plain.tp]
        assert sum(mine) == whole[index] and max(mine) <= 0.55 * whole[index]


def test_a_run_goes_on_with_another_state_bit_for_bit(loraplus):
    plain, sharded = loraplus
    for name, left, job in (("whole", sharded, plain), ("sharded", plain, sharded)):
        job = again(left, job, f"plus-again-{name}")
        assert contents(job) == contents(plain) and numbers(job) == numbers(plain)


def test_a_sharded_checkpoint_of_lorafa_is_cut_anew_and_gone_on_from(lorafa, tmp_path):
    """At another TP and without DP: one process holds all of it then. There are no moments of lora_A."""
    _, sharded = lorafa
    place = Path(sharded.output) / "checkpoints" / f"step-{STEPS:09d}"
    with manifest.opened(place) as stored:
        path = next(path for path in stored.manifest.specs if path.endswith("down_proj"))
        assert [*stored.canonical(manifest.FACTOR, path)] == ["lora_A", "lora_B"]
        assert [*stored.canonical("exp_avg", path)] == ["lora_B"]
    assert cli.main(["reshard", str(place), str(tmp_path / "one"), "--to-tp", "1", "--quiet"]) == 0
    assert manifest.read(tmp_path / "one").tp == 1
    job = again(sharded, replace(sharded, dp=1, tp=1, sequence_parallel=False), "fa-again")
    found, expected = jobs.adapter(job), jobs.adapter(sharded)
    for name, factor in found.items():
        assert relative(factor, expected[name]) <= (0 if "_A" in name else 1e-3), name  # AdamW makes rounding large


def test_what_xla_traces_is_torchs_adamw():
    """Of groups with a rate and a decay of their own, one parameter without a gradient in one of the steps."""
    generator, moved = torch.Generator().manual_seed(0), []
    start = [torch.randn(3, 4, generator=generator, dtype=torch.float64) for _ in range(3)]
    grads = [[torch.randn(3, 4, generator=generator, dtype=torch.float64) for _ in start] for _ in range(5)]
    for made in (torch.optim.AdamW, optimizers.TracedAdamW):
        params = [torch.nn.Parameter(p.clone()) for p in start]
        groups = [
            {"params": params[:2], "lr": torch.tensor(0.1).double(), "weight_decay": 0.3},
            {"params": params[2:], "lr": torch.tensor(0.01).double(), "weight_decay": 0.0},
        ]
        optimizer = made(groups, betas=(0.8, 0.95), foreach=False)
        for p in params:
            moments = {name: torch.zeros_like(p) for name in ("exp_avg", "exp_avg_sq")}
            optimizer.state[p] = {"step": torch.tensor(0.0).double(), **moments}
        for number, each in enumerate(grads):
            for p, grad in zip(params, each, strict=True):
                p.grad = None if number == 2 and p is params[1] else grad
            optimizer.step()
        moved.append([t for p in params for t in (p, *optimizer.state[p].values())])
    assert all(torch.allclose(a, b, rtol=1e-12, atol=1e-12) for a, b in zip(*moved, strict=True))


def test_what_is_frozen_stays_so(job, job_models, tmp_path):
    """Also when the adapter was off meanwhile, and of tied layers, whose factors are the same two, transposed."""
    model = adapters.wrap(nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4)), LoraSpec(rank=2))
    adapters.freeze(model, "lora_A")
    bind.attach(model, bind.detach(model))
    assert {name for of in adapters.factors(model).values() for name in of} == {"lora_B"}
    assert [name for name, p in model.named_parameters() if p.requires_grad] == ["0.lora_B", "1.lora_B"]
    tied = LoraSpec(
        rank=2, target_modules=("embed_tokens", "lm_head"), ensure_weight_tying=True, init_lora_weights=False
    )
    job = replace(job, model=job_models["qwen3"], output=str(tmp_path / "tied"), lora=tied, lorafa=True, steps=2)
    files.save(train.load_model(job, None, torch.device("cpu")), tmp_path / "began")
    jobs.run(job)
    began = load_file(tmp_path / "began" / "adapter_model.safetensors")
    moved = {name: not torch.equal(factor, began[name]) for name, factor in jobs.adapter(job).items()}
    of_embedding = {name.rpartition("embed_tokens.")[2]: m for name, m in moved.items() if "embed_tokens" in name}
    assert of_embedding == {"lora_embedding_A": False, "lora_embedding_B": True}
    of_head = [m for name, m in moved.items() if "lm_head" in name]
    assert not of_head or sum(of_head) == 1


def test_what_cannot_be_sharded_is_a_sentence(job):
    with pytest.raises(SpecError, match="--zero1: cannot be with --device xla"):
        replace(job, zero1=True, device="xla")
    with pytest.raises(SpecError, match="--lorafa: cannot be with --loraplus-lr-ratio"):
        replace(job, lorafa=True, loraplus_lr_ratio=2.0)
    with pytest.raises(SpecError, match=r"--loraplus-lr-ratio: is 0\.0, expected a finite number above 0"):
        replace(job, loraplus_lr_ratio=0.0)
    dora = replace(job, lorafa=True, lora=LoraSpec(target_modules=("q_proj",), use_dora=True))
    with pytest.raises(SpecError, match="q_proj: is of the variant 'dora', and LoRA-FA corrects"):
        train.check(dora, resume=False)
    with pytest.raises(SpecError, match="embed_tokens: begins with a lora_A of zeros"):
        train.check(replace(job, lorafa=True, lora=replace(job.lora, init_lora_weights=True)), resume=False)
