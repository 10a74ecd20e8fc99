"""Batches whose lengths nobody can read beforehand, in streams and among pictures: planned for as they come."""

import copy
import pickle
import random
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader
from torch.utils.data import IterableDataset as Stream
from transformers import Trainer

import rematree
from both_paths import AGAIN, plan_of
from models import assert_same, with_lora
from rematree import BudgetCallback
from rematree.errors import InfeasibleBudgetError, OutOfMemoryError, PlanMismatchError, RecomputeMismatchError
from rematree.execute.selection import OnLarger, covers
from rematree.integrations.batches import read_batches, roomier, stretched
from rematree.integrations.job import Job
from rematree.integrations.survival import survive_out_of_memory
from rematree.planning.ladder import MOST_APART, MOST_GROWN, Ladder, differ
from rematree.planning.planner import Planner
from rematree.regions import find_chain
from rematree.units import format_bytes
from test_budget_callback import COST, LastStepPeak, adapted
from test_finetune_tiny import save_tiny_model
from test_values import IMAGE, qwen25
from trainers import QUICK, adapters, pad, quiet_arguments, rows_of

LENGTHS = (9, 12, 8, 7, 20, 31, 11, 9, 33, 40, 30, 25, 40, 38, 12, 9)
Run = tuple[dict[str, torch.Tensor], list[float]]


class Rows(Stream[dict[str, Any]]):
    """Examples of `lengths`, in this order; neither a length nor an index."""

    def __init__(self, lengths: Sequence[int] = LENGTHS) -> None:
        self.rows: list[Any] = list(rows_of(*lengths))

    def __iter__(self) -> Iterator[dict[str, Any]]:
        yield from self.rows


