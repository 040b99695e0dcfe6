"""Elastic weight consolidation: the penalty against its definition, digits learnt in two parts, files, the Trainer."""

from __future__ import annotations

import shutil

import pytest
import torch
from torch import nn

from deepseek_r1.core import ArtifactError, ConfigError, InputError
from deepseek_r1.data import DSDataLoader, digits
from deepseek_r1.train import ElasticWeightConsolidation, Trainer, TrainingConfig
from deepseek_r1.train import _trainer as trainer_module


def net(dropout=0.0):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Dropout(dropout), nn.Linear(6, 3)).double()


def batch(n, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, 4, generator=g, dtype=torch.float64), torch.randint(0, 3, (n,), generator=g)


def moved(model, seed=1):
    torch.manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model


def test_the_penalty_is_its_definition():
    model, (x, y) = net(dropout=0.5), batch(10)
    penalty = ElasticWeightConsolidation(model, [(x[:6], y[:6]), (x[6:], y[6:])], strength=7.0)
    assert penalty.samples == 10
    assert model.training
    old = [p.detach().clone() for p in model.parameters()]
    fisher = [torch.zeros_like(p) for p in old]
    model.eval()
    for i in range(10):
        grads = torch.autograd.grad(nn.functional.cross_entropy(model(x[i : i + 1]), y[i : i + 1]), model.parameters())
        fisher = [f + g.square() / 10 for f, g in zip(fisher, grads)]
    moved(model)
    value = penalty(model)
    expected = 3.5 * sum((f * (p - o).square()).sum().item() for f, p, o in zip(fisher, model.parameters(), old))
    assert value.item() == pytest.approx(expected, rel=1e-9)
    value.backward()
    for f, p, o in zip(fisher, model.parameters(), old):
        torch.testing.assert_close(p.grad, 7.0 * f * (p.detach() - o), rtol=1e-9, atol=1e-12)


def test_batches_can_be_squared_as_a_whole():
    """Where labels follow the model's own probabilities the mean gradient is zero, and both estimate one number."""
    model, (x, _) = net(), batch(4000)
    torch.manual_seed(0)
    y = torch.multinomial(model(x).detach().softmax(1), 1).squeeze(1)
    loader = [(x[i : i + 20], y[i : i + 20]) for i in range(0, 4000, 20)]
    exact = ElasticWeightConsolidation(model, loader, max_samples=1010)
    rough = ElasticWeightConsolidation(model, loader, per_sample=False)
    assert (exact.samples, rough.samples) == (1010, 4000)
    sums = [sum(f.sum().item() for f in penalty.fisher.values()) for penalty in (exact, rough)]
    assert sums[1] == pytest.approx(sums[0], rel=0.15)
    ones = [(x[i : i + 1], y[i : i + 1]) for i in range(50)]
    one, same = (ElasticWeightConsolidation(model, ones, per_sample=flag) for flag in (False, True))
    assert all(torch.equal(one.fisher[k], same.fisher[k]) for k in one.fisher)


def test_it_goes_through_a_file(tmp_path):
    model, data = net(), [batch(8)]
    penalty = ElasticWeightConsolidation(model, data, strength=3.0)
    path = penalty.save(tmp_path / "old.safetensors")
    moved(model)
    loaded = ElasticWeightConsolidation.load(path)
    assert torch.equal(loaded(model), penalty(model))
    assert loaded.samples == 8
    assert ElasticWeightConsolidation.load(path, strength=6.0)(model).item() == pytest.approx(2 * penalty(model).item())
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ArtifactError, match=r"old\.safetensors"):
        ElasticWeightConsolidation.load(path)
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(1)}, path)
    with pytest.raises(ArtifactError, match=r"old\.safetensors"):
        ElasticWeightConsolidation.load(path)


@pytest.mark.parametrize(("steps", "micro"), [(1, None), (2, None), (1, 3)])
def test_the_trainer_adds_penalties_once_a_step(steps, micro):
    """Whatever the micro-batches: the step's loss is the mean loss and the penalty."""

    def trained(penalties, loss=None):
        model = net()
        data = [batch(6, seed) for seed in range(4)]
        config = TrainingConfig(gradient_accumulation_steps=steps, micro_batch_size=micro, log_every=1)
        sgd = torch.optim.SGD(model.parameters(), lr=0.1)
        trainer = Trainer(model, data, data, loss=loss, config=config, optimizer=sgd, penalties=penalties)
        trainer.train(epochs=1)
        return trainer

    def small(model):
        return 0.5 * sum(p.square().sum() for p in model.parameters())

    ours = trained([small])
    model = net()
    with_decay = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=1.0)
    expected = Trainer(
        model, [batch(6, seed) for seed in range(4)], optimizer=with_decay,
        config=TrainingConfig(gradient_accumulation_steps=steps),
    )  # fmt: skip
    expected.train(epochs=1)
    for p, q in zip(ours.model.parameters(), model.parameters()):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-9)
    first = small(net()).item()
    assert ours.losses[0][1] == pytest.approx(first + trained([]).losses[0][1], rel=1e-9)
    assert ours.evaluate()["loss"] == Trainer(ours.model, [batch(6)], ours.val_loader).evaluate()["loss"]


