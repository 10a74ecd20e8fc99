"""A budget for the training loops of transformers and TRL: one callback.

    trainer = Trainer(model=model, args=arguments, train_dataset=data, callbacks=[rematree.BudgetCallback("14GiB")])

Before the first step the callback reads the lengths of the data, plans for the longest batch and for a few shorter ones
(`planning.ladder`), and applies the plans; each batch runs under the one it fits. Where lengths cannot be read, a batch
that turns out larger than planned for is planned for before its forward. When training ends it takes the plans off.
Checkpointing that the arguments or the model ask for is switched off meanwhile: the plan takes its place. What was in
force before is in force again afterwards.
"""

import sys
import time
import weakref
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any, Final, TypeVar

import torch
from transformers import TrainerCallback

from rematree.checkpointing import take_budget_from_transformers
from rematree.engines import not_counted, refuse_copies, without_engine
from rematree.errors import InfeasibleBudgetError, PlanMismatchError, RematreeError, UsageError
from rematree.execute.handle import Handle, applied_handle, apply
from rematree.execute.input_grads import SuspendedInputGrads
from rematree.execute.own_compile import compiled_elsewhere, refuse_compiled
from rematree.execute.selection import covers
from rematree.fingerprint import describe_batch
from rematree.integrations.arguments import (
    kind_of,
    most_tokens,
    wanted_budget,
    warn_of_losses_outside,
    warn_of_what_has_no_effect,
)
from rematree.integrations.batches import padded, read_batches
from rematree.integrations.job import Job
from rematree.integrations.trl import as_called, call_of, generated_batches
from rematree.planning.agreement import agreed_plan
from rematree.planning.ladder import table
from rematree.planning.planner import Planner
from rematree.plans import Plan
from rematree.pricing.cost import Cost
from rematree.referee.ranks import Ranks, launched_ranks
from rematree.units import format_bytes, format_seconds, parse_bytes

_COUNT: Final = "num_items_in_batch"  # which the Trainer adds to a batch for models whose loss takes it
_T = TypeVar("_T")
_OWNERS: "weakref.WeakKeyDictionary[Handle, weakref.ref[BudgetCallback]]" = (
    weakref.WeakKeyDictionary()
)  # who put a plan on


