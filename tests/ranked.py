"""What the ranks of the tests do: a model under an engine, a plan on it, gradients, losses, peaks."""

import collections
import copy
import gc
import warnings
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.utils._python_dispatch import TorchDispatchMode

import rematree
from models import batch_for, build, with_lora
from rematree.execute.loss.head import find_head
from rematree.execute.loss.logit_rows import LogitRows
from rematree.fingerprint import describe_model
from rematree.gloo import Settling
from rematree.measure import PeakMeter
from rematree.plans import Action, Decision, Levers, Plan
from rematree.pricing.roofline import Roofline
from rematree.referee.ranks import Ranks

LONG = batch_for(nn.Module())


def tiny(lora: bool) -> nn.Module:
    model = build("llama")
    return with_lora(model) if lora else model.train()


def smallest() -> nn.Module:
    """All of its weights train; planned quickly."""
    return build("llama", layers=2).train()


def sizeable(lora: bool) -> nn.Module:
    """Large enough for a block to weigh more than a logit."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=96, intermediate_size=256, num_hidden_layers=8, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=400, max_position_embeddings=128, pad_token_id=0,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    return with_lora(model, r=8, lora_dropout=0.0) if lora else model.train()  # ranks would draw other masks


def wrapped(model: nn.Module, ranks: Ranks, *, sync: bool = True) -> nn.Module:
    """`model` under the engine of `ranks`, as its users do it; without `sync` DDP sends no weights around."""
    if ranks.engine == "ddp":
        return nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=ranks.bucket_view, init_sync=sync)
    for module in [m for m in model.modules() if type(m).__name__ == "LlamaDecoderLayer"]:
        fully_shard(module, reshard_after_forward=ranks.reshard)
    fully_shard(model)
    return model


def levers(model: nn.Module, kind: str) -> Levers:
    """Decisions for the first three of four layers."""
    layers = [path for path, m in model.named_modules() if type(m).__name__ == "LlamaDecoderLayer"]
    match kind:
        case "blocks":
            return Levers(dict.fromkeys(layers[:3], Decision(Action.RECOMPUTE)))
        case "attention saved":
            inner = {f"{path}.self_attn": Decision(Action.SAVE, stash=True) for path in layers}
            return Levers({**dict.fromkeys(layers, Decision(Action.RECOMPUTE)), **inner})
        case "group":
            return Levers(groups=(tuple(layers[:3]),))
        case _:
            raise ValueError(kind)


def gradients(model: nn.Module, step: nn.Module, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Loss (as "loss") and every gradient, whole, of a step of `step`, which runs `model`."""
    torch.manual_seed(7)
    loss = step(**batch, use_cache=False).loss
    loss.backward()
    found = {"loss": loss.detach().clone()}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            whole = getattr(parameter.grad, "full_tensor", parameter.grad.clone)
            found[name] = whole()
    model.zero_grad()
    return found


