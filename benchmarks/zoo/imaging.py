"""Image networks that are no plain classifiers of convolutions: transformers, mixers, U-Net, autoencoder."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn

from ._entry import BATCH, Build, Entry, Named, image


def vit_b16(small: bool) -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    config = ViTConfig(num_labels=1000, **({"image_size": 32, "patch_size": 8, **sizes} if small else {}))
    return Named(ViTForImageClassification(config), "logits", "pixel_values")


def deit_small(small: bool) -> nn.Module:
    from transformers import DeiTConfig, DeiTForImageClassification

    sizes = {"hidden_size": 384, "num_attention_heads": 6, "intermediate_size": 1536}
    if small:
        sizes = {
            "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32,
            "image_size": 32, "patch_size": 8,
        }  # fmt: skip
    return Named(DeiTForImageClassification(DeiTConfig(num_labels=1000, **sizes)), "logits", "pixel_values")


def swin_tiny(small: bool) -> nn.Module:
    from transformers import SwinConfig, SwinForImageClassification

    sizes = {"image_size": 32, "patch_size": 2, "embed_dim": 8, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4}
    return Named(
        SwinForImageClassification(SwinConfig(num_labels=1000, **(sizes if small else {}))), "logits", "pixel_values"
    )


def convnext_tiny(small: bool) -> nn.Module:
    from transformers import ConvNextConfig, ConvNextForImageClassification

    sizes = {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2} if small else {}
    return Named(ConvNextForImageClassification(ConvNextConfig(num_labels=1000, **sizes)), "logits", "pixel_values")


def clip_vision_b32(small: bool) -> nn.Module:
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    sizes = {
        "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32,
        "image_size": 32, "patch_size": 8,
    } if small else {}  # fmt: skip
    return Named(CLIPVisionModelWithProjection(CLIPVisionConfig(**sizes)), "image_embeds", "pixel_values")


class Mixer(nn.Module):
    """One layer of MLP-Mixer (Tolstikhin et al. 2021)."""

    def __init__(self, patches: int, width: int, across: int, along: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.across = nn.Sequential(nn.Linear(patches, across), nn.GELU(), nn.Linear(across, patches))
        self.along = nn.Sequential(nn.Linear(width, along), nn.GELU(), nn.Linear(along, width))

    def forward(self, x_NPC: Tensor) -> Tensor:
        x_NPC = x_NPC + self.across(self.norm1(x_NPC).transpose(1, 2)).transpose(1, 2)
        return x_NPC + self.along(self.norm2(x_NPC))


class MixerS16(nn.Module):
    """Patches of 16 x 16, eight layers."""

    def __init__(self, side: int, patch: int, width: int, depth: int, across: int, along: int) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, patch, patch)
        layers = [Mixer((side // patch) ** 2, width, across, along) for _ in range(depth)]
        self.layers = nn.Sequential(*layers, nn.LayerNorm(width))
        self.head = nn.Linear(width, 1000)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers(self.patches(x).flatten(2).transpose(1, 2)).mean(1))


def mixer_s16(small: bool) -> nn.Module:
    return MixerS16(32, 8, 16, 2, 8, 32) if small else MixerS16(224, 16, 512, 8, 256, 2048)


def _double(cin: int, cout: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(cin, cout, 3, padding=1, bias=False), nn.BatchNorm2d(cout), nn.ReLU(inplace=True),
        nn.Conv2d(cout, cout, 3, padding=1, bias=False), nn.BatchNorm2d(cout), nn.ReLU(inplace=True),
    )  # fmt: skip


class UNet(nn.Module):
    """Ronneberger et al. 2015 with padding and batch normalisation."""

    def __init__(self, base: int, depth: int) -> None:
        super().__init__()
        widths = [base * 2**i for i in range(depth + 1)]
        self.down = nn.ModuleList(_double(cin, cout) for cin, cout in zip([3, *widths], widths))
        pairs = list(zip(widths[1:], widths))[::-1]
        self.up = nn.ModuleList(nn.ConvTranspose2d(cin, cout, 2, 2) for cin, cout in pairs)
        self.merge = nn.ModuleList(_double(2 * cout, cout) for _, cout in pairs)
        self.head = nn.Conv2d(base, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        skips = []
        for i, block in enumerate(self.down):
            x = block(torch.max_pool2d(x, 2) if i else x)
            skips.append(x)
        for up, merge, skip in zip(self.up, self.merge, skips[-2::-1]):
            x = merge(torch.cat([skip, up(x)], 1))
        return self.head(x)


def unet(small: bool) -> nn.Module:
    return UNet(4, 2) if small else UNet(32, 4)


def autoencoder(small: bool) -> nn.Module:
    """Strided convolutions down to a code, transposed ones back up."""
    widths = (3, 8, 8) if small else (3, 64, 128, 256, 512)
    down = [m for a, b in itertools.pairwise(widths) for m in (nn.Conv2d(a, b, 4, 2, 1), nn.LeakyReLU(0.2))]
    back = widths[::-1]
    up = [m for a, b in itertools.pairwise(back) for m in (nn.ConvTranspose2d(a, b, 4, 2, 1), nn.ReLU())]
    return nn.Sequential(*down, *up[:-1], nn.Sigmoid())


def _image(name: str, build: Build, side: int, small_side: int, parameters: int) -> Entry:
    return Entry(
        name=name, field="image", build=build, draw=image(side, small_side), shapes=f"float32 [1, 3, {side}, {side}]",
        parameters=parameters, dynamic=BATCH,
    )  # fmt: skip


ENTRIES = [
    _image("vit_b16", vit_b16, 224, 32, 86_567_656),
    _image("deit_small", deit_small, 224, 32, 22_051_432),
    _image("swin_tiny", swin_tiny, 224, 32, 28_288_354),
    _image("convnext_tiny", convnext_tiny, 224, 64, 28_589_128),
    _image("clip_vision_b32", clip_vision_b32, 224, 32, 87_849_216),
    _image("mixer_s16", mixer_s16, 224, 32, 18_528_264),
    _image("unet", unet, 192, 16, 7_763_074),
    _image("autoencoder", autoencoder, 128, 16, 5_512_579),
]
