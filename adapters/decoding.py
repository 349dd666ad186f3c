"""How does a parallel model generate? Stock transformers' `generate`, whose every step sees whole logits.

With a cache, of which each process holds its own heads. The tokens are chosen on every process, of the same logits: so
they are the same where the draws are.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from adapters import bind
from adapters.sequence import Sequence
from lora_fn import SpecError, collectives
from lora_fn.cross_entropy import gather_logits


class Generate:
    """In place of a model's `generate`.

    Args:
        model: A transformers model whose logits are sharded over the vocabulary, or whole.
        sequence: How activations lie in it.
        sharded: Whether the logits are.
    """

    def __init__(self, model: Any, sequence: Sequence, *, sharded: bool):
        self.model, self.sequence, self.sharded = model, sequence, sharded
        self.running = False
        if sharded:
            model.register_forward_hook(self._make_whole)

    def __call__(
        self,
        inputs: Tensor | None = None,
        generation_config: Any = None,
        *args: Any,
        seed: int | None = None,
        **kwargs: Any,
    ) -> Any:
        """transformers' `generate`; every process of the axis calls it, with the same arguments.

        Args:
            inputs, generation_config, args, kwargs: As there.
            seed: What sampled tokens are drawn from; torch's generators stay as they are. None: they are drawn from
                torch's generators, as there, which must then stand alike on all processes.

        Raises:
            SpecError: The processes would draw, or end, each on its own.
        """
        given = (kwargs, *(vars(c) for c in (generation_config, self.model.generation_config) if c is not None))
        self._check(given, seed)
        ids = kwargs.get("input_ids") if inputs is None else inputs
        if ids is not None and bind.is_gated(self.model):
            bind.set_invocation(self.model, ids)
        before, self.running = self.running, True
        try:
            with _drawing_from(seed):
                return type(self.model).generate(self.model, inputs, generation_config, *args, **kwargs)
        finally:
            self.running = before

    def _make_whole(self, model: Any, args: Any, output: Any) -> None:
        if self.running:
            size, index = model.config.vocab_size, self.sequence.index
            output.logits = gather_logits(output.logits, self.sequence.axis, vocab_size=size, index=index)

    def _check(self, given: tuple[Mapping[str, Any], ...], seed: int | None) -> None:
        """Refuse what is no function of the arguments, where several processes must come to the same.

        Raises:
            SpecError: As said.
        """
        axis = self.sequence.axis
        if axis.size == 1:
            return
        if _first(given, "max_time") is not None:
            raise SpecError("max_time: each process would look at its own clock; give max_new_tokens.")
        if seed is None and _first(given, "do_sample"):
            device = self.sequence.index.device
            state = torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()
            [states] = collectives.gather([state[None].to(device, torch.float32)], axis, self.sequence.index, dim=0)
            if not torch.equal(states, states[:1].expand_as(states)):
                raise SpecError(
                    f"do_sample: torch's generators do not stand alike on the {axis.size} processes, which would draw "
                    f"other tokens each; give a seed."
                )


def _first(given: tuple[Mapping[str, Any], ...], name: str) -> Any:
    """The value of the first that has one."""
    return next((values[name] for values in given if values.get(name) is not None), None)


@contextmanager
def _drawing_from(seed: int | None) -> Iterator[None]:
    """torch's generators begin at the seed; afterwards they are as before."""
    if seed is None:
        yield
        return
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        yield
