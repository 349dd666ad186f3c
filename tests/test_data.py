"""Do files become the batches that they should?"""

from __future__ import annotations

import collections
import functools
import json
import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adapters import data
from lora_fn.errors import DataError

CHAT = (
    "{% for m in messages %}{% if m.role in ['system', 'user', 'assistant'] %}"
    "<|{{ m.role }}|>\n{{ m.content | trim }}</s>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
# As Qwen3's: only the last answer shows where its reasoning would stand.
REASONING_CHAT = (
    "{% for m in messages %}<|{{ m.role }}|>\n"
    "{% if m.role == 'assistant' and loop.last %}<think></think>\n{% endif %}{{ m.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
CORPUS = ["The quick brown fox jumps over the lazy dog.", "<|user|>\nWhat is it?\n<|assistant|>\nIt is a fox.\n"] * 4


@functools.cache
def make_tokenizer(*, chat=CHAT, adds_bos=True, eos="</s>", trim_offsets=False):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    offsets = processors.ByteLevel(trim_offsets=trim_offsets)
    with_bos = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer.post_processor = processors.Sequence([offsets, with_bos] if adds_bos else [offsets])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token=eos,
        chat_template=chat,
        clean_up_tokenization_spaces=False,
    )


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.fixture
def write(tmp_path):
    """Write a file of lines (a list: as JSON) or of text, and return its path."""

    def write(content, name="a.jsonl"):
        path = tmp_path / name
        lines = content if isinstance(content, (str, bytes)) else "\n".join(json.dumps(line) for line in content)
        path.write_bytes(lines if isinstance(lines, bytes) else lines.encode())
        return path

    return write


def read(path, tokenizer):
    return data.read_documents([path], tokenizer, disable=True)


def learnt(document, tokenizer):
    return tokenizer.decode(document.tokens[document.targets])


def chat(*contents, roles=("user", "assistant")):
    return {"messages": [{"role": roles[i % len(roles)], "content": c} for i, c in enumerate(contents)]}


# ---------------------------------------------------------------------------------------------------------- documents


@pytest.mark.parametrize("name", ["a.txt", "b.md", "c"])
def test_a_text_file_is_one_document(write, tokenizer, name):
    text = "The fox.\r\n\nIt is lazy. \N{SNOWMAN}\n"
    (document,) = read(write(text, name), tokenizer)
    assert tokenizer.decode(document.tokens) == f"<s>{text}</s>"
    assert document.tokens.dtype == np.int32
    assert document.targets.tolist() == [False] + [True] * (len(document.tokens) - 1)


def test_lines_are_documents_and_only_newlines_end_them(write, tokenizer):
    lines = '{"text": "one\u2028two"}\r\n\n{"text": "three"}\n'
    documents = read(write(lines), tokenizer)
    assert [tokenizer.decode(d.tokens) for d in documents] == ["<s>one\u2028two</s>", "<s>three</s>"]


def test_a_byte_order_mark_is_not_text(write, tokenizer):
    assert tokenizer.decode(read(write(b"\xef\xbb\xbffox", "a.txt"), tokenizer)[0].tokens) == "<s>fox</s>"


def test_edge_tokens_are_the_tokenizers_own(write):
    path = write("The fox.", "a.txt")
    bare = make_tokenizer(adds_bos=False, eos=None)
    (document,) = read(path, bare)
    assert bare.decode(document.tokens) == "The fox."
    assert document.targets.tolist() == [False] + [True] * (len(document.tokens) - 1)


def test_edge_tokens_that_are_written_out_are_not_added_again(write, tokenizer):
    (document,) = read(write("<s>The fox.</s>", "a.txt"), tokenizer)
    assert tokenizer.decode(document.tokens) == "<s>The fox.</s>"
    assert learnt(document, tokenizer) == "The fox.</s>"


@pytest.mark.parametrize("trim_offsets", [False, True])
@pytest.mark.parametrize(
    ("prompt", "completion", "expected"),
    [
        ("What is it?\n", "It is a fox.", "It is a fox.</s>"),
        ("What is it?", " It is", " It is</s>"),
        ("What is it? ", "fox", " fox</s>"),  # " f" is one token, and holds the first letter of the answer
        ("What is it?   ", "\n", None),
        ("", "fox", "fox</s>"),
        ("\N{SNOWMAN}", "\N{SNOWMAN}\N{SNOWMAN}", "\N{SNOWMAN}\N{SNOWMAN}</s>"),
        ("a\n", "\n\n b", "\n\n b</s>"),
    ],
)
def test_only_the_completion_is_learnt(write, trim_offsets, prompt, completion, expected):
    tokenizer = make_tokenizer(trim_offsets=trim_offsets)
    path = write([{"prompt": prompt, "completion": completion}])
    if expected is None:
        with pytest.raises(DataError, match="found an empty 'completion'"):
            read(path, tokenizer)
        return
    (document,) = read(path, tokenizer)
    assert tokenizer.decode(document.tokens) == f"<s>{prompt}{completion}</s>"
    whole = tokenizer(prompt + completion, add_special_tokens=False)["input_ids"]
    assert document.tokens.tolist() == [0, *whole, 1]
    assert learnt(document, tokenizer).lstrip() == expected.lstrip()


@settings(max_examples=60, deadline=None)
@given(prompt=st.text("ab \n\u2603", max_size=8), completion=st.text("ab \n\u2603", min_size=1, max_size=8))
def test_every_character_of_a_completion_is_learnt(tmp_path_factory, prompt, completion):
    if not completion.strip():
        return
    tokenizer = make_tokenizer()
    path = tmp_path_factory.mktemp("data") / "a.jsonl"
    path.write_text(json.dumps({"prompt": prompt, "completion": completion}))
    (document,) = read(path, tokenizer)
    text = learnt(document, tokenizer)
    straddle = len(text) - len(f"{completion}</s>")
    assert text.endswith(f"{completion}</s>")
    first = np.flatnonzero(document.targets)[0]
    assert straddle < max(1, len(tokenizer.decode(document.tokens[first : first + 1])))


@pytest.mark.parametrize("trim_offsets", [False, True])
def test_only_the_answers_of_messages_are_learnt(write, trim_offsets):
    tokenizer = make_tokenizer(trim_offsets=trim_offsets)
    (document,) = read(write([chat("What is it?", "A fox.", "Lazy?", " No \n", "Oh")]), tokenizer)
    text = "<|user|>\nWhat is it?</s>\n<|assistant|>\nA fox.</s>\n<|user|>\nLazy?</s>\n<|assistant|>\nNo</s>\n"
    assert tokenizer.decode(document.tokens) == text  # bos is the template's affair, and what follows teaches nothing
    assert learnt(document, tokenizer) == "A fox.</s>\nNo</s>\n"


def test_an_answer_that_the_template_renders_otherwise_later_is_learnt_as_it_is_given(write):
    tokenizer = make_tokenizer(chat=REASONING_CHAT)
    documents = read(write([chat("One?", "1", "Two?", "2")]), tokenizer)
    assert [learnt(d, tokenizer) for d in documents] == ["<think></think>\n1</s>\n", "<think></think>\n2</s>\n"]
    assert "<|assistant|>\n1</s>" in tokenizer.decode(documents[1].tokens)


def test_documents_do_not_depend_on_their_neighbours(write, tokenizer):
    kinds = [{"text": "The fox."}, {"prompt": "What?", "completion": " A dog."}, chat("Is it?", "It is.")]
    lines = [kinds[i % 3 if i > 256 else 0] for i in range(300)]
    alone = [read(write([kind], "b.jsonl"), tokenizer)[0] for kind in kinds]
    documents = read(write(lines), tokenizer)
    assert len(documents) == len(lines)
    for line, document in zip(lines, documents, strict=True):
        expected = alone[kinds.index(line)]
        assert document.tokens.tolist() == expected.tokens.tolist()
        assert document.targets.tolist() == expected.targets.tolist()


def test_a_document_is_checked():
    with pytest.raises(DataError, match=r"found tokens int64 \(2,\)"):
        data.Document(tokens=np.zeros(2, np.int64), targets=np.zeros(2, bool))
    with pytest.raises(DataError, match="the first token is a target"):
        data.Document(tokens=np.zeros(2, np.int32), targets=np.ones(2, bool))


# ------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        ('{"text": ', "a.jsonl:1: is not JSON (Expecting value: line 1 column 10 (char 9)), expected one object"),
        ("[" * 100_000, "a.jsonl:1: is not JSON (maximum recursion depth exceeded"),
        ("\n[1]", "a.jsonl:2: found a JSON list, expected an object with 'text'"),
        (
            [{"text": "a", "id": 3}],
            "a.jsonl:1: found keys ['id', 'text'], expected an object with 'text', with 'prompt'",
        ),
        ([{}], "a.jsonl:1: found keys [], expected an object"),
        ([{"text": 3}], "a.jsonl:1: found 'text' of type int, expected a string; write one."),
        ([{"text": " \n"}], "a.jsonl:1: found an empty 'text', expected some text; fill it in, or remove it."),
        ([{"text": "\ud800"}], "a.jsonl:1: found half of a surrogate pair in 'text', expected whole characters"),
        ([{"prompt": "a", "completion": ""}], "a.jsonl:1: found an empty 'completion'"),
        ([{"prompt": None, "completion": "b"}], "a.jsonl:1: found 'prompt' of type NoneType, expected a string"),
        ([{"messages": []}], "a.jsonl:1: found no messages, expected a list of them; add one, or remove the line."),
        ([{"messages": {}}], "a.jsonl:1: found no messages"),
        ([{"messages": ["a"]}], "a.jsonl:1: messages[0]: found a JSON str, expected 'role' and 'content'"),
        (
            [{"messages": [{"role": "user"}]}],
            "a.jsonl:1: messages[0]: found keys ['role'], expected 'role' and 'content'",
        ),
        ([chat("a", "")], "a.jsonl:1: messages[1]: found an empty 'content'"),
        ([chat("a")], "a.jsonl:1: found no message of the assistant, expected one to learn from"),
        ([chat("a", roles=["assistant"])], "a.jsonl:1: found the assistant's message first, expected what it answers"),
        (
            [chat("a", "b", "c", roles=["user", "robot", "assistant"])],
            "a.jsonl:1: found the role 'robot', expected one that the chat template knows, for it leaves such",
        ),
        ("", "a.jsonl: is empty, expected JSON objects; write one per line, or leave the file out."),
        (b'{"text": "a"}\n{"text": "\xff"}', "a.jsonl:2: found byte 0xff, expected UTF-8; convert the file to UTF-8."),
    ],
)
def test_a_bad_line_is_named(write, tokenizer, lines, expected):
    with pytest.raises(DataError, match=re.escape(expected)):
        read(write(lines), tokenizer)


