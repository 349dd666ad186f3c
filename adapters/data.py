"""How do files become training batches?

Files are read into documents (tokens, and which of them are to be learnt), documents are packed into rows of one
length, and each optimizer step takes rows by a pure function of the step's number. So where training stands in the
data is that number, and nothing else needs to be saved.

- A `.jsonl` or `.json` file holds one JSON object per line: `{"text"}`, `{"prompt", "completion"}` or `{"messages"}`.
  Any other file is one document of plain text.
- A document no longer than a row is never cut; a longer one is cut into pieces, and the last token of a piece still
  learns the token that the next piece begins with. Attention does not cross pieces (`document_ids`).
- Labels are shifted already: `labels[t]` is the token that follows `input_ids[t]`, or -100.
"""

from __future__ import annotations

import bisect
import functools
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch

from lora_fn.errors import DataError, Problems

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100
"""The label of a position that learns nothing."""

PADDING_ID = -1
"""The document id of padding."""

Rows = Mapping[str, np.ndarray]
"""`input_ids`, `labels`, `position_ids` and `document_ids`, each [N, S] int64."""

_FILLERS = {"input_ids": 0, "labels": IGNORED, "position_ids": 0, "document_ids": PADDING_ID}
_JSON_SUFFIXES = (".jsonl", ".json")
_ENCODED_AT_ONCE = 256


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Document:
    """Tokens that attend to each other.

    Args:
        tokens: [n] int32.
        targets: [n] bool, true where the token is to be predicted from those before it. False for the first token,
            which has none before it.

    Raises:
        DataError: when the shapes or dtypes are others, or the first token is a target.
    """

    tokens: np.ndarray
    targets: np.ndarray

    def __post_init__(self) -> None:
        found = (self.tokens.dtype, self.tokens.ndim, self.targets.dtype, self.targets.shape)
        if found != (np.dtype(np.int32), 1, np.dtype(bool), self.tokens.shape):
            raise DataError(
                f"document: found tokens {self.tokens.dtype} {self.tokens.shape} and targets {self.targets.dtype} "
                f"{self.targets.shape}, expected int32 [n] and bool [n]; convert them."
            )
        if self.targets[:1].any():
            raise DataError(
                "document: the first token is a target, expected a token before every target; set targets[0] to False."
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingData:
    """What one training run reads: rows to learn from, and rows to measure the loss on."""

    train: Rows
    held_out: Rows


@dataclass(frozen=True, slots=True, kw_only=True)
class _Draft:
    """A document before tokenisation. `spans`: the characters to learn. `before`, `after`: tokens at its ends."""

    where: str
    text: str
    spans: tuple[tuple[int, int], ...]
    before: tuple[int, ...]
    after: tuple[int, ...]


# ---------------------------------------------------------------------------------------------------------- reading


def load(
    paths: Sequence[str | Path],
    tokenizer: PreTrainedTokenizerBase,
    *,
    sequence_length: int,
    seed: int,
    held_out: float = 0.1,
    eval_paths: Sequence[str | Path] = (),
    disable: bool = False,
) -> TrainingData:
    """Read files, hold a part out, and pack both.

    Args:
        paths: files to train on.
        tokenizer: a fast tokenizer of transformers.
        sequence_length: tokens per row, S.
        seed: decides what is held out, and what is packed with what.
        held_out: fraction that is held out (see `split`); not used when `eval_paths` are given.
        eval_paths: files to measure the loss on, instead of a held-out part.
        disable: show no progress bar.

    Returns:
        Rows [N, S] to train on, and rows [M, S] held out; M is 0 when nothing is.

    Raises:
        DataError: with every problem of every file, or when nothing can be held out.
    """
    problems = Problems(DataError)
    for path in sorted({Path(path).resolve() for path in eval_paths} & {Path(path).resolve() for path in paths}):
        problems.add(
            str(path), "is both training and evaluation data, expected one of them; leave it out of the other."
        )
    reader = _make_reader(paths, tokenizer, problems)
    drafts, eval_drafts = reader.read_files(paths), reader.read_files(eval_paths)
    problems.raise_if_any()
    documents = _encode(drafts, tokenizer, problems, disable=disable)
    eval_documents = _encode(eval_drafts, tokenizer, problems, disable=disable)
    problems.raise_if_any()
    if not eval_paths:
        documents, eval_documents = split(documents, fraction=held_out, seed=seed, sequence_length=sequence_length)
    return TrainingData(
        train=pack(documents, sequence_length=sequence_length, seed=seed),
        held_out=pack(eval_documents, sequence_length=sequence_length, seed=seed),
    )


def read_documents(
    paths: Sequence[str | Path], tokenizer: PreTrainedTokenizerBase, *, disable: bool = False
) -> list[Document]:
    """Read and tokenise files.

    Text and prompts begin with the tokenizer's bos token if it adds one by default; text and completions end with its
    eos token if it has one, which is a target. Messages have what the chat template writes. A token is a target when
    its last character lies in what is to be learnt: all of a text, a completion, the answers of the assistant.

    Where a chat template renders an answer otherwise once the conversation goes on (Qwen3 drops its reasoning), the
    conversation becomes several documents, each ending in an answer as the model would have to give it.

    Args:
        paths: files, each UTF-8.
        tokenizer: a fast tokenizer of transformers.
        disable: show no progress bar.

    Returns:
        Documents in the order of the files and of their lines; each has a target.

    Raises:
        DataError: with every problem, as `file:line`.
    """
    problems = Problems(DataError)
    drafts = _make_reader(paths, tokenizer, problems).read_files(paths)
    problems.raise_if_any()
    documents = _encode(drafts, tokenizer, problems, disable=disable)
    problems.raise_if_any()
    return documents


def _make_reader(paths: Sequence[str | Path], tokenizer: PreTrainedTokenizerBase, problems: Problems) -> _Reader:
    if not paths:
        problems.add("data", "found no file, expected at least one; name the files to read.")
    before, after = _edge_tokens(tokenizer)
    return _Reader(tokenizer=tokenizer, problems=problems, before=before, after=after, asked=set())


@dataclass(frozen=True, slots=True, kw_only=True)
class _Reader:
    """Turns files into drafts and collects what is wrong.

    Args:
        tokenizer: whose chat template renders messages.
        problems: where to note them.
        before: tokens that a text begins with.
        after: tokens that a text ends with.
        asked: roles that the template was asked about already, and "tokenizer" once that was refused.
    """

    tokenizer: PreTrainedTokenizerBase
    problems: Problems
    before: tuple[int, ...]
    after: tuple[int, ...]
    asked: set[str]

    def read_files(self, paths: Sequence[str | Path]) -> list[_Draft]:
        if not self.tokenizer.is_fast:
            return self.refuse_once("tokenizer", "is a slow one, expected a fast one; save it with its tokenizer.json.")
        return [draft for path in paths for draft in self.read_file(Path(path))]

    def read_file(self, path: Path) -> list[_Draft]:
        where = str(path)
        try:
            text = path.read_bytes().decode("utf-8-sig")
        except FileNotFoundError:
            return self.refuse(where, "is not there, expected a file; correct the path.")
        except OSError as error:
            return self.refuse(
                where, f"cannot be read ({error.strerror}), expected a file; correct the path or its rights."
            )
        except UnicodeDecodeError as error:
            line = error.object.count(b"\n", 0, error.start) + 1
            return self.refuse(
                f"{where}:{line}",
                f"found byte 0x{error.object[error.start]:02x}, expected UTF-8; convert the file to UTF-8.",
            )
        if path.suffix.lower() not in _JSON_SUFFIXES:
            return self.read_text(where, {"text": text})
        # Only "\n" ends a line: JSON strings may hold the other separators that str.splitlines would cut at.
        lines = [(number, line) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]
        if not lines:
            return self.refuse(where, "is empty, expected JSON objects; write one per line, or leave the file out.")
        return [draft for number, line in lines for draft in self.read_line(f"{where}:{number}", line)]

    def read_line(self, where: str, line: str) -> list[_Draft]:
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            return self.refuse(where, f"is not JSON ({error}), expected one object per line; correct the line.")
        keys = frozenset(record) if isinstance(record, dict) else frozenset()
        if keys not in _RECORDS:
            found = f"keys {sorted(keys)}" if isinstance(record, dict) else f"a JSON {type(record).__name__}"
            return self.refuse(
                where,
                f"found {found}, expected an object with 'text', with 'prompt' and 'completion', or with 'messages'; "
                "rename the keys and remove the others.",
            )
        return _RECORDS[keys](self, where, record)

    def read_text(self, where: str, record: dict[str, Any]) -> list[_Draft]:
        if not self.is_text(where, record, "text", filled=True):
            return []
        text = record["text"]
        return [_Draft(where=where, text=text, spans=((0, len(text)),), before=self.before, after=self.after)]

    def read_completion(self, where: str, record: dict[str, Any]) -> list[_Draft]:
        filled = self.is_text(where, record, "completion", filled=True)
        if not self.is_text(where, record, "prompt", filled=False) or not filled:
            return []
        text = record["prompt"] + record["completion"]
        spans = ((len(record["prompt"]), len(text)),)
        return [_Draft(where=where, text=text, spans=spans, before=self.before, after=self.after)]

    def read_messages(self, where: str, record: dict[str, Any]) -> list[_Draft]:
        messages = record["messages"]
        if not isinstance(messages, list) or not messages:
            return self.refuse(where, "found no messages, expected a list of them; add one, or remove the line.")
        sound = [self.is_message(f"{where}: messages[{i}]", message) for i, message in enumerate(messages)]
        if not all(sound):
            return []
        answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        if not answers:
            return self.refuse(
                where, "found no message of the assistant, expected one to learn from; add one, or remove the line."
            )
        if answers[0] == 0:
            return self.refuse(
                where, "found the assistant's message first, expected what it answers; add a message of the user."
            )
        if not self.tokenizer.chat_template:
            return self.refuse_once(
                "tokenizer",
                f"has no chat template, expected one for the messages in {where}; add chat_template.jinja to the "
                "model's directory, or write 'prompt' and 'completion' instead.",
            )
        try:
            return self.render_answers(where, messages, answers)
        except Exception as error:  # a template is somebody else's program, and may raise anything
            return self.refuse(
                where,
                f"found messages with the roles {[message['role'] for message in messages]}, expected such as the chat "
                f"template renders (it says: {error}); change the messages or the template.",
            )

    def render_answers(self, where: str, messages: list[dict[str, str]], answers: list[int]) -> list[_Draft]:
        self.ask_about_roles(where, messages[: answers[-1] + 1])
        texts: list[str] = []
        spans: list[list[tuple[int, int]]] = []
        for i in answers:
            prompt = self.render(messages[:i], add_generation_prompt=True)
            text = self.render(messages[: i + 1])
            if not text.startswith(prompt):
                return self.refuse(
                    f"{where}: messages[{i}]",
                    "found a chat template that renders the prompt otherwise once the answer follows, expected the "
                    "prompt to stay as it is; correct the template, or write 'prompt' and 'completion' instead.",
                )
            if texts and text.startswith(texts[-1]):
                texts[-1] = text
            else:
                texts.append(text)
                spans.append([])
            spans[-1].append((len(prompt), len(text)))
        return [
            _Draft(where=where, text=text, spans=tuple(learnt), before=(), after=())
            for text, learnt in zip(texts, spans, strict=True)
        ]

    def ask_about_roles(self, where: str, messages: list[dict[str, str]]) -> None:
        """Note each role whose messages the template leaves out without a word."""
        for role in dict.fromkeys(message["role"] for message in messages):
            if role in self.asked:
                continue
            self.asked.add(role)
            changed = [m | {"content": m["content"] + " x"} if m["role"] == role else m for m in messages]
            if self.render(changed) == self.render(messages):
                self.problems.add(
                    where,
                    f"found the role {role!r}, expected one that the chat template knows, for it leaves such messages "
                    "out; rename the role.",
                )

    def render(self, messages: list[dict[str, str]], *, add_generation_prompt: bool = False) -> str:
        text = self.tokenizer.apply_chat_template(messages, add_generation_prompt=add_generation_prompt, tokenize=False)
        assert isinstance(text, str)
        return text

    def is_message(self, where: str, message: object) -> bool:
        if not isinstance(message, dict) or set(message) != {"role", "content"}:
            found = f"keys {sorted(message)}" if isinstance(message, dict) else f"a JSON {type(message).__name__}"
            self.problems.add(where, f"found {found}, expected 'role' and 'content'; write these two only.")
            return False
        role = self.is_text(where, message, "role", filled=True)
        return self.is_text(where, message, "content", filled=message["role"] == "assistant") and role

    def is_text(self, where: str, record: dict[str, Any], key: str, *, filled: bool) -> bool:
        value = record[key]
        if not isinstance(value, str):
            self.problems.add(where, f"found {key!r} of type {type(value).__name__}, expected a string; write one.")
            return False
        if filled and not value.strip():
            self.problems.add(where, f"found an empty {key!r}, expected some text; fill it in, or remove it.")
            return False
        if not _is_encodable(value):
            self.problems.add(
                where, f"found half of a surrogate pair in {key!r}, expected whole characters; correct the escape."
            )
            return False
        return True

    def refuse(self, where: str, message: str) -> list[_Draft]:
        self.problems.add(where, message)
        return []

    def refuse_once(self, where: str, message: str) -> list[_Draft]:
        if where not in self.asked:
            self.asked.add(where)
            self.problems.add(where, message)
        return []


_RECORDS: dict[frozenset[str], Callable[[_Reader, str, dict[str, Any]], list[_Draft]]] = {
    frozenset({"text"}): _Reader.read_text,
    frozenset({"prompt", "completion"}): _Reader.read_completion,
    frozenset({"messages"}): _Reader.read_messages,
}


def _is_encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _edge_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The tokens that a document of text begins and ends with: bos if the tokenizer adds one, eos if it has one."""
    bos = cast("int | None", tokenizer.bos_token_id)
    eos = cast("int | None", tokenizer.eos_token_id)
    before = () if bos is None or tokenizer("a")["input_ids"][:1] != [bos] else (bos,)
    return before, () if eos is None else (eos,)


def prompt_tokens(prompt: str, tokenizer: PreTrainedTokenizerBase, *, chat: bool = False) -> list[int]:
    """The tokens of a prompt, as documents begin with them (see `read_documents`).

    Args:
        prompt: Text; with `chat`, what the user says.
        tokenizer: Of transformers.
        chat: Render it with the chat template.

    Raises:
        DataError: A text that has no tokens, or no chat template, or one that does not take it.
    """
    text, before = prompt, _edge_tokens(tokenizer)[0]
    if chat and not tokenizer.chat_template:
        raise DataError(
            "tokenizer: has no chat template, expected one for --chat; add chat_template.jinja to the model's "
            "directory."
        )
    if chat:
        said, before = [{"role": "user", "content": prompt}], ()
        try:
            text = str(tokenizer.apply_chat_template(said, add_generation_prompt=True, tokenize=False))
        except Exception as error:  # a template is somebody else's program, and may raise anything
            raise DataError(f"tokenizer: its chat template does not take a prompt ({error}); correct it.") from error
    found = list(before) + tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    if not found or not prompt:
        raise DataError(f"prompt {prompt!r}: has no tokens, expected some to go on from; write more.")
    return found


def _encode(
    drafts: Sequence[_Draft], tokenizer: PreTrainedTokenizerBase, problems: Problems, *, disable: bool
) -> list[Document]:
    from tqdm import tqdm

    documents = []
    with tqdm(total=len(drafts), desc="tokenise", unit=" documents", disable=disable) as bar:
        for start in range(0, len(drafts), _ENCODED_AT_ONCE):
            chunk = drafts[start : start + _ENCODED_AT_ONCE]
            encoded = tokenizer(
                [draft.text for draft in chunk],
                add_special_tokens=False,
                return_attention_mask=False,
                return_token_type_ids=False,
                return_offsets_mapping=not all(_is_whole(draft) for draft in chunk),
                verbose=False,
            )
            for i, draft in enumerate(chunk):
                tokens = np.array(encoded["input_ids"][i], dtype=np.int32)
                targets = (
                    np.ones(len(tokens), dtype=bool)
                    if _is_whole(draft)
                    else _targets(np.array(encoded["offset_mapping"][i]).reshape(-1, 2)[:, 1], draft.spans)
                )
                document = _close(draft, tokens, targets)
                if not document.targets.any():
                    problems.add(
                        draft.where,
                        f"found {len(document.tokens)} tokens and none to learn, expected one that follows another; "
                        "write more text, or remove it.",
                    )
                documents.append(document)
            bar.update(len(chunk))
    return documents


def _is_whole(draft: _Draft) -> bool:
    return draft.spans == ((0, len(draft.text)),)


def _targets(ends: np.ndarray, spans: Sequence[tuple[int, int]]) -> np.ndarray:
    """Which tokens are to be learnt.

    The last character decides: byte-level tokenizers report a token's leading spaces as outside of it, or not, and a
    token that joins the end of a prompt to the answer has to be learnt, or a part of the answer never would be.

    Args:
        ends: [n] where each token ends, in characters.
        spans: first character to learn, and the one after the last.

    Returns:
        [n] bool.
    """
    targets = np.zeros(len(ends), dtype=bool)
    for start, stop in spans:
        targets |= (ends > start) & (ends <= stop)
    return targets


def _close(draft: _Draft, tokens: np.ndarray, targets: np.ndarray) -> Document:
    """Put the draft's edge tokens on, unless the text has them written out."""
    before = () if tuple(tokens[: len(draft.before)]) == draft.before else draft.before
    after = () if tuple(tokens[max(len(tokens) - len(draft.after), 0) :]) == draft.after else draft.after
    targets = np.concatenate([np.zeros(len(before), bool), targets, np.ones(len(after), bool)])
    targets[:1] = False
    return Document(
        tokens=np.concatenate([np.array(before, np.int32), tokens, np.array(after, np.int32)]), targets=targets
    )


# ---------------------------------------------------------------------------------------------------------- holding out


def split(
    documents: Sequence[Document], *, fraction: float, seed: int, sequence_length: int
) -> tuple[list[Document], list[Document]]:
    """Hold a part of the documents out of training.

    Of many documents, some are drawn. Of documents fewer than 1 / fraction that are texts of two rows or more (one
    book, say), the last rows of each are held out instead.

    Args:
        documents: what was read.
        fraction: of the documents, or of the rows of each text; at least one is held out, unless it is 0.
        seed: decides which documents are drawn.
        sequence_length: tokens per row.

    Returns:
        The documents to train on, and those held out, each in the given order.

    Raises:
        DataError: when the fraction is not in [0, 1), `sequence_length` is below 2, or there is but one document, which
            is no text of two rows.
    """
    _check_length(sequence_length)
    if not 0 <= fraction < 1:
        raise DataError(f"held-out part: found the fraction {fraction}, expected 0 <= fraction < 1; choose such a one.")
    if fraction == 0:
        return list(documents), []
    if len(documents) * fraction < 1 and documents and all(_is_cuttable(d, sequence_length) for d in documents):
        cut = [_cut(document, fraction=fraction, sequence_length=sequence_length) for document in documents]
        return [head for head, _ in cut], [tail for _, tail in cut]
    if len(documents) < 2:
        size = sum(len(document.tokens) for document in documents)
        raise DataError(
            f"held-out part: found {len(documents)} document of {size} tokens, expected two documents or a text of "
            f"{2 * sequence_length} tokens; add data, name evaluation files, or choose the fraction 0."
        )
    count = min(max(1, round(fraction * len(documents))), len(documents) - 1)
    drawn = set(_order(len(documents), "split", 0, seed)[:count].tolist())
    train = [document for i, document in enumerate(documents) if i not in drawn]
    return train, [document for i, document in enumerate(documents) if i in drawn]


def _is_cuttable(document: Document, sequence_length: int) -> bool:
    return len(document.tokens) >= 2 * sequence_length and bool(document.targets[1:].all())


def _cut(document: Document, *, fraction: float, sequence_length: int) -> tuple[Document, Document]:
    num_rows = len(document.tokens) // sequence_length
    at = (num_rows - min(max(1, round(fraction * num_rows)), num_rows - 1)) * sequence_length
    targets = document.targets[at:].copy()
    targets[:1] = False
    return (
        Document(tokens=document.tokens[:at], targets=document.targets[:at]),
        Document(tokens=document.tokens[at:], targets=targets),
    )


# -------------------------------------------------------------------------------------------------------------- packing


def pack(documents: Sequence[Document], *, sequence_length: int, seed: int) -> dict[str, np.ndarray]:
    """Put documents into rows of one length.

    Documents longer than a row are cut. In shuffled order, each piece goes to the row with the least room that has
    enough of it. A piece with nothing to learn is left out, for no other piece sees it; so every row has a target.

    Args:
        documents: what to pack.
        sequence_length: tokens per row, S.
        seed: decides the order.

    Returns:
        `input_ids`, `labels`, `position_ids` (from 0 in each piece) and `document_ids` (from 0 in each row), each
        [N, S] int64. Padding is at the end of a row, with document id -1 and label -100.

    Raises:
        DataError: when `sequence_length` is below 2.
    """
    _check_length(sequence_length)
    pieces = [piece for document in documents for piece in _pieces(document, sequence_length)]
    order = _order(len(pieces), "pack", 0, seed).tolist()
    places, num_rows = _places([len(pieces[i][0]) for i in order], sequence_length)
    rows = {name: np.full((num_rows, sequence_length), filler, np.int64) for name, filler in _FILLERS.items()}
    positions = np.arange(sequence_length)
    for i, (row, column, document_id) in zip(order, places, strict=True):
        tokens, labels = pieces[i]
        here = slice(column, column + len(tokens))
        rows["input_ids"][row, here] = tokens
        rows["labels"][row, here] = labels
        rows["position_ids"][row, here] = positions[: len(tokens)]
        rows["document_ids"][row, here] = document_id
    return rows


def _pieces(document: Document, sequence_length: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Tokens and shifted labels, cut to the length of a row, where there is something to learn."""
    labels = np.full(len(document.tokens), IGNORED, np.int32)
    labels[:-1] = np.where(document.targets[1:], document.tokens[1:], IGNORED)
    for start in range(0, len(labels), sequence_length):
        here = slice(start, start + sequence_length)
        if (labels[here] != IGNORED).any():
            yield document.tokens[here], labels[here]


def _places(lengths: Sequence[int], sequence_length: int) -> tuple[list[tuple[int, int, int]], int]:
    """Row, column and number within the row of each piece, by best fit; and how many rows there are."""
    places = []
    num_rows = 0
    room: list[tuple[int, int, int]] = []  # of each row that is not full, sorted: free tokens, row, pieces so far
    for length in lengths:
        at = bisect.bisect_left(room, (length, -1, -1))
        if at < len(room):
            free, row, count = room.pop(at)
        else:
            free, row, count = sequence_length, num_rows, 0
            num_rows += 1
        places.append((row, sequence_length - free, count))
        if free > length:
            bisect.insort(room, (free - length, row, count + 1))
    return places, num_rows


def pad_rows(rows: Rows, *, multiple: int) -> dict[str, np.ndarray]:
    """Add rows of padding, so that evaluation can share all rows out evenly.

    Args:
        rows: each [N, S].
        multiple: what the number of rows is to be a multiple of.

    Returns:
        New rows, each [N', S], with N' >= N the next multiple; the added ones have no target.
    """
    missing = -len(rows["labels"]) % multiple
    return {
        name: np.concatenate([rows[name], np.full((missing, rows[name].shape[1]), filler, np.int64)])
        for name, filler in _FILLERS.items()
    }


def fingerprint(rows: Rows) -> str:
    """A name for the content of the rows, to refuse to resume a run with other data.

    Args:
        rows: each [N, S].

    Returns:
        SHA-256 over names, shapes and values, as 64 hexadecimal digits.
    """
    digest = hashlib.sha256()
    for name in sorted(rows):
        digest.update(f"{name} {rows[name].shape}\n".encode())
        digest.update(np.ascontiguousarray(rows[name], dtype="<i8").data)
    return digest.hexdigest()


# -------------------------------------------------------------------------------------------------------------- batches


def step_rows(step: int, *, num_rows: int, rows_per_step: int, seed: int) -> np.ndarray:
    """Which rows an optimizer step takes.

    Every epoch is a permutation of all rows; steps run on across the end of an epoch, so that no row is left out.

    Args:
        step: number of the step, from 0.
        num_rows: rows that there are, N.
        rows_per_step: rows of all microbatches and data-parallel processes together.
        seed: decides the permutations.

    Returns:
        [rows_per_step] int64, indices into the rows: a pure function of the arguments.

    Raises:
        DataError: when there are no rows, or none per step.

    Example:
        >>> sorted(step_rows(0, num_rows=3, rows_per_step=3, seed=0).tolist())
        [0, 1, 2]
    """
    if num_rows < 1 or rows_per_step < 1 or step < 0:
        raise DataError(
            f"batches: found step {step}, {num_rows} rows and {rows_per_step} rows per step, expected step >= 0 and "
            "at least one of each; add data, or take more rows per step."
        )
    places = np.arange(step * rows_per_step, (step + 1) * rows_per_step)
    epochs = places // num_rows
    indices = np.empty(rows_per_step, np.int64)
    for epoch in range(int(epochs[0]), int(epochs[-1]) + 1):
        here = epochs == epoch
        indices[here] = _order(num_rows, "epoch", epoch, seed)[places[here] % num_rows]
    return indices


def microbatches(
    rows: Rows, indices: np.ndarray, *, accumulation: int, dp_size: int, dp_index: int
) -> list[dict[str, torch.Tensor]]:
    """Cut the rows of a step into the microbatches of one data-parallel process.

    Args:
        rows: each [N, S].
        indices: [rows_per_step] the rows of the step.
        accumulation: microbatches per step.
        dp_size: data-parallel processes.
        dp_index: which of them this is.

    Returns:
        `accumulation` dicts with the names of `rows`, each tensor [rows_per_step / accumulation / dp_size, S] int64.

    Raises:
        DataError: when the rows cannot be shared out evenly, or there is no such process.
    """
    if accumulation < 1 or dp_size < 1 or len(indices) % (accumulation * dp_size):
        raise DataError(
            f"batches: found {len(indices)} rows per step, expected a positive multiple of accumulation * dp_size = "
            f"{accumulation} * {dp_size}; change one of them."
        )
    if not 0 <= dp_index < dp_size:
        raise DataError(f"batches: found dp_index {dp_index}, expected 0 <= dp_index < {dp_size}; pass such a one.")
    shares = np.asarray(indices).reshape(accumulation, dp_size, -1)[:, dp_index]
    return [{name: torch.from_numpy(values[share]) for name, values in rows.items()} for share in shares]


def num_targets(rows: Rows, indices: np.ndarray) -> int:
    """How many tokens a step learns, over all microbatches and data-parallel processes: what its loss is divided by.

    Args:
        rows: each [N, S].
        indices: [rows_per_step] the rows of the step.

    Returns:
        The number of labels that are not -100.
    """
    return int((rows["labels"][indices] != IGNORED).sum())


def attention_mask(document_ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What each token may see: itself, and the tokens before it in the same document.

    Args:
        document_ids: [B, S] integers.
        dtype: floating point.

    Returns:
        [B, 1, S, S] of `dtype`, query by key: 0 where the key may be seen, the dtype's lowest value elsewhere. Made of
        tensor operations only, so that nothing is read back from a device.
    """
    places = torch.arange(document_ids.shape[1], device=document_ids.device)
    seen = (document_ids[:, :, None] == document_ids[:, None, :]) & (places[None, :] <= places[:, None])
    mask = torch.zeros(seen.shape, dtype=dtype, device=document_ids.device)
    return mask.masked_fill(~seen, torch.finfo(dtype).min)[:, None]


def _check_length(sequence_length: int) -> None:
    if sequence_length < 2:
        raise DataError(
            f"packing: found the sequence length {sequence_length}, expected 2 or more; choose a longer one."
        )


@functools.lru_cache(maxsize=4)
def _order(count: int, purpose: str, epoch: int, seed: int) -> np.ndarray:
    """A permutation [count] int64, the same on every machine.

    It sorts the raw words of PCG64: NumPy promises these for all of its versions, but not what `permutation` makes of
    them.
    """
    words = np.frombuffer(hashlib.sha256(f"{purpose} {epoch} {seed}".encode()).digest(), dtype="<u4")
    order = np.argsort(np.random.PCG64(np.random.SeedSequence(words.tolist())).random_raw(count), kind="stable")
    order.flags.writeable = False
    return order
