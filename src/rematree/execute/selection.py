"""Which of several plans on one model is in force: chosen by the shapes of each batch.

A model that sees batches of many lengths has a plan for each of a few. All are installed at once, and every override of
a plan asks whether its plan is the one. The number is chosen where the outermost forward begins. Whatever runs again in
backward runs under the number of its forward: the number is one of the values that a recomputation finds as they were
(`Captured`), so forwards of different lengths may run before their backwards.
"""

import contextlib
import inspect
import math
import threading
import warnings
import weakref
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from rematree.errors import PlanMismatchError
from rematree.fingerprint import describe_batch, left_out
from rematree.plans import Fingerprint, Plan
from rematree.regions import unwrap

Shapes = Mapping[str, tuple[int, ...]]


class Selection:
    """The choice between `plans`, by thread: backward and data-parallel replicas run in threads of their own.

    Args:
        plans: In the order in which they are tried; the last one, for the largest batch, is in force where nothing was
            chosen.
        model: What they are for; its signature names what a batch gives by position.
    """

    def __init__(self, plans: Sequence[Plan], model: nn.Module) -> None:
        self._shapes = [_shapes_of(plan.fingerprint.batch) for plan in plans]
        self._left_out = [frozenset(plan.fingerprint.left_out) for plan in plans]
        self._largest = [max(map(math.prod, shapes.values()), default=0) for shapes in self._shapes]
        self._names = _positions(model) or _positions(unwrap(model))  # PEFT's may hand on `*args`
        self._last = len(plans) - 1
        self._numbers: dict[int, int] = {}
        self._said = False
        self.latest = self._last

    def now(self) -> int:
        """Number of the plan in force in this thread."""
        return self._numbers.get(threading.get_ident(), self._last) if self._numbers else self._last

    def put(self, number: int) -> None:
        """Put plan `number` in force in this thread."""
        if number == self._last:
            self._numbers.pop(threading.get_ident(), None)  # so that threads that are gone leave nothing
        else:
            self._numbers[threading.get_ident()] = number

    def among(self, numbers: frozenset[int]) -> bool:
        """Whether one of `numbers` is in force."""
        return self.now() in numbers

    @contextlib.contextmanager
    def during(self, number: int) -> Generator[None]:
        """Plan `number` is in force inside, in this thread."""
        before = self.now()
        self.put(number)
        try:
            yield
        finally:
            self.put(before)

    def dispatch(
        self, arounds: Mapping[int, Callable[..., Any]], inner: Callable[..., Any], /, *args: Any, **kwargs: Any
    ) -> Any:
        """Call `inner` through the one of `arounds` that belongs to the plan in force, or as it is if none does."""
        around = arounds.get(self.now())
        return inner(*args, **kwargs) if around is None else around(inner, *args, **kwargs)

    def by_name(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Mapping[str, Any]:
        """The batch that the model is called with; nothing is known of what its signature does not name."""
        return {**dict(zip(self._names, args, strict=False)), **kwargs} if args else kwargs

    def covering(self, batch: Mapping[str, Any], *, strictly: bool = False, warns: bool = False) -> int | None:
        """Number of the first plan that covers a batch; None if the last one does not either.

        A plan is not taken for a tensor that it has never heard of if that is larger than all it knows: it may be what
        the batch is mostly made of. Unless `strictly`, the last plan is refused only by a tensor that it knows. A plan
        for a mask of ones, which needs no memory, does not cover another mask; unless `strictly` that is only said.

        Warns:
            UserWarning: so; once, if it `warns`.
        Cost:
            Waits for the device that holds the batch if a plan was made for a mask of ones.
        """
        here = _shapes_of(describe_batch(batch))
        found = None
        for number, (planned, largest) in enumerate(zip(self._shapes, self._largest, strict=True)):
            if here and fit(here, planned, unheard=largest):
                found = number
                if not self._counts_too_little(number, batch):
                    return number
        if (strictly and here) or (found is None and self.too_large(here)):
            return None
        if found is not None and warns:
            self._say_what_counts(batch)
        return self._last

    def _counts_too_little(self, number: int, batch: Mapping[str, Any]) -> list[str]:
        """Tensors of `batch` that plan `number` was made to leave out, and that change something here."""
        wanted = self._left_out[number] & batch.keys()
        return sorted(wanted.difference(left_out(batch))) if wanted else []

    def _say_what_counts(self, batch: Mapping[str, Any]) -> None:
        """Warn of a batch that the last plan counts too little for; once, and later ones are not looked into."""
        if self._said:
            return
        names = self._counts_too_little(self._last, batch)
        if names:
            self._said = True
            warnings.warn(
                f"the plan was made for a batch whose {' and '.join(names)} changed nothing (no padding, one sequence "
                "a row); in this one it does, and the peak may be above the prediction: plan for such a batch",
                UserWarning,
                stacklevel=6,
            )

    def refuse_larger(self, batch: Mapping[str, Any]) -> int:
        """Number of the plan for the largest batch, for one that nobody can plan for now.

        Raises:
            PlanMismatchError: `batch` is larger; a smaller one (the last of an epoch) only needs less.
        Warns:
            UserWarning: it is as large, but padded or packed where the plan's was not; once.
        """
        for name, shape, most in self.too_large(_shapes_of(describe_batch(batch))):
            raise PlanMismatchError(
                f"the plan was made for {name} of shape {most}, this batch has {shape}",
                remedies=["plan again for the larger batch: rematree.plan(model, batch, budget=...)"],
            )
        self._say_what_counts(batch)
        return self._last

    def too_large(self, here: Shapes) -> list[tuple[str, tuple[int, ...], tuple[int, ...]]]:
        """(name, shape, largest planned shape) of the tensors that no plan covers."""
        planned = self._shapes[self._last]
        return [
            (name, shape, planned[name])
            for name, shape in here.items()
            if name in planned and not fits(shape, planned[name])
        ]


class OnLarger:
    """Who is asked when a training batch comes that no plan covers, before anything of it has run.

    A copy of a model has nobody to ask, and whoever is asked is not kept alive by the model.
    """

    def __init__(self) -> None:
        self._method: weakref.WeakMethod[Callable[[Mapping[str, Any]], Any]] | None = None

    def ask(self, method: Callable[[Mapping[str, Any]], Any] | None) -> None:
        """Ask `method`, a bound one: for the handle that is in force then; None, and the batch is refused."""
        self._method = None if method is None else weakref.WeakMethod(method)

    def __bool__(self) -> bool:
        return self._method is not None

    def __call__(self, batch: Mapping[str, Any]) -> Any:
        """What who is asked answers; None if there is nobody."""
        method = None if self._method is None else self._method()
        return None if method is None else method(batch)

    def __reduce__(self) -> tuple[type["OnLarger"], tuple[()]]:
        return OnLarger, ()


def _positions(model: nn.Module) -> list[str]:
    """Names of what the forward of `model` takes by position."""
    parameters = inspect.signature(model.forward).parameters.values()
    return [each.name for each in parameters if each.kind is each.POSITIONAL_OR_KEYWORD]


def covers(larger: Fingerprint, other: Fingerprint) -> bool:
    """Whether a plan with the fingerprint `larger` covers every batch that one with `other` covers."""
    return fit(_shapes_of(other.batch), _shapes_of(larger.batch)) and set(larger.left_out) <= set(other.left_out)


def _shapes_of(batch: Iterable[tuple[str, tuple[int, ...], str]]) -> Shapes:
    """Of tensors as a fingerprint has them."""
    return {name: shape for name, shape, _ in batch}


def fit(shapes: Shapes, most: Shapes, unheard: int = 0) -> bool:
    """Whether tensors of `shapes` are nowhere larger than those of `most`; others may have `unheard` elements."""
    return all(
        fits(shape, most[name]) if name in most else math.prod(shape) <= unheard for name, shape in shapes.items()
    )


def fits(shape: tuple[int, ...], most: tuple[int, ...]) -> bool:
    """Whether a tensor of `shape` is nowhere larger than one of shape `most`."""
    return len(shape) == len(most) and all(here <= there for here, there in zip(shape, most, strict=True))
