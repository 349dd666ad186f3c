"""Is a merged model the model with its adapters, rounded once, and does it take no memory to make one?"""

import dataclasses
import itertools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import peft
import pytest
import torch
from jobs import TOUCHES, job_models_fixture, small_models_fixture  # noqa: F401  (fixtures)
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from small_models import ids_of, relative
from transformers import AutoModelForCausalLM

from adapters import cli
from adapters import merge as merging
from adapters.merge import merge, rounded_once
from lora_fn import FileError, checkpoint

TOLERANCE = 1e-5
BITS = {torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float32: torch.int32}
PREFIX = "base_model.model."


# ---------------------------------------------------------------------------------------------------------- rounding


@pytest.fixture(autouse=True)
def two_threads():
    """`merge` computes in as many threads as torch has, and must give the same whichever of them is first."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def nearest(exact, dtype):
    """float64 to the nearest number of a dtype, of two the even one: the best of a guess and its neighbours."""
    bits = exact.to(dtype).view(BITS[dtype])
    near = torch.stack([bits - 1, bits, bits + 1])
    distance = (near.view(dtype).double() - exact).abs().nan_to_num(math.inf, math.inf)
    score = 2 * (distance == distance.amin(0)).int() + (near % 2 == 0).int()
    return near.gather(0, score.argmax(0)[None])[0].view(dtype)


def steps_between(a, b):
    """How many numbers of the dtype lie from a to b."""
    ordered = []
    for t in (a, b):
        bits = t.view(BITS[t.dtype]).long()
        ordered.append(torch.where(bits < 0, -(bits & torch.iinfo(BITS[t.dtype]).max), bits))
    return (ordered[0] - ordered[1]).abs()


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
def test_every_number_between_two_is_rounded_to_the_nearer(dtype):
    """Halfway between any two neighbours, and next to halfway, where two roundings would go wrong."""
    numbers = torch.arange(0, 0x7F80 if dtype == torch.bfloat16 else 0x7C00, dtype=torch.int16).view(dtype).double()
    halfway = (numbers[1:] + numbers[:-1]) / 2
    wrong = 0
    for exact in (numbers, halfway, halfway * (1 + 2**-40), halfway * (1 - 2**-40), halfway * (1 + 2**-24)):
        for sign in (1, -1):
            expected = nearest(sign * exact, dtype)
            assert torch.equal(rounded_once(sign * exact, dtype).view(torch.int16), expected.view(torch.int16))
            wrong += int((exact.mul(sign).to(dtype) != expected).sum())
    assert wrong > 1000  # what torch's own conversion gets wrong
    ends = torch.tensor([math.inf, -math.inf, math.nan, 1e300, -1e300, 1e-300, 0.0, -0.0], dtype=torch.float64)
    assert torch.equal(rounded_once(ends, dtype), ends.to(dtype)) or torch.isnan(rounded_once(ends, dtype)[2])
    assert torch.isinf(rounded_once(ends, dtype)[[0, 1, 3, 4]]).all()


def made(place, tensors, *, config=(), metadata=None):
    """A model directory of any tensors."""
    place.mkdir(parents=True)
    save_file(tensors, place / checkpoint.MODEL, metadata=metadata)
    (place / "config.json").write_text(json.dumps({"tie_word_embeddings": False} | dict(config)))
    return place


def adapter_of(place, factors, *, alpha=4, config=(), **tensors):
    """A PEFT directory of {path: (A, B)}."""
    state = dict(tensors)
    for path, (a, b) in factors.items():
        state |= {f"{PREFIX}{path}.lora_A.weight": a, f"{PREFIX}{path}.lora_B.weight": b}
    rank = len(next(iter(factors.values()))[0])
    told = {"peft_type": "LORA", "r": rank, "lora_alpha": alpha, "target_modules": sorted(factors)}
    checkpoint.save_adapter(place, told | dict(config), state)
    return place


LAYERS = {"layers.0.up": (1031, 768), "layers.1.down": (512, 2000)}


def random_factors(rank, *, seed, scale=0.05):
    torch.manual_seed(seed)
    return {path: (scale * torch.randn(rank, i), scale * torch.randn(o, rank)) for path, (o, i) in LAYERS.items()}


def random_weights(dtype):
    torch.manual_seed(0)
    weights = {f"{path}.weight": (0.02 * torch.randn(shape)).to(dtype) for path, shape in LAYERS.items()}
    return weights | {"norm.weight": torch.randn(77).to(dtype), "ids": torch.arange(5)}


@pytest.mark.parametrize("scale", (0.05, 0.005))
@pytest.mark.parametrize("dtype", list(BITS), ids=str)
def test_a_merge_is_a_float64_merge_rounded_once(dtype, scale, tmp_path):
    weights, factors = random_weights(dtype), random_factors(8, seed=1, scale=scale)
    model, adapter = made(tmp_path / "model", weights), adapter_of(tmp_path / "adapter", factors)
    assert merge(model, [adapter], tmp_path / "merged", quiet=True).layers == 2
    after, total, differing = load_file(tmp_path / "merged" / checkpoint.MODEL), 0, 0
    for path, (a, b) in factors.items():
        exact = weights[f"{path}.weight"].double() + b.double() @ a.double() * 0.5
        steps = steps_between(after[f"{path}.weight"], nearest(exact, dtype))
        assert steps.max() <= 1
        total, differing = total + steps.numel(), differing + int((steps > 0).sum())
        assert not torch.equal(after[f"{path}.weight"], weights[f"{path}.weight"])
    assert total > 1.5e6 and differing <= 1e-5 * total
    assert torch.equal(after["norm.weight"], weights["norm.weight"]) and torch.equal(after["ids"], weights["ids"])


def test_several_adapters_add_up_before_the_one_rounding(tmp_path):
    weights = random_weights(torch.bfloat16)
    model = made(tmp_path / "model", weights)
    first, second = random_factors(8, seed=1), random_factors(3, seed=2)
    del second["layers.1.down"]
    places = [
        adapter_of(tmp_path / "first", first, alpha=2),
        adapter_of(tmp_path / "second", second, alpha=6, config={"use_rslora": True}),
    ]
    assert merge(model, places, tmp_path / "merged", quiet=True).layers == 2
    after = load_file(tmp_path / "merged" / checkpoint.MODEL)
    for path in LAYERS:
        exact = weights[f"{path}.weight"].double()
        for of, scaling in ((first, 0.25), (second, 6 / math.sqrt(3))):
            if path in of:
                exact += scaling * (of[path][1].double() @ of[path][0].double())
        steps = steps_between(after[f"{path}.weight"], nearest(exact, torch.bfloat16))
        assert steps.max() <= 1 and (steps > 0).sum() <= 1e-5 * steps.numel()


# -------------------------------------------------------------------------------------------------- PEFT is the oracle


def tuned_by_peft(directory, place, *, seed=1, **config):
    """An adapter of stock PEFT, random in both factors."""
    torch.manual_seed(seed)
    config = {"r": 3, "lora_alpha": 2, "init_lora_weights": False} | config
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(directory), peft.LoraConfig(**config))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name and name.endswith("bias"):
                p.normal_()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*lora_B.bias")  # which peft 0.21 takes for a damaged factor
        model.save_pretrained(place)
    return place


ADAPTERS = {
    "all linears": ("llama", {"target_modules": "all-linear", "use_rslora": True}),
    "embeddings": ("llama-8-heads", {"target_modules": ["embed_tokens", "lm_head", "v_proj"]}),
    "lora_bias": ("llama", {"target_modules": ["q_proj", "o_proj"], "lora_bias": True}),
    "patterns": (
        "qwen3",
        {"target_modules": "all-linear", "rank_pattern": {"q_proj": 5}, "alpha_pattern": {r"layers\.1\..*": 7}},
    ),
    "one layer": ("granite", {"target_modules": ["down_proj"], "layers_to_transform": [1]}),
}


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`:UserWarning")
@pytest.mark.parametrize("case", ADAPTERS)
def test_a_merged_model_has_the_logits_of_peft(case, small_models, tmp_path):
    name, config = ADAPTERS[case]
    model, adapter = small_models[name], tuned_by_peft(small_models[name], tmp_path / "adapter", **config)
    merge(Path(model), [adapter], tmp_path / "merged", quiet=True)
    stock = AutoModelForCausalLM.from_pretrained(model).eval()
    plain = stock(ids_of()).logits
    theirs = peft.PeftModel.from_pretrained(stock, adapter).merge_and_unload().eval()(ids_of()).logits
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()(ids_of()).logits
    assert relative(ours, theirs) < TOLERANCE and relative(theirs, plain) > 1e-2


def test_several_merged_adapters_have_the_logits_of_peft(small_models, tmp_path):
    model = small_models["granite"]
    first = tuned_by_peft(model, tmp_path / "first", target_modules="all-linear")
    second = tuned_by_peft(model, tmp_path / "second", seed=2, r=5, target_modules=["q_proj", "up_proj"])
    merge(Path(model), [first, second], tmp_path / "merged", quiet=True)
    theirs = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model), first, adapter_name="first")
    one = theirs.eval()(ids_of()).logits
    theirs.load_adapter(second, "second")
    theirs.base_model.set_adapter(["first", "second"])
    both = theirs.merge_and_unload().eval()(ids_of()).logits
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()(ids_of()).logits
    assert relative(ours, both) < TOLERANCE and relative(one, both) > 1e-3


# ------------------------------------------------------------------------------------------------- what stays as it is


def raw(file, name):
    """The bytes of a tensor, found by stock safetensors' reader of the header."""
    content = file.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    begin, end = json.loads(content[8:start])[name]["data_offsets"]
    return content[start + begin : start + end]


