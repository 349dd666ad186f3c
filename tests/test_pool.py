"""Do the processes that other tests run on start, answer, fail and end as they should?"""

import os
import time

import pytest
import torch
from pool import Pool, PoolError, pool
from torch import distributed


def summed(mesh, x):
    distributed.all_reduce(x, group=mesh.get_group("tp"))
    return x, mesh.get_local_rank("tp")


def fail_on_one(mesh, how):
    if mesh.get_local_rank("tp") == 1:
        how = {"raise": lambda: 1 / 0, "exit": lambda: os._exit(7), "sleep": lambda: time.sleep(100)}[how]
        how()
    distributed.barrier()


def process(mesh):
    return os.getpid()


@pytest.mark.parametrize("size", (2, 4))
def test_every_process_answers_in_order(size):
    for _ in range(2):
        results = pool(size).run(summed, torch.ones(3))
        assert [rank for _, rank in results] == list(range(size))
        assert all(torch.equal(x, torch.full((3,), float(size))) for x, _ in results)
    assert pool(size) is pool(size)


def test_a_failure_comes_back_ends_all_and_the_next_call_starts_anew():
    mine = Pool(2)
    before = mine.run(process)
    for how, message in (
        ("raise", "ZeroDivisionError"),
        ("exit", "exit code 7"),
        ("sleep", r"no answer from \[0, 1\]"),
    ):
        start = time.monotonic()
        with pytest.raises(PoolError, match=message):
            mine.run(fail_on_one, how, timeout=3)
        assert time.monotonic() - start < 20
        after = mine.run(process)
        assert not set(before) & set(after)
        before = after
    mine.close()
    for pid in before:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