def test_misuse_is_named():
    model, data = net(), [batch(4)]
    for options, says in (
        ({"strength": -1}, "strength"),
        ({"strength": True}, "strength"),
        ({"max_samples": 0}, "max"),
    ):
        with pytest.raises(ConfigError, match=says):
            ElasticWeightConsolidation(model, data, **options)
    with pytest.raises(InputError, match="no batches"):
        ElasticWeightConsolidation(model, [])
    with pytest.raises(InputError, match="requires_grad"):
        ElasticWeightConsolidation(net().requires_grad_(False), data)
    with pytest.raises(InputError, match="not finite"):
        ElasticWeightConsolidation(model, [(torch.full((2, 4), torch.inf).double(), torch.tensor([0, 1]))])
    penalty = ElasticWeightConsolidation(model, data)
    with pytest.raises(InputError, match=r"0\.weight"):
        penalty(nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Dropout(), nn.Linear(6, 3)))
    with pytest.raises(InputError, match="not there"):
        penalty(nn.Linear(4, 6))
    with pytest.raises(InputError, match="penalties has 3"):
        Trainer(model, data, penalties=[3])
    with pytest.raises(InputError, match="scalar"):
        Trainer(model, data, penalties=[lambda m: 1.0]).train(epochs=1)


def decay(model):
    return 1e-3 * sum(p.square().sum() for p in model.parameters())


def run_with(folder, old, penalties=None, **options):
    model = net(dropout=0.2)
    ewc = ElasticWeightConsolidation(model, [batch(8, old)], **{"strength": 300.0, **options})
    config = TrainingConfig(
        device="cpu", seed=1, threads=1, log_every=1, save_every_steps=1, keep_last=None, save_dir=str(folder)
    )
    given = [ewc, decay] if penalties is None else penalties
    trainer = Trainer(model, [batch(6, seed) for seed in range(4)], lr=1e-2, config=config, penalties=given)
    return trainer, ewc


def test_a_resumed_run_has_the_same_penalty_to_the_bit(tmp_path):
    whole, old = run_with(tmp_path / "a", 5)
    whole.train(epochs=2)
    for step in (1, 4, 6):
        resumed, other = run_with(tmp_path / "b", 6, strength=3.0)
        assert not all(torch.equal(other.fisher[k], v) for k, v in old.fisher.items())
        resumed.resume(tmp_path / "a" / f"step-{step:08d}")
        assert (other.strength, other.samples) == (300.0, 8)
        assert all(torch.equal(other.fisher[k], v) for k, v in old.fisher.items())
        assert all(torch.equal(other.anchors[k], v) for k, v in old.anchors.items())
        resumed.train(epochs=2)
        assert resumed.losses == whole.losses
        assert all(torch.equal(p, q) for p, q in zip(resumed.model.parameters(), whole.model.parameters()))
        for path in (tmp_path / "b").glob("step-*"):
            shutil.rmtree(path)


def test_another_list_of_penalties_is_refused(tmp_path):
    run_with(tmp_path / "a", 5)[0].train(epochs=1)
    for penalties in ([], [decay], [decay, decay]):
        trainer, _ = run_with(tmp_path / "a", 5, penalties)
        before = [p.detach().clone() for p in trainer.model.parameters()]
        says = r"step-00000004 is of a run with the penalties \['ElasticWeightConsolidation', 'decay'\]"
        with pytest.raises(InputError, match=says):
            trainer.resume()
        assert all(torch.equal(p, q) for p, q in zip(trainer.model.parameters(), before))


def test_a_checkpoint_that_says_nothing_of_penalties_is_read(tmp_path, monkeypatch):
    """As releases before wrote them."""
    real = trainer_module.take
    monkeypatch.setattr(trainer_module, "take", lambda t: {k: v for k, v in real(t).items() if k != "penalties"})
    whole, _ = run_with(tmp_path / "a", 5)
    whole.train(epochs=2)
    resumed, _ = run_with(tmp_path / "b", 5)
    resumed.resume(tmp_path / "a" / "step-00000003")
    resumed.train(epochs=2)
    assert resumed.losses == whole.losses


def part(split, low, high, batch_size=32):
    x, y = digits().tensors(split)
    x, y = torch.as_tensor(x), torch.as_tensor(y)
    kept = (y >= low) & (y < high)
    data = torch.utils.data.TensorDataset(x[kept], y[kept])
    return DSDataLoader(data, batch_size=batch_size, shuffle=split == "train", seed=0)


def test_digits_learnt_later_cost_fewer_of_those_learnt_before():
    """0 to 4, then 5 to 9: with the penalty the first five are kept far better, and the others are learnt."""

    def model():
        torch.manual_seed(0)
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))

    first = model()
    Trainer(first, part("train", 0, 5), lr=3e-3).train(epochs=6)
    at_first = Trainer(first, part("train", 0, 5)).evaluate(part("test", 0, 5))["accuracy"]
    assert at_first > 0.95
    penalty = ElasticWeightConsolidation(first, part("train", 0, 5), strength=1000.0, max_samples=300)
    results = {}
    for name, penalties in (("without", []), ("with", [penalty])):
        second = model()
        second.load_state_dict(first.state_dict())
        trainer = Trainer(second, part("train", 5, 10), lr=1e-3, penalties=penalties)
        trainer.train(epochs=8)
        results[name] = [trainer.evaluate(part("test", *r))["accuracy"] for r in ((0, 5), (5, 10))]
    assert results["with"][0] > results["without"][0] + 0.4, results
    assert results["with"][1] > 0.7, results
