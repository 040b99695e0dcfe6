"""Values of expressions: dtypes, strides, broadcasting, reductions, attributes, shapes that differ."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deepseek_r1.core import InputError

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def swish_of(x):
    return x * (1 / (1 + torch.exp(-x)))


def blend_of(x, a, b):
    return torch.where(x > 0, a * x, b - x) + torch.maximum(a, b) * torch.tanh(x)


@pytest.mark.parametrize("dtype", FLOATS)
def test_swish_in_every_dtype(swish, dtype):
    x = torch.linspace(-20, 20, 4099).to(dtype)
    y = swish()(x)
    assert y.dtype == dtype
    # Computed in float and rounded once, so the nearest number of the type but for float's own last places.
    expected = swish_of(x.double())
    torch.testing.assert_close(y, expected.to(dtype), rtol=2 * torch.finfo(dtype).eps, atol=1e-30)


def test_far_out_swish_is_what_it_tends_to(swish):
    x = torch.tensor([-float("inf"), -200.0, 200.0, float("inf"), float("nan")])
    y = swish()(x)
    assert torch.isnan(y[0])  # -inf * 0, as PyTorch has it
    assert torch.isnan(y[4])
    assert y[1:4].tolist() == [0.0, 200.0, float("inf")]


LAYOUTS = {
    "contiguous": lambda t: t,
    "transposed": lambda t: t.transpose(0, -1),
    "every other": lambda t: t[..., ::2],
    "from the middle": lambda t: t[1:, 2:],
    "flipped copy": lambda t: t.flip(0),
    "expanded": lambda t: t[:1].expand_as(t),
    "one column": lambda t: t[..., 3],
    "channels last": lambda t: t.reshape(2, 3, 4, -1).to(memory_format=torch.channels_last),
    "permuted": lambda t: t.reshape(2, 3, 4, -1).permute(2, 0, 3, 1),
    "no elements": lambda t: t[:0],
    "0-dim": lambda t: t[0, 0],
    "one element": lambda t: t[:1, :1],
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout(swish, layout, dtype):
    x = LAYOUTS[layout](torch.randn(24, 50)).to(dtype)
    y = swish()(x)
    assert y.shape == x.shape
    assert y.stride() == torch.empty_like(x).stride()
    torch.testing.assert_close(y.double(), swish_of(x.double()), rtol=2 * torch.finfo(dtype).eps, atol=1e-30)


def test_many_threads_give_the_same_bits(swish, two_threads):
    x = torch.randn(700_001)
    two = swish()(x)
    torch.set_num_threads(1)
    assert torch.equal(two, swish()(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64, torch.int8, torch.uint8, torch.bool, torch.float16])
def test_assigning_a_tensor_copies_its_elements(operators, dtype):
    x = (torch.randn(6, 7) * 50).to(dtype)
    y = operators.CopyOf()(x.t())
    assert torch.equal(y, x.t())
    assert y.data_ptr() != x.data_ptr()


def test_attributes(operators):
    x = torch.arange(5, dtype=torch.float64)
    torch.testing.assert_close(operators.Affine()(x), 0.1 * x + 3, rtol=1e-15, atol=0)
    assert torch.equal(operators.Affine(scale=2, shift=-1, negate=True)(x), -(2 * x - 1))
    assert "scale=2.0, shift=-1, negate=True" in repr(operators.Affine(scale=2, shift=-1, negate=True))
    assert torch.equal(operators.affine(x, 4.0), 4 * x + 3)


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ({"factor": 1}, "no attribute 'factor'; it has .*scale"),
        ({"scale": "x"}, "a float is needed"),
        ({"shift": 1.5}, "an? int is needed"),
        ({"negate": 1}, "a bool is needed"),
        ({"scale": True}, "a float is needed"),
    ],
)
def test_wrong_attributes(operators, attributes, message):
    with pytest.raises(InputError, match=message):
        operators.Affine(**attributes)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_broadcasting_is_torchs(operators, data):
    full = data.draw(st.lists(st.integers(0, 5), min_size=0, max_size=4))
    seed = data.draw(st.integers(0, 2**31))
    generator = torch.Generator().manual_seed(seed)
    inputs = []
    for _ in range(3):
        cut = data.draw(st.integers(0, len(full)))
        shape = [n if data.draw(st.booleans()) else 1 for n in full[cut:]]
        t = torch.randn(shape, generator=generator, dtype=data.draw(st.sampled_from(FLOATS[:3])))
        order = data.draw(st.permutations(range(len(shape))))
        # Laid out in another order of dimensions, with the same sizes.
        inputs.append(t.permute(order).contiguous().permute(tuple(np.argsort(order))) if shape else t)
    got = operators.blend(*inputs)
    expected = blend_of(*[t.double() for t in inputs])
    assert got.shape == expected.shape
    assert got.dtype == torch.promote_types(torch.promote_types(inputs[0].dtype, inputs[1].dtype), inputs[2].dtype)
    eps = torch.finfo(got.dtype).eps
    torch.testing.assert_close(got.double(), expected, rtol=8 * eps, atol=8 * eps)


def test_shapes_that_do_not_broadcast(operators):
    with pytest.raises(InputError, match=r"do not broadcast: \(3,\), \(4,\), \(1,\)"):
        operators.blend(torch.ones(3), torch.ones(4), torch.ones(1))


def gated_norm_of(x, gate, eps=1e-6):
    y = x * torch.sigmoid(gate)
    return y / torch.sqrt((y * y).mean(-1, keepdim=True) + eps)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", [(7, 513), (3, 5, 64), (9000,), (4, 1), (0, 5), (2, 10_000)])
def test_row_reductions(gated_norm, shape, dtype):
    x, gate = torch.randn(2, *shape).to(dtype)
    y = gated_norm(eps=1e-3)(x, gate)
    expected = gated_norm_of(x.double(), gate.double(), 1e-3)
    torch.testing.assert_close(y.double(), expected, rtol=4 * max(torch.finfo(dtype).eps, 1e-7), atol=1e-7)


def test_row_reductions_of_strided_rows(gated_norm, two_threads):
    x, gate = torch.randn(40, 600).t(), torch.randn(600, 80)[:, ::2]
    for other in (gate, torch.randn(40)):
        expected = gated_norm_of(x.double(), other.double())
        torch.testing.assert_close(gated_norm()(x, other).double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", FLOATS[:3])
def test_a_reduction_inside_another(operators, dtype):
    x = (torch.randn(11, 777) * 10).to(dtype)
    expected = x.double().softmax(-1)
    # An exponent of 80 has that many times the rounding error of 1.
    rtol = 100 * torch.finfo(dtype).eps if dtype != torch.bfloat16 else 1e-2
    torch.testing.assert_close(operators.RowSoftmax()(x).double(), expected, rtol=rtol, atol=1e-30)
    x[3, 5] = float("nan")
    assert operators.RowSoftmax()(x)[3].isnan().all()
    assert not operators.RowSoftmax()(x)[4].isnan().any()


def test_a_long_row_sums_without_loss(gated_norm):
    x = torch.full((1, 3_000_001), 0.1)
    # Each element over the root mean square of elements like it; a plain float sum is off by 1e-2 here.
    assert (gated_norm(eps=0.0)(x, x) - 1).abs().max() < 1e-6


def test_shapes_that_differ(operators):
    x = torch.randn(3, 4, 50)
    torch.testing.assert_close(operators.Spread()(x), x.amax(-1) - x.amin(-1))
    torch.testing.assert_close(operators.Spread()(x[0, 0]), x[0, 0].amax() - x[0, 0].amin())
    w = torch.randn(3, 1)
    m = torch.randn(3, 9)
    torch.testing.assert_close(operators.weighted_total(m, w), w * (m * m).sum(1, keepdim=True) + w)
    torch.testing.assert_close(operators.column_total(m), m.sum(0, keepdim=True))


def test_several_outputs(operators):
    x = torch.randn(8, 3).t()
    sine, cosine = operators.SineCosine()(x)
    torch.testing.assert_close(sine, x.sin())
    torch.testing.assert_close(cosine, x.cos())


def test_by_hand(operators, two_threads):
    x = torch.randn(64, 2000, dtype=torch.float64)
    assert torch.equal(operators.pair_sum(x), x[:, ::2] + x[:, 1::2])
    with pytest.raises(InputError, match="operator 'pair_sum': the last dimension must be even"):
        operators.pair_sum(torch.randn(2, 3))
    with pytest.raises(InputError, match="this kernel takes float32 and float64"):
        operators.pair_sum(torch.randn(2, 4).half())


def test_output_of_another_dtype(operators):
    a, b = torch.tensor([2**53 + 1, 5, -3]), torch.tensor([2**53, 5, 9])
    assert operators.above(a, b).tolist() == [True, False, False]
    assert operators.above(torch.tensor([0.5]), torch.tensor([1], dtype=torch.int8)).dtype == torch.bool


def test_whole_numbers_divide_without_stopping_the_process(operators):
    least = torch.iinfo(torch.int64).min
    a, b = torch.tensor([7, 7, least, -8]), torch.tensor([2, 0, -1, 3])
    assert operators.quotient(a, b).tolist() == [3, 0, least, -2]


def test_statements_run_in_their_order(operators):
    x = torch.randn(9)
    torch.testing.assert_close(operators.in_steps(x), (x + 1) * x)


def test_every_name(operators):
    x = torch.linspace(0.1, 3, 50, dtype=torch.float64)
    a = 2 * x.exp() + x.exp2() + x.expm1() + 2 * x.log() + x.log2() + x.log10() + x.log1p()
    b = 2 * x.sqrt() + x.sin() + x.cos() + x.sinh() + x.cosh() + 2 * x.tanh() + 2 * x.erf()
    c = x.floor() + x.ceil() + 3 * x + 1 + x.sigmoid() + x.relu() + x * x + x.rsqrt()
    low = x.clamp_max(0.7)
    d = x**1.5 + 2**x + x.clamp_min(0.7) + x.clamp_min(torch.tensor(0.7).double()) + 2 * low + x.clamp(0.4, 0.9)
    e = torch.where((x <= 1) | ~(x > 2), x, torch.ones_like(x)) + (x >= 0.5) * x + x
    # 0.7f is the float nearest to 0.7, so the last digits of a double differ there.
    torch.testing.assert_close(operators.everything(x), a + b + c + d + e, rtol=1e-8, atol=1e-7)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ((torch.ones(3, dtype=torch.int32),), r"input 0 has dtype torch.int32; it takes float32, float64"),
        ((torch.ones(3, dtype=torch.complex64),), "has dtype torch.complex64"),
        ((torch.ones(3).to_sparse(),), "layout|Sparse"),
        ((torch.ones([1] * 17),), "has 17 dimensions; at most 16"),
    ],
)
def test_inputs_that_do_not_fit(swish, inputs, message):
    with pytest.raises((InputError, NotImplementedError), match=message):
        swish()(*inputs)


def test_the_loop_reads_and_writes_each_element_once(built):
    import ctypes

    from deepseek_r1 import ops

    library = built("counting", "-O1")
    counted = ops.register_custom_op("counted_swish", library)
    counts = ctypes.CDLL(str(library))
    for count in (counts.reads_so_far, counts.writes_so_far):
        count.restype = ctypes.c_int64
    before = counts.reads_so_far(), counts.writes_so_far()
    x = torch.randn(12_345)
    torch.testing.assert_close(counted()(x), swish_of(x))
    assert (counts.reads_so_far() - before[0], counts.writes_so_far() - before[1]) == (12_345, 12_345)
