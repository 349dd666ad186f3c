"""A small Llama checkpoint to try things on, made here from what Python ships with: nothing is downloaded.

    python examples/small_llama.py OUTPUT_DIR

takes about a minute on two CPU cores. The model learns Python's reference documentation (`corpus`) and nothing of
Python source code (`other_corpus`), so that fine-tuning it on the second has something to gain. The tokenizer saw
both. What is written is an ordinary Hugging Face checkpoint: config, safetensors, fast tokenizer with chat template.
"""

import argparse
import importlib.util
import json
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from pydoc_data.topics import topics

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from tqdm import trange
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, get_cosine_schedule_with_warmup

BOS, EOS, PAD = SPECIAL_TOKENS = ("<s>", "</s>", "<pad>")
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}{{ message['role'] + ':\n' + message['content'] + '\n\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:\n' }}{% endif %}"
)
MODULES = (
    "argparse",
    "calendar",
    "collections",
    "configparser",
    "contextlib",
    "csv",
    "dataclasses",
    "enum",
    "functools",
    "json.decoder",
    "json.encoder",
    "shutil",
    "textwrap",
    "zipfile",
)
REPORT = "small_llama.json"
PROMPT = "When a class is defined"


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """What `make` does, as data: sizes, schedule and seed. The same recipe on the same machine gives the same model."""

    vocab_size: int = 1536
    hidden_size: int = 128
    intermediate_size: int = 384
    num_hidden_layers: int = 4
    num_attention_heads: int = 8
    num_key_value_heads: int = 4
    initializer_range: float = 0.06
    steps: int = 1000
    batch_size: int = 4
    length: int = 128
    learning_rate: float = 4e-3
    warmup_steps: int = 50
    weight_decay: float = 0.1
    seed: int = 0
    threads: int = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What came out: counts, mean held-out losses in nats per token (see `evaluate`), and seconds of training."""

    parameters: int
    tokens: int
    tokens_seen: int
    loss_before: float
    loss_after: float
    other_loss: float
    seconds: float


def corpus() -> str:
    """Python's reference documentation as one text: English, each paragraph once, in a fixed order."""
    paragraphs = (paragraph for name in sorted(topics) for paragraph in topics[name].split("\n\n"))
    return "\n\n".join(dict.fromkeys(paragraphs))


def other_corpus() -> str:
    """Source code of the standard library (`MODULES`) as one text: the kind of text that the model has not learned."""
    return "\n\n".join(source(name) for name in MODULES)


def source(module: str) -> str:
    """The source code of a module of the standard library.

    Raises:
        ModuleNotFoundError: this Python comes without it.
    """
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(f"this Python has no source code of {module}")
    return Path(spec.origin).read_text(encoding="utf-8")


