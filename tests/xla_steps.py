"""Twenty optimizer steps of a wrapped model on an XLA device: prints the losses, and how many graphs were compiled.

Not a test itself: `test_xla` starts it, because torch_xla reads its environment once.
"""

import json
import os

os.environ.update(PJRT_DEVICE="CPU")

import torch
import torch_xla
import torch_xla.debug.metrics as metrics

import adapters
from adapters import train
from lora_fn import LoraSpec
from lora_fn.dropout import fold_in

STEPS = 20


def compilations():
    """How many graphs were compiled so far."""
    data = metrics.metric_data("CompileTime")
    return data[0] if data else 0


def main():
    """The steps of `lora-fn finetune`'s own schedule, dropout keys and optimizer."""
    device = torch_xla.device()
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 4))
    adapters.wrap(model, LoraSpec(rank=2, alpha=4, dropout=0.1, target_modules="all-linear")).to(device).train()
    job = train.Job(model="", data=("",), output="", steps=STEPS, warmup=5, learning_rate=2e-2)
    optimizer = train.make_optimizer(model, job)
    x, y = torch.randn(32, 8, device=device), torch.randn(32, 4, device=device)
    step, key = torch.tensor(0, device=device), torch.tensor(3, device=device)
    losses, keys, early = [], [], 0
    for number in range(STEPS):
        optimizer.param_groups[0]["lr"].copy_(train.learning_rate(job, step))
        here = fold_in(key, step)
        adapters.set_dropout_key(model, here)
        loss = torch.nn.functional.mse_loss(model(x), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        step = step + 1
        train.boundary(device)
        losses.append(float(loss.detach()))
        keys.append(int(here))
        if number == 1:
            early = compilations()
    told = {"compilations after two steps": early, "compilations after twenty": compilations()}
    print(json.dumps(told | {"losses": losses, "keys": keys}))


if __name__ == "__main__":
    main()
