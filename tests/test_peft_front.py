"""Does code written for PEFT run on our parallel models, and mean the same?

The same user code, a function of a module and of a model, is run twice: with stock `peft` on the stock model, and with
`adapters.peft` on ours, at TP 1 and 2. What it returns is compared. Where PEFT warns and we refuse, that is tested.
"""

import functools
import shutil
import warnings
from pathlib import Path

import peft
import pytest
import torch
from pool import pool
from safetensors.torch import load_file, save_file
from small_models import ids_of, relative, small_models_fixture, stock  # noqa: F401  (a fixture)
from torch import nn
from torch.utils.checkpoint import checkpoint

import adapters
import adapters.peft
from adapters import models, parallel
from lora_fn import FileError, Heads, LoraFnError, SpecError, TargetError

TOLERANCE = 1e-5
FORMS = {
    "apart": {},
    "sequence parallel": {"sequence_parallel": True},
    "fused": {"fuse_qkv": True, "fuse_gate_up": True},
}


def ours(directory, mesh=None, **options):
    return models.load(directory, mesh=mesh, gather_logits=True, **options)


def in_process(mesh, code, directory, form, args):
    return code(adapters.peft, ours(directory, mesh, **FORMS[form]), *args)


def everywhere(code, directory, *args, size=2, form="sequence parallel"):
    """What user code returns on our model: on every process of several."""
    return pool(size).run(in_process, code, directory, form, args)


def same(found, expected):
    """Whether two results of user code are the same, tensors to rounding."""
    if isinstance(expected, torch.Tensor):
        return relative(found, expected) < TOLERANCE
    if isinstance(expected, dict):
        return found.keys() == expected.keys() and all(same(found[k], expected[k]) for k in expected)
    if isinstance(expected, (list, tuple)):
        return len(found) == len(expected) and all(map(same, found, expected))
    return found == expected


def told(found, expected):
    """Which of two lists differ, and both."""
    which = [n for n, (a, b) in enumerate(zip(found, expected, strict=False)) if not same(a, b)]
    return which, found, expected


@pytest.fixture(scope="module")
def stored(small_models, tmp_path_factory):
    """Directory of adapters by stock PEFT for the small Llama: name -> its own directory."""
    place = tmp_path_factory.mktemp("adapters")
    configs = {
        "first": dict(r=3, lora_alpha=6, target_modules=["q_proj", "v_proj", "down_proj"]),
        "second": dict(r=2, lora_alpha=8, target_modules=["q_proj", "gate_proj"], use_rslora=True),
        "same form": dict(r=2, lora_alpha=4, target_modules=["q_proj", "gate_proj"], use_rslora=True),
        "dotted.name-x": dict(r=2, target_modules=r".*\.(o|up)_proj", rank_pattern={"o_proj": 4}),
    }
    for number, (name, options) in enumerate(configs.items()):
        torch.manual_seed(number)
        config = peft.LoraConfig(init_lora_weights=False, task_type="CAUSAL_LM", **options)
        peft.get_peft_model(stock(small_models["llama"]), config).save_pretrained(place / name)
    return {name: str(place / name) for name in configs}


@pytest.fixture(scope="module")
def compare(small_models):
    """Run user code on both sides and compare what it returns; gives the expected."""

    def run(code, *args, forms=("sequence parallel", "fused")):
        expected = code(peft, stock(small_models["llama"]), *args)
        found = code(adapters.peft, ours(small_models["llama"]), *args)
        assert same(found, expected), told(found, expected)
        for form in forms:
            for each in everywhere(code, small_models["llama"], *args, form=form):
                assert same(each, expected), (each, expected)
        return expected

    return run


def logits(model):
    with torch.no_grad():
        return model(ids_of()).logits.clone()


# ----------------------------------------------------------------------------------------------------------- at once


def at_once(module, model, stored):
    """Several active, each row its own, other scales, another adapter in the place of one."""
    model = module.PeftModel.from_pretrained(model, stored["first"], adapter_name="first").eval()
    model.load_adapter(stored["second"], "second")
    found = [logits(model)]
    with torch.no_grad():
        found.append(model(input_ids=ids_of(), adapter_names=["second", "__base__"]).logits.clone())
        found.append(model(input_ids=ids_of(), adapter_names=["first", "second"]).logits.clone())
    model.base_model.set_adapter(["first", "second"])
    found.append(logits(model))
    found.append([sorted(model.base_model.active_adapters)])
    for scaled in (3, 1):
        scale(module, model, "second", scaled)
        found.append(logits(model))
    with model.disable_adapter():
        found.append(logits(model))
    found.append(logits(model))
    model.set_adapter("second")
    found.append(logits(model))
    hotswap_of(module)(model, stored["same form"], "second")
    found.append(logits(model))
    return found


def scale(module, model, name, times):
    if module is not peft:
        model.base_model.set_scale(name, times)
        return
    for layer in model.modules():
        if isinstance(layer, peft.tuners.lora.LoraLayer) and name in layer.scaling:
            layer.set_scale(name, times)


def hotswap_of(module):
    if module is peft:
        from peft.utils.hotswap import hotswap_adapter

        return hotswap_adapter
    return module.hotswap_adapter


