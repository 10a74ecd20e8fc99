"""A second core for a plan: what nothing waits for yet is done in a copy of this process.

A copy holds the locks that other threads held, which no one ever lets go of there: a process is copied only while it
has a single thread, counted by the operating system, native ones included. Nobody depends on the copy: what it cannot
say is done here.
"""

import contextlib
import os
import pickle
import signal
from collections.abc import Callable, Generator
from pathlib import Path
from typing import BinaryIO, NoReturn, TypeVar

_T = TypeVar("_T")


@contextlib.contextmanager
def aside(work: Callable[[], _T], *, may: bool) -> Generator[Callable[[], _T]]:
    """Begin `work` on another core, if there is one; gives a function that waits for its result.

    Args:
        work: Done in a copy of this process, so that it changes nothing here, or here when its result is asked for. Its
            result can be pickled.
        may: Whether the process may be copied: nothing of a device that is here lives in it.
    Cost:
        10 to 20 ms to copy a process with a model on `meta`. The copy ends with the context.
    """
    if not (may and _has_second_core()):
        yield work
        return
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        _tell(writer, work)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        try:
            yield lambda: _told(pipe, work)
        finally:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)


def _has_second_core() -> bool:
    try:
        return len([*Path("/proc/self/task").iterdir()]) == 1 and len(os.sched_getaffinity(0)) > 1
    except (OSError, AttributeError):  # a system that does not say
        return False


def _tell(writer: int, work: Callable[[], object]) -> NoReturn:
    """In the copy: whatever happens, it neither returns nor says anything but the result."""
    try:
        said = pickle.dumps(work())
        with os.fdopen(writer, "wb") as pipe:
            pipe.write(said)
    finally:
        os._exit(0)


def _told(pipe: BinaryIO, work: Callable[[], _T]) -> _T:
    said = pipe.read()
    return pickle.loads(said) if said else work()
