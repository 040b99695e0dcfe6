"""What a model is, without capturing it: its classes' sources, its plain attributes, its tensors.

Two models with one fingerprint would be captured into the same graph with the same weights. A model that holds
something whose influence cannot be told (an open file, an object of a C extension) has none.
"""

from __future__ import annotations

import enum
import functools
import hashlib
import os
import site
import sys
import sysconfig
import types
from collections.abc import Mapping
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import torch

_PLAIN = (type(None), bool, int, float, complex, str, bytes, range, slice, type(...), torch.dtype, torch.device)
_PLAIN_TORCH = (torch.layout, torch.memory_format)


class NoFingerprint(Exception):
    """The model holds something that cannot be fingerprinted; the message says what and where."""


class Fingerprint:
    """A SHA-256 that models, values and tensors are added to.

    Attributes:
        tensors: every tensor that was added, once each.

    Example:
        >>> a, b = Fingerprint(), Fingerprint()
        >>> a.add({"n": 1}); b.add({"n": 2})
        >>> a.hexdigest() == b.hexdigest()
        False
    """

    def __init__(self) -> None:
        self._digest = hashlib.sha256()
        self._seen: dict[int, int] = {}
        self._keep: list[Any] = []
        self._modules: dict[str | None, bool] = {}
        self._files: set[str] = set()
        self.tensors: list[torch.Tensor] = []

    def hexdigest(self) -> str:
        """64 hexadecimal digits."""
        return self._digest.hexdigest()

    def _word(self, *words: Any) -> None:
        for word in words:
            data = word if isinstance(word, bytes) else str(word).encode()
            self._digest.update(len(data).to_bytes(8, "little"))
            self._digest.update(data)

    def add(self, value: Any, where: str = "value") -> None:
        """Add a value and all that it holds.

        Raises:
            NoFingerprint: it holds something of unknown influence.
        """
        if isinstance(value, (*_PLAIN, *_PLAIN_TORCH)) and not isinstance(value, enum.Enum):
            self._word(type(value).__name__, repr(value))
            return
        if id(value) in self._seen:
            self._word("again", self._seen[id(value)])
            return
        self._seen[id(value)] = len(self._seen)
        self._keep.append(value)  # while it lives, nothing else gets its id
        self._add_new(value, where)

    def _add_new(self, value: Any, where: str) -> None:
        if isinstance(value, torch.Tensor):
            self._tensor(value, where)
        elif isinstance(value, np.ndarray | np.generic):
            self._word("array", value.dtype, value.shape, np.ascontiguousarray(value).tobytes())
        elif isinstance(value, type):
            self._class(value, where)
        elif isinstance(value, types.FunctionType):
            self._function(value, where)
        elif isinstance(value, types.MethodType):
            self.add(value.__func__, where)
            self.add(value.__self__, where)
        elif isinstance(value, types.BuiltinFunctionType | torch._ops.OpOverload | torch._ops.OpOverloadPacket):
            self._word("builtin", getattr(value, "__module__", ""), getattr(value, "__name__", ""), _named(value))
            owner = getattr(value, "__self__", None)
            if owner is not None and not isinstance(owner, types.ModuleType | type):
                self.add(owner, where)
        elif isinstance(value, functools.partial):
            self.add((value.func, value.args, value.keywords), where)
        elif isinstance(value, types.ModuleType):
            self._module_file(value.__name__)
        elif isinstance(value, enum.Enum | PurePath):
            self._word(type(value).__qualname__, str(value))
        else:
            self._container(value, where)

    def _container(self, value: Any, where: str) -> None:
        if isinstance(value, Mapping):
            self.add(type(value), where)
            for key, item in value.items():
                self.add(key, where)
                self.add(item, f"{where}[{key!r}]")
        elif isinstance(value, list | tuple):
            self.add(type(value), where)
            for number, item in enumerate(value):
                self.add(item, f"{where}[{number}]")
        elif isinstance(value, set | frozenset):
            if any(not isinstance(item, _PLAIN) for item in value):
                raise NoFingerprint(f"{where} is a set of other things than plain values")
            self._word("set", *sorted(map(repr, value)))
        elif isinstance(value, torch.jit.ScriptModule):
            raise NoFingerprint(f"{where} is a TorchScript module")
        elif hasattr(value, "__dict__") and not _hides(value, len(_slots(value))):
            self._object(value, where)
        else:
            raise NoFingerprint(f"{where} is a {type(value).__module__}.{type(value).__qualname__}")

    def _object(self, value: Any, where: str) -> None:
        self.add(type(value), where)
        attributes = {name: getattr(value, name) for name in _slots(value) if hasattr(value, name)}
        for name, item in (attributes | vars(value)).items():
            self._word(name)
            self.add(item, f"{where}.{name}")

    def _tensor(self, value: torch.Tensor, where: str) -> None:
        if value.layout is not torch.strided or type(value) not in (torch.Tensor, torch.nn.Parameter):
            raise NoFingerprint(f"{where} is a tensor of class {type(value).__name__} and layout {value.layout}")
        if value.device.type == "meta":
            raise NoFingerprint(f"{where} is a tensor without values (device meta)")
        self.tensors.append(value)
        self._word("tensor", type(value).__name__, value.dtype, tuple(value.shape), value.stride(), value.device)
        flat = value.detach().cpu().contiguous().reshape(-1)
        self._digest.update(memoryview(flat.view(torch.uint8).numpy()))  # type: ignore[arg-type]

    def _class(self, cls: type, where: str) -> None:
        self._word("class", cls.__module__, cls.__qualname__)
        for base in cls.__mro__:
            if base.__module__ != "builtins" and not self._module_file(base.__module__):
                # Typed at a prompt or in a notebook: what its functions compute is all there is.
                for name, item in vars(base).items():
                    if isinstance(item, types.FunctionType | staticmethod | classmethod | property):
                        self._word(name)
                        self._members(item, where)
                    elif isinstance(item, _PLAIN) and not name.startswith("__"):
                        self._word(name, repr(item))

    def _members(self, item: Any, where: str) -> None:
        parts = (item.fget, item.fset) if isinstance(item, property) else (getattr(item, "__func__", item),)
        for part in parts:
            if part is not None:
                self.add(part, where)

    def _function(self, function: types.FunctionType, where: str) -> None:
        self._word("function", function.__module__, function.__qualname__)
        self.add((function.__defaults__, function.__kwdefaults__), where)
        for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
            self._word(name)
            if _cell_holds(cell):
                self.add(cell.cell_contents, f"{where}: {name}")
        if not self._module_file(function.__module__):
            self._code(function.__code__)
            for name in function.__code__.co_names:
                if name in function.__globals__:
                    self._word(name)
                    self.add(function.__globals__[name], f"{where}: {name}")

    def _code(self, code: types.CodeType) -> None:
        self._word("code", code.co_code, code.co_names, code.co_varnames)
        for constant in code.co_consts:
            if isinstance(constant, types.CodeType):
                self._code(constant)
            else:
                self._word(repr(constant))

    def _module_file(self, name: str | None) -> bool:
        """Add the source of a module and of all that it uses; False where there is no file to read."""
        if name not in self._modules:
            found = sources(name or "")
            self._modules[name] = bool(found)
            for path, content in found.items():
                if path not in self._files:
                    self._files.add(path)
                    self._word("source", content)
        return self._modules[name]


