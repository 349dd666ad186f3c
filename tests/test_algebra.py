"""Is a combination of adapters what PEFT makes of them, and the same at every size of the axis?

The laws are plain functions that take the module `algebra`, so that test_mutations can ask them of a defective one.
"""

import dataclasses
import itertools
import math

import mapped
import oracle
import pytest
import strategies
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import ADAPTED, fixed_spec
from torch.func import vmap

import lora_fn
from lora_fn import LoraSpec, SpecError, algebra, sharding, targets
from lora_fn.initialize import seed_of
from lora_fn.reshard import gather

EXACT = 1e-10  # in float64
SEEDS = st.integers(0, 1 << 20)
WEIGHTS = (0.5, -1.5, 2.0)


def error(a, b):
    """max|a-b| / max|b|; where b is all zeros, a must be."""
    a, b = a.double(), torch.as_tensor(b).double()
    assert a.shape == b.shape
    return ((a - b).abs().max() / b.abs().max().clamp(min=1e-300)).item()


def how_of(algebra, name, **options):
    """A combination of a type, with a density where it prunes."""
    density = 0.6 if algebra.METHODS[name].prune else None
    return algebra.Combination(how=name, **{"density": density} | options)


def adapters_of(spec, number=3, seed=0, dtype=torch.float64):
    """Random adapters of a layer: (canonical factors, the layer), of different alphas."""
    found = []
    for k in range(number):
        parts = tuple(dataclasses.replace(p, alpha=p.alpha + k) if p.rank else p for p in spec.parts)
        own = dataclasses.replace(spec, parts=parts, **({} if parts else {"alpha": spec.alpha + k}))
        own = dataclasses.replace(own, share_A=False)
        params = strategies.case(own, (1,), 100 * seed + k, dtype=dtype).params
        found.append(({n: p for n, p in params.items() if n.startswith("lora_")}, own))
    return found


def pairs_of(layers, name):
    """[[(A [r, in], B [out, r], bias [out], scaling) of each adapter] of each expert]: of plain ones, by shapes."""
    each = []
    for params, spec in layers:
        [part] = [part for part in spec.updates if part.name == name]
        a, b = params[part.param("lora_A")], params[part.param("lora_B")]
        stacked = spec.kind == "experts"
        bias = params.get(part.param("lora_B_bias"), torch.zeros(len(a) if stacked else 1, part.size))
        experts = zip(a, b, bias, strict=True) if stacked else [(a, b, bias)]
        scaling = part.alpha / (math.sqrt(part.rank) if spec.use_rslora else part.rank)
        each.append([(x.reshape(part.rank, -1), y.reshape(-1, part.rank), z, scaling) for x, y, z in experts])
    return list(zip(*each, strict=True))


def law_a_combination_is_the_oracles(algebra, layers, weights, how):
    """Each factor, or the update, of each part and expert, is that of a loop over elements."""
    made, of = algebra.add_weighted(layers, weights, how)
    method = how.method
    told = {"prune": method.prune, "elect": method.elect, "density": how.density}
    told["frequency"] = how.majority_sign_method == "frequency"
    for part in of.updates:
        found = pairs_of([(made, of)], part.name)
        for number, (expert, [(down, up, bias, scaling)]) in enumerate(
            zip(pairs_of(layers, part.name), found, strict=True)
        ):
            assert scaling == 1.0
            both = [w * s for w, (_, _, _, s) in zip(weights, expert, strict=True)]

            def mixed(kind, tensors, weights, number=number, part=part):
                seeds = [seed_of(seed_of(how.seed, part.name), f"{kind}.{number}.{i}") for i in range(len(tensors))]
                dropped = 1 - (how.density or 1)
                keep = [oracle.keep_mask(s & 0x7FFFFFFF, t.shape, dropped) for s, t in zip(seeds, tensors, strict=True)]
                return torch.from_numpy(oracle.combined(tensors, weights, keep=keep, **told))

            if of.lora_bias:
                tasks = [(s * z).reshape(1, -1) for _, _, z, s in expert]
                assert error(bias.reshape(1, -1), mixed("lora_B_bias", tasks, weights)) < EXACT
            if method.of == algebra.FACTORS:
                downs, ups = [a for a, _, _, _ in expert], [b for _, b, _, _ in expert]
                roots = [math.sqrt(abs(w)) for w in both]
                signed = [math.copysign(root, w) for root, w in zip(roots, both, strict=True)]
                assert error(down, mixed("lora_A", downs, signed)) < EXACT
                assert error(up, mixed("lora_B", ups, roots)) < EXACT
                continue
            updates = [s * b @ a for a, b, _, s in expert]
            if method.of == algebra.BESIDE:
                assert down.shape[0] == sum(a.shape[0] for a, _, _, _ in expert)
                assert error(up @ down, sum(w * u for w, u in zip(weights, updates, strict=True))) < EXACT
                continue
            whole = mixed("update", updates, weights).numpy()
            assert down.shape[0] == (how.svd_rank or max(a.shape[0] for a, _, _, _ in expert))
            assert error(up @ down, oracle.nearest(whole, down.shape[0])) < 1e3 * EXACT  # singular values may be near
            few = min(*whole.shape, down.shape[0])
            assert error(down[:few] @ down[:few].T, torch.eye(few)) < EXACT


