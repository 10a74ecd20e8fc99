"""Lean adapters where dropout is one kernel, as on a GPU: the mask is drawn again in backward, from the right state.

Here with the fused operation's CPU form, which plain PEFT is given too; on a device: test_gpu.py.
"""

from typing import Any

import pytest
import torch
from torch import nn

from models import assert_same, batch_for, build, gradients, with_lora
from rematree.execute.dropout import mask_can_be_kept
from test_exactness import check_five_budgets
from test_lean_adapters import assert_lean_is_plain, lean, several_adapters


@pytest.fixture(autouse=True)
def _one_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    own = nn.functional.dropout

    def fused(input: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> torch.Tensor:
        if training and not inplace and 0 < p < 1 and input.numel():
            return torch.native_dropout(input, p, True)[0]
        return own(input, p, training, inplace)

    monkeypatch.setattr(nn.functional, "dropout", fused)
    for module in ("dropout", "adapters"):
        monkeypatch.setattr(f"rematree.execute.{module}.drawn_apart", lambda x: False)


def test_no_mask_is_kept() -> None:
    assert not mask_can_be_kept(nn.Dropout(0.5), torch.ones(2, 8))


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_one_adapter(name: str, dtype: torch.dtype) -> None:
    model = with_lora(build(name, layers=2)).to(dtype)
    assert_lean_is_plain(model, batch_for(model, rows=1, tokens=16))


@pytest.mark.parametrize("names", [("default", "second"), ("default", "second", "third")], ids=["two", "three"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16], ids=["on fp32", "on bf16"])
def test_several_adapters_draw_a_mask_each(base: torch.dtype, dtype: torch.dtype, names: tuple[str, ...]) -> None:
    """Behind one cast they are one node; its second mask does not begin where the first did."""
    model = several_adapters(build("llama", layers=2).to(base), dropout=0.3, dtype=dtype, names=names)
    assert_lean_is_plain(model, batch_for(model, rows=1, tokens=16))


def test_under_autocast() -> None:
    model = several_adapters(build("llama", layers=2).to(torch.bfloat16), dropout=0.3)
    batch = batch_for(model, rows=1, tokens=16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = gradients(model, batch)
        with lean(model):
            assert_same(expected, gradients(model, batch))


@pytest.mark.parametrize("kind", ["one", "two"])
def test_plans(kind: str) -> None:
    """Lean layers inside recomputed blocks and groups draw in a rerun what they drew in the forward."""
    base: Any = build("llama").to(torch.bfloat16)
    model = with_lora(base) if kind == "one" else several_adapters(base, dropout=0.3)
    planner = check_five_budgets(model, ["chunked_loss"])
    assert planner.plan(planner.min_peak_bytes()).lean
