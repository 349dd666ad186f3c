"""Does an adapter lose a bit on its way into parts, to another mesh, and back? And what if the parts are damaged?"""

import errno
import itertools
import os
import random
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import foreign_files
import jobs
import peft
import pytest
import torch
from jobs import Doom, Processes, job_models_fixture, small_models_fixture  # noqa: F401  (fixtures)
from safetensors.torch import load_file, save_file
from small_models import relative, stock

import adapters
from adapters import bind, cli, models, runs, sharded
from adapters.train import Job
from lora_fn import Axis, FileError, LoraFnError, LoraSpec, SpecError, checkpoint, manifest, peft_format

# What PEFT says of its own choices: it saves the base weights of embeddings, and takes lora_B's bias for a cut tensor.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`"),
    pytest.mark.filterwarnings("ignore:.*LoRA tensor.* have invalid shape"),
]
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
NUM_CORRUPTIONS = 200
TOLERANCE = 1e-5

# name -> (model, what differs from PEFT's defaults); 8 query heads and, but for one model, 4 key-value heads
ADAPTERS = {
    "all linears": ("llama", dict(r=4, lora_alpha=8, target_modules=LINEARS)),
    "parts of fused layers": ("qwen3", dict(r=3, target_modules=["k_proj", "gate_proj"])),
    "embeddings": ("granite", dict(r=2, target_modules=["embed_tokens", "lm_head", "v_proj"])),
    "bias": ("llama", dict(r=2, lora_bias=True, target_modules=["q_proj", "v_proj", "o_proj"])),
    "8 heads": ("llama-8-heads", dict(r=2, target_modules=["q_proj", "down_proj", "up_proj"])),
    "patterns": ("llama", dict(r=4, rank_pattern={"q_proj": 7, "1.mlp.up_proj": 1}, target_modules=LINEARS)),
    "bf16": ("llama-bf16", dict(r=4, target_modules=["o_proj", "v_proj"])),
}


@pytest.fixture(scope="module")
def adapter_of(small_models, tmp_path_factory):
    """Name -> directory of an adapter made by stock PEFT, random in both factors, which names its model."""
    place = tmp_path_factory.mktemp("adapters")

    def made(name):
        directory = place / name.replace(" ", "-")
        if not directory.exists():
            model, options = ADAPTERS[name]
            torch.manual_seed(len(name))
            wrapped = peft.get_peft_model(stock(small_models[model]), peft.LoraConfig(**options))
            for parameter, p in wrapped.named_parameters():
                if ".lora_" in parameter:
                    torch.nn.init.normal_(p)
                    p.data = p.data.to(torch.bfloat16 if name == "bf16" else torch.float32)
            wrapped.save_pretrained(directory)
            config = checkpoint.read_json(directory / checkpoint.CONFIG)
            checkpoint.write_json(
                directory / checkpoint.CONFIG, config | {"base_model_name_or_path": small_models[model]}
            )
        return directory

    return made


def factors_of(directory):
    return {k: t for k, t in load_file(directory / checkpoint.WEIGHTS).items() if ".base_layer." not in k}


def contents(directory):
    return {path.name: path.read_bytes() for path in Path(directory).iterdir()}


def same(found, expected):
    return found.keys() == expected.keys() and all(
        found[k].dtype == t.dtype and torch.equal(found[k], t) for k, t in expected.items()
    )


# ---------------------------------------------------------------------------------------------------- there and back


@pytest.mark.parametrize("name", ADAPTERS)
def test_tp_8_to_peft_to_tp_4_to_peft_is_the_same_bytes(name, adapter_of, tmp_path):
    adapter = adapter_of(name)
    sharded.shard(adapter, tmp_path / "8", tp=8, pp=2, quiet=True)
    sharded.consolidate(tmp_path / "8", tmp_path / "peft-8", quiet=True)
    sharded.shard(tmp_path / "peft-8", tmp_path / "4", tp=4, quiet=True)
    sharded.consolidate(tmp_path / "4", tmp_path / "peft-4", quiet=True)
    assert contents(tmp_path / "peft-8") == contents(tmp_path / "peft-4")
    assert same(load_file(tmp_path / "peft-8" / checkpoint.WEIGHTS), factors_of(adapter))
    configs = [checkpoint.read_json(place / checkpoint.CONFIG) for place in (tmp_path / "peft-8", adapter)]
    assert configs[0] == configs[1]
    for step, (tp, pp) in enumerate([(4, 1), (1, 2), (2, 1)]):
        source = tmp_path / ("8" if step == 0 else f"again-{step - 1}")
        sharded.reshard(source, tmp_path / f"again-{step}", to_tp=tp, to_pp=pp, quiet=True)
        sharded.consolidate(tmp_path / f"again-{step}", tmp_path / f"peft-{step}-again", quiet=True)
        assert contents(tmp_path / f"peft-{step}-again") == contents(tmp_path / "peft-8")


