"""What a plan is for: the device that is here, or one that is only known from the table.

Light on purpose: a device that does not exist, or a budget it does not have, is refused before torch is imported.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from rematree.catalogue.configs import needs_no_weights
from rematree.errors import UsageError
from rematree.finetune.config import TrainConfig
from rematree.pricing.devices import Device, find_device
from rematree.units import format_bytes

if TYPE_CHECKING:
    import torch

    from rematree.finetune.synthetic import Shape
    from rematree.planning.planner import Planner

# ROCm answers to the name of CUDA in torch.
_TORCH_DEVICE: Final = {"cuda": "cuda", "rocm": "cuda", "cpu": "cpu", "mps": "mps"}


@dataclass(frozen=True)
class Target:
    """A device to plan for.

    Attributes:
        device: Of the table; None for the one that is here.
    """

    device: Device | None = None

    @classmethod
    def named(cls, name: str | None) -> "Target":
        """The device called `name`; the one that is here without a name.

        Raises:
            UsageError: there is no such device; names the nearest.
        """
        return cls() if name is None else cls(find_device(name))

    @property
    def name(self) -> str:
        """For a reader."""
        return "the device that is here" if self.device is None else self.device.title

    @property
    def dtype(self) -> "torch.dtype | None":
        """What weights are kept in where the run leaves it open; None leaves it to the device that is here."""
        if self.device is None:
            return None
        import torch

        rates = self.device.flops_per_second
        # Devices that compute in fp16 and not in bf16 have a rate for the one alone; without either, nothing is known.
        return torch.float32 if "fp16" in rates and "bf16" not in rates else torch.bfloat16

    def budget(self, wanted: int | None) -> int:
        """The bytes that a plan may take: those `wanted`, or all that the device has.

        Raises:
            UsageError: more is wanted than the device has, or nothing is wanted of the device that is here.
        """
        if self.device is None:
            if wanted is None:
                raise UsageError(
                    "Missing option '--budget': the bytes that the step may take",
                    remedies=["--budget 14GiB", "--device rtx-4090   (without a budget: all its memory)"],
                )
            return wanted
        usable = self.device.usable_bytes
        if wanted is None:
            return usable
        if wanted > self.device.memory_bytes:
            raise UsageError(
                f"--budget {format_bytes(wanted)} is more than {self.device.title} has, "
                f"{format_bytes(self.device.memory_bytes)}",
                details=[f"{format_bytes(usable)} of it can be used ({self.device.usable_source})"],
                remedies=["leave out --budget: all that can be used", "another --device"],
            )
        return min(wanted, usable)

    def loads(self, config: TrainConfig) -> bool:
        """Whether the weights of `config`'s model are loaded: they are there, and so is the device."""
        return self.device is None and not needs_no_weights(config.model)

    def shape(self, config: TrainConfig, *, full: bool) -> "Shape":
        """Model and batch of `config`: loaded for the device that is here, made of the config alone for another.

        Raises:
            UsageError: there is no such model, or it does not fit the shape.
        """
        from rematree.finetune.synthetic import config_shape, prepare_shape

        if self.loads(config):
            return prepare_shape(config, full=full)
        return config_shape(config, full=full, dtype=self.dtype)

    def planner(self, shape: "Shape", config: TrainConfig) -> "Planner":
        """Observe `shape` as it would run on the device.

        Raises:
            UnsupportedModelError: the model cannot be observed.
            UsageError: the device cannot be planned for.
        """
        from rematree.finetune.base import training_device
        from rematree.planning.planner import Planner

        options: dict[str, Any] = {
            "accumulation_steps": config.gradient_accumulation_steps,
            "clips": config.max_grad_norm > 0,
            "forbid": config.forbid,
            "allow_compile": config.compile or None,
        }
        if self.device is not None:
            options |= {"device": self._torch_device(), "cost": self.device.roofline()}
            if self.device.capability:
                options["capability"] = (self.device.capability, 0)
        elif next(shape.model.parameters()).is_meta:
            options["device"] = training_device()
        return Planner(shape.model, shape.batch, **options)

    def _torch_device(self) -> "torch.device":
        import torch

        assert self.device is not None
        kind = _TORCH_DEVICE[self.device.backend]
        return torch.device(kind, 0) if kind == "cuda" else torch.device(kind)


def named_targets(names: Sequence[str]) -> list[Target]:
    """A target for each of `names`.

    Raises:
        UsageError: one of them is no device, or stands there twice.
    """
    found = [Target.named(name) for name in names]
    titles = [target.name for target in found]
    twice = next((title for title in titles if titles.count(title) > 1), None)
    if twice is not None:
        raise UsageError(f"--device names {twice} more than once")
    return found


def all_targets() -> list[Target]:
    """Every device of the table that steps can be timed for and torch computes on."""
    from rematree.pricing.devices import known_devices

    return [Target(device) for device in known_devices() if device.flops_per_second and device.overhead.caches]