def test_bad_files_are_named(write, tmp_path, tokenizer):
    empty = write("", "a.txt")
    with pytest.raises(DataError) as caught:
        data.read_documents([tmp_path / "none.txt", tmp_path, empty], tokenizer, disable=True)
    assert str(caught.value).splitlines() == [
        f"{tmp_path / 'none.txt'}: is not there, expected a file; correct the path.",
        f"{tmp_path}: cannot be read (Is a directory), expected a file; correct the path or its rights.",
        f"{empty}: found an empty 'text', expected some text; fill it in, or remove it.",
    ]
    with pytest.raises(DataError, match=r"data: found no file, expected at least one; name the files to read\."):
        data.read_documents([], tokenizer)


def test_all_problems_come_together(write, tokenizer):
    bad = write([{"text": "fine"}, {"test": "a"}, chat("a"), {"text": ""}])
    worse = write("{", "b.json")
    with pytest.raises(DataError) as caught:
        data.load([bad], tokenizer, sequence_length=8, seed=0, eval_paths=[worse], disable=True)
    assert [line.split(": ")[0] for line in str(caught.value).splitlines()] == [
        f"{bad}:2",
        f"{bad}:3",
        f"{bad}:4",
        f"{worse}:1",
    ]


def test_a_text_with_nothing_to_learn_is_named(write):
    with pytest.raises(DataError, match=r"a.txt: found 1 tokens and none to learn, expected one that follows another"):
        read(write("a", "a.txt"), make_tokenizer(adds_bos=False, eos=None))


