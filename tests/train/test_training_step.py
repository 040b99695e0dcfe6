"""The step: accumulation equals the whole batch, clipping, scaling, optimizers, schedules."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from deepseek_r1.core import ConfigError, InputError
from deepseek_r1.train import Callback, Objective, Trainer, TrainingConfig, decay_groups, lr_factor, train_step
from deepseek_r1.train._optim import make_optimizer

pytestmark = pytest.mark.tiny


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)).double()


def batch(n, seed=1):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, 4, generator=g, dtype=torch.float64), torch.randint(0, 3, (n,), generator=g)


def gradients(batches, **options):
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    result = train_step(model, batches, optimizer, Objective(model), **options)
    return [p.grad for p in model.parameters()], result


@settings(deadline=None, max_examples=25)
@given(sizes=st.lists(st.integers(1, 7), min_size=1, max_size=4), micro=st.none() | st.integers(1, 7))
def test_any_split_gives_the_gradients_of_the_whole(sizes, micro):
    x, y = batch(sum(sizes))
    whole, expected = gradients([(x, y)])
    parts = list(zip(x.split(sizes), y.split(sizes)))
    split, result = gradients(parts, micro_batch_size=micro)
    assert result.samples == expected.samples == sum(sizes)
    assert result.loss.item() == pytest.approx(expected.loss.item(), abs=1e-12)
    for a, b in zip(whole, split):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_one_batch_is_the_plain_loop_to_the_bit():
    x, y = (t.float() if t.is_floating_point() else t for t in batch(6))
    ours, plain = net().float(), net().float()
    a, b = (torch.optim.AdamW(m.parameters(), lr=1e-2) for m in (ours, plain))
    objective = Objective(ours)
    for _ in range(3):
        result = train_step(ours, [(x, y)], a, objective)
        b.zero_grad()
        loss = nn.functional.cross_entropy(plain(x), y)
        loss.backward()
        b.step()
        assert torch.equal(result.loss, loss.detach())
    assert all(torch.equal(p, q) for p, q in zip(ours.parameters(), plain.parameters()))


def test_gradients_are_clipped_together():
    plain, _ = gradients([batch(6)])
    norm = math.sqrt(sum(float(g.square().sum()) for g in plain))
    clipped, _ = gradients([batch(6)], clip_grad_norm=norm / 2)
    for a, b in zip(plain, clipped):
        torch.testing.assert_close(a / 2, b, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("clip", [None, 1.0])
def test_a_bad_step_changes_nothing(clip):
    model = net()
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1.0)
    x, y = batch(4)
    x[0, 0] = math.inf
    result = train_step(model, [(x, y)], optimizer, Objective(model), clip_grad_norm=clip)
    assert result.bad is True
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before))
    assert not optimizer.state


def test_a_bad_gradient_behind_a_finite_loss_is_seen():
    model = nn.Linear(4, 1, bias=False)
    nn.init.zeros_(model.weight)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    objective = Objective(model, lambda output, _: output.abs().sqrt().mean())
    result = train_step(model, [torch.ones(2, 4)], optimizer, objective)
    assert torch.isfinite(result.loss)
    assert result.bad is True
    assert torch.equal(model.weight, torch.zeros(1, 4))


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precisions_run_on_a_cpu(precision):
    model = net().float()
    x, y = batch(8)
    seen = []
    model[0].register_forward_hook(lambda m, i, o: seen.append(o.dtype))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=128.0) if precision == "fp16" else None
    objective = Objective(model)
    losses = [
        float(train_step(model, [(x.float(), y)], optimizer, objective, precision=precision, scaler=scaler).loss)
        for _ in range(20)
    ]
    assert set(seen) == {torch.bfloat16 if precision == "bf16" else torch.float16}
    assert losses[-1] < losses[0]
    assert model[0].weight.dtype == torch.float32


def test_fp16_overflow_skips_the_step_and_lowers_the_scale():
    model = net().float()
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    x, y = batch(8)
    result = train_step(model, [(x.float(), y)], optimizer, Objective(model), precision="fp16", scaler=scaler)
    assert result.bad is False, "an overflow of the scaled gradients is no error"
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before))
    assert scaler.get_scale() == 2.0**39


def test_decay_leaves_out_biases_and_norms():
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(2, 2))
    model[3].bias.requires_grad_(False)
    decayed, plain = decay_groups(model, 0.1)
    assert {id(p) for p in decayed["params"]} == {id(model[0].weight), id(model[3].weight)}
    assert {id(p) for p in plain["params"]} == {id(model[0].bias), id(model[1].weight), id(model[1].bias)}
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.1, 0.0)


def test_forms_of_an_optimizer():
    model, config = nn.Linear(2, 2), TrainingConfig()
    assert isinstance(make_optimizer(model, 1e-3, config, None)[0], torch.optim.AdamW)
    assert make_optimizer(model, 0.5, config, torch.optim.SGD)[0].param_groups[0]["lr"] == 0.5
    own = torch.optim.SGD(model.parameters(), lr=0.25)
    assert make_optimizer(model, 0.5, config, own)[0] is own
    made = make_optimizer(model, 0.5, config, lambda params: torch.optim.Adam(params, lr=0.125))[0]
    assert made.param_groups[0]["lr"] == 0.125


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        ({"lr": 0}, ConfigError, "lr=0"),
        ({"lr": "fast"}, ConfigError, "> 0"),
        ({"given": "adam"}, ConfigError, "Did you mean 'adamw'"),
        ({"given": lambda params: None}, InputError, "an optimizer, its class"),
        ({"given": torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=1)}, InputError, "none of the model's"),
        ({"given": lambda params: torch.optim.LBFGS(params)}, InputError, "LBFGS"),
        ({"model": nn.Linear(1, 1).requires_grad_(False)}, InputError, "nothing can be trained"),
    ],
)
def test_what_is_no_optimizer_is_refused(arguments, error, says):
    full = {"model": nn.Linear(2, 2), "lr": 1e-3, "config": TrainingConfig(), "given": None, **arguments}
    with pytest.raises(error, match=says):
        make_optimizer(full["model"], full["lr"], full["config"], full["given"])


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
@pytest.mark.parametrize("warmup", [0, 3, 0.3])
def test_schedules_climb_then_fall_to_zero(schedule, warmup):
    factors = [lr_factor(step, 10, schedule, warmup) for step in range(11)]
    climb = 3 if warmup else 0
    assert factors[:climb] == pytest.approx([1 / 3, 2 / 3, 1.0][:climb])
    assert factors[climb] == 1.0
    tail = factors[climb:]
    assert tail == sorted(tail, reverse=True)
    assert factors[-1] == pytest.approx(1.0 if schedule == "constant" else 0.0)
    if schedule == "cosine" and not warmup:
        assert factors[5] == pytest.approx(0.5)


def test_a_schedule_without_a_length_is_refused():
    assert lr_factor(1, None, "constant", 4) == 0.5
    for schedule, warmup in (("cosine", 0), ("constant", 0.1)):
        with pytest.raises(ConfigError, match="no length"):
            lr_factor(0, None, schedule, warmup)


@settings(deadline=None, max_examples=60)
@given(
    total=st.integers(1, 200),
    warmup=st.integers(0, 30) | st.floats(0, 0.5, exclude_max=True),
    cooldown=st.integers(0, 300) | st.floats(0, 1, exclude_max=True),
)
def test_wsd_climbs_stays_and_falls(total, warmup, cooldown):
    factors = [lr_factor(step, total, "wsd", warmup, cooldown=cooldown) for step in range(total)]
    assert all(0 < f <= 1 for f in factors)
    climb = min(total, round(warmup * total) if isinstance(warmup, float) else warmup)
    fall = round(cooldown * total) if isinstance(cooldown, float) else cooldown
    fall = min(fall, total - climb)
    assert factors[:climb] == sorted(factors[:climb])
    assert all(f == 1.0 for f in factors[climb : total - fall + (fall > 0)])
    tail = factors[total - fall :] if fall else []
    assert tail == sorted(tail, reverse=True)
    assert all(f == pytest.approx(1 - math.sqrt(i / fall)) for i, f in enumerate(tail))


@settings(deadline=None, max_examples=60)
@given(total=st.integers(1, 300), stages=st.integers(1, 12), factor=st.sampled_from([0.8, 0.5, 1.0]))
def test_staged_steps_down_at_equal_parts(total, stages, factor):
    factors = [lr_factor(step, total, "staged", 0, stages=stages, stage_factor=factor) for step in range(total)]
    assert factors[0] == 1.0
    assert factors == sorted(factors, reverse=True)
    if factor < 1 and total >= stages:
        counts = [factors.count(f) for f in sorted(set(factors), reverse=True)]
        assert len(counts) == stages
        assert max(counts) - min(counts) <= 1
        assert factors[-1] == pytest.approx(factor ** (stages - 1))


def test_the_trainer_follows_the_new_schedules():
    seen = []

    class Rates(Callback):
        def on_step_end(self, trainer):
            seen.append(trainer.optimizer.param_groups[0]["lr"])

    data = [batch(4, seed) for seed in range(6)]
    Trainer(net(), data, lr=1e-5, config=TrainingConfig(schedule="staged"), callbacks=[Rates()]).train(epochs=1)
    assert seen == pytest.approx([1e-5, 1e-5, 0.8e-5, 0.8e-5, 0.64e-5, 0.64e-5])
    seen.clear()
    config = TrainingConfig(schedule="wsd", warmup=2, cooldown=3)
    Trainer(net(), data, lr=1.0, config=config, callbacks=[Rates()]).train(epochs=1)
    assert seen == pytest.approx([0.5, 1, 1, 1, 1 - math.sqrt(1 / 3), 1 - math.sqrt(2 / 3)])


@pytest.mark.parametrize(
    "options",
    [{"cooldown": 1.0}, {"cooldown": -1}, {"stages": 0}, {"stages": 2.0}, {"stage_factor": 0}, {"stage_factor": 1.1}],
    ids=str,
)
def test_schedule_options_are_checked(options):
    with pytest.raises(ConfigError, match=next(iter(options))):
        TrainingConfig(schedule="wsd", **options)
