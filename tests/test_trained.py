"""Is what is trained beside factors trained as by PEFT? Biases, whole modules; stock PEFT is the oracle.

Outputs, gradients of every trainable parameter, files; at TP 1, 2, 4, sequence parallel or not, in both modes.
"""

import re
import shutil
from pathlib import Path

import jobs
import peft
import pytest
import torch
from jobs import job_models_fixture  # noqa: F401  (a fixture)
from pool import pool
from safetensors.torch import load_file, save_file
from small_models import ids_of, relative, small_models_fixture, stock, stock_class  # noqa: F401  (a fixture)

import adapters
import lora_fn
from adapters import bind, cli, models, runs, sharded
from adapters.merge import merge
from adapters.merged import merged_weights
from adapters.peft import NeuronPeftModel
from adapters.train import Job
from lora_fn import FileError, LoraSpec, TargetError, checkpoint, peft_format
from lora_fn.reshard import differing, gather

pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT's
TOLERANCE = 1e-5
SOME = ["q_proj", "down_proj"]

# Name -> model, options of peft.LoraConfig.
CASES = {
    "all biases": ("llama", dict(target_modules=SOME, bias="all")),
    "all biases of attentions and MLPs": ("llama-8-heads", dict(target_modules=["v_proj"], bias="all")),
    "biases of adapted layers": (
        "llama-8-heads",
        dict(target_modules=["up_proj", "down_proj"], bias="lora_only", lora_bias=True),
    ),
    "embeddings and norms": (
        "llama",
        dict(target_modules=SOME, modules_to_save=["lm_head", "embed_tokens", "norm", "k_proj"]),
    ),
    "norms of heads": ("qwen3", dict(target_modules=SOME, modules_to_save=["q_norm", "k_norm", "layers.0.mlp"])),
    "tokens": ("llama", dict(target_modules=SOME, trainable_token_indices=[1, 98, 50, 17])),
    "tokens of two": (
        "granite",
        dict(target_modules=SOME, trainable_token_indices={"embed_tokens": [7, 98, 0], "lm_head": [24, 7]}),
    ),
    "tokens of tied": ("qwen3", dict(target_modules=SOME, trainable_token_indices=[80, 2])),
    "tokens of tied, named twice": (
        "granite-tied",
        dict(
            target_modules=SOME,
            trainable_token_indices={"lm_head": [7, 30], "embed_tokens": [7, 30]},
            ensure_weight_tying=True,
        ),
    ),
    "tied whole": (
        "qwen3",
        dict(target_modules=SOME, modules_to_save=["lm_head"], ensure_weight_tying=True),
    ),
    "tied adapted": ("granite-tied", dict(target_modules=["embed_tokens", "q_proj"], ensure_weight_tying=True)),
    "layers repeated": (
        "llama",
        dict(target_modules=SOME, layer_replication=[[0, 2], [0, 1], [1, 2]], modules_to_save=["input_layernorm"]),
    ),
    "rows and blocks": ("granite", dict(target_modules="all-linear", modules_to_save=["o_proj", "1.mlp"])),
}


MERGED = [case for case in CASES if case != "layers repeated"]


def file_key(name):
    """The name in PEFT's file of a parameter that PEFT trains."""
    return re.sub(r"\.modules_to_save\.default|\.default", "", name)


def by_peft(directory, place, **options):
    """Stock PEFT: an adapter of random numbers, written to `place`, with its logits, loss and gradients."""
    torch.manual_seed(0)
    model = peft.get_peft_model(stock(directory), peft.LoraConfig(r=3, init_lora_weights=False, **options)).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn_like(p))
    model.save_pretrained(place)
    out = model(input_ids=ids_of(), labels=ids_of())
    out.loss.backward()
    found = {file_key(n): p.grad.contiguous() for n, p in model.named_parameters() if p.requires_grad}
    for one, other in (("A", "B"), ("B", "A")):  # PEFT's optimizer steps both, though they are the same numbers
        key = f"base_model.model.lm_head.lora_{one}.weight"
        if options.get("ensure_weight_tying") and key in found:
            found[f"base_model.model.model.embed_tokens.lora_embedding_{other}"] += found.pop(key).T
    save_file(found | {"logits": out.logits.detach().contiguous(), "loss": out.loss.detach()}, Path(place) / "oracle")


