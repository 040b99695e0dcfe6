"""AdamW with states of 8 bits: the code, the bytes, the error of a step, and accuracy on real digits beside fp32."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from deepseek_r1.core import ConfigError
from deepseek_r1.data import digits
from deepseek_r1.train import AdamW, AdamW8bit, Trainer, TrainingConfig
from deepseek_r1.train.memory import measured_peak
from deepseek_r1.train.optimizers import _adamw8bit
from deepseek_r1.train.optimizers._blockwise import BlockCode, dynamic_code

CPU = torch.device("cpu")


@pytest.mark.parametrize("signed", [True, False])
def test_the_code_is_the_paper_s(signed):
    """256 numbers; from 1 down each decade has half as many, evenly spaced; zero and one are exact."""
    numbers = dynamic_code(signed).double()
    assert len(set(numbers.tolist())) == 256
    assert numbers[-1] == 1.0
    assert (numbers == 0).sum() == 1
    for decade in range(7):
        low, high = 10.0 ** -(decade + 1), 10.0**-decade
        inside = numbers[(numbers > low) & (numbers < high)]
        assert len(inside) == 2 ** ((6 if signed else 7) - decade)
        gaps = inside.diff()
        assert gaps.numel() == 0 or torch.allclose(gaps, gaps[:1], rtol=1e-3)
    assert int((numbers < 0).sum()) == (127 if signed else 0)


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 9999), size=st.floats(-30, 30), signed=st.booleans(), spread=st.floats(0, 6))
def test_encoding_takes_the_nearest_number(seed, size, signed, spread):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(3, 256, generator=g) * 10 ** (size - spread * torch.rand(3, 256, generator=g))
    x = x if signed else x.abs()
    code = BlockCode(signed=signed, device=CPU)
    codes, scales = code.encode(x)
    back = code.decode(codes, scales)
    assert codes.dtype == torch.uint8
    assert torch.equal(scales, x.abs().amax(1))
    shares = (x / scales[:, None]).double()
    best = (shares[..., None] - dynamic_code(signed).double()).abs().amin(-1)
    error = (back.double() / scales[:, None].double() - shares).abs()
    allowed = best + 1e-6 + (0 if signed else 3.3e-7)
    assert bool((error <= allowed).all())
    assert signed or bool((back[x > 0] > 0).all())
    # the largest of a block without sign, and zeros, are exact
    assert signed or torch.equal(back.amax(1), x.amax(1))
    zeros = code.encode(torch.zeros(2, 256))
    assert not code.decode(*zeros).any()


def big(model):
    return [p for p in model.parameters() if p.numel() >= 4096]


def states_bytes(optimizer):
    return sum(v.numel() * v.element_size() for s in optimizer.state.values() for k, v in s.items() if k != "step")


def classifier(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Flatten(), nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10)
    )


def fit(kind, seed=0, epochs=4, **options):
    source = digits(batch_size=64, seed=seed)
    trainer = Trainer(
        classifier(seed), source.train, source.test, lr=2e-3, optimizer=lambda ps: kind(ps, lr=2e-3, **options),
        config=TrainingConfig(schedule="cosine", device="cpu", precision="fp32"),
    )  # fmt: skip
    trainer.train(epochs=epochs)
    return trainer


def test_the_states_take_a_quarter_of_the_bytes():
    model = nn.Sequential(nn.Linear(64, 512), nn.LayerNorm(512), nn.Linear(512, 511), nn.Linear(511, 10))
    sizes, optimizers = {}, {}
    for kind in (AdamW, AdamW8bit):
        optimizers[kind] = kind(model.parameters(), lr=1e-3)
        model(torch.ones(2, 64)).sum().backward()
        optimizers[kind].step()
        sizes[kind] = states_bytes(optimizers[kind])
    assert sizes[AdamW8bit] <= 0.27 * sizes[AdamW]
    state = optimizers[AdamW8bit].state
    assert {v.dtype for p, s in state.items() if p.numel() < 4096 for v in s.values()} == {torch.float32}
    assert {s["exp_avg"].dtype for p, s in state.items() if p.numel() >= 4096} == {torch.uint8}


def test_accuracy_is_that_of_fp32_within_noise():
    """Real digits, 359 test samples, five seeds each: the means differ by less than two standard errors."""
    seeds = range(5)
    found = {k: [fit(k, s).evaluate()["accuracy"] for s in seeds] for k in (AdamW, AdamW8bit)}
    means = {k: sum(v) / len(v) for k, v in found.items()}
    spread = math.sqrt(sum((a - means[k]) ** 2 for k, v in found.items() for a in v) / (2 * len(seeds) - 2))
    assert means[AdamW] > 0.94
    noise = max(spread, 1 / 359) * math.sqrt(2 / len(seeds))
    assert means[AdamW8bit] > means[AdamW] - 2 * noise, found


def test_the_error_of_each_step_is_bounded():
    """Updates of the same gradients with states kept in 8 bits and in fp32, over 150 steps of a real run."""
    source = digits(batch_size=64)
    model = classifier()
    shadow = [nn.Parameter(p.detach().clone()) for p in big(model)]
    fp32 = AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    eight = AdamW8bit(shadow, lr=1e-3, weight_decay=0.0)
    errors, largest, steps = [], [], 0
    while steps < 150:
        for x, y in source.train:
            fp32.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            before = [p.detach().clone() for p in big(model)]
            with torch.no_grad():
                for p, q in zip(shadow, big(model), strict=True):
                    p.copy_(q)
                    p.grad = q.grad.clone()
            fp32.step()
            eight.step()
            for p, q, b in zip(shadow, big(model), before, strict=True):
                update, exact = (p.detach() - b).double(), (q.detach() - b).double()
                errors.append(float((update - exact).norm() / exact.norm()))
                largest.append(float(update.abs().max() / exact.abs().max()))
            steps += 1
    assert max(errors) < 0.15, max(errors)
    assert sum(errors) / len(errors) < 0.09
    assert max(largest) < 1.4, "no update is much larger than the largest exact one"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_small_tensors_are_plain_adamw(dtype):
    p, q = (nn.Parameter(torch.linspace(-1, 1, 50).to(dtype)) for _ in range(2))
    a, b = AdamW8bit([p], lr=1e-2), torch.optim.AdamW([q.float().detach().requires_grad_()], lr=1e-2)
    (reference,) = b.param_groups[0]["params"]
    g = torch.Generator().manual_seed(0)
    for _ in range(4):
        p.grad = torch.randn(50, generator=g).to(dtype)
        reference.grad = p.grad.float()
        a.step()
        b.step()
    torch.testing.assert_close(p.float(), reference, rtol=1e-6 if dtype == torch.float32 else 1e-2, atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("paged", [False, True])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_pages_do_not_change_the_result(monkeypatch, paged, decay, dtype):
    """Large parameters are cut, small ones share a page: the same bits whatever the page, and wherever states live."""
    monkeypatch.setattr(_adamw8bit, "_AT_ONCE_PER_THREAD", 1)
    results = []
    for at_once in (1 << 23, 6_000, 512):
        monkeypatch.setattr(_adamw8bit, "_AT_ONCE_ON_CPU", at_once)
        g = torch.Generator().manual_seed(0)
        shapes = ((129, 70), (64, 64), (5000,), (40, 41, 3), (16, 48, 3, 3), (90, 80))
        params = [nn.Parameter(torch.randn(s, generator=g).to(dtype)) for s in shapes]
        params[1].data = params[1].data.t()
        params[4].data = params[4].data.to(memory_format=torch.channels_last)
        optimizer = AdamW8bit(params, lr=1e-2, weight_decay=decay, paged=paged and at_once != 1 << 23)
        for _ in range(3):
            for p in params:
                p.grad = torch.randn(p.shape, generator=g).to(dtype)
            params[5].grad = params[5].grad.t().contiguous().t()
            optimizer.step()
        states = [v for p in params for v in optimizer.state[p].values()]
        results.append([p.detach().clone() for p in params] + states)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("shape", [(1100, 1000), (1000, 1100), (256, 512, 3, 3)])
@pytest.mark.parametrize("layout", ["contiguous", "turned"])
def test_an_update_on_a_cpu_takes_a_few_megabytes_beside_the_tensors(shape, layout):
    p = nn.Parameter(torch.randn(shape))
    if layout == "turned":
        p.data = p.data.t() if len(shape) == 2 else p.data.to(memory_format=torch.channels_last)
    p.grad = torch.randn_like(p)
    optimizer = AdamW8bit([p], lr=1e-3)
    optimizer.step()
    page = max(_adamw8bit._AT_ONCE_ON_CPU, _adamw8bit._AT_ONCE_PER_THREAD * torch.get_num_threads())
    assert measured_peak(optimizer.step) < 8.5 * 4 * page
    if torch.get_num_threads() <= 8:
        assert measured_peak(optimizer.step) < 9e6


def test_states_move_between_paged_and_not():
    source = fit(AdamW8bit, epochs=1)
    paged = AdamW8bit(source.model.parameters(), lr=1e-3, paged=True)
    paged.load_state_dict(source.optimizer.state_dict())
    again = AdamW8bit(source.model.parameters(), lr=1e-3)
    again.load_state_dict(paged.state_dict())
    for p in source.model.parameters():
        assert all(torch.equal(v, again.state[p][k]) for k, v in source.optimizer.state[p].items())
    with pytest.raises(ConfigError, match="capturable"):
        AdamW8bit(source.model.parameters(), paged=True, capturable=True)
