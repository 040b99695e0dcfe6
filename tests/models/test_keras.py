"""Keras models as torch modules: layer by layer against Keras, then what a converted module can do."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
import textwrap
import zipfile

import numpy as np
import pytest
import torch

from deepseek_r1.core import ArtifactError, CheckFailedError, InputError, MissingExtraError, UnsafeFileError
from deepseek_r1.engines import optimize
from deepseek_r1.graph import capture
from deepseek_r1.models import SOURCES, _keras_load, load_keras
from deepseek_r1.models._keras_load import import_keras
from deepseek_r1.module import DSModule, load_model
from deepseek_r1.quantization import quantize

try:
    keras = import_keras("these tests")
except MissingExtraError as e:
    pytest.skip(str(e), allow_module_level=True)

# Keras' own way of reading tensors on its torch backend; the package must get along without it.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

L, ops = keras.layers, keras.ops
TORCH = keras.backend.backend() == "torch"
IMAGE, PLACES, STEPS = (11, 8, 3), (None, None, 3), (6, 3)


def stack(shape, *layers, dtype=None):
    return keras.Sequential([keras.Input(shape, dtype=dtype), *layers])


def functional(shape, function, dtype=None):
    x = keras.Input(shape, dtype=dtype)
    return keras.Model(x, function(x))


def stir_(model):
    """Changes the model: fresh biases of zero and statistics of one would hide a mix-up."""
    rng = np.random.default_rng(1)
    for v in model.variables:
        if "moving" in v.path:
            v.assign(rng.uniform(0.5, 1.5, v.shape))
        elif v.path.endswith(("bias", "beta", "gamma")):
            v.assign(rng.uniform(-0.5, 1.5, v.shape))
    return model


def build(make):
    keras.utils.set_random_seed(0)
    return stir_(make())


def outputs_of(model, *inputs):
    y = model(*inputs, training=False)
    return keras.ops.convert_to_numpy(y)


def parity(model):
    """The converted module, after the check that every conversion runs, and a check of that check."""
    module = load_keras(model)
    report = module.meta["report"]
    assert report.ok
    assert [c.name for c in report.checks].count("parity of the loss") == 2
    worst = max(row.after for row in report.rows if row.metric.startswith("difference"))
    assert worst <= 1e-5
    return module


@pytest.mark.parametrize("padding", ["valid", "same"])
@pytest.mark.parametrize("strides", [1, 2, 3])
@pytest.mark.parametrize("kernel", [2, 3, 5])
def test_padding_of_every_kind(padding, strides, kernel):
    sizes = {"strides": strides, "padding": padding}
    makers = [
        lambda: stack(IMAGE, L.Conv2D(4, kernel, **sizes)),
        lambda: stack(PLACES, L.Conv2D(4, kernel, **sizes)),
        lambda: stack(IMAGE, L.DepthwiseConv2D(kernel, depth_multiplier=2, **sizes)),
        lambda: stack(IMAGE, L.SeparableConv2D(5, kernel, depth_multiplier=2, **sizes)),
        lambda: stack((5, 4, 3), L.Conv2DTranspose(4, kernel, **sizes)),
        lambda: stack(IMAGE, L.MaxPooling2D(kernel, **sizes)),
        lambda: stack(PLACES, L.MaxPooling2D(kernel, **sizes)),
        lambda: stack(IMAGE, L.AveragePooling2D(kernel, **sizes)),
        lambda: stack((9, 3), L.Conv1D(4, kernel, **sizes), L.MaxPooling1D(2, padding=padding)),
    ]
    for make in makers:
        module = parity(build(make))
        assert not module.meta["kept"]


LAYERS = {
    "dilated": lambda: stack(IMAGE, L.Conv2D(4, 3, dilation_rate=2, padding="same", activation="gelu")),
    "grouped": lambda: stack((8, 8, 4), L.Conv2D(8, 3, groups=2, activation="softmax")),
    "causal": lambda: stack((9, 3), L.Conv1D(4, 3, padding="causal", dilation_rate=2)),
    "signal": lambda: stack(
        (12, 4), L.SeparableConv1D(6, 3, padding="same"), L.DepthwiseConv1D(3), L.Conv1DTranspose(4, 3, strides=2),
        L.UpSampling1D(2), L.ZeroPadding1D((1, 2)), L.Cropping1D((2, 1)), L.AveragePooling1D(2), L.GlobalMaxPooling1D(),
    ),
    "volume": lambda: stack(
        (5, 6, 7, 2), L.Conv3D(4, 3, padding="same", strides=2), L.AveragePooling3D(2), L.GlobalAveragePooling3D()
    ),
    "channels first": lambda: stack(
        (3, 9, 9), L.Conv2D(4, 3, data_format="channels_first", padding="same", strides=2),
        L.BatchNormalization(axis=1), L.MaxPooling2D(2, data_format="channels_first"),
        L.Flatten(data_format="channels_first"),
    ),
    "grown": lambda: stack(
        (5, 4, 3), L.UpSampling2D((2, 3)), L.ZeroPadding2D(((1, 2), (0, 3))), L.Cropping2D(((0, 2), (1, 0))),
        L.UpSampling2D(2, interpolation="bilinear"),
    ),
    "flattened in Keras' order": lambda: stack(
        (4, 5, 2), L.Conv2D(3, 2), L.Flatten(), L.Dense(6, activation="elu"), L.Reshape((2, 3)), L.Permute((2, 1)),
        L.Softmax(axis=1),
    ),
    "repeated": lambda: stack(
        (4,), L.Dense(3, activation="tanh"), L.RepeatVector(3), L.LayerNormalization(), L.RMSNormalization(),
        L.UnitNormalization(), L.EinsumDense("abc,cd->abd", output_shape=(None, 5), bias_axes="d", activation="relu"),
    ),
    "normalised": lambda: stack(
        (6, 6, 4), L.Conv2D(4, 1), L.GroupNormalization(2), L.LayerNormalization(axis=[1, 2, 3]),
        L.BatchNormalization(scale=False), L.BatchNormalization(center=False), L.PReLU(shared_axes=[1, 2]), L.PReLU(),
        L.LeakyReLU(0.1), L.ELU(0.5), L.ReLU(max_value=6.0), L.ReLU(negative_slope=0.3), L.ReLU(max_value=0.7),
    ),
    "rescaled": lambda: stack(
        (4, 4, 3), L.Rescaling(1 / 127.5, offset=-1), L.RandomFlip(), L.Conv2D(2, 3), dtype="uint8"
    ),
    "rescaled by channel": lambda: stack(
        (4, 4, 3), L.Rescaling([0.1, 0.2, 0.3], offset=[1.0, 2.0, 3.0]), L.GaussianNoise(0.1), L.Conv2D(2, 1),
        L.SpatialDropout2D(0.2), L.Dropout(0.3), L.Dropout(0.3, noise_shape=(None, 1, 1, 1)),
    ),
    "an activation that is a layer": lambda: stack((5, 6, 3), L.Conv2D(4, 2, activation=L.LeakyReLU(0.3))),
    "at every step": lambda: stack(
        (4, 6, 6, 2), L.TimeDistributed(L.Conv2D(3, 2, activation="relu")), L.TimeDistributed(L.MaxPooling2D()),
        L.TimeDistributed(L.Flatten()), L.TimeDistributed(L.Dense(3)), L.GRU(4),
    ),
    "masked by value": lambda: stack(STEPS, L.Masking(), L.LSTM(4), L.Dense(1)),
    "masked mean": lambda: stack((6,), L.Embedding(5, 3, mask_zero=True), L.GlobalAveragePooling1D(), L.Dense(1)),
}  # fmt: skip


@pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)
def test_layers(make):
    module = parity(build(make))
    assert not module.meta["kept"]


ACTIVATIONS = [
    "celu", "elu", "exponential", "gelu", "hard_shrink", "hard_sigmoid", "hard_silu", "hard_tanh", "leaky_relu",
    "linear", "log_sigmoid", "log_softmax", "mish", "relu", "relu6", "selu", "sigmoid", "silu", "soft_shrink",
    "softmax", "softplus", "softsign", "tanh", "tanh_shrink",
]  # fmt: skip


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations(name):
    module = parity(build(lambda: stack((5, 6, 3), L.Conv2D(4, 2, activation=name), L.Activation(name))))
    assert not module.meta["kept"]


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "SimpleRNN"])
@pytest.mark.parametrize("sequences", [False, True])
def test_recurrent_layers(kind, sequences):
    def make(**options):
        return getattr(L, kind)(4, return_sequences=sequences, bias_initializer="normal", **options)

    def masked(*layers):
        # Zeros come anywhere in a row, not only at its end.
        return stack((6,), L.Embedding(3, 3, mask_zero=True), *layers, dtype="int32")

    for model in (
        lambda: stack(STEPS, make()),
        lambda: stack(STEPS, make(go_backwards=True, use_bias=False)),
        lambda: masked(make()),
        lambda: masked(make(go_backwards=True)),
        lambda: masked(make(zero_output_for_mask=True)),
        lambda: masked(L.Bidirectional(make())),
        *(
            lambda merge=merge: stack(STEPS, L.Bidirectional(make(), merge_mode=merge))
            for merge in ("sum", "ave", "mul")
        ),
    ):
        module = parity(build(model))
        assert not module.meta["kept"]


def test_states_go_from_one_layer_to_another():
    def make():
        first, second = keras.Input((6, 3)), keras.Input((4, 3))
        _, h, c = L.LSTM(5, return_state=True)(first)
        y = L.LSTM(5, return_sequences=True)(second, initial_state=[h, c])
        z, *ends = L.Bidirectional(L.LSTM(2, return_state=True))(y)
        _, h = L.GRU(5, return_state=True)(y)
        return keras.Model([first, second], [z, ends[3], L.GRU(5)(second, initial_state=h)])

    assert not parity(build(make)).meta["kept"]


@pytest.mark.parametrize("options", [{}, {"use_causal_mask": True}, {"return_attention_scores": True}])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_attention(options, dropout):
    def plain():
        x, y = keras.Input((6, 5)), keras.Input((6, 5))
        return keras.Model([x, y], L.MultiHeadAttention(2, 4, value_dim=3, dropout=dropout)(x, y, **options))

    def masked():
        x = keras.Input((6,), dtype="int32")
        words = L.Embedding(4, 8, mask_zero=True)(x)
        return keras.Model(x, L.MultiHeadAttention(2, 4, dropout=dropout)(words, words, **options))

    def with_a_mask():
        x, mask = keras.Input((6, 5)), keras.Input((6, 6), dtype="bool")
        return keras.Model([x, mask], L.MultiHeadAttention(2, 4, dropout=dropout)(x, x, attention_mask=mask, **options))

    for make in (plain, masked, with_a_mask):
        assert not parity(build(make)).meta["kept"]


def residual(arithmetic=True):
    x = keras.Input((12, 12, 3))
    y = L.BatchNormalization()(L.Conv2D(4, 3, padding="same", use_bias=False)(x))
    y = L.Conv2D(4, 3, padding="same")(L.ReLU()(y))
    y = L.Concatenate()([L.Add()([y, L.Conv2D(4, 1)(x)]), x])
    gate = L.Reshape((1, 1, 7))(L.GlobalAveragePooling2D()(y))
    y = L.Multiply()([y, L.Conv2D(7, 1, activation="sigmoid")(gate)])
    if arithmetic:
        y = L.Maximum()([L.Average()([y, y * 2]), 1 - y])
    y = L.MaxPooling2D(3, strides=2, padding="same")(y)
    return keras.Model(x, L.Dense(5)(L.Flatten()(y)))


def sentence():
    x = keras.Input((7,), dtype="int32", name="words")
    words = L.Embedding(20, 8, mask_zero=True)(x)
    y = L.Bidirectional(L.LSTM(4, return_sequences=True))(words)
    y = L.LayerNormalization()(L.Add()([y, L.MultiHeadAttention(2, 4)(y, y)]))
    return keras.Model(x, L.Dense(3)(L.GlobalAveragePooling1D()(y)))


def test_whole_models():
    assert not parity(build(residual)).meta["kept"]
    module = parity(build(sentence))
    assert module.meta["bounds"] == {"words": 20}
    assert not module.meta["kept"]


def test_operations_between_layers():
    def arithmetic(x):
        x = x - ops.mean(x, axis=1, keepdims=True)
        x = x / ops.sqrt(ops.mean(ops.square(x), axis=-1, keepdims=True) + 1e-3)
        y = ops.transpose(x[:, 1:4], (0, 2, 1))
        z = ops.concatenate([ops.matmul(y, ops.softmax(x[:, :3], axis=-1)), y], axis=-1)
        z = ops.maximum(ops.reshape(2.0 / (1 + ops.exp(-z)), (-1, 28)), 0.1)
        z = ops.where(z > 1, z, ops.zeros_like(z)) ** 2
        return ops.expand_dims(z, 1) + np.ones((1, 28), "float32")

    assert not parity(build(lambda: functional((6, 4), arithmetic))).meta["kept"]


def test_several_inputs_and_outputs_keep_their_names():
    def make():
        a, b, shared = keras.Input((3,), name="a"), keras.Input((2,), name="b"), L.Dense(4, name="shared")
        tower = keras.Sequential(
            [keras.Input((4,)), L.Dense(3, activation="relu", name="in"), L.Dense(2)], name="tower"
        )
        x, y = tower(shared(a)), tower(L.Dense(4)(b))
        return keras.Model({"a": a, "b": b}, {"p": L.Dot(1)([x, y]), "q": L.Subtract()([x, shared(a)[:, :2]])})

    module = parity(build(make))
    assert module.meta["input_names"] == ["a", "b"]
    assert set(module(b=torch.ones(2, 2), a=torch.ones(2, 3))) == {"p", "q"}
    # What Keras shares is one module here; a name that Python keeps for itself gets an underscore.
    names = [n for n, _ in module.named_parameters()]
    assert sum(n.endswith(".weight") for n in names) == 4
    assert {"shared.weight", "tower.in_.weight"} <= set(names)


def test_average_pools_follow_the_backend_and_say_so():
    model = build(lambda: stack(IMAGE, L.AveragePooling2D(3, strides=2, padding="same", name="mean")))
    notes = load_keras(model).meta["report"].notes
    assert any("mean: Keras on torch averages over repeated edges" in n for n in notes) == TORCH


def test_names_and_weights_are_those_of_the_layers():
    model = build(lambda: stack((8, 8, 3), L.Conv2D(4, 3, name="stem"), L.BatchNormalization(name="norm"), L.ReLU()))
    module = load_keras(model)
    assert [n for n, _ in module.named_parameters()] == ["stem.weight", "stem.bias", "norm.weight", "norm.bias"]
    kernel = keras.ops.convert_to_numpy(model.get_layer("stem").kernel)
    np.testing.assert_array_equal(module.stem.weight.detach().numpy(), kernel.transpose(3, 2, 0, 1))
    # Between convolutions nothing is turned around: once on the way in, once on the way out.
    assert sum(n.target is torch.permute for n in module.graph.nodes) == 2
    state = {k: v + 0 for k, v in module.state_dict().items()}
    load_keras(model).load_state_dict(state)


def test_frozen_layers_stay_frozen_and_augmentation_is_named():
    def make():
        layers = [keras.Input((8, 8, 3)), L.Conv2D(4, 3, name="conv"), L.BatchNormalization(name="norm")]
        base = keras.Sequential(layers, name="base")
        base.trainable = False
        head = L.Dense(2, kernel_regularizer="l2", name="head")
        return stack((8, 8, 3), L.RandomRotation(0.1, name="turn"), base, L.GlobalAveragePooling2D(), head)

    module = load_keras(build(make))
    report = module.meta["report"]
    assert [n for n, p in module.named_parameters() if p.requires_grad] == ["head.weight", "head.bias"]
    assert report["trained parameters"].after == report["trained parameters"].before == 10
    text = " ".join(report.notes)
    assert "turn (RandomRotation) acts in training only" in text
    assert "not trained, as in Keras: base.conv, base.norm" in text
    assert [what for what, why in report.skipped if "head" in why] == ["regularisation"]


def images(n=6):
    return torch.randn(n, 12, 12, 3, generator=torch.Generator().manual_seed(3))


def test_a_converted_module_is_captured_optimised_quantised_and_exported(tmp_path):
    model = build(residual)
    module = load_keras(model)
    program = capture(module, images(2))
    for count in (0, 1, 5):
        assert program(images(count)).shape == (count, 5)
    wanted = outputs_of(model, images().numpy())
    np.testing.assert_allclose(program(images()).detach().numpy(), wanted, atol=1e-5 * abs(wanted).max())
    fast = optimize(module, example_inputs=images(2), engines=["onnxruntime"])
    np.testing.assert_allclose(fast(images()).detach().numpy(), wanted, atol=1e-4 * abs(wanted).max())
    small = quantize(module, dataset=[images(8)])
    error = (small(images()) - torch.from_numpy(wanted)).abs().max() / abs(wanted).max()
    assert 0 < error < 0.1
    wrapped = DSModule.from_keras(model)
    assert wrapped.report.title.startswith("from_keras")
    assert wrapped.export(tmp_path / "net.onnx", example_inputs=images(2)).ok


def test_a_recurrent_module_is_captured():
    module = load_keras(build(sentence))
    words = torch.randint(0, 20, (2, 7))
    program = capture(module, words)
    more = torch.randint(0, 20, (5, 7))
    torch.testing.assert_close(program(more), module(more))


@pytest.mark.parametrize("make", [residual, sentence])
def test_a_converted_module_trains(make):
    module = load_keras(build(make))
    inputs = images() if make is residual else torch.randint(0, 20, (6, 7))
    labels = torch.arange(6) % 3
    before = copy.deepcopy(module.state_dict())
    module.train()
    optimizer = torch.optim.Adam(module.parameters(), lr=0.01)
    losses = []
    for _ in range(40):
        loss = torch.nn.functional.cross_entropy(module(inputs), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    still = [n for n, p in module.named_parameters() if torch.equal(p, before[n])]
    assert not still


def test_batch_norm_runs_as_in_keras():
    """The running mean moves at the same rate; torch's variance is the unbiased one."""
    model = build(lambda: stack((3,), L.BatchNormalization(momentum=0.9)))
    module = load_keras(model).train()
    x = torch.randn(8, 3)
    module(x)
    model(x.numpy(), training=True)
    norm = model.layers[0]
    bn = next(m for m in module.modules() if isinstance(m, torch.nn.BatchNorm1d))
    np.testing.assert_allclose(bn.running_mean, keras.ops.convert_to_numpy(norm.moving_mean), rtol=1e-5)


