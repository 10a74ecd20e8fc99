"""Compiled blocks: shared, exact up to rounding, predicted, and absent with a reason where they cannot be."""

import functools
import shutil
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import torch._inductor.config as inductor_config
from torch import nn
from torch.utils import _python_dispatch as python_dispatch
from torch.utils._python_dispatch import BaseTorchDispatchMode, is_in_any_mode_without_ignore_compile_internals
from transformers import LlamaConfig, LlamaForCausalLM

import rematree
from models import assert_same, batch_for, build, gradients, quantised, with_lora
from rematree.errors import PlanMismatchError, UnsupportedModelError, UsageError
from rematree.execute.compiled import CompiledBlocks, compiled_forward, why_no_compiler
from rematree.execute.handle import Handle
from rematree.fingerprint import describe_model
from rematree.measure import PeakMeter
from rematree.planning.compile_profile import NOT_COMPILED, Profiler
from rematree.planning.planner import Planner
from rematree.plans import Action, Decision, Levers, Plan
from rematree.pricing.price import Free
from rematree.regions import find_chain

# fp32: sums of a few hundred terms in another order. The plain block against itself in fp64 is off by as much.
TOLERANCE = 5e-6
SLACK = 256 * 1024  # the planner's allowance for host tensors outside the model

pytestmark = pytest.mark.skipif(why_no_compiler(torch.device("cpu")) is not None, reason="nothing here to compile with")


def _plan(model: nn.Module, budgets: dict[str, float], decisions: dict[str, Decision] | None = None) -> Plan:
    return Plan.of(Levers(decisions or {}, compiled=budgets), describe_model(model))


def _adapted(**options: Any) -> nn.Module:
    """Two blocks with adapters on two projections: what takes time is compiling, and each adapter adds to it."""
    return with_lora(build("llama", layers=options.pop("layers", 2)), target_modules=["q_proj", "down_proj"], **options)


def _apply(plan: Plan, model: nn.Module) -> tuple[Handle, CompiledBlocks]:
    blocks = CompiledBlocks(model, plan.compiled)
    return Handle(plan, model, watcher=None, check_loss=False, compiler=blocks), blocks


def _largest(expected: dict[str, torch.Tensor], found: dict[str, torch.Tensor]) -> float:
    assert expected.keys() == found.keys()
    return max(float((e - found[n]).norm() / e.norm().clamp_min(1e-12)) for n, e in expected.items())


