"""Law 7: stock PEFT is the oracle of adapters, on disk and in training."""

import dataclasses
import json
import os
import re
import shutil
import struct
import zlib
from pathlib import Path

import peft
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pool import pool
from safetensors.torch import load_file, save_file
from small_models import ids_of, relative, small_models_fixture, stock  # noqa: F401  (a fixture)

import adapters
import lora_fn
from adapters import bind, models
from lora_fn import FileError, LayerSpec, LoraFnError, LoraSpec, SpecError, checkpoint, peft_format, targets
from lora_fn.reshard import gather

# What PEFT says of its own choices: it saves the base weights of embeddings, and takes lora_B's bias for a cut tensor.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`"),
    pytest.mark.filterwarnings("ignore:.*LoRA tensor.* have invalid shape"),
]
TOLERANCE = 1e-5
EVERY_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

INVOCATION = ids_of()[0, 4:6].tolist()  # the second sequence has none

# (model, what differs from PEFT's defaults)
ADAPTERS = {
    "all linears": ("llama", dict(r=4, lora_alpha=8, target_modules=EVERY_LINEAR)),
    "all-linear": ("qwen3", dict(r=3, target_modules="all-linear")),
    "two of them": ("qwen3", dict(r=40, lora_alpha=3, target_modules=["q_proj", "v_proj"])),
    "rslora": ("granite", dict(r=5, use_rslora=True, target_modules=EVERY_LINEAR)),
    "embeddings": ("llama", dict(r=4, target_modules=["embed_tokens", "lm_head", "down_proj"])),
    "lora_bias": ("llama", dict(r=2, lora_alpha=2, lora_bias=True, target_modules=["q_proj", "o_proj"])),
    "dora": ("qwen3", dict(r=3, lora_alpha=5, use_dora=True, target_modules=EVERY_LINEAR)),
    "dora of embeddings": ("llama", dict(r=4, use_dora=True, target_modules=["embed_tokens", "lm_head", "o_proj"])),
    "kasa": ("llama", dict(r=3, kasa_config=peft.KasaConfig(), target_modules=["v_proj", "down_proj"])),
    "alora": ("llama", dict(r=4, alora_invocation_tokens=INVOCATION, target_modules=EVERY_LINEAR)),
    "bdlora": (
        "llama",
        dict(
            r=4,
            lora_dropout=0.1,
            use_bdlora=peft.BdLoraConfig(["o_proj", "down_proj"], ["q_proj", "up_proj"], 2, False),
            target_modules=["o_proj", "down_proj", "q_proj", "up_proj", "v_proj"],
        ),
    ),
    "patterns": (
        "granite",
        dict(
            r=4,
            rank_pattern={"o_proj": 7, "1.mlp.up_proj": 1},
            alpha_pattern={"q_proj": 20},
            target_modules=EVERY_LINEAR,
        ),
    ),
    "a regular expression": ("llama", dict(r=4, target_modules=r".*\.1\..*\.(up|down)_proj")),
    "one layer": ("granite", dict(r=4, target_modules=["q_proj", "up_proj"], layers_to_transform=[1])),
}


def adapter_of(name, directories, place):
    """(model's directory, adapter's directory): made by stock PEFT, random in both factors."""
    model, options = ADAPTERS[name]
    directory = Path(place) / name.replace(" ", "-")
    if not directory.exists():
        torch.manual_seed(len(name))
        config = peft.LoraConfig(init_lora_weights=False, task_type="CAUSAL_LM", **options)
        made = peft.get_peft_model(stock(directories[model]), config)
        with torch.no_grad():
            for key, p in made.named_parameters():
                if "lora_B" in key and key.endswith("bias"):
                    p.normal_(std=0.1)
                if "lora_B" in key and not p.any():  # PEFT starts a block-diagonal one with zeros
                    p.normal_(std=0.3)
                if "lora_magnitude" in key:
                    p.mul_(1 + 0.2 * torch.randn_like(p))
        made.save_pretrained(directory)
    return directories[model], str(directory)


@pytest.fixture(scope="module")
def made(small_models, tmp_path_factory):
    """Name -> (model's directory, adapter's directory)."""
    place = tmp_path_factory.mktemp("peft")
    return {name: adapter_of(name, small_models, place) for name in ADAPTERS}


