"""Apply a plan to a live model, and take it off again without a trace."""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, Final, Self

import torch
from torch import nn

from rematree.engines import refuse_pipeline, without_engine
from rematree.errors import PlanMismatchError, RecomputeMismatchError, UsageError
from rematree.execute.adapters import DrawBits, adapted_layer, dropouts_of, lean_forward, why_not
from rematree.execute.attention import AttentionRegions
from rematree.execute.attention_slices import cores_to_slice, in_slices, within
from rematree.execute.cacheless import Cacheless, decides_on_cache
from rematree.execute.compiled import BlockCompiler, CompiledBlocks
from rematree.execute.context import Captured
from rematree.execute.group import Group
from rematree.execute.loss.attach import ChunkedLoss, attach_chunked_loss
from rematree.execute.norms import is_norm, lean_norm, why_no_norm
from rematree.execute.override import ForwardOverride
from rematree.execute.own_compile import refuse_compiled, refuse_compiling
from rematree.execute.own_switch import OwnSwitch
from rematree.execute.quantised import TrainingLayout, keep_no_input, refuse_repacked, watch_weight
from rematree.execute.random_state import refuse_other_generators
from rematree.execute.recompute import Executor
from rematree.execute.selection import OnLarger, Selection
from rematree.execute.self_check import AdapterCheck
from rematree.execute.stash import Watcher
from rematree.fingerprint import describe_batch, describe_model
from rematree.plans import Action, Plan
from rematree.quantised import four_bit_linears, frozen_int8_linears
from rematree.regions import (
    ATTENTION_SUFFIX,
    DRAW_SUFFIX,
    effective_action,
    find_module,
    parent_path,
    split_function,
    unwrap,
)

_ATTRIBUTE: Final = "_rematree_handle"


