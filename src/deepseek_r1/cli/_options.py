"""Options that several verbs take, as types for typer. Imports nothing heavy."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Model = Annotated[str, typer.Argument(help="file.py:factory, an .onnx, .pt2 or .dr1 file, or an artifact's folder.")]
Data = Annotated[
    str | None,
    typer.Option(help="Folder of images by class, .npz, .csv, .jsonl, file.py:loader, or the word digits."),
]
NeededData = Annotated[
    str, typer.Option(help="Folder of images by class, .npz, .csv, .jsonl, file.py:loader, or the word digits.")
]
Weights = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Weights to put into the model: .safetensors, or .pt / .pth.")
]
BatchSize = Annotated[int, typer.Option(min=1, help="Samples in a batch.")]
ImageSize = Annotated[
    str | None, typer.Option(metavar="HxW", help="Size to resize images to, like 224x224 (height x width).")
]
InputShape = Annotated[
    list[str] | None,
    typer.Option(metavar="SHAPE", help="Shape of an input with its batch, like 1,3,224,224, where there is no --data."),
]
InputDtype = Annotated[
    list[str] | None, typer.Option(metavar="DTYPE", help="Dtype of that input, like int64; float32 by default.")
]
