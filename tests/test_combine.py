"""Is a combination of adapters the one that stock PEFT makes, from files and on a parallel model?

Of random elements (dare), both sides are given the same ones.
"""

import json
from pathlib import Path

import peft
import pytest
import torch
from pool import pool
from safetensors.torch import load_file, save_file
from small_models import ids_of, relative, small_models_fixture, stock  # noqa: F401  (a fixture)
from torch import nn
from transformers.pytorch_utils import Conv1D

import adapters
import adapters.peft
import lora_fn
from adapters import cli, models
from adapters.combine import combine
from adapters.convert import open_adapter
from lora_fn import Combination, SpecError, TargetError, algebra, checkpoint

EXACT, TOLERANCE = 1e-10, 1e-5
WEIGHTS = [0.25, -0.25, 2.0]  # times the scalings, their roots are exact in PEFT's float32
TYPES = [(name, majority) for name, m in algebra.METHODS.items() for majority in algebra.MAJORITIES[: 1 + m.elect]]


class Net(nn.Module):
    """A layer of every kind that PEFT combines."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.up, self.down = nn.Embedding(11, 12), nn.Linear(12, 20), nn.Linear(20, 12)
        self.conv, self.point = nn.Conv2d(3, 5, (3, 2)), nn.Conv2d(5, 4, 1)

    def forward(self, ids, image):
        return torch.cat(
            [self.down(torch.tanh(self.up(self.embed(ids)))).flatten(), self.point(self.conv(image)).flatten()]
        )


class Transposed(nn.Module):
    """A layer whose weight is [in, out]."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.up = Conv1D(20, 12)

    def forward(self, ids, image):
        return self.up(image.flatten()[:12])


EVERYTHING = ["embed", "up", "down", "conv", "point"]
NETS = {
    Net: {
        "first": dict(r=2, lora_alpha=8, target_modules=EVERYTHING),
        "second": dict(r=2, lora_alpha=2, target_modules=["up", "down", "conv", "embed"]),
        "third": dict(r=2, lora_alpha=4, target_modules=["up", "point"]),
    },
    Transposed: {
        name: dict(r=2, lora_alpha=alpha, target_modules=["up"], fan_in_fan_out=True)
        for name, alpha in {"first": 8, "second": 2, "third": 4}.items()
    },
}
INPUTS = (
    torch.arange(11)[None],
    torch.randn(1, 3, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0)),
)


def stock_net(net, configs, place):
    """A stock model with adapters, and the directories of those."""
    model = net().double()
    for number, (name, options) in enumerate(configs.items()):
        torch.manual_seed(100 + number)
        config = peft.LoraConfig(**{"init_lora_weights": False} | options)
        model = peft.get_peft_model(model, config, name) if number == 0 else model
        model.add_adapter(name, config) if number else None
    model.save_pretrained(place)
    return model, [place / name for name in configs]


def drawn(shape, density):
    """Which elements of a tensor are kept, whichever way it is turned."""
    rows, columns = shape[0], shape[1:].numel()
    if rows < columns:
        return drawn(torch.Size((columns, rows)), density).T.reshape(shape)
    return (torch.rand(rows, columns, generator=torch.Generator().manual_seed(rows)) < density).reshape(shape)


@pytest.fixture(name="same_draws")
def same_draws_fixture(monkeypatch):
    """PEFT and we keep the same random elements."""
    monkeypatch.setattr(torch, "bernoulli", lambda p: drawn(p.shape, p.flatten()[0].item()).to(p.dtype))
    monkeypatch.setattr(
        algebra, "dropout", lambda x, key, rows, columns, p: torch.where(drawn(x.shape, 1 - p), x / (1 - p), 0)
    )


def on_stock(net, directory):
    """The output of a stock model with an adapter of a file, all of whose tensors it took."""
    model = peft.PeftModel.from_pretrained(net().double(), directory)
    names = {name for name in peft.get_peft_model_state_dict(model) if ".base_layer." not in name}
    assert names == set(load_file(Path(directory) / checkpoint.WEIGHTS))
    return model(*INPUTS)


