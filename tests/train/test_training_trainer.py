"""The Trainer as users meet it: whole runs, reports, evaluation, prediction, export, bad input."""

from __future__ import annotations

import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from deepseek_r1 import deploy
from deepseek_r1.core import ConfigError, InputError, Report
from deepseek_r1.train import Trainer, TrainingConfig

CPU = TrainingConfig(device="cpu", precision="fp32")


def task(n=64, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 4, generator=g)
    return TensorDataset(x, (x.sum(dim=1) > 0).long())


def loaders(**options):
    g = torch.Generator().manual_seed(0)
    return DataLoader(task(), batch_size=16, shuffle=True, generator=g, **options), DataLoader(
        task(32, 1), batch_size=10
    )


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.1), nn.Linear(16, 2))


def test_three_lines_train_a_model():
    trainer = Trainer(net(), *loaders(), lr=1e-2, config=CPU)
    report = trainer.train(epochs=8)
    assert isinstance(report, Report)
    assert report["steps"].after == trainer.step == 32
    assert report["val_accuracy"].after > 0.9
    assert report["train_loss"].after < report["train_loss"].before
    assert report["throughput"].after > 0
    assert "best val_loss" in report
    assert any(n == "loss: cross entropy, chosen for integer labels (16,) and outputs with one dimension more (the "
               "classes, in dimension 1)" for n in report.notes)  # fmt: skip
    assert {n.split(":")[0] for n in report.notes} == {"compile", "optimizer", "loss"}
    (plot,) = report.plots
    assert (plot.kind, plot.title) == ("line", "training curve")
    assert set(plot.series) == {"train loss", "val loss", "val accuracy"}
    assert len(plot.series["val accuracy"]) == 8
    assert report.facts["device"] == "cpu"
    entry = trainer.history[-1]
    assert list(entry) == ["epoch", "step", "lr", "train_loss", "val_loss", "val_accuracy", "seconds"]
    assert (entry["epoch"], entry["step"], entry["lr"]) == (8, 32, 1e-2)


def test_it_is_the_plain_loop_to_the_bit():
    ours, plain = net(), net()
    data = list(loaders()[0])
    torch.manual_seed(3)
    Trainer(ours, data, lr=1e-2, config=CPU, optimizer=torch.optim.SGD).train(epochs=2)
    torch.manual_seed(3)
    optimizer = torch.optim.SGD(plain.parameters(), lr=1e-2)
    for _ in range(2):
        for x, y in data:
            optimizer.zero_grad()
            F.cross_entropy(plain(x), y).backward()
            optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(ours.state_dict().values(), plain.state_dict().values()))


def test_train_loss_is_the_mean_over_samples_of_ragged_windows():
    model = nn.Linear(4, 2)
    x, y = task(10).tensors
    data = list(zip(x.split([4, 4, 2]), y.split([4, 4, 2])))
    config = TrainingConfig(device="cpu", precision="fp32", gradient_accumulation_steps=2)
    trainer = Trainer(model, data, lr=1e-30, config=config, optimizer=torch.optim.SGD)
    expected = F.cross_entropy(model(x), y).item()
    trainer.train(epochs=1)
    assert trainer.step == 2
    assert trainer.history[0]["train_loss"] == pytest.approx(expected, rel=1e-6)
    assert trainer.evaluate(data)["loss"] == pytest.approx(expected, rel=1e-6)


def test_the_last_window_of_an_epoch_is_stepped_with_its_own_weight():
    x, y = task(10).tensors
    ours, plain = (nn.Linear(4, 2) for _ in range(2))
    plain.load_state_dict(ours.state_dict())
    config = TrainingConfig(device="cpu", precision="fp32", gradient_accumulation_steps=2)
    data = list(zip(x.split([4, 4, 2]), y.split([4, 4, 2])))
    Trainer(ours, data, lr=0.5, config=config, optimizer=torch.optim.SGD).train(epochs=1)
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.5)
    for part in (slice(0, 8), slice(8, 10)):
        optimizer.zero_grad()
        F.cross_entropy(plain(x[part]), y[part]).backward()
        optimizer.step()
    torch.testing.assert_close(ours.weight, plain.weight)


