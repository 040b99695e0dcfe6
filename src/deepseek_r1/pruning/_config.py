"""`PruneConfig`: how channels are judged, how many may leave, and how the module recovers."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from ..core import ConfigError
from ..train import TrainingConfig

IMPORTANCES = ("auto", "taylor", "magnitude")
DISTANCES = ("output", "kl")
CURRENCIES = ("parameters", "operations")


@dataclass(frozen=True, kw_only=True)
class PruneConfig:
    """How `R1Pruner` prunes. Frozen: derive another with `dataclasses.replace`.

    Attributes:
        importance: "taylor" (the change of the loss to first order, squared; needs data), "magnitude" (norms of
            weights), or "auto": "taylor" where there are data.
        distance: what stands for the loss where the data have no labels: "output" (the distance of the answers from
            the float model's, relative to their spread) or "kl" (its divergence from the float model's classes).
        samples: samples that the importance is taken over, at most.
        micro_batch: samples in one backward pass of it; 1 is exact, more is faster.
        currency: what the loss is weighed against where channels compete: "parameters", or multiply-add "operations",
            which cost time.
        channel_step: channels are removed down to multiples of this; "auto" measures which multiples are fast here.
        keep_at_least: share of each group's channels that stays in any case.
        rounds: how often is pruned, with training in between; "auto": once for every four epochs, up to 3 times.
        skip: parts of names of layers whose output channels stay.
        temperature: softens both sides of the distillation.
        distillation: weight of the float model's answers in the loss of the recovery; the task's loss has the rest.
        batch_norm_batches: batches of training data that batch statistics are estimated on anew; 0: they stay.
        training: settings of the recovery's `Trainer`; None: a cosine schedule with a warm-up.
        timing_rounds: turns in which latency before and after is measured; 0: it is not.
        seed: of everything drawn here.

    Raises:
        ConfigError: a field has a value that is not allowed; the message says what is.

    Example:
        >>> PruneConfig(importance="magnitude", channel_step=8).rounds
        'auto'
    """

    importance: str = "auto"
    distance: str = "output"
    samples: int = 256
    micro_batch: int = 2
    currency: str = "parameters"
    channel_step: int | str = "auto"
    keep_at_least: float = 0.1
    rounds: int | str = "auto"
    skip: tuple[str, ...] = ()
    temperature: float = 2.0
    distillation: float = 0.5
    batch_norm_batches: int = 32
    training: TrainingConfig | None = None
    timing_rounds: int = 20
    seed: int = 0

    def __post_init__(self) -> None:
        self._one_of("importance", IMPORTANCES)
        self._one_of("distance", DISTANCES)
        self._one_of("currency", CURRENCIES)
        for name in ("samples", "micro_batch"):
            self._whole(name, 1)
        for name in ("batch_norm_batches", "timing_rounds", "seed"):
            self._whole(name, 0)
        for name in ("channel_step", "rounds"):
            if getattr(self, name) != "auto":
                self._whole(name, 1)
        if not _number(self.keep_at_least) or not 0 < self.keep_at_least <= 1:
            self._refuse("keep_at_least", "a share above 0, up to 1")
        if not _number(self.temperature) or self.temperature <= 0:
            self._refuse("temperature", "a number > 0")
        if not _number(self.distillation) or not 0 <= self.distillation <= 1:
            self._refuse("distillation", "a share from 0 to 1")
        if isinstance(self.skip, str) or not all(isinstance(s, str) and s for s in self.skip):
            self._refuse("skip", "a tuple of parts of names, such as ('head',)")
        object.__setattr__(self, "skip", tuple(self.skip))
        if self.training is not None and not isinstance(self.training, TrainingConfig):
            self._refuse("training", "a TrainingConfig or None")

    def _refuse(self, name: str, allowed: str) -> None:
        raise ConfigError(f"PruneConfig({name}={getattr(self, name)!r}): the value must be {allowed}.")

    def _one_of(self, name: str, allowed: tuple[str, ...]) -> None:
        if getattr(self, name) not in allowed:
            self._refuse(name, "one of " + ", ".join(repr(a) for a in allowed))

    def _whole(self, name: str, least: int) -> None:
        value: Any = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            self._refuse(
                name, f"a whole number >= {least}" + (" or 'auto'" if name in ("channel_step", "rounds") else "")
            )


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
