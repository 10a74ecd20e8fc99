"""Find the head of a causal language model, and what it takes to run it later as it would have run now."""

import contextlib
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from rematree.engines import any_sharded
from rematree.execute.context import Switches

Unary = Callable[[Tensor], Tensor]


def find_head(model: nn.Module) -> tuple[nn.Module, nn.Module] | None:
    """The causal language model inside `model` and its output embedding, None if there is none.

    Looks through PEFT models and wrappers that hold nothing but one module (DistributedDataParallel, a compiled one).
    """
    while True:
        get_base: Callable[[], nn.Module] | None = getattr(model, "get_base_model", None)
        get_head: Callable[[], nn.Module | None] | None = getattr(model, "get_output_embeddings", None)
        if get_base is not None:
            model = get_base()
        elif get_head is not None:
            head = get_head()
            return (model, head) if isinstance(head, nn.Module) else None
        elif len(children := list(model.children())) == 1:
            model = children[0]
        else:
            return None


def is_sharded_alone(model: nn.Module) -> bool:
    """Whether FSDP2 shards the head of `model`, or something in it, as a unit of its own or with some other modules."""
    found = find_head(model)
    return found is not None and any_sharded(found[1])


@dataclass(eq=False, slots=True)
class Fate:
    """What became of the output of one call of the head, and of all that was made of it.

    Attributes:
        chunked: A loss of it was computed in chunks.
    """

    chunked: bool = False


@dataclass(frozen=True)
class HeadCall:
    """All that is needed to run a head later as it would have run now.

    Attributes:
        forward: The head's own forward, [..., D] -> [..., V].
        params: Parameters of the head that require a gradient.
        num_classes: V.
        dtype: Of the logits as the head returns them.
        device: Of the logits.
        autocast: Device type and dtype of the autocast that was on, None if it was off.
        chunk_rows: Rows computed at once where an operation allows it.
        cross_entropy: Called as `cross_entropy(rows, target, **options)`; None means: not supported, use real logits.
        switches: Adapters and training flags as they are now.
        fate: Of what the call returned.
    """

    forward: Unary
    params: tuple[nn.Parameter, ...]
    num_classes: int
    dtype: torch.dtype
    device: torch.device
    autocast: tuple[str, torch.dtype] | None
    chunk_rows: int
    cross_entropy: Callable[..., Tensor | None]
    switches: Switches
    fate: Fate = field(default_factory=Fate)


def autocast_now(device_type: str) -> tuple[str, torch.dtype] | None:
    """The autocast that is on for this device type, None if there is none."""
    if torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type):
        return device_type, torch.get_autocast_dtype(device_type)
    return None


def autocast_as(device_type: str, state: tuple[str, torch.dtype] | None) -> contextlib.AbstractContextManager[Any]:
    """A context in which autocast for `device_type` is as it was when `state` was taken."""
    if state is not None:
        return torch.autocast(state[0], dtype=state[1])
    if autocast_now(device_type) is not None:
        return torch.autocast(device_type, enabled=False)
    return contextlib.nullcontext()


@contextlib.contextmanager
def dropout_off(module: nn.Module) -> Generator[None]:
    """No randomness: two runs can be compared, and the random stream is left alone."""
    dropouts = [child for child in module.modules() if isinstance(child, nn.Dropout) and child.training]
    for dropout in dropouts:
        dropout.training = False
    try:
        yield
    finally:
        for dropout in dropouts:
            dropout.training = True
