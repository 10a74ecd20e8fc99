"""Find the options of a model's blocks and head, and measure each on the twin: everything the chain solver needs.

Blocks that are alike form a kind and share their options. One forward of one block of each kind gives the trace from
which its options are enumerated; each option is then run by the referee on a short prefix of the chain, so that what
the solver adds up are bytes the executor really allocates.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from torch import nn

from rematree.execute.adapters import lean_layers
from rematree.execute.attention_slices import is_core, sliced_cores
from rematree.execute.norms import lean_norms
from rematree.observation.observe import Twin
from rematree.planning.compile_profile import NOT_COMPILED, CompiledKinds, Profiler
from rematree.planning.heads import Heads, rows_and_tokens_of, shortened_chain, trains_tied_head
from rematree.planning.options import lean_in, levers_of, merged, observe_block
from rematree.planning.stages import length_for, measure_advances, measure_options
from rematree.plans import Levers
from rematree.referee.simulate import Referee
from rematree.referee.simulation import Simulation
from rematree.regions import ATTENTION_SUFFIX, Chain, join_path
from rematree.solve.block import BlockOption, enumerate_options
from rematree.solve.chain import ChainChoice, ChainProblem
from rematree.solve.groups import by_block

_OPTIONS_PER_KIND: Final = 16
_MANY: Final = 12  # blocks of one kind, over which options are mixed so finely that the lower convex hull is enough
_OPTIONS_OF_MANY: Final = 9
_OPTIONS_OF_FEW: Final = 8  # of a kind that is at most this share of the chain: the other blocks mix finely enough
_FEW: Final = 1 / 24
_SAVE_ALL: Final = BlockOption(("",), frozenset(), 0, 0.0)
_LEAN: Final = (replace(_SAVE_ALL, lean=True), replace(_SAVE_ALL, lean=True, sliced=True))


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
        lean: Paths of the adapter layers and norms of each block that can be lean.
        released: For each option of the first block, bytes of what that block was given that are gone by backward. Its
            numbers in `problem` are without them.
        compiled: What was measured of compiled blocks, and why others are not offered.
        slices: Whether attention may be computed in slices.
    """

    chain: Chain
    kinds: tuple[int, ...]
    options: tuple[tuple[BlockOption, ...], ...]
    rows: tuple[int | None, ...]
    problem: ChainProblem
    plain: Simulation
    fixed_seconds: float
    lean: Mapping[str, tuple[str, ...]]
    released: tuple[int, ...]
    compiled: CompiledKinds = NOT_COMPILED
    slices: bool = True

    def holds_for(self, model: nn.Module, batch: Mapping[str, Any]) -> bool:
        """Whether the same can be lean for `batch`: attention over a few tokens is not sliced.

        Args:
            model: That of the survey.
            batch: Of the same tensors.
        """
        if not self.slices:
            return True
        known = {path for layers in self.lean.values() for path in layers if is_core(path)}
        return known == {path for block in self.chain.blocks for path in _cores_in(model, block, batch)}

    def eager(self) -> "Survey":
        """The same without compiled blocks."""
        kept = [[place for place, each in enumerate(known) if each.compiled is None] for known in self.options]
        options = tuple(tuple(known[place] for place in kept[kind]) for kind, known in enumerate(self.options))
        stages = tuple(
            tuple(each[place] for place in kept[kind])
            for kind, each in zip(self.kinds, self.problem.stages, strict=True)
        )
        return replace(
            self,
            options=options,
            problem=replace(self.problem, stages=stages),
            released=tuple(self.released[place] for place in kept[self.kinds[0]]),
            compiled=NOT_COMPILED,
        )

    def left_by(self, choice: ChainChoice) -> list[tuple[int, float]]:
        """For each block, (bytes that its forward leaves until backward, extra seconds)."""
        (kept, seconds), *others = by_block(self.problem, choice)
        alone = all(start > 0 for start, _ in choice.groups)
        return [(kept + (self.released[choice.blocks[0]] if alone else 0), seconds), *others]

    def levers(self, choice: ChainChoice) -> Levers:
        """What realises one option a block and one of the head."""
        chosen = [
            (path, self.options[kind][index])
            for path, kind, index in zip(self.chain.blocks, self.kinds, choice.blocks, strict=True)
        ]
        groups = tuple(self.chain.blocks[start:stop] for start, stop in choice.groups)
        return replace(levers_of(chosen, self.rows[choice.head], lean=self.lean), groups=groups)


