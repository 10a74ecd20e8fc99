"""Gradients that are wrong upstream without an error, beside ours: both with the switch and with a plan.

Numbers in the names are those of `upstream_bugs.md`. `upstream_is_wrong` fails once a library has mended its bug, so
that its half of the test can go.
"""

import contextlib
import functools
import warnings
from collections.abc import Generator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed
import transformers
from accelerate.utils import FullyShardedDataParallelPlugin
from accelerate.utils.fsdp_utils import fsdp2_apply_ac
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointImpl,
    apply_activation_checkpointing,
    checkpoint_wrapper,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils.checkpoint import CheckpointError

import rematree
from both_paths import EVERY_WAY, Ours, by_plan, differ
from checkpointed_models import PLAIN_BATCH, Plain, by_rematree, by_transformers, step, upstream_is_wrong
from models import assert_same, batch_for, build, with_lora

Found = dict[str, torch.Tensor]
GATE = "base_model.model.model.layers.1.mlp.gate_proj"
# PEFT hooks the layers whose flag is on; on the first of them it looks for gradients of inputs that are frozen.
HOOKED = pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning")


# ------------------------------------------------------------------------------------- 4.2, 4.3: what travels beside


def alora() -> tuple[Any, dict[str, torch.Tensor]]:
    """Activated LoRA: the adapter acts from the last invocation tokens on, which differ from row to row."""
    model = with_lora(build("llama"), alora_invocation_tokens=[7, 8], task_type="CAUSAL_LM")
    batch = batch_for(model)
    batch["input_ids"][0, 10:12] = batch["input_ids"][1, 20:22] = torch.tensor([7, 8])
    return model, batch


def step_of_two(model: Any, batch: dict[str, torch.Tensor]) -> Found:
    """Two forwards, as DPO does with chosen and rejected answers, and one backward."""
    torch.manual_seed(3)
    other = {name: tensor.flip(0) for name, tensor in batch.items()}
    loss = model(**batch).loss - 2 * model(**other).loss
    loss.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return {"loss": loss.detach(), **found}


def fsdp2_checkpointing(model: Any, layer: str = "LlamaDecoderLayer") -> Any:
    """What `Accelerator.prepare` does for fsdp_version 2 with activation_checkpointing."""
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", transformer_cls_names_to_wrap=[layer]
    )
    return fsdp2_apply_ac(SimpleNamespace(state=SimpleNamespace(fsdp_plugin=plugin)), model)


def without_wrapper(found: Found) -> Found:
    return {name.replace("_checkpoint_wrapped_module.", ""): gradient for name, gradient in found.items()}


@HOOKED
def test_4_2_offsets_of_activated_lora_upstream() -> None:
    """PEFT keeps the offsets in hooks: gone before backward, or kept by transformers' flag for one forward only."""
    model, batch = alora()
    expected = step(model, batch)
    assert any(bool(gradient.any()) for name, gradient in expected.items() if "lora_A" in name)
    with by_transformers(model), pytest.raises(ValueError, match="Multiple invocations of PEFT forward hooks"):
        step_of_two(model, batch)
    with pytest.raises(CheckpointError, match="different number of tensors was saved"):
        step(fsdp2_checkpointing(model), batch)
    model = alora()[0]
    model.enable_input_require_grads()
    kind = transformers.models.llama.modeling_llama.LlamaDecoderLayer
    reentrant = functools.partial(checkpoint_wrapper, checkpoint_impl=CheckpointImpl.REENTRANT)
    apply_activation_checkpointing(model, reentrant, lambda module: isinstance(module, kind))
    found = {name: g for name, g in step(model, batch).items() if "lora_" in name}
    assert len(found) == len(expected) - 1
    upstream_is_wrong(not any(bool(g.any()) for g in found.values()), "every adapter's gradient is zero")


@HOOKED
@EVERY_WAY
def test_4_2_offsets_of_activated_lora(ours: Ours) -> None:
    model, batch = alora()
    expected = step(model, batch)
    with ours(model, batch):
        assert_same(expected, step(model, batch))
        assert_same(expected, step(model, batch))


@HOOKED
@EVERY_WAY
def test_4_2_two_forwards_of_activated_lora(ours: Ours) -> None:
    model, batch = alora()
    expected = step_of_two(model, batch)
    with ours(model, batch):
        assert_same(expected, step_of_two(model, batch))


# A side channel of one's own: the scale comes from a variable that the loop sets, as adapter-hub's ForwardContext does.


