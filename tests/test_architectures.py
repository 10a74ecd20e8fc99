"""The benchmark that takes every architecture once: what it shrinks, what it says of a model, and its page."""

import importlib
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import transformers

from rematree.units import KIB


@pytest.fixture
def architectures(repository: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(repository / "benchmarks"))
    return importlib.import_module("architectures")


def test_a_config_is_shrunk_with_what_is_inside_and_keeps_its_kinds_of_layers(architectures: ModuleType) -> None:
    small = architectures.shrunk(transformers.Gemma3Config())
    text = small.get_text_config()
    assert (text.hidden_size, text.num_hidden_layers, text.vocab_size) == (32, 4, 2000)
    assert text.layer_types == ["sliding_attention", "full_attention"] * 2
    assert small.vision_config.hidden_size == 32
    assert type(small) is transformers.Gemma3Config


def test_a_model_is_measured(architectures: ModuleType) -> None:
    row = architectures.measure("CAUSAL_LM", "llama")
    assert (row["outcome"], row["trained"]) == ("exact", "LoRA")
    assert 0 < row["share"] < 1
    assert 0 <= row["below_bytes"] <= 320 * KIB


def test_whatever_goes_wrong_is_a_row(architectures: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    assert architectures.measure("CAUSAL_LM", "jetmoe")["outcome"] == "refused"  # how many tokens an expert gets
    assert architectures.measure("CAUSAL_LM", "dbrx")["outcome"] == "not built"
    step = architectures.step
    drawn = torch.Generator().manual_seed(0)

    def other(model: Any, batch: Any) -> Any:
        found = step(model, batch)
        return {name: t + torch.rand((), generator=drawn) for name, t in found.items()}

    monkeypatch.setattr(architectures, "step", other)
    assert architectures.measure("CAUSAL_LM", "llama")["outcome"] == "not repeatable"
    monkeypatch.setattr(architectures, "SECONDS", 1)
    monkeypatch.setattr(architectures, "step", lambda *_: time.sleep(30))
    assert architectures.measure("CAUSAL_LM", "llama")["detail"] == "more than 1 s"


def test_gradients_that_differ_are_said_first(architectures: ModuleType) -> None:
    page = importlib.import_module("architectures_page").page
    base = {"task": "CAUSAL_LM", "trained": "LoRA", "share": 0.5, "below_bytes": 1024}
    rows = [{**base, "kind": "good", "outcome": "exact"}, {**base, "kind": "bad", "outcome": "WRONG"}]
    rows.append({"task": "CAUSAL_LM", "kind": "odd", "outcome": "refused", "detail": "a | b"})
    lines = page(rows).splitlines()
    assert "| CAUSAL_LM | 1 | 0 | 1 | 0 | 0 | 1 |" in lines
    table = [line for line in lines if line.startswith(("| good", "| bad", "| odd"))]
    assert table == [
        "| bad | LoRA | WRONG | 0.50 | 1 KiB |  |",
        "| odd |  | refused |  |  | a \\| b |",
        "| good | LoRA | exact | 0.50 | 1 KiB |  |",
    ]
