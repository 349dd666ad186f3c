"""Are we stock PEFT, whatever is combined? An array of cases in which every pair of values occurs (see grid)."""

import functools
import re
from pathlib import Path

import grid
import grid_stock
import pytest
import torch
from pool import pool
from strategies import BY_RANK

import adapters
import lora_fn
from adapters import bind
from lora_fn import LoraFnError, peft_format, sharding

PAGE = Path(__file__).resolve().parent.parent / "docs" / "parity.md"


@functools.cache
def array():
    return grid.covering_array()


def test_every_layer_of_the_rules_table_is_in_the_grid():
    rows = {sharding.row_name(grid.base_spec(grid.PLAIN._replace(kind=kind))) for kind in grid.LAYERS}
    assert rows == sharding.TABLE.keys() - {"replicated", *BY_RANK}


def test_every_pair_of_values_that_can_be_together_is_in_the_array():
    there = {pair for case in array() for pair in grid.pairs(case)}
    assert there == {pair for pair, why in grid.possible_pairs().items() if why is None}


@pytest.mark.parametrize("size", grid.FACTORS["tp"])
def test_the_array_is_as_stock_peft(size, tmp_path):
    cases = [case for case in array() if case.tp == size]
    assert len(cases) > 5
    assert grid_stock.wrong(grid_stock.compared(cases, tmp_path, pool)) == {}


def test_what_is_refused_is_refused_with_the_reason(tmp_path):
    told = {}
    for pair, why in grid.possible_pairs().items():
        if why and not why.startswith(grid.STOCK):
            told.setdefault(why, grid.with_values(grid.PLAIN, pair))
    for why, case in told.items():
        with pytest.raises(LoraFnError, match=re.escape(why)):
            net = grid.parallel_net(case._replace(tp=1))
            adapters.wrap(net, peft_format.from_config(grid.config_of(case)))
            adapters.save(net, tmp_path)


def test_the_page_says_what_the_code_does():
    assert PAGE.read_text().partition(grid.MEASURED)[0] == grid.page(array()), "run: make grid-page"


@pytest.mark.parametrize("variant", ("lora", "dora"))
@pytest.mark.parametrize("kind", grid.LAYERS)
def test_a_thousand_merges_of_changing_adapters_leave_bf16_weights_as_they_were(kind, variant):
    """`merge` returns new tensors: to go back is to have kept the old ones."""
    case = grid.PLAIN._replace(kind=kind, variant=variant, dtype="bfloat16")
    if grid.refusal(case):
        return
    [spec] = bind.plan(grid.parallel_net(case, device="meta"), grid.lora_spec(case)).values()
    base = grid_stock.weights(case, "block")
    before, merged_to = {name: p.clone() for name, p in base.items()}, set()
    factors = {name: torch.empty(sharding.canonical_shape(spec, name)) for name in sharding.adapter_names(spec)}
    for cycle in range(1000):
        for factor in factors.values():
            factor.normal_(generator=torch.Generator().manual_seed(cycle))
        merged_to.add(float(lora_fn.merge(base | factors, spec)["weight"].double().sum()))
    assert len(merged_to) > 900 and all(torch.equal(base[name], p) for name, p in before.items())
