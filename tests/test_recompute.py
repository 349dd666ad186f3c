"""Is what the backward computes again what was there, bit for bit, and is it not saved? Counted in bytes, not timed."""

import copy
import functools
import weakref
from dataclasses import replace
from pathlib import Path

import jobs
import pytest
import torch
from jobs import job_models_fixture  # noqa: F401  (a fixture)
from pool import pool
from small_models import COMMON, ids_of, small_models_fixture  # noqa: F401  (a fixture)
from test_train import assert_same_training
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import adapters
from adapters import bind, models, recompute, sweep, train
from adapters.train import Job
from lora_fn import LoraSpec, SpecError, TargetError, value_and_grad

LIMIT = 1.05  # saved bytes, against the frozen model
KINDS = ("Llama", "Qwen3", "Granite")
WIDE = {"hidden_size": 128, "intermediate_size": 352, "head_dim": 16}
SHAPE = (2, 128, 128)
SPEC = LoraSpec(rank=4, init_lora_weights=False, target_modules="all-linear", exclude_modules=("lm_head",))
DROPOUT = LoraSpec(rank=4, init_lora_weights=False, target_modules="all-linear", dropout=0.3)
KEY = torch.tensor(5)


def storages(tree):
    return [t.untyped_storage() for t in tree_leaves(tree) if isinstance(t, torch.Tensor)]


class Live(TorchDispatchMode):
    """The bytes of all tensors made inside that live, and the most there were."""

    def __init__(self):
        super().__init__()
        self.storages, self.now, self.most = set(), 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **kwargs or {})
        given = {storage._cdata for storage in storages((args, kwargs))}
        for storage in storages(made):
            if storage._cdata not in self.storages | given:
                self.storages.add(storage._cdata)
                self.now += storage.nbytes()
                self.most = max(self.most, self.now)
                weakref.finalize(storage, self.gone, storage._cdata, storage.nbytes())
        return made

    def gone(self, storage, nbytes):
        self.storages.discard(storage)
        self.now -= nbytes


def saving(model, loss):
    """(bytes that the backward of loss() has for itself, as hooks see them; what all is alive then; the most that was;
    gradients by name)."""
    held = storages([*model.parameters(), *model.buffers()])  # kept, or another gets the place of dropout's old key
    own, saved = {storage._cdata for storage in held}, {}

    def pack(t):
        storage = t.untyped_storage()
        if storage._cdata not in own and storage._cdata not in saved:
            saved[storage._cdata] = storage.nbytes()
            weakref.finalize(storage, saved.pop, storage._cdata, None)  # another may get its place
        return t

    with Live() as live:
        with saved_tensors_hooks(pack, lambda t: t):
            value = loss()
        kept, alive = sum(saved.values()), live.now
        value.backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return kept, alive, live.most, grads


def of_embeddings(model, x):
    """A loss through all of a model, with a gradient back to its embeddings."""

    def loss():
        if vars(model).get("adapter") is not None:
            adapters.set_dropout_key(model, KEY)
        return model(inputs_embeds=x.detach().requires_grad_(), use_cache=False).logits.float().square().mean()

    return loss


def of_ids(model, ids):
    def loss():
        adapters.set_dropout_key(model, KEY)
        return model(input_ids=ids, labels=ids).loss

    return loss


def equal(found, expected):
    return found.keys() == expected.keys() and all(torch.equal(g, expected[name]) for name, g in found.items())


def wide(kind, dtype=torch.bfloat16):
    """A stock model of a width that tells tokens from ranks, frozen."""
    import transformers

    config = getattr(transformers, f"{kind}Config")(**COMMON | WIDE)
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}ForCausalLM")(config).to(dtype)
    return model.requires_grad_(False).train()


def inputs(dtype=torch.bfloat16):
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(1)).to(dtype)


# ------------------------------------------------------------------------------------------------------------- bytes


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kind", KINDS)
def test_no_more_is_saved_than_for_the_frozen_model(kind, dtype):
    x = inputs(dtype)
    frozen = saving(model := wide(kind, dtype), of_embeddings(model, x))
    plain = saving(model := adapters.wrap(wide(kind, dtype), SPEC), of_embeddings(model, x))
    found = saving(model := adapters.wrap(wide(kind, dtype), SPEC, recompute="elementwise"), of_embeddings(model, x))
    assert plain[0] > 1.2 * frozen[0], "else there would be nothing to show"
    assert found[0] <= LIMIT * frozen[0]
    assert found[1] <= LIMIT * frozen[1] and found[2] <= min(plain[2], LIMIT * frozen[2])
    assert equal(found[3], plain[3]) and len(found[3]) == len(bind.flat(bind.factors(model)))


