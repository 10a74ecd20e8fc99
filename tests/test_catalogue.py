"""Models without weights: shapes by name have the published sizes, configs are read or refused with the reason."""

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from command_line import rematree
from rematree.catalogue.configs import needs_no_weights, read_config
from rematree.catalogue.meta_model import build_meta_model
from rematree.catalogue.shapes import NamedShape, find_shape, nearest_names, shapes
from rematree.errors import UsageError

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 96,
}
# Total numbers of values in the files on the Hub, where they are not the number of parameters: a tied head may be
# stored twice, and larger Gemma 3 models come with a vision tower and a projector.
STORED = {"qwen3-0.6b": 751_632_384, "qwen3-1.7b": 2_031_739_904}
VISION = 416_866_032
WITH_VISION = {"gemma-3-4b": 4_300_079_472, "gemma-3-12b": 12_187_325_040, "gemma-3-27b": 27_432_406_640}


def config_file(path: Path, values: Any) -> str:
    file = path / "config.json"
    file.write_text(json.dumps(values))
    return str(file)


@pytest.mark.parametrize("shape", shapes(), ids=lambda shape: shape.name)
def test_a_shape_has_exactly_the_published_number_of_parameters(shape: NamedShape) -> None:
    model = build_meta_model(read_config(shape.name).config, dtype=torch.bfloat16, name=shape.name)
    assert sum(parameter.numel() for parameter in model.parameters()) == shape.parameters
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert shape.sources


@pytest.mark.parametrize("name", STORED)
def test_stored_twice_the_tied_head_gives_the_number_of_the_hub(name: str) -> None:
    shape = find_shape(name)
    assert shape is not None
    assert shape.parameters + shape.config["vocab_size"] * shape.config["hidden_size"] == STORED[name]


@pytest.mark.parametrize("name", WITH_VISION)
def test_with_its_vision_tower_gemma_has_the_number_of_the_hub(name: str) -> None:
    shape = find_shape(name)
    assert shape is not None
    projector = 1152 * shape.config["hidden_size"] + 1152
    assert shape.parameters + VISION + projector == WITH_VISION[name]


def test_names_are_one_kind_of_word_and_lead_to_one_shape() -> None:
    names = [name for shape in shapes() for name in (shape.name, *shape.aliases)]
    assert len(names) == len(set(names))
    assert all(name == name.lower() and "/" not in name for name in names)
    for shape in shapes():
        assert find_shape(shape.hub.upper()) is shape
        assert all(find_shape(alias) is shape for alias in shape.aliases)


def test_unknown_names_lead_to_the_nearest() -> None:
    assert nearest_names("lama-3-8b")[0] == "llama-3-8b"
    with pytest.raises(UsageError) as caught:
        read_config("qwen3-9b")
    assert caught.value.message == "there is no model called 'qwen3-9b'"
    assert caught.value.details[0].startswith("nearest names: qwen3-8b, ")
    assert caught.value.remedies[0] == "qwen3-8b"
    with pytest.raises(UsageError) as caught:
        read_config("zzz")
    assert caught.value.details[0].startswith("names: llama-3-1b, ")


def test_an_id_of_the_catalogue_needs_no_network() -> None:
    read = read_config("Qwen/Qwen3-8B")
    assert read.source == "qwen3-8b (config of Qwen/Qwen3-8B)"
    assert read.config.hidden_size == 4096


