"""Do torch's transforms see through the collectives on real processes? A column and a row layer, against dense ones.

`torch.func.grad`, `vmap` and their compositions over a real axis, and `torch.compile(fullgraph=True)`.
"""

import functools
import shutil

import oracle
import pytest
import torch
from mapped import cut, input_placement, output_placement, replicated
from pool import pool
from strategies import case, fixed_spec, plain
from torch.func import grad, vmap

import lora_fn

SIZE, SHAPE, NUM_ADAPTERS = 2, (4, 6), 3
SEQUENCE_DIMS = (None, 0, 1)
TOLERANCE = 1e-10


def pair(sequence_dim, *, dropout=0.25):
    """Two layers, whose first has the input and whose second has the cotangent."""
    attributes = {"size": SIZE, "sequence_dim": sequence_dim, "dropout": dropout, "bias": True, "lora_bias": True}
    down = {"in_features": 24, "out_features": 12}
    return {
        "up": case(fixed_spec("column", **attributes), SHAPE, 1, key=5),
        "down": case(fixed_spec("row", **attributes, **down), SHAPE, 2, key=6),
    }


def canonical(pair):
    return {path: one.params for path, one in pair.items()}


def adapters(pair):
    """Factors of several adapters, stacked: every one is the pair's, scaled."""
    scales = torch.linspace(0.5, 1.5, NUM_ADAPTERS, dtype=torch.float64)
    return {
        path: {n: torch.stack([p * s for s in scales]) for n, p in one.params.items() if n.startswith("lora_")}
        for path, one in pair.items()
    }


# What is computed: dense, and on one process.


def dense_loss(params, x, pair):
    for path, one in pair.items():
        keep = oracle.keep_mask(one.key, x.shape, one.spec.dropout)
        x = torch.sin(oracle.forward(params[path], x, keep=keep, probability=one.spec.dropout, **plain(one.spec)))
    return (x * pair["down"].cotangent).sum()


def local_loss(params, x, cotangent, pair, specs):
    """On whole tokens (or on this process's), of the local parameters."""
    for path, one in pair.items():
        x = torch.sin(lora_fn.apply(params[path], x, specs[path], key=torch.tensor(one.key)))
    return (x * cotangent).sum()


class Local:
    """One process's part of a pair."""

    def __init__(self, mesh, pair):
        self.index = mesh.get_local_rank("tp")
        self.specs = {path: one.spec.bind(mesh) for path, one in pair.items()}
        self.params = self.shard(canonical(pair))
        x, cotangent = pair["up"].x, pair["down"].cotangent
        self.x = cut(x, input_placement(self.specs["up"]), SIZE)[self.index].clone()
        self.cotangent = cut(cotangent, output_placement(self.specs["down"]), SIZE)[self.index].clone()
        self.loss = functools.partial(local_loss, cotangent=self.cotangent, pair=pair, specs=self.specs)

    def shard(self, params):
        return {path: lora_fn.shard(params[path], spec, self.index) for path, spec in self.specs.items()}


def whole(trees, pair):
    """Canonical gradients out of every process's; replicated ones must be the same everywhere."""
    return {path: lora_fn.unshard([tree[path] for tree in trees], one.spec) for path, one in pair.items()}


def assert_equal(got, want, tolerance=TOLERANCE):
    assert got.keys() == want.keys()
    for path, params in want.items():
        assert got[path].keys() == params.keys()
        for name, p in params.items():
            assert (got[path][name] - p).abs().max() <= tolerance * p.abs().max(), (path, name)


# grad, vmap and compositions.


def local_grad(mesh, pair):
    local = Local(mesh, pair)
    return grad(local.loss)(local.params, local.x)


@pytest.mark.parametrize("sequence_dim", SEQUENCE_DIMS)
def test_grad(sequence_dim):
    layers = pair(sequence_dim)
    got = whole(pool(SIZE).run(local_grad, layers), layers)
    assert_equal(got, grad(dense_loss)(canonical(layers), layers["up"].x, layers))


def cubes(gradient_of, params, names):
    """A number that is whole on every process: of the gradients of replicated parameters."""
    grads = gradient_of(params)
    return sum(grads[path][name].pow(3).sum() for path, name in names)


def local_grad_of_grad(mesh, pair, names):
    local = Local(mesh, pair)
    return grad(functools.partial(cubes, lambda p: grad(local.loss)(p, local.x), names=names))(local.params)


@pytest.mark.parametrize("sequence_dim", SEQUENCE_DIMS)
def test_grad_of_grad(sequence_dim):
    layers = pair(sequence_dim)
    names = [(path, name) for path, one in layers.items() for name in replicated(one.spec) if name.startswith("lora_")]
    got = whole(pool(SIZE).run(local_grad_of_grad, layers, names), layers)
    gradient_of = functools.partial(grad(dense_loss), x=layers["up"].x, pair=layers)
    assert_equal(got, grad(functools.partial(cubes, gradient_of, names=names))(canonical(layers)))


