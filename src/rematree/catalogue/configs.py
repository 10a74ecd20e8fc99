"""The config of a model that is planned without its weights: from the catalogue, from a file, or from the Hub."""

import contextlib
import json
import logging
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from rematree.catalogue.shapes import find_shape, looks_like_shape, nearest_names, unknown_shape
from rematree.errors import UsageError

_CONFIG: Final = "config.json"
_WEIGHTS: Final = ("*.safetensors", "*.bin", "*.gguf", "*.pt")
# What every causal language model's config states; the rest has defaults that published configs rely on.
_NEEDED: Final = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
_FEED_FORWARD: Final = "intermediate_size"  # where a model's class has a default of its own for it
_TEXT: Final = "text_config"


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """A config that a model can be built from.

    Attributes:
        config: transformers' config object.
        source: Where it is from, for a reader.
        quantised: The stored weights' quantization_config; None for plain weights.
        notes: In what the model is not the published one.
    """

    config: Any
    source: str
    quantised: Mapping[str, Any] | None
    notes: tuple[str, ...] = ()


def needs_no_weights(spec: str) -> bool:
    """Whether `spec` names a config alone: a name of the catalogue, a config file, or a folder without weights."""
    path = Path(spec).expanduser()
    if path.is_file():
        return path.suffix == ".json"
    if path.is_dir():
        return (path / _CONFIG).is_file() and not any(any(path.glob(pattern)) for pattern in _WEIGHTS)
    shape = find_shape(spec)
    return shape is not None and not shape.is_id(spec)


def read_config(spec: str, *, revision: str | None = None) -> ModelConfig:
    """The config that `spec` names.

    Args:
        spec: Name of the catalogue, a config.json or the folder it is in, or an id on the Hub.
        revision: Branch, tag or commit; only for the Hub.
    Raises:
        UsageError: there is no such model, or its config is not one that a model can be built from; says what is
            missing.
    """
    path = Path(spec).expanduser()
    if path.is_dir():
        return _from_file(path / _CONFIG)
    if path.is_file():
        return _from_file(path)
    shape = find_shape(spec)
    if shape is not None and not (shape.partial and shape.is_id(spec)):
        notes = (shape.note,) if shape.note else ()
        return ModelConfig(_as_object(shape.config, shape.name), f"{shape.name} (config of {shape.hub})", None, notes)
    if looks_like_shape(spec):
        raise unknown_shape(spec)
    if path.is_absolute() or spec.startswith((".", "~")) or spec.count("/") > 1 or not spec.strip():
        raise UsageError(f"model {spec!r} is not there", details=[f"there is no file or folder {path}"])
    return _from_hub(spec, revision)


def _from_file(path: Path) -> ModelConfig:
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: not a config: not UTF-8 at byte {error.start}") from error
    try:
        raw: Any = json.loads(text)
    except json.JSONDecodeError as error:
        raise UsageError(f"{path}: not JSON: {error.msg} at line {error.lineno}") from error
    except RecursionError as error:
        raise UsageError(f"{path}: not a config: nested too deeply") from error
    if not isinstance(raw, dict):
        raise UsageError(f"{path}: not a config: a JSON {type(raw).__name__} where an object is needed")
    packed: Any = raw.get("quantization_config")  # pyright: ignore[reportUnknownVariableType, reportUnknownMemberType]
    if packed is not None and not isinstance(packed, dict):
        raise UsageError(f"{path}: quantization_config is {packed!r:.40}, not an object")
    return ModelConfig(_as_object(raw, str(path)), str(path), packed)  # pyright: ignore[reportUnknownArgumentType]


def _from_hub(spec: str, revision: str | None) -> ModelConfig:
    from transformers import PretrainedConfig

    library: Any = PretrainedConfig
    try:
        raw, _ = library.get_config_dict(spec, revision=revision)
    except (OSError, ValueError) as error:
        near = nearest_names(spec)
        said = (str(error).strip().splitlines() or [type(error).__name__])[0]
        details = [f"there is no such folder here, and the Hub says: {said}"]
        if near:
            details.append(f"nearest built-in names, which need no network: {', '.join(near)}")
        raise UsageError(
            f"model {spec!r} is not there", details=details, remedies=[*near[:1], "./config.json   (a file)"]
        ) from error
    return ModelConfig(_as_object(raw, spec), spec, raw.get("quantization_config"))


def _as_object(raw: Mapping[str, Any], name: str) -> Any:
    """Transformers' config of the values in `raw`, which must state what decides the size of the model."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    known: Any = CONFIG_MAPPING
    kind = raw.get("model_type")
    if not isinstance(kind, str) or not kind:
        raise UsageError(
            f"{name}: the config has no model_type, which says what kind of model it is",
            remedies=['"model_type": "llama"   (in the config)'],
        )
    if kind not in known:
        raise UsageError(f"{name}: transformers does not know model_type {kind!r}", details=_like(kind, list(known)))
    if kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise UsageError(
            f"{name}: transformers has no causal language model of type {kind!r}",
            details=["what is fine-tuned here predicts the next token"],
        )
    kind_of_config = known[kind]
    missing = _missing(raw, kind_of_config)
    if missing:
        raise UsageError(
            f"{name}: the config of a {kind} model needs {', '.join(missing)}",
            details=[f"it states: {', '.join(sorted(raw)) or 'nothing'}"],
        )
    values = {key: value for key, value in raw.items() if key not in ("model_type", "quantization_config")}
    try:
        with _without_advice():
            return kind_of_config.from_dict(values)
    except Exception as error:  # the classes check values with exceptions of their own, of several libraries
        first = [line.strip() for line in str(error).splitlines() if line.strip()][:3]
        raise UsageError(
            f"{name}: transformers does not take this config of a {kind} model", details=first or [type(error).__name__]
        ) from error


@contextlib.contextmanager
def _without_advice() -> Generator[None]:
    """Transformers says how a config should have been written, which is not for those who plan with it."""
    logger = logging.getLogger("transformers")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def _missing(raw: Mapping[str, Any], kind: Any) -> list[str]:
    """Names of fields without which the size of the model would be a guess, as `kind` spells them."""
    if _TEXT in getattr(kind, "sub_configs", {}):
        text = raw.get(_TEXT)
        if not isinstance(text, Mapping):
            return [_TEXT]
        # A published config of several parts leaves out of each what its class has as a default.
        return [f"{_TEXT}.{name}" for name in _NEEDED[:2] if name not in text]
    spelled: Mapping[str, str] = getattr(kind, "attribute_map", {})
    needed = [spelled.get(name, name) for name in _NEEDED if hasattr(kind, spelled.get(name, name))]
    default = getattr(kind, _FEED_FORWARD, None)
    if isinstance(default, int):
        needed.append(_FEED_FORWARD)
    wrong = [name for name in needed if not isinstance(raw.get(name), int)]
    return [f"{name} as an integer" if name in raw else name for name in wrong]


def _like(wanted: str, names: Sequence[str]) -> list[str]:
    import difflib

    near = difflib.get_close_matches(wanted, names, n=4, cutoff=0.6)
    return [f"nearest kinds: {', '.join(near)}"] if near else []