def test_what_is_not_adapted_is_the_same_bytes(small_models, tmp_path):
    model = Path(small_models["llama"])
    adapter = tuned_by_peft(model, tmp_path / "adapter", target_modules=["q_proj"])
    (tmp_path / "model").mkdir()
    for file in model.iterdir():
        (tmp_path / "model" / file.name).write_bytes(file.read_bytes())
    strangers = ("tokenizer.json", "chat_template.jinja", "pytorch_model.bin", "pytorch_model.bin.index.json", "x.gguf")
    for name in strangers:
        (tmp_path / "model" / name).write_text("text")
    (tmp_path / "model" / "sub").mkdir()
    merge(tmp_path / "model", [adapter], tmp_path / "merged", quiet=True)
    kept = {p.name for p in model.iterdir()} | {"tokenizer.json", "chat_template.jinja"}
    assert {p.name for p in (tmp_path / "merged").iterdir()} == kept
    files = sorted(model.glob("*.safetensors"))
    changed = 0
    assert len(files) > 3
    for file in files:
        other = tmp_path / "merged" / file.name
        assert other.stat().st_size == file.stat().st_size
        size = 8 + int.from_bytes(file.read_bytes()[:8], "little")
        assert other.read_bytes()[:size] == file.read_bytes()[:size]
        for name in load_file(file):
            same = raw(file, name) == raw(other, name)
            assert same != name.endswith("q_proj.weight")
            changed += not same
    assert changed == 2
    for name in kept - {file.name for file in files}:
        assert (tmp_path / "merged" / name).read_bytes() == (tmp_path / "model" / name).read_bytes()


