"""A model made of its config alone is the model that loading gives: every tensor, byte for byte, packed or not."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from rematree.catalogue.configs import read_config
from rematree.catalogue.meta_model import build_meta_model
from rematree.errors import UsageError
from rematree.finetune.base import add_adapters
from rematree.finetune.config import TrainConfig
from rematree.finetune.synthetic import config_shape
from rematree.integrations.bitsandbytes import Quantisation, quantisation_config
from rematree.measure import storage_bytes
from rematree.quantised import describe_packing, four_bit_linears, hidden_tensors

SIZES: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 96,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
KINDS: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},  # biases beside packed weights
    "gemma3_text": {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]},  # a tied head
    "phi3": {},  # fused projections
    "qwen3_moe": {"num_experts": 4, "moe_intermediate_size": 64, "num_experts_per_tok": 2},  # stacks of experts
}
PACKINGS = {
    "plain": None,
    "nf4 twice": Quantisation(4),
    "nf4": Quantisation(4, "nf4", double_quant=False),
    "fp4": Quantisation(4, "fp4"),
    "int8": Quantisation(8),
}


@pytest.fixture(scope="module", params=KINDS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Real weights on disk, in bfloat16."""
    path = tmp_path_factory.mktemp(request.param)
    config = AutoConfig.for_model(request.param, **SIZES, **KINDS[request.param])
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(path)
    return path


def facts(tensor: torch.Tensor | None) -> Any:
    return None if tensor is None else (tuple(tensor.shape), tensor.dtype)


def tensors_of(model: Any) -> dict[str, Any]:
    """Every tensor a model holds, by name, with whatever its packing hangs on it."""
    found: dict[str, Any] = {}
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    for name, tensor in named:
        found[name] = (*facts(tensor), type(tensor).__name__, tensor.requires_grad)
    for path, module in model.named_modules():
        weight: Any = getattr(module, "weight", None)
        state = vars(weight).get("quant_state") if isinstance(weight, torch.Tensor) else None
        if state is not None:
            found[f"{path} state"] = [facts(state.absmax), facts(state.code), facts(state.offset)]
            found[f"{path} state"] += [state.blocksize, state.quant_type, state.dtype, tuple(state.shape)]
            found[f"{path} compute"] = getattr(module, "compute_dtype", None)
            if state.nested:
                inner = state.state2
                found[f"{path} nested"] = [facts(inner.absmax), facts(inner.code), inner.blocksize, inner.dtype]
        if type(weight).__name__ == "Int8Params":
            state = module.state if hasattr(module, "state") else module.base_layer.state
            found[f"{path} int8"] = [facts(vars(weight)["CB"]), facts(vars(weight)["SCB"]), state.threshold]
    return found


def bytes_of(model: Any) -> int:
    return storage_bytes([*model.parameters(), *model.buffers(), *hidden_tensors(model)])


@pytest.mark.parametrize("packing", PACKINGS)
def test_it_is_the_loaded_model_tensor_by_tensor(folder: Path, packing: str) -> None:
    quantisation = PACKINGS[packing]
    options: dict[str, Any] = {}
    if quantisation is not None:
        pytest.importorskip("bitsandbytes")
        options["quantization_config"] = quantisation_config(quantisation, compute_dtype=torch.bfloat16)
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, **options)
    made = build_meta_model(read_config(str(folder)).config, dtype=torch.bfloat16, quantisation=quantisation)
    assert tensors_of(made) == tensors_of(loaded)
    assert bytes_of(made) == bytes_of(loaded)
    assert describe_packing(made) == describe_packing(loaded)
    assert all(parameter.is_meta for parameter in made.parameters())
    assert made.training == loaded.training


def run(folder: Path, **values: Any) -> TrainConfig:
    absent: dict[str, Any] = {"model": str(folder), "data": "", "budget": 1, "output_dir": folder}
    return TrainConfig(**{**absent, **values})


