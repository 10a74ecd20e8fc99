"""The frontier on a CUDA device: an 8B-shaped stack in bfloat16 and NF4, at 4096 and 16384 tokens, in under 9 minutes.

    python benchmarks/gpu.py             # into runs/frontier_gpu.json, a page and pictures beside it
    python benchmarks/gpu.py --dry-run   # the same code on a CPU, with a tiny model

Needs torch, transformers and PEFT; without bitsandbytes the NF4 workloads are left out, and peers that are not
installed are rows with their errors. The stack has the shape of Llama-3-8B but --layers of its 32 layers, all alike, so
that the plain step fits and a run takes minutes; what does not fit in the device's memory is a row with its error.
Blocks are compiled in the first workload only. The code, the peers and what is printed are those of `frontier.py`.
"""

import importlib.util
import sys
from collections.abc import Mapping

import torch
from frontier import drive, make_parser, quieten
from workloads import Workload

LAYERS = 8
SHORT, LONG = 4096, 16384
FIRST = "8b-4k"
MINUTES, MINUTES_OTHER = 3.5, 1.7


def gpu_workloads(shape: str = "8b", short: int = SHORT, long: int = LONG) -> Mapping[str, Workload]:
    """The four workloads, or the two that need no bitsandbytes."""
    found = [Workload(FIRST, shape, "lora", 1, short, peers="main"), Workload("8b-16k", shape, "lora", 1, long)]
    if importlib.util.find_spec("bitsandbytes") is not None:
        found += [Workload("8b-nf4-4k", shape, "nf4", 1, short), Workload("8b-nf4-16k", shape, "nf4", 1, long)]
    return {workload.name: workload for workload in found}


def main() -> None:
    parser = make_parser(__doc__, "runs/frontier_gpu.json", gpu_workloads())
    parser.add_argument("--layers", type=int, default=LAYERS, help=f"of the stack; default {LAYERS}")
    parser.add_argument("--dry-run", action="store_true", help="a tiny model on a CPU")
    options = parser.parse_args()
    known = gpu_workloads()
    device = torch.device("cuda", 0)
    if options.dry_run:
        device, known = torch.device("cpu"), gpu_workloads("tiny", 32, 64)
        options.layers, options.no_compile, options.points = 2, True, 2
    elif not torch.cuda.is_available():
        sys.exit("no CUDA device; --dry-run runs the same code without one")
    names: list[str] = options.workload or list(known)
    if len(names) == 1:
        options.no_compile = options.no_compile or names[0] != FIRST
        options.minutes = options.minutes or (MINUTES if names[0] == FIRST else MINUTES_OTHER)
    drive({name: known[name] for name in names}, options, device, options.layers)


if __name__ == "__main__":
    quieten()
    main()
