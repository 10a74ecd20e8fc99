"""What an engine does while a simulated step runs.

DDP and FSDP2 change the timeline of a step by rules that can be applied to it afterwards (`layout`). DeepSpeed looks at
each gradient when it is there (`zero.stage2`), and with ZeRO-3 at each module before and after it runs (`zero.stage3`).
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import torch
from torch import nn

from rematree.memory.accounts import MASTERS, weights
from rematree.memory.ledger import Ledger


@dataclass(frozen=True, slots=True)
class Arrival:
    """A gradient that is there, in a simulated step.

    Attributes:
        parameter: Identity of what it is for.
        label: Of the segment that was running.
        change: What was live then and not when the segment began, by category, the gradient included.
        risen: Most bytes of the segment until then, beyond those at its beginning.
    """

    parameter: int
    label: str
    change: Mapping[str, int]
    risen: int

    @classmethod
    def now(cls, parameter: torch.Tensor, ledger: Ledger) -> Self:
        """That of `parameter`, which `ledger` has just seen."""
        change, risen = ledger.since_mark()
        return cls(id(parameter), ledger.label, change, risen)


class AtWork:
    """An engine that does nothing while a step runs. A context manager around the step.

    Attributes:
        arrivals: Gradients that the engine has taken, in order.
        gathers: All-gathers so far.
    """

    def __init__(self) -> None:
        self.arrivals: list[Arrival] = []
        self.gathers = 0

    def arrived(self, parameter: torch.Tensor) -> None:
        """The gradient of `parameter` is there."""

    def backward_is_over(self) -> None:
        """All gradients have arrived."""

    def step_begins(self) -> None:
        """The optimizer is about to step; what it steps has no gradients yet."""

    def stepping(self) -> None:
        """What the optimizer steps has its gradients."""

    def stepped(self) -> None:
        """The optimizer has stepped, and those gradients are gone."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """The step is over."""


class Taking(AtWork):
    """An engine that takes each gradient as soon as it is there.

    Args:
        ledger: Of the step.
    """

    def __init__(self, ledger: Ledger) -> None:
        super().__init__()
        self._ledger = ledger

    def arrived(self, parameter: torch.Tensor) -> None:
        self.arrivals.append(Arrival.now(parameter, self._ledger))
        parameter.grad = None


def whole_model(model: nn.Module, masters: Sequence[torch.Tensor]) -> Iterator[tuple[str, list[torch.Tensor]]]:
    """What a rank that has all weights of `model` holds of it all along, by line.

    Args:
        model: The model.
        masters: Weights that the optimizer steps in their place.
    """
    for tensor, line in weights(model):
        yield line, [tensor]
    yield MASTERS, [*masters]
