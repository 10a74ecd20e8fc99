"""Chunked loss against the plain head: same loss, same gradients up to rounding, and no [tokens, vocabulary] tensor.

Measured on CPU, torch 2.13, one thread, chunks of 7 rows of 46 (see `TOLERANCE`): with a mean the loss is bit-equal and
so is the gradient of the hidden states and of every parameter below the head; only parameters of the head differ,
because their gradient is a sum over chunks. When the model divides a sum by `num_items_in_batch`, the loss is bit-equal
but the division reaches the gradient behind the head instead of before it: one more rounding everywhere.
"""

import contextlib
import copy
import gc
import math
import warnings
from collections.abc import Callable, Generator, Iterator
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, reject, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from transformers.modeling_outputs import BaseModelOutputWithPast

from rematree.errors import RecomputeMismatchError, UnsupportedModelError, UsageError, VerificationError
from rematree.execute.loss.attach import attach_chunked_loss
from rematree.execute.loss.chunked import chunked_loss
from rematree.execute.loss.deferred import DeferredLogits
from rematree.execute.loss.head import find_head
from rematree.execute.loss.row_loss import RowLoss, tile_losses
from rematree.measure import PeakMeter

V = 199
# Largest difference relative to the largest gradient. Measured over all models below: 2.1e-7 (mean) and 1.7e-6 (sum) in
# fp32, 4.9e-3 and 2.3e-2 in bf16, whose unit in the last place is 7.8e-3. About three times that is allowed.
TOLERANCE = {
    (torch.float32, "mean"): 7e-7,
    (torch.float32, "num_items"): 5e-6,
    (torch.bfloat16, "mean"): 1.6e-2,
    (torch.bfloat16, "num_items"): 7e-2,
}
SHAPE: dict[str, Any] = {
    "vocab_size": V,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def llama(**options: Any) -> Any:
    sizes: dict[str, Any] = {**SHAPE, "tie_word_embeddings": False, **options}
    config = transformers.LlamaConfig(**sizes)
    return transformers.LlamaForCausalLM(config)


def gpt2() -> Any:
    sizes: dict[str, Any] = {"vocab_size": V, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
    no_dropout: dict[str, Any] = {"resid_pdrop": 0.0, "attn_pdrop": 0.0, "embd_pdrop": 0.0, "loss_type": "ForCausalLM"}
    config = transformers.GPT2Config(**sizes, **no_dropout, bos_token_id=1, eos_token_id=2)
    return transformers.GPT2LMHeadModel(config)


def peft_llama(**options: Any) -> Any:
    import peft

    defaults: dict[str, Any] = {"r": 4, "target_modules": ["q_proj", "lm_head"], "init_lora_weights": False}
    config = peft.LoraConfig(**{**defaults, **options})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PEFT reads a deprecated property of transformers
        return peft.get_peft_model(llama(), config)


MODELS: dict[str, Callable[[], Any]] = {
    "llama": llama,
    "llama-tied": lambda: llama(tie_word_embeddings=True),
    "gemma2": lambda: transformers.Gemma2ForCausalLM(
        transformers.Gemma2Config(**SHAPE, head_dim=8, final_logit_softcapping=3.0)
    ),
    "gemma3": lambda: transformers.Gemma3ForCausalLM(
        transformers.Gemma3TextConfig(**SHAPE, head_dim=8, final_logit_softcapping=3.0)
    ),
    "granite": lambda: transformers.GraniteForCausalLM(transformers.GraniteConfig(**SHAPE, logits_scaling=3.0)),
    "cohere": lambda: transformers.CohereForCausalLM(transformers.CohereConfig(**SHAPE, logit_scale=0.3)),
    "gpt2": gpt2,
    "qwen3": lambda: transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**SHAPE, head_dim=8)),
    "lora-head": peft_llama,
    "lora-frozen-head": lambda: peft_llama(target_modules=["q_proj"]),
    "modules-to-save": lambda: peft_llama(target_modules=["q_proj"], modules_to_save=["lm_head"]),
}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(before)


def make(name: str, dtype: torch.dtype = torch.float32) -> Any:
    model = MODELS[name]().to(dtype).train()
    for param in model.parameters():
        if param.ndim > 1:
            nn.init.normal_(param, std=0.2)  # logits far from uniform, or soft-capping would not show
    return model


def make_batch(num_ignored: int = 9) -> dict[str, Any]:
    ids = torch.randint(3, V, (2, 23))
    labels = ids.clone()
    labels[0, :num_ignored] = -100
    return {"input_ids": ids, "labels": labels}


def step(model: Any, **batch: Any) -> tuple[Tensor, dict[str, Tensor], Any]:
    model.zero_grad()
    outputs = model(**batch)
    outputs.loss.backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return outputs.loss.detach(), grads, outputs


def worst(plain: dict[str, Tensor], chunked: dict[str, Tensor]) -> float:
    """Largest difference of any gradient, relative to its largest entry."""
    assert plain.keys() == chunked.keys()
    return max(float((plain[n] - chunked[n]).abs().max() / plain[n].abs().max().clamp(min=1e-30)) for n in plain)


class Shapes(TorchDispatchMode):
    """Records the largest result of any operation, in elements."""

    largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_iter(result) if isinstance(leaf, Tensor)]
        self.largest = max(self.largest, *sizes, 0)
        return result


