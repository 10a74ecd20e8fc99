"""Recompute a run of blocks as one: of all of them only the first one's input is kept.

The model calls its blocks one after another, so a group is not one function that could be checkpointed. Each block of
it runs in its own place under hooks that throw away whatever autograd would save, and what the block was called with is
noted: an argument that an earlier block of the group returned is noted as that, not kept. When backward needs the first
tensor, the blocks are called again in their order, each in the world of its forward (random state, flags, adapters,
autocast, expert choices), and what autograd saves now goes to where it was thrown away. The rerun ends with the last
tensor that is missing.

Groups nest, and hold recomputed blocks, by the same rule that makes `torch.utils.checkpoint` nest: what an inner one
keeps (its input) is a tensor that the outer one throws away and brings back.

What holds what: autograd's graph holds holders, these their frame, and the frame detached tensors and weak references,
so that nothing outlives the graph.

Not covered: tensors that a custom autograd function hides on its context instead of saving them; they stay. A block
that is given another tensor than the one before it returned keeps that tensor: nothing is wrong, only more is kept.
"""

import contextlib
import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from rematree.engines import gathered
from rematree.errors import RecomputeMismatchError
from rematree.execute.arguments import Arguments
from rematree.execute.context import Autocast, Known, World, builds_graph
from rematree.execute.noted import Hooks, Kept, Link, check_version, is_weight, mapped, tensors_of, version_of
from rematree.execute.random_state import RandomState
from rematree.execute.recompute import Executor
from rematree.execute.routing import Routing

_OUTSIDE_BACKWARD: Final = -1  # somebody looks at a saved tensor


class _AllBackError(BaseException):
    """The rerun has brought back the last tensor; no module's `except Exception` may take it."""


@dataclass(slots=True)
class _Call:
    """One call of a block of the group."""

    region: str
    module: nn.Module
    inner: Callable[..., Any]
    arguments: Arguments
    count: int  # of positional arguments
    autocast: Autocast
    world: World
    routing: Routing | None
    random: RandomState | None
    slots: int = 0  # of the frame, behind this call


class _Holder:
    """What autograd holds for a tensor that was thrown away."""

    __slots__ = ("__weakref__", "back", "frame", "index")

    def __init__(self, frame: "_Frame", index: int) -> None:
        self.frame = frame
        self.index = index
        self.back: dict[int, tuple[Tensor, int]] = {}  # by number of the backward that needs it, with its version


@dataclass(slots=True)
class _Slot:
    holder: "weakref.ref[_Holder]"
    shape: torch.Size
    dtype: torch.dtype


@dataclass(slots=True, weakref_slot=True)
class _Frame:
    """One forward of a group."""

    executor: Executor
    owner: object  # what the group ran in: another group's forward or rerun, or nothing
    calls: list[_Call] = field(default_factory=list[_Call])
    slots: list[_Slot] = field(default_factory=list[_Slot])
    made: "dict[int, tuple[weakref.ref[Tensor], int, Link]]" = field(default_factory=dict[int, Any])
    needed: dict[Link, int] = field(default_factory=dict[Link, int])  # number of the last call that is given it
    last: int = -1  # block that ran last, by its place in the group
    done: set[int] = field(default_factory=set[int])
    lock: Any = field(default_factory=threading.RLock)

    # -- forward: `Around` of what runs inside ---------------------------------------------------------------------

    def pack(self, tensor: Tensor) -> _Holder | Kept:
        if is_weight(tensor):
            return Kept.of(tensor.detach(), None)
        holder = _Holder(self, len(self.slots))
        self.slots.append(_Slot(weakref.ref(holder), tensor.shape, tensor.dtype))
        return holder

    def unpack(self, packed: _Holder | Kept) -> Tensor:
        if isinstance(packed, Kept):
            return check_version(packed.packed, packed.version)
        task = torch._C._current_graph_task_id()
        with self.lock:  # backward has a thread for each device
            if task == _OUTSIDE_BACKWARD or (task in self.done and task not in packed.back):
                self._rerun(task, packed)
            elif task not in self.done:
                self._rerun(task, None)
                self.done.add(task)
            tensor, version = packed.back.pop(task)
        return check_version(tensor, version)

    def note(self, value: Any, hooks: Hooks | None) -> Any:
        """`value` without its tensors: each is a link or is kept, by the hooks around the group if there are any."""
        if not isinstance(value, Tensor):
            return mapped(value, lambda item: self.note(item, hooks))
        made = self.made.get(id(value))
        if made is not None and made[0]() is value and version_of(value) == made[1]:
            self.needed[made[2]] = len(self.calls)
            return made[2]
        return Kept.of(value, hooks)

    def ran(self, out: Any) -> None:
        """The call noted last has returned `out`."""
        number = len(self.calls) - 1
        self.calls[number].slots = len(self.slots)
        for leaf, tensor in enumerate(tensors_of(out)):
            self.made[id(tensor)] = (weakref.ref(tensor), version_of(tensor), Link(number, leaf))

    # -- rerun -----------------------------------------------------------------------------------------------------

    def _rerun(self, task: int, only: _Holder | None) -> None:
        rerun = _Rerun(self, task, only)
        present = self.executor.present(call.random for call in self.calls)
        watcher = self.executor.watcher
        if watcher is not None:
            watcher.recomputation(entered=True)
        try:
            with torch.enable_grad():
                rerun.run()
        except _AllBackError:
            pass
        finally:
            if present is not None:
                present.restore()
            if watcher is not None:
                watcher.recomputation(entered=False)
        missing = sum(slot.holder() is not None for slot in self.slots[rerun.next : rerun.end])
        if missing:
            raise _mismatch(self.calls[-1].region, f"{missing} tensors fewer were saved")


