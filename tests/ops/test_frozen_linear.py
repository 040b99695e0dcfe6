"""`frozen_linear`: its values, gradients and what it keeps, against the formula in torch's own operators."""

import gc

import pytest
import torch
from torch import nn

from deepseek_r1.core import InputError
from deepseek_r1.ops import LowRank, cast_weight, compute_dtype, frozen_linear
from deepseek_r1.ops import _frozen_linear as module


def formula(x, w, bias, a, b, scale):
    return x @ w.t() + (0 if bias is None else bias) + scale * (x @ a.t()) @ b.t()


def tensors(dtype=torch.float64, shape=(2, 3), bias=True):
    torch.manual_seed(0)
    x = torch.randn(*shape, 5, dtype=dtype, requires_grad=True)
    w = torch.randn(4, 5, dtype=dtype)
    c = torch.randn(4, dtype=dtype, requires_grad=True) if bias else None
    a, b = (torch.randn(s, dtype=dtype, requires_grad=True) for s in ((2, 5), (4, 2)))
    return x, w, c, a, b


@pytest.mark.parametrize("shape", [(), (3,), (2, 3)])
@pytest.mark.parametrize("bias", [True, False])
def test_gradients_are_those_of_the_formula(shape, bias):
    x, w, c, a, b = tensors(shape=shape, bias=bias)
    inputs = [t for t in (x, c, a, b) if t is not None]

    def call(*given):
        rest = list(given)
        x, c = rest.pop(0), rest.pop(0) if bias else None
        return frozen_linear(x, cast_weight, (w,), c, LowRank(*rest, 0.7))

    assert torch.autograd.gradcheck(call, inputs)
    y, expected = call(*inputs), formula(x, w, c, a, b, 0.7)
    torch.testing.assert_close(y, expected)
    seed = torch.randn_like(y)
    for mine, theirs in zip(
        torch.autograd.grad(y, inputs, seed), torch.autograd.grad(expected, inputs, seed), strict=True
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("trained", ["x", "a", "b", "bias"])
def test_only_wanted_gradients_are_computed(trained):
    x, w, c, a, b = tensors()
    for name, t in {"x": x, "bias": c, "a": a, "b": b}.items():
        t.requires_grad_(name == trained)
    frozen_linear(x, cast_weight, (w,), c, LowRank(a, b, 0.7)).sum().backward()
    wanted = {"x": x, "bias": c, "a": a, "b": b}[trained]
    mine, wanted.grad = wanted.grad, None
    formula(x, w, c, a, b, 0.7).sum().backward()
    torch.testing.assert_close(mine, wanted.grad)


def test_without_a_pair_it_is_a_linear_layer():
    x, w, c, *_ = tensors()
    assert torch.autograd.gradcheck(lambda x, c: frozen_linear(x, cast_weight, (w,), c), (x, c))


def test_dropout_hits_the_pair_alone_and_its_gradient_fits():
    torch.manual_seed(0)
    x = torch.randn(64, 32, requires_grad=True)
    w, a, b = torch.zeros(8, 32), torch.randn(4, 32, requires_grad=True), torch.randn(8, 4, requires_grad=True)
    y = frozen_linear(x, cast_weight, (w,), None, LowRank(a, b, 2.0, 0.5))
    seed = torch.randn_like(y)
    y.backward(seed)
    # Which inputs were dropped shows in the input's gradient, since the base weight is zero.
    mask = x.grad != 0
    assert 0.4 < mask.float().mean() < 0.6
    used = (x.detach() * mask * 2).requires_grad_()
    expected = formula(used, w, None, a, b, 2.0)
    torch.testing.assert_close(y, expected)
    mine = a.grad.clone(), b.grad.clone()
    a.grad = b.grad = None
    expected.backward(seed)
    torch.testing.assert_close(mine, (a.grad, b.grad))
    torch.testing.assert_close(x.grad, used.grad * mask * 2)


def test_autocast_decides_the_type():
    x, w, c, a, b = (t.detach().float().requires_grad_(t.requires_grad) for t in tensors())
    with torch.autocast("cpu", torch.bfloat16):
        y = frozen_linear(x, cast_weight, (w,), c, LowRank(a, b, 0.7))
        assert compute_dtype(x) == torch.bfloat16
        assert compute_dtype(x.double()) == torch.float64
    assert y.dtype == torch.bfloat16
    y.float().square().sum().backward()
    assert {t.grad.dtype for t in (x, c, a, b)} == {torch.float32}
    expected = formula(x, w, c, a, b, 0.7)
    torch.testing.assert_close(y.float(), expected, rtol=0.03, atol=0.03)
    for t, g in zip((x, c, a, b), torch.autograd.grad(expected.square().sum(), (x, c, a, b)), strict=True):
        torch.testing.assert_close(t.grad, g, rtol=0.05, atol=0.3)


def kept_bytes(call):
    """Bytes of distinct tensors that autograd keeps for the backward pass of what `call` gives."""
    seen = {}

    def pack(t):
        seen[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        call()
    return sum(seen.values())


def test_what_is_kept_under_autocast():
    """The query, key and value layers' common input once in half precision, and no copy of a weight."""
    n, d, r = 128, 64, 4
    # No leaf, as activations are none: autocast remembers what it cast leaves to.
    x = torch.randn(n, d, requires_grad=True) * 1
    layers = [(torch.randn(d, d), torch.randn(r, d, requires_grad=True), torch.randn(d, r, requires_grad=True))
              for _ in range(3)]  # fmt: skip

    def ours():
        with torch.autocast("cpu", torch.bfloat16):
            return [frozen_linear(x, cast_weight, (w,), None, LowRank(a, b, 1.0)) for w, a, b in layers]

    def plain():
        f = nn.functional.linear
        with torch.autocast("cpu", torch.bfloat16):
            return [f(x, w) + f(f(x, a), b) for w, a, b in layers]

    weights, pairs = 3 * d * d * 4, 3 * 2 * d * r * 4
    assert kept_bytes(ours) == weights + pairs + n * d * 2 + 3 * n * r * 2
    # What torch keeps of its own accord: a half-precision copy of each weight, and of the input for each layer.
    assert kept_bytes(plain) >= 3 * d * d * 2 + 3 * n * d * 2
    outputs = ours()
    assert len({id(o) for o in outputs}) == 3


def test_a_shared_cast_is_not_kept_alive_and_not_stale():
    x = torch.ones(4, 5, requires_grad=True)
    w, a, b = torch.ones(3, 5), torch.ones(1, 5, requires_grad=True), torch.ones(3, 1, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        first = frozen_linear(x, cast_weight, (w,), None, LowRank(a, b, 1.0))
        with torch.no_grad():
            x.mul_(2)
        second = frozen_linear(x, cast_weight, (w,), None, LowRank(a, b, 1.0))
    torch.testing.assert_close(second, 2 * first)
    del first, second, x
    gc.collect()
    assert module._last.source() is None
    assert module._last.result() is None


def test_a_changed_weight_is_noticed():
    x, w, c, a, b = tensors()
    y = frozen_linear(x, cast_weight, (w,), c, LowRank(a, b, 1.0))
    w.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_checkpointing_and_compiling_give_the_same():
    x, w, c, a, b = tensors()

    def call(x):
        return frozen_linear(x, cast_weight, (w,), c, LowRank(a, b, 0.7))

    expected = torch.autograd.grad(call(x).square().sum(), (x, a, b))
    again = torch.utils.checkpoint.checkpoint(call, x, use_reentrant=False)
    torch.testing.assert_close(torch.autograd.grad(again.square().sum(), (x, a, b)), expected)
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(torch.autograd.grad(compiled(x).square().sum(), (x, a, b)), expected)


def test_transforms_of_torch_func_see_through_it():
    x, w, _, a, b = (None if t is None else t.detach() for t in tensors(shape=(6,)))

    def loss(a, row):
        return frozen_linear(row, cast_weight, (w,), None, LowRank(a, b, 1.0)).square().sum()

    each = torch.func.vmap(torch.func.grad(loss), (None, 0))(a, x)
    whole = torch.func.grad(lambda a: sum(loss(a, row) for row in x))(a)
    torch.testing.assert_close(each.sum(0), whole)


def test_integers_are_refused():
    with pytest.raises(InputError, match="floating inputs, given int64"):
        frozen_linear(torch.zeros(1, 5, dtype=torch.long), cast_weight, (torch.zeros(4, 5),))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_step_on_a_gpu_waits_for_nothing():
    x = torch.randn(64, 128, device="cuda", requires_grad=True)
    w = torch.randn(32, 128, device="cuda")
    a = torch.randn(4, 128, device="cuda", requires_grad=True)
    b = torch.randn(32, 4, device="cuda", requires_grad=True)
    with torch.autocast("cuda", torch.bfloat16):
        frozen_linear(x, cast_weight, (w,), None, LowRank(a, b, 1.0, 0.1)).sum().backward()
        torch.cuda.set_sync_debug_mode("error")
        try:
            frozen_linear(x, cast_weight, (w,), None, LowRank(a, b, 1.0, 0.1)).sum().backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
