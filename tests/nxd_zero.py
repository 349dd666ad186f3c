"""Run by torchrun where neuronx-distributed is: its ZeRO-1 optimizer, over the factors of a wrapped model.

    python -m torch.distributed.run --nproc-per-node 4 nxd_zero.py RESULTS.json

Each process has an XLA device of its own, on CPU, which is all that the optimizer asks for. What goes between devices
goes over gloo (see xla_on_gloo): so the numbers are those of four devices, and the graphs are not. Tensor parallel 2
with sequence parallel, data parallel 2, two microbatches a step.
"""

import json
import os
import sys
import warnings
from pathlib import Path

import nxd_trainer as trained  # first: it replaces what is for devices only

# isort: split
import torch
import torch.distributed as dist
import torch_xla
import torch_xla.debug.metrics as metrics
import xla_on_gloo
from neuronx_distributed.parallel_layers import parallel_state
from neuronx_distributed.trainer import (
    initialize_parallel_model,
    initialize_parallel_optimizer,
    load_checkpoint,
    neuronx_distributed_config,
    save_checkpoint,
)
from nxd_layers import Place, error, worst
from nxd_trainer import ALL, BLOCKS, Block, batch, cut, held, made, same
from torch.utils import _pytree as pytree

import adapters
from adapters import nxd_checkpoint

CHUNKS = 2


def settings_of(max_norm, checkpointed=None):
    parallel_state.destroy_model_parallel()
    return neuronx_distributed_config(
        tensor_parallel_size=2,
        sequence_parallel=True,
        optimizer_config={"zero_one_enabled": True, "grad_clipping": True, "max_grad_norm": max_norm},
        activation_checkpoint_config=checkpointed,
    )


def step_of(model, optimizer, number):
    """One step; the mean of its losses over microbatches and data-parallel processes."""
    ids, labels = (t.to(torch_xla.device()) for t in batch(number)[1])
    total = 0
    for chunk in zip(ids.chunk(CHUNKS), labels.chunk(CHUNKS), strict=True):
        loss = model(*chunk) / CHUNKS
        loss.backward()
        total = total + loss.detach().cpu()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    torch_xla.sync()
    return trained.mean_over_data(total)


def trainer_of(targets, dtype, *, max_norm=0.05, checkpointed=None):
    settings = settings_of(max_norm, checkpointed)
    wrapped, start = made(targets, dtype=dtype)
    if checkpointed:
        adapters.enable_input_require_grads(wrapped)
    model = initialize_parallel_model(settings, lambda: wrapped)
    mine = [p for p in model.parameters() if p.requires_grad]
    # Of optimizer_config's max_grad_norm, its ZeRO-1 never hears: that is max_norm here.
    options = trained.ADAM | {"optimizer_dtype": dtype, "max_norm": max_norm}
    return wrapped, start, model, initialize_parallel_optimizer(settings, torch.optim.AdamW, mine, **options)


def check_training(targets, dtype, **options):
    """Every number of its own steps."""
    wrapped, start, model, optimizer = trainer_of(targets, dtype, **options)
    losses, norms, expected = trained.dense_training(start, max_norm=0.05)
    found = {"on XLA alike": float({p.device.type for p in model.parameters()} == {"xla"})}
    for number in range(trained.STEPS):
        found[f"loss {number}"] = error(step_of(model, optimizer, number), losses[number])
        found[f"norm {number}"] = error(optimizer.grad_norm.cpu().reshape(()), norms[number])
    found["in main_grad alike"] = float(all(p.grad is None and hasattr(p, "main_grad") for p in optimizer.params))
    for path, of in adapters.factors(wrapped).items():
        for name, p in of.items():
            here, full, first = p.detach().cpu(), expected[f"{path}.{name}"], start[f"{path}.{name}"]
            found[f"{path}.{name}"] = error(here, cut(path, name, full))
            found[f"{path}.{name} before"] = error(cut(path, name, first), cut(path, name, full))
            found[f"{path}.{name}, replicas alike"] = Place(parallel_state.get_data_parallel_group()).alike(here)
            if cut(path, name, full) is full:
                found[f"{path}.{name} alike"] = Place().alike(here)
    return found


