"""A workshop's programs as one engine runs them, each compiled once. Knows no budget."""

from __future__ import annotations

import shutil
import tempfile
import weakref
from dataclasses import dataclass
from pathlib import Path

from ..core import UnsupportedOpError
from ..engines import ENGINES, Engine, Runner
from ..engines.base import Profile
from ..graph import Program
from ._workshop import Choice, Workshop


@dataclass(frozen=True)
class Form:
    """A program that an engine has compiled, or the reason why it cannot."""

    program: Program
    engine: Engine
    folder: Path
    refused: str = ""

    def open(self) -> Runner:
        """What runs it.

        Raises:
            UnsupportedOpError: the engine could not compile it.
        """
        if self.refused:
            raise UnsupportedOpError(f"{self.program.name!r} on {self.engine.name}: {self.refused}")
        return self.engine.open(self.folder, lambda: self.program)

    def profile(self) -> Profile | None:
        """What times its operators; None if the engine cannot."""
        return self.engine.profile(self.folder)

    @property
    def file_bytes(self) -> int:
        """What the engine keeps on disk."""
        return sum(f.stat().st_size for f in self.folder.rglob("*") if f.is_file())


class Compiler:
    """Compiles programs and keeps what it made until it is let go.

    Args:
        engine: its name.
    """

    def __init__(self, shop: Workshop, engine: str) -> None:
        self.engine = engine
        self._shop = shop
        self._scratch = tempfile.mkdtemp(prefix="deepseek-r1-")
        weakref.finalize(self, shutil.rmtree, self._scratch, ignore_errors=True)
        self._forms: dict[str, Form] = {}

    def choice(self, choice: Choice, *, keep: bool = True) -> Form:
        """The program with a choice of formats."""
        key = repr(sorted((name, str(fmt)) for name, fmt in choice.items()))
        if key in self._forms:
            return self._forms[key]
        form = self.program(self._shop.build(choice))
        if keep:
            self._forms[key] = form
        return form

    def program(self, program: Program) -> Form:
        """Any program."""
        folder = Path(tempfile.mkdtemp(dir=self._scratch))
        engine = _engine_for(self.engine, program)
        return Form(program, engine, folder, _build(engine, program, folder))


def _engine_for(name: str, program: Program) -> Engine:
    """The engine that runs a program under an engine's name: PyTorch, for a float one that it leaves to others."""
    engine: Engine = ENGINES.get(name)()
    if program.precision == "fp32" and not engine.unavailable() and engine.unsupported(program):
        other: Engine = ENGINES.get("eager")()
        return other
    return engine


def _build(engine: Engine, program: Program, folder: Path) -> str:
    if reason := engine.unsupported(program):
        return reason
    try:
        engine.build(program, folder, program.precision)
    except Exception as e:  # an engine may raise anything
        return f"{type(e).__name__}: {str(e).splitlines()[0][:200] if str(e) else ''}"
    return ""
