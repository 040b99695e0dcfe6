"""An Artifact made callable, numpy in and numpy out. Never imports torch, knows no Programs."""

from __future__ import annotations

from ._predictor import RUNTIMES, Predictor, load
from ._preprocessing import check_steps, preprocess

__all__ = ["RUNTIMES", "Predictor", "check_steps", "load", "preprocess"]
