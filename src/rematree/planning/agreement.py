"""One plan for all ranks.

Ranks that recompute different regions still compute the same gradients, but a group gathers weights that FSDP2 shards:
ranks under different plans would wait for each other for ever. Prices are measured, so plans made apart may differ; and
each rank sees other data, so the longest batch may be another. Hence all ranks plan, say so, and take one plan: that of
the lowest rank whose batch holds the batches of all.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from rematree.errors import PlanMismatchError, RematreeError
from rematree.plans import Fingerprint, Plan


def agreed_plan(make: Callable[[], Plan], group: Any = None) -> Plan:
    """The plan that all ranks of `group` take; what `make` returns where there is one process.

    Every rank must call it. An error on one rank is raised on all, so that none waits for one that has stopped.

    Args:
        make: Plans on this rank.
        group: Of processes; default: all.
    Raises:
        PlanMismatchError: the ranks hold different models, or none of their batches is as large as all others.
        RematreeError: planning failed on some rank, for example because the budget is infeasible: that rank's error;
            where it was none of this library's, that rank raises it as it is.
    Cost:
        One gather of the plans, kilobytes each.
    """
    distributed = torch.distributed
    if not distributed.is_available() or not distributed.is_initialized() or distributed.get_world_size(group) == 1:
        return make()
    made: Plan | None = None
    error: RematreeError | None = None
    own: Exception | None = None
    try:
        made = make()
    except RematreeError as raised:
        error = raised
    except Exception as raised:  # noqa: BLE001  out of memory, say: the others wait for this rank all the same
        own, error = raised, RematreeError(f"planning failed: {type(raised).__name__}: {raised}")
    said: list[Any] = [None] * distributed.get_world_size(group)
    distributed.all_gather_object(said, (error, None if made is None else made.to_json()), group=group)
    if own is not None:
        raise own
    for rank, (failure, _) in enumerate(said):
        if failure is not None:
            failure.add_note(f"on rank {rank} of {len(said)}")
            raise failure
    return chosen_plan([Plan.from_json(text) for _, text in said])


def chosen_plan(plans: list[Plan]) -> Plan:
    """The one of `plans`, by rank, that all take.

    Raises:
        PlanMismatchError: names what differs between which ranks.
    """
    first = _without_batch(plans[0].fingerprint)
    for rank, plan in enumerate(plans):
        differences = first.differences(_without_batch(plan.fingerprint))
        if differences:
            lines = [line.replace("planned for", "rank 0 has").replace("here", f"rank {rank}") for line in differences]
            raise PlanMismatchError("the ranks hold different models: one plan cannot hold for all", details=lines)
    batches = [plan.fingerprint for plan in plans]
    for plan in plans:
        if all(_holds(plan.fingerprint, other) for other in batches):
            return plan
    raise PlanMismatchError(
        "no rank's longest batch is as large as those of all others",
        details=[f"rank {rank}: {_shown(batch)}" for rank, batch in enumerate(batches)],
        remedies=["plan on every rank for one batch that is as long and has as many rows as any, padded if one is"],
    )


def _without_batch(fingerprint: Fingerprint) -> Fingerprint:
    return replace(fingerprint, batch=(), left_out=(), hooked=())


def _holds(large_for: Fingerprint, small_for: Fingerprint) -> bool:
    """Whether a plan for one covers the other: the same tensors, none larger in any dimension, none left out alone.

    What is left out is a mask of ones; where another rank's batch is padded, its mask counts.
    """
    large, small = large_for.batch, small_for.batch
    if not set(large_for.left_out) <= set(small_for.left_out):
        return False
    if [(name, len(shape), dtype) for name, shape, dtype in large] != [(n, len(s), d) for n, s, d in small]:
        return False
    return all(
        here <= there
        for (_, there_shape, _), (_, here_shape, _) in zip(large, small, strict=True)
        for here, there in zip(here_shape, there_shape, strict=True)
    )


def _shown(made_for: Fingerprint) -> str:
    return ", ".join(
        f"{name} {'x'.join(map(str, shape))}{' of ones' if name in made_for.left_out else ''}"
        for name, shape, _ in made_for.batch
    )