class Channel:
    """What a layer reads besides its arguments."""

    def __init__(self) -> None:
        self.gain = 1.0

    def attach(self, model: Any) -> Any:
        layer = model.get_submodule("base_model.model.model.layers.1.mlp")
        return layer.register_forward_hook(lambda _module, _inputs, out: torch.tanh(out * self.gain))

    def step(self, model: Any, batch: dict[str, torch.Tensor]) -> Found:
        """Two forwards with a gain of their own each, one backward."""
        torch.manual_seed(3)
        self.gain = 2.0
        one = model(**batch).loss
        self.gain = -3.0
        two = model(**batch).loss
        self.gain = 5.0
        (one + two).backward()
        found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        model.zero_grad(set_to_none=True)
        assert self.gain == 5.0
        return {"loss": (one + two).detach(), **found}

    def contexts(self) -> tuple[Any, Any]:
        """For `context_fn`: called at forward time, so it can note the present value for the rerun."""

        @contextlib.contextmanager
        def again(gain: float) -> Generator[None]:
            present, self.gain = self.gain, gain
            try:
                yield
            finally:
                self.gain = present

        return contextlib.nullcontext(), again(self.gain)


def test_4_3_a_side_channel_can_be_captured() -> None:
    model = with_lora(build("llama"))
    batch = batch_for(model)
    channel = Channel()
    hook = channel.attach(model)
    expected = channel.step(model, batch)
    for use_reentrant in (False, True):
        with by_transformers(model, {"use_reentrant": use_reentrant}):
            wrong = differ(expected, channel.step(model, batch))
            upstream_is_wrong(wrong, "the rerun reads the variable as it is at backward time")
    with by_plan(model, batch) as handle:
        handle.capture(lambda: channel.gain, lambda gain: setattr(channel, "gain", gain))
        assert_same(expected, channel.step(model, batch))
    with by_rematree(model, {"context_fn": channel.contexts}):
        assert_same(expected, channel.step(model, batch))
    hook.remove()


# ------------------------------------------------------------------------------------------------ 4.4, 4.5: dropout


def test_4_4_dropout_under_fsdp2_upstream() -> None:
    """accelerate wraps each layer in `checkpoint_wrapper(layer, preserve_rng_state=False)`."""
    model = with_lora(build("llama"))
    batch = batch_for(model)
    expected = step(model, batch)
    found = without_wrapper(step(fsdp2_checkpointing(model), batch))
    assert torch.equal(found["loss"], expected["loss"])
    name = "base_model.model.model.layers.1.self_attn.q_proj.lora_A.default.weight"
    error = float((found[name] - expected[name]).norm() / expected[name].norm())
    upstream_is_wrong(error > 0.05, "the rerun draws other dropout masks than the forward")
    exact = with_lora(build("llama"), lora_dropout=0.0)
    expected = step(exact, batch)
    assert_same(expected, without_wrapper(step(fsdp2_checkpointing(exact), batch)))


@pytest.mark.parametrize("decided", ["before the adapters", "after the adapters"])
def test_4_5_dropout_that_comes_after_checkpointing(decided: str) -> None:
    """Whether random state is needed is not decided when checkpointing is switched on, but in each call of a layer."""
    expected = step(with_lora(build("llama")), batch_for(build("llama")))
    model: Any = build("llama")
    kwargs = {"preserve_rng_state": False}
    if decided == "before the adapters":
        model.activation_checkpointing_enable({"use_reentrant": False, **kwargs})
        adapted: Any = with_lora(model)
        upstream_is_wrong(differ(expected, step(adapted, batch_for(model))), "preserve_rng_state is taken at its word")
        model = build("llama")
        rematree.activation_checkpointing_enable(model, kwargs)
        adapted = with_lora(model)
    else:
        adapted = with_lora(model)
        rematree.activation_checkpointing_enable(adapted, kwargs)
    assert_same(expected, step(adapted, batch_for(model)))
    rematree.activation_checkpointing_disable(adapted)
    for module in adapted.modules():  # and dropout that is turned up once a plan is in force is another plan's business
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    expected = step(adapted, batch_for(model))
    with by_plan(adapted, batch_for(model)):
        assert_same(expected, step(adapted, batch_for(model)))


