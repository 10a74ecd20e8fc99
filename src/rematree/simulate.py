"""The referee: what a set of decisions costs, found by letting the executor run them on fake tensors.

There is no second model of memory that could drift from the first. The twin runs a whole training step (forward,
backward, optimizer) with the decisions applied by the same code that will run the real step, under an allocation
ledger; the result is the timeline, the peak with what was live at it, and the priced seconds.
"""

import contextlib
import functools
from collections.abc import Generator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch.utils._pytree import tree_leaves

from rematree.accounts import BACKWARD, BATCH, GRADIENTS, LOGITS, SAVED, STATE, STEP, weights
from rematree.cost import Cost
from rematree.devices import overhead_of
from rematree.execute.handle import Handle
from rematree.execute.override import ForwardOverride
from rematree.fingerprint import describe_model
from rematree.ledger import Ledger, Segment
from rematree.observe import Twin
from rematree.optimizers import Optimizer, optimizer_with_state
from rematree.plans import Decision, Plan

_HEAD: Final = "head"
_OPTIMIZER: Final = "optimizer"


@dataclass(frozen=True)
class Simulation:
    """One simulated step.

    Attributes:
        peak_bytes: Largest live sum; what the allocator would hand out at once.
        seconds: Sum of the prices of all ops.
        at_peak: Bytes by category at the peak; the sum is `peak_bytes`.
        segments: The timeline, by what was running.
        slack_bytes: What the segments of a GPU's caching allocator hold beyond the peak; 0 on a CPU.
        misread: Regions whose placeholder was read outside a recomputation: their output must be stashed.
        written: Saved regions whose output the recomputed region around them writes to: they cannot be saved alone.
        graph: For each block, whether its input and its output require grad.
    """

    peak_bytes: int
    seconds: float
    at_peak: Mapping[str, int]
    segments: tuple[Segment, ...]
    misread: frozenset[str]
    written: frozenset[str]
    graph: tuple[tuple[bool, bool], ...]
    slack_bytes: int = 0

    def segment(self, label: str) -> Segment | None:
        """The segment called `label`, if the step had one."""
        return next((s for s in self.segments if s.label == label), None)

    def forward(self, block: int) -> Segment:
        """Forward of block number `block`."""
        segment = self.segment(f"forward {block}")
        assert segment is not None
        return segment

    def backward(self, block: int) -> Segment | None:
        """Backward of block number `block`; None when it builds no graph."""
        return self.segment(f"backward {block}")

    @property
    def head(self) -> Segment:
        """Everything between the last block's forward and its backward."""
        segment = self.segment(_HEAD)
        assert segment is not None
        return segment


@dataclass
class Referee:
    """Runs decisions on a twin.

    Args:
        twin: Model and batch under fake tensors.
        blocks: Module paths of the blocks that run, in order.
        cost: Prices ops.
        optimizer: What holds state and runs after backward.
        accumulate: Gradients of an earlier micro-batch are live when the step begins.
    """

    twin: Twin
    blocks: tuple[str, ...]
    cost: Cost
    optimizer: Optimizer = "adamw"
    accumulate: bool = False
    _stepper: torch.optim.Optimizer | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        self.trainable = [p for p in self.twin.model.parameters() if p.requires_grad]
        if self.trainable:
            with self.twin.mode:
                pages = overhead_of(self.cost, self.twin.device.type).caches
                self._stepper = optimizer_with_state(self.optimizer, self.trainable, pages=pages)

    def draft(self, decisions: Mapping[str, Decision], rows: int | None) -> Plan:
        """A plan without prediction, so that the executor can run it."""
        mark = describe_model(self.twin.model)
        return Plan(decisions, rows, None, 0, 0.0, (), (), mark)

    def run(self, decisions: Mapping[str, Decision], rows: int | None) -> Simulation:
        """Simulate one step under `decisions`, with `rows` of logits at a time (None: the model's own loss)."""
        ledger = Ledger(self.cost, self.twin.device.type)
        marks = _BlockMarks(ledger, len(self.blocks))
        handle = Handle(self.draft(decisions, rows), self.twin.model, watcher=ledger, check_loss=False)
        overrides: list[ForwardOverride] = []
        try:
            for index, path in enumerate(self.blocks):
                module = self.twin.model.get_submodule(path)
                overrides.append(ForwardOverride(module, marks.around(index)))
            with self.twin.mode, self._gradients_known(ledger):
                self._adopt(ledger)
                with ledger:
                    self._step(ledger)
        finally:
            for override in reversed(overrides):
                override.remove()
            handle.remove()
            for parameter in self.trainable:
                parameter.grad = None
        ledger.mark("end")
        return Simulation(
            ledger.peak_bytes,
            ledger.seconds,
            {name: size for name, size in ledger.at_peak.items() if size},
            tuple(ledger.segments),
            frozenset(ledger.misread),
            frozenset(ledger.written_regions),
            marks.graph(),
            ledger.slack_bytes,
        )

    def _adopt(self, ledger: Ledger) -> None:
        for tensor, line in weights(self.twin.model):
            ledger.adopt([tensor], line)
        ledger.adopt((t for t in tree_leaves(self.twin.batch) if isinstance(t, torch.Tensor)), BATCH)
        if self._stepper is not None:
            state = (t for entry in self._stepper.state.values() for t in entry.values())
            ledger.adopt((t for t in state if isinstance(t, torch.Tensor)), STATE)
        if self.accumulate:
            for parameter in self.trainable:
                parameter.grad = torch.zeros_like(parameter)
                ledger.adopt([parameter.grad], GRADIENTS)

    def _step(self, ledger: Ledger) -> None:
        ledger.category = SAVED
        ledger.mark("embedding")
        loss = self.twin.loss()
        if loss.requires_grad:
            loss.backward()
        del loss
        ledger.category = STEP
        ledger.mark(_OPTIMIZER)
        if self._stepper is not None and self.optimizer != "none":
            self._stepper.step()

    @contextlib.contextmanager
    def _gradients_known(self, ledger: Ledger) -> Generator[None]:
        def moved(parameter: torch.Tensor) -> None:
            if parameter.grad is not None:
                ledger.move(parameter.grad, GRADIENTS)

        hooks = [p.register_post_accumulate_grad_hook(moved) for p in self.trainable]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


class _BlockMarks:
    """Marks on the ledger's timeline where blocks begin and end."""

    def __init__(self, ledger: Ledger, num_blocks: int) -> None:
        self._ledger = ledger
        self._graph: list[tuple[bool, bool]] = [(False, False)] * num_blocks

    def graph(self) -> tuple[tuple[bool, bool], ...]:
        return tuple(self._graph)

    def around(self, index: int) -> Any:
        def run(inner: Any, *args: Any, **kwargs: Any) -> Any:
            ledger = self._ledger
            ledger.mark(f"forward {index}")
            takes = any(isinstance(t, torch.Tensor) and t.requires_grad for t in tree_leaves((args, kwargs)))
            out = inner(*args, **kwargs)
            tensors = [t for t in tree_leaves(out) if isinstance(t, torch.Tensor) and t.requires_grad]
            self._graph[index] = (takes, bool(tensors))
            if tensors:
                tensors[0].register_hook(functools.partial(_mark, ledger, f"backward {index}"))
            if index == len(self._graph) - 1:
                ledger.mark(_HEAD)
                ledger.category = LOGITS
            return out

        return run


def _mark(ledger: Ledger, label: str, _: torch.Tensor) -> None:
    ledger.mark(label)
    ledger.category = BACKWARD  # what came before was the head's
