"""Models with bitsandbytes layers: exact, predicted to the byte, and never without a gradient."""

import dataclasses
import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch
from torch import nn

import rematree
from models import assert_same, batch_for, build, gradients, quantised, reads_nothing, with_lora
from rematree.errors import PlanMismatchError, UnsupportedModelError
from rematree.execute.override import ForwardOverride
from rematree.execute.quantised import keep_no_input
from rematree.finetune.compare import hf_checkpointing
from rematree.fingerprint import describe_model
from rematree.measure import PeakMeter, storage_bytes
from rematree.memory.ledger import Ledger
from rematree.memory.optimizers import make_optimizer
from rematree.observation.mode import TwinMode
from rematree.observation.observe import Twin
from rematree.planning.planner import Planner
from rematree.plans import Action, Decision, Plan
from rematree.pricing.cost import Free, Measured, OpPrice, Roofline
from rematree.quantised import four_bit_linears, frozen_int8_linears, hidden_tensors
from rematree.verification import PEAK_SLACK

COST = Roofline(5e10, 1e10)
KINDS = ("nf4", "int8")
LAYERS = "base_model.model.model.layers"

Make = Callable[..., nn.Module]


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Make:
    def make(kind: str, *, layers: int = 3, dtype: torch.dtype = torch.float32, **lora: Any) -> nn.Module:
        base = quantised(build("llama", layers=layers), kind, tmp_path_factory.mktemp("model"), dtype)
        return with_lora(base, **lora)

    return make


@pytest.fixture(scope="module")
def planners(make: Make) -> dict[str, tuple[nn.Module, Planner]]:
    models = {kind: make(kind) for kind in KINDS}
    return {k: (m, Planner(m, batch_for(m), cost=COST, forbid=["chunked_loss"])) for k, m in models.items()}


def least(planner: Planner) -> Plan:
    return planner.plan(planner.min_peak_bytes())


# -- exact, and predicted ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_the_plain_quantised_models(planners: dict[str, tuple[nn.Module, Planner]], kind: str) -> None:
    model, planner = planners[kind]
    batch = batch_for(model)
    expected = gradients(model, batch)
    assert_same(expected, gradients(model, batch))  # the control: the plain model repeats itself
    low, high = planner.min_peak_bytes(), planner.plan(None).predicted_peak_bytes
    plans = [planner.plan(int(low + share * (high - low))) for share in (0.0, 0.25, 0.5, 0.75, 1.0)]
    assert len({str(plan) for plan in plans}) >= 4
    for plan in plans:
        with rematree.apply(plan, model, batch):
            assert_same(expected, gradients(model, batch))
            assert_same(expected, gradients(model, batch))
    assert_same(expected, gradients(model, batch))


@pytest.mark.parametrize("kind", KINDS)
def test_the_ledger_holds_packed_weights_at_their_size(
    planners: dict[str, tuple[nn.Module, Planner]], kind: str
) -> None:
    model, planner = planners[kind]
    frozen = [p for p in model.parameters() if not p.requires_grad]
    held = storage_bytes([*frozen, *model.buffers(), *hidden_tensors(model)])
    ledger = {line.category: line.num_bytes for line in planner.plan(None).ledger}
    base = {name: size for name, size in ledger.items() if name.startswith(("base weights", "buffers"))}
    assert sum(base.values()) == held
    linears = four_bit_linears(model) + frozen_int8_linears(model)
    elements = sum(m.in_features * m.out_features for _, m in linears)  # pyright: ignore[reportOperatorIssue]
    packed = storage_bytes(p for _, m in linears for p in m.parameters())
    assert packed == elements // 2 if kind == "nf4" else elements
    assert base["base weights, NF4 packed" if kind == "nf4" else "base weights, int8"] == packed
    assert len(linears) == 21


