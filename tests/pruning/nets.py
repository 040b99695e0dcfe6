"""Small networks with the structures that pruning has to understand."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn


def half_of(structure, groups):
    """A mask of every second unit of these groups."""
    return structure.mask(np.concatenate([g.units[1::2] for g in groups] or [np.zeros(0, dtype=np.int64)]))


class Proportional(nn.Module):
    """A block whose code takes the width of a head from the width of its input."""

    def __init__(self, dim=32, heads=4):
        super().__init__()
        self.heads = heads
        self.first, self.last = nn.Linear(6, dim), nn.Linear(dim, 3)
        self.q, self.k, self.v, self.out = (nn.Linear(dim, dim) for _ in range(4))
        self.up, self.down = nn.Linear(dim, 48), nn.Linear(48, dim)

    def forward(self, x):
        x = self.first(x)
        b, n, width = x.shape
        q, k, v = (m(x).view(b, n, self.heads, width // self.heads).transpose(1, 2) for m in (self.q, self.k, self.v))
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, -1))
        return self.last(x + self.down(F.gelu(self.up(x))))


class Attention(nn.Module):
    """One projection for queries, keys and values, heads by a size that is written down."""

    def __init__(self, dim=24, heads=4):
        super().__init__()
        self.heads, self.head_dim = heads, dim // heads
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x):
        b, n, _ = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.heads, self.head_dim).permute(2, 0, 3, 1, 4)
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, -1))


class ByHand(nn.Module):
    """Attention spelled out, whose last view has the whole width as an attribute."""

    def __init__(self, dim=24, heads=4):
        super().__init__()
        self.n_heads, self.head_dim, self.total = heads, dim // heads, dim
        self.q, self.k, self.v = (nn.Linear(dim, dim, bias=False) for _ in range(3))
        self.out = nn.Linear(dim, dim)

    def forward(self, x):
        b, n, _ = x.shape
        q, k, v = (m(x).view(b, n, self.n_heads, self.head_dim).transpose(1, 2) for m in (self.q, self.k, self.v))
        weights = (q @ k.transpose(-2, -1) * self.head_dim**-0.5).softmax(-1)
        return self.out((weights @ v).transpose(1, 2).contiguous().view(b, n, self.total))


class Block(nn.Module):
    """Pre-norm transformer block with a gated hidden layer."""

    def __init__(self, dim=24, hidden=40, attention=Attention):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.RMSNorm(dim)
        self.attention = attention(dim)
        self.gate, self.up = nn.Linear(dim, hidden, bias=False), nn.Linear(dim, hidden, bias=False)
        self.down = nn.Linear(hidden, dim, bias=False)

    def forward(self, x):
        x = x + self.attention(self.norm1(x))
        y = self.norm2(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


class Encoder(nn.Module):
    """Embedding with positions, blocks, a head on the mean."""

    def __init__(self, attention=Attention):
        super().__init__()
        self.embed, self.position = nn.Embedding(50, 24), nn.Parameter(0.1 * torch.randn(1, 10, 24))
        self.blocks = nn.Sequential(Block(attention=attention), Block(attention=attention))
        self.head = nn.Linear(24, 5)

    def forward(self, ids):
        return self.head(self.blocks(self.embed(ids) + self.position[:, : ids.shape[1]]).mean(1))


class Basic(nn.Module):
    """Plain residual block."""

    def __init__(self, cin, cout, stride=1):
        super().__init__()
        self.a, self.n1 = nn.Conv2d(cin, cout, 3, stride, 1, bias=False), nn.BatchNorm2d(cout)
        self.b, self.n2 = nn.Conv2d(cout, cout, 3, 1, 1, bias=False), nn.BatchNorm2d(cout)
        same = cin == cout and stride == 1
        self.skip = nn.Identity() if same else nn.Conv2d(cin, cout, 1, stride)

    def forward(self, x):
        return F.relu(self.n2(self.b(F.relu(self.n1(self.a(x))))) + self.skip(x))


class Inverted(nn.Module):
    """MobileNet's block with squeeze and excitation."""

    def __init__(self, cin, hidden):
        super().__init__()
        self.expand = nn.Sequential(nn.Conv2d(cin, hidden, 1, bias=False), nn.BatchNorm2d(hidden), nn.ReLU6())
        self.depth = nn.Sequential(
            nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden, bias=False), nn.BatchNorm2d(hidden), nn.Hardswish()
        )
        self.down, self.up = nn.Conv2d(hidden, 4, 1), nn.Conv2d(4, hidden, 1)
        self.project = nn.Sequential(nn.Conv2d(hidden, cin, 1, bias=False), nn.BatchNorm2d(cin))

    def forward(self, x):
        y = self.depth(self.expand(x))
        y = y * torch.sigmoid(self.up(F.relu(self.down(y.mean((2, 3), keepdim=True)))))
        return x + self.project(y)


