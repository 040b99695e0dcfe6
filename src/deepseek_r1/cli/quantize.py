"""`deepseek-r1 quantize`: a model to 8 or 4 bits after training."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..core import Report
from ._frame import Html, Json, Seed, verb, with_sections
from ._options import BatchSize, ImageSize, Model, NeededData, Weights


@verb(with_sections, endings=(".dr1", ".onnx", ""))
def quantize(
    model: Model,
    data: NeededData,
    out: Annotated[Path, typer.Option(help="A .dr1 file for the next step, an .onnx file, or an artifact's folder.")],
    weights: Weights = None,
    bits: Annotated[int, typer.Option(help="Width of the stored numbers: 8 or 4.")] = 8,
    batch_size: BatchSize = 32,
    image_size: ImageSize = None,
    seed: Seed = 0,
    json: Json = None,
    html: Html = None,
) -> Report:
    """Quantise a model to 8 or 4 bits after training.

    8 bits are those of weights and activations, 4 bits those of the weights of linear layers. The training part of the
    data calibrates.
    """
    from ..deploy import export
    from ..quantization import quantize as run
    from ._inputs import open_inputs

    opened = open_inputs(model, weights=weights, data=data, batch_size=batch_size, image_size=image_size, seed=seed)
    data_part = opened.part("train")
    assert data_part is not None, "the option is needed"
    program = run(opened.model, bits, dataset=data_part)
    report = program.report
    if out.suffix == ".dr1":
        program.save(out)
        report.note(f"wrote {out}; next: deepseek-r1 optimize {out} --data {data} --out DIR")
        return report
    report.sections.append(export(program, out, **opened.for_artifact()))
    report.note(f"wrote {out}")
    return report
