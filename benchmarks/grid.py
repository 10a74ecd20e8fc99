"""The grid of accuracy runs: models, batches, ways to step, and one measured cell. Shared by the CPU and GPU logs.

A cell is one model (family, way to train, dtype) with one batch; it is stepped in five ways: plain, with Hugging Face's
flag, and with plans at three budgets. Peaks and times of every way are predicted by one planner before anything runs.
"""

import gc
import importlib.util
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import torch
from allocated import allocated_bytes, budget_bytes, every_layer
from speed import WITHIN, Speed
from torch import nn

import rematree
from rematree.finetune.compare import Batch, hf_checkpointing, train_step, weights_kept
from rematree.integrations.bitsandbytes import Quantisation, quantisation_config
from rematree.measure import PeakMeter
from rematree.planning.planner import Planner

# Shares of the way from the smallest to the largest useful budget.
SHARES = (0.0, 1 / 3, 2 / 3)
SHAPES = ((1, 1024), (4, 256), (2, 512))
MODES = ("lora", "qlora-nf4", "full")
DTYPES = ("float32", "bfloat16")


def _decoder(config: str, model: str, **fields: Any) -> nn.Module:
    import transformers

    defaults = {"max_position_embeddings": 2048, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    return getattr(transformers, model)(getattr(transformers, config)(**{**defaults, **fields}))


def _llama() -> nn.Module:
    return _decoder(
        "LlamaConfig",
        "LlamaForCausalLM",
        hidden_size=512,
        intermediate_size=1408,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=8,
        vocab_size=24000,
    )


def _qwen3() -> nn.Module:
    return _decoder(
        "Qwen3Config",
        "Qwen3ForCausalLM",
        hidden_size=384,
        intermediate_size=1152,
        num_hidden_layers=6,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=64,
        vocab_size=32000,
        tie_word_embeddings=True,
    )


def _gemma3() -> nn.Module:
    return _decoder(
        "Gemma3TextConfig",
        "Gemma3ForCausalLM",
        hidden_size=384,
        intermediate_size=1536,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=96,
        vocab_size=24000,
        sliding_window=128,
        layer_types=["sliding_attention"] * 2 + ["full_attention"] + ["sliding_attention"] * 2 + ["full_attention"],
        attn_implementation="sdpa",
    )


def _gpt2() -> nn.Module:
    import transformers

    config = transformers.GPT2Config(n_embd=512, n_layer=6, n_head=8, vocab_size=20000, n_positions=1024)
    return transformers.GPT2LMHeadModel(config)


def _mixtral() -> nn.Module:
    return _decoder(
        "MixtralConfig",
        "MixtralForCausalLM",
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=2,
        num_local_experts=8,
        num_experts_per_tok=2,
        vocab_size=16000,
    )


def _smollm2() -> nn.Module:
    return _decoder(
        "LlamaConfig",
        "LlamaForCausalLM",
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=6,
        num_attention_heads=9,
        num_key_value_heads=3,
        vocab_size=49152,
        tie_word_embeddings=True,
    )


FAMILIES: dict[str, Callable[[], nn.Module]] = {
    "llama": _llama,
    "qwen3": _qwen3,
    "gemma3": _gemma3,
    "gpt2": _gpt2,
    "mixtral": _mixtral,
    "smollm2": _smollm2,
}


@dataclass(frozen=True)
class Cell:
    """One model with one batch."""

    family: str
    mode: str
    rows: int
    tokens: int
    dtype: str

    @property
    def name(self) -> str:
        return f"{self.family} {self.mode} {self.dtype} {self.rows}x{self.tokens}"


def cells(family: str, *, every_shape: bool = False) -> list[Cell]:
    """The cells of one family, in a fixed order.

    Each way to train meets one shape, so that over the families every pair of (way, shape) and of (way, dtype) is
    met; with `every_shape` it meets all three.
    """
    number = list(FAMILIES).index(family)
    found: list[Cell] = []
    for turn, mode in enumerate(MODES):
        if mode == "qlora-nf4" and importlib.util.find_spec("bitsandbytes") is None:
            continue
        # GPT-2 with LoRA in bfloat16 took 9 to 25 s a step on one CPU thread: too long for a grid.
        dtype = DTYPES[(number + turn + (family == "gpt2")) % 2]
        shapes = SHAPES if every_shape else (SHAPES[(number + turn) % 3],)
        found += [Cell(family, mode, rows, tokens, dtype) for rows, tokens in shapes]
    return found


def build_model(cell: Cell, device: torch.device) -> Any:
    """The model of `cell` as it trains: packed, adapters on, on `device`."""
    torch.manual_seed(0)
    dtype = getattr(torch, cell.dtype)
    model: Any = FAMILIES[cell.family]().to(dtype)
    if cell.mode == "qlora-nf4":
        packed = quantisation_config(Quantisation(4), compute_dtype=dtype)
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            place = {"device_map": {"": device}} if device.type == "cuda" else {}
            model = type(model).from_pretrained(folder, quantization_config=packed, dtype=dtype, **place)
        model = rematree.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    if cell.mode != "full":
        model = _with_lora(model, cell.family)
    return model.to(device).train() if cell.mode != "qlora-nf4" else model.train()


def _with_lora(model: Any, family: str) -> Any:
    from peft import LoraConfig, get_peft_model

    # PEFT has no dropout for experts kept in one parameter.
    modules: Any = ["q_proj", "k_proj", "v_proj", "o_proj"] if family == "mixtral" else "all-linear"
    plain_gpt2 = family == "gpt2" and not getattr(model, "is_loaded_in_4bit", False)
    config = LoraConfig(r=8, lora_alpha=16, lora_dropout=0.05, target_modules=modules, fan_in_fan_out=plain_gpt2)
    return get_peft_model(model, config)


def build_batch(cell: Cell, model: Any, device: torch.device) -> Batch:
    """Random tokens; the first quarter of every row is a prompt, which is not trained."""
    vocabulary = model.config.vocab_size
    ids = torch.randint(3, vocabulary, (cell.rows, cell.tokens), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    labels[:, : cell.tokens // 4] = -100
    return {"input_ids": ids.to(device), "labels": labels.to(device)}


@dataclass(frozen=True)
class Row:
    """One way of stepping one cell.

    `predicted_peak_bytes` is what a budget is compared with. On a GPU that is the segments in use and the CUDA context;
    `predicted_allocated_bytes`, which leaves these two out, and `measured_peak_bytes` are what its allocator hands out.
    On a CPU both predictions are one, and `reserved_bytes` are None.
    """

    cell: str
    way: str
    budget_bytes: int | None
    predicted_peak_bytes: int
    predicted_allocated_bytes: int
    measured_peak_bytes: int
    first_step_peak_bytes: int
    reserved_bytes: int | None
    predicted_seconds: float
    measured_seconds: float
    all_seconds: list[float]
    loss_chunk_rows: int | None
    machine: float

    @property
    def peak_error(self) -> float:
        return self.predicted_allocated_bytes / self.measured_peak_bytes - 1

    @property
    def time_error(self) -> float:
        return self.predicted_seconds / self.measured_seconds - 1


@dataclass(frozen=True)
class Way:
    """One way of stepping, predicted; `around` brings it about."""

    name: str
    budget_bytes: int | None
    peak_bytes: int
    allocated_bytes: int
    seconds: float
    loss_chunk_rows: int | None
    around: Callable[[], AbstractContextManager[Any]]


def ways(model: Any, batch: Batch, planner: Planner) -> list[Way]:
    """Every way of stepping that is compared."""
    plain, flag = planner.survey.plain, every_layer(planner)
    simulated = (("plain", plain, nullcontext), ("hf flag", flag, lambda: hf_checkpointing(model)))
    found = [
        Way(name, None, budget_bytes(planner, step), allocated_bytes(planner, step), step.seconds, None, around)
        for name, step, around in simulated
    ]
    low, high = planner.min_peak_bytes(), planner.plan(None).predicted_peak_bytes
    budgets = [int(low + share * (high - low)) for share in SHARES]
    for share, budget, plan in zip(SHARES, budgets, planner.plans(budgets), strict=True):
        found.append(
            Way(
                f"plan {share:.0%}",
                budget,
                plan.predicted_peak_bytes,
                plan.predicted_allocated_bytes,
                plan.predicted_step_seconds,
                plan.loss_chunk_rows,
                lambda plan=plan: rematree.apply(plan, model, batch),
            )
        )
    return found


def measure(
    cell: Cell, device: torch.device, *, timed_steps: int, attempts: int = 1, done: frozenset[str] = frozenset()
) -> Iterator[Row]:
    """Every way of `cell` that is not in `done`, predicted, then run.

    Peaks are those of the first two steps: in the first the optimizer's state is born, in the second it is there from
    the beginning. Times are of later steps, without the profiler, the median of `timed_steps`; the first of them does
    not count, because it finds the heap as the profiled steps left it. While the machine is at another speed than when
    ops were priced, a way is timed again, `attempts` times, then everything is priced again, and the way timed again.
    """
    model = build_model(cell, device)
    batch = build_batch(cell, model, device)
    speed = Speed(device)
    priced = _priced(model, batch, speed)
    for name in priced.ways:
        if name in done:
            continue
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
        trial = _step(model, batch, priced.ways[name], speed, priced.speed, timed_steps, attempts)
        if abs(trial.machine - 1) > WITHIN and attempts > 1:  # it does not come back to that speed
            priced = _priced(model, batch, speed)
            trial = _step(model, batch, priced.ways[name], speed, priced.speed, timed_steps, attempts)
        way = priced.ways[name]
        beside = 0 if device.type == "cpu" else speed.num_bytes
        yield Row(
            cell.name,
            name,
            way.budget_bytes,
            way.peak_bytes,
            way.allocated_bytes,
            max(trial.peaks) - beside,
            trial.peaks[0] - beside,
            max(trial.reserved) - beside if trial.reserved else None,
            way.seconds,
            statistics.median(trial.times),
            trial.times,
            way.loss_chunk_rows,
            trial.machine,
        )


@dataclass(frozen=True)
class _Priced:
    """Ways of stepping as predicted, and the seconds of the speed's work when they were."""

    ways: dict[str, Way]
    speed: float


def _priced(model: Any, batch: Batch, speed: Speed) -> _Priced:
    """Predict every way; the speed is the mean of before and after."""
    before = speed.seconds()
    found = {way.name: way for way in ways(model, batch, Planner(model, batch))}
    return _Priced(found, (before + speed.seconds()) / 2)


@dataclass
class _Trial:
    """What a few steps of one way gave; `machine` is the speed's work during them over that when they were priced."""

    peaks: list[int]
    reserved: list[int]
    times: list[float]
    machine: float


def _step(
    model: Any, batch: Batch, way: Way, speed: Speed, priced_at: float, timed_steps: int, attempts: int
) -> _Trial:
    """Step one way, its timed steps again while the machine is at another speed than when they were priced."""
    trial = _Trial([], [], [], math.inf)
    with weights_kept(model, 1e-4) as optimizer, way.around():
        for _ in range(2):
            with PeakMeter(model, optimizer, batch) as meter:
                train_step(model, optimizer, batch, 1.0)
            trial.peaks.append(meter.peak_bytes)
            if model.device.type == "cuda":
                trial.reserved.append(torch.cuda.max_memory_reserved(model.device))
        for _ in range(attempts):
            train_step(model, optimizer, batch, 1.0)
            before, times = speed.seconds(), list[float]()
            for _ in range(timed_steps):
                start = time.perf_counter()
                train_step(model, optimizer, batch, 1.0)  # its loss is read, so it has run
                times.append(time.perf_counter() - start)
            machine = max(before, speed.seconds(), key=lambda found: abs(found / priced_at - 1)) / priced_at
            if abs(machine - 1) < abs(trial.machine - 1):
                trial.times, trial.machine = times, machine
            if abs(machine - 1) <= WITHIN:
                break
    return trial


def as_json(row: Row) -> dict[str, Any]:
    """Plain values, with the two errors spelled out."""
    return {**asdict(row), "peak_error": row.peak_error, "time_error": row.time_error}
