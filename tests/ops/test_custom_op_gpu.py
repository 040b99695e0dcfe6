"""Operators on a GPU: built here with nvcc, or the libraries `<name>_cuda.so` beside this file."""

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
            about = next(about for about in ops.describe(ops.libraries()[name]) if about.name == name)
            if "cuda" not in about.devices:
                pytest.skip(f"this process has {name!r} without CUDA from another test; run this file alone")
            return getattr(ops, class_name(name))
        source = next(p for p in (EXAMPLES / f"{name}.cc", HERE / "rows.cc") if p.is_file())
        prebuilt = HERE / f"{source.stem}_cuda.so"
        if not prebuilt.is_file():
            prebuilt = tmp_path_factory.getbasetemp() / prebuilt.name
        if not prebuilt.is_file():
            if shutil.which("nvcc") is None:
                pytest.skip(f"no nvcc on the PATH, and no {prebuilt.name} beside the test")
            march = "sm_{}{}".format(*torch.cuda.get_device_capability())
            ops.build_op(source, prebuilt, cuda=True, march=march)
        return ops.register_custom_op(name, prebuilt)

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
@pytest.mark.parametrize("shape", [(7, 33), (5, 4096), (300, 129), (3, 1), (2, 20_000), (0, 8)])
def test_row_reductions(on_gpu, shape, dtype):
    x, gate = torch.randn(2, *shape, device="cuda").to(dtype)
    expected = gated_norm_of(x.double(), gate.double())
    y = on_gpu("gated_norm")()(x, gate)
    torch.testing.assert_close(y.double(), expected, rtol=4 * max(torch.finfo(dtype).eps, 1e-6), atol=1e-5)


#: Rows that fit into a block's registers, that just fit, that do not, and that cannot be read four at a time.
SHAPES = [(7, 4), (5, 36), (3, 2, 1000), (9, 4096), (2, 16_384), (2, 16_388), (5, 33)]
LAYOUTS = {
    "contiguous": lambda t: t,
    "rows apart": lambda t: torch.cat([t, t], -1)[..., : t.shape[-1]],
    "unaligned": lambda t: torch.cat([t, t], -1)[..., 1 : 1 + t.shape[-1]],
    "columns": lambda t: t.transpose(0, -1).contiguous().transpose(0, -1),
    "one row": lambda t: t[:1].expand_as(t),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES)
def test_rows_of_which_a_part_is_kept(on_gpu, shape, layout, dtype):
    x, other = (LAYOUTS[layout](t) for t in torch.randn(2, *shape, device="cuda").to(dtype))
    weight, bias = torch.randn(2, shape[-1], device="cuda").to(dtype)

    def close(found, expected):
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(found.double(), expected, rtol=8 * max(eps, 1e-6), atol=8 * max(eps, 1e-6))

    wide = x.double()
    close(on_gpu("gpu_softmax")()(x), wide.softmax(-1))
    expected = torch.nn.functional.layer_norm(wide, shape[-1:], weight.double(), bias.double(), 1e-5)
    close(on_gpu("gpu_layer_norm")()(x, weight, bias), expected)
    look = on_gpu("gpu_lookalikes")()
    close(look(x, other), wide.exp() / other.double().exp().sum(-1, keepdim=True))
    close(look(x, x), wide.softmax(-1))
    close(look(x[..., :1], x), (wide[..., :1].exp() / wide.exp().sum(-1, keepdim=True)).expand_as(wide))
    close(look(x, x[..., :1]), wide.exp() / wide[..., :1].exp())


def test_gradients_of_rows_of_which_a_part_is_kept(on_gpu):
    x, other = torch.randn(2, 3, 8, device="cuda", dtype=torch.float64)
    x.requires_grad_(), other.requires_grad_()
    assert torch.autograd.gradcheck(on_gpu("gpu_softmax")(), [x])
    assert torch.autograd.gradcheck(on_gpu("gpu_lookalikes")(), [x, other])
    single = x.detach().float().requires_grad_()
    loss = on_gpu("gpu_softmax")()(single).square().sum()
    (expected,) = torch.autograd.grad(single.softmax(-1).square().sum(), single)
    torch.testing.assert_close(torch.autograd.grad(loss, single)[0], expected)


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
