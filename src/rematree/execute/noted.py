"""What a block of a group was called with, without its tensors: each is a link to what made it, or is kept."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Self, cast

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from rematree.errors import RecomputeMismatchError

Hooks = tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]]


class Link(NamedTuple):
    """An argument that an earlier call of the group returned."""

    call: int
    leaf: int


@dataclass(frozen=True, slots=True)
class Kept:
    """A tensor that is kept: detached, because what made it may hold what keeps it; but a weight as it is."""

    packed: Any
    unpack: Callable[[Any], Tensor] | None  # of the hooks around the group
    version: int | None
    requires_grad: bool
    is_leaf: bool
    is_weight: bool = False

    @classmethod
    def of(cls, tensor: Tensor, hooks: Hooks | None) -> Self:
        """`tensor`, by the hooks around the group if there are any."""
        like = tensor.requires_grad, tensor.is_leaf
        if is_weight(tensor):  # what is saved of it in a rerun must be told for a weight's again
            return cls(tensor, None, version_of(tensor), *like, True)
        if hooks is None:
            return cls(tensor.detach(), None, version_of(tensor), *like)
        return cls(hooks[0](tensor.detach()), hooks[1], None, *like)

    def again(self, region: str) -> Tensor:
        """A tensor with its values, a leaf if it was one: autocast, and adapters beside it, treat leaves differently.

        Raises:
            RecomputeMismatchError: it was written to since the forward.
        """
        tensor: Tensor = self.packed if self.unpack is None else self.unpack(self.packed)
        if self.version is not None and version_of(tensor) != self.version:
            raise RecomputeMismatchError(
                f"{region}: an argument of shape {tuple(tensor.shape)} was modified in place after the "
                "forward pass; running the region again would use other values",
                remedies=["pass a copy to the model, or write to it after backward"],
            )
        if self.is_weight:
            return tensor
        given = tensor.detach().requires_grad_(self.requires_grad)
        return given.view_as(given) if self.requires_grad and not self.is_leaf else given


def mapped(value: Any, change: Callable[[Any], Any]) -> Any:
    """`value` with its items changed, if it is a plain container; else itself."""
    if isinstance(value, tuple):
        items = [change(item) for item in cast("tuple[Any, ...]", value)]
        return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
    if type(value) is list:
        return [change(item) for item in cast("list[Any]", value)]
    if type(value) is dict:
        return {key: change(item) for key, item in cast("dict[Any, Any]", value).items()}
    return value


def tensors_of(value: Any) -> list[Tensor]:
    """The tensors in what a block returned, in their order."""
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


def version_of(tensor: Tensor) -> int:
    """Counts writes; inference tensors have no counter."""
    return -1 if tensor.is_inference() else tensor._version


def is_weight(tensor: Tensor) -> bool:
    """Whether holding `tensor` keeps nothing alive that would go otherwise."""
    return isinstance(tensor, nn.Parameter) or isinstance(tensor._base, nn.Parameter)


def check_version(tensor: Tensor, version: int | None) -> Tensor:
    """`tensor`, if nothing has written to it since it was at `version`; autograd's own check is off under hooks.

    Raises:
        RuntimeError: something has.
    """
    if version_of(tensor) != version:
        raise RuntimeError(
            "one of the variables needed for gradient computation has been modified by an inplace operation: "
            f"tensor of shape {tuple(tensor.shape)} is at version {tensor._version}, saved at {version}"
        )
    return tensor
