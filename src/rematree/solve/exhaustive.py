"""Every choice there is, for chains small enough: the oracle the dynamic programs are tested against."""

import itertools
from collections.abc import Iterator

from rematree.solve.chain import ChainChoice, ChainProblem
from rematree.solve.groups import Group, grouped_step


def solve_exhaustively(problem: ChainProblem, limit: int) -> ChainChoice | None:
    """The fastest choice within `limit`, by trying all of them: options, and nested groups where there are advances.

    Cost:
        product of the numbers of options, times the number of ways to nest groups.
    """
    best: ChainChoice | None = None
    count = len(problem.stages)
    nestings = [groups for groups in nested_groups(0, count) if _allowed(problem, groups)]
    for blocks in itertools.product(*(range(len(stage)) for stage in problem.stages)):
        for head in range(len(problem.heads)):
            for groups in nestings:
                peak, seconds = grouped_step(problem, blocks, head, groups)
                if peak <= limit and (best is None or seconds < best.seconds):
                    best = ChainChoice(blocks, head, seconds, groups)
    return best


def nested_groups(start: int, stop: int, *, whole: bool = True) -> Iterator[tuple[Group, ...]]:
    """Every set of runs of at least two of the blocks start..stop-1 of which any two are nested or apart.

    Args:
        start: First block.
        stop: Behind the last block.
        whole: Whether all of them may be one of the runs.
    """
    if stop - start < 2:
        yield ()
        return
    yield from nested_groups(start + 1, stop)  # no group begins with the first block
    for end in range(start + 2, stop + whole):  # the largest one that does ends here
        for inner in nested_groups(start, end, whole=False):
            for rest in nested_groups(end, stop):
                yield ((start, end), *inner, *rest)


def _allowed(problem: ChainProblem, groups: tuple[Group, ...]) -> bool:
    if not groups:
        return True
    if not problem.advances:
        return False
    return all(problem.advances[block] is not None for start, stop in groups for block in range(start, stop))
