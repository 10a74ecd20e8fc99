"""What the executor itself costs: microseconds for each recomputed region in each step, beside torch's own checkpoints.

    python benchmarks/overhead.py                 # a chain of tiny layers, and LoRA Llama layers
    python benchmarks/overhead.py --profile       # where the time of ours goes

The layers do next to nothing, so the time over that of a plain step, less that of the second forward, is the
bookkeeping: ours (`rematree.apply` of a hand-made plan that recomputes every layer), `torch.utils.checkpoint`
non-reentrant, and selective checkpointing, whose dispatch mode sees every op. Interleaved; medians.
"""

import argparse
import cProfile
import functools
import json
import pstats
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from peers import around_blocks
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from workloads import Built, Workload, build, plain_loss

import rematree
from rematree.fingerprint import describe_model
from rematree.plans import Action, Decision, Plan
from rematree.regions import find_chain
from rematree.table import render_table

Step = Callable[[], torch.Tensor]


class Tiny(nn.Module):
    """A block that is trivially cheap."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x).relu()


class TinyChain(nn.Module):
    """Tiny blocks, one after the other."""

    def __init__(self, length: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Tiny() for _ in range(length)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def tiny_chain(length: int) -> tuple[nn.Module, list[nn.Module], Step]:
    """Model, its blocks and the loss of a chain."""
    torch.manual_seed(0)
    model = TinyChain(length)
    x = torch.randn(2, 4)
    return model, list(model.layers), lambda: model(x).sum()


def lora_llama() -> tuple[nn.Module, list[nn.Module], Step]:
    """The same of Llama layers with seven LoRA layers each, on four tokens."""
    built: Built = build(Workload("tiny", "tiny", "lora", 1, 4, dropout=0.05), torch.device("cpu"), torch.float32)
    return built.model, built.layers, lambda: plain_loss(built.model, built.batch)


def recompute_everything(model: nn.Module) -> Plan:
    """A plan that recomputes every block whole."""
    decisions = {path: Decision(Action.RECOMPUTE) for path in find_chain(model).blocks}
    return Plan(decisions, None, None, 0, 0.0, (), (), describe_model(model))


@contextmanager
def _applied(model: nn.Module) -> Generator[None]:
    with rematree.apply(recompute_everything(model), model):
        yield


def ways(model: nn.Module, layers: list[nn.Module]) -> dict[str, Callable[[], AbstractContextManager[Any]]]:
    """The plain step, one that only runs every layer twice, and the three executors."""
    again = functools.partial(checkpoint, use_reentrant=False)
    kept = functools.partial(create_selective_checkpoint_contexts, lambda *_, **__: CheckpointPolicy.PREFER_RECOMPUTE)

    def twice(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        with torch.enable_grad():
            forward(*args, **kwargs)
        return forward(*args, **kwargs)

    return {
        "plain": nullcontext,
        "every layer run twice": lambda: around_blocks(layers, twice),
        "torch.utils.checkpoint": lambda: around_blocks(layers, again),
        "SAC": lambda: around_blocks(layers, functools.partial(again, context_fn=kept)),
        "rematree": lambda: _applied(model),
    }


def time_step(model: nn.Module, step: Step) -> float:
    """Seconds of one forward and backward."""
    started = time.perf_counter()
    step().backward()
    seconds = time.perf_counter() - started
    for parameter in model.parameters():
        parameter.grad = None
    return seconds


def measure(model: nn.Module, layers: list[nn.Module], step: Step, rounds: int, steps: int) -> dict[str, float]:
    """Median seconds of a step of each way; in turns of `steps` steps after two that do not count."""
    seconds: dict[str, list[float]] = {}
    for _ in range(rounds):
        for name, way in ways(model, layers).items():
            with way():
                for _ in range(2):
                    time_step(model, step)
                seconds.setdefault(name, []).extend(time_step(model, step) for _ in range(steps))
    return {name: statistics.median(found) for name, found in seconds.items()}


def per_region(seconds: dict[str, float], regions: int) -> dict[str, float]:
    """Microseconds for each region and step that bookkeeping takes: what is over running every layer twice."""
    base = seconds["every layer run twice"]
    executors = [name for name in seconds if name not in ("plain", "every layer run twice")]
    return {name: (seconds[name] - base) / regions * 1e6 for name in executors}


def profile(model: nn.Module, step: Step, steps: int) -> str:
    """Where the time of our steps goes, the dearest functions first."""
    found = cProfile.Profile()
    with _applied(model):
        for _ in range(2):
            time_step(model, step)
        found.enable()
        for _ in range(steps):
            time_step(model, step)
        found.disable()
    pstats.Stats(found, stream=sys.stdout).sort_stats("tottime").print_stats(25)
    return ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--steps", type=int, default=4, help="in a turn")
    parser.add_argument("--length", type=int, default=64, help="of the chain of tiny layers")
    parser.add_argument("--output", type=Path, default=Path("runs/overhead.json"))
    parser.add_argument("--profile", action="store_true")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    result: dict[str, Any] = {"torch": torch.__version__}
    rows: list[tuple[str, ...]] = []
    for what, (model, layers, step) in {
        "tiny layer": tiny_chain(options.length),
        "LoRA Llama layer": lora_llama(),
    }.items():
        model.train()
        if options.profile:
            print(what)
            profile(model, step, 20)
            continue
        seconds = measure(model, layers, step, options.rounds, options.steps)
        cost = per_region(seconds, len(layers))
        result[what] = {"step_seconds": seconds, "regions": len(layers), "microseconds_per_region": cost}
        rows += [(what, name, f"{value:.0f}") for name, value in cost.items()]
    if rows:
        print(render_table(("region", "executor", "microseconds"), rows, right={2}))
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
