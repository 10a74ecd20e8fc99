"""Chunked loss: the loss of a causal language model without a [tokens, vocabulary] tensor.

In training with labels the model's head returns `DeferredLogits`; when the model's own loss function comes to
`cross_entropy`, the head and the loss are computed for a few rows at a time, and their gradient with them, so nothing
is kept but the gradient of the hidden states and of the head's trainable parameters. Shifting, soft-capping, scaling
and normalisation stay the model's own code, so there is nothing here for one architecture.

Same numbers up to rounding: a matrix product over fewer rows may add in another order, and gradients of head parameters
are sums over chunks, kept in fp32 for 16-bit parameters. fp16 logits get their gradient at the scale of a sum, divided
in backward, because 1/N of a probability is below the smallest fp16 number. Dropout inside the head draws its mask
chunk by chunk.

Transparent without labels, in `eval()` and without grad mode. Real logits, and so no saving, for: class-probability
targets, `weight` with `label_smoothing`, `reduction="none"` or a gradient hook on a parameter together with a trainable
head, and a head that FSDP2 shards as a unit of its own.
"""

import functools
import inspect
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from rematree.engines import any_sharded
from rematree.errors import UnsupportedModelError, UsageError
from rematree.execute.context import Known, Switches
from rematree.execute.loss.chunked import chunked_loss
from rematree.execute.loss.deferred import defer_head
from rematree.execute.loss.head import HeadCall, autocast_as, autocast_now, dropout_off, find_head
from rematree.execute.loss.logit_rows import LogitRows
from rematree.execute.loss.row_loss import RowLoss
from rematree.execute.loss.window import verify_window
from rematree.execute.override import Forward, ForwardOverride
from rematree.execute.stash import Watcher


def attach_chunked_loss(
    model: nn.Module,
    rows: int,
    *,
    check: bool = True,
    when: Callable[[], bool] | None = None,
    watcher: Watcher | None = None,
) -> "ChunkedLoss":
    """Compute the loss of `model` in chunks of `rows` rows from now on.

    Args:
        model: A causal language model, bare or wrapped.
        rows: Rows of the batch, of B*T, whose logits exist at once.
        check: Compare loss and gradient of a window of at most 8 rows with the plain head once, on the first loss,
            and warn once if a loss was not chunked. Off where there are no real numbers (fake tensors).
        when: Asked at every forward whether this is the one in use, where a model has several, of which one is at a
            time. None: it is the only one.
        watcher: May tell tiles of rows by repetition, where there are no real numbers.

    Returns:
        Handle whose `remove()` puts the model back exactly.

    Raises:
        UnsupportedModelError: The model has no output embedding.
        UsageError: `rows` is not positive, or the model has a chunked loss already.
    """
    if rows < 1:
        raise UsageError(f"a chunk of the loss must have at least 1 row, not {rows}")
    found = find_head(model)
    if found is None:
        raise UnsupportedModelError(f"{type(model).__name__} has no output embedding, so its loss cannot be chunked")
    forward = found[1].__dict__.get("forward")
    while isinstance(forward, ForwardOverride):
        owner = getattr(forward._around, "__self__", None)  # pyright: ignore[reportPrivateUsage]
        if isinstance(owner, ChunkedLoss) and (when is None or not forward.conditional):
            raise UsageError(
                f"{type(found[0]).__name__} has a chunked loss already", remedies=["handle.remove() first"]
            )
        forward = forward.inner
    return ChunkedLoss(*found, rows, check=check, when=when, watcher=watcher)


