"""MobileNetV2, for the classification of images. Knows nothing about data or training.

Sandler et al., "MobileNetV2: Inverted Residuals and Linear Bottlenecks", 2018. Parameters have the names that weight
files give them.

Shape suffixes: B batch, C channels, Y and X pixels, K classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ._convolution import ConvNorm, forward_flops
from ._losses import classification_loss
from ._pretrained import PretrainedModel
from ._settings import ClassifierConfig

#: Channels behind the stem and behind each of the 16 blocks, and the blocks' strides (table 2 of the paper).
_CHANNELS = (16, 24, 24, 32, 32, 32, 64, 64, 64, 64, 96, 96, 96, 160, 160, 160, 320)
_STRIDES = (2, 1, 2, 1, 1, 2, 1, 1, 1, 1, 1, 1, 2, 1, 1, 1)


@dataclass(frozen=True, kw_only=True)
class MobileNetV2Config(ClassifierConfig):
    """A MobileNetV2; the defaults are those of the full width.

    Attributes:
        num_channels: 3 for colour.
        depth_multiplier: factor of all channels.
        depth_divisible_by, min_depth: channels are multiples of the one and at least the other.
        expand_ratio: how many times wider a block is inside.
        output_stride: how many times smaller the last feature map is: 8, 16 or 32; below 32 late strides are dilations.
        first_layer_is_expansion: whether the stem has no expansion of its own.
        finegrained_output: whether the last convolution keeps 1280 channels when depth_multiplier is below 1.
        tf_padding: whether padding is TensorFlow's "same", which for strides puts more to the right and below.
        classifier_dropout_prob: dropout before the classifier.
        layer_norm_eps: added to variances in batch normalisation.

    Raises:
        ConfigError: a field has a value that is not allowed; the message says what is.

    Example:
        >>> MobileNetV2Config(depth_multiplier=0.5).channels(96)
        48
    """

    model_type: ClassVar[str] = "mobilenet_v2"
    unused: ClassVar[frozenset[str]] = frozenset({"semantic_loss_ignore_index"})

    num_channels: int = 3
    image_size: int | tuple[int, int] = 224
    depth_multiplier: float = 1.0
    depth_divisible_by: int = 8
    min_depth: int = 8
    expand_ratio: float = 6.0
    output_stride: int = 32
    first_layer_is_expansion: bool = True
    finegrained_output: bool = True
    hidden_act: str = "relu6"
    tf_padding: bool = True
    classifier_dropout_prob: float = 0.8
    initializer_range: float = 0.02
    layer_norm_eps: float = 0.001

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_sides("image_size")
        self.check_counts("num_channels", "depth_divisible_by", "min_depth")
        self.check_positive("depth_multiplier", "expand_ratio", "initializer_range", "layer_norm_eps")
        self.check_shares("classifier_dropout_prob")
        self.check_activation("hidden_act")
        self.check_flags("first_layer_is_expansion", "finegrained_output", "tf_padding")
        if self.output_stride not in (8, 16, 32):
            self.refuse("output_stride", "8, 16 or 32")

    def channels(self, count: int) -> int:
        """A number of channels of the full width as this width has it."""
        return self.rounded(round(count * self.depth_multiplier))

    def rounded(self, count: int) -> int:
        """The nearest allowed number of channels that is not below nine tenths."""
        step = self.depth_divisible_by
        nearest = max(self.min_depth, int(count + step / 2) // step * step)
        return nearest if nearest >= 0.9 * count else nearest + step


class SameConv2d(nn.Conv2d):
    """A convolution padded as TensorFlow's "same": what is odd goes to the right and below."""

    def forward(self, input: Tensor) -> Tensor:
        """[B, C, Y, X] -> [B, C', ceil(Y / stride), ceil(X / stride)]."""
        pads = []
        for size, kernel, stride, dilation in zip(
            reversed(input.shape[2:]), reversed(self.kernel_size), reversed(self.stride), reversed(self.dilation)
        ):
            over = size % stride
            total = max(kernel - (over or stride), 0)
            pads += [total // 2 * dilation, (total - total // 2) * dilation]
        return super().forward(F.pad(input, pads))


def _layer(
    config: MobileNetV2Config, inputs: int, outputs: int, kernel: int = 1, stride: int = 1, groups: int = 1,
    dilation: int = 1, activation: bool = True,
) -> ConvNorm:  # fmt: skip
    # Without a stride the two kinds of padding are the same.
    same = config.tf_padding and stride > 1
    kind, padding = (SameConv2d, 0) if same else (nn.Conv2d, (kernel - 1) // 2 * dilation)
    convolution = kind(
        inputs, outputs, kernel, stride=stride, padding=padding, dilation=dilation, groups=groups, bias=False
    )
    # Momentum as in the files' own code: running statistics are almost those of the last batch.
    norm = nn.BatchNorm2d(outputs, eps=config.layer_norm_eps, momentum=0.997)
    return ConvNorm(convolution, norm, config.hidden_act if activation else None)


class InvertedResidual(nn.Module):
    """Wider, filtered channel by channel, narrower again; a shortcut where the shape stays."""

    def __init__(self, config: MobileNetV2Config, inputs: int, outputs: int, stride: int, dilation: int) -> None:
        super().__init__()
        inner = config.rounded(round(inputs * config.expand_ratio))
        self.shortcut = stride == 1 and inputs == outputs
        self.expand_1x1 = _layer(config, inputs, inner)
        self.conv_3x3 = _layer(config, inner, inner, 3, stride, inner, dilation)
        self.reduce_1x1 = _layer(config, inner, outputs, activation=False)

    def forward(self, x_BCYX: Tensor) -> Tensor:
        """The block's output, without an activation."""
        y_BCYX = self.reduce_1x1(self.conv_3x3(self.expand_1x1(x_BCYX)))
        return x_BCYX + y_BCYX if self.shortcut else y_BCYX


class MobileNetV2Stem(nn.Module):
    """The first convolution, which halves the picture, and the first block."""

    def __init__(self, config: MobileNetV2Config, outputs: int) -> None:
        super().__init__()
        inner = config.channels(32)
        self.first_conv = _layer(config, config.num_channels, inner, 3, 2)
        self.expand_1x1 = None if config.first_layer_is_expansion else _layer(config, inner, inner)
        self.conv_3x3 = _layer(config, inner, inner, 3, groups=inner)
        self.reduce_1x1 = _layer(config, inner, outputs, activation=False)

    def forward(self, x_BCYX: Tensor) -> Tensor:
        """[B, I, Y, X] -> [B, C, Y / 2, X / 2]."""
        x_BCYX = self.first_conv(x_BCYX)
        if self.expand_1x1 is not None:
            x_BCYX = self.expand_1x1(x_BCYX)
        return self.reduce_1x1(self.conv_3x3(x_BCYX))


class MobileNetV2Body(nn.Module):
    """Stem, 16 blocks and the last convolution."""

    def __init__(self, config: MobileNetV2Config) -> None:
        super().__init__()
        sizes = [config.channels(c) for c in _CHANNELS]
        self.conv_stem = MobileNetV2Stem(config, sizes[0])
        self.layer = nn.ModuleList(
            InvertedResidual(config, *around, stride, dilation)
            for around, (stride, dilation) in zip(pairwise(sizes), _strides(config.output_stride), strict=True)
        )
        last = 1280 if config.finegrained_output and config.depth_multiplier < 1 else config.channels(1280)
        self.conv_1x1 = _layer(config, sizes[-1], last)

    def forward(self, x_BCYX: Tensor) -> Tensor:
        """[B, I, Y, X] -> [B, C, Y / output_stride, X / output_stride]."""
        x_BCYX = self.conv_stem(x_BCYX)
        for layer in self.layer:
            x_BCYX = layer(x_BCYX)
        return self.conv_1x1(x_BCYX)


def _strides(output_stride: int) -> list[tuple[int, int]]:
    """(stride, dilation) of each block: once the picture is as small as wanted, strides become later dilations."""
    found, reached, dilation = [], 2, 1
    for stride in _STRIDES:
        if reached == output_stride:
            found.append((1, dilation))
            dilation *= stride
        else:
            found.append((stride, 1))
            reached *= stride
    return found


class MobileNetV2(PretrainedModel[MobileNetV2Config]):
    """A MobileNetV2 with a linear classifier on its pooled output.

    Args:
        config: the architecture; weights are drawn normal with standard deviation 0.02.

    Example:
        >>> model = MobileNetV2(MobileNetV2Config(depth_multiplier=0.25, num_labels=10))
        >>> model.eval()(torch.zeros(2, 3, 64, 64)).shape
        torch.Size([2, 10])
    """

    config_class = MobileNetV2Config
    architecture = "MobileNetV2ForImageClassification"
    prefix = "mobilenet_v2."
    heads = ("classifier",)
    other_heads = r"segmentation_head\."
    repositories: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "mobilenet-v2": ("google/mobilenet_v2_1.0_224",),
        "mobilenet-v2-1.4": ("google/mobilenet_v2_1.4_224",),
        "mobilenet-v2-0.75": ("google/mobilenet_v2_0.75_160",),
        "mobilenet-v2-0.35": ("google/mobilenet_v2_0.35_96",),
    }

    def __init__(self, config: MobileNetV2Config) -> None:
        super().__init__(config)
        self.mobilenet_v2 = MobileNetV2Body(config)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.dropout = nn.Dropout(config.classifier_dropout_prob)
        self.classifier = nn.Linear(self.mobilenet_v2.conv_1x1.normalization.num_features, config.num_labels)
        self.reset_parameters()

    def init_module(self, module: nn.Module, name: str) -> None:
        """Draw the first weights of one module."""
        if isinstance(module, nn.Linear | nn.Conv2d):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
        if isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)
        if isinstance(module, nn.BatchNorm2d):
            module.reset_parameters()

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> Tensor | dict[str, Tensor]:
        """Logits [B, K], or with labels a dict of "loss" and "logits".

        Args:
            pixel_values: [B, I, Y, X].
            labels: class numbers [B], or numbers [B, K]; see `classification_loss`.
        """
        x_BC = self.pool(self.mobilenet_v2(pixel_values)).flatten(1)
        logits = self.classifier(self.dropout(x_BC))
        if labels is None:
            return logits
        return {"loss": classification_loss(logits, labels, self.config.problem_type), "logits": logits}

    def flops_per_sample(self, image_size: int | None = None) -> float:
        """Operations of a training step for each image: three times those of the forward pass's products."""
        size = image_size or self.config.image_size
        sides = size if isinstance(size, tuple) else (size, size)
        return 3.0 * forward_flops(self, torch.Size((1, self.config.num_channels, *sides)))
