"""Silence for what torch says about itself while it captures; the user's own warnings are not touched."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator


@contextlib.contextmanager
def quiet_torch() -> Iterator[None]:
    """Hold back torch's own deprecation warnings and the log lines it writes about its internals."""
    logger = logging.getLogger("torch")
    loggers = [logger, *(logging.getLogger(n) for n in ("torch.fx.experimental.symbolic_shapes", "torch.export"))]
    levels = [one.level for one in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for one in loggers:
            one.setLevel(logging.CRITICAL)
        try:
            # A failed export prints its half-made graph on standard error.
            with contextlib.redirect_stderr(io.StringIO()):
                yield
        finally:
            for one, level in zip(loggers, levels):
                one.setLevel(level)
