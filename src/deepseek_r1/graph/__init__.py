"""`Program`: a module captured as a static graph, its rewrites, its drawing and its file. Knows no engine."""

from __future__ import annotations

from ._capture import as_inputs, capture, capture_as_is, evaluation
from ._foreign import load_pt2
from ._memory_plan import BufferPlan, buffer_plan
from ._recurrent import recurrent_shapes
from ._signature import Signature
from ._state import preserved
from ._static import PLAIN, StaticOptions, run_static, static_programs
from .drawing import Drawing, trace
from .editing import rewrite
from .passes import PASSES, fold_batch_norm, simplify
from .program import Program, float64_module, to_float64

__all__ = [
    "PASSES",
    "PLAIN",
    "BufferPlan",
    "Drawing",
    "Program",
    "Signature",
    "StaticOptions",
    "as_inputs",
    "buffer_plan",
    "capture",
    "capture_as_is",
    "evaluation",
    "float64_module",
    "fold_batch_norm",
    "load_pt2",
    "preserved",
    "recurrent_shapes",
    "rewrite",
    "run_static",
    "simplify",
    "static_programs",
    "to_float64",
    "trace",
]
