"""Plans: below the limit, as predicted, monotone, equal to the bit, quick."""

import time

import pytest
import torch
from torch import nn

from deepseek_r1.core import ConfigError, InputError
from deepseek_r1.train import MemoryPlanner, plan_memory
from deepseek_r1.train.memory import _partial, measured_peak
from deepseek_r1.train.memory._meter import storage_bytes
from deepseek_r1.train.memory._plan import automatic_budget
from deepseek_r1.train.memory._solver import uniform

from . import models_for_memory
from .models_for_memory import NAMES, Transformer, cases, stack

SHARES = (1.0, 0.85, 0.7, 0.6, 0.5, 0.42, 0.35)


def larger(name):
    """The cases with batches large enough that activations are what counts."""
    torch.manual_seed(0)
    model, x, y = cases()[name]
    times = {"transformer": 2, "resnet": 2, "encoder-decoder": 2}.get(name, 4)
    return model, x.repeat(times, *[1] * (x.ndim - 1)), y.repeat(times, *[1] * (y.ndim - 1))


def one_step(planner):
    work = planner.workload

    def step():
        for p in work.model.parameters():
            p.grad = None
        work.run()

    return step


def gradients(planner, step):
    torch.manual_seed(1)
    step()
    return [p.grad.clone() for p in planner.workload.model.parameters()]


@pytest.mark.parametrize("name", NAMES)
def test_the_peak_keeps_the_promise_at_every_limit(name):
    model, x, y = larger(name)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    planner = MemoryPlanner(model, (x, y))
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items()), "planning left no trace"
    assert all(p.grad is None for p in model.parameters())
    step = one_step(planner)
    plain = gradients(planner, step)
    model.load_state_dict(state)
    model.zero_grad()
    everything = measured_peak(step, held=planner.workload.alive())
    alive = planner.alive_bytes
    assert planner.unconstrained_bytes == pytest.approx(everything, rel=0.04)
    peaks, seconds, tried = [], [], 0
    for share in SHARES:
        budget = alive + share * (everything - alive)
        if budget < planner.minimum_bytes:
            break
        plan = planner.plan(budget / 1e9)
        tried += 1
        model.load_state_dict(state)
        with plan.applied(model):
            assert all(torch.equal(a, b) for a, b in zip(plain, gradients(planner, step), strict=True))
            model.zero_grad()
            real = measured_peak(step, held=planner.workload.alive())
        # Without what only the optimizer's update needs: there is none here.
        real = max(real, alive)
        assert real <= plan.budget_bytes
        assert plan.predicted_peak_bytes == pytest.approx(real, rel=0.02)
        peaks.append(real)
        seconds.append(plan.extra_seconds)
        assert plan.report.ok
    assert tried >= (1 if name == "unstructured" else 3)
    assert peaks == sorted(peaks, reverse=True)
    assert seconds == sorted(seconds)


def test_statistics_of_batch_norms_count_a_batch_once():
    torch.manual_seed(0)
    model, x, y = cases()["resnet"]
    planner = MemoryPlanner(model, (x, y))
    state = {key: value.clone() for key, value in model.state_dict().items()}
    one_step(planner)()
    once = {key: value.clone() for key, value in model.state_dict().items()}
    model.load_state_dict(state)
    with planner.plan(planner.minimum_bytes * 1.02 / 1e9).applied(model):
        one_step(planner)()
    assert model.norm.num_batches_tracked == 1
    assert all(torch.equal(once[key], value) for key, value in model.state_dict().items())


def test_blocks_of_which_the_first_is_not_linked_are_predicted_too():
    class Summed(nn.Module):
        """The first block's input is a sum, that of the others the output of the block before."""

        def __init__(self):
            super().__init__()
            self.one, self.other = nn.Embedding(40, 64), nn.Embedding(32, 64)
            self.blocks = nn.ModuleList(
                nn.Sequential(nn.LayerNorm(64), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64)) for _ in range(8)
            )
            self.head = nn.Linear(64, 40)

        def forward(self, ids):
            x = self.one(ids) + self.other(torch.arange(ids.shape[1]))
            for block in self.blocks:
                x = block(x)
            return self.head(x).transpose(1, 2)

    torch.manual_seed(0)
    model, ids = Summed(), torch.randint(0, 40, (32, 32))
    planner = MemoryPlanner(model, (ids, ids))
    real = measured_peak(planner.workload.run, held=planner.workload.alive())
    assert planner.unconstrained_bytes == pytest.approx(real, rel=0.012)


def test_no_uniform_way_is_faster_under_the_same_limit():
    torch.manual_seed(0)
    model, x, y = larger("transformer")
    planner = MemoryPlanner(model, (x, y))
    for way in uniform(planner._chain):
        if way.peak >= planner.minimum_bytes:
            assert planner.plan(way.peak * 1.01 / 1e9).extra_seconds <= way.seconds + 1e-12


