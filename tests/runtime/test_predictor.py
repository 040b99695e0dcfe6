"""`load`, `Predictor` and preprocessing, without torch."""

import json
import os

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from onnx import TensorProto, helper, numpy_helper

from deepseek_r1 import deploy
from deepseek_r1.core import ArtifactError, InputError, Manifest, PluginError, Report, TensorSpec, write_artifact
from deepseek_r1.runtime import RUNTIMES, check_steps, load, preprocess

STEPS = ({"op": "cast", "dtype": "float32"}, {"op": "scale", "factor": 0.5})


def model(path, *, two=False):
    """y = x + 2 z, and with `two` also the rows' sums."""
    value = helper.make_tensor_value_info
    nodes = [helper.make_node("Mul", ["z", "c"], ["m"]), helper.make_node("Add", ["x", "m"], ["y"])]
    outputs = [value("y", TensorProto.FLOAT, ["batch", 3])]
    if two:
        nodes.append(helper.make_node("ReduceSum", ["y"], ["s"], keepdims=0))
        outputs.append(value("s", TensorProto.FLOAT, []))
    inputs = [value("x", TensorProto.FLOAT, ["batch", 3]), value("z", TensorProto.FLOAT, ["batch", 3])]
    graph = helper.make_graph(nodes, "g", inputs, outputs, [numpy_helper.from_array(np.float32(2.0), "c")])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9), path)
    return path


def artifact(tmp_path, *, two=False, **fields):
    spec = {k: TensorSpec(name=k, dtype="float32", shape=("batch", 3)) for k in "xyz"}
    about = {
        "name": "m", "engine": "onnxruntime", "precision": "fp32", "model_file": "model.onnx",
        "inputs": (spec["x"], spec["z"]), "outputs": (spec["y"],), **fields,
    }  # fmt: skip
    file = model(tmp_path / "model.onnx", two=two)
    write_artifact(tmp_path / "a", Manifest(**about), [file], Report("r"))
    return tmp_path / "a"


A = np.arange(6, dtype=np.float32).reshape(2, 3)


def test_inputs_by_position_and_by_name(tmp_path):
    predictor = load(artifact(tmp_path))
    expected = A + 2 * A
    for given_inputs in (((A, A), {}), ((A,), {"z": A}), ((), {"z": A, "x": A})):
        args, named = given_inputs
        assert np.array_equal(predictor(*args, **named), expected)
    assert np.array_equal(predictor(A.tolist(), A.astype(np.float64)), expected), "lists and other types are converted"
    assert np.array_equal(predictor(A.T.reshape(2, 3)[:, ::-1], A), A.T.reshape(2, 3)[:, ::-1] + 2 * A)
    assert predictor(A[:0], A[:0]).shape == (0, 3)


def test_several_outputs_are_a_tuple(tmp_path):
    y, s = load(artifact(tmp_path, two=True))(A, A)
    assert s == pytest.approx(y.sum())


@pytest.mark.parametrize(
    ("args", "named", "message"),
    [
        ((), {}, r"the model's input 'x' is missing; it takes \['x', 'z'\]"),
        ((A,), {}, "the model's input 'z' is missing"),
        ((A, A, A), {}, "given 3 by position"),
        ((A, A), {"z": A}, "given 2 by position and .'z'. by name"),
        ((A,), {"w": A}, "given 1 by position and .'w'. by name"),
        ((A[:, :2], A[:, :2]), {}, r"input 'x' has shape \['batch', 3\]; given \[2, 2\]"),
        ((A[0], A[0]), {}, r"has shape \['batch', 3\]; given \[3\]"),
        ((A, A[:1]), {}, r"input 'z' has shape .* with {'batch': 2} from another input; given \[1, 3\]"),
        (("text", A), {}, "input 'x'"),
        (([[1, 2, 3], [4]], A), {}, "input 'x'"),
    ],
)
def test_inputs_that_do_not_fit(tmp_path, args, named, message):
    predictor = load(artifact(tmp_path))
    with pytest.raises(InputError, match=message):
        predictor(*args, **named)


