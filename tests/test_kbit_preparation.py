"""The k-bit contract: PEFT's assertions against PEFT's function and ours, then what theirs gets wrong.

`BOTH` runs a test with either function, so the contract is the same code for both. Where PEFT is wrong today, the test
shows theirs beside ours; `upstream_is_wrong` fails once it is right.
"""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import accelerate
import bitsandbytes
import peft
import pytest
import torch
import torch.distributed
import transformers
from peft import CartridgeConfig, LoraConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.utils.checkpoint import checkpoint

import rematree
from checkpointed_models import CASES, EXPERTS, by_rematree, qwen3_moe, state_of, step, upstream_is_wrong
from models import assert_same, batch_for, build, with_lora
from rematree.errors import UnsupportedModelError, UsageError
from rematree.execute.precision import Upcast
from rematree.units import GIB

pytestmark = [
    # What transformers says to PEFT, and torch to whoever leaves `use_reentrant` open.
    pytest.mark.filterwarnings("ignore:.gradient_checkpointing_.*able. is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:torch.utils.checkpoint. the use_reentrant parameter:UserWarning"),
]
Prepare = Callable[..., Any]
BOTH = pytest.mark.parametrize(
    "prepare",
    [peft.prepare_model_for_kbit_training, rematree.prepare_model_for_kbit_training],
    ids=["peft", "rematree"],
)
theirs, ours = peft.prepare_model_for_kbit_training, rematree.prepare_model_for_kbit_training
HALF = torch.bfloat16


def nf4(model: Any, storage: torch.dtype = torch.uint8) -> Any:
    """The layers' linears in NF4, as `from_pretrained` with bitsandbytes leaves them."""
    for path, linear in list(model.named_modules()):
        if isinstance(linear, nn.Linear) and ".layers." in path:
            packed = bitsandbytes.nn.Linear4bit(
                linear.in_features, linear.out_features, bias=False, compute_dtype=HALF, quant_storage=storage
            )
            more: dict[str, Any] = {"quant_type": "nf4", "quant_storage": storage, "module": packed}
            packed.weight = bitsandbytes.nn.Params4bit(linear.weight.data, requires_grad=False, **more)
            model.set_submodule(path, packed.to("cpu"))
    model.is_loaded_in_4bit = model.is_quantized = True
    return model


def int8(model: Any) -> Any:
    """The layers' linears in LLM.int8()."""
    for path, linear in list(model.named_modules()):
        if isinstance(linear, nn.Linear) and ".layers." in path:
            packed = bitsandbytes.nn.Linear8bitLt(
                linear.in_features, linear.out_features, bias=False, has_fp16_weights=False
            )
            more: dict[str, Any] = {"has_fp16_weights": False}
            packed.weight = bitsandbytes.nn.Int8Params(linear.weight.data, requires_grad=False, **more)
            model.set_submodule(path, packed.to("cpu"))
    model.is_loaded_in_8bit = model.is_quantized = True
    return model


def marked(method: str) -> Callable[[Any], Any]:
    """A model that says it was quantised by `method`; its weights are plain."""

    def mark(model: Any) -> Any:
        model.quantization_method = method
        return model

    return mark


QUANTISERS: dict[str, Callable[[Any], Any]] = {
    "nf4": nf4,
    "nf4 stored in bf16": lambda model: nf4(model, HALF),
    "int8": int8,
    **{name: marked(name) for name in ("gptq", "aqlm", "eetq", "hqq", "torchao", "awq", "quanto", "fp8")},
    "none": lambda model: model,
}
KNOWN = ("nf4", "nf4 stored in bf16", "int8", "gptq", "aqlm", "eetq", "hqq", "torchao")


def half(name: str = "llama") -> Any:
    return build(name, layers=2).to(HALF).train()


# -------------------------------------------------------------------------------------------------- PEFT's assertions


@BOTH
def test_fp32_cast(prepare: Prepare) -> None:
    model: Any = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)).half()
    model.is_loaded_in_8bit = True
    assert prepare(model, False) is model
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert not any(p.requires_grad for p in model.parameters())


