"""The default journey, for real: train, int8, race, export, artifact, scorecard."""

import re
import subprocess
import sys

import numpy as np
import pytest
from sklearn.datasets import load_digits

from deepseek_r1.core import Report, open_artifact
from deepseek_r1.recipes import run_recipe
from deepseek_r1.runtime import load

# The whole run may take longer than other tests on a busy machine.
pytestmark = pytest.mark.timeout(400)

SECOND = "import sys; from deepseek_r1.recipes import run_recipe; run_recipe('digits', out=sys.argv[1])"


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """(report, folder) of one run here, and the folder of a second one that another process makes meanwhile."""
    first, second = tmp_path_factory.mktemp("first"), tmp_path_factory.mktemp("second")
    with subprocess.Popen([sys.executable, "-c", SECOND, str(second)], stderr=subprocess.PIPE, text=True) as child:
        report = run_recipe("digits", out=first)
        _, errors = child.communicate(timeout=350)
    assert child.returncode == 0, errors
    return report, first, second


def test_it_is_right(runs):
    report, _, _ = runs
    assert report.ok, [(c.name, c.detail) for c in report.failed]
    assert report["accuracy"].after >= 0.99
    assert report["accuracy"].before >= 0.99
    assert {"test accuracy", "runs without torch"} <= {c.name for c in report.checks}
    rows = {r.metric for r in report.rows}
    assert {"accuracy", "size", "latency, batch 1", "latency, batch 32", "peak memory"} <= rows
    assert all(r.how for r in report.rows)
    assert len(report.sections) == 4
    assert report.notes[-1].startswith("next: ")


def test_all_files_are_there_and_hold_what_they_say(runs):
    report, folder, _ = runs
    names = {f.name for f in folder.iterdir()}
    assert {"model.onnx", "artifact", "report.json", "report.html"} <= names
    assert not [n for n in names if n.endswith((".tmp", ".old"))]
    again = Report.load(folder / "report.json")
    assert again.to_dict() == report.to_dict()
    page = (folder / "report.html").read_text()
    assert "<svg" in page or "data:image" in page
    outside = re.findall(r'(?:src|href)\s*=\s*["\']?(?!data:|#)([^"\' >]+)', page)
    assert outside == [], "the page must need nothing from elsewhere"
    assert not re.findall(r"@import|url\((?!['\"]?(?:data:|#))", page)
    kinds = {p.kind for section in (report, *report.sections) for p in section.plots}
    assert {"line", "histogram", "scatter", "matrix"} <= kinds


def test_the_artifact_reads_raw_scans(runs):
    report, folder, _ = runs
    predictor = load(folder / "artifact")
    digits = load_digits()
    answers = np.array([int(label) for label in predictor.predict(digits.data)])
    assert (answers == digits.target).mean() > 0.99
    manifest = open_artifact(folder / "artifact").manifest
    assert manifest.labels == tuple("0123456789")
    # What was shipped is what the scorecard judged.
    assert manifest.precision in report.title


def test_the_same_seed_gives_the_same_accuracy_to_the_digit(runs):
    report, first, second = runs
    other = Report.load(second / "report.json")
    assert other["accuracy"].before == report["accuracy"].before
    engines = [open_artifact(folder / "artifact").manifest.precision for folder in (first, second)]
    if engines[0] == engines[1]:
        assert other["accuracy"].after == report["accuracy"].after
    trained = [r.sections[0] for r in (report, other)]
    curves = [next(p for p in t.plots if p.kind == "line").series for t in trained]
    assert curves[0] == curves[1], "the training curves are the same to the bit"
