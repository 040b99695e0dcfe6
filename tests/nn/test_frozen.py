"""`CastLinear` and `NF4Linear`: what they compute, their state, their gradients, moving them about."""

import copy

import pytest
import torch
from torch import nn

from deepseek_r1.core import ConfigError, InputError
from deepseek_r1.nn import CastLinear, NF4Linear

KINDS = [CastLinear, NF4Linear]


@pytest.fixture(params=KINDS, ids=lambda k: k.__name__)
def layer(request):
    torch.manual_seed(0)
    return request.param.from_linear(nn.Linear(48, 20))


def test_it_is_a_linear_layer_with_its_weight(layer):
    x = torch.randn(3, 5, 48, requires_grad=True)
    weight = layer.weight.float()
    expected = nn.functional.linear(x, weight, layer.bias)
    torch.testing.assert_close(layer(x), expected)
    seed = torch.randn_like(expected)
    mine, theirs = (torch.autograd.grad(y, x, seed)[0] for y in (layer(x), expected))
    torch.testing.assert_close(mine, theirs)
    assert not [p for p in layer.parameters() if p.requires_grad]


def test_nothing_dense_is_kept_for_the_backward_pass(layer):
    kept = []
    x = torch.randn(2, 48, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(x)
    assert kept
    own = {t.data_ptr() for t in (*layer.parameters(), *layer.buffers())}
    assert {t.data_ptr() for t in kept} <= own


def test_autocast(layer):
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(torch.randn(2, 48)).dtype == torch.bfloat16
    assert layer(torch.randn(2, 48)).dtype == torch.float32
    assert layer(torch.randn(2, 48).bfloat16()).dtype == torch.bfloat16


def test_state_and_copies(layer):
    fresh = type(layer)(48, 20)
    fresh.load_state_dict(layer.state_dict())
    x = torch.randn(2, 48)
    assert torch.equal(fresh(x), layer(x))
    assert torch.equal(copy.deepcopy(layer)(x), layer(x))
    assert "in_features=48" in repr(layer)


def test_compiled_whole(layer):
    x = torch.randn(2, 48, requires_grad=True)
    found = torch.compile(layer, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(found, layer(x))
    found.sum().backward()


def test_scales_stay_exact_when_the_model_changes_its_type():
    layer = NF4Linear.from_linear(nn.Linear(64, 64))
    before = layer.weight.clone()
    layer.bfloat16()
    assert layer.bias.dtype == torch.bfloat16
    assert torch.equal(layer.weight, before)
    assert layer.double()(torch.randn(1, 64).double()).dtype == torch.float64
    assert torch.equal(layer.weight, before)


def test_no_bias_and_evaluation_mode():
    for kind in KINDS:
        layer = kind.from_linear(nn.Linear(8, 4, bias=False).eval())
        assert layer.bias is None
        assert not layer.training
        assert layer(torch.ones(1, 8)).shape == (1, 4)


def test_what_is_refused():
    with pytest.raises(ConfigError, match="bfloat16 or float16"):
        CastLinear(4, 4, dtype=torch.int8)
    for kind in KINDS:
        with pytest.raises(InputError, match=r"a torch.nn.Linear is needed, given Conv1d"):
            kind.from_linear(nn.Conv1d(1, 1, 1))
