"""The grid on our side: one case on the processes of an axis, and how far it is from what stock PEFT found."""

import math
import traceback
from dataclasses import replace

import mapped
import torch
from grid import DTYPES, KEY, NO_DELTA, SEED, UNMERGED, base_spec, parallel_net

import adapters
import lora_fn
from adapters import bind
from adapters.parallel import attribute
from lora_fn import Axis, Shard, peft_format, sharding
from lora_fn.axis import axis_of_mesh
from lora_fn.reshard import gather

TOLERANCE = {"float32": 1e-5, "float64": 1e-10, "bfloat16": 2.0}  # of bfloat16, in the errors that stock PEFT makes
# Initialisations whose factors are random: what can be compared is how they are distributed.
RANDOM = ("true", "false", "gaussian", "orthogonal")
# Those that change the base's weights, which stock PEFT computes in float32. (So does KaSA.)
FACTORISED = ("pissa", "pissa_niter_4", "olora", "loftq", "corda")
# Those that pair singular vectors whose signs are free, so that another rounding gives another adapter: what comes
# after the start is compared over stock PEFT's own base.
SIGNED = ("lora_ga",)
# Before any step, as max|a - b| / max|b|. What stock PEFT factorises, it factorises in float32.
START = {"float32": 1e-5, "float64": 1e-10, "bfloat16": 2**-6}
SPREAD = 0.5  # by how much the standard deviations of a few random numbers may differ


def ours(mesh, case, directory, given, output):
    """What one process of ours finds (see `found_on`)."""
    axis = Axis() if mesh is None else axis_of_mesh(mesh, "tp")
    net = parallel_net(case, axis)
    return found_on(net, {name: m.spec for name, m in modules(net).items()}, case, directory, given, output)


def modules(net):
    """Name -> module, of the layer and the one beside it."""
    return {f"{what}.{name}": m for what in ("block", "beside") for name, m in getattr(net, what).items()}


def found_on(net, specs, case, directory, given, output):
    """What one process finds: local outputs and gradient of x; everything else canonical.

    Args:
        net: Of parallel layers, whose values are filled in.
        specs: Of its modules, by name.
        case: The case.
        directory: Of the adapter.
        given: Input, cotangents and base weights (see grid_stock.reference).
        output: Where the adapter is saved to.
    """
    with torch.no_grad():
        for name, module in modules(net).items():
            axis = specs[name].axis
            for n, part in lora_fn.shard(given[name.partition(".")[0]], specs[name], axis.index or 0).items():
                module.get_parameter(attribute(specs[name], n)).copy_(part)
    [spec] = (specs[name] for name in specs if name.startswith("block."))
    usual, index = spec if spec.sequence_dim is None else replace(spec, sequence_dim=1), spec.axis.index or 0

    def local(x):
        return batch_first([mapped.cut(x, mapped.input_placement(usual), case.tp)[index].clone()], spec)[0]

    data = {"batches": [{"x": local(x)} for x in given["data"]], "step": loss} if given["data"] else {}
    dtype = DTYPES[case.dtype]
    adapters.wrap(net, adapters.read_spec(directory), seed=SEED, gradients=case.gradients, dtype=dtype, **data)
    net.eval()
    [(path, layer)] = ((path, layer) for path, layer in bind.layers(net).items() if path.startswith("block."))
    spec, x = layer.spec, local(given["x"])
    if case.variant == "alora":
        adapters.set_invocation(net, given["ids"])
    whole = gather({n: p.detach() for n, p in layer.params().items()}, spec)
    found = {f"start base {n}": t for n, t in in_one({n: whole[n] for n in sharding.names(spec.base)}, spec).items()}
    if case.variant not in NO_DELTA:
        found["start delta"] = delta(whole, spec)
    tree = {path: {n: whole[n] for n in sharding.stored_names(spec)}}
    found |= {f"start factor {key}": t for key, t in peft_format.to_state_dict(tree, {path: spec}).items()}
    found |= {f"start output {n}": y.detach() for n, y in enumerate(batch_first(net(x), spec))}

    if case.init in SIGNED:
        with torch.no_grad():
            for n, part in lora_fn.shard(apart(given["base"], spec), spec.base, index).items():
                layer.get_parameter(attribute(spec, n)).copy_(part)
    adapters.load(net, directory)
    adapters.save(net, output)
    found |= {} if case.variant in UNMERGED else merged(layer)
    adapters.set_dropout_key(net.train(), torch.tensor(KEY))
    x.requires_grad_(x.is_floating_point())
    outputs = batch_first(net(x), spec)
    placement = mapped.output_placement(usual)
    cotangents = [mapped.cut_cotangent(c, placement, case.tp)[index] for c in given["cotangents"]]
    sum((y * c).sum() for y, c in zip(outputs, cotangents, strict=True)).backward()
    specs = bind.specs(net)
    grads = {path: {n: p.grad for n, p in of.items()} for path, of in bind.factors(net).items()}
    if case.gradients == "deferred":
        grads = lora_fn.sync_gradients(grads, specs)
    tree = {path: gather(of, specs[path]) for path, of in grads.items()}
    found |= {f"output {n}": y.detach() for n, y in enumerate(outputs)}
    found |= {f"d {key}": t for key, t in named(tree, specs).items()}
    return found | ({"d x": batch_first([x.grad], spec)[0]} if x.is_floating_point() else {})


