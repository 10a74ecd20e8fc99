"""ZeRO-3's all-gathers in a simulated step: which weights a rank holds whole, from when to when.

This does on fake tensors what DeepSpeed 0.19.8 does on real ones (`deepspeed/runtime/zero`: `parameter_offload.py`,
`partitioned_param_coordinator.py`, `partition_parameters.py`), at the same moments, so that what is held is what the
step shows. Between steps a rank has a part of every weight. A module's own weights are

* gathered before its forward, and before its backward, if they are not whole then;
* let go of after either, unless they are small (`persistence_threshold`: they stay until the optimizer's step, and are
  gathered again after it), another module that has not come to its end needs them, or they are needed again before
  `max_reuse` elements have been. A frozen weight that a recomputation has gathered stays until the backward of the
  block that it was recomputed for is over, so that the two share one all-gather.

From the second step on DeepSpeed knows in which order modules run, and gathers up to `prefetch` elements ahead, as long
as at most `max_live` are whole. Weights gathered together come in one buffer and are copied out of it when the first
of them is needed; the buffer goes when the last of them has been. A weight that a module reads and that is another's
(PEFT looks at the dtype of `lora_A`) is that module's as well from then on.

What is let go of is freed where autograd keeps no view of it. Of linear layers it keeps none (`stage3_linear`).

On a GPU the gathers are another stream's; what that delays is not counted.
"""

import collections
import contextlib
import functools
from bisect import bisect_left
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils._mode_utils import no_dispatch

from rematree.memory.accounts import GATHERED, GATHERING
from rematree.memory.ledger import Ledger
from rematree.memory.recipes import META, Recipes
from rematree.referee.ranks import Stage3

_OUTSIDE_BACKWARD = -1


@dataclass(slots=True, eq=False)
class Weight:
    """A parameter of which every rank has a part.

    Attributes:
        parameter: It; its data is what the rank has whole of it, which is nothing between its uses.
        number: Place in the model.
        whole: Its data without an engine.
        elements: Of the whole.
        part: Of a rank's part, padding included.
        persists: It is gathered once a step.
        here: It is whole.
        flight: The all-gather it is waiting for, or has not asked for yet.
        users: Modules that have asked for it and have not let go of it.
    """

    parameter: nn.Parameter
    number: int
    whole: torch.Tensor
    elements: int
    part: int
    persists: bool
    here: bool = False
    flight: "_Flight | None" = None
    users: set[nn.Module] = field(default_factory=set[nn.Module])


@dataclass(slots=True, eq=False)
class _Flight:
    """An all-gather: the weights it brings, and the buffers it brings several in, one of each dtype."""

    weights: list[Weight]
    buffers: list[torch.Tensor]
    landed: bool = False


@dataclass(slots=True)
class Learned:
    """What a first step has shown.

    Attributes:
        order: Modules in the order in which they ask for their weights, in forward and backward.
        borrowed: Weights that modules use and that are other modules', by identity of the parameter.
    """

    order: list[nn.Module] = field(default_factory=list[nn.Module])
    borrowed: dict[nn.Module, list[int]] = field(default_factory=dict[nn.Module, list[int]])