def extra(model: nn.Module, step: nn.Module, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """`gradients` with something added to the loss that reads the logits, as a distillation does."""

    class Read(nn.Module):
        def forward(self, **inputs: Any) -> Any:
            out = step(**inputs)
            return SimpleNamespace(loss=out.loss + out.logits.logsumexp(-1).mean())

    return gradients(model, Read(), batch)


class Collectives(TorchDispatchMode):
    """Counts them by name."""

    def __init__(self) -> None:
        super().__init__()
        self.count: collections.Counter[str] = collections.Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            self.count[func.__name__.partition(".")[0].strip("_")] += 1
        return func(*args, **(kwargs or {}))


def exactness(rank: int, ranks: Ranks, lora: bool, kind: str, first: bool, same: bool) -> dict[str, Any]:
    """Gradients of the engine with the plan, of the engine alone, and of a process alone; and the all-gathers."""
    model = tiny(lora)
    batch = batch_for(model)
    if not same and rank:
        batch["input_ids"] = batch["input_ids"].flip(1)
    alone, plain = copy.deepcopy(model), copy.deepcopy(model)
    plan = Plan.of(levers(model, kind), describe_model(model))
    found: dict[str, Any] = {"alone": gradients(alone, alone, batch)}
    under = wrapped(plain, ranks)
    with Collectives() as without:
        found["engine"] = gradients(plain, under, batch)
    if first:
        handle = rematree.apply(plan, model)
        under = wrapped(model, ranks)
    else:
        under = wrapped(model, ranks)
        handle = rematree.apply(plan, under)
    with Collectives() as with_plan:
        found["planned"] = gradients(model, under, batch)
    again = gradients(model, under, batch)
    handle.remove()
    found["repeated"] = all(torch.equal(again[name], tensor) for name, tensor in found["planned"].items())
    found["more gathers"] = with_plan.count["allgather_base"] - without.count["allgather_base"]
    found["more reduces"] = sum(with_plan.count[n] - without.count[n] for n in ("allreduce", "reduce_scatter_base"))
    return found


def chunked(rank: int, ranks: Ranks, unit: str) -> dict[str, Any]:
    """Gradients with the loss in chunks and without, how often all logits were made, and whether it was chunked.

    Args:
        rank: Of this process.
        ranks: The engine. DDP looks for parameters without a gradient, as the Trainer has it where there are adapters.
        unit: Of FSDP2 that the head is in: "root" or "head".
    """
    model = tiny(lora=True)
    batch = batch_for(model)
    plain = copy.deepcopy(model)

    def under(module: nn.Module) -> nn.Module:
        if ranks.engine == "ddp":
            return nn.parallel.DistributedDataParallel(module, find_unused_parameters=True)
        if unit == "head":
            found = find_head(module)
            assert found is not None
            fully_shard(found[1])
        return wrapped(module, ranks)

    alone = under(plain)
    found: dict[str, Any] = {"engine": gradients(plain, alone, batch), "engine extra": extra(plain, alone, batch)}
    step, made = under(model), list[int]()
    real = LogitRows.real

    def spy(rows: LogitRows, **options: bool) -> torch.Tensor:
        made.append(rows.hidden.shape.numel())
        return real(rows, **options)

    with warnings.catch_warnings(record=True) as said, pytest.MonkeyPatch.context() as patch:
        warnings.simplefilter("always")
        patch.setattr(LogitRows, "real", spy)
        with rematree.apply(Plan.of(Levers(loss_chunk_rows=16), describe_model(model)), step):
            found["chunked"] = gradients(model, step, batch)
            found["made"] = [*made]
            found["chunked extra"] = extra(model, step, batch)
    found["offered"] = rematree.Planner(step, batch, cost=roofline(), forbid=("groups",)).survey.rows
    return found | {"void": any("no effect" in str(each.message) for each in said)}


def losses(rank: int, ranks: Ranks, lora: bool, plan: Plan, steps: int) -> list[float]:
    """Losses of this rank's half of each batch, over some steps of AdamW."""
    model = sizeable(lora)
    under = wrapped(model, ranks)
    with rematree.apply(plan, under):
        return train(under, model, steps, slice(rank, None, ranks.count))


def train(under: nn.Module, model: nn.Module, steps: int, rows: slice) -> list[float]:
    """Losses over some steps of AdamW on `rows` of one batch."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, fused=True)
    found: list[float] = []
    for _ in range(steps):
        ids = torch.randint(3, 151, (4, 32), generator=torch.Generator().manual_seed(0))
        loss = under(input_ids=ids[rows], labels=ids[rows]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    return found


def peak(
    rank: int, ranks: Ranks, lora: bool, plan: Plan, batch: dict[str, torch.Tensor], accumulates: bool = False
) -> int:
    """Measured bytes of a rank in its second step, or, if it accumulates, in the last micro-batch of that.

    DDP's buckets, which no tensor shows, are what wrapping leaves.

    Wrapping would send all weights around in one flat copy; what gloo's thread frees is not seen, so it does not.
    """
    model, settling = sizeable(lora), Settling()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the profiler's, of cycles it was not asked to keep
        with PeakMeter(model, None, batch) as wrapping:
            under = wrapped(model, ranks, sync=False)
        settling.every_collective_of(model)
        buckets = wrapping.end_bytes - wrapping.start_bytes if ranks.engine == "ddp" else 0
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], fused=True)
        with rematree.apply(plan, under):
            peaks: list[int] = []
            for _ in range(2):
                if accumulates:
                    under(**batch).loss.backward()
                gc.collect()
                settling.now()
                with PeakMeter(model, optimizer, batch, hidden=True) as meter:
                    under(**batch).loss.backward()
                    optimizer.step()
                    optimizer.zero_grad()
                peaks.append(meter.peak_bytes)
    return peaks[-1] + buckets


def quick_plan(model: nn.Module, batch: dict[str, torch.Tensor], ranks: Ranks | None = None) -> Plan:
    forbid = ("chunked_loss", "groups", "lean_adapters")
    return rematree.plan(model, batch, None, ranks=ranks, cost=roofline(), forbid=forbid)


def planned_here(rank: int, ranks: Ranks) -> dict[str, Any]:
    """What the planner reads off a model that is under the engine already, and what all ranks agree on."""
    plan = quick_plan(wrapped(smallest(), ranks), LONG)

    def for_batch(tokens: int, model: str = "") -> Plan:
        shape = (("input_ids", (2, tokens), "int64"),)
        return replace(plan, fingerprint=replace(plan.fingerprint, batch=shape, trainable=model))

    def too_small() -> Plan:
        if rank == 1:
            raise rematree.InfeasibleBudgetError("too small", budget=1, min_peak=2)
        return plan

    found: dict[str, Any] = {"plan": plan, "agreed": rematree.agreed_plan(lambda: for_batch(16 * (rank + 1)))}
    try:
        rematree.agreed_plan(too_small)
    except rematree.RematreeError as error:
        found["error"] = type(error).__name__, error.message, error.__notes__
    try:
        rematree.agreed_plan(lambda: for_batch(16 // (1 - rank)))
    except rematree.RematreeError as error:
        found["broken"] = f"{type(error).__name__}: {error.message.split(': ')[1]}"
    except ZeroDivisionError:
        found["broken"] = "ZeroDivisionError"
    try:
        rematree.agreed_plan(lambda: for_batch(8, f"model {rank}"))
    except rematree.PlanMismatchError as error:
        found["mismatch"] = error.message
    return found


def roofline() -> Roofline:
    return Roofline(1e11, 1e10)


def everything(rank: int, tasks: list[tuple[Any, ...]]) -> list[Any]:
    """All of `tasks`, each (function, arguments after the rank), in one group of processes."""
    return [function(rank, *args) for function, *args in tasks]