@pytest.mark.parametrize("packing", ["plain", "nf4 twice", "int8"])
def test_adapters_are_those_of_the_loaded_model(folder: Path, packing: str) -> None:
    quantisation = PACKINGS[packing]
    values: dict[str, Any] = {"dtype": "bfloat16", "max_length": 32, "lora_dropout": 0.0, "lora_r": 3}
    options: dict[str, Any] = {}
    if quantisation is not None:
        pytest.importorskip("bitsandbytes")
        values[f"load_in_{quantisation.bits}bit"] = True
        options["quantization_config"] = quantisation_config(quantisation, compute_dtype=torch.bfloat16)
    config = run(folder, lora_target_modules=("q_proj", "o_proj", "qkv_proj"), **values)
    loaded = add_adapters(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, **options), config)
    made = config_shape(config).model
    assert tensors_of(made) == tensors_of(loaded)
    assert bytes_of(made) == bytes_of(loaded)
    assert [type(module) for module in made.modules()] == [type(module) for module in loaded.modules()]
    assert all(parameter.is_meta for parameter in made.parameters())


def test_full_fine_tuning_trains_everything(folder: Path) -> None:
    shape = config_shape(run(folder, max_length=32), full=True)
    assert all(parameter.requires_grad for parameter in shape.model.parameters())
    assert shape.model.training
    assert {tensor.device.type for tensor in shape.batch.values()} == {"cpu"}, "positions restart by value"
    assert shape.batch["input_ids"].shape == (4, 32)


def test_packing_on_the_meta_device_leaves_real_packing_alone(tmp_path: Path) -> None:
    """bitsandbytes keeps the code of nested scales for all later weights; it must not be one without values."""
    functional = pytest.importorskip("bitsandbytes.functional")
    config = AutoConfig.for_model("llama", **SIZES)
    build_meta_model(config, dtype=torch.bfloat16, quantisation=Quantisation(4))
    packed, state = functional.quantize_4bit(torch.randn(128, 128), compress_statistics=True, quant_type="nf4")
    assert functional.dequantize_4bit(packed, state).isfinite().all()
    assert state.state2.code.device.type == "cpu"


def test_stored_packing_is_kept_and_other_packing_refused(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    config = AutoConfig.for_model("llama", **SIZES)
    config.quantization_config = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    config.save_pretrained(tmp_path)
    model = config_shape(run(tmp_path, max_length=32, dtype="bfloat16")).model
    assert len(four_bit_linears(model)) == 14
    with pytest.raises(UsageError, match=r"--load-in-8bit: the weights of .* are quantised already, by bitsandbytes"):
        config_shape(run(tmp_path, max_length=32, load_in_8bit=True))
    config.quantization_config = {"quant_method": "gptq", "bits": 4}
    config.save_pretrained(tmp_path)
    with pytest.raises(UsageError, match="are quantised by gptq; a config alone says how bitsandbytes packs"):
        config_shape(run(tmp_path, max_length=32))


def test_adapters_on_experts_take_no_dropout(tmp_path: Path) -> None:
    AutoConfig.for_model("qwen3_moe", **SIZES, **KINDS["qwen3_moe"]).save_pretrained(tmp_path)
    with pytest.raises(UsageError, match=r"^--lora-dropout is 0\.05; adapters on stacks of experts have no") as caught:
        config_shape(run(tmp_path, max_length=32))
    assert "lora_dropout != 0" in caught.value.details[0]
    assert caught.value.remedies == ("--lora-dropout 0",)


@pytest.mark.parametrize(("kind", "stays"), [("llama", []), ("qwen3_moe", ["experts, 384.0 KiB, stay in bfloat16"])])
def test_a_mixture_in_4_bits_says_what_is_not_packed(tmp_path: Path, kind: str, stays: list[str]) -> None:
    pytest.importorskip("bitsandbytes")
    AutoConfig.for_model(kind, **SIZES, **KINDS[kind]).save_pretrained(tmp_path)
    shape = config_shape(run(tmp_path, max_length=32, dtype="bfloat16", load_in_4bit=True, lora_dropout=0))
    assert [note.partition(":")[0] for note in shape.notes] == stays
    experts = [weight for name, weight in shape.model.named_parameters() if ".experts." in name and "lora" not in name]
    assert {weight.dtype for weight in experts} <= {torch.bfloat16}
    assert storage_bytes(experts) == (2 * 4 * 3 * 64 * 128 * 2 if stays else 0)
