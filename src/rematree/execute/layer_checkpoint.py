"""`torch.utils.checkpoint` around one layer, such that the rerun sees the world of the forward pass.

Plain checkpointing reruns a layer with whatever is active at backward time: another adapter, another training flag,
another random state. Here each call of a layer keeps a `World` and the rerun happens inside it, with either variant of
`torch.utils.checkpoint`. This is done in the function that is checkpointed and not in `context_fn`, because
`debug=True` and the reentrant variant allow no `context_fn`.

The reentrant variant gets back what it loses by its design: it sees gradients only for tensors among its positional
arguments, and only if at least one of them needs one. Keyword arguments and nested tensors become positional here, and
where only the layer's own parameters train, a scalar that needs a gradient is added to the arguments.

Not covered: under `torch.compile` the layer is handed to torch's checkpoint as it is; dynamo traces no world. Without
`preserve_rng_state`, random state is kept for the CPU and the current CUDA device.
"""

import contextlib
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Final, Self, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten
from torch.utils.checkpoint import checkpoint

from rematree.errors import UnsupportedModelError, UsageError
from rematree.execute.arguments import Arguments, is_cache
from rematree.execute.context import Known, World, builds_graph
from rematree.execute.input_grads import require_grad
from rematree.execute.random_state import RandomState
from rematree.execute.routing import Routing

_DETERMINISM: Final = ("default", "none")


