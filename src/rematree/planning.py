"""Budget in, plan out: survey the model once, solve the chain for a budget, let the referee confirm.

`Planner` keeps the survey, so that a frontier or several budgets cost one observation. `plan` is the one-call form.
"""

import math
import platform
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import torch
import transformers
from torch import nn

from rematree.absent import is_absent
from rematree.accounts import CONTEXT, HOST, LIBRARY, SLACK, how_workspaces_are_known, ledger_lines
from rematree.attention_kernels import Capability
from rematree.cost import Cost, Measured
from rematree.devices import overhead_of
from rematree.errors import InfeasibleBudgetError, UnsupportedModelError, UsageError
from rematree.fingerprint import describe_batch, describe_model
from rematree.folding import block_kinds
from rematree.observe import LossFunction, Twin
from rematree.plans import Action, BlockRow, Decision, LedgerLine, Plan
from rematree.quantised import frozen_int8_linears
from rematree.regions import find_chain
from rematree.running import running_chain
from rematree.simulate import Optimizer, Referee, Simulation
from rematree.solve.chain import ChainChoice, least_peak, position_peak, solve_chain
from rematree.survey import Survey, describe_option, survey
from rematree.units import KIB, MIB, format_bytes, parse_bytes

LEVERS: Final = frozenset({"chunked_loss"})
_RESOLUTION: Final = 4096  # quanta of the chain solver between the first block's start and the plain peak
_MAX_CONFIRMATIONS: Final = 6  # simulated steps spent on one budget
_NEAR_LEAST: Final = 3  # limits tried for the smallest peak
_SLACK: Final = 256 * KIB  # small host tensors a step makes outside the model: loss sums, generator states


@dataclass(frozen=True, slots=True)
class _Confirmed:
    choice: ChainChoice
    simulation: Simulation
    peak_bytes: int


