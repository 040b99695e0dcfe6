"""Is somebody following what a module does just now? Then it must run line by line, whatever graph it may have."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar

import torch

_CAPTURING: ContextVar[bool] = ContextVar("capturing", default=False)


@contextlib.contextmanager
def capturing() -> Iterator[None]:
    """Inside, modules are run for the sake of a capture."""
    token = _CAPTURING.set(True)
    try:
        yield
    finally:
        _CAPTURING.reset(token)


def followed() -> bool:
    """Whether a capture, an export, a compiler or a transform of functions follows the modules that run now."""
    return (
        _CAPTURING.get()
        or torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._functorch.peek_interpreter_stack() is not None
    )
