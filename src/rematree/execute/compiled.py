"""Compiled blocks: a block's forward and backward as two graphs of torch.compile, shared by all blocks like it.

torch's partitioner decides what such a block keeps for backward. Its activation memory budget says how much: 1.0 what
makes the block fastest, 0.0 as good as nothing but its input. It is set per block and only while that block is
compiled; nothing global is left changed.

What is computed is what the block computes, fused: sums are rounded elsewhere, so results differ in the last bits.
Random numbers do not: dropout draws from torch's own generator in the order of the plain block (`fallback_random`).
"""

import contextlib
import functools
import os
import shutil
import time
import types
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, Protocol, cast

import torch
from torch import nn
from torch.utils._python_dispatch import is_in_any_mode_without_ignore_compile_internals
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from rematree.errors import UnsupportedModelError
from rematree.execute.context import builds_graph
from rematree.execute.override import ForwardOverride
from rematree.pricing.cost import present_device
from rematree.regions import block_kind

WITHOUT_COMPILER: Final = ("plan with forbid=['compile'], or --forbid compile",)
_FOREIGN: Final = "its forward is wrapped by another library"


def why_not_compiled(block: nn.Module) -> str | None:
    """Why `block` cannot be compiled by this library, as far as that shows without compiling it; else None."""
    return _FOREIGN if _foreign_forward(block) else None


def why_no_compiler(device: torch.device) -> str | None:
    """Why nothing can be compiled for `device` on this machine, or None.

    Only what can be known without compiling: a compiler that is switched off (torch then runs the blocks uncompiled
    and tells nobody), Python and platform, and a compiler for what torch generates.
    """
    if os.environ.get("TORCHDYNAMO_DISABLE") == "1":
        return "torch.compile is switched off by TORCHDYNAMO_DISABLE=1"
    from torch._dynamo.eval_frame import check_if_dynamo_supported
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler
    from torch.utils._triton import has_triton

    try:
        check_if_dynamo_supported()
    except RuntimeError as error:
        return str(error).strip().partition("\n")[0]
    if device.type == "cuda":
        if not has_triton():
            return "torch.compile needs triton on a GPU"
        told = os.environ.get("CC")
        compilers = [told] if told else ["gcc", "clang"]  # as triton looks for one, for a few lines of C
        found = any(map(shutil.which, compilers))
        return None if found else f"no C compiler found, which triton needs ({' or '.join(compilers)})"
    if device.type != "cpu":
        return f"not tried on a device of type {device.type}"
    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        return "no C++ compiler found (g++, or what CXX names)"
    return None