class Handle:
    """A plan in force on one model, or several for batches of several sizes. A context manager; or call `remove()`.

    Attributes:
        plan: The plan in force; of several, that for the largest batch.
        plans: All of them, in the order in which they are tried; `plan` is the last.
        forwards: Training forwards so far.
        on_larger: Who is asked about a training batch that no plan covers.
    """

    def __init__(
        self,
        plan: Plan,
        model: nn.Module,
        *,
        watcher: Watcher | None,
        check_loss: bool,
        compiler: BlockCompiler | None = None,
        smaller: Sequence[Plan] = (),
    ) -> None:
        self.plan = plan
        self.plans = (*smaller, plan)
        self.forwards = 0
        self.on_larger = OnLarger()
        self._chosen = Selection(self.plans, model)
        self._model = model
        self._watcher = watcher
        self._executor = Executor(watcher)
        self._overrides: list[ForwardOverride] = []
        self._attention: AttentionRegions | None = None
        self._losses: list[ChunkedLoss] = []
        self._own_switch: OwnSwitch | None = None
        self._layout: TrainingLayout | None = None
        self._compiler = compiler
        self._cacheless: Cacheless | None = None
        self._check = AdapterCheck(model) if watcher is None else None
        try:
            self._install(check_loss)
        except BaseException:
            self.remove()
            raise
        model.__dict__[_ATTRIBUTE] = self

    def _install(self, check_loss: bool) -> None:
        self._own_switch = OwnSwitch(self._model)
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
        self._executor.captured.append(Captured(bool, self._check_in_force))
        if len(self.plans) > 1:  # R5: what runs again runs under the plan of its forward
            self._executor.captured.append(Captured(self._chosen.now, self._chosen.put))
        attention: dict[nn.Module, dict[int, Callable[..., Any]]] = {}
        for number, plan in enumerate(self.plans):
            self._install_plan(number, plan, attention)
        if attention:
            self._attention = AttentionRegions(
                (module, arounds[0] if len(self.plans) == 1 else functools.partial(self._chosen.dispatch, arounds))
                for module, arounds in attention.items()
            )
        self._install_losses(check_loss)
        cacheless = [number for number, plan in enumerate(self.plans) if plan.recomputes or plan.compiled]
        if cacheless:
            plan = self.plans[cacheless[-1]]
            grouped = itertools.chain.from_iterable(plan.groups)
            holder = decides_on_cache(self._model, next(iter((*plan.decisions, *plan.compiled, *grouped))))
            if holder is not None:
                module, place = holder
                self._cacheless = Cacheless(place, self._trains)
                self._override(module, self._without_cache, *cacheless)
        self._overrides.append(ForwardOverride(self._model, self._outermost))

    def _override(self, module: nn.Module, around: Callable[..., Any], *numbers: int) -> None:
        """Put `around` the forward of `module` under the plans of these numbers."""
        self._overrides.append(ForwardOverride(module, around, self._when(*numbers)))

    def _when(self, *numbers: int) -> Callable[[], bool] | None:
        if len(numbers) == len(self.plans):
            return None
        return functools.partial(self._chosen.among, frozenset(numbers))

    def _install_plan(self, number: int, plan: Plan, attention: dict[nn.Module, dict[int, Callable[..., Any]]]) -> None:
        """What one plan does to the blocks; cores of attention are added to `attention`."""
        for module in cores_to_slice(self._model, plan.lean, check=self._watcher is None):
            attention.setdefault(module, {})[number] = in_slices
        lean = {path: find_module(self._model, path) for path in plan.lean if not split_function(path)[1]}
        for path, layer in lean.items():
            self._override(layer, self._lean(plan, path, layer), number)
        self._install_compiled()  # before any recomputation of the block, which is around it
        for path, decision in plan.decisions.items():
            if decision.action is effective_action(plan.decisions, parent_path(path)):
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
                arounds = attention.setdefault(module, {})
                arounds[number] = within(around, arounds.get(number))
            else:
                self._override(module, around, number)
        self._install_groups(number, plan)

    def _lean(self, plan: Plan, path: str, layer: nn.Module) -> Callable[..., Any]:
        """What runs the layer at `path`, an adapter's or a norm, lean."""
        norm = is_norm(layer)
        reason = why_no_norm(layer) if norm else why_not(layer)
        if reason is not None:
            raise PlanMismatchError(
                f"the plan runs {path} lean, which it cannot: {reason}",
                remedies=["plan again with forbid=['lean_adapters']"],
            )
        if norm:
            return functools.partial(lean_norm, layer)
        draws: dict[str, DrawBits] = {}
        for name, region in dropouts_of(path, layer):
            if region in plan.decisions and effective_action(plan.decisions, path) is Action.RECOMPUTE:
                draws[name] = functools.partial(self._executor.keep_bits, region)
        return functools.partial(lean_forward, layer, draws)

    def _install_losses(self, check: bool) -> None:
        chunks: dict[int, list[int]] = {}
        for number, plan in enumerate(self.plans):
            if plan.loss_chunk_rows is not None:
                chunks.setdefault(plan.loss_chunk_rows, []).append(number)
        for rows, numbers in chunks.items():
            when = self._when(*numbers)
            self._losses.append(attach_chunked_loss(self._model, rows, check=check, when=when, watcher=self._watcher))

    def _install_groups(self, number: int, plan: Plan) -> None:
        """Around whatever each block does by itself; smaller groups inside larger ones."""
        for paths in sorted(filter(None, plan.groups), key=len):
            group = Group(len(paths), self._executor)
            for place, path in enumerate(paths):
                module = find_module(self._model, path)
                self._override(module, functools.partial(group.member, path, place, module), number)

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
        """R7. A method of the handle, by which the model inside leads back to it (`in_effect.handle_on`)."""
        assert self._cacheless is not None
        return self._cacheless(inner, *args, **kwargs)

    def _outermost(self, inner: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return inner(*args, **kwargs)
        refuse_compiling(override.module for override in self._overrides)
        batch = self._chosen.by_name(args, kwargs)
        # Here and not further in, where PEFT has put a prompt before it.
        number = self._chosen.covering(batch, strictly=bool(self.on_larger))
        if self._trains():
            if number is None and (other := self.on_larger(batch)) is not None:
                return other._go_on(batch, args, kwargs)
            if self._check is not None:
                self._check.forward_begins()
            if number is None:
                number = self._chosen.refuse_larger(batch)
            self._chosen.latest = number
            self.forwards += 1
        with self._chosen.during(len(self.plans) - 1 if number is None else number):
            return inner(*args, **kwargs)

    def _go_on(self, batch: Mapping[str, Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The forward of `batch`, which this handle was made for while another one's ran: through its own overrides."""
        if self._chosen.covering(batch, strictly=True) is None:
            self._chosen.refuse_larger(batch)
            self.on_larger.ask(None)  # nobody can plan for what the model is called with
        return self._outermost(self._overrides[-1].inner, *args, **kwargs)

    def _check_in_force(self, _: bool) -> None:
        """What runs again must find the overrides of its forward, or none at all."""
        other = self._model.__dict__.get(_ATTRIBUTE)
        if isinstance(other, Handle) and other is not self:
            raise RecomputeMismatchError("another plan was applied between a forward and its backward")

    @property
    def in_force(self) -> Plan:
        """The plan that the latest training forward ran under; before the first, that for the largest batch."""
        return self.plans[self._chosen.latest]

    def capture(self, read: Callable[[], Any], write: Callable[[Any], None]) -> None:
        """Have `read()`'s value at forward time put back with `write` around every recomputation (R5)."""
        self._executor.captured.append(Captured(read, write))

    def remove(self, *, reports: bool = True) -> None:
        """Restore every attribute the plan changed. Does nothing the second time.

        Args:
            reports: Whether to warn; another handle that comes at once watches its own first step.
        Warns:
            UserWarning: the first training step left adapters without a gradient, and it was the only one so far.
        """
        for loss in reversed(self._losses):
            loss.remove()
        self._losses.clear()
        for override in reversed(self._overrides):
            override.remove()
        self._overrides.clear()
        for part in (self._attention, self._layout, self._own_switch):
            if part is not None:
                part.remove()
        self._attention = self._layout = self._own_switch = None
        if self._model.__dict__.get(_ATTRIBUTE) is self:
            del self._model.__dict__[_ATTRIBUTE]
        if self._check is not None:
            self._check.remove(reports=reports)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()


def apply(
    plan: Plan,
    model: nn.Module,
    batch: Mapping[str, Any] | None = None,
    *,
    smaller: Sequence[Plan] = (),
    watcher: Watcher | None = None,
    check_loss: bool = True,
) -> Handle:
    """Put `plan` in force on `model`; nothing outside this model object changes.

    Args:
        plan: What `rematree.plan` returned or `Plan.from_json` read.
        model: The model it was made for, in the same configuration.
        batch: If given, its shapes must be exactly the planned ones. A larger batch is refused at every training
            forward in any case.
        smaller: Plans of the same model for smaller batches, in the order in which they are tried: each forward runs
            under the first one that covers its batch, else under `plan`. Choosing takes microseconds. None may compile.
        watcher: Told about placeholders and recomputations; the referee uses it.
        check_loss: Compare the chunked loss with the model's own once, on at most 8 tokens of the first batch.
    Returns:
        A handle with `remove()`, also a context manager. Applying an equal plan again returns the same handle.
    Raises:
        PlanMismatchError: the model, its trainable set, dropout, dtypes or attention implementation differ.
        UsageError: another plan is in force on this model, one of several compiles blocks, or the user compiled it.
        UnsupportedModelError: an evaluation has rewritten 4-bit weights of the model for inference, or it has dropout
            on a device whose generator is not kept.
    """
    refuse_pipeline(model)
    model = without_engine(model)
    refuse_compiled(model)
    present = model.__dict__.get(_ATTRIBUTE)
    if isinstance(present, Handle):
        if present.plans == (*smaller, plan):
            return present
        raise UsageError("another plan is in force on this model", remedies=["handle.remove() first"])
    refuse_repacked(model)
    refuse_other_generators(model)
    if smaller and any(each.compiled for each in (*smaller, plan)):
        raise UsageError(
            "one of several plans compiles blocks, and code is compiled for one plan",
            remedies=["plan with forbid=['compile'], or apply one plan"],
        )
    here = describe_model(model)
    for each in smaller:
        each.check(dataclasses.replace(here, batch=each.fingerprint.batch))
    planned = plan.fingerprint
    plan.check(dataclasses.replace(here, batch=planned.batch if batch is None else describe_batch(batch)))
    return Handle(plan, model, watcher=watcher, check_loss=check_loss, smaller=smaller)


def applied_handle(model: nn.Module) -> Handle | None:
    """The handle in force on `model`, or None."""
    present = without_engine(model).__dict__.get(_ATTRIBUTE)
    return present if isinstance(present, Handle) else None


def forget_handle(copied: nn.Module) -> None:
    """Make a copy of a model forget the handle that was copied with it."""
    for module in copied.modules():
        module.__dict__.pop(_ATTRIBUTE, None)
