"""What the ranks of the tests do under DeepSpeed's ZeRO-2 or -3: as `ranked`, with its engine in place of a wrapper."""

import copy
import gc
import logging
import os
import warnings
from typing import Any

import torch
from torch import nn

import ranked
import rematree
from rematree.fingerprint import describe_model
from rematree.gloo import Settling
from rematree.measure import PeakMeter, storage_bytes
from rematree.plans import Levers, Plan
from rematree.referee.ranks import Ranks, base_optimizer, ranks_of


def engine_of(model: nn.Module, ranks: Ranks, rows: int = 2, accumulation_steps: int = 1) -> Any:
    """DeepSpeed's engine around `model`, as its users make it; on a CPU it wants to be told to take torch's AdamW."""
    os.environ.update(DS_ACCELERATOR="cpu", LOCAL_RANK="0")
    import deepspeed  # pyright: ignore[reportMissingImports]

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    if not deepspeed.comm.is_initialized():
        deepspeed.init_distributed(dist_init_required=False)
    settings = settings_of(ranks)
    config = {
        "train_micro_batch_size_per_gpu": rows,
        "gradient_accumulation_steps": accumulation_steps,
        "zero_optimization": settings,
        "gradient_clipping": 0.0,  # 1.0 where nothing is said; the processes this is compared with do not clip
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": next(p for p in model.parameters() if p.requires_grad).dtype is torch.bfloat16},
    }
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, fused=True)
    return deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]


def settings_of(ranks: Ranks) -> dict[str, Any]:
    """DeepSpeed's `zero_optimization`."""
    if ranks.engine == "zero2":
        return {"stage": 2, "reduce_bucket_size": ranks.bucket_elements, "overlap_comm": ranks.overlaps}
    return {
        "stage": 3,
        "reduce_bucket_size": ranks.bucket_elements,
        "stage3_prefetch_bucket_size": ranks.stage3.prefetch,
        "stage3_param_persistence_threshold": ranks.stage3.persistence_threshold,
        "stage3_max_live_parameters": ranks.stage3.max_live,
        "stage3_max_reuse_distance": ranks.stage3.max_reuse,
    }


def weights_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """All of them, whole."""
    import deepspeed  # pyright: ignore[reportMissingImports]

    with deepspeed.zero.GatheredParameters(list(model.parameters())):  # of ZeRO-2 they are whole
        return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def step(engine: Any, batch: dict[str, torch.Tensor]) -> float:
    """Forward, backward, step; the loss."""
    loss = engine(**batch).loss
    engine.backward(loss)
    engine.step()
    return loss.item()


def exactness(rank: int, ranks: Ranks, lora: bool, kind: str, first: bool) -> dict[str, Any]:
    """Losses, weights and numbers of collectives of three steps, dropout on, with the plan and without."""
    found: dict[str, Any] = {}
    begun = ranked.tiny(lora)
    for name in ("engine", "planned"):
        model, handle = copy.deepcopy(begun), None
        plan = Plan.of(levers(model, kind), describe_model(model))
        if name == "planned" and first:
            handle = rematree.apply(plan, model)
        engine = engine_of(model, ranks)
        if name == "planned" and not first:
            handle = rematree.apply(plan, engine)
        torch.manual_seed(7 + rank)
        with ranked.Collectives() as collectives:
            losses = [step(engine, batch(number, rank, ranks)) for number in range(3)]
        if handle is not None:
            handle.remove()
        found[name] = {"losses": losses, "weights": weights_of(model)}
        found[name]["collectives"] = dict(collectives.count)
        found["ranks"] = ranks_of(engine)
        engine.destroy()
    return found


def levers(model: nn.Module, kind: str) -> Levers:
    """As `ranked.levers`; "lean": every adapter."""
    if kind == "lean":
        return Levers(lean=tuple(path for path, m in model.named_modules() if hasattr(m, "lora_A")))
    return ranked.levers(model, kind)


def batch(number: int, rank: int, ranks: Ranks) -> dict[str, torch.Tensor]:
    """This rank's rows of a batch of four."""
    ids = torch.randint(3, 151, (4, 32), generator=torch.Generator().manual_seed(number))[rank :: ranks.count]
    return {"input_ids": ids, "labels": ids}


def losses(rank: int, ranks: Ranks, lora: bool, plan: Plan, steps: int) -> list[float]:
    """As `ranked.losses`."""
    engine = engine_of(ranked.sizeable(lora), ranks, 4 // ranks.count)
    with rematree.apply(plan, engine):
        found = [step(engine, batch(0, rank, ranks)) for _ in range(steps)]
    engine.destroy()
    return found


def peak(
    rank: int,
    ranks: Ranks,
    lora: bool,
    plan: Plan,
    batch: dict[str, torch.Tensor],
    accumulates: bool = False,
    dtype: torch.dtype = torch.float32,
) -> int:
    """As `ranked.peak`: measured bytes of a rank in its last step of some, or in the last micro-batch of that."""
    model, settling = ranked.sizeable(lora).to(dtype), Settling()
    engine = engine_of(model, ranks, len(batch["input_ids"]), 2 if accumulates else 1)
    with warnings.catch_warnings(), rematree.apply(plan, engine):
        warnings.simplefilter("ignore")
        settling.every_collective_of_deepspeed()
        peaks: list[int] = []
        for _ in range(2 if ranks.engine == "zero2" else 3):  # ZeRO-3 knows the order of modules from the second on
            if accumulates:
                step(engine, batch)
            gc.collect()
            settling.now()
            # What an earlier micro-batch has left is ZeRO-2's, and in nothing that the meter is given.
            left: dict[Any, Any] = getattr(engine.optimizer, "all_grad_tensors", {})
            earlier = storage_bytes(t for group in left.values() for t in group or ())
            stepped = engine.optimizer if ranks.engine == "zero3" else base_optimizer(engine.optimizer)
            with PeakMeter(model, stepped, batch, hidden=True) as meter:
                step(engine, batch)
            peaks.append(meter.peak_bytes + earlier)
    engine.destroy()
    return peaks[-1]


def planned_here(rank: int, ranks: Ranks) -> dict[str, Any]:
    """What the planner reads off a model that is under the engine already; and steps of an engine it has measured."""
    found: dict[str, Any] = {}
    for name in ("left alone", "measured"):
        model = ranked.tiny(False)
        engine = engine_of(model, ranks)
        if name == "measured":
            found["plan"] = ranked.quick_plan(engine, ranked.LONG)
            found["levers"] = rematree.plan(engine, ranked.LONG, None, forbid=("groups", "compile")).levers
        step(engine, batch(0, rank, ranks))
        found[name] = weights_of(model)
        engine.destroy()
    return found


def gathers(rank: int, ranks: Ranks, lora: bool, plan: Plan, batch: dict[str, torch.Tensor]) -> int:
    """All-gathers of one step, when the engine knows the order of modules."""
    engine = engine_of(ranked.sizeable(lora), ranks, len(batch["input_ids"]))
    with rematree.apply(plan, engine):
        for _ in range(3):
            step(engine, batch)
        with ranked.Collectives() as collectives:
            step(engine, batch)
    engine.destroy()
    return collectives.count["allgather_base"]
