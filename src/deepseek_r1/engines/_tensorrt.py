"""TensorRT as an engine, for programs on a CUDA device: through ONNX, strongly typed, one profile of sizes.

Written from the documentation of TensorRT 10 and 11; this project's tests have not run it on a device.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.utils._pytree as pytree

from ..core import QUANTISED, UnsupportedOpError
from ..graph import Program
from ._bounds import beyond, limits
from ._cast import cannot_cast, cast
from ._onnx import needs_external_data, to_onnx
from ._refusals import changes_state, devices, eager_where
from .base import Engine, Runner

_PLAN, _ABOUT = "model.plan", "about.json"


class TensorRtEngine(Engine):
    """Builds a TensorRT plan, which holds for the kind of GPU and the version of TensorRT that built it."""

    name = "tensorrt"

    def unavailable(self) -> str:
        """Needs the package and a CUDA device."""
        if not find_spec("tensorrt"):
            return "tensorrt is not installed: pip install tensorrt"
        return "" if torch.cuda.is_available() else "PyTorch sees no CUDA device"

    def unsupported(self, program: Program) -> str:
        """Float programs with all tensors on CUDA, and no state."""
        others = sorted(devices(program) - {"cuda"})
        if others:
            return f"its tensors are on {', '.join(others)}; this engine runs on CUDA"
        if program.precision in QUANTISED:
            return "TensorRT takes symmetric activations only, and this program's are affine"
        if needs_external_data(program):
            return "its weights are more than one ONNX file can hold"
        return changes_state(program)

    def precisions(self, program: Program) -> list[str]:
        """fp16 beside fp32."""
        return [program.precision, *([] if cannot_cast(program) else ["fp16"])]

    def build(self, program: Program, folder: Path, precision: str) -> None:
        """Build a plan from the ONNX export; types are those of the export."""
        import tensorrt as trt

        model = to_onnx(program if precision == program.precision else cast(program, precision))
        names = [i.name for i in model.graph.input]
        positions = [program.input_names().index(name) for name in names]
        logger = trt.Logger(trt.Logger.ERROR)
        builder = trt.Builder(logger)
        # From version 11 on every network is strongly typed and the flag may be gone.
        strong = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
        network = builder.create_network(0 if strong is None else 1 << int(strong))
        parser = trt.OnnxParser(network, logger)
        if not parser.parse(model.SerializeToString()):
            errors = "; ".join(str(parser.get_error(i)) for i in range(parser.num_errors))
            raise UnsupportedOpError(f"TensorRT cannot read {program.name!r}: {errors[:500]}")
        config = builder.create_builder_config()
        # Products in TF32 would not be what float32 means elsewhere in this package.
        config.clear_flag(trt.BuilderFlag.TF32)
        bounds = limits(program)
        config.add_optimization_profile(_profile(builder, program, names, positions))
        plan = builder.build_serialized_network(network, config)
        if plan is None:
            raise UnsupportedOpError(f"TensorRT could not build a plan for {program.name!r}; its log says why.")
        (folder / _PLAN).write_bytes(bytes(plan))
        about = {"inputs": dict(zip(names, positions)), "outputs": [o.name for o in model.graph.output]}
        (folder / _ABOUT).write_text(json.dumps({**about, "limits": bounds}))

    def open(self, folder: Path, program: Callable[[], Program]) -> Runner:
        """Deserialise the plan on the current device."""
        about = json.loads((folder / _ABOUT).read_text())
        runner = _plan_runner((folder / _PLAN).read_bytes(), about["inputs"], about["outputs"])
        return eager_where(beyond(about["limits"]), runner, program)


def _profile(builder: Any, program: Program, names: list[str], positions: list[int]) -> Any:
    """Least, likely and largest shape of each input: 1, the example's, the bound, for each dynamic size."""
    leaves = pytree.tree_leaves(program.example_inputs)
    largest = {(number, axis): most for number, axis, most in limits(program)}
    profile = builder.create_optimization_profile()
    for name, number in zip(names, positions, strict=True):
        likely = tuple(leaves[number].shape)
        free = [(number, axis) in largest for axis in range(len(likely))]
        least = tuple(1 if varies else size for size, varies in zip(likely, free))
        most = tuple(largest.get((number, axis), size) for axis, size in enumerate(likely))
        profile.set_shape(name, least, likely, most)
    return profile


def _plan_runner(plan: bytes, inputs: dict[str, int], outputs: list[str]) -> Runner:
    import tensorrt as trt

    runtime = trt.Runtime(trt.Logger(trt.Logger.ERROR))
    engine = runtime.deserialize_cuda_engine(plan)
    if engine is None:
        raise UnsupportedOpError("the plan is not for this GPU or this version of TensorRT; build it again.")
    context = engine.create_execution_context()
    types = {
        trt.DataType.FLOAT: torch.float32, trt.DataType.HALF: torch.float16, trt.DataType.BF16: torch.bfloat16,
        trt.DataType.INT64: torch.int64, trt.DataType.INT32: torch.int32, trt.DataType.INT8: torch.int8,
        trt.DataType.UINT8: torch.uint8, trt.DataType.BOOL: torch.bool,
    }  # fmt: skip
    busy = threading.Lock()

    def run(leaves: Sequence[Any]) -> list[torch.Tensor]:
        feeds = {name: leaves[number].detach().contiguous() for name, number in inputs.items()}
        device = next(iter(feeds.values())).device
        # A context holds the shapes and buffers of one call.
        with busy, torch.cuda.device(device):
            for name, value in feeds.items():
                context.set_input_shape(name, tuple(value.shape))
                context.set_tensor_address(name, value.data_ptr())
            answers = []
            for name in outputs:
                shape = tuple(context.get_tensor_shape(name))
                answers.append(torch.empty(shape, dtype=types[engine.get_tensor_dtype(name)], device=device))
                context.set_tensor_address(name, answers[-1].data_ptr())
            stream = torch.cuda.current_stream()
            if not context.execute_async_v3(stream.cuda_stream):
                raise RuntimeError("TensorRT refused to run; its log says why")
            # The next call, perhaps of another thread and stream, uses the same buffers.
            stream.synchronize()
        return answers

    return run
