"""Load a model with its linear layers packed by bitsandbytes: 4 bits a weight (NF4, FP4) or 8 (LLM.int8).

bitsandbytes is optional. Layers that are already packed are recognised in `rematree.quantised` without it.
"""

import importlib.util
from dataclasses import dataclass
from typing import Any, Final

import torch

from rematree.errors import UsageError

_INSTALL: Final = 'pip install "bitsandbytes>=0.46"'


@dataclass(frozen=True)
class Quantisation:
    """How bitsandbytes packs the linear layers.

    Attributes:
        bits: 4 or 8.
        quant_type: "nf4" or "fp4"; of 4 bits.
        double_quant: Pack the scales too (QLoRA's double quantisation); of 4 bits.
    """

    bits: int
    quant_type: str = "nf4"
    double_quant: bool = True


def quantisation_config(quantisation: Quantisation, *, compute_dtype: torch.dtype) -> Any:
    """The `BitsAndBytesConfig` to pass to `from_pretrained(..., quantization_config=)`.

    Args:
        quantisation: How weights are packed.
        compute_dtype: What 4-bit weights are unpacked to. The model's own dtype: another one adds two copies of every
            linear layer's input and output, and transformers' default is float32 whatever the model's.
    Raises:
        UsageError: bitsandbytes is not installed or does not load.
    """
    require_bitsandbytes(quantisation.bits)
    import transformers

    library: Any = transformers
    if quantisation.bits == 8:
        return library.BitsAndBytesConfig(load_in_8bit=True)
    return library.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quantisation.quant_type,
        bnb_4bit_use_double_quant=quantisation.double_quant,
        bnb_4bit_compute_dtype=compute_dtype,
    )


def require_bitsandbytes(bits: int) -> None:
    """Refuse what needs bitsandbytes where it is not.

    Args:
        bits: That weights are to be packed into, for the message.
    Raises:
        UsageError: bitsandbytes is not installed or does not load.
    """
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UsageError(f"--load-in-{bits}bit needs bitsandbytes, which is not installed", remedies=[_INSTALL])
    try:
        import bitsandbytes as bitsandbytes
    except (ImportError, OSError, RuntimeError) as error:
        raise UsageError(
            f"--load-in-{bits}bit needs bitsandbytes, which is installed but does not load",
            details=(str(error).splitlines() or [type(error).__name__])[:3],
            remedies=[_INSTALL, "python -m bitsandbytes   (says what it finds)"],
        ) from error
