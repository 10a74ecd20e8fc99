"""Budget in, plan out: survey the model once, solve the chain for a budget, let the referee confirm.

`Planner` keeps the survey, so that a frontier or several budgets cost one observation. `plan` is the one-call form.
"""

import copy
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

import torch
from torch import nn

from rematree.engines import any_sharded, without_engine
from rematree.errors import InfeasibleBudgetError, UsageError
from rematree.execute.input_grads import as_leaves
from rematree.execute.own_compile import refuse_compiled
from rematree.fingerprint import describe_batch, describe_model, versions
from rematree.memory.accounts import CONTEXT, HOST, LIBRARY, SLACK, how_workspaces_are_known, ledger_lines
from rematree.observation.absent import is_absent
from rematree.observation.attention_kernels import Capability
from rematree.observation.observe import LossFunction, Twin
from rematree.observation.running import running_chain
from rematree.planning.compile_profile import Profiler
from rematree.planning.notes import notes_on
from rematree.planning.options import describe_groups, describe_option
from rematree.planning.pace import is_live, is_measured, measure_pace
from rematree.planning.scaling import bytes_before, scaled
from rematree.planning.search import Confirmed, Search
from rematree.planning.survey import Survey, survey, tokens_of
from rematree.plans import Action, BlockRow, Decision, LedgerLine, Levers, Plan
from rematree.pricing.cost import Cost, Measured
from rematree.pricing.devices import overhead_of
from rematree.referee.folding import block_kinds
from rematree.referee.ranks import Ranks, ranks_of
from rematree.referee.simulate import Optimizer, Referee, Simulation
from rematree.regions import find_chain
from rematree.solve.chain import position_peak
from rematree.solve.groups import by_block
from rematree.units import KIB, MIB, format_bytes, parse_bytes

LEVERS: Final = frozenset({"chunked_loss", "lean_adapters", "compile", "groups"})
_WORTH_COMPILING: Final = 200  # steps from which it is worth a minute to find out
_SLACK: Final = 256 * KIB  # small host tensors a step makes outside the model: loss sums, generator states


