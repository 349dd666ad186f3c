"""Can one model have many adapters? By name, for whole batches and row by row, against stock PEFT on a whole model."""

import copy
import dataclasses
import functools

import peft
import pytest
import torch
from pool import pool
from small_models import ids_of, relative, small_models_fixture, stock  # noqa: F401  (a fixture)

import adapters
import lora_fn
from adapters import models
from adapters.many import ManyLayer
from lora_fn import LoraSpec, SpecError, TargetError

TOLERANCE = 1e-5
FORMS = {
    "apart": {},
    "sequence parallel": {"sequence_parallel": True},
    "fused": {"sequence_parallel": True, "fuse_qkv": True, "fuse_gate_up": True},
}
TARGETS = ("q_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "embed_tokens", "lm_head")
ENVELOPE = LoraSpec(rank=4, target_modules=TARGETS)
CONFIGS = {
    "first": dict(r=3, lora_alpha=6, target_modules=["q_proj", "v_proj", "down_proj"]),
    "second": dict(r=2, lora_alpha=8, target_modules=["q_proj", "gate_proj", "embed_tokens"], use_rslora=True),
    "dotted.name-x": dict(r=2, target_modules=r".*\.(o|up)_proj", rank_pattern={"o_proj": 4}),
}
pytestmark = pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")


@pytest.fixture(scope="module")
def theirs(small_models):
    """Stock PEFT's model with all adapters."""
    model = None
    for number, (name, options) in enumerate(CONFIGS.items()):
        torch.manual_seed(number)
        config = peft.LoraConfig(init_lora_weights=False, **options)
        name = name.replace(".", "_")  # which stock PEFT does not take in a name
        if model is None:
            model = peft.get_peft_model(stock(small_models["llama"]), config, adapter_name=name)
        else:
            model.add_adapter(name, config)
    return model.eval()


@pytest.fixture(scope="module")
def stored(theirs, tmp_path_factory):
    """Name -> directory, as stock PEFT writes it."""
    place = tmp_path_factory.mktemp("adapters")
    theirs.save_pretrained(place)
    return {name: str(place / name.replace(".", "_")) for name in CONFIGS}


def held_on(mesh, directory, stored, form, **options):
    model = models.load(directory, mesh=mesh, gather_logits=True, **FORMS[form])
    held = adapters.ManyAdapters(model, ENVELOPE, places=len(stored) + 1, **options)
    for name, place in stored.items():
        held.add(name, place)
    return held


def logits(held, ids):
    with torch.no_grad():
        return held.model(input_ids=ids).logits.clone()


ROWS = ["second", None, "first", "dotted.name-x", "first"]
SETS = ["first", "second", "dotted.name-x"]


def used(mesh, directory, stored, form):
    """What every process gives: rows, one, several, scaled, none."""
    held, ids = held_on(mesh, directory, stored, form), ids_of(len(ROWS), 12)
    held.select_rows(ROWS)
    found = {"rows": logits(held, ids)}
    with held.disabled():
        found["disabled"] = logits(held, ids)
    for name in stored:
        held.select(name)
        found[name] = logits(held, ids)
    held.select(*SETS)
    found["several"] = logits(held, ids)
    held.scale("second", 0.25)
    found["scaled"] = logits(held, ids)
    held.select()
    found["none"] = logits(held, ids)
    return found


@pytest.fixture(scope="module")
def expected(theirs):
    """The same of stock PEFT."""
    ids = ids_of(len(ROWS), 12)

    def run(**options):
        with torch.no_grad():
            return theirs(input_ids=ids, **options).logits.clone()

    names = ["__base__" if row is None else row.replace(".", "_") for row in ROWS]
    found = {"rows": run(adapter_names=names)}
    with theirs.disable_adapter():
        found["disabled"] = found["none"] = run()
    for name in CONFIGS:
        theirs.set_adapter(name.replace(".", "_"))
        found[name] = run()
    theirs.base_model.set_adapter([name.replace(".", "_") for name in SETS])
    found["several"] = run()
    scaled = [
        m.scaling for m in theirs.modules() if isinstance(m, peft.tuners.lora.LoraLayer) and "second" in m.scaling
    ]
    for scaling in scaled:  # (set_scale of PEFT 0.17 forgets rsLoRA)
        scaling["second"] *= 0.25
    found["scaled"] = run()
    for scaling in scaled:
        scaling["second"] *= 4
    return found


def check(found, expected):
    assert found.keys() == expected.keys()
    errors = {name: relative(t, expected[name]) for name, t in found.items()}
    assert max(errors.values()) < TOLERANCE, errors
    assert torch.equal(found["disabled"], found["none"])


@pytest.mark.parametrize("form", FORMS)
def test_rows_and_sums_are_pefts(form, small_models, stored, expected):
    check(used(None, small_models["llama"], stored, form), expected)


@pytest.mark.parametrize("size", (2, 4))
@pytest.mark.parametrize("form", FORMS)
def test_rows_and_sums_are_pefts_on_every_process(form, size, small_models, stored, expected):
    for found in pool(size).run(used, small_models["llama"], stored, form):
        check(found, expected)


def managed(mesh, directory, stored, place):
    """Files out and in; a swap in place; names; the model as it was afterwards."""
    held, ids = held_on(mesh, directory, stored, "fused"), ids_of(3, 12)
    bare = models.load(directory, mesh=mesh, gather_logits=True, **FORMS["fused"])
    pointers = {path: p.data_ptr() for path, p in held.model.named_parameters()}
    held.select_rows(["first", "second", None])
    before = logits(held, ids)
    held.save("second", place)
    held.rename("second", "a/b.c-d")
    held.replace("first", stored["dotted.name-x"])
    held.add("again", place)
    held.select_rows(["dotted.name-x", "again", "a/b.c-d"])
    other = logits(held, ids)
    held.delete("again")
    deleted = logits(held, ids)
    assert pointers == {path: p.data_ptr() for path, p in held.model.named_parameters()}
    held.select_rows(["first"])
    swapped = logits(held, ids)
    held.select("dotted.name-x")
    assert torch.equal(swapped, logits(held, ids))
    names, model = held.names, held.remove()
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, bare(input_ids=ids).logits)
        assert torch.equal(deleted[1:2], bare(input_ids=ids).logits[1:2])
    return before, other, deleted, names