def test_a_header_that_others_would_write_otherwise_is_kept(tmp_path):
    """Names in no order, data in another, spaces, text, and a tensor of four bits."""
    weight = torch.randn(4, 6)
    entries = {
        "z.weight": {"dtype": "F32", "shape": [4, 6], "data_offsets": [3, 99]},
        "__metadata__": {"é": "ü"},
        "a": {"dtype": "F4", "shape": [6], "data_offsets": [0, 3]},
        "m": {"dtype": "F32", "shape": [0], "data_offsets": [99, 99]},
        "b": {"dtype": "I8", "shape": [5], "data_offsets": [99, 104]},
    }
    text = (json.dumps(entries, indent=3, ensure_ascii=False) + "   ").encode()
    content = len(text).to_bytes(8, "little") + text + b"abc" + bytes(checkpoint.as_bytes(weight)) + b"vwxyz"
    model = made(tmp_path / "model", {"x": weight})
    (model / checkpoint.MODEL).write_bytes(content)
    a, b = torch.randn(2, 6), torch.randn(4, 2)
    merge(model, [adapter_of(tmp_path / "adapter", {"z": (a, b)})], tmp_path / "merged", quiet=True)
    after = (tmp_path / "merged" / checkpoint.MODEL).read_bytes()
    start = 8 + len(text) + 3
    assert after[:start] == content[:start] and after[start + 96 :] == b"vwxyz"
    found = torch.frombuffer(bytearray(after[start : start + 96]), dtype=torch.float32).view(4, 6)
    assert torch.allclose(found, weight + b @ a * 2, rtol=1e-6, atol=1e-6) and not torch.equal(found, weight)