class Planner:
    """One observed model and batch, ready to be planned for any budget.

    Args:
        model: The model as it will train: adapters on, frozen what is frozen. Read, not run.
        batch: One batch as the training loop will pass it (`model(**batch)`), labels included.
        optimizer: What holds state: "adamw" (two states per trained parameter, in its dtype), "adamw_8bit" (of
            bitsandbytes), "paged_adamw_8bit" (on a GPU, state of large tensors counts as on the host), "sgd", "none".
        accumulation_steps: More than one means gradients of earlier micro-batches are live during the step.
        clips: Whether the loop clips gradients (`clip_grad_norm_`) before the optimizer's step, as Trainers do unless
            told otherwise (`max_grad_norm`); its time counts, its bytes are a few scalars. False: it does not.
        forbid: Levers not to use: "chunked_loss" and "compile" (they change rounding), "lean_adapters", "groups".
        cost: Prices ops; default: measured on the model's device.
        loss: The scalar to differentiate, from the model's output; default: its `loss`.
        device: Where the step will run, if not where the model is; it need not be in this machine. Then `cost` says
            what it is like.
        capability: Compute capability of that device, which decides between attention kernels.
        steps: How many steps the job will run, if that is known: compiling blocks must pay for itself within them.
        allow_compile: Whether blocks may be compiled, which changes rounding and takes up to minutes, now to measure
            and again when training begins. Default: if `steps` is known to be at least 200.
        ranks: Over which ranks, and by which engine, the step will be distributed; the budget is that of each. Default:
            read off the model, if DDP wraps it or FSDP2 shards it.
    Attributes:
        ranks: As above.
    Raises:
        UsageError: unknown lever, no loss.
        UnsupportedModelError: the model cannot be observed, or its adapter is prefix tuning.
    Cost:
        Seconds: some 20 simulated steps, and one short measurement of each distinct op.
    """

    def __init__(
        self,
        model: nn.Module,
        batch: Mapping[str, Any],
        *,
        optimizer: Optimizer = "adamw",
        accumulation_steps: int = 1,
        clips: bool = True,
        forbid: Collection[str] = (),
        cost: Cost | None = None,
        loss: LossFunction | None = None,
        device: torch.device | None = None,
        capability: Capability | None = None,
        steps: int | None = None,
        allow_compile: bool | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        self.ranks = ranks_of(model) if ranks is None else ranks
        model = without_engine(model)
        unknown = sorted(set(forbid) - LEVERS)
        if unknown:
            raise UsageError(f"unknown lever {unknown[0]!r} in forbid; levers: {', '.join(sorted(LEVERS))}")
        if not any(p.requires_grad for p in model.parameters()):
            raise UsageError("no parameter of the model requires grad: there is no training step to plan")
        if cost is None and device is not None and is_absent(device):
            raise UsageError(f"no {device.type} device is here to measure", remedies=["pass cost=, say a Roofline"])
        refuse_compiled(model)
        self._twin = Twin(model, batch, loss, device=device, capability=capability)
        self.fingerprint = replace(describe_model(model), batch=describe_batch(batch), device=self._twin.device.type)
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
            ranks=self.ranks,
            clips=clips,
        )
        plain = self._referee.run(Levers())
        runs = is_measured(self._cost) and is_live(model, self._twin.device) and not any_sharded(model)
        if runs:
            self._referee.pace = measure_pace(model, self._referee, plain)
            plain = self._referee.paced(plain)
        if allow_compile is None:
            allow_compile = steps is not None and steps >= _WORTH_COMPILING
        self.survey: Survey = survey(
            self._referee,
            chain,
            plain,
            chunk="chunked_loss" not in self._forbid and loss is None,
            lean="lean_adapters" not in self._forbid,
            # Their all-gathers are not priced, so a plan takes none but those of the step itself.
            groups="groups" not in self._forbid and not (self.ranks and self.ranks.gathers_for_groups),
            compiler=Profiler(model, steps) if allow_compile and "compile" not in self._forbid else None,
            live=model if runs and loss is None else None,
        )
        self._search = Search(self.survey, self._referee, self._fixed)
        self._scaled = False

    def for_batch(self, batch: Mapping[str, Any]) -> "Planner":
        """A planner for `batch`, the same tensors in other shapes, from this one's survey, in milliseconds.

        The solver chooses by numbers scaled with the tokens (`scaling.py`); the referee confirms every plan at
        its own shape, whose bytes and seconds it is given.

        Raises:
            UsageError: it has other tensors.
        """
        other = copy.copy(self)
        other._twin = self._twin.with_batch(batch)
        other.fingerprint = replace(self.fingerprint, batch=describe_batch(batch))
        other._referee = self._referee.for_twin(other._twin)
        other.survey = scaled(self.survey, tokens_of(batch) / tokens_of(self._twin.batch))
        other._search = Search(other.survey, other._referee, self._fixed)
        other._scaled = True
        return other

    def bytes_before(self) -> int:
        """What there is before the step begins, and what the device needs beside the tensors of any step."""
        return bytes_before(self.survey.plain) + self._fixed

    def min_peak_bytes(self) -> int:
        """Smallest confirmed peak of any plan."""
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
                    raise self._infeasible(limit)
                entry = self._search.best_within(limit)
                assert entry is not None
            found.append(self._as_plan(entry, limit))
        return found

    def frontier(self, points: int = 16) -> list[Plan]:
        """Pareto-optimal plans from the smallest peak to the fastest step, at most `points` of them."""
        return [self._as_plan(entry, None) for entry in self._search.frontier(points)]

    def simulation(self, plan: Plan) -> Simulation:
        """The step under `plan`, with its timeline; costs nothing for a plan that this planner has made."""
        return self._search.simulation_of(plan.levers) or self._referee.run(plan.levers)

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
        peaks = {head: position_peak(problem, everything, head) + self._fixed for head in heads}
        fitting = [head for head in heads if peaks[head] <= budget]
        fastest = min(fitting, key=lambda head: problem.heads[head].seconds, default=None)
        smallest = min(heads, key=lambda head: (peaks[head], problem.heads[head].seconds))
        rows = known.rows[smallest if fastest is None else fastest]
        result = self._referee.run(Levers(loss_chunk_rows=rows))
        return self._search.peak(result), result.seconds

    def every_layer_step(self) -> tuple[int, float]:
        """(peak bytes, seconds) of the step with every block recomputed, as `gradient_checkpointing=True` does it.

        With transformers' hook on a frozen input embedding, as the Trainer and PEFT set it.
        """
        everything = {path: Decision(Action.RECOMPUTE) for path in self.survey.chain.blocks}
        with as_leaves(self._twin.model):
            result = self._referee.run(Levers(everything))
        return self._search.peak(result), result.seconds

    def _infeasible(self, budget: int) -> InfeasibleBudgetError:
        entry = self._search.least()
        least = entry.peak_bytes
        details = [f"{line.category:<28} {format_bytes(line.num_bytes):>10}" for line in self._ledger(entry)]
        return InfeasibleBudgetError(
            f"budget {format_bytes(budget)} is below the smallest reachable peak, {format_bytes(least)}",
            budget=budget,
            min_peak=least,
            details=["at that peak:", *details],
            remedies=[f"a budget of {math.ceil(least / MIB)}MiB or more"],
        )

    def _ledger(self, entry: Confirmed) -> tuple[LedgerLine, ...]:
        beside = {
            HOST: _SLACK,
            LIBRARY: self._overhead.library_bytes,
            SLACK: entry.simulation.slack_bytes,
            CONTEXT: self._overhead.context_bytes,
        }
        return ledger_lines(entry.simulation.at_peak, beside, how_workspaces_are_known(self._cost))

    def _as_plan(self, entry: Confirmed, budget: int | None) -> Plan:
        known = self.survey
        told = zip(
            known.chain.blocks,
            (known.options[kind][index] for kind, index in zip(known.kinds, entry.choice.blocks, strict=True)),
            describe_groups(entry.choice.groups, len(known.chain.blocks)),
            by_block(known.problem, entry.choice),
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
            bound_seconds=None if self._scaled else fixed + self._search.bound(entry, budget),
            budget_bytes=budget,
            predicted_peak_bytes=entry.peak_bytes,
            predicted_step_seconds=entry.simulation.seconds if self._scaled else fixed + entry.choice.seconds,
            ledger=self._ledger(entry),
            rows=tuple(rows),
            fingerprint=self.fingerprint,
            notes=notes_on(known, levers, self._twin.model, self.ranks),
            versions=versions(),
        )


