"""`export`: files that answer like the program, or no files."""

import errno
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import nn

from deepseek_r1.core import ArtifactError, CheckFailedError, InputError, PluginError, open_artifact
from deepseek_r1.core.atomic import sha256_file
from deepseek_r1.deploy import _onnx, export, scorecard
from deepseek_r1.engines import optimize, to_onnx
from deepseek_r1.graph import capture
from deepseek_r1.models import DigitsNet
from deepseek_r1.quantization import quantize
from deepseek_r1.runtime import load

LABELS = [str(i) for i in range(10)]


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    return DigitsNet(width=12).eval()


@pytest.fixture(scope="module")
def program(net):
    return capture(net, torch.randn(2, 1, 8, 8), name="small")


@pytest.fixture(scope="module")
def data(net):
    x = torch.randn(48, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        y = net(x).argmax(-1)
    return [(x[:32], y[:32]), (x[32:], y[32:])]


def run_onnx(path, x):
    from deepseek_r1.runtime import RUNTIMES

    return RUNTIMES.get("onnxruntime")(path).run({"x_n1hw": x})[0]


def everything(folder):
    return {str(f.relative_to(folder)): sha256_file(f) for f in sorted(folder.rglob("*")) if f.is_file()}


def test_an_onnx_file(net, data, tmp_path):
    report = export(net, tmp_path / "net.onnx", dataset=data, name="mine")
    assert report.ok
    assert report.title == "export mine to onnx"
    assert report["accuracy of the file"].after == 1.0
    assert "48 labels" in report["accuracy of the file"].how
    assert report["parity, relative to the largest output"].after < 1e-5
    assert report["file size"].after == (tmp_path / "net.onnx").stat().st_size
    assert [f.name for f in tmp_path.iterdir()] == ["net.onnx"]
    x = data[0][0][:1]
    np.testing.assert_allclose(
        run_onnx(tmp_path / "net.onnx", x.numpy()), net(x).detach().numpy(), rtol=1e-4, atol=1e-5
    )


def test_an_artifact(program, data, tmp_path):
    steps = [
        {"op": "cast", "dtype": "float32"},
        {"op": "scale", "factor": 0.5},
        {"op": "reshape", "shape": [-1, 1, 8, 8]},
    ]
    report = export(
        program, tmp_path / "a", dataset=data, labels=LABELS, preprocessing=steps, extra={"tokenizer": "none"}
    )
    assert report.ok
    artifact = open_artifact(tmp_path / "a")
    manifest = artifact.manifest
    assert (manifest.name, manifest.engine, manifest.precision) == ("small", "onnxruntime", "fp32")
    assert manifest.labels == tuple(LABELS)
    assert list(manifest.preprocessing) == steps
    assert manifest.extra == {"tokenizer": "none"}
    assert [(s.name, s.dtype, s.shape) for s in manifest.inputs] == [("x_n1hw", "float32", ("batch", 1, 8, 8))]
    assert manifest.outputs[0].shape == ("batch", 10)
    assert {"torch", "onnxruntime", "deepseek-r1"} <= set(manifest.versions)
    assert artifact.report.ok
    assert sorted(f.name for f in (tmp_path / "a").iterdir()) == ["manifest.json", "model.onnx", "report.json"]
    raw = np.random.default_rng(0).integers(0, 16, (3, 64)).astype(np.uint8)
    predictor = load(tmp_path / "a")
    with torch.no_grad():
        expected = program(torch.from_numpy(raw.astype(np.float32) * 0.5).reshape(3, 1, 8, 8)).argmax(-1)
    assert predictor.predict(raw) == [str(i) for i in expected.tolist()]


def test_every_kind_of_model(net, program, data, tmp_path):
    fast = optimize(program, engines=[])
    int8 = quantize(net, dataset=data)
    for number, model in enumerate((net, program, fast, int8)):
        report = export(model, tmp_path / f"{number}.onnx", example_inputs=data[0][0])
        assert report.ok
    assert (tmp_path / "3.onnx").stat().st_size < (tmp_path / "1.onnx").stat().st_size
    export(int8, tmp_path / "int8", dataset=data)
    assert open_artifact(tmp_path / "int8").manifest.precision == "int8"
    with pytest.raises(InputError, match="given function"):
        export(lambda x: x, tmp_path / "x.onnx", example_inputs=data[0][0])


def test_several_inputs_and_outputs(tmp_path):
    class Two(nn.Module):
        def forward(self, ids, *, mask):
            return {"a": ids * mask, "none": None, "b": (ids + mask).sum(1)}

    axes = {0: "batch", 1: "sequence"}
    inputs = {"ids": torch.randn(2, 3), "mask": torch.randn(2, 3)}
    program = capture(Two(), inputs, dynamic_shapes={"ids": axes, "mask": axes})
    batches = [{"ids": torch.randn(n, 7), "mask": torch.randn(n, 7)} for n in (1, 5)]
    assert export(program, tmp_path / "two", dataset=batches).ok
    predictor = load(tmp_path / "two")
    a, b = predictor(mask=np.ones((2, 4), np.float32), ids=np.ones((2, 4), np.float32))
    assert a.tolist() == [[1.0] * 4] * 2
    assert b.tolist() == [8.0] * 2
    assert [s.name for s in predictor.manifest.outputs] == ["output_0", "output_1"]


def perturbed(program, **options):
    """`to_onnx` with one weight changed, as a broken exporter would leave it."""
    model = plain(program, **options)
    for constant in model.graph.initializer:
        value = numpy_helper.to_array(constant)
        if value.dtype == np.float32 and value.ndim > 1:
            constant.CopyFrom(numpy_helper.from_array(value * 1.5, constant.name))
            return model
    raise AssertionError("no float weight to change")


def plain(program, **options):
    return to_onnx(program, **options)


@pytest.mark.parametrize("name", ["net.onnx", "artifact"])
def test_files_that_answer_otherwise_are_not_kept(program, data, tmp_path, monkeypatch, name):
    monkeypatch.setattr(_onnx, "to_onnx", perturbed)
    with pytest.raises(CheckFailedError, match="parity in onnxruntime failed: largest relative difference") as caught:
        export(program, tmp_path / name, dataset=data)
    assert list(tmp_path.iterdir()) == []
    assert not caught.value.report.ok
    assert "parity, relative to the largest output" in caught.value.report
    monkeypatch.undo()
    export(program, tmp_path / name, dataset=data)
    before = everything(tmp_path)
    monkeypatch.setattr(_onnx, "to_onnx", perturbed)
    with pytest.raises(CheckFailedError):
        export(program, tmp_path / name, dataset=data)
    assert everything(tmp_path) == before


def test_int8_files_are_held_to_the_quantised_program(net, data, tmp_path, monkeypatch):
    int8 = quantize(net, dataset=data)

    def spoiled(program, **options):
        model = plain(program, **options)
        for constant in model.graph.initializer:
            value = numpy_helper.to_array(constant)
            if value.dtype == np.int8 and value.ndim == 4:
                constant.CopyFrom(numpy_helper.from_array(-value, constant.name))
                return model
        raise AssertionError("no int8 weight to change")

    monkeypatch.setattr(_onnx, "to_onnx", spoiled)
    with pytest.raises(CheckFailedError, match="SQNR"):
        export(int8, tmp_path / "net.onnx", dataset=data)
    assert list(tmp_path.iterdir()) == []


def test_a_batch_size_that_the_exporter_fixed_is_found(program, tmp_path, monkeypatch):
    def fixed(program, **options):
        model = plain(program, **options)
        model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 2
        model.graph.output[0].type.tensor_type.shape.dim[0].dim_value = 2
        return model

    monkeypatch.setattr(_onnx, "to_onnx", fixed)
    with pytest.raises((CheckFailedError, InputError)):
        export(program, tmp_path / "net.onnx")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["net.onnx", "artifact"])