@pytest.mark.parametrize("name", WITH_VISION)
def test_an_id_of_the_hub_means_its_vision_tower_too(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    shape = find_shape(name)
    assert shape is not None
    text = {key: value for key, value in shape.config.items() if key != "model_type"}
    whole = {"model_type": "gemma3", "text_config": text, "vision_config": {}}
    asked: list[str] = []

    def get(spec: str, revision: str | None) -> tuple[dict[str, Any], dict[str, Any]]:
        asked.append(spec)
        return whole, {}

    monkeypatch.setattr(transformers.PretrainedConfig, "get_config_dict", get)
    alone = read_config(name)
    assert (alone.config.model_type, alone.notes, asked) == ("gemma3_text", (shape.note,), [])
    for spec in (shape.hub, shape.hub.upper()):
        read = read_config(spec)
        assert (read.config.model_type, read.source, read.notes) == ("gemma3", spec, ())
    assert asked == [shape.hub, shape.hub.upper()]


@pytest.mark.parametrize("name", WITH_VISION)
def test_without_the_network_a_vision_tower_is_not_left_out_in_silence(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = find_shape(name)
    assert shape is not None

    def fail(spec: str, revision: str | None) -> None:
        raise OSError("no network")

    monkeypatch.setattr(transformers.PretrainedConfig, "get_config_dict", fail)
    with pytest.raises(UsageError) as caught:
        read_config(shape.hub)
    assert caught.value.message == f"model {shape.hub!r} is not there"
    assert caught.value.remedies[0] == name  # the text model alone, by its own name


def test_shapes_that_are_a_part_of_a_model_say_so() -> None:
    parts = [shape for shape in shapes() if shape.partial]
    assert {shape.name for shape in parts} == set(WITH_VISION)
    assert all(shape.note.startswith("Text model alone.") for shape in parts)
    assert not any("alone" in shape.note for shape in shapes() if not shape.partial)


def test_an_unknown_id_of_the_hub_names_shapes_that_need_no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UsageError) as caught:
        read_config("Qwen/Qwen3-9B")
    assert caught.value.message == "model 'Qwen/Qwen3-9B' is not there"
    assert caught.value.details[1].startswith("nearest built-in names, which need no network: qwen3-8b")


def test_a_config_is_enough(tmp_path: Path) -> None:
    file = config_file(tmp_path, LLAMA)
    for spec in (file, str(tmp_path)):
        assert needs_no_weights(spec)
        read = read_config(spec)
        assert (read.config.model_type, read.source) == ("llama", file)
    assert needs_no_weights("llama-3-8b")
    assert not needs_no_weights("meta-llama/Llama-3.1-8B")
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert not needs_no_weights(str(tmp_path))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "the config has no model_type, which says what kind of model it is"),
        ({"model_type": "lama"}, "transformers does not know model_type 'lama'"),
        (
            {"model_type": "llama", "hidden_size": 8},
            "the config of a llama model needs num_hidden_layers, num_attention_heads, vocab_size, intermediate_size",
        ),
        ({**LLAMA, "hidden_size": "big"}, "the config of a llama model needs hidden_size as an integer"),
        ({"model_type": "gpt2", "n_embd": 8}, "the config of a gpt2 model needs n_layer, n_head, vocab_size"),
        ({"model_type": "gemma3"}, "the config of a gemma3 model needs text_config"),
        (
            {"model_type": "gemma3", "text_config": {"hidden_size": 8}},
            "the config of a gemma3 model needs text_config.num_hidden_layers",
        ),
        ({**LLAMA, "num_attention_heads": 5}, "transformers does not take this config of a llama model"),
        # As on the Hub: nothing is missing in it, it is of no causal language model.
        (
            {**LLAMA, "model_type": "qwen2_5_vl", "vision_config": {"depth": 2}},
            "transformers has no causal language model of type 'qwen2_5_vl'",
        ),
        ({"model_type": "vit"}, "transformers has no causal language model of type 'vit'"),
        ([1], "not a config: a JSON list where an object is needed"),
    ],
)
def test_a_config_that_is_none_says_why(tmp_path: Path, values: Any, message: str) -> None:
    file = config_file(tmp_path, values)
    with pytest.raises(UsageError) as caught:
        read_config(file)
    assert caught.value.message == f"{file}: {message}"


def test_files_that_are_no_config_say_why(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UsageError, match="not JSON: Expecting property name"):
        read_config(str(tmp_path))
    (tmp_path / "config.json").write_bytes(b"\xff")
    with pytest.raises(UsageError, match="not UTF-8 at byte 0"):
        read_config(str(tmp_path))
    (tmp_path / "config.json").write_text("[" * 100_000)
    with pytest.raises(UsageError, match="nested too deeply"):
        read_config(str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "llama", "quantization_config": "nf4"}')
    with pytest.raises(UsageError, match="quantization_config is 'nf4', not an object"):
        read_config(str(tmp_path))
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(UsageError, match="cannot be read: No such file"):
        read_config(str(empty))
    with pytest.raises(UsageError, match=r"model '\./nothing' is not there"):
        read_config("./nothing")


@pytest.fixture
def heard() -> Iterator[list[str]]:
    """What transformers logs, also what it has said once."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    library: Any = transformers.utils.logging
    library.warning_once.cache_clear()
    logger = logging.getLogger("transformers")
    logger.addHandler(handler)
    yield lines
    logger.removeHandler(handler)


GPT2: dict[str, Any] = {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
LONGROPE: dict[str, Any] = {  # as Phi 3.5's
    **LLAMA,
    "model_type": "phi3",
    "pad_token_id": 0,
    "max_position_embeddings": 64,
    "original_max_position_embeddings": 16,
    "rope_scaling": {"type": "longrope", "long_factor": [1.5] * 4, "short_factor": [1.0] * 4},
}


@pytest.mark.parametrize("values", [{**GPT2, "vocab_size": 96}, LONGROPE], ids=lambda values: values["model_type"])
def test_planning_with_a_published_config_warns_of_nothing(
    tmp_path: Path, heard: list[str], values: dict[str, Any]
) -> None:
    words = ["--max-length", 16, "--no-packing", "--device", "h100", "--forbid", "groups"]
    found = rematree("plan", config_file(tmp_path, values), *words)
    assert found.code == 0, found.err
    assert not heard
