"""Does a parallel model generate what the whole one does? Stock transformers and stock PEFT are the oracle, token for
token, at every size, with a cache of local heads.
"""

import functools
import importlib.metadata
import itertools
import shutil

import peft
import pytest
import torch
from pool import pool
from small_models import COMMON, ids_of, small_models_fixture  # noqa: F401  (a fixture)

import adapters
import adapters.peft
from adapters import models
from lora_fn import FileError, LoraSpec, SpecError

# So large that the tokens differ: small random models say one thing over and over.
ADAPTER = dict(r=4, lora_alpha=256, target_modules=["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"])
ADAPTERS = {
    "llama": ADAPTER | {"use_dora": True},
    "qwen3": ADAPTER,
    "granite": ADAPTER | {"target_modules": [*ADAPTER["target_modules"], "embed_tokens", "lm_head"]},
    "mixtral": ADAPTER | {"target_modules": ["q_proj", "v_proj", "o_proj"]},
}
INVOCATION = [7, 9]
# PEFT 0.17 has no aLoRA.
ALORA = (
    {"alora_invocation_tokens": INVOCATION} if "alora_invocation_tokens" in peft.LoraConfig.__dataclass_fields__ else {}
)
FORMS = {
    "apart": {},
    "sequence parallel": dict(sequence_parallel=True),
    "fused": dict(fuse_qkv=True, fuse_gate_up=True),
    "fused, sequence parallel": dict(fuse_qkv=True, fuse_gate_up=True, sequence_parallel=True),
    "copied heads": dict(kv_size_multiplier=2, sequence_parallel=True),
}
CASES = {  # processes -> (model, form)
    1: [("llama", "apart"), ("qwen3", "fused"), ("granite", "apart"), ("mixtral", "apart")],
    2: [
        *(("llama", form) for form in list(FORMS)[:4]),
        *itertools.product(("qwen3", "granite"), ("sequence parallel", "fused")),
        ("mixtral", "sequence parallel"),
    ],
    4: [
        ("llama", "copied heads"),
        ("qwen3", "apart"),
        ("qwen3", "fused, sequence parallel"),
        ("granite", "fused, sequence parallel"),
    ],
}
NEW = dict(max_new_tokens=20, pad_token_id=0, eos_token_id=None)
GREEDY = NEW | {"do_sample": False}


def padded(*lengths):
    """Prompts of different lengths, padded in front."""
    ids, mask = torch.zeros(2, len(lengths), max(lengths), dtype=torch.long)
    for row, length in enumerate(lengths):
        ids[row, -length:] = ids_of(1, length, seed=row)[0]
        mask[row, -length:] = 1
    return {"input_ids": ids, "attention_mask": mask}


PROMPTS = padded(5, 11, 8)


@pytest.fixture(scope="module")
def made(small_models, tmp_path_factory):
    """Name -> (model's directory, that of an adapter of it by stock PEFT)."""
    import transformers

    place, directories = tmp_path_factory.mktemp("decoding"), dict(small_models)
    if int(importlib.metadata.version("transformers").split(".")[0]) >= 5:  # older ones have no stacked experts
        torch.manual_seed(0)
        config = transformers.MixtralConfig(**COMMON, num_local_experts=3, num_experts_per_tok=2)
        directories["mixtral"] = str(place / "mixtral")
        transformers.MixtralForCausalLM(config).save_pretrained(directories["mixtral"])
    return {
        name: (directories[name], adapter_of(directories[name], place / f"of-{name}", **config))
        for name, config in ADAPTERS.items()
        if name in directories
    }


def stock(directory):
    import transformers

    transformers.logging.disable_progress_bar()
    return transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


def adapter_of(directory, place, **config):
    torch.manual_seed(0)
    config = peft.LoraConfig(init_lora_weights=False, task_type="CAUSAL_LM", **config)
    peft.get_peft_model(stock(directory), config).save_pretrained(place, save_embedding_layers=False)
    return str(place)


def tuned(directory, adapter):
    """The stock model with stock PEFT."""
    return peft.PeftModel.from_pretrained(stock(directory), adapter).eval()


def adapted(mesh, directory, adapter, form):
    """Ours."""
    model = models.load(directory, mesh=mesh, dtype=torch.float32, **FORMS[form])
    adapters.wrap(model, adapters.read_spec(adapter))
    adapters.load(model, adapter)
    return model


