"""Convert a GGUF file once, and find the converted copy again.

Reading the vocabulary and dequantising the weights of a GGUF file takes half a minute, and the model that comes out
counts as quantised although its weights are plain. The copy is an ordinary model directory that loads in a second.
"""

import errno
import hashlib
import os
import shutil
import struct
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError

from rematree.errors import UsageError
from rematree.finetune.storage import apply_umask, beside

_LAYOUT: Final = 1
# What a reader of a damaged file stumbles over: wrong counts, offsets behind the end, text that is not text.
_UNREADABLE: Final = (ValueError, KeyError, IndexError, OverflowError, TypeError, RuntimeError, struct.error)


def cache_dir() -> Path:
    """$REMATREE_CACHE, or `rematree` in the user's cache directory."""
    named = os.environ.get("REMATREE_CACHE")
    if named:
        return Path(named).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "rematree"


def converted_copy(path: Path, dtype: torch.dtype) -> Path:
    """Directory with the model and tokenizer of the GGUF file at `path`, in `dtype`.

    The copy is keyed by the file's place, size and time of change. It appears under its name in one rename, so that a
    killed conversion leaves nothing that looks finished.

    Raises:
        UsageError: the file is corrupt, or the cache directory cannot be written.
    """
    import transformers

    path = path.resolve()
    stat = path.stat()
    key = f"{_LAYOUT}|{path}|{stat.st_size}|{stat.st_mtime_ns}|{dtype}|{transformers.__version__}"
    target = cache_dir() / f"{path.stem}-{hashlib.sha256(key.encode()).hexdigest()[:16]}"
    if target.is_dir():
        return target
    _check(path)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        staging = beside(target)
        staging.mkdir()
    except OSError as error:
        raise _not_writable(target.parent, error) from error
    try:
        model, tokenizer = _read(path, dtype)
        _write(model, tokenizer, staging)
        apply_umask(staging)
        _publish(staging, target)
    except (OSError, SafetensorError) as error:  # the second is how the writer of the weights says "disk full"
        raise _not_writable(target.parent, error) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return target


def _check(path: Path) -> None:
    """Read the file's directory: magic, version, and that every tensor lies inside the file."""
    from gguf import GGUFReader

    with path.open("rb") as file:
        magic = file.read(4)
    if magic != b"GGUF":
        raise UsageError(
            f"{path} is corrupt: a GGUF file starts with the bytes 'GGUF', this one with {magic!r}",
            remedies=["get the file again"],
        )
    try:
        GGUFReader(path)
    except _UNREADABLE as error:
        raise _corrupt(path, error) from error


def _read(path: Path, dtype: torch.dtype) -> tuple[Any, Any]:
    import transformers

    library: Any = transformers
    where = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    try:
        tokenizer = library.AutoTokenizer.from_pretrained(**where)
        model = library.AutoModelForCausalLM.from_pretrained(**where, dtype=dtype)
    except _UNREADABLE as error:
        raise _corrupt(path, error) from error
    return model, tokenizer


def _write(model: Any, tokenizer: Any, folder: Path) -> None:
    from safetensors.torch import save_model

    # model.save_pretrained refuses: it takes a model read from GGUF for one whose weights are still quantised.
    config = model.config
    del config.quantization_config
    config.save_pretrained(folder)
    if model.generation_config is not None:
        model.generation_config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    save_model(model, str(folder / "model.safetensors"), metadata={"format": "pt"})


def _publish(staging: Path, target: Path) -> None:
    try:
        staging.rename(target)
    except OSError as error:
        # Another process has converted the same file in the meantime; its copy is as good.
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise


def _corrupt(path: Path, error: Exception) -> UsageError:
    return UsageError(
        f"{path} is corrupt: its contents end early or make no sense ({path.stat().st_size} bytes)",
        details=[f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"],
        remedies=["get the file again"],
    )


def _not_writable(folder: Path, error: Exception) -> UsageError:
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return UsageError(
        f"a converted copy of the model cannot be kept in {folder}: {reason}",
        remedies=["REMATREE_CACHE=/a/directory/with/room rematree ..."],
    )
