"""More small models from their configs: with the dropout they ship with, and the batch and adapters they take."""

import contextlib
from collections.abc import Callable, Generator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
import transformers
from torch import nn

import rematree
from models import build, with_lora
from rematree.regions import unwrap

Batch = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Case:
    """One architecture.

    Attributes:
        make: A new model in training mode, its own dropout on, all parameters trained.
        lora: What `with_lora` gets; {} is every linear with dropout 0.1.
        classes: It classifies sequences into that many classes; 0 is a language model.
    """

    make: Callable[[], Any]
    lora: dict[str, Any]
    classes: int = 0

    def adapted(self) -> nn.Module:
        return with_lora(self.make(), **self.lora)

    def batch(self) -> Batch:
        ids = torch.randint(3, 99, (2, 12), generator=torch.Generator().manual_seed(1))
        labels = torch.tensor([0, 1]) if self.classes else ids.clone()
        return {"input_ids": ids, "labels": labels}


def _opt() -> Any:
    config = transformers.OPTConfig(
        hidden_size=32, ffn_dim=48, num_hidden_layers=3, num_attention_heads=4, vocab_size=99, word_embed_proj_dim=32
    )
    return transformers.OPTForCausalLM(config)


def _t5() -> Any:
    config = transformers.T5Config(d_model=32, d_kv=8, d_ff=48, num_layers=3, num_heads=4, vocab_size=99)
    config.decoder_start_token_id = 0
    # Checkpointing switches the cache off, and a cache copies keys into another layout: products may round differently.
    config.use_cache = False
    return transformers.T5ForConditionalGeneration(config)


def bart(encoder_layers: int = 3, decoder_layers: int = 3) -> Any:
    """An encoder and a decoder, each a list of blocks."""
    config = transformers.BartConfig(
        d_model=32,
        encoder_layers=encoder_layers,
        decoder_layers=decoder_layers,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        vocab_size=99,
        max_position_embeddings=64,
    )
    return transformers.BartForConditionalGeneration(config)


def _bert() -> Any:
    config = transformers.BertConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, vocab_size=99
    )
    return transformers.BertForSequenceClassification(config)


def qwen3_moe() -> Any:
    """A mixture of experts whose experts are stacked in 3-D parameters."""
    config = transformers.Qwen3MoeConfig(
        hidden_size=32,
        moe_intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_experts=4,
        num_experts_per_tok=2,
        vocab_size=99,
    )
    torch.manual_seed(0)
    return transformers.Qwen3MoeForCausalLM(config)


EXPERTS: dict[str, Any] = {
    "target_modules": ["q_proj", "v_proj"],
    "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    "lora_dropout": 0.0,  # PEFT has none for parameters
}

CASES = {
    "llama": Case(lambda: build("llama"), {}),
    "mistral": Case(lambda: build("mistral"), {}),
    "gpt2": Case(lambda: build("gpt2"), {}),
    "opt": Case(_opt, {}),
    "t5": Case(_t5, {}),
    "bart": Case(bart, {}),
    "bert": Case(_bert, {"task_type": "SEQ_CLS"}, classes=2),
    "qwen3-moe": Case(qwen3_moe, EXPERTS),
}


def step(model: Any, batch: Batch, seed: int = 7, *, between: Callable[[], Any] | None = None) -> Batch:
    """Loss (as "loss") and every gradient of one step; `between` runs after forward."""
    torch.manual_seed(seed)
    model.zero_grad(set_to_none=True)
    loss = model(**batch).loss
    if between is not None:
        between()
    loss.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return {"loss": loss.detach(), **found}


def state_of(model: nn.Module) -> list[tuple[str, dict[str, Any]]]:
    """Every attribute of every module by identity, and every hook: for comparing before and after."""
    state: list[tuple[str, dict[str, Any]]] = []
    for name, module in model.named_modules():
        attributes: dict[str, Any] = {}
        for key, value in module.__dict__.items():
            is_hooks = key.endswith("hooks") and isinstance(value, dict)
            attributes[key] = dict(value) if is_hooks else value if isinstance(value, bool | int | str) else id(value)
        state.append((name, attributes))
    return state


def upstream_is_wrong(present: bool, bug: str) -> None:
    """Assert a bug of another library in the version that is installed."""
    assert present, f"upstream has fixed this, so its half of the test can go: {bug}"


@contextlib.contextmanager
def by_transformers(model: Any, kwargs: dict[str, Any] | None = None, **options: Any) -> Generator[None]:
    """transformers' own switch on inside, off with its hooks afterwards."""
    base: Any = unwrap(model)
    base.activation_checkpointing_enable(kwargs, **options)
    try:
        yield
    finally:
        base.activation_checkpointing_disable()
        base.disable_input_require_grads()


@contextlib.contextmanager
def by_rematree(model: nn.Module, kwargs: dict[str, Any] | None = None, every_n_layers: int = 1) -> Generator[None]:
    """This library's switch on inside, off afterwards."""
    rematree.activation_checkpointing_enable(model, kwargs, every_n_layers)
    try:
        yield
    finally:
        rematree.activation_checkpointing_disable(model)


class Block(nn.Module):
    """A residual block with dropout; `scale` comes as a keyword, as rotary embeddings and masks do."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.dropout = nn.Linear(8, 16), nn.Linear(16, 8), nn.Dropout(0.2)

    def forward(self, x: torch.Tensor, *, scale: torch.Tensor) -> torch.Tensor:
        return x + self.down(self.dropout(torch.tanh(self.up(x)))) * scale


class Plain(nn.Module):
    """A model that knows nothing of transformers: an embedding, a list of blocks, a loss."""

    def __init__(self, blocks: int = 5) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 8)
        self.blocks = nn.ModuleList(Block() for _ in range(blocks))
        self.scale = nn.Parameter(torch.ones(8))

    def get_input_embeddings(self) -> nn.Module:
        return self.embedding

    def forward(self, input_ids: torch.Tensor) -> SimpleNamespace:
        x = self.embedding(input_ids)
        for block in self.blocks:
            x = block(x, scale=self.scale)
        return SimpleNamespace(loss=x.square().mean())


PLAIN_BATCH: Batch = {"input_ids": torch.arange(10).reshape(2, 5)}
