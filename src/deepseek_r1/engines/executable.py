"""`Executable`: a program compiled by one engine, called like the module it came from."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch.fx import Node

from ..core import ArtifactError, InputError, PluginError, Report, atomic
from ..graph import Program, evaluation
from .base import ENGINES, Runner, compile_program

SCHEMA_VERSION = 1
_ABOUT = "executable.json"


class Executable:
    """A callable with an engine, a precision and a report. Answers only; it does not train.

    Weights that are changed in place afterwards (by training the module further) are noticed at the next call, and
    the engine compiles again.

    Args:
        program: what is run; None while nothing was captured yet.
        engine: name of the engine.
        runner: the compiled program.
        watch: tensors whose change makes the compiled program stale.
        prepare: called with the first call's inputs to make the real executable (capture at the first call).
        module: run as it is, where nothing is to be captured.
    """

    def __init__(
        self,
        program: Program | None,
        engine: str,
        runner: Runner | None,
        report: Report,
        *,
        watch: Sequence[torch.Tensor] = (),
        prepare: Callable[[Any], Executable] | None = None,
        module: torch.nn.Module | None = None,
    ) -> None:
        self._program = program
        self._engine = engine
        self._runner = runner
        self._watch = [t for t in watch if not t.is_inference()]
        self._state = self._versions()
        self._prepare = prepare
        self._module = module
        self._parts = [] if module is None else list(module.modules())
        self.report = report
        if program is not None:
            self._adopt(program)

    def _adopt(self, program: Program) -> None:
        _, self._in_tree = pytree.tree_flatten(program.example_inputs)
        output = next(n for n in program.exported.graph.nodes if n.op == "output")
        skip = len(program.exported.graph_signature.output_specs) - len(program.exported.graph_signature.user_outputs)
        self._template = list(pytree.tree_leaves(output.args[0]))[skip:]
        spec = program.exported.call_spec.out_spec
        assert spec is not None, "a captured program always knows the nest of its outputs"
        self._out_tree = spec
        # Most models take tensors by position and give one; both need no walk through nested values.
        args, kwargs = program.example_inputs
        plain = not kwargs and all(isinstance(a, torch.Tensor) for a in args)
        self._positional = len(args) if plain else -1
        self._single = spec.is_leaf() and len(self._template) == 1 and isinstance(self._template[0], Node)

    @property
    def program(self) -> Program:
        """The program that runs. Raises InputError if nothing was captured, or not yet."""
        if self._program is None and self._module is not None:
            raise InputError('there is no program: method="dynamic" captures nothing.')
        if self._program is None:
            raise InputError("nothing was captured yet: call the executable once, or give optimize example_inputs.")
        return self._program

    @property
    def engine(self) -> str:
        """Name of the engine."""
        return self._engine

    @property
    def precision(self) -> str:
        """Precision of the program that runs."""
        if self._program is None and self._module is not None:
            return "fp32"
        return self.program.precision

    def _versions(self) -> list[tuple[int, int]]:
        return [(t._version, t.data_ptr()) for t in self._watch]

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
        if self._watch and self._versions() != self._state:
            self.refresh()
        assert self._runner is not None, "an executable without a runner has a prepare step"
        leaves: Sequence[Any]
        if len(args) == self._positional and not kwargs and all(isinstance(a, torch.Tensor) for a in args):
            leaves = args
        else:
            leaves, tree = pytree.tree_flatten((args, kwargs))
            if tree != self._in_tree:
                raise InputError(self.program.misfit(args, kwargs) or f"the inputs must nest as {self._in_tree}.")
        if outside := self.program.outside(leaves):
            raise InputError(self.program.misfit(args, kwargs) or outside)
        with torch.no_grad():
            try:
                outputs = self._runner(leaves)
            except Exception as e:
                if misfit := self.program.misfit(args, kwargs):
                    raise InputError(misfit) from e
                raise
        if self._single:
            return outputs[0]
        results = iter(outputs)
        filled = [next(results) if isinstance(slot, Node) else slot for slot in self._template]
        return pytree.tree_unflatten(filled, self._out_tree)

    def _run_module(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        module = self._module
        assert module is not None, "only called where there is a module"
        training = any(part.training for part in self._parts)
        try:
            with torch.no_grad(), evaluation(module) if training else contextlib.nullcontext():
                return module(*args, **kwargs)
        except Exception as e:
            # Only a misfit of the inputs is the caller's; everything else is passed on as it is.
            if self._program is not None and (misfit := self._program.misfit(args, kwargs)):
                raise InputError(misfit) from e
            raise

    def refresh(self) -> None:
        """Compile again from the weights as they are now."""
        self._runner = compile_program(ENGINES.get(self._engine)(), self.program)
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
        with atomic.atomic_dir(path) as tmp:
            self.program.save(tmp / "program.dr1")
            self.report.save(tmp / "report.json")
            atomic.write_json(tmp / _ABOUT, {"schema_version": SCHEMA_VERSION, "engine": self._engine})
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
            version, engine = about["schema_version"], about["engine"]
        except (OSError, ValueError, KeyError, TypeError) as e:
            raise ArtifactError(f"{root} is no saved executable: {e}") from e
        if not isinstance(version, int) or version > SCHEMA_VERSION:
            raise ArtifactError(f"{root} has schema version {version!r}; this release reads up to {SCHEMA_VERSION}.")
        program = Program.load(root / "program.dr1")
        plugin = ENGINES.get(engine)()
        if reason := plugin.unavailable() or plugin.unsupported(program):
            raise PluginError(f"{root} was saved for the engine {engine!r}, which cannot run it here: {reason}")
        runner = compile_program(plugin, program)
        return cls(program, engine, runner, Report.load(root / "report.json"))

    def __repr__(self) -> str:
        what = "not captured yet" if self._program is None else f"{self._program.name}, {self.precision}"
        what = what if self._module is None else f"{type(self._module).__name__} as it is"
        return f"Executable({what}, engine={self._engine!r})"
