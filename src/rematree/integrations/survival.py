"""A training step that runs out of memory is undone, planned tighter and run again.

    trainer = Trainer(..., callbacks=[rematree.BudgetCallback("14GiB")])
    rematree.survive_out_of_memory(trainer)
    trainer.train()

A prediction can be wrong about a device: other programs use it, its allocator fragments. The step that fails has left
nothing behind then: no gradient half added, running statistics and random generators where they were; weights that an
optimizer changed in the middle of backward end the run. The budget shrinks to below what has just failed, the plan for
it is taken, and the same batch runs again. With levers that are exact, the run goes on as if nothing had happened.
"""

import contextlib
import functools
import time
import traceback
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Final, NoReturn

import torch

from rematree.errors import InfeasibleBudgetError, OutOfMemoryError, PlanMismatchError, UsageError
from rematree.execute.noted import version_of
from rematree.execute.random_state import RandomState
from rematree.integrations.trainer import BudgetCallback
from rematree.units import format_bytes

_SHARE: Final = 0.9  # of a peak that did not fit, what is tried next
_ATTEMPTS: Final = 5
_SMALL: Final = 4096  # elements; such a buffer is copied at every step, since it may change for the first time
# By the allocators of a CPU; by CUDA, cuBLAS, cuDNN and Triton, which do not raise torch's own error.
_SAID: Final = ("not enough memory", "can't allocate memory", "cannot allocate memory", "out of memory", "ALLOC_FAILED")


def survive_out_of_memory(trainer: Any, *, attempts: int = _ATTEMPTS) -> "StepGuard":
    """Have `trainer` run a step that failed for want of memory again, under tighter and tighter plans.

    Args:
        trainer: A transformers `Trainer`, or TRL's, with a `BudgetCallback`.
        attempts: How often one step is run again.
    Returns:
        The guard, with `remove()`.
    Raises:
        UsageError: there is no `BudgetCallback`, DeepSpeed trains, or more than one process does: one that runs a step
            again while the others wait for its gradients would stop them all.
    """
    callbacks = [each for each in trainer.callback_handler.callbacks if isinstance(each, BudgetCallback)]
    if len(callbacks) != 1:
        raise UsageError(
            f"the trainer has {len(callbacks)} BudgetCallbacks; one is needed to plan again when memory runs out",
            remedies=['trainer.add_callback(rematree.BudgetCallback("14GiB"))'],
        )
    if trainer.args.world_size > 1:
        raise UsageError(f"{trainer.args.world_size} processes train: a step cannot be run again in one of them alone")
    if getattr(trainer, "is_deepspeed_enabled", False):
        raise UsageError("DeepSpeed trains: it keeps what a backward that fails has reduced so far")
    return StepGuard(trainer, callbacks[0], attempts)


