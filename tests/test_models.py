"""Are the parallel models the stock ones? transformers is the oracle: logits, losses, gradients, at every size."""

import functools
import json
import shutil
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pool
import pytest
import torch
import torch.nn.functional as F
from mapped import cut
from safetensors.torch import load_file, save_file
from small_models import ids_of, relative, small_models_fixture, stock  # noqa: F401  (a fixture)
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.func import functional_call

import adapters
import lora_fn
from adapters import bind, models
from adapters.parallel import ParallelLayer
from lora_fn import Axis, FileError, LayerSpec, LoraSpec, Shard, SpecError, checkpoint, reshard, sharding

TOLERANCE = 1e-5
SIZES = (1, 2, 4)

# What a model may be called with. Ids are [2, 13] where nothing else is said, and no axis divides 13.


def documents(lengths):
    """bool [2, 1, sum, sum]: several documents in a row, each causal, and none sees another."""
    number = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    return (number[:, None] == number[None, :]).tril().expand(2, 1, -1, -1)


def additive(mask):
    return torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)


def present(before, after):
    """int [2, 13]: the first row is whole, the second has so much padding before and after."""
    place = torch.arange(13)
    return torch.stack([place >= 0, (place >= before) & (place < 13 - after)]).long()


def labels(mask):
    return ids_of().masked_fill(mask == 0, -100)


POSITIONS = torch.cat([torch.arange(5), torch.arange(8)]).expand(2, -1)
CALLS = {
    "plain": dict(input_ids=ids_of(), labels=ids_of()),
    "a length that divides": dict(input_ids=ids_of(length=16), labels=ids_of(length=16)),
    "shorter than the axis": dict(input_ids=ids_of(length=3), labels=ids_of(length=3)),
    "ignored labels": dict(input_ids=ids_of(), labels=labels(present(4, 3))),
    "shifted labels": dict(input_ids=ids_of(), labels=ids_of(), shift_labels=ids_of(seed=2)),
    "a mean over more than the batch": dict(input_ids=ids_of(), labels=ids_of(), num_items_in_batch=77),
    "padding after": dict(input_ids=ids_of(), attention_mask=present(0, 4), labels=labels(present(0, 4))),
    "padding before": dict(input_ids=ids_of(), attention_mask=present(4, 0), labels=labels(present(4, 0))),
    "a mask of 4 dimensions": dict(input_ids=ids_of(), attention_mask=documents([5, 8]), position_ids=POSITIONS),
    "an additive mask": dict(input_ids=ids_of(), attention_mask=additive(documents([5, 8])), position_ids=POSITIONS),
    "packed by positions": dict(input_ids=ids_of(batch=1), position_ids=POSITIONS[:1], labels=ids_of(batch=1)),
    "other positions": dict(input_ids=ids_of(), position_ids=torch.arange(13).expand(2, -1) + 7),
    "embeddings for ids": dict(inputs_embeds=torch.linspace(-1, 1, 2 * 13 * 32).view(2, 13, 32)),
    "the last logits": dict(input_ids=ids_of(), logits_to_keep=3),
    "chosen logits": dict(input_ids=ids_of(), logits_to_keep=torch.tensor([0, 7])),
}
FULL = ("llama", "qwen3")  # every call; the others the first


def mesh_of_all():
    return init_device_mesh("cpu", (torch.distributed.get_world_size(),), mesh_dim_names=("tp",))


def above(errors, tolerance=TOLERANCE):
    """Those of {case: error} that are not below the tolerance."""
    return {case: error for case, error in errors.items() if not error < tolerance}


def collected(results):
    """What all processes found: {case: worst error}."""
    return {case: max(found[case] for found in results) for case in results[0]}


@functools.cache
def stock_outputs(directory, call):
    return stock(directory, use_cache=False)(**CALLS[call])


def logits_and_losses(directories, calls):
    """{(model, sequence parallel, logits gathered, call, what): error} on one process."""
    mesh, errors = mesh_of_all(), {}
    for name, directory in directories.items():
        for sequence_parallel in (False, True):
            for gather_logits in (False, True):
                options = dict(sequence_parallel=sequence_parallel, gather_logits=gather_logits)
                model = models.load(directory, mesh=mesh, dtype=torch.float32, **options)
                for call in calls[name]:
                    found, expected = model(**CALLS[call]), stock_outputs(directory, call)
                    logits = expected.logits
                    if not gather_logits:
                        logits = cut(logits, Shard(-1), mesh.size())[mesh.get_rank()]
                    case = (name, *options.values(), call)
                    errors[*case, "logits"] = relative(found.logits, logits)
                    if expected.loss is not None:
                        errors[*case, "loss"] = relative(found.loss, expected.loss)
    return errors


@pytest.mark.parametrize("size", SIZES)
def test_logits_and_losses_are_those_of_stock_transformers(size, small_models):
    calls = {name: tuple(CALLS) if name in FULL else ("plain",) for name in small_models}
    errors = collected(pool.run(logits_and_losses, small_models, calls, size=size))
    assert len(errors) > 150 and not above(errors)


def test_eight_processes(small_models):
    directories = {"llama-8-heads": small_models["llama-8-heads"]}
    errors = collected(pool.run(logits_and_losses, directories, {"llama-8-heads": ("plain",)}, size=8))
    assert not above(errors)


# Eight lanes of a mapped axis, in one process.


def lanes_of(directory, size, **options):
    """The models of all lanes: (one of them, stacked parameters and buffers)."""
    lanes = [models.load(directory, axis=Axis(size=size, index=i), **options) for i in range(size)]
    params, buffers = torch.func.stack_module_state(lanes)
    return lanes[0], params, buffers


@pytest.mark.parametrize("sequence_parallel", [False, True])
@pytest.mark.parametrize("call", ["plain", "padding after", "an additive mask"])
def test_a_mapped_axis_of_eight(sequence_parallel, call, small_models):
    directory = small_models["llama-8-heads"]
    options = dict(sequence_parallel=sequence_parallel, gather_logits=True, attn_implementation="eager")
    model, params, buffers = lanes_of(directory, 8, **options)

    def run(params, buffers):
        return functional_call(model, (params, buffers), (), CALLS[call]).logits

    logits = torch.vmap(run)(params, buffers)
    expected = stock(directory, attn_implementation="eager")(**CALLS[call]).logits
    assert all(torch.equal(logits[0], lane) for lane in logits[1:])
    assert relative(logits[0], expected) < TOLERANCE
