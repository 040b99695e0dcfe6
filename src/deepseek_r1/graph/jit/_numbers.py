"""Python numbers that became tensors because a branch or a loop decides their value.

Such a number is a tensor without dimensions in int64, float64 or bool. It still counts as a Python number: next to
another tensor it takes that tensor's type, as a literal would, and it leaves the function as a number again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

DTYPES: dict[type, torch.dtype] = {bool: torch.bool, int: torch.int64, float: torch.float64}
_KINDS = {dtype: kind for kind, dtype in DTYPES.items()}
_BINARY = (
    "add sub mul div pow mod truediv floordiv lt le gt ge eq ne and or xor matmul lshift rshift radd rsub rmul rdiv "
    "rtruediv rfloordiv rpow rmod iadd isub imul idiv itruediv ipow"
)
_NAMED = """
    add sub subtract mul multiply div divide true_divide floor_divide remainder fmod pow rsub lt le gt ge eq ne less
    greater less_equal greater_equal not_equal where maximum minimum clamp clamp_min clamp_max add_ sub_ mul_ div_
    fill_ masked_fill masked_fill_ pow_ clamp_ lerp addcmul neg negative abs logical_not logical_and logical_or
    bitwise_and bitwise_or __neg__ __abs__ __pos__ __invert__ floor ceil trunc sqrt exp log sin cos tanh
"""
_ELEMENTWISE = {f"__{n}__" for n in _BINARY.split()} | set(_NAMED.split())
_DIVISIONS = {"__truediv__", "__rtruediv__", "__rdiv__", "div", "divide", "true_divide", "__div__"}


class Numbers:
    """The tensors that stand for Python numbers during one capture."""

    def __init__(self) -> None:
        self._held: dict[int, torch.Tensor] = {}
        self._plain = False

    def __contains__(self, value: object) -> bool:
        return id(value) in self._held

    @contextmanager
    def plainly(self) -> Iterator[None]:
        """Inside, what is computed from numbers does not count as one."""
        before, self._plain = self._plain, True
        try:
            yield
        finally:
            self._plain = before

    def mark(self, tensor: torch.Tensor) -> torch.Tensor:
        """Let a tensor count as a number from now on; it comes back itself."""
        self._held[id(tensor)] = tensor
        return tensor

    def copy_mark(self, like: torch.Tensor, tensor: torch.Tensor) -> None:
        """Let a tensor count as a number if another does."""
        if like in self:
            self.mark(tensor)

    def make(self, value: Any) -> torch.Tensor:
        """A Python number as a tensor that counts as one."""
        kind = int if isinstance(value, torch.SymInt) else type(value)
        return self.mark(torch.full((), value, dtype=DTYPES[kind]))

    def kind(self, tensor: torch.Tensor) -> type:
        """bool, int or float."""
        return _KINDS[tensor.dtype]

    def compute(self, func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Call a torch function whose arguments may be such numbers."""
        name = getattr(func, "__name__", "")
        indexing = name in ("__getitem__", "__setitem__") and isinstance(args[0], torch.Tensor)
        if indexing and (found := _indexed(name, *args)) is not None:
            return found[0]
        numbers = [a for a in (*args, *kwargs.values()) if isinstance(a, torch.Tensor) and a in self]
        if not numbers or self._plain:
            return func(*args, **kwargs)
        if name in ("tensor", "as_tensor"):
            dtype = kwargs.get("dtype") or (torch.get_default_dtype() if args[0].is_floating_point() else None)
            return args[0].to(dtype or args[0].dtype, copy=True)
        if name not in _ELEMENTWISE:
            return func(*args, **kwargs)
        # The condition of `where` and the mask of `masked_fill` choose; they have no say in the type.
        chooses = name.startswith(("where", "masked"))
        others = [a for a in (*args, *kwargs.values()) if isinstance(a, torch.Tensor) and a not in self]
        strong = [a for a in others if not (chooses and a.dtype == torch.bool)]
        if strong:
            cast = lambda v: _beside(v, strong) if isinstance(v, torch.Tensor) and v in self else v  # noqa: E731
            return func(*map(cast, args), **{k: cast(v) for k, v in kwargs.items()})
        if name in _DIVISIONS or name in ("sqrt", "exp", "log", "sin", "cos", "tanh"):
            args = [a.double() if isinstance(a, torch.Tensor) and a in self else a for a in args]
        elif any(a.dtype == torch.bool for a in numbers) and name not in _LOGICAL:
            args = [a.long() if isinstance(a, torch.Tensor) and a.dtype == torch.bool else a for a in args]
        args = [_as_number(a) for a in args]
        result = func(*args, **kwargs)
        if isinstance(result, torch.Tensor) and result.dtype == torch.float32:
            result = result.double()
        return self.mark(result) if isinstance(result, torch.Tensor) and result.dtype in _KINDS else result


