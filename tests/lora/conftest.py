"""Small models of the kinds that get adapters."""

import pytest
import torch
from torch import nn


class Net(nn.Module):
    """An embedding, a convolution, linear layers in numbered blocks, a head."""

    def __init__(self, d: int = 16) -> None:
        super().__init__()
        self.emb = nn.Embedding(11, d)
        self.conv = nn.Conv1d(d, d, 3, padding=1)
        self.layers = nn.ModuleList(Block(d) for _ in range(3))
        self.head = nn.Linear(d, 4)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.emb(ids)
        x = x + torch.tanh(self.conv(x.transpose(1, 2))).transpose(1, 2)
        for layer in self.layers:
            x = layer(x)
        return self.head(x.mean(1))


class Block(nn.Module):
    def __init__(self, d: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(d)
        self.q_proj, self.v_proj = nn.Linear(d, d), nn.Linear(d, d, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(x)
        return x + torch.tanh(self.q_proj(y)) * self.v_proj(y)


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    return Net().eval()


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(0, 11, (5, 7), generator=torch.Generator().manual_seed(1))


def disturb(model: nn.Module, seed: int = 0) -> nn.Module:
    """Random values in everything that is trained, so that adapters have an effect."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        if p.requires_grad:
            noise = 0.3 * torch.randn(p.shape, generator=generator)
            p.data = noise + 1 if "magnitude" in name else noise
    return model
