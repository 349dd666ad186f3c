"""Does `lora-fn generate` write what stock transformers and stock PEFT would, and what does it say of bad input?"""

import contextlib
import functools
import io
import json
import shutil
import sys
from types import SimpleNamespace

import jobs
import peft
import pytest
import torch
from jobs import job_models_fixture, save_tokenizer, small_models_fixture  # noqa: F401  (fixtures)
from pool import pool
from small_models import stock

from adapters import cli, generate
from adapters.generate import Request

PROMPTS = ("def f(x):", "to be, or not to be", "A\nB")
TOKENS = 20


def adapter_of(model, directory, **config):
    """An adapter by stock PEFT: so large that what follows changes, and differs."""
    torch.manual_seed(len(config))
    options = {"r": 4, "lora_alpha": 256, "target_modules": "all-linear", "task_type": "CAUSAL_LM"} | config
    peft.get_peft_model(stock(model), peft.LoraConfig(init_lora_weights=False, **options)).save_pretrained(directory)
    return str(directory)


@pytest.fixture(scope="module")
def adapter(job_models, tmp_path_factory):
    """An adapter of the Llama."""
    return adapter_of(job_models["llama"], tmp_path_factory.mktemp("generate") / "adapter")


@pytest.fixture(scope="module")
def smaller(job_models, tmp_path_factory):
    """An adapter of other layers of it, and of another rank."""
    place = tmp_path_factory.mktemp("generate") / "smaller"
    return adapter_of(job_models["llama"], place, r=2, target_modules=["q_proj", "down_proj"])


@pytest.fixture(scope="module")
def alora(job_models, tmp_path_factory):
    """An adapter of it that begins where a prompt says "or"."""
    from transformers import AutoTokenizer

    if "alora_invocation_tokens" not in peft.LoraConfig.__dataclass_fields__:
        pytest.skip("this PEFT has no aLoRA")
    model, place = job_models["llama"], tmp_path_factory.mktemp("generate") / "alora"
    begins = AutoTokenizer.from_pretrained(model)("or")["input_ids"]
    return adapter_of(model, place, alora_invocation_tokens=begins)


@functools.cache
def expected(model, adapter, prompts, **how):
    """What stock transformers writes after the prompts: a token of these tokenizers is a character."""
    from transformers import AutoTokenizer

    tokenizer, tuned = AutoTokenizer.from_pretrained(model, padding_side="left"), stock(model)
    if adapter:
        tuned = peft.PeftModel.from_pretrained(tuned, adapter).eval()
    given = tokenizer(list(prompts), return_tensors="pt", padding=True, return_token_type_ids=False)
    torch.manual_seed(how.pop("seed", 0))
    found = tuned.generate(**given, max_new_tokens=TOKENS, **{"do_sample": False, "top_k": 0} | how)
    return [tokenizer.decode(row, skip_special_tokens=True) for row in found[:, given["input_ids"].shape[1] :]]


def words(model, *more, prompts=PROMPTS[:1]):
    asked = [word for prompt in prompts for word in ("--prompt", prompt)]
    return [str(w) for w in ("generate", "--model", model, *asked, "--max-new-tokens", TOKENS, *more)]


def test_the_text_of_one_prompt_comes_as_it_is_made(job_models, adapter, capsys, monkeypatch):
    model = job_models["llama"]
    [plain], [text] = (expected(model, of, PROMPTS[:1]) for of in (None, adapter))
    assert len(text) > 10 and text != plain
    written = []
    with monkeypatch.context() as patch:
        patch.setattr(sys.stdout, "write", lambda part, write=sys.stdout.write: written.append(part) or write(part))
        assert cli.main(words(model, "--adapter", adapter)) == 0
    told = capsys.readouterr()
    assert told.out == f"{text}\n" and "tokens/s" not in told.err
    assert len(written) > 3, "piece by piece"
    assert cli.main(words(model, "--adapter", adapter, "--quiet")) == 0
    assert capsys.readouterr().out == f"{text}\n"
    assert cli.main(words(model)) == 0
    assert capsys.readouterr().out == f"{plain}\n"


