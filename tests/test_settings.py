"""What a planner is told has one list: defaults, types and signatures agree, and what cannot be is refused."""

import inspect
from dataclasses import fields
from typing import Any, get_type_hints

import pytest
import torch

import rematree
from models import batch_for, build
from rematree.errors import UsageError
from rematree.planning.settings import Settings, Told


def test_settings_and_keyword_arguments_agree() -> None:
    assert get_type_hints(Told) == get_type_hints(Settings)


@pytest.mark.parametrize("function", [rematree.plan, rematree.frontier, rematree.Planner, rematree.Planner.__init__])
def test_a_signature_shows_every_setting_with_its_default(function: Any) -> None:
    parameters = inspect.signature(function).parameters.values()
    named = {p.name: p.default for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY}
    assert named == {item.name: item.default for item in fields(Settings)}
    assert not [p for p in parameters if p.kind is inspect.Parameter.VAR_KEYWORD]


def test_an_argument_that_there_is_not_is_an_error() -> None:
    model = build("llama", layers=2)
    with pytest.raises(TypeError, match="budgett"):
        rematree.Planner(model, batch_for(model), budgett=1)  # pyright: ignore[reportCallIssue]


def test_compiling_is_a_matter_of_steps_unless_said() -> None:
    assert not Settings().compiles
    assert not Settings(steps=199).compiles
    assert Settings(steps=200).compiles
    assert Settings(allow_compile=True).compiles
    assert not Settings(steps=200, allow_compile=False).compiles
    assert not Settings(allow_compile=True, forbid=["compile"]).compiles


def test_settings_that_cannot_be_are_refused() -> None:
    with pytest.raises(UsageError, match="unknown lever 'offload' in forbid; levers: chunked_loss, compile, groups"):
        Settings(forbid=["offload"])
    with pytest.raises(UsageError, match="no mps device is here to measure"):
        Settings(device=torch.device("mps"))
