"""Apply a plan to a live model, and take it off again without a trace."""

import dataclasses
import functools
import itertools
import warnings
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, Final, Self

import torch
from torch import nn
from torch.nn.modules import module as module_hooks

from rematree.engines import refuse_copies, refuse_pipeline, without_engine
from rematree.errors import RecomputeMismatchError, UsageError
from rematree.execute.cacheless import Cacheless, decides_on_cache
from rematree.execute.compiled import BlockCompiler
from rematree.execute.context import Captured
from rematree.execute.installation import Installation
from rematree.execute.own_compile import refuse_compiled, refuse_compiling
from rematree.execute.quantised import refuse_repacked
from rematree.execute.random_state import HostState, refuse_other_generators
from rematree.execute.recompute import Executor
from rematree.execute.selection import OnLarger, Selection
from rematree.execute.self_check import AdapterCheck
from rematree.execute.stash import Watcher
from rematree.fingerprint import describe_batch, describe_model, has_hooks, left_out
from rematree.plans import Plan
from rematree.regions import unwrap

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
        self._executor = Executor(watcher)
        self._installed = Installation(
            model, self.plans, self._chosen, self._executor, watcher=watcher, compiler=compiler
        )
        self._cacheless: Cacheless | None = None
        self._said = False
        self._drawn_from = False  # Python's or NumPy's generator, in any forward
        self._check = AdapterCheck(model) if watcher is None else None
        try:
            self._executor.captured.append(Captured(bool, self._check_in_force))
            for name in ("keeps_outputs", "looks_at_host"):  # a group has the executor run again what it ran in forward
                place = self._executor, name
                self._executor.captured.append(
                    Captured(functools.partial(getattr, *place), functools.partial(setattr, *place))
                )
            self._executor.may_be_read = self._may_be_read
            self._installed.put_on(check_loss=check_loss)
            self._leave_caches_out()
            self._outer = self._installed.override(model, self._outermost)
        except BaseException:
            self.remove()
            raise
        model.__dict__[_ATTRIBUTE] = self

    def _leave_caches_out(self) -> None:
        """R7, for every plan that runs a part of the model again or compiles one."""
        numbers = [number for number, plan in enumerate(self.plans) if plan.recomputes or plan.compiled]
        if not numbers:
            return
        plan = self.plans[numbers[-1]]
        grouped = itertools.chain.from_iterable(plan.groups)
        holder = decides_on_cache(self._model, next(iter((*plan.decisions, *plan.compiled, *grouped))))
        if holder is not None:
            module, place = holder
            self._cacheless = Cacheless(place, self._trains)
            self._installed.override(module, self._without_cache, *numbers)

    def _trains(self) -> bool:
        return torch.is_grad_enabled() and unwrap(self._model).training

    def _without_cache(self, inner: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        """R7. A method of the handle, by which the model inside leads back to it (`in_effect.handle_on`)."""
        assert self._cacheless is not None
        return self._cacheless(inner, *args, **kwargs)

    def _outermost(self, inner: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return inner(*args, **kwargs)
        refuse_compiling(self._installed.modules())
        batch = self._chosen.by_name(args, kwargs)
        trains = self._trains()
        # Here and not further in, where PEFT has put a prompt before it.
        number = self._chosen.covering(batch, strictly=bool(self.on_larger), warns=trains)
        if trains:
            if number is None and (other := self.on_larger(batch)) is not None:
                return other._go_on(batch, args, kwargs)
            if self._check is not None:
                self._check.forward_begins()
            if number is None:
                number = self._chosen.refuse_larger(batch)
            self._chosen.latest = number
            self.forwards += 1
        self._executor.keeps_outputs = self._may_be_read()
        host = HostState() if trains and self._check is not None else None
        try:
            with self._chosen.during(len(self.plans) - 1 if number is None else number):
                out = inner(*args, **kwargs)
        finally:
            self._executor.keeps_outputs = None  # who calls a module inside is not seen here
        if host is not None:
            self._host_was_drawn_from(not host.same_as(HostState()))
        return out

    def _host_was_drawn_from(self, drawn: bool) -> None:
        """R4: where a forward draws from Python's or NumPy's generator, regions look at them, which takes long.

        In the first forward they do, and from one that draws on.

        Warns:
            UserWarning: this one is the first that does, and nobody had looked where.
        """
        if drawn and not self._executor.looks_at_host:
            warnings.warn(
                "Python's or NumPy's random generator was drawn from in a forward for the first time; if that was in "
                "what runs again, gradients of this one step are of other numbers",
                UserWarning,
                stacklevel=5,
            )
        self._drawn_from |= drawn
        self._executor.looks_at_host = self._drawn_from

    def _may_be_read(self) -> bool:
        """Whether there are hooks that may read what saved regions return, also where they run again.

        What they make of it need not be part of the loss that was planned for: none of it may be a stand-in.

        Warns:
            UserWarning: some came after planning; once.
        """
        if module_hooks._has_any_global_hook():  # pyright: ignore[reportPrivateUsage]
            return True
        hooked = [path for path, module in self._installed.run_again.items() if has_hooks(module)]
        if self._said or self._check is None:
            return bool(hooked)
        new = [path for path in hooked if path not in self.plan.fingerprint.hooked]
        if new:
            self._said = True
            more = f" and {len(new) - 1} more" if len(new) > 1 else ""
            warnings.warn(
                f"{new[0]}{more} got forward hooks after the plan was made: whatever these may read is kept, and the "
                "peak may be above the prediction; plan again with them in place",
                UserWarning,
                stacklevel=6,
            )
        return bool(hooked)

    def _go_on(self, batch: Mapping[str, Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The forward of `batch`, which this handle was made for while another one's ran: through its own overrides."""
        if self._chosen.covering(batch, strictly=True) is None:
            self._chosen.refuse_larger(batch)
            self.on_larger.ask(None)  # nobody can plan for what the model is called with
        return self._outermost(self._outer.inner, *args, **kwargs)

    def _check_in_force(self, _: bool) -> None:
        """What runs again must find the overrides of its forward; or none at all, where it runs as a whole."""
        other = self._model.__dict__.get(_ATTRIBUTE)
        if isinstance(other, Handle) and other is not self:
            raise RecomputeMismatchError("another plan was applied between a forward and its backward")
        if other is None and self._installed.decides_inside:
            raise RecomputeMismatchError(
                "the plan was removed between a forward and its backward, and parts of what runs again were saved",
                remedies=["call backward inside `with rematree.apply(plan, model):`, or before handle.remove()"],
            )

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
        self._installed.remove()
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
    refuse_copies(model)
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
    for each in (*smaller, plan):
        made_for = each.fingerprint
        shapes, trivial = made_for.batch, made_for.left_out
        if each is plan and batch is not None:
            shapes, found = describe_batch(batch), left_out(batch)
            trivial = trivial if set(trivial) <= set(found) else found  # what the plan counts need not be needed
        each.check(dataclasses.replace(here, batch=shapes, left_out=trivial, hooked=made_for.hooked))
    return Handle(plan, model, watcher=watcher, check_loss=check_loss, smaller=smaller)


def applied_handle(model: nn.Module) -> Handle | None:
    """The handle in force on `model`, or None."""
    present = without_engine(model).__dict__.get(_ATTRIBUTE)
    return present if isinstance(present, Handle) else None


def forget_handle(copied: nn.Module) -> None:
    """Make a copy of a model forget the handle that was copied with it."""
    for module in copied.modules():
        module.__dict__.pop(_ATTRIBUTE, None)
