"""`DSModule` and `load_model`."""

import pickle
import warnings

import onnx
import pytest
import torch
from torch import nn

from deepseek_r1.cli._inputs import load_weights_
from deepseek_r1.core import ArtifactError, InputError, PluginError, UnsafeFileError
from deepseek_r1.deploy import export
from deepseek_r1.graph import Program, capture
from deepseek_r1.models import GPT2, GPT2Config
from deepseek_r1.module import DSModule, load_model

X = torch.randn(3, 4)


class Mine(DSModule):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 2)

    def forward(self, x):
        return self.linear(x)


@pytest.mark.parametrize("make", [Mine, lambda: DSModule.from_torch(nn.Linear(4, 2))])
def test_the_verbs_and_their_report(make, tmp_path):
    net = make()
    fast = net.optimize(example_inputs=X, engines=["onnxruntime"])
    assert net.report is fast.report
    torch.testing.assert_close(fast(X), net(X))
    report = net.export(tmp_path / "net.onnx", example_inputs=X)
    assert report.ok
    assert net.report is report
    with torch.no_grad():
        next(net.parameters()).mul_(2)
    torch.testing.assert_close(fast(X), net(X))


def test_a_wrapped_module_is_the_module():
    inner = nn.Sequential(nn.Linear(4, 2), nn.Dropout())
    net = DSModule.from_torch(inner)
    assert list(net.state_dict()) == list(inner.state_dict()) == ["0.weight", "0.bias"]
    other = DSModule.from_torch(nn.Sequential(nn.Linear(4, 2), nn.Dropout()))
    other.load_state_dict(net.state_dict())
    assert torch.equal(other.eval()(X), net.eval()(X))
    assert not inner.training
    assert next(net.parameters()) is inner[0].weight
    clone = pickle.loads(pickle.dumps(net))  # noqa: S301  our own bytes
    assert torch.equal(clone(X), net(X))
    with pytest.raises(InputError, match=r"torch\.nn\.Module"):
        DSModule.from_torch(lambda x: x)


def test_every_constructor_gives_a_report(files):
    folder, _ = files
    with pytest.raises(InputError, match="no report yet"):
        _ = Mine().report
    report = DSModule.from_torch(nn.Linear(4, 2)).report
    assert (report.title, report["parameters"].after) == ("from_torch Linear", 10)
    report = DSModule.from_onnx(folder / "net.onnx").report
    assert report.ok
    assert abs(report["loss"].after - report["loss"].before) <= 1e-5 * report["loss"].before


def test_subclasses_need_no_call_of_init_for_their_report():
    class Bare(DSModule):
        def __init__(self):
            nn.Module.__init__(self)

        def forward(self, x):
            return x + 1

    with pytest.raises(InputError, match="no report yet"):
        _ = Bare().report


def test_a_wrapped_module_inside_another_keeps_a_loadable_state():
    net = nn.Sequential(DSModule.from_torch(nn.Linear(4, 2)), nn.ReLU())
    other = nn.Sequential(DSModule.from_torch(nn.Linear(4, 2)), nn.ReLU())
    other.load_state_dict(net.state_dict())
    assert torch.equal(other(X), net(X))


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """One model in every form that can be loaded."""
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 3), nn.ReLU()).eval()
    torch.save(net.state_dict(), folder / "weights.pth")
    (folder / "notes.txt").write_text("nothing")
    (folder / "net.py").write_text(
        "import torch\nfrom pathlib import Path\n\n\ndef build():\n"
        "    net = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.ReLU())\n"
        "    net.load_state_dict(torch.load(Path(__file__).parent / 'weights.pth', weights_only=True))\n"
        "    return net.eval()\n"
    )
    program = capture(net, X)
    program.save(folder / "net.dr1")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.export.save(program.exported, folder / "net.pt2")
    export(program, folder / "net.onnx")
    export(program, folder / "artifact")
    return folder, net


@pytest.mark.parametrize(
    "spec", ["{}/net.py:build", "{}/net.dr1", "{}/net.pt2", "{}/net.onnx", "{}/artifact", "onnx:{}/net.onnx",
     "file:{}/net.py:build"]
)  # fmt: skip
def test_a_model_from_where_users_keep_it(files, spec):
    folder, net = files
    model = load_model(spec.format(folder))
    assert isinstance(model, nn.Module | Program)
    torch.testing.assert_close(model(X), net(X), rtol=1e-5, atol=1e-6)


