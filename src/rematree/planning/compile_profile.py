"""Profiles of compiled blocks: one real block of each kind, alone on the device, compiled and measured.

What compiled code keeps and takes cannot be found on fake tensors. So a copy of one block is run for real, on inputs
of the layout it gets in the step: memory from the allocation events, seconds beside the plain block in turns, both
from caches that hold nothing of it, as in a step. The seconds of every other option are sums of op prices, which differ
from a run by what is around an op; the plain block's run says by how much, and the compiled block's seconds are put on
the same scale.
"""

import functools
import gc
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only

from rematree.errors import UnsupportedModelError
from rematree.execute.compiled import call_compiled, compiled_forward, why_no_compiler, why_not_compiled
from rematree.execute.stand_in import CompiledProfile
from rematree.measure import allocation_changes, storage_bytes
from rematree.planning.pace import between_runs, calls_of, copy_of, is_live, made_up, timed
from rematree.pricing.on_cuda import requested_bytes, requested_peak_bytes
from rematree.referee.simulate import Referee
from rematree.referee.simulation import Simulation
from rematree.regions import block_kind
from rematree.solve.block import BlockOption
from rematree.units import format_seconds

_BUDGETS: Final = (1.0, 0.3, 0.0)
_WARM_RUNS: Final = 1
_RUNS: Final = 7
_SEED: Final = 0
_Key = tuple[Any, float]  # kind of block, budget


@dataclass(frozen=True, slots=True)
class CompiledKinds:
    """What is known of a model's compiled blocks.

    Attributes:
        profiles: By kind of block and budget.
        shares: Seconds of compiling, spread over the steps of the job and the blocks that share the compilation.
        reasons: Why other kinds of block are not offered, one line each.
    """

    profiles: Mapping[_Key, CompiledProfile] = field(default_factory=dict[_Key, CompiledProfile])
    shares: Mapping[_Key, float] = field(default_factory=dict[_Key, float])
    reasons: tuple[str, ...] = ()

    def options(self, block: nn.Module) -> list[BlockOption]:
        """The ways to run `block` compiled: with each budget, and recomputed as a whole with the fastest of them."""
        kind = block_kind(block)
        nothing = frozenset[str]()
        found = [
            BlockOption(("",), nothing, profile.kept_bytes, self.shares[key], compiled=key[1])
            for key, profile in self.profiles.items()
            if key[0] == kind
        ]
        if found:
            fastest = max(found, key=lambda option: option.compiled or 0.0)
            found.append(BlockOption((), nothing, 0, fastest.rerun_seconds, compiled=fastest.compiled))
        return found

    def notes(self, budgets: Mapping[str, float], model: nn.Module) -> list[str]:
        """What a plan that compiles blocks must say: what changes and what it costs; or why nothing is compiled."""
        used = {(block_kind(model.get_submodule(path)), budget) for path, budget in budgets.items()}
        said = [f"not compiled: {reason}" for reason in self.reasons]
        if used:
            difference = max(self.profiles[key].difference for key in used)
            seconds = sum(self.profiles[key].compile_seconds for key in used)
            said.append(
                f"{len(budgets)} blocks compiled ({len(used)} compilations, {format_seconds(seconds)}): "
                f"changes rounding, by {difference:.1e} of a block's output or gradients where it was measured; "
                "a graph can be gone through once (no retain_graph=True); forbid with 'compile'"
            )
        return said


NOT_COMPILED: Final = CompiledKinds()


