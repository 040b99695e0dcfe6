"""Rewrites of the float program before it is quantised, and the choice among them by what they leave of the error."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from torch.fx import GraphModule

from ..core import LayerFormat, Report
from ..graph import Program, rewrite
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
Quantise = Callable[[Program], Program]
Formats = Callable[[GraphModule], Mapping[Layer, LayerFormat]]
Compare = Callable[[Program, Program, Batches], float]


def rewritten(
    parent: Program, batches: Batches, others: Batches, options: Mapping[str, str], formats: Formats,
    quantise: Quantise, sqnr: Compare, report: Report,
) -> tuple[Program, float]:  # fmt: skip
    """The float program, or a rewrite of it that gives the same answers and is better quantised; and how well (dB).

    That number is minus infinity where nothing had to be compared.

    Args:
        batches: flat inputs that tell how to rewrite.
        others: those that the answers are compared on.
        options: one of each of `OPTIONS`. What is named is done; "auto" does what makes the quantised answers better.
        formats: of the layers in a graph.
        quantise: post-training quantisation, as cheap as it may be: rewrites are compared by it.
        sqnr: signal-to-noise ratio (dB) of a program's answers against another's.
        report: takes what was done.
    """
    base, best = parent, -math.inf
    for name, methods in OPTIONS.items():
        wanted = options[name]
        if wanted == "off":
            continue
        if wanted == "auto" and best == -math.inf:
            best = sqnr(parent, quantise(base), others)
        start, kept = base, None
        # Methods of one option are rivals: each has to be worth it beside none, and the best of them is taken.
        without = best
        for method in methods[1:-1] if wanted == "auto" else (wanted,):
            tried, done = _tried(start, batches, name, method, formats)
            if not done:
                report.skip(f"{name}, {method}", "nothing in the program allows it or gains by it")
                continue
            if wanted == "auto":
                same = sqnr(parent, tried, others)
                found = sqnr(parent, quantise(tried), others)
                what = f"{found:.1f} dB on calibration data, {without:.1f} without"
                if same < _SAME_DB or found <= max(best, without - 10 * math.log10(BETTER)):
                    report.skip(f"{name}, {method}", f"{what}; float answers are the same to {same:.0f} dB")
                    continue
                report.note(f"{name} by {method}: {what}")
                best = found
            else:
                best = -math.inf
            base, kept = tried, (method, done)
        for names, how in kept[1] if kept else ():
            report.add(f"{name} of {names}", kept[0] if kept else "", how=how)
    return base, best


def _tried(
    start: Program, batches: Batches, name: str, method: str, formats: Formats
) -> tuple[Program, list[tuple[str, str]]]:
    done: list[tuple[str, str]] = []

    def change(module: GraphModule) -> int:
        if name == "equalisation":
            done.extend(_equalise.equalise(module, batches, method))
        else:
            done.extend(_scaling.fold_scales(module, formats(module), batches, method))
        return len(done)

    return rewrite(start, change), done
