"""A budget for the training loops of transformers and TRL: one callback.

    trainer = Trainer(model=model, args=arguments, train_dataset=data, callbacks=[rematree.BudgetCallback("14GiB")])

Before the first step the callback reads the lengths of the data, plans for the longest batch and for a few shorter ones
(`planning.ladder`), and applies the plans; each batch runs under the one it fits. When training ends it takes them off.
Checkpointing that the arguments or the model ask for is switched off meanwhile: the plan takes its place. What was in
force before is in force again afterwards.
"""

import sys
import time
import warnings
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

import torch
from transformers import TrainerCallback

from rematree.checkpointing import take_budget_from_transformers
from rematree.engines import not_counted, without_engine
from rematree.errors import UsageError
from rematree.execute.handle import Handle, apply
from rematree.execute.input_grads import SuspendedInputGrads
from rematree.execute.own_compile import compiled_elsewhere, refuse_compiled
from rematree.in_effect import BUDGET_KEY, requested_budget
from rematree.integrations.batches import read_batches
from rematree.integrations.trl import as_called, call_of, generated_batches
from rematree.planning.agreement import agreed_plan
from rematree.planning.ladder import Ladder, build_ladder, table
from rematree.planning.planner import Planner
from rematree.plans import Plan
from rematree.pricing.cost import Cost
from rematree.referee.ranks import Ranks, base_optimizer, launched_ranks
from rematree.referee.simulate import Optimizer
from rematree.units import format_bytes, format_seconds, parse_bytes

_ADAM_LIKE: Final = ("adam", "lamb", "lion")
_KINDS: Final = ("activation_checkpointing", "gradient_checkpointing")  # names of arguments, new and old


@dataclass(frozen=True)
class _Job:
    """What is needed to plan again in mid-run: the planners in use, how to make others, and the bytes there are."""

    model: Any
    make_planner: Callable[[Mapping[str, Any]], Planner]
    ladder: Ladder
    limit: int