def split(text: str, *, size: int = 4000, every: int = 10) -> tuple[list[str], list[str]]:
    """Cut a text into documents between paragraphs, and hold some of them out.

    Args:
        text: paragraphs separated by empty lines.
        size: characters, at least, of each document but the last.
        every: one document in so many is held out.

    Returns:
        The documents to train on and those held out, each in the order of the text.
    """
    documents, current, count = [], [], 0
    for paragraph in text.split("\n\n"):
        current.append(paragraph)
        count += len(paragraph)
        if count >= size:
            documents.append("\n\n".join(current))
            current, count = [], 0
    if current:
        documents.append("\n\n".join(current))
    held_out = documents[every // 2 :: every]
    return [document for i, document in enumerate(documents) if i % every != every // 2], held_out


def train_tokenizer(texts: Sequence[str], *, vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer that, like Llama's, puts a `<s>` before every text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def pack(documents: Sequence[str], tokenizer: PreTrainedTokenizerFast) -> torch.Tensor:
    """Tokenise documents and put them end to end, each as `<s> ... </s>`.

    Returns:
        Token ids, int64 [tokens].
    """
    return torch.tensor([i for ids in tokenizer(list(documents))["input_ids"] for i in (*ids, tokenizer.eos_token_id)])


@torch.no_grad()
def evaluate(model: LlamaForCausalLM, stream: torch.Tensor, *, length: int) -> float:
    """Mean loss of a model over a stream of token ids, in nats per token.

    Args:
        model: a causal language model.
        stream: token ids, int64 [tokens], cut into windows of `length`; what is left over at the end is not used.
        length: tokens per window.
    """
    windows = stream[: len(stream) // length * length].view(-1, length)
    losses = [model(input_ids=window, labels=window).loss.item() * len(window) for window in windows.split(16)]
    return sum(losses) / len(windows)


def train(model: LlamaForCausalLM, stream: torch.Tensor, recipe: Recipe) -> None:
    """Train a model in place on random windows of a stream of token ids, int64 [tokens]; show a progress bar."""
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=recipe.learning_rate, betas=(0.9, 0.95), weight_decay=recipe.weight_decay, fused=True
    )
    schedule = get_cosine_schedule_with_warmup(optimizer, recipe.warmup_steps, recipe.steps)
    windows = random_windows(stream, recipe)
    for _ in (progress := trange(recipe.steps, desc="train", unit="step")):
        batch = next(windows)
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        progress.set_postfix(loss=f"{loss.item():.3f}")


def random_windows(stream: torch.Tensor, recipe: Recipe) -> Iterator[torch.Tensor]:
    """Batches of windows that together pass over the whole stream, from a new offset and in a new order each time.

    Args:
        stream: token ids, int64 [tokens], longer than a batch and a window.
        recipe: its batch_size, length and seed.

    Yields:
        Token ids, int64 [batch_size, length], without end.
    """
    generator = torch.Generator().manual_seed(recipe.seed)
    while True:
        offset = int(torch.randint(recipe.length, (), generator=generator))
        windows = stream[offset:].unfold(0, recipe.length, recipe.length)
        order = torch.randperm(len(windows), generator=generator)
        yield from windows[order[: len(order) // recipe.batch_size * recipe.batch_size]].split(recipe.batch_size)


def new_model(recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A Llama in float32 with random weights, of the recipe's sizes."""
    config = LlamaConfig(
        vocab_size=recipe.vocab_size,
        hidden_size=recipe.hidden_size,
        intermediate_size=recipe.intermediate_size,
        num_hidden_layers=recipe.num_hidden_layers,
        num_attention_heads=recipe.num_attention_heads,
        num_key_value_heads=recipe.num_key_value_heads,
        initializer_range=recipe.initializer_range,
        max_position_embeddings=1024,
        tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config).float()


def build(directory: Path, recipe: Recipe) -> None:
    """Train tokenizer and model by the recipe and save both, and the report, in a directory."""
    learned, held_out = split(corpus())
    other_learned, other_held_out = split(other_corpus())
    tokenizer = train_tokenizer(learned + other_learned, vocab_size=recipe.vocab_size)
    stream, test, other_test = (pack(documents, tokenizer) for documents in (learned, held_out, other_held_out))
    model = new_model(recipe, tokenizer)
    loss_before = evaluate(model, test, length=recipe.length)
    start = time.perf_counter()
    train(model, stream, recipe)
    report = Report(
        seconds=time.perf_counter() - start,
        parameters=model.num_parameters(),
        tokens=len(stream),
        tokens_seen=recipe.steps * recipe.batch_size * recipe.length,
        loss_before=loss_before,
        loss_after=evaluate(model, test, length=recipe.length),
        other_loss=evaluate(model, other_test, length=recipe.length),
    )
    tokenizer.save_pretrained(directory)
    model.save_pretrained(directory)
    text = json.dumps({"recipe": asdict(recipe), "report": asdict(report)}, indent=2)
    (directory / REPORT).write_text(text + "\n", encoding="utf-8")


def make(directory: str | os.PathLike[str], *, recipe: Recipe = Recipe()) -> Path:
    """Make the checkpoint in a directory, or return at once if the same was made there before.

    It is written beside and renamed when whole, so an interrupted run leaves nothing half made.

    Args:
        directory: where to; its parents are made as needed.
        recipe: sizes, steps and seed.

    Returns:
        The directory, for `from_pretrained`.

    Raises:
        FileExistsError: the directory holds something else, or what another recipe made.
    """
    directory = Path(directory)
    if (directory / REPORT).is_file():
        made = json.loads((directory / REPORT).read_text(encoding="utf-8"))["recipe"]
        if made != asdict(recipe):
            raise FileExistsError(f"{directory} was made by another recipe, {made}: remove it or choose another place")
        return directory
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise FileExistsError(f"{directory} exists and is not a model made here: remove it or choose another place")
    directory.parent.mkdir(parents=True, exist_ok=True)
    threads = torch.get_num_threads()
    try:
        with tempfile.TemporaryDirectory(prefix=f".{directory.name}-", dir=directory.parent) as beside:
            torch.set_num_threads(recipe.threads)
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(recipe.seed)
                build(whole := Path(beside, "model"), recipe)
            if directory.exists():
                directory.rmdir()
            whole.rename(directory)
    finally:
        torch.set_num_threads(threads)
    return directory


def report(directory: str | os.PathLike[str]) -> Report:
    """What `make` noted down when it made the model in this directory."""
    return Report(**json.loads(Path(directory, REPORT).read_text(encoding="utf-8"))["report"])


@torch.no_grad()
def sample(directory: str | os.PathLike[str], *, prompt: str = PROMPT, max_new_tokens: int = 80, seed: int = 0) -> str:
    """Text that the model in a directory writes after a prompt, at temperature 0.5; the prompt comes first."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(directory)
    model = LlamaForCausalLM.from_pretrained(directory)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        ids = model.generate(
            **tokenizer(prompt, return_tensors="pt", return_token_type_ids=False),
            max_new_tokens=max_new_tokens,
            do_sample=True,
            temperature=0.5,
        )
    return tokenizer.decode(ids[0], skip_special_tokens=True)


def main() -> None:
    """Make the model, then print what came out and a sample of what it writes."""
    parser = argparse.ArgumentParser(description="Make a small Llama checkpoint, with no download.")
    parser.add_argument("output_dir", type=Path, help="where the checkpoint goes; kept as it is if already made")
    parser.add_argument("--steps", type=int, default=Recipe().steps, help="training steps (default: %(default)s)")
    arguments = parser.parse_args()
    made = report(make(arguments.output_dir, recipe=Recipe(steps=arguments.steps)))
    rows = {
        "parameters": f"{made.parameters:,}",
        "tokens of documentation": f"{made.tokens:,}",
        "tokens trained on": f"{made.tokens_seen:,}",
        "held-out loss before": f"{made.loss_before:.3f}",
        "held-out loss after": f"{made.loss_after:.3f}",
        "held-out loss on code": f"{made.other_loss:.3f}",
        "seconds of training": f"{made.seconds:.0f}",
    }
    for name, value in rows.items():
        print(f"{name:<24} {value:>12}")
    print(f"\n{sample(arguments.output_dir)}")


if __name__ == "__main__":
    main()
