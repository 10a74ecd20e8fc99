"""What plans put on one model: overrides of forwards, regions of attention and losses that bring decisions about."""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import nn

from rematree.errors import PlanMismatchError
from rematree.execute.adapters import DrawBits, adapted_layer, dropouts_of, lean_forward, why_not
from rematree.execute.attention import AttentionRegions
from rematree.execute.attention_slices import cores_to_slice, in_slices, within
from rematree.execute.compiled import BlockCompiler, CompiledBlocks
from rematree.execute.context import Captured
from rematree.execute.group import Group
from rematree.execute.loss.attach import ChunkedLoss, attach_chunked_loss
from rematree.execute.norms import is_norm, lean_norm, why_no_norm
from rematree.execute.override import ForwardOverride
from rematree.execute.own_switch import OwnSwitch
from rematree.execute.quantised import TrainingLayout, keep_no_input, watch_weight
from rematree.execute.recompute import Executor
from rematree.execute.selection import Selection
from rematree.execute.stash import Watcher
from rematree.plans import Action, Decision, Plan
from rematree.quantised import four_bit_linears, frozen_int8_linears
from rematree.regions import (
    ATTENTION_SUFFIX,
    DRAW_SUFFIX,
    effective_action,
    find_module,
    parent_path,
    split_function,
)


