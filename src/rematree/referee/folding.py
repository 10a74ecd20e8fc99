"""Leave out of a simulated step the blocks whose part in it is known from others.

A step of eighty equal layers is a step of three, if what a layer does depends on itself and its neighbours only. So a
chain of blocks is read as a walk: the state is the pair (block before, block), an edge is the triple (two before,
before, block). A loop whose edges all occur elsewhere in the walk can be cut, and what is left still has every block in
every surrounding it has in the whole chain. The step is simulated on what is left; `unfold` writes the whole timeline:
live bytes are sums of what each block leaves behind, in forward and in backward, and every left-out block leaves behind
what its image does. Weights, gradients and optimizer state of left-out blocks are in the ledger all along.

Three things would make this wrong, and each is looked for: parameters that blocks share, a block that reads what an
earlier one than its predecessor made, and left-out blocks whose bytes do not add up to their gradients at the end.
"""

import contextlib
from collections import Counter
from collections.abc import Callable, Generator, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from torch import nn

from rematree.memory.ledger import Ledger
from rematree.plans import Levers
from rematree.regions import POSITIONAL_ATTRIBUTES, block_kind, parent_path, stands_alone
from rematree.trace import OpRecord, Segment

_OUTSIDE: Final = object()
Bytes = dict[str, int]


class UnevenBlocksError(Exception):
    """What left-out blocks leave behind does not add up: this chain must be simulated whole."""


class FarReadError(UnevenBlocksError):
    """A block reads what an earlier one than its predecessor made."""


@dataclass(frozen=True, slots=True)
class Fold:
    """Which blocks are simulated.

    Attributes:
        kept: Their numbers, in order.
        images: For every block of the chain, the kept one whose surroundings are like its own. A kept block is not
            always its own image: the last one kept stands where the last one of all does.
    """

    kept: tuple[int, ...]
    images: tuple[int, ...]

    @property
    def left_out(self) -> list[int]:
        """Numbers of the blocks that are not simulated."""
        kept = set(self.kept)
        return [index for index in range(len(self.images)) if index not in kept]


def whole(count: int) -> Fold:
    """The fold that leaves nothing out."""
    return Fold(tuple(range(count)), tuple(range(count)))


def fold(signatures: Sequence[Hashable]) -> Fold:
    """Cut loops out of a chain until every block's surroundings are left about once.

    Args:
        signatures: One a block; equal ones do the same.
    Cost:
        O(n k), with n blocks of which k are left.
    """
    marks: list[Hashable] = [_OUTSIDE, *signatures, _OUTSIDE]
    path: list[int] = []  # positions in `marks`
    edges: Counter[tuple[Hashable, ...]] = Counter()

    def edge(place: int) -> tuple[Hashable, ...]:
        """The triple that ends with the block at `place` of the path."""
        before = [marks[path[i]] if i >= 0 else _OUTSIDE for i in (place - 2, place - 1)]
        return (*before, marks[path[place]])

    for position in range(len(marks)):
        path.append(position)
        edges[edge(len(path) - 1)] += 1
        for start in range(1, len(path) - 1):
            if marks[path[start]] != marks[position] or marks[path[start - 1]] != marks[path[-2]]:
                continue
            loop = Counter(edge(place) for place in range(start + 1, len(path)))
            if all(edges[triple] > count for triple, count in loop.items()):
                edges -= loop
                del path[start + 1 :]
                break
    kept = [position - 1 for position in path[1:-1]]
    places = {(marks[path[i - 1]], marks[path[i]], marks[path[i + 1]]): path[i] - 1 for i in range(1, len(path) - 1)}
    images = [places[tuple(marks[i : i + 3])] for i in range(len(signatures))]  # pyright: ignore[reportArgumentType]
    return Fold(tuple(kept), tuple(images))


def fold_groups(signatures: Sequence[Hashable], groups: Sequence[tuple[int, int]]) -> Fold:
    """As `fold`, with blocks that are recomputed together cut out or left together.

    Args:
        signatures: One a block.
        groups: First block and the one behind the last; they nest.
    """
    spans: list[tuple[int, int]] = []
    while (at := spans[-1][1] if spans else 0) < len(signatures):
        spans.append(max((g for g in groups if g[0] == at), key=lambda g: g[1], default=(at, at + 1)))
    parts = [
        (tuple(signatures[a:b]), frozenset((start - a, stop - a) for start, stop in groups if a <= start and stop <= b))
        for a, b in spans
    ]
    chain = fold(parts)
    return Fold(
        tuple(block for part in chain.kept for block in range(*spans[part])),
        tuple(
            spans[image][0] + block for (a, b), image in zip(spans, chain.images, strict=True) for block in range(b - a)
        ),
    )


