"""The ways to run one block: read off a trace of it, turned into levers, and put into words."""

import contextlib
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from rematree.execute.adapters import DrawBits, dropouts_of, is_part, lean_forward
from rematree.execute.attention import attention_modules
from rematree.execute.attention_slices import is_core
from rematree.execute.dropout import draw_bits, packed_bytes
from rematree.execute.norms import is_norm, lean_norm
from rematree.execute.override import ForwardOverride
from rematree.memory.ledger import Ledger
from rematree.observation.observe import RegionStack, Twin
from rematree.plans import Action, Decision, Levers
from rematree.pricing.cost import Cost
from rematree.quantised import hidden_tensors
from rematree.regions import ATTENTION_SUFFIX, DRAW_SUFFIX, inner_regions, join_path
from rematree.solve.block import BlockOption
from rematree.trace import BlockTrace, OpRecord, TraceOp, TraceSave

_WORTH: Final = 0.99  # a lean variant must keep less than this share of what a block keeps


class _SeenError(Exception):
    """The block that is observed has run: nothing behind it is asked for."""


def observe_block(twin: Twin, path: str, cost: Cost, lean: Sequence[str] = ()) -> BlockTrace:
    """Trace of one forward of the block at `path`, with what is at `lean`, inside it, run lean."""
    block = twin.model.get_submodule(path)
    ledger = Ledger(cost, twin.device.type, twin.mode.recipes)
    layers = {name.removeprefix(f"{path}."): twin.model.get_submodule(name) for name in lean if not is_core(name)}
    inner = {name: m for name, m in inner_regions(block) if not any(is_part(name, layer) for layer in layers)}
    overrides: list[ForwardOverride] = []
    for name, layer in layers.items():  # innermost, and so before the regions
        if is_norm(layer):
            overrides.append(ForwardOverride(layer, functools.partial(lean_norm, layer)))
            continue
        draws = {adapter: _draws_in(region, lambda: stack) for adapter, region in dropouts_of(name, layer)}
        overrides.append(ForwardOverride(layer, functools.partial(lean_forward, layer, draws)))
    stack = RegionStack(
        inner,
        {f"{name}{ATTENTION_SUFFIX}": module for name, module in attention_modules(block)},
        {f"{name}{DRAW_SUFFIX}": module for name, module in inner.items() if type(module) is nn.Dropout},
        sliced={core.removeprefix(path).removeprefix(".") for core in lean if is_core(core)},
    )
    ops: list[TraceOp] = []
    saves: list[TraceSave] = []
    sizes: dict[int, int] = {}
    before: set[int] = set()

    def listen(op: OpRecord) -> None:
        ops.append(TraceOp(stack.path, op.reads, frozenset(op.writes), op.seconds))
        sizes.update(op.writes)

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage, num_bytes = ledger.size(tensor)
        saves.append(TraceSave(len(ops), stack.path, storage))
        sizes[storage] = num_bytes
        return tensor.detach()  # an op that saves its own output would hold itself for ever

    def around(run: Any, *args: Any, **kwargs: Any) -> Any:
        before.update(ledger.known())
        ledger.listener = listen
        try:
            with saved_tensors_hooks(pack, lambda tensor: tensor):
                run(*args, **kwargs)
        finally:
            ledger.listener = None
        raise _SeenError

    overrides.append(ForwardOverride(block, around))
    try:
        with twin.mode:
            ledger.adopt([*twin.model.parameters(), *twin.model.buffers(), *hidden_tensors(twin.model)], "weights")
            with ledger, contextlib.suppress(_SeenError):
                twin.loss()
    finally:
        stack.remove()
        for override in reversed(overrides):
            override.remove()
    regions = tuple(region for region in stack.calls if region)
    packed = {region: packed_bytes(count) for region, count in stack.drawn.items()}
    return BlockTrace(tuple(ops), tuple(saves), {k: v for k, v in sizes.items() if k not in before}, regions, packed)


def _draws_in(region: str, stack: Callable[[], RegionStack]) -> DrawBits:
    return lambda like, p: stack().run(region, draw_bits, like, p)


