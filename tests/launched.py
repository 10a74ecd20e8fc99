"""What `accelerate launch` starts in each process: a Trainer with a budget.

Arguments: file for the result, rows of a batch, budget, and "fsdp2" where accelerate was told to use FSDP, or "zero2"
or "zero3" where the training arguments ask for DeepSpeed.
"""

import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from transformers import Trainer

from killed import LENGTHS
from models import build, with_lora
from rematree import BudgetCallback
from rematree.pricing.cost import Roofline
from trainers import QUICK, pad, quiet_arguments, rows_of


def take_fsdp_on_a_cpu() -> None:
    """accelerate looks at --use_fsdp only where it finds an accelerator; on a CPU it wraps by DDP and says nothing.

    What it does for FSDP2 (units, the optimizer's parameters) runs on a CPU as well, once its state says so.
    """
    begin = AcceleratorState.__init__

    def begin_with_fsdp(self: AcceleratorState, *args: Any, **kwargs: Any) -> None:
        begin(self, *args, **kwargs)
        if kwargs.get("fsdp_plugin") is not None:  # the state is one object, and often asked for
            self.fsdp_plugin = kwargs["fsdp_plugin"]
            self.distributed_type = DistributedType.FSDP

    AcceleratorState.__init__ = begin_with_fsdp


ZERO: dict[str, Any] = {
    "zero_optimization": {"reduce_bucket_size": 2000},
    "zero_allow_untested_optimizer": True,  # torch's AdamW, and on a CPU without DeepSpeed's own in its place
    "zero_force_ds_cpu_optimizer": False,
    "gradient_accumulation_steps": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "train_batch_size": "auto",
    "gradient_clipping": "auto",
}


def deepspeed_config(engine: str) -> dict[str, Any] | None:
    """What the training arguments ask for: ZeRO-3 with little that stays whole or comes ahead."""
    match engine:
        case "zero2":
            return {**ZERO, "zero_optimization": {"stage": 2, **ZERO["zero_optimization"]}}
        case "zero3":
            told = {"stage3_prefetch_bucket_size": 2000, "stage3_param_persistence_threshold": 100}
            return {**ZERO, "zero_optimization": {"stage": 3, **told, **ZERO["zero_optimization"]}}
        case _:
            return None


def main(result: Path, rows: int, budget: str, engine: str = "") -> None:
    """Without dropout: ranks draw other masks than one process that has all rows."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        arguments = quiet_arguments(
            folder,
            per_device_train_batch_size=rows,
            max_steps=4,
            ddp_find_unused_parameters=False,
            deepspeed=deepspeed_config(engine),
        )
        callback = BudgetCallback(budget, cost=Roofline(1e11, 1e10), forbid=QUICK, say=lambda text: None)
        trainer = Trainer(
            model=with_lora(build("llama", layers=2), lora_dropout=0.0),
            args=arguments,
            train_dataset=rows_of(*LENGTHS),
            data_collator=pad,
            callbacks=[callback],
        )
        trainer.train()
    assert callback.plan is not None
    torch.save(
        {
            "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
            "plan": callback.plan.to_json(),
            "ranks": arguments.world_size,
            "wrapper": type(trainer.model_wrapped).__name__,
            "backend": torch.distributed.get_backend() if torch.distributed.is_initialized() else "",
        },
        result.with_name(f"{result.name}.{arguments.process_index}"),
    )


if __name__ == "__main__":
    if sys.argv[4:] == ["fsdp2"]:
        take_fsdp_on_a_cpu()
    main(Path(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:])
