"""TensorFlow SavedModels as torch modules. Most of it needs TensorFlow, which is no part of the test requirements."""

from __future__ import annotations

import importlib.util
import logging
import os

import numpy as np
import pytest
import torch

from deepseek_r1.core import (
    ArtifactError,
    CheckFailedError,
    InputError,
    MissingExtraError,
    UnsafeFileError,
    UnsupportedOpError,
)
from deepseek_r1.graph import capture
from deepseek_r1.models import SOURCES, _tensorflow_load, load_tensorflow
from deepseek_r1.module import DSModule, load_model

MISSING = [p for p in ("tensorflow", "tf2onnx") if importlib.util.find_spec(p) is None]
needs_tensorflow = pytest.mark.skipif(
    bool(MISSING), reason=f"{' and '.join(MISSING)} not installed (1.4 GB): pip install 'deepseek-r1[tensorflow]'"
)
# TensorFlow and its Keras have deprecations of their own, at import and when they save.
pytestmark = pytest.mark.filterwarnings("ignore")

if not MISSING:
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    import keras
    import tensorflow as tf

    logging.getLogger("tf2onnx").setLevel(logging.ERROR)
    L = keras.layers


def test_a_machine_without_tensorflow(tmp_path, monkeypatch):
    (tmp_path / "saved_model.pb").touch()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "tensorflow" else name)
    with pytest.raises(MissingExtraError, match=r"needs tensorflow.*pip install 'deepseek-r1\[tensorflow\]'"):
        load_tensorflow(tmp_path)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "tf2onnx" else name)
    with pytest.raises(MissingExtraError, match=r"needs tf2onnx.*pip install 'deepseek-r1\[tensorflow\]'"):
        load_model(tmp_path)


def test_an_older_tensorflow_is_named(tmp_path, monkeypatch):
    (tmp_path / "saved_model.pb").touch()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    monkeypatch.setattr("importlib.import_module", lambda name: type("tf", (), {"__version__": "2.11.1"}))
    with pytest.raises(MissingExtraError, match=r"TensorFlow 2\.12 or later, installed is 2\.11\.1"):
        load_tensorflow(tmp_path)


def test_what_is_no_saved_model(tmp_path):
    (tmp_path / "net.keras").touch()
    (tmp_path / "saved_model.pb").touch()
    (tmp_path / "empty").mkdir()
    others = {
        "absent": "does not exist", "net.keras": "from_keras", "saved_model.pb": "give its directory",
        "empty": r"no saved_model\.pb",
    }  # fmt: skip
    for path, message in others.items():
        with pytest.raises(InputError, match=message):
            DSModule.from_tensorflow(tmp_path / path)
    assert SOURCES.get("tensorflow") is load_tensorflow


def stack(shape, *layers, dtype=None):
    return keras.Sequential([keras.Input(shape, dtype=dtype), *layers])


def exported(make, folder):
    """A SavedModel of a Keras model whose biases and statistics are not those of a fresh one."""
    keras.utils.set_random_seed(0)
    model, rng = make(), np.random.default_rng(1)
    for v in model.variables:
        if "moving" in v.path:
            v.assign(rng.uniform(0.5, 1.5, v.shape))
        elif v.path.endswith(("bias", "beta", "gamma")):
            v.assign(rng.uniform(-0.5, 1.5, v.shape))
    model.export(str(folder), verbose=False)
    return model


MODELS = {
    "picture": lambda: stack(
        (12, 12, 3), L.Rescaling([0.1, 0.2, 0.3]), L.Conv2D(8, 3, strides=2, padding="same", activation="relu"),
        L.BatchNormalization(), L.MaxPooling2D(2, padding="same"), L.AveragePooling2D(3, strides=1, padding="same"),
        L.Flatten(), L.Dense(5, activation="softmax"),
    ),
    "grown": lambda: stack(
        (8, 8, 3), L.Conv2DTranspose(4, 3, strides=2, padding="same"), L.UpSampling2D(2, interpolation="bilinear"),
        L.SeparableConv2D(4, 3, padding="same", strides=2), L.DepthwiseConv2D(3),
    ),
    "table": lambda: stack((7,), L.Dense(8, activation="gelu"), L.BatchNormalization(), L.Dense(3)),
    "words": lambda: stack((None,), L.Embedding(30, 8), L.GlobalAveragePooling1D(), L.Dense(2), dtype="int32"),
    "series": lambda: stack((6, 3), L.Bidirectional(L.LSTM(4, return_sequences=True)), L.LSTM(3)),
}  # fmt: skip


