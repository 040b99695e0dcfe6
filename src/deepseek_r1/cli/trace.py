"""`deepseek-r1 trace`: a model's graph as a drawing, with what each operator costs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..core import Report
from ._frame import Json, verb
from ._options import opens_model

if TYPE_CHECKING:
    from ._inputs import Opened


@verb(endings=(".html", ".svg", ".json", ".txt"))
@opens_model(batch_size=1)
def trace(
    opened: Opened,
    out: Annotated[Path, typer.Option(help="A file: .html is the page, .svg a picture, .txt a table, .json the data.")],
    json: Json = None,
) -> Report:
    """Draw a model: operators, shapes, FLOPs, bytes, time and source lines.

    Every time is that of the eager operator, on these inputs.
    """
    from ..data import unpack_batch
    from ..graph import trace as run

    inputs: Any = opened.example_inputs
    loader = opened.part("val", "train", "test")
    if loader is not None:
        args, kwargs, _ = unpack_batch(next(iter(loader)))
        inputs = kwargs or args
    drawing = run(opened.model, inputs)
    drawing.save(out)
    report = drawing.report()
    report.note(f"wrote {out}")
    return report
