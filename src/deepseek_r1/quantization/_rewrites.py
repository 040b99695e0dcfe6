"""Rewrites of the float program before it is quantised, and the choice among them by what they leave of the error."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from torch.fx import GraphModule

from ..core import LayerFormat, Report
from ..graph import Program
from ..graph.editing import adopt, graph_of
from . import _equalise, _scaling
from ._layers import Layer

#: Options of PTQConfig and what they allow.
OPTIONS = {
    "equalisation": ("off", *_equalise.METHODS, "auto"),
    "scaling": ("off", *_scaling.METHODS, "auto"),
}
#: What changes how a program is quantised must leave less than this share of the error: smaller gains were seen to be
#: losses on other data and in other measures.
BETTER = 0.75
#: Signal-to-noise ratio (dB) at which two float programs count as the same.
_SAME_DB = 60.0

Batches = list[tuple[Any, ...]]
Formats = Callable[[GraphModule], Mapping[Layer, LayerFormat]]
Quality = Callable[[GraphModule], float]


def rewritten(
    parent: Program, batches: Batches, options: Mapping[str, str], formats: Formats, same: Quality, quality: Quality,
    report: Report,
) -> tuple[Program, float]:  # fmt: skip
    """The float program, or a rewrite of it that gives the same answers and is better quantised; and how well (dB).

    That number is minus infinity where nothing had to be compared.

    Args:
        batches: flat inputs that tell how to rewrite.
        options: one of each of `OPTIONS`. What is named is done; "auto" does what makes the quantised answers better.
        formats: of the layers in a graph.
        same: signal-to-noise ratio (dB) of a graph's float answers against the program's.
        quality: that of its quantised answers, on data that it was not fitted to.
        report: takes what was done.
    """
    base, best = parent, -math.inf
    for name, methods in OPTIONS.items():
        wanted = options[name]
        if wanted == "off":
            continue
        if wanted == "auto" and best == -math.inf:
            best = quality(graph_of(base))
        kept = None
        # Methods of one option are rivals: each has to be worth it beside none, and the best of them is taken.
        without = best
        for method in methods[1:-1] if wanted == "auto" else (wanted,):
            tried = graph_of(base)
            done = _change(tried, batches, name, method, formats)
            if not done:
                report.skip(f"{name}, {method}", "nothing in the program allows it or gains by it")
                continue
            if wanted == "auto":
                alike, found = same(tried), quality(tried)
                what = f"{found:.1f} dB on calibration data, {without:.1f} without"
                if alike < _SAME_DB or found <= max(best, without - 10 * math.log10(BETTER)):
                    report.skip(f"{name}, {method}", f"{what}; float answers are the same to {alike:.0f} dB")
                    continue
                report.note(f"{name} by {method}: {what}")
                best = found
            else:
                best = -math.inf
            kept = tried, method, done
        if kept:
            base = adopt(base, kept[0])
            for names, how in kept[2]:
                report.add(f"{name} of {names}", kept[1], how=how)
    return base, best


def _change(module: GraphModule, batches: Batches, name: str, method: str, formats: Formats) -> list[tuple[str, str]]:
    if name == "equalisation":
        return _equalise.equalise(module, batches, method)
    return _scaling.fold_scales(module, formats(module), batches, method)
