"""ZeRO-3's all-gathers in a simulated step: which weights a rank holds whole, from when to when.

This does on fake tensors what DeepSpeed 0.19.8 does on real ones (`deepspeed/runtime/zero`: `parameter_offload.py`,
`partitioned_param_coordinator.py`, `partition_parameters.py`), at the same moments, so that what is held is what the
step shows. Between steps a rank has a part of every weight. A module's own weights are

* gathered before its forward, and before its backward, if they are not whole then;
* let go of after either, unless they are small (`persistence_threshold`: they stay until the optimizer's step, and are
  gathered again after it), another module that has not come to its end needs them, or they are needed again before
  `max_reuse` elements have been. A trained weight that a recomputation has gathered may so stay for its backward. A
  frozen one stays until the backward is over of the module that the rerun came in. With adapters that is one of the
  last of its block: most are gathered once more for their own backward, whatever `max_reuse` is.

From the second step on DeepSpeed knows in which order modules run, and gathers up to `prefetch` elements ahead, as long
as at most `max_live` are whole. Weights gathered together come in one buffer and are copied out of it when the first
of them is needed; the buffer goes when the last of them has been. A weight that a module reads and that is another's
(PEFT looks at the dtype of `lora_A`) is that module's as well from then on.

What is let go of is freed where autograd keeps no view of it. Of linear layers it keeps none (`linear`).

On a GPU the gathers are another stream's; what that delays is not counted. Nor is a plan that is put on after steps
without it: DeepSpeed remembers by the number of a use what can go behind it, also when modules run in another order.
"""

import collections
import contextlib
from collections.abc import Generator, Iterable, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils._mode_utils import no_dispatch

from rematree.memory.accounts import GATHERED, GATHERING
from rematree.memory.ledger import Ledger
from rematree.memory.recipes import META, Recipes
from rematree.referee.ranks import Stage3
from rematree.referee.zero.weights import Flight, Learned, Uses, Weight

_OUTSIDE_BACKWARD = -1


