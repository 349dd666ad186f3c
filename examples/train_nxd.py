"""Fine-tune a Llama, Qwen3 or Granite with LoRA in neuronx-distributed's own trainer, from which to start your own.

On one Trainium host with 32 cores, cut over 8 of them, four times:

    torchrun --nproc-per-node 32 examples/train_nxd.py --model DIR --data FILE... --output OUT --tp 8

More hosts, compiling beforehand, and what each of these choices is for: docs/trainium.md. OUT gets `checkpoints`, which
the same command goes on from, `log.jsonl`, and in the end `adapter`, a PEFT directory. **It was run with
neuronx-distributed's CPU mode only (NXD_CPU_MODE=1), and never on a device.**
"""

import argparse
import json
import os
from pathlib import Path

# Read once, when torch_xla is imported. The factors are float32: nothing gains from stochastic rounding.
os.environ.setdefault("NEURON_CC_FLAGS", "--model-type transformer --retry_failed_compilation")
os.environ.setdefault("NEURON_RT_STOCHASTIC_ROUNDING_EN", "0")

import neuronx_distributed as nxd
import torch
import torch.distributed as dist
from neuronx_distributed.parallel_layers import parallel_state
from neuronx_distributed.trainer.checkpoint import finalize_checkpoint, has_checkpoint
from neuronx_distributed.utils import cpu_mode, get_device, mark_step
from transformers import AutoTokenizer

import adapters
from adapters import data, models, nxd_checkpoint, sharded
from lora_fn import LoraSpec

# All that differs between a device and the CPU: its ZeRO-1 takes XLA tensors only, and an asynchronous save copies
# nothing that lies in the host's memory already.
ON_DEVICE = {"backend": "xla", "dtype": torch.bfloat16, "zero_1": True, "async_save": True}
ON_CPU = {"backend": "gloo", "dtype": None, "zero_1": False, "async_save": False}
HERE = ON_CPU if cpu_mode() else ON_DEVICE
COMPILING = "NEURON_EXTRACT_GRAPHS_ONLY" in os.environ  # under neuron_parallel_compile, numbers mean nothing


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="directory of a Hugging Face model with its tokenizer")
    parser.add_argument("--data", required=True, nargs="+", help="text, or JSONL of text, prompts or messages")
    parser.add_argument("--output", required=True, type=Path)
    parser.add_argument("--tp", type=int, default=8, help="cores that the model is cut over")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--alpha", type=float, default=32)
    parser.add_argument("--targets", nargs="+", default=["all-linear"])
    parser.add_argument("--sequence-length", type=int, default=2048)
    parser.add_argument("--batch-size", type=int, default=1, help="rows per microbatch of one data-parallel process")
    parser.add_argument("--accumulation", type=int, default=4, help="microbatches per step")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--warmup", type=int, default=10)
    parser.add_argument("--learning-rate", type=float, default=2e-4)
    parser.add_argument("--checkpoint-every", type=int, default=50)
    parser.add_argument("--keep-activations", action="store_true", help="do not compute layers again in the backward")
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    if (asked.output / "adapter").exists():
        parser.error(f"{asked.output / 'adapter'} exists already; choose another --output.")
    return asked


def built(asked):
    """The model on this process's cores, adapted. Called by neuronx-distributed, which moves what it gets."""
    model = models.load(asked.model, dtype=HERE["dtype"], sequence_parallel=True)
    targets = "all-linear" if asked.targets == ["all-linear"] else asked.targets
    spec = LoraSpec(rank=asked.rank, alpha=asked.alpha, target_modules=targets)
    adapters.wrap(model, spec, seed=asked.seed, gradients="deferred")  # its optimizer sums what is marked
    if not asked.keep_activations:
        adapters.enable_input_require_grads(model)
    return model.train()


