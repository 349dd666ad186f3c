"""Do q, k, v and gate, up share one gather under sequence parallel, with nothing else changed? On two real processes.

That the maths is right is a law (`test_laws.law_siblings_share_a_gather`); here are whole models, against one process.
"""

from collections import Counter

import pytest
import torch
from pool import pool
from small_models import ids_of, relative, small_models_fixture  # noqa: F401  (a fixture)
from test_counts import Recorder
from torch.utils.flop_counter import FlopCounterMode

import adapters
import lora_fn
from adapters import models
from adapters.bound import LoraLayer
from lora_fn import LayerSpec, LoraSpec, Quantization, SpecError, siblings
from lora_fn.axis import axis_of_mesh
from lora_fn.reshard import gather

SIZE, LENGTH = 2, 12
FUSED = {"fuse_qkv": True, "fuse_gate_up": True}
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
SOME = ("q_proj", "v_proj", "up_proj")

# What is asked for -> (the spec's options, the model's).
CASES = {
    "plain": ({}, {}),
    "dropout": ({"dropout": 0.3}, {}),
    "some siblings": ({"target_modules": SOME, "dropout": 0.3}, {}),
    "some, the others' biases trained": ({"target_modules": SOME, "bias": "all"}, {}),
    "ranks": ({"rank_pattern": {"k_proj": 1, "up_proj": 5}, "alpha_pattern": {"v_proj": 9.0}, "use_rslora": True}, {}),
    "biases": ({"lora_bias": True}, {}),
    "DoRA": ({"use_dora": True, "dropout": 0.3}, {}),
    "KaSA": ({"kasa_config": {}}, {}),
    "aLoRA": ({"alora_invocation_tokens": (5, 6)}, {}),
    "stacked": ({"layer_replication": ((0, 2), (1, 2))}, {}),
    "fused": ({"dropout": 0.3, "rank_pattern": {"k_proj": 1}}, FUSED),
    "fused, some": ({"target_modules": SOME}, FUSED),
    "quantized": ({"dropout": 0.3}, {"quantize": Quantization(code="int8")}),
}


def tokens():
    """ids with aLoRA's invocation in the middle of the first row."""
    ids = ids_of(length=LENGTH)
    ids[0, 7:9] = torch.tensor([5, 6])
    return ids


def adapted(mesh, directory, options, form):
    """A model in training under sequence parallel, its factors random and the same at every size."""
    spec = LoraSpec(**{"rank": 3, "target_modules": LINEARS, "init_lora_weights": False} | options)
    model = models.load(directory, mesh=mesh, sequence_parallel=True, dtype=torch.float64, **form)
    adapters.wrap(model, spec, seed=3, gradients="deferred", dtype=torch.float64)
    adapters.set_dropout_key(model, torch.tensor(7))
    if spec.variant == "alora":
        adapters.set_invocation(model, tokens())
    return model.train()


def step(model):
    """The loss, and every trained parameter's whole gradient."""
    loss = model(input_ids=tokens(), labels=tokens()).loss
    loss.backward()
    grads = {path: {n: p.grad for n, p in of.items()} for path, of in adapters.factors(model).items()}
    specs = adapters.specs(model)
    found = {"loss": loss.detach()}
    for path, of in lora_fn.sync_gradients(grads, specs).items():
        found |= {f"{path}.{name}": grad for name, grad in gather(of, specs[path]).items()}
    return found


def steps(mesh, directories, cases):
    found = {}
    for name, directory in directories.items():
        for case in cases:
            found[name, case] = step(adapted(mesh, directory, *CASES[case]))
    return found


@pytest.mark.parametrize(("model", "cases"), (("llama", list(CASES)), ("qwen3", ["dropout", "fused"])))
def test_loss_and_gradients_are_those_of_one_process(model, cases, small_models):
    directories = {model: small_models[model]}
    want = steps(None, directories, cases)
    for found in pool(SIZE).run(steps, directories, cases):
        for case, of in want.items():
            assert found[case].keys() == of.keys() and len(of) > 6
            errors = {name: relative(found[case][name], grad) for name, grad in of.items()}
            assert max(errors.values()) <= 1e-5, (case, max(errors, key=errors.get), max(errors.values()))


