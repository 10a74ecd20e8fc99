"""A causal language model on the meta device: every module, every shape and dtype, no memory.

Built by transformers' own classes, packed by bitsandbytes' own functions, so that it is the model that loading would
give, tensor by tensor.
"""

import contextlib
import warnings
from collections.abc import Generator, Iterable
from typing import Any, Final

import torch
from torch.overrides import TorchFunctionMode

from rematree.errors import UsageError
from rematree.integrations.bitsandbytes import Quantisation, quantisation_config

META: Final = torch.device("meta")
# What fills a new weight. On the meta device nothing is filled, at a third of a millisecond each.
_FILLS: Final[frozenset[Any]] = frozenset(
    {
        torch.nn.init.kaiming_uniform_,
        torch.nn.init.uniform_,
        torch.nn.init.normal_,
        torch.nn.init.constant_,
        torch.Tensor.uniform_,
        torch.Tensor.normal_,
        torch.Tensor.fill_,
        torch.Tensor.zero_,
    }
)


def build_meta_model(
    config: Any, *, dtype: torch.dtype, quantisation: Quantisation | None = None, name: str = "the model"
) -> Any:
    """The model of `config` on the meta device, in evaluation mode.

    Args:
        config: transformers' config of a causal language model.
        dtype: Of its weights.
        quantisation: Pack the linear layers as loading with bitsandbytes does.
        name: Of the model, for errors.
    Raises:
        UsageError: transformers cannot build a model of this config, or nothing in it is packed.
    Cost:
        Half a second for 80 layers.
    """
    kind = _class_for(config)
    with _quiet(), on_meta(), _default_dtype(dtype):
        try:
            model: Any = kind._from_config(config, dtype=dtype)
        except (ValueError, TypeError, KeyError, AttributeError, RuntimeError, AssertionError, ImportError) as error:
            raise UsageError(
                f"{name}: transformers cannot build this model from its config",
                details=[line.strip() for line in str(error).splitlines() if line.strip()][:3]
                or [type(error).__name__],
            ) from error
    model.eval()
    # What transformers takes in the end where the name of a class, as GPT-2's, does not end in its task: and says so.
    model.loss_type = model.loss_type or "ForCausalLM"
    if quantisation is not None:
        _pack(model, quantisation, dtype)
        if not any(_is_packed(module) for module in model.modules()):
            raise UsageError(f"--load-in-{quantisation.bits}bit: {name} has no linear layers that bitsandbytes packs")
    return model


class _Unfilled(TorchFunctionMode):
    """Leaves new tensors as they are."""

    def __torch_function__(self, func: Any, types: Iterable[Any], args: Any = (), kwargs: Any = None) -> Any:
        if func in _FILLS:
            return args[0] if args else kwargs["tensor"]
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def on_meta() -> Generator[None]:
    """What is made inside is on the meta device, and nothing is done to fill it."""
    with META, _Unfilled():
        yield


def _class_for(config: Any) -> Any:
    """The class that `AutoModelForCausalLM` would take; without importing what every kind of model needs."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    known: Any = MODEL_FOR_CAUSAL_LM_MAPPING
    kind = known[type(config)]
    return kind[0] if isinstance(kind, tuple) else kind


@contextlib.contextmanager
def _default_dtype(dtype: torch.dtype) -> Generator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def _quiet() -> Generator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _is_packed(module: Any) -> bool:
    import bitsandbytes

    return isinstance(module, bitsandbytes.nn.Linear4bit | bitsandbytes.nn.Linear8bitLt)


def _pack(model: Any, quantisation: Quantisation, dtype: torch.dtype) -> None:
    """Replace the layers that transformers' quantizer replaces, and give them what packing leaves.

    The quantizer decides which: not the output head, not what shares its weight, not stacks of experts.
    """
    config = quantisation_config(quantisation, compute_dtype=dtype)
    quantizer = _quantizer(config, quantisation.bits)
    with _quiet(), META, _default_dtype(dtype):
        quantizer.preprocess_model(model=model, device_map={"": "meta"}, dtype=dtype)
    with META, _default_dtype(torch.float32):
        _pack_weights(model)
    quantizer.postprocess_model(model)


def _quantizer(config: Any, bits: int) -> Any:
    if bits == 4:
        from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer

        return Bnb4BitHfQuantizer(config, pre_quantized=False)
    from transformers.quantizers.quantizer_bnb_8bit import Bnb8BitHfQuantizer

    return Bnb8BitHfQuantizer(config, pre_quantized=False)


def _pack_weights(model: Any) -> None:
    """Run the library's own packing of every weight: on meta tensors it is shapes and dtypes without the work."""
    import bitsandbytes.functional as functional

    library: Any = functional
    # Made on the device of the first weight it packs and kept for all later ones: it must not be the meta device.
    if "dynamic" not in library.name2qmap:
        with torch.device("cpu"):
            library.name2qmap["dynamic"] = library.create_dynamic_map()
    for module in model.modules():
        if _is_packed(module):
            module.weight._quantize(META)
            module.weight.requires_grad_(False)
            if module.bias is not None:
                module.bias.requires_grad_(True)  # as loading leaves it
