"""On a CUDA device: the same bits, the predicted peaks, nothing left behind. `pytest -m gpu`; the rest of the tests
need no device."""

import functools
import gc
import os
import sys
import warnings
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig
from torch import nn
from transformers import Trainer, TrainingArguments

import rematree
from models import assert_same, batch_for, build, gradients, quantised, with_lora
from rematree.calibration import calibrate
from rematree.execute.compiled import why_no_compiler
from rematree.finetune.compare import hf_checkpointing, train_step
from rematree.integrations.metrics import MemoryMetrics
from rematree.measure import PeakMeter
from rematree.planning.planner import Planner
from rematree.pricing.cost import Measured
from rematree.pricing.devices import CONTEXT_BYTES
from rematree.pricing.roofline import Roofline
from rematree.pricing.workspaces import workspace_here
from rematree.units import GIB, MIB

# Read when cuBLAS is first used; as large as torch's own choice on Hopper, and deterministic.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

pytestmark = pytest.mark.gpu

COST = Roofline(1e14, 1e12)
DEVICE = torch.device("cuda", 0)
SHARES = (0.0, 0.3, 0.7, 1.0)


@pytest.fixture
def deterministic() -> Iterator[None]:
    """Attention's backward adds up in any order otherwise."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*deterministic.*")
        yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def _empty_device() -> Iterator[None]:
    yield
    gc.collect()
    torch.cuda.empty_cache()


def tell(*lines: object) -> None:
    """What was measured, for a reader: `-rP` shows it."""
    sys.stderr.write("\n".join(map(str, lines)) + "\n")


@contextmanager
def at_most(num_bytes: int) -> Generator[None]:
    """A device whose memory is `num_bytes` beside the CUDA context."""
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(num_bytes / torch.cuda.get_device_properties(DEVICE).total_memory)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def on_gpu(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.to(DEVICE) for name, tensor in batch.items()}


def medium(**fields: Any) -> nn.Module:
    """A Llama whose tensors are large beside the allocator's granularity."""
    settings: dict[str, Any] = {
        "hidden_size": 512,
        "intermediate_size": 1408,
        "num_hidden_layers": 6,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "vocab_size": 8000,
        "max_position_embeddings": 2048,
        "pad_token_id": 0,
    }
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**settings, **fields}))


def check(model: nn.Module, batch: dict[str, torch.Tensor], **told: Any) -> None:
    """Plans over the whole frontier give the plain step's bits, where the plain step gives its own again."""
    expected = gradients(model, batch)
    for _ in range(3):
        again = gradients(model, batch)
        if any(not torch.equal(expected[name], again[name]) for name in expected):
            pytest.skip("control: the plain model does not repeat itself")
    planner = Planner(model, batch, cost=COST, forbid=["chunked_loss"], **told)
    least, most = planner.min_peak_bytes(), planner.plan(None).predicted_peak_bytes
    assert least < most
    for share in SHARES:
        plan = planner.plan(int(least + share * (most - least)))
        with rematree.apply(plan, model, batch):
            assert_same(expected, gradients(model, batch))
            state = torch.cuda.get_rng_state()
        gradients(model, batch)
        assert torch.equal(state, torch.cuda.get_rng_state())  # as many numbers were drawn


@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", ["llama", "llama-eager", "gemma3", "gpt2", "mixtral"])
def test_same_bits_with_dropout(name: str, dtype: torch.dtype) -> None:
    model = with_lora(build(name).to(dtype)).to(DEVICE)
    check(model, on_gpu(batch_for(model)))


