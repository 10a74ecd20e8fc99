"""Models that look at values of their batch: image-text models, whose pictures stand among the words."""

import weakref
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import rematree
from checkpointed_models import step
from models import assert_same, batch_for, build, with_lora
from rematree.errors import UnsupportedModelError
from rematree.measure import PeakMeter
from rematree.observation.observe import Twin
from rematree.planning.planner import Planner
from rematree.pricing.cost import Roofline
from rematree.verification import PEAK_SLACK

COST = Roofline(5e10, 1e10)
IMAGE = 150  # the token in whose place a part of a picture stands
TEXT: dict[str, Any] = {
    "vocab_size": 151,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "use_cache": False,
}
Batch = dict[str, torch.Tensor]


def words(model: nn.Module) -> Batch:
    batch = batch_for(model)
    batch["input_ids"].clamp_(max=IMAGE - 1)[:, 4:8] = IMAGE
    return batch


def gemma3() -> tuple[nn.Module, Batch]:
    """Counts the tokens of pictures, and indexes with a mask."""
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.Gemma3Config(
        text_config=TEXT,
        vision_config={**vision, "image_size": 56, "patch_size": 14},
        mm_tokens_per_image=4,
    )
    config.image_token_id = IMAGE
    model = transformers.Gemma3ForConditionalGeneration(config).train()
    nn.init.normal_(model.model.multi_modal_projector.mm_input_projection_weight, std=0.1)  # zeros as it is made
    batch = words(model)
    pixels = torch.randn(2, 3, 56, 56, generator=torch.Generator().manual_seed(2))
    return model, {**batch, "pixel_values": pixels, "token_type_ids": (batch["input_ids"] == IMAGE).long()}