class ChunkedLoss:
    """A chunked loss attached to one model object.

    Attributes:
        rows: Rows whose logits exist at once.
        effective: Whether the latest training call was chunked, None before the first.
    """

    def __init__(
        self,
        causal_lm: nn.Module,
        head: nn.Module,
        rows: int,
        *,
        check: bool,
        when: Callable[[], bool] | None = None,
        watcher: Watcher | None = None,
    ) -> None:
        self.rows = rows
        self._watcher = watcher
        self.effective: bool | None = None
        self._causal_lm = causal_lm
        self._head = head
        self._check = check
        self._check_pending = check
        self._warned = False
        self._armed = False
        self._known = Known(head)
        self._probed: dict[Any, tuple[int, torch.dtype, torch.device]] = {}
        names = list(inspect.signature(causal_lm.forward).parameters)
        self._labels_position = names.index("labels") if "labels" in names else len(names)
        self._overrides = (
            ForwardOverride(causal_lm, self._around_model, when),
            ForwardOverride(head, self._around_head, when),
        )

    def remove(self) -> None:
        """Restore both forwards. Does nothing the second time."""
        for override in self._overrides:
            override.remove()

    def _around_model(self, inner: Forward, *args: Any, **kwargs: Any) -> Any:
        labels = kwargs.get("labels")
        if labels is None and len(args) > self._labels_position:
            labels = args[self._labels_position]
        if labels is None or not self._causal_lm.training or not torch.is_grad_enabled() or self._armed:
            return inner(*args, **kwargs)
        self._armed, self.effective = True, False
        try:
            outputs = inner(*args, **kwargs)
        finally:
            self._armed = False
        if self._check and not self.effective and not self._warned:
            self._warned = True
            warnings.warn(
                f"chunked loss has no effect for {type(self._causal_lm).__name__}: its loss is not a cross-entropy "
                "over rows of its head's output, so the logits are in memory and the peak is higher than planned",
                stacklevel=2,
            )
        return outputs

    def _around_head(self, inner: Forward, *args: Any, **kwargs: Any) -> Any:
        hidden = args[0] if args else None
        if not self._armed or len(args) != 1 or kwargs or not isinstance(hidden, Tensor) or hidden.ndim < 2:
            return inner(*args, **kwargs)
        if any_sharded(self._head):  # a unit of FSDP2's own: its weight is gone once it has run
            return inner(*args, **kwargs)
        autocast = autocast_now(hidden.device.type)
        num_classes, dtype, device = self._probe(inner, hidden, autocast)
        params = tuple(param for param in self._head.parameters() if param.requires_grad)
        return defer_head(
            HeadCall(
                inner,
                params,
                num_classes,
                dtype,
                device,
                autocast,
                self.rows,
                self._cross_entropy,
                Switches(self._head, self._known),
            ),
            hidden,
        )

    def _probe(self, inner: Forward, hidden: Tensor, autocast: Any) -> tuple[int, torch.dtype, torch.device]:
        """Width, dtype and device of the logits, from one row: adapters and quantised heads do not tell otherwise."""
        key = (hidden.dtype, hidden.device, autocast)
        if key not in self._probed:
            row = hidden.detach().reshape(-1, hidden.shape[-1])[:1].reshape(*(1,) * (hidden.ndim - 1), -1)
            with torch.no_grad(), autocast_as(hidden.device.type, autocast), dropout_off(self._head):
                logits = inner(row)
            self._probed[key] = logits.shape[-1], logits.dtype, logits.device
        return self._probed[key]

    def _cross_entropy(
        self,
        rows: LogitRows,
        target: Any,
        weight: Tensor | None = None,
        size_average: bool | None = None,
        ignore_index: int = -100,
        reduce: bool | None = None,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
    ) -> Tensor | None:
        head, tracked = rows.source.head, torch.is_grad_enabled() and rows.tracked
        params = head.params if tracked else ()
        one_class_a_row = isinstance(target, Tensor) and target.ndim == 1 and not target.is_floating_point()
        if rows.hidden.ndim != 2 or not one_class_a_row or size_average is not None or reduce is not None:
            return None
        if weight is not None and (label_smoothing or weight.requires_grad):
            return None
        # A hook would run once a chunk and once more in backward; per-row gradients of the loss come too late for
        # parameters whose gradient is already summed over rows.
        if params and (reduction == "none" or any(getattr(p, "_backward_hooks", None) for p in params)):
            return None
        job = RowLoss(
            head=rows.raw,
            finish=rows.source.finished,
            params=params,
            target=target,
            weight=weight,
            ignore_index=ignore_index,
            reduction=reduction,
            label_smoothing=label_smoothing,
            rows=self.rows,
            scale_late=head.dtype == torch.float16,
            again=None if self._watcher is None else functools.partial(self._watcher.again, {}),
            given_away=None if self._watcher is None else self._watcher.given_away,
        )
        with head.switches.restored("the logits"):  # this may be called after the model's own forward
            if self._check_pending:
                with dropout_off(self._head):
                    self._check_pending = not verify_window(rows, job, type(self._head).__name__)
            self.effective = head.fate.chunked = True
            return chunked_loss(job, rows.hidden if tracked else rows.hidden.detach())
