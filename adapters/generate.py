"""How does `lora-fn generate` go? Prompts in, text out, over the processes that share a model.

Tokens are chosen greedily, or drawn from a seed: the same text at every number of processes, but for rounding.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from adapters import bind, data, files, launch, models
from adapters.launch import flag
from adapters.peft_model import NeuronPeftModel
from adapters.stack import stack
from lora_fn import Axis, SpecError, checkpoint, peft_format, variants
from lora_fn.axis import axis_of_mesh
from lora_fn.errors import Problems

DEVICES = ("cpu", "cuda")


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What is asked for.

    Args:
        model: Directory of a Hugging Face model.
        prompts: Texts to go on from.
        adapters: Directories of PEFT adapters: none, one for all prompts, or one for each.
        chat: A prompt is what a user says, rendered with the chat template.
        max_new_tokens: How many there are at most.
        temperature: That tokens are drawn at; 0 for the likeliest ones.
        top_p: Draw among the likeliest, whose probabilities come to this; 1 for all.
        top_k: Draw among so many of the likeliest; 0 for all.
        seed: Of the draws.
        tp: Processes that the model is cut over.
        sequence_parallel: As in `adapters.models.load`; it changes nothing of what is generated.
        device: One of `DEVICES`.
        dtype: Of the base: a key of `models.DTYPES`; None for that of the file.

    Raises:
        SpecError: Values that cannot be, all of them at once.
    """

    model: str
    prompts: tuple[str, ...]
    adapters: tuple[str, ...] = ()
    chat: bool = False
    max_new_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    tp: int = 1
    sequence_parallel: bool = False
    device: str = "cpu"
    dtype: str | None = None

    def __post_init__(self) -> None:
        problems = Problems(SpecError)
        for name in ("tp", "max_new_tokens"):
            if getattr(self, name) < 1:
                problems.add(flag(name), f"is {getattr(self, name)}, expected at least 1.")
        if not 0 <= self.temperature < math.inf:
            problems.add(flag("temperature"), f"is {self.temperature}, expected a finite number of at least 0.")
        if not 0 < self.top_p <= 1:
            problems.add(flag("top_p"), f"is {self.top_p}, expected above 0 and at most 1.")
        if self.top_k < 0:
            problems.add(flag("top_k"), f"is {self.top_k}, expected at least 0.")
        for name, nothing in (("top_p", 1.0), ("top_k", 0)):
            if not self.temperature and getattr(self, name) != nothing:
                problems.add(flag(name), f"is {getattr(self, name)}, and nothing is drawn; give a --temperature.")
        for name, known in (("device", DEVICES), ("dtype", (None, *models.DTYPES))):
            if getattr(self, name) not in known:
                expected = ", ".join(filter(None, known))
                problems.add(flag(name), f"is {getattr(self, name)!r}, expected one of {expected}.")
        if not self.prompts:
            problems.add("--prompt", "is not there, expected at least one.")
        if len(self.adapters) > 1 and len(self.adapters) != len(self.prompts):
            problems.add(
                "--adapter",
                f"names {len(self.adapters)} for {len(self.prompts)} prompts, expected one for each; or give one.",
            )
        problems.raise_if_any()


def check(request: Request) -> None:
    """Refuse what can be seen without starting processes.

    Raises:
        LoraFnError: Bad input.
    """
    launch.check_device(request.device)
    model = models.outline(request.model, axis=Axis(size=request.tp))
    models.check_files(model, request.model)
    _check_adapters(request, model)
    _prompts(request, models.load_tokenizer(Path(request.model)), model)


def run(request: Request, *, quiet: bool = False) -> list[str]:
    """Generate in this process, one of `request.tp`; the first one writes the text of a single prompt as it comes.

    Args:
        request: What is asked for.
        quiet: Neither that, nor the progress bar that several prompts have.

    Returns:
        What follows each prompt, without the tokens that end it; the same on every process.

    Raises:
        LoraFnError: Bad input.
    """
    mesh, device = launch.mesh({"tp": request.tp}, request.device), launch.process_device(request.device)
    axis = Axis() if mesh is None else axis_of_mesh(mesh, "tp")
    with launch.together((axis,), device):
        check(request)
        tokenizer = models.load_tokenizer(Path(request.model))
        model: Any = models.load(
            request.model,
            mesh=mesh,
            dtype=None if request.dtype is None else models.DTYPES[request.dtype],
            device=device,
            sequence_parallel=request.sequence_parallel,
        )
        prompts = _prompts(request, tokenizer, model)
        adapted, rows = _adapted(model, request.adapters)
    ends = _ends(model, tokenizer)
    padding = next((i for i in (tokenizer.pad_token_id, *ends) if i is not None), 0)
    ids, mask = padded(prompts, padding)
    with _streamer(request, tokenizer, quiet=quiet) as streamer:
        found = adapted.generate(
            input_ids=ids.to(device),
            attention_mask=mask.to(device),
            max_new_tokens=request.max_new_tokens,
            pad_token_id=padding,
            eos_token_id=ends or None,
            streamer=streamer,
            **_choice(request),
            **rows,
        )
    return [tokenizer.decode(row, skip_special_tokens=True) for row in found[:, ids.shape[1] :]]


