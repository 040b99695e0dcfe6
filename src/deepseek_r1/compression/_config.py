"""`CompressionConfig`: between what channels and bits are chosen, and how much is tried."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from ..core import ConfigError
from ..pruning import PruneConfig
from ..quantization import AutoConfig


@dataclass(frozen=True, kw_only=True)
class CompressionConfig:
    """Options of `Compressor`. Frozen: derive another with `dataclasses.replace`.

    Attributes:
        levels: shares of its channels that a group may keep beside all of them; the nearest fast number is taken.
        candidates: how many cut modules are trained, quantised and measured, at most.
        trial_epochs: of the recovery at each level that the prediction is measured on, if there is a train loader.
        points: of the curve that the candidates are taken from.
        formats: how formats are searched; its engine is the one that latency is measured on.
        pruning: how channels are judged and recovered; its `distance` follows from the task.

    Raises:
        ConfigError: a field has a value that is not allowed; the message says what is.

    Example:
        >>> CompressionConfig(levels=(0.75, 0.5)).candidates
        3
    """

    levels: tuple[float, ...] = (0.8, 0.6, 0.4)
    candidates: int = 3
    trial_epochs: int = 1
    points: int = 12
    formats: AutoConfig = field(default_factory=AutoConfig)
    pruning: PruneConfig = field(default_factory=PruneConfig)

    def __post_init__(self) -> None:
        object.__setattr__(self, "levels", tuple(sorted(self.levels, reverse=True)))
        if not self.levels or not all(
            isinstance(v, int | float) and math.isfinite(v) and 0 < v < 1 for v in self.levels
        ):
            raise ConfigError(f"CompressionConfig(levels={self.levels!r}): shares above 0 and below 1 are needed.")
        for name in ("candidates", "trial_epochs", "points"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(f"CompressionConfig({name}={value!r}): a whole number >= 1 is needed.")
        for name, kind in (("formats", AutoConfig), ("pruning", PruneConfig)):
            if not isinstance(getattr(self, name), kind):
                raise ConfigError(f"CompressionConfig({name}=...): an instance of {kind.__name__} is needed.")
