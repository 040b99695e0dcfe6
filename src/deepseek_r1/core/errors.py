"""Every error a user can cause, as one tree.

Each class is also a built-in exception, so that code which never heard of this package still catches it.
A message says what was given, what is allowed, and what to do next.
"""

from __future__ import annotations

from typing import Any


class DeepSeekError(Exception):
    """Base of all errors raised for a mistake the user can correct."""


class ConfigError(DeepSeekError, ValueError):
    """A configuration field has a value that is not allowed."""


class InputError(DeepSeekError, ValueError):
    """A model, a dataset or an argument cannot be used as given."""


class CaptureError(DeepSeekError, RuntimeError):
    """A module could not be captured into a static graph."""


class UnsupportedOpError(DeepSeekError, RuntimeError):
    """An operator has no form on the engine, target or source named in the message."""


class ArtifactError(DeepSeekError, ValueError):
    """A saved file is truncated, altered, of a future version, or not what it claims to be."""


class UnsafeFileError(ArtifactError):
    """A file carries, or asks for, code that opening it would run. It was not opened."""


class MissingExtraError(DeepSeekError, ImportError):
    """A feature needs a package that is not installed; the message has the pip command."""


class PluginError(DeepSeekError, LookupError):
    """A plug-in is unknown, clashes with another, or could not be imported."""


class NonFiniteLossError(DeepSeekError, RuntimeError):
    """Training met a loss or a gradient that is not a finite number."""


class CheckFailedError(DeepSeekError, RuntimeError):
    """A result was produced but did not pass a check (parity, accuracy, budget).

    Attributes:
        report: the Report with the failed check, where there is one.
    """

    def __init__(self, message: str, *, report: Any = None) -> None:
        super().__init__(message)
        self.report = report


def missing_extra(feature: str, package: str, extra: str) -> MissingExtraError:
    """The error for an absent optional package.

    Example:
        >>> str(missing_extra("reading PNG files", "Pillow", "images"))
        "reading PNG files needs Pillow, which is not installed. Run: pip install 'deepseek-r1[images]'"
    """
    return MissingExtraError(
        f"{feature} needs {package}, which is not installed. Run: pip install 'deepseek-r1[{extra}]'"
    )
