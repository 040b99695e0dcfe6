"""The learning-rate schedules as plain functions. Knows nothing about optimizers or loops."""

from __future__ import annotations

import math

from ..core import ConfigError
from ._config import TrainingConfig


def lr_factor(
    step: int,
    total: int | None,
    schedule: str,
    warmup: int | float,
    *,
    cooldown: int | float = 0.2,
    stages: int = 3,
    stage_factor: float = 0.8,
) -> float:
    """What the base learning rate is multiplied with at `step` (counted from 0) of `total`.

    It climbs linearly over the warm-up, and then:

    - "constant" stays;
    - "linear" and "cosine" fall to zero at the end of the run along a line or half a cosine (Loshchilov and Hutter
      2017, https://arxiv.org/abs/1608.03983);
    - "wsd" (warm-up, stable, decay; Hu et al. 2024, https://arxiv.org/abs/2404.06395) stays, and falls to zero over
      the last `cooldown` steps as one minus a square root (Hägele et al. 2024, https://arxiv.org/abs/2405.18392);
    - "staged" is multiplied with `stage_factor` at each of the borders between `stages` equal parts of the run.

    Args:
        warmup: steps (an int) or a fraction of the run (a float).
        cooldown: the same, of "wsd". The warm-up goes first where the two meet.

    Raises:
        ConfigError: the schedule needs the number of steps, and it is unknown.

    Example:
        >>> [round(lr_factor(s, 10, "linear", 2), 3) for s in (0, 1, 2, 6, 9)]
        [0.5, 1.0, 1.0, 0.5, 0.125]
        >>> [round(lr_factor(s, 10, "wsd", 2, cooldown=4), 3) for s in (0, 1, 5, 6, 7, 9)]
        [0.5, 1.0, 1.0, 1.0, 0.5, 0.134]
        >>> [round(lr_factor(s, 9, "staged", 0), 3) for s in (0, 2, 3, 5, 6, 8)]
        [1.0, 1.0, 0.8, 0.8, 0.64, 0.64]
    """
    if total is None and (schedule != "constant" or isinstance(warmup, float)):
        raise ConfigError(
            f"TrainingConfig(schedule={schedule!r}, warmup={warmup!r}) needs the number of steps, but the loader has "
            "no length; use schedule='constant' with warmup as a number of steps."
        )
    climb = _steps(warmup, total)
    if step < climb:
        return (step + 1) / climb
    if schedule == "constant" or total is None:
        return 1.0
    if schedule == "wsd":
        fall = min(_steps(cooldown, total), total - climb)
        done = (step - (total - fall)) / fall if fall else 0.0
        return 1.0 - math.sqrt(min(max(done, 0.0), 1.0))
    if schedule == "staged":
        return float(stage_factor ** min(step * stages // total, stages - 1))
    done = min(1.0, (step - climb) / max(1, total - climb))
    return 1.0 - done if schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))


def _steps(length: int | float, total: int | None) -> int:
    return round(length * total) if isinstance(length, float) and total else int(length)


def config_lr_factor(step: int, total: int | None, config: TrainingConfig) -> float:
    """`lr_factor` with the options of a configuration."""
    return lr_factor(
        step,
        total,
        config.schedule,
        config.warmup,
        cooldown=config.cooldown,
        stages=config.stages,
        stage_factor=config.stage_factor,
    )