@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize("autocast", [False, True], ids=["", "autocast"])
@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_same_bits_of_two_adapters_that_both_draw(base: torch.dtype, autocast: bool) -> None:
    """Behind one cast they are one node, and each draws its own mask."""
    model: Any = with_lora(build("llama", layers=2))
    model.add_adapter("second", LoraConfig(r=4, lora_dropout=0.3, target_modules="all-linear"))
    model.base_model.set_adapter(["default", "second"])
    for name, parameter in model.named_parameters():
        if "lora_" not in name:
            parameter.data = parameter.data.to(base)
        elif "lora_B.second" in name:
            nn.init.normal_(parameter, std=0.05)
    with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
        check(model.to(DEVICE).train(), on_gpu(batch_for(model)))


@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_same_bits_of_all_weights(name: str) -> None:
    model = build(name).to(DEVICE).train()
    check(model, on_gpu(batch_for(model)))


@pytest.mark.usefixtures("deterministic")
def test_same_bits_under_autocast() -> None:
    model = with_lora(build("llama")).to(DEVICE)
    with torch.autocast("cuda", torch.bfloat16):
        check(model, on_gpu(batch_for(model)))


@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_same_bits_over_packed_weights(kind: str, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    base = quantised(medium(num_hidden_layers=3), kind, tmp_path, torch.bfloat16).to(DEVICE)
    model = with_lora(rematree.prepare_model_for_kbit_training(base, use_gradient_checkpointing=False)).to(DEVICE)
    check(model, on_gpu(batch_for(model, tokens=256)))


def test_chunked_loss_is_near_in_fp32() -> None:
    model = with_lora(medium(num_hidden_layers=2)).to(DEVICE)
    batch = on_gpu(batch_for(model, tokens=512))
    expected = gradients(model, batch)
    planner = Planner(model, batch, cost=COST)
    plan = planner.plan(planner.min_peak_bytes())
    assert plan.loss_chunk_rows is not None
    with rematree.apply(plan, model, batch):
        found = gradients(model, batch)
    for name, tensor in expected.items():
        assert (tensor - found[name]).norm() <= 1e-4 * tensor.norm().clamp_min(1e-12), name


def lora_in_bf16() -> nn.Module:
    return with_lora(medium().to(torch.bfloat16)).to(DEVICE)


def all_in_fp32() -> nn.Module:
    return medium().to(DEVICE).train()


@pytest.mark.parametrize("make", [lora_in_bf16, all_in_fp32])
def test_peaks_are_the_predicted_ones(make: Callable[[], nn.Module]) -> None:
    """In bytes asked of the allocator, in a training step with its optimizer, whose state is there."""
    model = make()
    batch = on_gpu(batch_for(model, rows=4, tokens=512))
    planner = Planner(model, batch)
    low, high = planner.min_peak_bytes(), planner.plan(None).predicted_peak_bytes
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=True)
    peaks: list[tuple[int, int]] = []
    for share in SHARES:
        plan = planner.plan(int(low + share * (high - low)))
        with rematree.apply(plan, model, batch):
            train_step(model, optimizer, batch, 1.0)
            torch.cuda.empty_cache()
            with PeakMeter(model, optimizer, batch) as meter:
                train_step(model, optimizer, batch, 1.0)
        predicted = plan.predicted_allocated_bytes
        allocated = torch.cuda.max_memory_allocated()
        reserved = torch.cuda.max_memory_reserved() + planner.observed.overhead.context_bytes
        peaks.append((meter.peak_bytes, predicted))
        tell(
            f"{share}: asked for {meter.peak_bytes / MIB:.2f} of {predicted / MIB:.2f} MiB "
            f"({predicted / meter.peak_bytes - 1:+.2%}), allocated {allocated / MIB:.1f}, "
            f"reserved {reserved / MIB:.1f} of {plan.predicted_peak_bytes / MIB:.1f} MiB"
        )
    assert all(measured <= predicted <= 1.02 * measured + MIB for measured, predicted in peaks), peaks


