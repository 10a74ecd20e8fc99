"""What a plan says in words beside its numbers: what changes, what is left out, and for whom it is."""

from torch import nn

from rematree.execute.attention_slices import is_core
from rematree.execute.norms import is_norm
from rematree.planning.survey import Survey
from rematree.plans import Levers
from rematree.quantised import frozen_int8_linears
from rematree.referee.ranks import Ranks


def notes_on(known: Survey, levers: Levers, model: nn.Module, ranks: Ranks | None, gathers: int) -> tuple[str, ...]:
    """One line for each thing to know about a plan.

    Args:
        known: What the plan was chosen from.
        levers: What it does.
        model: It, or its twin.
        ranks: Over which ranks the step is distributed.
        gathers: All-gathers of a step under it, if ZeRO-3 gathers.
    """
    notes = [known.chain.note] if known.chain.note else []
    if ranks is not None:
        notes.append(f"for {ranks}; all bytes are those of one rank")
        if ranks.gathers_for_groups:
            notes.append(
                f"no groups of blocks: recomputing one would gather weights that {ranks.title} has sharded again"
            )
        if gathers:
            notes.append(f"{gathers} all-gathers a step; {known.plain.gathers} without the plan")
    released = len(frozen_int8_linears(model))
    if released:
        notes.append(f"{released} Linear8bitLt layers keep no input for backward, which plain bitsandbytes would")
    cores = [path for path in levers.lean if is_core(path)]
    layers = [path for path in levers.lean if not is_core(path)]
    if layers:
        norms = sum(is_norm(model.get_submodule(path)) for path in layers)
        beside = f", and {norms} norms" if norms else ""
        lean = f"{len(layers) - norms} LoRA layers{beside} are lean"
        notes.append(f"{lean}: one input, shared and in its own dtype; exact")
    if cores:
        said = f"{len(cores)} attentions in slices: changes rounding, and gives no weights"
        notes.append(f"{said}; forbid with 'sliced_attention'")
    if levers.loss_chunk_rows is not None:
        said = f"chunked loss, {levers.loss_chunk_rows} rows at a time: changes rounding"
        notes.append(f"{said}; forbid with 'chunked_loss'")
    return (*notes, *known.compiled.notes(levers.compiled, model))