@pytest.mark.parametrize("kind", KINDS)
def test_predicted_peak_is_the_measured_one(make: Make, kind: str) -> None:
    model = make(kind, layers=2, target_modules=["q_proj", "down_proj"])
    batch = batch_for(model, rows=16, tokens=64)
    planner = Planner(model, batch, cost=Measured(torch.device("cpu")), forbid=["chunked_loss"])
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = make_optimizer("adamw", trained, learning_rate=0.0)
    assert optimizer is not None
    least_peak, most = planner.min_peak_bytes(), planner.plan(None).predicted_peak_bytes
    assert most > 1.5 * least_peak
    for budget in (least_peak, (least_peak + most) // 2, most):
        plan = planner.plan(budget)
        with rematree.apply(plan, model, batch):
            model(**batch).loss.backward()
            optimizer.step()  # from here on its state is live
            optimizer.zero_grad()
            with PeakMeter(model, optimizer, batch) as meter:
                model(**batch).loss.backward()
                optimizer.step()
                optimizer.zero_grad()
        # The slack for small tensors outside the model is much of a toy; without it.
        assert plan.predicted_peak_bytes - PEAK_SLACK == pytest.approx(meter.peak_bytes, rel=0.03)


@pytest.mark.parametrize("kind", KINDS)
def test_planning_changes_nothing_and_holds_before_and_after_the_first_step(make: Make, kind: str) -> None:
    model = make(kind, layers=2, target_modules=["q_proj"])
    batch = batch_for(model)
    before = [(name, dict(vars(module))) for name, module in model.named_modules()]
    held = [(tensor, tensor.clone()) for tensor in [*model.parameters(), *hidden_tensors(model)]]
    planner = Planner(model, batch, cost=COST, forbid=["chunked_loss"])
    plan = least(planner)
    for (name, was), (_, module) in zip(before, model.named_modules(), strict=True):
        assert was.keys() == vars(module).keys(), name
        assert all(was[key] is value for key, value in vars(module).items()), name
    assert all(torch.equal(tensor, value) for tensor, value in held)
    mark = describe_model(model)
    expected = gradients(model, batch)  # an 8-bit layer moves its scales from the weight to the module
    assert describe_model(model) == mark
    settled = [(name, dict(vars(module))) for name, module in model.named_modules()]
    with rematree.apply(plan, model, batch):
        assert_same(expected, gradients(model, batch))
    for (name, was), (_, module) in zip(settled, model.named_modules(), strict=True):
        assert was.keys() == vars(module).keys(), name
        assert all(was[key] is value for key, value in vars(module).items()), name


@pytest.mark.parametrize("kind", KINDS)
def test_a_bias_that_the_library_casts_in_place_is_no_other_model(kind: str, tmp_path: Path) -> None:
    base = quantised(build("gpt2", layers=2), kind, tmp_path, torch.bfloat16)
    for path, module in base.named_modules():
        if path.endswith("c_attn"):  # as the preparation for training leaves it
            module.bias.data = module.bias.data.float()  # pyright: ignore[reportAttributeAccessIssue]
    model = with_lora(base, target_modules=["c_attn"])
    batch = batch_for(model)
    mark, before = describe_model(model), {n: p.dtype for n, p in model.named_parameters()}
    plan = least(Planner(model, batch, cost=COST))
    expected = gradients(model, batch)
    assert {n: p.dtype for n, p in model.named_parameters()} != before
    assert describe_model(model) == mark
    with rematree.apply(plan, model, batch):
        gradients(model, batch)
    assert expected


def test_another_way_of_packing_is_another_model(make: Make) -> None:
    narrow = ["q_proj"]
    nf4, fp4 = make("nf4", layers=1, target_modules=narrow), make("fp4", layers=1, target_modules=narrow)
    plan = least(Planner(nf4, batch_for(nf4), cost=COST))
    with pytest.raises(PlanMismatchError, match="parameters"):
        rematree.apply(plan, fp4)


def test_unpacking_is_counted_where_the_device_is_not_there(make: Make) -> None:
    """The matmul of 4-bit weights is one op, and the weight it unpacks is none of its outputs."""
    model = make("nf4", layers=1)
    twin = Twin(model, batch_for(model))
    layer: Any = twin.model.get_submodule(f"{LAYERS}.0.mlp.up_proj.base_layer")
    ledger = Ledger(COST, "cpu")
    with twin.mode, torch.no_grad():
        x = torch.empty(64, 48)
        ledger.adopt([x, *layer.parameters(), *hidden_tensors(layer)], "known")
        known = ledger.live_bytes
        with ledger:
            out = layer(x)
    scales = 4 * (48 * 96 // 64)
    assert ledger.peak_bytes - known == 4 * (48 * 96 + out.numel()) + scales
    assert ledger.seconds > 2 * 64 * 48 * 96 / 5e10  # its FLOPs, though torch's counter does not know the op


class NoGuess:
    """A fallback that must not be needed."""

    def price(self, func: Any, args: Any, kwargs: Any, outputs: Any) -> OpPrice:
        raise AssertionError(f"{func} was not run for its price")


@pytest.mark.parametrize("kind", KINDS)
def test_packed_weights_are_priced_by_running_the_library(
    planners: dict[str, tuple[nn.Module, Planner]], kind: str
) -> None:
    model, _ = planners[kind]
    twin = Twin(model, batch_for(model))
    layer: Any = twin.model.get_submodule(f"{LAYERS}.0.mlp.up_proj.base_layer")
    ledger = Ledger(Measured(torch.device("cpu"), NoGuess()), "cpu")
    seen: list[str] = []
    ledger.listener = lambda op: seen.append(op.name)
    with twin.mode:
        x = torch.empty(64, 48, requires_grad=True)
        ledger.adopt([x, *layer.parameters(), *hidden_tensors(layer)], "known")
        known = ledger.live_bytes
        with ledger:
            out = layer(x)
            after_forward = ledger.live_bytes - known
            forward = ledger.peak_bytes - known
            out.sum().backward()
    unpacked, output = 4 * 48 * 96, 4 * 64 * 96
    assert unpacked + output <= forward <= 1.1 * (unpacked + output)
    assert after_forward == output
    if kind == "nf4":
        assert [name for name in seen if "4bit" in name] == ["gemm_4bit.default", "dequantize_4bit.default"]


# -- 8 bits: the input that no hook sees ------------------------------------------------------------------------------


def input_of(model: nn.Module, path: str, batch: dict[str, torch.Tensor]) -> tuple[bool, torch.Tensor]:
    """Whether the input of the base layer at `path` is alive between forward and backward; and the loss."""
    seen: list[weakref.ref[torch.Tensor]] = []
    layer = model.get_submodule(f"{LAYERS}.{path}.base_layer")
    hook = layer.register_forward_pre_hook(reads_nothing(lambda _, inputs: seen.append(weakref.ref(inputs[0]))))
    try:
        loss = model(**batch, use_cache=False).loss
    finally:
        hook.remove()
    gc.collect()
    alive = seen[0]() is not None
    loss.backward()
    model.zero_grad(set_to_none=True)
    return alive, loss


@pytest.mark.parametrize("path", ["1.mlp.down_proj", "1.self_attn.o_proj", "0.mlp.up_proj"])
def test_recomputation_frees_the_input_of_an_int8_layer(
    planners: dict[str, tuple[nn.Module, Planner]], path: str
) -> None:
    """bitsandbytes 0.50.2 keeps it in `ctx.A`, so plain non-reentrant checkpointing frees nothing."""
    model, planner = planners["int8"]
    batch = batch_for(model)
    with hf_checkpointing(model):
        assert input_of(model, path, batch)[0]
    with rematree.apply(least(planner), model, batch):
        assert not input_of(model, path, batch)[0]
    four_bit, _ = planners["nf4"]
    with hf_checkpointing(four_bit):  # MatMul4Bit keeps packed weights only
        assert not input_of(four_bit, path, batch)[0]


class SavedByBlock:
    """Real bytes each block leaves behind between its forward and its backward."""

    def __init__(self, model: nn.Module, batch: dict[str, torch.Tensor]) -> None:
        self.kept: list[int] = []
        self._ledger = Ledger(Free(), "cpu")
        self._ledger.adopt([*model.parameters(), *model.buffers(), *hidden_tensors(model), *batch.values()], "static")
        blocks = model.get_submodule(LAYERS)
        overrides = [ForwardOverride(block, self._around) for block in blocks.children()]
        try:
            with self._ledger:
                loss = model(**batch, use_cache=False).loss
            loss.backward()
        finally:
            for override in overrides:
                override.remove()
        model.zero_grad(set_to_none=True)

    def _around(self, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        before = self._ledger.live_bytes
        out = inner(*args, **kwargs)
        self.kept.append(self._ledger.live_bytes - before)
        return out


def test_blocks_with_int8_layers_keep_what_the_plan_says(planners: dict[str, tuple[nn.Module, Planner]]) -> None:
    model, planner = planners["int8"]
    batch = batch_for(model)
    for plan in (least(planner), planner.plan(None)):
        with rematree.apply(plan, model, batch):
            assert SavedByBlock(model, batch).kept == [row.saved_bytes for row in plan.rows]


def test_recomputed_int8_blocks_keep_their_input_only(planners: dict[str, tuple[nn.Module, Planner]]) -> None:
    model, planner = planners["int8"]
    batch = batch_for(model)
    tokens, width, inner, random_state = 64, 48, 96, 5056
    with hf_checkpointing(model):
        leaked = SavedByBlock(model, batch).kept
    # q, k and v share an input, gate and up share one; those of o and down are their own.
    assert leaked == [4 * tokens * (width + (3 * width + inner))] * 3
    every_block = {f"{LAYERS}.{i}": Decision(Action.RECOMPUTE) for i in range(3)}
    plan = dataclasses.replace(least(planner), decisions=every_block)
    with rematree.apply(plan, model, batch):
        assert SavedByBlock(model, batch).kept == [4 * tokens * width + random_state] * 3


def test_the_plan_says_that_it_releases_inputs(planners: dict[str, tuple[nn.Module, Planner]]) -> None:
    notes = planners["int8"][1].plan(None).notes
    assert "21 Linear8bitLt layers keep no input for backward, which plain bitsandbytes would" in notes
    assert not any("8bit" in note for note in planners["nf4"][1].plan(None).notes)


def test_saved_tensors_lists_what_bitsandbytes_hides(planners: dict[str, tuple[nn.Module, Planner]]) -> None:
    model, _ = planners["int8"]
    lines = rematree.saved_tensors(model, batch_for(model))
    hidden = [line for line in lines if line.region.endswith("layers.1.mlp.down_proj.base_layer")]
    assert [(line.shape, line.num_bytes) for line in hidden] == [((2, 32, 96), 4 * 64 * 96)]
    four_bit, _ = planners["nf4"]
    assert not [x for x in rematree.saved_tensors(four_bit, batch_for(four_bit)) if x.region.endswith("base_layer")]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(2, 5, 64), (10, 64)])
@pytest.mark.parametrize("training", [True, False])
def test_the_released_form_has_the_same_bits(dtype: torch.dtype, shape: tuple[int, ...], training: bool) -> None:
    """In training a CPU runs `MatMul8bitFp`; `MatMul8bitLt`, what a GPU runs, is what it runs in evaluation."""
    torch.manual_seed(0)
    layer = bitsandbytes.nn.Linear8bitLt(64, 32, has_fp16_weights=False, threshold=6.0).to("cpu").train(training)
    layer.requires_grad_(False)
    x = torch.randn(shape).mul_(3).to(dtype)  # some values are outliers
    assert bool((x.abs() > 6).any())
    seed = torch.randn(*shape[:-1], 32).to(dtype)

    def run() -> tuple[torch.Tensor, torch.Tensor]:
        leaf = x.clone().requires_grad_()
        out = layer(leaf)
        out.backward(seed)
        assert leaf.grad is not None
        return out.detach(), leaf.grad

    expected, control = run(), run()
    override = ForwardOverride(layer, lambda inner, x: keep_no_input(layer, inner, x))
    found = run()
    override.remove()
    for one, two, three in zip(expected, control, found, strict=True):
        assert torch.equal(one, two)
        assert torch.equal(one, three)


def test_a_layer_that_trains_its_bias_is_left_alone() -> None:
    layer = bitsandbytes.nn.Linear8bitLt(8, 8, has_fp16_weights=False).to("cpu")
    assert layer.bias.requires_grad
    assert frozen_int8_linears(layer) == []
    layer.requires_grad_(False)
    assert [path for path, _ in frozen_int8_linears(layer)] == [""]


def test_outliers_of_int8_on_a_gpu_can_be_observed() -> None:
    """How many columns are set apart depends on values, so the library's fake kernels give up; ours finds none."""
    layer = bitsandbytes.nn.Linear8bitLt(64, 32, has_fp16_weights=False, threshold=6.0).to("cpu").eval()
    layer.requires_grad_(False)
    layer(torch.zeros(1, 64))
    packed, scales = layer.state.CB, layer.state.SCB
    assert packed is not None
    assert scales is not None
    mode = TwinMode()
    state = bitsandbytes.MatmulLtState(CB=mode.from_tensor(packed), SCB=mode.from_tensor(scales))
    state.has_fp16_weights, state.is_training, state.threshold = False, False, 6.0
    with mode:
        x = torch.empty(2, 5, 64, dtype=torch.float16, requires_grad=True)
        out = bitsandbytes.matmul(x, mode.from_tensor(packed), state=state)
        assert (out.shape, out.dtype) == ((2, 5, 32), torch.float16)
        out.sum().backward()
        assert x.grad is not None


# -- 4 bits: an evaluation must not take the gradient away ------------------------------------------------------------


@pytest.fixture
def repacking(tmp_path: Path) -> nn.Module:
    """A model whose 4-bit layers repack on evaluation, as on a CPU with bfloat16 instructions."""
    sizes: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2, "vocab_size": 151}
    import transformers

    config = transformers.LlamaConfig(**sizes, num_hidden_layers=2, num_key_value_heads=2, max_position_embeddings=64)
    model = with_lora(quantised(transformers.LlamaForCausalLM(config), "nf4", tmp_path), target_modules=["q_proj"])
    for _, layer in four_bit_linears(model):
        vars(layer)["support_avx512bf16_for_cpu"] = True
    return model


