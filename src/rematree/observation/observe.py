"""A fake twin of a live model: the same modules, parameters without memory.

Everything left of the plan happens on the twin. The live model is read (names, shapes, flags), never run or changed.
"""

import contextlib
import copy
import traceback
import types
from collections import OrderedDict
from collections.abc import Callable, Container, Generator, Mapping
from pathlib import PurePath
from types import FrameType
from typing import Any, Final, Self

import torch
from torch import nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
)
from torch.utils._pytree import tree_map_only

from rematree.engines import copy_without_engine, is_flattened, is_partitioned, is_shard, whole_on_meta
from rematree.errors import UnsupportedModelError, UsageError
from rematree.execute.attention import AttentionRegions, forget_attention
from rematree.execute.attention_slices import in_slices, within
from rematree.execute.dropout import draw, mask_can_be_kept, scale
from rematree.execute.handle import forget_handle
from rematree.execute.override import ForwardOverride, remove_overrides
from rematree.execute.quantised import keep_trainable
from rematree.observation import values
from rematree.observation.attention_kernels import Capability
from rematree.observation.mode import TwinMode
from rematree.observation.packing import may_pack, one_sequence_a_row, visible_to_a_trace
from rematree.pricing.cost import present_device
from rematree.quantised import attributes_of, hidden_tensors
from rematree.regions import unwrap

LossFunction = Callable[[Any], torch.Tensor]

# Packages that only pass a call on; the line a reader wants is in the model's own code.
_PLUMBING: Final = frozenset({"torch", "rematree", "accelerate"})


