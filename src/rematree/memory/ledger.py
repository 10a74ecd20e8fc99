"""An allocation ledger: every storage that is born and dies while a step runs, and when.

It watches a step as a `TorchDispatchMode`: below autograd, above the kernels. Under fake tensors nothing is
computed, but storages live and die exactly as the executor makes them, because it is the executor that runs. A `Cost`
adds what fake tensors cannot show: seconds, and bytes a kernel allocates inside.
"""

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode

from rematree.memory.accounts import DEQUANTISED, MASKS, RECOMPUTED, SAVED, WORKSPACE
from rematree.memory.recipes import Recipes, draws_numbers, mutated
from rematree.memory.storages import Entry, Event, Storages, leaves_only
from rematree.pricing.devices import overhead_of
from rematree.pricing.price import Cost, Free, OpPrice, tensors_in
from rematree.pricing.roofline import Roofline
from rematree.trace import OpRecord

_SHAPE_ONLY: Final = ("empty_like", "zeros_like", "ones_like", "full_like", "rand_like", "randn_like", "new_")
_DEVICE: Final = torch.ops.prim.device.default
_ADD: Final = torch.ops.aten.add.Tensor
_BITSANDBYTES: Final = "bitsandbytes"
BEFORE_THE_BLOCKS: Final = "embedding"  # the mark of what runs in front of the first block
_MASK_DIMENSIONS: Final = 4


@dataclass(slots=True)
class _Op:
    """What is known of an op from the first time it ran on arguments of such layouts.

    Attributes:
        recipe: How its outputs are made.
        view: It makes and changes nothing.
        draws: It draws random numbers.
        price: Of `cost`, where a price depends on nothing else.
    """

    recipe: Any
    view: bool
    draws: bool
    price: OpPrice | None = None
    cost: Cost | None = None


@dataclass(frozen=True, slots=True)
class _Round:
    """What one of several equal pieces of work told the ledger.

    Attributes:
        events: In order.
        left: Number among them of the storage that is there afterwards, that of the result.
        result: How to make another result.
        settled: The round before was the same.
    """

    events: list[Event]
    left: int
    result: Any
    settled: bool