@pytest.mark.parametrize("name", ["all linears", "embeddings", "bias"])
@pytest.mark.parametrize("tp", [2, 8])
def test_the_parts_are_what_the_processes_of_a_model_hold(name, tp, adapter_of, tmp_path):
    adapter = adapter_of(name)
    spec = adapters.read_spec(adapter)
    sharded.shard(adapter, tmp_path / "parts", tp=tp, quiet=True)
    with manifest.opened(tmp_path / "parts") as stored:
        parts = {path: stored.locals(manifest.FACTOR, path) for path in stored.paths(manifest.FACTOR)}
    for index in range(tp):
        model = models.load(spec.base_model_name_or_path, axis=Axis(size=tp, index=index))
        adapters.load(adapters.wrap(model, spec), adapter)
        held = adapters.factors(model)
        assert held.keys() == parts.keys()
        assert all(same(parts[path][index], held[path]) for path in held)


def test_stages_hold_the_layers_in_order(adapter_of, tmp_path):
    sharded.shard(adapter_of("embeddings"), tmp_path / "parts", tp=2, pp=2, quiet=True)
    first, last = manifest.read(tmp_path / "parts").stages
    assert set(first) == {"model.embed_tokens", "model.layers.0.self_attn.v_proj"}
    assert set(last) == {"lm_head", "model.layers.1.self_attn.v_proj"}
    assert len(list((tmp_path / "parts").iterdir())) == 5


def test_every_byte_is_read_once(adapter_of, tmp_path):
    sharded.shard(adapter_of("all linears"), tmp_path / "parts", tp=4, pp=2, quiet=True)
    with manifest.Checkpoint(tmp_path / "parts") as stored:
        for path in stored.paths(manifest.FACTOR):
            stored.canonical(manifest.FACTOR, path)
        stored.finish()
        assert stored.bytes_read == sum(file.size for file in stored.manifest.files.values())


def test_the_command_line(adapter_of, tmp_path, capsys):
    adapter, place = str(adapter_of("all linears")), str(tmp_path)
    run = [
        ["shard", adapter, f"{place}/a", "--tp", "2", "--pp", "2"],
        ["reshard", f"{place}/a", f"{place}/b", "--from-tp", "2", "--to-tp", "4", "--quiet"],
        ["consolidate", f"{place}/b", f"{place}/c"],
        ["inspect", f"{place}/b"],
    ]
    told = []
    for arguments in run:
        assert cli.main(arguments) == 0
        told.append(capsys.readouterr())
    assert "14 layers, tp 2, pp 2." in told[0].out and "14/14" in told[0].err and not told[1].err
    assert "a PEFT adapter of 14 layers" in told[2].out
    head, table, *_ = told[3].out.splitlines()
    assert "a sharded adapter, tp 4, pp 2, 14 layers" in head and "placement" in table
    [row] = [line.split() for line in told[3].out.splitlines() if "layers.1.mlp.down_proj" in line and "lora_A" in line]
    assert row[1:] == ["row", "lora_A", "[4,", "48]", "[4,", "12]", "Shard(dim=1)", "1", row[-1]]
    weight = factors_of(adapter_of("all linears"))["base_model.model.model.layers.1.mlp.down_proj.lora_A.weight"]
    assert float(row[-1]) == pytest.approx(float(weight.norm()), rel=1e-3)


WRITERS = {
    "optimum": (foreign_files.write_optimum, foreign_files.Case(tp=4, pp=2)),
    "nxd": (foreign_files.write_nxd, foreign_files.Case(tp=4, fuse_qkv=True, xser=True)),
}