class _Uses:
    """When each weight is used, in a step whose order is known.

    Args:
        order: For every use, in order, the weights of the module.
    """

    def __init__(self, order: Sequence[Sequence[Weight]]) -> None:
        self.queue = [(weight, step) for step, weights in enumerate(order) for weight in weights]
        self._before = [0]  # elements used before each step
        self._steps: dict[Weight, list[int]] = {}
        for step, weights in enumerate(order):
            self._before.append(self._before[-1] + sum(weight.elements for weight in weights))
            for weight in weights:
                self._steps.setdefault(weight, []).append(step)

    def soon(self, weight: Weight, step: int, within: int) -> bool:
        """Whether `weight` is used at `step` or later, before `within` elements have been."""
        steps = self._steps[weight]
        place = bisect_left(steps, step)
        return place < len(steps) and self._before[steps[place]] - self._before[step] < within


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
        self._model, self._recipes, self._ledger = model, recipes, ledger
        self.gathers = 0
        self.learned = Learned(borrowed={} if learned is None else learned.borrowed)
        self.weights: dict[int, Weight] = {}
        for parameter in model.parameters():
            size = parameter.numel()
            persists = size <= settings.persistence_threshold
            self.weights[id(parameter)] = Weight(
                parameter, len(self.weights), parameter.data, size, -(-size // count), persists
            )
        self._uses = None if learned is None else _Uses([self._of(module) for module in learned.order])
        self._undo: list[Callable[[], Any]] = []
        self._running: list[nn.Module] = []  # modules whose forward is on the stack
        self._in_forward = False
        self._backward: dict[nn.Module, None] = {}  # modules whose backward has begun, in order
        self._recomputed: dict[nn.Module, set[Weight]] = {}  # frozen weights, by the module whose backward needs them
        self._inputs: collections.Counter[nn.Module] = collections.Counter()  # whose gradients are still to come
        self._queue: collections.deque[tuple[Weight, int]] = collections.deque()
        self._latest: dict[Weight, int] = {}  # last step that each weight has been gathered for
        self._step = self._whole = 0

    # -- the step ---------------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """Make parts of all weights, and gather at every module; what stays whole is whole, if a step came before."""
        for weight in self.weights.values():
            weight.parameter.ds_shape = weight.whole.shape  # pyright: ignore[reportAttributeAccessIssue]  # which shows the executor why it moves
            self._set(weight, self._blank(weight.whole, 0), (0,))
            if self._uses is not None and weight.persists:
                self._bring_alone(weight, GATHERED)
        self.gathers = 0
        for module in self._model.modules():
            self._undo.append(module.register_forward_pre_hook(self._begins).remove)
            self._undo.append(module.register_forward_hook(self._ended).remove)
            own = module._parameters
            module.__dict__["_parameters"] = _Watched(own, self._read)
            self._undo.append(functools.partial(module.__dict__.__setitem__, "_parameters", own))

    def end(self) -> None:
        """Leave the model as it was."""
        for undo in reversed(self._undo):
            undo()
        self._undo.clear()
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
    def _arrive(self, module: nn.Module, forward: bool) -> None:
        if self._uses is None:
            self.learned.order.append(module)
        self._fetch(module, forward)

    def _begins(self, module: nn.Module, args: Any) -> Any:
        if module is self._model:
            self._restart()
        self._running.append(module)
        self._arrive(module, True)
        self._inputs[module] = 0

        def left(tensor: torch.Tensor) -> torch.Tensor:
            self._inputs[module] += 1
            return _Passing.apply(tensor, functools.partial(self._gradient_left, module))  # pyright: ignore[reportReturnType]

        return _mapped(args, left)

    def _ended(self, module: nn.Module, args: Any, output: Any) -> Any:
        self._running.pop()
        self._release(module, True)
        self._in_forward = self._in_forward and module is not self._model

        def came(tensor: torch.Tensor) -> torch.Tensor:
            return _Passing.apply(tensor, functools.partial(self._gradient_came, module))  # pyright: ignore[reportReturnType]

        return _mapped(output, came)

    def _gradient_came(self, module: nn.Module) -> None:
        """Backward of `module` begins; its outputs may say so one by one."""
        self._backward.setdefault(module)
        self._arrive(module, False)

    def _gradient_left(self, module: nn.Module) -> None:
        self._inputs[module] -= 1
        if not self._inputs[module]:
            self._release(module, False)

    def _restart(self) -> None:
        for weight in self.weights.values():
            if weight.flight is not None:
                self._wait(weight)
                self._let_go(weight)
        self._queue = collections.deque(self._uses.queue if self._uses is not None else ())
        self._latest.clear()
        self._step = self._whole = 0
        self._in_forward = True

    def _read(self, parameter: Any) -> None:
        """A module's weight is looked at; in forward it is gathered, and becomes the running module's as well."""
        weight = self.weights.get(id(parameter))
        if weight is None or weight.here or weight.flight is not None or not self._in_forward:
            return
        self.learned.borrowed.setdefault(self._running[-1], []).append(id(parameter))
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
        flight = _Flight(absent, [])
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

    @torch.no_grad()
    def _release(self, module: nn.Module, forward: bool) -> None:
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


class _Watched(dict[str, Any]):
    """Parameters of a module, which tells of each that it is asked for."""

    def __init__(self, own: dict[str, Any], read: Callable[[Any], None]) -> None:
        super().__init__(own)
        self._tell = read

    def __getitem__(self, name: str) -> Any:
        found = super().__getitem__(name)
        self._tell(found)
        return found


class _Passing(torch.autograd.Function):
    """A tensor handed on, which tells when its gradient comes by."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, then: Callable[[], None]) -> torch.Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.then = then
        return tensor.detach()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.then()
        return gradient, None


def _mapped(value: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """`value` with tensors that require grad changed, in the containers that DeepSpeed looks into; dicts in place."""
    if isinstance(value, torch.Tensor):
        return change(value) if value.requires_grad and torch.is_grad_enabled() else value
    if isinstance(value, tuple | list):
        items = [_mapped(item, change) for item in value]  # pyright: ignore[reportUnknownVariableType]
        kind: Any = type(value)  # pyright: ignore[reportUnknownVariableType]
        return kind(*items) if hasattr(value, "_fields") else kind(items)  # pyright: ignore[reportUnknownArgumentType]
    if isinstance(value, dict):
        for key in list(value):  # pyright: ignore[reportUnknownVariableType, reportUnknownArgumentType]
            value[key] = _mapped(value[key], change)
    return value
