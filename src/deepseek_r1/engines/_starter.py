"""From engines to candidates: who may start, where each is built, and what becomes of the winner."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.utils._pytree as pytree
from safetensors.torch import save_file

from .. import ops
from ..core import InputError, Report
from ..graph import Program, Signature
from ..measure import peak_memory_of
from ._candidate import Candidate
from ._config import RaceConfig
from ._contender import ChildContender, Contender, LocalContender, Unreadable
from ._float_weights import floats_of_groups
from ._refusals import devices, stored_tensors, tensors_of
from .base import ENGINES, Engine, Runner
from .executable import Executable, falls_behind

#: Share of the free memory that a candidate may take if nothing else was said.
_MEMORY_SHARE = 0.8
#: Operators that every process with torch knows.
_KNOWN_OPERATORS = {"aten", "prim", "prims", "higher_order", "quantized_decomposed", "_operator", "math", "builtins"}


@dataclass(frozen=True, kw_only=True)
class Starter:
    """Makes the candidates of one race.

    Attributes:
        folder: where candidates are built, each in a directory of its own; gone after the race.
        inputs: `(args, kwargs)` that are timed.
        judged: whether there is a dataset to judge lower precisions on.
    """

    folder: Path
    inputs: Any
    report: Report
    config: RaceConfig
    judged: bool
    _saved: dict[int, Path | str] = field(default_factory=dict)

    def plain(self, executable: Executable) -> Candidate:
        """The baseline: eager PyTorch in this process."""
        program = executable.program
        return Candidate(
            name=f"eager {program.precision}",
            prepare=lambda: _local(executable, self.inputs),
            size_bytes=program.parameters_bytes,
            exact=True,
            measure_peak=partial(self._peak_memory, "eager", program, None),
            tag=executable,
        )

    def candidates(self, engine: str, program: Program, *, own: str, baseline: Executable) -> Iterator[Candidate]:
        """Each precision in which an engine can run the program; who cannot start is said in the report.

        Args:
            own: precision of the model itself; a candidate below it needs a dataset to be judged on.
        """
        plugin: Engine = ENGINES.get(engine)()
        if reason := plugin.unavailable() or plugin.unsupported(program):
            self.report.skip(f"{engine} {program.precision}", reason)
            return
        for precision in plugin.precisions(program):
            name = f"{engine} {precision}"
            if engine == "eager" and (program.source or program) is baseline.program and precision == own:
                continue
            if precision != own and not self.judged:
                why = "below the model's own precision, and no dataset to check its accuracy on: give optimize dataset="
                self.report.skip(name, why)
                continue
            where = self.folder / f"{engine}-{program.precision}-{precision}"
            yield Candidate(
                name=name,
                prepare=partial(self._prepare, plugin, engine, program, precision, where),
                size_bytes=_size(plugin, program, precision),
                exact=precision == own,
                measure_peak=partial(self._peak_memory, engine, program, where),
                tag=(engine, program, precision, where),
            )

    def reopen(self, candidate: Candidate) -> Contender:
        """A candidate again, from what was built for the race."""
        engine, program, precision, where = candidate.tag
        return self._prepare(ENGINES.get(engine)(), engine, program, precision, where)

    def _prepare(self, plugin: Engine, engine: str, program: Program, precision: str, where: Path) -> Contender:
        build = not where.exists()
        where.mkdir(exist_ok=True)
        saved = self._travels(engine, program)
        if isinstance(saved, Path):
            try:
                return self._in_child(saved, engine, program, precision, where, build)
            except Unreadable as e:
                saved = self._saved[id(program)] = f"a child process cannot read the program: {e}"
        self.report.note(f"{engine} {precision} was raced in this process: {saved}")
        if build:
            plugin.build(program, where, precision)
        runner = plugin.open(where, lambda: program)
        return _local(self._executable(engine, program, precision, runner), self.inputs, runner)

    def _in_child(
        self, saved: Path, engine: str, program: Program, precision: str, where: Path, build: bool
    ) -> Contender:
        contender = ChildContender(
            saved, _imports(program.signature), engine, precision, where,
            timeout_s=self.config.timeout_s, memory_bytes=self._allowed_memory(),
            device=_device(program), libraries=_libraries(program), build=build,
        )  # fmt: skip
        if not build:
            return contender
        took = contender.seconds
        how = "building and opening, in a process of its own"
        self.report.add(f"compile time, {engine} {precision}", took["build_s"] + took["open_s"], unit="s", how=how)
        return contender

    def _travels(self, engine: str, program: Program) -> Path | str:
        """The saved program for a child process, or why it has to stay in this one."""
        if not self.config.isolated:
            return "asked for by RaceConfig(isolated=False)"
        if ENGINES.is_local(engine):
            return "the engine is registered in this process only"
        if id(program) not in self._saved:
            self._saved[id(program)] = self._save(program)
        return self._saved[id(program)]

    def _save(self, program: Program) -> Path | str:
        if len(devices(program)) > 1:
            return f"the model is on {' and '.join(sorted(devices(program)))}"
        if not sys.executable:
            return "there is no Python executable to start a child process with"
        if strangers := _strangers(program):
            return f"operators of {', '.join(strangers)} are known to this process only"
        if "__main__" in _imports(program.signature):
            return "its inputs or outputs are of a class that this process defines"
        try:
            file = self.folder / f"program-{len(self._saved)}.dr1"
            return replace(program, example_inputs=self.inputs, parent=None).save(file)
        except Exception as e:  # torch's writer fails in many ways; the race goes on here
            return f"the program cannot be saved: {type(e).__name__}: {str(e)[:200]}"

    def _allowed_memory(self) -> float:
        if self.config.memory_gb is not None:
            return self.config.memory_gb * 1e9
        return _MEMORY_SHARE * _free_memory()

    def open(self, winner: Candidate) -> Executable:
        """The winner, opened in this process."""
        engine, program, precision, where = winner.tag
        # What was simplified has copies of the weights that passes rewrote; the engine has its own by now.
        source = program.source or program
        runner = ENGINES.get(engine)().open(where, lambda: source)
        return self._executable(engine, program, precision, runner)

    def files(self, winner: Candidate) -> Path:
        """Where the winner was built."""
        where: Path = winner.tag[3]
        return where

    def _executable(self, engine: str, program: Program, precision: str, runner: Runner) -> Executable:
        # A pass rewrites copies of the weights; the ones that training changes are those of the source.
        program = program.source or program
        watch = list(stored_tensors(program)) if falls_behind(engine, program) else []
        return Executable(
            program, engine, runner, self.report, precision=precision, watch=watch, passes=self.config.passes
        )

    def _peak_memory(self, engine: str, program: Program, built: Path | None) -> int:
        file = self._travels(engine, program)
        if devices(program) != {"cpu"}:
            raise InputError("a process's peak memory says nothing about that of a GPU")
        if isinstance(file, str):
            raise InputError(f"no process of its own can run it: {file}")
        leaves = pytree.tree_leaves(self.inputs)
        tensors = {str(i): v.contiguous().clone() for i, v in enumerate(leaves) if isinstance(v, torch.Tensor)}
        save_file(tensors, self.folder / "probe")
        plain = json.dumps([None if isinstance(v, torch.Tensor) else v for v in leaves])
        arguments = [str(file), engine, str(built or ""), str(self.folder / "probe"), plain]
        arguments.append(json.dumps(_libraries(program)))
        return peak_memory_of(_RUN_ONCE, arguments, timeout_s=self.config.timeout_s)[0]


_RUN_ONCE = """
import json, sys
from pathlib import Path
import torch
from safetensors.torch import load_file
from deepseek_r1 import ops
from deepseek_r1.engines import ENGINES
from deepseek_r1.graph import Program
program, engine, built, probe, plain, libraries = sys.argv[1:]
tensors = load_file(probe)
leaves = [tensors.get(str(i), v) for i, v in enumerate(json.loads(plain))]
for name, library in json.loads(libraries).items():
    ops.register_custom_op(name, library)
