"""Tiny checkpoints, made by stock transformers: what real ones vary in, in a few kilobytes."""

from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

VOCABULARY = 99  # which no size of the axis divides


@dataclass(frozen=True)
class Small:
    """One checkpoint: its class of transformers, what differs from `COMMON`, and how it is saved."""

    name: str
    config: dict = field(default_factory=dict)
    dtype: torch.dtype = torch.float32
    max_shard_size: str = "1GB"


COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 4,
    "max_position_embeddings": 64,
    "initializer_range": 0.15,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
MULTIPLIERS = {
    "embedding_multiplier": 2.0,
    "logits_scaling": 3.0,
    "residual_multiplier": 0.5,
    "attention_multiplier": 0.3,
}
MODELS = {
    "llama": Small("Llama", {"attention_bias": True}, max_shard_size="20KB"),
    "qwen3": Small("Qwen3", {"head_dim": 8, "tie_word_embeddings": True}),
    "granite": Small("Granite", MULTIPLIERS, max_shard_size="20KB"),
    "granite-tied": Small("Granite", MULTIPLIERS | {"tie_word_embeddings": True, "attention_bias": True}),
    "llama-8-heads": Small("Llama", {"num_key_value_heads": 8, "mlp_bias": True}),
    "llama-bf16": Small("Llama", dtype=torch.bfloat16),
    "llama-1-layer": Small("Llama", {"num_hidden_layers": 1}),
}


def stock_class(name):
    import transformers

    transformers.logging.disable_progress_bar()
    return getattr(transformers, f"{MODELS[name].name}ForCausalLM")


def make(name, directory):
    """Write the checkpoint: random everywhere, where transformers would have zeros and ones too."""
    import transformers

    small = MODELS[name]
    torch.manual_seed(sorted(MODELS).index(name))
    model = stock_class(name)(getattr(transformers, f"{small.name}Config")(**COMMON | small.config))
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 1:
                p.add_(0.2 * torch.randn_like(p))
    model.to(small.dtype).save_pretrained(directory, max_shard_size=small.max_shard_size)


def stock(directory, **options):
    """The stock model of a directory, in fp32 and evaluation mode."""
    options = {"dtype": torch.float32, "attn_implementation": "sdpa"} | options
    return stock_class(Path(directory).name).from_pretrained(directory, **options).eval()


def ids_of(batch=2, length=13, seed=1):
    """int [batch, length], without the token of padding."""
    return torch.randint(1, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


def relative(found, expected):
    """max|a - b| / max|b|."""
    found, expected = found.detach().double(), expected.detach().double()
    return float((found - expected).abs().max() / expected.abs().max())


@pytest.fixture(scope="session", name="small_models")
def small_models_fixture(tmp_path_factory):
    """Name -> directory of each of `MODELS`; every file of tests that imports it gets the same ones."""
    place = tmp_path_factory.getbasetemp() / "small_models"
    directories = {name: str(place / name) for name in MODELS}
    if not place.exists():
        for name, directory in directories.items():
            make(name, directory)
    return directories
