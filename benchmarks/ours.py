"""Our points of the frontier benchmark: plans spread over the frontier, and plans within what a peer was found to need.

Two series: without compilation, and with it where the planner has it. The same planner predicts the peers whose step is
made of nothing but recomputed blocks.
"""

from collections.abc import Collection, Generator, Iterable, Mapping
from contextlib import contextmanager

from allocated import allocated_bytes, every_layer, recomputed
from dominance import GONE
from interleave import Point
from peers import Way
from workloads import Built, Loss, plain_loss

import rematree
from rematree.planning.planner import Planner
from rematree.planning.settings import LEVERS
from rematree.plans import Plan
from rematree.referee.simulation import Simulation
from rematree.units import MIB

_ALIKE = 0.03


def make_planner(built: Built, forbid: Collection[str]) -> Planner:
    """A planner for the workload's step, which has no optimizer. Levers this version does not know are left out."""
    known = sorted(set(forbid) & LEVERS)
    return Planner(built.model, built.batch, optimizer="none", forbid=known, allow_compile="compile" not in known)


@contextmanager
def applied(built: Built, plan: Plan) -> Generator[Loss]:
    with rematree.apply(plan, built.model):
        yield plain_loss


def predictions(planner: Planner) -> dict[str, tuple[int, float]]:
    """(allocated bytes, seconds) of the ways by hand and by flag that the referee can run."""
    blocks = list(planner.survey.chain.blocks)
    simulated = {
        "plain": planner.survey.plain,
        "HF flag": every_layer(planner),
        "HF every 2": recomputed(planner, blocks[::2], hooked=True),
        "torch_remat": recomputed(planner, blocks),
    }
    return {name: (_allocated(planner, result), result.seconds) for name, result in simulated.items()}


def _allocated(planner: Planner, simulation: Simulation) -> int:
    """Without what cuBLAS keeps, which is there before any way is measured."""
    return allocated_bytes(planner, simulation, libraries=False)


def describe(plan: Plan) -> str:
    """What a plan does, in one line."""
    parts = []
    if plan.loss_chunk_rows is not None:
        parts.append(f"loss in chunks of {plan.loss_chunk_rows} rows")
    kinds: dict[str, int] = {}
    for row in plan.rows:
        kinds[row.option] = kinds.get(row.option, 0) + 1
    parts += [f"{count} x {option}" for option, count in kinds.items()]
    for name, found in (("lean layers", plan.lean), ("compiled blocks", plan.compiled), ("groups", plan.groups)):
        if found:
            parts.append(f"{len(found)} {name}")
    return "; ".join(parts)


def _way(built: Built, planner: Planner, plan: Plan, series: str, what: str) -> Way:
    name = f"{series}, {what}"
    kept = planner.observed.overhead.library_bytes
    predicted = (plan.predicted_allocated_bytes - kept, plan.predicted_step_seconds)
    return Way(name, series, describe(plan), lambda: applied(built, plan), bool(plan.compiled), predicted)


def peer_budgets(points: Iterable[Point], static: int, share: float, *, compiled: bool) -> dict[str, int]:
    """Budgets in bytes at which a plan and a peer are compared directly, by name.

    The peaks of HF's flag and of what is done by hand, and `share` of the flag's; without compilation also what is left
    of the plain step's peak where `GONE` of it is gone. Of peaks that are alike the first is taken.

    Args:
        points: What was measured of the plain step and the peers, HF's flag among them.
        static: Bytes of weights and batch.
        share: Of the flag's bytes above weights and batch.
        compiled: Whether by hand means with compiled blocks.
    """
    found: dict[str, int] = {}
    for point in points:
        if point.above_bytes is None or point.peak_bytes is None:
            continue
        if point.name == "plain" and not compiled:
            found[f"{1 - GONE:g} of plain's peak"] = static + int((1 - GONE) * point.above_bytes)
        if point.name == "HF flag":
            found[f"{share:g} of HF flag's peak"] = static + int(share * point.above_bytes)
            found["HF flag's peak"] = point.peak_bytes
            continue
        by_hand = point.name.startswith("by hand") and ("compiled" in point.name) == compiled
        if by_hand and all(abs(point.peak_bytes - other) > _ALIKE * point.above_bytes for other in found.values()):
            found[f"as {point.name}"] = point.peak_bytes
    return found


def our_ways(built: Built, planner: Planner, points: int, beside: Mapping[str, int], *, compiled: bool) -> list[Way]:
    """Plans over the whole frontier of `planner`, fewest bytes first, and the fastest ones within other budgets.

    Args:
        built: The workload.
        planner: Made for it.
        points: How many budgets, from the smallest peak to the fastest step's.
        beside: Other budgets by name, in bytes, weights included; those that nothing fits are left out.
        compiled: These are the series with compiled blocks; without any such plan there is no series.
    """
    series = "ours compiled" if compiled else "ours"
    low, high = planner.min_peak_bytes(), planner.plan(None).predicted_peak_bytes
    # Closer together near the smallest peak, where the frontier is steep and peers are many.
    shares = [(index / max(1, points - 1)) ** 2 for index in range(points)]
    budgets = {f"budget {budget / MIB:.1f} MiB": budget for budget in (int(low + s * (high - low)) for s in shares)}
    # Is in a budget, not in what is measured; of unused parts of segments our plans get none in addition.
    overhead = planner.observed.overhead
    more = overhead.library_bytes + overhead.context_bytes
    budgets |= {f"budget {name}": budget + more for name, budget in beside.items() if budget + more >= low}
    kept: dict[tuple[object, ...], tuple[str, Plan]] = {}
    for what, plan in zip(budgets, planner.plans([*budgets.values()]), strict=True):
        if compiled and not plan.compiled:
            continue  # the series without compilation has it
        levers = plan.levers
        key = (str(levers.decisions), levers.loss_chunk_rows, levers.lean, str(levers.compiled), levers.groups)
        kept.setdefault(key, (what, plan))
    return [_way(built, planner, plan, series, what) for what, plan in kept.values()]
