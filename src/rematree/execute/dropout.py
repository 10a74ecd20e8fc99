"""The random mask of a dropout inside a recomputed region, kept at one bit an element instead of drawn again.

On a CPU, drawing the mask costs more than the matmul behind it. `torch.nn.functional.dropout` there is
`x * empty_like(x).bernoulli_(1 - p).div_(1 - p)`; the same operations are called here, so values and the random stream
are the same bits. What is kept is which elements were drawn: eight to a byte.

Not covered: CUDA, where dropout is one fused kernel and drawing is cheap; there the module runs as it is, and lean
adapters draw again.
"""

import torch
from torch import nn

_BITS = 8


def mask_can_be_kept(module: nn.Module, x: torch.Tensor) -> bool:
    """Whether `module(x)` is the operation above: plain dropout, active, on a CPU, dense rows."""
    return (
        type(module) is nn.Dropout
        and module.training
        and not module.inplace
        and 0.0 < module.p < 1.0
        and drawn_apart(x)
        and x.is_contiguous()
        and x.numel() > 0
    )


def drawn_apart(x: torch.Tensor) -> bool:
    """Whether dropout of `x` draws a mask, then multiplies by it; on a GPU both are one kernel."""
    return x.device.type == "cpu"


def draw(x: torch.Tensor, p: float) -> torch.Tensor:
    """Ones where an element stays, zeros elsewhere; shape, dtype and layout of `x`."""
    return torch.empty_like(x).bernoulli_(1 - p)


def scale(x: torch.Tensor, drawn: torch.Tensor, p: float) -> torch.Tensor:
    """The rest of dropout. Overwrites `drawn`."""
    return x * drawn.div_(1 - p)


def draw_bits(like: torch.Tensor, p: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw a mask in the memory of `like`, contiguous: its bits, as `pack` gives them, and what dropout multiplies by.

    Args:
        like: Overwritten; its shape and dtype are the mask's.
        p: Probability of a zero.
    """
    drawn = like.bernoulli_(1 - p)
    return pack(drawn), drawn.div_(1 - p)


def packed_bytes(num_elements: int) -> int:
    """Bytes of `pack`'s result."""
    return -(-num_elements // _BITS)


def pack(drawn: torch.Tensor) -> torch.Tensor:
    """uint8 tensor of ceil(n / 8) bytes; bit i of byte j is element 8 j + i.

    A matrix-vector product with 1, 2, 4 ... 128: its sums are below 256, so exact, and it is the fastest of the ways to
    do it with plain operations.
    """
    flat = drawn.detach().reshape(-1)
    if flat.numel() % _BITS:
        flat = nn.functional.pad(flat, (0, -flat.numel() % _BITS))
    weights = torch.tensor([float(1 << i) for i in range(_BITS)], dtype=torch.float32, device=drawn.device)
    return torch.mv(flat.view(-1, _BITS).float(), weights).to(torch.uint8)


def byte_table(dtype: torch.dtype, p: float, device: torch.device) -> torch.Tensor:
    """[256, 8]: what dropout multiplies eight elements by, zeros and 1 / (1 - p), for every byte of bits.

    The division is done once in it, not for every element.
    """
    powers = torch.arange(_BITS, device=device)
    return (torch.arange(1 << _BITS, device=device).unsqueeze(1) >> powers & 1).to(dtype).div_(1 - p)


def look_up(bits: torch.Tensor, shape: torch.Size, table: torch.Tensor) -> torch.Tensor:
    """What dropout multiplies by, from what `pack` was given, with the `byte_table` of its dtype and probability."""
    rows = torch.nn.functional.embedding(bits.int(), table)
    return rows.view(-1)[: shape.numel()].view(shape)


def unpack(bits: torch.Tensor, shape: torch.Size, dtype: torch.dtype, p: float) -> torch.Tensor:
    """What dropout multiplies by, from what `pack` was given."""
    return look_up(bits, shape, byte_table(dtype, p, bits.device))
