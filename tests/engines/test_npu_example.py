"""The example of an engine in a package of its own: installed, found by its entry point, held to the same suite."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder with the installed package and its metadata."""
    folder = tmp_path_factory.mktemp("npu")
    shutil.copytree(ROOT / "examples" / "npu_engine", folder / "source")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", "install"]
    options = ["--no-deps", "--no-index", "--no-build-isolation", "--target", str(folder / "site")]
    subprocess.run([*pip, *options, str(folder / "source")], check=True, capture_output=True, timeout=120)
    return folder / "site"


@pytest.fixture(scope="module")
def npu(installed):
    """The package, imported in this process; its entry point is not seen here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(installed))
        import npu_engine
        import npu_engine.compiler
        import npu_engine.machine

        yield npu_engine
    for name in [n for n in sys.modules if n.partition(".")[0] == "npu_engine"]:
        del sys.modules[name]


def test_it_is_found_and_conforms(installed):
    code = """
import json
from deepseek_r1.engines import ENGINES
from deepseek_r1.engines.conformance import check_engine
report = check_engine("npu_sim")
print(json.dumps({"names": ENGINES.names(), "checks": [[c.name, c.passed, c.detail] for c in report.checks],
                  "skipped": report.skipped}))
"""
    # The installed package is in front of whatever else is on the path.
    path = os.pathsep.join([str(installed), str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert "npu_sim" in found["names"]
    assert [c for c in found["checks"] if not c[1]] == []
    names = [c[0] for c in found["checks"]]
    assert "quantised: integer kernels" in names
    assert [n for n in names if n.startswith("quantised: answers")] == [
        f"quantised: answers, batch {b}" for b in (1, 3, 0)
    ]
    assert {name for name, _ in found["skipped"]} == {"cnn", "outputs", "words"}
    assert all("quantise it first" in reason for _, reason in found["skipped"])


def test_tiles_multiply_exactly(npu):
    rng = np.random.default_rng(0)
    for m, k, n in ((1, 1, 1), (16, 16, 16), (17, 40, 5), (3, 100, 33)):
        a, b = (rng.integers(-255, 256, shape, dtype=np.int16) for shape in ((m, k), (k, n)))
        assert np.array_equal(npu.machine.product(a, b), a.astype(np.int64) @ b.astype(np.int64))


def test_scales_become_multiplier_and_shift(npu):
    for factor in (0.9, 1e-6, 0.5, 3.7, 1.0):
        multiplier, shift = npu.compiler.fixed_point(factor)
        assert multiplier <= 2**15
        assert abs(multiplier / 2**shift / factor - 1) < 2**-15
    with pytest.raises(npu.compiler.Refused, match="which its multiplier cannot"):
        npu.compiler.fixed_point(1e9)


class Plain(nn.Module):
    """Two convolutions with strides, a residual addition, a mean and a linear layer."""

    def __init__(self):
        super().__init__()
        self.stem, self.a = nn.Conv2d(3, 20, 3, stride=2), nn.Conv2d(20, 20, 3, padding=1)
        self.head = nn.Linear(20, 7)

    def forward(self, x):
        x = torch.relu(self.stem(x))
        x = torch.relu(x + self.a(x))
        return self.head(x.mean((2, 3)))


def test_a_quantised_network_within_a_step(npu, tmp_path):
    from deepseek_r1.quantization import quantize

    torch.manual_seed(0)
    program = quantize(Plain(), dataset=[torch.randn(16, 3, 9, 9)])
    engine = npu.NpuEngine()
    assert engine.unsupported(program) == ""
    engine.build(program, tmp_path, "int8")
    assert engine.integer_kernels(tmp_path) == 3
    x = torch.randn(4, 3, 9, 9)
    with torch.no_grad():
        expected = program(x)
    (answer,) = engine.open(tmp_path, lambda: program)([x])
    assert answer.shape == expected.shape
    assert float((answer - expected).abs().max()) < 0.03 * float(expected.abs().max())


def test_reasons(npu, residual, quantised, attention):
    unsupported = npu.NpuEngine().unsupported
    assert "quantise it first" in unsupported(residual)
    assert "its convolution has no groups" in unsupported(quantised)
    assert "fixed sizes behind a free batch" in unsupported(replace(attention, precision="int8"))
    assert "is not quantised" in unsupported(replace(residual, precision="int8"))
