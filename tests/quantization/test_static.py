"""Static int8 quantisation of whole programs: how close, what was skipped and why, what is refused."""

import copy

import pytest
import torch
from torch import nn

from deepseek_r1.core import ConfigError, InputError, PluginError
from deepseek_r1.graph import capture
from deepseek_r1.models import DigitsNet
from deepseek_r1.quantization import PTQConfig, quantize

_q = torch.ops.quantized_decomposed


def digits_like():
    torch.manual_seed(0)
    net = DigitsNet(width=8)
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.3)
                module.running_var.uniform_(0.5, 2)
    return net.eval(), torch.randn(64, 1, 8, 8)


class Mixer(nn.Module):
    """A transformer's feed-forward and attention in small, with a residual addition and a layer norm."""

    def __init__(self):
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(16), nn.Linear(16, 48), nn.Linear(16, 16, bias=False)
        self.up, self.down = nn.Linear(16, 64), nn.Linear(64, 16)

    def forward(self, x):
        q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
        x = x * 1.0 + self.out(nn.functional.scaled_dot_product_attention(q, k, v))
        return x + self.down(nn.functional.gelu(self.up(x)))


def mixer():
    torch.manual_seed(0)
    return Mixer().eval(), torch.randn(64, 5, 16)


def sqnr(a, b):
    return float(10 * torch.log10((a**2).sum() / ((a - b) ** 2).sum()).detach())


@pytest.mark.parametrize("make", [digits_like, mixer])
@pytest.mark.parametrize("rounding", ["compensated", "nearest", "reconstructed"])
def test_networks_stay_close(make, rounding):
    net, x = make()
    config = PTQConfig(rounding=rounding)
    program = quantize(net, dataset=[x[:32], x[32:]], config=config)
    with torch.no_grad():
        fresh = torch.randn(16, *x.shape[1:], generator=torch.Generator().manual_seed(1))
        assert sqnr(net(fresh), program(fresh)) > 25
    assert program.report["output SQNR"].after > 25
    assert program.report["calibration samples"].after == 64
    assert program.precision == "int8"
    torch.testing.assert_close(program.parent(fresh), net(fresh), rtol=1e-4, atol=1e-5)
    weights = program.report["weights"]
    assert weights.after < 0.45 * weights.before
    for batch in (0, 1):
        assert program(fresh[:batch]).shape[0] == batch


def test_every_weighted_layer_is_quantised_or_named():
    net, x = digits_like()
    program = quantize(net, dataset=[x], config=PTQConfig(skip=("blocks.1", "head")))
    layers = sum(isinstance(m, nn.Conv2d | nn.Linear) for m in net.modules())
    skipped = dict(program.report.skipped)
    assert {"blocks.1.conv1", "blocks.1.conv2", "blocks.1.shortcut.0", "head"} == set(skipped)
    assert set(skipped.values()) == {"in the skip list"}
    assert program.report["layers in int8-static"].after == layers - 4
    stored = [v for v in program.exported.state_dict.values() if v.dtype == torch.int8 and v.ndim > 1]
    assert len(stored) == layers - 4
    assert all(v.abs().max() <= 127 for v in stored)


class Odd(nn.Module):
    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(10, 8)
        self.up = nn.ConvTranspose1d(8, 8, 1)
        self.same = nn.Conv1d(8, 8, 3, padding="same")
        self.precise = nn.Linear(8, 8).double()
        self.last = nn.Linear(8, 8)

    def forward(self, ids):
        x = self.up(self.words(ids).transpose(1, 2))
        x = self.same(x).transpose(1, 2)
        x = self.precise(x.double()).float()
        return nn.functional.linear(self.last(x), x.mean((0, 1)).expand(8, 8))


def test_what_cannot_be_quantised_is_named_with_the_reason():
    program = quantize(Odd(), dataset=[torch.randint(0, 10, (4, 6))])
    skipped = dict(program.report.skipped)
    assert "conv_transpose1d" in skipped["up"]
    assert "embedding" in skipped["words"]
    assert skipped["precise"] == "its weight is torch.float64"
    assert "its weight is not a constant" in skipped.values()
    assert program.report["layers in int8-static"].after == 2


def test_shared_weights_stay_shared():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)
            self.b.weight = self.a.weight

        def forward(self, x):
            return self.b(torch.relu(self.a(x))) + self.a(-x)

    net, x = Shared(), torch.randn(64, 8)
    program = quantize(net, dataset=[x])
    stored = {k: v for k, v in program.exported.state_dict.items() if v.dtype == torch.int8 and v.ndim > 1}
    assert len(stored) == 1
    assert program.report["layers in int8-static"].after == 3
    assert sqnr(net(x), program(x)) > 25


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Conv1d(4, 8, 3, stride=2, padding=2, dilation=2, groups=2), (8, 4, 16)),
        (nn.Conv2d(4, 8, (3, 2), stride=(2, 1), padding=(1, 0), groups=4), (8, 4, 9, 9)),
        (nn.Conv2d(4, 4, 3, padding="same", groups=4, bias=False), (8, 4, 6, 6)),
        (nn.Conv3d(2, 4, 2, padding=1, dilation=2), (4, 2, 5, 5, 5)),
        (nn.Linear(32, 8, bias=False), (64, 32)),
    ],
)
def test_each_kind_of_layer_alone(layer, shape):
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layer

        def forward(self, x):
            return self.layer(x).relu() * 2

    x = torch.randn(shape)
    program = quantize(Twice(), dataset=[x])
    assert program.report["layers in int8-static"].after == 1
    assert sqnr(Twice()(x), program(x)) > 28