def test_a_tokenizer_without_chat_template_is_named_once(write):
    path = write([chat("a", "b"), chat("a", "b")])
    with pytest.raises(DataError) as caught:
        read(path, make_tokenizer(chat=None))
    assert str(caught.value) == (
        f"tokenizer: has no chat template, expected one for the messages in {path}:1; add chat_template.jinja to the "
        "model's directory, or write 'prompt' and 'completion' instead."
    )


def test_a_template_that_refuses_is_quoted(write):
    tokenizer = make_tokenizer(chat="{{ raise_exception('roles must alternate') }}")
    expected = r"a.jsonl:1: found messages with the roles \['user', 'assistant'\], .*\(it says: roles must alternate\)"
    with pytest.raises(DataError, match=expected):
        read(write([chat("a", "b")]), tokenizer)


def test_a_template_that_changes_the_prompt_is_refused(write):
    tokenizer = make_tokenizer(chat="{{ messages | length }}{{ messages[-1].content }}")
    with pytest.raises(
        DataError, match=r"a.jsonl:1: messages\[1\]: found a chat template that renders the prompt otherwise"
    ):
        read(write([chat("a", "b")]), tokenizer)


def test_a_template_that_leaves_the_answers_out_is_refused(write):
    tokenizer = make_tokenizer(chat="{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}")
    with pytest.raises(
        DataError, match=r"^.*a\.jsonl:1: found the role 'assistant', expected one that the chat template"
    ):
        read(write([chat("a", "b"), chat("a", "b")]), tokenizer)