FUSED = dict(fuse_qkv=True, fuse_gate_up=True)
# Processes -> (sequence parallel, mode, form) of the model.
WAYS = {
    1: [(False, "summed", {}), (False, "summed", FUSED)],
    2: [(False, "summed", FUSED), (True, "summed", {}), (True, "deferred", FUSED)],
    4: [(False, "deferred", {}), (True, "summed", FUSED)],
}


def canonical(tree, model):
    """A tree of this process's tensors, as PEFT's file names them."""
    specs, layers = adapters.specs(model), bind.layers(model)
    whole = {path: gather(of, specs[path], index=layers[path].index) for path, of in tree.items()}
    return peft_format.to_state_dict(whole, specs)


def beside_peft(mesh, directory, place):
    """{(sequence parallel, mode, fused, what): error} on one process."""
    expected, errors = load_file(Path(place) / "oracle"), {}
    stored = load_file(Path(place) / "adapter_model.safetensors")
    for parallel, mode, form in WAYS[1 if mesh is None else mesh.size()]:
        case = (parallel, mode, bool(form))
        model = models.load(directory, mesh=mesh, sequence_parallel=parallel, gather_logits=True, **form)
        before = {name: p.clone() for name, p in model.named_parameters()}
        adapters.wrap(model, adapters.read_spec(place), gradients=mode)
        adapters.load(model, place)
        out = model(input_ids=ids_of(), labels=ids_of())
        errors[case, "logits"] = relative(out.logits, expected["logits"])
        errors[case, "loss"] = relative(out.loss, expected["loss"])
        out.loss.backward()
        grads = {path: {n: p.grad for n, p in of.items()} for path, of in adapters.factors(model).items()}
        specs, layers = adapters.specs(model), bind.layers(model)
        if mode == "deferred":
            grads = lora_fn.sync_gradients(grads, specs)
        norm = torch.stack([g.double().square().sum() for k, g in expected.items() if k[0] == "b"]).sum().sqrt()
        errors[case, "norm"] = relative(lora_fn.grad_norm(grads, specs), norm)
        errors[case, "replicas"] = float(
            any(differing(of, specs[path], index=layers[path].index) for path, of in grads.items())
        )
        found = canonical(grads, model)
        errors[case, "names"] = float(found.keys() != {key for key in expected if key[0] == "b"})
        errors |= {(case, key): relative(grad, expected[key]) for key, grad in found.items()}
        file = canonical({path: layer.stored() for path, layer in layers.items()}, model)
        missing = {key for key in stored if key not in file and not key.endswith("base_layer.weight")}
        exact = not missing and all(torch.equal(file[k], stored[k]) for k in file)
        errors[case, "bits"] = float(not exact)
        bind.detach(model)
        after = dict(model.named_parameters())
        same = after.keys() == before.keys() and all(torch.equal(before[n], after[n]) for n in before)
        errors[case, "base"] = float(not same)
    return errors


class Oracles(dict):
    """Name of a case -> (directory of the model, of the adapter), made when it is asked for."""

    def __init__(self, small_models, root):
        super().__init__()
        self.small_models, self.root = small_models, root

    def __missing__(self, name):
        model, options = CASES[name]
        self[name] = self.small_models[model], str(self.root / str(len(self)))
        by_peft(*self[name], **options)
        return self[name]


@pytest.fixture(scope="session", name="oracles")
def oracles_fixture(small_models, tmp_path_factory):
    return Oracles(small_models, tmp_path_factory.mktemp("trained"))


@pytest.mark.parametrize("size", (1, 2, 4))
@pytest.mark.parametrize("case", CASES)
def test_outputs_gradients_and_files_are_those_of_peft(case, size, oracles):
    directory, place = oracles[case]
    results = pool(size).run(beside_peft, directory, place) if size > 1 else [beside_peft(None, directory, place)]
    for errors in results:
        assert len(errors) > 20
        assert not {key: error for key, error in errors.items() if not error < TOLERANCE}


