"""Ranges, scales and rounding: properties on random numbers."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from deepseek_r1.core import INT8_ACTIVATION, INT8_WEIGHT, InputError, IntFormat
from deepseek_r1.graph import capture
from deepseek_r1.quantization._groups import quantize_groups
from deepseek_r1.quantization._observe import Ranges, affine, quantize_weight
from deepseek_r1.quantization._rounding import Moments, _columns, observe_moments, round_groups, round_weight

LIMITS = st.floats(-1e4, 1e4).map(float)


@given(LIMITS, LIMITS, st.booleans(), st.integers(2, 8))
def test_affine_covers_the_range_with_zero_exact(a, b, symmetric, bits):
    low, high = min(a, b, 0.0), max(a, b, 0.0)
    fmt = IntFormat(bits=bits, symmetric=symmetric)
    scale, zero = affine(low, high, fmt)
    q_low, q_high = fmt.range
    assert scale > 0
    assert isinstance(zero, int)
    assert q_low <= zero <= q_high, "0.0 has a stored value of its own"
    x = torch.linspace(low, high, 41, dtype=torch.float64)
    stored = torch.clamp(torch.round(x / scale) + zero, q_low, q_high)
    error = ((stored - zero) * scale - x).abs().max()
    # Rounding the zero point shifts the range by up to half a step, so that its ends may be one step off.
    assert error <= scale * (1.0 + 1e-9)
    inside = ((x / scale).round() + zero).clamp(q_low, q_high) == (x / scale).round() + zero
    assert ((stored - zero) * scale - x).abs()[inside].max() <= scale / 2 * (1 + 1e-9)


@pytest.mark.parametrize("clip", ["minmax", "mse"])
@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), out=st.integers(1, 5), inputs=st.integers(1, 12), exponent=st.integers(-6, 6))
def test_weights_keep_to_half_a_step_and_to_the_range(clip, seed, out, inputs, exponent):
    weight = torch.randn(out, inputs, generator=torch.Generator().manual_seed(seed)) * 10.0**exponent
    values, scales = quantize_weight(weight, INT8_WEIGHT, clip)
    assert (values.dtype, values.shape, scales.shape) == (torch.int8, weight.shape, (out,))
    assert values.min() >= -127
    error = (values.double() * scales.double()[:, None] - weight.double()).abs()
    clipped = values.abs() == 127
    assert (error <= scales.double()[:, None] * 0.5 * (1 + 1e-6))[~clipped].all()
    plain, step = quantize_weight(weight, INT8_WEIGHT, "minmax")
    worst = ((plain.double() * step.double()[:, None] - weight.double()) ** 2).sum(1)
    assert ((error**2).sum(1) <= worst * (1 + 1e-9) + 1e-300).all(), "clipping was chosen although it is worse"


def test_weights_of_zeros_and_of_one_value():
    values, scales = quantize_weight(torch.zeros(2, 3), INT8_WEIGHT, "mse")
    assert not values.any()
    assert torch.isfinite(scales).all()
    values, scales = quantize_weight(torch.full((1, 3), -2.5), INT8_WEIGHT, "mse")
    torch.testing.assert_close(values * scales, torch.full((1, 3), -2.5), rtol=2**-11, atol=0)  # float16 has the scale


class One(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x)


def layer_of(layer, x):
    """The captured graph of one layer, and its node."""
    module = capture(One(layer), x).module()
    node = next(
        n for n in module.graph.nodes if n.op == "call_function" and hasattr(layer, "weight") and len(n.args) > 1
    )
    return module, node


CONVOLUTIONS = [
    (nn.Conv1d(4, 6, 3), (2, 4, 9)),
    (nn.Conv1d(4, 6, 3, stride=2, padding=2, dilation=2, groups=2), (3, 4, 11)),
    (nn.Conv2d(3, 5, 3), (2, 3, 7, 7)),
    (nn.Conv2d(4, 8, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2), groups=2), (2, 4, 9, 8)),
    (nn.Conv2d(6, 6, 3, padding=1, groups=6), (2, 6, 5, 5)),
    (nn.Conv2d(4, 4, 1, stride=2), (2, 4, 6, 6)),
    (nn.Conv3d(2, 4, (1, 2, 3), stride=(1, 2, 1), padding=(0, 1, 1), groups=2), (2, 2, 3, 5, 6)),
    (nn.Linear(5, 3), (4, 5)),
    (nn.Linear(5, 3, bias=False), (2, 3, 7, 5)),
]


@pytest.mark.parametrize(("layer", "shape"), CONVOLUTIONS, ids=lambda v: str(v).replace(" ", "")[:60])
def test_columns_times_weights_are_the_layer(layer, shape):
    x = torch.randn(shape)
    _, node = layer_of(layer, x)
    columns = _columns(node, layer.weight, x)
    weight = layer.weight.reshape(columns.shape[0], -1, columns.shape[1])
    found = (weight @ columns).reshape(layer.weight.shape[0], -1)
    bias = layer.bias if layer.bias is not None else torch.zeros(len(found))
    y = layer(x)
    axis = -1 if isinstance(layer, nn.Linear) else 1
    expected = y.movedim(axis, 0).reshape(layer.weight.shape[0], -1)
    torch.testing.assert_close(found + bias[:, None], expected, rtol=1e-4, atol=1e-5)


def test_strings_for_padding_are_understood():
    for padding in ("same", "valid"):
        layer = nn.Conv2d(2, 3, (3, 4), dilation=(1, 2), padding=padding)
        x = torch.randn(2, 2, 8, 8)
        module, node = layer_of(layer, x)
        assert "padding" in str(node.target)
        columns = _columns(node, layer.weight, x)
        y = (layer.weight.reshape(1, 3, -1) @ columns).reshape(3, -1) + layer.bias[:, None]
        torch.testing.assert_close(y, layer(x).movedim(1, 0).reshape(3, -1), rtol=1e-4, atol=1e-5)
        assert node in observe_moments(module, {node: layer.weight}, [(x,)])


def test_large_feature_maps_are_sampled():
    layer = nn.Conv2d(1, 1, 3, padding=1)
    x = torch.randn(4, 1, 128, 128)
    module, node = layer_of(layer, x)
    moments = observe_moments(module, {node: layer.weight}, [(x,)])[node]
    assert moments.second.shape == (1, 9, 9)
    torch.testing.assert_close(moments.second[0].diagonal(), torch.ones(9, dtype=torch.float64), rtol=0.1, atol=0.1)


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10**6), out=st.integers(1, 6), inputs=st.integers(1, 150), rank=st.integers(1, 20),
    offset=st.floats(-3, 3),
)  # fmt: skip
def test_compensated_rounding_is_no_worse_on_the_layers_own_output(seed, out, inputs, rank, offset):
    """Correlated inputs with a mean, as layers have them; error measured on the data that calibrated."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(out, inputs, generator=generator)
    x = torch.randn(400, rank, generator=generator) @ torch.randn(rank, inputs, generator=generator) + offset
    layer = nn.Linear(inputs, out)
    layer.weight.data = weight
    module, node = layer_of(layer, x)
    values, scales = quantize_weight(weight, INT8_WEIGHT, "mse")
    moments = observe_moments(module, {node: weight}, [(x,)])[node]
    better, missing = round_weight(weight, scales, moments, INT8_WEIGHT)
    assert better.dtype == torch.int8
    assert better.abs().max() <= 127

    def error(stored, correction=0.0):
        change = (stored.double() * scales.double()[:, None] - weight.double()) @ x.double().T
        return float(((change + correction) ** 2).mean())

    assert error(better, missing[:, None]) <= error(values) * (1 + 1e-6) + 1e-12


