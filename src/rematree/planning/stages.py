"""Every option of every kind of block, run on a short chain: what the chain solver adds up.

A run has as many options of a kind in it as there are blocks of that kind, each on a block of its own; what a block
keeps and takes is read off relative to the moment at which it begins.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

from rematree.planning.options import levers_of
from rematree.referee.simulate import Referee
from rematree.referee.simulation import Simulation
from rematree.regions import join_path
from rematree.solve.block import BlockOption
from rematree.solve.chain import Advance, StageOption


def _slots(kinds: Sequence[int], representative: int) -> list[int]:
    """Blocks of a chain that stand for the kind of `representative`: it, and those after it that have one behind."""
    kind = kinds[representative]
    if sum(k == kind for k in kinds[: representative + 1]) == 1:
        return [representative]
    return [
        i for i in range(representative, len(kinds)) if kinds[i] == kind and (i == representative or kinds[i + 1 :])
    ]


def length_for(kinds: Sequence[int], representatives: Sequence[int], options: Sequence[Sequence[BlockOption]]) -> int:
    """Blocks in front of the chain in which the fewest runs measure every option, each on a block of its own."""
    everywhere = [len(_slots(kinds, index)) for index in representatives]
    runs = max(math.ceil(len(each) / slots) for each, slots in zip(options, everywhere, strict=True))
    ends: list[int] = []
    for each, index in zip(options, representatives, strict=True):
        ends.append(_slots(kinds, index)[math.ceil(len(each) / runs) - 1])
    return min(len(kinds), max(ends) + 2)


def measure_options(
    short: Referee,
    kinds: Sequence[int],
    representatives: Sequence[int],
    options: Sequence[Sequence[BlockOption]],
    lean: Mapping[str, tuple[str, ...]],
    gradients: Sequence[int],
    chunk_rows: int | None,
) -> tuple[list[list[StageOption]], tuple[int, ...], list[list[BlockOption]]]:
    """Run every option on the short chain, as many in a run as it has blocks of the kind; the others save everything.

    What a block keeps and takes is read off relative to the moment it begins, so its neighbours may do otherwise.
    The loss behind them is computed in chunks of `chunk_rows`, if that is given.

    Returns:
        Options of each kind in numbers; what each option of the first block releases (`_released`), which the model's
        forward holds as long as it runs; what each kind's options are.
    """
    kinds = kinds[: len(short.blocks)]
    final = [list(each) for each in options]
    slots = [_slots(kinds, index) for index in representatives]
    waiting = [list(reversed(range(len(each)))) for each in final]
    seen: dict[tuple[int, int], tuple[Simulation, int]] = {}
    while any(waiting):
        turns: dict[int, int] = {}
        for kind, places in enumerate(slots):
            now, waiting[kind] = waiting[kind][: len(places)], waiting[kind][len(places) :]
            turns.update(zip(places, now, strict=False))
        chosen = [(path, final[kinds[place]][turns.get(place, -1)]) for place, path in enumerate(short.blocks)]
        try:
            result = short.run(levers_of(chosen, chunk_rows, lean=lean))
        except RuntimeError:
            # Placeholders have another layout than outputs: a view of one may not exist, a lean layer not run lean.
            given = {(kinds[place], turn): _stash_all(final[kinds[place]][turn]) for place, turn in turns.items()}
            if all(final[kind][turn] == option for (kind, turn), option in given.items()):
                raise
            for (kind, turn), option in given.items():
                final[kind][turn] = option
                waiting[kind].append(turn)
            continue
        for place, turn in turns.items():
            kind, path = kinds[place], short.blocks[place]
            option = _stash_more(_save_less(final[kind][turn], path, result.written), path, result.misread)
            if option != final[kind][turn]:
                final[kind][turn] = option
                waiting[kind].append(turn)
            else:
                seen[kind, turn] = (result, place)
    stages: list[list[StageOption]] = []
    released: list[int] = []
    for kind, each in enumerate(final):
        result, place = seen[kind, len(each) - 1]
        base = result.block_seconds(place)  # the last option saves everything
        stages.append([])
        for turn, option in enumerate(each):
            result, place = seen[kind, turn]
            # A rerun is never free, whatever the difference of two sums of prices says.
            extra = max(result.block_seconds(place) - base, option.rerun_seconds)
            if option.compiled is not None:
                extra = result.block_seconds(place) - base + option.rerun_seconds  # here its share of compiling
            later = sum(gradients[place + 1 : len(short.blocks)])
            stage = _profile(result, place, len(short.blocks), later, extra)
            stages[kind].append(replace(stage, fill=_fill(each, turn, result.forward(place).seconds)))
            if kind == kinds[0]:
                released.append(_released(result, place, option))
    return stages, tuple(released), final


def _fill(options: Sequence[BlockOption], index: int, forward: float) -> float:
    """Seconds of running a block again, as the last of a group, until what option `index` keeps is back."""
    if options[index].saves_all:
        return options[0].rerun_seconds if options[0].kept_bytes == 0 else forward
    return forward if options[index].kept_bytes else 0.0  # its input is all that it keeps, and comes first


def measure_advances(
    short: Referee,
    kinds: Sequence[int],
    stages: Sequence[Sequence[StageOption]],
    options: Sequence[Sequence[BlockOption]],
    layers: Mapping[str, tuple[str, ...]],
) -> list[Advance | None]:
    """Each kind as part of a group, if what it keeps at the least is its input alone.

    What a group saves is what a run of two blocks does not keep any more: the output of the first, if the model hands
    that on as it is. The block behind them shows it; at the head's mark the model still holds the last one's input.
    """
    kinds = kinds[: len(short.blocks)]
    bare = [each[0].kept_bytes == 0 and not each[0].saves_all for each in options]
    waiting = [kind for kind in range(len(stages)) if bare[kind]]
    found: list[Advance | None] = [None] * len(stages)
    while waiting:
        pairs: dict[int, int] = {}  # first block of the pair that each kind is measured on; all of them in one run
        after = 0
        for index in range(len(short.blocks) - 2):
            if index >= after and kinds[index] in waiting and kinds[index] not in pairs and bare[kinds[index + 1]]:
                pairs[kinds[index]], after = index, index + 2
        if not pairs:
            break
        waiting = [kind for kind in waiting if kind not in pairs]
        inside = [block for index in pairs.values() for block in (index, index + 1)]
        levers = levers_of([(short.blocks[block], options[kinds[block]][0]) for block in inside], lean=layers)
        alone = short.run(levers)
        grouped = short.run(replace(levers, groups=tuple(short.blocks[index : index + 2] for index in pairs.values())))
        for kind, index in pairs.items():
            saved = _left_by_two(alone, index) - _left_by_two(grouped, index)
            kept = stages[kind][0].kept
            output = min(max(0, saved), kept)
            forward = alone.forward(index)
            # Before backward needs a saved tensor, it may have scaled the gradient of the output once.
            found[kind] = Advance(output, stages[kind][0].forward, 2 * kept, forward.seconds, kept - output)
    return found


def _left_by_two(result: Simulation, index: int) -> int:
    """Bytes that the forward of two blocks leaves behind."""
    return result.forward(index + 2).live_bytes - result.forward(index).live_bytes


def _released(result: Simulation, place: int, option: BlockOption) -> int:
    """Bytes of what the first block was given that are gone by the head if that block takes `option`.

    The model's forward may hold them for as long as it runs, and so their going shows in no block's forward. Where the
    option was not run on the first block, that block saved all in the run, which releases what it does not keep.
    """
    return result.released_bytes if place == 0 or (option.saves_all and option.compiled is None) else 0


def _stash_more(option: BlockOption, path: str, misread: frozenset[str]) -> BlockOption:
    prefix = path + "."
    wrong = {region.removeprefix(prefix) for region in misread if region.startswith(prefix)}
    return replace(option, stashed=option.stashed | wrong) if wrong else option


def _save_less(option: BlockOption, path: str, written: frozenset[str]) -> BlockOption:
    """`option` without the regions whose output is written to later in the block."""
    saved = tuple(region for region in option.saved if join_path(path, region) not in written)
    return replace(option, saved=saved, stashed=option.stashed & frozenset(saved))


def _stash_all(option: BlockOption) -> BlockOption:
    return option if option.saves_all else replace(option, stashed=frozenset(option.saved))


def _profile(result: Simulation, index: int, count: int, later: int, extra: float) -> StageOption:
    """Numbers of block `index` of `count`; the gradients of those behind it are `later` bytes.

    What the first block was given counts as live throughout (`_released`), though it is gone by backward if no block
    keeps it. A block that trains nothing may leave less than it found; no solver is made for that.
    """
    forward, backward = result.forward(index), result.backward(index)
    after = result.forward(index + 1) if index + 1 < count else result.head
    gone = result.released_bytes if index else 0
    return StageOption(
        kept=max(0, after.live_bytes - forward.live_bytes),
        forward=forward.peak_bytes - forward.live_bytes,
        backward=backward.peak_bytes - (forward.live_bytes - gone) - later if backward else 0,
        seconds=extra,
    )
