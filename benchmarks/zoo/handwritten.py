"""A GPT whose author wrote norms, activation and attention out in plain tensor arithmetic, as many repositories do."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ._entry import TOKENS, Entry, tokens


class RootMeanSquare(nn.Module):
    """Normalisation by the root of the mean square (Zhang and Sennrich 2019)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


class Layer(nn.Module):
    """Causal attention and a feed-forward part, each behind a norm (Radford et al. 2019)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = RootMeanSquare(width), RootMeanSquare(width)
        self.query, self.key, self.value, self.out = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.dropout = nn.Dropout(0.1)

    def forward(self, x_BLC: Tensor) -> Tensor:
        x_BLC = x_BLC + self.dropout(self._attend(self.norm1(x_BLC)))
        h_BLH = self.up(self.norm2(x_BLC))
        h_BLH = 0.5 * h_BLH * (1 + torch.tanh(math.sqrt(2 / math.pi) * (h_BLH + 0.044715 * h_BLH**3)))
        return x_BLC + self.dropout(self.down(h_BLH))

    def _attend(self, x_BLC: Tensor) -> Tensor:
        batch, length, width = x_BLC.shape
        q_BHLD, k_BHLD, v_BHLD = (
            made(x_BLC).view(batch, length, self.heads, width // self.heads).transpose(1, 2)
            for made in (self.query, self.key, self.value)
        )
        score_BHLL = q_BHLD @ k_BHLD.transpose(-2, -1) / math.sqrt(width // self.heads)
        future_LL = torch.ones(length, length, dtype=torch.bool, device=x_BLC.device).triu(1)
        share_BHLL = self.dropout(score_BHLL.masked_fill(future_LL, float("-inf")).softmax(-1))
        return self.out((share_BHLL @ v_BHLD).transpose(1, 2).contiguous().view(batch, length, width))


class Gpt(nn.Module):
    """Embeddings of tokens and places, layers, a norm, and logits of every place."""

    def __init__(self, vocabulary: int, places: int, depth: int, width: int, heads: int) -> None:
        super().__init__()
        self.token, self.place = nn.Embedding(vocabulary, width), nn.Embedding(places, width)
        self.layers = nn.Sequential(*[Layer(width, heads) for _ in range(depth)])
        self.norm, self.head = RootMeanSquare(width), nn.Linear(width, vocabulary, bias=False)

    def forward(self, ids_BL: Tensor) -> Tensor:
        x_BLC = self.token(ids_BL) + self.place(torch.arange(ids_BL.shape[1], device=ids_BL.device))
        return self.head(self.norm(self.layers(x_BLC)))


def gpt(small: bool) -> nn.Module:
    return Gpt(99, 64, 2, 16, 2) if small else Gpt(8000, 512, 6, 512, 8)


ENTRIES = [
    Entry(
        name="handwritten_gpt", field="text", build=gpt, draw=tokens(8000), shapes="int64 [1, 256]", dynamic=TOKENS,
        length=256, parameters=27_350_528,
    )
]  # fmt: skip
