"""Run by torchrun where neuronx-distributed is: a wrapped model, trained by its pipeline of two stages.

    python -m torch.distributed.run --nproc-per-node 4 nxd_pipeline.py RESULTS.json

As nxd_layers.py. The gradients are held against those of the same model without a pipeline.
"""

import json
import os
import sys
import warnings
from pathlib import Path

from foreign_programs import started  # first: it replaces what is for devices only

# isort: split
import torch
import torch.distributed as dist
from neuronx_distributed.parallel_layers import layers
from neuronx_distributed.pipeline import NxDPPModel
from nxd_layers import error, worst
from torch import nn

import adapters
from adapters import nxd
from lora_fn import LoraSpec

WIDTH, INSIDE, VOCABULARY, MICROBATCHES = 8, 16, 24, 2


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up_proj = layers.ColumnParallelLinear(WIDTH, INSIDE, bias=False, gather_output=False)
        self.down_proj = layers.RowParallelLinear(INSIDE, WIDTH, bias=False, input_is_parallel=True)

    def forward(self, x):
        return x + self.down_proj(torch.tanh(self.up_proj(x)))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed_tokens = layers.ParallelEmbedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleList([Block() for _ in range(4)])
        self.lm_head = layers.ColumnParallelLinear(WIDTH, VOCABULARY, bias=False)

    def forward(self, ids, labels):
        x = self.embed_tokens(ids)
        for layer in self.layers:
            x = layer(x)
        return nn.functional.cross_entropy(self.lm_head(x).reshape(-1, VOCABULARY), labels.reshape(-1))


def made(targets):
    torch.manual_seed(0)
    spec = LoraSpec(rank=2, alpha=4, init_lora_weights=False, target_modules=targets)
    return adapters.wrap(Model(), spec)


def check(targets):
    """Errors of all gradients, and of the loss."""
    plain, piped = made(targets), made(targets)
    torch.manual_seed(1)
    ids, labels = torch.randint(0, VOCABULARY, (2, 4, 5)).unbind()
    losses = [plain(i, y) for i, y in zip(ids.chunk(MICROBATCHES), labels.chunk(MICROBATCHES), strict=True)]
    loss = torch.stack(losses).mean()
    loss.backward()
    pipeline = NxDPPModel(
        piped,
        transformer_layer_cls=Block,
        num_microbatches=MICROBATCHES,
        output_loss_value_spec=True,
        input_names=["ids", "labels"],
        pipeline_cuts=["layers.1"],
        leaf_module_cls=list(nxd.LEAF_MODULES),
    )
    got = pipeline.run_train(ids=ids, labels=labels)
    expected = {name: p.grad for name, p in plain.named_parameters()}
    mine = {name: p for name, p in pipeline.local_named_parameters() if p.requires_grad}
    assert mine and all("lora_" in name for name in mine)
    found = {name: error(p.grad, expected[name]) for name, p in mine.items()}
    return found | ({} if got is None else {"loss": error(got, loss)})


def main(path):
    warnings.simplefilter("ignore")
    started({"tp": 2, "pp": 2})
    blocks = ("up_proj", "down_proj")
    found = {"blocks": worst(check(blocks)), "all": worst(check((*blocks, "embed_tokens", "lm_head")))}
    if dist.get_rank() == 0:
        Path(path).write_text(json.dumps({"2": found}, indent=1))
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)  # torch_xla has nothing to shut down


if __name__ == "__main__":
    main(sys.argv[1])
