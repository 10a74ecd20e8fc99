"""LoRA layers that keep their input once: same bits as PEFT's own forward, and exactly the bytes they say they keep."""

import contextlib
import copy
import functools
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode

from models import assert_same, batch_for, build, gradients, quantised, with_lora
from rematree.execute.adapters import lean_forward, lean_layers, why_not
from rematree.execute.dropout import packed_bytes
from rematree.execute.override import ForwardOverride
from rematree.execute.stash import Leaf

FAMILIES = ("llama", "qwen3", "gpt2", "gemma3", "phi3")


@contextlib.contextmanager
def lean(model: nn.Module) -> Generator[list[str]]:
    """Every layer that can runs lean inside; their paths."""
    layers = lean_layers(model)
    overrides = [ForwardOverride(layer, functools.partial(lean_forward, layer, {})) for _, layer in layers]
    try:
        yield [path for path, _ in layers]
    finally:
        for override in overrides:
            override.remove()


def assert_lean_is_plain(model: nn.Module, batch: dict[str, torch.Tensor] | None = None) -> None:
    """One step, twice each: same loss, same gradients, same random state behind it."""
    batch = batch_for(model) if batch is None else batch
    expected = gradients(model, batch)
    after = torch.get_rng_state()
    assert_same(expected, gradients(model, batch))  # the control: the plain model repeats itself
    before = kept_bytes(model, batch)
    with lean(model) as paths:
        assert paths
        assert_same(expected, gradients(model, batch))
        assert torch.equal(after, torch.get_rng_state())
        assert kept_bytes(model, batch) < before, "or nothing ran lean"


def kept_bytes(model: nn.Module, batch: Any) -> int:
    """Bytes of the distinct storages that autograd holds after a forward, parameters and buffers left out."""
    known = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept.setdefault(tensor.untyped_storage().data_ptr(), tensor.detach())
        return tensor.detach()

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        out = model(**batch) if isinstance(batch, dict) else model(batch)
    del out
    return sum(tensor.untyped_storage().nbytes() for storage, tensor in kept.items() if storage not in known)


# -- the bits of PEFT's own forward -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dropout", [0.05, 0.0])
@pytest.mark.parametrize("name", FAMILIES)
def test_gradients_are_those_of_peft(name: str, dropout: float) -> None:
    assert_lean_is_plain(with_lora(build(name), lora_dropout=dropout))


