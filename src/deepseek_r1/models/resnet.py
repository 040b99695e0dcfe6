"""ResNet with 18 to 152 layers, for the classification of images. Knows nothing about data or training.

He et al., "Deep Residual Learning for Image Recognition", 2016; the stride of a bottleneck is in its 3x3 convolution.
Parameters have the names that weight files give them.

Shape suffixes: B batch, C channels, Y and X pixels, K classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from ..core import ConfigError
from ._convolution import conv_norm, forward_flops
from ._losses import classification_loss
from ._pretrained import PretrainedModel
from ._settings import ACTIVATIONS, ClassifierConfig

#: Layers -> (kind of block, blocks of each stage).
DEPTHS: dict[int, tuple[str, tuple[int, ...]]] = {
    18: ("basic", (2, 2, 2, 2)),
    34: ("basic", (3, 4, 6, 3)),
    50: ("bottleneck", (3, 4, 6, 3)),
    101: ("bottleneck", (3, 4, 23, 3)),
    152: ("bottleneck", (3, 8, 36, 3)),
}


@dataclass(frozen=True, kw_only=True)
class ResNetConfig(ClassifierConfig):
    """A ResNet; the defaults are those of ResNet-50. `ResNetConfig.of_depth` gives the others.

    Attributes:
        num_channels: 3 for colour.
        embedding_size: channels of the stem.
        hidden_sizes: channels of each stage's output.
        depths: blocks of each stage.
        layer_type: "basic" (two 3x3 convolutions) or "bottleneck" (1x1, 3x3, 1x1, a quarter of the channels inside).
        downsample_in_first_stage: whether the first stage halves the picture, too.
        downsample_in_bottleneck: whether a bottleneck's stride is in its first convolution.

    Raises:
        ConfigError: a field has a value that is not allowed; the message says what is.
    """

    model_type: ClassVar[str] = "resnet"
    unused: ClassVar[frozenset[str]] = frozenset({"out_features", "out_indices", "stage_names"})

    num_channels: int = 3
    embedding_size: int = 64
    hidden_sizes: tuple[int, ...] = (256, 512, 1024, 2048)
    depths: tuple[int, ...] = (3, 4, 6, 3)
    layer_type: str = "bottleneck"
    hidden_act: str = "relu"
    downsample_in_first_stage: bool = False
    downsample_in_bottleneck: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_counts("num_channels", "embedding_size")
        self.check_counts_of("hidden_sizes", "depths")
        if len(self.hidden_sizes) != len(self.depths):
            self.refuse("depths", f"a number for each of hidden_sizes={self.hidden_sizes}")
        if self.layer_type not in ("basic", "bottleneck"):
            self.refuse("layer_type", "'basic' or 'bottleneck'")
        if self.layer_type == "bottleneck" and any(size % 4 for size in self.hidden_sizes):
            self.refuse("hidden_sizes", "multiples of 4, as a bottleneck has a quarter of the channels inside")
        self.check_activation("hidden_act")
        self.check_flags("downsample_in_first_stage", "downsample_in_bottleneck")

    @classmethod
    def of_depth(cls, layers: int, **changes: Any) -> Self:
        """The published configuration with 18, 34, 50, 101 or 152 layers, and 1000 classes unless given otherwise.

        Example:
            >>> ResNetConfig.of_depth(34, num_labels=10).layer_type
            'basic'
        """
        if layers not in DEPTHS:
            raise ConfigError(f"ResNetConfig.of_depth({layers!r}): one of {', '.join(map(str, DEPTHS))} is needed.")
        kind, depths = DEPTHS[layers]
        sizes = (64, 128, 256, 512) if kind == "basic" else (256, 512, 1024, 2048)
        return cls(**{"layer_type": kind, "depths": depths, "hidden_sizes": sizes, "num_labels": 1000, **changes})


class ResNetBlock(nn.Module):
    """Convolutions beside a shortcut: [B, in, Y, X] -> [B, out, Y / stride, X / stride].

    The shortcut is a 1x1 convolution where the shape changes.
    """

    def __init__(self, config: ResNetConfig, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        # The code that files come from has ReLU inside of a block, whatever the configuration's activation is.
        if config.layer_type == "basic":
            parts = [conv_norm(in_channels, out_channels, 3, stride, "relu"), conv_norm(out_channels, out_channels, 3)]
        else:
            inner = out_channels // 4
            first, second = (stride, 1) if config.downsample_in_bottleneck else (1, stride)
            parts = [
                conv_norm(in_channels, inner, 1, first, "relu"),
                conv_norm(inner, inner, 3, second, "relu"),
                conv_norm(inner, out_channels, 1),
            ]
        self.layer = nn.Sequential(*parts)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or in_channels != out_channels:
            self.shortcut = conv_norm(in_channels, out_channels, 1, stride)
        self.activation = ACTIVATIONS[config.hidden_act]

    def forward(self, x_BCYX: Tensor) -> Tensor:
        """The block's output, after its last activation."""
        return self.activation(self.layer(x_BCYX) + self.shortcut(x_BCYX))


