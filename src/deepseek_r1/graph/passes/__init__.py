"""Rewrites of a Program: a list of named functions on its graph, each verified in float64 after it ran.

A pass takes a GraphModule, edits its graph in place and returns how many places it changed.
"""

from __future__ import annotations

from ._simplify import PASSES, fold_batch_norm, simplify

__all__ = ["PASSES", "fold_batch_norm", "simplify"]
