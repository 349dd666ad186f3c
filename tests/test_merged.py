"""Are merged weights the stock model's, one after the other, on every process, and is the model left as it was?"""

import weakref

import peft
import pytest
import torch
from pool import pool
from small_models import ids_of, relative, small_models_fixture, stock  # noqa: F401  (a fixture)
from torch import nn

import adapters
import adapters.peft
from adapters import models, parallel
from lora_fn import LoraSpec, SpecError

TOLERANCE = 1e-5
# One of each: separate and fused, copies of key-value heads, a padded vocabulary, tied, biases, bf16.
CASES = {
    "llama": ("llama", {}),
    "llama, sequence parallel": ("llama", {"sequence_parallel": True}),
    "llama, fused": ("llama", {"fuse_qkv": True, "fuse_gate_up": True}),
    "llama, copies": ("llama", {"kv_size_multiplier": 2, "fuse_gate_up": True}),
    "llama, copies, fused": ("llama", {"kv_size_multiplier": 2, "fuse_qkv": True}),
    "llama in bf16": ("llama-bf16", {"fuse_gate_up": True}),
    "qwen3": ("qwen3", {}),
    "granite-tied": ("granite-tied", {"fuse_qkv": True}),
}


@pytest.fixture(scope="module")
def expected(small_models, tmp_path_factory):
    """Model -> (directory of an adapter by stock PEFT, the weights of what it merges)."""
    place, found = tmp_path_factory.mktemp("merged"), {}
    for name in {name for name, _ in CASES.values()}:
        targets = ["q_proj", "v_proj", "o_proj", "up_proj", "down_proj", *(["lm_head"] if name == "llama" else [])]
        torch.manual_seed(0)
        model = stock(small_models[name], dtype="auto")
        config = peft.LoraConfig(r=3, lora_alpha=6, target_modules=targets, init_lora_weights=False)
        model = peft.get_peft_model(model, config)
        model.save_pretrained(place / name, save_embedding_layers=False)
        found[name] = (place / name, model.merge_and_unload().state_dict())
    return found


def stream(mesh, directory, adapter, options, to):
    """All merged weights, each gone before the next one comes; and whether the model gives what it gave before."""
    model = models.load(directory, mesh=mesh, gather_logits=True, **options)
    model = adapters.peft.PeftModel.from_pretrained(model, adapter)
    before, found, alive = model(ids_of()).logits, {}, []
    mine = {p.data_ptr() for p in model.parameters()}
    for name, t in adapters.merged_weights(model, to=to):
        assert name not in found
        if t is not None:
            assert t.data_ptr() not in mine
            found[name] = t.clone()
            alive.append(weakref.ref(t))
        del t
    return found, torch.equal(model(ids_of()).logits, before)


def check(found, expected, tied):
    assert set(expected) - set(found) == ({"lm_head.weight"} if tied else set()) and set(found) <= set(expected)
    for name, t in found.items():
        assert t.dtype == expected[name].dtype and t.shape == expected[name].shape
        close = TOLERANCE if t.dtype == torch.float32 else 2 * torch.finfo(t.dtype).eps
        assert relative(t, expected[name]) < close, name


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("size", (1, 2, 4))
def test_merged_weights_are_those_of_stock_peft(size, case, small_models, expected):
    name, options = CASES[case]
    adapter, weights = expected[name]
    args = (small_models[name], adapter, options, "all")
    for found, unchanged in pool(size).run(stream, *args) if size > 1 else [stream(None, *args)]:
        check(found, weights, tied=name in ("qwen3", "granite-tied"))
        assert unchanged


def test_only_the_first_process_gets_them(small_models, expected):
    adapter, weights = expected["llama"]
    (first, _), (second, _) = pool(2).run(stream, small_models["llama"], adapter, {"fuse_qkv": True}, "first")
    check(first, weights, tied=False)
    assert second == {}


def test_what_is_not_adapted_and_what_is_disabled_is_the_base(small_models, expected):
    model, base = models.load(small_models["llama"], fuse_gate_up=True), stock(small_models["llama"]).state_dict()
    check(dict(adapters.merged_weights(model)), base, tied=False)
    model = adapters.peft.PeftModel.from_pretrained(model, expected["llama"][0])
    with model.disable_adapter():
        assert all(torch.equal(t, base[name]) for name, t in model.merged_weights())
    model.merge_adapter()
    found = adapters.peft.get_original_merged_weights_for_vllm(model)
    check(found, expected["llama"][1], tied=False)


def test_what_cannot_be_streamed_is_refused():
    with pytest.raises(SpecError, match="to is 'second', expected 'all' or 'first'"):
        next(adapters.merged_weights(nn.Sequential(), to="second"))


def test_embeddings_and_plain_layers():
    torch.manual_seed(0)
    model = nn.Sequential(parallel.ParallelEmbedding(11, 6), nn.Linear(6, 4))
    before = {name: p.clone() for name, p in model.named_parameters()}
    adapters.wrap(model, LoraSpec(rank=2, alpha=6, target_modules=("0", "1"), init_lora_weights=False))
    found = dict(adapters.merged_weights(model))
    words, linear = adapters.factors(model)["0"], adapters.factors(model)["1"]
    assert list(found) == ["0.weight", "1.weight", "1.bias"]
    assert relative(found["0.weight"], before["0.weight"] + 3 * (words["lora_B"] @ words["lora_A"]).T) < TOLERANCE
    assert relative(found["1.weight"], before["1.weight"] + 3 * linear["lora_B"] @ linear["lora_A"]) < TOLERANCE
    assert torch.equal(found["1.bias"], before["1.bias"])
