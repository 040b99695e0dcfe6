"""The inside of a branch or a loop while a graph is captured: which tensors it uses from outside.

torch's `cond` and `while_loop` take every outside tensor as an operand. A region is run once to learn which those
are, and once more with the operands in their place. Knows nothing of Python syntax.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from . import _numbers

#: What is asked of a tensor without its values: no operand is needed for it.
_METADATA = {
    "size", "dim", "ndimension", "numel", "stride", "nelement", "is_floating_point", "is_complex", "element_size",
    "__len__", "get_device", "is_contiguous", "storage_offset", "result_type", "is_tensor",
}  # fmt: skip
_PROPERTIES = {
    "shape", "dtype", "device", "ndim", "layout", "requires_grad", "is_leaf", "is_cuda", "is_sparse", "names",
    "is_quantized", "itemsize", "nbytes",
}  # fmt: skip


class Region(TorchFunctionMode):
    """One branch or loop body, or the whole function.

    Attributes:
        parent: the region around it, None for the whole function.
        operands: pairs of an outside tensor and what stands for it inside, by the outside tensor's id.
        made: tensors that were made inside, which may be changed in place, by id.
        fresh: Python containers and objects that were made inside, by id.
        symbols: sizes that were used inside, by name.
        standing: what stands for the variables of a loop.
        inputs: tensors that the whole function was given.
        dry: whether it only runs to learn what it uses; nothing is recorded.
    """

    def __init__(self, parent: Region | None, *, dry: bool, numbers: _numbers.Numbers, closed: bool = False) -> None:
        super().__init__()
        self.parent = parent
        self.dry: bool = dry or (parent is not None and parent.dry)
        self.numbers = numbers
        self.closed = closed
        self.active = True
        self.operands: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self.inside: set[int] = set()
        self.made: dict[int, torch.Tensor] = {}
        self.fresh: dict[int, Any] = {}
        self.symbols: dict[str, torch.SymInt] = {}
        self.standing: list[torch.Tensor] = []
        self.inputs: list[torch.Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not self.active:
            return func(*args, **kwargs)
        if _property(func) == "requires_grad":
            self.note_grad_switch()
        if func is torch._C._set_grad_enabled:
            self.note_grad_switch()
            if self.dry:
                # torch would write the switch into the graph even where nothing else is recorded.
                with torch._C.DisableTorchFunction():
                    return func(*args, **kwargs)
        if self.parent is not None and _is_metadata(func):
            return func(*args, **kwargs)
        args, kwargs = self.replaced(args), {k: self.replaced(v) for k, v in kwargs.items()}
        result = self.numbers.compute(func, args, kwargs)
        self.adopt(result)
        return result

    def note_grad_switch(self) -> None:
        """Gradients are switched or asked for here, which a capture without gradients does not record."""
        if self.parent is not None:
            self.parent.note_grad_switch()

    def replaced(self, value: Any) -> Any:
        """The same nest of values with each outside tensor replaced by what stands for it inside."""
        if isinstance(value, torch.Tensor):
            return self.operand(value)
        if isinstance(value, torch.SymInt):
            self.symbols[str(value.node.expr)] = value
            return value
        if isinstance(value, tuple | list) and value:
            found = [self.replaced(v) for v in value]
            return type(value)(*found) if hasattr(value, "_fields") else type(value)(found)
        if isinstance(value, dict):
            return {k: self.replaced(v) for k, v in value.items()}
        if isinstance(value, slice):
            return slice(self.replaced(value.start), self.replaced(value.stop), self.replaced(value.step))
        return value

    def operand(self, tensor: torch.Tensor) -> torch.Tensor:
        """What stands inside for a tensor."""
        key = id(tensor)
        if self.parent is None or key in self.made or key in self.inside:
            return self.outermost(tensor)
        if key not in self.operands:
            assert not self.closed, "a branch used other tensors when it ran again"
            self.place(tensor, _like(tensor))
        return self.operands[key][1]

    def outermost(self, tensor: torch.Tensor) -> torch.Tensor:
        """Hook of the whole function's region."""
        return tensor

    def place(self, tensor: torch.Tensor, inside: torch.Tensor) -> None:
        """Let `inside` stand for an outside tensor."""
        self.operands[id(tensor)] = (tensor, inside)
        self.inside.add(id(inside))
        self.numbers.copy_mark(tensor, inside)

    def adopt(self, value: Any) -> None:
        """Note tensors as made inside."""
        if isinstance(value, torch.Tensor):
            if id(value) not in self.inside:
                self.made[id(value)] = value
        elif isinstance(value, tuple | list):
            for part in value:
                self.adopt(part)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """While a region inside runs, or torch builds one, this one lets everything pass."""
        before, self.active = self.active, False
        try:
            yield
        finally:
            self.active = before

    def resolve(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Tensors that an inner region needs, as they are called here."""
        return [self.operand(t) for t in tensors]

    def storages(self) -> set[int]:
        """Memory of the operands: what is returned from inside must not share it."""
        return {storage(inside) for _, inside in self.operands.values()}


def _is_metadata(func: Callable[..., Any]) -> bool:
    return _property(func) in _PROPERTIES or getattr(func, "__name__", "") in _METADATA


def _property(func: Callable[..., Any]) -> str:
    """The name of the tensor's property that is read; empty for any other function."""
    reads = getattr(func, "__name__", "") == "__get__"
    return getattr(getattr(func, "__self__", None), "__name__", "") if reads else ""


def _like(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor of the same shape and layout that nothing else holds."""
    with torch._C.DisableTorchFunction():
        return torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device=tensor.device)


def storage(tensor: torch.Tensor) -> int:
    """A number for the memory behind a tensor; views of one memory share it."""
    with torch._C.DisableTorchFunction():
        number: int = tensor.untyped_storage()._cdata
        return number


def version(tensor: torch.Tensor) -> int:
    """How often a tensor was changed in place."""
    with torch._C.DisableTorchFunction():
        return tensor._version
