"""Apply a plan to a live model, and take it off again without a trace."""

import dataclasses
import functools
import inspect
import warnings
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, Final, Self

import torch
from torch import nn

from rematree.engines import without_engine
from rematree.errors import PlanMismatchError, UsageError
from rematree.execute.adapters import DrawBits, adapted_layer, dropouts_of, lean_forward, why_not
from rematree.execute.attention import AttentionRegions
from rematree.execute.compiled import BlockCompiler, CompiledBlocks
from rematree.execute.context import Captured
from rematree.execute.group import Group
from rematree.execute.loss import ChunkedLoss, attach_chunked_loss
from rematree.execute.override import ForwardOverride
from rematree.execute.quantised import TrainingLayout, keep_no_input, refuse_repacked, watch_weight
from rematree.execute.recompute import Executor
from rematree.execute.self_check import AdapterCheck
from rematree.execute.stash import Watcher
from rematree.fingerprint import describe_batch, describe_model
from rematree.plans import Action, Decision, Plan
from rematree.quantised import four_bit_linears, frozen_int8_linears
from rematree.regions import ATTENTION_SUFFIX, DRAW_SUFFIX, parent_path, split_function, unwrap

_ATTRIBUTE: Final = "_rematree_handle"
_OWN_SWITCH: Final = ("activation_checkpointing_enable", "gradient_checkpointing_enable")


