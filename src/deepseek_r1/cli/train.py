"""`deepseek-r1 train`: a model on data, with checkpoints, weights and a report."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..core import Report
from ._frame import Html, Json, Seed, verb, with_sections
from ._options import BatchSize, ImageSize, NeededData, Weights


@verb(show=with_sections)
def train(
    model: Annotated[str, typer.Argument(help="file.py:factory, or an .onnx file.")],
    data: NeededData,
    out: Annotated[Path, typer.Option(help="Folder for checkpoints, weights and report.")] = Path("runs/train"),
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the training part, all resumed ones counted.")] = 5,
    lr: Annotated[float, typer.Option(help="Learning rate.")] = 1e-3,
    batch_size: BatchSize = 32,
    micro_batch_size: Annotated[int | None, typer.Option(help="Samples in one forward and backward pass.")] = None,
    gradient_accumulation_steps: Annotated[int, typer.Option(help="Batches for one optimizer step.")] = 1,
    precision: Annotated[str, typer.Option(help="auto, fp32, bf16 or fp16.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    weights: Weights = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint in --out.")] = False,
    export: Annotated[bool, typer.Option("--export", help="Also write model.onnx, checked.")] = False,
    image_size: ImageSize = None,
    seed: Seed = 0,
    json: Json = None,
    html: Html = None,
) -> Report:
    """Train a model and measure it on the test part.

    Writes weights, checkpoints and a report to --out.
    """
    from ._train import train_model

    return train_model(
        model,
        data,
        out=out,
        epochs=epochs,
        lr=lr,
        batch_size=batch_size,
        settings={
            "micro_batch_size": micro_batch_size,
            "gradient_accumulation_steps": gradient_accumulation_steps,
            "precision": precision,
            "device": device,
            "seed": seed,
        },
        weights=weights,
        resume=resume,
        export=export,
        image_size=image_size,
    )
