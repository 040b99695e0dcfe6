"""What all optimizers promise: reference results, masked steps, exact states, no look at the device, tensor rates."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from deepseek_r1.core import ConfigError, InputError
from deepseek_r1.train import (
    AdamW,
    AdamW8bit,
    AdaptiveOptimizer,
    Lion,
    Muon,
    Objective,
    Trainer,
    TrainingConfig,
    train_step,
)
from deepseek_r1.train._checkpoint import gather, read, write
from deepseek_r1.train._device_step import device_step
from deepseek_r1.train._optim import BY_NAME, make_optimizer
from deepseek_r1.train._step import skips_on_device
from deepseek_r1.train.optimizers import DeviceOptimizer, _adamw8bit

OURS = [AdamW8bit, Lion, Muon, AdaptiveOptimizer]
MAKERS = {
    "adamw8bit": lambda params, **kw: AdamW8bit(params, lr=1e-2, **kw),
    "paged": lambda params, **kw: AdamW8bit(params, lr=1e-2, paged=True, **kw),
    "lion": lambda params, **kw: Lion(params, lr=1e-2, weight_decay=0.1, **kw),
    "muon": lambda params, **kw: Muon(params, lr=1e-2, **kw),
    "adaptive": lambda params, **kw: AdaptiveOptimizer(params, base_lr=1e-2, total_steps=7, **kw),
}
every = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)


def parameters(dtype=torch.float32):
    """A matrix with 8-bit states (its last block not full), a small one, a kernel, a bias and a single number."""
    g = torch.Generator().manual_seed(0)
    shapes = [(70, 61), (5, 3), (4, 3, 2, 2), (7,), ()]
    return [nn.Parameter(torch.randn(s, generator=g, dtype=torch.float64).to(dtype)) for s in shapes]


def feed(params, step, scale=1.0):
    g = torch.Generator().manual_seed(100 + step)
    for p in params:
        p.grad = (torch.randn(p.shape, generator=g, dtype=torch.float64) * scale).to(p.dtype)


def run(make, steps=5, dtype=torch.float32, **options):
    params = parameters(dtype)
    optimizer = make(params, **options)
    for step in range(steps):
        feed(params, step)
        optimizer.step()
    return params, optimizer


def snapshot(params, optimizer):
    states = [{k: v.clone() for k, v in optimizer.state[p].items()} for p in params if p in optimizer.state]
    return [p.detach().clone() for p in params], states


def assert_same(one, other):
    (params, states), (others, other_states) = one, other
    assert all(torch.equal(a, b) for a, b in zip(params, others, strict=True))
    for a, b in zip(states, other_states, strict=True):
        assert a.keys() == b.keys()
        assert all(torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)


class Watch(TorchDispatchMode):
    """Fails at operators that bring a number from the device to the host."""

    READS = ("_local_scalar_dense", "nonzero", "is_nonzero", "item", "equal", "unique", "masked_select")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert name not in self.READS, f"{name} waits for the device"
        return func(*args, **(kwargs or {}))


@every
@pytest.mark.parametrize("options", [{}, {"capturable": True}], ids=["plain", "capturable"])
def test_a_step_never_waits_for_the_device(make, options):
    if options and make is MAKERS["paged"]:
        pytest.skip("paged states are brought by the host")
    params = parameters()
    optimizer = make(params, **options)
    feed(params, 0)
    optimizer.step()
    with Watch():
        for step in range(2):
            feed(params, step)
            optimizer.found_inf, optimizer.grad_scale = torch.zeros(()), torch.ones(())
            optimizer.step()
            del optimizer.found_inf, optimizer.grad_scale
            optimizer.step()


def test_the_watch_sees_a_read():
    with Watch(), pytest.raises(AssertionError, match="_local_scalar_dense"):
        torch.ones(()).item()


@every
@pytest.mark.parametrize("when", [0, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_bad_step_leaves_no_trace(make, when, dtype):
    params, optimizer = run(make, when, dtype)
    before = snapshot(params, optimizer)
    feed(params, 9)
    params[0].grad[3, 4] = math.nan
    params[1].grad[0, 0] = math.inf
    optimizer.found_inf = torch.ones(())
    optimizer.step()
    del optimizer.found_inf
    after = snapshot(params, optimizer)
    if when:
        assert_same(before, after)
    assert all(torch.equal(a, b) for a, b in zip(before[0], after[0]))
    assert all(not v.any() for state in after[1] for k, v in state.items() if k != "step") or when
    # and the run goes on as if it had not been
    expected = run(make, when + 1, dtype)
    feed(params, when)
    optimizer.found_inf = torch.zeros(())
    optimizer.step()
    for p, q in zip(params, expected[0]):
        torch.testing.assert_close(p, q, rtol=1e-6 if dtype != torch.bfloat16 else 1e-2, atol=1e-7)
    assert float(optimizer.state[params[0]]["step"]) == when + 1


@every
def test_scaled_gradients_are_unscaled(make):
    params, optimizer = run(make, 2)
    others, plain = run(make, 2)
    feed(params, 2, scale=1024.0)
    feed(others, 2)
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(1024.0), torch.zeros(())
    optimizer.step()
    plain.step()
    for p, q in zip(params, others):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)


@every
def test_states_reload_exactly_through_a_checkpoint(make, tmp_path):
    params, optimizer = run(make, 3)
    write(tmp_path / "c", gather({}, {"optimizer": optimizer.state_dict()}, 3))
    state = read(tmp_path / "c")[1]["optimizer"]
    copies = [nn.Parameter(p.detach().clone()) for p in params]
    resumed = make(copies)
    resumed.load_state_dict(state)
    assert_same(snapshot(params, optimizer), snapshot(copies, resumed))
    for step in range(3, 6):
        for ps, o in ((params, optimizer), (copies, resumed)):
            feed(ps, step)
            o.step()
    assert_same(snapshot(params, optimizer), snapshot(copies, resumed))
    assert len({id(resumed.state[p]["step"]) for p in copies[1:2] + copies[2:3]}) == 1


@every
def test_a_copy_goes_on_alike(make):
    params, optimizer = run(make, 2)
    both = copy.deepcopy({"params": params, "optimizer": optimizer})
    for ps, o in ((params, optimizer), (both["params"], both["optimizer"])):
        feed(ps, 5)
        o.step()
    assert_same(snapshot(params, optimizer), snapshot(both["params"], both["optimizer"]))


@every
def test_half_precision_parameters_have_states_of_their_own_precision(make):
    params, optimizer = run(make, 3, torch.bfloat16)
    assert all(p.dtype == torch.bfloat16 for p in params)
    for state in optimizer.state.values():
        assert all(v.dtype in (torch.float32, torch.uint8) for v in state.values())
    full = run(make, 3, torch.float32)[0]
    for p, q in zip(params, full):
        torch.testing.assert_close(p.float(), q, rtol=2e-2, atol=3e-2)


@every
def test_late_parameters_have_their_own_count(make):
    """A parameter that is unfrozen at step 3 is corrected for its own steps, as torch does it."""
    params, late = parameters()[:2]
    optimizer = make([params, late])
    for step in range(4):
        feed([params, late], step)
        if step < 3:
            late.grad = None
        optimizer.step()
    assert float(optimizer.state[params]["step"]) == 4
    assert float(optimizer.state[late]["step"]) == 1
    feed([params, late], 9)
    late.grad = None
    optimizer.step()
    assert [float(optimizer.state[p]["step"]) for p in (params, late)] == [5, 1]
    optimizer.state[late]["step"].add_(4)
    reloaded = make([params, late])
    reloaded.load_state_dict(optimizer.state_dict())
    assert reloaded.state[params]["step"] is not optimizer.state[params]["step"]
    shared = reloaded.state[params]["step"] is reloaded.state[late]["step"]
    assert shared == (reloaded.param_groups[0]["params"][1] is late)
    feed([params, late], 10)
    late.grad = None
    reloaded.step()
    assert [float(reloaded.state[p]["step"]) for p in (params, late)] == [6, 5]


@every
def test_a_rate_can_be_a_tensor(make):
    if make is MAKERS["paged"]:
        pytest.skip("paged states are brought by the host")
    plain, _ = run(make, 4)
    params, optimizer = run(make, 4, capturable=True)
    for p, q in zip(params, plain):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
    rates = [group["lr"] for group in optimizer.param_groups]
    assert all(isinstance(rate, torch.Tensor) for rate in rates)
    before = snapshot(params, optimizer)[0]
    for rate in rates:
        rate.fill_(0.0)
    feed(params, 8)
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, params))


@every
def test_memory_formats_and_parts_do_not_matter(make):
    """Channels last parameters, gradients laid out otherwise, parameters in several groups."""
    g = torch.Generator().manual_seed(0)
    weight, grad = torch.randn(16, 32, 3, 3, generator=g), torch.randn(16, 32, 3, 3, generator=g)
    a, b = nn.Parameter(weight.clone()), nn.Parameter(weight.clone().to(memory_format=torch.channels_last))
    for p, given_ in ((a, grad), (b, grad.contiguous())):
        optimizer = make([{"params": [p]}, {"params": [nn.Parameter(torch.zeros(2))]}])
        for _ in range(3):
            p.grad = given_.clone()
            optimizer.step()
    torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
    assert b.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("kind", OURS)
@pytest.mark.parametrize(
    "options",
    [{"lr": -1.0}, {"lr": math.nan}, {"lr": "fast"}, {"betas": (0.9, 1.0)}, {"weight_decay": -1}, {"eps": 0}],
    ids=str,
)
def test_options_are_checked(kind, options):
    name = next(iter(options))
    if name not in kind.__init__.__annotations__:
        pytest.skip(f"{kind.__name__} has no {name}")
    with pytest.raises(ConfigError, match=name):
        kind(parameters(), **options)


@pytest.mark.parametrize("kind", OURS)
def test_other_misuse_is_named(kind):
    with pytest.raises(ConfigError, match="floating-point"):
        kind([nn.Parameter(torch.zeros(3, 3, dtype=torch.complex64))])
    p = nn.Parameter(torch.zeros(4, 4))
    optimizer = kind([p])
    p.grad = torch.eye(4).to_sparse()
    with pytest.raises(InputError, match="sparse"):
        optimizer.step()
    with pytest.raises(ValueError, match="do not fit"):
        optimizer.load_state_dict({**optimizer.state_dict(), "state": {0: {"step": torch.zeros(()), "x": p}}})
    with pytest.raises(ConfigError):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(2, dtype=torch.complex64))]})
    assert len(optimizer.param_groups) == 1


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 10_000), steps=st.integers(1, 6), decay=st.sampled_from([0.0, 0.3]))
def test_lion_is_the_paper(seed, steps, decay):
    g = torch.Generator().manual_seed(seed)
    p = nn.Parameter(torch.randn(6, 5, generator=g, dtype=torch.float64))
    w, m = p.detach().clone(), torch.zeros(6, 5, dtype=torch.float64)
    optimizer = Lion([p], lr=0.01, betas=(0.9, 0.99), weight_decay=decay)
    for _ in range(steps):
        p.grad = torch.randn(6, 5, generator=g, dtype=torch.float64)
        optimizer.step()
        c = 0.9 * m + 0.1 * p.grad
        w = w - 0.01 * (torch.sign(c) + decay * w)
        m = 0.99 * m + 0.01 * p.grad
        torch.testing.assert_close(p.detach(), w, rtol=1e-12, atol=1e-12)


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 10_000), steps=st.integers(1, 9), period=st.integers(1, 5))
def test_adaptive_is_its_formula(seed, steps, period):
    g = torch.Generator().manual_seed(seed)
    ps = [nn.Parameter(torch.randn(s, generator=g, dtype=torch.float64)) for s in ((4, 3), (5,))]
    ws, bs = [p.detach().clone() for p in ps], [torch.zeros_like(p) for p in ps]
    optimizer = AdaptiveOptimizer(ps, base_lr=0.1, total_steps=period)
    for t in range(steps):
        for p in ps:
            p.grad = torch.randn(p.shape, generator=g, dtype=torch.float64)
        optimizer.step()
        lr = 0.1 * (1 + math.cos(math.pi * (t % period) / period)) / 2
        for i, p in enumerate(ps):
            bs[i] = 0.9 * bs[i] + p.grad
            ws[i] = ws[i] - lr * (1 + 0.1 * abs(float(p.grad.mean()))) * bs[i]
            torch.testing.assert_close(p.detach(), ws[i], rtol=1e-12, atol=1e-12)


def test_adaptive_takes_either_name_of_its_rate():
    assert AdaptiveOptimizer(parameters(), lr=0.5).param_groups[0]["lr"] == 0.5
    assert AdaptiveOptimizer(parameters()).param_groups[0]["lr"] == 0.001


def test_our_adamw_is_torch_s_fused():
    ours, theirs = parameters(), parameters()
    a, b = AdamW(ours, lr=1e-2), torch.optim.AdamW(theirs, lr=1e-2, fused=True)
    assert a.param_groups[0]["fused"]
    for step in range(3):
        for ps, o in ((ours, a), (theirs, b)):
            feed(ps, step)
            o.step()
    assert all(torch.equal(p, q) for p, q in zip(ours, theirs))
    assert not AdamW(parameters(), foreach=True).param_groups[0]["fused"]
    assert AdamW([{"params": iter(parameters())}]).param_groups[0]["fused"]
    assert not AdamW([nn.Parameter(torch.zeros(2, dtype=torch.complex64))]).param_groups[0]["fused"]


# In the Trainer.


def data(n=6):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(n, 32, 16, generator=g)
    return [(x[i], (x[i, :, :4].sum(dim=1) > 0).long()) for i in range(n)]


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 300), nn.ReLU(), nn.Linear(300, 32), nn.ReLU(), nn.Linear(32, 2))


@pytest.mark.parametrize("name", BY_NAME)
def test_the_trainer_makes_each_by_name_and_class(name):
    lr = {"adaptive": 0.05, "lion": 1e-3, "sgd": 0.05}.get(name, 5e-3)
    trainer = Trainer(net(), data(), lr=lr, optimizer=name, config=TrainingConfig(weight_decay=0.1))
    report = trainer.train(epochs=6)
    assert trainer.history[-1]["train_loss"] < 0.6 * trainer.history[0]["train_loss"]
    assert any(type(trainer.optimizer).__name__ in note for note in report.notes)
    kind, options = BY_NAME[name]
    if not options:
        same = Trainer(net(), data(), lr=lr, optimizer=kind, config=TrainingConfig(weight_decay=0.1))
        same.train(epochs=6)
        assert all(torch.equal(a, b) for a, b in zip(trainer.model.parameters(), same.model.parameters()))
    if "weight_decay" in trainer.optimizer.defaults:
        assert {g["weight_decay"] for g in trainer.optimizer.param_groups} == {0.0, 0.1}


@pytest.mark.parametrize("name", BY_NAME)
def test_a_resumed_run_is_the_same_run(name, tmp_path):
    def trainer(folder):
        config = TrainingConfig(save_dir=str(folder), save_every_steps=4, schedule="wsd", seed=0, keep_last=None)
        return Trainer(net(), data(), lr=1e-3, optimizer=name, config=config)

    whole = trainer(tmp_path / "whole")
    whole.train(epochs=2)
    broken = trainer(tmp_path / "other")
    broken.resume(tmp_path / "whole" / "step-00000008")
    assert broken.step == 8
    broken.train(epochs=2)
    assert all(torch.equal(a, b) for a, b in zip(whole.model.parameters(), broken.model.parameters()))


def test_the_states_of_another_optimizer_are_refused(tmp_path):
    trainer = Trainer(net(), data(), lr=1e-3, optimizer="adamw")
    trainer.train(epochs=1)
    trainer.save(tmp_path / "c")
    with pytest.raises(InputError, match="optimizer"):
        Trainer(net(), data(), lr=1e-3, optimizer="adamw8bit").resume(tmp_path / "c")


def test_unknown_names_are_refused_with_the_nearest():
    with pytest.raises(ConfigError, match="adamw8bit"):
        make_optimizer(net(), 1e-3, TrainingConfig(), "AdamW8bits")


def test_adaptive_learns_the_length_of_the_run():
    trainer = Trainer(net(), data(), lr=1e-2, optimizer="adaptive")
    trainer.train(epochs=3)
    assert trainer.optimizer.param_groups[0]["total_steps"] == 18


def test_a_tensor_rate_stays_the_same_tensor():
    model = net()
    optimizer = Lion(model.parameters(), lr=1e-3, capturable=True)
    rate = optimizer.param_groups[0]["lr"]
    trainer = Trainer(model, data(), optimizer=optimizer, config=TrainingConfig(schedule="linear"))
    trainer.train(epochs=1)
    assert optimizer.param_groups[0]["lr"] is rate
    assert float(rate) == pytest.approx(1e-3 / 6)


@pytest.mark.parametrize("kind", OURS)
def test_torch_s_scaler_skips_an_overflow(kind):
    torch.manual_seed(0)
    model = nn.Linear(4, 2)
    optimizer = kind(model.parameters(), lr=1e-2)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    before = [p.detach().clone() for p in model.parameters()]
    x = torch.full((2, 4), math.inf)
    train_step(model, [(x, torch.tensor([0, 1]))], optimizer, Objective(model), scaler=scaler)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters()))
    assert scaler.get_scale() == 2.0**9
    train_step(model, [(torch.ones(2, 4), torch.tensor([0, 1]))], optimizer, Objective(model), scaler=scaler)
    assert not torch.equal(before[0], model.weight)
    assert isinstance(optimizer, DeviceOptimizer)


@pytest.mark.parametrize("kind", OURS)
@pytest.mark.parametrize("clip", [None, 0.05])
def test_a_started_step_is_the_plain_step(kind, clip):
    """What a GPU runs: the verdict and the clipping's factor go through the optimizer, and a bad step is masked."""
    models = [net(), net()]
    options = {} if kind is AdaptiveOptimizer else {"weight_decay": 0.1}
    mine, plain = (kind(m.parameters(), lr=1e-3, **options) for m in models)
    objective, bad = Objective(models[0]), torch.zeros(())

    def started(window):
        return device_step(
            models[0], window, mine, objective, bad,
            device=torch.device("cpu"), precision="fp32", micro_batch_size=None, clip_grad_norm=clip,
        )  # fmt: skip

    batches = data(4)
    for batch in batches[:3]:
        started([batch])
        train_step(models[1], [batch], plain, Objective(models[1]), clip_grad_norm=clip)
    for p, q in zip(models[0].parameters(), models[1].parameters()):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=2e-4)
    before = snapshot(list(models[0].parameters()), mine)
    x, y = batches[3]
    started([(x * math.nan, y)])
    assert bool(bad)
    started([batches[3]])
    assert_same(before, snapshot(list(models[0].parameters()), mine))
    assert skips_on_device(mine)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