run = ENGINES.get(engine)().open(Path(built), lambda: Program.load(program))
with torch.no_grad():
    for _ in range(3):
        run(leaves)
"""


def _imports(signature: Signature) -> list[str]:
    """Modules that define the classes in which a program's inputs and outputs nest."""
    found: set[str] = set()
    left = [signature.in_tree, signature.out_tree]
    while left:
        spec = left.pop()
        if spec.type is not None:
            found.add(spec.type.__module__)
        left.extend(spec.children())
    return sorted(found - {"builtins", "collections"})


def _local(executable: Executable, inputs: Any, runner: Runner | None = None) -> LocalContender:
    args, kwargs = inputs
    tree = pytree.tree_structure(inputs)
    on_gpu = any(isinstance(v, torch.Tensor) and v.device.type == "cuda" for v in pytree.tree_leaves(inputs))

    def call() -> Any:
        outputs = executable(*args, **kwargs)
        if on_gpu:
            torch.cuda.synchronize()
        return outputs

    def run(leaves: Sequence[Any]) -> list[torch.Tensor]:
        if runner is not None:
            with torch.no_grad():
                return list(runner(leaves))
        args, kwargs = pytree.tree_unflatten(list(leaves), tree)
        return [v for v in pytree.tree_leaves(executable(*args, **kwargs)) if isinstance(v, torch.Tensor)]

    return LocalContender(run, call)


def _strangers(program: Program) -> list[str]:
    """Namespaces of operators that neither torch nor a library of operators brings to another process."""
    found: set[str] = set()
    for node in program.exported.graph.nodes:
        if node.op != "call_function":
            continue
        space = str(getattr(node.target, "namespace", None) or getattr(node.target, "__module__", ""))
        if not (space == ops.NAMESPACE and str(node.target).split(".")[1] in ops.libraries()):
            found.add(space)
    return sorted(found - _KNOWN_OPERATORS)


def _libraries(program: Program) -> dict[str, str]:
    """The library file of each C++ operator in the graph."""
    targets = {str(n.target) for n in program.exported.graph.nodes if n.op == "call_function"}
    used = {name.split(".")[1] for name in targets if name.startswith(f"{ops.NAMESPACE}.")}
    return {name: str(path) for name, path in ops.libraries().items() if name in used}


def _device(program: Program) -> str:
    """The device of a program that is on one, with its number."""
    return next((str(t.device) for t in tensors_of(program)), "cpu")


def _size(engine: Engine, program: Program, precision: str) -> int:
    """Bytes of the weights in a precision: a float32 program computed in 16 bits still ships what its engine stores."""
    grown = 0 if engine.keeps_groups else floats_of_groups(program)
    halves = precision in ("bf16", "fp16") and program.precision == "fp32"
    return (program.parameters_bytes + grown) // (2 if halves else 1)


def _free_memory() -> float:
    try:
        with open("/proc/meminfo") as f:
            kilobytes = {line.split(":")[0]: int(line.split()[1]) for line in f}
        return kilobytes["MemAvailable"] * 1024.0
    except (OSError, ValueError, KeyError, IndexError):
        pages: int = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        return float(pages)
