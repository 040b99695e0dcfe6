"""`R1Pruner`: finds the channels of a module, judges them, removes the least important, and helps the rest recover."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from ..core import Budget, ConfigError, InputError, Report
from ..data import to_device
from ..graph import as_inputs
from ._allocate import Bill, GroupCurve, Ladder, curve_of, parameters_of
from ._compress import Compression, parameters_in
from ._config import PruneConfig
from ._examples import examples_for
from ._importance import Importance, LossFunction, magnitude_scores, taylor_scores
from ._structure import Structure, structure_of
from ._surgery import plan_of, settle
from ._timing import measured_step, timed

DEFAULT_SPARSITY = 0.3


class R1Pruner:
    """Removes whole channels, heads and hidden units of a module, so that every engine runs what is left faster.

    What belongs together is read from the captured graph, with no rules for architectures: convolutions (grouped and
    depthwise too), linear layers, norms, residual additions, concatenations, splits, attention heads, gates. Channels
    are judged by the loss they are predicted to cost (see `PruneConfig.importance`) and leave where that is least for
    what is saved. The cut module is compared with the original whose channels are switched off, in float64.

    Args:
        model: any `nn.Module`; it is left alone.
        sparsity: share of the parameters to remove; 0.3 if there is no budget either.
        budget: instead, or as well: `size_mb` (of parameters and buffers), `latency_ms` (eager, on the example
            inputs), `accuracy_drop` (on the validation data; alone it removes as much as it allows).
        keep: instead of both: how many units of a group stay, by the group's name (see `curves`), in one round; all
            units of the others stay.
        dataset: batches like those of the task, for the importance; labels are used where there are any.
        example_inputs: inputs to capture with; by default from the data, else guessed from the first layer.
        loss: a function of (outputs, labels); by default chosen as `Trainer` does.
        config: see `PruneConfig`.

    Raises:
        ConfigError: a sparsity outside (0, 1), a budget that pruning cannot steer, or numbers to keep beside either.
        InputError: the model is no module.

    Example:
        >>> net = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 4))
        >>> small = R1Pruner(net, sparsity=0.4).compress()
        >>> small
        Sequential(
          (0): Linear(in_features=8, out_features=16, bias=True)
          (1): ReLU()
          (2): Linear(in_features=16, out_features=4, bias=True)
        )
        >>> small.pruning["parameters"].after, small.pruning["parameters"].before
        (212, 420)
    """

    def __init__(
        self,
        model: nn.Module,
        sparsity: float | None = None,
        *,
        budget: Budget | None = None,
        keep: Mapping[str, int] | None = None,
        dataset: Iterable[Any] | None = None,
        example_inputs: Any = None,
        loss: LossFunction | None = None,
        config: PruneConfig | None = None,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise InputError(
                f"R1Pruner(model={type(model).__name__}): an nn.Module is needed. A captured graph cannot be pruned: "
                "prune the module it came from, and capture what is left."
            )
        self.model, self.dataset, self.loss = model, dataset, loss
        self.config = PruneConfig() if config is None else config
        if not isinstance(self.config, PruneConfig):
            raise ConfigError(f"R1Pruner(config={type(config).__name__}): a PruneConfig is needed.")
        self.budget = Budget() if budget is None else budget
        self.keep = _units(keep, sparsity is not None or bool(self.budget.limits()))
        self.sparsity = None if self.keep else _checked(sparsity, self.budget)
        self.example_inputs = example_inputs

    def curves(self, *, latency: bool = False) -> list[GroupCurve]:
        """For each group what it holds and is predicted to cost, from all its channels on downwards.

        The predicted rise of the loss is in the units of the loss (half the squared first-order change), so that a
        solver can weigh it against other compressions scored by the Fisher information.

        Args:
            latency: measure the module with each group cut alone, at up to four points of each.
        """
        report = Report("curves")
        example, _ = examples_for(self.model, self.example_inputs, self.dataset)
        structure = self._structure(self.model, example, report)
        importance = self._importance(self.model, structure, self.dataset, report)
        elsewhere = parameters_in(self.model) - int(Bill(structure, parameters_of(structure)).total)
        found = []
        for ladder in self._ladders(structure, importance, self._step(self.model, structure, report)):
            ms = self._times(structure, ladder) if latency else {}
            found.append(curve_of(structure, ladder, elsewhere, ms))
        return found

    def compress(
        self,
        train_loader: Iterable[Any] | None = None,
        val_loader: Iterable[Any] | None = None,
        *,
        epochs: int = 3,
        lr: float = 1e-3,
    ) -> nn.Module:
        """Prune. The result is a module of the same class with smaller weights; its `pruning` is the Report.

        With a train loader it is pruned in rounds, trained in between against the float model's answers, and its batch
        statistics are estimated anew. Its `pruning_plan` makes the same of a fresh module (see `save_pruned`).

        Args:
            train_loader: batches to recover with; any iterable that can be read once an epoch.
            val_loader: held-out batches on which accuracy is measured before and after.
            epochs: of the recovery, over all rounds.
            lr: its highest learning rate (AdamW, or as the config's `training` says).

        Raises:
            InputError: nothing can be pruned, or weights or data cannot be used.
            CaptureError: the module cannot be captured.
            CheckFailedError: the budget cannot be met; the message has the best that can, and `report` what was done.
        """
        if isinstance(epochs, bool) or not isinstance(epochs, int) or epochs < 1:
            raise ConfigError(f"compress(epochs={epochs!r}): an integer >= 1 is needed.")
        return Compression(self, train_loader, val_loader, epochs, lr).result()

    def _structure(self, model: nn.Module, example: Any, report: Report) -> Structure:
        with torch.random.fork_rng(devices=[]):
            structure = settle(model, structure_of(model, example, self.config.skip), report)
        if not structure.groups:
            raise InputError(f"nothing in {type(model).__name__} can be pruned: {structure.pinned}")
        return structure

    def _importance(
        self, model: nn.Module, structure: Structure, dataset: Iterable[Any] | None, report: Report
    ) -> Importance:
        kind = self.config.importance
        if kind == "taylor" and dataset is None:
            raise InputError(
                "PruneConfig(importance='taylor') needs data: give R1Pruner(dataset=...) or a train loader."
            )
        if kind == "magnitude" or dataset is None:
            report.note("importance: norms of the weights" + ("" if kind == "magnitude" else ", as there are no data"))
            return magnitude_scores(model, structure)
        scores, name = taylor_scores(model, structure, dataset, self.config, self.loss)
        report.note(f"importance: predicted rise of the loss ({name}), first order, squared")
        return scores

    def _step(self, model: nn.Module, structure: Structure, report: Report) -> int:
        step = self.config.channel_step
        return measured_step(model, structure, report) if step == "auto" else int(step)

    def _ladders(self, structure: Structure, importance: Importance, step: int) -> list[Ladder]:
        return [Ladder(g, importance, step, self.config.keep_at_least) for g in structure.groups]

    def _timed_on(self, structure: Structure) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """What latency is measured on: the example inputs with all their samples, where they were given."""
        if self.example_inputs is None:
            return structure.program.example_inputs
        device = next((p.device for p in self.model.parameters()), torch.device("cpu"))
        found: tuple[tuple[Any, ...], dict[str, Any]] = to_device(as_inputs(self.example_inputs), device)
        return found

    def _times(self, structure: Structure, ladder: Ladder) -> dict[int, float]:
        rungs = sorted({round(i * (len(ladder.stops) - 1) / 3) for i in range(4)})
        cut = {
            str(ladder.stops[r]): plan_of(structure, structure.mask(ladder.removed(r))).apply(self.model) for r in rungs
        }
        times = timed(cut, self._timed_on(structure), rounds=12, seconds=5.0)
        return {int(kept): latency.median_ms for kept, latency in times.items()}


def _units(keep: Mapping[str, int] | None, other: bool) -> dict[str, int]:
    if keep is None:
        return {}
    if other or not keep:
        raise ConfigError(
            "R1Pruner(keep=...): units of at least one group are needed, with neither sparsity nor budget beside them."
        )
    for name, units in keep.items():
        if isinstance(units, bool) or not isinstance(units, int) or units < 1:
            raise ConfigError(f"R1Pruner(keep={{{name!r}: {units!r}}}): a whole number >= 1 is needed.")
    return dict(keep)


def _checked(sparsity: float | None, budget: Budget) -> float | None:
    if budget.memory_gb is not None:
        raise ConfigError(
            "R1Pruner(budget=Budget(memory_gb=...)): pruning is steered by size, latency and accuracy only."
        )
    if sparsity is None:
        return None if budget.limits() else DEFAULT_SPARSITY
    number = isinstance(sparsity, int | float) and not isinstance(sparsity, bool)
    if not number or not math.isfinite(sparsity) or not 0 < sparsity < 1:
        raise ConfigError(
            f"R1Pruner(sparsity={sparsity!r}): a share of the parameters above 0 and below 1 is needed, such as 0.3."
        )
    return float(sparsity)
