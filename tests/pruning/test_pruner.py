"""`R1Pruner` from end to end: how much leaves, by what it is judged, how it recovers, and what is said of it."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

import deepseek_r1 as dr1
from deepseek_r1.core import Budget, CheckFailedError, ConfigError, InputError
from deepseek_r1.models import DigitsNet
from deepseek_r1.pruning import PruneConfig, R1Pruner, load_pruned, plan_in, save_pruned
from deepseek_r1.pruning._importance import Importance, taylor_scores
from deepseek_r1.pruning._recover import reestimate_
from deepseek_r1.pruning._structure import Group, structure_of

from .nets import IDS, IMAGE, Proportional, Sized, Tied, inverted, residual


@pytest.fixture(scope="module")
def digits():
    return dr1.data.digits(batch_size=64)


@pytest.fixture(scope="module")
def trained(digits):
    dr1.seed_everything(0)
    model = DigitsNet(width=12)
    dr1.Trainer(model, digits.train, lr=5e-3, config=dr1.TrainingConfig(threads=1)).train(epochs=4)
    # Where there is a GPU, the Trainer moved it there.
    return model.cpu()


def _count(model):
    return sum(p.numel() for p in model.parameters())


def test_the_share_of_parameters_is_met_and_the_module_left_alone(trained, quick):
    before = copy.deepcopy(trained.state_dict())
    small = R1Pruner(trained, sparsity=0.4, config=quick).compress()
    assert type(small) is DigitsNet
    assert 0.4 <= 1 - _count(small) / _count(trained) < 0.45
    assert small.pruning["parameters"].after == _count(small)
    assert all(torch.equal(v, before[k]) for k, v in trained.state_dict().items())
    assert small.stem[0].out_channels == small.pruning["channels of stem.0"].after


def test_without_data_it_is_magnitude_and_said(quick):
    small = R1Pruner(inverted(), config=quick).compress()
    assert any("there are no data" in note for note in small.pruning.notes)
    assert any("random numbers that fit its first layer" in note for note in small.pruning.notes)
    assert small.pruning.facts["sparsity"] >= 0.3


def test_data_judge_better_than_magnitude(trained, digits, quick):
    config = replace(quick, samples=128, batch_norm_batches=0)
    taylor = R1Pruner(trained, sparsity=0.4, dataset=digits.train, config=config).compress(val_loader=digits.val)
    plain = R1Pruner(trained, sparsity=0.4, config=config).compress(val_loader=digits.val)
    loss = "validation loss"
    assert taylor.pruning[loss].after < plain.pruning[loss].after
    assert any("cross entropy" in note for note in taylor.pruning.notes)


def test_training_recovers(trained, digits, quick):
    small = R1Pruner(trained, sparsity=0.6, config=replace(quick, rounds=3)).compress(
        digits.train, digits.val, epochs=3, lr=3e-3
    )
    report = small.pruning
    assert _count(small) <= 0.4 * _count(trained)
    assert report["validation accuracy"].after > report["validation accuracy"].before - 0.05
    assert len(report.sections) == 3, "three rounds, each with its training"
    assert report.ok


def test_batch_statistics_are_those_of_the_data(digits):
    model = residual()
    batches = [torch.randn(16, 3, 8, 8) for _ in range(4)]
    few = model[1].n1.running_mean.clone()
    assert reestimate_(model, batches, 3) == 48
    assert torch.equal(model[1].n1.running_mean, few), "too few samples change nothing"
    assert reestimate_(model, batches, 3, least=10) == 48
    inside = model[1].a(model[0](torch.cat(batches[:3])))
    torch.testing.assert_close(model[1].n1.running_mean, inside.mean((0, 2, 3)), rtol=1e-3, atol=1e-4)
    assert model[1].n1.momentum == 0.1
    assert model[1].n1.training


@pytest.mark.parametrize("distance", ["output", "kl"])
def test_without_labels(distance, trained, digits, quick):
    batches = [images for images, _ in digits.train]
    small = R1Pruner(trained, dataset=batches, config=replace(quick, distance=distance)).compress()
    assert any("float model" in note for note in small.pruning.notes)


def test_predictions_are_what_the_loss_does():
    # One linear layer behind the channels and a squared error: half the mean square is exact there.
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.Linear(8, 3)).double()
    inputs = torch.randn(400, 5).double()
    with torch.no_grad():
        noise = torch.randn(400, 3).double()
        labels = model(inputs) + noise
    batches = [(inputs, labels)]
    config = PruneConfig(samples=400, micro_batch=1)
    structure = structure_of(model, inputs[:2])
    found, name = taylor_scores(model, structure, batches, config)
    assert name == "mean squared error"
    (group,) = structure.groups
    model.requires_grad_(False)
    hidden = model[0](inputs)
    for i, unit in enumerate(group.units):
        change = -hidden[:, i : i + 1] * model[1].weight[:, i]
        gradient = -2 / 3 * noise
        wanted = ((gradient * change).sum(1) ** 2).mean() / 2
        assert found.scores[unit] == pytest.approx(float(wanted), rel=1e-6)
    pair = (found.together[group.name][0, 1] + found.together[group.name][1, 0]).item()
    both = ((-2 / 3 * noise * -(hidden[:, :2] @ model[1].weight[:, :2].T)).sum(1) ** 2).mean() / 2
    assert found.scores[group.units[:2]].sum() + pair == pytest.approx(float(both), rel=1e-6)


def test_errors_of_one_sign_add_up():
    group = Group(name="g", units=np.arange(3), members=(("w", 0, 1),))
    together = np.array([[1.0, 1.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 2.0]])
    order, losses = Importance(scores=np.array([1.0, 1.0, 2.0]), together={"g": together}).leaving(group)
    # The twin of the first costs three more, so the larger but independent one goes first.
    assert order.tolist() == [0, 2, 1]
    assert losses.tolist() == [1.0, 3.0, 6.0]


def test_curves_fall(trained, digits, quick):
    curves = R1Pruner(trained, dataset=digits.train, config=replace(quick, channel_step=4)).curves()
    assert {c.name for c in curves} == {
        "stem.0",
        "blocks.0.conv1",
        "blocks.1.conv1",
        "blocks.1.conv2",
        "blocks.2.conv1",
    }
    for curve in curves:
        kept, losses = [p.kept for p in curve.points], [p.loss for p in curve.points]
        assert kept == sorted(kept, reverse=True)
        assert losses == sorted(losses)
        assert (curve.points[0].loss, curve.points[0].parameters) == (0.0, _count(trained))
        assert [p.parameters for p in curve.points] == sorted((p.parameters for p in curve.points), reverse=True)
        assert all(p.ms is None for p in curve.points)


def test_curves_can_be_measured(quick):
    model = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 4))
    (curve,) = R1Pruner(model, config=replace(quick, channel_step=8)).curves(latency=True)
    assert [p.kept for p in curve.points if p.ms is not None] == [64, 48, 24, 8]


def test_sizes_in_bytes(trained, quick):
    small = R1Pruner(trained, budget=Budget(size_mb=0.05), config=quick).compress()
    assert small.pruning["size"].after <= 0.05
    assert sum(t.numel() * t.element_size() for t in small.state_dict().values()) <= 50_000


def test_latency_is_measured_and_said(trained):
    config = PruneConfig(channel_step=4, timing_rounds=6)
    report = R1Pruner(trained, config=config).compress().pruning
    assert report["latency"].before > 0
    assert "times as fast" in report["latency"].how
    assert any(check.name == "not slower than before" for check in report.checks)


def test_a_budget_that_is_met_already_changes_nothing(quick):
    model = residual()
    small = R1Pruner(model, budget=Budget(latency_ms=1e6), example_inputs=IMAGE, config=quick).compress()
    assert _count(small) == _count(model)
    assert any("nothing had to leave" in note for note in small.pruning.notes)


def test_a_latency_is_searched_for(monkeypatch, quick):
    from deepseek_r1.pruning import _compress

    # A clock that counts parameters: what is measured on a busy machine proves nothing.
    def clock(modules, example, **how):
        return {n: type("Latency", (), {"median_ms": _count(m) / 1000})() for n, m in modules.items()}

    monkeypatch.setattr(_compress, "timed", clock)
    model = residual()
    limit = 0.7 * _count(model) / 1000
    small = R1Pruner(model, budget=Budget(latency_ms=limit), example_inputs=IMAGE, config=quick).compress()
    assert 0.9 * limit < _count(small) / 1000 <= limit


def test_few_samples_estimate_no_statistics(quick):
    model = residual()
    batches = [torch.randn(8, 3, 8, 8)]
    small = R1Pruner(model, dataset=batches, config=quick).compress()
    assert ("batch statistics", "8 samples are too few to estimate them anew") in small.pruning.skipped


def test_a_model_from_an_onnx_file(tmp_path, quick):
    dr1.deploy.export(residual().eval(), tmp_path / "m.onnx", example_inputs=IMAGE)
    model = dr1.load_model(str(tmp_path / "m.onnx"))
    small = R1Pruner(model, example_inputs=IMAGE, config=quick).compress()
    assert small.pruning.facts["sparsity"] >= 0.3


def test_accuracy_alone_goes_as_far_as_it_may(trained, digits, quick):
    small = R1Pruner(trained, dataset=digits.train, budget=Budget(accuracy_drop=0.3), config=quick).compress(
        val_loader=digits.val
    )
    rows = small.pruning["validation accuracy"]
    assert rows.before - rows.after <= 0.3
    assert _count(small) < _count(trained)


def test_it_goes_on_where_pruning_ended(trained, digits, quick):
    once = R1Pruner(trained, sparsity=0.3, config=quick).compress()
    twice = R1Pruner(once, sparsity=0.3, config=quick).compress()
    assert _count(twice) <= 0.5 * _count(trained)
    int8 = dr1.quantize(twice, dataset=digits.train)
    assert int8.precision == "int8"
    # Weights of 4 bits lie in groups along the inputs, which have to divide.
    wide = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64))
    small = R1Pruner(wide, config=replace(quick, channel_step=64)).compress()
    assert isinstance(dr1.quantize(small, bits=4)[2], dr1.nn.QuantizedLinear)


def test_a_file_has_the_plan(tmp_path, trained, digits, quick):
    small = R1Pruner(trained, sparsity=0.5, config=quick).compress(digits.train, epochs=2)
    path = save_pruned(small, tmp_path / "small.safetensors")
    again = load_pruned(DigitsNet(width=12), path).eval()
    x = torch.randn(3, 1, 8, 8)
    assert torch.equal(again(x), small.eval()(x))
    assert plan_in(path).to_dict() == small.pruning_plan.to_dict()
    with pytest.raises(InputError, match="another module"):
        load_pruned(residual(), path)
    with pytest.raises(InputError, match="pruned already"):
        load_pruned(small, path)
    with pytest.raises(InputError, match="R1Pruner"):
        save_pruned(DigitsNet(), tmp_path / "x.safetensors")


def test_names_in_both_packages():
    import deepseek

    assert dr1.R1Pruner is deepseek.R1Pruner is R1Pruner


# Bad input.


@pytest.mark.parametrize("sparsity", [0, 1, -0.1, 1.5, float("nan"), True, "0.3", 30])
def test_a_sparsity_that_is_no_share(sparsity):
    with pytest.raises(ConfigError, match="above 0 and below 1"):
        R1Pruner(residual(), sparsity=sparsity)


def test_weights_that_are_not_finite(quick):
    model = residual()
    with torch.no_grad():
        model[1].a.weight[0, 0, 0, 0] = float("nan")
    with pytest.raises(InputError, match=r"1\.a\.weight.*not finite"):
        R1Pruner(model, config=quick).compress()


def test_nothing_to_prune(quick):
    with pytest.raises(InputError, match=r"nothing in Linear can be pruned.*output of the model"):
        R1Pruner(nn.Linear(4, 3), config=quick).compress()


@pytest.mark.parametrize("budget", [Budget(size_mb=1e-4), Budget(latency_ms=1e-6)])
def test_an_impossible_budget_names_the_best(budget, quick):
    with pytest.raises(CheckFailedError, match=r"the best that can be reached is [\d.,]+ (bytes|ms)") as caught:
        R1Pruner(residual(), budget=budget, config=quick).compress()
    assert caught.value.report.failed


def test_an_accuracy_that_cannot_be_held(trained, digits, quick):
    config = replace(quick, importance="magnitude", batch_norm_batches=0)
    budget = Budget(accuracy_drop=0.001)
    with pytest.raises(CheckFailedError, match="accuracy_drop"):
        R1Pruner(trained, sparsity=0.8, budget=budget, config=config).compress(val_loader=digits.val)


def test_accuracy_needs_data(quick):
    with pytest.raises(InputError, match="val_loader"):
        R1Pruner(residual(), budget=Budget(accuracy_drop=0.01), config=quick).compress()


def test_tied_weights_count_once(quick):
    small = R1Pruner(Tied(), sparsity=0.4, example_inputs=IDS, config=quick).compress()
    assert small.head.weight is small.embed.weight
    assert small.pruning["parameters"].after == _count(small)


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([torch.randn(4, 5, 8, 8)], "fails on the example inputs"),
        ([torch.full((4, 3, 8, 8), float("nan"))], "not finite"),
        ([], "is empty"),
    ],
)
def test_data_that_do_not_fit(batches, message, quick):
    pruner = R1Pruner(residual(), dataset=batches, example_inputs=None if "example" in message else IMAGE, config=quick)
    with pytest.raises(InputError, match=message):
        pruner.compress()


def test_later_batches_of_another_shape(quick):
    pruner = R1Pruner(residual(), dataset=[torch.randn(2, 3, 8, 8), torch.randn(2, 4, 8, 8)], config=quick)
    with pytest.raises(InputError, match=r"inputs of shapes \[\(2, 4, 8, 8\)\]"):
        pruner.compress()


def test_no_inputs_can_be_found(quick):
    with pytest.raises(InputError, match="example_inputs="):
        R1Pruner(nn.Bilinear(3, 4, 5), config=quick).compress()


def test_things_that_are_no_module():
    program = dr1.capture(residual(), IMAGE)
    with pytest.raises(InputError, match="prune the module it came from"):
        R1Pruner(program)
    with pytest.raises(ConfigError, match="memory_gb"):
        R1Pruner(residual(), budget=Budget(memory_gb=1))


def test_importance_by_data_without_data(quick):
    with pytest.raises(InputError, match="needs data"):
        R1Pruner(residual(), config=replace(quick, importance="taylor")).compress()


@pytest.mark.parametrize(
    "field",
    [
        {"importance": "hessian"}, {"distance": "l2"}, {"currency": "bytes"}, {"samples": 0}, {"micro_batch": True},
        {"channel_step": 0}, {"keep_at_least": 0}, {"rounds": "many"}, {"skip": "head"}, {"temperature": 0},
        {"distillation": 2}, {"batch_norm_batches": -1}, {"training": {}}, {"timing_rounds": -1},
    ],
)  # fmt: skip
def test_config_fields_are_checked(field):
    (name,) = field
    with pytest.raises(ConfigError, match=name):
        PruneConfig(**field)


def test_epochs_are_checked(quick):
    with pytest.raises(ConfigError, match="epochs"):
        R1Pruner(Sized(), config=quick, example_inputs=torch.randn(2, 6)).compress(epochs=0)


def test_code_that_holds_in_proportion_only_keeps_its_groups():
    """Halved together, width and heads fit each other; cut as their importance says, they do not."""
    torch.manual_seed(0)
    x = torch.randn(3, 5, 6)
    pruner = R1Pruner(Proportional(), 0.2, example_inputs=(x,), config=PruneConfig(channel_step=4, timing_rounds=0))
    small = pruner.compress()
    assert small.up.out_features < 48
    assert small.q.out_features == small.first.out_features == 32
    held = " ".join(why for _, why in small.pruning.skipped)
    assert "does not follow" in held
    assert small(x).shape == (3, 5, 3)


def test_numbers_of_units_can_be_given():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 20), nn.ReLU(), nn.Linear(20, 4))
    curves = R1Pruner(net, config=PruneConfig(channel_step=4)).curves()
    assert {("0.weight", 0, 1), ("2.weight", 1, 1)} <= set(curves[0].members)
    small = R1Pruner(net, keep={"0": 17}, config=PruneConfig(channel_step=4, timing_rounds=0)).compress()
    assert [m.out_features for m in small if isinstance(m, nn.Linear)] == [17, 20, 4]
    for keep, match in (({"1": 3}, "0: 32, 2: 20"), ({"0": 33}, "0: 32"), ({"0": 0}, ">= 1"), ({}, "at least one")):
        with pytest.raises((ConfigError, InputError), match=match):
            R1Pruner(net, keep=keep).compress()
    with pytest.raises(ConfigError, match="neither sparsity nor budget"):
        R1Pruner(net, 0.3, keep={"0": 8})