def trained(
    folder: Path,
    *callbacks: Any,
    data: Any = None,
    model: Any = None,
    kind: Any = Trainer,
    guard: bool = False,
    **more: Any,
) -> Run:
    model = adapted() if model is None else model
    more = {"max_steps": 8, **more}
    collator = more.pop("data_collator", pad)
    trainer = kind(
        model=model,
        args=quiet_arguments(folder, **more),
        train_dataset=Rows() if data is None else data,
        data_collator=collator,
        callbacks=list(callbacks),
    )
    if guard:
        survive_out_of_memory(trainer)
    trainer.train()
    return adapters(model), [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def same(one: Run, other: Run) -> None:
    assert one[1] == other[1]
    assert_same(one[0], other[0])


def batch_of(tokens: int, rows: int = 2) -> dict[str, torch.Tensor]:
    examples: list[Any] = list(rows_of(*[tokens] * rows))
    return stretched(pad(examples), tokens)


@pytest.fixture(scope="module")
def budget() -> int:
    """Half-way for the longest batch; the first one fits as it is."""
    planner = Planner(adapted(), batch_of(40), cost=COST, forbid=QUICK)
    return (planner.min_peak_bytes() + planner.plan(None).predicted_peak_bytes) // 2


@pytest.mark.parametrize(
    ("accumulate", "lengths", "expected"),
    [
        (1, LENGTHS, ["2x31", "2x40"]),
        # Here the larger batch comes second in a step.
        (2, (8, 7, 9, 12, 11, 9, 20, 31, 30, 25, 33, 40, 12, 9, 40, 38), ["2x12", "2x31", "2x40"]),
    ],
)
def test_a_stream_is_trained_inside_the_budget(
    accumulate: int, lengths: tuple[int, ...], expected: list[str], tmp_path: Path, budget: int
) -> None:
    options: dict[str, Any] = {"gradient_accumulation_steps": accumulate, "max_steps": 8 // accumulate}
    options["data"] = Rows(lengths)
    plain = trained(tmp_path / "plain", **options)
    said: list[str] = []
    callback, peak = BudgetCallback(budget, cost=COST, forbid=QUICK, say=said.append), LastStepPeak()
    same(plain, trained(tmp_path / "ours", callback, peak, **options))
    assert any("for the first batch; the lengths" in line for line in said)
    larger = [line for line in said if line.startswith("a larger batch")]
    assert [line.partition("input_ids ")[2].partition(",")[0] for line in larger] == expected
    assert callback.plan is not None
    assert callback.plan.recomputes
    assert not callback.plans[0].recomputes, "short batches still run as the plain model does"
    assert peak.peak_bytes <= max(plan.predicted_peak_bytes for plan in callback.plans) <= budget


def test_a_batch_that_cannot_fit_is_named_before_it_runs(tmp_path: Path) -> None:
    few = Planner(adapted(), batch_of(12), cost=COST, forbid=QUICK).plan(None).predicted_peak_bytes
    callback = BudgetCallback(few, cost=COST, forbid=QUICK, say=lambda text: None)
    with pytest.raises(
        InfeasibleBudgetError, match=r"larger than planned for \(.*input_ids 2x31.*does not fit"
    ) as caught:
        trained(tmp_path, callback)
    assert format_bytes(few) in str(caught.value)
    assert "shorter rows or fewer" in str(caught.value)
    callback = BudgetCallback(few, cost=COST, forbid=QUICK, say=lambda text: None)
    with pytest.raises(OutOfMemoryError, match="no tighter plan is left"):
        trained(tmp_path / "guarded", callback, guard=True)
    assert list((tmp_path / "guarded").glob("checkpoint-*")), "what was trained is not lost"


class TwoForwards(Trainer):
    """Two forwards before one backward, the second one larger or smaller."""

    share: ClassVar = 2.0

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        other = stretched(inputs, int(self.share * inputs["input_ids"].shape[1]))
        return model(**inputs).loss + model(**other).loss


class Halves(TwoForwards):
    share: ClassVar = 0.5


def test_no_plan_changes_while_a_graph_waits_for_its_backward(tmp_path: Path, budget: int) -> None:
    callback = BudgetCallback(budget, cost=COST, forbid=QUICK, say=lambda text: None)
    with pytest.raises(PlanMismatchError, match="the plan was made for"):
        trained(tmp_path, callback, kind=TwoForwards)
    plain = trained(tmp_path, kind=Halves)
    same(plain, trained(tmp_path, callback, kind=Halves))
    assert len(callback.plans) > 1


def test_what_runs_again_under_other_overrides_is_refused() -> None:
    model = adapted()
    model.config.use_cache = False
    blocks = find_chain(model).blocks
    every, first = (plan_of(model, batch_of(12), dict.fromkeys(which, AGAIN)) for which in (blocks, blocks[:1]))
    with rematree.apply(every, model):
        alone, waiting = model(**batch_of(12)).loss, model(**batch_of(12)).loss
    alone.backward()  # nothing inside a block was decided on, so none is as good
    with rematree.apply(first, model), pytest.raises(RecomputeMismatchError, match="another plan"):
        waiting.backward()


def test_copies_have_nobody_to_ask() -> None:
    asked = OnLarger()
    asked.ask(asked.__call__)
    assert asked
    assert not copy.deepcopy(asked)
    assert not pickle.loads(pickle.dumps(asked))


class Adds(Trainer):
    """Calls the model with more than the loader gives."""

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        places = torch.arange(inputs["input_ids"].shape[1]).expand_as(inputs["input_ids"])
        return model(**inputs, position_ids=places).loss


@pytest.mark.parametrize("streamed", [False, True])
def test_a_trainer_that_adds_a_tensor_to_the_call(streamed: bool, tmp_path: Path, budget: int) -> None:
    """Which is no larger than what the plans know of."""
    options: dict[str, Any] = {"kind": Adds, "data": Rows() if streamed else rows_of(*LENGTHS)}
    plain = trained(tmp_path / "plain", **options)
    said: list[str] = []
    callback = BudgetCallback(budget, cost=COST, forbid=QUICK, say=said.append)
    same(plain, trained(tmp_path / "ours", callback, **options))
    assert sum(line.startswith("a larger batch") for line in said) == (2 if streamed else 0)
    assert callback.plan is not None
    assert callback.plan.recomputes


def test_a_bare_model_runs_its_first_larger_batch_under_the_new_plan(tmp_path: Path) -> None:
    """Without PEFT the model that is called is the one whose loss and cache a plan is about."""

    def model() -> Any:
        torch.manual_seed(0)
        sizes: dict[str, Any] = {
            "hidden_size": 48,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
        }
        config = transformers.LlamaConfig(vocab_size=6000, pad_token_id=0, **sizes)
        assert config.use_cache
        return transformers.LlamaForCausalLM(config)

    forbid = ("groups", "sliced_attention")
    few = Planner(model(), batch_of(12), cost=COST, forbid=(*forbid, "chunked_loss")).plan(None).predicted_peak_bytes
    whole = Planner(model(), batch_of(200), cost=COST, forbid=(*forbid, "chunked_loss")).min_peak_bytes()
    limit = (whole + Planner(model(), batch_of(200), cost=COST, forbid=forbid).min_peak_bytes()) // 2
    assert few < limit < whole
    callback, peak = BudgetCallback(limit, cost=COST, forbid=forbid, say=lambda text: None), LastStepPeak()
    data = Rows((12, 9, 12, 8, 200, 180))  # two steps, and a larger batch in the third and last
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trained(tmp_path, callback, peak, model=model(), data=data, max_steps=3)
    assert callback.plan is not None
    assert callback.plan.loss_chunk_rows is not None
    assert callback.plans[0].loss_chunk_rows is None
    assert peak.peak_bytes <= callback.plan.predicted_peak_bytes <= limit


# -- pictures


def with_pictures(patches: int, words: int) -> dict[str, torch.Tensor]:
    """Two rows of as many tokens, with a picture of `patches` patches each, or none."""
    generator = torch.Generator().manual_seed(patches * 64 + words)
    ids = torch.randint(3, IMAGE, (2, words), generator=generator)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if patches:
        side = round(patches**0.5)
        ids[:, 1 : 1 + patches // 4] = IMAGE
        batch |= {
            "pixel_values": torch.randn(2 * patches, 3 * 2 * 14 * 14, generator=generator),
            "image_grid_thw": torch.tensor([[1, side, side]] * 2),
            "mm_token_type_ids": (ids == IMAGE).int(),
        }
    return {**batch, "labels": ids.masked_fill(ids == IMAGE, -100)}


def test_pictures_of_several_sizes(tmp_path: Path) -> None:
    """Words alone, then pictures, then larger ones among fewer words: no plan covers the batches of the others."""
    batches = [with_pictures(*sizes) for sizes in ((0, 40), (16, 24), (64, 20), (16, 24), (0, 40), (64, 20))]

    def model() -> Any:
        torch.manual_seed(0)
        return with_lora(qwen25()[0], target_modules=r".*language_model.*(q_proj|down_proj)|.*visual.*(qkv|proj)")

    options: dict[str, Any] = {
        "data": batches,
        "data_collator": lambda examples: examples[0],
        "per_device_train_batch_size": 1,
        "max_steps": 6,
        "train_sampling_strategy": "sequential",
    }
    plain = trained(tmp_path / "plain", model=model(), **options)
    said: list[str] = []
    callback = BudgetCallback("1GiB", cost=COST, forbid=QUICK, say=said.append)
    same(plain, trained(tmp_path / "ours", callback, model=model(), **options))
    assert sum(line.startswith("a larger batch") for line in said) == 2
    assert len(callback.plans) == 3


# -- rows that are cut


def test_rows_that_are_cut_are_planned_for_as_long_as_they_can_get() -> None:
    loader: Any = DataLoader(Rows(), batch_size=2, collate_fn=pad)  # pyright: ignore[reportArgumentType]
    batches = read_batches(loader, 64)
    assert batches.longest["input_ids"].shape == batches.longest["labels"].shape == (2, 64)
    assert batches.note.startswith("rows of 64 tokens")
    assert list(batches.weights) == [8, 16, 24, 32, 40, 48, 56, 64]
    assert batches.of(24)["attention_mask"].shape == (2, 24)
    assert batches.otherwise is not None
    assert batches.otherwise.longest["input_ids"].shape == (2, 12)
    assert read_batches(loader).otherwise is None
    assert read_batches(loader, 8).longest["input_ids"].shape == (2, 12), "not cut after all"


def test_a_stream_in_trl(tmp_path: Path) -> None:
    trl: Any = pytest.importorskip("trl")
    from datasets import IterableDataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = save_tiny_model(tmp_path / "model")
    words = ["one", "two", "three", "four", "five", "six", "seven", "eight"]
    rows = [{"text": " ".join(words[: 1 + (5 * i) % 8] * 2)} for i in range(16)]

    quiet = quiet_arguments(tmp_path, max_steps=6)
    own = ("per_device_train_batch_size", "learning_rate", "logging_steps", "report_to", "disable_tqdm", "use_cpu")
    shared = {name: getattr(quiet, name) for name in (*own, "dataloader_pin_memory", "seed", "max_steps")}

    def run(*callbacks: Any) -> Run:
        torch.manual_seed(0)
        trainer = trl.SFTTrainer(
            model=AutoModelForCausalLM.from_pretrained(source),
            args=trl.SFTConfig(
                str(tmp_path / "run"),
                max_length=48,
                bf16=False,
                activation_checkpointing=False,
                save_strategy="no",
                **shared,
            ),
            train_dataset=IterableDataset.from_generator(lambda: iter(rows)),
            processing_class=AutoTokenizer.from_pretrained(source),
            peft_config=LoraConfig(target_modules=["q_proj", "down_proj"], lora_dropout=0.1, task_type="CAUSAL_LM"),
            callbacks=list(callbacks),
        )
        trainer.train()
        return adapters(trainer.model), [e["loss"] for e in trainer.state.log_history if "loss" in e]

    plain = run()
    said: list[str] = []
    ample = BudgetCallback("1GiB", cost=COST, forbid=QUICK, say=said.append)
    same(plain, run(ample))
    assert "rows of 48 tokens" in said[-1], "and no batch was larger"
    assert ample.plan is not None
    assert all(len(shape) == 2 and shape[1] <= 48 for plan in ample.plans for _, shape, _ in plan.fingerprint.batch)


@pytest.mark.parametrize("several", [False, True])
def test_a_bound_that_does_not_fit_need_not_be_reached(several: bool) -> None:
    model = adapted()

    def planner(batch: Any) -> Planner:
        return Planner(model, batch, cost=COST, forbid=QUICK)

    loader: Any = DataLoader(Rows(), batch_size=2, collate_fn=pad)  # pyright: ignore[reportArgumentType]
    limit = planner(batch_of(12)).plan(None).predicted_peak_bytes
    batches = read_batches(loader, 64)
    assert planner(batches.longest).min_peak_bytes() > limit
    job = Job.of(model, planner, dict, batches, limit, 64, several=several)
    assert job.note.startswith("the first batch")
    (plan,) = job.plans()
    assert plan.predicted_peak_bytes <= limit
    with pytest.raises(InfeasibleBudgetError):
        Job.of(model, planner, dict, replace(batches, otherwise=None), limit, 64, several=several)
    grown, number = job.grown(batch_of(13))
    assert number == several
    assert len(grown.ladder.planners) == 1 + several
    assert grown.ladder.planners[-1].fingerprint.batch[0][1] in ((2, 13), (2, 16)), "as much room as fits"
    shorter = batch_of(8, rows=3)
    if several:
        assert len(job.grown(shorter)[0].ladder.planners) == 2
    else:
        with pytest.raises(PlanMismatchError, match="none of those that came so far covers"):
            job.grown(shorter)


# -- pieces


@settings(deadline=None)
@given(st.integers(1, 5000), st.none() | st.integers(1, 5000))
def test_room_is_an_eighth_at_most(tokens: int, most: int | None) -> None:
    ids = torch.arange(tokens).repeat(1, 1)
    batch = roomier({"input_ids": ids, "labels": ids, "num_items_in_batch": 3}, most)
    assert batch["input_ids"].shape == batch["labels"].shape
    length = batch["input_ids"].shape[1]
    assert tokens <= length <= max(tokens + 7, tokens * 9 // 8)
    assert most is None or most < tokens or length <= most
    assert torch.equal(batch["input_ids"][:, :tokens], ids)
    assert batch["num_items_in_batch"] == 3


def test_pictures_get_no_room() -> None:
    batch = with_pictures(16, 24)
    found = roomier(batch, None)
    assert bool((found.pop("attention_mask") == 0).any()), "others of this shape may be padded"
    assert all(found[name] is batch[name] for name in found)


def test_what_is_made_longer_has_words_everywhere() -> None:
    examples: list[Any] = list(rows_of(5, 12))
    batch = {**pad(examples), "scores": torch.ones(2), "weights": torch.ones(2, 12)}
    assert roomier(batch, None)["input_ids"].shape == (2, 12), "nobody knows what a number a token is"
    del batch["weights"]
    longer = roomier(batch, None)
    assert longer["input_ids"].shape == (2, 16)
    assert longer["attention_mask"].tolist() == [[1] * 16, [1] * 15 + [0]]
    assert int((longer["labels"] == -100).sum()) == 0, "none of seven empty places is left"
    assert longer["scores"] is batch["scores"]
    assert torch.equal(stretched(batch, 12)["labels"], batch["labels"])
    assert stretched(batch, 4)["labels"].shape == (2, 4)


def test_what_a_plan_covers_that_another_does_not_is_not_dropped() -> None:
    plan = Planner(adapted(), batch_of(12), cost=COST, forbid=QUICK).plan(None)

    def of(**shapes: tuple[int, ...]) -> Any:
        batch = tuple((name, shape, "int64") for name, shape in sorted(shapes.items()))
        return replace(plan, fingerprint=replace(plan.fingerprint, batch=batch))

    less, more, wide = of(ids=(2, 9)), of(ids=(2, 12)), of(ids=(2, 9), pictures=(4, 4))
    assert covers(more.fingerprint, less.fingerprint)
    assert not covers(less.fingerprint, more.fingerprint)
    assert not covers(more.fingerprint, wide.fingerprint)
    assert not differ(less, more)
    assert differ(more, less)
    assert differ(more, wide)
    assert not differ(less, wide)


def test_a_ladder_grows_to_so_many_rungs() -> None:
    plan = Planner(adapted(), batch_of(12), cost=COST, forbid=QUICK).plan(None)

    def planner(*shape: int) -> Any:
        return SimpleNamespace(fingerprint=replace(plan.fingerprint, batch=(("ids", shape, "int64"),)))

    ladder = Ladder((planner(2, 8),))
    for tokens in (16, 17, 32, 64, 128, 256, 512, 1024, 2048):
        ladder = ladder.extended(planner(2, tokens))
    found = [each.fingerprint.batch[0][1][1] for each in ladder.planners]
    assert len(found) == MOST_GROWN
    assert found == [8, 32, 64, 128, 256, 512, 1024, 2048], "16 first, which 17 nearly is; then 17"
    assert Ladder((planner(2, 8),)).extended(planner(2, 8)).planners[0].fingerprint.batch[0][1] == (2, 8)
    again = ladder.extended(planner(2, 64))
    assert [each.fingerprint for each in again.planners] == [each.fingerprint for each in ladder.planners]
    assert again.number_for(planner(2, 64).fingerprint) == 2
    apart = Ladder((planner(1, 40),))
    for number in range(2, 32):
        apart = apart.extended(planner(number, 41 - number))
    assert len(apart.planners) == MOST_APART, "none covers another"
    assert apart.number_for(planner(31, 10).fingerprint) >= 0, "the latest is there"


def test_reading_batches_draws_nothing_of_the_run() -> None:
    """A collator may draw from any generator, and the run goes on from where each of them was."""

    def noisy(examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        assert all(draw() is not None for draw in (random.random, np.random.random, lambda: torch.rand(1)))
        return pad(examples)

    for data in (rows_of(*LENGTHS), Rows()):
        for seed in (random.seed, np.random.seed, torch.manual_seed):
            seed(5)
        expected = (random.random(), np.random.random(), torch.rand(1))
        for seed in (random.seed, np.random.seed, torch.manual_seed):
            seed(5)
        loader: DataLoader[Any] = DataLoader(data, batch_size=2, collate_fn=noisy)  # pyright: ignore[reportArgumentType]
        batches = read_batches(loader, None)
        assert batches.longest["input_ids"].shape[0] == 2
        assert (random.random(), np.random.random(), torch.rand(1)) == expected


def test_data_that_can_be_gone_through_once_loses_a_batch_and_that_is_said() -> None:
    class Once(Rows):
        def __init__(self) -> None:
            super().__init__()
            self.left = iter(self.rows)

        def __iter__(self) -> Iterator[dict[str, Any]]:
            return self

        def __next__(self) -> dict[str, Any]:
            return next(self.left)

    loader = DataLoader(Once(), batch_size=2, collate_fn=pad)
    with pytest.warns(UserWarning, match="its first batch, which is read to plan for, is not trained on"):
        read_batches(loader, None)
    assert sum(len(batch["input_ids"]) for batch in loader) == len(LENGTHS) - 2
    read_batches(DataLoader(Rows(), batch_size=2, collate_fn=pad), None)  # warnings are errors
