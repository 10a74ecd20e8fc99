"""Find the options of a model's blocks and head, and measure each on the twin: everything the chain solver needs.

Blocks that are alike form a kind and share their options. One forward of one block of each kind gives the trace from
which its options are enumerated; each option is then run by the referee on a short prefix of the chain, so that what
the solver adds up are bytes the executor really allocates.
"""

import contextlib
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import torch
from torch import nn

from rematree.compile_profile import NOT_COMPILED, CompiledKinds, Profiler
from rematree.execute.adapters import lean_layers
from rematree.execute.loss import find_head
from rematree.folding import shortened
from rematree.options import levers_of, merged, observe_block
from rematree.plans import Levers
from rematree.regions import Chain, join_path
from rematree.simulate import Referee, Simulation
from rematree.solve.block import BlockOption, enumerate_options
from rematree.solve.chain import Advance, ChainChoice, ChainProblem, HeadOption, StageOption

_OPTIONS_PER_KIND: Final = 16
_MANY: Final = 12  # blocks of one kind, over which options are mixed so finely that the lower convex hull is enough
_OPTIONS_OF_MANY: Final = 9
_CHUNK_ROWS: Final = (4096, 2048, 1024, 512, 256, 128, 64, 32)
_MAX_CHUNKS: Final = 32  # more make the logits smaller than what else is live beside them, and the step slower
_SAVE_ALL: Final = BlockOption(("",), frozenset(), 0, 0.0)


@dataclass(frozen=True)
class Survey:
    """What planning knows about one model and batch.

    Attributes:
        chain: The blocks that run.
        kinds: Kind of each block.
        options: Options of each kind.
        rows: Loss choices, in the order of `problem.heads`; None is the model's own loss.
        problem: The same in numbers.
        plain: One step without any lever.
        fixed_seconds: Seconds of the step that no choice changes.
        lean: Paths of the adapter layers of each block that can be lean.
        compiled: What was measured of compiled blocks, and why others are not offered.
    """

    chain: Chain
    kinds: tuple[int, ...]
    options: tuple[tuple[BlockOption, ...], ...]
    rows: tuple[int | None, ...]
    problem: ChainProblem
    plain: Simulation
    fixed_seconds: float
    lean: Mapping[str, tuple[str, ...]]
    compiled: CompiledKinds = NOT_COMPILED

    def levers(self, choice: ChainChoice) -> Levers:
        """What realises one option a block and one of the head."""
        chosen = [
            (path, self.options[kind][index])
            for path, kind, index in zip(self.chain.blocks, self.kinds, choice.blocks, strict=True)
        ]
        groups = tuple(self.chain.blocks[start:stop] for start, stop in choice.groups)
        return replace(levers_of(chosen, self.rows[choice.head], lean=self.lean), groups=groups)


def survey(
    referee: Referee, chain: Chain, *, chunk: bool, lean: bool, groups: bool, compiler: Profiler | None = None
) -> Survey:
    """Survey the twin of `referee`.

    Args:
        referee: Runs the whole step.
        chain: Its blocks.
        chunk: Whether chunked loss may be used.
        lean: Whether adapter layers may be lean.
        groups: Whether blocks may be recomputed in groups.
        compiler: Compiles and measures blocks, if they may be compiled.
    Cost:
        About 25 simulated steps of a few blocks; seconds for a model of any size.
    """
    twin, cost, accumulate = referee.twin, referee.cost, referee.accumulate
    plain = referee.run(Levers())
    kinds, representatives = _kinds(referee, plain)
    compiled = NOT_COMPILED
    if compiler is not None:
        compiled = compiler.measure(referee, plain, representatives)
        referee.profiles = compiled.profiles
    length = min(len(chain.blocks), max(representatives) + 3) if chain.container else len(chain.blocks)
    layers = _lean_layers(twin.model, chain) if lean else {}
    with _shortened(twin.model, chain, range(length)) as blocks:
        short = Referee(
            twin,
            blocks,
            cost,
            "none",
            accumulate,
            kinds=referee.kinds[:length],
            pace=referee.pace,
            profiles=compiled.profiles,
            ranks=referee.ranks,
        )
        beside = _beside_lean(short, representatives, layers)
        options = [
            _enumerate(referee, blocks[index], layers, beside.get(index), kinds.count(kind) >= _MANY)
            if plain.graph[index][1]
            else [_SAVE_ALL]
            for kind, index in enumerate(representatives)
        ]
        for kind, index in enumerate(representatives):
            if plain.graph[index][1]:
                # The first option is the one that groups are made of, the last one saves everything.
                place = min(1, len(options[kind]) - 1)
                options[kind][place:place] = compiled.options(twin.model.get_submodule(blocks[index]))
        stages, options = _measure_options(short, kinds[:length], representatives, options, layers)
        advances = _measure_advances(short, kinds[:length], stages, options, layers) if groups else []
    few = _smallest(twin.model, chain, length)
    with _shortened(twin.model, chain, few) as blocks:
        few_kinds = [referee.kinds[index] for index in few]
        smallest = Referee(twin, blocks, cost, "none", accumulate, kinds=few_kinds, ranks=referee.ranks)
        rows, heads = _measure_heads(smallest, chunk)
    gradients = [0 if accumulate else referee.layout.gradients_left(index) for index in range(len(chain.blocks))]
    problem = ChainProblem(
        base=plain.forward(0).live_bytes,
        stages=tuple(tuple(stages[kind]) for kind in kinds),
        gradients=tuple(gradients),
        heads=tuple(heads),
        advances=tuple(advances[kind] for kind in kinds) if any(advances) else (),
    )
    return Survey(
        chain,
        tuple(kinds),
        tuple(tuple(o) for o in options),
        tuple(rows),
        problem,
        plain,
        plain.seconds - plain.head.seconds,
        layers,
        compiled,
    )