def test_a_slow_tokenizer_is_refused(write, tokenizer):
    class Slow:
        is_fast = False
        bos_token_id = eos_token_id = None

    with pytest.raises(
        DataError, match=r"^tokenizer: is a slow one, expected a fast one; save it with its tokenizer\.json\.$"
    ):
        data.load([write("a", "a.txt")], Slow(), sequence_length=8, seed=0, eval_paths=[write("b", "b.txt")])


def test_evaluation_data_is_not_training_data(write, tokenizer):
    path = write("The fox.", "a.txt")
    with pytest.raises(DataError, match=r"a\.txt: is both training and evaluation data"):
        data.load([path], tokenizer, sequence_length=8, seed=0, eval_paths=[path], disable=True)


# ------------------------------------------------------------------------------------------------------------ packing


@st.composite
def documents(draw, min_size=0):
    sizes = draw(st.lists(st.integers(1, 40), min_size=min_size, max_size=12))
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    made = []
    for size in sizes:
        targets = random.random(size) < random.choice([0.1, 0.5, 1.0])
        targets[0] = False
        made.append(data.Document(tokens=random.integers(0, 50, size, dtype=np.int32), targets=targets))
    return made


lengths = st.integers(2, 17)
seeds = st.integers(-(2**40), 2**70)


@settings(deadline=None)
@given(documents(), lengths, seeds)
def test_no_target_is_lost_or_learnt_twice(documents, sequence_length, seed):
    rows = data.pack(documents, sequence_length=sequence_length, seed=seed)
    expected = collections.Counter()
    for document in documents:
        for t in range(1, len(document.tokens)):
            if document.targets[t]:
                expected[document.tokens[t - 1], document.tokens[t], (t - 1) % sequence_length] += 1
    found = collections.Counter()
    for row in range(len(rows["labels"])):
        for t in range(sequence_length):
            if rows["labels"][row, t] != -100:
                found[tuple(rows[name][row, t] for name in ("input_ids", "labels", "position_ids"))] += 1
    assert found == expected


