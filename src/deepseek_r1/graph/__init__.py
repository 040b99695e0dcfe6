"""`Program`: a module captured as a static graph, its rewrites, its drawing and its file. Knows no engine."""

from __future__ import annotations

from ._capture import as_inputs, capture, evaluation
from ._foreign import load_pt2
from ._passes import PASSES, fold_batch_norm, simplify
from .drawing import Drawing, trace
from .editing import rewrite
from .program import Program, float64_module, to_float64
from .signature import Signature

__all__ = [
    "PASSES",
    "Drawing",
    "Program",
    "Signature",
    "as_inputs",
    "capture",
    "evaluation",
    "float64_module",
    "fold_batch_norm",
    "load_pt2",
    "rewrite",
    "simplify",
    "to_float64",
    "trace",
]