class StepGuard:
    """Stands around `trainer.training_step` of one trainer until `remove()`.

    Attributes:
        survived: Steps that failed and went through in the end.
    """

    def __init__(self, trainer: Any, callback: BudgetCallback, attempts: int) -> None:
        self._trainer = trainer
        self._callback = callback
        self._attempts = attempts
        self._inner = trainer.training_step
        self._since = time.time()
        self._changing = set[str]()  # names of the buffers that steps change
        self._begun: tuple[int, RandomState] | None = None  # the step under way, and what it found
        self.survived = 0
        trainer.training_step = functools.update_wrapper(functools.partial(self._step), self._inner)

    def remove(self) -> None:
        """Put the trainer's own method back."""
        self._trainer.__dict__.pop("training_step", None)

    def _step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        failures, number = 0, self._trainer.state.global_step
        if self._begun is None or self._begun[0] != number:  # the first of the passes that are accumulated
            self._begun = number, RandomState(host=True)
        while True:
            before = _Before(model, self._changing)
            try:
                # A trainer may take entries out of a batch; where the model writes them, it is a list of prompts.
                given = dict(inputs) if isinstance(inputs, Mapping) else inputs
                loss = self._inner(model, given, *args, **kwargs)
            except InfeasibleBudgetError as error:  # of a batch that came larger; nothing tighter is left
                before.restore()
                self._give_up(error.message, "a batch is larger than planned for")
            except (RuntimeError, MemoryError, PlanMismatchError) as error:
                before.restore()
                reason = _reason(error)
                if reason is None:
                    raise
                _forget_frames(error)
                if (changed := before.changed()) is not None:
                    raise OutOfMemoryError(
                        f"{reason}, and the step cannot be run again: it had changed {changed}",
                        remedies=["an optimizer that steps after backward", "a smaller budget to begin with"],
                    ) from None
            else:
                before.add()
                self._changing |= before.changed_buffers()
                self.survived += failures > 0
                return loss
            failures += 1
            if failures > self._attempts:
                self._give_up(f"the step failed {failures} times", reason)
            self._again(inputs, reason)

    def _again(self, inputs: Any, reason: str) -> None:
        """Take a tighter plan."""
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        plan = self._callback.in_force
        if plan is None:
            self._give_up("no plan is in force that could be made tighter", reason)
        limit = None if reason.startswith("larger") else int(plan.predicted_peak_bytes * _SHARE)
        if limit is None and not isinstance(inputs, Mapping):
            self._give_up("the batch is made of what is given, and cannot be planned for", reason)
        try:
            now = self._callback.plan_again(inputs, limit)
        except InfeasibleBudgetError as error:
            self._give_up(error.message, reason)
        except (RuntimeError, MemoryError) as error:
            if _reason(error) is None:
                raise
            self._give_up("there is no memory left to plan with", reason)
        self._callback.say(
            f"step {self._trainer.state.global_step + 1}: {reason}; undone, and run again under a plan of "
            f"{format_bytes(now.predicted_peak_bytes)} (it was {format_bytes(plan.predicted_peak_bytes)})"
        )

    def _give_up(self, why: str, reason: str) -> NoReturn:
        trainer, plan = self._trainer, self._callback.in_force
        saved: list[str] = []
        if trainer.state.global_step > 0:
            if self._begun is not None:  # who resumes begins with the first pass of this step
                self._begun[1].restore()
            with contextlib.suppress(OSError):
                there = Path(trainer.args.output_dir) / f"checkpoint-{trainer.state.global_step}"
                if not there.exists() or there.stat().st_mtime < self._since:  # another run's, or half of one
                    trainer._save_checkpoint(trainer.model, None)
                saved = [f"the run so far is in {trainer.args.output_dir}: train(resume_from_checkpoint=True)"]
        lines = [] if plan is None else [line.text() for line in plan.ledger]
        raise OutOfMemoryError(
            f"out of memory, and no tighter plan is left: {why}",
            details=[reason, *(["at the predicted peak of the last plan:", *lines] if lines else [])],
            remedies=[
                *saved,
                "shorter sequences or a smaller batch, with the equivalent gradient accumulation",
                "rematree fit: the longest rows, the most rows or the highest rank that fit",
            ],
        )


class _Before:
    """What a step changes before the optimizer runs: gradients, buffers, and the random generators.

    Gradients of earlier micro-batches are put aside, because a backward that fails halfway has added to some of them.
    Added afterwards they are the same sums. While a step runs they are beside the new ones, which is more than the plan
    predicted by the size of one set of gradients; only with accumulation.
    """

    def __init__(self, model: Any, changing: Collection[str]) -> None:
        # Versions of frozen weights move where nothing changes: adapters are merged to generate, parametrized, or set.
        trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        buffers = [(name, buffer) for name, buffer in model.named_buffers() if not buffer.is_inference()]
        self._versions = [(name, tensor, version_of(tensor)) for name, tensor in (*trained, *buffers)]
        self._buffers = {
            name: (buffer, buffer.detach().clone())
            for name, buffer in buffers
            if name in changing or buffer.numel() <= _SMALL
        }
        self._parameters = [p for _, p in trained]
        self._gradients = [p.grad for p in self._parameters]
        self._random = RandomState(host=True)
        for parameter in self._parameters:
            parameter.grad = None

    def restore(self) -> None:
        for parameter, gradient in zip(self._parameters, self._gradients, strict=True):
            parameter.grad = gradient
        self._random.restore()
        with torch.no_grad():
            for buffer, before in self._buffers.values():  # no version says that a norm has counted its statistics
                buffer.copy_(before)

    def changed_buffers(self) -> set[str]:
        """Names of the buffers that were written to, as far as their versions say so."""
        return {
            name
            for name, tensor, version in self._versions
            if version_of(tensor) != version and not isinstance(tensor, torch.nn.Parameter)
        }

    def changed(self) -> str | None:
        """The first tensor that was written to and is not as it was; None if there is none."""
        written = (name for name, tensor, version in self._versions if version_of(tensor) != version)
        return next((name for name in written if name not in self._buffers), None)

    def add(self) -> None:
        for parameter, gradient in zip(self._parameters, self._gradients, strict=True):
            if gradient is not None:
                parameter.grad = gradient if parameter.grad is None else gradient.add_(parameter.grad)


def _reason(error: BaseException) -> str | None:
    """What ran out, in words; None if `error` is about something else."""
    if isinstance(error, PlanMismatchError):
        return f"larger than planned ({error.message})" if "this batch has" in error.message else None
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return "out of memory"
    text = str(error)
    return "out of memory" if any(said in text for said in _SAID) else None


def _forget_frames(error: BaseException | None) -> None:
    """The frames of an error hold the tensors of the step that failed."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error.__traceback__ = None
        error = error.__context__
