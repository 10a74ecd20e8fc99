"""What a plan is for: the device that is here, or one that is only known from the table; one of them, or several ranks.

Light on purpose: a device that does not exist, or a budget it does not have, is refused before torch is imported.
"""

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final, cast

from rematree.catalogue.configs import needs_no_weights
from rematree.errors import UsageError
from rematree.finetune.config import TrainConfig
from rematree.pricing.devices import Device, find_device
from rematree.units import MIB, format_bytes

if TYPE_CHECKING:
    import torch

    from rematree.finetune.synthetic import Shape
    from rematree.planning.planner import Planner
    from rematree.referee.ranks import Engine, Ranks

_ENGINES_OF: Final[Mapping[str, tuple["Engine", ...]]] = {
    "--no-reshard": ("fsdp2",),
    "--gradient-as-bucket-view": ("ddp",),
    "--reduce-bucket-size": ("zero2", "zero3"),
    "--overlap-comm": ("zero2",),
    "--stage3-prefetch-bucket-size": ("zero3",),
    "--stage3-param-persistence-threshold": ("zero3",),
    "--stage3-max-live-parameters": ("zero3",),
    "--stage3-max-reuse-distance": ("zero3",),
}
_STAGE_3: Final = {
    "prefetch": "--stage3-prefetch-bucket-size",
    "persistence_threshold": "--stage3-param-persistence-threshold",
    "max_live": "--stage3-max-live-parameters",
    "max_reuse": "--stage3-max-reuse-distance",
}
# ROCm answers to the name of CUDA in torch.
_TORCH_DEVICE: Final = {"cuda": "cuda", "rocm": "cuda", "cpu": "cpu", "mps": "mps"}


@dataclass(frozen=True)
class Target:
    """A device to plan for.

    Attributes:
        device: Of the table; None for the one that is here.
        ranks: Over which ranks the step is distributed, each with such a device; None: it runs in one process.
    """

    device: Device | None = None
    ranks: "Ranks | None" = None

    @classmethod
    def named(cls, name: str | None) -> "Target":
        """The device called `name`; the one that is here without a name.

        Raises:
            UsageError: there is no such device, or none whose steps can be timed; names the nearest, or what to do.
        """
        if name is None:
            return cls()
        device = find_device(name)
        _refuse_without_rates(device)
        return cls(device)

    @property
    def name(self) -> str:
        """Of the device, for a reader."""
        return "the device that is here" if self.device is None else self.device.title

    @property
    def place(self) -> str:
        """The device, and whose it is if there are several ranks."""
        return self.name if self.ranks is None else f"{self.name}, {self.ranks}"

    def among(self, ranks: "Ranks | None") -> "Target":
        """The same device, of one of `ranks`."""
        return replace(self, ranks=ranks)

    @property
    def dtype(self) -> "torch.dtype | None":
        """What weights are kept in where the run leaves it open; None leaves it to the device that is here."""
        if self.device is None:
            return None
        import torch

        rates = self.device.flops_per_second
        # Devices that compute in fp16 and not in bf16 have a rate for the one alone; without either, nothing is known.
        # A profile has a rate of bf16 where it is emulated, too, which is no faster than what emulates it.
        emulated = rates["bf16"] <= rates.get("fp32", 0.0) if "bf16" in rates else "fp16" in rates
        return torch.float32 if emulated else torch.bfloat16

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
        from rematree.observation.attention_kernels import DEFAULT_CAPABILITY
        from rematree.planning.planner import Planner

        options: dict[str, Any] = {
            "accumulation_steps": config.gradient_accumulation_steps,
            "clips": config.max_grad_norm > 0,
            "forbid": config.forbid,
            "allow_compile": config.compile or None,
            "ranks": self.ranks,
        }
        if self.device is not None:
            options |= {"device": self._torch_device(), "cost": self.device.roofline()}
            if options["device"].type == "cuda":  # not that of another device that may be here
                options["capability"] = (self.device.capability or DEFAULT_CAPABILITY[0], 0)
        elif next(shape.model.parameters()).is_meta:
            options["device"] = training_device()
        return Planner(shape.model, shape.batch, **options)

    def _torch_device(self) -> "torch.device":
        import torch

        assert self.device is not None
        kind = _TORCH_DEVICE[self.device.backend]
        return torch.device(kind, 0) if kind == "cuda" else torch.device(kind)


