"""Runs a function on several ranks: real processes that talk through gloo.

Starting them takes seconds: let one call compute many cases, and the tests assert on its parts.
"""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import pickle
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

# one process imports what is slow to import, and the ranks are forked from it
METHOD = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
GRACE = 10.0  # seconds that the others are given once a rank has failed: they may hang in a collective


def run(function: Callable[..., Any], world: int, *args: Any, timeout: float = 120.0) -> list[Any]:
    """What `function(*args)` returns on every rank, by rank.

    `function` is found by its module and name; arguments and results are pickled. The default process group is
    there, and so are the environment variables by which Lightning takes the processes for its own.
    """
    context = multiprocessing.get_context(METHOD)
    if METHOD == "forkserver":
        context.set_forkserver_preload(["lightning.pytorch"])
    port = _free_port()
    processes, pipes = [], []
    with tempfile.TemporaryDirectory() as folder:
        try:
            for rank in range(world):
                here, there = context.Pipe(duplex=False)
                given = (there, function, args, rank, world, Path(folder), port, timeout)
                process = context.Process(target=_rank, args=given, daemon=True)
                process.start()
                there.close()
                processes.append(process)
                pipes.append(here)
            answers = _collect(pipes, timeout)
        finally:
            for process in processes:
                process.join(1.0)
                if process.is_alive():
                    process.kill()
                    process.join()
    errors = [
        f"--- rank {rank} ---\n{answer or 'no answer: it hung, or died'}"
        for rank, answer in enumerate(answers)
        if not isinstance(answer, bytes)
    ]
    if errors:
        raise RuntimeError("\n".join([f"{function.__qualname__} failed on {len(errors)} of {world} ranks", *errors]))
    return [pickle.loads(answer) for answer in answers]


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def _collect(pipes: list[Connection], timeout: float) -> list[bytes | str | None]:
    """The pickled result of each rank, else its traceback, else None."""
    answers: list[bytes | str | None] = [None] * len(pipes)
    pending = {pipe: rank for rank, pipe in enumerate(pipes)}
    deadline = time.monotonic() + timeout
    while pending and (ready := wait(list(pending), max(0.0, deadline - time.monotonic()))):
        for pipe in ready:
            rank = pending.pop(pipe)
            try:
                answers[rank] = answer = pipe.recv()
            except EOFError:
                answer = None
            if not isinstance(answer, bytes):
                deadline = min(deadline, time.monotonic() + GRACE)
    return answers


def _rank(
    pipe: Connection,
    function: Callable[..., Any],
    args: tuple[Any, ...],
    rank: int,
    world: int,
    folder: Path,
    port: int,
    timeout: float,
) -> None:
    """The life of one process."""
    faulthandler.dump_traceback_later(0.9 * timeout)  # to stderr, which pytest shows: where it hangs
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    place = {"RANK": rank, "LOCAL_RANK": rank, "NODE_RANK": 0, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
    os.environ.update({name: str(value) for name, value in {**address, **place}.items()})
    if sys.platform == "linux":
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    try:
        import warnings

        import torch

        warnings.simplefilter("ignore")
        torch.set_num_threads(1)
        torch.manual_seed(0)
        store = torch.distributed.FileStore(str(folder / "store"), world)
        torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=world)
        answer: bytes | str = pickle.dumps(function(*args))
        torch.distributed.barrier()  # nobody leaves while another still talks to it
    except Exception:
        answer = traceback.format_exc()
    pipe.send(answer)
    pipe.close()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # a failed rank must not wait for the others to take leave