def _lean_layers(model: nn.Module, chain: Chain) -> dict[str, tuple[str, ...]]:
    """Paths of the adapter layers inside each block that can be lean, for blocks that have any."""
    found = {
        block: tuple(f"{block}.{path}" for path, _ in lean_layers(model.get_submodule(block))) for block in chain.blocks
    }
    return {block: paths for block, paths in found.items() if paths}


def _beside_lean(
    short: Referee, representatives: Sequence[int], layers: Mapping[str, tuple[str, ...]]
) -> dict[int, float]:
    """Seconds that lean adapters add to each block to be measured, which saves all otherwise."""
    chosen = [short.blocks[index] for index in representatives if short.blocks[index] in layers]
    if not chosen:
        return {}
    option = replace(_SAVE_ALL, lean=True)
    lean = short.run(levers_of([(path, option) for path in short.blocks if path in layers], lean=layers))
    plain = short.run(Levers())
    return {
        index: lean.block_seconds(index) - plain.block_seconds(index)
        for index in representatives
        if short.blocks[index] in layers
    }


def _enumerate(
    referee: Referee, path: str, layers: Mapping[str, tuple[str, ...]], beside: float | None, many: bool
) -> list[BlockOption]:
    """Options of the block at `path`: those without lean adapters, and those with, `beside` seconds dearer."""
    limit = _OPTIONS_OF_MANY if many else _OPTIONS_PER_KIND
    if beside is None:
        return enumerate_options(observe_block(referee.twin, path, referee.cost), limit)
    plain = enumerate_options(observe_block(referee.twin, path, referee.cost), limit - limit // 4)
    lean = enumerate_options(observe_block(referee.twin, path, referee.cost, layers[path]), limit // 2)
    return merged(plain, lean, beside)


def _smallest(model: nn.Module, chain: Chain, length: int) -> Sequence[int]:
    """The fewest blocks behind which the head is what it is in the whole chain: one that trains something."""
    for index in range(length):
        if any(p.requires_grad for p in model.get_submodule(chain.blocks[index]).parameters()):
            return [index]
    return range(length)


def _kinds(referee: Referee, plain: Simulation) -> tuple[list[int], list[int]]:
    """Kind number of each block, and for each kind the block to measure: its second one if there is one."""
    numbers: dict[Any, int] = {}
    kinds = [numbers.setdefault(key, len(numbers)) for key in zip(referee.kinds, plain.graph, strict=True)]
    representatives: list[int] = []
    for kind in range(len(numbers)):
        members = [index for index, k in enumerate(kinds) if k == kind]
        representatives.append(members[1] if len(members) > 2 else members[0])
    return kinds, representatives


@contextlib.contextmanager
def _shortened(model: nn.Module, chain: Chain, kept: Sequence[int]) -> Generator[tuple[str, ...]]:
    """Only the blocks `kept` inside, if the model holds them in a list."""
    if chain.container is None or len(kept) == len(chain.blocks):
        yield chain.blocks
        return
    with shortened(model, chain.container, kept):
        yield tuple(chain.blocks[index] for index in kept)


def _measure_options(
    short: Referee,
    kinds: Sequence[int],
    representatives: Sequence[int],
    options: Sequence[Sequence[BlockOption]],
    lean: Mapping[str, tuple[str, ...]],
) -> tuple[list[list[StageOption]], list[list[BlockOption]]]:
    """Run every option on the short chain; options of different kinds share a run."""
    final = [list(each) for each in options]
    stages: list[list[StageOption]] = [[] for _ in final]
    base: list[float] = [0.0] * len(final)
    for turn in reversed(range(max(len(each) for each in final))):
        while True:
            result = short.run(
                levers_of(
                    (
                        (path, final[kind][min(turn, len(final[kind]) - 1)])
                        for path, kind in zip(short.blocks, kinds, strict=True)
                    ),
                    lean=lean,
                )
            )
            if not result.misread and not result.written:
                break
            for path, kind in zip(short.blocks, kinds, strict=True):
                index = min(turn, len(final[kind]) - 1)
                option = _save_less(final[kind][index], path, result.written)
                final[kind][index] = _stash_more(option, path, result.misread)
        for kind, index in enumerate(representatives):
            seconds = result.block_seconds(index)
            if turn == len(final[kind]) - 1:
                base[kind] = seconds  # the last option saves everything
            if turn < len(final[kind]):
                # A rerun is never free, whatever the difference of two sums of prices says.
                option = final[kind][turn]
                extra = max(seconds - base[kind], option.rerun_seconds)
                if option.compiled is not None:
                    extra = seconds - base[kind] + option.rerun_seconds  # which is here its share of compiling
                stage = _profile(short, result, index, extra)
                stages[kind].insert(0, replace(stage, fill=_fill(final[kind], turn, result.forward(index).seconds)))
    return stages, final


def _fill(options: Sequence[BlockOption], index: int, forward: float) -> float:
    """Seconds of running a block again, as the last of a group, until what option `index` keeps is back."""
    if options[index].saves_all:
        return options[0].rerun_seconds if options[0].kept_bytes == 0 else forward
    return forward if options[index].kept_bytes else 0.0  # its input is all that it keeps, and comes first


def _measure_advances(
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
    found: list[Advance | None] = []
    bare = [each[0].kept_bytes == 0 and not each[0].saves_all for each in options]
    for kind, stage in enumerate(stages):
        pairs = (i for i in range(len(short.blocks) - 2) if kinds[i] == kind and bare[kinds[i + 1]])
        index = next(pairs, None) if bare[kind] else None
        if index is None:
            found.append(None)
            continue
        chosen = [(short.blocks[block], options[kinds[block]][0]) for block in (index, index + 1)]
        levers = levers_of(chosen, lean=layers)
        alone = short.run(levers)
        grouped = short.run(replace(levers, groups=(short.blocks[index : index + 2],)))
        saved = alone.forward(index + 2).live_bytes - grouped.forward(index + 2).live_bytes
        kept = stage[0].kept
        output = min(max(0, saved), kept)
        forward = alone.forward(index)
        # Before backward needs a saved tensor, it may have scaled the gradient of the output once.
        found.append(Advance(output, stage[0].forward, 2 * kept, forward.seconds, kept - output))
    return found


def _stash_more(option: BlockOption, path: str, misread: frozenset[str]) -> BlockOption:
    prefix = path + "."
    wrong = {region.removeprefix(prefix) for region in misread if region.startswith(prefix)}
    return replace(option, stashed=option.stashed | wrong) if wrong else option


def _save_less(option: BlockOption, path: str, written: frozenset[str]) -> BlockOption:
    """`option` without the regions whose output is written to later in the block."""
    saved = tuple(region for region in option.saved if join_path(path, region) not in written)
    return replace(option, saved=saved, stashed=option.stashed & frozenset(saved))


def _profile(short: Referee, result: Simulation, index: int, extra: float) -> StageOption:
    forward, backward = result.forward(index), result.backward(index)
    after = result.forward(index + 1) if index + 1 < len(short.blocks) else result.head
    later = 0 if short.accumulate else sum(map(short.layout.gradients_left, range(index + 1, len(short.blocks))))
    return StageOption(
        kept=after.live_bytes - forward.live_bytes,
        forward=forward.peak_bytes - forward.live_bytes,
        backward=backward.peak_bytes - forward.live_bytes - later if backward else 0,
        seconds=extra,
    )


def _measure_heads(short: Referee, chunk: bool) -> tuple[list[int | None], list[HeadOption]]:
    tokens = max((t.shape[0] * t.shape[1] for t in short.twin.batch.values() if _is_token_matrix(t)), default=0)
    rows: list[int | None] = [None]
    if chunk and "labels" in short.twin.batch and find_head(short.twin.model) is not None:
        rows += [count for count in _CHUNK_ROWS if tokens <= count * _MAX_CHUNKS and count < tokens]
    heads: list[HeadOption] = []
    for count in rows:
        head = short.run(Levers(loss_chunk_rows=count)).head
        heads.append(HeadOption(head.peak_bytes - head.live_bytes, head.seconds))
    return rows, heads


def _is_token_matrix(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.dim() >= 2
