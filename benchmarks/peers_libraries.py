"""Peers with packages of their own: torch_remat, ckptplan, rockmate. `requirements-peers.txt` pins them.

Each is used as its documentation shows it, on the blocks of the model. One that is not installed, or does not run here,
is a row with its error.
"""

import copy
import dataclasses
import functools
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from peers import Way, around_blocks, forwards
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import checkpoint
from workloads import Built, Loss, plain_loss

from rematree.measure import storage_bytes

# -- torch_remat


class _DeviceRandom:
    """torch_remat keeps no random state by itself; its README has the caller register this."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def snapshot(self) -> torch.Tensor:
        return torch.cuda.get_rng_state(self._device) if self._device.type == "cuda" else torch.get_rng_state()

    def restore(self, state: torch.Tensor) -> None:
        if self._device.type == "cuda":
            torch.cuda.set_rng_state(state, self._device)
        else:
            torch.set_rng_state(state)


def _annotated(remat: Any, layer: Any, saved: frozenset[str]) -> Callable[..., torch.Tensor]:
    """A decoder layer's forward with regions, as torch_remat's README writes one."""

    def region(function: Callable[..., Any], name: str) -> Callable[..., Any]:
        return remat.region(function, name, recompute=name not in saved)

    def forward(hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        def attend(x: torch.Tensor) -> torch.Tensor:
            return layer.self_attn(hidden_states=x, **kwargs)[0]

        attended = region(attend, "attention")(layer.input_layernorm(hidden_states))
        if "attention" in saved:
            remat.recompute_needs_tensor(attended)
        hidden_states = hidden_states + attended
        fed = region(layer.mlp, "mlp")(layer.post_attention_layernorm(hidden_states))
        if "mlp" in saved:
            remat.recompute_needs_tensor(fed)
        return hidden_states + fed

    return forward


@contextmanager
def remat_regions(built: Built, saved: frozenset[str]) -> Generator[Loss]:
    """Every block a checkpoint of torch_remat, with some of its regions saved."""
    import torch_remat as remat

    device = next(built.model.parameters()).device
    hooks = (_DeviceRandom(device),) if built.workload.dropout else ()
    replaced: dict[nn.Module, Callable[..., Any]] = {}
    for number, layer in enumerate(built.layers):
        wrap = remat.checkpoint(region_name=f"layers.{number}", recompute_state_hooks=hooks)
        replaced[layer] = wrap(_annotated(remat, layer, saved))
    with forwards(replaced):
        yield plain_loss


# -- ckptplan


class _Bound(nn.Module):
    """A block with the keyword arguments of its call: ckptplan hands on what a block returns, and nothing else."""

    def __init__(self, layer: nn.Module, kwargs: dict[str, Any]) -> None:
        super().__init__()
        self.layer = layer
        self._kwargs = kwargs

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.layer(hidden_states, **self._kwargs)


def _first_call(built: Built) -> tuple[torch.Tensor, dict[str, Any]]:
    """What the first block is given."""
    seen: list[tuple[torch.Tensor, dict[str, Any]]] = []

    def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = dict(kwargs)
        hidden = args[0] if args else given.pop("hidden_states")
        seen.append((hidden.detach(), given))

    hook = built.layers[0].register_forward_pre_hook(note, with_kwargs=True)
    try:
        with torch.no_grad():
            plain_loss(built.model, built.batch)
    finally:
        hook.remove()
    return seen[0]


def _kept_bytes(layer: nn.Module, hidden: torch.Tensor) -> int:
    """Bytes autograd keeps of one block beside its weights."""
    kept: list[torch.Tensor] = []
    with saved_tensors_hooks(lambda tensor: (kept.append(tensor.detach()), tensor)[1], lambda tensor: tensor):
        layer(hidden.clone().requires_grad_(True))
    weights = {p.untyped_storage()._cdata for p in (*layer.parameters(), *layer.buffers())}
    return storage_bytes([tensor for tensor in kept if tensor.untyped_storage()._cdata not in weights])


def _single(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.float() if tensor.is_floating_point() else tensor


def ckptplan_blocks(built: Built, share: float) -> list[nn.Module]:
    """The blocks that ckptplan's dynamic program recomputes to save `share` of the activations.

    On a CPU it measures no bytes and refuses to plan; there it is given those that autograd keeps. It takes blocks of
    one dtype only; of others it profiles a float32 copy.
    """
    import ckptplan

    hidden, kwargs = _first_call(built)
    bound = [_Bound(layer, kwargs) for layer in built.layers]
    size = _kept_bytes(bound[0], hidden)
    if len({p.dtype for p in bound[0].parameters() if p.is_floating_point()}) > 1:
        kwargs = tree_map_only(torch.Tensor, _single, kwargs)
        bound = [_Bound(copy.deepcopy(layer).float(), kwargs) for layer in built.layers]
        hidden = hidden.float()
    blocks = ckptplan.declare_blocks(nn.ModuleList(bound), [(f"layer{i}", block) for i, block in enumerate(bound)])
    inputs = (hidden.clone().requires_grad_(True),)
    profiles = ckptplan.profile_blocks(blocks, inputs, device=hidden.device, num_warmup=1, num_trials=1)
    if profiles[0].timing_only:
        known = {"timing_only": False, "activation_bytes_method": "isolated_forward_delta"}
        profiles = tuple(dataclasses.replace(p, **known, activation_bytes_estimate=size) for p in profiles)
    plan = ckptplan.plan_checkpoints(
        profiles,
        blocks,
        target_kind="activation_saving_fraction",
        target_value=share,
        planner="dynamic_programming",
    )
    return [layer for layer, decision in zip(built.layers, plan.decisions, strict=True) if decision.checkpointed]


class _CkptPlan:
    """ckptplan's choice, made the first time and kept."""

    def __init__(self, built: Built, share: float) -> None:
        self._built = built
        self._share = share
        self._chosen: list[nn.Module] | None = None

    def around(self) -> AbstractContextManager[Loss]:
        if self._chosen is None:
            self._chosen = ckptplan_blocks(self._built, self._share)
        return around_blocks(self._chosen, functools.partial(checkpoint, use_reentrant=False))


