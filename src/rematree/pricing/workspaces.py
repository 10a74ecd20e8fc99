"""What cuBLAS keeps on a GPU: a workspace for each thread that multiplies, handed out by torch's allocator.

Source: torch, aten/src/ATen/cuda/CublasHandlePool.cpp: ":4096:2:16:8" by default, 32 MiB on Hopper and Blackwell.
"""

import os
from typing import Final

from rematree.units import KIB, MIB

MATMUL_THREADS: Final = 2  # the caller's in forward, autograd's in backward
HOPPER: Final = 9  # major number of the compute capability
_WORKSPACE_BYTES: Final = (4096 * 2 + 16 * 8) * KIB
_LARGE_WORKSPACE_BYTES: Final = 32 * MIB


def cublas_workspace_bytes(major: int) -> int:
    """Bytes torch gives cuBLAS in each thread that multiplies, by the major number of the compute capability."""
    return _LARGE_WORKSPACE_BYTES if major >= HOPPER else _WORKSPACE_BYTES


def workspace_here(major: int) -> int:
    """The same in this process, in which `CUBLAS_WORKSPACE_CONFIG` may ask for more or less."""
    sizes = os.environ.get("CUBLAS_WORKSPACE_CONFIG", "").split(":")[1:]
    if not sizes or len(sizes) % 2 or not all(map(str.isdecimal, sizes)):
        return cublas_workspace_bytes(major)  # torch, too, warns and takes its own
    return sum(int(size) * int(count) * KIB for size, count in zip(sizes[::2], sizes[1::2], strict=True))
