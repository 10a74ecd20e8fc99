"""What is observed of a model and a batch before anything is asked: the step on fake tensors, prices, options."""

import dataclasses
import gc
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import nn

from rematree.engines import any_partitioned, any_sharded, refuse_copies, refuse_spread, without_engine
from rematree.errors import UnsupportedModelError, UsageError
from rematree.execute.loss.head import is_sharded_alone
from rematree.execute.own_compile import refuse_compiled
from rematree.fingerprint import describe_batch, describe_model
from rematree.memory.found import found_optimizer
from rematree.memory.optimizers import Found, Optimizer
from rematree.observation.observe import Twin
from rematree.observation.running import running_chain
from rematree.planning.compile_profile import Profiler
from rematree.planning.heads import survey_heads, tokens_of
from rematree.planning.pace import is_live, is_measured, measure_pace
from rematree.planning.scaling import scaled
from rematree.planning.settings import Settings
from rematree.planning.survey import Survey, survey
from rematree.plans import Fingerprint, Levers
from rematree.pricing.cost import Cost, Measured
from rematree.pricing.devices import overhead_of
from rematree.pricing.price import Overhead
from rematree.referee.folding import block_kinds
from rematree.referee.ranks import Ranks, base_optimizer, ranks_of
from rematree.referee.simulate import Referee
from rematree.regions import Chain, find_chain
from rematree.units import KIB

HOST_BYTES: Final = 256 * KIB  # small host tensors a step makes outside the model: loss sums, generator states


@dataclass(frozen=True)
class Observed:
    """One model and batch, surveyed.

    Attributes:
        twin: The model on fake tensors, with the batch.
        cost: Prices ops.
        overhead: Bytes the device needs beside the tensors of any step.
        referee: Runs the step under levers.
        survey: The options there are, in numbers.
        fingerprint: What a plan will be for.
        ranks: Over which ranks the step is distributed.
        is_scaled: Whether the survey is that of a batch of another size, scaled.
    """

    twin: Twin
    cost: Cost
    overhead: Overhead
    referee: Referee
    survey: Survey
    fingerprint: Fingerprint
    ranks: Ranks | None
    is_scaled: bool = False

    @property
    def fixed_bytes(self) -> int:
        """What there is beside the tensors of the step, whatever is decided."""
        return HOST_BYTES + self.overhead.library_bytes + self.overhead.context_bytes

    def for_batch(self, batch: Mapping[str, Any]) -> "Observed":
        """The same of `batch`, the same tensors in other shapes; see `Planner.for_batch`."""
        twin, eager = self.twin.with_batch(batch), self.survey.eager()
        return dataclasses.replace(
            self,
            twin=twin,
            referee=self.referee.for_twin(twin),
            survey=scaled(eager, tokens_of(batch) / tokens_of(self.twin.batch)),
            fingerprint=_made_for(self.fingerprint, batch, twin),
            is_scaled=True,
        )


def _made_for(fingerprint: Fingerprint, batch: Mapping[str, Any], twin: Twin) -> Fingerprint:
    """`fingerprint` with `batch`, as `twin` sees it."""
    left_out = tuple(sorted(set(batch).difference(twin.batch)))
    return dataclasses.replace(fingerprint, batch=describe_batch(batch), left_out=left_out)


def _known(
    optimizer: Optimizer | Found | torch.optim.Optimizer, model: nn.Module, device_type: str
) -> Optimizer | Found:
    """What `optimizer` keeps.

    Raises:
        UsageError: that is not known.
    """
    if not isinstance(optimizer, torch.optim.Optimizer):
        return optimizer
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    found = found_optimizer(base_optimizer(optimizer), trained, device_type)
    if found is None:
        raise UsageError(
            f"what {type(base_optimizer(optimizer)).__name__} keeps is not known",
            remedies=[f'optimizer="{kind}", if it keeps as much' for kind in ("adamw", "adamw_8bit", "sgd")],
        )
    return found