class ResNetStage(nn.Module):
    """Blocks of one size, the first of which may halve the picture."""

    def __init__(self, config: ResNetConfig, in_channels: int, out_channels: int, depth: int, stride: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            ResNetBlock(config, out_channels if i else in_channels, out_channels, 1 if i else stride)
            for i in range(depth)
        )

    def forward(self, x_BCYX: Tensor) -> Tensor:
        """The last block's output."""
        for layer in self.layers:
            x_BCYX = layer(x_BCYX)
        return x_BCYX


class ResNetBody(nn.Module):
    """Stem and stages: [B, I, Y, X] -> [B, C, Y / 32, X / 32]."""

    def __init__(self, config: ResNetConfig) -> None:
        super().__init__()
        stem = conv_norm(config.num_channels, config.embedding_size, 7, 2, config.hidden_act)
        self.embedder = nn.ModuleDict({"embedder": stem})
        self.pool = nn.MaxPool2d(3, stride=2, padding=1)
        sizes = (config.embedding_size, *config.hidden_sizes)
        strides = [2 if i or config.downsample_in_first_stage else 1 for i in range(len(config.depths))]
        stages = [
            ResNetStage(config, *around, depth, stride)
            for around, depth, stride in zip(pairwise(sizes), config.depths, strides, strict=True)
        ]
        self.encoder = nn.ModuleDict({"stages": nn.ModuleList(stages)})

    def forward(self, x_BCYX: Tensor) -> Tensor:
        """The last stage's output."""
        x_BCYX = self.pool(self.embedder["embedder"](x_BCYX))
        for stage in self.encoder["stages"]:  # type: ignore[attr-defined]
            x_BCYX = stage(x_BCYX)
        return x_BCYX


class ResNet(PretrainedModel[ResNetConfig]):
    """A ResNet with a linear classifier on its pooled output.

    Args:
        config: the architecture; convolutions are drawn as in He et al., 2015, for rectifiers, by their outputs.

    Example:
        >>> config = ResNetConfig(embedding_size=8, hidden_sizes=(8, 16), depths=(1, 2), num_labels=10)
        >>> ResNet(config)(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """

    config_class = ResNetConfig
    architecture = "ResNetForImageClassification"
    prefix = "resnet."
    heads = ("classifier",)
    repositories: ClassVar[Mapping[str, tuple[str, ...]]] = {
        f"resnet-{layers}": (f"microsoft/resnet-{layers}",) for layers in DEPTHS
    }

    def __init__(self, config: ResNetConfig) -> None:
        super().__init__(config)
        self.resnet = ResNetBody(config)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Sequential(nn.Flatten(), nn.Linear(config.hidden_sizes[-1], config.num_labels))
        self.reset_parameters()

    def init_module(self, module: nn.Module, name: str) -> None:
        """Draw the first weights of one module."""
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        if isinstance(module, nn.Linear | nn.BatchNorm2d):
            module.reset_parameters()

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> Tensor | dict[str, Tensor]:
        """Logits [B, K], or with labels a dict of "loss" and "logits".

        Args:
            pixel_values: [B, I, Y, X].
            labels: class numbers [B], or numbers [B, K]; see `classification_loss`.
        """
        logits = self.classifier(self.pool(self.resnet(pixel_values)))
        if labels is None:
            return logits
        return {"loss": classification_loss(logits, labels, self.config.problem_type), "logits": logits}

    def flops_per_sample(self, image_size: int = 224) -> float:
        """Operations of a training step for each image: three times those of the forward pass's products."""
        return 3.0 * forward_flops(self, torch.Size((1, self.config.num_channels, image_size, image_size)))