# ------------------------------------------------------------------------------------------------------------- --dtype


@pytest.mark.parametrize("after", ("float32", "bfloat16", "float16"))
@pytest.mark.parametrize("before", (torch.float32, torch.bfloat16, torch.float16, torch.float64), ids=str)
def test_the_dtype_of_what_is_written(before, after, tmp_path):
    weights, factors = random_weights(before), random_factors(2, seed=1)
    del weights["layers.1.down.weight"], factors["layers.1.down"]
    weights["mask"] = torch.tensor([-math.inf, 0.0, 1.0]).to(before)
    model = made(tmp_path / "model", weights, config={"dtype": "x", "text_config": {"torch_dtype": "y", "z": 1}})
    adapter = adapter_of(tmp_path / "adapter", factors)
    merge(model, [adapter], tmp_path / "merged", dtype=after, quiet=True)
    found, dtype = load_file(tmp_path / "merged" / checkpoint.MODEL), getattr(torch, after)
    assert set(found) == set(weights) and torch.equal(found["ids"], weights["ids"])
    for name, weight in weights.items():
        if weight.dtype == before:
            path = name.removesuffix(".weight")
            a, b = factors.get(path, (torch.zeros(1, 1), torch.zeros(1, 1)))
            exact = weight.double() + (b.double() @ a.double() * 2 if path in factors else 0)
            assert found[name].dtype == dtype and found[name].shape == weight.shape
            steps = steps_between(
                found[name], nearest(exact.clamp(-1e30, 1e30), dtype) if name != "mask" else exact.to(dtype)
            )
            assert steps.max() <= 1 and (steps > 0).sum() <= 1e-5 * steps.numel()
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert config["dtype"] == config["text_config"]["torch_dtype"] == after and config["text_config"]["z"] == 1
    with safe_open(tmp_path / "merged" / checkpoint.MODEL, "pt") as opened:
        assert set(opened.keys()) == set(weights)