@pytest.mark.filterwarnings("ignore:.*fan_in_fan_out")
@pytest.mark.parametrize("net", NETS)
def test_a_combination_of_files_is_pefts(net, tmp_path, same_draws):
    """Every type, every kind of layer, adapters of different layers: the factors, and what they compute."""
    model, directories = stock_net(net, NETS[net], tmp_path)
    for name, majority in TYPES:
        prunes = {"density": 0.5 if algebra.METHODS[name].prune else None, "majority_sign_method": majority}
        model.add_weighted_adapter([*NETS[net]], WEIGHTS, f"{name} {majority}", name, **prunes)
        model.set_adapter(f"{name} {majority}")
        out = tmp_path / f"{name} {majority}"
        done = combine(directories, WEIGHTS, out, Combination(how=name, **prunes), quiet=True)
        assert relative(on_stock(net, out), model(*INPUTS)) < EXACT
        assert (done.error < EXACT) == (name == "cat")
        theirs = peft.get_peft_model_state_dict(model, adapter_name=f"{name} {majority}")
        for key, factor in load_file(out / checkpoint.WEIGHTS).items():
            if algebra.METHODS[name].of == algebra.FACTORS:
                assert relative(factor, theirs[key]) < EXACT


def test_a_clamp_and_a_rank_are_pefts(tmp_path):
    model, directories = stock_net(Transposed, NETS[Transposed], tmp_path)
    for name, options in {"rank": {"svd_rank": 3}, "clamp": {"svd_rank": 4, "svd_clamp": 0.8}}.items():
        model.add_weighted_adapter([*NETS[Transposed]], WEIGHTS, name, "svd", **options)
        model.set_adapter(name)
        combine(directories, WEIGHTS, tmp_path / f"our {name}", Combination(**options), quiet=True)
        assert relative(on_stock(Transposed, tmp_path / f"our {name}"), model(*INPUTS)) < EXACT


RANKS = {
    "first": dict(r=3, lora_alpha=7, target_modules=["up", "down"], rank_pattern={"down": 1}, use_rslora=True),
    "second": dict(r=2, lora_alpha=5, target_modules=r".*(up|point)", alpha_pattern={"up": 11}, lora_bias=True),
    "third": dict(r=4, lora_alpha=4, target_modules=["up", "conv", "down"], exclude_modules=["down"]),
}


@pytest.mark.filterwarnings("ignore:Adapter .* LoRA tensor.* have invalid shape")  # PEFT, of its own biases
def test_other_ranks_scalings_and_layers_add_up(tmp_path):
    """ "cat" is exact, and an SVD of enough ranks too: of rsLoRA, of patterns, of biases. PEFT's own combination keeps
    the first adapter's use_rslora, which makes it too large, and leaves the biases out."""
    _, directories = stock_net(Net, RANKS, tmp_path)
    base = Net().double()(*INPUTS)
    weights = [0.7, -1.3, 2.1]
    linear = Net().double()
    state = linear.state_dict()
    for directory, weight in zip(directories, weights, strict=True):
        source = open_adapter(directory)
        for path, spec in source.specs.items():
            factors = source.factors(path)
            state[f"{path}.weight"] += weight * lora_fn.delta(factors, spec)
            if spec.lora_bias:
                state[f"{path}.bias"] += weight * spec.scaling * factors["lora_B_bias"]
    linear.load_state_dict(state)
    for name, options in {"cat": {}, "svd": {"svd_rank": 12}}.items():
        done = combine(directories, weights, tmp_path / name, Combination(how=name, **options), quiet=True)
        assert relative(on_stock(Net, tmp_path / name), linear(*INPUTS)) < EXACT and done.error < EXACT
    assert relative(linear(*INPUTS), base) > 1e-2
    config = json.loads((tmp_path / "cat" / checkpoint.CONFIG).read_text())
    ranks = {path: spec.rank for path, spec in open_adapter(tmp_path / "cat").specs.items()}
    assert ranks == {"up": 9, "down": 1, "point": 2, "conv": 4} and config["r"] == 9
    assert config["rank_pattern"] == config["alpha_pattern"] == {"down": 1, "point": 2, "conv": 4}
    assert sorted(config["target_modules"]) == ["conv", "down", "point", "up"] and not config["use_rslora"]


