"""Weights and buffers of a region: the rerun must find the ones of the forward, or refuse.

Plain autograd notices when a weight it saved is written to before backward, and keeps the old one when `.data` is given
another tensor. A recomputed region saves no weight, so versions and storages are compared here. Buffers that a forward
changes by itself (running statistics, the vectors of spectral norm) are put back to what the forward found, and after
the rerun to what they are now: they change once a step.

An optimizer may step in the middle of backward, each weight as soon as its gradient is there. The gradients of a saved
region come before the rerun of what is around it, which skips that region: its weights may have changed. They are taken
away for that rerun, so that whatever would use them after all fails.

Not covered: writes into the memory of `.data`, which no version counts; autograd does not see those either. The storage
of tensors that stand for several (DTensor, quantised subclasses), and of weights that DeepSpeed gathers anew each time.
"""

import contextlib
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from rematree.engines import is_partitioned
from rematree.errors import RecomputeMismatchError
from rematree.regions import join_path

_SMALL: Final = 4096  # elements; such a buffer is copied at every call, since it may change for the first time
_ONE_STORAGE: Final = frozenset({Tensor, nn.Parameter})
_STATISTICS: Final = nn.modules.batchnorm._NormBase  # pyright: ignore[reportPrivateUsage]


@dataclass
class ChangingBuffers:
    """Names of the buffers that a region's own forward changes; None until its first call has shown them."""

    names: frozenset[str] | None = None


class ModuleState:
    """Versions of a region's weights, and values of its changing buffers, as one forward finds them.

    Args:
        modules: The region and every module inside it.
        paths: Their paths within the region.
        changing: What earlier calls have shown; filled in by the first.
    Cost:
        A pass over parameters and buffers; the first call copies every buffer for its own duration.
    """

    __slots__ = ("_before", "_changing", "_marks", "_modules", "_paths", "_places", "_skipped")

    def __init__(self, modules: Sequence[nn.Module], paths: Sequence[str], changing: ChangingBuffers) -> None:
        self._modules = modules
        self._paths = paths
        self._changing = changing
        self._skipped: tuple[str, ...] = ()
        buffers = self._named_buffers()
        if changing.names is not None:
            buffers = [(name, buffer) for name, buffer in buffers if name in changing.names or buffer.numel() <= _SMALL]
        self._before: dict[str, tuple[Tensor, Tensor]] = {name: (b, b.detach().clone()) for name, b in buffers}
        held: list[dict[str, Any]] = [d for part in modules for d in (part._parameters, part._buffers) if d]
        # By `items()`: a weight asked for by name ZeRO-3 gathers, if it has not, and from then on with the block.
        self._places = [(place, dict(place.items())) for place in held]
        tensors = {id(t): t for _, then in self._places for t in then.values() if t is not None}
        self._marks = [(tensor, _mark(tensor)) for tensor in tensors.values()]

    def _named_buffers(self) -> list[tuple[str, Tensor]]:
        """As `named_buffers()` of the region."""
        found: dict[int, tuple[str, Tensor]] = {}
        for path, part in zip(self._paths, self._modules, strict=True):
            for name, buffer in part._buffers.items():
                if buffer is not None:
                    found.setdefault(id(buffer), (join_path(path, name), buffer))
        return list(found.values())

    def settle(self, skipped: Collection[str] = ()) -> None:
        """The forward is over: whatever it changed by itself is no reason to refuse the rerun.

        Args:
            skipped: Paths within the region of what the rerun will not run.
        """
        self._skipped = tuple(skipped)
        if self._changing.names is None:
            self._changing.names = frozenset(
                join_path(path, name)
                for path, part in zip(self._paths, self._modules, strict=True)
                if isinstance(part, _STATISTICS) and part.track_running_stats
                for name in part._buffers
            )
        changed = {id(tensor) for tensor, mark in self._marks if _mark(tensor) != mark}
        if changed:
            self._changing.names |= {name for name, buffer in self._named_buffers() if id(buffer) in changed}
        if self._before:
            self._before = {name: kept for name, kept in self._before.items() if name in self._changing.names}
        own = {id(buffer) for buffer, _ in self._before.values()}
        if changed:  # a parameter its own forward writes to: PEFT puts adapters on expert weights by a parametrisation
            own |= changed & {id(parameter) for part in self._modules for parameter in part._parameters.values()}
        if own:
            self._marks = [item for item in self._marks if id(item[0]) not in own]

    def restore(self, region: str, undo: contextlib.ExitStack) -> None:
        """Put the forward's weights and buffers back until `undo` closes, then the present ones again.

        Raises:
            RecomputeMismatchError: a weight or a fixed buffer was written to or replaced since the forward.
        """
        changed = [tensor for tensor, mark in self._marks if _mark(tensor) != mark]
        if changed:
            run = self._ids_of_what_is_run()
            for tensor in [each for each in changed if id(each) in run][:1]:
                root = self._modules[0]
                named = (*root.named_parameters(), *root.named_buffers())
                name = next((name for name, other in named if other is tensor), "a weight")
                raise RecomputeMismatchError(
                    f"{region}.{name} was modified in place or replaced between forward and backward; gradients "
                    "through the recomputation would belong to other weights",
                    remedies=["call backward before the optimizer's step and before loading or merging weights"],
                )
        for place, then in self._places:  # a tensor that was assigned since: autograd keeps the old one as well
            if place.keys() != then.keys() or any(place[name] is not then[name] for name in then):
                replace_entries(place, then, undo)
        hidden = {id(tensor) for tensor in changed}
        for place, _ in self._places if hidden else ():
            if any(id(tensor) in hidden for tensor in place.values()):
                kept = {name: None if id(tensor) in hidden else tensor for name, tensor in place.items()}
                replace_entries(place, kept, undo)
        if self._before:
            # `.data` has a version of its own: what autograd saved of a buffer is not called modified.
            undo.callback(_write, [(buffer, buffer.detach().clone()) for buffer, _ in self._before.values()])
            _write(self._before.values())

    def _ids_of_what_is_run(self) -> set[int]:
        """Of all tensors but those that are in skipped modules alone."""
        return {
            id(tensor)
            for path, part in zip(self._paths, self._modules, strict=True)
            if not any(path == each or path.startswith(f"{each}.") for each in self._skipped)
            for tensor in (*part._parameters.values(), *part._buffers.values())
        }


def _write(values: Iterable[tuple[Tensor, Tensor]]) -> None:
    with torch.no_grad():
        for buffer, value in values:
            buffer.data.copy_(value)


def _mark(tensor: Tensor) -> tuple[int, int]:
    """Differs after a write that autograd counts, and after the tensor was given another storage."""
    if tensor.is_inference():  # no version counts, and nothing writes to it where gradients are recorded
        return 0, 0
    # The exact types first: the general question costs as much as all the others.
    one_storage = type(tensor) in _ONE_STORAGE or not is_traceable_wrapper_subclass(tensor)
    if not one_storage or tensor.layout is not torch.strided or is_partitioned(tensor):
        return tensor._version, 0
    return tensor._version, tensor.untyped_storage()._cdata


def replace_entries(live: dict[Any, Any], wanted: dict[Any, Any], undo: contextlib.ExitStack) -> None:
    """Give `live` the entries of `wanted` until `undo` closes; in place, because others hold this very dict."""
    undo.callback(_fill, live, dict(live))
    _fill(live, wanted)


def _fill(live: dict[Any, Any], wanted: dict[Any, Any]) -> None:
    live.clear()
    live.update(wanted)
