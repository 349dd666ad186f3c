"""Is every variant PEFT's? One layer of each class that PEFT adapts, one process: outputs in evaluation and in training
with dropout, gradients of every trained parameter, merged weights, and files in both directions.
"""

import copy
import dataclasses

import oracle
import peft
import pytest
import torch
from small_models import relative
from torch import nn
from transformers.pytorch_utils import Conv1D

import adapters
import lora_fn
from adapters import bind
from lora_fn import dora, peft_format

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


def ours_of(theirs, directory):
    """Our model with PEFT's adapter in it, by way of the file; the base's weights are those of PEFT's."""
    theirs.save_pretrained(directory)
    base = copy.deepcopy(theirs).unload()
    ours = adapters.wrap(base, adapters.read_spec(directory))
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


@each
@pytest.mark.parametrize("training", (False, True))
def test_the_output_and_every_gradient_are_pefts(variant, layer, training, tmp_path):
    theirs = theirs_of(variant, layer)
    ours = ours_of(theirs, tmp_path).train(training)
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
    ours = ours_of(theirs, tmp_path).eval()
    bound = bind.layers(ours)["layer"]
    merged = lora_fn.merge({name: p.detach() for name, p in bound.params().items()}, bound.spec)
    want = theirs.merge_and_unload().layer
    assert all(relative(merged[name], want.get_parameter(name)) < TOLERANCE for name in merged)


@each
def test_our_file_is_pefts(variant, layer, tmp_path):
    """No key is missing or unexpected, and the model with it gives the same."""
    theirs = theirs_of(variant, layer)
    ours = ours_of(theirs, tmp_path / "theirs").eval()
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


def test_dora_with_lora_bias_is_refused():
    spec = lora_fn.LayerSpec(kind="linear", in_features=2, out_features=3, rank=1, variant="dora")
    with pytest.raises(lora_fn.SpecError, match=r"LayerSpec\.lora_bias: is True with variant 'dora'"):
        dataclasses.replace(spec, lora_bias=True)
    with pytest.raises(lora_fn.SpecError, match=r"LayerSpec\.variant: is 'other', expected one of"):
        dataclasses.replace(spec, variant="other")