@settings(deadline=None)
@given(documents(), lengths, seeds)
def test_rows_hold_whole_pieces(documents, sequence_length, seed):
    rows = data.pack(documents, sequence_length=sequence_length, seed=seed)
    pieces = collections.Counter()
    for document in documents:
        for start in range(0, len(document.tokens), sequence_length):
            piece = slice(start, start + sequence_length)
            following = slice(start + 1, start + sequence_length + 1)
            if document.targets[following].any():
                labels = np.where(document.targets[following], document.tokens[following], -100).tolist()
                tokens = document.tokens[piece].tolist()
                pieces[tuple(tokens), tuple(labels + [-100] * (len(tokens) - len(labels)))] += 1
    found = collections.Counter()
    for row in range(len(rows["labels"])):
        inputs, labels, positions, ids = (
            rows[name][row] for name in ("input_ids", "labels", "position_ids", "document_ids")
        )
        assert (labels != -100).any()
        num_pieces = ids.max() + 1
        assert ids.tolist() == sorted(ids[ids >= 0].tolist()) + [-1] * int((ids < 0).sum())
        assert (labels[ids < 0] == -100).all()
        for piece in range(num_pieces):
            here = ids == piece
            assert positions[here].tolist() == list(range(here.sum()))
            found[tuple(inputs[here].tolist()), tuple(labels[here].tolist())] += 1
    assert found == pieces


@settings(deadline=None)
@given(documents(), lengths, seeds)
def test_no_two_rows_fit_into_one(documents, sequence_length, seed):
    used = np.sort((data.pack(documents, sequence_length=sequence_length, seed=seed)["document_ids"] >= 0).sum(1))
    assert used[:2].sum() > sequence_length or len(used) < 2


def test_rows_of_a_small_example():
    def document(*tokens):
        return data.Document(tokens=np.array(tokens, np.int32), targets=np.arange(len(tokens)) > 0)

    rows = data.pack([document(1, 2, 3, 4, 5, 6, 7)], sequence_length=4, seed=0)
    order = np.argsort(rows["input_ids"][:, 0])
    assert rows["input_ids"][order].tolist() == [[1, 2, 3, 4], [5, 6, 7, 0]]
    assert rows["labels"][order].tolist() == [[2, 3, 4, 5], [6, 7, -100, -100]]
    assert rows["position_ids"][order].tolist() == [[0, 1, 2, 3], [0, 1, 2, 0]]
    assert rows["document_ids"][order].tolist() == [[0, 0, 0, 0], [0, 0, 0, -1]]
    assert {values.dtype for values in rows.values()} == {np.dtype(np.int64)}


def test_nothing_packs_to_no_rows():
    rows = data.pack([], sequence_length=4, seed=0)
    assert {name: values.shape for name, values in rows.items()} == dict.fromkeys(rows, (0, 4))


@settings(deadline=None, max_examples=20)
@given(documents(min_size=1), seeds, st.integers(0, 9))
def test_padding_rows_teach_nothing(documents, seed, more):
    rows = data.pack(documents, sequence_length=8, seed=seed)
    before = len(rows["labels"])
    padded = data.pad_rows(rows, num_rows=before + more)
    after = len(padded["labels"])
    assert after == before + more
    assert data.num_targets(padded, np.arange(after)) == data.num_targets(rows, np.arange(before))
    assert all((padded[name][:before] == rows[name]).all() for name in rows)


def test_the_fingerprint_sees_every_value():
    rows = {"input_ids": np.arange(6).reshape(2, 3), "labels": np.arange(6).reshape(2, 3)}
    prints = {data.fingerprint(rows)}
    assert data.fingerprint({name: rows[name].copy() for name in reversed(rows)}) in prints
    for name in rows:
        for place in range(6):
            changed = rows[name].copy()
            changed.flat[place] += 1
            prints.add(data.fingerprint(rows | {name: changed}))
    prints.add(data.fingerprint({name: values.reshape(3, 2) for name, values in rows.items()}))
    assert len(prints) == 14


def test_packing_is_the_same_on_every_machine():
    tokens = np.arange(200, dtype=np.int32)
    made = [data.Document(tokens=tokens[i : i + 9], targets=np.arange(9) > 0) for i in range(0, 180, 9)]
    rows = data.pack(made, sequence_length=32, seed=3)
    assert data.fingerprint(rows)[:16] == "5f471365407e9ccb"
    assert data.step_rows(5, num_rows=7, rows_per_step=4, seed=3).tolist() == [3, 2, 0, 1]


