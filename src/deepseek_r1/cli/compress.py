"""`deepseek-r1 compress`: channels and formats of a model chosen together under a budget."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..core import Report
from ._frame import Html, Json, Seed, verb, with_sections
from ._options import BatchSize, ImageSize, Model, NeededData, Weights


@verb(with_sections, endings=(".dr1", ".onnx", ""))
def compress(
    model: Model,
    data: NeededData,
    out: Annotated[Path, typer.Option(help="A .dr1 file for the next step, an .onnx file, or an artifact's folder.")],
    weights: Weights = None,
    accuracy_drop: Annotated[
        float | None, typer.Option(help="Largest loss of accuracy; 0.005 is half a point.")
    ] = None,
    latency_ms: Annotated[float | None, typer.Option(help="Longest median time of a call on the engine.")] = None,
    size_mb: Annotated[float | None, typer.Option(help="Largest size of the weights.")] = None,
    engine: Annotated[str, typer.Option(help="What latency is measured on.")] = "onnxruntime",
    epochs: Annotated[int, typer.Option(min=0, help="Epochs of training behind each cut; 0: none.")] = 3,
    lr: Annotated[float, typer.Option(help="Highest learning rate of that training.")] = 1e-3,
    candidates: Annotated[int, typer.Option(help="Cut models that are trained and measured, at most.")] = 3,
    batch_size: BatchSize = 32,
    image_size: ImageSize = None,
    seed: Seed = 0,
    json: Json = None,
    html: Html = None,
) -> Report:
    """Prune and quantise together: how many channels to keep and which format each layer has, under one budget.

    The training part of the data calibrates, and trains what is left; the validation part judges. The result is what
    quantisation reaches alone, unless a model with fewer channels is surely better or alone keeps the budget.
    """
    from ..compression import CompressionConfig, Compressor
    from ..core import Budget, InputError
    from ..graph import Program
    from ..quantization import AutoConfig
    from ._inputs import open_inputs
    from ._results import write_program

    opened = open_inputs(model, weights=weights, data=data, batch_size=batch_size, image_size=image_size, seed=seed)
    if isinstance(opened.model, Program):
        raise InputError("a captured graph cannot be pruned; give file.py:factory or an .onnx file, or use quantize.")
    config = CompressionConfig(candidates=candidates, formats=AutoConfig(engine=engine))
    train = opened.part("train")
    dataset = opened.then_unseen(config.formats.calibration_batches)
    compressor = Compressor(opened.model, dataset=dataset, config=config)
    budget = Budget(accuracy_drop=accuracy_drop, latency_ms=latency_ms, size_mb=size_mb)
    program = compressor.compress(budget, train if epochs else None, epochs=max(epochs, 1), lr=lr)
    return write_program(program, out, opened, data)
