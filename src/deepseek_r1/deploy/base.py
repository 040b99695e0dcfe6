"""What a deployment target is, and the registry of targets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from ..core import Registry, Report
from ..graph import Program


@dataclass(frozen=True, kw_only=True)
class Job:
    """One export.

    Attributes:
        precision: what the files compute in: the program's own, or another one that an engine was chosen with.
        batches: (flat inputs, labels or None) on which the files are checked; the first are the example inputs.
        labels: class names, or None.
        preprocessing: steps from raw data to model input, see `runtime.preprocess`.
        extra: further entries for an Artifact's manifest.
    """

    program: Program
    precision: str
    path: Path
    name: str
    batches: list[tuple[list[Any], Any]]
    labels: tuple[str, ...] | None
    preprocessing: tuple[Mapping[str, Any], ...]
    extra: Mapping[str, Any]


class Target(Protocol):
    """Writes the files of one target."""

    name: str

    def write(self, job: Job, report: Report) -> None:
        """Write, check in the target's runtime, keep only if right.

        Raises:
            CheckFailedError: the files give other answers than the program; nothing was kept.
        """


#: Targets by name; `get` gives a class that is called without arguments.
TARGETS = Registry(
    "deployment target",
    "deepseek_r1.targets",
    {"onnx": "deepseek_r1.deploy._onnx:OnnxTarget", "artifact": "deepseek_r1.deploy._artifact:ArtifactTarget"},
)