def one_input(tmp_path, **fields):
    spec = TensorSpec(name="x", dtype="float32", shape=("batch", 3))
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [helper.make_node("Neg", ["x"], ["y"])], "g", [value("x", TensorProto.FLOAT, ["batch", 3])],
        [value("y", TensorProto.FLOAT, ["batch", 3])],
    )  # fmt: skip
    path = tmp_path / "model.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9), path)
    about = {"name": "m", "engine": "onnxruntime", "precision": "fp32", "model_file": "model.onnx"}
    manifest = Manifest(**about, inputs=(spec,), outputs=(spec,), **fields)
    write_artifact(tmp_path / "a", manifest, [path], Report("r"))
    return tmp_path / "a"


def test_raw_data_become_labels_or_scores(tmp_path):
    raw = [[2, 4, 6], [9, 8, 1]]
    (tmp_path / "with").mkdir()
    (tmp_path / "without").mkdir()
    named = load(one_input(tmp_path / "with", labels=("a", "b", "c"), preprocessing=STEPS))
    assert named.predict(raw) == ["a", "c"]
    assert named.predict(np.zeros((0, 3))) == []
    plain = load(one_input(tmp_path / "without", preprocessing=STEPS))
    assert plain.predict(raw).tolist() == [[-1, -2, -3], [-4.5, -4, -0.5]]
    assert plain.manifest.labels is None


def test_damaged_artifacts_are_refused_by_name(tmp_path):
    where = artifact(tmp_path)
    data = (where / "model.onnx").read_bytes()
    for content, message in ((data[:-1], "model.onnx is truncated"), (data + b"x", "model.onnx is altered"),
                             (data[:-1] + bytes([data[-1] ^ 1]), "model.onnx was altered")):  # fmt: skip
        (where / "model.onnx").write_bytes(content)
        with pytest.raises(ArtifactError, match=message):
            load(where)
    (where / "model.onnx").unlink()
    with pytest.raises(ArtifactError, match=r"model\.onnx is missing"):
        load(where)
    outside = tmp_path / "elsewhere.onnx"
    outside.write_bytes(data)
    os.symlink(outside, where / "model.onnx")
    with pytest.raises(ArtifactError, match="no plain file"):
        load(where)
    (where / "model.onnx").unlink()
    (where / "model.onnx").write_bytes(data)
    load(where)
    manifest = json.loads((where / "manifest.json").read_text())
    for change, message in (
        ({"schema_version": 2}, "schema version 2; this release reads up to 1"), ({"kind": "zip"}, "does not describe"),
        ({"engine": "other"}, "was altered after it was written"), ({"files": {}}, "was altered after"),
    ):  # fmt: skip
        (where / "manifest.json").write_text(json.dumps({**manifest, **change}))
        with pytest.raises(ArtifactError, match=message):
            load(where)
    (where / "manifest.json").write_text("{")
    with pytest.raises(ArtifactError, match=r"manifest\.json is damaged"):
        load(where)
    with pytest.raises(ArtifactError, match="does not exist"):
        load(tmp_path / "absent")
    with pytest.raises(ArtifactError, match="is no artifact"):
        load(tmp_path)


def test_engines_and_models_that_cannot_be_opened(tmp_path):
    with pytest.raises(PluginError, match="unknown runtime 'tensorrt'"):
        load(artifact(tmp_path, engine="tensorrt"))
    with pytest.raises(ArtifactError, match="could not be opened by ONNX Runtime"):
        RUNTIMES.get("onnxruntime")(b"no model")
    (tmp_path / "bad.onnx").write_bytes(b"no model")
    with pytest.raises(ArtifactError, match=r"bad\.onnx could not be opened"):
        RUNTIMES.get("onnxruntime")(tmp_path / "bad.onnx")


def test_threads_are_passed_on(tmp_path):
    assert np.array_equal(load(artifact(tmp_path), threads=1)(A, A), 3 * A)


