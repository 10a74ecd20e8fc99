"""The lines of a plan's ledger: what they are called, what belongs to them, and how each is obtained."""

from collections.abc import Iterator, Mapping
from typing import Final

import torch
from torch import nn

from rematree.plans import ALLOCATOR_SLACK, CUDA_CONTEXT, LedgerLine
from rematree.pricing.price import Cost
from rematree.pricing.roofline import Roofline
from rematree.quantised import four_bit_linears, frozen_int8_linears, hidden_tensors

SAVED: Final = "saved tensors"
MASKS: Final = "attention masks"
LOGITS: Final = "logits and loss"
RECOMPUTED: Final = "recomputation"
BACKWARD: Final = "backward"
GRADIENTS: Final = "gradients"
STATE: Final = "optimizer state"
STEP: Final = "optimizer step"
BATCH: Final = "batch"
BUFFERS: Final = "buffers"
ADAPTERS: Final = "adapters"
TRAINED: Final = "trained weights"
DEQUANTISED: Final = "dequantised weights"
WORKSPACE: Final = "kernel workspace"
ROUNDING: Final = "allocator rounding"
HOST: Final = "host tensors"
SLACK: Final = ALLOCATOR_SLACK
LIBRARY: Final = "cuBLAS workspace"
CONTEXT: Final = CUDA_CONTEXT
COMPILED: Final = "kept by compiled blocks"
MASTERS: Final = "master weights"
BUCKETS: Final = "reduce buckets"
GATHERED: Final = "gathered weights"
GATHERING: Final = "all-gather buffers"
REDUCING: Final = "reduce-scatter buffers"
_BASE: Final = "base weights"

_COUNTED: Final = frozenset({STATE, BATCH, BUFFERS, ADAPTERS, TRAINED, MASTERS, BUCKETS, GATHERED, GATHERING, REDUCING})
_ESTIMATED: Final[Mapping[str, str]] = {
    HOST: "estimated: loss sums and generator states that a step makes outside the model",
    LIBRARY: "estimated: torch's default size, in the thread of the forward and in that of the backward",
    CONTEXT: "estimated: a driver's context with its loaded kernels, not measured on GPU",
}
_DTYPES: Final = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.float64: "fp64"}
_ADAPTER_MARKS: Final = ("lora_", "modules_to_save", "ia3_", "prompt_encoder", "trainable_tokens_")


def ledger_lines(at_peak: Mapping[str, int], beside: Mapping[str, int], workspace: str) -> tuple[LedgerLine, ...]:
    """Lines for the bytes live at a simulated peak, and those beside it.

    Args:
        at_peak: Bytes by category.
        beside: Further bytes, by line.
        workspace: How kernels' own bytes were obtained.
    """
    lines = [LedgerLine(name, size, _obtained(name, workspace)) for name, size in {**at_peak, **beside}.items()]
    return tuple(line for line in lines if line.num_bytes)


def how_workspaces_are_known(cost: Cost) -> str:
    """How the bytes that kernels allocate inside are obtained by `cost`."""
    if isinstance(cost, Roofline):
        return "estimated: outputs of the op, and a 4-bit weight unpacked"
    return "measured"


def _obtained(name: str, workspace: str) -> str:
    if name in _COUNTED or name.startswith(_BASE):
        return "counted"
    if name == COMPILED:
        return "measured"
    if name in {WORKSPACE, DEQUANTISED}:
        return workspace
    return _ESTIMATED.get(name, "simulated")


def weights(model: nn.Module) -> Iterator[tuple[torch.Tensor, str]]:
    """Every tensor a model holds, with the line it belongs to; a storage may come more than once, the first counts."""
    packed: dict[int, str] = {}
    scales: dict[int, str] = {}
    for _, module in four_bit_linears(model):
        state = getattr(module.weight, "quant_state", None)
        name = str(getattr(state, "quant_type", "4-bit")).upper()
        packed[id(module.weight)] = f"{_BASE}, {name} packed"
        scales.update((id(t), f"{_BASE}, {name} scales") for t in hidden_tensors(module))
    for _, module in frozen_int8_linears(model):
        packed[id(module.weight)] = f"{_BASE}, int8"
        scales.update((id(t), f"{_BASE}, int8 scales") for t in hidden_tensors(module))
    adapted = hasattr(model, "peft_config") or any("lora_" in name for name, _ in model.named_parameters())
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            default = "int8" if parameter.dtype is torch.int8 else _DTYPES.get(parameter.dtype, str(parameter.dtype))
            yield parameter, packed.get(id(parameter), f"{_BASE}, {default}")
        else:
            mark = adapted and any(mark in name for mark in _ADAPTER_MARKS)
            yield parameter, ADAPTERS if mark else TRAINED
    for buffer in model.buffers():
        yield buffer, BUFFERS
    for tensor in hidden_tensors(model):
        yield tensor, scales.get(id(tensor), f"{_BASE}, scales")
