"""Does a whole model come out the same by every scheme? One that is cut over the rank, beside one process without."""

import math
from dataclasses import replace
from pathlib import Path

import jobs
import peft
import pytest
import torch
from jobs import job_models_fixture  # noqa: F401  (a fixture)
from pool import pool
from small_models import ids_of, relative, small_models_fixture, stock  # noqa: F401  (a fixture)

import adapters
from adapters import bind, cli, models, schemes, sweep, train
from adapters.train import Job
from lora_fn import Axis, LayerSpec, LoraFnError, LoraSpec, SpecError
from lora_fn.cost import choose, update
from lora_fn.machines import MACHINES
from lora_fn.reshard import gather

TOLERANCE = 1e-5
LINEARS = LoraSpec(rank=4, alpha=6, dropout=0.2, init_lora_weights=False, target_modules="all-linear")
FUSED = {"fuse_qkv": True, "fuse_gate_up": True}
# Form of the model, adapter: each starts as it does without a scheme.
CASES = {
    "separate": ({}, LINEARS),
    "sequence parallel": ({"sequence_parallel": True}, LINEARS),
    "fused": (FUSED, replace(LINEARS, rank_pattern={"k_proj": 2, "o_proj": 6}, use_rslora=True)),
    "fused, one lora_A": (FUSED | {"sequence_parallel": True}, replace(LINEARS, share_A=True)),
    "dora": ({}, replace(LINEARS, use_dora=True)),
    "a residual base": ({}, replace(LINEARS, init_lora_weights="pissa", dropout=0.0)),
}


def found_by(model, scheme, spec):
    """Loss and every factor's whole gradient; and the model."""
    adapters.wrap(model, spec, seed=3, gradients="deferred", scheme=scheme).train()
    adapters.set_dropout_key(model, torch.tensor(5))
    loss = model(ids_of(), labels=ids_of()).loss
    loss.backward()
    specs = adapters.specs(model)
    grads = {path: {n: p.grad for n, p in of.items()} for path, of in adapters.factors(model).items()}
    grads = adapters.flat({p: gather(of, specs[p]) for p, of in synced(grads, specs).items()})
    return {"loss": loss.detach(), **grads}


def synced(grads, specs):
    import lora_fn

    return lora_fn.sync_gradients(grads, specs)


def compare(mesh, directory, place):
    """{case: (largest difference from one process without a scheme, the schemes of the layers, elements held)}."""
    results = {}
    for name, (form, spec) in CASES.items():
        alone = models.load(directory, dtype=torch.float32, **{n: f for n, f in form.items() if n.startswith("fuse")})
        model = models.load(directory, mesh=mesh, dtype=torch.float32, **form)
        want, got = found_by(alone, None, spec), found_by(model, "rank", spec)
        assert want.keys() == got.keys()
        used = {path.rpartition(".")[2]: layer.scheme for path, layer in adapters.specs(model).items()}
        held = sum(p.numel() for p in model.parameters() if p.requires_grad)
        results[name] = max(relative(got[n], want[n]) for n in want), used, held
        if name in ("separate", "fused"):
            adapters.save(model.eval(), Path(place) / name)
        if name == "separate":
            before = adapters.flat(adapters.factors(alone))
            adapters.load(alone, Path(place) / name)  # in a model without a scheme
            after = adapters.flat(adapters.factors(alone))
            assert all(torch.equal(after[n], before[n]) for n in before)
    return results


@pytest.fixture(scope="module")
def saved(small_models, tmp_path_factory):
    place = tmp_path_factory.mktemp("by-rank")
    first, second = pool(2).run(compare, small_models["llama"], str(place))
    assert first == second
    return place, first


@pytest.mark.parametrize("case", CASES)
def test_a_model_by_rank_is_that_of_one_process(case, saved):
    difference, used, _ = saved[1][case]
    assert difference < TOLERANCE
    cut = CASES[case][0].get("sequence_parallel", False)
    rows = {"o_proj", "down_proj"}
    assert {name for name, scheme in used.items() if scheme == "rank"} == used.keys() - (rows if cut else set())


def test_each_process_holds_its_part_of_every_factor(saved, small_models):
    model = adapters.wrap(models.load(small_models["llama"]), LINEARS)
    whole = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert saved[1]["separate"][2] == whole // 2


@pytest.mark.parametrize("case", ("separate", "fused"))
def test_stock_peft_loads_what_was_saved(case, saved, small_models):
    model = peft.PeftModel.from_pretrained(stock(small_models["llama"]), str(saved[0] / case)).eval()
    ours = adapters.wrap(models.load(small_models["llama"], gather_logits=True), adapters.read_spec(saved[0] / case))
    adapters.load(ours, saved[0] / case)
    assert relative(ours.eval()(ids_of()).logits, model(ids_of()).logits) < TOLERANCE
    assert relative(ours(ids_of()).logits, stock(small_models["llama"])(ids_of()).logits) > 0.01


