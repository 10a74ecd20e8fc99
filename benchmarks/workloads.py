"""What the frontier benchmark trains: a model, a batch, and the step that is timed.

The step is forward and backward; an optimizer would add the same bytes and seconds to every way of stepping. The first
of LoRA's two matrices gets no gradient while the second is zero, so the second is filled: gradients that are compared
are those of a model in the middle of its training.
"""

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rematree.errors import UsageError
from rematree.finetune.base import load_base
from rematree.finetune.config import TrainConfig
from rematree.finetune.model import BUILTIN, preferred_dtype
from rematree.integrations.bitsandbytes import Quantisation, quantisation_config

Batch = Mapping[str, torch.Tensor]
Loss = Callable[[Any, Batch], torch.Tensor]
RANK = 8
SMOLLM2 = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
    "rope_theta": 100000.0,
}
WIDE = {
    "vocab_size": 32000,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 6,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
}
TINY = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
}
# Of Llama-3-8B; fewer layers than its 32, all alike, so that a run takes minutes.
EIGHT_B = {
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 8,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 32768,
    "tie_word_embeddings": False,
    "rope_theta": 500000.0,
}
SHAPES: Mapping[str, Mapping[str, Any]] = {"smollm2": SMOLLM2, "wide": WIDE, "tiny": TINY, "8b": EIGHT_B}


@dataclass(frozen=True)
class Workload:
    """One thing to train.

    Attributes:
        name: For the command line and the output.
        shape: Key of `SHAPES`.
        mode: "lora" on all linear layers, "nf4" (the same over 4-bit weights) or "full".
        rows: Sequences in the batch.
        tokens: In each sequence.
        dropout: In front of the adapters.
        peers: Which take part: "all", "main" or "few"; those left out are near to others that stay.
        points: Budgets of each of our series, beside those that are what a peer needs.
    """

    name: str
    shape: str
    mode: str
    rows: int
    tokens: int
    dropout: float = 0.0
    peers: str = "few"
    points: int = 5

    @property
    def title(self) -> str:
        trained = {"lora": "LoRA", "nf4": "LoRA on NF4", "full": "full fine-tuning"}[self.mode]
        dropout = f", dropout {self.dropout}" if self.mode != "full" else ""
        return f"{self.shape}, {trained}{dropout}, {self.rows} x {self.tokens} tokens"


WORKLOADS: Mapping[str, Workload] = {
    workload.name: workload
    for workload in (
        Workload("smollm2", "smollm2", "lora", 2, 512, peers="all", points=8),
        Workload("smollm2-dropout", "smollm2", "lora", 2, 512, dropout=0.05),
        Workload("smollm2-nf4", "smollm2", "nf4", 2, 512, dropout=0.05),
        Workload("wide", "wide", "lora", 2, 512, peers="main"),
        Workload("smollm2-full", "smollm2", "full", 2, 512),
        Workload("smollm2-4096", "smollm2", "lora", 1, 4096, points=4),
    )
}
QUICK: Mapping[str, Workload] = {"tiny": Workload("tiny", "tiny", "lora", 2, 64, dropout=0.05, peers="all", points=3)}


@dataclass(frozen=True)
class Built:
    """A workload ready to step. `weights` says where the weights are from."""

    workload: Workload
    model: Any
    batch: dict[str, torch.Tensor]
    weights: str

    @property
    def base(self) -> Any:
        """The transformers model inside PEFT's."""
        return self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model

    @property
    def layers(self) -> list[nn.Module]:
        """The repeated blocks, in order."""
        return list(self.base.model.layers)


def default_dtype() -> torch.dtype:
    """bfloat16 where the device computes in it. On a CPU that is asked of the processor: oneDNN also emulates."""
    if torch.cuda.is_available():
        return preferred_dtype()
    fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if fast else torch.float32


def build(workload: Workload, device: torch.device, dtype: torch.dtype, layers: int | None = None) -> Built:
    """Model in training mode and batch on `device`; with `layers` blocks instead of the shape's."""
    torch.manual_seed(0)
    model, weights = _base(workload, device, dtype, layers)
    model.config.use_cache = False
    if workload.mode == "full":
        model.requires_grad_(True)
    else:
        model = _with_lora(model, workload)
    model = model.train() if workload.mode == "nf4" else model.to(device).train()
    vocabulary = model.config.vocab_size
    ids = torch.randint(3, vocabulary, (workload.rows, workload.tokens), generator=torch.Generator().manual_seed(1))
    return Built(workload, model, {"input_ids": ids.to(device), "labels": ids.to(device, copy=True)}, weights)


def _base(workload: Workload, device: torch.device, dtype: torch.dtype, layers: int | None) -> tuple[Any, str]:
    if workload.shape == "smollm2" and layers is None and device.type == "cpu":
        name = str(dtype).removeprefix("torch.")
        packed: dict[str, Any] = {"load_in_4bit": True} if workload.mode == "nf4" else {}
        config = TrainConfig(model=BUILTIN, data="", budget=1, output_dir=Path(), dtype=name, **packed)
        try:
            return load_base(config).model, "SmolLM2-135M-Instruct"
        except UsageError as error:
            why = f"random; {error.message}"
    else:
        why = "random"
    import transformers

    shape = dict(SHAPES[workload.shape]) | ({} if layers is None else {"num_hidden_layers": layers})
    config = transformers.LlamaConfig(**shape, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    with torch.device(device):
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            model: Any = transformers.LlamaForCausalLM(config)
        finally:
            torch.set_default_dtype(before)
    if workload.mode == "nf4":
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            kind = type(model)
            del model
            place = {"device_map": {"": device}} if device.type == "cuda" else {}
            packing = quantisation_config(Quantisation(4), compute_dtype=dtype)
            model = kind.from_pretrained(folder, quantization_config=packing, dtype=dtype, **place)
    return model, why


def _with_lora(model: Any, workload: Workload) -> Any:
    from peft import LoraConfig, get_peft_model

    model.requires_grad_(False)
    config = LoraConfig(
        r=RANK, lora_alpha=2 * RANK, lora_dropout=workload.dropout, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    model = get_peft_model(model, config)
    generator = torch.Generator().manual_seed(2)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            noise = torch.randn(parameter.shape, generator=generator) / 64
            parameter.data.copy_(noise.to(parameter.dtype))
    return model


def plain_loss(model: Any, batch: Batch) -> torch.Tensor:
    """The model's own loss."""
    return model(**batch).loss


def step(model: Any, batch: Batch, loss: Loss) -> torch.Tensor:
    """Forward and backward. Returns the loss; gradients are left on the parameters."""
    value = loss(model, batch)
    value.backward()
    return value.detach()
