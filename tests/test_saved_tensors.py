"""The list of saved tensors is what autograd really holds: counted on the live model, line by line."""

import copy
import gc
import importlib.util
import linecache
import random
import re
import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

import rematree
from models import ARCHITECTURES, batch_for, build, with_lora
from rematree.errors import UsageError
from rematree.fingerprint import describe_model
from rematree.plans import Action, Decision
from rematree.saved import SavedTensor, SavedTensors
from rematree.units import format_bytes

Batch = dict[str, torch.Tensor]
Line = tuple[int, str, tuple[int, ...]]  # new bytes, dtype, shape


def model_of(name: str, lora: bool) -> nn.Module:
    model = build(name).train()
    return with_lora(model) if lora else model


def really_held(model: nn.Module, batch: Batch) -> list[Line]:
    """Every tensor that autograd packs in a real forward; bytes where its storage is a new one."""
    counted = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers(), *batch.values()]}
    lines: list[Line] = []
    alive: list[torch.Tensor] = []  # so that no address is used twice

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        new = 0 if storage.data_ptr() in counted else storage.nbytes()
        lines.append((new, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape)))
        counted.add(storage.data_ptr())
        alive.append(tensor.detach())
        return tensor.detach()

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(**batch).loss
    del loss
    return lines


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_line_is_a_tensor_that_autograd_really_packs(name: str, lora: bool) -> None:
    model = model_of(name, lora)
    batch = batch_for(model)
    expected = really_held(model, batch)
    found = rematree.saved_tensors(model, batch)
    assert [(line.num_bytes, line.dtype, line.shape) for line in found] == expected
    assert sum(line.num_bytes for line in found) == sum(num_bytes for num_bytes, _, _ in expected) > 0


def test_a_half_precision_model_saves_half() -> None:
    model = build("llama").to(torch.bfloat16).train()
    batch = batch_for(model)
    found = rematree.saved_tensors(model, batch)
    assert [(line.num_bytes, line.dtype, line.shape) for line in found] == really_held(model, batch)
    (gate,) = [line for line in found if line.region == "model.layers.0.mlp.act_fn"]
    assert (gate.dtype, gate.num_bytes) == ("bfloat16", 2 * 2 * 32 * 96)


def only(found: SavedTensors, region: str, shape: tuple[int, ...]) -> SavedTensor:
    """The line of `region` that adds bytes, with that shape."""
    (line,) = [line for line in found if line.region == region and line.shape == shape and line.num_bytes]
    return line


def said_source(line: SavedTensor, file: str) -> str:
    """The text of the source line that `line` names, which must be in `file`."""
    name, _, number = line.source.rpartition(":")
    assert name == Path(file).name
    return linecache.getline(file, int(number)).strip()


def test_known_tensors_of_a_layer_have_their_region_and_source_line() -> None:
    """Two rows of 32 tokens, hidden 48, intermediate 96, 4 heads of 12 over 2 key-value heads, fp32."""
    model = build("llama").train()
    found = rematree.saved_tensors(model, batch_for(model))
    llama = sys.modules[transformers.LlamaForCausalLM.__module__].__file__
    library = Path(transformers.__file__).parent
    assert llama is not None

    gate = only(found, "model.layers.2.mlp.act_fn", (2, 32, 96))
    assert (gate.num_bytes, gate.dtype) == (2 * 32 * 96 * 4, "float32")
    assert "silu" in said_source(gate, str(library / "activations.py"))

    down = only(found, "model.layers.2.mlp.down_proj", (64, 96))
    assert down.num_bytes == 64 * 96 * 4
    assert "self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))" in said_source(down, llama)

    queries = only(found, "model.layers.2.self_attn#attention", (2, 4, 32))  # the log-sum-exp of every query
    assert queries.num_bytes == 2 * 4 * 32 * 4
    attention = str(library / "integrations" / "sdpa_attention.py")
    assert "scaled_dot_product_attention" in said_source(queries, attention)

    shared = [line for line in found if line.region == "model.layers.2.self_attn.v_proj"]
    assert {line.num_bytes for line in shared} == {0}, (
        "the input is the query projection's, the weight is no activation"
    )

    logits = only(found, "", (64, 151))
    assert logits.num_bytes == 64 * 151 * 4
    assert "cross_entropy" in said_source(logits, str(library / "loss" / "loss_utils.py"))


def test_known_tensors_of_an_adapter() -> None:
    model = model_of("llama", lora=True)
    found = rematree.saved_tensors(model, batch_for(model))
    layer = peft.tuners.lora.layer.__file__
    base = "base_model.model.model.layers.1.mlp.up_proj"
    dropped = only(found, f"{base}.lora_A.default", (64, 48))  # LoRA's private copy behind its dropout
    mask = only(found, f"{base}.lora_dropout.default", (2, 32, 48))
    inner = only(found, f"{base}.lora_B.default", (64, 4))
    assert [line.num_bytes for line in (dropped, mask, inner)] == [64 * 48 * 4, 64 * 48 * 4, 64 * 4 * 4]
    for line in (dropped, mask, inner):
        assert "lora_B(lora_A(dropout(x)))" in said_source(line, layer)
    base_layer = [line for line in found if line.region == f"{base}.base_layer"]
    assert [line.num_bytes for line in base_layer] == [0], "a frozen layer keeps its weight and nothing else"


def test_equal_layers_are_folded_and_nothing_is_lost() -> None:
    model = model_of("llama", lora=True)
    found = rematree.saved_tensors(model, batch_for(model))
    folded = found.folded()
    assert sum(line.count for line in folded) == len(found)
    assert sum(line.count * line.num_bytes for line in folded) == sum(line.num_bytes for line in found)
    (gate,) = [line for line in folded if line.region.endswith("mlp.act_fn")]
    assert (gate.region, gate.count) == ("base_model.model.model.layers.{0-3}.mlp.act_fn", 4)
    products = [line for line in folded if line.region == "base_model.model.model.layers.{0-3}.mlp"]
    assert [line.count for line in products] == [4, 4], "a layer that saves two equal shapes keeps two lines"


