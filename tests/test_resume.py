"""Does a run that was killed go on as if nothing had happened? Bit for bit, wherever the kill struck."""

import itertools
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import jobs
import pytest
import torch
from jobs import Doom, Processes, job_models_fixture, small_models_fixture  # noqa: F401  (fixtures)
from torch import nn

import adapters
from adapters import cli, launch, runs, train
from adapters.train import Job
from lora_fn import Axis, FileError, LoraSpec, checkpoint, manifest

SEED = 3
KILLS = 12
STEPS = 64
EVERY = 2  # steps between checkpoints


@pytest.fixture(scope="module")
def reference(job_models, tmp_path_factory):
    """A run at TP 2 with sequence parallel that nobody disturbed, and the seconds until its first step."""
    place = tmp_path_factory.mktemp("resume")
    job = Job(
        model=job_models["llama"],
        data=(jobs.write_lines(place / "data.jsonl", jobs.uneven(18)),),
        output=str(place / "whole"),
        lora=LoraSpec(rank=4, alpha=8, dropout=0.1, target_modules="all-linear"),
        tp=2,
        sequence_parallel=True,
        sequence_length=40,
        batch_size=4,
        accumulation=2,
        steps=STEPS,
        learning_rate=1e-2,
        warmup=4,
        eval_every=16,
        checkpoint_every=EVERY,
    )
    assert Processes(job, call=nothing).wait() == [0, 0]  # the server that forks them has imported everything now
    begun = time.monotonic()
    processes = Processes(job)
    wait_until(lambda: logged(job) >= 1, processes.alive)
    seconds = time.monotonic() - begun
    assert processes.wait() == [0, 0], processes.told()
    return job, seconds


def nothing(job, resume):
    pass


def logged(job):
    """The last step in a run's log."""
    return max((line["step"] for line in runs.read_log(Path(job.output) / runs.LOG)), default=0)


def stored(job):
    """The step of the last whole checkpoint, every tensor of which was read; 0 where there is none yet."""
    place = runs.Run(Path(job.output)).last()
    if place is None:
        return 0
    with manifest.opened(place) as stored:
        for path in stored.manifest.specs:
            assert all(torch.isfinite(t).all() for t in stored.canonical(manifest.FACTOR, path).values())
    return stored.manifest.step


def wait_until(is_so, may_wait=lambda: True):
    give_up = time.monotonic() + jobs.TIMEOUT
    while not is_so() and may_wait():
        assert time.monotonic() < give_up
        time.sleep(0.002)


