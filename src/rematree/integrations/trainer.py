"""A budget for the training loops of transformers and TRL: one callback.

    trainer = Trainer(model=model, args=arguments, train_dataset=data, callbacks=[rematree.BudgetCallback("14GiB")])

Before the first step the callback reads the longest batch from the data, plans for it and applies the plan; when
training ends it takes the plan off. Checkpointing that the arguments or the model ask for is switched off meanwhile:
the plan takes its place.
"""

import sys
from collections.abc import Callable, Collection
from typing import Any, Final

import torch
from transformers import TrainerCallback

from rematree.checkpointing import requested_budget
from rematree.cost import Cost
from rematree.errors import UsageError
from rematree.execute.handle import Handle, apply
from rematree.integrations.batches import longest_batch
from rematree.integrations.trl import fused_head_call
from rematree.planning import plan
from rematree.plans import Plan
from rematree.simulate import Optimizer
from rematree.units import format_bytes, format_seconds, parse_bytes

_ADAM_LIKE: Final = ("adam", "lamb", "lion")
_KWARGS: Final = ("activation_checkpointing_kwargs", "gradient_checkpointing_kwargs")


class BudgetCallback(TrainerCallback):
    """Trains inside a budget. For transformers' `Trainer` and for TRL's `SFTTrainer`.

    The budget is the peak of a training step: weights, gradients, optimizer state, saved tensors, workspaces. It is
    taken from here, from `gradient_checkpointing_kwargs={"budget": ...}` (or `activation_checkpointing_kwargs`) of the
    training arguments, or from `prepare_model_for_kbit_training(model, budget=...)`.

    Args:
        budget: Bytes, or a text with a unit ("14GiB"). None: read it from there.
        forbid: Levers not to use: "chunked_loss".
        cost: Prices ops; measured on the model's device by default.
        say: Receives the plan and the prediction as text; standard error by default.

    Attributes:
        plan: The plan in force, or the last one; None before the first `train()`.

    Not covered:
        Losses computed outside the model (`compute_loss_func`, label smoothing of the Trainer): the plan assumes
        `model(**batch).loss`. The peak of evaluation and generation. Data that cannot be indexed is planned for its
        first batch; a larger one later is refused by name.
    """

    def __init__(
        self,
        budget: int | str | None = None,
        *,
        forbid: Collection[str] = (),
        cost: Cost | None = None,
        say: Callable[[str], None] | None = None,
    ) -> None:
        self.plan: Plan | None = None
        self._budget = None if budget is None else parse_bytes(budget)
        self._forbid = tuple(forbid)
        self._cost = cost
        self._say = say or _to_stderr
        self._handle: Handle | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Plan and apply.

        Raises:
            UsageError: no budget is given anywhere, or two different ones.
            InfeasibleBudgetError: nothing fits.
        """
        self._remove()  # what a training loop left that an error ended
        model: Any = kwargs["model"]
        budget = self._wanted(args, model)
        batch, note = longest_batch(kwargs["train_dataloader"])
        device = next(model.parameters()).device
        batch = {name: t.to(device) if isinstance(t, torch.Tensor) else t for name, t in batch.items()}
        extra, loss = fused_head_call(model)
        self.plan = plan(
            model,
            {**batch, **extra},
            budget,
            optimizer=_kind_of(kwargs.get("optimizer")),
            accumulation_steps=args.gradient_accumulation_steps,
            forbid=self._forbid,
            cost=self._cost,
            loss=loss,
        )
        self._handle = apply(self.plan, model)
        self._say(str(self.plan))
        self._say(
            f"predicted: peak {format_bytes(self.plan.predicted_peak_bytes)} of {format_bytes(budget)}, "
            f"{format_seconds(self.plan.predicted_step_seconds)} for each batch; planned for {note}"
        )

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take the plan off."""
        self._remove()

    def _remove(self) -> None:
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    def _wanted(self, args: Any, model: Any) -> int:
        found = [
            parse_bytes(value["budget"])
            for name in _KWARGS
            if isinstance(value := getattr(args, name, None), dict) and "budget" in value
        ]
        found += [size for size in (self._budget, requested_budget(model)) if size is not None]
        if not found:
            raise UsageError(
                "no budget: neither BudgetCallback nor the training arguments nor the model name one",
                remedies=[
                    'rematree.BudgetCallback("14GiB")',
                    'TrainingArguments(activation_checkpointing_kwargs={"budget": "14GiB"}, ...)',
                ],
            )
        if len(set(found)) > 1:
            shown = " and ".join(format_bytes(size) for size in dict.fromkeys(found))
            raise UsageError(f"two budgets: {shown}; name one, in one place")
        return found[0]


def _kind_of(optimizer: Any) -> Optimizer:
    """What the optimizer keeps for each trained parameter, in the planner's words."""
    inner = getattr(optimizer, "optimizer", optimizer)  # accelerate wraps it
    if inner is None or any(word in type(inner).__name__.lower() for word in _ADAM_LIKE):
        return "adamw"
    return "sgd" if type(inner) is torch.optim.SGD and not inner.defaults["momentum"] else "adamw"


def _to_stderr(text: str) -> None:
    sys.stderr.write(text + "\n")