BOTH = ["gate_up_proj", "down_proj"]


class Experts(nn.Module):
    """Stacked experts, as transformers 5 has them."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.gate_up_proj = nn.Parameter(torch.randn(3, 10, 6))
        self.down_proj = nn.Parameter(torch.randn(3, 6, 5))

    def forward(self, x):
        gate, up = torch.einsum("...i,eoi->...eo", x, self.gate_up_proj).chunk(2, -1)
        return torch.einsum("...ei,eoi->...o", gate.tanh() * up, self.down_proj)


class Mixture(nn.Module):
    def __init__(self):
        super().__init__()
        self.experts = Experts()

    def forward(self, x):
        return self.experts(x)


@pytest.mark.filterwarnings("ignore:The following .*_pattern keys did not match any targeted module")
def test_experts_are_combined_each_by_itself(tmp_path):
    """Which PEFT refuses; it loads the result. One adapter has both parameters, one the nested one."""
    both = {"a": BOTH, "b": BOTH[1:]}
    for number, (name, parameters) in enumerate(both.items()):
        torch.manual_seed(number)
        config = peft.LoraConfig(r=2 + number, target_modules=[], target_parameters=parameters, init_lora_weights=False)
        model = peft.get_peft_model(Mixture(), config)
        with torch.no_grad():
            for n, p in model.named_parameters():
                p.add_(torch.randn_like(p) * 0.2) if "lora_" in n else None
        model.save_pretrained(tmp_path / name)
    combine([tmp_path / name for name in both], [0.5, -2.0], tmp_path / "out", Combination(how="cat"), quiet=True)
    merged = Mixture()
    with torch.no_grad():
        for name, weight in (("a", 0.5), ("b", -2.0)):
            source = open_adapter(tmp_path / name)
            for path, spec in source.specs.items():
                delta = lora_fn.delta(source.factors(path), spec)
                merged.experts.get_parameter(spec.raw[0]).add_(weight * delta)
    x = torch.randn(4, 6)
    assert relative(peft.PeftModel.from_pretrained(Mixture(), tmp_path / "out")(x), merged(x)) < TOLERANCE


# ---------------------------------------------------------------------------------------------------------- the command


@pytest.fixture(name="two")
def two_fixture(tmp_path):
    """Directories of two small adapters."""
    configs = {
        name: dict(r=2, lora_alpha=4, target_modules=["up", "down"][:number])
        for name, number in (("first", 2), ("second", 1))
    }
    return stock_net(Net, configs, tmp_path)[1]


def words(directories, output, *more, weights=(1, -0.5)):
    given = [
        word for d, w in zip(directories, weights, strict=True) for word in ("--adapter", str(d), "--weight", str(w))
    ]
    return ["combine", *given, "--output", str(output), "--quiet", *more]


def test_the_command_prints_a_table(two, tmp_path, capsys):
    assert cli.main(words(two, tmp_path / "out", "--how", "dare_ties", "--density", "0.5", "--seed", "7")) == 0
    told = capsys.readouterr().out.splitlines()
    assert told[0].split() == ["layer", "adapters", "rank", "|weighted", "sum|", "|combination|", "|difference|"]
    assert [line.split()[:3] for line in told[2:4]] == [["down", "1", "2"], ["up", "2", "2"]]
    assert len({len(line) for line in told[:4]}) == 1
    how = Combination(how="dare_ties", density=0.5, seed=7)
    combine(two, [1, -0.5], tmp_path / "again", how, quiet=True)
    first, again = (load_file(tmp_path / name / checkpoint.WEIGHTS) for name in ("out", "again"))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert cli.main(words(two, tmp_path / "svd")) == 0
    assert "off the weighted sum it is by" in capsys.readouterr().out


@pytest.mark.parametrize("case", ["exists", "weights", "density", "ranks", "shapes", "nan", "dora", "missing", "tied"])
def test_bad_input_is_a_sentence_and_nothing_is_written(case, two, tmp_path, capsys):
    first, second = two
    out, more, message = tmp_path / "out", (), ""
    file, weights = second / checkpoint.WEIGHTS, (1, -0.5)
    if case == "exists":
        out, message = first, "exists; choose another --output"
    elif case == "weights":
        weights, message = (1, "nan"), "weights: have a nan, expected finite numbers"
    elif case == "density":
        more, message = ("--how", "ties"), "density: is None, which 'ties' needs"
    elif case == "ranks":
        stock_net(Net, {"second": dict(r=3, target_modules=["up"])}, tmp_path)
        more, message = ("--how", "linear"), "up: its ranks are [2, 3], and 'linear' needs equal ones"
    elif case == "shapes":
        save_file({n: torch.ones(5, 2) if "lora_B" in n else p for n, p in load_file(file).items()}, file)
        message = "up: is ('linear', 12, 20) to one adapter and ('linear', 12, 5) to another"
    elif case == "nan":
        save_file({n: p / 0 for n, p in load_file(file).items()}, file)
        message = "is not finite; use a whole adapter"
    elif case == "dora":
        stock_net(Net, {"second": dict(r=2, target_modules=["up"], use_dora=True)}, tmp_path)
        message = f"{second}: use_dora is True: it has no weighted sum"
    elif case == "missing":
        second, message = tmp_path / "none", "no such directory"
    elif case == "tied":
        for directory in two:
            config = checkpoint.read_json(directory / checkpoint.CONFIG) | {"ensure_weight_tying": True}
            checkpoint.write_json(directory / checkpoint.CONFIG, config)
        message = "no file tells which layers are tied"
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    assert cli.main(words([first, second], out, *more, weights=weights)) == cli.BAD_INPUT
    assert message in capsys.readouterr().err
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


# ---------------------------------------------------------------------------------------------------------- on a model


@pytest.mark.parametrize("net", (Net, Mixture))
def test_every_kind_of_layer_is_combined_on_a_model(net, tmp_path):
    """Convolutions, embeddings, raw parameters: as the files, bit for bit."""
    configs = NETS.get(net) or {
        name: dict(r=2, lora_alpha=alpha, target_modules=[], target_parameters=parameters)
        for name, alpha, parameters in (("first", 4, BOTH), ("second", 2, BOTH[1:]), ("third", 3, BOTH[:1]))
    }
    model = None
    for name, options in configs.items():
        config = adapters.peft.LoraConfig(init_lora_weights=False, **options)
        model = model or adapters.peft.get_peft_model(net(), config, name)
        model.add_adapter(name, config) if name not in model.peft_config else None
    model.save_pretrained(tmp_path)
    for name in ("cat", "dare_ties_svd", "ties"):
        density = 0.6 if algebra.METHODS[name].prune else None
        model.add_weighted_adapter([*configs], WEIGHTS, name, name, density=density, seed=3)
        how = Combination(how=name, density=density, seed=3)
        combine([tmp_path / n for n in configs], WEIGHTS, tmp_path / name, how, quiet=True)
        found = adapters.peft.get_peft_model_state_dict(model, adapter_name=name)
        theirs = load_file(tmp_path / name / checkpoint.WEIGHTS)
        assert found.keys() == theirs.keys() and all(torch.equal(found[key], theirs[key]) for key in theirs)


@pytest.fixture(scope="module")
def stored(small_models, tmp_path_factory):
    """Directory of adapters by stock PEFT for the small Llama: name -> its own directory."""
    place, model = tmp_path_factory.mktemp("combined"), stock(small_models["llama"])
    configs = {
        "default": dict(r=3, lora_alpha=12, target_modules=["q_proj", "v_proj", "down_proj", "embed_tokens"]),
        "b": dict(r=3, lora_alpha=3, target_modules=["q_proj", "k_proj", "gate_proj", "down_proj"]),
        "c-d": dict(r=2, lora_alpha=8, target_modules=["q_proj", "o_proj"], use_rslora=True),
    }
    for number, (name, options) in enumerate(configs.items()):
        torch.manual_seed(number)
        config = peft.LoraConfig(init_lora_weights=False, task_type="CAUSAL_LM", **options)
        model = peft.get_peft_model(model, config)
        model.save_pretrained(place / name, save_embedding_layers=False)
        model = model.unload()
    return {name: str(place / name) for name in configs}


def loaded(module, model, stored):
    """A model with the adapters."""
    for number, (name, directory) in enumerate(stored.items()):
        model = module.PeftModel.from_pretrained(model, directory) if number == 0 else model
        model.load_adapter(directory, name) if number else None
    return model


def combinations():
    """Name -> arguments of `add_weighted_adapter`, a set for every type."""
    some = {}
    for name, method in algebra.METHODS.items():
        names = ["default", "b"] if method.of == algebra.FACTORS else ["default", "b", "c-d"]
        density = {"density": 0.6} if method.prune else {}
        some[name] = (names, [0.25, -1.0, 0.5][: len(names)], name, dict(density))
    return some


SOME = (
    "svd",
    "cat",
    "ties",
    "dare_linear",
    "dare_ties_svd",
)  # of all of the rules: what is gathered, drawn, factorised


def on_model(mesh, directory, stored, form, types):
    """What `add_weighted_adapter` makes on our model: canonical tensors of each, logits with some of them."""
    options = {"apart": {}, "fused": {"fuse_qkv": True, "fuse_gate_up": True, "sequence_parallel": True}}[form]
    model = loaded(adapters.peft, models.load(directory, mesh=mesh, gather_logits=True, **options), stored)
    states, logits = {}, {}
    with torch.no_grad():
        for name in types:
            names, weights, how, more = combinations()[name]
            model.add_weighted_adapter(names, weights, f"new {name}", how, **more)
            states[name] = adapters.peft.get_peft_model_state_dict(model, adapter_name=f"new {name}")
        for name in ("svd", "ties"):
            model.set_adapter(f"new {name}")
            logits[name] = model(ids_of()).logits
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trained and all("lora_" in name for name in trained)
    return states, logits


@pytest.fixture(scope="module")
def files(stored, tmp_path_factory):
    """Type -> the directory of the combination of files."""
    place = tmp_path_factory.mktemp("of files")
    for name, (names, weights, how, more) in combinations().items():
        combine([Path(stored[n]) for n in names], weights, place / name, Combination(how=how, **more), quiet=True)
    return place


@pytest.mark.parametrize("form", ("apart", "fused"))
def test_a_combination_on_a_model_is_that_of_the_files(form, small_models, stored, files):
    """Bit for bit: alone, and on two processes under sequence parallelism. And it computes what PEFT's does."""
    model = loaded(peft, stock(small_models["llama"]), stored)
    expected = {}
    with torch.no_grad():
        for name in ("svd", "ties"):
            names, weights, how, more = combinations()[name]
            model.add_weighted_adapter(names, weights, name, how, **more)
            model.set_adapter(name)
            expected[name] = model(ids_of()).logits
    if form == "apart":
        ran = [on_model(None, small_models["llama"], stored, form, list(algebra.METHODS))]
    else:
        ran = pool(2).run(on_model, small_models["llama"], stored, form, SOME)
    for states, logits in ran:
        for name, state in states.items():
            theirs = load_file(files / name / checkpoint.WEIGHTS)
            assert state.keys() == theirs.keys()
            assert all(torch.equal(state[key], theirs[key]) for key in theirs), name
        assert all(relative(logits[name], expected[name]) < TOLERANCE for name in expected)


