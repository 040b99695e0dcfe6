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


class Block(nn.Module):
    """GPT-2's block: attention and a perceptron, each behind a norm, with dropout."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.qkv, self.out = nn.LayerNorm(dim), nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim), nn.Dropout(0.1))

    def forward(self, x: Tensor) -> Tensor:
        n, t, d = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(n, t, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        a = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(n, t, d)
        x = x + F.dropout(self.out(a), 0.1, self.training)
        return x + self.mlp(self.norm2(x))


class GPT(nn.Module):
    """GPT-2's decoder with tied embeddings; ids [N, T] to logits [N, vocabulary, T]."""

    def __init__(self, vocabulary: int, dim: int, depth: int, heads: int, length: int) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(vocabulary, dim), nn.Embedding(length, dim)
        self.blocks = nn.ModuleList(Block(dim, heads) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, vocabulary, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids) + self.places(torch.arange(ids.shape[1], device=ids.device))
        for block in self.blocks:
            x = block(x)
        out: Tensor = self.head(self.norm(x)).transpose(1, 2)
        return out


class Bottleneck(nn.Module):
    """ResNet's block of three convolutions, with operations in place."""

    def __init__(self, inside: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inside, width, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width)
        self.conv3, self.bn3 = nn.Conv2d(width, 4 * width, 1, bias=False), nn.BatchNorm2d(4 * width)
        self.relu = nn.ReLU(inplace=True)
        self.shortcut: nn.Module | None = None
        if stride != 1 or inside != 4 * width:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inside, 4 * width, 1, stride, bias=False), nn.BatchNorm2d(4 * width)
            )

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        y += x if self.shortcut is None else self.shortcut(x)
        out: Tensor = self.relu(y)
        return out


class ResNet(nn.Module):
    """He et al., arXiv 1512.03385; (3, 8, 36, 3) blocks and width 64 make ResNet-152."""

    def __init__(self, blocks: tuple[int, ...], width: int, classes: int = 1000) -> None:
        super().__init__()
        self.conv, self.bn, self.relu = nn.Conv2d(3, width, 7, 2, 3, bias=False), nn.BatchNorm2d(width), nn.ReLU(True)
        self.pool = nn.MaxPool2d(3, 2, 1)
        self.stages, inside = nn.ModuleList(), width
        for stage, count in enumerate(blocks):
            layers = []
            for k in range(count):
                layers.append(Bottleneck(inside, width * 2**stage, 2 if stage and not k else 1))
                inside = 4 * width * 2**stage
            self.stages.append(nn.Sequential(*layers))
        self.fc = nn.Linear(inside, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.relu(self.bn(self.conv(x))))
        for stage in self.stages:
            x = stage(x)
        out: Tensor = self.fc(x.mean((2, 3)))
        return out