@settings(max_examples=50)
@given(hnp.arrays(np.uint8, (2, 3, 4), elements=st.integers(0, 255)), st.floats(0.01, 10))
def test_steps_are_numpys_own(x, factor):
    mean, std = [1.0, 2.0, 3.0], [0.5, 1.0, 2.0]
    steps = [
        {"op": "cast", "dtype": "float32"}, {"op": "scale", "factor": factor},
        {"op": "normalize", "mean": mean, "std": std}, {"op": "transpose", "order": [0, 2, 1]},
        {"op": "reshape", "shape": [-1, 12]},
    ]  # fmt: skip
    expected = x.astype(np.float32) * np.float32(factor)
    expected = (expected - np.array(mean, np.float32)[:, None]) / np.array(std, np.float32)[:, None]
    got = preprocess(json.loads(json.dumps(steps)), x)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, expected.transpose(0, 2, 1).reshape(-1, 12), rtol=1e-6)


def test_no_steps_and_other_numbers_of_dimensions():
    assert preprocess([], [[1, 2]]).tolist() == [[1, 2]]
    flat = preprocess([{"op": "normalize", "mean": [1.0, 2.0], "std": [1.0, 2.0]}], np.array([[2.0, 6.0]]))
    assert flat.tolist() == [[1.0, 2.0]]
    volume = np.ones((1, 2, 2, 2, 2), np.float32)
    assert preprocess([{"op": "normalize", "mean": [0.0, 1.0], "std": [1.0, 1.0]}], volume)[0, :, 0, 0, 0].tolist() == [
        1,
        0,
    ]


def test_whole_numbers_are_not_scaled_to_nothing():
    """0.5 as a whole number is 0: data of whole numbers must be cast first."""
    for step in ({"op": "scale", "factor": 0.5}, {"op": "normalize", "mean": [0.5], "std": [0.5]}):
        with pytest.raises(InputError, match=r"cast .*first"):
            preprocess([step], np.array([[2], [4]], dtype=np.uint8))


@pytest.mark.parametrize(
    ("step", "message"),
    [
        ({"op": "resize"}, "is 'resize'; known steps: cast, scale, normalize, reshape, transpose"),
        ({}, "is None"),
        ({"op": "scale"}, r"step 0 \(scale\) takes \['factor'\]; given \[\]"),
        ({"op": "scale", "factor": 1, "by": 2}, "takes"),
        ({"op": "scale", "factor": "x"}, r"step 0 \(scale\) does not fit"),
        ({"op": "cast", "dtype": "float99"}, r"step 0 \(cast\) does not fit"),
        (
            {"op": "reshape", "shape": [7, 7]},
            r"step 0 \(reshape\) does not fit data of shape \(2, 3\) and type float32",
        ),
        ({"op": "transpose", "order": [0, 5]}, r"step 0 \(transpose\) does not fit"),
        ({"op": "normalize", "mean": [1, 2], "std": [1, 1]}, r"step 0 \(normalize\) does not fit"),
    ],
)
def test_steps_that_do_not_fit(step, message):
    with pytest.raises(InputError, match=message):
        preprocess([step], A)


def test_steps_can_be_checked_without_data():
    check_steps(STEPS)
    with pytest.raises(InputError, match="known steps"):
        check_steps([*STEPS, {"op": "crop"}])


def test_an_empty_batch_never_reaches_the_kernels(tmp_path):
    """ONNX Runtime ends the whole process for an LSTM on no rows."""

    class Last(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm = torch.nn.LSTM(4, 5, batch_first=True)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.lstm(x)[0][:, -1]

    deploy.export(Last().eval(), tmp_path / "lstm", example_inputs=torch.randn(2, 3, 4))
    predictor = load(tmp_path / "lstm")
    assert predictor(np.zeros((0, 3, 4), dtype=np.float32)).shape == (0, 5)
    with pytest.raises(InputError, match="only a batch may be empty"):
        predictor(np.zeros((2, 0, 4), dtype=np.float32))


def test_an_artifact_says_which_sizes_the_model_fixed(tmp_path):
    class Pairs(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.reshape(2, 3, 4) * 2

    report = deploy.export(Pairs(), tmp_path / "pairs", example_inputs=torch.randn(2, 3, 4))
    assert "fixes dimension 0" in dict(report.skipped)["Pairs: dynamic batch"]
    predictor = load(tmp_path / "pairs")
    assert predictor.manifest.inputs[0].shape == (2, 3, 4)
    with pytest.raises(InputError, match=r"has shape \[2, 3, 4\]; given \[7, 3, 4\]"):
        predictor(np.zeros((7, 3, 4), dtype=np.float32))
