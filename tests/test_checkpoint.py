"""Which files from strangers are taken? Only whole ones: each of these is refused with one sentence."""

import errno
import itertools
import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from lora_fn import FileError, checkpoint
from lora_fn.errors import SHOWN, Problems


def refused(call, *words):
    """That a call is refused with one sentence, which names the words."""
    with pytest.raises(FileError) as raised:
        call()
    told = str(raised.value)
    assert "\n" not in told and told.endswith(".") and len(told) < 1500
    assert all(word in told for word in words), told


# ----------------------------------------------------------------------------------------------------------- headers


def of(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def written(header, data=b"\0" * 8, *, length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


TWO = {"a": of(), "b": of(offsets=(8, 16))}
HUGE = 2**62
HEADERS = {
    "nothing": (b"", "cut off"),
    "seven bytes": (b"\0" * 7, "cut off"),
    "a length beyond the file": (written({"a": of()}, length=1 << 20), "cut off"),
    "the greatest length": (written({"a": of()}, length=2**64 - 1), "cut off"),
    "a length of 0": (written(b""), "not a JSON object"),
    "a list": (written(b"[]"), "not a JSON object"),
    "a number": (written(b"7"), "not a JSON object"),
    "a space first": (written(b' {"a":1}'), "not a JSON object"),
    "no JSON": (written(b"{junk}"), "not JSON"),
    "JSON that is cut": (written(b'{"a":'), "not JSON"),
    "no UTF-8": (written(b'{"\xff":1}'), "utf-8"),
    "nesting without end": (written(b'{"a":' + b"[" * 200_000), "not JSON"),
    "nesting that ends": (written(b'{"a":' + b"[" * 200_000 + b"]" * 200_000 + b"}"), "not JSON"),
    "a number of many digits": (written(b'{"a":' + b"9" * 100_000 + b"}"), "100000 digits"),
    "NaN": (written(b'{"a":NaN}'), "NaN"),
    "a tensor twice": (written(b'{"a":%b,"a":%b}' % ((json.dumps(of()).encode(),) * 2)), "'a' is in it twice"),
    "a dtype twice": (
        written(b'{"a":{"dtype":"F32","dtype":"U8","shape":[8],"data_offsets":[0,8]}}'),
        "'dtype' is in it twice",
    ),
    "metadata that are no text": (written({"__metadata__": {"format": 1}, "a": of()}), "metadata"),
    "metadata that are a list": (written({"__metadata__": [], "a": of()}), "metadata"),
    "a tensor that is a list": (written({"a": [1]}), "expected dtype, shape and data_offsets"),
    "a tensor that is null": (written({"a": None}), "expected dtype, shape and data_offsets"),
    "no dtype": (written({"a": {"shape": [2], "data_offsets": [0, 8]}}), "expected dtype"),
    "a key too many": (written({"a": of() | {"stride": 1}}), "expected dtype"),
    "an unknown dtype": (written({"a": of(dtype="F31")}), "dtype 'F31'"),
    "a dtype that is a list": (written({"a": of() | {"dtype": []}}), "dtype []"),
    "a shape below 0": (written({"a": of(shape=(-2,))}), "shape [-2]"),
    "two sizes below 0": (written({"a": of(shape=(-1, -2))}), "shape [-1, -2]"),
    "a shape with a fraction": (written({"a": of(shape=(2.0,))}), "shape [2.0]"),
    "a shape with a truth": (written({"a": of(shape=(True, 2))}), "shape [True, 2]"),
    "a shape with text": (written({"a": of(shape=("2",))}), "shape ['2']"),
    "a shape that is a number": (written({"a": of() | {"shape": 2}}), "shape 2"),
    "a size beyond 64 bits": (written({"a": of(shape=(2**64,))}), "shape"),
    "a product beyond 64 bits": (written({"a": of(shape=(HUGE, 4), offsets=(0, 0))}), "do not hold"),
    "a long shape": (written({"a": of(shape=[HUGE] * 50_000)}), "do not hold"),
    "a shape of ones and much": (written({"a": of(shape=[1] * 50_000 + [HUGE])}), "do not hold"),
    "more than its bytes": (written({"a": of(shape=(3,))}), "do not hold"),
    "less than its bytes": (written({"a": of(shape=(1,))}), "do not hold"),
    "four bits to a byte and a half": (written({"a": of("F4", (3,), (0, 2))}, b"\0\0"), "do not hold"),
    "offsets beyond the file": (written({"a": of(shape=(HUGE // 4,), offsets=(0, HUGE))}), "data_offsets"),
    "offsets in reverse": (written({"a": of(offsets=(8, 0))}), "data_offsets"),
    "one offset": (written({"a": of(offsets=(8,))}), "data_offsets"),
    "an offset below 0": (written({"a": of(offsets=(-8, 0))}), "data_offsets"),
    "a hole at the start": (written({"a": of(offsets=(8, 16))}, b"\0" * 16), "begins at"),
    "a hole between": (written({"a": of(), "b": of(offsets=(16, 24))}, b"\0" * 24), "begins at"),
    "an overlap": (written({"a": of(), "b": of(offsets=(4, 12))}, b"\0" * 12), "begins at"),
    "two on one place": (written({"a": of(), "b": of()}), "begins at"),
    "data cut off": (written(TWO, b"\0" * 15), "within 15 bytes"),
    "data too many": (written(TWO, b"\0" * 17), "has 1"),
    "a pickle": (b"\x80\x02}q\x00." * 20, "cut off"),
    "a name of many letters": (written({"a" * 100_000: 1}), "expected dtype"),
    "a name of two lines": (written({"a\nb": 1}), r"'a\nb'"),
    "half a letter": (written(b'{"\\ud800":1}'), "ud800"),
}


@pytest.mark.parametrize("case", HEADERS)
def test_a_hostile_header_is_a_sentence(case, tmp_path):
    content, why = HEADERS[case]
    file = tmp_path / "x.safetensors"
    file.write_bytes(content)
    refused(lambda: checkpoint.TensorFiles([file]), f"{file}: is not a whole safetensors file (", why)


def test_a_header_of_more_than_the_limit_is_not_read(tmp_path):
    file = tmp_path / "x.safetensors"
    with open(file, "wb") as opened:
        opened.write((checkpoint.MAX_JSON + 1).to_bytes(8, "little") + b"{")
        opened.truncate(checkpoint.MAX_JSON + 9)
    refused(lambda: checkpoint.TensorFiles([file]), f"at most {checkpoint.MAX_JSON} are read")


def test_what_is_no_file_is_a_sentence(tmp_path):
    os.mkfifo(tmp_path / "pipe.safetensors")  # reading it would wait for ever
    (tmp_path / "directory.safetensors").mkdir()
    (tmp_path / "link.safetensors").symlink_to(tmp_path / "nowhere")
    for name in ("pipe", "directory", "link", "gone"):
        refused(lambda name=name: checkpoint.TensorFiles([tmp_path / f"{name}.safetensors"]), "no such file")


def test_whole_files_are_taken(tmp_path):
    file = tmp_path / "x.safetensors"
    file.write_bytes(written({"__metadata__": {"format": "pt"}, "b": of(offsets=(8, 16)), "a": of()}, b"\0" * 16))
    assert checkpoint.TensorFiles([file]).headers[file].metadata == {"format": "pt"}
    file.write_bytes(
        written(json.dumps({"a": of("F32", (0, 3), (0, 0)), "c": of("F4", (4,), (0, 2))}).encode() + b"   ", b"\0\0")
    )
    files = checkpoint.TensorFiles([file])
    assert files.read("a").shape == (0, 3) and files.read("a", dim=1, stop=2).shape == (0, 2)
    refused(lambda: files.read("c"), "dtype F4, which is not read here")
    file.write_bytes(written({}, b""))
    assert not checkpoint.TensorFiles([file]).shapes


VALUES = {
    dtype: torch.arange(60).reshape(3, 4, 5).to(dtype)
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.int8, torch.bool)
} | {torch.float8_e4m3fn: torch.arange(60.0).reshape(3, 4, 5).to(torch.float8_e4m3fn)}


def test_what_is_read_is_what_safetensors_reads(tmp_path):
    file = tmp_path / "x.safetensors"
    tensors = {str(dtype): t for dtype, t in VALUES.items()} | {"scalar": torch.tensor(2.5), "row": torch.arange(7.0)}
    save_file(tensors, file)
    files, theirs = checkpoint.TensorFiles([file]), load_file(file)
    assert set(files.shapes) == set(theirs)
    for (name, t), take in itertools.product(theirs.items(), (files.read, files.view)):
        assert take(name).dtype == t.dtype and same(take(name).contiguous(), t)
        for dim, (start, stop) in itertools.product(range(min(2, t.dim())), [(1, 3), (0, None), (2, 2), (1, 99)]):
            part = t[start:stop] if dim == 0 else t[:, start:stop]
            assert same(take(name, dim=dim, start=start, stop=stop).contiguous(), part)
        if t.dim():
            buffer = torch.empty(t.numel() * t.element_size(), dtype=torch.uint8)
            rows = t.reshape(checkpoint.as_matrix(t.shape))
            assert same(files.read_rows(name, 1, len(rows), buffer=buffer), rows[1:])


def same(a, b):
    return (
        a.shape == b.shape
        and a.dtype == b.dtype
        and bytes(checkpoint.as_bytes(a)) == bytes(checkpoint.as_bytes(b.contiguous()))
    )


def test_a_view_may_begin_anywhere_and_leaves_the_file_as_it_is(tmp_path):
    file = tmp_path / "x.safetensors"
    header = {"a": of(), "b": of(shape=(0, 3), offsets=(8, 8))}
    for length in range(4):
        file.write_bytes(
            before := written(json.dumps(header).encode() + b" " * length, torch.ones(2).numpy().tobytes())
        )
        files = checkpoint.TensorFiles([file])
        view = files.view("a")
        assert view.tolist() == [1.0, 1.0] and files.view("b").shape == (0, 3) and files.bytes_read == 8
        view.zero_()
        assert file.read_bytes() == before


def test_a_file_that_shrinks_while_it_is_open_is_a_sentence(tmp_path):
    file = tmp_path / "x.safetensors"
    save_file({"a": torch.arange(24.0).view(4, 6)}, file)
    files = checkpoint.TensorFiles([file])
    os.truncate(file, file.stat().st_size - 8)
    refused(lambda: files.read("a"), "it ends early")
    refused(lambda: files.view("a"), "it ends early")
    refused(lambda: files.read("a", dim=1, start=3), "it ends early")
    with open(tmp_path / "copy", "wb") as target:
        refused(lambda: files.copy_bytes(file, 0, file.stat().st_size + 8, target.fileno()), "it ends early")


@given(data=st.data())
def test_a_flipped_byte_of_a_header_is_never_a_traceback(data, tmp_path_factory):
    """It is refused, or the header says something else that is whole: then the tensors can be read."""
    file = tmp_path_factory.getbasetemp() / "flipped.safetensors"
    save_file({"a": torch.arange(4.0), "b": torch.ones(2, 3), "c": torch.zeros(())}, file)
    content = bytearray(file.read_bytes())
    length = 8 + int.from_bytes(content[:8], "little")
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, length - 1))] ^= data.draw(st.integers(1, 255))
    file.write_bytes(content)
    try:
        files = checkpoint.TensorFiles([file])
        assert all(files.read(name).shape == shape for name, shape in files.shapes.items())
    except FileError as error:
        assert "\n" not in str(error) and str(error).endswith(".")


@pytest.mark.parametrize("missing", [(), ("copy_file_range",), ("copy_file_range", "sendfile")], ids=str)
def test_bytes_are_copied_however_the_system_can(missing, tmp_path, monkeypatch):
    def cannot(*arguments, **more):
        raise OSError(errno.EXDEV, "cannot")

    for name in missing:
        monkeypatch.setattr(os, name, cannot)
    file = tmp_path / "x.safetensors"
    save_file({"a": torch.randn(1 << 19)}, file)
    files, whole = checkpoint.TensorFiles([file]), file.read_bytes()
    with open(tmp_path / "copy", "wb") as target:
        files.copy_bytes(file, 0, 11, target.fileno())
        files.copy_bytes(file, 11, len(whole), target.fileno())
    assert (tmp_path / "copy").read_bytes() == whole


# ------------------------------------------------------------------------------------------------------------- index


@pytest.fixture
def sharded(tmp_path):
    """A model of two shards and its index."""
    place = tmp_path / "model"
    place.mkdir()
    for file, names in {"one": ("a", "b"), "two": ("c",)}.items():
        save_file({name: torch.ones(2) for name in names}, place / f"{file}.safetensors")
    write_index(place, {"a": "one.safetensors", "b": "one.safetensors", "c": "two.safetensors"})
    save_file({"c": torch.ones(2)}, tmp_path / "two.safetensors")
    return place


def write_index(place, weight_map):
    (place / checkpoint.INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def edit_index(place, **changes):
    of = json.loads((place / checkpoint.INDEX).read_text())["weight_map"] | changes
    write_index(place, {name: file for name, file in of.items() if file != "none"})


OUTSIDE = "is not a file of this directory"
INDICES = {
    "above": (lambda d: edit_index(d, c="../two.safetensors"), OUTSIDE),
    "above, twice": (lambda d: edit_index(d, c="../model/../two.safetensors"), OUTSIDE),
    "from the root": (lambda d: edit_index(d, c=str(d.parent / "two.safetensors")), OUTSIDE),
    "below": (lambda d: edit_index(d, c="sub/two.safetensors"), OUTSIDE),
    "this directory": (lambda d: edit_index(d, c="."), OUTSIDE),
    "the one above": (lambda d: edit_index(d, c=".."), OUTSIDE),
    "no name": (lambda d: edit_index(d, c=""), OUTSIDE),
    "a zero in it": (lambda d: edit_index(d, c="two\0.safetensors"), OUTSIDE),
    "two lines": (lambda d: edit_index(d, c="two\n.safetensors"), OUTSIDE),
    "a long name": (lambda d: edit_index(d, c="x" * 5000 + ".safetensors"), OUTSIDE),
    "a pickle": (lambda d: edit_index(d, c="two.bin"), OUTSIDE),
    "the config": (lambda d: edit_index(d, c="config.json"), OUTSIDE),
    "a number": (lambda d: edit_index(d, c=7), OUTSIDE),
    "a list": (lambda d: edit_index(d, c=["two.safetensors"]), OUTSIDE),
    "a missing file": (lambda d: (d / "two.safetensors").unlink(), "no such file"),
    "a damaged file": (lambda d: os.truncate(d / "two.safetensors", 30), "not a whole safetensors file"),
    "a tensor in another file": (lambda d: edit_index(d, b="two.safetensors"), "'b' is not in it, though"),
    "a tensor that is nowhere": (lambda d: edit_index(d, z="two.safetensors"), "'z' is not in it, though"),
    "a tensor that it lacks": (lambda d: edit_index(d, b="none"), "'b' is not in the index"),
    "a tensor in two files": (
        lambda d: save_file({"c": torch.ones(2), "a": torch.ones(2)}, d / "two.safetensors"),
        "'a' is also in",
    ),
    "swapped files": (lambda d: shutil.copyfile(d / "one.safetensors", d / "two.safetensors"), "two.safetensors"),
    "a key twice": (
        lambda d: (d / checkpoint.INDEX).write_text('{"weight_map":{"a":"one.safetensors","a":"two.safetensors"}}'),
        "'a' is in it twice",
    ),
    "no map": (lambda d: (d / checkpoint.INDEX).write_text("{}"), "no 'weight_map'"),
    "an empty map": (lambda d: write_index(d, {}), "no 'weight_map'"),
    "a list for a map": (lambda d: (d / checkpoint.INDEX).write_text('{"weight_map": ["a"]}'), "no 'weight_map'"),
    "another model beside it": (
        lambda d: save_file({"a": torch.ones(2)}, d / checkpoint.MODEL),
        "and an index of other files",
    ),
}


@pytest.mark.parametrize("case", INDICES)
def test_a_hostile_index_is_a_sentence(case, sharded):
    damage, why = INDICES[case]
    assert set(checkpoint.open_model(sharded).shapes) == {"a", "b", "c"}
    damage(sharded)
    with pytest.raises(FileError, match=re.escape(why)) as raised:
        checkpoint.open_model(sharded)
    lines = str(raised.value).splitlines()
    assert all(line.startswith(str(sharded)) and line.endswith(".") and len(line) < 1000 for line in lines)


def test_a_cache_of_links_is_taken(sharded, tmp_path):
    """The Hub's cache is one: links of plain names to files elsewhere."""
    place = tmp_path / "snapshot"
    place.mkdir()
    for file in sharded.iterdir():
        (place / file.name).symlink_to(file)
    assert set(checkpoint.open_model(place).shapes) == {"a", "b", "c"}


# -------------------------------------------------------------------------------------------------------------- JSON

JSONS = {
    "a key twice": (b'{"r": 1, "r": 2}', "'r' is in it twice"),
    "a key twice, within": (b'{"a": [{"r": 1, "r": 2}]}', "'r' is in it twice"),
    "NaN": (b'{"r": NaN}', "NaN"),
    "nesting without end": (b"[" * 200_000, "is not JSON"),
    "objects without end": (b'{"a":' * 200_000, "is not JSON"),
    "many digits": (b'{"r": ' + b"1" * 5000 + b"}", "5000 digits"),
    "no UTF-8": (b'{"\xff": 1}', "is not JSON"),
    "UTF-16": ('{"r": 1}'.encode("utf-16"), "is not JSON"),
    "nothing": (b"", "is not JSON"),
    "a tail": (b"{} {}", "is not JSON"),
    "text": (b'"r"', "holds a str"),
    "a list": (b"[1]", "holds a list"),
    "null": (b"null", "holds a NoneType"),
}


@pytest.mark.parametrize("case", JSONS)
def test_hostile_json_is_a_sentence(case, tmp_path):
    content, why = JSONS[case]
    (tmp_path / "x.json").write_bytes(content)
    refused(lambda: checkpoint.read_json(tmp_path / "x.json"), f"{tmp_path / 'x.json'}: ", why)


def test_json_that_is_no_file_or_too_large_is_a_sentence(tmp_path):
    os.mkfifo(tmp_path / "pipe.json")
    refused(lambda: checkpoint.read_json(tmp_path / "pipe.json"), "no such file")
    refused(lambda: checkpoint.read_json(tmp_path), "no such file")
    with open(tmp_path / "large.json", "wb") as opened:
        opened.truncate(checkpoint.MAX_JSON + 1)
    refused(lambda: checkpoint.read_json(tmp_path / "large.json"), f"at most {checkpoint.MAX_JSON} are read")


def test_json_of_transformers_is_taken(tmp_path):
    (tmp_path / "x.json").write_text('{"time_step_limit": [0.0, Infinity], "x": -Infinity, "é": 1}', encoding="utf-8")
    assert checkpoint.read_json(tmp_path / "x.json") == {
        "time_step_limit": [0.0, float("inf")],
        "x": -float("inf"),
        "é": 1,
    }


def test_thousands_of_problems_are_told_of_in_a_page():
    problems = Problems(FileError)
    for i in range(5000):
        problems.add(f"file {i}", "is bad; mend it.")
    with pytest.raises(FileError) as raised:
        problems.raise_if_any()
    lines = str(raised.value).splitlines()
    assert lines == [*(f"file {i}: is bad; mend it." for i in range(SHOWN)), f"and {5000 - SHOWN} more."]


def test_an_index_that_fits_nothing_is_told_of_in_a_page(sharded):
    edit_index(sharded, **{f"x{i}": "two.safetensors" for i in range(5000)})
    with pytest.raises(FileError, match=f"and {5000 - SHOWN} more\\.") as raised:
        checkpoint.open_model(sharded)
    assert len(str(raised.value).splitlines()) == SHOWN + 1


def test_pickles_are_not_read(tmp_path):
    (tmp_path / checkpoint.CONFIG).write_text("{}")
    torch.save({}, tmp_path / "adapter_model.bin")
    refused(lambda: checkpoint.open_adapter(tmp_path), "a pickle, which is not read")
    torch.save({}, Path(tmp_path) / "pytorch_model.bin")
    refused(lambda: checkpoint.open_model(tmp_path), "holds neither")
