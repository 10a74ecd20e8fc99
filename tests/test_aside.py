"""Part of a plan on a second core: only where a process can be copied, and nothing depends on the copy."""

import os
import subprocess
import sys

import pytest

# In a process of its own, which has one thread.
ALONE = """
import os, threading, time
from rematree.planning.aside import aside

here = os.getpid()

with aside(os.getpid, may=True) as there:
    assert there() != here
with aside(os.getpid, may=False) as there:
    assert there() == here


def fails_elsewhere():
    if os.getpid() != here:
        raise ValueError
    return "here after all"


with aside(fails_elsewhere, may=True) as there:
    assert there() == "here after all"
with aside(lambda: bytes(10_000_000), may=True) as there:  # more than a pipe holds
    time.sleep(0.1)
    assert there() == bytes(10_000_000)
start = time.monotonic()
with aside(lambda: time.sleep(60), may=True):
    pass  # nobody asks
assert time.monotonic() - start < 30
wait = threading.Event()
thread = threading.Thread(target=wait.wait)
thread.start()
with aside(os.getpid, may=True) as there:
    assert there() == here
wait.set()
thread.join()
try:
    os.waitpid(-1, 0)
except ChildProcessError:
    print("no copy is left")
"""


@pytest.mark.skipif(
    not sys.platform.startswith("linux") or len(os.sched_getaffinity(0)) < 2, reason="there is no second core"
)
def test_a_copy_of_a_process_with_one_thread_does_it() -> None:
    done = subprocess.run([sys.executable, "-c", ALONE], capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "no copy is left\n"