def test_a_tighter_limit_never_has_a_higher_peak_where_a_saved_bytes_knob_has():
    """Saved bytes are no peak: layers of very different width, where recomputing the most makes the peak rise."""
    torch.manual_seed(0)
    widths = (32, 256, 32, 256, 32, 64, 512, 64, 32, 256, 32)
    model, x = stack(widths), torch.randn(1024, 32)
    planner = MemoryPlanner(model, (x, torch.randn(1024, 1)))
    step = one_step(planner)
    peaks = []
    low, high = planner.minimum_bytes, planner.unconstrained_bytes
    for k in range(12):
        plan = planner.plan((low + (high - low) * k / 11) * 1.0001 / 1e9)
        model.zero_grad()
        with plan.applied(model):
            peaks.append(measured_peak(step, held=planner.workload.alive()))
        assert peaks[-1] <= plan.budget_bytes
        assert plan.predicted_peak_bytes == pytest.approx(peaks[-1], rel=0.02)
    assert peaks == sorted(peaks)
    assert peaks[0] < 0.7 * peaks[-1]


def test_a_limit_that_is_too_small_gives_the_minimum():
    torch.manual_seed(0)
    model, x, y = cases()["transformer"]
    planner = MemoryPlanner(model, (x, y))
    with pytest.raises(ConfigError, match=r"at least .* GB") as caught:
        planner.plan(planner.minimum_bytes * 0.9 / 1e9)
    least = float(str(caught.value).split("at least ")[1].split(" GB")[0])
    assert least == pytest.approx(planner.minimum_bytes / 1e9, rel=1e-3)
    assert planner.plan(planner.minimum_bytes * 1.001 / 1e9).measured_peak_bytes <= planner.minimum_bytes * 1.001


@pytest.mark.parametrize("bad", [0, -1, float("nan"), float("inf"), True, "much"])
def test_a_limit_that_is_no_number_is_refused(bad):
    planner = MemoryPlanner(nn.Sequential(nn.Linear(2, 2)), (torch.ones(1, 2), torch.ones(1, 2)))
    with pytest.raises(ConfigError, match="memory_gb"):
        planner.plan(bad)


def test_optimizer_state_and_earlier_gradients_are_counted():
    torch.manual_seed(0)
    model, x, y = cases()["transformer"]
    size = storage_bytes(model.parameters())
    bare = MemoryPlanner(model, (x, y))
    adam = torch.optim.AdamW(model.parameters(), fused=True)
    with_state = MemoryPlanner(model, (x, y), optimizer=adam)
    assert with_state.unconstrained_bytes - bare.unconstrained_bytes == pytest.approx(2 * size, rel=0.1)
    adding = MemoryPlanner(model, (x, y), optimizer=adam, accumulates=True)
    assert adding.unconstrained_bytes > with_state.unconstrained_bytes + 0.8 * size
    plan = adding.plan((adding.minimum_bytes + adding.unconstrained_bytes) / 2e9)
    work = adding.workload

    def two_steps():
        for _ in range(2):
            adam.zero_grad()
            work.run()
            work.run()
            adam.step()

    with plan.applied(model):
        assert measured_peak(two_steps, held=work.alive()) <= plan.budget_bytes
    # The state is there now, and is not counted twice.
    again = adding.plan(plan.budget_bytes * 0.999 / 1e9)
    assert again.measured_peak_bytes == pytest.approx(plan.measured_peak_bytes, rel=0.1)


# The compiler's own warnings are not ours.
@pytest.mark.filterwarnings("ignore")
def test_autocast_and_compiled_blocks():
    torch.manual_seed(0)
    model, x, y = larger("transformer")
    for block in model.blocks:
        block.mlp[4].p = 0.0
        block.compile(backend="aot_eager")
    planner = MemoryPlanner(model, (x, y), precision="bf16")
    step = one_step(planner)
    plain = gradients(planner, step)
    low, high = planner.minimum_bytes, planner.unconstrained_bytes
    for k in range(3):
        plan = planner.plan((low + (high - low) * (k + 0.1) / 3) / 1e9)
        assert {b.action for b in plan.blocks} <= {"keep", "recompute"}
        with plan.applied(model):
            found = gradients(planner, step)
            model.zero_grad()
            assert measured_peak(step, held=planner.workload.alive()) <= plan.budget_bytes
        assert all(torch.allclose(a, b, rtol=0.02, atol=1e-3) for a, b in zip(plain, found, strict=True))


