"""`trace` and `Drawing`: a captured graph with what each operator costs, as text, JSON, SVG and an HTML page.

Knows nothing of engines: every time is that of the eager operator.
"""

from __future__ import annotations

from ._drawing import Drawing
from ._model import Node, Tensor
from ._trace import trace

__all__ = ["Drawing", "Node", "Tensor", "trace"]