def factors_in(directory):
    """The factors in a PEFT directory, without the base weights that PEFT adds."""
    tensors = load_file(Path(directory) / checkpoint.WEIGHTS)
    return {name: t for name, t in tensors.items() if ".base_layer." not in name}


def adapted(mesh, model, adapter, **options):
    """Our parallel model with a PEFT adapter in it."""
    ours = models.load(model, mesh=mesh, dtype=torch.float32, **options)
    adapters.wrap(ours, adapters.read_spec(adapter))
    adapters.load(ours, adapter)
    return ours


def logits_and_gradients(mesh, made, exports):
    """{(adapter, sequence parallel): (logits, {layer: {name: canonical gradient}})}; every adapter is saved again."""
    found = {}
    for name, (model, adapter) in made.items():
        for sequence_parallel in (False, True):
            ours = adapted(mesh, model, adapter, sequence_parallel=sequence_parallel, gather_logits=True)
            if name == "alora":
                adapters.set_invocation(ours, ids_of())
            out = ours(ids_of(), labels=ids_of())
            out.loss.backward()
            grads = {
                path: gather({n: p.grad for n, p in of.items()}, bind.layers(ours)[path].spec)
                for path, of in bind.factors(ours).items()
            }
            found[name, sequence_parallel] = (out.logits.detach(), grads)
            adapters.save(ours, Path(exports) / f"{name}-{sequence_parallel}".replace(" ", "-"))
    return found


def stock_gradient(tuned, path, spec, name):
    module = tuned.base_model.model.get_submodule(path)
    if name == "lora_diag":
        return module.lora_diag["default"].grad
    if name == "lora_magnitude_vector":
        return module.lora_magnitude_vector["default"].weight.grad
    if spec.kind == "embedding":
        return {"lora_A": module.lora_embedding_A, "lora_B": module.lora_embedding_B}[name]["default"].grad
    if name == "lora_B_bias":
        return module.lora_B["default"].bias.grad
    return {"lora_A": module.lora_A, "lora_B": module.lora_B}[name]["default"].weight.grad


@pytest.mark.parametrize("size", (1, 2, 4))
def test_an_adapter_of_peft_gives_the_same_logits_and_gradients_and_comes_back(size, made, tmp_path):
    arguments = (logits_and_gradients, made, str(tmp_path))
    each = pool(size).run(*arguments) if size > 1 else [arguments[0](None, *arguments[1:])]
    for name, (model, adapter) in made.items():
        tuned = peft.PeftModel.from_pretrained(stock(model), adapter, is_trainable=True).eval()
        expected = tuned(ids_of(), labels=ids_of())
        expected.loss.backward()
        changed = relative(expected.logits, stock(model)(ids_of()).logits)
        assert changed > 1e-2, "the adapter must do something for the comparison to say something"
        specs = bind.specs(adapted(None, model, adapter))
        for sequence_parallel in (False, True):
            for found in each:
                logits, grads = found[name, sequence_parallel]
                assert relative(logits, expected.logits) < TOLERANCE
                for path, of in grads.items():
                    for parameter, grad in of.items():
                        assert relative(grad, stock_gradient(tuned, path, specs[path], parameter)) < TOLERANCE
            back = tmp_path / f"{name}-{sequence_parallel}".replace(" ", "-")
            before, after = factors_in(adapter), factors_in(back)
            assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)
            again = peft.PeftModel.from_pretrained(stock(model), back).eval()
            missing = set(peft.get_peft_model_state_dict(again, save_embedding_layers=False)) ^ set(after)
            assert not missing
            assert torch.equal(again(ids_of()).logits, tuned(ids_of()).logits)


