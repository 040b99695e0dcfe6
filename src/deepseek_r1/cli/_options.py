"""Options that several verbs take, as types for typer, and what opens a model from them. Imports nothing heavy."""

from __future__ import annotations

import functools
import inspect
import typing
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..core import Report
from ._frame import Seed

if TYPE_CHECKING:
    from ._inputs import Opened

Model = Annotated[
    str,
    typer.Argument(
        help="file.py:factory, an .onnx, .pt2, .dr1, .keras or .h5 file, an artifact, a SavedModel, or a name such as "
        "gpt2 or org/name."
    ),
]
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


def opens_model(*, batch_size: int) -> Callable[[Callable[..., Report]], Callable[..., Report]]:
    """Give a verb the options that name a model, its weights and what feeds it; it gets them `Opened`.

    Args:
        batch_size: samples in a batch where the user says nothing.

    The verb takes `opened` first, then its own options; those that are needed come right behind the model in the help.
    """

    def decorate(function: Callable[..., Report]) -> Callable[..., Report]:
        def before(
            model: Model, weights: Weights = None, data: Data = None, input_shape: InputShape = None,
            input_dtype: InputDtype = None,
        ) -> None: ...  # fmt: skip
        def behind(batch_size: BatchSize = batch_size, image_size: ImageSize = None, seed: Seed = 0) -> None: ...

        own = _options(function)[1:]
        needed = [p for p in own if p.default is p.empty]
        rest = [p for p in own if p not in needed]
        (model, *feeding), last = _options(before), _options(behind)
        parameters = [model, *needed, *feeding, *rest, *last]
        shared = {p.name for p in (model, *feeding, *last)}

        @functools.wraps(function)
        def command(**given: Any) -> Report:
            from ._inputs import needs_inputs, open_inputs

            opened: Opened = open_inputs(**{name: given.pop(name) for name in shared})
            needs_inputs(opened)
            return function(opened, **given)

        command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        command.__annotations__ = {p.name: p.annotation for p in parameters}
        return command

    return decorate


def _options(function: Callable[..., Any]) -> list[inspect.Parameter]:
    # `Opened` lies where torch does, which a verb imports only when it runs.
    names = {**globals(), "Opened": Any, **function.__globals__}
    hints = typing.get_type_hints(function, names, include_extras=True)
    parameters = inspect.signature(function).parameters.values()
    return [p.replace(annotation=hints[p.name], kind=p.KEYWORD_ONLY) for p in parameters]