def test_several_at_once_are_pefts(compare, stored):
    expected = compare(at_once, stored)
    outputs = [t for t in expected if isinstance(t, torch.Tensor)]
    assert relative(outputs[0], outputs[3]) > 0.01 and relative(outputs[3], outputs[4]) > 0.01
    assert relative(outputs[-1], outputs[-2]) > 0.01


def several_trained(module, model, stored):
    """Gradients of two active adapters, by name in the files."""
    model = module.PeftModel.from_pretrained(model, stored["first"], adapter_name="first", is_trainable=True)
    model.load_adapter(stored["second"], "second", is_trainable=True)
    model.base_model.set_adapter(["first", "second"])
    model.eval()(input_ids=ids_of()).logits.square().mean().backward()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    optimizer.step()
    return [logits(model), *({k: state(module, model, k) for k in ("first", "second")}.values())]


def state(module, model, name):
    return module.get_peft_model_state_dict(model, adapter_name=name)


def test_several_are_trained_at_once(compare, stored):
    _, first, second = compare(several_trained, stored)
    assert first and second


def test_who_is_deleted_of_several_computes_no_more(small_models, stored):
    """In stock PEFT, the model cannot be called any more then."""
    model = adapters.peft.PeftModel.from_pretrained(ours(small_models["llama"]), stored["first"], adapter_name="first")
    model.eval().load_adapter(stored["second"], "second")
    model.load_adapter(stored["same form"], "third")
    model.set_adapter(["first", "second", "third"])
    three = logits(model)
    model.delete_adapter("first")
    two = logits(model)
    assert model.active_adapters == ["second", "third"] and relative(three, two) > 0.01
    model.set_adapter("second")
    model.set_adapter(["second", "third"])
    assert torch.equal(logits(model), two)


def test_what_cannot_be_at_once_is_said_when_it_is_asked_for(small_models, stored):
    def made(**options):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4))
        config = adapters.peft.LoraConfig(r=2, target_modules=["0", "2"], init_lora_weights=False, **options)
        model = adapters.peft.get_peft_model(net, config)
        model.add_adapter("b", config)
        return model.eval()

    for options, told in (
        ({"use_dora": True}, "updates of variant 'dora' do not add up"),
        ({"alora_invocation_tokens": [1]}, "'alora' do not add up"),
    ):
        with pytest.raises(TargetError, match=told):
            made(**options).set_adapter(["default", "b"])
    with pytest.raises(TargetError, match="is an aLoRA, which is not computed beside others"):
        made(alora_invocation_tokens=[1])(torch.ones(2, 6), adapter_names=["b", "default"])
    model = made()
    model.set_adapter(["default", "b"])
    with pytest.raises(TargetError, match="holds several adapters"):
        list(model.merged_weights())
    model.set_adapter("b")
    for layer in model.base_model.layers("b").values():
        layer.merge()
    with pytest.raises(TargetError, match="are merged, each by itself"):
        model(torch.ones(2, 6), adapter_names=["b", "default"])


def test_rows_need_not_drop_or_learn_alike():
    net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4))
    options = dict(r=2, target_modules=["0", "2"])
    model = adapters.peft.get_peft_model(net, adapters.peft.LoraConfig(lora_dropout=0.1, **options), "a")
    model.add_adapter("b", adapters.peft.LoraConfig(init_lora_weights=False, **options))
    model.add_adapter("c", adapters.peft.LoraConfig(init_lora_weights="mica", **options))
    x = torch.randn(3, 6)
    rows = model.eval()(x, adapter_names=["a", "b", "c"]).detach()
    for row, name in enumerate("abc"):
        model.set_adapter(name)
        assert relative(rows[row], model(x)[row]) < TOLERANCE


# -------------------------------------------------------------------------------------------------------- one adapter


def use(module, model, stored):
    """Load, switch, disable, delete."""
    base = logits(model)
    model = module.PeftModel.from_pretrained(model, stored["first"])
    told = [model.active_adapter, model.active_adapters, logits(model)]
    model.load_adapter(stored["second"], "other-one")
    told += [model.active_adapter, sorted(model.peft_config), logits(model)]
    model.set_adapter("other-one")
    told += [model.active_adapter, logits(model)]
    with model.disable_adapter():
        told += [relative(logits(model), base) < TOLERANCE]
    told += [logits(model)]
    model.set_adapter(["default"]) if module is adapters.peft else model.set_adapter("default")
    told += [logits(model)]
    model.delete_adapter("other-one")
    told += [model.active_adapters, sorted(model.peft_config), logits(model)]
    told += [model.peft_config["default"].r, model.peft_config["default"].lora_alpha, model.config.hidden_size]
    with model.disable_adapter():
        told += [relative(logits(model), base) < TOLERANCE]
    return told


def test_adapters_are_switched_disabled_and_deleted(compare, stored):
    told = compare(use, stored)
    assert relative(told[2], told[7]) > 1e-2