class BudgetCallback(TrainerCallback):
    """Trains inside a budget. For transformers' `Trainer`, and TRL's of SFT, DPO, KTO, GRPO, RLOO and rewards.

    Where batches differ in length there is a plan for each of a few lengths, all within the budget: a short batch that
    fits recomputes nothing, a long one what it must. They come from one survey of the longest batch.

    The budget is the peak of a training step: weights, gradients, optimizer state, saved tensors, workspaces. It is
    taken from here, from `gradient_checkpointing=True, gradient_checkpointing_kwargs={"budget": ...}` (or
    `activation_checkpointing...`) of the training arguments, or from `prepare_model_for_kbit_training(model,
    budget=...)`. If only the arguments name it and they switch checkpointing off, it is off: there is no plan.

    Args:
        budget: Bytes, or a text with a unit ("14GiB"). None: read it from there.
        forbid: Levers not to use, as for `rematree.plan`.
        allow_compile: Whether blocks may be compiled, which changes rounding. What compiled blocks keep is measured for
            the longest batch, so all batches run under one plan.
        cost: Prices ops; measured on the model's device by default.
        say: Receives the plan and the prediction as text; standard error by default.

    Attributes:
        plan: The plan for the longest batch, of now or of the last training; None before the first `train()`.
        plans: All plans, for the shortest batches first; `plan` is the last of them.
        say: As above.

    Not covered:
        Losses computed outside the model (`compute_loss_func`, label smoothing of the Trainer): the plan assumes
        `model(**batch).loss`. The peak of evaluation and generation. Data that cannot be indexed is planned for its
        first batch; a larger one later is refused by name. Under `torchrun` and `accelerate launch` all ranks take one
        plan, and the budget is that of each rank; planning again in mid-run (`plan_again`) is not agreed on.
    """

    def __init__(
        self,
        budget: int | str | None = None,
        *,
        forbid: Collection[str] = (),
        allow_compile: bool = False,
        cost: Cost | None = None,
        say: Callable[[str], None] | None = None,
    ) -> None:
        self.plan: Plan | None = None
        self.plans: tuple[Plan, ...] = ()
        self._budget = None if budget is None else parse_bytes(budget)
        self._forbid = tuple(forbid)
        self._allow_compile = allow_compile
        self._cost = cost
        self.say = say or _to_stderr
        self._handle: Handle | None = None
        self._job: _Job | None = None
        self._inputs: SuspendedInputGrads | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Plan and apply.

        Raises:
            UsageError: no budget is given anywhere, or two different ones.
            InfeasibleBudgetError: nothing fits.
            UsageError: `torch_compile=True` is among the arguments, or the model is compiled.
            UsageError: DeepSpeed trains the model, and by other means than ZeRO-2 or -3 as `referee.ranks` reads them.
            UnsupportedModelError: the adapter is prefix tuning.
        Warns:
            UserWarning: the arguments ask for checkpointing in a way that has no effect under a plan.
        """
        self._remove()  # what a training loop left that an error ended
        model: Any = without_engine(kwargs["model"])
        take_budget_from_transformers(model)
        budget = self._wanted(args, model)
        if budget is None:
            self.plan, self.plans = None, ()
            self.say("no plan: the training arguments name a budget, and switch checkpointing off")
            return
        refuse_compiled(model)
        ranks = launched_ranks(kwargs["model"], kwargs.get("optimizer"))
        if getattr(args, "deepspeed", None) and (ranks is None or ranks.engine not in {"zero2", "zero3"}):
            raise not_counted("TrainingArguments(deepspeed=...) without an engine of ZeRO-2 or ZeRO-3")
        if getattr(args, "torch_compile", False):  # accelerate compiles a wrapper that the callback does not see
            raise compiled_elsewhere("TrainingArguments(torch_compile=True)")
        _warn_of_what_has_no_effect(args)
        self._inputs = SuspendedInputGrads(model)
        try:
            self._plan_and_apply(args, state.max_steps, model, budget, ranks, kwargs)
        except BaseException:
            self._remove()
            raise

    def _plan_and_apply(
        self, args: Any, steps: int, model: Any, budget: int, ranks: Ranks | None, kwargs: dict[str, Any]
    ) -> None:
        loader = kwargs["train_dataloader"]
        batches = generated_batches(args, loader, kwargs.get("processing_class")) or read_batches(loader)
        extra, loss = call_of(model, args)

        def called(batch: Mapping[str, Any]) -> dict[str, Any]:
            device = next(model.parameters()).device
            here = {name: t.to(device) if isinstance(t, torch.Tensor) else t for name, t in batch.items()}
            return {**as_called(here), **extra}

        def planner(batch: Mapping[str, Any]) -> Planner:
            return Planner(
                model,
                called(batch),
                optimizer=_kind_of(kwargs.get("optimizer")),
                accumulation_steps=args.gradient_accumulation_steps,
                clips=args.max_grad_norm > 0,
                forbid=self._forbid,
                cost=self._cost,
                loss=loss,
                steps=steps * args.gradient_accumulation_steps,  # as often a block runs
                allow_compile=self._allow_compile,
                ranks=ranks,
            )

        def lone() -> Plan:
            self._job = _Job(model, planner, Ladder((planner(batches.longest),)), budget)
            return self._job.ladder.plans(budget)[-1]

        started = time.perf_counter()
        if ranks is not None:  # they see batches of different lengths in one step, and take one plan
            self._apply((agreed_plan(lone),))
        elif self._allow_compile:
            self._apply((lone(),))
        else:
            longest = planner(batches.longest)
            ladder = build_ladder(longest, budget, batches.weights, lambda length: called(batches.of(length)))
            self._job = _Job(model, planner, ladder, budget)
            self._apply(ladder.plans(budget))
        took = time.perf_counter() - started
        assert self.plan is not None
        self.say(str(self.plan))
        if len(self.plans) > 1:
            self.say(table(self.plans))
        self.say(
            f"predicted: peak {format_bytes(self.plan.predicted_peak_bytes)} of {format_bytes(budget)}, "
            f"{format_seconds(self.plan.predicted_step_seconds)} for each of the longest batches; planned in "
            f"{format_seconds(took)} for {batches.note}"
        )

    def _apply(self, plans: tuple[Plan, ...]) -> None:
        """Put `plans` in force, in place of what is."""
        assert self._job is not None
        if self._handle is not None:
            self._handle.remove()
        *smaller, self.plan = self.plans = plans
        self._handle = apply(self.plan, self._job.model, smaller=smaller)

    @property
    def in_force(self) -> Plan | None:
        """The plan of the latest batch; before the first, and when training is over, that for the longest one."""
        return self.plan if self._handle is None else self._handle.in_force

    def plan_again(self, batch: Mapping[str, Any], limit: int | None) -> Plan:
        """Plan tighter, or for a larger batch than any before, and put that in force; the limit holds from now on.

        A limit is on the plans of all lengths. Those of other lengths that cannot keep it become as small as they can.

        Args:
            batch: What the step runs that did not fit.
            limit: Bytes; None: those of now, and a plan for the shape of `batch` too.
        Returns:
            The plan that batches of this shape run under.
        Raises:
            InfeasibleBudgetError: nothing fits; the plans of before stay in force.
            UsageError: no training is going on.
        """
        if self._job is None or self.in_force is None:
            raise UsageError("no training under a budget is going on")
        job = self._job
        if limit is None:
            job = replace(job, ladder=job.ladder.extended(job.make_planner(batch)))
            must = len(job.ladder.planners) - 1
        else:
            job = replace(job, limit=min(limit, job.limit))
            must = job.ladder.number_for(self.in_force)
        plans = job.ladder.plans(job.limit, must)
        self._job = job
        self._apply(plans)
        return next(plan for plan in plans if job.ladder.number_for(plan) >= must)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take the plan off."""
        self._remove()

    def _remove(self) -> None:
        if self._handle is not None:
            self._handle.remove()
            self._handle = None
        self._job = None
        if self._inputs is not None:
            self._inputs.resume()
            self._inputs = None

    def _wanted(self, args: Any, model: Any) -> int | None:
        """The one budget; None if only the arguments name one, and they switch checkpointing off."""
        named = [parse_bytes(given[BUDGET_KEY]) for given in _arguments(args) if BUDGET_KEY in given]
        found = named if _is_asked_for(args) else []
        found += [size for size in (self._budget, requested_budget(model)) if size is not None]
        if named and not found:
            return None
        if not found:
            raise UsageError(
                "no budget: neither BudgetCallback nor the training arguments nor the model name one",
                remedies=[
                    'rematree.BudgetCallback("14GiB")',
                    'TrainingArguments(activation_checkpointing=True, activation_checkpointing_kwargs={"budget": '
                    '"14GiB"}, ...)',
                ],
            )
        if len(set(found)) > 1:
            shown = " and ".join(format_bytes(size) for size in dict.fromkeys(found))
            raise UsageError(f"two budgets: {shown}; name one, in one place")
        return found[0]


