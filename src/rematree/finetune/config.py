"""TrainConfig: everything a run depends on, in the words of PEFT and TRL.

Light on purpose: the command line reads the defaults from here without importing torch.
"""

import dataclasses
import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from rematree.errors import UsageError
from rematree.units import format_bytes

# Of transformers' schedules those that need no arguments of their own, which a run cannot give, and no evaluations in
# the course of training, which it does not make.
SCHEDULES: Final = (
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
    "constant",
    "constant_with_warmup",
    "inverse_sqrt",
)
_POLYNOMIAL_END: Final = 1e-7  # transformers' default, which the rate must begin above
# Where a run is kept and how much of it is printed change nothing that is computed.
_NOT_COMPARED: Final = frozenset({"output_dir", "logging_steps"})
_SEEDS: Final = 2**32  # NumPy takes no more
_POSITIVE: Final = (
    "budget",
    "max_length",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "learning_rate",
    "num_train_epochs",
    "lora_r",
    "lora_alpha",
    "save_steps",
    "logging_steps",
    "max_eval_examples",
    "max_new_tokens",
)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One fine-tuning run.

    Attributes:
        model: Hub id, local directory, path of a .gguf file, or "builtin:smollm2-135m".
        data: Path of a .jsonl file, Hub data set id, or "builtin:stdlib-docstrings".
        budget: Peak device memory in bytes: weights, adapters, gradients, optimizer state, saved tensors, workspaces.
        output_dir: Where checkpoints, logs, the adapter and result.json go. Belongs to one run.
        revision: Branch, tag or commit of a model on the Hub.
        dtype: Of the base model: "auto", "float32" or "bfloat16". Adapters are kept in float32.
        load_in_4bit: Pack the base model's linear layers into 4 bits a weight with bitsandbytes (QLoRA). What is not
            packed (embeddings, norms, output head) has `dtype`, and so has what is computed.
        load_in_8bit: Pack them into 8 bits a weight (LLM.int8).
        bnb_4bit_quant_type: "nf4" or "fp4".
        bnb_4bit_use_double_quant: Pack the scales of 4-bit weights too.
        max_length: Tokens in a row. Longer examples are cut.
        packing: Put several short examples into one row; each attends only to itself.
        heldout: Share of the examples (below 1) or number of examples (1 and more) that are not trained on.
        max_eval_examples: Held-out examples that are measured before and after.
        max_new_tokens: Length of the answers generated before and after.
        per_device_train_batch_size: Rows in a step.
        gradient_accumulation_steps: Forward and backward passes in one optimizer step.
        max_steps: Optimizer steps; -1 leaves it to `num_train_epochs`.
        num_train_epochs: Passes over the data when `max_steps` is -1.
        learning_rate: Peak learning rate of AdamW.
        lr_scheduler_type: One of `SCHEDULES`.
        warmup_steps: Steps (1 and more) or share of all steps (below 1) over which the learning rate rises.
        weight_decay: AdamW's.
        max_grad_norm: Gradients are clipped to this norm; 0 leaves them.
        seed: Of adapter initialisation, data order, dropout and the held-out split.
        lora_r: Rank of the adapters.
        lora_alpha: Scale of the adapters, times `lora_r`.
        lora_dropout: Dropout in front of the adapters.
        lora_target_modules: "all-linear", or names of the modules that get an adapter.
        forbid: Levers the plan may not use, by name.
        compile: Let the plan compile blocks even if `max_steps` does not say how many steps pay for it.
        save_steps: Optimizer steps between two checkpoints.
        logging_steps: Optimizer steps between two lines of log; losses are recorded at every step.
        compare_hf: After training, time steps under checkpointing of every layer and without any, for comparison.
    """

    model: str
    data: str
    budget: int
    output_dir: Path
    revision: str | None = None
    dtype: str = "auto"
    load_in_4bit: bool = False
    load_in_8bit: bool = False
    bnb_4bit_quant_type: str = "nf4"
    bnb_4bit_use_double_quant: bool = True
    max_length: int = 512
    packing: bool = True
    heldout: float = 0.1
    max_eval_examples: int = 64
    max_new_tokens: int = 64
    per_device_train_batch_size: int = 4
    gradient_accumulation_steps: int = 1
    max_steps: int = -1
    num_train_epochs: float = 1.0
    learning_rate: float = 2e-4
    lr_scheduler_type: str = "linear"
    warmup_steps: float = 0.0
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    seed: int = 0
    lora_r: int = 16
    lora_alpha: int = 32
    lora_dropout: float = 0.05
    lora_target_modules: str | tuple[str, ...] = "all-linear"
    forbid: tuple[str, ...] = ()
    compile: bool = False
    save_steps: int = 50
    logging_steps: int = 1
    compare_hf: bool = False

    def __post_init__(self) -> None:
        for item in dataclasses.fields(self):
            value = getattr(self, item.name)
            if isinstance(value, float) and not math.isfinite(value):
                raise UsageError(f"{flag(item.name)} is {value}; it must be a finite number")
        if not 0 <= self.seed < _SEEDS:
            raise UsageError(f"--seed is {self.seed}; it must be at least 0 and below {_SEEDS}")
        for name in _POSITIVE:
            value = getattr(self, name)
            if value <= 0:
                raise UsageError(f"{flag(name)} is {value}; it must be above zero")
        for name in ("weight_decay", "max_grad_norm", "warmup_steps", "heldout"):
            value = getattr(self, name)
            if value < 0:
                raise UsageError(f"{flag(name)} is {value}; it must not be negative")
        if self.max_length < 2:
            raise UsageError(f"--max-length is {self.max_length}; a row needs 2 tokens to predict one")
        if not 0 <= self.lora_dropout < 1:
            raise UsageError(f"--lora-dropout is {self.lora_dropout}; it must be at least 0 and below 1")
        if self.heldout > 1 and self.heldout != int(self.heldout):
            raise UsageError(f"--heldout is {self.heldout}; give a share below 1 or a whole number of examples")
        if self.max_steps == 0 or self.max_steps < -1:
            raise UsageError(f"--max-steps is {self.max_steps}; give a number above zero, or -1 to go by epochs")
        if self.dtype not in ("auto", "float32", "bfloat16"):
            raise UsageError(f'--dtype is {self.dtype!r}; it can be "auto", "float32" or "bfloat16"')
        self._check_schedule()
        self._check_quantisation()

    def _check_schedule(self) -> None:
        if self.lr_scheduler_type not in SCHEDULES:
            raise UsageError(
                f"--lr-scheduler-type is {self.lr_scheduler_type!r}; it can be a transformers schedule that needs no "
                "further arguments",
                details=[", ".join(SCHEDULES)],
            )
        if self.lr_scheduler_type == "polynomial" and self.learning_rate <= _POLYNOMIAL_END:
            raise UsageError(
                f"--learning-rate is {self.learning_rate}; the polynomial schedule ends at {_POLYNOMIAL_END} and must "
                "begin above that"
            )

    def _check_quantisation(self) -> None:
        if self.load_in_4bit and self.load_in_8bit:
            raise UsageError(
                "--load-in-4bit and --load-in-8bit contradict each other; a weight is packed one way or the other"
            )
        if self.bnb_4bit_quant_type not in ("nf4", "fp4"):
            raise UsageError(f'--bnb-4bit-quant-type is {self.bnb_4bit_quant_type!r}; it can be "nf4" or "fp4"')
        for name in ("bnb_4bit_quant_type", "bnb_4bit_use_double_quant"):
            if not self.load_in_4bit and getattr(self, name) != type(self).__dataclass_fields__[name].default:
                raise UsageError(
                    f"{_given(name, getattr(self, name))} says how weights are packed into 4 bits, but they are "
                    f"{'packed into 8' if self.load_in_8bit else 'not packed'}",
                    remedies=["--load-in-4bit"],
                )

    @property
    def quantised_bits(self) -> int | None:
        """Bits a weight of the base model's linear layers is packed into; None for none."""
        return 4 if self.load_in_4bit else 8 if self.load_in_8bit else None

    def describe(self) -> dict[str, Any]:
        """Everything that decides what the run computes, as plain JSON values, with a digest of a local data file."""
        fields = {k: v for k, v in dataclasses.asdict(self).items() if k not in _NOT_COMPARED}
        path = Path(self.data).expanduser()
        if path.is_file():
            fields["data"] = str(path.resolve())
            with path.open("rb") as file:
                fields["data_sha256"] = hashlib.file_digest(file, "sha256").hexdigest()
        local = Path(self.model).expanduser()
        if local.exists():
            fields["model"] = str(local.resolve())
        return json.loads(json.dumps(fields))


def differences(there: dict[str, Any], here: dict[str, Any]) -> list[str]:
    """One line for every setting in which the run asked for (`here`) differs from the recorded one (`there`)."""
    lines: list[str] = []
    for name in sorted({*there, *here}):
        old, new = there.get(name), here.get(name)
        if old == new:
            continue
        if name == "data_sha256":
            lines.append("the contents of the data file have changed")
        elif name == "budget":
            lines.append(f"{flag(name)}: there {_size(old)}, here {_size(new)}")
        else:
            lines.append(f"{flag(name)}: there {old}, here {new}")
    return lines


def flag(name: str) -> str:
    """The command line's spelling of a field."""
    return "--" + name.replace("_", "-")


def _given(name: str, value: Any) -> str:
    """An option with a value that is not its default, as it was given."""
    return f"--no-{flag(name).removeprefix('--')}" if value is False else f"{flag(name)} {value}"


def _size(value: int | None) -> str:
    return "not set" if value is None else f"{format_bytes(value)} ({value} B)"