@BOTH
@pytest.mark.parametrize("clear", [None, True, False])
def test_the_cache_is_cleared_once_or_not(
    prepare: Prepare, clear: bool | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    cleared: list[int] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: cleared.append(1))
    model: Any = nn.Sequential(nn.Linear(4, 4)).half()
    model.is_loaded_in_8bit = True
    prepare(model, False, None, *([] if clear is None else [clear]))
    assert len(cleared) == (0 if clear is False else 1)


@BOTH
@pytest.mark.parametrize("name", ["llama", "opt", "t5", "bart", "bert", "gpt2"])
def test_frozen_first_and_embeddings_need_gradients_once_asked(prepare: Prepare, name: str) -> None:
    """PEFT's `_test_prepare_for_training`."""
    case = CASES[name]
    ids = case.batch()["input_ids"]
    model: Any = case.adapted()
    assert not model.get_input_embeddings()(ids).requires_grad
    model = prepare(case.make())
    assert not any(p.requires_grad for p in model.parameters())
    model = with_lora(model, **case.lora)
    model.enable_input_require_grads()
    assert model.get_input_embeddings()(ids).requires_grad


@BOTH
def test_other_adapters_find_a_frozen_base(prepare: Prepare) -> None:
    """PEFT's tests of the adaption prompt and of multitask prompt tuning."""
    model: Any = prepare(build("llama"))
    assert not any(p.requires_grad for p in model.parameters())
    adapted: Any = get_peft_model(
        model, peft.AdaptionPromptConfig(adapter_layers=2, adapter_len=4, task_type="CAUSAL_LM")
    )
    adapted.enable_input_require_grads()
    assert adapted.get_input_embeddings()(torch.tensor([[1, 2]])).requires_grad


@pytest.mark.parametrize("quantiser", QUANTISERS)
def test_side_by_side(quantiser: str) -> None:
    """Same dtypes, same frozen set, same gradients: theirs and ours on the same model.

    Both with the reentrant variant, which theirs is by default.
    """
    results: list[Any] = []
    for prepare in (theirs, ours):
        model = prepare(QUANTISERS[quantiser](half()), True, {"use_reentrant": True})
        dtypes = {name: (p.dtype, p.requires_grad) for name, p in model.named_parameters()}
        adapted = with_lora(model)
        results.append((dtypes, step(adapted, batch_for(adapted))))
    (their_dtypes, their_gradients), (our_dtypes, our_gradients) = results
    assert our_dtypes == their_dtypes
    assert {name for name, g in our_gradients.items() if g.any()} == {n for n, g in their_gradients.items() if g.any()}
    assert_same(their_gradients, our_gradients)


@pytest.mark.parametrize("use_reentrant", [None, False, True])
@pytest.mark.parametrize("quantiser", ["nf4", "int8", "gptq", "awq", "none"])
def test_gradients_are_those_without_checkpointing(quantiser: str, use_reentrant: bool | None) -> None:
    kwargs = None if use_reentrant is None else {"use_reentrant": use_reentrant}
    plain = with_lora(ours(QUANTISERS[quantiser](half()), False))
    batch = batch_for(plain)
    expected = step(plain, batch)
    assert_same(expected, step(plain, batch))
    model = with_lora(ours(QUANTISERS[quantiser](half()), True, kwargs))
    effect = rematree.checkpointing_in_effect(model)
    assert (len(effect.layers), effect.kwargs["use_reentrant"]) == (2, bool(use_reentrant))
    assert_same(expected, step(model, batch))


def test_experts_under_target_parameters() -> None:
    """A mixture of experts, adapters on its 3-D parameters, both variants; upstream's assertion is the non-zero set."""
    plain = with_lora(ours(qwen3_moe(), False), **EXPERTS)
    batch = CASES["qwen3-moe"].batch()
    expected = step(plain, batch)
    for use_reentrant in (False, True):
        for prepare in (theirs, ours):
            model = with_lora(prepare(qwen3_moe(), True, {"use_reentrant": use_reentrant}), **EXPERTS)
            assert_same(expected, step(model, batch))


