"""Files of quantised programs: what is stored, and that nothing but bytes has changed."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from deepseek_r1.core import Int4Weight, Int8Static
from deepseek_r1.engines import to_onnx
from deepseek_r1.engines._onnx_compact import compact
from deepseek_r1.graph import capture, simplify
from deepseek_r1.quantization import PTQConfig
from deepseek_r1.quantization._ptq import quantize_program


def _model(scales: np.ndarray) -> onnx.ModelProto:
    """x @ (a stored matrix of 2 x n), whose scales are given."""
    weight = np.arange(2 * scales.size, dtype=np.int8).reshape(2, -1)
    nodes = [
        helper.make_node("DequantizeLinear", ["w", "s"], ["a_long_name"], axis=1),
        helper.make_node("MatMul", ["x", "a_long_name"], ["product"], name="node"),
        helper.make_node("Relu", ["product"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes, "g", [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 2])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, scales.size])],
        [numpy_helper.from_array(weight, "w"), numpy_helper.from_array(scales, "s")],
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def _run(model: onnx.ModelProto) -> np.ndarray:
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"x": np.array([[1.0, 2.0]], np.float32)})[0]


def test_scales_that_float16_has_are_stored_in_it() -> None:
    scales = np.linspace(0.001, 1, 64).astype(np.float16).astype(np.float32)
    model = _model(scales)
    before, size = _run(model), model.ByteSize()
    compact(model)
    onnx.checker.check_model(model, full_check=True)
    assert {i.name: i.data_type for i in model.graph.initializer} == {"w": TensorProto.INT8, "s_half": 10}
    assert [o.name for o in model.graph.output] == ["y"]
    assert model.ByteSize() < size - 64
    np.testing.assert_array_equal(_run(model), before)


def test_other_scales_stay() -> None:
    for scales in (np.full(64, 1 / 3, np.float32), np.full(64, 1e9, np.float32), np.ones(4, np.float32)):
        model = _model(scales)
        before = _run(model)
        compact(model)
        assert model.graph.initializer[1].data_type == TensorProto.FLOAT
        np.testing.assert_array_equal(_run(model), before)


def test_a_taken_name_is_not_given_twice() -> None:
    model = _model(np.ones(4, np.float32))
    model.graph.input[0].name = model.graph.node[1].input[0] = "a"
    compact(model)
    onnx.checker.check_model(model, full_check=True)
    assert len({n.output[0] for n in model.graph.node} | {"a", "w", "s"}) == len(model.graph.node) + 3


def test_quantised_networks_are_fused_as_before() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(128, 256), nn.GELU(), nn.Linear(256, 64)).eval()
    x = torch.randn(4, 128)
    for fmt, share in ((Int8Static(), 0.29), (Int4Weight(group_size=32), 0.17)):
        program = quantize_program(simplify(capture(net, (x,))), [(x,)] * 2, PTQConfig(format=fmt))
        model = to_onnx(program)
        assert {i.data_type for i in model.graph.initializer if len(i.dims) and i.name.endswith("half")} == {10}
        assert model.ByteSize() < share * 4 * sum(p.numel() for p in net.parameters())
        session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
        found = session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]
        with torch.no_grad():
            expected = program(x)
        assert float((torch.from_numpy(found) - expected).norm() / expected.norm()) < 0.02