class Installation:
    """Everything that `plans` change on `model`, from the innermost override to the loss.

    Args:
        model: The live model.
        plans: In the order in which they are tried; only a single one may compile blocks.
        chosen: Says which of them is in force.
        executor: Saves and recomputes regions.
        watcher: Told about chunks of the loss; None outside the referee.
        compiler: Of blocks; default: torch's.

    Attributes:
        decides_inside: Whether what runs again does not do so as a whole, by the model's own forwards.
        run_again: Everything inside regions that are recomputed, by path.
    """

    def __init__(
        self,
        model: nn.Module,
        plans: Sequence[Plan],
        chosen: Selection,
        executor: Executor,
        *,
        watcher: Watcher | None,
        compiler: BlockCompiler | None,
    ) -> None:
        self._model = model
        self._plans = plans
        self._chosen = chosen
        self._executor = executor
        self._watcher = watcher
        self._compiler = compiler
        self._overrides: list[ForwardOverride] = []
        self._attention: AttentionRegions | None = None
        self._losses: list[ChunkedLoss] = []
        self._own_switch: OwnSwitch | None = None
        self._layout: TrainingLayout | None = None
        self._releases = False
        self.decides_inside = False
        self.run_again: dict[str, nn.Module] = {}

    def put_on(self, *, check_loss: bool) -> None:
        """Change the model; after an error, `remove()` takes off what is there already.

        Raises:
            PlanMismatchError: the plan decides on what this model cannot do.
        """
        self._own_switch = OwnSwitch(self._model)
        self._layout = TrainingLayout(self._model)
        self._install_quantised()
        if len(self._plans) > 1:  # R5: what runs again runs under the plan of its forward
            self._executor.captured.append(Captured(self._chosen.now, self._chosen.put))
        attention: dict[nn.Module, dict[int, Callable[..., Any]]] = {}
        for number, plan in enumerate(self._plans):
            self._install_plan(number, plan, attention)
            self.decides_inside |= plan.recomputes and self._own_switch.was_on  # which the rerun would find on
        if attention:
            self._attention = AttentionRegions(
                (module, arounds[0] if len(self._plans) == 1 else functools.partial(self._chosen.dispatch, arounds))
                for module, arounds in attention.items()
            )
        self._install_losses(check_loss)

    def override(self, module: nn.Module, around: Callable[..., Any], *numbers: int) -> ForwardOverride:
        """Put `around` the forward of `module`, outside whatever is there; of `numbers`, only under these plans."""
        override = ForwardOverride(module, around, self._when(*numbers))
        self._overrides.append(override)
        return override

    def modules(self) -> Iterator[nn.Module]:
        """Those whose forward is overridden."""
        return (override.module for override in self._overrides)

    def remove(self) -> None:
        """Restore every attribute. Does nothing the second time."""
        for loss in reversed(self._losses):
            loss.remove()
        self._losses.clear()
        for override in reversed(self._overrides):
            override.remove()
        self._overrides.clear()
        for part in (self._attention, self._layout, self._own_switch):
            if part is not None:
                part.remove()
        self._attention = self._layout = self._own_switch = None

    def _install_quantised(self) -> None:
        """First, so that it is innermost: whatever saves or recomputes the layer runs it in this form."""
        levers = self._plans[-1].levers
        for path, layer in frozen_int8_linears(self._model):
            if not levers.compiles(path):  # its partitioner decides what is kept
                self._releases = True
                self.override(layer, functools.partial(keep_no_input, layer))
        for path, layer in four_bit_linears(self._model):
            if not levers.compiles(path):  # a hook on its output is none in a graph
                self.override(layer, functools.partial(watch_weight, path, layer))

    def _when(self, *numbers: int) -> Callable[[], bool] | None:
        if not numbers or len(numbers) == len(self._plans):
            return None
        return functools.partial(self._chosen.among, frozenset(numbers))

    def _install_plan(self, number: int, plan: Plan, attention: dict[nn.Module, dict[int, Callable[..., Any]]]) -> None:
        """What one plan does to the blocks; cores of attention are added to `attention`."""
        for module in cores_to_slice(self._model, plan.lean, check=self._watcher is None):
            attention.setdefault(module, {})[number] = in_slices
        lean = {path: find_module(self._model, path) for path in plan.lean if not split_function(path)[1]}
        for path, layer in lean.items():
            self.override(layer, self._lean(plan, path, layer), number)
        again = plan.recomputes and (plan.groups or plan.compiled or self._releases)
        changed = (split_function(path)[0] for path in plan.lean)
        inside = (effective_action(plan.decisions, path) is Action.RECOMPUTE for path in changed)
        self.decides_inside |= bool(again) or any(inside)
        self._install_compiled(plan)  # before any recomputation of the block, which is around it
        for path, decision in plan.decisions.items():
            if decision.action is effective_action(plan.decisions, parent_path(path)):
                continue
            module_path, function = split_function(path)
            if function == DRAW_SUFFIX and adapted_layer(module_path) in lean:
                continue  # it draws for itself
            module = find_module(self._model, module_path)
            if function == DRAW_SUFFIX:
                around = functools.partial(self._executor.keep_mask, path, module)
            elif decision.action is Action.RECOMPUTE:
                around = functools.partial(self._executor.recompute, path, module)
            else:
                around = functools.partial(self._executor.save, path, decision.stash)
            self._note(path, decision)
            if function == ATTENTION_SUFFIX:
                arounds = attention.setdefault(module, {})
                arounds[number] = within(around, arounds.get(number))
            else:
                self.override(module, around, number)
        self._install_groups(number, plan)

    def _note(self, path: str, decision: Decision) -> None:
        """A region at `path` is decided on otherwise than what is around it."""
        if decision.action is Action.SAVE:
            self.decides_inside = True
        elif not split_function(path)[1]:
            self.run_again |= find_module(self._model, path).named_modules(prefix=path)

    def _lean(self, plan: Plan, path: str, layer: nn.Module) -> Callable[..., Any]:
        """What runs the layer at `path`, an adapter's or a norm, lean."""
        norm = is_norm(layer)
        reason = why_no_norm(layer) if norm else why_not(layer)
        if reason is not None:
            raise PlanMismatchError(
                f"the plan runs {path} lean, which it cannot: {reason}",
                remedies=["plan again with forbid=['lean_adapters']"],
            )
        if norm:
            return functools.partial(lean_norm, layer)
        draws: dict[str, DrawBits] = {}
        for name, region in dropouts_of(path, layer):
            if region in plan.decisions and effective_action(plan.decisions, path) is Action.RECOMPUTE:
                draws[name] = functools.partial(self._executor.keep_bits, region)
        return functools.partial(lean_forward, layer, draws)

    def _install_losses(self, check: bool) -> None:
        chunks: dict[int, list[int]] = {}
        for number, plan in enumerate(self._plans):
            if plan.loss_chunk_rows is not None:
                chunks.setdefault(plan.loss_chunk_rows, []).append(number)
        for rows, numbers in chunks.items():
            when = self._when(*numbers)
            self._losses.append(attach_chunked_loss(self._model, rows, check=check, when=when, watcher=self._watcher))

    def _install_groups(self, number: int, plan: Plan) -> None:
        """Around whatever each block does by itself; smaller groups inside larger ones."""
        for paths in sorted(filter(None, plan.groups), key=len):
            group = Group(len(paths), self._executor)
            for place, path in enumerate(paths):
                module = find_module(self._model, path)
                self.override(module, functools.partial(group.member, path, place, module), number)

    def _install_compiled(self, plan: Plan) -> None:
        """Always in force: code is compiled for the only plan there is."""
        lost = next((path for path in (*plan.decisions, *plan.lean) if plan.levers.compiles(path)), None)
        if lost is not None:
            raise PlanMismatchError(f"the plan decides on {lost}, which is inside a compiled block")
        if plan.compiled:
            compiler = self._compiler or CompiledBlocks(self._model, plan.compiled)
            for path in plan.compiled:
                block = find_module(self._model, path)
                self.override(block, functools.partial(compiler.run, path, block))
