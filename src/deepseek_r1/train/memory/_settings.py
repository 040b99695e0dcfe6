"""What a configuration may say about memory: the checks, and the environment's switch. Knows no model."""

from __future__ import annotations

import math
import os
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ...core import ConfigError

if TYPE_CHECKING:
    from .._config import TrainingConfig

SWITCH = "R1_MEMORY_OPTIMIZER"
_ON, _OFF = ("1", "true", "yes", "on"), ("", "0", "false", "no", "off")


def check_settings(memory_gb: Any, checkpoint_interval: Any, compress: Any) -> None:
    """Raise ConfigError if these fields of a `TrainingConfig` cannot be used."""
    whole = isinstance(checkpoint_interval, int) and not isinstance(checkpoint_interval, bool)
    if checkpoint_interval is not None and not (whole and checkpoint_interval >= 1):
        raise ConfigError(
            f"TrainingConfig(checkpoint_interval={checkpoint_interval!r}): the value must be None or an integer >= 1 "
            "(blocks that are recomputed together). Checkpoints on disk are set by save_every_steps and "
            "save_every_epochs."
        )
    number = isinstance(memory_gb, int | float) and not isinstance(memory_gb, bool) and math.isfinite(memory_gb)
    if memory_gb is not None and memory_gb != "auto" and not (number and memory_gb > 0):
        raise ConfigError(
            f"TrainingConfig(memory_gb={memory_gb!r}): the value must be None, 'auto' or a number > 0 (in 10**9 bytes)."
        )
    if memory_gb is not None and checkpoint_interval is not None:
        raise ConfigError(
            f"TrainingConfig(memory_gb={memory_gb!r}, checkpoint_interval={checkpoint_interval!r}): the plan for a "
            "limit of memory chooses what is recomputed; give one of the two."
        )
    if not isinstance(compress, bool):
        raise ConfigError(f"TrainingConfig(compress_activations={compress!r}): the value must be True or False.")
    if compress and memory_gb is None and (checkpoint_interval is not None or not _switched_on()):
        raise ConfigError(
            "TrainingConfig(compress_activations=True): it is a choice of the plan for a limit of memory; give "
            "memory_gb, a number or 'auto'."
        )


def _switched_on() -> bool:
    value = os.environ.get(SWITCH, "").strip().lower()
    if value not in (*_ON, *_OFF):
        raise ConfigError(
            f"the environment variable {SWITCH}={os.environ[SWITCH]!r}: 1, true, yes or on switches limits of memory "
            "on, 0, false, no, off or nothing leaves them off. A limit in gigabytes is TrainingConfig(memory_gb=...)."
        )
    return value in _ON


def settle_memory(config: TrainingConfig) -> tuple[TrainingConfig, dict[str, str]]:
    """The configuration after a look at R1_MEMORY_OPTIMIZER, without what a limit of memory rules out; and why."""
    reasons: dict[str, str] = {}
    if config.memory_gb is None and config.checkpoint_interval is None:
        if not _switched_on():
            return config, reasons
        config = replace(config, memory_gb="auto")
        reasons["memory_gb"] = f"auto: the environment variable {SWITCH} is set"
    if config.compile is True:
        config = replace(config, compile="blocks")
        reasons["compile"] = "blocks: what is recomputed is chosen block by block"
    if config.cuda_graph is not False and config.checkpoint_interval is not None:
        config = replace(config, cuda_graph=False)
        reasons["cuda_graph"] = "False: recomputing puts the random generators back, which a recording cannot hold"
    return config, reasons