def everywhere(size, function, *args):
    """The results of function(mesh, *args) on that many processes; of one, here."""
    return pool(size).run(function, *args) if size > 1 else [function(None, *args)]


def generated(mesh, made, cases):
    """{(model, form): (tokens, logits of the steps, tokens that the decoder got in each, heads in the cache)}."""
    found = {}
    for name, form in cases:
        model, lengths = adapted(mesh, *made[name], form), []
        model.model.norm.register_forward_hook(lambda m, args, out, told=lengths: told.append(out.shape[1]))
        out = model.generate(**PROMPTS, **GREEDY, return_dict_in_generate=True, output_logits=True)
        heads = out.past_key_values.layers[0].keys.shape[1]
        found[name, form] = out.sequences, torch.stack(out.logits), lengths, heads
    return found


@pytest.mark.parametrize("size", CASES)
def test_greedy_tokens_are_those_of_stock_transformers_and_peft(size, made):
    cases = [(name, form) for name, form in CASES[size] if name in made]
    first, *others = everywhere(size, generated, made, cases)
    for (name, form), (tokens, logits, lengths, heads) in first.items():
        assert torch.equal(tokens, expected_of(*made[name])), (name, form)
        assert logits.shape == (20, 3, 99)
        assert lengths == [11] + 19 * [1], "a cache is used"
        assert heads == 4 * FORMS[form].get("kv_size_multiplier", 1) // size, "each process keeps its own heads"
        assert all(torch.equal(other[name, form][1], logits) for other in others), "bit for bit"
        assert all(torch.equal(other[name, form][0], tokens) for other in others)
    if size == 2:  # nothing is cut while there is a cache: sequence parallelism changes not a bit
        for form, other in (("apart", "sequence parallel"), ("fused", "fused, sequence parallel")):
            assert torch.equal(first["llama", form][1], first["llama", other][1])


@functools.cache
def expected_of(directory, adapter):
    """What stock PEFT generates, with which a test can tell something."""
    found = tuned(directory, adapter).generate(**PROMPTS, **GREEDY)
    assert not torch.equal(found, stock(directory).generate(**PROMPTS, **GREEDY))
    assert all(len(row.unique()) > 5 for row in found[:, -20:])
    return found


# What else `generate` can.

SAMPLED = NEW | {"do_sample": True, "temperature": 1.3, "top_p": 0.9}
OTHERS = {
    "no cache": GREEDY | {"use_cache": False},
    "a static cache": GREEDY | {"cache_implementation": "static"},
    "beams": GREEDY | {"num_beams": 3},
    "sampled": SAMPLED,
    "several of each": SAMPLED | {"num_return_sequences": 2},
}


def drawn(model, how):
    """What comes of `generate` with torch's generator at 5, and where that stands then."""
    torch.manual_seed(5)
    return model.generate(**PROMPTS, **how), torch.random.get_rng_state()


def others(mesh, directory, adapter, calls):
    """{call: (tokens, state)}; what comes of a seed; the size of a forward's logits afterwards."""
    model = adapted(mesh, directory, adapter, "sequence parallel")
    found = {call: drawn(model, how) for call, how in calls.items()}
    torch.manual_seed(17 if mesh is None else mesh.get_rank())
    before = torch.random.get_rng_state()
    seeded = [model.generate(**PROMPTS, **SAMPLED, seed=5)]
    seeded.append(model.generate(PROMPTS["input_ids"], attention_mask=PROMPTS["attention_mask"], **SAMPLED, seed=5))
    assert torch.equal(torch.random.get_rng_state(), before)
    return found, seeded, model(**PROMPTS).logits.shape[-1]


