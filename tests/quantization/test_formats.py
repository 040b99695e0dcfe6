"""Formats chosen for whole programs and modules: 4-bit groups, dynamic activations, and mixtures."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from deepseek_r1.core import (
    BFloat16,
    ConfigError,
    Float32,
    InputError,
    Int4Dynamic,
    Int4Weight,
    Int8Dynamic,
    Int8Static,
    Int8Weight,
)
from deepseek_r1.graph import Program, capture
from deepseek_r1.nn import QuantizedLinear
from deepseek_r1.quantization import PTQConfig, quantize
from deepseek_r1.quantization._groups import quantize_groups
from deepseek_r1.quantization._rounding import Moments, round_groups

_q = torch.ops.quantized_decomposed


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.up, self.down = nn.Embedding(10, 64), nn.Linear(64, 128), nn.Linear(128, 64)
        self.odd, self.head = nn.Linear(64, 40), nn.Linear(40, 4, bias=False)

    def forward(self, ids):
        x = self.embed(ids)
        x = x + self.down(nn.functional.gelu(self.up(x)))
        return self.head(nn.functional.relu(self.odd(x)))


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    return Net().eval()


IDS = torch.arange(60).remainder(10).reshape(6, 10)


@pytest.fixture(scope="module")
def program(net):
    return capture(net, IDS)


def error(program, net, ids=IDS):
    with torch.no_grad():
        expected = net(ids)
        return float((program(ids) - expected).norm() / expected.norm())


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**6), out=st.integers(1, 5), groups=st.integers(1, 3), size=st.sampled_from([32, 64]),
    offset=st.floats(-2, 2), spread=st.floats(1e-4, 1e3), symmetric=st.booleans(),
)  # fmt: skip
def test_groups_keep_to_their_range_and_better_methods_have_smaller_errors(
    seed, out, groups, size, offset, spread, symmetric
):
    generator = torch.Generator().manual_seed(seed)
    weight = (torch.randn(out, groups * size, generator=generator) + offset) * spread
    found = {m: quantize_groups(weight, size, symmetric=symmetric, method=m) for m in ("minmax", "mse", "hqq")}
    for grouped in found.values():
        assert grouped.values.dtype == torch.uint8
        assert grouped.values.max() <= 15
        assert grouped.group_size == size
        assert ((grouped.zeros >= 0) & (grouped.zeros <= 15)).all()
        assert not symmetric or (grouped.zeros == 8).all()
    # The whole range: nothing is off by more than half a step, but for the zero point's own rounding.
    full = found["minmax"]
    step = full.scales.repeat_interleave(size, 1)
    limit = (1.0 if symmetric else 1.01) * step
    assert ((full.weight() - weight).abs() <= limit).all()
    squared = {m: float((g.weight() - weight).double().square().sum()) for m, g in found.items()}
    assert squared["mse"] <= squared["minmax"] * (1 + 1e-4)
    sparse = {m: float((g.weight() - weight).abs().double().pow(0.7).sum()) for m, g in found.items()}
    assert sparse["hqq"] <= sparse["mse"] * (1 + 1e-3)


def test_groups_of_zeros_and_of_one_value():
    for value in (0.0, 1e-30, 3.0, -3.0):
        for method in ("minmax", "mse", "hqq"):
            found = quantize_groups(torch.full((2, 32), value), 32, symmetric=False, method=method)
            # Scales are numbers that float16 has.
            torch.testing.assert_close(found.weight(), torch.full((2, 32), value), rtol=2**-11, atol=1e-11)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10**6), rank=st.integers(1, 20), offset=st.floats(-2, 2))
def test_compensation_is_no_worse_on_the_layers_own_output(seed, rank, offset):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(4, 96, generator=generator)
    x = torch.randn(300, rank, generator=generator) @ torch.randn(rank, 96, generator=generator) + offset
    grouped = quantize_groups(weight, 32, symmetric=False, method="mse")
    wide = x.double()
    moments = Moments((wide.T @ wide / 300).unsqueeze(0), wide.mean(0).unsqueeze(0), 300)
    better, missing = round_groups(weight, grouped, moments)

    def loss(candidate, correction=0.0):
        change = (candidate.weight().double() - weight.double()) @ wide.T
        return float((change + correction).square().mean())

    assert loss(better, missing[:, None]) <= loss(grouped) * (1 + 1e-6) + 1e-12
    assert torch.equal(better.scales, grouped.scales)


@pytest.mark.parametrize(
    ("fmt", "largest", "precision", "layers"),
    [
        (Int8Static(), 0.05, "int8", 4), (Int8Dynamic(), 0.03, "int8", 4), (Int8Weight(), 0.02, "int8", 4),
        (Int4Weight(), 0.2, "int4", 3), (Int4Weight(group_size=32, symmetric=True), 0.2, "int4", 3),
        (Int4Dynamic(group_size=32), 0.2, "int4", 3), (BFloat16(), 0.02, "mixed", 4),
    ],
    ids=str,
)  # fmt: skip
def test_each_format_alone(program, net, fmt, largest, precision, layers, tmp_path):
    found = quantize(program, dataset=[IDS], config=PTQConfig(format=fmt))
    assert found.report[f"layers in {fmt}"].after == layers
    assert 0 < error(found, net) < largest
    assert found.precision == precision
    assert found.parent is not None
    for batch in (0, 1, 7):
        assert found(IDS[:1].expand(batch, 10)).shape == (batch, 10, 4)
    again = Program.load(found.save(tmp_path / "again.dr1"))
    with torch.no_grad():
        assert torch.equal(again(IDS), found(IDS))
    assert again.precision == precision


def test_four_bits_are_about_an_eighth_of_the_layers_they_fit(program):
    found = quantize(program, bits=4, dataset=[IDS])
    sizes = {k: v.nbytes for k, v in found.exported.state_dict.items() if k.startswith("q")}
    layers = 4 * (64 * 128 + 128 * 64 + 64 * 40)
    stored = sum(size for name, size in sizes.items() if not name.endswith("bias"))
    assert stored == sum(Int4Weight().weight_bytes(o, i) for o, i in ((128, 64), (64, 128), (40, 64)))
    assert stored < layers / 6.8
    assert dict(found.report.skipped)["head"] == "its 40 inputs do not divide into groups of 64"


def test_a_program_is_saved_without_its_parent_if_asked(program, tmp_path):
    found = quantize(program, bits=4)
    whole, alone = found.save(tmp_path / "whole.dr1"), found.save(tmp_path / "alone.dr1", with_parent=False)
    assert Program.load(whole).parent is not None
    small = Program.load(alone)
    assert small.parent is None
    assert torch.equal(small(IDS), found(IDS))
    assert alone.stat().st_size < whole.stat().st_size - program.parameters_bytes


def test_four_bits_without_data(program, net):
    found = quantize(program, bits=4)
    assert error(found, net) < 0.25
    assert any("no data were given" in note for note in found.report.notes)
    better = quantize(program, bits=4, dataset=[IDS])
    assert error(better, net) < error(found, net)


def test_formats_layer_by_layer(program, net):
    config = PTQConfig(
        format=Int4Weight(group_size=32), layers={"up": Int8Static(), "down": Int8Dynamic(), "head": Float32()}
    )
    found = quantize(program, dataset=[IDS], config=config)
    counts = {row.metric: row.after for row in found.report.rows if row.metric.startswith("layers in")}
    expected = {"layers in int8-static": 1, "layers in int8-dynamic": 1, "layers in int4-weight-g32": 1}
    assert counts == expected
    assert dict(found.report.skipped)["head"] == "float32 was chosen for it"
    assert found.precision == "mixed"
    assert error(found, net) < 0.2
    targets = [node.target for node in found.exported.graph.nodes]
    assert targets.count(_q.choose_qparams_per_token_asymmetric.default) == 1
    assert targets.count(_q.quantize_per_tensor.default) == 1  # what goes into `up`; a float operator reads its result


def test_names_of_layers_reach_what_lies_in_them():
    config = PTQConfig(layers={"encoder.0": Int8Weight(), "encoder.0.out": Float32(), "enc": BFloat16()})
    assert config.format_of("encoder.0.up") == Int8Weight()
    assert config.format_of("encoder.0.out") == Float32()
    assert config.format_of("encoder.01") == Int8Static()


def test_one_range_serves_all_who_read_the_same_value():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(64, 8), nn.Linear(64, 8)

        def forward(self, x):
            return self.a(x) * self.b(x)

    x = torch.randn(5, 64)
    found = quantize(Two(), dataset=[x], config=PTQConfig(format=Int8Dynamic()))
    targets = [node.target for node in found.exported.graph.nodes]
    assert targets.count(_q.choose_qparams_per_token_asymmetric.default) == 1
    assert targets.count(_q.dequantize_per_token.default) == 2


def test_convolutions_take_what_they_can():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 64), nn.Linear(64, 4)).eval()
    x = torch.randn(4, 3, 8, 8)
    found = quantize(net, bits=4, dataset=[x])
    assert dict(found.report.skipped)["0"] == "int4-weight-g64 is for linear layers"
    assert dict(found.report.skipped)["3"] == "its 288 inputs do not divide into groups of 64"
    eight = quantize(net, dataset=[x], config=PTQConfig(format=Int8Weight()))
    assert eight.report["layers in int8-weight"].after == 3
    assert error(eight, net, x) < 0.02
    half = quantize(net, dataset=[x], config=PTQConfig(format=BFloat16()))
    assert error(half, net, x) < 0.02


def test_a_module_without_data(net):
    before = copy.deepcopy(net.state_dict())
    found = quantize(net, bits=4)
    assert isinstance(found, Net)
    assert isinstance(found.up, QuantizedLinear)
    assert isinstance(found.head, nn.Linear)
    assert found.quantization["up"].after == "int4-weight-g64"
    assert dict(found.quantization.skipped)["head"] == "its 40 inputs do not divide into groups of 64"
    assert dict(found.quantization.skipped)["embed"] == "no quantised form for the module Embedding"
    assert error(found, net) < 0.25
    assert all(torch.equal(v, net.state_dict()[k]) for k, v in before.items())
    program = capture(found, IDS)
    assert program.precision == "int4"
    assert error(program, found) < 1e-6
    # Around the integers it trains on.
    loss = found(IDS).square().mean()
    loss.backward()
    assert found.up.bias.grad is not None
    assert found.head.weight.grad is not None


def test_modules_that_share_layers_and_weights():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.head = nn.Embedding(9, 64), nn.Linear(64, 9, bias=False)
            self.head.weight = self.embed.weight
            self.mix = nn.Linear(64, 64)
            self.again = self.mix

        def forward(self, ids):
            return self.head(self.again(self.mix(self.embed(ids))))

    found = quantize(Tied(), bits=4)
    assert found.again is found.mix
    assert isinstance(found.mix, QuantizedLinear)
    assert found.head.weight is found.embed.weight
    assert dict(found.quantization.skipped)["head"] == "its weight is tied to another layer's"
    single = quantize(nn.Linear(64, 3), bits=4)
    assert isinstance(single, QuantizedLinear)


def test_modules_that_have_nothing_to_quantise():
    with pytest.raises(InputError, match="nothing in Sequential can be quantised"):
        quantize(nn.Sequential(nn.Conv1d(3, 3, 1)), bits=4)
    with pytest.raises(InputError, match="nothing in Linear can be quantised"):
        quantize(nn.Linear(64, 3), config=PTQConfig(format=Int4Weight(), skip=("",)))
    broken = nn.Sequential(nn.Linear(64, 3))
    broken[0].weight.data[0, 0] = float("nan")
    with pytest.raises(InputError, match="'0' has values that are not finite"):
        quantize(broken, bits=4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"format": "int4"}, "a layer format such as Int8Static"),
        ({"layers": {"up": 8}}, "'up' is given 8"),
        ({"group_clip": "best"}, '"auto" or "minmax" or "mse" or "hqq" is needed'),
    ],
)
def test_options_are_checked(options, message):
    with pytest.raises(ConfigError, match=message):
        PTQConfig(**options)


def test_names_that_no_layer_has(program):
    with pytest.raises(ConfigError, match="'middle' is no layer of 'Net'; there are"):
        quantize(program, dataset=[IDS], config=PTQConfig(layers={"middle": Float32()}))


def test_formats_that_need_data_say_so(net):
    with pytest.raises(InputError, match="quantize needs dataset="):
        quantize(net, config=PTQConfig(format=Int4Weight(), layers={"up": Int8Static()}))


def test_a_quantised_program_is_not_quantised_again(program):
    with pytest.raises(InputError, match="is int4 already"):
        quantize(quantize(program, bits=4), bits=4)
