"""Is somebody following what a module does just now? Then it must run line by line, whatever graph it may have."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar

import torch

_STEPWISE: ContextVar[bool] = ContextVar("stepwise", default=False)


@contextlib.contextmanager
def line_by_line() -> Iterator[None]:
    """Inside, no module runs as the static graph that it may have."""
    token = _STEPWISE.set(True)
    try:
        yield
    finally:
        _STEPWISE.reset(token)


def followed() -> bool:
    """Whether a capture, an export, a compiler or a transform of functions follows the modules that run now."""
    return (
        torch.compiler.is_compiling()
        or torch.compiler.is_exporting()
        or _STEPWISE.get()
        or torch.jit.is_tracing()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._functorch.peek_interpreter_stack() is not None
    )