class Handle:
    """A plan in force on one model. Use as a context manager, or call `remove()`.

    Attributes:
        plan: The plan in force.
    """

    def __init__(
        self,
        plan: Plan,
        model: nn.Module,
        *,
        watcher: Watcher | None,
        check_loss: bool,
        compiler: BlockCompiler | None = None,
    ) -> None:
        self.plan = plan
        self._model = model
        self._executor = Executor(watcher)
        self._overrides: list[ForwardOverride] = []
        self._attention: AttentionRegions | None = None
        self._loss: ChunkedLoss | None = None
        self._switched_off: list[nn.Module] = []
        self._layout: TrainingLayout | None = None
        self._said_cache = False
        self._compiler = compiler
        self._check = AdapterCheck(model) if watcher is None else None
        self._own_switch: list[tuple[nn.Module, str, Any]] = []
        try:
            self._install(check_loss)
        except BaseException:
            self.remove()
            raise
        model.__dict__[_ATTRIBUTE] = self

    def _install(self, check_loss: bool) -> None:
        # A second switch on the same layers would recompute the recomputation.
        for module in self._model.modules():
            if module.__dict__.get("gradient_checkpointing") is True:
                module.__dict__["gradient_checkpointing"] = False
                self._switched_off.append(module)
        self._layout = TrainingLayout(self._model)
        # First, so that it is innermost: whatever saves or recomputes the layer runs it in this form.
        for path, layer in frozen_int8_linears(self._model):
            if self.plan.levers.compiles(path):  # its partitioner decides what is kept
                continue
            self._overrides.append(ForwardOverride(layer, functools.partial(keep_no_input, layer)))
        for path, layer in four_bit_linears(self._model):
            if self.plan.levers.compiles(path):  # a hook on its output is none in a graph
                continue
            self._overrides.append(ForwardOverride(layer, functools.partial(watch_weight, path, layer)))
        lean = {path: find_module(self._model, path) for path in self.plan.lean}
        for path, layer in lean.items():
            self._overrides.append(ForwardOverride(layer, self._lean(path, layer)))
        self._install_compiled()  # before any recomputation of the block, which is around it
        attention: list[tuple[nn.Module, Callable[..., Any]]] = []
        for path, decision in self.plan.decisions.items():
            if decision.action is effective_action(self.plan.decisions, parent_path(path)):
                continue
            module_path, function = split_function(path)
            if function == DRAW_SUFFIX and adapted_layer(module_path) in lean:
                continue  # it draws for itself
            module = find_module(self._model, module_path)
            if function == DRAW_SUFFIX:
                around = functools.partial(self._executor.keep_mask, path, module)
            elif decision.action is Action.RECOMPUTE:
                around = functools.partial(self._executor.recompute, path, module)
            else:
                around = functools.partial(self._executor.save, path, decision.stash)
            if function == ATTENTION_SUFFIX:
                attention.append((module, around))
            else:
                self._overrides.append(ForwardOverride(module, around))
        self._install_groups()
        if attention:
            self._attention = AttentionRegions(attention)
        if self.plan.loss_chunk_rows is not None:
            self._loss = attach_chunked_loss(self._model, self.plan.loss_chunk_rows, check=check_loss)
        base = unwrap(self._model)
        for name in _OWN_SWITCH:  # transformers' layers would be recomputed under the plan's recomputation
            if callable(getattr(base, name, None)):
                self._own_switch.append((base, name, base.__dict__.get(name)))
                base.__dict__[name] = functools.partial(_nothing_changes, name)
        if (self.plan.recomputes or self.plan.compiled) and "use_cache" in inspect.signature(base.forward).parameters:
            self._overrides.append(ForwardOverride(base, self._without_cache))
        self._overrides.append(ForwardOverride(self._model, self._outermost))

    def _lean(self, path: str, layer: nn.Module) -> Callable[..., Any]:
        """What runs the adapter layer at `path` lean."""
        reason = why_not(layer)
        if reason is not None:
            raise PlanMismatchError(
                f"the plan runs {path} lean, which it cannot: {reason}",
                remedies=["plan again with forbid=['lean_adapters']"],
            )
        draws: dict[str, DrawBits] = {}
        for name, region in dropouts_of(path, layer):
            if region in self.plan.decisions and effective_action(self.plan.decisions, path) is Action.RECOMPUTE:
                draws[name] = functools.partial(self._executor.keep_bits, region)
        return functools.partial(lean_forward, layer, draws)

    def _install_groups(self) -> None:
        """Around whatever each block does by itself; smaller groups inside larger ones."""
        for paths in sorted(filter(None, self.plan.groups), key=len):
            group = Group(len(paths), self._executor)
            for place, path in enumerate(paths):
                module = find_module(self._model, path)
                around = functools.partial(group.member, path, place, module)
                self._overrides.append(ForwardOverride(module, around))

    def _install_compiled(self) -> None:
        decided = (*self.plan.decisions, *self.plan.lean)
        lost = next((path for path in decided if self.plan.levers.compiles(path)), None)
        if lost is not None:
            raise PlanMismatchError(f"the plan decides on {lost}, which is inside a compiled block")
        if self.plan.compiled:
            compiler = self._compiler or CompiledBlocks(self._model, self.plan.compiled)
            for path in self.plan.compiled:
                block = find_module(self._model, path)
                self._overrides.append(ForwardOverride(block, functools.partial(compiler.run, path, block)))

    def _trains(self) -> bool:
        return torch.is_grad_enabled() and unwrap(self._model).training

    def _without_cache(self, inner: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        if self._trains():  # R7
            if kwargs.get("use_cache") and not self._said_cache:
                self._said_cache = True
                warnings.warn("use_cache=True is set to False while training with recomputation", stacklevel=3)
            kwargs["use_cache"] = False
        return inner(*args, **kwargs)

    def _outermost(self, inner: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        if self._trains():
            if self._check is not None:
                self._check.forward_begins()
            self._check_batch(kwargs)  # here and not further in, where PEFT has put a prompt before it
        return inner(*args, **kwargs)

    def _check_batch(self, kwargs: Mapping[str, Any]) -> None:
        """Refuse what the prediction does not cover; a smaller batch (the last of an epoch) only needs less."""
        planned = {name: shape for name, shape, _ in self.plan.fingerprint.batch}
        for name, shape, _ in describe_batch(kwargs):
            most = planned.get(name)
            if most is not None and (
                len(shape) != len(most) or any(here > there for here, there in zip(shape, most, strict=True))
            ):
                raise PlanMismatchError(
                    f"the plan was made for {name} of shape {most}, this batch has {shape}",
                    remedies=["plan again for the larger batch: rematree.plan(model, batch, budget=...)"],
                )

    def capture(self, read: Callable[[], Any], write: Callable[[Any], None]) -> None:
        """Have `read()`'s value at forward time put back with `write` around every recomputation (R5)."""
        self._executor.captured.append(Captured(read, write))

    def remove(self) -> None:
        """Restore every attribute the plan changed. Does nothing the second time.

        Warns:
            UserWarning: the first training step left adapters without a gradient, and it was the only one so far.
        """
        if self._loss is not None:
            self._loss.remove()
            self._loss = None
        for override in reversed(self._overrides):
            override.remove()
        self._overrides.clear()
        if self._attention is not None:
            self._attention.remove()
            self._attention = None
        if self._layout is not None:
            self._layout.remove()
            self._layout = None
        for base, name, before in self._own_switch:
            if before is None:
                base.__dict__.pop(name, None)
            else:
                base.__dict__[name] = before
        self._own_switch.clear()
        for module in self._switched_off:
            module.__dict__["gradient_checkpointing"] = True
        self._switched_off.clear()
        if self._model.__dict__.get(_ATTRIBUTE) is self:
            del self._model.__dict__[_ATTRIBUTE]
        if self._check is not None:
            self._check.remove()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()


def _nothing_changes(name: str, *_: Any, **__: Any) -> None:
    """What the model's own methods of checkpointing do while a plan is in force."""
    warnings.warn(
        f"{name}: a plan is in force on this model and decides which regions are recomputed; nothing changes",
        UserWarning,
        stacklevel=2,
    )


def apply(
    plan: Plan,
    model: nn.Module,
    batch: Mapping[str, Any] | None = None,
    *,
    watcher: Watcher | None = None,
    check_loss: bool = True,
) -> Handle:
    """Put `plan` in force on `model`; nothing outside this model object changes.

    Args:
        plan: What `rematree.plan` returned or `Plan.from_json` read.
        model: The model it was made for, in the same configuration.
        batch: If given, its shapes must be exactly the planned ones. A larger batch is refused at every training
            forward in any case.
        watcher: Told about placeholders and recomputations; the referee uses it.
        check_loss: Compare the chunked loss with the model's own once, on at most 32 tokens of the first batch.
    Returns:
        A handle with `remove()`, also a context manager. Applying an equal plan again returns the same handle.
    Raises:
        PlanMismatchError: the model, its trainable set, dropout, dtypes or attention implementation differ.
        UsageError: another plan is in force on this model.
        UnsupportedModelError: an evaluation has rewritten 4-bit weights of the model for inference.
    """
    model = without_engine(model)
    present = model.__dict__.get(_ATTRIBUTE)
    if isinstance(present, Handle):
        if present.plan == plan:
            return present
        raise UsageError("another plan is in force on this model", remedies=["handle.remove() first"])
    refuse_repacked(model)
    here = describe_model(model)
    planned = plan.fingerprint
    here = dataclasses.replace(here, batch=planned.batch if batch is None else describe_batch(batch))
    plan.check(here)
    return Handle(plan, model, watcher=watcher, check_loss=check_loss)


def applied_handle(model: nn.Module) -> Handle | None:
    """The handle in force on `model`, or None."""
    present = without_engine(model).__dict__.get(_ATTRIBUTE)
    return present if isinstance(present, Handle) else None


def forget_handle(copied: nn.Module) -> None:
    """Make a copy of a model forget the handle that was copied with it."""
    for module in copied.modules():
        module.__dict__.pop(_ATTRIBUTE, None)


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
