"""The state of random number generators, which a rerun finds as the forward found it (R4), and where it would not."""

import contextlib
import pickle
import random
import sys
from collections.abc import Generator
from typing import Any, Final

import torch
from torch import nn
from torch._guards import detect_fake_mode

from rematree.errors import UnsupportedModelError
from rematree.execute.stash import Watcher
from rematree.regions import unwrap

_STATE_BYTES: Final = 5056  # of torch.get_rng_state()
_NO_GENERATOR: Final = ("cpu", "meta")  # none, or one that is always kept


class HostState:
    """State of Python's and NumPy's own generators.

    Cost:
        Some 80 microseconds, sixty times torch's: not for every region of every step.
    """

    __slots__ = ("_numpy", "_python")

    def __init__(self) -> None:
        self._python = random.getstate()
        numpy = sys.modules.get("numpy.random")
        self._numpy = None if numpy is None else pickle.dumps(numpy.get_state(legacy=False))

    def same_as(self, other: "HostState") -> bool:
        """Whether nothing was drawn between the two."""
        return self._python == other._python and self._numpy == other._numpy

    def restore(self) -> None:
        """Set the generators to this state."""
        random.setstate(self._python)
        if self._numpy is not None:
            sys.modules["numpy.random"].set_state(pickle.loads(self._numpy))


class RandomState:
    """State of the generators a region could draw from: torch's of the CPU and the current accelerator, and the host's.

    The host's where they are looked at.

    Under fake tensors nothing is drawn and there is no state; a stand-in of the same size takes its place, so that the
    referee counts its bytes, and the number of draws that lead to it tells two of them apart.
    """

    __slots__ = ("__weakref__", "_accelerator", "_cpu", "_draws", "_host", "_watcher")

    def __init__(self, watcher: Watcher | None = None, *, host: bool = False) -> None:
        self._host = HostState() if host else None
        self._watcher = watcher
        self._draws = 0 if watcher is None else watcher.draws
        self._cpu = torch.get_rng_state() if watcher is None else torch.empty(_STATE_BYTES, dtype=torch.uint8)
        self._accelerator = torch.cuda.get_rng_state() if watcher is None and torch.cuda.is_initialized() else None

    @classmethod
    def now(cls, watcher: Watcher | None = None, *, host: bool = False) -> "RandomState | None":
        """The present state, with Python's and NumPy's if `host`.

        Under fake tensors a stand-in if `watcher` counts draws, else None.
        """
        # The search for a fake mode costs more than the state; without any mode there is none to find.
        if not torch._C._len_torch_dispatch_stack() or detect_fake_mode() is None:
            return cls(host=host)
        return None if watcher is None else cls(watcher)

    @property
    def has_host(self) -> bool:
        """Whether Python's and NumPy's generators are among them."""
        return self._host is not None

    def same_as(self, other: "RandomState | None") -> bool:
        """Whether nothing was drawn between the two."""
        if other is None:
            return False
        if self._watcher is not None or other._watcher is not None:
            return self._draws == other._draws
        if not torch.equal(self._cpu, other._cpu):
            return False
        if self._host is None or other._host is None:
            if self._host is not other._host:
                return False
        elif not self._host.same_as(other._host):
            return False
        if self._accelerator is None or other._accelerator is None:
            return self._accelerator is other._accelerator
        return torch.equal(self._accelerator, other._accelerator)

    def drew_on_host(self, after: "RandomState") -> bool:
        """Whether Python's or NumPy's generator, which both looked at, was drawn from between the two."""
        assert self._host is not None
        assert after._host is not None
        return not self._host.same_as(after._host)

    def restore(self) -> None:
        """Set the generators to this state."""
        if self._watcher is not None:
            self._watcher.draws = self._draws
            return
        torch.set_rng_state(self._cpu)
        if self._host is not None:
            self._host.restore()
        if self._accelerator is not None:
            torch.cuda.set_rng_state(self._accelerator)


@contextlib.contextmanager
def nothing_drawn() -> Generator[None]:
    """The CPU's generators, Python's and NumPy's are afterwards where they were before."""
    host = HostState()
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        host.restore()


def generator_state(device: torch.device) -> torch.Tensor:
    """Of the generator that dropout on `device` draws from; on the host, and read without waiting for the device."""
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


def set_generator_state(state: torch.Tensor, device: torch.device) -> None:
    """Have dropout on `device` draw again what it drew from `state` on."""
    if device.type == "cuda":
        torch.cuda.set_rng_state(state, device)
    else:
        torch.set_rng_state(state)


def refuse_other_generators(model: nn.Module) -> None:
    """Refuse a model that draws on a device whose generator `RandomState` does not keep: masks would not come again.

    Raises:
        UnsupportedModelError: names the device.
    """
    devices = {parameter.device for parameter in model.parameters() if parameter.device.type not in _NO_GENERATOR}
    if not devices or not _drops(model):
        return
    kept = None
    if any(device.type == "cuda" for device in devices):
        kept = torch.device("cuda", torch.cuda.current_device())
    others = sorted(str(device) for device in devices if device != kept)
    if others:
        raise UnsupportedModelError(
            f"{type(model).__name__} has dropout on {others[0]}, and a recomputation draws the masks of the forward "
            "again on the CPU and on the current CUDA device only",
            remedies=["torch.cuda.set_device(...) for a model on one other GPU", "train without dropout"],
        )


def _drops(model: nn.Module) -> bool:
    """Whether a module of `model` is a dropout, or its config asks for one."""
    if any(isinstance(m, nn.modules.dropout._DropoutNd) and m.p > 0 for m in model.modules()):  # pyright: ignore[reportPrivateUsage]
        return True
    config: Any = getattr(unwrap(model), "config", None)
    settings: dict[str, Any] = getattr(config, "__dict__", {})
    return any("drop" in name and isinstance(value, float) and value > 0 for name, value in settings.items())
