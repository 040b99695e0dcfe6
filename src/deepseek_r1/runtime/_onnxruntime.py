"""An ONNX file as a callable on numpy arrays. The one place that sets ONNX Runtime's session options."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from ..core import ArtifactError, InputError
from ._empty import run_empty

Array = NDArray[Any]


class OnnxSession:
    """A model file opened by ONNX Runtime on the CPU.

    Args:
        model: path of the file, or its bytes.
        threads: threads inside one operator; None leaves the choice to ONNX Runtime.
        write_optimised: where to write the graph as ONNX Runtime runs it, for looking at it.
        profile: start of the name of a file that `end_profile` writes, with the time of each operator.
    """

    def __init__(
        self,
        model: str | os.PathLike[str] | bytes,
        *,
        threads: int | None = None,
        write_optimised: str | os.PathLike[str] | None = None,
        profile: str | os.PathLike[str] | None = None,
    ) -> None:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        if threads is not None:
            options.intra_op_num_threads = threads
        if write_optimised is not None:
            options.optimized_model_filepath = os.fspath(write_optimised)
        if profile is not None:
            options.enable_profiling = True
            options.profile_file_prefix = os.fspath(profile)
        source = model if isinstance(model, bytes) else os.fspath(model)
        try:
            self._session = onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
        except Exception as e:  # onnxruntime raises a dozen unrelated classes here
            where = "the model" if isinstance(model, bytes) else str(source)
            raise ArtifactError(f"{where} could not be opened by ONNX Runtime: {e}") from e
        self.input_names = [i.name for i in self._session.get_inputs()]
        self.output_names = [o.name for o in self._session.get_outputs()]
        self._types = {i.name: i.type for i in self._session.get_inputs()}
        # Which inputs and outputs have a batch of any size first.
        self._batch = {
            i.name: i.shape[0] for i in self._session.get_inputs() if i.shape and isinstance(i.shape[0], str)
        }
        self._batched = [bool(o.shape) and o.shape[0] in self._batch.values() for o in self._session.get_outputs()]

    def end_profile(self) -> str:
        """Write what was profiled; returns the file's path."""
        path: str = self._session.end_profiling()
        return path

    def run(self, feeds: Mapping[str, Array]) -> list[Array]:
        """All outputs for named inputs.

        Raises:
            InputError: wrong names, types or shapes.
        """
        if any(v.size == 0 for v in feeds.values()):
            return run_empty(self.run, feeds, self._batch, self._batched)
        try:
            outputs: list[Array] = self._session.run(self.output_names, dict(feeds))
        except Exception as e:  # as above
            given = {k: (v.dtype.name, v.shape) for k, v in feeds.items() if isinstance(v, np.ndarray)}
            raise InputError(f"the model takes {self._types}; given: {given}. ONNX Runtime says: {e}") from e
        return outputs