def test_only_what_is_saved_anyway_is_a_source():
    """Of a layer whose input wants no gradient, the frozen model saves nothing: neither gate nor up, nor the norm's
    input. Then it is the adapted layer's input that is saved."""
    spec = LoraSpec(rank=4, target_modules=("0.mlp.down_proj", "0.self_attn.q_proj"), init_lora_weights=False)
    ids = ids_of(2, 64)
    plain, found = (
        saving(model := adapters.wrap(wide("Llama"), spec, recompute=policy), of_ids(model, ids))
        for policy in (None, "elementwise")
    )
    assert found[0] <= plain[0] and found[1] <= plain[1] and equal(found[3], plain[3])


def calls(module, loss):
    """How often a module's forward is called in the backward of loss(), and how often that of all of its class."""
    seen, forward = [], type(module).forward

    def counted(self, *args):
        seen.append(self)
        return forward(self, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(module), "forward", counted)
        value = loss()
        seen.clear()
        value.backward()
    return sum(each is module for each in seen), len(seen)


def test_what_several_need_is_computed_again_once():
    model = adapters.wrap(wide("Llama"), SPEC, recompute="elementwise")
    layer, loss = model.model.layers[1], of_embeddings(model, inputs())
    assert calls(layer.mlp.act_fn, loss) == (1, 2)
    # Copies of norms are called, not the modules: two in each layer; nobody saves the last one's output.
    assert calls(layer.input_layernorm, loss) == (0, 4)


def test_nothing_is_held_after_the_backward():
    model = adapters.wrap(wide("Llama"), SPEC, recompute="elementwise")
    for p in bind.flat(bind.factors(model)).values():
        p.grad = torch.zeros_like(p)
    with Live() as live:
        of_embeddings(model, inputs())().backward()
    adapters.set_dropout_key(model, KEY)  # in the place of those that the layers keep of that call
    assert live.now == 0


# ---------------------------------------------------------------------------------------------------------- processes

FUSED = {"fuse_qkv": True, "fuse_gate_up": True}
CUTS = ({}, {"sequence_parallel": True}, {"sequence_parallel": True} | FUSED)


def alternately(model, spec, loss):
    """What `saving` says of a model with an adapter: without the policy, and with it."""
    for policy in (None, "elementwise"):
        adapters.wrap(model, spec, recompute=policy)
        yield saving(model, loss)
        bind.detach(model)


def compared(mesh, directories, wide_directory):
    """What is wrong on one process, and the bytes saved, against the frozen model: without the policy, and with it."""
    wrong, ratios = [], []
    for cut in CUTS:
        for name, directory in directories.items():
            model = models.load(directory, mesh=mesh, **cut).train()
            plain, found = alternately(model, DROPOUT, of_ids(model, ids_of()))
            wrong += [(name, cut)] * (not equal(found[3], plain[3]) or not found[0] < plain[0])
        model = models.load(wide_directory, mesh=mesh, **cut).requires_grad_(False).train()
        frozen = saving(model, of_embeddings(model, inputs()))[0]
        adapted = alternately(model, SPEC, of_embeddings(model, inputs()))
        ratios.append(tuple(saved / frozen for saved, *_ in adapted))
    return wrong, ratios


@pytest.fixture(scope="module")
def wide_directory(tmp_path_factory):
    directory = str(tmp_path_factory.mktemp("wide"))
    wide("Llama").save_pretrained(directory)
    return directory


@pytest.mark.parametrize("size", [1, 2])
def test_gradients_are_the_same_bits_however_the_model_is_cut(size, small_models, wide_directory):
    directories = {name: small_models[name] for name in ("llama", "qwen3", "granite")}
    results = (
        pool(size).run(compared, directories, wide_directory)
        if size > 1
        else [compared(None, directories, wide_directory)]
    )
    for wrong, ratios in results:
        assert not wrong
        assert max(found for _, found in ratios) <= LIMIT
        assert min(plain for plain, _ in ratios) > 1.2, "else there would be nothing to show"


# ------------------------------------------------------------------------------------------------- what goes with it


def grads_of(model, ids, run=None):
    loss = of_ids(model, ids)
    (run or torch.Tensor.backward)(loss())
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.fixture(scope="module")
def adapted():
    """(without the policy, with it), the same otherwise."""
    return tuple(adapters.wrap(wide("Qwen3"), SPEC, recompute=policy) for policy in (None, "elementwise"))


@pytest.fixture
def both(adapted):
    yield adapted
    for model in adapted:
        model.zero_grad()


def test_a_graph_is_gone_through_twice(both):
    def twice(loss):
        loss.backward(retain_graph=True)
        loss.backward()

    plain, found = (grads_of(model, ids_of(), twice) for model in both)
    assert equal(found, plain)


def test_second_derivatives_are_the_same(both):
    """With attention that has some."""

    def penalised(loss, model):
        factors = [p for p in model.parameters() if p.requires_grad]
        first = torch.autograd.grad(loss, factors, create_graph=True)
        sum(g.square().sum() for g in first).backward()

    with sdpa_kernel(SDPBackend.MATH):
        plain, found = (grads_of(model, ids_of(), functools.partial(penalised, model=model)) for model in both)
    assert equal(found, plain)


