"""`AutoConfig`: what a search for formats may choose from, and how much it measures."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ..core import ConfigError, Int4Weight, Int8Dynamic, Int8Static, Int8Weight, LayerFormat
from ..data import TASKS
from ._ptq import PTQConfig
from ._search import OBJECTIVES


@dataclass(frozen=True, kw_only=True)
class AutoConfig:
    """Options of the search for formats.

    Attributes:
        formats: that each layer may have beside float32, where it can.
        engine: that the model will run on, and on which latency is measured.
        task: "classes" (the output holds scores of classes; their divergence and the accuracy count), "values" (the
            squared error of all float outputs counts), or "auto": class indices as labels, or an output [rows, at least
            2] without labels, are taken for classes.
        minimise: "latency", "size" or "loss"; "auto" takes what the budget does not limit: latency first, then size,
            and the loss where both are limited or accuracy is not asked for.
        layers: formats that are given, by name of a layer or of what it lies in.
        ptq: how ranges and weights are found, and what stays float (`skip`); its formats are not looked at.
        calibration_batches: of the dataset, for ranges, weights and scores; at most.
        held_out_batches: the next ones, for the verification; at most.
        measured_layers: how many scores are measured instead of estimated.
        points: of the curve between loss and latency.
        seconds: for timing each time.
        seed: of the draws in the estimate.
        cache: folder for what a search finds out; by default the user's cache.

    Example:
        >>> from deepseek_r1.core import Int8Weight
        >>> AutoConfig(engine="onnxruntime", layers={"head": Int8Weight()}).minimise
        'auto'
    """

    formats: tuple[LayerFormat, ...] = (Int8Static(), Int8Dynamic(), Int8Weight(), Int4Weight(group_size=64))
    engine: str = "onnxruntime"
    task: str = "auto"
    minimise: str = "auto"
    layers: Mapping[str, LayerFormat] = field(default_factory=dict)
    ptq: PTQConfig = field(default_factory=PTQConfig)
    calibration_batches: int = 8
    held_out_batches: int = 16
    measured_layers: int = 12
    points: int = 16
    seconds: float = 10.0
    seed: int = 0
    cache: str | Path | None = None
    version: int = 1

    def __post_init__(self) -> None:
        if self.minimise not in ("auto", *OBJECTIVES):
            raise ConfigError(
                f"AutoConfig(minimise={self.minimise!r}): one of auto, {', '.join(OBJECTIVES)} is needed."
            )
        if self.task not in TASKS:
            raise ConfigError(f"AutoConfig(task={self.task!r}): one of {', '.join(TASKS)} is needed.")
        for name in ("calibration_batches", "held_out_batches", "points"):
            if getattr(self, name) < 1:
                raise ConfigError(f"AutoConfig({name}={getattr(self, name)!r}): at least 1 is needed.")
        if self.measured_layers < 0 or self.seconds <= 0:
            raise ConfigError("AutoConfig: measured_layers >= 0 and seconds > 0 are needed.")
        for fmt in (*self.formats, *self.layers.values()):
            if not isinstance(fmt, LayerFormat):
                raise ConfigError(f"AutoConfig: {fmt!r} is no layer format; one such as Int8Static() is needed.")
        if not any(fmt.is_quantised or fmt.weight_bits == 16 for fmt in self.formats):
            raise ConfigError("AutoConfig(formats=...): at least one format beside float32 is needed.")

    def calibrating(self, batches: int) -> int:
        """How many of so many batches calibrate; the next ones verify."""
        return min(self.calibration_batches, (batches + 1) // 2)
