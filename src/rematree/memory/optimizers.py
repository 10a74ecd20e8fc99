"""Optimizers a step is planned with: the real one for a live step, a stand-in with the same state for a simulated one.

bitsandbytes' 8-bit optimizers read values while they set up, which fake tensors do not have; the stand-in keeps state
by the rule in their source (`bitsandbytes/optim/optimizer.py`, `Optimizer2State.init_state`), and a test holds the two
to each other.
"""

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, Literal, get_args

import torch
from torch import nn

from rematree.errors import UsageError

Optimizer = Literal["adamw", "adamw_8bit", "paged_adamw_8bit", "sgd", "none"]
_BLOCK: Final = 256  # elements that share a scale
_CODES: Final = 256  # entries of a code table
_LEAST_PAGED: Final = 100_000  # smaller tensors keep their state on the device


@dataclass(frozen=True)
class Found:
    """An optimizer, as far as bytes matter (`rematree.memory.found`).

    Attributes:
        name: Its class.
        states: Copies of each parameter that it keeps, state by state.
        bits: Of their elements: 32; 8, with a scale for each block; 0: in the parameter's own dtype.
        beside: Copies that a step takes and gives back.
        together: Of all parameters at once, not only of one after the other.
        paged: State of large tensors is in memory that the driver moves to the host.
        least: Elements below which a tensor has no state of 8 bits.
        wide: Numbers, among the trained parameters, of those that have none whatever their size.
    """

    name: str
    states: tuple[int, ...]
    bits: int = 0
    beside: int = 0
    together: bool = False
    paged: bool = False
    least: int = 4096
    wide: frozenset[int] = frozenset()


_EIGHT_BITS: Final = Found("AdamW8bit", (1, 1), bits=8)


def make_optimizer(
    kind: Optimizer, parameters: list[nn.Parameter], learning_rate: float = 1e-3
) -> torch.optim.Optimizer | None:
    """The optimizer a plan counts with: "adamw" is transformers' default, the fused one.

    Raises:
        UsageError: bitsandbytes is needed and not installed, or `kind` is none of these.
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
        case _:  # the object itself, which is to be planned with: another one like it cannot be made
            raise UsageError(f"optimizer is {kind!r}; it can be one of {', '.join(map(repr, get_args(Optimizer)))}")


def optimizer_with_state(
    kind: Optimizer | Found, parameters: list[nn.Parameter], *, pages: bool = False
) -> torch.optim.Optimizer | None:
    """The optimizer after its first step, when its state exists; runs on fake tensors.

    Args:
        kind: Which.
        parameters: What it trains.
        pages: State of a paged optimizer is not on the device: it is in memory that the driver moves to the host when
            the device is short of it, and needs none to be there. False where nothing is paged (a CPU).
    """
    stepper: torch.optim.Optimizer | None
    if isinstance(kind, Found):
        stepper = StandIn(parameters, kind, pages=pages)
    elif kind in {"adamw_8bit", "paged_adamw_8bit"}:
        stepper = StandIn(parameters, replace(_EIGHT_BITS, paged=kind == "paged_adamw_8bit"), pages=pages)
    else:
        stepper = make_optimizer(kind, parameters)
    if stepper is not None:
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)
        stepper.step()
        for parameter in parameters:
            parameter.grad = None
    return stepper


class StandIn(torch.optim.Optimizer):
    """Keeps the state of an optimizer and changes parameters with its op where that is known; numbers mean nothing.

    Args:
        parameters: What it trains.
        like: Whose state.
        pages: State of large tensors is kept elsewhere, if `like` is paged.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], like: Found, *, pages: bool) -> None:
        super().__init__(list(parameters), {})
        self._like = like
        self._pages = pages and like.paged
        self._maps: dict[torch.device, tuple[torch.Tensor, torch.Tensor]] = {}

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Change every parameter that has a gradient."""
        stepped = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        for number, parameter in enumerate(stepped):
            if parameter not in self.state:
                self._begin(parameter, wide=number in self._like.wide)
        like = self._like
        largest = max(stepped, key=torch.Tensor.numel, default=None)
        together = [self._beside(p) for p in stepped] if like.together else []
        for parameter in stepped:
            alone = self._beside(parameter) if parameter is largest and not like.together else None
            self._update(parameter, self.state[parameter])
            del alone
        del together

    def _beside(self, parameter: torch.Tensor) -> list[torch.Tensor]:
        """What a step takes for `parameter` and gives back."""
        return [torch.empty_like(parameter) for _ in range(self._like.beside)]

    def _begin(self, parameter: torch.Tensor, *, wide: bool) -> None:
        state: dict[str, Any] = self.state[parameter]
        count, device, like = parameter.numel(), parameter.device, self._like
        eight = like.bits == 8 and not wide and count >= like.least
        dtype = torch.uint8 if eight else torch.float32 if like.bits else parameter.dtype
        adam = like.bits == 0 and len(like.states) > 1  # whose fused op counts on the device
        state["step"] = torch.zeros((), device=device) if adam else 0
        if eight and device not in self._maps:
            self._maps[device] = torch.empty(_CODES, device=device), torch.empty(_CODES, device=device)
        for number, copies in enumerate(like.states, 1):
            first = (copies,) if copies > 1 else ()
            if not (self._pages and count >= _LEAST_PAGED):
                state[f"state{number}"] = torch.zeros((*first, *parameter.shape), dtype=dtype, device=device)
            if eight:
                state[f"qmap{number}"] = self._maps[device][number - 1]
                state[f"absmax{number}"] = torch.zeros((*first, -(-count // _BLOCK)), device=device)

    def _update(self, parameter: torch.Tensor, state: dict[str, Any]) -> None:
        first, second = state.get("state1"), state.get("state2")
        grad: Any = parameter.grad
        if self._like.states[:2] != (1, 1) or first is None:
            parameter.mul_(1.0)
        elif self._like.bits == 0:
            third = [state["state3"]] if "state3" in state else []
            torch._fused_adamw_(
                [parameter], [grad], [first], [state["state2"]], third, [state["step"]],
                lr=0.0, beta1=0.9, beta2=0.999, weight_decay=0.0, eps=1e-8, amsgrad=bool(third), maximize=False,
            )  # fmt: skip
        else:
            _update_blockwise(parameter, state, first, second)


def _update_blockwise(parameter: torch.Tensor, state: dict[str, Any], first: torch.Tensor, second: Any) -> None:
    """By bitsandbytes' op."""
    if importlib.util.find_spec("bitsandbytes") is None:
        parameter.mul_(1.0)
        return
    import bitsandbytes as bitsandbytes

    library: Any = torch.ops.bitsandbytes
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
