"""Run by torchrun where neuronx-distributed is: its real quantised layers, wrapped by us, beside their own forward.

    python -m torch.distributed.run --nproc-per-node 4 nxd_quantized.py RESULTS.json

The results, as in nxd_layers.py: {"4" or "2" processes: {case: {check: the worst of all processes}}}, and what `wrap`
says to the layers that it does not take.
"""

import json
import os
import sys
import warnings
from pathlib import Path

from nxd_layers import (  # first: it replaces what is for devices only
    ALPHA,
    BATCH,
    IN,
    LENGTH,
    LOCAL,
    OUT,
    PARALLEL,
    RANK,
    SCALING,
    Case,
    Model,
    Place,
    both,
    draw,
    entering,
    error,
    fused,
    leaving,
    locally,
    ran,
    worst,
)

# isort: split
import oracle
import torch
import torch.distributed as dist
from neuronx_distributed.parallel_layers import parallel_state
from neuronx_distributed.quantization import quantization_layers
from torch import nn

import adapters
from lora_fn import LoraFnError, LoraSpec

DTYPES = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
TYPES = ("per_tensor_symmetric", "per_channel_symmetric")
LAYERS = {
    **both("column", "column", LOCAL),
    "column, stride 2": Case("column", LOCAL | {"stride": 2, "bias": False}),
    "column, gathered": Case("column"),
    **both("row", "row", PARALLEL),
    "row, whole input": Case("row"),
}
CASES = {
    f"{name}, {dtype}, {how}": (case, {"quantized_dtype": DTYPES[dtype], "quantization_type": how})
    for name, case in LAYERS.items()
    for dtype in DTYPES
    for how in TYPES
}
REFUSED = {
    "float8_e5m2": ("column", {"quantized_dtype": torch.float8_e5m2}),
    "blocks": (
        "column",
        {
            "quantization_type": "blockwise_symmetric",
            "block_axis": [1],
            "block_size": [8],
            "quantized_dtype": torch.int8,
        },
    ),
    "activations": (
        "row",
        {"activation_quantization_type": "dynamic", "quantization_type": "per_channel_symmetric"},
    ),
}
CLASSES = {
    "column": quantization_layers.QuantizedColumnParallel,
    "row": quantization_layers.QuantizedRowParallel,
}


def make(layer, size, out, options):
    """A real layer. By way of the meta device: on CPU, its row layer fails in its constructor but on the first process
    (it draws a whole weight of a part's size, and cuts that)."""
    axis = {"quantization_per_channel_axis": 0} if "channel" in options.get("quantization_type", "") else {}
    return CLASSES[layer](size, out, **options, **axis, device=torch.device("meta")).to_empty(device="cpu")


def build(case, options):
    """The real layer, its packed weight and scale, and canonical parameters with the weight that they stand for."""
    told = dict(case.arguments) | options
    if case.sequence is not None:
        told |= {"sequence_parallel_enabled": True, "sequence_dimension": case.sequence}
    module = make(case.layer, case.size, case.out, told)
    torch.manual_seed(1)
    reach = 127 if module.weight.dtype == torch.int8 else 240
    packed = (draw(case.out, case.size).clamp(-3, 3) / 3 * reach).round().to(module.weight.dtype)
    scale = draw(case.out, 1).abs() / reach + 0.001 if module.scale.dim() == 2 else torch.tensor([0.013])
    params = {"weight": packed.to(torch.float32) * scale}
    if module.bias is not None:
        params["bias"] = draw(case.out)
    return module, packed, scale, params


def check(case, options):
    """Every check of one case."""
    place = Place()
    module, packed, scale, params = build(case, options)
    per_output = scale.dim() == 2 and case.layer == "column"
    with torch.no_grad():
        module.weight.copy_(locally(case, place, "weight", packed))
        module.scale.copy_(locally(case, place, "weight", scale) if per_output else scale)
        if module.bias is not None:
            module.bias.copy_(locally(case, place, "bias", params["bias"]))
    x, leading = draw(BATCH, LENGTH, case.size), (BATCH, LENGTH)
    if case.sequence == 0:
        x, leading = x.transpose(0, 1).contiguous(), (LENGTH, BATCH)
    cotangent = draw(*leading, case.out)
    model, found = Model(module), {}
    with torch.no_grad():
        own = model(entering(case, place, x))
    try:
        ran(model, case, place, x, cotangent)
        found["own fails"] = 0.0
    except Exception:  # whatever autograd finds missing
        found["own fails"] = 1.0
    names = [f".{part}" for part in fused(case)] or [""]
    targets = tuple(f"{part}_proj" for part in fused(case)) or ("layer",)
    adapters.wrap(model, LoraSpec(rank=RANK, alpha=ALPHA, target_modules=targets), seed=3)
    layer = model.layer
    assert layer.weight.dtype == packed.dtype and layer.weight is module.weight
    with torch.no_grad():
        found["zero B to its own"] = error(model(entering(case, place, x)), own)
    torch.manual_seed(2)
    for name in names:
        params[f"lora_A{name}"] = draw(RANK, case.size)
        params[f"lora_B{name}"] = draw(case.out // len(names), RANK)
    factors = [n for n in params if n.startswith("lora_")]
    with torch.no_grad():
        for name in factors:
            layer.get_parameter(name).copy_(locally(case, place, name, params[name]))
    y, dx = ran(model, case, place, x, cotangent)
    words = {"kind": "linear", "scaling": SCALING}
    if fused(case):
        words = {"kind": "linear", "parts": [(part, case.out // len(names), SCALING) for part in fused(case)]}
    y_truth, truths, dx_truth = oracle.run(params, x, cotangent, **words)
    found["y"] = error(y, leaving(case, place, y_truth))
    found["dx"] = error(dx, entering(case, place, dx_truth))
    for name in factors:
        found[f"d{name}"] = error(layer.get_parameter(name).grad, locally(case, place, name, truths[name]))
    return found


class Two(nn.Module):
    """A quantised layer behind an adapted one."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(IN, IN)
        self.second = make("column", IN, OUT, {"bias": False, "gather_output": False})

    def forward(self, x):
        return self.second(self.first(x))


def behind():
    """Whether an adapter behind a quantised layer that is not adapted learns."""
    model = adapters.wrap(Two(), LoraSpec(rank=RANK, target_modules=("first",)))
    assert type(model.second).__name__ == "BoundLayer"
    with torch.no_grad():
        model.second.weight.fill_(1)
    model(draw(2, IN)).sum().backward()
    return float(model.first.lora_B.grad.abs().sum() > 0)


def refusals():
    """What `wrap` says to layers that it does not take."""
    said = {}
    for name, (layer, options) in REFUSED.items():
        model = Model(make(layer, 32, OUT, options))
        try:
            adapters.wrap(model, LoraSpec(target_modules=("layer",)))
        except LoraFnError as refusal:
            said[name] = str(refusal)
    return said


def main(path):
    warnings.simplefilter("ignore")
    results = {}
    from foreign_programs import started

    state = started({"tp": 4})
    for size in (4, 2):
        if size == 2:
            state.destroy_model_parallel()
            parallel_state.initialize_model_parallel(tensor_model_parallel_size=2)
        else:
            results["refused"], results["behind"] = refusals(), behind()
        results[str(size)] = {name: worst(check(*case)) for name, case in CASES.items()}
    if dist.get_rank() == 0:
        Path(path).write_text(json.dumps(results, indent=1))
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)  # torch_xla has nothing to shut down


if __name__ == "__main__":
    main(sys.argv[1])