class Profiler:
    """Compiles and measures one block of each kind of a live model.

    Args:
        model: Copied from, not changed.
        steps: How many steps pay for compiling; None: so many that it does not count.
        budgets: Activation memory budgets to compile with.
    """

    def __init__(self, model: nn.Module, steps: int | None, budgets: Sequence[float] = _BUDGETS) -> None:
        self._model = model
        self._steps = steps
        self._budgets = budgets

    def measure(self, referee: Referee, plain: Simulation, representatives: Sequence[int]) -> CompiledKinds:
        """Profiles of the blocks numbered `representatives`, as far as they build a graph and can be compiled.

        Args:
            referee: Of the whole model.
            plain: The step without any lever, simulated by it.
            representatives: One block of each kind, at least.
        Cost:
            For each kind and budget a compilation, 10 to 60 s, and a dozen runs of the block. Memory: one block, its
            activations and gradients.
        """
        twin = referee.twin
        missing = why_no_compiler(twin.device)
        if missing is None and not is_live(self._model, twin.device):
            missing = f"the model's weights are not on {twin.device}, where compiled blocks would have to be measured"
        if missing is not None:
            return CompiledKinds(reasons=(missing,))
        kinds = [block_kind(twin.model.get_submodule(path)) for path in referee.blocks]
        chosen: dict[Any, int] = {}
        for index in representatives:
            known = chosen.get(kinds[index])
            # The first block of a chain does less than the others: nobody asks for the gradient of its input.
            if plain.graph[index][1] and (known is None or plain.block_seconds(index) > plain.block_seconds(known)):
                chosen[kinds[index]] = index
        profiles: dict[_Key, CompiledProfile] = {}
        shares: dict[_Key, float] = {}
        reasons: list[str] = []
        for kind, index in chosen.items():
            path = referee.blocks[index]
            priced = plain.block_seconds(index) / referee.pace.get(referee.kinds[index], 1.0)
            try:
                for budget, found in self._measured(referee, path, plain, priced).items():
                    profiles[kind, budget] = found
                    shares[kind, budget] = found.compile_seconds / kinds.count(kind) / (self._steps or float("inf"))
            except UnsupportedModelError as error:
                reasons.append(error.message)
            except (torch.OutOfMemoryError, MemoryError):
                reasons.append(f"one copy of {path} with its activations does not fit beside the model")
        return CompiledKinds(profiles, shares, tuple(reasons))

    def _measured(self, referee: Referee, path: str, plain: Simulation, priced: float) -> dict[float, CompiledProfile]:
        twin = referee.twin
        live = self._model.get_submodule(path)
        block = copy_of(live)
        reason = why_not_compiled(live) or ("it cannot be copied" if block is None else None)
        if reason is not None or block is None:
            raise UnsupportedModelError(f"{path} cannot be compiled: {reason}")
        with torch.random.fork_rng([twin.device] if twin.device.type == "cuda" else []):
            bench = _Bench(path, block, calls_of(twin, {0: path})[0], between_runs(plain, twin.device))
            return bench.compiled(self._budgets, priced)


