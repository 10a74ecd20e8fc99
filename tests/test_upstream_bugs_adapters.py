"""Bug 4.1 beyond the active adapter: what else of an adapter layer may change between forward and backward."""

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils.checkpoint import CheckpointError

import rematree
from both_paths import EVERY_WAY, Ours, assert_same_or_refused, by_plan, differ
from checkpointed_models import by_transformers, step, upstream_is_wrong
from models import assert_same, batch_for, build, with_lora
from rematree.errors import RecomputeMismatchError
from rematree.planning.planner import Planner
from rematree.pricing.cost import Roofline

Found = dict[str, torch.Tensor]
QUERY = "base_model.model.model.layers.1.self_attn.q_proj"


def scale_layer(model: Any) -> None:
    model.get_submodule(QUERY).scale_layer(3.0)


def set_scale(model: Any) -> None:
    model.get_submodule(QUERY).set_scale("default", 5.0)


def merge(model: Any) -> None:
    model.merge_adapter()


def disable(model: Any) -> None:
    model.base_model.disable_adapter_layers()


def evaluate(model: Any) -> None:
    model.eval()


CHANGES: dict[str, Callable[[Any], None]] = {
    "scale_layer": scale_layer,
    "set_scale": set_scale,
    "merge": merge,
    "disable": disable,
    "eval": evaluate,
}
CHANGED = pytest.mark.parametrize("change", CHANGES)


def made() -> Any:
    return with_lora(build("llama"), lora_dropout=0.1)


@CHANGED
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_4_1_adapter_layers_changed_before_backward_upstream(use_reentrant: bool, change: str) -> None:
    model = made()
    batch = batch_for(model)
    expected = step(model, batch)
    with by_transformers(model, {"use_reentrant": use_reentrant}):
        try:
            wrong = differ(expected, step(model, batch, between=lambda: CHANGES[change](model)))
        except (CheckpointError, RuntimeError):
            wrong = True
    upstream_is_wrong(wrong, f"{change} between forward and backward changes the rerun")


@CHANGED
@EVERY_WAY
def test_4_1_adapter_layers_changed_before_backward(ours: Ours, change: str) -> None:
    """The gradient of the forward, or a refusal that names the layer; and the change stays."""
    model = made()
    batch = batch_for(model)
    between: Any = None if change == "merge" else CHANGES[change]  # which changes the plain model's gradients as well
    plain = made()
    expected = step(plain, batch, between=between and functools.partial(between, plain))

    def run() -> Found:
        with ours(model, batch):
            return step(model, batch, between=lambda: CHANGES[change](model))

    assert_same_or_refused(expected, run, ["layers."])
    layer: Any = model.get_submodule(QUERY)
    model.zero_grad(set_to_none=True)
    assert layer.scaling["default"] == {"scale_layer": 6.0, "set_scale": 10.0}.get(change, 2.0)
    assert (layer.merged, layer.disable_adapters, model.training) == (
        change == "merge",
        change == "disable",
        change != "eval",
    )


@EVERY_WAY
def test_4_1_an_adapter_deleted_before_backward(ours: Ours) -> None:
    """Its parameters are gone from the layer. Right, or refused by name: not a KeyError from inside PEFT."""
    model = made()
    model.add_adapter("other", model.peft_config["default"])
    batch = batch_for(model)
    expected = step(model, batch)

    def run() -> Found:
        def delete() -> None:
            model.set_adapter("other")
            model.delete_adapter("default")

        torch.manual_seed(7)
        own = {name: p for name, p in model.named_parameters() if ".default." in name}
        with ours(model, batch):
            loss = model(**batch).loss
            delete()
            loss.backward()
        return {"loss": loss.detach(), **{name: p.grad for name, p in own.items() if p.grad is not None}}

    assert_same_or_refused(expected, run, ["layers."])


def test_4_1_a_plan_from_the_planner_with_two_adapters() -> None:
    """Upstream's half is `test_gradients_belong_to_the_adapter_of_the_forward`."""
    model = with_lora(build("llama", layers=2), lora_dropout=0.0, target_modules=["q_proj", "down_proj"])
    model.add_adapter("other", model.peft_config["default"])  # pyright: ignore[reportCallIssue, reportArgumentType, reportIndexIssue]
    batch = batch_for(model)
    base: Any = model.base_model

    def two() -> Found:
        torch.manual_seed(7)
        base.set_adapter("default")
        one = model(**batch, use_cache=False).loss
        base.set_adapter("other")
        other = model(**batch, use_cache=False).loss
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("lora_" in name)
        (one + other).backward()
        base.set_adapter("default")
        found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        model.zero_grad(set_to_none=True)
        return {"loss": (one + other).detach(), **found}

    expected = two()
    planner = Planner(model, batch, cost=Roofline(5e10, 1e10), forbid=["chunked_loss"])
    with rematree.apply(planner.plan(planner.min_peak_bytes()), model):
        assert_same(expected, two())


def test_4_1_merging_is_refused_before_anything_is_computed() -> None:
    """Not only named: gradients of other layers are not half written when the first rerun is refused."""
    model = made()
    batch = batch_for(model)
    with by_plan(model, batch):
        loss = model(**batch).loss
        model.merge_adapter()
        with pytest.raises(RecomputeMismatchError, match=r"layers\.3: adapters .* merged"):
            loss.backward()
        assert all(p.grad is None for name, p in model.named_parameters() if "layers." in name)
        model.unmerge_adapter()
