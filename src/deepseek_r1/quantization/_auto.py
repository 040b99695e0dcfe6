"""`AutoQuantizer`: a format for each layer under budgets of accuracy, bytes and measured milliseconds at once."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.utils._pytree as pytree

from ..core import Budget, CheckFailedError, ConfigError, InputError, Report, progress
from ..data import batch_size, slice_batch, unpack_batch
from ..engines import ENGINES, default_root
from ..graph import Program, as_inputs, capture
from ._auto_config import AutoConfig
from ._auto_report import describe, describe_failure
from ._compiled import Compiler
from ._latency import LatencyTable, measure_table
from ._ptq import check_inputs, told
from ._scores import Findings, fingerprint
from ._search import OBJECTIVES, Candidate, Costs, Goal, Search, cheapest, within
from ._sensitivity import Pair, Sensitivity, calibrated, spread
from ._solver import envelope
from ._task import Outputs, Task
from ._verify import Comparison, Judge, Verdict
from ._workshop import Workshop

METHODS = ("mixed-precision",)


class AutoQuantizer:
    """Finds a format for each layer.

    How much each layer costs in each format is estimated from gradients and partly measured; how long it takes is
    measured on the engine that will run it. An integer program then chooses, and what it chose is built, timed and
    judged on data that it has not seen, against the float model and the best format for all layers alike: what is
    returned is never worse than those. Everything that was found out serves the next budget too, and is kept in a file
    so that an interrupted search goes on.

    Args:
        model: a module in float32, or a captured Program.
        dataset: batches: `(inputs, labels)`, a mapping, or inputs alone. The first calibrate, the next verify.
        example_inputs: inputs to capture with, and of the call whose latency counts (one sample, say); by default the
            first batch, or those of the Program.
        config: see `AutoConfig`.

    Example:
        >>> import torch
        >>> from deepseek_r1.core import Budget, Int8Weight
        >>> net = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 4))
        >>> data = [torch.randn(16, 64) for _ in range(4)]
        >>> config = AutoConfig(engine="eager", formats=(Int8Weight(),), seconds=0.2)
        >>> small = AutoQuantizer(net, dataset=data, config=config).quantize(budget=Budget(size_mb=0.006))
        >>> small.precision, small.parameters_bytes < 6000
        ('int8', True)
    """

    def __init__(
        self,
        model: torch.nn.Module | Program,
        *,
        dataset: Iterable[Any],
        example_inputs: Any = None,
        config: AutoConfig | None = None,
    ) -> None:
        self.config = config or AutoConfig()
        if reason := ENGINES.get(self.config.engine)().unavailable():
            raise ConfigError(f"AutoConfig(engine={self.config.engine!r}): {reason}")
        wanted = self.config.calibration_batches + self.config.held_out_batches
        batches = list(islice(iter(dataset), wanted))
        if not batches:
            raise InputError("AutoQuantizer(dataset=...): the dataset is empty.")
        if not isinstance(model, Program):
            args, kwargs, _ = unpack_batch(batches[0])
            model = capture(model, example_inputs if example_inputs is not None else kwargs or args)
        self._program = model
        timed = model.example_inputs if example_inputs is None else as_inputs(example_inputs)
        self._timed = check_inputs(model, *timed)
        self._notes: list[str] = []
        mine, others = self._parts(batches)
        self._calibration = [self._read(batch) for batch in mine]
        self._held_out = [self._read(batch) for batch in others]
        self._prepared: _Prepared | None = None

    def _parts(self, batches: Sequence[Any]) -> tuple[list[Any], list[Any]]:
        """Batches that calibrate, and those that verify."""
        if len(batches) > 1:
            count = self.config.calibrating(len(batches))
            return list(batches[:count]), list(batches[count:])
        args, kwargs, labels = unpack_batch(batches[0])
        size = batch_size(args, kwargs)
        if size == 1:
            self._notes.append("one sample was given: the same one calibrates and verifies, which proves nothing")
            return [batches[0]], [batches[0]]
        halves = []
        for start, stop in ((0, (size + 1) // 2), ((size + 1) // 2, size)):
            cut = slice_batch((args, kwargs, labels), start, stop)
            halves.append((cut[1] or cut[0], cut[2]))
        return halves[:1], halves[1:]

    def _read(self, batch: Any) -> tuple[tuple[Any, ...], Any]:
        args, kwargs, labels = unpack_batch(batch)
        return check_inputs(self._program, args, kwargs), labels

    @property
    def task(self) -> Task:
        """How answers are compared."""
        return self._prepare().task

    def quantize(self, method: str = "mixed-precision", budget: Budget | None = None) -> Program:
        """The program with the formats that suit a budget.

        Args:
            method: "mixed-precision".
            budget: any of accuracy_drop, size_mb and latency_ms. Without one: the smallest latency at which at most
                0.5 points of accuracy, or 1 % of the output where there are no classes, are lost.

        Returns:
            A Program whose parent is the float one, with a report; the float program itself if nothing beats it.

        Raises:
            ConfigError: another method, or a budget of memory.
            CheckFailedError: no choice keeps the budget; its report has the best that can be had and the curve.
        """
        if method not in METHODS:
            raise ConfigError(f"AutoQuantizer.quantize(method={method!r}): {METHODS[0]!r} is what there is.")
        found = self._prepare()
        goal = self._goal(found, budget)
        try:
            verdict = self._choose(found, goal)
        except CheckFailedError as e:
            report = self._report()
            describe_failure(report, found.search, found.uniform, goal, self.config.points, str(e))
            raise CheckFailedError(str(e), report=report) from e
        report = self._report()
        describe(report, verdict, found.search, found.scores, found.table, found.uniform, goal, self.config.points)
        return replace(verdict.program, report=report)

    def pareto(self, budget: Budget | None = None, *, along: str = "latency") -> list[Candidate]:
        """The choices with the smallest predicted loss for each latency or size, uniform ones too; nothing built.

        Args:
            budget: limits that all of them keep.
            along: "latency" or "size".
        """
        found = self._prepare()
        goal = Goal.of(budget, "loss", found.task.quality_name)
        mixed = found.search.front(goal, OBJECTIVES[along], self.config.points)
        uniform = [c for c in found.uniform if within(c, goal)]
        return envelope([*mixed, *uniform], "loss", OBJECTIVES[along])

    def uniform(self) -> list[Candidate]:
        """Each format for all layers that can have it, float32 first; their latency is measured, not predicted."""
        return self._prepare().uniform

    def build(self, candidate: Candidate) -> Program:
        """The program with the formats of a point of the curve, neither timed nor judged."""
        return self._prepare().shop.build(candidate.choice)

    def costs(self) -> Costs:
        """What each layer costs in each format, for a solver of one's own."""
        return self._prepare().search.costs()

    def completed(self, budget: Budget | None = None) -> Budget:
        """The budget with the loss of accuracy that is allowed where it says nothing of it, but has to."""
        found = self._prepare()
        return replace(budget or Budget(), accuracy_drop=self._goal(found, budget).drop)

    def best_of(self, programs: Mapping[str, Program], budget: Budget | None = None) -> Comparison:
        """Programs that take the model's inputs, wherever they came from, timed in turns on the engine and judged on
        the held-out data against the float model.

        The best is the first one that keeps the budget, or a later one that keeps it too and is surely better.
        """
        found = self._prepare()
        return self._judge(found, self._goal(found, budget)).best_of(programs)

    @torch.no_grad()
    def distance(self, module: torch.nn.Module) -> tuple[float, float]:
        """How far a module's answers to the calibration data are from the model's: the loss that `costs` adds up, and
        the quality that is lost.
        """
        found = self._prepare()
        tree = pytree.tree_structure(self._program.example_inputs)
        losses, drops = [], []
        for (leaves, labels), floats in zip(self._calibration, found.sensitivity.floats):
            args, kwargs = pytree.tree_unflatten(leaves, tree)
            answers = [v for v in pytree.tree_leaves(module(*args, **kwargs)) if isinstance(v, torch.Tensor)]
            losses.append(found.task.divergence(answers, floats))
            drops.append(found.task.quality(floats, floats, labels) - found.task.quality(answers, floats, labels))
        return float(torch.cat(losses).mean()), float(torch.cat(drops).mean())

    def _goal(self, found: _Prepared, budget: Budget | None) -> Goal:
        return Goal.of(budget, self.config.minimise, found.task.quality_name)

    def _judge(self, found: _Prepared, goal: Goal) -> Judge:
        return Judge(
            found.shop, found.compiler, self._timed, self._held_out, found.task, goal, seconds=self.config.seconds
        )

    def _report(self) -> Report:
        found = self._prepare()
        report = Report(f"quantise {self._program.name}")
        report.skipped.extend(found.shop.skipped)
        if told(found.shop.rewrites):
            report.sections.append(found.shop.rewrites)
        for name, reason in found.table.refused.items():
            report.skip(name, f"{self.config.engine}: {reason}")
        for note in self._notes:
            report.note(note)
        return report

    def _prepare(self) -> _Prepared:
        if self._prepared is None:
            self._prepared = self._find_out()
        return self._prepared

    def _find_out(self) -> _Prepared:
        config = self.config
        batches = [leaves for leaves, _ in self._calibration]
        shop = Workshop(self._program, batches, config.ptq)
        if not shop.layers:
            raise InputError(f"nothing in {self._program.name!r} can be quantised: {dict(shop.skipped)}")
        fixed = shop.given(config.layers)
        shop.store_all([*config.formats, *config.layers.values()])
        folder = Path(config.cache) if config.cache is not None else default_root().parent / "searches"
        about = (shop.parent.content_hash(), repr(replace(config, cache=None)), _machine(config.engine))
        findings = Findings(
            folder, fingerprint(about, [self._timed, *((*leaves, label) for leaves, label in self._calibration)])
        )
        compiler = Compiler(shop, config.engine)
        table = LatencyTable.from_dict(
            findings.get(
                "table",
                lambda: measure_table(
                    shop, compiler, config.formats, fixed, self._timed, seconds=config.seconds
                ).to_dict(),
            )
        )
        if not table.layers:
            raise InputError(f"{config.engine} cannot run {self._program.name!r}: {table.refused}")
        floats = shop.trial.run({}, batches[0])
        sensitivity = Sensitivity(shop.trial, batches, Task.of(floats, self._calibration[0][1], config.task))
        scores, fixed_loss = self._scores(shop, sensitivity, table, findings)
        search = Search(shop, scores, table, fixed, fixed_loss)
        uniform = search.uniform(config.formats)
        if findings.reused:
            self._notes.append(f"{findings.reused} values were found by an earlier search: {findings.path}")
        return _Prepared(shop, compiler, sensitivity, table, scores, search, uniform, [y for _, y in self._calibration])

    def _scores(
        self, shop: Workshop, sensitivity: Sensitivity, table: LatencyTable, findings: Findings
    ) -> tuple[dict[Pair, float], float]:
        fixed = shop.given(self.config.layers)
        usable = [f for f in self.config.formats if str(f) in table.uniform]
        free = [layer for layer in shop.layers if layer.name in table.layers]
        pairs = [(layer, f) for layer in free for f in usable if str(f) in table.layers[layer.name]]
        names = {f"{layer.name}|{fmt}": (layer, fmt) for layer, fmt in pairs}
        estimates = findings.get(
            "estimates",
            lambda: {f"{la.name}|{f}": v for (la, f), v in sensitivity.estimate(pairs, seed=self.config.seed).items()},
        )
        estimated = {names[n]: float(v) for n, v in estimates.items()}
        base = float(findings.get("fixed", lambda: sensitivity.measure(shop.formats(fixed)) if fixed else 0.0))
        chosen = spread(pairs, estimated, self.config.measured_layers)
        alone, together = {}, {}
        for pair in progress.track(chosen, "measuring layers", len(chosen)):
            name = f"alone {pair[0].name}|{pair[1]}"
            alone[pair] = float(findings.get(name, functools.partial(sensitivity.measure, dict([pair]))))
        for fmt in usable:
            choice = shop.formats(shop.uniform(fmt, fixed))
            whole = findings.get(f"together {fmt}", functools.partial(sensitivity.measure, choice))
            together[fmt] = float(whole) - base
        return calibrated(estimated, alone, together), base

    def _choose(self, found: _Prepared, goal: Goal) -> Verdict:
        """Solve, build, judge; repair where adding up went wrong; the best format for all if that wins."""
        judge = self._judge(found, goal)
        fallback = found.best_uniform(goal)
        tried: list[Verdict] = []
        impossible = "no choice of formats keeps the budget."
        try:
            for candidate in self._candidates(found, goal):
                verdict = judge.compare(candidate, fallback)
                tried.append(verdict)
                if verdict.kept:
                    return verdict
                if len(tried) > 3:
                    break
        except CheckFailedError as e:
            # By prediction; what one format for all layers takes is measured, and may be less.
            impossible = str(e)
        if kept := [v for v in tried if v.uniform_kept]:
            return kept[-1].as_uniform()
        for candidate in sorted(found.uniform, key=lambda c: c.costs[goal.minimise]):
            if within(candidate, goal):
                verdict = judge.compare(candidate, None)
                tried.append(verdict)
                if verdict.kept:
                    return verdict
        raise CheckFailedError("; ".join(tried[-1].failures) if tried else impossible)

    def _candidates(self, found: _Prepared, goal: Goal) -> Iterable[Candidate]:
        """What is worth building, the best first; each next one is safer than the one before."""
        if goal.drop is None:
            yield found.search.best(goal)
            for factor in (1.05, 1.15):
                for measure in goal.limits:
                    yield found.search.best(found.search.tightened(goal, measure, factor))
            return
        along = "ms" if goal.minimise == "loss" else goal.minimise
        front = found.search.front(goal, along, self.config.points)
        start = cheapest(front, lambda c: found.drop(c) <= (goal.drop or 0.0))
        if start is None:
            raise CheckFailedError(
                f"no choice of formats within {goal.limits or 'any latency'} keeps {found.task.quality_name} within "
                f"{goal.drop:g} of the float model; the best loses {found.drop(front[-1]):.4g}."
            )
        if goal.minimise == "loss":
            yield front[-1]
        yield from front[start:]