def qwen25() -> tuple[nn.Module, Batch]:
    """Goes through the sizes of pictures in Python, and repeats by counts of patches."""
    vision = {"depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 4, "out_hidden_size": 32}
    config = transformers.Qwen2_5_VLConfig(
        text_config={
            **TEXT,
            "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4},
        },
        vision_config={**vision, "patch_size": 14, "window_size": 56, "fullatt_block_indexes": [1]},
        image_token_id=IMAGE,
    )
    model = transformers.Qwen2_5_VLForConditionalGeneration(config).train()
    batch = words(model)
    patches = torch.randn(2 * 16, 3 * 2 * 14 * 14, generator=torch.Generator().manual_seed(2))
    sizes = torch.tensor([[1, 4, 4], [1, 4, 4]])
    kinds = (batch["input_ids"] == IMAGE).int()
    return model, {**batch, "pixel_values": patches, "image_grid_thw": sizes, "mm_token_type_ids": kinds}


@pytest.mark.parametrize(("make", "lora"), [(gemma3, False), (gemma3, True), (qwen25, True)])
def test_models_with_pictures_are_planned(make: Any, lora: bool) -> None:
    torch.manual_seed(0)
    model, batch = make()
    if lora:
        model = with_lora(
            model, target_modules=r".*language_model.*(q_proj|down_proj)|.*visual.*(qkv|proj)|.*tower.encoder.*fc1"
        )
    expected = step(model, batch)
    planner = Planner(model, batch, optimizer="none", cost=COST, forbid=["chunked_loss"])
    low = planner.min_peak_bytes()
    for plan in planner.plans([low, (low + planner.plain_step()[0]) // 2]):
        assert plan.recomputes
        with rematree.apply(plan, model):
            assert_same(expected, step(model, batch))
            with PeakMeter(model, None, batch) as meter:
                step(model, batch)
        assert 0 <= plan.predicted_peak_bytes - meter.peak_bytes <= PEAK_SLACK + (64 << 10)


def test_values_are_asked_only_where_nothing_else_does() -> None:
    model = with_lora(build("llama"))
    batch = batch_for(model)
    twin = Twin(model, batch)
    with twin.mode:
        twin.loss()
    held = weakref.ref(batch["input_ids"])
    del batch
    assert held() is None, "a planner that is kept does not keep its batch"
    assert not twin.mode.knows_values
    assert twin.mode.recipes.has_value is None


def test_without_values_the_model_is_refused() -> None:
    """A batch of which only the shapes are there, as `rematree plan` has it."""
    model, batch = gemma3()
    shapes = {name: tensor.to("meta") for name, tensor in batch.items()}
    with pytest.raises(UnsupportedModelError, match="depends on values of tensors"):
        Planner(model, shapes, optimizer="none", cost=COST)


class Looks(nn.Module):
    """Its loss is made of what the values of `ids` say."""

    def __init__(self, ask: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(8))
        self.ask = ask

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.ask(self, ids)


IDS = torch.tensor([[3, 0, 5, 0], [1, 2, 0, 4]])


@pytest.mark.parametrize(
    "ask",
    [
        lambda m, ids: m.weight[: ids.max().item()].sum(),
        lambda m, ids: m.weight[ids[ids > 0]].square().sum(),
        lambda m, ids: m.weight.expand(4, 8)[torch.tensor([True, False, True, True])].sum() * ids.sum(),
        lambda m, ids: (m.weight[: len((ids == 0).nonzero())] * torch.arange(3)).sum(),
        lambda m, ids: m.weight[torch.tensor([ids[0, 0] - 1, ids[1, 1]])].sum(),
        lambda m, ids: m.weight[: len(torch.repeat_interleave(torch.arange(2), (ids > 0).sum(1) - 1))].sum(),
        lambda m, ids: m.weight[: int(ids.clone().masked_fill_(ids > 3, 1).sum())].sum(),
    ],
)
def test_what_follows_from_the_batch_alone_is_known(ask: Any) -> None:
    model, batch = Looks(ask), {"ids": IDS}
    twin = Twin(model, batch, loss=lambda output: output)
    with twin.mode:
        loss = twin.loss()
        (gradient,) = torch.autograd.grad(loss, list(twin.model.parameters()))
    assert twin.mode.knows_values
    assert gradient.shape == (8,)
    assert torch.equal(IDS, torch.tensor([[3, 0, 5, 0], [1, 2, 0, 4]])), "the batch itself is only read"
    assert model(IDS).shape == loss.shape


@pytest.mark.parametrize(
    "ask",
    [
        lambda m, ids: m.weight[: int(m.weight.sum())].sum() + ids.sum(),
        lambda m, ids: m.weight[: torch.randint_like(ids, 8).max().item()].sum(),
        lambda m, ids: m.weight[: int(ids.clone().mul_(m.weight[:4].detach().long()).sum())].sum(),
    ],
)
def test_what_weights_or_chance_have_a_part_in_is_not(ask: Any) -> None:
    twin = Twin(Looks(ask), {"ids": IDS}, loss=lambda output: output)
    with pytest.raises(UnsupportedModelError, match="depends on values of tensors"), twin.mode:
        twin.loss()


class Converting(nn.Module):
    """Converts its own layer whenever it runs, as the routers of Switch Transformers do."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        held = [weakref.ref(parameter) for parameter in self.inner.parameters()]
        self.inner = self.inner.to(torch.float32)
        assert held
        return self.inner(x)


def test_a_module_that_is_converted_in_the_forward_is_named() -> None:
    model = nn.Sequential(*(Converting() for _ in range(3)))
    twin = Twin(model, {"input": torch.ones(2, 8)}, lambda out: out.sum())
    with twin.mode, pytest.raises(UnsupportedModelError, match=r"converts a module in its forward at test_values\.py:"):
        twin.loss()


def test_layers_that_are_left_out_by_chance_are_named() -> None:
    """And with the remedies of the message the model is planned, exactly."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}
    config = transformers.M2M100Config(
        vocab_size=99, d_model=32, encoder_attention_heads=4, decoder_attention_heads=4, use_cache=False, **sizes
    )
    assert config.encoder_layerdrop > 0
    model = transformers.M2M100ForConditionalGeneration(config).train()
    batch = {"input_ids": torch.randint(3, 99, (2, 12)), "labels": torch.randint(3, 99, (2, 12))}
    with pytest.raises(UnsupportedModelError, match=r"by chance.*model\.encoder\.layerdrop is 0\.05") as caught:
        Planner(model, batch, optimizer="none", cost=COST)
    for remedy in caught.value.remedies:
        exec(remedy, {"model": model})
    planner = Planner(model, batch, optimizer="none", cost=COST, forbid=["chunked_loss"])
    plan = planner.plan(planner.min_peak_bytes())
    expected = step(model, batch)
    with rematree.apply(plan, model):
        assert_same(expected, step(model, batch))