class Ledger(Storages, TorchDispatchMode):
    """Tracks live bytes by category, the peak, and time; optionally tells a listener every op.

    Categories are the caller's: whatever `category` is set to when a storage is born. Some are known better: what a
    recomputation makes, weights that bitsandbytes unpacks, masks made in front of the first block. `label` is the
    latest mark.

    Args:
        cost: Prices ops.
        device_type: Only storages on such a device count ("cpu", "cuda"); others weigh nothing.
        recipes: Those of the fake mode that stands directly below; with them, an op that was seen before is neither
            handed down to it nor looked at again.

    On a GPU, here or one that `cost` stands for, sizes are rounded and segments counted as its allocator does.
    """

    def __init__(self, cost: Cost, device_type: str, recipes: Recipes | None = None) -> None:
        super().__init__(device_type, overhead_of(cost, device_type).caches)
        self._recipes = recipes
        self._keeps_price = isinstance(cost, Roofline | Free)  # others look at what is around an op
        self._cost = cost
        self.draws = 0
        self._given_away: set[int] = set()
        self._taint: dict[int, frozenset[str]] = {}
        self.recomputing = 0
        self.misread: set[str] = set()
        self.written_regions: set[str] = set()
        self.listener: Callable[[OpRecord], None] | None = None

    def _gone(self, entry: Entry) -> None:
        self._taint.pop(entry.uid, None)

    # -- placeholders (R3) ------------------------------------------------------------------------------------------

    def placeholder(self, region: str, tensor: torch.Tensor) -> None:
        """Whatever is computed from `tensor` means nothing; note if anything outside a recomputation reads it."""
        entry = self._entry(tensor, self.category)
        self._taint[entry.uid] = frozenset({region})

    def recomputation(self, entered: bool) -> None:
        """A recomputation begins or ends (they nest)."""
        self.recomputing += 1 if entered else -1

    def written(self, region: str) -> None:
        """The output of saved `region` was written to by the region around it: it cannot be given back."""
        self.written_regions.add(region)

    def _follow_taint(self, name: str, reads: list[Entry], writes: list[Entry]) -> None:
        sources = [self._taint[entry.uid] for entry in reads if entry.uid in self._taint]
        if not sources or any(word in name for word in _SHAPE_ONLY):
            return
        blame = frozenset[str]().union(*sources)
        if not self.recomputing:
            self.misread |= blame
        for entry in writes:
            self._taint[entry.uid] = self._taint.get(entry.uid, frozenset()) | blame

    def _line_of(self, func: Any, output: torch.Tensor) -> str:
        """The line of what `func` makes."""
        if func.namespace == _BITSANDBYTES and "dequant" in func.__name__:
            return DEQUANTISED
        if self.recomputing:
            return RECOMPUTED
        if self.label == BEFORE_THE_BLOCKS and output.dim() == _MASK_DIMENSIONS and self.category == SAVED:
            return MASKS
        return self.category

    # -- sums of gradients --------------------------------------------------------------------------------------------

    def given_away(self, gradient: torch.Tensor) -> None:
        """Nobody but autograd holds `gradient` from now on, which adds the next one to it in place.

        To a fake tensor, as to any subclass, it does not: the sum would count beside what it is made of, and of a tied
        embedding that is the largest gradient there is.
        """
        self._given_away.add(self._entry(gradient, self.category).uid)

    def _add_in_place(self, total: Any) -> None:
        """The sum that comes next takes the place of `total`, if that was given away."""
        if not isinstance(total, torch.Tensor):
            return
        key = total.untyped_storage()._cdata
        entry = self._entries.get(key)
        if entry is not None and entry.uid in self._given_away:
            self._given_away.remove(entry.uid)
            del self._entries[key]  # what is left of it is not seen again
            self._left(entry)

    # -- what happens again -------------------------------------------------------------------------------------------

    def again(self, known: dict[Hashable, Any], layouts: Hashable, run: Callable[[], torch.Tensor]) -> torch.Tensor:
        """The result of `run`, a new tensor, or one like it if earlier rounds tell what it does.

        What an op does to fake tensors depends on their layouts alone, so rounds on the same layouts tell the ledger
        the same. Two that did are believed; later ones are told by repetition, every request of memory in its turn, so
        that peaks and what the allocator holds are those of a run. A round that leaves anything behind but its result,
        or lets go of what was there before, always runs, as does one on placeholders, under a listener, or under
        prices that depend on more than layouts.

        Args:
            known: Of the rounds of this piece of work, empty at first.
            layouts: What a round depends on.
            run: The round.
        """
        if self._recipes is None or not self._keeps_price or self._taint or self.listener is not None:
            return run()
        key = (layouts, self.label, self.category, self.recomputing > 0)
        before: _Round | None = known.get(key)
        if before is not None and before.settled:
            with torch._C.DisableTorchFunction(), torch._C._DisableTorchDispatch():
                result: torch.Tensor = self._recipes.make(before.result, [])
            self.tell_again(before.events, before.left, result)
            return result
        first, drawn = self._next_uid, self.draws
        with self.noting() as events:
            out = run()
        left, recipe = self._entry(out, self.category).uid - first, self._recipes.of_new(out)
        if recipe is not None and self.draws == drawn and not self._taint and leaves_only(events, left):
            known[key] = _Round(events, left, recipe, before is not None and before.events == events)
        return out

    # -- dispatch ---------------------------------------------------------------------------------------------------

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing here is compiled, and the guard would cost more than the ledger

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is _DEVICE and isinstance(args[0], FakeTensor):  # two of three calls; it only reads an attribute
            told: torch.device | None = getattr(args[0].fake_mode, "engine_device", None)
            return args[0].fake_device if told is None else told
        with torch._C.DisableTorchFunction():  # a function mode is for code above
            return self._record(func, args, kwargs or {})

    def _record(self, func: Any, args: Any, kwargs: Any) -> Any:
        recipes, found = self._recipes, None
        if recipes is not None:
            found = recipes.key(func, args, recipes.device_seen(kwargs))
            if found is not None:
                op: _Op | None = recipes.facts.get(found[0])
                if op is not None:
                    return self._repeat(op, func, args, kwargs, found[1])
        if func.namespace == "prim":
            return func(*args, **kwargs)
        draws = draws_numbers(func, args, kwargs)
        mutable = func._schema.is_mutable
        if draws:
            self.draws += 1
        inputs = [self._entry(t, self.category) for t in tensors_in(args, kwargs)]
        known = self._next_uid
        if func is _ADD and self._given_away:
            self._add_in_place(args[0])
        out = func(*args, **kwargs)
        outputs = [out] if isinstance(out, torch.Tensor) else list(tensors_in(out))
        before = self.live_bytes
        entries = [self._entry(t, self._line_of(func, t)) for t in outputs]
        born = self.live_bytes - before
        view = born == 0 and not mutable and all(entry.uid <= known for entry in entries)
        if recipes is not None and found is not None:
            key, tensors = found
            if not tensors and recipes.known(key) is None:
                recipes.learn(key, func, tensors, out)
            if recipes.known(key):
                recipes.facts[key] = _Op(recipes.known(key), view, draws)
        if view:
            return out  # or an op that returned what it was given
        price = self._cost.price(func, args, kwargs, outputs)
        self._count(func, args, kwargs, price, inputs, entries, born)
        return out

    def _repeat(self, op: "_Op", func: Any, args: Any, kwargs: Any, tensors: list[torch.Tensor]) -> Any:
        """As `_record`, for an op of which all is known that does not depend on what is live."""
        assert self._recipes is not None
        if op.draws:
            self.draws += 1
        entries_known, inputs = self._entries, list[Entry]()
        for tensor in tensors:
            entry = entries_known.get(tensor.untyped_storage()._cdata)
            if entry is None or entry.reference() is None:
                entry = self._entry(tensor, self.category)
            inputs.append(entry)
        if func is _ADD and self._given_away:
            self._add_in_place(args[0])
        with torch._C._DisableTorchDispatch():  # the fake mode below is not asked
            out = self._recipes.make(op.recipe, tensors)
        if op.view:
            return out
        outputs = [out] if isinstance(out, torch.Tensor) else list(tensors_in(out))
        before = self.live_bytes
        entries = [self._entry(t, self._line_of(func, t)) for t in outputs]
        price = op.price
        if price is None or op.cost is not self._cost:
            price = self._cost.price(func, args, kwargs, outputs)
            if self._keeps_price:
                op.price, op.cost = price, self._cost
        self._count(func, args, kwargs, price, inputs, entries, self.live_bytes - before)
        return out

    def _count(
        self,
        func: Any,
        args: Any,
        kwargs: Any,
        price: OpPrice,
        inputs: list[Entry],
        entries: list[Entry],
        born: int,
    ) -> None:
        unpacks = func.namespace == _BITSANDBYTES and func.__name__.startswith("gemm_4bit")
        self.ran(price.seconds, max(0, price.workspace_bytes - born), DEQUANTISED if unpacks else WORKSPACE)
        if not self._taint and self.listener is None:
            return
        writes = entries
        if func._schema.is_mutable:
            writes = entries + [self._entry(t, self.category) for t in mutated(func, args, kwargs)]
        if self._taint:
            self._follow_taint(func.__name__, inputs, writes)
        if self.listener is not None:
            self.listener(
                OpRecord(
                    func.__name__,
                    frozenset(entry.uid for entry in inputs),
                    {entry.uid: entry.num_bytes for entry in writes},
                    price.seconds,
                )
            )
