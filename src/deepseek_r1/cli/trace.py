"""`deepseek-r1 trace`: a model's graph as a drawing, with what each operator costs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ..core import Report
from ._frame import Json, Seed, verb
from ._options import BatchSize, Data, ImageSize, InputDtype, InputShape, Model, Weights


@verb(endings=(".html", ".svg", ".json", ".txt"))
def trace(
    model: Model,
    out: Annotated[Path, typer.Option(help="A file: .html is the page, .svg a picture, .txt a table, .json the data.")],
    weights: Weights = None,
    data: Data = None,
    input_shape: InputShape = None,
    input_dtype: InputDtype = None,
    batch_size: BatchSize = 1,
    image_size: ImageSize = None,
    seed: Seed = 0,
    json: Json = None,
) -> Report:
    """Draw a model: operators, shapes, FLOPs, bytes, time and source lines.

    Every time is that of the eager operator, on these inputs.
    """
    from ..data import unpack_batch
    from ..graph import trace as run
    from ._inputs import needs_inputs, open_inputs

    opened = open_inputs(
        model,
        weights=weights,
        data=data,
        batch_size=batch_size,
        image_size=image_size,
        input_shape=input_shape,
        input_dtype=input_dtype,
        seed=seed,
    )
    needs_inputs(opened)
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
