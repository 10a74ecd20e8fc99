"""What cuBLAS keeps on a GPU: a workspace for each thread that multiplies, handed out by torch's allocator.

Source: torch, aten/src/ATen/cuda/CublasHandlePool.cpp, `parseChosenWorkspaceSize`: ":4096:2:16:8" by default, 32 MiB on
Hopper and Blackwell. Under ROCm it is hipBLAS: 32 MiB, from CDNA 3 on 128 MiB (the same in docs/source/notes/hip.rst).
Not covered: the 76 MiB that hipBLASLt has for itself under ROCm.
"""

import os
from typing import Final

from rematree.units import KIB, MIB

MATMUL_THREADS: Final = 2  # the caller's in forward, autograd's in backward
HOPPER: Final = 9  # major number of the compute capability
_WORKSPACE_BYTES: Final = (4096 * 2 + 16 * 8) * KIB
_LARGE_WORKSPACE_BYTES: Final = 32 * MIB
_CDNA3: Final = "gfx942"
_LARGE_ON_ROCM: Final = (_CDNA3, "gfx950", "gfx1250")
_ROCM_WORKSPACE_BYTES: Final = 32 * MIB
_LARGE_ROCM_WORKSPACE_BYTES: Final = 128 * MIB
_VARIABLES: Final = ("CUBLAS_WORKSPACE_CONFIG",)
_ROCM_VARIABLES: Final = (*_VARIABLES, "HIPBLAS_WORKSPACE_CONFIG", "ROCBLAS_WORKSPACE_CONFIG")  # the first that is set


def cublas_workspace_bytes(major: int) -> int:
    """Bytes torch gives cuBLAS in each thread that multiplies, by the major number of the compute capability."""
    return _LARGE_WORKSPACE_BYTES if major >= HOPPER else _WORKSPACE_BYTES


def hipblas_workspace_bytes(architecture: str) -> int:
    """Bytes torch gives hipBLAS in each thread that multiplies, by the LLVM target of the GPU: "gfx942:sramecc+"."""
    large = any(name in architecture for name in _LARGE_ON_ROCM)
    return _LARGE_ROCM_WORKSPACE_BYTES if large else _ROCM_WORKSPACE_BYTES


def workspace_here(major: int) -> int:
    """The same in this process, in which a variable of the environment may ask for more or less.

    Args:
        major: Major number of the compute capability; under ROCm the GPU that is here says what it is.
    """
    import torch

    if torch.version.hip is None:
        variables, own = _VARIABLES, cublas_workspace_bytes(major)
    else:
        architecture = torch.cuda.get_device_properties().gcnArchName if torch.cuda.is_available() else _CDNA3
        variables, own = _ROCM_VARIABLES, hipblas_workspace_bytes(architecture)
    told = next((os.environ[name] for name in variables if name in os.environ), "")
    sizes = told.split(":")[1:]
    if not sizes or len(sizes) % 2 or not all(map(str.isdecimal, sizes)):
        return own  # torch, too, warns and takes its own
    return sum(int(size) * int(count) * KIB for size, count in zip(sizes[::2], sizes[1::2], strict=True))
