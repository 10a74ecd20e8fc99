"""The tree of regions of a model: blocks, and the named calls inside a block.

A region is a named call that is saved or recomputed as one. Its name is the module path ("model.layers.3.mlp.up_proj").
Two kinds of region are functions, not modules: the attention core, named after its attention module plus "#attention",
and the drawing of a dropout mask, named after its dropout module plus "#draw".
"""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from torch import nn

from rematree.errors import PlanMismatchError
from rematree.plans import Action, Decision

ATTENTION_SUFFIX: Final = "#attention"
DRAW_SUFFIX: Final = "#draw"

# Containers have no forward of their own; an Identity saves nothing and costs nothing.
_NEVER_CALLED: Final = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict, nn.Identity)
_SIMPLE: Final = (int, float, str, bool, type(None))
# Differ between otherwise identical blocks without changing what they compute or save.
POSITIONAL_ATTRIBUTES: Final = frozenset({"layer_idx", "layer_id", "layer_number", "training"})


@dataclass(frozen=True, slots=True)
class Chain:
    """The blocks of a model in the order they run.

    Attributes:
        blocks: Module paths.
        container: Path of the `ModuleList` that holds them all, or None.
        note: What the user should know about how they were found, or "".
    """

    blocks: tuple[str, ...]
    container: str | None
    note: str = ""


def unwrap(model: nn.Module) -> nn.Module:
    """The innermost model: what PEFT wraps, or `model` itself."""
    get_base_model = getattr(model, "get_base_model", None)
    return get_base_model() if callable(get_base_model) else model  # pyright: ignore[reportReturnType]


def find_chain(model: nn.Module, without: Collection[str] = ()) -> Chain:
    """The repeated layers of `model`.

    The longest `ModuleList` of the model whose elements are all layers of one kind of class wins, measured in
    parameters, so that a vision tower of a larger language model does not. Without any, the regions are the children of
    the first module that has more than one: coarser, but still a chain.

    Args:
        model: Looked through.
        without: Paths of lists that are out of the question.
    """
    lists: list[tuple[int, int, str, nn.ModuleList]] = []
    for path, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) > 0:
            if path and _inside_block(path, lists):
                continue
            size = sum(p.numel() for p in module.parameters())
            lists.append((size, len(module), path, module))
    lists = [item for item in lists if item[1] >= 2 or is_checkpointing_layer(item[3][0])]
    lists = [item for item in lists if item[2] not in without]
    if lists:
        _, _, path, module = max(lists, key=lambda item: (item[0], item[1]))
        blocks = tuple(f"{path}.{i}" if path else str(i) for i in range(len(module)))
        return Chain(blocks, path if stands_alone(model, path) else None)
    prefix, root = "", model
    children = _called_children(root)
    while len(children) == 1:
        name, root = children[0]
        prefix = f"{prefix}{name}."
        children = _called_children(root)
    if not children:
        note = "no block list found and nothing inside the model to split: the whole model is one region"
        return Chain((prefix.rstrip("."),), None, note)
    note = f"no block list found: falling back to {len(children)} coarser regions, the children of {prefix or 'model'}"
    return Chain(tuple(prefix + name for name, _ in children), None, note.rstrip("."))


def stands_alone(model: nn.Module, container: str) -> bool:
    """Whether no list of as many modules is beside the one at `container`: XLM goes through four, place by place."""
    parent = model.get_submodule(container.rpartition(".")[0])
    length = len(model.get_submodule(container)._modules)
    lists = [child for child in parent.children() if isinstance(child, nn.ModuleList) and len(child) == length]
    return len(lists) == 1


def _inside_block(path: str, lists: list[tuple[int, int, str, nn.ModuleList]]) -> bool:
    return any(path.startswith(other + ".") for _, _, other, _ in lists)


def is_checkpointing_layer(module: nn.Module) -> bool:
    """Whether `module` is one of the layers that transformers can checkpoint."""
    return any(base.__name__ == "GradientCheckpointingLayer" for base in type(module).__mro__)


def _called_children(module: nn.Module) -> list[tuple[str, nn.Module]]:
    return [(name, child) for name, child in module.named_children() if not isinstance(child, _NEVER_CALLED)]


def inner_regions(block: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Relative path and module of every candidate region inside `block`, parents before children."""
    for path, module in block.named_modules():
        if path and not isinstance(module, _NEVER_CALLED):
            yield path, module


def split_function(path: str) -> tuple[str, str]:
    """(module path, suffix) of a region; the suffix of a module's own region is ""."""
    module, mark, function = path.partition("#")
    return module, mark + function


def parent_path(path: str) -> str:
    """Path of the enclosing region; "" is the root."""
    module, suffix = split_function(path)
    return module if suffix else path.rpartition(".")[0]


def join_path(block: str, region: str) -> str:
    """Full path of a region given relative to its block."""
    return block + region if region.startswith("#") or not region or not block else f"{block}.{region}"


def block_kind(block: nn.Module) -> tuple[Any, ...]:
    """A hashable description; blocks with equal descriptions save and compute the same.

    It holds every submodule's class and simple attributes (sizes, dropout, window, attention type) and every
    parameter's name, shape, dtype and whether it is trained.
    """
    parts: list[Any] = []
    for path, module in block.named_modules():
        attributes = tuple(
            sorted(
                (name, repr(value))
                for name, value in module.__dict__.items()
                if isinstance(value, _SIMPLE) and name not in POSITIONAL_ATTRIBUTES
            )
        )
        parts.append((path, type(module).__qualname__, attributes))
    parts.extend((name, tuple(p.shape), p.dtype, p.requires_grad) for name, p in block.named_parameters())
    parts.extend((name, tuple(b.shape), b.dtype) for name, b in block.named_buffers())
    return tuple(parts)


def effective_action(decisions: Mapping[str, Decision], path: str) -> Action:
    """The action a region inherits: its own, or that of the nearest named region around it; the root saves."""
    while path:
        if path in decisions:
            return decisions[path].action
        path = parent_path(path)
    return decisions[""].action if "" in decisions else Action.SAVE


def find_module(model: nn.Module, path: str) -> nn.Module:
    """The submodule at `path`.

    Raises:
        PlanMismatchError: the model has none.
    """
    try:
        return model.get_submodule(path)
    except AttributeError as error:
        raise PlanMismatchError(f"the plan names {path}, which this model does not have") from error