def local_vmap(mesh, pair, stacked, transform):
    """The loss or gradient of every adapter, by vmap; the frozen base and x are not batched."""
    local = Local(mesh, pair)
    frozen = {path: {n: p for n, p in ps.items() if not n.startswith("lora_")} for path, ps in local.params.items()}
    each = [
        local.shard({p: {n: t[k] for n, t in ps.items()} for p, ps in stacked.items()}) for k in range(NUM_ADAPTERS)
    ]
    factors = {p: {n: torch.stack([one[p][n] for one in each]) for n in ps} for p, ps in stacked.items()}

    def loss(factors):
        return local.loss(lora_fn.combine(factors, frozen), local.x)

    return vmap(grad(loss) if transform == "vmap(grad)" else loss)(factors)


def adapter(stacked, k):
    return {path: {name: p[k] for name, p in params.items()} for path, params in stacked.items()}


def with_adapter(pair, factors):
    return {path: one.params | factors[path] for path, one in pair.items()}


@pytest.mark.parametrize("sequence_dim", SEQUENCE_DIMS)
def test_vmap_over_adapters(sequence_dim):
    layers = pair(sequence_dim)
    stacked = adapters(layers)
    losses = torch.stack(pool(SIZE).run(local_vmap, layers, stacked, "vmap"))
    want = torch.stack(
        [dense_loss(with_adapter(layers, adapter(stacked, k)), layers["up"].x, layers) for k in range(NUM_ADAPTERS)]
    )
    got = losses[0] if sequence_dim is None else losses.sum(0)
    assert (got - want).abs().max() <= TOLERANCE * want.abs().max()


@pytest.mark.parametrize("sequence_dim", SEQUENCE_DIMS)
def test_vmap_of_grad_over_adapters(sequence_dim):
    layers = pair(sequence_dim)
    stacked = adapters(layers)
    trees = pool(SIZE).run(local_vmap, layers, stacked, "vmap(grad)")
    for k in range(NUM_ADAPTERS):
        factors = adapter(stacked, k)
        got = whole([adapter(tree, k) for tree in trees], layers)
        want = grad(lambda f: dense_loss(with_adapter(layers, f), layers["up"].x, layers))(factors)
        assert_equal(got, want)


# compile.


def eager_and_compiled(mesh, pair, backend):
    """Gradients by torch.autograd: of the function, and of the function compiled as one graph."""
    torch._dynamo.reset()
    local = Local(mesh, pair)
    # Compile in this process: a pool of compilers would outlive the call. Dropout's keys are constants in the graph, so
    # that the compiler knows the hash's operands: overflow must wrap all the same.
    with torch._inductor.config.patch(compile_threads=1):
        compiled = torch.compile(local.loss, fullgraph=True, backend=backend)
        return [lora_fn.value_and_grad(f)(local.params, local.x) for f in (local.loss, compiled)]


@pytest.mark.parametrize(
    ("backend", "sequence_dim"),
    (
        *(("aot_eager", sequence_dim) for sequence_dim in SEQUENCE_DIMS),
        pytest.param(
            "inductor", 1, marks=pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
        ),
    ),
)
def test_compiled_equals_eager(backend, sequence_dim):
    layers = pair(sequence_dim)
    results = pool(SIZE).run(eager_and_compiled, layers, backend, timeout=180)
    for (value, _), (compiled_value, _) in results:
        assert (compiled_value - value).abs() <= TOLERANCE * value.abs()
    eager, compiled = (whole([one[i][1] for one in results], layers) for i in range(2))
    assert_equal(compiled, eager)
    assert_equal(eager, grad(dense_loss)(canonical(layers), layers["up"].x, layers))


def compiled_transform(mesh, pair, transform):
    """What is raised where the transform is inside the compiled region."""
    torch._dynamo.reset()
    local = Local(mesh, pair)

    def by_grad(params):
        return grad(local.loss)(params, local.x)

    def by_vmap(params):
        return vmap(lambda x: local.loss(params, x))(torch.stack([local.x, local.x]))

    function = {"grad": by_grad, "vmap": by_vmap}[transform]
    try:
        torch.compile(function, fullgraph=True, backend="eager")(local.params)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


@pytest.mark.parametrize("transform", ("grad", "vmap"))
def test_a_transform_inside_the_compiled_region_is_refused(transform):
    """Dynamo would leave the collectives' own backward out, and say nothing."""
    for message in pool(SIZE).run(compiled_transform, pair(0), transform):
        assert message is not None and "collectives.py" in message