class _Bench:
    """A copy of one block, inputs for it, and memory to write over between its runs."""

    def __init__(self, path: str, block: nn.Module, call: tuple[Any, Any], between: torch.Tensor) -> None:
        self._path = path
        self._between = between
        self._device = device = between.device
        self.block = block
        torch.manual_seed(_SEED)
        self._args, self._kwargs = tree_map_only(FakeTensor, functools.partial(made_up, device=device), call)
        self._leaves = [x for x in tree_leaves((self._args, self._kwargs)) if isinstance(x, torch.Tensor)]
        self._hidden = next(leaf for leaf in self._leaves if leaf.is_floating_point()).requires_grad_()
        self._trained = [p for p in self.block.parameters() if p.requires_grad]

    def _plain(self) -> Any:
        return self.block.forward(*self._args, **self._kwargs)

    def compiled(self, budgets: Sequence[float], priced: float) -> dict[float, CompiledProfile]:
        """Compile with each of `budgets` and measure; `priced`: seconds of the plain block on the planner's scale."""
        runs = {budget: self._run_of(compiled_forward(budget, [])) for budget in budgets}
        found = {budget: self._profile(run) for budget, run in runs.items()}
        (slow, slow_back), *fast = self._seconds([self._plain, *runs.values()])
        scale = priced / (slow + slow_back)
        return {
            budget: replace(profile, forward_seconds=forward * scale, backward_seconds=backward * scale)
            for (budget, profile), (forward, backward) in zip(found.items(), fast, strict=True)
        }

    def _run_of(self, function: Callable[..., Any]) -> Callable[[], Any]:
        return lambda: call_compiled(self._path, function, self.block, self._args, self._kwargs)

    def _profile(self, run: Callable[[], Any]) -> CompiledProfile:
        """What `run`, which compiles when first called, keeps and needs; its seconds are still to be measured."""
        start = time.perf_counter()
        self._backward(run())
        compile_seconds = time.perf_counter() - start
        difference, draws = self._difference(self._plain, run)
        kept = self._kept(run)
        out, forward_peak, after = self._memory(run)
        tensors = [leaf for leaf in tree_flatten(out)[0] if isinstance(leaf, torch.Tensor)]
        outputs = storage_bytes(tensors)
        leaves, structure = tree_flatten(out)
        _, backward_peak, _ = self._memory(functools.partial(self._backward, out, self._ones(out)))
        shapes = tuple((tuple(x.shape), x.dtype) if isinstance(x, torch.Tensor) else None for x in leaves)
        return CompiledProfile(
            max(0, after - outputs),
            kept[0],
            kept[1],
            forward_peak,
            backward_peak,
            0.0,
            0.0,
            compile_seconds,
            difference,
            draws,
            shapes,
            structure,
        )

    def _ones(self, out: Any) -> list[torch.Tensor]:
        return [torch.ones_like(leaf) for leaf in _trained_leaves(out)]

    def _backward(self, out: Any, ones: list[torch.Tensor] | None = None) -> tuple[torch.Tensor | None, ...]:
        wanted = [self._hidden, *self._trained]
        return torch.autograd.grad(_trained_leaves(out), wanted, ones or self._ones(out), allow_unused=True)

    def _difference(self, plain: Callable[[], Any], run: Callable[[], Any]) -> tuple[float, bool]:
        results: list[list[torch.Tensor]] = []
        before = after = torch.empty(0)
        for each in (plain, run):
            torch.manual_seed(_SEED)
            before = torch.get_rng_state()
            out = each()
            after = torch.get_rng_state()
            found = [leaf.detach() for leaf in tree_flatten(out)[0] if isinstance(leaf, torch.Tensor)]
            results.append([*found, *(g for g in self._backward(out) if g is not None)])
        largest = max(_relative(a, b) for a, b in zip(*results, strict=True))
        return largest, self._device.type == "cpu" and not torch.equal(before, after)

    def _kept(self, run: Callable[[], Any]) -> tuple[frozenset[int], bool]:
        """Which of the inputs stay for backward, and whether the output does."""
        saved: set[int] = set()

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            saved.add(tensor.untyped_storage()._cdata)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            out = run()
        inputs = {place for place, leaf in enumerate(self._leaves) if leaf.untyped_storage()._cdata in saved}
        tensors = [leaf for leaf in tree_flatten(out)[0] if isinstance(leaf, torch.Tensor)]
        return frozenset(inputs), any(leaf.untyped_storage()._cdata in saved for leaf in tensors)

    def _memory(self, run: Callable[[], Any]) -> tuple[Any, int, int]:
        """(result, peak, bytes behind) of `run`, above what is live before it."""
        gc.collect()
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
            torch.cuda.reset_peak_memory_stats(self._device)
            before = requested_bytes(self._device)
            out = run()
            torch.cuda.synchronize(self._device)
            peak = requested_peak_bytes(self._device) - before
            return out, peak, requested_bytes(self._device) - before
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as events:
            out = run()
        live = peak = 0
        for change in allocation_changes(events):
            live += change
            peak = max(peak, live)
        return out, peak, live

    def _seconds(self, runs: Sequence[Callable[[], Any]]) -> list[tuple[float, float]]:
        """Median (forward, backward) of each of `runs`, in turns."""
        found: list[list[tuple[float, float]]] = [[] for _ in runs]
        for turn in range(_WARM_RUNS + _RUNS):
            for times, run in zip(found, runs, strict=True):
                out, forward = timed(self._between, run)
                _, backward = timed(self._between, functools.partial(self._backward, out, self._ones(out)))
                del out
                if turn >= _WARM_RUNS:
                    times.append((forward, backward))
        return [(statistics.median(f for f, _ in x), statistics.median(b for _, b in x)) for x in found]


def _trained_leaves(out: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor) and leaf.requires_grad]


def _relative(expected: torch.Tensor, found: torch.Tensor) -> float:
    """Norm of the difference over the norm of what was expected."""
    size = float(expected.float().norm())
    return float((expected.float() - found.float()).norm()) / size if size else float(found.float().norm())
