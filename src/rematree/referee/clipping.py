"""What clipping costs: the norm of all gradients, and the pass that scales them, before the optimizer's step."""

from collections.abc import Sequence
from typing import Final

import torch
from torch import nn

from rematree.memory.ledger import Ledger
from rematree.observation.absent import is_absent
from rematree.observation.mode import TwinMode
from rematree.pricing.price import Cost

_NORM: Final = 1.0  # any: the scaling runs whether or not the gradients are longer


def clipping_seconds(parameters: Sequence[nn.Parameter], cost: Cost, device: torch.device, mode: TwinMode) -> float:
    """Seconds of `clip_grad_norm_` over the gradients of `parameters`, which are fake.

    The one for many tensors at once, as torch takes it for ordinary tensors on a CPU and on a GPU. Where a twin only
    imagines the device torch refuses that, and the same bytes are read and written tensor by tensor.
    """
    ledger = Ledger(cost, device.type, mode.recipes)
    with mode, torch.no_grad():
        try:
            for parameter in parameters:
                parameter.grad = torch.zeros_like(parameter)
            with ledger:
                torch.nn.utils.clip_grad_norm_(parameters, _NORM, foreach=None if is_absent(device) else True)
        finally:
            for parameter in parameters:
                parameter.grad = None
    return ledger.seconds
