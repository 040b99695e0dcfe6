"""Which additions become integers: those of residuals, and no others."""

import pytest
import torch
from torch import nn

from deepseek_r1.quantization import quantize


class PowerSpectrum(nn.Module):
    """Squares of two halves of a convolution's answer, added: they span far more than 8 bits."""

    def __init__(self):
        super().__init__()
        self.waves = nn.Conv1d(1, 32, 16, stride=8, bias=False)
        self.after = nn.Conv1d(16, 8, 3)

    def forward(self, x):
        real, imaginary = self.waves(x).chunk(2, 1)
        return self.after((real**2 + imaginary**2).sqrt()).relu()


class Residual(nn.Module):
    """A convolution beside its input, and a layer that reads their sum."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        x = self.first(x).relu()
        return self.head((x + self.second(x)).relu().mean((2, 3)))


@pytest.fixture
def loud_and_quiet():
    draw = torch.Generator().manual_seed(0)
    levels = torch.logspace(-2, 0, 32)[:, None, None]
    return levels * torch.randn(32, 1, 256, generator=draw)


@torch.no_grad()
def test_squares_of_a_spectrum_are_not_added_as_integers(loud_and_quiet):
    torch.manual_seed(0)
    model = PowerSpectrum().eval()
    program = quantize(model, dataset=loud_and_quiet.split(8))
    assert "additions in int8" not in [row.metric for row in program.report.rows]
    wanted, found = model(loud_and_quiet[8:16]), program(loud_and_quiet[8:16])
    assert float((found - wanted).norm() / wanted.norm()) < 0.25


def test_a_residual_is_added_as_integers():
    torch.manual_seed(0)
    program = quantize(Residual().eval(), dataset=torch.randn(16, 3, 8, 8).split(8))
    assert program.report["additions in int8"].after == 1