@pytest.mark.parametrize("program", WRITERS)
def test_the_files_of_other_programs_become_a_peft_directory(program, tmp_path, capsys):
    write, case = WRITERS[program]
    root, specs, canonical = write(tmp_path / "theirs", case)
    command = ["consolidate", str(root), str(tmp_path / "peft"), "--quiet"]
    command += ["--model", str(root.parent / "model-config")] if program == "nxd" else []
    assert cli.main(command) == cli.BAD_INPUT
    assert "--allow-pickle" in capsys.readouterr().err and not (tmp_path / "peft").exists()
    assert cli.main([*command, "--allow-pickle"]) == 0
    found = load_file(tmp_path / "peft" / checkpoint.WEIGHTS)
    assert same(found, peft_format.to_state_dict(canonical, specs))
    config = peft.LoraConfig.from_pretrained(tmp_path / "peft")
    assert config.r == foreign_files.RANK and config.lora_alpha == foreign_files.ALPHA
    assert config.target_modules == set(case.targets) and config.lora_bias == case.lora_bias


def test_a_dtype_of_another_program_that_no_factor_has_is_a_sentence(tmp_path):
    root, _, _ = foreign_files.write_optimum(tmp_path / "theirs", foreign_files.Case(dtype=torch.float8_e5m2))
    with pytest.raises(FileError, match=r"lora_A' is torch\.float8_e5m2, expected one of"):
        sharded.consolidate(root, tmp_path / "peft", allow_pickle=True, quiet=True)
    assert not (tmp_path / "peft").exists()


# ------------------------------------------------------------------------------------------------------ what is refused


@pytest.fixture(scope="module")
def parts(adapter_of, tmp_path_factory):
    """An adapter at TP 2 in two stages."""
    place = tmp_path_factory.mktemp("parts") / "parts"
    sharded.shard(adapter_of("all linears"), place, tp=2, pp=2, quiet=True)
    return place


@pytest.fixture(scope="module")
def others(adapter_of, tmp_path_factory):
    """Another adapter of the same layers at TP 2 in two stages."""
    place = tmp_path_factory.mktemp("parts")
    shutil.copytree(adapter_of("all linears"), place / "adapter")
    tensors = {k: 2 * t for k, t in load_file(place / "adapter" / checkpoint.WEIGHTS).items()}
    save_file(tensors, place / "adapter" / checkpoint.WEIGHTS)
    sharded.shard(place / "adapter", place / "parts", tp=2, pp=2, quiet=True)
    return place / "parts"


def flip(file, offset, bit=0):
    content = bytearray(file.read_bytes())
    content[offset] ^= 1 << bit
    file.write_bytes(content)


def swap(a, b):
    content = a.read_bytes()
    a.write_bytes(b.read_bytes())
    b.write_bytes(content)