def test_planning_leaves_nothing_on_the_device() -> None:
    model = with_lora(medium().to(torch.bfloat16)).to(DEVICE)
    batch = on_gpu(batch_for(model, tokens=512))
    gradients(model, batch)
    gc.collect()
    before = torch.cuda.memory_allocated()
    plan = rematree.plan(model, batch, None)
    left = torch.cuda.memory_allocated() - before
    gc.collect()
    after = torch.cuda.memory_allocated() - before
    tell(
        f"left {left / MIB:.1f} MiB, after collection {after / MIB:.1f} MiB; {plan.predicted_step_seconds * 1e3:.1f} ms"
    )
    assert after <= 1 * MIB
    assert left <= 1 * MIB


def test_context_and_workspaces_are_what_is_counted() -> None:
    a = torch.ones(64, 64, device=DEVICE)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch._C._cuda_clearCublasWorkspaces()
    cleared = torch.cuda.memory_allocated()
    a.mm(a)
    workspace = torch.cuda.memory_allocated() - cleared
    free, total = torch.cuda.mem_get_info()
    context = total - free - torch.cuda.memory_reserved()
    tell(f"context {context / MIB:.0f} MiB, workspace {workspace / MIB:.3f} MiB, of {(before - cleared) / MIB:.3f}")
    assert workspace == workspace_here(torch.cuda.get_device_capability()[0])
    assert context <= CONTEXT_BYTES + 256 * MIB


