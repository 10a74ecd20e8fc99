"""Points of the frontier for a table: chosen by the planner, or one for each budget that was asked for."""

from collections.abc import Sequence

from rematree.planning.planner import Planner
from rematree.report.tables import FrontierPoint, PlainStep


def sweep(planner: Planner, budgets: Sequence[int], points: int) -> list[FrontierPoint]:
    """A point for each of `budgets`, smallest first; without any, at most `points` of the planner's choice.

    Raises:
        InfeasibleBudgetError: nothing fits any of the budgets.
    """
    if not budgets:
        return [FrontierPoint(None, plan) for plan in planner.frontier(points)]
    ordered = sorted(set(budgets))
    least = planner.min_peak_bytes()
    fitting = [budget for budget in ordered if budget >= least]
    # Asked for when nothing fits, the planner raises its own error.
    plans = dict(zip(fitting, planner.plans(fitting or ordered[-1:]), strict=False))
    return [FrontierPoint(budget, plans.get(budget)) for budget in ordered]


def plain_step(planner: Planner) -> PlainStep:
    """The step without any plan, with the slack that the peak of every plan has."""
    return PlainStep(*planner.plain_step())
