"""After the first training step: which adapters received no gradient.

An adapter that never trains is silent: the loss is finite, and falls if anything else trains. Reentrant checkpointing
over a frozen input does it, an adapter that is not active, an expert that no token reaches. So the first step is
watched, and what stayed without a gradient is named once.

Judged is each adapter layer, not each parameter: while LoRA's B is still zero, the gradient of A is exactly zero.
Watching costs one reduction over each gradient of the first step and one byte for each adapter layer, waits for no
device, and ends with the report.
"""

import sys
import threading
import warnings
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch.utils.checkpoint import CheckpointFunction

from rematree.engines import is_partitioned
from rematree.table import fold_paths

_MAX_NAMES: Final = 6
_MAX_UNSURE: Final = 2  # steps whose end was not seen, until what they left silent is reported all the same
_FLAT: Final = "FullyShardedDataParallel"  # the first version: gradients arrive in one flat parameter


@dataclass(frozen=True, slots=True)
class _Adapter:
    """The parameters of one adapter in one layer."""

    path: str
    name: str
    layer: Any
    parameters: tuple[nn.Parameter, ...]

    @property
    def key(self) -> tuple[str, str, tuple[int, ...]]:
        return self.path, self.name, tuple(map(id, self.parameters))

    @property
    def active(self) -> bool:
        return not self.layer.disable_adapters and self.name in self.layer.active_adapters


