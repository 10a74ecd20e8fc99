"""Make the outputs of input embeddings require a gradient, with one hook each.

The reentrant variant of checkpointing needs an input that requires a gradient, and with a frozen embedding there is
none. Nothing is trained by this: no gradient reaches the embedding's weight.

The hook does not set `requires_grad` on the output, because that would make it a leaf, and models that change their
embeddings in place fail on leaves. It adds a negative zero that requires a gradient: every number keeps its bits
(x + -0.0 is x, also for x = 0.0 and x = -0.0), and the output is an ordinary node of the graph.
"""

import contextlib
from collections.abc import Generator, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only


class InputGradHook:
    """The forward hook. Recognised by its class, so that copies which PEFT makes of an embedding lose theirs as well.

    Args:
        temporary: Belongs to a checkpointing switch and goes when that is switched off.
    """

    def __init__(self, *, temporary: bool) -> None:
        self.temporary = temporary

    def __call__(self, module: nn.Module, args: object, output: object) -> object:
        return tree_map_only(Tensor, require_grad, output)


def require_grad(x: Tensor) -> Tensor:
    """`x` with the same values, requiring a gradient; `x` itself where it does, cannot, or no graph is recorded.

    Cost: one copy of `x`.
    """
    if x.requires_grad or not torch.is_grad_enabled() or not (x.is_floating_point() or x.is_complex()):
        return x
    return x + torch.full((), -0.0, dtype=x.dtype, device=x.device, requires_grad=True)


def input_embeddings(model: nn.Module) -> Iterator[nn.Module]:
    """The input embeddings of `model` and of every tower inside it, each once."""
    seen: set[int] = set()
    for module in model.modules():
        get = getattr(module, "get_input_embeddings", None)
        if not callable(get):
            continue
        try:
            embedding = get()
        except NotImplementedError:  # transformers: this tower has none
            continue
        if isinstance(embedding, nn.Module) and id(embedding) not in seen:
            seen.add(id(embedding))
            yield embedding


def add_input_grad_hooks(model: nn.Module, *, temporary: bool) -> int:
    """Put one hook on every input embedding that has none, of this library or of transformers.

    Returns:
        How many embeddings there are.
    """
    foreign = _hooks_of_transformers(model)
    count = 0
    for embedding in input_embeddings(model):
        count += 1
        # An adapter may wrap an embedding that has the hook; then the hook runs inside the wrapper.
        if not any(_own_hooks(part) or foreign & part._forward_hooks.keys() for part in embedding.modules()):
            embedding.register_forward_hook(InputGradHook(temporary=temporary))
    return count


def remove_input_grad_hooks(model: nn.Module, *, temporary: bool) -> None:
    """Take hooks of this library off `model`, wherever copies of modules have carried them."""
    for module in model.modules():
        for key, hook in _own_hooks(module).items():
            if hook.temporary == temporary:
                del module._forward_hooks[key]


def remove_hooks_of_transformers(model: nn.Module) -> None:
    """Take transformers' own hooks off every embedding, also those whose handles it has lost."""
    for module in model.modules():
        if module.__dict__.get("_require_grads_hooks"):
            disable: Any = module
            disable.disable_input_require_grads()
        for key in [key for key, hook in module._forward_hooks.items() if _is_forgotten_by_transformers(hook)]:
            del module._forward_hooks[key]


@contextlib.contextmanager
def as_leaves(model: nn.Module) -> Generator[None]:
    """The outputs of frozen input embeddings require a gradient inside, as transformers' own hook makes them.

    They are leaves, so each holds its gradient until the graph is gone.
    """

    def hook(module: nn.Module, args: object, output: object) -> object:
        return tree_map_only(Tensor, lambda x: x if x.requires_grad else x.requires_grad_(True), output)

    handles = [
        embedding.register_forward_hook(hook)
        for embedding in input_embeddings(model)
        if not any(p.requires_grad for p in embedding.parameters())
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class SuspendedInputGrads:
    """The hooks of a model's embeddings off, this library's and transformers', until `resume()`.

    Under a plan nothing needs them: a region that has something to train builds its graph by itself. With them,
    backward goes through every layer, also where nothing below is trained.
    """

    def __init__(self, model: nn.Module) -> None:
        self._before: list[tuple[nn.Module, dict[int, Any]]] = []
        foreign = _hooks_of_transformers(model)
        for module in model.modules():
            hooks = module._forward_hooks
            mine = {
                key: hook
                for key, hook in hooks.items()
                if isinstance(hook, InputGradHook) or key in foreign or _is_forgotten_by_transformers(hook)
            }
            if mine:
                self._before.append((module, dict(hooks)))
                for key in mine:
                    del hooks[key]

    def resume(self) -> None:
        """Put them back in their old order. Does nothing the second time."""
        for module, old in self._before:
            added = {key: hook for key, hook in module._forward_hooks.items() if key not in old}
            module._forward_hooks.clear()
            module._forward_hooks.update({**old, **added})
        self._before.clear()


def _is_forgotten_by_transformers(hook: object) -> bool:
    """Transformers loses the handles of earlier hooks each time it adds one."""
    name = getattr(hook, "__qualname__", "")
    return name == "PreTrainedModel.enable_input_require_grads.<locals>.make_inputs_require_grads"


def _own_hooks(module: nn.Module) -> dict[int, InputGradHook]:
    return {key: hook for key, hook in module._forward_hooks.items() if isinstance(hook, InputGradHook)}


def _hooks_of_transformers(model: nn.Module) -> set[int]:
    handles = [handle for module in model.modules() for handle in module.__dict__.get("_require_grads_hooks", ())]
    return {handle.id for handle in handles}