def assert_whole_so_far(job, before):
    """After a kill: the last whole checkpoint is none older than it must be. Returns its step.

    The last one that was begun may not be whole; the one before it is, for a store waits for that.
    """
    step = stored(job)
    assert step >= max(before, ((logged(job) - 1) // EVERY - 1) * EVERY)
    return step


def assert_same_run(found, expected):
    """Two runs wrote the same log, but for the speed, and the same adapter, bit for bit."""

    def numbers(job):
        return {at: {k: v for k, v in line.items() if k != "tokens_per_second"} for at, line in jobs.log(job).items()}

    assert numbers(found) == numbers(expected)
    assert [step for kind, step in jobs.log(found) if kind == "train"] == list(range(1, STEPS + 1))
    name = checkpoint.WEIGHTS
    assert (Path(found.output) / name).read_bytes() == (Path(expected.output) / name).read_bytes()


# ------------------------------------------------------------------------------------------- processes that are killed


def kill_at_the_start(job, rng, startup):
    """Some time after the processes began, most likely before their first step."""
    until, target = time.monotonic() + rng.uniform(0, startup), stored(job) + 4
    processes = Processes(job, resume=(Path(job.output) / runs.JOB).exists())
    wait_until(lambda: time.monotonic() > until or logged(job) >= target)
    return processes, rng.choice([[0], [1], [0, 1]])


def kill_at_a_step(job, rng, startup):
    """Some steps after the last checkpoint, anywhere within a step."""
    target = stored(job) + rng.randint(1, 4)
    processes = Processes(job, resume=(Path(job.output) / runs.JOB).exists())
    wait_until(lambda: logged(job) >= target, processes.alive)
    time.sleep(rng.uniform(0, 0.06))
    return processes, rng.choice([[0], [1], [0, 1]])


def kill_at_a_checkpoint(job, rng, startup):
    """Before one of the touches of a file of a checkpoint."""
    victim = rng.randint(0, 1)
    doom = {victim: Doom(rng.randint(3, 24), where=f"{job.output}/checkpoints")}
    processes = Processes(job, resume=(Path(job.output) / runs.JOB).exists(), doom=doom)
    processes.processes[victim].join(jobs.TIMEOUT)
    return processes, []


MOMENTS = (kill_at_the_start, kill_at_a_step, kill_at_a_checkpoint)


def test_a_run_whose_processes_are_killed_again_and_again_ends_with_the_same_bits(reference):
    expected, startup = reference
    job, rng, step = jobs.elsewhere(expected, "killed"), random.Random(SEED), 0
    moments = [*MOMENTS * (KILLS // len(MOMENTS))]
    rng.shuffle(moments)
    for moment in moments:
        processes, victims = moment(job, rng, startup)
        for victim in victims:
            processes.processes[victim].kill()
        for victim in victims:
            processes.processes[victim].join()
        time.sleep(rng.uniform(0, 0.05))  # until the launcher sees it, and ends the other one
        codes = processes.codes()
        processes.end()
        assert jobs.KILLED in codes, f"{moment.__name__}: {codes}\n{processes.told()}"
        step = assert_whole_so_far(job, step)
    assert 0 < step < STEPS
    jobs.run(job, resume=True)
    assert_same_run(job, expected)
    jobs.run(job, resume=True)  # there is nothing left to do
    assert_same_run(job, expected)


END = ("adapter_config.json", "adapter_model.safetensors", "loss.png")


def test_a_run_killed_while_it_writes_its_result_ends_with_the_same_bits(reference):
    expected, _ = reference
    job = jobs.elsewhere(expected, "killed_at_the_end")
    shutil.copytree(expected.output, job.output)
    for name in END:
        (Path(job.output) / name).unlink()
    for number, name in enumerate(END):
        processes = Processes(job, resume=True, doom={0: Doom(number, where=name)})
        processes.processes[0].join(jobs.TIMEOUT)
        codes = processes.codes()
        processes.end()
        assert codes[0] == jobs.KILLED, processes.told()
        assert assert_whole_so_far(job, STEPS) == STEPS
    jobs.run(job, resume=True)
    assert_same_run(job, expected)


# --------------------------------------------------------------------------------------- the launcher and its children


def arguments_of(job):
    """A job as it is typed."""
    lora = job.lora
    return [
        *("finetune", "--model", job.model, "--data", *job.data, "--output", job.output, "--quiet"),
        *("--rank", str(lora.rank), "--alpha", str(lora.alpha), "--dropout", str(lora.dropout)),
        *("--tp", str(job.tp), *["--sequence-parallel"] * job.sequence_parallel),
        *itertools.chain.from_iterable(
            (launch.flag(name), str(getattr(job, name)))
            for name in ("sequence_length", "batch_size", "accumulation", "steps", "learning_rate", "warmup")
        ),
        *("--eval-every", str(job.eval_every), "--checkpoint-every", str(job.checkpoint_every)),
    ]


def workers_of(job):
    """The processes that a launcher started for a job: {RANK: pid}."""
    found = {}
    for place in Path("/proc").glob("[0-9]*"):
        try:
            if job.output.encode() in (place / "cmdline").read_bytes().split(b"\0"):
                environment = dict(e.partition(b"=")[::2] for e in (place / "environ").read_bytes().split(b"\0"))
                if b"RANK" in environment:
                    found[int(environment[b"RANK"])] = int(place.name)
        except OSError:
            continue  # it ended meanwhile
    return found


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends a process with its parent")
def test_the_launcher_and_its_workers_end_together_and_the_run_goes_on(reference):
    expected, _ = reference
    job, rng, step = jobs.elsewhere(expected, "launched"), random.Random(SEED), 0
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    for victim in ("launcher", rng.randint(0, 1)):
        with open(f"{job.output}.{victim}.told", "w+") as told:
            resume = ["--resume"] if step else []
            launcher = subprocess.Popen(
                [sys.executable, "-m", "adapters.cli", *arguments_of(job), *resume],
                env=environment,
                stdout=told,
                stderr=told,
            )
            target = step + 2 * EVERY + rng.randint(1, 6)
            wait_until(lambda: logged(job) >= target, lambda: launcher.poll() is None)  # noqa: B023  (called at once)
            time.sleep(rng.uniform(0, 0.1))
            pid = launcher.pid if victim == "launcher" else workers_of(job).get(victim)
            assert launcher.poll() is None and pid, Path(told.name).read_text()
            os.kill(pid, signal.SIGKILL)
            assert launcher.wait(10) == (jobs.KILLED if victim == "launcher" else 1)
            give_up = time.monotonic() + 10
            while workers_of(job):
                assert time.monotonic() < give_up
                time.sleep(0.05)
        step = assert_whole_so_far(job, step)
        assert step >= EVERY
    jobs.run(job, resume=True)
    assert_same_run(job, expected)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_launcher_returns_what_a_shell_would(number, monkeypatch):
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.launcher import api

    def elastic_launch(config, program):
        def interrupted(*arguments):
            raise SignalException("interrupted", sigval=number)

        return interrupted

    monkeypatch.setattr(api, "elastic_launch", elastic_launch)
    monkeypatch.setenv(launch.OURS, "")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert launch.launch("adapters.cli", [], processes=2) == 128 + number


# --------------------------------------------------------------------------------------------- every point of a store


def small_model():
    """A model of one adapted layer after a step, and its optimizer."""
    model = adapters.wrap(nn.Sequential(nn.Linear(6, 5)), LoraSpec(rank=2, alpha=2, target_modules=("0",)))
    optimizer = torch.optim.AdamW([p for of in adapters.factors(model).values() for p in of.values()])
    advance(model, optimizer)
    return model, optimizer


def advance(model, optimizer):
    for p in optimizer.param_groups[0]["params"]:
        p.grad = torch.ones_like(p)
    optimizer.step()


def cut_off(handle, content, offset, pwrite=os.pwrite):
    """A kill in the middle of a write."""
    pwrite(handle, content[: len(content) // 2], offset)
    os.kill(os.getpid(), signal.SIGKILL)


def kill_at_every_point_of_a_store(job, resume):
    """In a process of its own: fork, store and die in the fork, look at what is left, and go on from there."""
    place, facts, one = Path(job.output), {"data": "d"}, Axis()
    model, optimizer = small_model()
    first = {p: t.detach().clone() for p, t in adapters.bind.flat(adapters.factors(model)).items()}

    def store(run, model, optimizer, step):
        taken = runs.take(run, model, optimizer, facts, step=step, tp=one, dp=one)
        runs.store(run, taken, keep=job.keep_checkpoints)
        run.settle()

    with runs.Run(place) as run:
        run.begin({}, facts, resume=False)
        store(run, model, optimizer, 1)
    shutil.copytree(place, f"{place}.before")
    advance(model, optimizer)
    second = {p: t.detach().clone() for p, t in adapters.bind.flat(adapters.factors(model)).items()}
    survived = False
    for number in itertools.count(-1):
        shutil.rmtree(place)
        shutil.copytree(f"{place}.before", place)
        pid = os.fork()
        if pid == 0:
            if number < 0:
                os.pwrite = cut_off
            else:
                Doom(number, where=str(place)).await_()
            store(runs.Run(place), model, optimizer, 2)
            os._exit(0)
        survived = os.waitpid(pid, 0)[1] == 0
        again, state = small_model()
        step = runs.restore(runs.Run(place), again, state, facts)
        expected = {1: first, 2: second}[step]
        for name, p in adapters.bind.flat(adapters.factors(again)).items():
            assert torch.equal(p, expected[name])
            assert state.state[p]["step"] == step
        with runs.Run(place) as run:
            run.begin({}, facts, resume=True)
            store(run, again, state, 3)
        left = sorted(p.name for p in run.checkpoints.iterdir())
        assert all(manifest.read(run.checkpoints / name).step for name in left)
        assert left[-1] == "step-000000003" and len(left) == job.keep_checkpoints
        if survived:
            assert step == 2
            break
    print(number)


@pytest.mark.parametrize("keep", [1, 2])
def test_a_kill_at_any_point_of_a_store_leaves_a_whole_checkpoint(keep, tmp_path):
    job = Job(model="none", data=("none",), output=str(tmp_path / "run"), keep_checkpoints=keep)
    processes = Processes(job, call=kill_at_every_point_of_a_store)
    assert processes.wait() == [0], processes.told()
    assert int(processes.told().split()[-1]) >= 15  # points


# ----------------------------------------------------------------------------------------- stores that nobody waits for


FACTS = {"data": "d"}


def take(run, model, optimizer, step):
    return runs.take(run, model, optimizer, FACTS, step=step, tp=Axis(), dp=Axis())


@pytest.fixture
def begun(tmp_path):
    """A run, its model of one layer, and the optimizer."""
    with runs.Run(tmp_path / "run") as run:
        run.begin({}, FACTS, resume=False)
        yield run, *small_model()


@pytest.fixture
def gate(monkeypatch):
    """An event that every writing of tensors waits for, at the disk."""
    event, pwrite = threading.Event(), os.pwrite

    def slow(*args):
        assert event.wait(30)
        return pwrite(*args)

    monkeypatch.setattr(os, "pwrite", slow)
    yield event
    event.set()


def test_training_does_not_wait_for_a_store_but_the_next_store_does(begun, gate):
    run, model, optimizer = begun
    expected = {p: t.detach().clone() for p, t in adapters.bind.flat(adapters.factors(model)).items()}
    before = time.monotonic()
    runs.store(run, take(run, model, optimizer, 1), keep=2)
    assert time.monotonic() - before < 5 and run.last() is None
    advance(model, optimizer)
    waiting = threading.Thread(target=lambda: runs.store(run, take(run, model, optimizer, 2), keep=2))
    waiting.start()
    waiting.join(0.2)
    assert waiting.is_alive() and run.last() is None
    gate.set()
    waiting.join(30)
    run.settle()
    assert [p.name for p in sorted(run.checkpoints.glob("*"))] == ["step-000000001", "step-000000002"]
    with manifest.opened(run.checkpoints / "step-000000001") as stored:  # what was copied, not what came after
        for name, p in stored.canonical(manifest.FACTOR, "0").items():
            assert torch.equal(p, expected[f"0.{name}"])


def test_a_run_does_not_end_before_its_checkpoint_is_there(tmp_path, gate):
    with runs.Run(tmp_path / "run") as run:
        run.begin({}, FACTS, resume=False)
        runs.store(run, take(run, *small_model(), 1), keep=1)
        threading.Timer(0.1, gate.set).start()
    assert manifest.read(run.last()).step == 1


def test_a_store_that_fails_is_told_at_the_next_and_the_one_before_stays(begun, monkeypatch):
    run, model, optimizer = begun
    runs.store(run, take(run, model, optimizer, 1), keep=1)
    run.settle()

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        runs.store(run, take(run, model, optimizer, 2), keep=1)
        with pytest.raises(FileError, match=r"could not be written .*No space left on device.*; make room"):
            take(run, model, optimizer, 3)
    assert manifest.read(run.last()).step == 1
    runs.store(run, take(run, model, optimizer, 3), keep=1)
    run.settle()
    assert manifest.read(run.last()).step == 3


@pytest.mark.parametrize(("kind", "value"), [("factor", torch.nan), ("exp_avg", -torch.inf), ("exp_avg_sq", torch.inf)])
def test_numbers_that_are_not_finite_do_not_push_out_good_ones(kind, value, begun):
    run, model, optimizer = begun
    runs.store(run, take(run, model, optimizer, 1), keep=1)
    p = adapters.factors(model)["0"]["lora_A"]
    with torch.no_grad():
        (p if kind == "factor" else optimizer.state[p][kind])[0, 0] = value
    with pytest.raises(FileError, match=f"after step 2, tensor '{kind}/0.lora_A' is not finite; nothing was written"):
        take(run, model, optimizer, 2)
    assert manifest.read(run.last()).step == 1


def test_the_first_process_does_not_wait_for_ever(begun, monkeypatch):
    run, model, optimizer = begun
    monkeypatch.setattr(runs, "RENDEZVOUS", 0.05)
    snapshot = take(run, model, optimizer, 1)
    runs.store(run, replace(snapshot, manifest=replace(snapshot.manifest, tp=2)), keep=1)
    with pytest.raises(FileError, match=r"tp-00001.*: did not come within 0\.05 s; put --output where"):
        run.settle()
    assert run.last() is None


def fail_to_write_on_the_second(job, resume):
    """In each process: finetune, but process 1 finds the disk full at its second store."""
    write_tensors, number = checkpoint.write_tensors, itertools.count()

    def full(*args, **kwargs):
        if next(number):
            raise OSError(28, "No space left on device")
        return write_tensors(*args, **kwargs)

    if os.environ["RANK"] == "1":
        checkpoint.write_tensors = full
    train.finetune(job, quiet=True)


def test_a_store_that_fails_on_one_process_ends_the_run_on_all(reference):
    job = jobs.elsewhere(reference[0], "full", steps=6, warmup=2)
    processes = Processes(job, call=fail_to_write_on_the_second)
    assert processes.wait() == [2, 2], processes.told()
    assert processes.told().count("No space left on device") == 2
    assert stored(job) == EVERY


# ------------------------------------------------------------------------------------------------ what cannot go on


@pytest.fixture(scope="module")
def finished(job_models, tmp_path_factory):
    """The arguments of a run in one process that is done, as they were typed."""
    place = tmp_path_factory.mktemp("finished")
    job = Job(
        model=job_models["llama"],
        data=(jobs.write_lines(place / "data.jsonl", jobs.uneven(12)),),
        output=str(place / "run"),
        lora=LoraSpec(rank=2, alpha=4, target_modules="all-linear"),
        sequence_length=40,
        batch_size=2,
        steps=4,
        checkpoint_every=2,
    )
    assert cli.main(arguments_of(job)) == 0
    return job


def contents(directory):
    return {path: path.read_bytes() for path in sorted(Path(directory).rglob("*")) if path.is_file()}


def refused(arguments, capsys):
    """The sentence with which the command line refuses."""
    capsys.readouterr()
    assert cli.main([*arguments, "--resume"]) == cli.BAD_INPUT
    told = capsys.readouterr().err
    assert told.startswith("lora-fn: ") and told.count("\n") == 1 and "Traceback" not in told
    return told


CHANGES = {
    "rate": (["--learning-rate", "0.5"], "the job is another than the one to resume (learning_rate 0.0002 -> 0.5)"),
    "rank": (["--rank", "3"], "the job is another than the one to resume (lora"),
    "data": (["--data", "other.jsonl"], "the job is another than the one to resume (data"),
    "model": (["--model", "another"], "the job is another than the one to resume (model"),
    "dropout and seed": (["--dropout", "0.5", "--seed", "1"], "seed 0 -> 1"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_another_job_is_not_resumed(change, finished, capsys):
    options, sentence = CHANGES[change]
    before = contents(finished.output)
    assert sentence in refused([*arguments_of(finished), *options], capsys)
    assert contents(finished.output) == before


def test_what_may_change_may_change(finished, tmp_path, capsys):
    job = replace(finished, output=str(tmp_path / "run"))
    shutil.copytree(finished.output, job.output)
    options = ["--log-every", "2", "--checkpoint-every", "3", "--keep-checkpoints", "1", "--eval-every", "1"]
    assert cli.main([*arguments_of(job), *options, "--resume"]) == 0
    assert jobs.column(job, "loss") == jobs.column(finished, "loss")


def damage_tensors(place, offset):
    content = bytearray(place.read_bytes())
    content[offset] ^= 1
    place.write_bytes(content)


TENSORS = manifest.file_name(0, 0)
DAMAGES = {
    "flipped in the tensors": lambda last: damage_tensors(last / TENSORS, -5),
    "flipped in the header": lambda last: damage_tensors(last / TENSORS, 20),
    "flipped in the size of the header": lambda last: damage_tensors(last / TENSORS, 6),
    "cut off": lambda last: os.truncate(last / TENSORS, (last / TENSORS).stat().st_size // 2),
    "empty": lambda last: os.truncate(last / TENSORS, 0),
    "missing": lambda last: (last / TENSORS).unlink(),
    "manifest cut off": lambda last: os.truncate(last / manifest.NAME, 20),
    "manifest of another kind": lambda last: (last / manifest.NAME).write_text("[]"),
    "manifest missing": lambda last: (last / manifest.NAME).unlink(),
    "manifest flipped": lambda last: damage_tensors(last / manifest.NAME, 500),
    "manifest of another step": lambda last: last.rename(last.with_name("step-000000009")),
    "one file more": lambda last: shutil.copyfile(last / TENSORS, last / manifest.file_name(1, 0)),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_a_sentence(damage, finished, tmp_path, capsys):
    job = replace(finished, output=str(tmp_path / "run"))
    shutil.copytree(finished.output, job.output)
    last = runs.Run(Path(job.output)).last()
    DAMAGES[damage](last)
    before = contents(job.output)
    told = refused(arguments_of(job), capsys)
    assert str(last.parent) in told
    assert contents(job.output) == before


def test_data_that_changed_is_not_resumed(finished, capsys):
    file = Path(finished.data[0])
    content, before = file.read_bytes(), contents(finished.output)
    try:
        jobs.write_lines(file, jobs.uneven(13))
        assert "the data changed since the run began" in refused(arguments_of(finished), capsys)
    finally:
        file.write_bytes(content)
    assert contents(finished.output) == before


def test_a_model_that_was_exchanged_is_not_resumed(finished, capsys):
    file = sorted(Path(finished.model).glob("*.safetensors"))[-1]
    content, before = file.read_bytes(), contents(finished.output)
    try:
        file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        assert "the model changed since the run began" in refused(arguments_of(finished), capsys)
    finally:
        file.write_bytes(content)
    assert contents(finished.output) == before


@pytest.mark.parametrize("index", [0, 1])
def test_damage_that_one_process_sees_is_told_by_all(index, reference, tmp_path):
    job = replace(reference[0], output=str(tmp_path / "run"))
    shutil.copytree(reference[0].output, job.output)
    file = runs.Run(Path(job.output)).last() / manifest.file_name(index, 0)
    damage_tensors(file, -5)
    before = contents(job.output)
    processes = Processes(job, resume=True)
    assert processes.wait() == [2, 2], processes.told()
    # Some versions of torch and torch_xla have lines of their own to add.
    one, other = (line for line in processes.told().splitlines() if "SHA-256" in line)
    assert one == other and str(file) in one and "SHA-256 differs" in one
    assert contents(job.output) == before


def test_a_run_that_is_going_on_is_left_alone(reference, tmp_path, monkeypatch):
    job = replace(reference[0], output=str(tmp_path / "run"))
    shutil.copytree(reference[0].output, job.output)
    monkeypatch.setattr(runs, "WAIT", 0.2)
    state = checkpoint.read_json(Path(job.output) / runs.JOB)
    with runs.Run(Path(job.output)) as first, runs.Run(Path(job.output)) as second:
        first.begin(state["job"], {}, resume=True)
        with pytest.raises(FileError, match="another run is using it"):
            second.begin(state["job"], {}, resume=True)


def test_a_run_killed_before_it_began_can_be_started(finished, tmp_path):
    job = replace(finished, output=str(tmp_path / "run"))
    Path(job.output, runs.CHECKPOINTS).mkdir(parents=True)
    for name in (runs.LOCK, ".run.json.7.partial"):
        Path(job.output, name).touch()
    assert cli.main(arguments_of(job)) == 0
    assert not list(Path(job.output).glob(runs.PARTIAL))
    assert jobs.column(job, "loss") == jobs.column(finished, "loss")