def survey(
    referee: Referee,
    chain: Chain,
    plain: Simulation,
    heads: Heads,
    *,
    lean: bool,
    slices: bool,
    groups: bool,
    compiler: Profiler | None = None,
) -> Survey:
    """Survey the twin of `referee`.

    Args:
        referee: Runs the whole step.
        chain: Its blocks.
        plain: What it says of a step without any lever.
        heads: Ways to compute the loss.
        lean: Whether adapter layers, and norms beside them, may be lean.
        slices: Whether attention may be computed in slices.
        groups: Whether blocks may be recomputed in groups.
        compiler: Compiles and measures blocks, if they may be compiled.
    Cost:
        About 10 simulated steps of a few blocks; seconds for a model of any size.
    """
    twin, cost, accumulate = referee.twin, referee.cost, referee.accumulate
    kinds, representatives = _kinds(referee, plain)
    compiled = NOT_COMPILED
    if compiler is not None:
        compiled = compiler.measure(referee, plain, representatives)
        referee.profiles = compiled.profiles
    layers = _lean_layers(twin, chain, adapters=lean, cores=slices)
    gradients = tuple(0 if accumulate else referee.layout.gradients_left(k) for k in range(len(chain.blocks)))

    def referee_of(blocks: tuple[str, ...]) -> Referee:
        return Referee(
            twin,
            blocks,
            cost,
            "none",
            accumulate,
            kinds=referee.kinds[: len(blocks)],
            pace=referee.pace,
            profiles=compiled.profiles,
            ranks=referee.ranks,
        )

    length = min(len(chain.blocks), max(representatives) + 3) if chain.container else len(chain.blocks)
    with shortened_chain(twin.model, chain, range(length)) as blocks:
        aside = referee_of(blocks)
        beside = {each: _beside(each, aside, plain, representatives, layers) for each in _LEAN}
        options = [
            _enumerate(
                referee,
                blocks[index],
                layers,
                {each: found[index] for each, found in beside.items() if index in found},
                _limit(kinds, kind),
            )
            if plain.graph[index][1]
            else [_SAVE_ALL]
            for kind, index in enumerate(representatives)
        ]
        for kind, index in enumerate(representatives):
            if plain.graph[index][1]:
                # The first option is the one that groups are made of, the last one saves everything.
                place = min(1, len(options[kind]) - 1)
                options[kind][place:place] = compiled.options(twin.model.get_submodule(blocks[index]))
    enough = max(length, length_for(kinds, representatives, options)) if chain.container else length
    with shortened_chain(twin.model, chain, range(enough)) as blocks:
        short = referee_of(blocks)
        # Behind a plain head the first block's backward ends with a copy of a tied weight's gradient; the smallest
        # plans have none, and an option that seems to need more than it does is not looked for at their budgets.
        loss = heads.rows[1] if len(heads.rows) > 1 and trains_tied_head(twin.model) else None
        stages, released, options = measure_options(short, kinds, representatives, options, layers, gradients, loss)
        advances = measure_advances(short, kinds, stages, options, layers) if groups else []
    # Where blocks train nothing the first one leaves less than it found; no solver is made for that, and few bytes are.
    first = tuple(replace(o, kept=max(0, o.kept - gone)) for o, gone in zip(stages[kinds[0]], released, strict=True))
    problem = ChainProblem(
        base=plain.forward(0).live_bytes,
        stages=(first, *(tuple(stages[kind]) for kind in kinds[1:])),
        gradients=gradients,
        heads=heads.options,
        advances=tuple(advances[kind] for kind in kinds) if any(advances) else (),
    )
    return Survey(
        chain,
        tuple(kinds),
        tuple(tuple(o) for o in options),
        heads.rows,
        problem,
        plain,
        plain.seconds - plain.head.seconds,
        layers,
        released,
        compiled,
        slices,
    )