# -------------------------------------------------------------------------------------------------------- holding out


@settings(deadline=None)
@given(documents(min_size=2), st.floats(0.01, 0.99), seeds)
def test_split_parts_documents(documents, fraction, seed):
    train, held_out = data.split(documents, fraction=fraction, seed=seed, sequence_length=64)
    assert len(held_out) == min(max(1, round(fraction * len(documents))), len(documents) - 1)
    assert sorted(map(id, train + held_out)) == sorted(map(id, documents))
    again = data.split(documents, fraction=fraction, seed=seed, sequence_length=64)
    assert [list(map(id, part)) for part in again] == [list(map(id, part)) for part in (train, held_out)]


def test_another_seed_holds_out_others():
    made = [data.Document(tokens=np.zeros(2, np.int32), targets=np.array([False, True])) for _ in range(30)]
    drawn = {
        tuple(made.index(d) for d in data.split(made, fraction=0.1, seed=seed, sequence_length=8)[1])
        for seed in range(10)
    }
    assert len(drawn) > 5 and all(len(indices) == 3 for indices in drawn)


@settings(deadline=None)
@given(st.integers(1, 4), st.integers(0, 300), st.floats(0.01, 0.24), lengths)
def test_split_cuts_the_last_rows_of_few_texts(count, extra, fraction, sequence_length):
    size = 2 * sequence_length + extra
    tokens = np.arange(size, dtype=np.int32)
    made = [data.Document(tokens=tokens, targets=tokens > 0)] * count
    train, held_out = data.split(made, fraction=fraction, seed=0, sequence_length=sequence_length)
    num_rows = size // sequence_length
    assert len(train) == len(held_out) == count
    for head, tail in zip(train, held_out, strict=True):
        assert np.concatenate([head.tokens, tail.tokens]).tolist() == tokens.tolist()
        assert len(head.tokens) == (num_rows - max(1, round(fraction * num_rows))) * sequence_length
        assert head.targets.sum() == len(head.tokens) - 1 and tail.targets.sum() == len(tail.tokens) - 1


def test_split_of_nothing_to_split():
    short = data.Document(tokens=np.zeros(15, np.int32), targets=np.arange(15) > 0)
    with pytest.raises(DataError, match="found 1 document of 15 tokens, expected two documents or a text of 16 tokens"):
        data.split([short], fraction=0.1, seed=0, sequence_length=8)
    assert data.split([short], fraction=0, seed=0, sequence_length=8) == ([short], [])
    with pytest.raises(DataError, match=r"found the fraction 1\.0, expected 0 <= fraction < 1"):
        data.split([short, short], fraction=1.0, seed=0, sequence_length=8)
    with pytest.raises(DataError, match="found the sequence length 1, expected 2 or more"):
        data.split([short, short], fraction=0.1, seed=0, sequence_length=1)


def test_load_holds_a_part_out_or_reads_it(write, tokenizer):
    path = write([{"text": f"The fox {i}."} for i in range(20)])
    whole = data.load([path], tokenizer, sequence_length=32, seed=1, held_out=0, disable=True)
    parted = data.load([str(path)], tokenizer, sequence_length=32, seed=1, disable=True)
    other = write("It is lazy.", "b.txt")
    given = data.load([path], tokenizer, sequence_length=32, seed=1, eval_paths=[other], disable=True)

    def total(rows):
        return data.num_targets(rows, np.arange(len(rows["labels"])))

    assert total(whole.held_out) == 0 and len(whole.held_out["labels"]) == 0
    assert total(parted.train) + total(parted.held_out) == total(whole.train)
    assert total(parted.held_out) > 0
    assert data.fingerprint(given.train) == data.fingerprint(whole.train) != data.fingerprint(parted.train)
    held = given.held_out["input_ids"][given.held_out["document_ids"] >= 0]
    assert tokenizer.decode(held) == "<s>It is lazy.</s>"


