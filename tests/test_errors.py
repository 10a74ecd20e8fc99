"""The exception tree: one text shape, one exit code each."""

import copy
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rematree import errors
from rematree.errors import InfeasibleBudgetError, RematreeError, UsageError

EXIT_CODES = {
    "RematreeError": 1,
    "UsageError": 2,
    "UnsupportedModelError": 2,
    "PlanMismatchError": 2,
    "InfeasibleBudgetError": 3,
    "OutOfMemoryError": 3,
    "RecomputeMismatchError": 4,
    "VerificationError": 4,
}
LINES = st.lists(st.text("abc xyz"), max_size=5)


def test_every_error_has_its_exit_code() -> None:
    tree = {
        name: kind for name, kind in vars(errors).items() if isinstance(kind, type) and issubclass(kind, RematreeError)
    }
    assert {name: kind.exit_code for name, kind in tree.items()} == EXIT_CODES


@pytest.mark.parametrize("name", ["UsageError", "PlanMismatchError"])
def test_wrong_arguments_are_value_errors(name: str) -> None:
    assert issubclass(getattr(errors, name), ValueError)


def test_message_alone() -> None:
    assert str(UsageError("the file is empty")) == "the file is empty"


def test_whole_text() -> None:
    error = InfeasibleBudgetError(
        "budget 1.00 GiB is below the smallest reachable peak, 1.25 GiB",
        budget=1_073_741_824,
        min_peak=1_342_177_280,
        details=["weights   1.00 GiB", "head      0.25 GiB"],
        remedies=["--budget 1.25GiB", "--max-length 256"],
    )
    assert str(error) == (
        "budget 1.00 GiB is below the smallest reachable peak, 1.25 GiB\n"
        "  weights   1.00 GiB\n"
        "  head      0.25 GiB\n"
        "What would work:\n"
        "  --budget 1.25GiB\n"
        "  --max-length 256"
    )
    assert (error.budget, error.min_peak) == (1_073_741_824, 1_342_177_280)


@given(st.text("abc xyz", min_size=1), LINES, LINES)
def test_text_is_the_message_the_details_and_at_most_three_remedies(
    message: str, details: list[str], remedies: list[str]
) -> None:
    error = RematreeError(message, details=details, remedies=remedies)
    assert error.message == message
    assert error.details == tuple(details)
    assert error.remedies == tuple(remedies[:3])
    heading = ["What would work:"] if remedies else []
    indented = [f"  {line}" for line in details], [f"  {line}" for line in remedies[:3]]
    assert str(error).split("\n") == [message, *indented[0], *heading, *indented[1]]


def infeasible() -> InfeasibleBudgetError:
    return InfeasibleBudgetError("too small", budget=1, min_peak=2, details=["weights 2 B"], remedies=["--budget 2B"])


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("name", sorted(EXIT_CODES))
def test_an_error_crosses_processes_whole(name: str, protocol: int) -> None:
    kind = getattr(errors, name)
    error = (
        infeasible() if kind is InfeasibleBudgetError else kind("no", details=["because", "of"], remedies=["another"])
    )
    error.add_note("while planning")
    for again in (pickle.loads(pickle.dumps(error, protocol)), copy.copy(error)):
        assert type(again) is kind
        assert str(again) == str(error)
        assert again.args == error.args
        assert vars(again) == vars(error)