def test_a_full_disk_keeps_what_was_there(program, data, tmp_path, monkeypatch, name):
    export(program, tmp_path / name, dataset=data)
    before = everything(tmp_path)
    real = os.fsync
    count = []

    def full(fd):
        count.append(fd)
        if len(count) >= full.at:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(fd)

    for at in (1, 3):
        full.at = at
        count.clear()
        monkeypatch.setattr(os, "fsync", full)
        try:
            export(program, tmp_path / name, dataset=data)
        except OSError as e:
            failed = e.errno
        else:
            failed = None
        monkeypatch.setattr(os, "fsync", real)
        assert everything(tmp_path).keys() == before.keys(), "a half-written file was left"
        if failed is not None and at == 1:
            assert failed == errno.ENOSPC
            assert everything(tmp_path) == before
        if name == "artifact":
            load(tmp_path / name)


def test_a_disk_that_fills_while_the_model_file_is_written(program, data, tmp_path, monkeypatch):
    export(program, tmp_path / "a", dataset=data)
    before = everything(tmp_path)
    import shutil

    def full(source, target, **_):
        with open(target, "wb") as f:
            f.write(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(shutil, "copyfile", full)
    with pytest.raises(OSError, match="No space left"):
        export(program, tmp_path / "a", dataset=data)
    monkeypatch.undo()
    assert everything(tmp_path) == before
    assert load(tmp_path / "a")(np.zeros((1, 1, 8, 8), np.float32)).shape == (1, 10)


KILLED = """
import os, sys, time
import torch
from deepseek_r1.deploy import export
from deepseek_r1.graph import Program
program = Program.load(sys.argv[1])
real = os.fsync
def slow(fd):
    real(fd)
    print("writing", flush=True)
    time.sleep(0.2)
os.fsync = slow
print("ready", flush=True)
while True:
    export(program, sys.argv[2])
"""


def kill_while_writing(program, tmp_path, how, after):
    source = program.save(tmp_path / "p.dr1")
    (tmp_path / "out").mkdir()
    export(program, tmp_path / "out" / "a")
    arguments = [sys.executable, "-c", KILLED, str(source), str(tmp_path / "out" / "a")]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as child:
        for _ in range(after):
            line = child.stdout.readline()
            assert line.strip() in ("ready", "writing")
        time.sleep(0.05)
        os.kill(child.pid, how)
        child.communicate(timeout=60)
    return tmp_path / "out"


@pytest.mark.parametrize("after", [3, 6])
def test_a_killed_export_leaves_an_artifact_that_opens(program, tmp_path, after):
    out = kill_while_writing(program, tmp_path, signal.SIGKILL, after)
    assert load(out / "a")(np.zeros((1, 1, 8, 8), np.float32)).shape == (1, 10)


def test_an_interrupted_export_leaves_the_artifact_and_nothing_else(program, tmp_path):
    out = kill_while_writing(program, tmp_path, signal.SIGINT, 3)
    assert [f.name for f in out.iterdir()] == ["a"], "half-written files were left"
    assert load(out / "a")(np.zeros((1, 1, 8, 8), np.float32)).shape == (1, 10)


def test_wrong_use(program, net, data, tmp_path):
    with pytest.raises(InputError, match=r"a name ending in \.onnx, or a directory"):
        export(program, tmp_path / "net.onx")
    with pytest.raises(PluginError, match="unknown deployment target 'tflite'"):
        export(program, tmp_path / "net", target="tflite")
    with pytest.raises(InputError, match="needs example_inputs= or dataset="):
        export(net, tmp_path / "net.onnx")
    with pytest.raises(InputError, match="the dataset is empty"):
        export(net, tmp_path / "net.onnx", dataset=[])
    with pytest.raises(InputError, match=r"export: input 0 .* given \(2, 3\)"):
        export(program, tmp_path / "net.onnx", dataset=[torch.randn(2, 3)])
    (tmp_path / "file").write_text("")
    with pytest.raises(ArtifactError, match="is a file"):
        export(program, tmp_path / "file", target="artifact")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(ArtifactError, match="with other things in it"):
        export(program, tmp_path / "mine")
    (tmp_path / "mine.onnx").mkdir()
    with pytest.raises((InputError, ArtifactError, OSError)):
        export(program, tmp_path / "mine.onnx")
    assert sorted(f.name for f in tmp_path.iterdir()) == ["file", "mine", "mine.onnx"]


def test_labels_and_preprocessing_that_do_not_fit_are_refused_at_once(program, tmp_path):
    with pytest.raises(InputError, match="3 labels for 10 classes"):
        export(program, tmp_path / "a", labels=["a", "b", "c"])
    with pytest.raises(InputError, match="known steps"):
        export(program, tmp_path / "a", preprocessing=[{"op": "resize", "to": 8}])
    assert list(tmp_path.iterdir()) == []


def test_the_scorecard(net, program, data, tmp_path):
    int8 = quantize(net, dataset=data)
    export(int8, tmp_path / "a", dataset=data, labels=LABELS)
    report = scorecard(int8.parent, tmp_path / "a", data, batch_sizes=(1, 4), labels=LABELS)
    assert report.ok
    assert {r.metric for r in report.rows} == {
        "accuracy", "size", "latency, batch 1", "latency, batch 4", "peak memory", "parity, top-1 agreement",
        "parity, largest difference",
    }  # fmt: skip
    assert report["accuracy"].before == 1.0
    assert report["accuracy"].after > 0.9
    assert report["accuracy"].after == report["parity, top-1 agreement"].after
    assert report["size"].after < report["size"].before
    assert report["peak memory"].after < report["peak memory"].before
    assert [c.name for c in report.checks] == ["runs without torch"]
    matrix = next(p for p in report.plots if p.kind == "matrix")
    assert sum(map(sum, matrix.series["counts"])) == 48
    assert {p.kind for p in report.plots} == {"histogram", "scatter", "matrix"}
    json.dumps(report.to_dict())
    with pytest.raises(InputError, match="the dataset is empty"):
        scorecard(program, tmp_path / "a", [])
    with pytest.raises(InputError, match="one input tensor, class indices"):
        scorecard(program, tmp_path / "a", [torch.randn(2, 1, 8, 8)])


def test_the_file_passes_the_onnx_checker_in_full(program, tmp_path):
    export(program, tmp_path / "net.onnx")
    onnx.checker.check_model(str(tmp_path / "net.onnx"), full_check=True)


BLOCKED = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "onnx", "scipy", "sklearn", "safetensors"):
            raise ImportError(f"{name} is blocked")
sys.meta_path.insert(0, Block())
import numpy as np
from deepseek_r1.runtime import load
predictor = load(sys.argv[1])
x = np.load(sys.argv[2])
print(",".join(predictor.predict(x)))
"""


def test_an_artifact_answers_where_torch_cannot_be_imported(program, net, data, tmp_path):
    export(program, tmp_path / "a", dataset=data, labels=LABELS)
    x, y = data[0]
    np.save(tmp_path / "x.npy", x.numpy())
    command = [sys.executable, "-c", BLOCKED, str(tmp_path / "a"), str(tmp_path / "x.npy")]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip().split(",") == [str(i) for i in y.tolist()]