@pytest.mark.filterwarnings("ignore")
def test_compiled_blocks_may_save_a_share(monkeypatch):
    monkeypatch.setattr(_partial, "_COMPILER", "aot_eager")
    torch.manual_seed(0)
    model, x, y = larger("transformer")
    for block in model.blocks:
        block.compile(backend="aot_eager")
    drawing = MemoryPlanner(model, (x, y), shares=(0.5,))
    assert not any("partial" in c.name for block in drawing.profile.chain.blocks for c in block.choices)
    assert "other random numbers" in str(drawing.plan(1).report)

    monkeypatch.setattr(models_for_memory, "ATTENTION_DROPOUT", 0.0)
    for block in model.blocks:
        block.mlp[4].p = 0.0
    planner = MemoryPlanner(model, (x, y), shares=(0.6, 0.3))
    choices = {c.name: c for block in planner.profile.chain.blocks for c in block.choices if len(block.choices) > 2}
    assert set(choices) == {"keep", "recompute", "partial 0.6", "partial 0.3"}
    assert choices["keep"].held > choices["partial 0.6"].held > choices["partial 0.3"].held > 0
    for choice in ("partial 0.6", "partial 0.3"):
        assert choices[choice].seconds < 1, "what compiling takes is left out"
    step = one_step(planner)
    plain = gradients(planner, step)
    seen = set()
    low, high = planner.minimum_bytes, planner.unconstrained_bytes
    for k in range(4):
        plan = planner.plan((low + (high - low) * (k + 0.5) / 4) / 1e9)
        seen |= {b.action for b in plan.blocks}
        with plan.applied(model):
            found = gradients(planner, step)
            model.zero_grad()
            assert measured_peak(step, held=planner.workload.alive()) <= plan.budget_bytes
        assert all(torch.allclose(a, b, rtol=1e-3, atol=1e-6) for a, b in zip(plain, found, strict=True))
    assert "partial" in seen


def test_a_plan_says_why_its_steps_cannot_be_recorded():
    torch.manual_seed(0)
    model, x, y = larger("transformer")
    planner = MemoryPlanner(model, (x, y))
    assert planner.plan(1).why_not_recorded == ""
    assert "random" in planner.plan(planner.minimum_bytes * 1.05 / 1e9).why_not_recorded
    still = stack()
    planner = MemoryPlanner(still, (torch.randn(256, 32), torch.randn(256, 1)))
    plan = planner.plan(planner.minimum_bytes * 1.01 / 1e9)
    assert any(block.action == "recompute" for block in plan.blocks)
    assert plan.why_not_recorded == ""


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_blocks_compiled_by_inductor():
    torch.manual_seed(0)
    model, x, y = larger("transformer")
    planner = MemoryPlanner(model, (x, y), compiled=True)
    low, high = planner.minimum_bytes, planner.unconstrained_bytes
    for k in range(3):
        plan = planner.plan((low + (high - low) * (k + 0.1) / 3) / 1e9)
        with plan.applied(model):
            model.zero_grad()
            assert measured_peak(one_step(planner), held=planner.workload.alive()) <= plan.budget_bytes


def test_a_plan_is_made_in_seconds_and_says_what_it_does(slower):
    torch.manual_seed(0)
    model = Transformer(blocks=12, d=64)
    x = torch.randint(0, 40, (16, 64))
    began = time.perf_counter()
    plan = plan_memory(model, (x, x), budget_gb=0.06)
    assert time.perf_counter() - began < 10 * slower
    assert plan.measured_peak_bytes <= 0.06e9
    assert len(plan.blocks) == 14
    text = str(plan.report)
    assert "peak memory" in text
    assert "14 blocks" in text
    assert plan.report["peak memory"].before > plan.report["peak memory"].after


def test_a_plan_is_refused_by_another_model():
    plan = plan_memory(stack(), (torch.randn(4, 32), torch.randn(4, 1)), budget_gb=1)
    with pytest.raises(InputError, match="another model"):
        plan.applied(nn.Sequential(nn.Linear(2, 2)))


def test_auto_leaves_a_margin():
    budget = automatic_budget(torch.device("cpu"), 1000)
    assert 1000 < budget < 1e13


def test_models_and_batches_that_cannot_be_planned_are_refused():
    with pytest.raises(InputError, match=r"nn\.Module"):
        plan_memory(lambda x: x, torch.ones(2))
    with pytest.raises(ConfigError, match="precision"):
        plan_memory(nn.Linear(2, 2), (torch.ones(1, 2), torch.ones(1, 2)), precision="int8")

    class Unused(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(2, 2)

        def forward(self, x):
            return x @ self.layer.weight

    with pytest.raises(InputError, match="no block"):
        plan_memory(Unused(), (torch.ones(1, 2), torch.ones(1, 2)))
