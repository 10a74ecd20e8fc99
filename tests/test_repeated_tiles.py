"""Tiles of the chunked loss that a simulated step tells by repetition: the step is that in which all of them run."""

from collections.abc import Callable, Hashable
from typing import Any

import pytest
import torch
from torch import nn

from models import batch_for, build, with_lora
from rematree.memory.ledger import Ledger
from rematree.observation.observe import Twin
from rematree.plans import Levers
from rematree.pricing.cost import Free, Roofline
from rematree.pricing.devices import find_device
from rematree.referee.simulate import Referee
from rematree.referee.simulation import Simulation
from rematree.regions import find_chain

TILE_ROWS = 2
CUDA = torch.device("cuda", 0)


def simulated(model: nn.Module, rows: int, device: torch.device | None) -> tuple[Simulation, int]:
    """One step with the loss in chunks of `rows`, and how many ops were seen in it."""
    cost = find_device("rtx-4090").roofline() if device is not None else Roofline(5e10, 1e10)
    twin = Twin(model, batch_for(model), device=device, capability=None if device is None else (8, 9))
    referee = Referee(twin, find_chain(twin.model).blocks, cost)
    seen = 0
    record = Ledger._record

    def counted(ledger: Ledger, func: Any, args: Any, kwargs: Any) -> Any:
        nonlocal seen
        seen += 1
        return record(ledger, func, args, kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Ledger, "_record", counted)
        vocabulary = model.get_output_embeddings().out_features  # pyright: ignore
        patch.setattr("rematree.execute.loss.row_loss._TILE_BYTES", {})
        patch.setattr("rematree.execute.loss.row_loss._TILE_BYTES_ELSEWHERE", 4 * vocabulary * TILE_ROWS)
        return referee.run(Levers(loss_chunk_rows=rows)), seen


def run_every_time(
    ledger: Ledger, known: dict[Hashable, Any], layouts: Hashable, run: Callable[[], torch.Tensor]
) -> torch.Tensor:
    """`Ledger.again` that believes nothing."""
    return run()


@pytest.mark.parametrize("device", [None, CUDA], ids=["cpu", "absent gpu"])
@pytest.mark.parametrize(("family", "full"), [("llama", False), ("llama", True), ("gemma3", False)])
def test_the_step_is_the_same_as_with_every_tile_run(family: str, full: bool, device: torch.device | None) -> None:
    model = build(family).train() if full else with_lora(build(family))
    rows = 7  # the last tile of a chunk is smaller, and so is the last chunk
    told, fewer = simulated(model, rows, device)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Ledger, "again", run_every_time)
        run, all_of_them = simulated(model, rows, device)
    assert told == run  # every segment's bytes by line, its seconds, the allocator's slack
    assert fewer < all_of_them


def test_a_round_that_leaves_more_than_its_result_always_runs() -> None:
    twin = Twin(build("llama"), batch_for(build("llama")))
    ledger, runs = Ledger(Free(), "cpu", twin.mode.recipes), 0
    beside: list[torch.Tensor] = []
    known: dict[Hashable, Any] = {}

    def leaves_two() -> torch.Tensor:
        nonlocal runs
        runs += 1
        beside.append(torch.empty(3))
        return torch.empty(5) * 2

    with twin.mode, ledger:
        results = [ledger.again(known, "two", leaves_two) for _ in range(4)]
    assert runs == 4
    assert ledger.live_bytes == 4 * 4 * (3 + 5)
    del results
    assert ledger.live_bytes == 4 * 4 * 3


def test_what_is_told_again_is_gone_with_its_tensor() -> None:
    twin = Twin(build("llama"), batch_for(build("llama")))
    ledger, runs = Ledger(Free(), "cpu", twin.mode.recipes), 0
    known: dict[Hashable, Any] = {}

    def leaves_one() -> torch.Tensor:
        nonlocal runs
        runs += 1
        return torch.empty(5) * 2

    with twin.mode, ledger:
        results = [ledger.again(known, "one", leaves_one) for _ in range(4)]
    assert runs == 2
    assert [(r.shape, r.dtype, r.device) for r in results] == [((5,), torch.float32, results[0].device)] * 4
    assert (ledger.live_bytes, ledger.peak_bytes) == (4 * 5 * 4, 5 * 5 * 4)
    del results
    assert ledger.live_bytes == 0