@pytest.mark.parametrize("size", (1, 2))
def test_adapters_come_and_go(size, small_models, stored, tmp_path):
    run = functools.partial(managed, None) if size == 1 else functools.partial(pool(size).run, managed)
    each = run(small_models["llama"], stored, str(tmp_path / "out"))
    for before, other, deleted, names in [each] if size == 1 else each:
        assert names == ("first", "a/b.c-d", "dotted.name-x")
        assert relative(before[1], other[1]) < TOLERANCE
        assert relative(deleted[2], other[2]) < TOLERANCE
    theirs = peft.PeftModel.from_pretrained(stock(small_models["llama"]), tmp_path / "out")
    with torch.no_grad():
        assert relative(before[1], theirs(input_ids=ids_of(3, 12)).logits[1]) < TOLERANCE


def trained(mesh, directory, stored, form, gradients):
    """Gradients of every adapter, with rows of its own."""
    held, ids = held_on(mesh, directory, stored, form, gradients=gradients), ids_of(len(ROWS), 12)
    held.select_rows(ROWS)
    held.model.train()
    held.model(input_ids=ids).logits.square().mean().backward()
    grads = {path: {n: p.grad for n, p in of.items()} for path, of in adapters.factors(held.model).items()}
    if gradients == "deferred":
        grads = lora_fn.sync_gradients(grads, adapters.specs(held.model))
    for path, of in adapters.factors(held.model).items():
        for n, p in of.items():
            p.grad = grads[path][n]
            with torch.no_grad():
                p.copy_(p.grad)  # so that the files of adapters hold gradients
    found = {}
    for name in stored:
        with held._on(held.take(name)):
            found[name] = adapters.files.canonical(held.model, name)
    return found


@pytest.mark.parametrize("gradients", ("summed", "deferred"))
@pytest.mark.parametrize("size, form", [(1, "apart"), (2, "sequence parallel"), (2, "fused")])
def test_gradients_are_pefts(size, form, gradients, small_models, theirs, stored):
    theirs = copy.deepcopy(theirs)
    expected, ids = {}, ids_of(len(ROWS), 12)
    for name in CONFIGS:  # stock PEFT has rows in inference only: the rows of each adapter by themselves
        own = name.replace(".", "_")
        theirs.set_adapter(own)
        theirs.zero_grad()
        rows = [number for number, row in enumerate(ROWS) if row == name]
        (theirs(input_ids=ids[rows]).logits.square().sum() / (ids.numel() * 99)).backward()
        expected[name] = {n.replace(f".{own}", ""): p.grad for n, p in theirs.named_parameters() if f".{own}" in n}
    args = (small_models["llama"], stored, form, gradients)
    for found in [trained(None, *args)] if size == 1 else pool(size).run(trained, *args):
        for name, of in expected.items():
            assert found[name].keys() == of.keys()
            assert max(relative(found[name][n], g) for n, g in of.items()) < TOLERANCE


