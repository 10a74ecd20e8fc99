"""The weights that ZeRO-3 gathers, and when each is used in a step whose order is known."""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import nn


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
    flight: "Flight | None" = None
    users: set[nn.Module] = field(default_factory=set[nn.Module])


@dataclass(slots=True, eq=False)
class Flight:
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


class Uses:
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
