"""How good a candidate's answers are for the task, output by output. Knows tensors and labels only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ..data import class_hits

#: Answers of one batch: its outputs, in order.
Outputs = list[torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class Score:
    """One judgement, at most 1.

    Attributes:
        how: says of what.
        counted: whether each of the samples is right or wrong.
    """

    value: float
    how: str
    samples: int
    counted: bool = False

    def allowed(self, drop: float) -> float:
        """What may be lost where `drop` was asked for: of what is counted one sample, if `drop` is half of it or more.

        Example:
            >>> Score(value=0.5, how="accuracy on 128 labels", samples=128, counted=True).allowed(0.005) == 1 / 128
            True
        """
        return max(drop, 1 / self.samples) if self.counted and drop * self.samples >= 0.5 else drop


def judge(answers: list[Outputs], floats: list[Outputs], labels: list[Any], task: str = "auto") -> list[Score]:
    """Scores of a model's answers, one for each output, the float model's answers being the reference.

    The first output: accuracy where there are class labels; where there are no labels and the output is
    [rows, at least 2], the share of rows whose largest entry is where the float model has it. Every other output, and
    a first output of any other kind: the share of the float model's variance that is reproduced, of the worst column
    where it is [rows, columns].

    Args:
        answers: for each batch its outputs.
        floats: the same of the float model.
        labels: for each batch class indices, other labels, or None.
        task: one of `data.TASKS`; "auto" does as said, "classes" takes the first output for scores along its last
            dimension even so, "values" never does.
    """
    scores = []
    for number in range(len(floats[0])):
        a, b = ([batch[number] for batch in values] for values in (answers, floats))
        score = _classes(a, b, labels, task) if number == 0 and task != "values" else None
        scores.append(score or _reproduced(a, b, f"output {number}" if len(floats[0]) > 1 else "the output"))
    return scores


def _classes(answers: Outputs, floats: Outputs, labels: list[Any], task: str) -> Score | None:
    hits = [class_hits(out, label) for out, label in zip(answers, labels, strict=True)]
    right = [h for h in hits if h is not None]
    if len(right) == len(answers):
        found = torch.cat(right).double()
        return Score(
            value=float(found.mean()), how=f"accuracy on {len(found)} labels", samples=len(found), counted=True
        )
    if task == "auto" and (any(y is not None for y in labels) or any(b.ndim != 2 or b.shape[1] < 2 for b in floats)):
        return None
    pairs = zip(answers, floats, strict=True)
    same = torch.cat([(a.argmax(-1) == b.argmax(-1)).flatten() for a, b in pairs]).double()
    how = f"agreement with the float model on {len(same)} rows"
    return Score(value=float(same.mean()), how=how, samples=len(same), counted=True)


def _reproduced(answers: Outputs, floats: Outputs, what: str) -> Score:
    columns = floats[0].shape[1] if floats[0].ndim == 2 else 1
    a, b = (torch.cat([v.detach().double().reshape(-1, columns).cpu() for v in values]) for values in (answers, floats))
    spread = ((b - b.mean(0)) ** 2).sum(0)
    # A column that never varies is reproduced only by the same numbers; its own size is the scale then.
    scale = torch.where(spread > 0, spread, (b**2).sum(0)).clamp_min(1e-300)
    worst = 1 - ((a - b) ** 2).sum(0) / scale
    how = f"explained variance of {what} of the float model, worst of {columns} column(s), {len(b)} rows"
    return Score(value=float(worst.min()) if len(b) else 1.0, how=how, samples=len(b))
