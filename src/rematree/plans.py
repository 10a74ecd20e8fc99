"""Decision and Plan: the frozen result of planning, and what it was made for.

A plan is plain data. It names regions by module path, says for each what is saved and what is recomputed, and carries
the prediction (peak, ledger, seconds) and a fingerprint of the model and the batch it holds for. Left of it everything
is pure; right of it a live model is touched.
"""

import dataclasses
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Final, Self

from rematree.errors import PlanMismatchError, UsageError
from rematree.table import FoldedRow, common_prefix, fold_rows, render_table
from rematree.typed_json import read_typed
from rematree.units import format_bytes, format_seconds

PLAN_FORMAT: Final = 4
TABLE_HEADERS: Final = ("region", "decision", "saved", "added time")
TABLE_RIGHT: Final = frozenset({2, 3})
ALLOCATOR_SLACK: Final = "allocator slack"
CUDA_CONTEXT: Final = "CUDA context"
WHOLE_MODEL: Final = "(whole model)"
_WRAP: Final = 56


class Action(StrEnum):
    """What happens to the saved tensors of a region."""

    SAVE = "save"
    RECOMPUTE = "recompute"


@dataclass(frozen=True, slots=True)
class Decision:
    """One region's action.

    Attributes:
        action: Save or Recompute.
        stash: Only for Save inside Recompute: keep the region's output, because the recomputation around it reads the
            values. Without it a placeholder of the same shape stands in (design rule R3).
    """

    action: Action
    stash: bool = False


@dataclass(frozen=True, slots=True)
class Levers:
    """Everything a plan does to a step; the fields are those of `Plan` and explained there."""

    decisions: Mapping[str, Decision] = field(default_factory=dict[str, Decision])
    loss_chunk_rows: int | None = None
    lean: tuple[str, ...] = ()
    compiled: Mapping[str, float] = field(default_factory=dict[str, float])
    groups: tuple[tuple[str, ...], ...] = ()

    def compiles(self, path: str) -> bool:
        """Whether `path` is inside a compiled block."""
        return path.startswith(tuple(f"{block}{mark}" for block in self.compiled for mark in ".#"))

    def without(self, blocks: Collection[str]) -> Self:
        """What is left when `blocks` (module paths) are not there."""
        inside = tuple(f"{block}{mark}" for block in blocks for mark in ".#")

        def stays(path: str) -> bool:
            return path not in blocks and not path.startswith(inside)

        return dataclasses.replace(
            self,
            decisions={path: decision for path, decision in self.decisions.items() if stays(path)},
            lean=tuple(path for path in self.lean if stays(path)),
            compiled={path: share for path, share in self.compiled.items() if stays(path)},
            groups=tuple(tuple(path for path in group if stays(path)) for group in self.groups),
        )


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """What a plan was made for. Two equal fingerprints mean the same saved tensors, byte for byte.

    Attributes:
        model_class: Class name of the innermost model.
        parameters: Digest over every parameter and buffer: name, shape, dtype.
        trainable: Digest over the names of the trainable parameters.
        dropout: Digest over the probabilities of all dropout modules.
        batch: (name, shape, dtype) of every tensor of the batch.
        left_out: Names of the tensors of the batch whose values change nothing, a mask of ones: they need no memory.
        device: Device type of the parameters.
        attention: Attention implementation the model is configured with.
        hooked: Paths of the modules with forward hooks of the user's, for which outputs of saved regions are kept.
    """

    model_class: str
    parameters: str
    trainable: str
    dropout: str
    batch: tuple[tuple[str, tuple[int, ...], str], ...]
    device: str
    attention: str
    left_out: tuple[str, ...] = ()
    hooked: tuple[str, ...] = ()

    def differences(self, other: "Fingerprint") -> list[str]:
        """One line for every field in which `other` (what is here) differs from this plan."""
        lines: list[str] = []
        for item in dataclasses.fields(self):
            mine, theirs = getattr(self, item.name), getattr(other, item.name)
            if mine != theirs:
                lines.append(f"{item.name}: planned for {mine}, here {theirs}")
        return lines


@dataclass(frozen=True, slots=True)
class LedgerLine:
    """One category of the bytes that are live at the predicted peak.

    Attributes:
        category: What it is.
        num_bytes: Its size.
        obtained: How: "counted" (there before the step), "simulated" (the executor on fake tensors), "measured" (on the
            device, op by op), or "estimated: ..." with what the estimate is.
    """

    category: str
    num_bytes: int
    obtained: str

    def text(self) -> str:
        """As a line of an error's breakdown."""
        return f"{self.category:<28} {format_bytes(self.num_bytes):>10}"