@dataclass(frozen=True, slots=True)
class CheckpointOptions:
    """What the user asked for, checked.

    Attributes:
        use_reentrant: Which of torch's two variants.
        preserve_rng_state: Torch saves and restores random state around every layer. If False, the state is kept only
            for layers that drew random numbers, so the gradients are the same: it is never dropout against speed.
        determinism_check: "default" compares shapes, dtypes and devices of the rerun with the forward's; "none" does
            not. Non-reentrant only.
        context_fn: Returns the two contexts to run the forward and the rerun in. Non-reentrant only.
        debug: A mismatch error lists the operators of both runs. Non-reentrant only.
        early_stop: The rerun ends at the last tensor that backward needs. Non-reentrant only.
        every_n_layers: Of each list of blocks, only the first of every n is recomputed.
    """

    use_reentrant: bool = False
    preserve_rng_state: bool = True
    determinism_check: str = "default"
    context_fn: Callable[[], tuple[Any, Any]] | None = None
    debug: bool = False
    early_stop: bool = True
    every_n_layers: int = 1

    @classmethod
    def parse(cls, kwargs: Mapping[str, Any] | None, every_n_layers: int = 1) -> Self:
        """Check the keyword arguments of a checkpointing call; None and `{}` are the non-reentrant default.

        Raises:
            UsageError: an unknown name, a wrong value, or two that torch does not combine.
        """
        given: dict[str, Any] = {} if kwargs is None else dict(kwargs)
        known = [field.name for field in fields(cls)]
        unknown = sorted(given.keys() - set(known))
        if unknown:
            raise UsageError(f"unknown checkpointing argument {unknown[0]!r}; it can be one of {', '.join(known)}")
        if every_n_layers != 1 and given.get("every_n_layers", every_n_layers) != every_n_layers:
            raise UsageError(f"every_n_layers is given twice: {every_n_layers} and {given['every_n_layers']}")
        options = replace(cls(every_n_layers=every_n_layers), **given)
        options._check()
        return options

    def _check(self) -> None:
        n = self.every_n_layers
        if not isinstance(n, int) or isinstance(n, bool) or n < 1:  # pyright: ignore[reportUnnecessaryIsInstance]
            raise UsageError(f"every_n_layers is {n!r}; it must be a positive whole number, 1 for every layer")
        for name in ("use_reentrant", "preserve_rng_state", "debug", "early_stop"):
            value = getattr(self, name)
            if not isinstance(value, bool):
                raise UsageError(f"{name} is {value!r}; it must be True or False")
        if self.determinism_check not in _DETERMINISM:
            raise UsageError(
                f"determinism_check is {self.determinism_check!r}; it can be {' or '.join(map(repr, _DETERMINISM))}"
            )
        if self.use_reentrant and (self.context_fn is not None or self.debug):
            name = "debug" if self.context_fn is None else "context_fn"
            raise UsageError(f"{name} needs use_reentrant=False; torch's reentrant variant does not have it")
        if self.debug and self.context_fn is not None:
            raise UsageError("debug=True and context_fn exclude each other in torch.utils.checkpoint")

    def shown(self) -> dict[str, Any]:
        """`use_reentrant`, and what differs from the defaults."""
        default = CheckpointOptions()
        names = [field.name for field in fields(self) if field.name != "every_n_layers"]
        changed = {name: getattr(self, name) for name in names if getattr(self, name) != getattr(default, name)}
        return {"use_reentrant": self.use_reentrant, **changed}

    def run(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """`function(*args, **kwargs)` under torch's checkpoint with these options."""
        if self.use_reentrant:
            return checkpoint(function, *args, use_reentrant=True, preserve_rng_state=self.preserve_rng_state)
        contexts = {} if self.context_fn is None else {"context_fn": self.context_fn}
        return checkpoint(
            function,
            *args,
            use_reentrant=False,
            preserve_rng_state=self.preserve_rng_state,
            determinism_check=self.determinism_check,
            debug=self.debug,
            early_stop=self.early_stop,
            **contexts,
            **kwargs,
        )


class LayerCheckpoint:
    """What transformers calls as `_gradient_checkpointing_func(function, *args)` on one module.

    It holds the module and no closure, so that `copy.deepcopy(model)` gives the copy checkpoints of its own.

    Args:
        region: The module's path, for messages.
        module: Whose layers are recomputed: the layer itself, or a model that calls its layers through this.
        options: How.
    """

    def __init__(self, region: str, module: nn.Module, options: CheckpointOptions) -> None:
        self.region = region
        self.options = options
        self._module = module
        self._known: WeakKeyDictionary[nn.Module, Known] = WeakKeyDictionary()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_known": None}  # a copy finds out for itself; weak references cannot be pickled

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        self.__dict__.update(state)
        self._known = WeakKeyDictionary()

    def __call__(self, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return self.options.run(function, args, kwargs)
        if isinstance(function, functools.partial):  # transformers binds the layer and the keyword arguments
            partial = cast("functools.partial[Any]", function)
            args, kwargs = (*partial.args, *args), {**partial.keywords, **kwargs}
            function = partial.func
        layer = next((x for x in (getattr(function, "__self__", None), *args[:1]) if isinstance(x, nn.Module)), None)
        module = self._module if layer is None else layer
        if not builds_graph(module, args, kwargs):
            return function(*args, **kwargs)
        known = self._known.get(module)
        if known is None:
            known = self._known[module] = Known(module)
        world = World(module, [], known)
        call = _Call(function, self.region, world, known, keeps_random=not self.options.preserve_rng_state)
        if known.routes:
            call.routing = Routing()
        if self.options.use_reentrant:
            kwargs = _without_cache(self.region, kwargs)
        arguments = Arguments(self.region, args, kwargs)
        if self.options.use_reentrant:
            out = _Reentrant(call, args, kwargs).run(self.options)
            arguments.refuse_outputs_in(args, kwargs)
        else:
            call.arguments = arguments
            first = [kwargs]  # not held by the graph: a cache among them would hold the graph, for ever
            out = self.options.run(lambda *args: call(*args, **(first.pop() if first else {})), args, {})
        _end_peft_hooks(module)
        return out


def _without_cache(region: str, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """`kwargs` for the reentrant variant: it gives no gradient to what a layer puts into a cache."""
    caches = {name: value for name, value in kwargs.items() if is_cache(value)}
    filled = [name for name, cache in caches.items() if cache.get_seq_length() > 0]
    if filled:
        raise UnsupportedModelError(
            f"{region}: {filled[0]} holds tokens, and reentrant checkpointing cannot train through a key-value cache",
            remedies=['gradient_checkpointing_kwargs={"use_reentrant": False}'],
        )
    return {**kwargs, **dict.fromkeys(caches)}


def _end_peft_hooks(module: nn.Module) -> None:
    """Take off the hooks with which PEFT carries offsets of activated LoRA into a rerun, and then forbids a second one.

    They are not needed: the rerun finds the hooks of the forward. PEFT's list of them is what it looks at.
    """
    hooks: list[Any] = getattr(module, "_peft_gradient_checkpointing_forward_hooks", [])
    while hooks:
        hooks.pop().remove()


class _Call:
    """One call of a layer: plain the first time, in the world of that first time whenever it is run again.

    Attributes:
        arguments: To run it again with; None: with what is given then.
        routing: Its choices of experts.
        rerun: The first time is over.
    """

    def __init__(
        self, function: Callable[..., Any], region: str, world: World, known: Known, *, keeps_random: bool
    ) -> None:
        self._function = function
        self._region = region
        self._world = world
        self._known = known
        self._keeps_random = keeps_random
        self._random: RandomState | None = None
        self.arguments: Arguments | None = None
        self.routing: Routing | None = None
        self.rerun = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.rerun:
            return self._again(args, kwargs)
        self.rerun = True
        looks = self._known.draws_on_host is not False  # for torch's generators torch itself may look
        before = RandomState.now(host=looks) if self._keeps_random or looks else None
        with contextlib.nullcontext() if self.routing is None else self.routing.recorded():
            out = self._function(*args, **kwargs)
        after = None if before is None else RandomState.now(host=looks)
        if before is not None and after is not None:
            if not before.same_as(after):
                self._random = before
            if self._known.draws_on_host is None:
                self._known.draws_on_host = before.drew_on_host(after)
        self._world.settle()
        return out

    def _again(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        if self.arguments is not None:
            args, kwargs = self.arguments.again(args)
        routed = contextlib.nullcontext() if self.routing is None else self.routing.replayed(self._region)
        with self._world.restored(self._region), routed:
            if self._random is None:
                return self._function(*args, **kwargs)
            present = RandomState(host=self._random.has_host)
            self._random.restore()
            try:
                return self._function(*args, **kwargs)
            finally:
                present.restore()


class _Reentrant:
    """One call under the reentrant variant, with every tensor of its arguments and results in view of autograd."""

    def __init__(self, call: _Call, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        self._call = call
        # The forward gets the caller's own containers: a list that the layer fills must be the caller's.
        self._given: tuple[tuple[Any, ...], Mapping[str, Any]] | None = (args, kwargs)
        self._leaves, self._inputs = tree_flatten((args, dict(kwargs)))
        self._outputs: TreeSpec | None = None

    def run(self, options: CheckpointOptions) -> Any:
        tensors = [leaf for leaf in self._leaves if isinstance(leaf, Tensor)]
        device = tensors[0].device if tensors else None
        wanted = any(tensor.requires_grad for tensor in tensors)
        tie = None if wanted else torch.zeros((), device=device, requires_grad=True)
        leaves, self._leaves = self._leaves, []
        flat = options.run(self._flat, (tie, *leaves), {})
        assert self._outputs is not None
        return tree_unflatten(list(flat), self._outputs)

    def _flat(self, _tie: Tensor | None, *leaves: Any) -> tuple[Any, ...]:
        rerun = self._call.rerun
        if self._given is not None:
            (args, kwargs), self._given = self._given, None
        else:
            args, kwargs = tree_unflatten(list(leaves), self._inputs)
        flat, spec = tree_flatten(self._call(*args, **kwargs))
        if not rerun:
            self._outputs = spec
        elif not any(isinstance(leaf, Tensor) and leaf.requires_grad for leaf in flat):
            # What is trained took no part in this call; torch refuses a rerun that needs no gradient.
            flat = [require_grad(leaf) if isinstance(leaf, Tensor) else leaf for leaf in flat]
        return tuple(flat)
