"""Does `wrap` adapt what PEFT adapts, as PEFT does, and leave everything else alone?"""

import copy
from dataclasses import replace

import peft
import pytest
import torch
from pool import pool
from safetensors.torch import load_file
from small_models import ids_of, relative, small_models_fixture, stock  # noqa: F401  (a fixture)
from torch import nn
from torch.func import functional_call, grad, vmap

import adapters
import lora_fn
from adapters import bind, models, parallel
from adapters.merge import merge
from lora_fn import LoraSpec, SpecError, TargetError
from lora_fn.reshard import gather

TOLERANCE = 1e-5


class Plain(nn.Module):
    """An embedding, two linears, one of them without a bias."""

    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(11, 6, padding_idx=2)
        self.up = nn.Linear(6, 10)
        self.down = nn.Linear(10, 5, bias=False)

    def forward(self, ids):
        return self.down(torch.tanh(self.up(self.words(ids))))


class Pictures(nn.Module):
    """Words as pictures, and two convolutions."""

    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(11, 12)
        self.first = nn.Conv2d(6, 8, (3, 2), stride=(2, 1), padding=(1, 0))
        self.second = nn.Conv2d(8, 5, 1, bias=False)

    def forward(self, ids):
        return self.second(torch.tanh(self.first(self.words(ids).view(len(ids), 6, -1, 2))))


def pictures():
    torch.manual_seed(0)
    return Pictures().eval()


def plain():
    torch.manual_seed(0)
    return Plain().eval()


def gpt2(*, tied=True):
    import transformers

    torch.manual_seed(0)
    sizes = dict(vocab_size=31, n_embd=12, n_layer=2, n_head=2, n_positions=16, bos_token_id=1, eos_token_id=1)
    config = transformers.GPT2Config(**sizes, use_cache=False, tie_word_embeddings=tied)
    return transformers.GPT2LMHeadModel(config).eval()


def output(model, ids):
    out = model(ids)
    return out if isinstance(out, torch.Tensor) else out.logits


def beside_peft(make, **options):
    """(wrapped by us, wrapped by PEFT), with the same random factors."""
    config = peft.LoraConfig(init_lora_weights=False, **options)
    theirs = peft.get_peft_model(make(), config).eval()
    spec = lora_fn.peft_format.from_config(config)
    ours = adapters.wrap(make(), spec).eval()
    with torch.no_grad():
        for path, of in bind.factors(ours).items():
            for name, p in of.items():
                p.copy_(factor_of_peft(theirs, path, name))
    return ours, theirs


def factor_of_peft(model, path, name):
    module = model.base_model.model.get_submodule(path)
    if isinstance(module, peft.tuners.lora.Embedding):
        return {"lora_A": module.lora_embedding_A, "lora_B": module.lora_embedding_B}[name]["default"]
    pair = {"lora_A": module.lora_A, "lora_B": module.lora_B, "lora_B_bias": module.lora_B}[name]["default"]
    return pair.bias if name == "lora_B_bias" else pair.weight


MODELS = {
    "linears": (plain, dict(r=3, lora_alpha=5, target_modules=["up", "down"]), 11),
    "an embedding": (plain, dict(r=2, target_modules=["words", "down"], use_rslora=True), 11),
    "lora_bias": (plain, dict(r=2, target_modules=["up"], lora_bias=True), 11),
    "convolutions": (pictures, dict(r=3, lora_alpha=5, target_modules=["first", "second", "words"]), 11),
    "a convolution with lora_bias": (pictures, dict(r=2, target_modules=["first"], lora_bias=True), 11),
    "Conv1D": (gpt2, dict(r=3, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True), 31),
}


@pytest.mark.parametrize("case", MODELS)
def test_a_plain_model_is_adapted_as_by_peft(case):
    make, options, vocabulary = MODELS[case]
    ours, theirs = beside_peft(make, **options)
    ids = torch.randint(0, vocabulary, (3, 7), generator=torch.Generator().manual_seed(0))
    found, expected = output(ours, ids), output(theirs, ids)
    assert relative(found, expected) < TOLERANCE
    assert relative(expected, output(make(), ids)) > 1e-3
    found.square().sum().backward()
    expected.square().sum().backward()
    for path, of in bind.factors(ours).items():
        for name, p in of.items():
            assert relative(p.grad, factor_of_peft(theirs, path, name).grad) < TOLERANCE