def test_the_dtype_of_a_sharded_model(small_models, tmp_path):
    model = Path(small_models["granite"])
    adapter = tuned_by_peft(model, tmp_path / "adapter", target_modules=["q_proj"])
    merge(model, [adapter], tmp_path / "merged", dtype="bfloat16", quiet=True)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="auto")
    assert {p.dtype for p in merged.parameters()} == {torch.bfloat16}
    before, after = (json.loads((d / checkpoint.INDEX).read_text()) for d in (model, tmp_path / "merged"))
    assert after["weight_map"] == before["weight_map"]
    assert after["metadata"] == before["metadata"] | {"total_size": before["metadata"]["total_size"] // 2}


def test_what_a_dtype_cannot_hold_is_refused(tmp_path):
    weights = {"a.weight": torch.ones(4, 6), "b.weight": torch.full((4, 6), 1e5)}
    model = made(tmp_path / "model", weights)
    adapter = adapter_of(tmp_path / "adapter", {"a": (torch.ones(2, 6), torch.ones(4, 2))})
    with pytest.raises(FileError, match=r"'b\.weight' would not be finite in torch\.float16; nothing was written"):
        merge(model, [adapter], tmp_path / "merged", dtype="float16", quiet=True)
    with pytest.raises(FileError, match="dtype 'int8'; choose one of float32"):
        merge(model, [adapter], tmp_path / "merged", dtype="int8", quiet=True)
    assert {p.name for p in tmp_path.iterdir()} == {"model", "adapter"}


# ------------------------------------------------------------------------------------------------------------- refusals


def of_ones(rank=2):
    return {"a": (torch.ones(rank, 6), torch.ones(4, rank))}


def test_weights_in_other_forms_are_refused(tmp_path):
    model = made(tmp_path / "model", {"a.weight": torch.ones(4, 6, dtype=torch.uint8)})
    with pytest.raises(FileError, match=r"'a\.weight' is U8, expected one of F16, BF16, F32, F64; dequantize it"):
        merge(model, [adapter_of(tmp_path / "adapter", of_ones())], tmp_path / "merged", quiet=True)


def test_one_bad_adapter_of_two_is_refused(tmp_path):
    model = made(tmp_path / "model", {"a.weight": torch.ones(4, 6)})
    good = adapter_of(tmp_path / "good", of_ones())
    bad = adapter_of(tmp_path / "bad", {"a": (torch.ones(2, 7), torch.ones(4, 2)), "b": of_ones()["a"]})
    with pytest.raises(FileError) as raised:
        merge(model, [good, bad], tmp_path / "merged", quiet=True)
    first, second = str(raised.value).splitlines()
    assert f"{bad} expects [4, 7]" in first and "has no 'b.weight'" in second


def test_a_base_weight_of_another_model_is_refused(tmp_path):
    weight = torch.randn(4, 6)
    model = made(tmp_path / "model", {"a.weight": weight})
    key = f"{PREFIX}a.base_layer.weight"
    own = adapter_of(tmp_path / "own", of_ones(), **{key: weight})
    other = adapter_of(tmp_path / "other", of_ones(), **{key: weight + 1})
    longer = adapter_of(tmp_path / "longer", of_ones(), **{key: torch.randn(5, 6)})
    assert merge(model, [own], tmp_path / "merged", quiet=True).layers == 1
    for adapter in (other, longer):
        with pytest.raises(FileError, match=r"carries a 'a\.weight' that is not this model's"):
            merge(model, [adapter], tmp_path / "out", quiet=True)


def test_a_place_that_cannot_be_written_is_a_sentence(tmp_path, monkeypatch):
    model = made(tmp_path / "model", {"a.weight": torch.ones(4, 6)})
    adapter = adapter_of(tmp_path / "adapter", of_ones())

    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(FileError, match=r"merged: cannot be written \(.*No space left"):
        merge(model, [adapter], tmp_path / "merged", quiet=True)
    assert {p.name for p in tmp_path.iterdir()} == {"model", "adapter"}


def test_a_kill_leaves_the_input_and_no_half_output(tmp_path):
    """SIGKILL at each step of a merge: the output is not there, or whole."""
    weights = {f"{x}.weight": torch.ones(4, 6) for x in "abc"}
    model = made(tmp_path / "model", weights)
    adapter = adapter_of(tmp_path / "adapter", of_ones())
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    for number in itertools.count():
        pid = os.fork()
        if pid == 0:
            kill_at(number, "merged")
            merge(model, [adapter], tmp_path / "merged", quiet=True)
            os._exit(0)
        survived = os.waitpid(pid, 0)[1] == 0
        assert {p: p.read_bytes() for p in before} == before
        if (tmp_path / "merged").exists():
            assert {p.name for p in (tmp_path / "merged").iterdir()} == {"config.json", checkpoint.MODEL}
            found = load_file(tmp_path / "merged" / checkpoint.MODEL)
            assert torch.equal(found["a.weight"], torch.full((4, 6), 5.0))
            shutil.rmtree(tmp_path / "merged")
        else:
            assert not survived
        if survived:
            break
    assert number > 6


def kill_at(number, where):
    """From now on, the process kills itself before its `number`-th touch of a file whose path holds `where`."""
    left = [number]

    def hook(event, arguments):
        if event in TOUCHES and any(where in str(argument) for argument in arguments):
            left[0] -= 1
            if left[0] < 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


# ------------------------------------------------------------------------------------------------------------- --verify


def test_verify_compares_logits(job_models, tmp_path, capsys):
    model = job_models["llama"]
    adapters = [
        tuned_by_peft(model, tmp_path / "first", target_modules=["q_proj", "o_proj"], lora_bias=True),
        tuned_by_peft(model, tmp_path / "second", seed=2, target_modules="all-linear"),
    ]
    done = merge(Path(model), adapters, tmp_path / "merged", verify="What is LoRA?", quiet=True)
    assert done.effect > 1e-2 and done.difference < TOLERANCE
    words = ["merge", "--model", model, "--output", str(tmp_path / "again"), "--quiet", "--verify", "What is LoRA?"]
    assert cli.main([*words, "--adapter", str(adapters[0]), "--adapter", str(adapters[1])]) == 0
    told = capsys.readouterr().out
    assert f"the adapters change them by {done.effect:.2g}, the merged model is {done.difference:.2g} off" in told
    assert (tmp_path / "again" / checkpoint.INDEX).is_file()


def test_verify_finds_a_wrong_merge(job_models, tmp_path, monkeypatch):
    """One that leaves the scaling out."""
    update = merging._update

    def wrong(changes):
        found, scaling = update(changes), changes[0].source.specs[changes[0].path].scaling
        products = [product._replace(right=product.right / scaling) for product in found.products]
        return dataclasses.replace(found, products=products)

    adapter = tuned_by_peft(job_models["llama"], tmp_path / "adapter", target_modules=["q_proj"])
    monkeypatch.setattr(merging, "_update", wrong)
    done = merge(Path(job_models["llama"]), [adapter], tmp_path / "merged", verify="What is LoRA?", quiet=True)
    assert done.difference > 1e-3


def test_what_cannot_be_verified_is_refused_before_anything_is_written(job_models, small_models, tmp_path, monkeypatch):
    adapter = tuned_by_peft(small_models["llama"], tmp_path / "adapter", target_modules=["q_proj"])
    with pytest.raises(FileError, match="has no tokenizer that transformers takes"):
        merge(Path(small_models["llama"]), [adapter], tmp_path / "merged", verify="x", quiet=True)
    with pytest.raises(FileError, match="makes no tokens of ''"):
        merge(Path(job_models["llama"]), [adapter], tmp_path / "merged", verify="", quiet=True)
    monkeypatch.setattr(merging, "_free_memory", lambda: 100_000)
    with pytest.raises(FileError, match=r"GB in fp32 and 0\.0 GB of memory are free; leave --verify out"):
        merge(Path(job_models["llama"]), [adapter], tmp_path / "merged", verify="x", quiet=True)
    assert {p.name for p in tmp_path.iterdir()} == {"adapter"}


# --------------------------------------------------------------------------------------------------------------- memory

MEASURE = """
import sys
from pathlib import Path
import tqdm
from adapters.merge import merge
def memory(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(key))
Path("/proc/self/clear_refs").write_text("5")
before = memory("VmRSS")
merge(Path(sys.argv[1]), [Path(sys.argv[2])], Path(sys.argv[3]), quiet=True)
print(memory("VmHWM") - before)
"""


def megabytes_of_a_merge(place, layers, shape):
    """MB above import, of a merge that adapts all of `layers` fp16 weights."""
    paths = [f"layers.{i}" for i in range(layers)]
    weights = {f"{path}.weight": torch.full(shape, 0.5, dtype=torch.float16) for path in paths}
    model = made(place / "model", weights)
    factors = {path: (torch.ones(4, shape[1]), torch.full((shape[0], 4), 0.01)) for path in paths}
    words = [str(model), str(adapter_of(place / "adapter", factors)), str(place / "merged")]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, *words], capture_output=True, text=True, env=environment, check=True
    )
    return float(done.stdout)


