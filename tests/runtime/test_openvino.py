"""The OpenVINO session on numpy arrays: what it takes, what it refuses, several threads, an Artifact around it."""

import subprocess
import sys
import threading
from importlib.util import find_spec

import numpy as np
import pytest

from deepseek_r1.core import ArtifactError, InputError, Manifest, Report, TensorSpec, write_artifact
from deepseek_r1.runtime import RUNTIMES, load
from deepseek_r1.runtime._openvino import load_openvino

pytestmark = pytest.mark.skipif(not find_spec("openvino"), reason="the extra [openvino] is not installed")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """y = x @ w + 1, and the rows' sums, for any number of rows."""
    openvino = load_openvino()
    ops = openvino.opset13
    x = ops.parameter([-1, 3], np.float32, name="x")
    w = ops.constant(np.arange(6, dtype=np.float32).reshape(3, 2))
    y = ops.add(ops.matmul(x, w, False, False), np.float32(1))
    x.output(0).get_tensor().set_names({"x"})
    y.output(0).get_tensor().set_names({"y"})
    total = ops.reduce_sum(x, np.array([1]))
    total.output(0).get_tensor().set_names({"total"})
    path = tmp_path_factory.mktemp("model") / "model.xml"
    openvino.save_model(openvino.Model([y, total], [x], "affine"), path, compress_to_fp16=False)
    return path


@pytest.fixture(scope="module")
def session(model):
    return RUNTIMES.get("openvino")(model, threads=1)


def expected(x):
    return [x @ np.arange(6, dtype=np.float32).reshape(3, 2) + 1, x.sum(1)]


def test_answers_for_any_number_of_rows(session):
    assert session.input_names == ["x"]
    assert session.output_names == ["y", "total"]
    for rows in (1, 4, 2, 0):
        x = np.random.default_rng(rows).normal(size=(rows, 3)).astype(np.float32)
        for a, b in zip(session.run({"x": x}), expected(x), strict=True):
            assert a.shape == b.shape
            assert np.allclose(a, b, atol=1e-5)


def test_answers_are_the_callers_own(session):
    first = session.run({"x": np.ones((2, 3), np.float32)})
    kept = [v.copy() for v in first]
    session.run({"x": np.zeros((2, 3), np.float32)})
    assert all(np.array_equal(a, b) for a, b in zip(first, kept))


def test_several_threads(session):
    wrong = []

    def work(seed):
        x = np.full((2, 3), seed, np.float32)
        for _ in range(30):
            if not np.allclose(session.run({"x": x})[0], expected(x)[0]):
                wrong.append(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize(
    "feeds",
    [
        {"x": np.ones((2, 3))},
        {"x": np.ones((2, 4), np.float32)},
        {"z": np.ones((2, 3), np.float32)},
        {"x": [[1.0, 2.0, 3.0]]},
        {},
        {"x": np.ones((0, 4), np.float32)},
    ],
)
def test_misfits_are_named(session, feeds):
    with pytest.raises(InputError, match=r"float32|OpenVINO says"):
        session.run(feeds)


def test_files_that_are_no_models(tmp_path):
    (tmp_path / "model.xml").write_text("<net>")
    with pytest.raises(ArtifactError, match="could not be opened by OpenVINO"):
        RUNTIMES.get("openvino")(tmp_path / "model.xml")


def test_an_artifact_with_such_a_model_opens_without_torch(model, tmp_path):
    spec = TensorSpec(name="x", dtype="float32", shape=("batch", 3))
    outputs = (TensorSpec(name="y", dtype="float32", shape=("batch", 2)),)
    manifest = Manifest(
        name="affine", engine="openvino", precision="fp32", model_file="model.xml", inputs=(spec,), outputs=outputs
    )
    write_artifact(tmp_path / "artifact", manifest, [model, model.with_suffix(".bin")], Report("test"))
    y, _ = load(tmp_path / "artifact", threads=1)(np.ones((2, 3), np.float32))
    assert np.allclose(y, expected(np.ones((2, 3), np.float32))[0])
    code = f"""
import sys, numpy
from deepseek_r1.runtime import load
load({str(tmp_path / "artifact")!r})(numpy.ones((2, 3), numpy.float32))
assert "torch" not in sys.modules
# Nothing was loaded that reports the use of openvino to its maker; afterwards it can be imported as ever.
assert not [name for name in sys.modules if name.startswith("openvino_telemetry")]
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_the_missing_extra_is_named(model, monkeypatch):
    from deepseek_r1.core.errors import MissingExtraError
    from deepseek_r1.runtime import _openvino

    monkeypatch.setattr(_openvino, "_core", _openvino._core.__wrapped__)
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'deepseek-r1\[openvino\]'"):
        _openvino.OpenVinoSession(model)
