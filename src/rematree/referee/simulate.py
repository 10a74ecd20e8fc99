"""The referee: what a set of decisions costs, found by letting the executor run them on fake tensors.

There is no second model of memory that could drift from the first. The twin runs a whole training step (forward,
backward, optimizer) with the decisions applied by the same code that will run the real step, under an allocation
ledger; the result is the timeline, the peak with what was live at it, and the priced seconds.
"""

import contextlib
from collections.abc import Generator, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Final

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from rematree.execute.handle import Handle
from rematree.execute.override import ForwardOverride
from rematree.execute.stand_in import Profiles, StandIns
from rematree.memory.accounts import BATCH, GRADIENTS, SAVED, STATE, STEP
from rematree.memory.ledger import BEFORE_THE_BLOCKS, Ledger
from rematree.memory.optimizers import Found, Optimizer, optimizer_with_state
from rematree.observation.observe import Twin
from rematree.plans import Fingerprint, Levers, Plan
from rematree.pricing.cost import Cost, Free
from rematree.pricing.devices import overhead_of
from rematree.referee.at_work import AtWork
from rematree.referee.clipping import clipping_seconds
from rematree.referee.folding import (
    FarReadError,
    Fold,
    Neighbours,
    UnevenBlocksError,
    block_kinds,
    fold_groups,
    list_of,
    relative_levers,
    shortened,
    unfold,
    whole,
)
from rematree.referee.held import Held
from rematree.referee.layout import layout_of
from rematree.referee.marks import OPTIMIZER, BlockMarks
from rematree.referee.ranks import Ranks
from rematree.referee.simulation import Simulation
from rematree.referee.zero.stage3 import ZeroThree
from rematree.trace import Segment

_BETWEEN: Final = "between backward and optimizer"
_NOBODY: Final = Fingerprint("", "", "", "", (), "", "")  # the executor checks it only against live models
_FIRST: Final = "backward 0"


