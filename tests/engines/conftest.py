"""Models and programs that several engines are tried on."""

import pytest
import torch
from torch import nn

from deepseek_r1.graph import capture
from deepseek_r1.quantization import quantize


class Residual(nn.Module):
    """Four convolutions (one depthwise), two residual additions, a linear head: 5 layers to quantise."""

    def __init__(self):
        super().__init__()
        self.stem, self.a, self.b = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 1)
        self.depth = nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False)
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        x = torch.relu(self.stem(x))
        x = torch.relu(x + self.b(torch.relu(self.a(x))))
        x = x + nn.functional.relu6(self.depth(x))
        return self.head(x.mean((2, 3)))


class Attention(nn.Module):
    """One transformer block over words: embedding, positions of any length, attention with a mask, normalisation."""

    def __init__(self, width=16, heads=2):
        super().__init__()
        self.words, self.norm, self.last = nn.Embedding(30, width), nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.heads = heads

    def forward(self, ids, mask):
        x = self.words(ids)
        positions = torch.arange(ids.shape[1], dtype=torch.float32)
        x = x + torch.sin(positions)[None, :, None]
        parts = self.qkv(self.norm(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        hidden = (1 - mask)[:, None, None, :] * -3.0e38
        x = x + self.out(
            nn.functional.scaled_dot_product_attention(*parts, attn_mask=hidden).transpose(1, 2).flatten(2)
        )
        x = x + self.down(nn.functional.gelu(self.up(self.last(x))))
        return (x * mask[..., None]).sum(1)


def attention_inputs(batch, length):
    """Word numbers and a mask that hides the second half of all rows but the first."""
    generator = torch.Generator().manual_seed(batch * 100 + length)
    mask = torch.ones(batch, length)
    mask[1:, length // 2 :] = 0
    return torch.randint(0, 30, (batch, length), generator=generator), mask


@pytest.fixture(scope="session")
def residual():
    """The float program of the residual network."""
    torch.manual_seed(0)
    return capture(Residual(), torch.randn(2, 3, 10, 10))


@pytest.fixture(scope="session")
def quantised():
    """The int8 program of the residual network; its parent is the float one."""
    torch.manual_seed(0)
    return quantize(Residual(), dataset=[torch.randn(32, 3, 10, 10)])


@pytest.fixture(scope="session", name="attention_inputs")
def make_attention_inputs():
    """Inputs of the block by batch and length."""
    return attention_inputs


@pytest.fixture(scope="session")
def attention():
    """The block with a free batch and a free length."""
    torch.manual_seed(0)
    axes = {0: "batch", 1: "sequence"}
    return capture(Attention(), attention_inputs(2, 6), dynamic_shapes={"ids": axes, "mask": axes}, name="attention")