class BlockCompiler(Protocol):
    """Runs compiled blocks, or what stands for them on fake tensors."""

    def run(self, path: str, block: nn.Module, inner: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        """Call the compiled form of `inner`, the forward of `block` at `path`."""
        ...


class CompiledBlocks:
    """Compiled forwards of some blocks of one model; nothing is compiled before a block is first called in training.

    Blocks of one kind and budget share one compilation for the sizes of the first batch, and a second one for all
    other lengths and batch sizes from 2 on, if there are any (sizes are symbols in it, which costs some 15 % of its
    speed); a mask where there was none, or a batch of one row, is compiled once more.

    Args:
        model: Holds the blocks.
        budgets: Module path of a block -> activation memory budget of its partitioner, 0..1.
    Attributes:
        seconds: Of every compilation so far, in the compiler behind the tracing.
    Raises:
        UnsupportedModelError: a block cannot be compiled, or nothing can here.
    """

    def __init__(self, model: nn.Module, budgets: Mapping[str, float]) -> None:
        self.seconds: list[float] = []
        self._shared: dict[Any, Callable[..., Any]] = {}
        self._of_block: dict[str, Callable[..., Any]] = {}
        for path, budget in budgets.items():
            block = model.get_submodule(path)
            key = (block_kind(block), budget)
            reason = why_not_compiled(block)
            if reason is None and key not in self._shared:
                reason = why_no_compiler(present_device(block.parameters()))
            if reason is not None:
                raise UnsupportedModelError(f"{path} cannot be compiled: {reason}", remedies=WITHOUT_COMPILER)
            if key not in self._shared:
                self._shared[key] = compiled_forward(budget, self.seconds)
            self._of_block[path] = self._shared[key]

    def run(self, path: str, block: nn.Module, inner: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        """Call the compiled form of `inner`, the forward of `block`; `inner` itself where no graph is built (R7).

        Raises:
            UnsupportedModelError: it does not compile.
        """
        if not block.training or not builds_graph(block, args, kwargs):
            return inner(*args, **kwargs)
        return call_compiled(path, self._of_block[path], block, args, kwargs)


def compiled_forward(budget: float, seconds: list[float]) -> Callable[..., Any]:
    """A function of a block and its arguments that is compiled with `budget`; blocks of one kind share the result.

    Args:
        budget: Activation memory budget of the partitioner, 0..1.
        seconds: Gets the time of each compilation.
    """
    return _BySizes(functools.partial(_compiled, budget, seconds))


def _compiled(budget: float, seconds: list[float], dynamic: bool) -> Callable[..., Any]:
    # torch keeps compiled code with the code object, and layers of all of transformers share one: a copy starts empty.
    code = _forward_of.__code__.replace(co_name="compiled_block")
    function = types.FunctionType(code, _forward_of.__globals__, "compiled_block")
    return _QuietAtFirst(torch.compile(function, backend=_Compiler(budget, seconds), fullgraph=True, dynamic=dynamic))


class _BySizes:
    """Code for the sizes of the first call, and other code, for whatever size, for all calls of other sizes.

    Args:
        compiled: Gives a function that is compiled for symbolic sizes (True) or for those it meets (False).
    """

    def __init__(self, compiled: Callable[[bool], Callable[..., Any]]) -> None:
        self._fixed = compiled(False)
        self._any = compiled(True)
        self._sizes: list[torch.Size] | None = None

    def __call__(self, block: nn.Module, *args: Any, **kwargs: Any) -> Any:
        sizes = [leaf.shape for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        if self._sizes is None:
            self._sizes = sizes
        run = self._fixed if sizes == self._sizes else self._any
        return run(block, *args, **kwargs)


def call_compiled(
    path: str, function: Callable[..., Any], block: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> Any:
    """Call `function`, from `compiled_forward`, for `block`.

    Raises:
        UnsupportedModelError: it does not compile.
    """
    from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException

    args, kwargs = _all_trained(args, kwargs)
    try:
        with _no_mode_remembered():
            return function(block, *args, **kwargs)
    except (TorchDynamoException, FailOnRecompileLimitHit) as error:
        cause = getattr(error, "inner_exception", error)  # what torch's compiler failed with
        reason = next((line for line in str(cause).splitlines() if line.strip()), type(cause).__name__)
        raise UnsupportedModelError(
            f"{path} cannot be compiled: {reason.strip()}", remedies=WITHOUT_COMPILER
        ) from error


def _no_mode_remembered() -> contextlib.AbstractContextManager[None]:
    """Have torch look for dispatch modes where they are, on this thread's stack, if it remembers one that is not there.

    torch keeps one flag for all threads. Modes that end in another order than they began, as those of two threads do,
    leave it set for good, and then nothing is compiled any more and nobody is told.
    """
    if torch._C._len_torch_dispatch_stack() or not is_in_any_mode_without_ignore_compile_internals():
        return contextlib.nullcontext()
    from torch._dynamo import config

    return config.patch(inline_torch_dispatch_torch_compile=True)  # pyright: ignore[reportAttributeAccessIssue]


def _forward_of(block: Any, *args: Any, **kwargs: Any) -> Any:
    return type(block).forward(block, *args, **kwargs)


class _QuietAtFirst:
    """A compiled function whose first call, which compiles, does not pass on what tracing reads off its inputs."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function
        self._called = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._called:
            return self._function(*args, **kwargs)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # torch, of itself, while its compiler is loaded
            warnings.filterwarnings("ignore", "The .grad attribute of a Tensor that is not a leaf", UserWarning)
            out = self._function(*args, **kwargs)
        self._called = True
        return out


class _Compiler:
    """torch's own compiler, with one budget for what it keeps from forward to backward."""

    def __init__(self, budget: float, seconds: list[float]) -> None:
        self._budget = budget
        self._seconds = seconds

    def __call__(self, graph: Any, inputs: Any) -> Any:
        from torch._functorch import config
        from torch._inductor.compile_fx import compile_fx

        from rematree.execute.partition import Partitioner

        start = time.perf_counter()
        with cast("Any", config).patch(activation_memory_budget=self._budget):
            patches = {"fallback_random": True, "custom_partitioner_fn": Partitioner(self._budget)}
            compiled = compile_fx(graph, inputs, config_patches=patches)
        self._seconds.append(time.perf_counter() - start)
        return compiled


class _Trained(torch.autograd.Function):
    """Its first argument, as part of the graph; what backward finds out about it is dropped."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, anchor: torch.Tensor) -> torch.Tensor:
        return x.detach()  # not a view: the compiler would tell it from the other blocks' inputs

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        return None, None


def _all_trained(args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Any, Any]:
    """The arguments, with the first floating one requiring grad.

    The first block of a model under an adapter gets an input without a graph, the others do not: that alone would be a
    second compilation. The price is one block's gradient of its input, which nobody reads.
    """
    leaves, spec = tree_flatten((tuple(args), dict(kwargs)))
    for place, leaf in enumerate(leaves):
        if isinstance(leaf, torch.Tensor) and leaf.is_floating_point():
            if not leaf.requires_grad:
                anchor = torch.empty(0, device=leaf.device, requires_grad=True)
                leaves[place] = cast("Callable[..., Any]", _Trained.apply)(leaf, anchor)
            break
    return tree_unflatten(leaves, spec)


def _foreign_forward(block: nn.Module) -> bool:
    """Whether calling `block` does not end in its class's own forward."""
    own = block.__dict__.get("forward")
    while isinstance(own, ForwardOverride):
        own = own.inner
    return own is not None and getattr(own, "__func__", None) is not type(block).forward
