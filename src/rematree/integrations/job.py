"""The plans of one training run: for its longest batch, for shorter ones, and anew for what turns out larger."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

from rematree.errors import InfeasibleBudgetError, PlanMismatchError, RematreeError
from rematree.execute.selection import covers
from rematree.integrations.batches import Batches, roomier
from rematree.planning.ladder import Ladder, build_ladder
from rematree.planning.planner import Planner
from rematree.plans import Plan
from rematree.pricing.cost import Cost


@dataclass(frozen=True)
class Job:
    """The planners in use, how to make others, and the bytes there are.

    Attributes:
        model: What trains.
        planner: Makes a planner for a batch of the data, or for one as the model is called with it.
        ladder: The planners in use; the last is for the longest batch.
        limit: Bytes.
        most: Tokens that no row has more of; None: not known.
        several: Whether batches of different lengths may have plans of their own.
        note: What the longest batch is.
    """

    model: Any
    planner: Callable[[Mapping[str, Any]], Planner]
    ladder: Ladder
    limit: int
    most: int | None
    several: bool
    note: str

    @classmethod
    def of(
        cls,
        model: Any,
        planner: Callable[[Mapping[str, Any]], Planner],
        called: Callable[[Mapping[str, Any]], Mapping[str, Any]],
        batches: Batches,
        limit: int,
        most: int | None,
        *,
        several: bool,
    ) -> Self:
        """The job for `batches`; for what is known otherwise if the longest is only a bound, and cannot be planned for.

        Args:
            model: What trains.
            planner: Makes a planner.
            called: What the model is called with for a batch of the data.
            batches: What the data can give.
            limit: Bytes.
            most: Tokens that no row has more of.
            several: Whether there may be more than one plan.
        Raises:
            InfeasibleBudgetError: nothing fits.
            RematreeError: as of `Planner`.
        """
        try:
            longest = planner(batches.longest)
            if several:
                ladder = build_ladder(longest, limit, batches.weights, lambda length: called(batches.of(length)))
            else:
                longest.plan(limit)
                ladder = Ladder((longest,))
        except RematreeError:
            if batches.otherwise is None:
                raise
            return cls.of(model, planner, called, batches.otherwise, limit, most, several=several)
        return cls(model, planner, ladder, limit, most, several, batches.note)

    @property
    def cost(self) -> Cost:
        """What prices ops."""
        return self.ladder.planners[0].observed.cost

    def plans(self, must: int = -1) -> tuple[Plan, ...]:
        """As of `Ladder.plans`."""
        return self.ladder.plans(self.limit, must)

    def grown(self, batch: Mapping[str, Any]) -> tuple[Self, int]:
        """With a planner for a batch that no plan covers, and for some larger ones if they fit; and its number.

        Raises:
            InfeasibleBudgetError: the batch does not fit.
            PlanMismatchError: there may be one plan only, and one for this batch would not cover those before.
        """
        planner = self.planner(roomier(batch, self.most))
        if not self.several and not covers(planner.fingerprint, self.ladder.planners[-1].fingerprint):
            raise PlanMismatchError(
                "there is one plan for all batches, and none of those that came so far covers all others",
                details=[str(each.fingerprint.batch) for each in (self.ladder.planners[-1], planner)],
                remedies=["BudgetCallback without allow_compile=True"],
            )
        try:
            planner.plan(self.limit)
        except InfeasibleBudgetError:
            planner = self.planner(batch)
            planner.plan(self.limit)
        ladder = self.ladder.extended(planner) if self.several else Ladder((planner,))
        return replace(self, ladder=ladder), ladder.number_for(planner.fingerprint)