def _refuse_without_rates(device: Device) -> None:
    """Where nothing is known of a device's speed: say how it can be planned for all the same."""
    if device.flops_per_second:
        return
    # On a Mac steps run on the CPU: torch's Metal backend lacks much of what they need.
    which, runs = ("its CPU", ", and its steps run on the CPU") if device.backend == "mps" else ("it", "")
    there = f"(on a machine with {device.title}"
    raise UsageError(
        f"no FLOP rate of {device.title} is published{runs}: it can be planned for where it is, or as it was measured",
        remedies=[
            f"--budget {device.usable_bytes // MIB}MiB, without --device   {there}: plans for {which})",
            f"rematree calibrate --output profile.json   {there}: measures {which})",
            "--device ./profile.json   (then, on any machine)",
        ],
    )


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


def named_ranks(
    count: int | None,
    engine: str | None,
    config: TrainConfig,
    *,
    reshard: bool = True,
    bucket_view: bool = False,
    bucket_elements: int | None = None,
    overlaps: bool = False,
    stage3: Mapping[str, int | None] | None = None,
) -> "Ranks | None":
    """The ranks that options of the command line name; None if they name none.

    Args:
        count: `--ranks`.
        engine: `--engine`.
        config: The run.
        reshard: `--reshard`.
        bucket_view: `--gradient-as-bucket-view`.
        bucket_elements: `--reduce-bucket-size`; None: DeepSpeed's default.
        overlaps: `--overlap-comm`.
        stage3: Options of ZeRO-3's all-gathers, by the names of `rematree.referee.ranks.Stage3`; None: the default.
    Raises:
        UsageError: fewer than two ranks, an engine that there is not (names the nearest), or options that contradict
            each other.
    """
    told = {
        "--no-reshard": not reshard,
        "--gradient-as-bucket-view": bucket_view,
        "--reduce-bucket-size": bucket_elements is not None,
        "--overlap-comm": overlaps,
        **{_STAGE_3[name]: value is not None for name, value in (stage3 or {}).items()},
    }
    options = [option for option, given in told.items() if given]
    if count is None:
        alone = next(iter([*(["--engine"] if engine is not None else []), *options]), None)
        if alone is not None:
            raise UsageError(f"{alone} is about several ranks, and --ranks is missing", remedies=["--ranks 2"])
        return None
    if count < 2:
        raise UsageError(
            f"--ranks is {count}; a step is distributed over at least 2", remedies=["leave out --ranks: one process"]
        )
    from rematree.referee.ranks import BUCKET_ELEMENTS, ENGINES, Ranks, Stage3

    if engine is None:
        raise UsageError(
            "--ranks says how many, and --engine, which says how, is missing",
            remedies=[f"--engine {name}" for name in ENGINES],
        )
    if engine not in ENGINES:
        close = difflib.get_close_matches(engine.lower(), ENGINES, n=len(ENGINES), cutoff=0.0)
        raise UsageError(
            f"unknown engine {engine!r}; the nearest are {', '.join(close)}",
            remedies=[f"--engine {name}" for name in close],
        )
    elsewhere = next((option for option in options if engine not in _ENGINES_OF[option]), None)
    if elsewhere is not None:
        theirs = _ENGINES_OF[elsewhere]
        raise UsageError(
            f"{elsewhere} is {Ranks(theirs[0], count).title}'s, and --engine is {engine}",
            remedies=[f"--engine {name}" for name in theirs],
        )
    if engine in {"fsdp2", "zero3"} and config.quantised_bits is not None:
        title = Ranks(cast("Engine", engine), count).title
        raise UsageError(
            f"--load-in-{config.quantised_bits}bit packs weights, and how {title} shards packed weights is not covered",
            remedies=["--engine ddp"],
        )
    return Ranks(
        cast("Engine", engine),
        count,
        bucket_view=bucket_view,
        reshard=reshard,
        bucket_elements=BUCKET_ELEMENTS if bucket_elements is None else bucket_elements,
        overlaps=overlaps,
        stage3=Stage3(**{name: value for name, value in (stage3 or {}).items() if value is not None}),
    )


def all_targets() -> list[Target]:
    """Every device of the table that steps can be timed for and torch computes on."""
    from rematree.pricing.devices import known_devices

    return [Target(device) for device in known_devices() if device.flops_per_second and device.overhead.caches]