def test_several_prompts_are_listed(job_models, adapter, capsys):
    texts = expected(job_models["llama"], adapter, PROMPTS)
    assert cli.main(words(job_models["llama"], "--adapter", adapter, prompts=PROMPTS)) == 0
    told = capsys.readouterr()
    heads = ("1. def f(x):", "2. to be, or not to be", "3. A B")
    assert told.out == "\n".join(f"{head}\n{text}\n" for head, text in zip(heads, texts, strict=True))
    assert "tokens/s" in told.err
    assert cli.main(words(job_models["llama"], "--quiet", prompts=PROMPTS)) == 0
    assert not capsys.readouterr().err
    long = Request(model="m", prompts=("word " * 99,) * 2)
    assert all(len(line) <= 80 for line in generate.listing(long, ["", ""]).splitlines())


def test_a_chat_is_rendered(job_models, adapter, capsys):
    rendered = "<s>user: hello</s>\n<s>assistant: "
    [text] = expected(job_models["llama"], adapter, (rendered,))
    assert cli.main(words(job_models["llama"], "--adapter", adapter, "--chat", prompts=["hello"])) == 0
    assert capsys.readouterr().out == f"{text}\n"


DRAWS = ("--temperature", 1.5, "--top-p", 0.9, "--seed", 7)


