"""Optimizers a step is planned with: the real one for a live step, a stand-in with the same state for a simulated one.

bitsandbytes' 8-bit optimizers read values while they set up, which fake tensors do not have; the stand-in keeps state
by the rule in their source (`bitsandbytes/optim/optimizer.py`, `Optimizer2State.init_state`), and a test holds the two
to each other.
"""

import importlib.util
from collections.abc import Sequence
from typing import Any, Final, Literal

import torch
from torch import nn

from rematree.errors import UsageError

Optimizer = Literal["adamw", "adamw_8bit", "paged_adamw_8bit", "sgd", "none"]
_LEAST_8BIT: Final = 4096  # smaller tensors keep fp32 state
_BLOCK: Final = 256  # elements that share a scale
_CODES: Final = 256  # entries of a code table
_LEAST_PAGED: Final = 100_000  # smaller tensors keep their state on the device


def make_optimizer(
    kind: Optimizer, parameters: list[nn.Parameter], learning_rate: float = 1e-3
) -> torch.optim.Optimizer | None:
    """The optimizer a plan counts with: "adamw" is transformers' default, the fused one.

    Raises:
        UsageError: bitsandbytes is needed and not installed.
    """
    match kind:
        case "adamw":
            return torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.0, fused=True)
        case "adamw_8bit" | "paged_adamw_8bit":
            if importlib.util.find_spec("bitsandbytes") is None:
                raise UsageError(
                    f"optimizer {kind!r} needs bitsandbytes, which is not installed",
                    remedies=['pip install "bitsandbytes>=0.46"'],
                )
            import bitsandbytes

            library: Any = bitsandbytes.optim
            made = library.AdamW8bit if kind == "adamw_8bit" else library.PagedAdamW8bit
            return made(parameters, lr=learning_rate, weight_decay=0.0)
        case "sgd":
            return torch.optim.SGD(parameters, lr=learning_rate)
        case "none":
            return None


def optimizer_with_state(
    kind: Optimizer, parameters: list[nn.Parameter], *, pages: bool = False
) -> torch.optim.Optimizer | None:
    """The optimizer after its first step, when its state exists; runs on fake tensors.

    Args:
        kind: Which.
        parameters: What it trains.
        pages: State of a paged optimizer is not on the device: it is in memory that the driver moves to the host when
            the device is short of it, and needs none to be there. False where nothing is paged (a CPU).
    """
    stepper: torch.optim.Optimizer | None
    if kind in {"adamw_8bit", "paged_adamw_8bit"}:
        stepper = BlockwiseStandIn(parameters, pages=pages and kind == "paged_adamw_8bit")
    else:
        stepper = make_optimizer(kind, parameters)
    if stepper is not None:
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)
        stepper.step()
        for parameter in parameters:
            parameter.grad = None
    return stepper


class BlockwiseStandIn(torch.optim.Optimizer):
    """Keeps the state of bitsandbytes' 8-bit AdamW and changes parameters with its op; the numbers mean nothing.

    Args:
        parameters: What it trains.
        pages: State of large tensors is kept elsewhere.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], *, pages: bool) -> None:
        super().__init__(list(parameters), {})
        self._pages = pages
        self._maps: dict[torch.device, tuple[torch.Tensor, torch.Tensor]] = {}

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Change every parameter that has a gradient."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    if parameter not in self.state:
                        self._begin(parameter)
                    self._update(parameter, self.state[parameter])

    def _begin(self, parameter: torch.Tensor) -> None:
        state: dict[str, Any] = self.state[parameter]
        count, device = parameter.numel(), parameter.device
        state["step"] = 0
        eight = count >= _LEAST_8BIT
        if not (self._pages and count >= _LEAST_PAGED):
            dtype = torch.uint8 if eight else torch.float32
            state["state1"] = torch.zeros_like(parameter, dtype=dtype)
            state["state2"] = torch.zeros_like(parameter, dtype=dtype)
        if eight:
            if device not in self._maps:
                first, second = (torch.empty(_CODES, device=device) for _ in range(2))
                self._maps[device] = first, second
            state["qmap1"], state["qmap2"] = self._maps[device]
            scales = -(-count // _BLOCK)
            state["absmax1"] = torch.zeros(scales, device=device)
            state["absmax2"] = torch.zeros(scales, device=device)

    def _update(self, parameter: torch.Tensor, state: dict[str, Any]) -> None:
        library: Any = torch.ops.bitsandbytes
        first, second = state.get("state1"), state.get("state2")
        if first is None or importlib.util.find_spec("bitsandbytes") is None:
            parameter.mul_(1.0)
            return
        import bitsandbytes as bitsandbytes

        if "absmax1" in state:
            library.optimizer_update_8bit_blockwise(
                "adam", parameter.grad, parameter, first, second, 0.9, 0.999, 0.0, 0.0, 1e-8, 1, 0.0,
                state["qmap1"], state["qmap2"], state["absmax1"], state["absmax2"], 0.0, 1.0, False,
            )  # fmt: skip
        else:
            library.optimizer_update_32bit(
                "adam", parameter.grad, parameter, first, second, None, 0.0, 0.0, 0.9, 0.999, 0.0, 0.0, 1e-8, 0.0, 1,
                0.0, 1.0, False,
            )  # fmt: skip
