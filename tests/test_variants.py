"""Is every variant PEFT's? One layer of each class that PEFT adapts, one process: outputs in evaluation and in training
with dropout, gradients of every trained parameter, merged weights, and files in both directions.
"""

import dataclasses
from types import SimpleNamespace

import mapped
import oracle
import peft
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft.tuners.lora import variants as peft_variants
from small_models import relative
from strategies import BY_RANK, fixed_spec
from torch import nn
from transformers.pytorch_utils import Conv1D

import adapters
import lora_fn
from adapters import bind
from lora_fn import alora, dora, kasa, peft_format, sharding

TOLERANCE = 1e-5
pytestmark = [
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`"),
    pytest.mark.filterwarnings("ignore:.*fan_in_fan_out.*"),
    pytest.mark.filterwarnings("ignore:Could not find a config file"),
    pytest.mark.filterwarnings("ignore:.*LoRA tensor.* have invalid shape"),
]

LAYERS = {
    "linear": lambda: nn.Linear(12, 20),
    "conv1d": lambda: Conv1D(20, 12),
    "embedding": lambda: nn.Embedding(13, 12),
    "conv2d": lambda: nn.Conv2d(3, 8, (3, 2), stride=(2, 1), padding=(1, 0)),
}
# Variant -> PEFT's options, and the layers that PEFT has it for.
VARIANTS = {
    "lora_bias": (dict(lora_bias=True), ("linear", "conv1d", "conv2d")),
    "dora": (dict(use_dora=True), tuple(LAYERS)),
    "kasa": (dict(kasa_config=peft.KasaConfig()), ("linear",)),
    "bdlora of A": (dict(use_bdlora=peft.BdLoraConfig(target_modules_bd_a=["lay"], nblocks=2)), ("linear",)),
    "bdlora of B": (dict(use_bdlora=peft.BdLoraConfig(target_modules_bd_b=["layer"], nblocks=4)), ("linear",)),
    "bdlora of none": (dict(use_bdlora=peft.BdLoraConfig(nblocks=4, match_strict=False)), ("linear",)),
}
CASES = [(variant, layer) for variant, (_, layers) in VARIANTS.items() for layer in layers]
each = pytest.mark.parametrize(("variant", "layer"), CASES)


class Model(nn.Module):
    """A model of one layer."""

    def __init__(self, layer):
        super().__init__()
        torch.manual_seed(3)
        self.layer = LAYERS[layer]()
        if layer != "embedding":
            nn.init.normal_(self.layer.bias)

    def forward(self, x):
        return self.layer(x)


def input_of(layer):
    generator = torch.Generator().manual_seed(5)
    if layer == "embedding":
        return torch.randint(13, (2, 7), generator=generator)
    return torch.randn((2, 3, 7, 6) if layer == "conv2d" else (2, 7, 12), generator=generator)


def theirs_of(variant, layer, *, start=False):
    """PEFT's model: as it starts, or with random factors."""
    torch.manual_seed(7)
    options = {"r": 4, "lora_alpha": 6, "lora_dropout": 0.25, "target_modules": ["layer"]} | VARIANTS[variant][0]
    config = peft.LoraConfig(init_lora_weights=start, fan_in_fan_out=layer == "conv1d", **options)
    theirs = peft.get_peft_model(Model(layer), config)
    if not start:
        with torch.no_grad():
            for p in theirs.parameters():
                if p.requires_grad:
                    p.add_(0.3 * torch.randn_like(p))
    return theirs


def ours_of(theirs, layer, directory):
    """Our model with PEFT's adapter in it, by way of the file."""
    theirs.save_pretrained(directory)
    ours = adapters.wrap(Model(layer), adapters.read_spec(directory))
    adapters.load(ours, directory)
    return ours


def masked(theirs, layer, key):
    """Give PEFT's dropout the mask that ours has for a key."""

    class Masked(nn.Module):
        def forward(self, x):
            last = x.movedim(1, -1) if layer == "conv2d" else x
            keep = oracle.keep_mask(oracle.folded(key, bind.number_of("layer")), last.shape, 0.25)
            keep = keep.movedim(-1, 1) if layer == "conv2d" else keep
            return x * keep / 0.75 if self.training else x

    theirs.base_model.model.layer.lora_dropout["default"] = Masked()
    return theirs


def gradients(model, x):
    y = model(x)
    y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(1)))
    return y.detach()


def theirs_by_name(theirs):
    """PEFT's trained parameters under the names of its files."""
    found = {}
    for name, p in theirs.named_parameters():
        if p.requires_grad:
            name = name.replace(".default", "")
            found[name.removesuffix(".weight") if "magnitude" in name else name] = p
    return found


def ours_by_name(ours):
    layer = bind.layers(ours)["layer"]
    return {key: layer.get_parameter(name) for key, name in peft_format.tensor_names("layer", layer.spec).items()}


@pytest.mark.parametrize("variant", ("bdlora of A", "bdlora of B", "bdlora of none"))
def test_a_block_diagonal_factor_starts_as_pefts(variant, tmp_path):
    theirs = theirs_of(variant, "linear", start=False)
    fresh = peft.get_peft_model(Model("linear"), theirs.peft_config["default"])  # init_lora_weights is False
    theirs.save_pretrained(tmp_path)
    ours = ours_by_name(adapters.wrap(Model("linear"), adapters.read_spec(tmp_path), seed=0))
    assert {n: bool(p.any()) for n, p in ours.items()} == {n: bool(p.any()) for n, p in theirs_by_name(fresh).items()}


@pytest.mark.parametrize(
    "options",
    (
        {"variant": "bdlora", "block_diagonal": "lora_A", "blocks": 2},
        {"variant": "qalora", "group_size": 2},
    ),
    ids=("bdlora", "qalora"),
)
def test_a_packed_lora_A_starts_alike_whatever_is_asked(options):
    """In PEFT the variant makes it anew after the initialisation."""
    spec = fixed_spec("linear", rank=4, size=1, **options)
    uniform, asked = (lora_fn.init(spec, seed=1, init_lora_weights=how) for how in (True, "gaussian"))
    assert torch.equal(uniform["lora_A"], asked["lora_A"])
    assert not asked["lora_B"].any()


@each
@pytest.mark.parametrize("training", (False, True))
def test_the_output_and_every_gradient_are_pefts(variant, layer, training, tmp_path):
    theirs = theirs_of(variant, layer)
    ours = ours_of(theirs, layer, tmp_path).train(training)
    theirs = masked(theirs, layer, 9).train(training)
    adapters.set_dropout_key(ours, torch.tensor(9))
    x = input_of(layer)
    want, got = gradients(theirs, x), gradients(ours, x)
    assert relative(got, want) < TOLERANCE
    assert relative(want, theirs.get_base_model().layer.base_layer(x)) > 1e-2  # it does something
    mine, others = ours_by_name(ours), theirs_by_name(theirs)
    assert mine.keys() == others.keys()
    for name, p in others.items():
        assert relative(mine[name].grad, p.grad) < TOLERANCE, name


@each
def test_merged_weights_are_pefts(variant, layer, tmp_path):
    theirs = theirs_of(variant, layer)
    ours = ours_of(theirs, layer, tmp_path).eval()
    bound = bind.layers(ours)["layer"]
    merged = lora_fn.merge({name: p.detach() for name, p in bound.params().items()}, bound.spec)
    want = theirs.merge_and_unload().layer
    assert all(relative(merged[name], want.get_parameter(name)) < TOLERANCE for name in merged)


@each
def test_our_file_is_pefts(variant, layer, tmp_path):
    """No key is missing or unexpected, and the model with it gives the same."""
    theirs = theirs_of(variant, layer)
    ours = ours_of(theirs, layer, tmp_path / "theirs").eval()
    adapters.save(ours, tmp_path / "ours")
    again = theirs_of(variant, layer, start=True)
    loaded = again.load_adapter(tmp_path / "ours", "default")
    assert not loaded.unexpected_keys and not [key for key in loaded.missing_keys if "lora" in key]
    x = input_of(layer)
    assert relative(again.eval()(x), ours(x)) < TOLERANCE


@pytest.mark.parametrize(("variant", "layer"), [case for case in CASES if case[0] == "dora"])
def test_magnitudes_start_as_pefts_do(variant, layer):
    spec = lora_fn.LoraSpec(rank=4, use_dora=True, target_modules=("layer",))
    ours = adapters.wrap(Model(layer), spec)
    want = theirs_by_name(theirs_of(variant, layer, start=True))
    [name] = [name for name in want if "magnitude" in name]
    assert relative(ours_by_name(ours)[name], want[name]) < TOLERANCE


def test_dora_by_blocks_is_dora():
    """The norms, of rows that come in several blocks."""
    generator = torch.Generator().manual_seed(0)
    weight, down, up = (torch.randn(s, generator=generator) for s in ((37, 11), (3, 11), (37, 3)))
    want = (weight + up @ down).double().square().sum(1)
    before = dora.BLOCK
    try:
        dora.BLOCK = 40
        assert relative(dora._squares(weight, down, up), want) < TOLERANCE
    finally:
        dora.BLOCK = before


def test_qalora_is_pefts():
    """PEFT's own forward, over a layer that is not quantized."""
    generator = torch.Generator().manual_seed(2)
    spec = lora_fn.LayerSpec(
        kind="linear", in_features=12, out_features=20, rank=4, alpha=6.0, bias=True, variant="qalora", group_size=3
    )
    params = {n: torch.randn(sharding.canonical_shape(spec, n), generator=generator) for n in sharding.names(spec)}
    x = input_of("linear")
    module = SimpleNamespace(
        lora_A={"": SimpleNamespace(weight=params["lora_A"])},
        lora_B={"": SimpleNamespace(weight=params["lora_B"])},
        lora_dropout={"": nn.Identity()},
        scaling={"": 6 / 4},
        qalora_group_size={"": 3},
        in_features=12,
        training=False,
    )
    base = nn.functional.linear(x, params["weight"], params["bias"])
    want = peft_variants.QALoraLinearVariant.forward(module, "", x, base)
    assert relative(lora_fn.apply(params, x, spec), want) < TOLERANCE
    assert relative(lora_fn.apply(lora_fn.merge(params, spec), x, spec.base), want) < TOLERANCE


def kasa_case(spec):
    generator = torch.Generator().manual_seed(4)
    names = sharding.adapter_names(spec)
    return {n: torch.randn(sharding.canonical_shape(spec, n), generator=generator).double() for n in names}


@pytest.mark.parametrize("gradients", ("summed", "deferred"))
@pytest.mark.parametrize("row", ("linear", "column", "column, fused", "qkv", "row", *BY_RANK))
def test_kasas_loss_and_its_gradients_are_pefts(row, gradients):
    """On shards: the value on every process, and gradients that are whole, or that the sync completes."""
    spec = fixed_spec(row, variant="kasa", gradients=gradients, sequence_dim=None if row in ("column", *BY_RANK) else 0)
    params = kasa_case(spec)
    leaves = {name: p.clone().requires_grad_() for name, p in params.items()}
    want = 0.0
    for part in spec.updates:
        module = SimpleNamespace(lora_diag={"": leaves[part.param("lora_diag")]})
        module.lora_A, module.lora_B = (
            {"": SimpleNamespace(weight=leaves[part.param(name)])} for name in ("lora_A", "lora_B")
        )
        want = want + peft_variants._kasa_layer_regularization_loss(module, "", beta=0.3, gamma=0.7)
    want.backward()

    def local(params, index):
        loss = torch.func.grad_and_value(lambda p: lora_fn.kasa_loss(p, spec, beta=0.3, gamma=0.7, index=index))
        grads, value = loss(params)
        return value, lora_fn.sync_gradients({"": grads}, {"": spec}, index=index)[""]

    values, grads = torch.func.vmap(local)(mapped.stack(params, spec), mapped.lanes(spec))
    assert relative(values, want.expand(spec.axis.size)) < TOLERANCE
    for name, grad in mapped.unstack(grads, spec).items():
        assert relative(grad, leaves[name].grad) < TOLERANCE, name


def test_what_kasa_drops_is_what_peft_drops():
    weight = torch.randn((12, 20), generator=torch.Generator().manual_seed(1))
    base = nn.Linear(20, 12)
    base.weight = nn.Parameter(weight.clone())
    module = SimpleNamespace(get_base_layer=lambda: base)
    peft_variants.KasaLinearVariant._truncate_base_weight(module, 4)
    left, right = kasa.dropped(weight, 4)
    assert relative(weight - left @ right, base.weight) < TOLERANCE
    with pytest.raises(lora_fn.SpecError, match="the rank is 12, and the weight"):
        kasa.dropped(weight, 12)


def naively_active(ids, invocation, documents):
    """Token by token, as PEFT looks for it."""
    found = torch.zeros(ids.shape, dtype=torch.bool)
    for row, (own, of) in enumerate(zip(ids.tolist(), documents.tolist(), strict=True)):
        for document in set(of):
            places = [n for n, number in enumerate(of) if number == document]
            tokens = [own[n] for n in places]
            size = len(invocation)
            begins = [n for n in range(len(tokens) - size + 1) if tokens[n : n + size] == list(invocation)]
            for n in places[begins[-1] :] if begins else ():
                found[row, n] = True
    return found


@given(data=st.data(), size=st.integers(1, 3), length=st.integers(1, 12))
def test_an_alora_is_active_from_the_last_occurrence_on(data, size, length):
    tokens = st.lists(st.integers(0, 1), min_size=length, max_size=length)
    ids = torch.tensor(data.draw(st.lists(tokens, min_size=2, max_size=2)))
    invocation = data.draw(st.lists(st.integers(0, 1), min_size=size, max_size=size))
    documents = torch.tensor(data.draw(st.lists(tokens, min_size=2, max_size=2))).cumsum(1)
    assert torch.equal(alora.active(ids, invocation, documents=documents), naively_active(ids, invocation, documents))
    config = {"": SimpleNamespace(alora_invocation_tokens=invocation)}
    offsets = peft_variants.calculate_alora_offsets(config, "", ids)
    theirs = torch.stack([torch.arange(length) >= length - (offset or 0) for offset in offsets])
    assert torch.equal(alora.active(ids, invocation), theirs)


def test_a_gate_fits_longer_and_shorter_calls():
    gate = torch.tensor([[False, True, True]])
    assert alora.fitted(gate, 5).tolist() == [[False, True, True, False, False]]
    assert alora.fitted(gate, 1).tolist() == [[True]]


def test_dora_with_lora_bias_is_refused():
    spec = lora_fn.LayerSpec(kind="linear", in_features=2, out_features=3, rank=1, variant="dora")
    with pytest.raises(lora_fn.SpecError, match=r"LayerSpec\.lora_bias: is True, with variant 'dora'"):
        dataclasses.replace(spec, lora_bias=True)
    with pytest.raises(lora_fn.SpecError, match=r"LayerSpec\.variant: is 'other', expected one of"):
        dataclasses.replace(spec, variant="other")