def test_memory_does_not_grow_with_the_model_or_its_tensors(tmp_path):
    small = megabytes_of_a_merge(tmp_path / "small", 2, (2048, 2048))  # 17 MB
    deep = megabytes_of_a_merge(tmp_path / "deep", 16, (2048, 2048))  # 134 MB
    large = megabytes_of_a_merge(tmp_path / "large", 1, (32768, 2048))  # 134 MB
    assert max(small, deep, large) < 80 and max(deep, large) < small + 15


def test_embeddings_have_the_vocabulary_of_their_adapter(tmp_path):
    """Their update is transposed, in blocks as well."""
    model = made(tmp_path / "model", {"embed.weight": torch.zeros(5000, 300)})
    a, b = torch.randn(2, 5000), torch.randn(300, 2)
    state = {f"{PREFIX}embed.lora_embedding_A": a, f"{PREFIX}embed.lora_embedding_B": b}
    checkpoint.save_adapter(
        tmp_path / "adapter", {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["embed"]}, state
    )
    assert len(list(merging.blocks((5000, 300)))) > 1
    merge(model, [tmp_path / "adapter"], tmp_path / "merged", quiet=True)
    found = load_file(tmp_path / "merged" / checkpoint.MODEL)["embed.weight"]
    assert torch.allclose(found, (b @ a).T * 2, rtol=1e-5, atol=1e-5)
