"""The accuracy runs on a CUDA device: allocated and reserved peaks, and times, beside their predictions.

    python benchmarks/accuracy_gpu.py            # 90 runs, into runs/accuracy_gpu.json and docs/accuracy_gpu.md
    python benchmarks/accuracy_gpu.py --device cpu --quick   # the same code without a GPU

Needs torch, transformers and PEFT; without bitsandbytes the QLoRA runs are left out, and the page has fewer rows. The
grid and the code are those of `accuracy.py`. Exits with 1 if a promise about peaks is broken.
"""

import sys
from pathlib import Path

import torch
from accuracy import main

PAGE = Path(__file__).resolve().parent.parent / "docs" / "accuracy_gpu.md"

if __name__ == "__main__":
    if not torch.cuda.is_available() and "--device" not in sys.argv:
        sys.exit("no CUDA device; --device cpu runs the same code without one")
    main(__doc__, "runs/accuracy_gpu.json", torch.device("cuda", 0), PAGE, "Accuracy on a GPU")
