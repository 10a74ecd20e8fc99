"""What a user can pick today, each as a context around the step: the flags of the libraries, and an afternoon by hand.

A way is entered and left many times in one run. What is dear to make, such as compiled blocks, is made the first time
and kept by the way. Whatever a peer cannot do here is an exception, and that becomes its row.
"""

import functools
from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from workloads import Batch, Built, Loss, plain_loss

from rematree.finetune.compare import hf_checkpointing

CHUNK_ROWS = 128
_MATMULS = ("mm", "addmm", "bmm", "baddbmm", "linear", "gemm", "matmul")


@dataclass
class Way:
    """One way of stepping.

    Attributes:
        name: Unique in a run.
        series: "plain", "peer", "ours" or "ours compiled".
        settings: How it was set up, in words.
        around: A context in which the model steps this way; what it yields computes the loss.
        compiles: Blocks are compiled.
        predicted: (peak bytes, seconds) that rematree's planner predicts, if it can.
        among: The smallest set of peers it is in: "few", "main" or "all".
    """

    name: str
    series: str
    settings: str
    around: Callable[[], AbstractContextManager[Loss]]
    compiles: bool = False
    predicted: tuple[int, float] | None = None
    among: str = "main"


@contextmanager
def plain() -> Generator[Loss]:
    yield plain_loss


# -- flags of the libraries


@contextmanager
def _flagged(built: Built, enable: Callable[[], None]) -> Generator[Loss]:
    """Checkpointing as transformers switches it on, and everything as it was afterwards."""
    base = built.base
    try:
        enable()
        yield plain_loss
    finally:
        base.activation_checkpointing_disable()
        base.disable_input_require_grads()


@contextmanager
def hf_flag(built: Built) -> Generator[Loss]:
    with hf_checkpointing(built.model):
        yield plain_loss


def hf_options(built: Built, **options: Any) -> AbstractContextManager[Loss]:
    """transformers' switch with arguments of its own: `every_n_layers`, `offload`."""
    kwargs = {"use_reentrant": False}
    enable = functools.partial(built.base.activation_checkpointing_enable, activation_checkpointing_kwargs=kwargs)
    return _flagged(built, functools.partial(enable, **options))


@contextmanager
def trl_selective(built: Built) -> Generator[Loss]:
    """TRL's selective checkpointing: attention kept, the rest recomputed."""
    from trl.models.selective_activation_checkpointing import enable_selective_activation_checkpointing

    base = built.base
    try:
        enable_selective_activation_checkpointing(base)
        with _flagged(built, base.gradient_checkpointing_enable) as loss:
            yield loss
    finally:
        base.__dict__.pop("gradient_checkpointing_enable", None)


@contextmanager
def trl_offload(built: Built, *, flag: bool) -> Generator[Loss]:
    """TRL's `activation_offloading`, alone or with the flag."""
    from trl.models.activation_offloading import get_act_offloading_ctx_manager

    hooks = {module: (dict(module._forward_hooks), dict(module._forward_pre_hooks)) for module in built.model.modules()}
    offload = get_act_offloading_ctx_manager(built.model)

    def loss(model: Any, batch: Batch) -> torch.Tensor:
        with offload:
            return plain_loss(model, batch)

    try:
        with hf_flag(built) if flag else plain():
            yield loss
    finally:
        for module, (after, before) in hooks.items():
            module._forward_hooks.clear()
            module._forward_hooks.update(after)
            module._forward_pre_hooks.clear()
            module._forward_pre_hooks.update(before)