class Twin:
    """A copy of `model` and `batch` under fake tensors.

    Args:
        model: Read, not run. Its tensors may be on `meta`.
        batch: What the model will be called with.
        loss: The scalar to differentiate, from the model's output.
        device: Where the twin believes everything to be; it need not be here. Default: where the model is.
        capability: Compute capability of a CUDA device that is not here.
    Attributes:
        model: The copy; same module paths, no plan applied, gradient checkpointing off.
        batch: The batch, fake.
        mode: The fake mode both live in; enter it to run.
        device: Where they are: `device` if it was given, else where the live model is.
    """

    def __init__(
        self,
        model: nn.Module,
        batch: Mapping[str, Any],
        loss: LossFunction | None = None,
        *,
        device: torch.device | None = None,
        capability: Capability | None = None,
    ) -> None:
        self.device = device or present_device(model.parameters())
        if self.device == torch.device("cuda"):  # without a number
            self.device = torch.device("cuda", 0)
        self.mode = TwinMode(self.device, capability)
        self._loss = loss or loss_of
        memo: dict[int, Any] = {}
        storages: dict[int, torch.UntypedStorage] = {}
        kept = [*model.parameters(), *model.buffers(), *hidden_tensors(model)]
        for tensor in kept:
            if id(tensor) not in memo:
                elsewhere = is_shard(tensor) or is_flattened(tensor) or is_partitioned(tensor)
                whole = whole_on_meta(tensor) if elsewhere else tensor
                memo[id(tensor)] = self.mode.fake(whole, storages)
        for module in model.modules():
            for value in vars(module).values():  # a state that the last forward has left there, with its graph
                if isinstance(value, torch.Tensor) and not value.is_leaf:
                    memo[id(value)] = self.mode.fake(value.detach(), storages)
        for module in model.modules():  # each has ten dicts of hooks, empty, whose copies would take half of the time
            dicts = [value for value in vars(module).values() if type(value) is OrderedDict and not value]
            memo.update((id(each), OrderedDict()) for each in dicts)
        self.model = copy_without_engine(model, memo)
        for parameter in model.parameters():
            # A fake tensor is a plain parameter; a packed one reads its scales from attributes of its own.
            vars(memo[id(parameter)]).update(copy.deepcopy(attributes_of(parameter), memo))
        forget_handle(self.model)
        remove_overrides(self.model)
        forget_attention(self.model)
        keep_trainable(self.model)
        for path, module in self.model.named_modules():
            own = module.__dict__.get("forward")
            if isinstance(own, types.FunctionType):  # a closure: its copy would run the live model
                raise UnsupportedModelError(
                    f"{path or 'the model'} has a wrapped forward ({own.__qualname__})",
                    remedies=["plan before accelerator.prepare(model) or other wrappers"],
                )
            if module.__dict__.get("gradient_checkpointing") is True:
                module.__dict__["gradient_checkpointing"] = False
        self.model.train(model.training)
        self._names = frozenset(batch)
        visible = visible_to_a_trace(batch)
        self._packs = may_pack(visible)
        self.batch = tree_map_only(torch.Tensor, lambda tensor: self.mode.fake(tensor, storages), visible)
        self._values = {name: value for name, value in visible.items() if isinstance(value, torch.Tensor)}

    def with_batch(self, batch: Mapping[str, Any]) -> Self:
        """The same model, not a copy, with another batch of the same tensors in other shapes.

        Raises:
            UsageError: it has other tensors.
        """
        if self._names.symmetric_difference(batch):
            raise UsageError(f"a batch of {sorted(batch)} cannot stand for one of {sorted(self._names)}")
        other = copy.copy(self)
        storages: dict[int, torch.UntypedStorage] = {}
        visible = visible_to_a_trace(batch, kept=self.batch.keys())
        other._packs = may_pack(visible)
        other.batch = tree_map_only(torch.Tensor, lambda tensor: self.mode.fake(tensor, storages), visible)
        other._values = {}
        if self.mode.knows_values:
            for name, fake in other.batch.items():
                if isinstance(fake, torch.Tensor):
                    values.know(fake, visible[name])
        return other

    def loss(self) -> torch.Tensor:
        """Run the forward pass; the scalar to differentiate. Call inside `mode`.

        Raises:
            UsageError: the model returns no loss.
            UnsupportedModelError: what the model does depends on values of tensors.
        """
        try:
            try:
                loss = self._run()
            except RuntimeError as error:
                if not values.asks_for_values(error) or not self._learn_values():
                    raise
                loss = self._run()
        except (DataDependentOutputException, DynamicOutputShapeException) as error:
            _refuse_dropped_layers(self.model, error)
            raise UnsupportedModelError(
                "the model's forward depends on values of tensors, and a plan is made without computing any",
                details=[f"{error.func}{_place_of(error)}"],
                remedies=_other_losses(self.model, self.batch),
            ) from error
        except RuntimeError as error:
            _refuse_converted_modules(error)
            raise
        self._values = {}  # asked for or not, and memory of the device
        return loss

    def _run(self) -> torch.Tensor:
        with self.looked_at():
            return self._loss(self.model(**self.batch))

    @contextlib.contextmanager
    def looked_at(self) -> Generator[None]:
        """The model finds what it would find by looking at values: in its forward, and in a rerun in its backward."""
        with contextlib.ExitStack() as around:
            if not self._packs:
                around.enter_context(one_sequence_a_row())
            if self.mode.knows_values:
                around.enter_context(values.NumbersOfTensors())
            yield

    def _learn_values(self) -> bool:
        """Know the values of the batch from now on. False where they are known already, or not there."""
        if self.mode.knows_values or any(t.is_meta for t in self._values.values()):
            return False
        for name, value in self._values.items():
            values.know(self.batch[name], value)
        self.mode.know_values()
        return True


def _place_of(error: BaseException) -> str:
    """Where in the model's own code `error` came of, as " at file.py:line"; nothing where that is not known."""
    frames = [entry for entry in traceback.walk_tb(error.__traceback__) if not is_plumbing(entry[0])]
    return f" at {source_line(*frames[-1])}" if frames else ""


def _refuse_converted_modules(error: RuntimeError) -> None:
    """Raise if `error` comes of a forward that calls `to` on one of its modules (Switch Transformers' routers)."""
    if "Couldn't swap" in str(error):
        raise UnsupportedModelError(
            f"the model converts a module in its forward{_place_of(error)}, and a plan is made on weights that hold "
            "nothing",
            remedies=["convert it once, before training, and take the call out of the forward"],
        ) from error