def _arguments(args: Any) -> list[dict[str, Any]]:
    """Of checkpointing, among the training arguments; by either name, which transformers keeps equal."""
    given = [getattr(args, f"{kind}_kwargs", None) for kind in _KINDS]
    return [value for value in given if isinstance(value, dict)]


def _is_asked_for(args: Any) -> bool:
    return any(bool(getattr(args, kind, False)) for kind in _KINDS)


def _warn_of_what_has_no_effect(args: Any) -> None:
    if not _is_asked_for(args):
        return
    given = {name: value for kwargs in _arguments(args) for name, value in kwargs.items()}
    plain = {"use_reentrant": False, "every_n_layers": 1, "offload": False}  # what a plan amounts to
    idle = [name for name, value in given.items() if name != BUDGET_KEY and plain.get(name, ...) != value]
    if idle:
        shown = ", ".join(f"{name}={given[name]!r}" for name in idle)
        warnings.warn(
            f"{shown} among the arguments of checkpointing: no effect while a plan is in force, which decides what is "
            "recomputed",
            UserWarning,
            stacklevel=2,
        )


def _kind_of(optimizer: Any) -> Optimizer:
    """What the optimizer keeps for each trained parameter, in the planner's words."""
    inner = base_optimizer(optimizer)
    if inner is None or any(word in type(inner).__name__.lower() for word in _ADAM_LIKE):
        return "adamw"
    return "sgd" if type(inner) is torch.optim.SGD and not inner.defaults["momentum"] else "adamw"


def _to_stderr(text: str) -> None:
    sys.stderr.write(text + "\n")
