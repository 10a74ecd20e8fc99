"""What a survey of one batch says about a batch of another size: what grows with the tokens is scaled.

Bytes that a block keeps, and seconds of all but the optimizer, are taken as proportional to the number of tokens.
Attention's seconds grow faster, and a chunk of the loss does not grow at all, so this is what a solver proposes by, and
nothing that a plan promises: the referee runs what it proposes at the batch's own size.
"""

import math
from collections.abc import Sequence
from dataclasses import replace

from rematree.memory.ledger import BEFORE_THE_BLOCKS
from rematree.planning.survey import Survey
from rematree.referee.simulation import Simulation
from rematree.solve.chain import Advance, ChainProblem, HeadOption, StageOption


def bytes_before(plain: Simulation) -> int:
    """What is live when a step begins: weights, batch, state of the optimizer."""
    first = plain.segment(BEFORE_THE_BLOCKS)
    assert first is not None
    return first.live_bytes


def scaled(survey: Survey, ratio: float) -> Survey:
    """`survey` for a batch of `ratio` times as many tokens."""
    plain = survey.plain
    before, optimizer = bytes_before(plain), plain.segments[-1].seconds

    def seconds(of_step: float) -> float:
        return optimizer + (of_step - optimizer) * ratio

    return replace(
        survey,
        problem=_scaled_problem(survey.problem, survey.rows, before, ratio),
        plain=replace(
            plain,
            peak_bytes=before + math.ceil((plain.peak_bytes - before) * ratio),
            seconds=seconds(plain.seconds),
        ),
        fixed_seconds=seconds(survey.fixed_seconds),
        released=tuple(math.ceil(size * ratio) for size in survey.released),
    )


def _scaled_problem(problem: ChainProblem, rows: Sequence[int | None], before: int, ratio: float) -> ChainProblem:
    def grow(size: int, fixed: int = 0) -> int:
        return fixed + math.ceil((size - fixed) * ratio)

    def stage(option: StageOption, gradient: int) -> StageOption:
        return StageOption(
            grow(option.kept),
            grow(option.forward),
            grow(option.backward, min(gradient, option.backward)),
            option.seconds * ratio,
            option.fill * ratio,
        )

    def advance(each: Advance | None) -> Advance | None:
        if each is None:
            return None
        return Advance(
            grow(each.output), grow(each.forward), grow(each.gradient), each.seconds * ratio, grow(each.beside)
        )

    row_bytes = _bytes_of_a_row(problem.heads, rows)
    return ChainProblem(
        base=grow(problem.base, before),
        stages=tuple(
            tuple(stage(option, gradient) for option in stages)
            for stages, gradient in zip(problem.stages, problem.gradients, strict=True)
        ),
        gradients=problem.gradients,
        heads=tuple(
            HeadOption(grow(head.peak, min(head.peak, int(row_bytes * (count or 0)))), head.seconds * ratio)
            for head, count in zip(problem.heads, rows, strict=True)
        ),
        advances=tuple(advance(each) for each in problem.advances),
    )


def _bytes_of_a_row(heads: Sequence[HeadOption], rows: Sequence[int | None]) -> float:
    """What one more row in a chunk of the loss adds to the peak, from the largest and the smallest chunk."""
    sizes = sorted((count, head.peak) for count, head in zip(rows, heads, strict=True) if count is not None)
    if len(sizes) < 2:
        return 0.0
    (few, low), (many, high) = sizes[0], sizes[-1]
    return max(0.0, (high - low) / (many - few))