def merge(module, model, stored):
    """Merge, unmerge, merge another, and take the merged model."""
    model = module.PeftModel.from_pretrained(model, stored["first"])
    model.load_adapter(stored["second"], "b")
    told = [logits(model)]
    model.merge_adapter()
    told += [model.get_model_status().merged_adapters, logits(model)]
    model.unmerge_adapter()
    told += [model.get_model_status().merged_adapters, logits(model)]
    model.set_adapter("b")
    model.merge_adapter(["b"], safe_merge=True)
    told += [logits(model)]
    model.unmerge_adapter()
    model.set_adapter("default")
    model.merge_adapter(["default", "b"])
    told += [sorted(model.get_layer_status()[0].merged_adapters), logits(model)]
    model.unmerge_adapter()
    model.set_adapter("b")
    told += [logits(model)]
    merged = model.merge_and_unload()
    return [*told, logits(merged), type(merged).__name__]


@pytest.mark.filterwarnings("ignore:Already unmerged")
def test_adapters_are_merged_and_unmerged(compare, stored):
    told = compare(merge, stored)
    assert relative(told[2], told[0]) < TOLERANCE and relative(told[5], told[0]) > 1e-2


def test_merged_is_exactly_what_was_asked_for(small_models, stored):
    """Stock PEFT applies the active adapter beside it, in the layers that the merged one has no part in."""
    model = adapters.peft.PeftModel.from_pretrained(ours(small_models["llama"]), stored["first"])
    model.load_adapter(stored["second"], "b")
    model.merge_adapter(["b"])
    found = logits(model)
    model.set_adapter("b")
    assert model.get_model_status().merged_adapters == [] and relative(found, logits(model)) < TOLERANCE


def layers_of(model):
    """The status of every layer, by name: fused ones have another place among the modules."""
    return {each.name: vars(each) for each in model.get_layer_status()}


def statuses(module, model, stored):
    """What is on the model, in several states; and the numbers of parameters."""
    model = module.PeftModel.from_pretrained(model, stored["first"], is_trainable=True)
    told = [vars(model.get_model_status()), model.get_nb_trainable_parameters()]
    model.load_adapter(stored["second"], "b")
    told += [vars(model.get_model_status()), layers_of(model)]
    config = module.LoraConfig(r=2, target_modules=["o_proj"], task_type="CAUSAL_LM")
    model.add_adapter("c", config)
    model.set_adapter("b")
    told += [vars(model.get_model_status()), layers_of(model)]
    model.set_requires_grad("c", True)
    told += [vars(model.get_model_status())]
    model.merge_adapter()
    told += [vars(model.get_model_status())]
    model.unmerge_adapter()
    model.set_adapter("default", inference_mode=True)
    told += [model.get_nb_trainable_parameters(), vars(model.get_model_status())]
    model.set_adapter("b")
    model.delete_adapter("default")
    told += [vars(model.get_model_status())]
    told[-1].pop("num_adapter_layers")  # stock PEFT counts those that have no adapter left
    for each in told:
        if "adapter_model_type" in each:
            assert each.pop("adapter_model_type") in ("LoraModel", "NeuronLoraModel")
    return told


@pytest.mark.skipif(not hasattr(peft.PeftModel, "set_requires_grad"), reason="this PEFT has no set_requires_grad")
@pytest.mark.filterwarnings("ignore:Already unmerged")
def test_status_and_counts_are_those_of_peft(compare, stored):
    compare(statuses, stored)


def printed(module, model, stored):
    module.PeftModel.from_pretrained(model, stored["first"], is_trainable=True).print_trainable_parameters()


def test_the_numbers_are_printed_as_by_peft(small_models, stored, capsys):
    printed(peft, stock(small_models["llama"]), stored)
    expected = capsys.readouterr().out
    printed(adapters.peft, ours(small_models["llama"]), stored)
    assert capsys.readouterr().out == expected != ""


def train(module, model, stored):
    """Train one adapter, then another, then the first again, with the optimizers that each has from before."""
    model = module.PeftModel.from_pretrained(model, stored["first"], is_trainable=True)
    model.load_adapter(stored["second"], "other", is_trainable=True)
    optimizers, losses = {}, []
    for name in ("default", "other", "default"):
        model.set_adapter(name)
        if name not in optimizers:
            optimizers[name] = torch.optim.SGD(
                [p for p in model.parameters() if p.requires_grad], lr=0.05, momentum=0.9
            )
        for _ in range(2):
            model.train()
            loss = model(input_ids=ids_of(), labels=ids_of()).loss
            loss.backward()
            optimizers[name].step()
            optimizers[name].zero_grad()
            losses.append(loss.detach())
    states = [module.get_peft_model_state_dict(model, adapter_name=name) for name in ("default", "other")]
    return [*losses, *({k: v.clone() for k, v in state.items()} for state in states)]


def test_training_goes_on_after_a_switch(compare, stored):
    told = compare(train, stored)
    assert told[5] < told[0]


def store(module, model, stored, place):
    """Save several adapters, and load what was saved."""
    model = module.PeftModel.from_pretrained(model, stored["first"])
    model.load_adapter(stored["second"], "b-2")
    model.save_pretrained(place / "all")
    model.save_pretrained(place / "one", selected_adapters=["b-2"])
    return [logits(model)]


def files_of(place):
    return {
        path.relative_to(place).as_posix(): load_file(path) for path in sorted(place.rglob("adapter_model.safetensors"))
    }