def test_compiled_blocks_are_near_and_within_their_peak() -> None:
    reason = why_no_compiler(DEVICE)
    if reason is not None:
        pytest.skip(reason)
    model = with_lora(medium(num_hidden_layers=4).to(torch.bfloat16), lora_dropout=0.0).to(DEVICE)
    batch = on_gpu(batch_for(model, rows=4, tokens=512))
    expected = gradients(model, batch)
    planner = Planner(model, batch, allow_compile=True, forbid=["groups"])
    low = planner.min_peak_bytes()
    high = planner.plan(None).predicted_peak_bytes
    plan = next((p for p in planner.plans([low, (low + high) // 2, high]) if p.compiled), None)
    if plan is None:
        pytest.skip("no plan compiles")
    with rematree.apply(plan, model, batch):
        gradients(model, batch)
        with PeakMeter(model, None, batch) as meter:
            found = gradients(model, batch)
    predicted = plan.predicted_allocated_bytes
    tell(f"allocated {meter.peak_bytes / MIB:.1f} of {predicted / MIB:.1f} MiB")
    for name, tensor in expected.items():
        assert (tensor.float() - found[name].float()).norm() <= 0.05 * tensor.float().norm().clamp_min(1e-12), name
    assert meter.peak_bytes <= predicted * 1.01 + MIB


def test_attention_with_dropout_in_fp32_is_priced() -> None:
    """Its backward reads two seeds on the host; a price asked with both on the device would end the process."""
    model = with_lora(build("gpt2", layers=2)).to(DEVICE)
    assert Planner(model, on_gpu(batch_for(model)), cost=Measured(DEVICE)).min_peak_bytes() > 0


def test_prices_are_those_of_kernels() -> None:
    """A large product at the rate of large products; a small op at its launch, not at what it takes to wait for it."""
    cost = Measured(DEVICE)
    side = 4096
    big = torch.empty(side, side, dtype=torch.bfloat16, device="meta")
    small = torch.empty(1024, device="meta")
    mm, mul = torch.ops.aten.mm.default, torch.ops.aten.mul.Tensor
    product = cost.price(mm, (big, big), {}, [big]).seconds
    tiny = cost.price(mul, (small, small), {}, [small]).seconds
    tell(f"matmul {2 * side**3 / product / 1e12:.0f} TFLOP/s, small op {tiny * 1e6:.1f} us")
    assert 2 * side**3 / product > 5e12
    assert tiny < 5e-5


class Rows(torch.utils.data.Dataset[Any]):
    def __init__(self, *lengths: int) -> None:
        generator = torch.Generator().manual_seed(3)
        self._rows = [torch.randint(3, 8000, (length,), generator=generator) for length in lengths]

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"input_ids": self._rows[index], "labels": self._rows[index]}


def pad(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    ids = torch.nn.utils.rnn.pad_sequence([row["input_ids"] for row in rows], batch_first=True)
    labels = torch.nn.utils.rnn.pad_sequence([row["labels"] for row in rows], batch_first=True, padding_value=-100)
    return {"input_ids": ids, "labels": labels, "attention_mask": (ids != 0).long()}


def trained(folder: Path, *callbacks: Any) -> tuple[list[float], Any]:
    model = with_lora(medium().to(torch.bfloat16))
    settings = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=4,
        max_steps=4,
        logging_steps=1,
        learning_rate=1e-3,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        seed=5,
    )
    trainer = Trainer(
        model=model,
        args=settings,
        train_dataset=Rows(*(512, 300, 512, 77, 512, 512, 128, 400) * 3),
        data_collator=pad,
        callbacks=list(callbacks),
    )
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry], trainer


@pytest.mark.usefixtures("deterministic")
def test_a_budget_in_the_trainer(tmp_path: Path) -> None:
    torch.cuda.reset_peak_memory_stats()
    plain, _ = trained(tmp_path / "plain")
    needed = torch.cuda.max_memory_allocated()
    gc.collect()
    torch.cuda.empty_cache()
    said: list[str] = []
    budget = int(0.75 * needed) + CONTEXT_BYTES
    callback = rematree.BudgetCallback(budget, forbid=["chunked_loss"], say=said.append)
    with at_most(budget - CONTEXT_BYTES):
        losses, trainer = trained(tmp_path / "planned", callback, MemoryMetrics())
    tell(*said, plain, losses)
    assert losses == plain
    assert any("memory/max_reserved(GiB)" in entry for entry in trainer.state.log_history)
    held = max(entry.get("memory/max_reserved(GiB)", 0.0) for entry in trainer.state.log_history) * GIB
    tell(f"budget {budget / MIB:.0f} MiB, reserved {held / MIB:.0f} MiB")


def test_a_step_that_fits_nowhere_else() -> None:
    """With a cap on the device's memory: the plain step dies, Hugging Face's flag dies, the plan is within it."""
    model = with_lora(medium(vocab_size=32000, num_hidden_layers=8).to(torch.bfloat16)).to(DEVICE)
    batch = on_gpu(batch_for(model, rows=16, tokens=2048))
    planner = Planner(model, batch, cost=COST, optimizer="none")
    least = planner.plan(planner.min_peak_bytes())
    flag = planner.every_layer_step()[0]
    context = planner.observed.overhead.context_bytes
    assert least.predicted_peak_bytes < 0.7 * flag
    with at_most((least.predicted_peak_bytes + flag) // 2 - context):
        for around in (nullcontext, functools.partial(hf_checkpointing, model)):
            with around(), pytest.raises(torch.OutOfMemoryError):
                gradients(model, batch)
            model.zero_grad(set_to_none=True)
            gc.collect()
            torch.cuda.empty_cache()
        with rematree.apply(least, model, batch):
            assert gradients(model, batch)["loss"].isfinite()
    # Its own prediction is enough: the budget is kept by the segments, not only by what is in them.
    with at_most(least.predicted_peak_bytes - context), rematree.apply(least, model, batch):
        for _ in range(3):
            assert gradients(model, batch)["loss"].isfinite()


def test_calibration_measures_rates_and_links() -> None:
    profile = calibrate(DEVICE, 1 * GIB, sides=(1024, 4096), stream_bytes=128 * MIB)
    measured = profile.device
    tell({name: f"{value:.3g}" for name, value in profile.figures.items()}, dict(measured.efficiency))
    assert measured.flops_per_second["bf16"] > 1e12
    assert measured.bytes_per_second > 1e11
    assert measured.host_bytes_per_second is not None
    assert measured.host_bytes_per_second > 1e9
