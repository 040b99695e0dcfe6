"""Pruning and quantisation decided together: how many channels, and how many bits for each layer. Knows no HTTP."""

from __future__ import annotations

from ._compressor import Compressor
from ._config import CompressionConfig

__all__ = ["CompressionConfig", "Compressor"]
