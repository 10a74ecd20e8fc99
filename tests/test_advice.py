"""Is recomputation needed at all? The four answers, and that their numbers are the referee's."""

from pathlib import Path

import pytest
import torch

from command_line import rematree
from models import batch_for, build, with_lora
from rematree.advice import advise
from rematree.errors import InfeasibleBudgetError
from rematree.finetune.compare import hf_checkpointing
from rematree.measure import PeakMeter
from rematree.planning.planner import Planner
from rematree.pricing.cost import Roofline
from rematree.verification import PEAK_SLACK
from test_finetune_tiny import save_tiny_model
from trainers import QUICK


@pytest.fixture(scope="module")
def planner() -> Planner:
    model = with_lora(build("llama", layers=2), target_modules=["q_proj", "down_proj"])
    return Planner(model, batch_for(model, rows=8, tokens=64), cost=Roofline(1e11, 1e10))


def test_the_four_answers(planner: Planner) -> None:
    plain = planner.plain_step()[0]
    least = planner.min_peak_bytes()
    chunked_step = planner.chunked_step(0)
    assert chunked_step is not None
    assert chunked_step[0] < plain
    assert advise(planner, plain).verdict == "nothing needed"
    chunked = advise(planner, chunked_step[0])
    assert chunked.verdict == "chunked loss is enough"
    assert [way.name for way in chunked.ways] == ["plain", "loss in chunks", "every layer checkpointed", "plan"]
    assert [way.fits for way in chunked.ways][:2] == [False, True]
    assert advise(planner, chunked_step[0] - 1).verdict == "recomputation needed"
    tight = advise(planner, least)
    assert tight.verdict == "recomputation needed"
    assert tight.plan.recomputes
    assert tight.ways[-1].peak_bytes == tight.plan.predicted_peak_bytes <= least
    assert "Recomputation is needed: the plain step would take" in tight.lines()[0]
    assert "longer than it" in tight.lines()[1]
    with pytest.raises(InfeasibleBudgetError) as caught:
        advise(planner, least // 2)
    assert caught.value.min_peak == least


@pytest.mark.parametrize("family", ["llama", "gpt2"])  # GPT-2 keeps a dropout mask and a sum behind its embedding
def test_every_layer_is_what_transformers_does(family: str) -> None:
    """transformers makes the embedding's output require grad, and it holds a gradient while the step lasts."""
    model = with_lora(build(family, layers=2))
    batch = batch_for(model, rows=8, tokens=64)
    predicted = Planner(model, batch, cost=Roofline(1e11, 1e10), forbid=QUICK).every_layer_step()[0] - PEAK_SLACK
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], fused=True)
    measured = 0
    with hf_checkpointing(model):
        for _ in range(2):  # in the first one the optimizer makes its state
            with PeakMeter(model, optimizer, batch) as meter:
                model(**batch).loss.backward()
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            measured = meter.peak_bytes
    assert abs(predicted - measured) < 1024  # sums of a few numbers


@pytest.mark.usefixtures("stated_prices")
def test_command(tmp_path: Path) -> None:
    words = ["advise", "--model", save_tiny_model(tmp_path / "model"), "--lora-target-modules", "down_proj"]
    words += ["--max-length", "64", "--batch-size", "2", "--dtype", "float32"]
    outcome = rematree(*words)
    assert outcome.code == 0, outcome.err
    assert "what is free here now" in outcome.err
    assert outcome.out.startswith("No recomputation is needed: the plain step takes")
    facts = rematree(*words, "--budget", "100MiB", "--json").data
    assert facts["verdict"] == "nothing needed"
    assert facts["budget_bytes"] == 100 << 20
    assert rematree(*words, "--budget", "300KiB").code == 3
