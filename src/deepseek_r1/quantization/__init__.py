"""Compression by smaller numbers: decides what to quantise and with which ranges. Knows no engine and no HTTP."""

from __future__ import annotations

from ._quantize import METHODS, quantize
from ._static import Int8StaticConfig, quantize_static

__all__ = ["METHODS", "Int8StaticConfig", "quantize", "quantize_static"]