@pytest.mark.parametrize("form", FORMS)
def test_several_adapters_are_saved_as_by_peft(form, small_models, stored, tmp_path):
    store(peft, stock(small_models["llama"]), stored, tmp_path / "theirs")
    everywhere(store, small_models["llama"], stored, tmp_path / "ours", form=form)
    theirs, mine = files_of(tmp_path / "theirs"), files_of(tmp_path / "ours")
    assert sorted(mine) == sorted(theirs) and len(mine) == 3
    for name, tensors in theirs.items():
        assert mine[name].keys() == tensors.keys()
        assert all(torch.equal(mine[name][key], tensors[key]) for key in tensors)
    again = peft.PeftModel.from_pretrained(stock(small_models["llama"]), tmp_path / "ours/all/b-2")
    expected = peft.PeftModel.from_pretrained(stock(small_models["llama"]), stored["second"])
    assert torch.equal(logits(again), logits(expected))
    left = {path.relative_to(tmp_path / "ours").as_posix() for path in (tmp_path / "ours").rglob("*")}
    assert not [name for name in left if "partial" in name] and "all/README.md" in left


def test_a_name_with_a_dot_is_one(small_models, stored, tmp_path):
    """Stock PEFT cannot have such; Optimum Neuron's files lose it."""
    model = adapters.peft.PeftModel.from_pretrained(ours(small_models["llama"]), stored["dotted.name-x"], "a.b-c")
    expected = peft.PeftModel.from_pretrained(stock(small_models["llama"]), stored["dotted.name-x"])
    assert relative(logits(model), logits(expected)) < TOLERANCE
    model.save_pretrained(tmp_path)
    assert (
        files_of(tmp_path)["a.b-c/adapter_model.safetensors"].keys()
        == load_file(Path(stored["dotted.name-x"]) / "adapter_model.safetensors").keys()
    )


# --------------------------------------------------------------------------------------------------- what is refused


def damaged(stored, place, change):
    """A copy of an adapter with other tensors."""
    shutil.copytree(stored["first"], place)
    tensors = load_file(place / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, place / "adapter_model.safetensors", {"format": "pt"})
    return place