@pytest.mark.parametrize(
    ("told", "there", "reason"),
    [
        (None, {"clang"}, None),
        ("", {"gcc"}, None),
        ("my-cc", {"my-cc"}, None),
        ("my-cc", {"gcc"}, "no C compiler found, which triton needs (my-cc)"),
        (None, set[str](), "no C compiler found, which triton needs (gcc or clang)"),
    ],
)
def test_triton_needs_a_c_compiler(
    told: str | None, there: set[str], reason: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.utils._triton.has_triton", lambda: True)
    monkeypatch.setattr(shutil, "which", lambda name: name if name in there else None)
    monkeypatch.delenv("CC", raising=False)
    if told is not None:
        monkeypatch.setenv("CC", told)
    assert why_no_compiler(torch.device("cuda")) == reason


def test_two_compilations_for_all_blocks_and_lengths_with_the_draws_of_the_plain_model():
    model = with_lora(build("llama"), lora_dropout=0.05)
    paths = find_chain(model).blocks
    longer, shorter, shortest = (batch_for(model, tokens=tokens) for tokens in (32, 20, 11))
    plain = {tokens: gradients(model, batch) for tokens, batch in ((32, longer), (20, shorter), (11, shortest))}
    before = {name: dict(vars(module)) for name, module in model.named_modules()}
    handle, blocks = _apply(_plan(model, dict.fromkeys(paths, 1.0)), model)
    made: list[int] = []
    for tokens, batch in ((32, longer), (20, shorter), (11, shortest), (32, longer)):
        assert _largest(plain[tokens], gradients(model, batch)) < TOLERANCE
        made.append(len(blocks.seconds))
    assert made == [1, 2, 2, 2]  # for the first batch's sizes, and for all others
    model.eval()
    with torch.no_grad():
        model(**batch_for(model, tokens=9))
    model.train()
    assert len(blocks.seconds) == 2  # R7: nothing is compiled for an evaluation
    handle.remove()
    assert {name: dict(vars(module)) for name, module in model.named_modules()} == before
    assert_same(plain[32], gradients(model, longer))


def test_dropout_is_not_drawn_again_by_a_partitioner_that_recomputes_all_it_can():
    # torch's partitioner at a budget below 1 redraws masks when torch's own generator draws them: wrong gradients.
    model = _adapted(lora_dropout=0.3)
    paths = find_chain(model).blocks
    batch = batch_for(model)
    plain = gradients(model, batch)
    handle, blocks = _apply(_plan(model, dict.fromkeys(paths, 0.0), {paths[1]: Decision(Action.RECOMPUTE)}), model)
    assert _largest(plain, gradients(model, batch)) < TOLERANCE
    assert len(blocks.seconds) == 1
    handle.remove()


def test_a_compiled_block_beside_blocks_whose_attention_is_a_region():
    model = _adapted()
    first, second = find_chain(model).blocks
    batch = batch_for(model)
    plain = gradients(model, batch)
    decisions = {
        second: Decision(Action.RECOMPUTE),
        f"{second}.self_attn#attention": Decision(Action.SAVE, stash=True),
    }
    handle, blocks = _apply(_plan(model, {first: 1.0}, decisions), model)
    assert _largest(plain, gradients(model, batch)) < TOLERANCE
    assert len(blocks.seconds) == 1
    handle.remove()
    assert_same(plain, gradients(model, batch))


def test_hooks_on_a_compiled_block_run():
    model = _adapted()
    paths = find_chain(model).blocks
    seen: list[torch.Size] = []
    hook = model.get_submodule(paths[1]).register_forward_hook(lambda _m, _i, out: seen.append(out.shape))
    handle, _ = _apply(_plan(model, dict.fromkeys(paths, 1.0)), model)
    gradients(model, batch_for(model))
    handle.remove()
    hook.remove()
    assert seen == [torch.Size([2, 32, 48])]


def test_a_decision_inside_a_compiled_block_is_refused():
    model = with_lora(build("llama", layers=2))
    first, _ = find_chain(model).blocks
    plan = _plan(model, {first: 1.0}, {f"{first}.mlp": Decision(Action.RECOMPUTE)})
    with pytest.raises(PlanMismatchError, match="inside a compiled block"):
        rematree.apply(plan, model)


def test_a_wrapped_forward_is_refused_by_name():
    model = with_lora(build("llama", layers=2))
    first, _ = find_chain(model).blocks
    block: Any = model.get_submodule(first)
    block.forward = functools.partial(type(block).forward, block)
    with pytest.raises(UnsupportedModelError, match=f"{first} cannot be compiled.*wrapped by another library"):
        rematree.apply(_plan(model, {first: 1.0}), model)


class _Breaks(nn.Module):
    """A block that asks for a value of a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x) if bool(x.sum() > 0) else x


def test_a_block_that_does_not_compile_says_so_and_what_would_work():
    blocks = CompiledBlocks(holder := nn.ModuleDict({"0": _Breaks()}), {"0": 1.0})
    block = holder.get_submodule("0")
    with pytest.raises(UnsupportedModelError, match="0 cannot be compiled") as caught:
        blocks.run("0", block, block.forward, torch.ones(2, 4))
    assert any("--forbid compile" in remedy for remedy in caught.value.remedies)


def test_nothing_global_is_changed():
    from torch._functorch import config as functorch_config

    block = nn.Linear(4, 4)
    before = functorch_config.activation_memory_budget, inductor_config.fallback_random
    partitioner = inductor_config.custom_partitioner_fn
    compiled_forward(0.4, seconds := [])(block, torch.ones(2, 4)).sum().backward()
    assert len(seconds) == 1
    assert (functorch_config.activation_memory_budget, inductor_config.fallback_random) == before
    assert inductor_config.custom_partitioner_fn is partitioner


def test_a_mode_that_torch_remembers_and_that_is_gone_does_not_stop_compilation():
    modes = BaseTorchDispatchMode(), BaseTorchDispatchMode()
    inside, over = threading.Event(), threading.Event()

    def other_thread() -> None:
        with modes[1]:
            inside.set()
            over.wait()

    thread = threading.Thread(target=other_thread)
    with modes[0]:
        thread.start()
        inside.wait()
    over.set()
    thread.join()
    try:
        assert is_in_any_mode_without_ignore_compile_internals()
        compiled = CompiledBlocks(model := nn.Sequential(nn.Linear(4, 4)), {"0": 1.0})
        x = torch.ones(2, 4, requires_grad=True)
        compiled.run("0", model[0], model[0].forward, x).sum().backward()
        assert len(compiled.seconds) == 1
    finally:
        python_dispatch._is_in_any_mode_without_ignore_compile_internals = False
        python_dispatch._is_in_torch_dispatch_mode = False
        python_dispatch._is_in_non_infra_torch_dispatch_mode = False


def test_a_compiler_that_is_switched_off_is_an_error_not_a_slower_step(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")
    with pytest.raises(UnsupportedModelError, match="switched off by TORCHDYNAMO_DISABLE=1"):
        CompiledBlocks(nn.Sequential(nn.Linear(4, 4)), {"0": 1.0})


# -- planned ----------------------------------------------------------------------------------------------------------


def test_compiling_is_considered_only_for_long_jobs_and_never_when_forbidden(monkeypatch: pytest.MonkeyPatch):
    asked: list[int | None] = []

    class Noted:
        def __init__(self, model: nn.Module, steps: int | None) -> None:
            asked.append(steps)

        def measure(self, *_: Any) -> Any:
            return NOT_COMPILED

    monkeypatch.setattr("rematree.planning.observed.Profiler", Noted)
    model = with_lora(build("llama", layers=2), target_modules=["q_proj"])
    make = functools.partial(Planner, model, batch_for(model), cost=Free())
    make(steps=199)  # every combination: tests/test_settings.py
    assert asked == []
    make(steps=200)
    make(allow_compile=True)
    assert asked == [200, None]


def test_without_a_compiler_the_plan_says_why_and_compiles_nothing():
    model = _adapted()
    with cast("Any", inductor_config).patch({"cpp.cxx": ("no-such-compiler",)}):
        plan = Planner(model, batch_for(model), cost=Free(), allow_compile=True).plan()
    assert not plan.compiled
    assert "not compiled: no C++ compiler found (g++, or what CXX names)" in plan.notes


@pytest.fixture(scope="module")
def planned() -> tuple[nn.Module, dict[str, torch.Tensor], Planner]:
    model = _adapted(layers=3, lora_dropout=0.05)
    batch = batch_for(model)
    return model, batch, Planner(model, batch, optimizer="none", allow_compile=True)


Planned = tuple[nn.Module, dict[str, torch.Tensor], Planner]


def test_what_is_kept_falls_with_the_budget(planned: Planned):
    profiles = {budget: found for (_, budget), found in planned[2].survey.compiled.profiles.items()}
    assert sorted(profiles) == [0.0, 0.3, 1.0]
    assert profiles[1.0].kept_bytes > profiles[0.3].kept_bytes > profiles[0.0].kept_bytes
    # At 0 what is left are the masks of two dropouts, a byte an element: one of hidden size and one of ffn size.
    assert profiles[0.0].kept_bytes <= 64 * (48 + 96) * 4
    assert all(0 < found.difference < TOLERANCE and found.draws for found in profiles.values())


@pytest.mark.parametrize("budget", [1.0, 0.0])
@pytest.mark.parametrize("recomputed", [False, True])
def test_the_predicted_peak_is_the_measured_one(planned: Planned, budget: float, recomputed: bool):
    model, batch, planner = planned
    paths = planner.survey.chain.blocks
    decisions = {path: Decision(Action.RECOMPUTE) for path in paths[:2]} if recomputed else {}
    levers = Levers(decisions, compiled=dict.fromkeys(paths, budget))
    predicted = planner.observed.referee.run(levers).peak_bytes
    with rematree.apply(Plan.of(levers, describe_model(model)), model):
        gradients(model, batch)
        with PeakMeter(model, None, batch) as meter:
            model(**batch, use_cache=False).loss.backward()
    model.zero_grad(set_to_none=True)
    assert predicted == pytest.approx(meter.peak_bytes, rel=0.01)


def test_a_plan_with_compiled_blocks_says_what_changes_and_survives_json(planned: Planned):
    planner = planned[2]
    plan = planner.plan()
    assert plan.compiled
    assert not plan.exact
    assert "compiled, memory budget" in str(plan)
    said = [note for note in plan.notes if "blocks compiled" in note]
    assert len(said) == 1
    assert "changes rounding" in said[0]
    assert "forbid with 'compile'" in said[0]
    assert {line.obtained for line in plan.ledger if line.category == "kept by compiled blocks"} <= {"measured"}
    assert Plan.from_json(plan.to_json()) == plan


def test_compiling_counts_against_a_short_job(planned: Planned, monkeypatch: pytest.MonkeyPatch):
    model, batch, planner = planned
    known = planner.survey.compiled
    assert set(known.shares.values()) == {0.0}  # a job of unknown length: it does not count
    again = {budget: replace(found, compile_seconds=8.0) for (_, budget), found in known.profiles.items()}
    monkeypatch.setattr(Profiler, "_measured", lambda *_: again)
    short = Planner(model, batch, cost=planner.observed.cost, optimizer="none", allow_compile=True, steps=20)
    assert set(short.survey.compiled.shares.values()) == {8.0 / len(planner.survey.chain.blocks) / 20}
    assert not short.plan().compiled


def test_what_was_measured_with_one_batch_is_not_offered_for_another(planned: Planned):
    model, _, planner = planned
    other = planner.for_batch(batch_for(model, tokens=16))
    assert any(option.compiled is not None for options in planner.survey.options for option in options)
    assert not any(option.compiled is not None for options in other.survey.options for option in options)
    assert [len(stages) for stages in other.survey.problem.stages] == [
        len(other.survey.options[kind]) for kind in other.survey.kinds
    ]
    assert len(other.survey.released) == len(other.survey.options[other.survey.kinds[0]])
    eager = tuple(tuple(each for each in known if each.compiled is None) for known in planner.survey.options)
    assert other.survey.options == eager
    least, fastest = other.frontier(3)[0], other.plan()
    assert not fastest.compiled
    assert least.predicted_peak_bytes <= fastest.predicted_peak_bytes


def test_an_unknown_profile_is_an_error_of_usage(planned: Planned):
    _, _, planner = planned
    with pytest.raises(UsageError, match="no profile of this block"):
        planner.observed.referee.run(Levers(compiled={planner.survey.chain.blocks[0]: 0.77}))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_quantised_blocks_compile_in_one_graph(kind: str, tmp_path: Path):
    pytest.importorskip("bitsandbytes")
    model = with_lora(quantised(build("llama", layers=2), kind, tmp_path), lora_dropout=0.05)
    batch = batch_for(model)
    plain = gradients(model, batch)
    planner = Planner(model, batch, optimizer="none", allow_compile=True)
    assert planner.survey.compiled.reasons == ()
    for budget in (1.0, 0.0):
        levers = Levers(compiled=dict.fromkeys(planner.survey.chain.blocks, budget))
        predicted = planner.observed.referee.run(levers).peak_bytes
        with rematree.apply(Plan.of(levers, describe_model(model)), model):
            assert _largest(plain, gradients(model, batch)) < TOLERANCE
            with PeakMeter(model, None, batch) as meter:
                model(**batch, use_cache=False).loss.backward()
        model.zero_grad(set_to_none=True)
        assert predicted == pytest.approx(meter.peak_bytes, rel=0.01)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_smollm_shaped_stack_is_predicted(dtype: torch.dtype):
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=4,
        num_attention_heads=9,
        num_key_value_heads=3,
        head_dim=64,
        vocab_size=2048,
    )
    model = with_lora(cast("nn.Module", LlamaForCausalLM(config)).to(dtype), r=8, lora_dropout=0.05)
    ids = torch.randint(3, 2048, (2, 512))
    batch = {"input_ids": ids, "labels": ids.clone()}
    for plan in Planner(model, batch, optimizer="none", allow_compile=True).frontier(3):
        with rematree.apply(plan, model):
            for _ in range(2):
                model(**batch).loss.backward()
                model.zero_grad(set_to_none=True)
            with PeakMeter(model, None, batch) as meter:
                model(**batch).loss.backward()
        model.zero_grad(set_to_none=True)
        assert plan.predicted_peak_bytes - SLACK == pytest.approx(meter.peak_bytes, rel=0.03)
