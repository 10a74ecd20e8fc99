"""What a run may be asked for, and how two runs are told apart."""

import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from rematree.errors import UsageError
from rematree.finetune.config import TrainConfig, differences


def config(**changes: Any) -> TrainConfig:
    settings: dict[str, Any] = {"model": "m", "data": "d.jsonl", "budget": 2**30, "output_dir": Path("out")}
    return TrainConfig(**settings | changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"budget": 0}, "--budget is 0; it must be above zero"),
        ({"lora_r": -1}, "--lora-r is -1; it must be above zero"),
        ({"learning_rate": 0.0}, "--learning-rate is 0.0; it must be above zero"),
        ({"weight_decay": -0.1}, "--weight-decay is -0.1; it must not be negative"),
        ({"max_length": 1}, "--max-length is 1; a row needs 2 tokens to predict one"),
        ({"lora_dropout": 1.0}, "--lora-dropout is 1.0; it must be at least 0 and below 1"),
        ({"heldout": 2.5}, "--heldout is 2.5; give a share below 1 or a whole number of examples"),
        ({"max_steps": 0}, "--max-steps is 0; give a number above zero, or -1 to go by epochs"),
        (
            {"lr_scheduler_type": "wavy"},
            "--lr-scheduler-type is 'wavy'; it can be a transformers schedule that needs no further arguments\n"
            "  linear, cosine, cosine_with_restarts, polynomial, constant, constant_with_warmup, inverse_sqrt",
        ),
        (
            {"lr_scheduler_type": "polynomial", "learning_rate": 1e-7},
            "--learning-rate is 1e-07; the polynomial schedule ends at 1e-07 and must begin above that",
        ),
        ({"learning_rate": math.nan}, "--learning-rate is nan; it must be a finite number"),
        ({"heldout": math.inf}, "--heldout is inf; it must be a finite number"),
        ({"seed": -1}, "--seed is -1; it must be at least 0 and below 4294967296"),
        ({"dtype": "int4"}, '--dtype is \'int4\'; it can be "auto", "float32" or "bfloat16"'),
        (
            {"load_in_4bit": True, "load_in_8bit": True},
            "--load-in-4bit and --load-in-8bit contradict each other; a weight is packed one way or the other",
        ),
        (
            {"load_in_4bit": True, "bnb_4bit_quant_type": "int4"},
            '--bnb-4bit-quant-type is \'int4\'; it can be "nf4" or "fp4"',
        ),
        (
            {"bnb_4bit_quant_type": "fp4"},
            "--bnb-4bit-quant-type fp4 says how weights are packed into 4 bits, but they are not packed\n"
            "What would work:\n"
            "  --load-in-4bit",
        ),
        (
            {"load_in_8bit": True, "bnb_4bit_use_double_quant": False},
            "--no-bnb-4bit-use-double-quant says how weights are packed into 4 bits, but they are packed into 8\n"
            "What would work:\n"
            "  --load-in-4bit",
        ),
    ],
)
def test_impossible_settings_are_refused_by_their_flag(changes: dict[str, Any], message: str):
    with pytest.raises(UsageError) as caught:
        config(**changes)
    assert str(caught.value) == message


def test_where_and_how_loudly_make_no_other_run():
    assert config().describe() == config(output_dir=Path("elsewhere"), logging_steps=7).describe()


def test_every_difference_is_named():
    lines = differences(config().describe(), config(budget=2**29, lora_r=8, forbid=("chunked_loss",)).describe())
    assert lines == [
        "--budget: there 1.00 GiB (1073741824 B), here 512.0 MiB (536870912 B)",
        "--forbid: there [], here ['chunked_loss']",
        "--lora-r: there 16, here 8",
    ]


def test_changed_contents_of_the_data_file_make_another_run(tmp_path: Path):
    data = tmp_path / "d.jsonl"
    data.write_text("one")
    before = config(data=str(data)).describe()
    data.write_text("two")
    assert differences(before, config(data=str(data)).describe()) == ["the contents of the data file have changed"]


def test_reading_the_defaults_does_not_import_torch():
    program = "import sys, rematree.finetune; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
