"""How TRL's trainers call the model.

The trainers of SFT, DPO, KTO, GRPO and RLOO replace the forward of the language model by one that takes
`fused_lm_head=True` and returns log-probabilities instead of logits, tile by tile. A plan for such a model has to
observe the same call. The losses of DPO and KTO need the sum of them for each row, which costs what the mean does;
their references run without a graph before backward begins, and keep a few numbers a row, GRPO and RLOO a few for each
token of a completion. `RewardTrainer` compares the rewards of the first half of a batch with those of the second.

The batches of GRPO and RLOO are not in the data: the model writes them. How large they get is known all the same.

Source: trl/trainer/utils.py (`add_fused_lm_head`) and the trainers' files, 1.16.0.
"""

import inspect
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Final

import torch

from rematree.errors import UsageError
from rematree.execute.override import ForwardOverride
from rematree.integrations.batches import Batches, evenly, rounded_up
from rematree.observation.observe import LossFunction
from rematree.regions import unwrap

_SWITCH: Final = "fused_lm_head"
_COMPLETION: Final = "completion_mask"
_REFERENCE: Final = frozenset({"ref_chosen_logps", "ref_rejected_logps", "ref_logps", "ref_KL_logps"})
_OTHER_COMPLETIONS: Final = "KL_"  # KTO runs them without a graph
_DESIRED: Final = "label"  # whether a completion of KTO is
_PROMPT: Final = "prompt"
_IMAGES: Final = frozenset({"image", "images"})


def call_of(model: Any, arguments: Any) -> tuple[dict[str, Any], LossFunction | None]:
    """What the trainer adds to each batch when it calls `model`, and the loss it makes of the output.

    Empty and None for a model that is called with its batches, and whose own loss is differentiated.

    Args:
        model: As the trainer has it.
        arguments: Of the trainer.
    """
    if hasattr(arguments, "center_rewards_coefficient"):  # a RewardConfig
        return {"use_cache": False}, _preference
    forward: Any = unwrap(model).forward
    while isinstance(forward, ForwardOverride):  # this library's switch may lie around the patch
        forward = vars(forward)["__wrapped__"]
    patched = getattr(forward, "__func__", forward)
    # The patch keeps the original's signature for the outside, so look at its own.
    if _SWITCH not in inspect.signature(patched, follow_wrapped=False).parameters:
        return {}, None
    return {_SWITCH: True, "use_cache": False}, _negative_log_likelihood


def as_called(batch: Mapping[str, Any]) -> dict[str, Any]:
    """What the model is called with for a batch of the loader, or more: DPO and KTO make labels of their masks."""
    if _COMPLETION not in batch:
        return dict(batch)
    own = {_COMPLETION, _DESIRED, *_REFERENCE}
    called = {name: t for name, t in batch.items() if name not in own and not name.startswith(_OTHER_COMPLETIONS)}
    if "labels" not in batch:
        called["labels"] = batch["input_ids"].masked_fill(batch[_COMPLETION] == 0, -100)
    others = batch.get(f"{_OTHER_COMPLETIONS}input_ids")
    return called if others is None else _as_long_as(others, called)


def _as_long_as(others: torch.Tensor, called: dict[str, Any]) -> dict[str, Any]:
    """`called` with rows as long as `others`, if they are longer: their logits are beside what this call saves."""
    shape = called["input_ids"].shape
    more = max(0, others.shape[1] - shape[1])
    return {
        name: torch.nn.functional.pad(value, (0, more)) if getattr(value, "shape", None) == shape else value
        for name, value in called.items()
    }


def generated_batches(arguments: Any, loader: Any, processing: Any) -> Batches | None:
    """The batches of a trainer whose model writes the completions; None where the data has them.

    Args:
        arguments: Of the trainer: a `GRPOConfig` or `RLOOConfig`, or any other.
        loader: Its data loader.
        processing: Its tokenizer, which prompts go through as in the trainer, but for the tools that it may add.
    Raises:
        UsageError: how long prompts or completions get cannot be known, or there are images among the prompts.
    Cost:
        Every prompt is tokenized once.
    """
    if not (hasattr(arguments, "num_generations") and hasattr(arguments, "max_completion_length")):
        return None
    most = arguments.max_completion_length
    unknown = _why_unknown(most, getattr(loader.dataset, "column_names", None) or ())
    if unknown is not None:
        raise UsageError(
            f"{type(arguments).__name__}: the longest batch cannot be known: {unknown}",
            remedies=["rematree.apply(rematree.plan(model, longest, budget=..., loss=...), model) before training"],
        )
    multiple = getattr(arguments, "pad_to_multiple_of", None)
    prompt = rounded_up(max(map(len, _tokenized(loader.dataset[_PROMPT], arguments, processing)), default=1), multiple)
    most = rounded_up(most, multiple)
    rows = arguments.per_device_train_batch_size

    def of(length: int) -> dict[str, Any]:
        ids = torch.zeros(rows, length, dtype=torch.int64)
        mask = torch.ones_like(ids)
        mask[-1, 0] = 0  # prompts are padded on the left, to the longest one that completions were written for
        labels = ids.clone()
        labels[:, : max(1, length - most)] = -100
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}

    note = f"{rows} rows of the longest prompt, {prompt} tokens, and {most} tokens of completion"
    # Nobody knows beforehand how long completions will be.
    return Batches(of(prompt + most), note, evenly(most, before=prompt), of)


def _why_unknown(most: int | None, columns: Collection[str]) -> str | None:
    if most is None:
        return "max_completion_length is None"
    if _PROMPT not in columns:
        return "the data has no column of prompts that can be read beforehand"
    return "there are images among the prompts" if _IMAGES.intersection(columns) else None


def _tokenized(prompts: Sequence[Any], arguments: Any, processing: Any) -> Sequence[Sequence[int]]:
    if not prompts or isinstance(prompts[0], str):
        return processing(text=list(prompts))["input_ids"] if prompts else []
    return processing.apply_chat_template(
        conversation=list(prompts),
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        **(getattr(arguments, "chat_template_kwargs", None) or {}),
    )["input_ids"]


def _preference(output: Any) -> torch.Tensor:
    chosen, rejected = output.logits.squeeze(-1).chunk(2)
    return -torch.nn.functional.logsigmoid(chosen - rejected).mean()


def _negative_log_likelihood(output: Any) -> torch.Tensor:
    return -output.log_probs.sum() / output.label_mask.sum().clamp(min=1)
