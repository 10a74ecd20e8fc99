"""What holds for every test: no network, no Hub cache of the user, the same random numbers each time."""

import atexit
import gc
import os
import random
import shutil
import sys
import tempfile
from pathlib import Path

import pytest
from hypothesis import settings

# Begun first, the longest first, as a file goes to one worker whole: one of these begun last would keep it busy alone.
LONG_FILES = (
    "test_ranks",
    "test_lean_plans",
    "test_exactness",
    "test_compiled_blocks",
    "test_groups",
    "test_budget_callback",
    "test_quantised",
    "test_kills",
    "test_finetune_job",
    "test_dpo",
    "test_fit",
    "test_cli",
    "test_survival",
    "test_whole_runs",
    "test_quantised_job",
    "test_report_page",
    "test_benchmarks",
    "test_accuracy_log",
    "test_executor",
    "test_bad_input",
    "test_verification",
)

# Read when transformers and datasets are imported, so they are set before any test module is.
os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="rematree-tests-")
atexit.register(shutil.rmtree, os.environ["HF_HOME"], ignore_errors=True)
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

# A slow machine is no failure, and a failure comes again on the next run.
settings.register_profile("rematree", deadline=None, derandomize=True, database=None)
settings.load_profile("rematree")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the tests of long files first; everything else stays as it is."""
    turn = {name: number for number, name in enumerate(LONG_FILES)}
    items.sort(key=lambda item: turn.get(item.path.stem, len(turn)))


def pytest_collection_finish() -> None:
    """What is imported by now stays: every peak meter collects garbage, and need not look at half a million objects."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the working tree."""
    return Path(__file__).resolve().parent.parent


@pytest.fixture
def stated_prices(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prices from arithmetic instead of measured: for tests of a command or a script whose result no price changes."""
    from rematree.pricing.roofline import Roofline

    monkeypatch.setattr("rematree.planning.observed.Measured", lambda device: Roofline(1e11, 1e10))


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
