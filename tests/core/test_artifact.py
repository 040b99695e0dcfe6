"""Artifacts: whole ones open, all others are refused by name, and a failed write loses nothing."""

from __future__ import annotations

import contextlib
import errno
import json
import resource
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from deepseek_r1.core import ArtifactError, Manifest, Report, TensorSpec, artifact, open_artifact, write_artifact


def _manifest(name: str = "net", **more) -> Manifest:
    spec = TensorSpec(name="x", dtype="float32", shape=("batch", 1, 8, 8))
    out = TensorSpec(name="y", dtype="float32", shape=("batch", 10))
    settings = {
        "labels": tuple("0123456789"), "preprocessing": ({"op": "scale", "factor": 0.0625},),
        "hardware": {"cpu": "X"}, "versions": {"torch": "2"}, "extra": {"metric": "accuracy"},
    }  # fmt: skip
    return Manifest(
        name=name, engine="onnxruntime", precision="int8", model_file="model.onnx",
        inputs=(spec,), outputs=(out,), **(settings | more),
    )  # fmt: skip


def _files(folder: Path, data: bytes = b"model" * 100) -> list[Path]:
    folder.mkdir(exist_ok=True)
    (folder / "model.onnx").write_bytes(data)
    (folder / "labels.txt").write_text("a\nb\n")
    return [folder / "model.onnx", folder / "labels.txt"]


def _report() -> Report:
    report = Report("made")
    report.add("accuracy", 0.99)
    return report


@pytest.fixture
def saved(tmp_path) -> Path:
    write_artifact(tmp_path / "a", _manifest("old"), _files(tmp_path / "in"), _report())
    return tmp_path / "a"


def _edit(root: Path, change, *, sign: bool = True) -> None:
    """Alter the manifest; with `sign`, as a forger who also computes the digest."""
    path = root / artifact.MANIFEST
    data = json.loads(path.read_text())
    change(data)
    if sign:
        data["digest"] = artifact.digest(data)
    path.write_text(json.dumps(data))


def test_round_trip(saved):
    opened = open_artifact(saved)
    assert opened.manifest == _manifest("old")
    assert opened.model_path.read_bytes() == b"model" * 100
    assert opened.report["accuracy"].after == 0.99
    assert opened.size_bytes == sum(f.stat().st_size for f in saved.iterdir())
    assert artifact.is_artifact(saved)
    assert sorted(f.name for f in saved.iterdir()) == ["labels.txt", "manifest.json", "model.onnx", "report.json"]


def test_it_can_be_moved(saved, tmp_path):
    shutil.move(saved, tmp_path / "elsewhere")
    assert open_artifact(tmp_path / "elsewhere").manifest.name == "old"


@pytest.mark.parametrize("name", ["model.onnx", "labels.txt", "report.json"])
def test_a_truncated_file_is_named(saved, name):
    path = saved / name
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ArtifactError, match=rf"{name} is truncated"):
        open_artifact(saved)


@pytest.mark.parametrize("name", ["model.onnx", "labels.txt", "report.json"])
def test_an_altered_file_is_named(saved, name):
    path = saved / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(ArtifactError, match=rf"{name} was altered.*SHA-256"):
        open_artifact(saved)
    path.write_bytes(bytes(data) + b"more")
    with pytest.raises(ArtifactError, match=rf"{name} is altered"):
        open_artifact(saved)


def test_a_missing_file_is_named(saved):
    (saved / "labels.txt").unlink()
    with pytest.raises(ArtifactError, match=r"labels\.txt is missing"):
        open_artifact(saved)


def test_a_future_version_is_refused(saved):
    _edit(saved, lambda d: d.update(schema_version=artifact.SCHEMA_VERSION + 1))
    with pytest.raises(ArtifactError, match=f"schema version {artifact.SCHEMA_VERSION + 1}.*Update deepseek-r1"):
        open_artifact(saved)


def test_an_edited_manifest_is_refused(saved):
    _edit(saved, lambda d: d.update(precision="fp32"), sign=False)
    with pytest.raises(ArtifactError, match="digest"):
        open_artifact(saved)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"kind": "something else"}'])
def test_a_damaged_manifest_is_refused(saved, text):
    (saved / artifact.MANIFEST).write_text(text)
    with pytest.raises(ArtifactError, match=r"manifest\.json"):
        open_artifact(saved)


@pytest.mark.parametrize("name", ["../in/model.onnx", "/etc/passwd", "sub/x", "..", ".", ""])
def test_a_path_out_of_the_directory_is_refused(saved, name):
    def point_outside(data):
        data["files"][name] = data["files"].pop("labels.txt")

    _edit(saved, point_outside)
    with pytest.raises(ArtifactError, match="outside the artifact"):
        open_artifact(saved)


