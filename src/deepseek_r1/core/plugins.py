"""One registry class for every plug-in door: built-ins as a table of strings, third parties by entry points.

Listing imports nothing; getting imports one; a broken plug-in fails alone and by name.
"""

from __future__ import annotations

import difflib
import importlib
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from .errors import PluginError


class Registry:
    """Named things of one kind, imported when asked for.

    Args:
        kind: what the things are, for messages ("engine").
        group: entry-point group that third-party packages use ("deepseek_r1.engines").
        builtins: name -> "module:attribute".

    Example:
        >>> r = Registry("number", "example.numbers", {"pi": "math:pi"})
        >>> r.names()
        ['pi']
        >>> round(r.get("pi"), 2)
        3.14
    """

    def __init__(self, kind: str, group: str, builtins: dict[str, str]) -> None:
        self.kind = kind
        self.group = group
        self._builtins = dict(builtins)
        self._registered: dict[str, Any] = {}
        self._loaded: dict[str, Any] = {}

    def _entry_points(self) -> dict[str, list[EntryPoint]]:
        found: dict[str, list[EntryPoint]] = {}
        for ep in entry_points(group=self.group):
            found.setdefault(ep.name, []).append(ep)
        return found

    def names(self) -> list[str]:
        """All names, sorted. Imports nothing."""
        return sorted({*self._builtins, *self._registered, *self._entry_points()})

    def __contains__(self, name: object) -> bool:
        return name in self.names()

    def register(self, name: str, thing: Any = None) -> Any:
        """Add `thing` under `name` for this process; without `thing`, a decorator. Returns the thing.

        Raises:
            PluginError: the name is taken.
        """
        if thing is None:
            return lambda item: self.register(name, item)
        if name in self.names():
            raise PluginError(f"the {self.kind} {name!r} exists already; choose another name or unregister it first.")
        self._registered[name] = thing
        return thing

    def is_local(self, name: str) -> bool:
        """Whether `name` was added by `register`, so that another process would not know it."""
        return name in self._registered

    def unregister(self, name: str) -> None:
        """Remove what `register` added. Unknown names raise PluginError."""
        if name not in self._registered:
            raise PluginError(f"the {self.kind} {name!r} was not registered in this process.")
        del self._registered[name]

    def get(self, name: str) -> Any:
        """The thing called `name`, imported now if it was not yet.

        Raises:
            PluginError: unknown name (with the nearest one), two packages claim it, or its import failed.
        """
        if name in self._registered:
            return self._registered[name]
        if name in self._loaded:
            return self._loaded[name]
        outside = self._entry_points().get(name, [])
        if len(outside) + (name in self._builtins) > 1:
            who = ", ".join(sorted(["deepseek_r1"] * (name in self._builtins) + [e.value for e in outside]))
            raise PluginError(f"the {self.kind} {name!r} is claimed more than once ({who}); uninstall all but one.")
        if outside:
            target = outside[0].value
        elif name in self._builtins:
            target = self._builtins[name]
        else:
            raise PluginError(self._unknown(name))
        self._loaded[name] = _import(target, f"{self.kind} {name!r}")
        return self._loaded[name]

    def _unknown(self, name: str) -> str:
        names = self.names()
        near = difflib.get_close_matches(str(name), names, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        return f"unknown {self.kind} {name!r}.{hint} Known: {', '.join(names) or 'none'}."


def _import(target: str, what: str) -> Any:
    module, _, attribute = target.partition(":")
    try:
        found: Any = importlib.import_module(module)
        for part in attribute.split(".") if attribute else ():
            found = getattr(found, part)
    except Exception as e:
        raise PluginError(f"the {what} could not be imported from {target!r}: {type(e).__name__}: {e}") from e
    return found
