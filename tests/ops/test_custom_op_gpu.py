"""The example operators on a GPU: built here with nvcc, or the libraries `<name>_cuda.so` beside this file."""

import shutil

import pytest
import torch

from deepseek_r1 import ops
from deepseek_r1.ops._register import class_name

from .conftest import EXAMPLES, HERE

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.fixture(scope="module")
def on_gpu(tmp_path_factory):
    """A function that gives the registered module of an example, with its CUDA kernels."""

    def module(name):
        if name in ops.libraries():
            (about,) = ops.describe(ops.libraries()[name])
            if "cuda" not in about.devices:
                pytest.skip(f"this process has {name!r} without CUDA from another test; run this file alone")
            return getattr(ops, class_name(name))
        prebuilt = HERE / f"{name}_cuda.so"
        if prebuilt.is_file():
            return ops.register_custom_op(name, prebuilt)
        if shutil.which("nvcc") is None:
            pytest.skip(f"no nvcc on the PATH, and no {prebuilt.name} beside the test")
        out = tmp_path_factory.mktemp("cuda") / prebuilt.name
        march = "sm_{}{}".format(*torch.cuda.get_device_capability())
        return ops.register_custom_op(name, ops.build_op(EXAMPLES / f"{name}.cc", out, cuda=True, march=march))

    return module


def gated_norm_of(x, gate, eps=1e-6):
    y = x * torch.sigmoid(gate)
    return y / torch.sqrt((y * y).mean(-1, keepdim=True) + eps)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1,), (4099,), (33, 1000), (0, 3), (), (2, 3, 4, 5)])
def test_swish(on_gpu, shape, dtype):
    x = (torch.randn(shape, device="cuda") * 8).to(dtype)
    y = on_gpu("swish")()(x)
    expected = torch.nn.functional.silu(x.double())
    torch.testing.assert_close(y.double(), expected, rtol=4 * torch.finfo(dtype).eps, atol=1e-7)


@pytest.mark.parametrize(
    "layout", [lambda t: t.t(), lambda t: t[::2, 1::3], lambda t: t[:1].expand_as(t), lambda t: t[0, 1:]]
)
def test_swish_of_any_layout(on_gpu, layout):
    x = layout(torch.randn(64, 50, device="cuda"))
    torch.testing.assert_close(on_gpu("swish")()(x), torch.nn.functional.silu(x))


def test_the_gradient_is_checked(on_gpu):
    x = torch.randn(3, 5, device="cuda", dtype=torch.float64, requires_grad=True)
    g = torch.randn(5, device="cuda", dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(on_gpu("swish")(), [x])
    assert torch.autograd.gradcheck(on_gpu("gated_norm")(eps=0.1), [x, g])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(7, 33), (5, 4096), (300, 129), (3, 1), (2, 20_000)])
def test_row_reductions(on_gpu, shape, dtype):
    x, gate = torch.randn(2, *shape, device="cuda").to(dtype)
    expected = gated_norm_of(x.double(), gate.double())
    y = on_gpu("gated_norm")()(x, gate)
    torch.testing.assert_close(y.double(), expected, rtol=4 * max(torch.finfo(dtype).eps, 1e-6), atol=1e-5)


def test_on_a_stream_of_its_own_and_in_a_graph(on_gpu):
    op = on_gpu("swish")()
    x = torch.randn(1 << 20, device="cuda")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        y = op(x)
    torch.cuda.current_stream().wait_stream(side)
    torch.testing.assert_close(y, torch.nn.functional.silu(x))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        z = op(x)
    x.copy_(torch.randn_like(x))
    graph.replay()
    torch.testing.assert_close(z, torch.nn.functional.silu(x))


def test_compiled(on_gpu):
    net = torch.nn.Sequential(torch.nn.Linear(16, 16), on_gpu("swish")()).cuda()
    x = torch.randn(8, 16, device="cuda")
    torch.testing.assert_close(torch.compile(net, fullgraph=True)(x), net(x), rtol=1e-4, atol=1e-5)