def save(asked, model, optimizer, schedule, step):
    nxd.save_checkpoint(
        str(asked.output / "checkpoints"),
        tag=f"step_{step}",
        model={name: p.detach() for name, p in model.named_parameters() if p.requires_grad},
        optimizer=optimizer,
        scheduler=schedule,
        user_content=nxd_checkpoint.user_content(model.original_module(), {"step": step}),
        use_xser=True,
        num_kept_ckpts=2,
        async_save=HERE["async_save"],
    )


def tell(asked, **line):
    with open(asked.output / "log.jsonl", "a", encoding="utf-8") as log:
        log.write(json.dumps(line) + "\n")


def main():
    asked = arguments()
    dist.init_process_group(HERE["backend"])
    settings = nxd.neuronx_distributed_config(
        tensor_parallel_size=asked.tp,
        sequence_parallel=True,
        optimizer_config={"zero_one_enabled": HERE["zero_1"], "grad_clipping": True, "max_grad_norm": 1.0},
        activation_checkpoint_config=None if asked.keep_activations else "full",
    )
    model = nxd.initialize_parallel_model(settings, built, False, asked)
    checkpoints, start = str(asked.output / "checkpoints"), 0
    resumed = has_checkpoint(checkpoints)
    if resumed:  # the factors first: its ZeRO-1 copies them when it is made
        factors = {}
        start = nxd.load_checkpoint(checkpoints, model=factors)["step"]
        adapters.fill(model, factors)
    trainable = [p for p in model.parameters() if p.requires_grad]  # the factors, and nothing else
    optimizer = nxd.initialize_parallel_optimizer(
        settings, torch.optim.AdamW, trainable, lr=asked.learning_rate, weight_decay=0.0
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / asked.warmup))
    if resumed:
        nxd.load_checkpoint(checkpoints, optimizer=optimizer, scheduler=schedule)

    tokenizer = AutoTokenizer.from_pretrained(asked.model)
    first = dist.get_rank() == 0
    rows = data.load(
        asked.data,
        tokenizer,
        sequence_length=asked.sequence_length,
        seed=asked.seed,
        held_out=0.0,
        disable=not first,
    ).train
    device, dtype = get_device(), next(model.parameters()).dtype
    dp, place = parallel_state.get_data_parallel_size(), parallel_state.get_data_parallel_rank()
    asked.output.mkdir(parents=True, exist_ok=True)
    for step in range(start, asked.steps):
        indices = data.step_rows(
            step,
            num_rows=len(rows["labels"]),
            rows_per_step=dp * asked.batch_size * asked.accumulation,
            seed=asked.seed,
        )
        # Each process's loss is its share of the mean over all targets, times dp: its optimizer takes the mean over dp.
        share = torch.tensor(data.num_targets(rows, indices) / dp).to(device)
        total = torch.zeros(()).to(device)
        for batch in data.microbatches(rows, indices, accumulation=asked.accumulation, dp_size=dp, dp_index=place):
            ids, labels, positions, documents = (
                batch[name].to(device) for name in ("input_ids", "labels", "position_ids", "document_ids")
            )
            loss = model(
                input_ids=ids,
                position_ids=positions,
                attention_mask=data.attention_mask(documents, dtype),
                labels=labels,
                shift_labels=labels,  # they are shifted already
                num_items_in_batch=share,
            ).loss
            loss.backward()
            total = total + loss.detach()
            mark_step()  # one graph per microbatch, the same for all
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        mark_step()
        if first and not COMPILING:  # this process's share of the loss; reading it waits for the device
            tell(asked, step=step + 1, loss=float(total), grad_norm=float(optimizer.grad_norm))
        done = step + 1
        if not COMPILING and (done % asked.checkpoint_every == 0 or done == asked.steps):
            save(asked, model, optimizer, schedule, done)
    finalize_checkpoint()  # waits for what is still being written
    if first and not COMPILING:
        last = asked.output / "checkpoints" / f"step_{asked.steps}"
        sharded.consolidate(last, asked.output / "adapter", allow_pickle=True)  # our own pickles
    dist.barrier()


if __name__ == "__main__":
    main()
