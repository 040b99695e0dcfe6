"""FLOPs and bytes of single operators, against counts made by hand."""

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from deepseek_r1.measure import operator_cost

aten = torch.ops.aten
x = torch.randn(2, 3, 8, 8)


def cost(operator, *args, **kwargs):
    with torch.inference_mode():
        return operator_cost(operator, args, kwargs)[1]


def test_importing_measure_takes_no_torch():
    code = "import sys, deepseek_r1.measure as m; assert 'torch' not in sys.modules; m.operator_cost"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("operator", "args", "flops"),
    [
        (aten.linear.default, (torch.randn(5, 7), torch.randn(3, 7), torch.randn(3)), 2 * 5 * 7 * 3),
        (aten.matmul.default, (torch.randn(4, 5, 7), torch.randn(4, 7, 2)), 2 * 4 * 5 * 7 * 2),
        (aten.mv.default, (torch.randn(5, 7), torch.randn(7)), 2 * 5 * 7),
        (aten.einsum.default, ("bij,bkj->bik", [torch.randn(2, 3, 4), torch.randn(2, 5, 4)]), 2 * 2 * 3 * 4 * 5),
        (aten.conv2d.default, (x, torch.randn(5, 3, 3, 3)), 2 * 2 * 5 * 6 * 6 * 27),
        (aten.conv2d.default, (x, torch.randn(6, 1, 3, 3), None, [1, 1], [0, 0], [1, 1], 3), 2 * 2 * 6 * 36 * 9),
        (aten.conv_transpose2d.input, (x, torch.randn(3, 5, 2, 2)), 2 * 2 * 5 * 3 * 4 * 64),
        (aten.relu.default, (x,), 384),
        (aten.add.Tensor, (x, x), 384),
        (aten.add_.Tensor, (torch.ones(3), 1), 3),
        (aten.gelu.default, (x,), 384),
        (aten.sum.default, (x,), 384),
        (aten.mean.dim, (x, [1]), 384),
        (aten.softmax.int, (x, -1), 3 * 384),
        (aten.layer_norm.default, (x, [8]), 5 * 384),
        (aten.avg_pool2d.default, (x, [2, 2]), 2 * 3 * 16 * 4),
        (aten.max_pool2d.default, (x, [2, 2]), 0),
        (aten.view.default, (x, [6, 64]), 0),
        (aten.cat.default, ([x, x], 1), 0),
        (aten.clone.default, (x,), 0),
        (aten.gt.Scalar, (x, 0), 0),
        (aten.add.Tensor, (torch.arange(9), 1), 0),
        (aten.fft_fft.default, (torch.randn(4, 8, dtype=torch.complex64),), 5 * 4 * 8 * 3),
        (aten.linalg_inv.default, (torch.eye(3),), None),
    ],
)
def test_flops(operator, args, flops):
    assert cost(operator, *args).flops == flops


def test_a_batch_norm_in_evaluation_is_a_multiplication_and_an_addition():
    one = torch.ones(3)
    assert cost(aten.batch_norm.default, x, one, one, one, one, False, 0.1, 1e-5, True).flops == 2 * 384


@pytest.mark.parametrize("masked", [False, True])
def test_attention_counts_both_products(masked):
    q, k, v = torch.randn(2, 4, 5, 8), torch.randn(2, 4, 7, 8), torch.randn(2, 4, 7, 8)
    mask = torch.ones(5, 7, dtype=torch.bool) if masked else None
    assert cost(aten.scaled_dot_product_attention.default, q, k, v, mask).flops == 2 * 2 * 4 * 5 * 7 * (8 + 8)


def test_a_recurrent_layer_costs_its_two_matrices_a_step():
    lstm = nn.LSTM(6, 5, batch_first=True).eval()
    state = [torch.zeros(1, 2, 5), torch.zeros(1, 2, 5)]
    weights = list(lstm._flat_weights)
    args = (torch.randn(2, 7, 6), state, weights, True, 1, 0.0, False, False, True)
    flops = cost(aten.lstm.input, *args).flops
    assert 2 * 7 * 2 * (4 * 5 * 6 + 4 * 5 * 5) <= flops <= 1.2 * 2 * 7 * 2 * (4 * 5 * 6 + 4 * 5 * 5)


@pytest.mark.parametrize(
    ("operator", "args", "read", "written"),
    [
        (aten.relu.default, (x,), 1536, 1536),
        (aten.add.Tensor, (x, x), 1536, 1536),
        (aten.add_.Tensor, (torch.ones(3), 1), 12, 12),
        (aten.view.default, (x, [6, 64]), 0, 0),
        (aten.contiguous.default, (x,), 0, 0),
        (aten.reshape.default, (x.transpose(1, 2), [-1]), 1536, 1536),
        (aten.dropout.default, (x, 0.5, False), 0, 0),
        (aten.split.Tensor, (x, 1, 1), 0, 0),
        (aten.zeros.default, ([10],), 0, 40),
        (aten.add.Tensor, (torch.ones(1).expand(100), 1), 4, 400),
        (aten.embedding.default, (torch.randn(1000, 4), torch.arange(3)), 3 * 16 + 3 * 8, 3 * 16),
        (aten.copy_.default, (torch.zeros(3), torch.ones(3)), 24, 12),
        (aten.relu.default, (torch.randn(0, 3),), 0, 0),
        (aten.relu.default, (x.half(),), 768, 768),
    ],
)
def test_bytes(operator, args, read, written):
    got = cost(operator, *args)
    assert (got.read_bytes, got.written_bytes) == (read, written)


def test_the_result_is_the_operators_own():
    weight, bias = torch.randn(4, 8), torch.randn(4)
    inputs = torch.randn(3, 8)
    out, _ = operator_cost(aten.linear.default, (inputs, weight, bias))
    assert torch.equal(out, F.linear(inputs, weight, bias))
    same, _ = operator_cost(aten.dropout.default, (inputs, 0.5, False))
    assert same.data_ptr() == inputs.data_ptr()
    count = torch.zeros(1)
    operator_cost(aten.add_.Tensor, (count, 1))
    assert count.item() == 1


def test_operators_of_others_are_unknown():
    @torch.library.custom_op("cost_test::half", mutates_args=())
    def half(x: torch.Tensor) -> torch.Tensor:
        return x / 2

    got = cost(torch.ops.cost_test.half.default, x)
    assert got.flops is None
    assert (got.read_bytes, got.written_bytes) == (1536, 1536)
