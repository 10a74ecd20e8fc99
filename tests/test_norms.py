"""Norms that keep their input: same bits as the plain ones, exactly the bytes they say they keep, or the plain ones."""

import copy
import dataclasses
import functools
from typing import Any

import pytest
import torch
from torch import nn

import rematree
from models import assert_same, batch_for, build, gradients, with_lora
from rematree.errors import PlanMismatchError
from rematree.execute.adapters import lean_layers
from rematree.execute.norms import is_norm, lean_norm, lean_norms, why_no_norm
from rematree.execute.override import ForwardOverride
from rematree.fingerprint import describe_model
from rematree.measure import PeakMeter
from rematree.observation.observe import Twin
from rematree.planning.planner import Planner
from rematree.plans import Action, Decision, Levers, Plan
from rematree.pricing.price import Free
from rematree.referee.simulate import Referee
from test_lean_adapters import kept_bytes

AGAIN = Decision(Action.RECOMPUTE)
ROWS, FEATURES = 6, 20


def one(dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    """A frozen norm of Llama with weights that are not one."""
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    torch.manual_seed(0)
    norm = LlamaRMSNorm(FEATURES).to(dtype)
    nn.init.normal_(norm.weight)
    return norm.requires_grad_(False)


def lean(norm: nn.Module) -> ForwardOverride:
    return ForwardOverride(norm, functools.partial(lean_norm, norm))


def nodes(out: torch.Tensor) -> list[str]:
    found, waiting = list[str](), [out.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is not None:
            found.append(node.name())
            waiting += [following for following, _ in node.next_functions]
    return found


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [1.0, 1e-30, 1e30, float("nan")])
@pytest.mark.parametrize("shape", [(2, 3, FEATURES), (FEATURES,), (0, FEATURES), (2, 1, 3, FEATURES)])
def test_output_and_gradient_are_the_plain_ones(shape: tuple[int, ...], scale: float, dtype: torch.dtype) -> None:
    """Also where the input is joined with what went round the norm, as in a block."""
    norm = one(dtype)
    given, grad = torch.randn(shape).mul(scale).to(dtype), torch.randn(shape).to(dtype)
    found = list[tuple[torch.Tensor, ...]]()
    for is_lean in (False, True):
        if is_lean:
            lean(norm)
        x = given.clone().requires_grad_()
        inner = x * 1.0
        out = norm(inner)
        assert (("_NormBackward" in nodes(out)), out.dtype) == (is_lean, dtype)
        (of_x,) = torch.autograd.grad(inner + out * 2.0, x, grad)
        found.append((out.detach(), of_x))
    for plain, here in zip(*found, strict=True):
        assert torch.equal(plain.view(torch.int16), here.view(torch.int16)) or bool(plain.isnan().any())
        assert torch.equal(plain.isnan(), here.isnan())


def test_it_keeps_its_input_and_a_number_a_row() -> None:
    norm = one()
    x = torch.randn(ROWS, FEATURES, dtype=torch.bfloat16, requires_grad=True) * 1.0
    # in fp32 the input and the number a row; weight times 16-bit numbers keeps none
    assert kept_bytes(norm, x) == ROWS * FEATURES * 4 + ROWS * 4
    lean(norm)
    assert kept_bytes(norm, x) == ROWS * FEATURES * 2 + ROWS * 4


@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral", "phi3"])
@pytest.mark.parametrize("dropout", [0.1, 0.0])
def test_models(family: str, dropout: float) -> None:
    model: Any = with_lora(build(family, layers=2).to(torch.bfloat16), lora_dropout=dropout)
    batch = batch_for(model, tokens=16)
    found = lean_norms(model)
    assert len(found) == 1 + model.config.num_hidden_layers * (4 if family == "qwen3" else 2)
    expected, before = gradients(model, batch), kept_bytes(model, batch)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under_autocast = gradients(model, batch)
    overrides = [lean(norm) for _, norm in found]
    assert_same(expected, gradients(model, batch))
    assert kept_bytes(model, batch) < before
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_same(under_autocast, gradients(model, batch))
    for override in overrides:
        override.remove()


@pytest.mark.parametrize("family", ["gemma3", "olmo2", "gpt2"])
def test_other_norms_are_left_alone(family: str) -> None:
    model = build(family, layers=1).to(torch.bfloat16).requires_grad_(False)
    assert lean_norms(model) == []


class Doubled(type(one())):  # pyright: ignore[reportUntypedBaseClass, reportGeneralTypeIssues]
    """Its source is not the known one."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return 2.0 * super().forward(hidden_states)


def test_why_not() -> None:
    norm = one()
    assert why_no_norm(norm) is None
    assert why_no_norm(one(torch.float32)) == "its weight is in torch.float32"
    assert why_no_norm(copy.deepcopy(norm).requires_grad_(True)) == "its weight is trained"
    assert why_no_norm(Doubled(FEATURES)) == "Doubled is not a norm that is known"
    assert not is_norm(nn.LayerNorm(FEATURES))


@pytest.mark.parametrize("what", ["fp32", "turned", "no gradient", "trained since", "replaced", "no grad mode"])
def test_calls_that_run_as_they_are(what: str) -> None:
    norm: Any = one()
    x = torch.randn(FEATURES, FEATURES, dtype=torch.bfloat16)
    if what == "replaced":
        own = norm.forward
        norm.forward = lambda hidden_states: own(hidden_states) * 2.0
    x = (x.float() if what == "fp32" else x).requires_grad_(what != "no gradient")
    expected = norm(x.t() if what == "turned" else x)
    lean(norm)
    if what == "trained since":
        norm.weight.requires_grad_(True)
    with torch.set_grad_enabled(what != "no grad mode"):
        out = norm(x.t() if what == "turned" else x)
    assert torch.equal(out, expected)
    assert out.grad_fn is None or "_NormBackward" not in nodes(out)


def test_hooks_run_and_a_keyword_is_an_argument_like_another() -> None:
    norm = one()
    seen = list[torch.Size]()
    norm.register_forward_hook(lambda _m, _i, out: seen.append(out.shape))
    x = torch.randn(ROWS, FEATURES, dtype=torch.bfloat16, requires_grad=True)
    lean(norm)
    assert torch.equal(norm(x), norm(hidden_states=x))
    assert seen == 2 * [x.shape]


def test_what_was_written_to_is_refused_and_so_is_a_second_derivative() -> None:
    norm: Any = one()
    lean(norm)
    leaf = torch.randn(ROWS, FEATURES, dtype=torch.bfloat16, requires_grad=True)
    x = leaf * 1.0
    out = norm(x)
    x.mul_(2.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()
    out = norm(leaf * 1.0)
    norm.weight.mul_(2.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()
    (grad,) = torch.autograd.grad(norm(leaf).square().sum(), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_a_graph_run_twice() -> None:
    norm = one()
    lean(norm)
    x = torch.randn(ROWS, FEATURES, dtype=torch.bfloat16, requires_grad=True)
    out = norm(x)
    first, second = (torch.autograd.grad(out, x, torch.ones_like(out), retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


# -- plans ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "recomputed",
    ["kept", "group", *(pytest.param(name, marks=pytest.mark.slow) for name in ("nothing", "block"))],
)
def test_plans_are_exact_with_dropout_and_their_peak_is_measured(recomputed: str) -> None:
    model = with_lora(build("llama", layers=3).to(torch.bfloat16), lora_dropout=0.1)
    batch = batch_for(model)
    paths = [f"base_model.model.model.layers.{number}" for number in range(3)]
    decisions = dict.fromkeys(paths[1:], AGAIN) if recomputed in ("block", "kept") else {}
    if recomputed == "kept":
        decisions[f"{paths[1]}.post_attention_layernorm"] = Decision(Action.SAVE, stash=True)
        decisions[f"{paths[2]}.mlp"] = Decision(Action.SAVE, stash=True)
    groups = (tuple(paths[:2]),) if recomputed == "group" else ()
    levers = Levers(decisions, lean=tuple(path for path, _ in (*lean_layers(model), *lean_norms(model))), groups=groups)
    predicted = Referee(Twin(model, batch), tuple(paths), Free(), "none").run(levers).peak_bytes
    expected = gradients(model, batch)
    with rematree.apply(Plan.of(levers, describe_model(model)), model):
        assert_same(expected, gradients(model, batch))
        with PeakMeter(model, None, batch) as meter:
            model(**batch, use_cache=False).loss.backward()
    model.zero_grad(set_to_none=True)
    assert abs(meter.peak_bytes - predicted) <= 0.01 * predicted


def test_a_planner_takes_the_norms_beside_the_adapters() -> None:
    model = with_lora(build("llama", layers=2).to(torch.bfloat16), lora_dropout=0.0)
    planner = Planner(model, batch_for(model, rows=4, tokens=64), cost=Free(), forbid=["chunked_loss", "compile"])
    for paths in planner.survey.lean.values():
        assert len(paths) == 7 + 2
    plan = planner.plan(planner.min_peak_bytes())
    assert "7 LoRA layers, and 2 norms are lean" in str(plan) or "14 LoRA layers, and 4 norms are lean" in str(plan)


def test_a_norm_that_is_trained_now_is_refused() -> None:
    model = with_lora(build("llama", layers=2).to(torch.bfloat16))
    path = "base_model.model.model.layers.1.input_layernorm"
    model.get_submodule(path).requires_grad_(True)
    plan = dataclasses.replace(Plan.of(Levers(), describe_model(model)), lean=(path,))
    with pytest.raises(PlanMismatchError, match=r"runs .*input_layernorm lean, which it cannot: its weight is trained"):
        rematree.apply(plan, model)
