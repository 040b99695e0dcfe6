"""Bad ONNX files: each gives an error that names what is wrong, and nothing else happens."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from deepseek_r1.core import ArtifactError, CheckFailedError, InputError, UnsupportedOpError
from deepseek_r1.models import _onnx_load, load_onnx


def _save(path, nodes, constants=(), opset=17, domains=(), external=None):
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(v, k) for k, v in dict(constants).items()],
    )
    opsets = [helper.make_opsetid("", opset), *(helper.make_opsetid(d, 1) for d in domains)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=8)
    if external is None:
        onnx.save(model, path)
    else:
        onnx.save(model, path, save_as_external_data=True, location=external, size_threshold=0)
    return path


def _linear(path, **more):
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y"], name="product")]
    return _save(path, nodes, {"w": np.eye(4, 3, dtype=np.float32)}, **more)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(InputError, match=r"absent\.onnx does not exist"):
        load_onnx(tmp_path / "absent.onnx")


@pytest.mark.parametrize("damage", ["empty", "text", "truncated", "flipped"])
def test_a_damaged_file_is_refused(tmp_path, damage):
    path = _linear(tmp_path / "model.onnx")
    whole = path.read_bytes()
    path.write_bytes(
        {
            "empty": b"",
            "text": b"this is no model\n" * 20,
            "truncated": whole[: len(whole) // 2],
            "flipped": whole.replace(b"product", b"prod\xff\xffx").replace(b"MatMul", b"\x00\x01tMul"),
        }[damage]
    )
    with pytest.raises((ArtifactError, UnsupportedOpError), match=r"damaged|no translation"):
        load_onnx(path)


def test_a_graph_that_does_not_fit_together_is_refused(tmp_path):
    path = _save(tmp_path / "model.onnx", [helper.make_node("Relu", ["nowhere"], ["y"])])
    with pytest.raises(ArtifactError, match="nowhere"):
        load_onnx(path)


def test_unknown_operators_are_all_named(tmp_path):
    nodes = [
        helper.make_node("FusedThing", ["x"], ["a"], name="first", domain="com.example"),
        helper.make_node("NonMaxSuppression", ["a", "a"], ["y"], name="second"),
    ]
    path = _save(tmp_path / "model.onnx", nodes, domains=["com.example"])
    with pytest.raises(UnsupportedOpError, match=r"com\.example\.FusedThing \(node 'first'\).*'second'.*opset 17"):
        load_onnx(path)


def test_an_unsupported_form_names_the_node(tmp_path):
    nodes = [
        helper.make_node("LayerNormalization", ["x", "s", "s"], ["z", "mean"], name="norm"),
        helper.make_node("Add", ["z", "mean"], ["y"]),
    ]
    path = _save(tmp_path / "model.onnx", nodes, {"s": np.ones(4, np.float32)})
    with pytest.raises(UnsupportedOpError, match=r"LayerNormalization node 'norm'.*Mean.*opset 17"):
        load_onnx(path)


def test_control_flow_is_refused(tmp_path):
    body = helper.make_graph(
        [helper.make_node("Identity", ["x"], ["z"])], "body", [],
        [helper.make_tensor_value_info("z", TensorProto.FLOAT, None)],
    )  # fmt: skip
    node = helper.make_node("If", ["flag"], ["y"], name="branch", then_branch=body, else_branch=body)
    path = _save(tmp_path / "model.onnx", [node], {"flag": np.array(True)})
    with pytest.raises(UnsupportedOpError, match="'branch'"):
        load_onnx(path)


def test_external_data_beside_the_file_is_read(tmp_path):
    path = _linear(tmp_path / "model.onnx", external="model.data")
    assert (tmp_path / "model.data").stat().st_size > 0
    x = torch.randn(2, 4)
    torch.testing.assert_close(load_onnx(path)(x), x[:, :3])


@pytest.mark.parametrize("location", ["../secret.data", "/etc/hostname", "inside/../../secret.data"])
def test_external_data_elsewhere_is_refused(tmp_path, location):
    (tmp_path / "secret.data").write_bytes(np.eye(4, 3, dtype=np.float32).tobytes())
    folder = tmp_path / "model"
    (folder / "inside").mkdir(parents=True)
    path = _linear(folder / "model.onnx", external="model.data")
    model = onnx.load(path, load_external_data=False)
    for entry in model.graph.initializer[0].external_data:
        if entry.key == "location":
            entry.value = location
    path.write_bytes(model.SerializeToString())
    with pytest.raises(ArtifactError, match="damaged or no ONNX model"):
        load_onnx(path)


def test_a_link_out_of_the_directory_is_refused(tmp_path):
    (tmp_path / "secret.data").write_bytes(np.eye(4, 3, dtype=np.float32).tobytes())
    folder = tmp_path / "model"
    folder.mkdir()
    path = _linear(folder / "model.onnx", external="model.data")
    (folder / "model.data").unlink()
    (folder / "model.data").symlink_to(tmp_path / "secret.data")
    with pytest.raises(ArtifactError):
        load_onnx(path)


def test_missing_external_data_is_named(tmp_path):
    path = _linear(tmp_path / "model.onnx", external="model.data")
    (tmp_path / "model.data").unlink()
    with pytest.raises(ArtifactError, match=r"model\.data"):
        load_onnx(path)


def test_a_wrong_translation_is_caught(tmp_path, monkeypatch):
    path = _linear(tmp_path / "model.onnx")
    real = _onnx_load.build

    def wrong(model):
        module = real(model)
        with torch.no_grad():
            next(module.parameters())[0, 0] += 1e-3
        return module

    monkeypatch.setattr(_onnx_load, "build", wrong)
    with pytest.raises(CheckFailedError, match=r"'y'.*differs from onnxruntime") as caught:
        load_onnx(path)
    assert not caught.value.report.ok


def test_given_inputs_are_used_and_checked(tmp_path):
    path = _linear(tmp_path / "model.onnx")
    report = load_onnx(path, example_inputs=torch.randn(5, 4)).meta["report"]
    assert "x [5, 4]" in report.rows[0].how
    assert load_onnx(path, example_inputs={"x": torch.randn(3, 4)}).meta["report"].ok
    with pytest.raises(InputError, match="lacks"):
        load_onnx(path, example_inputs={"z": torch.randn(3, 4)})
    with pytest.raises(InputError, match="onnxruntime refuses"):
        load_onnx(path, example_inputs=torch.randn(5, 7))
    with pytest.raises(InputError, match="2 tensors"):
        load_onnx(path, example_inputs=(torch.randn(5, 4), torch.randn(5, 4)))


def test_names_that_python_cannot_spell(tmp_path):
    nodes = [
        helper.make_node("MatMul", ["x", "/a/weight:0"], ["/h/MatMul"], name="/h/MatMul"),
        helper.make_node("MatMul", ["/h/MatMul", "a_weight_0"], ["t"], name="float"),
        helper.make_node("MatMul", ["t", "float"], ["u"], name="class"),
        helper.make_node("MatMul", ["u", "float.weight"], ["y"], name="1st.2nd"),
    ]
    square = np.eye(4, dtype=np.float32)
    names = ["/a/weight:0", "a_weight_0", "float", "float.weight"]
    loaded = load_onnx(_save(tmp_path / "model.onnx", nodes, dict.fromkeys(names, square)))
    assert len(list(loaded.parameters())) == 4
    assert "a_weight_0" in dict(loaded.named_parameters())
    x = torch.randn(2, 4)
    torch.testing.assert_close(loaded(x), x)


@pytest.mark.parametrize(("name", "argument"), [("0", "input_0"), ("class", "input_class"), ("in.put:0", "in_put_0")])
def test_input_names_become_arguments(tmp_path, name, argument):
    path = _linear(tmp_path / "model.onnx")
    model = onnx.load(path)
    model.graph.input[0].name = model.graph.node[0].input[0] = name
    onnx.save(model, path)
    loaded = load_onnx(path)
    x = torch.randn(2, 4)
    torch.testing.assert_close(loaded(**{argument: x}), loaded(x))
    assert loaded.meta["input_names"] == [name]


def test_outputs_that_nobody_reads_do_not_matter(tmp_path):
    nodes = [
        helper.make_node("Dropout", ["x"], ["a", "mask"]),
        helper.make_node("LayerNormalization", ["a", "s", "s"], ["y", "mean", "deviation"]),
        helper.make_node("NonZero", ["a"], ["unused"]),
    ]
    loaded = load_onnx(_save(tmp_path / "model.onnx", nodes, {"s": np.ones(4, np.float32)}))
    x = torch.randn(2, 4)
    torch.testing.assert_close(loaded(x), torch.nn.functional.layer_norm(x, [4]) + 1)


def test_names_in_the_file_never_become_code(tmp_path):
    marker = tmp_path / "ran"
    evil = f"x'\"\n); open({str(marker)!r}, 'w'); ("
    nodes = [
        helper.make_node("MatMul", [evil, evil + "w"], [evil + "h"], name=evil + "n"),
        helper.make_node("Pad", [evil + "h", "pads", "low"], ["y"], name=evil),
    ]
    constants = {evil + "w": np.eye(4, dtype=np.float32), "pads": np.array([0, 0, 0, 1]), "low": np.float32(-np.inf)}
    path = _save(tmp_path / "model.onnx", nodes, {k: np.asarray(v) for k, v in constants.items()})
    model = onnx.load(path)
    model.graph.input[0].name = evil
    onnx.save(model, path)
    loaded = load_onnx(path)
    assert loaded(torch.ones(2, 4))[0].tolist() == [1, 1, 1, 1, -torch.inf]
    assert not marker.exists()


def test_one_shared_initializer_is_one_parameter(tmp_path):
    nodes = [helper.make_node("MatMul", ["x", "w"], ["h"]), helper.make_node("MatMul", ["h", "w"], ["y"])]
    loaded = load_onnx(_save(tmp_path / "model.onnx", nodes, {"w": 2 * np.eye(4, dtype=np.float32)}))
    assert [n for n, _ in loaded.named_parameters()] == ["w"]
    x = torch.randn(2, 4)
    torch.testing.assert_close(loaded(x), 4 * x)


def test_a_directory_is_no_file(tmp_path):
    with pytest.raises(InputError, match="give the path of an"):
        load_onnx(tmp_path)
