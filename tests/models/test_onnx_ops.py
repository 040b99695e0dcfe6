"""Every operator against the test vectors that the onnx package ships with its specification."""

from __future__ import annotations

import glob
import warnings
from functools import cache
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from onnx.backend.test.loader import load_model_tests

from deepseek_r1.core import UnsupportedOpError
from deepseek_r1.models._onnx_build import build
from deepseek_r1.models._onnx_values import OPERATORS, STATIC_INPUTS

#: Types for which torch has few or no kernels; models do not compute in them.
_RARE = ("bfloat16", "uint16", "uint32", "uint64", "string", "complex")
#: Vectors that torch cannot or need not give, with the reason.
_APART = {
    "test_reduce_max_empty_set": "torch has no maximum of nothing",
    "test_reduce_max_empty_set_bool": "torch has no maximum of nothing",
    "test_reduce_min_empty_set": "torch has no minimum of nothing",
    "test_attention_4d_causal_fp16_expanded": "rounding of float16 in another order of operations",
}
#: Operators whose vectors must exist, so that this file cannot pass by finding nothing.
_WANTED = (
    "Add", "AveragePool", "BatchNormalization", "Cast", "Clip", "Concat", "Conv", "ConvTranspose", "CumSum",
    "DequantizeLinear", "Div", "Einsum", "Erf", "Expand", "Flatten", "Gather", "GatherElements", "GatherND", "Gelu",
    "Gemm", "GlobalAveragePool", "GRU", "InstanceNormalization", "LayerNormalization", "LSTM", "MatMul", "MaxPool",
    "Mod", "OneHot", "Pad", "Pow", "QuantizeLinear", "Range", "ReduceMean", "ReduceSum", "Reshape", "Resize",
    "ScatterElements", "ScatterND", "Shape", "Slice", "Softmax", "Split", "Squeeze", "Tile", "TopK", "Transpose",
    "Trilu", "Unsqueeze", "Where",
)  # fmt: skip


@cache
def _vectors() -> list[tuple[str, onnx.ModelProto, list[Any], list[Any], float, float]]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cases = load_model_tests(kind="node")
    found = []
    for case in cases:
        if any(rare in case.name for rare in _RARE):
            continue
        model = case.model or onnx.load(f"{case.model_dir}/model.onnx")
        if any(n.op_type not in (*OPERATORS, "Constant") or n.domain for n in model.graph.node):
            continue
        try:
            inputs, outputs = case.data_sets[0] if case.data_sets else _read(case.model_dir)
        except (TypeError, ValueError):  # sequences and optionals, which no supported operator takes
            continue
        arrays = [np.asarray(a) for a in (*inputs, *outputs)]
        if any(a.dtype.kind not in "fiub" or str(a.dtype) in _RARE or "float8" in str(a.dtype) for a in arrays):
            continue
        found.append((case.name, model, list(inputs), list(outputs), case.rtol, max(case.atol, 1e-5)))
    return found


def _read(folder: str) -> tuple[list[Any], list[Any]]:
    def arrays(kind: str) -> list[Any]:
        count = len(glob.glob(f"{folder}/test_data_set_0/{kind}_*.pb"))
        protos = [f"{folder}/test_data_set_0/{kind}_{i}.pb" for i in range(count)]
        return [numpy_helper.to_array(onnx.load_tensor(p)) for p in protos]

    return arrays("input"), arrays("output")


def _run(model: onnx.ModelProto, inputs: list[Any]) -> list[torch.Tensor]:
    model = onnx.ModelProto.FromString(model.SerializeToString())
    static = {
        n.input[i]
        for n in model.graph.node
        for i in STATIC_INPUTS.get(n.op_type, ())
        if i < len(n.input)
    }  # fmt: skip
    feeds = []
    for info, array in zip(model.graph.input, inputs, strict=False):
        if info.name in static:
            model.graph.initializer.append(numpy_helper.from_array(np.asarray(array), info.name))
        else:
            feeds.append(torch.from_numpy(np.array(array)))
    result = build(model)(*feeds)
    return [result] if isinstance(result, torch.Tensor) else list(result)


def test_the_operators_that_matter_have_vectors():
    seen = {n.op_type for _, model, *_ in _vectors() for n in model.graph.node}
    assert set(_WANTED) <= seen


@pytest.mark.parametrize("letter", sorted({op[0] for op in OPERATORS}))
def test_vectors_of_the_specification(letter):
    """All vectors whose first operator begins with this letter."""
    passed, refused, wrong = 0, [], []
    for name, model, inputs, outputs, rtol, atol in _vectors():
        if name in _APART or model.graph.node[0].op_type[0] != letter:
            continue
        try:
            got = _run(model, inputs)
        except UnsupportedOpError as e:
            refused.append(f"{name}: {e}")
            continue
        for ours, theirs in zip(got, outputs, strict=True):
            mine, expected = ours.detach().numpy(), np.asarray(theirs)
            same = mine.shape == expected.shape and mine.dtype == expected.dtype
            if not (same and np.allclose(mine, expected, rtol=rtol, atol=atol, equal_nan=True)):
                wrong.append(f"{name}: {mine.dtype}{mine.shape}, expected {expected.dtype}{expected.shape}")
        passed += 1
    assert not wrong, "\n".join(wrong)
    assert passed > 0 or not refused
    assert len(refused) <= passed, "\n".join(refused)
