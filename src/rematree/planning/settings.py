"""How the step runs, and what a plan for it may do: the one list of what a planner is told beside model and batch."""

import inspect
from collections.abc import Callable, Collection
from dataclasses import dataclass, fields
from typing import Any, Final, TypedDict, TypeVar

import torch

from rematree.errors import UsageError
from rematree.memory.optimizers import Found, Optimizer
from rematree.observation.absent import is_absent
from rematree.observation.attention_kernels import Capability
from rematree.observation.observe import LossFunction
from rematree.pricing.cost import Cost
from rematree.referee.ranks import Ranks

LEVERS: Final = frozenset({"chunked_loss", "lean_adapters", "sliced_attention", "compile", "groups"})
_WORTH_COMPILING: Final = 200  # steps from which it is worth a minute to find out

_Function = TypeVar("_Function", bound=Callable[..., Any])


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is said of a step beside its model and its batch.

    Attributes:
        optimizer: What holds state: "adamw" (two states per trained parameter, in its dtype), "adamw_8bit" (of
            bitsandbytes), "paged_adamw_8bit" (on a GPU, state of large tensors counts as on the host), "sgd", "none";
            or the optimizer itself, for what it keeps and what its step takes beside: torch's Adam, AdamW and SGD, and
            bitsandbytes'. "adamw" is the fused one, whose step takes nothing; where it runs "foreach", torch's default
            on a GPU, its step takes a copy of all second moments.
        accumulation_steps: More than one means gradients of earlier micro-batches are live during the step.
        clips: Whether the loop clips gradients (`clip_grad_norm_`) before the optimizer's step, as Trainers do unless
            told otherwise (`max_grad_norm`); its time counts, its bytes are a few scalars. False: it does not.
        forbid: Levers not to use: "chunked_loss", "sliced_attention" and "compile" (they change rounding),
            "lean_adapters", "groups".
        cost: Prices ops; default: measured on the model's device.
        loss: The scalar to differentiate, from the model's output; default: its `loss`.
        device: Where the step will run, if not where the model is; it need not be in this machine. Then `cost` says
            what it is like.
        capability: Compute capability of that device, which decides between attention kernels.
        steps: How many steps the job will run, if that is known: compiling blocks must pay for itself within them.
        allow_compile: Whether blocks may be compiled, which changes rounding and takes up to minutes, now to measure
            and again when training begins. Default: if `steps` is known to be at least 200.
        ranks: Over which ranks, and by which engine, the step will be distributed; the budget is that of each. Default:
            read off the model, if DDP or DeepSpeed wraps it or FSDP2 shards it.
    Raises:
        UsageError: unknown lever, a device that is not here and no `cost`, or an optimizer whose state is not known.
    """

    optimizer: Optimizer | Found | torch.optim.Optimizer = "adamw"
    accumulation_steps: int = 1
    clips: bool = True
    forbid: Collection[str] = ()
    cost: Cost | None = None
    loss: LossFunction | None = None
    device: torch.device | None = None
    capability: Capability | None = None
    steps: int | None = None
    allow_compile: bool | None = None
    ranks: Ranks | None = None

    def __post_init__(self) -> None:
        unknown = sorted(set(self.forbid) - LEVERS)
        if unknown:
            raise UsageError(f"unknown lever {unknown[0]!r} in forbid; levers: {', '.join(sorted(LEVERS))}")
        if self.cost is None and self.device is not None and is_absent(self.device):
            raise UsageError(
                f"no {self.device.type} device is here to measure", remedies=["pass cost=, say a Roofline"]
            )

    def may(self, lever: str) -> bool:
        """Whether `lever` is not forbidden."""
        return lever not in self.forbid

    @property
    def compiles(self) -> bool:
        """Whether compiled blocks are measured and offered."""
        wanted = self.allow_compile
        if wanted is None:
            wanted = self.steps is not None and self.steps >= _WORTH_COMPILING
        return wanted and self.may("compile")


class Told(TypedDict, total=False):
    """`Settings` as keyword arguments, for those who check types; the language cannot derive the one from the other."""

    optimizer: Optimizer | Found | torch.optim.Optimizer
    accumulation_steps: int
    clips: bool
    forbid: Collection[str]
    cost: Cost | None
    loss: LossFunction | None
    device: torch.device | None
    capability: Capability | None
    steps: int | None
    allow_compile: bool | None
    ranks: Ranks | None


def shows_settings(function: _Function) -> _Function:
    """`function(..., **told)` with the settings by name in its signature, for `help()` and completion in notebooks."""
    signature = inspect.signature(function)
    named = [
        inspect.Parameter(item.name, inspect.Parameter.KEYWORD_ONLY, default=item.default, annotation=item.type)
        for item in fields(Settings)
    ]
    *others, _ = signature.parameters.values()
    function.__signature__ = signature.replace(parameters=[*others, *named])  # pyright: ignore[reportFunctionMemberAccess]
    return function