@pytest.mark.parametrize("size", (1, 2))
def test_whatever_generate_can_is_as_in_stock_transformers(size, made):
    directory, adapter = made["llama"]
    reference = tuned(directory, adapter)
    first = reference.generate(**PROMPTS, **GREEDY)
    calls = OTHERS | {"an end": GREEDY | {"eos_token_id": int(first[0, 20])}}
    each = everywhere(size, others, directory, adapter, calls)
    for call, how in calls.items():
        expected = drawn(reference, how)
        for found, *_ in each:
            assert all(map(torch.equal, found[call], expected)), call
    for found, seeded, vocabulary in each:
        assert all(torch.equal(tokens, found["sampled"][0]) for tokens in seeded)
        assert vocabulary == -(-99 // size), "a forward's logits are cut, as before"


def refusals(mesh, directory):
    """What is said where the processes would part."""
    model, said = models.load(directory, mesh=mesh), []
    torch.manual_seed(mesh.get_rank())
    for how in (SAMPLED, GREEDY | {"max_time": 1.0}):
        with pytest.raises(SpecError) as caught:
            model.generate(**PROMPTS, **how)
        said.append(str(caught.value))
    return said


def test_processes_that_would_part_are_refused(small_models):
    for draws, time in pool(2).run(refusals, small_models["llama"]):
        assert draws.startswith("do_sample: torch's generators do not stand alike on the 2 processes")
        assert time == "max_time: each process would look at its own clock; give max_new_tokens."


# PEFT's front, and aLoRA.


def by_the_front(mesh, directory, adapter, prompts):
    """What the front generates, and a wrapped model, that is told of the invocation by `generate`."""
    found = []
    for form in ("apart", "sequence parallel"):
        model = models.load(directory, mesh=mesh, **FORMS[form])
        front = adapters.peft.PeftModel.from_pretrained(model, adapter)
        found.append(front.generate(**prompts, **GREEDY))
        with front.disable_adapter():
            found.append(front.generate(**prompts, **GREEDY, seed=3))
        found.append(adapted(mesh, directory, adapter, form).generate(**prompts, **GREEDY))
    return found


@pytest.mark.parametrize("size", (1, 2))
def test_the_front_generates_as_stock_peft_does(size, small_models, tmp_path):
    directory = small_models["llama"]
    prompts = padded(5, 11, 8)
    for row, at in enumerate((-5, -4, -2)):
        prompts["input_ids"][row, at : at + 2 or None] = torch.tensor(INVOCATION)
    adapter = adapter_of(directory, tmp_path, **ADAPTER | ALORA)
    expected = tuned(directory, adapter).generate(**prompts, **GREEDY)
    plain = stock(directory).generate(**prompts, **GREEDY)
    assert not torch.equal(plain, expected)
    for each in everywhere(size, by_the_front, directory, adapter, prompts):
        for found, wanted in zip(each, 2 * [expected, plain, expected], strict=True):
            assert torch.equal(found, wanted)


def row_by_row(mesh, directory, given):
    """Each row with an adapter of its own, and the last with none."""
    found = []
    for form in ("apart", "fused, sequence parallel"):
        model = models.load(directory, mesh=mesh, **FORMS[form])
        held = adapters.ManyAdapters(model, LoraSpec(rank=4, target_modules="all-linear"), places=3)
        for name, adapter in given.items():
            held.add(name, adapter)
        held.select_rows([*given, None])
        found.append(model.generate(**PROMPTS, **GREEDY))
    return found


@pytest.mark.parametrize("size", (1, 2))
def test_rows_generate_with_adapters_of_their_own(size, made, small_models, tmp_path):
    directory = small_models["qwen3"]
    given = {"a": made["qwen3"][1], "b": adapter_of(directory, tmp_path, **ADAPTER | {"r": 2})}
    each = [tuned(directory, adapter).generate(**PROMPTS, **GREEDY) for adapter in given.values()]
    each.append(stock(directory).generate(**PROMPTS, **GREEDY))
    expected = torch.stack([tokens[row] for row, tokens in enumerate(each)])
    for found in everywhere(size, row_by_row, directory, given):
        assert all(torch.equal(tokens, expected) for tokens in found)


# What the directory says.


def test_the_generation_config_is_the_directorys(small_models, tmp_path):
    directory, file = tmp_path / "model", tmp_path / "model" / "generation_config.json"
    shutil.copytree(small_models["llama"], directory)
    file.write_text('{"eos_token_id": [5, 9], "max_new_tokens": 7}')
    found, expected = models.load(directory).generation_config, stock(directory).generation_config
    assert (found.eos_token_id, found.max_new_tokens) == (expected.eos_token_id, expected.max_new_tokens) == ([5, 9], 7)
    file.write_text("[")
    with pytest.raises(FileError, match=r"generation_config.json: transformers does not take it \(.*; mend it"):
        models.load(directory)
    file.unlink()
    assert models.load(directory).generation_config.eos_token_id == stock(directory).generation_config.eos_token_id