def plan(
    model: nn.Module,
    batch: Mapping[str, Any],
    budget: int | str | None,
    *,
    optimizer: Optimizer = "adamw",
    accumulation_steps: int = 1,
    clips: bool = True,
    forbid: Collection[str] = (),
    cost: Cost | None = None,
    loss: LossFunction | None = None,
    device: torch.device | None = None,
    capability: Capability | None = None,
    steps: int | None = None,
    allow_compile: bool | None = None,
    ranks: Ranks | None = None,
) -> Plan:
    """The fastest training step of `model` on batches like `batch` whose peak stays within `budget`.

    Same arguments and errors as `Planner`; `budget` is bytes or a text with a unit ("14GiB").

    Raises:
        InfeasibleBudgetError: nothing fits; carries `min_peak`.
    """
    wanted = None if budget is None else parse_bytes(budget)  # a bad one is refused before anything is simulated
    planner = Planner(
        model,
        batch,
        optimizer=optimizer,
        accumulation_steps=accumulation_steps,
        clips=clips,
        forbid=forbid,
        cost=cost,
        loss=loss,
        device=device,
        capability=capability,
        steps=steps,
        allow_compile=allow_compile,
        ranks=ranks,
    )
    return planner.plan(wanted)


def frontier(model: nn.Module, batch: Mapping[str, Any], points: int = 16, **options: Any) -> list[Plan]:
    """Pareto-optimal plans of `model`, from the smallest peak to the fastest step.

    `options` are those of `Planner`.
    """
    return Planner(model, batch, **options).frontier(points)
