"""The target `artifact`: a directory that `runtime.load` opens without torch."""

from __future__ import annotations

import tempfile
from pathlib import Path

from ..core import ArtifactError, Manifest, Report, probe, write_artifact
from ..runtime import load
from ._export import versions
from ._onnx import check_model, specs, write_model
from .base import Job

MODEL_FILE = "model.onnx"
#: The engine, and the runtime, that an artifact is opened with.
ARTIFACT_ENGINE = "onnxruntime"


class ArtifactTarget:
    """Writes an Artifact whose model file ONNX Runtime opens."""

    name = "artifact"

    def write(self, job: Job, report: Report) -> None:
        """Write and check the model file, then the directory around it; open the result once."""
        if job.path.is_file():
            raise ArtifactError(f"{job.path} is a file; an Artifact is a directory. Give another path.")
        with tempfile.TemporaryDirectory(prefix="deepseek-r1-") as folder:
            model = Path(folder) / MODEL_FILE
            write_model(job.program, model, job.precision)
            check_model(job, model, report)
            inputs, outputs = specs(model)
            manifest = Manifest(
                name=job.name,
                engine=ARTIFACT_ENGINE,
                precision=job.precision,
                model_file=MODEL_FILE,
                inputs=inputs,
                outputs=outputs,
                labels=job.labels,
                preprocessing=job.preprocessing,
                hardware=probe().to_dict(),
                versions=versions(),
                extra=job.extra,
            )
            artifact = write_artifact(job.path, manifest, [model], report)
        load(job.path)
        report.add("artifact size", artifact.size_bytes, unit="bytes", how="all files of the directory")