class BudgetCallback(TrainerCallback):
    """Trains inside a budget. For transformers' `Trainer`, and TRL's of SFT, DPO, KTO, GRPO, RLOO and rewards.

    Where batches differ in length there is a plan for each of a few lengths, all within the budget: a short batch that
    fits recomputes nothing, a long one what it must. They come from one survey of the longest batch. Where lengths
    cannot be read (streams, pictures), rows are planned for as long as the trainer cuts them, or as in the first batch,
    and a batch that no plan covers before its forward, which takes as long as planning took at the start.

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
        plan: The plan for the largest batch, of now or of the last training; None before the first `train()`.
        plans: All plans, for the smallest batches first; `plan` is the last of them.
        say: As above.

    Not covered:
        Losses computed outside the model (`compute_loss_func`, label smoothing of the Trainer): the plan assumes
        `model(**batch).loss`. The peak of evaluation and generation. Under `torchrun` and `accelerate launch` all ranks
        take one plan, and the budget is that of each rank. They plan once: a batch that turns out larger is refused by
        name there, and where a forward of the same step waits for its backward.
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
        self._over = 0  # training forwards whose backward is over
        self._job: Job | None = None
        self._inputs: SuspendedInputGrads | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Plan and apply.

        Raises:
            UsageError: no budget is given anywhere, or two different ones.
            InfeasibleBudgetError: nothing fits.
            UsageError: the trainer would run copies of the model on several GPUs (`nn.DataParallel`).
            UsageError: `torch_compile=True` is among the arguments, or the model is compiled.
            UsageError: DeepSpeed trains the model, and by other means than ZeRO-2 or -3 as `referee.ranks` reads them.
            UnsupportedModelError: the adapter is prefix tuning.
        Warns:
            UserWarning: the arguments ask for checkpointing in a way that has no effect under a plan, or for a loss
                outside the model.
        """
        self._remove()  # what a training loop left that an error ended
        model: Any = without_engine(kwargs["model"])
        left = applied_handle(model)
        if left is not None and left in _OWNERS:  # of another callback, whose training was interrupted
            owner = _OWNERS[left]()
            if owner is not None:
                owner._remove()
            left.remove(reports=False)
        packed = getattr(model, "is_loaded_in_4bit", False) or getattr(model, "is_loaded_in_8bit", False)
        # The Trainer makes no copies of packed weights.
        refuse_copies(model, 1 if packed else getattr(args, "n_gpu", 1))
        take_budget_from_transformers(model)
        budget = wanted_budget(self._budget, args, model)
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
        warn_of_what_has_no_effect(args)
        warn_of_losses_outside(args)
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
        most = most_tokens(args)
        batches = generated_batches(args, loader, kwargs.get("processing_class")) or read_batches(loader, most)
        extra, loss = call_of(model, args)

        def called(batch: Mapping[str, Any]) -> dict[str, Any]:
            device = next(model.parameters()).device
            here = {name: t.to(device) if isinstance(t, torch.Tensor) else t for name, t in batch.items()}
            return {**as_called(here), **extra}

        kind = kind_of(kwargs.get("optimizer"), model, self.say)

        def planner(batch: Mapping[str, Any]) -> Planner:
            return Planner(
                model,
                called(batch),
                optimizer=kind,
                accumulation_steps=args.gradient_accumulation_steps,
                clips=args.max_grad_norm > 0,
                forbid=self._forbid,
                cost=self._cost if self._job is None else self._job.cost,  # what was measured is not measured again
                loss=loss,
                steps=steps * args.gradient_accumulation_steps,  # as often a block runs
                allow_compile=self._allow_compile,
                ranks=ranks,
            )

        def planned() -> tuple[Plan, ...]:
            # Ranks see batches of different lengths in one step, and what compiled blocks keep is known for one.
            several = ranks is None and not self._allow_compile
            given = batches if several else replace(batches, longest=padded(batches.longest, always=True))
            self._job = Job.of(model, planner, called, given, budget, most, several=several)
            return self._job.plans()

        started = time.perf_counter()
        plans = planned() if ranks is None else (agreed_plan(lambda: planned()[-1]),)
        self._apply(plans)
        assert self._handle is not None
        if ranks is None:
            self._handle.on_larger.ask(self._larger)
        took = time.perf_counter() - started
        assert self.plan is not None
        assert self._job is not None
        self.say(str(self.plan))
        if len(self.plans) > 1:
            self.say(table(self.plans))
        self.say(
            f"predicted: peak {format_bytes(self.plan.predicted_peak_bytes)} of {format_bytes(budget)}, "
            f"{format_seconds(self.plan.predicted_step_seconds)} for each of the longest batches; planned in "
            f"{format_seconds(took)} for {self._job.note}"
        )

    def _apply(self, plans: tuple[Plan, ...]) -> None:
        """Put `plans` in force, in place of what is."""
        assert self._job is not None
        before = self._handle
        if before is not None:
            before.remove(reports=False)
        *smaller, self.plan = self.plans = plans
        self._handle = apply(self.plan, self._job.model, smaller=smaller)
        _OWNERS[self._handle] = weakref.ref(self)
        if before is not None:
            self._handle.on_larger = before.on_larger
        self._over = 0

    def _larger(self, batch: Mapping[str, Any]) -> Handle | None:
        """A handle with a plan for `batch`, which none of now covers; None while a graph waits for its backward."""
        assert self._handle is not None
        if self._handle.forwards > self._over:
            return None
        call = {name: value for name, value in batch.items() if name != _COUNT}
        described = describe_batch(call)
        shown = ", ".join(f"{name} {'x'.join(map(str, shape))}" for name, shape, _ in described)
        planned = replace(self._handle.plan.fingerprint, left_out=())
        which = "more padded or packed" if covers(planned, replace(planned, batch=described)) else "larger"
        started = time.perf_counter()
        try:
            plan = self.plan_again(call, None)
        except InfeasibleBudgetError as error:
            raise InfeasibleBudgetError(
                f"a batch that is {which} than planned for ({shown}) does not fit: {error.message}",
                budget=error.budget,
                min_peak=error.min_peak,
                details=error.details,
                remedies=[*error.remedies, "shorter rows or fewer, with the equivalent gradient accumulation"],
            ) from None
        except PlanMismatchError:
            raise
        except RematreeError as error:
            self.say(f"a {which} batch ({shown}) cannot be planned for: {error.message}")
            return None
        took = time.perf_counter() - started
        self.say(f"a {which} batch ({shown}): planned again in {format_seconds(took)}, {plan.summary()}")
        return self._handle

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Forwards so far have had their backwards; what a trainer keeps beyond that is refused when it runs again."""
        self._over = 0 if self._handle is None else self._handle.forwards

    on_substep_end = on_step_begin

    @property
    def in_force(self) -> Plan | None:
        """The plan of the latest batch; before the first, and when training is over, that for the longest one."""
        return self.plan if self._handle is None else self._handle.in_force

    def plan_again(self, batch: Mapping[str, Any], limit: int | None) -> Plan:
        """Plan tighter, or for a larger batch than any before, and put that in force; the limit holds from now on.

        A limit is on the plans of all lengths. Those of other lengths that cannot keep it become as small as they can.

        Args:
            batch: What the step runs that did not fit.
            limit: Bytes; None: those of now, and plan for the shape of `batch`.
        Returns:
            The plan that batches of this shape run under.
        Raises:
            InfeasibleBudgetError: nothing fits; the plans of before stay in force.
            PlanMismatchError: there may be one plan only, and one for this batch would not cover those before.
            UsageError: no training is going on.
        """
        in_force, job = self.in_force, self._job
        if job is None or in_force is None:
            raise UsageError("no training under a budget is going on")

        def planned() -> tuple[Job, int, tuple[Plan, ...]]:
            if limit is None:
                again, must = job.grown(batch)
            else:
                again = replace(job, limit=min(limit, job.limit))
                must = job.ladder.number_for(in_force.fingerprint)
            return again, must, again.plans(must)

        self._job, must, plans = _by_itself(planned)
        self._apply(plans)
        number_for = self._job.ladder.number_for
        return next(plan for plan in plans if number_for(plan.fingerprint) >= must)

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


def _by_itself(run: Callable[[], _T]) -> _T:
    """Call `run` as if no step were going on: hooks, modes and autocast of the caller's thread are not there."""
    cuda = torch.cuda.is_available() and torch.cuda.is_initialized()
    device = torch.cuda.current_device() if cuda else 0

    def there() -> _T:
        if cuda:
            torch.cuda.set_device(device)
        return run()

    with ThreadPoolExecutor(1) as thread:
        try:
            return thread.submit(there).result()
        finally:
            if cuda:
                torch.cuda.synchronize(device)
                # That thread's is no step's; those of a step come again. Not for whoever captured them in a CUDA graph.
                torch._C._cuda_clearCublasWorkspaces()
                torch.cuda.empty_cache()  # the step needs what was measured with


def _to_stderr(text: str) -> None:
    sys.stderr.write(text + "\n")