class TestOnAGPU:
    @every
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_the_result_is_that_of_the_cpu(self, make, dtype):
        there = [nn.Parameter(p.detach().cuda()) for p in parameters(dtype)]
        optimizer = make(there)
        for step in range(4):
            feed(cpu := parameters(dtype), step)
            for p, q in zip(there, cpu):
                p.grad = q.grad.cuda()
            torch.cuda.set_sync_debug_mode("error" if step > 1 else "default")
            try:
                optimizer.step()
            finally:
                torch.cuda.set_sync_debug_mode("default")
        expected, reference = run(make, 4, dtype)
        for p, q in zip(there, expected):
            # Muon iterates in bf16 there
            torch.testing.assert_close(p.cpu(), q, rtol=2e-2, atol=5e-3)
        if dtype == torch.float32 and not isinstance(optimizer, Muon):
            for p, q in zip(there, expected):
                torch.testing.assert_close(p.cpu(), q, rtol=1e-4, atol=2e-4)
        state = optimizer.state_dict()["state"][0]
        assert state.keys() == reference.state_dict()["state"][0].keys()
        assert any(v.any() for k, v in state.items() if k != "step")

    @pytest.mark.parametrize("kind", OURS)
    def test_a_graph_replays_steps_and_follows_the_rate(self, kind):
        def fresh():
            params = [nn.Parameter(p.detach().cuda()) for p in parameters()]
            for p in params:
                p.grad = torch.zeros_like(p)
            return params, kind(params, lr=1e-2, capturable=True)

        params, optimizer = fresh()
        others, plain = fresh()
        graph = torch.cuda.CUDAGraph()
        for step in range(5):
            feed(cpu := parameters(), step)
            for ps, o in ((params, optimizer), (others, plain)):
                for p, q in zip(ps, cpu):
                    p.grad.copy_(q.grad)
                for group in o.param_groups:
                    group["lr"].fill_(1e-2 / (step + 1))
            plain.step()
            if step < 2:
                optimizer.step()
            else:
                if step == 2:
                    torch.cuda.synchronize()
                    with torch.cuda.graph(graph):
                        optimizer.step()
                graph.replay()
        for p, q in zip(params, others):
            torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
        assert float(optimizer.state[params[0]]["step"]) == 5

    @pytest.mark.parametrize("name", BY_NAME)
    def test_the_trainer_trains_with_each(self, name):
        trainer = Trainer(
            net(), data(), lr={"adaptive": 0.05, "lion": 1e-3, "sgd": 0.05}.get(name, 5e-3), optimizer=name
        )
        trainer.train(epochs=6)
        assert trainer.history[-1]["train_loss"] < 0.7 * trainer.history[0]["train_loss"]

    def test_pages_are_pinned_and_large_parameters_cut(self, monkeypatch):
        monkeypatch.setattr(_adamw8bit, "_AT_ONCE", 1 << 16)
        torch.manual_seed(0)
        start = [torch.randn(700, 700), torch.randn(300, 300), torch.randn(100, 50)]
        results = []
        for paged in (False, True):
            params = [nn.Parameter(p.cuda()) for p in start]
            optimizer = AdamW8bit(params, lr=1e-2, paged=paged)
            for step in range(4):
                for i, p in enumerate(params):
                    p.grad = torch.sin(p.detach() * (step + i + 1))
                optimizer.step()
            results.append(snapshot(params, optimizer))
            codes = optimizer.state_dict()["state"][0]["exp_avg"]
            assert codes.is_pinned() == paged
        assert all(torch.equal(a, b) for a, b in zip(results[0][0], results[1][0]))
        for one, other in zip(results[0][1], results[1][1]):
            assert all(torch.equal(v.cpu(), other[k].cpu()) for k, v in one.items())
