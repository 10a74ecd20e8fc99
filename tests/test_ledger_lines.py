"""The whole ledger: every line says how it was obtained, and the lines are the peak, to the byte."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from models import batch_for, build, quantised, with_lora
from rematree.measure import storage_bytes
from rematree.memory.accounts import how_workspaces_are_known, ledger_lines
from rematree.memory.optimizers import Optimizer
from rematree.observation.observe import Twin
from rematree.planning.planner import Planner
from rematree.plans import Action, Decision, LedgerLine, Levers, Plan
from rematree.pricing.cost import Measured
from rematree.pricing.devices import find_device, overhead_of
from rematree.pricing.price import Cost, Free, Overhead
from rematree.pricing.roofline import Roofline
from rematree.quantised import hidden_tensors
from rematree.referee.simulate import Referee
from rematree.referee.simulation import Simulation
from rematree.regions import find_chain
from rematree.units import KIB, MIB

COST = Roofline(5e10, 1e10)
HOWS = ("counted", "simulated", "measured", "estimated: ")


def simulate(
    model: nn.Module,
    *,
    cost: Cost = COST,
    optimizer: Optimizer = "adamw",
    recompute: bool = False,
    rows: int | None = None,
    tokens: int = 32,
    accumulate: bool = False,
) -> Simulation:
    twin = Twin(model, batch_for(model, rows=4, tokens=tokens))
    blocks = find_chain(twin.model).blocks
    decisions = {path: Decision(Action.RECOMPUTE) for path in blocks} if recompute else {}
    return Referee(twin, blocks, cost, optimizer, accumulate).run(Levers(decisions, rows))


def lines(plan: Plan) -> dict[str, LedgerLine]:
    found = {line.category: line for line in plan.ledger}
    assert len(found) == len(plan.ledger)
    return found


def assert_adds_up(plan: Plan) -> None:
    assert sum(line.num_bytes for line in plan.ledger) == plan.predicted_peak_bytes
    assert all(line.num_bytes > 0 for line in plan.ledger)
    assert all(line.obtained.startswith(HOWS) for line in plan.ledger)


@pytest.mark.parametrize("name", ["gemma3", "gpt2", "mixtral"])
@pytest.mark.parametrize("full", [False, True], ids=["lora", "full"])
def test_the_lines_of_a_step_are_its_peak(name: str, full: bool) -> None:
    model = build(name).train() if full else with_lora(build(name))
    trained = [p for p in model.parameters() if p.requires_grad]
    for step in (simulate(model), simulate(model, recompute=True, accumulate=True)):
        assert sum(step.at_peak.values()) == step.peak_bytes
        assert step.slack_bytes == 0
        held = step.at_peak
        assert held.get("base weights, fp32", 0) == storage_bytes(p for p in model.parameters() if not p.requires_grad)
        assert held["trained weights" if full else "adapters"] == storage_bytes(trained)
        assert held["optimizer state"] == 2 * storage_bytes(trained) + 4 * len(trained)
    assert held["gradients"] == storage_bytes(trained)


def test_what_the_head_holds_has_a_line() -> None:
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 2048}
    heads: dict[str, Any] = {"num_attention_heads": 2, "num_key_value_heads": 2}
    model = with_lora(transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **heads)))
    logits = 4 * 64 * 2048 * 4
    whole = simulate(model, optimizer="none", recompute=True, tokens=64)
    chunked = simulate(model, optimizer="none", recompute=True, rows=32, tokens=64)
    assert whole.at_peak["logits and loss"] >= 2 * logits  # with their gradient
    assert chunked.at_peak.get("logits and loss", 0) < logits


def test_masks_have_a_line() -> None:
    mask = 32 * 32 * 4
    # An argument of the blocks, so that recomputing them keeps it.
    assert simulate(with_lora(build("llama-eager")), recompute=True).at_peak["attention masks"] >= mask
    assert "attention masks" not in simulate(with_lora(build("llama", layers=2)), recompute=True).at_peak


def test_what_is_computed_again_has_a_line() -> None:
    model = with_lora(build("llama-eager"))  # its attention keeps enough for the peak to be in a block
    assert simulate(model, recompute=True, tokens=64).at_peak["recomputation"] > 0
    assert "recomputation" not in simulate(model, tokens=64).at_peak


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_packed_weights_by_their_format(kind: str, tmp_path: Path) -> None:
    model = with_lora(quantised(build("llama", layers=2), kind, tmp_path, torch.bfloat16))
    step = simulate(model)
    assert sum(step.at_peak.values()) == step.peak_bytes
    base = {name: size for name, size in step.at_peak.items() if name.startswith(("base weights", "buffers"))}
    kept = [p for p in model.parameters() if not p.requires_grad]
    assert sum(base.values()) == storage_bytes([*kept, *model.buffers(), *hidden_tensors(model)])
    packed = "base weights, NF4 packed" if kind == "nf4" else "base weights, int8"
    assert base[packed] == storage_bytes(p for p in kept if p.dtype in (torch.uint8, torch.int8))
    assert ("base weights, NF4 scales" in base) == (kind == "nf4")
    assert base["base weights, bf16"] == storage_bytes(p for p in kept if p.dtype is torch.bfloat16)


def test_how_a_line_is_obtained() -> None:
    at_peak = {"base weights, int8": 1, "optimizer state": 2, "saved tensors": 3, "kernel workspace": 4, "buffers": 0}
    found = ledger_lines(at_peak, {"host tensors": 5, "CUDA context": 6}, how_workspaces_are_known(COST))
    assert [(line.category, line.num_bytes, line.obtained.split(",")[0]) for line in found] == [
        ("base weights, int8", 1, "counted"),
        ("optimizer state", 2, "counted"),
        ("saved tensors", 3, "simulated"),
        ("kernel workspace", 4, "estimated: outputs of the op"),
        ("host tensors", 5, "estimated: loss sums and generator states that a step makes outside the model"),
        ("CUDA context", 6, "estimated: a driver's context with its loaded kernels"),
    ]
    assert how_workspaces_are_known(Measured(torch.device("cpu"))) == "measured"


# -- a GPU that is not here -------------------------------------------------------------------------------------------


def test_overhead_is_that_of_the_priced_device() -> None:
    assert overhead_of(COST, "cpu") == overhead_of(Free(), "cpu") == Overhead()
    assert overhead_of(find_device("4090").roofline(), "cpu") == Overhead(True, 512 * MIB, 2 * 8320 * KIB)
    assert overhead_of(COST, "cuda").caches


def test_a_gpus_allocator_rounds_and_holds_segments() -> None:
    model = with_lora(build("llama", layers=2))
    plain, rounded = simulate(model), simulate(model, cost=find_device("h100").roofline())
    assert sum(rounded.at_peak.values()) == rounded.peak_bytes
    padding = rounded.at_peak["allocator rounding"]
    assert 0 < padding < 512 * 2000
    assert rounded.peak_bytes == plain.peak_bytes + padding
    assert 0 < rounded.slack_bytes < 32 * MIB
    assert "allocator rounding" not in plain.at_peak


@pytest.mark.parametrize("optimizer", ["adamw_8bit", "paged_adamw_8bit", "sgd", "none"])
def test_optimizers_on_a_gpu(optimizer: Optimizer) -> None:
    model = build("llama", layers=2).train()
    step = simulate(model, cost=find_device("h100").roofline(), optimizer=optimizer)
    sizes = [p.numel() for p in model.parameters()]
    eight = [count for count in sizes if count >= 4096]
    expected = 8 * sum(count for count in sizes if count < 4096)
    expected += sum(2 * count + 2 * 4 * -(-count // 256) for count in eight) + 2 * 256 * 4
    assert step.at_peak.get("optimizer state", 0) == (expected if "8bit" in optimizer else 0)


def test_the_lines_of_plans_on_a_gpu_are_their_peaks() -> None:
    model = with_lora(build("llama", layers=2), target_modules=["q_proj", "down_proj"])
    planner = Planner(model, batch_for(model, rows=4, tokens=32), cost=find_device("h100").roofline())
    plans = planner.frontier(3)
    low, high = plans[0].predicted_peak_bytes, plans[-1].predicted_peak_bytes
    assert 576 * MIB < low <= high
    for plan in (*plans, planner.plan(low), planner.plan((low + high) // 2)):
        assert_adds_up(plan)
        found = lines(plan)
        assert found["CUDA context"].num_bytes == 512 * MIB
        assert found["cuBLAS workspace"].num_bytes == 2 * 32 * MIB
        assert found["allocator slack"].obtained == "simulated"
        outside = 512 * MIB + found["allocator slack"].num_bytes
        assert plan.predicted_allocated_bytes == plan.predicted_peak_bytes - outside
        if plan.budget_bytes is not None:
            assert plan.predicted_peak_bytes <= plan.budget_bytes


def test_on_a_cpu_there_are_only_tensors() -> None:
    model: Any = with_lora(build("llama", layers=2), target_modules=["q_proj", "down_proj"])
    for plan in Planner(model, batch_for(model, rows=4, tokens=32), cost=COST).frontier(3):
        assert_adds_up(plan)
        assert lines(plan)["host tensors"].num_bytes == 256 * KIB
        assert not set(lines(plan)) & {"CUDA context", "allocator slack", "allocator rounding", "cuBLAS workspace"}
        assert plan.predicted_allocated_bytes == plan.predicted_peak_bytes
