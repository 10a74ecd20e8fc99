"""What a choice with groups of blocks takes: bytes and seconds, walked through as the executor does it.

A group is a run of blocks of which only the first one's input is kept; they are recomputed as one, and may hold smaller
groups. The solver that chooses them is `rematree.solve.nested`; here is what its answers are held against.
"""

import itertools
import math
from collections.abc import Iterator, Sequence

from rematree.solve.chain import Advance, ChainChoice, ChainProblem, position_peak

Group = tuple[int, int]


def square_root_groups(count: int) -> tuple[Group, ...]:
    """`count` blocks in about sqrt(count) groups of about equal size.

    Source:
        Chen, Xu, Zhang, Guestrin 2016, section 4.1.
    """
    parts = max(1, math.isqrt(count))
    ends = [count * part // parts for part in range(parts + 1)]
    return tuple((a, b) for a, b in itertools.pairwise(ends) if b - a > 1)


def treeverse_advances(steps: int, slots: int) -> int:
    """Least number of forward steps that bring back every state of a homogeneous chain in reverse order.

    Args:
        steps: Of the chain.
        slots: States that can be kept at once, the first one included.
    Returns:
        Forward steps without the one that backward of each step needs itself: r * steps - C(slots + r, slots + 1),
        with r the smallest repetition number for which C(slots + r, slots) >= steps.
    Source:
        Griewank 1992; Griewank and Walther 2000, proposition 1.
    """
    repetitions = 0
    while math.comb(slots + repetitions, slots) < steps:
        repetitions += 1
    return repetitions * steps - math.comb(slots + repetitions, slots + 1)


# -- what a choice with groups takes ----------------------------------------------------------------------------------


def grouped_step(problem: ChainProblem, blocks: Sequence[int], head: int, groups: Sequence[Group]) -> tuple[int, float]:
    """(largest bytes at any position, seconds) of one choice of options and groups, head included.

    The step is walked through as the executor does it; nothing here is shared with the dynamic program.
    """
    walk = _Walk(problem, blocks, groups)
    walk.run(0, len(blocks), problem.base, None)
    head_option = problem.heads[head]
    return max(walk.peak, walk.end + head_option.peak), sum(walk.seconds) + head_option.seconds


def by_block(problem: ChainProblem, choice: ChainChoice) -> list[tuple[int, float]]:
    """For each block, (bytes that its forward leaves until backward, extra seconds)."""
    walk = _Walk(problem, choice.blocks, choice.groups)
    walk.run(0, len(choice.blocks), problem.base, None)
    return list(zip(walk.kept, walk.seconds, strict=True))


class _Walk:
    def __init__(self, problem: ChainProblem, blocks: Sequence[int], groups: Sequence[Group]) -> None:
        self.problem = problem
        self.blocks = blocks
        self.groups = groups
        self.peak = 0
        self.end = 0
        self.kept = [0] * len(blocks)
        self.seconds = [0.0] * len(blocks)

    def later(self, block: int) -> int:
        """Gradients of the parameters of blocks behind `block`."""
        return sum(self.problem.gradients[block + 1 :])

    def advance(self, block: int) -> Advance:
        found = self.problem.advances[block]
        assert found is not None
        return found

    def parts(self, start: int, stop: int, again: Group | None) -> Iterator[Group]:
        """Blocks start..stop-1 as single blocks and the largest groups inside, `again` itself left out."""
        at = start
        while at < stop:
            inner = [g for g in self.groups if g[0] == at and g[1] <= stop and g != again]
            part = max(inner, key=lambda g: g[1], default=(at, at + 1))
            yield part
            at = part[1]

    def run(self, start: int, stop: int, live: int, again: Group | None) -> None:
        """Forward and backward of blocks start..stop-1; `again` is the group that is being run again, if it is."""
        beside = 0 if again is None else self.advance(stop - 1).gradient + self.later(stop - 1)
        self.peak = max(self.peak, live)
        for part_start, part_stop in self.parts(start, stop, again):
            last = again is not None and part_stop == stop
            if part_stop - part_start == 1:
                option = self.problem.stages[part_start][self.blocks[part_start]]
                if not last or option.fill:
                    self.peak = max(self.peak, live + option.forward + beside)
                if again is not None:
                    self.seconds[part_start] += option.fill if last else self.advance(part_start).seconds
                else:
                    self.kept[part_start] = option.kept
                self.seconds[part_start] += option.seconds
                self.peak = max(self.peak, live + option.backward + self.later(part_start))
                live += option.kept
                continue
            members = range(part_start, part_stop)
            for member in members if not last else ():
                taken = 0 if member == part_start else self.advance(member - 1).output
                self.peak = max(self.peak, live + taken + self.advance(member).forward + beside)
                if again is not None:
                    self.seconds[member] += self.advance(member).seconds
            if again is None:
                for member in members:
                    self.kept[member] = self.advance(member).beside
                live += sum(self.kept[part_start:part_stop])
                self.kept[part_stop - 1] += self.advance(part_stop - 1).output
            self.run(part_start, part_stop, live, (part_start, part_stop))
            live += self.advance(part_stop - 1).output
        self.end = live


def choice_peak(problem: ChainProblem, choice: ChainChoice) -> int:
    """Largest bytes at any position of `choice`, with or without groups."""
    if not choice.groups:
        return position_peak(problem, choice.blocks, choice.head)
    return grouped_step(problem, choice.blocks, choice.head, choice.groups)[0]