def test_convolutions_go_to_peft_and_back(tmp_path):
    ours, theirs = beside_peft(pictures, r=3, lora_alpha=5, target_modules=["first", "second"])
    ids = torch.randint(0, 11, (3, 7), generator=torch.Generator().manual_seed(0))
    adapters.save(ours, tmp_path / "ours")
    loaded = peft.PeftModel.from_pretrained(pictures(), tmp_path / "ours").eval()
    assert relative(output(loaded, ids), output(ours, ids)) < TOLERANCE
    theirs.save_pretrained(tmp_path / "theirs")
    again = adapters.wrap(pictures(), adapters.read_spec(tmp_path / "theirs"))
    adapters.load(again, tmp_path / "theirs")
    adapters.save(again, tmp_path / "again")
    stored, exported = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("theirs", "again"))
    assert stored.keys() == exported.keys() and all(torch.equal(stored[n], exported[n]) for n in stored)
    merged = theirs.merge_and_unload()
    for name in ("first", "second"):
        layer = ours.get_submodule(name)
        found = lora_fn.merge(layer.params(), layer.spec)
        assert relative(found["weight"], merged.get_submodule(name).weight) < TOLERANCE


ODD = {"dilation": 2, "groups": 2, "padding_mode": "reflect", "padding": "same"}


@pytest.mark.parametrize("name", ODD)
def test_a_convolution_that_we_do_not_have_is_refused(name):
    model = nn.Sequential(nn.Conv2d(4, 6, 3, **{name: ODD[name]}))
    with pytest.raises(TargetError, match=f"0: an nn.Conv2d with .*{name}.* cannot be adapted; leave it out"):
        adapters.wrap(model, LoraSpec(target_modules=("0",)))


def test_a_convolution_is_not_linear():
    told = adapters.specs(adapters.wrap(nn.Sequential(nn.Conv2d(4, 6, 1), nn.Linear(3, 2)), LoraSpec(rank=2)))
    assert list(told) == ["1"]


def test_an_adapter_of_transposed_weights_says_so_on_disk(tmp_path):
    """One of a square weight, where a transposed update would fit as well."""
    model = adapters.wrap(gpt2(), LoraSpec(rank=3, target_modules=("attn.c_proj",), init_lora_weights=False))
    ids = torch.randint(0, 31, (3, 7), generator=torch.Generator().manual_seed(0))
    expected = output(model, ids)
    adapters.save(model, tmp_path / "adapter")
    theirs = peft.PeftModel.from_pretrained(gpt2(), tmp_path / "adapter").eval()  # which would warn of a wrong config
    assert relative(output(theirs, ids), expected) < TOLERANCE
    gpt2().save_pretrained(tmp_path / "base")
    merge(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "merged", quiet=True)
    merged = type(gpt2()).from_pretrained(tmp_path / "merged").eval()
    assert relative(output(merged, ids), expected) < TOLERANCE


def test_everything_but_the_factors_is_frozen_and_keeps_its_name():
    model, before = adapters.wrap(plain(), LoraSpec(target_modules=("up",))), plain()
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trainable == {"up.lora_A", "up.lora_B"}
    assert set(before.state_dict()) == set(model.state_dict()) - trainable
    assert all(torch.equal(p, model.get_parameter(name)) for name, p in before.named_parameters())
    assert bind.lora_spec(model) == LoraSpec(target_modules=("up",))


def test_the_base_keeps_its_own_parameters():
    model = plain()
    weight = model.up.weight
    assert adapters.wrap(model, LoraSpec(target_modules=("up",))).up.weight is weight


def test_printing_tells_kind_rank_and_placement():
    axis = lora_fn.Axis(name="tp", size=2, index=0)
    model = nn.Sequential(parallel.ColumnParallelLinear(4, 6, gather_output=False, axis=axis))
    told = repr(adapters.wrap(model, LoraSpec(rank=3, alpha=6, target_modules=("0",))))
    for word in ("column", "4 -> 6", "rank=3", "scaling=2", "tp=2", "lora_A: Replicate()", "lora_B: Shard(dim=0)"):
        assert word in told


