"""DSQuantizer: which activations are quantised, and that the share it promises is the share that is kept."""

import pytest
import torch
from torch import nn

import deepseek
import deepseek_r1
from deepseek_r1.core import ConfigError, InputError
from deepseek_r1.graph import Program, capture
from deepseek_r1.nn import QuantizedLinear
from deepseek_r1.quantization import DSQuantizer


class Outliers(nn.Module):
    """Two layers that see the same but for one input of the second, which is huge and which its weights ignore."""

    def __init__(self):
        super().__init__()
        self.calm, self.wild = nn.Linear(64, 64), nn.Linear(64, 64)
        with torch.no_grad():
            self.wild.weight[:, 0] = 0
        self.register_buffer("scale", torch.ones(64))
        self.scale[0] = 5000.0

    def forward(self, x):
        return self.calm(x) + self.wild(x * self.scale)


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    return Outliers().eval()


X = torch.randn(4, 32, 64, generator=torch.Generator().manual_seed(1))


def chosen(result):
    report = result.report if isinstance(result, Program) else result.quantization
    (section,) = [s for s in report.sections if s.title == "activations"]
    return {row.metric.removeprefix("activations of "): row.after for row in section.rows}


def test_it_is_reachable_under_its_public_names():
    assert deepseek_r1.DSQuantizer is DSQuantizer
    assert deepseek.DSQuantizer is DSQuantizer


@pytest.mark.parametrize("bits", [4, 8])
def test_activations_with_outliers_stay_float(net, bits):
    found = DSQuantizer(method="dynamic", bit_width=bits, activation_threshold=0.8).fit(net, [X])
    assert isinstance(found, Program)
    assert chosen(found) == {"calm": "int8", "wild": "float32"}
    assert found.precision == ("int4" if bits == 4 else "int8")
    with torch.no_grad():
        error = (found(X) - net(X)).norm() / net(X).norm()
        worse = DSQuantizer(bit_width=bits, activation_threshold=0.0).fit(net, [X])
        assert chosen(worse) == {"calm": "int8", "wild": "int8"}
        assert error < 0.15
        assert (worse(X) - net(X)).norm() / net(X).norm() > 2 * error
        none = DSQuantizer(bit_width=bits, activation_threshold=1.0).fit(net, [X])
    assert set(chosen(none).values()) == {"float32"}


def test_the_share_is_that_of_decibels(net):
    """What the report says is kept is what a layer in that format keeps."""
    found = DSQuantizer(bit_width=8, activation_threshold=0.8).fit(net, [X])
    (section,) = [s for s in found.report.sections if s.title == "activations"]
    both, alone = (float(v) for v in section["activations of calm"].how.removesuffix(" dB kept").split(" of "))
    assert both >= 0.8 * alone
    both, alone = (float(v) for v in section["activations of wild"].how.removesuffix(" dB kept").split(" of "))
    assert both < 0.8 * alone


def test_without_data_a_module_comes_out():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 40), nn.ReLU(), nn.Linear(40, 8), nn.Conv1d(3, 3, 1))
    found = DSQuantizer().fit(net)
    assert [str(found[i].format) for i in (0, 2)] == ["int4-dynamic-g64", "int8-dynamic"]
    assert isinstance(found[0], QuantizedLinear)
    assert isinstance(net[0], nn.Linear)
    assert "3" in dict(found.quantization.skipped)
    kept = DSQuantizer(skip=("0",)).fit(net)
    assert isinstance(kept[0], nn.Linear)
    assert dict(kept.quantization.skipped)["0"] == "in the skip list"


def test_a_program_without_data_is_tried_on_its_examples(net):
    found = DSQuantizer(bit_width=4).fit(capture(net, X))
    assert chosen(found) == {"calm": "int8", "wild": "float32"}
    assert found.parent is not None
    example = DSQuantizer(bit_width=4).fit(net, example_inputs=X)
    assert chosen(example) == chosen(found)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "static"}, '"dynamic" is needed'),
        ({"bit_width": 2}, "4 or 8 is needed"),
        ({"bit_width": True}, "4 or 8 is needed"),
        ({"activation_threshold": 1.2}, "from 0 to 1"),
        ({"activation_threshold": float("nan")}, "from 0 to 1"),
        ({"activation_threshold": "0.8"}, "from 0 to 1"),
        ({"group_size": 48}, "32, 64, 128"),
        ({"skip": "head"}, r"\('head',\)"),
    ],
)
def test_options_are_checked(options, message):
    with pytest.raises(ConfigError, match=message):
        DSQuantizer(**options)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "empty"),
        ([torch.full((4, 32, 64), float("nan"))], "not finite"),
        ([X, torch.zeros(3, 65)], r"given \(3, 65\)"),
        ([X[:0]], "no values"),
    ],
)
def test_data_that_say_nothing_are_refused(net, data, message):
    with pytest.raises(InputError, match=message):
        DSQuantizer().fit(net, data, example_inputs=X)


def test_one_sample_is_enough(net):
    found = DSQuantizer().fit(net, [X[:1, 0]])
    assert chosen(found) == {"calm": "int8", "wild": "float32"}


def test_things_that_are_no_model_are_refused():
    with pytest.raises(InputError, match=r"torch\.nn\.Module or a Program, given str"):
        DSQuantizer().fit("model")
    with pytest.raises(InputError, match="nothing in ReLU can be quantised"):
        DSQuantizer().fit(nn.ReLU())
