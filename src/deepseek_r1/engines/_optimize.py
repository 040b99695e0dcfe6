"""`optimize`: capture, race the engines, return the fastest right executable."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.utils._pytree as pytree

from ..core import Budget, CheckFailedError, ConfigError, InputError, Report, probe
from ..data import batch_size, unpack_batch
from ..graph import Program, as_inputs, capture, float64_module, preserved, simplify, to_float64
from ._candidate import Candidate
from ._config import RaceConfig
from ._eager import eager_runner
from ._race import Task
from ._race import race as run_race
from ._remember import Memory, keep, memory_of, recall
from ._starter import Starter
from .base import ENGINES
from .executable import Executable

#: Samples of the dataset after which no further batch is taken to judge a candidate's accuracy.
_SAMPLES = 4096


def optimize(
    model: torch.nn.Module | Program,
    method: str = "static",
    example_inputs: Any = None,
    dataset: Iterable[Any] | None = None,
    budget: Budget | None = None,
    *,
    engines: Sequence[str] | None = None,
    race: RaceConfig | None = None,
) -> Executable:
    """Turn a dynamic graph into the fastest right executable on this machine.

    Candidates are each engine on the program and, for a quantised program, on its float parent too. A float32
    candidate must be about as close to a float64 reference as eager float32 is; a lower precision must keep the
    accuracy on `dataset` within `budget.accuracy_drop` (0.005 by default). Whoever is right and surely faster than
    eager (95 % interval of paired timings) can win; otherwise eager is returned, and the report says so.

    Args:
        model: a module or a Program.
        method: "static" races the engines; "dynamic" keeps eager PyTorch, and captures nothing.
        example_inputs: a tensor, a tuple or a mapping. Their batch size is the one that is timed. Without them the
            first batch of `dataset` is taken; without that, capture waits for the first call.
        dataset: batches that judge accuracy: `(inputs, labels)`, a mapping, or inputs alone.
        budget: limits; they are held or an error is raised. Peak memory (`memory_gb`) is that of a fresh process
            with PyTorch, on the CPU.
        engines: names to race; by default all that are registered, except "null".
        race: how the candidates are built and timed.

    Raises:
        ConfigError: unknown method; PluginError: unknown engine.
        CaptureError: the module cannot be a static graph; the message says where and what to do.
        CheckFailedError: the winner does not meet the budget; its `report` has all measurements.

    Example:
        >>> net = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU())
        >>> fast = optimize(net, example_inputs=torch.randn(4, 8))
        >>> torch.allclose(fast(torch.ones(2, 8)), net(torch.ones(2, 8)), atol=1e-5)
        True
    """
    budget, config = budget or Budget(), race or RaceConfig()
    chosen = _checked(model, method, engines, budget)
    if method == "dynamic" and not isinstance(model, Program):
        return Executable(None, "eager", None, _kept_eager(type(model).__name__), module=model)
    batches = _batches(dataset)
    if example_inputs is None and batches:
        args, kwargs, _ = unpack_batch(batches[0])
        example_inputs = kwargs or args
    if example_inputs is not None:
        args, kwargs = as_inputs(example_inputs)
    elif isinstance(model, Program):
        args, kwargs = model.example_inputs
    else:
        return _at_first_call(model, method, chosen, budget, config)
    if isinstance(model, Program) and (misfit := model.misfit(args, kwargs)):
        raise InputError(f"the example inputs do not fit: {misfit}")
    if method == "dynamic":
        assert isinstance(model, Program), "a module was returned above"
        return Executable(model, "eager", eager_runner(model), _kept_eager(model.name))
    memory = memory_of(model, (args, kwargs), chosen, budget, batches, config)
    kept, note = recall(memory, model, (args, kwargs))
    if kept is not None:
        return kept
    program, module = (model, None) if isinstance(model, Program) else (capture(model, kwargs or args), model)
    with tempfile.TemporaryDirectory(prefix="deepseek-r1-", ignore_cleanup_errors=True) as folder:
        executable = _choose(program, chosen, budget, batches, (args, kwargs), module, config, memory, Path(folder))
    if note:
        executable.report.note(note)
    return executable


def _checked(model: Any, method: str, engines: Sequence[str] | str | None, budget: Budget) -> list[str]:
    """The names of the engines to race; raises for arguments that cannot be meant."""
    if method not in ("static", "dynamic"):
        raise ConfigError(f'optimize(method={method!r}): "static" or "dynamic" is needed.')
    if not isinstance(model, torch.nn.Module | Program):
        raise InputError(f"optimize needs a torch.nn.Module or a Program, given {type(model).__name__}.")
    engines = [engines] if isinstance(engines, str) else engines
    chosen = list(engines) if engines is not None else [n for n in ENGINES.names() if n != "null"]
    for name in chosen:
        ENGINES.get(name)
    if budget.accuracy_drop is not None and budget.accuracy_drop > 1:
        raise ConfigError(
            f"optimize(budget=Budget(accuracy_drop={budget.accuracy_drop!r})): accuracy lies between 0 and 1, so at "
            "most 1 can be lost; 0.005 is half a percentage point."
        )
    return chosen


def _kept_eager(name: str) -> Report:
    report = Report(f"optimize {name}")
    report.note('eager PyTorch was kept, as method="dynamic" asks')
    return report


def _batches(dataset: Iterable[Any] | None) -> list[Any]:
    if dataset is None:
        return []
    found: list[Any] = []
    samples = 0
    for batch in dataset:
        found.append(batch)
        samples += batch_size(*unpack_batch(batch)[:2])
        if samples >= _SAMPLES:
            break
    if not found:
        raise InputError("optimize(dataset=...): the dataset is empty.")
    return found


def _at_first_call(
    model: torch.nn.Module, method: str, engines: list[str], budget: Budget, config: RaceConfig
) -> Executable:
    report = Report(f"optimize {type(model).__name__}")
    report.note("captured at the first call")

    def prepare(inputs: Any) -> Executable:
        args, kwargs = inputs
        if args and kwargs:
            raise InputError("the first call of an executable without example inputs: all by position or all by name.")
        return optimize(model, method, kwargs or args, None, budget, engines=engines, race=config)

    return Executable(None, "eager", None, report, prepare=prepare)


def _choose(
    program: Program, engines: list[str], budget: Budget, batches: list[Any], inputs: Any,
    module: torch.nn.Module | None, config: RaceConfig, memory: Memory, folder: Path,
) -> Executable:  # fmt: skip
    report = Report(f"optimize {program.name}")
    report.facts.update(probe().facts())
    parent = program if program.parent is None else program.parent
    args, kwargs = to_float64(inputs)
    with torch.no_grad():
        reference = float64_module(parent)(*args, **kwargs)
    task = Task(
        probe=pytree.tree_leaves(inputs),
        reference=[v for v in pytree.tree_leaves(reference) if isinstance(v, torch.Tensor)],
        batches=[_flat(batch, program) for batch in batches],
        kind=config.task,
    )
    # The plain thing is the user's own module where there is one, not the graph that was captured from it.
    plain = Executable(parent, "eager", eager_runner(parent), report, module=module)
    starter = Starter(folder=folder, inputs=inputs, report=report, config=config, judged=bool(batches))
    baseline = starter.plain(plain)
    simple = [simplify(p, config.passes, strict=False) for p in ([program] if program is parent else [program, parent])]
    report.sections.extend(p.report for p in simple if p.source is not None)
    rivals = [
        candidate
        for source in simple
        for engine in engines
        for candidate in starter.candidates(engine, source, own=parent.precision, baseline=plain)
    ]
    # Timing calls the module many times; a buffer that it updates is afterwards what it was.
    with preserved(module or parent.module()):
        winner, decided = run_race(baseline, rivals, task, budget, report, config)
    assert winner.latency is not None, "the winner was timed"
    report.add("winner", winner.name, before=baseline.name)
    _check_budget(winner, budget, report)
    if winner is baseline:
        if decided:
            keep(memory, plain, "own" if parent is program else "parent", None, report)
        elif memory.cache is not None:
            report.note("not kept in the cache: on a quieter machine, or with more rounds, another engine may win")
        return plain
    executable = starter.open(winner)
    keep(memory, executable, "own" if executable.program is program else "parent", starter.files(winner), report)
    return executable


def _check_budget(winner: Candidate, budget: Budget, report: Report) -> None:
    assert winner.latency is not None, "the winner was timed"
    if budget.latency_ms is not None:
        detail = f"{winner.latency.median_ms:.4g} ms, budget {budget.latency_ms:g} ms"
        report.check("latency budget", winner.latency.median_ms <= budget.latency_ms, detail)
    if budget.size_mb is not None:
        detail = f"{winner.size_bytes / 1e6:.4g} MB, budget {budget.size_mb:g} MB"
        report.check("size budget", winner.size_bytes <= budget.size_mb * 1e6, detail)
    if budget.memory_gb is not None:
        peak = winner.peak_bytes
        detail = f"{'not measured' if peak is None else f'{peak / 1e9:.3f} GB'}, budget {budget.memory_gb:g} GB"
        report.check("memory budget", peak is not None and peak <= budget.memory_gb * 1e9, detail)
    if not report.ok:
        raise CheckFailedError("; ".join(f"{c.name}: {c.detail}" for c in report.failed), report=report)


def _flat(batch: Any, program: Program) -> tuple[list[Any], Any]:
    args, kwargs, labels = unpack_batch(batch)
    if misfit := program.misfit(args, kwargs):
        raise InputError(f"dataset: {misfit}")
    return pytree.tree_leaves((args, kwargs)), labels