def _lean_layers(twin: Twin, chain: Chain, *, adapters: bool, cores: bool) -> dict[str, tuple[str, ...]]:
    """Paths of what can be lean inside each block, for blocks in which something can.

    Adapter layers, norms in blocks that have these, and cores of attention that slices are worth it for.
    """
    found: dict[str, tuple[str, ...]] = {}
    for block in chain.blocks:
        inside = twin.model.get_submodule(block)
        # A block that is an adapter layer is run as it is.
        paths = [path for path, _ in lean_layers(inside) if path] if adapters else []
        if paths:
            paths += [path for path, _ in lean_norms(inside)]
        lean = [f"{block}.{path}" for path in paths]
        if cores:
            lean += _cores_in(twin.model, block, twin.batch)
        if lean:
            found[block] = tuple(lean)
    return found


def _cores_in(model: nn.Module, block: str, batch: Mapping[str, Any]) -> list[str]:
    """Paths of the cores of attention inside `block` that slices are worth it for."""
    found = sliced_cores(model.get_submodule(block), *rows_and_tokens_of(batch))
    return [join_path(block, f"{path}{ATTENTION_SUFFIX}") for path, _ in found]


def _beside(
    variant: BlockOption,
    short: Referee,
    plain: Simulation,
    representatives: Sequence[int],
    layers: Mapping[str, tuple[str, ...]],
) -> dict[int, float]:
    """Seconds that `variant` adds to each block to be measured that has it, which saves all otherwise."""
    having = [path for path in short.blocks if _has(variant, layers.get(path, ()))]
    chosen = [index for index in representatives if short.blocks[index] in having]
    if not chosen:
        return {}
    lean = short.run(levers_of([(path, variant) for path in having], lean=layers))
    return {index: lean.block_seconds(index) - plain.block_seconds(index) for index in chosen}


def _has(variant: BlockOption, layers: Sequence[str]) -> bool:
    """Whether a block in which `layers` can be lean has this variant: with slices if there are cores, and without."""
    cores = sum(map(is_core, layers))
    return cores > 0 if variant.sliced else cores < len(layers)


def _enumerate(
    referee: Referee,
    path: str,
    layers: Mapping[str, tuple[str, ...]],
    beside: Mapping[BlockOption, float],
    limit: int,
) -> list[BlockOption]:
    """Options of the block at `path` as it is, and of its lean variants, which are so many seconds dearer."""
    few = (limit, limit - limit // 4, limit // 2)[len(beside)]
    plain = enumerate_options(observe_block(referee.twin, path, referee.cost), few)
    variants: list[tuple[list[BlockOption], float]] = []
    for variant, seconds in beside.items():
        inside = lean_in(layers[path], variant)
        found = enumerate_options(
            observe_block(referee.twin, path, referee.cost, inside),
            limit // 3 if len(beside) > 1 and not variant.sliced else limit // 2,
        )
        lean = not all(map(is_core, inside))
        variants.append(([replace(option, lean=lean, sliced=variant.sliced) for option in found], seconds))
    return merged(plain, *variants)


def _limit(kinds: Sequence[int], kind: int) -> int:
    """How many options a kind gets."""
    count = kinds.count(kind)
    if count <= _FEW * len(kinds):
        return _OPTIONS_OF_FEW
    return _OPTIONS_OF_MANY if count >= _MANY else _OPTIONS_PER_KIND


def _kinds(referee: Referee, plain: Simulation) -> tuple[list[int], list[int]]:
    """Kind number of each block, and for each kind the block to measure: its second one if there is one."""
    numbers: dict[Any, int] = {}
    kinds = [numbers.setdefault(key, len(numbers)) for key in zip(referee.kinds, plain.graph, strict=True)]
    representatives: list[int] = []
    for kind in range(len(numbers)):
        members = [index for index, k in enumerate(kinds) if k == kind]
        representatives.append(members[1] if len(members) > 2 else members[0])
    return kinds, representatives
