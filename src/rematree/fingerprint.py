"""What a plan holds for: digests of a model, its trainable set, its dropout, and the shape of a batch."""

import hashlib
import platform
from collections.abc import Iterable, Mapping
from typing import Any, Final

import torch
import transformers
from torch import nn

from rematree.engines import own_class, whole_shape
from rematree.plans import Fingerprint
from rematree.quantised import describe_packing, recast_biases
from rematree.regions import unwrap

# Of packed sequences, for attention over them: a number for each sequence, whatever fits between two of them.
_OFFSETS: Final = frozenset({"cu_seq_lens_q", "cu_seq_lens_k"})
_LIBRARIES: Final = frozenset({"torch", "transformers", "peft", "accelerate", "deepspeed", "rematree"})


def _digest(lines: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def dtype_name(dtype: torch.dtype) -> str:
    """Without the module: "bfloat16"."""
    return str(dtype).removeprefix("torch.")


def describe_batch(batch: Mapping[str, Any]) -> tuple[tuple[str, tuple[int, ...], str], ...]:
    """(name, shape, dtype) of every tensor in `batch`, by name.

    Scalars such as `num_items_in_batch` do not count, and offsets of packed sequences, of which there are as many as
    there happen to be sequences.
    """
    return tuple(
        (name, tuple(value.shape), dtype_name(value.dtype))
        for name, value in sorted(batch.items())
        if isinstance(value, torch.Tensor) and value.dim() > 0 and name not in _OFFSETS
    )


def has_hooks(module: nn.Module) -> bool:
    """Whether a hook of the user's runs around the forward of `module`, and may read what it is given or returns.

    Those of the libraries gather weights, put other arguments in, or collect what a forward returns, and not where it
    runs again.
    """
    if not module._forward_hooks and not module._forward_pre_hooks:
        return False
    hooks: list[Any] = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
    owners = (getattr(getattr(hook, "func", hook), "__module__", None) or "" for hook in hooks)
    return any(owner.partition(".")[0] not in _LIBRARIES for owner in owners)


def left_out(batch: Mapping[str, Any]) -> tuple[str, ...]:
    """Names of the tensors that transformers looks into, finds that they change nothing, and leaves out.

    A mask of ones, without positions that would tell several sequences of a row apart; and positions that count one
    sequence, without a mask. With anything else there is a mask of tokens x tokens, and another attention kernel.

    Cost:
        Waits for a device that holds the batch.
    """
    mask, positions = batch.get("attention_mask"), batch.get("position_ids")
    names: list[str] = []
    if isinstance(positions, torch.Tensor) and mask is None and positions.dim() == 2 and not positions.is_meta:
        plain = torch.arange(positions.shape[1], device=positions.device).expand_as(positions)
        if torch.equal(positions, plain.to(positions.dtype)):
            names.append("position_ids")
    if isinstance(mask, torch.Tensor) and positions is None and not mask.is_meta and bool((mask == 1).all()):
        names.append("attention_mask")
    return tuple(sorted(names))


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
        hooked=tuple(path for path, module in model.named_modules() if has_hooks(module)),
    )


def versions() -> dict[str, str]:
    """What a plan was made with."""
    return {"torch": torch.__version__, "transformers": transformers.__version__, "python": platform.python_version()}
