"""Compiled blocks that save less: the compiler recomputes inside a block, as far as a share of the bytes asks for.

The share is torch's `activation_memory_budget`, one for each compiled form instead of one for the process. Knows one
call at a time; what a share really saves and costs is measured by others.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch

#: The attribute of a compiled call that says whether it is for any length (`dynamic` of `torch.compile`).
DYNAMIC = "_deepseek_r1_dynamic"
#: What makes code of the graphs once the compiler has chosen what is saved.
_COMPILER = "inductor"


@cache
def _backend(share: float) -> Callable[..., Any]:
    """The compiler under a share. One object for each: blocks of one shape then share what was compiled."""

    def partly(graph: Any, inputs: Any) -> Any:
        import torch._functorch.config as functorch_config
        from torch._dynamo.backends.registry import lookup_backend

        with functorch_config.patch(activation_memory_budget=share):
            return lookup_backend(_COMPILER)(graph, inputs)

    return partly


def is_compiled(run: Callable[..., Any]) -> bool:
    """Whether a call runs through `torch.compile`."""
    return hasattr(run, "_torchdynamo_orig_callable")


def partial_form(run: Callable[..., Any], share: float) -> Callable[..., Any]:
    """The form of a compiled call that saves a share of what it would; a call that is not compiled as it is.

    Not for calls that draw random numbers: under a share torch (2.13) computes dropout again with other numbers.

    Args:
        share: from 0 (its inputs alone) to 1 (what the compiler saves by itself).
    """
    if not is_compiled(run):
        return run
    original: Callable[..., Any] = run._torchdynamo_orig_callable  # type: ignore[attr-defined]
    return torch.compile(original, backend=_backend(share), dynamic=getattr(run, DYNAMIC, None))