FILE = manifest.file_name(1, 0)
DAMAGES = {
    "a file is missing": (lambda at, other: (at / FILE).unlink(), f"{FILE}: no such file, though manifest.json"),
    "a file too many": (lambda at, other: shutil.copy(at / FILE, at / manifest.file_name(2, 0)), "no part of the"),
    "a note": (lambda at, other: (at / "note").touch(), "note: is no part of the checkpoint"),
    "cut off": (lambda at, other: os.truncate(at / FILE, 900), "has 900 bytes, manifest.json says"),
    "empty": (lambda at, other: os.truncate(at / FILE, 0), "has 0 bytes"),
    "longer": (lambda at, other: os.truncate(at / FILE, 1 << 20), "has 1048576 bytes"),
    "a directory": (lambda at, other: ((at / FILE).unlink(), (at / FILE).mkdir()), "manifest.json says"),
    "flipped": (lambda at, other: flip(at / FILE, -1), "its SHA-256 differs"),
    "two processes swapped": (
        lambda at, other: swap(at / FILE, at / manifest.file_name(0, 0)),
        "is of process tp 0 of 2, pp 0 of 2, manifest.json says process tp 1 of 2",
    ),
    "a file of another": (lambda at, other: shutil.copy(other / FILE, at / FILE), "its SHA-256 differs"),
    "the manifest of another": (
        lambda at, other: shutil.copy(other / manifest.NAME, at / manifest.NAME),
        "its SHA-256 differs",
    ),
    "no manifest": (lambda at, other: (at / manifest.NAME).unlink(), "has no manifest.json"),
    "an empty manifest": (lambda at, other: os.truncate(at / manifest.NAME, 0), "manifest.json: is not JSON"),
    "another format": (
        lambda at, other: checkpoint.write_json(
            at / manifest.NAME, checkpoint.read_json(at / manifest.NAME) | {"format": 3}
        ),
        "has format 3, expected 2",
    ),
    "a manifest by hand": (
        lambda at, other: checkpoint.write_json(
            at / manifest.NAME, checkpoint.read_json(at / manifest.NAME) | {"step": 7}
        ),
        "manifest.json: is not what was written",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_a_sentence(damage, parts, others, tmp_path, capsys):
    place = Path(shutil.copytree(parts, tmp_path / "parts"))
    do, sentence = DAMAGES[damage]
    do(place, others)
    for command in (
        ["consolidate", place, tmp_path / "output", "--quiet"],
        ["reshard", place, tmp_path / "output", "--to-tp", "4", "--quiet"],
        ["inspect", place],
    ):
        assert cli.main([str(word) for word in command]) == cli.BAD_INPUT
        told = capsys.readouterr()
        assert sentence in told.err and str(place) in told.err and "Traceback" not in told.err and not told.out
    assert not (tmp_path / "output").exists() and len(list(tmp_path.iterdir())) == 1


def a_flipped_bit(content, rng):
    at = rng.randrange(len(content))
    return content[:at] + bytes([content[at] ^ 1 << rng.randrange(8)]) + content[at + 1 :]


def a_flipped_bit_of_the_header(content, rng):
    return a_flipped_bit(content[:600], rng) + content[600:]


def zeros(content, rng):
    at = rng.randrange(len(content) - 64)
    return content[:at] + bytes(64) + content[at + 64 :]


def a_piece_twice(content, rng):
    at = rng.randrange(len(content))
    return content[:at] + content[at : at + rng.randrange(1, 99)] + content[at:]


def a_piece_less(content, rng):
    at = rng.randrange(len(content))
    return content[:at] + content[at + rng.randrange(1, 99) :]


def two_pieces_swapped(content, rng):
    half = len(content) // 2
    return content[half:] + content[:half]


CORRUPTIONS = (a_flipped_bit, a_flipped_bit_of_the_header, zeros, a_piece_twice, a_piece_less, two_pieces_swapped)


def test_random_corruptions_of_any_file_are_found(parts, tmp_path):
    rng, number = random.Random(4), 0
    place = Path(shutil.copytree(parts, tmp_path / "parts"))
    files = sorted(place.iterdir())
    while number < NUM_CORRUPTIONS:
        file = files[number % len(files)]
        content = file.read_bytes()
        damaged = rng.choice(CORRUPTIONS)(content, rng)
        if damaged == content:
            continue
        number += 1
        file.write_bytes(damaged)
        with pytest.raises(FileError, match="parts"):
            sharded.consolidate(place, tmp_path / "output", quiet=True)
        file.write_bytes(content)
    assert len(list(tmp_path.iterdir())) == 1
    assert sharded.consolidate(place, tmp_path / "output", quiet=True) == 14


def test_copies_that_differ_are_not_joined(parts, tmp_path):
    place = Path(shutil.copytree(parts, tmp_path / "parts"))
    before = manifest.read(place)
    [name] = [n for n in before.tensors(0) if n.endswith("0.mlp.up_proj.lora_A")]
    tensors = load_file(place / FILE)
    tensors[name][0, 0] += 1
    _, written = manifest.write_part(place, before, 1, 0, tensors)
    manifest.write(place, replace(before, files={**before.files, FILE: written}))
    with pytest.raises(FileError, match=r"factor of model\.layers\.0\.mlp\.up_proj: .*'lora_A' differ"):
        sharded.consolidate(place, tmp_path / "output", quiet=True)


def test_numbers_that_are_not_finite_are_not_joined(parts, tmp_path):
    """Their hashes are right, and the layers before were written already."""
    place = Path(shutil.copytree(parts, tmp_path / "parts"))
    before = manifest.read(place)
    name = max(name for name in before.tensors(1) if name.endswith("lora_B"))
    file = manifest.file_name(1, 1)
    tensors = load_file(place / file)
    for number in (torch.nan, torch.inf, -torch.inf):
        tensors[name][-1, -1] = number
        _, written = manifest.write_part(place, before, 1, 1, tensors)
        manifest.write(place, replace(before, files={**before.files, file: written}))
        with pytest.raises(FileError, match=r"output: tensor '.*\.1\..*lora_B.*' is not finite; nothing was written"):
            sharded.consolidate(place, tmp_path / "output", quiet=True)
        assert [path.name for path in tmp_path.iterdir()] == ["parts"]


@pytest.mark.parametrize("write", [0, 3, -1])
@pytest.mark.parametrize("command", ["shard", "consolidate", "reshard"])
def test_a_full_disk_is_a_sentence_and_leaves_nothing(command, write, adapter_of, parts, tmp_path, monkeypatch):
    source = adapter_of("bias") if command == "shard" else parts
    pwrite, num = os.pwrite, []

    def full(handle, content, offset):
        num.append(handle)
        if len(num) - 1 == last:
            raise OSError(errno.ENOSPC, "No space left on device")
        return pwrite(handle, content, offset)

    monkeypatch.setattr(os, "pwrite", full)
    last = -1
    COMMANDS[command](source, tmp_path / "whole")
    assert len(num) > 8
    last = range(len(num))[write]
    num.clear()
    with pytest.raises(FileError, match=r"output: cannot be written \(.*No space left on device\)"):
        COMMANDS[command](source, tmp_path / "output")
    assert [path.name for path in tmp_path.iterdir()] == ["whole"]


MEASURE = """
import sys
from pathlib import Path
import tqdm
import transformers.models.llama.modeling_llama
from adapters import sharded
def memory(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(key))
before = memory("VmRSS")
for command, source, target, options in eval(sys.argv[1]):
    Path("/proc/self/clear_refs").write_text("5")
    getattr(sharded, command)(Path(source), Path(target), **options, quiet=True)
    print(memory("VmHWM") - before)
"""


def megabytes(*commands):
    """MB above import that each command takes; one after the other, in one process that has only run those before."""
    words = [(command, str(source), str(target), options) for command, source, target, options in commands]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    run = [sys.executable, "-c", MEASURE, repr(words)]
    done = subprocess.run(run, capture_output=True, text=True, env=environment, check=True)
    return [float(line) for line in done.stdout.split()]


def large_adapter(place, layers):
    """An adapter of 5 MB per layer, and its tensors."""
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 1024}
    config |= {"intermediate_size": 4096, "num_hidden_layers": layers, "num_attention_heads": 8}
    config |= {"num_key_value_heads": 8, "vocab_size": 32, "tie_word_embeddings": False}
    (place / "model").mkdir(parents=True)
    checkpoint.write_json(place / "model" / "config.json", config)
    shapes = {"up_proj": ((128, 1024), (4096, 128)), "down_proj": ((128, 4096), (1024, 128))}
    paths = [f"model.layers.{i}.mlp.{name}" for i in range(layers) for name in shapes]
    state = {
        f"{peft_format.PREFIX}{path}.lora_{letter}.weight": torch.randn(shape)
        for path in paths
        for letter, shape in zip("AB", shapes[path.rpartition(".")[2]], strict=True)
    }
    spec = LoraSpec(rank=128, target_modules=tuple(shapes), base_model_name_or_path=str(place / "model"))
    checkpoint.save_adapter(place / "adapter", peft_format.to_config(spec, paths, paths), state)
    return state


def with_moments(place):
    """A sharded adapter as a training checkpoint has it."""
    with manifest.opened(place / "4") as stored:
        of = replace(stored.manifest, kinds=(manifest.FACTOR, *manifest.MOMENTS), step=1, files={})
        (place / "training").mkdir()
        with manifest.writing(place / "training", of, lambda *_: torch.float32) as put:
            for path, params in stored.layers(manifest.FACTOR):
                for kind in of.kinds:
                    put(kind, path, params)


def test_no_command_holds_a_checkpoint(tmp_path):
    small, large = tmp_path / "small", tmp_path / "large"
    states = {small: large_adapter(small, 4), large: large_adapter(large, 24)}  # 20 MB, 120 MB
    told = megabytes(
        *(("shard", place / "adapter", place / "4", {"tp": 4}) for place in states),
        *(("consolidate", place / "4", place / "joined", {}) for place in states),
    )
    for place, state in states.items():
        assert same(factors_of(place / "joined"), state)
        with_moments(place)  # 60 MB, 360 MB
    told += megabytes(*(("reshard", place / "training", place / "2", {"to_tp": 2}) for place in states))
    for of_small, of_large in zip(told[::2], told[1::2], strict=True):
        assert of_large < min(90, of_small + 25), told


def test_what_cannot_be_cut_is_a_sentence(adapter_of, parts, tmp_path, small_models):
    adapter, output = adapter_of("all linears"), tmp_path / "output"
    odd = Path(shutil.copytree(adapter, tmp_path / "odd"))
    tensors = load_file(odd / checkpoint.WEIGHTS)
    first = min(tensors)

    def of(**changes):
        save_file(tensors | changes.pop("tensors", {}), odd / checkpoint.WEIGHTS)
        config = checkpoint.read_json(adapter / checkpoint.CONFIG)
        checkpoint.write_json(odd / checkpoint.CONFIG, config | changes)
        return odd

    cases = [
        (lambda: sharded.shard(adapter, parts, tp=2), "exists; choose another output"),
        (lambda: sharded.shard(adapter, adapter / "x", tp=2), "which is read; choose a place outside"),
        (lambda: sharded.shard(adapter, output, tp=0), "--tp: is 0, expected at least 1"),
        (lambda: sharded.shard(adapter, output, tp=5), "cannot be cut into 5"),
        (lambda: sharded.shard(adapter, output, tp=2, pp=3), "pp: is 3, expected 1 to 2"),
        (lambda: sharded.shard(tmp_path / "none", output, tp=2), "no such directory"),
        (lambda: sharded.shard(adapter, output, tp=2, model=tmp_path / "none"), "no such directory"),
        (lambda: sharded.shard(adapter, output, tp=2, model=Path(small_models["qwen3"])), "has shape"),
        (lambda: sharded.shard(of(base_model_name_or_path="some/model"), output, tp=2), "give one with --model"),
        (lambda: sharded.shard(of(base_model_name_or_path=None), output, tp=2), "give one with --model"),
        (lambda: sharded.shard(of(r=3), output, tp=2), "has shape"),
        (lambda: sharded.shard(of(tensors={"x": tensors[first].clone()}), output, tp=2), "belongs to no adapted layer"),
        (lambda: sharded.shard(of(tensors={first: tensors[first] * torch.nan}), output, tp=2), "is not finite"),
        (
            lambda: sharded.shard(of(tensors={first: tensors[first].int()}), output, tp=2),
            "is torch.int32, expected one",
        ),
        (lambda: sharded.reshard(parts, output, to_tp=4, from_tp=8), "is of tp 2, --from-tp says 8"),
        (lambda: sharded.reshard(parts, output, to_tp=5), "5 processes"),
        (lambda: sharded.reshard(parts, output, to_tp=0), "expected at least 1"),
        (lambda: sharded.reshard(parts, output, to_tp=2, to_pp=3), "pp: is 3"),
        (lambda: sharded.reshard(parts, parts / "x", to_tp=2), "which is read"),
        (lambda: sharded.consolidate(parts, parts), "exists; choose another output"),
        (lambda: sharded.consolidate(adapter, output), "is a PEFT directory already; use it as it is"),
        (lambda: sharded.consolidate(tmp_path / "none", output), "none: "),
    ]
    for call, sentence in cases:
        with pytest.raises(LoraFnError) as error:
            call()
        assert sentence in str(error.value), (sentence, str(error.value))
        assert not output.exists()


def test_base_weights_beside_an_adapter_are_held_against_the_model(adapter_of, small_models, tmp_path):
    adapter = Path(shutil.copytree(adapter_of("embeddings"), tmp_path / "adapter"))
    tensors = load_file(adapter / checkpoint.WEIGHTS)
    [name] = [name for name in tensors if name.endswith("embed_tokens.base_layer.weight")]
    save_file(tensors | {name: tensors[name] + 1}, adapter / checkpoint.WEIGHTS)
    with pytest.raises(FileError, match="use the model it was made for"):
        sharded.shard(adapter, tmp_path / "output", tp=2, quiet=True)


# ---------------------------------------------------------------------------------------------- kill -9 at every moment


def cut_off(handle, content, offset, pwrite=os.pwrite):
    """A kill in the middle of a write."""
    pwrite(handle, content[: len(content) // 2], offset)
    os.kill(os.getpid(), signal.SIGKILL)


COMMANDS = {
    "shard": lambda source, target: sharded.shard(source, target, tp=2, quiet=True),
    "consolidate": lambda source, target: sharded.consolidate(source, target, quiet=True),
    "reshard": lambda source, target: sharded.reshard(source, target, to_tp=4, quiet=True),
}


def kill_at_every_point_of_a_command(job, resume):
    """In a process of its own: fork, run the command and die in the fork, look at what is left."""
    run, source, place = COMMANDS[job.adapter], Path(job.model), Path(job.output)
    place.mkdir()
    before, expected = contents(source), None
    run(source, place / "whole")
    expected = contents(place / "whole").keys()
    for number in itertools.count(-1):
        pid = os.fork()
        if pid == 0:
            if number < 0:
                os.pwrite = cut_off
            else:
                Doom(number, where="target").await_()
            run(source, place / "target")
            os._exit(0)
        survived = os.waitpid(pid, 0)[1] == 0
        assert contents(source) == before
        if (place / "target").exists():
            assert contents(place / "target").keys() == expected
            if job.adapter != "consolidate":
                sharded.consolidate(place / "target", place / "joined", quiet=True)
                shutil.rmtree(place / "joined")
            shutil.rmtree(place / "target")
        if survived:
            break
    print(number)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_kill_at_any_point_of_a_command_leaves_the_input_and_all_or_nothing(command, adapter_of, parts, tmp_path):
    source = adapter_of("bias") if command == "shard" else parts
    job = Job(model=str(source), data=("none",), output=str(tmp_path / "run"), adapter=command)
    processes = Processes(job, call=kill_at_every_point_of_a_command)
    assert processes.wait() == [0], processes.told()
    assert int(processes.told().split()[-1]) >= 8  # points


# -------------------------------------------------------------------------------------------------------- training


@pytest.fixture(scope="module")
def run_at_tp_2(job_models, tmp_path_factory):
    """A run at TP 2 that nobody disturbed, all of whose checkpoints are there."""
    place = tmp_path_factory.mktemp("training")
    job = Job(
        model=job_models["llama"],
        data=(jobs.write_lines(place / "data.jsonl", jobs.uneven(18)),),
        output=str(place / "tp-2"),
        lora=LoraSpec(rank=4, alpha=8, dropout=0.1, target_modules="all-linear"),
        tp=2,
        sequence_parallel=True,
        sequence_length=40,
        batch_size=4,
        accumulation=2,
        steps=8,
        learning_rate=1e-2,
        warmup=2,
        checkpoint_every=4,
    )
    jobs.run(job)
    return job


def stopped(job, name, **changes):
    """The same run elsewhere, killed between its fourth step and its next checkpoint."""
    other = jobs.elsewhere(job, name, **changes)
    shutil.copytree(job.output, other.output)
    shutil.rmtree(Path(other.output) / runs.CHECKPOINTS / "step-000000008")
    for file in (checkpoint.CONFIG, checkpoint.WEIGHTS, runs.PLOT):
        (Path(other.output) / file).unlink()
    return other


def assert_near(job, expected):
    for kind in ("train", "eval"):
        found = torch.tensor(jobs.column(job, "loss", kind))
        assert relative(found, torch.tensor(jobs.column(expected, "loss", kind))) < TOLERANCE
    found, known = jobs.adapter(job), jobs.adapter(expected)
    assert found.keys() == known.keys()
    assert max(relative(found[name], known[name]) for name in known) < 1e-3  # Adam divides by small moments


CUTS = {
    "tp 4": dict(tp=4),
    "tp 8, where q, k and v are one layer": dict(tp=8),
    "tp 1": dict(tp=1, sequence_parallel=False),
    "dp 2": dict(tp=1, sequence_parallel=False, dp=2, accumulation=1),
}


@pytest.mark.parametrize("cut", CUTS)
def test_a_run_at_tp_2_goes_on_at_another(cut, run_at_tp_2):
    job = stopped(run_at_tp_2, cut.replace(" ", "-").replace(",", ""), **CUTS[cut])
    jobs.run(job, resume=True)
    assert_near(job, run_at_tp_2)
    last = manifest.read(runs.Run(Path(job.output)).last())
    assert last.step == 8 and last.tp == job.tp


def test_a_training_checkpoint_that_was_cut_anew_goes_on_like_the_one_it_was(run_at_tp_2, tmp_path):
    job = stopped(run_at_tp_2, "resharded", tp=1, sequence_parallel=False)
    place = runs.Run(Path(job.output)).last()
    arguments = ["reshard", str(place), str(tmp_path / place.name), "--from-tp", "2", "--to-tp", "4", "--quiet"]
    assert cli.main(arguments) == 0
    shutil.rmtree(place)
    shutil.copytree(tmp_path / place.name, place)
    assert manifest.read(place).tp == 4
    direct = stopped(run_at_tp_2, "direct", tp=1, sequence_parallel=False)
    for each in (job, direct):
        jobs.run(each, resume=True)
    assert (Path(job.output) / checkpoint.WEIGHTS).read_bytes() == (
        Path(direct.output) / checkpoint.WEIGHTS
    ).read_bytes()


def test_a_consolidated_training_checkpoint_is_what_save_wrote(run_at_tp_2, tmp_path):
    last = runs.Run(Path(run_at_tp_2.output)).last()
    sharded.consolidate(last, tmp_path / "peft", quiet=True)
    for name, content in contents(tmp_path / "peft").items():
        assert (Path(run_at_tp_2.output) / name).read_bytes() == content
    before = last.with_name("step-000000004")
    sharded.consolidate(before, tmp_path / "before", quiet=True)
    assert not same(load_file(tmp_path / "before" / checkpoint.WEIGHTS), jobs.adapter(run_at_tp_2))


def test_a_mix_of_two_steps_is_refused(run_at_tp_2, tmp_path):
    last = runs.Run(Path(run_at_tp_2.output)).last()
    place = Path(shutil.copytree(last, tmp_path / last.name))
    name = manifest.file_name(1, 0)
    shutil.copy(last.with_name("step-000000004") / name, place / name)
    assert (place / name).stat().st_size == (last / name).stat().st_size
    with pytest.raises(FileError, match=r"is of step 4, manifest\.json says step 8"):
        sharded.consolidate(place, tmp_path / "output", quiet=True)


def test_moments_and_factors_are_cut_alike(run_at_tp_2):
    """What a process at TP 4 gets is its part of the canonical tensors, of all three kinds."""
    last = runs.Run(Path(run_at_tp_2.output)).last()
    outline = models.outline(run_at_tp_2.model, axis=Axis(size=8))  # its q, k and v are one layer
    specs = bind.plan(outline, run_at_tp_2.lora)
    with manifest.opened(last) as stored:
        kinds = {
            kind: [manifest.recut(stored, kind, specs, index) for index in range(8)] for kind in stored.manifest.kinds
        }
        whole = {
            kind: peft_format.to_state_dict(
                {path: stored.canonical(kind, path) for path in stored.manifest.specs}, stored.manifest.specs
            )
            for kind in stored.manifest.kinds
        }
    assert set(specs) != set(stored.manifest.specs)
    for kind, parts in kinds.items():
        joined = {path: manifest.join([part[path] for part in parts], specs[path]) for path in specs}
        assert same(peft_format.to_state_dict(joined, specs), whole[kind])
    assert not same(whole["factor"], whole["exp_avg"])


def test_other_layers_than_the_model_has_are_refused(run_at_tp_2, job_models):
    last = runs.Run(Path(run_at_tp_2.output)).last()
    for model, lora in (("llama-1-layer", run_at_tp_2.lora), ("llama", replace(run_at_tp_2.lora, rank=5))):
        specs = bind.plan(models.outline(job_models[model], axis=Axis(size=2)), lora)
        with (
            pytest.raises(FileError, match="use the model it is of"),
            manifest.opened(last) as stored,
        ):
            manifest.recut(stored, manifest.FACTOR, specs, 0)


def test_masks_that_depend_on_the_microbatches_keep_them(run_at_tp_2):
    job = stopped(run_at_tp_2, "masks", tp=1, dp=2, sequence_parallel=False)
    with pytest.raises(SpecError, match="--dp x --accumulation: is 4, and the run began with 2"):
        adapters.train.check(job, resume=True)


def test_a_place_that_is_not_there_is_told_as_such(tmp_path, capsys):
    assert cli.main(["consolidate", str(tmp_path / "gone"), str(tmp_path / "out")]) == cli.BAD_INPUT
    assert "gone: no such directory; give the directory of a sharded adapter." in capsys.readouterr().err