# ----------------------------------------------------------------------------------------------------------- targets

TARGETS = [
    dict(target_modules=["q_proj"]),
    dict(target_modules=["q_proj", "mlp.up_proj"]),
    dict(target_modules=["model.layers.1.self_attn.v_proj"]),
    dict(target_modules=r".*\.0\..*\.(q|o)_proj"),
    dict(target_modules="all-linear"),
    dict(target_modules="all-linear", exclude_modules=["down_proj"]),
    dict(target_modules=["q_proj", "down_proj"], exclude_modules=r".*\.1\..*"),
    dict(target_modules=["q_proj", "down_proj"], layers_to_transform=[1]),
    dict(target_modules=["q_proj", "down_proj"], layers_to_transform=1, layers_pattern="layers"),
    dict(target_modules=["q_proj", "o_proj"], rank_pattern={"o_proj": 2, "1.self_attn.q_proj": 3}),
    dict(target_modules=["q_proj", "o_proj"], alpha_pattern={r"layers\.0\..*": 3, "o_proj": 5}),
    dict(target_modules=["lm_head", "embed_tokens"]),
]


TARGETS_OF_GPT2 = [
    dict(target_modules="all-linear"),
    dict(target_modules=["c_proj"], layers_to_transform=[0], layers_pattern=["h"]),
    dict(target_modules=["attn.c_proj", "wte"], rank_pattern={"h.1.attn.c_proj": 2}),
]
CASES = [("llama", options) for options in TARGETS] + [("gpt2", options) for options in TARGETS_OF_GPT2]


@pytest.mark.parametrize(("name", "options"), CASES, ids=str)
@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to")
def test_targets_ranks_and_scalings_are_those_of_peft(name, options, small_models):
    def make():
        return gpt2(tied="wte" not in options["target_modules"]) if name == "gpt2" else stock(small_models[name])

    theirs = peft.get_peft_model(make(), peft.LoraConfig(r=4, lora_alpha=6, **options))
    expected = {
        name.removeprefix("base_model.model."): (module.r["default"], pytest.approx(module.scaling["default"]))
        for name, module in theirs.named_modules()
        if isinstance(module, peft.tuners.lora.LoraLayer)
    }
    spec = lora_fn.peft_format.from_config(peft.LoraConfig(r=4, lora_alpha=6, **options))
    ours = adapters.wrap(make(), spec)
    assert {name: (s.rank, s.scaling) for name, s in adapters.specs(ours).items()} == expected


def test_layers_are_counted_as_by_peft():
    """PEFT 0.17 does not see a list of layers at the top of a model, 0.21 does where its name is given."""
    names = ["h.0.up", "h.1.up", "model.h.1.up", "model.h.1.experts.0.up", "model.up"]

    def chosen(**options):
        spec = lora_fn.peft_format.from_config(peft.LoraConfig(target_modules=["up"], **options))
        return lora_fn.targets.select(names, spec)

    assert chosen(layers_to_transform=[1], layers_pattern="h") == ("h.1.up", "model.h.1.up", "model.h.1.experts.0.up")
    assert chosen(layers_to_transform=1) == ("model.h.1.up", "model.h.1.experts.0.up")
    assert chosen(layers_to_transform=[]) == tuple(names)  # empty means all