# -- what blocks have in common ---------------------------------------------------------------------------------------


def list_of(model: nn.Module, blocks: Sequence[str]) -> str | None:
    """Path of the `ModuleList` that holds exactly `blocks`, in their order and sharing no parameter; else None."""
    container, _, _ = blocks[0].rpartition(".")
    if not container or [path.rpartition(".")[0] for path in blocks] != [container] * len(blocks):
        return None
    holder = model.get_submodule(container)
    if not isinstance(holder, nn.ModuleList) or list(holder._modules) != [path.rpartition(".")[2] for path in blocks]:
        return None
    if not stands_alone(model, container):
        return None
    inside = [id(p) for block in holder for p in block.parameters()]
    everything = sum(1 for _, _ in model.named_parameters(remove_duplicate=False))
    outside = {id(p) for name, p in model.named_parameters(remove_duplicate=False) if not name.startswith(container)}
    if len(set(inside)) < len(inside) or outside & set(inside) or everything < len(inside):
        return None
    return container


def block_kinds(model: nn.Module, blocks: Sequence[str]) -> list[int]:
    """A number for each block; equal ones do the same under equal decisions.

    They have equal modules, equal entries in what the config says layer by layer, and both or neither have something
    that is trained before them.
    """
    lists = [
        value
        for config in _configs(model, parent_path(parent_path(blocks[0])))
        for value in vars(config).values()
        if isinstance(value, list | tuple) and len(value) == len(blocks)  # pyright: ignore[reportUnknownArgumentType]
    ]
    numbers: dict[Any, int] = {}
    kinds: list[int] = []
    trained = False
    for index, path in enumerate(blocks):
        block = model.get_submodule(path)
        key = (block_kind(block), tuple(repr(value[index]) for value in lists), trained)
        kinds.append(numbers.setdefault(key, len(numbers)))
        trained = trained or any(p.requires_grad for p in block.parameters())
    return kinds


def relative_levers(container: str, blocks: Sequence[str], levers: Levers) -> list[frozenset[tuple[str, Any]]]:
    """What is done inside each block, by path within it. Groups reach over blocks and are not among it."""
    found: dict[str, list[tuple[str, Any]]] = {path: [] for path in blocks}
    start = len(container) + 1
    everything = [*levers.decisions.items(), *((path, "lean") for path in levers.lean), *levers.compiled.items()]
    for path, what in everything:
        if path.startswith(container + "."):
            end = min((at for mark in ".#" if (at := path.find(mark, start)) >= 0), default=len(path))
            found[path[:end]].append((path[end:], what))
    return [frozenset(found[path]) for path in blocks]


class Neighbours:
    """Watches a forward for a block, or the head, that reads what an earlier block than the last one made."""

    def __init__(self) -> None:
        self._born: dict[int, int] = {}
        self._far: str | None = None

    def listener(self, ledger: Ledger, kept: Sequence[int]) -> Callable[[OpRecord], None]:
        """What the ledger is to tell every op to."""
        places = {f"forward {index}": place for place, index in enumerate(kept)} | {"head": len(kept)}

        def listen(op: OpRecord) -> None:
            here = places.get(ledger.label)
            if here is None:
                return
            if any(self._born.get(storage, here) < here - 1 for storage in op.reads):
                self._far = f"{op.name} in {ledger.label}"
            for storage in op.writes:
                self._born.setdefault(storage, here)

        return listen

    def check(self) -> None:
        """Raise if there was one.

        Raises:
            FarReadError: names the op.
        """
        if self._far is not None:
            raise FarReadError(f"{self._far} reads what an earlier block than the last one made")


# -- the model, shorter -----------------------------------------------------------------------------------------------


@contextlib.contextmanager
def shortened(model: nn.Module, container: str, kept: Sequence[int]) -> Generator[None]:
    """Only the `kept` blocks of the list at `container` inside; they keep their paths, and stand one behind another.

    What configs say layer by layer (`layer_types`) is shortened alike, and a block's own number (`layer_idx`) is its
    new place.
    """
    stack, _, name = container.rpartition(".")
    parent = model.get_submodule(stack)
    blocks = parent._modules[name]
    assert isinstance(blocks, nn.ModuleList)
    if len(kept) == len(blocks):
        yield
        return
    undo = contextlib.ExitStack()
    short = nn.ModuleList()
    short.training = blocks.training
    for index in kept:
        short._modules[str(index)] = blocks[index]
    with undo:
        for config in _configs(model, stack):
            for key, value in vars(config).items():
                if isinstance(value, list | tuple) and len(value) == len(blocks):  # pyright: ignore[reportUnknownArgumentType]
                    undo.callback(vars(config).__setitem__, key, value)
                    vars(config)[key] = type(value)(value[index] for index in kept)  # pyright: ignore[reportUnknownVariableType, reportCallIssue]
        for place, index in enumerate(kept):
            for module in blocks[index].modules():
                for key in POSITIONAL_ATTRIBUTES & vars(module).keys():
                    if type(vars(module)[key]) is int and vars(module)[key] == index:
                        undo.callback(vars(module).__setitem__, key, index)
                        vars(module)[key] = place
        undo.callback(parent._modules.__setitem__, name, blocks)
        parent._modules[name] = short
        yield