@EVERY_WAY
def test_4_4_sharded_parameters(ours: Ours) -> None:
    """FSDP2's own classes around the layers, on one process: dropout, and parameters that are DTensors."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        model = with_lora(build("llama", layers=2))
        batch = batch_for(model)
        expected = step(model, batch)
        mesh = init_device_mesh("cpu", (1,))
        for layer in model.get_submodule("base_model.model.model.layers").children():
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        with ours(model, batch):
            found = step(model, batch)
        whole = {name: g.full_tensor() if hasattr(g, "full_tensor") else g for name, g in found.items()}  # pyright: ignore[reportAttributeAccessIssue]
        assert_same(expected, whole)
    finally:
        torch.distributed.destroy_process_group()


# ------------------------------------------------------------------------------- 4.6, 4.7: adapters that never train


def frozen_behind_a_head() -> tuple[Any, Found]:
    """An image classifier: adapters in the layers, and a head that trains, so the loss falls whatever they do."""
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, image_size=16, patch_size=8
    )
    base = transformers.ViTForImageClassification(config)
    model = with_lora(base, target_modules=["q_proj", "v_proj"], modules_to_save=["classifier"])
    return model, {"pixel_values": torch.randn(2, 3, 16, 16), "labels": torch.tensor([0, 1])}


def test_4_6_reentrant_over_a_frozen_input_trains_no_adapter_upstream() -> None:
    model, batch = frozen_behind_a_head()
    expected = step(model, batch)
    with by_transformers(model, {"use_reentrant": True}), warnings.catch_warnings():
        warnings.simplefilter(
            "ignore"
        )  # torch says "None of the inputs have requires_grad=True", as it does when all is well
        found = step(model, batch)
    assert torch.equal(found["loss"], expected["loss"])
    trained = [name for name, gradient in found.items() if "lora_" in name and bool(gradient.any())]
    upstream_is_wrong(trained == [] and len(expected) > 5, "the loss falls, the head trains, no adapter does")


@EVERY_WAY
def test_4_6_adapters_behind_a_frozen_input_train(ours: Ours) -> None:
    model, batch = frozen_behind_a_head()
    expected = step(model, batch)
    assert sum("lora_" in name for name in expected) == 12
    with ours(model, batch):
        assert_same(expected, step(model, batch))


@EVERY_WAY
def test_4_7_a_container_that_no_pattern_knows(ours: Ours) -> None:
    """Megatron looked for names of containers; here adapters count, wherever they are."""
    model = Plain()
    config = LoraConfig(target_modules=["up", "down"], lora_dropout=0.1, init_lora_weights=False)
    adapted: Any = get_peft_model(model, config).train()  # pyright: ignore[reportArgumentType]
    expected = step(adapted, PLAIN_BATCH)
    assert len(expected) == 1 + 2 * 2 * 5
    with ours(adapted, PLAIN_BATCH):
        assert_same(expected, step(adapted, PLAIN_BATCH))


# --------------------------------------------------------------------------------------------- 4.8: towers of a model


def vision_language() -> tuple[Any, Found]:
    torch.manual_seed(0)
    sizes: Any = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**sizes, num_hidden_layers=3, image_size=16, patch_size=8),
        text_config=transformers.LlamaConfig(**sizes, num_hidden_layers=2, num_key_value_heads=2, vocab_size=99),
        image_token_index=98,
        vision_feature_layer=-1,
    )
    model = with_lora(transformers.LlavaForConditionalGeneration(config), target_modules=["q_proj", "v_proj"])
    ids = torch.randint(3, 90, (2, 12))
    ids[:, 1:5] = 98
    return model, {"input_ids": ids, "labels": ids.clamp(max=90), "pixel_values": torch.randn(2, 3, 16, 16)}


def test_4_8_one_hook_for_two_towers() -> None:
    """The hook that people were told to write, on the one embedding that the model names: the vision tower loses."""
    model, batch = vision_language()
    expected = step(model, batch)
    base = model.get_base_model()
    with by_transformers(model, {"use_reentrant": True}):
        base.disable_input_require_grads()
        hook = base.get_input_embeddings().register_forward_hook(lambda _m, _i, out: out.requires_grad_(True))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = step(model, batch)
        hook.remove()
    lost = [name for name in expected if "vision_tower" in name and not (name in found and bool(found[name].any()))]
    assert len(lost) == 12
    assert torch.equal(found["loss"], expected["loss"])
    with by_transformers(model, {"use_reentrant": True}):  # transformers 5.23 hooks each tower
        assert_same(expected, step(model, batch))


@EVERY_WAY
def test_4_8_every_tower_trains(ours: Ours) -> None:
    model, batch = vision_language()
    expected = step(model, batch)
    assert sum("vision_tower" in name and bool(gradient.any()) for name, gradient in expected.items()) == 12
    with ours(model, batch):
        assert_same(expected, step(model, batch))
