"""Recompute a region, except for the regions inside it that are saved.

The idea: a recomputed region runs under `torch.utils.checkpoint`, whose hooks throw its saved tensors away. A saved
region inside it runs under hooks of its own, which shadow the checkpoint's, so its saved tensors stay. When
backward reruns the outer region, the saved one is not run: its output is handed back from the stash, or, if nobody
reads the values, a placeholder of the right shape stands in.

Design rules R2 to R6. Source of the checkpoint's contract: `torch.utils.checkpoint` (non-reentrant): tensors packed in
the rerun are matched to those of the forward by order, and the rerun stops when the last one is refilled.
"""

import contextlib
import functools
import threading
import weakref
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import TreeSpec, tree_flatten, tree_structure, tree_unflatten
from torch.utils.checkpoint import checkpoint

from rematree.errors import RecomputeMismatchError
from rematree.execute.arguments import Arguments
from rematree.execute.context import Captured, Known, World, builds_graph
from rematree.execute.dropout import draw, draw_bits, mask_can_be_kept, pack, scale, unpack
from rematree.execute.random_state import RandomState
from rematree.execute.routing import Routing
from rematree.execute.stash import Around, Leaf, Watcher, hooks_within

_ONE: Final = tree_structure(0)


@dataclass(slots=True)
class _Call:
    """One call of a saved region during the forward of the recomputed region around it."""

    region: str
    leaves: list[Any]
    spec: TreeSpec
    random_after: RandomState | None


@dataclass(slots=True)
class _Frame:
    """One forward of a recomputed region: what its reruns need.

    Random state is kept only where a rerun draws: a state noted at the start, or behind a skipped region that drew, is
    forgotten again if nothing was drawn until the next such point.
    """

    region: str
    world: World
    arguments: Arguments
    routing: Routing | None
    random_before: RandomState | None
    around: Around | None = None
    calls: list[_Call] = field(default_factory=list[_Call])
    noted: RandomState | None = None  # the state at the last such point
    noted_by: _Call | None = None  # the skipped call it is behind; None is the frame's start

    def __post_init__(self) -> None:
        self.noted = self.random_before

    def reached(self, now: RandomState | None) -> None:
        """A skipped region, or the end, is reached with the generators in state `now`."""
        if self.noted is not None and self.noted.same_as(now):
            if self.noted_by is None:
                self.random_before = None
            else:
                self.noted_by.random_after = None

    def skipped(self, call: _Call, before: RandomState | None, after: RandomState | None) -> None:
        """A region that the rerun skips has run."""
        self.calls.append(call)
        if before is None or before.same_as(after):
            return  # it drew nothing; the point noted before it still counts
        self.reached(before)
        call.random_after = after
        self.noted, self.noted_by = after, call

    def finish(self, now: RandomState | None) -> Iterator[str]:
        """The forward is over. Yields saved regions whose output the rest of it has written to."""
        self.reached(now)
        self.noted = None
        inside = f"{self.region}." if self.region else ""
        self.world.settle({call.region.removeprefix(inside) for call in self.calls})
        for call in self.calls:
            for leaf in call.leaves:
                if isinstance(leaf, Leaf) and leaf.counter is not None:
                    leaf.written = leaf.counter._version != leaf.version
                    leaf.counter = None
                    if leaf.written:
                        yield call.region

    def states(self) -> Iterator[RandomState | None]:
        """What a rerun sets the generators to; None: not at that point."""
        yield self.random_before
        yield from (call.random_after for call in self.calls)


@dataclass(slots=True)
class _Rerun:
    """One rerun of a frame's region."""

    frame: _Frame
    cursor: int = 0  # index of the next saved call


class _EachRerun:
    """`open()` anew each time it is entered: torch asks for one context, and enters it in every backward of a graph."""

    def __init__(self, open: Callable[[], contextlib.AbstractContextManager[None]]) -> None:
        self._open = open
        self._entered: list[contextlib.AbstractContextManager[None]] = []

    def __enter__(self) -> None:
        context = self._open()
        context.__enter__()
        self._entered.append(context)

    def __exit__(self, *error: Any) -> bool | None:
        return self._entered.pop().__exit__(*error)


class _Plain:
    """Inside a saved region: nothing there is run again, so nothing is noted."""