def test_loading_what_we_wrote_leaves_no_key_over(made, tmp_path):
    for name, (model, adapter) in made.items():
        adapters.save(adapted(None, model, adapter), tmp_path / name)
        config = peft.LoraConfig.from_pretrained(tmp_path / name)
        fresh = peft.get_peft_model(stock(model), config)
        told = peft.set_peft_model_state_dict(fresh, factors_in(tmp_path / name))
        assert not told.unexpected_keys
        assert not [key for key in told.missing_keys if "lora_" in key]


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_narrow_factors_come_back_bit_for_bit(dtype, made, tmp_path):
    model, adapter = made["patterns"]
    shutil.copytree(adapter, tmp_path / "narrow")
    edit(tmp_path / "narrow", lambda tensors: tensors.update({k: t.to(dtype) for k, t in tensors.items()}))
    before = factors_in(tmp_path / "narrow")
    for kept in (dtype, torch.float32):
        ours = adapters.wrap(models.load(model), adapters.read_spec(adapter), dtype=kept)
        adapters.load(ours, tmp_path / "narrow")
        adapters.save(ours, tmp_path / "out")
        after = factors_in(tmp_path / "out")
        assert before.keys() == after.keys() and {t.dtype for t in after.values()} == {kept}
        assert all(torch.equal(before[k].to(kept), after[k]) for k in before)


# ------------------------------------------------------------------------------------------------------------- bytes


SEAL = (
    r"{\"config\":{\"alpha_pattern\":{},\"fan_in_fan_out\":false,\"lora_alpha\":2,\"r\":1,\"rank_pattern\":{},"
    r"\"use_rslora\":false},\"crc32\":\"ceab1393\"}"
)
GOLDEN_HEADER = (
    '{"__metadata__":{"format":"pt","lora_fn":"' + SEAL + '"},'
    '"base_model.model.0.lora_A.weight":{"dtype":"F32","shape":[1,2],"data_offsets":[0,8]},'
    '"base_model.model.0.lora_B.weight":{"dtype":"F32","shape":[1,1],"data_offsets":[8,12]}}'
)
GOLDEN_CONFIG = """{
  "alpha_pattern": {},
  "base_model_name_or_path": null,
  "bias": "none",
  "exclude_modules": null,
  "fan_in_fan_out": false,
  "inference_mode": true,
  "init_lora_weights": true,
  "layers_pattern": null,
  "layers_to_transform": null,
  "lora_alpha": 2,
  "lora_bias": false,
  "lora_dropout": 0.0,
  "modules_to_save": null,
  "peft_type": "LORA",
  "r": 1,
  "rank_pattern": {},
  "target_modules": [
    "0"
  ],
  "task_type": null,
  "use_rslora": false
}"""


def test_golden_bytes(tmp_path):
    model = torch.nn.Sequential(torch.nn.Linear(2, 1, bias=False))
    adapters.wrap(model, LoraSpec(rank=1, alpha=2, target_modules=("0",)))
    with torch.no_grad():
        bind.layers(model)["0"].lora_A.copy_(torch.tensor([[1.0, 2.0]]))
        bind.layers(model)["0"].lora_B.copy_(torch.tensor([[-1.0]]))
    adapters.save(model, tmp_path)
    header = GOLDEN_HEADER.encode()
    header += b" " * (-len(header) % 8)
    values = struct.pack("<3f", 1.0, 2.0, -1.0)
    assert (tmp_path / checkpoint.WEIGHTS).read_bytes() == struct.pack("<Q", len(header)) + header + values
    assert (tmp_path / checkpoint.CONFIG).read_text() == GOLDEN_CONFIG
    assert sorted(p.name for p in tmp_path.iterdir()) == [checkpoint.CONFIG, checkpoint.WEIGHTS]
    crc = [zlib.crc32(values[:8]), zlib.crc32(values[8:])]
    lines = [
        f"base_model.model.0.lora_{n} F32 [1, {2 - i}] {crc[i]:08x}" for i, n in enumerate(("A.weight", "B.weight"))
    ]
    assert f"{zlib.crc32(chr(10).join(lines).encode()):08x}" == "ceab1393"
    assert load_file(tmp_path / checkpoint.WEIGHTS)["base_model.model.0.lora_A.weight"].tolist() == [[1.0, 2.0]]


