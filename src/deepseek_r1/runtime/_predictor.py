"""`load` and `Predictor`: an Artifact that answers."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ..core import InputError, Manifest, Registry, TensorSpec, open_artifact
from ._preprocessing import preprocess

Array = NDArray[Any]


class Session(Protocol):
    """What a runtime gives back for a model file."""

    def run(self, feeds: Mapping[str, Array]) -> list[Array]:
        """All outputs for named inputs."""


#: Runtimes by the engine name in the manifest; each is called with the model file's path and `threads=`.
RUNTIMES = Registry(
    "runtime",
    "deepseek_r1.runtimes",
    {
        "onnxruntime": "deepseek_r1.runtime._onnxruntime:OnnxSession",
        "openvino": "deepseek_r1.runtime._openvino:OpenVinoSession",
    },
)


class Predictor:
    """An opened artifact. Call it with model-ready arrays, or let `predict` prepare raw data."""

    def __init__(self, manifest: Manifest, session: Session) -> None:
        self.manifest = manifest
        self._session = session

    def __call__(self, *inputs: Any, **named: Any) -> Any:
        """Raw outputs for model-ready inputs: one array, or a tuple if the model has several outputs.

        Raises:
            InputError: too few or too many inputs, unknown names, or shapes the model does not take.
        """
        specs = self.manifest.inputs
        names = [s.name for s in specs]
        feeds = dict(zip(names, inputs))
        if len(inputs) > len(names) or set(named) - set(names) or set(named) & set(feeds):
            raise InputError(f"the model takes {names}; given {len(inputs)} by position and {sorted(named)} by name.")
        feeds.update(named)
        missing = [n for n in names if n not in feeds]
        if missing:
            raise InputError(f"the model's input {missing[0]!r} is missing; it takes {names}.")
        arrays = {s.name: _array(feeds[s.name], s) for s in specs}
        _check_shapes(arrays, specs)
        outputs = self._session.run(arrays)
        return outputs[0] if len(outputs) == 1 else tuple(outputs)

    def predict(self, raw: Any) -> Any:
        """Answers for raw data: class labels if the artifact has labels, else the first output.

        The artifact's preprocessing is applied to the first input.
        """
        output = self(preprocess(self.manifest.preprocessing, raw))
        scores = output[0] if isinstance(output, tuple) else output
        if self.manifest.labels is None:
            return scores
        return [self.manifest.labels[i] for i in np.argmax(scores, axis=-1).ravel()]


def _check_shapes(arrays: Mapping[str, Array], specs: Iterable[TensorSpec]) -> None:
    sizes: dict[str, int] = {}
    for spec in specs:
        given = arrays[spec.name].shape
        known = [
            sizes.setdefault(want, size) if isinstance(want, str) else want for want, size in zip(spec.shape, given)
        ]
        if len(given) != len(spec.shape) or list(given) != known:
            clash = {w: sizes[w] for w, size in zip(spec.shape, given) if isinstance(w, str) and sizes[w] != size}
            note = f", with {clash} from another input" if clash else ""
            raise InputError(f"input {spec.name!r} has shape {list(spec.shape)}{note}; given {list(given)}.")


def _array(value: Any, spec: TensorSpec) -> Array:
    try:
        return np.ascontiguousarray(np.asarray(value, dtype=spec.dtype))
    except (TypeError, ValueError) as e:
        raise InputError(f"input {spec.name!r} must be an array of {spec.dtype}, shape {list(spec.shape)}: {e}") from e


def load(path: str | os.PathLike[str], *, threads: int | None = None) -> Predictor:
    """Open an artifact for prediction; needs no torch.

    Raises:
        ArtifactError: the artifact is damaged, altered, or of a later version.
        PluginError: its engine is not known here.
    """
    artifact = open_artifact(path)
    make = RUNTIMES.get(artifact.manifest.engine)
    return Predictor(artifact.manifest, make(artifact.model_path, threads=threads))