def test_what_does_not_fit_is_refused(small_models, stored, tmp_path):
    held = held_on(None, small_models["llama"], stored, "apart")
    state = {n: p.clone() for n, p in held.model.named_parameters()}
    for spec, told in (
        (LoraSpec(rank=5, target_modules=("q_proj",)), "q_proj: has rank 5 in 'new', more than its places"),
        (LoraSpec(rank=1, target_modules=("k_proj",)), "k_proj: is adapted by 'new', but has no places here"),
        (LoraSpec(rank=1, target_modules=("q_proj",), use_dora=True), "adapters of one layer differ in variant"),
        (LoraSpec(rank=1, target_modules=("q_proj",), dropout=0.5), "adapters of one layer differ in dropout"),
        (LoraSpec(rank=1, target_modules=("q_proj",), init_lora_weights="pissa"), "changes the base, freezes"),
        (LoraSpec(rank=1, target_modules=("q_proj",), modules_to_save=("norm",)), "trains parameters of the base"),
    ):
        with pytest.raises(TargetError, match=told):
            held.add("new", spec)
    with pytest.raises(TargetError, match="'first': is there already"):
        held.add("first", LoraSpec(target_modules=("q_proj",)))
    with pytest.raises(TargetError, match=r"there is none of that name, only \['first', 'second', 'dotted.name-x'\]"):
        held.select("third")
    with pytest.raises(TargetError, match="has no adapter of its own"):
        adapters.save(held.model, tmp_path / "out")
    with pytest.raises(TargetError, match="has no adapter of its own"):
        adapters.load(held.model, stored["first"])
    with pytest.raises(TargetError, match="holds several adapters"):
        next(adapters.merged_weights(held.model))
    held.add("fourth", LoraSpec(rank=4, target_modules=("q_proj",)))
    with pytest.raises(TargetError, match="all 4 places are taken"):
        held.add("fifth", LoraSpec(rank=4, target_modules=("q_proj",)))
    held.delete("fourth")
    assert all(torch.equal(p, state[n]) for n, p in held.model.named_parameters())
    held.select_rows(["first", "second"])
    with pytest.raises(SpecError, match="are 2 for 3 rows"):
        held.model(input_ids=ids_of(3, 12))


def test_dora_is_chosen_row_by_row(small_models):
    """Against each adapter alone; stock PEFT has no rows of DoRA."""
    model = models.load(small_models["llama"], gather_logits=True)
    spec = LoraSpec(rank=3, target_modules=("q_proj", "down_proj"), use_dora=True, init_lora_weights=False)
    held = adapters.ManyAdapters(model, spec, places=2)
    held.add("a", LoraSpec(rank=2, target_modules=("q_proj",), use_dora=True, init_lora_weights=False), seed=1)
    held.add("b", spec, seed=2)
    ids = ids_of(3, 12)
    held.select_rows(["b", None, "a"])
    rows = logits(held, ids)
    for row, name in enumerate(("b", None, "a")):
        held.select(*([name] if name else []))
        assert relative(rows[row], logits(held, ids)[row]) < TOLERANCE
    held.select("a", "b")
    with pytest.raises(SpecError, match="updates of variant 'dora' do not add up"):
        logits(held, ids)


def test_the_graph_does_not_grow_with_adapters(small_models):
    """As many ATen operations with 32 places as with 1, forward and backward."""
    counts = {}
    for places in (1, 8, 32):
        model = models.load(small_models["llama-1-layer"], gather_logits=True)
        held = adapters.ManyAdapters(model, LoraSpec(rank=2, target_modules="all-linear"), places=places)
        held.add("a", LoraSpec(rank=2, target_modules="all-linear", init_lora_weights=False))
        held.select_rows(["a", None, "a", None])
        assert all(isinstance(layer, ManyLayer) for layer in held.layers.values())
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            held.model(input_ids=ids_of(4, 12)).logits.sum().backward()
        counts[places] = sum(event.name.startswith("aten::") for event in profile.events())
    assert len(set(counts.values())) == 1, counts


# ---------------------------------------------------------------------------------------------- what could go unnoticed


def small(seed=0):
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 4))


def asked(rank, **options):
    return LoraSpec(rank=rank, target_modules="all-linear", init_lora_weights=False, **options)


X = torch.randn(3, 6, generator=torch.Generator().manual_seed(4))


