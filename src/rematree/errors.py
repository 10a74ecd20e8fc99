"""The exception tree.

Every error of the library is a `RematreeError` and prints the same way: what was asked and what is possible, in the
same unit, then the breakdown and the commands that would work, if there are any. `exit_code` is what the command line
returns for it.
"""

import copy
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar, Self


class RematreeError(Exception):
    """Base of all errors raised on purpose.

    Args:
        message: One line: what was asked and what is possible.
        details: Further lines (a breakdown, a list of differences).
        remedies: Up to three commands or changes that would work.
    """

    exit_code: ClassVar[int] = 1

    def __init__(self, message: str, *, details: Sequence[str] = (), remedies: Sequence[str] = ()) -> None:
        self.message = message
        self.details = tuple(details)
        self.remedies = tuple(remedies[:3])
        super().__init__(self.render())

    def with_remedies(self, remedies: Iterable[str]) -> Self:
        """The same error with other remedies: a caller knows better how its user would ask again."""
        changed = copy.copy(self)
        changed.remedies = tuple(remedies)[:3]
        changed.args = (changed.render(),)
        return changed

    def __reduce__(self) -> tuple[Any, ...]:
        # The default calls the class with the rendered text, which loses details and keyword-only arguments.
        return _rebuild, (type(self), self.args, self.__dict__.copy())

    def render(self) -> str:
        """The whole text: message, indented details, then the remedies as commands."""
        lines = [self.message]
        lines += [f"  {line}" for line in self.details]
        if self.remedies:
            lines.append("What would work:")
            lines += [f"  {line}" for line in self.remedies]
        return "\n".join(lines)


def _rebuild(kind: type[RematreeError], arguments: tuple[Any, ...], attributes: dict[str, Any]) -> RematreeError:
    error = kind.__new__(kind, *arguments)
    error.__dict__.update(attributes)
    return error


class UsageError(RematreeError, ValueError):
    """An argument, a file or a flag is not what it must be."""

    exit_code = 2


class UnsupportedModelError(RematreeError):
    """The model does something the library cannot observe or execute safely."""

    exit_code = 2


class PlanMismatchError(RematreeError, ValueError):
    """A plan was applied to something other than what it was made for."""

    exit_code = 2


class InfeasibleBudgetError(RematreeError):
    """The budget is below the smallest reachable peak.

    Attributes:
        budget: Bytes asked for.
        min_peak: Smallest peak in bytes that any plan of this model and batch reaches.
    """

    exit_code = 3

    def __init__(
        self,
        message: str,
        *,
        budget: int,
        min_peak: int,
        details: Sequence[str] = (),
        remedies: Sequence[str] = (),
    ) -> None:
        self.budget = budget
        self.min_peak = min_peak
        super().__init__(message, details=details, remedies=remedies)


class OutOfMemoryError(RematreeError):
    """A step ran out of memory, and no tighter plan is left."""

    exit_code = 3


class RecomputeMismatchError(RematreeError):
    """The recomputation would not repeat the forward pass, so its gradients would be wrong."""

    exit_code = 4


class VerificationError(RematreeError):
    """Gradients, loss or peak under the plan are not what the plan promises."""

    exit_code = 4
