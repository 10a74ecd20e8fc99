"""Runs a function in several processes that form one gloo group, and brings back what each returned."""

import io
import multiprocessing
import socket
import traceback
from collections.abc import Callable
from datetime import timedelta
from queue import Empty
from typing import Any

import torch
import torch.distributed as dist

import forked
from rematree.gloo import start_settled_gloo

_PATIENCE = timedelta(minutes=10)


def run(count: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """`function(rank, *args)` in `count` processes; the results by rank. The first error of any is raised here."""
    context = multiprocessing.get_context("forkserver")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    results: Any = context.Queue()
    workers = [forked.process(_work, rank, count, port, results, function, args) for rank in range(count)]
    for worker in workers:
        worker.start()
    found: dict[int, Any] = {}
    try:
        while len(found) < count:
            try:
                rank, value, error = results.get(timeout=5)
            except Empty:
                dead = [w.exitcode for w in workers if w.exitcode]
                assert not dead, f"a rank ended with {dead}"
                continue
            assert error is None, f"rank {rank}:\n{error}"
            found[rank] = torch.load(io.BytesIO(value), weights_only=False)
    finally:
        for worker in workers:
            worker.join(1 if len(found) == count else 0)
            worker.kill()
    return [found[rank] for rank in range(count)]


def _work(rank: int, count: int, port: int, results: Any, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    store = dist.TCPStore("127.0.0.1", port, count, rank == 0, timeout=_PATIENCE)
    start_settled_gloo(rank, count, store, _PATIENCE)
    try:
        # As bytes: a tensor in a queue is shared memory of a process that may be gone when it is read.
        value = io.BytesIO()
        torch.save(function(rank, *args), value)
        results.put((rank, value.getvalue(), None))
    except BaseException:
        results.put((rank, None, traceback.format_exc()))
        raise
    dist.barrier()  # nobody leaves while another still talks to it
    dist.destroy_process_group()