KEY = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
WRONG = {
    "missing": (lambda of: of.pop(KEY), "q_proj.lora_A.weight' is missing"),
    "unexpected": (
        lambda of: of.update({"base_model.model.x.lora_A.weight": of[KEY].clone()}),
        "belongs to no adapted",
    ),
    "misshapen": (lambda of: of.update({KEY: of[KEY][:, 1:].contiguous()}), "has shape"),
    "not finite": (lambda of: of[KEY].fill_(torch.nan), "not finite"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_adapter_is_refused_where_peft_warns_or_is_silent(case, small_models, stored, tmp_path):
    change, sentence = WRONG[case]
    place = damaged(stored, tmp_path / "wrong", change)
    if case != "misshapen":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            peft.PeftModel.from_pretrained(stock(small_models["llama"]), place)
    model = ours(small_models["llama"])
    with pytest.raises(FileError, match=sentence):
        adapters.peft.PeftModel.from_pretrained(model, place)
    model = adapters.peft.PeftModel.from_pretrained(model, stored["first"])  # nothing is left on it
    before = logits(model)
    for name in ("b", "default"):
        with pytest.raises(FileError, match=sentence):
            model.load_adapter(place, name)
    assert list(model.peft_config) == ["default"] and torch.equal(logits(model), before)


def test_an_adapter_of_another_model_is_refused(small_models, stored):
    with pytest.raises(LoraFnError, match=r"layers\.1"):
        adapters.peft.PeftModel.from_pretrained(ours(small_models["llama-1-layer"]), stored["first"])


ARGUMENTS = {
    "a hub": (
        lambda m, _: m.load_adapter("somebody/lora", "b"),
        "no such directory, and nothing is fetched from a hub",
    ),
    "no name": (lambda m, _: m.set_adapter("b"), r"adapter 'b': there is none of that name, only \['default'\]"),
    "two": (lambda m, _: m.set_adapter(["default", "c"]), "none of that name"),
    "a taken name": (lambda m, _: m.add_adapter("default", m.peft_config["default"]), "taken or empty"),
    "a pickle": (lambda m, at: m.save_pretrained(at, safe_serialization=False), "safe_serialization: is False"),
    "a hub to push to": (lambda m, at: m.save_pretrained(at, push_to_hub=True), "push_to_hub: is True"),
    "a file": (lambda m, at: m.save_pretrained(__file__), "is a file, expected a directory"),
    "rows in training": (lambda m, _: m.train()(ids_of(), adapter_names=["default"] * 2), "the model is in training"),
    "rows of nobody": (lambda m, _: m.eval()(ids_of(), adapter_names=["default", "b"]), "'b': there is none"),
    "again": (lambda m, _: adapters.peft.get_peft_model(m, m.peft_config["default"]), "call add_adapter"),
    "a key mapping": (lambda m, at: m.load_adapter(at, "b", key_mapping={"a": "b"}), "key_mapping: is"),
}


def test_what_is_not_supported_is_one_sentence(small_models, stored, tmp_path):
    model = adapters.peft.PeftModel.from_pretrained(ours(small_models["llama"]), stored["first"])
    for call, sentence in ARGUMENTS.values():
        with pytest.raises(LoraFnError, match=sentence):
            call(model, tmp_path / "out")
    model.load_adapter(stored["second"], "c")
    model.add_adapter("d", adapters.peft.LoraConfig(r=2, target_modules=["q_proj"], use_dora=True))
    with pytest.raises(TargetError, match="updates of variant 'dora' do not add up with others'"):
        model.set_adapter(["default", "d"])
    assert model.active_adapters == ["default"]
    with pytest.raises(SpecError, match="mixed: is True"):
        adapters.peft.get_peft_model(nn.Sequential(nn.Linear(2, 2)), adapters.peft.LoraConfig(), mixed=True)
    with pytest.raises(SpecError, match="peft_type"):
        adapters.peft.get_peft_model(nn.Sequential(nn.Linear(2, 2)), peft.IA3Config(target_modules=["0"]))
    assert not (tmp_path / "out").exists()


def test_files_of_optimum_neuron_are_found(small_models, stored, tmp_path):
    shutil.copytree(stored["first"], tmp_path / "run/adapter_default")
    model = adapters.peft.PeftModel.from_pretrained(ours(small_models["llama"]), tmp_path / "run")
    assert model.peft_config["default"].r == 3
    (tmp_path / "run/adapter_default/adapter_model.safetensors").unlink()
    (tmp_path / "run/adapter_default/adapter_shards").mkdir()
    with pytest.raises(FileError, match=r"lora-fn consolidate .*adapter_default OUTPUT --allow-pickle"):
        model.load_adapter(tmp_path / "run", "default")


# --------------------------------------------------------------------------------------------------------- exactness


class Net(nn.Module):
    """An embedding and two linears, in bf16."""

    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(31, 24)
        self.up, self.down = nn.Linear(24, 40), nn.Linear(40, 24, bias=False)

    def forward(self, ids):
        return self.down(torch.tanh(self.up(self.words(ids))))


def small(*names, **options):
    """Our front on a small net in bf16, with random adapters."""
    torch.manual_seed(0)
    config = dict(r=2, target_modules=["words", "up", "down"], init_lora_weights=False) | options
    model = adapters.peft.get_peft_model(Net().bfloat16(), peft.LoraConfig(**config), names[0])
    for name in names[1:]:
        model.add_adapter(name, peft.LoraConfig(**config))
    return model


def test_after_1000_merges_with_changing_adapters_every_weight_is_what_it_was():
    model = small("a", "b", "c")
    before = {name: p.detach().clone() for name, p in model.get_base_model().named_parameters() if "lora" not in name}
    merged = set()
    for turn in range(1000):
        model.merge_adapter([("a", "b", "c")[turn % 3]] if turn % 4 else ["a", "c"])
        merged.add(float(model.get_base_model().up.weight.double().sum()))
        model.unmerge_adapter()
    after = dict(model.get_base_model().named_parameters())
    assert len(merged) == 4 and len(before) == 4
    assert all(torch.equal(after[name], t) for name, t in before.items())


def test_a_residual_base_is_put_back_exactly_and_its_adapter_converted(small_models, tmp_path):
    """PiSSA takes a part out of the weights; in bf16, adding it again would round."""
    config = dict(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights="pissa")
    model = ours(small_models["llama-bf16"])
    before = {name: p.clone() for name, p in model.named_parameters()}
    model = adapters.peft.get_peft_model(model, peft.LoraConfig(**config))
    model.add_adapter("b", peft.LoraConfig(**config | {"init_lora_weights": "olora"}))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.add_(torch.randn_like(p))
    expected = logits(model)
    for _ in range(20):
        model.set_adapter("b")
        model.merge_adapter()
        model.set_adapter("default")
    with model.disable_adapter():
        after = dict(model.get_base_model().named_parameters())
        assert all(torch.equal(after[name], p) for name, p in before.items())
    assert torch.equal(logits(model), expected)
    model.save_pretrained(tmp_path, selected_adapters=["default"], path_initial_model_for_weight_conversion="any")
    plain = peft.PeftModel.from_pretrained(stock(small_models["llama-bf16"]), tmp_path)
    assert plain.peft_config["default"].r == 4 and plain.peft_config["default"].init_lora_weights is True
    assert relative(logits(plain), expected.float()) < 0.1  # one computes in bf16
    merged = dict(model.merged_weights())["model.layers.0.mlp.down_proj.weight"]
    weight = plain.merge_and_unload().model.layers[0].mlp.down_proj.weight
    assert relative(merged, weight) < 2 * torch.finfo(torch.bfloat16).eps


def test_dora_is_merged_and_unmerged():
    model, ids = small("a", use_dora=True), torch.arange(12).view(3, 4)
    model = model.float()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "magnitude" in name:
                p.mul_(1.3)
    before, weight = model(ids), model.get_base_model().up.weight.clone()
    model.merge_adapter()
    assert relative(model(ids), before) < TOLERANCE and not torch.equal(model.get_base_model().up.weight, weight)
    model.unmerge_adapter()
    assert torch.equal(model(ids), before) and torch.equal(model.get_base_model().up.weight, weight)


def test_factors_come_from_the_seed_and_the_name(small_models):
    def drawn(seed, name):
        config = adapters.peft.LoraConfig(r=2, target_modules=["up"])
        return adapters.peft.get_peft_model(Net(), config, name, seed=seed).get_base_model().up.lora_A

    assert torch.equal(drawn(0, "a"), drawn(0, "a"))
    assert not torch.equal(drawn(0, "a"), drawn(1, "a")) and not torch.equal(drawn(0, "a"), drawn(0, "b"))


def test_the_card_keeps_what_was_written(small_models, stored, tmp_path):
    model = adapters.peft.PeftModel.from_pretrained(ours(small_models["llama"]), stored["first"])
    model.create_or_update_model_card(tmp_path)
    from huggingface_hub import ModelCard

    card = ModelCard.load(tmp_path / "README.md")
    assert (card.data.library_name, card.data.pipeline_tag) == ("peft", "text-generation")
    assert card.data.base_model == small_models["llama"] and {"lora", "transformers"} < set(card.data.tags)
    (tmp_path / "README.md").write_text("---\nlicense: mit\ntags:\n- old\n---\n\n# Mine\n\nText.\n")
    model.create_or_update_model_card(tmp_path)
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.license == "mit" and "old" not in card.data.tags and card.text.strip() == "# Mine\n\nText."


def test_a_merge_that_is_not_finite_is_refused_and_changes_nothing():
    model = small("a")
    with torch.no_grad():
        model.get_base_model().up.lora_B.fill_(torch.inf)
    before = model.get_base_model().down.weight.clone()
    with pytest.raises(TargetError, match=r"adapters \['a'\]: its merged weights are not finite"):
        model.merge_adapter(safe_merge=True)
    assert model.get_model_status().merged_adapters == [] and torch.equal(model.get_base_model().down.weight, before)


def test_disabled_while_merged_is_the_base_alone():
    model, ids = small("a"), torch.arange(12).view(3, 4)
    with model.disable_adapter():
        base = model(ids)
    adapted = model(ids)
    model.merge_adapter()
    weight = model.get_base_model().up.weight.clone()
    with model.disable_adapter():
        assert torch.equal(model(ids), base)
    assert torch.equal(model.get_base_model().up.weight, weight)
    model.unmerge_adapter()
    assert torch.equal(model(ids), adapted)


def test_factors_are_fp32_or_as_the_model_and_follow_it():
    assert {p.dtype for p in small("a").parameters() if p.requires_grad} == {torch.float32}
    torch.manual_seed(0)
    config = adapters.peft.LoraConfig(r=2, target_modules=["up"])
    model = adapters.peft.get_peft_model(Net().bfloat16(), config, autocast_adapter_dtype=False)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    model.add_adapter("b", config)
    model.double()
    model.set_adapter("b")
    assert {p.dtype for p in model.parameters()} == {torch.float64}


def trained_a_little(module, model, stored, enabled):
    """Logits after some steps, of a model in fp32; whether the steps are under autocast."""
    model = module.PeftModel.from_pretrained(model, stored["first"], is_trainable=True)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    for _ in range(3):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            loss = model(input_ids=ids_of(), labels=ids_of()).loss
        loss.backward()
        assert {p.grad.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
        optimizer.step()
        optimizer.zero_grad()
    return logits(model)


def test_autocast_costs_no_more_than_with_stock_peft(small_models, stored):
    llama = small_models["llama"]
    exact, rounded = (trained_a_little(peft, stock(llama), stored, enabled) for enabled in (False, True))
    start = logits(peft.PeftModel.from_pretrained(stock(llama), stored["first"]))
    allowed = (rounded - exact).norm() / (exact - start).norm()
    assert 1e-3 < allowed < 0.2, "else there is nothing to compare"
    found = [trained_a_little(adapters.peft, ours(llama), stored, True)]
    for form in ("sequence parallel", "fused"):
        found += everywhere(trained_a_little, llama, stored, True, form=form)
    errors = [((each - exact).norm() / (exact - start).norm()).item() for each in found]
    assert max(errors) <= allowed, (errors, allowed)


def test_what_else_is_trained_stays_trained():
    """As with PEFT, where a user unfreezes a part of the base."""
    model = small("a", "b")
    model.get_base_model().up.bias.requires_grad_(True)
    model.set_adapter("b")
    with model.disable_adapter():
        pass
    names = {name for name, p in model.named_parameters() if p.requires_grad}
    assert "base_model.model.up.bias" in names and len(names) == 7


def test_dropout_draws_anew_each_time_and_its_backward_sees_the_same(small_models, stored):
    """Two forwards before their backwards, with checkpoints that recompute: each with its own masks."""

    def gradients(*, checkpoints):
        model = ours(small_models["llama"])
        if checkpoints:
            model._set_gradient_checkpointing(True, functools.partial(checkpoint, use_reentrant=False))
        config = adapters.peft.LoraConfig(
            r=4, lora_dropout=0.3, target_modules=["q_proj", "down_proj"], init_lora_weights=False
        )
        model = adapters.peft.get_peft_model(model, config).train()
        first, second = (model(ids_of(), labels=ids_of()).loss for _ in range(2))
        assert relative(first, second) > 1e-6
        (first + 2 * second).backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    expected, found = gradients(checkpoints=False), gradients(checkpoints=True)
    assert expected and all(relative(found[name], expected[name]) < TOLERANCE for name in expected)


# ------------------------------------------------------------------------------------------------------- one layer


def test_a_layer_alone():
    torch.manual_seed(0)
    base, x = nn.Linear(6, 5), torch.randn(3, 6)
    whole = base(x)
    layer = adapters.peft.ParallelLinear(base, "mine", r=2, lora_alpha=6, init_lora_weights=False)
    assert isinstance(layer, adapters.peft.NeuronLoraLayer) and layer.weight is base.weight
    assert layer.r == {"mine": 2} and layer.lora_alpha == {"mine": 6}
    delta = layer.get_delta_weight("mine")
    assert relative(delta, 3 * layer.lora_B @ layer.lora_A) < TOLERANCE
    y, before = layer(x), base.weight.clone()
    assert relative(y, whole + x @ delta.T) < TOLERANCE
    layer.merge(safe_merge=True)
    assert layer.merged and relative(layer(x), y) < TOLERANCE
    layer.unmerge()
    assert torch.equal(base.weight, before) and torch.equal(layer(x), y)
    layer.enable_adapters(False)
    assert relative(layer(x), whole) < TOLERANCE
    layer.enable_adapters(True)
    layer(x).square().sum().backward()
    assert layer.lora_A.grad is not None and layer.weight.grad is None
    with pytest.raises(SpecError, match="'other': this layer has 'mine' alone"):
        layer.merge(adapter_names=["other"])


def test_layers_have_the_class_of_their_kind():
    words = adapters.peft.ParallelEmbedding(parallel.ParallelEmbedding(12, 4), "a", r=2, init_lora_weights=False)
    ids = torch.arange(6).view(2, 3)
    assert relative(words(ids), words.get_base_layer()(ids) + words.get_delta_weight("a")[ids]) < TOLERANCE
    heads = Heads(query=4, key_value=2)
    qkv = parallel.GQAQKVColumnParallelLinear(6, (8, 4), bias=False, gather_output=False, heads=heads)
    layer = adapters.peft.GQAQKVColumnParallelLinear(qkv, "a", r=2, init_lora_weights=False)
    assert isinstance(layer, adapters.peft.ParallelLinear) and sorted(layer.get_delta_weight("a")) == ["k", "q", "v"]
    x = torch.randn(3, 6)
    for found, base, part in zip(layer(x), qkv(x), "qkv", strict=True):
        assert relative(found, base + x @ layer.get_delta_weight("a")[part].T) < TOLERANCE
    model = small("a").get_base_model()
    assert type(model.up) is adapters.peft.ParallelLinear and type(model.words) is adapters.peft.ParallelEmbedding


def test_disabled_is_the_model_as_it_was_also_where_the_adapter_began_with_a_part_of_it():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(12, 8), torch.nn.Tanh(), torch.nn.Linear(8, 6))
    x = torch.randn(5, 12)
    before, weight = model(x), model[0].weight.detach().clone()
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "init_lora_weights": "pissa", "target_modules": ["0", "2"]}
    tuned = adapters.peft.get_peft_model(model, config)
    with torch.no_grad():
        tuned.base_model.model[0].lora_B.add_(1.0)
    assert not torch.equal(tuned.base_model.model[0].weight, weight), "the base is a residual"
    assert relative(tuned(x), before) > 1e-2
    with tuned.disable_adapter():
        assert relative(tuned(x), before) < TOLERANCE


def test_a_layer_alone_that_began_with_a_part_of_its_weight_is_merged():
    torch.manual_seed(0)
    base, x = nn.Linear(12, 8), torch.randn(5, 12)
    layer = adapters.peft.ParallelLinear(base, "a", r=2, init_lora_weights="pissa")
    with torch.no_grad():
        layer.lora_B.add_(torch.randn_like(layer.lora_B))
    expected = layer(x)
    layer.merge()
    assert relative(layer(x), expected) < TOLERANCE
    layer.unmerge()
    assert torch.equal(layer(x), expected)


class Experts(nn.Module):
    """A linear layer and a raw parameter, of experts."""

    def __init__(self):
        super().__init__()
        self.up, self.experts = nn.Linear(4, 4), nn.Parameter(torch.randn(3, 4, 5))

    def forward(self, x):
        return torch.einsum("bi,eio->beo", self.up(x), self.experts)


def test_raw_parameters_are_counted_disabled_and_kept_but_not_merged(tmp_path):
    torch.manual_seed(0)
    x, model = torch.randn(2, 4), nn.Sequential(Experts())
    before = model(x)
    config = dict(r=2, target_modules=["up"])
    model = adapters.peft.get_peft_model(model, adapters.peft.LoraConfig(**config, target_parameters=["0.experts"]))
    model.add_adapter("b", adapters.peft.LoraConfig(**config, init_lora_weights=False))
    assert model.get_nb_trainable_parameters() == (16 + 54, 20 + 60 + 16 + 54 + 16)
    model.set_adapter("b")
    assert model.get_nb_trainable_parameters()[0] == 16
    with model.disable_adapter():
        assert torch.equal(model(x), before)
    model.save_pretrained(tmp_path)
    model.load_adapter(tmp_path, "c")
    assert model.get_nb_trainable_parameters() == (16, 20 + 60 + 16 + 54 + 16 + 16 + 54)
    with pytest.raises(TargetError, match="a raw parameter is not merged in memory yet; keep adapter 'c' unmerged"):
        model.merge_adapter(["c"])
    model.set_adapter("c")
    with pytest.raises(TargetError, match="is the adapter of a raw parameter, which is not merged in memory yet"):
        list(model.merged_weights())


def test_an_alora_generates_as_stock_peft_whatever_it_saw_before(small_models, tmp_path):
    options = dict(max_new_tokens=6, min_new_tokens=6, do_sample=False, pad_token_id=0)
    config = dict(r=4, lora_alpha=64, target_modules=["q_proj", "v_proj", "down_proj"], alora_invocation_tokens=[7, 9])
    theirs = peft.get_peft_model(
        stock(small_models["llama"]), peft.LoraConfig(**config, init_lora_weights=False, task_type="CAUSAL_LM")
    )
    theirs.save_pretrained(tmp_path)
    model = adapters.peft.PeftModel.from_pretrained(stock(small_models["llama"]), tmp_path)
    for at in (3, 8):
        ids = ids_of()
        ids[:, at : at + 2] = torch.tensor([7, 9])
        expected = theirs.generate(input_ids=ids, **options)
        assert not torch.equal(expected, stock(small_models["llama"]).generate(input_ids=ids, **options))
        assert torch.equal(model.generate(input_ids=ids, **options), expected)
        assert torch.equal(model.generate(ids, **options), expected)
        assert torch.equal(model.generate(ids[:1].expand(2, -1), **options)[:1], expected[:1])
    with pytest.raises(
        TargetError, match="was told of 2 rows of tokens, and is called with 4; tell it of the same rows"
    ):
        model.generate(input_ids=ids, num_beams=2, **options)
    with pytest.raises(TargetError, match=r"adapter 'default': is an aLoRA, .* was given no input_ids; give those"):
        model(inputs_embeds=torch.zeros(1, 3, 32))


def test_tokens_of_tied_embeddings_are_counted_once(small_models):
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=[3, 5])
    directory = small_models["granite-tied"]
    theirs = peft.get_peft_model(stock(directory), config)
    model = adapters.peft.get_peft_model(ours(directory), config)
    assert model.get_nb_trainable_parameters()[0] == theirs.get_nb_trainable_parameters()[0]