# -- rockmate


class _Rockmate:
    """The decoder under rockmate's schedule. It wants a module of tensors, so it gets the stack of blocks."""

    def __init__(self, built: Built, share: float) -> None:
        self._built = built
        self._share = share
        self._made: Any = None

    @contextmanager
    def around(self) -> Generator[Loss]:
        if self._made is None:
            import rockmate

            hidden, kwargs = _first_call(self._built)
            stack = nn.Sequential(*[_Bound(layer, kwargs) for layer in self._built.layers])
            size = sum(_kept_bytes(block, hidden) for block in stack)
            self._made = rockmate.Rockmate(stack, (hidden.requires_grad_(True),), int(size * self._share))
        made, layers = self._made, self._built.layers
        passes = {layer: lambda hidden_states, **_: hidden_states for layer in layers[1:]}
        with forwards({layers[0]: lambda hidden_states, **_: made(hidden_states), **passes}):
            yield plain_loss


def library_peers(built: Built) -> list[Way]:
    """The ways of the three packages, whether they are installed or not."""
    remat = [
        ("torch_remat", frozenset[str](), "checkpoint() around each block"),
        ("torch_remat, attention", frozenset({"attention"}), "attention a region with recompute=False"),
        ("torch_remat, README", frozenset({"attention", "mlp"}), "attention and mlp regions with recompute=False"),
    ]
    found = [
        Way(
            name,
            "peer",
            settings,
            functools.partial(remat_regions, built, saved),
            among="main" if saved == {"attention"} else "all",
        )
        for name, saved, settings in remat
    ]
    for share in (0.5, 0.75, 1.0):
        settings = f"dynamic programming, activation_saving_fraction={share}"
        found.append(
            Way(
                f"ckptplan {share}",
                "peer",
                settings,
                _CkptPlan(built, share).around,
                among="main" if share == 0.75 else "all",
            )
        )
    settings = "Rockmate(blocks, budget: half of the saved activations)"
    found.append(Way("rockmate", "peer", settings, _Rockmate(built, 0.5).around, among="all"))
    return found