def check_parameters():
    """What it asks of the parameters that it gets."""
    wrapped, _, model, optimizer = trainer_of(ALL, torch.float32)
    mine = [p for p in model.parameters() if p.requires_grad]
    of_factors = [p for of in adapters.factors(wrapped).values() for p in of.values()]
    found = {"the trainable ones are the factors alike": float(list(map(id, mine)) == list(map(id, of_factors)))}
    found["none is a scalar alike"] = float(all(p.dim() > 0 for p in mine))
    shards = [p for group in optimizer.optimizer.base_optimizer.param_groups for p in group["params"]]
    rows = [shard.shape[0] == -(-p.shape[0] // 2) for shard, p in zip(shards, mine, strict=True)]  # padded
    found["cut over data parallel alike"] = float(all(rows))
    try:
        initialize_parallel_optimizer(settings_of(1.0), torch.optim.AdamW, list(model.parameters()), **trained.ADAM)
        found["all parameters are refused alike"] = 0.0
    except (AttributeError, RuntimeError):
        found["all parameters are refused alike"] = 1.0
    return found


def check_clipping():
    """optimizer_config's max_grad_norm does not reach it: 1.0 holds, whatever one asked for."""
    settings = settings_of(0.05)
    wrapped, _ = made(BLOCKS)
    model = initialize_parallel_model(settings, lambda: wrapped)
    mine = [p for p in model.parameters() if p.requires_grad]
    optimizer = initialize_parallel_optimizer(settings, torch.optim.AdamW, mine, **trained.ADAM)
    return {"1.0 alike": float(optimizer.optimizer.max_norm == 1.0)}


def check_checkpoint(directory):
    """Factors and the optimizer's parts through its own files, into a trainer that is elsewhere, which then goes on."""
    wrapped, _, model, optimizer = trainer_of(ALL, torch.float32)
    step_of(model, optimizer, 0)
    content = nxd_checkpoint.user_content(wrapped)
    save_checkpoint(str(directory), "one", held(model), optimizer, user_content=content, use_xser=True)
    saved = on_cpu([held(model), state_of(optimizer)])
    step_of(model, optimizer, 1)
    after = on_cpu(held(model))
    wrapped, _, model, optimizer = trainer_of(ALL, torch.float32)
    for number in range(2, 5):
        step_of(model, optimizer, number)
    elsewhere = on_cpu(held(model))
    found = {"differs before": most(held(model), saved[0])}
    state = {}
    load_checkpoint(str(directory), "one", model=state)
    adapters.fill(model, state)
    load_checkpoint(str(directory), "one", optimizer=optimizer)  # last: it copies the factors, for its own use
    found["filled alike"] = same(held(model), saved[0])
    found["optimizer alike"] = same(state_of(optimizer), saved[1])
    step_of(model, optimizer, 1)
    found["goes on alike"] = same(held(model), after)
    # The other way round, the optimizer goes on with the factors that it found.
    adapters.fill(model, elsewhere)
    load_checkpoint(str(directory), "one", model=state, optimizer=optimizer)
    adapters.fill(model, state)
    step_of(model, optimizer, 1)
    return found | {"the other way round differs before": most(held(model), after)}


def most(found, expected):
    return max(error(p.cpu(), expected[name]) for name, p in found.items())


def check_graphs():
    """Eight steps with a rate that changes: what XLA compiles, it compiles in the first two."""
    _, _, model, optimizer = trainer_of(ALL, torch.float32)
    schedule, compiled = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda number: (number + 1) / 10), []
    for number in range(8):
        step_of(model, optimizer, number)
        schedule.step()
        compiled.append(metrics.metric_data("CompileTime")[0])
    return {"as many alike": float(len(set(compiled[1:])) == 1), "some alike": float(compiled[0] > 0)}


def state_of(optimizer):
    """All but the groups' settings, of which a loaded one has some more."""
    return {name: value for name, value in optimizer.state_dict().items() if name != "param_groups"}


def on_cpu(tree):
    return pytree.tree_map_only(torch.Tensor, lambda t: t.detach().cpu().clone(), tree)


def main(path):
    warnings.simplefilter("ignore")
    on_device = xla_on_gloo.device_functions()
    trained.started({"tp": 2})
    xla_on_gloo.restore(on_device)
    xla_on_gloo.taken_to_the_host()
    found = {
        "training, blocks, float64": check_training(BLOCKS, torch.float64),
        "training, all, float64": check_training(ALL, torch.float64),
        "training, all, float32": check_training(ALL, torch.float32),
        "training, blocks, checkpointed, float64": check_training(BLOCKS, torch.float64, checkpointed=Block),
        "parameters": check_parameters(),
        "clipping": check_clipping(),
        "checkpoint": check_checkpoint(Path(path).parent / "checkpoint"),
        "graphs": check_graphs(),
    }
    results = {case: worst(checks) for case, checks in found.items()}
    if dist.get_rank() == 0:
        Path(path).write_text(json.dumps({"2": results}, indent=1))
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)  # torch_xla has nothing to shut down


if __name__ == "__main__":
    main(sys.argv[1])
