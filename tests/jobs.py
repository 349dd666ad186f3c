"""Small jobs: a model with a tokenizer, files to train on, and processes that start in a blink, to be killed at will.

The processes are forked from one that has imported torch and transformers already, and see what torch's elastic
launcher would show them. Nothing else is special about them: they call `adapters.train.finetune`.
"""

import functools
import json
import multiprocessing
import os
import shutil
import signal
import string
import sys
import threading
import time
import traceback
from dataclasses import dataclass, replace
from pathlib import Path

import pool
import pytest
from small_models import VOCABULARY, small_models_fixture  # noqa: F401  (a fixture)

SPECIAL = ["<pad>", "<s>", "</s>"]
LETTERS = sorted({*string.printable} - {*"\t\r\v\f"})
CHAT = (
    "{% for m in messages %}<s>{{ m.role }}: {{ m.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant: {% endif %}"
)
PRELOADED = [*pool.PRELOADED, "jobs", "adapters.cli", "adapters.train"]  # one server, whoever asks for it first
TIMEOUT = 120.0
KILLED = -signal.SIGKILL

# ---------------------------------------------------------------------------------------------------- models and data


def save_tokenizer(directory, *, chat_template=CHAT):
    """A tokenizer that makes a token of each character: just as many as the small models have."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: number for number, token in enumerate([*SPECIAL, *LETTERS])}
    assert len(vocabulary) == VOCABULARY
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        chat_template=chat_template,
    ).save_pretrained(directory)


@pytest.fixture(scope="session", name="job_models")
def job_models_fixture(small_models, tmp_path_factory):
    """Name -> directory of each small model, with a tokenizer."""
    place = tmp_path_factory.getbasetemp() / "job_models"
    for name, directory in small_models.items():
        if not (place / name).exists():
            shutil.copytree(directory, place / name)
            save_tokenizer(place / name)
    return {name: str(place / name) for name in small_models}


def write_lines(path, records):
    """A JSONL file, and its path as text."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return str(path)


def uneven(num, *, length=40):
    """Prompts and completions of very different lengths: from one token to learn to many."""
    text = string.ascii_letters * 2
    sizes = [(1 + 31 * i * i) % (length - 8) + 1 for i in range(num)]
    return [{"prompt": text[i : i + length - 6 - n] + "=", "completion": text[n : 2 * n]} for i, n in enumerate(sizes)]


# --------------------------------------------------------------------------------------------------------- processes


@functools.cache
def context():
    """Where processes are forked: beside a server that has imported what they need."""
    forkserver = multiprocessing.get_context("forkserver")
    forkserver.set_forkserver_preload(PRELOADED)
    here = [str(Path(__file__).parent), str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, here)))
        patch.setenv("OMP_NUM_THREADS", "1")
        from multiprocessing import forkserver as server

        server.ensure_running()
    return forkserver


@dataclass(frozen=True)
class Doom:
    """When a process kills itself: before its `number`-th touch of a file whose path holds `where`."""

    number: int
    where: str = ""

    def await_(self):
        """From now on."""
        left = [self.number]

        def hook(event, arguments):
            if event in TOUCHES and any(isinstance(a, (str, os.PathLike)) and self.where in str(a) for a in arguments):
                left[0] -= 1
                if left[0] < 0:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)


# Python's audit events of what changes a disk, or waits for it (`checkpoint.flush` opens what it flushes).
TOUCHES = ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.chmod", "shutil.rmtree")


class Processes:
    """Those of one job, as torch's elastic launcher would have started them.

    Args:
        job: The job.
        resume: As for `finetune`.
        doom: {process: when it kills itself}.
        call: Called in each process with the job and `resume`; None for `finetune`.
    """

    def __init__(self, job, *, resume=False, doom=None, call=None):
        import torch.distributed as dist

        self._store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self._told = Path(f"{job.output}.told")
        self._told.mkdir(parents=True, exist_ok=True)
        shared = {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(self._store.port),
            "WORLD_SIZE": str(job.processes),
            "TORCHELASTIC_USE_AGENT_STORE": "True",
            "TORCHELASTIC_RUN_ID": "test",
            "TORCHELASTIC_RESTART_COUNT": "0",
        }
        self.processes = []
        for rank in range(job.processes):
            environment = shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            arguments = (job, resume, environment, str(self._told / str(rank)), (doom or {}).get(rank), call)
            process = context().Process(target=_in_process, args=arguments, daemon=True)
            process.start()
            self.processes.append(process)

    def wait(self):
        """The exit codes, when all have ended."""
        give_up = time.monotonic() + TIMEOUT
        for process in self.processes:
            process.join(max(0.0, give_up - time.monotonic()))
        codes = self.codes()
        self.end()
        return codes

    def codes(self):
        """Their exit codes; None for one that runs."""
        return [process.exitcode for process in self.processes]

    def end(self):
        """End all that still run, as the launcher does when one of them failed."""
        for process in self.processes:
            process.kill()
            process.join()

    def alive(self):
        """Whether all run."""
        return all(process.is_alive() for process in self.processes)

    def told(self):
        """What they wrote to their stdout and stderr."""
        return "\n".join((self._told / str(rank)).read_text() for rank in range(len(self.processes)))


def _in_process(job, resume, environment, told, doom, call):
    import torch
    from tqdm import tqdm

    from adapters import train
    from lora_fn import LoraFnError

    os.environ.update(environment)
    handle = os.open(told, os.O_CREAT | os.O_TRUNC | os.O_WRONLY)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    torch.set_num_threads(1)
    tqdm.set_lock(threading.RLock())  # its own one is a named semaphore, which a killed process leaves behind
    if doom:
        doom.await_()
    code = 0
    try:
        if call is None:
            train.finetune(job, resume=resume, quiet=True)
        else:
            call(job, resume)
    except LoraFnError as error:
        print(error, flush=True)
        code = 2
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # a failed process does not wait for the others to take leave


def run(job, **options):
    """Run a job in its processes to its end; their output is the message of a failure."""
    processes = Processes(job, **options)
    codes = processes.wait()
    assert codes == [0] * job.processes, f"{codes}\n{processes.told()}"


# ------------------------------------------------------------------------------------------------------ what is left


def log(job):
    """The lines of a run's log, {(kind, step): line}; each is there once."""
    lines = [json.loads(line) for line in (Path(job.output) / "log.jsonl").read_text().splitlines()]
    found = {(line["kind"], line["step"]): line for line in lines}
    assert len(found) == len(lines)
    return found


def column(job, name, kind="train"):
    """A value of every line of a kind, in order."""
    return [line[name] for (k, _), line in sorted(log(job).items(), key=lambda item: item[0][1]) if k == kind]


def adapter(job):
    """The factors that a run left, by PEFT's names."""
    from safetensors.torch import load_file

    return load_file(Path(job.output) / "adapter_model.safetensors")


def elsewhere(job, name, **changes):
    """The same job with another output, beside its own."""
    return replace(job, output=str(Path(job.output).with_name(name)), **changes)
