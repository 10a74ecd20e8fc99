"""The referee: what a set of decisions costs, found by letting the executor run them on fake tensors.

There is no second model of memory that could drift from the first. The twin runs a whole training step (forward,
backward, optimizer) with the decisions applied by the same code that will run the real step, under an allocation
ledger; the result is the timeline, the peak with what was live at it, and the priced seconds.
"""

import contextlib
import functools
from collections.abc import Generator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Literal

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from rematree.cost import Cost
from rematree.execute.handle import Handle
from rematree.execute.override import ForwardOverride
from rematree.fingerprint import describe_model
from rematree.ledger import Ledger, Segment
from rematree.observe import Twin
from rematree.plans import Decision, Plan
from rematree.quantised import hidden_tensors

Optimizer = Literal["adamw", "sgd", "none"]
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
                self._stepper = _optimizer_with_state(self.optimizer, self.trainable)

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
        )

    def _adopt(self, ledger: Ledger) -> None:
        model = self.twin.model
        ledger.adopt((p for p in model.parameters() if not p.requires_grad), "weights (frozen)")
        ledger.adopt(self.trainable, "weights (trained)")
        ledger.adopt(model.buffers(), "weights (frozen)")
        ledger.adopt(hidden_tensors(model), "weights (frozen)")
        ledger.adopt((t for t in tree_leaves(self.twin.batch) if isinstance(t, torch.Tensor)), "batch")
        if self._stepper is not None:
            state = (t for entry in self._stepper.state.values() for t in entry.values())
            ledger.adopt((t for t in state if isinstance(t, torch.Tensor)), "optimizer state")
        if self.accumulate:
            for parameter in self.trainable:
                parameter.grad = torch.zeros_like(parameter)
                ledger.adopt([parameter.grad], "gradients")

    def _step(self, ledger: Ledger) -> None:
        ledger.category = "saved by forward"
        ledger.mark("embedding")
        loss = self.twin.loss()
        ledger.category = "backward and recomputation"
        if loss.requires_grad:
            loss.backward()
        del loss
        ledger.category = "optimizer step"
        ledger.mark(_OPTIMIZER)
        if self._stepper is not None and self.optimizer != "none":
            self._stepper.step()

    @contextlib.contextmanager
    def _gradients_known(self, ledger: Ledger) -> Generator[None]:
        def moved(parameter: torch.Tensor) -> None:
            if parameter.grad is not None:
                ledger.move(parameter.grad, "gradients")

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
            return out

        return run


def _mark(ledger: Ledger, label: str, _: torch.Tensor) -> None:
    ledger.mark(label)


def make_optimizer(
    kind: Optimizer, parameters: list[nn.Parameter], learning_rate: float = 1e-3
) -> torch.optim.Optimizer | None:
    """The optimizer a plan counts with: "adamw" is transformers' default, the fused one."""
    match kind:
        case "adamw":
            return torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.0, fused=True)
        case "sgd":
            return torch.optim.SGD(parameters, lr=learning_rate)
        case "none":
            return None


def _optimizer_with_state(kind: Optimizer, parameters: list[nn.Parameter]) -> torch.optim.Optimizer | None:
    """The optimizer after its first step, when its state exists."""
    stepper = make_optimizer(kind, parameters)
    if stepper is not None:
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)
        stepper.step()
        for parameter in parameters:
            parameter.grad = None
    return stepper
