"""Convolutional classifiers of the first generations, after their papers: plain, residual, dense, depth-wise."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ._entry import BATCH, Build, Entry, image


def conv(cin: int, cout: int, kernel: int, stride: int = 1, groups: int = 1, act: nn.Module | None = None) -> list:
    """Convolution, batch normalisation and an activation, same padding."""
    made = [
        nn.Conv2d(cin, cout, kernel, stride, kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(cout),
    ]
    return made if act is None else [*made, act]


class Bottleneck(nn.Module):
    """He et al. 2015, with the stride in the 3 x 3 convolution."""

    def __init__(self, cin: int, width: int, stride: int) -> None:
        super().__init__()
        cout = 4 * width
        relu = nn.ReLU(inplace=True)
        self.body = nn.Sequential(
            *conv(cin, width, 1, act=relu), *conv(width, width, 3, stride, act=relu), *conv(width, cout, 1)
        )
        same = cin == cout and stride == 1
        self.skip = nn.Identity() if same else nn.Sequential(*conv(cin, cout, 1, stride))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.body(x) + self.skip(x))


def resnet50(small: bool) -> nn.Module:
    base, depths = (8, (1, 1, 1, 1)) if small else (64, (3, 4, 6, 3))
    parts = [*conv(3, base, 7, 2, act=nn.ReLU(inplace=True)), nn.MaxPool2d(3, 2, 1)]
    cin = base
    for stage, depth in enumerate(depths):
        width = base * 2**stage
        for i in range(depth):
            parts.append(Bottleneck(cin, width, 2 if stage and not i else 1))
            cin = 4 * width
    return nn.Sequential(*parts, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(cin, 1000))


class InvertedResidual(nn.Module):
    """Sandler et al. 2018."""

    def __init__(self, cin: int, cout: int, stride: int, expand: int) -> None:
        super().__init__()
        hidden = cin * expand
        first = conv(cin, hidden, 1, act=nn.ReLU6(inplace=True)) if expand > 1 else []
        middle = conv(hidden, hidden, 3, stride, groups=hidden, act=nn.ReLU6(inplace=True))
        self.body = nn.Sequential(*first, *middle, *conv(hidden, cout, 1))
        self.same = stride == 1 and cin == cout

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x) if self.same else self.body(x)


def mobilenet_v2(small: bool) -> nn.Module:
    rows = [(1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1)]
    if small:
        rows = [(1, 8, 1, 1), (6, 8, 2, 2)]
    cin, last = (8, 16) if small else (32, 1280)
    parts = conv(3, cin, 3, 2, act=nn.ReLU6(inplace=True))
    for expand, cout, depth, stride in rows:
        for i in range(depth):
            parts.append(InvertedResidual(cin, cout, 1 if i else stride, expand))
            cin = cout
    parts += conv(cin, last, 1, act=nn.ReLU6(inplace=True))
    return nn.Sequential(*parts, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.2), nn.Linear(last, 1000))


def vgg11(small: bool) -> nn.Module:
    """Simonyan and Zisserman 2014, configuration A with batch normalisation."""
    widths = (8, "M", 8, "M") if small else (64, "M", 128, "M", 256, 256, "M", 512, 512, "M", 512, 512, "M")
    parts: list[nn.Module] = []
    cin = 3
    for width in widths:
        if isinstance(width, int):
            parts += conv(cin, width, 3, act=nn.ReLU(inplace=True))
            cin = width
        else:
            parts.append(nn.MaxPool2d(2, 2))
    hidden = 16 if small else 4096
    head = [
        nn.Linear(cin * 49, hidden), nn.ReLU(True), nn.Dropout(),
        nn.Linear(hidden, hidden), nn.ReLU(True), nn.Dropout(), nn.Linear(hidden, 1000),
    ]  # fmt: skip
    return nn.Sequential(*parts, nn.AdaptiveAvgPool2d(7), nn.Flatten(), *head)


class Fire(nn.Module):
    """Iandola et al. 2016."""

    def __init__(self, cin: int, squeeze: int, expand: int) -> None:
        super().__init__()
        self.squeeze = nn.Sequential(nn.Conv2d(cin, squeeze, 1), nn.ReLU(inplace=True))
        self.one = nn.Sequential(nn.Conv2d(squeeze, expand, 1), nn.ReLU(inplace=True))
        self.three = nn.Sequential(nn.Conv2d(squeeze, expand, 3, padding=1), nn.ReLU(inplace=True))

    def forward(self, x: Tensor) -> Tensor:
        x = self.squeeze(x)
        return torch.cat([self.one(x), self.three(x)], 1)


def squeezenet(small: bool) -> nn.Module:
    def pool() -> nn.Module:
        return nn.MaxPool2d(3, 2, ceil_mode=True)

    if small:
        parts = [nn.Conv2d(3, 8, 3, 2), nn.ReLU(inplace=True), pool(), Fire(8, 4, 8), Fire(16, 4, 8)]
        return nn.Sequential(*parts, nn.Conv2d(16, 1000, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    parts = [
        nn.Conv2d(3, 64, 3, 2), nn.ReLU(inplace=True), pool(), Fire(64, 16, 64), Fire(128, 16, 64),
        pool(), Fire(128, 32, 128), Fire(256, 32, 128),
        pool(), Fire(256, 48, 192), Fire(384, 48, 192), Fire(384, 64, 256), Fire(512, 64, 256), nn.Dropout(),
    ]  # fmt: skip
    return nn.Sequential(*parts, nn.Conv2d(512, 1000, 1), nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(1), nn.Flatten())


class Dense(nn.Module):
    """One layer of a dense block (Huang et al. 2016): its input comes along in its output."""

    def __init__(self, cin: int, growth: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.BatchNorm2d(cin), nn.ReLU(inplace=True), nn.Conv2d(cin, 4 * growth, 1, bias=False),
            nn.BatchNorm2d(4 * growth), nn.ReLU(inplace=True), nn.Conv2d(4 * growth, growth, 3, padding=1, bias=False),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.body(x)], 1)


def densenet121(small: bool) -> nn.Module:
    growth, depths = (4, (2, 2)) if small else (32, (6, 12, 24, 16))
    width = 2 * growth
    parts = [*conv(3, width, 7, 2, act=nn.ReLU(inplace=True)), nn.MaxPool2d(3, 2, 1)]
    for stage, depth in enumerate(depths):
        for _ in range(depth):
            parts.append(Dense(width, growth))
            width += growth
        parts += [nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
        if stage < len(depths) - 1:
            parts += [nn.Conv2d(width, width // 2, 1, bias=False), nn.AvgPool2d(2, 2)]
            width //= 2
    return nn.Sequential(*parts, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 1000))


class Shuffle(nn.Module):
    """A unit of ShuffleNet V2 (Ma et al. 2018): two branches, whose channels are interleaved."""

    def __init__(self, cin: int, cout: int, stride: int) -> None:
        super().__init__()
        half = cout // 2
        inner = cin if stride > 1 else half
        self.split = stride == 1
        self.left = nn.Identity()
        if stride > 1:
            self.left = nn.Sequential(*conv(cin, cin, 3, stride, cin), *conv(cin, half, 1, act=nn.ReLU(inplace=True)))
        self.right = nn.Sequential(
            *conv(inner, half, 1, act=nn.ReLU(inplace=True)), *conv(half, half, 3, stride, half),
            *conv(half, half, 1, act=nn.ReLU(inplace=True)),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        left, right = x.chunk(2, 1) if self.split else (x, x)
        joined = torch.cat([self.left(left), self.right(right)], 1)
        n, c, h, w = joined.shape
        return joined.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)


def shufflenet_v2(small: bool) -> nn.Module:
    widths, depths, last = ((8, 16), (2,), 32) if small else ((24, 116, 232, 464), (4, 8, 4), 1024)
    parts = [*conv(3, widths[0], 3, 2, act=nn.ReLU(inplace=True)), nn.MaxPool2d(3, 2, 1)]
    for cin, cout, depth in zip(widths, widths[1:], depths):
        parts += [Shuffle(cin if not i else cout, cout, 1 if i else 2) for i in range(depth)]
    parts += conv(widths[-1], last, 1, act=nn.ReLU(inplace=True))
    return nn.Sequential(*parts, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(last, 1000))


def efficientnet_lite0(small: bool) -> nn.Module:
    """Tan and Le 2019 without squeeze-and-excitation, from the package efficientnet-lite-pytorch."""
    from efficientnet_lite_pytorch import BlockArgs, BlockDecoder, EfficientNet, GlobalParams, get_model_params

    if not small:
        return EfficientNet.from_name("efficientnet-lite0")
    blocks, settings = get_model_params("efficientnet-lite0", None)
    assert isinstance(blocks[0], BlockArgs)
    assert isinstance(settings, GlobalParams)
    few = BlockDecoder.decode(["r1_k3_s11_e1_i32_o16_se0.25", "r2_k5_s22_e6_i16_o24_se0.25"])
    return EfficientNet(few, settings._replace(image_size=64))


IMAGE_224 = "float32 [1, 3, 224, 224]"


def _classifier(name: str, build: Build, parameters: int, small_side: int = 64) -> Entry:
    return Entry(
        name=name, field="image", build=build, draw=image(224, small_side), shapes=IMAGE_224, parameters=parameters,
        dynamic=BATCH,
    )  # fmt: skip


ENTRIES = [
    _classifier("resnet50", resnet50, 25_557_032),
    _classifier("mobilenet_v2", mobilenet_v2, 3_504_872),
    _classifier("efficientnet_lite0", efficientnet_lite0, 4_652_008),
    _classifier("vgg11_bn", vgg11, 132_866_088),
    _classifier("squeezenet1_1", squeezenet, 1_235_496),
    _classifier("densenet121", densenet121, 7_978_856),
    _classifier("shufflenet_v2_x1", shufflenet_v2, 2_278_604),
]
