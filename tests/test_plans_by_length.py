"""Several plans on one model: each forward runs under the plan of its batch, and what it reruns does too."""

import copy
import dataclasses
import functools
import gc
import threading
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import nn

import rematree
from both_paths import AGAIN, KEEP, SAVE, plan_of
from models import assert_same, batch_for, build, reads_nothing, with_lora
from rematree.errors import PlanMismatchError, UsageError
from rematree.execute.adapters import lean_layers
from rematree.execute.handle import Handle
from rematree.plans import Decision, Plan
from rematree.regions import find_chain
from test_lean_adapters import kept_bytes

Found = dict[str, torch.Tensor]
LAYERS = "base_model.model.model.layers"
SHORT, MIDDLE, LONG = 12, 24, 40


@pytest.fixture
def model() -> nn.Module:
    model = with_lora(build("llama"))
    model.config.use_cache = False  # pyright: ignore[reportAttributeAccessIssue, reportArgumentType]
    return model


def batch_of(model: nn.Module, tokens: int) -> dict[str, torch.Tensor]:
    return batch_for(model, tokens=tokens)


def plans_for(model: nn.Module) -> list[Plan]:
    """Up to 12 tokens nothing is done; up to 24 lean layers and kept regions; above, groups in everything."""
    middle: dict[str, Decision] = {}
    for block in (0, 1, 3):
        middle[f"{LAYERS}.{block}"] = AGAIN
        middle[f"{LAYERS}.{block}.self_attn#attention"] = KEEP
        middle[f"{LAYERS}.{block}.mlp.down_proj"] = SAVE
        middle[f"{LAYERS}.{block}.mlp.up_proj.lora_dropout.default#draw"] = SAVE
    lean = tuple(path for path, _ in lean_layers(model) if f"{LAYERS}.2." in path)
    everything: dict[str, Decision] = {f"{LAYERS}.{block}": AGAIN for block in range(4)}
    # The parts of a layer that is lean in the middle have overrides of their own here.
    everything |= {f"{path}.lora_dropout.default#draw": SAVE for path in lean}
    groups = (tuple(f"{LAYERS}.{block}" for block in range(3)), (f"{LAYERS}.0", f"{LAYERS}.1"))
    return [
        plan_of(model, batch_of(model, SHORT), {}),
        dataclasses.replace(plan_of(model, batch_of(model, MIDDLE), middle), lean=lean),
        dataclasses.replace(plan_of(model, batch_of(model, LONG), everything), groups=groups),
    ]


def applied(model: nn.Module, plans: Sequence[Plan] | None = None) -> Handle:
    *smaller, plan = plans_for(model) if plans is None else plans
    return rematree.apply(plan, model, smaller=smaller)


def forwards_then_backwards(
    model: nn.Module, lengths: Sequence[int], order: Sequence[int], retain: bool = False
) -> Found:
    """Gradients of each batch by itself; all forwards are run before the first backward."""
    torch.manual_seed(7)
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    losses = [model(**batch_of(model, tokens)).loss for tokens in lengths]
    found: Found = {}
    for index in order:
        gradients = torch.autograd.grad(losses[index], [p for _, p in named], retain_graph=retain)
        found |= {f"{index} {name}": value for (name, _), value in zip(named, gradients, strict=True)}
        found[f"{index} loss"] = losses[index].detach()
    found["random state"] = torch.get_rng_state()
    return found


class Calls:
    """Counts the calls of a module inside a layer, whose own hooks run around its recomputation."""

    def __init__(self, module: nn.Module) -> None:
        self.count = 0
        self._hook = module.register_forward_pre_hook(self._called)

    def _called(self, *_: object) -> None:
        self.count += 1

    def of(self, run: Callable[[], object]) -> int:
        self.count = 0
        run()
        return self.count


@pytest.mark.parametrize("tokens", [5, SHORT, 13, MIDDLE, 25, LONG])
def test_each_length_has_the_gradients_of_the_plain_model(model: nn.Module, tokens: int) -> None:
    expected = forwards_then_backwards(model, [tokens], [0])
    with applied(model) as handle:
        assert_same(expected, forwards_then_backwards(model, [tokens], [0]))
        number = [LONG, MIDDLE, SHORT].index(next(each for each in (SHORT, MIDDLE, LONG) if each >= tokens))
        assert handle.in_force is handle.plans[2 - number]


