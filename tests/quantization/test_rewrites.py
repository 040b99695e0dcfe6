"""Rewrites before quantisation: the float answers stay, outliers lose their harm, and "auto" never makes it worse."""

import pytest
import torch
from torch import nn

from deepseek_r1.core import ConfigError, InputError, Int4Weight, Int8Dynamic, Report
from deepseek_r1.graph import capture, rewrite
from deepseek_r1.graph.editing import own_weights
from deepseek_r1.quantization import PTQConfig, quantize
from deepseek_r1.quantization._equalise import equalise
from deepseek_r1.quantization._layers import find_layers
from deepseek_r1.quantization._scaling import fold_scales


class Block(nn.Module):
    """A transformer's feed-forward with a norm before it, and outliers in some channels, as trained ones have them."""

    def __init__(self):
        super().__init__()
        self.norm, self.up, self.gate = nn.LayerNorm(64), nn.Linear(64, 128), nn.Linear(64, 128)
        self.down, self.head = nn.Linear(128, 64), nn.Linear(64, 32)
        with torch.no_grad():
            self.norm.weight[3] = 60.0
            self.norm.weight[17] = 25.0
            self.up.weight[5] *= 30

    def forward(self, x):
        y = self.norm(x)
        x = x + self.down(nn.functional.silu(self.gate(y)) * self.up(y))
        return self.head(nn.functional.gelu(x))


@pytest.fixture(scope="module")
def block():
    torch.manual_seed(0)
    return Block().eval()


X = torch.randn(6, 20, 64, generator=torch.Generator().manual_seed(1))
FRESH = torch.randn(6, 20, 64, generator=torch.Generator().manual_seed(2))


def folded(net, x, fmt, method):
    program = rewrite(capture(net, x), own_weights)
    done = []
    result = rewrite(
        program,
        lambda m: done.extend(fold_scales(m, {k: fmt for k in find_layers(m, (), Report(""))}, [(x,)], method)),
    )
    return result, dict(done)


def noise(program, net, x=FRESH):
    with torch.no_grad():
        return float((program(x) - net(x)).norm() / net(x).norm())


@pytest.mark.parametrize("method", ["smoothquant", "awq"])
@pytest.mark.parametrize("fmt", [Int8Dynamic(), Int4Weight(group_size=32)], ids=str)
def test_float_answers_stay(block, method, fmt):
    program, done = folded(block, X, fmt, method)
    if method == "smoothquant" and isinstance(fmt, Int4Weight):
        assert not done, "its activations are float"
        return
    assert noise(program, block) < 1e-5
    assert "folded into what comes before" in done["up, gate"] if "up, gate" in done else done["gate, up"]
    targets = [n.target for n in program.exported.graph.nodes]
    before = [n.target for n in capture(block, X).exported.graph.nodes]
    multiplications = sum("one multiplication" in how for how in done.values())
    mul = torch.ops.aten.mul.Tensor
    assert targets.count(mul) == before.count(mul) + multiplications


@pytest.mark.parametrize(("fmt", "share"), [(None, 0.7), (Int8Dynamic(), 0.8)], ids=str)
def test_outliers_lose_their_harm(block, fmt, share):
    options = {"rounding": "nearest"} if fmt is None else {"rounding": "nearest", "format": fmt}
    plain = quantize(block, dataset=[X], config=PTQConfig(**options, scaling="off"))
    scaled = quantize(block, dataset=[X], config=PTQConfig(**options, scaling="awq"))
    assert noise(scaled, block) < share * noise(plain, block)
    assert scaled.parent is not None
    assert noise(scaled.parent, block) < 1e-5
    (section,) = scaled.report.sections
    assert all(row.metric.startswith("scaling of ") for row in section.rows)


def test_a_value_that_others_read_is_not_changed():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.a = nn.LayerNorm(64), nn.Linear(64, 64)
            with torch.no_grad():
                self.norm.weight[0] = 100.0
                self.a.weight[:, 0] /= 100

        def forward(self, x):
            y = self.norm(x)
            return y * 2 + self.a(y)

    torch.manual_seed(0)
    net = Shared().eval()
    program, done = folded(net, X, Int8Dynamic(), "awq")
    assert "one multiplication more" in done["a"]
    assert noise(program, net) < 1e-5