def test_prompts_prefixes_and_the_order_of_things() -> None:
    """B7. A prefix reaches layers as a cache: PEFT refuses at creation only, and fails later with a shape error."""
    prompt: Any = PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM")
    plain: Any = get_peft_model(build("llama"), prompt).train()  # pyright: ignore[reportArgumentType]
    batch = {**batch_for(plain), "attention_mask": torch.ones(2, 32, dtype=torch.long)}
    expected = step(plain, batch)
    with by_rematree(plain):
        assert_same(expected, step(plain, batch))

    prefix: Any = PrefixTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM")
    for config in (prefix, CartridgeConfig(num_virtual_tokens=4, task_type="CAUSAL_LM")):
        with pytest.raises(ValueError, match="does not work with gradient checkpointing"):
            get_peft_model(ours(build("llama")), config)
        adapted: Any = get_peft_model(build("llama"), config).train()  # pyright: ignore[reportArgumentType]
        before = state_of(adapted)
        with pytest.raises(UnsupportedModelError, match="key-value cache"):
            rematree.activation_checkpointing_enable(adapted)
        with pytest.raises(UnsupportedModelError, match="key-value cache"):
            ours(adapted)
        assert state_of(adapted) == before
    adapted = get_peft_model(build("llama"), prefix).train()  # pyright: ignore[reportArgumentType]
    adapted.gradient_checkpointing_enable()
    with pytest.raises(RuntimeError, match="must match the"):
        step(adapted, batch)


# ----------------------------------------------------------------------------------------------------- PEFT's bugs


def test_b1_reentrant_by_accident() -> None:
    """Theirs hands `{}` on, and torch takes that for its old variant, with a warning from each layer."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        model = with_lora(theirs(nf4(half())))
        step(model, batch_for(model))
    complaints = [w for w in said if "use_reentrant parameter should be" in str(w.message)]
    upstream_is_wrong(len(complaints) == 2, "no use_reentrant means the reentrant variant")
    for kwargs in (None, {}):
        model = with_lora(ours(nf4(half()), True, kwargs))
        assert rematree.checkpointing_in_effect(model).kwargs == {"use_reentrant": False}
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            step(model, batch_for(model))


def test_b2_hooks_pile_up_and_stay() -> None:
    kwargs = {"use_reentrant": True}
    ids = torch.tensor([[1, 2, 3]])

    def train_and_stop(model: Any, stop: Callable[[Any], Any]) -> tuple[int, bool]:
        adapted: Any = with_lora(model)
        adapted.get_base_model().activation_checkpointing_enable({"use_reentrant": True})  # as the Trainer does
        hooks = len(adapted.get_input_embeddings()._forward_hooks)
        stop(adapted)
        return hooks, adapted.get_input_embeddings()(ids).requires_grad

    hooks, remains = train_and_stop(
        theirs(nf4(half())), lambda model: model.get_base_model().activation_checkpointing_disable()
    )
    upstream_is_wrong(hooks > 1 and remains, "a hook for every call, and none is removed for a PeftModel")
    assert train_and_stop(ours(half(), True, kwargs), rematree.activation_checkpointing_disable) == (1, False)
    plain = half().requires_grad_(False)
    before = state_of(plain)
    ours(plain, True, kwargs, upcast="none")
    ours(plain, True, kwargs, upcast="none")
    rematree.activation_checkpointing_disable(plain)
    assert state_of(plain) == before


def test_b3_training_arguments_do_not_switch_it_off(tmp_path: Path) -> None:
    """What prepare switched on stays on in a Trainer that was told otherwise; ours can be asked, and switched off."""
    rows = [{name: t[0] for name, t in batch_for(half()).items()}] * 2

    def run(model: Any) -> None:
        arguments = transformers.TrainingArguments(
            str(tmp_path),
            max_steps=1,
            activation_checkpointing=False,
            use_cpu=True,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
            dataloader_pin_memory=False,
        )
        transformers.Trainer(model=model, args=arguments, train_dataset=rows).train()  # pyright: ignore[reportArgumentType]

    model: Any = with_lora(theirs(marked("gptq")(half())))
    run(model)
    upstream_is_wrong(model.is_activation_checkpointing, "activation_checkpointing=False changes nothing")
    model = with_lora(ours(marked("gptq")(half())))
    assert str(rematree.checkpointing_in_effect(model)).startswith("2 of 2 layers recomputed")
    rematree.gradient_checkpointing_disable(model)
    run(model)
    assert not model.is_activation_checkpointing
    assert str(rematree.checkpointing_in_effect(model)) == "no layer is recomputed"


@pytest.mark.parametrize("quantiser", [name for name in QUANTISERS if name not in KNOWN])
def test_b4_unknown_quantisers_and_none(quantiser: str) -> None:
    upstream_is_wrong(
        not theirs(QUANTISERS[quantiser](half())).is_activation_checkpointing, f"{quantiser}: no checkpointing, no word"
    )
    assert ours(QUANTISERS[quantiser](half())).is_activation_checkpointing


class OwnSwitch(nn.Module):
    """A model with a switch of its own that takes no arguments, and the variant that needs an input's gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 8)
        self.linears = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
        self.checkpointing = False
        self.is_quantized = True

    def get_input_embeddings(self) -> nn.Module:
        return self.embedding

    def gradient_checkpointing_enable(self) -> None:
        self.checkpointing = True

    def gradient_checkpointing_disable(self) -> None:
        self.checkpointing = False

    def forward(self, input_ids: torch.Tensor) -> Any:
        x = self.embedding(input_ids)
        for linear in self.linears:
            x = torch.tanh(checkpoint(linear, x, use_reentrant=True) if self.checkpointing else linear(x))
        return transformers.modeling_outputs.CausalLMOutput(loss=x.square().mean())  # pyright: ignore[reportAttributeAccessIssue]


