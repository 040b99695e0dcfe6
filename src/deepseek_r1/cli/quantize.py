"""`deepseek-r1 quantize`: a model to fewer bits after training."""

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
    bits: Annotated[int | None, typer.Option(help="Width of the stored numbers, 8 or 4; 8 without a budget.")] = None,
    auto: Annotated[bool, typer.Option("--auto", help="Choose a format for each layer, as a budget does.")] = False,
    accuracy_drop: Annotated[
        float | None, typer.Option(help="Largest loss of accuracy; 0.005 is half a point.")
    ] = None,
    latency_ms: Annotated[float | None, typer.Option(help="Longest median time of a call.")] = None,
    size_mb: Annotated[float | None, typer.Option(help="Largest size of the weights.")] = None,
    engine: Annotated[str, typer.Option(help="What a budget's latency is measured on.")] = "onnxruntime",
    batch_size: BatchSize = 32,
    image_size: ImageSize = None,
    seed: Seed = 0,
    json: Json = None,
    html: Html = None,
) -> Report:
    """Quantise a model after training: to 8 or 4 bits, or each layer as a budget allows.

    8 bits are those of weights and activations, 4 bits those of the weights of linear layers. With a budget, or with
    --auto, each layer gets the format that suits it: latency is measured, accuracy is judged on the validation part.
    The training part of the data calibrates.
    """
    from ..core import Budget, ConfigError
    from ..quantization import AutoConfig, AutoQuantizer
    from ..quantization import quantize as run
    from ._inputs import open_inputs
    from ._results import write_program

    budget = Budget(accuracy_drop=accuracy_drop, latency_ms=latency_ms, size_mb=size_mb)
    chooses = auto or bool(budget.limits())
    if chooses and bits is not None:
        raise ConfigError(f"--bits {bits} and a budget were given; a budget chooses the bits itself. Leave one out.")
    opened = open_inputs(model, weights=weights, data=data, batch_size=batch_size, image_size=image_size, seed=seed)
    data_part = opened.part("train")
    assert data_part is not None, "the option is needed"
    if chooses:
        config = AutoConfig(engine=engine)
        dataset = opened.then_unseen(config.calibration_batches)
        quantizer = AutoQuantizer(opened.model, dataset=dataset, config=config)
        program = quantizer.quantize(budget=budget)
    else:
        program = run(opened.model, bits, dataset=data_part)
    return write_program(program, out, opened, data)