@dataclass
class _Prepared:
    """Everything that does not hang on the budget."""

    shop: Workshop
    compiler: Compiler
    sensitivity: Sensitivity
    table: LatencyTable
    scores: dict[Pair, float]
    search: Search
    uniform: list[Candidate]
    labels: list[Any]
    _drops: dict[str, float] = field(default_factory=dict)

    @property
    def task(self) -> Task:
        return self.sensitivity.task

    def drop(self, candidate: Candidate) -> float:
        """Quality that a choice loses on the calibration data."""
        key = repr(sorted((n, str(f)) for n, f in candidate.choice.items()))
        if key not in self._drops:
            formats = self.shop.formats(candidate.choice)
            parts: list[torch.Tensor] = []
            for leaves, floats, label in zip(self.sensitivity.batches, self.sensitivity.floats, self.labels):
                answers: Outputs = self.shop.trial.run(formats, leaves)
                parts.append(self.task.quality(floats, floats, label) - self.task.quality(answers, floats, label))
            self._drops[key] = float(torch.cat(parts).mean())
        return self._drops[key]

    def best_uniform(self, goal: Goal) -> Candidate | None:
        """The format for all layers that suits a goal best; None if none does."""
        good = [c for c in self.uniform if within(c, goal) and (goal.drop is None or self.drop(c) <= goal.drop)]
        return min(good, key=lambda c: c.costs[goal.minimise], default=None)


def quantize_automatically(program: Program, dataset: Iterable[Any] | None, config: AutoConfig) -> Program:
    """What `AutoQuantizer` finds without a budget.

    Raises:
        InputError: there is no dataset.
    """
    if dataset is None:
        raise InputError("quantize(config=AutoConfig(...)) needs dataset=: formats are chosen by what they do to data.")
    return AutoQuantizer(program, dataset=dataset, config=config).quantize()


def _machine(engine: str) -> str:
    from importlib.metadata import version

    from ..core import probe

    packages = {"onnxruntime", "openvino", "executorch"} & {engine}
    return f"{probe().key} {torch.get_num_threads()} {torch.__version__} {[version(p) for p in packages]}"
