"""`deepseek-r1 prune`: channels, heads and hidden units out of a model, by how little they matter."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..core import Report
from ._frame import Html, Json, verb, with_sections
from ._options import opens_model

if TYPE_CHECKING:
    from ._inputs import Opened


@verb(with_sections, endings=(".safetensors", ".dr1", ".onnx", ""))
@opens_model(batch_size=32)
def prune(
    opened: Opened,
    out: Annotated[Path, typer.Option(help="Weights (.safetensors), a .dr1 or .onnx file, or an artifact's folder.")],
    sparsity: Annotated[float | None, typer.Option(help="Share of the parameters to remove, such as 0.3.")] = None,
    size_mb: Annotated[float | None, typer.Option(help="Largest size of the weights.")] = None,
    latency_ms: Annotated[float | None, typer.Option(help="Longest median time of a call, eager.")] = None,
    accuracy_drop: Annotated[
        float | None, typer.Option(help="Largest loss of accuracy on the validation part.")
    ] = None,
    epochs: Annotated[int, typer.Option(min=0, help="Epochs of training that recover accuracy; 0: none.")] = 3,
    lr: Annotated[float, typer.Option(help="Highest learning rate of that training.")] = 1e-3,
    json: Json = None,
    html: Html = None,
) -> Report:
    """Remove the channels, heads and hidden units that matter least.

    Data judge what matters and train what is left; without them the size of the weights judges. Weights written to a
    .safetensors file say how the model was cut: give them to any command with --weights.
    """
    from ..core import Budget, InputError
    from ..data import unpack_batch
    from ..deploy import export
    from ..graph import Program, capture
    from ..pruning import R1Pruner, save_pruned

    if isinstance(opened.model, Program):
        raise InputError("a captured graph cannot be pruned; give file.py:factory or an .onnx file.")
    budget = Budget(size_mb=size_mb, latency_ms=latency_ms, accuracy_drop=accuracy_drop)
    train = opened.part("train")
    pruner = R1Pruner(opened.model, sparsity, budget=budget, dataset=train, example_inputs=opened.example_inputs)
    if epochs and train is not None:
        small = pruner.compress(train, opened.part("val"), epochs=epochs, lr=lr)
    else:
        small = pruner.compress(val_loader=opened.part("val"))
    report: Report = small.pruning  # type: ignore[assignment]
    if out.suffix == ".safetensors":
        save_pruned(small, out)
        report.note(f"wrote {out}; give it to the next command with --weights {out}")
    elif out.suffix == ".dr1":
        examples: Any = opened.example_inputs
        if train is not None:
            args, kwargs, _ = unpack_batch(next(iter(train)))
            examples = kwargs or args
        capture(small.eval(), examples).save(out)
        report.note(f"wrote {out}; next: deepseek-r1 quantize {out}, or optimize {out}")
    else:
        report.sections.append(export(small.eval(), out, **opened.for_artifact()))
        report.note(f"wrote {out}")
    return report