def batch_first(tensors, spec):
    """Activations with the batch before the sequence, whatever the layer has; and back."""
    return tuple(t.transpose(0, 1) if spec.sequence_dim == 0 and t.is_floating_point() else t for t in tensors)


def named(tree, specs):
    """Tensors of some parameters of layers, by their names in an adapter file."""
    missing = {
        path: {n: torch.full(sharding.canonical_shape(spec, n), torch.nan) for n in sharding.stored_names(spec)}
        for path, spec in specs.items()
    }
    state = peft_format.to_state_dict({path: of | tree[path] for path, of in missing.items()}, specs)
    return {key: t for key, t in state.items() if not t.isnan().all()}


def loss(net, batch):
    """What LoRA-GA takes the gradient of."""
    return sum(y.square().sum() for y in net(**batch))


def delta(params, spec):
    """The whole update of a layer, in the orientation of PEFT's weights."""
    parts = {p.name: lora_fn.delta(params, spec, part=p.name) for p in spec.updates}
    if not spec.parts:
        return parts[""]
    return torch.cat([parts[p.name] for p in spec.parts])


def merged(layer):
    local = lora_fn.merge({n: p.detach() for n, p in layer.params().items()}, layer.spec)
    return {f"merged {n}": t for n, t in in_one(gather(local, layer.spec.base), layer.spec).items()}


def apart(params, spec):
    """The inverse of `in_one`."""
    if not spec.parts or spec.fuse_qkv:
        return params
    rows = {base: p.split([part.size for part in spec.parts]) for base, p in params.items()}
    return {part.param(base): own[number] for base, own in rows.items() for number, part in enumerate(spec.parts)}


def in_one(params, spec):
    """The base's parameters of a layer, those of its parts in one."""
    if not spec.parts or spec.fuse_qkv:
        return params
    bases = dict.fromkeys(name.partition(".")[0] for name in params)
    return {base: torch.cat([params[part.param(base)] for part in spec.parts]) for base in bases}


def joined(case, each):
    """What all processes found, as one."""
    spec, found = base_spec(case), {}
    features = Shard(mapped.features(spec))
    for name in each[0]:
        parts = [one[name] for one in each]
        if "output" in name:
            placement = mapped.output_placement(spec)
            size = spec.out_features if placement == features else None
            found[name] = mapped.join(torch.stack(parts), placement, size)
        elif name == "d x":
            found[name] = mapped.join(torch.stack(parts), mapped.input_gradient_placement(spec))
        else:
            assert all(torch.equal(parts[0], part) for part in parts[1:]), f"{name} differs between processes"
            found[name] = parts[0]
    return found


