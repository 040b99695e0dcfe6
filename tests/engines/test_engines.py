"""The engines that run outside of PyTorch on a CPU, on the same programs: answers, integers, another process."""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

from deepseek_r1.engines import ENGINES, compile_program
from deepseek_r1.engines.conformance import check_engine
from deepseek_r1.graph import capture
from deepseek_r1.quantization import quantize
from deepseek_r1.runtime import RUNTIMES

ENGINES_HERE = ("onnxruntime", "openvino", "executorch")


def engine(name):
    found = ENGINES.get(name)()
    if reason := found.unavailable():
        pytest.skip(reason)
    return found


def sqnr(signal, other):
    noise = ((signal - other) ** 2).sum()
    return float(10 * torch.log10((signal**2).sum() / noise)) if noise else float("inf")


@pytest.mark.parametrize("name", ENGINES_HERE)
def test_conforms(name):
    engine(name)
    report = check_engine(name)
    assert report.ok, [(c.name, c.detail) for c in report.failed]
    assert not report.skipped


@pytest.mark.parametrize("name", ENGINES_HERE)
def test_quantised_layers_run_in_integers(name, quantised, tmp_path):
    one = engine(name)
    one.build(quantised, tmp_path, "int8")
    assert one.integer_kernels(tmp_path) == 5
    x = torch.randn(8, 3, 10, 10, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        own, floats = quantised(x), quantised.parent(x)
    (answer,) = one.open(tmp_path, lambda: quantised)([x])
    assert sqnr(own, answer) > 30
    assert sqnr(floats, answer) > sqnr(floats, own) - 1


@pytest.mark.parametrize("name", ENGINES_HERE)
def test_float_programs_have_no_integer_kernels(name, residual, tmp_path):
    one = engine(name)
    one.build(residual, tmp_path, "fp32")
    assert one.integer_kernels(tmp_path) == 0


@pytest.mark.parametrize("name", ENGINES_HERE)
def test_two_free_sizes(name, attention, attention_inputs):
    run = compile_program(engine(name), attention)
    for batch, length in ((2, 6), (1, 1), (3, 2), (5, 16), (1, 9), (4, 40), (0, 6)):
        inputs = attention_inputs(batch, length)
        with torch.no_grad():
            expected = attention(*inputs)
        (answer,) = run(inputs)
        assert answer.shape == expected.shape
        assert torch.allclose(answer, expected, rtol=1e-4, atol=1e-5), (batch, length)


def test_bfloat16_is_close_and_keeps_the_types(attention, attention_inputs):
    run = compile_program(engine("openvino"), attention, "bf16")
    inputs = attention_inputs(3, 10)
    with torch.no_grad():
        expected = attention(*inputs)
    (answer,) = run(inputs)
    assert answer.dtype == torch.float32
    assert 25 < sqnr(expected, answer) < 70


def test_folders_open_in_another_process(quantised, tmp_path):
    """Files are all that is needed: the program is asked for only by inputs that the engine cannot take."""
    names = [n for n in ENGINES_HERE if not ENGINES.get(n)().unavailable()]
    for name in names:
        (tmp_path / name).mkdir()
        ENGINES.get(name)().build(quantised, tmp_path / name, "int8")
    code = f"""
import json, pathlib, torch
from deepseek_r1.engines import ENGINES
def program():
    raise AssertionError("the program is not needed")
x = torch.arange(600.0).reshape(2, 3, 10, 10) / 600
opened = {{name: ENGINES.get(name)().open(pathlib.Path({str(tmp_path)!r}) / name, program) for name in {names!r}}}
print(json.dumps({{name: run([x])[0].tolist() for name, run in opened.items()}}))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    with torch.no_grad():
        expected = quantised(torch.arange(600.0).reshape(2, 3, 10, 10) / 600)
    answers = json.loads(done.stdout.splitlines()[-1])
    assert list(answers) == names
    for answer in answers.values():
        assert sqnr(expected, torch.tensor(answer)) > 25


class Counter(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, x):
        self.calls[0].add_(1)
        return x * self.calls


class Cache(torch.nn.Module):
    def forward(self, x, cache):
        cache[:, 1:3].copy_(x)
        return cache.sum(1)


class InPlace(torch.nn.Module):
    def forward(self, x):
        return (x + 1).relu_().view(-1, 1).mul_(2)


@pytest.mark.parametrize("name", ["inductor", *ENGINES_HERE])
def test_state_outside_of_the_graph_is_refused(name):
    one = ENGINES.get(name)()
    assert "it changes its buffers ['calls']" in one.unsupported(capture(Counter(), torch.randn(2, 3)))
    inputs = (torch.randn(2, 2), torch.zeros(2, 4))
    assert "it changes its inputs ['cache'] in place" in one.unsupported(capture(Cache(), inputs))
    assert one.unsupported(capture(InPlace(), torch.randn(2, 3))) == ""


@pytest.mark.parametrize("name", ["onnxruntime", "openvino"])
def test_weights_beyond_one_file(name, residual, tmp_path, monkeypatch):
    """As if the limit of an ONNX file were a hundred bytes: the weights go into a file of their own."""
    from deepseek_r1.engines import _onnx

    one = engine(name)
    monkeypatch.setattr(_onnx, "_LIMIT_BYTES", 100)
    one.build(residual, tmp_path, "fp32")
    files = {f.name: f.stat().st_size for f in tmp_path.iterdir()}
    assert ("weights.bin" in files) == (name == "onnxruntime")
    assert sum(files.values()) < residual.parameters_bytes + 200_000
    x = torch.randn(2, 3, 10, 10, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.allclose(one.open(tmp_path, lambda: residual)([x])[0], residual(x), atol=1e-5)


@pytest.mark.parametrize("name", ["onnxruntime", "openvino"])
def test_threads_are_pytorchs(name, residual, tmp_path, monkeypatch):
    one, asked = engine(name), []
    one.build(residual, tmp_path, "fp32")
    make = RUNTIMES.get(name)
    monkeypatch.setitem(RUNTIMES._loaded, name, lambda *a, **k: asked.append(k["threads"]) or make(*a, **k))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    one.open(tmp_path, lambda: residual)
    assert asked == [3]


def test_sizes_beyond_the_bounds_are_answered_by_pytorch(residual):
    asked = []
    one = engine("executorch")
    with tempfile.TemporaryDirectory() as folder:
        one.build(residual, Path(folder), "fp32")
        run = one.open(Path(folder), lambda: asked.append(1) or residual)
    for rows in (16, 17, 40):
        x = torch.randn(rows, 3, 10, 10)
        with torch.no_grad():
            assert torch.allclose(run([x])[0], residual(x), atol=1e-5)
        assert asked == ([] if rows == 16 else [1])


def test_what_xnnpack_has_no_integer_form_for(tmp_path):
    """A convolution whose result stays float, behind a pooling."""
    one = engine("executorch")
    torch.manual_seed(0)
    layers = [torch.nn.Conv2d(3, 8, 7, stride=2, padding=3), torch.nn.ReLU(), torch.nn.MaxPool2d(3, 2, 1)]
    program = quantize(torch.nn.Sequential(*layers, torch.nn.Conv2d(8, 2, 1)), dataset=[torch.randn(8, 3, 32, 32)])
    stored = [n for n in program.exported.graph.nodes if "quantize_per_tensor" in n.name and "de" not in n.name[:2]]
    assert len({n.args[1] for n in stored}) == 2, "of the image, and of the convolution and what is pooled from it"
    one.build(program, tmp_path, "int8")
    assert one.integer_kernels(tmp_path) == 1
    x = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        assert sqnr(program(x), one.open(tmp_path, lambda: program)([x])[0]) > 25