@pytest.mark.parametrize("case", CASES)
def test_peft_loads_ours(case, oracles, tmp_path):
    directory, place = oracles[case]
    model = adapters.wrap(models.load(directory, fuse_qkv=True), adapters.read_spec(place))
    adapters.load(model, place)
    adapters.save(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(stock(directory), tmp_path).eval()
    loaded = peft.utils.get_peft_model_state_dict(theirs)
    stored = load_file(tmp_path / "adapter_model.safetensors")
    known = load_file(Path(place) / "adapter_model.safetensors").keys()
    assert stored.keys() == {key for key in known if not key.endswith("base_layer.weight")} <= loaded.keys()
    assert all(torch.equal(loaded[k], stored[k]) for k in stored)
    assert relative(theirs(ids_of()).logits, load_file(Path(place) / "oracle")["logits"]) < TOLERANCE


@pytest.mark.parametrize("case", MERGED)
def test_merged_on_disk_as_by_peft(case, oracles, tmp_path):
    directory, place = map(Path, oracles[case])
    merge(directory, [place], tmp_path / "merged", quiet=True)
    merged = stock_class(directory.name).from_pretrained(tmp_path / "merged").eval()
    assert relative(merged(ids_of()).logits, load_file(place / "oracle")["logits"]) < TOLERANCE
    assert cli.main(["inspect", str(place)]) == 0


@pytest.mark.parametrize("case", MERGED)
def test_merged_in_memory_and_as_a_stream(case, oracles):
    """By PEFT's names: merged, un-merged, disabled; and the weights of the stock model, one after the other."""
    directory, place = oracles[case]
    base = models.load(directory, fuse_qkv=True, fuse_gate_up=True)
    before = {name: p.clone() for name, p in base.named_parameters()}
    plain, expected = base(ids_of()).logits, load_file(Path(place) / "oracle")["logits"]
    model = NeuronPeftModel.from_pretrained(base, place)
    assert relative(model(input_ids=ids_of()).logits, expected) < TOLERANCE
    whole = stock(directory)
    streamed = dict(merged_weights(model.get_base_model()))
    found = whole.load_state_dict(streamed, strict=False)
    assert not found.unexpected_keys and set(found.missing_keys) <= {"lm_head.weight"}
    assert relative(whole(ids_of()).logits, expected) < TOLERANCE
    with model.disable_adapter():
        assert torch.equal(model(input_ids=ids_of()).logits, plain)
    model.merge_adapter()
    assert relative(model(input_ids=ids_of()).logits, expected) < TOLERANCE
    model.unmerge_adapter()
    assert relative(model(input_ids=ids_of()).logits, expected) < TOLERANCE
    unloaded = model.merge_and_unload()
    assert relative(unloaded(ids_of()).logits, expected) < TOLERANCE
    assert dict(unloaded.named_parameters()).keys() == before.keys()


TOLD = {
    "rows": (
        dict(trainable_token_indices=(3, 7)),
        dict(trainable_token_indices=(5, 9)),
        "made with trainable_token_ind",
    ),
    "an aLoRA": (dict(alora_invocation_tokens=(4,)), {}, r"alora_invocation_tokens \(4,\), the model has None"),
    "another aLoRA": (dict(alora_invocation_tokens=(4,)), dict(alora_invocation_tokens=(5,)), "the model has"),
}


@pytest.mark.parametrize("case", TOLD)
def test_tokens_that_no_tensor_tells_of_are_those_of_the_file(case, small_models, tmp_path):
    made, mine, sentence = TOLD[case]
    common = dict(rank=2, target_modules=("q_proj",))
    adapters.save(adapters.wrap(models.load(small_models["llama"]), LoraSpec(**common, **made)), tmp_path)
    model = adapters.wrap(models.load(small_models["llama"]), LoraSpec(**common, **mine))
    before = {name: p.clone() for name, p in model.named_parameters()}
    with pytest.raises(FileError, match=sentence):
        adapters.load(model, tmp_path)
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())


def test_our_own_file_of_a_tied_output_embedding_is_merged_on_disk(small_models, tmp_path):
    """Its config names lm_head, as was asked for, and it holds the input embedding too."""
    directory = small_models["qwen3"]
    spec = LoraSpec(rank=2, target_modules=("q_proj",), modules_to_save=("lm_head",), ensure_weight_tying=True)
    model = adapters.wrap(models.load(directory), spec)
    with torch.no_grad():
        for p in (p for p in model.parameters() if p.requires_grad):
            p.add_(torch.randn_like(p) / 20)
    adapters.save(model, tmp_path / "adapter")
    merge(Path(directory), [tmp_path / "adapter"], tmp_path / "merged", quiet=True)
    merged = stock_class("qwen3").from_pretrained(tmp_path / "merged").eval()
    assert relative(merged(ids_of()).logits, model(ids_of()).logits) < TOLERANCE


