"""AOTInductor: one compile for each thing that is checked, because each takes seconds."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from deepseek_r1.engines import ENGINES, compile_program
from deepseek_r1.engines._inductor import InductorEngine, retarget
from deepseek_r1.engines.conformance import check_engine
from deepseek_r1.graph import capture

needs_compiler = pytest.mark.skipif(bool(InductorEngine().unavailable()), reason=InductorEngine().unavailable())


@pytest.fixture(autouse=True, scope="module")
def own_cache(tmp_path_factory):
    """Compiled kernels of earlier runs must not answer for this one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path_factory.mktemp("inductor")))
        yield


@needs_compiler
def test_conforms():
    report = check_engine("inductor")
    assert report.ok, [(c.name, c.detail) for c in report.failed]
    assert not report.skipped


@needs_compiler
def test_quantised_layers_run_in_integers_and_open_in_another_process(quantised, tmp_path):
    engine = ENGINES.get("inductor")()
    engine.build(quantised, tmp_path, "int8")
    assert engine.integer_kernels(tmp_path) == 5
    code = f"""
import json, pathlib, shutil, torch
from deepseek_r1.engines import ENGINES
folder = pathlib.Path({str(tmp_path)!r})
run = ENGINES.get("inductor")().open(folder, lambda: 1 / 0)
shutil.rmtree(folder)
print(json.dumps(run([torch.arange(600.0).reshape(2, 3, 10, 10) / 600])[0].tolist()))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    with torch.no_grad():
        expected = quantised(torch.arange(600.0).reshape(2, 3, 10, 10) / 600)
    assert torch.allclose(torch.tensor(json.loads(done.stdout.splitlines()[-1])), expected, atol=1e-4)


@needs_compiler
def test_bfloat16_with_two_free_sizes(attention, attention_inputs):
    run = compile_program(InductorEngine(), attention, "bf16")
    for batch, length in ((2, 6), (1, 1), (3, 17), (0, 4)):
        inputs = attention_inputs(batch, length)
        with torch.no_grad():
            expected = attention(*inputs)
        (answer,) = run(inputs)
        assert answer.dtype == torch.float32
        assert answer.shape == expected.shape
        assert torch.allclose(answer, expected, atol=0.03 * float(expected.abs().max()) if batch else 0.0)


@needs_compiler
def test_the_layout_of_inputs_does_not_matter():
    """Captured with transposed inputs, called with sliced and transposed ones."""
    program = capture(torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Tanh()), torch.randn(4, 6).T)
    assert not program.example_inputs[0][0].is_contiguous()
    run = compile_program(InductorEngine(), program)
    for x in (torch.randn(5, 4), torch.randn(4, 5).T, torch.randn(10, 8)[::2, ::2], torch.randn(5, 4).requires_grad_()):
        assert torch.allclose(run([x])[0], program(x), atol=1e-5)


@needs_compiler
def test_two_threads_never_wait_for_each_other_for_ever(tmp_path):
    """Freeing an input lets another thread into the compiled function in the middle of a call."""
    model = torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.Tanh(), torch.nn.Linear(16, 16))
    InductorEngine().build(capture(model, torch.randn(4, 16)), tmp_path, "fp32")
    code = f"""
import pathlib, threading, torch
from deepseek_r1.engines import ENGINES
run = ENGINES.get("inductor")().open(pathlib.Path({str(tmp_path)!r}), lambda: 1 / 0)
answers = []
def work():
    for _ in range(20_000):
        answers.append(run([torch.zeros(4, 16)]))
threads = [threading.Thread(target=work) for _ in range(2)]
[t.start() for t in threads]
[t.join() for t in threads]
print(len(answers))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout == "40000\n", done.stderr


def test_retarget_is_exact(quantised):
    shifted = retarget(quantised)
    x = torch.randn(4, 3, 10, 10, generator=torch.Generator().manual_seed(0)) * 3
    with torch.no_grad():
        assert torch.equal(shifted(x), quantised(x))
    types = {n.args[5] for n in shifted.exported.graph.nodes if "quantize_per_tensor" in str(n.target)}
    assert types == {torch.uint8}
    assert retarget(shifted) is shifted


def test_reasons(residual, monkeypatch):
    engine = InductorEngine()
    assert engine.unsupported(residual) == ""
    assert engine.precisions(residual)[0] == "fp32"
    assert engine.precisions(replace(residual, precision="int8")) == ["int8"]
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert "'no-such-compiler' was not found" in engine.unavailable()
