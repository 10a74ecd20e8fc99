"""Chains of blocks for the solver's tests: small ones of every kind, and one like a language model's."""

from hypothesis import strategies as st

from rematree.solve.chain import Advance, ChainProblem, HeadOption, StageOption

_small = st.integers(0, 12)


def _stage_option(kept: int, forward: int, backward: int, seconds: int, fill: int) -> StageOption:
    return StageOption(kept, kept + forward, backward, float(seconds), float(fill))


_option = st.builds(_stage_option, _small, _small, st.integers(0, 25), _small, st.sampled_from((0, 0, 1, 5)))
_advance = st.builds(
    lambda o, f, g, s, b: Advance(o, f, g, float(s), b),
    st.integers(0, 6),
    _small,
    st.integers(0, 3),
    _small,
    st.sampled_from((0, 0, 1)),
)
_head = st.builds(lambda peak, seconds: HeadOption(peak, float(seconds)), st.integers(0, 20), _small)


@st.composite
def problems(draw: st.DrawFn) -> ChainProblem:
    stages = draw(st.lists(st.lists(_option, min_size=1, max_size=2).map(tuple), min_size=1, max_size=5))
    count = len(stages)
    gradients = draw(st.lists(st.integers(0, 3), min_size=count, max_size=count))
    advances = draw(st.lists(st.one_of(_advance, _advance, _advance, st.none()), min_size=count, max_size=count))
    heads = draw(st.lists(_head, min_size=1, max_size=2))
    return ChainProblem(draw(st.integers(0, 5)), tuple(stages), tuple(gradients), tuple(heads), tuple(advances))


@st.composite
def alike(draw: st.DrawFn) -> ChainProblem:
    stage = tuple(draw(st.lists(_option, min_size=1, max_size=2)))
    advance, gradient = draw(_advance), draw(st.integers(0, 2))
    count = draw(st.integers(2, 6))
    heads = (draw(_head),)
    return ChainProblem(draw(st.integers(0, 5)), (stage,) * count, (gradient,) * count, heads, (advance,) * count)


def layers(count: int, kept: int = 30, boundary: int = 1) -> ChainProblem:
    """Blocks like a language model's: what a block keeps is many times its boundary."""
    stage = (
        StageOption(boundary, boundary + 4, kept + 6, 0.9, 0.0),
        StageOption(boundary + kept // 3, kept // 3 + 5, kept + 6, 0.4, 1.0),
        StageOption(boundary + kept, kept + 3, kept + 5, 0.0, 0.9),
    )
    advance = Advance(boundary, boundary + 4, boundary, 1.0)
    heads = (HeadOption(60, 5.0), HeadOption(15, 6.0))
    return ChainProblem(100, (stage,) * count, (0,) * count, heads, (advance,) * count)


def one_long_row() -> ChainProblem:
    """SmolLM2's chain for one row of 4096 tokens, with the one option that it has at the smallest peak.

    Outputs are a whole number of quanta, gradients are not: those of 30 blocks are room for two outputs.
    """
    option = StageOption(4_718_592, 72_356_800, 119_785_480, 0.115, 0.0)
    advance = Advance(4_718_592, 94_376_896, 9_437_184, 0.128)
    heads = (HeadOption(51_904_520, 1.2),)
    return ChainProblem(284_664_704, ((option,),) * 30, (325_632,) * 30, heads, (advance,) * 30)
