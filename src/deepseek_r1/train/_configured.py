"""The callbacks that a configuration asks for. Knows nothing about loops."""

from __future__ import annotations

from collections.abc import Iterable

from ._callbacks import Callback, EarlyStopping
from ._config import TrainingConfig
from ._ema import ExponentialMovingAverage


def configured(config: TrainingConfig) -> list[Callback]:
    """Callbacks for `config`, in the order in which they are to run: before the user's.

    Example:
        >>> [type(c).__name__ for c in configured(TrainingConfig(ema_decay=0.99, early_stop_patience=2))]
        ['ExponentialMovingAverage', 'EarlyStopping']
    """
    found: list[Callback] = []
    if config.ema_decay is not None:
        found.append(ExponentialMovingAverage(config.ema_decay))
    if config.early_stop_patience is not None:
        found.append(EarlyStopping(config.early_stop_patience, config.early_stop_metric, config.early_stop_mode))
    return found


def acting(callbacks: Iterable[Callback]) -> list[Callback]:
    """Those that may change the model or the optimizer: all but the ones here, which read them.

    Example:
        >>> acting([EarlyStopping(3)])
        []
    """
    return [c for c in callbacks if type(c) not in (EarlyStopping, ExponentialMovingAverage)]
