"""Planning for a CUDA device from a build without CUDA: the kernels it would run, and what they keep."""

import copy
import threading
from typing import Any

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from models import batch_for, build, with_lora
from rematree.errors import UsageError
from rematree.observation.absent import DeviceView
from rematree.observation.attention_kernels import choose_kernel
from rematree.observation.mode import TwinMode
from rematree.observation.observe import Twin
from rematree.planning.planner import Planner
from rematree.plans import Levers
from rematree.pricing.cost import Roofline
from rematree.referee.simulate import Referee
from rematree.regions import find_chain

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the device is here")

CUDA = torch.device("cuda", 0)
COST = Roofline(5e10, 1e10)
sdpa = torch.nn.functional.scaled_dot_product_attention


def heads(size: int = 64, *, dtype: torch.dtype = torch.bfloat16, count: int = 8, rows: int = 40) -> torch.Tensor:
    return torch.empty(2, count, rows, size, dtype=dtype, device="meta", requires_grad=True)


def test_a_device_that_is_here_is_not_taken_for_absent() -> None:
    """Planning for an H100 on a machine with another card: tensors stay on it, only the capability is another one's."""
    for absent in (True, False):
        with DeviceView(CUDA, (9, 0), absent=absent) as view:
            assert torch.cuda.get_device_capability() == (9, 0)
            told = [view._told(value) for value in (CUDA, "cuda", "cpu", torch.float16)]
        there = torch.device("meta") if absent else torch.device("cuda")
        assert [value.type for value in told[:2]] == [there.type] * 2
        assert told[2:] == [torch.device("cpu"), torch.float16]


# -- the choice -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("capability", "size", "dtype", "options", "kernel"),
    [
        ((8, 0), 64, torch.bfloat16, {"is_causal": True}, "flash"),
        ((8, 0), 64, torch.bfloat16, {"mask": True}, "efficient"),
        ((8, 0), 64, torch.float32, {"is_causal": True}, "efficient"),
        ((8, 0), 80, torch.float16, {}, "flash"),
        ((8, 0), 512, torch.bfloat16, {}, "efficient"),
        ((8, 0), 12, torch.float32, {}, "efficient"),
        ((8, 0), 10, torch.float32, {}, "math"),
        ((8, 0), 12, torch.bfloat16, {"mask": True}, "math"),
        ((8, 6), 208, torch.bfloat16, {}, "efficient"),
        ((8, 6), 256, torch.bfloat16, {}, "flash"),
        ((8, 6), 256, torch.bfloat16, {"dropout_p": 0.1}, "efficient"),
        ((9, 0), 128, torch.bfloat16, {"is_causal": True}, "cudnn"),
        ((9, 0), 128, torch.bfloat16, {"mask": True}, "cudnn"),
        ((9, 0), 128, torch.bfloat16, {"dropout_p": 0.1}, "flash"),
        ((9, 0), 256, torch.bfloat16, {}, "flash"),
        ((12, 0), 128, torch.bfloat16, {}, "flash"),
        ((7, 5), 64, torch.float16, {}, "efficient"),
        ((7, 5), 64, torch.bfloat16, {}, "math"),
        ((7, 0), 64, torch.float16, {"mask": True}, "efficient"),
        ((7, 0), 64, torch.bfloat16, {"mask": True}, "math"),
    ],
)
def test_choice(capability: Any, size: int, dtype: torch.dtype, options: dict[str, Any], kernel: str) -> None:
    q = heads(size, dtype=dtype)
    options = dict(options)
    if options.pop("mask", False):
        options["mask"] = torch.ones(2, 1, 40, 40, dtype=torch.bool, device="meta")
    assert choose_kernel(q, q, q, capability=capability, **options) == kernel


def test_grouped_heads_need_the_flag() -> None:
    q, k = heads(), heads(count=2)
    assert choose_kernel(q, k, k, enable_gqa=True) == "flash"
    assert choose_kernel(q, k, k) == "math"