def law_6_shard_commutes(algebra, layers, weights, how):
    """Each process gathers its local factors and combines them: all get the canonical combination."""
    made, of = algebra.add_weighted(layers, weights, how)
    specs = [spec for _, spec in layers]

    def local(index, *locals_):
        whole = [(gather(own, spec, index=index), spec) for own, spec in zip(locals_, specs, strict=True)]
        return algebra.add_weighted(whole, weights, how)[0]

    stacks = [mapped.stack(params, spec) for params, spec in layers]
    if specs[0].axis.size == 1:  # nothing is gathered; and what compares copies of heads is not to be mapped
        lanes = {n: p[None] for n, p in local(None, *({n: p[0] for n, p in each.items()} for each in stacks)).items()}
    else:
        lanes = vmap(local)(mapped.lanes(specs[0]), *stacks)
    assert lanes.keys() == made.keys() == set(sharding.adapter_names(of))
    for name, p in made.items():
        assert p.shape == sharding.canonical_shape(of, name)
        assert error(lanes[name], lanes[name][:1].expand_as(lanes[name])) < EXACT
        if how.method.of != algebra.UPDATES:
            assert error(lanes[name][0], p) < EXACT
    first = {name: p[0] for name, p in lanes.items()}
    for part in of.updates:
        assert error(*(lora_fn.delta(each, of, part=part.name) for each in (first, made))) < EXACT
    assert all(torch.equal(mapped.unstack(mapped.stack(made, of), of)[name], p) for name, p in made.items())


def law_the_norm_is_the_updates(algebra, layers, weights):
    """The norm of the weighted sum of the updates."""
    squares = 0.0
    for part in layers[0][1].updates:
        updates = [lora_fn.delta(params, spec, part=part.name) for params, spec in layers]
        squares += sum(w * u for w, u in zip(weights, updates, strict=True)).square().sum()
    assert math.isclose(algebra.norm(layers, weights), squares.sqrt().item(), rel_tol=EXACT)


def law_a_clamp_cuts_to_a_quantile(algebra, layers, weights, quantile):
    """Singular vectors beyond a quantile of both factors are cut to it."""
    plain, _ = algebra.add_weighted(layers, weights, how_of(algebra, "ties_svd"))
    cut, _ = algebra.add_weighted(layers, weights, how_of(algebra, "ties_svd", svd_clamp=quantile))
    most = torch.cat([p.flatten() for p in plain.values()]).quantile(quantile)
    assert all(error(cut[name], p.clamp(-most, most)) < EXACT for name, p in plain.items())
    assert any(not torch.equal(cut[name], p) for name, p in plain.items())