@pytest.mark.parametrize("normalise", ["mean", "num_items"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", MODELS)
def test_loss_and_gradients_match_the_plain_head(name: str, dtype: torch.dtype, normalise: str) -> None:
    model, batch = make(name, dtype), make_batch()
    if normalise == "num_items":
        batch["num_items_in_batch"] = torch.tensor(37)
    loss, grads, outputs = step(model, **batch)
    handle = attach_chunked_loss(model, rows=7)
    chunked_loss, chunked_grads, chunked_outputs = step(model, **batch)
    assert handle.effective
    assert torch.equal(loss, chunked_loss)
    assert worst(grads, chunked_grads) <= TOLERANCE[dtype, normalise]
    if normalise == "mean":
        found = find_head(model)
        assert found is not None
        head_ids = {id(p) for p in found[1].parameters()}
        below = [n for n, p in model.named_parameters() if id(p) not in head_ids and n in grads]
        assert below
        assert all(torch.equal(grads[n], chunked_grads[n]) for n in below)
    assert isinstance(chunked_outputs.logits, DeferredLogits)
    assert chunked_outputs.logits.shape == outputs.logits.shape
    assert chunked_outputs.logits.dtype == outputs.logits.dtype
    assert torch.equal(chunked_outputs.logits, outputs.logits)


@pytest.mark.parametrize("rows", [1, 23, 45, 46, 1000])
def test_any_number_of_rows(rows: int) -> None:
    model, batch = make("gemma2"), make_batch()
    loss, grads, _ = step(model, **batch)
    attach_chunked_loss(model, rows)
    chunked_loss, chunked_grads, _ = step(model, **batch)
    # One row goes through a matrix-vector product, which adds in another order: a few units in the last place.
    assert math.isclose(float(loss), float(chunked_loss), rel_tol=0 if rows > 1 else 1e-6)
    assert worst(grads, chunked_grads) <= 2e-6


def test_a_single_chunk_is_bit_equal() -> None:
    model, batch = make("llama-tied"), make_batch()
    _, grads, _ = step(model, **batch)
    attach_chunked_loss(model, 46)
    _, chunked_grads, _ = step(model, **batch)
    assert worst(grads, chunked_grads) == 0.0


@pytest.mark.parametrize("name", ["llama", "gemma2", "lora-head"])
def test_a_chunk_in_tiles_has_the_same_bits_and_only_a_tile_of_it_is_in_fp32(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Wide(TorchDispatchMode):
        largest = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            wide = [x for x in tree_iter(result) if isinstance(x, Tensor) and x.dtype == torch.float32]
            self.largest = max(self.largest, *(x.numel() for x in wide if x.shape[-1:] == (V,)), 0)
            return result

    model, batch = make(name, torch.bfloat16), make_batch()
    found: list[tuple[Tensor, dict[str, Tensor]]] = []
    for tile in (1000, 3):
        monkeypatch.setattr("rematree.execute.loss.row_loss._TILE_BYTES", {"cpu": 4 * V * tile})
        handle = attach_chunked_loss(model, 16, check=False)
        with Wide() as seen:
            loss, grads, _ = step(model, **batch)
        handle.remove()
        found.append((loss, grads))
        assert seen.largest == V * min(tile, 16)
    (loss, grads), (tiled_loss, tiled_grads) = found
    assert torch.equal(loss, tiled_loss)
    assert all(torch.equal(grads[n], tiled_grads[n]) for n in grads)


@pytest.mark.parametrize(("kind", "blocks"), [("product", 1), ("view of one", 1), ("read by its derivative", 4)])
def test_the_gradient_of_a_product_takes_the_place_of_its_logits(kind: str, blocks: int) -> None:
    class Blocks(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.made: dict[int, Tensor] = {}

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            whole = [x for x in tree_iter(result) if isinstance(x, Tensor) and x.numel() == 16 * V]
            self.made |= {x.untyped_storage().data_ptr(): x for x in whole}  # held, so that no address is used twice
            return result

    torch.manual_seed(0)
    weight, target = torch.randn(V, 32), torch.randint(V, (16,))
    hidden = torch.randn(16, 32, requires_grad=True)

    def head(rows: Tensor) -> Tensor:
        logits = (
            torch.nn.functional.linear(rows[None], weight).view(-1, V) if kind == "view of one" else rows @ weight.t()
        )
        return logits.tanh() if kind == "read by its derivative" else logits

    (expected,) = torch.autograd.grad(torch.nn.functional.cross_entropy(head(hidden), target), hidden)
    job = RowLoss(head, lambda logits: logits, (), target, None, -100, "mean", 0.0, rows=16, scale_late=False)
    with pytest.MonkeyPatch.context() as patch, Blocks() as seen:
        patch.setattr("rematree.execute.loss.row_loss._TILE_BYTES", {"cpu": 4 * V * 3})
        loss = chunked_loss(job, hidden)
    assert len(seen.made) == blocks  # with tanh: the product, the logits, and the gradient of each
    assert torch.equal(torch.autograd.grad(loss, hidden)[0], expected)


FINISHES: dict[str, Callable[[Tensor], Tensor]] = {
    "nothing": lambda logits: logits,
    "cast": lambda logits: logits.float(),
    "capped": lambda logits: (logits.float() / 3).tanh() * 3,
    "cast twice": lambda logits: logits.half().float(),
}


@pytest.mark.parametrize("finish", FINISHES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_tile_has_the_bits_of_cross_entropy_and_its_graph(finish: str, dtype: torch.dtype) -> None:
    """The kernels are called without autograd; with one ulp of difference in exp, one element in ten would differ."""
    target = torch.randint(V, (37,))
    target[::5] = -100
    weight = torch.rand(V) + 0.1
    if finish == "nothing":
        weight = weight.to(dtype)
    for own_weight, smoothing in ((None, 0.0), (weight, 0.0), (None, 0.1)):
        # rows apart in memory, as those of a padded vocabulary are
        raw = (torch.randn(37, V + 3) * 4).to(dtype)[:, :V].requires_grad_()
        job = RowLoss(
            lambda rows: rows, FINISHES[finish], (), target, own_weight, -100, "mean", smoothing, 37, scale_late=False
        )
        losses = job.losses(job.finish(raw), target)
        seed = torch.tensor(1 / 30, dtype=losses.dtype)
        (expected,) = torch.autograd.grad(losses, raw, seed.expand(37))
        into = torch.empty_like(raw)
        mine = tile_losses(job, raw.detach(), target, lambda _, seed=seed: seed, into)
        assert torch.equal(mine, losses.detach())
        assert torch.equal(into, expected)
        assert torch.equal(tile_losses(job, raw.detach(), target, lambda _, seed=seed: seed, None), losses.detach())


def test_all_labels_ignored_is_as_plain() -> None:
    model, batch = make("llama"), make_batch()
    batch["labels"] = torch.full_like(batch["labels"], -100)
    loss, grads, _ = step(model, **batch)
    handle = attach_chunked_loss(model, 7)
    chunked_loss, chunked_grads, _ = step(model, **batch)
    assert handle.effective
    assert loss.isnan()
    assert chunked_loss.isnan()
    assert all(torch.equal(grads[n], chunked_grads[n]) for n in grads)
    zero_loss, zero_grads, _ = step(model, **batch, num_items_in_batch=5)
    assert float(zero_loss) == 0.0
    assert all(not grad.any() for grad in zero_grads.values())


def test_all_labels_ignored_gives_no_gradient_in_fp16_either() -> None:
    """1/N is taken in backward there, of a gradient that is 0."""
    model, batch = make("llama", torch.float16), make_batch()
    batch["labels"] = torch.full_like(batch["labels"], -100)
    _, grads, _ = step(model, **batch)
    handle = attach_chunked_loss(model, 7)
    _, chunked_grads, _ = step(model, **batch)
    assert handle.effective
    assert all(not grad.any() for grad in grads.values())
    assert all(torch.equal(grads[n], chunked_grads[n]) for n in grads)


def test_shift_labels_are_honoured() -> None:
    model, batch = make("llama"), make_batch()
    shifted = torch.randint(3, V, (2, 23))
    plain_default, _, _ = step(model, **batch)
    loss, grads, _ = step(model, **batch, shift_labels=shifted)
    attach_chunked_loss(model, 7)
    chunked_loss, chunked_grads, _ = step(model, **batch, shift_labels=shifted)
    assert torch.equal(loss, chunked_loss)
    assert not torch.equal(loss, plain_default)
    assert worst(grads, chunked_grads) <= TOLERANCE[torch.float32, "mean"]


def test_transparent_without_labels_in_eval_and_without_grad() -> None:
    model, batch = make("llama"), make_batch()
    attach_chunked_loss(model, 7)
    assert type(model(input_ids=batch["input_ids"]).logits) is Tensor
    with torch.no_grad():
        assert type(model(**batch).logits) is Tensor
    assert isinstance(model(**batch).logits, DeferredLogits)
    model.eval()
    assert type(model(**batch).logits) is Tensor


def test_positional_labels_arm() -> None:
    model, batch = make("llama"), make_batch()
    handle = attach_chunked_loss(model, 7)
    model(batch["input_ids"], None, None, None, None, batch["labels"])
    assert handle.effective


def test_remove_restores_exactly() -> None:
    model, batch = make("llama"), make_batch()
    before = [dict(module.__dict__) for module in model.modules()]
    handle = attach_chunked_loss(model, 7)
    assert "forward" in model.__dict__
    assert "forward" in model.lm_head.__dict__
    model(**batch).loss.backward()
    handle.remove()
    handle.remove()
    assert [module.__dict__.keys() for module in model.modules()] == [old.keys() for old in before]
    assert type(model(**batch).logits) is Tensor


def test_attaching_twice_is_refused() -> None:
    model = make("lora-head")
    handle = attach_chunked_loss(model, 11)
    with pytest.raises(UsageError, match="LlamaForCausalLM has a chunked loss already"):
        attach_chunked_loss(model, 7)
    handle.remove()
    attach_chunked_loss(model, 7).remove()
    assert not any("forward" in module.__dict__ for module in model.modules())


def test_usable_after_an_exception() -> None:
    model, batch = make("llama"), make_batch()
    attach_chunked_loss(model, 7)
    with pytest.raises(IndexError, match="out of bounds"):
        model(input_ids=batch["input_ids"], labels=batch["labels"] + V)
    assert type(model(input_ids=batch["input_ids"]).logits) is Tensor
    assert isinstance(model(**batch).logits, DeferredLogits)


def test_deepcopy_works_on_its_own() -> None:
    model, batch = make("lora-head"), make_batch()
    loss, grads, _ = step(model, **batch)
    handle = attach_chunked_loss(model, 7)
    twin = copy.deepcopy(model)
    handle.remove()
    with torch.no_grad():
        for param in model.parameters():
            param.zero_()  # a copy that still reached into the original would show now
    chunked_loss, chunked_grads, outputs = step(twin, **batch)
    assert isinstance(outputs.logits, DeferredLogits)
    assert torch.equal(loss, chunked_loss)
    assert worst(grads, chunked_grads) <= TOLERANCE[torch.float32, "mean"]


@pytest.mark.parametrize("fake", [False, True], ids=["real", "fake"])
@pytest.mark.parametrize("name", ["llama", "llama-tied", "gemma2", "granite", "lora-head"])
def test_no_operation_returns_as_much_as_the_logits(name: str, fake: bool) -> None:
    batch_rows, tokens = 5, 40
    logits_elements = batch_rows * tokens * V
    model = make(name)
    with FakeTensorMode() if fake else contextlib.nullcontext() as mode:
        if mode is not None:
            tensors = [*model.parameters(), *model.buffers()]
            model = copy.deepcopy(model, {id(tensor): mode.from_tensor(tensor) for tensor in tensors})
        ids = torch.zeros(batch_rows, tokens, dtype=torch.long)
        with Shapes() as plain:
            model(input_ids=ids, labels=ids).loss.backward()
        handle = attach_chunked_loss(model, 16, check=not fake)
        with Shapes() as chunked:
            model(input_ids=ids, labels=ids).loss.backward()
    assert handle.effective
    assert plain.largest >= logits_elements
    assert chunked.largest < logits_elements  # the attention scores, B * 4 heads * T * T, are a little smaller


@pytest.mark.parametrize(
    ("rows", "bias", "forward", "backward"),
    [
        # Several chunks: the sum, which is twice the gradient, an eighth of a chunk's gradient, and a chunk's logits;
        # the whole gradient of a chunk where the head is more than a product. Then the gradient beside the sum.
        (8, False, 2.75, 3.25),
        (8, True, 3.75, 3.25),
        # One chunk: its gradient and the copy of it that is scaled in place, which autograd, too, copies.
        (32, False, 2.25, 2.25),
    ],
)
def test_the_heads_gradient_is_summed_in_fp32_without_a_wide_copy_of_what_is_added(
    rows: int, bias: bool, forward: float, backward: float
) -> None:
    torch.manual_seed(0)
    head = nn.Linear(64, 16384, bias=bias, dtype=torch.bfloat16)
    params = tuple(head.parameters())
    hidden = torch.randn(32, 64, dtype=torch.bfloat16, requires_grad=True)
    target = torch.randint(16384, (32,))
    job = RowLoss(head, lambda logits: logits, params, target, None, -100, "mean", 0.0, rows, scale_late=False)
    with PeakMeter(head) as meter:
        loss = chunked_loss(job, hidden)
    assert meter.peak_bytes - meter.start_bytes < forward * head.weight.nbytes
    sums = meter.end_bytes - meter.start_bytes
    with PeakMeter(head) as meter:
        loss.backward()
    assert sums + meter.peak_bytes - meter.start_bytes < backward * head.weight.nbytes
    doubled = nn.Linear(64, 16384, bias=bias, dtype=torch.float64)
    doubled.load_state_dict(head.state_dict())
    F.cross_entropy(doubled(hidden.detach().double()), target).backward()
    assert head.weight.grad is not None
    assert doubled.weight.grad is not None
    off = (head.weight.grad.double() - doubled.weight.grad).norm() / doubled.weight.grad.norm()
    assert off < 4e-3  # two roundings to 16 bit, of the logits' gradient and of the sum


def test_profiler_sees_no_block_of_logits_size() -> None:
    model, batch = make("lora-frozen-head"), make_batch()
    logits_bytes = 46 * V * 4

    def largest_block() -> int:
        with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            model(**batch).loss.backward()
        trace: Any = profile.profiler
        events = trace.kineto_results.events()
        return max(event.nbytes() for event in events if event.name() == "[memory]")

    plain = largest_block()
    attach_chunked_loss(model, 7)
    model(**batch).loss.backward()  # the first armed call also runs the self-check
    assert plain >= logits_bytes
    assert largest_block() < logits_bytes


def test_outer_saved_tensor_hooks_do_not_see_chunks() -> None:
    model, batch = make("llama"), make_batch()
    attach_chunked_loss(model, 7, check=False)
    packed: list[torch.Size] = []

    def pack(tensor: Tensor) -> Tensor:
        packed.append(tensor.shape)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(**batch).loss
    assert packed
    assert not [shape for shape in packed if shape and shape[-1] == V]
    loss.backward()


def test_backward_twice() -> None:
    model, batch = make("llama"), make_batch()
    attach_chunked_loss(model, 7)
    loss = model(**batch).loss
    loss.backward(retain_graph=True)
    once = {n: p.grad.clone() for n, p in model.named_parameters()}
    (loss * 2).backward()
    assert all(torch.allclose(p.grad, 3 * once[n], rtol=1e-5) for n, p in model.named_parameters())
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_autocast_matches_plain() -> None:
    # fp32 master weights, bf16 products: the weight is cast once and its gradient comes back in fp32, so head
    # parameters are summed more exactly than plain does; 3 bf16 units at most.
    for name in ("llama-tied", "lora-head"):
        model, batch = make(name), make_batch()

        def run(model: Any = model, batch: dict[str, Any] = batch) -> tuple[Tensor, dict[str, Tensor], Any]:
            model.zero_grad()
            with torch.autocast("cpu", dtype=torch.bfloat16):
                outputs = model(**batch)
            outputs.loss.backward()
            grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
            return outputs.loss.detach(), grads, outputs

        loss, grads, outputs = run()
        handle = attach_chunked_loss(model, 7)
        chunked_loss, chunked_grads, chunked_outputs = run()
        assert handle.effective
        assert torch.equal(loss, chunked_loss)
        assert worst(grads, chunked_grads) <= 3 * 2**-7
        assert chunked_outputs.logits.dtype == torch.bfloat16
        assert torch.equal(chunked_outputs.logits, outputs.logits)  # read outside autocast, computed as inside


def test_gradient_of_a_head_that_leaves_autocast_is_not_cast() -> None:
    class Exact(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            with torch.autocast("cpu", enabled=False):
                return super().forward(input.float())

    model, batch = make("llama"), make_batch()
    model.lm_head = Exact(32, V, bias=False)

    def gradient() -> Tensor:
        model.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(**batch).loss
        loss.backward()
        return model.lm_head.weight.grad

    plain = gradient()
    attach_chunked_loss(model, 7)
    assert worst({"weight": plain}, {"weight": gradient()}) <= TOLERANCE[torch.float32, "mean"]


def test_fp16_gradients_do_not_underflow() -> None:
    """1/N times a probability is below the smallest fp16 number: 1e-6 / 4096 is 2.4e-10."""
    model = make("llama").to(torch.float16)
    for param in model.lm_head.parameters():
        nn.init.normal_(param, std=0.01)
    hidden = torch.randn(1, 4097, 32, dtype=torch.float16)
    model.model.forward = lambda **_: BaseModelOutputWithPast(last_hidden_state=hidden)
    labels = torch.randint(3, V, (1, 4097))
    hidden.requires_grad_()

    def gradient(scale: float) -> Tensor:
        hidden.grad = None
        (model(input_ids=labels, labels=labels).loss * scale).backward()
        assert hidden.grad is not None
        return hidden.grad / scale

    exact = F.cross_entropy(
        (exact_hidden := hidden.detach().double().requires_grad_())[0, :-1] @ model.lm_head.weight.double().T,
        labels[0, 1:],
    )
    (exact_grad,) = torch.autograd.grad(exact, exact_hidden)
    attach_chunked_loss(model, 512)
    error = (gradient(65536.0).double() - exact_grad).abs().max() / exact_grad.abs().max()
    assert error < 4e-3  # four units in the last place of fp16


@pytest.mark.parametrize("access", ["softmax", "argmax", "slice", "write", "cat", "repr", "detach"])
def test_logits_can_be_used_like_any_tensor(access: str) -> None:
    model, batch = make("gemma2"), make_batch()
    _, _, plain = step(model, **batch)
    attach_chunked_loss(model, 7)
    outputs = model(**batch)
    uses: dict[str, Callable[[Tensor], Any]] = {
        "softmax": lambda logits: logits.float().softmax(-1),
        "argmax": lambda logits: logits.argmax(-1),
        "slice": lambda logits: logits[0, 3:9, 5],
        "cat": lambda logits: torch.cat([logits, logits], dim=1),
        "repr": repr,
        "detach": lambda logits: logits.detach() + torch.ones(V),
        "write": lambda logits: logits.view(-1, V).mul_(2.0)[3:5].fill_(1.0) is not None and logits.clone(),
    }
    if access == "repr":
        assert uses[access](outputs.logits.detach()) == repr(plain.logits.detach())
    else:
        logits = plain.logits.clone() if access == "write" else plain.logits
        assert torch.equal(uses[access](outputs.logits), uses[access](logits))


def test_the_bits_of_the_logits_can_be_read() -> None:
    model, batch = make("llama", torch.bfloat16), make_batch()
    _, _, plain = step(model, **batch)
    attach_chunked_loss(model, 7)
    logits = model(**batch).logits
    assert torch.equal(logits.view(torch.int16), plain.logits.view(torch.int16))
    assert isinstance(logits, DeferredLogits)


KEPT = 150  # classes that are not padding of the vocabulary


MASKS: dict[str, Callable[[Tensor], object]] = {
    "data": lambda logits: logits.data[..., KEPT:].fill_(-1e4),
    "detach": lambda logits: logits.detach()[..., KEPT:].fill_(-1e4),
    "narrow": lambda logits: logits.narrow(-1, KEPT, V - KEPT).fill_(-1e4),
    "slice": lambda logits: logits[..., KEPT:].fill_(-1e4),
    "unbind": lambda logits: logits.unbind(-1)[KEPT].detach().fill_(-1e4),
}


def plain_and_real(model: Any, batch: dict[str, Any]) -> tuple[Any, Any]:
    """Outputs without a chunked loss and with one that had to make the logits: the same loss and gradients."""
    loss, grads, plain = step(model, **batch)
    handle = attach_chunked_loss(model, 7, check=False)
    real_loss, real_grads, outputs = step(model, **batch)
    assert handle.effective is False
    assert torch.equal(loss, real_loss)
    assert worst(grads, real_grads) == 0.0
    return plain, outputs


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("part", [False, True], ids=["all-rows", "some-rows"])
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad], ids=["grad", "no-grad"])
def test_what_is_written_to_a_view_of_the_logits_is_in_their_loss(
    mode: Callable[[], contextlib.AbstractContextManager[None]], part: bool, mask: Callable[[Tensor], object]
) -> None:
    """As where a model hides the padding of its vocabulary: the logits are real from then on."""

    def masked(logits: Tensor, labels: Tensor, **_: Any) -> Tensor:
        shifted = logits[:, :-1]
        with mode():
            mask(shifted if part else logits)
        return F.cross_entropy(shifted.reshape(-1, V), labels[:, 1:].reshape(-1) % KEPT)

    model, batch = make("llama"), make_batch(num_ignored=0)
    model.loss_function = masked
    _, outputs = plain_and_real(model, batch)
    assert bool((outputs.logits[:, :-1, KEPT] == -1e4).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_what_a_hook_of_the_head_writes_is_in_the_loss(dtype: torch.dtype) -> None:
    def hide(*args: Any) -> None:
        with torch.no_grad():
            args[-1][..., KEPT:].fill_(-1e4)

    model, batch = make("llama", dtype), make_batch()
    batch["labels"].clamp_(max=KEPT - 1)
    model.lm_head.register_forward_hook(hide)
    plain, outputs = plain_and_real(model, batch)
    assert torch.equal(outputs.logits, plain.logits)


def test_gradient_through_read_logits() -> None:
    """A further loss on the logits reaches all parameters, also when a custom autograd function takes them raw."""

    class Square(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, logits: Tensor) -> Tensor:
            ctx.save_for_backward(logits)
            return (logits * logits).sum()

        @staticmethod
        def backward(ctx: Any, *grad_outputs: Tensor) -> Tensor:
            return 2 * grad_outputs[0] * ctx.saved_tensors[0]

    model, batch = make("lora-head"), make_batch()

    def grads(extra: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        model.zero_grad()
        outputs = model(**batch)
        (outputs.loss + 1e-2 * extra(outputs.logits)).backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    extras: list[Callable[[Tensor], Tensor]] = [lambda logits: logits.logsumexp(-1).sum(), Square.apply]
    plain = [grads(extra) for extra in extras]
    attach_chunked_loss(model, 7)
    for expected, extra in zip(plain, extras, strict=True):
        assert worst(expected, grads(extra)) <= 5e-6


def with_teacher(**options: Any) -> Any:
    """With two adapters of the head, of which the first is active."""
    model = peft_llama(**options)
    model.add_adapter("teacher", model.peft_config["default"])
    return model.train()


@contextlib.contextmanager
def teaching(model: Any) -> Generator[None]:
    model.set_adapter("teacher")
    yield
    model.set_adapter("default")


@contextlib.contextmanager
def evaluating(model: Any) -> Generator[None]:
    model.eval()
    yield
    model.train()


SWITCHES: dict[str, Callable[[Any], contextlib.AbstractContextManager[None]]] = {
    "another": teaching,
    "none": lambda model: model.disable_adapter(),
    "eval": evaluating,
}


@pytest.mark.parametrize("switched", SWITCHES.values(), ids=SWITCHES)
@pytest.mark.parametrize("dropout", [0.0, 0.3], ids=["exact", "dropout"])
def test_logits_read_later_are_those_of_the_adapters_of_the_forward(
    dropout: float, switched: Callable[[Any], contextlib.AbstractContextManager[None]]
) -> None:
    model, batch = with_teacher(target_modules=["lm_head"], lora_dropout=dropout), make_batch()
    head = model.get_base_model().lm_head

    def switches() -> tuple[Any, ...]:
        flags = [module.training for module in model.modules()], [p.requires_grad for p in model.parameters()]
        return head.active_adapters, head.disable_adapters, *flags

    torch.manual_seed(1)
    expected = model(**batch).logits
    attach_chunked_loss(model, 7)
    outputs = model(**batch)
    with switched(model):
        before = switches()
        if not dropout:
            assert torch.equal(outputs.logits.argmax(-1), expected.argmax(-1))  # in chunks
        torch.manual_seed(1)  # the mask of a dropout is drawn when logits are read
        assert torch.equal(outputs.logits, expected)
        assert switches() == before


@pytest.mark.parametrize("switched", [teaching, SWITCHES["none"]], ids=["another", "none"])
@pytest.mark.parametrize("target_modules", [["q_proj", "lm_head"], ["lm_head"]], ids=["below", "head-alone"])
def test_a_loss_of_logits_read_beside_a_teacher_trains_the_adapter_of_the_forward(
    target_modules: list[str], switched: Callable[[Any], contextlib.AbstractContextManager[None]]
) -> None:
    model, batch = with_teacher(target_modules=target_modules), make_batch()

    def grads() -> dict[str, Tensor]:
        model.zero_grad()
        outputs = model(**batch)
        with switched(model):
            with torch.no_grad():
                taught = model(input_ids=batch["input_ids"]).logits.log_softmax(-1)
            labels = batch["labels"][:, 1:].reshape(-1)
            again = F.cross_entropy(outputs.logits[:, :-1].reshape(-1, V), labels, label_smoothing=0.1)
            apart = F.kl_div(outputs.logits.log_softmax(-1), taught, log_target=True, reduction="batchmean")
        (outputs.loss + again + apart).backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    plain = grads()
    handle = attach_chunked_loss(model, 7)
    chunked = grads()
    assert handle.effective
    assert any("lm_head" in name for name in plain)
    assert worst(plain, chunked) <= 5e-6


def test_logits_are_not_read_through_a_head_that_was_merged_since() -> None:
    model, batch = with_teacher(), make_batch()
    attach_chunked_loss(model, 7)
    logits = model(**batch).logits
    model.merge_adapter()
    with pytest.raises(RecomputeMismatchError, match=r"the logits: adapters \['default'\] are merged now"):
        logits.sum()
    model.unmerge_adapter()
    total = logits.sum()
    model.merge_adapter()
    assert torch.equal(logits.sum(), total)  # they are computed by now


HOOKS: list[Callable[[Tensor], Any]] = [lambda logits: logits.register_hook(lambda grad: 2 * grad), Tensor.retain_grad]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("use", HOOKS, ids=["register_hook", "retain_grad"])
def test_a_hook_that_would_see_no_gradient_is_refused(use: Callable[[Tensor], Any], dtype: torch.dtype) -> None:
    model, batch = make("llama", dtype), make_batch()  # the loss is that of a copy in fp32
    attach_chunked_loss(model, 7)
    logits = model(**batch).logits
    with pytest.raises(UnsupportedModelError, match="their loss was computed in chunks"):
        use(logits)


def test_a_hook_before_the_loss_sees_the_gradient_and_changes_it() -> None:
    """As where a model's own forward puts one on: the logits are real from then on."""
    model, batch = make("llama"), make_batch()
    head = model.lm_head.register_forward_hook(lambda *args: args[-1].register_hook(lambda grad: 2 * grad) and None)
    _, expected, _ = step(model, **batch)
    handle = attach_chunked_loss(model, 7, check=False)
    _, found, _ = step(model, **batch)
    head.remove()
    assert not handle.effective
    assert worst(expected, found) <= 5e-6


@pytest.mark.parametrize(
    "part", [lambda logits: logits[:, :-1], lambda logits: logits.view(-1, V)[3:]], ids=["tokens", "rows"]
)
@pytest.mark.parametrize("use", HOOKS, ids=["register_hook", "retain_grad"])
def test_a_hook_on_a_part_of_the_logits_is_refused(
    use: Callable[[Tensor], Any], part: Callable[[Tensor], Tensor]
) -> None:
    """Before the loss, too: the part that the loss is of would be another tensor."""
    model, batch = make("llama"), make_batch()
    model.lm_head.register_forward_hook(lambda *args: use(part(args[-1])) and None)
    model(**batch).loss.backward()
    attach_chunked_loss(model, 7)
    with pytest.raises(UnsupportedModelError, match="a part of the logits"):
        model(**batch)


def test_deferred_logits_make_no_reference_cycle() -> None:
    model, batch = make("llama"), make_batch()
    attach_chunked_loss(model, 7)
    model(**batch).loss.backward()
    gc.collect()
    gc.disable()
    try:
        outputs = model(**batch)
        assert outputs.logits.sum() is not None
        del outputs
        assert not any(type(item) is DeferredLogits for item in gc.get_objects())
    finally:
        gc.enable()


class Lying(nn.Linear):
    """A head whose rows know each other."""

    mix: Callable[[Tensor], Tensor]

    def forward(self, input: Tensor) -> Tensor:
        return self.mix(super().forward(input))


MIXES: dict[str, Callable[[Tensor], Tensor]] = {
    "centred-tokens": lambda logits: logits - logits.mean(-2, keepdim=True),
    "softmax-tokens": lambda logits: logits.softmax(-2),
    "centred-batch": lambda logits: logits - logits.mean(0, keepdim=True),
    "by-position": lambda logits: logits * (1 + torch.arange(logits.shape[-2], dtype=logits.dtype)[:, None]),
}


@pytest.mark.parametrize("mix", MIXES.values(), ids=MIXES)
def test_self_check_finds_a_head_that_is_not_row_wise(mix: Callable[[Tensor], Tensor]) -> None:
    model, batch = make("llama"), make_batch()
    model.lm_head = Lying(32, V, bias=False)
    model.lm_head.mix = mix
    attach_chunked_loss(model, 7)
    with pytest.raises(VerificationError, match="differs from the whole"):
        model(**batch)


def sure_of_its_labels(dtype: torch.dtype) -> tuple[Any, dict[str, Any]]:
    """A model whose logits are about 40 to 70 for the label and 25 less for the next class: every row's loss is 0."""
    model, batch = make("llama", dtype), make_batch(num_ignored=0)
    model.lm_head = Lying(32, V, bias=False, dtype=dtype)
    nn.init.normal_(model.lm_head.weight)
    weight = model.lm_head.weight.detach().float()
    top, second = (weight @ weight.T)[batch["labels"]].topk(2).values.unbind(-1)
    hidden = weight[batch["labels"]] * (25 / (top - second)).unsqueeze(-1)
    outputs = BaseModelOutputWithPast(last_hidden_state=hidden.roll(-1, 1).to(dtype))
    model.model.forward = lambda **_: outputs
    return model, batch


@pytest.mark.parametrize("mix", MIXES.values(), ids=MIXES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_self_check_finds_it_in_rows_that_are_sure_of_their_labels(
    dtype: torch.dtype, mix: Callable[[Tensor], Tensor]
) -> None:
    model, batch = sure_of_its_labels(dtype)
    model.lm_head.mix = mix
    attach_chunked_loss(model, 7)
    with pytest.raises(VerificationError, match="differs from the whole"):
        model(**batch)


def test_rows_that_are_sure_of_their_labels_leave_the_self_check_to_another_batch() -> None:
    """Their gradients are e to the minus what rounding moves by one part in a hundred: they say nothing of the head."""

    def rounded_otherwise(logits: Tensor) -> Tensor:
        few = logits.shape[:-1].numel() <= 4
        return logits * (1 + 2**-7) if few else logits  # one step of bf16, or two

    model, batch = sure_of_its_labels(torch.bfloat16)
    model.lm_head.mix = rounded_otherwise
    handle = attach_chunked_loss(model, 7)
    loss, _, _ = step(model, **batch)
    assert handle.effective
    assert float(loss) < 1e-6
    model.lm_head.mix = MIXES["centred-tokens"]
    with pytest.raises(VerificationError, match="differs from the whole"):
        model(**batch)


def test_self_check_finds_a_trainable_tensor_outside_the_head() -> None:
    model, batch = make("llama"), make_batch()
    scale = torch.ones(V, requires_grad=True)
    model.lm_head = Lying(32, V, bias=False)
    model.lm_head.mix = lambda logits: logits * scale
    attach_chunked_loss(model, 7)
    with pytest.raises(VerificationError, match="not one of its parameters"):
        model(**batch)


def test_self_check_is_once_and_can_be_left_out() -> None:
    model, batch = make("llama"), make_batch()
    model.lm_head = Lying(32, V, bias=False)
    model.lm_head.mix = lambda logits: logits
    handle = attach_chunked_loss(model, 7)
    model(**batch)
    model.lm_head.mix = lambda logits: logits - logits.mean(-2, keepdim=True)
    model(**batch)
    handle.remove()
    attach_chunked_loss(model, 7, check=False)
    model(**batch)


def test_head_with_dropout_passes_the_check_and_is_left_in_training() -> None:
    model, batch = peft_llama(lora_dropout=0.5).train(), make_batch()
    handle = attach_chunked_loss(model, 7)
    model(**batch).loss.backward()
    assert handle.effective
    assert model.base_model.model.lm_head.lora_dropout["default"].training


def test_loss_without_cross_entropy_warns_once_and_is_right() -> None:
    model, batch = make("llama"), make_batch()
    model.loss_function = lambda logits, labels, **_: logits.float().log_softmax(-1)[..., 0].mean() + 0 * labels.sum()
    loss, grads, _ = step(model, **batch)
    handle = attach_chunked_loss(model, 7)
    with pytest.warns(UserWarning, match="no effect for LlamaForCausalLM"):
        chunked_loss, chunked_grads, _ = step(model, **batch)
    assert handle.effective is False
    assert torch.equal(loss, chunked_loss)
    assert worst(grads, chunked_grads) == 0.0
    step(model, **batch)  # warnings are errors: a second one would fail here


def test_gradient_hook_on_the_head_runs_once() -> None:
    model, batch = make("llama"), make_batch()
    model.lm_head.weight.register_hook(lambda grad: grad * 2)
    _, grads, _ = step(model, **batch)
    attach_chunked_loss(model, 7)
    with pytest.warns(UserWarning, match="no effect"):
        _, chunked_grads, _ = step(model, **batch)
    assert worst(grads, chunked_grads) == 0.0


def test_find_head() -> None:
    model = make("llama")
    assert find_head(model) == (model, model.lm_head)
    assert find_head(nn.Sequential(model)) == (model, model.lm_head)
    wrapped = make("lora-head")
    assert find_head(wrapped) == (wrapped.get_base_model(), wrapped.get_base_model().lm_head)
    assert find_head(model.model) is None
    assert find_head(nn.Linear(2, 2)) is None
    with pytest.raises(UnsupportedModelError, match="LlamaModel has no output embedding"):
        attach_chunked_loss(model.model, 7)
    with pytest.raises(UsageError, match="at least 1 row, not 0"):
        attach_chunked_loss(model, 0)


class Bare(nn.Module):
    """Hidden states, a head, scalar operations, one cross-entropy."""

    def __init__(self, width: int, num_classes: int, ops: list[str], options: dict[str, Any]) -> None:
        super().__init__()
        self.head = nn.Linear(width, num_classes, dtype=torch.float64)
        self.ops = ops
        self.options = options

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, hidden: Tensor, labels: Tensor) -> Tensor:
        logits = self.head(hidden)
        for op in self.ops:
            logits = OPS[op](logits)
        if self.options.get("shift"):
            logits, labels = logits[:, :-1], labels[:, 1:].contiguous()
        options = {key: value for key, value in self.options.items() if key != "shift"}
        return F.cross_entropy(logits.reshape(-1, logits.size(-1)), labels.view(-1), **options)


OPS: dict[str, Callable[[Tensor], Tensor]] = {
    "div": lambda logits: logits / 3.0,
    "mul": lambda logits: 0.5 * logits,
    "tensor": lambda logits: logits * torch.tensor(0.7),
    "tanh": lambda logits: torch.tanh(logits),
    "add": lambda logits: 1 + logits,
    "rsub": lambda logits: 2 - logits,
    "inplace": lambda logits: logits.div_(2.0).mul_(1.5),
    "augmented": lambda logits: logits.__itruediv__(1.5),
    "view-inplace": lambda logits: (logits.view(-1, logits.shape[-1]).mul_(0.5), logits)[1],
    "to": lambda logits: logits.to(torch.float32).to(dtype=torch.float64),
    "contiguous": lambda logits: logits[..., :].contiguous(),
    "flatten": lambda logits: logits.flatten(0, 1).reshape(logits.shape),
    "mask": lambda logits: logits[torch.ones(logits.shape[:-1], dtype=torch.bool)].view(logits.shape),
    "split": lambda logits: torch.cat(logits.split(1)),
}


@settings(max_examples=150, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_shape_options_and_operations_match(data: Any) -> None:
    batch, tokens = data.draw(st.integers(1, 3)), data.draw(st.integers(2, 9))
    num_classes, rows = data.draw(st.integers(2, 23)), data.draw(st.integers(1, 30))
    reduction = data.draw(st.sampled_from(["mean", "sum", "none"]))
    options: dict[str, Any] = {"reduction": reduction, "shift": data.draw(st.booleans())}
    options["ignore_index"] = data.draw(st.sampled_from([-100, 0]))
    if data.draw(st.booleans()):
        options["label_smoothing"] = 0.1
    if data.draw(st.booleans()):
        options["weight"] = torch.rand(num_classes, dtype=torch.float64) + 0.1
    ops = data.draw(st.lists(st.sampled_from(sorted(OPS)), max_size=4))
    frozen = data.draw(st.booleans())
    unsupported = ("label_smoothing" in options and "weight" in options) or (reduction == "none" and not frozen)

    model = Bare(4, num_classes, ops, options).train()
    model.head.requires_grad_(not frozen)
    hidden = torch.randn(batch, tokens, 4, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(0, num_classes, (batch, tokens))
    labels[torch.rand(batch, tokens) < data.draw(st.floats(0, 0.9))] = options["ignore_index"]
    labels[0, -1] = num_classes - 1  # at least one that counts: all ignored has its own test

    def run() -> list[Tensor]:
        loss = model(hidden, labels=labels)
        seed = torch.linspace(1, 2, loss.numel(), dtype=loss.dtype).reshape(loss.shape)
        tensors = [hidden, *(param for param in model.parameters() if param.requires_grad)]
        return [loss.detach(), *torch.autograd.grad(loss, tensors, seed)]

    try:
        plain = run()
    except (IndexError, RuntimeError):
        # Plain refuses: it cannot weigh an ignored label when it smooths, nor write over what a tanh has saved.
        reject()
    handle = attach_chunked_loss(model, rows, check=False)
    chunked = run()
    handle.remove()
    assert handle.effective is (not unsupported and "split" not in ops)
    # float64, but "to" passes through fp32, whose rounding is the same in both: only the order of sums differs.
    for expected, actual in zip(plain, chunked, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-7)