def test_inputs_that_are_always_zero_or_constant():
    layer = nn.Linear(6, 3)
    for x in (torch.zeros(10, 6), torch.ones(10, 6), torch.ones(10, 6) * torch.tensor([1.0, 0, 0, 0, 0, 0])):
        module, node = layer_of(layer, x)
        moments = observe_moments(module, {node: layer.weight}, [(x,)])[node]
        _, scales = quantize_weight(layer.weight, INT8_WEIGHT, "mse")
        stored, missing = round_weight(layer.weight, scales, moments, INT8_WEIGHT)
        y = (stored.double() * scales.double()[:, None]) @ x.double().T + missing[:, None]
        torch.testing.assert_close(y.float(), (layer.weight @ x.T).detach(), rtol=1e-3, atol=1e-3)


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 10**6), groups=st.integers(1, 3), inputs=st.integers(1, 40), rank=st.integers(1, 10),
    exponent=st.integers(-8, 8), ordered=st.booleans(),
)  # fmt: skip
def test_what_spreads_errors_is_the_factor_of_the_inverse(seed, groups, inputs, rank, exponent, ordered):
    generator = torch.Generator().manual_seed(seed)
    groups = 1 if ordered else groups
    x = torch.randn(groups, inputs, rank, generator=generator).double() * 10.0**exponent
    second = x @ x.transpose(1, 2) / rank
    reach, order = Moments(second, x.mean(2), rank).factor(ordered=ordered)
    assert sorted(order.tolist()) == list(range(inputs))
    if ordered:
        assert (second[0].diagonal()[order].diff() >= 0).all()
    damped = second + 0.01 * torch.diag_embed(second.diagonal(dim1=1, dim2=2).mean(1, keepdim=True).expand(-1, inputs))
    expected = torch.linalg.inv(damped[:, order][:, :, order])
    found = reach.double().transpose(1, 2) @ reach.double()
    assert ((found - expected).norm(dim=(1, 2)) <= 1e-3 * expected.norm(dim=(1, 2))).all()
    assert (reach.triu(1) == 0).all()


