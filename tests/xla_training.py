"""Trace twenty steps of `lora-fn finetune` on a mesh of 2 x 2 XLA devices; nothing is run.

    python -m torch.distributed.run --nproc-per-node 4 xla_training.py MODELS ADAPTERS OUTPUT
    python xla_training.py MODELS ADAPTERS OUTPUT

The first way is a device's: one process each, torch.distributed's "xla" backend, a DeviceMesh. There the CPU has one
device for each process, so what torch_xla tells of their number is replaced. The second has four CPU devices in one
process, which torch.distributed does not know: it traces one of the forms, and replaces nothing. MODELS and ADAPTERS
hold, by name, Hugging Face models and PEFT adapters of them. OUTPUT.RANK gets what was found.

Not a test itself: `test_xla` starts it, because torch_xla reads its environment once.
"""

import json
import os
import sys
from dataclasses import replace
from pathlib import Path

from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM  # noqa: F401  (before there are threads)
from xla_graphs import DP, TP, as_devices, communication, forget, numbers

STEPS, SWAP, RESCALE = 20, 8, 14
LENGTH, ROWS, ACCUMULATION = 8, 4, 2
CUT = {"sequence_parallel": True}
# Name -> the model, and options of `Job`.
FORMS = {
    "sequence on": ("llama", CUT),
    "sequence off": ("llama-1-layer", {}),
    "fused, copied heads": (
        "llama-1-layer",
        CUT | {"fuse_qkv": True, "fuse_gate_up": True, "kv_size_multiplier": 2},
    ),
    "checkpointing": ("llama-1-layer", CUT | {"activation_checkpointing": True}),
}
IN_THREADS = "sequence on"


def batches_of(number, device, dp_index):
    """Microbatches, other ones for each step and each process of "dp"."""
    import torch

    generator = torch.Generator().manual_seed(100 * number + dp_index)
    ids = torch.randint(1, 99, (ACCUMULATION, ROWS, LENGTH), generator=generator)
    documents = (torch.arange(LENGTH) >= 3 + number % 3).long().expand(ROWS, -1)
    places = torch.arange(LENGTH).expand(ROWS, -1)
    rows = {"position_ids": places, "document_ids": documents}
    return [
        {n: t.contiguous().to(device) for n, t in (rows | {"input_ids": i, "labels": i.roll(-1, 1)}).items()}
        for i in ids
    ]


class Training:
    """A model in training, as `train.finetune` has it, on one device."""

    def __init__(self, job, model, tp, dp, device):
        from adapters import train

        self.job, self.model, self.tp, self.dp, self.device = job, model.train(), tp, dp, device
        self.optimizer = train.make_optimizer(model, job)
        self.step, self.key = train.number_on(0, device), train.number_on(7, device)
        train.boundary(device)

    def trace(self, number):
        """The tensors that a step leaves: what it returns, the factors, the optimizer's state, the step's number."""
        from adapters import train
        from lora_fn.dropout import fold_in

        rate = self.optimizer.param_groups[0]["lr"]
        rate.copy_(train.learning_rate(self.job, self.step))
        found = train.train_step(
            self.model,
            self.optimizer,
            batches_of(number, self.device, self.dp.index),
            num_targets=train.number_on(float(number), self.device),
            key=fold_in(self.key, self.step),
            tp=self.tp,
            dp=self.dp,
            max_grad_norm=1.0,
        )
        self.step = self.step + 1
        state = [t for of in self.optimizer.state.values() for t in of.values()]
        factors = [p.data for p in self.optimizer.param_groups[0]["params"]]
        return [*found, *factors, *state, rate, self.step]

    def hash_and_text(self, number, *, is_told):
        """Of a step's graph, which is then forgotten."""
        import torch_xla

        tensors = self.trace(number)
        found = torch_xla._XLAC._get_graph_hash(tensors).hex()
        text = torch_xla._XLAC._get_xla_tensors_hlo(tensors) if is_told else ""
        del tensors
        forget(self.device)
        return found, text


def twenty(training, adapter):
    """The hash of each step's graph, the first one's text, and the `numbers` of what was run meanwhile."""
    import adapters

    hashes, texts, before = [], [], numbers()
    for number in range(STEPS):
        if number == SWAP:
            adapters.load(training.model, adapter)
        if number == RESCALE:
            spec = replace(adapters.lora_spec(training.model), alpha=1.5, use_rslora=True)
            adapters.rescale(training.model, spec)
        found, text = training.hash_and_text(number, is_told=number == 0)
        hashes.append(found)
        texts.append(text)
    run = [b - a for a, b in zip(before, numbers(), strict=True)]
    return {"hashes": hashes, "text": texts[0], "run": run, "communication": communication(texts[0])}


def otherwise(training):
    """What the graph would be with an alpha that is no data: its hash. And with a place that is none: its text."""
    import torch

    import adapters
    from adapters import train

    for layer in adapters.layers(training.model).values():
        layer.scaling = None
    alpha, _ = training.hash_and_text(STEPS, is_told=False)
    train.place_on = lambda axis, device: torch.full([1], axis.index, device=device)
    _, place = training.hash_and_text(STEPS, is_told=True)
    return {"alpha": alpha, "place": place}


def trace(_, models_at, adapters_at, output):
    """Every form of the model that can be."""
    import torch_xla
    import torch_xla.runtime as xr

    import adapters
    from adapters import bind, launch, models, train
    from lora_fn import Axis

    rank, in_threads = xr.global_ordinal(), "RANK" not in os.environ
    tp = Axis(name="tp", size=2, index=rank % 2, groups=TP)
    dp = Axis(name="dp", size=2, index=rank // 2, groups=DP)
    device, told = torch_xla.device(), {}
    for name, (model, options) in FORMS.items():
        adapter = f"{adapters_at}/{model}"
        lora = replace(adapters.read_spec(adapter), alpha=8, dropout=0.1)
        common = dict(model=f"{models_at}/{model}", data=("",), output="", lora=lora, tp=2, dp=2, device="xla")
        job = train.Job(**common, **options, steps=STEPS, warmup=5)
        if not in_threads:
            mesh = launch.mesh(job.axes, job.device)
            assert (tp, dp) == tuple(train.axis_of_mesh(mesh, n) for n in ("tp", "dp"))
            made = train.load_model(job, mesh, device)
        elif name == IN_THREADS:
            made = models.load(job.model, axis=tp, device=device, sequence_parallel=job.sequence_parallel)
            bind.wrap(made, lora, gradients="deferred")
        else:
            continue
        training = Training(job, made, tp, dp, device)
        told[name] = twenty(training, adapter)
    told |= {} if in_threads else {"otherwise": otherwise(training)}
    Path(f"{output}.{rank}").write_text(json.dumps(told), encoding="utf-8")


def main(*arguments):
    os.environ.update(PJRT_DEVICE="CPU")
    if "RANK" in os.environ:
        trace(as_devices(), *arguments)
        return
    os.environ.update(CPU_NUM_DEVICES="4")
    import torch_xla

    torch_xla.launch(trace, args=arguments)


if __name__ == "__main__":
    main(*sys.argv[1:])