def _cell_holds(cell: types.CellType) -> bool:
    """Whether a closure's cell was filled already."""
    try:
        _ = cell.cell_contents
    except ValueError:
        return False
    return True


def _hides(value: Any, slots: int) -> bool:
    # An object with state that no attribute shows (of a C extension) is larger than its attributes explain.
    return type(value).__basicsize__ > object.__basicsize__ + 8 * (slots + 2) or type(value).__itemsize__ > 0


def _slots(value: Any) -> list[str]:
    names: set[str] = set()
    for cls in type(value).__mro__:
        own = cls.__dict__.get("__slots__", ())
        names.update((own,) if isinstance(own, str) else own)
    return sorted(names - {"__dict__", "__weakref__"})


def _named(value: Any) -> str:
    return str(value) if isinstance(value, torch._ops.OpOverload | torch._ops.OpOverloadPacket) else ""


def sources(module: str) -> dict[str, str]:
    """Path -> SHA-256 of the files behind a module: its own and, for the user's code, those of all modules it uses.

    Files of installed packages are told by size and time instead. Empty where the module has no file.
    """
    found: dict[str, str] = {}
    left = [module]
    done: set[str] = set()
    while left:
        name = left.pop()
        loaded = sys.modules.get(name)
        if name in done or loaded is None:
            continue
        done.add(name)
        path = getattr(loaded, "__file__", None)
        if not path or not os.path.isfile(path):
            continue
        if path.startswith(_installed()):
            found[path] = _stamp(path)
            continue
        found[path] = hashlib.sha256(Path(path).read_bytes()).hexdigest()
        for value in list(vars(loaded).values()):
            # What a script makes as it runs is not its source; only what it imports or defines counts.
            if isinstance(value, types.ModuleType):
                left.append(value.__name__)
            elif isinstance(value, type | types.FunctionType) and value.__module__:
                left.append(value.__module__)
    return found


def _stamp(path: str) -> str:
    about = os.stat(path)
    return f"{about.st_size} {about.st_mtime_ns}"


@functools.cache
def _installed() -> tuple[str, ...]:
    paths = {sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")}
    paths.update(site.getsitepackages() if hasattr(site, "getsitepackages") else ())
    paths.add(site.getusersitepackages() if hasattr(site, "getusersitepackages") else "")
    # This package counts as installed wherever it lies; which of its modules are loaded changes as it is used.
    paths.add(str(Path(__file__).parents[1]))
    return tuple(sorted(p for p in paths if p))
