"""After the first step, every adapter without a gradient is named: once, and only if there is one."""

import copy
import gc
import warnings
import weakref
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils.checkpoint import checkpoint

from both_paths import EVERY_WAY, Ours
from checkpointed_models import CASES, EXPERTS, by_transformers, qwen3_moe, state_of, step
from models import assert_same, batch_for, build, with_lora
from rematree.execute.self_check import AdapterCheck

LAYERS = "base_model.model.model.layers"


class Parts(nn.Module):
    """Blocks by name; `route` says which of them run, and whether a reentrant checkpoint cuts one off."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))
        self.head = nn.Linear(8, 1)
        self.route: list[int] = [0, 1, 2, 3]
        self.cut: list[int] = []

    def forward(self, x: torch.Tensor) -> Any:
        for index in self.route:
            block = self.blocks[index]
            x = x + torch.tanh(block(x) if index not in self.cut else self._cut_off(block, x))
        return SimpleNamespace(loss=self.head(x).square().mean())

    @staticmethod
    def _cut_off(block: nn.Module, x: torch.Tensor) -> Any:
        """A branch with a frozen input: its gradient is lost."""
        return checkpoint(block, x.detach(), use_reentrant=True)


BATCH = {"x": torch.randn(3, 8, generator=torch.Generator().manual_seed(1))}


def parts(**options: Any) -> Any:
    """Adapters as PEFT makes them: B is zero, so A's first gradient is zero as well. The head trains."""
    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=[f"blocks.{i}" for i in range(4)], modules_to_save=["head"], **options)
    return get_peft_model(Parts(), config).train()  # pyright: ignore[reportArgumentType]


def path(*indices: int) -> tuple[str, ...]:
    return tuple(f"base_model.model.blocks.{i}" for i in indices)


def said(action: Callable[[], Any]) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        action()
    return [str(item.message) for item in caught if "have no gradient" in str(item.message)]


def train(model: Any, check: AdapterCheck, batch: dict[str, torch.Tensor] = BATCH) -> None:
    check.forward_begins()
    model(**batch).loss.backward()


@EVERY_WAY
def test_nothing_is_said_where_every_adapter_trains(ours: Ours) -> None:
    """Also at the very first step, with B at zero; and nothing stays behind."""
    model: Any = get_peft_model(build("llama"), LoraConfig(r=4, target_modules="all-linear"))  # pyright: ignore[reportArgumentType]
    model.train()
    batch = batch_for(model)
    before = state_of(model)
    expected = step(model, batch)
    with ours(model, batch):
        check = AdapterCheck(model)
        check.forward_begins()
        assert_same(expected, step(model, batch))
        assert check.silent == ()
        assert said(check.forward_begins) == said(check.remove) == []
    assert state_of(model) == before
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())  # pyright: ignore[reportAttributeAccessIssue]


def test_an_adapter_that_did_not_run_is_named_once() -> None:
    model = parts()
    model.get_base_model().route = [0, 3]
    check = AdapterCheck(model)
    assert check.silent == ()
    train(model, check)
    assert check.silent == path(1, 2)
    (message,) = said(check.forward_begins)
    assert message.startswith("after the first training step 2 of 4 adapters have no gradient:\n")
    assert "  base_model.model.blocks.{1-2}\n" in message
    assert "an expert without tokens" in message
    assert "use_reentrant=False" in message
    assert "active" not in message
    assert check.silent == path(1, 2)
    train(model, check)
    assert said(check.forward_begins) == said(check.remove) == []


def test_an_adapter_behind_a_frozen_input() -> None:
    """Upstream's reentrant checkpointing: the head trains, the loss falls, the adapters never do."""
    model = parts()
    model.get_base_model().cut = [1]
    check = AdapterCheck(model)
    with pytest.warns(UserWarning, match="None of the inputs have requires_grad"):
        train(model, check)
    (message,) = said(check.remove)
    assert "1 of 4" in message
    assert "base_model.model.blocks.1\n" in message


