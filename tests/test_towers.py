"""Models of several towers: which of them is planned, and what the others keep."""

from types import SimpleNamespace
from typing import Any

import torch
import transformers
from torch import nn

import rematree
from checkpointed_models import step
from models import assert_same, batch_for, with_lora
from rematree.planning.planner import Planner
from rematree.pricing.cost import Roofline
from test_values import TEXT

COST = Roofline(5e10, 1e10)


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down, self.dropout = nn.Linear(width, 4 * width), nn.Linear(4 * width, width), nn.Dropout(0.2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(self.dropout(torch.tanh(self.up(x))))


class TwoTowers(nn.Module):
    """The larger tower looks at pictures, if there are any."""

    def __init__(self) -> None:
        super().__init__()
        self.seeing = nn.ModuleList(Block(32) for _ in range(6))
        self.reading = nn.ModuleList(Block(8) for _ in range(4))
        self.join = nn.Linear(32, 8)

    def forward(self, words: torch.Tensor, picture: torch.Tensor | None = None) -> Any:
        if picture is not None:
            for block in self.seeing:
                picture = block(picture)
            words = words + self.join(picture)
        for block in self.reading:
            words = block(words)
        return SimpleNamespace(loss=words.square().mean())


def test_the_largest_tower_that_runs_is_planned() -> None:
    torch.manual_seed(0)
    model = TwoTowers().train()
    words, picture = torch.randn(256, 8), torch.randn(256, 32)
    for batch, tower in (({"words": words}, "reading"), ({"words": words, "picture": picture}, "seeing")):
        expected = step(model, batch)
        planner = Planner(model, batch, cost=COST, optimizer="none")
        assert {path.partition(".")[0] for path in planner.survey.chain.blocks} == {tower}
        plan = planner.plan(planner.min_peak_bytes())
        assert plan.recomputes
        with rematree.apply(plan, model):
            assert_same(expected, step(model, batch))


def test_a_cache_that_only_an_inner_tower_is_asked_for() -> None:
    """Qwen 3.5's outer forward does not name `use_cache`; its linear attention would write into one twice."""
    text: dict[str, Any] = {
        **TEXT,
        "linear_num_value_heads": 4,
        "linear_num_key_heads": 2,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "layer_types": ["linear_attention", "full_attention"] * 2,
    }
    vision = {"depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 4, "out_hidden_size": 32}
    torch.manual_seed(0)
    config = transformers.Qwen3_5Config(text_config=text, vision_config=vision, image_token_id=150)
    reading = r".*language_model.*\.(q_proj|out_proj|up_proj|down_proj)"
    model: Any = with_lora(transformers.Qwen3_5ForConditionalGeneration(config), target_modules=reading)
    batch = batch_for(model)
    inner = model.get_base_model().config.text_config
    inner.use_cache = False  # the plain step under a cache takes other kernels
    expected = step(model, batch)
    inner.use_cache = True
    assert model(**batch).past_key_values is not None
    planner = Planner(model, batch, optimizer="none", cost=COST, forbid=["chunked_loss"])
    low = planner.min_peak_bytes()
    for plan in planner.plans([low, (low + planner.plain_step()[0]) // 2]):
        assert plan.recomputes
        with rematree.apply(plan, model):
            assert_same(expected, step(model, batch))
            assert model(**batch).past_key_values is None
            with torch.no_grad():
                assert model.eval()(**batch).past_key_values is not None
            model.train()