class Executor:
    """Runs the decisions of one applied plan. Holds no tensors between steps.

    Backward runs in threads of its own, and a model may be run in several: what is going on is kept by thread.

    Attributes:
        captured: What a recomputation finds as it was.
        watcher: Told about placeholders and recomputations.
        keeps_outputs: Keep what saved regions return, whatever was decided: somebody may read it that nobody knew of.
            None: nobody has asked, because the forward of the whole model was not called.
        may_be_read: Asks.
        looks_at_host: Reruns find Python's and NumPy's generators as the forward did, too.
    """

    def __init__(self, watcher: Watcher | None = None) -> None:
        self.captured: list[Captured] = []
        self._running: dict[int, list[_Frame | _Rerun | _Plain | Around]] = {}
        self._known: dict[str, Known] = {}
        self._latest: dict[int, weakref.ref[RandomState]] = {}
        self.watcher = watcher
        self.keeps_outputs: bool | None = None
        self.may_be_read: Callable[[], bool] | None = None
        self.looks_at_host = watcher is None

    def __getstate__(self) -> dict[str, Any]:
        # What goes on in threads is no part of a copy, and weak references cannot be pickled.
        return {**self.__dict__, "_running": {}, "_latest": {}}

    def random_now(self) -> RandomState | None:
        """State of the generators; the same object as last time in this thread, if nothing was drawn since."""
        now = RandomState.now(self.watcher, host=self.looks_at_host)
        thread = threading.get_ident()
        latest = self._latest.get(thread)
        before = None if latest is None else latest()
        if now is None or (before is not None and before.same_as(now)):
            return None if now is None else before
        self._latest[thread] = weakref.ref(now)
        return now

    def present(self, then: Iterable[RandomState | None]) -> RandomState | None:
        """State of the generators to come back to from a rerun that sets them to states of `then`; None: to none."""
        states = [state for state in then if state is not None]
        if any(state.has_host for state in states):  # whatever is looked at by now
            return RandomState.now(self.watcher, host=True)
        return self.random_now() if states else None

    @contextlib.contextmanager
    def inside(self, what: _Frame | _Rerun | _Plain | Around) -> Generator[None]:
        """`what` is the innermost thing that runs in this thread."""
        thread = threading.get_ident()
        running = self._running.setdefault(thread, [])
        running.append(what)
        try:
            yield
        finally:
            running.pop()
            if not running:
                del self._running[thread]

    def around(self) -> Around | None:
        """The group whose block runs in this thread, unless a recomputed region inside does."""
        innermost = self._innermost()
        return None if isinstance(innermost, _Frame | _Rerun | _Plain) else innermost

    def _innermost(self) -> _Frame | _Rerun | _Plain | Around | None:
        running = self._running.get(threading.get_ident())
        return running[-1] if running else None

    def recompute(self, region: str, module: nn.Module, inner: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        """Call `inner`, keeping only its inputs, what inner Save regions keep, and the means to rerun it."""
        if not builds_graph(module, args, kwargs):  # R6, R7
            return inner(*args, **kwargs)
        known = self._known.get(region)
        if known is None:
            known = self._known[region] = Known(module)
        frame = _Frame(
            region,
            World(module, self.captured, known),
            Arguments(region, args, kwargs),
            Routing() if known.routes else None,
            self.random_now(),
            self.around(),
        )

        first = [kwargs]  # not held by the graph: a cache among them would hold the graph, for ever

        def body(*args: Any) -> Any:
            innermost = self._innermost()
            if isinstance(innermost, _Rerun) and innermost.frame is frame:
                args, kwargs = frame.arguments.again(args)
                with contextlib.nullcontext() if frame.routing is None else frame.routing.replayed(region):
                    return inner(*args, **kwargs)
            with self.inside(frame), contextlib.nullcontext() if frame.routing is None else frame.routing.recorded():
                return inner(*args, **first.pop())

        out = checkpoint(
            body,
            *args,
            use_reentrant=False,
            preserve_rng_state=False,  # R4: the frame restores it, and only where something was drawn
            context_fn=lambda: (contextlib.nullcontext(), _EachRerun(functools.partial(self._rerun, frame))),
        )
        for written in frame.finish(self.random_now()):
            if self.watcher is not None:
                self.watcher.written(written)
        return out

    @contextlib.contextmanager
    def _rerun(self, frame: _Frame) -> Generator[None]:
        present = self.present(frame.states())
        if self.watcher is not None:
            self.watcher.recomputation(entered=True)
        try:
            with frame.world.restored(frame.region), self.inside(_Rerun(frame)):
                if frame.random_before is not None:
                    frame.random_before.restore()
                yield
        finally:
            if present is not None:
                present.restore()
            if self.watcher is not None:
                self.watcher.recomputation(entered=False)

    def save(self, region: str, stash: bool, inner: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        """Call `inner` so that the recomputation around it need not run it again. Plain when there is none."""
        around = self._innermost()
        if isinstance(around, _Rerun):
            return self._replay(region, around)
        if not isinstance(around, _Frame):
            return inner(*args, **kwargs)
        before = self.random_now()
        unrouted = contextlib.nullcontext() if around.routing is None else around.routing.paused()
        with saved_tensors_hooks(*hooks_within(around.around)), self.inside(_Plain()), unrouted:
            out = inner(*args, **kwargs)
        after = self.random_now()
        leaves, spec = tree_flatten(out)
        keeps = self.keeps_outputs
        if keeps is None and self.may_be_read is not None:
            keeps = self.may_be_read()
        stash = stash or bool(keeps)
        kept = [Leaf.of(leaf, stash, around.around) if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
        around.skipped(_Call(region, kept, spec, None), before, after)
        return out

    def keep_mask(self, region: str, module: nn.Module, inner: Callable[..., Any], x: torch.Tensor) -> torch.Tensor:
        """Dropout whose mask the recomputation around it does not draw again: it is kept at one bit an element."""
        around = self._innermost()
        p: float = module.p  # pyright: ignore[reportAssignmentType]
        if isinstance(around, _Rerun):
            # What the forward did decides, not x: here it may be a placeholder, which has another layout.
            (bits,) = self._next_call(region, around).leaves
            if bits is None:
                return inner(x)
            if around.frame.around is not None:
                bits = around.frame.around.unpack(bits)
            return x * unpack(bits, x.shape, x.dtype, p)
        if not isinstance(around, _Frame):
            return inner(x)
        if not mask_can_be_kept(module, x):
            around.calls.append(_Call(region, [None], _ONE, None))  # drawn again; the module may be called once more
            return inner(x)
        before = self.random_now()
        drawn = draw(x, p)
        bits = pack(drawn) if around.around is None else around.around.pack(pack(drawn))
        around.skipped(_Call(region, [bits], _ONE, None), before, self.random_now())
        return scale(x, drawn, p)

    def keep_bits(self, region: str, like: torch.Tensor, p: float) -> tuple[torch.Tensor, torch.Tensor]:
        """`draw_bits` whose bits the recomputation around it does not draw again."""
        around = self._innermost()
        if isinstance(around, _Rerun):
            (bits,) = self._next_call(region, around).leaves
            if around.frame.around is not None:
                bits = around.frame.around.unpack(bits)
            return bits, unpack(bits, like.shape, like.dtype, p)
        before = self.random_now()
        bits, mask = draw_bits(like, p)
        if isinstance(around, _Frame):
            kept = bits if around.around is None else around.around.pack(bits)
            around.skipped(_Call(region, [kept], _ONE, None), before, self.random_now())
        return bits, mask

    def _replay(self, region: str, rerun: _Rerun) -> Any:
        call = self._next_call(region, rerun)
        around = rerun.frame.around
        leaves = [leaf.again(region, around, self.watcher) if isinstance(leaf, Leaf) else leaf for leaf in call.leaves]
        return tree_unflatten(leaves, call.spec)

    def _next_call(self, region: str, rerun: _Rerun) -> _Call:
        calls = rerun.frame.calls
        call = calls[rerun.cursor] if rerun.cursor < len(calls) else None
        if call is None or call.region != region:
            raise RecomputeMismatchError(
                f"the recomputation calls {region}, the forward called "
                f"{'nothing more' if call is None else call.region} at this point; "
                "the model's control flow changed between forward and backward"
            )
        rerun.cursor += 1
        if call.random_after is not None:
            call.random_after.restore()
        return call
