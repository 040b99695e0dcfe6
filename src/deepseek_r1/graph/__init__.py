"""`Program`: a module captured as a static graph, its rewrites and its file. Knows no engine."""

from __future__ import annotations

from ._capture import as_inputs, capture, capture_as_is, evaluation
from ._foreign import load_pt2
from ._passes import PASSES, fold_batch_norm, simplify
from ._recurrent import recurrent_shapes
from ._static import PLAIN, StaticOptions, run_static, static_programs
from .editing import rewrite
from .program import Program, float64_module, to_float64

__all__ = [
    "PASSES",
    "PLAIN",
    "Program",
    "StaticOptions",
    "as_inputs",
    "capture",
    "capture_as_is",
    "evaluation",
    "float64_module",
    "fold_batch_norm",
    "load_pt2",
    "recurrent_shapes",
    "rewrite",
    "run_static",
    "simplify",
    "static_programs",
    "to_float64",
]
