"""FLOPs and bytes of ops, exact integers on known shapes."""

from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from rematree.pricing.roofline import Rates, Roofline
from rematree.pricing.workload import Kind, Work, attention_flops, grouped_matmul_flops, work_of

aten = torch.ops.aten


def work(func: Any, *args: Any, **kwargs: Any) -> Work:
    out = func(*args, **kwargs)
    outputs = [t for t in (out if isinstance(out, tuple | list) else [out]) if isinstance(t, torch.Tensor)]
    return work_of(func, args, kwargs, outputs)


def test_matmul() -> None:
    found = work(aten.mm.default, torch.ones(256, 512).bfloat16(), torch.ones(512, 128).bfloat16())
    assert found == Work(Kind.MATMUL, 2 * 256 * 512 * 128, torch.bfloat16, 2 * (256 * 512 + 512 * 128 + 256 * 128))
    low_rank = work(aten.mm.default, torch.ones(256, 512), torch.ones(512, 16))
    assert (low_rank.kind, low_rank.flops) == (Kind.SMALL_MATMUL, 2 * 256 * 512 * 16)


def test_causal_attention_skips_half_of_the_scores() -> None:
    shape = (2, 3, 8, 16)
    assert attention_flops(shape, shape, shape, causal=False) == 2 * 2 * 3 * 8 * 8 * (16 + 16)
    assert attention_flops(shape, shape, shape, causal=True) == 2 * 2 * 3 * (8 * 9 // 2) * (16 + 16)
    # rows that see more keys than there are: 4 rows grow, 4 rows see all 4
    assert attention_flops(shape, (2, 3, 4, 16), (2, 3, 4, 16), causal=True) == 2 * 2 * 3 * (10 + 16) * 32
    # fewer rows than keys, aligned to the first key as torch does
    assert attention_flops((1, 1, 2, 4), (1, 1, 8, 4), (1, 1, 8, 4), causal=True) == 2 * 3 * 8


def test_flash_backward_computes_the_scores_again() -> None:
    query, value = (1, 2, 8, 16), (1, 2, 8, 4)
    forward = attention_flops(query, query, value, causal=False)
    backward = attention_flops(query, query, value, causal=False, backward=True)
    assert forward == 2 * 2 * 64 * (16 + 4)
    assert backward == 2 * 2 * 64 * (3 * 16 + 2 * 4)


@pytest.mark.parametrize("causal", [False, True])
def test_attention_on_a_cpu(causal: bool) -> None:
    q = torch.ones(1, 2, 128, 32)
    flash = aten._scaled_dot_product_flash_attention_for_cpu.default
    forward = work(flash, q, q, q, 0.0, causal)
    pairs = 128 * 129 // 2 if causal else 128 * 128
    assert (forward.kind, forward.flops) == (Kind.ATTENTION, 2 * 2 * pairs * 64)
    out, scores = flash(q, q, q, 0.0, causal)
    back = aten._scaled_dot_product_flash_attention_for_cpu_backward.default
    backward = work(back, torch.ones_like(out), q, q, q, out, scores, 0.0, causal)
    assert (backward.kind, backward.flops) == (Kind.ATTENTION_BACKWARD, 5 * 2 * 2 * pairs * 32)


@pytest.mark.parametrize("name", ["_scaled_dot_product_flash_attention", "_scaled_dot_product_efficient_attention"])
def test_attention_of_a_gpu_that_is_not_here(name: str) -> None:
    func = getattr(aten, name).default
    with FakeTensorMode():
        q = torch.empty(1, 4, 64, 32, dtype=torch.bfloat16, device="cuda")
        bias = (None, True) if "efficient" in name else ()
        found = work(func, q, q, q, *bias, 0.0, True)
    assert (found.kind, found.flops, found.dtype) == (Kind.ATTENTION, 2 * 4 * 2080 * 64, torch.bfloat16)


def test_flat_attention_takes_rows_before_heads() -> None:
    with FakeTensorMode():
        q = torch.empty(1, 64, 4, 32, dtype=torch.bfloat16, device="cuda")
        args = (q, q, q, None, None, 64, 64, 0.0, False, False)
        found = work(aten._flash_attention_forward.default, *args)
    assert found.flops == 2 * 4 * 64 * 64 * 64


def test_grouped_matmul_is_one_matmul_over_all_rows() -> None:
    assert grouped_matmul_flops((96, 32), (8, 32, 64)) == 2 * 96 * 32 * 64  # rows sorted by expert
    assert grouped_matmul_flops((32, 96), (96, 64)) == 2 * 32 * 96 * 64  # gradient of the weights: groups of columns
    assert grouped_matmul_flops((8, 12, 32), (8, 32, 64)) == 2 * 8 * 12 * 32 * 64
    rows, weight = torch.ones(32, 16).bfloat16(), torch.ones(2, 16, 8).bfloat16()
    offsets = torch.tensor([16, 32], dtype=torch.int32)
    assert work(aten._grouped_mm.default, rows, weight, offsets).flops == 2 * 32 * 16 * 8


def test_a_gather_reads_the_rows_asked_for() -> None:
    table, index = torch.ones(1000, 64), torch.zeros(10, dtype=torch.int64)
    found = work(aten.embedding.default, table, index)
    assert found == Work(Kind.GATHER, 0, torch.float32, 2 * 10 * 64 * 4 + 10 * 8)
    grad = torch.ones(10, 64)
    back = work(aten.embedding_dense_backward.default, grad, index, 1000, -1, False)
    assert back.moved_bytes == 1000 * 64 * 4 + 2 * (10 * 64 * 4 + 10 * 8)


def test_elementwise_ops_read_and_write() -> None:
    x = torch.ones(100)
    assert work(aten.add.Tensor, x, x) == Work(Kind.ELEMENTWISE, 0, torch.float32, 3 * 400)
    assert work(aten.add_.Tensor, x, x) == Work(Kind.ELEMENTWISE, 0, torch.float32, 3 * 400)


def test_an_optimizer_reads_four_tensors_and_writes_three() -> None:
    each = [[torch.ones(50)] for _ in range(4)]
    step = [torch.ones(())]
    numbers: dict[str, Any] = {"lr": 0.1, "beta1": 0.9, "beta2": 0.99, "weight_decay": 0.0, "eps": 1e-8}
    numbers |= {"amsgrad": False, "maximize": False}
    func = aten._fused_adamw_.default
    func(*each, [], step, **numbers)
    found = work_of(func, (*each, [], step), numbers, [])
    # torch's schema says that the gradient is written too (it is, when it is unscaled in place)
    assert found == Work(Kind.OPTIMIZER, 0, torch.float32, (4 + 4) * 200 + 4)


def test_packed_matmul() -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    del bitsandbytes
    with FakeTensorMode():
        x = torch.empty(2, 128, 256, dtype=torch.bfloat16)
        packed = torch.empty(512 * 256 // 2, 1, dtype=torch.uint8)
        scales = torch.empty(512 * 256 // 64)
        found = work(torch.ops.bitsandbytes.gemm_4bit.default, x, packed, [512, 256], scales, 64, "nf4")
        unpacked = 512 * 256 * 2 + 512 * 256 // 64 * 4
        small = work(torch.ops.bitsandbytes.gemm_4bit.default, x[:, :8], packed, [512, 256], scales, 64, "nf4")
        a, b = torch.empty(64, 128, dtype=torch.int8), torch.empty(256, 128, dtype=torch.int8)
        int8 = work(torch.ops.bitsandbytes.int8_linear_matmul.default, a, b)
        flat = work(torch.ops.bitsandbytes.dequantize_4bit.default, packed, scales, 64, "nf4", [512, 256], x.dtype)
    assert (found.kind, found.flops, found.hidden_bytes) == (Kind.MATMUL, 2 * 256 * 256 * 512, unpacked)
    assert found.moved_bytes == 2 * 128 * 256 * 2 + 512 * 128 + 512 * 4 * 4 + 2 * 128 * 512 * 2 + 2 * unpacked
    assert small.kind is Kind.SMALL_MATMUL
    assert (int8.flops, int8.dtype) == (2 * 64 * 128 * 256, torch.int8)
    assert flat == Work(Kind.DEQUANTISE, 0, torch.float32, 512 * 128 + 512 * 4 * 4 + 512 * 256 * 2)


def test_the_peak_is_that_of_the_dtype() -> None:
    rates = Rates({"bf16": 4e12, "tf32": 2e12, "fp32": 1e12}, 1e12)
    assert rates.peak(torch.bfloat16) == 4e12
    assert rates.peak(torch.float32) == 1e12
    assert rates.peak(torch.float16) == 1e12
    assert Rates({"bf16": 4e12, "tf32": 2e12, "fp32": 1e12}, 1e12, tf32=True).peak(torch.float32) == 2e12


def test_seconds_at_the_stated_efficiencies() -> None:
    rates = Rates(
        {"bf16": 1e12, "fp32": 1e11},
        1e9,
        {Kind.MATMUL: 0.5, Kind.ELEMENTWISE: 0.25, Kind.GATHER: 0.125},
        launch_seconds=1e-6,
        overlaps=True,
    )
    assert rates.seconds(Work(Kind.MATMUL, 10**12, torch.bfloat16, 0)) == 2.0
    assert rates.seconds(Work(Kind.MATMUL, 10**12, torch.float32, 0)) == 20.0
    assert rates.seconds(Work(Kind.MATMUL, 1, torch.bfloat16, 10**9)) == 4.0  # bound by what it streams
    assert rates.seconds(Work(Kind.ELEMENTWISE, 0, torch.bfloat16, 10**9)) == 4.0
    assert rates.seconds(Work(Kind.GATHER, 0, torch.bfloat16, 10**9)) == 8.0
    assert rates.seconds(Work(Kind.ELEMENTWISE, 0, torch.bfloat16, 1)) == 1e-6  # bound by its launch


def test_a_roofline_of_two_numbers_adds_the_launch() -> None:
    x = torch.ones(250)
    price = Roofline(1e12, 1e9, efficiency=0.5).price(aten.add.Tensor, (x, x), {}, [x])
    assert price.seconds == pytest.approx(3000 / 0.5e9 + 5e-6)
    assert price.workspace_bytes == 1000