def test_a_second_run_goes_on_with_the_model_and_counts_on():
    trainer = Trainer(net(), *loaders(), lr=1e-2, config=TrainingConfig(device="cpu", schedule="linear"))
    trainer.train(epochs=1)
    assert trainer.history[-1]["lr"] == pytest.approx(1e-2 / 4)
    report = trainer.train(epochs=2)
    assert [e["epoch"] for e in trainer.history] == [1, 2, 3]
    assert (report["epochs"].after, report["steps"].after) == (2, 8)
    assert trainer.history[1]["lr"] == pytest.approx(1e-2 * 5 / 8), "the schedule began anew"


def test_the_modes_of_all_modules_are_put_back():
    model = net().eval()
    model[3].train()
    trainer = Trainer(model, *loaders(), config=CPU)
    seen = []
    model[1].register_forward_hook(lambda m, i, o: seen.append(m.training))
    trainer.train(epochs=1)
    assert seen == [True] * 4 + [False] * 4
    trainer.evaluate()
    assert [m.training for m in model.modules()] == [False, False, False, False, True, False]


def test_evaluation_leaves_weights_and_statistics():
    trainer = Trainer(net(), *loaders(), config=CPU)
    before = {k: v.clone() for k, v in trainer.model.state_dict().items()}
    values = trainer.evaluate()
    assert set(values) == {"loss", "accuracy"}
    assert all(torch.equal(before[k], v) for k, v in trainer.model.state_dict().items())
    with pytest.raises(InputError, match="val_loader="):
        Trainer(net(), loaders()[0], config=CPU).evaluate()


def test_own_metrics_and_stateful_ones():
    class Worst:
        def reset(self):
            self.value = 0.0

        def update(self, output, labels):
            self.value = max(self.value, float(output.abs().max()))

        def compute(self):
            return self.value

    metrics = {"zero": lambda output, labels: 0.25, "worst": Worst()}
    trainer = Trainer(net(), *loaders(), config=CPU, metrics=metrics)
    values = trainer.evaluate()
    assert values["zero"] == 0.25
    assert values["worst"] == pytest.approx(float(trainer.predict(trainer.val_loader).abs().max()))
    assert Trainer(net(), *loaders(), config=CPU, metrics={}).evaluate().keys() == {"loss"}


def test_predictions_are_joined_on_the_cpu():
    trainer = Trainer(net(), *loaders(), config=CPU)
    out = trainer.predict(trainer.val_loader)
    assert out.shape == (32, 2)
    assert not out.requires_grad
    assert not out.is_inference()
    trainer.model.eval()
    torch.testing.assert_close(out, trainer.model(task(32, 1).tensors[0]).detach())
    half = Trainer(net(), *loaders(), config=TrainingConfig(device="cpu", precision="bf16")).predict(loaders()[1])
    assert half.dtype == torch.float32

    class Several(nn.Linear):
        def forward(self, x):
            y = super().forward(x)
            return {"logits": y, "parts": (y, y.sum()), "loss": None}

    made = Trainer(Several(4, 2), loaders()[0], config=CPU).predict(x for x, _ in loaders()[1])
    assert made["logits"].shape == (32, 2)
    assert [t.shape for t in made["parts"]] == [(32, 2), (4,)]
    with pytest.raises(InputError, match="cannot be joined"):
        Trainer(Grow(), loaders()[0], config=CPU).predict(loaders()[1])


class Grow(nn.Linear):
    def __init__(self):
        super().__init__(4, 2)
        self.n = 0

    def forward(self, x):
        self.n += 1
        return x.repeat(1, self.n)


def test_dict_batches_and_a_model_with_its_own_loss():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(7, 2)

        def forward(self, input_ids, attention_mask=None, labels=None):
            logits = (self.table(input_ids) * attention_mask[..., None]).mean(1)
            return {"loss": None if labels is None else F.cross_entropy(logits, labels), "logits": logits}

    ids = torch.randint(0, 7, (16, 5))
    rows = [{"input_ids": i, "attention_mask": torch.ones(5), "labels": int(i[0] > 3)} for i in ids]
    loader = DataLoader(rows, batch_size=4)
    trainer = Trainer(Own(), loader, loader, lr=0.1, config=TrainingConfig(device="cpu", micro_batch_size=2))
    report = trainer.train(epochs=3)
    assert any("the model's own loss" in note for note in report.notes)
    assert "val_accuracy" in trainer.history[-1]
    assert trainer.predict(loader)["logits"].shape == (16, 2)