# ------------------------------------------------------------------------------------------------------------- compare


def relative(found, expected):
    """max|a - b| / max|b|."""
    found, expected = found.detach().double(), expected.detach().double()
    if found.shape != expected.shape:
        return math.inf
    return float((found - expected).abs().max() / expected.abs().max().clamp_min(1e-30))


def errors(case, expected, found):
    """Name of each comparison -> its error over what is allowed: 1 is the limit."""
    start = {name: t for name, t in found.items() if name.startswith("start ")}
    values = {name: t for name, t in found.items() if name not in start}
    if values.keys() != expected["values"].keys():
        return {f"names {sorted(values.keys() ^ expected['values'].keys())}": math.inf}
    told = start_errors(case, expected["start"], start, expected["given"]["block"])
    if relative(start["start output 0"], expected["values"]["output 0"]) < 1e-2:
        return {"an adapter that does nothing, so that the comparison says nothing": math.inf}
    if "truth" not in expected:
        limit = TOLERANCE["float32" if case.init in FACTORISED or case.variant == "kasa" else case.dtype]
        return told | {name: relative(t, expected["values"][name]) / limit for name, t in values.items()}
    groups = {"output": TOLERANCE["bfloat16"], "merged": TOLERANCE["bfloat16"]}
    groups["d"] = TOLERANCE["bfloat16"] * math.sqrt(case.tp)  # partial sums of gradients are summed in bfloat16
    for group, limit in groups.items():
        names = [name for name in values if name.split()[0] == group]
        if names:
            ratio = rms(values, expected["truth"], names) / rms(expected["values"], expected["truth"], names)
            told[group] = ratio / limit
    return told


def rms(found, truth, names):
    """The root mean square of the errors of tensors, each in units of its own root mean square."""
    each = [(found[n].double() - truth[n]) / truth[n].square().mean().sqrt() for n in names]
    return float(torch.cat([e.flatten() for e in each]).square().mean().sqrt())


def start_errors(case, expected, found, whole):
    """The errors before any step: of what an initialisation determines, the values; of what is random, the spread; of
    what has signs, that the layer is what it was."""
    if found.keys() != expected.keys():
        return {f"names {sorted(found.keys() ^ expected.keys())}": math.inf}
    if case.init in SIGNED:
        parts = [found[name].double() for name in ("start base weight", "start delta") if name in found]
        lost = (sum(parts) - whole["weight"].double()).abs().max() / parts[0].abs().max()
        return {"start weight": float(lost / START[case.dtype])} if len(parts) > 1 else {}
    told = {}
    exact = case.init in RANDOM and case.init != "orthogonal" and case.variant != "kasa"
    limit = START["float32" if case.dtype == "float64" and not exact else case.dtype]
    weight = expected["start base weight"].double().abs().max()
    for name, t in found.items():
        t, other = t.double(), expected[name].double()
        if t.shape != other.shape:
            told[f"{name}: {list(t.shape)}, expected {list(other.shape)}"] = math.inf
            continue
        if name.startswith("start factor"):
            if case.init in RANDOM and t.numel() > 64:
                told[name] = float((t.std() - other.std()).abs() / other.std().clamp_min(1e-12)) / SPREAD
        elif case.init != "false":
            scale = weight if name == "start delta" else other.abs().max()
            told[name] = float((t - other).abs().max() / scale) / limit
    return told


def run(mesh, jobs):
    """What one process finds in each of several cases; what was raised, in its place."""
    found = []
    for job in jobs:
        try:
            found.append(ours(mesh, *job))
        except Exception:
            found.append({"raised": traceback.format_exc()})
    return found