def in_process(mesh, request):
    """What is returned, and written to stdout."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        return generate.run(request), out.getvalue()


def test_two_processes_write_the_same(job_models, adapter):
    model, draws = job_models["llama"], {"temperature": 1.5, "top_p": 0.9, "seed": 7}
    for prompts, how, cut in ((PROMPTS, {}, False), (PROMPTS[1:2], {}, True), (PROMPTS, draws, True)):
        sampled = {"do_sample": True} if how else {}
        wanted = expected(model, adapter, prompts, **how, **sampled)
        options = {"tp": 2, "sequence_parallel": cut, "adapters": (adapter,), "max_new_tokens": TOKENS}
        (first, told), (second, silence) = pool(2).run(
            in_process, Request(model=model, prompts=prompts, **how, **options)
        )
        assert first == second == wanted
        assert (told, silence) == (f"{wanted[0]}\n" if len(prompts) == 1 else "", "")


def commanded(job, resume):
    """What each process that the launcher starts does."""
    assert cli.main(job.words) == 0


def test_processes_are_started(job_models, adapter, tmp_path, monkeypatch):
    given, started = words(job_models["llama"], "--adapter", adapter, "--tp", 2, *DRAWS), []
    monkeypatch.setattr("adapters.launch.launch", lambda *how, **options: started.append((how, options)) or 3)
    assert cli.main(given) == 3
    assert started == [(("adapters.cli", given), {"processes": 2})]
    processes = jobs.Processes(SimpleNamespace(output=tmp_path / "out", processes=2, words=given), call=commanded)
    assert processes.wait() == [0, 0], processes.told()
    [text] = expected(job_models["llama"], adapter, PROMPTS[:1], temperature=1.5, top_p=0.9, seed=7, do_sample=True)
    assert processes.told().count(text) == 1


def test_a_text_ends_where_the_model_or_the_tokenizer_ends_it(job_models, adapter, tmp_path):
    shutil.copytree(job_models["llama"], model := tmp_path / "model")
    [text] = expected(job_models["llama"], adapter, PROMPTS[:1])
    from transformers import AutoTokenizer

    ends = AutoTokenizer.from_pretrained(model)(text[8])["input_ids"]
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": ends, "do_sample": True, "top_k": 3}))
    request = Request(model=str(model), prompts=PROMPTS[:1], adapters=(adapter,), max_new_tokens=TOKENS)
    assert generate.run(request, quiet=True) == [text[: text.index(text[8]) + 1]]
    (model / "generation_config.json").unlink()
    edit = json.loads((model / "tokenizer_config.json").read_text()) | {"eos_token": text[8]}
    (model / "tokenizer_config.json").write_text(json.dumps(edit))
    assert generate.run(request, quiet=True) == [text[: text.index(text[8])]]  # which is special then


def no_tokenizer(model):
    for file in model.glob("tokenizer*"):
        file.unlink()


def too_many_tokens(model):
    config = json.loads((model / "tokenizer.json").read_text())
    config["model"]["vocab"]["A"] = 99
    (model / "tokenizer.json").write_text(json.dumps(config))


# What is wrong -> (what is done to the model's directory, words, what is said).
WRONG = {
    "no tokenizer": (no_tokenizer, (), "has no tokenizer that transformers loads"),
    "no model": (shutil.rmtree, (), "no such directory"),
    "an empty prompt": (None, ("--prompt", ""), "prompt '': has no tokens, expected some to go on from"),
    "no chat template": (lambda m: (m / "chat_template.jinja").unlink(), ("--chat",), "has no chat template"),
    "a bad template": (
        functools.partial(save_tokenizer, chat_template="{{ raise_exception('no') }}"),
        ("--chat",),
        "its chat template does not take a prompt (no)",
    ),
    "another tokenizer": (too_many_tokens, ("--prompt", "A"), "holds token 99, the model's vocabulary has 99"),
    "no adapter": (None, ("--adapter", "gone"), "gone: no such directory"),
    "too long": (None, ("--max-new-tokens", 60), "--max-new-tokens: is 60 after a prompt of 9 tokens"),
    "too few adapters": (
        None,
        ("--prompt", "b", "--prompt", "c", "--adapter", "ADAPTER", "--adapter", "ADAPTER"),
        "--adapter: names 2 for 3 prompts, expected one for each; or give one",
    ),
    "tp": (None, ("--tp", 3), "8 attention heads cannot be cut into 3"),
    "nothing is drawn": (None, ("--top-k", 3), "--top-k: is 3, and nothing is drawn; give a --temperature"),
    "several": (
        None,
        ("--temperature", -1, "--top-p", 2, "--max-new-tokens", 0),
        "--top-p: is 2.0, expected above 0 and at most 1.",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_a_sentence_before_processes_start(case, job_models, adapter, tmp_path, capsys, monkeypatch):
    change, more, sentence = WRONG[case]
    shutil.copytree(job_models["llama"], model := tmp_path / "model")
    if change:
        change(model)
    monkeypatch.setattr("adapters.launch.launch", lambda *words, **options: pytest.fail("processes were started"))
    more = [adapter if word == "ADAPTER" else word for word in more]
    for tp in () if case == "tp" else (2, 1):
        assert cli.main(words(model, "--tp", tp, *more)) == cli.BAD_INPUT
    assert cli.main(words(model, *more)) == cli.BAD_INPUT
    told = capsys.readouterr()
    assert not told.out and "lora-fn: " in told.err and sentence in told.err and "Traceback" not in told.err


def test_each_prompt_has_its_own_adapter(job_models, adapter, smaller, capsys):
    model, each = job_models["llama"], [smaller, adapter, smaller]
    texts = [expected(model, of, PROMPTS)[row] for row, of in enumerate(each)]
    assert len({*texts, *expected(model, None, PROMPTS)}) == 6
    given = [word for directory in each for word in ("--adapter", directory)]
    assert cli.main(words(model, *given, prompts=PROMPTS)) == 0
    told = capsys.readouterr().out
    assert all(text in told for text in texts)
    options = {"adapters": tuple(each), "max_new_tokens": TOKENS, "tp": 2, "sequence_parallel": True}
    assert [found for found, _ in pool(2).run(in_process, Request(model=model, prompts=PROMPTS, **options))] == [
        texts
    ] * 2


def test_an_adapter_of_another_model_is_a_sentence(job_models, adapter, capsys):
    assert cli.main(words(job_models["qwen3"], "--adapter", adapter, "--tp", 2)) == cli.BAD_INPUT
    assert "q_proj.lora_B.weight' has shape [32, 4], expected [64, 4]" in capsys.readouterr().err


def test_an_alora_begins_in_the_prompt_and_is_given_alone(job_models, adapter, alora, capsys):
    model = job_models["llama"]
    texts, plain = expected(model, alora, PROMPTS), expected(model, None, PROMPTS)
    assert texts[0] == plain[0] and texts[1] != plain[1]
    request = Request(model=model, prompts=PROMPTS, adapters=(alora,), max_new_tokens=TOKENS)
    assert generate.run(request, quiet=True) == texts
    assert cli.main(words(model, "--adapter", adapter, "--adapter", alora, prompts=PROMPTS[:2])) == cli.BAD_INPUT
    assert f"{alora}: is an aLoRA, which each prompt cannot have another of; give it alone" in capsys.readouterr().err
