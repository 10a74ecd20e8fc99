"""What the head takes: run for real, with the loss whole and in chunks of every size a plan may take.

The price of a chunk is the sum of its ops' prices. What is between them costs as much here as it does in a block: each
chunk reads the whole output embedding again, and its logits are memory that was just given back. So where the model
lives on the device that prices the ops, a copy of it that shares its weights and has no blocks is run from the output
of the last block to the gradient of that output.
"""

import copy
import functools
import statistics
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Final

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._pytree import tree_leaves, tree_map_only

from rematree.engines import copy_without_engine
from rematree.execute.handle import forget_handle
from rematree.execute.loss.attach import attach_chunked_loss
from rematree.execute.override import ForwardOverride
from rematree.memory.ledger import BEFORE_THE_BLOCKS
from rematree.observation.observe import Twin, loss_of
from rematree.planning.pace import CANNOT_RUN, between_runs, cleared, made_up, now
from rematree.pricing.cost import probe_bytes
from rematree.quantised import hidden_tensors
from rematree.referee.simulate import Simulation

_FEWEST_RUNS: Final = 3  # whose median one disturbed run does not move
_MOST_RUNS: Final = 6
_ENOUGH_SECONDS: Final = 1.0
_MOST_SECONDS: Final = 12.0  # for all sizes of chunks together
_HOOKS: Final = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class HeadClock:
    """Runs the head of a live model.

    Args:
        model: Copied from, not changed; on the device that prices ops.
        twin: It under fake tensors, with the batch.
        blocks: Module paths of its blocks, in order.
        plain: The step without any lever, simulated.
    Cost:
        Three to six runs of the head with each loss, and what one needs in memory beside the weights. Within some
        12 seconds for all of them; what is left then gets no answer. What a model runs before its blocks is run each
        time, an encoder for example; if that takes more memory than `probe_bytes`, nothing is.
    """

    def __init__(self, model: nn.Module, twin: Twin, blocks: Sequence[str], plain: Simulation) -> None:
        self._device = twin.device
        self._plain = plain
        self._model: nn.Module | None = None
        self._spent = 0.0
        first = plain.segment(BEFORE_THE_BLOCKS)
        if first is None or first.peak_bytes - first.live_bytes > probe_bytes(self._device):
            return
        try:
            self._real = functools.partial(made_up, device=self._device)
            with self._own_random():
                self._batch: Any = tree_map_only(FakeTensor, self._real, twin.batch)
            self._behind = _output_of(twin, blocks[-1])
            self._model = self._without_blocks(model, blocks)
        except CANNOT_RUN:
            return

    def seconds(self, workspaces: Mapping[int | None, int]) -> dict[int | None, float]:
        """Of the head with every loss asked for; without those that cannot be run. To be called once.

        All of them take turns, so that a slow second of the machine is not one loss's alone.

        Args:
            workspaces: Rows of a chunk (None is the whole loss), with the bytes that the head needs beside all that is
                there when it begins. More than `probe_bytes` is not run.
        """
        if self._model is None:
            return {}
        try:
            return self._seconds(workspaces)
        finally:  # not when garbage is collected next: it is memory that the step needs
            self._model = self._hidden = self._batch = None
            vars(self).pop("_between", None)

    def _seconds(self, workspaces: Mapping[int | None, int]) -> dict[int | None, float]:
        room = probe_bytes(self._device)
        times: dict[int | None, list[float]] = {rows: [] for rows, size in workspaces.items() if size <= room}
        with self._own_random():
            for rows in list(times)[:1]:
                self._run(rows)  # whatever is done once
            for _ in range(_MOST_RUNS):
                for rows in [rows for rows, found in times.items() if not _enough(found)]:
                    if self._spent > _MOST_SECONDS:
                        break
                    seconds = self._run(rows)
                    if seconds is None:
                        del times[rows]
                    else:
                        times[rows].append(seconds)
        return {rows: statistics.median(found) for rows, found in times.items() if found}

    def _run(self, rows: int | None) -> float | None:
        assert self._model is not None
        chunked, begun = None, now(self._device)
        try:
            if rows is not None:
                chunked = attach_chunked_loss(self._model, rows, check=False)
            self._hidden = tree_map_only(FakeTensor, self._real, self._behind)
            with torch.enable_grad():
                loss = loss_of(self._model(**self._batch))
                wanted = [t for t in tree_leaves(self._hidden) if isinstance(t, torch.Tensor) and t.requires_grad]
                wanted += [p for p in self._model.parameters() if p.requires_grad]
                torch.autograd.grad(loss, wanted, allow_unused=True)
            seconds = now(self._device) - self._start
        except CANNOT_RUN:
            return None
        finally:
            if chunked is not None:
                chunked.remove()
        self._spent += now(self._device) - begun
        return seconds

    def _own_random(self) -> AbstractContextManager[None]:
        """What is drawn inside is not drawn from the user's generators."""
        return torch.random.fork_rng([self._device] if self._device.type == "cuda" else [])

    def _no_block(self, _inner: Any, *_args: Any, **_kwargs: Any) -> Any:
        """The output of every block."""
        return self._hidden

    def _last_block(self, _inner: Any, *_args: Any, **_kwargs: Any) -> Any:
        """The output of the last one, at the moment at which the head begins."""
        self._between.zero_()
        self._start = now(self._device)
        return self._hidden

    @functools.cached_property
    def _between(self) -> torch.Tensor:
        """Overwritten, so that caches hold nothing of the head, as behind the blocks of a step."""
        return between_runs(self._plain, self._device)

    def _without_blocks(self, model: nn.Module, blocks: Sequence[str]) -> nn.Module:
        kept = [*model.parameters(), *hidden_tensors(model)]
        memo: dict[int, Any] = {id(tensor): tensor for tensor in kept}
        for path in blocks:
            block = model.get_submodule(path)
            hollow = memo[id(block)] = copy.copy(block)
            empty: dict[str, Any] = {"_modules": {}, "_parameters": {}, "_buffers": {}}
            vars(hollow).update(empty, **{name: type(vars(block)[name])() for name in _HOOKS})
            vars(hollow).pop("forward", None)
        copied = copy_without_engine(model, memo)
        forget_handle(copied)
        cleared(copied)
        for path in blocks[:-1]:
            ForwardOverride(copied.get_submodule(path), self._no_block)
        ForwardOverride(copied.get_submodule(blocks[-1]), self._last_block)
        return copied


def _enough(times: Sequence[float]) -> bool:
    return len(times) >= _FEWEST_RUNS and sum(times) >= _ENOUGH_SECONDS


def _output_of(twin: Twin, path: str) -> Any:
    """What the block at `path` returns, fake."""
    found: list[Any] = []

    def around(inner: Any, *args: Any, **kwargs: Any) -> Any:
        out = inner(*args, **kwargs)
        found.append(tree_map_only(torch.Tensor, lambda t: t.detach().requires_grad_(t.requires_grad), out))
        return out

    override = ForwardOverride(twin.model.get_submodule(path), around)
    try:
        with twin.mode:
            twin.loss()
    finally:
        override.remove()
    return found[0]