class Planner:
    """One observed model and batch, ready to be planned for any budget.

    Args:
        model: The model as it will train: adapters on, frozen what is frozen. Read, not run.
        batch: One batch as the training loop will pass it (`model(**batch)`), labels included.
        optimizer: What holds state: "adamw" (two states per trained parameter, in its dtype), "adamw_8bit" (of
            bitsandbytes), "paged_adamw_8bit" (on a GPU, state of large tensors counts as on the host), "sgd", "none".
        accumulation_steps: More than one means gradients of earlier micro-batches are live during the step.
        forbid: Levers not to use: "chunked_loss" (changes rounding).
        cost: Prices ops; default: measured on the model's device.
        loss: The scalar to differentiate, from the model's output; default: its `loss`.
        device: Where the step will run, if not where the model is; it need not be in this machine. Then `cost` says
            what it is like.
        capability: Compute capability of that device, which decides between attention kernels.
    Raises:
        UsageError: unknown lever, no loss.
        UnsupportedModelError: the model cannot be observed, or its adapter is prefix tuning.
    Cost:
        Seconds: some 30 simulated steps, and one short measurement of each distinct op.
    """

    def __init__(
        self,
        model: nn.Module,
        batch: Mapping[str, Any],
        *,
        optimizer: Optimizer = "adamw",
        accumulation_steps: int = 1,
        forbid: Collection[str] = (),
        cost: Cost | None = None,
        loss: LossFunction | None = None,
        device: torch.device | None = None,
        capability: Capability | None = None,
    ) -> None:
        unknown = sorted(set(forbid) - LEVERS)
        if unknown:
            raise UsageError(f"unknown lever {unknown[0]!r} in forbid; levers: {', '.join(sorted(LEVERS))}")
        if not any(p.requires_grad for p in model.parameters()):
            raise UsageError("no parameter of the model requires grad: there is no training step to plan")
        if cost is None and device is not None and is_absent(device):
            raise UsageError(
                f"no {device.type} device is here to measure", remedies=["pass cost=, for example a Roofline"]
            )
        self._twin = Twin(model, batch, loss, device=device, capability=capability)
        self._fingerprint = replace(describe_model(model), batch=describe_batch(batch), device=self._twin.device.type)
        if not self._twin.model.training:
            self._twin.model.train()
        self._cost = cost if cost is not None else Measured(self._twin.device)
        self._overhead = overhead_of(self._cost, self._twin.device.type)
        # Beside the tensors of the step, whatever is decided.
        self._fixed = _SLACK + self._overhead.library_bytes + self._overhead.context_bytes
        self._forbid = frozenset(forbid)
        found = find_chain(self._twin.model)
        kinds = dict(zip(found.blocks, block_kinds(self._twin.model, found.blocks), strict=True))
        chain = running_chain(self._twin, found, kinds)
        self._referee = Referee(
            self._twin,
            chain.blocks,
            self._cost,
            optimizer,
            accumulation_steps > 1,
            kinds=[kinds[path] for path in chain.blocks],
        )
        chunk = "chunked_loss" not in self._forbid and loss is None
        self.survey: Survey = survey(self._referee, chain, chunk=chunk)
        self._confirmed: dict[tuple[tuple[int, ...], int], _Confirmed] = {}
        problem = self.survey.problem
        self._quantum = max(KIB, (self.survey.plain.peak_bytes - problem.base) // _RESOLUTION)
        self._least_limit = least_peak(problem, self._quantum)
        self._top = max(self.survey.plain.peak_bytes, self._least_limit) * 2

    def _peak(self, simulation: Simulation) -> int:
        """All that the device must have: the sum of the ledger."""
        return simulation.peak_bytes + simulation.slack_bytes + self._fixed

    # -- limits and confirmations -------------------------------------------------------------------------------------

    def _at(self, limit: int) -> _Confirmed | None:
        """The solver's choice for `limit`, with what the referee says of it. None if the solver finds nothing."""
        choice = solve_chain(self.survey.problem, limit, self._quantum)
        if choice is None:
            return None
        key = (choice.blocks, choice.head)
        if key not in self._confirmed:
            rows = self.survey.rows[choice.head]
            result = self._referee.run(self.survey.decisions(choice.blocks), rows)
            if result.misread:
                raise UnsupportedModelError(
                    f"{sorted(result.misread)[0]}: its output is read after all; this is a bug in the survey"
                )
            self._confirmed[key] = _Confirmed(choice, result, self._peak(result))
        return self._confirmed[key]

    def _best_within(self, budget: int) -> _Confirmed | None:
        """The fastest of all plans confirmed so far that fit."""
        fitting = [entry for entry in self._confirmed.values() if entry.peak_bytes <= budget]
        return min(fitting, key=lambda e: (e.choice.seconds, e.peak_bytes), default=None)

    def _search(self, budget: int) -> None:
        """Confirm plans around `budget`: lower the solver's limit by what the referee says it was off, then refine."""
        high = min(budget - self._fixed, self._top)
        low: int | None = None
        limit = high
        for _ in range(_MAX_CONFIRMATIONS):
            limit = max(limit, self._least_limit)
            entry = self._at(limit)
            if entry is None:
                return
            over = entry.peak_bytes - budget
            if over <= 0:
                low = limit
                if limit == high or high - limit <= self._quantum:
                    return
                limit = (limit + high) // 2
            else:
                if limit == self._least_limit:
                    return
                high = limit
                limit = limit - max(over, self._quantum) if low is None else (low + limit) // 2

    def min_peak_bytes(self) -> int:
        """Smallest confirmed peak of any plan."""
        for extra in range(_NEAR_LEAST):
            self._at(self._least_limit + extra * 4 * self._quantum)
        return min(entry.peak_bytes for entry in self._confirmed.values())

    def plan(self, budget: int | str | None = None) -> Plan:
        """The fastest confirmed plan within `budget` (None: the fastest of all).

        Raises:
            InfeasibleBudgetError: with the smallest reachable peak.
            UsageError: the budget has no unit or is not positive.
        """
        return self.plans([budget])[0]

    def plans(self, budgets: Sequence[int | str | None]) -> list[Plan]:
        """A plan for each of `budgets`, chosen among everything confirmed for any of them.

        A plan that fits a budget fits every larger one, so among these the predicted time never falls as the budget
        shrinks.

        Raises:
            InfeasibleBudgetError: for the first budget that nothing fits.
        """
        limits = [None if budget is None else parse_bytes(budget) for budget in budgets]
        for limit in limits:
            self._search(self._top + self._fixed if limit is None else limit)
        found: list[Plan] = []
        for limit in limits:
            entry = self._best_within(limit if limit is not None else sys.maxsize)
            if entry is None:
                assert limit is not None
                if self.min_peak_bytes() > limit:
                    raise self._infeasible(limit)
                entry = self._best_within(limit)
                assert entry is not None
            found.append(self._as_plan(entry, limit))
        return found

    def frontier(self, points: int = 16) -> list[Plan]:
        """Pareto-optimal plans from the smallest peak to the fastest step, at most `points` of them."""
        low = self.min_peak_bytes()
        for index in range(points):
            self._at(self._least_limit + (self._top - self._least_limit) * index // max(1, points - 1))
        front: list[_Confirmed] = []
        for entry in sorted(self._confirmed.values(), key=lambda e: (e.peak_bytes, e.choice.seconds)):
            if not front or entry.choice.seconds < front[-1].choice.seconds:
                front.append(entry)
        assert front[0].peak_bytes == low
        if len(front) > points:
            front = [front[round(i * (len(front) - 1) / (points - 1))] for i in range(points)]
        return [self._as_plan(entry, None) for entry in front]

    def plain_step(self) -> tuple[int, float]:
        """(peak bytes, seconds) of the step without a plan."""
        return self._peak(self.survey.plain), self.survey.plain.seconds

    def chunked_step(self, budget: int) -> tuple[int, float] | None:
        """(peak bytes, seconds) of the step that recomputes nothing and computes the loss in chunks.

        With the fastest size of chunk that fits `budget`, else the one of the smallest peak. None if the loss cannot
        be computed in chunks, or must not be.
        """
        known, problem = self.survey, self.survey.problem
        everything = [len(stage) - 1 for stage in problem.stages]  # the last option of a block saves all of it
        heads = [index for index, rows in enumerate(known.rows) if rows is not None]
        if not heads:
            return None
        peaks = {head: position_peak(problem, everything, head) + self._fixed for head in heads}
        fitting = [head for head in heads if peaks[head] <= budget]
        if fitting:
            head = min(fitting, key=lambda head: problem.heads[head].seconds)
        else:
            head = min(heads, key=lambda head: (peaks[head], problem.heads[head].seconds))
        result = self._referee.run({}, known.rows[head])
        return self._peak(result), result.seconds

    def every_layer_step(self) -> tuple[int, float]:
        """(peak bytes, seconds) of the step with every block recomputed, as `gradient_checkpointing=True` does it."""
        everything = {path: Decision(Action.RECOMPUTE) for path in self.survey.chain.blocks}
        result = self._referee.run(everything, None)
        return self._peak(result), result.seconds

    def _infeasible(self, budget: int) -> InfeasibleBudgetError:
        least = self.min_peak_bytes()
        entry = min((e for e in self._confirmed.values()), key=lambda e: e.peak_bytes)
        details = [f"{line.category:<28} {format_bytes(line.num_bytes):>10}" for line in self._ledger(entry)]
        rounded = math.ceil(least / MIB)
        return InfeasibleBudgetError(
            f"budget {format_bytes(budget)} is below the smallest reachable peak, {format_bytes(least)}",
            budget=budget,
            min_peak=least,
            details=["at that peak:", *details],
            remedies=[f"a budget of {rounded}MiB or more"],
        )

    def _ledger(self, entry: _Confirmed) -> tuple[LedgerLine, ...]:
        beside = {
            HOST: _SLACK,
            LIBRARY: self._overhead.library_bytes,
            SLACK: entry.simulation.slack_bytes,
            CONTEXT: self._overhead.context_bytes,
        }
        return ledger_lines(entry.simulation.at_peak, beside, how_workspaces_are_known(self._cost))

    def _as_plan(self, entry: _Confirmed, budget: int | None) -> Plan:
        known = self.survey
        rows: list[BlockRow] = []
        for path, kind, index in zip(known.chain.blocks, known.kinds, entry.choice.blocks, strict=True):
            stage = known.problem.stages[len(rows)][index]
            text = describe_option(known.options[kind][index])
            rows.append(BlockRow(path, text, stage.kept, max(0.0, stage.seconds)))
        chunk_rows = known.rows[entry.choice.head]
        notes = [known.chain.note] if known.chain.note else []
        released = len(frozen_int8_linears(self._twin.model))
        if released:
            notes.append(f"{released} Linear8bitLt layers keep no input for backward, which plain bitsandbytes would")
        if chunk_rows is not None:
            notes.append(f"chunked loss, {chunk_rows} rows at a time: changes rounding; forbid with 'chunked_loss'")
        return Plan(
            decisions=known.decisions(entry.choice.blocks),
            loss_chunk_rows=chunk_rows,
            budget_bytes=budget,
            predicted_peak_bytes=entry.peak_bytes,
            predicted_step_seconds=known.fixed_seconds + entry.choice.seconds,
            ledger=self._ledger(entry),
            rows=tuple(rows),
            fingerprint=self._fingerprint,
            notes=tuple(notes),
            versions={
                "torch": torch.__version__,
                "transformers": transformers.__version__,
                "python": platform.python_version(),
            },
        )


def plan(
    model: nn.Module,
    batch: Mapping[str, Any],
    budget: int | str | None,
    *,
    optimizer: Optimizer = "adamw",
    accumulation_steps: int = 1,
    forbid: Collection[str] = (),
    cost: Cost | None = None,
    loss: LossFunction | None = None,
    device: torch.device | None = None,
    capability: Capability | None = None,
) -> Plan:
    """The fastest training step of `model` on batches like `batch` whose peak stays within `budget`.

    Same arguments and errors as `Planner`; `budget` is bytes or a text with a unit ("14GiB"). The model is not run.

    Raises:
        InfeasibleBudgetError: nothing fits; carries `min_peak`.
    """
    wanted = None if budget is None else parse_bytes(budget)
    planner = Planner(
        model,
        batch,
        optimizer=optimizer,
        accumulation_steps=accumulation_steps,
        forbid=forbid,
        cost=cost,
        loss=loss,
        device=device,
        capability=capability,
    )
    return planner.plan(wanted)


def frontier(model: nn.Module, batch: Mapping[str, Any], points: int = 16, **options: Any) -> list[Plan]:
    """Pareto-optimal plans of `model`, from the smallest peak to the fastest step.

    `options` are those of `Planner`.
    """
    return Planner(model, batch, **options).frontier(points)
