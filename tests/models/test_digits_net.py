"""DigitsNet: its size, its shapes, and that it can learn."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from deepseek_r1.models import DigitsNet


@pytest.mark.parametrize(("width", "low", "high"), [(24, 50_000, 150_000), (8, 5_000, 15_000)])
def test_size(width, low, high):
    assert low < sum(p.numel() for p in DigitsNet(width).parameters()) < high


@pytest.mark.parametrize("batch", [1, 2, 7])
def test_shapes(batch):
    model = DigitsNet(8, num_classes=4).eval()
    assert model(torch.zeros(batch, 1, 8, 8)).shape == (batch, 4)
    assert model(torch.zeros(batch, 1, 16, 12)).shape == (batch, 4)


def test_capture_with_a_dynamic_batch():
    model = DigitsNet(8).eval()
    program = torch.export.export(
        model, (torch.randn(2, 1, 8, 8),), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},)
    ).module()
    x = torch.randn(5, 1, 8, 8)
    torch.testing.assert_close(program(x), model(x))


def test_it_learns_real_digits():
    from sklearn.datasets import load_digits

    torch.manual_seed(0)
    data, target = load_digits(return_X_y=True)
    x = torch.tensor(data, dtype=torch.float32).view(-1, 1, 8, 8) / 16
    y = torch.tensor(target)
    held_out = torch.arange(len(y)) % 5 == 0
    seen = torch.nonzero(~held_out)[:, 0]
    model = DigitsNet(8)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(5):
        for rows in seen[torch.randperm(len(seen))].split(64):
            loss = F.cross_entropy(model(x[rows]), y[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    model.eval()
    with torch.no_grad():
        accuracy = (model(x[held_out]).argmax(1) == y[held_out]).float().mean()
    assert accuracy > 0.9