def test_our_bytes_are_those_of_safetensors(tmp_path):
    """With one text in the header, for which safetensors has one order."""
    generator = torch.Generator().manual_seed(0)
    tensors = {
        f"{name}.{dtype}".replace("torch.", ""): torch.randint(0, 2, shape, generator=generator).to(dtype)
        for name, shape in (("b", (3, 5)), ("a", (7,)), ("empty", (0, 2)), ("scalar", ()), ('"ü', (1, 1, 2)))
        for dtype in (torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.float16, torch.uint8)
    }
    save_file(tensors, tmp_path / "theirs", metadata={"format": "pt"})
    checkpoint.write_tensors(tmp_path / "ours", dict(reversed(tensors.items())))
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_the_config_of_another_adapter_is_refused(tmp_path):
    for place, alpha in (("one", 2), ("other", 4)):
        model = torch.nn.Sequential(torch.nn.Linear(2, 1, bias=False))
        adapters.save(adapters.wrap(model, LoraSpec(rank=1, alpha=alpha, target_modules=("0",))), tmp_path / place)
    shutil.copy(tmp_path / "other" / checkpoint.CONFIG, tmp_path / "one" / checkpoint.CONFIG)
    with pytest.raises(FileError, match=r"'lora_alpha' is 4, but adapter_model.safetensors was written with 2; use"):
        adapters.read_spec(tmp_path / "one")
    peft.LoraConfig.from_pretrained(tmp_path / "other").save_pretrained(tmp_path / "other")  # in PEFT's own words
    assert adapters.read_spec(tmp_path / "other").alpha == 4
    config = tmp_path / "other" / checkpoint.CONFIG
    config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": "elsewhere"}))
    assert adapters.read_spec(tmp_path / "other").base_model_name_or_path == "elsewhere"


# ------------------------------------------------------------------------------------------------------------ config

NAMES = st.lists(st.sampled_from(EVERY_LINEAR), min_size=1, max_size=4, unique=True).map(tuple)
SPECS = st.builds(
    LoraSpec,
    rank=st.integers(1, 64),
    alpha=st.integers(1, 64),
    dropout=st.sampled_from([0.0, 0.05, 0.5]),
    use_rslora=st.booleans(),
    init_lora_weights=st.sampled_from([True, False, "gaussian"]),
    target_modules=NAMES | st.just(".*_proj"),
    exclude_modules=st.just(()) | NAMES,
    rank_pattern=st.dictionaries(st.sampled_from(EVERY_LINEAR), st.integers(1, 9)),
    alpha_pattern=st.dictionaries(st.sampled_from(EVERY_LINEAR), st.integers(1, 9)),
    task_type=st.sampled_from([None, "CAUSAL_LM"]),
    base_model_name_or_path=st.sampled_from([None, "base"]),
)
SPECS |= st.builds(
    LoraSpec,
    target_modules=NAMES,
    lora_bias=st.booleans(),
    layers_to_transform=st.lists(st.integers(0, 9), min_size=1, unique=True),
    layers_pattern=st.sampled_from([None, ("layers",), ("h", "blocks")]),
)


@given(spec=SPECS)
def test_configs_go_to_peft_and_back(spec):
    config = peft_format.to_config(spec, ["q_proj"], ["q_proj"])
    known = {f.name for f in dataclasses.fields(peft.LoraConfig)}
    theirs = peft.LoraConfig(**{k: v for k, v in config.items() if k in known})
    as_tuples = ("target_modules", "exclude_modules")

    def plain(values):
        return {k: sorted(v) if k in as_tuples and not isinstance(v, str) else v for k, v in values.items()}

    assert plain(peft_format.from_config(config).to_dict()) == plain(spec.to_dict())
    assert plain(peft_format.from_config(theirs).to_dict()) == plain(spec.to_dict())
    assert plain(peft_format.from_config(theirs.to_dict()).to_dict()) == plain(spec.to_dict())


UNSUPPORTED = {
    "arrow_config": {"top_k": 2},
    "monteclora_config": {"num_samples": 2},
    "megatron_config": {"a": 1},
    "peft_type": "LOHA",
    "something_new": 1,
    "lora_alpha": None,
    "use_rslora": None,
}


