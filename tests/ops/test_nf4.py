"""NF4: the levels against their definition, rounding against the nearest level, errors within bounds."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm

from deepseek_r1.core import InputError
from deepseek_r1.ops import (
    NF4,
    NF4_BLOCK,
    NF4_LEVELS,
    dequantize_nf4,
    nf4_shapes,
    nf4_table,
    quantize_nf4,
    unpack_uint4,
)


def largest_of(stored):
    scale = stored.scales.repeat_interleave(256)[: len(stored.steps)]
    return (stored.steps.float() * scale + stored.mean).clamp(min=0)


def codes_of(stored):
    left, right = unpack_uint4(stored.packed).chunk(2, -1)
    return torch.stack([left, right], -1).reshape(len(left), NF4_BLOCK)


def test_the_levels_are_the_paper_s_quantiles():
    # Appendix E: quantiles of the normal distribution between the two ends, eight below zero and nine above it, with
    # zero among them, divided by the largest.
    end = 0.5 * ((1 - 1 / 32) + (1 - 1 / 30))
    above = norm.ppf(torch.linspace(end, 0.5, 9, dtype=torch.float64)[:-1])
    below = -norm.ppf(torch.linspace(end, 0.5, 8, dtype=torch.float64)[:-1])
    levels = sorted([*above, 0.0, *below])
    levels = torch.tensor(levels, dtype=torch.float64) / max(levels)
    torch.testing.assert_close(torch.tensor(NF4_LEVELS, dtype=torch.float64), levels, rtol=0, atol=1e-6)
    assert NF4_LEVELS[7] == 0
    assert list(NF4_LEVELS) == sorted(NF4_LEVELS)


def test_each_weight_gets_the_nearest_level():
    torch.manual_seed(0)
    weight = torch.randn(48, 40)
    stored = quantize_nf4(weight)
    largest, levels = largest_of(stored).unsqueeze(1), torch.tensor(NF4_LEVELS)
    padded = torch.nn.functional.pad(weight.reshape(-1), (0, -weight.numel() % 64)).reshape(-1, 64)
    distances = (padded.unsqueeze(-1) - largest.unsqueeze(-1) * levels).abs()
    chosen = distances.gather(-1, codes_of(stored).long().unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(chosen, distances.amin(-1), rtol=0, atol=1e-6)
    expected = (levels[codes_of(stored).long()] * largest).reshape(-1)[: weight.numel()].reshape(weight.shape)
    assert torch.equal(dequantize_nf4(stored, (48, 40)), expected)


def test_sizes_and_bits():
    stored = quantize_nf4(torch.randn(256, 512))
    assert tuple(tuple(t.shape) for t in stored) == nf4_shapes(256 * 512)
    bits = 8 * sum(t.numel() * t.element_size() for t in stored) / (256 * 512)
    assert bits == pytest.approx(4 + 8 / 64 + 32 / (64 * 256), rel=1e-3)


def test_the_error_is_that_of_the_paper_s_format():
    torch.manual_seed(0)
    weight = torch.randn(512, 512)
    relative = (dequantize_nf4(quantize_nf4(weight), (512, 512)) - weight).norm() / weight.norm()
    # With blocks of 64 the root mean square error of normal weights is about 9 %; uniform levels have 10 to 11 %.
    assert 0.085 < relative < 0.1


@given(st.integers(1, 400), st.integers(0, 10_000), st.sampled_from([1e-6, 1.0, 1e4]))
@settings(max_examples=30, deadline=None)
def test_no_weight_is_further_off_than_half_a_step(count, seed, size):
    weight = torch.randn(count, generator=torch.Generator().manual_seed(seed)) * size
    stored = quantize_nf4(weight)
    blocks = torch.nn.functional.pad(weight, (0, -count % 64)).reshape(-1, 64)
    exact = blocks.abs().amax(1, keepdim=True)
    off = (largest_of(stored).unsqueeze(1) - exact).abs()
    # An int8 step of the group's spread, in halves.
    assert bool((off <= 0.51 * stored.scales.repeat_interleave(256)[: len(off)].unsqueeze(1) + 1e-6 * size).all())
    found = torch.nn.functional.pad(dequantize_nf4(stored, (count,)), (0, -count % 64)).reshape(-1, 64)
    widest = max(b - a for a, b in pairwise(NF4_LEVELS)) / 2
    assert bool(((found - blocks).abs() <= widest * (exact + off) + off + 1e-6 * size).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_types(dtype):
    weight = torch.randn(8, 64).to(dtype)
    stored = quantize_nf4(weight)
    exact = dequantize_nf4(stored, (8, 64))
    assert torch.equal(dequantize_nf4(stored, (8, 64), dtype), exact.to(dtype)), "rounded once"
    torch.testing.assert_close(exact, weight.float(), rtol=0, atol=0.2 * float(weight.abs().max()))


def test_zeros_and_tiny_blocks_beside_large_ones():
    weight = torch.zeros(3, 64)
    assert torch.equal(dequantize_nf4(quantize_nf4(weight), (3, 64)), weight)
    weight[0], weight[1] = 100.0, 1e-4
    found = dequantize_nf4(quantize_nf4(weight), (3, 64))
    assert bool((found[1] >= 0).all()), "no sign turns"
    assert bool((found[2] == 0).all())
    torch.testing.assert_close(found[0], weight[0], rtol=0.01, atol=0)


def test_the_table_is_that_of_the_packing():
    byte = torch.arange(256, dtype=torch.uint8).reshape(-1, 1)
    levels = torch.tensor(NF4_LEVELS)
    assert torch.equal(nf4_table(), levels[unpack_uint4(byte).long()])


@pytest.mark.parametrize(
    ("weight", "words"),
    [
        (torch.zeros(4, dtype=torch.int32), "floating tensor with values is needed, given int32"),
        (torch.zeros(0, 4), "with values is needed"),
        (torch.tensor([1.0, float("nan")]), "not finite"),
        (torch.tensor([1.0, float("inf")]), "not finite"),
    ],
)
def test_what_cannot_be_rounded(weight, words):
    with pytest.raises(InputError, match=words):
        quantize_nf4(weight)


def test_another_shape_is_refused():
    with pytest.raises(InputError, match=r"hold no weight of shape \[8, 65\]"):
        dequantize_nf4(quantize_nf4(torch.randn(8, 64)), (8, 65))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1000, 333), (4096, 4096), (7,)])
def test_the_kernel_is_the_formula(dtype, shape):
    pytest.importorskip("triton")
    from deepseek_r1.ops import _nf4_triton

    weight = torch.randn(shape)
    stored = quantize_nf4(weight)
    there = NF4(*(t.cuda() for t in stored))
    assert _nf4_triton.problem(there.packed.device) == ""
    found = dequantize_nf4(there, shape, dtype)
    rtol = 1e-6 if dtype == torch.float32 else 0.008
    torch.testing.assert_close(found.cpu(), dequantize_nf4(stored, shape, dtype), rtol=rtol, atol=0)
