"""Which of a model's listed blocks run in a step, and in which order."""

import functools
from collections.abc import Mapping
from typing import Any

import torch

from rematree.errors import UnsupportedModelError
from rematree.execute.override import ForwardOverride
from rematree.observation.observe import Twin
from rematree.regions import Chain
from rematree.table import fold_paths


def running_chain(twin: Twin, chain: Chain, kinds: Mapping[str, int]) -> Chain:
    """The chain without blocks that do not run exactly once, in the order they run.

    Args:
        twin: Model and batch under fake tensors.
        chain: The blocks as they are listed.
        kinds: A number for each; of equal ones only the first is run.
    Raises:
        UnsupportedModelError: none of them runs exactly once.
    """
    model = twin.model
    calls: dict[str, int] = {}
    outputs: dict[int, Any] = {}

    def around(path: str, kind: int, inner: Any, *args: Any, **kwargs: Any) -> Any:
        calls[path] = calls.get(path, 0) + 1
        if kind not in outputs:
            outputs[kind] = inner(*args, **kwargs)
        return outputs[kind]  # an equal block's output is as good; nothing is computed from it

    overrides = [
        ForwardOverride(model.get_submodule(path), functools.partial(around, path, kind))
        for path, kind in kinds.items()
    ]
    try:
        with twin.mode, torch.no_grad():
            twin.loss()
    finally:
        for override in overrides:
            override.remove()
    order = [path for path in calls if calls[path] == 1]
    if not order:
        raise UnsupportedModelError("none of the model's blocks runs exactly once in a step")
    if tuple(order) == chain.blocks:
        return chain
    left = [path for path in chain.blocks if path not in order]
    said = "the blocks do not run in the order of their list"
    if left:
        said = f"planned as saved, because they do not run exactly once in a step: {', '.join(fold_paths(left))}"
    return Chain(tuple(order), None, "; ".join(note for note in (chain.note, said) if note))
