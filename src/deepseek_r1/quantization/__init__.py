"""Compression by smaller numbers: decides what to quantise, with which ranges and formats. Knows no HTTP."""

from __future__ import annotations

from ..core import (
    BFloat16,
    Float32,
    Int4Dynamic,
    Int4Format,
    Int4Weight,
    Int8Dynamic,
    Int8Static,
    Int8Weight,
    LayerFormat,
)
from ._auto import AutoQuantizer
from ._auto_config import AutoConfig
from ._dynamic import DSQuantizer
from ._ptq import PTQConfig, quantize_program
from ._qat import QATConfig, R1Quantizer
from ._qat_module import QATModule
from ._quantize import METHODS, quantize
from ._search import Costs
from ._solver import Edge, Problem, Solution, Tie, curve, solve
from ._verify import Comparison, Measured

__all__ = [
    "METHODS",
    "AutoConfig",
    "AutoQuantizer",
    "BFloat16",
    "Comparison",
    "Costs",
    "DSQuantizer",
    "Edge",
    "Float32",
    "Int4Dynamic",
    "Int4Format",
    "Int4Weight",
    "Int8Dynamic",
    "Int8Static",
    "Int8Weight",
    "LayerFormat",
    "Measured",
    "PTQConfig",
    "Problem",
    "QATConfig",
    "QATModule",
    "R1Quantizer",
    "Solution",
    "Tie",
    "curve",
    "quantize",
    "quantize_program",
    "solve",
]
