"""How do tests run on real processes? `pool(4).run(function, *args)`: four gloo processes that are started once.

They wait between the calls, and end with the interpreter. A call that fails ends them; the next one starts new ones.
"""

import atexit
import functools
import multiprocessing
import pickle
import tempfile
import time
import traceback
from datetime import timedelta
from multiprocessing.connection import wait

START_S, RUN_S, GRACE_S = 60, 60, 2
# What takes long to import: once, in the process that the others are forked from.
PRELOADED = [
    "torch",
    "torch.distributed.device_mesh",
    "transformers.models.llama.modeling_llama",
    "lora_fn",
    "hypothesis",
    "pytest",
]


class PoolError(Exception):
    """What went wrong in which process, with its traceback."""


class Pool:
    """Gloo processes that span one mesh dimension "tp"."""

    def __init__(self, size):
        self.size = size
        self._processes = []
        self._connections = []

    def run(self, function, *args, timeout=RUN_S):
        """The results of function(mesh, *args) on every process, in order.

        The function is of a module's top level; arguments and results are pickled, so they are copies.

        Raises:
            PoolError: The function raised somewhere, or did not come back in time.
        """
        if not self._processes:
            self._start()
        message = pickle.dumps((function, args))
        for connection in self._connections:
            connection.send_bytes(message)
        return self._answers(timeout)

    def close(self):
        """End the processes; the next run starts new ones."""
        for connection in self._connections:
            connection.close()
        for process in self._processes:
            process.join(GRACE_S)
            self._kill(process)
        if self._processes:
            self._store.cleanup()
        self._processes, self._connections = [], []

    def _start(self):
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        self._store = tempfile.TemporaryDirectory(prefix="pool-")  # new groups are made through it, so it stays
        for rank in range(self.size):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_serve, args=(theirs, rank, self.size, f"{self._store.name}/store"), daemon=True
            )
            process.start()
            theirs.close()
            self._processes.append(process)
            self._connections.append(ours)
        self._answers(START_S)

    def _answers(self, timeout):
        """One answer of every process; where there is a failure, all are ended and it is raised."""
        answers, failures = {}, {}
        deadline = time.monotonic() + timeout
        while len(answers) + len(failures) < self.size:
            open_ones = [c for i, c in enumerate(self._connections) if i not in answers and i not in failures]
            ready = wait(open_ones, max(0.0, deadline - time.monotonic()))
            if not ready:
                break
            for connection in ready:
                rank = self._connections.index(connection)
                try:
                    is_right, answer = pickle.loads(connection.recv_bytes())
                except (EOFError, OSError):
                    self._processes[rank].join(GRACE_S)
                    is_right, answer = False, f"died with exit code {self._processes[rank].exitcode}"
                (answers if is_right else failures)[rank] = answer
            if failures:
                # The others may wait for the one that failed: what they have to say, they say soon.
                deadline = min(deadline, time.monotonic() + GRACE_S)
        if len(answers) == self.size:
            return [answers[rank] for rank in range(self.size)]
        for process in self._processes:
            self._kill(process)
        self.close()
        silent = [rank for rank in range(self.size) if rank not in answers and rank not in failures]
        said = [f"process {rank} of {self.size}: {failures[rank]}" for rank in sorted(failures)]
        raise PoolError("\n".join([*said, f"no answer from {silent} within {timeout} s" if not said else ""]).strip())

    @staticmethod
    def _kill(process):
        if process.is_alive():
            process.kill()
            process.join()


@functools.cache
def pool(size):
    """The pool of that many processes: one for all tests."""
    new = Pool(size)
    atexit.register(new.close)
    return new


def _serve(connection, rank, size, store):
    """A process's life: join the group, then answer calls until the connection is closed."""
    import torch
    from torch import distributed
    from torch.distributed.device_mesh import init_device_mesh

    torch.set_num_threads(1)
    mesh = None

    def join():
        nonlocal mesh
        distributed.init_process_group(
            "gloo",
            store=distributed.FileStore(store, size),
            rank=rank,
            world_size=size,
            timeout=timedelta(seconds=RUN_S),
        )
        mesh = init_device_mesh("cpu", (size,), mesh_dim_names=("tp",))
        distributed.barrier()

    connection.send_bytes(_answer(join))
    while True:
        try:
            message = connection.recv_bytes()
        except EOFError:
            break
        connection.send_bytes(_answer(_call, message, mesh))
    distributed.destroy_process_group()


def _call(message, mesh):
    function, args = pickle.loads(message)
    return function(mesh, *args)


def _answer(function, *args):
    """(True, result) or (False, traceback), pickled."""
    try:
        return pickle.dumps((True, function(*args)))
    except BaseException:
        return pickle.dumps((False, traceback.format_exc()))
