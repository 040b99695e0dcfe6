"""A small convolutional residual network for images of handwritten digits.

Knows nothing about data or training. Residual blocks after He et al., "Deep Residual Learning for Image Recognition",
CVPR 2016.

Shape suffixes: N batch, C channels of a stage, H height, W width, K classes.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut: [N, in, H, W] -> [N, out, H/stride, W/stride].

    The shortcut is a 1x1 convolution where the shape changes.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.relu = nn.ReLU()
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or in_channels != out_channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, stride=stride, bias=False), nn.BatchNorm2d(out_channels)
            )

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """The block's output, after its last ReLU."""
        y_NCHW = self.relu(self.bn1(self.conv1(x_NCHW)))
        y_NCHW = self.bn2(self.conv2(y_NCHW))
        return self.relu(y_NCHW + self.shortcut(x_NCHW))


class DigitsNet(nn.Module):
    """Stem, three residual blocks (the second halves the picture), average pool, linear: [N, 1, 8, 8] -> [N, 10].

    Args:
        width: channels of the stem; later blocks have twice as many.
        num_classes: length of the output.

    Example:
        >>> import torch
        >>> DigitsNet()(torch.zeros(2, 1, 8, 8)).shape
        torch.Size([2, 10])
    """

    def __init__(self, width: int = 24, num_classes: int = 10) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
        self.blocks = nn.Sequential(
            ResidualBlock(width, width),
            ResidualBlock(width, 2 * width, stride=2),
            ResidualBlock(2 * width, 2 * width),
        )
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(2 * width, num_classes)

    def forward(self, x_N1HW: Tensor) -> Tensor:
        """Logits [N, K] of images [N, 1, H, W] (8x8 for the digits; H and W must be even)."""
        x_NCHW = self.blocks(self.stem(x_N1HW))
        x_NC = torch.flatten(self.pool(x_NCHW), 1)
        return self.head(x_NC)
