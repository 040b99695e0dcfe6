"""The pool of recorded shapes, with a recorder that needs no device; and on a device, the engine itself."""

import threading

import pytest
import torch
from torch import nn

from deepseek_r1.engines import compile_program
from deepseek_r1.engines._cudagraph import SHAPES, CudaGraphEngine, ShapePool
from deepseek_r1.engines._tensorrt import TensorRtEngine
from deepseek_r1.engines.conformance import check_engine
from deepseek_r1.graph import capture

needs_device = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


class Recorder:
    """Records as a CUDA graph does: static inputs, one buffer of answers, replayed without the function."""

    def __init__(self):
        self.shapes, self.replays = [], 0

    def __call__(self, run, leaves):
        self.shapes.append(tuple(leaves[0].shape))
        inputs = [v.clone() for v in leaves]

        def replay(given):
            self.replays += 1
            for static, value in zip(inputs, given, strict=True):
                static.copy_(value)
            return [v.clone() for v in run(inputs)]

        return replay


def doubled(leaves):
    return [leaves[0] * 2]


def test_each_shape_is_recorded_once_and_the_number_is_limited():
    recorder, plain = Recorder(), []

    def run(leaves):
        plain.append(tuple(leaves[0].shape))
        return doubled(leaves)

    pool = ShapePool(run, recorder, 2)
    for rows in (1, 2, 1, 3, 2, 3, 1):
        x = torch.randn(rows, 4)
        assert torch.equal(pool([x])[0], x * 2)
    assert recorder.shapes == [(1, 4), (2, 4)]
    assert recorder.replays == 5
    assert plain.count((3, 4)) == 2


def test_types_and_plain_values_are_part_of_the_shape():
    recorder = Recorder()
    pool = ShapePool(doubled, recorder, 8)
    for x in (torch.ones(2), torch.ones(2, dtype=torch.int64), torch.ones(2)):
        assert pool([x])[0].dtype == x.dtype
    assert len(recorder.shapes) == 2


def test_answers_stay_and_threads_do_not_mix():
    pool = ShapePool(doubled, Recorder(), 4)
    first = pool([torch.ones(3)])[0]
    pool([torch.zeros(3)])
    assert torch.equal(first, torch.full((3,), 2.0))
    wrong = []

    def work(value):
        for _ in range(200):
            if not torch.equal(pool([torch.full((3,), value)])[0], torch.full((3,), 2 * value)):
                wrong.append(value)

    threads = [threading.Thread(target=work, args=(float(i),)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_recording_that_fails_leaves_no_trace():
    attempts = []

    def record(run, leaves):
        attempts.append(1)
        if len(attempts) == 1:
            raise RuntimeError("out of memory")
        return run

    pool = ShapePool(doubled, record, 4)
    with pytest.raises(RuntimeError, match="out of memory"):
        pool([torch.ones(2)])
    assert torch.equal(pool([torch.ones(2)])[0], torch.full((2,), 2.0))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_device(residual):
    assert CudaGraphEngine().unavailable() == "PyTorch sees no CUDA device"
    assert "this engine runs on CUDA" in CudaGraphEngine().unsupported(residual)
    assert "pip install tensorrt" in TensorRtEngine().unavailable()
    assert "this engine runs on CUDA" in TensorRtEngine().unsupported(residual)


@pytest.fixture(scope="module")
def on_device():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 64, 10)).cuda()
    return capture(net, torch.randn(2, 3, 8, 8, device="cuda"))


@pytest.mark.gpu
@needs_device
@pytest.mark.parametrize("name", ["eager", "inductor", "cudagraph"])
def test_conforms_on_a_device(name):
    report = check_engine(name, device="cuda")
    assert report.ok, [(c.name, c.detail) for c in report.failed]
    assert [what for what, _ in report.skipped] == ([] if name == "eager" else ["quantised"])


@pytest.mark.gpu
@needs_device
@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("name", ["inductor", "cudagraph"])
def test_on_a_device(on_device, name, precision):
    from deepseek_r1.engines import ENGINES

    engine = ENGINES.get(name)()
    assert engine.unsupported(on_device) == ""
    assert engine.precisions(on_device) == ["fp32", "bf16", "fp16"]
    run = compile_program(engine, on_device, precision)
    error = {"fp32": 1e-4, "fp16": 1e-2, "bf16": 5e-2}[precision]
    kept = []
    # More shapes than are kept as graphs, each twice, with answers looked at only afterwards.
    for rows in [*range(SHAPES + 3), *range(SHAPES + 3)]:
        x = torch.randn(rows, 3, 8, 8, device="cuda")
        kept.append((x, run([x])[0]))
    with torch.no_grad():
        for x, answer in kept:
            assert answer.dtype == torch.float32
            assert torch.allclose(answer, on_device(x), atol=error)


@pytest.mark.gpu
@needs_device
def test_streams_and_threads_on_a_device(on_device):
    run = compile_program(CudaGraphEngine(), on_device)
    wrong = []

    def work(seed):
        generator = torch.Generator(device="cuda").manual_seed(seed)
        with torch.no_grad(), torch.cuda.stream(torch.cuda.Stream()):
            for _ in range(30):
                x = torch.randn(2, 3, 8, 8, device="cuda", generator=generator)
                if not torch.allclose(run([x])[0], on_device(x), atol=1e-4):
                    wrong.append(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