def test_the_program_of_an_artifact_can_be_captured_again(files):
    folder, net = files
    program = capture(load_model(folder / "artifact"), X)
    torch.testing.assert_close(program(torch.ones(5, 4)), net(torch.ones(5, 4)))


def test_from_onnx(files):
    folder, net = files
    torch.testing.assert_close(DSModule.from_onnx(folder / "net.onnx")(X), net(X))


@pytest.mark.parametrize(
    ("spec", "error", "message"),
    [
        ("absent.onnx", InputError, "absent.onnx does not exist"),
        ("absent.pt2", InputError, "absent.pt2 does not exist"),
        ("absent.dr1", InputError, "absent.dr1 does not exist"),
        ("absent.py:build", InputError, "absent.py does not exist"),
        ("net.py", InputError, "is not of the form file.py:factory"),
        ("{}/weights.pth", InputError, "weights without a model"),
        ("weights.safetensors", InputError, "weights without a model"),
        ("{}", InputError, "without a manifest.json"),
        ("gpt2", InputError, "openai-community/gpt2 in "),
        ("llama-7b", InputError, "'llama-7b' was not found on this machine. Looked for: "),
        ("org/name", InputError, "models--org--name"),
        ("model", InputError, "A model may also be file.py:factory"),
        ("{}/notes.txt", InputError, "is no model that can be loaded. Give a name such as gpt2 or org/name, file.py"),
        ("a b", InputError, "is no model that can be loaded"),
        ("nowhere:gpt2", PluginError, "unknown model source 'nowhere'"),
        ("", InputError, ""),
    ],
)
def test_what_is_no_model(files, spec, error, message, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(error) as caught:
        load_model(spec.format(files[0]))
    assert message in str(caught.value)


def test_names_and_directories_of_hugging_face(monkeypatch, tmp_path):
    config = GPT2Config(vocab_size=9, n_positions=8, n_embd=8, n_layer=1, n_head=2)
    snapshot = tmp_path / "models--openai-community--gpt2" / "snapshots" / "1"
    GPT2(config).save_pretrained(snapshot)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    for spec in ("gpt2", "openai-community/gpt2", "hf:gpt2", snapshot, f"hf:{snapshot}"):
        model = load_model(spec)
        assert isinstance(model, GPT2)
        assert model.config.vocab_size == 9


def test_damaged_files_are_refused(files, tmp_path):
    folder, _ = files
    for name in ("net.dr1", "net.pt2", "net.onnx"):
        path = tmp_path / name
        path.write_bytes((folder / name).read_bytes()[:100])
        with pytest.raises(ArtifactError, match=name):
            load_model(path)
    model = onnx.load(folder / "artifact" / "model.onnx")
    (tmp_path / "artifact").mkdir()
    for file in (folder / "artifact").iterdir():
        (tmp_path / "artifact" / file.name).write_bytes(file.read_bytes())
    model.graph.node[0].op_type = "Neg"
    (tmp_path / "artifact" / "model.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(ArtifactError, match=r"model\.onnx"):
        load_model(tmp_path / "artifact")


class Payload:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return exec, (f"__import__('pathlib').Path({str(self.marker)!r}).touch()",)


@pytest.mark.parametrize("name", ["weights.pth", "weights.pt"])
def test_foreign_weights_that_carry_code_are_refused(tmp_path, name):
    marker = tmp_path / "marker"
    net = nn.Linear(4, 2)
    for value in (
        Payload(marker),
        {"weight": Payload(marker)},
        {"state_dict": {"weight": torch.ones(1), "x": Payload(marker)}},
    ):
        torch.save(value, tmp_path / name)
        with pytest.raises(UnsafeFileError, match="could run code"):
            load_weights_(net, tmp_path / name)
        (tmp_path / name).write_bytes(pickle.dumps(value, protocol=2))
        with pytest.raises((UnsafeFileError, InputError)):
            load_weights_(net, tmp_path / name)
    assert not marker.exists()
    good = {"state_dict": nn.Linear(4, 2).state_dict()}
    torch.save(good, tmp_path / name)
    load_weights_(net, tmp_path / name)
    assert torch.equal(net.weight, good["state_dict"]["weight"])
