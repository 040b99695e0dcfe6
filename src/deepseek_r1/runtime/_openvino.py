"""An OpenVINO model as a callable on numpy arrays. The one place that sets OpenVINO's options."""

from __future__ import annotations

import os
import queue
import sys
from collections.abc import Mapping
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..core import ArtifactError, InputError
from ..core.errors import missing_extra
from ._empty import run_empty

Array = NDArray[Any]
#: Kinds of layers that carry the weight of a network, in the words of OpenVINO's compiled graph.
_PRODUCTS = ("Convolution", "FullyConnected", "MatMul", "Deconvolution")


def load_openvino() -> Any:
    """The package `openvino`, imported now if it was not yet.

    Its import would send a usage report to its maker unless the user opted out; here it is imported without the module
    that does. It also starts threads, so it waits until a model is opened.

    Raises:
        MissingExtraError: it is not installed.
    """
    reports = "openvino_telemetry"
    block = "openvino" not in sys.modules and reports not in sys.modules
    if block:
        sys.modules[reports] = None  # type: ignore[assignment]
    try:
        import openvino
    except ImportError as e:
        raise missing_extra("a model in OpenVINO's form", "openvino", "openvino") from e
    finally:
        if block:
            del sys.modules[reports]
    return openvino


@cache
def _core() -> Any:
    return load_openvino().Core()


class OpenVinoSession:
    """A model file (`.xml` with its `.bin`, or `.onnx`) opened by OpenVINO on the CPU. Several threads may call it.

    Args:
        model: path of the file.
        threads: threads of one inference; None leaves the choice to OpenVINO.
        precision: "fp32" or "bf16": what float layers compute in. Quantised layers compute in integers either way.

    Raises:
        MissingExtraError: openvino is not installed.
        ArtifactError: the file is no model, or not for this OpenVINO.
    """

    def __init__(self, model: str | os.PathLike[str], *, threads: int | None = None, precision: str = "fp32") -> None:
        # Without the hint OpenVINO chooses bfloat16 by itself where the CPU has it.
        options: dict[str, Any] = {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": {"fp32": "f32", "bf16": "bf16"}[precision],
        }
        if threads is not None:
            options["INFERENCE_NUM_THREADS"] = threads
        core = _core()
        try:
            self._compiled = core.compile_model(os.fspath(model), "CPU", options)
        except Exception as e:  # openvino raises plain RuntimeError here
            raise ArtifactError(f"{os.fspath(model)} could not be opened by OpenVINO: {e}") from e
        inputs, outputs = self._compiled.inputs, self._compiled.outputs
        self.input_names: list[str] = [i.get_any_name() for i in inputs]
        self.output_names: list[str] = [o.get_any_name() for o in outputs]
        self._types = {n: i.get_element_type().to_dtype() for n, i in zip(self.input_names, inputs)}
        self._batch = {n for n, i in zip(self.input_names, inputs) if _varies(i.get_partial_shape())}
        self._batched = [_varies(o.get_partial_shape()) for o in outputs]
        # A request holds the buffers of one inference; there are as many as there were calls at a time.
        self._idle: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def run(self, feeds: Mapping[str, Array]) -> list[Array]:
        """All outputs for named inputs.

        Raises:
            InputError: wrong names, types or shapes.
        """
        if misfit := self._misfit(feeds):
            raise InputError(misfit)
        if any(v.size == 0 for v in feeds.values()):
            return run_empty(self.run, feeds, self._batch, self._batched)
        try:
            request = self._idle.get_nowait()
        except queue.Empty:
            request = self._compiled.create_infer_request()
        try:
            # Inputs are read where they are; outputs are copied, because the next call writes over them.
            found = request.infer([feeds[n] for n in self.input_names], share_inputs=True, share_outputs=False)
            return [found[i] for i in range(len(self.output_names))]
        except Exception as e:  # as above
            given = {k: (v.dtype.name, v.shape) for k, v in feeds.items()}
            raise InputError(f"the model takes {self._types}; given: {given}. OpenVINO says: {e}") from e
        finally:
            self._idle.put(request)

    def _misfit(self, feeds: Mapping[str, Array]) -> str:
        # OpenVINO converts types silently.
        given = {k: str(getattr(v, "dtype", type(v).__name__)) for k, v in feeds.items()}
        wanted = {k: str(np.dtype(v)) for k, v in self._types.items()}
        return "" if given == wanted else f"the model takes {wanted}; given {given}."

    def layers(self) -> list[tuple[str, str]]:
        """(kind, precision) of each product and convolution of the compiled graph, as `("Convolution", "u8")`."""
        infos = [op.get_rt_info() for op in self._compiled.get_runtime_model().get_ops()]
        found = [(str(i["layerType"].astype(str)), str(i["runtimePrecision"].astype(str))) for i in infos]
        return [pair for pair in found if pair[0] in _PRODUCTS]


def _varies(shape: Any) -> bool:
    return bool(shape.rank.is_static and shape.rank.get_length() and shape[0].is_dynamic)