def _measured(device: torch.device) -> Measured:
    """Prices of what ops take on `device`.

    Raises:
        UsageError: no clock waits for it.
    """
    if device.type not in ("cpu", "cuda"):
        raise UsageError(
            f"what ops take on {device.type} is measured nowhere yet, so a plan for it would mean nothing",
            remedies=["pass cost=, say a Roofline of its published rates", "the model on a CPU or a CUDA device"],
        )
    return Measured(device)


def _chain_of(twin: Twin) -> tuple[Chain, dict[str, int]]:
    """The largest list of blocks that runs with this batch, and a number for each; equal ones do the same.

    The largest of all may not: a batch of text alone leaves a vision tower out.

    Raises:
        UnsupportedModelError: no block runs exactly once.
    """
    idle: list[str] = []
    while True:
        found = find_chain(twin.model, idle)
        kinds = dict(zip(found.blocks, block_kinds(twin.model, found.blocks), strict=True))
        try:
            return running_chain(twin, found, kinds), kinds
        except UnsupportedModelError:
            if found.container is None:
                raise
            idle.append(found.container)


def observe(model: nn.Module, batch: Mapping[str, Any], settings: Settings) -> Observed:
    """Observe a step of `model` on `batch`, and survey its options.

    Raises:
        UsageError: nothing is trained, or a user or an engine has made of the model what a plan cannot be for.
        UnsupportedModelError: the model cannot be observed, or its adapter is prefix tuning.
    Cost:
        That of `Planner`.
    """
    ranks = ranks_of(model) if settings.ranks is None else settings.ranks
    refuse_copies(model)
    model = without_engine(model)
    refuse_spread(model)
    if not any(p.requires_grad for p in model.parameters()):
        raise UsageError("no parameter of the model requires grad: there is no training step to plan")
    refuse_compiled(model)
    twin = Twin(model, batch, settings.loss, device=settings.device, capability=settings.capability)
    fingerprint = _made_for(dataclasses.replace(describe_model(model), device=twin.device.type), batch, twin)
    if not twin.model.training:
        twin.model.train()
    cost = settings.cost if settings.cost is not None else _measured(twin.device)
    chain, kinds = _chain_of(twin)
    referee = Referee(
        twin,
        chain.blocks,
        cost,
        _known(settings.optimizer, model, twin.device.type),
        settings.accumulation_steps > 1,
        kinds=[kinds[path] for path in chain.blocks],
        ranks=ranks,
        clips=settings.clips,
    )
    plain = referee.run(Levers())
    whole = not (any_sharded(model) or any_partitioned(model))
    runs = is_measured(cost) and is_live(model, twin.device) and whole
    pace = measure_pace(model, referee, plain) if runs else {}
    live = model if runs and settings.loss is None else None
    chunk = settings.may("chunked_loss") and settings.loss is None and not is_sharded_alone(model)
    heads = survey_heads(referee, chain, plain, chunk=chunk, live=live)
    if live is not None:  # once more, some seconds later: a machine's speed changes, and a step sees all of it
        again = measure_pace(model, referee, plain)
        pace = {kind: (ratio + again.get(kind, ratio)) / 2 for kind, ratio in pace.items()}
    referee.pace, referee.head_pace = pace, heads.pace
    plain = referee.paced(plain)
    if plain.head.seconds > 0:
        plain = plain.with_head(heads.plain_seconds / plain.head.seconds)
    around_modules = ranks is not None and ranks.engine == "zero3"  # Python around every module, which no graph holds
    options = survey(
        referee,
        chain,
        plain,
        heads,
        lean=settings.may("lean_adapters"),
        slices=settings.may("sliced_attention"),
        # Their all-gathers are not priced, so a plan takes none but those of the step itself.
        groups=settings.may("groups") and not (ranks and ranks.gathers_for_groups),
        compiler=Profiler(model, settings.steps) if settings.compiles and not around_modules else None,
    )
    if runs and twin.device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()  # what was measured with, which the step needs
    return Observed(twin, cost, overhead_of(cost, twin.device.type), referee, options, fingerprint, ranks)