def test_tied_weights_are_left_alone():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(64, 64, bias=False), nn.Linear(64, 64, bias=False)
            self.b.weight = self.a.weight

        def forward(self, x):
            return self.b(self.a(x))

    _, done = folded(Tied().eval(), X, Int8Dynamic(), "awq")
    assert not done


class Chain(nn.Module):
    """Convolutions in a row with channels of very different sizes between them."""

    def __init__(self, act):
        super().__init__()
        self.first, self.depthwise = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.last, self.act = nn.Conv2d(8, 4, 1), act
        with torch.no_grad():
            size = torch.logspace(-2, 0, 8)
            self.first.weight *= size[:, None, None, None] * 4
            self.first.bias *= size * 4
            self.depthwise.weight /= size[:, None, None, None] * 4

    def forward(self, x):
        return self.last(self.act(self.depthwise(self.act(self.first(x)))))


IMAGE = torch.randn(4, 3, 9, 9, generator=torch.Generator().manual_seed(3))
OTHER = torch.randn(4, 3, 9, 9, generator=torch.Generator().manual_seed(4))


@pytest.mark.parametrize("method", ["weights", "activations"])
@pytest.mark.parametrize("act", [nn.ReLU(), nn.ReLU6(), nn.Identity(), nn.Hardtanh(0.0, 2.0)], ids=str)
def test_equalised_convolutions_answer_as_before(act, method):
    torch.manual_seed(0)
    net = Chain(act).eval()
    program = rewrite(capture(net, IMAGE), own_weights)
    done = []
    result = rewrite(program, lambda m: done.extend(equalise(m, [(IMAGE,)], method)))
    assert len(done) == 2
    assert noise(result, net, IMAGE) < 1e-5
    assert noise(result, net, OTHER) < (1e-5 if isinstance(act, nn.ReLU | nn.Identity) else 0.05)


def test_equalisation_helps_channels_of_different_sizes():
    torch.manual_seed(0)
    net = Chain(nn.ReLU()).eval()
    plain, even, auto = (
        quantize(net, dataset=[IMAGE], config=PTQConfig(equalisation=how, rounding="nearest"))
        for how in ("off", "activations", "auto")
    )
    assert noise(even, net, OTHER) < 0.6 * noise(plain, net, OTHER)
    assert noise(auto, net, IMAGE) <= noise(plain, net, IMAGE)
    (section,) = auto.report.sections
    assert any("dB on calibration data" in text for text in section.notes)


def test_functions_that_do_not_bear_scales_are_left_alone():
    torch.manual_seed(0)
    for act in (nn.SiLU(), nn.Hardtanh(-1.0, 1.0), nn.Sigmoid()):
        program = capture(Chain(act).eval(), IMAGE)
        done = []
        rewrite(program, lambda m: done.extend(equalise(m, [(IMAGE,)], "weights")) or len(done))  # noqa: B023
        assert not done


@pytest.mark.parametrize("seed", range(3))
def test_auto_is_never_worse_on_the_calibration_data(seed):
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.LayerNorm(64), nn.Linear(64, 16)).eval()
    plain, auto = (quantize(net, dataset=[X], config=PTQConfig(scaling=how)) for how in ("off", "auto"))
    assert noise(auto, net, X) <= noise(plain, net, X) * (1 + 1e-6)
    (section,) = auto.report.sections
    assert section.skipped or section.notes


def test_without_data_nothing_is_rewritten(block):
    config = PTQConfig(format=Int4Weight(), scaling="auto", equalisation="auto")
    assert not quantize(capture(block, X), config=config).report.sections


def test_sums_that_a_norm_reads_stay_float(block):
    found = quantize(block, dataset=[X])
    assert "additions in int8" not in found.report


@pytest.mark.parametrize("option", ["equalisation", "scaling"])
def test_options_are_checked(option):
    with pytest.raises(ConfigError, match=rf'PTQConfig\({option}=True\): "off" or'):
        PTQConfig(**{option: True})


def test_data_that_are_no_numbers_are_refused(block):
    with pytest.raises(InputError, match="not finite"):
        quantize(block, dataset=[X, X * float("nan")], config=PTQConfig(format=Int8Dynamic(), scaling="awq"))