def test_a_combination_that_fails_changes_nothing(small_models, stored):
    model = loaded(adapters.peft, models.load(small_models["llama"], gather_logits=True), stored)
    before = model(ids_of()).logits
    bad = {
        r"q_proj: its ranks are \[3, 2\]": ((["default", "c-d"], [1, 1], "new", "linear"), SpecError),
        "adapter 'e': there is none": ((["default", "e"], [1, 1], "new"), TargetError),
        "found 1 weights for": ((["default", "b"], [1], "new"), SpecError),
        "'b': is a name that is taken": ((["default", "b"], [1, 1], "b"), TargetError),
        "how: is 'sum', expected one of": ((["default", "b"], [1, 1], "new", "sum"), SpecError),
    }
    for message, (args, error) in bad.items():
        with pytest.raises(error, match=message):
            model.add_weighted_adapter(*args)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.fill_(torch.nan) if "lora_" in name else None
    with pytest.raises(TargetError, match="is not finite; leave out the damaged one"):
        model.add_weighted_adapter(["default", "b"], [1, 1], "new", "cat")
    assert list(model.peft_config) == list(stored) and model.active_adapter == "default"
    model.set_adapter("b")
    assert before.isfinite().all() and model(ids_of()).logits.isfinite().all()


def test_a_combination_has_the_scales_that_its_adapters_have_now(small_models, stored):
    """As in PEFT; and of one adapter, what is asked for is done, where PEFT takes its factors whatever is asked."""
    found = []
    for module, model in ((peft, stock(small_models["llama"])), (adapters.peft, models.load(small_models["llama"]))):
        model = loaded(module, model, stored)
        layers = [m for m in model.modules() if hasattr(m, "set_scale")] if module is peft else [model.base_model]
        for layer in layers:
            layer.set_scale("b", 3.0)
        model.add_weighted_adapter(["default", "b"], [1.0, -0.5], "both", "svd", svd_rank=6)
        model.set_adapter("both")
        with torch.no_grad():
            found.append(model(ids_of()).logits)
    assert relative(found[1], found[0]) < TOLERANCE
    model.add_weighted_adapter(["default"], [1.0], "less", svd_rank=1)
    assert {layer.spec.rank for layer in model.base_model.layers("less").values()} == {1}


def test_tied_layers_stay_tied(small_models):
    """Which no file tells of; on a model, the one that holds the factors is combined, and the other follows."""
    config = adapters.peft.LoraConfig(
        r=2, target_modules=["embed_tokens", "q_proj"], ensure_weight_tying=True, init_lora_weights=False
    )
    model = adapters.peft.get_peft_model(models.load(small_models["qwen3"], gather_logits=True), config, "first")
    model.add_adapter("second", config)
    model.add_weighted_adapter(["first", "second"], [1.0, -0.5], "both", "cat")
    states = [adapters.peft.get_peft_model_state_dict(model, adapter_name=n) for n in ("first", "second", "both")]
    down, up = (f"base_model.model.model.embed_tokens.lora_embedding_{x}" for x in "AB")
    exact = states[0][up] @ states[0][down] - 0.5 * states[1][up] @ states[1][down]
    assert relative(states[2][up] @ states[2][down], 4 * exact) < TOLERANCE  # the scaling of each is 8 / 2
    head = [states[2][f"base_model.model.lm_head.lora_{x}.weight"] for x in "AB"]
    assert torch.equal(head[0], states[2][up].T) and torch.equal(head[1], states[2][down].T)