@pytest.mark.parametrize("key", UNSUPPORTED)
def test_what_we_do_not_have_is_an_error_that_names_it(key):
    config = {"peft_type": "LORA", "r": 4, "target_modules": ["q_proj"]}
    with pytest.raises(SpecError, match=key):
        peft_format.from_config(config | {key: UNSUPPORTED[key]})
    with pytest.raises(SpecError) as both:
        peft_format.from_config(config | {key: UNSUPPORTED[key]} | {"arrow_config": {"top_k": 2}, "new": 1})
    assert "arrow_config" in str(both.value) and "new" in str(both.value)


@pytest.mark.parametrize("value", [None, False, 0, "", [], {}])
def test_unknown_keys_that_say_nothing_are_fine(value):
    spec = peft_format.from_config({"peft_type": "LORA", "r": 4, "target_modules": ["q_proj"], "something_new": value})
    assert spec.rank == 4


def test_a_config_without_targets_means_those_of_the_models_type():
    assert peft_format.from_config({"peft_type": "LORA"}).target_modules is None


def test_every_field_of_pefts_config_is_one_that_we_know():
    known = {*peft_format.FIELDS, *peft_format.NEWER, *peft_format.REFUSED, *peft_format.INERT, "peft_type"}
    config = peft.LoraConfig(target_modules=["q_proj"])
    assert {f.name for f in dataclasses.fields(config)} <= known
    assert peft_format.from_config(config) == LoraSpec(target_modules=("q_proj",))


def test_every_feature_that_we_do_not_have_is_refused_by_name_and_with_the_reason():
    config = {"peft_type": "LORA", "target_modules": ["q_proj"]}
    for key, reason in peft_format.REFUSED.items():
        with pytest.raises(SpecError, match=f"'{key}': is 'odd', which is not supported: it {re.escape(reason)}"):
            peft_format.from_config(config | {key: "odd"})


# What JSON can hold, and what may be written where.
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 99) | st.floats() | st.text("ab.(*", max_size=4),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text("a(", max_size=2), inner, max_size=2),
    max_leaves=4,
)
WRONG = {
    "r": "8",
    "lora_alpha": True,
    "lora_dropout": "0.1",
    "use_rslora": "false",
    "lora_bias": 1,
    "init_lora_weights": 2,
    "target_modules": [1],
    "exclude_modules": 1.5,
    "layers_to_transform": [True],
    "layers_pattern": [None],
    "rank_pattern": {"(": 1},
    "alpha_pattern": ["q_proj"],
    "task_type": 1,
    "base_model_name_or_path": [],
}


@pytest.mark.parametrize("key", peft_format.FIELDS)
def test_a_value_that_cannot_be_is_a_sentence(key):
    with pytest.raises(SpecError, match=peft_format.FIELDS[key]):
        peft_format.from_config({"peft_type": "LORA", "target_modules": ["q_proj"]} | {key: WRONG[key]})


@given(key=st.sampled_from(list(peft_format.FIELDS)), value=JSON)
def test_whatever_a_config_holds_it_is_a_spec_or_an_error_of_ours(key, value):
    names = ["model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"]
    try:
        spec = peft_format.from_config({"peft_type": "LORA", "target_modules": ["q_proj"]} | {key: value})
        assert LoraSpec.from_json(spec.to_json()) == spec
        assert targets.select(names, spec, linear=names)
    except LoraFnError as error:
        assert str(error)


# ------------------------------------------------------------------------------------------------------------ damage


def edit(directory, change):
    file = Path(directory) / checkpoint.WEIGHTS
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


