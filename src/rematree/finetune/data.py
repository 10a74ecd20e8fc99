"""Data for a run: rows of one fixed shape to train on, and whole examples that are held out."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import datasets
import torch

from rematree.errors import UsageError
from rematree.finetune.packing import pack, pad
from rematree.finetune.records import Record, read_records
from rematree.finetune.tokens import TokenizedExample, prompt_text, prompt_tokens, tokenize


@dataclass(frozen=True)
class DataReport:
    """What became of the examples.

    Attributes:
        num_records: Examples read.
        num_train: Examples to train on.
        num_heldout: Examples held out.
        num_cut: Examples longer than the row, cut to it.
        num_dropped: Examples left out because no token of their answer is left.
        num_rows: Rows of exactly `max_length` tokens.
        fill: Share of the tokens in these rows that is no padding.
        max_length: Tokens in a row.
    """

    num_records: int
    num_train: int
    num_heldout: int
    num_cut: int
    num_dropped: int
    num_rows: int
    fill: float
    max_length: int

    def lines(self) -> list[str]:
        """The report for the terminal; a cut or dropped example is said once, with the count."""
        lines = [
            f"data: {self.num_train} examples in {self.num_rows} rows of {self.max_length} tokens "
            f"({self.fill:.0%} filled), {self.num_heldout} held out"
        ]
        if self.num_cut:
            lines.append(
                f"{self.num_cut} of {self.num_records} examples are longer than --max-length {self.max_length} "
                "and were cut"
            )
        if self.num_dropped:
            lines.append(
                f"{self.num_dropped} of {self.num_records} examples have no token of an answer within --max-length "
                f"{self.max_length} and were left out"
            )
        return lines


@dataclass(frozen=True)
class HeldoutQuestion:
    """A question that is not trained on, for an answer before and after.

    Attributes:
        text: The prompt as the model is given it.
        answer: The answer in the data.
    """

    text: str
    answer: str


@dataclass(frozen=True)
class DataSplit:
    """Data of a run.

    Attributes:
        train: Columns `input_ids`, `labels` and `position_ids` (packed) or `attention_mask`, all of `max_length`.
        heldout: Columns `input_ids`, `labels`; one example a row at its own length, in random order.
        question: The first held-out example whose prompt is short enough to be answered, or None without one.
        report: What became of the examples.
    """

    train: datasets.Dataset
    heldout: datasets.Dataset
    question: HeldoutQuestion | None
    report: DataReport


def load_data(
    spec: str,
    tokenizer: Any,
    *,
    max_length: int,
    packing: bool = True,
    heldout: float = 0.1,
    seed: int = 0,
    longest_prompt: int | None = None,
) -> DataSplit:
    """Read, split, tokenise and pack the examples that `spec` names.

    Args:
        spec: Path of a .jsonl file, Hub data set id, or "builtin:stdlib-docstrings".
        tokenizer: Has a padding token; its chat template is used if it has one.
        max_length: Tokens in a row. Longer examples are cut.
        packing: Several examples in one row.
        heldout: Share (below 1) or number (1 and more) of examples held out; 0 holds out none.
        seed: Chooses which ones.
        longest_prompt: Tokens that the question may have; `max_length` at most.
    Raises:
        UsageError: no such data, a malformed line, or nothing left to train on.
    Not covered:
        Data sets that do not fit in memory as lists of token ids.
    """
    records = read_records(spec)
    train_records, heldout_records = split_records(records, heldout, seed)
    train, train_cut, train_dropped = _tokenize_all(train_records, tokenizer, max_length)
    if not train:
        raise UsageError(
            f"no example of {spec} has a token of its answer within --max-length {max_length}",
            details=[f"{len(records)} examples, {len(heldout_records)} of them held out"],
            remedies=["a larger --max-length", "a smaller --heldout"],
        )
    rest, rest_cut, rest_dropped = _tokenize_all(heldout_records, tokenizer, max_length)
    columns = (pack if packing else pad)(train, max_length, tokenizer.pad_token_id)
    num_rows = len(columns["input_ids"])
    report = DataReport(
        num_records=len(records),
        num_train=len(train),
        num_heldout=len(rest),
        num_cut=train_cut + rest_cut,
        num_dropped=train_dropped + rest_dropped,
        num_rows=num_rows,
        fill=sum(len(example.input_ids) for example in train) / (num_rows * max_length),
        max_length=max_length,
    )
    rest_columns = {"input_ids": [e.input_ids for e in rest], "labels": [e.labels for e in rest]}
    room = max_length if longest_prompt is None else min(max_length, longest_prompt)
    question = _question(heldout_records, tokenizer, room)
    table: Any = datasets.Dataset
    return DataSplit(table.from_dict(columns), table.from_dict(rest_columns), question, report)


def split_records(records: Sequence[Record], heldout: float, seed: int) -> tuple[list[Record], list[Record]]:
    """(train, held out) by a hash of each record's key, so that equal records are on the same side.

    The same for every process and Python version; adding records moves none of the others when `heldout` is a share.
    Held-out records come in the order of their hashes, so any first few of them are a random sample.
    """
    ranks = {record.key: _rank(record.key, seed) for record in records}
    chosen: set[str] = set()
    if heldout >= 1:
        if heldout >= len(ranks):
            raise UsageError(
                f"--heldout {heldout:.0f} leaves nothing to train on: there are {len(ranks)} different examples",
                remedies=["a smaller --heldout"],
            )
        chosen = set(sorted(ranks, key=lambda key: ranks[key])[: int(heldout)])
    elif heldout > 0 and len(ranks) > 1:
        chosen = {key for key, rank in ranks.items() if rank < heldout * 2**64}
        if not chosen or len(chosen) == len(ranks):
            chosen = {min(ranks, key=lambda key: ranks[key])}
    train = [record for record in records if record.key not in chosen]
    rest = sorted((record for record in records if record.key in chosen), key=lambda record: ranks[record.key])
    return train, rest


def collate(rows: Sequence[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    """Stack rows of one length into a batch."""
    return {name: torch.tensor([row[name] for row in rows]) for name in rows[0]}


def planning_batch(train: Any, batch_size: int) -> dict[str, torch.Tensor]:
    """A batch of the shape that every step has, made of rows that need an attention mask.

    A batch whose rows are each one whole example needs none and is a little smaller; the plan must hold for all.
    """
    if len(train) < batch_size:
        raise UsageError(
            f"a step takes {batch_size} rows, the data fills only {len(train)}",
            remedies=[f"--per-device-train-batch-size {len(train)}", "a smaller --max-length", "more data"],
        )
    if "position_ids" in train.column_names:
        plain = [max(row) == len(row) - 1 for row in train["position_ids"]]
    else:
        plain = [min(row) == 1 for row in train["attention_mask"]]
    order = sorted(range(len(train)), key=lambda index: plain[index])
    return collate([train[index] for index in order[:batch_size]])


def _rank(key: str, seed: int) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}|{key}".encode()).digest()[:8], "big")


def _tokenize_all(
    records: Sequence[Record], tokenizer: Any, max_length: int
) -> tuple[list[TokenizedExample], int, int]:
    """(examples, how many were cut, how many were dropped)."""
    examples: list[TokenizedExample] = []
    num_cut = num_dropped = 0
    for record in records:
        whole = tokenize(record, tokenizer)
        example = whole.cut(max_length)
        if not example.trains:
            num_dropped += 1
            continue
        num_cut += len(whole.input_ids) > max_length
        examples.append(example)
    return examples, num_cut, num_dropped


def _question(records: Sequence[Record], tokenizer: Any, longest: int) -> HeldoutQuestion | None:
    """The first of `records` whose prompt has at most `longest` tokens."""
    for record in records:
        turn = next(i for i, message in enumerate(record.messages) if message.role == "assistant")
        text = prompt_text(record.messages[:turn], tokenizer)
        if len(prompt_tokens(text, tokenizer)["input_ids"]) <= longest:
            return HeldoutQuestion(text, record.messages[turn].content)
    return None
