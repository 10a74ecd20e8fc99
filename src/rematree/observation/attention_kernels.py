"""Which attention kernel a CUDA device would run, and running it under fake tensors where there is no such device.

`torch.nn.functional.scaled_dot_product_attention` is a composite: it asks the backend which kernel fits and calls that
one. What the kernel keeps for backward differs by a factor of the sequence length: flash and cuDNN attention keep the
output and one fp32 number a row, memory-efficient attention pads that to 32 rows and takes a mask, the math form keeps
the probabilities. A build without CUDA has no one to ask, so the rules are here.

Source: torch 2.13, `aten/src/ATen/native/transformers/cuda/sdp_utils.cpp` (`priority_order`, `can_use_*_attention`) and
`attention.cpp` (`scaled_dot_product_attention`: padding of the head to 8, expansion of masks, and in the math form of
grouped heads).
Not covered: nested tensors, ROCm, kernels switched off by `torch.nn.attention.sdpa_kernel`.
"""

from typing import Any, Final, Literal

import torch
from torch import Tensor

Kernel = Literal["cudnn", "flash", "efficient", "math"]
Capability = tuple[int, int]

DEFAULT_CAPABILITY: Final[Capability] = (8, 0)
_HALF: Final = (torch.float16, torch.bfloat16)
_LARGEST_FLASH_HEAD: Final = 256
_LARGEST_CUDNN_HEAD: Final = 128
_FLASH_ALIGNMENT: Final = 8
_MASK_ALIGNMENT: Final = 16


def choose_kernel(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    enable_gqa: bool = False,
    capability: Capability = DEFAULT_CAPABILITY,
) -> Kernel:
    """The kernel that CUDA's dispatch picks.

    Args:
        query: Batch x heads x rows x head size; shapes and dtypes are read, no values.
        key: Like `query`.
        value: Like `query`.
        mask: Boolean or additive mask.
        dropout_p: Probability of dropping an attention weight.
        is_causal: Row i sees keys up to i.
        enable_gqa: Keys and values may have fewer heads.
        capability: Compute capability of the device.
    """
    if query.dim() != 4 or key.dim() != 4 or value.dim() != 4 or 0 in query.shape or 0 in key.shape:
        return "math"
    if not _heads_fit(query, key, value, enable_gqa):
        return "math"
    # torch.backends.cuda: cuDNN comes first on Hopper and data-centre Blackwell, with the cuDNN that torch ships.
    if capability[0] in (9, 10) and _cudnn_fits(query, key, value, dropout_p):
        return "cudnn"
    if _flash_fits(query, key, value, mask, dropout_p, is_causal, capability):
        return "flash"
    return "efficient" if _efficient_fits(query, key, value, capability) else "math"


def _heads_fit(query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool) -> bool:
    if not query.shape[0] == key.shape[0] == value.shape[0]:
        return False
    heads, keys = query.shape[1], key.shape[1]
    if keys != value.shape[1]:
        return False
    return heads == keys or (enable_gqa and heads % keys == 0)


def _needs_gradient(*tensors: Tensor) -> bool:
    return any(t.requires_grad for t in tensors)


def _dense_rows(*tensors: Tensor) -> bool:
    return all(t.stride(-1) == 1 or t.shape[-1] == 1 for t in tensors)


def _low_precision(dtype: torch.dtype, capability: Capability) -> bool:
    return dtype in _HALF if capability >= (8, 0) else dtype == torch.float16


def _cudnn_fits(query: Tensor, key: Tensor, value: Tensor, dropout_p: float) -> bool:
    size, out_size = query.shape[-1], value.shape[-1]
    large = (size, out_size) == (192, 128)
    if not large and max(size, out_size) > _LARGEST_CUDNN_HEAD:
        return False
    return (
        query.dtype in _HALF
        and size % 8 == 0
        and out_size % 8 == 0
        and key.shape[-2] != 1
        and float(dropout_p * 16).is_integer()
        and (dropout_p == 0 or query.shape[-2] != 1)
        and _dense_rows(query, key, value)
    )