def law_equal_elements_are_kept_in_their_order(algebra):
    """Of as many equal elements as there may be, just the share is kept, the first ones."""
    spec = fixed_spec("linear")
    factors = {n: torch.ones(sharding.canonical_shape(spec, n)) for n in sharding.adapter_names(spec)}
    made, _ = algebra.add_weighted([(factors, spec)], [1.0], how_of(algebra, "magnitude_prune", density=0.5))
    for p in made.values():
        assert torch.equal((p != 0).flatten(), torch.arange(p.numel()) < p.numel() // 2)


def ask_all(algebra):
    """All laws on fixed cases: of a defective module, one raises."""
    for row in ("linear", "qkv", "conv2d, output channels", "experts, column"):
        options = {} if row.startswith(("conv2d", "experts")) else {"use_rslora": True, "lora_bias": True, "bias": True}
        layers = adapters_of(fixed_spec(row, **options))
        for name in algebra.METHODS:
            law_a_combination_is_the_oracles(algebra, layers, WEIGHTS, how_of(algebra, name))
        law_6_shard_commutes(algebra, layers, WEIGHTS, how_of(algebra, "dare_ties"))
    by_number = how_of(algebra, "ties", majority_sign_method="frequency")
    law_a_combination_is_the_oracles(algebra, adapters_of(fixed_spec("linear")), WEIGHTS, by_number)
    law_a_clamp_cuts_to_a_quantile(algebra, adapters_of(fixed_spec("linear")), WEIGHTS, 0.9)
    law_equal_elements_are_kept_in_their_order(algebra)
    law_the_norm_is_the_updates(algebra, layers, WEIGHTS)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """The tensors are small: more threads would only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("row", ADAPTED)
def test_law_6_shard_commutes(row):
    """Every row, every type, with a bias where the row has one."""
    some = {} if row.startswith("embedding") else {"lora_bias": True, "bias": True}
    layers = adapters_of(fixed_spec(row, **some))
    for name in algebra.METHODS:
        law_6_shard_commutes(algebra, layers, WEIGHTS, how_of(algebra, name))


@pytest.mark.parametrize("row", ADAPTED)
@settings(max_examples=6)
@given(data=st.data())
def test_a_combination_is_the_oracles(row, data):
    spec = data.draw(strategies.specs(row, variant="lora"))
    layers = adapters_of(spec, data.draw(st.integers(1, 3)), data.draw(SEEDS))
    weights = data.draw(st.lists(st.sampled_from((-2.0, 0.25, 1.0, 3.0)), min_size=len(layers), max_size=len(layers)))
    name = data.draw(st.sampled_from(list(algebra.METHODS)))
    options = {}
    if algebra.METHODS[name].prune:
        options["density"] = data.draw(st.sampled_from((0.1, 0.5, 0.9, 1.0)))
    if algebra.METHODS[name].elect:
        options["majority_sign_method"] = data.draw(st.sampled_from(algebra.MAJORITIES))
    if algebra.METHODS[name].of == algebra.UPDATES:
        options["svd_rank"] = data.draw(st.none() | st.integers(1, 5))
    how = how_of(algebra, name, **options, seed=data.draw(SEEDS))
    before = [{n: p.clone() for n, p in params.items()} for params, _ in layers]
    law_a_combination_is_the_oracles(algebra, layers, weights, how)
    law_the_norm_is_the_updates(algebra, layers, weights)
    law_6_shard_commutes(algebra, layers, weights, how)
    assert all(
        torch.equal(params[n], p) for (params, _), own in zip(layers, before, strict=True) for n, p in own.items()
    )


def test_all_laws_hold_on_the_fixed_cases():
    ask_all(algebra)


@pytest.mark.parametrize("row", ("column", "row", "qkv"))
@pytest.mark.parametrize("variant", ("qalora", "bdlora", "mica", "alora"))
def test_variants_are_combined_as_plain_updates(row, variant):
    """The sum of updates of whatever variants, of different ranks; an aLoRA stays one."""
    options = {"qalora": {"group_size": 3}, "bdlora": {"block_diagonal": "lora_A", "blocks": 3}}.get(variant, {})
    layers = adapters_of(fixed_spec(row, rank=3, **options, variant=variant))
    other = "alora" if variant == "alora" else "lora"
    layers += adapters_of(fixed_spec(row, rank=2, variant=other, use_rslora=True), 1, seed=1)
    weights = (*WEIGHTS, -1.0)
    for name, options in (("cat", {}), ("svd", {"svd_rank": 11})):
        made, of = lora_fn.add_weighted(layers, weights, how_of(algebra, name, **options))
        assert of.variant == other
        for part in of.updates:
            exact = sum(
                w * lora_fn.delta(params, spec, part=part.name)
                for w, (params, spec) in zip(weights, layers, strict=True)
            )
            assert error(lora_fn.delta(made, of, part=part.name), exact) < EXACT


def test_what_shares_a_lora_A_gets_one_each():
    spec = dataclasses.replace(fixed_spec("qkv"), share_A=True)
    params = {n: p for n, p in strategies.case(spec, (1,), 0).params.items() if n.startswith("lora_")}
    made, of = lora_fn.add_weighted([(params, spec)] * 2, [1.0, 1.0], how_of(algebra, "cat"))
    assert set(made) == {"lora_A.q", "lora_A.k", "lora_B.q", "lora_B.k"}
    for part in of.updates:
        assert error(lora_fn.delta(made, of, part=part.name), 2 * lora_fn.delta(params, spec, part=part.name)) < EXACT


def test_a_part_that_an_adapter_lacks_is_one_that_it_adds_nothing_to():
    spec = fixed_spec("qkv")
    parts = tuple(dataclasses.replace(p, rank=0, alpha=1.0) if p.name == "k" else p for p in spec.parts)
    one = adapters_of(spec, 1) + adapters_of(dataclasses.replace(spec, parts=parts), 1, seed=2)
    made, of = lora_fn.add_weighted(one, [1.0, -2.0], how_of(algebra, "cat"))
    assert [(part.name, part.rank) for part in of.updates] == [("q", 6), ("k", 3)]
    assert error(lora_fn.delta(made, of, part="k"), lora_fn.delta(*one[0], part="k")) < EXACT


def test_an_adapter_minus_itself_is_nothing():
    layers = adapters_of(fixed_spec("column"), 1) * 2
    for name in ("linear", "cat", "svd"):
        made, of = lora_fn.add_weighted(layers, [0.7, -0.7], how_of(algebra, name))
        assert lora_fn.delta(made, of).abs().max() < EXACT
    made, of = lora_fn.add_weighted(layers[:1], [-1.0], how_of(algebra, "linear"))
    assert error(lora_fn.delta(made, of), -lora_fn.delta(*layers[0])) < EXACT


def test_random_elements_are_as_many_as_asked_and_keep_the_mean():
    """Of each adapter its own ones, and other ones with another seed; all of them with a density of 1."""
    spec = lora_fn.LayerSpec(kind="linear", in_features=400, out_features=300, rank=50, alpha=50.0)
    ones = {n: torch.ones(sharding.canonical_shape(spec, n)) for n in sharding.adapter_names(spec)}
    kept = {}
    for seed in range(2):
        how = how_of(algebra, "dare_linear", density=0.3, seed=seed)
        made, _ = lora_fn.add_weighted([(ones, spec), (ones, spec)], [1.0, 10.0**4], how)
        for name, p in made.items():
            both = {
                (first, other): (p - (first + 100 * other) / 0.3).abs() < 1e-3 for first in (0, 1) for other in (0, 1)
            }
            assert sum(both.values()).eq(1).all()  # scaled up by 1 / 0.3, each adapter's elements by themselves
            for key, share in {(0, 0): 0.49, (0, 1): 0.21, (1, 0): 0.21, (1, 1): 0.09}.items():
                assert abs(both[key].double().mean() - share) < 0.02
            kept[seed, name] = both[1, 1]
    assert all(not torch.equal(kept[0, name], kept[1, name]) for name in made)
    layers = adapters_of(fixed_spec("column"))
    for name, plain in (("dare_linear", "linear"), ("dare_linear_svd", "svd"), ("magnitude_prune", "linear")):
        made, of = lora_fn.add_weighted(layers, WEIGHTS, how_of(algebra, name, density=1.0))
        assert (
            error(
                lora_fn.delta(made, of), lora_fn.delta(*lora_fn.add_weighted(layers, WEIGHTS, how_of(algebra, plain)))
            )
            < EXACT
        )


REFUSALS = {
    "how": ({"how": "mean"}, "how: is 'mean', expected one of svd, linear, cat"),
    "no density": ({"how": "ties"}, "density: is None, which 'ties' needs"),
    "density of 0": ({"how": "ties", "density": 0.0}, "density: is 0.0, expected a number above 0"),
    "an idle density": ({"how": "cat", "density": 0.5}, "density: is 0.5, which changes nothing of 'cat'"),
    "an idle majority": (
        {"how": "dare_linear", "density": 0.5, "majority_sign_method": "frequency"},
        "majority_sign_method: is 'frequency', which changes nothing of 'dare_linear'",
    ),
    "an idle rank": ({"how": "linear", "svd_rank": 2}, "svd_rank: is 2, which changes nothing of 'linear'"),
    "rank": ({"svd_rank": 0}, "svd_rank: is 0, expected an integer of at least 1"),
    "clamp": ({"svd_clamp": 0.3}, "svd_clamp: is 0.3, expected a quantile above 0.5"),
    "driver": ({"svd_driver": "lapack"}, "svd_driver: is 'lapack', expected one of"),
    "majority": (
        {"how": "ties", "density": 1, "majority_sign_method": "most"},
        "majority_sign_method: is 'most', expected",
    ),
    "seed": ({"seed": 1.5}, "seed: is 1.5, expected an integer"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_a_combination_that_cannot_be_is_refused(case):
    options, message = REFUSALS[case]
    with pytest.raises(SpecError, match=message):
        lora_fn.Combination(**options)


def test_layers_that_do_not_go_together_are_refused():
    one, other = fixed_spec("column"), fixed_spec("column", rank=2)
    params = [adapters_of(spec, 1)[0] for spec in (one, other)]
    with pytest.raises(SpecError, match=r"its ranks are \[3, 2\], and 'linear' needs equal ones; use 'cat'"):
        lora_fn.add_weighted(params, [1, 1], how_of(algebra, "linear"))
    with pytest.raises(SpecError, match=r"is \('column', 12, 24\) to one adapter and \('column', 24, 12\) to another"):
        algebra.result([one, fixed_spec("column", in_features=24, out_features=12)], how_of(algebra, "cat"))
    for variant in algebra.UNFIT:
        with pytest.raises(SpecError, match=f"variant '{variant}' has no weighted sum: "):
            algebra.result([one, fixed_spec("column", variant=variant)], how_of(algebra, "cat"))
    with pytest.raises(SpecError, match="an aLoRA adds its update for some tokens only"):
        algebra.result([one, fixed_spec("column", variant="alora")], how_of(algebra, "cat"))
    with pytest.raises(SpecError, match="found 1 weights for 2 adapters"):
        lora_fn.add_weighted(params, [1], how_of(algebra, "cat"))
    with pytest.raises(SpecError, match="no adapter has factors of the layer"):
        algebra.result([one.base], how_of(algebra, "cat"))


UNFIT = {
    "bias": ({"bias": "all"}, "bias is all: it trains biases of the base, which no weights combine"),
    "modules": ({"modules_to_save": ["norm"]}, "it trains whole modules"),
    "tokens": ({"trainable_token_indices": [1]}, "it trains embeddings of tokens"),
    "residual": (
        {"init_lora_weights": "pissa"},
        "works over a base that lacks what it began with; save it with as_lora",
    ),
    "quantized": (
        {"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 4}},
        "works over a base that it has quant",
    ),
    "dora": ({"use_dora": True}, "use_dora is True: it has no weighted sum"),
    "kasa": ({"kasa_config": {}}, "kasa_config is .*: it has no weighted sum"),
    "alora": ({"alora_invocation_tokens": [1]}, r"alora_invocation_tokens: differs \(a None, b \(1,\)\)"),
}


@pytest.mark.parametrize("case", UNFIT)
def test_adapters_that_have_no_weighted_sum_are_refused(case):
    options, message = UNFIT[case]
    with pytest.raises(SpecError, match=message):
        algebra.check({"a": LoraSpec(), "b": LoraSpec(**options)}, [1, 1])


def test_weights_that_are_no_numbers_are_refused():
    with pytest.raises(SpecError, match="weights: have a nan, expected finite numbers"):
        algebra.check({"a": LoraSpec()}, [math.nan])


NAMES = [f"{top}layers.{n}.{own}" for top in ("", "other.") for n, own in itertools.product(range(3), ("q", "k", "v"))]


@settings(max_examples=40)
@given(data=st.data())
def test_the_spec_of_a_combination_adapts_what_any_of_them_does(data):
    """Whatever the targets: exactly the layers of all, with the ranks that were found."""
    some = st.lists(st.sampled_from(("q", "k", "v", "layers.1.q", "other.layers.0.v")), min_size=1, unique=True)
    given_specs = []
    for _ in range(data.draw(st.integers(1, 3))):
        how = data.draw(st.sampled_from(("names", "expression", "all-linear")))
        named = {"names": data.draw(some), "expression": r".*\.(q|v)", "all-linear": "all-linear"}[how]
        only = data.draw(st.sampled_from((None, [1], [0, 2]))) if how == "names" else None
        given_specs.append(
            LoraSpec(
                target_modules=named, layers_to_transform=only, exclude_modules=data.draw(st.sampled_from(((), ("k",))))
            )
        )
    adapted = []
    for spec in given_specs:
        if spec.exclude_modules and spec.target_modules == ("k",):
            return
        try:
            adapted += targets.select(NAMES, spec, linear=NAMES)
        except lora_fn.TargetError:
            return
    found = {name: data.draw(st.integers(1, 3)) for name in dict.fromkeys(adapted)}
    both = algebra.lora_spec(given_specs, found)
    assert set(targets.select(NAMES, both, linear=NAMES)) == set(found)
    for name, rank in found.items():
        assert targets.rank_of(name, both) == targets.alpha_of(name, both) == rank