def _refuse_dropped_layers(model: nn.Module, error: BaseException) -> None:
    """Raise if `model` leaves out layers by chance (wav2vec 2.0, M2M-100): `error` is most likely about that."""
    found = {path: vars(module).get("layerdrop") for path, module in model.named_modules()}
    rates = {path: rate for path, rate in found.items() if isinstance(rate, float) and rate > 0}
    if model.training and rates:
        shown = ", ".join(f"{path}.layerdrop is {rate:g}" for path, rate in rates.items())
        raise UnsupportedModelError(
            f"the model leaves out layers by chance, and a plan is for layers that run: {shown}",
            remedies=[f"model.get_submodule({path!r}).layerdrop = 0.0" for path in rates],
        ) from error


def _other_losses(model: nn.Module, batch: Mapping[str, Any]) -> list[str]:
    """What to do about a loss that looks at the values of labels, as DeBERTa's for classification does."""
    inner: Any = unwrap(model)
    config = getattr(inner, "config", None)
    classifies = type(inner).__name__.endswith("ForSequenceClassification") and getattr(config, "num_labels", 1) > 1
    if "labels" in batch and classifies and getattr(config, "problem_type", "") is None:
        return ['model.config.problem_type = "single_label_classification"   (if it is the loss that looks)']
    return []


def loss_of(output: Any) -> torch.Tensor:
    """The scalar a training script would call backward on: `output.loss`, or a scalar output itself.

    Raises:
        UsageError: there is none, for example because the batch has no labels.
    """
    candidate = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", output)  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
    if isinstance(candidate, tuple | list) and candidate:  # pyright: ignore[reportUnknownArgumentType]
        candidate = candidate[0]  # pyright: ignore[reportUnknownVariableType]
    if isinstance(candidate, torch.Tensor) and candidate.numel() == 1:
        return candidate
    raise UsageError("the model returned no loss for this batch", remedies=["put labels in the batch, or pass loss="])


def is_plumbing(frame: FrameType) -> bool:
    """Whether `frame` runs code of a package that only passes a model's calls on."""
    return frame.f_globals.get("__name__", "").partition(".")[0] in _PLUMBING


def source_line(frame: FrameType, number: int) -> str:
    """A line of the code that `frame` runs, as "file.py:line"."""
    return f"{PurePath(frame.f_code.co_filename).name}:{number}"


class RegionStack:
    """Knows which region is running, while it is installed on a twin.

    Attributes:
        path: Relative path of the innermost region that is running, "" outside all of them.
        calls: How often each region was entered, in order of first entry.
        drawn: Elements of the mask each "#draw" region drew.
    """

    def __init__(
        self,
        regions: Mapping[str, nn.Module],
        attention: Mapping[str, nn.Module] | None = None,
        dropouts: Mapping[str, nn.Module] | None = None,
        sliced: Container[str] = (),
    ) -> None:
        self._stack: list[str] = [""]
        self._overrides = [ForwardOverride(module, self._around(path)) for path, module in regions.items()]
        self._overrides += [
            ForwardOverride(module, self._around_draw(path, module)) for path, module in (dropouts or {}).items()
        ]
        self._attention = AttentionRegions(
            (module, within(self._around(path), in_slices if path in sliced else None))
            for path, module in (attention or {}).items()
        )
        self.calls: dict[str, int] = {}
        self.drawn: dict[str, int] = {}

    @property
    def path(self) -> str:
        return self._stack[-1]

    def run(self, path: str, inner: Callable[..., Any], *args: Any) -> Any:
        """Call `inner` as the region `path`, which is neither a module nor an attention core."""
        return self._around(path)(inner, *args)

    def _around(self, path: str) -> Callable[..., Any]:
        def around(inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            self.calls[path] = self.calls.get(path, 0) + 1
            self._stack.append(path)
            try:
                return inner(*args, **kwargs)
            finally:
                self._stack.pop()

        return around

    def _around_draw(self, path: str, module: nn.Module) -> Callable[..., Any]:
        def around(inner: Callable[..., Any], x: torch.Tensor) -> Any:
            if not mask_can_be_kept(module, x):
                return inner(x)
            drawn = self._around(path)(draw, x, module.p)
            self.drawn[path] = x.numel()
            return scale(x, drawn, module.p)  # pyright: ignore[reportArgumentType]

        return around

    def remove(self) -> None:
        """Take the overrides off."""
        for override in reversed(self._overrides):
            override.remove()
        self._attention.remove()
