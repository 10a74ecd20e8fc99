"""State of the optimizers a plan counts with, against the real ones."""

from collections.abc import Callable
from typing import get_args

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from rematree.errors import UsageError
from rematree.measure import storage_bytes
from rematree.memory.optimizers import Optimizer, make_optimizer, optimizer_with_state

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


def test_none_and_the_list() -> None:
    assert make_optimizer("none", parameters()) is None
    assert get_args(Optimizer) == ("adamw", "adamw_8bit", "paged_adamw_8bit", "sgd", "none")


def test_without_bitsandbytes_the_real_one_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rematree.memory.optimizers.importlib.util.find_spec", lambda name: None)
    with pytest.raises(UsageError, match="optimizer 'adamw_8bit' needs bitsandbytes, which is not installed"):
        make_optimizer("adamw_8bit", parameters())
    mode, trained = fake_parameters()
    with mode:
        assert optimizer_with_state("adamw_8bit", trained) is not None  # it can still be planned for