def _keep_matmuls(_: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    name = getattr(op, "overloadpacket", op).__name__
    kept = "scaled_dot_product" in name or any(name == matmul or matmul + "_" in name for matmul in _MATMULS)
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


def sac(built: Built) -> AbstractContextManager[Loss]:
    """torch's selective checkpointing around each block: results of matmuls and of attention kept."""
    contexts = functools.partial(create_selective_checkpoint_contexts, _keep_matmuls)
    return around_blocks(built.layers, functools.partial(checkpoint, use_reentrant=False, context_fn=contexts))


# -- blocks, by hand


@contextmanager
def forwards(replaced: Mapping[nn.Module, Callable[..., Any]]) -> Generator[None]:
    """Other forwards on these modules."""
    before = {module: module.__dict__.get("forward") for module in replaced}
    try:
        for module, forward in replaced.items():
            module.forward = forward
        yield
    finally:
        for module, old in before.items():
            if old is None:
                module.__dict__.pop("forward", None)
            else:
                module.forward = old


@contextmanager
def around_blocks(layers: Iterable[nn.Module], run: Callable[..., Any]) -> Generator[Loss]:
    """Each of `layers` called through `run(forward, *args, **kwargs)`."""
    with forwards({layer: functools.partial(run, layer.forward) for layer in layers}):
        yield plain_loss


class CompiledBlocks:
    """Blocks under torch.compile with one activation memory budget; compiled in the first step, then kept."""

    def __init__(self, built: Built, budget: float) -> None:
        self._built = built
        self._budget = budget
        self._compiled: dict[nn.Module, Callable[..., Any]] = {}

    def _backend(self, graph: Any, inputs: Any, **options: Any) -> Any:
        from torch._functorch import config
        from torch._inductor.compile_fx import compile_fx

        with config.patch(activation_memory_budget=self._budget):
            return compile_fx(graph, inputs, **options)

    @contextmanager
    def around(self, *, recomputed: bool = False) -> Generator[Loss]:
        if not self._compiled:
            # A backend of its own for each budget: dynamo shares compiled code between equal backends.
            self._compiled = {
                layer: torch.compile(layer.forward, backend=self._backend) for layer in self._built.layers
            }
        run = self._compiled
        if recomputed:
            again = functools.partial(checkpoint, use_reentrant=False)
            run = {layer: functools.partial(again, forward) for layer, forward in run.items()}
        # Each block's compiled code is another entry of one cache, and every budget adds some.
        with torch._dynamo.config.patch(recompile_limit=256, accumulated_recompile_limit=1024), forwards(run):
            yield plain_loss


# -- the loss, by hand


class _ChunkedLoss(torch.autograd.Function):
    """Cross-entropy of hidden @ weight.T, a chunk of rows at a time, with the gradients formed in forward."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        count = (targets != -100).sum().clamp(min=1)
        total = hidden.new_zeros((), dtype=torch.float32)
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        for start in range(0, hidden.shape[0], CHUNK_ROWS):
            rows = slice(start, start + CHUNK_ROWS)
            part, wanted = hidden[rows], targets[rows]
            logits = (part @ weight.t()).float()
            total += nn.functional.cross_entropy(logits, wanted, ignore_index=-100, reduction="sum")
            gradient = logits.softmax(-1)
            real = (wanted != -100).unsqueeze(1)
            gradient.scatter_add_(1, wanted.clamp(min=0).unsqueeze(1), -real.to(gradient.dtype))
            gradient = gradient.mul_(real / count).to(weight.dtype)
            grad_hidden[rows] = gradient @ weight
            if grad_weight is not None:
                grad_weight.addmm_(gradient.t(), part)
        ctx.save_for_backward(grad_hidden, *([] if grad_weight is None else [grad_weight]))
        return total / count

    @staticmethod
    def backward(ctx: Any, *outer: Any) -> Any:
        grad_hidden, *rest = ctx.saved_tensors
        scale = outer[0]
        return grad_hidden * scale.to(grad_hidden.dtype), rest[0] * scale.to(rest[0].dtype) if rest else None, None


def chunked_loss(model: Any, batch: Batch) -> torch.Tensor:
    """The model's loss without its logits."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    rest = {name: value for name, value in batch.items() if name != "labels"}
    hidden = base.model(**rest, use_cache=False).last_hidden_state[:, :-1]
    targets = batch["labels"][:, 1:].reshape(-1)
    return _ChunkedLoss.apply(hidden.reshape(-1, hidden.shape[-1]), base.lm_head.weight, targets)  # pyright: ignore


@contextmanager
def chunked(inner: Callable[[], AbstractContextManager[Loss]] = plain) -> Generator[Loss]:
    with inner():
        yield chunked_loss


def every_nth(built: Built, n: int) -> AbstractContextManager[Loss]:
    """The first of every n blocks recomputed."""
    return around_blocks(built.layers[::n], functools.partial(checkpoint, use_reentrant=False))


def own_peers(built: Built) -> list[Way]:
    """Every way that needs no library beside those of a usual fine-tuning environment; the plain step first."""
    found = [
        Way("plain", "plain", "nothing", plain, among="few"),
        Way("HF flag", "peer", "gradient_checkpointing_enable(), every layer", lambda: hf_flag(built), among="few"),
        Way("HF every 2", "peer", "every_n_layers=2", lambda: hf_options(built, every_n_layers=2), among="few"),
        Way("HF offload", "peer", "offload=True", lambda: hf_options(built, offload=True), among="all"),
        Way("TRL selective", "peer", "attention kept", lambda: trl_selective(built)),
        Way("TRL offload", "peer", "activation_offloading", lambda: trl_offload(built, flag=False), among="all"),
        Way("TRL offload + flag", "peer", "with the flag", lambda: trl_offload(built, flag=True), among="all"),
        Way("torch SAC", "peer", "matmuls and attention kept, each block", lambda: sac(built)),
        Way("by hand: chunked loss", "peer", f"{CHUNK_ROWS} rows, gradient in forward", chunked, among="few"),
    ]
    for n, which in ((1, "every block"), (2, "every 2nd block"), (3, "every 3rd block")):
        again = functools.partial(chunked, functools.partial(every_nth, built, n))
        found.append(Way(f"by hand: chunked, {which}", "peer", f"chunked loss, {which} recomputed", again, among="few"))
    for budget in (1.0, 0.5, 0.1, 0.0):
        way = CompiledBlocks(built, budget)
        among = "main" if budget in (1.0, 0.1) else "all"
        found.append(
            Way(f"compiled {budget}", "peer", f"activation_memory_budget={budget}", way.around, True, among=among)
        )
    for budget in (1.0, 0.3, 0.0):
        way = CompiledBlocks(built, budget)
        name = f"by hand: chunked, compiled {budget}"
        settings = f"chunked loss, activation_memory_budget={budget}"
        found.append(
            Way(
                name,
                "peer",
                settings,
                functools.partial(chunked, way.around),
                True,
                among="all" if budget == 0.3 else "main",
            )
        )
    way = CompiledBlocks(built, 1.0)
    again = functools.partial(chunked, functools.partial(way.around, recomputed=True))
    found.append(Way("by hand: chunked, compiled, every block", "peer", "and every block recomputed", again, True))
    return found
