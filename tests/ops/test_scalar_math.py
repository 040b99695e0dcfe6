"""The functions on one element: own polynomials to a few units of the last place, derivatives, 16-bit conversions."""

import ctypes

import numpy as np
import pytest
import torch

#: Units of the last place that a float result may be off, over all floats of its domain.
OWN = {"exp": 1.5, "log": 2.0, "tanh": 2.5, "erf": 2.5, "sigmoid": 3.0}
OTHERS = ("exp2", "expm1", "log2", "log10", "log1p", "sqrt", "sin", "cos", "sinh", "cosh", "abs", "floor", "ceil")
POSITIVE = {"log", "log2", "log10", "log1p", "sqrt"}


@pytest.fixture(scope="module")
def scalars(built):
    return ctypes.CDLL(str(built("scalars")))


def call(function, *arrays):
    function(*[a.ctypes.data_as(ctypes.c_void_p) for a in arrays], ctypes.c_int64(arrays[0].size))


def values(scalars, name, x):
    y = np.empty_like(x)
    call(getattr(scalars, f"value_{name}"), x, y)
    return y


def every_float(step):
    """Each `step`-th float there is, special ones included."""
    bits = np.arange(0, 2**32, step, dtype=np.uint64).astype(np.uint32)
    special = np.array([0.0, -0.0, np.inf, -np.inf, np.nan, 1e-45, -1e-45, 88.72, 88.73, -103.9, -104.1], np.float32)
    return np.concatenate([bits.view(np.float32), special])


def ulps(got, exact):
    """Distance from the exact value in units of the last place of its float."""
    with np.errstate(all="ignore"):
        step = np.spacing(np.abs(exact.astype(np.float32))).astype(np.float64)
        distance = np.abs(got.astype(np.float64) - exact) / step
    with np.errstate(over="ignore"):
        same = (got == exact.astype(np.float32)) | (np.isnan(got) & np.isnan(exact))
    return np.where(same, 0.0, distance)


@pytest.mark.parametrize("name", OWN)
def test_own_functions_are_close_over_all_floats(scalars, name):
    x = every_float(2003)
    if name == "sigmoid":
        x = x[~(x < -87)]  # further out exp(-x) overflows, and the result is 0 where it should be subnormal
    got = values(scalars, name, x)
    exact = getattr(torch, name)(torch.from_numpy(x).double()).numpy()
    off = ulps(got, exact)
    worst = int(np.nanargmax(np.where(np.isnan(off), np.inf, off)))
    assert off[worst] <= OWN[name], (x[worst], got[worst], exact[worst], off[worst])


@pytest.mark.parametrize("name", OTHERS)
def test_the_librarys_functions_are_wired_rightly(scalars, name):
    x = np.linspace(0.01 if name in POSITIVE else -4.3, 4.3, 1001, dtype=np.float32)
    exact = getattr(torch, name)(torch.from_numpy(x).double()).numpy()
    assert ulps(values(scalars, name, x), exact).max() <= 4


@pytest.mark.parametrize("name", [*OWN, *OTHERS])
def test_slopes(scalars, name):
    x = np.linspace(0.02 if name in POSITIVE else -3.1, 3.1, 200)
    y, d = np.empty_like(x), np.empty_like(x)
    call(getattr(scalars, f"slope_{name}"), x, y, d)
    t = torch.from_numpy(x).requires_grad_()
    expected = getattr(torch, name)(t)
    (slope,) = torch.autograd.grad(expected.sum(), t)
    np.testing.assert_allclose(y, expected.detach().numpy(), rtol=1e-14, atol=1e-300)
    np.testing.assert_allclose(d, slope.numpy(), rtol=1e-12, atol=1e-15)


def test_sixteen_bit_types_are_read_exactly(scalars):
    raw = np.arange(2**16, dtype=np.uint16)
    half, brain = np.empty(2**16, np.float32), np.empty(2**16, np.float32)
    call(scalars.from_half, raw, half, brain)
    tensor = torch.from_numpy(raw.view(np.int16))
    for got, dtype in ((half, torch.float16), (brain, torch.bfloat16)):
        expected = tensor.view(dtype).float().numpy()
        np.testing.assert_array_equal(got, expected)
        finite = ~np.isnan(expected)
        assert np.array_equal(np.signbit(got[finite]), np.signbit(expected[finite]))


def test_sixteen_bit_types_are_rounded_to_even(scalars):
    x = every_float(4001)
    # Halfway cases of both types as well.
    steps = np.arange(2**16, dtype=np.uint32)
    x = np.concatenate(
        [x, ((steps << 16) + 0x8000).view(np.float32), ((steps << 13) + 0x1000 + 0x38000000).view(np.float32)]
    )
    half, brain = np.empty(x.size, np.uint16), np.empty(x.size, np.uint16)
    call(scalars.to_half, x, half, brain)
    tensor = torch.from_numpy(x)
    for got, dtype in ((half, torch.float16), (brain, torch.bfloat16)):
        back = torch.from_numpy(got.view(np.int16)).view(dtype).float().numpy()
        np.testing.assert_array_equal(back, tensor.to(dtype).float().numpy())
