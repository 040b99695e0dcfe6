"""One call of `R1Pruner.compress`: how far to go, in which rounds, and what was measured on the way."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from ..core import CheckFailedError, InputError, Report
from ..train import Objective
from ..train._evaluate import evaluate
from ._allocate import Bill, Choice, Ladder, bytes_of, choose, keeping, operations_of, parameters_of
from ._examples import examples_for
from ._plan import PruningPlan
from ._recover import ENOUGH_SAMPLES, recover_, reestimate_
from ._structure import Structure
from ._surgery import Trial, plan_of
from ._timing import Speed, compared, timed

if TYPE_CHECKING:
    from ._pruner import R1Pruner

#: Where the search for a step that is not slower than before ends.
_LARGEST_STEP = 32
#: Shares of parameters by which a search for what a budget of accuracy allows goes on.
_SEARCH_STEPS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


@dataclass(eq=False)
class _State:
    """A module on its way: what is left of it, and how it came about."""

    model: nn.Module
    plan: PruningPlan = field(default_factory=PruningPlan)
    structure: Structure | None = None
    error: float = 0.0


def parameters_in(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def bytes_in(model: nn.Module) -> int:
    seen = {id(t): t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers())}
    return sum(seen.values())


class Compression:
    """One call of `compress`."""

    def __init__(
        self, pruner: R1Pruner, train: Iterable[Any] | None, val: Iterable[Any] | None, epochs: int, lr: float
    ) -> None:
        self.pruner, self.config, self.train, self.val = pruner, pruner.config, train, val
        self.epochs, self.lr = epochs, lr
        self.judging = pruner.dataset if pruner.dataset is not None else train if train is not None else val
        self.report = Report(f"prune {type(pruner.model).__name__}")
        self.example, where = examples_for(pruner.model, pruner.example_inputs, pruner.dataset, train, val)
        self.report.note(f"example inputs: {where}")
        self.before = self._metrics(pruner.model)
        self.first: Structure | None = None
        self.step = 0
        self.speed: Speed | None = None
        if pruner.budget.accuracy_drop is not None and self.before is None:
            raise InputError(
                "Budget(accuracy_drop=...) needs validation data with labels: give compress(val_loader=...)."
            )

    def result(self) -> nn.Module:
        """The pruned module, with its report."""
        budget, alone = self.pruner.budget, self.pruner.sparsity is None
        if alone and set(budget.limits()) == {"accuracy_drop"}:
            state = self._as_far_as_accuracy_allows()
        else:
            state = self._down_to(self._target(self.pruner.sparsity))
        return self._finished(state)

    # How far.

    def _target(self, sparsity: float | None) -> _Target:
        model, budget = self.pruner.model, self.pruner.budget
        numbers = math.inf if sparsity is None else (1 - sparsity) * parameters_in(model)
        size = math.inf if budget.size_mb is None else budget.size_mb * 1e6
        return _Target(parameters=numbers, size=size, latency_ms=budget.latency_ms)

    def _rounds(self) -> int:
        asked = self.config.rounds
        if self.train is None or self.pruner.keep:
            return 1
        # A round with fewer than four epochs has not recovered when the next one judges it.
        return max(1, min(3, self.epochs // 4)) if asked == "auto" else min(int(asked), self.epochs)

    def _down_to(self, target: _Target) -> _State:
        """In rounds: prune a part, train a little, judge anew; the last round has the most epochs."""
        state, rounds = _State(self.pruner.model), self._rounds()
        short = max(1, self.epochs // (2 * rounds)) if rounds > 1 else 0
        for number in range(1, rounds + 1):
            part = target.part(number / rounds, self.pruner.model)
            state = self._round(state, part, last=number == rounds)
            self._recover(state, self.epochs - short * (rounds - 1) if number == rounds else short)
        return state

    def _as_far_as_accuracy_allows(self) -> _State:
        """Rounds with more and more sparsity, until accuracy is lost; the last good one is the result."""
        allowed = self.pruner.budget.accuracy_drop
        assert allowed is not None, "called for a budget of accuracy"
        state, good = _State(self.pruner.model), None
        tried: list[tuple[float, float]] = []
        for sparsity in _SEARCH_STEPS:
            try:
                state = self._round(state, self._target(sparsity), last=True)
            except CheckFailedError:
                break
            self._recover(state, self.epochs)
            drop = self._drop(state.model)
            tried.append((sparsity, drop))
            self.report.note(f"at sparsity {sparsity:g}: {self._metric()} falls by {drop:.4g}")
            if drop > allowed:
                break
            good = _State(copy.deepcopy(state.model), state.plan, state.structure, state.error)
        if good is None:
            raise self._missed(
                f"accuracy_drop {allowed:g}", f"{tried[0][1]:.4g} at a sparsity of {tried[0][0]:g}" if tried else "-"
            )
        return good

    # One round.

    def _round(self, state: _State, target: _Target, *, last: bool) -> _State:
        structure = self.pruner._structure(state.model, self.example, self.report)
        self.first = self.first or structure
        importance = self.pruner._importance(state.model, structure, self.judging, self.report)
        self.step = self.step or self.pruner._step(state.model, structure, self.report)
        while True:
            ladders = self.pruner._ladders(structure, importance, self.step)
            choice = self._chosen(state.model, structure, ladders, target)
            if last and target.latency_ms is not None:
                choice = self._fast_enough(state.model, structure, ladders, target, choice)
            removed = structure.mask(choice.removed())
            plan = plan_of(structure, removed)
            cut = plan.apply(state.model)
            if not last or not self._slower(cut, self.pruner._timed_on(structure)):
                break
            if self.config.channel_step != "auto" or self.step >= _LARGEST_STEP:
                break
            self.step *= 2
            self.report.note(f"it was slower than before, so channels end at multiples of {self.step} instead")
        verdict = Trial(state.model, structure, jitter=False)(removed, structure.counts)
        if not verdict.holds:
            raise CheckFailedError(
                f"the pruned module differs from the original with the same channels switched off: {verdict.reason}.",
                report=self.report,
            )
        self.report.facts.setdefault("predicted_loss", []).append(choice.loss)
        return _State(cut, state.plan.then(plan), structure, max(state.error, verdict.error))

    def _chosen(self, model: nn.Module, structure: Structure, ladders: list[Ladder], target: _Target) -> Choice:
        """The units that were asked for, or the least predicted loss within the targets of parameters and size."""
        if keep := self.pruner.keep:
            _check_names(structure, keep)
            return keeping(structure, ladders, keep)
        currency = operations_of(structure) if self.config.currency == "operations" else None
        choices = []
        for limit, weigh, whole, what in (
            (target.parameters, parameters_of(structure), parameters_in(model), "parameters"),
            (target.size, bytes_of(structure), bytes_in(model), "bytes"),
        ):
            if limit == math.inf:
                continue
            elsewhere = whole - Bill(structure, weigh).total
            choice = choose(structure, ladders, weigh, limit - elsewhere, currency)
            if choice.cost + elsewhere > limit:
                raise self._missed(f"{limit:,.0f} {what}", f"{choice.cost + elsewhere:,.0f} {what}")
            choices.append(choice)
        if choices:
            return max(choices, key=lambda c: c.removed().size)
        return choose(structure, ladders, parameters_of(structure), math.inf, currency)

    def _fast_enough(
        self, model: nn.Module, structure: Structure, ladders: list[Ladder], target: _Target, least: Choice
    ) -> Choice:
        """The least that has to leave, found by halving, so that the measured latency is within its limit."""
        assert target.latency_ms is not None
        weigh = operations_of(structure)
        whole = Bill(structure, weigh).total

        def at(share: float) -> tuple[Choice, float]:
            choice = choose(structure, ladders, weigh, (1 - share) * whole)
            cut = plan_of(structure, structure.mask(choice.removed())).apply(model)
            return choice, timed({"cut": cut}, self.pruner._timed_on(structure), rounds=15, seconds=3.0)[
                "cut"
            ].median_ms

        start = plan_of(structure, structure.mask(least.removed())).apply(model)
        now = timed({"cut": start}, self.pruner._timed_on(structure), rounds=15, seconds=3.0)["cut"].median_ms
        if now <= target.latency_ms:
            return least
        best, fastest = at(1.0)
        if fastest > target.latency_ms:
            raise self._missed(f"latency_ms {target.latency_ms:g}", f"{fastest:.4g} ms")
        low, high = 0.0, 1.0
        for _ in range(7):
            middle = (low + high) / 2
            choice, ms = at(middle)
            if ms <= target.latency_ms:
                best, high = choice, middle
            else:
                low = middle
        return best if best.removed().size > least.removed().size else least

    def _missed(self, wanted: str, best: str) -> CheckFailedError:
        self.report.check("budget", False, f"{wanted} was asked for; the best that can be reached is {best}")
        return CheckFailedError(
            f"the budget cannot be met: {wanted} was asked for, and the best that can be reached is {best} "
            f"(keeping {self.config.keep_at_least:.0%} of each group). Ask for less, or lower keep_at_least; what "
            "cannot be pruned at all is in the report.",
            report=self.report,
        )

    # Recovery and measuring.

    def _recover(self, state: _State, epochs: int) -> None:
        """Batch statistics need inputs only; training needs the train loader."""
        loader, batches = self.train if self.train is not None else self.pruner.dataset, self.config.batch_norm_batches
        if loader is None:
            return
        done = reestimate_(state.model, loader, batches)
        if self.train is not None:
            section = recover_(
                state.model, self.pruner.model, self.train, epochs=epochs, lr=self.lr, config=self.config,
                loss=self.pruner.loss,
            )  # fmt: skip
            self.report.sections.append(section)
            reestimate_(state.model, loader, batches)
        if done >= ENOUGH_SAMPLES:
            self.report.note(f"batch statistics were estimated anew over {done} samples")
        elif done:
            self.report.skip("batch statistics", f"{done} samples are too few to estimate them anew")

    def _metrics(self, model: nn.Module) -> dict[str, float] | None:
        if self.val is None:
            return None
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
        return evaluate(model, self.val, Objective(model, self.pruner.loss), device=device)

    def _metric(self) -> str:
        return "accuracy" if self.before and "accuracy" in self.before else "loss"

    def _drop(self, model: nn.Module) -> float:
        after = self._metrics(model)
        assert after is not None, "called with validation data only"
        assert self.before is not None, "measured at the start"
        name = self._metric()
        change = after[name] - self.before[name]
        return -change if name == "accuracy" else change

    def _finished(self, state: _State) -> nn.Module:
        report, model = self.report, self.pruner.model
        result = state.model.train(model.training)
        before, after = parameters_in(model), parameters_in(result)
        report.add("parameters", after, before=before, how=f"sparsity {1 - after / before:.3f}")
        report.add(
            "size", bytes_in(result) / 1e6, before=bytes_in(model) / 1e6, unit="MB", how="parameters and buffers"
        )
        report.facts["sparsity"] = 1 - after / before
        if after == before:
            report.note("nothing had to leave: the module is within the budget as it is")
        assert self.first is not None, "at least one round was done"
        self._table(state, self.first)
        if self.speed is None:
            report.skip("latency", "timing_rounds is 0")
        else:
            speed = self.speed
            report.add("latency", speed.after_ms, before=speed.before_ms, unit="ms", how=speed.how)
            report.facts["speedup"] = list(speed.interval)
            report.check("not slower than before", not speed.slower, speed.how)
        limit = self.pruner.budget.latency_ms
        if limit is not None and self.speed is not None:
            # Measured once more than when it was chosen, so noise is allowed for.
            report.check(
                "within latency_ms", self.speed.after_ms <= 1.1 * limit, f"{self.speed.after_ms:.4g} of {limit:g} ms"
            )
        report.check(
            "answers equal those with the channels switched off", True, f"difference {state.error:.2g}, float64"
        )
        self._judge(result)
        result.pruning = report  # type: ignore[assignment]
        result.pruning_plan = state.plan  # type: ignore[assignment]
        return result

    def _slower(self, cut: nn.Module, example: Any) -> bool:
        """Whether the cut module is slower than the original; what was measured is kept for the report."""
        if not (rounds := self.config.timing_rounds):
            return False
        self.speed = compared(self.pruner.model, cut, example, rounds=rounds)
        if self.speed.slower:
            # Once more: a neighbour may have woken up in the middle.
            again = compared(self.pruner.model, cut, example, rounds=rounds)
            self.speed = max(self.speed, again, key=lambda s: s.interval[1])
        return self.speed.slower

    def _judge(self, result: nn.Module) -> None:
        after = self._metrics(result)
        if after is None or self.before is None:
            self.report.skip("accuracy", "no validation data were given")
            return
        for name, value in after.items():
            self.report.add(f"validation {name}", value, before=self.before[name], how="the whole validation data")
        allowed = self.pruner.budget.accuracy_drop
        if allowed is not None and (drop := self._drop(result)) > allowed:
            raise self._missed(f"accuracy_drop {allowed:g}", f"{drop:.4g}")

    def _table(self, state: _State, first: Structure) -> None:
        for group in first.groups:
            maker, axis, each = group.members[0]
            own = first.units_at(maker, axis)
            mine = np.flatnonzero(np.isin(own, group.units))
            kept = state.plan.tensors.get(maker, {}).get(axis)
            left = mine.size if kept is None else int(np.isin(mine, kept).sum())
            how = f"{each} a unit; in {len(group.members)} places"
            self.report.add(f"channels of {group.name}", left, before=int(mine.size), how=how)
        structure = state.structure or first
        reasons: dict[str, list[str]] = {}
        for name, why in structure.pinned.items():
            reasons.setdefault(why, []).append(name)
        for why, names in reasons.items():
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            self.report.skip(", ".join(names[:3]) + more, why)
        self.report.facts["pinned"] = dict(structure.pinned)


def _check_names(structure: Structure, keep: Mapping[str, int]) -> None:
    """Every name must be a group's, and every number at most its size."""
    sizes = {g.name: g.size for g in structure.groups}
    for name, units in keep.items():
        if name not in sizes or units > sizes[name]:
            known = ", ".join(f"{n}: {size}" for n, size in sizes.items())
            raise InputError(f"R1Pruner(keep={{{name!r}: {units}}}): the groups and their units are {known}.")


@dataclass(frozen=True, kw_only=True)
class _Target:
    """Where the pruning ends."""

    parameters: float
    size: float
    latency_ms: float | None

    def part(self, share: float, model: nn.Module) -> _Target:
        """A part of the way, in equal ratios."""
        if share >= 1:
            return self
        whole, size = parameters_in(model), bytes_in(model)
        numbers = whole * min(1.0, self.parameters / whole) ** share if self.parameters < math.inf else math.inf
        room = size * min(1.0, self.size / size) ** share if self.size < math.inf else math.inf
        return _Target(parameters=numbers, size=room, latency_ms=self.latency_ms)
