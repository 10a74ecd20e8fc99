"""LoRA layers by hand that keep one 16-bit input each, as an engineer writes them in an afternoon; nothing is planned.

PEFT keeps a private fp32 copy of the input for every adapter, and the product of rank r. Here the input is cast again
in backward, and the products are made again. For one adapter over plain linear layers, with dropout 0.
"""

import functools
from collections.abc import Callable, Generator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from peers import Way, chunked, every_nth, forwards, plain
from peft.tuners.lora import Linear
from torch import nn
from workloads import Built, Loss, plain_loss


class _LeanBranch(torch.autograd.Function):
    """B(A(x)) * scaling in fp32, rounded to the input's dtype; keeps x, A and B."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, first: torch.Tensor, second: torch.Tensor, scaling: float) -> torch.Tensor:
        ctx.save_for_backward(x, first, second)
        ctx.scaling = scaling
        return ((x.to(first.dtype) @ first.t()) @ second.t()).mul_(scaling).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *outer: Any) -> Any:
        x, first, second = ctx.saved_tensors
        rows = x.reshape(-1, x.shape[-1]).to(first.dtype)
        gradient = outer[0].reshape(-1, second.shape[0]).to(second.dtype) * ctx.scaling
        narrow = gradient @ second
        of_second = gradient.t() @ (rows @ first.t())
        return (narrow @ first).to(x.dtype).view_as(x), narrow.t() @ rows, of_second, None


def _lean_forward(layer: Any, x: torch.Tensor) -> torch.Tensor:
    (name,) = layer.active_adapters
    first, second = layer.lora_A[name].weight, layer.lora_B[name].weight
    added: Any = _LeanBranch.apply(x, first, second, layer.scaling[name])
    return layer.base_layer(x) + added


@contextmanager
def lean(built: Built) -> Generator[Loss]:
    """Every LoRA layer of the model with the forward above."""
    layers: list[nn.Module] = [module for module in built.model.modules() if isinstance(module, Linear)]
    replaced: Mapping[nn.Module, Callable[..., Any]] = {m: functools.partial(_lean_forward, m) for m in layers}
    with forwards(replaced):
        yield plain_loss


@contextmanager
def _lean_and(built: Built, blocks: Callable[[], AbstractContextManager[Loss]]) -> Generator[Loss]:
    with lean(built), blocks() as loss:
        yield loss


def lean_peers(built: Built) -> list[Way]:
    """Chunked loss and lean layers, with all blocks kept, every third, every second, or every block recomputed."""
    if built.workload.mode != "lora" or built.workload.dropout:
        return []
    found: list[Way] = []
    for n, which in ((0, ""), (3, ", every 3rd block"), (2, ", every 2nd block"), (1, ", every block")):
        blocks = functools.partial(every_nth, built, n) if n else plain
        settings = "chunked loss, LoRA layers that keep one input" + (f"{which} recomputed" if n else "")
        around = functools.partial(chunked, functools.partial(_lean_and, built, blocks))
        found.append(Way(f"by hand: chunked, lean{which}", "peer", settings, around))
    return found
