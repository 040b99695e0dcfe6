"""The modules and tensors that a function can reach through its names, so that they are part of what is captured."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch

from ._calls import followed, untraced
from ._guards import LARGEST

_DEEPEST = 6


class Holder(torch.nn.Module):
    """A function as a module: what it reaches through closures, globals and `self` is registered here, not copied."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.__dict__["_names"] = {}
        for name, value in parts_of(function):
            unique = name if not hasattr(self, name) else f"{name}_{len(self._names)}"
            if isinstance(value, torch.nn.Module):
                self.add_module(unique, value)
                continue
            if isinstance(value, torch.nn.Parameter):
                self.register_parameter(unique, value)
            else:
                self.register_buffer(unique, value)
            self._names[id(value)] = unique
        # A module's state of training is the module's own; the holder has none.
        self.__dict__["training"] = False

    _names: dict[int, str]

    def name_of(self, tensor: torch.Tensor) -> str | None:
        """The name under which a tensor is registered here."""
        return self._names.get(id(tensor))


Found = Iterator[tuple[str, torch.nn.Module | torch.Tensor]]


def parts_of(function: Any) -> Found:
    """Every module and tensor that a function may use from outside, with the name it is reached by; each once."""
    return _Walk().value(function, "self", 0)


class _Walk:
    def __init__(self) -> None:
        # The objects themselves, so that no id is given to another one meanwhile.
        self.seen: dict[int, Any] = {}

    def value(self, value: Any, name: str, depth: int) -> Found:
        value = untraced(value)
        if id(value) in self.seen or depth > _DEEPEST:
            return
        self.seen[id(value)] = value
        if isinstance(value, torch.nn.Module | torch.Tensor):
            yield name, value
            return
        if callable(value) and not isinstance(value, type):
            target, owner = followed(value)
            if target is not None and (target is value or id(target) not in self.seen):
                self.seen[id(target)] = target
                yield from self.outside(target, depth + 1)
            if owner is not None and owner is not value:
                yield from self.value(owner, name, depth + 1)
        for key, part in _inside(value):
            yield from self.value(part, f"{name}_{key}" if f"{name}_{key}".isidentifier() else name, depth + 1)

    def outside(self, function: types.FunctionType, depth: int) -> Found:
        """What a function reads from enclosing functions and from its module."""
        for free, cell in zip(function.__code__.co_freevars, function.__closure__ or ()):
            try:
                content = cell.cell_contents
            except ValueError:
                continue
            yield from self.value(content, free, depth)
        for read in names_in(function.__code__):
            if read in function.__globals__:
                yield from self.value(function.__globals__[read], read, depth)


def _inside(value: Any) -> list[tuple[Any, Any]]:
    if isinstance(value, list | tuple | dict):
        if len(value) > LARGEST:
            return []
        return list(value.items() if isinstance(value, dict) else enumerate(value))
    if isinstance(value, functools.partial):
        return [("function", value.func), ("arguments", value.args), ("keywords", value.keywords)]
    return list(vars(value).items()) if _has_own_state(value) else []


def names_in(code: types.CodeType) -> Iterator[str]:
    """Global names and attributes that a code object, with the functions in it, mentions."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from names_in(constant)


def _has_own_state(value: Any) -> bool:
    if isinstance(value, type | types.FunctionType | types.MethodType | types.ModuleType):
        return False
    return hasattr(value, "__dict__") and type(value).__module__.partition(".")[0] not in ("torch", "numpy", "builtins")
