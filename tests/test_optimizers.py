"""State of the optimizers a plan counts with, against the real ones."""

from collections.abc import Callable
from typing import Any, get_args

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from rematree.errors import UsageError
from rematree.integrations.arguments import kind_of
from rematree.measure import PeakMeter, storage_bytes
from rematree.memory.found import found_optimizer
from rematree.memory.optimizers import Found, Optimizer, make_optimizer, optimizer_with_state

SHAPES = ((100, 50), (10,), (4096,), (4095,), (300, 1000), (7, 999))


def parameters(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    return [nn.Parameter(torch.ones(shape, dtype=dtype)) for shape in SHAPES]


def fake_parameters(dtype: torch.dtype = torch.float32) -> tuple[FakeTensorMode, list[nn.Parameter]]:
    mode = FakeTensorMode()
    return mode, [mode.from_tensor(p) for p in parameters(dtype)]  # type: ignore[misc]


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    return storage_bytes(t for s in optimizer.state.values() for t in s.values() if isinstance(t, torch.Tensor))


def stepped(kind: Optimizer, trained: list[nn.Parameter]) -> torch.optim.Optimizer:
    optimizer = make_optimizer(kind, trained)
    assert optimizer is not None
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    return optimizer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["adamw_8bit", "paged_adamw_8bit"])
@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
def test_8bit_state_is_that_of_bitsandbytes(kind: Optimizer, dtype: torch.dtype) -> None:
    pytest.importorskip("bitsandbytes")
    mode, trained = fake_parameters(dtype)
    with mode:
        counted = optimizer_with_state(kind, trained)
        assert counted is not None
        found = state_bytes(counted)
    assert found == state_bytes(stepped(kind, parameters(dtype)))


