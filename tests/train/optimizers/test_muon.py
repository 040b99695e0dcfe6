"""Muon: the orthogonalisation's band, the update against the paper in fp64 and against torch's, and who trains what."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from deepseek_r1.core import ConfigError
from deepseek_r1.models import GPT2, DigitsNet, GPT2Config, Llama, LlamaConfig
from deepseek_r1.train import Muon, orthogonalize


@settings(deadline=None, max_examples=40)
@given(
    rows=st.integers(1, 24),
    columns=st.integers(1, 24),
    spread=st.floats(0, 2.0),
    size=st.floats(-4, 6),
    seed=st.integers(0, 9999),
)
def test_singular_values_are_in_the_documented_band(rows, columns, spread, size, seed):
    """For any matrix whose singular values span at most two decades, of any size and shape."""
    g = torch.Generator().manual_seed(seed)
    k = min(rows, columns)
    u = torch.linalg.qr(torch.randn(rows, k, generator=g, dtype=torch.float64))[0]
    v = torch.linalg.qr(torch.randn(columns, k, generator=g, dtype=torch.float64))[0]
    values = torch.logspace(0, -spread, k, dtype=torch.float64)
    found = orthogonalize((u * values) @ v.T * 10.0**size)
    result = torch.linalg.svdvals(found)
    assert float(result.min()) > 0.67
    assert float(result.max()) < 1.21
    # the singular vectors stay: U' O V is diagonal
    inner = u.T @ found @ v
    torch.testing.assert_close(inner, torch.diag(inner.diagonal()), rtol=0, atol=1e-9)


def test_small_singular_values_grow_as_documented():
    values = torch.tensor([1.0, 1e-6], dtype=torch.float64)
    after = orthogonalize(torch.diag(values)).diagonal()
    assert float(after[1] / 1e-6) == pytest.approx(480, rel=0.02)
    assert not orthogonalize(torch.zeros(3, 3)).any()


def test_a_stack_is_its_members():
    g = torch.Generator().manual_seed(0)
    stack = torch.randn(3, 6, 4, generator=g, dtype=torch.float64)
    for whole, one in zip(orthogonalize(stack), stack):
        torch.testing.assert_close(whole, orthogonalize(one), rtol=1e-12, atol=1e-12)


def newton_schulz(g):
    a, b, c = 3.4445, -4.7750, 2.0315
    x = g / g.norm()
    if g.shape[0] > g.shape[1]:
        x = x.T
    for _ in range(5):
        x = a * x + b * (x @ x.T) @ x + c * (x @ x.T) @ (x @ x.T) @ x
    return x.T if g.shape[0] > g.shape[1] else x


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("scale", ["adamw", "spectral"])
def test_the_update_is_the_paper_s(nesterov, scale):
    g = torch.Generator().manual_seed(1)
    ps = [
        nn.Parameter(torch.randn(s, generator=g, dtype=torch.float64)) for s in ((6, 4), (4, 6), (6, 4), (3, 2, 2, 2))
    ]
    ws, ms = [p.detach().clone() for p in ps], [torch.zeros_like(p) for p in ps]
    optimizer = Muon(ps, lr=0.02, momentum=0.9, weight_decay=0.1, nesterov=nesterov, scale=scale)
    for _ in range(4):
        for i, p in enumerate(ps):
            p.grad = torch.randn(p.shape, generator=g, dtype=torch.float64)
            ms[i] = 0.9 * ms[i] + p.grad
            ahead = p.grad + 0.9 * ms[i] if nesterov else ms[i]
            rows, columns = p.shape[0], p[0].numel()
            factor = 0.2 * math.sqrt(max(rows, columns)) if scale == "adamw" else math.sqrt(max(1, rows / columns))
            o = newton_schulz(ahead.reshape(rows, columns)).reshape(p.shape)
            ws[i] = ws[i] - 0.02 * (factor * o + 0.1 * ws[i])
        optimizer.step()
    for p, w in zip(ps, ws):
        torch.testing.assert_close(p.detach(), w, rtol=1e-10, atol=1e-10)


def test_torch_s_muon_agrees():
    g = torch.Generator().manual_seed(2)
    weight = torch.randn(12, 20, generator=g)
    a, b = nn.Parameter(weight.clone()), nn.Parameter(weight.clone())
    ours = Muon([a], lr=1e-2, weight_decay=0.1)
    theirs = torch.optim.Muon([b], lr=1e-2, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    for _ in range(3):
        a.grad = torch.randn(12, 20, generator=g)
        b.grad = a.grad.clone()
        ours.step()
        theirs.step()
    # torch iterates in bf16
    change, other = a.detach() - weight, b.detach() - weight
    assert float((change - other).norm() / change.norm()) < 0.03


def test_updates_are_as_large_as_adamw_s():
    """Root mean square about 0.2 times the rate, whatever the shape (Liu et al. 2025)."""
    g = torch.Generator().manual_seed(3)
    for shape in ((64, 64), (128, 32), (16, 256)):
        p = nn.Parameter(torch.zeros(shape))
        p.grad = torch.randn(shape, generator=g)
        Muon([p], lr=1.0, weight_decay=0.0).step()
        assert 0.13 < float(p.detach().square().mean().sqrt()) < 0.25


def test_the_model_decides_who_trains_what():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.words = nn.Embedding(11, 8)
            self.hidden = nn.Linear(8, 8)
            self.norm = nn.LayerNorm(8)
            self.out = nn.Linear(8, 11, bias=False)
            self.out.weight = self.words.weight
            self.extra = nn.Linear(8, 2)

        def get_output_embeddings(self):
            return self.out

    def names(model, **options):
        optimizer = Muon.from_model(model, lr=1e-3, **options)
        by_id = {id(p): n for n, p in model.named_parameters()}
        return {
            (g["use_muon"], g["weight_decay"] > 0): {by_id[id(p)] for p in g["params"]} for g in optimizer.param_groups
        }

    found = names(Tied())
    assert found[True, True] == {"hidden.weight", "extra.weight"}
    assert found[False, True] == {"words.weight"}
    assert found[False, False] == {"hidden.bias", "norm.weight", "norm.bias", "extra.bias"}
    digits = names(DigitsNet())
    assert digits[False, True] == {"head.weight"}
    assert "blocks.1.conv1.weight" in digits[True, True]
    frozen = Tied()
    frozen.hidden.weight.requires_grad_(False)
    assert names(frozen)[True, True] == {"extra.weight"}
    assert (True, True) not in names(nn.Linear(3, 3))


def test_groups_can_say_who_trains_them():
    matrix, other, bias = (nn.Parameter(torch.ones(s)) for s in ((3, 3), (4, 3), (3,)))
    optimizer = Muon([{"params": [matrix], "use_muon": False}, {"params": [other, bias], "lr": 0.5}])
    assert [(g["use_muon"], g["lr"], len(g["params"])) for g in optimizer.param_groups] == [
        (False, 1e-3, 1),
        (True, 0.5, 1),
        (False, 0.5, 1),
    ]
    with pytest.raises(ConfigError, match="no matrix"):
        Muon([{"params": [bias], "use_muon": True}])
    with pytest.raises(ConfigError, match="scale"):
        Muon([matrix], scale="big")
    with pytest.raises(ConfigError, match="ns_steps"):
        Muon([matrix], ns_steps=0)
    with pytest.raises(ValueError, match="empty"):
        Muon([])


@pytest.mark.parametrize("tied", [True, False])
def test_reference_language_models_say_what_their_output_is(tied):
    llama = LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        tie_word_embeddings=tied,
    )  # fmt: skip
    gpt2 = GPT2Config(vocab_size=50, n_positions=16, n_embd=16, n_layer=2, n_head=2, tie_word_embeddings=tied)
    for model, outer in (
        (Llama(llama), {"model.embed_tokens.weight"}),
        (GPT2(gpt2), {"transformer.wte.weight", "transformer.wpe.weight"}),
    ):
        names = {id(p): n for n, p in model.named_parameters()}
        groups = Muon.from_model(model, lr=1e-3).param_groups
        others = {names[id(p)] for g in groups if not g["use_muon"] for p in g["params"] if p.ndim >= 2}
        assert others == (outer if tied else outer | {"lm_head.weight"})