class _Rerun:
    """One rerun of a frame: `Around` of what runs inside."""

    def __init__(self, frame: _Frame, task: int, only: _Holder | None) -> None:
        self._frame = frame
        self._task = task
        self._only = only
        self.next = 0  # slot
        live = (index for index in reversed(range(len(frame.slots))) if frame.slots[index].holder() is not None)
        self.end = 1 + (next(live, -1) if only is None else only.index)
        self._region = ""

    def run(self) -> None:
        """Call the blocks again until everything is back."""
        frame = self._frame
        made: dict[Link, Tensor] = {}
        for number, call in enumerate(frame.calls):
            self._region = call.region
            args, kwargs = call.arguments.again((None,) * call.count)
            args, kwargs = self._filled(args, made), self._filled(kwargs, made)
            routed = contextlib.nullcontext() if call.routing is None else call.routing.replayed(call.region)
            with (
                gathered(call.module),
                call.autocast.restored(),
                call.world.restored(call.region),
                routed,
                frame.executor.inside(self),
                saved_tensors_hooks(self.pack, self.unpack),
            ):
                if call.random is not None:
                    call.random.restore()
                out = call.inner(*args, **kwargs)
            if self.next != call.slots:
                raise _mismatch(call.region, f"{self.next} tensors were saved by its end, in forward {call.slots}")
            made.update((Link(number, leaf), tensor) for leaf, tensor in enumerate(tensors_of(out)))
            del args, kwargs, out
            for link in [link for link in made if frame.needed.get(link, -1) <= number]:
                del made[link]

    def _filled(self, value: Any, made: dict[Link, Tensor]) -> Any:
        if isinstance(value, Link):
            return made[value]
        if isinstance(value, Kept):
            return value.again(self._region)
        return mapped(value, lambda item: self._filled(item, made))

    def pack(self, tensor: Tensor) -> Tensor:
        weight, version = is_weight(tensor), version_of(tensor)
        tensor = tensor.detach()  # an op that saves its own output would hold itself for ever
        if weight:
            return tensor
        index, frame = self.next, self._frame
        if index >= self.end:
            raise _AllBackError
        slot = frame.slots[index]
        if (slot.shape, slot.dtype) != (tensor.shape, tensor.dtype):
            raise _mismatch(
                self._region,
                f"a saved tensor has shape {tuple(tensor.shape)} and {tensor.dtype}, "
                f"in forward {tuple(slot.shape)} and {slot.dtype}",
            )
        self.next += 1
        holder = slot.holder()
        if holder is not None and (self._only is None or self._only is holder):
            holder.back[self._task] = tensor, version
        if self.next == self.end:
            raise _AllBackError
        return tensor

    def unpack(self, packed: Tensor) -> Tensor:
        return packed


class Group:
    """One group of an applied plan. Holds no tensors.

    Args:
        count: Number of its blocks.
        executor: Of the plan.
    """

    def __init__(self, count: int, executor: Executor) -> None:
        self._count = count
        self._executor = executor
        self._open: dict[int, weakref.ref[_Frame]] = {}  # by thread: the forward that is under way
        self._known: dict[int, Known] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}}  # of threads, and weak references cannot be pickled

    def member(
        self, region: str, place: int, module: nn.Module, inner: Callable[..., Any], /, *args: Any, **kwargs: Any
    ) -> Any:
        """Call `inner`, the block at `place` of the group, keeping nothing that the group can bring back.

        Raises:
            RecomputeMismatchError: in backward, when the blocks cannot be run again as they ran.
            UnsupportedModelError: a cache that cannot be copied is among the arguments.
        """
        if not builds_graph(module, args, kwargs):
            return inner(*args, **kwargs)
        executor = self._executor
        frame = self._frame(place)
        known = self._known.get(place)
        if known is None:
            known = self._known[place] = Known(module)
        top: Any = torch._C._autograd._top_saved_tensors_default_hooks  # pyright: ignore[reportAttributeAccessIssue]
        hooks: Hooks | None = top(True)
        before = executor.random_now()
        call = _Call(
            region,
            module,
            inner,
            Arguments(region, frame.note(args, hooks), frame.note(kwargs, hooks)),
            len(args),
            Autocast(),
            World(module, executor.captured, known),
            Routing() if known.routes else None,
            before,
        )
        frame.calls.append(call)
        with (
            contextlib.nullcontext() if call.routing is None else call.routing.recorded(),
            executor.inside(frame),
            saved_tensors_hooks(frame.pack, frame.unpack),
        ):
            out = inner(*args, **kwargs)
        if before is None or before.same_as(executor.random_now()):
            call.random = None
        call.world.settle()
        frame.ran(out)
        return out

    def _frame(self, place: int) -> _Frame:
        """The forward that the block at `place` belongs to: the one under way, or a new one."""
        thread, owner = threading.get_ident(), self._executor.around()
        reference = self._open.get(thread)
        frame = None if reference is None else reference()
        if frame is None or frame.last >= place or frame.owner is not owner:
            frame = _Frame(self._executor, owner)
            self._open[thread] = weakref.ref(frame)
        frame.last = place
        if place == self._count - 1:
            del self._open[thread]
        return frame


def _mismatch(region: str, what: str) -> RecomputeMismatchError:
    return RecomputeMismatchError(f"{region}: run again with its group it did something else: {what}")
