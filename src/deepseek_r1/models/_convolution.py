"""What convolutional architectures share: a convolution with its normalisation, and counting. Knows no architecture."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ._pretrained import PretrainedModel
from ._settings import ACTIVATIONS


class ConvNorm(nn.Module):
    """A convolution without bias, a batch normalisation and perhaps an activation function."""

    def __init__(self, convolution: nn.Module, normalization: nn.BatchNorm2d, activation: str | None) -> None:
        super().__init__()
        self.convolution, self.normalization = convolution, normalization
        self.activation = ACTIVATIONS[activation] if activation else None

    def forward(self, x_BCYX: Tensor) -> Tensor:
        """One after the other."""
        x_BCYX = self.normalization(self.convolution(x_BCYX))
        return x_BCYX if self.activation is None else self.activation(x_BCYX)


def conv_norm(inputs: int, outputs: int, kernel: int, stride: int = 1, activation: str | None = None) -> ConvNorm:
    """A padded convolution and its normalisation."""
    convolution = nn.Conv2d(inputs, outputs, kernel, stride=stride, padding=kernel // 2, bias=False)
    return ConvNorm(convolution, nn.BatchNorm2d(outputs), activation)


def forward_flops(model: PretrainedModel, shape: torch.Size) -> int:
    """Operations of the products and convolutions of one forward pass, counted on a copy without memory."""
    with torch.device("meta"):
        copy, image = type(model)(model.config).eval(), torch.empty(shape)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        copy(image)
    return int(counter.get_total_flops())
