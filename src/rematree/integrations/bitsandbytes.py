"""Load a model with its linear layers packed by bitsandbytes: 4 bits a weight (NF4, FP4) or 8 (LLM.int8).

bitsandbytes is optional. Layers that are already packed are recognised in `rematree.quantised` without it.
"""

import importlib.util
from typing import Any, Final

import torch

from rematree.errors import UsageError

_INSTALL: Final = 'pip install "bitsandbytes>=0.46"'


def quantisation_config(bits: int, *, quant_type: str, double_quant: bool, compute_dtype: torch.dtype) -> Any:
    """The `BitsAndBytesConfig` to pass to `from_pretrained(..., quantization_config=)`.

    Args:
        bits: 4 or 8.
        quant_type: "nf4" or "fp4"; of 4 bits.
        double_quant: Pack the scales too (QLoRA's double quantisation); of 4 bits.
        compute_dtype: What 4-bit weights are unpacked to. The model's own dtype: another one adds two copies of every
            linear layer's input and output, and transformers' default is float32 whatever the model's.
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
    import transformers

    library: Any = transformers
    if bits == 8:
        return library.BitsAndBytesConfig(load_in_8bit=True)
    return library.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quant_type,
        bnb_4bit_use_double_quant=double_quant,
        bnb_4bit_compute_dtype=compute_dtype,
    )
