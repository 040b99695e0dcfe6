"""`deepseek-r1 optimize`: the fastest executable that is right, as an artifact."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..core import Report
from ._frame import Html, Json, verb, with_sections
from ._options import opens_model

if TYPE_CHECKING:
    from ._inputs import Opened


@verb(with_sections, endings=(".onnx", ""))
@opens_model(batch_size=32)
def optimize(
    opened: Opened,
    out: Annotated[Path, typer.Option(help="Folder for the artifact of the winner.")],
    accuracy_drop: Annotated[
        float | None, typer.Option(help="Largest loss of accuracy; 0.005 is half a point.")
    ] = None,
    latency_ms: Annotated[float | None, typer.Option(help="Longest median time of a call.")] = None,
    size_mb: Annotated[float | None, typer.Option(help="Largest size of the weights.")] = None,
    memory_gb: Annotated[float | None, typer.Option(help="Largest peak memory.")] = None,
    no_cache: Annotated[bool, typer.Option("--no-cache", help="Race anew, and remember nothing.")] = False,
    json: Json = None,
    html: Html = None,
) -> Report:
    """Race an artifact's engine against eager PyTorch and keep the fastest that is right.

    The winner is written to --out as an artifact. A .dr1 file of `quantize` races with its float parent.
    """
    from ..core import Budget
    from ..deploy import ARTIFACT_ENGINE, export
    from ..engines import RaceConfig
    from ..engines import optimize as run

    budget = Budget(accuracy_drop=accuracy_drop, latency_ms=latency_ms, size_mb=size_mb, memory_gb=memory_gb)
    # The winner is chosen on the validation part: the test part is for the last measurement only.
    choose = opened.part("val", "train")
    race = RaceConfig(cache=not no_cache)
    # What is written runs on the artifact's engine, so that is what races against eager PyTorch.
    executable = run(
        opened.model,
        example_inputs=opened.example_inputs,
        dataset=choose,
        budget=budget,
        engines=[ARTIFACT_ENGINE],
        race=race,
    )
    report = executable.report
    report.sections.append(export(executable, out, **opened.for_artifact()))
    report.note(f"wrote {out}: {executable.precision} on {executable.engine}")
    return report
