"""Packed rows keep every token once and let no example see another."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st

from rematree.errors import UsageError
from rematree.finetune.base import leave_caches_out, meta_base
from rematree.finetune.data import collate
from rematree.finetune.packing import best_fit_decreasing, pack, pad, refuse_leaks
from rematree.finetune.tokens import IGNORED, TokenizedExample
from test_finetune_tiny import tiny_config, tiny_model

CAPACITY = 16
PAD = 2


@st.composite
def examples(draw: st.DrawFn) -> list[TokenizedExample]:
    made: list[TokenizedExample] = []
    # Token ids count up, so that a lost or doubled one shows.
    token = 100
    for length in draw(st.lists(st.integers(2, CAPACITY), min_size=1, max_size=12)):
        ids = list(range(token, token + length))
        token += length
        trained_from = draw(st.integers(1, length - 1))
        made.append(TokenizedExample(ids, [IGNORED] * trained_from + ids[trained_from:]))
    return made


@given(st.lists(st.integers(1, CAPACITY), max_size=40))
def test_every_item_is_in_one_bin_that_holds_it(lengths: list[int]):
    bins = best_fit_decreasing(lengths, CAPACITY)
    assert sorted(index for members in bins for index in members) == list(range(len(lengths)))
    assert all(0 < sum(lengths[index] for index in members) <= CAPACITY for members in bins)


def test_items_go_where_the_least_room_is_left():
    assert best_fit_decreasing([6, 3, 5, 4, 9], 10) == [[4], [0, 3], [2, 1]]


@given(examples())
def test_packing_keeps_every_token_once_and_restarts_positions(made: list[TokenizedExample]):
    rows = pack(made, CAPACITY, PAD)
    found: dict[int, int] = {}
    for ids, labels, positions in zip(rows["input_ids"], rows["labels"], rows["position_ids"], strict=True):
        assert len(ids) == len(labels) == len(positions) == CAPACITY
        for token, label, position in zip(ids, labels, positions, strict=True):
            if token == PAD:
                assert label == IGNORED
            else:
                assert token not in found
                found[token] = label
            # The first token of an example is predicted from nothing.
            assert position > 0 or label == IGNORED
        starts = [i for i, position in enumerate(positions) if position == 0]
        assert starts[0] == 0
        for start, end in zip(starts, [*starts[1:], CAPACITY], strict=True):
            assert positions[start:end] == list(range(end - start))
    assert found == {t: label for e in made for t, label in zip(e.input_ids, e.labels, strict=True)}


@given(examples())
def test_padding_keeps_every_example_in_its_own_row(made: list[TokenizedExample]):
    rows = pad(made, CAPACITY, PAD)
    for example, ids, labels, mask in zip(made, rows["input_ids"], rows["labels"], rows["attention_mask"], strict=True):
        length = len(example.input_ids)
        assert ids == example.input_ids + [PAD] * (CAPACITY - length)
        assert labels == example.labels + [IGNORED] * (CAPACITY - length)
        assert mask == [1] * length + [0] * (CAPACITY - length)


def batch(columns: dict[str, list[list[int]]]) -> dict[str, torch.Tensor]:
    rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    return collate(rows)


def test_packed_loss_is_the_loss_of_the_examples_one_by_one():
    lengths = [7, 5, 4, 11, 3]
    generator = torch.Generator().manual_seed(0)
    made: list[TokenizedExample] = []
    for length in lengths:
        ids = torch.randint(5, 261, (length,), generator=generator).tolist()
        made.append(TokenizedExample(ids, [IGNORED, IGNORED, *ids[2:]]))
    for attention in ("eager", "sdpa"):
        # Weights large enough that a leak between examples is no rounding error.
        model = tiny_model(attn_implementation=attention, initializer_range=0.5).eval()
        total = torch.tensor(0.0)
        for example in made:
            ids, labels = torch.tensor([example.input_ids]), torch.tensor([example.labels])
            total += model(input_ids=ids, labels=labels).loss * (len(example.input_ids) - 2)
        mean = total / sum(length - 2 for length in lengths)
        # Float32 sums in another order: 1e-6 of a loss of about 5.6.
        packed = model(**batch(pack(made, CAPACITY, PAD)), use_cache=False).loss
        torch.testing.assert_close(packed, mean, rtol=1e-6, atol=0)
        torch.testing.assert_close(model(**batch(pad(made, CAPACITY, PAD))).loss, mean, rtol=1e-6, atol=0)


def hybrid() -> Any:
    torch.manual_seed(0)
    config = transformers.Lfm2Config(
        vocab_size=261, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, layer_types=["conv", "full_attention"], pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return transformers.Lfm2ForCausalLM(config)


@pytest.mark.parametrize("rows", [1, 2])
def test_a_model_whose_examples_leak_into_each_other_is_refused(rows: int) -> None:
    for attention in ("eager", "sdpa"):
        model = tiny_model(attn_implementation=attention).train().requires_grad_(False)
        model.config.use_cache = False
        random = torch.get_rng_state()
        refuse_leaks(model, rows)
        assert torch.equal(torch.get_rng_state(), random)
        assert not model.get_input_embeddings()._forward_hooks
        model.config.use_cache = True  # transformers looks for several examples in a row only without a cache
        with pytest.raises(UsageError, match="an example depends on those before it in its row") as error:
            refuse_leaks(model, rows)
        assert error.value.remedies == ("--no-packing",)
    with pytest.raises(UsageError, match="an example depends on those before it in its row"):
        refuse_leaks(hybrid().train(), rows)


def test_the_cache_is_left_out_where_an_inner_model_reads_it() -> None:
    """Gemma 3n makes one in its text model, whose config is another's part, before any mask."""
    config = transformers.Gemma3nConfig()
    leave_caches_out(SimpleNamespace(config=config))
    assert not config.use_cache  # pyright: ignore[reportAttributeAccessIssue, reportUnknownMemberType]
    assert not config.get_text_config().use_cache


def test_layers_that_run_on_along_a_row_are_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(hybrid().config.to_json_string())
    with pytest.raises(UsageError, match="layers of conv, whose state runs on along a row"):
        meta_base(tiny_config(tmp_path, model=str(tmp_path)))
    model, _ = meta_base(tiny_config(tmp_path, model=str(tmp_path), packing=False))
    assert next(model.parameters()).is_meta
