"""What does the config.json of a Llama say? Sizes in, Hugging Face's keys out."""

from __future__ import annotations

from typing import Any

from adapters.estimate import KEYS, Shape

LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "tie_word_embeddings": False}


def config_of(shape: Shape, **more: Any) -> dict[str, Any]:
    """Of a shape; `more` is added."""
    sizes = {key: getattr(shape, name) for name, key in KEYS.items()}
    return LLAMA | {key: size for key, size in sizes.items() if size is not None} | more
