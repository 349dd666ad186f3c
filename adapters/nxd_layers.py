"""How is a Hugging Face model made of neuronx-distributed's layers? One of them for each stock layer, without values.

They keep neuronx-distributed's own ways: every column layer gathers its own input under sequence parallel, and sums its
own input's gradient without; what it would pad in inference only is refused.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from lora_fn import Axis, Heads, SpecError
from lora_fn.errors import Problems


class Layers:
    """Makers of layers, on the meta device.

    Args:
        axis: Over the default tensor-parallel group (see `nxd.default_axis`).
        sequence_parallel: Whether column layers of the blocks get, and row layers give, a part of the sequence.
    """

    def __init__(self, axis: Axis, *, sequence_parallel: bool):
        self.axis, self.parallel = axis, sequence_parallel and axis.size > 1
        self.options: dict[str, Any] = {"device": torch.device("meta")}

    def check(self, model: Any, *, grouped: bool) -> None:
        """Refuse sizes that its layers do not have.

        Raises:
            SpecError: Names all of them.
        """
        problems, size = Problems(SpecError), self.axis.size
        vocabulary = model.config.vocab_size
        if vocabulary % size:
            problems.add(
                "embed_tokens and lm_head",
                f"have {vocabulary} tokens, which {size} processes do not divide, and neuronx-distributed pads in "
                f"inference only; give a mesh, for layers of this package.",
            )
        if grouped and model.model.layers[0].self_attn.q_proj.bias is not None:
            problems.add(
                "q_proj, k_proj and v_proj",
                "have biases, which neuronx-distributed's GQAQKVColumnParallelLinear cannot; leave them separate, on "
                "fewer processes.",
            )
        problems.raise_if_any()

    def column(self, base: nn.Linear, *, in_block: bool = True, gather_output: bool = False) -> nn.Module:
        """In place of a linear layer, its output cut; outside of the blocks, its input is whole."""
        return self._column(base.in_features, base.out_features, base, in_block, gather_output=gather_output)

    def pair(self, first: nn.Linear, second: nn.Linear) -> nn.Module:
        """In place of two linear layers side by side."""
        return self._column(first.in_features, first.out_features + second.out_features, first, True, stride=2)

    def _column(self, inside: int, outside: int, base: nn.Linear, in_block: bool, **more: Any) -> nn.Module:
        from neuronx_distributed.parallel_layers.layers import ColumnParallelLinear

        cut = {"sequence_parallel_enabled": True, "sequence_dimension": 1} if self.parallel and in_block else {}
        options = {"gather_output": False} | more | cut | self.options
        layer = ColumnParallelLinear(inside, outside, bias=base.bias is not None, **options)
        if options["gather_output"]:  # what it gathers lies transposed in memory, which transformers does not take
            layer.register_forward_hook(lambda module, args, y: y.contiguous())
        return layer

    def row(self, base: nn.Linear, heads: Heads | None = None) -> nn.Module:
        """In place of a linear layer, its input cut; of heads in an order of their own, the model tells."""
        from neuronx_distributed.parallel_layers.layers import RowParallelLinear

        cut = {"sequence_parallel_enabled": True, "sequence_dimension": 1} if self.parallel else {}
        return RowParallelLinear(
            base.in_features,
            base.out_features,
            bias=base.bias is not None,
            input_is_parallel=True,
            **cut,
            **self.options,
        )

    def qkv(self, query: nn.Linear, key: nn.Linear, heads: Heads, *, fuse_qkv: bool) -> nn.Module:
        """In place of q_proj, k_proj and v_proj."""
        from neuronx_distributed.modules.qkv_linear import GQAQKVColumnParallelLinear

        return GQAQKVColumnParallelLinear(
            query.in_features,
            [query.out_features, key.out_features],
            bias=False,
            gather_output=False,
            sequence_parallel_enabled=self.parallel,
            kv_size_multiplier=heads.copies(self.axis.size),
            fuse_qkv=fuse_qkv,
            **self.options,
        )

    def embedding(self, base: nn.Embedding) -> nn.Module:
        """In place of a table of embeddings; its output is whole."""
        from neuronx_distributed.parallel_layers.layers import ParallelEmbedding

        return ParallelEmbedding(base.num_embeddings, base.embedding_dim, padding_idx=base.padding_idx, **self.options)