_LOGICAL = {"__invert__", "logical_not", "logical_and", "logical_or", "__and__", "__or__", "__xor__", "where"}


def _as_number(value: Any) -> Any:
    # Beside a float64 tensor a Python float is exact already; beside an integer one torch would compute in float32.
    return torch.full((), value, dtype=torch.float64) if isinstance(value, float) else value


def _beside(number: torch.Tensor, others: list[torch.Tensor]) -> torch.Tensor:
    """A number in the type that a Python number would take beside tensors."""
    dtype = others[0].dtype
    for other in others[1:]:
        dtype = torch.promote_types(dtype, other.dtype)
    if number.dtype == torch.float64 and not (dtype.is_floating_point or dtype.is_complex):
        dtype = torch.get_default_dtype()
    elif number.dtype == torch.int64 and dtype == torch.bool:
        dtype = torch.int64
    return number.to(dtype)


def _is_index(value: Any) -> bool:
    integral = isinstance(value, torch.Tensor) and value.ndim == 0
    return integral and value.dtype in (torch.int64, torch.int32, torch.int16, torch.int8)


def _indexed(name: str, tensor: Any, key: Any, value: Any = None) -> tuple[Any] | None:
    """`tensor[key]` where the key has integer tensors without dimensions; None for any other key.

    torch itself would ask such an index for its value, which a graph does not know.
    """
    keys = list(key) if isinstance(key, tuple) else [key]
    if not any(_is_index(k) for k in keys) or not all(_is_index(k) or isinstance(k, _BASIC) for k in keys):
        return None
    plain = tuple(slice(None) if _is_index(k) else k for k in keys)
    view = tensor[plain] if any(not _whole(k) for k in plain) else tensor
    if Ellipsis in [k for k in keys if not isinstance(k, torch.Tensor)]:
        cut = next(i for i, k in enumerate(keys) if k is Ellipsis)
        behind = len([k for k in keys[cut + 1 :] if _is_index(k) or isinstance(k, slice) or k is None])
        before = [k for k in keys[:cut] if not isinstance(k, int)]
        keys = [*before, *[slice(None)] * (view.ndim - len(before) - behind), *keys[cut + 1 :]]
    places = [k for k in keys if not isinstance(k, int) or isinstance(k, bool)]
    dims = [(dim, k) for dim, k in enumerate(places) if _is_index(k)]
    wrapped = [(dim, _from_front(k, view.shape[dim]).to(view.device)) for dim, k in dims]
    if name == "__getitem__":
        for dim, index in reversed(wrapped):
            view = view.index_select(dim, index).squeeze(dim)
        return (view,)
    filler = value if isinstance(value, torch.Tensor) else torch.full((), value, dtype=view.dtype, device=view.device)
    if len(wrapped) == 1:
        dim, index = wrapped[0]
        shape = [n for d, n in enumerate(view.shape) if d != dim]
        view.index_copy_(dim, index, filler.to(view.dtype).expand(shape).unsqueeze(dim))
    else:
        grid = [torch.arange(n, device=view.device) for n in view.shape]
        for dim, index in wrapped:
            grid[dim] = index
        view.index_put_(tuple(torch.meshgrid(*grid, indexing="ij")), _spread(filler, view, dict(wrapped)))
    return (None,)


def _from_front(index: Any, size: int) -> torch.Tensor:
    """An index that may count from the end, as one that does not."""
    return torch.where(index < 0, index + size, index).long().reshape(1)


_BASIC = (int, slice, type(None), type(Ellipsis), torch.SymInt)


def _whole(key: Any) -> bool:
    return isinstance(key, slice) and key == slice(None)


def _spread(filler: torch.Tensor, view: torch.Tensor, fixed: dict[int, Any]) -> torch.Tensor:
    """A value for the places that are left when some dimensions are fixed, with those dimensions as 1."""
    shape = [n for d, n in enumerate(view.shape) if d not in fixed]
    out = filler.to(view.dtype).expand(shape)
    for dim in sorted(fixed):
        out = out.unsqueeze(dim)
    return out