def test_transformers_models_train():
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, num_labels=3
    )
    model = transformers.BertForSequenceClassification(config)
    rows = [
        {"input_ids": torch.randint(0, 20, (6,)), "attention_mask": torch.ones(6).long(), "labels": i % 3}
        for i in range(8)
    ]
    loader = DataLoader(rows, batch_size=4)
    trainer = Trainer(model, loader, loader, lr=1e-2, config=CPU)
    report = trainer.train(epochs=2)
    assert any("the model's own loss" in note for note in report.notes)
    assert set(trainer.history[-1]) >= {"val_loss", "val_accuracy"}
    assert trainer.predict(loader)["logits"].shape == (8, 3)


def test_export_takes_examples_from_the_loader_and_leaves_the_run(tmp_path, monkeypatch):
    trainer = Trainer(net(), *loaders(), config=CPU)
    got = {}

    def export(model, path, **options):
        got.update(options, path=path, training=model.training)
        return Report("export")

    monkeypatch.setattr(deploy, "export", export)
    order = trainer.train_loader.generator.get_state()
    trainer.export(tmp_path / "model.onnx", name="net")
    assert got["example_inputs"].shape == (8, 4)
    assert (got["name"], got["training"]) == ("net", False)
    assert trainer.model.training
    trainer.val_loader = None
    trainer.export(tmp_path / "model.onnx")
    assert torch.equal(order, trainer.train_loader.generator.get_state())
    trainer.export(tmp_path / "model.onnx", example_inputs="mine")
    assert got["example_inputs"] == "mine"