class Gathering:
    """Weights of one model, gathered and let go of as its modules run.

    Args:
        settings: Of the engine.
        count: Of ranks.
        staged: Collectives work in copies, as gloo's do.
        model: Fake. Its parameters are parts from `begin` to `end`.
        recipes: Of its fake mode.
        ledger: Of the step.
        learned: What an earlier step has shown; None: this is that step, and nothing is gathered ahead.
    Attributes:
        gathers: All-gathers so far.
        learned: What this step has shown.
        weights: By identity of the parameter.
    """

    def __init__(
        self,
        settings: Stage3,
        count: int,
        staged: bool,
        model: nn.Module,
        recipes: Recipes,
        ledger: Ledger,
        learned: Learned | None,
    ) -> None:
        self._settings, self._count, self._staged = settings, count, staged
        self._recipes, self._ledger = recipes, ledger
        self.gathers = 0
        self.learned = Learned(borrowed={} if learned is None else learned.borrowed)
        self.weights: dict[int, Weight] = {}
        for parameter in model.parameters():
            size = parameter.numel()
            persists = size <= settings.persistence_threshold
            self.weights[id(parameter)] = Weight(
                parameter, len(self.weights), parameter.data, size, -(-size // count), persists
            )
        self._uses = None if learned is None else Uses([self._of(module) for module in learned.order])
        self._backward: dict[nn.Module, None] = {}  # modules whose backward has begun, in order
        self._recomputed: dict[nn.Module, set[Weight]] = {}  # frozen weights, by the module whose backward needs them
        self._queue: collections.deque[tuple[Weight, int]] = collections.deque()
        self._latest: dict[Weight, int] = {}  # last step that each weight has been gathered for
        self._step = self._whole = 0

    # -- the step ---------------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """Make parts of all weights; what stays whole is whole, if a step came before."""
        for weight in self.weights.values():
            weight.parameter.ds_shape = weight.whole.shape  # pyright: ignore[reportAttributeAccessIssue]  # which shows the executor why it moves
            self._set(weight, self._blank(weight.whole, 0), (0,))
            if self._uses is not None and weight.persists:
                self._bring_alone(weight, GATHERED)
        self.gathers = 0

    def end(self) -> None:
        """Leave the model as it was."""
        for weight in self.weights.values():
            weight.users.clear()
            weight.flight = None
            weight.parameter.data = weight.whole
            del weight.parameter.ds_shape  # pyright: ignore[reportAttributeAccessIssue]

    @contextlib.contextmanager
    def whole(self, parameter: torch.Tensor) -> Generator[None]:
        """`parameter` whole inside; gathered for that alone if it is not."""
        weight = self.weights.get(id(parameter))
        if weight is None or weight.here or weight.flight is not None:
            yield
            return
        self._bring_alone(weight, GATHERED)
        yield
        self._set(weight, self._blank(weight.whole, 0), (0,))
        weight.here = False

    def backward_is_over(self) -> None:
        """Let go of what modules hold that were given nothing by position: no gradient says that they are done."""
        for module in self._backward:
            for weight in {*self._of(module), *self._recomputed.pop(module, ())}:
                weight.users.discard(module)
                if not weight.persists:
                    self._let_go(weight)
        self._backward.clear()

    def release_all(self) -> None:
        """The optimizer steps: no weight is whole."""
        for weight in self.weights.values():
            if weight.flight is not None:
                self._wait(weight)
            weight.users.clear()
            self._let_go(weight)

    def gather_persistent(self) -> None:
        """The optimizer has stepped: gather what is gathered once a step, weight by weight, each in one piece."""
        for weight in self.weights.values():
            if weight.persists:
                self._bring_alone(weight, GATHERED)

    # -- at every module --------------------------------------------------------------------------------------------

    @torch.no_grad()
    def begins(self, module: nn.Module, forward: bool) -> None:
        """Forward or backward of `module` begins: gather what it needs, and what comes next."""
        if self._uses is None:
            self.learned.order.append(module)
        if not forward:
            self._backward.setdefault(module)
        self._fetch(module, forward)

    @torch.no_grad()
    def ended(self, module: nn.Module, forward: bool) -> None:
        """Forward or backward of `module` is over: let go of what is not needed soon."""
        mine = self._of(module)
        leaving = {weight for weight in mine if self._uses is None or not self._stays(weight)}
        if not forward:
            recomputed = self._recomputed.pop(module, set[Weight]())
            leaving |= {weight for weight in recomputed if not weight.persists}
            mine += [weight for weight in recomputed if weight not in mine]
            self._backward.pop(module, None)
        for weight in mine:
            weight.users.discard(module)
            if weight in leaving:
                self._let_go(weight)

    def restart(self) -> None:
        """The forward of the model begins."""
        for weight in self.weights.values():
            if weight.flight is not None:
                self._wait(weight)
                self._let_go(weight)
        self._queue = collections.deque(self._uses.queue if self._uses is not None else ())
        self._latest.clear()
        self._step = self._whole = 0

    def borrow(self, module: nn.Module, parameter: Any) -> None:
        """`module` looks at what may be a weight of another one: gather it, and take it as the module's as well."""
        weight = self.weights.get(id(parameter))
        if weight is not None and not weight.here and weight.flight is None:
            self.learned.borrowed.setdefault(module, []).append(id(parameter))
            self._bring_alone(weight, GATHERED)

    def _of(self, module: nn.Module) -> list[Weight]:
        """Weights that `module` uses, its own and borrowed ones."""
        own = [id(p) for p in module._parameters.values() if p is not None]
        keys = dict.fromkeys([*own, *self.learned.borrowed.get(module, ())])
        return sorted((self.weights[key] for key in keys), key=lambda weight: weight.number)

    # -- gathering --------------------------------------------------------------------------------------------------

    def _fetch(self, module: nn.Module, forward: bool) -> None:
        wanted = self._of(module)
        self._gather(wanted)
        again = forward and torch._C._current_graph_task_id() != _OUTSIDE_BACKWARD
        for weight in wanted:
            weight.users.add(module)
            if again and self._backward and not weight.parameter.requires_grad:
                latest = next(reversed(self._backward))
                self._recomputed.setdefault(latest, set()).add(weight)
                weight.users.add(latest)
            if weight.flight is not None:
                self._wait(weight)
        if self._uses is not None:
            self._gather_ahead(wanted)
        self._step += 1

    def _gather_ahead(self, wanted: Sequence[Weight]) -> None:
        known = sum(self._latest.get(weight, -1) < self._step for weight in wanted)
        for _ in range(min(known, len(self._queue))):
            weight, step = self._queue.popleft()
            self._latest[weight] = step
        most = min(self._settings.max_live - self._whole, self._settings.prefetch)
        ahead: dict[Weight, None] = {}
        elements = 0
        while self._queue and elements < most:
            weight, step = self._queue.popleft()
            self._latest[weight] = max(step, self._latest.get(weight, -1))
            if not weight.here and weight.flight is None and weight not in ahead:
                ahead[weight] = None
                elements += weight.elements
        self._gather(ahead)

    def _gather(self, weights: Iterable[Weight]) -> None:
        """Begin to gather those of `weights` that are neither whole nor on their way."""
        absent = sorted((w for w in weights if not w.here and w.flight is None), key=lambda weight: weight.number)
        if not absent:
            return
        self._whole += sum(weight.elements for weight in absent)
        flight = Flight(absent, [])
        if len(absent) == 1:
            self._bring_alone(absent[0], GATHERED)
            absent[0].here = False
        else:
            by_dtype: dict[torch.dtype, list[Weight]] = {}
            for weight in absent:
                by_dtype.setdefault(weight.parameter.dtype, []).append(weight)
            for together in by_dtype.values():
                buffer = self._blank(together[0].whole, sum(weight.part for weight in together) * self._count)
                self._collect(buffer, GATHERING)
                flight.buffers.append(buffer)
        for weight in absent:
            weight.flight = flight

    def _bring_alone(self, weight: Weight, line: str) -> None:
        """Gather `weight` into memory of its own, in which it stays."""
        buffer = self._blank(weight.whole, weight.part * self._count)
        self._collect(buffer, line)
        self._set(weight, buffer, weight.whole.shape)
        weight.here = True

    def _collect(self, buffer: torch.Tensor, line: str) -> None:
        self.gathers += 1
        self._ledger.adopt([buffer], line)
        if self._staged:
            self._ledger.ran(0.0, buffer.nbytes, GATHERING)

    def _wait(self, weight: Weight) -> None:
        flight, weight.flight = weight.flight, None
        assert flight is not None
        if flight.landed:
            return
        for each in flight.weights:
            if flight.buffers:
                copied = self._blank(each.whole, each.elements)
                self._ledger.adopt([copied], GATHERED)
                self._set(each, copied, each.whole.shape)
            each.here = True
        flight.landed = True

    def _stays(self, weight: Weight) -> bool:
        assert self._uses is not None
        if weight.persists or self._latest.get(weight, -1) > self._step:
            return True
        return self._uses.soon(weight, self._step, self._settings.max_reuse)

    def _let_go(self, weight: Weight) -> None:
        if weight.here and not weight.users:
            self._set(weight, self._blank(weight.whole, 0), (0,))
            weight.here = False
            self._whole -= weight.elements

    def _blank(self, like: torch.Tensor, elements: int) -> torch.Tensor:
        with no_dispatch():
            bare = torch.empty(elements, dtype=like.dtype, device=META)
        return self._recipes.wrap(bare, like.fake_device)  # pyright: ignore[reportAttributeAccessIssue, reportUnknownArgumentType]

    def _set(self, weight: Weight, memory: torch.Tensor, shape: Sequence[int]) -> None:
        """Make the data of `weight` the front of `memory`."""
        with no_dispatch():
            bare = torch.empty(0, dtype=memory.dtype, device=META)
            front = torch.empty(shape, dtype=memory.dtype, device=META)
            bare.set_(memory.untyped_storage(), 0, front.size(), front.stride())  # pyright: ignore[reportCallIssue, reportArgumentType]
        weight.parameter.data = self._recipes.wrap(bare, memory.fake_device)  # pyright: ignore[reportAttributeAccessIssue, reportUnknownArgumentType]
