"""Small models of the shapes that a memory plan meets."""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import nn

ATTENTION_DROPOUT = 0.1


class Attention(nn.Module):
    def __init__(self, d: int, p: float) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(d), nn.Linear(d, 3 * d), nn.Linear(d, d)
        self.mlp = nn.Sequential(nn.LayerNorm(d), nn.Linear(d, 4 * d), nn.GELU(), nn.Linear(4 * d, d), nn.Dropout(p))

    def forward(self, x):
        n, t, d = x.shape
        q, k, v = self.qkv(self.norm(x)).view(n, t, 3, 4, d // 4).permute(2, 0, 3, 1, 4)
        a = F.dropout((q @ k.transpose(-1, -2) / (d // 4) ** 0.5).softmax(-1), ATTENTION_DROPOUT, self.training) @ v
        x = x + self.out(a.transpose(1, 2).reshape(n, t, d))
        return x + self.mlp(x)


class Transformer(nn.Module):
    """Tied embedding and head, dropout, blocks in a list."""

    def __init__(self, blocks: int = 4, d: int = 32, vocabulary: int = 40, p: float = 0.1) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, d)
        self.blocks = nn.ModuleList(Attention(d, p) for _ in range(blocks))
        self.head = nn.Linear(d, vocabulary, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(x).transpose(1, 2)


class Bottleneck(nn.Module):
    def __init__(self, inside: int, outside: int, stride: int = 1) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(inside, outside, 3, stride, 1, bias=False), nn.BatchNorm2d(outside), nn.ReLU(inplace=True),
            nn.Conv2d(outside, outside, 3, 1, 1, bias=False), nn.BatchNorm2d(outside),
        )  # fmt: skip
        same = stride == 1 and inside == outside
        self.shortcut = nn.Identity() if same else nn.Conv2d(inside, outside, 1, stride)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        y = self.body(x)
        y += self.shortcut(x)
        return self.relu(y)


class ResNet(nn.Module):
    """Batch norms, operations in place, stages of different width."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm, self.relu = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True)
        self.stage1 = nn.Sequential(*(Bottleneck(8, 8) for _ in range(3)))
        self.stage2 = nn.Sequential(Bottleneck(8, 16, 2), Bottleneck(16, 16), Bottleneck(16, 16))
        self.fc = nn.Linear(16, 10)

    def forward(self, x):
        x = self.relu(self.norm(self.stem(x)))
        return self.fc(self.stage2(self.stage1(x)).mean((2, 3)))


class Twice(nn.Module):
    """Each block is called twice in a forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(24, 96), nn.GELU(), nn.Linear(96, 24)) for _ in range(3))
        self.head = nn.Linear(24, 1)

    def forward(self, x):
        for _ in range(2):
            for block in self.blocks:
                x = x + F.dropout(block(x), 0.2, self.training)
        return self.head(x)


class Unstructured(nn.Module):
    """No list of blocks: some children and some functions."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(16, 128), nn.Linear(128, 128), nn.Linear(128, 1)

    def forward(self, x):
        return self.third(F.gelu(self.second(torch.tanh(self.first(x)))))


class EncoderDecoder(nn.Module):
    """Two chains; every block of the second reads the end of the first."""

    def __init__(self, d: int = 24) -> None:
        super().__init__()
        self.encoder = nn.ModuleList(nn.TransformerEncoderLayer(d, 2, 48, batch_first=True) for _ in range(3))
        self.decoder = nn.ModuleList(nn.TransformerDecoderLayer(d, 2, 48, batch_first=True) for _ in range(3))
        self.head = nn.Linear(d, 1)

    def forward(self, x):
        memory, y = x, x.flip(1)
        for layer in self.encoder:
            memory = layer(memory)
        for layer in self.decoder:
            y = layer(y, memory=memory)
        return self.head(y)


def stack(widths: tuple[int, ...] = (32, 128, 48, 160, 32, 96, 32)) -> nn.Sequential:
    """Linear layers of changing width with an activation after each."""
    layers: list[nn.Module] = []
    for inside, outside in itertools.pairwise(widths):
        layers += [nn.Linear(inside, outside), nn.GELU(approximate="tanh")]
    return nn.Sequential(*layers, nn.Linear(widths[-1], 1))


def nested() -> nn.Sequential:
    """Containers inside containers, and plain activations in place."""

    def part(d):
        return nn.Sequential(nn.Linear(d, 2 * d), nn.ReLU(inplace=True), nn.Linear(2 * d, d), nn.ReLU(inplace=True))

    return nn.Sequential(
        nn.Linear(16, 24), nn.Sequential(nn.Sequential(part(24), part(24)), nn.Sequential(part(24))), nn.Linear(24, 1)
    )


def cases():
    """Name -> (model, inputs, labels); the seed is the caller's."""
    ids = torch.randint(0, 40, (8, 24))
    return {
        "transformer": (Transformer(), ids, torch.randint(0, 40, (8, 24))),
        "resnet": (ResNet(), torch.randn(8, 3, 16, 16), torch.randint(0, 10, (8,))),
        "twice": (Twice(), torch.randn(64, 24), torch.randn(64, 1)),
        "unstructured": (Unstructured(), torch.randn(256, 16), torch.randn(256, 1)),
        "encoder-decoder": (EncoderDecoder(), torch.randn(8, 16, 24), torch.randn(8, 16, 1)),
        "stack": (stack(), torch.randn(512, 32), torch.randn(512, 1)),
        "nested": (nested(), torch.randn(256, 16), torch.randn(256, 1)),
    }


NAMES = ("transformer", "resnet", "twice", "unstructured", "encoder-decoder", "stack", "nested")
