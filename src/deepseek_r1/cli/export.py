"""`deepseek-r1 export`: a model to ONNX or to an artifact, checked in its own runtime."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..core import Report
from ._frame import Html, Json, verb
from ._options import opens_model

if TYPE_CHECKING:
    from ._inputs import Opened


@verb(endings=(".onnx", ""))
@opens_model(batch_size=32)
def export(
    opened: Opened,
    out: Annotated[Path, typer.Option(help="An .onnx file, or a folder for an artifact.")],
    json: Json = None,
    html: Html = None,
) -> Report:
    """Export a model to ONNX or an artifact, checked.

    Its answers in the target's own runtime are compared with the original's; nothing is written if they differ.
    """
    from ..deploy import export as run

    report = run(opened.model, out, **opened.for_artifact())
    report.note(f"wrote {out}")
    return report
