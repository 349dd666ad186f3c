"""Does damage ever pass for data? Random damage to an adapter, a sharded checkpoint and a base model.

Each is refused with a sentence, or changes nothing that anybody reads; nothing crashes, hangs, or takes the memory.
"""

import random
import resource
import shutil
import time
from pathlib import Path

import pytest
import torch
from small_models import small_models_fixture  # noqa: F401  (a fixture)

import adapters
from adapters import models, sharded
from lora_fn import LoraFnError, LoraSpec, checkpoint

NUMBER = 200  # of each
SECONDS, MEGABYTES = 10, 400  # that none may take
SPEC = LoraSpec(rank=2, alpha=5, init_lora_weights=False, target_modules=("q_proj", "v_proj", "o_proj", "up_proj"))


@pytest.fixture(scope="module")
def whole(small_models, tmp_path_factory):
    """Kind -> the directory that is to be damaged."""
    place = tmp_path_factory.mktemp("whole")
    model = adapters.wrap(models.load(small_models["llama"]), SPEC)
    adapters.save(model, place / "adapter")
    sharded.shard(place / "adapter", place / "sharded", tp=2, model=Path(small_models["llama"]), quiet=True)
    shutil.copytree(small_models["llama"], place / "model")
    return {path.name: path for path in place.iterdir()}


# What each kind is read for: what comes of it, as {name: tensor}.


def read_adapter(directory, small_models, place):
    model = adapters.wrap(models.load(small_models["llama"]), adapters.read_spec(directory))
    adapters.load(model, directory)
    scales = {path: torch.tensor([spec.scaling]) for path, spec in adapters.specs(model).items()}
    return {name: p for name, p in model.named_parameters() if "lora_" in name} | scales


def read_sharded(directory, small_models, place):
    sharded.consolidate(directory, place / "joined", quiet=True)
    return read_adapter(place / "joined", small_models, place)


def read_model(directory, small_models, place):
    return dict(models.load(directory).named_parameters())


READERS = {"adapter": read_adapter, "sharded": read_sharded, "model": read_model}


# What can happen to a file.


def flip(content, at, chance):
    content[at] ^= 1 << chance.randrange(8)


def overwrite(content, at, chance):
    length = min(chance.choice((4, 64)), len(content) - at)
    content[at : at + length] = chance.choice((bytes(length), chance.randbytes(length), b"\xff" * length))


def insert(content, at, chance):
    content[at:at] = chance.randbytes(chance.choice((1, 8, 100)))


def cut(content, at, chance):
    del content[at:]


def take_out(content, at, chance):
    del content[at : at + chance.choice((1, 8, 100))]


def append(content, at, chance):
    content += chance.randbytes(chance.choice((1, 8, 100)))


def not_finite(content, at, chance):
    """A float32 of the data, at its end, becomes NaN or infinite."""
    at = len(content) - 4 * chance.randrange(1, 50)
    content[at : at + 4] = chance.choice((b"\x00\x00\xc0\x7f", b"\x00\x00\x80\x7f", b"\x00\x00\x80\xff"))


ANYWHERE = (flip, flip, flip, overwrite, insert, cut, take_out, append)


def damage(kind, directory, chance):
    """Damage one file of a directory; returns what was done."""
    files = sorted(path for path in directory.iterdir() if path.is_file())
    if kind == "model":  # what no program of ours wrote carries no hash: of it, headers and the index
        files = [path for path in files if path.suffix == ".safetensors" or path.name == checkpoint.INDEX]
    file = chance.choice(files)
    how = chance.choice((*ANYWHERE, not_finite, "remove", "swap"))
    others = [path for path in files if path.suffix == file.suffix and path != file]
    if how == "swap" and others:
        other = chance.choice(others)
        both = file.read_bytes(), other.read_bytes()
        file.write_bytes(both[1])
        other.write_bytes(both[0])
        return f"{file.name} and {other.name} swapped"
    if how in ("remove", "swap"):
        file.unlink()
        return f"{file.name} removed"
    content = bytearray(file.read_bytes())
    is_data = file.suffix == ".safetensors"
    header = 8 + int.from_bytes(content[:8], "little") if is_data else len(content)
    if how is not_finite and (not is_data or kind == "model"):
        how = flip
    end = header if kind == "model" or chance.random() < 0.5 else len(content)
    at = chance.randrange(end)
    how(content, at, chance)
    file.write_bytes(content)
    return f"{file.name}: {how.__name__} at {at}"


def same(a, b):
    return a.keys() == b.keys() and all(a[n].dtype == b[n].dtype and torch.equal(a[n], b[n]) for n in a)


@pytest.mark.parametrize("kind", READERS)
def test_damage_is_refused_with_a_sentence_or_changes_nothing(kind, whole, small_models, tmp_path):
    read, chance = READERS[kind], random.Random(kind)
    expected = read(whole[kind], small_models, tmp_path / "expected")
    peak, refused, harmless = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, {}, []
    for number in range(NUMBER):
        place = tmp_path / str(number)
        directory = place / whole[kind].name
        shutil.copytree(whole[kind], directory)
        done = damage(kind, directory, chance)
        before, began = snapshot(directory), time.monotonic()
        try:
            found = read(directory, small_models, place)
        except LoraFnError as error:
            refused[done] = str(error)
        else:
            assert same(found, expected), f"{done}: taken for good"
            harmless.append(done)
        assert time.monotonic() - began < SECONDS, done
        assert snapshot(directory) == before, f"{done}: the input was changed"
        shutil.rmtree(place)
    assert len(refused) > 2 / 3 * NUMBER, harmless  # much of a config says nothing that anybody computes with
    for done, sentence in refused.items():
        assert all(line.endswith(".") and len(line) < 700 for line in sentence.splitlines()), (done, sentence)
        assert len(sentence.splitlines()) <= 25 and "Traceback" not in sentence, (done, sentence)
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak) / 1024 < MEGABYTES


def snapshot(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir()}