def test_the_result_is_a_snapshot():
    net, x = digits_like()
    program = quantize(net, dataset=[x])
    before, parent = program(x), program.parent(x)
    saved = copy.deepcopy(net.state_dict())
    quantize(net, dataset=[x])
    assert all(torch.equal(v, saved[k]) for k, v in net.state_dict().items()), "the user's weights were touched"
    with torch.no_grad():
        for value in net.state_dict().values():
            value.add_(1)
    assert torch.equal(program(x), before)
    assert torch.equal(program.parent(x), parent)


def test_the_same_data_give_the_same_program():
    net, x = digits_like()
    assert quantize(net, dataset=[x]).content_hash() == quantize(net, dataset=[x]).content_hash()


@pytest.mark.parametrize("form", ["labels", "mapping", "tuple", "inputs", "example"])
def test_forms_of_a_dataset(form):
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 2)

        def forward(self, x, y=None):
            return self.linear(x if y is None else x + y)

    x, labels = torch.randn(8, 4), torch.zeros(8, dtype=torch.int64)
    datasets = {
        "labels": {"dataset": [(x, labels)]},
        "mapping": {"dataset": [{"x": x, "y": x, "labels": labels}]},
        "tuple": {"dataset": [((x, x), labels)]},
        "inputs": {"dataset": [x]},
        "example": {"example_inputs": (x, x)},
    }
    assert quantize(Pair(), **datasets[form]).report["calibration samples"].after == 8


def test_only_so_many_batches_are_read():
    read = []

    def batches():
        for i in range(100):
            read.append(i)
            yield torch.randn(2, 4)

    program = quantize(
        capture(nn.Linear(4, 2), torch.randn(2, 4)), dataset=batches(), config=PTQConfig(calibration_batches=3)
    )
    assert program.report["calibration samples"].after == 6
    assert len(read) == 3


def test_an_iterator_gives_its_first_batch_to_calibration_too():
    program = quantize(nn.Linear(4, 2), dataset=iter([torch.randn(2, 4), torch.randn(3, 4)]))
    assert program.report["calibration samples"].after == 5
    with pytest.raises(InputError, match="the dataset is empty"):
        quantize(nn.Linear(4, 2), dataset=iter([]))


X = torch.randn(8, 4)


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        ([], "empty"),
        ([X, torch.randn(8, 5)], r"calibration: input 0 .* given \(8, 5\)"),
        ([X, X.double()], "given torch.float64"),
        ([X, torch.full((8, 4), float("nan"))], "not finite"),
        ([X, X.clone().fill_(float("inf"))], "not finite"),
        ([torch.randn(0, 4)], "empty|no values"),
        ([(X, X, X)], "a batch of 3 parts"),
        ([X, (X, None, 3)], "a batch of 3 parts"),
        (["text"], "a batch of type str"),
    ],
)
def test_data_that_cannot_calibrate(dataset, message):
    with pytest.raises(InputError, match=message):
        quantize(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), dataset=dataset, example_inputs=X)


def test_models_that_cannot_be_quantised():
    with pytest.raises(InputError, match="needs dataset="):
        quantize(nn.Linear(4, 2))
    with pytest.raises(InputError, match="the program is int8 already"):
        quantize(quantize(nn.Linear(4, 2), dataset=[X]), dataset=[X])
    with pytest.raises(InputError, match="nothing in 'Softmax' can be quantised"):
        quantize(nn.Softmax(-1), dataset=[X])
    bad = nn.Sequential(nn.Linear(4, 4))
    bad[0].weight.data[0, 0] = float("nan")
    with pytest.raises(InputError, match="weight of '0' has values that are not finite"):
        quantize(bad, dataset=[X])
    with pytest.raises(InputError, match="skip list"):
        quantize(nn.Sequential(nn.Linear(4, 4)), dataset=[X], config=PTQConfig(skip=("0",)))
    with pytest.raises(InputError, match=r"needs a torch\.nn\.Module"):
        quantize("model", dataset=[X])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"activation_clip": "max"}, '"minmax" or "mse" is needed'),
        ({"weight_clip": None}, '"minmax" or "mse" is needed'),
        ({"rounding": "up"}, '"nearest" or "compensated" or "reconstructed" is needed'),
        ({"calibration_batches": 0}, "at least 1"),
        ({"skip": "head"}, r"\('head',\)"),
    ],
)
def test_options_are_checked(options, message):
    with pytest.raises(ConfigError, match=message):
        PTQConfig(**options)


def test_bits_and_methods_are_checked():
    for bits in (2, 16, "8", True):
        with pytest.raises(ConfigError, match="8 or 4 is needed"):
            quantize(nn.Linear(4, 2), bits, dataset=[X])
    with pytest.raises(ConfigError, match="the config says the bits"):
        quantize(nn.Linear(4, 2), 4, dataset=[X], config=PTQConfig())
    with pytest.raises(PluginError, match="compression method 'dict'"):
        quantize(nn.Linear(4, 2), dataset=[X], config={"bits": 8})


def test_pairs_stand_at_both_inputs_of_a_residual_addition():
    net, x = digits_like()
    program = quantize(net, dataset=[x])
    assert program.report["additions in int8"].after == 3
    adds = [n for n in program.exported.graph.nodes if n.target is torch.ops.aten.add.Tensor]
    assert len(adds) == 3
    for add in adds:
        assert [a.target for a in add.args] == [_q.dequantize_per_tensor.default] * 2