# ------------------------------------------------------------------------------------------------------ what is chosen


def used(directory, scheme, spec=LINEARS, *, size=2):
    """{layer: its scheme}, of a model over that many processes."""
    model = models.outline(directory, axis=Axis(name="tp", size=size))
    return {path: layer.scheme for path, layer in bind.plan(model, spec, scheme=scheme).items()}


def test_a_name_is_of_the_layers_that_can_have_it(small_models):
    spec = replace(LINEARS, target_modules=("embed_tokens", "q_proj", "o_proj"))
    found = used(small_models["llama"], "rank", spec)
    assert found["model.embed_tokens"] is None
    assert {found[f"model.layers.0.self_attn.{name}"] for name in ("q_proj", "o_proj")} == {"rank"}
    assert set(used(small_models["llama"], None).values()) == {None}


def test_a_function_chooses_for_each_layer(small_models):
    def of(layer):
        return "rank" if layer.kind == "row" else "fold"  # which is the table's own

    found = used(small_models["llama"], of)
    assert {path.rpartition(".")[2] for path, scheme in found.items() if scheme == "rank"} == {"o_proj", "down_proj"}
    with pytest.raises(SpecError, match=r"embed_tokens: LayerSpec.scheme: is 'rank', expected None but for kinds"):
        used(small_models["llama"], lambda layer: "rank", replace(LINEARS, target_modules=("embed_tokens",)))


def test_the_cost_model_chooses(small_models):
    """And says the same of a layer that has the scheme already."""
    machine = replace(MACHINES["trn1"], memory_bandwidth=math.inf)
    assert set(used(small_models["llama"], lambda layer: choose(layer, 2048, machine).scheme).values()) == {None}
    wide = LayerSpec(kind="row", in_features=8192, out_features=8192, rank=512, axis=Axis(size=8))
    cut = schemes.chosen(wide, lambda layer: choose(layer, 2048, machine).scheme)
    assert cut.scheme == "rank" and choose(cut, 2048, machine) == choose(wide, 2048, machine)
    assert update(cut, 2048) == update(wide, 2048, "rank") and update(cut, 2048, "fold") == update(wide, 2048)
    assert update(cut, 2048).flops == 6 * 2048 * 512 * (8192 + 8192) / 8 and update(cut, 2048).summed == 0


FREE = replace(MACHINES["cpu"], latency=0.0, bandwidth=math.inf, memory_bandwidth=math.inf)  # all but FLOPs


def test_a_gather_that_brings_h_counts(small_models):
    """Under sequence parallel a column layer's own scheme is "concat", but for the lm_head's."""
    layer = LayerSpec(kind="column", in_features=64, out_features=64, rank=8, axis=Axis(size=4), input="gathered")
    told = {"tokens": 64, "microbatches": 1}
    for given, own in ((layer, "concat"), (replace(layer, pad=True), "fold"), (replace(layer, rank=6), "concat")):
        found = schemes.cheapest(given, FREE, sequence_parallel=True, **told)
        assert [*found.costs] == [own, *["rank"] * (given.rank == 8)]
        has = schemes.chosen(given, lambda _, scheme=found.scheme: scheme)
        assert found == schemes.cheapest(has, FREE, sequence_parallel=True, **told)
    assert [*schemes.cheapest(layer, FREE, **told).costs] == ["fold", "rank"]


def test_what_was_chosen_is_told(job):
    auto = jobs.elsewhere(job, "told", scheme="auto", machine=FREE, tp=2, batch_size=8, accumulation=2, lora=LINEARS)
    choice = train.choice_of(auto)
    planned = bind.plan(train.outline(auto), auto.lora, scheme=train.scheme_of(auto))
    _, *rows = schemes.told(planned, choice)
    assert [row[:3] for row in rows if row[0] in ("q_proj", "down_proj")] == [
        ["q_proj", "1", "rank"],
        ["down_proj", "1", "rank"],
    ]
    [layer] = [layer for path, layer in planned.items() if path.endswith("q_proj")]
    assert choice(layer) == choose(layer, 4 * 40, FREE, itemsize=4, microbatches=2)
    assert [row[3] for row in rows if row[0] == "q_proj"] == [choice(layer).why]
    slow = replace(auto, machine=replace(FREE, latency=1.0))
    assert {at.scheme for at in bind.plan(train.outline(slow), slow.lora, scheme=train.scheme_of(slow)).values()} == {
        None
    }


def test_tied_layers_keep_the_factors_that_both_have(small_models):
    tied = replace(LINEARS, target_modules=("embed_tokens", "lm_head", "q_proj"), ensure_weight_tying=True, dropout=0.0)
    found = used(small_models["qwen3"], lambda layer: "rank", tied)
    assert found.pop("lm_head") is found.pop("model.embed_tokens") is None
    assert set(found.values()) == {"rank"}