class Referee:
    """Runs decisions on a twin.

    Blocks whose part in the step is known from others are left out of the run and put back into its result
    (`rematree.referee.folding`); the result is that of the whole step.

    Args:
        twin: Model and batch under fake tensors.
        blocks: Module paths of the blocks that run, in order.
        cost: Prices ops.
        optimizer: What holds state and runs after backward.
        accumulate: Gradients of an earlier micro-batch are live when the step begins.
        kinds: A number for each block; equal ones do the same under equal decisions. Default: found.
        folds: Whether blocks may be left out.
        ranks: Over which ranks the step is distributed; the result is that of one of them.
        profiles: What compiled blocks keep and take; without one a block cannot be simulated as compiled.
        pace: What the prices of the ops of a block are multiplied by, by kind (`rematree.planning.pace`); default 1.
        clips: Gradients are clipped before the optimizer's step.
    Attributes:
        clips, kinds, pace, profiles, ranks: As above.
        head_pace: The same for the head (`rematree.planning.head_pace`), by rows of a chunk of the loss.
        layout: What the ranks do to the bytes of this model.
    """

    def __init__(
        self,
        twin: Twin,
        blocks: tuple[str, ...],
        cost: Cost,
        optimizer: Optimizer | Found = "adamw",
        accumulate: bool = False,
        *,
        kinds: Sequence[int] | None = None,
        folds: bool = True,
        pace: Mapping[int, float] | None = None,
        profiles: Profiles | None = None,
        ranks: Ranks | None = None,
        clips: bool = False,
    ) -> None:
        self.twin = twin
        self.blocks = blocks
        self.cost = cost
        self.optimizer: Optimizer | Found = optimizer
        self.accumulate = accumulate
        self.profiles: Profiles = profiles or {}
        self.trainable = [p for p in twin.model.parameters() if p.requires_grad]
        self.ranks = ranks
        self.layout = layout_of(ranks, twin.model, blocks, accumulate)
        self._stepper: torch.optim.Optimizer | None = None
        self._masters: list[nn.Parameter] = []
        if self.trainable:
            with twin.mode, Ledger(Free(), twin.device.type, twin.mode.recipes):  # it remembers what is made of nothing
                self._masters = self.layout.masters()
                pages = overhead_of(cost, twin.device.type).caches
                self._stepper = optimizer_with_state(optimizer, self._masters or self.trainable, pages=pages)
        self.clips = clips
        self._clipping_seconds = 0.0
        if clips and self._stepper is not None:
            stepped = self._masters or self.trainable
            self._clipping_seconds = clipping_seconds(stepped, cost, twin.device, twin.mode)
        self._container = list_of(twin.model, blocks) if folds and self.layout.folds else None
        self.kinds = tuple(block_kinds(twin.model, blocks) if kinds is None else kinds)
        self.pace = dict(pace or {})
        self.head_pace: Mapping[int | None, float] = {}
        self._static = self._existing()
        self._inside = [list(twin.model.get_submodule(path).parameters()) for path in blocks]
        self._stand_ins: dict[int, torch.Tensor] = {}  # gradients that no block here has made, by parameter
        self._neighbours: Neighbours | None = Neighbours()  # until the first run has shown that blocks see no others

    def for_twin(self, twin: Twin) -> "Referee":
        """A referee of the same model with another batch; blocks were compiled and measured with this one."""
        other = Referee(
            twin,
            self.blocks,
            self.cost,
            self.optimizer,
            self.accumulate,
            kinds=self.kinds,
            folds=self._container is not None,
            pace=self.pace,
            ranks=self.ranks,
        )
        other.head_pace = self.head_pace
        other.clips, other._clipping_seconds = self.clips, self._clipping_seconds  # the same gradients
        return other

    def run(self, levers: Levers) -> Simulation:
        """Simulate one step under `levers`."""
        if not isinstance(self.layout, ZeroThree):
            return self._folded(levers)
        self.layout.forget()
        first, later = (self._run(levers, whole(len(self.blocks))) for _ in range(2))
        # What is gathered ahead and what stays whole is known from the second step on; the first must fit as well.
        return replace(max(later, first, key=lambda step: step.peak_bytes), gathers=later.gathers)

    def _folded(self, levers: Levers) -> Simulation:
        chain = whole(len(self.blocks))
        if self._container is not None:
            place = {path: index for index, path in enumerate(self.blocks)}
            chain = fold_groups(
                list(zip(self.kinds, relative_levers(self._container, self.blocks, levers), strict=True)),
                [(place[group[0]], place[group[-1]] + 1) for group in levers.groups],
            )
            if chain.left_out:
                here = levers.without({self.blocks[index] for index in chain.left_out})
                try:
                    return self._run(here, chain)
                except FarReadError:
                    self._container = None
                    chain = whole(len(self.blocks))
                except UnevenBlocksError:  # as when a cache of keys lives until the loss; it does not in other runs
                    chain = whole(len(self.blocks))
        return self._run(levers, chain)

    def _run(self, levers: Levers, chain: Fold) -> Simulation:
        model, ledger = self.twin.model, Ledger(self.cost, self.twin.device.type, self.twin.mode.recipes)
        marks = BlockMarks(ledger, chain.kept)
        absent = [p for index in chain.left_out for p in self._inside[index]]
        missing = {id(parameter) for parameter in absent}
        present = [p for p in self.trainable if id(p) not in missing]
        overrides = list[ForwardOverride]()
        with contextlib.ExitStack() as undo:
            if absent:
                assert self._container is not None
                undo.enter_context(shortened(model, self._container, chain.kept))
                ledger.listener = self._neighbours and self._neighbours.listener(ledger, chain.kept)
            plan = Plan.of(levers, _NOBODY)
            stand_ins = StandIns(self.profiles, levers.compiled, ledger)
            handle = Handle(plan, model, watcher=ledger, check_loss=False, compiler=stand_ins)
            undo.callback(self._clear, (*self.trainable, *self._masters))
            undo.callback(handle.remove)
            for index in chain.kept:
                overrides.append(ForwardOverride(model.get_submodule(self.blocks[index]), marks.around(index)))
                undo.callback(overrides[-1].remove)
            with (
                self.twin.mode,
                self.layout.at_work(self.twin.mode.recipes, ledger) as engine,
                self._gradients_known(ledger, engine, present),
            ):
                self._adopt(ledger)
                with ledger:
                    self._forward_backward(ledger, marks)
                engine.backward_is_over()
                tail = marks.tail_seconds()
                ledger.mark(_BETWEEN)
                engine.step_begins()
                left = self._adopt_gradients(ledger, [] if self.layout.takes_gradients else absent, self._stand_ins)
                self._adopt_gradients(ledger, self._masters)
                ledger.category = STEP
                ledger.mark(OPTIMIZER)
                engine.stepping()
                if self._stepper is not None and self.optimizer != "none":
                    with ledger:
                        self._stepper.step()
                self._clear(self._masters)
                engine.stepped()
                ledger.mark("end")
        *step, between, optimizer = ledger.segments
        optimizer = replace(optimizer, seconds=optimizer.seconds + self._clipping_seconds)
        if absent and self._neighbours is not None:
            self._neighbours.check()
            self._neighbours = None
        segments = [*unfold([*step, between], chain, left)]
        if segments[-1].label == _BETWEEN:
            segments.pop()
        labels = [segment.label for segment in ledger.segments]
        whole_step, made_up = [*segments, optimizer], "" if self.layout.takes_gradients else _BETWEEN
        segments = self.layout.on_rank(whole_step, engine.arrivals, chain.images)
        highest = max(segments, key=lambda segment: segment.peak_bytes)
        result = Simulation(
            highest.peak_bytes,
            sum(segment.seconds for segment in segments),
            {name: size for name, size in highest.at_peak.items() if size},
            tuple(segments),
            frozenset(ledger.misread),
            frozenset(ledger.written_regions),
            tuple(marks.graph[image] for image in chain.images),
            None
            if ledger.allocator is None
            else Held(ledger.allocator, labels, made_up, ledger.peak_bytes, chain, whole_step),
            tail,
            marks.released_bytes,
            engine.gathers,
        )
        return self.paced(result).with_head(self.head_pace.get(levers.loss_chunk_rows, 1.0))

    def paced(self, unpaced: Simulation) -> Simulation:
        """`unpaced`, with the seconds of its blocks multiplied by `pace`."""
        segments = tuple(self._paced(segment, unpaced.tail_seconds) for segment in unpaced.segments)
        return replace(unpaced, segments=segments, seconds=sum(segment.seconds for segment in segments))

    def _paced(self, segment: Segment, tail: float) -> Segment:
        phase, _, number = segment.label.partition(" ")
        if not self.pace or phase not in ("forward", "backward"):
            return segment
        beside, scale = tail if segment.label == _FIRST else 0.0, self.pace.get(self.kinds[int(number)], 1.0)
        return replace(segment, seconds=(segment.seconds - beside) * scale + beside)

    def _clear(self, parameters: Iterable[torch.Tensor]) -> None:
        for parameter in parameters:
            parameter.grad = None

    def _existing(self) -> list[tuple[str, list[torch.Tensor]]]:
        """What exists before the step, by category."""
        state = [t for entry in self._stepper.state.values() for t in entry.values()] if self._stepper else []
        with self.twin.mode:
            resident = list(self.layout.resident(self._masters))
        return [
            *resident,
            (BATCH, [t for t in tree_leaves(self.twin.batch) if isinstance(t, torch.Tensor)]),
            (STATE, [t for t in state if isinstance(t, torch.Tensor)]),
        ]

    def _adopt(self, ledger: Ledger) -> None:
        for category, tensors in self._static:
            ledger.adopt(tensors, category)
        if self.accumulate and not self.layout.takes_gradients:
            self._adopt_gradients(ledger, self.trainable)

    def _adopt_gradients(
        self, ledger: Ledger, parameters: Iterable[torch.Tensor], known: dict[int, torch.Tensor] | None = None
    ) -> dict[str, int]:
        """Give `parameters` gradients that a part of the step not run here leaves behind; their bytes by category.

        Those that outlive the step may be the same in every step: they are taken from `known` and put there.
        """
        before = dict(ledger.by_category)
        for parameter in parameters:
            if parameter.requires_grad and parameter.grad is None:
                gradient = None if known is None else known.get(id(parameter))
                if gradient is None:
                    gradient = torch.zeros_like(parameter)
                    if known is not None:
                        known[id(parameter)] = gradient
                parameter.grad = gradient
                ledger.adopt([gradient], GRADIENTS)
        return {name: size - before.get(name, 0) for name, size in ledger.by_category.items()}

    def _forward_backward(self, ledger: Ledger, marks: BlockMarks) -> None:
        ledger.category = SAVED
        ledger.mark(BEFORE_THE_BLOCKS)
        loss = self.twin.loss()
        ledger.listener = None
        marks.turn()
        if loss.requires_grad:
            with self.twin.looked_at():
                loss.backward()
        del loss

    @contextlib.contextmanager
    def _gradients_known(self, ledger: Ledger, engine: AtWork, parameters: Iterable[torch.Tensor]) -> Generator[None]:
        def moved(parameter: torch.Tensor) -> None:
            if parameter.grad is not None:
                ledger.move(parameter.grad, GRADIENTS)
            engine.arrived(parameter)

        with torch._C.DisableTorchFunction():  # a function mode would see each of them
            hooks = [p.register_post_accumulate_grad_hook(moved) for p in parameters]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
