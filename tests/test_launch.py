"""`accelerate launch` for real: a Trainer with a budget in two processes over gloo, under DDP, FSDP2, ZeRO-2 and -3."""

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any, cast

import pytest
import torch

import launched
from rematree.plans import Plan
from rematree.referee.ranks import Engine, Ranks

TOLERANCE = 1e-4  # of losses of about 5 in fp32: the order of sums over four rows and over two ranks, in four steps


DEEPSPEED = {"DS_ACCELERATOR": "cpu"}  # it looks for none by itself
LLAMA = ["--fsdp_auto_wrap_policy", "TRANSFORMER_BASED_WRAP", "--fsdp_transformer_layer_cls_to_wrap"]
# accelerate's own choice for CPUs, --cpu, starts its processes with mpirun; the other launcher is torchrun.
ENGINES = {
    "ddp": (["--multi_gpu"], "DistributedDataParallel"),
    "zero2": (["--use_deepspeed", "--zero_stage", "2"], "DeepSpeedEngine"),
    "zero3": (["--use_deepspeed", "--zero_stage", "3"], "DeepSpeedEngine"),
    "fsdp2": (["--use_fsdp", "--fsdp_version", "2", *LLAMA, "LlamaDecoderLayer"], "FSDPPeftModel"),
}


@pytest.mark.slow  # two interpreters that import everything
@pytest.mark.parametrize("engine", ENGINES)
def test_two_processes_train_as_one_does_that_has_all_rows(tmp_path: Path, engine: str) -> None:
    if engine in {"zero2", "zero3"}:
        pytest.importorskip("deepspeed")
    launched.main(tmp_path / "alone", 4, "1GiB")
    alone: Any = torch.load(tmp_path / "alone.0", weights_only=False)
    result = tmp_path / "rank"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    chosen, wrapper = ENGINES[engine]
    words = [*chosen, "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no"]
    words += ["--dynamo_backend", "no", "--main_process_port", str(port)]
    words += [launched.__file__, str(result), "2", "1200KiB", engine]
    done = subprocess.run(
        [sys.executable, "-m", "accelerate.commands.launch", *words],
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),
            "OMP_NUM_THREADS": "1",
            **DEEPSPEED,
        },
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    ranks: list[Any] = [torch.load(f"{result}.{rank}", weights_only=False) for rank in (0, 1)]
    for found in ranks:
        assert (found["ranks"], found["wrapper"], found["backend"]) == (2, wrapper, "gloo")
        assert found["plan"] == ranks[0]["plan"]
        plan = Plan.from_json(found["plan"])
        assert plan.recomputes
        assert str(Ranks(cast("Engine", engine), 2)) in plan.notes[0]
        torch.testing.assert_close(torch.tensor(found["losses"]), torch.tensor(alone["losses"]), rtol=0, atol=TOLERANCE)
    assert len(set(alone["losses"])) == 4  # four batches, and weights that move