@dataclass(frozen=True, slots=True)
class BlockRow:
    """Prediction for one block of the chain, for the table.

    Attributes:
        path: Module path of the block.
        option: Short description of the decisions inside the block.
        saved_bytes: Bytes this block's forward leaves behind until its backward.
        extra_seconds: Recomputation time this block adds to the step.
    """

    path: str
    option: str
    saved_bytes: int
    extra_seconds: float


@dataclass(frozen=True)
class Plan:
    """Frozen decisions for a model and a batch shape, with the prediction they were chosen for.

    Attributes:
        decisions: Region path -> decision. A region that is not named inherits from its parent; the root saves.
        loss_chunk_rows: Rows (tokens) of logits formed at a time, or None for the model's own loss. Changes rounding.
        budget_bytes: The budget the plan was made for, or None when it is a point of the frontier.
        predicted_peak_bytes: Peak bytes of one training step, optimizer state included; on a GPU also what its
            allocator and context take.
        predicted_step_seconds: Forward + backward + optimizer on the device that was priced.
        ledger: Where the bytes are at the peak; the sum is `predicted_peak_bytes`.
        rows: One line a block.
        fingerprint: What the plan was made for.
        lean: Paths of the adapter layers that keep one input and the bits of their dropout masks, of the norms
            beside them that keep their input in its own dtype, and of attention cores ("...#attention") that form the
            scores of a slice of queries at a time; these change rounding.
        compiled: Path of a block -> share of its saved bytes, 0 to 1, that its compiler may keep. Changes rounding.
        groups: Runs of consecutive blocks, each recomputed as one from the input of its first; a group may hold
            smaller ones.
        bound_seconds: No plan of these options within the budget has a shorter predicted step; None if not computed.
        notes: What the planner wants said (coarser regions, levers that were forbidden or not available).
        versions: Library versions the plan was made with; for the reader, not compared.
        run: Settings that were asked for, as text by name; for the reader and for `rematree export`, not compared.
    """

    decisions: Mapping[str, Decision]
    loss_chunk_rows: int | None
    budget_bytes: int | None
    predicted_peak_bytes: int
    predicted_step_seconds: float
    ledger: tuple[LedgerLine, ...]
    rows: tuple[BlockRow, ...]
    fingerprint: Fingerprint
    lean: tuple[str, ...] = ()
    compiled: Mapping[str, float] = field(default_factory=dict[str, float])
    groups: tuple[tuple[str, ...], ...] = ()
    bound_seconds: float | None = None
    notes: tuple[str, ...] = ()
    versions: Mapping[str, str] = field(default_factory=dict[str, str])
    run: Mapping[str, str] = field(default_factory=dict[str, str])

    @classmethod
    def of(cls, levers: Levers, fingerprint: Fingerprint) -> Self:
        """A plan that does what `levers` say, without a prediction."""
        return cls(
            levers.decisions,
            levers.loss_chunk_rows,
            lean=levers.lean,
            compiled=levers.compiled,
            groups=levers.groups,
            budget_bytes=None,
            predicted_peak_bytes=0,
            predicted_step_seconds=0.0,
            ledger=(),
            rows=(),
            fingerprint=fingerprint,
        )

    @property
    def exact(self) -> bool:
        """True when every lever in use gives the plain model's gradients bit for bit."""
        return self.loss_chunk_rows is None and not self.compiled and not self.sliced

    @property
    def sliced(self) -> tuple[str, ...]:
        """Of `lean`, the attention cores: functions, which "#" sets apart from modules."""
        return tuple(path for path in self.lean if "#" in path)

    @property
    def levers(self) -> Levers:
        """What the plan does, without what is predicted of it."""
        return Levers(self.decisions, self.loss_chunk_rows, self.lean, self.compiled, self.groups)

    @property
    def headroom_bytes(self) -> int | None:
        """Budget minus predicted peak; None without a budget."""
        return None if self.budget_bytes is None else self.budget_bytes - self.predicted_peak_bytes

    @property
    def predicted_allocated_bytes(self) -> int:
        """Of the predicted peak, what torch's allocator hands out: what its own counters measure."""
        outside = (line.num_bytes for line in self.ledger if line.category in {ALLOCATOR_SLACK, CUDA_CONTEXT})
        return self.predicted_peak_bytes - sum(outside)

    @property
    def recomputes(self) -> bool:
        """True when any region is recomputed."""
        return bool(self.groups) or any(item.action is Action.RECOMPUTE for item in self.decisions.values())

    @property
    def gap_seconds(self) -> float | None:
        """How much longer the predicted step is than the certified lower bound; None without one."""
        return None if self.bound_seconds is None else max(0.0, self.predicted_step_seconds - self.bound_seconds)

    @property
    def extra_seconds(self) -> float:
        """Recomputation time in the step."""
        return sum(row.extra_seconds for row in self.rows)

    @property
    def region_prefix(self) -> str:
        """Enclosing path of all blocks, left out in tables."""
        return common_prefix([row.path for row in self.rows])

    def folded_rows(self) -> list[FoldedRow]:
        """The rows with blocks of the same decision as one."""
        return fold_rows(self.rows, self.region_prefix)

    def title(self) -> str:
        """What the plan was made for, in a line."""
        batch = ", ".join(f"{name} {'x'.join(map(str, shape))}" for name, shape, _ in self.fingerprint.batch)
        return f"plan for {self.fingerprint.model_class} on {self.fingerprint.device}: {batch or 'no batch'}"

    def summary(self) -> str:
        """Peak, budget and time, in a line."""
        text = f"predicted peak {format_bytes(self.predicted_peak_bytes)}"
        if self.budget_bytes is not None and self.headroom_bytes is not None:
            text += f" of {format_bytes(self.budget_bytes)} (headroom {format_bytes(self.headroom_bytes)})"
        return (
            f"{text}, step {format_seconds(self.predicted_step_seconds)}, "
            f"of it {format_seconds(self.extra_seconds)} recomputation"
        )

    def cells(self) -> list[tuple[str, str, str, str]]:
        """The folded table as text: region, decision, saved, added time."""
        lines = [
            (
                row.regions or WHOLE_MODEL,
                row.option,
                ("" if row.count == 1 else f"{row.count} x ") + format_bytes(row.saved_bytes),
                format_seconds(row.extra_seconds),
            )
            for row in self.folded_rows()
        ]
        if self.loss_chunk_rows is not None:
            lines.append(("head", f"chunked loss, {self.loss_chunk_rows} rows at a time", "", ""))
        saved = sum(row.saved_bytes for row in self.rows)
        return [*lines, ("sum", "", format_bytes(saved), format_seconds(self.extra_seconds))]

    def __str__(self) -> str:
        lines = [self.title()]
        if self.region_prefix:
            lines.append(f"regions inside {self.region_prefix}")
        lines += ["", render_table(TABLE_HEADERS, self.cells(), right=TABLE_RIGHT, wrap=_WRAP), "", self.summary()]
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])

    def check(self, here: Fingerprint) -> None:
        """Refuse to run on anything but what the plan was made for.

        Raises:
            PlanMismatchError: names every field that differs.
        """
        differences = self.fingerprint.differences(here)
        if differences:
            raise PlanMismatchError(
                "the plan was made for another model, batch shape or trainable set",
                details=differences,
                remedies=["plan again: rematree.plan(model, batch, budget=...)"],
            )

    def to_json(self) -> str:
        """The plan as indented JSON; `Plan.from_json` gives an equal plan back."""
        data = dataclasses.asdict(self)
        data["decisions"] = {path: [d.action.value, d.stash] for path, d in self.decisions.items()}
        return json.dumps({"format": PLAN_FORMAT, **data}, indent=1)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Read what `to_json` wrote.

        Raises:
            UsageError: not JSON, not a plan, or a plan of another format version.
        """
        try:
            data: Any = json.loads(text)
        except json.JSONDecodeError as error:
            raise UsageError(f"not a plan: {error.msg} at line {error.lineno}") from error
        except (ValueError, RecursionError) as error:  # numbers of thousands of digits, thousands of brackets
            raise UsageError(f"not a plan: {error}") from error
        if not isinstance(data, dict) or "format" not in data:
            raise UsageError("not a plan: no format version in it")
        entries: dict[str, Any] = {**data}
        version: Any = entries.pop("format")
        if type(version) is not int or version != PLAN_FORMAT:
            raise UsageError(f"plan of another format version; this library reads version {PLAN_FORMAT}")
        try:
            pairs = read_typed(Mapping[str, tuple[Action, bool]], entries.get("decisions", {}), "decisions")
            if "decisions" in entries:
                named = {path: {"action": action, "stash": stash} for path, (action, stash) in pairs.items()}
                entries["decisions"] = named
            return read_typed(cls, entries, "")
        except ValueError as error:
            raise UsageError(f"not a plan: {error}") from error
