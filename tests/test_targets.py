"""Is what is adapted what PEFT adapts, with its rank and alpha? Over generated configs; stock PEFT is the oracle.

Where PEFT matches nothing without a word, ours is an error.
"""

import functools
import re

import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as DEFAULTS_OF_PEFT
from small_models import COMMON, MODELS, small_models_fixture  # noqa: F401  (a fixture)

from adapters import bind, models
from lora_fn import Axis, LoraSpec, TargetError, peft_format, targets

pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT's
LEAVES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "embed_tokens", "lm_head")
ENDS = (
    *LEAVES,
    "proj",
    "self_attn.q_proj",
    "1.mlp.up_proj",
    "model.layers.0.self_attn.k_proj",
    "layers.1.mlp.down_proj",
)
REGEXES = (
    r".*\.(q|k)_proj",
    r"model\.layers\.0\..*_proj",
    r".*mlp\..*_proj",
    "lm_head",
    r".*layers\.[01]\.self_attn\.v_proj",
)
KEYS = (
    "q_proj",
    "down_proj",
    r".*\.mlp\..*",
    "layers.0.self_attn.o_proj",
    r"model\.layers\.1\..*",
    "up_proj",
    "lm_head",
)
NOTHING = re.compile(r"matches none of|nothing is left to adapt|shares its weight with")


def stock_outline(name="Llama", **config):
    import transformers

    with torch.device("meta"):
        return getattr(transformers, f"{name}ForCausalLM")(getattr(transformers, f"{name}Config")(**COMMON | config))


@st.composite
def configs(draw):
    names = st.lists(st.sampled_from(ENDS), min_size=1, max_size=4, unique=True)
    options = {"target_modules": draw(st.just("all-linear") | st.sampled_from(REGEXES) | names)}
    options["exclude_modules"] = draw(st.none() | st.sampled_from(REGEXES) | names)
    if isinstance(options["target_modules"], list) and draw(st.booleans()):
        options["layers_to_transform"] = draw(st.sampled_from([0, 1, [0], [1], [0, 1], [7]]))
        options["layers_pattern"] = draw(st.sampled_from([None, "layers", ["layers"], ["h", "layers"], "blocks"]))
    options["modules_to_save"] = draw(st.none() | st.lists(st.sampled_from(LEAVES), min_size=1, max_size=2))
    options["rank_pattern"] = dict(draw(st.lists(st.tuples(st.sampled_from(KEYS), st.integers(1, 9)), max_size=3)))
    options["alpha_pattern"] = dict(draw(st.lists(st.tuples(st.sampled_from(KEYS), st.integers(1, 9)), max_size=3)))
    return options


def adapted_by_peft(model, **options):
    """Name -> (rank, alpha)."""
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=3, lora_alpha=5, **options), low_cpu_mem_usage=True)
    layers = {n: m for n, m in wrapped.base_model.model.named_modules() if isinstance(m, peft.tuners.lora.LoraLayer)}
    return {name: (layer.r["default"], layer.lora_alpha["default"]) for name, layer in layers.items()}


def adapted_by_us(model, config):
    planned = bind.plan(model, peft_format.from_config(config))
    found = {}
    for path, spec in planned.items():
        for part in spec.updates:
            found[peft_format.part_path(path, part.name)] = (part.rank, part.alpha)
    return found


@functools.cache
def outline(directory, fused):
    return models.outline(directory, axis=Axis(), form=models.Form(fuse_qkv=fused, fuse_gate_up=fused))


@settings(max_examples=60, deadline=None)
@given(configs(), st.booleans())
def test_what_is_adapted_is_what_peft_adapts(small_models, options, fused):
    ours = theirs = None
    try:
        theirs = adapted_by_peft(stock_outline(), **options)
    except (ValueError, TypeError):
        theirs = None
    try:
        ours = adapted_by_us(
            outline(small_models["llama-8-heads"], fused), peft.LoraConfig(r=3, lora_alpha=5, **options)
        )
    except TargetError as error:
        assert theirs is None or NOTHING.search(str(error))
        return
    assert ours == theirs


def test_the_defaults_are_those_of_peft():
    for name, modules in targets.DEFAULTS.items():
        assert list(modules) == list(DEFAULTS_OF_PEFT.get(name, targets.DEFAULTS["llama"]))


@pytest.mark.parametrize("name", sorted(MODELS))
def test_a_model_has_the_default_of_its_type(name, small_models):
    config = peft.LoraConfig(r=3, lora_alpha=5)
    ours = adapted_by_us(outline(small_models[name], True), config)
    assert ours and {path.rpartition(".")[2] for path in ours} == {"q_proj", "v_proj"}
    if not name.startswith("granite"):
        assert ours == adapted_by_peft(stock_outline(MODELS[name].name, **MODELS[name].config))


def test_a_model_of_no_known_type_has_no_default(small_models):
    with pytest.raises(TargetError, match="the model has no config that tells its type, expected one of bart"):
        bind.plan(torch.nn.Sequential(torch.nn.Linear(2, 2)), LoraSpec(target_modules=None))


@pytest.mark.parametrize("task", ("SEQ_CLS", "CAUSAL_LM", None))
def test_all_linear_leaves_out_the_head_that_peft_leaves_out(task):
    import transformers

    def classifier():
        with torch.device("meta"):
            return transformers.LlamaForSequenceClassification(transformers.LlamaConfig(**COMMON))

    options = dict(target_modules="all-linear", task_type=task)
    config = peft.LoraConfig(r=3, lora_alpha=5, **options)
    inner = peft.LoraModel(classifier(), {"default": config}, "default", low_cpu_mem_usage=True)
    theirs = {n for n, m in inner.model.named_modules() if isinstance(m, peft.tuners.lora.LoraLayer)}
    ours = bind.plan(classifier(), LoraSpec(rank=3, alpha=5, **options))
    assert set(ours) == theirs and ("score" in theirs) == (task != "SEQ_CLS")