def test_layers_that_share_a_weight_are_not_merged(oracles, tmp_path):
    directory, place = oracles["layers repeated"]
    with pytest.raises(FileError, match="whose layers are repeated"):
        merge(Path(directory), [Path(place)], tmp_path / "merged", quiet=True)
    model = adapters.wrap(models.load(directory), adapters.read_spec(place))
    with pytest.raises(TargetError, match="layers are repeated"):
        next(merged_weights(model))
    sharded.shard(Path(place), tmp_path / "parts", tp=2, pp=2, model=Path(directory), quiet=True)
    sharded.consolidate(tmp_path / "parts", tmp_path / "again", quiet=True)
    again, known = (load_file(Path(p) / checkpoint.WEIGHTS) for p in (tmp_path / "again", place))
    assert again.keys() == known.keys() and all(torch.equal(again[name], known[name]) for name in known)


RANGES = {
    "no such layer": (((0, 3),), "[0, 3] is no range of the 2 layers of model.layers"),
    "an empty one": (((1, 1),), "[1, 1] is no range of the 2 layers of model.layers"),
}


@pytest.mark.parametrize("case", RANGES)
def test_layers_that_are_not_there_are_not_repeated(case, small_models):
    ranges, message = RANGES[case]
    model = models.load(small_models["llama"])
    before = dict(model.named_modules())
    for options in (
        dict(layer_replication=ranges),
        dict(layer_replication=((0, 2), (0, 1)), exclude_modules=("none",)),
    ):
        with pytest.raises(TargetError, match=re.escape(message) if "exclude_modules" not in options else "none"):
            adapters.wrap(model, LoraSpec(**options))
        assert dict(model.named_modules()) == before and model.config.num_hidden_layers == 2


# A run, from its checkpoints at one size of the axis to another, to one PEFT directory.

RUN = ("llama", dict(modules_to_save=("lm_head", "layers.1.input_layernorm", "0.mlp"), bias="lora_only"))


@pytest.fixture(scope="module")
def run_at_tp_2(job_models, tmp_path_factory):
    place = tmp_path_factory.mktemp("runs")
    job = Job(
        model=job_models[RUN[0]],
        data=(jobs.write_lines(place / "data.jsonl", jobs.uneven(18)),),
        output=str(place / "tp-2"),
        lora=LoraSpec(rank=4, target_modules=("q_proj", "up_proj"), **RUN[1]),
        tp=2,
        sequence_parallel=True,
        fuse_qkv=True,
        sequence_length=40,
        batch_size=4,
        steps=4,
        learning_rate=1e-2,
        warmup=2,
        checkpoint_every=2,
    )
    jobs.run(job)
    return job


def test_a_run_goes_on_at_another_size(run_at_tp_2):
    job = jobs.elsewhere(run_at_tp_2, "tp-1", tp=1, sequence_parallel=False, fuse_qkv=False)
    shutil.copytree(run_at_tp_2.output, job.output)
    shutil.rmtree(Path(job.output) / runs.CHECKPOINTS / "step-000000004")
    for file in (checkpoint.CONFIG, checkpoint.WEIGHTS, runs.PLOT):
        (Path(job.output) / file).unlink()
    jobs.run(job, resume=True)
    losses = [torch.tensor(jobs.column(each, "loss")) for each in (job, run_at_tp_2)]
    assert relative(*losses) < TOLERANCE and losses[0][-1] < losses[0][0]
    found, known = jobs.adapter(job), jobs.adapter(run_at_tp_2)
    assert found.keys() == known.keys()
    assert max(relative(found[name], known[name]) for name in known if known[name].any()) < 1e-3  # as in test_sharded


def test_a_run_becomes_one_directory_and_parts_again(run_at_tp_2, tmp_path):
    last = runs.Run(Path(run_at_tp_2.output)).last()
    known = Path(run_at_tp_2.output) / checkpoint.WEIGHTS
    sharded.consolidate(last, tmp_path / "peft", quiet=True)
    sharded.shard(tmp_path / "peft", tmp_path / "parts", tp=4, pp=2, quiet=True)
    sharded.reshard(tmp_path / "parts", tmp_path / "other", to_tp=1, quiet=True)
    sharded.consolidate(tmp_path / "other", tmp_path / "again", quiet=True)
    for name in ("peft", "again"):
        assert (tmp_path / name / checkpoint.WEIGHTS).read_bytes() == known.read_bytes()
    peft.PeftModel.from_pretrained(stock(run_at_tp_2.model), tmp_path / "again")


class Odd(torch.nn.Module):
    """Layers, one with a running mean, and a parameter beside modules."""

    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.tensor([2.0]))
        self.inside = torch.nn.Linear(4, 4)

    def forward(self, x):
        return self.inside(x) * self.scale