def merged(plain: Sequence[BlockOption], *variants: tuple[Sequence[BlockOption], float]) -> list[BlockOption]:
    """Options of a block as it is and of lean variants of it; the last one saves all and is not lean.

    Lean ones stay where they keep no less and take longer, as when everything is recomputed: they also need less while
    the block runs backward, which only the referee can say.

    Args:
        plain: Options without, as `enumerate_options` gives them.
        variants: Options of each variant, and seconds that it adds to the step beside any rerun.
    """
    found = list(plain[:-1])
    for options, beside in variants:
        if options[-1].kept_bytes <= _WORTH * plain[-1].kept_bytes:
            found += [replace(each, rerun_seconds=each.rerun_seconds + max(0.0, beside)) for each in options]
    return [*found, plain[-1]]


def lean_in(layers: Iterable[str], option: BlockOption) -> list[str]:
    """Of `layers`, what can be lean inside a block, those that are under `option`."""
    return [path for path in layers if (option.sliced if is_core(path) else option.lean)]


def levers_of(
    chosen: Iterable[tuple[str, BlockOption]],
    loss_chunk_rows: int | None = None,
    *,
    lean: Mapping[str, tuple[str, ...]] | None = None,
) -> Levers:
    """What realises an option for each of some blocks; `lean`: what can be lean inside each."""
    decisions: dict[str, Decision] = {}
    layers: list[str] = []
    compiled: dict[str, float] = {}
    for path, option in chosen:
        decisions.update(_decide(path, option))
        if option.lean or option.sliced:
            layers += lean_in((lean or {})[path], option)
        if option.compiled is not None:
            compiled[path] = option.compiled
    return Levers(decisions, loss_chunk_rows, lean=tuple(layers), compiled=compiled)


def _decide(block: str, option: BlockOption) -> dict[str, Decision]:
    if option.saves_all:
        return {}
    decisions = {block: Decision(Action.RECOMPUTE)}
    for region in option.saved:
        decisions[join_path(block, region)] = Decision(Action.SAVE, stash=region in option.stashed)
    return decisions


def describe_groups(groups: Sequence[tuple[int, int]], count: int) -> list[str]:
    """For each of `count` blocks the outermost group it is in: "group 2 of 5", "group 2 of 5, 3 deep"; else ""."""
    outer = [g for g in groups if not any(o != g and o[0] <= g[0] and g[1] <= o[1] for o in groups)]
    texts: list[str] = []
    for block in range(count):
        depth = sum(start <= block < stop for start, stop in groups)
        number = next((n for n, (start, stop) in enumerate(outer, 1) if start <= block < stop), 0)
        texts.append(f"group {number} of {len(outer)}" + (f", {depth} deep" if depth > 1 else "") if number else "")
    return texts


def describe_option(option: BlockOption, group: str = "") -> str:
    """One phrase for the table: what is saved inside the recomputed block, and the group it is recomputed with."""
    if group:
        inside = "" if option.saves_all else f"; in it {describe_option(option)}"
        return f"recompute with {group}{inside}"
    start = ("lean adapters, " if option.lean else "") + ("attention in slices, " if option.sliced else "")
    if option.compiled is not None:
        return f"compiled, memory budget {option.compiled:g}" + ("" if option.saves_all else ", recompute all")
    if option.saves_all:
        return f"{start}save all"
    if not option.saved:
        return f"{start}recompute all"
    return f"{start}recompute, save " + ", ".join(_fold(option.saved))


def _fold(regions: Sequence[str]) -> list[str]:
    """Region names with what they share written once: "{q,k,v}_proj.base_layer"."""
    groups: Mapping[str, list[str]] = {}
    for region in regions:
        parts = region.split(".")
        tail = next(
            (i for i, part in enumerate(parts) if part in {"base_layer", "lora_A", "lora_B", "lora_dropout"}), 0
        )
        suffix = ".".join(parts[tail:]) if tail else ""
        groups.setdefault(suffix, []).append(parts[tail - 1] if tail else region)  # pyright: ignore[reportAttributeAccessIssue]
    out: list[str] = []
    for suffix, names in groups.items():
        if not suffix:
            out += [name.rpartition(".")[2] for name in names]
        elif len(names) == 1:
            out.append(f"{names[0]}.{suffix}")
        else:
            out.append("{" + ",".join(names) + "}." + suffix)
    return out
