"""Attention's keys reach their product by one Transpose, and nothing else is taken for one."""

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper
from torch import nn

from deepseek_r1.engines import to_onnx
from deepseek_r1.engines._onnx_transposes import join_transposes, ranks_of
from deepseek_r1.engines._onnx_unused import drop_unused
from deepseek_r1.graph import capture


def answer(model, **inputs):
    onnx.checker.check_model(model)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, inputs)


def swap(order=("first", "last", "second"), shape=("batch", 3, "length", 4), perm=(0, 2, 1), start=-2, twice=False):
    """What the exporter writes for `x.transpose(-2, -1)`, or something near it."""
    ints = {"minus": [-1], "zero": [0], "two": [start], "one": [-1], "end": [2**63 - 1]}
    nodes = [
        helper.make_node("Shape", ["x"], ["sizes"], start=0),
        helper.make_node("Slice", ["sizes", "one", "end"], ["last"]),
        helper.make_node("Slice", ["sizes", "two", "one"], ["second"]),
        helper.make_node("Slice", ["sizes", "zero", "two"], ["first"]),
        helper.make_node("Concat", ["minus", "second", "last"], ["there"], axis=0),
        helper.make_node("Reshape", ["x", "there"], ["flat"]),
        helper.make_node("Transpose", ["flat"], ["turned"], perm=perm),
        helper.make_node("Concat", list(order), ["back"], axis=0),
        helper.make_node("Reshape", ["turned", "back"], ["y"]),
    ]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, [None] * len(shape))]
    if twice:
        outputs.append(helper.make_tensor_value_info("turned", TensorProto.FLOAT, [None] * 3))
    graph = helper.make_graph(
        nodes, "swap", [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)], outputs,
        [helper.make_tensor(name, TensorProto.INT64, [1], value) for name, value in ints.items()],
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


@pytest.mark.parametrize("shape", [("batch", "length", 4), ("batch", 3, "length", 4), (2, "a", "b", 5, 4)])
def test_a_swap_becomes_one_transpose(shape):
    model = swap(shape=shape)
    x = np.random.default_rng(0).normal(size=[n if isinstance(n, int) else 6 for n in shape]).astype(np.float32)
    (before,) = answer(model, x=x)
    assert join_transposes(model, ranks_of(model)) == 1
    assert [n.op_type for n in model.graph.node] == ["Transpose"]
    assert not model.graph.initializer
    (after,) = answer(model, x=x)
    assert np.array_equal(after, before)
    assert np.array_equal(after, x.swapaxes(-2, -1))


@pytest.mark.parametrize(
    "near",
    [
        {"order": ("first", "second", "last")},
        {"order": ("first", "last", "last")},
        {"order": ("last", "first", "second")},
        {"perm": (1, 2, 0)},
        {"start": -3},
        {"twice": True},
    ],
)
def test_what_is_nearly_a_swap_stays(near):
    model = swap(**near)
    before = model.SerializeToString()
    assert join_transposes(model, ranks_of(model)) == 0
    assert model.SerializeToString() == before


def test_a_value_of_unknown_rank_stays():
    model = swap()
    assert join_transposes(model, {}) == 0
    assert join_transposes(model, {"x": 2}) == 0


def test_what_only_a_branch_reads_is_kept():
    inner = helper.make_graph(
        [helper.make_node("Add", ["outside", "constant"], ["sum"])], "then", [],
        [helper.make_tensor_value_info("sum", TensorProto.FLOAT, [2])],
    )  # fmt: skip
    other = helper.make_graph(
        [helper.make_node("Identity", ["x"], ["same"])], "else", [],
        [helper.make_tensor_value_info("same", TensorProto.FLOAT, [2])],
    )  # fmt: skip
    graph = helper.make_graph(
        [
            helper.make_node("Neg", ["x"], ["outside"]),
            helper.make_node("Exp", ["x"], ["nobody"]),
            helper.make_node("If", ["yes"], ["y"], then_branch=inner, else_branch=other),
        ],
        "branches",
        [
            helper.make_tensor_value_info("x", TensorProto.FLOAT, [2]),
            helper.make_tensor_value_info("yes", TensorProto.BOOL, []),
        ],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [2])],
        [helper.make_tensor(name, TensorProto.FLOAT, [2], [1.0, 2.0]) for name in ("constant", "unread")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    drop_unused(model)
    assert [n.op_type for n in model.graph.node] == ["Neg", "If"]
    assert [i.name for i in model.graph.initializer] == ["constant"]
    (y,) = answer(model, x=np.ones(2, np.float32), yes=np.array(True))
    assert y.tolist() == [0.0, 1.0]


class Attention(nn.Module):
    def forward(self, q, k, v):
        return nn.functional.scaled_dot_product_attention(q, k, v, scale=0.25)


def test_exported_attention_multiplies_with_the_transposed_keys(tmp_path):
    torch.manual_seed(0)
    model = to_onnx(capture(Attention(), tuple(torch.randn(3, 2, 4, 7, 16))))
    kinds = [n.op_type for n in model.graph.node]
    assert kinds.count("Transpose") == 1
    assert "Reshape" not in kinds
    for batch, length in ((1, 1), (3, 12)):
        given = torch.randn(3, batch, 4, length, 16)
        (found,) = answer(model, **{i.name: v.numpy() for i, v in zip(model.graph.input, given, strict=True)})
        np.testing.assert_allclose(found, Attention()(*given).numpy(), rtol=1e-4, atol=1e-5)
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    options.log_severity_level = 3
    onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    fused = [n for n in onnx.load(tmp_path / "optimised.onnx").graph.node if n.op_type == "FusedMatMul"]
    assert any(a.name == "transB" and a.i == 1 for n in fused for a in n.attribute)
