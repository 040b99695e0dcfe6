"""`Compressor`: channels and bits chosen together under budgets, then trained, measured, and judged."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import numpy as np
from torch import nn

from ..core import Budget, CheckFailedError, InputError, Report
from ..data import unpack_batch
from ..graph import Program
from ..pruning import R1Pruner
from ..quantization import AutoQuantizer
from ._config import CompressionConfig
from ._joint import Joint, Plan, Shrinkage, calibrated, shrinkages

_WHOLE = "all channels"


class Compressor:
    """Chooses at once how many channels each part of a module keeps and which format each layer has.

    What quantisation costs is known from `AutoQuantizer`, once for the whole module and once for the one with the
    fewest channels; what pruning costs is predicted for each group by `R1Pruner` and measured (behind a short recovery,
    if there is a train loader) for all groups at each level. One integer program chooses from both. The best of its
    choices are cut, recovered and quantised under the same budget, and measured beside the best that quantisation does
    alone, which is the result unless one of them is surely better.

    Args:
        model: an `nn.Module` in float32; it is left alone.
        dataset: batches for `AutoQuantizer`: the first calibrate, the next verify.
        example_inputs: of the call whose latency counts; by default the first batch.
        config: see `CompressionConfig`.

    Raises:
        InputError: the model is no module, or the dataset is empty.

    Example:
        >>> import torch
        >>> from deepseek_r1.core import Int8Weight
        >>> from deepseek_r1.pruning import PruneConfig
        >>> from deepseek_r1.quantization import AutoConfig
        >>> net = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 4))
        >>> config = CompressionConfig(
        ...     formats=AutoConfig(engine="eager", formats=(Int8Weight(),), seconds=0.2), levels=(0.5,),
        ...     pruning=PruneConfig(channel_step=8, timing_rounds=0),
        ... )
        >>> data = [torch.randn(16, 32) for _ in range(4)]
        >>> small = Compressor(net, dataset=data, config=config).compress(Budget(size_mb=0.002))
        >>> small.parameters_bytes < 2000
        True
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        dataset: Iterable[Any],
        example_inputs: Any = None,
        config: CompressionConfig | None = None,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise InputError(
                f"Compressor(model={type(model).__name__}): an nn.Module is needed; a captured graph can only be "
                "quantised (AutoQuantizer)."
            )
        self.model, self.example_inputs = model, example_inputs
        self.config = config or CompressionConfig()
        wanted = self.config.formats.calibration_batches + self.config.formats.held_out_batches
        self._batches = list(islice(iter(dataset), wanted))
        self.module: nn.Module = model
        self._plain = self._quantizer(model)
        self._joint: Joint | None = None
        #: (loss, quality lost) of the cuts that the predictions were scaled to.
        self._known = [(0.0, 0.0)]

    def _quantizer(self, model: nn.Module) -> AutoQuantizer:
        return AutoQuantizer(
            model, dataset=self._batches, example_inputs=self.example_inputs, config=self.config.formats
        )

    def _pruner(self, keep: Mapping[str, int] | None = None) -> R1Pruner:
        classes = self._plain.task.classes is not None
        # How fast it is is measured on the engine, not here.
        config = replace(self.config.pruning, distance="kl" if classes else "output", timing_rounds=0)
        calibrating = self._batches[: self.config.formats.calibrating(len(self._batches))]
        # Without labels: the loss is then the divergence from the float model, as the formats' is.
        return R1Pruner(
            self.model, keep=keep, dataset=[_unlabelled(batch) for batch in calibrating], config=config,
            example_inputs=self.example_inputs,
        )  # fmt: skip

    def compress(
        self, budget: Budget | None = None, train_loader: Iterable[Any] | None = None, *, epochs: int = 3,
        lr: float = 1e-3,
    ) -> Program:  # fmt: skip
        """The program that suits a budget best, with a report; `module` is then the float module it was made of.

        Args:
            budget: any of accuracy_drop, size_mb and latency_ms; see `AutoQuantizer.quantize`.
            train_loader: batches to recover with behind a cut; without them few cuts are worth it.
            epochs: of the recovery of each candidate.
            lr: its highest learning rate.

        Raises:
            CheckFailedError: nothing keeps the budget; the message has what quantisation alone reaches.
        """
        budget = self._plain.completed(budget)
        report = Report(f"compress {type(self.model).__name__}")
        best, why = self._alone(budget)
        tried = {} if best is None else {_WHOLE: best}
        groups = self._groups(report)
        if groups:
            for plan in self._plans(self._problem(groups, train_loader, lr, report), budget):
                made = self._made(plan, groups, budget, train_loader, epochs, lr, report)
                if made is not None:
                    tried[f"cut {len(tried) if best else len(tried) + 1}"] = made
        if not tried:
            raise CheckFailedError(
                f"no cut of {type(self.model).__name__} keeps the budget either: {why}", report=report
            )
        return self._finished(tried, budget, report)

    def _alone(self, budget: Budget) -> tuple[_Made | None, str]:
        try:
            return _Made(self.model, self._plain.quantize(budget=budget), {}, None), ""
        except CheckFailedError as e:
            return None, str(e)

    def _groups(self, report: Report) -> list[Shrinkage]:
        try:
            return shrinkages(self._pruner().curves(), self.config.levels)
        except InputError as e:
            report.skip("pruning", str(e))
            return []

    def _problem(self, groups: list[Shrinkage], train_loader: Iterable[Any] | None, lr: float, report: Report) -> Joint:
        """The integer program, with what every level was measured to cost; once, whatever the budget."""
        if self._joint is not None:
            return self._joint
        measured, cut = [0.0], self.model
        for level in range(1, len(groups[0].kept)):
            cut = self._cut({g.name: g.kept[level] for g in groups}, train_loader, self.config.trial_epochs, lr)
            self._known.append(self._plain.distance(cut))
            measured.append(self._known[-1][0])
            predicted = sum(g.losses[level] for g in groups)
            how = f"all groups, {_count(cut) / _count(self.model):.0%} of the parameters; predicted {predicted:.4g}"
            report.add(f"loss at {self.config.levels[level - 1]:.0%} of the channels", measured[-1], how=how)
        tensors = {**dict(self.model.named_parameters()), **dict(self.model.named_buffers())}
        sizes = {name: t.numel() * t.element_size() for name, t in tensors.items()}
        least = self._quantizer(cut).costs()
        self._joint = Joint(calibrated(groups, measured), self._plain.costs(), least, sizes)
        return self._joint

    def _cut(self, keep: Mapping[str, int], train_loader: Iterable[Any] | None, epochs: int, lr: float) -> nn.Module:
        return self._pruner(keep).compress(train_loader, epochs=epochs, lr=lr).eval()

    def _plans(self, joint: Joint, budget: Budget) -> list[Plan]:
        """Choices within the limits that cut something and are worth a try."""
        limits = {}
        if budget.size_mb is not None:
            limits["bytes"] = budget.size_mb * 1e6
        if budget.latency_ms is not None:
            limits["ms"] = budget.latency_ms
        along = "bytes" if budget.latency_ms is not None and budget.size_mb is None else "ms"
        try:
            front = joint.front(limits, along, self.config.points)
        except CheckFailedError:
            return []
        plans: list[Plan] = []
        for plan in reversed(front):
            cuts = plan.cuts(joint.groups)
            if cuts and all(cuts != other.cuts(joint.groups) for other in plans):
                plans.append(plan)
        if budget.accuracy_drop is not None:
            bearable = [p for p in plans if self._drop(p.costs["loss"]) <= budget.accuracy_drop]
            plans = bearable or plans[:1]
        # From all over the curve, as the prediction may be wrong in either direction.
        last = max(1, self.config.candidates - 1)
        places = {round(i * (len(plans) - 1) / last) for i in range(self.config.candidates)} if plans else set()
        return [plans[i] for i in sorted(places)]

    def _drop(self, loss: float) -> float:
        """The quality that a loss is expected to cost, after the cuts that were measured."""
        losses, drops = zip(*sorted(self._known))
        return float(np.interp(loss, losses, np.maximum.accumulate(drops)))

    def _made(
        self, plan: Plan, groups: list[Shrinkage], budget: Budget, train_loader: Iterable[Any] | None, epochs: int,
        lr: float, report: Report,
    ) -> _Made | None:  # fmt: skip
        cuts = plan.cuts(groups)
        what = ", ".join(f"{name} to {kept}" for name, kept in cuts.items())
        try:
            module = self._cut(cuts, train_loader, epochs, lr)
            allowed = budget.accuracy_drop
            if allowed is not None:
                # What the cut costs is not left for the formats.
                allowed = max(0.0, allowed - self._plain.distance(module)[1])
            program = self._quantizer(module).quantize(budget=replace(budget, accuracy_drop=allowed))
        except CheckFailedError as e:
            report.skip(what, str(e))
            return None
        return _Made(module, program, cuts, plan)

    def _finished(self, tried: Mapping[str, _Made], budget: Budget, report: Report) -> Program:
        found = self._plain.best_of({name: made.program for name, made in tried.items()}, budget)
        for name, made in tried.items():
            one = found.measured[name]
            how = (
                f"{_count(made.module):,} parameters, {one.losses.mean():.4g} loss, {one.drops.mean():.4g} quality lost"
            )
            report.add(f"{name}: latency", one.latency.median_ms, unit="ms", how=how)
            report.add(f"{name}: weights", one.weights_bytes, unit="bytes")
            for failure in found.failures[name]:
                report.skip(name, failure)
            if made.plan is not None:
                predicted = ", ".join(f"{m} {v:.4g}" for m, v in made.plan.costs.items())
                report.note(f"{name} was predicted to cost {predicted}; solver's gap {made.plan.gap:.2g}")
        if not found.best:
            raise CheckFailedError(f"nothing keeps the budget on held-out data: {dict(found.failures)}", report=report)
        made = tried[found.best]
        report.note(f"chosen: {found.best}")
        for name, kept in made.cuts.items():
            report.add(f"units of {name}", kept)
        report.sections.append(made.program.report)
        if made.cuts:
            report.sections.append(made.module.pruning)  # type: ignore[arg-type]
        self.module = made.module
        return replace(made.program, report=report)


@dataclass(frozen=True, eq=False)
class _Made:
    """A candidate: the float module, its program, what was cut and what was predicted."""

    module: nn.Module
    program: Program
    cuts: dict[str, int]
    plan: Plan | None


def _count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _unlabelled(batch: Any) -> Any:
    args, kwargs, _ = unpack_batch(batch)
    return kwargs or (args,)