def test_a_model_file_that_was_not_checked_is_refused(saved):
    _edit(saved, lambda d: d.update(model_file="../in/model.onnx"))
    with pytest.raises(ArtifactError, match="not among its files"):
        open_artifact(saved)


def test_a_link_is_refused(saved, tmp_path):
    (saved / "model.onnx").unlink()
    (saved / "model.onnx").symlink_to(tmp_path / "in" / "model.onnx")
    with pytest.raises(ArtifactError, match=r"model\.onnx is missing or no plain file"):
        open_artifact(saved)


@pytest.mark.parametrize("field", ["inputs", "engine", "labels"])
def test_a_manifest_without_a_field_is_refused(saved, field):
    _edit(saved, lambda d: d.pop(field))
    with pytest.raises(ArtifactError, match=field):
        open_artifact(saved)


@pytest.mark.parametrize("change", [{"files": None}, {"files": [1]}, {"files": {"model.onnx": {}}}, {"inputs": [3]}])
def test_a_manifest_of_wrong_types_is_refused(saved, change):
    _edit(saved, lambda d: d.update(change))
    with pytest.raises(ArtifactError):
        open_artifact(saved)


def test_nothing_there(tmp_path):
    with pytest.raises(ArtifactError, match="does not exist"):
        open_artifact(tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ArtifactError, match=r"no manifest\.json"):
        open_artifact(tmp_path / "empty")


def test_other_peoples_directories_are_not_replaced(tmp_path):
    target = tmp_path / "photos"
    target.mkdir()
    (target / "cat.png").write_text("meow")
    with pytest.raises(ArtifactError, match="other things"):
        write_artifact(target, _manifest(), _files(tmp_path / "in"), _report())
    assert (target / "cat.png").read_text() == "meow"


def test_the_model_file_must_be_given(tmp_path):
    with pytest.raises(ArtifactError, match=r"model\.onnx"):
        write_artifact(tmp_path / "a", _manifest(), _files(tmp_path / "in")[1:], _report())
    assert not (tmp_path / "a").exists()


@contextlib.contextmanager
def _full_disk(monkeypatch, how: str):
    if how == "kernel":
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        return

    def half(source, target):
        Path(target).write_bytes(Path(source).read_bytes()[:10])
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copyfile", half)
        yield


@pytest.mark.parametrize("how", ["kernel", "ENOSPC"])
def test_a_full_disk_leaves_the_previous_artifact(saved, tmp_path, monkeypatch, how):
    files = _files(tmp_path / "in", b"z" * 50_000)
    before = sorted(p.name for p in tmp_path.iterdir())
    with pytest.raises(OSError, match=r"No space|too large"), _full_disk(monkeypatch, how):
        write_artifact(saved, _manifest("new"), files, _report())
    assert open_artifact(saved).manifest.name == "old"
    assert sorted(p.name for p in tmp_path.iterdir()) == before, "no half-written directory stays"
    write_artifact(saved, _manifest("new"), files, _report())
    assert open_artifact(saved).manifest.name == "new"


_KILLED = """
import os, shutil, sys, time
from pathlib import Path
from deepseek_r1.core import Manifest, Report, write_artifact

target, source, moment = sys.argv[1:]
def stop():
    print("now", flush=True)
    time.sleep(60)
def copy(a, b):
    Path(b).write_bytes(Path(a).read_bytes()[:10])
    stop()
real = os.replace
def replace(a, b):
    if Path(b) == Path(target):
        stop()
    real(a, b)
if moment == "copy":
    shutil.copyfile = copy
else:
    os.replace = replace
manifest = Manifest(name="new", engine="e", precision="fp32", model_file="model.onnx", inputs=(), outputs=())
write_artifact(target, manifest, [Path(source)], Report("r"))
"""


@pytest.mark.parametrize("moment", ["copy", "rename"])
def test_a_kill_leaves_the_previous_artifact(saved, tmp_path, moment):
    command = [sys.executable, "-c", textwrap.dedent(_KILLED), str(saved), str(tmp_path / "in" / "model.onnx"), moment]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    assert child.stdout.readline() == "now\n"
    child.send_signal(signal.SIGKILL)
    child.wait()
    child.stdout.close()
    assert saved.exists() == (moment == "copy"), "the kill came between the two renames"
    assert open_artifact(saved).manifest.name == "old"
    write_artifact(saved, _manifest("new"), [tmp_path / "in" / "model.onnx"], _report())
    assert open_artifact(saved).manifest.name == "new"
