"""What a plan holds for: digests of a model, its trainable set, its dropout, and the shape of a batch."""

import hashlib
import platform
from collections.abc import Iterable, Mapping
from typing import Any

import torch
import transformers
from torch import nn

from rematree.engines import own_class, whole_shape
from rematree.plans import Fingerprint
from rematree.quantised import describe_packing, recast_biases
from rematree.regions import unwrap


def _digest(lines: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def dtype_name(dtype: torch.dtype) -> str:
    """Without the module: "bfloat16"."""
    return str(dtype).removeprefix("torch.")


def describe_batch(batch: Mapping[str, Any]) -> tuple[tuple[str, tuple[int, ...], str], ...]:
    """(name, shape, dtype) of every tensor in `batch`, by name. Scalars such as `num_items_in_batch` do not count."""
    return tuple(
        (name, tuple(value.shape), dtype_name(value.dtype))
        for name, value in sorted(batch.items())
        if isinstance(value, torch.Tensor) and value.dim() > 0
    )


def describe_model(model: nn.Module) -> Fingerprint:
    """Fingerprint of `model` with an empty batch. Reads names, shapes and dtypes only; no weight is touched.

    Sharded parameters count as the whole they are part of: it is the same on all ranks, and as before sharding.
    """
    named = list(model.named_parameters()) + list(model.named_buffers())
    recast = recast_biases(model)
    shapes = [f"{name} {tuple(whole_shape(t))} {'' if name in recast else t.dtype}" for name, t in named]
    shapes += describe_packing(model)
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    dropout = [f"{path} {m.p}" for path, m in model.named_modules() if isinstance(m, nn.modules.dropout._DropoutNd)]
    inner = unwrap(model)
    name: str | None = getattr(getattr(inner, "config", None), "_attn_implementation", None)
    device = next((t.device.type for _, t in named), "cpu")
    return Fingerprint(
        model_class=own_class(inner).__name__,
        parameters=_digest(shapes),
        trainable=_digest(trainable),
        dropout=_digest(dropout),
        batch=(),
        device=device,
        attention="" if name is None else name.removeprefix("rematree:"),
    )


def versions() -> dict[str, str]:
    """What a plan was made with."""
    return {"torch": torch.__version__, "transformers": transformers.__version__, "python": platform.python_version()}
