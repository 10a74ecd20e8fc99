"""Turn a conversation into token ids and labels; only what the assistant says is trained on."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from jinja2 import TemplateError

from rematree.errors import UsageError
from rematree.finetune.records import Message, Record

IGNORED: Final = -100
_MAX_SHOWN: Final = 80


@dataclass(frozen=True)
class TokenizedExample:
    """Token ids, and for each the label: itself, or `IGNORED` where nothing is learned."""

    input_ids: list[int]
    labels: list[int]

    def cut(self, max_length: int) -> "TokenizedExample":
        """The first `max_length` tokens."""
        return TokenizedExample(self.input_ids[:max_length], self.labels[:max_length])

    @property
    def trains(self) -> bool:
        """True when any token but the first has a label; the first has nothing before it to be predicted from."""
        return any(label != IGNORED for label in self.labels[1:])


def tokenize(record: Record, tokenizer: Any) -> TokenizedExample:
    """Token ids of the whole conversation, labels on the assistant's turns.

    The text is tokenised turn by turn, so that a prompt has the same tokens here as at inference, where generation
    starts behind it.

    Raises:
        UsageError: the record has several turns and the tokenizer no chat template to put them together.
    """
    input_ids: list[int] = []
    labels: list[int] = []
    for text, trained in _segments(record.messages, tokenizer):
        ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
        input_ids += ids
        labels += ids if trained else [IGNORED] * len(ids)
    if not tokenizer.chat_template and tokenizer.bos_token_id is not None:
        input_ids.insert(0, tokenizer.bos_token_id)
        labels.insert(0, IGNORED)
    return TokenizedExample(input_ids, labels)


def prompt_text(messages: Sequence[Message], tokenizer: Any) -> str:
    """Everything before the answer to the last of `messages`, as the model is given it to answer."""
    if tokenizer.chat_template:
        return _render(messages, tokenizer, answer_next=True)
    if len(messages) != 1:
        raise UsageError(
            "the tokenizer has no chat template, so conversations of several turns cannot be put together",
            remedies=['lines of {"prompt": ..., "completion": ...}', "a model with a chat template"],
        )
    return messages[0].content


def prompt_tokens(text: str, tokenizer: Any, **options: Any) -> Any:
    """What the tokenizer makes of a prompt; a chat template has already put the special tokens into its text."""
    return tokenizer(text, add_special_tokens=not tokenizer.chat_template, **options)


def _segments(messages: tuple[Message, ...], tokenizer: Any) -> list[tuple[str, bool]]:
    """The conversation as text, in pieces: (text, is it trained on)."""
    if not tokenizer.chat_template:
        prompt = prompt_text(messages[:-1], tokenizer)
        return [(prompt, False), (messages[-1].content + (tokenizer.eos_token or ""), True)]
    turns = [i for i, message in enumerate(messages) if message.role == "assistant"]
    segments = _render_turns(messages, turns, tokenizer)
    if segments is None and len(turns) > 1:
        # Some templates drop the reasoning of all but the last answer: those earlier answers were never given.
        segments = _render_turns(messages[: turns[-1] + 1], turns[-1:], tokenizer)
    if segments is None:
        raise UsageError(
            "the chat template of the tokenizer changes the prompt once the answer is there",
            details=["so it cannot be told which tokens are the answer"],
        )
    return segments


def _render_turns(messages: tuple[Message, ...], turns: list[int], tokenizer: Any) -> list[tuple[str, bool]] | None:
    segments: list[tuple[str, bool]] = []
    done = ""
    for turn in turns:
        prompt = _render(messages[:turn], tokenizer, answer_next=True)
        whole = _render(messages[: turn + 1], tokenizer, answer_next=False)
        if not prompt.startswith(done) or not whole.startswith(prompt):
            return None
        segments += [(prompt[len(done) :], False), (whole[len(prompt) :], True)]
        done = whole
    return segments


def _render(messages: Sequence[Message], tokenizer: Any, *, answer_next: bool) -> str:
    turns = [{"role": message.role, "content": message.content} for message in messages]
    try:
        return tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=answer_next)
    except TemplateError as error:
        roles = ", ".join(message.role for message in messages)
        raise UsageError(
            f"the chat template of the tokenizer refuses a conversation: {error}",
            details=[f"its turns: {roles}", f"it begins: {messages[0].content[:_MAX_SHOWN]!r}"],
        ) from error
