"""What should come out? A slow, obvious, dense layer: plain torch over canonical tensors, and none of our own code.

Nothing here knows of an axis, a spec, a transform or a collective.
"""

import numpy as np
import torch


def forward(
    params,
    x,
    *,
    kind,
    scaling=None,
    fan_in_fan_out=False,
    padding_idx=None,
    keep=None,
    probability=0.0,
    parts=(),
    stride=None,
    padding=None,
    variant="lora",
    group=1,
    blocks=1,
    block_diagonal=None,
    gate=None,
):
    """The whole layer.

    `keep` is None or a bool tensor of x's shape: which inputs of lora_A dropout keeps. A fused layer has `parts`:
    (name, size, scaling) each, scaling None where there is no adapter; its `keep` is a dict of masks, and its output
    all parts in a row. QA-LoRA has groups of inputs, BD-LoRA a factor of `blocks`, aLoRA a gate: bool, of x's tokens.
    A conv2d has `stride` and `padding`; of experts, every tensor begins with the expert.
    """
    told = {"scaling": scaling, "fan_in_fan_out": fan_in_fan_out, "stride": stride, "padding": padding}
    if variant == "dora" and kind != "experts" and not parts and "lora_A" in params:
        return _dora(params, x, kind, keep, probability, told | {"padding_idx": padding_idx})
    if kind == "conv2d":
        return _conv2d(params, x, scaling, keep, probability, {"stride": stride, "padding": padding})
    if kind == "experts":
        return _experts(params, x, scaling, fan_in_fan_out, keep, probability, variant)
    if parts:
        more = {"variant": variant, "group": group, "blocks": blocks, "block_diagonal": block_diagonal, "gate": gate}
        return _fused(params, x, parts, keep or {}, probability, more)
    if kind == "embedding":
        y = _look_up(params["weight"], x, padding_idx)
        if "lora_A" in params:
            y = y + scaling * (_look_up(params["lora_A"].T, x, padding_idx) @ params["lora_B"].T)
        return y
    weight = params["weight"] if fan_in_fan_out else params["weight"].T
    y = x @ weight
    if "bias" in params:
        y = y + params["bias"]
    if "lora_A" not in params:
        return y
    dropped = x if keep is None else x * keep.to(x.dtype) / (1 - probability)
    a, b = params["lora_A"], params["lora_B"]
    if variant == "qalora":
        dropped = dropped.unflatten(-1, (-1, group)).mean(-1) * (x.shape[-1] // group)
    if block_diagonal == "lora_A":
        a = torch.block_diag(*a.chunk(blocks))
    if block_diagonal == "lora_B":
        b = torch.block_diag(*b.chunk(blocks))
    h = dropped @ a.T
    if variant == "kasa":
        h = h * params["lora_diag"]
    update = scaling * (h @ b.T + params.get("lora_B_bias", 0.0))
    return y + (update if gate is None else torch.where(gate[..., None], update, 0.0))


def _dora(params, x, kind, keep, probability, told):
    """The weight's rows W + scaling * B A as directions times learned magnitudes, one for each output.

    Dropout also drops what the base's product is multiplied with beyond 1. The norm is a constant to the backward.
    """
    delta = params["lora_B"].flatten(1) @ params["lora_A"].flatten(1) * told["scaling"]
    weight = params["weight"]
    rows = weight.T if kind == "embedding" or told["fan_in_fan_out"] else weight.flatten(1)
    norms = (rows + delta).norm(dim=1).detach()
    norms = torch.where(norms == 0, 1.0, norms)
    gain = params["lora_magnitude_vector"].flatten() / norms
    side = gain[:, None, None] if kind == "conv2d" else gain
    base = {"weight": weight}
    bias = params.get("bias", torch.zeros_like(gain))
    bias = bias[:, None, None] if kind == "conv2d" else bias
    dropped = x if keep is None else x * keep.to(x.dtype) / (1 - probability)
    whole, part = forward(base, x, kind=kind, **told), forward(base, dropped, kind=kind, **told)
    factors = {"lora_A": params["lora_A"], "lora_B": params["lora_B"], "weight": torch.zeros_like(weight)}
    return whole + (side - 1) * part + side * forward(factors, dropped, kind=kind, **told) + bias


def _fused(params, x, parts, keep, probability, more):
    """Every part as a layer of its own, side by side."""
    outputs, start = [], 0
    for name, size, scaling in parts:
        own = {"weight": params.get(f"weight.{name}"), "bias": params.get(f"bias.{name}")}
        for base in ("weight", "bias"):
            if base in params:
                own[base] = params[base][start : start + size]
        start += size
        if scaling is not None:
            shared = params.get("lora_A")
            own |= {
                "lora_A": params[f"lora_A.{name}"] if shared is None else shared,
                "lora_B": params[f"lora_B.{name}"],
            }
            own |= {
                other: params.get(f"{other}.{name}") for other in ("lora_B_bias", "lora_magnitude_vector", "lora_diag")
            }
        own = {key: p for key, p in own.items() if p is not None}
        mask = keep.get(name)
        told = {"kind": "linear", "scaling": scaling, **more}
        outputs.append(forward(own, x, keep=mask, probability=probability, **told))
    return torch.cat(outputs, -1)


def _conv2d(params, x, scaling, keep, probability, steps):
    y = torch.nn.functional.conv2d(x, params["weight"], params.get("bias"), **steps)
    if "lora_A" in params:
        dropped = x if keep is None else x * keep.to(x.dtype) / (1 - probability)
        h = torch.nn.functional.conv2d(dropped, params["lora_A"], **steps)
        y = y + scaling * torch.einsum("nrhw,or->nohw", h, params["lora_B"][:, :, 0, 0])
    if "lora_B_bias" in params:
        y = y + scaling * params["lora_B_bias"][:, None, None]
    return y


def _experts(params, x, scaling, fan_in_fan_out, keep, probability, variant):
    """Every expert as a layer of its own."""
    outputs = []
    for expert, own_x in enumerate(x):
        own = {name: p[expert] for name, p in params.items()}
        mask = None if keep is None else keep[expert]
        told = {"kind": "linear", "fan_in_fan_out": fan_in_fan_out, "scaling": scaling, "variant": variant}
        outputs.append(forward(own, own_x, keep=mask, probability=probability, **told))
    return torch.stack(outputs)


def _look_up(table, ids, padding_idx):
    """Rows of a table by a matrix product, the row `padding_idx` without a gradient."""
    if padding_idx is not None:
        is_padding = torch.arange(table.shape[0])[:, None] == padding_idx
        table = torch.where(is_padding, table.detach(), table)
    return torch.nn.functional.one_hot(ids, table.shape[0]).to(table.dtype) @ table


def combined(tensors, weights, *, prune=None, elect=False, density=1.0, frequency=False, keep=None):
    """The weighted combination of tensors of one shape, element by element: an array.

    `keep` are the masks of random pruning; `prune` is None, "magnitude" or "random".
    """
    left = []
    for number, x in enumerate(tensors):
        x = x.double().numpy().copy()
        if prune == "magnitude":
            order = sorted(range(x.size), key=lambda i, x=x: (-abs(x.flat[i]), i))
            for i in order[int(density * x.size) :]:
                x.flat[i] = 0.0
        if prune == "random":
            x = np.where(keep[number], x / density, 0.0)
        left.append(x)
    found = np.zeros_like(left[0])
    for i in np.ndindex(*found.shape):
        values = [x[i] for x in left]
        majority = 1 if sum(np.sign(values) if frequency else values) >= 0 else -1
        counted = [w * v for w, v in zip(weights, values, strict=True) if not elect or np.sign(v) == majority]
        found[i] = sum(counted) / (max(1, len(counted)) if elect else 1)
    return found


def nearest(matrix, rank):
    """The nearest matrix of a rank."""
    u, s, vh = np.linalg.svd(matrix, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vh[:rank]


def run(params, x, cotangent, *, dtype=torch.float64, **layer):
    """Output, gradients of the parameters and of x (None for ids) of sum(output * cotangent), computed in `dtype`."""
    params = {name: p.detach().to(dtype).requires_grad_() for name, p in params.items()}
    x = x.detach().to(dtype).requires_grad_() if x.is_floating_point() else x
    y = forward(params, x, **layer)
    inputs = [*params.values(), *([x] if x.is_floating_point() else [])]
    grads = torch.autograd.grad((y * cotangent.to(dtype)).sum(), inputs)
    return y.detach(), dict(zip(params, grads, strict=False)), grads[-1] if x.is_floating_point() else None


# Weights in few bits.

# The code as bitsandbytes publishes it.
NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)


def dequantized(packed, scale, code, block):
    """Element for element: its value times the scale of its block, fp32. A scale without blocks is for all inputs."""
    rows = []
    for row, bits in enumerate(packed):
        values = bits.to(torch.float32).tolist()
        if code == "nf4":
            values = [NF4[nibble] for byte in bits.tolist() for nibble in (byte // 16, byte % 16)]
        scales = scale.tolist() if scale.dim() == 1 else scale[row].tolist()
        rows.append([value * scales[min(i // block, len(scales) - 1)] for i, value in enumerate(values)])
    return torch.tensor(rows, dtype=torch.float64).to(torch.float32)


# The mask of dropout, in unsigned 32-bit arithmetic.

MASK = 0xFFFFFFFF


def lowbias32(h):
    """C. Wellons' hash of 32 bits, as published; of a Python int or of a numpy array of uint64."""
    h = h ^ (h >> 16)
    h = (h * 0x7FEB352D) & MASK
    h = h ^ (h >> 15)
    h = (h * 0x846CA68B) & MASK
    return h ^ (h >> 16)


def folded(key, data):
    return lowbias32((key & MASK) ^ lowbias32((data + 0x2545F491) & MASK))


def stepped(key, number):
    """The hash of a token's number, or of a feature's: lowbias32 without its last step, of a step from the key."""
    h = (key + number * 0x2C1B3C6D) & MASK
    h = ((h ^ (h >> 16)) * 0x7FEB352D) & MASK
    return ((h ^ (h >> 15)) * 0x846CA68B) & MASK


def is_kept(key, token, feature, probability):
    """Whether dropout keeps one element: the product of two hashes, as a signed number, reaches a quantile of all."""
    h = (stepped(key, token) * stepped(key, feature + 0x297A2D39)) & MASK
    signed = h - (1 << 32) if h >= 1 << 31 else h
    return signed + (1 << 31) >= quantile(probability)


def quantile(probability):
    """How many of 2**32 numbers are dropped; where there is dropout, at least one."""
    return max(1, int(probability * (1 << 32))) if probability else 0


def token_numbers(shape):
    """The number of each token of [T...]: the last index counts ones, the one before steps of 2**32 / golden ratio."""
    weights = [pow(0x9E3779B1, len(shape) - 1 - d, 1 << 32) for d in range(len(shape))]
    return [sum(i * w for i, w in zip(index, weights, strict=True)) & MASK for index in np.ndindex(*shape)]


def keep_mask(key, shape, probability):
    """`is_kept` for every element of [T..., features]: a bool tensor."""
    tokens = np.array(token_numbers(shape[:-1]), dtype=np.uint64)
    features = np.arange(shape[-1], dtype=np.uint64) + np.uint64(0x297A2D39)
    key = np.uint64(key & MASK)
    h = (stepped(key, tokens)[:, None] * stepped(key, features)[None, :]) & np.uint64(MASK)
    keep = ((h + (1 << 31)) & MASK) >= quantile(probability)
    return torch.from_numpy(keep).reshape(shape)


def lorafa(lora_A, grad, scaling):
    """The gradient of lora_B whose update, scaling * grad' @ lora_A, comes nearest (least squares) to the weight's
    gradient divided by the scaling as it is seen through lora_A: grad' = grad (A A^T)^-1 / scaling^2."""
    if lora_A.dim() == 3:  # of each expert
        return torch.stack([lorafa(a, g, scaling) for a, g in zip(lora_A, grad, strict=True)])
    rows = lora_A.reshape(lora_A.shape[0], -1).double()
    found = torch.linalg.solve(rows @ rows.T, grad.reshape(-1, rows.shape[0]).double().T).T / scaling**2
    return found.reshape(grad.shape)
