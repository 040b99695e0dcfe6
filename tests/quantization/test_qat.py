"""Quantisation-aware training: gradients, what it gains on real digits, and that what comes out is the neutral form."""

import shutil
from collections import Counter
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import deepseek
import deepseek_r1 as dr1
from deepseek_r1.core import ArtifactError, ConfigError, InputError, Int4Dynamic, Int4Weight, Int8Dynamic
from deepseek_r1.data import digits
from deepseek_r1.deploy import export
from deepseek_r1.graph import Program, capture
from deepseek_r1.models import DigitsNet
from deepseek_r1.quantization import PTQConfig, QATConfig, QATModule, R1Quantizer, quantize
from deepseek_r1.quantization._fake import FakeActivation, FakeWeight, _OnGrid
from deepseek_r1.train import Trainer, TrainingConfig, seed_everything

QUICK = TrainingConfig(device="cpu", schedule="cosine", save_every_epochs=None, seed=0)


class Tokens(nn.Module):
    """A row of pixels is a token; a network of linear layers, for formats of 4 bits."""

    def __init__(self):
        super().__init__()
        self.up, self.mix, self.head = nn.Linear(64, 96), nn.Linear(96, 64), nn.Linear(64, 10)

    def forward(self, x):
        x = nn.functional.relu(self.up(x.flatten(1)))
        return self.head(nn.functional.gelu(self.mix(x)))


@pytest.fixture(scope="module")
def data():
    return digits()


def trained(model, data, epochs):
    Trainer(model, data.train, lr=3e-3, config=QUICK).train(epochs)
    return model.eval()


@pytest.fixture(scope="module")
def net(data):
    seed_everything(0)
    return trained(DigitsNet(width=4), data, 3)


@pytest.fixture(scope="module")
def tokens(data):
    seed_everything(0)
    return trained(Tokens(), data, 6)


def loss_of(model, data):
    x, y = data.tensors("test")
    with torch.no_grad():
        return float(nn.functional.cross_entropy(model(x), y))


def test_names_are_public():
    assert dr1.R1Quantizer is deepseek.R1Quantizer is R1Quantizer
    assert deepseek.quantization.QATConfig is QATConfig


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**6), exponent=st.integers(-3, 2), zero=st.integers(-100, 100), rows=st.integers(1, 4),
    each=st.booleans(),
)  # fmt: skip
def test_gradients_are_those_of_a_straight_through_estimator(seed, exponent, zero, rows, each):
    generator = torch.Generator().manual_seed(seed)
    x = (torch.randn(rows, 30, generator=generator, dtype=torch.float64) * 40).requires_grad_()
    scale = torch.rand((rows, 1) if each else (), generator=generator, dtype=torch.float64) + 0.2
    scale = (scale * 10.0**exponent).requires_grad_()
    offset = torch.tensor(float(zero), dtype=torch.float64, requires_grad=True)
    weights = torch.randn(x.shape, generator=generator, dtype=torch.float64)

    def through(v):
        return v + (v.round() - v).detach()

    plain = (through(x / scale) + offset).clamp(-128, 127) - offset
    expected = torch.autograd.grad((plain * scale * weights).sum(), (x, scale, offset))
    found = torch.autograd.grad((_OnGrid.apply(x, scale, offset, -128, 127) * weights).sum(), (x, scale, offset))
    for one, other in zip(found, expected):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), exponent=st.integers(-6, 4), grouped=st.booleans())
def test_a_weight_begins_where_its_integers_are(seed, exponent, grouped):
    generator = torch.Generator().manual_seed(seed)
    exact = torch.randn(4, 64, generator=generator) * 10.0**exponent
    scales = (torch.rand((4, 2) if grouped else (4,), generator=generator) + 0.1) * 10.0**exponent
    low, high = (0, 16) if grouped else (-127, 128)
    stored = torch.randint(low, high, (4, 64), generator=generator).to(torch.uint8 if grouped else torch.int8)
    zeros = torch.randint(0, 16, (4, 2), generator=generator).to(torch.int8) if grouped else None
    fake = FakeWeight(exact, stored, scales, zeros)
    values, steps = fake.stored()
    assert torch.equal(values, stored)
    assert values.dtype == stored.dtype
    torch.testing.assert_close(steps, scales, rtol=1e-6, atol=0)


def test_an_activation_begins_with_its_range():
    fake = FakeActivation(0.125, -7)
    assert fake.affine() == (0.125, -7)
    x = torch.linspace(-30, 30, 101)
    op = torch.ops.quantized_decomposed
    expected = op.dequantize_per_tensor(
        op.quantize_per_tensor(x, 0.125, -7, -128, 127, torch.int8), 0.125, -7, -128, 127, torch.int8
    )
    torch.testing.assert_close(fake(x), expected)


