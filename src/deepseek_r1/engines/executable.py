"""`Executable`: a program compiled by one engine, called like the module it came from."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Sequence
from functools import cache
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch

from ..core import QUANTISED, ArtifactError, InputError, PluginError, Report, atomic
from ..graph import Program, Signature, evaluation, simplify
from .base import ENGINES, Runner, compile_program

SCHEMA_VERSION = 1
_ABOUT = "executable.json"
_VERSION = attrgetter("_version")


def falls_behind(engine: str, program: Program) -> bool:
    """Whether what was compiled can differ from the weights: eager reads them, a quantised program has its own."""
    return engine != "eager" and program.precision not in QUANTISED


class Executable:
    """A callable with an engine, a precision and a report. Answers only; it does not train.

    Weights that are changed in place afterwards (by training the module further) are noticed at the next call, and
    the engine compiles again.

    Args:
        program: what is run, or a function that gives it; None while nothing was captured yet.
        engine: name of the engine.
        runner: the compiled program.
        precision: what the engine computes in; the program's own if None.
        signature: the program's, where that is known without it.
        watch: tensors whose change makes the compiled program stale.
        prepare: called with the first call's inputs to make the real executable (capture at the first call).
        module: run as it is, where nothing is to be captured.
        passes: what the program is simplified with before it is compiled again; None for all, () for none.
    """

    def __init__(
        self,
        program: Program | Callable[[], Program] | None,
        engine: str,
        runner: Runner | None,
        report: Report,
        *,
        precision: str | None = None,
        signature: Signature | None = None,
        watch: Sequence[torch.Tensor] = (),
        prepare: Callable[[Any], Executable] | None = None,
        module: torch.nn.Module | None = None,
        passes: tuple[str, ...] | None = (),
    ) -> None:
        self._program = cache(program) if callable(program) and not isinstance(program, Program) else program
        self._engine = engine
        self._precision = precision
        self._runner = runner
        self._watch = [t for t in watch if not t.is_inference()]
        self._state = self._versions()
        self._prepare = prepare
        self._passes = passes
        self._module = module
        self._parts = [] if module is None else list(module.modules())
        self.report = report
        self._signature = program.signature if isinstance(program, Program) else signature
        if self._signature is not None:
            # Most models take tensors by position and give one; both need no walk through nested values.
            self._positional, self._single = self._signature.positional, self._signature.single

    @property
    def program(self) -> Program:
        """The program that runs. Raises InputError if nothing was captured, or not yet."""
        if self._program is None and self._module is not None:
            raise InputError('there is no program: method="dynamic" captures nothing.')
        if self._program is None:
            raise InputError("nothing was captured yet: call the executable once, or give optimize example_inputs.")
        return self._program if isinstance(self._program, Program) else self._program()

    @property
    def engine(self) -> str:
        """Name of the engine."""
        return self._engine

    @property
    def precision(self) -> str:
        """Precision in which the engine computes."""
        if self._precision is None and self._program is None and self._module is not None:
            return "fp32"
        return self._precision or self.program.precision

    def _versions(self) -> tuple[list[int], list[int]]:
        # At every call: `map` takes two thirds of a comprehension's time.
        return list(map(_VERSION, self._watch)), list(map(torch.Tensor.data_ptr, self._watch))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run; takes and gives what the module takes and gives.

        Raises:
            InputError: the inputs do not fit the captured graph.
        """
        if self._module is not None:
            return self._run_module(args, kwargs)
        if self._prepare is not None:
            made = self._prepare((args, kwargs))
            self.__dict__.update(made.__dict__)
            if self._module is not None:
                return self._run_module(args, kwargs)
        if self._watch and self._versions() != self._state:
            self.refresh()
        signature = self._signature
        assert signature is not None, "what was captured has a signature"
        assert self._runner is not None, "an executable without a runner has a prepare step"
        leaves: Sequence[Any]
        if len(args) == self._positional and not kwargs and all(isinstance(a, torch.Tensor) for a in args):
            leaves = args
        else:
            read = signature.leaves(args, kwargs)
            if read is None:
                raise InputError(signature.misfit(args, kwargs) or f"the inputs must nest as {signature.in_tree}.")
            leaves = read
        if outside := signature.outside(leaves):
            raise InputError(signature.misfit(args, kwargs) or outside)
        with torch.no_grad():
            try:
                outputs = self._runner(leaves)
            except Exception as e:
                if misfit := signature.misfit(args, kwargs):
                    raise InputError(misfit) from e
                raise
        return outputs[0] if self._single else signature.nest(outputs)

    def _run_module(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        module = self._module
        assert module is not None, "only called where there is a module"
        training = any(part.training for part in self._parts)
        try:
            with torch.no_grad(), evaluation(module) if training else contextlib.nullcontext():
                return module(*args, **kwargs)
        except Exception as e:
            # Only a misfit of the inputs is the caller's; everything else is passed on as it is.
            if self._signature is not None and (misfit := self._signature.misfit(args, kwargs)):
                raise InputError(misfit) from e
            raise

    def refresh(self) -> None:
        """Compile again from the weights as they are now."""
        program = simplify(self.program, self._passes, strict=False)
        engine = ENGINES.get(self._engine)()
        self._runner = compile_program(engine, program, self._precision, fallback=self.program)
        self._state = self._versions()
        self.report.note("the weights were changed after compiling; compiled again")

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write program, engine name and report to a directory, whole or not at all.

        Raises:
            InputError: `path` is a file, or a directory with other things in it.
        """
        target = Path(path)
        if target.is_file() or (target.is_dir() and any(target.iterdir()) and not (target / _ABOUT).is_file()):
            raise InputError(f"{target} is a file or a directory with other things in it; give a new or an empty one.")
        about = {"schema_version": SCHEMA_VERSION, "engine": self._engine, "precision": self.precision}
        with atomic.atomic_dir(path) as tmp:
            self.program.save(tmp / "program.dr1")
            self.report.save(tmp / "report.json")
            atomic.write_json(tmp / _ABOUT, about)
        return Path(path)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Executable:
        """Read what `save` wrote and compile it on the same engine.

        Raises:
            ArtifactError: damaged, altered or of a later version.
            PluginError: the engine is not installed here, or cannot run the program here.
        """
        root = Path(path)
        atomic.recover_dir(root)
        try:
            about = json.loads((root / _ABOUT).read_text())
            version, engine, precision = about["schema_version"], about["engine"], about.get("precision")
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
            raise ArtifactError(f"{root} is no saved executable: {e}") from e
        if not isinstance(version, int) or version > SCHEMA_VERSION:
            raise ArtifactError(f"{root} has schema version {version!r}; this release reads up to {SCHEMA_VERSION}.")
        program = Program.load(root / "program.dr1")
        plugin = ENGINES.get(engine)()
        reason = plugin.unavailable() or plugin.unsupported(program)
        if not reason and precision is not None and precision not in plugin.precisions(program):
            reason = f"it does not compute in {precision!r} here"
        if reason:
            raise PluginError(f"{root} was saved for the engine {engine!r}, which cannot run it here: {reason}")
        runner = compile_program(plugin, program, precision)
        return cls(program, engine, runner, Report.load(root / "report.json"), precision=precision)

    def __repr__(self) -> str:
        if self._module is not None:
            what = f"{type(self._module).__name__} as it is"
        elif self._signature is None:
            what = "not captured yet"
        else:
            what = f"{self._signature.title}, {self.precision}"
        return f"Executable({what}, engine={self._engine!r})"
