"""`deepseek-r1 version`."""

from __future__ import annotations

import platform
from importlib import metadata

import typer

from ..core import Report
from ._frame import Json, verb

_SHOWN = ("torch", "onnxruntime", "onnx", "numpy")


def _lines(report: Report) -> None:
    for row in report.rows:
        typer.echo(f"{row.metric} {row.after or 'not installed'}")


@verb(show=_lines)
def version(json: Json = None) -> Report:
    """Print the versions of this package and its base."""
    report = Report("Versions")
    for name in ("deepseek-r1", *_SHOWN):
        try:
            report.add(name, metadata.version(name))
        except metadata.PackageNotFoundError:
            report.add(name, None)
    report.add("python", platform.python_version())
    return report