def _configs(model: nn.Module, path: str) -> list[Any]:
    """Configs that the stack at `path`, or what is around it, reads; not those of another tower alone."""
    found: dict[int, Any] = {}
    inside, elsewhere = set[int](), set[int]()
    for name, module in model.named_modules():
        config = vars(module).get("config")
        if config is None or not hasattr(config, "__dict__"):
            continue
        if _is_within(name, path):
            inside.add(id(config))
        elif not _is_within(path, name):
            elsewhere.add(id(config))
        found[id(config)] = config
    for config in list(found.values()):
        for inner in vars(config).values():
            if type(inner).__name__.endswith("Config") and hasattr(inner, "__dict__"):
                found[id(inner)] = inner
    return [config for key, config in found.items() if key in inside or key not in elsewhere]


def _is_within(name: str, path: str) -> bool:
    return not path or name == path or name.startswith(f"{path}.")


# -- the timeline, whole ----------------------------------------------------------------------------------------------


def _plus(one: Mapping[str, int], other: Mapping[str, int], sign: int = 1) -> Bytes:
    total = dict(one)
    for name, size in other.items():
        total[name] = total.get(name, 0) + sign * size
    return total


def _shifted(segment: Segment, label: str, by: Mapping[str, int]) -> Segment:
    return replace(
        segment,
        label=label,
        live_bytes=segment.live_bytes + sum(by.values()),
        peak_bytes=segment.peak_bytes + sum(by.values()),
        live=_plus(segment.live, by),
        at_peak=_plus(segment.at_peak, by),
        turn=_plus(segment.turn, by) if segment.turn else {},
    )


def unfold(segments: Sequence[Segment], chain: Fold, gradients: Mapping[str, int]) -> list[Segment]:
    """The timeline of the whole chain from that of its kept blocks.

    Args:
        segments: "start", "embedding", "forward k" for every kept k, "head", "backward k" for those with a graph, the
            last of them followed by one that begins when backward is over.
        chain: What was kept.
        gradients: Bytes of the gradients that left-out blocks leave, by category.
    Raises:
        UnevenBlocksError: left-out blocks do not leave exactly their gradients behind.
    """
    if len(chain.kept) == len(chain.images):
        return list(segments)
    index = {segment.label: place for place, segment in enumerate(segments)}
    head = index["head"]
    last = len(segments) - 1

    def change(label: str) -> Bytes:
        """What is live behind a segment and was not before it."""
        place = index[label]
        return _plus(segments[place + 1].live, segments[place].live, -1)

    forward = {k: change(f"forward {k}") for k in chain.kept}
    backward = {k: change(f"backward {k}") for k in chain.kept if f"backward {k}" in index}
    whole_timeline = list(segments[: index[f"forward {chain.kept[0]}"]])
    live: Bytes = dict(segments[len(whole_timeline)].live)
    for number, image in enumerate(chain.images):
        segment = segments[index[f"forward {image}"]]
        whole_timeline.append(_shifted(segment, f"forward {number}", _plus(live, segment.live, -1)))
        live = _plus(live, forward[image])
    shift = _plus(live, segments[head].live, -1)
    whole_timeline.append(_shifted(segments[head], "head", shift))
    live = _plus(segments[head + 1].live, shift)
    for number in reversed(range(len(chain.images))):
        image = chain.images[number]
        if image in backward:
            segment = segments[index[f"backward {image}"]]
            whole_timeline.append(_shifted(segment, f"backward {number}", _plus(live, segment.live, -1)))
            live = _plus(live, backward[image])
    left = {name: size for name, size in _plus(live, segments[last].live, -1).items() if size}
    if left != {name: size for name, size in gradients.items() if size}:
        raise UnevenBlocksError(f"left-out blocks leave {left}, their gradients are {gradients}")
    return whole_timeline
