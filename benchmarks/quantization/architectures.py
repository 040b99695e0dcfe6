"""The networks that are trained here: a small GPT, a small ViT and a MobileNet.

Shape suffixes: B batch, T tokens, C channels, V vocabulary, H heads, D channels of a head.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from zoo.convnets import mobilenet_v2

from .corpora import LETTERS, PHOTOGRAPHS, VOCABULARY

#: Tokens that the GPT sees at once.
CONTEXT = 128


class Attention(nn.Module):
    """Multi-head attention of Vaswani et al. 2017 with separate q, k and v."""

    def __init__(self, width: int, heads: int, causal: bool) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x_BTC: Tensor) -> Tensor:
        batch, count, width = x_BTC.shape
        q, k, v = (
            layer(x_BTC).view(batch, count, self.heads, width // self.heads).transpose(1, 2)
            for layer in (self.q, self.k, self.v)
        )
        mixed_BHTD = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.out(mixed_BHTD.transpose(1, 2).reshape(batch, count, width))


class Block(nn.Module):
    """A pre-norm transformer block with a GELU feed-forward part four times as wide."""

    def __init__(self, width: int, heads: int, causal: bool, dropout: float) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, heads, causal)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x_BTC: Tensor) -> Tensor:
        x_BTC = x_BTC + self.dropout(self.attention(self.norm1(x_BTC)))
        return x_BTC + self.dropout(self.down(F.gelu(self.up(self.norm2(x_BTC)))))


class SmallGPT(nn.Module):
    """Token numbers [B, T], T at most `context` -> logits [B, T, V]. After Radford et al. 2019, 3.7 M parameters."""

    def __init__(self, width: int = 256, depth: int = 4, heads: int = 4, context: int = CONTEXT) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(VOCABULARY, width), nn.Embedding(context, width)
        self.blocks = nn.Sequential(*(Block(width, heads, True, 0.05) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, VOCABULARY, bias=False)
        for name, weight in self.named_parameters():
            if weight.ndim == 2:
                nn.init.normal_(weight, std=0.02 / (2 * depth) ** 0.5 if "out." in name or "down." in name else 0.02)

    def forward(self, tokens_BT: Tensor) -> Tensor:
        places_T = torch.arange(tokens_BT.shape[1], device=tokens_BT.device)
        return self.head(self.norm(self.blocks(self.tokens(tokens_BT) + self.places(places_T))))


class SmallViT(nn.Module):
    """Pictures [B, 1, 32, 32] -> logits [B, 62]. After Dosovitskiy et al. 2021, patches of 8 x 8, 1.0 M parameters."""

    def __init__(self, width: int = 128, depth: int = 5, heads: int = 4) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, width, 8, 8)
        self.places = nn.Parameter(torch.randn(1, 16, width) * 0.02)
        self.blocks = nn.Sequential(*(Block(width, heads, False, 0.0) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, len(LETTERS))

    def forward(self, pictures_BCHW: Tensor) -> Tensor:
        x_BTC = self.patches(pictures_BCHW).flatten(2).transpose(1, 2) + self.places
        return self.head(self.norm(self.blocks(x_BTC)).mean(1))


def photo_mobilenet() -> nn.Module:
    """MobileNetV2 at full width: squares of photographs [B, 3, 48, 48] -> logits over which photograph it is."""
    whole = mobilenet_v2(small=False)
    return nn.Sequential(*whole[:-1], nn.Linear(1280, len(PHOTOGRAPHS)))
