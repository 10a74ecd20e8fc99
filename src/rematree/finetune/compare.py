"""The same step under Hugging Face's activation checkpointing and without any: what the plan is compared with."""

import statistics
from collections.abc import Callable, Generator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch

from rematree.finetune.callbacks import MakeMeter, clock

Batch = Mapping[str, torch.Tensor]


def train_step(model: Any, optimizer: torch.optim.Optimizer, batch: Batch, max_grad_norm: float) -> float:
    """Forward, backward, clipping and optimizer, as the Trainer does them. Returns the loss."""
    model.train()
    loss = model(**batch).loss
    loss.backward()
    if max_grad_norm > 0:
        torch.nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss.item()


@contextmanager
def hf_checkpointing(model: Any) -> Generator[None]:
    """Every layer recomputed, as `gradient_checkpointing=True` does, and everything as it was afterwards."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if hasattr(base, "activation_checkpointing_enable"):
        base.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    else:
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    try:
        yield
    finally:
        if hasattr(base, "activation_checkpointing_disable"):
            base.activation_checkpointing_disable()
        else:
            base.gradient_checkpointing_disable()
        # Switching off leaves the hook on the embedding, and with it a gradient that nobody needs.
        base.disable_input_require_grads()


@contextmanager
def weights_kept(model: Any, learning_rate: float) -> Generator[torch.optim.Optimizer]:
    """An optimizer like the Trainer's for trial steps; the trainable weights are put back afterwards, bit for bit."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    saved = [parameter.detach().to("cpu", copy=True) for parameter in trainable]
    was_training = model.training
    try:
        yield torch.optim.AdamW(trainable, lr=learning_rate, fused=True)
    finally:
        model.train(was_training)
        with torch.no_grad():
            for parameter, value in zip(trainable, saved, strict=True):
                parameter.copy_(value)
                parameter.grad = None


def hf_checkpointing_peak(
    model: Any, batch: Batch, make_meter: MakeMeter, *, learning_rate: float, max_grad_norm: float
) -> int:
    """Peak bytes of a step under Hugging Face's checkpointing, with the optimizer's state there."""
    with weights_kept(model, learning_rate) as optimizer, hf_checkpointing(model):
        train_step(model, optimizer, batch, max_grad_norm)
        with make_meter(model, optimizer) as meter:
            train_step(model, optimizer, batch, max_grad_norm)
        return int(meter.peak_bytes)


def time_side_by_side(
    model: Any,
    batch: Batch,
    budgeted: Callable[[], AbstractContextManager[Any]],
    *,
    rounds: int,
    learning_rate: float,
    max_grad_norm: float,
) -> dict[str, float | None]:
    """Median seconds of a step: "budgeted", "hf_checkpointing" and "plain".

    Taken in turns, and every other round in the opposite order, so that a machine that slows down or speeds up does
    so for all. A turn is two steps, of which the second counts: the first finds the heap as another way of stepping
    left it, and training is many steps of one kind. Plain, which nothing is compared with, takes one turn. A way whose
    step does not fit in the device's memory is None.
    """
    ways: dict[str, Callable[[], AbstractContextManager[Any]]] = {
        "budgeted": budgeted,
        "hf_checkpointing": lambda: hf_checkpointing(model),
        "plain": nullcontext,
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    with weights_kept(model, learning_rate) as optimizer:
        for number in range(rounds):
            names = [name for name in ways if number == 0 or name != "plain"]
            for name in names if number % 2 == 0 else reversed(names):
                try:
                    with ways[name]():
                        train_step(model, optimizer, batch, max_grad_norm)
                        started = clock()
                        train_step(model, optimizer, batch, max_grad_norm)
                        seconds[name].append(clock() - started)
                except torch.OutOfMemoryError:
                    optimizer.zero_grad(set_to_none=True)
    return {name: statistics.median(times) if times else None for name, times in seconds.items()}