def test_digits_gain_and_the_result_is_the_neutral_form(net, data, tmp_path):
    start = quantize(net, dataset=data.train)
    quantizer = R1Quantizer(net, bits=8)
    found = quantizer.fit(data.train, epochs=2, val_loader=data.val, lr=1e-3, training=QUICK)
    assert isinstance(found, Program)
    assert found.precision == "int8"
    assert found.parent is not None
    assert found.parameters_bytes == start.parameters_bytes
    assert loss_of(found, data) < loss_of(start, data)
    loss = found.report["loss, against post-training"]
    assert loss.after < loss.before
    assert found.report["accuracy, against float"].after > 0.8
    operators = [
        Counter(str(n.target) for n in p.exported.graph.nodes if n.op == "call_function") for p in (found, start)
    ]
    assert operators[0] == operators[1]
    x, _ = data.tensors("test")
    with torch.no_grad():
        torch.testing.assert_close(quantizer.module(x), found(x), rtol=1e-4, atol=1e-4)
    report = export(found, tmp_path / "digits.onnx", example_inputs=x[:8])
    assert report.ok, [(c.name, c.detail) for c in report.failed]
    saved = Program.load(found.save(tmp_path / "digits.dr1"))
    assert torch.equal(saved(x), found(x))


def test_four_bits_gain(tokens, data, tmp_path):
    config = QATConfig(weight_bits=4, group_size=32)
    quantizer = R1Quantizer(tokens, bits=4, config=config)
    found = quantizer.fit(data.train, epochs=2, lr=1e-3, training=QUICK)
    assert found.report.sections[0]["layers in int4-dynamic-g32-symmetric"].after == 3
    start = quantizer.module.start
    assert found.precision == start.precision == "int4"
    assert loss_of(found, data) < loss_of(start, data)
    x, _ = data.tensors("test")
    with torch.no_grad():
        torch.testing.assert_close(quantizer.module(x), found(x), rtol=1e-4, atol=1e-4)
    report = export(found, tmp_path / "tokens.onnx", example_inputs=x[:8])
    assert report.ok, [(c.name, c.detail) for c in report.failed]
    assert any("training batches" in row.how for row in found.report.rows)


def test_what_has_no_four_bit_form_gets_eight(net, data):
    found = R1Quantizer(net, bits=4).fit(data.train, epochs=1, training=QUICK)
    assert found.precision == "int8"
    assert found.report.sections[0]["layers in int8-static"].after == 9


def test_mixed_programs_train_too(tokens, data):
    layers = {"up": Int4Weight(group_size=32), "mix": Int8Dynamic()}
    start = quantize(tokens, dataset=data.train, config=PTQConfig(layers=layers))
    quantizer = R1Quantizer(start)
    found = quantizer.fit(data.train, epochs=1, lr=3e-4, training=QUICK)
    assert found.precision == "mixed"
    assert loss_of(found, data) < loss_of(start, data)


def test_saved_loaded_and_trained_further(net, data, tmp_path):
    quantizer = R1Quantizer(net)
    found = quantizer.fit(data.train, epochs=1, lr=1e-3, training=QUICK)
    folder = quantizer.module.save(tmp_path / "qat")
    again = QATModule.load(folder)
    x, _ = data.tensors("test")
    with torch.no_grad():
        assert torch.equal(again(x), quantizer.module(x))
        assert torch.equal(again.to_program()(x), found(x))
    further = R1Quantizer(again).fit(data.train, epochs=1, lr=1e-3, training=QUICK)
    assert further.report["loss, against post-training"].after <= found.report["loss, against post-training"].after
    state = tmp_path / "qat" / "state.safetensors"
    state.write_bytes(state.read_bytes()[:-9])
    with pytest.raises(ArtifactError, match=r"state\.safetensors is damaged"):
        QATModule.load(folder)
    shutil.rmtree(folder)
    with pytest.raises(ArtifactError, match=r"has no program\.dr1"):
        QATModule.load(folder)


def test_training_that_does_harm_is_not_kept(net, data):
    quantizer = R1Quantizer(net)
    found = quantizer.fit(data.train, epochs=1, lr=3.0, training=replace(QUICK, schedule="constant"))
    start = quantizer.module.start
    x, _ = data.tensors("test")
    with torch.no_grad():
        # A scale that went through its logarithm may move a number from one side of a border to the other.
        assert (found(x) - start(x)).norm() < 0.01 * start(x).norm()
    assert any("made the loss worse" in note for note in found.report.notes)