class AdapterCheck:
    """Watches the first training step of `model` and warns once of every adapter without a gradient.

    Call `forward_begins()` whenever a training forward begins; the report comes with the first one after a backward,
    or with `remove()`. Only trained adapters of PEFT's layers are watched; a model without any is left alone. A step
    whose backward raised is not judged. A copy of a model that holds a check gets one that has nothing left to do.

    Where gradients do not reach the parameters themselves (FSDP's first version, DeepSpeed's ZeRO), nothing is judged.

    Args:
        model: The model, in training or before it.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model: nn.Module | None = model
        self._adapters: list[_Adapter] = []
        self._heard: dict[torch.device, Tensor] = {}
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []
        self._result: tuple[str, ...] = ()
        self._task = -1  # the backward that last reached a parameter
        self._ended = self._ended_inside = False  # a backward came to its end; one inside a reentrant checkpoint did
        self._unsure = 0
        self._lock = threading.Lock()  # a model may be run in several threads, and one of them reports
        self._watch()

    def __getstate__(self) -> dict[str, Any]:
        fresh = {"_model": None, "_adapters": [], "_heard": {}, "_hooks": [], "_result": (), "_task": -1}
        return {**fresh, "_ended": False, "_ended_inside": False, "_unsure": 0}

    @property
    def silent(self) -> tuple[str, ...]:
        """Paths of the adapter layers without a gradient, as far as a step has been seen; () before.

        Where a layer trains several adapters, the adapter's name follows in brackets.

        Cost: waits for the device.
        """
        if self._model is None:
            return self._result
        return tuple(self._label(adapter) for adapter in self._silent())

    def forward_begins(self) -> None:
        """A training forward begins: report on the step before it, if there was one."""
        if self._model is not None:
            with self._lock:
                self._look()

    def _look(self) -> None:
        if self._model is None:  # another thread has reported
            return
        if self._complete():
            self._report()
        else:
            self._ended_inside = False
            self._watch()

    def remove(self, *, reports: bool = True) -> None:
        """Report if a step has been seen, and stop watching. Does nothing the second time."""
        if reports and self._model is not None and self._complete():
            self._report()
        self._stop()

    # -- watching -----------------------------------------------------------------------------------------------------

    def _watch(self) -> None:
        """Hook what is trained now. Whoever changes that before the first step is heard."""
        assert self._model is not None
        if any(type(module).__name__ == _FLAT for module in self._model.modules()):
            return
        trained = {id(p): p for p in self._model.parameters() if p.requires_grad and not _elsewhere(p)}
        adapters = list(_adapters(self._model, trained.keys()))
        if [adapter.key for adapter in adapters] == [adapter.key for adapter in self._adapters]:
            return
        self._unhook()
        self._adapters = adapters
        if not adapters:
            return
        of_parameter: dict[int, list[int]] = {}
        for index, adapter in enumerate(adapters):
            for parameter in adapter.parameters:
                of_parameter.setdefault(id(parameter), []).append(index)
        # Other parameters are hooked too: a head that trains tells that there was a step, also if no adapter was heard.
        for key, parameter in trained.items():
            self._hooks.append(parameter.register_post_accumulate_grad_hook(self._hear(of_parameter.get(key, []))))

    def _hear(self, indices: list[int]) -> Callable[[Tensor], None]:
        def hear(parameter: Tensor) -> None:
            task = torch._C._current_graph_task_id()
            if task != self._task:
                self._task = task
                engine: Any = torch.autograd.Variable._execution_engine
                engine.queue_callback(self._end)  # called only if the backward succeeds
            if indices:
                self._note(indices, parameter)

        return hear

    def _note(self, indices: list[int], parameter: Tensor) -> None:
        gradient: Any = parameter.grad
        if hasattr(gradient, "to_local"):  # a DTensor: a reduction over all of it would wait for the other ranks
            gradient = gradient.to_local()
        flags = self._heard.get(parameter.device)
        if flags is None:
            flags = torch.zeros(len(self._adapters), dtype=torch.bool, device=parameter.device)
            self._heard[parameter.device] = flags
        for index in indices:
            if gradient is None or gradient.numel() == 0:  # an optimizer in backward has used it; another rank holds it
                flags[index] = True
            else:
                flags[index].logical_or_(gradient.any())

    def _end(self) -> None:
        """A backward has come to its end: the whole one, unless it is one that a reentrant checkpoint made inside."""
        if _inside_reentrant():
            self._ended_inside = True
        else:
            self._ended = True

    # -- reporting ----------------------------------------------------------------------------------------------------

    def _complete(self) -> bool:
        """Whether the step so far can be judged.

        With reentrant checkpointing and all that is trained inside it, the end is not seen; then a second step is
        waited for, since the first may have ended with an exception.
        """
        if self._ended_inside and not self._ended:
            self._unsure += 1
        return self._ended or self._unsure >= _MAX_UNSURE

    def _silent(self) -> list[_Adapter]:
        if self._task < 0:
            return []
        heard = [False] * len(self._adapters)
        for flags in self._heard.values():
            heard = [one or other for one, other in zip(heard, flags.tolist(), strict=True)]
        return [adapter for adapter, was_heard in zip(self._adapters, heard, strict=True) if not was_heard]

    def _label(self, adapter: _Adapter) -> str:
        several = sum(other.path == adapter.path for other in self._adapters) > 1
        return f"{adapter.path}[{adapter.name}]" if several else adapter.path

    def _report(self) -> None:
        silent = self._silent()
        if self._heard and len(silent) == len(self._adapters):  # gradients came, all zero: this step's loss was flat
            self._heard.clear()
            self._task, self._ended, self._ended_inside, self._unsure = -1, False, False, 0
            return
        self._result = tuple(self._label(adapter) for adapter in silent)
        said = self._message(silent)
        self._stop()  # first: where warnings are errors, the next line raises
        if silent:
            warnings.warn(said, UserWarning, stacklevel=3)

    def _message(self, silent: list[_Adapter]) -> str:
        idle = [self._label(adapter) for adapter in silent if not adapter.active]
        rest = [self._label(adapter) for adapter in silent if adapter.active]
        lines = [f"after the first training step {len(silent)} of {len(self._adapters)} adapters have no gradient:"]
        if rest:
            lines.append(f"  {_names(rest)}")
            lines.append(
                "  likely because their input was frozen under reentrant checkpointing (use_reentrant=False needs no "
                "input gradient), or because the layer did not run or passed nothing on (an expert without tokens)"
            )
        if idle:
            lines.append(f"  {_names(idle)}")
            lines.append("  trained but not active: model.set_adapter(...) decides")
        return "\n".join(lines)

    def _unhook(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self._heard.clear()

    def _stop(self) -> None:
        self._unhook()
        self._adapters = []
        self._model = None


def _adapters(model: nn.Module, trained: Collection[int]) -> Iterator[_Adapter]:
    """Every adapter of PEFT's in `model` that trains anything, layer by layer."""
    tuners = sys.modules.get("peft.tuners.tuners_utils")
    if tuners is None:
        return
    for path, module in model.named_modules():
        if not isinstance(module, tuners.BaseTunerLayer):
            continue
        layer: Any = module
        found: dict[str, dict[int, nn.Parameter]] = {}
        for attribute in layer.adapter_layer_names:
            by_name: Any = getattr(layer, attribute, None)
            for name, item in by_name.items() if isinstance(by_name, nn.ModuleDict | nn.ParameterDict) else ():
                parameters = item.parameters() if isinstance(item, nn.Module) else [item]
                found.setdefault(name, {}).update((id(p), p) for p in parameters if id(p) in trained)
        for name, held in found.items():
            if held:
                yield _Adapter(path, name, layer, tuple(held.values()))


def _elsewhere(parameter: nn.Parameter) -> bool:
    """Whether its gradient is kept by ZeRO, or is of no values at all."""
    return is_partitioned(parameter) or isinstance(parameter, FakeTensor)


def _inside_reentrant() -> bool:
    """Whether this is called from the backward that torch's reentrant checkpoint runs inside another."""
    frame = sys._getframe()
    code = CheckpointFunction.backward.__code__
    while frame is not None:
        if frame.f_code is code:
            return True
        frame = frame.f_back
    return False


def _names(labels: list[str]) -> str:
    folded = fold_paths(labels)
    more = f" and {len(folded) - _MAX_NAMES} more" if len(folded) > _MAX_NAMES else ""
    return ", ".join(folded[:_MAX_NAMES]) + more