@pytest.mark.parametrize(
    ("capability", "size", "dtype", "kernel"),
    [
        ((7, 5), 64, torch.float16, "math"),
        ((8, 0), 64, torch.float32, "math"),
        ((8, 0), 512, torch.bfloat16, "math"),
        ((9, 0), 128, torch.float32, "math"),
        ((9, 0), 128, torch.bfloat16, "cudnn"),
    ],
)
def test_efficient_attention_takes_no_grouped_heads(
    capability: Any, size: int, dtype: torch.dtype, kernel: str
) -> None:
    q, k = heads(size, dtype=dtype), heads(size, dtype=dtype, count=2)
    assert choose_kernel(q, k, k, is_causal=True, enable_gqa=True, capability=capability) == kernel
    equal = "efficient" if kernel == "math" else kernel
    assert choose_kernel(q, q, q, is_causal=True, enable_gqa=True, capability=capability) == equal


# -- what is kept -----------------------------------------------------------------------------------------------------


def kept_bytes(
    capability: tuple[int, int], dtype: torch.dtype, *, mask: bool = False, keys: int = 8, **options: Any
) -> int:
    """Bytes that attention over 2 x 8 heads, 40 rows, 64 wide keeps beside query, key and value."""
    mode = TwinMode(CUDA, capability)
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
        return tensor.detach()

    with mode:
        q, k, v = (
            torch.empty(2, count, 40, 64, dtype=dtype, device=CUDA, requires_grad=True) for count in (8, keys, keys)
        )
        if mask:
            options["attn_mask"] = torch.ones(2, 1, 40, 40, dtype=torch.bool, device=CUDA)
        with saved_tensors_hooks(pack, lambda tensor: tensor):
            out = sdpa(q, k, v, **options)
        assert (out.device, out.shape) == (CUDA, q.shape)
        out.sum().backward()
        assert q.grad is not None
        assert q.grad.device == CUDA
    for given in (q, k, v):
        kept.pop(given.untyped_storage()._cdata, None)
    return sum(kept.values())


HEADS, ROWS, WIDTH = 16, 40, 64


def test_flash_keeps_its_output_and_a_number_a_row() -> None:
    random_state = 2 * 8 + 8
    assert kept_bytes((8, 0), torch.bfloat16, is_causal=True) == HEADS * ROWS * (2 * WIDTH + 4) + random_state


def test_efficient_pads_the_number_a_row_to_32_rows() -> None:
    random_state = 8 + 8
    assert kept_bytes((8, 0), torch.float32, is_causal=True) == HEADS * (ROWS * 4 * WIDTH + 64 * 4) + random_state


def test_efficient_keeps_an_additive_mask_with_rows_padded_to_16() -> None:
    plain = HEADS * (ROWS * 2 * WIDTH + 64 * 4) + 16
    assert kept_bytes((8, 0), torch.bfloat16, mask=True) == plain + HEADS * ROWS * 48 * 2


def test_cudnn_keeps_its_output_and_a_number_a_row() -> None:
    assert kept_bytes((9, 0), torch.bfloat16, is_causal=True) == HEADS * ROWS * (2 * WIDTH + 4) + 8 + 8


def test_math_keeps_probabilities_in_fp32() -> None:
    scaled = 3 * HEADS * ROWS * WIDTH * 4  # query and key times the root of the scale, value in fp32
    assert kept_bytes((7, 5), torch.bfloat16) == scaled + HEADS * ROWS * ROWS * 4


def test_fp32_with_grouped_heads_keeps_probabilities_and_a_copy_of_the_keys_for_every_head() -> None:
    scaled = 3 * HEADS * ROWS * WIDTH * 4
    found = kept_bytes((8, 0), torch.float32, keys=2, is_causal=True, enable_gqa=True)
    assert found == scaled + HEADS * ROWS * ROWS * 4


# -- the rest of the device -------------------------------------------------------------------------------------------


def test_dropout_keeps_a_byte_an_element() -> None:
    kept: list[torch.Tensor] = []
    mode = TwinMode(CUDA, (8, 0))
    with mode, saved_tensors_hooks(lambda t: kept.append(t) or t.detach(), lambda t: t):
        x = torch.empty(4, 8, device=CUDA, requires_grad=True)
        torch.nn.Dropout(0.1)(x)
    assert [(t.dtype, t.shape) for t in kept] == [(torch.bool, (4, 8))]


