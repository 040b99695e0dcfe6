"""`deepseek-r1 export`: a model to ONNX or to an artifact, checked in its own runtime."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..core import Report
from ._frame import Html, Json, Seed, verb
from ._options import BatchSize, Data, ImageSize, InputDtype, InputShape, Model, Weights


@verb(endings=(".onnx", ""))
def export(
    model: Model,
    out: Annotated[Path, typer.Option(help="An .onnx file, or a folder for an artifact.")],
    weights: Weights = None,
    data: Data = None,
    input_shape: InputShape = None,
    input_dtype: InputDtype = None,
    batch_size: BatchSize = 32,
    image_size: ImageSize = None,
    seed: Seed = 0,
    json: Json = None,
    html: Html = None,
) -> Report:
    """Export a model to ONNX or an artifact, checked.

    Its answers in the target's own runtime are compared with the original's; nothing is written if they differ.
    """
    from ..deploy import export as run
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
    report = run(opened.model, out, **opened.for_artifact())
    report.note(f"wrote {out}")
    return report
