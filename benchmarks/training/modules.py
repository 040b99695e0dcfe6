"""Modules as a user of PyTorch writes them, which know nothing of deepseek-r1."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PlainViT(nn.Module):
    """A vision transformer of torch's own layers; [B, 3, size, size] to [B, classes]."""

    def __init__(
        self, size: int = 224, patch: int = 16, dim: int = 384, depth: int = 12, heads: int = 6, classes: int = 1000
    ) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, dim, patch, stride=patch)
        self.place = nn.Parameter(torch.randn(1, (size // patch) ** 2 + 1, dim) * 0.02)
        self.first = nn.Parameter(torch.zeros(1, 1, dim))
        layer = nn.TransformerEncoderLayer(
            dim, heads, 4 * dim, dropout=0.1, activation="gelu", batch_first=True, norm_first=True
        )
        self.blocks = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, classes)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patches(x).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.first.expand(len(x), -1, -1), tokens], 1) + self.place
        out: Tensor = self.head(self.norm(self.blocks(tokens))[:, 0])
        return out


class Tagger(nn.Module):
    """Two LSTMs, one in each direction, that give each token a tag; [B, L] to [B, tags, L]."""

    def __init__(self, words: int = 20_000, dim: int = 256, hidden: int = 256, tags: int = 17) -> None:
        super().__init__()
        self.words = nn.Embedding(words, dim)
        self.lstm = nn.LSTM(dim, hidden, num_layers=2, bidirectional=True, batch_first=True, dropout=0.2)
        self.tags = nn.Linear(2 * hidden, tags)

    def forward(self, ids: Tensor) -> Tensor:
        x, _ = self.lstm(F.dropout(self.words(ids), 0.2, self.training))
        out: Tensor = self.tags(x).transpose(1, 2)
        return out