@pytest.mark.parametrize("order", [(0, 1, 2, 3, 4), (4, 3, 2, 1, 0), (2, 0, 4, 1, 3)])
def test_forwards_of_several_lengths_before_their_backwards(model: nn.Module, order: tuple[int, ...]) -> None:
    lengths = (LONG, SHORT, MIDDLE, 20, 33)
    expected = forwards_then_backwards(model, lengths, order)
    with applied(model):
        assert_same(expected, forwards_then_backwards(model, lengths, order))


def test_a_kept_graph_is_run_again_under_its_plan(model: nn.Module) -> None:
    order = (1, 0, 1, 0, 2)
    expected = forwards_then_backwards(model, (MIDDLE, LONG, SHORT), order, retain=True)
    with applied(model):
        assert_same(expected, forwards_then_backwards(model, (MIDDLE, LONG, SHORT), order, retain=True))


@pytest.mark.parametrize("name", ["qwen3", "gpt2", "gemma3"])
def test_other_architectures_recompute_where_they_are_told(name: str) -> None:
    model = with_lora(build(name))
    model.config.use_cache = False  # pyright: ignore[reportAttributeAccessIssue, reportArgumentType]
    blocks = find_chain(model).blocks
    plans = [
        plan_of(model, batch_of(model, tokens), dict.fromkeys(blocks[:count], AGAIN))
        for tokens, count in ((SHORT, 0), (MIDDLE, 2), (LONG, 4))
    ]
    lengths, order = (LONG, SHORT, MIDDLE), (1, 2, 0)
    expected = forwards_then_backwards(model, lengths, order)
    with applied(model, plans):
        assert_same(expected, forwards_then_backwards(model, lengths, order))


def test_a_short_batch_runs_as_the_plain_model_does_and_a_longer_one_recomputes(model: nn.Module) -> None:
    layers: Any = model.get_submodule(LAYERS)
    calls = Calls(layers[0].input_layernorm)

    def step(tokens: int) -> None:
        model(**batch_of(model, tokens)).loss.backward()

    plain = kept_bytes(model, batch_of(model, SHORT))
    with applied(model):
        assert kept_bytes(model, batch_of(model, SHORT)) == plain
        # In the longest: the forward, and a rerun each of the outer group, the inner one and the block itself.
        assert [calls.of(functools.partial(step, tokens)) for tokens in (SHORT, MIDDLE, SHORT, LONG)] == [1, 2, 1, 4]


@pytest.mark.parametrize("number", [1, 2])
def test_each_plan_keeps_what_it_keeps_alone(model: nn.Module, number: int) -> None:
    """Idle overrides of the other plans make no layer run otherwise: a lean one on whose dropout one hangs, say."""
    plans, batch = plans_for(model), batch_of(model, (SHORT, MIDDLE, LONG)[number])
    with rematree.apply(plans[number], model):
        alone = kept_bytes(model, batch)
    with applied(model):
        assert kept_bytes(model, batch) == alone
    assert alone < kept_bytes(model, batch)


def test_backward_in_another_thread_runs_under_the_plan_of_the_forward(model: nn.Module) -> None:
    def gradients() -> Found:
        torch.manual_seed(7)
        model.zero_grad()
        losses = [model(**batch_of(model, tokens)).loss for tokens in (MIDDLE, LONG)]
        for loss in losses:
            thread = threading.Thread(target=loss.backward)
            thread.start()
            thread.join()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    expected = gradients()
    with applied(model) as handle:
        assert_same(expected, gradients())
        assert handle._chosen._numbers == {}


def test_an_error_in_forward_leaves_no_choice_behind(model: nn.Module) -> None:
    layers: Any = model.get_submodule(LAYERS)
    expected = forwards_then_backwards(model, [LONG], [0])

    def fails(*_: object) -> None:
        raise ValueError("on purpose")

    with applied(model) as handle:
        hook = layers[1].register_forward_pre_hook(reads_nothing(fails))
        with pytest.raises(ValueError, match="on purpose"):
            model(**batch_of(model, SHORT))
        hook.remove()
        assert handle._chosen._numbers == {}
        assert_same(expected, forwards_then_backwards(model, [LONG], [0]))