def padded(prompts: Sequence[Sequence[int]], padding: int) -> tuple[Tensor, Tensor]:
    """Prompts of several lengths as one batch: what is missing stands in front.

    Returns:
        ids [batch, length] and a mask, 1 where there is a token.

    Example:
        >>> padded([[5, 6], [7]], 0)[0].tolist()
        [[5, 6], [0, 7]]
    """
    length = max(map(len, prompts))
    ids = [[padding] * (length - len(each)) + list(each) for each in prompts]
    mask = [[0] * (length - len(each)) + [1] * len(each) for each in prompts]
    return torch.tensor(ids), torch.tensor(mask)


def listing(request: Request, texts: Sequence[str]) -> str:
    """Several prompts, and what follows each."""
    width, parts = shutil.get_terminal_size().columns, []
    for number, (prompt, text) in enumerate(zip(request.prompts, texts, strict=True), start=1):
        head = f"{number}. {' '.join(prompt.split())}"
        parts.append(f"{head if len(head) <= width else head[: width - 3] + '...'}\n{text}\n")
    return "\n".join(parts)


def _check_adapters(request: Request, model: nn.Module) -> None:
    """Hold adapters against an outline.

    Raises:
        LoraFnError: They are another model's, or cannot be beside others.
    """
    for directory in dict.fromkeys(request.adapters):
        spec = files.read_adapted(directory)
        if len(request.adapters) > 1 and variants.TABLE[spec.variant].gated:
            raise SpecError(f"{directory}: is an aLoRA, which each prompt cannot have another of; give it alone.")
        restore = stack(model, spec.layer_replication)
        specs = bind.plan(model, spec)
        config, tensors = checkpoint.open_adapter(Path(directory))
        peft_format.check_layout(config, specs, directory)
        peft_format.check_state_dict(tensors.shapes, specs, str(Path(directory) / checkpoint.WEIGHTS))
        restore()


def _adapted(model: nn.Module, directories: Sequence[str]) -> tuple[Any, dict[str, Any]]:
    """The model with adapters on it, and what its `generate` is told of them: one for all rows, or each row its own.

    Raises:
        LoraFnError: Adapters that are not the model's, or do not fit beside each other.
    """
    if not directories:
        return model, {}
    names = {directory: str(number) for number, directory in enumerate(dict.fromkeys(directories))}
    (first, name), *others = names.items()
    front = NeuronPeftModel.from_pretrained(model, first, name)
    for directory, name in others:
        front.load_adapter(directory, name)
    rows = [names[directory] for directory in directories]
    if len(rows) == 1:
        return front, {}
    with front.base_model.rows(rows):  # what does not fit is said here, not at the first token
        return front, {"adapter_names": rows}


def _prompts(request: Request, tokenizer: Any, model: Any) -> list[list[int]]:
    """The tokens of the prompts.

    Raises:
        DataError: A prompt without any, or a chat without a template.
        SpecError: More tokens than the model has places for, or others than it has embeddings for.
    """
    found = [data.prompt_tokens(prompt, tokenizer, chat=request.chat) for prompt in request.prompts]
    size, places = model.config.vocab_size, model.config.max_position_embeddings
    top, longest = max(map(max, found)), max(map(len, found))
    if top >= size:
        raise SpecError(
            f"a prompt: holds token {top}, the model's vocabulary has {size}; use the model's own tokenizer."
        )
    if longest + request.max_new_tokens > places:
        raise SpecError(
            f"{flag('max_new_tokens')}: is {request.max_new_tokens} after a prompt of {longest} tokens, and the model "
            f"is for {places}; ask for {max(places - longest, 0)} at most."
        )
    return found


def _ends(model: Any, tokenizer: Any) -> list[int]:
    """The tokens that end a text: the model's, and the tokenizer's, which training ends documents with."""
    told = model.generation_config.eos_token_id
    found = [*(told if isinstance(told, list) else [told]), tokenizer.eos_token_id]
    return [*dict.fromkeys(token for token in found if token is not None)]


def _choice(request: Request) -> dict[str, Any]:
    """How tokens are chosen, whatever the model's own generation_config.json says of that."""
    if not request.temperature:
        return {"do_sample": False, "temperature": 1.0, "top_p": 1.0, "top_k": 50}  # that is, transformers' defaults
    draws = {"temperature": request.temperature, "top_p": request.top_p, "top_k": request.top_k}
    return {"do_sample": True, "seed": request.seed} | draws


class _Counter:
    """What `generate` gives its tokens to, to show how many there are."""

    def __init__(self, count: Callable[[], object]):
        self.count, self.began = count, False

    def put(self, tokens: Tensor) -> None:
        """The prompts come first."""
        if self.began:
            self.count()
        self.began = True

    def end(self) -> None:
        """Nothing is left to show."""


@contextmanager
def _streamer(request: Request, tokenizer: Any, *, quiet: bool) -> Iterator[Any]:
    """What shows how far it is, on the first process: the text itself, or a progress bar."""
    if quiet or not launch.is_first():
        yield None
    elif len(request.prompts) == 1:
        from transformers import TextStreamer

        yield TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    else:
        from tqdm import tqdm

        with tqdm(total=request.max_new_tokens, desc="generate", unit=" tokens", leave=False) as bar:
            yield _Counter(bar.update)