REFUSED = {
    "a suffix": (dict(target_modules=("upp",)), r"target_modules 'upp' matches none of the 3 layers; .* up"),
    "a regular expression": (dict(target_modules="upp.*"), "matches none of the 3 layers"),
    "not a regular expression": (dict(target_modules="(up"), "is not a regular expression"),
    "one of two": (dict(target_modules=("up", "dwn")), "'dwn' matches none of the 3 layers; .* down"),
    "excluded": (dict(target_modules=("up",), exclude_modules=("upp",)), "exclude_modules 'upp' matches none"),
    "all excluded": (dict(target_modules=("up",), exclude_modules=("up",)), "nothing is left to adapt"),
    "a rank": (
        dict(target_modules=("up",), rank_pattern={"down": 2}),
        "rank_pattern 'down' matches none of the adapted",
    ),
    "an alpha": (dict(target_modules=("up",), alpha_pattern={"x": 2}), "alpha_pattern 'x' matches none of the adapted"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_targets_that_match_nothing_are_refused_and_change_nothing(case):
    options, sentence = REFUSED[case]
    model = plain()
    with pytest.raises(TargetError, match=sentence):
        adapters.wrap(model, LoraSpec(**options))
    assert not bind.layers(model)
    assert all(p.requires_grad for p in model.parameters())


def test_what_cannot_be_adapted_is_refused(small_models):
    model = adapters.wrap(plain(), LoraSpec(target_modules=("up",)))
    with pytest.raises(TargetError, match="adapted already"):
        adapters.wrap(model, LoraSpec(target_modules=("down",)))
    with pytest.raises(TargetError, match=r"lm_head: shares its weight with model\.embed_tokens"):
        adapters.wrap(stock(small_models["qwen3"]), LoraSpec(target_modules=("lm_head",)))
    odd = nn.Sequential(nn.Embedding(4, 2, max_norm=1.0))
    with pytest.raises(TargetError, match="max_norm"):
        adapters.wrap(odd, LoraSpec(target_modules=("0",)))
    with pytest.raises(TargetError, match="has no adapter of its own"):
        bind.lora_spec(plain())


# ------------------------------------------------------------------------------------------------ the same everywhere

SPEC = LoraSpec(rank=3, alpha=6, dropout=0.3, target_modules="all-linear", init_lora_weights=False)


def behaviour(mesh, directory):
    """What must be the same at every size: canonical factors, outputs in training, base outputs with lora_B = 0."""
    found = {}
    for sequence_parallel in (False, True):
        model = models.load(directory, mesh=mesh, sequence_parallel=sequence_parallel, gather_logits=True)
        base = model(ids_of()).logits
        adapters.wrap(model, SPEC, seed=7)
        layers = bind.layers(model)
        factors = {
            (path, name): p
            for path, of in bind.factors(model).items()
            for name, p in gather({n: f.detach() for n, f in of.items()}, layers[path].spec).items()
        }
        model.train()
        try:
            model(ids_of())
            told = ""
        except TargetError as error:
            told = str(error)
        adapters.set_dropout_key(model, torch.tensor(5))
        dropped = model(ids_of()).logits.detach()
        adapters.set_dropout_key(model, torch.tensor(6))
        other = model(ids_of()).logits.detach()
        model.eval()
        kept = model(ids_of()).logits.detach()
        with torch.no_grad():
            for layer in layers.values():
                layer.lora_B.zero_()
        same = torch.equal(model(ids_of()).logits, base)
        found[sequence_parallel] = (factors, told, dropped, other, kept, same)
    return found


def test_factors_dropout_and_base_are_the_same_at_every_size(small_models):
    alone = behaviour(None, small_models["llama"])[False]
    for size in (1, 2, 4):
        everywhere = pool(size).run(behaviour, small_models["llama"]) if size > 1 else [{False: alone}]
        for each in everywhere:
            for factors, told, dropped, other, kept, same in each.values():
                assert all(torch.equal(factors[key], alone[0][key]) for key in alone[0])
                assert "has no key" in told and "set_dropout_key" in told
                assert relative(dropped, alone[2]) < TOLERANCE and relative(other, alone[3]) < TOLERANCE
                assert relative(kept, alone[4]) < TOLERANCE
                assert same
    assert relative(alone[2], alone[4]) > 1e-2 and relative(alone[2], alone[3]) > 1e-2


def test_transforms_go_through_a_wrapped_model():
    model = adapters.wrap(plain(), LoraSpec(rank=2, target_modules="all-linear", init_lora_weights=False))
    ids = torch.randint(0, 11, (4, 7), generator=torch.Generator().manual_seed(0))
    factors = bind.flat(bind.factors(model))

    def loss(factors, ids):
        return functional_call(model, factors, (ids,)).square().sum()

    whole = torch.autograd.grad(loss(factors, ids), list(factors.values()))
    each = vmap(grad(loss), in_dims=(None, 0))(factors, ids)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    of_compiled = torch.autograd.grad(compiled(factors, ids), list(factors.values()))
    for name, expected, found in zip(factors, whole, of_compiled, strict=True):
        assert relative(grad(loss)(factors, ids)[name], expected) < TOLERANCE
        assert relative(each[name].sum(0), expected) < TOLERANCE
        assert relative(found, expected) < TOLERANCE


# ---------------------------------------------------------------------------------------------- NxD's names on ours


def test_our_layers_have_nxds_arguments_and_attributes():
    axis = lora_fn.Axis(name="tp", size=2, index=1)
    column = parallel.ColumnParallelLinear(
        4, 6, bias=False, gather_output=False, stride=1, skip_bias_add=False, axis=axis
    )
    assert (column.input_size, column.output_size, column.output_size_per_partition) == (4, 6, 3)
    assert column.bias is None and column.weight.shape == (3, 4) and not column.gather_output
    row = parallel.RowParallelLinear(6, 4, input_is_parallel=True, sequence_parallel_enabled=True, axis=axis)
    assert (row.input_size_per_partition, row.input_is_parallel, row.sequence_dimension) == (3, True, 0)
    assert row.weight.shape == (4, 3) and row.bias.shape == (4,)
    table = parallel.ParallelEmbedding(7, 4, pad=True, axis=axis)
    assert (table.num_embeddings, table.embedding_dim, table.tensor_model_parallel_size) == (7, 4, 2)
    assert table.weight.shape == (4, 4) and torch.equal(table.weight[3], torch.zeros(4))


@pytest.mark.parametrize("fuse_qkv", (True, False))
@pytest.mark.parametrize("size", (1, 4))
def test_the_gqa_layer_has_nxds_arguments_and_attributes(size, fuse_qkv):
    axis = lora_fn.Axis(name="tp", size=size, index=size - 1)
    heads = lora_fn.Heads(query=4, key_value=2)
    options = dict(bias=True, gather_output=False, heads=heads, fuse_qkv=fuse_qkv, axis=axis)
    layer = parallel.GQAQKVColumnParallelLinear(6, [8, 4], **options)
    copies = 2 if size == 4 else 1
    assert (layer.input_size, layer.output_sizes, layer.kv_size_multiplier) == (6, [8, 4], copies)
    rows = (8 // size, 4 * copies // size)
    assert (layer.q_output_size_per_partition, layer.kv_output_size_per_partition) == rows
    shapes = {name: tuple(p.shape) for name, p in layer.named_parameters()}
    if fuse_qkv:
        assert shapes == {"weight_qkv": (rows[0] + 2 * rows[1], 6), "bias_qkv": (rows[0] + 2 * rows[1],)}
    else:
        weights = {f"weight_{n}": (rows[n != "q"], 6) for n in "qkv"}
        assert shapes == weights | {f"bias_{n}": (rows[n != "q"],) for n in "qkv"}
    if size == 1:
        q, k, v = layer(torch.ones(3, 6))
        assert (q.shape, k.shape, v.shape) == ((3, 8), (3, 4), (3, 4))
    with pytest.raises(SpecError, match="gather_output is True, expected False; heads stay sharded"):
        parallel.GQAQKVColumnParallelLinear(6, [8, 4], heads=heads)
    with pytest.raises(SpecError, match="unheard_of"):
        parallel.GQAQKVColumnParallelLinear(6, [8, 4], **options, unheard_of=1)


def test_hooks_of_a_layer_stay_and_can_be_taken_back():
    model, seen = nn.Sequential(nn.Linear(4, 3)), []
    before = model[0].register_forward_pre_hook(lambda module, args: seen.append("before"))
    after = model[0].register_forward_hook(lambda module, args, output: 2 * output)
    x = torch.ones(2, 4)
    expected = model(x)
    adapters.wrap(model, LoraSpec(target_modules=("0",)))
    assert torch.equal(model(x), expected) and seen == ["before"] * 2
    before.remove()
    after.remove()
    assert torch.equal(2 * model(x), expected) and seen == ["before"] * 2


def test_a_layer_in_two_places_is_adapted_in_both():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(4, 4)
            self.again = nn.ModuleList([self.first, nn.Linear(4, 4)])

        def forward(self, x):
            return self.again[1](self.again[0](self.first(x)))

    model, x = Twice(), torch.randn(3, 4)
    adapters.wrap(model, LoraSpec(rank=2, alpha=3, target_modules=("first",), init_lora_weights=False))
    assert model.first is model.again[0] and type(model.again[1]) is nn.Linear
    weight = lora_fn.merge(model.first.params(), model.first.spec)["weight"]
    expected = x
    for _ in range(2):
        expected = nn.functional.linear(expected, weight, model.first.bias)
    assert relative(model(x), model.again[1](expected)) < TOLERANCE


def test_a_layer_alone_is_not_wrapped():
    with pytest.raises(TargetError, match="the model is a layer itself, which has no place to be replaced in; put it"):
        adapters.wrap(nn.Linear(3, 2), LoraSpec())


def test_a_model_without_values_is_not_wrapped():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(4, 3))
    with pytest.raises(TargetError, match="0: is on the meta device, where its factors would be lost; fill the model"):
        adapters.wrap(model, LoraSpec(target_modules=("0",)))


def test_another_adapter_brings_its_own_scaling(small_models, tmp_path):
    model, other = (models.load(small_models["llama"]) for _ in range(2))
    ids = ids_of()
    first = LoraSpec(rank=3, alpha=6, target_modules=("q_proj", "v_proj"), init_lora_weights=False)
    second = replace(first, alpha=9, alpha_pattern={"q_proj": 40}, use_rslora=True)
    adapters.wrap(other, second, seed=8)
    adapters.save(other, tmp_path / "other")
    adapters.wrap(model, first)
    assert not torch.allclose(model(ids).logits, other(ids).logits, rtol=1e-3)
    adapters.load(model, tmp_path / "other")
    assert torch.equal(model(ids).logits, other(ids).logits)
    assert adapters.specs(model) == adapters.specs(other)
    adapters.save(model, tmp_path / "again")
    assert adapters.read_spec(tmp_path / "again") == adapters.read_spec(tmp_path / "other")


def test_a_change_of_alpha_changes_the_output_and_what_is_saved(tmp_path):
    torch.manual_seed(0)
    model, x = torch.nn.Sequential(torch.nn.Linear(5, 4)), torch.randn(3, 5)
    spec = LoraSpec(rank=2, alpha=3, target_modules=("0",), init_lora_weights=False)
    adapters.wrap(model, spec, dtype=torch.float64)
    base = torch.nn.functional.linear(x, model[0].weight, model[0].bias)
    before = model(x) - base
    adapters.rescale(model, replace(spec, alpha=12))
    assert torch.allclose(model(x) - base, 4 * before, rtol=1e-5, atol=1e-6)
    adapters.save(model, tmp_path)
    assert adapters.read_spec(tmp_path).alpha == 12
    with pytest.raises(TargetError, match="alpha_pattern 'up' matches none of the adapted layers"):
        adapters.rescale(model, replace(spec, alpha_pattern={"up": 2}))
    model.to(torch.bfloat16)
    assert model[0].scaling.dtype == torch.float32 and model[0].scaling.tolist() == [6.0]


def test_what_shares_a_factor_has_one_alpha():
    axis = lora_fn.Axis()
    fused = adapters.ColumnParallelLinear(6, 8, gather_output=False, parts={"gate": 4, "up": 4}, axis=axis)
    model = torch.nn.ModuleDict({"gate_up_proj": fused})
    spec = LoraSpec(rank=2, alpha=3, target_modules=("gate_proj", "up_proj"), share_A=True)
    adapters.wrap(model, spec)
    with pytest.raises(SpecError, match="and share A, but have"):
        adapters.rescale(model, replace(spec, alpha_pattern={"up_proj": 5}))
    assert model["gate_up_proj"].scaling.tolist() == [1.5, 1.5] and adapters.lora_spec(model) == spec


def test_two_modules_of_one_name_are_refused():
    heads = lora_fn.Heads(query=2, key_value=2)
    layer = parallel.GQAQKVColumnParallelLinear(4, (4, 4), gather_output=False, heads=heads)
    model = torch.nn.ModuleDict({"self_qkv": layer, "cross_qkv": copy.deepcopy(layer)})
    with pytest.raises(TargetError, match="q_proj: is what both self_qkv and cross_qkv hold"):
        adapters.wrap(model, LoraSpec(target_modules="all-linear"))
    with pytest.raises(SpecError, match=r"output_sizes are \(4, 4, 4\), expected query and key sizes"):
        parallel.GQAQKVColumnParallelLinear(4, (4, 4, 4), gather_output=False, heads=heads)


def test_a_fused_column_layer_has_parts():
    layer = parallel.ColumnParallelLinear(4, 12, bias=False, gather_output=False, parts={"gate": 6, "up": 6})
    assert (layer.stride, layer.weight.shape) == (2, (12, 4)) and "gate 6 + up 6" in repr(layer)


@pytest.mark.parametrize("others", [dict(stride=2), dict(skip_bias_add=True), dict(unheard_of=1)], ids=str)
def test_arguments_that_we_do_not_have_are_refused(others):
    for layer in (parallel.ColumnParallelLinear, parallel.RowParallelLinear, parallel.ParallelEmbedding):
        with pytest.raises(SpecError, match=next(iter(others))):
            layer(4, 6, **others)


@pytest.mark.parametrize(
    "layer", [parallel.ColumnParallelLinear, parallel.RowParallelLinear, parallel.ParallelEmbedding]
)
def test_layers_are_drawn_whole_and_cut(layer):
    options = dict(dtype=torch.float32)
    torch.manual_seed(3)
    whole = layer(6, 4, **options)
    parts = []
    for index in range(2):
        torch.manual_seed(3)
        parts.append(layer(6, 4, **options, axis=lora_fn.Axis(name="tp", size=2, index=index)))
    spec = parts[0].spec
    joined = lora_fn.unshard([dict(part.named_parameters()) for part in parts], spec)
    assert all(torch.equal(joined[name], p) for name, p in whole.named_parameters())


def test_a_copy_of_a_wrapped_model_is_its_own():
    model = adapters.wrap(plain(), LoraSpec(target_modules=("up",)))
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.up.lora_B.add_(1)
    assert not torch.equal(model.up.lora_B, other.up.lora_B)


# ------------------------------------------------------------------------------------------------- attach and detach


def test_an_adapter_goes_off_and_on_and_another_takes_its_place():
    model = plain()
    x, modules, before = torch.randn(3, model.up.in_features), dict(model.named_modules()), model.state_dict()
    base = model.up(x)
    first = bind.make(model, LoraSpec(rank=2, target_modules=("up",), init_lora_weights=False))
    second = bind.make(model, LoraSpec(rank=3, target_modules=("up",), init_lora_weights=False), seed=1)
    assert dict(model.named_modules()) == modules, "making an adapter leaves the model as it is"
    outputs = []
    for adapter in (first, second, first):
        bind.attach(model, adapter)
        outputs.append(model.up(x))
        assert bind.detach(model) is adapter
        assert torch.equal(model.up(x), base)
    assert torch.equal(outputs[0], outputs[2]) and not torch.allclose(outputs[0], outputs[1])
    assert dict(model.named_modules()) == modules
    after = model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)


def test_factors_stay_the_same_parameters_while_an_adapter_is_off():
    model = plain()
    adapter = bind.attach(model, bind.make(model, LoraSpec(target_modules=("up",)))) and bind.detach(model)
    kept = list(adapter.modules["up"].parameters())
    model.eval()
    bind.attach(model, adapter)
    assert all(a is b for a, b in zip(model.up.parameters(), kept, strict=True)) and not model.up.training
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {"up.lora_A", "up.lora_B"}


def test_the_base_comes_back_in_the_dtype_that_it_has_got():
    model = adapters.wrap(plain(), LoraSpec(target_modules=("up",)))
    model.to(torch.float64)
    bind.detach(model)
    assert {p.dtype for p in model.parameters()} == {torch.float64}


def test_what_cannot_be_attached_or_detached_is_told():
    model = plain()
    with pytest.raises(TargetError, match="detach: the model has no adapter"):
        bind.detach(model)
    adapter = bind.make(model, LoraSpec(target_modules=("up",)))
    with pytest.raises(TargetError, match="up: is no module of this model"):
        bind.attach(torch.nn.Sequential(), adapter)
    bind.attach(model, adapter)
    with pytest.raises(TargetError, match="detach that first"):
        bind.attach(model, adapter)
