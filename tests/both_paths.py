"""Both ways to recompute with this library, for tests that hold for either: the switch, and a plan."""

import contextlib
import dataclasses
from collections.abc import Callable, Collection, Generator, Mapping
from typing import Any

import pytest
import torch
from torch import nn

import rematree
from checkpointed_models import by_rematree
from models import assert_same
from rematree.errors import RematreeError
from rematree.execute.handle import Handle
from rematree.fingerprint import describe_batch, describe_model
from rematree.plans import Action, Decision, Plan
from rematree.regions import find_chain, is_checkpointing_layer

SAVE, KEEP, AGAIN = Decision(Action.SAVE), Decision(Action.SAVE, stash=True), Decision(Action.RECOMPUTE)


def plan_of(model: nn.Module, batch: Mapping[str, Any], decisions: Mapping[str, Decision]) -> Plan:
    """A plan with these decisions. Its prediction is empty: for tests of what executing it does."""
    return Plan(
        decisions=decisions,
        loss_chunk_rows=None,
        budget_bytes=None,
        predicted_peak_bytes=0,
        predicted_step_seconds=0.0,
        ledger=(),
        rows=(),
        fingerprint=dataclasses.replace(describe_model(model), batch=describe_batch(batch)),
    )


def recompute_all(model: nn.Module, batch: Mapping[str, Any]) -> Plan:
    """A plan that recomputes every block of every list of blocks."""
    towers = [path for path, module in model.named_modules() if is_checkpointing_layer(module)]
    return plan_of(model, batch, dict.fromkeys(sorted({*find_chain(model).blocks, *towers}), AGAIN))


@contextlib.contextmanager
def by_plan(
    model: nn.Module, batch: Mapping[str, Any], decisions: Mapping[str, Decision] | None = None
) -> Generator[Handle]:
    """A plan in force inside: with `decisions`, else with every block recomputed."""
    plan = recompute_all(model, batch) if decisions is None else plan_of(model, batch, decisions)
    with rematree.apply(plan, model) as handle:
        yield handle


Ours = Callable[[nn.Module, Mapping[str, Any]], contextlib.AbstractContextManager[Any]]
WAYS: dict[str, Ours] = {
    "switch": lambda model, batch: by_rematree(model),
    "reentrant switch": lambda model, batch: by_rematree(model, {"use_reentrant": True}),
    "plan": by_plan,
}
EVERY_WAY = pytest.mark.parametrize("ours", WAYS.values(), ids=WAYS.keys())
NOT_REENTRANT = pytest.mark.parametrize("ours", [WAYS["switch"], WAYS["plan"]], ids=["switch", "plan"])


def differ(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> bool:
    return one.keys() != other.keys() or any(not torch.equal(one[name], other[name]) for name in one)


def assert_same_or_refused(
    expected: dict[str, torch.Tensor], run: Callable[[], dict[str, torch.Tensor]], says: Collection[str]
) -> None:
    """`run` gives the same numbers, or an error of this library that holds every word of `says`."""
    try:
        found = run()
    except RematreeError as error:
        assert all(word in str(error) for word in says), str(error)  # noqa: PT017
    else:
        assert_same(expected, found)
