"""gloo without its race: a process group whose collectives hold nothing any more when they return.

gloo runs a collective in one of two threads of its own. A thread wakes the caller first and drops its reference to the
collective's tensors after that, when the system next lets it run. Until then they live on, and a free in such a thread
is one that torch's profiler does not see: the bytes stay in its sum to the end of the step. Whoever measures what a
step allocates would at times count a gathered block, or the copy in which a reduce-scatter sums, too often.

Here the group has one thread, which takes up a collective only when it has dropped the one before. So a second, tiny
collective after each settles the first. That costs a round trip, hence it is for measuring, not for training.
"""

from datetime import timedelta
from typing import Any, Final

import torch
from torch import distributed, nn

from rematree.engines import is_sharded

_BACKEND: Final = "settled_gloo"
# Collectives of DeepSpeed's ZeRO stages, and the place of `async_op` among their arguments.
_DEEPSPEED: Final = {"all_reduce": 3, "all_gather_into_tensor": 3, "reduce_scatter_tensor": 4}


def start_settled_gloo(rank: int, count: int, store: Any, timeout: timedelta) -> None:
    """`init_process_group` for CPU tensors, with one worker thread instead of gloo's two.

    Args:
        rank: Of this process.
        count: Of processes.
        store: As for `init_process_group`.
        timeout: Of a collective.
    """
    distributed.Backend.register_backend(_BACKEND, _one_thread, devices="cpu")
    distributed.init_process_group(_BACKEND, rank=rank, world_size=count, store=store, timeout=timeout)


def _one_thread(store: Any, rank: int, count: int, timeout: timedelta) -> Any:
    gloo: Any = distributed.ProcessGroupGloo  # pyright: ignore[reportPrivateImportUsage]
    options = gloo._Options()
    options._devices, options._threads, options._timeout = [gloo.create_default_device()], 1, timeout
    return gloo(store, rank, count, options)


class Settling:
    """Settles the collectives of a group that `start_settled_gloo` has made."""

    def __init__(self) -> None:
        self._one = torch.zeros(1)  # kept: nothing is made, and nothing freed, by settling

    def now(self) -> None:
        """Return when nothing of earlier collectives is held. All ranks must call it."""
        distributed.all_reduce(self._one)

    def every_collective_of(self, model: nn.Module) -> None:
        """Settle what FSDP2 gathers and reduces for `model` before it goes on; DDP's collectives allocate nothing."""
        from torch.distributed.fsdp._fully_shard import _fsdp_collectives as collectives

        settling = self

        class Gather(collectives.DefaultAllGather):
            def __call__(self, *args: Any, **kwargs: Any) -> Any:
                _settled(super().__call__(*args, **{**kwargs, "async_op": True}), settling)

        class Reduce(collectives.DefaultReduceScatter):
            def __call__(self, *args: Any, **kwargs: Any) -> Any:
                _settled(super().__call__(*args, **{**kwargs, "async_op": True}), settling)

        for module in model.modules():
            if is_sharded(module):
                fsdp: Any = module
                fsdp.set_custom_all_gather(Gather())
                fsdp.set_custom_reduce_scatter(Reduce())

    def every_collective_of_deepspeed(self) -> None:
        """Settle what DeepSpeed, once its `init_distributed` was called, gathers and reduces before it goes on."""
        import deepspeed  # pyright: ignore[reportMissingImports]

        backend: Any = deepspeed.comm.comm.cdb
        for name, flag in _DEEPSPEED.items():
            inner = getattr(backend, name)

            def settled(*args: Any, inner: Any = inner, flag: int = flag, **kwargs: Any) -> Any:
                goes_on = kwargs.pop("async_op", False) or args[flag:] == (True,)
                work = inner(*args[:flag], **kwargs, async_op=True)
                _settled(work, self)
                return work if goes_on else None

            setattr(backend, name, settled)


def _settled(work: Any, settling: Settling) -> None:
    """Wait for `work`, which is still known here when gloo's thread drops it: its end is seen in this thread."""
    work.wait()
    settling.now()
