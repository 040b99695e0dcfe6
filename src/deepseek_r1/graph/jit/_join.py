"""What two ways through a function leave in one variable, and whether a graph can hold both."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils._pytree as pytree

from ._numbers import DTYPES, Numbers

_ORDER = (bool, int, float)


class CannotJoin(Exception):
    """The two values do not fit one variable; the message says why."""


class Undefined:
    """What a local name holds before it is assigned. Using it in any way raises what reading the name would.

    Attributes:
        slot: whether it is the place of an early result, which is read only after it was filled.
    """

    def __init__(self, name: str, why: str = "", slot: bool = False) -> None:
        self.name, self.why, self.slot = name, why, slot

    def _raise(self, *_: Any) -> Any:
        raise UnboundLocalError(self.message)

    @property
    def message(self) -> str:
        """What to tell the user."""
        return f"the variable {self.name!r} may have no value here: {self.why or 'it is not assigned on every way'}"

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self._raise()

    __call__ = __bool__ = __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __truediv__ = _raise
    __rtruediv__ = __getitem__ = __iter__ = __len__ = __lt__ = __le__ = __gt__ = __ge__ = __neg__ = _raise


@dataclass(frozen=True)
class Same:
    """A Python value that is the same on every way; it is no part of the graph."""

    value: Any


@dataclass(frozen=True)
class Kept:
    """A tensor: its size, type and whether it stands for a Python number."""

    size: tuple[Any, ...]
    dtype: torch.dtype
    device: torch.device
    number: bool

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Kept) and self._key() == other._key()

    def __hash__(self) -> int:
        return hash(self._key())

    def _key(self) -> tuple[Any, ...]:
        return tuple(map(str, self.size)), self.dtype, self.device, self.number


@dataclass(frozen=True)
class Nest:
    """A variable's value: its leaves and how they nest; no leaves in an early result that nothing filled yet."""

    leaves: tuple[Same | Kept, ...]
    tree: Any


EMPTY = Nest((), None)


def describe(value: Any, numbers: Numbers) -> Nest:
    """What kind of value a variable holds."""
    if isinstance(value, Undefined) and value.slot:
        return EMPTY
    leaves, tree = pytree.tree_flatten(value)
    kinds = tuple(
        Kept(tuple(v.shape), v.dtype, v.device, v in numbers) if isinstance(v, torch.Tensor) else Same(v)
        for v in leaves
    )
    return Nest(kinds, tree)


def join(one: Nest, other: Nest) -> Nest:
    """The kind that holds both.

    Raises:
        CannotJoin: there is none.
    """
    if one is EMPTY or other is EMPTY:
        return other if one is EMPTY else one
    for nest in (one, other):
        if len(nest.leaves) == 1 and isinstance(nest.leaves[0], Same) and isinstance(nest.leaves[0].value, Undefined):
            return nest
    if one.tree != other.tree:
        raise CannotJoin(
            f"its structure differs: {_text(one)} against {_text(other)}. Give both the same nest of values, of the "
            "same length."
        )
    return Nest(tuple(_join(a, b) for a, b in zip(one.leaves, other.leaves)), one.tree)


def _text(nest: Nest) -> str:
    values = [v.value if isinstance(v, Same) else f"tensor{list(v.size)}" for v in nest.leaves]
    return str(pytree.tree_unflatten(values, nest.tree))


def _join(a: Same | Kept, b: Same | Kept) -> Same | Kept:
    if isinstance(a, Same) and isinstance(b, Same):
        if equal(a.value, b.value):
            return a
        kinds = [_kind(v.value) for v in (a, b)]
        if None in kinds:
            raise CannotJoin(
                f"it is {a.value!r} on one way and {b.value!r} on the other; only tensors and numbers may depend on a "
                "tensor. Use a number or a tensor in its place."
            )
        return _number(*kinds)
    if isinstance(a, Kept) and isinstance(b, Kept):
        return _join_tensors(a, b)
    tensor, value = (a, b) if isinstance(a, Kept) else (b, a)
    assert isinstance(tensor, Kept)
    assert isinstance(value, Same)
    kind = _kind(value.value)
    if kind is None:
        raise CannotJoin(
            f"it is a tensor of shape {_shape(tensor)} on one way and {value.value!r} on the other. Give it a tensor "
            "of that shape and type on both."
        )
    if tensor.number:
        return _number(kind, _kind_of(tensor.dtype))
    return _with_number(tensor, kind, repr(value.value))


