"""What happens around a plan that is in force: it is taken off too early, hooks come late, others wrap and copy."""

import copy
import dataclasses
import gc
import io
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import DynamicCache

import rematree
from both_paths import AGAIN, EVERY_WAY, SAVE, by_plan, plan_of
from models import assert_same, batch_for, build, with_lora
from rematree import BudgetCallback
from rematree.engines import refuse_copies
from rematree.errors import RecomputeMismatchError, UsageError
from rematree.planning.planner import Planner
from rematree.plans import Plan
from rematree.pricing.cost import Roofline
from rematree.regions import find_chain
from trainers import quiet_arguments

COST = Roofline(5e10, 1e10)


def adapted(dropout: float = 0.1) -> nn.Module:
    model = with_lora(build("llama"), lora_dropout=dropout)
    model.config.use_cache = False  # pyright: ignore[reportAttributeAccessIssue, reportArgumentType]
    return model


def step(model: Any, batch: Any, read: list[torch.Tensor] | None = None) -> dict[str, torch.Tensor]:
    """Gradients of the loss, and of the first of what hooks put into `read`; in a rerun they put it there again."""
    model.zero_grad(set_to_none=True)
    torch.manual_seed(7)
    read = [] if read is None else read
    read.clear()
    loss = model(**batch).loss
    sum(read[:1], loss).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def plans(model: nn.Module, batch: Any, count: int = 4, forbid: tuple[str, ...] = ("chunked_loss",)) -> list[Plan]:
    planner = Planner(model, batch, cost=COST, forbid=forbid)
    low, high = planner.min_peak_bytes(), planner.plan(None).predicted_peak_bytes
    return planner.plans([low + part * (high - low) // count for part in range(count)])


# -- taken off between a forward and its backward ------------------------------------------------------------


def refused_backward(plan: Plan, model: Any, batch: Any) -> str:
    """What is said where `plan` is gone before the backward of a forward under it."""
    with rematree.apply(plan, model):
        loss = model(**batch).loss
    with pytest.raises(RecomputeMismatchError, match="removed between a forward and its backward") as caught:
        loss.backward()
    return str(caught.value)


def test_a_plan_that_is_gone_cannot_skip_what_it_saved() -> None:
    """Masks that were kept would be drawn anew, in the shapes that torch looks for."""
    model = adapted()
    batch = batch_for(model)
    masks = [f"{path}#draw" for path, module in model.named_modules() if isinstance(module, nn.Dropout) and module.p]
    assert masks
    decisions = {**dict.fromkeys(find_chain(model).blocks, AGAIN), **dict.fromkeys(masks, SAVE)}
    assert "call backward inside" in refused_backward(plan_of(model, batch, decisions), model, batch)


def test_a_lean_layer_cannot_run_again_as_another() -> None:
    model = adapted()
    batch = batch_for(model)
    refused_backward(next(plan for plan in plans(model, batch) if plan.lean and plan.recomputes), model, batch)


def test_a_group_of_recomputed_blocks_cannot_run_again_as_another() -> None:
    model = adapted()
    batch = batch_for(model)
    blocks = find_chain(model).blocks
    plan = plan_of(model, batch, dict.fromkeys(blocks, AGAIN))
    refused_backward(dataclasses.replace(plan, groups=(tuple(blocks[:2]),)), model, batch)


def test_blocks_that_run_again_whole_need_no_plan_in_backward() -> None:
    model = adapted()
    batch = batch_for(model)
    expected = step(model, batch)
    model.zero_grad(set_to_none=True)
    torch.manual_seed(7)
    with by_plan(model, batch):
        loss = model(**batch).loss
    loss.backward()
    assert_same(expected, {name: p.grad for name, p in model.named_parameters() if p.grad is not None})


def test_layers_whose_own_checkpointing_comes_back_with_the_plan_gone_are_refused() -> None:
    """The rerun would find it on, and checkpoint once more."""
    model: Any = adapted()
    batch = batch_for(model)
    model.activation_checkpointing_enable({"use_reentrant": False})
    refused_backward(plan_of(model, batch, dict.fromkeys(find_chain(model).blocks, AGAIN)), model, batch)
    assert all(block.gradient_checkpointing for block in model.get_base_model().model.layers)


def test_attention_in_slices_cannot_run_again_whole() -> None:
    model: Any = adapted()
    model.set_attn_implementation("eager")
    batch = batch_for(model)
    blocks = find_chain(model).blocks
    whole = plan_of(model, batch, dict.fromkeys(blocks, AGAIN))
    sliced = dataclasses.replace(whole, lean=tuple(f"{block}.self_attn#attention" for block in blocks))
    refused_backward(sliced, model, batch)


# -- hooks ------------------------------------------------------------


@pytest.mark.parametrize("call", ["in eval mode", "inside the wrapper"])
def test_a_hook_reads_what_the_forward_made_however_the_model_is_called(call: str) -> None:
    """Regions run again wherever there is a graph: also without dropout, and where the outermost forward is not run."""
    model: Any = adapted()
    batch = batch_for(model)
    blocks = find_chain(model).blocks
    last = [f"{block}.mlp.down_proj" for block in blocks]  # whose values no rerun reads: a stand-in would do
    plan = plan_of(model, batch, {**dict.fromkeys(blocks, AGAIN), **dict.fromkeys(last, SAVE)})
    read: list[torch.Tensor] = []
    model.get_submodule(last[1]).register_forward_hook(lambda *args: read.append(args[-1].pow(2).mean()))
    model.train(call != "in eval mode")
    inner = model.get_base_model() if call == "inside the wrapper" else model
    expected = step(inner, batch, read)
    model.train()
    with rematree.apply(plan, model):
        model.train(call != "in eval mode")
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".* got forward hooks after the plan was made", UserWarning)
            assert_same(expected, step(inner, batch, read))


@pytest.mark.parametrize("target", ["self_attn.q_proj", "self_attn", "mlp.down_proj", "post_attention_layernorm"])
def test_a_hook_that_comes_after_planning_reads_what_the_forward_made(target: str) -> None:
    model = adapted()
    batch = batch_for(model)
    found = plans(model, batch)
    assert any(decision is SAVE or decision == SAVE for plan in found for decision in plan.decisions.values())
    read: list[torch.Tensor] = []

    def hook(_: nn.Module, args: Any, out: Any) -> None:
        out = out[0] if isinstance(out, tuple) else out
        read.append(F.mse_loss(out, torch.ones_like(out)))

    path = f"{find_chain(model).blocks[1]}.{target}"
    model.get_submodule(path).register_forward_hook(hook)
    expected = step(model, batch, read)
    for plan in found:
        with rematree.apply(plan, model) as handle:
            if path in handle._installed.run_again:
                with pytest.warns(UserWarning, match="got forward hooks after the plan was made"):
                    assert_same(expected, step(model, batch, read))
            assert_same(expected, step(model, batch, read))
    planned_with_it = plans(model, batch, count=1, forbid=("chunked_loss", "lean_adapters", "groups"))[0]
    with rematree.apply(planned_with_it, model):
        assert_same(expected, step(model, batch, read))


# -- graphs that nobody goes through ------------------------------------------------------------


@EVERY_WAY
def test_an_evaluation_with_a_graph_leaves_nothing(ours: Any) -> None:
    """Without `no_grad` a cache is on, and it must not be held by the graph that holds its keys."""
    model = with_lora(build("llama"))
    batch = batch_for(model)

    def caches() -> int:
        model.eval()
        model(**batch, use_cache=True).loss.item()
        model.train()
        gc.collect()
        return sum(type(each) is DynamicCache for each in gc.get_objects())

    before = caches()
    with ours(model, batch):
        assert [caches() for _ in range(3)] == [before] * 3


# -- others around it ------------------------------------------------------------


def test_a_model_can_be_stored_after_a_step() -> None:
    model = adapted()
    batch = batch_for(model)
    for plan in plans(model, batch):
        with rematree.apply(plan, model):
            step(model, batch)
            stored = io.BytesIO()
            torch.save(model, stored)
            assert stored.tell()


@pytest.fixture
def _no_accelerator_before() -> Iterator[None]:
    """What earlier tests have told accelerate holds for the process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.usefixtures("_no_accelerator_before")
def test_a_plan_under_somebody_elses_wrapper_is_gone_when_it_is_removed() -> None:
    model: Any = adapted()
    batch = batch_for(model)
    handle = rematree.apply(plans(model, batch)[0], model)
    wrapped: Any = Accelerator(cpu=True, mixed_precision="bf16").prepare(model)
    step(wrapped, batch)
    handle.remove()
    larger = {name: torch.cat([tensor, tensor]) for name, tensor in batch.items()}
    step(wrapped, larger)  # no plan refuses it
    assert handle.forwards == 1


def test_copies_of_a_model_are_refused() -> None:
    model = adapted()
    batch = batch_for(model)
    plan = plan_of(model, batch, {})
    copies = nn.DataParallel(model)
    for refused in (lambda: rematree.apply(plan, copies), lambda: Planner(copies, batch, cost=COST)):
        with pytest.raises(UsageError, match=r"nn.DataParallel runs copies of the model") as caught:
            refused()
        assert "torchrun --nproc_per_node 2" in str(caught.value)
    with pytest.raises(UsageError, match=r"nn\.DataParallel") as caught:
        refuse_copies(model, 4)
    assert "torchrun --nproc_per_node 4" in str(caught.value)
    refuse_copies(model, 1)


def test_a_trainer_that_would_make_copies_is_refused(tmp_path: Path) -> None:
    model: Any = adapted()
    arguments = quiet_arguments(tmp_path)
    arguments._n_gpu = 2
    with pytest.raises(UsageError, match=r"nn\.DataParallel"):
        BudgetCallback().on_train_begin(arguments, None, None, model=model)
    model.is_loaded_in_4bit = True  # of which it makes none
    with pytest.raises(UsageError, match="no budget"):
        BudgetCallback().on_train_begin(arguments, None, None, model=model)


@EVERY_WAY
def test_a_rerun_finds_the_attention_kernels_of_its_forward(ours: Any) -> None:
    model = adapted()
    batch = batch_for(model)

    def gradients() -> dict[str, torch.Tensor]:
        model.zero_grad(set_to_none=True)
        torch.manual_seed(7)
        with sdpa_kernel(SDPBackend.MATH):
            loss = model(**batch).loss
        assert torch.backends.cuda.flash_sdp_enabled()
        loss.backward()
        assert torch.backends.cuda.flash_sdp_enabled()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    expected = gradients()
    with ours(model, batch):
        assert_same(expected, gradients())


def test_a_copy_under_a_plan_steps_as_the_model_does() -> None:
    model = adapted()
    batch = batch_for(model)
    expected = step(model, batch)
    with by_plan(model, batch):
        step(model, batch)
        assert_same(expected, step(copy.deepcopy(model), batch))