def brought(model):
    """Of the adapted layers that get a block's input: how many compute with what was brought, and how many do not."""
    seen = Counter()

    def noting(apply):
        def noted(params, x, spec, *args, **more):
            seen["hs" in more] += spec.input == "gathered" and bool(spec.updates)
            return apply(params, x, spec, *args, **more)

        return noted

    with pytest.MonkeyPatch.context() as patch:
        for name in ("apply", "apply_many"):
            patch.setattr(lora_fn, name, noting(getattr(lora_fn, name)))
        model(input_ids=tokens())
    return +seen


def learning(model):
    """The same, its first block's input wanting a gradient as those of the others do."""
    model.model.embed_tokens.register_forward_hook(lambda module, args, y: y.detach().requires_grad_())
    return model


def who_is_brought(mesh, directory):
    cases = ("plain", "some siblings", "fused", "stacked")
    found = {name: brought(learning(adapted(mesh, directory, *CASES[name]))) for name in cases}
    frozen = adapted(mesh, directory, *CASES["plain"])
    found["frozen embeddings"] = brought(frozen)
    with torch.no_grad():
        found["no gradients"] = brought(frozen)
    held = adapters.ManyAdapters(
        models.load(directory, mesh=mesh, sequence_parallel=True),
        LoraSpec(rank=3, target_modules=LINEARS),
        places=2,
    )
    found["rows"] = brought(learning(held.model))
    with_cache = adapted(mesh, directory, {}, {}).eval()
    with_cache(input_ids=tokens(), use_cache=True)
    left = [m for m in with_cache.modules() if isinstance(m, LoraLayer) and m.brought is not None]
    return found | {"left": len(left)}


def test_every_sibling_is_brought_its_own(small_models):
    number = {"plain": 10, "some siblings": 6, "fused": 4, "stacked": 15, "rows": 10}
    expected = {name: {True: n} for name, n in number.items()} | {"left": 0}
    expected |= {"frozen embeddings": {True: 7, False: 3}, "no gradients": {True: 10}}
    assert pool(SIZE).run(who_is_brought, small_models["llama"]) == [expected] * SIZE


def counted(mesh, directory, form):
    """What a step of the frozen model communicates, what the adapted one does, and its FLOPs over what it must be."""
    found = []
    for rank in (0, 3):
        model = models.load(directory, mesh=mesh, sequence_parallel=True, **form).train()
        if rank:
            spec = LoraSpec(rank=rank, target_modules=LINEARS, init_lora_weights=False)
            adapters.wrap(model, spec, gradients="deferred").train()
        learning(model)
        with Recorder() as recorder, FlopCounterMode(display=False) as flops:
            model(input_ids=tokens(), labels=tokens()).loss.backward()
        found.append((recorder.seen, flops.get_total_flops()))
    (base, few), (ours, many) = found
    sizes = sum(s.in_features * len(s.updates) + sum(p.size for p in s.updates) for s in adapters.specs(model).values())
    return base, ours, (many - few) / (6 * 2 * LENGTH * rank * sizes)