def test_layers_that_read_the_same_share_what_is_worked_out():
    class Heads(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.k, self.other = nn.Linear(8, 4), nn.Linear(8, 6), nn.Linear(4, 4)
            self.wide, self.narrow = nn.Conv1d(8, 4, 3, padding=1), nn.Conv1d(8, 4, 1)

        def forward(self, x):
            seen = self.wide(x.mT) + self.narrow(x.mT)
            return self.other(self.q(x)) + seen.mT, self.k(x)

    net, x = Heads(), torch.randn(3, 5, 8)
    module = capture(net, x).module()
    nodes = {
        n.args[1].name.split("_")[-2]: n
        for n in module.graph.nodes
        if n.op == "call_function" and "bias" in str(n.args)
    }
    weights = {nodes[name]: getattr(net, name).weight for name in ("q", "k", "other", "wide", "narrow")}
    found = observe_moments(module, weights, [(x,), (x + 1,)])
    assert found[nodes["q"]] is found[nodes["k"]]
    assert found[nodes["q"]].shared
    assert found[nodes["q"]].factor(ordered=True)[0] is found[nodes["k"]].factor(ordered=True)[0]
    assert not found[nodes["other"]].shared
    assert found[nodes["wide"]].second.shape[1] == 24
    assert found[nodes["narrow"]].second.shape[1] == 8
    both = torch.cat([x, x + 1]).reshape(-1, 8).double()
    torch.testing.assert_close(found[nodes["q"]].second[0], both.T @ both / len(both), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found[nodes["q"]].mean[0], both.mean(0), rtol=1e-5, atol=1e-5)


def test_data_that_are_no_numbers_are_refused():
    layer = nn.Linear(6, 3)
    module, node = layer_of(layer, torch.randn(4, 6))
    for value in (float("nan"), float("inf")):
        with pytest.raises(InputError, match="not finite"):
            observe_moments(module, {node: layer.weight}, [(torch.full((4, 6), value),)])


@pytest.mark.parametrize("clip", ["minmax", "mse"])
@pytest.mark.parametrize("span", [(0.0, 5.0), (-3.0, -1.0), (2.0, 2.0), (0.0, 0.0), (-1e-20, 1e-20), (-1e30, 1e30)])
def test_limits_of_odd_ranges_are_finite_and_hold_zero(clip, span):
    module = capture(nn.ReLU(), torch.ones(2, 3)).module()
    node = next(n for n in module.graph.nodes if n.op == "placeholder")
    ranges = Ranges(module, [node])
    ranges.observe([(torch.linspace(*span, 60).reshape(20, 3),)], histogram=clip == "mse")
    low, high = ranges.limits(node, INT8_ACTIVATION, clip)
    assert low <= 0 <= high
    scale, zero = affine(low, high, INT8_ACTIVATION)
    assert 0 < scale < float("inf")
    assert -128 <= zero <= 127


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 10**6), groups=st.integers(1, 3), out=st.integers(1, 5), inputs=st.integers(1, 140),
    rank=st.integers(1, 20), offset=st.floats(-2, 2), exponent=st.integers(-4, 4),
)  # fmt: skip
def test_improved_rounding_is_no_worse_than_compensated(seed, groups, out, inputs, rank, offset, exponent):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(groups * out, inputs, generator=generator) * 10.0**exponent
    mixing = torch.randn(groups, inputs, rank, generator=generator)
    x = (mixing @ torch.randn(groups, rank, 300, generator=generator) + offset).double()
    moments = Moments(x @ x.transpose(1, 2) / 300, x.mean(2), 300)
    _, scales = quantize_weight(weight, INT8_WEIGHT, "mse")

    def error(stored, missing):
        change = (weight.double() - stored.double() * scales.double()[:, None]).reshape(groups, out, inputs)
        return float((change @ x - missing.reshape(groups, out, 1)).square().mean())

    before = error(*round_weight(weight, scales, moments, INT8_WEIGHT))
    moments.improved = True
    stored, missing = round_weight(weight, scales, moments, INT8_WEIGHT)
    assert stored.abs().max() <= 127
    assert error(stored, missing) <= before * (1 + 1e-6) + 1e-12


def test_improved_rounding_gains():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(32, 128, generator=generator)
    x = (torch.randn(1, 128, 40, generator=generator) @ torch.randn(1, 40, 900, generator=generator)).double()
    x = x + torch.randn(x.shape, generator=generator)
    moments = Moments(x @ x.transpose(1, 2) / 900, x.mean(2), 900)
    grouped = quantize_groups(weight, 32, symmetric=False, method="mse")
    errors = []
    for moments.improved in (False, True):
        found, missing = round_groups(weight, grouped, moments)
        assert found.values.max() <= 15
        change = (weight - found.weight()).double() @ x[0] - missing[:, None]
        errors.append(float(change.square().mean()))
    assert errors[1] < 0.85 * errors[0]