@pytest.mark.parametrize("init", ("pissa", "olora"))
def test_a_residual_adapter_is_converted_with_the_biases_that_it_trains(init, tmp_path):
    def base():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5))

    config = adapters.peft.LoraConfig(r=2, target_modules=["0"], init_lora_weights=init, bias="lora_only")
    model, x = adapters.peft.get_peft_model(base(), config), torch.randn(3, 6)
    with torch.no_grad():
        for p in (p for p in model.parameters() if p.requires_grad):
            p.add_(torch.randn_like(p))
    model.save_pretrained(tmp_path, path_initial_model_for_weight_conversion="any")
    assert relative(peft.PeftModel.from_pretrained(base(), tmp_path)(x), model(x)) < TOLERANCE


@pytest.mark.parametrize("config", (None, "lora", adapters.peft.LoraConfig), ids=str)
def test_what_is_no_config_is_one_sentence(config):
    model = nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(SpecError, match=r"peft_config: is .*, expected a LoraConfig, or a mapping of its fields"):
        adapters.peft.get_peft_model(model, config)
    with pytest.raises(SpecError, match=r"wrap: spec is a .*, expected a LoraSpec; of a PEFT config, "):
        adapters.wrap(model, config)


def test_layers_repeated_are_stacked_by_the_front_and_not_merged(small_models, tmp_path):
    """Stacked as by PEFT, which does merge them: into the one weight of all copies, so that its outputs are others."""
    options = dict(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    config = peft.LoraConfig(layer_replication=[[0, 2], [1, 2]], task_type="CAUSAL_LM", **options)
    theirs = peft.get_peft_model(stock(small_models["llama"]), config)
    theirs.save_pretrained(tmp_path)
    model = adapters.peft.PeftModel.from_pretrained(ours(small_models["llama"]), tmp_path)
    assert relative(logits(model), logits(theirs.eval())) < TOLERANCE
    before = {name: p.clone() for name, p in model.get_base_model().named_parameters()}
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(TargetError, match="layers are repeated"):
            merge()
    assert all(torch.equal(before[name], p) for name, p in model.get_base_model().named_parameters())
    plain = ours(small_models["llama"])
    wrong = adapters.peft.LoraConfig(target_modules=["nothing"], layer_replication=[[0, 2], [1, 2]])
    with pytest.raises(TargetError, match="nothing"):
        adapters.peft.get_peft_model(plain, wrong)
    assert len(plain.model.layers) == 2