def test_who_comes_into_a_place_is_nobodys_choice():
    held = adapters.ManyAdapters(small(), asked(4), places=1)
    held.add("a", asked(2))
    held.select("a")
    base = small()(X)
    with held.disabled():
        held.delete("a")
        held.add("b", asked(2), seed=5)
    assert torch.equal(held.model(X), base)
    with held.disabled():
        held.select("b")
        assert torch.equal(held.model(X), base)
    assert relative(held.model(X), base) > 0.01


def test_what_changes_the_base_is_refused_before_it_does():
    held = adapters.ManyAdapters(small(), asked(4), places=2)
    state = {n: p.clone() for n, p in held.model.named_parameters()}
    quantized = LoraSpec(target_modules=("0",), init_lora_weights="loftq", loftq_config={"loftq_bits": 2}, rank=2)
    frozen = LoraSpec(rank=2, target_modules=("0",), init_lora_weights="mica")
    for spec in (quantized, frozen):
        with pytest.raises(TargetError, match="changes the base, freezes a factor"):
            held.add("l", spec)
        with pytest.raises(TargetError, match="changes the base, freezes a factor"):
            adapters.ManyAdapters(small(), spec, places=1)
    assert all(torch.equal(p, state[n]) for n, p in held.model.named_parameters())
    held.model[0].weight.requires_grad_(True)
    held.add("a", asked(2))
    assert held.model[0].weight.requires_grad


def test_a_swap_in_training_forgets_who_was_there():
    held = adapters.ManyAdapters(small(), asked(4), places=1)
    held.add("a", asked(4))
    held.select("a")
    optimizer = torch.optim.AdamW([p for p in held.model.parameters() if p.requires_grad], lr=0.1)
    for swap in (False, False, True, False):
        if swap:
            held.replace("a", asked(2))
            held.forget("a", optimizer)
        held.model(X).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert not held.layers["0"].lora_A[0, 2:].any() and held.layers["0"].lora_A[0, :2].all()


def test_what_eva_found_is_kept_in_its_file(tmp_path):
    model = small()
    spec = LoraSpec(rank=2, target_modules="all-linear", init_lora_weights="eva", eva_config={"rho": 1.0})
    found = adapters.bind.make(model, spec, batches=[{"input": torch.randn(40, 6)}])
    held = adapters.ManyAdapters(model, asked(4), places=1)
    held.add("e", found)
    held.select("e")
    held.save("e", tmp_path)
    again = adapters.wrap(small(), adapters.read_spec(tmp_path))
    adapters.load(again, tmp_path)
    assert relative(again(X), held.model(X)) < TOLERANCE


def test_choosing_is_compiled_once():
    held = adapters.ManyAdapters(small(), asked(4), places=2)
    held.add("a", asked(2))
    compiled = torch.compile(held.model, backend="eager")
    torch._dynamo.utils.counters.clear()
    with torch._dynamo.config.patch(error_on_recompile=True):
        held.select("a")
        first = compiled(X)
        with held.disabled():
            assert relative(compiled(X), first) > 0.01
        held.add("b", asked(4), seed=3)
        held.select("b")
        assert relative(compiled(X), first) > 0.01


def test_adapters_follow_their_model_to_another_device():
    """As to CUDA, where a Parameter stays the same object: its tensor is another."""
    model = small()
    adapter = adapters.bind.make(model, asked(2))
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        model.to("meta")
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    adapters.bind.attach(model, adapter)
    assert {t.device.type for t in (*model.parameters(), *model.buffers())} == {"meta"}


def test_rows_that_are_not_known_are_refused():
    """Where the sequence comes first, a layer that gets it whole would take its first part for the first rows."""

    def model(dim):
        first = adapters.ColumnParallelLinear(
            6, 8, gather_output=False, sequence_parallel_enabled=True, sequence_dimension=dim
        )
        return torch.nn.Sequential(torch.nn.Embedding(9, 6), first, torch.nn.Linear(8, 4))

    spec = LoraSpec(rank=2, target_modules=("0", "1", "2"))
    with pytest.raises(TargetError, match=r"^2: ManyAdapters: gets its sequence whole, where others' comes first"):
        adapters.ManyAdapters(model(0), spec, places=1)
    adapters.ManyAdapters(model(0), dataclasses.replace(spec, target_modules=("0", "1")), places=1)
    adapters.ManyAdapters(model(1), spec, places=1)


def test_tied_places_are_refused(small_models):
    tied = LoraSpec(rank=2, target_modules=("embed_tokens", "lm_head"), ensure_weight_tying=True)
    with pytest.raises(TargetError, match="ensure_weight_tying would tie one layer's places"):
        adapters.ManyAdapters(models.load(small_models["qwen3"]), tied, places=1)
