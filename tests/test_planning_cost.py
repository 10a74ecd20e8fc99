"""What planning costs, counted: how many blocks are simulated, and what is not done twice."""

from pathlib import Path

import pytest
import torch
from torch import nn

import rematree.referee.simulate
from models import batch_for, build, quantised, with_lora
from rematree.memory.ledger import Ledger
from rematree.observation.absent import is_absent
from rematree.observation.observe import Twin
from rematree.planning.planner import Planner
from rematree.plans import Action, Decision, Levers
from rematree.pricing.price import Cost
from rematree.pricing.roofline import Roofline
from rematree.referee.simulate import Referee
from rematree.referee.simulation import Simulation
from rematree.regions import find_chain
from rematree.units import MIB

COST = Roofline(5e10, 1e10)
LAYERS = 24
# Blocks that were simulated, all runs together, when this was written. To raise a number is to make planning slower.
MOST_TO_SURVEY = 66
MOST_TO_SEARCH = 10


def _llama() -> nn.Module:
    return with_lora(build("llama", layers=LAYERS), lora_dropout=0.05)


@pytest.fixture
def simulated(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Number of blocks of every simulated step, as they are run."""
    found: list[int] = []
    inner = Referee._run

    def run(referee: Referee, levers: Levers, chain: rematree.referee.simulate.Fold) -> Simulation:
        found.append(len(chain.kept))
        return inner(referee, levers, chain)

    monkeypatch.setattr(Referee, "_run", run)
    return found


def test_blocks_that_are_simulated(simulated: list[int]) -> None:
    torch.manual_seed(0)
    model = _llama()
    planner = Planner(model, batch_for(model), cost=COST)
    survey = sum(simulated)
    assert survey <= MOST_TO_SURVEY
    plain, _ = planner.plain_step()
    every, _ = planner.every_layer_step()
    simulated.clear()
    planner.plan((plain + every) // 2)
    assert sum(simulated) <= MOST_TO_SEARCH
    # A budget that everything fits needs one look, and nobody asks for the smallest peak.
    simulated.clear()
    planner.plan(plain + 64 * MIB)
    assert len(simulated) == 1
    assert "_least_limit" not in vars(planner._search)


@pytest.mark.parametrize("packed", [False, True], ids=["lora", "nf4"])
@pytest.mark.parametrize("device", [torch.device("cpu"), torch.device("cuda", 0)], ids=str)
def test_an_op_that_is_remembered_counts_as_one_that_is_not(
    packed: bool, device: torch.device, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    if device.type == "cuda" and not is_absent(device):
        pytest.skip("a device that is here")
    torch.manual_seed(0)
    plain = build("llama", layers=3)
    model = with_lora(quantised(plain, "nf4", tmp_path) if packed else plain, lora_dropout=0.05)
    twin = Twin(model, batch_for(model), device=device, capability=(9, 0) if device.type == "cuda" else None)
    blocks = find_chain(twin.model).blocks
    levers = Levers({blocks[1]: Decision(Action.RECOMPUTE), blocks[2]: Decision(Action.RECOMPUTE)})

    def without(cost: Cost, device_type: str, _: object) -> Ledger:
        return Ledger(cost, device_type)

    remembered = [Referee(twin, blocks, COST, folds=False).run(levers) for _ in range(2)]
    monkeypatch.setattr(rematree.referee.simulate, "Ledger", without)
    assert remembered == [Referee(twin, blocks, COST, folds=False).run(levers)] * 2