@needs_tensorflow
@pytest.mark.parametrize("name", MODELS)
def test_keras_models_that_were_exported(name, tmp_path):
    model = exported(MODELS[name], tmp_path)
    module = load_tensorflow(tmp_path)
    report = module.meta["report"]
    assert report.ok
    assert [c.name for c in report.checks] == ["parity of output_0", "parity of the loss"] * 2
    shape = [5, *(n or 9 for n in model.inputs[0].shape[1:])]
    x = torch.randint(0, 30, shape, dtype=torch.int32) if name == "words" else torch.randn(shape)
    wanted = model(x.numpy()).numpy()
    program = capture(module, x[:2])
    for converted in (module, program):
        np.testing.assert_allclose(converted(x).detach().numpy(), wanted, atol=1e-5 * abs(wanted).max())


@needs_tensorflow
def test_attention(tmp_path):
    def make():
        x = keras.Input((6, 8))
        return keras.Model(x, L.LayerNormalization()(L.MultiHeadAttention(2, 4)(x, x, use_causal_mask=True)))

    exported(make, tmp_path)
    assert load_tensorflow(tmp_path).meta["report"].ok


@needs_tensorflow
def test_a_converted_module_trains_under_the_layers_names(tmp_path):
    exported(MODELS["picture"], tmp_path)
    module = DSModule.from_tensorflow(tmp_path)
    assert module.report.title == f"from_tensorflow {tmp_path.name}:serving_default"
    names = [n for n, _ in module.module.named_parameters()]
    assert {n.rsplit(".", 1)[-1] for n in names if "dense" in n} == {"bias", "kernel"}
    optimizer = torch.optim.Adam(module.parameters(), lr=0.01)
    x, labels, losses = torch.randn(10, 12, 12, 3), torch.arange(10) % 5, []
    for _ in range(15):
        loss = torch.nn.functional.nll_loss(module(x).log(), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


@pytest.fixture(scope="module")
def signatures(tmp_path_factory):
    """A SavedModel with several signatures, several inputs and outputs, and one that takes text."""
    if MISSING:
        return None

    class Model(tf.Module):
        def __init__(self):
            super().__init__()
            self.w = tf.Variable(tf.random.stateless_normal((4, 3), (1, 2)), name="w")

        @tf.function(input_signature=[tf.TensorSpec((None, 4), tf.float32, name="x")])
        def both(self, x):
            return {"product": tf.matmul(x, self.w), "amount": tf.reduce_sum(x, axis=1)}

        @tf.function(
            input_signature=[
                tf.TensorSpec((None, 4), tf.float32, name="x"), tf.TensorSpec((), tf.float32, name="scale"),
                tf.TensorSpec((None, 2), tf.float32, name="ignored"),
            ]
        )  # fmt: skip
        def scaled(self, x, scale, ignored):
            return tf.nn.softmax(tf.matmul(x, self.w) * scale)

        @tf.function(input_signature=[tf.TensorSpec((None,), tf.string, name="text")])
        def lengths(self, text):
            return tf.strings.length(text)

        @tf.function(input_signature=[tf.TensorSpec((None, 4), tf.float32, name="x")])
        def repeated(self, x):
            return tf.while_loop(lambda x: tf.reduce_sum(x) < 10, lambda x: [x * x + 1], [x])[0]

    model, folder = Model(), tmp_path_factory.mktemp("signatures")
    found = {name: getattr(model, name).get_concrete_function() for name in ("both", "scaled", "lengths", "repeated")}
    tf.saved_model.save(model, str(folder), signatures=found)
    return folder, model


@needs_tensorflow
def test_a_signature_is_chosen_by_name(signatures):
    folder, model = signatures
    both = load_tensorflow(folder, signature="both")
    x = torch.randn(5, 4)
    amount, product = both(x)
    assert both.meta["output_names"] == ["amount", "product"]
    torch.testing.assert_close(amount, x.sum(1))
    np.testing.assert_allclose(product.detach().numpy(), x.numpy() @ model.w.numpy(), atol=1e-5)
    scaled = load_tensorflow(folder, signature="scaled")
    assert scaled.meta["input_names"] == ["ignored", "scale", "x"]
    wanted = model.scaled(x.numpy(), tf.constant(2.0), tf.zeros((5, 2))).numpy()
    got = scaled(x=x, scale=torch.tensor(2.0), ignored=torch.zeros(5, 2))
    np.testing.assert_allclose(got.detach().numpy(), wanted, atol=1e-6)


@needs_tensorflow
def test_signatures_that_are_not_there_or_cannot_be_converted(signatures, tmp_path):
    folder, _ = signatures
    with pytest.raises(InputError, match=r"has several\. Its signatures are both, scaled, lengths, repeated"):
        load_tensorflow(folder)
    with pytest.raises(InputError, match=r"no signature 'scald'\. Did you mean 'scaled'\?"):
        load_tensorflow(folder, signature="scald")
    with pytest.raises(InputError, match="the input 'text' is text"):
        load_tensorflow(folder, signature="lengths")
    with pytest.raises(UnsupportedOpError, match=r"no translation for Loop.*from_keras"):
        load_tensorflow(folder, signature="repeated")
    tf.saved_model.save(tf.Module(), str(tmp_path))
    with pytest.raises(InputError, match=r"has no signatures\. Save it with some"):
        load_tensorflow(tmp_path)


@needs_tensorflow
def test_given_inputs_and_labels(signatures):
    folder, model = signatures
    x, labels = torch.randn(6, 4), torch.tensor([0, 1, 2, 0, 1, 2])
    options = {"signature": "both", "example_inputs": {"x": x}, "labels": labels}
    report = load_tensorflow(folder, **options, loss=lambda y, t: torch.nn.functional.cross_entropy(y[1], t)).meta[
        "report"
    ]
    logits = torch.from_numpy(x.numpy() @ model.w.numpy()).double()
    wanted = torch.nn.functional.cross_entropy(logits, labels).item()
    assert report["loss"].before == pytest.approx(wanted, rel=1e-5)
    with pytest.raises(InputError, match="refuses the inputs"):
        load_tensorflow(folder, signature="both", example_inputs=torch.ones(2, 3))


@needs_tensorflow
def test_a_wrong_translation_is_caught(signatures, monkeypatch):
    def wrong(model, class_name, real=_tensorflow_load.build):
        module = real(model, class_name)
        with torch.no_grad():
            next(module.parameters())[0, 0] += 1e-3
        return module

    monkeypatch.setattr(_tensorflow_load, "build", wrong)
    with pytest.raises(CheckFailedError, match="differs from TensorFlow") as caught:
        load_tensorflow(signatures[0], signature="both")
    assert not caught.value.report.ok


@needs_tensorflow
def test_graphs_that_touch_files_are_refused(tmp_path):
    marker = tmp_path / "written"

    class Trap(tf.Module):
        @tf.function(input_signature=[tf.TensorSpec((None, 4), tf.float32, name="x")])
        def __call__(self, x):
            with tf.control_dependencies([tf.io.write_file(str(marker), "x")]):
                return x + 1

    trap = Trap()
    tf.saved_model.save(trap, str(tmp_path / "trap"), signatures=trap.__call__.get_concrete_function())
    marker.unlink(missing_ok=True)
    with pytest.raises(UnsafeFileError, match="WriteFile"):
        load_tensorflow(tmp_path / "trap")
    assert not marker.exists()


@needs_tensorflow
def test_damaged_files_are_refused(tmp_path):
    exported(MODELS["table"], tmp_path)
    file = tmp_path / "saved_model.pb"
    whole = file.read_bytes()
    for bad in (b"", b"no model at all", whole[: len(whole) // 2]):
        file.write_bytes(bad)
        with pytest.raises(ArtifactError, match=r"damaged|cannot load it"):
            load_tensorflow(tmp_path)
    file.write_bytes(whole)
    for data in (tmp_path / "variables").glob("variables.data*"):
        data.write_bytes(data.read_bytes()[:10])
    with pytest.raises(ArtifactError, match="cannot load it"):
        load_tensorflow(tmp_path)