@pytest.mark.parametrize("reentrant", [False, True])
def test_layers_that_are_computed_again_whole_are_left_alone(both, reentrant):
    for model in both:
        model.activation_checkpointing_enable({"use_reentrant": reentrant})
    try:
        plain, found = (saving(model, of_embeddings(model, inputs())) for model in both)
        assert equal(found[3], plain[3]) and found[:2] == plain[:2] and found[3]
    finally:
        for model in both:
            model.activation_checkpointing_disable()


def test_norms_alone_are_computed_again():
    """Mixtral's, whose experts are not known."""
    attention = LoraSpec(rank=4, init_lora_weights=False, target_modules=("q_proj", "k_proj", "v_proj"))
    plain, found = (
        saving(model := adapters.wrap(wide("Mixtral"), attention, recompute=policy), of_embeddings(model, inputs()))
        for policy in (None, "elementwise")
    )
    assert equal(found[3], plain[3]) and len(found[3]) == 12 and found[0] < plain[0]


def test_others_hooks_get_what_is_saved(both):
    with save_on_cpu():
        plain, found = (grads_of(model, ids_of()) for model in both)
    assert equal(found, plain)


def test_parameters_of_a_call_are_those_of_its_backward(both):
    """functional_call takes a norm's weight away before the backward comes."""
    norms = {name: p.detach() * 1.5 for name, p in both[0].named_parameters() if name.endswith("layernorm.weight")}

    def grads(model):
        factors = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}

        def loss(factors):
            call = torch.func.functional_call
            return call(model, factors | norms, kwargs={"input_ids": ids_of(), "labels": ids_of()}).loss

        return value_and_grad(loss)(factors)[1]

    plain, found = map(grads, both)
    assert equal(found, plain) and not equal(found, grads_of(both[0], ids_of()))


def test_evaluation_and_errors_leave_nothing_on(both):
    model = both[1]
    with torch.no_grad():
        model(ids_of())
    with pytest.raises(IndexError):
        model(ids_of() + 1000)
    assert torch._C._autograd._top_saved_tensors_default_hooks(False) is None


def test_it_goes_with_the_adapter():
    model = wide("Llama")
    hooks = [dict(m._forward_hooks) | dict(m._forward_pre_hooks) for m in model.modules()]
    adapters.wrap(model, SPEC, recompute="elementwise")
    bind.detach(model)
    assert hooks == [dict(m._forward_hooks) | dict(m._forward_pre_hooks) for m in model.modules()]


@pytest.fixture(scope="module")
def job(job_models, tmp_path_factory):
    place = tmp_path_factory.mktemp("recompute")
    return Job(
        model=job_models["llama-1-layer"],
        data=(jobs.write_lines(place / "data.jsonl", jobs.uneven(8)),),
        output=str(place / "plain"),
        lora=DROPOUT,
        sequence_length=40,
        batch_size=4,
        accumulation=2,
        steps=2,
        warmup=1,
        learning_rate=1e-2,
    )


def test_a_job_comes_out_the_same(job, monkeypatch):
    """Alone, and in a sweep."""
    put_on, seen = recompute.put_on, []

    def noted(model, policy):
        handles = put_on(model, policy)
        seen.append(bool(handles))
        return handles

    monkeypatch.setattr(recompute, "put_on", noted)
    again = jobs.elsewhere(job, "again", recompute="elementwise")
    place = Path(job.output).with_name("sweep")
    both = {name: replace(again, output=str(place / name), seed=seed) for name, seed in (("same", 0), ("other", 1))}
    for each in (job, again):
        train.finetune(each, quiet=True)
    sweep.sweep(both, quiet=True)
    assert_same_training(again, job, tolerance=0.0)
    assert_same_training(both["same"], job)
    assert sum(seen) == 2


# ---------------------------------------------------------------------------------------------------------- bad input


def test_a_policy_that_does_nothing_is_refused():
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Tanh())
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(TargetError, match=r"no module that is known to be elementwise .*LlamaMLP"):
        adapters.wrap(model, LoraSpec(target_modules=("0",)), recompute="elementwise")
    with pytest.raises(SpecError, match="recompute is 'all', expected 'elementwise', or None"):
        adapters.wrap(model, LoraSpec(target_modules=("0",)), recompute="all")
    assert model.state_dict().keys() == before.keys()


def test_transforms_of_gradients_are_refused(both):
    factors = {name: p.detach() for name, p in both[1].named_parameters() if p.requires_grad}

    def loss(factors):
        return torch.func.functional_call(both[1], factors, kwargs={"input_ids": ids_of(), "labels": ids_of()}).loss

    with pytest.raises(SpecError, match=r"inside a torch\.func transform"):
        torch.func.grad(loss)(factors)


def test_a_job_computes_again_in_one_way():
    with pytest.raises(SpecError, match="--recompute: cannot be with --activation-checkpointing"):
        Job(model="m", data=("d",), output="o", recompute="elementwise", activation_checkpointing=True)
    with pytest.raises(SpecError, match="--recompute: is 'all', expected one of elementwise"):
        Job(model="m", data=("d",), output="o", recompute="all")
