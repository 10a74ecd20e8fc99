"""How fast the machine is at the moment, by a fixed piece of work that no plan has a part in.

A virtual machine shares its memory bus and caches with others: the same step takes 1.1 s in one minute and 1.9 s in the
next. A prediction is for the machine as it was when ops were priced, so both are taken at the same speed or say that
they were not.
"""

import statistics

import torch

from rematree.measure import storage_bytes
from rematree.planning.pace import now
from rematree.units import MIB

_WARM_RUNS = 5  # a processor that has slept takes a third longer
_RUNS = 15
WITHIN = 0.1  # of the speed at which ops were priced


class Speed:
    """A mix of what a training step is made of: matmuls of both kinds, memory passed over, masks drawn.

    Attributes:
        num_bytes: Held on the device.
    Cost:
        About a second for one answer, and 140 MiB.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._factors = [
            (torch.randn(1024, 512, device=device, dtype=dtype), torch.randn(512, 1408, device=device, dtype=dtype))
            for dtype in (torch.float32, torch.bfloat16)
        ]
        self._memory = torch.zeros(64 * MIB // 4, device=device)
        self._out = torch.empty_like(self._memory)
        self.num_bytes = storage_bytes([*(t for pair in self._factors for t in pair), self._memory, self._out])
        self.seconds()  # whatever is done once

    def seconds(self) -> float:
        """Of the work now: the median of fifteen."""
        return statistics.median([self._once() for _ in range(_WARM_RUNS + _RUNS)][_WARM_RUNS:])

    def _once(self) -> float:
        start = now(self._device)
        for one, other in self._factors:
            for _ in range(8):
                one @ other
        torch.add(self._memory, 1.0, out=self._out)
        torch.exp(self._out, out=self._out)
        self._memory[: MIB // 2].bernoulli_(0.05)
        return now(self._device) - start