@pytest.mark.parametrize("form", ({}, FUSED), ids=("separate", "fused"))
def test_h_rides_the_gather_of_x_and_costs_its_share(form, small_models):
    for base, ours, added in pool(SIZE).run(counted, small_models["llama-1-layer"], form):
        assert [kind for kind, _ in ours] == [kind for kind, _ in base]
        more = Counter(kind for (kind, n), (_, m) in zip(ours, base, strict=True) for _ in range(n - m))
        of_columns, of_rows = 3 * 3 + 2 * 3, 2 * 3  # ranks
        num_tokens = 2 * LENGTH
        # Forward, x and H are gathered in parts and y and H are scattered whole; backward, the other way round.
        both = of_columns + of_rows
        assert more == {"all-gather": num_tokens // SIZE * both, "reduce-scatter": num_tokens * both}
        assert added == 1 / SIZE


def communicated(mesh, directory, form):
    """How often an adapted model reduces and scatters: as it is trained, and where its first block's input learns."""
    found = []
    for change in (lambda model: model, learning):
        model = models.load(directory, mesh=mesh, sequence_parallel=True, **form)
        adapters.wrap(model, LoraSpec(rank=3, target_modules=LINEARS), gradients="deferred").train()
        with Recorder() as recorder:
            change(model)(input_ids=tokens(), labels=tokens()).loss.backward()
        found.append(Counter(kind for kind, _ in recorder.seen))
    return found


@pytest.mark.parametrize("form", ({}, FUSED), ids=("separate", "fused"))
def test_nothing_rides_back_where_nothing_has_learned(form, small_models):
    """The frozen model has no backward below its first block, so an adapter may communicate nothing there."""
    for trained, learned in pool(SIZE).run(communicated, small_models["llama"], form):
        # Else the first gather's gradient comes back, and that of the cut of the embeddings before it.
        assert learned - trained == {"reduce-scatter": 1, "all-gather": 1} and not trained - learned


def base_and_no_update(mesh, directory, form):
    """Logits of the base, and of a model whose lora_B is zero."""
    model = models.load(directory, mesh=mesh, sequence_parallel=True, **form)
    with torch.no_grad():
        base = model(input_ids=tokens()).logits
        adapters.wrap(model, LoraSpec(rank=3, target_modules=LINEARS))
        return base, model(input_ids=tokens()).logits


@pytest.mark.parametrize("form", ({}, FUSED), ids=("separate", "fused"))
def test_no_update_is_the_base_bit_for_bit(form, small_models):
    for base, none in pool(SIZE).run(base_and_no_update, small_models["llama"], form):
        assert torch.equal(base, none)


def without_gradient(mesh):
    """What is communicated, and saved of X, where x wants no gradient: as in the first layer over frozen embeddings."""
    axis, x = axis_of_mesh(mesh, "tp"), torch.ones(2, 3, 8)
    down = torch.ones(4, 8, requires_grad=True)
    with Recorder() as recorder:
        whole, [[h], [again]] = siblings.gathered(
            x, [lambda x: (x, [x @ down.T]), lambda x: (x, [2 * x @ down.T])], axis, dim=1
        )
        forward = list(recorder.seen)
        (h.sum() + again.sum()).backward()
    contiguous = whole.is_contiguous() and h.is_contiguous()
    return forward, recorder.seen[len(forward) :], whole.requires_grad, down.grad, contiguous


def test_where_x_wants_no_gradient_h_alone_rides_back():
    forward, backward = [("all-gather", 2 * 3 * 16)], [("reduce-scatter", 2 * 6 * 8)]
    for seen, back, wants, grad, contiguous in pool(SIZE).run(without_gradient):
        assert (seen, back, wants, contiguous) == (forward, backward, False, True)
        assert torch.equal(grad, torch.full((4, 8), 3.0 * SIZE * 2 * 3))


def test_another_input_is_not_what_was_brought():
    layer = adapters.wrap(
        torch.nn.Sequential(adapters.ColumnParallelLinear(4, 6, gather_output=False, input="gathered")),
        LoraSpec(rank=2, target_modules=("0",), init_lora_weights=False),
    )[0]
    x = torch.ones(2, 3, 4)
    expected = layer(x)
    layer.bring(x, [torch.zeros(2, 3, 2)])
    assert torch.equal(layer(x.clone()), expected)
    layer.bring(x, [torch.zeros(2, 3, 2)])
    assert not torch.equal(layer(x), expected)
    assert torch.equal(layer(x), expected), "it is brought for one call"


def test_a_layer_that_gathers_takes_no_h():
    spec = LayerSpec(kind="column", in_features=2, out_features=2, rank=1)
    params = {"weight": torch.ones(2, 2), "lora_A": torch.ones(1, 2), "lora_B": torch.ones(2, 1)}
    with pytest.raises(SpecError, match=r"a column layer whose input is 'replicated': hs are given"):
        lora_fn.apply(params, torch.ones(3, 2), spec, hs=[torch.ones(3, 1)])
