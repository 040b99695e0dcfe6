"""The Python values that a capture read, so that a later call notices when one is another."""

from __future__ import annotations

import enum
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

_PLAIN = (bool, int, float, complex, str, bytes, type(None), type(Ellipsis), enum.Enum, torch.dtype, torch.device)
#: Larger containers are compared by identity and length: comparing them would cost more than the graph saves.
LARGEST = 1000
_MISSING = object()


class _Identity:
    """An object that only it itself is equal to."""

    __slots__ = ("value",)

    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Identity) and other.value is self.value

    def __hash__(self) -> int:
        return id(self.value)


def snapshot(value: Any) -> Any:
    """A value in a form that can be compared later: plain values by type and value, containers by their parts.

    Example:
        >>> snapshot([1, "a"]) == snapshot([1, "a"]), snapshot(1) == snapshot(True)
        (True, False)
    """
    if isinstance(value, _PLAIN):
        return (type(value), repr(value)) if isinstance(value, float | complex) else (type(value), value)
    if isinstance(value, types.MethodType):
        return _Identity(value.__func__), _Identity(value.__self__)
    if isinstance(value, list | tuple | set | frozenset | dict):
        if len(value) > LARGEST:
            return _Identity(value), len(value)
        if isinstance(value, dict):
            return dict, tuple((snapshot(k), snapshot(v)) for k, v in value.items())
        if isinstance(value, set | frozenset):
            return type(value), frozenset(map(snapshot, value))
        return type(value), tuple(map(snapshot, value))
    return _Identity(value)


@dataclass(frozen=True)
class _Guard:
    read: Callable[[], Any]
    wanted: Any
    text: str


class Guards:
    """What one capture read from outside, and what it found.

    Attributes:
        outside: containers and objects that were not made by the function, by id.
    """

    def __init__(self) -> None:
        self._found: dict[tuple[int, str], _Guard] = {}
        self._kept_alive: list[Any] = []
        self.outside: dict[int, Any] = {}

    def attribute(self, owner: Any, name: str, value: Any) -> None:
        """Note that an attribute was read."""
        self._note(owner, name, value, lambda: getattr(owner, name, _MISSING), f"{_name(owner)}.{name}")

    def item(self, owner: Mapping[str, Any], name: str, value: Any) -> None:
        """Note that a global name was read."""
        self._note(owner, name, value, lambda: owner.get(name, _MISSING), f"the global {name!r}")

    def cell(self, cell: types.CellType, name: str, value: Any) -> None:
        """Note that a name of an enclosing function was read."""
        self._note(cell, name, value, lambda: _content(cell), f"{name!r} of the enclosing function")

    def _note(self, owner: Any, name: str, value: Any, read: Callable[[], Any], text: str) -> None:
        key = (id(owner), name)
        if key not in self._found and not _is_fake(value):
            self._kept_alive.append(owner)
            self._found[key] = _Guard(read, snapshot(value), text)
        self.reach(value)

    def reach(self, value: Any) -> None:
        """Note that a value, with what it contains, is not the function's own."""
        if isinstance(value, (*_PLAIN, torch.Tensor, type, types.ModuleType)) or id(value) in self.outside:
            return
        self.outside[id(value)] = value
        if isinstance(value, list | tuple | set | frozenset | dict) and len(value) <= LARGEST:
            for part in value.values() if isinstance(value, dict) else value:
                self.reach(part)

    def changed(self) -> str | None:
        """What is another value now, in words; None if nothing is."""
        for guard in self._found.values():
            now = guard.read()
            if snapshot(now) != guard.wanted:
                return f"{guard.text} is {_short(now)} now"
        return None


def _content(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:
        return _MISSING


def _is_fake(value: Any) -> bool:
    from torch._subclasses.fake_tensor import FakeTensor

    return isinstance(value, FakeTensor)


def _name(owner: Any) -> str:
    return str(owner.__name__ if isinstance(owner, type | types.ModuleType) else type(owner).__name__)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 60 else f"{text[:57]}..."
