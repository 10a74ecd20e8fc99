"""Processes of their own for tests: forked from a server that has imported what any of them needs.

One server for all tests of a pytest process, as multiprocessing has one: whoever starts it first says what it imports.
"""

import gc
import multiprocessing
from collections.abc import Callable
from multiprocessing.context import ForkServerProcess
from typing import Any

import torch

_PRELOADED = ["several_ranks", "ranked", "killed", "rematree.planning.planner", "rematree.execute.handle"]


def process(function: Callable[..., None], *args: Any) -> ForkServerProcess:
    """`function(*args)` in a process of its own, with one thread; not started yet. It costs no import."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    return context.Process(target=_begin, args=(function, args))


def _begin(function: Callable[..., None], args: tuple[Any, ...]) -> None:
    gc.freeze()  # what the server has imported: every peak meter would go through it
    torch.set_num_threads(1)
    function(*args)