class Doubled(L.Dense):
    """A class of the user's own, with the name of none and the shape of a known one."""

    def call(self, x):
        return 2 * super().call(x)


@pytest.mark.skipif(not TORCH, reason="Keras layers inside need the torch backend")
def test_unknown_layers_stay_keras_layers():
    model = build(lambda: stack((3,), L.Dense(4), Doubled(2, name="doubled"), L.ReLU()))
    module = parity(model)
    assert set(module.meta["kept"]) == {"doubled"}
    assert any("doubled stays a Keras layer" in n for n in module.meta["report"].notes)
    x = torch.randn(5, 3)
    torch.testing.assert_close(capture(module, x[:2])(x), module(x))
    module(x).sum().backward()
    assert all(p.grad is not None for p in module.parameters())


@pytest.mark.skipif(not TORCH, reason="Keras layers inside need the torch backend")
def test_a_model_with_its_own_call_is_kept_whole():
    class Own(keras.Model):
        def __init__(self):
            super().__init__()
            self.a, self.b = L.Dense(4), L.Dense(2)

        def call(self, x):
            return self.b(ops.relu(self.a(x)))

    model = Own()
    with pytest.raises(InputError, match="example_inputs"):
        load_keras(model)
    module = load_keras(model, example_inputs=torch.randn(2, 3))
    assert set(module.meta["kept"]) == {"model"}
    assert module(torch.randn(5, 3)).shape == (5, 2)