def test_layers_that_save_other_things_are_not_folded() -> None:
    model = with_lora(build("llama"), target_modules=["gate_proj"], layers_to_transform=[2, 3])
    regions = {line.region for line in rematree.saved_tensors(model, batch_for(model)).folded()}
    assert "base_model.model.model.layers.{2-3}.mlp.act_fn" in regions
    assert not [region for region in regions if re.search(r"layers\.(\{?[01]\b)", region)], (
        "no graph below the adapters"
    )


def test_it_prints_one_line_a_tensor() -> None:
    found = rematree.saved_tensors(build("llama"), batch_for(nn.Module()))
    heading, *lines, total = str(found).splitlines()
    assert heading.split() == ["region", "dtype", "shape", "bytes", "source"]
    assert len(lines) == len(found.folded())
    for line, tensor in zip(lines, found.folded(), strict=True):
        region, dtype, shape, size, source = re.split(r"\s{2,}", line)
        assert (region, dtype, source) == (tensor.region or "(outside any region)", tensor.dtype, tensor.source)
        assert shape == ("x".join(map(str, tensor.shape)) or "scalar")
        count, _, each = size.rpartition(" x ")
        assert (int(count or 1), each) == (tensor.count, format_bytes(tensor.num_bytes))
    assert total.split("  ")[0] == "sum"
    assert total.endswith(format_bytes(sum(line.num_bytes for line in found)))


def test_the_model_and_the_random_state_are_untouched() -> None:
    model = model_of("llama", lora=True).eval()
    model.get_submodule("base_model.model.model.layers.1").train()
    batch = batch_for(model)
    kept = {name: tensor.clone() for name, tensor in batch.items()}
    weights = copy.deepcopy(model.state_dict())
    before = [(dict(module.__dict__), module.training) for module in model.modules()]
    hooks = [list(module._forward_hooks) for module in model.modules()]
    torch_state, python_state = torch.get_rng_state(), random.getstate()

    found = rematree.saved_tensors(model, batch)

    assert any("dropout" in line.region for line in found), "it is a training step that is looked at"
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert random.getstate() == python_state
    assert [(dict(module.__dict__), module.training) for module in model.modules()] == before
    assert [list(module._forward_hooks) for module in model.modules()] == hooks
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(batch[name], tensor) for name, tensor in kept.items())


def test_a_plan_in_force_does_not_change_the_list() -> None:
    model = model_of("llama", lora=True)
    batch = batch_for(model)
    plain = rematree.saved_tensors(model, batch)
    decisions = {"base_model.model.model.layers.1": Decision(Action.RECOMPUTE)}
    plan = rematree.Plan(decisions, None, None, 0, 0.0, (), (), describe_model(model))
    with rematree.apply(plan, model):
        assert rematree.saved_tensors(model, batch) == plain


def user_model(folder: Path) -> nn.Module:
    """A model in a file of its own, as a user has it."""
    folder.mkdir()
    file = folder / "mine.py"
    file.write_text(
        "import torch\n"
        "class Mine(torch.nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.first, self.second = torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)\n"
        "    def forward(self, x):\n"
        "        x = torch.tanh(self.first(x))\n"
        "        self.second(x).exp().sum()  # logged, say, and dropped\n"
        "        return x.square().mean()\n"
    )
    spec = importlib.util.spec_from_file_location("mine", file)
    assert spec is not None
    assert spec.loader is not None
    module: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.Mine()


@pytest.mark.parametrize("folder", ["project", "torch", "rematree", "accelerate"])
def test_source_lines_of_a_user_are_named_wherever_the_file_lies(folder: str, tmp_path: Path) -> None:
    found = rematree.saved_tensors(user_model(tmp_path / folder), {"x": torch.randn(4, 8)})
    assert {line.source for line in found} == {"mine.py:7", "mine.py:9"}


def test_what_no_gradient_needs_is_not_held(tmp_path: Path) -> None:
    model = user_model(tmp_path / "project")
    found = rematree.saved_tensors(model, {"x": torch.randn(4, 8)})
    assert sum(line.num_bytes for line in found) == 4 * 8 * 4, "tanh's output, which the square shares"
    assert {line.region for line in found} == {"first", ""}


def test_nothing_is_left_behind() -> None:
    """What an op saves of its own output must not keep its graph alive, and with it the copy of the model."""
    model = model_of("llama", lora=True)
    batch = batch_for(model)

    def tensors() -> int:
        rematree.saved_tensors(model, batch)
        gc.collect()
        return sum(issubclass(type(item), torch.Tensor) for item in gc.get_objects())

    assert tensors() == tensors()


def test_a_batch_without_labels_is_refused() -> None:
    with pytest.raises(UsageError) as caught:
        rematree.saved_tensors(build("llama"), {"input_ids": torch.ones(1, 8, dtype=torch.int64)})
    assert str(caught.value) == (
        "the model returned no loss for this batch\nWhat would work:\n  put labels in the batch, or pass loss="
    )


def test_another_loss_holds_other_tensors() -> None:
    model = build("llama").train()
    batch = {"input_ids": batch_for(model)["input_ids"]}
    found = rematree.saved_tensors(model, batch, loss=lambda output: output.logits.float().logsumexp(-1).mean())
    assert not any(line.source.startswith("loss_utils.py") for line in found)
    assert only(found, "", (2, 32, 151)).source.startswith("test_saved_tensors.py:")
