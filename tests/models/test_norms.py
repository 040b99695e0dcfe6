"""Norms under autocast, and layers computed side by side."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from deepseek_r1.models._attention import side_by_side
from deepseek_r1.models._norms import LayerNorm


def test_without_autocast_it_is_torchs() -> None:
    torch.manual_seed(0)
    mine, theirs, x = LayerNorm(16), nn.LayerNorm(16), torch.randn(3, 16) * 5 + 2
    assert torch.equal(mine(x), theirs(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("affine", [True, False])
def test_under_autocast_the_output_is_narrow_and_the_statistics_are_not(dtype: torch.dtype, affine: bool) -> None:
    torch.manual_seed(0)
    norm = LayerNorm(512, elementwise_affine=affine)
    # Sums of squares this large leave bf16 no digit of the mean.
    x = (torch.randn(4, 512) + 30).to(dtype).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = norm(x)
    assert y.dtype == torch.bfloat16
    expected = nn.functional.layer_norm(x.double(), (512,))
    assert float((y.double() - expected).detach().abs().max()) < 0.02
    y.float().square().sum().backward()
    assert x.grad is not None
    assert bool(torch.isfinite(x.grad).all())


def test_layers_side_by_side_are_the_layers() -> None:
    torch.manual_seed(0)
    parts = [nn.Linear(8, n) for n in (4, 4, 6)]
    x = torch.randn(2, 3, 8)
    for found, part in zip(side_by_side(x, *parts), parts, strict=True):
        assert torch.equal(found, part(x))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_layers_joined_on_a_gpu_have_the_same_gradients() -> None:
    torch.manual_seed(0)
    parts = [nn.Linear(64, n).cuda() for n in (32, 32, 48)]
    x = torch.randn(5, 7, 64, device="cuda")
    grads = []
    for training in (True, False):
        for part in parts:
            part.train(training).zero_grad()
        found = side_by_side(x, *parts)
        torch.cat([y.sin() for y in found], -1).sum().backward()
        grads.append([torch.cat([y.flatten() for y in found]), *(p.grad for part in parts for p in part.parameters())])
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-4)