# ------------------------------------------------------------------------------------------------------------ batches


@settings(deadline=None)
@given(st.integers(1, 30), st.integers(1, 40), seeds, st.integers(1, 5))
def test_every_epoch_takes_every_row_once(num_rows, rows_per_step, seed, epochs):
    steps = -(-num_rows * epochs // rows_per_step)
    taken = np.concatenate(
        [data.step_rows(s, num_rows=num_rows, rows_per_step=rows_per_step, seed=seed) for s in range(steps)]
    )
    for epoch in range(epochs):
        assert sorted(taken[epoch * num_rows : (epoch + 1) * num_rows].tolist()) == list(range(num_rows))


def test_epochs_and_seeds_differ():
    orders = {
        tuple(data.step_rows(epoch, num_rows=20, rows_per_step=20, seed=seed).tolist())
        for epoch in range(5)
        for seed in (-1, 0, 1, 2**32, 2**64)
    }
    assert len(orders) == 25


def test_far_steps_cost_nothing():
    indices = data.step_rows(10**9, num_rows=1000, rows_per_step=8, seed=0)
    assert indices.shape == (8,) and indices.dtype == np.int64


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 3), seeds)
def test_microbatches_share_a_step_out(accumulation, dp_size, rows_per_micro, seed):
    count = accumulation * dp_size * rows_per_micro
    rows = {name: np.arange(100).reshape(50, 2) + i for i, name in enumerate(("input_ids", "labels"))}
    indices = data.step_rows(3, num_rows=50, rows_per_step=count, seed=seed)
    shares = [
        data.microbatches(rows, indices, accumulation=accumulation, dp_size=dp_size, dp_index=i) for i in range(dp_size)
    ]
    assert {len(share) for share in shares} == {accumulation}
    taken = [micro for share in shares for micro in share]
    for name, values in rows.items():
        assert {micro[name].shape for micro in taken} == {(rows_per_micro, 2)}
        assert {micro[name].dtype for micro in taken} == {torch.int64}
        found = torch.cat([micro[name] for micro in taken]).numpy()
        assert sorted(found.tolist()) == sorted(values[indices].tolist())


def test_batches_that_cannot_be_are_refused():
    rows = {"labels": np.zeros((4, 2), np.int64)}
    indices = np.arange(4)
    with pytest.raises(DataError, match=r"found 4 rows per step, expected a positive multiple of .* = 3 \* 1"):
        data.microbatches(rows, indices, accumulation=3, dp_size=1, dp_index=0)
    with pytest.raises(DataError, match=r"found dp_index 2, expected 0 <= dp_index < 2"):
        data.microbatches(rows, indices, accumulation=1, dp_size=2, dp_index=2)
    with pytest.raises(DataError, match="found step 0, 0 rows and 4 rows per step"):
        data.step_rows(0, num_rows=0, rows_per_step=4, seed=0)
    with pytest.raises(DataError, match="found the sequence length 0, expected 2 or more"):
        data.pack([], sequence_length=0, seed=0)


@settings(deadline=None, max_examples=30)
@given(documents(min_size=1), seeds, st.sampled_from([torch.float32, torch.bfloat16, torch.float64]))
def test_attention_stays_in_the_document(documents, seed, dtype):
    rows = data.pack(documents, sequence_length=9, seed=seed)
    rows = data.pad_rows(rows, num_rows=len(rows["labels"]) + 1)
    ids = torch.from_numpy(rows["document_ids"])
    mask = data.attention_mask(ids, dtype)
    assert mask.shape == (len(ids), 1, 9, 9) and mask.dtype == dtype
    for b in range(len(ids)):
        for query in range(9):
            for key in range(9):
                seen = key <= query and ids[b, key] == ids[b, query]
                assert mask[b, 0, query, key] == (0 if seen else torch.finfo(dtype).min)


def test_the_mask_reads_no_value():
    mask = data.attention_mask(torch.zeros(2, 5, dtype=torch.int64, device="meta"), torch.bfloat16)
    assert mask.shape == (2, 1, 5, 5) and mask.device.type == "meta"
