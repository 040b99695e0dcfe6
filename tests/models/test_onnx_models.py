"""Whole models: torch -> ONNX -> load_onnx, against eager and onnxruntime; capture and training afterwards."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import numpy_helper
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

from deepseek_r1.models import load_onnx

# pytest loads every conftest under its own name, so the list is read from the fixture's side here.
NAMES = ("residual", "depthwise", "mlp", "block", "unet", "embedder", "lstm", "gru")


@pytest.mark.parametrize("name", NAMES)
def test_round_trip_equals_eager_and_onnxruntime(onnx_zoo, name):
    model, inputs, _, path = onnx_zoo(name)
    loaded = load_onnx(path)
    report = loaded.meta["report"]
    assert report.ok
    assert [c.name for c in report.checks].count("parity of the loss") == 2, "dynamic models are compared at two sizes"
    with torch.no_grad():
        expected, got = model(*inputs), loaded(*inputs)
    assert got.shape == expected.shape
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5 * expected.abs().max().item())
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (outside,) = session.run(None, {i.name: x.numpy() for i, x in zip(session.get_inputs(), inputs)})
    np.testing.assert_allclose(got.numpy(), outside, rtol=0, atol=1e-5 * np.abs(outside).max())


@pytest.mark.parametrize("name", NAMES)
def test_torch_export_keeps_the_batch_dynamic(onnx_zoo, name):
    model, inputs, dynamic, path = onnx_zoo(name)
    loaded = load_onnx(path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        captured = torch.export.export(loaded, inputs, dynamic_shapes=dynamic).module()
    larger = tuple(torch.cat([x, x[:1], x]) for x in inputs)
    with torch.no_grad():
        torch.testing.assert_close(captured(*larger), model(*larger), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["residual", "block", "embedder", "lstm"])
def test_a_loaded_model_trains(onnx_zoo, name):
    _, inputs, _, path = onnx_zoo(name)
    loaded = load_onnx(path)
    before = {n: p.detach().clone() for n, p in loaded.named_parameters()}
    optimizer = torch.optim.SGD(loaded.parameters(), lr=1e-2)
    torch.manual_seed(1)
    target = torch.randn_like(loaded(*inputs).detach())
    losses = []
    for _ in range(5):
        loss = (loaded(*inputs) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    moved = [n for n, p in loaded.named_parameters() if not torch.equal(p, before[n])]
    assert set(moved) == set(before), f"never moved: {set(before) - set(moved)}"


def test_parameters_keep_their_names(onnx_zoo):
    model, _, _, path = onnx_zoo("mlp")
    loaded = load_onnx(path)
    assert {n: tuple(p.shape) for n, p in loaded.named_parameters()} == {
        n: tuple(p.shape) for n, p in model.named_parameters()
    }
    with torch.no_grad():
        model = copy.deepcopy(model)
        model[0].weight.mul_(2)
    loaded.load_state_dict(model.state_dict())
    x = torch.randn(3, 7)
    torch.testing.assert_close(loaded(x), model(x))


def test_inputs_go_by_name(onnx_zoo):
    _, (ids, mask), _, path = onnx_zoo("embedder")
    loaded = load_onnx(path)
    assert loaded.meta["input_names"] == ["input_ids", "attention_mask"]
    torch.testing.assert_close(loaded(attention_mask=mask, input_ids=ids), loaded(ids, mask))


def test_batch_norm_statistics_and_indices_are_not_trained(tmp_path):
    rng = np.random.default_rng(0)
    weights = {
        "w": rng.standard_normal((4, 3, 3, 3)), "scale": np.ones(4), "bias": np.zeros(4),
        "mean": rng.standard_normal(4), "var": np.ones(4), "half": np.array(0.5), "one": np.array([2.0]),
    }  # fmt: skip
    nodes = [
        onnx.helper.make_node("Conv", ["x", "w"], ["a"]),
        onnx.helper.make_node("BatchNormalization", ["a", "scale", "bias", "mean", "var"], ["b"]),
        onnx.helper.make_node("Mul", ["b", "half"], ["c"]),
        onnx.helper.make_node("Mul", ["c", "one"], ["y"]),
    ]
    graph = onnx.helper.make_graph(
        nodes, "g",
        [onnx.helper.make_tensor_value_info("x", 1, ["n", 3, 8, 8])],
        [onnx.helper.make_tensor_value_info("y", 1, ["n", 4, 6, 6])],
        [numpy_helper.from_array(v.astype(np.float32), k) for k, v in weights.items()],
    )  # fmt: skip
    path = tmp_path / "bn.onnx"
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8), path)
    loaded = load_onnx(path)
    assert {n for n, _ in loaded.named_parameters()} == {"w", "scale", "bias"}
    assert {n for n, _ in loaded.named_buffers()} == {"mean", "var", "one"}


def test_published_architectures_load():
    """The graphs that the onnx package ships for its own backends: opset 9, weights made by ConstantOfShape."""
    folder = Path(onnx.__file__).parent / "backend" / "test" / "data" / "light"
    files = sorted(folder.glob("light_*.onnx"))
    if not files:
        pytest.skip("this onnx package has no light models")
    names = {file.stem for file in files}
    assert {"light_resnet50", "light_densenet121", "light_shufflenet", "light_bvlc_alexnet"} <= names
    for file in files:
        assert load_onnx(file).meta["report"].ok


class _Feed(CalibrationDataReader):
    def __init__(self) -> None:
        self.left = [{"x": np.random.default_rng(i).standard_normal((4, 1, 8, 8), np.float32)} for i in range(4)]

    def get_next(self):
        return self.left.pop() if self.left else None


@pytest.mark.parametrize("activation", [QuantType.QInt8, QuantType.QUInt8])
def test_a_quantised_model_loads(onnx_zoo, tmp_path, activation):
    _, _, _, path = onnx_zoo("residual")
    model = onnx.load(path)
    for node in model.graph.node:
        for i, name in enumerate(node.input):
            node.input[i] = "x" if name == model.graph.input[0].name else name
    model.graph.input[0].name = "x"
    onnx.save(model, tmp_path / "float.onnx")
    target = tmp_path / "int8.onnx"
    quantize_static(
        tmp_path / "float.onnx", target, _Feed(), quant_format=QuantFormat.QDQ, per_channel=True,
        activation_type=activation, weight_type=QuantType.QInt8,
    )  # fmt: skip
    kinds = {n.op_type for n in onnx.load(target).graph.node}
    assert {"QuantizeLinear", "DequantizeLinear"} <= kinds
    loaded = load_onnx(target)
    assert any(b.dtype == torch.int8 for b in loaded.buffers())
    x = torch.from_numpy(np.random.default_rng(9).standard_normal((16, 1, 8, 8), np.float32))
    (outside,) = onnxruntime.InferenceSession(target, providers=["CPUExecutionProvider"]).run(None, {"x": x.numpy()})
    got = loaded(x).detach().numpy()
    assert np.abs(got - outside).max() <= 0.02 * np.abs(outside).max()
    assert (got.argmax(1) == outside.argmax(1)).mean() >= 0.9


def test_the_same_graph_can_be_copied(onnx_zoo):
    _, inputs, _, path = onnx_zoo("block")
    loaded = load_onnx(path)
    other = copy.deepcopy(loaded)
    torch.testing.assert_close(other(*inputs), loaded(*inputs), rtol=0, atol=0)
    assert next(other.parameters()) is not next(loaded.parameters())
