"""Budget in, plan out: observe the model once, solve the chain for a budget, let the referee confirm.

`Planner` keeps what was observed (`observed.py`), so that a frontier or several budgets cost one observation. `plan` is
the one-call form.
"""

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Any, Unpack

from torch import nn

from rematree.errors import InfeasibleBudgetError
from rematree.execute.input_grads import as_leaves
from rematree.fingerprint import versions
from rematree.memory.accounts import CONTEXT, HOST, LIBRARY, SLACK, how_workspaces_are_known, ledger_lines
from rematree.planning.notes import notes_on
from rematree.planning.observed import HOST_BYTES, Observed, observe
from rematree.planning.options import describe_groups, describe_option
from rematree.planning.scaling import bytes_before
from rematree.planning.search import Confirmed, Search
from rematree.planning.settings import Settings, Told, shows_settings
from rematree.planning.survey import Survey
from rematree.plans import Action, BlockRow, Decision, Fingerprint, LedgerLine, Levers, Plan
from rematree.referee.ranks import Ranks
from rematree.referee.simulation import Simulation
from rematree.solve.chain import position_peak
from rematree.units import MIB, format_bytes, parse_bytes


class Planner:
    """One observed model and batch, ready to be planned for any budget.

    Args:
        model: The model as it will train: adapters on, frozen what is frozen. Read, not run.
        batch: One batch as the training loop will pass it (`model(**batch)`), labels included.
        told: How the step runs and what a plan may do, by the names of `rematree.planning.settings.Settings`:
            `optimizer`, `accumulation_steps`, `clips`, `forbid`, `cost`, `loss`, `device`, `capability`, `steps`,
            `allow_compile`, `ranks`.
    Attributes:
        observed: What is known of them, whatever is asked.
    Raises:
        UsageError: unknown lever, no loss.
        UnsupportedModelError: the model cannot be observed, or its adapter is prefix tuning.
    Cost:
        Seconds: some 20 simulated steps, and one short measurement of each distinct op.
    """

    @shows_settings
    def __init__(self, model: nn.Module, batch: Mapping[str, Any], **told: Unpack[Told]) -> None:
        self._take(observe(model, batch, Settings(**told)))

    def _take(self, observed: Observed) -> None:
        self.observed = observed
        self._search = Search(observed.survey, observed.referee, observed.fixed_bytes, certifies=not observed.is_scaled)

    @property
    def survey(self) -> Survey:
        """The options there are, in numbers."""
        return self.observed.survey

    @property
    def fingerprint(self) -> Fingerprint:
        """What the plans are for."""
        return self.observed.fingerprint

    @property
    def ranks(self) -> Ranks | None:
        """Over which ranks the step is distributed; None: over none."""
        return self.observed.ranks

    def for_batch(self, batch: Mapping[str, Any]) -> "Planner":
        """A planner for `batch`, the same tensors in other shapes, from this one's survey, in milliseconds.

        The solver chooses by numbers scaled with the tokens (`scaling.py`); the referee confirms every plan at
        its own shape, whose bytes and seconds it is given. Compiled blocks, which were measured with one batch, are
        not among its options.

        Raises:
            UsageError: it has other tensors.
        """
        other = copy.copy(self)
        other._take(self.observed.for_batch(batch))
        return other

    def scales_to(self, batch: Mapping[str, Any]) -> bool:
        """Whether `for_batch` has the levers that a planner made for `batch` would have."""
        return not self.observed.referee.profiles and self.survey.holds_for(self.observed.twin.model, batch)

    def bytes_before(self) -> int:
        """What there is before the step begins, and what the device needs beside the tensors of any step."""
        return bytes_before(self.survey.plain) + self.observed.fixed_bytes

    def min_peak_bytes(self) -> int:
        """Smallest confirmed peak of any plan that takes no longer than four plain steps."""
        return self._search.least().peak_bytes

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
            self._search.around(limit)
        found: list[Plan] = []
        for limit in limits:
            entry = self._search.best_within(limit)
            if entry is None:
                assert limit is not None
                if self.min_peak_bytes() > limit:
                    raise self.infeasible(limit)
                entry = self._search.best_within(limit)
                assert entry is not None
            found.append(self._as_plan(entry, limit))
        return found

    def frontier(self, points: int = 16) -> list[Plan]:
        """Pareto-optimal plans from the smallest peak to the fastest step, at most `points` of them."""
        return [self._as_plan(entry, None) for entry in self._search.frontier(points)]

    def simulation(self, plan: Plan) -> Simulation:
        """The step under `plan`, with its timeline; costs nothing for a plan that this planner has made."""
        return self._search.simulation_of(plan.levers) or self.observed.referee.run(plan.levers)

    def plain_step(self) -> tuple[int, float]:
        """(peak bytes, seconds) of the step without a plan."""
        return self._search.peak(self.survey.plain), self.survey.plain.seconds

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
        peaks = {head: position_peak(problem, everything, head) + self.observed.fixed_bytes for head in heads}
        fitting = [head for head in heads if peaks[head] <= budget]
        fastest = min(fitting, key=lambda head: problem.heads[head].seconds, default=None)
        smallest = min(heads, key=lambda head: (peaks[head], problem.heads[head].seconds))
        rows = known.rows[smallest if fastest is None else fastest]
        result = self.observed.referee.run(Levers(loss_chunk_rows=rows))
        return self._search.peak(result), result.seconds

    def every_layer_step(self) -> tuple[int, float]:
        """(peak bytes, seconds) of the step with every block recomputed, as `gradient_checkpointing=True` does it.

        With transformers' hook on a frozen input embedding, as the Trainer and PEFT set it.
        """
        everything = {path: Decision(Action.RECOMPUTE) for path in self.survey.chain.blocks}
        with as_leaves(self.observed.twin.model):
            result = self.observed.referee.run(Levers(everything))
        return self._search.peak(result), result.seconds

    def infeasible(self, budget: int, message: str | None = None) -> InfeasibleBudgetError:
        """The error to raise where nothing fits `budget`: the smallest reachable peak, and what it is made of.

        Args:
            budget: Bytes.
            message: Its first line, where a caller was asked something else.
        """
        entry = self._search.least()
        least = entry.peak_bytes
        details = [line.text() for line in self._ledger(entry)]
        return InfeasibleBudgetError(
            message or f"budget {format_bytes(budget)} is below the smallest reachable peak, {format_bytes(least)}",
            budget=budget,
            min_peak=least,
            details=["at that peak:", *details],
            remedies=[f"a budget of {math.ceil(least / MIB)}MiB or more"],
        )

    def _ledger(self, entry: Confirmed) -> tuple[LedgerLine, ...]:
        overhead = self.observed.overhead
        beside = {
            HOST: HOST_BYTES,
            LIBRARY: overhead.library_bytes,
            SLACK: entry.simulation.slack_bytes,
            CONTEXT: overhead.context_bytes,
        }
        return ledger_lines(entry.simulation.at_peak, beside, how_workspaces_are_known(self.observed.cost))

    def _as_plan(self, entry: Confirmed, budget: int | None) -> Plan:
        observed, known = self.observed, self.survey
        told = zip(
            known.chain.blocks,
            (known.options[kind][index] for kind, index in zip(known.kinds, entry.choice.blocks, strict=True)),
            describe_groups(entry.choice.groups, len(known.chain.blocks)),
            known.left_by(entry.choice),
            strict=True,
        )
        rows = [
            BlockRow(path, describe_option(option, group), kept, max(0.0, seconds))
            for path, option, group, (kept, seconds) in told
        ]
        levers, fixed = known.levers(entry.choice), known.fixed_seconds
        return Plan(
            decisions=levers.decisions,
            loss_chunk_rows=levers.loss_chunk_rows,
            lean=levers.lean,
            compiled=levers.compiled,
            groups=levers.groups,
            bound_seconds=None if observed.is_scaled else fixed + self._search.bound(entry, budget),
            budget_bytes=budget,
            predicted_peak_bytes=entry.peak_bytes,
            predicted_step_seconds=entry.simulation.seconds if observed.is_scaled else fixed + entry.choice.seconds,
            ledger=self._ledger(entry),
            rows=tuple(rows),
            fingerprint=observed.fingerprint,
            notes=notes_on(known, levers, observed.twin.model, observed.ranks, entry.simulation.gathers),
            versions=versions(),
        )


@shows_settings
def plan(model: nn.Module, batch: Mapping[str, Any], budget: int | str | None, **told: Unpack[Told]) -> Plan:
    """The fastest training step of `model` on batches like `batch` whose peak stays within `budget`.

    Same arguments and errors as `Planner`; `budget` is bytes or a text with a unit ("14GiB").

    Raises:
        InfeasibleBudgetError: nothing fits; carries `min_peak`.
    """
    wanted = None if budget is None else parse_bytes(budget)  # a bad one is refused before anything is simulated
    return Planner(model, batch, **told).plan(wanted)


@shows_settings
def frontier(model: nn.Module, batch: Mapping[str, Any], points: int = 16, **told: Unpack[Told]) -> list[Plan]:
    """Pareto-optimal plans of `model`, from the smallest peak to the fastest step.

    Same arguments and errors as `Planner`; `points` is how many plans there are at most.
    """
    return Planner(model, batch, **told).frontier(points)
