"""TrainResult: what a finished run reports, on the terminal and in result.json."""

import dataclasses
import importlib.metadata
import platform
from dataclasses import dataclass, field
from typing import Any, Final, Self

import torch

from rematree.errors import UsageError
from rematree.units import format_bytes, format_seconds

_MAX_SHOWN: Final = 240
_LIBRARIES: Final = ("rematree", "torch", "transformers", "peft", "accelerate", "bitsandbytes", "datasets")


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """One finished run. Peaks are allocated bytes, seconds are of one optimizer step.

    Attributes:
        budget_bytes: The budget.
        predicted_peak_bytes: Of the plan, without what a GPU takes beside tensors (context, unused parts of segments).
        measured_peak_bytes: Of the last step, optimizer state included.
        predicted_step_seconds: Of the plan, times the passes that are accumulated.
        measured_step_seconds: Median over the steps but the first and the last, which is slowed by its measurement.
        heldout_loss_before: Mean loss of an answer token before training; None when nothing is held out.
        heldout_loss_after: The same after training.
        question: A held-out question; "" when nothing is held out.
        generated_before: The model's answer to it before training.
        generated_after: The same after training.
        losses: Training loss of every step; None, once it was stored, for one that was no number.
        output_dir: Where the run is.
        adapter: Directory for `PeftModel.from_pretrained`.
        device: What it ran on.
        versions: Of the libraries.
        hf_checkpointing_peak_bytes: Peak of the same step with every layer checkpointed, when that was measured.
        budgeted_step_seconds: Median when timed in turns with the two below.
        hf_checkpointing_step_seconds: Median with every layer checkpointed, timed in turns.
        plain_step_seconds: Median without checkpointing, timed in turns.
    """

    budget_bytes: int
    predicted_peak_bytes: int
    measured_peak_bytes: int
    predicted_step_seconds: float
    measured_step_seconds: float
    heldout_loss_before: float | None
    heldout_loss_after: float | None
    question: str
    generated_before: str
    generated_after: str
    losses: list[float | None]
    output_dir: str
    adapter: str
    device: str
    versions: dict[str, str] = field(default_factory=dict[str, str])
    hf_checkpointing_peak_bytes: int | None = None
    budgeted_step_seconds: float | None = None
    hf_checkpointing_step_seconds: float | None = None
    plain_step_seconds: float | None = None

    @property
    def ratio_to_hf(self) -> float | None:
        """Seconds of a budgeted step over those of a checkpointed one; below 1 the plan is faster."""
        if self.budgeted_step_seconds is None or not self.hf_checkpointing_step_seconds:
            return None
        return self.budgeted_step_seconds / self.hf_checkpointing_step_seconds

    def to_dict(self) -> dict[str, Any]:
        """Plain values for result.json."""
        return {**dataclasses.asdict(self), "ratio_to_hf_checkpointing": self.ratio_to_hf}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        """Read what `to_dict` gave.

        Raises:
            UsageError: it is not the result of a run.
        """
        names = {item.name for item in dataclasses.fields(cls)}
        try:
            return cls(**{name: value for name, value in data.items() if name in names})
        except TypeError as error:
            raise UsageError(f"result.json is damaged: {error}") from error

    def lines(self) -> list[str]:
        """The report for the terminal, predicted beside measured."""
        peak_error = self.predicted_peak_bytes / self.measured_peak_bytes - 1 if self.measured_peak_bytes else 0.0
        lines = [
            f"peak       predicted {format_bytes(self.predicted_peak_bytes)}, measured "
            f"{format_bytes(self.measured_peak_bytes)} ({peak_error:+.1%}), budget {format_bytes(self.budget_bytes)}",
            f"step       predicted {format_seconds(self.predicted_step_seconds)}, measured "
            f"{format_seconds(self.measured_step_seconds)}",
        ]
        if self.hf_checkpointing_peak_bytes is not None:
            lines.append(
                f"           peak with every layer checkpointed {format_bytes(self.hf_checkpointing_peak_bytes)}"
            )
        if self.budgeted_step_seconds is not None:
            lines.append(
                f"           in turns: budgeted {format_seconds(self.budgeted_step_seconds)}, every layer checkpointed "
                f"{_seconds(self.hf_checkpointing_step_seconds)}, plain {_seconds(self.plain_step_seconds)}"
            )
        if self.ratio_to_hf is not None:
            lines.append(f"           budgeted / every layer checkpointed: {self.ratio_to_hf:.2f}")
        if self.heldout_loss_before is not None and self.heldout_loss_after is not None:
            lines.append(f"held out   loss {self.heldout_loss_before:.4f} before, {self.heldout_loss_after:.4f} after")
        if self.question:
            lines += [
                f"question   {_one_line(self.question)}",
                f"  before   {_one_line(self.generated_before)}",
                f"  after    {_one_line(self.generated_after)}",
            ]
        lines.append(f"adapter    {self.adapter}")
        return lines


def library_versions() -> dict[str, str]:
    """Versions of what a run depends on, and of Python."""
    versions = {"python": platform.python_version()}
    for name in _LIBRARIES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue  # Run from a source tree.
    return versions


def device_name(device: torch.device) -> str:
    """The device for the report."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"


def _seconds(value: float | None) -> str:
    return "does not fit" if value is None else format_seconds(value)


def _one_line(text: str) -> str:
    # A model may answer with control characters, which a terminal would obey.
    flat = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return flat if len(flat) <= _MAX_SHOWN else flat[:_MAX_SHOWN] + "..."
