"""Programs in bfloat16 and float16: close, with the types they had, and nothing of the float32 program changed."""

import pytest
import torch
import torch.utils._pytree as pytree
from torch import nn

from deepseek_r1.core import UnsupportedOpError
from deepseek_r1.engines._cast import cast
from deepseek_r1.graph import capture


class Normed(nn.Module):
    """A root-mean-square norm written out, with its own cast to float32, around a convolution and a batch norm."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv1d(4, 8, 3, padding=1), nn.BatchNorm1d(8)
        self.gain, self.head = nn.Parameter(torch.rand(8)), nn.Linear(8, 3)
        self.head2 = nn.Linear(8, 8)
        self.head2.weight = nn.Parameter(torch.eye(8))

    def forward(self, x, count):
        y = self.norm(self.conv(x)).transpose(1, 2)
        wide = y.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
        y = self.gain * wide.to(x.dtype)
        y = y + torch.cat([self.head2(y), torch.zeros(y.shape[0], 1, 8)], 1)[:, :-1]
        hidden = y.masked_fill(y > 100, torch.finfo(torch.float32).min)
        return {"scores": self.head(torch.softmax(hidden, -1)), "count": count + 1, "y": y.sum(-1)}


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.cells = nn.LSTM(4, 6, batch_first=True)
        self.register_buffer("table", torch.zeros(3, 5, 6))

    def forward(self, x):
        found, _ = self.cells(x)
        return self.table.index_put((torch.tensor([0]),), found[:1]) + found.sum()


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize(
    ("model", "shapes"),
    [(Normed, ((3, 4, 7), ())), (Recurrent, ((2, 5, 4),))],
    ids=["normed", "recurrent"],
)
def test_answers_and_types(model, shapes, precision):
    torch.manual_seed(0)
    model, inputs = model(), tuple(torch.randn(s) if s else torch.tensor([3]) for s in shapes)
    program = capture(model, inputs)
    before = {k: v.clone() for k, v in program.exported.state_dict.items()}
    low = cast(program, precision)
    assert low.precision == precision
    with torch.no_grad():
        a, b = (pytree.tree_leaves(one(*inputs)) for one in (program, low))
    for x, y in zip(a, b, strict=True):
        assert x.dtype == y.dtype
        assert torch.allclose(x, y, atol=0.03 * float(x.abs().max()))
    assert any(not torch.equal(x, y) for x, y in zip(a, b))
    for name, tensor in program.exported.state_dict.items():
        assert torch.equal(tensor, before[name])
    assert {p.dtype for p in low.exported.parameters()} == {torch.bfloat16 if precision == "bf16" else torch.float16}
    assert all(p.dtype == torch.float32 for p in model.parameters())


def test_it_is_what_the_module_itself_does_in_bfloat16(residual):
    """Products, norms and activations in the same order and type as after `.to(dtype)`: the same bits."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.LayerNorm(16), nn.Linear(16, 4), nn.Softmax(-1))
    low = cast(capture(net, torch.randn(2, 8)), "bf16")
    x = torch.randn(5, 8)
    with torch.no_grad():
        answer = low(x)
        assert torch.equal(answer, net.to(torch.bfloat16)(x.bfloat16()).float())


def test_any_batch_is_kept(attention, attention_inputs):
    low = cast(attention, "bf16")
    assert low.input_shapes() == attention.input_shapes() or [len(s) for s in low.input_shapes()] == [2, 2]
    with torch.no_grad():
        assert low(*attention_inputs(1, 3)).shape == (1, 16)


def test_what_is_not_float32_is_refused(quantised):
    with pytest.raises(UnsupportedOpError, match="cannot be computed in bf16: it is int8 already"):
        cast(quantised, "bf16")