def odd():
    torch.manual_seed(0)
    norm, body = torch.nn.BatchNorm1d(4), torch.nn.ModuleList([Odd(), torch.nn.LayerNorm(4), torch.nn.Linear(4, 3)])
    return torch.nn.ModuleDict({"norm": norm, "body": body})


REFUSED = {
    "no such module": (dict(modules_to_save=("heat",)), "'heat' is the end of no module's name; the nearest names"),
    "buffers": (dict(modules_to_save=("norm",)), "norm: is a BatchNorm1d with buffers"),
    "a list": (dict(modules_to_save=("body",)), "body: is a list of modules"),
    "nothing to adapt": (dict(modules_to_save=("body.2",)), "nothing is left to adapt"),
    "three times": (dict(modules_to_save=("inside",), bias="all"), "hold three times"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_trained_is_refused(case):
    options, message = REFUSED[case]
    model = odd()
    before = dict(model.named_modules())
    with pytest.raises(TargetError, match=re.escape(message)):
        adapters.wrap(model, LoraSpec(target_modules=("body.2",), **options))
    assert dict(model.named_modules()) == before


@pytest.mark.parametrize("bias", ("none", "all"))
def test_modules_of_other_kinds_are_trained_as_by_peft(bias):
    body = odd()["body"]
    options = dict(target_modules=["2"], modules_to_save=["0", "1"]) if bias == "none" else dict(target_modules=["2"])
    theirs = peft.get_peft_model(torch.nn.Sequential(*body), peft.LoraConfig(r=2, bias=bias, **options))
    spec = lora_fn.peft_format.from_config(theirs.peft_config["default"])
    ours = adapters.wrap(torch.nn.Sequential(*odd()["body"]), spec)
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    for p in bind.adapted_layers(ours).values():
        p.lora_A.data.copy_(theirs.base_model.model[2].lora_A["default"].weight)
    ours(x).square().sum().backward()
    theirs(x).square().sum().backward()
    expected = {file_key(n): p.grad for n, p in theirs.named_parameters() if p.requires_grad}
    grads = {path: {n: p.grad for n, p in of.items()} for path, of in adapters.factors(ours).items()}
    found = canonical(grads, ours)
    assert found.keys() == expected.keys() == peft.utils.get_peft_model_state_dict(theirs).keys()
    assert all(relative(found[k], expected[k]) < TOLERANCE for k in found if expected[k].any())


TOKENS_REFUSED = {
    "a token beyond": ("llama", dict(trainable_token_indices=[99]), "different ids of at least 0 and below 99"),
    "a token twice": ("llama", dict(trainable_token_indices=[5, 5]), "different ids of at least 0 and below 99"),
    "no module": ("llama", dict(trainable_token_indices={"embed_token": [5]}), "nearest names are embed_tokens"),
    "adapted too": ("llama", dict(trainable_token_indices=[5], target_modules=("embed_tokens",)), "with an adapter"),
    "whole too": ("llama", dict(trainable_token_indices=[5], modules_to_save=("embed_tokens",)), "choose one"),
    "a part": ("llama", dict(trainable_token_indices={"q_proj": [5]}), "one of several in a fused layer"),
    "tied, by itself": ("qwen3", dict(trainable_token_indices={"lm_head": [5]}), "name them for model.embed_tokens"),
    "tied, others": ("qwen3", dict(trainable_token_indices={"lm_head": [5], "embed_tokens": [6]}), "[5] and [6]"),
}


@pytest.mark.parametrize("case", TOKENS_REFUSED)
def test_tokens_that_cannot_be_trained_are_refused(case, small_models):
    name, options, message = TOKENS_REFUSED[case]
    model = models.load(small_models[name], fuse_qkv=True)
    before = dict(model.named_modules())
    with pytest.raises(TargetError, match=re.escape(message)):
        adapters.wrap(model, LoraSpec(**dict(target_modules=("v_proj",)) | options))
    assert dict(model.named_modules()) == before


def test_shared_weights_are_not_torn_apart(small_models):
    for options in (dict(modules_to_save=("lm_head",)), dict(target_modules=("embed_tokens",))):
        spec = LoraSpec(**dict(target_modules=("q_proj",)) | options)
        with pytest.raises(TargetError, match="shares its weight with"):
            adapters.wrap(models.load(small_models["qwen3"]), spec)
