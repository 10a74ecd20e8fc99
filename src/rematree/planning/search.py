"""From a budget to a confirmed plan: the solver adds up, the referee says what it was off by, the solver tries again.

Everything confirmed is kept, so that a plan found for one budget also serves another.
"""

import functools
import math
import sys
from dataclasses import dataclass
from typing import Final

from rematree.errors import UnsupportedModelError
from rematree.planning.survey import Survey
from rematree.plans import Levers
from rematree.referee.simulate import Referee
from rematree.referee.simulation import Simulation
from rematree.solve.bound import Certified, certify, tightened
from rematree.solve.chain import ChainChoice, in_runs, least_peak, solve_chain
from rematree.solve.groups import Group, choice_peak
from rematree.solve.nested import least_grouped_peak, quantum_for, solve_groups
from rematree.units import KIB

_RESOLUTION: Final = 16384  # quanta of the chain solver between the first block's start and the plain peak
_MAX_CONFIRMATIONS: Final = 6  # simulated steps spent on one budget
_WORTH_GROUPS: Final = 0.003  # of the step: groups that win less are left alone
_WORTH_SEARCHING: Final = 0.001  # of the step: when no plan in between can win more, the search for one ends
_FINER: Final = 4  # times, near the smallest peak
_LONGEST: Final = 4  # plain steps: for the last hundredth of memory, groups in groups can take thirty of 80 blocks
_NEAR_LEAST: Final = 3  # limits tried for the smallest peak


@dataclass(frozen=True, slots=True)
class Confirmed:
    """A choice of the solver with what the referee says of it.

    Attributes:
        choice: Options by index.
        simulation: The step under them.
        peak_bytes: All that the device must have.
        added_bytes: What the solver adds up: the smallest limit that has this choice.
    """

    choice: ChainChoice
    simulation: Simulation
    peak_bytes: int
    added_bytes: int