def test_python_sees_the_device() -> None:
    with TwinMode(CUDA, (8, 0)):
        x = torch.empty(4, device=CUDA)
        assert x.is_cuda
        assert x.to(CUDA) is x
        assert x.to("cuda") is x
        assert torch.ones(4).to(x.device).device == CUDA
        assert (x.cpu().device.type, torch.zeros_like(x).device, torch.arange(3, device=CUDA).device) == (
            "cpu",
            CUDA,
            CUDA,
        )


def test_what_answers_for_the_device_is_gone_afterwards() -> None:
    def held() -> list[int]:
        functions = torch.nn.functional.dropout, torch.dropout, torch.nn.functional.scaled_dot_product_attention, sdpa
        return [id(each) for each in functions]  # the last one is the name that this module has for it

    def fail() -> None:
        with mode, mode:
            assert not {*held()} & {*before}
            raise ZeroDivisionError

    mode, before = TwinMode(CUDA, (8, 0)), held()
    with pytest.raises(ZeroDivisionError):
        fail()
    assert held() == before
    assert not {"to", "is_cuda"} & {*vars(torch.Tensor)}


def test_other_threads_do_not_see_the_device() -> None:
    seen: list[bool] = []

    def look() -> None:
        x = torch.ones(4)
        seen.append(x.is_cuda)
        try:
            seen.append(x.to("cuda").is_meta)
        except (AssertionError, RuntimeError):  # as ever
            seen.append(False)

    with TwinMode(CUDA, (8, 0)):
        thread = threading.Thread(target=look)
        thread.start()
        thread.join()
    assert seen == [False, False]


@pytest.fixture
def model() -> torch.nn.Module:
    return with_lora(build("llama", layers=6).to(torch.bfloat16))


def test_a_model_on_meta_is_the_model(model: torch.nn.Module) -> None:
    batch = batch_for(model)
    bare = copy.deepcopy(model).to("meta")
    results = []
    for each, inputs in ((model, batch), (bare, {k: v.to("meta") for k, v in batch.items()})):
        twin = Twin(each, inputs, device=CUDA)
        assert {p.device for p in twin.model.parameters()} == {CUDA}
        results.append(Referee(twin, find_chain(twin.model).blocks, COST).run(Levers()))
    assert results[0] == results[1]


def test_a_plan_for_a_device_that_is_not_here(model: torch.nn.Module) -> None:
    batch = batch_for(model, rows=256)  # above the allocator's smallest segments
    planner = Planner(model.to("meta"), batch, device=torch.device("cuda"), capability=(9, 0), cost=COST)
    least, most = planner.min_peak_bytes(), planner.plan(None).predicted_peak_bytes
    assert least < most
    plan = planner.plan(least + (most - least) // 4)
    assert plan.fingerprint.device == "cuda"
    assert plan.recomputes
    assert sum(line.num_bytes for line in plan.ledger) == plan.predicted_peak_bytes


def test_experts_ask_for_the_capability_of_a_device_that_is_not_here() -> None:
    """transformers multiplies by groups of experts where the device can; each way keeps other tensors."""
    experts = build("mixtral", layers=2).to(torch.bfloat16)
    asked = torch.cuda.get_device_capability
    planner = Planner(experts.to("meta"), batch_for(experts), device=CUDA, capability=(9, 0), cost=COST)
    plan = planner.plan(None)
    assert sum(line.num_bytes for line in plan.ledger) == plan.predicted_peak_bytes
    mode = TwinMode(CUDA, (7, 5))
    with mode, mode:
        assert torch.cuda.get_device_capability() == (7, 5)
    assert torch.cuda.get_device_capability is asked


def test_a_device_that_is_not_here_is_not_measured(model: torch.nn.Module) -> None:
    with pytest.raises(UsageError, match="no cuda device is here to measure"):
        Planner(model, batch_for(model), device=torch.device("cuda"))
