"""A module that is trained in full beside adapters: the module as it was, and a copy for each adapter."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

from torch import nn


class SavedModule(nn.Module):
    """One of `modules_to_save`; the active adapter's copy is called, or the module as it was.

    Attributes:
        original_module: the module as it was, frozen.
        modules_to_save: adapter -> its copy.
        disabled: whether the module as it was is called in any case.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.original_module = module
        self.modules_to_save = nn.ModuleDict()
        self.active: tuple[str, ...] = ()
        self.disabled = False
        self.training = module.training

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name in ("original_module", "modules_to_save"):
                raise
            return getattr(self._current(), name)

    @property
    def adapters(self) -> tuple[str, ...]:
        """Adapters that have a copy."""
        return tuple(self.modules_to_save)

    def add(self, adapter: str) -> None:
        """Make an adapter's copy."""
        self.modules_to_save[adapter] = deepcopy(self.original_module)

    def remove(self, adapter: str) -> None:
        """Forget an adapter's copy, if it has one."""
        if adapter in self.modules_to_save:
            del self.modules_to_save[adapter]
        self.activate(tuple(name for name in self.active if name != adapter))

    def activate(self, adapters: tuple[str, ...]) -> None:
        """Let these count."""
        self.active = tuple(name for name in adapters if name in self.modules_to_save)

    def chosen(self, adapters: tuple[str, ...]) -> nn.Module:
        """The copy of the first of these adapters that has one, else the module as it was."""
        found = next((name for name in adapters if name in self.modules_to_save), None)
        return self.original_module if found is None else self.modules_to_save[found]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the chosen module gives."""
        return self._current()(*args, **kwargs)

    def _current(self) -> nn.Module:
        return self.chosen(() if self.disabled else self.active)