def test_grids_freeze_in_their_order(tokens, data):
    start = quantize(tokens, dataset=data.train)
    moved = {}
    for freeze in ((0.0, 1.0), (0.0, 0.0)):
        quantizer = R1Quantizer(start, config=QATConfig(freeze=freeze))
        quantizer.fit(data.train, epochs=1, lr=1e-4, training=QUICK)
        assert all(p.requires_grad for p in quantizer.module.parameters()), "it can be trained further"
        pairs = zip(quantizer.module.fakes, QATModule(start).fakes)
        for kind in (FakeActivation, FakeWeight):
            moved[freeze, kind] = max(
                float((a.log_scale - b.log_scale).detach().abs().max()) for a, b in pairs if isinstance(a, kind)
            )
            pairs = zip(quantizer.module.fakes, QATModule(start).fakes)
    # The first step is taken before anything is frozen.
    assert moved[(0.0, 1.0), FakeActivation] <= 1.01e-4
    assert moved[(0.0, 0.0), FakeWeight] <= 1.01e-4
    assert moved[(0.0, 1.0), FakeWeight] > 3e-4


def test_without_labels_the_float_model_teaches(tokens, data):
    x, _ = data.tensors("train")
    batches = [(x[i : i + 64], None) for i in range(0, 640, 64)]
    rough = PTQConfig(format=Int4Dynamic(group_size=32), rounding="nearest", group_clip="minmax", scaling="off")
    start = quantize(tokens, dataset=batches, config=rough)
    quantizer = R1Quantizer(start, config=QATConfig(weight_bits=4, group_size=32))
    found = quantizer.fit(batches, epochs=2, lr=1e-4, training=QUICK)
    row = found.report["loss, against post-training"]
    assert row.after < row.before
    assert "loss: 1 of distillation from the float model; of the task: none: the batches have no labels" in (
        found.report.notes
    )
    with pytest.raises(InputError, match="no labels"):
        R1Quantizer(tokens).fit(batches, epochs=1, loss=nn.functional.cross_entropy, training=QUICK)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"activation_bits": 4}, "8 or 32 is needed"),
        ({"weight_bits": 2}, "8 or 4 is needed"),
        ({"weight_bits": True}, "8 or 4 is needed"),
        ({"quant_scheme": "log"}, "'symmetric' or 'affine' is needed"),
        ({"quant_scheme": "affine"}, "weights of 8 bits"),
        ({"group_size": 5}, "32, 64, 128"),
        ({"distillation": 1.5}, "from 0 to 1"),
        ({"distillation": float("nan")}, "from 0 to 1"),
        ({"freeze": 0.5}, "two shares"),
        ({"freeze": (0.5, 2)}, "two shares"),
        ({"calibration_batches": 0}, "at least 1"),
        ({"skip": "head"}, r"\('head',\)"),
    ],
)
def test_options_are_checked(options, message):
    with pytest.raises(ConfigError, match=message):
        QATConfig(**options)


def test_arguments_are_checked(net):
    with pytest.raises(ConfigError, match="8 or 4 is needed"):
        R1Quantizer(net, bits=16)
    with pytest.raises(ConfigError, match="weight_bits=8"):
        R1Quantizer(net, bits=4, config=QATConfig())
    with pytest.raises(ConfigError, match="a QATConfig is needed"):
        R1Quantizer(net, config={"bits": 8})
    with pytest.raises(InputError, match=r"Module or a Program, given str"):
        R1Quantizer("net")
    with pytest.raises(InputError, match="float parent"):
        QATModule(replace(quantize(nn.Linear(4, 2), dataset=[torch.randn(8, 4)]), parent=None))
    with pytest.raises(InputError, match="a quantised Program is needed"):
        QATModule(capture(nn.Linear(4, 2), torch.randn(8, 4)))


X, Y = torch.randn(8, 4), torch.zeros(8, dtype=torch.int64)


@pytest.mark.parametrize(
    ("loader", "options", "error", "message"),
    [
        (iter([(X, Y)]), {}, InputError, "an iterator gives its batches once"),
        ([], {}, InputError, "empty"),
        ([(X, Y), (torch.randn(8, 5), Y)], {}, InputError, r"given \(8, 5\)"),
        ([(torch.full((8, 4), float("nan")), Y)], {}, InputError, "not finite"),
        ([(X, Y + 7)], {}, InputError, "classes"),
        ([(X, Y)], {"lr": 0}, ConfigError, "lr=0"),
        ([(X, Y)], {"lr": float("nan")}, ConfigError, "lr=nan"),
        ([(X, Y)], {"epochs": 0}, ConfigError, "epochs=0"),
    ],
)
def test_loaders_that_cannot_be_learned_from(loader, options, error, message):
    with pytest.raises(error, match=message):
        R1Quantizer(nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 3))).fit(loader, **{"epochs": 1, **options})


def test_one_sample_trains():
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 3))
    found = R1Quantizer(model).fit([(X[:1], Y[:1])], epochs=1)
    assert found(X).shape == (8, 3)