def quantum_of(survey: Survey) -> int:
    """Bytes that the chain solver counts in."""
    return max(KIB, (survey.plain.peak_bytes - survey.problem.base) // _RESOLUTION)


class Search:
    """Confirmed plans of one surveyed model and batch.

    Args:
        survey: Options in numbers.
        referee: Runs the whole step.
        beside: Bytes that the device needs beside the tensors of the step, whatever is decided.
        certifies: Whether there is to be a bound; what it takes also gives the fastest choice to the byte.
    """

    def __init__(self, survey: Survey, referee: Referee, beside: int, *, certifies: bool = True) -> None:
        self._survey = survey
        self._referee = referee
        self._beside = beside
        self._confirmed: dict[tuple[tuple[int, ...], int, tuple[Group, ...]], Confirmed] = {}
        self._quantum = quantum_of(survey)
        self._top = 2 * survey.plain.peak_bytes
        self._certifies = certifies
        self._certified: dict[int, Certified] = {}

    @functools.cached_property
    def _least_limit(self) -> int:
        """The smallest limit at which the solver finds something; asked for only where a budget comes near it."""
        problem = self._survey.problem
        least = least_peak(problem, self._quantum)
        return least_grouped_peak(problem, self._quantum, least, self._most) if problem.advances else least

    @property
    def _most(self) -> float:
        """Seconds of a choice, beyond a step in which nothing is recomputed, that are too many."""
        return (_LONGEST - 1) * self._survey.plain.seconds

    def peak(self, simulation: Simulation) -> int:
        """All that the device must have: the sum of the ledger."""
        return simulation.peak_bytes + simulation.slack_bytes + self._beside

    def _at(self, limit: int, *, exactly: bool = False) -> Confirmed | None:
        """The solver's choice for `limit`, with what the referee says of it. None if the solver finds nothing."""
        choice = self._solve(limit, exactly)
        if choice is None:
            return None
        key = (choice.blocks, choice.head, choice.groups)
        if key not in self._confirmed:
            result = self._referee.run(self._survey.levers(choice))
            if result.misread:
                raise UnsupportedModelError(
                    f"{sorted(result.misread)[0]}: its output is read after all; this is a bug in the survey"
                )
            added = choice_peak(self._survey.problem, choice)
            self._confirmed[key] = Confirmed(choice, result, self.peak(result), added)
        return self._confirmed[key]

    def _solve(self, limit: int, exactly: bool) -> ChainChoice | None:
        """The fastest choice; without groups if they would win next to nothing, for the referee's sake.

        Without groups it is the fastest up to the rounding to quanta, or `exactly`.
        """
        problem = self._survey.problem
        alone = solve_chain(problem, limit, self._quantum)
        if exactly:
            alone = self._certify(limit).choice or alone
        if alone is not None:
            alone = in_runs(problem, alone, limit)
        if not problem.advances or (alone is not None and self._groups_cannot_win(alone, limit)):
            return alone
        # Near the smallest peak, where there is nothing without groups, a quantum more or less is a whole forward.
        grouped = solve_groups(problem, limit, quantum_for(problem, limit, _FINER if alone is None else 1))
        if grouped is not None and grouped.seconds > self._most:
            return alone
        if alone is None or grouped is None:
            return alone or grouped
        wins = alone.seconds - grouped.seconds
        return grouped if wins > _WORTH_GROUPS * self._survey.plain.seconds else alone

    def _groups_cannot_win(self, alone: ChainChoice, limit: int) -> bool:
        """Whether a bound that is known anyway says so: what holds within a larger limit holds within this one."""
        known = max((found.seconds for at, found in self._certified.items() if at >= limit), default=-math.inf)
        return alone.seconds - known <= _WORTH_GROUPS * self._survey.plain.seconds

    def bound(self, entry: Confirmed, budget: int | None) -> float:
        """Seconds that no choice goes below within `budget`, or within what `entry` takes where that is more.

        It is more where the referee found less live than the solver had added up.
        """
        limit = entry.added_bytes
        if budget is not None:
            limit = max(limit, min(budget - self._beside, self._top))
        known = min(e.choice.seconds for e in self._confirmed.values() if e.added_bytes <= limit)
        return tightened(self._survey.problem, limit, self._certify(limit, known).seconds, known)

    def _certify(self, limit: int, known: float = math.inf) -> Certified:
        if limit not in self._certified:
            self._certified[limit] = certify(self._survey.problem, limit, self._quantum, known)
        return self._certified[limit]

    def simulation_of(self, levers: Levers) -> Simulation | None:
        """The step under `levers`, if that was confirmed."""
        known = (e.simulation for e in self._confirmed.values() if self._survey.levers(e.choice) == levers)
        return next(known, None)

    def best_within(self, budget: int | None) -> Confirmed | None:
        """The fastest of all plans confirmed so far that fit."""
        most = sys.maxsize if budget is None else budget
        fitting = [entry for entry in self._confirmed.values() if entry.peak_bytes <= most]
        return min(fitting, key=lambda e: (e.choice.seconds, e.peak_bytes), default=None)

    def around(self, budget: int | None) -> None:
        """Confirm plans around `budget`: lower the solver's limit by what the referee says it was off, then refine.

        A larger limit never makes the solver's choice slower, so what is left to win between a plan that fits and one
        that does not is the difference of their seconds; where that is next to nothing, it is left.
        """
        if budget is None:
            budget = self._top + self._beside
        top = high = min(budget - self._beside, self._top)
        low: int | None = None
        fastest, fitting = -math.inf, math.inf  # seconds of the choices at `high` and at `low`
        limit, floor = high, -1
        tried = 0
        while tried < _MAX_CONFIRMATIONS or low is None:
            entry = self._at(limit, exactly=self._certifies and limit == high == top)
            if entry is None:
                limit = floor = max(limit, self._least_limit)
                entry = self._at(limit)
                if entry is None:
                    return
            over = entry.peak_bytes - budget
            if over <= 0:
                low, fitting = limit, entry.choice.seconds
                if limit == high or high - limit <= self._quantum:
                    return
                limit = (limit + high) // 2
            else:
                if limit == floor:
                    return
                high, fastest = limit, entry.choice.seconds
                if low is None:
                    # Down to what it adds up to the choice is the same. Steps double: the allocator's slack may grow
                    # as the limit falls, and where nothing fitted in the end, the slowest plan would be taken.
                    limit = min(limit - (max(over, self._quantum) << tried), entry.added_bytes - self._quantum)
                else:
                    limit = (low + limit) // 2
            tried += 1
            if fitting - fastest <= _WORTH_SEARCHING * self._survey.plain.seconds:
                return

    def least(self) -> Confirmed:
        """The confirmed plan of the smallest peak."""
        for extra in range(_NEAR_LEAST):
            self._at(self._least_limit + extra * 4 * self._quantum)
        return min(self._confirmed.values(), key=lambda entry: entry.peak_bytes)

    def frontier(self, points: int) -> list[Confirmed]:
        """Pareto-optimal plans from the smallest peak to the fastest step, at most `points` of them."""
        self.least()
        self._at(self._top)
        fastest = self.best_within(None)
        assert fastest is not None
        # Above what the fastest choice takes there is nothing to win; both ends are confirmed already.
        room = max(0, fastest.added_bytes - self._least_limit)
        for index in range(1, points - 1):
            self._at(self._least_limit + room * index // (points - 1))
        front: list[Confirmed] = []
        for entry in sorted(self._confirmed.values(), key=lambda e: (e.peak_bytes, e.choice.seconds)):
            if not front or entry.choice.seconds < front[-1].choice.seconds:
                front.append(entry)
        if len(front) > points:
            front = [front[round(i * (len(front) - 1) / max(1, points - 1))] for i in range(points)]
        return front