LAYER = "base_model.model.model.layers.0.self_attn.q_proj"
DAMAGES = {
    "a missing tensor": (lambda d: edit(d, lambda t: t.pop(f"{LAYER}.lora_A.weight")), "is missing"),
    "a tensor too many": (lambda d: edit(d, lambda t: t.update(odd=torch.zeros(1))), "belongs to no adapted layer"),
    "another shape": (
        lambda d: edit(d, lambda t: t.update({f"{LAYER}.lora_A.weight": torch.zeros(4, 7)})),
        r"has shape \[4, 7\], expected \[4, 32\]",
    ),
    "cut off": (lambda d: os.truncate(d / checkpoint.WEIGHTS, 500), "not a whole safetensors file"),
    "empty": (lambda d: os.truncate(d / checkpoint.WEIGHTS, 0), "not a whole safetensors file"),
    "no tensors": (lambda d: (d / checkpoint.WEIGHTS).unlink(), "no such file"),
    "a pickle only": (
        lambda d: (d / checkpoint.WEIGHTS).rename(d / "adapter_model.bin"),
        "a pickle, which is not read",
    ),
    "no config": (lambda d: (d / checkpoint.CONFIG).unlink(), "no such file"),
    "a broken config": (lambda d: (d / checkpoint.CONFIG).write_text("{"), "is not JSON"),
    "a config of another kind": (lambda d: (d / checkpoint.CONFIG).write_text("[1]"), "holds a list"),
    "another rank": (
        lambda d: (d / checkpoint.CONFIG).write_text(
            json.dumps(json.loads((d / checkpoint.CONFIG).read_text()) | {"r": 9})
        ),
        "wrap with read_spec",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_adapter_is_a_sentence_and_changes_nothing(damage, made, tmp_path):
    model, adapter = made["all linears"]
    ours = adapted(None, model, adapter)
    before = {name: p.clone() for name, p in ours.named_parameters()}
    shutil.copytree(adapter, tmp_path / "adapter")
    change, sentence = DAMAGES[damage]
    change(tmp_path / "adapter")
    with pytest.raises(FileError, match=sentence) as raised:
        adapters.load(ours, tmp_path / "adapter")
    assert str(tmp_path / "adapter") in str(raised.value)
    assert "\n" not in str(raised.value) and str(raised.value).endswith(".")
    assert all(torch.equal(before[name], p) for name, p in ours.named_parameters())


def test_a_base_weight_of_another_model_is_refused(made, tmp_path):
    model, adapter = made["embeddings"]
    shutil.copytree(adapter, tmp_path / "adapter")
    key = "base_model.model.model.embed_tokens.base_layer.weight"
    assert key in load_file(tmp_path / "adapter" / checkpoint.WEIGHTS)
    edit(tmp_path / "adapter", lambda tensors: tensors[key].add_(1))
    with pytest.raises(FileError, match="is not this model's weight"):
        adapted(None, model, str(tmp_path / "adapter"))


def test_what_is_not_finite_is_not_written(made, tmp_path):
    ours = adapted(None, *made["all linears"])
    adapters.save(ours, tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with torch.no_grad():
        next(iter(bind.layers(ours).values())).lora_B[0, 0] = float("nan")
    with pytest.raises(FileError, match="is not finite; nothing was written"):
        adapters.save(ours, tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


FIRST = "model.layers.0.self_attn.q_proj"  # a column layer: lora_A is whole everywhere, lora_B is cut


def set_factor(layers, name, change):
    with torch.no_grad():
        change(layers[FIRST].get_parameter(name))


# what happens to the model on process 1 of 2 -> what is said on each
SPOILT = {
    "drifted": (lambda ours, layers: set_factor(layers, "lora_A", lambda p: p.add_(1e-3)), ("differ", "differ")),
    "not finite here": (
        lambda ours, layers: set_factor(layers, "lora_A", lambda p: p[0, 0].fill_(torch.nan)),
        ("differ", "not finite"),
    ),
    "a part that is not finite": (
        lambda ours, layers: set_factor(layers, "lora_B", lambda p: p[0, 0].fill_(torch.inf)),
        ("not finite", "not finite"),
    ),
    "no place": (lambda ours, layers: None, ("cannot be written", None)),
}


def save_spoilt(mesh, model, adapter, place):
    """{how: what `save` says}, and where gradients were never synced."""
    told = {}
    for how, (spoil, _) in SPOILT.items():
        ours = adapted(mesh, model, adapter)
        if mesh.get_rank() == 1:
            spoil(ours, bind.layers(ours))
        told[how] = said_by_save(ours, Path(place) / ("a file" if how == "no place" else how))
    for synced in (False, True):
        ours = models.load(model, mesh=mesh, sequence_parallel=True)
        adapters.wrap(ours, adapters.read_spec(adapter), gradients="deferred")
        ours(ids_of(), labels=ids_of()).loss.backward()
        if synced:
            grads = {path: {n: p.grad for n, p in of.items()} for path, of in bind.factors(ours).items()}
            for path, of in lora_fn.sync_gradients(grads, bind.specs(ours)).items():
                for name, grad in of.items():
                    bind.factors(ours)[path][name].grad = grad
        torch.optim.SGD([p for p in ours.parameters() if p.requires_grad], lr=0.1).step()
        told["synced" if synced else "never synced"] = said_by_save(ours, Path(place) / f"synced {synced}")
    return told


def said_by_save(ours, output):
    try:
        adapters.save(ours, output)
    except FileError as error:
        return str(error)
    return None


def test_what_one_process_finds_wrong_is_refused_on_all(made, tmp_path):
    (tmp_path / "a file").write_text("in the way")
    each = pool(2).run(save_spoilt, *made["all linears"], str(tmp_path))
    for how, (_, expected) in SPOILT.items():
        for told, said in zip(each, expected, strict=True):
            assert told[how] is None if said is None else said in told[how], (how, told[how])
    for told in each:
        assert "q_proj: the copies of ['lora_A'] differ between processes" in told["drifted"]
        assert "sync_gradients" in told["never synced"] and told["synced"] is None
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a file", "synced True"]


# ---------------------------------------------------------------------------------------------------------- training

STEPS, RATE = 20, 5e-3


def batch_of(step):
    return ids_of(batch=2, length=16, seed=step % 5)


def trained(parameters, loss_of):
    """The loss of each of 20 AdamW steps."""
    optimizer = torch.optim.AdamW(parameters, lr=RATE)
    losses = []
    for step in range(STEPS):
        optimizer.zero_grad()
        loss = loss_of(batch_of(step))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def train_ours(mesh, model, adapter):
    """{sequence parallel: (losses, replicated factors)} on one process."""
    found = {}
    for sequence_parallel in (False, True):
        ours = adapted(mesh, model, adapter, sequence_parallel=sequence_parallel)
        parameters = [p for p in ours.parameters() if p.requires_grad]
        losses = trained(parameters, lambda ids, ours=ours: ours(ids, labels=ids).loss)
        whole = {
            (path, name): p.detach()
            for path, of in bind.factors(ours).items()
            for name, p in of.items()
            if lora_fn.sharding.rules(bind.specs(ours)[path])[name].placement == lora_fn.Replicate()
        }
        found[sequence_parallel] = (losses, whole)
    return found


@pytest.mark.parametrize("size", (2, 4))
def test_training_follows_stock_peft(size, made):
    model, adapter = made["all linears"]
    tuned = peft.PeftModel.from_pretrained(stock(model), adapter, is_trainable=True)
    expected = trained(
        [p for p in tuned.parameters() if p.requires_grad], lambda ids: tuned(ids, labels=ids, use_cache=False).loss
    )
    assert expected[0] - expected[-1] > 0.1, "the loss must move for the comparison to say something"
    for found in (each := pool(size).run(train_ours, model, adapter)):
        for sequence_parallel, (losses, whole) in found.items():
            assert losses == pytest.approx(expected, rel=1e-4)
            others = each[0][sequence_parallel][1]
            assert whole and all(torch.equal(whole[key], others[key]) for key in whole)


def test_names_of_tensors():
    spec = LayerSpec(kind="column", in_features=2, out_features=2, rank=1, lora_bias=True)
    assert peft_format.tensor_names("a.b", spec) == {
        "base_model.model.a.b.lora_A.weight": "lora_A",
        "base_model.model.a.b.lora_B.weight": "lora_B",
        "base_model.model.a.b.lora_B.bias": "lora_B_bias",
    }


@pytest.mark.parametrize("options", ({"kasa_config": {}}, {"use_bdlora": {}}), ids=str)
def test_a_variant_without_options_comes_back(options):
    """As in PEFT, whose config is one where it is not None."""
    spec = LoraSpec(target_modules=("a",), **options)
    assert peft_format.from_config(peft_format.to_config(spec, ["a"], ["a", "b"])) == spec
    assert peft_format.from_config(peft.LoraConfig(target_modules=["a"], **options)).variant == spec.variant
