"""A choice of formats put to the test: built, run by its engine, timed in turns, judged on data it has not seen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from ..core import Float32
from ..engines import Runner
from ..graph import Program
from ..measure import Latency, paired_latency, ratio_interval
from ._compiled import Compiler, Form
from ._search import Candidate, Goal
from ._task import Outputs, Task
from ._workshop import Workshop

MIXED, UNIFORM, FLOAT = "mixed", "uniform", "float"


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What one form of the model was measured to be.

    Attributes:
        latency: of one call, on the engine.
        weights_bytes: all parameters and buffers of the program.
        file_bytes: what the engine keeps on disk.
        losses: for each held-out sample how far its answer is from the float model's.
        drops: for each held-out sample what it loses of quality.
    """

    latency: Latency
    weights_bytes: int
    file_bytes: int
    losses: np.ndarray
    drops: np.ndarray

    def costs(self) -> dict[str, float]:
        """By measure of the solver."""
        return {"ms": self.latency.median_ms, "bytes": self.weights_bytes, "loss": float(self.losses.mean())}


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Programs beside each other.

    Attributes:
        measured: by name.
        failures: by name, the limits that it broke.
        best: the name of the best that broke none; empty if all did.
    """

    measured: Mapping[str, Measured]
    failures: Mapping[str, list[str]]
    best: str


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """The outcome of one test.

    Attributes:
        candidate, program: what was tested.
        uniform: the best format for all layers that was predicted to keep the budget; None if none was.
        measured: by "mixed", "uniform" and "float".
        failures: limits that the candidate broke; `uniform_failures` those that the best format for all did.
        uniform_wins: whether the best format for all is surely better than the candidate.
    """

    candidate: Candidate
    program: Program
    uniform: Candidate | None
    uniform_program: Program | None
    measured: Mapping[str, Measured]
    failures: list[str]
    uniform_failures: list[str]
    uniform_wins: bool
    notes: list[str] = field(default_factory=list)

    @property
    def uniform_kept(self) -> bool:
        """Whether there is a format for all layers that keeps the budget."""
        return self.uniform is not None and not self.uniform_failures

    @property
    def kept(self) -> bool:
        """Whether the candidate keeps the budget and is not beaten."""
        return not self.failures and not (self.uniform_kept and self.uniform_wins)

    def as_uniform(self) -> Verdict:
        """The same test with the best format for all layers as its outcome."""
        assert self.uniform is not None, "asked only if there is one"
        assert self.uniform_program is not None, "built with it"
        why = "; ".join(self.failures) or "it was surely worse"
        note = f"{self.uniform.title} was taken instead of the solver's choice: {why}"
        measured = {**self.measured, MIXED: self.measured[UNIFORM]}
        return replace(
            self, candidate=self.uniform, program=self.uniform_program, measured=measured, failures=[],
            notes=[*self.notes, note],
        )  # fmt: skip


class Judge:
    """Tests candidates against the float model and the best format for all layers.

    Args:
        timed: flat inputs of the call whose latency counts.
        held_out: flat inputs and labels.
        seconds: for timing.
    """

    def __init__(
        self, shop: Workshop, compiler: Compiler, timed: Sequence[Any], held_out: Sequence[tuple[tuple[Any, ...], Any]],
        task: Task, goal: Goal, *, seconds: float,
    ) -> None:  # fmt: skip
        self._shop, self._task, self._goal, self._seconds = shop, task, goal, seconds
        self._compiler = compiler
        self._timed = timed
        self._held_out = held_out
        self._floats = [shop.trial.run({}, leaves) for leaves, _ in held_out]

    @torch.no_grad()
    def compare(self, candidate: Candidate, uniform: Candidate | None) -> Verdict:
        """Build, run and time a candidate beside the others."""
        rivals = {MIXED: candidate, FLOAT: self._float(candidate)}
        if uniform is not None:
            rivals[UNIFORM] = uniform
        forms = {name: self._compiler.choice(rival.choice, keep=name != MIXED) for name, rival in rivals.items()}
        measured = self._measured(forms)
        return Verdict(
            candidate=candidate, program=forms[MIXED].program, uniform=uniform,
            uniform_program=forms[UNIFORM].program if uniform is not None else None, measured=measured,
            failures=self._failures(measured[MIXED]),
            uniform_failures=self._failures(measured[UNIFORM]) if uniform is not None else [],
            uniform_wins=uniform is not None and self._surely_better(measured[UNIFORM], measured[MIXED]),
        )  # fmt: skip

    @torch.no_grad()
    def best_of(self, programs: Mapping[str, Program]) -> Comparison:
        """Run and time programs beside each other, wherever they came from."""
        measured = self._measured({name: self._compiler.program(program) for name, program in programs.items()})
        failures = {name: self._failures(found) for name, found in measured.items()}
        best = ""
        for name, found in measured.items():
            if not failures[name] and (not best or self._surely_better(found, measured[best])):
                best = name
        return Comparison(measured=measured, failures=failures, best=best)

    def _measured(self, forms: Mapping[str, Form]) -> dict[str, Measured]:
        runners = {name: form.open() for name, form in forms.items()}
        times = paired_latency(
            {name: self._call(runner) for name, runner in runners.items()}, rounds=40, max_seconds=self._seconds
        )
        return {
            name: Measured(
                latency=times[name], weights_bytes=form.program.parameters_bytes, file_bytes=form.file_bytes,
                **self._answers(runners[name]),
            )
            for name, form in forms.items()
        }  # fmt: skip

    def _float(self, candidate: Candidate) -> Candidate:
        return Candidate(dict.fromkeys(candidate.choice, Float32()), {}, "all in float32")

    def _call(self, runner: Runner) -> Any:
        return lambda: runner(self._timed)

    def _answers(self, runner: Runner) -> dict[str, np.ndarray]:
        losses: list[torch.Tensor] = []
        drops: list[torch.Tensor] = []
        for (leaves, labels), floats in zip(self._held_out, self._floats):
            answers: Outputs = [v for v in runner(leaves) if isinstance(v, torch.Tensor)]
            losses.append(self._task.divergence(answers, floats))
            drops.append(self._task.quality(floats, floats, labels) - self._task.quality(answers, floats, labels))
        return {"losses": torch.cat(losses).numpy(), "drops": torch.cat(drops).numpy()}

    def _failures(self, found: Measured) -> list[str]:
        costs, units = found.costs(), {"ms": "ms", "bytes": "bytes of weights", "loss": self._task.loss_name}
        failures = [
            f"{costs[measure]:.6g} {units[measure]} instead of {limit:.6g}"
            for measure, limit in self._goal.limits.items()
            if not costs[measure] <= limit
        ]
        drop = float(found.drops.mean())
        if self._goal.drop is not None and not drop <= self._goal.drop:
            failures.append(f"{drop:.4g} of {self._task.quality_name} lost instead of {self._goal.drop:g}")
        return failures

    def _surely_better(self, one: Measured, other: Measured) -> bool:
        """Whether the first is better in the objective, noise considered; equal times are decided by the loss."""
        if self._goal.minimise == "bytes":
            return one.weights_bytes < other.weights_bytes
        lower, _, upper = loss_interval(one.losses - other.losses)
        if self._goal.minimise == "loss":
            return upper < 0
        slow, _, fast = ratio_interval(other.latency, one.latency)
        return slow > 1 or (fast >= 1 and upper < 0 and lower < 0)


def loss_interval(
    differences: np.ndarray, *, confidence: float = 0.95, seed: int = 0, draws: int = 2000
) -> tuple[float, float, float]:
    """Mean of paired differences, one for each sample, between the ends of its bootstrap interval.

    Source: percentile bootstrap, Efron and Tibshirani, An Introduction to the Bootstrap, 1993.

    Example:
        >>> low, middle, high = loss_interval(np.array([1.0, 1.5, 0.5, 1.0]))
        >>> low < middle < high and middle == 1.0
        True
    """
    rng = np.random.default_rng(seed)
    means = differences[rng.integers(0, len(differences), size=(draws, len(differences)))].mean(axis=1)
    tail = (1 - confidence) / 2 * 100
    low, high = np.percentile(means, [tail, 100 - tail])
    return float(low), float(differences.mean()), float(high)