@pytest.mark.parametrize("kwargs", [{"use_reentrant": True}, {"use_reentrant": False}], ids=str)
def test_all_adapters_silent_under_transformers_switch(kwargs: dict[str, Any]) -> None:
    model = with_lora(build("llama"), target_modules=["q_proj"], modules_to_save=["lm_head"])
    base: Any = model.get_base_model()  # pyright: ignore[reportCallIssue]
    with by_transformers(model, kwargs), warnings.catch_warnings():
        base.disable_input_require_grads()
        warnings.simplefilter("ignore")
        check = AdapterCheck(model)
        train(model, check, batch_for(model))
    names = said(check.remove)
    assert len(names) == (1 if kwargs["use_reentrant"] else 0)
    assert all(f"4 of 4 adapters have no gradient:\n  {LAYERS}.{{0-3}}.self_attn.q_proj\n" in name for name in names)


def test_an_adapter_that_is_trained_and_not_active() -> None:
    model = parts()
    model.add_adapter("other", LoraConfig(r=2, target_modules=["blocks.0", "blocks.1"]))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
    check = AdapterCheck(model)
    train(model, check)
    assert check.silent == tuple(f"{name}[other]" for name in path(0, 1))
    (message,) = said(check.remove)
    assert "2 of 6" in message
    assert "trained but not active: model.set_adapter(...) decides" in message
    assert "likely because" not in message


def test_what_is_trained_is_asked_again_until_there_was_a_step() -> None:
    model = parts()
    check = AdapterCheck(model)
    for name, parameter in model.named_parameters():
        if "blocks.2" in name:
            parameter.requires_grad_(False)
    train(model, check)
    assert check.silent == ()
    assert said(check.remove) == []


def test_experts_without_tokens() -> None:
    """Stacked in one parameter they are one adapter; it has a gradient as soon as one expert has."""
    model = with_lora(qwen3_moe(), **EXPERTS)
    check = AdapterCheck(model)
    train(model, check, CASES["qwen3-moe"].batch())
    assert check.silent == ()
    check.remove()


def test_no_step_no_report() -> None:
    model = parts()
    check = AdapterCheck(model)
    assert said(check.forward_begins) == []
    with torch.no_grad():
        model(**BATCH)
    assert said(check.forward_begins) == said(check.remove) == []
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())
    plain = nn.Linear(3, 3)
    check = AdapterCheck(plain)
    plain(torch.ones(1, 3)).sum().backward()
    assert plain.weight._post_accumulate_grad_hooks is None  # pyright: ignore[reportAttributeAccessIssue]
    assert said(check.forward_begins) == []


def test_gradients_are_accumulated_undisturbed() -> None:
    """The first of the backwards is judged; gradients are the same with the check and without."""
    model, twin = parts(), parts()
    twin.load_state_dict(model.state_dict())
    check = AdapterCheck(model)
    for _ in range(3):
        train(model, check)
        twin(**BATCH).loss.backward()
    for one, other in zip(model.parameters(), twin.parameters(), strict=True):
        assert (one.grad is None) == (other.grad is None)
        assert one.grad is None or torch.equal(one.grad, other.grad)
    model.get_base_model().route = [0]
    train(model, check)
    assert said(check.remove) == []