def test_b5_a_model_of_ones_own_gets_its_hook() -> None:
    """PEFT adds no hook to a quantised model, as prepare did; but prepare passes over a quantiser it does not know."""
    config = LoraConfig(target_modules=["linears.0", "linears.1", "linears.2"], init_lora_weights=False)
    batch = {"input_ids": torch.arange(6).reshape(2, 3)}

    def adapted(model: Any) -> Any:
        torch.manual_seed(3)
        return get_peft_model(model, config).train()  # pyright: ignore[reportArgumentType]

    def made() -> Any:
        torch.manual_seed(1)
        return OwnSwitch()

    plain = adapted(made())
    expected = step(plain, batch)
    assert len(expected) == 7
    model = theirs(made())
    model.gradient_checkpointing_enable()
    with pytest.warns(UserWarning, match="None of the inputs"), pytest.raises(RuntimeError, match="require grad"):
        step(adapted(model), batch)
    model = ours(made())
    assert model.checkpointing
    trained = adapted(model)
    assert_same(expected, step(trained, batch))
    rematree.activation_checkpointing_disable(trained)
    assert (model.checkpointing, dict(model.embedding._forward_hooks)) == (False, {})


@pytest.mark.parametrize("place", ["host", "disk"])
@pytest.mark.parametrize("upcast", ["all", "norms", "none"])
def test_b6_offloaded_parameters(place: str, upcast: str, tmp_path: Path) -> None:
    """Only a placeholder changes its dtype, but accelerate casts to it whenever it loads: not a bug today."""
    here, away = half().eval(), half().eval()
    cpu = torch.device("cpu")
    if place == "host":
        accelerate.cpu_offload(away, execution_device=cpu)
    else:
        accelerate.disk_offload(away, str(tmp_path), execution_device=cpu)
    ids = batch_for(here)["input_ids"]
    logits: list[torch.Tensor] = []
    for model in (here, away):
        ours(model, upcast=cast("Upcast", upcast))
        with torch.no_grad():
            logits.append(model(input_ids=ids).logits)
    assert {p.device.type for p in away.parameters()} == {"meta"}
    assert {p.dtype for p in away.parameters()} == {p.dtype for p in here.parameters()}
    assert torch.equal(*logits)


# ------------------------------------------------------------------------------------------------- beyond the contract


