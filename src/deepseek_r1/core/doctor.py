"""`examine`: is this machine fit, and what is the fix where it is not. Needs no torch, and survives a broken one."""

from __future__ import annotations

from . import _facts
from ._verdicts import ABSENT, FAIL, ONNXRUNTIME_KINDS, OPTIONAL, SLIM, WARN, WITH_TORCH, Facts, judge
from .report import Report

_DISTRIBUTIONS = ["torch", *SLIM, *WITH_TORCH, *OPTIONAL, *ONNXRUNTIME_KINDS]


def examine(check_compatibility: bool = False) -> Report:
    """Look at this machine: one row for each thing, with a verdict and, where needed, a fix.

    Args:
        check_compatibility: also import torch in a process of its own and compute on the CPU and on each GPU.

    Returns:
        A Report whose rows are (subject, verdict, what was found and the fix) and whose checks are the verdicts
        "fail"; it is `ok` if there is none.

    Example:
        >>> examine()["Python"].after
        'ok'
    """
    return report(_facts.gather(_DISTRIBUTIONS, check_compatibility=check_compatibility))


def report(facts: Facts) -> Report:
    """The Report on a machine with these facts."""
    verdicts = judge(facts)
    result = Report("This machine")
    for v in verdicts:
        result.add(v.subject, v.state, how=v.found + (f". Fix: {v.fix}" if v.fix else ""))
        if v.state == FAIL:
            result.check(v.subject, False, v.found)
    count = {state: sum(v.state == state for v in verdicts) for state in (FAIL, WARN, ABSENT)}
    result.check("nothing is wrong", not count[FAIL], f"{count[FAIL]} failed, {count[WARN]} warning(s)")
    result.facts["seen"] = {k: v for k, v in facts.items() if k not in ("packages", "check")}
    return result