def evaluate(model: nn.Module, batch: dict[str, torch.Tensor]) -> None:
    model.eval()
    with torch.no_grad():
        model(**batch)
    model.train()


@pytest.mark.filterwarnings("ignore:bitsandbytes..gemv_4bit. an autograd kernel was not registered:UserWarning")
def test_evaluating_first_loses_gradients_upstream_and_is_refused_here(repacking: nn.Module) -> None:
    batch = batch_for(repacking)
    expected = gradients(repacking, batch)
    plan = least(Planner(repacking, batch, cost=COST))
    evaluate(repacking, batch)
    lost = gradients(repacking, batch)
    assert len(lost) < len(expected)  # bitsandbytes 0.50.2: adapters below the last 4-bit layer get none
    with pytest.raises(UnsupportedModelError, match=r"has rewritten the 4-bit weight for inference; no gradient"):
        Planner(repacking, batch, cost=COST)
    with pytest.raises(UnsupportedModelError, match=r"and 13 more: an evaluation on this CPU"):
        rematree.apply(plan, repacking)


def test_evaluating_under_a_plan_keeps_gradients(repacking: nn.Module) -> None:
    batch = batch_for(repacking)
    expected = gradients(repacking, batch)
    with rematree.apply(least(Planner(repacking, batch, cost=COST, forbid=["chunked_loss"])), repacking):
        evaluate(repacking, batch)
        assert_same(expected, gradients(repacking, batch))
    assert all(vars(layer)["support_avx512bf16_for_cpu"] for _, layer in four_bit_linears(repacking))


def test_keep_trainable_outlives_evaluations(repacking: nn.Module) -> None:
    batch = batch_for(repacking)
    expected = gradients(repacking, batch)
    rematree.keep_trainable(repacking)
    evaluate(repacking, batch)
    assert_same(expected, gradients(repacking, batch))