def test_8bit_state_by_the_rule() -> None:
    mode, trained = fake_parameters()
    with mode:
        counted = optimizer_with_state("adamw_8bit", trained)
        assert counted is not None
        small = 2 * 4 * (10 + 4095)
        eight = (5000, 4096, 300_000, 6993)
        scales = sum(-(-count // 256) for count in eight)
        assert state_bytes(counted) == small + 2 * sum(eight) + 2 * 4 * scales + 2 * 4 * 256


def test_paged_state_of_large_tensors_is_not_on_the_device() -> None:
    mode, trained = fake_parameters()
    with mode:
        all_there = optimizer_with_state("paged_adamw_8bit", trained)
        paged = optimizer_with_state("paged_adamw_8bit", trained, pages=True)
        assert all_there is not None
        assert paged is not None
        assert state_bytes(all_there) - state_bytes(paged) == 2 * 300_000  # its scales stay


@pytest.mark.parametrize(
    ("kind", "size"), [("adamw", lambda count, tensors: 8 * count + 4 * tensors), ("sgd", lambda count, tensors: 0)]
)
def test_plain_state(kind: Optimizer, size: Callable[[int, int], int]) -> None:
    mode, trained = fake_parameters()
    with mode:
        counted = optimizer_with_state(kind, trained)
        assert counted is not None
        assert state_bytes(counted) == size(sum(p.numel() for p in trained), len(trained))
    assert state_bytes(stepped(kind, parameters())) == size(sum(p.numel() for p in trained), len(trained))


REAL: dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = {
    "AdamW": torch.optim.AdamW,
    "AdamW, amsgrad": lambda trained: torch.optim.AdamW(trained, amsgrad=True),
    "Adam, fused": lambda trained: torch.optim.Adam(trained, fused=True),
    "SGD": torch.optim.SGD,
    "SGD, momentum": lambda trained: torch.optim.SGD(trained, momentum=0.9),
}
FROM_BITSANDBYTES = {
    "AdamW": ("AdamW", {}),
    "AdamW, 8 bits": ("AdamW", {"optim_bits": 8}),
    "AdamW8bit, from 300 elements": ("AdamW8bit", {"min_8bit_size": 300}),
    "Lion": ("Lion", {}),
    "Lion8bit": ("Lion8bit", {}),
    "RMSprop8bit": ("RMSprop8bit", {}),
    "AdEMAMix": ("AdEMAMix", {}),
    "AdEMAMix8bit": ("AdEMAMix8bit", {}),
}


def counted_and_real(
    make: Callable[[list[nn.Parameter]], torch.optim.Optimizer], dtype: torch.dtype
) -> tuple[Found, int, int]:
    """What an optimizer is found to keep, and the bytes of its state: counted, and after a step of it."""
    real = parameters(dtype)
    optimizer = make(real)
    found = found_optimizer(optimizer, real, "cpu")
    assert found is not None
    mode, trained = fake_parameters(dtype)
    with mode:
        counted = optimizer_with_state(found, trained)
        assert counted is not None
        size = state_bytes(counted)
    for parameter in real:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    return found, size, state_bytes(optimizer)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("make", REAL.values(), ids=REAL.keys())
def test_state_of_an_optimizer_that_is_here(
    make: Callable[[list[nn.Parameter]], torch.optim.Optimizer], dtype: torch.dtype
) -> None:
    _, counted, real = counted_and_real(make, dtype)
    assert counted == real


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("name", "given"), FROM_BITSANDBYTES.values(), ids=FROM_BITSANDBYTES.keys())
def test_state_of_an_optimizer_of_bitsandbytes(name: str, given: dict[str, int], dtype: torch.dtype) -> None:
    library = pytest.importorskip("bitsandbytes").optim
    _, counted, real = counted_and_real(lambda trained: getattr(library, name)(trained, **given), dtype)
    assert counted == real


def test_embeddings_that_somebody_wants_32_bits_for() -> None:
    """As transformers' Trainer does with every optimizer of 8 bits."""
    library = pytest.importorskip("bitsandbytes").optim
    model = nn.Sequential(nn.Embedding(100, 64), nn.Linear(64, 100, bias=False))
    library.GlobalOptimManager.get_instance().register_module_override(model[0], "weight", {"optim_bits": 32})
    trained = [*model.parameters()]
    found = found_optimizer(library.AdamW8bit(trained), trained, "cpu")
    assert found is not None
    assert found.wide == {0}
    mode = FakeTensorMode()
    with mode:
        counted = optimizer_with_state(found, [mode.from_tensor(p) for p in trained])  # type: ignore[misc]
        assert counted is not None
        assert state_bytes(counted) == 2 * 4 * 6400 + 2 * (6400 + 4 * 25) + 2 * 4 * 256


ONE_BY_ONE, TOGETHER = False, True


@pytest.mark.parametrize(
    ("kind", "given", "device", "beside"),
    [
        (torch.optim.AdamW, {"fused": True}, "cpu", (0, ONE_BY_ONE)),
        (torch.optim.AdamW, {}, "cpu", (2, ONE_BY_ONE)),
        (torch.optim.AdamW, {}, "cuda", (1, TOGETHER)),  # planned for, on a machine without one
        (torch.optim.AdamW, {"foreach": False}, "cuda", (2, ONE_BY_ONE)),
        (torch.optim.AdamW, {"weight_decay": 0.1}, "cpu", (2, ONE_BY_ONE)),
        (torch.optim.Adam, {"weight_decay": 0.1}, "cpu", (3, ONE_BY_ONE)),
        (torch.optim.Adam, {"weight_decay": 0.1, "foreach": True}, "cpu", (1, TOGETHER)),
        (torch.optim.SGD, {}, "cuda", (0, TOGETHER)),
        (torch.optim.SGD, {"weight_decay": 0.1}, "cuda", (1, TOGETHER)),
        (torch.optim.SGD, {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1}, "cpu", (2, ONE_BY_ONE)),
        (torch.optim.SGD, {"momentum": 0.9, "nesterov": True}, "cuda", (0, TOGETHER)),
    ],
)
def test_what_a_step_takes_beside(kind: Any, given: dict[str, Any], device: str, beside: tuple[int, bool]) -> None:
    """In the optimizer's own settings, and in those of a group, as transformers' Trainer has them."""
    decayed, others = parameters()[:3], parameters()[3:]
    for optimizer in (
        kind([*decayed, *others], **given),
        kind([{"params": decayed, **given}, {"params": others}], foreach=given.get("foreach")),
    ):
        if "fused" in given and optimizer.param_groups[-1]["fused"] is None:
            continue  # a group that is not fused steps as others do
        found = found_optimizer(optimizer, [*decayed, *others], device)
        assert found is not None
        assert (found.beside, found.together) == beside


@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("given", [{}, {"weight_decay": 0.1}])
def test_an_adams_step_takes_as_much(given: dict[str, Any], foreach: bool) -> None:
    """Counted, and of the real step."""
    real = parameters()
    optimizer = torch.optim.Adam(real, foreach=foreach, **given)
    found = found_optimizer(optimizer, real, "cpu")
    assert found is not None
    for parameter in real:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    with PeakMeter(nn.ParameterList(real), optimizer, None) as meter:
        before = storage_bytes([*real, *(p.grad for p in real if p.grad is not None)]) + state_bytes(optimizer)
        optimizer.step()
    sizes = [parameter.numel() * 4 for parameter in real]
    expected = found.beside * (sum(sizes) if found.together else max(sizes))
    left_from_the_one_before = 4 * 4096
    assert abs(meter.peak_bytes - before - expected) <= left_from_the_one_before + 64


def test_what_is_not_known_counts_as_adamw_and_is_said() -> None:
    model, said = nn.Linear(3, 3), list[str]()
    assert kind_of(torch.optim.Adagrad(model.parameters()), model, said.append) == "adamw"
    assert said == [
        "what Adagrad keeps is not known: counted as AdamW's, two numbers for each trained one, in its dtype"
    ]
    assert kind_of(None, model, said.append) == "adamw"
    assert kind_of(torch.optim.SGD(model.parameters()), model, said.append) == Found("SGD", ())
    assert len(said) == 1


def test_none_and_the_list() -> None:
    assert make_optimizer("none", parameters()) is None
    assert get_args(Optimizer) == ("adamw", "adamw_8bit", "paged_adamw_8bit", "sgd", "none")


def test_another_like_an_object_cannot_be_made() -> None:
    kind: Any = torch.optim.SGD(parameters())
    with pytest.raises(UsageError, match="it can be one of 'adamw', 'adamw_8bit'"):
        make_optimizer(kind, parameters())


def test_without_bitsandbytes_the_real_one_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rematree.memory.optimizers.importlib.util.find_spec", lambda name: None)
    with pytest.raises(UsageError, match="optimizer 'adamw_8bit' needs bitsandbytes, which is not installed"):
        make_optimizer("adamw_8bit", parameters())
    mode, trained = fake_parameters()
    with mode:
        assert optimizer_with_state("adamw_8bit", trained) is not None  # it can still be planned for
