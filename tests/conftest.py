"""What holds for every test: no network, no Hub cache of the user, the same random numbers each time."""

import atexit
import os
import random
import shutil
import sys
import tempfile
from pathlib import Path

import pytest
from hypothesis import settings

# Read when transformers and datasets are imported, so they are set before any test module is.
os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="rematree-tests-")
atexit.register(shutil.rmtree, os.environ["HF_HOME"], ignore_errors=True)
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

# A slow machine is no failure, and a failure comes again on the next run.
settings.register_profile("rematree", deadline=None, derandomize=True, database=None)
settings.load_profile("rematree")


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the working tree."""
    return Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def _same_random_numbers() -> None:
    random.seed(0)
    torch = sys.modules.get("torch")  # only where the test module has imported it: that takes seconds
    if torch is not None:
        torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _skip_without_gpu(request: pytest.FixtureRequest) -> None:
    if request.node.get_closest_marker("gpu") is not None:
        torch = pytest.importorskip("torch")
        if not torch.cuda.is_available():
            pytest.skip("no CUDA device")
