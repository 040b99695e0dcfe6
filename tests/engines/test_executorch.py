"""What is ExecuTorch's alone; the rest is in test_engines.py."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from deepseek_r1.engines import ENGINES, compile_program
from deepseek_r1.engines._executorch import _attention
from deepseek_r1.graph import capture

needs_executorch = pytest.mark.skipif(
    bool(ENGINES.get("executorch")().unavailable()), reason=ENGINES.get("executorch")().unavailable()
)


def masks(batch, rows, columns):
    """Masks of every kind; the last row of two of them masks every key."""
    generator = torch.Generator().manual_seed(0)
    mask = torch.rand(batch, 1, rows, columns, generator=generator) > 0.3
    mask[..., 0] = True
    lost = mask.clone()
    lost[..., -1, :] = False
    minus = torch.zeros(lost.shape).masked_fill(~lost, float("-inf"))
    return [None, mask, lost, minus, torch.randn(rows, columns, generator=generator)]


@pytest.mark.parametrize("number", range(5))
@pytest.mark.parametrize("scale", [None, 0.5])
def test_attention_answers_as_pytorchs(number, scale):
    q, k, v = torch.randn(2, 3, 5, 8), torch.randn(2, 3, 7, 8), torch.randn(2, 3, 7, 4)
    mask = masks(2, 5, 7)[number]
    expected = F.scaled_dot_product_attention(q, k, v, mask, scale=scale)
    assert torch.allclose(_attention(q, k, v, mask, scale=scale), expected, atol=1e-6)
    assert not expected.isnan().any()


@pytest.mark.parametrize("rows", [3, 6, 9])
def test_causal_attention_answers_as_pytorchs(rows):
    q, k, v = torch.randn(2, 3, rows, 8), torch.randn(2, 3, 6, 8), torch.randn(2, 3, 6, 8)
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    assert torch.allclose(_attention(q, k, v, is_causal=True), expected, atol=1e-6)


class Attend(nn.Module):
    """Attention of two heads that the mask, or the order, hides keys from."""

    def __init__(self, causal):
        super().__init__()
        self.causal = causal

    def forward(self, x, mask):
        mask = None if self.causal else mask.bool()[:, None, None, :]
        heads = x.unflatten(-1, (2, -1)).transpose(1, 2)
        return F.scaled_dot_product_attention(heads, heads, heads, mask, is_causal=self.causal)


@needs_executorch
@pytest.mark.parametrize("causal", [False, True])
def test_masked_attention_of_any_length_and_masks_that_hide_all(causal):
    model = Attend(causal)
    axes = {0: "batch", 1: "sequence"}
    program = capture(model, (torch.randn(2, 6, 8), torch.ones(2, 6)), dynamic_shapes={"x": axes, "mask": axes})
    run = compile_program(ENGINES.get("executorch")(), program)
    for batch, length in ((2, 6), (1, 1), (3, 11)):
        x, mask = torch.randn(batch, length, 8), torch.ones(batch, length)
        mask[-1] = 0  # nothing is left for the last one
        with torch.no_grad():
            expected = model(x, mask)
        assert torch.allclose(run([x, mask])[0], expected, atol=1e-5)
    targets = {n.target for n in program.module().graph.nodes}
    assert torch.ops.aten.scaled_dot_product_attention.default in targets, "the program is left as it was"
