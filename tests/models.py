"""Small real models built from their configs, for the tests. Dropout, LoRA and dtypes as users have them."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import nn

_SIZES: dict[str, Any] = {
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 151,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def _gpt2(layers: int) -> nn.Module:
    config = transformers.GPT2Config(n_embd=48, n_layer=layers, n_head=4, vocab_size=151, n_positions=64)
    return transformers.GPT2LMHeadModel(config)


def _gemma_attention(index: int, layers: int) -> str:
    """One of the layers sees all tokens: the third, or the last of fewer."""
    return "full_attention" if index == min(2, layers - 1) else "sliding_attention"


def _decoder(config_name: str, model_name: str, **extra: Any) -> nn.Module:
    config = getattr(transformers, config_name)(**{**_SIZES, **extra})
    return getattr(transformers, model_name)(config)


def build(name: str, *, layers: int = 4) -> nn.Module:
    """A model of the architecture `name` with random weights, in fp32."""
    torch.manual_seed(0)
    decoder = functools.partial(_decoder, num_hidden_layers=layers)
    match name:
        case "llama":
            return decoder("LlamaConfig", "LlamaForCausalLM")
        case "llama-eager":
            return decoder("LlamaConfig", "LlamaForCausalLM", attn_implementation="eager", attention_dropout=0.1)
        case "qwen3":
            return decoder("Qwen3Config", "Qwen3ForCausalLM", head_dim=12)
        case "gemma3":
            return decoder(
                "Gemma3TextConfig",
                "Gemma3ForCausalLM",
                head_dim=12,
                sliding_window=8,
                layer_types=[_gemma_attention(index, layers) for index in range(layers)],
                attn_implementation="sdpa",
            )
        case "mistral":
            return decoder("MistralConfig", "MistralForCausalLM", sliding_window=8, head_dim=12)
        case "gpt2":
            return _gpt2(layers)
        case "phi3":
            return decoder("Phi3Config", "Phi3ForCausalLM")
        case "olmo2":
            return decoder("Olmo2Config", "Olmo2ForCausalLM")
        case "mixtral":
            return decoder("MixtralConfig", "MixtralForCausalLM", num_local_experts=4, num_experts_per_tok=2)
        case _:
            raise ValueError(name)


ARCHITECTURES = ("llama", "llama-eager", "qwen3", "gemma3", "mistral", "gpt2", "phi3", "olmo2", "mixtral")


def with_lora(model: nn.Module, **options: Any) -> nn.Module:
    """`model` under all-linear LoRA with dropout 0.1, in training mode, with B away from zero."""
    inner = type(model).__name__
    # PEFT has no dropout for experts kept in one parameter; GPT-2's Conv1D is stored transposed.
    modules = ["q_proj", "k_proj", "v_proj", "o_proj"] if "Mixtral" in inner else "all-linear"
    defaults: dict[str, Any] = {
        "r": 4,
        "lora_alpha": 8,
        "lora_dropout": 0.1,
        "target_modules": modules,
        "fan_in_fan_out": "GPT2" in inner,
    }
    config = LoraConfig(**{**defaults, **options})
    wrapped = get_peft_model(model, config)  # pyright: ignore[reportArgumentType]
    with torch.no_grad():
        for parameter_name, parameter in wrapped.named_parameters():
            if "lora_B" in parameter_name:
                parameter.normal_(std=0.05)
    return wrapped.train()


def batch_for(model: nn.Module, *, rows: int = 2, tokens: int = 32) -> dict[str, torch.Tensor]:
    """A batch with labels; the first quarter of each row is not trained."""
    ids = torch.randint(3, 151, (rows, tokens), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    labels[:, : tokens // 4] = -100
    return {"input_ids": ids, "labels": labels}


def gradients(model: nn.Module, batch: dict[str, torch.Tensor], seed: int = 7) -> dict[str, torch.Tensor]:
    """Loss (as "loss") and every gradient of one step from the same random state."""
    torch.manual_seed(seed)
    model.zero_grad(set_to_none=True)
    loss = model(**batch, use_cache=False).loss
    loss.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return {"loss": loss.detach(), **found}


def assert_same(expected: dict[str, torch.Tensor], found: dict[str, torch.Tensor]) -> None:
    """Bit equality, name by name."""
    assert expected.keys() == found.keys()
    different = [name for name, tensor in expected.items() if not torch.equal(tensor, found[name])]
    assert not different, f"{len(different)} of {len(expected)} differ, first {different[:3]}"


def reads_nothing(hook: Callable[..., Any]) -> Callable[..., Any]:
    """`hook` as one of a library's: for hooks of the user's a plan keeps what they may read."""

    def called(*args: Any, **kwargs: Any) -> Any:
        return hook(*args, **kwargs)

    called.__module__ = "accelerate.hooks"
    return called


def quantised(model: nn.Module, kind: str, folder: Path, dtype: torch.dtype = torch.float32) -> nn.Module:
    """`model` with its linear layers packed as transformers packs them while loading: "nf4", "fp4" or "int8"."""
    if kind == "int8":
        config = transformers.BitsAndBytesConfig(load_in_8bit=True)
    else:
        config = transformers.BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=kind,
            bnb_4bit_use_double_quant=kind == "nf4",
            bnb_4bit_compute_dtype=dtype,
        )
    model.save_pretrained(folder)  # pyright: ignore[reportCallIssue]
    return type(model).from_pretrained(folder, quantization_config=config, dtype=dtype)  # pyright: ignore[reportAttributeAccessIssue]
