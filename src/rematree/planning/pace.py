"""How much longer a block takes than its ops do alone: one block of each kind, run for real.

Prices of single ops miss what happens between them: threads that wake up, memory that another op has just left, Python.
Where the model lives on the device that prices the ops, a copy of one block is run forward and backward on made-up
inputs, and every block of its kind is scaled by what that took. Only this ratio is used, so options that a plan chooses
between keep the differences that the prices give them.
"""

import copy
import functools
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any, Final

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._pytree import tree_leaves, tree_map_only

from rematree.execute.attention import forget_attention
from rematree.execute.override import ForwardOverride, remove_overrides
from rematree.observation.observe import Twin
from rematree.pricing.cost import Cost, Measured, probe_bytes, unexpanded
from rematree.referee.simulate import Referee
from rematree.referee.simulation import Simulation
from rematree.units import MIB

_MOST_CACHED: Final = 256 * MIB  # bytes: more than the caches of a processor's core or of a GPU hold
_ENOUGH_SECONDS: Final = 1.0
_MOST_RUNS: Final = 6
CANNOT_RUN: Final = (RuntimeError, TypeError, ValueError, IndexError, NotImplementedError, AttributeError)


def measure_pace(model: nn.Module, referee: Referee, plain: Simulation) -> dict[int, float]:
    """Measured over predicted seconds of one block of each kind, forward and backward.

    Args:
        model: The live model, on the device that prices ops.
        referee: Of its twin under fake tensors, which says what each block is called with.
        plain: The step without any lever, simulated by it.
    Returns:
        A ratio for each kind whose block could be run.
    Cost:
        The time of two to six runs of each block, and a copy of its weights.
    """
    device, found = referee.twin.device, dict[int, float]()
    room = probe_bytes(device)
    chosen = {kind: index for index, kind in enumerate(referee.kinds) if _rise_bytes(plain, index) <= room}
    paths = {kind: referee.blocks[index] for kind, index in chosen.items()}
    try:
        between = between_runs(plain, device)
    except CANNOT_RUN:  # in mid-run there may be no memory for it
        return {}
    for kind, (args, kwargs) in calls_of(referee.twin, paths).items():
        predicted = plain.block_seconds(chosen[kind])
        block = copy_of(model.get_submodule(paths[kind]))
        if block is None or predicted <= 0:
            continue
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            try:
                found[kind] = _seconds(block, args, kwargs, between) / predicted
            except CANNOT_RUN:  # on made-up inputs
                continue
    return found


def is_measured(cost: Cost) -> bool:
    """Whether `cost` measures what ops take on the device that is here."""
    return isinstance(cost, Measured)


def is_live(model: nn.Module, device: torch.device) -> bool:
    """Whether all weights of `model` are real and on `device`."""
    tensors = [*model.parameters(), *model.buffers()]
    return all(t.device.type == device.type and not isinstance(t, FakeTensor) for t in tensors)


def _rise_bytes(plain: Simulation, block: int) -> int:
    """What block number `block` needs beside all that is there when it begins."""
    return plain.forward(block).peak_bytes - plain.forward(block).live_bytes


def calls_of(twin: Twin, blocks: Mapping[int, str]) -> dict[int, tuple[Any, Any]]:
    """Arguments of the first call of each of `blocks`, fake."""
    calls: dict[int, tuple[Any, Any]] = {}

    def around(kind: int, inner: Any, *args: Any, **kwargs: Any) -> Any:
        calls.setdefault(kind, ([_no_cache(a) for a in args], {name: _no_cache(a) for name, a in kwargs.items()}))
        return inner(*args, **kwargs)

    overrides = [
        ForwardOverride(twin.model.get_submodule(path), functools.partial(around, kind))
        for kind, path in blocks.items()
    ]
    try:
        with twin.mode:
            twin.loss()
    finally:
        for override in overrides:
            override.remove()
    return calls


def _no_cache(argument: Any) -> Any:
    """None for a cache of keys and values, which would grow with every run."""
    return None if hasattr(argument, "get_seq_length") else argument


def copy_of(block: nn.Module) -> nn.Module | None:
    """A copy that nothing of this library is installed on; None where copying fails."""
    try:
        copied = copy.deepcopy(block)
    except CANNOT_RUN:
        return None
    for parameter in copied.parameters():
        parameter.grad = None
    return cleared(copied)


def cleared(copied: nn.Module) -> nn.Module:
    """`copied`, in training, with nothing of this library on it and no checkpointing."""
    remove_overrides(copied)
    forget_attention(copied)
    for module in copied.modules():
        if module.__dict__.get("gradient_checkpointing") is True:
            module.__dict__["gradient_checkpointing"] = False
    return copied.train()


def _seconds(block: nn.Module, args: Any, kwargs: Any, between: torch.Tensor) -> float:
    """The median of some runs; the first one does not count unless it is the only one there is time for."""
    device = between.device
    args, kwargs = tree_map_only(FakeTensor, functools.partial(made_up, device=device), (args, kwargs))
    inputs = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor) and t.requires_grad]
    wanted = [*inputs, *(p for p in block.parameters() if p.requires_grad)]
    times: list[float] = []
    while len(times) < _MOST_RUNS and (len(times) < 2 or sum(times) < _ENOUGH_SECONDS):
        outputs, forward = timed(between, lambda: _graded(block(*args, **kwargs)))
        backward = 0.0
        if outputs and wanted:
            seeds = [torch.ones_like(t) for t in outputs]
            grads, backward = timed(
                between, functools.partial(torch.autograd.grad, outputs, wanted, seeds, allow_unused=True)
            )
            del grads, seeds
        del outputs
        times.append(forward + backward)
        if times[0] > 4 * _ENOUGH_SECONDS:
            break
    return statistics.median(times[1:] or times)


def _graded(out: Any) -> list[torch.Tensor]:
    return [t for t in tree_leaves(out) if isinstance(t, torch.Tensor) and t.requires_grad]


def between_runs(plain: Simulation, device: torch.device) -> torch.Tensor:
    """Memory to write over between two runs of a part of a step: as much as the step `plain` takes, within limits."""
    return torch.empty(min(plain.peak_bytes, _MOST_CACHED), dtype=torch.uint8, device=device)


def timed(between: torch.Tensor, run: Callable[[], Any]) -> tuple[Any, float]:
    """What `run` returns and its seconds, from caches that hold nothing of it.

    In a step all other blocks run before this one runs again, and between its forward and its backward; writing over
    `between` stands for them.
    """
    between.zero_()
    start = now(between.device)
    out = run()
    return out, now(between.device) - start


def now(device: torch.device) -> float:
    """Seconds, once everything that was started on `device` is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def made_up(fake: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A real tensor on `device` laid out as `fake`."""
    real = unexpanded(fake.shape, fake.stride(), fake.dtype, device)
    if 0 in fake.stride():
        real.fill_(1)
    elif fake.dtype.is_floating_point:
        real.normal_()
    else:
        real.fill_(fake.dtype is torch.bool)
    return real.expand(fake.shape).requires_grad_(fake.requires_grad)