def test_which_plan_a_batch_runs_under(model: nn.Module) -> None:
    with applied(model) as handle:
        covering = handle._chosen.covering
        batch = batch_of(model, SHORT)
        assert covering(batch) == 0
        assert covering({**batch, "num_items_in_batch": torch.tensor(3), "use_cache": False}) == 0
        assert covering({**batch, "positions": torch.zeros(2, 900)}) == 2, "of a size that nobody planned for"
        assert covering({}) == 2, "arguments by position"
        assert covering(batch_for(model, rows=1, tokens=MIDDLE)) == 1
        assert covering(batch_for(model, rows=3, tokens=SHORT)) is None
        with pytest.raises(PlanMismatchError, match=r"input_ids of shape \(2, 40\), this batch has \(2, 41\)"):
            model(**batch_of(model, 41))
        assert handle.in_force is handle.plan


def test_evaluation_is_untouched(model: nn.Module) -> None:
    batch = batch_of(model, 64)  # longer than any plan
    model.eval()
    with torch.no_grad():
        expected = model(**batch).logits
        with applied(model) as handle:
            assert torch.equal(expected, model(**batch).logits)
            assert handle.in_force is handle.plan
    assert torch.equal(expected, model(**batch).logits)


def test_chunked_losses_of_several_sizes(model: nn.Module) -> None:
    plans = [dataclasses.replace(p, loss_chunk_rows=r) for p, r in zip(plans_for(model), (None, 8, 16), strict=True)]
    losses: list[torch.Tensor] = []
    for tokens, plan in zip((SHORT, MIDDLE, LONG), plans, strict=True):
        torch.manual_seed(3)
        with rematree.apply(plan, model):
            losses.append(model(**batch_of(model, tokens)).loss.detach())
    with applied(model, plans) as handle:
        for tokens, expected in zip((SHORT, MIDDLE, LONG), losses, strict=True):
            torch.manual_seed(3)
            assert torch.equal(expected, model(**batch_of(model, tokens)).loss)
        assert [loss.effective for loss in handle._installed._losses] == [True, True]


def test_nothing_is_left_and_nothing_grows(model: nn.Module) -> None:
    before = {path: dict(module.__dict__) for path, module in model.named_modules()}

    def living() -> int:
        gc.collect()
        return sum(issubclass(type(each), torch.Tensor) for each in gc.get_objects())

    with applied(model) as handle:
        counts: list[int] = []
        for _ in range(4):
            for tokens in (LONG, SHORT, MIDDLE, 30):
                model(**batch_of(model, tokens)).loss.backward()
                model.zero_grad()
            counts.append(living())
        assert counts[1:] == [counts[1]] * 3
        assert applied(model, handle.plans) is handle
    for path, module in model.named_modules():
        assert module.__dict__.keys() == before[path].keys(), path
        assert module.__dict__.get("forward") is before[path].get("forward"), path


def test_a_copy_chooses_for_itself(model: nn.Module) -> None:
    expected = forwards_then_backwards(model, (LONG, SHORT), (0, 1))
    with applied(model) as handle:
        copied = copy.deepcopy(model)
        assert_same(expected, forwards_then_backwards(copied, (LONG, SHORT), (0, 1)))
        assert handle.in_force is handle.plan, "the original has not run"


def test_refused(model: nn.Module) -> None:
    plans = plans_for(model)
    compiled = dataclasses.replace(plans[0], compiled={f"{LAYERS}.0": 0.5})
    with pytest.raises(UsageError, match="one of several plans compiles blocks"):
        applied(model, [compiled, plans[2]])
    other = dataclasses.replace(plans[0], fingerprint=dataclasses.replace(plans[0].fingerprint, trainable="other"))
    with pytest.raises(PlanMismatchError, match="another model, batch shape or trainable set"):
        applied(model, [other, plans[2]])
    with applied(model), pytest.raises(UsageError, match="another plan is in force"):
        rematree.apply(plans[2], model)