def _join_tensors(a: Kept, b: Kept) -> Kept:
    if a.number and b.number:
        return _number(_kind_of(a.dtype), _kind_of(b.dtype))
    if a.number or b.number:
        number, tensor = (a, b) if a.number else (b, a)
        return _with_number(tensor, _kind_of(number.dtype), "a Python number")
    # Sizes of two names that were equal when captured: asking makes their equality a condition of the graph.
    if a == b or (a.dtype == b.dtype and a.device == b.device and _same_size(a.size, b.size)):
        return a
    for what, x, y in (("shape", _shape(a), _shape(b)), ("dtype", a.dtype, b.dtype), ("device", a.device, b.device)):
        if x != y:
            raise CannotJoin(f"its {what} differs: {x} against {y}. Bring both ways to one {what}.")
    return a


def _same_size(a: Sequence[Any], b: Sequence[Any]) -> bool:
    return len(a) == len(b) and all(bool(x == y) for x, y in zip(a, b))


def _with_number(tensor: Kept, kind: type | None, text: str) -> Kept:
    if tensor.size:
        raise CannotJoin(
            f"it is a tensor of shape {_shape(tensor)} on one way and {text} on the other. Begin with a tensor of that "
            "shape, such as torch.zeros(...)."
        )
    if kind is float and not tensor.dtype.is_floating_point:
        raise CannotJoin(
            f"it is a tensor of {tensor.dtype} on one way and {text} on the other. Bring both to one type."
        )
    return tensor


def _number(*kinds: type | None) -> Kept:
    kind = max((k for k in kinds if k is not None), key=_ORDER.index)
    return Kept((), DTYPES[kind], torch.device("cpu"), True)


def _kind(value: Any) -> type | None:
    if isinstance(value, torch.SymInt):
        return int
    return type(value) if type(value) in _ORDER else None


def _kind_of(dtype: torch.dtype) -> type:
    return next(kind for kind, d in DTYPES.items() if d == dtype)


def _shape(tensor: Kept) -> tuple[Any, ...]:
    return tuple(int(str(n)) if str(n).isdigit() else str(n) for n in tensor.size)


def equal(a: Any, b: Any) -> bool:
    """Whether two Python values are the same for the function: equal and of one type, or one object."""
    if a is b:
        return True
    if isinstance(a, torch.SymInt) or isinstance(b, torch.SymInt):
        return str(a) == str(b)
    if type(a) is not type(b) or not isinstance(
        a, int | float | complex | str | bytes | torch.dtype | torch.device | torch.Size
    ):
        return False
    return bool(a == b) or (a != a and b != b)


def tensors(
    values: Sequence[Any], kinds: Sequence[Nest], make: Callable[[Any, Kept], torch.Tensor]
) -> list[torch.Tensor]:
    """The tensors of some variables in the form that `kinds` asks for, made by `make(value, kind)`; flat."""
    out: list[torch.Tensor] = []
    for value, nest in zip(values, kinds):
        empty = isinstance(value, Undefined) and value.slot
        leaves = [None] * len(nest.leaves) if empty else pytree.tree_leaves(value)
        out += [make(v, kind) for v, kind in zip(leaves, nest.leaves) if isinstance(kind, Kept)]
    return out


def rebuild(flat: Sequence[torch.Tensor], kinds: Sequence[Nest], empty: Sequence[Any]) -> list[Any]:
    """Variables from the flat tensors of `tensors`; `empty` has what stands for early results that nothing filled."""
    rest = iter(flat)
    out: list[Any] = []
    for nest, unfilled in zip(kinds, empty):
        if nest is EMPTY:
            out.append(unfilled)
            continue
        leaves = [next(rest) if isinstance(kind, Kept) else kind.value for kind in nest.leaves]
        out.append(pytree.tree_unflatten(leaves, nest.tree))
    return out