@pytest.mark.parametrize(
    ("scheme", "options", "sentence"),
    (
        ("ranks", {}, "scheme: is 'ranks', expected 'rank', a function of a LayerSpec, or None."),
        ("rank", {"rank_pattern": {"0.self_attn.q_proj": 3}}, "q_proj: LayerSpec.rank: is 3, which 2 processes do not"),
        ("rank", {"target_modules": ("embed_tokens",)}, "which none of the 1 adapted layers that are cut has; model."),
    ),
)
def test_a_scheme_that_cannot_be_is_one_sentence(scheme, options, sentence, small_models):
    with pytest.raises(SpecError) as raised:
        used(small_models["llama"], scheme, replace(LINEARS, **options))
    assert sentence in str(raised.value) and "\n" not in str(raised.value)


def test_one_process_alone_takes_any_name(small_models):
    """So that what is asked of many processes can be tried on one; numbers are the same bit for bit."""
    spec = replace(LINEARS, dropout=0.0)
    plain, by_rank = (
        adapters.wrap(models.load(small_models["llama-1-layer"]), spec, scheme=scheme) for scheme in (None, "rank")
    )
    assert torch.equal(plain(ids_of()).logits, by_rank(ids_of()).logits)
    assert set(used(small_models["llama"], "rank", replace(spec, rank=3), size=1).values()) == {"rank"}


# --------------------------------------------------------------------------------------------------------------- a run


@pytest.fixture(scope="module", name="job")
def job_fixture(job_models, tmp_path_factory):
    place = tmp_path_factory.mktemp("schemes")
    return Job(
        model=job_models["llama-1-layer"],
        data=(jobs.write_lines(place / "data.jsonl", jobs.uneven(8)),),
        output=str(place / "plain"),
        lora=replace(LINEARS, dropout=0.1),
        sequence_length=40,
        batch_size=4,
        steps=4,
        warmup=1,
        checkpoint_every=2,
        learning_rate=1e-2,
    )


def test_a_run_by_rank_is_the_run_and_goes_on_by_any_scheme(job):
    train.finetune(job, quiet=True)
    by_rank = jobs.elsewhere(job, "by-rank", scheme="auto", machine=FREE, tp=2)
    chosen = bind.plan(train.outline(by_rank), by_rank.lora, scheme=train.scheme_of(by_rank))
    assert {layer.scheme for layer in chosen.values()} == {"rank"}
    jobs.run(by_rank)
    [last] = [path for path in Path(by_rank.output, "checkpoints").iterdir() if path.name.endswith("4")]
    for file in last.iterdir():
        file.unlink()
    last.rmdir()
    train.finetune(replace(by_rank, scheme=None, machine=None, tp=1), resume=True, quiet=True)
    assert jobs.column(by_rank, "loss") == pytest.approx(jobs.column(job, "loss"), rel=1e-4)
    want, got = jobs.adapter(job), jobs.adapter(by_rank)
    assert want.keys() == got.keys()
    assert max(relative(got[name], want[name]) for name in want) < 1e-2


def test_a_job_that_cannot_be_by_rank_is_refused_before_it_starts(job, tmp_path, capsys):
    with pytest.raises(SpecError, match="--scheme: is 'ranks', expected one of rank, auto"):
        replace(job, scheme="ranks")
    with pytest.raises(SpecError, match="--scheme: is 'auto', which needs --machine"):
        replace(job, scheme="auto")
    with pytest.raises(SpecError, match="--machine: is for --scheme auto; leave it out"):
        replace(job, scheme="rank", machine=FREE)
    for words, sentence in ((["--machine", "trn9"], "--machine: 'trn9' is no file"), ([], "which needs --machine")):
        where = ("--model", job.model, "--data", *job.data, "--output", str(tmp_path / "out"))
        assert cli.main(["finetune", *where, "--scheme", "auto", *words]) == cli.BAD_INPUT
        assert sentence in capsys.readouterr().err
    odd = jobs.elsewhere(job, "odd", scheme="rank", tp=2, lora=replace(LINEARS, rank=3))
    with pytest.raises(SpecError, match=r"LayerSpec\.rank: is 3, which 2 processes do not divide"):
        train.check(odd, resume=False)
    fa = jobs.elsewhere(job, "odd", scheme="rank", tp=2, lorafa=True)
    with pytest.raises(SpecError, match="is cut by scheme 'rank', and LoRA-FA corrects lora_B by all of its rank"):
        train.check(fa, resume=False)
    several = {name: jobs.elsewhere(job, name, scheme="rank", seed=seed) for name, seed in (("a", 0), ("b", 1))}
    with pytest.raises(LoraFnError, match="--scheme: is for adapters that are trained one by one"):
        sweep.check(several)
