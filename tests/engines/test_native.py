"""The engine of this package's own kernels: what it lowers, what it refuses, its manners, in a race and from files."""

import shutil
import tempfile
from pathlib import Path

import pytest
import torch
from torch import nn

from deepseek_r1.core import (
    Budget,
    Float32,
    Int4Dynamic,
    Int4Weight,
    Int8Dynamic,
    Int8Static,
    Int8Weight,
    PluginError,
)
from deepseek_r1.engines import ENGINES, Executable, RaceConfig, optimize
from deepseek_r1.engines._native import retarget
from deepseek_r1.engines.base import compile_program
from deepseek_r1.engines.conformance import _MANNERS, check_engine
from deepseek_r1.graph import capture
from deepseek_r1.quantization import PTQConfig, quantize

FORMATS = [Int8Dynamic(), Int4Dynamic(group_size=32), Int4Dynamic(), Int4Dynamic(group_size=128, symmetric=True)]
pytestmark = pytest.mark.skipif(
    shutil.which("g++") is None and shutil.which("clang++") is None, reason="no g++ or clang++ on the PATH"
)


class Block(nn.Module):
    """A feed-forward block; `out` is called twice."""

    def __init__(self, function):
        super().__init__()
        self.function = function
        self.up, self.down = nn.Linear(128, 256), nn.Linear(256, 128, bias=False)
        self.norm, self.out = nn.LayerNorm(128), nn.Linear(128, 128)

    def forward(self, x):
        x = self.norm(x + self.down(self.function(self.up(x))))
        return self.out(self.out(x)) + 1


@pytest.fixture(scope="module")
def engine():
    return ENGINES.get("native")()


def program_of(fmt, function=nn.functional.gelu, **layers):
    torch.manual_seed(0)
    x = torch.randn(8, 5, 128)
    config = PTQConfig(format=fmt, layers=layers, rounding="nearest")
    return quantize(capture(Block(function).eval(), x), dataset=[x], config=config), x


def operators(program):
    return [str(n.target).removesuffix(".default") for n in retarget(program).exported.graph.nodes if n.op != "output"]


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_answers_are_those_of_the_program(engine, fmt):
    program, x = program_of(fmt)
    assert engine.unsupported(program) == ""
    run = compile_program(engine, program)
    for rows in (8, 1, 3, 0):
        with torch.no_grad():
            expected = program(x[:rows])
        (found,) = run([x[:rows]])
        assert found.shape == expected.shape
        if rows:
            # A value between two steps may fall to either side after the first layer's rounding errors.
            error = (found - expected).square().sum() / expected.square().sum()
            assert float(error) < 1e-6


@pytest.mark.parametrize(
    ("function", "number"),
    [(torch.relu, 1), (nn.functional.gelu, 2), (lambda x: nn.functional.gelu(x, approximate="tanh"), 3),
     (nn.functional.silu, 4), (torch.tanh, 0)],
)  # fmt: skip
def test_layers_and_functions_become_one_operator(engine, function, number):
    program, _ = program_of(Int4Dynamic(), function)
    nodes = list(retarget(program).exported.graph.nodes)
    calls = [n for n in nodes if "int4_dynamic_linear" in str(n.target)]
    assert len(calls) == 4
    assert [n.args[4:5] or (0,) for n in calls] == [(number,), (0,), (0,), (0,)]
    left = [str(n.target) for n in nodes if n.op == "call_function" and n not in calls]
    assert not [t for t in left if "quantize" in t or "linear" in t]
    assert any("tanh" in t for t in left) == (function is torch.tanh)
    # One packed weight for both calls of the layer.
    assert len({n.args[1] for n in calls}) == 3


def test_formats_mix_and_what_is_left_is_torchs(engine):
    program, x = program_of(Int4Dynamic(), up=Int8Dynamic(), down=Float32())
    found = operators(program)
    assert sum("int4_dynamic_linear" in name for name in found) == 2
    assert sum("int8_dynamic_linear" in name for name in found) == 1
    assert sum(name == "aten.linear" for name in found) == 1
    with tempfile.TemporaryDirectory() as folder:
        engine.build(program, Path(folder), program.precision)
        assert engine.integer_kernels(Path(folder)) == 3
        (answer,) = engine.open(Path(folder), lambda: program)([x])
    with torch.no_grad():
        assert float((answer - program(x)).abs().max()) < 1e-2


@pytest.mark.parametrize(
    ("fmt", "reason"),
    [(Int8Static(), "the program has none"), (Int8Weight(), "the program has none"), (Int4Weight(), "has none")],
)
def test_programs_without_such_layers_are_refused(engine, fmt, reason):
    assert reason in engine.unsupported(program_of(fmt)[0])


def test_float_programs_are_refused(engine):
    program = capture(nn.Linear(8, 8), torch.randn(2, 8))
    assert "the program is fp32" in engine.unsupported(program)


def test_without_a_compiler_it_says_what_to_install(engine, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "Install" in engine.unavailable()


def test_kernels_that_do_not_compile_are_an_error_of_the_engine(engine, monkeypatch, tmp_path):
    program, _ = program_of(Int8Dynamic())
    monkeypatch.setattr("deepseek_r1.engines._native.native_problem", lambda: "the disk is full")
    with pytest.raises(PluginError, match="no kernels here: the disk is full"):
        engine.build(program, tmp_path, "int8")


def test_the_suite_of_all_engines():
    report = check_engine("native")
    assert report.ok, [(c.name, c.detail) for c in report.failed]
    # Its models are float, or quantised with fixed ranges: all are refused, with a reason.
    assert {what for what, _ in report.skipped} == {"cnn", "outputs", "words", "quantised"}


@pytest.mark.parametrize("what", _MANNERS)
def test_manners(engine, what):
    program, x = program_of(Int4Dynamic(), up=Int8Dynamic())
    passed, detail = _MANNERS[what](compile_program(engine, program), [x[:3]])
    assert passed, detail


def test_it_races_in_a_child_and_survives_saving(tmp_path):
    program, x = program_of(Int4Dynamic())
    config = RaceConfig(cache=False, rounds=8, seconds=2)
    budget = Budget(accuracy_drop=0.1)  # of random weights in 4 bits
    fast = optimize(program, dataset=[x], budget=budget, engines=["native"], race=config)
    raced = [row.metric for row in fast.report.rows if "native" in row.metric]
    assert any(metric.startswith("compile time, native") for metric in raced)
    assert any(metric.startswith("latency, native") for metric in raced), fast.report.skipped
    run = compile_program(ENGINES.get("native")(), program)
    Executable(program, "native", run, fast.report).save(tmp_path / "saved")
    loaded = Executable.load(tmp_path / "saved")
    assert loaded.engine == "native"
    assert torch.equal(loaded(x), run([x])[0])