def test_export_writes_a_checked_onnx_file(tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    trainer = Trainer(net(), *loaders(), lr=1e-2, config=CPU)
    trainer.train(epochs=1)
    assert trainer.export(tmp_path / "model.onnx").ok
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    x = task(32, 1).tensors[0]
    (out,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(out), trainer.predict(trainer.val_loader), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("loader", "says"),
    [
        ([], "no batches"),
        (DataLoader(TensorDataset(torch.zeros(0, 4), torch.zeros(0))), "dataset is empty"),
        (DataLoader(task(3), batch_size=8, drop_last=True), "drop_last=True drops the only one.*3 samples"),
        ([(torch.zeros(4, 4), torch.zeros(3).long())], r"ragged.*\(4, 4\), \(3,\)"),
        ([(torch.zeros(4, 4), torch.zeros(4).long(), torch.zeros(4))], "3 parts"),
        (DataLoader([torch.zeros(i) for i in (2, 3)], batch_size=2), "batch 1 of epoch 1: RuntimeError: stack expects"),
        ((x for x in ()), "read only once"),
    ],
)
def test_bad_loaders_are_refused_clearly(loader, says):
    with pytest.raises(InputError, match=says):
        Trainer(nn.Linear(4, 2), loader, config=CPU).train(epochs=1)


def test_a_generator_runs_out_in_the_second_epoch():
    once = (batch for batch in loaders()[0])
    trainer = Trainer(net(), once, config=CPU)
    with pytest.raises(InputError, match="read only once"):
        trainer.train(epochs=2)
    assert trainer.epoch == 1


def test_a_failing_dataset_is_placed():
    class Bad(IterableDataset):
        def __iter__(self):
            yield torch.zeros(4), 0
            raise KeyError("row 1")

    trainer = Trainer(nn.Linear(4, 2), DataLoader(Bad(), batch_size=1), config=CPU)
    with pytest.raises(InputError, match="batch 2 of epoch 1: KeyError: 'row 1'"):
        trainer.train(epochs=1)
    with pytest.raises(ConfigError, match="no length"):
        Trainer(nn.Linear(4, 2), DataLoader(Bad()), config=TrainingConfig(device="cpu", schedule="cosine")).train()


@pytest.mark.parametrize("loader", [loaders()[0], list(loaders()[0])])
def test_a_micro_batch_beyond_the_loaders_batch_is_refused(loader):
    config = TrainingConfig(device="cpu", micro_batch_size=32)
    with pytest.raises(ConfigError, match=r"micro_batch_size=32.*batch of 16.*raise the loader's batch_size"):
        Trainer(net(), loader, config=config).train(epochs=1)


@pytest.mark.parametrize("epochs", [0, -1, 1.5, True, None])
def test_epochs_are_checked(epochs):
    with pytest.raises(ConfigError, match="epochs="):
        Trainer(net(), loaders()[0], config=CPU).train(epochs=epochs)


def test_arguments_of_the_wrong_kind_are_refused():
    with pytest.raises(InputError, match=r"an nn\.Module"):
        Trainer(lambda x: x, [])
    with pytest.raises(ConfigError, match="a TrainingConfig"):
        Trainer(net(), [], config={"lr": 1})


def test_the_bar_is_silent_without_a_terminal(capsys):
    Trainer(net(), *loaders(), config=CPU).train(epochs=1)
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""


def test_the_trainer_and_its_model_are_freed_at_once():
    import weakref

    trainer = Trainer(net(), *loaders(), config=CPU)
    trainer.train(epochs=1)
    seen = weakref.ref(trainer)
    assert sys.getrefcount(trainer) == 2
    del trainer
    assert seen() is None


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch.jit, within torch's own compiler
def test_compile_runs_the_compiled_model():
    model = nn.Linear(4, 2)
    trainer = Trainer(model, *loaders(), lr=1e-2, config=TrainingConfig(device="cpu", compile=True))
    report = trainer.train(epochs=2)
    assert report["train_loss"].after < report["train_loss"].before
    assert not any(note.startswith("compile") for note in report.notes)
    assert list(model.state_dict()) == ["weight", "bias"]


def test_compile_true_goes_through_torch_compile(monkeypatch):
    calls = []
    monkeypatch.setattr(torch, "compile", lambda model: lambda *a, **k: calls.append(1) or model(*a, **k))
    Trainer(net(), *loaders(), config=TrainingConfig(device="cpu", compile=True)).train(epochs=1)
    assert len(calls) == 4, "training steps only"


@pytest.mark.parametrize("size", [1, 3])
def test_a_batch_norm_with_one_sample_is_an_error_that_says_what_to_do(size):
    loader = DataLoader(task(2 * size + 1), batch_size=2) if size > 1 else DataLoader(task(4), batch_size=1)
    trainer = Trainer(net(), loader, config=CPU)
    with pytest.raises(InputError, match=r"batch of one sample.*drop_last=True.*larger batch"):
        trainer.train(epochs=1)
    assert trainer.step == (0 if size == 1 else 3), "the step of one sample alone"


def test_a_models_own_value_error_stays_what_it_is():
    class Picky(nn.Linear):
        def forward(self, x):
            raise ValueError("not these")

    with pytest.raises(ValueError, match=r"^not these$") as caught:
        Trainer(Picky(4, 2), loaders()[0], config=CPU).train(epochs=1)
    assert not isinstance(caught.value, InputError)


@pytest.mark.parametrize("loader", [5, None, task])
def test_a_loader_that_cannot_be_read_is_refused_at_once(loader):
    with pytest.raises(InputError, match=r"Trainer\(train_loader=.*a DataLoader, or another iterable"):
        Trainer(net(), loader)
    if loader is not None:
        with pytest.raises(InputError, match=r"Trainer\(val_loader="):
            Trainer(net(), [], loader)


def test_a_resumed_run_says_what_was_given_in_vain(tmp_path):
    def make(lr, batch):
        config = TrainingConfig(device="cpu", precision="fp32", save_dir=tmp_path)
        return Trainer(nn.Linear(4, 2), DataLoader(task(), batch_size=batch), lr=lr, config=config)

    make(1e-2, 16).train(epochs=1)
    for lr, batch, said in (
        (1e-2, 16, ""),
        (0.5, 16, "lr: 0.01 as the run began with, not 0.5"),
        (1e-2, 8, "was 16, is 8"),
    ):
        trainer = make(lr, batch)
        trainer.resume(tmp_path / "step-00000004")
        notes = "\n".join(trainer.train(epochs=1).notes)
        assert said in notes
        assert ("lr: " in notes, "batch size (" in notes) == (lr != 1e-2, batch != 16)
    trainer = make(1e-2, 16)
    trainer.resume()
    report = trainer.train(epochs=1)
    assert [n for n in report.notes if n.startswith("no step was taken: the run has its 1 epoch")]
    assert not [n for n in report.notes if n.startswith("loss")]