@pytest.mark.parametrize("adapters", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dropout", [0.05, 0.0])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_half_precision_models_with_adapters_in_full_and_half(name: str, dropout: float, adapters: torch.dtype) -> None:
    model = with_lora(build(name, layers=2).to(torch.bfloat16), lora_dropout=dropout)  # PEFT makes adapters in fp32
    for name_, parameter in model.named_parameters():
        if "lora_" in name_:
            parameter.data = parameter.data.to(adapters)
    batch = batch_for(model, rows=1, tokens=16)
    if dropout or adapters == torch.float32:
        assert_lean_is_plain(model, batch)
    else:
        expected = gradients(model, batch)
        with lean(model):
            assert_same(expected, gradients(model, batch))


class Products(TorchDispatchMode):
    """Counts matrix products."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten.mm.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dropout", [0.1, 0.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_behind_a_placeholder_nothing_is_multiplied(dtype: torch.dtype, dropout: float) -> None:
    """R3: a rerun that skips the base layer keeps what backward needs, and makes no sum that nobody reads."""
    model = with_lora(build("llama", layers=2).to(dtype), lora_dropout=dropout)
    layer: Any = model.get_submodule(next(path for path, _ in lean_layers(model)))
    x = torch.randn(2, 8, layer.in_features, dtype=dtype)
    trained = [parameter for parameter in layer.parameters() if parameter.requires_grad]
    base = layer.base_layer.forward
    found = list[list[torch.Tensor]]()

    def skip(_: Any, x: torch.Tensor) -> torch.Tensor:
        return Leaf.of(base(x).detach(), False, None).again("base_layer", None, None)

    for skipped in (False, True):
        override = ForwardOverride(layer.base_layer, skip) if skipped else None
        torch.manual_seed(0)
        with Products() as seen:
            out = lean_forward(layer, {}, layer.forward, x)
        if override is not None:
            override.remove()
        assert seen.count == (1 if skipped else 3)  # one is the base layer's, here in both
        assert (out.shape, out.dtype) == ((2, 8, layer.out_features), dtype)
        if skipped:
            assert not out.any()
        found.append([*torch.autograd.grad(out, trained, torch.ones_like(out))])
    for whole, without in zip(*found, strict=True):
        assert torch.equal(whole, without)


@pytest.mark.parametrize(
    "options",
    [
        {"use_rslora": True, "lora_alpha": 5},
        {"bias": "lora_only"},
        {"bias": "all"},
        {"modules_to_save": ["lm_head", "embed_tokens"]},
        {"target_modules": ["k_proj", "down_proj"]},
        {"r": 1},
        {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 3}},
        {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [1, 3]},
    ],
    ids=str,
)
def test_variants_of_lora_that_are_lean(options: dict[str, Any]) -> None:
    assert_lean_is_plain(with_lora(build("llama"), **options))


def several_adapters(
    base: nn.Module,
    *,
    dtype: torch.dtype = torch.float32,
    dropout: float = 0.1,
    names: tuple[str, ...] = ("default", "second"),
) -> nn.Module:
    """Adapters of different rank, dropout and scale, all active."""
    model: Any = with_lora(base, lora_dropout=dropout)
    for name in names[1:]:
        other = LoraConfig(r=3, lora_alpha=7, lora_dropout=2 * dropout, target_modules="all-linear")
        model.add_adapter(name, other)
    model.base_model.set_adapter(list(names))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(dtype)
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.05)
    return model.train()


@pytest.mark.parametrize("dropout", [0.1, 0.0])
@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16])
def test_two_active_adapters(base: torch.dtype, dropout: float) -> None:
    """In bf16 both stand behind one cast, whose gradient is summed in fp32; in fp32 each adds to the input's own."""
    model = several_adapters(build("llama", layers=2).to(base), dropout=dropout)
    assert len(lean_layers(model)) == 14
    assert_lean_is_plain(model, batch_for(model, rows=1, tokens=16))


def test_three_active_adapters_are_summed_in_autograds_order() -> None:
    """Behind one cast, in whose dtype, bf16, three gradients are summed: another order is another result."""
    model = several_adapters(build("llama", layers=2), dtype=torch.bfloat16, names=("default", "second", "third"))
    assert_lean_is_plain(model, batch_for(model, rows=1, tokens=16))


def test_adapters_of_a_wider_model_in_half_precision() -> None:
    model = several_adapters(build("llama", layers=2), dtype=torch.bfloat16)
    assert_lean_is_plain(model, batch_for(model, rows=1, tokens=16))


@pytest.mark.parametrize("enabled_for", ["base", "two"])
@pytest.mark.parametrize("dropout", [0.1, 0.0])
@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16])
def test_under_autocast(base: torch.dtype, dropout: float, enabled_for: str) -> None:
    model = build("llama", layers=2).to(base)
    model = (
        with_lora(model, lora_dropout=dropout) if enabled_for == "base" else several_adapters(model, dropout=dropout)
    )
    batch = batch_for(model, rows=1, tokens=16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = gradients(model, batch)
        with lean(model):
            assert_same(expected, gradients(model, batch))


def test_two_forwards_share_the_cast_weights_of_one_autocast() -> None:
    """Autocast casts a weight once: gradients of both forwards are summed in bf16, and one of them need not be lean."""
    model = with_lora(build("llama", layers=2))
    one, other = batch_for(model, rows=1, tokens=16), batch_for(model, rows=2, tokens=8)

    def step(first: contextlib.AbstractContextManager[Any], second: contextlib.AbstractContextManager[Any]) -> Any:
        torch.manual_seed(1)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            with first:
                loss = model(**one).loss
            with second:
                loss = loss + model(**other).loss
        loss.backward()
        found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        model.zero_grad(set_to_none=True)
        return found

    plain = contextlib.nullcontext()
    expected = step(plain, plain)
    assert_same(expected, step(lean(model), lean(model)))
    assert_same(expected, step(plain, lean(model)))
    assert_same(expected, step(lean(model), plain))


@pytest.mark.parametrize("kind", ["nf4", "int8"])
@pytest.mark.parametrize("autocast", [False, True], ids=["", "autocast"])
def test_packed_base_layers(kind: str, autocast: bool, tmp_path: Path) -> None:
    model = with_lora(quantised(build("llama", layers=2), kind, tmp_path))
    classes = {type(layer).__name__ for _, layer in lean_layers(model)}
    assert classes == {"Linear4bit" if kind == "nf4" else "Linear8bitLt"}
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        assert_lean_is_plain(model, batch_for(model, rows=1, tokens=16))


def test_a_frozen_half_of_an_adapter() -> None:
    for frozen in ("lora_A", "lora_B"):
        model = with_lora(build("llama", layers=2))
        for name, parameter in model.named_parameters():
            if frozen in name:
                parameter.requires_grad_(False)
        assert_lean_is_plain(model)


def test_accumulated_gradients_and_a_graph_run_twice() -> None:
    model = with_lora(build("llama", layers=2))
    batch = batch_for(model)

    def step() -> dict[str, torch.Tensor]:
        torch.manual_seed(2)
        model.zero_grad(set_to_none=True)
        for _ in range(2):
            model(**batch).loss.backward()
        loss = model(**batch).loss
        loss.backward(retain_graph=True)
        loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    expected = step()
    with lean(model):
        assert_same(expected, step())


def test_a_second_derivative_is_refused() -> None:
    model = with_lora(build("llama", layers=1))
    with lean(model):
        loss = model(**batch_for(model)).loss
        first = next(p for p in model.parameters() if p.requires_grad)
        (grad,) = torch.autograd.grad(loss, [first], create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            grad.sum().backward()


def test_an_input_that_was_written_to_is_refused() -> None:
    layer, _ = one_layer()
    x = torch.randn(4, 6, requires_grad=True) * 1.0
    with lean(layer):
        out = layer(x)
    x.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


# -- what is kept -----------------------------------------------------------------------------------------------------


class Two(nn.Module):
    """Two layers that read one input, of 6 to 10 and 6 to 14 features."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.narrow = nn.Linear(6, 14), nn.Linear(6, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.wide(x), self.narrow(x)], -1)


def one_layer(**options: Any) -> tuple[nn.Module, Any]:
    """A model of one LoRA layer from 6 to 10 features, rank 3, and that layer."""
    torch.manual_seed(0)
    options = {"r": 3, "target_modules": ["0"], "lora_dropout": 0.1, **options}
    model: Any = get_peft_model(nn.Sequential(nn.Linear(6, 10)), LoraConfig(**options))  # pyright: ignore
    nn.init.normal_(model.base_model.model[0].lora_B["default"].weight)
    return model.train(), model.base_model.model[0]


def test_one_layer_keeps_its_input_and_one_bit_an_element() -> None:
    x = torch.randn(2, 5, 6, dtype=torch.bfloat16, requires_grad=True) * 1
    model, layer = one_layer()
    layer.base_layer.to(torch.bfloat16)
    # PEFT: what A reads and the mask in fp32, and the product of rank 3
    assert kept_bytes(model, x) == 2 * 5 * 6 * 4 + 2 * 5 * 6 * 4 + 2 * 5 * 3 * 4
    with lean(model):
        assert kept_bytes(model, x) == 2 * 5 * 6 * 2 + packed_bytes(60) == 120 + 8


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lead", [(5,), (2, 5)])
def test_an_output_may_be_written_to(lead: tuple[int, ...], dtype: torch.dtype) -> None:
    """Falcon adds the attention's output to the MLP's in place."""
    config = LoraConfig(r=3, target_modules=["wide", "narrow"], lora_dropout=0.1, init_lora_weights=False)
    model: Any = get_peft_model(Two().to(dtype), config).train()  # pyright: ignore[reportArgumentType]
    x = torch.randn(*lead, 6, dtype=dtype)

    def step() -> dict[str, torch.Tensor]:
        torch.manual_seed(3)
        model.zero_grad(set_to_none=True)
        out = model.get_base_model().wide(x)
        out += 1.0
        out.square().sum().backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    expected = step()
    assert expected
    with lean(model):
        assert_same(expected, step())


def test_layers_that_read_one_input_keep_it_once() -> None:
    config = LoraConfig(r=3, target_modules=["wide", "narrow"], lora_dropout=0.0)
    model = get_peft_model(Two().to(torch.bfloat16), config).train()  # pyright: ignore[reportArgumentType]
    x = torch.randn(7, 6, dtype=torch.bfloat16, requires_grad=True) * 1
    # PEFT casts the input for each, and keeps what A makes of it
    assert kept_bytes(model, x) == 2 * (7 * 6 * 4 + 7 * 3 * 4)
    with lean(model):
        assert kept_bytes(model, x) == 7 * 6 * 2


@settings(deadline=None, max_examples=120)
@given(
    lead=st.lists(st.integers(1, 5), min_size=1, max_size=3),
    features=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    rank=st.integers(1, 4),
    dtypes=st.tuples(*[st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64])] * 2),
    p=st.sampled_from([0.0, 0.05, 0.5]),
    alpha=st.sampled_from([1, 3, 7]),
    input_grad=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_any_shape_and_dtype(
    lead: list[int],
    features: tuple[int, int],
    rank: int,
    dtypes: tuple[torch.dtype, torch.dtype],
    p: float,
    alpha: int,
    input_grad: bool,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    base_dtype, dtype = dtypes
    config = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=p, target_modules=["0"])
    base = nn.Sequential(nn.Linear(*features)).to(base_dtype)
    model: Any = get_peft_model(base, config, autocast_adapter_dtype=False).train()  # pyright: ignore
    layer = model.base_model.model[0]
    for part in (layer.lora_A, layer.lora_B):
        nn.init.normal_(part["default"].weight.data)
        part.to(dtype)
    start = torch.randn(*lead, features[0], dtype=base_dtype, requires_grad=input_grad)
    weight = torch.randn(*lead, features[1], dtype=base_dtype)

    def step() -> dict[str, torch.Tensor]:
        torch.manual_seed(seed)
        model.zero_grad(set_to_none=True)
        start.grad = None
        x = start * 2  # another reader of it, whose gradient is summed with the layer's
        out = model(x)
        ((out * weight).sum() + (x * x).sum()).backward()
        found = {name: q.grad for name, q in model.named_parameters() if q.grad is not None}
        return {"out": out.detach(), **found, **({"x": start.grad} if start.grad is not None else {})}

    expected = step()
    assert (set(expected) >= {"out", "x"}) is input_grad
    with lean(model) as paths:
        assert len(paths) == 1
        found = step()
    assert all(tensor.isfinite().all() for tensor in expected.values())
    assert_same(expected, found)
    assert all(found[name].dtype == tensor.dtype for name, tensor in expected.items())


@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16])
def test_a_mask_that_is_made_in_pieces(base: torch.dtype) -> None:
    """More than 2^20 elements, rows of an odd width: pieces must begin at whole bytes of the bits."""
    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=["0"], lora_dropout=0.1)
    linear = nn.Sequential(nn.Linear(1001, 3)).to(base)
    model: Any = get_peft_model(linear, config).train()  # pyright: ignore[reportArgumentType]
    nn.init.normal_(model.base_model.model[0].lora_B["default"].weight)
    start = torch.randn(3, 367, 1001, dtype=base, requires_grad=True)
    assert start.numel() > 1 << 20

    def step() -> dict[str, torch.Tensor]:
        torch.manual_seed(1)
        model.zero_grad(set_to_none=True)
        start.grad = None
        out = model(start * 1)
        out.square().sum().backward()
        assert start.grad is not None
        return {
            "out": out.detach(),
            "x": start.grad,
            **{n: p.grad for n, p in model.named_parameters() if p.grad is not None},
        }

    expected = step()
    with lean(model):
        assert_same(expected, step())


# -- what is not lean -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"use_dora": True}, "adapter default is DoRA"),
        ({"alora_invocation_tokens": [3], "task_type": "CAUSAL_LM"}, "adapter default is aLoRA"),
        ({"lora_bias": True, "target_modules": ["c_attn"]}, "adapter default: lora_bias"),
    ],
    ids=["dora", "alora", "bias"],
)
def test_what_cannot_be_lean_is_named(options: dict[str, Any], reason: str) -> None:
    model = with_lora(build("gpt2" if "lora_bias" in options else "llama"), lora_dropout=0.0, **options)
    assert lean_layers(model) == []
    layers = [module for module in model.modules() if hasattr(module, "lora_A")]
    assert layers
    assert {why_not(layer) for layer in layers} == {reason}


def test_layers_of_other_kinds_are_named() -> None:
    model = get_peft_model(
        nn.Sequential(nn.Embedding(9, 6), nn.Conv1d(4, 4, 1), nn.Linear(6, 6)),  # pyright: ignore[reportArgumentType]
        LoraConfig(r=2, target_modules=["0", "1", "2"]),
    )
    layers: Any = model.base_model.model
    assert why_not(layers[0]) == "Embedding is not a LoRA layer over a linear one"
    assert why_not(layers[1]) == "Conv1d is not a LoRA layer over a linear one"
    assert [path for path, _ in lean_layers(model)] == ["base_model.model.2"]


def test_a_dora_adapter_beside_a_plain_one_runs_as_peft_runs_it() -> None:
    model, layer = one_layer()
    model.add_adapter("dora", LoraConfig(r=2, target_modules=["0"], use_dora=True))  # pyright: ignore
    x = torch.randn(4, 6, requires_grad=True)
    with lean(model) as paths:
        assert len(paths) == 1
        model.base_model.set_adapter("dora")  # pyright: ignore[reportAttributeAccessIssue, reportCallIssue]
        assert why_not(layer) == "adapter dora is DoRA"
        found = model(x)
    assert torch.equal(found, model(x))


def test_what_is_decided_at_the_call() -> None:
    """Disabled, merged, hooked, evaluated: as PEFT does it, while the layer is lean."""
    model, layer = one_layer(lora_dropout=0.0)
    x = torch.randn(4, 6, requires_grad=True)
    plain, base = model(x), layer.base_layer(x)
    with lean(model):
        assert torch.equal(model(x), plain)
        with model.disable_adapter():  # pyright: ignore[reportCallIssue]
            assert torch.equal(model(x), base)
        layer.lora_A["default"].register_forward_hook(lambda *_: torch.zeros(4, 3))
        assert torch.equal(model(x), base)
        layer.lora_A["default"]._forward_hooks.clear()
        with torch.no_grad():
            assert torch.equal(model(x), plain)
        layer.merge()
        merged = model(x)
        assert torch.equal(merged, layer.base_layer(x))
        layer.unmerge()


def test_a_batch_of_mixed_adapters() -> None:
    model = several_adapters(build("llama", layers=1))
    batch = batch_for(model)
    names = ["default", "second"]
    model.eval()  # PEFT mixes adapters only in evaluation
    expected = model(**batch, adapter_names=names).loss
    with lean(model):
        assert torch.equal(model(**batch, adapter_names=names).loss, expected)


def test_the_layer_can_be_copied_and_is_put_back() -> None:
    model, layer = one_layer()
    with lean(model):
        copied = copy.deepcopy(model)
        assert "forward" in layer.__dict__
    assert "forward" not in layer.__dict__
    torch.manual_seed(3)
    x = torch.randn(4, 6)
    torch.manual_seed(4)
    expected = model(x)
    torch.manual_seed(4)
    assert torch.equal(copied(x), expected)
