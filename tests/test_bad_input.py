"""Bad input, in Python and on the command line: a clear error, the right exit code, nothing half-written."""

import copy
import json
import re
import resource
import shlex
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import rematree as library
from command_line import Outcome, rematree, remedies
from models import assert_same, batch_for, build, with_lora
from rematree.errors import InfeasibleBudgetError, PlanMismatchError, UnsupportedModelError, UsageError
from rematree.finetune import gguf_cache
from rematree.planning.observed import _measured
from rematree.pricing.cost import Roofline
from rematree.units import GIB, KIB, MIB, format_bytes, parse_bytes
from test_finetune_tiny import save_tiny_model, sums, tiny_model, tiny_tokenizer, write_jsonl

COST = Roofline(5e10, 1e10)
ADAPTERS = ["--dtype", "float32", "--lora-r", "4", "--lora-target-modules", "q_proj"]
SHAPE = ["--batch-size", "2", "--max-length", "64", *ADAPTERS]
Batch = dict[str, torch.Tensor]


@pytest.fixture(scope="module", autouse=True)
def quick() -> Iterator[None]:
    """Prices from arithmetic, and one thread, so that models repeat themselves."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rematree.planning.observed.Measured", lambda device: COST)
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bad")
    save_tiny_model(path / "model")
    write_jsonl(path / "sums.jsonl", sums(24))
    return path


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty directory to be in, with the cache for converted models below it."""
    monkeypatch.setenv("REMATREE_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def training(folder: Path, *words: object, **changes: object) -> list[object]:
    """A short run in ./out; `changes` are other values of --model, --data, --budget."""
    given = {
        "model": folder / "model",
        "data": folder / "sums.jsonl",
        "budget": "64MiB",
        "output-dir": "out",
        **changes,
    }
    options = [word for name, value in given.items() for word in (f"--{name}", value)]
    return ["train", *options, *SHAPE, "--max-steps", "2", "--max-new-tokens", "2", *words]


def refused(outcome: Outcome, code: int = 2) -> str:
    """What was said, without the word "error" and lines of progress; nothing was printed as data."""
    assert (outcome.code, outcome.out) == (code, ""), outcome.err
    said = re.search(r"^error: (.*)", outcome.err, re.MULTILINE | re.DOTALL)
    assert said is not None, outcome.err
    assert "Traceback" not in outcome.err
    return said[1]


@contextmanager
def files_of_at_most(num_bytes: int) -> Generator[None]:
    """No file can grow beyond that, as on a disk that is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


# -- budgets -----------------------------------------------------------------------------------------------------------

BUDGETS = [
    ("8", "size '8' has no unit"),
    ("8GB free", "size '8GB free' is not a number with a unit"),
    ("8Gi", "size '8Gi' has an unknown unit 'Gi'"),
    ("0MiB", "size '0MiB' is not positive"),
    ("-8GiB", "size '-8GiB' is negative"),
]
EXAMPLE = 'write it with a unit, such as "14GiB", "900MiB" or "24GB"'


class Untouchable(nn.Linear):
    """A model that must not be run."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        raise AssertionError("a wrong budget is seen before the model is")


@pytest.mark.parametrize(
    ("budget", "message"), [*BUDGETS, (0, "size 0 is not positive"), (-1, "size -1 is not positive")]
)
def test_a_size_that_is_none_is_refused_before_the_model_is_looked_at(budget: str | int, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        library.plan(Untouchable(4, 4), {"input": torch.ones(1, 4)}, budget=budget)
    assert str(caught.value) == f"{message}; {EXAMPLE}"


@pytest.mark.parametrize(("budget", "message"), BUDGETS)
@pytest.mark.parametrize("command", ["plan", "train", "frontier"])
def test_a_size_that_is_none_is_refused_before_the_model_is_loaded(
    command: str, budget: str, message: str, here: Path
) -> None:
    words: dict[str, list[str]] = {
        "plan": ["--budget", budget, "--output", "plan.json"],
        "train": ["--budget", budget, "--output-dir", "out", "--data", "data.jsonl"],
        "frontier": ["--budgets", f"1GiB,{budget}"],
    }
    outcome = rematree(command, "--model", "./no-such-model", *words[command])
    option = "--budgets" if command == "frontier" else "--budget"
    assert refused(outcome) == f"{option}: {message}; {EXAMPLE}\n"
    assert not list(here.iterdir())


@pytest.fixture(scope="module")
def planned() -> tuple[library.Planner, nn.Module, Batch]:
    model = with_lora(build("llama", layers=2), target_modules=["q_proj", "down_proj"])
    batch = batch_for(model, rows=4)
    return library.Planner(model, batch, cost=COST, forbid=["chunked_loss"]), model, batch


def test_a_budget_below_the_smallest_peak_names_it_and_where_its_bytes_are(
    planned: tuple[library.Planner, nn.Module, Batch],
) -> None:
    planner, model, batch = planned
    with pytest.raises(InfeasibleBudgetError) as caught:
        library.plan(model, batch, "300KiB", cost=COST, forbid=["chunked_loss"])
    error = caught.value
    least = planner.min_peak_bytes()
    assert (error.budget, error.min_peak, error.exit_code) == (300 * KIB, least, 3)
    assert error.message == f"budget 300.0 KiB is below the smallest reachable peak, {format_bytes(least)}"

    ledger = planner.plan(least).ledger
    assert sum(line.num_bytes for line in ledger) == least
    heading, *lines = error.details
    assert heading == "at that peak:"
    said = dict(re.fullmatch(r"(.+?)\s{2,}(\S.*)", line).groups() for line in lines)  # type: ignore[union-attr]
    assert said == {line.category: format_bytes(line.num_bytes) for line in ledger}

    (remedy,) = error.remedies
    larger = re.fullmatch(r"a budget of (\d+MiB) or more", remedy)
    assert larger is not None
    assert least <= parse_bytes(larger[1]) < least + MIB


def test_the_smallest_peak_is_reached_and_nothing_below_it(planned: tuple[library.Planner, nn.Module, Batch]) -> None:
    planner, _, _ = planned
    least = planner.min_peak_bytes()
    assert planner.plan(least).predicted_peak_bytes == least
    for budgets in ([least - 1], [least, least - 1], [1, GIB]):
        with pytest.raises(InfeasibleBudgetError) as caught:
            planner.plans(budgets)
        assert (caught.value.budget, caught.value.min_peak) == (min(budgets), least)


def test_the_breakdown_on_the_command_line_sums_to_the_peak(folder: Path, here: Path) -> None:
    words = ["plan", "--model", str(folder / "model"), *SHAPE, "--budget", "1KiB", "--output", "plan.json"]
    text = refused(rematree(*words), 3)
    least = re.match(r"budget 1\.0 KiB is below the smallest reachable peak, (.*)\n  at that peak:\n", text)
    assert least is not None
    lines = re.findall(r"^  \S[\w ,()-]*?\s{2,}([\d.]+ [KMG]?i?B)$", text, re.MULTILINE)
    assert len(lines) >= 6
    # Every line is rounded to a tenth of a KiB.
    assert sum(map(parse_bytes, lines)) == pytest.approx(parse_bytes(least[1]), abs=len(lines) * 0.05 * KIB)
    assert not list(here.iterdir())


def test_a_frontier_that_no_budget_reaches_says_which_commands_work(folder: Path) -> None:
    words = ["frontier", "--model", str(folder / "model"), *SHAPE, "--points", "2"]
    outcome = rematree(*words, "--budgets", "1KiB,2KiB")
    assert refused(outcome, 3).startswith("budget 2.0 KiB is below the smallest reachable peak, ")
    commands = remedies(outcome)
    assert len(commands) == 2
    for command in commands:
        assert rematree(*command).code == 0, shlex.join(command)


# -- models ------------------------------------------------------------------------------------------------------------


def with_model(command: str, model: object, folder: Path) -> Outcome:
    """Run a command that loads `model`; what it would write goes to the current directory."""
    match command:
        case "train":
            return rematree(*training(folder, model=model))
        case "plan":
            return rematree("plan", "--model", model, *SHAPE, "--budget", "1GiB", "--output", "plan.json")
        case "frontier":
            return rematree("frontier", "--model", model, *SHAPE)
        case _:
            return rematree("verify", folder / "plan.json", "--model", model, *ADAPTERS)


@pytest.fixture(scope="module", autouse=True)
def plan_file(folder: Path) -> Path:
    """A stored plan for the tiny model."""
    path = folder / "plan.json"
    outcome = rematree("plan", "--model", folder / "model", *SHAPE, "--budget", "1GiB", "--output", path)
    assert outcome.code == 0, outcome.err
    return path


LOADERS = ["train", "plan", "frontier", "verify"]


@pytest.mark.parametrize("command", LOADERS)
def test_a_model_that_is_not_there(command: str, folder: Path, here: Path) -> None:
    text = refused(with_model(command, "./no-such-model", folder))
    assert text.startswith(
        "model './no-such-model' is not there\n  there is no directory no-such-model\nWhat would work:\n"
    )
    assert text.count("\n  --model ") == 3
    assert not list(here.iterdir())


@pytest.mark.parametrize("command", LOADERS)
@pytest.mark.parametrize("kept", [0, 3, 40])
def test_a_corrupt_gguf(command: str, kept: int, folder: Path, here: Path) -> None:
    file = folder / f"cut-{kept}.gguf"
    file.write_bytes((b"GGUF" + bytes([3, 0, 0, 0]) + b"\x07" * 60)[:kept])
    text = refused(with_model(command, file, folder))
    assert text.startswith(f"{file} is corrupt: ")
    assert text.endswith("What would work:\n  get the file again\n")
    assert [path for path in here.rglob("*") if path.is_file()] == []
    assert not (here / "out").exists()


@pytest.fixture
def gguf(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The reader of the file is replaced by one that gives a small model; the writer is the real one."""

    def read(path: Path, dtype: torch.dtype) -> tuple[Any, Any]:
        model = tiny_model()
        model.config.quantization_config = {}
        return model, tiny_tokenizer()

    monkeypatch.setattr(gguf_cache, "_check", lambda path: None)
    monkeypatch.setattr(gguf_cache, "_read", read)
    file = folder / "whole.gguf"
    file.touch()
    return file


def test_a_full_disk_while_a_gguf_is_converted(gguf: Path, folder: Path, here: Path) -> None:
    with files_of_at_most(50 * KIB):
        text = refused(with_model("plan", gguf, folder))
    cache = here / "cache"
    assert text.startswith(f"a converted copy of the model cannot be kept in {cache}: ")
    assert "File too large" in text.splitlines()[0]
    assert text.endswith("What would work:\n  REMATREE_CACHE=/a/directory/with/room rematree ...\n")
    assert not list(cache.iterdir())
    assert with_model("plan", gguf, folder).code == 0
    assert len(list(cache.iterdir())) == 1


def test_whom_the_umask_lets_read_can_read_a_converted_copy(gguf: Path, here: Path) -> None:
    copy = gguf_cache.converted_copy(gguf, torch.float32)
    (here / "file").touch()
    (here / "folder").mkdir()
    assert copy.stat().st_mode == (here / "folder").stat().st_mode
    assert (copy / "model.safetensors").is_file()
    assert {path.stat().st_mode for path in copy.iterdir()} == {(here / "file").stat().st_mode}


# -- data --------------------------------------------------------------------------------------------------------------

FORMS = (
    '  expected one JSON object a line: {"prompt": "...", "completion": "..."}\n'
    '  or {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}\n'
)


def test_a_malformed_line_on_the_command_line(folder: Path, here: Path) -> None:
    data = folder / "broken.jsonl"
    data.write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "a"}\n')
    text = refused(rematree(*training(folder, data=data)))
    reason = f'{data}, line 2: an object with "prompt", without "prompt" and "completion" or "messages"\n'
    assert text == f'{reason}  there: {{"prompt": "a"}}\n{FORMS}'
    assert not list(here.iterdir())


def test_an_empty_file_on_the_command_line(folder: Path, here: Path) -> None:
    data = folder / "empty.jsonl"
    data.touch()
    assert refused(rematree(*training(folder, data=data))) == f"{data} is empty: no example in it\n{FORMS}"
    assert not list(here.iterdir())


def test_data_that_is_not_there_on_the_command_line(folder: Path, here: Path) -> None:
    text = refused(rematree(*training(folder, data="no.jsonl")))
    assert text.startswith("data 'no.jsonl' is not there\n  there is no file no.jsonl\nWhat would work:\n")
    assert not list(here.iterdir())


def test_examples_that_are_too_long_are_counted_once_in_a_whole_run(folder: Path, here: Path) -> None:
    long = [{"prompt": f"{i}?", "completion": "x" * 100} for i in range(3)]
    data = write_jsonl(folder / "long.jsonl", [*sums(24), *long])
    outcome = rematree(*training(folder, "--heldout", "0", data=data))
    assert outcome.code == 0, outcome.err
    lines = [line for line in outcome.err.splitlines() if "--max-length" in line]
    assert lines == ["3 of 27 examples are longer than --max-length 64 and were cut"]


# -- the output directory ----------------------------------------------------------------------------------------------


def test_a_directory_that_holds_something_else(folder: Path, here: Path) -> None:
    (here / "out").mkdir()
    (here / "out" / "thesis.tex").write_text("draft")
    assert refused(rematree(*training(folder))) == (
        "out is not empty and holds no run\n"
        "  in it: thesis.tex\n"
        "What would work:\n"
        "  another --output-dir\n"
        "  rm -r out   (to start afresh)\n"
    )
    assert [path.name for path in (here / "out").iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize(
    "schedule",
    [
        "reduce_lr_on_plateau",
        "greedy",
        "cosine_with_min_lr",
        "cosine_warmup_with_min_lr",
        "warmup_stable_decay",
    ],
)
def test_a_schedule_that_needs_more_leaves_the_directory_unclaimed(schedule: str, folder: Path, here: Path) -> None:
    assert refused(rematree(*training(folder, "--lr-scheduler-type", schedule))) == (
        f"--lr-scheduler-type is '{schedule}'; it can be a transformers schedule that needs no further arguments\n"
        "  linear, cosine, cosine_with_restarts, polynomial, constant, constant_with_warmup, inverse_sqrt\n"
    )
    assert not list(here.iterdir())


def test_a_full_disk_while_a_plan_is_stored(folder: Path, here: Path) -> None:
    words = ["plan", "--model", str(folder / "model"), *SHAPE, "--budget", "1GiB", "--output", "plan.json"]
    (here / "plan.json").write_text("an older plan")
    with files_of_at_most(500):
        text = refused(rematree(*words))
    assert text == "plan.json cannot be written: File too large\nWhat would work:\n  another --output\n"
    assert [(path.name, path.read_text()) for path in here.iterdir()] == [("plan.json", "an older plan")]


def test_a_full_disk_while_a_run_is_saved(folder: Path, here: Path) -> None:
    words = training(folder, "--save-steps", "1")
    with files_of_at_most(12 * KIB):
        text = refused(rematree(*words))
    first, *rest = text.splitlines()
    assert re.fullmatch(r"saving to out failed: it takes about [\d.]+ MiB, [\d.]+ [KMG]iB are free", first)
    assert "no checkpoint was saved before" in rest[1]
    assert rest[2:] == ["What would work:", "  make room and start the same command again", "  another --output-dir"]
    left = sorted(path.name for path in (here / "out").iterdir())
    assert left == ["before.json", "frontier.json", "logs", "plan.json", "run.json", "steps.jsonl"]
    json.loads((here / "out" / "frontier.json").read_text())
    assert all(json.loads(line) for line in (here / "out" / "steps.jsonl").read_text().splitlines())
    again = rematree(*words)
    assert (again.code, again.out) == (0, "out/adapter\n"), again.err


# -- plans for something else ------------------------------------------------------------------------------------------

MISMATCH = "the plan was made for another model, batch shape or trainable set"


def attributes(model: nn.Module) -> list[dict[str, Any]]:
    return [dict(module.__dict__) for module in model.modules()]


@pytest.mark.parametrize("what", ["model", "batch shape", "batch dtype", "batch names", "trainable set", "dropout"])
def test_a_plan_for_something_else_is_refused_and_leaves_no_trace(
    what: str, planned: tuple[library.Planner, nn.Module, Batch]
) -> None:
    planner, model, batch = planned
    plan = planner.plan(planner.min_peak_bytes())
    here, given = copy.deepcopy(model), dict(batch)
    match what:
        case "model":
            here = with_lora(build("qwen3"))
        case "batch shape":
            given = batch_for(model, rows=3)
        case "batch dtype":
            given["labels"] = given["labels"].int()
        case "batch names":
            given["attention_mask"] = torch.ones_like(given["input_ids"])
        case "trainable set":
            next(p for p in here.parameters() if p.requires_grad).requires_grad_(False)
        case _:
            dropout: Any = here.get_submodule("base_model.model.model.layers.0.mlp.down_proj.lora_dropout.default")
            dropout.p = 0.2
    before = attributes(here)
    for act in (library.apply, library.verify):
        with pytest.raises(PlanMismatchError) as caught:
            act(plan, here, given)
        assert (caught.value.message, caught.value.exit_code) == (MISMATCH, 2)
        fields = [line.partition(":")[0] for line in caught.value.details]
        expected = ["model_class", "parameters", "trainable", "dropout"] if what == "model" else [what.split()[0]]
        assert fields == expected
        assert caught.value.remedies == ("plan again: rematree.plan(model, batch, budget=...)",)
        assert attributes(here) == before


def test_a_batch_that_grows_in_training_is_refused_and_a_smaller_one_is_not(
    planned: tuple[library.Planner, nn.Module, Batch],
) -> None:
    planner, model, _ = planned
    with library.apply(planner.plan(planner.min_peak_bytes()), model):
        model(**batch_for(model, rows=3)).loss.backward()
        model.zero_grad(set_to_none=True)
        longer = batch_for(model, rows=4, tokens=33)
        with pytest.raises(PlanMismatchError) as caught:
            model(**longer)
    assert str(caught.value) == (
        "the plan was made for input_ids of shape (4, 32), this batch has (4, 33)\n"
        "What would work:\n"
        "  plan again for the larger batch: rematree.plan(model, batch, budget=...)"
    )


@pytest.mark.parametrize(
    ("words", "fields"),
    [
        (["--lora-r", "8"], ["parameters"]),
        (["--lora-target-modules", "q_proj,v_proj"], ["parameters", "trainable", "dropout"]),
        (["--full"], ["parameters", "trainable", "dropout"]),
        (["--lora-dropout", "0.5"], ["dropout"]),
    ],
)
def test_a_plan_for_something_else_on_the_command_line(
    words: list[str], fields: list[str], folder: Path, plan_file: Path
) -> None:
    outcome = rematree("verify", plan_file, "--model", folder / "model", *ADAPTERS, *words)
    first, *lines = refused(outcome).splitlines()
    assert first == MISMATCH
    assert [line.strip().partition(":")[0] for line in lines[: lines.index("What would work:")]] == fields


def test_a_plan_for_another_model_on_the_command_line(plan_file: Path, tmp_path: Path) -> None:
    tiny_tokenizer().save_pretrained(tmp_path)
    sizes: dict[str, Any] = {
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 64,
        "vocab_size": 261,
        "bos_token_id": 0,
    }
    transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, eos_token_id=1)).save_pretrained(tmp_path)
    words = ["--dtype", "float32", "--lora-r", "4", "--lora-target-modules", "c_fc"]
    text = refused(rematree("verify", plan_file, "--model", tmp_path, *words))
    assert text.startswith(f"{MISMATCH}\n  model_class: planned for LlamaForCausalLM, here GPT2LMHeadModel\n")


@pytest.mark.parametrize("command", ["show", "explain", "verify"])
def test_a_file_that_is_no_plan(command: str, tmp_path: Path) -> None:
    words = [] if command != "verify" else ["--model", "./no-such-model"]
    missing, other, binary = tmp_path / "no.json", tmp_path / "other.json", tmp_path / "binary.json"
    other.write_text('{"a": 1}')
    binary.write_bytes(b"\x80\x02")
    assert refused(rematree(command, missing, *words)).startswith(
        f"{missing} cannot be read: No such file or directory\n"
    )
    assert refused(rematree(command, tmp_path, *words)).startswith(f"{tmp_path} cannot be read: Is a directory\n")
    assert refused(rematree(command, other, *words)) == f"{other}: not a plan: no format version in it\n"
    assert refused(rematree(command, binary, *words)) == f"{binary}: not a plan: not UTF-8 at byte 0\n"


# -- models without a list of blocks -----------------------------------------------------------------------------------


class Stages(nn.Module):
    """Two stages by name, between an embedding and a head; no list."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(64, 32)
        self.first, self.second = stage(), stage()
        self.head = nn.Linear(32, 64)

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        x = self.embed(input_ids)
        x = x + self.first(x)
        x = x + self.second(x)
        return {"loss": nn.functional.cross_entropy(self.head(x).flatten(0, 1), labels.flatten())}


def stage() -> nn.Sequential:
    return nn.Sequential(nn.Linear(32, 128), nn.GELU(), nn.Dropout(0.1), nn.Linear(128, 32))


class Looped(Stages):
    """One of its stages runs twice."""

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        x = self.second(self.first(self.first(self.embed(input_ids))))
        return {"loss": nn.functional.cross_entropy(self.head(x).flatten(0, 1), labels.flatten())}


class Bare(nn.Module):
    """Parameters and no modules inside."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(64, 64))

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        x = nn.functional.dropout(torch.tanh(nn.functional.embedding(input_ids, self.weight)), 0.1, self.training)
        return {"loss": nn.functional.cross_entropy((x @ self.weight.T).flatten(0, 1), labels.flatten())}


class Wrapped(nn.Module):
    """One module around another."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, **batch: torch.Tensor) -> dict[str, torch.Tensor]:
        return self.inner(**batch)


def albert() -> nn.Module:
    """One layer for all: its list has a single element, which runs three times."""
    sizes = {
        "vocab_size": 64,
        "embedding_size": 24,
        "hidden_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
    }
    dropout: dict[str, Any] = {
        "hidden_dropout_prob": 0.1,
        "attention_probs_dropout_prob": 0.1,
        "classifier_dropout_prob": 0.1,
    }
    config = transformers.AlbertConfig(**sizes, **dropout, intermediate_size=96, max_position_embeddings=64)
    return transformers.AlbertForMaskedLM(config)


def small_batch() -> Batch:
    tokens = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 64, (16, 64), generator=tokens)
    return {"input_ids": ids, "labels": ids.clone()}


def step(model: nn.Module, batch: Batch) -> Batch:
    torch.manual_seed(3)
    loss = model(**batch)["loss"]
    loss.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return {"loss": loss.detach(), **found}


NO_LIST = "no block list found"
COARSER = f"{NO_LIST}: falling back to 4 coarser regions, the children of"


@pytest.mark.parametrize(
    ("make", "note", "regions"),
    [
        (Stages, f"{COARSER} model", ["embed", "first", "second", "head"]),
        (lambda: Wrapped(Stages()), f"{COARSER} inner", ["inner.embed", "inner.first", "inner.second", "inner.head"]),
        (
            Looped,
            f"{COARSER} model; planned as saved, because they do not run exactly once in a step: first",
            ["embed", "second", "head"],
        ),
        (albert, f"{NO_LIST}: falling back to 2 coarser regions, the children of model", ["albert", "predictions"]),
        (Bare, f"{NO_LIST} and nothing inside the model to split: the whole model is one region", [""]),
        (
            lambda: Wrapped(Bare()),
            f"{NO_LIST} and nothing inside the model to split: the whole model is one region",
            ["inner"],
        ),
    ],
    ids=["stages", "wrapped", "looped", "albert", "bare", "wrapped bare"],
)
def test_a_model_without_a_block_list_is_planned_in_coarser_regions_and_says_so(
    make: Any, note: str, regions: list[str], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model, batch = make().train(), small_batch()
    planner = library.Planner(model, batch, cost=COST, forbid=["chunked_loss"])
    least, most = planner.min_peak_bytes(), planner.plan(None).predicted_peak_bytes
    expected = step(model, batch)
    assert_same(expected, step(model, batch))  # the control
    for budget in {least, (least + most) // 2, most}:
        plan = planner.plan(budget)
        assert plan.notes == (note,)
        assert [row.path for row in plan.rows] == regions
        with library.apply(plan, model, batch):
            assert_same(expected, step(model, batch))
        assert_same(expected, step(model, batch))
    tightest = planner.plan(least)
    assert tightest.recomputes == (least < most) == (make in (Stages, Looped, albert) or len(regions) == 4)
    assert library.verify(tightest, model, batch, rounds=1).gradients_equal

    file = tmp_path / "plan.json"
    file.write_text(tightest.to_json())
    shown, explained = rematree("show", file), rematree("explain", file)
    assert shown.out == f"{tightest}\n"
    assert f"\nnote: {note}\n" in shown.out
    assert f"\nNotes:\n  {note}\n" in explained.out
    if regions == [""]:
        assert "\n(whole model)  save all" in shown.out
        assert "\n  (whole model): keeps " in explained.out


class Unused(Stages):
    """Its forward uses weights, not modules."""

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        x = self.embed.weight[input_ids] @ self.head.weight.T
        return {"loss": nn.functional.cross_entropy(x.flatten(0, 1), labels.flatten())}


# -- models that cannot be planned -------------------------------------------------------------------------------------


def test_a_model_whose_blocks_never_run() -> None:
    with pytest.raises(UnsupportedModelError) as caught:
        library.plan(Unused(), small_batch(), "1GiB", cost=COST)
    assert (str(caught.value), caught.value.exit_code) == ("none of the model's blocks runs exactly once in a step", 2)


def test_a_loss_that_looks_at_its_labels() -> None:
    """DeBERTa leaves out rows whose label is negative, unless it is told what kind of problem it has."""
    sizes: dict[str, Any] = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    config = transformers.DebertaV2Config(**sizes, num_hidden_layers=3)
    model = transformers.DebertaV2ForSequenceClassification(config).train()
    batch = {"input_ids": torch.arange(3, 35).reshape(2, 16), "labels": torch.tensor([0, 1])}
    expected = step(model, batch)
    shapes = {name: tensor.to("meta") for name, tensor in batch.items()}
    with pytest.raises(UnsupportedModelError, match="depends on values of tensors") as caught:
        library.plan(model, shapes, "1GiB", cost=COST)
    assert 'model.config.problem_type = "single_label_classification"' in str(caught.value)
    planner = library.Planner(model, batch, cost=COST)
    with library.apply(planner.plan(planner.min_peak_bytes()), model):
        assert_same(expected, step(model, batch))


def test_a_model_that_goes_through_several_lists_side_by_side() -> None:
    """XLM: none of them can be shortened alone. It also checks the lengths of its sequences in Python."""
    sizes: dict[str, Any] = {
        "vocab_size": 64,
        "emb_dim": 48,
        "n_layers": 4,
        "n_heads": 4,
        "max_position_embeddings": 64,
        "n_langs": 1,
    }
    model = transformers.XLMWithLMHeadModel(transformers.XLMConfig(**sizes, use_lang_emb=False)).train()
    batch = small_batch()
    expected = step(model, batch)
    planner = library.Planner(model, batch, cost=COST)
    with library.apply(planner.plan(planner.min_peak_bytes()), model):
        assert_same(expected, step(model, batch))


class LooksAtWeights(Stages):
    """How many of its features count is in a weight."""

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        found = super().forward(input_ids, labels)
        return {"loss": found["loss"] * int(self.embed.weight.sum().abs().clamp(max=1))}


def test_a_forward_that_depends_on_values() -> None:
    model = LooksAtWeights().train()
    for act in (
        lambda: library.plan(model, small_batch(), "1GiB", cost=COST),
        lambda: library.saved_tensors(model, small_batch()),
    ):
        with pytest.raises(UnsupportedModelError) as caught:
            act()
        assert caught.value.message == (
            "the model's forward depends on values of tensors, and a plan is made without computing any"
        )
        (line,) = caught.value.details
        assert re.fullmatch(r"aten\._local_scalar_dense\.default at test_bad_input\.py:\d+", line)


@pytest.mark.parametrize("places", [{"model.layers.0": 0, "model.layers.1": 1}, {"": "cpu", "lm_head": "disk"}])
def test_a_model_that_is_spread_over_devices(places: dict[str, Any]) -> None:
    model: Any = with_lora(build("llama", layers=2))
    model.base_model.model.hf_device_map = places
    with pytest.raises(UsageError, match=r"the model is spread over .*; a plan is for one device"):
        library.Planner(model, batch_for(model), cost=COST)
    model.base_model.model.hf_device_map = {"": "cpu"}
    assert library.Planner(model, batch_for(model), cost=COST).plan()


def test_a_device_that_no_clock_waits_for() -> None:
    with pytest.raises(UsageError, match="what ops take on mps is measured nowhere yet"):
        _measured(torch.device("mps"))


def test_a_model_with_nothing_to_train() -> None:
    with pytest.raises(
        UsageError, match=r"^no parameter of the model requires grad: there is no training step to plan$"
    ):
        library.plan(Stages().requires_grad_(False), small_batch(), "1GiB")


def test_a_model_that_something_else_has_wrapped() -> None:
    model = Stages()
    inner = model.second.forward
    model.second.forward = lambda input: inner(input)  # as accelerate does
    with pytest.raises(UnsupportedModelError) as caught:
        library.plan(model, small_batch(), "1GiB", cost=COST)
    assert caught.value.message.startswith("second has a wrapped forward (")
    assert caught.value.remedies == ("plan before accelerator.prepare(model) or other wrappers",)


def test_a_batch_without_labels_on_the_python_api() -> None:
    batch = {"input_ids": torch.ones(2, 8, dtype=torch.int64)}
    for act in (library.plan, library.frontier):
        with pytest.raises(UsageError, match=r"^the model returned no loss for this batch\n"):
            act(build("llama", layers=2), batch, 5)
