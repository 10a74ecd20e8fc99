"""The head, run for its time: what it scales, and that nobody notices it."""

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._pytree import tree_leaves

from models import batch_for, build, gradients, with_lora
from rematree.execute.loss.head import find_head
from rematree.observation.observe import Twin
from rematree.planning import head_pace
from rematree.planning.head_pace import HeadClock
from rematree.planning.heads import _worth_their_memory, chunk_rows_for
from rematree.planning.planner import Planner
from rematree.plans import Levers
from rematree.pricing.cost import Roofline, probe_bytes
from rematree.referee.simulate import Referee
from rematree.regions import find_chain
from rematree.solve.chain import HeadOption
from rematree.units import KIB, MIB

COST = Roofline(5e10, 1e10)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3", "mixtral"])
def test_the_head_is_run_with_every_loss_and_nothing_is_left_of_it(family: str) -> None:
    model = with_lora(build(family))
    batch = batch_for(model)
    blocks = find_chain(model).blocks
    ran: list[Any] = []
    hook = model.get_submodule(blocks[0]).register_forward_hook(lambda *_: ran.append(0))
    heads: list[torch.Size] = []
    found = find_head(model)
    assert found is not None
    head_hook = found[1].register_forward_pre_hook(lambda _, args: heads.append(args[0].shape))
    twin = Twin(model, batch)
    before = {name: (value, value.clone()) for name, value in model.state_dict(keep_vars=True).items()}
    attributes = [dict(vars(module)) for module in model.modules()]
    random = torch.get_rng_state()
    clock = HeadClock(model, twin, blocks, Referee(twin, blocks, COST).run(Levers()))
    ran.clear()  # the twin's blocks, whose output it asks for, have the hook too
    heads.clear()
    seconds = clock.seconds({None: 0, 8: 0})
    assert seconds.keys() == {None, 8}
    assert all(value > 0 for value in seconds.values())
    assert not ran
    assert len(heads) >= 5  # once for whatever is done once, at least twice for each loss
    assert {shape.numel() // shape[-1] for shape in heads} == {64}
    assert torch.equal(torch.get_rng_state(), random)
    after = model.state_dict(keep_vars=True)
    assert all(after[name] is value and torch.equal(value, old) for name, (value, old) in before.items())
    assert all(p.grad is None for p in model.parameters())
    assert [dict(vars(module)) for module in model.modules()] == attributes
    hook.remove()
    head_hook.remove()
    assert gradients(model, batch)


def test_a_head_too_large_to_be_run_gets_no_answer() -> None:
    model = with_lora(build("llama"))
    twin, blocks = Twin(model, batch_for(model)), find_chain(model).blocks
    clock = HeadClock(model, twin, blocks, Referee(twin, blocks, COST).run(Levers()))
    room = probe_bytes(torch.device("cpu"))
    assert clock.seconds({None: room + 1, 32: room}).keys() == {32}


def test_what_the_head_was_run_with_is_given_back_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Up to 256 MiB and a batch's hidden states: the step needs them, and garbage is collected some time later."""
    held: list[weakref.ref[torch.Tensor]] = []
    own = head_pace.between_runs

    def spy(*args: Any) -> torch.Tensor:
        made = own(*args)
        held.append(weakref.ref(made))
        return made

    monkeypatch.setattr(head_pace, "between_runs", spy)
    model = with_lora(build("llama"))
    twin, blocks = Twin(model, batch_for(model)), find_chain(model).blocks
    clock = HeadClock(model, twin, blocks, Referee(twin, blocks, COST).run(Levers()))
    gc.disable()
    try:
        assert clock.seconds({None: 0})
        assert held
        assert held[0]() is None
        leaves = tree_leaves([vars(clock), getattr(clock, "_batch")])  # noqa: B009
        real = [leaf for leaf in leaves if isinstance(leaf, nn.Module | torch.Tensor)]
        assert all(isinstance(value, FakeTensor) for value in real)
    finally:
        gc.enable()


def test_a_ratio_scales_the_head_with_that_loss_and_nothing_else() -> None:
    model = with_lora(build("llama"))
    twin = Twin(model, batch_for(model))
    referee = Referee(twin, find_chain(twin.model).blocks, COST)
    plain, chunked = (referee.run(Levers(loss_chunk_rows=rows)) for rows in (None, 32))
    referee.head_pace = {None: 1.0, 32: 3.0}
    assert referee.run(Levers()) == plain
    scaled = referee.run(Levers(loss_chunk_rows=32))
    for was, now in zip(chunked.segments, scaled.segments, strict=True):
        assert now.seconds == was.seconds * (3.0 if was.label == "head" else 1.0), was.label
        assert (now.label, now.peak_bytes, now.live_bytes) == (was.label, was.peak_bytes, was.live_bytes)
    assert scaled.seconds == sum(segment.seconds for segment in scaled.segments)


def test_a_planner_runs_the_head_of_a_live_model_unless_the_loss_is_another() -> None:
    model = with_lora(build("llama", layers=2), target_modules=["q_proj"])
    batch = batch_for(model)
    ratios = Planner(model, batch, optimizer="none").observed.referee.head_pace
    assert ratios.keys() == {None, 32}
    assert all(ratio != 1.0 for ratio in ratios.values())
    other = Planner(model, batch, optimizer="none", loss=lambda output: output.loss)
    assert other.observed.referee.head_pace == {None: 1.0}


def test_plans_are_made_and_confirmed_with_what_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    model = with_lora(build("llama", layers=2), target_modules=["q_proj"])
    # The whole loss and chunks of 32 take as long as a day here, and there is no other choice.
    monkeypatch.setattr(HeadClock, "seconds", lambda _, workspaces: dict.fromkeys(workspaces, 86400.0))
    # A busy machine: what no cache holds takes long. Of the head that is its weight, in the first simulated step only.
    monkeypatch.setattr("rematree.pricing.cost.measure_cold_rate", lambda: 1e-7)
    planner = Planner(model, batch_for(model), optimizer="none")
    assert [head.seconds for head in planner.survey.problem.heads] == pytest.approx([86400.0, 86400.0])
    assert planner.plain_step()[1] == pytest.approx(86400.0, rel=0.01)
    assert planner.plan().predicted_step_seconds == pytest.approx(86400.0, rel=0.01)
    other = planner.for_batch(batch_for(model, tokens=16))
    assert other.plan().predicted_step_seconds > 3600.0


def test_chunks_are_offered_however_many_tokens_there_are() -> None:
    assert chunk_rows_for(32) == []
    assert chunk_rows_for(64) == [32]
    assert chunk_rows_for(1024) == [512, 256, 128, 64, 32]
    assert chunk_rows_for(32 * 4096) == [4096]
    assert chunk_rows_for(40 * 4096) == [4096]


def test_a_larger_chunk_is_offered_only_where_it_is_clearly_faster() -> None:
    found = {None: (5.0, 500), 512: (2.8, 120), 256: (3.1, 60), 128: (3.4, 32), 64: (3.5, 16), 32: (4.0, 9)}
    heads = {rows: HeadOption(mib * MIB, seconds) for rows, (seconds, mib) in found.items()}
    assert _worth_their_memory(heads) == [None, 512, 128, 64, 32]  # 256 is 9 % faster than 128, 512 18 %
    heads[128] = HeadOption(33 * MIB, 3.4)
    assert _worth_their_memory(heads) == [None, 512, 64, 32]
    heads[512] = HeadOption(120 * MIB, 3.0)  # 14 % faster than 64
    assert _worth_their_memory(heads) == [None, 64, 32]
    assert _worth_their_memory({None: heads[None]}) == [None]
    assert _worth_their_memory({None: heads[None], 32: heads[32]}) == [None, 32]


class Encoded(nn.Module):
    """What runs before the blocks of the language model keeps `size` numbers for backward."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.language: Any = build("llama", layers=2)
        self.config = self.language.config
        self.encoder = nn.Linear(48, size)

    def get_output_embeddings(self) -> nn.Module:
        return self.language.lm_head

    def forward(self, features: torch.Tensor, labels: torch.Tensor) -> Any:
        embedded = features + self.encoder(features).tanh().sum(-1, keepdim=True)
        return self.language(inputs_embeds=embedded, labels=labels)


def test_what_runs_before_the_blocks_counts_and_nothing_is_drawn_from_the_users_generator(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = Encoded(4096).train()
    batch = {"features": torch.randn(1, 8, 48), "labels": torch.ones(1, 8, dtype=torch.int64)}
    twin, random = Twin(model, batch), torch.get_rng_state()
    blocks = find_chain(twin.model).blocks
    plain = Referee(twin, blocks, COST).run(Levers())
    for room, runs in ((2 * MIB, True), (KIB, False)):  # what is kept of 8 rows of 4096 numbers is 128 KiB
        monkeypatch.setattr(head_pace, "probe_bytes", lambda device, room=room: room)
        assert bool(HeadClock(model, twin, blocks, plain).seconds({None: 0})) == runs
    assert torch.equal(torch.get_rng_state(), random)
