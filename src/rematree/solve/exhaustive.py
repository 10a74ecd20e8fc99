"""Every choice there is, for chains small enough: the oracle the dynamic program is tested against."""

import itertools

from rematree.solve.chain import ChainChoice, ChainProblem, position_peak


def solve_exhaustively(problem: ChainProblem, limit: int) -> ChainChoice | None:
    """The fastest choice within `limit`, by trying all of them.

    Cost:
        product of the numbers of options.
    """
    best: ChainChoice | None = None
    for blocks in itertools.product(*(range(len(stage)) for stage in problem.stages)):
        for head, option in enumerate(problem.heads):
            if position_peak(problem, blocks, head) > limit:
                continue
            seconds = option.seconds + sum(s[i].seconds for s, i in zip(problem.stages, blocks, strict=True))
            if best is None or seconds < best.seconds:
                best = ChainChoice(blocks, head, seconds)
    return best