def _flash_fits(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    capability: Capability,
) -> bool:
    size = query.shape[-1]
    if mask is not None or not (8, 0) <= capability <= (12, 1) or not _low_precision(query.dtype, capability):
        return False
    if size != key.shape[-1] or size != value.shape[-1] or size > _LARGEST_FLASH_HEAD:
        return False
    small_memory = (8, 6) <= capability <= (8, 9) or (12, 0) <= capability <= (12, 1)
    if small_memory and _needs_gradient(query, key, value) and size > 192 and (dropout_p > 0 or size <= 224):
        return False
    if is_causal and query.shape[-2] != key.shape[-2]:
        return False
    return _dense_rows(query, key, value)


def _efficient_fits(query: Tensor, key: Tensor, value: Tensor, capability: Capability) -> bool:
    if query.shape[1] != key.shape[1]:  # grouped heads; torch's main takes them since pytorch#191085, 2.13 does not
        return False
    half = query.dtype in _HALF
    if query.dtype not in (torch.float16, torch.float32, *((torch.bfloat16,) if capability >= (8, 0) else ())):
        return False
    alignment = 4 if capability >= (8, 0) else 1
    if capability >= (8, 0) or (capability >= (7, 0) and half):
        alignment = max(alignment, 8 if half else 4)
    size, out_size = query.shape[-1], value.shape[-1]
    if size != key.shape[-1] or size % alignment or out_size % alignment:
        return False
    return all(t.stride(-1) == 1 for t in (query, key, value))


def run_kernel(
    kernel: Kernel,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Attention by `kernel`, with the operations around it that `scaled_dot_product_attention` does."""
    aten: Any = torch.ops.aten
    keep = _needs_gradient(query, key, value)
    if kernel == "flash":
        size = query.shape[-1]
        scale = size**-0.5 if scale is None else scale
        padded = [_pad_head(t) for t in (query, key, value)]
        out = aten._scaled_dot_product_flash_attention(*padded, dropout_p, is_causal, False, scale=scale)[0]
        return out[..., :size] if out.shape[-1] != size else out
    if kernel == "cudnn":
        bias = _additive(mask, query)
        return aten._scaled_dot_product_cudnn_attention(
            query, key, value, bias, keep, dropout_p, is_causal, False, scale=scale
        )[0]
    if kernel == "efficient":
        bias = _additive(mask, query)
        if bias is not None:
            bias = _aligned(bias, query, key)
        return aten._scaled_dot_product_efficient_attention(
            query, key, value, bias, keep, dropout_p, is_causal, scale=scale
        )[0]
    if enable_gqa and key.shape[1] != query.shape[1]:
        groups = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    return _math(query, key, value, _additive(mask, query), dropout_p, is_causal, scale)


def _math(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
) -> Tensor:
    """`_scaled_dot_product_attention_math`: 16-bit inputs are computed in fp32, and the probabilities are kept."""
    dtype = query.dtype
    if dtype in _HALF:
        query, key, value = query.float(), key.float(), value.float()
        bias = None if bias is None else bias.float()
    root = (query.shape[-1] ** -0.5 if scale is None else scale) ** 0.5
    query = query * root
    if is_causal:
        allowed = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool, device=query.device).tril()
        bias = _additive(allowed, query)
    weights = torch.matmul(query, key.transpose(-2, -1) * root)
    if bias is not None:
        weights = weights.add_(bias)
    weights = torch.softmax(weights, -1)
    if dropout_p > 0:
        weights = torch.native_dropout(weights, dropout_p, True)[0]
    return torch.matmul(weights, value).to(dtype)


def _pad_head(tensor: Tensor) -> Tensor:
    missing = -tensor.shape[-1] % _FLASH_ALIGNMENT
    return torch.constant_pad_nd(tensor, [0, missing]) if missing else tensor


def _additive(mask: Tensor | None, query: Tensor) -> Tensor | None:
    if mask is None or mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=query.dtype).masked_fill_(mask.logical_not(), float("-inf"))


def _aligned(bias: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """The mask as the memory-efficient kernel reads it: four dimensions, rows that begin at multiples of 16."""
    bias = bias.expand(query.shape[0], query.shape[1], query.shape[2], key.shape[2])
    missing = -bias.shape[-1] % _MASK_ALIGNMENT
    if missing:
        return torch.constant_pad_nd(bias, [0, missing])[..., : key.shape[2]]
    if any(bias.stride(axis) % _MASK_ALIGNMENT for axis in range(3)):
        return bias.contiguous()
    return bias