class Stops(torch.autograd.Function):
    """An exception in backward."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        raise KeyError("a fault of the model")


@pytest.mark.parametrize("cut", [False, True])
@pytest.mark.parametrize("faults", [1, 2])
def test_an_exception_in_backward_is_not_a_step(cut: bool, faults: int) -> None:
    model = parts()
    check = AdapterCheck(model)
    for _ in range(faults):
        hook = model.get_base_model().blocks[1].register_forward_hook(lambda _m, _i, out: Stops.apply(out))
        with pytest.raises(KeyError, match="a fault"):
            train(model, check)
        hook.remove()
        assert said(check.forward_begins) == []
    if cut:
        model.get_base_model().route = [1, 2, 3]
        train(model, check)
        (message,) = said(check.remove)
        assert "1 of 4" in message
    else:
        train(model, check)
        assert said(check.remove) == []


@pytest.mark.parametrize("fault", [False, True])
def test_reentrant_checkpoints_end_many_backwards(fault: bool) -> None:
    """Each runs a backward of its own, and with all that trains inside them, nobody sees the end of the whole."""
    model = with_lora(build("llama"), target_modules=["q_proj"])
    batch = batch_for(model)
    with by_transformers(model, {"use_reentrant": True}):
        check = AdapterCheck(model)
        if fault:
            norm = model.get_submodule(f"{LAYERS}.1.input_layernorm")
            hook = norm.register_forward_hook(lambda _m, _i, out: Stops.apply(out))
            with pytest.raises(KeyError, match="a fault"):
                train(model, check, batch)
            hook.remove()
            assert said(check.forward_begins) == []
        train(model, check, batch)
        assert check.silent == ()
        assert said(check.forward_begins) == said(check.remove) == []


def test_reentrant_checkpoints_are_judged_after_a_second_step() -> None:
    model = with_lora(build("llama"), target_modules=["q_proj"])
    idle = model.get_submodule(f"{LAYERS}.2.self_attn")
    idle.register_forward_hook(lambda _m, _i, out: (out[0].detach(), *out[1:]))
    batch = batch_for(model)
    with by_transformers(model, {"use_reentrant": True}):
        check = AdapterCheck(model)
        train(model, check, batch)
        assert said(check.forward_begins) == []
        train(model, check, batch)
        (message,) = said(check.forward_begins)
    assert f"1 of 4 adapters have no gradient:\n  {LAYERS}.2.self_attn.q_proj\n" in message


def test_an_optimizer_in_backward_leaves_no_gradient_to_look_at() -> None:
    model = parts()

    def use(parameter: torch.Tensor) -> None:
        parameter.grad = None

    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(use)
    model.get_base_model().route = [0, 1, 2]
    check = AdapterCheck(model)
    train(model, check)
    assert check.silent == path(3)
    (message,) = said(check.remove)
    assert "1 of 4" in message


def test_sharded_adapters_are_heard() -> None:
    """FSDP2 assigns gradients to its shards itself, and calls the hooks of the parameters."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        model = with_lora(build("llama", layers=2), target_modules=["q_proj", "v_proj"])
        for layer in model.get_submodule(LAYERS).children():
            fully_shard(layer, mesh=init_device_mesh("cpu", (1,)))
        idle = model.get_submodule(f"{LAYERS}.1.self_attn.q_proj")
        idle.register_forward_hook(lambda _m, _i, out: out.detach())
        check = AdapterCheck(model)
        train(model, check, batch_for(model))
        assert check.silent == (f"{LAYERS}.1.self_attn.q_proj",)
        with pytest.warns(UserWarning, match="1 of 4 adapters"):
            check.remove()
    finally:
        torch.distributed.destroy_process_group()


def test_a_copy_has_nothing_to_say() -> None:
    model = parts()
    check = AdapterCheck(model)
    vars(model)["_check"] = check
    copied = copy.deepcopy(model)
    assert not any(p._post_accumulate_grad_hooks for p in copied.parameters())
    copied.get_base_model().route = [0]
    train(copied, copied._check)
    assert said(copied._check.forward_begins) == said(copied._check.remove) == []
    assert check.silent == ()
    train(model, check)
    assert said(check.forward_begins) == []
    assert copied._check.silent == ()


def test_where_warnings_are_errors_it_is_over_too() -> None:
    model = parts()
    model.get_base_model().route = [0]
    check = AdapterCheck(model)
    train(model, check)
    with pytest.raises(UserWarning, match="3 of 4 adapters"):
        check.forward_begins()
    assert said(check.forward_begins) == said(check.remove) == []
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())


def test_nothing_is_kept_alive() -> None:
    model = parts()
    check = AdapterCheck(model)
    train(model, check)
    gradients = [weakref.ref(p.grad) for p in model.parameters() if p.grad is not None]
    model.zero_grad(set_to_none=True)
    assert gradients
    assert all(gradient() is None for gradient in gradients)
    check.remove()
    alive = weakref.ref(model)
    del model
    gc.collect()
    assert alive() is None
