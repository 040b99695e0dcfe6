"""`QuantizedLinear`: what it computes, its state, its gradients, and its capture."""

import io

import pytest
import torch
from torch import nn

from deepseek_r1 import core
from deepseek_r1.core import ConfigError, InputError, Int4Dynamic, Int4Weight, Int8Dynamic, Int8Static, Int8Weight
from deepseek_r1.graph import capture
from deepseek_r1.nn import QuantizedLinear

FORMATS = [Int8Weight(), Int8Dynamic(), Int4Weight(group_size=32), Int4Weight(group_size=32, symmetric=True),
           Int4Dynamic(group_size=32)]  # fmt: skip


def layer_of(fmt, bias=True):
    torch.manual_seed(0)
    layer = QuantizedLinear(64, 6, bias, format=fmt)
    if fmt.weight_bits == 4:
        layer.store_(torch.randint(0, 16, (6, 64)), torch.rand(6, 2), torch.randint(0, 16, (6, 2)))
    else:
        layer.store_(torch.randint(-127, 128, (6, 64), dtype=torch.int8), torch.rand(6))
    return layer


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_it_is_a_linear_layer_with_the_weight_that_is_meant(fmt):
    layer, x = layer_of(fmt), torch.randn(3, 5, 64)
    expected = nn.functional.linear(x, layer.weight, layer.bias)
    # A dynamic range rounds the input to 255 steps.
    tolerance = 0.02 * expected.abs().max() if fmt.activation == "dynamic" else 1e-6
    assert (layer(x) - expected).abs().max() <= tolerance
    assert str(fmt) in repr(layer)


def test_stored_numbers_are_what_they_say():
    layer = QuantizedLinear(32, 1, False, format=Int4Weight(group_size=32))
    layer.store_(torch.arange(32).remainder(16).reshape(1, 32), torch.tensor([[0.5]]), torch.tensor([[3]]))
    assert layer.weight[0, :5].tolist() == [-1.5, -1.0, -0.5, 0.0, 0.5]
    assert layer.values.nbytes == 16


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_state_comes_back_and_the_capture_is_the_neutral_form(fmt):
    layer, x = layer_of(fmt), torch.randn(4, 64)
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    other = QuantizedLinear(64, 6, format=fmt)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(other(x), layer(x))
    program = capture(layer, x)
    assert program.precision == ("int4" if fmt.weight_bits == 4 else "int8")
    assert torch.equal(program(x[:1]), layer(x[:1]))
    assert not any(v.is_floating_point() and v.numel() > 64 for v in program.exported.state_dict.values())


def test_gradients_reach_the_input_and_the_bias():
    layer, x = layer_of(Int4Weight(group_size=32)), torch.randn(4, 64, requires_grad=True)
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad, layer.weight.sum(0).expand(4, 64))
    assert layer.bias.grad.tolist() == [4.0] * 6


def test_what_it_cannot_be():
    with pytest.raises(ConfigError, match="without fixed ranges"):
        QuantizedLinear(64, 6, format=Int8Static())
    with pytest.raises(ConfigError, match="integer weights"):
        QuantizedLinear(64, 6, format=core.Float32())
    with pytest.raises(InputError, match="40 inputs do not divide into groups of 64"):
        QuantizedLinear(40, 6, format=Int4Weight())
