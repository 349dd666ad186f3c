"""Many adapters on one XLA device: what a step compiles while they come, go, are chosen, scaled and disabled.

    python xla_many.py MODEL ADAPTER TOLD

MODEL is a Hugging Face directory, ADAPTER a PEFT one. TOLD gets {event: graphs that the step after it compiled}, how
far the logits are from those of the CPU, and {places: operations in the graph of a step}.

Not a test itself: `test_xla` starts it, because torch_xla reads its environment once.
"""

import json
import os
import sys
from pathlib import Path

os.environ.update(PJRT_DEVICE="CPU")

import torch
import torch_xla
from xla_graphs import numbers

import adapters
from adapters import models
from lora_fn import LoraSpec

IDS = torch.arange(1, 25).view(4, 6)
SPEC = LoraSpec(rank=4, target_modules="all-linear", init_lora_weights=False)


def held_on(device, directory, places=3):
    model = models.load(directory, gather_logits=True).to(device)
    held = adapters.ManyAdapters(model, SPEC, places=places)
    held.add("one", SPEC, seed=1)
    held.select_rows(["one", None, "one", None])
    return held


def step(held, device):
    """A forward and a backward, all of it one graph; gives the logits."""
    y = held.model(input_ids=IDS.to(device)).logits
    y.square().mean().backward()
    return y.detach()


def events(adapter):
    """What happens before each step."""
    return {
        "first": lambda held: None,
        "again": lambda held: None,
        "added": lambda held: held.add("two", adapter),
        "chosen": lambda held: held.select_rows(["two", "one", None, "two"]),
        "scaled": lambda held: held.scale("two", 0.5),
        "replaced": lambda held: held.replace("one", SPEC, seed=9),
        "renamed": lambda held: held.rename("two", "2.0"),
        "disabled": lambda held: held.disabled().__enter__(),
        "enabled": lambda held: held.select_rows([None, "2.0", "one", "one"]),
        "deleted": lambda held: held.delete("one"),
    }


def main(directory, adapter, told):
    device = torch_xla.device()
    ours, expected = held_on(device, directory), held_on(torch.device("cpu"), directory)
    compiled, errors = {}, {}
    for name, happen in events(adapter).items():
        for held in (ours, expected):
            happen(held)
        IDS.to(device)
        torch_xla.sync()
        before = numbers()
        y = step(ours, device)
        assert numbers() == before, "nothing is run, compiled or read inside of a step"
        torch_xla.sync()
        compiled[name] = numbers()[0] - before[0]
        want = step(expected, torch.device("cpu"))
        errors[name] = float((y.cpu() - want).abs().max() / want.abs().max())
        for held in (ours, expected):
            held.model.zero_grad()
    ops = {places: operations(held_on(device, directory, places), device) for places in (1, 8, 32)}
    Path(told).write_text(json.dumps({"compiled": compiled, "errors": errors, "operations": ops}))


def operations(held, device):
    """How many there are in the graph of a step."""
    torch_xla.sync()
    y = step(held, device)
    grads = [p.grad for p in held.model.parameters() if p.grad is not None]
    text = torch_xla._XLAC._get_xla_tensors_hlo([y, *grads])
    return sum(" = " in line for line in text.splitlines())


if __name__ == "__main__":
    main(*sys.argv[1:])