def residual():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        Basic(8, 8),
        Basic(8, 16, 2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 5),
    )


def inverted():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, 1), Inverted(8, 24), Inverted(8, 16), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(8 * 4, 5)
    )


def grouped():
    """Grouped convolutions and norms, with many small groups and with few large ones."""
    return nn.Sequential(
        nn.Conv2d(3, 32, 3), nn.GroupNorm(8, 32), nn.Conv2d(32, 32, 3, groups=8), nn.ReLU(), nn.Conv2d(32, 24, 1),
        nn.GroupNorm(2, 24), nn.Conv2d(24, 24, 3, groups=2), nn.GELU(), nn.GroupNorm(1, 24), nn.Conv2d(24, 5, 1),
    )  # fmt: skip


class Joined(nn.Module):
    """Concatenation, halves by `chunk`, a gated linear unit and a transposed convolution."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(3, 12, 3, padding=1)
        self.norm = nn.BatchNorm2d(20)
        self.wide, self.up = nn.Conv2d(20, 24, 1), nn.ConvTranspose2d(12, 16, 2, 2)
        self.gated, self.out = nn.Conv2d(16, 20, 1), nn.Conv2d(10, 5, 1)

    def forward(self, x):
        y = self.norm(torch.cat([self.a(x), self.b(x)], 1))
        first, second = self.wide(F.elu(y)).chunk(2, 1)
        return self.out(F.glu(self.gated(self.up(first * second.tanh())), 1))


class Shuffled(nn.Module):
    """Channels interleaved, as in ShuffleNet."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.out = nn.Conv2d(3, 8, 1), nn.Conv2d(3, 8, 1), nn.Conv2d(16, 5, 1)

    def forward(self, x):
        y = torch.cat([self.a(x), self.b(x)], 1)
        n, c, h, w = y.shape
        return self.out(y.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w))


class Tied(nn.Module):
    """One weight as embedding and head."""

    def __init__(self):
        super().__init__()
        self.embed, self.norm, self.head = nn.Embedding(30, 16), nn.LayerNorm(16), nn.Linear(16, 30, bias=False)
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        x = self.embed(ids)
        return self.head(self.norm(x + self.down(self.up(x).relu())))


class Sized(nn.Module):
    """Cuts its channels at a size that is an attribute, and views them at one that is a number in the code."""

    def __init__(self):
        super().__init__()
        self.first, self.left = nn.Linear(6, 20), 12
        self.a, self.b = nn.Linear(12, 7), nn.Linear(8, 7)
        self.fixed, self.out = nn.Linear(7, 18), nn.Linear(18, 3)

    def forward(self, x):
        u, v = self.first(x).split([self.left, 20 - 12], dim=-1)
        return self.out(self.fixed(self.a(u) + self.b(v)).view(-1, 18))


IMAGE = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
IDS = torch.randint(0, 30, (2, 10), generator=torch.Generator().manual_seed(1))
EVERY = {
    "residual": (residual, IMAGE), "inverted": (inverted, IMAGE), "grouped": (grouped, IMAGE),
    "joined": (Joined, IMAGE), "shuffled": (Shuffled, IMAGE), "encoder": (Encoder, IDS),
    "by_hand": (lambda: Encoder(ByHand), IDS), "tied": (Tied, IDS),
}  # fmt: skip