def test_packed_weights_survive_sharding() -> None:
    """FSDP puts DTensors in the place of Params4bit. Theirs looks at the class's name, and casts bytes to numbers."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))

        def sharded() -> Any:
            model = nf4(half(), HALF)
            for layer in model.model.layers:
                fully_shard(layer, mesh=mesh)
            return model

        def dtypes(model: Any) -> tuple[torch.dtype, torch.dtype]:
            layer = model.model.layers[1]
            return layer.mlp.up_proj.weight.dtype, layer.input_layernorm.weight.dtype

        upstream_is_wrong(dtypes(theirs(sharded(), False))[0] == torch.float32, "sharded packed weights are cast")
        for upcast in ("all", "norms"):
            assert dtypes(ours(sharded(), False, upcast=upcast)) == (HALF, torch.float32)
        assert dtypes(ours(sharded(), False, upcast="none")) == (HALF, HALF)
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_flattened_weights_are_refused() -> None:
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        model: Any = FullyShardedDataParallel(nn.Sequential(nn.Linear(4, 4)).half(), device_id=torch.device("cpu"))
        with pytest.raises(UnsupportedModelError, match="FSDP has flattened"):
            ours(model, False)
        assert all(p.requires_grad for p in model.parameters())
        assert ours(model, False, upcast="none") is model
    finally:
        torch.distributed.destroy_process_group()


def residual_dtypes_and_bytes(model: Any) -> tuple[set[torch.dtype], set[int]]:
    """Of what enters the layers: what a checkpoint keeps."""
    seen: list[torch.Tensor] = []
    layers = model.get_base_model().model.layers
    hooks = [layer.register_forward_pre_hook(lambda _, args: seen.append(args[0])) for layer in layers]
    step(model, batch_for(model))
    for hook in hooks:
        hook.remove()
    return {x.dtype for x in seen}, {x.numel() * x.element_size() for x in seen}


@pytest.mark.parametrize("quantiser", ["nf4", "none"])
def test_upcast_decides_the_residual_stream(quantiser: str) -> None:
    elements = 2 * 32 * 48
    for upcast, dtype in (("all", torch.float32), ("norms", HALF), ("none", HALF)):
        model: Any = with_lora(ours(QUANTISERS[quantiser](half()), upcast=cast("Upcast", upcast)))
        assert residual_dtypes_and_bytes(model) == ({dtype}, {elements * dtype.itemsize})
        norm = model.get_base_model().model.norm
        assert norm.weight.dtype == (HALF if upcast == "none" else torch.float32)
        assert norm(torch.randn(2, 48, dtype=HALF)).dtype == (torch.float32 if upcast == "all" else HALF)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3"])
def test_norms_in_fp32_are_norms_in_fp32(name: str) -> None:
    """The output is the fp32 result rounded once, for torch's LayerNorm and for the models' own."""
    model = ours(half(name), upcast="norms")
    norms = [m for m in model.modules() if any(p.dtype == torch.float32 for p in m.parameters(recurse=False))]
    assert len(norms) > 4
    x = torch.randn(3, 5, norms[0].weight.shape[0])
    exact = ours(build(name))
    for norm in norms:
        twin: Any = exact.get_submodule(next(path for path, m in model.named_modules() if m is norm))
        twin.load_state_dict(norm.state_dict())
        if twin.weight.shape[0] == x.shape[-1]:
            assert torch.equal(norm(x.to(HALF)), twin(x.to(HALF).float()).to(HALF))
    assert all(p.dtype == HALF for p in model.parameters() if p.dim() > 1)
    before = state_of(model)
    ours(model, False, upcast="norms")
    assert state_of(model) == before


def test_stacks_of_experts_are_left_alone() -> None:
    def bytes_of_experts(model: Any) -> int:
        return sum(p.numel() * p.element_size() for p in model.parameters() if p.dim() == 3)

    before = bytes_of_experts(qwen3_moe().to(HALF))
    assert before > 0
    upstream_is_wrong(bytes_of_experts(theirs(qwen3_moe().to(HALF))) == 2 * before, "stacks of experts are doubled")
    assert bytes_of_experts(ours(qwen3_moe().to(HALF))) == 2 * before  # PEFT's contract, under PEFT's name for it
    for upcast in ("norms", "none"):
        model = with_lora(ours(qwen3_moe().to(HALF), upcast=upcast), **EXPERTS)
        assert bytes_of_experts(model.get_base_model()) == before  # pyright: ignore[reportCallIssue, reportAttributeAccessIssue]
        assert all(torch.isfinite(g).all() for g in step(model, CASES["qwen3-moe"].batch()).values())


class _Container(torch.Tensor):
    """A quantised tensor as other libraries make them: a wrapper that shows the dtype it stands for."""

    inner: torch.Tensor  # pyright: ignore[reportIncompatibleMethodOverride]

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> "_Container":
        wrapper = torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=HALF)
        wrapper.inner = inner  # pyright: ignore[reportAttributeAccessIssue]
        return wrapper  # pyright: ignore[reportReturnType]

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["inner"], None

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, torch.Tensor], *_: object) -> "_Container":
        return _Container(inner["inner"])

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.detach.default:
            return cls(args[0].inner)
        raise AssertionError(f"{func} was called on a packed weight")


def test_tensor_containers_are_left_alone() -> None:
    linear = nn.Linear(4, 4, dtype=HALF)
    linear.weight = nn.Parameter(_Container(torch.zeros(4, 4, dtype=torch.int8)), requires_grad=False)
    ours(linear, False)
    assert isinstance(linear.weight, _Container)
    assert linear.bias.dtype == torch.float32


def test_the_bytes_in_the_docstring() -> None:
    """Llama-3-8B on the meta device, linears of the layers packed."""
    config = transformers.LlamaConfig(
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=128256,
        tie_word_embeddings=False,
    )

    def num_bytes(upcast: str | None) -> int:
        with torch.device("meta"):
            model: Any = transformers.LlamaForCausalLM(config)
            model.to(HALF)
        for module in model.model.layers.modules():
            if isinstance(module, nn.Linear):
                packed = torch.empty(module.weight.numel() // 2, 1, dtype=torch.uint8, device="meta")
                module.weight = nn.Parameter(packed, requires_grad=False)
        if upcast is not None:
            ours(model, upcast=cast("Upcast", upcast))
        return sum(p.numel() * p.element_size() for p in model.parameters())

    text = str(rematree.prepare_model_for_kbit_training.__doc__)
    before = num_bytes(None)
    for upcast, more in (("all", 2_101_878_784), ("norms", 532_480), ("none", 0)):
        assert num_bytes(upcast) - before == more
        assert f"{more:,} B" in text
    assert 128256 * 4096 == 525_336_576
    assert 8192 * 32 * 4096 * 4 / GIB == 4.0
    assert round(8192 * 128256 * 4 / GIB, 2) == 3.91


@BOTH
def test_a_switch_without_arguments_gets_the_documented_warning(prepare: Prepare) -> None:
    model: Any = OwnSwitch()
    model.is_loaded_in_8bit = True
    with pytest.warns(FutureWarning, match="gradient_checkpointing_kwargs is not supported in this version"):
        prepare(model, True, {"use_reentrant": True})
    assert model.checkpointing
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        prepare(OwnSwitch(), True, None)


def test_a_model_that_cannot_be_checkpointed_says_so_once() -> None:
    model: Any = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).half()
    with pytest.warns(UserWarning, match="checkpointing is not switched on: Sequential has no list of blocks") as said:
        assert ours(model) is model
    assert len(said) == 1
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_a_budget_waits_for_its_plan() -> None:
    model: Any = ours(nf4(half()), budget="6GiB")
    adapted = with_lora(model)
    assert rematree.requested_budget(model) == rematree.requested_budget(adapted) == 6 * GIB
    text = str(rematree.checkpointing_in_effect(adapted))
    assert text.startswith("2 of 2 layers recomputed")
    assert text.endswith("budget 6.00 GiB, no plan applied yet")
    model = ours(half(), False, budget=123456)
    assert rematree.requested_budget(model) == 123456
    assert not rematree.is_activation_checkpointing(model)
    assert rematree.requested_budget(ours(half())) is None


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"upcast": "some"}, "'all', 'norms', 'none'"),
        ({"budget": "6"}, "has no unit"),
        ({"gradient_checkpointing_kwargs": {"reentrant": True}}, "unknown checkpointing argument"),
    ],
)
def test_wrong_arguments_change_nothing(arguments: dict[str, Any], says: str) -> None:
    model = half()
    before = state_of(model)
    with pytest.raises(UsageError, match=says):
        ours(model, **arguments)
    assert state_of(model) == before
    assert all(p.requires_grad and p.dtype == HALF for p in model.parameters())