@pytest.mark.parametrize("ending", [".keras", ".h5"])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_files(tmp_path, ending):
    # Keras writes arithmetic between layers into .h5 files that it cannot read itself.
    model = build(lambda: residual(arithmetic=ending == ".keras"))
    path = tmp_path / f"net{ending}"
    model.save(path)
    wanted = outputs_of(model, images().numpy())
    for module in (load_keras(path), load_model(path), load_model(f"keras:{path}"), DSModule.from_keras(str(path))):
        with torch.no_grad():
            np.testing.assert_allclose(module(images()).numpy(), wanted, atol=1e-5 * abs(wanted).max())
    assert SOURCES.get("keras") is load_keras


def test_a_class_of_your_own_is_named_and_given(tmp_path):
    path = tmp_path / "net.keras"
    build(lambda: stack((3,), Doubled(2))).save(path)
    with pytest.raises(InputError, match="custom_objects"):
        load_keras(path)
    if TORCH:
        assert load_keras(path, custom_objects={"Doubled": Doubled}).meta["report"].ok


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("ending", [".keras", ".h5"])
def test_code_in_a_file_is_refused(tmp_path, ending):
    path = tmp_path / f"net{ending}"
    marker = tmp_path / "ran"
    name = str(marker)
    trap = L.Lambda(lambda x: __import__("pathlib").Path(name).touch() or x, output_shape=(3,), name="trap")
    stack((3,), trap).save(path)
    marker.unlink(missing_ok=True)
    with pytest.raises(UnsafeFileError, match="Lambda"):
        load_keras(path)
    assert not marker.exists()


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_damaged_and_other_files(tmp_path):
    model = stack((3,), L.Dense(2))
    for ending in (".keras", ".h5"):
        path = tmp_path / f"net{ending}"
        model.save(path)
        whole = path.read_bytes()
        for bad in (b"", b"no model", whole[: len(whole) // 2]):
            path.write_bytes(bad)
            with pytest.raises(ArtifactError, match=rf"net\{ending} is damaged"):
                load_keras(path)
    model.save_weights(tmp_path / "net.weights.h5")
    with pytest.raises(InputError, match="weights without a model"):
        load_keras(tmp_path / "net.weights.h5")
    with zipfile.ZipFile(tmp_path / "empty.keras", "w") as archive:
        archive.writestr("config.json", json.dumps({"class_name": "Nothing", "config": {}, "module": "os"}))
    with pytest.raises(InputError, match="cannot load it"):
        load_keras(tmp_path / "empty.keras")
    (tmp_path / "net.txt").write_text("x")
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "saved_model.pb").write_bytes(b"")
    for path, message in (
        ("net.txt", "no Keras file"),
        ("saved", "from_tensorflow"),
        ("absent.keras", "does not exist"),
    ):
        with pytest.raises(InputError, match=message):
            load_keras(tmp_path / path)


def test_what_is_no_keras_model():
    for thing in (torch.nn.Linear(1, 1), None, 3):
        with pytest.raises(InputError, match="needs a Keras 3 model"):
            load_keras(thing)
    other = type("Model", (), {"__module__": "tf_keras.src.models"})()
    with pytest.raises(InputError, match=r"no Keras 3 model\. Save it"):
        load_keras(other)


def test_other_precisions_are_refused():
    with pytest.raises(InputError, match=r"'dense.*' computes in mixed_float16"):
        load_keras(stack((3,), L.Dense(2, dtype="mixed_float16")))


def test_a_wrong_translation_is_caught(monkeypatch):
    def wrong(keras, model, real=_keras_load.build):
        module = real(keras, model)
        with torch.no_grad():
            next(module.parameters())[0, 0] += 1e-3
        return module

    monkeypatch.setattr(_keras_load, "build", wrong)
    with pytest.raises(CheckFailedError, match="differs from Keras on") as caught:
        load_keras(build(lambda: stack((3,), L.Dense(2))))
    assert not caught.value.report.ok


def test_the_loss_is_compared_with_given_labels():
    model = build(lambda: stack((3,), L.Dense(4)))
    x, labels = torch.randn(6, 3), torch.tensor([0, 1, 2, 3, 0, 1])
    report = load_keras(model, example_inputs=x, labels=labels).meta["report"]
    logits = torch.from_numpy(outputs_of(model, x.numpy()))
    wanted = torch.nn.functional.cross_entropy(logits.double(), labels).item()
    assert report["loss"].before == pytest.approx(wanted, rel=1e-6)
    assert report["loss"].after == pytest.approx(wanted, rel=1e-5)
    report = load_keras(model, example_inputs=x, labels=labels, loss=lambda y, t: y.sum() + t.sum()).meta["report"]
    assert report["loss"].before == pytest.approx((logits.sum() + labels.sum()).item(), rel=1e-4)
    with pytest.raises(InputError, match="the loss fails on outputs of shape"):
        load_keras(model, example_inputs=x, labels=labels[:2])


def test_inputs_that_do_not_fit():
    model = stack((3,), L.Dense(2))
    with pytest.raises(InputError, match="has 2 tensors"):
        load_keras(model, example_inputs=(torch.ones(2, 3), torch.ones(2, 3)))
    with pytest.raises(InputError, match="refuses the inputs"):
        load_keras(model, example_inputs=torch.ones(2, 5))


def test_outputs_that_never_change_are_remarked_on():
    model = stack((3,), L.Dense(2, kernel_initializer="zeros", bias_initializer="ones"))
    assert any("all but the same" in n for n in load_keras(model).meta["report"].notes)


#: Runs in its own process: Keras looks for its backend once, when it is imported.
SCRIPT = """
    import os, sys
    import deepseek_r1.models
    assert "keras" not in sys.modules
    before = os.environ.get("KERAS_BACKEND")
    try:
        print(deepseek_r1.models.load_keras("net.keras").meta["report"].facts["backend"])
    except Exception as e:
        print(type(e).__name__, e)
    assert os.environ.get("KERAS_BACKEND") == before
"""


@pytest.mark.parametrize(
    ("variable", "prints"), [(None, "torch\n"), ("nonsense", "MissingExtraError reading net.keras: Keras cannot be")]
)
def test_importing_keras_leaves_the_environment(tmp_path, variable, prints):
    stack((3,), L.Dense(2)).save(tmp_path / "net.keras")
    environment = {k: v for k, v in os.environ.items() if k != "KERAS_BACKEND"}
    if variable:
        environment["KERAS_BACKEND"] = variable
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(SCRIPT)], cwd=tmp_path, env=environment, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(prints)


def test_a_machine_without_keras(tmp_path, monkeypatch):
    (tmp_path / "net.keras").touch()
    monkeypatch.delitem(sys.modules, "keras")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"reading net\.keras needs keras.*pip install 'deepseek-r1\[keras\]'"):
        load_keras(tmp_path / "net.keras")
    with pytest.raises(InputError, match="needs a Keras 3 model"):
        load_keras(torch.nn.Linear(1, 1))


def test_an_older_keras_is_named(tmp_path, monkeypatch):
    (tmp_path / "net.keras").touch()
    monkeypatch.setattr(keras, "__version__", "2.15.0")
    with pytest.raises(MissingExtraError, match=r"needs Keras 3, installed is 2\.15\.0"):
        load_keras(tmp_path / "net.keras")


def test_a_converted_module_needs_no_keras(tmp_path):
    capture(load_keras(build(residual)), images(2)).save(tmp_path / "net.dr1")
    script = (
        "import sys, torch; from deepseek_r1.graph import Program; "
        "y = Program.load('net.dr1')(torch.zeros(3, 12, 12, 3)); print(tuple(y.shape), 'keras' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "(3, 5) False", done.stderr
